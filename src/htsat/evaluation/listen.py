"""What one or several models say of labelled clips: the posteriors that are then scored.

A clip gets what ``htsat tag`` and ``htsat detect`` would give it, bit for bit on a CPU, whatever the batch size and
however many processes share the work. Three published ways to squeeze out more are options:

* an ensemble: the mean of the models' clip posteriors (or of their logits);
* shifts: the mean over circular shifts of the waveform by 0, 100, 300, 600 ... samples (ten of them in the published
  AudioSet test; ``sed_model.py``, ``test_step``);
* ``fit="stretch"``: the log-mel of a short clip is stretched over the whole input instead of being followed by silence.

The events of the paper's DESED table come by ``classes="desed-published", decoding="published"``: of the first 10 s
of each clip, silence behind shorter ones, the ten published thresholds, no filter, and the end of a clip where the
published code puts it (Source: upstream ``data_generator.py``, DESED_Dataset; ``fl_evaluate.py``).
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from htsat.audio.chunk import Chunk, pool_chunks
from htsat.audio.resample import prefetch
from htsat.backends import Backend, SparingBackend
from htsat.config import CheckpointConfig
from htsat.data.clips import Clip, clip_name
from htsat.detection.decoder import decode_events
from htsat.errors import AudioError, ConfigError, DataError, UsageError
from htsat.events import Event
from htsat.hearing import Framewise, frame_boundaries, heard_chunks, to_posteriors
from htsat.labels import counted_classes, desed_decoding, heard_labels, label_set
from htsat.model.base import FITS, IN_TIME, Fit, SoundModel
from htsat.model.runtime import TorchBackend

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
    classes: Literal["desed", "desed-published"] | None = None
    """Count AudioSet's classes as those of another label set; see ``htsat.labels.class_map``. None: as the checkpoints
    say."""
    decoding: Literal["model", "published"] = "model"
    """``published``: the events of DESED's ten classes as in the paper."""
    time_shifts: int | None = None
    """How often each chunk is heard for events, moved by parts of a time step (``InferenceConfig.shifts``); None: what
    each checkpoint says. Clip posteriors do not depend on it."""
    operating_point: str | None = None
    """Decode events with these settings of the first model's checkpoint (``high_precision`` ...); None: its usual
    ones."""

    def __post_init__(self) -> None:
        if self.fit is not None and self.fit not in FITS:
            raise UsageError(f"fit must be one of {', '.join(FITS)}, got {self.fit!r}")
        if self.ensemble not in ("mean", "logits"):
            raise UsageError(f"ensemble must be mean or logits, got {self.ensemble!r}")
        if not 1 <= self.shifts <= 100:
            raise UsageError(f"shifts must be 1 to 100, got {self.shifts}")
        if self.time_shifts is not None and not 1 <= self.time_shifts <= 32:
            raise UsageError(f"time_shifts must be 1 to 32, got {self.time_shifts}")
        if self.decoding not in ("model", "published"):
            raise UsageError(f"decoding must be model or published, got {self.decoding!r}")
        if self.decoding == "published" and (self.fit not in (None, "pad") or self.time_shifts not in (None, 1)):
            raise UsageError(
                "the published decoding follows short clips with silence and hears each once; leave out fit and shifts"
            )
        if self.decoding == "published" and self.operating_point is not None:
            raise UsageError("the published decoding has thresholds of its own; leave out the operating point")
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.events and self.fit is not None and self.fit not in IN_TIME:
            raise UsageError(f"fit={self.fit!r} distorts time, so there are no events; use {', '.join(IN_TIME)}")


@dataclass(frozen=True, eq=False)
class Heard:
    """What the models say of one clip.

    Attributes:
        posteriors: (num_classes,) float32, in the order of the first model's labels, or of those that they are counted
            as (``heard_labels`` of ``listening_config``); NaN if the clip failed.
        events: in time order; None if they were not asked for, or the clip failed.
        duration: seconds.
        failure: why there is no answer; None if there is one.
        framewise: (num_frames, num_classes) float32, what the events are decoded from, classes as in ``posteriors``;
            of an ensemble the mean. For scores at all thresholds. None without events, and for clips of a corpus that
            does not tell their events, as nothing can be scored there. It stays in memory: an hour of frames of 40 ms
            takes 0.36 MB for each class.
        boundaries: (num_frames + 1,) seconds between the frames; None without ``framewise``.
    """

    posteriors: Array
    events: tuple[Event, ...] | None = None
    duration: float = 0.0
    failure: str | None = None
    framewise: Array | None = None
    boundaries: NDArray[np.float64] | None = None


