"""What a server is made of, one by one: turns, slots, tokens, names, bodies."""

import asyncio
import concurrent.futures
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from htsat.apps.serve.batcher import Batcher, Heard
from htsat.apps.serve.guard import ApiError, Gate, Hosts, Keys, bearer, cookie_of, same_origin
from htsat.apps.serve.settings import ServeSettings, named_models, read_tokens
from htsat.apps.serve.uploads import ClientLeftError, read_uploads
from htsat.errors import UsageError


class Backend:
    """Answers with the first sample of each chunk; notes what it was given, and may be held up."""

    def __init__(self):
        self.calls = []
        self.go = threading.Event()
        self.go.set()
        self.error = None

    def __call__(self, chunks):
        self.go.wait(10)
        self.calls.append(chunks[:, 0].tolist())
        if self.error is not None:
            raise self.error
        first = chunks[:, :1].astype(np.float32)
        return first, first[:, None] * 2, first * 3


def chunk(value, length=4):
    return np.full(length, value, np.float32)


@pytest.fixture
def make():
    batchers = []

    def make(batch_size=1, threads=1, names=("m",), **settings):
        backends = {name: Backend() for name in names}
        heard = {name: Heard(backend, batch_size) for name, backend in backends.items()}
        batchers.append(Batcher(heard, threads=threads, **settings))
        return batchers[-1], backends

    yield make
    for batcher in batchers:
        for heard in batcher._models.values():
            heard.backend.go.set()
        batcher.stop()


def busy(batcher, backend, model="m"):
    """Hold the only thread up; returns what holds it."""
    backend.go.clear()
    held = batcher.source(model).submit(chunk(-1))
    while batcher.waiting:
        time.sleep(0.001)
    return held


def test_each_source_gets_its_own_answers(make):
    batcher, _ = make(batch_size=4, threads=2)
    sources = [batcher.source("m", live=bool(number % 2)) for number in range(8)]
    futures = [(100 * n + i, source.submit(chunk(100 * n + i))) for i in range(20) for n, source in enumerate(sources)]
    for value, future in futures:
        clip, frame, embedding = future.result(10)
        assert (clip.shape, frame.shape, embedding.shape) == ((1, 1), (1, 1, 1), (1, 1))
        assert (clip.item(), frame.item(), embedding.item()) == (value, 2 * value, 3 * value)
    assert batcher.waiting == 0


def test_a_long_request_does_not_delay_a_short_one(make):
    batcher, backends = make()
    busy(batcher, backends["m"])
    long, short = batcher.source("m"), batcher.source("m")
    futures = [long.submit(chunk(value)) for value in range(5)] + [short.submit(chunk(9))]
    backends["m"].go.set()
    concurrent.futures.wait(futures, 10)
    assert backends["m"].calls == [[-1], [0], [9], [1], [2], [3], [4]]


def test_live_streams_come_first_but_requests_are_not_starved(make):
    batcher, backends = make()
    busy(batcher, backends["m"])
    request, stream = batcher.source("m"), batcher.source("m", live=True)
    futures = [request.submit(chunk(100 + value)) for value in range(3)]
    futures += [stream.submit(chunk(value)) for value in range(9)]
    backends["m"].go.set()
    concurrent.futures.wait(futures, 10)
    heard = [value >= 100 for (value,) in backends["m"].calls[1:]]
    assert heard.count(True) == 3
    assert not heard[0] or not heard[1]
    gaps = np.diff(np.flatnonzero(heard))
    assert np.flatnonzero(heard)[0] <= 3 and all(gaps == 4)  # every fourth turn


def test_what_waits_is_heard_together(make):
    sizes = []
    batcher, backends = make(batch_size=3, on_batch=lambda model, chunks, seconds: sizes.append((model, chunks)))
    busy(batcher, backends["m"])
    futures = [batcher.source("m").submit(chunk(value)) for value in range(7)]
    backends["m"].go.set()
    for value, future in enumerate(futures):
        assert future.result(10)[0].item() == value
    assert sizes == [("m", 1), ("m", 3), ("m", 3), ("m", 1)]


