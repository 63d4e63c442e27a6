"""Asking ``htsat serve`` from Python: ``Client``.

    client = htsat.Client("http://127.0.0.1:8000")
    for event in client.detect("street.ogg").events:
        print(event.event_label, event.onset, event.offset)

Nothing but the standard library and NumPy is needed, but for ``Client.stream``, which needs the package websockets
(``pip install 'htsat[serve]'``). A server that is busy is asked again when it says.
"""

import base64
import contextlib
import email.utils
import http.client
import io
import json
import os
import random
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self
from urllib.parse import quote, urlencode, urlsplit

import numpy as np
from numpy.typing import NDArray

from htsat.errors import HtsatError, UsageError
from htsat.events import Event, Tag

Array = NDArray[np.float32]
#: a file name, the bytes of a recording, or (waveform, sample_rate)
ClientSource = str | os.PathLike[str] | bytes | tuple[NDArray[Any], int]

#: answers after which the same request may do better
_BUSY = (429, 503)
#: bytes of an answer, at most: a day of posteriors of all classes
_MAX_ANSWER = 1 << 30
#: samples of a waveform sent at once
_BLOCK = 1 << 16


class ServerError(HtsatError):
    """A server cannot be reached, or does not do what it was asked for.

    Attributes:
        status: of HTTP; None: there was no answer.
        code: the server's word for what is wrong, such as ``not_audio``; None: it has none.
    """

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Tagged:
    """What sounds in a recording.

    Attributes:
        file: its name.
        duration: seconds.
        model: that listened.
        tags: most probable first.
    """

    file: str
    duration: float
    model: str
    tags: list[Tag]


@dataclass(frozen=True, eq=False)
class Posteriors:
    """Framewise posteriors of some classes.

    Attributes:
        labels: of the classes.
        frame_seconds: length of a frame; the last one may be shorter.
        values: (num_frames, num_labels) float32 in [0, 1].
    """

    labels: list[str]
    frame_seconds: float
    values: Array


@dataclass(frozen=True, eq=False)
class Detected:
    """What sounds in a recording, and when.

    Attributes:
        file: its name.
        duration: seconds.
        model: that listened.
        events: in time order.
        tags: most probable first.
        posteriors: of the classes with the largest ones, if they were asked for.
    """

    file: str
    duration: float
    model: str
    events: list[Event]
    tags: list[Tag]
    posteriors: Posteriors | None


