import asyncio
import contextlib
import gc
import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import psutil
import pytest
import soundfile

from htsat.apps.serve import decoder
from htsat.apps.serve.decoder import DecodeLimits, DecoderPool
from htsat.audio.resample import stream_audio
from htsat.errors import AudioError, HtsatError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs Unix sockets")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Landlock and seccomp")

#: a template whose decoders do as the name of the upload says; ``forks`` counts the processes
ODD_DECODERS = """
import os, signal, struct, sys, time
import numpy as np
import htsat.apps.serve.decoder as d
forks, fork, real = 0, d._fork, d._decode

def counted(*arguments):
    global forks
    forks += 1
    fork(*arguments)

def blocks(server, count, size=d._BLOCK_SAMPLES):
    for _ in range(count):
        d._send(server, d._BLOCK, np.zeros(size, np.float32).data.cast("B"))

class Dying:
    # a connection on which two blocks can be sent
    def __init__(self, server):
        self.server, self.left = server, 2
    def sendall(self, data):
        self.left -= bytes(data[:4]) == d._BLOCK
        if self.left < 0:
            os.abort()
        self.server.sendall(data)

def odd(server, descriptor, name, sample_rate, skip, limits):
    match name:
        case "abort": os.abort()
        case "segfault": os.kill(os.getpid(), signal.SIGSEGV)
        case "late abort": blocks(server, 2); os.abort()
        case "exit": os._exit(7)
        case "killed": os.kill(os.getpid(), signal.SIGKILL)
        case "sleep": time.sleep(60)
        case "spin":
            while True: pass
        case "hog": np.ones(1 << 28)
        case "unknown message": d._send(server, b"what", b"")
        case "large message": d._send(server, d._ERROR, bytes(1 << 20))
        case "large block": blocks(server, 1, 2 * d._BLOCK_SAMPLES)
        case "ragged block": d._send(server, d._BLOCK, bytes(7))
        case "not a number": d._send(server, d._BLOCK, np.full(9, np.nan, np.float32).data.cast("B"))
        case "short blocks": blocks(server, 9, 5)
        case "many signs of life":
            while True: d._send(server, d._ALIVE)
        case "many headers":
            while True: d._send(server, d._HEADER, struct.pack("=d", 1))
        case "endless": blocks(server, 1 << 30)
        case "words": d._send(server, d._ERROR, b"a\\nb\\x1b[0m\\xff"); os._exit(0)
        case "bug": raise KeyError("here")
        case "probe": probe()
        case "once, early" if forks % 2: os.abort()
        case "once, late" if not skip: real(Dying(server), descriptor, name, sample_rate, skip, limits)
        case _: real(server, descriptor, name, sample_rate, skip, limits)

def probe():
    import ctypes, errno, json, resource, socket, subprocess, threading
    from socket import create_connection
    libc = ctypes.CDLL(None, use_errno=True)
    def call(name, *arguments):
        if getattr(libc, name)(*arguments) < 0:
            raise OSError(ctypes.get_errno(), name)
    tried = dict(
        write=lambda: open(TARGET, "r+b"),
        create=lambda: open(TARGET + ".new", "wb"),
        append=lambda: open(TARGET, "a"),
        unnamed=lambda: os.open(os.path.dirname(TARGET), os.O_TMPFILE | os.O_WRONLY),
        passwd=lambda: open("/etc/passwd").read(),
        read=lambda: open(TARGET).read(),
        environment=lambda: open(f"/proc/{PARENT}/environ", "rb").read(),
        memory=lambda: open(f"/proc/{PARENT}/mem", "rb"),
        listing=lambda: os.listdir("/"),
        rename=lambda: os.rename(TARGET, TARGET + "2"),
        remove=lambda: os.remove(TARGET),
        mode=lambda: os.chmod(TARGET, 0o777),
        owner=lambda: os.chown(TARGET, 1, 1),
        times=lambda: os.utime(TARGET),
        folder=lambda: os.mkdir(TARGET + ".d"),
        link=lambda: os.link(TARGET, TARGET + "3"),
        upload=lambda: os.write(UPLOAD, b"x"),
        shrink=lambda: os.ftruncate(UPLOAD, 0),
        tcp=lambda: create_connection(("127.0.0.1", PORT)),
        udp=lambda: socket.socket(type=socket.SOCK_DGRAM),
        unix=lambda: socket.socket(socket.AF_UNIX),
        pair=socket.socketpair,
        fork=os.fork,
        vfork=lambda: call("vfork"),
        execute=lambda: os.execv(sys.executable, ["python"]),
        spawn=lambda: subprocess.run([sys.executable, "-c", ""]),
        posix_spawn=lambda: os.posix_spawn("/bin/sh", ["sh"], {}),
        kill=lambda: os.kill(PARENT, 0),
        stop=lambda: os.kill(os.getppid(), signal.SIGSTOP),
        pidfd=lambda: os.pidfd_open(PARENT),
        ptrace=lambda: call("ptrace", 16, PARENT, 0, 0),
        peek=lambda: call("process_vm_readv", PARENT, None, 0, None, 0, 0),
        memfd=lambda: os.memfd_create("x"),
        mount=lambda: call("mount", b"none", b"/mnt", b"tmpfs", 0, None),
        unshare=lambda: call("unshare", 0x10000000),
        memory_limit=lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),
        time_limit=lambda: resource.setrlimit(resource.RLIMIT_CPU, (-1, -1)),
        limits_of_parent=lambda: resource.prlimit(PARENT, resource.RLIMIT_NOFILE, (9, 9)),
        priority=lambda: os.setpriority(os.PRIO_PROCESS, PARENT, 19),
        root=lambda: os.chroot("/"),
        groups=lambda: os.setgroups([]),
    )
    verdicts = {}
    for name, action in tried.items():
        try:
            action()
        except OSError as error:
            verdicts[name] = errno.errorcode[error.errno]
        except ValueError as error:
            verdicts[name] = str(error)
        else:
            verdicts[name] = "done"
    # what libraries may need works
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    import colorsys
    verdicts["environment variables"] = " ".join(sorted(os.environ))
    raise d.AudioError(json.dumps(verdicts))

d._fork, d._decode = counted, odd
"""


