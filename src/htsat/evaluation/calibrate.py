"""Choosing how posteriors become events: thresholds and filters of each class, tuned on labelled recordings.

The F1 of a class does not depend on the settings of the others, so each class is searched by itself, on a grid:
median filter, threshold (a fixed grid and the quantiles of the class's own posteriors) and hysteresis together, then
gaps and durations around the best of those. What a small development set would only pretend to know is held back:

* a threshold is as good as it and its neighbours are together, so that it lies on a plateau, not on a peak;
* of settings that are as good within one standard error of the difference (jackknife over groups of recordings, and
  never more than 0.01 of F1) the plainest is taken;
* a class gets settings of its own only if they beat those shared by all classes on recordings that they were not
  chosen on (cross-validation), by more than a standard error; perhaps its own threshold alone does. Classes with few
  events keep the shared ones.

F1 on scenes full of events says little of hours without any. Where quiet recordings are given, in which whatever is
detected is a false alarm, thresholds are then raised until few enough remain, in the classes where that costs least.

The figures are given twice: on the recordings that the settings were chosen on, and cross-validated. Neither is a test.
The search counts what ``htsat.metrics.detection`` counts, for all recordings at once.
"""

import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from htsat.config import ClassDecoding, DecodingConfig
from htsat.detection.decoder import decode_events, joined, median_at_least, median_frames, runs, triggered
from htsat.errors import DataError, UsageError, nearest
from htsat.events import Event
from htsat.metrics.detection import ClassScores, DetectionScores, event_based, intersection_based, segment_based

Metric = Literal["event_based", "intersection", "segment_based"]
METRICS: tuple[Metric, ...] = get_args(Metric)
Level = Literal["own settings", "own threshold", "shared settings", "as before"]
#: names of the operating points that are found
POINTS = ("high_precision", "balanced", "high_recall")

Array = NDArray[np.float32]
Floats = NDArray[np.float64]
Counts = NDArray[np.float64]
"""(..., num_folds, 2): true positives and false positives in each group of recordings."""
Regions = tuple[NDArray[np.intp], NDArray[np.intp]]
Rule = tuple[float, float, float, float, float]
"""threshold, threshold_off, median_seconds, min_gap, min_duration."""

_THRESHOLDS = (0.02, *(round(0.05 * i, 2) for i in range(1, 20)), 0.98)
_QUANTILES = 16
#: threshold_off as a part of threshold
_RATIOS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.1)
_MEDIANS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.2)
_GAPS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
_DURATIONS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.8)
#: how many settings of thresholds and median are tried with every gap and duration
_ANCHORS = 6
#: F1 that may be given up for plainer settings, at most
_SLACK = 0.01
#: detections that it takes to speak of their precision
_FEW = 5
#: thresholds above those of the search, for classes that must hardly ever raise a false alarm
_STRICT = (0.99, 0.995, 0.999)


@dataclass(frozen=True)
class ClassCalibration:
    """What was found for one class.

    Attributes:
        events: how many reference events there are.
        level: whose settings it has.
        cross_validated_f1: of settings chosen without the recordings that they are scored on; None if it was not tuned.
        points: operating point -> its scores on the recordings that it was chosen on.
        unreachable: operating points that do not reach the precision or recall asked for.
    """

    events: int
    level: Level
    cross_validated_f1: float | None
    points: Mapping[str, ClassScores]
    unreachable: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class QuietRecordings:
    """What a model says of recordings in which none of its classes sounds.

    Attributes:
        posteriors: file -> (num_frames, num_classes), calibrated if the model's are.
        boundaries: file -> (num_frames + 1,) seconds.
        groups: file -> what must not be on both sides of a cross-validation; None: each file is a group of its own.
    """

    posteriors: Mapping[str, Array]
    boundaries: Mapping[str, Floats]
    groups: Mapping[str, str] | None = None


@dataclass(frozen=True)
class ClassFalseAlarms:
    """The false alarms of one class on quiet recordings, and what was done about them.

    Attributes:
        tuned: its threshold may be raised; one that is not kept its settings, since what that costs is not known.
        threshold_before, threshold: of the balanced point.
        before, after: how many false alarms there are.
        f1_before, f1: on the recordings that the settings were chosen on; None if it was not tuned.
    """

    tuned: bool
    threshold_before: float
    threshold: float
    before: int
    after: int
    f1_before: float | None
    f1: float | None


