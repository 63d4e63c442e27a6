"""Uploads are decoded in processes that may crash, hang or be killed without harm to anything else.

A pool has one *template*: a process that has imported what decoding needs and touches no upload. It
forks *decoders*, each of which gives up its rights (see ``sandbox``), waits, decodes one upload and
ends: nothing of an upload can reach another. Some decoders wait ahead of time, so that the death of
one costs no one time, and a fork takes milliseconds.

    server  -- fork, kill (+ a socket) -->  template  -- fork -->  decoder
    server  -- one upload (+ its descriptor) --------------------> decoder
    server  <-- header, blocks of float32, end or error ---------- decoder

A decoder gets the open file and opens none; a full socket holds it back, so neither side stores more
than a few blocks. It is trusted with nothing once it has read a byte: the length, kind and number of
its messages are checked, and its words are shown as one printable line.

A decoder that dies is replaced and the upload decoded once more from its beginning; what was handed
on already is left out, which does not show, for the samples of a recording are always the same bits.
A file that crashes its decoder twice is refused. Decoders that others kill (an operator, a machine
without memory) say less about the file: their uploads are tried more often.

Linux and other systems with Unix sockets and fork; not Windows.
"""

import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import math
import os
import selectors
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from htsat.apps.serve import sandbox
from htsat.apps.serve.sandbox import Restrictions
from htsat.audio.decode import open_audio
from htsat.audio.resample import resample
from htsat.errors import AudioError, HtsatError

Array = NDArray[np.float32]

_log = logging.getLogger(__name__)

#: samples of every block but the last: 256 KiB, about what a socket holds
_BLOCK_SAMPLES = 1 << 16
#: how much is decoded at once, in seconds of the recording
_DECODE_SECONDS = 2.0
#: seconds of a recording that are measured between two signs of life
_MEASURED_SECONDS = 300.0
#: bytes of a message that is not samples
_MAX_TEXT = 4096
#: decoders that may die of one upload, by a signal of their own or another's
_MAX_CRASHES = 2
_MAX_KILLS = 10
#: seconds within which a new decoder must be ready, however busy the machine
_START_SECONDS = 60.0
#: starts that fail one after another before uploads are told so, and the seconds between two of them, at most
_MAX_FAILURES = 3
_MAX_BACK_OFF = 5.0

#: between server and template: what, process, status
_ORDER = struct.Struct("=4sii")
_FORK, _KILL, _FORKED, _EXITED = b"fork", b"kill", b"frkd", b"exit"
#: before each message of a decoder: what, bytes that follow
_MESSAGE = struct.Struct("=4sI")
_READY, _ALIVE, _HEADER, _BLOCK, _END, _ERROR, _FAILURE = (
    b"redy", b"live", b"head", b"blok", b"end ", b"err ", b"fail",
)  # fmt: skip

#: how the template is started, after the interpreter
_COMMAND = ("-m", "htsat.apps.serve.decoder")
#: the only variables of the environment that it gets: the others may hold secrets
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "VIRTUAL_ENV")


@dataclass(frozen=True)
class DecodeLimits:
    """What one upload may cost. Rates and channels are those of ``htsat.audio.decode``.

    Attributes:
        max_seconds: of sound, by the header and while decoding.
        max_memory: bytes of a decoder beyond those it starts with.
        max_cpu_seconds: processor time of a decoder.
        max_stall_seconds: without a block, while one is waited for.
    """

    max_seconds: float = 3600.0
    max_memory: int = 512 << 20
    max_cpu_seconds: float = 300.0
    max_stall_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not 0 < getattr(self, field.name) < math.inf:
                raise ValueError(f"{field.name} must be more than 0 and finite, got {getattr(self, field.name)}")


@dataclass
class DecoderStats:
    """Counts since the start, and the present.

    Attributes:
        crashes: decoders that died while they worked, whoever killed them.
        timeouts: decoders that were ended for they took too long.
        restarts: templates started after the first.
        busy: decoders at work.
        waiting: uploads that wait for one.
    """

    crashes: int = 0
    timeouts: int = 0
    restarts: int = 0
    busy: int = 0
    waiting: int = 0


