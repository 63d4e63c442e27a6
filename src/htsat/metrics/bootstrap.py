"""Bootstrap intervals: how much a figure owes to which files happened to be in the test.

Files (clips) are drawn with replacement as often as there are files, and the middle 95 % of a figure over many such
resamples is its interval (Efron's percentile bootstrap). It says nothing of the luck of a training. A resample is a
vector of weights, how often each file was drawn: what adds up over files costs a matrix product, not a new evaluation.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from htsat.metrics.detection import FileCounts

Interval = tuple[float, float]

#: files times resamples that are held at once
_MAX_WEIGHTS = 1 << 22


def row_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of the numbers of each row; NaN where there are none."""
    counts = np.sum(~np.isnan(values), axis=1)
    return np.where(counts > 0, np.nansum(values, axis=1) / np.maximum(counts, 1), np.nan)


def _weights(count: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield how often each of ``count`` files is in each resample, (some, count), by no more memory than needed."""
    random = np.random.default_rng(seed)
    done = 0
    while done < resamples:
        rows = min(resamples - done, max(1, _MAX_WEIGHTS // count))
        drawn = random.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)
        done += rows


def bootstrap_intervals(
    count: int,
    resamples: int,
    seed: int,
    figures: Callable[[NDArray[np.float64]], Mapping[str, NDArray[np.float64]]],
) -> dict[str, Interval]:
    """Return the middle 95 % of figures over resamples of files.

    Args:
        count: of the files, at least 1.
        resamples: how many, at least 1.
        seed: of the resamples.
        figures: weights of the files, (some resamples, count) -> name -> (some resamples,) values; NaN where a
            resample allows none.

    Returns:
        Name -> (low, high); NaN where a figure is never defined.
    """
    parts = [figures(weights) for weights in _weights(count, resamples, seed)]
    intervals = {}
    for name in parts[0]:
        values = np.concatenate([part[name] for part in parts])
        values = values[~np.isnan(values)]
        # No interpolation: between a finite and an infinite d' there is nothing.
        low, high = np.quantile(values, (0.025, 0.975), method="nearest") if len(values) else (math.nan, math.nan)
        intervals[name] = (float(low), float(high))
    return intervals


def f1_intervals(counts: FileCounts, resamples: int, seed: int = 0) -> dict[str, Interval]:
    """Return the intervals of ``macro_f1`` and ``micro_f1`` of a detection metric.

    A class without a reference event in a resample is in no macro F1 of that resample.

    Args:
        counts: what the metric counted in each file; see ``htsat.metrics.detection.count_event_based`` and its like.
        resamples: how many; 0: no intervals.
        seed: of the resamples.

    Raises:
        ValueError: a negative number of resamples.
    """
    if resamples < 0:
        raise ValueError(f"expected 0 or more resamples, got {resamples}")
    if not resamples or not counts.files:
        return {}
    return bootstrap_intervals(len(counts.files), resamples, seed, lambda weights: _f1(counts, weights))


def f1_difference_intervals(
    counts: FileCounts, other: FileCounts, resamples: int, seed: int = 0
) -> dict[str, Interval]:
    """Return the intervals of how much higher ``macro_f1`` and ``micro_f1`` are than those of another system.

    Both are resampled together: what is hard in a file is hard for both, so that the interval of the difference is
    narrower than the intervals of the two make believe. One that does not hold 0 tells the better system.

    Args:
        counts: what a metric counted in each file.
        other: what it counted in the same files, of the other system.
        resamples: how many, at least 1.
        seed: of the resamples.

    Raises:
        ValueError: other files, none of them, or no resamples.
    """
    # Labels may differ: one that a single system told of has no reference, and is in no macro F1.
    if counts.files != other.files:
        raise ValueError("the counts are not of the same files")
    if resamples < 1 or not counts.files:
        raise ValueError(f"expected at least 1 resample of at least 1 file, got {resamples} of {len(counts.files)}")

    def figures(weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        mine, theirs = _f1(counts, weights), _f1(other, weights)
        return {name: mine[name] - theirs[name] for name in mine}

    return bootstrap_intervals(len(counts.files), resamples, seed, figures)


def _f1(counts: FileCounts, weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Return macro and micro F1 of each resample, whose weights of the files are one row."""
    by_file = counts.counts.reshape(len(counts.files), -1).astype(np.float64)
    # Each is one row per resample, one column per class.
    tp, fp, fn = np.moveaxis((weights @ by_file).reshape(len(weights), len(counts.labels), 3), 2, 0)
    f1 = 2 * tp / np.maximum(2 * tp + fp + fn, 1)
    hits, errors = tp.sum(axis=1), (fp + fn).sum(axis=1)
    return {
        "macro_f1": row_means(np.where(tp + fn > 0, f1, np.nan)),
        "micro_f1": np.where(hits + errors > 0, 2 * hits / np.maximum(2 * hits + errors, 1), np.nan),
    }