@dataclass(frozen=True)
class FalseAlarms:
    """Thresholds raised for the sake of quiet recordings, and what that cost.

    Attributes:
        limit: false alarms per hour asked for.
        hours, recordings: how much there was to be quiet in.
        before, after: false alarms of all classes at the balanced point.
        cross_validated: those of thresholds raised without the quiet recordings that they are counted on; None if
            there is but one group of them.
        macro_f1_before, cross_validated_macro_f1_before: of the balanced point, had nothing been raised.
        points: operating point -> false alarms.
        per_class: label -> its part.
    """

    limit: float
    hours: float
    recordings: int
    before: int
    after: int
    cross_validated: int | None
    macro_f1_before: float
    cross_validated_macro_f1_before: float
    points: Mapping[str, int]
    per_class: Mapping[str, ClassFalseAlarms]

    @property
    def reached(self) -> bool:
        """Whether no more false alarms are left than were asked for."""
        return self.after <= self.limit * self.hours

    def per_hour(self, count: int) -> float:
        """Return a number of false alarms as a rate."""
        return count / self.hours

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values, rates among them."""
        held_out = self.cross_validated
        return {
            **asdict(self),
            "reached": self.reached,
            "per_hour_before": self.per_hour(self.before),
            "per_hour": self.per_hour(self.after),
            "cross_validated_per_hour": None if held_out is None else self.per_hour(held_out),
        }


@dataclass(frozen=True)
class DecodingCalibration:
    """Settings found, and how good they are.

    Attributes:
        metric: what was made best.
        operating_points: name -> settings, of ``POINTS``.
        macro_f1: of ``balanced`` on the recordings that it was chosen on.
        cross_validated_macro_f1: mean over the classes that were tuned.
        macro_f1_before: of the settings before, on the same posteriors.
        per_class: label -> what was found, for every class of the model.
        false_alarms: what raising thresholds brought and cost; None without quiet recordings.
    """

    metric: Metric
    operating_points: Mapping[str, DecodingConfig]
    macro_f1: float
    cross_validated_macro_f1: float
    macro_f1_before: float
    per_class: Mapping[str, ClassCalibration]
    false_alarms: FalseAlarms | None = None

    @property
    def decoding(self) -> DecodingConfig:
        """The settings that make the metric best."""
        return self.operating_points["balanced"]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values; the settings are in the checkpoint."""
        return {
            "metric": self.metric,
            "macro_f1_before": self.macro_f1_before,
            "macro_f1": self.macro_f1,
            "cross_validated_macro_f1": self.cross_validated_macro_f1,
            "per_class": {label: asdict(found) for label, found in self.per_class.items()},
            "false_alarms": None if self.false_alarms is None else self.false_alarms.to_dict(),
        }


def score(
    metric: Metric,
    reference: Mapping[str, Sequence[Event]],
    estimated: Mapping[str, Sequence[Event]],
    durations: Mapping[str, float],
) -> DetectionScores:
    """Score events by the named metric with its usual tolerances; see ``htsat.metrics.detection``."""
    if metric == "event_based":
        return event_based(reference, estimated)
    if metric == "intersection":
        return intersection_based(reference, estimated)
    return segment_based(reference, estimated, durations=durations)


