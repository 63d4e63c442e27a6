"""Measuring: processes that take turns, time and memory of a call, and how busy the machine is otherwise."""

import math
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

from htsat import __version__
from htsat.backends import cores
from htsat.errors import HtsatError, OutputError

if sys.platform != "win32":
    import resource

T = TypeVar("T")

#: share of all processors that others may use before figures are called doubtful
OTHERS = 0.1
#: seconds between two turns, in which the threads of the one before fall asleep
REST = 0.02
#: seconds that a process has to end by itself
GRACE = 5.0


class BenchError(HtsatError):
    """Something cannot be measured."""


class Job(Protocol):
    """What a process is to measure; must be picklable."""

    @property
    def name(self) -> str:
        """What it is called."""

    def start(self) -> Callable[[Any], Any]:
        """Make ready, in the process, and return what answers requests."""


@dataclass(frozen=True)
class Worker:
    """A process that measures.

    Attributes:
        name: of its job.
        connection: to it.
    """

    name: str
    connection: Connection

    def ask(self, request: Any) -> Any:
        """Return its answer to a request.

        Raises:
            HtsatError: it failed, or died.
        """
        try:
            self.connection.send((request,))
            answer = self.connection.recv()
        except (EOFError, OSError):
            raise BenchError(f"{self.name}: its process ended; there may be too little memory") from None
        if isinstance(answer, HtsatError):
            raise answer
        return answer


def _serve(connection: Connection, job: Job) -> None:
    """Make ready at the first request and answer the others, until nobody is there to ask."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    warnings.simplefilter("ignore")  # of packages, about themselves
    answer: Callable[[Any], Any] | None = None
    with suppress(EOFError, OSError):  # nobody waits any more
        while True:
            request = connection.recv()
            reply: object = None
            try:
                if answer is None:
                    answer = job.start()
                else:
                    reply = answer(*request)
            except HtsatError as error:
                reply = error
            except MemoryError:
                reply = BenchError(f"{job.name}: not enough memory")
            except Exception as error:  # what runs here is other people's code too
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                reply = BenchError(f"{job.name}: cannot be run ({reason})")
            connection.send(reply)


@contextmanager
def processes(
    jobs: Sequence[Job],
    on_failure: Callable[[str, HtsatError], None] | None = None,
    on_start: Callable[[str], None] | None = None,
) -> Iterator[list[Worker]]:
    """Start a process per job and let them make ready one after the other.

    Args:
        jobs: what they are to do.
        on_failure: told the name and the error of each that cannot make ready, which is then not among the workers;
            None: the error is raised.
        on_start: told the name of each before it makes ready.
    """
    context = multiprocessing.get_context("spawn")  # nothing of this process, least of all its memory, is inherited
    started, ends, workers = [], [], []
    try:
        for job in jobs:
            if on_start is not None:
                on_start(job.name)
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            started.append(process)
            ends.append(mine)
            worker = Worker(job.name, mine)
            try:
                worker.ask(None)
            except HtsatError as error:
                if on_failure is None:
                    raise
                on_failure(job.name, error)
            else:
                workers.append(worker)
        yield workers
    finally:
        for end in ends:
            end.close()  # which tells the process behind it to end
        for process in started:
            process.join(GRACE)
            if process.is_alive():
                process.terminate()
                process.join()


@dataclass(frozen=True)
class _Once:
    """Calls a function of a module in a process."""

    name: str
    function: Callable[..., Any]

    def start(self) -> Callable[[Any], Any]:
        return lambda arguments: self.function(*arguments)


def apart(name: str, function: Callable[..., T], *arguments: Any) -> T:
    """Return what a function returns, called in a process of its own, whose memory goes with it."""
    with processes([_Once(name, function)]) as [worker]:
        result: T = worker.ask(arguments)
        return result


# ------------------------------------------------------------------ time and memory


@dataclass(frozen=True)
class Sample:
    """One call.

    Attributes:
        wall: seconds by the clock.
        processor: seconds of all threads; those that wait for each other may count as working.
        peak: bytes that the process held at most so far.
    """

    wall: float
    processor: float
    peak: int


def sample(call: Callable[[], object]) -> Sample:
    """Return time and memory of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    processor, wall = time.process_time() - processor, time.perf_counter() - wall
    return Sample(wall, processor, peak_memory())


def peak_memory() -> int:
    """Return the bytes that this process held in memory at most; 0 if unknown."""
    found = _status("VmHWM")
    if found is None and sys.platform != "win32":
        # Kilobytes on Linux, bytes on macOS. On Linux it counts what the starting process held, too: second choice.
        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return found or 0


