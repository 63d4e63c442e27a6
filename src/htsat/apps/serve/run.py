"""Processes, sockets and signals: uvicorn with bounds on what it leaves open, and its orderly end.

The first SIGTERM or SIGINT: ``/readyz`` says 503 at once, new work is refused, what was accepted is finished within the
grace time, streams get their end. The second one ends the process at once.
"""

import asyncio
import contextlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from htsat.apps.serve.api import create_app
from htsat.apps.serve.decoder import DecodeLimits, DecoderPool
from htsat.apps.serve.engine import Engine, Serving, open_models
from htsat.apps.serve.guard import ApiError, Gate, Keys
from htsat.apps.serve.metrics import FOLDER, Metrics
from htsat.apps.serve.settings import ServeSettings
from htsat.errors import HtsatError, UsageError

#: seconds in which the headers of a request must come
_HEADER_SECONDS = 5.0
#: a refused body is read on for so long and so far, so that its sender reads the refusal before a reset
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 4_000_000
#: seconds in which the last piece of an answer must be taken
_FLUSH_SECONDS = 20.0
#: bytes that the system keeps for a client that does not read
_SEND_BUFFER = 64 * 1024
#: bytes of a WebSocket frame that the protocol itself refuses; smaller ones are refused with a message
_MAX_FRAME = 3 << 19
#: seconds before a worker that died at once is started again
_RESTART_SECONDS = 1.0


class _Http(H11Protocol):
    """HTTP/1.1 for one connection, with bounds on time and bytes where nobody answers yet or any more."""

    serving: Serving
    refusals: "_Refusals"
    #: requests over the limit are refused by the address alone
    by_address: bool
    #: there are other origins that may read answers
    shares: bool

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}
        self._discarding = False
        self._drained = 0
        self._timer: asyncio.TimerHandle | None = self.loop.call_later(_HEADER_SECONDS, self._too_late)
        if len(self.connections) > self.serving.settings.max_connections:
            message = f"the server has {len(self.connections)} connections, which is its limit; close those not in use"
            self._refuse(_raw(ApiError(503, "busy", message, {"Retry-After": "1"})))

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            self._drain(len(data))
            return
        # A whole head of new work where a request begins: when the server is full it is not even parsed, but where a
        # page of another origin may want to read the refusal.
        begins = self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
        shared = self.shares and b"rigin:" in data
        if begins and not shared and data.startswith(b"POST /v1/") and b"\r\n\r\n" in data:
            status = self.serving.gate.status(self.client[0] if self.client and self.by_address else "")
            if status != 200:
                self._refuse(self.refusals(status))
                self._drain(len(data))
                return
        super().data_received(data)
        if self.conn.their_state is h11.SEND_BODY and self.cycle is not None and self.cycle.response_complete:
            self._drain(len(data))
        elif self.conn.their_state is not h11.IDLE:
            self._stop_timer()
            self._drained = 0
        elif self._timer is None and self.conn.trailing_data[0]:  # the next head has begun
            self._start_timer(_HEADER_SECONDS, self._too_late)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(_FLUSH_SECONDS, self._unread)
        unread = self.conn.their_state is h11.SEND_BODY  # refused before its body was read
        if unread and not self.transport.is_closing():
            self._start_timer(_LINGER_SECONDS, self.transport.abort)

    def _unread(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        error = sys.exception()
        hint = getattr(error, "error_status_hint", 400)
        code = {431: "header_too_large"}.get(hint, "bad_request")
        reason = str(error) if error is not None else msg
        message = f"this is no valid HTTP request ({reason}); let a library make it"
        self._refuse(_raw(ApiError(431 if hint == 431 else 400, code, message)))

    def _refuse(self, answer: bytes) -> None:
        """Answer without a request, and read what comes only to throw it away."""
        if self._discarding:
            return
        self._discarding = True
        if self.cycle is not None and not self.cycle.response_complete:
            # In the middle of a body: whoever reads it learns that the client is gone.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.abort()
                return
        self.transport.write(answer)
        with contextlib.suppress(OSError, NotImplementedError):
            if self.transport.can_write_eof():
                self.transport.write_eof()
        self.flow.resume_reading()
        self._start_timer(_LINGER_SECONDS, self.transport.abort)

    def _drain(self, count: int) -> None:
        self._drained += count
        if self._drained > _LINGER_BYTES:
            self.flow.pause_reading()

    def _too_late(self) -> None:
        if self.conn.their_state is h11.IDLE:
            message = f"no request came in {_HEADER_SECONDS:g} s; send its headers at once"
            self._refuse(_raw(ApiError(408, "too_slow", message)))

    def _start_timer(self, seconds: float, then: Callable[[], None]) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, then)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._stop_timer()
        super().handle_websocket_upgrade(event)


