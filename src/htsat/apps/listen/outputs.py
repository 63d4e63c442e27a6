"""Where events go: lines on stdout, files that grow, clips, webhooks and commands.

The listening never waits for any of them but stdout: what is slow has a thread and a bounded queue, and what does not
fit is dropped and counted. What fails is told, now and then if it fails often, and the listening goes on.
"""

import contextlib
import dataclasses
import http.client
import io
import json
import math
import os
import queue
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar
from urllib.parse import urlsplit

import numpy as np
import soundfile
from numpy.typing import NDArray

from htsat.apps.listen.sources import without_password
from htsat.errors import HtsatError, OutputError, UsageError, nearest
from htsat.events import Event
from htsat.files import write_atomic
from htsat.formats import Detections, format_events
from htsat.live import LiveResult, live_messages

Array = NDArray[np.float32]
T = TypeVar("T")
LineFormat = Literal["table", "tsv", "json"]

#: events that may wait for a webhook or a command
_WAITING = 1000
#: clips that may wait for the disk: whole ones are in memory
_WAITING_CLIPS = 8
#: lines that a full disk keeps in memory
_MAX_BACKLOG = 10_000
#: seconds that messages of one kind are apart, at least
_QUIET_SECONDS = 60.0
#: seconds that a webhook may take to answer, and tries of it
_HOOK_SECONDS, _HOOK_TRIES = 10.0, 5
#: answers that may become better when asked again
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_COLUMNS = ("filename", "onset", "offset", "event_label", "probability", "onset_time", "offset_time")
#: how the names of clips are told from other files
_CLIP_NAME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d{3}|\d{9}\.\d{3})_.*_\d{6,}(-\d+)?\.flac")


@dataclass(frozen=True)
class OutputSettings:
    """What is told of a stream, and to whom.

    Attributes:
        format: of the lines on stdout.
        out: file that grows; ``.tsv``: a table of events, else JSON lines of events and gaps.
        daily: a file of its own for each day.
        clips: folder for a recording of each event.
        margin: seconds of a clip before and behind the event.
        clip_seconds: of an event that a clip holds, at most.
        clips_max_bytes: of all clips, the oldest ones are deleted; None: no limit.
        webhooks: addresses that get each event as JSON.
        commands: what is run for each event.
        command_seconds: that a command may take.
        min_probability: events below are told to nobody.
        labels: the only ones that are told; none: all.
        top: tags of a progress message.
        frames: also the framewise posteriors, in JSON on stdout.
    """

    format: LineFormat = "table"
    out: Path | None = None
    daily: bool = False
    clips: Path | None = None
    margin: float = 1.0
    clip_seconds: float = 60.0
    clips_max_bytes: int | None = None
    webhooks: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    command_seconds: float = 30.0
    min_probability: float = 0.0
    labels: tuple[str, ...] = ()
    top: int = 5
    frames: bool = False


@dataclass(frozen=True)
class Heard:
    """A change of an event, as everybody is told.

    Attributes:
        id: of the event.
        state: opened, going on, or closed.
        event: what sounds, in seconds of the stream.
        source: where.
        onset_time: when by the clock; None: nobody knows.
        offset_time: the same of its end.
        clip: file that holds it.
    """

    id: int
    state: Literal["open", "update", "close"]
    event: Event
    source: str
    onset_time: datetime | None = None
    offset_time: datetime | None = None
    clip: Path | None = None

    def message(self) -> dict[str, Any]:
        """Return it as plain values."""
        values: dict[str, Any] = {"type": "event", "state": self.state, "id": self.id}
        values |= dataclasses.asdict(self.event)
        values |= {"source": self.source, "onset_time": _iso(self.onset_time), "offset_time": _iso(self.offset_time)}
        return values if self.clip is None else {**values, "clip": str(self.clip)}

    def row(self) -> str:
        """Return it as a line of a table with tabs, which ``htsat score`` reads."""
        table = format_events([Detections(self.source, None, [self.event])], "tsv")
        times = (_iso(self.onset_time) or "", _iso(self.offset_time) or "")
        return "\t".join((table.splitlines()[1], f"{self.event.probability:.4f}", *times))


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="milliseconds")