def forget_peak() -> None:
    """Let the peak begin anew, where the system can: what making ready took for a moment does not count."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def held_memory() -> int:
    """Return the bytes that this process holds in memory; where the system does not tell, those it held at most."""
    return _status("VmRSS") or peak_memory()


def _status(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def take_turns(
    calls: Mapping[str, Callable[[], T]],
    rounds: Mapping[str, int],
    on_turn: Callable[[str], None] | None = None,
    rest: float = REST,
) -> dict[str, list[T]]:
    """Return what each call returned, called in turn: A B C A B C.

    Args:
        calls: by name.
        rounds: how often each is called; one that has had its rounds is passed over.
        on_turn: told the name before each call.
        rest: seconds between calls.
    """
    results: dict[str, list[T]] = {name: [] for name in calls}
    for number in range(max(rounds.values(), default=0)):
        for name, call in calls.items():
            if number < rounds[name]:
                if on_turn is not None:
                    on_turn(name)
                time.sleep(rest)
                results[name].append(call())
    return results


@dataclass(frozen=True)
class Times:
    """Median and minimum of seconds."""

    median: float
    minimum: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Times":
        """Return those of a list."""
        if not all(math.isfinite(value) for value in seconds):
            raise BenchError("a time is not finite")
        return cls(statistics.median(seconds), min(seconds))


# ------------------------------------------------------------------ the machine


def machine(threads: int) -> dict[str, Any]:
    """Return what figures depend on: the processor, its instructions, threads, and versions of what runs."""
    return {
        "processor": cpu_name(),
        "cores": cores(),
        "instructions": sorted(instructions() or ()),
        "threads": threads,
        "system": platform.platform(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "htsat": __version__} | versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that run networks, as far as they are installed."""
    found = {}
    for package in ("torch", "onnxruntime", "openvino", "transformers", "numpy", "soundfile", "soxr"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instructions() -> set[str] | None:
    """Return those of the processor's instruction sets that matter here; None where the system does not tell."""
    flags = _cpuinfo("flags") or _cpuinfo("Features")
    if flags is None:
        return None
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8",
             "asimd", "bf16", "sve", "i8mm")  # fmt: skip
    return set(known) & set(flags.split())


def has_bfloat16() -> bool:
    """Return whether the processor has instructions for bfloat16, or whether that cannot be known."""
    found = instructions()
    return found is None or any("bf16" in name for name in found)


def _cpuinfo(field: str) -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.split(":")[0].strip() == field:
                return line.split(":", 1)[1].strip()
    except (OSError, IndexError):
        pass
    return None


@dataclass(frozen=True)
class Work:
    """Processor seconds so far.

    Attributes:
        all: that all processors of the machine have worked; None where the system does not tell.
        capacity: that there were.
        own: of this process and of those it started and that have ended.
    """

    all: float | None
    capacity: float
    own: float

    @classmethod
    def now(cls) -> "Work":
        """Return what was worked until now."""
        if sys.platform == "win32":
            return cls(None, 0.0, time.process_time())
        usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
        own = sum(usage.ru_utime + usage.ru_stime for usage in usages)
        try:
            times = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
            tick = os.sysconf("SC_CLK_TCK")
            return cls((sum(times) - times[3] - times[4]) / tick, sum(times) / tick, own)
        except (OSError, ValueError, IndexError):
            return cls(None, 0.0, own)

    def others(self, later: "Work") -> float | None:
        """Return the share of all processors that other programs used from here until later; None if unknown."""
        if self.all is None or later.all is None or later.capacity <= self.capacity:
            return None
        work = later.all - self.all - (later.own - self.own)
        return min(1.0, max(0.0, work / (later.capacity - self.capacity)))


def busy_now(seconds: float = 0.5) -> float | None:
    """Return the share of all processors that other programs use, watched for a moment; None if unknown."""
    before = Work.now()
    time.sleep(seconds)
    return before.others(Work.now())


def load_average() -> list[float] | None:
    """Return the load averages of 1, 5 and 15 minutes, where there are such."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def doubt(others: float | None, before: bool = False) -> str | None:
    """Return a warning if other programs use so much of the machine that figures cannot be trusted.

    Args:
        others: the share of all processors that they use.
        before: the measurement has yet to begin.
    """
    if others is None or others <= OTHERS:
        return None
    if before:
        return f"other programs use {others:.0%} of the processors now: better end them before measuring"
    return (
        f"other programs used {others:.0%} of the processors meanwhile: trust no times, and of ratios those of minima "
        "at most; end them and measure again"
    )


def writable(path: Path) -> None:
    """Refuse a file that could not be written, before minutes are spent on what it is to hold.

    Raises:
        OutputError: its folder does not exist, or it is a folder.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder; make it first")