def _raw(error: ApiError) -> bytes:
    """Return a whole answer as it is sent."""
    body = json.dumps(error.body).encode()
    phrase = {400: "Bad Request", 408: "Request Timeout", 429: "Too Many Requests", 503: "Service Unavailable"}
    lines = [
        f"HTTP/1.1 {error.status} {phrase.get(error.status, 'Error')}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
        *(f"{name}: {value}" for name, value in error.headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class _Refusals:
    """Refusals of work as bytes, made anew a few times a second: under load there are hundreds."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._made: dict[int, tuple[float, bytes, Any]] = {}

    def __call__(self, status: int) -> bytes:
        """Return the refusal with a status, and count it."""
        now = time.monotonic()
        made = self._made.get(status)
        if made is None or now > made[0]:
            counter = self._serving.metrics.requests.labels("early", str(status))
            made = self._made[status] = (now + 0.2, _raw(self._serving.gate.error(status)), counter)
        made[2].inc()
        return made[1]


class _WebSocket(WebSocketsSansIOProtocol):
    """A WebSocket that can be given up without waiting for a client that does not read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        with contextlib.suppress(OSError):
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self.app_state = {**self.app_state, "give_up": self._give_up}

    def _give_up(self, code: int, reason: str) -> None:
        if self.disconnected:
            return
        with contextlib.suppress(Exception):  # whatever state it is in, it ends here
            self.conn.send_close(code, reason)
            self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.loop.call_later(1.0, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.stop_keepalive()


class _Server(uvicorn.Server):
    """Stops in order: refuses new work but still answers, until what was accepted is done."""

    def __init__(self, config: uvicorn.Config, serving: Serving) -> None:
        super().__init__(config)
        self._serving = serving
        self._until = 0.0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._told, number)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _told(self, number: int) -> None:
        if self.should_exit:
            os._exit(128 + number)
        self.should_exit = True
        self._until = time.monotonic() + self._serving.settings.grace
        self._serving.gate.closed = True
        self._serving.stopping.set()

    async def on_tick(self, counter: int) -> bool:
        if not await super().on_tick(counter):
            return False
        busy = self._serving.gate.inside or self._serving.streams
        return not busy or time.monotonic() > self._until

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        # Answers that are being sent, and clients that connected just now and wait to be refused.
        await asyncio.sleep(0.3)
        await super().shutdown(sockets)


async def _serve(settings: ServeSettings, sockets: list[socket.socket], ready: Callable[[Serving], None]) -> None:
    """Run one worker until it is told to stop."""
    metrics = Metrics()
    models, batcher = await asyncio.to_thread(open_models, settings, metrics)
    limits = DecodeLimits(max_seconds=settings.max_seconds, max_cpu_seconds=settings.timeout)
    decoders = DecoderPool(settings.decoders_of_a_worker, limits)
    await decoders.start()
    engine = Engine(models, batcher, decoders, metrics, settings.threads_of_a_worker)
    try:
        gate = Gate(
            settings.requests_of_a_worker,
            settings.requests_of_a_client,
            settings.max_wait,
            lambda: batcher.expected_wait,
        )
        shut_in = decoders.restrictions
        sandbox = ", ".join(shut_in.applied) if shut_in is not None else ""
        serving = Serving(settings, engine, metrics, gate, Keys(settings.tokens), sandbox)
        by_address = len(settings.tokens) < 2 and not settings.proxies
        shared: dict[str, Any] = {"serving": serving, "refusals": _Refusals(serving)}
        http = type("Http", (_Http,), {**shared, "by_address": by_address, "shares": bool(settings.cors)})
        config = uvicorn.Config(
            create_app(serving),
            http=http,
            ws=_WebSocket,
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(settings.proxies),
            forwarded_allow_ips=list(settings.proxies),
            ws_max_size=_MAX_FRAME,
            ws_per_message_deflate=False,
            timeout_keep_alive=20,
            timeout_graceful_shutdown=2,
            backlog=2048,
        )
        ready(serving)
        await _Server(config, serving).serve(sockets)
    finally:
        await engine.stop()


def serve(settings: ServeSettings, on_ready: Callable[[str, Serving | None], None]) -> int:
    """Listen until told to stop.

    Args:
        settings: of the server.
        on_ready: told the address when requests are answered, and what answers them if that is this process.

    Returns:
        the exit code.

    Raises:
        UsageError: the address cannot be had.
        CheckpointError, DownloadError: a model cannot be had.
    """
    listening = _listen(settings)
    address = _address(settings, listening)
    # What uvicorn says of single connections is what clients did.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    if settings.workers == 1:
        asyncio.run(_serve(settings, [listening], lambda serving: on_ready(address, serving)))
        return 0
    with tempfile.TemporaryDirectory(prefix="htsat-metrics-") as folder:
        return _Supervisor(settings, listening, folder, lambda: on_ready(address, None)).run()


def _listen(settings: ServeSettings) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((settings.host, settings.port))
        listening.listen(2048)
        listening.setblocking(False)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"cannot listen at {settings.host}, port {settings.port} ({reason}); choose another --host or --port"
        ) from None
    return listening


def _address(settings: ServeSettings, listening: socket.socket) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listening.getsockname()[1]}"