def _json(message: dict[str, Any]) -> str:
    return json.dumps(message, ensure_ascii=False, allow_nan=False)


class Teller:
    """Passes messages on; those that would repeat themselves only now and then.

    Args:
        tell: takes one line.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self._lock = threading.Lock()
        self._told: dict[str, tuple[float, int]] = {}

    def rarely(self, kind: str, message: str) -> None:
        """Tell it unless the same kind was told a short while ago."""
        now = time.monotonic()
        with self._lock:
            last, missed = self._told.get(kind, (-math.inf, 0))
            if now - last < _QUIET_SECONDS:
                self._told[kind] = last, missed + 1
                return
            self._told[kind] = now, 0
        self.tell(f"{message} (and {missed} times more before)" if missed else message)


# ---------------------------------------------------------------------------------------------------
# files that grow


class AppendFile:
    """A file that lines are appended to, for weeks and over restarts.

    A line that was cut off by a loss of power is taken away when the file is opened. A disk that is full keeps lines in
    memory, up to a limit. A file that was moved away is made anew.

    Args:
        path: the file.
        teller: told of failures.
        head: first line of a new file; None: none.
        daily: put the date into the name.

    Raises:
        OutputError: it cannot be written to.
    """

    def __init__(self, path: Path, teller: Teller, *, head: str | None = None, daily: bool = False) -> None:
        self._path, self._teller, self._head, self._daily = path, teller, head, daily
        self._descriptor = -1
        self._open_path = path
        self._identity = (0, 0)
        self._unsynced = False
        self._backlog: deque[str] = deque()
        self.dropped = 0
        try:
            self._open()
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another file") from None

    def _today(self) -> Path:
        day = datetime.now().astimezone().date()
        return self._path.with_name(f"{self._path.stem}-{day}{self._path.suffix}") if self._daily else self._path

    def _open(self) -> None:
        """Open the file of today and see to it that it ends with a whole line."""
        self._close_descriptor()
        self._open_path = self._today()
        descriptor = os.open(self._open_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            found = os.fstat(descriptor)
            if found.st_size and self._open_path.is_file():
                self._mend(descriptor, found.st_size)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor, self._identity = descriptor, (found.st_dev, found.st_ino)
        if self._head is not None and not found.st_size:
            self._backlog.appendleft(self._head)

    def _mend(self, descriptor: int, size: int) -> None:
        start = max(0, size - (1 << 16))
        with open(self._open_path, "rb") as stream:
            stream.seek(start)
            tail = stream.read()
        torn = tail[tail.rfind(b"\n") + 1 :]
        if not torn:
            return
        whole = self._head is not None and torn.count(b"\t") == self._head.count("\t")
        if self._head is None:
            with contextlib.suppress(ValueError):
                whole = isinstance(json.loads(torn), dict)
        if whole or len(torn) == size - start:  # a file of one line without an end is none of ours
            os.write(descriptor, b"\n")
        else:
            os.ftruncate(descriptor, size - len(torn))
            self._teller.tell(f"{self._open_path}: its last line was cut off and is taken away")

    def write(self, line: str) -> None:
        """Append a line; a failure is told and tried again with the next one."""
        if len(self._backlog) >= _MAX_BACKLOG:
            self._backlog.popleft()
            self.dropped += 1
        self._backlog.append(line)
        self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if not self._backlog:
            return
        try:
            if self._descriptor < 0 or self._today() != self._open_path or self._moved():
                self._open()
            while self._backlog:
                self._write(self._backlog[0].encode("utf-8", "backslashreplace") + b"\n")
                self._backlog.popleft()
                self._unsynced = True
        except OSError as error:
            reason = error.strerror or str(error)
            self._teller.rarely(
                f"out {self._path}",
                f"{self._open_path}: cannot be written ({reason}); {len(self._backlog)} lines wait, make room",
            )

    def _moved(self) -> bool:
        try:
            named = self._open_path.stat()
        except FileNotFoundError:
            return True
        return (named.st_dev, named.st_ino) != self._identity

    def _write(self, data: bytes) -> None:
        """Write all or nothing: a full disk takes parts of lines."""
        written = os.write(self._descriptor, data)
        try:
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise

    def sync(self) -> None:
        """Bring what was written onto the disk."""
        self.flush()
        if self._unsynced and self._descriptor >= 0:
            with contextlib.suppress(OSError):  # pipes cannot
                os.fsync(self._descriptor)
            self._unsynced = False

    def close(self) -> int:
        """Write what waits; return how many lines are lost."""
        self.sync()
        self._close_descriptor()
        return self.dropped + len(self._backlog)

    def _close_descriptor(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


# ---------------------------------------------------------------------------------------------------
# work beside the listening


class Worker(Generic[T]):
    """Does what may be slow, one after the other, in a thread; what does not fit into the queue is dropped.

    Args:
        name: what messages call it.
        work: does one; raises HtsatError if it fails.
        teller: told of failures.
        limit: how many may wait.
    """

    def __init__(self, name: str, work: Callable[[T], None], teller: Teller, limit: int = _WAITING) -> None:
        self.name = name
        self.done = self.failed = self.dropped = 0
        self._work, self._teller = work, teller
        self._items: queue.Queue[T | None] = queue.Queue()
        self._limit = limit
        self._thread = threading.Thread(target=self._run, name=f"htsat-{name}", daemon=True)
        self._thread.start()

    def put(self, item: T) -> bool:
        """Hand over one; return whether it fits."""
        if self._items.qsize() >= self._limit:
            self.dropped += 1
            self._teller.rarely(f"dropped {self.name}", f"{self.name}: is too slow, an event was dropped")
            return False
        self._items.put(item)
        return True

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            try:
                self._work(item)
                self.done += 1
            except (HtsatError, OSError) as error:
                self.failed += 1
                self._teller.rarely(f"failed {self.name}", str(error))

    def close(self, seconds: float) -> int:
        """Wait until all is done, no longer than that; return how many failed or were dropped."""
        self._items.put(None)
        self._thread.join(seconds)
        left = self._items.qsize() if self._thread.is_alive() else 0
        if left:
            self._teller.tell(f"{self.name}: {left} events still waited when the time to stop was over")
        return self.failed + self.dropped + left


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would turn a POST into a GET."""

    def redirect_request(self, *_: Any) -> None:
        """See ``urllib.request``."""


