"""``htsat.Client`` and the examples beside it: against a server that does what a test says, and against ours."""

import base64
import email.utils
import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import soundfile

import htsat
from htsat.client import Client, Detected, ServerError, Tagged
from htsat.errors import UsageError
from htsat.events import Event, Tag

EXAMPLES = Path(__file__).parents[1] / "examples"
STREET = EXAMPLES / "street.ogg"
TAGS = {
    "file": "a.wav", "duration": 2.5, "model": "default",
    "tags": [{"label": "dog", "probability": 0.75}, {"label": "rain", "probability": 0.5}],
}  # fmt: skip
VALUES = np.arange(6, dtype="<f4").reshape(3, 2) / 8
DETECTED = {
    **TAGS,
    "events": [{"event_label": "dog", "onset": 0.5, "offset": 1.25, "probability": 0.75}],
    "posteriors": {
        "frame_seconds": 0.25, "num_frames": 3, "labels": ["dog", "rain"], "encoding": "base64 of ...",
        "data": base64.b64encode(VALUES.tobytes()).decode(),
    },
}  # fmt: skip


def busy(status=503, **headers):
    return status, {"error": {"code": "busy", "message": "the queue is full; come back later"}}, headers


class Server:
    """Answers requests as a list says: (status, value or bytes, headers), or seconds to wait; the last one repeats."""

    def __init__(self, *answers, read=True):
        self.requests: list = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                length = int(self.headers.get("Content-Length", 0))
                answer = answers[min(len(server.requests), len(answers) - 1)]
                server.requests.append((self.path, dict(self.headers), self.rfile.read(length) if read else b""))
                self.close_connection = True
                if isinstance(answer, float):
                    time.sleep(answer)
                    return
                status, value, headers = answer
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, text in headers.items():
                    self.send_header(name.replace("_", "-"), text)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


# --- requests ------------------------------------------------------------------------------------


def test_tag(tmp_path):
    path = tmp_path / "a b.wav"
    path.write_bytes(b"some bytes")
    with Server((200, TAGS, {})) as server:
        client = Client(server.url, token="abc")
        for source, name in ((path, None), (str(path), "x"), (b"some bytes", None)):
            result = client.tag(source, top=2, name=name, model="m")
            assert result == Tagged("a.wav", 2.5, "default", [Tag("dog", 0.75), Tag("rain", 0.5)])
    queries = [parse_qs(urlsplit(path).query) for path, _, _ in server.requests]
    assert queries == [
        {"model": ["m"], "top": ["2"], "name": ["a b.wav"]}, {"model": ["m"], "top": ["2"], "name": ["x"]},
        {"model": ["m"], "top": ["2"]},
    ]  # fmt: skip
    for path, headers, body in server.requests:
        assert path.startswith("/v1/tag?") and body == b"some bytes"
        assert headers["Authorization"] == "Bearer abc" and headers["Content-Type"] == "application/octet-stream"


def test_detect(monkeypatch):
    monkeypatch.setenv("HTSAT_TOKEN", "of the environment")
    with Server((200, DETECTED, {}), (200, {**DETECTED, "posteriors": None}, {})) as server:
        client = htsat.Client(server.url + "/below/")
        result = client.detect(b"x", operating_point="balanced", posteriors=2, top=3)
        assert isinstance(result, Detected) and client.detect(b"x").posteriors is None
    assert result.events == [Event("dog", 0.5, 1.25, 0.75)] and result.tags[0] == Tag("dog", 0.75)
    assert result.posteriors.labels == ["dog", "rain"] and result.posteriors.frame_seconds == 0.25
    assert np.array_equal(result.posteriors.values, VALUES) and result.posteriors.values.dtype == np.float32
    (path, headers, _), (second, _, _) = server.requests
    assert path == "/below/v1/detect?operating_point=balanced&top=3&posteriors=2" and second == "/below/v1/detect?top=5"
    assert headers["Authorization"] == "Bearer of the environment"


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "int32"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_waveform_travels_as_a_file_that_libsndfile_reads(dtype, channels):
    values = np.random.default_rng(0).uniform(-1, 1, (100, channels))
    scale = 1 if dtype.startswith("f") else 2.0 ** (8 * np.dtype(dtype).itemsize - 1)
    waveform = (values * scale).astype(dtype)
    with Server((200, TAGS, {})) as server:
        Client(server.url).tag((waveform[:, 0] if channels == 1 else waveform.T, 8000))
    read, rate = soundfile.read(io.BytesIO(server.requests[0][2]), always_2d=True)
    assert rate == 8000 and np.array_equal(read, (waveform / scale).astype("float32"))


