"""Bodies of requests, into temporary files that have no name: limits hold while they are read.

A body is one recording as it is, or ``multipart/form-data`` with one or several parts called ``file``. Nothing is kept
in memory but the piece that has just arrived. A client that sends nothing for a while, or less than a trickle, is
refused.
"""

import asyncio
import re
import tempfile
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any

from htsat.apps.serve.guard import ApiError, Ticket, header
from htsat.apps.serve.settings import ServeSettings

#: seconds without a byte
_IDLE = 5.0
#: bytes a second that a body must arrive with, after so many seconds
_TRICKLE, _TRICKLE_AFTER = 4_000, 5.0
#: seconds after which the slot of a request is given to others while its body arrives
_PARK_AFTER = 0.5
#: of one part of a multipart body
_MAX_HEADERS, _MAX_HEADER_BYTES = 8, 4096
#: characters of a name that answers repeat
_MAX_NAME = 255
#: bytes that a multipart body may have beside its parts, for each
_PART_OVERHEAD = 2 * _MAX_HEADERS * _MAX_HEADER_BYTES

_HOW = "send the recording itself (Content-Type: application/octet-stream or audio/...) or multipart/form-data"


class ClientLeftError(Exception):
    """The connection was closed before the body was complete."""


@dataclass(frozen=True, eq=False)
class Upload:
    """A recording that came with a request.

    Attributes:
        file: its bytes; a temporary file without a name, at its beginning.
        name: as the client calls it.
        size: bytes.
    """

    file: IO[bytes]
    name: str
    size: int


async def read_uploads(
    receive: Callable[[], Awaitable[Any]],
    headers: Iterable[tuple[bytes, bytes]],
    name: str | None,
    settings: ServeSettings,
    ticket: Ticket,
) -> list[Upload]:
    """Read the body of a request.

    Args:
        receive: of ASGI.
        headers: of the request, names in small letters.
        name: what the client calls a recording that is sent as it is.
        settings: limits.
        ticket: of the request, parked while a body takes long.

    Raises:
        ApiError: 400, 408, 411, 413, 415 or 422; 503 if the disk is full.
        ClientLeftError: nobody waits for an answer.
    """
    headers = list(headers)
    declared = header(headers, b"content-length")
    if declared is None and header(headers, b"transfer-encoding") is None:
        raise ApiError(411, "length_required", f"the request has no body; {_HOW}, with its Content-Length or chunked")
    sink = _sink(headers, name, settings)
    try:
        if declared is not None and int(declared) > settings.max_bytes + sink.overhead:
            raise _too_large(settings)
        await _read(receive, sink, settings, ticket)
        return sink.finish()
    except OSError as error:
        sink.close()
        reason = error.strerror or str(error)
        message = f"the server cannot keep the recording ({reason}); try again later"
        raise ApiError(503, "no_space", message, {"Retry-After": "60"}) from None
    except BaseException:
        sink.close()
        raise


async def _read(receive: Callable[[], Awaitable[Any]], sink: "_Sink", settings: ServeSettings, ticket: Ticket) -> None:
    loop = asyncio.get_running_loop()
    start, received, more = loop.time(), 0, True
    parking = loop.call_later(_PARK_AFTER, ticket.park)
    try:
        while more:
            elapsed = loop.time() - start
            if elapsed > _TRICKLE_AFTER and received < _TRICKLE * (elapsed - _TRICKLE_AFTER):
                raise ApiError(
                    408,
                    "too_slow",
                    f"{received} bytes came in {elapsed:.0f} s; send at least {_TRICKLE // 1000} kB a second, "
                    "or a shorter or more compressed recording",
                )
            try:
                async with asyncio.timeout(_IDLE):
                    message = await receive()
            except TimeoutError:
                raise _stalled(received) from None
            if message["type"] == "http.disconnect":
                raise ClientLeftError
            body, more = message.get("body", b""), message.get("more_body", False)
            received += len(body)
            if received > settings.max_bytes + sink.overhead:
                raise _too_large(settings)
            if body:
                sink.write(body)
    finally:
        parking.cancel()
    if not received:
        raise ApiError(400, "empty_body", f"the body is empty; {_HOW}")
    await ticket.resume()


def _stalled(received: int) -> ApiError:
    return ApiError(
        408,
        "too_slow",
        f"nothing came for {_IDLE:g} s after {received} bytes; send the whole body without pauses, "
        "and no shorter one than Content-Length says",
    )


def _too_large(settings: ServeSettings) -> ApiError:
    return ApiError(
        413,
        "too_large",
        f"the body is larger than the limit of {settings.max_bytes / 1e6:g} MB; compress the recording (FLAC, Opus) "
        "or cut it into parts",
    )


def _temporary() -> IO[bytes]:
    return tempfile.TemporaryFile(prefix="htsat-", buffering=0)


