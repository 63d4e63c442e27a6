"""What one or several models say of labelled clips: the posteriors that are then scored.

A clip gets what ``htsat tag`` and ``htsat detect`` would give it, bit for bit on a CPU, whatever the batch size and
however many processes share the work. Three published ways to squeeze out more are options:

* an ensemble: the mean of the models' clip posteriors (or of their logits);
* shifts: the mean over circular shifts of the waveform by 0, 100, 300, 600 ... samples (ten of them in the published
  AudioSet test; ``sed_model.py``, ``test_step``);
* ``fit="stretch"``: the log-mel of a short clip is stretched over the whole input instead of being followed by silence.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from htsat.audio.chunk import Chunk, Stitcher, num_tokens, pool_chunks
from htsat.audio.resample import prefetch
from htsat.config import CheckpointConfig
from htsat.data.clips import Clip, clip_name
from htsat.detection.decoder import decode_events
from htsat.errors import AudioError, DataError, UsageError
from htsat.events import Event
from htsat.model.htsat import FITS, HTSAT, IN_TIME, Fit
from htsat.model.runtime import TorchBackend
from htsat.predict import Backend, frame_boundaries, frame_posteriors, heard_chunks, run_backend, to_posteriors

Array = NDArray[np.float32]
Ensemble = Literal["mean", "logits"]
#: a clip's name for messages, and its waveform by rate or the reason why there is none
Source = tuple[str, dict[int, Array] | str]
T = TypeVar("T")


class Reader(Protocol):
    """Reads clips at one rate, as ``htsat.data.reading.ClipReader`` does."""

    def read(self, clip: Clip) -> Array:
        """Return the clip as (num_samples,) float32; raises ``AudioError`` or ``DataError``."""


@dataclass(frozen=True)
class Listening:
    """How models listen to clips."""

    fit: Fit | None = None
    """What is done with clips shorter than a chunk; None: what each checkpoint says. ``stretch`` is the published
    way, ``repeat`` the published ``infer_mode``; longer clips are cut into chunks in any case."""
    shifts: int = 1
    """Mean over this many circular shifts of the waveform; 1: none, 10: as published. Events are those without."""
    ensemble: Ensemble = "mean"
    """Of several models and shifts: the mean of the clip posteriors, or of the clip logits."""
    batch_size: int = 4
    """Chunks per pass of the network, and clips read at once."""
    device: str | None = None
    """``auto``, ``cpu``, ``cuda`` ...; None: where each model is."""
    threads: int | None = None
    """CPU threads of the network; None leaves PyTorch's setting."""
    events: bool = False
    """Also decode events, with the settings of the first model's checkpoint."""

    def __post_init__(self) -> None:
        if self.fit is not None and self.fit not in FITS:
            raise UsageError(f"fit must be one of {', '.join(FITS)}, got {self.fit!r}")
        if self.ensemble not in ("mean", "logits"):
            raise UsageError(f"ensemble must be mean or logits, got {self.ensemble!r}")
        if not 1 <= self.shifts <= 100:
            raise UsageError(f"shifts must be 1 to 100, got {self.shifts}")
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.events and self.fit is not None and self.fit not in IN_TIME:
            raise UsageError(f"fit={self.fit!r} distorts time, so there are no events; use {', '.join(IN_TIME)}")


@dataclass(frozen=True, eq=False)
class Heard:
    """What the models say of one clip.

    Attributes:
        posteriors: (num_classes,) float32, in the order of the first model's labels; NaN if the clip failed.
        events: in time order; None if they were not asked for, or the clip failed.
        duration: seconds.
        failure: why there is no answer; None if there is one.
    """

    posteriors: Array
    events: tuple[Event, ...] | None = None
    duration: float = 0.0
    failure: str | None = None


def shift_offsets(shifts: int) -> tuple[int, ...]:
    """Return by how many samples the waveform is moved for each of ``shifts`` passes: 0, 100, 300, 600 ...

    The published code moves the moved waveform again, by 100, 200, 300 ... samples, so that the moves add up.
    """
    return tuple(itertools.accumulate(100 * i for i in range(shifts)))


