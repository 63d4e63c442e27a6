"""From any recording to tags and timed events: ``Predictor`` and ``Prediction``.

The path of a recording: decode -> resample -> chunks -> logits -> posteriors (the only sigmoid of
the package) -> one time axis -> events. Decoding and resampling run ahead in a thread while the
network works; memory is bounded but for the framewise posteriors themselves.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
from numpy.typing import NDArray

from htsat.audio.chunk import Chunk, Chunker, Stitcher, num_tokens, pool_chunks
from htsat.audio.decode import AudioSource, open_audio
from htsat.audio.resample import prefetch, resample
from htsat.backends import Backend, BackendName, Precision, open_model
from htsat.config import CheckpointConfig, DecodingConfig, InferenceConfig, LogitCalibration
from htsat.detection.decoder import decode_events
from htsat.errors import AudioError, UsageError
from htsat.events import Event, Tag
from htsat.files import write_atomic
from htsat.formats import Detections, Tags, format_events, format_for_path, format_tags
from htsat.grid import FrameGrid
from htsat.labels import counted_classes, heard_labels
from htsat.plot import PICTURE_ENDINGS, SpectrogramOverview, save_plot

if TYPE_CHECKING:
    from htsat.model.base import SoundModel

Array = NDArray[np.float32]

#: largest magnitude of a sample: far above 32-bit integers taken for floats, far below what overflows in a spectrum
_MAX_SAMPLE = 1e12
#: frames that are computed together where all would double the memory
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class Overview:
    """Spectrogram of a whole recording, for pictures.

    Attributes:
        spectrogram: (columns, n_mels) float32, dB.
        f_min: Hz, lower edge.
        f_max: Hz, upper edge.
        column_seconds: length of a column.
    """

    spectrogram: Array
    f_min: float
    f_max: float
    column_seconds: float


@dataclass(frozen=True, eq=False)
class Prediction:
    """What sounds in a recording, and when.

    Attributes:
        file: name of the recording, as given; of a path every character, so that it finds the file again.
        duration: seconds.
        labels: the model's classes, or those that they are counted as.
        tags: every class, most probable first.
        events: in time order.
        clipwise_posteriors: (num_classes,) float32 in [0, 1].
        framewise_posteriors: (num_frames, num_classes) float32 in [0, 1], at the model's true resolution, or finer
            (``InferenceConfig.shifts``).
        frame_boundaries: (num_frames + 1,) float64, seconds; the last one is ``duration``.
        embedding: (width,) float32, the mean over the recording.
        overview: spectrogram for pictures; None if it was not asked for.
    """

    file: str
    duration: float
    labels: list[str]
    tags: list[Tag]
    events: list[Event]
    clipwise_posteriors: Array
    framewise_posteriors: Array
    frame_boundaries: NDArray[np.float64]
    embedding: Array
    overview: Overview | None = None

    @property
    def detections(self) -> Detections:
        """File, duration and events, as the formats take them."""
        return Detections(self.file, self.duration, self.events)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the events, in the format that the ending names, or a picture (.png, .pdf, .svg).

        Raises:
            UsageError: unknown ending.
            OutputError: the file cannot be written; nothing half-written remains.
        """
        if Path(path).suffix.lower() in PICTURE_ENDINGS:
            self.save_plot(path)
        else:
            write_atomic(path, format_events([self.detections], format_for_path(path)))

    def save_plot(self, path: str | os.PathLike[str], *, top: int = 6) -> None:
        """Draw spectrogram, events and the posteriors of the ``top`` classes in one picture."""
        if self.overview is None:
            raise UsageError("a picture needs the spectrogram: predict(..., spectrogram=True)")
        save_plot(
            path,
            title=Path(self.file).name,
            duration=self.duration,
            spectrogram=self.overview.spectrogram,
            f_min=self.overview.f_min,
            f_max=self.overview.f_max,
            boundaries=self.frame_boundaries,
            posteriors=self.framewise_posteriors,
            labels=self.labels,
            events=self.events,
            top=top,
            column_seconds=self.overview.column_seconds,
        )

    def top_tags(self, count: int) -> Tags:
        """Return the ``count`` most probable tags, as the formats take them."""
        return Tags(self.file, self.duration, self.tags[:count])

    def __str__(self) -> str:
        """Return the five most probable tags and the events as tables."""
        return format_tags([self.top_tags(5)], "table") + format_events([self.detections], "table")