def listening_config(config: CheckpointConfig, listening: Listening) -> CheckpointConfig:
    """Return a checkpoint's settings with what ``listening`` changes of them.

    Raises:
        UsageError: the checkpoint lacks classes that are to be counted, or cannot take so many shifts.
    """
    inference = config.inference
    changes: dict[str, Any] = {}
    if listening.classes is not None:
        changes["classes"] = listening.classes
    if listening.time_shifts is not None:
        changes["shifts"] = listening.time_shifts
    if listening.fit in ("pad", "tile", "native"):
        changes["short"] = listening.fit
    elif listening.fit is not None:
        # Published: always a whole chunk.
        changes |= {"chunk_part": 1, "shifts": 1}
    if listening.decoding == "published":
        changes |= {"short": "pad", "chunk_part": 1, "shifts": 1}
    try:
        config = dataclasses.replace(config, inference=dataclasses.replace(inference, **changes))
    except ConfigError as error:
        raise UsageError(f"these settings do not go together: {error}") from None
    if listening.decoding == "published":
        if lacking := [label for label in label_set("desed") if label not in heard_labels(config)]:
            raise UsageError(
                f"the published decoding has thresholds for DESED's ten classes, and the model lacks {lacking[0]!r}; "
                "count AudioSet's classes as DESED's with classes desed-published"
            )
        config = dataclasses.replace(config, decoding=desed_decoding())
    return config


