"""The HTTP API: what can be asked, what is answered, and what every answer carries."""

import asyncio
import base64
import contextlib
import dataclasses
import html
import json
import logging
import mimetypes
import time
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs

import numpy as np
from fastapi import FastAPI, Query, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from htsat import __version__
from htsat.apps.serve.engine import Model, Serving, decoding_of, is_no_audio, is_too_long
from htsat.apps.serve.guard import COOKIE, ApiError, Hosts, bearer, cookie_of, header, same_origin
from htsat.apps.serve.metrics import CONTENT_TYPE
from htsat.apps.serve.streams import listen
from htsat.apps.serve.uploads import ClientLeftError, Upload, read_uploads
from htsat.config import ClassDecoding, DecodingConfig
from htsat.errors import AudioError, HtsatError, nearest
from htsat.predict import Prediction

_log = logging.getLogger(__name__)

NDJSON = "application/x-ndjson"
#: seconds in which a client must take the next piece of an answer
_SEND_SECONDS = 20.0
#: bytes of an answer that wait for it
_PIECE = 1 << 18
#: bytes of framewise posteriors in an answer
_MOST_POSTERIORS = 24_000_000
#: bytes of the headers of a request
_MOST_HEADERS = 32_000
#: what is open without a token: whether the process lives, which says nothing else
OPEN = frozenset({"/healthz"})