def shard(count: int, rank: int, world: int) -> range:
    """Return which of ``count`` clips the process ``rank`` of ``world`` takes: each clip once, none twice.

    Nothing is padded, so that the processes may have different numbers of clips; ``join_shards`` restores the order.

    Raises:
        UsageError: a rank outside 0 to ``world`` - 1.
    """
    if not 0 <= rank < world:
        raise UsageError(f"expected a rank of 0 to {world - 1} for {world} processes, got {rank}")
    return range(rank, count, world)


def join_shards(parts: Sequence[Sequence[T]]) -> list[T]:
    """Return the results of all processes in the order of the clips; ``parts[i]`` are those of ``shard(n, i, world)``.

    Raises:
        ValueError: lengths that no ``shard`` gives.
    """
    count = sum(map(len, parts))
    expected = [len(shard(count, rank, len(parts))) for rank in range(len(parts))]
    if [len(part) for part in parts] != expected:
        raise ValueError(f"expected parts of {expected} clips, got {[len(part) for part in parts]}")
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]


def posteriors(
    models: Sequence[HTSAT],
    clips: Sequence[Clip],
    reader: Callable[[int], Reader],
    listening: Listening | None = None,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Heard]:
    """Let models listen to clips, reading ahead in a thread.

    Args:
        models: with labels; several are an ensemble and must have the same labels, in any order.
        clips: labelled recordings; their labels are not looked at.
        reader: makes a reader for a rate, e.g. ``ClipReader``.
        listening: how; None: one pass as the checkpoints say.
        on_progress: told how many clips are done.

    Yields:
        one result per clip, in order; a clip that cannot be read is one with a ``failure``.

    Raises:
        UsageError: no model, a model without classes, or models that do not go together.
        MemoryError: the device has too little memory for a batch.
    """
    listening = listening or Listening()
    rates = sorted({model.frontend_config.sample_rate for model in models})
    readers = {rate: reader(rate) for rate in rates}

    def read() -> Iterator[Source]:
        for clip in clips:
            name = clip_name(clip)
            try:
                yield name, {rate: readers[rate].read(clip) for rate in rates}
            except (AudioError, DataError) as error:
                yield name, str(error)

    ahead = cast("Generator[Source, None, None]", prefetch(read(), 2 * listening.batch_size))
    with contextlib.closing(ahead) as waveforms:
        for done, heard in enumerate(_listen(models, waveforms, listening), 1):
            if on_progress is not None:
                on_progress(done)
            yield heard


def waveform_posteriors(
    models: Sequence[HTSAT], waveforms: Iterable[Array], listening: Listening | None = None
) -> Iterator[Heard]:
    """Let models listen to waveforms in memory; see ``posteriors``.

    Args:
        models: of one sample rate.
        waveforms: (num_samples,) float32 each, at that rate.
        listening: how; None: one pass as the checkpoints say.
    """
    rates = {model.frontend_config.sample_rate for model in models}
    if len(rates) > 1:
        raise UsageError(f"waveforms have one sample rate, but the models ask for {sorted(rates)} Hz")
    sources = ((f"waveform {i}", dict.fromkeys(rates, waveform)) for i, waveform in enumerate(waveforms))
    yield from _listen(models, sources, listening or Listening())


class _Stretching:
    """Runs a network in a published way that stretches time: inputs of any length up to a chunk."""

    def __init__(self, model: HTSAT, fit: Fit, device: torch.device) -> None:
        self._model, self._fit, self._device = model, fit, device

    def __call__(self, chunks: Array) -> tuple[Array, Array, Array]:
        with torch.inference_mode():
            output = self._model(torch.from_numpy(chunks).to(self._device), self._fit)
        found = (output.clipwise_logits, output.framewise_logits, output.embedding)
        clip, frame, embedding = (t.float().cpu().numpy() for t in found if t is not None)
        return clip, frame, embedding