def test_chunks_of_other_lengths_are_not_stacked(make):
    batcher, backends = make(batch_size=8)
    busy(batcher, backends["m"])
    futures = [batcher.source("m").submit(chunk(value, length)) for value, length in enumerate((4, 4, 8, 8, 4))]
    backends["m"].go.set()
    assert [future.result(10)[0].item() for future in futures] == [0, 1, 2, 3, 4]
    assert backends["m"].calls == [[-1], [0, 1], [2, 3], [4]]


def test_models_take_turns(make):
    batcher, backends = make(names=("a", "b"))
    backends["b"].calls = backends["a"].calls
    busy(batcher, backends["a"], "a")
    futures = [batcher.source("a").submit(chunk(value)) for value in (1, 2, 3)]
    futures += [batcher.source("b").submit(chunk(value)) for value in (11, 12)]
    backends["a"].go.set()
    concurrent.futures.wait(futures, 10)
    assert backends["a"].calls == [[-1], [11], [1], [12], [2], [3]]


def test_a_source_that_is_closed_is_not_heard(make):
    batcher, backends = make()
    busy(batcher, backends["m"])
    gone, here = batcher.source("m"), batcher.source("m")
    given_up = [gone.submit(chunk(value)) for value in range(3)]
    wanted = here.submit(chunk(7))
    gone.close()
    assert batcher.waiting == 1
    assert all(future.cancelled() for future in given_up)
    assert gone.submit(chunk(5)).cancelled()
    backends["m"].go.set()
    wanted.result(10)
    assert backends["m"].calls == [[-1], [7]]


def test_a_cancelled_future_is_not_heard(make):
    batcher, backends = make()
    busy(batcher, backends["m"])
    source = batcher.source("m")
    first, second = source.submit(chunk(1)), source.submit(chunk(2))
    first.cancel()
    backends["m"].go.set()
    second.result(10)
    assert backends["m"].calls == [[-1], [2]]


def test_errors_reach_those_who_wait_and_nobody_else(make):
    batcher, backends = make(batch_size=2)
    held = busy(batcher, backends["m"])
    futures = [batcher.source("m").submit(chunk(value)) for value in range(2)]
    backends["m"].error = MemoryError("no memory for a batch")
    backends["m"].go.set()
    for future in (held, *futures):
        with pytest.raises(MemoryError):
            future.result(10)
    backends["m"].error = None
    assert batcher.source("m").submit(chunk(3)).result(10)[0].item() == 3


def test_the_wait_is_told_from_what_was_measured(make):
    batcher, backends = make()
    assert batcher.expected_wait == 0
    held = busy(batcher, backends["m"])
    time.sleep(0.2)
    backends["m"].go.set()
    held.result(10)
    assert 0.15 < batcher.chunk_seconds < 1
    backends["m"].go.clear()
    futures = [batcher.source("m").submit(chunk(value)) for value in range(5)]
    while batcher.waiting > 4:
        time.sleep(0.001)
    assert batcher.expected_wait == pytest.approx(4 * batcher.chunk_seconds)
    backends["m"].go.set()
    concurrent.futures.wait(futures, 10)


def test_a_stop_cancels_what_waits(make):
    batcher, backends = make()
    held = busy(batcher, backends["m"])
    futures = [batcher.source("m").submit(chunk(value)) for value in range(3)]
    stopping = threading.Thread(target=batcher.stop)
    stopping.start()
    concurrent.futures.wait(futures, 10)
    backends["m"].go.set()
    stopping.join(10)
    assert not stopping.is_alive()
    assert held.done() and all(future.cancelled() for future in futures)
    assert batcher.source("m").submit(chunk(1)).cancelled()


# ------------------------------------------------------------------ slots


def refused(gate, client="a"):
    error = gate.refusal(client)
    return error and (error.status, error.code)


