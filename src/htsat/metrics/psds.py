"""Polyphonic sound detection scores (PSDS): how well a system detects at all operating points together.

Conventions
-----------
Events are given as in ``htsat.metrics.detection``: file name -> events, ``reference`` first. Every file has a duration.

At one operating point (one set of detected events) and for one class

* a detection passes the *detection tolerance criterion* if reference events of its class cover at least ``dtc`` of it;
  one that does not is a **false positive**, unless it begins after the end of its file;
* a reference event is a **true positive** if the detections that passed cover at least ``gtc`` of it;
* a false positive of which reference events of another class cover at least ``cttc`` is a **cross-trigger** with that
  class (*cross-trigger tolerance criterion*).

The true-positive ratio (TPR) is the part of the class's reference events that are true positives. The effective
false-positive rate (eFPR) is false positives per hour of all files, plus ``alpha_ct`` times the mean over the other
classes of cross-triggers per hour of that class's reference events.

The operating points of a class give a **staircase**: the highest TPR that some point reaches with at most this eFPR,
beginning with TPR 0 at eFPR 0. There is no interpolation (psds_eval offers a linear one as an option, which counts
systems between the points that nobody has). The PSD-ROC is the mean of the staircases over the classes less
``alpha_st`` times their standard deviation, at least 0; the score is the area below it up to ``max_efpr``, divided by
``max_efpr``, in [0, 1].

Classes without reference events have no TPR: they are left out, and their detections with them.
Events of one class may overlap: the part that they share covers once, and counts once in the seconds of a class.

Two ways
--------
``psds_from_operating_points`` takes detected events at some thresholds, as psds_eval does: the score grows with the
number of points, as the staircase misses what lies between them. ``psds_from_scores`` takes framewise posteriors and
is exact: it counts at every threshold that makes a difference, each class at its own. Detections are then the runs of
frames whose posterior is at least the threshold, without any filter; filter the posteriors before.

The exact way follows how a run of frames is born as the threshold falls to its lowest posterior, and dies when the
threshold falls to the next frame beside it: a signal of T frames has at most T different runs, whatever the number of
thresholds. It works in whole microseconds, so that parts that are equal to a criterion pass it.

Source: Bilen et al., ICASSP 2020, arXiv 1910.08440; ``psds_eval`` 0.5.3 for operating points; Ebbers et al., ICASSP
2022, arXiv 2201.13148, and ``sed_scores_eval`` 0.0.4 for the exact score. Differences: psds_eval refuses events of one
class that overlap; sed_scores_eval counts a class without reference events as one that is never found.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from htsat.errors import nearest
from htsat.events import Event
from htsat.metrics.overlap import NO_SPANS, Spans, check_sides, coverage, joined, spans_by_label

#: seconds of the unit that rates are given in
HOUR = 3600.0
_MICROSECONDS = 1e6


@dataclass(frozen=True)
class PSDSSettings:
    """What a polyphonic sound detection score demands; see the module's conventions.

    Attributes:
        dtc: detection tolerance criterion, in (0, 1].
        gtc: ground truth intersection criterion, in (0, 1].
        cttc: cross-trigger tolerance criterion, in (0, 1]; without effect if ``alpha_ct`` is 0.
        alpha_ct: weight of cross-triggers, in [0, 1].
        alpha_st: weight of the differences between classes, 0 or more.
        max_efpr: effective false positives per hour up to which the area counts.
    """

    dtc: float
    gtc: float
    cttc: float = 0.3
    alpha_ct: float = 0.0
    alpha_st: float = 1.0
    max_efpr: float = 100.0

    def __post_init__(self) -> None:
        for name in ("dtc", "gtc", "cttc"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")
        if not 0 <= self.alpha_ct <= 1:
            raise ValueError(f"alpha_ct must be in [0, 1], got {self.alpha_ct}")
        if not 0 <= self.alpha_st < np.inf:
            raise ValueError(f"alpha_st must be 0 or more, got {self.alpha_st}")
        if not 0 < self.max_efpr < np.inf:
            raise ValueError(f"max_efpr must be above 0, got {self.max_efpr}")


#: scenario 1 of DCASE task 4: events must be found at the right time
PSDS1 = PSDSSettings(dtc=0.7, gtc=0.7)
#: scenario 2: events must be found, and not be taken for others
PSDS2 = PSDSSettings(dtc=0.1, gtc=0.1, alpha_ct=0.5)


@dataclass(frozen=True, eq=False)
class PSDSResult:
    """A polyphonic sound detection score.

    Attributes:
        value: the score, in [0, 1].
        per_class: label -> area below this class's staircase alone, in [0, 1].
        efpr: (num_steps,) effective false positives per hour where the PSD-ROC changes, increasing from 0.
        tpr: (num_steps,) effective true-positive ratio from each of them on.
    """

    value: float
    per_class: dict[str, float]
    efpr: NDArray[np.float64]
    tpr: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Truth:
    """What detections are compared with.

    Attributes:
        labels: the classes with reference events.
        events: of each class.
        joined: the same without overlaps.
        seconds: (num_classes,) how long those last together.
        durations: (num_files,) seconds.
    """

    labels: tuple[str, ...]
    events: dict[str, Spans]
    joined: dict[str, Spans]
    seconds: NDArray[np.float64]
    durations: NDArray[np.float64]

    def crossing_weights(self, label: str, alpha_ct: float) -> NDArray[np.float64]:
        """Return what a cross-trigger of ``label`` with each class adds to the eFPR, (num_classes,)."""
        others = np.array([other != label for other in self.labels])
        return np.where(others, alpha_ct * HOUR / self.seconds / max(others.sum(), 1), 0.0)

    def points(
        self, label: str, tp: NDArray[np.int64], fp: NDArray[np.int64], crossing: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return eFPR and TPR of counts, and of weighted cross-triggers, at some operating points."""
        return fp * (HOUR / self.durations.sum()) + crossing, tp / len(self.events[label])