class _Member:
    """One model of an ensemble.

    Attributes:
        config: of its checkpoint, with the fit that was asked for.
        columns: which of its classes is each of the first model's.
        least_samples: the shortest waveform that it takes.
    """

    def __init__(self, model: HTSAT, labels: Sequence[str], listening: Listening) -> None:
        config: CheckpointConfig = model.checkpoint
        device = listening.device or str(next(model.parameters()).device)
        backend = TorchBackend(model, device=device, threads=listening.threads)
        self._backend: Backend = backend
        self._stretches = listening.fit is not None and listening.fit not in IN_TIME
        if listening.fit in ("pad", "tile", "native"):
            config = dataclasses.replace(config, inference=dataclasses.replace(config.inference, short=listening.fit))
        elif listening.fit is not None:
            # Published: always a whole chunk.
            config = dataclasses.replace(config, inference=dataclasses.replace(config.inference, chunk_part=1))
            self._backend = _Stretching(model, listening.fit, backend.device)
        self.config = config
        # A frame at the edge of what is stretched reflects half a window.
        self.least_samples = config.frontend.n_fft // 2 + 1 if self._stretches else 1
        self._listening = listening
        self._batch_size = listening.batch_size
        self.columns = [config.labels.index(label) for label in labels]

    def hear(self, waveforms: Sequence[Array]) -> list[tuple[Array, Array | None]]:
        """Return the clip posteriors (or logits) and, if asked for, the framewise posteriors of waveforms."""
        config, offsets = self.config, shift_offsets(self._listening.shifts)
        heard_in_time = waveforms if self._listening.events else ()
        stitchers = [Stitcher(len(config.labels), config.heard_tokens) for _ in heard_in_time]
        answers: dict[tuple[int, int], list[tuple[Array, int]]] = {}
        tasks = (
            (number, shift, chunk)
            for number, waveform in enumerate(waveforms)
            for shift, offset in enumerate(offsets)
            for chunk in self._chunks(np.roll(waveform, -offset) if offset else waveform)
        )
        for batch in self._batches(tasks):
            clip_logits, frame_logits, _ = run_backend(
                self._backend, np.stack([chunk.samples for _, _, chunk in batch]), len(batch)
            )
            for (number, shift, chunk), logits, frames in zip(batch, clip_logits, frame_logits, strict=True):
                answers.setdefault((number, shift), []).append((logits, chunk.length))
                if stitchers and not shift:
                    stitchers[number].add(chunk.start_token, frame_posteriors(frames, config))
        results = []
        for number, waveform in enumerate(waveforms):
            shifted = [self._pooled(answers[number, shift]) for shift in range(len(offsets))]
            framewise = None
            if stitchers:
                tokens = num_tokens(len(waveform), config.heard_samples, config.heard_tokens)
                framewise = stitchers[number].finish(tokens)[:, self.columns]
            results.append((_mean(shifted)[self.columns], framewise))
        return results

    def _chunks(self, waveform: Array) -> Iterator[Chunk]:
        """Cut a waveform as ``Predictor`` does."""
        if self._stretches and len(waveform) < self.config.chunk_samples:
            yield Chunk(waveform, 0, 0, len(waveform))
        else:
            yield from heard_chunks([waveform], self.config)

    def _batches(self, tasks: Iterator[tuple[int, int, Chunk]]) -> Iterator[list[tuple[int, int, Chunk]]]:
        """Put consecutive chunks of the same length together."""
        for _, same in itertools.groupby(tasks, key=lambda task: len(task[2].samples)):
            while batch := list(itertools.islice(same, self._batch_size)):
                yield batch

    def _pooled(self, answers: Sequence[tuple[Array, int]]) -> Array:
        """Pool the answers for the chunks of a clip: posteriors, or logits where those are to be averaged."""
        values = np.stack([logits for logits, _ in answers])
        if self._listening.ensemble == "mean":
            values = to_posteriors(values, self.config.objective)
        weights = np.asarray([length for _, length in answers], dtype=np.float64)
        return pool_chunks(values, weights, self.config.inference.clip_pooling)