#: for every answer
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"microphone=(self), camera=(), geolocation=()"),
)
#: the page plays and draws what it has in memory (blob:), and positions what it draws (style)
_POLICY = (
    "default-src 'self'; connect-src 'self' blob:; img-src 'self' blob: data:; media-src 'self' blob: data:; "
    "worker-src 'self' blob:; style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)


# ---------------------------------------------------------------------------------------------------
# what is answered


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorText(_Answer):
    """What went wrong."""

    code: str
    message: str


class ErrorAnswer(_Answer):
    """Any answer that is not the one asked for."""

    error: ErrorText


class TagText(_Answer):
    """A label of a whole recording."""

    label: str
    probability: float = Field(ge=0, le=1)


class EventText(_Answer):
    """A sound from when to when, in seconds."""

    event_label: str
    onset: float = Field(ge=0)
    offset: float
    probability: float = Field(ge=0, le=1)


class PosteriorsText(_Answer):
    """Framewise posteriors of the labels that are loudest in them."""

    frame_seconds: float
    num_frames: int
    labels: list[str]
    encoding: Literal["base64 of little-endian float32, (num_frames, num_labels) row-major"]
    data: str


class TagAnswer(_Answer):
    """What sounds in a recording."""

    file: str
    duration: float
    model: str
    tags: list[TagText]


class DetectAnswer(TagAnswer):
    """What sounds in a recording, and when."""

    events: list[EventText]
    posteriors: PosteriorsText | None = None


class FailedFile(_Answer):
    """A recording of several that could not be heard."""

    file: str
    error: ErrorText


class TagAnswers(_Answer):
    """Of several recordings, in their order."""

    results: list[TagAnswer | FailedFile]


class DetectAnswers(_Answer):
    """Of several recordings, in their order."""

    results: list[DetectAnswer | FailedFile]


class ClassText(_Answer):
    """How posteriors become events."""

    threshold: float
    threshold_off: float
    median_seconds: float
    min_duration: float
    min_gap: float


class DecodingText(ClassText):
    """The same, with what differs for some labels."""

    per_class: dict[str, ClassText]


class ModelText(_Answer):
    """A model that can be asked."""

    name: str
    labels: list[str]
    sample_rate: int
    chunk_seconds: float
    frame_seconds: float
    default: bool
    operating_points: dict[str, DecodingText]
    operating_point: str | None
    decoding: DecodingText


class ModelsAnswer(_Answer):
    """All of them."""

    models: list[ModelText]


class ReadyModel(_Answer):
    """A model and what runs it."""

    name: str
    backend: str


class ReadyAnswer(_Answer):
    """Whether requests are answered."""

    status: Literal["ready", "stopping"]
    models: list[ReadyModel]
    sandbox: str


class HealthAnswer(_Answer):
    """The process lives."""

    status: Literal["ok"]


class _Query(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="name of a model, see /v1/models; none: the default", max_length=80)
    name: str | None = Field(None, description="what to call a recording sent as it is", max_length=255)


class TagQuery(_Query):
    """Parameters of ``/v1/tag``."""

    top: int = Field(10, ge=1, le=1000, description="tags in the answer")


class DetectQuery(_Query):
    """Parameters of ``/v1/detect``."""

    top: int = Field(5, ge=1, le=1000, description="tags in the answer")
    operating_point: str | None = Field(None, description="settings that the model has by name", max_length=80)
    posteriors: int | None = Field(
        None, ge=1, le=1000, description="also framewise posteriors, of so many labels that are largest in them"
    )


def _class_text(decoding: ClassDecoding) -> dict[str, Any]:
    off = decoding.threshold if decoding.threshold_off is None else decoding.threshold_off
    return {
        "threshold": decoding.threshold,
        "threshold_off": off,
        "median_seconds": decoding.median_seconds,
        "min_duration": decoding.min_duration,
        "min_gap": decoding.min_gap,
    }


def _decoding_text(decoding: DecodingConfig) -> dict[str, Any]:
    per_class = {label: _class_text(decoding.for_label(label)) for label in decoding.per_class}
    return {**_class_text(decoding), "per_class": per_class}


def _model_text(model: Model, default: bool) -> dict[str, Any]:
    config = model.config
    points = {name: _decoding_text(point) for name, point in config.operating_points.items()}
    here = [name for name, point in config.operating_points.items() if point == config.decoding]
    return {
        "name": model.name,
        "labels": model.labels,
        "sample_rate": config.frontend.sample_rate,
        "chunk_seconds": config.heard_samples / config.frontend.sample_rate,
        "frame_seconds": config.heard_samples / (config.heard_frames * config.frontend.sample_rate),
        "default": default,
        "operating_points": points,
        "operating_point": here[0] if here else None,
        "decoding": _decoding_text(config.decoding),
    }


def _tags(prediction: Prediction, top: int) -> list[dict[str, Any]]:
    return [{"label": tag.label, "probability": tag.probability} for tag in prediction.tags[:top]]


def _posteriors(prediction: Prediction, count: int, model: Model) -> dict[str, Any]:
    framewise = prediction.framewise_posteriors
    count = min(count, framewise.shape[1])
    if framewise.shape[0] * count * 4 > _MOST_POSTERIORS:
        most = _MOST_POSTERIORS // (4 * framewise.shape[0])
        raise ApiError(
            413, "too_many_posteriors", f"posteriors={count} of this recording are too large; ask for at most {most}"
        )
    order = np.argsort(-framewise.max(axis=0), kind="stable")[:count]
    data = np.ascontiguousarray(framewise[:, order], dtype="<f4")
    config = model.config
    return {
        "frame_seconds": config.heard_samples / (config.heard_frames * config.frontend.sample_rate),
        "num_frames": len(framewise),
        "labels": [prediction.labels[i] for i in order],
        "encoding": "base64 of little-endian float32, (num_frames, num_labels) row-major",
        "data": base64.b64encode(data.tobytes()).decode("ascii"),
    }


# ---------------------------------------------------------------------------------------------------
# the way of a request


class _Work(Response):
    """The answer to recordings: everything from reading the body on.

    Args:
        serving: of the worker.
        query: what is asked.
    """

    def __init__(self, serving: Serving, query: TagQuery | DetectQuery) -> None:
        super().__init__()
        self._serving, self._query = serving, query
        self._model = serving.model(query.model)
        point = query.operating_point if isinstance(query, DetectQuery) else None
        self._decoding = decoding_of(self._model, point)
        self._done: tuple[float, float | None] = (0.0, None)
        self._changed = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        serving = self._serving
        lines = NDJSON in (header(scope["headers"], b"accept") or "")
        started, body = False, b""
        uploads: list[Upload] = []
        with serving.gate.enter(scope["state"]["client"]) as ticket:
            try:
                async with asyncio.timeout(serving.settings.timeout):
                    uploads = await read_uploads(receive, scope["headers"], self._query.name, serving.settings, ticket)
                    serving.metrics.uploads.inc(sum(upload.size for upload in uploads))
                    if lines:
                        await _send(send, _start(200, NDJSON))
                        started = True
                        await _until_left(receive, self._tell(uploads, send))
                    else:
                        body = await _until_left(receive, self._results(uploads))
            except TimeoutError:
                limit = serving.settings.timeout
                error = ApiError(
                    503,
                    "timeout",
                    f"the request was not answered within the limit of {limit:g} s; send shorter recordings",
                    {"Retry-After": str(serving.gate.retry_after)},
                )
                if not started:
                    raise error from None
                body = _line({"type": "error", **error.body})
            except ClientLeftError:
                scope["state"]["left"] = True
                _cut(scope)
                return
            except BaseException:
                scope["state"]["left"] = started  # too late for another status
                raise
            finally:
                for upload in uploads:
                    upload.file.close()
        # The slot is free: how fast a client reads is its own matter.
        try:
            if not lines:
                await _send(send, _start(200, "application/json", len(body)))
            for start in range(0, len(body), _PIECE):
                await _send(send, _piece(body[start : start + _PIECE]))
            await _send(send, {"type": "http.response.body", "body": b""})
        except ClientLeftError:
            _cut(scope)

    async def _results(self, uploads: Sequence[Upload]) -> bytes:
        """Return the whole answer.

        Raises:
            ApiError: the only recording cannot be heard.
        """
        results = []
        for upload in uploads:
            try:
                results.append(await self._heard(upload))
            except ApiError as error:
                if len(uploads) == 1 or error.status == 503:
                    raise
                results.append({"file": upload.name, **error.body})
        answer = results[0] if len(uploads) == 1 else {"results": results}
        return await asyncio.to_thread(lambda: json.dumps(answer, ensure_ascii=False).encode())

    async def _heard(self, upload: Upload) -> dict[str, Any]:
        """Return the answer for one recording.

        Raises:
            ApiError: it cannot be heard.
        """
        query, model = self._query, self._model
        source = self._serving.engine.batcher.source(model.name)
        try:
            finish = await self._serving.engine.hear(upload, model, self._decoding, source, self._progress)
            return await asyncio.to_thread(_answer, finish, query, model)
        except AudioError as error:
            raise _refused(error) from None
        except HtsatError as error:
            raise ApiError(503, "no_decoder", str(error), {"Retry-After": "2"}) from None
        except MemoryError:
            message = "the server has too little memory for this now; try again later"
            raise ApiError(503, "no_memory", message, {"Retry-After": "10"}) from None
        finally:
            source.close()

    def _progress(self, seconds: float, duration: float | None) -> None:
        self._done = seconds, duration
        self._changed.set()

    async def _tell(self, uploads: Sequence[Upload], send: Send) -> None:
        """Send lines: how far each recording is, and its result."""
        for upload in uploads:
            self._done = (0.0, None)
            job = asyncio.create_task(self._heard(upload))
            job.add_done_callback(lambda _: self._changed.set())
            try:
                while not job.done():
                    await self._changed.wait()
                    self._changed.clear()
                    if not job.done():
                        # Only the newest state: a client that reads slowly does not slow the work.
                        seconds, duration = self._done
                        line = {"type": "progress", "file": upload.name, "seconds": seconds, "duration": duration}
                        await _send(send, _piece(_line(line)))
                try:
                    line = {"type": "result", **job.result()}
                except ApiError as error:
                    line = {"type": "error", "file": upload.name, **error.body}
                await _send(send, _piece(await asyncio.to_thread(_line, line)))
            finally:
                await _ended(job)


def _answer(finish: Callable[[], Prediction], query: TagQuery | DetectQuery, model: Model) -> dict[str, Any]:
    prediction = finish()
    answer: dict[str, Any] = {"file": prediction.file, "duration": prediction.duration, "model": model.name}
    if isinstance(query, DetectQuery):
        answer["events"] = [dataclasses.asdict(event) for event in prediction.events]
    answer["tags"] = _tags(prediction, query.top)
    if isinstance(query, DetectQuery) and query.posteriors is not None:
        answer["posteriors"] = _posteriors(prediction, query.posteriors, model)
    return answer


def _refused(error: AudioError) -> ApiError:
    if is_too_long(error):
        return ApiError(413, "too_long", str(error))
    if is_no_audio(error):
        return ApiError(415, "not_audio", str(error))
    return ApiError(422, "bad_audio", str(error))


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _start(status: int, kind: str, length: int | None = None) -> Message:
    headers = [(b"content-type", kind.encode()), (b"cache-control", b"no-store")]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": status, "headers": headers}


def _piece(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}


async def _send(send: Send, message: Message) -> None:
    """Send a piece of an answer.

    Raises:
        ClientLeftError: the client does not take it.
    """
    try:
        async with asyncio.timeout(_SEND_SECONDS):
            await send(message)
    except TimeoutError:
        raise ClientLeftError from None


async def _until_left(receive: Receive, work: Awaitable[Any]) -> Any:
    """Return what ``work`` returns; ends it when the client closes the connection.

    Raises:
        ClientLeftError: it did.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    job, watch = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((job, watch), return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientLeftError
        return job.result()
    finally:
        await _ended(job)
        await _ended(watch)


async def _ended(task: "asyncio.Future[Any]") -> None:
    """Cancel a task and wait until it has cleaned up."""
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await task


def _cut(scope: Scope) -> None:
    """Close the connection of a client that does not read, without waiting for it."""
    transport = scope["state"].get("transport")
    if transport is not None:
        transport.abort()


# ---------------------------------------------------------------------------------------------------
# the application

_MESSAGES = {
    400: "Bad request: an empty or malformed body",
    401: "The token is missing or wrong",
    403: "A page or a name that this server does not answer",
    404: "Unknown model",
    408: "The body came too slowly",
    411: "No body",
    413: "Too large, too long, or too many parts",
    415: "Not a recording",
    422: "A parameter or a recording is out of range or damaged",
    429: "Too many requests of one client at once (Retry-After)",
    503: "The server is busy or stops (Retry-After)",
}
_BINARY = {"type": "string", "format": "binary"}
_BODY = {
    "requestBody": {
        "required": True,
        "description": "One recording as it is, or one or several in parts called 'file'.",
        "content": {
            "application/octet-stream": {"schema": _BINARY},
            "audio/*": {"schema": _BINARY},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "array", "items": _BINARY, "minItems": 1}},
                    "required": ["file"],
                    "additionalProperties": False,
                },
            },
        },
    }
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer, "description": _MESSAGES[status]} for status in statuses}


_COMMON = (401, 403)
_WORK_ERRORS = (400, 401, 403, 404, 408, 411, 413, 415, 422, 429, 503)


def create_app(serving: Serving) -> ASGIApp:
    """Return the application of one worker."""
    return Guard(_application(serving), serving)


def _application(serving: Serving) -> FastAPI:
    app = FastAPI(
        title="htsat",
        version=__version__,
        summary="Names what sounds in recordings of any length and says when",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    settings = serving.settings
    lines: dict[int | str, dict[str, Any]] = {
        200: {"content": {NDJSON: {"schema": {"type": "string", "description": "progress and results, a line each"}}}}
    }

    @app.post(
        "/v1/tag",
        response_model=TagAnswer | TagAnswers,
        responses=lines | _errors(*_WORK_ERRORS),
        openapi_extra=_BODY,
        summary="What sounds in recordings",
    )
    async def tag(query: Annotated[TagQuery, Query()]) -> Response:
        return _Work(serving, query)

    @app.post(
        "/v1/detect",
        response_model=DetectAnswer | DetectAnswers,
        responses=lines | _errors(*_WORK_ERRORS),
        openapi_extra=_BODY,
        summary="What sounds when in recordings",
    )
    async def detect(query: Annotated[DetectQuery, Query()]) -> Response:
        return _Work(serving, query)

    @app.get("/v1/models", response_model=ModelsAnswer, responses=_errors(*_COMMON), summary="The models")
    async def models() -> Response:
        default = serving.engine.default
        return JSONResponse(
            {"models": [_model_text(model, model.name == default) for model in serving.engine.models.values()]}
        )

    @app.get("/healthz", response_model=HealthAnswer, summary="Whether the process lives; needs no token")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get(
        "/readyz",
        response_model=ReadyAnswer,
        responses={**_errors(*_COMMON), 503: {"model": ReadyAnswer, "description": "The server is being stopped"}},
        summary="Whether requests are answered",
    )
    async def ready() -> Response:
        stopping = serving.stopping.is_set()
        answer = {
            "status": "stopping" if stopping else "ready",
            "models": [{"name": model.name, "backend": model.backend} for model in serving.engine.models.values()],
            "sandbox": serving.sandbox,
        }
        return JSONResponse(answer, 503 if stopping else 200, {"Retry-After": "1"} if stopping else None)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_errors(*_COMMON)},
        summary="Numbers for Prometheus",
    )
    async def metrics() -> Response:
        numbers = serving.metrics
        numbers.inside.set(serving.gate.inside)
        numbers.queue.set(serving.engine.batcher.waiting)
        numbers.streams.set(serving.streams)
        numbers.crashes.set(serving.engine.decoders.stats.crashes)
        return Response(numbers.text(), headers={"Content-Type": CONTENT_TYPE})

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(_documentation(app.openapi()))

    @app.websocket("/v1/stream")
    async def stream(websocket: WebSocket) -> None:
        await listen(websocket, serving)

    for path, content, kind in _page_files():
        app.add_api_route(path, _static(content, kind), methods=["GET"], include_in_schema=False)

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_parameter(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return JSONResponse(ApiError(422, "bad_parameter", _parameter(request, error)).body, 422)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = HTTPStatus(error.status_code)
        path = request.url.path[:200]
        messages = {
            404: f"there is nothing at {path}; see /docs",
            405: f"{request.method[:20]} does not go with {path}; use {(error.headers or {}).get('Allow', '')}",
        }
        code = status.phrase.lower().replace(" ", "_")
        body = ApiError(error.status_code, code, messages.get(error.status_code, str(error.detail))).body
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        _log.error("a request to %s failed", request.url.path, exc_info=error)
        return JSONResponse(ApiError(500, "internal", "the server failed; its log says how").body, 500)

    plain_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        schema = plain_openapi()
        if settings.tokens:
            schema.setdefault("components", {})["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            for path, operations in schema["paths"].items():
                if path not in OPEN:
                    for operation in operations.values():
                        operation["security"] = [{"token": []}]
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _parameter(request: Request, error: RequestValidationError) -> str:
    """Return one sentence on the first parameter that is wrong."""
    first = error.errors()[0]
    name = str(first["loc"][-1])[:80] if first["loc"] else "?"
    if first["type"] == "extra_forbidden":
        known = TagQuery.model_fields if request.url.path.endswith("/tag") else DetectQuery.model_fields
        return f"unknown parameter {name!r}{nearest(name, known)}; known: {', '.join(known)}"
    given = repr(first.get("input"))[:80]
    return f"parameter {name}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {given}"


def _page_files() -> list[tuple[str, bytes, str]]:
    """Return (path, content, type) of everything that the page is made of."""
    found: list[tuple[str, bytes, str]] = []

    def walk(folder: Traversable, prefix: str) -> None:
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif not entry.name.endswith((".py", ".pyc")):
                kind = {".js": "text/javascript", ".woff2": "font/woff2", ".webmanifest": "application/manifest+json"}
                suffix = f".{entry.name.rsplit('.', 1)[-1]}"
                guessed = kind.get(suffix) or mimetypes.guess_type(entry.name)[0] or "text/plain"
                if guessed.startswith("text/"):
                    guessed += "; charset=utf-8"
                found.append((prefix + entry.name, entry.read_bytes(), guessed))

    page = files("htsat.apps.serve") / "page"
    if page.is_dir():
        walk(page, "")
    paths = []
    for name, content, kind in found:
        if name == "index.html":
            paths.append(("/", content, kind))
        else:
            paths.append((f"/assets/{name}", content, kind))
    return sorted(paths)


def _static(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        # Small files from this machine; asked for anew each time, so that a new version never meets an old one.
        return Response(content, headers={"Content-Type": kind, "Cache-Control": "no-cache"})

    return answer


def _documentation(schema: dict[str, Any]) -> str:
    """Return the OpenAPI description as a page that needs nothing else."""
    rows = []
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parameters = "".join(
                f"<li><code>{html.escape(p['name'])}</code> {html.escape(p.get('description', ''))}"
                f" <small>{html.escape(json.dumps(p['schema']))}</small></li>"
                for p in operation.get("parameters", [])
            )
            bodies = ", ".join(operation.get("requestBody", {}).get("content", {}))
            answers = "".join(
                f"<li><code>{status}</code> {html.escape(answer['description'])}</li>"
                for status, answer in operation["responses"].items()
            )
            rows.append(
                f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(operation['summary'])}</p>"
                + (f"<p>Body: {html.escape(bodies)}</p>" if bodies else "")
                + (f"<p>Parameters</p><ul>{parameters}</ul>" if parameters else "")
                + f"<p>Answers</p><ul>{answers}</ul>"
            )
    stream = (
        "<h2><code>WebSocket /v1/stream</code></h2><p>?model=&amp;sample_rate=48000&amp;format=s16le|f32le"
        "&amp;hop=1.0&amp;operating_point=&amp;frames=true|false&amp;top=5&amp;max_delay=</p><p>Send binary frames of "
        'mono samples and <code>{"type":"gap","seconds":2.5}</code>, <code>{"type":"end"}</code>; JSON messages come '
        "back: start, event, progress, frames, gap, end, error.</p>"
    )
    style = "body{font:16px/1.5 system-ui;max-width:50rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>htsat API</title><style>{style}</style>'
        f'<h1>htsat {html.escape(schema["info"]["version"])}</h1><p><a href="openapi.json">openapi.json</a></p>'
        f"{''.join(rows)}{stream}</html>"
    )


# ---------------------------------------------------------------------------------------------------
# what stands before the application

_LOGIN = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>htsat</title><style>body{{font:16px/1.5 system-ui;color-scheme:light dark;display:grid;place-content:"
    "center;min-height:90vh}}input,button{{font:inherit;padding:.4em .6em}}</style>"
    '<form action="./"><p><label for="token">{0}</label></p><input id="token" name="token" type="password" autofocus '
    "required autocomplete=current-password> <button>Open</button></form></html>"
)
#: to the page without the token in its address; a redirect would count as coming from wherever the link was
_ENTERED = '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="0;url=./">htsat'


class Guard:
    """Stands before the application: nothing passes that may not, whatever routes there are.

    Also adds the headers that every answer has, and counts.

    Args:
        app: the application.
        serving: of the worker.
    """

    def __init__(self, app: FastAPI, serving: Serving) -> None:
        self.app, self._serving = app, serving
        self._hosts = Hosts(serving.settings)
        self._keys = serving.keys
        self._origins = {origin.lower() for origin in serving.settings.cors}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request or pass it on."""
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status = time.monotonic(), 0
        headers = scope["headers"]
        origin = header(headers, b"origin")
        shared = origin if origin is not None and origin.lower() in self._origins else None

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS, *self._cross(shared)]}
                if any(key == b"content-type" and value.startswith(b"text/html") for key, value in message["headers"]):
                    message["headers"].append((b"content-security-policy", _POLICY.encode()))
                if self._serving.stopping.is_set():
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            early = self._early(scope, origin, shared)
            if early is not None:
                await early(scope, receive, answer)
            else:
                await self.app(scope, receive, answer)
        finally:
            route = scope.get("route")
            name = getattr(route, "path", "other")
            if scope["state"].get("left"):
                status = 499
            self._serving.metrics.requests.labels(name, str(status)).inc()
            self._serving.metrics.seconds.labels(name).observe(time.monotonic() - start)

    def _early(self, scope: Scope, origin: str | None, shared: str | None) -> Response | None:
        """Return the answer to a request that is not passed on; None: it is."""
        headers, path = scope["headers"], scope["path"]
        host = header(headers, b"host")
        scope.setdefault("state", {})["client"] = (scope.get("client") or ("?",))[0]
        if (size := sum(len(name) + len(value) for name, value in headers)) > _MOST_HEADERS:
            return _error(431, "header_too_large", f"the headers have {size} bytes, the limit is {_MOST_HEADERS}")
        if not self._hosts.allows(host):
            return _error(403, "forbidden_host", _host_message(host))
        if scope["method"] == "OPTIONS" and origin is not None:
            if shared is None:
                return _error(403, "forbidden_origin", _origin_message(origin))
            allowed = {
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": "Authorization, Content-Type",
                "Access-Control-Max-Age": "600",
            }
            return Response(status_code=204, headers=allowed)
        if path not in OPEN and not self._keys.open:
            number = self._keys.client(bearer(header(headers, b"authorization")))
            if number is None:
                number = self._keys.cookie_client(cookie_of(header(headers, b"cookie")))
            if number is None:
                return self._login(scope)
            self._name(scope, number)
        foreign = origin is not None and shared is None and not same_origin(origin, host)
        if foreign and scope["method"] not in ("GET", "HEAD"):
            return _error(403, "forbidden_origin", _origin_message(origin))
        return None

    def _name(self, scope: Scope, number: int) -> None:
        """Note who asks: with several tokens their owners, else addresses."""
        if len(self._serving.settings.tokens) > 1:
            scope["state"]["client"] = f"token {number}"

    def _login(self, scope: Scope) -> Response:
        """Refuse a request without the right token, or take it from the address of the page and keep it."""
        is_page = scope["method"] == "GET" and scope["path"] == "/"
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [None])[-1] if is_page else None
        number = self._keys.client(given)
        if number is not None:
            entered = HTMLResponse(_ENTERED, headers={"Cache-Control": "no-store"})
            entered.set_cookie(
                COOKIE,
                self._keys.cookie(number),
                max_age=30 * 24 * 3600,
                secure=scope.get("scheme") == "https",
                httponly=True,
                samesite="strict",
            )
            return entered
        challenge = {"WWW-Authenticate": 'Bearer realm="htsat"', "Cache-Control": "no-store"}
        if is_page and "text/html" in (header(scope["headers"], b"accept") or ""):
            text = "This token is not the right one. Token:" if given else "Token:"
            return HTMLResponse(_LOGIN.format(text), 401, challenge)
        refused = ApiError(401, "unauthorized", _token_message(scope["headers"]))
        return JSONResponse(refused.body, 401, challenge)

    def _cross(self, shared: str | None) -> list[tuple[bytes, bytes]]:
        """Return what lets the page of another origin read an answer."""
        if not self._origins:
            return []
        vary = [(b"vary", b"Origin")]
        if shared is None:
            return vary
        return [
            *vary,
            (b"access-control-allow-origin", shared.encode("latin-1")),
            (b"access-control-expose-headers", b"Retry-After"),
        ]

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, host = scope["headers"], header(scope["headers"], b"host")
        origin = header(headers, b"origin")
        scope.setdefault("state", {})["client"] = (scope.get("client") or ("?",))[0]
        refused = None
        if not self._hosts.allows(host):
            refused = ApiError(403, "forbidden_host", _host_message(host))
        elif origin is not None and origin.lower() not in self._origins and not same_origin(origin, host):
            refused = ApiError(403, "forbidden_origin", _origin_message(origin))
        elif not self._keys.open:
            given = bearer(header(headers, b"authorization"))
            given = given or parse_qs(scope["query_string"].decode("latin-1")).get("token", [None])[-1]
            number = self._keys.client(given)
            if number is None:
                number = self._keys.cookie_client(cookie_of(header(headers, b"cookie")))
            if number is None:
                refused = ApiError(401, "unauthorized", _token_message(headers))
            else:
                self._name(scope, number)
        if refused is None:
            await self.app(scope, receive, send)
            return
        self._serving.metrics.requests.labels("/v1/stream", str(refused.status)).inc()
        if "websocket.http.response" in scope.get("extensions", {}):
            body = json.dumps(refused.body).encode()
            reply = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *_HEADERS]
            await send({"type": "websocket.http.response.start", "status": refused.status, "headers": reply})
            await send({"type": "websocket.http.response.body", "body": body})
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": refused.code})


def _error(status: int, code: str, message: str) -> Response:
    return JSONResponse(ApiError(status, code, message).body, status)


def _token_message(headers: Sequence[tuple[bytes, bytes]]) -> str:
    shown = header(headers, b"authorization") is not None
    return f"the token is {'not the right one' if shown else 'missing'}; send Authorization: Bearer TOKEN"


def _host_message(host: str | None) -> str:
    return f"this server is not called {(host or '')[:80]!r}; use its address, or start it with --allow-host NAME"


def _origin_message(origin: str | None) -> str:
    return f"pages of {(origin or '')[:80]!r} may not use this server; start it with --cors ORIGIN if they should"
