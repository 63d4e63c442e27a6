"""``htsat serve`` as its clients see it: answers, errors, tokens, streams, stops."""

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import soundfile
import websockets
from serving import EXAMPLES, Server, head, until
from starlette.testclient import TestClient, WebSocketDenialResponse

import htsat
from htsat.apps.serve.api import OPEN, create_app
from htsat.apps.serve.batcher import Batcher, Heard
from htsat.apps.serve.engine import Engine, Model, Serving
from htsat.apps.serve.guard import COOKIE, Gate, Keys
from htsat.apps.serve.metrics import Metrics
from htsat.apps.serve.settings import ServeSettings
from htsat.audio.resample import read_audio
from htsat.live import live_config

RECORDINGS = ("clock.wav", "helicopter_over_fire.ogg", "rain_and_clock.ogg", "street.ogg", "waves.flac")
BUNDLED = Path(htsat.__file__).parent / "assets" / "default.onnx"


@pytest.fixture(scope="module")
def server():
    with Server("default", f"again={BUNDLED}", "--max-seconds", 600) as server:
        yield server


@pytest.fixture(scope="module")
def predictor():
    return htsat.Predictor("default", backend="onnxruntime", threads=1)


def expected(prediction, file, top, model="default"):
    return {
        "file": file,
        "duration": prediction.duration,
        "model": model,
        "events": [dataclasses.asdict(event) for event in prediction.events],
        "tags": [dataclasses.asdict(tag) for tag in prediction.tags[:top]],
    }


def without_events(answer):
    return {key: value for key, value in answer.items() if key != "events"}


# ------------------------------------------------------------------ answers


@pytest.mark.parametrize("name", RECORDINGS)
def test_answers_are_those_of_the_predictor(server, predictor, name):
    prediction = predictor.predict(EXAMPLES / name, spectrogram=False)
    answer = server.post(f"/v1/detect?name={name}&posteriors=1000", name).json()
    posteriors = answer.pop("posteriors")
    assert answer == expected(prediction, name, 5)
    shape = (posteriors["num_frames"], len(posteriors["labels"]))
    heard = np.frombuffer(base64.b64decode(posteriors["data"]), "<f4").reshape(shape)
    order = [prediction.labels.index(label) for label in posteriors["labels"]]
    np.testing.assert_array_equal(heard, prediction.framewise_posteriors[:, order])  # bit for bit
    assert sorted(order) == list(range(len(prediction.labels)))
    assert all(np.diff(heard.max(axis=0)) <= 0)
    assert posteriors["frame_seconds"] == pytest.approx(prediction.frame_boundaries[1], abs=1e-12)
    tags = server.post(f"/v1/tag?name={name}", name).json()
    assert tags == without_events(expected(prediction, name, 10))


def test_few_posteriors_are_those_of_the_loudest(server, predictor):
    prediction = predictor.predict(EXAMPLES / "street.ogg", spectrogram=False)
    found = server.post("/v1/detect?posteriors=2&top=1", "street.ogg").json()
    loudest = np.argsort(-prediction.framewise_posteriors.max(axis=0))[:2]
    assert found["posteriors"]["labels"] == [prediction.labels[i] for i in loudest]
    assert len(base64.b64decode(found["posteriors"]["data"])) == 4 * 2 * found["posteriors"]["num_frames"]
    assert len(found["tags"]) == 1


@pytest.mark.parametrize("point", ["high_precision", "balanced", "high_recall"])
def test_operating_points(server, point):
    prediction = htsat.Predictor("default", backend="onnxruntime", threads=1, operating_point=point).predict(
        EXAMPLES / "street.ogg", spectrogram=False
    )
    answer = server.post(f"/v1/detect?operating_point={point}&name=street.ogg", "street.ogg").json()
    assert answer == expected(prediction, "street.ogg", 5)


def form(*names):
    return [("file", (name, (EXAMPLES / name).read_bytes())) for name in names]


def test_parts_of_a_form(server, predictor):
    one = server.client.post("/v1/detect", files=form("street.ogg")).json()
    assert one == expected(predictor.predict(EXAMPLES / "street.ogg", spectrogram=False), "street.ogg", 5)
    several = server.client.post("/v1/detect", files=form("clock.wav", "events.tsv", "street.ogg")).json()["results"]
    clock = predictor.predict(EXAMPLES / "clock.wav", spectrogram=False)
    assert several[0] == expected(clock, "clock.wav", 5)
    assert several[1]["file"] == "events.tsv"
    assert several[1]["error"]["code"] == "not_audio" and "this is text" in several[1]["error"]["message"]
    assert several[2] == one


