"""Scores of detected events against reference events.

Conventions
-----------
Events are given as a mapping from file name to the list of its events, ``reference`` first,
``estimated`` second; their order within a list does not matter. A file that only one side names
has no events on the other side: estimated events of a file without reference events are
false alarms. (sed_eval and psds_eval score the files they are told of; name the event-free files
of the reference or not, the result is the same here.)

Three metrics answer three questions and give very different figures for the same events, so say
which one a number is:

``intersection_based``
    Do detections and reference events overlap enough? A detection passes the *detection tolerance
    criterion* if reference events of its class cover at least ``dtc`` of it. A reference event is a
    true positive if detections that passed cover at least ``gtc`` of it (*ground truth intersection
    criterion*); other reference events are false negatives, detections that did not pass are false
    positives. A detection that passed without making a true positive is neither.
    Source: Bilen et al., ICASSP 2020, arXiv 1910.08440; ``psds_eval`` 0.5.3, ``compute_macro_f_score``.
    The DESED table of the HTS-AT paper is this metric with ``dtc = gtc = 0.5``.
``event_based``
    Are onset and offset right to within a collar? A detection matches a reference event of its class
    if the onsets differ by at most ``onset_collar`` and the offsets by at most ``offset_collar`` or
    ``offset_collar_rate`` times the length of the reference event, whichever is larger. Each event is
    matched at most once, as many as possible (maximum bipartite matching).
    Source: Mesaros et al., Applied Sciences 6(6), 2016; ``sed_eval`` 0.2.1, ``EventBasedMetrics`` with
    ``event_matching_type="optimal"`` and ``empty_system_output_handling="zero_score"``.
``segment_based``
    Is each class active in the right segments of a fixed length? A class is active in a segment if any
    of its events touches it. Source: as above; ``sed_eval`` 0.2.1, ``SegmentBasedMetrics``.

Averages and rates
------------------
F1, precision and recall are fractions in [0, 1]. ``F1 = 2 TP / (2 TP + FP + FN)``; a ratio whose denominator is 0 is 0.

* ``macro_f1`` is the mean over classes with at least one reference event. A class that was only
  detected has no recall, hence no F1 to average (as in sed_eval and psds_eval); it is listed in
  ``per_class`` with F1 0 and its false positives count in ``micro_f1``. ``macro`` holds the means of
  precision, recall and rates over the same classes.
* ``micro_f1`` is the F1 of the counts summed over all classes; ``overall`` holds what belongs to it.
* Classes in neither list are not counted. ``labels`` restricts both lists to the named classes.

Rates are errors per reference event (per active reference segment): a class's *deletion rate* is FN / (TP + FN), its
*insertion rate* FP / (TP + FN), and its *error rate* their sum, which may be above 1. Without reference events there
is no rate (None; sed_eval divides by 2e-16).

Over all classes a miss and a false alarm that stand for each other are one error, a *substitution* S, where the
metric can tell: the deletions are then FN - S, the insertions FP - S, and the error rate counts S, deletions and
insertions (Mesaros et al.). In a segment S is the smaller one of its numbers of misses and false alarms. In the
event-based metric S is how many events that were left unmatched fit a reference event of another class that was left
unmatched too, by the same collars, each used once (``EventBasedMetrics``: reference events in the order of time, each
takes the first that fits). The intersection-based metric has no substitutions: its error rate counts FN and FP, and
confusions of classes are the cross-triggers of ``htsat.metrics.psds``. Source: ``sed_eval`` 0.2.1.

Without any reference event every F1 is 0.

Oddities: events of one class may overlap or repeat in all metrics. Intersection-based, the part that they share counts
once for what it covers, and each is counted as an event; event-based, each is matched on its own, so that of two equal
detections of one event the second is a false positive; segment-based, a segment is active or not.

Differences from the sources: psds_eval drops a class without a single true positive from its macro
average (0 / 0), which flatters a system that misses a class; here it counts as 0. sed_eval drops a class
without detections from its mean precision; here it counts as 0. psds_eval refuses
overlapping events of one class. Counts and figures are
otherwise equal, including exact ties: distances are compared in float64 without tolerance, like sed_eval.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from htsat.events import Event
from htsat.metrics.overlap import NO_SPANS, check_sides, coverage, spans_by_label

_Spans = NDArray[np.float64]
_Grouped = dict[tuple[str, str], _Spans]


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class (or of all classes together).

    Attributes:
        f1: in [0, 1].
        precision: TP / (TP + FP), in [0, 1]; 0 without detections.
        recall: TP / (TP + FN), in [0, 1]; 0 without reference events.
        tp: true positives (reference events; segments in the segment-based metric).
        fp: false positives (detections; segments).
        fn: false negatives (reference events; segments).
        error_rate: errors per reference event (segment); None without any.
        deletion_rate: deletions per reference event; None without any.
        insertion_rate: insertions per reference event; None without any.
        substitution_rate: substitutions per reference event; None for a single class and where the metric knows none.
    """

    f1: float
    precision: float
    recall: float
    tp: int
    fp: int
    fn: int
    error_rate: float | None
    deletion_rate: float | None
    insertion_rate: float | None
    substitution_rate: float | None = None