def test_models_and_ready():
    with Server((200, {"models": [{"name": "default"}]}, {}), (200, {}, {}), (503, {}, {})) as server:
        client = Client(server.url)
        assert client.models() == [{"name": "default"}]
        assert [client.ready(), client.ready()] == [True, False]
    assert [path for path, _, _ in server.requests] == ["/v1/models", "/readyz", "/readyz"]
    assert Client(server.url).ready() is False  # nobody is there


# --- failures ------------------------------------------------------------------------------------


def test_a_busy_server_is_asked_again_when_it_says(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    later = email.utils.formatdate(time.time() + 30, usegmt=True)
    answers = [busy(429, Retry_After="7"), busy(Retry_After=later), busy(), busy(Retry_After="?"), (200, TAGS, {})]
    with Server(*answers) as server:
        Client(server.url).tag(b"sound")
        assert len(server.requests) == 5 and {body for _, _, body in server.requests} == {b"sound"}
    assert slept[0] == 7 and 25 < slept[1] <= 30 and 0 < slept[2] <= 2 and 0 < slept[3] <= 4


@pytest.mark.parametrize("retry_after", ["61", "25"])
def test_a_busy_server_is_given_up_within_the_limit(monkeypatch, retry_after):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    words = "the queue is full; come back later"
    with Server(busy(429, Retry_After=retry_after)) as server, pytest.raises(ServerError, match=words) as error:
        Client(server.url, max_wait=60).detect(b"x")
    assert sum(slept) <= 60 and len(slept) == (0 if retry_after == "61" else 2)
    assert (error.value.status, error.value.code) == (429, "busy")


@pytest.mark.parametrize(
    ("answer", "message", "code"),
    [
        (
            (415, {"error": {"code": "not_audio", "message": "x: not a recording"}}, {}),
            "x: not a recording",
            "not_audio",
        ),
        ((401, b"<html>", {}), "answers 401 Unauthorized", None),
        ((500, b"", {}), "answers 500 Internal Server Error", None),
        ((404, {"detail": "Not Found"}, {}), "answers 404 Not Found", None),
        ((302, b"", {"Location": "/x"}), "answers 302 Found", None),
        ((200, b"<html>", {}), "its answer is no JSON", None),
        ((200, [1], {}), "its answer is not that of htsat serve", None),
        ((200, {"file": "a", "duration": "long", "model": "m", "tags": []}, {}), "not that of htsat serve", None),
        ((200, {**TAGS, "events": [{"event_label": "a"}]}, {}), "not that of htsat serve", None),
        ((200, {**DETECTED, "posteriors": {**DETECTED["posteriors"], "data": "AA=="}}, {}), "not that of htsat", None),
        ((200, {**DETECTED, "events": [{**DETECTED["events"][0], "offset": 0.1}]}, {}), "not that of htsat", None),
    ],
)
def test_what_a_server_says_is_told(answer, message, code):
    with Server(answer) as server, pytest.raises(ServerError, match=re.escape(message)) as error:
        Client(server.url).detect(b"x")
    assert error.value.code == code and str(error.value).startswith(server.url)
    assert "\n" not in str(error.value)


def test_a_refusal_before_the_body_is_taken_is_read():
    """The server answers 413 and takes no more: what it says counts, not the broken pipe."""
    refusal = 413, {"error": {"code": "too_large", "message": "at most 1 MB"}}, {"Connection": "close"}
    with Server(refusal, read=False) as server:
        for _ in range(5):
            with pytest.raises(ServerError) as error:
                Client(server.url).tag(bytes(20_000_000))
            assert error.value.status in (413, None) and (
                "at most 1 MB" in str(error.value) or error.value.status is None
            )


def test_no_server_and_no_answer():
    with Server(2.0) as server, pytest.raises(ServerError, match=r"no answer in 0\.2 s"):
        Client(server.url, timeout=0.2).tag(b"x")
    with pytest.raises(ServerError, match=r"cannot be reached \(Connection refused\); is htsat serve running"):
        Client(server.url).tag(b"x")
    with pytest.raises(ServerError, match="no such host"):
        Client("http://no-such-host.invalid").models()


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port", "http://host:70000", "http://h/?a=b"])
def test_addresses_that_are_none(url):
    with pytest.raises(UsageError, match="is no address of a server"):
        Client(url)


def test_what_cannot_be_sent(tmp_path):
    client = Client("http://127.0.0.1:9")
    with pytest.raises(UsageError, match="cannot be read"):
        client.tag(tmp_path / "none.wav")
    for waveform in (np.zeros(0), np.zeros((2, 2, 2)), np.zeros(3, complex)):
        with pytest.raises(UsageError, match="expected a waveform"):
            client.tag((waveform, 8000))
    with pytest.raises(UsageError, match="give token="):
        Client("http://me:secret@host")
    with pytest.raises(UsageError, match="unknown sample format"):
        client.stream(8000, sample_format="s8")


# --- streams -------------------------------------------------------------------------------------


@pytest.fixture
def stream_server():
    """Make a WebSocket server of a handler; returns its address and the requests that it got."""
    server_of = pytest.importorskip("websockets.sync.server")
    running = []

    def make(handler):
        requests = []

        def handle(connection):
            requests.append(connection.request)
            handler(connection)

        server = server_of.serve(handle, "127.0.0.1", 0)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.socket.getsockname()[1]}", requests

    yield make
    for server, thread in running:
        server.shutdown()
        thread.join(5)