def lines(answer):
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def test_progress_as_lines(server, tmp_path):
    long = tmp_path / "long.wav"
    soundfile.write(long, 0.1 * np.random.default_rng(0).standard_normal(16000 * 65), 16000)
    body = long.read_bytes()
    *progress, result = lines(server.post("/v1/detect?name=long.wav", body, headers={"Accept": "application/x-ndjson"}))
    assert {line["type"] for line in progress} == {"progress"}
    assert [line["duration"] for line in progress] == [65.0] * len(progress)
    done = [line["seconds"] for line in progress]
    assert len(done) >= 2 and done == sorted(done) and done[-1] <= 65
    assert result.pop("type") == "result"
    assert result == server.post("/v1/detect?name=long.wav", body).json()
    several = lines(
        server.client.post(
            "/v1/tag", files=form("events.tsv", "clock.wav"), headers={"Accept": "text/html, application/x-ndjson"}
        )
    )
    assert [line["type"] for line in several if line["type"] != "progress"] == ["error", "result"]
    assert several[0]["file"] == "events.tsv" and several[0]["error"]["code"] == "not_audio"
    assert several[-1]["file"] == "clock.wav"


def test_models(server, predictor):
    first, second = server.client.get("/v1/models").json()["models"]
    assert (first["name"], first["default"], second["name"], second["default"]) == ("default", True, "again", False)
    config = predictor.config
    assert first["labels"] == predictor.labels
    assert (first["sample_rate"], first["chunk_seconds"]) == (config.frontend.sample_rate, config.model.chunk_seconds)
    assert first["frame_seconds"] == config.token_seconds
    assert set(first["operating_points"]) == set(config.operating_points)
    for found, point in [(first["decoding"], config.decoding)] + [
        (first["operating_points"][name], point) for name, point in config.operating_points.items()
    ]:
        assert set(found["per_class"]) == set(point.per_class)
        for label in (None, *point.per_class):
            mine, theirs = (found, point) if label is None else (found["per_class"][label], point.for_label(label))
            for key in ("threshold", "median_seconds", "min_duration", "min_gap"):
                assert mine[key] == getattr(theirs, key)
            assert mine["threshold_off"] == (theirs.threshold if theirs.threshold_off is None else theirs.threshold_off)
    assert first["operating_point"] in (None, *config.operating_points)
    assert server.post("/v1/tag?model=again", "clock.wav").json()["model"] == "again"


def test_many_at_once_get_their_own_answers(server):
    alone = {name: server.post(f"/v1/detect?name={name}", name).json() for name in RECORDINGS}
    names = random.Random(0).choices(RECORDINGS, k=24)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: server.post(f"/v1/detect?name={name}", name).json(), names))
    assert answers == [alone[name] for name in names]


def test_state(server):
    assert server.client.get("/healthz").json() == {"status": "ok"}
    ready = server.client.get("/readyz").json()
    assert ready["status"] == "ready"
    assert ready["models"] == [{"name": name, "backend": "onnxruntime"} for name in ("default", "again")]
    assert "seccomp" in ready["sandbox"] or "memory" in ready["sandbox"]


def test_metrics(server):
    before = {name: server.metric(f"htsat_{name}_total") for name in ("chunks", "audio_seconds", "requests")}
    server.post("/v1/tag", "street.ogg")  # 25 s: chunks at 0, 5, 10 and 15 s
    assert server.metric("htsat_chunks_total") - before["chunks"] == 4
    assert server.metric("htsat_audio_seconds_total", kind="recording") - before["audio_seconds"] == pytest.approx(25)
    assert server.metric("htsat_requests_total", route="/v1/tag", status="200") >= 1
    assert server.metric("htsat_request_seconds_count", route="/v1/tag") >= 1
    assert server.metric("htsat_requests_inside") == 0
    assert server.metric("htsat_chunks_waiting") == 0


def test_documentation_needs_nothing_else(server):
    page = server.client.get("/docs").text
    assert "/v1/detect" in page and "operating_point" in page
    assert "http" not in page.replace("http-equiv", "") and "src=" not in page and "@import" not in page


def test_the_page_needs_nothing_else(server):
    answer = server.client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http:" not in policy and "*" not in policy