def _truth(
    reference: Mapping[str, Sequence[Event]],
    durations: Mapping[str, float],
    labels: Collection[str] | None,
    files: Mapping[str, int],
) -> _Truth:
    if lacking := [file for file in files if file not in durations]:
        raise ValueError(
            f"{len(lacking)} of {len(files)} files have no duration: {', '.join(map(repr, lacking[:5]))}"
            f"{nearest(lacking[0], durations)}; PSDS needs all"
        )
    seconds = np.array([durations[file] for file in files], dtype=np.float64)
    if not np.all((seconds > 0) & np.isfinite(seconds)):
        wrong = next(file for file in files if not 0 < durations[file] < np.inf)
        raise ValueError(f"expected durations in seconds above 0, got {durations[wrong]} of {wrong!r}")
    events = spans_by_label(reference, labels, files)
    names = tuple(sorted(events))
    disjoint = {label: joined(events[label]) for label in names}
    lasting = np.array([disjoint[label].length.sum() for label in names])
    return _Truth(names, events, disjoint, lasting, seconds)


def _staircase(efpr: NDArray[np.float64], tpr: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the steps of a class: eFPR, increasing from 0, and the highest TPR reached with at most that."""
    order = np.lexsort((-tpr, efpr))
    efpr, tpr = np.append(0.0, efpr[order]), np.maximum.accumulate(np.append(0.0, tpr[order]))
    # Of equal rates the last has the highest ratio so far.
    last = np.append(efpr[1:] != efpr[:-1], True)
    return efpr[last], tpr[last]


def _area(efpr: NDArray[np.float64], tpr: NDArray[np.float64], max_efpr: float) -> float:
    """Return the area below a staircase, as a part of the largest possible one."""
    return float(np.sum(np.diff(np.minimum(np.append(efpr, max_efpr), max_efpr)) * tpr) / max_efpr)


def _result(
    points: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]], settings: PSDSSettings
) -> PSDSResult:
    """Return the score of (eFPR, TPR) of every class."""
    if not points:
        return PSDSResult(0.0, {}, np.zeros(1), np.zeros(1))
    steps = {label: _staircase(*both) for label, both in points.items()}
    efpr = np.unique(np.concatenate([rates for rates, _ in steps.values()]))
    efpr = efpr[efpr <= settings.max_efpr]
    total, squares = np.zeros(len(efpr)), np.zeros(len(efpr))
    for rates, ratios in steps.values():
        total += (found := ratios[np.searchsorted(rates, efpr, side="right") - 1])
        squares += found**2
    mean = total / len(steps)
    # Rounding may leave a variance of minus nothing.
    deviation = np.sqrt(np.maximum(squares / len(steps) - mean**2, 0))
    tpr = np.maximum(mean - settings.alpha_st * deviation, 0)
    per_class = {label: _area(*both, settings.max_efpr) for label, both in steps.items()}
    return PSDSResult(_area(efpr, tpr, settings.max_efpr), per_class, efpr, tpr)


def psds_from_operating_points(
    reference: Mapping[str, Sequence[Event]],
    operating_points: Sequence[Mapping[str, Sequence[Event]]],
    durations: Mapping[str, float],
    settings: PSDSSettings,
    *,
    labels: Collection[str] | None = None,
) -> PSDSResult:
    """Score events that were detected at several thresholds (see the module's conventions).

    Args:
        reference: file name -> true events.
        operating_points: for each threshold file name -> detected events; in any order.
        durations: file name -> seconds, of every file. Files that only this names are without any event, and count in
            the hours of the false-positive rate.
        settings: ``PSDS1``, ``PSDS2`` or others.
        labels: classes to score; None: all with reference events.

    Raises:
        ValueError: a file without a duration, or a duration that is none.
        TypeError: events that are no mapping from file to events, or a single text as ``labels``.
    """
    for side in (reference, *operating_points):
        check_sides(side, labels)
    names = dict.fromkeys((*durations, *reference))
    for estimated in operating_points:
        names.update(dict.fromkeys(estimated))
    files = {file: index for index, file in enumerate(names)}
    truth = _truth(reference, durations, labels, files)
    counts = {label: np.zeros((len(operating_points), 2), np.int64) for label in truth.labels}
    crossing = {label: np.zeros(len(operating_points)) for label in truth.labels}
    weights = {label: truth.crossing_weights(label, settings.alpha_ct) for label in truth.labels}
    for row, estimated in enumerate(operating_points):
        detections = spans_by_label(estimated, truth.labels, files)
        for label in truth.labels:
            found, events = detections.get(label, NO_SPANS), truth.events[label]
            passed = coverage(found, truth.joined[label]) >= settings.dtc
            hits = int(np.sum(coverage(events, found[passed]) >= settings.gtc))
            failed = found[~passed]
            failed = failed[failed.onset < truth.durations[failed.file]]
            counts[label][row] = hits, len(failed)
            for other, weight in zip(truth.labels, weights[label].tolist(), strict=True):
                if weight:
                    crossed = int(np.sum(coverage(failed, truth.joined[other]) >= settings.cttc))
                    crossing[label][row] += weight * crossed
    points = {label: truth.points(label, count[:, 0], count[:, 1], crossing[label]) for label, count in counts.items()}
    return _result(points, settings)


@dataclass(frozen=True, eq=False)
class _Frames:
    """The frames of all files in a row, a frame without posterior (minus infinity) before, between and after them.

    Attributes:
        scores: (num_frames, num_classes).
        times: (num_frames,) microseconds at which each frame begins; where there is no posterior the file before ends.
        file: (num_frames,) number of the file.
    """

    scores: NDArray[np.floating]
    times: NDArray[np.int64]
    file: NDArray[np.int64]


def _frames(scores: Mapping[str, tuple[ArrayLike, ArrayLike]], num_classes: int, files: Mapping[str, int]) -> _Frames:
    gap = np.full((1, num_classes), -np.inf, dtype=np.float32)
    values: list[NDArray[np.floating]] = [gap]
    times, numbers = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
    for file, (given, bounds) in scores.items():
        posteriors, boundaries = np.asarray(given), np.asarray(bounds, dtype=np.float64)
        if posteriors.shape != (len(boundaries) - 1, num_classes) or boundaries.ndim != 1:
            raise ValueError(
                f"{file!r}: expected posteriors of (num_frames, {num_classes}) and num_frames + 1 boundaries, "
                f"got shapes {posteriors.shape} and {boundaries.shape}"
            )
        if not np.issubdtype(posteriors.dtype, np.floating):
            posteriors = posteriors.astype(np.float64)
        if np.isnan(posteriors).any():
            raise ValueError(f"{file!r}: posteriors contain values that are not numbers (NaN)")
        micro = _micro(boundaries)
        if np.any(np.diff(micro) <= 0) or not np.isfinite(boundaries).all():
            raise ValueError(f"{file!r}: expected boundaries in seconds, each after the one before")
        values += [posteriors, gap]
        times.append(micro)
        numbers.append(np.full(len(micro), files[file]))
    return _Frames(np.concatenate(values), np.concatenate(times), np.concatenate(numbers))


def _micro(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.rint(seconds * _MICROSECONDS).astype(np.int64)


def _reach(scores: NDArray[np.floating], longest: int, *, equal: bool) -> NDArray[np.int64]:
    """Return how many frames in a row before each frame have at least its score (above it, if not ``equal``)."""
    # minima[k][i]: of the 2 ** k frames from i on; searched from the longest to the shortest block
    minima = [scores]
    while 2 ** len(minima) <= longest:
        half = 2 ** (len(minima) - 1)
        minima.append(np.minimum(minima[-1][:-half], minima[-1][half:]))
    place = np.arange(len(scores))
    first = place.copy()
    for k in reversed(range(len(minima))):
        block = first - 2**k
        least = minima[k][np.maximum(block, 0)]
        more = (block >= 0) & ((least >= scores) if equal else (least > scores))
        first = np.where(more, block, first)
    return place - first


@dataclass(frozen=True, eq=False)
class _Runs:
    """Every run of frames that some threshold detects, of one class.

    Attributes:
        start: (num_runs,) its first frame.
        stop: (num_runs,) the frame after its last one.
        born: (num_runs,) the highest threshold that detects it.
        dies: (num_runs,) the highest threshold that detects more than it; minus infinity for a whole file.
    """

    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    born: NDArray[np.floating]
    dies: NDArray[np.floating]

    def __getitem__(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> "_Runs":
        return _Runs(self.start[chosen], self.stop[chosen], self.born[chosen], self.dies[chosen])


def _runs(scores: NDArray[np.floating], longest: int) -> _Runs:
    """Return the runs of (num_frames,) scores with minus infinity at both ends; in the order of their lowest frames.

    Args:
        scores: of one class.
        longest: most frames between two of minus infinity.
    """
    before = _reach(scores, longest, equal=True)
    # Each run belongs to the first of its lowest frames.
    lowest = (scores > -np.inf) & (before == _reach(scores, longest, equal=False))
    frame = np.flatnonzero(lowest)
    after = _reach(scores[::-1], longest, equal=True)[::-1]
    start, stop = frame - before[frame], frame + after[frame] + 1
    return _Runs(start, stop, scores[frame], np.maximum(scores[start - 1], scores[stop]))


def _covered(frames: _Frames, spans: Spans) -> NDArray[np.int64]:
    """Return how many microseconds of events have passed at the beginning of each frame, counted within its file.

    Args:
        frames: of all files.
        spans: of one class, not overlapping.
    """
    covered = np.zeros(len(frames.times), dtype=np.int64)
    onsets, offsets = _micro(spans.onset), _micro(spans.offset)
    starts = np.flatnonzero(np.diff(spans.file, prepend=-1))
    begins = np.searchsorted(frames.file[1:], spans.file[starts], side="left") + 1
    ends = np.searchsorted(frames.file[1:], spans.file[starts], side="right") + 1
    for i, j, begin, end in zip(starts, np.append(starts[1:], len(spans)), begins, ends, strict=True):
        times = frames.times[begin:end]
        before = np.searchsorted(onsets[i:j], times, side="right")
        passed = np.append(0, np.cumsum(offsets[i:j] - onsets[i:j]))[before]
        # Of the event that began last a part may be yet to come.
        coming = np.append(0, offsets[i:j])[before] - times
        covered[begin:end] = passed - np.maximum(coming, 0)
    return covered


def _hit_changes(
    events: Spans, frames: _Frames, runs: _Runs, passed: NDArray[np.bool_], gtc: float
) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """Return thresholds, and by how much the number of true positives changes as the threshold falls to each."""
    runs = runs[passed]
    # Runs are in the order of their frames, hence of their files.
    file, onset, offset = frames.file[runs.start], frames.times[runs.start], frames.times[runs.stop]
    first, last = np.searchsorted(file, events.file, side="left"), np.searchsorted(file, events.file, side="right")
    thresholds, changes = [], []
    for begin, end, i, j in zip(_micro(events.onset), _micro(events.offset), first, last, strict=True):
        shared = np.minimum(offset[i:j], end) - np.maximum(onset[i:j], begin)
        some = shared > 0
        if not some.any():
            continue
        levels, at = np.unique(np.concatenate([runs.born[i:j][some], runs.dies[i:j][some]]), return_inverse=True)
        change = np.zeros(len(levels), dtype=np.int64)
        np.add.at(change, at, np.concatenate([shared[some], -shared[some]]))
        hit = np.cumsum(change[::-1]) >= np.rint(gtc * (end - begin))
        thresholds.append(levels[::-1])
        changes.append(np.diff(hit.astype(np.int64), prepend=0))
    if not thresholds:
        return np.empty(0, runs.born.dtype), np.empty(0, np.int64)
    return np.concatenate(thresholds), np.concatenate(changes)


def _covers(covered: NDArray[np.int64], frames: _Frames, runs: _Runs, part: float) -> NDArray[np.bool_]:
    """Return of which runs events cover at least a part; ``covered`` as ``_covered`` returns it."""
    length = frames.times[runs.stop] - frames.times[runs.start]
    return np.asarray(covered[runs.stop] - covered[runs.start] >= np.rint(part * length))


def _accumulated(
    hits: tuple[NDArray[np.floating], NDArray[np.int64]], false: _Runs, crossing: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return true positives, false positives and weighted cross-triggers at every threshold, from the highest down.

    Args:
        hits: changes of the number of true positives; see ``_hit_changes``.
        false: the runs that are false positives.
        crossing: (num_runs,) their weight as cross-triggers.
    """
    thresholds, changes = hits
    one = np.ones(len(crossing), np.int64)
    at = np.concatenate([thresholds, false.born, false.dies])
    order = np.argsort(at, kind="stable")[::-1]
    levels = at[order]
    # Every run is dead at minus infinity, which is no threshold.
    last = np.flatnonzero(np.append(levels[1:] != levels[:-1], True)[: len(levels)] & (levels > -np.inf))
    tp, fp, crossed = (
        np.cumsum(np.concatenate(parts)[order])[last]
        for parts in (
            (changes, 0 * one, 0 * one),
            (0 * changes, one, -one),
            (0.0 * changes, crossing, -crossing),
        )
    )
    return tp, fp, crossed


def psds_from_scores(
    reference: Mapping[str, Sequence[Event]],
    scores: Mapping[str, tuple[ArrayLike, ArrayLike]],
    labels: Sequence[str],
    durations: Mapping[str, float],
    settings: PSDSSettings,
) -> PSDSResult:
    """Score framewise posteriors at all thresholds (see the module's conventions).

    Args:
        reference: file name -> true events; those of classes not in ``labels`` are left out.
        scores: file name -> posteriors (num_frames, num_classes) and boundaries of the frames (num_frames + 1,) in
            seconds, for every file. Any monotonic score may stand in for a posterior.
        labels: of the classes, in the order of the posteriors.
        durations: file name -> seconds, of every file.
        settings: ``PSDS1``, ``PSDS2`` or others.

    Raises:
        ValueError: posteriors that do not fit their boundaries or the labels, NaN posteriors, a file without posteriors
            or without a duration, or a duration that is none.
        TypeError: events that are no mapping from file to events, or a single text as ``labels``.
    """
    check_sides(reference, labels)
    if lacking := [file for file, events in reference.items() if events and file not in scores]:
        raise ValueError(
            f"{len(lacking)} files have reference events and no posteriors: {', '.join(map(repr, lacking[:5]))}"
            f"{nearest(lacking[0], scores)}"
        )
    # The files in the order of their frames: searches rely on it.
    files = {file: index for index, file in enumerate(dict.fromkeys((*scores, *durations, *reference)))}
    truth = _truth(reference, durations, labels, files)
    frames = _frames(scores, len(labels), files)
    ends = np.rint(truth.durations * _MICROSECONDS)
    longest = max((np.shape(given)[0] for given, _ in scores.values()), default=0)
    covered = {label: _covered(frames, truth.joined[label]) for label in truth.labels}
    points = {}
    for label in truth.labels:
        runs = _runs(frames.scores[:, labels.index(label)], longest)
        passed = _covers(covered[label], frames, runs, settings.dtc)
        hits = _hit_changes(truth.events[label], frames, runs, passed, settings.gtc)
        start = runs.start[~passed]
        false = runs[np.flatnonzero(~passed)[frames.times[start] < ends[frames.file[start]]]]
        crossing = np.zeros(len(false.start))
        for other, weight in zip(truth.labels, truth.crossing_weights(label, settings.alpha_ct).tolist(), strict=True):
            if weight:
                crossing += weight * _covers(covered[other], frames, false, settings.cttc)
        points[label] = truth.points(label, *_accumulated(hits, false, crossing))
    return _result(points, settings)
