"""Values of a prediction: ``Event`` (what sounds from when to when) and ``Tag`` (what sounds in a clip)."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """A sound event.

    Attributes:
        event_label: what sounds.
        onset: start in seconds from the beginning of the recording, >= 0.
        offset: end in seconds, > onset.
        probability: in [0, 1]; how sure the model is (the largest framewise posterior inside the event).
    """

    event_label: str
    onset: float
    offset: float
    probability: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.onset) and math.isfinite(self.offset) and 0 <= self.onset < self.offset):
            raise ValueError(
                f"event {self.event_label!r}: expected 0 <= onset < offset in seconds, "
                f"got onset {self.onset} and offset {self.offset}"
            )
        if not 0 <= self.probability <= 1:
            raise ValueError(f"event {self.event_label!r}: probability {self.probability} is not in [0, 1]")

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.offset - self.onset


@dataclass(frozen=True)
class Tag:
    """A label of a whole clip with its probability in [0, 1]."""

    label: str
    probability: float
