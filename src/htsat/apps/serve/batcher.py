"""Chunks of all requests and streams, heard by a few threads in turn.

Each request and each stream is a ``Source``. Sources take turns, chunk by chunk, so that a recording of an hour delays
a short one by little; chunks of live streams come first, but every fourth turn belongs to the requests. What is waiting
is heard together where a network gains by it. A source holds few chunks at a time, and there are few sources: that
bounds the queue.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from htsat.backends import Backend

Array = NDArray[np.float32]
#: clip logits, frame logits and embedding of one chunk, each with an axis of length 1 before it
Answer = tuple[Array, Array, Array]

#: of so many turns one belongs to the requests, however many streams there are
_TURNS = 4
#: share of the newest measurement in the mean time of a chunk
_NEWEST = 0.1


@dataclass(frozen=True, eq=False)
class Heard:
    """A backend that hears, and how.

    Attributes:
        backend: runs the network.
        batch_size: chunks that it takes at once; 1 where it hears them one by one anyway.
    """

    backend: Backend
    batch_size: int = 1


class Source:
    """One request or stream that has chunks to be heard. For any thread."""

    def __init__(self, batcher: "Batcher", model: str, live: bool) -> None:
        self._batcher, self.model, self.live = batcher, model, live
        self._waiting: deque[tuple[Array, Future[Answer]]] = deque()
        self._closed = False

    def submit(self, samples: Array) -> "Future[Answer]":
        """Have a chunk heard, (num_samples,) float32; chunks of a source are heard in order, perhaps side by side."""
        future: Future[Answer] = Future()
        self._batcher._add(self, samples, future)
        return future

    def close(self) -> None:
        """Nobody waits any more: what was not heard yet never is."""
        self._batcher._remove(self)


class Batcher:
    """Hears chunks; see the module.

    Args:
        models: by name.
        threads: calls at once, of all models together.
        on_batch: told the model, the chunks and the seconds of each call, by the thread that made it.
    """

    def __init__(
        self,
        models: Mapping[str, Heard],
        *,
        threads: int = 1,
        on_batch: Callable[[str, int, float], None] | None = None,
    ) -> None:
        self._models, self._on_batch = dict(models), on_batch
        self._changed = threading.Condition()
        # Sources that have chunks waiting, whose turn it is first; of each model those that are live and the others.
        self._ready: dict[str, tuple[deque[Source], deque[Source]]] = {name: (deque(), deque()) for name in models}
        self._order = deque(self._models)
        self._turn = 0
        self._waiting = 0
        self._seconds = 0.0
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._work, name=f"htsat-hear-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def source(self, model: str, *, live: bool = False) -> Source:
        """Return a new source of chunks for a model."""
        return Source(self, model, live)

    @property
    def waiting(self) -> int:
        """Chunks that are not being heard yet."""
        return self._waiting

    @property
    def chunk_seconds(self) -> float:
        """Seconds that hearing a chunk took of late; 0: none was heard."""
        return self._seconds

    @property
    def expected_wait(self) -> float:
        """Seconds until all that is waiting now is heard."""
        return self._waiting * self._seconds / len(self._threads)

    def stop(self) -> None:
        """End the threads; what is waiting is given up."""
        with self._changed:
            self._stopped = True
            for queues in self._ready.values():
                for queue in queues:
                    for source in list(queue):
                        self._drop(source)
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=10)

    def _add(self, source: Source, samples: Array, future: "Future[Answer]") -> None:
        with self._changed:
            if self._stopped or source._closed:
                future.cancel()
                future.set_running_or_notify_cancel()
                return
            if not source._waiting:
                self._ready[source.model][not source.live].append(source)
            source._waiting.append((samples, future))
            self._waiting += 1
            self._changed.notify()

    def _remove(self, source: Source) -> None:
        with self._changed:
            source._closed = True
            self._drop(source)

    def _drop(self, source: Source) -> None:
        if not source._waiting:
            return
        self._ready[source.model][not source.live].remove(source)
        self._waiting -= len(source._waiting)
        for _, future in source._waiting:
            future.cancel()
            future.set_running_or_notify_cancel()
        source._waiting.clear()

    def _take(self) -> tuple[str, list[tuple[Array, Future[Answer]]]] | None:
        """Return the chunks to be heard next, of one model; None if there are none."""
        for _ in range(len(self._order)):
            model = self._order[0]
            self._order.rotate(-1)
            live, others = self._ready[model]
            # As many as there would be for each thread, so that none of them idles.
            count = -(-sum(len(source._waiting) for queue in (live, others) for source in queue) // len(self._threads))
            batch: list[tuple[Array, Future[Answer]]] = []
            while len(batch) < min(count, self._models[model].batch_size) and (live or others):
                self._turn += 1
                queue = live if live and not (others and self._turn % _TURNS == 0) else others
                source = queue[0]
                samples, future = source._waiting[0]
                if batch and batch[0][0].shape != samples.shape:
                    break
                queue.popleft()
                source._waiting.popleft()
                self._waiting -= 1
                if source._waiting:
                    queue.append(source)
                if future.set_running_or_notify_cancel():
                    batch.append((samples, future))
            if batch:
                return model, batch
        return None

    def _work(self) -> None:
        while True:
            with self._changed:
                while (taken := self._take()) is None:
                    if self._stopped:
                        return
                    self._changed.wait()
            self._hear(*taken)
            del taken  # an idle thread holds no chunks

    def _hear(self, model: str, batch: list[tuple[Array, "Future[Answer]"]]) -> None:
        start = time.monotonic()
        heard = self._models[model]
        try:
            samples = batch[0][0][None] if len(batch) == 1 else np.stack([samples for samples, _ in batch])
            parts = heard.backend(samples)
        except BaseException as error:  # whatever it is belongs to those who wait
            for _, future in batch:
                future.set_exception(error)
            return
        seconds = time.monotonic() - start
        each = seconds / len(batch)
        with self._changed:
            self._seconds += (each - self._seconds) * (_NEWEST if self._seconds else 1)
        if self._on_batch is not None:
            self._on_batch(model, len(batch), seconds)
        for index, (_, future) in enumerate(batch):
            clip, frame, embedding = (part[index : index + 1] for part in parts)
            future.set_result((clip, frame, embedding))
