"""FrameGrid: frames and seconds, by hand-worked cases and invariants."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from htsat.grid import FrameGrid


def test_uniform_grid_of_a_whole_chunk() -> None:
    grid = FrameGrid.uniform(0.3125, 10.0)
    assert grid.num_frames == 32
    assert grid.duration == 10.0
    assert grid.frame_seconds == 0.3125
    np.testing.assert_array_equal(grid.boundaries, np.arange(33) * 0.3125)


def test_last_frame_is_cut_at_the_end_of_the_recording() -> None:
    grid = FrameGrid.uniform(0.3125, 0.7)
    np.testing.assert_allclose(grid.boundaries, [0.0, 0.3125, 0.625, 0.7])
    assert grid.frame_seconds == 0.3125


def test_a_recording_shorter_than_a_frame_has_one_frame() -> None:
    np.testing.assert_array_equal(FrameGrid.uniform(0.3125, 0.001).boundaries, [0.0, 0.001])


def test_rounding_of_the_duration_makes_no_sliver_at_the_end() -> None:
    """0.1 + 0.2 is a little more than 0.3: three frames of 0.1 s, no fourth one of 1e-17 s."""
    grid = FrameGrid.uniform(0.1, 0.1 + 0.2)
    assert grid.num_frames == 3
    assert grid.duration == 0.1 + 0.2


def test_a_grid_may_start_after_zero_and_have_uneven_frames() -> None:
    grid = FrameGrid(np.array([1.0, 1.5, 3.0]))
    assert (grid.num_frames, grid.duration, grid.frame_seconds) == (2, 3.0, 1.5)


def test_a_grid_without_frames() -> None:
    grid = FrameGrid(np.array([0.0]))
    assert (grid.num_frames, grid.duration, grid.frame_seconds) == (0, 0.0, 0.0)


def test_boundaries_become_float64() -> None:
    assert FrameGrid([0, 1, 2]).boundaries.dtype == np.float64  # type: ignore[arg-type]


def test_a_grid_cannot_be_reassigned() -> None:
    grid = FrameGrid.uniform(1.0, 2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.boundaries = np.zeros(3)  # type: ignore[misc]


@pytest.mark.parametrize("boundaries", [np.zeros((2, 2)), np.zeros(0), np.float64(1.0)])
def test_boundaries_that_are_no_vector_are_refused(boundaries: np.ndarray) -> None:
    with pytest.raises(ValueError, match="vector of num_frames \\+ 1"):
        FrameGrid(boundaries)


@pytest.mark.parametrize("boundaries", [[0, 1, 1], [0, 2, 1], [0, np.nan, 1], [0, np.inf]])
def test_boundaries_that_do_not_increase_are_refused(boundaries: list[float]) -> None:
    with pytest.raises(ValueError, match="finite and strictly increasing"):
        FrameGrid(np.array(boundaries))


@given(
    frame_seconds=st.floats(min_value=0.001, max_value=2.0),
    duration=st.floats(min_value=0.001, max_value=100.0),
)
def test_uniform_grids_cover_the_recording_and_no_more(frame_seconds: float, duration: float) -> None:
    grid = FrameGrid.uniform(frame_seconds, duration)
    assert grid.boundaries[0] == 0.0
    assert grid.duration == duration
    assert np.all(np.diff(grid.boundaries) > 0)
    assert abs(grid.num_frames - duration / frame_seconds) < 1 + 1e-5
    inner = np.diff(grid.boundaries)[:-1]
    np.testing.assert_allclose(inner, frame_seconds, rtol=1e-6)
    assert np.diff(grid.boundaries)[-1] <= frame_seconds * (1 + 2e-6) + 1e-12
