"""From recordings of any length to chunks of one length, and back to one framewise output.

The contract:

* A model sees chunks of exactly ``chunk_samples`` samples and gives ``tokens_per_chunk`` time steps
  (tokens) for each, normally 10 s and 32 tokens of 0.3125 s.
* Tokens lie on one grid per recording: token ``t`` begins at sample
  ``round(t * chunk_samples / tokens_per_chunk)`` (halves up). A recording of ``n`` samples has the
  smallest number of tokens that reaches its end; the last token may be partly beyond it.
* Every chunk begins at a token. A recording of at most one chunk is one chunk at 0, followed by
  silence (``"pad"``) or repeated whole until the chunk is full (``"tile"``). A longer one has chunks
  at 0, hop, 2 hop ... tokens as long as they lie inside it, and a last one that begins at the first
  token from which it reaches the end: less than one token of it is silence. Every sample is in a
  chunk, no chunk occurs twice, and the last token of the last chunk is the last of the recording.
* With ``shifts`` = N each chunk comes N times, moved towards the beginning by (N - 1)/N ... 1/N of a token and not at
  all: by so much its tokens lie earlier. What lies before the recording is silence, or, if it is tiled, the end of a
  repetition. A moved chunk is not longer, so that it ends earlier too.
* ``Stitcher`` cross-fades overlapping chunks on that grid. Where one chunk alone covers a token, its
  posterior passes unchanged, bit for bit.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

#: tokens per block of finished rows: 4096 x 527 classes are 8.6 MB
_ROWS_PER_PAGE = 4096


def token_sample(token: int, chunk_samples: int, tokens_per_chunk: int) -> int:
    """Return the sample at which ``token`` begins."""
    return (2 * token * chunk_samples + tokens_per_chunk) // (2 * tokens_per_chunk)


def num_tokens(num_samples: int, chunk_samples: int, tokens_per_chunk: int) -> int:
    """Return how many tokens cover ``num_samples``: the smallest whose end is not before the last sample's."""
    return max(0, -((1 - 2 * num_samples) * tokens_per_chunk // (2 * chunk_samples)))


@dataclass(frozen=True, eq=False)
class Chunk:
    """A piece of a recording of the length that the model takes.

    Attributes:
        samples: (chunk_samples,) float32.
        start_token: where it begins on the token grid of the recording, if it is not moved.
        start_sample: where it begins in samples; negative before the recording.
        length: how many samples of it, if it is not moved, are of the recording; the rest is silence or repetition.
        shift: by how many of ``shifts`` parts of a token it begins earlier.
    """

    samples: NDArray[np.float32]
    start_token: int
    start_sample: int
    length: int
    shift: int = 0


def chunk_stream(
    blocks: Iterable[NDArray[np.float32]],
    chunk_samples: int,
    tokens_per_chunk: int,
    hop_tokens: int,
    short: Literal["pad", "tile"],
    shifts: int = 1,
) -> Iterator[Chunk]:
    """Cut a stream of samples into chunks (see the module docstring).

    The chunks do not depend on the sizes of the blocks. At most about one chunk and one block are held.

    Args:
        blocks: (any,) float32 each, in order; together one recording.
        chunk_samples: length of a chunk.
        tokens_per_chunk: tokens of a chunk, at most ``chunk_samples``.
        hop_tokens: tokens between the starts of chunks, 1 to ``tokens_per_chunk``.
        short: what follows a recording shorter than a chunk.
        shifts: how often each chunk comes; ``shifts * tokens_per_chunk`` is at most ``chunk_samples``.

    Yields:
        chunks by increasing ``start_token`` and, of each, decreasing ``shift``; none for a recording without samples.

    Raises:
        ValueError: an argument outside its range.
    """
    if not 1 <= tokens_per_chunk <= chunk_samples:
        raise ValueError(f"expected 1 to chunk_samples = {chunk_samples} tokens per chunk, got {tokens_per_chunk}")
    if not 1 <= hop_tokens <= tokens_per_chunk:
        raise ValueError(f"hop_tokens must be 1 to {tokens_per_chunk} (more leaves gaps), got {hop_tokens}")
    if short not in ("pad", "tile"):
        raise ValueError(f"short must be 'pad' or 'tile', got {short!r}")
    if not 1 <= shifts <= chunk_samples // tokens_per_chunk:
        raise ValueError(f"shifts must be 1 to {chunk_samples // tokens_per_chunk} (samples of a token), got {shifts}")
    return _chunks(blocks, chunk_samples, tokens_per_chunk, hop_tokens, short, shifts)


def _chunks(
    blocks: Iterable[NDArray[np.float32]],
    chunk_samples: int,
    tokens_per_chunk: int,
    hop_tokens: int,
    short: str,
    shifts: int,
) -> Iterator[Chunk]:
    def start_of(token: int) -> int:
        return token_sample(token, chunk_samples, tokens_per_chunk)

    def moved(token: int, known: NDArray[np.float32], first: int, length: int) -> Iterator[Chunk]:
        """Cut the chunk at ``token``, and those moved, from the samples ``known``, the first of which is ``first``."""
        for shift in reversed(range(shifts)):
            start = token_sample(token * shifts - shift, chunk_samples, tokens_per_chunk * shifts)
            samples = np.zeros(chunk_samples, dtype=np.float32)
            there = known[max(start - first, 0) : start - first + chunk_samples]
            at = max(first - start, 0)
            samples[at : at + len(there)] = there
            yield Chunk(samples, token, start, length, shift)

    held: list[NDArray[np.float32]] = []  # blocks from sample `first` on, joined only when a chunk is complete
    first = 0
    total = 0
    token = 0  # start of the next chunk that lies inside the recording
    for block in blocks:
        if not len(block):
            continue
        held.append(np.asarray(block, dtype=np.float32))
        total += len(block)
        if start_of(token) + chunk_samples > total:
            continue
        joined = np.concatenate(held)
        while start_of(token) + chunk_samples <= total:
            yield from moved(token, joined, first, chunk_samples)
            token += hop_tokens
        # the last chunk may begin at any token after the one just given, and moved ones a token earlier
        keep = start_of(token - hop_tokens + (shifts == 1))
        held = [joined[keep - first :].copy()]
        first = keep
    if not total:
        return
    if total <= chunk_samples:
        if token:
            return
        recording, first = np.concatenate(held), 0
        if short == "tile":
            # From as many whole repetitions before the beginning on as a token may reach back.
            first = -total * (-start_of(-1) // total + 1) if shifts > 1 else 0
            recording = np.resize(recording, chunk_samples - first)
        yield from moved(0, recording, first, total)
        return
    last = num_tokens(total, chunk_samples, tokens_per_chunk) - tokens_per_chunk
    start = start_of(last)
    if last <= token - hop_tokens:
        return
    yield from moved(last, np.concatenate(held), first, total - start)


class Stitcher:
    """Joins framewise posteriors of overlapping chunks to those of the recording.

    Weights are a triangle over the chunk, lowest at its edges, where the model has heard less of what
    surrounds a token, and always positive. Memory is that of the result: finished rows are float32,
    and only as many tokens as a chunk has are still open.
    """

    def __init__(self, num_classes: int, tokens_per_chunk: int) -> None:
        ramp = np.minimum(np.arange(tokens_per_chunk), np.arange(tokens_per_chunk)[::-1])
        self._chunk_weights = (ramp + 0.5)[:, None]
        self._num_classes = num_classes
        self._tokens_per_chunk = tokens_per_chunk
        self._mean = np.zeros((tokens_per_chunk, num_classes))
        self._weight = np.zeros((tokens_per_chunk, 1))
        self._open = 0  # the token of the first open row
        self._covered = 0  # tokens that a chunk has covered
        self._last_start = -1
        self._pages: list[NDArray[np.float32]] = []
        self._finished = False

    def add(self, start_token: int, framewise_posteriors: NDArray[np.floating]) -> None:
        """Add the output for one chunk.

        Args:
            start_token: ``Chunk.start_token``; larger than that of the chunk before.
            framewise_posteriors: (tokens_per_chunk, num_classes), in [0, 1].

        Raises:
            ValueError: wrong shape, out of order, or a gap after the chunk before.
        """
        expected = (self._tokens_per_chunk, self._num_classes)
        if np.shape(framewise_posteriors) != expected:
            raise ValueError(f"expected framewise posteriors of shape {expected}, got {np.shape(framewise_posteriors)}")
        if self._finished:
            raise ValueError("the recording is finished; use a new Stitcher for another one")
        if not self._last_start < start_token <= self._covered:
            raise ValueError(
                f"expected a chunk that starts after token {self._last_start} and not beyond token {self._covered}, "
                f"got {start_token}"
            )
        self._close_rows(start_token - self._open)
        posteriors = np.asarray(framewise_posteriors, dtype=np.float64)
        old = self._weight
        new = old + self._chunk_weights
        # the running mean leaves rows that only one chunk covers, or on which chunks agree, exactly as they are
        share = self._chunk_weights / new
        self._mean = np.where(old > 0, self._mean + (posteriors - self._mean) * share, posteriors)
        self._weight = new
        self._last_start = start_token
        self._covered = start_token + self._tokens_per_chunk

    def finish(self, num_tokens: int) -> NDArray[np.float32]:
        """Return the posteriors of the recording, (num_tokens, num_classes) float32.

        Args:
            num_tokens: tokens of the recording; the padding of a short chunk lies beyond them.

        Raises:
            ValueError: the chunks cover fewer tokens, or ``finish`` was called before.
        """
        if self._finished:
            raise ValueError("the recording is finished already")
        if num_tokens > self._covered:
            raise ValueError(f"the chunks cover {self._covered} tokens, fewer than the {num_tokens} asked for")
        self._close_rows(self._covered - self._open)
        self._finished = True
        result = np.empty((num_tokens, self._num_classes), dtype=np.float32)
        self._pages.reverse()
        start = 0
        while self._pages:  # freed one by one, so that the rows are not in memory twice
            page = self._pages.pop()
            rows = result[start : start + _ROWS_PER_PAGE]
            rows[:] = page[: len(rows)]
            start += _ROWS_PER_PAGE
        return result

    def _close_rows(self, count: int) -> None:
        """Move the first ``count`` open rows, which no later chunk touches, to the pages."""
        done = 0
        while done < count:
            at = (self._open + done) % _ROWS_PER_PAGE
            if at == 0:
                self._pages.append(np.empty((_ROWS_PER_PAGE, self._num_classes), dtype=np.float32))
            step = min(count - done, _ROWS_PER_PAGE - at)
            self._pages[-1][at : at + step] = self._mean[done : done + step]
            done += step
        self._mean = np.concatenate([self._mean[count:], np.zeros_like(self._mean[:count])])
        self._weight = np.concatenate([self._weight[count:], np.zeros_like(self._weight[:count])])
        self._open += count


def pool_chunks(
    posteriors: NDArray[np.floating], weights: NDArray[np.floating], rule: Literal["max", "mean", "top"]
) -> NDArray[np.float32]:
    """Pool clip posteriors over the chunks of a recording.

    Args:
        posteriors: (num_chunks, num_classes), in [0, 1].
        weights: (num_chunks,), positive; valid samples (or seconds) of each chunk, for ``"mean"``.
        rule: ``"max"``, ``"mean"`` (by weight), or ``"top"`` (mean of the largest quarter, at least one).

    Returns:
        (num_classes,) float32; a single chunk unchanged.

    Raises:
        ValueError: no chunks, shapes that do not match, weights that are not positive, or an unknown rule.
    """
    posteriors = np.asarray(posteriors)
    weights = np.asarray(weights, dtype=np.float64)
    if posteriors.ndim != 2 or not len(posteriors) or weights.shape != (len(posteriors),):
        raise ValueError(
            f"expected (num_chunks, num_classes) and (num_chunks,), num_chunks >= 1, "
            f"got {posteriors.shape} and {weights.shape}"
        )
    if not np.all(weights > 0):
        raise ValueError("weights must be positive")
    pooled: NDArray[np.floating]
    if rule == "max":
        pooled = posteriors.max(axis=0)
    elif rule == "mean":
        pooled = (weights / weights.sum()) @ posteriors.astype(np.float64)
    elif rule == "top":
        top = np.sort(posteriors, axis=0)[-max(1, len(posteriors) // 4) :]
        pooled = top.mean(axis=0, dtype=np.float64)
    else:
        raise ValueError(f"rule must be 'max', 'mean' or 'top', got {rule!r}")
    return np.asarray(pooled, dtype=np.float32)