@pytest.fixture
def odd_decoders(monkeypatch):
    monkeypatch.setattr(decoder, "_COMMAND", ("-c", ODD_DECODERS + "\nd.main()"))
    # what is under test is the sandbox, not the shell that ran the tests
    monkeypatch.setenv("HTSAT_SECRET", "secret")


def run(work, processes=2, **limits):
    """Return what ``work(pool)`` does, and see to it that nothing remains."""

    async def main():
        pool = DecoderPool(processes, DecodeLimits(**limits))
        await pool.start()
        try:
            return await work(pool)
        finally:
            await pool.close()

    before = inventory()
    result = asyncio.run(main())
    gc.collect()
    assert inventory() == before
    return result


def inventory():
    process = psutil.Process()
    return process.num_fds(), len(process.children(recursive=True)), threading.active_count()


def stored(data):
    """Return an open temporary file without a name, as uploads are."""
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - the caller closes it
    file.write(data)
    return file


async def decoded(pool, data, name="upload", rate=32_000):
    with stored(data) as file:
        async with contextlib.aclosing(pool.decode(file, name, rate)) as blocks:
            found = [block async for block in blocks]
    return np.concatenate(found)


async def refusal(pool, data, name="upload"):
    with stored(data) as file, pytest.raises(AudioError) as caught:
        async for _ in pool.decode(file, name, 32_000):
            pass
    return str(caught.value)


def encoded(seconds, rate, channels, kind, subtype=None):
    rng = np.random.default_rng(5)
    samples = 0.3 * rng.standard_normal((round(seconds * rate), channels))
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def in_process(data, rate=32_000):
    return np.concatenate(list(stream_audio(data, rate)))


# ---------------------------------------------------------------------------------------------------
# the samples