class Predictor:
    """Names what sounds in recordings of any length and says when.

    Args:
        model: a name (``htsat models``), a checkpoint, an exported file, or ``hf://owner/repo``.
        backend: what runs the network: ``torch``, ``compiled`` (by PyTorch too), ``onnxruntime`` or ``openvino``;
            ``auto``: the fastest one that is installed and can run the model here.
        precision: ``float32``, or ``bfloat16``: faster on processors made for it, posteriors differ by up to 0.02.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        batch_size: chunks per pass of the network.
        threads: CPU threads of the network; None: one for each core.
        jobs: recordings that ``predict_many`` listens to at once; they share the threads. ``auto``: one for each of
            them; 1 with PyTorch, which is no faster so.
        recordings: how many there are at most, for ``auto``; None: many.
        decoding: how posteriors become events; None: as the checkpoint says.
        operating_point: the same by name, from those that the checkpoint has (``high_precision`` ...).
        inference: how recordings are cut and pooled; None: as the checkpoint says.
        classes: count AudioSet's classes as those of another label set: ``desed``, or ``desed-published`` by the
            map of the paper; None: as the checkpoint says.
        cache_dir: where downloaded models are kept; None: the usual place.
        endpoint: address of the model hub; None: the usual one.
        offline: True: never download.

    Raises:
        CheckpointError, DownloadError: the model cannot be had.
        UsageError: the device is unknown or absent, or the operating point is; the backend is not installed or
            cannot run the model; or the model has not the classes that are to be counted.

    Attributes:
        config: settings of the model as they are used.
        backend: the name of what runs the network.
        labels: the classes that are told.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "default",
        *,
        backend: BackendName = "auto",
        precision: Precision = "float32",
        device: str = "auto",
        batch_size: int = 4,
        threads: int | None = None,
        jobs: int | Literal["auto"] = 1,
        recordings: int | None = None,
        decoding: DecodingConfig | None = None,
        operating_point: str | None = None,
        inference: InferenceConfig | None = None,
        classes: Literal["desed", "desed-published"] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        endpoint: str | None = None,
        offline: bool | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        if jobs != "auto" and jobs < 1:
            raise UsageError(f"jobs must be at least 1, got {jobs}")
        if decoding is not None and operating_point is not None:
            raise UsageError("decoding and operating_point exclude each other; give one")
        self._runner = open_model(
            model,
            backend=backend,
            precision=precision,
            device=device,
            threads=threads,
            jobs=jobs,
            recordings=recordings,
            native=inference is not None and inference.short == "native",
            cache_dir=cache_dir,
            endpoint=endpoint,
            offline=offline,
        )
        config = self._runner.config
        if operating_point is not None:
            decoding = config.decoding_at(operating_point)
        inference = inference or config.inference
        if classes is not None:
            inference = dataclasses.replace(inference, classes=classes)
        self.config: CheckpointConfig = dataclasses.replace(
            config, decoding=decoding or config.decoding, inference=inference
        )
        self.backend = self._runner.name
        self.labels = list(heard_labels(self.config))
        self._batch_size, self._jobs = batch_size, self._runner.jobs
        self._backend: Backend = self._runner.backend

    @functools.cached_property
    def model(self) -> "SoundModel":
        """The PyTorch network, loaded if another backend runs the model."""
        if self._runner.network is not None:
            return self._runner.network
        from htsat.model.runtime import load_model

        return load_model(self._runner.path)

    def run(self, chunks: Array) -> tuple[Array, Array, Array]:
        """Run the network on chunks; see ``htsat.backends.Backend``.

        Raises:
            MemoryError: the device has too little memory for them.
        """
        return run_backend(self._backend, chunks, len(chunks))

    def predict(
        self,
        source: AudioSource,
        *,
        name: str | None = None,
        spectrogram: bool = True,
        allow_truncated: bool = False,
        on_progress: Callable[[float, float | None], None] | None = None,
    ) -> Prediction:
        """Listen to one recording.

        Args:
            source: path, bytes, binary file object, or (waveform, sample_rate).
            name: what the result and messages call it; None: its path.
            spectrogram: also make the overview that pictures need.
            allow_truncated: use what is left of a truncated recording.
            on_progress: told the seconds done and, where the header tells it, the duration.

        Raises:
            AudioError: the recording cannot be read or is outside the limits.
            MemoryError: the device has too little memory for a batch.
        """
        config = self.config
        rate = config.frontend.sample_rate
        overview = SpectrogramOverview(rate) if spectrogram else None
        num_samples = 0

        with open_audio(source, name, allow_truncated=allow_truncated) as reader:

            def blocks() -> Iterator[Array]:
                nonlocal num_samples
                for block in resample(reader, rate):
                    check_level(block, reader.name, num_samples / rate)
                    num_samples += len(block)
                    if overview is not None:
                        overview.add(block)
                    yield block

            hearing = Hearing(config, self.labels)
            # The next batch is made while the network works on this one. Closed before the reader is, whatever
            # happens: a decoder must not be freed under the thread that decodes.
            made_ahead = cast(
                Generator[Chunk, None, None], prefetch(heard_chunks(blocks(), config), depth=self._batch_size + 1)
            )
            with contextlib.closing(made_ahead) as ahead:
                for batch in _batches(ahead, self._batch_size):
                    samples = np.stack([chunk.samples for chunk in batch])
                    hearing.add(batch, *run_backend(self._backend, samples, self._batch_size))
                    if on_progress is not None:
                        on_progress((batch[-1].start_sample + batch[-1].length) / rate, reader.duration)
            file = reader.name
        if name is not None:
            file = name
        elif isinstance(source, (str, os.PathLike)):
            file = os.fsdecode(source)

        drawn = None
        if overview is not None:
            drawn = Overview(overview.finish(), overview.config.f_min, overview.config.f_max, overview.column_seconds)
        return hearing.finish(file, num_samples, drawn)

    def predict_many(
        self,
        sources: Iterable[AudioSource],
        *,
        names: Iterable[str | None] | None = None,
        spectrogram: bool = True,
        allow_truncated: bool = False,
        on_progress: Callable[[int, float, float | None], None] | None = None,
    ) -> Generator[Prediction | AudioError | MemoryError, None, None]:
        """Listen to many recordings, ``jobs`` at once, and yield what is found in their order.

        A recording that cannot be read loses none of the others: its error is yielded in its place. A few results are
        made ahead, no more. Closing the iterator stops the work.

        Args:
            sources: as for ``predict``.
            names: what results and messages call them; None: their paths.
            spectrogram: see ``predict``.
            allow_truncated: see ``predict``.
            on_progress: told the number of the recording, the seconds done and the duration, if it is known; called
                by several threads.
        """
        stopped = threading.Event()

        def listen(number: int, source: AudioSource, name: str | None) -> Prediction | AudioError | MemoryError:
            def progress(done: float, duration: float | None) -> None:
                if stopped.is_set():
                    raise _StoppedError
                if on_progress is not None:
                    on_progress(number, done, duration)

            try:
                return self.predict(
                    source, name=name, spectrogram=spectrogram, allow_truncated=allow_truncated, on_progress=progress
                )
            except (AudioError, MemoryError) as error:
                return error

        named = zip(itertools.count(), sources, itertools.repeat(None) if names is None else names, strict=False)
        if self._jobs == 1:
            yield from itertools.starmap(listen, named)
            return
        with ThreadPoolExecutor(self._jobs, thread_name_prefix="htsat-predict") as pool:
            waiting: deque[Future[Prediction | AudioError | MemoryError]] = deque()
            try:
                for number, source, name in named:
                    waiting.append(pool.submit(listen, number, source, name))
                    if len(waiting) > 2 * self._jobs:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                stopped.set()
                for future in waiting:
                    future.cancel()


class _StoppedError(Exception):
    """Nobody waits for the result any more."""


class Hearing:
    """Gathers what the network says of the chunks of one recording until it is a ``Prediction``.

    Args:
        config: of the model, as it is used.
        labels: the classes that are told.
    """

    def __init__(self, config: CheckpointConfig, labels: list[str]) -> None:
        self._config, self._labels = config, labels
        self._framewise = Framewise(config)
        self._clipwise: list[Array] = []
        self._embeddings: list[Array] = []
        self._lengths: list[int] = []

    def add(self, chunks: Sequence[Chunk], clip_logits: Array, frame_logits: Array, embedding: Array) -> None:
        """Add what the network says of the next chunks; see ``Backend``."""
        # What sounds in a recording is told by its chunks alone, when by the moved ones too.
        unmoved = [index for index, chunk in enumerate(chunks) if not chunk.shift]
        self._clipwise.append(to_posteriors(clip_logits[unmoved], self._config))
        self._embeddings.append(embedding[unmoved])
        self._lengths += [chunks[index].length for index in unmoved]
        for chunk, logits in zip(chunks, frame_logits, strict=True):
            self._framewise.add(chunk, logits)

    def finish(self, file: str, num_samples: int, overview: Overview | None = None) -> Prediction:
        """Return what sounds in the recording, of ``num_samples``, called ``file``."""
        config, counted = self._config, counted_classes(self._config)
        duration = num_samples / config.frontend.sample_rate
        weights = np.asarray(self._lengths, dtype=np.float64)
        framewise = self._framewise.finish(num_samples)
        clip = pool_chunks(np.concatenate(self._clipwise), weights, config.inference.clip_pooling)
        if counted is not None:
            clip = counted(clip)
        grid = FrameGrid(frame_boundaries(len(framewise), duration, config))
        order = np.argsort(-clip, kind="stable")
        return Prediction(
            file=file,
            duration=duration,
            labels=self._labels,
            tags=[Tag(self._labels[i], float(clip[i])) for i in order],
            events=decode_events(framewise, grid.boundaries, self._labels, config.decoding),
            clipwise_posteriors=clip,
            framewise_posteriors=framewise,
            frame_boundaries=grid.boundaries,
            embedding=(weights / weights.sum() @ np.concatenate(self._embeddings)).astype(np.float32),
            overview=overview,
        )


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


def run_backend(backend: Backend, chunks: Array, batch_size: int) -> tuple[Array, Array, Array]:
    """Run the network; see ``Backend``.

    Raises:
        MemoryError: the device has too little memory for a batch.
    """
    try:
        return backend(chunks)
    except RuntimeError as error:
        # PyTorch has a class of its own for this on GPUs only.
        text = str(error).lower()
        if "out of memory" in text or "allocate memory" in text:
            raise MemoryError(f"no memory for a batch of {batch_size}") from error
        raise


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


def _batches(chunks: Iterator[Chunk], size: int) -> Iterator[list[Chunk]]:
    batch: list[Chunk] = []
    for chunk in chunks:
        batch.append(chunk)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