START = {"type": "start", "model": "default", "labels": ["dog"]}


@pytest.mark.parametrize("sample_format", ["s16le", "f32le"])
def test_a_stream(stream_server, sample_format):
    frames = []

    def handler(connection):
        connection.send(json.dumps(START))
        for message in connection:
            frames.append(message)
            if isinstance(message, str) and json.loads(message)["type"] == "end":
                connection.send(json.dumps({"type": "end", "duration": 1.0}))
                return
            connection.send(json.dumps({"type": "progress", "time": float(len(frames)), "tags": []}))

    url, requests = stream_server(handler)
    floats, integers = np.array([0.5, -1.0, 1.0, 2.0]), np.array([16384, -32768], np.int16)
    client = Client(url, token="abc")
    with client.stream(48000, hop=0.5, frames=True, sample_format=sample_format, operating_point="balanced") as stream:
        assert stream.start == START
        stream.send(floats)
        stream.gap(2.5)
        stream.send(integers)
        stream.end()
        messages = list(stream)
        assert list(stream) == []
    assert [message["type"] for message in messages] == ["progress"] * 3 + ["end"]
    expected = {
        "s16le": ([16384, -32768, 32767, 32767], [16384, -32768], "<i2"),
        "f32le": ([0.5, -1, 1, 2], [0.5, -1], "<f4"),
    }[sample_format]
    assert np.frombuffer(frames[0], expected[2]).tolist() == expected[0]
    assert np.frombuffer(frames[2], expected[2]).tolist() == expected[1]
    assert json.loads(frames[1]) == {"type": "gap", "seconds": 2.5}
    query = parse_qs(urlsplit(requests[0].path).query)
    assert query == {
        "sample_rate": ["48000"], "format": [sample_format], "hop": ["0.5"], "operating_point": ["balanced"],
        "frames": ["true"], "top": ["5"],
    }  # fmt: skip
    assert requests[0].headers["Authorization"] == "Bearer abc"