def calibrate_decoding(
    posteriors: Mapping[str, Array],
    boundaries: Mapping[str, Floats],
    reference: Mapping[str, Sequence[Event]],
    labels: Sequence[str],
    metric: Metric = "event_based",
    *,
    before: DecodingConfig | None = None,
    groups: Mapping[str, str] | None = None,
    folds: int = 5,
    min_events: int = 5,
    min_precision: float = 0.9,
    min_recall: float = 0.9,
    quiet: QuietRecordings | None = None,
    max_false_alarms: float = 10.0,
    max_delay: float = math.inf,
    on_progress: Callable[[int, int], None] | None = None,
) -> DecodingCalibration:
    """Choose thresholds, hysteresis, median filter, gaps and durations for each class; always the same ones.

    Args:
        posteriors: file -> (num_frames, num_classes), calibrated if the model's are.
        boundaries: file -> (num_frames + 1,) seconds.
        reference: file -> true events.
        labels: one per class of the posteriors; classes without any event keep the settings that they have.
        metric: what is made best: ``event_based``, ``intersection`` or ``segment_based``.
        before: the settings so far.
        groups: file -> what must not be on both sides of a cross-validation (the recording that clips were cut
            from); None: each file is a group of its own.
        folds: of the cross-validation.
        min_events: classes with fewer keep the shared settings.
        min_precision: of ``high_precision``, which has the best recall that goes with it.
        min_recall: of ``high_recall``, which has the best precision that goes with it.
        quiet: recordings without any of the classes. Thresholds of ``balanced`` are raised, hysteresis staying the same
            part of them, until all classes together raise at most ``max_false_alarms`` per hour there:
            every step is the one that costs the least F1 per false alarm that it removes. Classes that were not tuned
            keep theirs. ``high_precision`` starts from these thresholds; ``high_recall`` is left as it is.
        max_false_alarms: per hour of the quiet recordings.
        max_delay: seconds that half of the median filter and the gap may take together, since live detection knows the
            end of an event so much later; classes without any event keep their filters.
        on_progress: told how many classes are done, and of how many.

    Raises:
        UsageError: unknown metric, a precision or recall outside (0, 1], or a negative rate or delay.
        DataError: fewer than two groups of recordings, no class with enough events, or quiet recordings without any
            length.
    """
    if metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r}{nearest(metric, METRICS)}; known: {', '.join(METRICS)}")
    for name, least in (("min_precision", min_precision), ("min_recall", min_recall)):
        if not 0 < least <= 1:
            raise UsageError(f"{name} must be above 0 and at most 1, got {least:g}")
    for name, most in (("max_false_alarms", max_false_alarms), ("max_delay", max_delay)):
        if not most >= 0:
            raise UsageError(f"{name} must be 0 or more, got {most:g}")
    before = before or DecodingConfig()
    recordings = _Recordings(posteriors, boundaries, reference, groups, folds)
    events = dict.fromkeys(labels, 0)
    for event in itertools.chain.from_iterable(reference.values()):
        if event.event_label in events:
            events[event.event_label] += 1
    tuned = [label for label in labels if events[label] >= min_events]
    if not tuned:
        raise DataError(
            f"no class has the {min_events} events that choosing settings takes (the most: "
            f"{max(events.values(), default=0)}); label more recordings"
        )
    searches = {}
    for done, label in enumerate(tuned):
        if on_progress is not None:
            on_progress(done, len(tuned))
        searches[label] = _Search(recordings, metric, label, list(labels).index(label), max_delay)
    everything = np.arange(recordings.num_folds)
    left_out = [np.delete(everything, k) for k in everything]
    shared = _shared(searches, everything)
    shared_without = [_shared(searches, part) for part in left_out]

    rules: dict[str, Rule] = {}
    levels: dict[str, Level] = {}
    # The same choice without each group of recordings: what it is scored on was not known to it.
    held_out: dict[str, list[Rule]] = {}
    for label, search in searches.items():
        # From plain to own: the next one must be better, clearly, on recordings that it was not chosen on.
        threshold = [search.own_threshold(p, s) for p, s in zip(left_out, shared_without, strict=True)]
        settings = [search.own_settings(part) for part in left_out]
        choices: dict[Level, tuple[Rule, list[Rule]]] = {
            "shared settings": (shared, shared_without),
            "own threshold": (search.own_threshold(everything, shared), threshold),
            "own settings": (search.own_settings(everything), settings),
        }
        level: Level = "shared settings"
        for name, (_, chosen) in choices.items():
            gain, error = search.gain(search.unseen(chosen), search.unseen(choices[level][1]), everything)
            if gain > error:
                level = name
        levels[label] = level
        rules[label], held_out[label] = choices[level]

    kept = {label: before.for_label(label) for label in labels if not events[label]}
    as_found, as_found_without, unraised = rules, held_out, _config(shared, rules, kept)
    alarms = None
    if quiet is not None:
        alarms = _Alarms(quiet, labels, recordings.num_folds, max_false_alarms)
        untuned = sum(alarms.count(label, _rule(unraised, label)) for label in labels if label not in searches)
        rules = alarms.raised(searches, as_found, untuned, everything)
        without = [
            alarms.raised(searches, {label: own[k] for label, own in as_found_without.items()}, untuned, part)
            for k, part in enumerate(left_out)
        ]
        held_out = {label: [own[label] for own in without] for label in searches}
    validated = {label: search.unseen_f1(held_out[label]) for label, search in searches.items()}

    found = {"balanced": (shared, rules)}
    unreachable: dict[str, list[str]] = {label: [] for label in labels}
    for name, least in (("high_precision", min_precision), ("high_recall", min_recall)):
        precise = name == "high_precision"
        common, _ = _operating_point(list(searches.values()), shared, least, precise, own=False)
        moved = {}
        for label, rule in (rules if precise else as_found).items():
            moved[label], reached = _operating_point([searches[label]], rule, least, precise, own=True)
            if not reached:
                unreachable[label].append(name)
        found[name] = (common, moved)
    points = {name: _config(*found[name], kept) for name in POINTS}
    scores = {name: recordings.scores(metric, labels, config) for name, config in points.items()}
    return DecodingCalibration(
        metric=metric,
        operating_points=points,
        macro_f1=scores["balanced"].macro_f1,
        cross_validated_macro_f1=math.fsum(validated.values()) / len(validated),
        macro_f1_before=recordings.scores(metric, labels, before).macro_f1,
        per_class={
            label: ClassCalibration(
                events=events[label],
                level=levels.get(label, "shared settings" if events[label] else "as before"),
                cross_validated_f1=validated.get(label),
                points={name: s.per_class[label] for name, s in scores.items() if label in s.per_class},
                unreachable=tuple(unreachable[label]),
            )
            for label in labels
        },
        false_alarms=None
        if alarms is None
        else alarms.report(
            unraised,
            points,
            recordings.scores(metric, labels, unraised),
            scores["balanced"],
            math.fsum(search.unseen_f1(as_found_without[label]) for label, search in searches.items()) / len(searches),
            held_out,
        ),
    )


def _rule(config: DecodingConfig, label: str) -> Rule:
    """Return what holds for a class."""
    own = config.for_label(label)
    off = own.threshold if own.threshold_off is None else own.threshold_off
    return own.threshold, off, own.median_seconds, own.min_gap, own.min_duration


def _config(shared: Rule, rules: Mapping[str, Rule], kept: Mapping[str, ClassDecoding]) -> DecodingConfig:
    """Return the settings shared by all classes with the exceptions from them."""
    names = ("threshold", "threshold_off", "median_seconds", "min_gap", "min_duration")
    exceptions = {label: dict(zip(names, rule, strict=True)) for label, rule in rules.items() if rule != shared}
    for label, settings in kept.items():
        off = settings.threshold if settings.threshold_off is None else settings.threshold_off
        exceptions[label] = {**asdict(settings), "threshold_off": off}
    return DecodingConfig(**dict(zip(names, shared, strict=True)), per_class=exceptions)


def fold_numbers(groups: Sequence[str], folds: int) -> NDArray[np.intp]:
    """Return in which part of a cross-validation, from 0 on, each recording is; those of a group are in one.

    Neither the order of the groups nor a number in their names decides.
    """
    order = sorted(set(groups), key=lambda group: (zlib.crc32(group.encode("utf-8", "surrogateescape")), group))
    place = {group: i % folds for i, group in enumerate(order)}
    return np.array([place[group] for group in groups], dtype=np.intp)


