"""The decoder against hand-worked cases and scipy's median filter."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.ndimage import median_filter

from htsat.config import DecodingConfig
from htsat.detection.decoder import decode_events, median_frames
from htsat.events import Event


def decode(column, config, step=1.0):
    """Decode one class named ``dog`` and return (onset, offset) pairs."""
    posteriors = np.array(column, dtype=np.float64)[:, None]
    return [(e.onset, e.offset) for e in decode_events(posteriors, np.arange(len(column) + 1) * step, ["dog"], config)]


def test_threshold_counts_when_exactly_reached():
    config = DecodingConfig(threshold=0.7)
    assert decode([0.0, 0.7, 0.69999, 0.9], config) == [(1, 2), (3, 4)]
    # float32(0.7) lies below float64(0.7); a float32 posterior is still exactly at the threshold.
    events = decode_events(np.array([[0.7]], dtype=np.float32), np.array([0.0, 1.0]), ["dog"], config)
    assert len(events) == 1


def test_all_and_no_frames():
    config = DecodingConfig()
    assert decode([1, 1, 1], config, step=0.3125) == [(0, 0.9375)]
    assert decode([0, 0, 0], config) == []
    assert decode([], config) == []
    assert decode_events(np.zeros((3, 0)), np.arange(4.0), [], config) == []


def test_hysteresis_extends_but_does_not_trigger():
    config = DecodingConfig(threshold=0.6, threshold_off=0.3)
    #        |--- event ----|         |no trigger|      |event|
    column = [0.3, 0.6, 0.4, 0.2, 0.5, 0.59, 0.3, 0.1, 0.9]
    assert decode(column, config) == [(0, 3), (8, 9)]


def test_merge_before_drop():
    # Two events of 1 s with a gap of 1 s: merged they last 3 s, alone both would be dropped.
    column = [0, 1, 0, 1, 0, 0, 0, 1, 0]
    assert decode(column, DecodingConfig(min_gap=1.5, min_duration=2)) == [(1, 4)]
    assert decode(column, DecodingConfig(min_duration=2)) == []


def test_gap_and_duration_at_their_limit_stay():
    # Rounding of frame boundaries must not decide.
    assert 0.1 * 4 - 0.1 * 3 < 0.1
    assert len(decode([1, 1, 1, 0, 1], DecodingConfig(min_gap=0.1), step=0.1)) == 2
    assert len(decode([0, 0, 0, 1, 0], DecodingConfig(min_duration=0.1), step=0.1)) == 1
    assert decode([1, 0, 1, 0, 0, 1], DecodingConfig(min_gap=2)) == [(0, 3), (5, 6)]
    assert decode([1, 0, 1, 0, 1], DecodingConfig(min_gap=1.01)) == [(0, 5)]


def test_median_filter_removes_spikes_and_fills_holes():
    config = DecodingConfig(median_seconds=3)
    assert decode([0, 1, 0, 0, 1, 1, 0, 1, 1, 0], config) == [(4, 9)]


def test_median_length():
    assert [median_frames(s, 1.0) for s in (0, 0.9, 1, 1.9, 2, 3, 3.9, 4)] == [1, 1, 1, 1, 3, 3, 3, 5]
    assert median_frames(0.9375, 0.3125) == 3
    assert median_frames(0.3, 0.1) == 3
    assert median_frames(0.2, 0.1) == 3


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.6, 0.75, 1.0])),
    st.integers(0, 30),
    st.sampled_from([0.25, 0.5, 0.6, 1.0]),
    st.sampled_from([None, 0.0, 0.25]),
)
def test_same_as_filtering_first(column, half, threshold, threshold_off):
    """The running count equals scipy's median filter followed by a frame-by-frame state machine."""
    config = DecodingConfig(threshold=threshold, threshold_off=threshold_off, median_seconds=min(60, 2 * half + 1))
    length = median_frames(config.median_seconds, 1.0)
    filtered = median_filter(column, size=length, mode="nearest")
    low = threshold if threshold_off is None else threshold_off
    expected, start = [], None
    for frame in range(len(column) + 1):
        if frame < len(column) and filtered[frame] >= np.float32(low):
            start = frame if start is None else start
        elif start is not None:
            if filtered[start:frame].max() >= np.float32(threshold):
                expected.append((start, frame, float(column[start:frame].max())))
            start = None
    events = decode_events(column[:, None], np.arange(len(column) + 1.0), ["dog"], config)
    assert [(e.onset, e.offset, e.probability) for e in events] == expected


def test_probability_is_unfiltered_and_clipped():
    posteriors = np.array([0.6, 0.95, 0.6, 0.0, 0.0, 1.0000001, 1.0, 1.0])[:, None]
    events = decode_events(posteriors, np.arange(9.0), ["dog"], DecodingConfig(median_seconds=3))
    assert [(e.onset, e.probability) for e in events] == [(0, 0.95), (5, 1.0)]


def test_order_and_exceptions_per_label():
    posteriors = np.array([[0.6, 0.6, 0.0], [0.0, 0.6, 0.0], [0.6, 0.0, 0.3]])
    config = DecodingConfig(per_class={"cat": {"threshold": 0.3}, "dog": {"min_duration": 2.0}})
    # "zebra" comes before "ant" in the labels, hence also at the same onset.
    events = decode_events(posteriors, np.array([0.0, 1.0, 2.0, 2.5]), ["zebra", "ant", "cat"], config)
    assert events == [
        Event("zebra", 0, 1, 0.6),
        Event("ant", 0, 2, 0.6),
        Event("zebra", 2, 2.5, 0.6),
        Event("cat", 2, 2.5, 0.3),
    ]
    assert decode_events(posteriors[:, :1], np.arange(4.0), ["dog"], config) == []
    assert all(type(v) is float for e in events for v in (e.onset, e.offset, e.probability))


@pytest.mark.parametrize(
    ("posteriors", "boundaries", "labels", "words"),
    [
        (np.zeros(3), np.arange(4.0), ["a"], "num_frames, num_classes"),
        (np.zeros((3, 1), dtype=int), np.arange(4.0), ["a"], "int64"),
        (np.zeros((3, 2)), np.arange(4.0), ["a"], "2 classes"),
        (np.zeros((3, 1)), np.arange(3.0), ["a"], "4 boundaries"),
        (np.zeros((3, 1)), np.array([0.0, 1, 1, 2]), ["a"], "increasing"),
        (np.zeros((3, 1)), np.arange(4.0) - 1, ["a"], "before the beginning"),
        (np.array([[0.1], [np.nan]]), np.arange(3.0), ["a"], "NaN"),
    ],
)
def test_refuses(posteriors, boundaries, labels, words):
    with pytest.raises(ValueError, match=words):
        decode_events(posteriors, boundaries, labels, DecodingConfig())


def test_input_is_not_changed_and_many_frames_fit():
    random = np.random.default_rng(0)
    posteriors = random.random((115_200, 12), dtype=np.float32)
    before = posteriors.copy()
    boundaries = np.arange(115_201) * 0.3125
    config = DecodingConfig(threshold=0.9, threshold_off=0.2, median_seconds=60, min_gap=1, min_duration=0.5)
    decode_events(posteriors, boundaries, [str(i) for i in range(12)], config)
    assert np.array_equal(posteriors, before)