def test_blocks_are_those_of_stream_audio_bit_for_bit():
    files = [
        encoded(12.3, 44_100, 2, "WAV", "PCM_24"),
        encoded(9.1, 48_000, 1, "FLAC"),
        encoded(7.7, 22_050, 2, "OGG"),
        encoded(8.2, 44_100, 2, "MP3"),
        encoded(0.01, 8_000, 1, "WAV"),
        encoded(65536 / 16_000, 16_000, 1, "WAV"),
    ]

    async def work(pool):
        for data in files:
            for rate in (16_000, 32_000, 48_000):
                expected = in_process(data, rate)
                assert np.array_equal(await decoded(pool, data, rate=rate), expected)
        assert pool.stats == decoder.DecoderStats()

    run(work)


def test_other_containers_are_decoded_by_the_extra():
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44_100, layout="mono")
        samples = (8000 * np.sin(np.arange(4 * 44_100) / 9)).astype(np.int16)
        for start in range(0, len(samples), 1024):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 44_100, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = file.getvalue()
    assert np.array_equal(run(lambda pool: decoded(pool, data)), in_process(data))


def test_the_duration_is_known_with_the_first_block():
    async def work(pool):
        found = []
        for data in (encoded(9.5, 16_000, 1, "FLAC"), without_length(encoded(9.5, 16_000, 1, "FLAC"))):
            with stored(data) as file:
                decoding = pool.decode(file, "upload", 16_000)
                assert decoding.duration is None
                await anext(decoding)
                found.append(decoding.duration)
                await decoding.aclose()
        return found

    # the second header does not tell: it is measured
    assert run(work) == [9.5, 9.5]


def test_files_and_descriptors_are_read_from_their_beginning_and_left_as_they_were(tmp_path):
    data = encoded(3, 32_000, 1, "WAV")
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    expected = in_process(data)

    async def work(pool):
        with open(path, "r+b") as file:
            file.seek(1000)
            for given in (file, file.fileno()):
                found = [block async for block in pool.decode(given, "upload", 32_000)]
                assert np.array_equal(np.concatenate(found), expected)
            assert file.tell() == 1000
        read, write = os.pipe()
        with open(read, "rb") as pipe, open(write, "wb"), pytest.raises(ValueError, match="regular file"):
            await anext(pool.decode(pipe, "upload", 32_000))

    run(work)
    assert path.read_bytes() == data


# ---------------------------------------------------------------------------------------------------
# bad uploads


def without_length(flac):
    """Return a FLAC file whose header does not tell how long it is, as streaming encoders write."""
    return with_length(flac, 0)


def with_length(flac, num_samples):
    """Return a FLAC file whose header claims ``num_samples``: 36 bits after rate, channels and width (RFC 9639)."""
    packed = int.from_bytes(flac[18:26], "big")
    return flac[:18] + (packed >> 36 << 36 | num_samples).to_bytes(8, "big") + flac[26:]


def wav(rate, channels, data=bytes(4000)):
    form = struct.pack("<HHIIHH", 1, channels, rate, min(2 * channels * rate, 2**32 - 1), 2 * channels, 16)
    return (
        b"RIFF"
        + struct.pack("<I", 36 + len(data))
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + (b"data" + struct.pack("<I", len(data)) + data)
    )


