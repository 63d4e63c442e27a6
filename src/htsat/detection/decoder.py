"""From framewise posteriors to events: the one decoder, offline and live.

Each class is decoded on its own, in this order:

1. median filter over time (``median_seconds``),
2. hysteresis: a region of frames at or above ``threshold_off`` is an event where at least one
   of its frames is at or above ``threshold``,
3. events closer than ``min_gap`` are merged,
4. events shorter than ``min_duration`` are dropped.

A posterior exactly at a threshold counts. Gaps and durations exactly at their limit stay
as they are (no merge, no drop); a nanosecond of tolerance keeps the rounding of frame
boundaries out of that decision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from htsat.config import ClassDecoding, DecodingConfig
from htsat.events import Event
from htsat.grid import FrameGrid

# Frame boundaries are multiples of a step that float64 seldom holds exactly.
_TOLERANCE = 1e-9


def median_frames(median_seconds: float, frame_seconds: float) -> int:
    """Return the odd number of frames nearest to ``median_seconds``, at least 1 (the longer one on a tie)."""
    return 2 * int(np.floor(median_seconds / frame_seconds / 2 + _TOLERANCE)) + 1


def median_at_least(posteriors: NDArray[np.floating], threshold: float, length: int) -> NDArray[np.bool_]:
    """Return where the running median of ``posteriors`` is at or above ``threshold``.

    The median of an odd number of values reaches a threshold exactly where the majority of
    them does, so a running count replaces the filter: one pass whatever the length.

    Args:
        posteriors: (num_frames,).
        threshold: in [0, 1].
        length: odd number of frames; at the edges the first and the last frame are repeated.

    Returns:
        (num_frames,) bool.
    """
    active: NDArray[np.bool_] = posteriors >= threshold
    if length == 1:
        return active
    half = length // 2
    padded = np.concatenate((np.full(half, active[0]), active, np.full(half, active[-1])))
    counts = np.concatenate(([0], np.cumsum(padded, dtype=np.int32)))
    majority: NDArray[np.bool_] = counts[length:] - counts[:-length] > half
    return majority


def _regions(
    posteriors: NDArray[np.floating], boundaries: NDArray[np.float64], settings: ClassDecoding, length: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return first and one-past-last frame of each event of one class, in time order."""
    on = median_at_least(posteriors, settings.threshold, length)
    none = np.empty(0, dtype=np.intp)
    if not on.any():
        return none, none
    if settings.threshold_off is None or settings.threshold_off == settings.threshold:
        active = on
    else:
        active = median_at_least(posteriors, settings.threshold_off, length)
    starts, stops = triggered(runs(on)[0], *runs(active))
    return joined(starts, stops, boundaries, settings.min_gap, settings.min_duration)


