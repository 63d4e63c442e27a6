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
* With ``lookahead_tokens`` = L chunks roll as in live listening: chunk k ends L tokens behind token (k + 1) hop and
  alone answers for the ``hop`` tokens before those L. Until a whole chunk has been heard it begins at 0 and what is
  missing at its end is silence, or the recording repeated. At the end of the recording silence follows it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

#: tokens per block of finished rows: 4096 x 527 classes are 8.6 MB
_ROWS_PER_PAGE = 4096
#: blocks that are held apart before a chunk is complete
_MOST_BLOCKS = 512


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
        answers: the tokens of the recording that this chunk alone answers for; None: all of its own, cross-faded.
    """

    samples: NDArray[np.float32]
    start_token: int
    start_sample: int
    length: int
    shift: int = 0
    answers: range | None = None


class Chunker:
    """Cuts a stream of samples into chunks (see the module docstring), as they come.

    The chunks do not depend on the sizes of the blocks. At most about one chunk and one block are held.

    Args:
        chunk_samples: length of a chunk.
        tokens_per_chunk: tokens of a chunk, at most ``chunk_samples``.
        hop_tokens: tokens between the starts of chunks, 1 to ``tokens_per_chunk``.
        short: what follows a recording shorter than a chunk.
        shifts: how often each chunk comes; ``shifts * tokens_per_chunk`` is at most ``chunk_samples``.
        lookahead_tokens: chunks roll and hear so many tokens behind those that they answer for; None: they overlap.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        chunk_samples: int,
        tokens_per_chunk: int,
        hop_tokens: int,
        short: Literal["pad", "tile"],
        shifts: int = 1,
        lookahead_tokens: int | None = None,
    ) -> None:
        if not 1 <= tokens_per_chunk <= chunk_samples:
            raise ValueError(f"expected 1 to chunk_samples = {chunk_samples} tokens per chunk, got {tokens_per_chunk}")
        if not 1 <= hop_tokens <= tokens_per_chunk:
            raise ValueError(f"hop_tokens must be 1 to {tokens_per_chunk} (more leaves gaps), got {hop_tokens}")
        if short not in ("pad", "tile"):
            raise ValueError(f"short must be 'pad' or 'tile', got {short!r}")
        if not 1 <= shifts <= chunk_samples // tokens_per_chunk:
            most = chunk_samples // tokens_per_chunk
            raise ValueError(f"shifts must be 1 to {most} (samples of a token), got {shifts}")
        if lookahead_tokens is not None and not 0 <= lookahead_tokens <= tokens_per_chunk - hop_tokens:
            raise ValueError(f"lookahead_tokens must be 0 to {tokens_per_chunk - hop_tokens}, got {lookahead_tokens}")
        if lookahead_tokens is not None and shifts != 1:
            raise ValueError(f"chunks that roll are not moved: shifts must be 1, got {shifts}")
        self._chunk_samples, self._tokens, self._hop = chunk_samples, tokens_per_chunk, hop_tokens
        self._short, self._shifts, self._lookahead = short, shifts, lookahead_tokens
        self._held: list[NDArray[np.float32]] = []  # blocks from sample `_first` on, joined when a chunk is complete
        self._first = 0
        self._next = 0  # token from which the next chunk begins or, if chunks roll, answers
        self.num_samples = 0
        """how many there were so far"""

    def push(self, block: NDArray[np.float32]) -> list[Chunk]:
        """Take the next samples, (any,) float32, and return the chunks that are complete with them."""
        return list(self._cut_off(block))

    def stream(self, blocks: Iterable[NDArray[np.float32]]) -> Iterator[Chunk]:
        """Cut a recording that comes in blocks to its end; chunks are made when they are asked for."""
        for block in blocks:
            yield from self._cut_off(block)
        yield from self.finish()

    def _cut_off(self, block: NDArray[np.float32]) -> Iterator[Chunk]:
        if not len(block):
            return
        self._held.append(np.asarray(block, dtype=np.float32))
        self.num_samples += len(block)
        if not self._complete():
            if len(self._held) > _MOST_BLOCKS:
                self._held = [np.concatenate(self._held)]
            return
        joined = np.concatenate(self._held)
        while self._complete():
            yield from self._rolled(joined) if self._lookahead is not None else self._moved(self._next, joined)
            self._next += self._hop
        if self._lookahead is None:
            # the last chunk may begin at any token after the one just given, and moved ones a token earlier
            keep = self._start(self._next - self._hop + (self._shifts == 1))
        else:
            keep = self._start(max(0, self._next + self._hop + self._lookahead - self._tokens))
        self._held = [joined[keep - self._first :].copy()]
        self._first = keep

    def finish(self) -> list[Chunk]:
        """Return the chunks that the end of the recording completes."""
        total = self.num_samples
        if not total:
            return []
        last = num_tokens(total, self._chunk_samples, self._tokens)
        if self._lookahead is not None:
            joined, chunks = np.concatenate(self._held), []
            while self._next < last:
                chunks += self._rolled(joined, last)
                self._next += self._hop
            return chunks
        if total <= self._chunk_samples:
            if self._next:
                return []
            recording, first = np.concatenate(self._held), 0
            if self._short == "tile":
                # From as many whole repetitions before the beginning on as a token may reach back.
                first = -total * (-self._start(-1) // total + 1) if self._shifts > 1 else 0
                recording = np.resize(recording, self._chunk_samples - first)
            return self._moved(0, recording, first, total)
        start = last - self._tokens
        if start <= self._next - self._hop:
            return []
        return self._moved(start, np.concatenate(self._held), self._first, total - self._start(start))

    def _start(self, token: int) -> int:
        return token_sample(token, self._chunk_samples, self._tokens)

    def _complete(self) -> bool:
        """Return whether all of the next chunk is there."""
        if self._lookahead is None:
            return self._start(self._next) + self._chunk_samples <= self.num_samples
        return self._start(self._next + self._hop + self._lookahead) <= self.num_samples

    def _moved(
        self, token: int, known: NDArray[np.float32], first: int | None = None, length: int | None = None
    ) -> list[Chunk]:
        """Cut the chunk at ``token``, and those moved, from the samples ``known``, the first of which is ``first``."""
        first = self._first if first is None else first
        chunks = []
        for shift in reversed(range(self._shifts)):
            start = token_sample(token * self._shifts - shift, self._chunk_samples, self._tokens * self._shifts)
            samples = self._cut(known, start - first, start - first + self._chunk_samples)
            chunks.append(Chunk(samples, token, start, self._chunk_samples if length is None else length, shift))
        return chunks

    def _rolled(self, known: NDArray[np.float32], last: int | None = None) -> list[Chunk]:
        """Cut the next chunk that rolls; ``last`` is how many tokens the recording has, if it is over."""
        assert self._lookahead is not None
        end = self._next + self._hop + self._lookahead
        token = max(0, end - self._tokens)
        start, stop = self._start(token), self._start(end)
        there = known[start - self._first : stop - self._first]
        if token == 0 and self._short == "tile":
            samples = np.resize(there, self._chunk_samples)
        else:
            samples = self._cut(there, 0, self._chunk_samples)
        answers = range(self._next, self._next + self._hop if last is None else min(self._next + self._hop, last))
        return [Chunk(samples, token, start, len(there), answers=answers)]

    def _cut(self, known: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
        """Return a copy of samples ``start`` to ``stop`` of ``known``, silence where it has none."""
        samples = np.zeros(stop - start, dtype=np.float32)
        there = known[max(start, 0) : max(stop, 0)]
        samples[max(-start, 0) : max(-start, 0) + len(there)] = there
        return samples


def chunk_stream(
    blocks: Iterable[NDArray[np.float32]],
    chunk_samples: int,
    tokens_per_chunk: int,
    hop_tokens: int,
    short: Literal["pad", "tile"],
    shifts: int = 1,
    lookahead_tokens: int | None = None,
) -> Iterator[Chunk]:
    """Cut a recording that comes in blocks, (any,) float32 each, into chunks; see ``Chunker``.

    Yields:
        chunks by increasing ``start_token`` and, of each, decreasing ``shift``; none for a recording without samples.

    Raises:
        ValueError: an argument outside its range.
    """
    chunker = Chunker(chunk_samples, tokens_per_chunk, hop_tokens, short, shifts, lookahead_tokens)
    return chunker.stream(blocks)


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
        self._taken = 0  # rows that ``take`` gave away
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

    def extend(self, framewise_posteriors: NDArray[np.floating]) -> None:
        """Add (any, num_classes) posteriors of the next tokens, which no other chunk answers for.

        Raises:
            ValueError: ``finish`` was called before.
        """
        if self._finished:
            raise ValueError("the recording is finished; use a new Stitcher for another one")
        self._mean = np.asarray(framewise_posteriors, dtype=np.float32)
        self._covered += len(self._mean)
        self._weight = np.ones((len(self._mean), 1))
        self._close_rows(len(self._mean))

    def take(self) -> NDArray[np.float32]:
        """Return those posteriors that no later chunk changes and that were not taken before; they are kept no longer.

        Returns:
            (any, num_classes) float32.
        """
        rows = self._rows(self._open)
        del self._pages[: self._open // _ROWS_PER_PAGE - self._taken // _ROWS_PER_PAGE]
        self._taken = self._open
        return rows

    def finish(self, num_tokens: int) -> NDArray[np.float32]:
        """Return the posteriors of the recording, or what was not taken of them, (num_tokens, num_classes) float32.

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
        return self._rows(num_tokens, free=True)

    def _rows(self, stop: int, free: bool = False) -> NDArray[np.float32]:
        """Return the closed rows that were not taken, up to ``stop``."""
        result = np.empty((max(0, stop - self._taken), self._num_classes), dtype=np.float32)
        done = 0
        for number in range(len(self._pages)):
            page = self._pages[number][(self._taken + done) % _ROWS_PER_PAGE :][: len(result) - done]
            result[done : done + len(page)] = page
            done += len(page)
            if free:  # one by one, so that the rows are not in memory twice
                self._pages[number] = page[:0].copy()
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