def _mean(values: Sequence[Array]) -> Array:
    """Return the mean of equal shapes; of a single one exactly that."""
    if len(values) == 1:
        return values[0]
    return np.asarray(np.mean(values, axis=0, dtype=np.float64), dtype=np.float32)


def _listen(models: Sequence[HTSAT], sources: Iterable[Source], listening: Listening) -> Iterator[Heard]:
    """Answer for each source."""
    labels = _check_together(models, listening)
    training = [model.training for model in models]
    try:
        members = [_Member(model, labels, listening) for model in models]
        first = members[0].config
        waiting = iter(sources)
        while group := list(itertools.islice(waiting, listening.batch_size)):
            rate = first.frontend.sample_rate
            problems = [_problem(name, found, members) for name, found in group]
            kept = [
                (name, found)
                for (name, found), problem in zip(group, problems, strict=True)
                if problem is None and not isinstance(found, str)
            ]
            # The members answer for the whole group, one after the other; what follows is clip by clip.
            said = [member.hear([found[member.config.frontend.sample_rate] for _, found in kept]) for member in members]
            answers = iter(zip(kept, *said, strict=True))
            for problem in problems:
                if problem is not None:
                    yield _failed(problem, len(labels))
                    continue
                (name, found), *answer = next(answers)
                clip = _mean([clipwise for clipwise, _ in answer])
                if listening.ensemble == "logits":
                    clip = to_posteriors(clip, first.objective)
                duration = len(found[rate]) / rate
                frames = [framewise for _, framewise in answer if framewise is not None]
                if not np.isfinite(clip).all() or not all(np.isfinite(f).all() for f in frames):
                    yield _failed(
                        f"{name}: the model's answer is not a number; expected samples of about -1 to 1, "
                        "export the recording again with normal levels",
                        len(labels),
                    )
                    continue
                events = None
                if frames:
                    framewise = _mean(frames)
                    boundaries = frame_boundaries(len(framewise), duration, first)
                    events = tuple(decode_events(framewise, boundaries, labels, first.decoding))
                yield Heard(clip, events, duration)
    finally:
        for model, was in zip(models, training, strict=True):
            model.train(was)


def _failed(problem: str, num_classes: int) -> Heard:
    return Heard(np.full(num_classes, np.nan, dtype=np.float32), failure=problem)


def _problem(name: str, found: dict[int, Array] | str, members: Sequence[_Member]) -> str | None:
    """Say why these waveforms cannot be heard, or None."""
    if isinstance(found, str):
        return found
    for member in members:
        rate, length = member.config.frontend.sample_rate, len(found[member.config.frontend.sample_rate])
        if length < member.least_samples:
            return (
                f"{name}: has {length} samples at {rate} Hz; expected at least {member.least_samples}, "
                "leave the clip out or choose another fit"
            )
    return None


def _check_together(models: Sequence[HTSAT], listening: Listening) -> tuple[str, ...]:
    """Return the labels of an ensemble; refuse models whose answers cannot be averaged."""
    if not models:
        raise UsageError("no model to listen with; give at least one")
    first = models[0].checkpoint
    if not first.labels:
        raise UsageError("the model has no classes, it gives embeddings only; choose another (htsat models)")
    for number, model in enumerate(models[1:], 2):
        config: CheckpointConfig = model.checkpoint
        if lacking := sorted(set(first.labels) ^ set(config.labels)):
            raise UsageError(
                f"model {number} of the ensemble has other labels than the first ({lacking[0]!r} is in one only); "
                "give models of the same labels"
            )
        if config.objective != first.objective:
            raise UsageError(
                f"model {number} of the ensemble is {config.objective}, the first {first.objective}; "
                "their posteriors do not mean the same, give models of one objective"
            )
        grids = [(c.frontend.sample_rate, c.chunk_samples, c.num_tokens) for c in (first, config)]
        if listening.events and grids[0] != grids[1]:
            raise UsageError(
                f"model {number} of the ensemble has other time steps than the first, so their events cannot be "
                "averaged; evaluate them one by one"
            )
    return first.labels
