"""Clients that break rules: each gets a precise refusal at bounded cost, and nobody else notices."""

import asyncio
import concurrent.futures
import contextlib
import io
import json
import os
import random
import socket
import struct
import threading
import time

import numpy as np
import psutil
import pytest
import soundfile
import websockets
from serving import EXAMPLES, Server, answer_of, head, raw, until

LIMIT = 3_000_000
RAW = "Content-Type: application/octet-stream"
MULTIPART = "Content-Type: multipart/form-data; boundary=sep"


@pytest.fixture(scope="module")
def server():
    with Server(
        "--max-bytes", LIMIT, "--max-seconds", 600, "--max-streams", 8, "--max-wait", 3, "--max-requests", 24
    ) as server:
        server.post("/v1/detect", "street.ogg")
        before = server.memory(), psutil.Process(server.pid).num_fds(), len(server.family())
        yield server
        # After everything below: as at the beginning.
        until(lambda: server.metric("htsat_requests_inside") == server.metric("htsat_streams") == 0)
        until(lambda: psutil.Process(server.pid).num_fds() <= before[1] + 3)
        until(lambda: len(server.family()) <= before[2])
        assert server.memory() - before[0] < 60e6
        assert server.metric("htsat_requests_total", status="500") == 0
        assert not any("Traceback" in line for line in server.lines)


@pytest.fixture(autouse=True)
def healthy(server):
    """After every attack an honest client is answered at once."""
    yield
    start = time.monotonic()
    assert server.post("/v1/tag", "clock.wav").status_code == 200
    assert time.monotonic() - start < 2


def code_of(answer):
    status, headers, body = answer
    assert headers["content-type"] == "application/json"
    if status in (429, 503):
        assert int(headers["retry-after"]) >= 1
    return status, body["error"]["code"]


# ------------------------------------------------------------------ bodies


@pytest.mark.parametrize(
    ("lines", "body", "status", "code"),
    [
        ((RAW,), b"", 411, "length_required"),
        ((RAW, "Content-Length: 0"), b"", 400, "empty_body"),
        ((RAW, "Content-Length: -5"), b"abcde", 400, "bad_request"),
        ((RAW, "Content-Length: +5"), b"abcde", 400, "bad_request"),
        ((RAW, "Content-Length: five"), b"abcde", 400, "bad_request"),
        ((RAW, "Content-Length: 0x10"), b"abcde", 400, "bad_request"),
        ((RAW, "Content-Length: 5", "Content-Length: 6"), b"abcdef", 400, "bad_request"),
        ((RAW, "Content-Length: 99999999999999999999999999"), b"", 400, "bad_request"),
        ((RAW, "Content-Length: 10000000000"), b"", 413, "too_large"),
        ((RAW, f"Content-Length: {LIMIT + 1}"), b"", 413, "too_large"),
        ((RAW, "Transfer-Encoding: gzip"), b"", 400, "bad_request"),
        ((RAW, "Transfer-Encoding: chunked"), b"nonsense\r\n", 400, "bad_request"),
        ((RAW, "Transfer-Encoding: chunked"), b"-1\r\n", 400, "bad_request"),
        ((RAW, "Transfer-Encoding: chunked"), b"ffffffffffffffffffffffff\r\n", 400, "bad_request"),
        ((RAW, "Transfer-Encoding: chunked"), b"0\r\n\r\n", 400, "empty_body"),
        ((RAW, "A" * 100 + ": " + "b" * 100_000), b"", 431, "header_too_large"),
        ((RAW, *(f"A{i}: b" for i in range(20_000))), b"", 431, "header_too_large"),
        ((RAW, "no header"), b"", 400, "bad_request"),
    ],
)  # fmt: skip
def test_lengths_and_headers(server, lines, body, status, code):
    start = time.monotonic()
    assert code_of(raw(server, head(*lines), body)) == (status, code)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    "data", [b"\0" * 1000, b"\x16\x03\x01\x02\0\x01\0", b"GET\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\n", b"\r\n" * 50_000]
)
def test_what_is_no_http(server, data):
    with server.connect() as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data + b"\r\n\r\n")
        assert code_of(answer_of(connection))[0] in (400, 403, 431)


