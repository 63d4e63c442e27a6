"""Scores of clip-level tags.

Conventions: ``reference`` first, ``posteriors`` or ``estimated`` second. Multi-label references are
(num_clips, num_classes) of 0 and 1 (or bool); any monotonic score may stand in for a posterior.
Scores are fractions in [0, 1] and per class they are NaN where the class allows none: average
precision needs a positive clip, ROC AUC a positive and a negative one. Means are taken over the
other classes, and equal posteriors are one operating point, as in scikit-learn
(``average_precision_score``, ``roc_auc_score``).

Calibration: the posteriors are put into bins, and the calibration error (ECE) is the mean distance between
the mean posterior of a bin and the share of its clips that have the label, weighted by the clips of the
bins. *Equal width*: bin ``m`` of ``M`` is ``((m - 1) / M, m / M]``, and 0 is in the first (Guo et al., ICML 2017,
arXiv 1706.04599). *Equal mass*: the borders are posteriors at ``1 / M, 2 / M ...`` of their order, so that the bins
hold about as many clips each; equal posteriors share a bin. What is put in is the choice: the posterior of the
chosen class and whether it is right (confidence calibration, single label), or the posteriors of one class and
whether it is there (multi-label).
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray


def _indices(reference: ArrayLike, estimated: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Check and convert two vectors of class indices."""
    vectors = []
    for name, values in (("reference", reference), ("estimated", estimated)):
        vector = np.asarray(values)
        if vector.ndim != 1 or not (np.issubdtype(vector.dtype, np.integer) or not vector.size):
            raise ValueError(
                f"expected {name} as a vector of class indices (num_clips,), got {vector.dtype} of shape "
                f"{vector.shape}; for posteriors take argmax over the classes first"
            )
        if vector.size and vector.min() < 0:
            raise ValueError(f"{name} has the class index {vector.min()}; expected 0 or more")
        vectors.append(vector.astype(np.int64))
    if len(vectors[0]) != len(vectors[1]):
        raise ValueError(f"reference has {len(vectors[0])} clips, estimated {len(vectors[1])}")
    if not len(vectors[0]):
        raise ValueError("there are no clips to score")
    return vectors[0], vectors[1]


def _multi_label(reference: ArrayLike, posteriors: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.floating]]:
    """Check and convert a multi-label reference and its posteriors."""
    truth, scores = np.asarray(reference), np.asarray(posteriors)
    if truth.ndim != 2 or truth.shape != scores.shape:
        raise ValueError(
            "expected reference and posteriors of the same shape (num_clips, num_classes), "
            f"got {truth.shape} and {scores.shape}"
        )
    if not len(truth):
        raise ValueError("there are no clips to score")
    if not np.isin(truth, (0, 1)).all():
        raise ValueError("expected a reference of 0 and 1 only (1 where the clip has the label)")
    if not np.issubdtype(scores.dtype, np.floating):
        scores = scores.astype(np.float64)
    if np.isnan(scores).any():
        raise ValueError("posteriors contain values that are not numbers (NaN)")
    return truth.astype(bool), scores


def accuracy(reference: ArrayLike, estimated: ArrayLike) -> float:
    """Return the part of clips whose class is right.

    Args:
        reference: (num_clips,) true class indices.
        estimated: (num_clips,) chosen class indices.

    Raises:
        ValueError: not two vectors of class indices of the same length, or no clips.
    """
    truth, chosen = _indices(reference, estimated)
    return float(np.mean(truth == chosen))


def confusion_matrix(reference: ArrayLike, estimated: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    """Count clips by true and chosen class.

    Args:
        reference: (num_clips,) true class indices.
        estimated: (num_clips,) chosen class indices.
        num_classes: number of classes.

    Returns:
        (num_classes, num_classes); row: true class, column: chosen class.

    Raises:
        ValueError: not two vectors of class indices below ``num_classes`` of the same length, or no clips.
    """
    truth, chosen = _indices(reference, estimated)
    for name, indices in (("reference", truth), ("estimated", chosen)):
        if indices.max() >= num_classes:
            raise ValueError(f"{name} has the class index {indices.max()}, but there are {num_classes} classes")
    matrix = np.bincount(truth * num_classes + chosen, minlength=num_classes * num_classes)
    return matrix.reshape(num_classes, num_classes).astype(np.int64)


def truth_ranks(reference: ArrayLike, posteriors: ArrayLike) -> NDArray[np.int64]:
    """Return how many classes come before the true one of each clip, (num_clips,): 0 where the clip is right.

    Of equal posteriors the class with the lower index comes first, as argmax has it.

    Args:
        reference: (num_clips,) true class indices.
        posteriors: (num_clips, num_classes).

    Raises:
        ValueError: shapes that do not fit, indices beyond the classes, NaN posteriors, or no clips.
    """
    scores = np.asarray(posteriors)
    if scores.ndim != 2:
        raise ValueError(f"expected posteriors of shape (num_clips, num_classes), got {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError("posteriors contain values that are not numbers (NaN)")
    truth, _ = _indices(reference, np.zeros(len(scores), dtype=np.int64))
    if truth.max() >= scores.shape[1]:
        raise ValueError(f"reference has the class index {truth.max()}, but there are {scores.shape[1]} classes")
    own = np.take_along_axis(scores, truth[:, None], axis=1)
    before = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < truth[:, None]))
    return np.asarray(before.sum(axis=1), dtype=np.int64)