class _DeathError(Exception):
    """A decoder ended before its work was done."""


class _NonsenseError(_DeathError):
    """A decoder said what decoders never say: a file has taken it over, or its memory is damaged."""


# ---------------------------------------------------------------------------------------------------
# the server's side


class DecoderPool:
    """Decodes uploads for one event loop.

    Args:
        processes: uploads that are decoded at once; the others wait in order. One whose blocks are taken
            slowly keeps its process as long.
        limits: for each upload.
    """

    def __init__(self, processes: int = 2, limits: DecodeLimits | None = None) -> None:
        if processes < 1:
            raise ValueError(f"processes must be at least 1, got {processes}")
        self.limits = limits or DecodeLimits()
        self.stats = DecoderStats()
        #: what decoders gave up; None before ``start``
        self.restrictions: Restrictions | None = None
        self._num_idle = processes
        self._slots = asyncio.Semaphore(processes)
        self._idle: deque[_Process] = deque()
        self._busy: set[_Process] = set()
        self._template: _Template | None = None
        self._keeper: asyncio.Task[None] | None = None
        #: why decoders cannot be started, and how often that was so in a row
        self._failure = ""
        self._num_failures = 0
        self._closed = False
        # two sides of one count: there is an idle process, there should be more
        self._available = asyncio.Event()
        self._wanted = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether an upload that comes now meets a decoder that waits for it."""
        return bool(self._idle) and not self._closed

    async def start(self) -> None:
        """Start the processes; returns when one waits.

        Raises:
            HtsatError: they cannot be started here.
        """
        if sys.platform == "win32":
            raise HtsatError("uploads are decoded in separate processes, which needs Linux or macOS; run this in WSL")
        if self._keeper is not None:
            raise RuntimeError("the decoder pool was started before")
        self._keeper = asyncio.create_task(self._keep(), name="htsat-decoders")
        try:
            self._idle.appendleft(await self._take())
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End all processes; uploads that are being decoded fail with HtsatError. May be called twice."""
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        busy = list(self._busy)
        for process in [*self._idle, *busy]:
            process.end()
        self._idle.clear()
        self._available.set()
        if self._template is not None:
            await self._template.close()
        while any(process.is_receiving for process in busy):
            await asyncio.sleep(0.001)

    def decode(self, file: IO[bytes] | int, name: str, sample_rate: int) -> "Decoding":
        """Decode an upload, mix it to mono and resample it, as ``htsat.audio.resample.stream_audio`` does.

        Args:
            file: a regular file or its descriptor, read from its beginning; stays open, its position is kept.
                It has to be there until the first block, and may be without a name.
            name: what messages call it.
            sample_rate: Hz of the output.

        Returns:
            blocks of (n,) float32, to be iterated or closed.
        """
        return Decoding(_Upload(file, name[: _MAX_TEXT // 16], sample_rate), self)

    async def _decode(self, upload: "_Upload") -> AsyncGenerator[Array, None]:
        if self._closed or self._keeper is None:
            raise HtsatError("the decoder pool is not running; start it first")
        crashes = kills = 0
        with upload.opened() as descriptor:
            self.stats.waiting += 1
            try:
                await self._slots.acquire()
            finally:
                self.stats.waiting -= 1
            self.stats.busy += 1
            try:
                while True:
                    process = await self._take()
                    self._busy.add(process)
                    try:
                        process.give(upload, descriptor)
                        while (block := await self._next(process, upload)) is not None:
                            yield block
                        return
                    except _DeathError as died:
                        reason = died
                        process.end()
                        status = await process.status()
                    finally:
                        self._busy.discard(process)
                        process.end()
                    if self._closed:
                        raise HtsatError(f"{upload.name}: decoding was ended by a stop of the server; send it again")
                    self.stats.crashes += 1
                    lied = isinstance(reason, _NonsenseError)
                    cause = str(reason) if lied else _cause(status)
                    _log.warning("%s: the decoder died (%s)", upload.name, cause)
                    if status == -signal.SIGXCPU:
                        self.stats.timeouts += 1
                        raise AudioError(
                            f"{upload.name}: decoding takes more than {self.limits.max_cpu_seconds:g} s of processor "
                            "time; cut the recording into parts or convert it to FLAC"
                        )
                    # what no signal of its own ended was killed by someone: an operator, a machine without memory
                    killed = not lied and status in (None, -signal.SIGKILL)
                    kills, crashes = kills + killed, crashes + (not killed)
                    if crashes >= _MAX_CRASHES or kills >= _MAX_KILLS:
                        raise AudioError(
                            f"{upload.name}: the decoder crashed on this file ({cause}), again and again; "
                            "it is damaged or of a rare coding, convert it to WAV or FLAC"
                        )
            finally:
                self.stats.busy -= 1
                self._slots.release()

    async def _next(self, process: "_Process", upload: "_Upload") -> Array | None:
        """Return the next block, None at the end."""
        while True:
            try:
                async with asyncio.timeout(self.limits.max_stall_seconds):
                    kind, body = await process.receive()
            except TimeoutError as error:
                self.stats.timeouts += 1
                raise AudioError(
                    f"{upload.name}: decoding stood still for {self.limits.max_stall_seconds:g} s and was ended; "
                    "the file is damaged or of a rare coding, convert it to WAV or FLAC"
                ) from error
            if kind == _BLOCK and isinstance(body, np.ndarray):
                if upload.is_complete:
                    raise _NonsenseError("it sent blocks after the last")
                most = (self.limits.max_seconds + 1) * upload.sample_rate
                if upload.done + len(body) > most or not np.isfinite(body).all():
                    raise _NonsenseError("it sent too many samples, or not finite ones")
                upload.is_complete = len(body) < _BLOCK_SAMPLES
                upload.done += len(body)
                return body
            if kind == _HEADER and isinstance(body, bytes) and len(body) == 8 and not process.has_told_header:
                process.has_told_header = True
                (duration,) = struct.unpack("=d", body)
                upload.duration = duration if 0 < duration <= self.limits.max_seconds else None
                continue
            if kind == _ALIVE and process.signs_of_life <= self.limits.max_seconds / _MEASURED_SECONDS:
                process.signs_of_life += 1
                continue
            if kind == _END and not body:
                return None
            if kind == _ERROR and isinstance(body, bytes):
                raise AudioError(_line(body))
            if kind == _FAILURE and isinstance(body, bytes):
                _log.error("decoding %s: %s", upload.name, _line(body))
                raise AudioError(
                    f"{upload.name}: the decoder failed on this file ({_line(body)}); convert it to WAV or FLAC"
                )
            raise _NonsenseError(f"it sent a message of kind {kind!r}")

    async def _take(self) -> "_Process":
        """Return a decoder that waits, as soon as there is one."""
        deadline = time.monotonic() + _START_SECONDS
        while not self._closed:
            if self._idle:
                self._wanted.set()
                return self._idle.popleft()
            # also set by each start that failed
            self._available.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await self._available.wait()
            if not self._idle and (time.monotonic() >= deadline or self._num_failures >= _MAX_FAILURES):
                raise HtsatError(
                    f"no process to decode with could be started ({self._failure or 'it takes too long'}); "
                    "see the messages of the server for the cause"
                )
        raise HtsatError("the decoder pool was closed")

    async def _keep(self) -> None:
        """See to it that there is a template, and that decoders wait, for as long as the pool is open."""
        while True:
            if len(self._idle) >= self._num_idle:
                self._wanted.clear()
                await self._wanted.wait()
                continue
            try:
                if self._template is None or self._template.has_ended:
                    if self._template is not None:
                        self.stats.restarts += 1
                        await self._template.close()
                    self._template = _Template(self.limits, self._forget)
                process, self.restrictions = await self._template.fork()
            except (OSError, ValueError, _DeathError, TimeoutError) as error:
                self._failure = str(error) or type(error).__name__
                _log.warning("a decoder could not be started: %s", self._failure)
                if isinstance(error, TimeoutError) and self._template is not None:
                    await self._template.close()
                self._num_failures += 1
                self._available.set()
                # at once after the first: that was the death of a template that had worked
                await asyncio.sleep(min(0.1 * (self._num_failures - 1) ** 2, _MAX_BACK_OFF))
                continue
            self._num_failures = 0
            if process.has_exited:
                process.end()
                continue
            self._idle.append(process)
            self._available.set()

    def _forget(self, process: "_Process") -> None:
        """Replace a decoder that ended while it waited."""
        with contextlib.suppress(ValueError):
            self._idle.remove(process)
            process.end()
        self._wanted.set()


class Decoding(AsyncGenerator[Array, None]):
    """The blocks of an upload that is being decoded: all but the last of the same length.

    It should be closed when it is not read to its end (``contextlib.aclosing``): its process is ended then.
    Besides AudioError it raises HtsatError where no process can be had.
    """

    def __init__(self, upload: "_Upload", pool: DecoderPool) -> None:
        self._upload = upload
        # the generator knows nothing of this object: dropping it ends the generator, by the loop's own rules
        self._blocks = pool._decode(upload)

    @property
    def duration(self) -> float | None:
        """Seconds by the header or, if it does not tell, by measure; None before the first block."""
        return self._upload.duration

    async def asend(self, value: None) -> Array:
        """Return the next block; StopAsyncIteration at the end."""
        return await self._blocks.asend(value)

    async def athrow(self, kind: Any, value: Any = None, traceback: TracebackType | None = None) -> Array:
        """Raise an exception where the generator stands."""
        return await self._blocks.athrow(kind if value is None else value)

    async def aclose(self) -> None:
        """End the work on this upload; its process is free for the next."""
        await self._blocks.aclose()


@dataclass(eq=False)
class _Upload:
    """One upload on its way."""

    file: IO[bytes] | int
    name: str
    sample_rate: int
    duration: float | None = None
    #: samples handed on
    done: int = 0
    #: a block was shorter than the others: the last
    is_complete: bool = False

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """Give a descriptor of the file that can be read only and has a position of its own, where the system can."""
        if isinstance(self.file, int):
            given = self.file
        else:
            with contextlib.suppress(AttributeError):
                self.file.flush()
            given = self.file.fileno()
        if not stat.S_ISREG(os.fstat(given).st_mode):
            raise ValueError(f"{self.name}: expected a regular file")
        try:
            descriptor = os.open(f"/proc/self/fd/{given}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            descriptor = os.dup(given)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


class _Process:
    """A decoder, as the server sees it."""

    def __init__(self, template: "_Template", pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self._template = template
        self._socket = connection
        #: someone waits for its next message
        self.is_receiving = False
        self.has_told_header = False
        self.signs_of_life = 0
        self._exit: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

    @property
    def has_exited(self) -> bool:
        """Whether the process is gone."""
        return self._exit.done()

    def exited(self, status: int | None) -> None:
        """Note the exit code (negative: a signal), None if nobody knows."""
        if not self._exit.done():
            self._exit.set_result(status)

    async def status(self) -> int | None:
        """Return the exit code of a process that ended or was killed, None if nobody knows."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5.0):
                return await asyncio.shield(self._exit)
        return None

    def give(self, upload: _Upload, descriptor: int) -> None:
        """Send the upload to be decoded."""
        text = json.dumps([upload.name, upload.sample_rate, upload.done]).encode()
        try:
            socket.send_fds(self._socket, [struct.pack("=I", len(text)), text], [descriptor])
        except OSError as error:
            raise _DeathError(error.strerror) from error

    async def receive(self) -> tuple[bytes, Array | bytes]:
        """Return kind and content of the next message: an array of samples, or bytes."""
        header = bytearray(_MESSAGE.size)
        await self._receive_into(memoryview(header))
        kind, size = _MESSAGE.unpack(header)
        if kind == _BLOCK:
            if not 0 < size <= 4 * _BLOCK_SAMPLES or size % 4:
                raise _NonsenseError(f"it sent a block of {size} bytes")
            block = np.empty(size // 4, dtype=np.float32)
            await self._receive_into(block.view(np.uint8).data)
            return kind, block
        if size > _MAX_TEXT:
            raise _NonsenseError(f"it sent a message of {size} bytes")
        text = bytearray(size)
        await self._receive_into(memoryview(text))
        return kind, bytes(text)

    async def _receive_into(self, view: memoryview) -> None:
        loop = asyncio.get_running_loop()
        while view:
            self.is_receiving = True
            try:
                count = await loop.sock_recv_into(self._socket, view)
            except OSError as error:
                raise _DeathError(error.strerror) from error
            finally:
                self.is_receiving = False
            if not count:
                raise _DeathError("it ended")
            view = view[count:]

    def end(self) -> None:
        """Kill it, whatever it does; whoever waits for its message is told."""
        self._template.kill(self.pid)
        if self.is_receiving:
            # the event loop looks at the socket: it is closed by the one who reads
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        else:
            self._socket.close()


class _Template:
    """The process that decoders are forked from, as the server sees it."""

    def __init__(self, limits: DecodeLimits, on_exit: Callable[[_Process], None]) -> None:
        self._on_exit = on_exit
        self._processes: dict[int, _Process] = {}
        #: of the fork that is under way
        self._forked: asyncio.Future[int] | None = None
        self._loop = asyncio.get_running_loop()
        self._socket, inner = socket.socketpair()
        with inner, contextlib.ExitStack() as failing:
            failing.callback(self._socket.close)
            # started by this very thread: the kernel ends the template with the thread that started it
            self._popen = subprocess.Popen(
                [sys.executable, "-P", *_COMMAND, str(inner.fileno()), json.dumps(dataclasses.astuple(limits))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[inner.fileno()],
                env=_environment(),
                cwd="/",
                # Ctrl-C is for the server, which lets accepted requests finish
                start_new_session=True,
            )
            failing.pop_all()
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket.fileno(), self._read)
        self.has_ended = False

    async def fork(self) -> tuple[_Process, Restrictions]:
        """Return a new decoder that waits for its upload, and what it gave up.

        Raises:
            _DeathError, OSError, ValueError, TimeoutError: there is none.
        """
        outer, inner = socket.socketpair()
        outer.setblocking(False)
        try:
            self._forked = self._loop.create_future()
            with inner:
                if self.has_ended:
                    raise _DeathError("the process that decoders come from ended")
                socket.send_fds(self._socket, [_ORDER.pack(_FORK, 0, 0)], [inner.fileno()])
            async with asyncio.timeout(_START_SECONDS):
                pid = await self._forked
        except BaseException:
            outer.close()
            raise
        finally:
            self._forked = None
        process = _Process(self, pid, outer)
        self._processes[pid] = process
        try:
            async with asyncio.timeout(_START_SECONDS):
                kind, body = await process.receive()
            if kind != _READY or not isinstance(body, bytes):
                raise _NonsenseError(f"it sent a message of kind {kind!r}")
            applied, skipped = json.loads(body)
        except BaseException:
            process.end()
            raise
        return process, Restrictions(tuple(applied), tuple(skipped))

    def kill(self, pid: int) -> None:
        """Kill a decoder if it lives; the template alone knows, as it has not waited for it yet."""
        if pid in self._processes and not self.has_ended:
            with contextlib.suppress(OSError):
                self._socket.send(_ORDER.pack(_KILL, pid, 0))

    def _read(self) -> None:
        """Take what the template tells."""
        try:
            # as many orders as there are, whole: it sends each at once
            data = self._socket.recv(256 * _ORDER.size)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or len(data) % _ORDER.size:
            self._end()
        for kind, pid, status in _ORDER.iter_unpack(data[: len(data) // _ORDER.size * _ORDER.size]):
            if kind == _FORKED and self._forked is not None and not self._forked.done():
                if pid:
                    self._forked.set_result(pid)
                else:
                    self._forked.set_exception(OSError(status, os.strerror(status)))
            elif kind == _EXITED and (process := self._processes.pop(pid, None)) is not None:
                process.exited(status)
                self._on_exit(process)

    def _end(self) -> None:
        """Note that the template is no more, nor its decoders."""
        if self.has_ended:
            return
        self.has_ended = True
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        if self._forked is not None and not self._forked.done():
            self._forked.set_exception(_DeathError("the process that decoders come from ended"))
        processes, self._processes = list(self._processes.values()), {}
        for process in processes:
            process.exited(None)
            self._on_exit(process)

    async def close(self) -> None:
        """End the template and with it its decoders; returns when it is gone. May be called twice."""
        self._end()
        deadline = time.monotonic() + 2.0
        while self._popen.poll() is None:
            if time.monotonic() > deadline:
                self._popen.kill()
            await asyncio.sleep(0.002)


def _environment() -> dict[str, str]:
    """Return the environment of the template: where modules are, and one thread for libraries that would start more."""
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return kept | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(os.path.abspath(path or ".") for path in sys.path)),  # noqa: PTH100
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def _line(text: bytes) -> str:
    """Return the words of a decoder as one printable line."""
    return "".join(c if c.isprintable() else " " for c in text.decode("utf-8", "replace"))


def _cause(status: int | None) -> str:
    if status is None:
        return "it was ended"
    return signal.Signals(-status).name if status < 0 else f"exit code {status}"


# ---------------------------------------------------------------------------------------------------
# the template


def main() -> None:
    """Be the template: fork decoders until the server closes the socket whose descriptor is the first argument."""
    template = os.getpid()
    control = socket.socket(fileno=int(sys.argv[1]))
    limits = DecodeLimits(*json.loads(sys.argv[2]))
    sandbox.die_with_parent()
    # a service manager ends all processes of a service at once; these end with the server, after its last answer
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _warm_up()
    gc.collect()
    gc.freeze()
    children: set[int] = set()
    wakes, wake = socket.socketpair()
    wakes.setblocking(False)
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(wakes, selectors.EVENT_READ)
    # for decoders, which cannot open it any more
    nothing = os.open(os.devnull, os.O_RDWR)
    max_address_space = sandbox.address_space() + limits.max_memory
    confined = sandbox.confine([path for path in sys.path if path])

    def be_decoder(descriptor: int) -> NoReturn:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # all that it keeps: nothing for 0, 1 and 2, the socket for 3
            for standard in range(3):
                os.dup2(nothing, standard)
            os.dup2(descriptor, 3)
            os.closerange(4, 256)
            restrictions = sandbox.restrict(confined, max_address_space, limits.max_cpu_seconds)
            sandbox.die_with_parent()
            # else the template died before that
            if os.getppid() == template:
                _serve_one(socket.socket(fileno=3), restrictions, limits)
                code = 0
        finally:
            # no handlers, no flushing: whatever there is belongs to the template
            os._exit(code)

    with contextlib.suppress(ConnectionError):
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if wakes in ready:
                with contextlib.suppress(BlockingIOError):
                    wakes.recv(4096)
                for pid in list(children):
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        children.discard(pid)
                        control.sendall(_ORDER.pack(_EXITED, pid, os.waitstatus_to_exitcode(status)))
            if control in ready:
                data, descriptors, _, _ = socket.recv_fds(control, _ORDER.size, 1)
                if not data:
                    break
                kind, pid, _ = _ORDER.unpack(data)
                if kind == _FORK:
                    _fork(control, descriptors[0], children, be_decoder)
                elif pid in children:
                    os.kill(pid, signal.SIGKILL)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)


def _fork(control: socket.socket, descriptor: int, children: set[int], be_decoder: Callable[[int], NoReturn]) -> None:
    try:
        pid = os.fork()
    except OSError as error:
        os.close(descriptor)
        control.sendall(_ORDER.pack(_FORKED, 0, error.errno or 0))
        return
    if not pid:
        be_decoder(descriptor)
    os.close(descriptor)
    children.add(pid)
    control.sendall(_ORDER.pack(_FORKED, pid, 0))


def _warm_up() -> None:
    """Import and set up now what decoding would later: decoders may not find it any more, and would take the time."""
    import io

    import soundfile

    with contextlib.suppress(ImportError):
        import av  # noqa: F401
    for kind, subtype in (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")):
        file = io.BytesIO()
        with contextlib.suppress(AudioError, soundfile.SoundFileError):
            soundfile.write(file, np.zeros((4800, 2), np.float32), 48_000, format=kind, subtype=subtype)
            with open_audio(file.getvalue()) as reader:
                for _ in resample(reader, 32_000):
                    pass
    with contextlib.suppress(AudioError):
        open_audio(b"\x1a\x45\xdf\xa3 not a recording").close()
    json.dumps(["ü", 1])


# ---------------------------------------------------------------------------------------------------
# a decoder


def _send(server: socket.socket, kind: bytes, body: bytes | memoryview = b"") -> None:
    server.sendall(_MESSAGE.pack(kind, len(body)))
    if body:
        server.sendall(body)


def _serve_one(server: socket.socket, restrictions: Restrictions, limits: DecodeLimits) -> None:
    """Wait for one upload and send what is in it."""
    _send(server, _READY, json.dumps([restrictions.applied, restrictions.skipped]).encode())
    data, descriptors, _, _ = socket.recv_fds(server, 4, 1)
    if not data:
        return
    text = server.recv(struct.unpack("=I", data)[0], socket.MSG_WAITALL)
    name, sample_rate, skip = json.loads(text)
    try:
        _decode(server, descriptors[0], name, sample_rate, skip, limits)
    except AudioError as error:
        _send(server, _ERROR, _cut(str(error)))
    except MemoryError:
        gc.collect()
        _send(
            server,
            _ERROR,
            _cut(
                f"{name}: decoding takes more than {limits.max_memory >> 20} MiB of memory; "
                "convert it to FLAC with fewer channels"
            ),
        )
    except ConnectionError:
        # nobody waits for it any more
        return
    except Exception as error:  # a fault of a library or of ours: the server tells it
        _send(server, _FAILURE, _cut(f"{type(error).__name__}: {error}"))
    else:
        _send(server, _END)


def _cut(text: str) -> bytes:
    return text.encode("utf-8", "replace")[:_MAX_TEXT]


def _duration(server: socket.socket, file: BinaryIO, name: str, limits: DecodeLimits) -> float:
    """Return the seconds of a recording; if its header does not tell, decode it to see.

    A tiny file may last for days: it is refused before anyone listens to the first hour.
    """
    file.seek(0)
    with open_audio(file, name, max_seconds=limits.max_seconds) as reader:
        if reader.duration is not None:
            return reader.duration
        num_samples, told = 0, 0.0
        for block in reader.blocks(_DECODE_SECONDS):
            num_samples += len(block)
            if num_samples / reader.sample_rate - told >= _MEASURED_SECONDS:
                told = num_samples / reader.sample_rate
                _send(server, _ALIVE)
        return num_samples / reader.sample_rate


def _decode(
    server: socket.socket, descriptor: int, name: str, sample_rate: int, skip: int, limits: DecodeLimits
) -> None:
    """Send header and samples of an upload, from the sample ``skip`` on, in blocks of one length."""
    with open(descriptor, "rb", buffering=1 << 16) as file:
        duration = _duration(server, file, name, limits)
        file.seek(0)
        with open_audio(file, name, max_seconds=limits.max_seconds) as reader:
            _send(server, _HEADER, struct.pack("=d", duration))
            block = np.empty(_BLOCK_SAMPLES, dtype=np.float32)
            filled = 0
            for piece in resample(reader, sample_rate, _DECODE_SECONDS):
                left = piece[skip:]
                skip -= len(piece) - len(left)
                while len(left):
                    count = min(len(left), _BLOCK_SAMPLES - filled)
                    block[filled : filled + count] = left[:count]
                    left, filled = left[count:], filled + count
                    if filled == _BLOCK_SAMPLES:
                        _send(server, _BLOCK, block.view(np.uint8).data)
                        filled = 0
            if filled:
                _send(server, _BLOCK, block[:filled].view(np.uint8).data)


if __name__ == "__main__":
    main()
