"""From any recording to tags and timed events: ``Predictor`` and ``Prediction``.

The path of a recording: decode -> resample -> chunks -> logits -> posteriors -> one time axis -> events. Decoding and
resampling run ahead in a thread while the network works; memory is bounded but for the framewise posteriors.
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

from htsat.audio.chunk import Chunk, pool_chunks
from htsat.audio.decode import AudioSource, open_audio
from htsat.audio.resample import prefetch, resample
from htsat.backends import Backend, BackendName, Precision, open_model
from htsat.config import CheckpointConfig, DecodingConfig, InferenceConfig
from htsat.detection.decoder import decode_events
from htsat.errors import AudioError, UsageError
from htsat.events import Event, Tag
from htsat.files import write_atomic
from htsat.formats import Detections, Tags, format_events, format_for_path, format_tags
from htsat.grid import FrameGrid
from htsat.hearing import Framewise, check_level, frame_boundaries, heard_chunks, to_posteriors
from htsat.labels import counted_classes, heard_labels
from htsat.live import DEFAULT_HOP, DEFAULT_LOOKAHEAD, PredictorStream
from htsat.plot import PICTURE_ENDINGS, SpectrogramOverview, save_plot

if TYPE_CHECKING:
    from htsat.model.base import SoundModel

Array = NDArray[np.float32]


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
        on_note: told, once, in a line, if memory is too small for a batch, which is then heard in smaller ones.
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
        on_note: Callable[[str], None] | None = None,
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
            on_note=on_note,
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

    def stream(
        self,
        sample_rate: int,
        *,
        hop_seconds: float = DEFAULT_HOP,
        lookahead_seconds: float | None = DEFAULT_LOOKAHEAD,
    ) -> PredictorStream:
        """Return what listens to samples as they come, and tells events while they sound.

        Args:
            sample_rate: Hz of the samples that come.
            hop_seconds: seconds between the times at which is listened.
            lookahead_seconds: seconds heard behind each moment: later, and more certain. None: as recordings are
                heard, known a whole chunk later.

        Raises:
            UsageError: a sample rate out of range.
            ConfigError: seconds out of range, or longer than the model's chunks together.
        """
        return PredictorStream(
            self.config, self._backend, sample_rate, hop_seconds=hop_seconds, lookahead_seconds=lookahead_seconds
        )

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
                    hearing.add(batch, *self._backend(samples))
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


def _batches(chunks: Iterator[Chunk], size: int) -> Iterator[list[Chunk]]:
    batch: list[Chunk] = []
    for chunk in chunks:
        batch.append(chunk)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
