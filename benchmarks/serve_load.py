"""What ``htsat serve`` does under more load than it can bear, and over many requests, good and bad.

    python benchmarks/serve_load.py [--factors 0.5 0.8 1 2 5 10] [--seconds 60] [--file RECORDING] [-- --threads 2 ...]
    python benchmarks/serve_load.py --soak 20000
    python benchmarks/serve_load.py --kill-decoders 100
    python benchmarks/serve_load.py --streams 8

Starts a server on the loopback interface (options after ``--`` are its own), or uses the one at --address.

Load: the capacity is measured first, by a few clients that wait for their answers. Then requests come at random times
(Poisson), whether or not earlier ones were answered, at each factor times that rate: what comes back, how many useful
answers a second, and how long those took. Exits with 1 if a status other than 200, 429 and 503 (these with Retry-After)
comes back, if the largest factor gives less than 95 % of the peak, or if its 99th percentile is more than twice that at
0.8.

Soak: a fifth of the requests is bad in one of many ways, a tenth disconnects at some point. Memory, descriptors,
threads and processes over time, and the growth of memory after a tenth of the requests. Exits with 1 if that is more
than 20 MB.

Kill: decoders are killed at random while requests come at 0.6 times the capacity; every one must be answered by 200.

Streams: so many clients send sound in real time, a result a second: how long after its last sample a result arrives,
and how long after its end the end of an event. Exits with 1 if the 99th percentile of the latter is more than half a
second beyond what the hop and the settings of the model need, or if there are gaps.
"""

import argparse
import asyncio
import collections
import contextlib
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import soundfile

EXAMPLES = Path(__file__).parents[1] / "examples"


class Answer(asyncio.Protocol):
    """Sends one request and notes what comes back; as little work as can be, for it is done on the same machine."""

    def __init__(self, request: bytes, done: asyncio.Future, leave_after: int | None = None) -> None:
        self.request, self.done, self.leave_after = request, done, leave_after
        self.data = b""

    def connection_made(self, transport) -> None:
        self.transport = transport
        if self.leave_after is None:
            transport.write(self.request)
        else:
            transport.write(self.request[: self.leave_after])
            asyncio.get_running_loop().call_later(random.random() * 0.1, transport.abort)

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        if found and len(body) >= int(re.search(rb"(?i)content-length: (\d+)", head)[1]):
            if not self.done.done():
                self.done.set_result((int(head[9:12]), b"retry-after" in head.lower(), body))
            self.transport.close()

    def connection_lost(self, error) -> None:
        if not self.done.done():
            self.done.set_result((0, False, str(error or "closed").encode()))


class Load:
    """Requests to one server."""

    def __init__(self, port: int, request: bytes) -> None:
        self.port, self.request = port, request

    async def one(self, request: bytes | None = None, leave_after: int | None = None) -> tuple[int, bool, bytes, float]:
        """Send a request on a connection of its own; returns status, whether Retry-After, body, seconds."""
        loop = asyncio.get_running_loop()
        start, done = time.perf_counter(), loop.create_future()
        try:
            await loop.create_connection(
                lambda: Answer(request or self.request, done, leave_after), "127.0.0.1", self.port
            )
            status, retry, body = await asyncio.wait_for(done, 120)
        except (OSError, TimeoutError) as error:
            status, retry, body = 0, False, repr(error).encode()
        return status, retry, body, time.perf_counter() - start

    async def capacity(self, clients: int, seconds: float) -> float:
        """Return the answers a second that waiting clients get."""
        end, count = time.perf_counter() + seconds, 0

        async def client() -> None:
            nonlocal count
            while time.perf_counter() < end:
                status, *_ = await self.one()
                count += status == 200

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return count / (time.perf_counter() - start)

    async def poisson(self, rate: float, seconds: float) -> dict:
        """Send requests at random times; returns what came back."""
        rng = random.Random(1)
        begin = time.perf_counter()
        at, tasks, lag = 0.0, [], 0.0
        while at < seconds:
            wait = begin + at - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            lag = max(lag, -wait)
            tasks.append(asyncio.ensure_future(self.one()))
            at += rng.expovariate(rate)
        answers = await asyncio.gather(*tasks)
        took = time.perf_counter() - begin
        good = [took_one for status, _, _, took_one in answers if status == 200]
        refused = [took_one for status, _, _, took_one in answers if status in (429, 503)]
        return {
            "rate": rate,
            "sent": len(tasks),
            "statuses": dict(sorted(collections.Counter(status for status, *_ in answers).items())),
            "without_retry_after": sum(status in (429, 503) and not retry for status, retry, *_ in answers),
            "useful_per_second": len(good) / took,
            "p50": statistics.median(good) if good else float("nan"),
            "p99": percentile(good, 99),
            "refusal_p99": percentile(refused, 99),
            "generator_lag": lag,
        }