def top_k_accuracy(reference: ArrayLike, posteriors: ArrayLike, k: int) -> float:
    """Return the part of clips whose class is among the ``k`` most probable ones; see ``truth_ranks``.

    Raises:
        ValueError: as ``truth_ranks``, or ``k`` below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return float(np.mean(truth_ranks(reference, posteriors) < k))


def precision_recall_f1(
    reference: ArrayLike, estimated: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return precision, recall and F1 of each class.

    Args:
        reference: (num_clips, num_classes) of 0 and 1.
        estimated: (num_clips, num_classes) of 0 and 1: which labels were given to which clips.

    Returns:
        Three times (num_classes,) in [0, 1]. All are NaN for classes without a positive clip; the precision of a
        class that was never given is 0.

    Raises:
        ValueError: shapes that differ, anything other than 0 and 1, or no clips.
    """
    truth, _ = _multi_label(reference, estimated)
    chosen, _ = _multi_label(estimated, reference)
    hits = (truth & chosen).sum(axis=0).astype(np.float64)
    positives, given = truth.sum(axis=0), chosen.sum(axis=0)
    present = positives > 0
    none = np.where(present, 0.0, np.nan)
    precision = np.divide(hits, given, out=none.copy(), where=present & (given > 0))
    recall = np.divide(hits, positives, out=none.copy(), where=present)
    f1 = np.divide(2 * hits, positives + given, out=none.copy(), where=present)
    return precision, recall, f1


def macro_f1(reference: ArrayLike, estimated: ArrayLike) -> float:
    """Return the mean F1 of the classes with a positive clip; NaN if there is none. See ``precision_recall_f1``."""
    f1 = precision_recall_f1(reference, estimated)[2]
    present = f1[~np.isnan(f1)]
    return float(present.mean()) if len(present) else math.nan


def micro_f1(reference: ArrayLike, estimated: ArrayLike) -> float:
    """Return the F1 of the counts summed over all classes; NaN if there is no label on either side."""
    truth, _ = _multi_label(reference, estimated)
    chosen, _ = _multi_label(estimated, reference)
    total = int(truth.sum() + chosen.sum())
    return 2 * int((truth & chosen).sum()) / total if total else math.nan


def brier_score(reference: ArrayLike, posteriors: ArrayLike) -> NDArray[np.float64]:
    """Return the mean squared distance of the posteriors of each class to the truth (Brier 1950).

    For one label per clip the sum over the classes is Brier's own score, in [0, 2].

    Args:
        reference: (num_clips, num_classes) of 0 and 1.
        posteriors: (num_clips, num_classes).

    Returns:
        (num_classes,); defined also for classes without a positive clip.

    Raises:
        ValueError: shapes that differ, a reference other than 0 and 1, NaN posteriors, or no clips.
    """
    truth, scores = _multi_label(reference, posteriors)
    result: NDArray[np.float64] = np.mean((scores.astype(np.float64) - truth) ** 2, axis=0)
    return result


Binning = Literal["equal_width", "equal_mass"]


@dataclass(frozen=True, eq=False)
class CalibrationCurve:
    """Posteriors against what came true, by bins; empty bins are left out.

    Attributes:
        posterior: (num_bins,) mean posterior of each bin, increasing.
        frequency: (num_bins,) share of each bin that came true.
        count: (num_bins,) how many are in each bin.
    """

    posterior: NDArray[np.float64]
    frequency: NDArray[np.float64]
    count: NDArray[np.int64]

    @property
    def error(self) -> float:
        """The calibration error (ECE), in [0, 1]."""
        return float(np.sum(self.count * np.abs(self.posterior - self.frequency)) / self.count.sum())