@dataclass(frozen=True)
class MacroScores:
    """Means over the classes with reference events; see ``ClassScores``. The rates are None without such a class."""

    f1: float
    precision: float
    recall: float
    error_rate: float | None
    deletion_rate: float | None
    insertion_rate: float | None


@dataclass(frozen=True)
class DetectionScores:
    """Result of a detection metric.

    Attributes:
        macro_f1: mean F1 of the classes with reference events, in [0, 1].
        micro_f1: F1 of the summed counts, in [0, 1].
        per_class: scores of each class that occurs, by label in alphabetical order.
        overall: precision, recall, rates and counts behind ``micro_f1``.
        macro: precision, recall and rates beside ``macro_f1``.
    """

    macro_f1: float
    micro_f1: float
    per_class: dict[str, ClassScores]
    overall: ClassScores
    macro: MacroScores


@dataclass(frozen=True, eq=False)
class FileCounts:
    """What a metric counted in each file; counts of files add up, so that resamples of files are weighted sums.

    Attributes:
        files: every file of either side: those of the reference in their order, then the others.
        labels: every class that occurs on either side, in alphabetical order.
        counts: (num_files, num_classes, 3) true positives, false positives, false negatives.
        substitutions: (num_files,); None where the metric knows none.
    """

    files: tuple[str, ...]
    labels: tuple[str, ...]
    counts: NDArray[np.int64]
    substitutions: NDArray[np.int64] | None


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _class_scores(counts: Sequence[int], substitutions: int | None = None) -> ClassScores:
    tp, fp, fn = map(int, counts)
    replaced, reference = substitutions or 0, tp + fn
    return ClassScores(
        f1=_ratio(2 * tp, 2 * tp + fp + fn),
        precision=_ratio(tp, tp + fp),
        recall=_ratio(tp, tp + fn),
        tp=tp,
        fp=fp,
        fn=fn,
        error_rate=(fp + fn - replaced) / reference if reference else None,
        deletion_rate=(fn - replaced) / reference if reference else None,
        insertion_rate=(fp - replaced) / reference if reference else None,
        substitution_rate=substitutions / reference if reference and substitutions is not None else None,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers else None


def summarise(counts: FileCounts) -> DetectionScores:
    """Return the scores of all files together."""
    total = counts.counts.sum(axis=0)
    per_class = {label: _class_scores(count) for label, count in zip(counts.labels, total.tolist(), strict=True)}
    substitutions = None if counts.substitutions is None else int(counts.substitutions.sum())
    overall = _class_scores(total.sum(axis=0).tolist(), substitutions)
    averaged = [scores for scores in per_class.values() if scores.tp + scores.fn]
    macro = MacroScores(
        _mean([scores.f1 for scores in averaged]) or 0.0,
        _mean([scores.precision for scores in averaged]) or 0.0,
        _mean([scores.recall for scores in averaged]) or 0.0,
        _mean([scores.error_rate for scores in averaged]),
        _mean([scores.deletion_rate for scores in averaged]),
        _mean([scores.insertion_rate for scores in averaged]),
    )
    return DetectionScores(macro.f1, overall.f1, per_class, overall, macro)


def _file_counts(
    reference: Mapping[str, Sequence[Event]],
    estimated: Mapping[str, Sequence[Event]],
    counted: Mapping[tuple[str, str], tuple[int, int, int]],
    substitutions: Mapping[str, int] | None,
) -> FileCounts:
    """Arrange (label, file) -> (tp, fp, fn) and file -> substitutions."""
    files = tuple(dict.fromkeys((*reference, *estimated)))
    labels = tuple(sorted({label for label, _ in counted}))
    row = {file: index for index, file in enumerate(files)}
    column = {label: index for index, label in enumerate(labels)}
    counts = np.zeros((len(files), len(labels), 3), dtype=np.int64)
    for (label, file), one in counted.items():
        counts[row[file], column[label]] = one
    replaced = None
    if substitutions is not None:
        replaced = np.array([substitutions.get(file, 0) for file in files], dtype=np.int64)
    return FileCounts(files, labels, counts, replaced)


def _spans(events: Mapping[str, Sequence[Event]], labels: Collection[str] | None) -> _Grouped:
    """Group events by (label, file).

    Returns:
        (num_events, 2) onsets and offsets in seconds, by onset, for each label and file with events.

    Raises:
        TypeError: ``events`` is no mapping, or ``labels`` a single text.
    """
    check_sides(events, labels)
    wanted = None if labels is None else set(labels)
    grouped: defaultdict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for file, file_events in events.items():
        for event in file_events:
            if wanted is None or event.event_label in wanted:
                grouped[event.event_label, file].append((event.onset, event.offset))
    return {key: np.array(sorted(spans), dtype=np.float64) for key, spans in grouped.items()}


def count_intersection_based(
    reference: Mapping[str, Sequence[Event]],
    estimated: Mapping[str, Sequence[Event]],
    *,
    labels: Collection[str] | None = None,
    dtc: float = 0.5,
    gtc: float = 0.5,
) -> FileCounts:
    """Count by file what ``intersection_based`` scores; the arguments are the same."""
    for name, criterion in (("dtc", dtc), ("gtc", gtc)):
        if not 0 < criterion <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {criterion}")
    for side in (reference, estimated):
        check_sides(side, labels)
    files = {file: index for index, file in enumerate(dict.fromkeys((*reference, *estimated)))}
    references, detections = spans_by_label(reference, labels, files), spans_by_label(estimated, labels, files)
    names = tuple(sorted(references.keys() | detections.keys()))
    counts = np.zeros((len(files), len(names), 3), dtype=np.int64)
    for column, label in enumerate(names):
        truth, found = references.get(label, NO_SPANS), detections.get(label, NO_SPANS)
        passed = coverage(found, truth) >= dtc
        hit = coverage(truth, found[passed]) >= gtc
        for kind, where in enumerate((truth.file[hit], found.file[~passed], truth.file[~hit])):
            counts[:, column, kind] = np.bincount(where, minlength=len(files))
    return FileCounts(tuple(files), names, counts, None)


def intersection_based(
    reference: Mapping[str, Sequence[Event]],
    estimated: Mapping[str, Sequence[Event]],
    *,
    labels: Collection[str] | None = None,
    dtc: float = 0.5,
    gtc: float = 0.5,
) -> DetectionScores:
    """Score by overlap of detections and reference events (see the module's conventions).

    Args:
        reference: file name -> true events.
        estimated: file name -> detected events.
        labels: classes to score; None: all that occur.
        dtc: detection tolerance criterion, the least part of a detection inside reference events, in (0, 1].
        gtc: ground truth intersection criterion, the least part of a reference event inside detections, in (0, 1].

    Raises:
        ValueError: a criterion outside (0, 1].
        TypeError: events that are no mapping from file to events, or a single text as ``labels``.
    """
    return summarise(count_intersection_based(reference, estimated, labels=labels, dtc=dtc, gtc=gtc))


def _maximum_matching(neighbours: Sequence[Sequence[int]]) -> dict[int, int]:
    """Return a maximum matching of a bipartite graph, right vertex -> left vertex.

    Args:
        neighbours: for each left vertex, its right vertices.
    """
    matched: dict[int, int] = {}  # right vertex -> left vertex
    for root in range(len(neighbours)):
        # Breadth-first search for an augmenting path; iterative, as long recordings make long paths.
        came_from: dict[int, int] = {}  # right vertex -> the left vertex that reached it
        queue, free = [root], None
        partner: dict[int, int] = {}  # left vertex -> its right vertex in the matching
        for left in queue:
            for right in neighbours[left]:
                if right in came_from:
                    continue
                came_from[right] = left
                if right not in matched:
                    free = right
                    break
                partner[matched[right]] = right
                queue.append(matched[right])
            if free is not None:
                break
        while free is not None:
            left = came_from[free]
            matched[free] = left
            free = partner.get(left)
    return matched


def _fitting(truth: _Spans, found: _Spans, collars: tuple[float, float, float]) -> list[list[int]]:
    """Return for each reference event the detections within the collars, whatever their classes.

    Args:
        truth: (num_events, 2) onsets and offsets.
        found: (num_detections, 2), by onset.
        collars: of the onset, of the offset, and of the offset as a part of the reference event's length.
    """
    onset_collar, offset_collar, offset_collar_rate = collars
    tolerances = np.maximum(offset_collar, offset_collar_rate * (truth[:, 1] - truth[:, 0]))
    # Onsets are sorted: look only at detections near a reference onset (with room for rounding).
    first = np.searchsorted(found[:, 0], truth[:, 0] - onset_collar - 1e-6, side="left")
    stop = np.searchsorted(found[:, 0], truth[:, 0] + onset_collar + 1e-6, side="right")
    fitting = []
    for (onset, offset), tolerance, i, j in zip(truth, tolerances, first, stop, strict=True):
        near = np.abs(found[i:j, 0] - onset) <= onset_collar
        near &= np.abs(found[i:j, 1] - offset) <= tolerance
        fitting.append((np.flatnonzero(near) + i).tolist())
    return fitting


def _substitutions(truth: list[_Spans], found: list[_Spans], collars: tuple[float, float, float]) -> int:
    """Return how many unmatched events of one file stand for another class's event.

    Args:
        truth: unmatched reference events of each class.
        found: unmatched detections of each class.
        collars: see ``_fitting``.
    """
    events, detections = (np.concatenate([np.empty((0, 2)), *side]) for side in (truth, found))
    events = events[np.lexsort((events[:, 1], events[:, 0]))]
    detections = detections[np.lexsort((detections[:, 1], detections[:, 0]))]
    # No pair of one class fits here, else the matching of that class was not maximal.
    used: set[int] = set()
    for fitting in _fitting(events, detections, collars):
        used.update([i for i in fitting if i not in used][:1])
    return len(used)


def count_event_based(
    reference: Mapping[str, Sequence[Event]],
    estimated: Mapping[str, Sequence[Event]],
    *,
    labels: Collection[str] | None = None,
    onset_collar: float = 0.2,
    offset_collar: float = 0.2,
    offset_collar_rate: float = 0.2,
) -> FileCounts:
    """Count by file what ``event_based`` scores; the arguments are the same."""
    for name, collar in (
        ("onset_collar", onset_collar),
        ("offset_collar", offset_collar),
        ("offset_collar_rate", offset_collar_rate),
    ):
        if not collar >= 0:
            raise ValueError(f"{name} must be 0 or more, got {collar}")
    collars = onset_collar, offset_collar, offset_collar_rate
    references, detections = _spans(reference, labels), _spans(estimated, labels)
    none = np.empty((0, 2))
    counted: dict[tuple[str, str], tuple[int, int, int]] = {}
    missed: defaultdict[str, list[_Spans]] = defaultdict(list)
    alarms: defaultdict[str, list[_Spans]] = defaultdict(list)
    for label, file in sorted(references.keys() | detections.keys()):
        truth, found = references.get((label, file), none), detections.get((label, file), none)
        matched = _maximum_matching(_fitting(truth, found, collars))
        hits = len(matched)
        counted[label, file] = hits, len(found) - hits, len(truth) - hits
        if hits < len(truth):
            missed[file].append(np.delete(truth, list(matched.values()), axis=0))
        if hits < len(found):
            alarms[file].append(np.delete(found, list(matched), axis=0))
    substitutions = {
        file: _substitutions(missed[file], alarms[file], collars) for file in missed.keys() & alarms.keys()
    }
    return _file_counts(reference, estimated, counted, substitutions)


def event_based(
    reference: Mapping[str, Sequence[Event]],
    estimated: Mapping[str, Sequence[Event]],
    *,
    labels: Collection[str] | None = None,
    onset_collar: float = 0.2,
    offset_collar: float = 0.2,
    offset_collar_rate: float = 0.2,
) -> DetectionScores:
    """Score by onsets and offsets within collars (see the module's conventions).

    Args:
        reference: file name -> true events.
        estimated: file name -> detected events.
        labels: classes to score; None: all that occur.
        onset_collar: seconds between the onsets, at most.
        offset_collar: seconds between the offsets, at most.
        offset_collar_rate: the same as a part of the reference event's length; the larger one holds.

    Raises:
        ValueError: a negative collar.
        TypeError: events that are no mapping from file to events, or a single text as ``labels``.
    """
    counts = count_event_based(
        reference,
        estimated,
        labels=labels,
        onset_collar=onset_collar,
        offset_collar=offset_collar,
        offset_collar_rate=offset_collar_rate,
    )
    return summarise(counts)


def _active_segments(spans: _Spans, segment_seconds: float, duration: float | None) -> set[int]:
    """Return the indices of the segments that the spans touch and that begin before ``duration``."""
    # 0.3 / 0.1 is 2.9999999999999996: without tolerance the event would touch a segment too many.
    first = np.floor(spans[:, 0] / segment_seconds + 1e-9).astype(np.int64)
    stop = np.ceil(spans[:, 1] / segment_seconds - 1e-9).astype(np.int64)
    if duration is not None:
        stop = np.minimum(stop, int(np.ceil(duration / segment_seconds - 1e-9)))
    active: set[int] = set()
    for i, j in zip(first.tolist(), stop.tolist(), strict=True):
        active.update(range(i, j))
    return active


def count_segment_based(
    reference: Mapping[str, Sequence[Event]],
    estimated: Mapping[str, Sequence[Event]],
    *,
    labels: Collection[str] | None = None,
    segment_seconds: float = 1.0,
    durations: Mapping[str, float] | None = None,
) -> FileCounts:
    """Count by file what ``segment_based`` scores; the arguments are the same."""
    if not segment_seconds > 0:
        raise ValueError(f"segment_seconds must be above 0, got {segment_seconds}")
    references, detections = _spans(reference, labels), _spans(estimated, labels)
    none = np.empty((0, 2))
    counted: dict[tuple[str, str], tuple[int, int, int]] = {}
    missed: defaultdict[str, Counter[int]] = defaultdict(Counter)
    alarms: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for label, file in references.keys() | detections.keys():
        duration = None if durations is None else durations.get(file)
        truth = _active_segments(references.get((label, file), none), segment_seconds, duration)
        found = _active_segments(detections.get((label, file), none), segment_seconds, duration)
        counted[label, file] = len(truth & found), len(found - truth), len(truth - found)
        missed[file].update(truth - found)
        alarms[file].update(found - truth)
    substitutions = {file: (missed[file] & alarms[file]).total() for file in missed}
    return _file_counts(reference, estimated, counted, substitutions)


def segment_based(
    reference: Mapping[str, Sequence[Event]],
    estimated: Mapping[str, Sequence[Event]],
    *,
    labels: Collection[str] | None = None,
    segment_seconds: float = 1.0,
    durations: Mapping[str, float] | None = None,
) -> DetectionScores:
    """Score by activity in segments of a fixed length (see the module's conventions).

    Args:
        reference: file name -> true events.
        estimated: file name -> detected events.
        labels: classes to score; None: all that occur.
        segment_seconds: length of a segment.
        durations: file name -> seconds; segments that begin after the end of their file are not counted
            (a model's last frame may reach over it). None, and files not named: all segments count,
            as in sed_eval.

    Raises:
        ValueError: a length that is not positive.
        TypeError: events that are no mapping from file to events, or a single text as ``labels``.
    """
    counts = count_segment_based(
        reference, estimated, labels=labels, segment_seconds=segment_seconds, durations=durations
    )
    return summarise(counts)
