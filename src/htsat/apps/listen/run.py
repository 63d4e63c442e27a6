"""Listening for weeks: from a source, through the network, to the outputs, and what to do when something breaks.

A thread reads the source into a bounded buffer, so that nothing is lost while the network works; what does not fit is
counted. The time line of the stream is whole: each of its seconds was heard or is part of a gap that is told.
"""

import ctypes
import math
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from htsat.apps.listen.outputs import Outputs, Teller
from htsat.apps.listen.sources import Connection, Lost, Source, SourceError
from htsat.errors import AudioError, HtsatError
from htsat.hearing import check_level
from htsat.live import DEFAULT_HOP, DEFAULT_LOOKAHEAD, LiveResult, PredictorStream, start_message
from htsat.predict import Predictor

Array = NDArray[np.float32]

#: glibc's name for the size from which on it asks the system for each block
_MMAP_THRESHOLD = -3
#: seconds between looks at what else is to be done
_TICK = 0.1
#: seconds between two states that are told
_STATUS_SECONDS = 0.5
#: seconds over which the speed is measured
_SPEED_SECONDS = 60.0
#: seconds that a source may take to close
_CLOSE_SECONDS = 5.0
#: seconds for what is in the buffer when the end is wanted
_REST_SECONDS = 5.0
#: readers that may hang in a source that gives no answer
_MAX_HANGING = 8
#: seconds after which a gap that goes on is told: in what comes, and where nothing comes, at first and later
_LONG_GAP, _LATER_GAP = 10.0, 60.0
#: seconds that gaps may wait for others right behind them
_GAP_SECONDS = 1.0
#: seconds of sound after which a source counts as well again
_WELL_SECONDS = 10.0


def now() -> float:
    """Return seconds of a clock that nobody sets and that goes on while the machine sleeps."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def return_freed_memory() -> None:
    """Let the C library give large blocks back to the system as soon as they are freed.

    By default it keeps them, and clips of all lengths leave holes that nothing fits into: some megabytes an hour, for
    weeks. Does nothing where the C library has no such switch.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 17)


@dataclass(frozen=True)
class ListenSettings:
    """How a stream is heard.

    Attributes:
        hop_seconds: see ``htsat.live``.
        lookahead_seconds: the same.
        stall_seconds: without samples after which a source counts as stalled; 0: never.
        retries: times that a source is opened again before giving up; None: for ever.
        buffer_seconds: of sound that may wait for the network.
        first_wait: seconds before a source is opened again; each further time twice as long.
        longest_wait: the limit of that.
        began: when the first sample was, where the source does not tell by being live.
    """

    hop_seconds: float = DEFAULT_HOP
    lookahead_seconds: float | None = DEFAULT_LOOKAHEAD
    stall_seconds: float = 8.0
    retries: int | None = None
    buffer_seconds: float = 30.0
    first_wait: float = 1.0
    longest_wait: float = 60.0
    began: datetime | None = None


@dataclass(frozen=True)
class Status:
    """How the listening goes.

    Attributes:
        position: seconds of the time line so far.
        heard: seconds of them that were heard.
        gaps: how many there were.
        gap_seconds: of them.
        level: dBFS of the last samples, root mean square; minus infinity: digital silence.
        factor: seconds of work for a second of sound, lately.
        delay: seconds that what is known lies behind; None: the source is not of now.
        buffered: seconds that wait to be heard.
        sounding: labels of the events that sound.
        connected: sound comes.
    """

    position: float
    heard: float
    gaps: int
    gap_seconds: float
    level: float
    factor: float
    delay: float | None
    buffered: float
    sounding: tuple[str, ...]
    connected: bool


@dataclass(frozen=True)
class Summary:
    """What a whole run was.

    Attributes:
        heard: samples.
        missing: samples in gaps.
        sample_rate: Hz; 0: nothing ever came.
        gaps: how many.
        events: how many were told.
        reopened: times that the source was opened again.
        lost: events and lines that did not get where they should.
        parts: what became of clips, webhooks and commands.
    """

    heard: int
    missing: int
    sample_rate: int
    gaps: int
    events: int
    reopened: int
    lost: int
    parts: list[str]