def calibration_curve(
    came_true: ArrayLike, posteriors: ArrayLike, *, bins: int = 15, binning: Binning = "equal_width"
) -> CalibrationCurve:
    """Compare posteriors with how often they came true; see the module's conventions.

    Args:
        came_true: (num,) of 0 and 1.
        posteriors: (num,) in [0, 1].
        bins: the number of bins, from 1 on.
        binning: how they are cut.

    Raises:
        ValueError: shapes that differ, posteriors outside [0, 1], no bins, or nothing to put in.
    """
    truth, scores = np.asarray(came_true), np.asarray(posteriors)
    if truth.ndim != 1 or truth.shape != scores.shape:
        raise ValueError(f"expected two vectors of the same length, got shapes {truth.shape} and {scores.shape}")
    truth, scores = _multi_label(truth[:, None], scores[:, None])
    hits, values = truth[:, 0], scores[:, 0].astype(np.float64)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"expected posteriors in [0, 1], got {values.min():g} to {values.max():g}")
    if bins < 1:
        raise ValueError(f"expected at least 1 bin, got {bins}")
    if binning == "equal_width":
        index = np.maximum(np.ceil(values * bins).astype(np.int64) - 1, 0)
    else:
        borders = np.sort(values)[np.arange(1, bins) * len(values) // bins]
        index = np.searchsorted(borders, values, side="right")
    count = np.bincount(index, minlength=bins)
    used = count > 0
    means = [np.bincount(index, weights=v, minlength=bins)[used] / count[used] for v in (values, hits)]
    return CalibrationCurve(means[0], means[1], count[used].astype(np.int64))


def precision_recall_curve(
    reference: ArrayLike, posteriors: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return recall and precision of one class at every operating point, from the highest posterior down.

    Args:
        reference: (num_clips,) of 0 and 1, at least one of them 1.
        posteriors: (num_clips,).

    Raises:
        ValueError: as ``average_precision``, or no positive clip.
    """
    truth, scores = _multi_label(np.asarray(reference)[:, None], np.asarray(posteriors)[:, None])
    if not truth.any():
        raise ValueError("there is no positive clip, so there is no precision-recall curve")
    hits, given = _operating_points(truth[:, 0], scores[:, 0])
    return hits / hits[-1], hits / given


def _operating_points(
    truth: NDArray[np.bool_], scores: NDArray[np.floating]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many positive clips, and how many clips, lie at or above each distinct posterior, highest first."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    # The last clip of each run of equal posteriors. Compared, not subtracted: two infinite scores are equal.
    points = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    return np.cumsum(truth[order], dtype=np.int64)[points], points + 1


def average_precision(reference: ArrayLike, posteriors: ArrayLike) -> NDArray[np.float64]:
    """Return the average precision of each class: the sum of precision times gain in recall.

    Args:
        reference: (num_clips, num_classes) of 0 and 1.
        posteriors: (num_clips, num_classes).

    Returns:
        (num_classes,) in [0, 1]; NaN for classes without a positive clip.

    Raises:
        ValueError: shapes that differ, a reference other than 0 and 1, NaN posteriors, or no clips.
    """
    truth, scores = _multi_label(reference, posteriors)
    result = np.full(truth.shape[1], np.nan)
    for index in np.flatnonzero(truth.any(axis=0)):
        hits, given = _operating_points(truth[:, index], scores[:, index])
        result[index] = np.sum(np.diff(hits, prepend=0) * (hits / given)) / hits[-1]
    return result


def mean_average_precision(reference: ArrayLike, posteriors: ArrayLike) -> float:
    """Return the mean of ``average_precision`` over the classes with a positive clip (mAP).

    Args:
        reference: (num_clips, num_classes) of 0 and 1.
        posteriors: (num_clips, num_classes).

    Raises:
        ValueError: as ``average_precision``, or no class has a positive clip.
    """
    per_class = average_precision(reference, posteriors)
    if np.isnan(per_class).all():
        raise ValueError("no class has a positive clip, so there is no mean average precision")
    return float(np.nanmean(per_class))


def roc_auc(reference: ArrayLike, posteriors: ArrayLike) -> NDArray[np.float64]:
    """Return the area under the ROC curve of each class.

    It is the probability that a positive clip has a larger posterior than a negative one, ties
    counting half (Mann-Whitney U).

    Args:
        reference: (num_clips, num_classes) of 0 and 1.
        posteriors: (num_clips, num_classes).

    Returns:
        (num_classes,) in [0, 1]; NaN for classes whose clips are all positive or all negative.

    Raises:
        ValueError: shapes that differ, a reference other than 0 and 1, NaN posteriors, or no clips.
    """
    truth, scores = _multi_label(reference, posteriors)
    result = np.full(truth.shape[1], np.nan)
    for index in np.flatnonzero(truth.any(axis=0) & ~truth.all(axis=0)):
        _, inverse, counts = np.unique(scores[:, index], return_inverse=True, return_counts=True)
        # Equal posteriors share the mean of their ranks, counted from 1.
        ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
        positives = int(truth[:, index].sum())
        wins = ranks[truth[:, index]].sum() - positives * (positives + 1) / 2
        result[index] = wins / (positives * (len(truth) - positives))
    return result


def d_prime(auc: float) -> float:
    """Return d', the distance of two unit Gaussians whose ROC curve has the area ``auc``.

    AudioSet papers take it of the mean ``roc_auc`` over classes.
    Source: Hershey et al., ICASSP 2017, arXiv 1609.09430, section 3.3.

    Args:
        auc: in [0, 1]; 0 and 1 give minus and plus infinity.

    Raises:
        ValueError: ``auc`` is outside [0, 1].
    """
    if not 0 <= auc <= 1:
        raise ValueError(f"expected an area in [0, 1], got {auc}")
    if auc in (0, 1):
        return math.inf if auc else -math.inf
    return math.sqrt(2) * NormalDist().inv_cdf(auc)