@pytest.mark.parametrize("kind", [RAW, MULTIPART])
def test_a_body_without_end_is_refused_at_the_limit(server, kind):
    memory = server.memory()
    sent = 0
    with server.connect() as connection:
        connection.sendall(head(kind, "Transfer-Encoding: chunked"))
        start = time.monotonic()
        if kind == MULTIPART:
            part = b'--sep\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
            connection.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        with contextlib.suppress(OSError):
            while sent < 10_000_000_000 and time.monotonic() - start < 15:
                sent += connection.send(piece)
        assert code_of(answer_of(connection)) == (413, "too_large")
    assert time.monotonic() - start < 8
    assert sent < LIMIT + 40_000_000  # the limit, what is read on for politeness, and what the system holds
    assert server.memory() - memory < 50e6


def test_a_refusal_reaches_a_client_that_sends_everything_first(server):
    answer = raw(server, head(RAW, f"Content-Length: {LIMIT + 500_000}"), b"x" * (LIMIT + 500_000))
    assert code_of(answer) == (413, "too_large")


def test_a_body_longer_than_declared_is_another_request_at_best(server):
    body = (EXAMPLES / "clock.wav").read_bytes()
    with server.connect() as connection:
        connection.sendall(head(RAW, f"Content-Length: {len(body)}") + body + b"x" * 1000 + b"\r\n\r\n")
        file = connection.makefile("rb")
        everything = file.read()
        file.close()
    assert everything.startswith(b"HTTP/1.1 200") and everything.count(b"HTTP/1.1 400") == 1


def test_a_body_shorter_than_declared_is_nothing(server):
    before = server.metric("htsat_requests_total", status="499")
    body = (EXAMPLES / "clock.wav").read_bytes()
    with server.connect() as connection:
        connection.sendall(head(RAW, f"Content-Length: {len(body) + 1}") + body)
    until(lambda: server.metric("htsat_requests_total", status="499") == before + 1)


def test_slow_clients_are_told_so(server):
    """Nothing at all, half a head, a body that stands still, and one that trickles."""
    half_head = head(RAW)[:-20]
    stalled = head(RAW, "Content-Length: 5000") + b"x" * 100

    def wait(data, trickle=False):
        with server.connect() as connection:
            start = time.monotonic()
            connection.sendall(data)
            if trickle:
                connection.settimeout(0.05)
                with contextlib.suppress(OSError):
                    while time.monotonic() - start < 15:
                        connection.sendall(b"x")
                        with contextlib.suppress(TimeoutError):
                            if connection.recv(1, socket.MSG_PEEK):
                                break
                connection.settimeout(5)
            return code_of(answer_of(connection)), time.monotonic() - start

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        waits = [pool.submit(wait, data) for data in (b"", b"POST", half_head, stalled)]
        waits.append(pool.submit(wait, stalled, trickle=True))
        # meanwhile others are answered, and slow ones hold nobody's place
        until(lambda: server.metric("htsat_requests_inside") == 2)
        for _ in range(5):
            assert server.post("/v1/tag", "clock.wav").status_code == 200
        for waiting, longest in zip(waits, (8, 8, 8, 8, 9), strict=True):
            code, seconds = waiting.result()
            assert code == (408, "too_slow") and seconds < longest


def test_many_slow_clients_leave_room(server):
    """More bodies that stand still than there are places: those of one client are limited, the others are parked."""
    held = []
    try:
        for _ in range(12):
            held.append(server.connect())
            held[-1].sendall(head(RAW, "Content-Length: 5000") + b"x" * 100)
        until(lambda: server.metric("htsat_requests_inside") == 12)
        with server.connect() as connection:
            connection.sendall(head(RAW, "Content-Length: 5") + b"abcde")
            assert code_of(answer_of(connection)) == (429, "too_many_requests")
    finally:
        for connection in held:
            connection.close()
    until(lambda: server.metric("htsat_requests_inside") == 0)