def published_boundaries(num_samples: int, config: CheckpointConfig) -> NDArray[np.float64]:
    """Return the (num_tokens + 1,) seconds between a clip's tokens as the published evaluation of DESED counts them.

    It repeats each token over the frames of the stretched log-mel that it stands for, and counts the clip's length in
    such frames, rounded up, of which there are 1.024 to each frame before the stretch. With 32 tokens in 10 s that is
    a token every 0.3125 s and an end in steps of 9.765625 ms, up to one step after the true one.

    Args:
        num_samples: of the clip.
        config: of the model.
    """
    hop, rate = config.frontend.hop_length, config.frontend.sample_rate
    unstretched = config.chunk_samples // hop
    frames = min(config.num_frames, math.ceil(num_samples // hop * (config.num_frames / unstretched)))
    tokens = -(-frames * config.num_tokens // config.num_frames)
    boundaries = np.arange(tokens + 1, dtype=np.float64) * (config.num_frames / config.num_tokens)
    boundaries[-1] = frames
    boundaries *= unstretched * hop / rate / config.num_frames
    return boundaries


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
    models: Sequence[SoundModel],
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
        heard_clips = zip(clips, _listen(models, waveforms, listening), strict=True)
        for done, (clip, heard) in enumerate(heard_clips, 1):
            if on_progress is not None:
                on_progress(done)
            # Millions of clips with labels alone must not fill the memory with what nothing compares to.
            yield heard if clip.events is not None else dataclasses.replace(heard, framewise=None, boundaries=None)


def waveform_posteriors(
    models: Sequence[SoundModel], waveforms: Iterable[Array], listening: Listening | None = None
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

    def __init__(self, model: SoundModel, fit: Fit, device: torch.device) -> None:
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
        config: of its checkpoint, with what was asked for.
        columns: which of its classes is each of the first model's.
        least_samples: the shortest waveform that it takes.
    """

    def __init__(self, model: SoundModel, labels: Sequence[str], listening: Listening) -> None:
        config = listening_config(model.checkpoint, listening)
        device = listening.device or str(next(model.parameters()).device)
        backend = TorchBackend(model, device=device, threads=listening.threads)
        self._backend: Backend = backend
        self._stretches = listening.fit is not None and listening.fit not in IN_TIME
        if self._stretches and listening.fit is not None:
            self._backend = _Stretching(model, listening.fit, backend.device)
        self._backend = SparingBackend(self._backend)
        self.config = config
        self._unmoved = dataclasses.replace(config, inference=dataclasses.replace(config.inference, shifts=1))
        # A frame at the edge of what is stretched reflects half a window.
        self.least_samples = config.frontend.n_fft // 2 + 1 if self._stretches else 1
        self._listening = listening
        self._batch_size = listening.batch_size
        self.columns = [config.labels.index(label) for label in labels]

    def hear(self, waveforms: Sequence[Array]) -> list[tuple[Array, Array | None]]:
        """Return the clip posteriors (or logits) and, if asked for, the framewise posteriors of waveforms."""
        config, offsets = self.config, shift_offsets(self._listening.shifts)
        if self._listening.decoding == "published":
            waveforms = [waveform[: config.chunk_samples] for waveform in waveforms]
        heard_in_time = [Framewise(config) for _ in waveforms] if self._listening.events else []
        answers: dict[tuple[int, int], list[tuple[Array, int]]] = {}
        tasks = (
            (number, shift, chunk)
            for number, waveform in enumerate(waveforms)
            for shift, offset in enumerate(offsets)
            for chunk in self._chunks(np.roll(waveform, -offset) if offset else waveform, moved=not shift)
        )
        for batch in self._batches(tasks):
            clip_logits, frame_logits, _ = self._backend(np.stack([chunk.samples for _, _, chunk in batch]))
            for (number, shift, chunk), logits, frames in zip(batch, clip_logits, frame_logits, strict=True):
                if not chunk.shift:
                    answers.setdefault((number, shift), []).append((logits, chunk.length))
                if heard_in_time and not shift:
                    heard_in_time[number].add(chunk, frames)
        results = []
        for number, waveform in enumerate(waveforms):
            shifted = [self._pooled(answers[number, shift]) for shift in range(len(offsets))]
            framewise = None
            if heard_in_time:
                framewise = heard_in_time[number].finish(len(waveform))
                if config.inference.classes is None:
                    framewise = framewise[:, self.columns]
            results.append((_mean(shifted)[self.columns], framewise))
        return results

    def _chunks(self, waveform: Array, *, moved: bool) -> Iterator[Chunk]:
        """Cut a waveform as ``Predictor`` does, with moved chunks where events ask for them."""
        if self._stretches and len(waveform) < self.config.chunk_samples:
            yield Chunk(waveform, 0, 0, len(waveform))
        else:
            config = self.config if moved and self._listening.events else self._unmoved
            yield from heard_chunks([waveform], config)

    def _batches(self, tasks: Iterator[tuple[int, int, Chunk]]) -> Iterator[list[tuple[int, int, Chunk]]]:
        """Put consecutive chunks of the same length together."""
        for _, same in itertools.groupby(tasks, key=lambda task: len(task[2].samples)):
            while batch := list(itertools.islice(same, self._batch_size)):
                yield batch

    def _pooled(self, answers: Sequence[tuple[Array, int]]) -> Array:
        """Pool the answers for the chunks of a clip: posteriors, or logits where those are to be averaged."""
        values = np.stack([logits for logits, _ in answers])
        if self._listening.ensemble == "mean":
            values = to_posteriors(values, self.config)
        weights = np.asarray([length for _, length in answers], dtype=np.float64)
        return pool_chunks(values, weights, self.config.inference.clip_pooling)


def _mean(values: Sequence[Array]) -> Array:
    """Return the mean of equal shapes; of a single one exactly that."""
    if len(values) == 1:
        return values[0]
    return np.asarray(np.mean(values, axis=0, dtype=np.float64), dtype=np.float32)


def _listen(models: Sequence[SoundModel], sources: Iterable[Source], listening: Listening) -> Iterator[Heard]:
    """Answer for each source."""
    labels = _check_together(models, listening)
    training = [model.training for model in models]
    try:
        members = [_Member(model, labels, listening) for model in models]
        first = members[0].config
        decoding = first.decoding
        if listening.operating_point is not None:
            decoding = first.decoding_at(listening.operating_point)
        counted = counted_classes(first)
        heard_as = heard_labels(first)
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
                    yield _failed(problem, len(heard_as))
                    continue
                (name, found), *answer = next(answers)
                clip = _mean([clipwise for clipwise, _ in answer])
                if listening.ensemble == "logits":
                    clip = to_posteriors(clip, first)
                if counted is not None:
                    clip = counted(clip)
                duration = len(found[rate]) / rate
                frames = [framewise for _, framewise in answer if framewise is not None]
                if not np.isfinite(clip).all() or not all(np.isfinite(f).all() for f in frames):
                    yield _failed(
                        f"{name}: the model's answer is not a number; expected samples of about -1 to 1, "
                        "export the recording again with normal levels",
                        len(heard_as),
                    )
                    continue
                heard = Heard(clip, None, duration)
                if frames:
                    framewise = _mean(frames)
                    if listening.decoding == "published":
                        boundaries = published_boundaries(len(found[rate]), first)
                        framewise = framewise[: len(boundaries) - 1]
                    else:
                        boundaries = frame_boundaries(len(framewise), duration, first)
                    events = tuple(decode_events(framewise, boundaries, heard_as, decoding))
                    heard = Heard(clip, events, duration, framewise=framewise, boundaries=boundaries)
                yield heard
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


def _check_together(models: Sequence[SoundModel], listening: Listening) -> tuple[str, ...]:
    """Return the labels of an ensemble; refuse models whose answers cannot be averaged."""
    if not models:
        raise UsageError("no model to listen with; give at least one")
    first = listening_config(models[0].checkpoint, listening)
    if not first.labels:
        raise UsageError("the model has no classes, it gives embeddings only; choose another (htsat models)")
    for number, model in enumerate(models[1:], 2):
        config = listening_config(model.checkpoint, listening)
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
        grids = [(c.frontend.sample_rate, c.heard_samples, c.heard_frames) for c in (first, config)]
        if listening.events and grids[0] != grids[1]:
            raise UsageError(
                f"model {number} of the ensemble has other time steps than the first, so their events cannot be "
                "averaged; evaluate them one by one"
            )
    return first.labels