class Webhook:
    """Posts events as JSON.

    Args:
        url: http or https. ``HTSAT_WEBHOOK_TOKEN``, if it is set, goes along as ``Authorization: Bearer``.
        first_wait: seconds before the second try; each further one waits twice as long.

    Raises:
        UsageError: no such address.
    """

    def __init__(self, url: str, first_wait: float = 1.0) -> None:
        parts = urlsplit(url)
        self.name = f"webhook {without_password(url)}"
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--webhook {without_password(url)}: expected http://HOST/... or https://HOST/...")
        if parts.username is not None:
            raise UsageError(
                f"--webhook {without_password(url)}: a password does not belong into the address; set "
                "HTSAT_WEBHOOK_TOKEN"
            )
        self._url, self._first_wait = url, first_wait
        self._opener = urllib.request.build_opener(_NoRedirect)
        self.stopping = threading.Event()

    def __call__(self, heard: Heard) -> None:
        """Post one event; raises OutputError when all tries failed."""
        headers = {"Content-Type": "application/json", "User-Agent": "htsat"}
        if token := os.environ.get("HTSAT_WEBHOOK_TOKEN"):
            headers["Authorization"] = f"Bearer {token}"
        data = _json(heard.message()).encode()
        wait = self._first_wait
        for left in reversed(range(_HOOK_TRIES)):
            request = urllib.request.Request(self._url, data, headers, method="POST")
            try:
                with self._opener.open(request, timeout=_HOOK_SECONDS):
                    return
            except urllib.error.HTTPError as error:
                reason, final = f"answers {error.code}", error.code not in _TRY_AGAIN
                error.close()
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason, final = str(getattr(error, "reason", error)) or type(error).__name__, False
            if final or not left or self.stopping.wait(wait * random.uniform(0.5, 1)):
                break
            wait *= 2
        raise OutputError(f"{self.name}: {reason}; an event was not delivered")


