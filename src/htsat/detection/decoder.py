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

from collections.abc import Sequence

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