class _Recordings:
    """All recordings, in an order of their own, and the groups of the cross-validation."""

    def __init__(
        self,
        posteriors: Mapping[str, Array],
        boundaries: Mapping[str, Floats],
        reference: Mapping[str, Sequence[Event]],
        groups: Mapping[str, str] | None,
        folds: int,
    ) -> None:
        self.names = sorted(posteriors)
        self.posteriors, self.boundaries, self.reference = posteriors, boundaries, reference
        keys = [name if groups is None else groups.get(name, name) for name in self.names]
        if len(set(keys)) < 2:
            raise DataError("cross-validation takes two recordings at least; label more of them")
        self.folds = fold_numbers(keys, folds)
        self.num_folds = int(self.folds.max()) + 1
        self.durations = {name: float(boundaries[name][-1]) for name in self.names}
        self.frame_seconds = max((float(np.diff(boundaries[name]).max(initial=0)) for name in self.names), default=0)

    def scores(self, metric: Metric, labels: Sequence[str], config: DecodingConfig) -> DetectionScores:
        """Decode and score as everywhere else."""
        estimated = {
            name: decode_events(self.posteriors[name], self.boundaries[name], labels, config) for name in self.names
        }
        return score(metric, {name: self.reference.get(name, ()) for name in self.names}, estimated, self.durations)


# ------------------------------------------------------------------ what the metrics count, for all recordings at once


class _Truth:
    """The reference events of one class in all recordings, and how detections are counted against them.

    Attributes:
        file: (num_events,) index of the recording, increasing.
        onset, offset: (num_events,) seconds, by onset within a recording.
        wanted: (num_folds,) how many hits there can be.
    """

    def __init__(self, recordings: _Recordings, metric: Metric, label: str) -> None:
        self._folds, self._num_folds, self.metric = recordings.folds, recordings.num_folds, metric
        spans = sorted(
            (i, event.onset, event.offset)
            for i, name in enumerate(recordings.names)
            for event in recordings.reference.get(name, ())
            if event.event_label == label
        )
        self.file = np.array([i for i, _, _ in spans], dtype=np.intp)
        self.onset, self.offset = (np.array([span[c] for span in spans], dtype=np.float64) for c in (1, 2))
        # Seconds from one recording to the next on the axis on which events are looked up.
        longest = max(max(recordings.durations.values()), self.offset.max(initial=0))
        self.stride = 2.0 ** math.ceil(math.log2(longest + 10))
        if metric == "segment_based":
            lengths = np.array([math.ceil(recordings.durations[name] - 1e-9) for name in recordings.names])
            self._first_segment = np.concatenate(([0], np.cumsum(lengths)))
            self._segment_folds = np.repeat(self._folds, lengths)
            self._segments = self._active(self.file, self.onset, self.offset)
            self.wanted = self._by_fold(self._segment_folds[self._segments])
        else:
            self.wanted = self._by_fold(self._folds[self.file])
        self._union = self._joined()

    def count(self, file: NDArray[np.intp], onset: Floats, offset: Floats) -> Counts:
        """Return true and false positives, (num_folds, 2), of detections that are disjoint and in order."""
        if self.metric == "segment_based":
            found = self._active(file, onset, offset)
            hits, wrong = self._segment_folds[found & self._segments], self._segment_folds[found & ~self._segments]
        elif self.metric == "intersection":
            passed = self._coverage((file, onset, offset), self._union) >= 0.5
            covered = self._coverage(
                (self.file, self.onset, self.offset), (file[passed], onset[passed], offset[passed])
            )
            hits, wrong = self._folds[self.file[covered >= 0.5]], self._folds[file[~passed]]
        else:
            hits = self._folds[self._matched(file, onset, offset)]
            found_here = self._by_fold(hits)
            return np.stack([found_here, self._by_fold(self._folds[file]) - found_here], axis=1)
        return np.stack([self._by_fold(hits), self._by_fold(wrong)], axis=1)

    def _by_fold(self, folds: NDArray[np.intp]) -> Floats:
        return np.bincount(folds, minlength=self._num_folds).astype(np.float64)

    def _matched(self, file: NDArray[np.intp], onset: Floats, offset: Floats) -> NDArray[np.intp]:
        """Return the recording of each pair of reference event and detection within the collars."""
        key, found = self.file * self.stride + self.onset, file * self.stride + onset
        first = np.searchsorted(found, key - 0.2 - 1e-6, side="left")
        stop = np.searchsorted(found, key + 0.2 + 1e-6, side="right")
        left, right = _pairs(first, stop)
        tolerance = np.maximum(0.2, 0.2 * (self.offset - self.onset))[left]
        near = (file[right] == self.file[left]) & (np.abs(onset[right] - self.onset[left]) <= 0.2)
        near &= np.abs(offset[right] - self.offset[left]) <= tolerance
        left, right = left[near], right[near]
        several = (np.bincount(left, minlength=len(key))[left] > 1) | (
            np.bincount(right, minlength=len(found))[right] > 1
        )
        if not several.any():
            hit: NDArray[np.intp] = self.file[left]
            return hit
        # Who goes with whom is a matching, which is the metric's to find.
        unclear = np.unique(self.file[left[several]])
        clear = self.file[left[~np.isin(self.file[left], unclear)]]
        hits = []
        for number in unclear.tolist():
            sides = []
            for files, starts, ends in ((self.file, self.onset, self.offset), (file, onset, offset)):
                here = files == number
                sides.append([Event("", a, b) for a, b in zip(starts[here], ends[here], strict=True)])
            hits += [number] * event_based({"": sides[0]}, {"": sides[1]}).overall.tp
        return np.concatenate([clear, np.array(hits, dtype=np.intp)])

    def _joined(self) -> tuple[NDArray[np.intp], Floats, Floats]:
        """Return the reference events with those that overlap made one."""
        start, end = self.file * self.stride + self.onset, self.file * self.stride + self.offset
        if not len(start):
            return self.file, self.onset, self.offset
        ends = np.maximum.accumulate(end)
        apart = start[1:] >= ends[:-1]
        first, last = np.append(True, apart), np.append(apart, True)
        return self.file[first], self.onset[first], ends[last] - self.file[last] * self.stride

    def _coverage(
        self, spans: tuple[NDArray[np.intp], Floats, Floats], covering: tuple[NDArray[np.intp], Floats, Floats]
    ) -> Floats:
        """Return which part of each span the others cover; those are disjoint."""
        (file, onset, offset), (other, start, end) = spans, covering
        first = np.searchsorted(other * self.stride + end, file * self.stride + onset, side="right")
        stop = np.searchsorted(other * self.stride + start, file * self.stride + offset, side="left")
        left, right = _pairs(first, stop)
        shared = np.minimum(end[right], offset[left]) - np.maximum(start[right], onset[left])
        parts = shared / (offset - onset)[left]
        return np.asarray(np.bincount(left, weights=parts, minlength=len(file)), dtype=np.float64)

    def _active(self, file: NDArray[np.intp], onset: Floats, offset: Floats) -> NDArray[np.bool_]:
        """Return which segments of 1 s of all recordings the events touch."""
        base, end = self._first_segment[file], self._first_segment[file + 1]
        first = np.minimum(base + np.floor(onset + 1e-9).astype(np.intp), end)
        stop = np.minimum(base + np.ceil(offset - 1e-9).astype(np.intp), end)
        total = int(self._first_segment[-1])
        steps = np.bincount(first, minlength=total + 1) - np.bincount(stop, minlength=total + 1)
        return np.asarray(np.cumsum(steps)[:total] > 0)


