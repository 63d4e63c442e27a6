"""Scores of clip-level tags.

Conventions: ``reference`` first, ``posteriors`` or ``estimated`` second. Multi-label references are
(num_clips, num_classes) of 0 and 1 (or bool); any monotonic score may stand in for a posterior.
Scores are fractions in [0, 1] and per class they are NaN where the class allows none: average
precision needs a positive clip, ROC AUC a positive and a negative one. Means are taken over the
other classes, and equal posteriors are one operating point, as in scikit-learn
(``average_precision_score``, ``roc_auc_score``).
"""

import math
from statistics import NormalDist

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
        order = np.argsort(-scores[:, index], kind="stable")
        ranked = scores[order, index]
        # One operating point per distinct posterior: the last clip of each run of equal ones.
        points = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
        hits = np.cumsum(truth[order, index], dtype=np.int64)[points]
        result[index] = np.sum(np.diff(hits, prepend=0) * (hits / (points + 1))) / hits[-1]
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