class Command:
    """Runs a program for each event, without a shell: the event is JSON on its stdin and in its environment.

    Args:
        line: program and arguments, quoted as for a shell.
        seconds: that it may take; then it is ended, with the processes that it started.

    Raises:
        UsageError: no such program.
    """

    def __init__(self, line: str, seconds: float) -> None:
        try:
            self._arguments = shlex.split(line)
        except ValueError as error:
            raise UsageError(f"--exec {line}: cannot be taken apart ({error}); check the quotation marks") from None
        if not self._arguments or shutil.which(self._arguments[0]) is None:
            raise UsageError(f"--exec {line}: there is no such program; expected one, with arguments (no shell)")
        self.name = f"command {Path(self._arguments[0]).name}"
        self._seconds = seconds

    def __call__(self, heard: Heard) -> None:
        """Run it for one event; raises OutputError if it fails."""
        message = heard.message()
        names = ("event_label", "onset", "offset", "probability", "onset_time", "offset_time", "source", "clip")
        values = {f"HTSAT_{name.upper()}": str(message.get(name) or "") for name in names}
        values |= {"HTSAT_ONSET": str(heard.event.onset)}  # 0.0 is no empty value
        try:
            process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,  # ours is a table
                stderr=subprocess.DEVNULL,
                env=os.environ | values,
                start_new_session=True,
            )
        except OSError as error:
            raise OutputError(f"{self.name}: cannot be started ({error.strerror})") from None
        try:
            process.communicate(_json(message).encode(), timeout=self._seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            raise OutputError(f"{self.name}: took longer than {self._seconds:g} s and was ended") from None
        if process.returncode:
            raise OutputError(f"{self.name}: failed with exit code {process.returncode}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and those that it started."""
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, 9)
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    process.wait()


# ---------------------------------------------------------------------------------------------------
# clips


class Ring:
    """The last samples of a stream.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        self._samples = np.zeros(size, np.float32)
        self.position = 0  # samples of the time line so far

    def add(self, block: Array) -> None:
        """Take the next samples."""
        size = len(self._samples)
        kept = block[-size:]
        at = (self.position + len(block) - len(kept)) % size
        first = min(len(kept), size - at)
        self._samples[at : at + first] = kept[:first]
        self._samples[: len(kept) - first] = kept[first:]
        self.position += len(block)

    def skip(self, num_samples: int) -> None:
        """Go on behind a gap, which is silence."""
        kept = min(num_samples, len(self._samples))
        self.position += num_samples - kept
        self.add(np.zeros(kept, np.float32))

    def cut(self, start: int, stop: int) -> tuple[int, Array]:
        """Return what is there of the samples from ``start`` to ``stop``, and where it begins."""
        size = len(self._samples)
        start = max(start, self.position - size, 0)
        stop = max(start, min(stop, self.position))
        first = start % size
        whole = self._samples[first : first + stop - start]
        return start, np.concatenate([whole, self._samples[: stop - start - len(whole)]])


@dataclass(frozen=True, eq=False)
class _Clip:
    """Samples of an event that are to be written."""

    heard: Heard
    samples: Array
    sample_rate: int
    path: Path


class Clips:
    """Saves a recording of each event.

    An event longer than the limit is saved when it has sounded so long: its beginning.

    Args:
        folder: for FLAC files; made if it does not exist.
        settings: margin and limits.
        sample_rate: Hz of the stream.
        delay_seconds: after which an event is known.
        teller: told of failures.
        on_saved: told of each closed event when its clip is there, or cannot be.

    Raises:
        OutputError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        settings: OutputSettings,
        sample_rate: int,
        delay_seconds: float,
        teller: Teller,
        on_saved: Callable[[Heard], None],
    ) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = [(p.stat().st_mtime, p, p.stat().st_size) for p in folder.iterdir() if _CLIP_NAME.fullmatch(p.name)]
        except OSError as error:
            raise OutputError(f"{folder}: cannot be used for clips ({error.strerror}); choose another") from None
        self._kept = deque((path, size) for _, path, size in sorted(found))
        self._bytes = sum(size for _, size in self._kept)
        self._folder, self._rate, self._teller, self._on_saved = folder, sample_rate, teller, on_saved
        self._margin, self._longest = settings.margin, settings.clip_seconds
        self._max_bytes = settings.clips_max_bytes
        # Up to 10 s come at once when the stream runs behind, and an event is told when they were heard.
        held = self._longest + 2 * self._margin + delay_seconds + 12
        self.ring = Ring(round(held * sample_rate))
        self._sounding: dict[int, Heard] = {}
        self._cut: set[int] = set()  # events that sound on and whose clip is cut
        self._saved: dict[int, Path] = {}  # the same, written
        self._waiting: list[Heard] = []  # closed ones whose margin has not yet come
        self.worker = Worker("clips", self._save, teller, _WAITING_CLIPS)

    def event(self, heard: Heard) -> None:
        """Take in what changed."""
        if heard.state != "close":
            self._sounding[heard.id] = heard
            return
        self._sounding.pop(heard.id, None)
        if heard.id not in self._cut:
            self._waiting.append(heard)
        else:
            self._cut.remove(heard.id)
            self._on_saved(dataclasses.replace(heard, clip=self._saved.pop(heard.id, None)))

    def tick(self, *, finished: bool = False) -> None:
        """Save what has all its samples now."""
        position = self.ring.position / self._rate
        for heard in list(self._sounding.values()):
            if heard.id not in self._cut and position >= heard.event.onset + self._longest + self._margin:
                self._cut.add(heard.id)
                self._hand_over(heard, heard.event.onset + self._longest)
        waiting, self._waiting = self._waiting, []
        for heard in waiting:
            end = min(heard.event.offset + self._margin, heard.event.onset + self._longest + self._margin)
            if finished or position >= end:
                self._hand_over(heard, end)
            else:
                self._waiting.append(heard)

    def _hand_over(self, heard: Heard, end: float) -> None:
        """Cut a clip and let it be written."""
        start, samples = self.ring.cut(
            math.floor((heard.event.onset - self._margin) * self._rate), math.ceil(end * self._rate)
        )
        began = f"{start / self._rate:013.3f}"
        if heard.onset_time is not None:
            began = heard.onset_time.strftime("%Y-%m-%dT%H-%M-%S.") + f"{heard.onset_time.microsecond // 1000:03}"
        label = re.sub(r"[^\w-]+", "_", heard.event.event_label)[:60]
        path = self._folder / f"{began}_{label}_{heard.id:06}.flac"
        if not self.worker.put(_Clip(heard, samples, self._rate, path)) and heard.state == "close":
            self._on_saved(heard)

    def _save(self, clip: _Clip) -> None:
        """Write one clip; in the worker's thread."""
        heard = clip.heard
        try:
            buffer = io.BytesIO()
            np.clip(clip.samples, -1, 1, out=clip.samples)
            soundfile.write(buffer, clip.samples, clip.sample_rate, format="FLAC")
            data = buffer.getvalue()
            path = clip.path
            number = 2
            while path.exists():  # of an earlier run without a clock
                path, number = clip.path.with_stem(f"{clip.path.stem}-{number}"), number + 1
            write_atomic(path, data)
            heard = dataclasses.replace(heard, clip=path)
            if heard.state != "close":
                self._saved[heard.id] = path
            self._keep(path, len(data))
        except soundfile.SoundFileError as error:
            raise OutputError(f"{clip.path}: cannot be written ({error})") from None
        finally:
            if heard.state == "close":
                self._on_saved(heard)

    def _keep(self, path: Path, size: int) -> None:
        """Count a clip and delete the oldest ones of too many."""
        self._kept.append((path, size))
        self._bytes += size
        while self._max_bytes is not None and self._bytes > self._max_bytes and self._kept:
            oldest, size = self._kept.popleft()
            self._bytes -= size
            try:
                oldest.unlink(missing_ok=True)
            except OSError as error:
                self._teller.rarely("quota", f"{oldest}: cannot be deleted ({error.strerror})")