@pytest.mark.parametrize(
    "path", ["/../api.py", "/assets/../../api.py", "/%2e%2e/api.py", "/page/../run.py", "//etc/passwd"]
)
def test_nothing_but_the_page_is_served(server, path):
    with server.connect() as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = connection.makefile("rb").read()
    assert answer.split()[1] == b"404" and b'"not_found"' in answer


# ------------------------------------------------------------------ errors


def wav(samples, rate=16000):
    import io

    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


NOISE = np.random.default_rng(1).standard_normal(16000).astype(np.float32)


@pytest.mark.parametrize(
    ("request_of", "status", "code", "says"),
    [
        (("/v1/tag", b"this is text"), 415, "not_audio", "this is text"),
        (("/v1/tag", bytes(range(256))), 415, "not_audio", "not a recording"),
        (("/v1/tag", wav(NOISE)[:30000]), 422, "bad_audio", "truncated"),
        (("/v1/tag", wav(NOISE[:0])), 422, "bad_audio", "no samples"),
        (("/v1/tag", wav(np.where(np.arange(16000) == 9, np.nan, NOISE))), 422, "bad_audio", "NaN"),
        (("/v1/tag", wav(NOISE * 1e15)), 422, "bad_audio", "exceed"),
        (("/v1/tag", wav(np.zeros((16000, 17)))), 422, "bad_audio", "17 channels"),
        (("/v1/tag", b""), 400, "empty_body", "body is empty"),
        (("/v1/tag?top=0", b"x"), 422, "bad_parameter", "top"),
        (("/v1/tag?top=many", b"x"), 422, "bad_parameter", "'many'"),
        (("/v1/tag?tpo=1", b"x"), 422, "bad_parameter", "did you mean 'top'"),
        (("/v1/tag?posteriors=1", b"x"), 422, "bad_parameter", "unknown parameter 'posteriors'"),
        (("/v1/detect?posteriors=-1", b"x"), 422, "bad_parameter", "posteriors"),
        (("/v1/detect?model=agian", b"x"), 404, "unknown_model", "did you mean 'again'"),
        (("/v1/detect?operating_point=balancd", b"x"), 422, "unknown_operating_point", "did you mean 'balanced'"),
        (("/v1/tga", b"x"), 404, "not_found", "/v1/tga"),
    ],
)
def test_errors_say_what_to_change(server, request_of, status, code, says):
    start = time.monotonic()
    answer = server.post(*request_of)
    assert time.monotonic() - start < 2
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert (set(answer.json()), set(error)) == ({"error"}, {"code", "message"})
    assert error["code"] == code and says in error["message"]
    assert "\n" not in error["message"]


def test_other_methods_are_refused(server):
    answer = server.client.get("/v1/tag")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["code"] == "method_not_allowed"
    assert server.client.delete("/v1/models").status_code == 405


def test_a_recording_that_is_too_long_is_refused(server):
    import io

    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8000, 1, format="FLAC") as flac:
        for _ in range(60 * 10):  # ten hours in a tiny file
            flac.write(np.zeros(8000 * 60, np.int16))
    assert len(file.getvalue()) < 2_000_000
    start, memory = time.monotonic(), server.memory()
    answer = server.post("/v1/detect", file.getvalue())
    assert time.monotonic() - start < 2
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_long")
    assert "600 s" in answer.json()["error"]["message"]
    assert server.memory() - memory < 20e6


# ------------------------------------------------------------------ tokens, origins: in this process, without models


class _Deaf:
    """No decoder is needed by what is refused before."""

    class stats:
        crashes = 0


def application(**settings):
    settings = ServeSettings(**settings)
    config = htsat.Predictor("default", backend="onnxruntime").config
    model = Model("default", config, list(config.labels), "none")
    metrics = Metrics()
    engine = Engine({"default": model}, Batcher({"default": Heard(lambda chunks: None)}), _Deaf(), metrics)
    return create_app(Serving(settings, engine, metrics, Gate(4, 4, 1), Keys(settings.tokens)))


TOKENS = ("first-token-0123", "second-token-456")


@pytest.fixture(scope="module")
def guarded():
    return application(tokens=TOKENS, cors=("https://friend.example",))


def routes(app):
    """Return (kind, path) of every route that the application has."""
    found = {(type(route).__name__, route.path) for route in app.app.routes}
    assert len(found) > 10
    return sorted(found)


def refusal(client, path, headers):
    """Return the status by which a stream is refused."""
    with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect(path, headers=headers):
        pass
    return refused.value.status_code


