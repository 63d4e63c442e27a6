"""What a server tells Prometheus.

With several workers each of them writes its numbers into files of a common folder (``PROMETHEUS_MULTIPROC_DIR``), so
that whichever is asked answers for all of them.
"""

import os
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

#: how ``/metrics`` is written
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
FOLDER = "PROMETHEUS_MULTIPROC_DIR"


class Metrics:
    """The numbers of one worker."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        settings: dict[str, Any] = {"registry": self._registry, "namespace": "htsat"}
        self.requests = Counter(
            "requests", "Requests that were answered; 499: the client left.", ["route", "status"], **settings
        )
        self.seconds = Histogram(
            "request_seconds", "Time until an answer was sent.", ["route"], buckets=_SECONDS, **settings
        )
        self.inside = self._gauge("requests_inside", "Requests that are being answered.")
        self.queue = self._gauge("chunks_waiting", "Chunks that wait to be heard.")
        self.chunks = Counter("chunks", "Chunks that were heard.", ["model"], **settings)
        self.batches = Histogram(
            "batch_chunks", "Chunks that were heard together.", ["model"], buckets=(1, 2, 4, 8, 16, 32), **settings
        )
        self.hearing = Counter("hearing_seconds", "Time that networks took, of all threads.", ["model"], **settings)
        self.audio = Counter("audio_seconds", "Sound that was heard.", ["kind"], **settings)
        self.uploads = Counter("upload_bytes", "Bytes of recordings that came.", **settings)
        self.crashes = self._gauge("decoder_crashes", "Processes that died while they decoded, since the start.")
        self.streams = self._gauge("streams", "Live streams that are open.")
        self.gaps = Counter("stream_gap_seconds", "Sound of live streams that nobody heard.", **settings)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self._registry, namespace="htsat", multiprocess_mode="livesum")

    def text(self) -> bytes:
        """Return all of them as Prometheus reads them."""
        if FOLDER not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
