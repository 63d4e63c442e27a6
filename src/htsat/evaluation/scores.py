"""Scores of a model on labelled clips, with intervals: the numbers that are reported.

Every figure has its name in full; the figures that a class does not allow are NaN, and those classes are named. The
intervals are bootstrap percentiles (2.5 % to 97.5 %) over clips: they tell how much a figure owes to which clips
happened to be in the test, and nothing of the luck of a training. Calibration errors have none: a resampled one is
biased upwards.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from htsat.data.corpora import Clip
from htsat.errors import DataError, UsageError, nearest
from htsat.events import Event
from htsat.metrics import tagging
from htsat.metrics.bootstrap import Interval as Interval
from htsat.metrics.bootstrap import bootstrap_intervals, f1_difference_intervals, f1_intervals, row_means
from htsat.metrics.detection import (
    DetectionScores,
    FileCounts,
    count_event_based,
    count_intersection_based,
    count_segment_based,
    summarise,
)
from htsat.metrics.frames import FrameScores, frame_scores
from htsat.metrics.psds import PSDS1, PSDS2, PSDSResult, PSDSSettings, psds_from_scores

Objective = Literal["single_label", "multi_label"]

#: names of the figures, as people read them, in the order in which they are shown
TITLES = {
    "accuracy": "accuracy",
    "top_5_accuracy": "top-5 accuracy",
    "mean_average_precision": "mean average precision (mAP)",
    "mean_roc_auc": "mean area under the ROC curve (mAUC)",
    "d_prime": "d' of the mean ROC area",
    "macro_f1": "macro F1 (mean over classes)",
    "micro_f1": "micro F1 (all labels together)",
    "brier_score": "Brier score (0 is best)",
    "calibration_error_equal_width": "calibration error, bins of equal width",
    "calibration_error_equal_mass": "calibration error, bins of equal mass",
}
TOP = 5


@dataclass(frozen=True)
class ClassScores:
    """Clip-level scores of one class.

    Attributes:
        positives: clips that have the label.
        average_precision: in [0, 1]; NaN without a positive clip.
        roc_auc: in [0, 1]; NaN without a positive or without a negative clip.
        precision: of the labels given, in [0, 1]; NaN without a positive clip.
        recall: NaN without a positive clip.
        f1: NaN without a positive clip.
        brier_score: mean squared distance of posterior and truth.
        calibration_error: of this class's posteriors, in bins of equal width.
    """

    positives: int
    average_precision: float
    roc_auc: float
    precision: float
    recall: float
    f1: float
    brier_score: float
    calibration_error: float


@dataclass(frozen=True, eq=False)
class TaggingScores:
    """Clip-level scores.

    Attributes:
        objective: ``single_label`` (the label given to a clip is the most probable one) or ``multi_label`` (labels
            at or above ``threshold``).
        num_clips: how many were scored.
        threshold: posterior that gives a label; None for a single label.
        figures: name -> value, names as in ``TITLES``; accuracies for a single label only.
        intervals: name -> (low, high) of 95 %; empty if there was no bootstrap.
        per_class: label -> its scores, in the order of the labels.
        without_positives: labels that no clip has; they are in no mean but those of Brier score and calibration.
        without_negatives: labels that every clip has; they have no ROC curve.
        confusion: (num_classes, num_classes) clips by true (row) and given class; None for several labels.
        calibration: for a single label of the confidence in the given class, else of all posteriors together.
    """

    objective: Objective
    num_clips: int
    threshold: float | None
    figures: Mapping[str, float]
    intervals: Mapping[str, Interval]
    per_class: Mapping[str, ClassScores]
    without_positives: tuple[str, ...]
    without_negatives: tuple[str, ...]
    confusion: NDArray[np.int64] | None
    calibration: tagging.CalibrationCurve

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in the order of the confusion matrix."""
        return tuple(self.per_class)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: None stands for what is not defined and for an infinite d'."""
        return {
            "objective": self.objective,
            "clips": self.num_clips,
            "threshold": self.threshold,
            "figures": {name: finite(value) for name, value in self.figures.items()},
            "intervals": {name: [finite(low), finite(high)] for name, (low, high) in self.intervals.items()},
            "classes_without_positives": list(self.without_positives),
            "classes_without_negatives": list(self.without_negatives),
            "per_class": {
                label: {name: finite(value) for name, value in asdict(scores).items()}
                for label, scores in self.per_class.items()
            },
            "confusion_matrix": None if self.confusion is None else self.confusion.tolist(),
        }