def test_thousands_of_parts(server):
    body = b"".join(b'--sep\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n' for _ in range(100_000))
    start, memory = time.monotonic(), server.memory()
    answer = raw(server, head(MULTIPART, "Transfer-Encoding: chunked"), f"{len(body):x}\r\n".encode(), body)
    assert code_of(answer) == (413, "too_many_parts")
    assert time.monotonic() - start < 2
    assert server.memory() - memory < 30e6


def test_a_client_that_leaves_is_not_worked_for(server):
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8000, 1, format="OGG") as sound:
        for seed in range(500):
            sound.write(0.01 * np.random.default_rng(seed).standard_normal(8000))
    body = file.getvalue()
    assert len(body) < LIMIT
    before = server.metric("htsat_chunks_total"), server.metric("htsat_requests_total", status="499")
    with server.connect() as connection:
        connection.sendall(head(RAW, f"Content-Length: {len(body)}") + body)
        until(lambda: server.metric("htsat_chunks_total") > before[0] + 1)
    until(lambda: server.metric("htsat_requests_inside") == server.metric("htsat_chunks_waiting") == 0, 2)
    assert server.metric("htsat_chunks_total") - before[0] < 90  # of 99
    until(lambda: server.metric("htsat_requests_total", status="499") == before[1] + 1)


def test_a_client_that_does_not_read_its_answer_holds_no_place(server):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(8000 * 120), 8000, format="FLAC")
    body = file.getvalue()
    with server.connect(receive_buffer=4096) as connection:
        request = head(RAW, f"Content-Length: {len(body)}", path="/v1/detect?posteriors=1000")
        connection.sendall(request + body)
        until(lambda: server.metric("htsat_requests_inside") == 1)
        until(lambda: server.metric("htsat_requests_inside") == 0, 60)


# ------------------------------------------------------------------ recordings


def forged(field, value, rate=16000):
    """Return a WAV of a second whose header says something else."""
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.random.default_rng(0).standard_normal(rate), rate, format="WAV", subtype="PCM_16")
    data = bytearray(file.getvalue())
    offset, form = {"channels": (22, "<H"), "rate": (24, "<I"), "size": (40, "<I")}[field]
    struct.pack_into(form, data, offset, value)
    if field == "channels":
        struct.pack_into("<H", data, 32, 2 * value)
    return bytes(data)


def silence(seconds, rate=8000, channels=1, format="FLAC"):
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", rate, channels, format=format) as sound:
        for _ in range(seconds // 60):
            sound.write(np.zeros((60 * rate, channels), np.int16))
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (forged("rate", 1), 422, "1 Hz"),
        (forged("rate", 3999), 422, "3999 Hz"),
        (forged("rate", 655_350), 422, "655350 Hz"),
        (forged("rate", 0x7FFFFFFF), 422, "Hz"),
        (forged("channels", 255), 422, "255 channels"),
        (forged("size", 2_000_000_000), 422, "truncated"),
        (lambda: silence(660), 413, "600 s"),
        (lambda: silence(660, format="OGG"), 413, "600 s"),
        (lambda: silence(660, 48_000, 2), 413, "600 s"),
        (forged("rate", 16000)[:44], 422, ""),
        (b"RIFF", 422, "damaged"),
        (b"fLaC" + b"\xff" * 4000, (415, 422), ""),
        (b"OggS" + b"\0" * 4000, (415, 422), ""),
        (b"ID3" + os.urandom(4000), (415, 422), ""),
        (b"#EXTM3U\nfile:///etc/passwd\n", 415, "text"),
        (b"http://127.0.0.1/x.wav", 415, "text"),
    ],
)
def test_hostile_recordings(server, body, status, says):
    body = body() if callable(body) else body
    start, memory = time.monotonic(), server.memory()
    answer = server.post("/v1/detect", body)
    assert time.monotonic() - start < 2
    assert answer.status_code in (status if isinstance(status, tuple) else (status,))
    assert says in answer.json()["error"]["message"] and "root:" not in answer.text
    assert server.memory() - memory < 30e6