def test_the_gate_refuses_beyond_its_slots():
    gate = Gate(slots=3, share=2, max_wait=1)
    with gate.enter("a"), gate.enter("a"):
        assert refused(gate) == (429, "too_many_requests")
        with gate.enter("b"):
            assert gate.inside == 3
            assert refused(gate, "b") == refused(gate, "c") == (503, "busy")
            assert int(gate.refusal("c").headers["Retry-After"]) >= 1
        assert refused(gate, "b") is None
    assert gate.inside == 0
    assert refused(gate) is None


def test_the_gate_refuses_when_too_much_work_waits():
    wait = 0.0
    gate = Gate(slots=3, share=3, max_wait=1, wait=lambda: wait)
    wait = 5.0
    assert refused(gate) is None  # streams alone do not shut requests out
    with gate.enter("a"):
        assert refused(gate) == (503, "busy")
        wait = 0.5
        assert refused(gate) is None


def test_a_closed_gate_refuses_everybody():
    gate = Gate(slots=3, share=3, max_wait=1)
    with gate.enter("a"):
        gate.closed = True
        assert refused(gate) == (503, "stopping")
        assert gate.inside == 1


def test_retry_after_is_the_time_that_half_of_them_will_take(monkeypatch):
    gate = Gate(slots=100, share=100, max_wait=1)
    now = 1000.0
    monkeypatch.setattr("htsat.apps.serve.guard.time.monotonic", lambda: now)
    for second in range(10):  # two requests a second
        now = 1000.0 + second
        for _ in range(2):
            with gate.enter("a"):
                pass
    tickets = [gate.enter("a") for _ in range(80)]
    assert gate.retry_after == pytest.approx(40 / (20 / 9), abs=1)
    for ticket in tickets:
        ticket.__exit__(None, None, None)


def test_a_slow_body_gives_its_slot_away_and_gets_the_next():
    async def scenario():
        gate = Gate(slots=1, share=10, max_wait=1)
        with gate.enter("slow") as slow:
            slow.park()
            slow.park()
            assert refused(gate) is None and gate.inside == 1
            with gate.enter("quick"):
                assert refused(gate, "third") == (503, "busy")
                back = asyncio.create_task(slow.resume())
                await asyncio.sleep(0)
                assert not back.done()
            await back
            assert refused(gate, "third") == (503, "busy")
        assert gate.inside == 0
        assert refused(gate) is None

    asyncio.run(scenario())


def test_a_new_request_does_not_overtake_one_that_waits_for_its_slot():
    async def scenario():
        gate = Gate(slots=1, share=10, max_wait=1)
        slow, quick = gate.enter("slow"), None
        slow.park()
        quick = gate.enter("quick")
        waiting = asyncio.create_task(slow.resume())
        await asyncio.sleep(0)
        quick.__exit__(None, None, None)
        assert refused(gate) == (503, "busy")  # before the waiting task has even run
        await waiting
        slow.__exit__(None, None, None)
        assert gate.inside == 0 and refused(gate) is None

    asyncio.run(scenario())


def test_slots_are_not_lost_when_waiting_requests_are_given_up():
    async def scenario():
        gate = Gate(slots=1, share=10, max_wait=1)
        with gate.enter("slow") as slow:
            slow.park()
            with gate.enter("quick"):
                for wait_for_slot in (False, True):
                    waiting = asyncio.create_task(slow.resume())
                    await asyncio.sleep(0)
                    if wait_for_slot:
                        break
                    waiting.cancel()
                    await asyncio.gather(waiting, return_exceptions=True)
            waiting.cancel()  # it has the slot, but does not know yet
            await asyncio.gather(waiting, return_exceptions=True)
        assert gate.inside == 0
        assert refused(gate) is None
        with gate.enter("next"):
            assert gate.inside == 1

    asyncio.run(scenario())


def test_no_more_are_parked_than_there_are_slots():
    gate = Gate(slots=2, share=10, max_wait=1)
    tickets = []
    for _ in range(2):
        tickets += [gate.enter("a"), gate.enter("a")]
        for ticket in tickets:
            ticket.park()
    assert gate.inside == 4
    assert refused(gate) == (503, "busy")