def test_a_server_that_answers_much_and_a_client_that_only_sends(stream_server):
    """Neither waits for the other for ever: messages are kept while samples are sent."""

    def handler(connection):
        connection.send(json.dumps(START))
        for message in connection:
            if isinstance(message, str):
                connection.send(json.dumps({"type": "end"}))
                return
            connection.send(json.dumps({"type": "frames", "posteriors": [[0.5] * 20_000]}))

    url, _ = stream_server(handler)
    with Client(url).stream(8000) as stream:
        for _ in range(200):
            stream.send(np.zeros(8000))
        stream.end()
        assert len(list(stream)) == 201


def test_one_thread_sends_while_another_reads(stream_server):
    def handler(connection):
        connection.send(json.dumps(START))
        for number, message in enumerate(connection):
            last = isinstance(message, str)
            connection.send(json.dumps({"type": "end" if last else "progress", "number": number}))
            if last:
                return

    url, _ = stream_server(handler)
    with Client(url).stream(8000) as stream:
        got = []
        reader = threading.Thread(target=lambda: got.extend(stream))
        reader.start()
        for _ in range(300):
            stream.send(np.zeros(80))
        stream.end()
        reader.join(20)
    assert [message["number"] for message in got] == list(range(301))


def test_errors_of_streams(stream_server):
    def refusing(connection):
        connection.send(json.dumps(START))
        connection.recv()
        connection.send(json.dumps({"type": "error", "message": "frames of 3 bytes are no samples"}))

    def vanishing(connection):
        connection.send(json.dumps(START))
        connection.recv()
        connection.socket.close()

    def strange(connection):
        connection.send("[]")

    url, _ = stream_server(refusing)
    with Client(url).stream(8000) as stream:
        stream.send(np.zeros(80))
        with pytest.raises(ServerError, match="frames of 3 bytes are no samples"):
            list(stream)
    with Client(url).stream(8000) as stream:  # one that only sends is told as well
        stream.send(np.zeros(80))
        with pytest.raises(ServerError, match="frames of 3 bytes are no samples"):
            for _ in range(1000):
                stream.send(np.zeros(80))
                time.sleep(0.01)
    url, _ = stream_server(vanishing)
    with Client(url).stream(8000) as stream:
        stream.send(np.zeros(80))
        with pytest.raises(ServerError, match="the stream was ended"):
            list(stream)
    url, _ = stream_server(strange)
    with pytest.raises(ServerError, match="not that of htsat serve"):
        Client(url).stream(8000)
    url, _ = stream_server(lambda connection: time.sleep(1))
    with pytest.raises(ServerError, match=r"no message in 0\.3 s"):
        Client(url, timeout=0.3).stream(8000)
    with Server((401, {"error": {"code": "no_token", "message": "give a token"}}, {})) as server:
        with pytest.raises(ServerError, match="give a token") as error:
            Client(server.url).stream(8000)
        assert (error.value.status, error.value.code) == (401, "no_token")
    with pytest.raises(ServerError, match="cannot be reached"):
        Client(server.url).stream(8000)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "websockets.exceptions", None)
    with pytest.raises(UsageError, match=r"pip install 'htsat\[serve\]'"):
        Client().stream(8000)