def test_decoders_that_are_killed_harm_nobody(server):
    bodies = [(EXAMPLES / name).read_bytes() for name in ("street.ogg", "waves.flac")]
    alone = [server.post("/v1/tag", body).json() for body in bodies]
    stop, choice = threading.Event(), random.Random(0)

    def kill():
        killed = 0
        while not stop.wait(0.2):
            with contextlib.suppress(psutil.Error):
                decoders = [process for process in server.family() if process.ppid() not in (os.getpid(), server.pid)]
                choice.choice(decoders).kill()
                killed += 1
        return killed

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        killing = pool.submit(kill)
        try:
            for _ in range(5):
                answers = list(pool.map(lambda body: server.post("/v1/tag", body), bodies * 2))
                assert [answer.json() for answer in answers] == alone * 2
        finally:
            stop.set()
        assert killing.result() > 3


# ------------------------------------------------------------------ streams


def stream(server, query="sample_rate=16000", **settings):
    return websockets.connect(f"{server.address.replace('http', 'ws')}/v1/stream?{query}", **settings)


async def closed(connection):
    """Return the messages until the end, and how it ended."""
    messages = []
    with contextlib.suppress(websockets.ConnectionClosed):
        async with asyncio.timeout(15):
            while True:
                messages.append(json.loads(await connection.recv()))
    return messages, connection.close_code, connection.close_reason


@pytest.mark.parametrize(
    ("frame", "close", "code"),
    [
        (b"\0" * 3, 1007, "bad_frame"),
        (b"\0" * ((1 << 20) + 2), 1009, "frame_too_large"),
        ("not JSON", 1008, "bad_message"),
        ("[1, 2]", 1008, "bad_message"),
        ('{"type": "start"}', 1008, "bad_message"),
        ('{"type": "gap"}', 1008, "bad_message"),
        ('{"type": "gap", "seconds": -1}', 1008, "bad_message"),
        ('{"type": "gap", "seconds": 1e300}', 1008, "bad_message"),
        ('{"type": "gap", "seconds": true}', 1008, "bad_message"),
        ('{"type": "gap", "seconds": NaN}', 1008, "bad_message"),
        ("[" * 900, 1008, "bad_message"),
        ("x" * 500_000, 1008, "bad_message"),
    ],
)
def test_frames_of_the_wrong_kind(server, frame, close, code):
    async def scenario():
        async with stream(server) as connection:
            await connection.send(b"\0" * 3200)
            start = time.monotonic()
            await connection.send(frame)
            result = await closed(connection)
            assert time.monotonic() - start < 2
            return result

    messages, found, reason = asyncio.run(scenario())
    assert messages[-1]["type"] == "error" and messages[-1]["code"] == code
    assert found == close and reason


def test_a_frame_beyond_all_bounds_is_refused_by_the_protocol(server):
    async def scenario():
        async with stream(server) as connection:
            with contextlib.suppress(websockets.ConnectionClosed):
                await connection.send(b"\0" * 20_000_000)
            return await closed(connection)

    memory = server.memory()
    _, close, _ = asyncio.run(scenario())
    assert close == 1009
    assert server.memory() - memory < 30e6


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_samples_that_are_none(server, value):
    async def scenario():
        async with stream(server, "sample_rate=16000&format=f32le") as connection:
            await connection.send(np.array([0, value, 0], "<f4").tobytes())
            return await closed(connection)

    messages, close, _ = asyncio.run(scenario())
    assert (messages[-1]["code"], close) == ("bad_samples", 1007)


