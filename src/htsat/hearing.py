"""How a model hears a recording: chunks in, posteriors on one time axis out.

What recordings (``htsat.predict``) and streams (``htsat.live``) have in common. Here is the package's only sigmoid.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from htsat.audio.chunk import Chunk, Chunker, Stitcher, num_tokens
from htsat.config import CheckpointConfig, LogitCalibration
from htsat.errors import AudioError
from htsat.labels import counted_classes, heard_labels

Array = NDArray[np.float32]

#: largest magnitude of a sample: far above 32-bit integers taken for floats, far below what overflows in a spectrum
_MAX_SAMPLE = 1e12
#: frames that are computed together where all would double the memory
_ROWS_AT_ONCE = 4096


def heard_chunks(blocks: Iterable[Array], config: CheckpointConfig) -> Iterator[Chunk]:
    """Cut a stream of samples into the chunks that a model hears; see ``htsat.audio.chunk``.

    Of a recording heard at native size there is one, with as many samples as that takes.
    """
    for chunk in chunker_of(config).stream(blocks):
        yield at_native_size(chunk, config)


def at_native_size(chunk: Chunk, config: CheckpointConfig) -> Chunk:
    """Return a chunk with as many samples as are heard: fewer of a recording heard at native size."""
    if config.inference.short != "native" or chunk.start_token:
        return chunk
    return dataclasses.replace(chunk, samples=chunk.samples[: config.native_samples(chunk.length)])


def chunker_of(config: CheckpointConfig) -> Chunker:
    """Return what cuts a recording into the chunks that a model hears, but for those of native size."""
    return Chunker(
        config.heard_samples,
        config.heard_tokens,
        config.hop_tokens,
        "tile" if config.inference.short == "tile" else "pad",
        config.inference.shifts,
        config.lookahead_tokens,
    )


class Framewise:
    """Makes the framewise posteriors of a recording of the frame logits of its chunks, in the order they come.

    Chunks that are heard ``shifts`` times answer for tokens that begin at every part of a token. A token says what
    sounds around its middle: each of the finer frames gets what the token says that has its middle there, or the mean
    of the two tokens whose middles are nearest on both sides. That keeps edges as steep as the network makes them; the
    mean of all tokens that cover a frame would smooth them once more.

    Args:
        config: of the model.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self._config = config
        self._counted = counted_classes(config)
        self._shifts = config.inference.shifts
        num_classes = len(heard_labels(config))
        # Rows are tokens by when they begin, a row for each part of a token. The first rows begin before the recording.
        self._stitcher = Stitcher(num_classes, config.heard_frames)
        self._rows = np.empty((config.heard_tokens, self._shifts, num_classes), dtype=np.float32)
        self._heard = 0  # rows that the network has answered for

    def add(self, chunk: Chunk, logits: Array) -> None:
        """Add the (num_tokens, num_classes) frame logits of the next chunk that ``heard_chunks`` gave."""
        posteriors = frame_posteriors(logits, self._config)
        if self._counted is not None:
            posteriors = self._counted(posteriors)
        if chunk.answers is not None:
            first = chunk.answers.start - chunk.start_token
            self._stitcher.extend(posteriors[first : first + len(chunk.answers)])
            self._heard += len(chunk.answers)
            return
        self._rows[:, self._shifts - 1 - chunk.shift] = posteriors
        if not chunk.shift:  # the last one of its chunk
            self._stitcher.add(
                chunk.start_token * self._shifts, self._rows.reshape(self._config.heard_frames, self._rows.shape[2])
            )
            self._heard = (chunk.start_token + len(logits)) * self._shifts

    def take(self) -> Array:
        """Return those framewise posteriors that are final and were not taken before, (any, num_classes).

        Not of chunks that are heard several times (``shifts``).
        """
        return self._stitcher.take()

    def finish(self, num_samples: int) -> Array:
        """Return the framewise posteriors of a recording of ``num_samples``, (num_frames, num_classes).

        Without those that were taken.
        """
        num_frames = num_tokens(num_samples, self._config.heard_samples, self._config.heard_frames)
        rows = self._stitcher.finish(max(num_frames, min(self._heard, num_frames + self._shifts // 2)))
        return rows if self._shifts == 1 else centred(rows, num_frames, self._shifts)


def centred(rows: Array, num_frames: int, shifts: int) -> Array:
    """Return for each frame what the tokens say that have their middle there, (num_frames, num_classes).

    Args:
        rows: (num_rows, num_classes), at least ``num_frames`` rows, which are overwritten: row ``i`` is of the token of
            ``shifts`` frames that begins with frame ``i - shifts + 1``. The last one stands for those that are missing.
        num_frames: how many frames there are.
        shifts: frames of a token; an even number of them has its middle between two frames.
    """
    last = len(rows) - 1
    for start in range(0, num_frames, _ROWS_AT_ONCE):  # in place: there may be as many rows as memory holds
        frames = np.arange(start, min(start + _ROWS_AT_ONCE, num_frames))
        before, after = (rows[np.minimum(frames + to_middle, last)] for to_middle in ((shifts - 1) // 2, shifts // 2))
        rows[start : start + len(frames)] = (before + after) / 2
    return rows[:num_frames]


def frame_boundaries(num_frames: int, duration: float, config: CheckpointConfig) -> NDArray[np.float64]:
    """Return the (num_frames + 1,) seconds between the frames of a recording; the last one is its end."""
    boundaries = np.arange(num_frames + 1, dtype=np.float64) * config.frame_seconds
    boundaries[-1] = duration
    return boundaries


def to_posteriors(logits: Array, config: CheckpointConfig) -> Array:
    """Return clip posteriors of clip logits (..., num_classes): each class for itself, or all adding up to 1."""
    logits = calibrated(logits, config.calibration.clipwise)
    return softmax(logits) if config.objective == "single_label" else sigmoid(logits)


def calibrated(logits: Array, calibration: LogitCalibration) -> Array:
    """Return logits (..., num_classes) scaled and moved as the calibration says; without one exactly those given."""
    if calibration.scale:
        logits = logits * np.asarray(calibration.scale, dtype=np.float32)
    if calibration.bias:
        logits = logits + np.asarray(calibration.bias, dtype=np.float32)
    return logits


def sigmoid(logits: Array) -> Array:
    """Return posteriors in [0, 1] of logits of any shape, without overflow; the small ones keep all their digits."""
    small = np.exp(-np.abs(logits))
    return np.asarray(np.where(logits >= 0, 1, small) / (1 + small), dtype=np.float32)


def frame_posteriors(logits: Array, config: CheckpointConfig) -> Array:
    """Return framewise posteriors of the token logits of a chunk, as the checkpoint says.

    Args:
        logits: (num_tokens, num_classes), fewer tokens than a chunk has if it was heard at native size.
        config: of the model.

    Returns:
        (config.heard_tokens, num_classes), 0 behind those tokens.
    """
    logits = calibrated(logits, config.calibration.framewise)
    known = softmax(logits) if config.framewise == "softmax" else sigmoid(logits)
    return np.concatenate([known, np.zeros((config.heard_tokens - len(known), known.shape[1]), np.float32)])


def softmax(logits: Array) -> Array:
    """Return posteriors of logits (..., num_classes) that add up to 1 over the classes, without overflow."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-np.inf))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True), dtype=np.float32)


def check_level(block: Array, name: str, start: float) -> None:
    """Refuse samples whose power single precision cannot hold: the network would answer with NaN."""
    if len(block) and not max(float(block.max()), -float(block.min())) <= _MAX_SAMPLE:
        raise AudioError(
            f"{name}: samples after {start:.0f} s exceed {_MAX_SAMPLE:g}; expected about -1 to 1, "
            "export the recording again with normal levels"
        )
