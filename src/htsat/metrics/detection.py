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

Averages
--------
All scores are fractions in [0, 1]. ``F1 = 2 TP / (2 TP + FP + FN)``; a ratio whose denominator is 0 is 0.

* ``macro_f1`` is the mean over classes with at least one reference event. A class that was only
  detected has no recall, hence no F1 to average (as in sed_eval and psds_eval); it is listed in
  ``per_class`` with F1 0 and its false positives count in ``micro_f1``.
* ``micro_f1`` is the F1 of the counts summed over all classes.
* Classes in neither list are not counted. ``labels`` restricts both lists to the named classes.

Without any reference event every score is 0.

Differences from the sources: psds_eval drops a class without a single true positive from its macro
average (0 / 0), which flatters a system that misses a class; here it counts as 0. psds_eval refuses
overlapping events of one class; here the part that they share counts once. Counts and figures are
otherwise equal, including exact ties: distances are compared in float64 without tolerance, like sed_eval.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from htsat.events import Event

_Spans = NDArray[np.float64]


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
    """

    f1: float
    precision: float
    recall: float
    tp: int
    fp: int
    fn: int


@dataclass(frozen=True)
class DetectionScores:
    """Result of a detection metric.

    Attributes:
        macro_f1: mean F1 of the classes with reference events, in [0, 1].
        micro_f1: F1 of the summed counts, in [0, 1].
        per_class: scores of each class that occurs, by label in alphabetical order.
        overall: precision, recall and counts behind ``micro_f1``.
    """

    macro_f1: float
    micro_f1: float
    per_class: dict[str, ClassScores]
    overall: ClassScores


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _class_scores(tp: int, fp: int, fn: int) -> ClassScores:
    return ClassScores(_ratio(2 * tp, 2 * tp + fp + fn), _ratio(tp, tp + fp), _ratio(tp, tp + fn), tp, fp, fn)


def _summarise(counts: Mapping[str, Sequence[int]], with_reference: Collection[str]) -> DetectionScores:
    """Turn label -> (tp, fp, fn) into scores."""
    per_class = {label: _class_scores(*counts[label]) for label in sorted(counts)}
    averaged = [scores.f1 for label, scores in per_class.items() if label in with_reference]
    tp, fp, fn = (sum(count[column] for count in counts.values()) for column in range(3))
    overall = _class_scores(tp, fp, fn)
    macro_f1 = math.fsum(averaged) / len(averaged) if averaged else 0.0
    return DetectionScores(macro_f1, overall.f1, per_class, overall)


def _spans(events: Mapping[str, Sequence[Event]], labels: Collection[str] | None) -> dict[tuple[str, str], _Spans]:
    """Group events by (label, file).

    Returns:
        (num_events, 2) onsets and offsets in seconds, by onset, for each label and file with events.

    Raises:
        TypeError: ``events`` is no mapping, or ``labels`` a single text.
    """
    if not isinstance(events, Mapping):
        raise TypeError(f"expected a mapping from file name to events, got {type(events).__name__}")
    if isinstance(labels, str):
        raise TypeError(f"expected a collection of labels, got the single text {labels!r}")
    wanted = None if labels is None else set(labels)
    grouped: defaultdict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for file, file_events in events.items():
        for event in file_events:
            if wanted is None or event.event_label in wanted:
                grouped[event.event_label, file].append((event.onset, event.offset))
    return {key: np.array(sorted(spans), dtype=np.float64) for key, spans in grouped.items()}


def _union(spans: _Spans) -> _Spans:
    """Join spans (sorted by onset) that overlap, so that no second is covered twice."""
    if len(spans) < 2:
        return spans
    ends = np.maximum.accumulate(spans[:, 1])
    # Touching spans stay apart: joining them would only change rounding.
    apart = spans[1:, 0] >= ends[:-1]
    return np.stack([spans[np.append(True, apart), 0], ends[np.append(apart, True)]], axis=1)


def _coverage(spans: _Spans, covering: _Spans) -> list[float]:
    """Return which part of each span the ``covering`` spans overlap, in [0, 1]; both are sorted by onset."""
    if not len(spans) or not len(covering):
        return [0.0] * len(spans)
    covering = _union(covering)
    first = np.searchsorted(covering[:, 1], spans[:, 0], side="right")
    stop = np.searchsorted(covering[:, 0], spans[:, 1], side="left")
    covered = []
    for (onset, offset), i, j in zip(spans, first, stop, strict=True):
        shared = np.minimum(covering[i:j, 1], offset) - np.maximum(covering[i:j, 0], onset)
        # Sum of ratios, not ratio of sums: ties at a criterion then fall as in psds_eval.
        covered.append(math.fsum(shared / (offset - onset)))
    return covered


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
    for name, criterion in (("dtc", dtc), ("gtc", gtc)):
        if not 0 < criterion <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, got {criterion}")
    references, detections = _spans(reference, labels), _spans(estimated, labels)
    none = np.empty((0, 2))
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for label, file in references.keys() | detections.keys():
        truth, found = references.get((label, file), none), detections.get((label, file), none)
        passed = np.array(_coverage(found, truth), dtype=np.float64) >= dtc
        hits = sum(part >= gtc for part in _coverage(truth, found[passed]))
        count = counts[label]
        count[0] += hits
        count[1] += int(len(found) - passed.sum())
        count[2] += len(truth) - hits
    return _summarise(counts, {label for label, _ in references})


def _maximum_matching(neighbours: Sequence[Sequence[int]]) -> int:
    """Return the size of a maximum matching of a bipartite graph.

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
    return len(matched)


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
    for name, collar in (
        ("onset_collar", onset_collar),
        ("offset_collar", offset_collar),
        ("offset_collar_rate", offset_collar_rate),
    ):
        if not collar >= 0:
            raise ValueError(f"{name} must be 0 or more, got {collar}")
    references, detections = _spans(reference, labels), _spans(estimated, labels)
    none = np.empty((0, 2))
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for label, file in references.keys() | detections.keys():
        truth, found = references.get((label, file), none), detections.get((label, file), none)
        tolerances = np.maximum(offset_collar, offset_collar_rate * (truth[:, 1] - truth[:, 0]))
        # Onsets are sorted: look only at detections near a reference onset (with room for rounding).
        first = np.searchsorted(found[:, 0], truth[:, 0] - onset_collar - 1e-6, side="left")
        stop = np.searchsorted(found[:, 0], truth[:, 0] + onset_collar + 1e-6, side="right")
        neighbours = []
        for (onset, offset), tolerance, i, j in zip(truth, tolerances, first, stop, strict=True):
            near = np.abs(found[i:j, 0] - onset) <= onset_collar
            near &= np.abs(found[i:j, 1] - offset) <= tolerance
            neighbours.append((np.flatnonzero(near) + i).tolist())
        hits = _maximum_matching(neighbours)
        count = counts[label]
        count[0] += hits
        count[1] += len(found) - hits
        count[2] += len(truth) - hits
    return _summarise(counts, {label for label, _ in references})


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
    if not segment_seconds > 0:
        raise ValueError(f"segment_seconds must be above 0, got {segment_seconds}")
    references, detections = _spans(reference, labels), _spans(estimated, labels)
    none = np.empty((0, 2))
    counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for label, file in references.keys() | detections.keys():
        duration = None if durations is None else durations.get(file)
        truth = _active_segments(references.get((label, file), none), segment_seconds, duration)
        found = _active_segments(detections.get((label, file), none), segment_seconds, duration)
        count = counts[label]
        count[0] += len(truth & found)
        count[1] += len(found - truth)
        count[2] += len(truth - found)
    return _summarise(counts, {label for label, _ in references})