@hypothesis_settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("eprlc"), st.integers(0, 5)), max_size=40))
def test_the_gate_never_loses_or_invents_a_slot(steps):
    async def scenario():
        gate = Gate(slots=2, share=4, max_wait=1)
        tickets, resuming = [], {}
        for action, which in steps:
            if action == "e" and gate.refusal("a") is None:
                tickets.append(gate.enter("a"))
            elif tickets:
                ticket = tickets[which % len(tickets)]
                if action == "p" and ticket not in resuming:
                    ticket.park()
                elif action == "r" and ticket not in resuming:
                    resuming[ticket] = asyncio.create_task(ticket.resume())
                elif action in "lc":
                    if ticket in resuming:
                        resuming[ticket].cancel()
                        await asyncio.gather(resuming.pop(ticket), return_exceptions=True)
                    tickets.remove(ticket)
                    ticket.__exit__(None, None, None)
            await asyncio.sleep(0)
            for ticket in [ticket for ticket, task in resuming.items() if task.done()]:
                del resuming[ticket]
            working = sum(ticket._has_slot for ticket in tickets)
            assert gate.inside == len(tickets)
            assert working <= 2
        for ticket in tickets:
            if ticket in resuming:
                resuming[ticket].cancel()
                await asyncio.gather(resuming[ticket], return_exceptions=True)
            ticket.__exit__(None, None, None)
        assert gate.inside == 0
        first, second = gate.enter("a"), gate.enter("a")
        assert refused(gate, "b") == (503, "busy")
        first.__exit__(None, None, None), second.__exit__(None, None, None)

    asyncio.run(scenario())


# ------------------------------------------------------------------ tokens, origins, names


def test_only_the_right_tokens_open():
    keys = Keys(("first-token", "second-token"))
    assert not keys.open and Keys(()).open
    assert [keys.client(token) for token in ("first-token", "second-token")] == [0, 1]
    for wrong in (None, "", "first", "first-token ", "FIRST-TOKEN", "first-tokensecond-token", "\udcff"):
        assert keys.client(wrong) is None
    for number in (0, 1):
        assert keys.cookie_client(keys.cookie(number)) == number
        assert "token" not in keys.cookie(number)
    for wrong in (None, "", "first-token", keys.cookie(0)[:-1], "\udcff"):
        assert keys.cookie_client(wrong) is None
    assert Keys(()).client("") is None and Keys(()).cookie_client("") is None


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer abc", "abc"), ("bearer  abc ", "abc"), ("Basic abc", None), ("abc", None), ("Bearer", None),
        ("Bearer ", None), ("", None), (None, None),
    ],
)  # fmt: skip
def test_bearer(header, token):
    assert bearer(header) == token


def test_cookie_of():
    assert cookie_of("a=b; htsat_token=abc; c=d") == "abc"
    assert cookie_of("xhtsat_token=abc") is None
    assert cookie_of(None) is None


@pytest.mark.parametrize(
    ("origin", "host", "same"),
    [
        ("http://localhost:8000", "localhost:8000", True),
        ("http://example.org", "example.org", True),
        ("https://example.org", "example.org", True),  # behind a balancer that speaks TLS
        ("https://example.org", "example.org:443", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("http://EXAMPLE.org", "example.org", True),
        ("http://localhost:8001", "localhost:8000", False),
        ("http://example.org.evil.org", "example.org", False),
        ("http://evil.org/example.org", "example.org", False),
        ("http://example.org@evil.org", "example.org", False),
        ("http://evil.org", "example.org", False),
        ("null", "example.org", False),
        ("file://", "", False),
        ("http://", None, False),
        ("http://a:99999999", "a", False),
        ("http://[", "[", False),
    ],
)
def test_same_origin(origin, host, same):
    assert same_origin(origin, host) == same


def test_a_name_that_means_this_machine_is_no_way_in():
    local = Hosts(ServeSettings(allowed_hosts=("sounds.example.org",)))
    for mine in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000", "a.localhost", "Sounds.Example.org", "192.168.0.7"):
        assert local.allows(mine), mine
    for other in ("evil.org", "evil.org:8000", "127.0.0.1.evil.org", "localhost.evil.org", "", None, "[", "a:b:c"):
        assert not local.allows(other), other
    # with a token, or open to the network, names do not matter
    assert Hosts(ServeSettings(tokens=("12345678",))).allows("evil.org")
    assert Hosts(ServeSettings(host="0.0.0.0")).allows("box")


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"models": ()}, "at least one model"),
        ({"models": (("a b", "x"),)}, "NAME=PATH"),
        ({"models": (("a", "x"), ("a", "y"))}, "two models"),
        ({"tokens": ("short",)}, "8 to 512"),
        ({"tokens": ("with space in it",)}, "8 to 512"),
        ({"cors": ("*",)}, "expected an origin"),
        ({"cors": ("https://example.org/",)}, "without a path"),
        ({"workers": 0}, "workers"),
        ({"max_seconds": float("nan")}, "max_seconds"),
        ({"threads": 0}, "threads"),
        ({"port": 70000}, "port"),
    ],
)
def test_settings_are_checked(wrong, says):
    with pytest.raises(UsageError, match=says):
        ServeSettings(**wrong)


