"""The one owner of the relation between output frames and seconds."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class FrameGrid:
    """Time axis of a framewise output: frame ``i`` covers ``boundaries[i]`` to ``boundaries[i + 1]``.

    Attributes:
        boundaries: (num_frames + 1,) float64, seconds, strictly increasing.
    """

    boundaries: NDArray[np.float64]

    def __post_init__(self) -> None:
        boundaries = np.asarray(self.boundaries, dtype=np.float64)
        if boundaries.ndim != 1 or len(boundaries) < 1:
            raise ValueError(f"boundaries must be a vector of num_frames + 1 seconds, got shape {boundaries.shape}")
        if not np.all(np.isfinite(boundaries)) or np.any(np.diff(boundaries) <= 0):
            raise ValueError("boundaries must be finite and strictly increasing")
        object.__setattr__(self, "boundaries", boundaries)

    @classmethod
    def uniform(cls, frame_seconds: float, duration: float) -> "FrameGrid":
        """Frames of ``frame_seconds`` covering 0 to ``duration``; the last one is cut at ``duration``."""
        num_frames = max(1, int(np.ceil(duration / frame_seconds - 1e-6)))
        boundaries = np.arange(num_frames + 1, dtype=np.float64) * np.float64(frame_seconds)
        boundaries[-1] = duration
        return cls(boundaries)

    @property
    def num_frames(self) -> int:
        """Number of frames."""
        return len(self.boundaries) - 1

    @property
    def duration(self) -> float:
        """End of the last frame in seconds."""
        return float(self.boundaries[-1])

    @property
    def frame_seconds(self) -> float:
        """Length of the longest frame in seconds (all but the last frame of a recording are equal)."""
        return float(np.max(np.diff(self.boundaries))) if self.num_frames else 0.0