# ---------------------------------------------------------------------------------------------------
# all of them


class Outputs:
    """Tells what was heard to everybody who is to know.

    Args:
        settings: what and to whom.
        source: name of the source.
        labels: of the model.
        show: takes lines for stdout.
        teller: told of failures.

    Raises:
        UsageError: a label, address or command that does not exist.
        OutputError: a file that cannot be written.
    """

    def __init__(
        self,
        settings: OutputSettings,
        source: str,
        labels: Sequence[str],
        show: Callable[[str], None],
        teller: Teller,
    ) -> None:
        for label in settings.labels:
            if label not in labels:
                raise UsageError(f"--label {label}: the model does not know it{nearest(label, labels)}; see htsat info")
        self._settings, self._source, self._labels = settings, source, labels
        self._show, self._teller = show, teller
        self._hooks = [Webhook(url) for url in settings.webhooks]
        commands = [Command(line, settings.command_seconds) for line in settings.commands]
        table = settings.out is not None and settings.out.suffix == ".tsv"
        self._as_table = table
        self._file = None
        if settings.out is not None:
            head = "\t".join(_COLUMNS) if table else None
            self._file = AppendFile(settings.out, teller, head=head, daily=settings.daily)
        self._workers = [Worker(hook.name, hook, teller) for hook in self._hooks]
        self._workers += [Worker(command.name, command, teller) for command in commands]
        self._clips: Clips | None = None
        self._told: dict[int, str] = {}  # events that were told to be sounding, and their labels
        self._width = min(30, max(map(len, labels), default=0))
        self.num_events = 0
        self._synced = time.monotonic()

    def start(self, message: dict[str, Any]) -> None:
        """Begin a stream; see ``htsat.live.start_message``."""
        if self._settings.clips is not None:
            self._clips = Clips(
                self._settings.clips,
                self._settings,
                message["sample_rate"],
                message["delay_seconds"],
                self._teller,
                self._deliver,
            )
        format = self._settings.format
        if format == "json":
            self._show(_json(message))
        elif format == "tsv":
            self._show("\t".join(_COLUMNS))
        else:
            self._show(f"{'time':<23}  {'onset':>10}  {'offset':>10}  {'label':<{self._width}}  probability")
        if not self._as_table:
            self._append(_json({**message, "source": self._source, "time": _iso(datetime.now(UTC).astimezone())}))

    def samples(self, block: Array) -> None:
        """Take samples that were heard, before what became known of them."""
        if self._clips is not None:
            self._clips.ring.add(block)

    def skip(self, num_samples: int) -> None:
        """Take in that samples are missing."""
        if self._clips is not None:
            self._clips.ring.skip(num_samples)

    def result(self, result: LiveResult, time_of: Callable[[float], datetime | None]) -> None:
        """Tell what became known.

        Args:
            result: of the stream.
            time_of: when a second of the stream was, by the clock.
        """
        settings = self._settings
        told: dict[tuple[int, str], list[Heard]] = {}
        for change in result.events:
            event = change.event
            if settings.labels and event.event_label not in settings.labels:
                continue
            if event.probability < settings.min_probability:
                continue
            times = time_of(event.onset), time_of(event.offset)
            changes = [Heard(change.id, change.state, event, self._source, *times)]
            if change.id not in self._told:  # it may have been too improbable when it was opened
                opened = dataclasses.replace(changes[0], state="open")
                changes = [opened, *changes] if change.state == "close" else [opened]
            told[change.id, change.state] = changes
            for heard in changes:
                self._event(heard)
        for message in live_messages(result, self._labels, top=settings.top, posteriors=settings.frames):
            messages = [message]
            if message["type"] == "event":
                messages = [heard.message() for heard in told.get((message["id"], message["state"]), ())]
            elif message["type"] == "gap":
                message["time"] = _iso(time_of(message["start"]))
                if not self._as_table:
                    self._append(_json(message))
            if settings.format == "json":
                for one in messages:
                    self._show(_json(one))

    def _event(self, heard: Heard) -> None:
        """Tell a change of an event to everybody but JSON on stdout."""
        if self._clips is not None:
            self._clips.event(heard)
        if heard.state != "close":
            self._told[heard.id] = heard.event.event_label
            return
        self._told.pop(heard.id, None)
        self.num_events += 1
        if self._settings.format == "tsv":
            self._show(heard.row())
        elif self._settings.format == "table":
            self._show(self._line(heard))
        self._append(heard.row() if self._as_table else _json(heard.message()))
        if self._clips is None:
            self._deliver(heard)

    def _line(self, heard: Heard) -> str:
        """Return a closed event as a line for people."""
        event = heard.event
        began = "-" if heard.onset_time is None else heard.onset_time.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        label = "".join(c if c.isprintable() else "?" for c in event.event_label)
        times = f"{began:<23}  {event.onset:10.3f}  {event.offset:10.3f}"
        return f"{times}  {label:<{self._width}}  {event.probability:.3f}"

    def _deliver(self, heard: Heard) -> None:
        """Hand a closed event to webhooks and commands."""
        for worker in self._workers:
            worker.put(heard)

    def _append(self, line: str) -> None:
        if self._file is not None:
            self._file.write(line)

    def tick(self) -> None:
        """Do what time brings: clips whose margin has come, lines that wait for the disk."""
        if self._clips is not None:
            self._clips.tick()
        now = time.monotonic()
        if self._file is not None and now - self._synced > 10:
            self._synced = now
            self._file.sync()

    def close(self, message: dict[str, Any] | None, seconds: float = 15.0) -> int:
        """End the stream and wait for what is still to be done.

        Args:
            message: the last one; None: the stream never began.
            seconds: to wait, at most.

        Returns:
            How many events or lines did not get where they should.
        """
        deadline = time.monotonic() + seconds
        if message is not None:
            if self._settings.format == "json":
                self._show(_json(message))
            if not self._as_table:
                self._append(_json(message))
        lost = 0
        if self._clips is not None:
            self._clips.tick(finished=True)
            lost += self._clips.worker.close(max(0.1, deadline - time.monotonic()))
        for hook in self._hooks:
            hook.stopping.set()
        for worker in self._workers:
            lost += worker.close(max(0.1, deadline - time.monotonic()))
        return lost + (self._file.close() if self._file is not None else 0)

    @property
    def sounding(self) -> tuple[str, ...]:
        """Labels of the events that sound now."""
        return tuple(self._told.values())

    @property
    def summary(self) -> list[str]:
        """What became of clips, webhooks and commands, one part of a sentence each."""
        workers: list[Worker[Any]] = [*([self._clips.worker] if self._clips is not None else []), *self._workers]
        return [f"{one.name}: {one.done} done, {one.failed + one.dropped} lost" for one in workers]
