"""Live streams over WebSockets: samples in, messages out, nothing hidden.

Three tasks for each stream, with little between them: one reads frames, one cuts them into chunks, one takes what was
heard and sends messages. When the models cannot keep up, less is read and the client has to wait; sound that waited too
long is dropped, and told as a gap at its place.
"""

import asyncio
import contextlib
import json
import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal

import numpy as np
from fastapi import WebSocket
from numpy.typing import NDArray

from htsat.apps.serve.batcher import Answer
from htsat.apps.serve.engine import Serving, decoding_of
from htsat.apps.serve.guard import ApiError
from htsat.audio.chunk import Chunk
from htsat.errors import AudioError, ConfigError, UsageError, nearest
from htsat.live import LiveStream, SectionEnd, live_messages, start_message

Array = NDArray[np.float32]

#: bytes of a frame, and of frames that wait to be cut
MAX_FRAME = 1 << 20
_MAX_WAITING = 1 << 20
#: chunks of a stream that wait or are being heard
_AHEAD = 2
#: seconds in which a client must take a message
_SEND_SECONDS = 5.0
#: seconds that a client may send nothing
_IDLE_SECONDS = 120.0
_LEAST_HOP = 0.1
#: width of a sample in bytes
_FORMATS = {"s16le": 2, "f32le": 4}
_PARAMETERS = ("model", "sample_rate", "format", "hop", "operating_point", "frames", "top", "max_delay", "token")
#: what a stream is closed with
_NORMAL, _GOING, _DATA, _POLICY, _BIG, _LATER = 1000, 1001, 1007, 1008, 1009, 1013


class _CloseError(Exception):
    """A stream that ends before its client wanted."""

    def __init__(self, close: int, code: str, message: str) -> None:
        super().__init__(message)
        self.close, self.code, self.message = close, code, message


class _LeftError(Exception):
    """The client has closed the connection, or does not read."""


class _Inbox:
    """Frames that were read and are not cut yet."""

    def __init__(self, sample_rate: int) -> None:
        self._rate = sample_rate
        self._items: deque[tuple[Literal["audio", "gap", "end"], Array | float, float]] = deque()
        self._bytes = 0
        self.changed = asyncio.Event()

    @property
    def seconds(self) -> float:
        """Seconds of sound that wait."""
        return sum(len(value) for _, value, _ in self._items if isinstance(value, np.ndarray)) / self._rate

    @property
    def full(self) -> bool:
        """Whether no more should be read."""
        return self._bytes >= _MAX_WAITING

    def put(self, kind: Literal["audio", "gap", "end"], value: Array | float = 0.0) -> None:
        """Add what came."""
        self._items.append((kind, value, asyncio.get_running_loop().time()))
        self._bytes += value.nbytes if isinstance(value, np.ndarray) else 0
        self.changed.set()

    def age(self) -> float:
        """Return how long the oldest has been waiting."""
        return asyncio.get_running_loop().time() - self._items[0][2] if self._items else 0.0

    async def get(self) -> tuple[Literal["audio", "gap", "end"], Array | float]:
        """Return what is next, waiting for it."""
        while not self._items:
            self.changed.clear()
            await self.changed.wait()
        kind, value, _ = self._items.popleft()
        self._bytes -= value.nbytes if isinstance(value, np.ndarray) else 0
        self.changed.set()
        return kind, value

    def drop(self) -> float:
        """Give up all sound that waits: a gap takes its place. Return its seconds, without gaps that were there."""
        seconds, gaps = self.seconds, sum(value for kind, value, _ in self._items if kind == "gap")
        ends = any(kind == "end" for kind, _, _ in self._items)
        self._items.clear()
        self._bytes = 0
        if seconds + gaps:
            self.put("gap", seconds + gaps)
        if ends:
            self.put("end")
        return seconds


async def listen(websocket: WebSocket, serving: Serving) -> None:
    """Serve one stream until its end."""
    await websocket.accept()
    stream = _Stream(websocket, serving)
    try:
        if serving.streams >= serving.settings.max_streams or serving.stopping.is_set():
            what = "is being stopped" if serving.stopping.is_set() else f"has {serving.streams} streams, its limit"
            raise _CloseError(_LATER, "busy", f"the server {what}; try again later")
        serving.streams += 1
        try:
            await stream.run()
        finally:
            serving.streams -= 1
    except _CloseError as error:
        with contextlib.suppress(_LeftError):
            await stream.send([{"type": "error", "code": error.code, "message": error.message}])
            await stream.close(error.close, error.message)
    except _LeftError:
        stream.abort()