class Client:
    """Asks a server (``htsat serve``) what sounds in recordings and streams.

    Args:
        url: of the server; may have a path, behind a proxy.
        token: that the server wants; None: ``HTSAT_TOKEN``, if it is set.
        timeout: seconds without any answer after which a request has failed.
        max_wait: seconds in all that a request may wait for a busy server.

    Raises:
        UsageError: no address of a server.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        token: str | None = None,
        timeout: float = 120.0,
        max_wait: float = 60.0,
    ) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query:
            raise UsageError(f"{url}: is no address of a server; expected one such as http://127.0.0.1:8000")
        if parts.username is not None:
            raise UsageError("a password does not belong into the address of a server; give token=")
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, port
        self._netloc, self._path = parts.netloc, parts.path.rstrip("/")
        self._token = token or os.environ.get("HTSAT_TOKEN")
        self._timeout, self._max_wait = timeout, max_wait

    @property
    def url(self) -> str:
        """Address of the server."""
        return f"http{'s' * self._secure}://{self._netloc}{self._path}"

    def tag(self, source: ClientSource, *, model: str | None = None, top: int = 10, name: str | None = None) -> Tagged:
        """Ask what sounds in a recording.

        Args:
            source: path, bytes of a file, or (waveform, sample_rate) as ``Predictor.predict`` takes it.
            model: by its name on the server; None: the server's.
            top: how many tags, at most.
            name: what the answer calls the recording; None: the name of the file.

        Raises:
            ServerError: the server cannot be reached, does not take the recording, or is busy for too long.
            UsageError: the recording cannot be read here.
        """
        answer = self._post("/v1/tag", source, name, {"model": model, "top": top})
        with _expecting(self.url):
            return Tagged(answer["file"], float(answer["duration"]), answer["model"], _tags(answer))

    def detect(
        self,
        source: ClientSource,
        *,
        model: str | None = None,
        operating_point: str | None = None,
        top: int = 5,
        posteriors: int = 0,
        name: str | None = None,
    ) -> Detected:
        """Ask what sounds when in a recording.

        Args:
            source: see ``tag``.
            model: the same.
            operating_point: settings that the model has by name; None: the model's own.
            top: how many tags, at most.
            posteriors: of how many classes, those with the largest ones, to bring the framewise posteriors.
            name: see ``tag``.

        Raises:
            ServerError, UsageError: see ``tag``.
        """
        query = {"model": model, "operating_point": operating_point, "top": top, "posteriors": posteriors or None}
        answer = self._post("/v1/detect", source, name, query)
        with _expecting(self.url):
            events = [Event(e["event_label"], e["onset"], e["offset"], e["probability"]) for e in answer["events"]]
            values = answer.get("posteriors")
            return Detected(
                answer["file"],
                float(answer["duration"]),
                answer["model"],
                events,
                _tags(answer),
                None if values is None else _posteriors(values),
            )

    def models(self) -> list[dict[str, Any]]:
        """Return what the server says of its models: names, labels, time steps, operating points.

        Raises:
            ServerError: see ``tag``.
        """
        answer = self._request("GET", "/v1/models", None, {})
        with _expecting(self.url):
            return list(answer["models"])

    def ready(self) -> bool:
        """Return whether the server is there and takes requests."""
        try:
            status, _, data = self._once("GET", "/readyz", None, self._headers())
        except ServerError:
            return False
        del data
        return status == 200

    def stream(
        self,
        sample_rate: int,
        *,
        model: str | None = None,
        hop: float | None = None,
        operating_point: str | None = None,
        sample_format: Literal["s16le", "f32le"] = "s16le",
        frames: bool = False,
        top: int = 5,
    ) -> "Stream":
        """Open a stream: samples go out in blocks of any size, events come back while they happen.

            with client.stream(48_000) as stream:
                for block in blocks:            # mono floats
                    stream.send(block)
                stream.end()
                for message in stream:
                    ...

        Args:
            sample_rate: Hz of the samples.
            model: see ``tag``.
            hop: seconds between the times at which is listened; None: the server's.
            operating_point: see ``detect``.
            sample_format: how samples travel: 16-bit integers, or floats, which are twice as large.
            frames: also bring all framewise posteriors.
            top: how many tags, at most, each time.

        Raises:
            ServerError: the server cannot be reached or does not want the stream.
            UsageError: the package websockets is not installed.
        """
        query = {
            "model": model,
            "sample_rate": sample_rate,
            "format": sample_format,
            "hop": hop,
            "operating_point": operating_point,
            "frames": "true" if frames else None,
            "top": top,
        }
        url = f"ws{self.url[4:]}{_with_query('/v1/stream', query)}"
        return Stream(url, self._headers(), self._timeout, sample_format)

    # -- requests --

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def _post(self, path: str, source: ClientSource, name: str | None, query: dict[str, Any]) -> dict[str, Any]:
        if isinstance(source, (str, os.PathLike)):
            file = Path(source)
            try:
                body: BinaryIO = open(file, "rb")  # noqa: SIM115 - closed below
            except OSError as error:
                raise UsageError(f"{file}: cannot be read ({error.strerror}); check the path") from None
            name = name or file.name
        elif isinstance(source, tuple):
            body = io.BytesIO(_wav(*source))
        else:
            body = io.BytesIO(source)
        with body:
            answer: dict[str, Any] = self._request("POST", path, body, {**query, "name": name})
            return answer

    def _request(self, method: str, path: str, body: BinaryIO | None, query: dict[str, Any]) -> Any:
        """Send a request, again while the server is busy; return the parsed answer."""
        waited, wait = 0.0, 0.5
        while True:
            status, headers, data = self._once(method, _with_query(path, query), body, self._headers())
            if status == 200:
                try:
                    return json.loads(data)
                except ValueError:
                    raise ServerError(f"{self.url}: its answer is no JSON; is it htsat serve?", status) from None
            error = _server_error(self.url, status, data)
            pause = _retry_after(headers)
            pause = wait * random.uniform(0.5, 1) if pause is None else pause
            if status not in _BUSY or waited + pause > self._max_wait:
                raise error
            time.sleep(pause)
            waited, wait = waited + max(pause, 0.01), wait * 2

    def _once(
        self, method: str, target: str, body: BinaryIO | None, headers: dict[str, str]
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Send one request; return status, headers and body of the answer."""
        connection: http.client.HTTPConnection
        if self._secure:
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout, context=context)
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        headers = {"Accept": "application/json", **headers}
        if body is not None:
            body.seek(0, os.SEEK_END)
            headers |= {"Content-Type": "application/octet-stream", "Content-Length": str(body.tell())}
            body.seek(0)
        with contextlib.closing(connection):
            try:
                # A server that refuses a body answers before it has taken all of it: the answer is what counts.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    connection.request(method, self._path + target, body, headers)
                response = connection.getresponse()
                data = response.read(_MAX_ANSWER)
            except TimeoutError:
                raise ServerError(
                    f"{self.url}: no answer in {self._timeout:g} s; give more time or less sound"
                ) from None
            except (OSError, http.client.HTTPException) as error:
                raise ServerError(
                    f"{self.url}: cannot be reached ({_reason(error)}); is htsat serve running?"
                ) from None
            return response.status, response.headers, data


