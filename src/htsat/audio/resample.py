"""Mono waveforms at the rate a model wants, streamed or whole, and decoding ahead in a thread."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np
import soxr
from numpy.typing import NDArray

from htsat.audio.decode import AudioReader, AudioSource, open_audio

T = TypeVar("T")


def resampled_length(num_samples: int, sample_rate_in: int, sample_rate_out: int) -> int:
    """Return how many samples ``stream_audio`` makes of ``num_samples``: the nearest number, at least 1."""
    return max(1, (2 * num_samples * sample_rate_out + sample_rate_in) // (2 * sample_rate_in))


def stream_audio(
    source: AudioSource,
    sample_rate: int,
    *,
    block_seconds: float = 10.0,
    name: str | None = None,
    allow_truncated: bool = False,
    max_seconds: float | None = None,
) -> Iterator[NDArray[np.float32]]:
    """Decode a recording, mix it to mono and resample it, block by block in bounded memory.

    The filter is soxr's HQ (linear phase, no delay: sample ``i`` lies at ``i / sample_rate`` s).
    The samples are the same, bit for bit, for any block length; equal rates pass unchanged.

    Args:
        source: see ``open_audio``.
        sample_rate: Hz of the output.
        block_seconds: about how much to decode at once.
        name: what messages call it.
        allow_truncated: use what is left of a truncated recording.
        max_seconds: refuse longer recordings.

    Yields:
        (num_samples,) float32 blocks, none empty; ``resampled_length`` samples in all.

    Raises:
        AudioError: see ``open_audio`` and ``AudioReader.blocks``.
    """
    with open_audio(source, name, allow_truncated=allow_truncated, max_seconds=max_seconds) as reader:
        yield from resample(reader, sample_rate, block_seconds)


def resample(reader: AudioReader, sample_rate: int, block_seconds: float = 10.0) -> Iterator[NDArray[np.float32]]:
    """Stream an open recording at ``sample_rate`` Hz; see ``stream_audio``."""
    stream = Resampler(reader.sample_rate, sample_rate)
    for block in reader.blocks(block_seconds):
        out = stream.push(block)
        if len(out):
            yield out
    out = stream.finish()
    if len(out):
        yield out


class Resampler:
    """Resamples a stream as it comes; see ``stream_audio``.

    Args:
        sample_rate_in: Hz of what comes.
        sample_rate_out: Hz of what is made.
    """

    def __init__(self, sample_rate_in: int, sample_rate_out: int) -> None:
        self._stream = None
        if sample_rate_in != sample_rate_out:
            self._stream = soxr.ResampleStream(sample_rate_in, sample_rate_out, 1, dtype="float32", quality="HQ")
        self._came = self._made = False

    def push(self, block: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what the next (any,) samples add, which may be nothing; of equal rates the samples themselves."""
        self._came = self._came or len(block) > 0
        out: NDArray[np.float32] = block if self._stream is None else self._stream.resample_chunk(block)
        self._made = self._made or len(out) > 0
        return out

    def finish(self) -> NDArray[np.float32]:
        """Return the rest."""
        out: NDArray[np.float32] = np.zeros(0, dtype=np.float32)
        if self._stream is not None:
            out = self._stream.resample_chunk(out, last=True)
        if self._came and not self._made and not len(out):
            # a few samples at a high rate round to none; a recording always has one
            out = np.zeros(1, dtype=np.float32)
        return out


def read_audio(
    source: AudioSource,
    sample_rate: int,
    *,
    max_seconds: float | None = None,
    name: str | None = None,
    allow_truncated: bool = False,
) -> NDArray[np.float32]:
    """Read a whole recording as mono at ``sample_rate`` Hz.

    Args:
        source: see ``open_audio``.
        sample_rate: Hz of the output.
        max_seconds: refuse longer recordings, before they fill the memory.
        name: what messages call it.
        allow_truncated: use what is left of a truncated recording.

    Returns:
        (num_samples,) float32.

    Raises:
        AudioError: see ``open_audio`` and ``AudioReader.blocks``.
    """
    blocks = stream_audio(source, sample_rate, name=name, allow_truncated=allow_truncated, max_seconds=max_seconds)
    return np.concatenate(list(blocks))


def prefetch(iterator: Iterable[T], depth: int = 4) -> Iterator[T]:
    """Run ``iterator`` in a background thread, up to ``depth`` items ahead of the consumer.

    Order is kept; an exception appears in the consumer after the items before it. When the consumer
    stops early (closes this generator, or drops it), the thread stops after the item it is making
    and closes ``iterator`` there.

    Args:
        iterator: what to run; touched by the thread alone.
        depth: items made ahead, >= 1.

    Raises:
        ValueError: ``depth`` below 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    return _prefetch(iterator, depth)


def _prefetch(iterator: Iterable[T], depth: int) -> Iterator[T]:
    items: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
    slots = threading.Semaphore(depth)
    stop = threading.Event()

    def produce() -> None:
        end: BaseException | None = None
        try:
            source = iter(iterator)
            try:
                while True:
                    slots.acquire()
                    if stop.is_set():
                        break
                    try:
                        item = next(source)
                    except StopIteration:
                        break
                    items.put((item,))
            finally:
                close = getattr(source, "close", None)
                if close is not None:
                    close()
        except BaseException as error:  # whatever it is belongs to the consumer
            end = error
        items.put(end)

    # a daemon: a source blocked in a read that never returns must not keep the process alive
    thread = threading.Thread(target=produce, name="htsat-prefetch", daemon=True)
    thread.start()
    try:
        while isinstance(item := items.get(), tuple):
            yield item[0]
            slots.release()
        if item is not None:
            raise item
    finally:
        stop.set()
        slots.release()
        thread.join(timeout=5.0)