# ---------------------------------------------------------------------------------------------------
# several workers


def _worker(settings: ServeSettings, listening: socket.socket, told: Any) -> None:
    """Be one of several processes that answer at the same socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells all of them, the supervisor decides
    parent = cast(BaseProcess, multiprocessing.parent_process())

    def follow() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    try:
        asyncio.run(_serve(settings, [listening], lambda _: told.set()))
    except HtsatError as error:
        sys.exit(f"htsat: {error}")


class _Supervisor:
    """Starts the workers, replaces those that die, and passes on the word to stop."""

    def __init__(
        self, settings: ServeSettings, listening: socket.socket, folder: str, on_ready: Callable[[], None]
    ) -> None:
        self._settings, self._listening, self._on_ready = settings, listening, on_ready
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[BaseProcess, float] = {}
        self._told = 0
        os.environ[FOLDER] = folder

    def run(self) -> int:
        """Keep the workers running until told to stop; return the exit code."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._tell)
        ready = [self._start() for _ in range(self._settings.workers)]
        while ready and self._workers and not self._told:
            if ready[0].wait(0.2):
                ready.pop(0)
            if any(not process.is_alive() for process in self._workers):
                for process in self._workers:
                    process.terminate()
                raise UsageError("a worker ended while it started; its message above says why")
        if not ready:
            self._on_ready()
        failed = False
        while self._workers:
            wait([process.sentinel for process in self._workers], timeout=0.5)
            for process in [process for process in self._workers if not process.is_alive()]:
                started = self._workers.pop(process)
                # One that was told before it could listen ends by the signal itself.
                failed = failed or (bool(self._told) and process.exitcode not in (0, -signal.SIGTERM))
                _forget(process.pid)
                if not self._told:
                    time.sleep(max(0.0, _RESTART_SECONDS - (time.monotonic() - started)))
                    self._start()
        return int(failed)

    def _start(self) -> Any:
        told = self._context.Event()
        process = self._context.Process(target=_worker, args=(self._settings, self._listening, told))
        process.start()
        self._workers[process] = time.monotonic()
        return told

    def _tell(self, number: int, frame: object) -> None:
        self._told += 1
        for process in list(self._workers):
            process.terminate() if self._told == 1 else process.kill()


def _forget(pid: int | None) -> None:
    """Take a process that is gone out of the numbers that count the living."""
    from prometheus_client import multiprocess

    if pid is not None:
        multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]