class _Stream:
    """One connection."""

    def __init__(self, websocket: WebSocket, serving: Serving) -> None:
        self._socket, self._serving = websocket, serving
        self._ended = _NORMAL

    async def run(self) -> None:
        """Hear the stream.

        Raises:
            _CloseError: it cannot go on.
            _LeftError: nobody listens.
        """
        self._read_parameters()
        stream, model = self._live, self._model
        source = self._serving.engine.batcher.source(model.name, live=True)
        work: asyncio.Queue[tuple[Chunk | SectionEnd, Future[Answer] | None] | None] = asyncio.Queue(_AHEAD)
        inbox = _Inbox(stream.sample_rate)
        await self.send([start_message(stream, model.name)])

        async def cut() -> None:
            while True:
                kind, value = await inbox.get()
                if kind == "audio":
                    assert isinstance(value, np.ndarray)
                    # No more than a hop at once, each of whose chunks is as large as ten seconds.
                    step = max(1, round(stream.hop_seconds * stream.sample_rate))
                    for start in range(0, len(value), step):
                        await submit(stream.push(value[start : start + step]))
                elif kind == "gap":
                    assert isinstance(value, float)
                    await submit(stream.gap(value))
                else:
                    await submit(stream.finish())
                    await work.put(None)
                    return

        async def submit(items: Sequence[Chunk | SectionEnd]) -> None:
            for item in items:
                await work.put((item, source.submit(item.samples) if isinstance(item, Chunk) else None))

        async def tell() -> None:
            metrics = self._serving.metrics
            while (taken := await work.get()) is not None:
                item, future = taken
                if future is None:
                    result = stream.apply(item)
                else:
                    clip, frame, _ = await asyncio.wrap_future(future)
                    result = stream.apply(item, clip[0], frame[0])
                metrics.audio.labels("stream").inc(max(0.0, result.end - result.start))
                await self.send(live_messages(result, stream.labels, top=self._top, posteriors=self._frames))
            await self.send([{"type": "end", "duration": stream.received_seconds}])

        reading = asyncio.create_task(self._read(inbox))
        others = [asyncio.create_task(cut()), asyncio.create_task(tell())]
        try:
            await _all([reading, *others], until=others[1])
        except AudioError as error:
            raise _CloseError(_DATA, "bad_samples", str(error)) from None
        except MemoryError:
            raise _CloseError(_LATER, "no_memory", "the server has too little memory; try again later") from None
        finally:
            source.close()
        await self.close(self._ended, "the server is being stopped" if self._ended == _GOING else "")

    async def send(self, messages: Sequence[dict[str, Any]]) -> None:
        """Send messages.

        Raises:
            _LeftError: the client is gone or does not read.
        """
        try:
            async with asyncio.timeout(_SEND_SECONDS):
                for message in messages:
                    await self._socket.send_text(json.dumps(message, ensure_ascii=False))
        except (TimeoutError, RuntimeError, OSError):
            raise _LeftError from None
        except Exception as error:
            # What the server raises for a connection that is closed is no class of its interface.
            if type(error).__name__ in ("ClientDisconnected", "WebSocketDisconnect"):
                raise _LeftError from None
            raise

    async def close(self, code: int, reason: str) -> None:
        """Close the connection."""
        encoded = reason.encode()[:120]  # a frame of control has no more room
        with contextlib.suppress(TimeoutError, RuntimeError):
            async with asyncio.timeout(_SEND_SECONDS):
                await self._socket.close(code, encoded.decode("utf-8", "ignore"))

    def abort(self) -> None:
        """Close the connection of a client that does not read: a last word, and no waiting for it to be taken."""
        give_up = self._socket.scope["state"].get("give_up")
        if give_up is not None:
            give_up(_LATER, "messages were not read")

    async def _read(self, inbox: _Inbox) -> None:
        """Read frames until the end, leaving the client to wait where too much does already."""
        limit = self._serving.settings.max_wait
        stopping = asyncio.create_task(self._serving.stopping.wait())
        try:
            while True:
                receiving = asyncio.create_task(self._socket.receive())
                try:
                    await asyncio.wait(
                        (receiving, stopping), timeout=_IDLE_SECONDS, return_when=asyncio.FIRST_COMPLETED
                    )
                    if stopping.done():
                        self._ended = _GOING
                        inbox.put("end")
                        return
                    if not receiving.done():
                        raise _CloseError(
                            _POLICY, "idle", f"nothing came for {_IDLE_SECONDS:g} s; send samples, gaps or end"
                        )
                    if self._take(receiving.result(), inbox):
                        return
                finally:
                    receiving.cancel()
                if self._max_delay is not None:
                    if inbox.full or inbox.seconds > self._max_delay:
                        self._serving.metrics.gaps.inc(inbox.drop())
                    continue
                while inbox.full:
                    if inbox.age() > limit:
                        self._serving.metrics.gaps.inc(inbox.drop())
                        break
                    inbox.changed.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(limit / 4):
                            await inbox.changed.wait()
        finally:
            stopping.cancel()

    def _take(self, message: Any, inbox: _Inbox) -> bool:
        """Put a message into the inbox; return whether it was the last one."""
        if message["type"] == "websocket.disconnect":
            raise _LeftError
        data = message.get("bytes")
        if data is None:
            return self._take_text(message.get("text") or "", inbox)
        if len(data) > MAX_FRAME:
            raise _CloseError(
                _BIG, "frame_too_large", f"a frame has {len(data)} bytes, the limit is {MAX_FRAME}; send shorter ones"
            )
        width = _FORMATS[self._format]
        if len(data) % width:
            raise _CloseError(
                _DATA,
                "bad_frame",
                f"a frame of {len(data)} bytes is no whole number of samples of {width} bytes ({self._format}); "
                "send whole mono samples, or name their format",
            )
        if self._format == "s16le":
            samples = np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)
        else:
            samples = np.frombuffer(data, "<f4").astype(np.float32)
        if len(samples):
            inbox.put("audio", samples)
        return False

    def _take_text(self, text: str, inbox: _Inbox) -> bool:
        try:
            message = json.loads(text) if len(text) <= 1000 else None
        except ValueError:
            message = None
        if not isinstance(message, dict):
            message = {}
        kind = message.get("type")
        if kind == "end":
            inbox.put("end")
            return True
        if kind == "gap":
            seconds = message.get("seconds")
            if isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 < seconds <= 1e6:
                inbox.put("gap", float(seconds))
                return False
            raise _CloseError(_POLICY, "bad_message", "a gap needs its seconds, more than 0, at most 1000000")
        raise _CloseError(
            _POLICY,
            "bad_message",
            f"the text {text[:60]!r} is not known; send samples as binary frames, and as text "
            '{"type": "gap", "seconds": 2.5} or {"type": "end"}',
        )

    def _read_parameters(self) -> None:
        """Read the address.

        Raises:
            _CloseError: something is wrong with it.
        """
        given = self._socket.query_params
        for name in given:
            if name not in _PARAMETERS:
                known = ", ".join(_PARAMETERS[:-1])
                raise _bad(f"unknown parameter {name[:40]!r}{nearest(name[:40], _PARAMETERS)}; known: {known}")
        if "sample_rate" not in given:
            raise _bad("the parameter sample_rate is missing; name the Hz of the samples, such as sample_rate=48000")
        self._format = given.get("format", "s16le")
        if self._format not in _FORMATS:
            raise _bad(f"format {self._format[:40]!r} is not known; expected {' or '.join(_FORMATS)}, mono")
        if given.get("frames", "false") not in ("true", "false"):
            raise _bad(f"frames {given['frames'][:40]!r}: expected true or false")
        self._frames = given.get("frames") == "true"
        self._top = int(_number(given.get("top", "5"), "top", 0, 1000))
        hop = _number(given.get("hop", str(self._serving.settings.hop_seconds)), "hop", _LEAST_HOP, 60)
        rate = int(_number(given["sample_rate"], "sample_rate", 4000, 384_000, whole=True))
        delay = given.get("max_delay")
        self._max_delay = None if delay is None else _number(delay, "max_delay", 0.5, 3600)
        try:
            self._model = self._serving.model(given.get("model"))
            decoding = decoding_of(self._model, given.get("operating_point"))
            self._live = LiveStream(self._model.config, rate, hop_seconds=hop, decoding=decoding)
        except ApiError as error:
            raise _CloseError(_POLICY, error.code, error.message) from None
        except (UsageError, ConfigError) as error:
            raise _bad(str(error)) from None


def _bad(message: str) -> _CloseError:
    return _CloseError(_POLICY, "bad_parameter", message)


def _number(text: str, name: str, low: float, high: float, whole: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise _bad(f"{name} {text[:40]!r}: expected {kind} from {low:g} to {high:g}")
    return value


async def _all(tasks: "Sequence[asyncio.Task[None]]", until: "asyncio.Task[None]") -> None:
    """Wait for ``until``, or the first of the tasks that fails; then end all of them."""
    waiting = set(tasks)
    try:
        while not until.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