def _shown(name: str | None) -> str:
    """Return a name for answers: without a path and of bounded length."""
    base = re.split(r"[/\\]", name or "")[-1].strip()
    return "".join(c for c in base if c.isprintable())[:_MAX_NAME] or "recording"


class _Sink:
    """Takes a body that is one recording."""

    overhead = 0

    def __init__(self, name: str | None) -> None:
        self._files = [_temporary()]
        self._names = [_shown(name)]
        self._sizes = [0]

    def write(self, data: bytes) -> None:
        """Take the next piece."""
        _write_all(self._files[-1], data)
        self._sizes[-1] += len(data)

    def finish(self) -> list[Upload]:
        """Return what came."""
        for file in self._files:
            file.seek(0)
        return [Upload(*item) for item in zip(self._files, self._names, self._sizes, strict=True)]

    def close(self) -> None:
        """Drop what came."""
        for file in self._files:
            file.close()


def _write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


class _MultipartSink(_Sink):
    """Takes the parts of multipart/form-data."""

    def __init__(self, boundary: str, max_files: int, max_bytes: int) -> None:
        from python_multipart.exceptions import MultipartParseError
        from python_multipart.multipart import MultipartParser

        self._files, self._names, self._sizes = [], [], []
        self._error: type[Exception] = MultipartParseError
        self._max_files, self._max_bytes = max_files, max_bytes
        self.overhead = max_files * _PART_OVERHEAD
        self._field, self._value = b"", b""
        self._disposition: str | None = None
        self._done = False
        callbacks = {
            "on_part_begin": self._begin,
            "on_part_data": self._data,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_end": self._end,
        }
        self._parser: Any = MultipartParser(
            boundary.encode("latin-1"),
            callbacks,  # type: ignore[arg-type]
            max_header_count=_MAX_HEADERS,
            max_header_size=_MAX_HEADER_BYTES,
        )

    def write(self, data: bytes) -> None:
        if self._done:
            return  # an epilogue, which the format allows
        try:
            self._parser.write(data)
        except self._error as error:
            raise ApiError(
                400, "bad_multipart", f"the multipart body is malformed ({error}); let a library make it"
            ) from None

    def finish(self) -> list[Upload]:
        if not self._done:
            raise ApiError(400, "bad_multipart", "the multipart body ends before its last boundary; send all of it")
        if not self._files:
            raise ApiError(400, "no_file", "the multipart body has no part; send recordings in parts called 'file'")
        return super().finish()

    def _begin(self) -> None:
        if len(self._files) >= self._max_files:
            raise ApiError(
                413, "too_many_parts", f"the body has more than {self._max_files} parts; send fewer recordings at once"
            )
        self._disposition = None

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value.decode("utf-8", "replace")
        self._field, self._value = b"", b""

    def _headers_finished(self) -> None:
        from python_multipart.multipart import parse_options_header

        # The parser of options knows latin-1 alone, in which every byte is one character.
        raw = (self._disposition or "").encode("utf-8").decode("latin-1")
        kind, options = parse_options_header(raw)
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or field != "file":
            raise ApiError(
                422, "unexpected_part", f"a part is called {field[:40]!r}; send recordings in parts called 'file'"
            )
        self._files.append(_temporary())
        self._names.append(_shown(options.get(b"filename", b"").decode("utf-8", "replace")))
        self._sizes.append(0)

    def _data(self, data: bytes, start: int, end: int) -> None:
        _write_all(self._files[-1], memoryview(data)[start:end])
        self._sizes[-1] += end - start

    def _end(self) -> None:
        self._done = True


def _sink(headers: list[tuple[bytes, bytes]], name: str | None, settings: ServeSettings) -> _Sink:
    """Return what takes a body of the type that the headers name.

    Raises:
        ApiError: 400 or 415.
    """
    given = header(headers, b"content-type")
    coding = (header(headers, b"content-encoding") or "identity").strip().lower()
    if coding != "identity":
        raise ApiError(415, "content_encoding", f"Content-Encoding {coding[:40]!r} is not read; send the body as it is")
    if given is None:
        raise ApiError(415, "unsupported_type", f"the request has no Content-Type; {_HOW}")
    kind, _, parameters = given.partition(";")
    kind = kind.strip().lower()
    if kind == "multipart/form-data":
        found = re.search(r'(?:^|;)\s*boundary=(?:"([^"]+)"|([^\s";]+))', parameters, re.IGNORECASE)
        boundary = found and (found[1] or found[2])
        if not boundary or len(boundary) > 70:
            raise ApiError(
                400, "bad_multipart", "multipart/form-data needs a boundary of 1 to 70 characters in Content-Type"
            )
        return _MultipartSink(boundary, settings.max_files, settings.max_bytes)
    if kind.startswith(("audio/", "video/")) or kind in ("application/octet-stream", "application/ogg"):
        return _Sink(name)
    raise ApiError(415, "unsupported_type", f"Content-Type {kind[:80]!r} is no recording; {_HOW}")