def test_the_client_alone_is_light():
    script = """
import sys, htsat
htsat.Client("http://x")
print(sorted({"torch", "onnxruntime", "websockets", "soundfile"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (result.stdout, result.stderr) == ("[]\n", "")


# --- our server ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served():
    """The address of ``htsat serve`` with the bundled model and a token."""
    for package in ("fastapi", "uvicorn", "websockets", "prometheus_client", "python_multipart"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    arguments = [sys.executable, "-m", "htsat", "serve", "--port", "0", "--token", "open-sesame", "--threads", "1"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if found := re.search(r"listening at (http://\S+?),? ", line):
                break
        else:
            pytest.fail("the server did not start")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        url = found[1]
        end = time.monotonic() + 60
        while not Client(url, token="open-sesame").ready():
            assert time.monotonic() < end
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)
        process.stderr.close()


@pytest.fixture(scope="module")
def told():
    """What ``Predictor`` says of the recording."""
    return htsat.Predictor(threads=1, backend="onnxruntime").predict(STREET, spectrogram=False)


def test_our_server_says_what_the_predictor_says(served, told):
    client = Client(served, token="open-sesame")
    found = client.detect(STREET, posteriors=3)
    assert (found.file, found.duration) == ("street.ogg", told.duration)
    assert [(e.event_label, e.onset, e.offset) for e in found.events] == [
        (e.event_label, e.onset, e.offset) for e in told.events
    ]
    assert np.allclose([e.probability for e in found.events], [e.probability for e in told.events], atol=1e-5)
    order = np.argsort(-told.framewise_posteriors.max(axis=0))[:3]
    assert found.posteriors.labels == [told.labels[i] for i in order]
    assert np.allclose(found.posteriors.values, told.framewise_posteriors[:, order], atol=1e-5)
    waveform, rate = soundfile.read(STREET, dtype="float32")
    tags = client.tag((waveform, rate), top=2).tags
    assert [tag.label for tag in tags] == [tag.label for tag in told.tags[:2]]
    assert client.models()[0]["labels"] == told.labels
    with pytest.raises(ServerError) as error:
        Client(served, token="wrong").models()
    assert error.value.status == 401


def test_our_server_streams(served):
    waveform, rate = soundfile.read(STREET, dtype="float32", always_2d=True)
    with Client(served, token="open-sesame").stream(rate, sample_format="f32le") as stream:
        for start in range(0, len(waveform), 5000):
            stream.send(waveform[start : start + 5000].mean(axis=1))
        stream.end()
        messages = list(stream)
    opened, closed = (
        [message["id"] for message in messages if message["type"] == "event" and message["state"] == state]
        for state in ("open", "close")
    )
    assert messages[-1]["type"] == "end" and messages[-1]["duration"] == pytest.approx(len(waveform) / rate)
    assert sorted(opened) == sorted(closed) and len(opened) >= 3


def example(arguments, served):
    environment = os.environ | {"HTSAT_TOKEN": "open-sesame"}
    run = subprocess.run([*arguments, STREET, served], capture_output=True, text=True, timeout=100, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_example_in_python(served, told):
    out = example([sys.executable, EXAMPLES / "client.py"], served)
    for event in told.events:
        assert f"  {event.onset:7.2f} to {event.offset:7.2f}  {event.event_label}\n" in out
    assert "  close " in out


def test_the_example_for_curl(served, told):
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    tags, detected, models = (json.loads(line) for line in example(["sh", EXAMPLES / "client.sh"], served).splitlines())
    assert [tag["label"] for tag in tags["tags"]] == [tag.label for tag in told.tags[:3]]
    assert [(e["event_label"], e["onset"]) for e in detected["events"]] == [
        (e.event_label, e.onset) for e in told.events
    ]
    assert models["models"][0]["labels"] == told.labels


def test_the_example_in_javascript(served, told):
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    version = int(subprocess.run([node, "--version"], capture_output=True, text=True).stdout.strip("v").split(".")[0])
    if version < 20:
        pytest.skip("needs Node 20")
    flags = ["--experimental-websocket"] if version < 22 else []
    lines = example([node, *flags, EXAMPLES / "client.js"], served).splitlines()
    assert lines[0].startswith("street.ogg: 25.0 s")
    for event in told.events:
        assert f"  {event.onset:.2f} to {event.offset:.2f}  {event.event_label}" in lines
    assert "start " in lines and lines[-1] == "end "