@dataclass(frozen=True)
class DetectionSettings:
    """What the metrics of events demand; see ``htsat.metrics.detection``.

    Attributes:
        dtc: detection tolerance criterion, in (0, 1].
        gtc: ground truth intersection criterion, in (0, 1].
        onset_collar: seconds.
        offset_collar: seconds.
        offset_collar_rate: part of the reference event's length.
        segment_seconds: length of a segment.
    """

    dtc: float = 0.5
    gtc: float = 0.5
    onset_collar: float = 0.2
    offset_collar: float = 0.2
    offset_collar_rate: float = 0.2
    segment_seconds: float = 1.0

    @property
    def titles(self) -> dict[str, str]:
        """Metric -> its name in full, with all that it demands."""
        return self._named("F1")

    @property
    def error_titles(self) -> dict[str, str]:
        """Metric -> the name of its error rate."""
        return self._named("error rate")

    def _named(self, figure: str) -> dict[str, str]:
        criteria = f"DTC = GTC = {self.dtc:g}" if self.dtc == self.gtc else f"DTC {self.dtc:g}, GTC {self.gtc:g}"
        onset, offset = 1000 * self.onset_collar, 1000 * self.offset_collar
        collars = f"{onset:g} ms collars" if onset == offset else f"collars of {onset:g} ms and {offset:g} ms"
        return {
            "intersection": f"intersection-based {figure} ({criteria})",
            "event_based": f"event-based {figure} ({collars}, {100 * self.offset_collar_rate:g} %)",
            "segment_based": f"segment-based {figure} ({self.segment_seconds:g} s)",
        }


#: the figures of strongly labelled data as they are usually taken: metric -> its name in full
DETECTION_TITLES = DetectionSettings().titles

#: polyphonic sound detection scores: name -> settings
PSDS = {"psds1": PSDS1, "psds2": PSDS2}


def psds_demands(settings: PSDSSettings) -> str:
    """Return in words all that a polyphonic sound detection score demands."""
    criteria = f"DTC {settings.dtc:g}, GTC {settings.gtc:g}"
    if settings.dtc == settings.gtc:
        criteria = f"DTC = GTC = {settings.dtc:g}"
    return (
        f"{criteria}, CTTC {settings.cttc:g}, alpha_CT {settings.alpha_ct:g}, alpha_ST {settings.alpha_st:g}, "
        f"{settings.max_efpr:g} false positives an hour"
    )