def _pairs(first: NDArray[np.intp], stop: NDArray[np.intp]) -> Regions:
    """Return every (i, j) with ``first[i] <= j < stop[i]``."""
    lengths = np.maximum(stop - first, 0)
    left = np.repeat(np.arange(len(first)), lengths)
    return left, np.arange(len(left)) + np.repeat(first - (np.cumsum(lengths) - lengths), lengths)


# ------------------------------------------------------------------ the search for one class


class _Search:
    """The posteriors of one class in all recordings, decoded with many settings and counted.

    The recordings lie one after the other on one axis, each with its edges repeated as far as the longest median
    filter reaches, so that one pass filters all of them; what is found in the repeats is taken out again.

    Attributes:
        thresholds: those tried, increasing; ``fixed`` says which are tried for every class.
        medians: those tried, increasing; none delays the end of an event by more than ``max_delay``.
        counts: (num_medians, num_ratios, num_thresholds, num_folds, 2), without gaps and durations.
    """

    def __init__(
        self, recordings: _Recordings, metric: Metric, label: str, column: int, max_delay: float = math.inf
    ) -> None:
        self._truth = _Truth(recordings, metric, label)
        self.wanted = self._truth.wanted
        frame_seconds = recordings.frame_seconds
        self._max_delay = max_delay + 1e-6
        lengths = sorted({median_frames(seconds, frame_seconds) for seconds in _MEDIANS})
        lengths = [length for length in lengths if length == 1 or length * frame_seconds / 2 <= self._max_delay]
        self.medians = [0.0 if length == 1 else round(length * frame_seconds, 6) for length in lengths]
        self._lengths = lengths
        half = lengths[-1] // 2 + 1
        with_events = set(self._truth.file.tolist())
        values, inside, files, local = [], [], [], []
        for i, name in enumerate(recordings.names):
            posteriors = recordings.posteriors[name][:, column]
            if not len(posteriors) or (i not in with_events and posteriors.max() < _THRESHOLDS[0]):
                continue
            bounds = recordings.boundaries[name]
            edges = (np.full(half, posteriors[0]), np.full(half, posteriors[-1]))
            values.append(np.concatenate((edges[0], posteriors, edges[1])))
            inside.append(np.pad(np.ones(len(posteriors), dtype=np.bool_), half))
            files.append(np.full(len(posteriors) + 2 * half, i))
            local.append(np.concatenate((np.zeros(half), bounds, np.full(half - 1, bounds[-1]))))
        self._values = np.concatenate(values) if values else np.zeros(0, np.float32)
        self._inside = np.concatenate(inside) if inside else np.zeros(0, np.bool_)
        self._file = np.concatenate(files) if files else np.zeros(0, np.intp)
        self._local = np.concatenate(local) if local else np.zeros(0)
        self._axis = self._file * self._truth.stride + self._local
        self.thresholds = self._candidates()
        self.fixed = np.isin(self.thresholds, _THRESHOLDS)
        self._regions: dict[tuple[float, float, float], Regions] = {}
        self._counted: dict[Rule, Counts] = {}
        self.counts = self._grid()

    def _candidates(self) -> Floats:
        """Return the thresholds to try: a grid, and quantiles of the posteriors that are not next to nothing."""
        heard = self._values[self._inside & (self._values >= 0.005)]
        quantiles = np.quantile(heard, np.arange(1, _QUANTILES) / _QUANTILES) if len(heard) else np.zeros(0)
        # Few digits, so that what is written down is what was tried.
        rounded = [float(f"{min(max(value, 0.001), 0.999):.4g}") for value in quantiles.tolist()]
        return np.unique(np.array([*_THRESHOLDS, *rounded]))

    def off(self, threshold: float, ratio: float, fixed: bool) -> float:
        """Return the ``threshold_off`` tried for a part of a threshold: one of the thresholds, the nearest below."""
        allowed = self.thresholds[self.fixed] if fixed else self.thresholds
        below = allowed[allowed <= threshold * ratio + 1e-9]
        return float(below[-1] if len(below) else allowed[0])

    def _grid(self) -> Counts:
        """Count every median, ratio and threshold."""
        grid = np.zeros((len(self.medians), len(_RATIOS), len(self.thresholds), len(self.wanted), 2))
        values = self._values
        for m, length in enumerate(self._lengths):
            regions = [
                runs(median_at_least(values, t, length) & self._inside) if len(values) else runs(self._inside)
                for t in self.thresholds.tolist()
            ]
            place = {t: i for i, t in enumerate(self.thresholds.tolist())}
            for t, threshold in enumerate(self.thresholds.tolist()):
                for r, ratio in enumerate(_RATIOS):
                    off = self.off(threshold, ratio, bool(self.fixed[t]))
                    key = (threshold, off, self.medians[m])
                    if key not in self._regions:
                        starts, stops = regions[place[off]]
                        same = off == threshold
                        self._regions[key] = (starts, stops) if same else triggered(regions[t][0], starts, stops)
                    grid[m, r, t] = self.count((*key, 0.0, 0.0))
        return grid

    def count(self, rule: Rule) -> Counts:
        """Return true and false positives, (num_folds, 2), with these settings."""
        if rule not in self._counted:
            threshold, off, median, gap, duration = rule
            if (threshold, off, median) not in self._regions:
                length = self._lengths[self.medians.index(median)]
                on, active = (median_at_least(self._values, t, length) & self._inside for t in (threshold, off))
                self._regions[threshold, off, median] = triggered(runs(on)[0], *runs(active))
            starts, stops = joined(*self._regions[threshold, off, median], self._axis, gap, duration)
            self._counted[rule] = self._truth.count(self._file[starts], self._local[starts], self._local[stops])
        return self._counted[rule]

    def rule(self, m: int, r: int, t: int) -> Rule:
        """Return the settings of a cell of the grid."""
        threshold = float(self.thresholds[t])
        return threshold, self.off(threshold, _RATIOS[r], bool(self.fixed[t])), self.medians[m], 0.0, 0.0

    def f1(self, counts: Counts, folds: NDArray[np.intp]) -> Floats:
        """Return the F1 in groups of recordings together; counts of (..., num_folds, 2)."""
        hits, wrong = counts[..., folds, 0].sum(axis=-1), counts[..., folds, 1].sum(axis=-1)
        total = hits + wrong + self.wanted[folds].sum()
        return np.asarray(2 * hits / np.maximum(total, 1))

    def own_settings(self, folds: NDArray[np.intp]) -> Rule:
        """Return the best settings for groups of recordings."""
        smooth = smoothed(self.counts, axis=2)
        value = self.f1(smooth, folds)
        order = np.argsort(-value, axis=None, kind="stable")
        rules: dict[Rule, Counts] = {}
        # The best of each filter, so that the anchors differ in more than a step of the threshold.
        anchors: dict[tuple[float, float], Rule] = {}
        for flat in order[:400].tolist():
            cell = np.unravel_index(flat, value.shape)
            rule = self.rule(*map(int, cell))
            rules.setdefault(rule, smooth[cell])
            filters = (round(rule[1] / rule[0], 1), rule[2])
            if len(anchors) < _ANCHORS:
                anchors.setdefault(filters, rule)
        for rule in anchors.values():
            # What a step of the threshold costs is known without gaps and durations; the same is taken off with them.
            lost = rules[rule] - self.counts_of(rule)
            for gap, duration in self.joins(rule[2]):
                changed = (*rule[:3], gap, duration)
                rules[changed] = np.maximum(self.count(changed) + lost, 0)
        return self._plainest(rules, folds)

    def joins(self, median: float) -> list[tuple[float, float]]:
        """Return the gaps and durations to try with a median filter."""
        gaps = [gap for gap in _GAPS if not gap or median / 2 + gap <= self._max_delay]
        return list(itertools.product(gaps, _DURATIONS))

    def counts_of(self, rule: Rule) -> Counts:
        """Return the counts of settings without gaps and durations."""
        return self.count((*rule[:3], 0.0, 0.0))

    def own_threshold(self, folds: NDArray[np.intp], shared: Rule) -> Rule:
        """Return the best threshold with the filters, and the hysteresis, that all classes share."""
        rules = self.moved(shared)
        counts = smoothed(np.stack([self.count(rule) for rule in rules]), axis=0)
        return rules[int(np.argmax(self.f1(counts, folds)))]

    def moved(self, rule: Rule, fixed: bool = False, more: Sequence[float] = ()) -> list[Rule]:
        """Return the settings with every other threshold, by threshold; hysteresis stays the same part of it."""
        ratio = rule[1] / rule[0]
        thresholds = sorted({*(self.thresholds[self.fixed] if fixed else self.thresholds).tolist(), *more})
        return [(t, float(f"{t * ratio:.4g}") if ratio < 1 else t, *rule[2:]) for t in thresholds]

    def stricter(self, rule: Rule) -> list[Rule]:
        """Return the settings and those with higher thresholds, by threshold; hysteresis stays the same part of it."""
        return [rule, *(moved for moved in self.moved(rule, more=_STRICT) if moved[0] > rule[0])]

    def unseen(self, rules: Sequence[Rule]) -> Counts:
        """Return the counts of ``rules[k]`` in group ``k`` of the recordings, (num_folds, 2)."""
        return np.stack([self.count(rule)[k] for k, rule in enumerate(rules)])

    def unseen_f1(self, rules: Sequence[Rule]) -> float:
        """Return the F1 of ``rules[k]`` in group ``k`` of the recordings, counted together."""
        return float(self.f1(self.unseen(rules), np.arange(len(self.wanted))))

    def gain(self, counts: Counts, base: Counts, folds: NDArray[np.intp]) -> tuple[Floats, Floats]:
        """Return how much more F1 counts are than others, and its standard error: a jackknife over the groups."""
        gain = self.f1(counts, folds) - self.f1(base, folds)
        without = [np.delete(folds, k) for k in range(len(folds))] if len(folds) > 1 else []
        parts = np.array([self.f1(counts, part) - self.f1(base, part) for part in without])
        if not len(parts):
            return gain, np.zeros_like(gain)
        spread = ((parts - parts.mean(axis=0)) ** 2).sum(axis=0)
        return gain, np.asarray(np.sqrt((len(parts) - 1) / len(parts) * spread))

    def _plainest(self, rules: Mapping[Rule, Counts], folds: NDArray[np.intp]) -> Rule:
        """Return the plainest of the settings that are as good as the best within a standard error."""
        names, counts = list(rules), np.stack(list(rules.values()))
        best = int(np.argmax(self.f1(counts, folds)))
        gain, error = self.gain(counts, counts[best], folds)
        behind, allowed = -gain, np.minimum(error, _SLACK)
        effort = [(rule[1] < rule[0]) + sum(setting > 0 for setting in rule[2:]) for rule in names]
        able = [i for i in range(len(names)) if behind[i] <= allowed[i] + 1e-12]
        return names[min(able, key=lambda i: (effort[i], behind[i], i))]