class Clock:
    """Where the time line of a stream lies in real time.

    Sound arrives late, never early: of the last minutes the earliest arrival is the truest. That follows sound cards
    whose second is no second.
    """

    def __init__(self) -> None:
        self._least: deque[tuple[int, float]] = deque(maxlen=10)

    def note(self, position: float, arrival: float) -> None:
        """Learn that the sample at ``position`` seconds arrived at ``arrival``."""
        minute, origin = int(arrival // 60), arrival - position
        if not self._least or self._least[-1][0] != minute:
            self._least.append((minute, origin))
        elif origin < self._least[-1][1]:
            self._least[-1] = minute, origin

    def restart(self) -> None:
        """Forget what was learnt: the source did not go on where it stopped."""
        self._least.clear()

    def at(self, position: float) -> float | None:
        """Return when a second of the stream was, as ``now`` tells time; None: nothing came yet."""
        return min(origin for _, origin in self._least) + position if self._least else None


@dataclass(frozen=True)
class _Opened:
    """A source is there."""

    sample_rate: int
    backlog_seconds: float


@dataclass(frozen=True, eq=False)
class _Piece:
    """Samples, and when they came."""

    samples: Array
    arrival: float


@dataclass(frozen=True)
class _Gone:
    """Samples that nobody will hear, and when the last of them came."""

    lost: Lost
    arrival: float


@dataclass(frozen=True)
class _Ended:
    """A source gives nothing more."""

    error: BaseException | None


class Reader:
    """Reads a source in a thread, into a buffer with a limit.

    Args:
        source: what to open and to read.
        limit_seconds: of sound in the buffer. A source that waits is read when there is room; of another one what comes
            meanwhile is lost, until half of the buffer is free.
    """

    def __init__(self, source: Source, limit_seconds: float) -> None:
        self._source, self._limit = source, limit_seconds
        self._condition = threading.Condition()
        self._items: deque[_Opened | _Piece | _Gone | _Ended] = deque()
        self._waiting = 0  # samples in the buffer
        self._lost = 0  # samples since it was full
        self._lost_arrival = 0.0
        self._rate = 1
        self._connection: Connection | None = None
        self._closed = False
        self.thread = threading.Thread(target=self._run, name="htsat-source", daemon=True)
        self.thread.start()

    @property
    def buffered_seconds(self) -> float:
        """Sound that waits to be heard."""
        return self._waiting / self._rate

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            connection = self._source.open()
            with self._condition:
                self._connection, self._rate = connection, connection.sample_rate
                closed = self._closed
            if closed:
                connection.close()
                return
            self._put(_Opened(connection.sample_rate, connection.backlog_seconds))
            while (found := connection.read()) is not None and not self._closed:
                self._take(found)
            connection.close()
        except BaseException as failure:  # whatever it is belongs to who listens
            error = failure
        self._put(_Ended(error))

    def _put(self, item: _Opened | _Piece | _Gone | _Ended) -> None:
        with self._condition:
            self._flush_lost()
            self._items.append(item)
            self._condition.notify_all()

    def _take(self, found: "Array | Lost") -> None:
        """Put what was read into the buffer, if there is room."""
        arrival = now()
        if isinstance(found, Lost):
            self._put(_Gone(found, arrival))
            return
        limit = self._limit * self._rate
        with self._condition:
            if self._source.waits:
                # One block always fits, however long it is.
                self._condition.wait_for(lambda: self._closed or self._waiting + len(found) <= limit or not self._items)
            elif self._waiting + len(found) > (limit / 2 if self._lost else limit):
                self._lost += len(found)
                self._lost_arrival = arrival
                return
            self._flush_lost()
            self._items.append(_Piece(found, arrival))
            self._waiting += len(found)
            self._condition.notify_all()

    def _flush_lost(self) -> None:
        if self._lost:
            lost = Lost(self._lost, "listening is slower than the sound comes")
            self._items.append(_Gone(lost, self._lost_arrival))
            self._lost = 0

    def get(self, timeout: float) -> "_Opened | _Piece | _Gone | _Ended | None":
        """Return the next item; None: there is none yet."""
        with self._condition:
            if not self._items:
                self._flush_lost()
            self._condition.wait_for(lambda: bool(self._items), timeout)
            if not self._items:
                return None
            item = self._items.popleft()
            if isinstance(item, _Piece):
                self._waiting -= len(item.samples)
            self._condition.notify_all()
            return item

    def close(self) -> None:
        """Stop reading; the thread ends as soon as the source lets it."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
            connection = self._connection
        if connection is not None:
            # A sound card that hangs must not hang the listening.
            thread = threading.Thread(target=connection.close, name="htsat-close", daemon=True)
            thread.start()
            thread.join(_CLOSE_SECONDS)


class Listener:
    """Listens to a source until it ends or is told to stop.

    Args:
        predictor: model and settings.
        source: what to listen to.
        outputs: who is told.
        settings: how.
        teller: takes messages.
        model: name that messages give the model.
        on_status: told about twice a second how it goes.
    """

    def __init__(
        self,
        predictor: Predictor,
        source: Source,
        outputs: Outputs,
        settings: ListenSettings,
        teller: Teller,
        *,
        model: str = "default",
        on_status: Callable[[Status], None] | None = None,
    ) -> None:
        self._predictor, self._source, self._outputs = predictor, source, outputs
        self._settings, self._teller, self._model = settings, teller, model
        self._on_status = on_status
        self._stopped = threading.Event()
        self._clock = Clock()
        self._stream: PredictorStream | None = None
        self._rate = 0
        self._heard = self._missing = self._gaps = 0  # samples, samples, gaps
        self._pending, self._reason = 0, ""  # samples that are missing and not yet told, and why
        self._pending_since = 0.0
        self._known = 0.0  # seconds of the time line of which everything is known
        self._reader: Reader | None = None
        self._hanging: list[threading.Thread] = []
        self._opened_at = now()
        self._open_again: float | None = None
        self._failures = self._reopened = 0
        self._well = 0  # samples since the source was opened
        self._last: float | None = None  # until when the time line is told
        self._silences = 0  # gaps since something came
        self._stalled, self._silent = False, True  # nothing comes too long; nothing came yet, or since then
        self._returned = False  # sound came again and the clock does not know yet
        self._power, self._powered = 0.0, 0  # sum of squares, and samples
        self._level = -math.inf
        self._work: deque[tuple[float, float, float]] = deque(maxlen=2000)  # when, seconds of work, seconds of sound
        self._status_due = 0.0

    def stop(self) -> None:
        """Let ``run`` come to its end; from any thread or a signal handler."""
        self._stopped.set()

    def run(self) -> Summary:
        """Listen.

        Raises:
            UsageError: the source does not fit its settings.
            AudioError: the source cannot be read any more. Everything was told and closed before.
        """
        failure: HtsatError | None = None
        try:
            try:
                self._open()
                while not self._stopped.is_set() and self._step():
                    self._tick()
                self._hear_rest()
            except HtsatError as error:
                failure = error
            self._end_reader()
            summary = self._finish()
        except BaseException:  # stdout is gone, memory is used up, or nobody wants to wait
            self._end_reader()
            self._outputs.close(None, seconds=2.0)
            raise
        if failure is not None:
            raise failure
        return summary

    def _hear_rest(self) -> None:
        """Listen to what came before the end was wanted."""
        if self._reader is None:
            return
        reader = self._reader
        self._end_reader()
        deadline = time.monotonic() + _REST_SECONDS
        while isinstance(item := reader.get(0), (_Opened, _Piece, _Gone)):
            if isinstance(item, _Piece) and time.monotonic() > deadline:
                self._miss(len(item.samples), "there was no time left to listen to it")
            else:
                self._take(item)

    # -- the source --

    def _open(self) -> None:
        self._open_again = None
        self._opened_at, self._well = now(), 0
        self._stalled, self._silent = False, True
        self._reader = Reader(self._source, self._settings.buffer_seconds)

    def _close_reader(self) -> None:
        """Leave the reader to itself; one that hangs is remembered."""
        assert self._reader is not None
        reader, self._reader = self._reader, None
        reader.close()
        self._hanging = [thread for thread in (*self._hanging, reader.thread) if thread.is_alive()]

    def _end_reader(self) -> None:
        if self._reader is not None:
            thread = self._reader.thread
            self._close_reader()
            thread.join(1.0)  # whoever reads a file closes it

    def _try_again(self, why: str) -> None:
        """Have the source opened again, later each time."""
        settings = self._settings
        if self._reader is not None:
            self._close_reader()
        if self._well > _WELL_SECONDS * max(1, self._rate):
            self._failures = 0
        self._failures += 1
        if settings.retries is not None and self._failures > settings.retries:
            raise SourceError(f"{why}; gave up after {settings.retries} retries")
        if len(self._hanging) > _MAX_HANGING:
            raise SourceError(f"{why}; {len(self._hanging)} tries hang in the source, start again")
        wait = min(settings.longest_wait, settings.first_wait * 2.0 ** min(self._failures - 1, 30))
        wait *= random.uniform(0.5, 1)  # many boxes do not come back at once
        self._open_again = now() + wait
        self._teller.tell(f"{why}; trying again in {wait:.1f} s")

    def _step(self) -> bool:
        """Do the next thing; return whether there is more to come."""
        if self._reader is None:
            assert self._open_again is not None
            self._pass_time()
            wait = self._open_again - now()
            if wait > 0:
                self._stopped.wait(min(wait, _TICK))
                return True
            self._reopened += 1
            self._open()
            return True
        item = self._reader.get(_TICK)
        if item is None:
            self._look_for_stall()
        elif not isinstance(item, _Ended):
            self._take(item)
        elif not self._source.reopens or self._is_final(item.error):
            if item.error is not None:
                raise item.error
            return False
        else:
            self._try_again(str(item.error) if item.error is not None else f"{self._source.name}: ended")
        return True

    def _is_final(self, error: BaseException | None) -> bool:
        """Whether trying again cannot help: an error of ours, or settings that never fitted."""
        if error is None or isinstance(error, SourceError):
            return False
        return not isinstance(error, HtsatError) or self._stream is None

    def _take(self, item: _Opened | _Piece | _Gone) -> None:
        """Take what the source gave."""
        if isinstance(item, _Piece):
            self._hear(item)
        elif isinstance(item, _Opened):
            self._begin(item)
        else:
            self._arrive(item.lost.num_samples, item.arrival)
            self._miss(item.lost.num_samples, item.lost.reason)

    def _begin(self, opened: _Opened) -> None:
        """Begin the stream, or go on with it behind a source that was opened again."""
        if self._stream is None:
            settings = self._settings
            self._rate = opened.sample_rate
            self._stream = self._predictor.stream(
                opened.sample_rate,
                hop_seconds=settings.hop_seconds,
                lookahead_seconds=settings.lookahead_seconds,
            )
            self._clock.note(opened.backlog_seconds, now())
            self._outputs.start(start_message(self._stream.state, self._model))
        elif opened.sample_rate != self._rate:
            raise SourceError(
                f"{self._source.name}: gives {opened.sample_rate} Hz now and gave {self._rate} Hz; start again"
            )

    def _look_for_stall(self) -> None:
        """Nothing came: see whether that is too long."""
        limit = self._settings.stall_seconds
        if not limit:
            return
        since = max(self._opened_at, self._last or 0.0)
        if self._stalled:
            self._pass_time()
        elif now() - since >= limit:
            self._stalled = self._silent = True
            why = f"{self._source.name}: no samples for {now() - since:.1f} s"
            self._pass_time()
            if self._source.reopens:
                self._try_again(why)
            else:
                self._teller.tell(f"{why}; waiting for more")

    def _pass_time(self) -> None:
        """Count the time in which nothing came as a gap, if the source's time goes on."""
        if self._source.clocked and self._last is not None:
            due = now()
            least = _LATER_GAP if self._silences else self._settings.stall_seconds or _LONG_GAP
            if due - self._last >= least:
                self._miss(round((due - self._last) * self._rate), "nothing came")
                self._last = due
                self._silences += 1
                self._tell_gap()

    # -- the time line --

    def _arrive(self, num_samples: int, arrival: float) -> None:
        """Note that samples came, heard or lost, and what is missing before them."""
        last, self._last = self._last, arrival
        if self._silent and last is not None:
            if self._source.clocked:
                missing = arrival - num_samples / self._rate - last
                self._miss(max(1, round(missing * self._rate)), "nothing came")
            self._teller.tell(f"{self._source.name}: sound comes again")
            self._returned = True
        self._silent = self._stalled = False
        self._silences = 0

    def _hear(self, piece: _Piece) -> None:
        """Listen to samples."""
        assert self._stream is not None
        samples = piece.samples
        self._arrive(len(samples), piece.arrival)
        self._well += len(samples)
        try:
            check_level(samples, self._source.name, self._position)
        except AudioError:
            self._miss(len(samples), "values that are no samples")
            return
        self._tell_gap()
        began = time.monotonic()
        results = self._stream.feed(samples)
        self._heard += len(samples)
        self._outputs.samples(samples)
        if self._returned:
            self._clock.restart()
            self._returned = False
        self._clock.note(self._position, piece.arrival)
        self._power += float(np.dot(samples, samples))
        self._powered += len(samples)
        self._work.append((began, time.monotonic() - began, len(samples) / self._rate))
        self._tell(results)

    def _miss(self, num_samples: int, reason: str) -> None:
        """Note that samples are missing; they are told together with those that follow."""
        if self._stream is None:
            return
        if not num_samples:
            self._teller.tell(f"{self._source.name}: {reason}")
        if not self._pending:
            self._pending_since = time.monotonic()
        self._pending += num_samples
        self._reason = reason
        if self._pending >= _LONG_GAP * self._rate:
            self._tell_gap()

    def _tell_gap(self) -> None:
        """Go on behind what is missing."""
        if not self._pending or self._stream is None:
            return
        num_samples, self._pending = self._pending, 0
        at, seconds = self._position, num_samples / self._rate
        results = self._stream.gap(seconds)
        self._missing += num_samples
        self._gaps += 1
        self._outputs.skip(num_samples)
        self._teller.rarely(
            f"gap {self._reason}", f"{self._source.name}: {seconds:.3f} s are missing at {at:.1f} s: {self._reason}"
        )
        self._tell(results)

    @property
    def _position(self) -> float:
        """Seconds of the time line so far."""
        return (self._heard + self._missing) / self._rate if self._rate else 0.0

    def _tell(self, results: list[LiveResult]) -> None:
        for result in results:
            self._known = max(self._known, result.end)
            self._outputs.result(result, self._time_of)

    def _time_of(self, position: float) -> datetime | None:
        """Return when a second of the stream was."""
        if self._settings.began is not None:
            return self._settings.began + timedelta(seconds=position)
        at = self._clock.at(position) if self._source.dated else None
        return None if at is None else datetime.fromtimestamp(time.time() - now() + at).astimezone()

    # -- the rest --

    def _tick(self) -> None:
        moment = time.monotonic()
        if self._pending and moment - self._pending_since > _GAP_SECONDS:
            self._tell_gap()
        self._outputs.tick()
        if self._on_status is not None and moment >= self._status_due:
            self._status_due = moment + _STATUS_SECONDS
            self._on_status(self._status())

    def _status(self) -> Status:
        if self._powered:
            mean = self._power / self._powered
            self._level = 10 * math.log10(mean) if mean > 0 else -math.inf
            self._power, self._powered = 0.0, 0
        while self._work and self._work[0][0] < time.monotonic() - _SPEED_SECONDS:
            self._work.popleft()
        sound = sum(seconds for _, _, seconds in self._work)
        at = self._clock.at(self._known) if self._source.dated else None
        return Status(
            position=self._position,
            heard=self._heard / self._rate if self._rate else 0.0,
            gaps=self._gaps,
            gap_seconds=self._missing / self._rate if self._rate else 0.0,
            level=self._level,
            factor=sum(work for _, work, _ in self._work) / sound if sound else 0.0,
            delay=None if at is None else now() - at,
            buffered=0.0 if self._reader is None else self._reader.buffered_seconds,
            sounding=self._outputs.sounding,
            connected=self._reader is not None and not self._stalled and self._well > 0,
        )

    def _finish(self) -> Summary:
        """Close events and outputs."""
        message = None
        if self._stream is not None:
            self._tell_gap()
            self._tell(self._stream.finish())
            message = {"type": "end", "duration": self._position}
        lost = self._outputs.close(message)
        return Summary(
            self._heard, self._missing, self._rate, self._gaps, self._outputs.num_events, self._reopened, lost,
            self._outputs.summary,
        )  # fmt: skip
