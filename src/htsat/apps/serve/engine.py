"""The models of a server, and the way of a recording through it: decoded elsewhere, heard in turn."""

import asyncio
import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from htsat.apps.serve.batcher import Answer, Batcher, Heard, Source
from htsat.apps.serve.decoder import DecoderPool
from htsat.apps.serve.guard import ApiError, Gate, Keys
from htsat.apps.serve.metrics import Metrics
from htsat.apps.serve.settings import ServeSettings
from htsat.apps.serve.uploads import Upload
from htsat.audio.chunk import Chunk
from htsat.backends import open_model
from htsat.config import CheckpointConfig, DecodingConfig
from htsat.errors import AudioError, UsageError, nearest
from htsat.hearing import at_native_size, check_level, chunker_of
from htsat.labels import heard_labels
from htsat.predict import Hearing, Prediction

Array = NDArray[np.float32]

#: backends that hear the chunks of a batch one by one
_ONE_BY_ONE = ("onnxruntime", "openvino")
#: chunks of one recording that wait or are being heard, at most
_MOST_AHEAD = 16


@dataclass(frozen=True, eq=False)
class Model:
    """A model that a server has.

    Attributes:
        name: by which clients ask for it.
        config: its settings.
        labels: the classes that it tells.
        backend: what runs it.
    """

    name: str
    config: CheckpointConfig
    labels: list[str]
    backend: str


class Engine:
    """Hears recordings and streams.

    Args:
        models: by name; the first one is the default.
        batcher: hears their chunks.
        decoders: decodes uploads.
        metrics: is told what was heard.
        threads: of the batcher.
    """

    def __init__(
        self, models: dict[str, Model], batcher: Batcher, decoders: DecoderPool, metrics: Metrics, threads: int = 1
    ) -> None:
        self.models, self.batcher, self.decoders, self.metrics = models, batcher, decoders, metrics
        self.default = next(iter(models))
        self._ahead = min(_MOST_AHEAD, threads + 2)

    async def stop(self) -> None:
        """End threads and processes."""
        await self.decoders.close()
        await asyncio.to_thread(self.batcher.stop)

    async def hear(
        self,
        upload: Upload,
        model: Model,
        events: DecodingConfig | None,
        source: Source,
        on_progress: Callable[[float, float | None], None] | None = None,
    ) -> Callable[[], Prediction]:
        """Listen to a recording; cancelling it ends all work on it.

        Args:
            upload: the recording.
            model: that hears it.
            events: how posteriors become them; None: as the model says.
            source: of its chunks.
            on_progress: told the seconds done, and the duration where the header tells it.

        Returns:
            what makes the prediction, which may take long and is for another thread.

        Raises:
            AudioError: the recording cannot be read or is outside the limits.
            HtsatError: no process can be had to decode it.
            MemoryError: there is too little for a chunk.
        """
        config = dataclasses.replace(model.config, decoding=events or model.config.decoding)
        rate = config.frontend.sample_rate
        hearing, chunker = Hearing(config, model.labels), chunker_of(config)
        pending: deque[tuple[Chunk, Future[Answer]]] = deque()

        async def settle(most: int) -> None:
            while len(pending) > most:
                chunk, future = pending.popleft()
                hearing.add([chunk], *await asyncio.wrap_future(future))
                if on_progress is not None:
                    on_progress((chunk.start_sample + chunk.length) / rate, decoding.duration)

        async def submit(chunk: Chunk) -> None:
            await settle(self._ahead - 1)
            pending.append((chunk, source.submit(at_native_size(chunk, config).samples)))

        decoding = self.decoders.decode(upload.file, upload.name, rate)
        async with contextlib.aclosing(decoding):
            async for block in decoding:
                check_level(block, upload.name, chunker.num_samples / rate)
                for chunk in chunker.push(block):
                    await submit(chunk)
        for chunk in chunker.finish():
            await submit(chunk)
        await settle(0)
        num_samples = chunker.num_samples
        self.metrics.audio.labels("recording").inc(num_samples / rate)
        return lambda: hearing.finish(upload.name, num_samples)


@dataclass(eq=False)
class Serving:
    """What all requests of a worker share.

    Attributes:
        settings: of the server.
        engine: hears.
        metrics: counts.
        gate: lets requests in.
        keys: tells who may.
        sandbox: how decoders are shut in, in words.
        streams: how many are open.
        stopping: set when the server is told to stop.
    """

    settings: ServeSettings
    engine: Engine
    metrics: Metrics
    gate: Gate
    keys: Keys
    sandbox: str = ""
    streams: int = 0
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def model(self, name: str | None) -> Model:
        """Return a model by name; None: the default.

        Raises:
            ApiError: 404.
        """
        models = self.engine.models
        if name is None:
            return models[self.engine.default]
        if name not in models:
            have = f"this server has {', '.join(models)}"
            raise ApiError(404, "unknown_model", f"unknown model {name[:80]!r}{nearest(name[:80], models)}; {have}")
        return models[name]


def decoding_of(model: Model, operating_point: str | None) -> DecodingConfig | None:
    """Return the decoding settings that an operating point names.

    Raises:
        ApiError: 422.
    """
    if operating_point is None:
        return None
    try:
        return model.config.decoding_at(operating_point[:80])
    except UsageError as error:
        raise ApiError(422, "unknown_operating_point", str(error)) from None


def open_models(settings: ServeSettings, metrics: Metrics) -> tuple[dict[str, Model], Batcher]:
    """Load the models of a server and start the threads that hear.

    Raises:
        CheckpointError, DownloadError: a model cannot be had.
        UsageError: the backend is not installed, cannot run it, or it has no classes.
    """
    threads = settings.threads_of_a_worker
    models, heard, at_once = {}, {}, threads
    for name, source in settings.models:
        runner = open_model(
            source, backend=settings.backend, precision=settings.precision, threads=threads, jobs="auto"
        )
        labels = list(heard_labels(runner.config))
        if not labels:
            raise UsageError(
                f"model {source!r} has no classes, it gives embeddings only; choose another (htsat models)"
            )
        models[name] = Model(name, runner.config, labels, runner.name)
        heard[name] = Heard(runner.backend, 1 if runner.name in _ONE_BY_ONE else settings.batch_size)
        at_once = min(at_once, runner.jobs)

    def on_batch(model: str, chunks: int, seconds: float) -> None:
        metrics.chunks.labels(model).inc(chunks)
        metrics.batches.labels(model).observe(chunks)
        metrics.hearing.labels(model).inc(seconds)

    return models, Batcher(heard, threads=at_once, on_batch=on_batch)


def is_too_long(error: AudioError) -> bool:
    """Return whether a recording was refused for its length."""
    return "longer than the limit" in str(error)


def is_no_audio(error: AudioError) -> bool:
    """Return whether what came is no recording at all."""
    return "not a recording" in str(error)