def runs(active: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return first and one-past-last frame of each run of active frames, in time order."""
    edges = np.flatnonzero(np.diff(active, prepend=False, append=False))
    return edges[::2], edges[1::2]


def triggered(
    on_starts: NDArray[np.intp], starts: NDArray[np.intp], stops: NDArray[np.intp]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return those of the regions in which a run of the upper threshold starts; such runs never leave a region."""
    kept = np.searchsorted(on_starts, stops) > np.searchsorted(on_starts, starts)
    return starts[kept], stops[kept]


def joined(
    starts: NDArray[np.intp],
    stops: NDArray[np.intp],
    boundaries: NDArray[np.float64],
    min_gap: float,
    min_duration: float,
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Merge regions with smaller gaps than ``min_gap`` between them, then drop those shorter than ``min_duration``."""
    if min_gap > 0 and len(starts):
        apart = boundaries[starts[1:]] - boundaries[stops[:-1]] >= min_gap - _TOLERANCE
        starts, stops = starts[np.append(True, apart)], stops[np.append(apart, True)]
    if min_duration > 0:
        long = boundaries[stops] - boundaries[starts] >= min_duration - _TOLERANCE
        starts, stops = starts[long], stops[long]
    return starts, stops


def decode_events(
    posteriors: NDArray[np.floating],
    boundaries: NDArray[np.float64],
    labels: Sequence[str],
    config: DecodingConfig,
) -> list[Event]:
    """Turn framewise posteriors into events.

    Memory beyond the input is a few vectors of ``num_frames``; classes that never reach their
    threshold cost nothing but the search for their largest posterior.

    Args:
        posteriors: (num_frames, num_classes), probabilities in [0, 1].
        boundaries: (num_frames + 1,) seconds from the beginning of the recording, >= 0 and strictly
            increasing; frame ``i`` covers ``boundaries[i]`` to ``boundaries[i + 1]``.
        labels: one per class.
        config: thresholds, filter and durations, with exceptions per label. The median filter is the odd
            number of frames nearest to ``median_seconds``; the first and last frame are repeated at the edges.

    Returns:
        Events by onset, then in the order of ``labels``. ``probability`` is the largest posterior
        inside the event before the median filter, clipped to [0, 1].

    Raises:
        ValueError: shapes that do not fit each other, boundaries that do not increase, or a
            posterior that is not a number.
    """
    posteriors = np.asarray(posteriors)
    if posteriors.ndim != 2:
        raise ValueError(f"expected posteriors of shape (num_frames, num_classes), got shape {posteriors.shape}")
    if not np.issubdtype(posteriors.dtype, np.floating):
        raise ValueError(f"expected posteriors as floating-point probabilities, got {posteriors.dtype}")
    num_frames, num_classes = posteriors.shape
    if num_classes != len(labels):
        raise ValueError(f"posteriors have {num_classes} classes but there are {len(labels)} labels")
    grid = FrameGrid(boundaries)
    if grid.num_frames != num_frames:
        raise ValueError(
            f"expected {num_frames + 1} boundaries for {num_frames} frames, got {grid.num_frames + 1}; "
            "frame i covers boundaries[i] to boundaries[i + 1]"
        )
    if grid.boundaries[0] < 0:
        raise ValueError(f"boundaries start at {grid.boundaries[0]:g} s, before the beginning of the recording")
    if num_frames == 0 or num_classes == 0:
        return []

    peaks = posteriors.max(axis=0)
    events: list[Event] = []
    for index, label in enumerate(labels):
        if np.isnan(peaks[index]):
            raise ValueError(f"posteriors of {label!r} contain values that are not numbers (NaN)")
        settings = config.for_label(label) if label in config.per_class else config
        if peaks[index] < settings.threshold:
            continue  # A median never exceeds the largest value, so no filter can bring an event up.
        column = np.ascontiguousarray(posteriors[:, index])
        length = median_frames(settings.median_seconds, grid.frame_seconds)
        starts, stops = _regions(column, grid.boundaries, settings, length)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            events.append(
                Event(
                    label,
                    float(grid.boundaries[start]),
                    float(grid.boundaries[stop]),
                    min(1.0, max(0.0, float(column[start:stop].max()))),
                )
            )
    # The sort is stable, so events with the same onset stay in the order of the labels.
    events.sort(key=lambda event: event.onset)
    return events


@dataclass(frozen=True)
class LiveEvent:
    """A change of one event of a stream.

    Attributes:
        id: counts the events of a stream from 1 on, by when they were opened.
        state: ``open`` once, ``update`` any number of times while it goes on, ``close`` once.
        event: its offset and probability are those so far, and final where it is closed.
        sounding: whether it goes on at the end of what is known. Where it does not, ``event.offset`` is its end, unless
            it begins again before the gap is long enough to close it.
    """

    id: int
    state: Literal["open", "update", "close"]
    event: Event
    sounding: bool


@dataclass
class _Track:
    """What is open in one class. Frames are counted from the beginning of the recording."""

    region: int | None = None  # first frame of the active frames that have not ended
    peak: float = 0.0  # largest posterior since then
    start: int | None = None  # first frame of the event that has not closed
    stop: int = 0  # one past its last frame so far
    event_peak: float = 0.0  # its largest posterior
    gap_peak: float = 0.0  # the largest behind ``stop``
    joined: bool = False  # whether the active frames belong to the event
    id: int | None = None  # of the event, if it was opened
    told: tuple[Event, bool] | None = None  # what was said of it last, and whether it sounded


class LiveDecoder:
    """Decodes posteriors that come bit by bit: the events are those of ``decode_events`` on all of them.

    An event is opened as soon as it is certain to be one (it reached its threshold and its least duration) and closed
    as soon as nothing can lengthen it: half of the median filter, and the gap that would be bridged, after its end.

    Args:
        labels: one per class.
        config: thresholds, filter and durations.
        frame_seconds: length of a frame; frame ``i`` begins at ``i * frame_seconds``.
        start: seconds at which the first frame begins; added to the times of the events that are told.
        next_id: number of the first event that is opened.
    """

    def __init__(
        self, labels: Sequence[str], config: DecodingConfig, frame_seconds: float, *, start: float = 0, next_id: int = 1
    ) -> None:
        self._labels, self._frame_seconds, self._start = list(labels), frame_seconds, start
        self.next_id = next_id
        self._settings = [config.for_label(label) for label in labels]
        halves: dict[int, list[int]] = {}
        for index, settings in enumerate(self._settings):
            halves.setdefault(median_frames(settings.median_seconds, frame_seconds) // 2, []).append(index)
        # Classes with the same median filter: half of it in frames, which they are, and how many frames are decided.
        self._groups = {half: np.array(indices) for half, indices in halves.items()}
        self._decided = dict.fromkeys(self._groups, 0)
        # As the posteriors, so that one exactly at a threshold counts here and in ``decode_events``.
        self._on = np.array([s.threshold for s in self._settings], dtype=np.float32)
        self._off = np.array(
            [s.threshold if s.threshold_off is None else s.threshold_off for s in self._settings], dtype=np.float32
        )
        self._tracks: dict[int, _Track] = {}
        self._rows = np.empty((0, len(self._labels)), dtype=np.float32)  # those that are not decided, and half a filter
        self._first = 0  # the frame of the first of them
        self._duration: float | None = None
        self.num_frames = 0
        """how many came so far"""

    @property
    def delay_seconds(self) -> float:
        """How long after its end an event is closed, at most: half of the median filter, and the gap."""
        delays = [
            half * self._frame_seconds + self._settings[index].min_gap
            for half, classes in self._groups.items()
            for index in classes.tolist()
        ]
        return max(delays, default=0.0)

    @property
    def open_events(self) -> int:
        """How many events are open."""
        return sum(track.id is not None for track in self._tracks.values())

    def push(self, posteriors: NDArray[np.floating]) -> list[LiveEvent]:
        """Take the next frames, (any, num_classes) in [0, 1], and return what changed, by onset and label.

        Raises:
            ValueError: another number of classes, a posterior that is not a number, or ``finish`` was called before.
        """
        if self._duration is not None:
            raise ValueError("the recording is finished; use a new LiveDecoder for another one")
        self._add(posteriors)
        return self._decide()

    def finish(self, posteriors: NDArray[np.floating], duration: float) -> list[LiveEvent]:
        """Close what is open and return what changed.

        Args:
            posteriors: of the last frames; as for ``push``.
            duration: seconds of the recording, the end of its last frame.

        Raises:
            ValueError: as for ``push``.
        """
        if self._duration is not None:
            raise ValueError("the recording is finished already")
        self._add(posteriors)
        self._duration = duration
        return self._decide()

    def _add(self, posteriors: NDArray[np.floating]) -> None:
        rows = np.asarray(posteriors, dtype=np.float32)
        if rows.ndim != 2 or rows.shape[1] != len(self._labels):
            raise ValueError(f"expected posteriors of shape (any, {len(self._labels)}), got {rows.shape}")
        if np.isnan(rows).any():
            raise ValueError("posteriors contain values that are not numbers (NaN)")
        self._rows = np.concatenate((self._rows, rows))
        self.num_frames += len(rows)

    def _boundary(self, frame: int) -> float:
        """Return the seconds at which a frame begins."""
        if self._duration is not None and frame >= self.num_frames:
            return self._duration
        return frame * self._frame_seconds

    def _decide(self) -> list[LiveEvent]:
        """Decide all frames that the median filter allows."""
        over = self._duration is not None
        changed: dict[int, list[_Track]] = {}
        for half, classes in self._groups.items():
            begin, end = self._decided[half], self.num_frames if over else self.num_frames - half
            if end > begin:
                around = np.clip(np.arange(begin - half, end + half), 0, self.num_frames - 1) - self._first
                rows = self._rows[around][:, classes]
                on, active = _majority(rows >= self._on[classes], half), _majority(rows >= self._off[classes], half)
                self._decided[half] = end
                alive = [k for k, index in enumerate(classes.tolist()) if index in self._tracks or active[:, k].any()]
            else:
                alive = [k for k, index in enumerate(classes.tolist()) if over and index in self._tracks]
                on = active = np.empty((0, len(classes)), dtype=np.bool_)
                rows = np.empty((2 * half, len(classes)), dtype=np.float32)
            for k in alive:
                heard = rows[half : len(rows) - half, k].tolist()
                changed[int(classes[k])] = self._advance(
                    int(classes[k]), begin, list(zip(on[:, k].tolist(), active[:, k].tolist(), heard, strict=True))
                )
        keep = max(0, min((done - half for half, done in self._decided.items()), default=self.num_frames))
        keep = min(keep, max(self.num_frames - 1, 0))
        self._rows = self._rows[keep - self._first :].copy()
        self._first = keep
        return self._told(changed)

    def _advance(self, index: int, begin: int, frames: list[tuple[bool, bool, float]]) -> list[_Track]:
        """Go on with one class: whether each frame is above the upper and the lower threshold, and its posterior.

        Returns:
            the events that were closed or dropped.
        """
        settings = self._settings[index]
        track = self._tracks.pop(index, None) or _Track()
        over: list[_Track] = []

        def end_of_event() -> None:
            nonlocal track
            over.append(track)
            track = _Track(region=track.region, peak=track.peak)

        for frame, (on, active, posterior) in enumerate(frames, begin):
            if active:
                track.peak = max(track.peak, posterior) if track.region is not None else posterior
                if track.region is None:
                    track.region = frame
                if on and not track.joined:
                    if track.start is None:
                        track.start, track.event_peak, track.gap_peak = track.region, 0.0, 0.0
                    track.event_peak = max(track.event_peak, track.gap_peak, track.peak)
                    track.joined, track.gap_peak = True, 0.0
                if track.joined:
                    track.stop, track.event_peak = frame + 1, max(track.event_peak, posterior)
            else:
                lost = posterior if track.region is None or track.joined else max(track.peak, posterior)
                track.gap_peak = max(track.gap_peak, lost)
                track.region, track.joined = None, False
            if track.start is not None and not track.joined:
                # Active frames that may still belong to an event began with the gap that there is; others begin later.
                next_start = frame + 1 if track.region is None else track.region
                gap = self._boundary(next_start) - self._boundary(track.stop)
                if gap >= settings.min_gap - _TOLERANCE:
                    end_of_event()
            self._open(track, settings)
        if self._duration is not None:
            if track.start is not None:
                self._open(track, settings)
                end_of_event()
        elif track.start is not None or track.region is not None:
            self._tracks[index] = track
        return [*over, track]

    def _open(self, track: _Track, settings: ClassDecoding) -> None:
        """Mark an event that is long enough."""
        if track.start is not None and track.id is None:
            seconds = self._boundary(track.stop) - self._boundary(track.start)
            if settings.min_duration <= 0 or seconds >= settings.min_duration - _TOLERANCE:
                track.id = 0  # numbered when it is told

    def _told(self, changed: Mapping[int, list[_Track]]) -> list[LiveEvent]:
        """Return what changed, new events numbered by onset and label."""
        found = [
            (index, track, track is not tracks[-1])
            for index, tracks in changed.items()
            for track in tracks
            if track.id is not None and track.start is not None
        ]
        found.sort(key=lambda item: (item[1].start, item[0]))
        told = []
        for index, track, closed in found:
            assert track.start is not None
            event = Event(
                self._labels[index],
                self._start + self._boundary(track.start),
                self._start + self._boundary(track.stop),
                min(1.0, max(0.0, track.event_peak)),
            )
            sounding = track.joined and not closed
            if not track.id:
                track.id, self.next_id = self.next_id, self.next_id + 1
                told.append(LiveEvent(track.id, "open", event, sounding))
            elif not closed and (event, sounding) != track.told:
                told.append(LiveEvent(track.id, "update", event, sounding))
            if closed:
                told.append(LiveEvent(track.id, "close", event, sounding))
            track.told = event, sounding
        return told


def _majority(active: NDArray[np.bool_], half: int) -> NDArray[np.bool_]:
    """Return where most of 2 * half + 1 frames are active, (num_frames - 2 * half, num_classes)."""
    if not half:
        return active
    counts = np.concatenate((np.zeros((1, active.shape[1]), np.int32), np.cumsum(active, axis=0, dtype=np.int32)))
    majority: NDArray[np.bool_] = counts[2 * half + 1 :] - counts[: -2 * half - 1] > half
    return majority