def test_workers_share_the_threads():
    assert ServeSettings(workers=2, threads=8).threads_of_a_worker == 4
    assert ServeSettings(workers=3, threads=2).threads_of_a_worker == 1


def test_named_models():
    assert named_models([]) == (("default", "default"),)
    given = ["fine=runs/a/best.safetensors", "runs/b/last.onnx", "hf://owner/re po"]
    assert named_models(given) == (
        ("fine", "runs/a/best.safetensors"), ("last", "runs/b/last.onnx"), ("re-po", "hf://owner/re po"),
    )  # fmt: skip


def test_tokens_come_from_one_place(tmp_path, monkeypatch):
    monkeypatch.delenv("HTSAT_TOKEN", raising=False)
    assert read_tokens(None, None) == ()
    assert read_tokens("given-token", None) == ("given-token",)
    monkeypatch.setenv("HTSAT_TOKEN", "of-environment")
    assert read_tokens(None, None) == ("of-environment",)
    assert read_tokens("given-token", None) == ("given-token",)
    file = tmp_path / "tokens"
    file.write_text("# of the ward\n\nfirst-token\n second-token \n")
    assert read_tokens(None, file) == ("first-token", "second-token")
    with pytest.raises(UsageError, match="exclude"):
        read_tokens("given-token", file)
    file.write_text("# nobody\n")
    with pytest.raises(UsageError, match="holds no token"):
        read_tokens(None, file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_tokens(None, tmp_path / "none")


# ------------------------------------------------------------------ bodies


def read(body, *, pieces=None, **headers):
    """Read a body that comes in pieces; returns (name, content) of the uploads."""
    limits = ServeSettings(max_bytes=2000, max_files=3)
    pieces = pieces or [body]

    async def scenario():
        messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        messages[-1]["more_body"] = False

        async def receive():
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        fields = {"content_length": str(len(body)), **headers}
        given = [(k.replace("_", "-").encode(), v.encode()) for k, v in fields.items() if v is not None]
        with Gate(1, 1, 1).enter("a") as ticket:
            uploads = await read_uploads(receive, given, "given.wav", limits, ticket)
        found = [(upload.name, upload.file.read(), upload.size) for upload in uploads]
        for upload in uploads:
            upload.file.close()
        return found

    return asyncio.run(scenario())


def form(*parts, boundary="sep"):
    body = b""
    for disposition, content in parts:
        body += f"--{boundary}\r\nContent-Disposition: {disposition}\r\nContent-Type: audio/wav\r\n\r\n".encode()
        body += content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode()


FILE = 'form-data; name="file"; filename="{}"'
MULTIPART = "multipart/form-data; boundary=sep"


def test_a_raw_body_is_one_recording():
    assert read(b"abc", content_type="audio/wav") == [("given.wav", b"abc", 3)]
    assert read(b"abc", content_type="application/octet-stream; x=y") == [("given.wav", b"abc", 3)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_parts_are_found_however_the_body_is_cut(size):
    contents = [b"", b"\r\n--sep-", bytes(range(256)) + b"\r\n--se\r\n"]
    names = ["a.wav", "böse.ogg", "../../etc/passwd"]
    body = form(*((FILE.format(name), content) for name, content in zip(names, contents, strict=True)))
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    found = read(body, pieces=pieces, content_type='multipart/form-data; charset=x; boundary="sep"')
    assert found == [(n, c, len(c)) for n, c in zip(["a.wav", "böse.ogg", "passwd"], contents, strict=True)]


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"", {"content_type": "audio/wav"}, 400, "empty_body"),
        (b"", {"content_type": MULTIPART}, 400, "empty_body"),
        (b"x", {"content_type": "audio/wav", "content_length": None}, 411, "length_required"),
        (b"x", {}, 415, "unsupported_type"),
        (b"x", {"content_type": "application/json"}, 415, "unsupported_type"),
        (b"x", {"content_type": "application/x-www-form-urlencoded"}, 415, "unsupported_type"),
        (b"x", {"content_type": "audio/wav", "content_encoding": "gzip"}, 415, "content_encoding"),
        (b"x" * 2001, {"content_type": "audio/wav"}, 413, "too_large"),
        (b"x" * 2001, {"content_type": "audio/wav", "content_length": "9" * 19}, 413, "too_large"),
        (b"x" * 2001, {"content_type": "audio/wav", "content_length": None, "transfer_encoding": "chunked"}, 413,
         "too_large"),
        (b"x", {"content_type": "multipart/form-data"}, 400, "bad_multipart"),
        (b"x", {"content_type": "multipart/form-data; boundary=" + 80 * "x"}, 400, "bad_multipart"),
        (b"no multipart", {"content_type": MULTIPART}, 400, "bad_multipart"),
        (form((FILE.format("a"), b"x"))[:-10], {"content_type": MULTIPART}, 400, "bad_multipart"),
        (b"--sep--\r\n", {"content_type": MULTIPART}, 400, "no_file"),
        (form(*[(FILE.format("a"), b"x")] * 4), {"content_type": MULTIPART}, 413, "too_many_parts"),
        (form(('form-data; name="other"', b"x")), {"content_type": MULTIPART}, 422, "unexpected_part"),
        (form(("attachment", b"x")), {"content_type": MULTIPART}, 422, "unexpected_part"),
        (b"--sep\r\n" + 9 * b"A: b\r\n" + b"\r\nx\r\n--sep--", {"content_type": MULTIPART}, 400, "bad_multipart"),
        (b"--sep\r\nA: " + 5000 * b"b" + b"\r\n", {"content_type": MULTIPART}, 400, "bad_multipart"),
        (b"--sep\r\n\r\nx\r\n--sep--\r\n", {"content_type": MULTIPART}, 422, "unexpected_part"),
    ],
)  # fmt: skip
def test_bad_bodies_are_refused(body, headers, status, code):
    with pytest.raises(ApiError) as refused:
        read(body, **headers)
    assert (refused.value.status, refused.value.code) == (status, code)


def test_a_body_that_breaks_off_is_nobodys():
    async def scenario():
        messages = [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}]

        async def receive():
            return messages.pop(0)

        headers = [(b"content-type", b"audio/wav"), (b"content-length", b"10")]
        with Gate(1, 1, 1).enter("a") as ticket, pytest.raises(ClientLeftError):
            await read_uploads(receive, headers, None, ServeSettings(), ticket)

    asyncio.run(scenario())


def test_a_full_disk_is_told(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("htsat.apps.serve.uploads._write_all", full)
    with pytest.raises(ApiError) as refused:
        read(b"abc", content_type="audio/wav")
    assert (refused.value.status, refused.value.code) == (503, "no_space")
    assert "Retry-After" in refused.value.headers


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=300), st.integers(1, 50))
def test_any_bytes_as_multipart_are_refused_or_read(body, size):
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    try:
        read(body, pieces=pieces, content_type=MULTIPART)
    except ApiError as error:
        assert error.status in (400, 413, 422)