def test_a_client_that_never_reads_is_given_up(server):
    """It sends faster than real time and asks for all frames, so that answers pile up."""
    memory = server.memory()
    with server.connect(receive_buffer=4096) as connection:
        query = "sample_rate=8000&frames=true&hop=0.5&top=1000"
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
        upgrade = head(
            "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", key,
            path=f"/v1/stream?{query}", method="GET",
        )  # fmt: skip
        connection.sendall(upgrade)
        until(lambda: server.metric("htsat_streams") == 1)
        payload = bytes(16000)
        frame = b"\x82\xfe" + struct.pack(">H", len(payload)) + b"\0\0\0\0" + payload
        connection.settimeout(0.2)
        end, gone = time.monotonic() + 60, False
        while not gone and time.monotonic() < end:
            try:
                connection.sendall(frame)
            except TimeoutError:
                gone = server.metric("htsat_streams") == 0
            except OSError:
                gone = True
        assert gone
        until(lambda: server.metric("htsat_streams") == 0, 20)
    assert server.memory() - memory < 30e6


def test_a_flood_is_slowed_down_and_then_told_as_a_gap(server):
    """More sound at once than can be heard in the time that it may wait."""
    seconds = 700

    async def scenario():
        async with stream(server, "sample_rate=8000&hop=0.2&max_delay=4", max_size=None) as connection:

            async def send():
                for _ in range(seconds):
                    await connection.send(bytes(16000))
                await connection.send('{"type": "end"}')

            sending = asyncio.create_task(send())
            result = await closed_late(connection)
            await sending
            return result

    messages, close = asyncio.run(scenario())
    gaps = [message for message in messages if message["type"] == "gap"]
    assert close == 1000 and messages[-1] == {"type": "end", "duration": pytest.approx(seconds)}
    assert gaps and sum(message["duration"] for message in gaps) > 10
    starts = [message["start"] for message in gaps]
    assert starts == sorted(starts)
    assert server.metric("htsat_stream_gap_seconds_total") >= sum(message["duration"] for message in gaps) - 0.01


async def closed_late(connection):
    messages = []
    with contextlib.suppress(websockets.ConnectionClosed):
        while True:
            messages.append(json.loads(await connection.recv()))
    return messages, connection.close_code


def test_without_a_limit_on_delay_a_flood_waits_and_loses_nothing(server):
    async def scenario():
        async with stream(server, "sample_rate=8000&hop=1", max_size=None) as connection:

            async def send():
                for _ in range(12):
                    await connection.send(bytes(160_000))  # 10 s each
                await connection.send('{"type": "end"}')

            sending = asyncio.create_task(send())
            result = await closed_late(connection)
            await sending
            return result

    messages, close = asyncio.run(scenario())
    assert close == 1000 and messages[-1] == {"type": "end", "duration": 120.0}
    assert not [message for message in messages if message["type"] == "gap"]
    assert len([message for message in messages if message["type"] == "progress"]) >= 117


def test_more_streams_than_there_is_room_for(server):
    async def scenario():
        async with contextlib.AsyncExitStack() as stack:
            connections = [await stack.enter_async_context(stream(server)) for _ in range(9)]
            messages, close, _ = await closed(connections[-1])
            assert [message.get("code") for message in messages] == ["busy"] and close == 1013
            for connection in connections[:-1]:
                assert json.loads(await connection.recv())["type"] == "start"

    asyncio.run(scenario())


def test_streams_that_break_off_are_cleaned_up(server):
    async def scenario():
        for _ in range(5):
            connection = await stream(server)
            await connection.send(bytes(64_000))
            connection.transport.abort()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(1):
                await connection.wait_closed()

    asyncio.run(scenario())
    until(lambda: server.metric("htsat_streams") == 0, 5)


@pytest.mark.slow
def test_too_many_connections_are_refused():
    with Server("--max-requests", 2) as server:
        held = []
        try:
            for _ in range(1010):
                held.append(server.connect())
            refused = [connection for connection in held[990:] if readable(connection)]
            assert refused
            assert code_of(answer_of(refused[0])) == (503, "busy")
        finally:
            for connection in held:
                connection.close()
        until(lambda: answers(server), 15)


def readable(connection):
    connection.settimeout(0.3)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
    finally:
        connection.settimeout(10)


def answers(server):
    return server.post("/v1/tag", "clock.wav").status_code == 200