class Stream:
    """A stream of samples to a server, and of messages back. A context manager; iterating gives the messages.

    The messages are those of ``htsat listen --json``: ``start``, ``event`` (``open``, ``update``, ``close``),
    ``progress``, ``gap``, ``frames`` if they were asked for, and ``end``. One thread may send while another iterates.

    Attributes:
        start: the first message: model, labels, hop, delay and time steps.
    """

    def __init__(
        self, url: str, headers: dict[str, str], timeout: float, sample_format: Literal["s16le", "f32le"]
    ) -> None:
        try:
            from websockets.exceptions import InvalidHandshake, InvalidStatus, WebSocketException
            from websockets.sync.client import connect
        except ImportError:
            raise UsageError("a stream needs websockets, which is not installed: pip install 'htsat[serve]'") from None
        if sample_format not in ("s16le", "f32le"):
            raise UsageError(f"unknown sample format {sample_format!r}; expected s16le or f32le")
        self._failure: type[Exception] = WebSocketException
        self._where = url.partition("?")[0]
        self._timeout, self._integers = timeout, sample_format == "s16le"
        self._messages: deque[dict[str, Any]] = deque()
        self._done = False
        self._reading = threading.Lock()
        self._open = contextlib.ExitStack()
        try:
            self._socket = self._open.enter_context(
                connect(
                    url, additional_headers=headers, open_timeout=timeout, close_timeout=5, max_size=1 << 26, proxy=None
                )
            )
        except InvalidStatus as error:
            response = error.response
            raise _server_error(self._where, response.status_code, bytes(response.body or b"")) from None
        except (OSError, InvalidHandshake, TimeoutError) as error:
            raise ServerError(f"{self._where}: cannot be reached ({_reason(error)}); is htsat serve running?") from None
        try:
            first = self._awaited()
            if first is None or first.get("type") != "start":
                raise ServerError(f"{self._where}: its answer is not that of htsat serve")
        except BaseException:
            self._open.close()
            raise
        self.start = first

    def __enter__(self) -> Self:
        """Return the stream."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the stream."""
        self.close()

    def send(self, waveform: NDArray[Any]) -> None:
        """Send the next samples.

        Args:
            waveform: (num_samples,) mono; floats from -1 to 1 or int16.

        Raises:
            ServerError: the server ended the stream.
        """
        values = np.asarray(waveform)
        if values.ndim != 1:
            raise ValueError(f"expected mono samples of shape (num_samples,), got {values.shape}")
        if values.dtype == np.int16 and not self._integers:
            values = values / np.float32(32768)
        elif values.dtype != np.int16 and self._integers:
            values = np.round(np.clip(values * np.float64(32768), -32768, 32767))
        values = values.astype("<i2" if self._integers else "<f4")
        for start in range(0, len(values), _BLOCK):
            self._send(values[start : start + _BLOCK].tobytes())
            # What came meanwhile is taken, so that nobody waits for the other.
            self._take()

    def gap(self, seconds: float) -> None:
        """Say that seconds are missing here.

        Raises:
            ServerError: see ``send``.
        """
        self._send(json.dumps({"type": "gap", "seconds": seconds}))

    def end(self) -> None:
        """Say that no more samples come; the last messages are still to be read.

        Raises:
            ServerError: see ``send``.
        """
        self._send(json.dumps({"type": "end"}))

    def _send(self, data: str | bytes) -> None:
        try:
            self._socket.send(data)
        except (self._failure, OSError) as error:
            self._take()  # the server may have said why
            raise ServerError(f"{self._where}: the stream was ended ({_reason(error)})") from None

    def _take(self) -> None:
        """Keep the messages that are there, unless another thread reads them."""
        if not self._reading.acquire(blocking=False):
            return
        try:
            with contextlib.suppress(TimeoutError):
                while (message := self._next(0)) is not None:
                    self._messages.append(message)
        finally:
            self._reading.release()

    def _next(self, seconds: float) -> dict[str, Any] | None:
        """Return the next message; None behind the last one, TimeoutError if none comes in time."""
        if self._done:
            return None
        try:
            text = self._socket.recv(seconds)
        except TimeoutError:
            raise
        except (self._failure, OSError) as error:
            self._done = True
            raise ServerError(f"{self._where}: the stream was ended ({_reason(error)})") from None
        with _expecting(self._where):
            message: dict[str, Any] = json.loads(text)
            kind = message["type"]
        self._done = kind in ("end", "error")
        if kind == "error":
            raise ServerError(f"{self._where}: {message.get('message', 'the stream failed')}", code=message.get("code"))
        return message

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the messages as they come, up to the last one.

        Raises:
            ServerError: the server says what is wrong, the connection broke, or nothing came for too long.
        """
        while True:
            with self._reading:
                message = self._messages.popleft() if self._messages else self._awaited()
            if message is None:
                return
            yield message

    def _awaited(self) -> dict[str, Any] | None:
        try:
            return self._next(self._timeout)
        except TimeoutError:
            raise ServerError(f"{self._where}: no message in {self._timeout:g} s") from None

    def close(self) -> None:
        """Close the connection. May be called twice."""
        self._done = True
        self._open.close()


def _with_query(path: str, query: dict[str, Any]) -> str:
    given = {key: value for key, value in query.items() if value is not None}
    return f"{path}?{urlencode(given, quote_via=quote)}" if given else path


@contextlib.contextmanager
def _expecting(where: str) -> Iterator[None]:
    """Turn what an answer lacks into a ServerError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(f"{where}: its answer is not that of htsat serve ({error!r})") from None