def silent_mp3(num_bytes):
    """Return an MP3 file of ``num_bytes`` that is nothing but its quietest frame: no header tells its length."""
    file = io.BytesIO()
    soundfile.write(
        file,
        np.zeros(32_000),
        16_000,
        format="MP3",
        subtype="MPEG_LAYER_III",
        bitrate_mode="CONSTANT",
        compression_level=0.99,
    )
    data = file.getvalue()
    at = len(data) // 2
    while data[at] != 0xFF or data[at + 1] & 0xF6 != 0xF2:
        at += 1
    rate = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)[(data[at + 2] >> 4) - 1]
    size = 72_000 * rate // 16_000 + (data[at + 2] >> 1 & 1)
    return data[at : at + size] * (num_bytes // size)


def pool_processes():
    """Return the processes of the pool, the template first; other tests may have left some of their own beside it."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "htsat.apps.serve.decoder" in child.cmdline():
                found += [child, *child.children(recursive=True)]
    return found


@contextlib.contextmanager
def peak_memory():
    """Give a dict of the largest growth of this process and the largest size of a child, in bytes."""
    peak, stop = {"parent": 0, "child": 0}, threading.Event()
    process = psutil.Process()
    start = process.memory_info().rss

    def watch():
        while not stop.wait(0.01):
            peak["parent"] = max(peak["parent"], process.memory_info().rss - start)
            for child in pool_processes():
                with contextlib.suppress(psutil.Error):
                    peak["child"] = max(peak["child"], child.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def test_bad_uploads_are_refused_quickly_at_bounded_memory_with_the_words_of_the_library():
    good = encoded(5, 32_000, 1, "FLAC")
    hours = io.BytesIO()
    with soundfile.SoundFile(hours, "w", 8_000, 1, "PCM_16", format="FLAC") as file:
        file.write(np.zeros(8_000 * 1200, np.int16))
    long = hours.getvalue()
    uploads = {
        "empty": b"",
        "text": b"this is no recording\n" * 100,
        "noise": random.Random(1).randbytes(1 << 20),
        "zeros": bytes(1 << 20),
        "header alone": good[:42],
        "truncated": good[: len(good) // 2],
        "truncated wav": wav(32_000, 1, bytes(100_000))[:5000],
        "truncated ogg": encoded(5, 32_000, 1, "OGG")[:-3000],
        "1 Hz": wav(1, 1),
        "655 kHz": wav(655_350, 1),
        "255 channels": wav(32_000, 255, bytes(255 * 4000)),
        "0 channels": wav(32_000, 0),
        "no samples": wav(32_000, 1, b""),
        "ten hours by the header": with_length(good, 36_000 * 32_000),
        "ten hours": with_length(long, 36_000 * 8_000),
        "20 minutes, the header does not tell": without_length(long),
        "bomb": silent_mp3(25_000_000),
    }

    expected = {}
    for what, data in uploads.items():
        with pytest.raises(AudioError, match="upload: ") as caught:
            for _ in stream_audio(data, 32_000, name="upload", max_seconds=300.0):
                pass
        expected[what] = str(caught.value)

    async def work(pool):
        with peak_memory() as peak:
            for what, data in uploads.items():
                started = time.monotonic()
                assert await refusal(pool, data) == expected[what]
                assert time.monotonic() - started < 2, what
        assert peak["parent"] < 20 << 20
        assert peak["child"] < 150 << 20
        assert pool.stats == decoder.DecoderStats()
        assert np.array_equal(await decoded(pool, good), in_process(good))

    run(work, max_seconds=300.0)


def test_a_library_that_needs_too_much_memory_is_refused(odd_decoders):
    async def work(pool):
        with peak_memory() as peak:
            assert await refusal(pool, b"", "hog") == (
                "hog: decoding takes more than 64 MiB of memory; convert it to FLAC with fewer channels"
            )
        assert peak["child"] < 150 << 20

    run(work, max_memory=64 << 20)


# ---------------------------------------------------------------------------------------------------
# what decoders may not


@linux
def test_a_decoder_can_do_nothing_but_decode(odd_decoders, monkeypatch, tmp_path):
    target = tmp_path / "target"
    target.write_text("text")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        setting = f"TARGET, PARENT, PORT, UPLOAD = {str(target)!r}, {os.getpid()}, {listening.getsockname()[1]}, 4\n"
        monkeypatch.setattr(decoder, "_COMMAND", ("-c", ODD_DECODERS + setting + "d.main()"))

        async def work(pool):
            with stored(b"abc") as file:
                with pytest.raises(AudioError) as caught:
                    await anext(pool.decode(file, "probe", 32_000))
                assert file.seek(0, 2) == 3
            return json.loads(str(caught.value)), pool.restrictions

        verdicts, restrictions = run(work)
    assert "SECRET" not in verdicts.pop("environment variables")
    for name in ("memory_limit", "time_limit"):
        assert verdicts.pop(name) == "not allowed to raise maximum limit"
    assert {name for name, verdict in verdicts.items() if verdict == "done"} == set()
    assert set(verdicts.values()) <= {"EPERM", "EACCES", "EBADF", "ENOSYS"}, verdicts
    assert list(tmp_path.iterdir()) == [target] and target.read_text() == "text"
    assert not restrictions.skipped
    assert "seccomp" in restrictions.applied


@linux
def test_each_layer_holds_alone():
    """Without Landlock seccomp, and without seccomp Landlock keeps files and sockets closed."""
    code = """
import json, os, socket, sys
from htsat.apps.serve import sandbox
def absent(*_): raise OSError(38, "not in this kernel")
setattr(sandbox, sys.argv[1], absent)
told = sandbox.restrict(sandbox.confine([p for p in sys.path if p]), 1 << 30, 10)
tried = {"write": lambda: open("/dev/null", "w"), "passwd": lambda: open("/etc/passwd"),
    "tcp": lambda: socket.create_connection(("127.0.0.1", 9))}
found = []
if "seccomp" in told.applied: tried["fork"] = os.fork
for name, action in tried.items():
    try: action()
    except OSError as error: found.append((name, error.errno))
print(json.dumps([told.applied, told.skipped, found]))
"""

    def told(absent):
        result = subprocess.run([sys.executable, "-c", code, absent], capture_output=True, text=True, check=True)
        applied, skipped, found = json.loads(result.stdout)
        return {what.split()[0] for what in applied}, skipped[0], dict(found)

    applied, skipped, found = told("_landlock")
    assert "seccomp" in applied and skipped == "landlock: not in this kernel"
    assert found["write"] == found["fork"] == found["tcp"] == 1  # EPERM
    applied, skipped, found = told("_seccomp")
    assert "landlock" in applied and skipped == "seccomp: not in this kernel"
    assert found["write"] == found["passwd"] == found["tcp"] == 13  # EACCES


# ---------------------------------------------------------------------------------------------------
# decoders that die


def test_a_file_that_crashes_its_decoder_is_tried_again_and_refused(odd_decoders):
    async def work(pool):
        for name, cause in (
            ("abort", "SIGABRT"),
            ("segfault", "SIGSEGV"),
            ("late abort", "SIGABRT"),
            ("exit", "exit code 7"),
            ("killed", "SIGKILL"),
        ):
            before = pool.stats.crashes
            message = await refusal(pool, b"", name)
            assert f"{name}: the decoder crashed on this file ({cause})" in message
            assert pool.stats.crashes - before == (10 if name == "killed" else 2)
        assert pool.stats.busy == pool.stats.waiting == 0

    run(work)


def test_a_crash_that_does_not_come_again_does_not_show(odd_decoders):
    data = encoded(11, 32_000, 1, "FLAC")

    async def work(pool):
        for name in ("once, early", "once, early", "once, late"):
            assert np.array_equal(await decoded(pool, data, name), in_process(data))
        assert pool.stats.crashes >= 2

    # one at a time: the decoders are forked, and given out, in one order
    run(work, processes=1)


def test_what_a_decoder_says_is_not_believed(odd_decoders):
    async def work(pool):
        for name, cause in (
            ("unknown message", "it sent a message of kind b'what'"),
            ("large message", "it sent a message of 1048576 bytes"),
            ("large block", "it sent a block of 524288 bytes"),
            ("ragged block", "it sent a block of 7 bytes"),
            ("not a number", "it sent too many samples, or not finite ones"),
            ("short blocks", "it sent blocks after the last"),
            ("many signs of life", "it sent a message of kind b'live'"),
            ("many headers", "it sent a message of kind b'head'"),
            ("endless", "it sent too many samples, or not finite ones"),
        ):
            assert f"{name}: the decoder crashed on this file ({cause})" in await refusal(pool, b"", name)
        assert await refusal(pool, b"", "words") == "a b [0m\N{REPLACEMENT CHARACTER}"
        assert "bug: the decoder failed on this file (KeyError: 'here')" in await refusal(pool, b"", "bug")

    run(work, max_seconds=20.0)


def test_decoders_that_take_too_long_are_ended(odd_decoders):
    async def stalled(pool):
        assert "sleep: decoding stood still for 0.2 s" in await refusal(pool, b"", "sleep")
        assert pool.stats.timeouts == 1 and pool.stats.crashes == 0
        return await decoded(pool, encoded(1, 32_000, 1, "WAV"))

    async def spinning(pool):
        assert "spin: decoding takes more than 0.5 s of processor time" in await refusal(pool, b"", "spin")
        assert pool.stats.timeouts == 1

    assert len(run(stalled, max_stall_seconds=0.2)) == 32_000
    run(spinning, max_cpu_seconds=0.5)


def kills(count, jobs_at_once=4):
    data = [encoded(seconds, 32_000, 1, "FLAC") for seconds in (4, 11, 17, 23)]
    expected = [in_process(item) for item in data]

    async def work(pool):
        rng = random.Random(7)
        num_killed, num_done, num_templates = 0, 0, 0

        async def request():
            nonlocal num_done
            while num_killed < count:
                which = rng.randrange(len(data))
                assert np.array_equal(await decoded(pool, data[which]), expected[which])
                num_done += 1

        async def killer():
            nonlocal num_killed, num_templates
            while num_killed < count:
                # by the pace of the work, not by the clock: a slow machine would never finish an upload
                enough = num_done + 3
                while num_done < enough:
                    await asyncio.sleep(0.002)
                # those at work above all; now and then one that waits, or the template itself
                choices = [p.pid for p in pool._busy] or [p.pid for p in pool._idle]
                if num_killed % 7 == 3 and pool._idle:
                    choices = [pool._idle[0].pid]
                if num_killed % 25 == 9:
                    choices, num_templates = [pool._template._popen.pid], num_templates + 1
                if choices:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rng.choice(choices), signal.SIGKILL)
                        num_killed += 1

        await asyncio.gather(killer(), *(request() for _ in range(jobs_at_once)))
        assert num_done >= jobs_at_once
        assert pool.stats.crashes >= count // 3
        assert 1 <= pool.stats.restarts <= num_templates
        return num_done

    return run(work, processes=jobs_at_once)


def test_killed_decoders_lose_no_upload():
    kills(12)


@pytest.mark.slow
def test_a_hundred_killed_decoders_lose_no_upload():
    assert kills(100) > 50


def test_killing_what_waits_loses_nothing():
    async def work(pool):
        data = encoded(1, 32_000, 1, "WAV")
        for process in pool_processes()[1:]:
            process.kill()
        assert np.array_equal(await decoded(pool, data), in_process(data))
        pool_processes()[0].kill()
        assert np.array_equal(await decoded(pool, data), in_process(data))
        # it stands ready again without being asked
        async with asyncio.timeout(10):
            while pool.stats.restarts < 1 or len(pool._idle) < 2:
                await asyncio.sleep(0.01)
        assert pool.stats.restarts == 1

    run(work)


# ---------------------------------------------------------------------------------------------------
# abandoned, waiting, closed


def test_an_abandoned_upload_frees_its_process_at_once(odd_decoders):
    data = encoded(60, 32_000, 1, "WAV")

    async def work(pool):
        with stored(data) as file:
            for _ in range(20):
                async with contextlib.aclosing(pool.decode(file, "upload", 32_000)) as blocks:
                    await anext(blocks)
                assert pool.stats.busy == 0
            # one that computes without end, and whose request is cancelled
            for name in ("spin", "sleep"):
                task = asyncio.create_task(anext(pool.decode(file, name, 32_000)))
                await asyncio.sleep(0.05)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            # one that nobody closes
            dropped = pool.decode(file, "upload", 32_000)
            await anext(dropped)
            del dropped
            async with asyncio.timeout(5):
                while pool.stats.busy:
                    await asyncio.sleep(0.01)
                assert np.array_equal(await decoded(pool, data), in_process(data))

    run(work, processes=1)


def test_uploads_wait_in_order_and_may_leave():
    data = encoded(1, 32_000, 1, "WAV")

    async def work(pool):
        finished = []

        async def request(number):
            await decoded(pool, data)
            finished.append(number)

        with stored(data) as file:
            first = pool.decode(file, "upload", 32_000)
            await anext(first)
            tasks = []
            for number in range(5):
                tasks.append(asyncio.create_task(request(number)))
                await asyncio.sleep(0)
            await asyncio.sleep(0.05)
            assert (pool.stats.busy, pool.stats.waiting) == (1, 5)
            tasks[2].cancel()
            await asyncio.sleep(0)
            assert pool.stats.waiting == 4
            await first.aclose()
        await asyncio.wait(tasks)
        assert finished == [0, 1, 3, 4]

    run(work, processes=1)


def test_a_slow_reader_holds_its_decoder_back():
    data = encoded(120, 32_000, 1, "FLAC")

    async def work(pool):
        with stored(data) as file:
            async with contextlib.aclosing(pool.decode(file, "upload", 32_000)) as blocks:
                await anext(blocks)
                await asyncio.sleep(0.3)
                (process,) = pool._busy
                used = psutil.Process(process.pid).cpu_times().user
                await asyncio.sleep(0.2)
                assert psutil.Process(process.pid).cpu_times().user == used
                return sum([len(block) async for block in blocks])

    assert run(work) == 120 * 32_000 - decoder._BLOCK_SAMPLES


def test_closing_ends_what_is_under_way():
    data = encoded(60, 32_000, 1, "WAV")

    async def work(pool):
        async def request():
            with pytest.raises(HtsatError):
                while True:
                    await decoded(pool, data)

        with stored(data) as file:
            suspended = pool.decode(file, "upload", 32_000)
            await anext(suspended)
            tasks = [asyncio.create_task(request()) for _ in range(5)]
            await asyncio.sleep(0.1)
            await pool.close()
            await asyncio.gather(*tasks)
            with pytest.raises(HtsatError):
                while True:
                    await anext(suspended)
            with pytest.raises(HtsatError, match="not running"):
                await anext(pool.decode(file, "upload", 32_000))
        await pool.close()

    run(work)


def test_the_processes_end_with_the_server():
    code = """
import asyncio, os, psutil
from htsat.apps.serve.decoder import DecoderPool
async def main():
    pool = DecoderPool()
    await pool.start()
    print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pids = list(map(int, result.stdout.split()))
    assert len(pids) >= 2
    deadline = time.monotonic() + 5
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_template_that_cannot_start_is_told(monkeypatch):
    monkeypatch.setattr(decoder, "_COMMAND", ("-c", "raise SystemExit(3)"))
    before = inventory()
    with pytest.raises(HtsatError, match="no process to decode with could be started"):
        asyncio.run(DecoderPool().start())
    gc.collect()
    assert inventory() == before


def test_limits_are_checked():
    with pytest.raises(ValueError, match="processes"):
        DecoderPool(0)
    with pytest.raises(ValueError, match="max_seconds"):
        DecodeLimits(max_seconds=float("nan"))


def test_uploads_of_every_kind_do_not_grow_the_server():
    data = encoded(2, 32_000, 1, "FLAC")

    async def work(pool):
        sizes = []
        for _ in range(3):
            for number in range(20):
                if number % 3 == 0:
                    await refusal(pool, b"no recording")
                else:
                    await decoded(pool, data)
            sizes.append(psutil.Process().num_fds())
        assert max(sizes) - min(sizes) <= 2 and len(pool._template._processes) <= 5

    run(work)