@dataclass(frozen=True, eq=False)
class DetectionReport:
    """Scores of events by three metrics that answer three questions; never print one without its name.

    Where the framewise posteriors are known, also what they allow at all thresholds: polyphonic sound detection scores
    (exact) and frame-level figures. Both are of the posteriors as they are, before filters and thresholds, so that
    they do not depend on decoding settings.

    Attributes:
        num_clips: how many recordings were scored.
        intersection: intersection-based, by default DTC = GTC = 0.5, the metric of the paper's DESED table.
        event_based: onset and offset within collars, by default of 0.2 s (offset: or 20 % of the event's length).
        segment_based: activity in segments, by default of 1 s.
        intervals: metric -> (low, high) of 95 % of its macro F1; empty if there was no bootstrap.
        without_reference: classes without a reference event; no macro F1 counts them.
        micro_intervals: the same of its micro F1.
        settings: what the metrics demanded.
        labels: the classes that were scored.
        psds1: PSDS with ``PSDS1``, scenario 1 of DCASE; None without framewise posteriors.
        psds2: with ``PSDS2``, scenario 2.
        frames: frame-level mAP and ROC area, on the frames of the posteriors, classes as ``labels``.
        frame_seconds: length of a frame (the median; the last one of a recording may be shorter).
    """

    num_clips: int
    intersection: DetectionScores
    event_based: DetectionScores
    segment_based: DetectionScores
    intervals: Mapping[str, Interval]
    without_reference: tuple[str, ...]
    micro_intervals: Mapping[str, Interval]
    settings: DetectionSettings
    labels: tuple[str, ...]
    psds1: PSDSResult | None = None
    psds2: PSDSResult | None = None
    frames: FrameScores | None = None
    frame_seconds: float | None = None

    @property
    def by_metric(self) -> dict[str, DetectionScores]:
        """The three metrics by name."""
        return {name: getattr(self, name) for name in self.settings.titles}

    @property
    def psds(self) -> dict[str, PSDSResult]:
        """The polyphonic sound detection scores by name; empty without framewise posteriors."""
        return {name: found for name in PSDS if (found := getattr(self, name)) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, the metrics as ``htsat score --json`` names them."""
        metrics: dict[str, Any] = {name: asdict(scores) for name, scores in self.by_metric.items()}
        for kind, intervals in (("macro", self.intervals), ("micro", self.micro_intervals)):
            for name, (low, high) in intervals.items():
                metrics[name][f"{kind}_f1_interval"] = [finite(low), finite(high)]
        for name, one in self.psds.items():
            metrics[name] = {"value": one.value, "per_class": one.per_class, "settings": asdict(PSDS[name])}
        if self.frames is not None:
            both = zip(self.frames.average_precision.tolist(), self.frames.roc_auc.tolist(), strict=True)
            metrics["frame_level"] = {
                "mean_average_precision": finite(self.frames.mean_average_precision),
                "mean_roc_auc": finite(self.frames.mean_roc_auc),
                "per_class": {
                    label: {"average_precision": finite(precision), "roc_auc": finite(area)}
                    for label, (precision, area) in zip(self.labels, both, strict=True)
                },
                "frame_seconds": self.frame_seconds,
            }
        return {
            "clips": self.num_clips,
            "classes_without_reference": list(self.without_reference),
            "settings": asdict(self.settings),
            **metrics,
        }


def finite(value: float) -> float | None:
    """Return a number as JSON can hold it: None for NaN and infinity."""
    return value if math.isfinite(value) else None


def match_labels(model_labels: Sequence[str], data_labels: Sequence[str], what: str = "the data") -> list[int]:
    """Return which class of the model is each label of the data; the model may have more classes.

    Raises:
        DataError: the model lacks labels of the data; all are named, each with the nearest that there is.
    """
    place = {label: index for index, label in enumerate(model_labels)}
    if lacking := [label for label in data_labels if label not in place]:
        named = "; ".join(f"{label!r}{nearest(label, model_labels)}" for label in lacking[:20])
        more = f"; and {len(lacking) - 20} more" if len(lacking) > 20 else ""
        raise DataError(
            f"{what}: the model has {len(model_labels)} classes and lacks {len(lacking)} of the {len(data_labels)} "
            f"labels: {named}{more}; rename the labels or evaluate a model that was trained on them"
        )
    return [place[label] for label in data_labels]


def reference_matrix(clips: Sequence[Clip], labels: Sequence[str]) -> NDArray[np.bool_]:
    """Return which clip has which label, (num_clips, num_classes).

    Raises:
        DataError: a clip has a label that is not among ``labels``.
    """
    place = {label: index for index, label in enumerate(labels)}
    matrix = np.zeros((len(clips), len(labels)), dtype=np.bool_)
    for row, clip in enumerate(clips):
        for label in clip.labels:
            if label not in place:
                raise DataError(
                    f"{clip.path}: its label {label!r} is not a class of the data{nearest(label, labels)}; "
                    "mend the label"
                )
            matrix[row, place[label]] = True
    return matrix


def score_tagging(
    labels: Sequence[str],
    objective: Objective,
    reference: ArrayLike,
    posteriors: ArrayLike,
    *,
    threshold: float = 0.5,
    bins: int = 15,
    bootstrap: int = 0,
    seed: int = 0,
) -> TaggingScores:
    """Score clip posteriors.

    Args:
        labels: of the classes.
        objective: whether each clip has exactly one label; the most probable one is then given to it.
        reference: (num_clips, num_classes) of 0 and 1.
        posteriors: (num_clips, num_classes) in [0, 1], as the model emits them: of a model with more classes than
            the data they are not made to add up to 1 again.
        threshold: posterior from which a label is given, for several labels per clip.
        bins: of the calibration errors.
        bootstrap: how many resamples the intervals are made of; 0: no intervals.
        seed: of the resamples.

    Raises:
        ValueError: shapes that do not fit, posteriors that are not numbers in [0, 1], or no clips.
        DataError: a clip without exactly one label although ``objective`` says so.
        UsageError: a negative number of resamples.
    """
    truth, scores = np.asarray(reference).astype(np.bool_), np.asarray(posteriors)
    if truth.shape != scores.shape or truth.ndim != 2 or truth.shape[1] != len(labels) or not len(truth):
        raise ValueError(
            f"expected reference and posteriors of (num_clips, {len(labels)}), got {truth.shape} and {scores.shape}"
        )
    if bootstrap < 0:
        raise UsageError(f"bootstrap must be 0 or more resamples, got {bootstrap}")
    single = objective == "single_label"
    if single and (wrong := np.flatnonzero(truth.sum(axis=1) != 1)).size:
        raise DataError(
            f"clip {wrong[0]} has {truth[wrong[0]].sum()} labels where each must have one; score it as multi_label"
        )
    chosen = np.argmax(scores, axis=1)
    own = np.argmax(truth, axis=1)
    given = chosen[:, None] == np.arange(len(labels)) if single else scores >= threshold

    precision, recall, f1 = tagging.precision_recall_f1(truth, given)
    average_precision, roc_auc = tagging.average_precision(truth, scores), tagging.roc_auc(truth, scores)
    brier = tagging.brier_score(truth, scores)
    errors = {
        binning: [
            tagging.calibration_curve(t, s, bins=bins, binning=binning).error
            for t, s in zip(truth.T, scores.T, strict=True)
        ]
        for binning in ("equal_width", "equal_mass")
    }
    figures: dict[str, float] = {}
    if single:
        confidence = scores[np.arange(len(scores)), chosen]
        figures["accuracy"] = tagging.accuracy(own, chosen)
        if len(labels) > TOP:
            figures[f"top_{TOP}_accuracy"] = tagging.top_k_accuracy(own, scores, TOP)
        calibration = tagging.calibration_curve(own == chosen, confidence, bins=bins)
        overall = {"equal_width": calibration.error}
        overall["equal_mass"] = tagging.calibration_curve(
            own == chosen, confidence, bins=bins, binning="equal_mass"
        ).error
    else:
        calibration = tagging.calibration_curve(truth.ravel(), scores.ravel(), bins=bins)
        overall = {binning: float(np.mean(values)) for binning, values in errors.items()}
    figures["mean_average_precision"] = _mean(average_precision)
    figures["mean_roc_auc"] = _mean(roc_auc)
    figures["d_prime"] = _d_prime(figures["mean_roc_auc"])
    figures["macro_f1"] = tagging.macro_f1(truth, given)
    if not single:
        figures["micro_f1"] = tagging.micro_f1(truth, given)
    # Brier's own score adds up over the classes; with several labels their number would decide, so it is a mean there.
    figures["brier_score"] = float(brier.sum() if single else brier.mean())
    figures["calibration_error_equal_width"] = overall["equal_width"]
    figures["calibration_error_equal_mass"] = overall["equal_mass"]

    positives = truth.sum(axis=0)
    columns = (positives, average_precision, roc_auc, precision, recall, f1, brier, errors["equal_width"])
    per_class = {
        label: ClassScores(int(values[0]), *map(float, values[1:]))
        for label, *values in zip(labels, *columns, strict=True)
    }
    intervals: dict[str, Interval] = {}
    if bootstrap:
        resample = _Resampled(truth, scores, given, single)
        intervals = bootstrap_intervals(len(truth), bootstrap, seed, resample)
    return TaggingScores(
        objective=objective,
        num_clips=len(truth),
        threshold=None if single else threshold,
        figures=figures,
        intervals=intervals,
        per_class=per_class,
        without_positives=tuple(label for label, count in zip(labels, positives, strict=True) if not count),
        without_negatives=tuple(label for label, count in zip(labels, positives, strict=True) if count == len(truth)),
        confusion=tagging.confusion_matrix(own, chosen, len(labels)) if single else None,
        calibration=calibration,
    )


def _counts(
    reference: Mapping[str, Sequence[Event]],
    estimated: Mapping[str, Sequence[Event]],
    labels: Sequence[str],
    settings: DetectionSettings,
    durations: Mapping[str, float] | None,
) -> dict[str, FileCounts]:
    """Return what each metric counts in each file."""
    return {
        "intersection": count_intersection_based(
            reference, estimated, labels=labels, dtc=settings.dtc, gtc=settings.gtc
        ),
        "event_based": count_event_based(
            reference,
            estimated,
            labels=labels,
            onset_collar=settings.onset_collar,
            offset_collar=settings.offset_collar,
            offset_collar_rate=settings.offset_collar_rate,
        ),
        "segment_based": count_segment_based(
            reference, estimated, labels=labels, segment_seconds=settings.segment_seconds, durations=durations
        ),
    }


@dataclass(frozen=True)
class Difference:
    """How much higher an F1 is than another system's on the same files.

    Attributes:
        value: on all files; None if one of the two is not defined.
        interval: 95 % of the resamples.
    """

    value: float | None
    interval: Interval


def compare_detection(
    reference: Mapping[str, Sequence[Event]],
    estimated: Mapping[str, Sequence[Event]],
    other: Mapping[str, Sequence[Event]],
    labels: Sequence[str],
    *,
    durations: Mapping[str, float] | None = None,
    settings: DetectionSettings = DetectionSettings(),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Difference]]:
    """Compare two systems on the same files by all three metrics.

    Args:
        reference: file name -> true events.
        estimated: of the system.
        other: of the one that it is compared with.
        labels: the classes to score.
        durations: see ``score_detection``.
        settings: what the metrics demand.
        resamples: of the files, at least 1.
        seed: of the resamples.

    Returns:
        Metric -> ``macro_f1`` and ``micro_f1`` -> how much higher that of ``estimated`` is.

    Raises:
        UsageError: settings out of range, or no resamples.
    """
    # Both over the same files: one that a system has nothing to say of counts for both.
    files = {file: list(events) for file, events in reference.items()}
    files |= {file: [] for file in (*estimated, *other) if file not in files}
    try:
        mine, theirs = (
            _counts(files, {file: said.get(file, []) for file in files}, labels, settings, durations)
            for said in (estimated, other)
        )
        result = {}
        for name in mine:
            intervals = f1_difference_intervals(mine[name], theirs[name], resamples, seed)
            scores = summarise(mine[name]), summarise(theirs[name])
            result[name] = {
                kind: Difference(
                    None
                    if any(getattr(one, kind) is None for one in scores)
                    else getattr(scores[0], kind) - getattr(scores[1], kind),
                    interval,
                )
                for kind, interval in intervals.items()
            }
    except ValueError as error:
        raise UsageError(str(error)) from None
    return result


def score_detection(
    reference: Mapping[str, Sequence[Event]],
    estimated: Mapping[str, Sequence[Event]],
    labels: Sequence[str],
    *,
    durations: Mapping[str, float] | None = None,
    scores: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    settings: DetectionSettings = DetectionSettings(),
    bootstrap: int = 0,
    seed: int = 0,
) -> DetectionReport:
    """Score events by all three metrics, and framewise posteriors at all thresholds; see ``htsat.metrics``.

    Args:
        reference: file name -> true events.
        estimated: file name -> detected events.
        labels: the classes to score.
        durations: file name -> seconds; see ``segment_based``. With ``scores`` of every file.
        scores: file name -> framewise posteriors, classes as in ``labels``, and boundaries of the frames, of every
            file; see ``psds_from_scores``. None: there are no figures of all thresholds.
        settings: what the metrics demand.
        bootstrap: how many resamples of the files the intervals are made of; 0: no intervals.
        seed: of the resamples.

    Raises:
        UsageError: a negative number of resamples, settings out of range, or posteriors without durations or that do
            not fit the labels.
    """
    if bootstrap < 0:
        raise UsageError(f"bootstrap must be 0 or more resamples, got {bootstrap}")
    try:
        counts = _counts(reference, estimated, labels, settings, durations)
        psds: dict[str, PSDSResult] = {}
        frames, frame_seconds = None, None
        if scores is not None:
            psds = {
                name: psds_from_scores(reference, scores, labels, durations or {}, demands)
                for name, demands in PSDS.items()
            }
            lengths = np.concatenate([np.diff(np.asarray(bounds)) for _, bounds in scores.values()] or [np.zeros(0)])
            if len(lengths):
                frames, frame_seconds = frame_scores(reference, scores, labels), float(np.median(lengths))
    except ValueError as error:
        raise UsageError(str(error)) from None
    intervals = {name: f1_intervals(count, bootstrap, seed) for name, count in counts.items()} if bootstrap else {}
    present = {event.event_label for events in reference.values() for event in events}
    return DetectionReport(
        num_clips=len({*reference, *estimated}),
        intersection=summarise(counts["intersection"]),
        event_based=summarise(counts["event_based"]),
        segment_based=summarise(counts["segment_based"]),
        intervals={name: both["macro_f1"] for name, both in intervals.items() if both},
        without_reference=tuple(label for label in labels if label not in present),
        micro_intervals={name: both["micro_f1"] for name, both in intervals.items() if both},
        settings=settings,
        labels=tuple(labels),
        psds1=psds.get("psds1"),
        psds2=psds.get("psds2"),
        frames=frames,
        frame_seconds=frame_seconds,
    )


def _mean(values: NDArray[np.float64]) -> float:
    """Return the mean of the numbers among the values, NaN if there is none."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else math.nan


def _d_prime(area: float) -> float:
    return math.nan if math.isnan(area) else tagging.d_prime(min(1.0, max(0.0, area)))


class _Resampled:
    """The figures of resamples: each clip counts as often as its weight says.

    Sorting is done once per class; a resample then costs cumulative sums.
    """

    def __init__(
        self, truth: NDArray[np.bool_], scores: NDArray[np.floating], given: NDArray[np.bool_], single: bool
    ) -> None:
        self._truth, self._given, self._single = truth.astype(np.float64), given.astype(np.float64), single
        self._scores = scores
        distance = (scores.astype(np.float64) - truth) ** 2
        self._by_clip = {"brier_score": distance.sum(axis=1) if single else distance.mean(axis=1)}
        if single:
            self._by_clip["accuracy"] = (truth & given).any(axis=1).astype(np.float64)
            if truth.shape[1] > TOP:
                within = tagging.truth_ranks(truth.argmax(axis=1), scores) < TOP
                self._by_clip[f"top_{TOP}_accuracy"] = within.astype(np.float64)

    def __call__(self, weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        """Return name -> (num_resamples,) of weights (num_resamples, num_clips)."""
        count = weights.shape[1]
        result = {name: weights @ values / count for name, values in self._by_clip.items()}
        hits = weights @ (self._truth * self._given)
        positives, given = weights @ self._truth, weights @ self._given
        f1 = 2 * hits / np.maximum(positives + given, 1)
        result["macro_f1"] = row_means(np.where(positives > 0, f1, np.nan))
        if not self._single:
            total = (positives + given).sum(axis=1)
            result["micro_f1"] = np.where(total > 0, 2 * hits.sum(axis=1) / np.maximum(total, 1), np.nan)
        precision = np.full(positives.shape, np.nan)
        area = np.full(positives.shape, np.nan)
        for index in np.flatnonzero(self._truth.any(axis=0)):
            order = np.argsort(-self._scores[:, index], kind="stable")
            ranked = self._scores[order, index]
            points = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), count - 1)
            sorted_weights = weights[:, order]
            above = np.cumsum(sorted_weights, axis=1)[:, points]
            true = np.cumsum(sorted_weights * self._truth[order, index], axis=1)[:, points]
            gain = np.diff(true, axis=1, prepend=0)
            all_true, all_false = true[:, -1], count - true[:, -1]
            with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of a class that a resample lacks
                precision[:, index] = (gain * true / np.maximum(above, 1)).sum(axis=1) / all_true
                false = above - true
                below = all_false[:, None] - false + np.diff(false, axis=1, prepend=0) / 2
                area[:, index] = (gain * below).sum(axis=1) / (all_true * all_false)
        result["mean_average_precision"] = row_means(precision)
        result["mean_roc_auc"] = row_means(area)
        result["d_prime"] = np.asarray([_d_prime(value) for value in result["mean_roc_auc"]])
        return result