def _tags(answer: dict[str, Any]) -> list[Tag]:
    return [Tag(tag["label"], float(tag["probability"])) for tag in answer["tags"]]


def _posteriors(values: dict[str, Any]) -> Posteriors:
    labels = list(values["labels"])
    data = np.frombuffer(base64.b64decode(values["data"], validate=True), "<f4")
    shaped = data.reshape(int(values["num_frames"]), len(labels)).astype(np.float32)
    return Posteriors(labels, float(values["frame_seconds"]), shaped)


def _wav(waveform: NDArray[Any], sample_rate: int) -> bytes:
    """Return samples as a WAV file of floats."""
    values = np.asarray(waveform)
    if values.dtype.kind == "i":
        values = values / np.float64(2 ** (8 * values.dtype.itemsize - 1))
    if values.dtype.kind != "f" or values.ndim not in (1, 2) or not values.size:
        raise UsageError(
            f"expected a waveform of (num_samples,) or (num_samples, channels), floats or integers, got "
            f"{values.dtype} of shape {values.shape}"
        )
    if values.ndim == 2 and values.shape[0] < values.shape[1]:
        values = values.T
    channels = 1 if values.ndim == 1 else values.shape[1]
    data = np.ascontiguousarray(values, dtype="<f4").tobytes()
    format = struct.pack("<HHIIHH", 3, channels, sample_rate, 4 * channels * sample_rate, 4 * channels, 32)
    size = 4 + 8 + len(format) + 8 + len(data)
    return b"".join((
        b"RIFF", struct.pack("<I", min(size, 0xFFFFFFFF)), b"WAVEfmt ", struct.pack("<I", len(format)), format,
        b"data", struct.pack("<I", min(len(data), 0xFFFFFFFF)), data,
    ))  # fmt: skip


def _retry_after(headers: http.client.HTTPMessage) -> float | None:
    """Return the seconds that a server wants to be left alone: a number or a date."""
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    with contextlib.suppress(ValueError, TypeError, IndexError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _server_error(where: str, status: int, data: bytes) -> ServerError:
    """Return the error that an answer is, with the server's own words where it has some."""
    code = None
    message = f"answers {status} {http.client.responses.get(status, '')}".rstrip()
    with contextlib.suppress(KeyError, TypeError, ValueError):
        error = json.loads(data)["error"]
        message, code = str(error["message"]), str(error["code"])
    return ServerError(f"{where}: {message}", status, code)


def _reason(error: Exception) -> str:
    if isinstance(error, socket.gaierror):
        return "no such host"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