def test_every_route_needs_the_token_but_the_one_that_is_declared(guarded):
    client = TestClient(guarded, base_url="http://localhost", follow_redirects=False)
    cookies = [Keys(TOKENS).cookie(0), "0" * 64]
    shown = {
        "none": ({}, False),
        "wrong": ({"Authorization": "Bearer wrong-token-789"}, False),
        "beginning": ({"Authorization": f"Bearer {TOKENS[0][:-1]}"}, False),
        "other scheme": ({"Authorization": f"Basic {TOKENS[0]}"}, False),
        "cookie": ({"Cookie": f"{COOKIE}={cookies[0]}"}, True),
        "wrong cookie": ({"Cookie": f"{COOKIE}={cookies[1]}"}, False),
        "token as cookie": ({"Cookie": f"{COOKIE}={TOKENS[0]}"}, False),
        "first": ({"Authorization": f"Bearer {TOKENS[0]}"}, True),
        "second": ({"Authorization": f"bearer {TOKENS[1]}"}, True),
    }
    sockets = 0
    for kind, path in [*routes(guarded), ("none", "/v1/nothing"), ("none", "/assets/nothing.js")]:
        for name, (headers, opens) in shown.items():
            if "WebSocket" in kind:
                sockets += 1
                if opens:
                    with client.websocket_connect(path, headers=headers) as connection:
                        assert connection.receive_json()["code"] == "bad_parameter"
                else:
                    assert refusal(client, path, headers) == 401, (path, name)
                continue
            for method in ("GET", "POST", "OPTIONS"):
                answer = client.request(method, path, headers=headers)
                if path in OPEN or opens:
                    assert answer.status_code != 401, (method, path, name)
                else:
                    assert answer.status_code == 401, (method, path, name)
                    assert answer.headers["www-authenticate"].startswith("Bearer")
                    assert "default" not in answer.text
    assert sockets == len(shown)
    assert {"/healthz"} == OPEN


def test_a_token_in_the_address_is_for_streams_and_the_page_alone(guarded):
    client = TestClient(guarded, base_url="http://localhost")
    for path in ("/v1/models", "/metrics", "/readyz", "/docs", "/openapi.json"):
        assert client.get(f"{path}?token={TOKENS[0]}").status_code == 401
    with client.websocket_connect(f"/v1/stream?token={TOKENS[0]}") as connection:
        assert connection.receive_json()["code"] == "bad_parameter"


def test_the_page_is_entered_by_a_token_once(guarded):
    client = TestClient(guarded, base_url="http://localhost")
    browser = {"Accept": "text/html"}
    asked = client.get("/", headers=browser)
    assert asked.status_code == 401 and "<form" in asked.text and "default-src 'self'" in str(asked.headers)
    wrong = client.get("/?token=wrong-token-789", headers=browser)
    assert wrong.status_code == 401 and "set-cookie" not in wrong.headers
    entered = client.get(f"/?token={TOKENS[1]}", headers=browser)
    assert entered.status_code == 200
    cookie = entered.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKENS[1] not in cookie and "Secure" not in cookie
    assert TOKENS[1] not in entered.text
    assert client.get("/v1/models").status_code == 200  # by the cookie
    secure = TestClient(guarded, base_url="https://localhost").get(f"/?token={TOKENS[1]}", headers=browser)
    assert "Secure" in secure.headers["set-cookie"]


def test_pages_of_others_are_kept_out(guarded):
    client = TestClient(guarded, base_url="http://localhost")
    token = {"Authorization": f"Bearer {TOKENS[0]}"}
    preflight = {"Access-Control-Request-Method": "POST"}
    # nobody is told that another origin may read anything
    for origin in ("https://evil.example", "null", "http://localhost:81", "https://friend.example.evil.example"):
        for answer in (
            client.get("/v1/models", headers=token | {"Origin": origin}),
            client.options("/v1/tag", headers=preflight | {"Origin": origin}),
            client.post("/v1/tag", headers=token | {"Origin": origin}),
        ):
            assert "access-control-allow-origin" not in answer.headers
            assert answer.headers["vary"] == "Origin"
        assert client.post("/v1/tag", headers=token | {"Origin": origin}).json()["error"]["code"] == "forbidden_origin"
        with (
            pytest.raises(Exception) as refused,
            client.websocket_connect("/v1/stream", headers=token | {"Origin": origin}),
        ):
            pass
        assert refused.value.status_code == 403
    friend = {"Origin": "https://friend.example"}
    allowed = client.options("/v1/tag", headers=preflight | friend)
    assert allowed.status_code == 204 and allowed.headers["access-control-allow-origin"] == "https://friend.example"
    assert "Authorization" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in allowed.headers
    answer = client.post("/v1/tag", headers=token | friend)
    assert answer.status_code == 415 and answer.headers["access-control-allow-origin"] == friend["Origin"]
    assert client.post("/v1/tag", headers=token | {"Origin": "http://localhost"}).status_code == 415
    with client.websocket_connect("/v1/stream", headers=token | friend) as connection:
        assert connection.receive_json()["code"] == "bad_parameter"


