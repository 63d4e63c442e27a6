"""Which events overlap, and by how much: what the intersection-based metrics and PSDS have in common.

The events of a class lie in one table over all files, so that a thousand files cost a few array operations. Times are
compared as they are; only the search for candidates lays the files one after another on one line of time.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from htsat.events import Event


@dataclass(frozen=True, eq=False)
class Spans:
    """The events of one class in all files, by file, then by onset.

    Attributes:
        file: (num_events,) number of the file.
        onset: (num_events,) seconds.
        offset: (num_events,) seconds.
    """

    file: NDArray[np.int64]
    onset: NDArray[np.float64]
    offset: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "Spans":
        return Spans(self.file[chosen], self.onset[chosen], self.offset[chosen])

    @property
    def length(self) -> NDArray[np.float64]:
        """(num_events,) seconds."""
        return self.offset - self.onset


NO_SPANS = Spans(np.empty(0, np.int64), np.empty(0), np.empty(0))


def check_sides(events: object, labels: object) -> None:
    """Refuse what is easily mistaken for events by file, and for a collection of labels.

    Raises:
        TypeError: ``events`` is no mapping, or ``labels`` a single text.
    """
    if not isinstance(events, Mapping):
        raise TypeError(f"expected a mapping from file name to events, got {type(events).__name__}")
    if isinstance(labels, str):
        raise TypeError(f"expected a collection of labels, got the single text {labels!r}")


def spans_by_label(
    events: Mapping[str, Sequence[Event]], labels: Collection[str] | None, files: Mapping[str, int]
) -> dict[str, Spans]:
    """Return the events of each class that occurs.

    Args:
        events: file name -> events, in any order.
        labels: the classes to take; None: all.
        files: file name -> number of the file.

    Raises:
        TypeError: ``events`` is no mapping, or ``labels`` a single text.
    """
    check_sides(events, labels)
    wanted = None if labels is None else set(labels)
    rows: defaultdict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for file, file_events in events.items():
        for event in file_events:
            if wanted is None or event.event_label in wanted:
                rows[event.event_label].append((files[file], event.onset, event.offset))
    result = {}
    for label, found in rows.items():
        found.sort()
        file_numbers, onsets, offsets = zip(*found, strict=True)
        result[label] = Spans(np.array(file_numbers, np.int64), np.array(onsets, float), np.array(offsets, float))
    return result


def joined(spans: Spans) -> Spans:
    """Join events that overlap, so that no second is covered twice."""
    if len(spans) < 2:
        return spans
    start = spans.file * (spans.offset.max() + 1)
    ends = np.maximum.accumulate(start + spans.offset)
    # Touching events may stay apart: joining them would only change rounding.
    first = np.flatnonzero(np.append(True, (start + spans.onset)[1:] >= ends[:-1]))
    return Spans(spans.file[first], spans.onset[first], np.maximum.reduceat(spans.offset, first))


def overlaps(spans: Spans, others: Spans) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return every pair of events of the same file that overlap.

    Args:
        spans: may overlap each other.
        others: must not; see ``joined``.

    Returns:
        Index into ``spans``, index into ``others``, and the seconds that they share (above 0), of each pair.
    """
    if not len(spans) or not len(others):
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    stride = max(spans.offset.max(), others.offset.max()) + 1
    # What the line rounds away may hide an overlap: look a little further, the exact comparison comes below.
    room = 4 * np.spacing(stride * (max(spans.file[-1], others.file[-1]) + 1))
    first = np.searchsorted(others.file * stride + others.offset, spans.file * stride + spans.onset - room)
    stop = np.searchsorted(others.file * stride + others.onset, spans.file * stride + spans.offset + room)
    count = np.maximum(stop - first, 0)
    i = np.repeat(np.arange(len(spans)), count)
    j = np.arange(len(i)) + np.repeat(first - (np.cumsum(count) - count), count)
    shared = np.minimum(spans.offset[i], others.offset[j]) - np.maximum(spans.onset[i], others.onset[j])
    kept = shared > 0
    return i[kept], j[kept], shared[kept]


def coverage(spans: Spans, others: Spans) -> NDArray[np.float64]:
    """Return which part of each of ``spans`` the ``others`` cover together, in [0, 1]; their overlaps count once."""
    i, _, shared = overlaps(spans, joined(others))
    # Sum of ratios, not ratio of sums: ties at a criterion then fall as in psds_eval.
    return np.bincount(i, weights=shared / spans.length[i], minlength=len(spans)).astype(np.float64)