def smoothed(counts: Counts, axis: int) -> Counts:
    """Return counts averaged with those of the next thresholds on both sides (1, 2, 1), edges repeated."""
    moved = np.moveaxis(counts, axis, 0)
    wide = np.concatenate((moved[:1], moved, moved[-1:]))
    return np.moveaxis((wide[:-2] + 2 * wide[1:-1] + wide[2:]) / 4, 0, axis)


def _shared(searches: Mapping[str, _Search], folds: NDArray[np.intp]) -> Rule:
    """Return the one setting that is best for all classes together (mean F1) in groups of recordings."""
    every = list(searches.values())
    means = np.mean([s.f1(smoothed(s.counts[:, :, s.fixed], axis=2), folds) for s in every], axis=0)
    m, r, t = np.unravel_index(int(np.argmax(means)), means.shape)
    anchor = every[0].rule(int(m), int(r), int(np.flatnonzero(every[0].fixed)[t]))
    best, found = -1.0, anchor
    for gap, duration in every[0].joins(anchor[2]):
        rule = (*anchor[:3], gap, duration)
        value = float(np.mean([s.f1(s.count(rule), folds) for s in every]))
        if value > best + 1e-9:
            best, found = value, rule
    return found


def _operating_point(
    searches: Sequence[_Search], rule: Rule, least: float, precise: bool, own: bool
) -> tuple[Rule, bool]:
    """Return the settings with the threshold moved until precision (or recall) is reached, and whether it is.

    Means over the classes. Of those that reach it the one with the best recall (or precision), else the nearest. What
    is hardly ever detected has no precision that is known: such settings are the last choice.
    """
    rules = [moved for moved in [rule, *searches[0].moved(rule, fixed=not own)]
             if (moved[0] >= rule[0] if precise else moved[0] <= rule[0])]  # fmt: skip
    ranks = []
    for moved in rules:
        precisions, recalls, detected = [], [], 0
        for search in searches:
            hits, wrong = search.count(moved).sum(axis=0)
            detected += hits + wrong
            precisions.append(hits / max(hits + wrong, 1))
            recalls.append(hits / max(search.wanted.sum(), 1))
        held, other = (np.mean(precisions), np.mean(recalls))[:: 1 if precise else -1]
        # To the threshold that changes least where several are the same.
        reached = held >= least
        known = not precise or detected >= _FEW
        ranks.append((known, reached, other if reached else held, other, -abs(moved[0] - rule[0])))
    best = max(range(len(rules)), key=lambda i: ranks[i])
    return rules[best], all(ranks[best][:2])