def percentile(values: list[float], q: float) -> float:
    return float(np.percentile(values, q)) if values else float("nan")


def request_of(body: bytes, path: str = "/v1/detect", kind: str = "application/octet-stream", extra: str = "") -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        f"{extra}Connection: close\r\n\r\n"
    )
    return head.encode() + body


def wav(seconds: float, rate: int = 16000, channels: int = 1) -> bytes:
    file = io.BytesIO()
    samples = 0.1 * np.random.default_rng(0).standard_normal((round(seconds * rate), channels))
    soundfile.write(file, samples, rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def street() -> bytes:
    file = io.BytesIO()
    samples, rate = soundfile.read(EXAMPLES / "street.ogg", always_2d=True)
    with soundfile.SoundFile(file, "w", rate, 1, format="OGG") as sound:
        for start in range(0, len(samples), rate):  # more at once is more than the encoder bears
            sound.write(samples[start : start + rate].mean(axis=1))
    return file.getvalue()


def bad_requests() -> list[tuple[bytes, int]]:
    """Return requests with the status that each must get."""
    good = wav(2)
    one_hertz = bytearray(good)
    one_hertz[24:28] = (1).to_bytes(4, "little")
    silence = io.BytesIO()
    with soundfile.SoundFile(silence, "w", 8000, 1, format="FLAC") as file:
        for _ in range(70):
            file.write(np.zeros(8000 * 60, np.int16))
    parts = b"".join(b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n' for _ in range(2000))
    return [
        (request_of(b"this is text, not a recording"), 415),
        (request_of(os.urandom(5000)), 415),
        (request_of(good[: len(good) // 2]), 422),
        (request_of(bytes(one_hertz)), 422),
        (request_of(silence.getvalue()), 413),
        (request_of(b""), 400),
        (request_of(good, kind="text/plain"), 415),
        (request_of(good, "/v1/detect?top=0"), 422),
        (request_of(good, "/v1/detect?model=none"), 404),
        (request_of(good, "/v1/nothing"), 404),
        (request_of(parts + b"--b--\r\n", kind="multipart/form-data; boundary=b"), 413),
        (request_of(b"--b\r\nnonsense", kind="multipart/form-data; boundary=b"), 400),
        (b"POST /v1/tag HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
    ]


class State:
    """Memory, descriptors, threads and processes of a server."""

    def __init__(self, pid: int) -> None:
        self.process = psutil.Process(pid)

    def now(self) -> dict:
        children = self.process.children(recursive=True)
        memory = 0
        for child in children:
            with contextlib.suppress(psutil.Error):
                memory += child.memory_full_info().uss
        return {
            "rss_mb": self.process.memory_info().rss / 1e6,
            "children_mb": memory / 1e6,
            "descriptors": self.process.num_fds(),
            "threads": self.process.num_threads(),
            "processes": 1 + len(children),
        }

    def decoders(self) -> list[psutil.Process]:
        return [child for child in self.process.children(recursive=True) if child.ppid() != self.process.pid]


async def load(arguments: argparse.Namespace, requests: Load) -> dict:
    await requests.capacity(4, 3)  # warm-up
    capacity = await requests.capacity(arguments.clients, arguments.seconds / 3)
    print(f"capacity {capacity:.1f} requests/s by {arguments.clients} clients that wait", flush=True)
    print(
        "| load | sent/s | 200 | 429 | 503 | other | useful/s | p50 s | p99 s | p99 of refusals s |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    rows, failures = {}, []
    for factor in arguments.factors:
        row = rows[factor] = await requests.poisson(factor * capacity, arguments.seconds)
        counts = row["statuses"]
        other = {status: count for status, count in counts.items() if status not in (200, 429, 503)}
        print(
            f"| {factor:g} | {row['rate']:.1f} | {counts.get(200, 0)} | {counts.get(429, 0)} | {counts.get(503, 0)} "
            f"| {other or 0} | {row['useful_per_second']:.1f} | {row['p50']:.3f} | {row['p99']:.3f} "
            f"| {row['refusal_p99']:.3f} |",
            flush=True,
        )
        if other or row["without_retry_after"]:
            failures.append(f"at {factor:g}: {other}, {row['without_retry_after']} without Retry-After")
        await asyncio.sleep(3)
    last = rows[max(rows)]
    peak = max(row["useful_per_second"] for row in rows.values())
    share = last["useful_per_second"] / peak
    print(f"useful at {max(rows):g} x: {share:.1%} of the peak of {peak:.1f}/s")
    if share < 0.95:
        failures.append(f"useful throughput falls to {share:.1%} of the peak")
    if 0.8 in rows:
        ratio = last["p99"] / rows[0.8]["p99"]
        print(f"p99 of accepted requests: {ratio:.2f} times that at 0.8")
        if ratio > 2:
            failures.append(f"the 99th percentile rises to {ratio:.2f} times that at 0.8")
    return {"capacity": capacity, "rows": {str(factor): row for factor, row in rows.items()}, "failures": failures}


async def soak(arguments: argparse.Namespace, requests: Load, state: State) -> dict:
    rng = random.Random(2)
    bad, failures = bad_requests(), []
    counts: collections.Counter = collections.Counter()
    samples: list[tuple[int, dict]] = []

    async def client(left: Iterator[int]) -> None:
        for number in left:
            if number % max(1, arguments.soak // 50) == 0:
                samples.append((number, state.now()))
                shown = {key: round(value, 1) for key, value in samples[-1][1].items()}
                print(f"{number:7d} {shown}", flush=True)
            chance = rng.random()
            if chance < 0.2:
                request, expected = rng.choice(bad)
                status, _, body, _ = await requests.one(request)
                if status not in (expected, 429, 503):
                    failures.append(f"{request[:200]!r}: {status} {body[:200]!r} instead of {expected}")
                counts[f"bad {status}"] += 1
            elif chance < 0.3:
                await requests.one(leave_after=rng.choice([50, 500, 20_000, len(requests.request)]))
                counts["left"] += 1
            else:
                status, _, body, _ = await requests.one()
                if status not in (200, 429, 503):
                    failures.append(f"a good one: {status} {body[:200]!r}")
                counts[f"good {status}"] += 1

    start = time.perf_counter()
    settled = []  # states between which the server may grow: nothing is asked, and its decoders stand ready again
    for part in (range(arguments.soak // 10), range(arguments.soak // 10, arguments.soak)):
        left = iter(part)
        await asyncio.gather(*(client(left) for _ in range(arguments.clients)))
        await asyncio.sleep(5)
        settled.append(state.now())
    first, last = settled
    warm = [sample for sample in samples if sample[0] >= arguments.soak / 10]
    slope = np.polyfit([number for number, _ in warm], [one["rss_mb"] for _, one in warm], 1)[0] if len(warm) > 2 else 0
    growth = last["rss_mb"] + last["children_mb"] - first["rss_mb"] - first["children_mb"]
    print(f"{arguments.soak} requests in {time.perf_counter() - start:.0f} s: {dict(sorted(counts.items()))}")
    print(f"first after warm-up {first}\nlast                {last}")
    print(f"growth {growth:.1f} MB; slope of the server alone {1000 * slope:.2f} MB per 1000 requests")
    if growth > 20:
        failures.append(f"memory grew by {growth:.1f} MB")
    for name in ("descriptors", "threads", "processes"):
        if last[name] > first[name] + 3:
            failures.append(f"{name}: {first[name]} became {last[name]}")
    return {"counts": dict(counts), "samples": samples, "growth_mb": growth, "failures": failures}


async def kill(arguments: argparse.Namespace, requests: Load, state: State) -> dict:
    capacity = await requests.capacity(4, 5)
    killed = 0
    rng = random.Random(3)

    async def killer() -> None:
        nonlocal killed
        while killed < arguments.kill_decoders:
            await asyncio.sleep(rng.expovariate(2))
            found = state.decoders()
            if found:
                with contextlib.suppress(psutil.Error):
                    rng.choice(found).send_signal(signal.SIGKILL)
                    killed += 1

    job = asyncio.create_task(killer())
    lost: collections.Counter = collections.Counter()
    while not job.done():
        row = await requests.poisson(0.6 * capacity, 10)
        lost.update(row["statuses"])
        print(f"{killed} killed, {dict(lost)}", flush=True)
    failures = [f"{count} requests: status {status}" for status, count in lost.items() if status not in (200, 429, 503)]
    return {"killed": killed, "statuses": dict(lost), "failures": failures}


async def streams(arguments: argparse.Namespace, port: int) -> dict:
    import websockets

    samples, rate = soundfile.read(EXAMPLES / "street.ogg", always_2d=True)
    sound = np.round(np.clip(samples.mean(axis=1), -1, 0.999) * 32768).astype("<i2")
    block = rate // 10
    results, events, closings, gaps, beyond = [], [], [], 0, []

    async def client(number: int) -> None:
        nonlocal gaps
        await asyncio.sleep(number / arguments.streams)  # hops of all streams together spread over a second
        address = f"ws://127.0.0.1:{port}/v1/stream?sample_rate={rate}"
        async with websockets.connect(address) as connection:
            start_message = json.loads(await connection.recv())
            start, ended = time.perf_counter(), {}

            async def send() -> None:
                for index in range(round(arguments.seconds * 10)):
                    await asyncio.sleep(max(0, start + (index + 1) / 10 - time.perf_counter()))
                    at = (index + 50 * number) * block % (len(sound) - block)
                    await connection.send(sound[at : at + block].tobytes())
                await connection.send('{"type": "end"}')

            sending = asyncio.create_task(send())
            async for text in connection:
                message, now = json.loads(text), time.perf_counter() - start
                if message["type"] == "progress":
                    results.append(now - message["time"])
                elif message["type"] == "event" and now < arguments.seconds:
                    # The first message with the end that the event has when it is closed.
                    known = ended.setdefault(message["id"], (message["offset"], now))
                    if message["sounding"] or known[0] != message["offset"]:
                        ended[message["id"]] = message["offset"], now
                    if message["state"] == "close":
                        offset, told = ended.pop(message["id"])
                        events.append(told - offset)
                        closings.append(now - offset)
                        beyond.append(events[-1] - start_message["delay_seconds"])
                elif message["type"] == "gap":
                    gaps += 1
            await sending

    await asyncio.gather(*(client(number) for number in range(arguments.streams)))
    print(
        f"{arguments.streams} streams, {arguments.seconds:g} s: "
        f"{len(results)} results, {len(events)} events, {gaps} gaps"
    )
    print(
        f"a result after the last sample that it tells of: p50 {percentile(results, 50):.3f} s, "
        f"p99 {percentile(results, 99):.3f} s"
    )
    print(
        f"an event is closed after it ended: p50 {percentile(closings, 50):.3f} s, p99 {percentile(closings, 99):.3f} s"
    )
    print(f"its end is told after it ended: p50 {percentile(events, 50):.3f} s, p99 {percentile(events, 99):.3f} s")
    print(f"the same beyond the delay that the settings need: p99 {percentile(beyond, 99):.3f} s")
    failures = [f"{gaps} gaps"] if gaps else []
    if beyond and percentile(beyond, 99) > 0.5:
        failures.append("results come late")
    return {"results": results, "events": events, "gaps": gaps, "failures": failures}


def main() -> None:
    own = sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else []
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", nargs="+", type=float, default=[0.5, 0.8, 1, 2, 5, 10])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--file", type=Path, help="recording to send; else 25 s of a street, mono, about 150 kB")
    parser.add_argument("--clients", type=int, default=8, help="that wait for their answers")
    parser.add_argument("--soak", type=int, default=0, metavar="REQUESTS")
    parser.add_argument("--kill-decoders", type=int, default=0, metavar="TIMES")
    parser.add_argument("--streams", type=int, default=0, metavar="CLIENTS")
    parser.add_argument("--address", help="port:pid of a server that runs already")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args([argument for argument in sys.argv[1:] if argument not in ("--", *own)])

    server = None
    if arguments.address:
        port, pid = map(int, arguments.address.split(":"))
    else:
        command = [sys.executable, "-m", "htsat", "serve", "--port", "0", *own]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        line = server.stderr.readline()
        while "listening at" not in line:
            if not line:
                sys.exit("the server did not start")
            line = server.stderr.readline()
        port, pid = int(re.search(r":(\d+)[ ,(]", line)[1]), server.pid
    requests = Load(port, request_of(arguments.file.read_bytes() if arguments.file else street()))
    try:
        if arguments.soak:
            result = asyncio.run(soak(arguments, requests, State(pid)))
        elif arguments.streams:
            result = asyncio.run(streams(arguments, port))
        elif arguments.kill_decoders:
            result = asyncio.run(kill(arguments, requests, State(pid)))
        else:
            result = asyncio.run(load(arguments, requests))
    finally:
        if server is not None:
            server.terminate()
            print(f"the server ended with {server.wait(60)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    for failure in result["failures"][:20]:
        print(f"FAILED: {failure}")
    sys.exit(bool(result["failures"]))


if __name__ == "__main__":
    main()