def test_nothing_is_shared_where_nothing_was_said():
    client = TestClient(application(), base_url="http://localhost")
    answer = client.get("/v1/models", headers={"Origin": "https://evil.example"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert client.options("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403


def test_names_of_others_are_refused():
    client = TestClient(application(), base_url="http://evil.example")
    answer = client.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden_host")
    assert refusal(client, "/v1/stream", {}) == 403
    named = TestClient(application(allowed_hosts=("evil.example",)), base_url="http://evil.example")
    assert named.get("/v1/models").status_code == 200


def test_every_answer_is_guarded(guarded):
    client = TestClient(guarded, base_url="http://localhost")
    token = {"Authorization": f"Bearer {TOKENS[0]}"}
    for path, headers in (
        ("/", token),
        ("/v1/models", {}),
        ("/v1/models", token),
        ("/nothing", token),
        ("/docs", token),
    ):
        answer = client.get(path, headers=headers)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert ("content-security-policy" in answer.headers) == answer.headers["content-type"].startswith("text/html")


def test_the_schema_tells_of_the_token(guarded):
    schema = (
        TestClient(guarded, base_url="http://localhost")
        .get("/openapi.json", headers={"Authorization": f"Bearer {TOKENS[0]}"})
        .json()
    )
    assert schema["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == (path not in OPEN)
            assert "401" in operation["responses"] or path in OPEN


# ------------------------------------------------------------------ the schema


def fuzz(server, examples, seed=0):
    """Send generated requests, good and bad, and check every answer against the schema."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis.errors import Unsatisfiable
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        negative_data_rejection,
        response_headers_conformance,
        response_schema_conformance,
        status_code_conformance,
        unsupported_method,
    )

    schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    checks = (
        content_type_conformance, negative_data_rejection, response_headers_conformance, response_schema_conformance,
        status_code_conformance, unsupported_method,
    )  # fmt: skip
    count = 0
    quiet = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:
            strategy = operation.as_strategy(generation_mode=mode)

            @quiet
            @seeded(seed)
            @given(case=strategy)
            def send(case):
                nonlocal count
                count += 1
                answer = case.call(base_url=server.address)
                assert answer.status_code < 500 or answer.status_code == 503
                case.validate_response(answer, checks=checks)

            with contextlib.suppress(Unsatisfiable):  # there is nothing to be wrong about
                send()
    return count


def test_generated_requests_get_declared_answers(server):
    assert fuzz(server, 30) >= 120


@pytest.mark.slow
def test_many_generated_requests_get_declared_answers(server):
    assert fuzz(server, 1300, seed=1) >= 5000


# ------------------------------------------------------------------ streams


async def hear(server, waveform, rate, blocks, *, format="f32le", frames=True, hop=1.0, point=None):
    """Send blocks of a waveform through a stream and return its messages and how it was closed."""
    address = server.address.replace("http", "ws")
    query = f"sample_rate={rate}&format={format}&hop={hop}&frames={str(frames).lower()}"
    if point is not None:
        query += f"&operating_point={point}"
    messages = []
    async with websockets.connect(f"{address}/v1/stream?{query}", max_size=None) as connection:

        async def send():
            at = 0
            for size in blocks:
                block = waveform[at : at + size]
                at += size
                encoded = block.astype("<f4") if format == "f32le" else np.round(block * 32768).astype("<i2")
                await connection.send(encoded.tobytes())
            await connection.send('{"type": "end"}')

        sending = asyncio.create_task(send())
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                messages.append(json.loads(await connection.recv()))
        await sending
    return messages, connection.close_code


def closed_events(messages):
    keys = ("event_label", "onset", "offset", "probability")
    found = [message for message in messages if message["type"] == "event" and message["state"] == "close"]
    return sorted(tuple(message[key] for key in keys) for message in found)


def cuts(rng, total, largest):
    """Return sizes of blocks, from one sample to ``largest``, that make ``total``."""
    sizes = []
    while sum(sizes) < total:
        sizes.append(min(int(np.exp(rng.uniform(0, np.log(largest)))), total - sum(sizes)))
    return sizes


@pytest.mark.parametrize(
    ("rate", "format", "hop", "point"),
    [(32000, "f32le", 1.0, None), (44100, "s16le", 1.0, "balanced"), (16000, "f32le", 2.5, None)],
)
def test_a_stream_hears_what_the_predictor_does(server, predictor, rate, format, hop, point):
    waveform = read_audio(EXAMPLES / "street.ogg", rate)
    if format == "s16le":
        waveform = (np.round(np.clip(waveform, -1, 32767 / 32768) * 32768) / 32768).astype(np.float32)
    sizes = cuts(np.random.default_rng(rate), len(waveform), 2 * rate)
    messages, code = asyncio.run(hear(server, waveform, rate, sizes, format=format, hop=hop, point=point))
    assert code == 1000
    offline = htsat.Predictor("default", backend="onnxruntime", threads=1)
    decoding = None if point is None else offline.config.decoding_at(point)
    offline.config = live_config(offline.config, hop, decoding=decoding)
    prediction = offline.predict((waveform, rate), spectrogram=False)
    start, *_, end = messages
    assert start["type"] == "start" and start["labels"] == predictor.labels and start["sample_rate"] == rate
    assert end == {"type": "end", "duration": len(waveform) / rate}
    expected = sorted(tuple(dataclasses.asdict(event).values()) for event in prediction.events)
    assert closed_events(messages) == expected and len(expected) > 2
    frames = [message for message in messages if message["type"] == "frames"]
    rows = np.concatenate([message["posteriors"] for message in frames])
    np.testing.assert_array_equal(rows, np.round(prediction.framewise_posteriors.astype(np.float64), 4))
    assert [message["start"] for message in frames] == sorted(message["start"] for message in frames)
    opened = {message["id"] for message in messages if message.get("state") == "open"}
    assert opened == {message["id"] for message in messages if message.get("state") == "close"}
    progress = [message["time"] for message in messages if message["type"] == "progress"]
    assert len(progress) >= len(waveform) / rate / hop - 1


def test_streams_and_requests_side_by_side(server):
    waveform = read_audio(EXAMPLES / "rain_and_clock.ogg", 16000)
    alone, _ = asyncio.run(hear(server, waveform, 16000, [16000] * (len(waveform) // 16000 + 1)))

    async def many():
        sizes = [cuts(np.random.default_rng(seed), len(waveform), 30000) for seed in range(6)]
        async with httpx.AsyncClient(base_url=server.address, timeout=30) as client:
            body = (EXAMPLES / "clock.wav").read_bytes()
            headers = {"Content-Type": "audio/wav"}
            requests = [client.post("/v1/tag", content=body, headers=headers) for _ in range(6)]
            return await asyncio.gather(*(hear(server, waveform, 16000, size) for size in sizes), *requests)

    results = asyncio.run(many())
    for messages, code in results[:6]:
        assert code == 1000
        assert closed_events(messages) == closed_events(alone)
    assert {answer.status_code for answer in results[6:]} == {200}


def test_gaps_are_told_at_their_place(server):
    waveform = read_audio(EXAMPLES / "rain_and_clock.ogg", 16000)[: 16000 * 6]

    async def scenario():
        address = server.address.replace("http", "ws")
        async with websockets.connect(f"{address}/v1/stream?sample_rate=16000&format=f32le") as connection:
            await connection.send(waveform.astype("<f4").tobytes())
            await connection.send('{"type": "gap", "seconds": 2.5}')
            await connection.send(waveform.astype("<f4").tobytes())
            await connection.send('{"type": "end"}')
            return [json.loads(message) async for message in connection]

    messages = asyncio.run(scenario())
    assert [message for message in messages if message["type"] == "gap"] == [
        {"type": "gap", "start": 6.0, "duration": 2.5}
    ]
    assert messages[-1] == {"type": "end", "duration": 14.5}
    events = closed_events(messages)
    before = [(label, round(onset, 6), round(offset, 6)) for label, onset, offset, _ in events if offset <= 6]
    behind = [
        (label, round(onset - 8.5, 6), round(offset - 8.5, 6)) for label, onset, offset, _ in events if onset >= 8.5
    ]
    assert before and before == behind  # the same sound twice
    assert len(before) + len(behind) == len(events)


@pytest.mark.parametrize(
    ("query", "code", "says"),
    [
        ("", "bad_parameter", "sample_rate is missing"),
        ("sample_rate=0", "bad_parameter", "sample_rate"),
        ("sample_rate=48000.5", "bad_parameter", "whole number"),
        ("sample_rate=nan", "bad_parameter", "sample_rate"),
        ("sample_rate=48000&format=mp3", "bad_parameter", "s16le or f32le"),
        ("sample_rate=48000&hop=0", "bad_parameter", "hop"),
        ("sample_rate=48000&hop=11", "bad_parameter", "hop_seconds"),
        ("sample_rate=48000&frames=yes", "bad_parameter", "true or false"),
        ("sample_rate=48000&top=-1", "bad_parameter", "top"),
        ("sample_rate=48000&fromat=s16le", "bad_parameter", "did you mean 'format'"),
        ("sample_rate=48000&model=none", "unknown_model", "this server has default, again"),
        ("sample_rate=48000&operating_point=x", "unknown_operating_point", "the model has"),
    ],
)
def test_a_stream_with_wrong_parameters_is_closed(server, query, code, says):
    async def scenario():
        async with websockets.connect(f"{server.address.replace('http', 'ws')}/v1/stream?{query}") as connection:
            message = json.loads(await connection.recv())
            with pytest.raises(websockets.ConnectionClosed):
                await connection.recv()
            return message, connection.close_code, connection.close_reason

    message, close, reason = asyncio.run(scenario())
    assert (message["type"], message["code"], close) == ("error", code, 1008)
    assert says in message["message"] and reason and message["message"].startswith(reason[:100])


@pytest.mark.slow
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 32000, 44100, 48000, 96000])
def test_streams_hear_the_same_however_they_are_cut(server, rate):
    waveform = read_audio(EXAMPLES / "street.ogg", rate)
    offline = htsat.Predictor("default", backend="onnxruntime", threads=1)
    offline.config = live_config(offline.config, 1.0)
    prediction = offline.predict((waveform, rate), spectrogram=False)
    expected = sorted(tuple(dataclasses.asdict(event).values()) for event in prediction.events)
    for seed in range(15):
        rng = np.random.default_rng(seed)
        messages, code = asyncio.run(
            hear(server, waveform, rate, cuts(rng, len(waveform), rng.integers(200, min(10 * rate, 250_000))))
        )
        assert code == 1000
        assert closed_events(messages) == expected
        rows = np.concatenate([message["posteriors"] for message in messages if message["type"] == "frames"])
        np.testing.assert_array_equal(rows, np.round(prediction.framewise_posteriors.astype(np.float64), 4))


# ------------------------------------------------------------------ the end, and several workers


def test_a_full_server_says_so_to_everybody():
    """By the short way, and by the long one that a page of another origin needs."""
    with Server("--max-requests", 2, "--max-client-requests", 1, "--cors", "https://friend.example") as server:
        with server.connect() as connection:
            connection.sendall(head("Content-Type: audio/wav", "Content-Length: 100000") + b"RIFF")
            until(lambda: server.metric("htsat_requests_inside") == 1)
            for origin in ({}, {"Origin": "https://friend.example"}):
                answer = server.post("/v1/tag", "clock.wav", headers=origin)
                assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_requests")
                assert int(answer.headers["retry-after"]) >= 1
                assert ("access-control-allow-origin" in answer.headers) == bool(origin)
            assert server.client.get("/healthz").status_code == server.client.get("/v1/models").status_code == 200
        until(lambda: server.metric("htsat_requests_inside") == 0)
        assert server.post("/v1/tag", "clock.wav").status_code == 200


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("no-such-model",), 2, "unknown model 'no-such-model'"),
        (("--port", "{port}"), 2, "cannot listen at 127.0.0.1, port {port}"),
        (("--host", "nowhere.invalid"), 2, "cannot listen at nowhere.invalid"),
        (("--cors", "*"), 2, "expected an origin"),
        (("--token", "short"), 2, "8 to 512"),
        (("default", "default"), 2, "two models are called"),
        (("--backend", "none"), 2, "unknown backend"),
    ],
)
def test_what_cannot_start_says_why(server, arguments, code, says):
    arguments = [argument.format(port=server.port) for argument in arguments]
    command = [sys.executable, "-m", "htsat", "serve", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == code and run.stdout == ""
    assert says.format(port=server.port) in run.stderr and run.stderr.count("\n") == 1


def test_a_missing_package_is_named():
    script = (
        "import sys; sys.modules['fastapi'] = None; sys.argv = ['htsat', 'serve']; import htsat.cli; htsat.cli.main()"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr == "htsat: htsat serve needs fastapi, which is not installed: pip install 'htsat[serve]'\n"


def test_a_stop_loses_nothing_that_was_accepted():
    with Server("--max-requests", 64, "--max-client-requests", 64) as server:
        alone = server.post("/v1/detect", "street.ogg").json()
        answers, refused, stop = [], [], threading.Event()

        def client():
            while not stop.is_set():
                accepted = not told.is_set()
                try:
                    with httpx.Client(base_url=server.address, timeout=30) as one:
                        body = (EXAMPLES / "street.ogg").read_bytes()
                        answer = one.post("/v1/detect", content=body, headers={"Content-Type": "audio/ogg"})
                        (answers if answer.status_code == 200 else refused).append(answer)
                except httpx.TransportError:
                    if accepted:
                        raise
                    return  # nobody listens any more

        async def stream():
            address = server.address.replace("http", "ws")
            async with websockets.connect(f"{address}/v1/stream?sample_rate=16000") as connection:
                await connection.send(np.zeros(16000 * 3, "<i2").tobytes())
                while json.loads(await connection.recv())["type"] != "progress":
                    pass
                streaming.set()
                messages = []
                with contextlib.suppress(websockets.ConnectionClosed):
                    while True:
                        messages.append(json.loads(await connection.recv()))
                return messages, connection.close_code

        streaming, told = threading.Event(), threading.Event()
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            live = pool.submit(asyncio.run, stream())
            assert streaming.wait(20)
            clients = [pool.submit(client) for _ in range(8)]
            until(lambda: server.metric("htsat_requests_inside") >= 6)
            told.set()
            server.process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            with contextlib.suppress(httpx.ConnectError):
                ready = httpx.get(f"{server.address}/readyz")
                assert (ready.status_code, ready.json()["status"]) == (503, "stopping")
                assert time.monotonic() - start < 1
            messages, code = live.result(30)
            assert server.process.wait(30) == 0
            stop.set()
            for one in clients:
                one.result(30)
        assert messages[-1] == {"type": "end", "duration": 3.0} and code == 1001
        assert all(answer.json()["events"] == alone["events"] for answer in answers)
        assert len(answers) >= 6  # those that were inside
        assert {answer.status_code for answer in refused} <= {503}
        assert all("retry-after" in answer.headers for answer in refused)


def test_the_second_signal_ends_at_once():
    with Server() as server:
        family = server.family()
        with server.connect() as connection:
            connection.sendall(b"POST /v1/tag HTTP/1.1\r\nHost: localhost\r\nContent-Type: audio/wav\r\n")
            connection.sendall(b"Content-Length: 100000\r\n\r\nRIFF")
            until(lambda: server.metric("htsat_requests_inside") == 1)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(5) == 128 + signal.SIGTERM
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive


def test_several_workers_share_an_address_and_are_replaced():
    with Server("--workers", 2, threads=2) as server:
        parent = psutil.Process(server.process.pid)

        def workers():
            found = [child for child in parent.children() if child.status() != psutil.STATUS_ZOMBIE]
            return [child for child in found if "multiprocessing.spawn" in " ".join(child.cmdline())]

        until(lambda: len(workers()) == 2)
        with httpx.Client(base_url=server.address, timeout=30) as one:
            alone = one.post("/v1/detect", files=form("street.ogg")).json()

        def ask(_):
            with httpx.Client(base_url=server.address, timeout=30) as one:
                answer = one.post("/v1/detect", files=form("street.ogg"))
                return answer.json() if answer.status_code == 200 else answer.status_code

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(16)))
        assert [answer for answer in answers if answer not in (429, 503)] == [alone] * (
            16 - answers.count(429) - answers.count(503)
        )
        # whichever worker is asked tells of both
        counted = server.metric("htsat_requests_total", route="/v1/detect", status="200")
        assert counted == 17 - answers.count(429) - answers.count(503)
        killed = workers()[0]
        killed.kill()
        until(lambda: len(workers()) == 2 and killed.pid not in {worker.pid for worker in workers()}, 20)
        until(lambda: ask(0) == alone, 20)
        family = server.family()
        assert server.stop(signal.SIGTERM) == 0
        assert not psutil.wait_procs(family, timeout=10)[1]