# ------------------------------------------------------------------ what quiet recordings ask for


class _Alarms:
    """Counts what is detected in quiet recordings, and raises thresholds until that is little enough."""

    def __init__(self, quiet: QuietRecordings, labels: Sequence[str], num_folds: int, limit: float) -> None:
        self._names = sorted(quiet.posteriors)
        keys = [name if quiet.groups is None else quiet.groups.get(name, name) for name in self._names]
        self._folds, self._several = fold_numbers(keys, num_folds), len(set(keys)) > 1
        self._quiet, self._labels, self._limit = quiet, list(labels), limit
        seconds = [float(quiet.boundaries[name][-1]) for name in self._names]
        self._hours = np.bincount(self._folds, weights=seconds, minlength=num_folds) / 3600
        if not self._hours.sum() > 0:
            raise DataError("there is no sound in the quiet recordings; give some in which false alarms can be counted")
        shape = (len(self._names), len(self._labels))
        self._peaks = np.reshape([quiet.posteriors[name].max(axis=0, initial=0) for name in self._names], shape)
        self._counted: dict[tuple[str, Rule], Floats] = {}

    def count(self, label: str, rule: Rule) -> Floats:
        """Return how many events of a class there are in each group of the recordings, (num_folds,)."""
        if (label, rule) not in self._counted:
            column = self._labels.index(label)
            threshold, off, median, gap, duration = rule
            config = DecodingConfig(threshold, off, median, duration, gap)
            counts = np.zeros(len(self._hours))
            for i in np.flatnonzero(self._peaks[:, column] >= threshold).tolist():
                posteriors = self._quiet.posteriors[self._names[i]][:, column : column + 1]
                found = decode_events(posteriors, self._quiet.boundaries[self._names[i]], [label], config)
                counts[self._folds[i]] += len(found)
            self._counted[label, rule] = counts
        return self._counted[label, rule]

    def raised(
        self, searches: Mapping[str, _Search], rules: Mapping[str, Rule], untuned: Floats | int, folds: NDArray[np.intp]
    ) -> dict[str, Rule]:
        """Return the settings with thresholds raised until few enough false alarms are left, or none can be removed.

        Args:
            searches: those of the classes that may be raised.
            rules: their settings so far.
            untuned: (num_folds,) false alarms of the other classes, which stay.
            folds: groups, of labelled and of quiet recordings, that are looked at.
        """
        ladders = {label: searches[label].stricter(rule) for label, rule in sorted(rules.items())}
        counts = {n: np.array([self.count(n, rule)[folds].sum() for rule in ladder]) for n, ladder in ladders.items()}
        f1 = {n: searches[n].f1(np.stack([searches[n].count(r) for r in rs]), folds) for n, rs in ladders.items()}
        place = dict.fromkeys(ladders, 0)
        allowed = self._limit * self._hours[folds].sum() - np.broadcast_to(untuned, self._hours.shape)[folds].sum()
        while (excess := sum(counts[label][i] for label, i in place.items()) - allowed) > 1e-9:
            steps = []
            for label, i in place.items():
                removed = counts[label][i] - counts[label][i + 1 :]
                lost = np.maximum(f1[label][i] - f1[label][i + 1 :], 0)
                # More than what is too many is of no use.
                useful = np.minimum(removed, math.ceil(excess - 1e-9))
                steps += [
                    (lost[j] / useful[j], -useful[j], j, label, i + 1 + j) for j in np.flatnonzero(removed > 0).tolist()
                ]
            if not steps:
                break
            *_, label, target = min(steps)
            place[label] = target
        return {label: ladders[label][i] for label, i in place.items()}

    def report(
        self,
        unraised: DecodingConfig,
        points: Mapping[str, DecodingConfig],
        scores_before: DetectionScores,
        scores: DetectionScores,
        cross_validated_before: float,
        held_out: Mapping[str, Sequence[Rule]],
    ) -> FalseAlarms:
        """Return what was counted.

        Args:
            unraised: settings of the balanced point before thresholds were raised.
            points: all points after that.
            scores_before: of the balanced point, on the recordings that it was chosen on.
            scores: the same after that.
            cross_validated_before: macro F1, had nothing been raised.
            held_out: label -> the settings raised without group ``k`` of the recordings.
        """
        per_class, unknown = {}, 0.0
        for label in self._labels:
            old, new = (_rule(config, label) for config in (unraised, points["balanced"]))
            tuned = label in held_out
            per_class[label] = ClassFalseAlarms(
                tuned, old[0], new[0], int(self.count(label, old).sum()), int(self.count(label, new).sum()),
                scores_before.per_class[label].f1 if tuned else None, scores.per_class[label].f1 if tuned else None,
            )  # fmt: skip
            unknown += sum(self.count(label, r)[k] for k, r in enumerate(held_out.get(label, [new] * len(self._hours))))
        return FalseAlarms(
            limit=self._limit,
            hours=float(self._hours.sum()),
            recordings=len(self._names),
            before=sum(one.before for one in per_class.values()),
            after=sum(one.after for one in per_class.values()),
            cross_validated=int(unknown) if self._several else None,
            macro_f1_before=scores_before.macro_f1,
            cross_validated_macro_f1_before=cross_validated_before,
            points={
                name: sum(int(self.count(label, _rule(config, label)).sum()) for label in self._labels)
                for name, config in points.items()
            },
            per_class=per_class,
        )
