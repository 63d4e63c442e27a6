"""A simulated day of ``htsat listen``, its delay at real time, and how many streams two cores carry.

    python benchmarks/live_day.py [day] [delay] [streams] [--hours 24] [--hop 5] [--seconds 120] [--model NAME]

*day*: sound of a day as fast as it is heard, through the very classes that the command uses. Faint noise in which the
examples of this repository sound, and at random times a source that breaks off, stalls, loses samples, gives garbage
(NaN, infinity, absurd levels), silence, loud noise, or more than can be taken. The clock is that of the simulation.
Checked: every sample that was given was heard or is part of a counted gap, the time line is as long as the simulated
day, each event was opened and closed once, lies in no gap and is in the file of events, clips keep their limit, memory
does not grow.

*delay*: pieces of the examples that end abruptly, silence between them, at real time. Measured: from the end of a sound
in the source, and from the end that is told, to the message that closes its event, and to the first one that names the
final end of the event.

*streams*: processor time for a second of a stream at 48 kHz with a hop of 1 s, and the streams that two threads carry.

Exits with 1 if a check fails.
"""

import argparse
import gc
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import soundfile
import soxr

import htsat.apps.listen.run as listen_run
from htsat.apps.listen.outputs import Outputs, OutputSettings, Teller
from htsat.apps.listen.run import Listener, ListenSettings
from htsat.apps.listen.sources import BLOCK_SECONDS, Lost, SourceError
from htsat.predict import Predictor

EXAMPLES = Path(__file__).parents[1] / "examples"
RATE = 48_000
#: example, a label that is found in it, and the seconds in which it sounds all the time
PIECES = (
    ("clock.wav", "clock_tick", 0.0, 3.0),
    ("street.ogg", "speech", 1.6, 5.2),
    ("street.ogg", "helicopter", 7.0, 13.0),
    ("helicopter_over_fire.ogg", "crackling_fire", 1.0, 14.0),
    ("rain_and_clock.ogg", "rain", 5.0, 10.0),
)
FAULTS = ("end", "error", "stall", "lost", "garbage", "silence", "noise", "burst")


def read_piece(name: str, start: float, stop: float) -> np.ndarray:
    values, rate = soundfile.read(EXAMPLES / name, dtype="float32", always_2d=True)
    samples = soxr.resample(values.mean(axis=1), rate, RATE, quality="HQ")
    return samples[round(start * RATE) : round(stop * RATE)].astype(np.float32)


class SimulatedClock:
    """Goes on by the sound that is given and, while nothing is given, by a second each time that somebody looks."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.idle = False
        self.lock = threading.Lock()

    def __call__(self) -> float:
        with self.lock:
            self.seconds += self.idle
            return self.seconds

    def pass_by(self, seconds: float, idle: bool = False) -> float:
        with self.lock:
            self.seconds += seconds
            self.idle = idle
            return self.seconds


class Day:
    """A source that breaks in every way, and counts what it gave."""

    name = "simulation"
    clocked, reopens, dated = True, True, True

    def __init__(self, hours: float, seed: int, clock: SimulatedClock, faults: int) -> None:
        self.waits = True
        self.clock = clock
        self.rng = np.random.default_rng(seed)
        # All that is ever given is made here, so that memory that grows later is not the simulation's.
        self.noise = (1e-3 * self.rng.standard_normal(60 * RATE)).astype(np.float32)
        pieces = [(label, read_piece(name, start, stop)) for name, label, start, stop in PIECES]
        self.pieces = [(label, piece + self.noise[: len(piece)]) for label, piece in pieces]
        self.silence = np.zeros(5 * RATE, np.float32)
        self.loud = self.rng.uniform(-1, 1, 5 * RATE).astype(np.float32)
        self.nonsense = [np.full(5 * RATE, value, np.float32) for value in (np.nan, np.inf, -np.inf, 1e30)]
        self.end = round(hours * 3600 * RATE)
        self.given = self.lost = self.garbage = 0  # samples
        self.began: float | None = None
        self.last = 0.0
        self.counts: Counter[str] = Counter()
        self.sounds: list[tuple[str, float, float]] = []  # label and simulated time of the pieces that sounded
        self.due = sorted(self.rng.uniform(0.02, 0.98, faults) * self.end)
        self.done = threading.Event()
        self.on_over: Callable[[], None] = self.done.set
        self.script = self._script()
        self.lock = threading.Lock()
        self.closed = threading.Event()

    def open(self) -> "Connection":
        if self.done.is_set():
            raise SourceError("the day is over")
        self.clock.pass_by(float(self.rng.uniform(0, 5)))  # connecting takes time
        return Connection(self)

    def next(self, closed: threading.Event) -> "np.ndarray | Lost | None":
        with self.lock:
            self.closed = closed
            item = None if closed.is_set() else next(self.script, "over")
        if isinstance(item, str) and item == "over":
            self.done.set()
            self.on_over()
        if isinstance(item, Exception):
            raise item
        return item if not isinstance(item, str) else None

    def _give(self, samples: np.ndarray, block: int = RATE // 4):
        """Give samples block by block; the clock goes on with them."""
        for start in range(0, len(samples), block):
            part = samples[start : start + block]
            self.last = self.clock.pass_by(len(part) / RATE)
            if self.began is None:
                self.began = self.last - len(part) / RATE
            self.given += len(part)
            yield part.copy()  # as real sources do

    def _script(self):
        while self.given < self.end:
            # some faint noise, and a sound in it
            at = int(self.rng.integers(0, len(self.noise) // 2))
            yield from self._give(self.noise[at : at + int(self.rng.integers(5, 30) * RATE)])
            label, piece = self.pieces[self.rng.integers(len(self.pieces))]
            began = self.clock.seconds
            yield from self._give(piece)
            self.sounds.append((label, began, self.clock.seconds))
            while self.due and self.given >= self.due[0]:
                self.due.pop(0)
                kind = FAULTS[self.counts.total() % len(FAULTS)]
                self.counts[kind] += 1
                yield from self._fault(kind)

    def _fault(self, kind: str):
        size = int(self.rng.integers(1, 5 * RATE))
        if kind == "end":
            self.clock.pass_by(0.0, idle=True)
            yield "end"
        elif kind == "error":
            self.clock.pass_by(0.0, idle=True)
            yield SourceError("simulation: the connection broke off")
        elif kind == "stall":
            self.clock.pass_by(0.0, idle=True)
            self.closed.wait()  # until somebody loses patience
            yield "end"
        elif kind == "lost":
            self.clock.pass_by(size / RATE)
            self.lost += size
            yield Lost(size, "the simulation took them")
        elif kind == "garbage":
            self.garbage += size
            yield from self._give(self.nonsense[self.rng.integers(4)][:size])
        elif kind == "silence":
            for _ in range(10):
                yield from self._give(self.silence[:size])
        elif kind == "noise":
            yield from self._give(self.loud[:size])
        else:  # two minutes at once, which nobody can take
            self.waits = False
            yield from self._give(self.noise)
            yield from self._give(self.noise)
            self.waits = True


class Connection:
    """What opening the simulation gives."""

    sample_rate, backlog_seconds = RATE, 0.0

    def __init__(self, day: Day) -> None:
        self.day, self.closed = day, threading.Event()

    def read(self) -> "np.ndarray | Lost | None":
        return self.day.next(self.closed)

    def close(self) -> None:
        self.closed.set()


def slope(seconds: list[float], values: list[float]) -> float:
    """Growth in an hour."""
    return float(np.polyfit(np.array(seconds) / 3600, values, 1)[0]) if len(values) > 2 else 0.0


def simulate_day(predictor: Predictor, hours: float, hop: float, faults: int, seed: int, folder: Path) -> dict:
    listen_run.return_freed_memory()  # as the command does
    clock = SimulatedClock()
    listen_run.now = clock
    source = Day(hours, seed, clock, faults)
    process = psutil.Process()
    lines, notes, memory, problems = [], [], [], []
    closed: list[tuple[str, float, float]] = []
    states: dict[int, str] = {}
    gaps: list[tuple[float, float]] = []
    most_open = 0

    def show(line: str) -> None:
        nonlocal most_open
        message = json.loads(line)
        lines.append(message["type"])
        if message["type"] == "event":
            number, state = message["id"], message["state"]
            if (state == "open") != (number not in states) or states.get(number) == "close":
                problems.append(f"event {number}: {states.get(number)} and then {state}")
            states[number] = state
            if state == "close":
                closed.append((message["event_label"], message["onset"], message["offset"]))
        elif message["type"] == "gap":
            gaps.append((message["start"], message["start"] + message["duration"]))

    def on_status(status: listen_run.Status) -> None:
        if status.position >= 1800 * len(memory):
            gc.collect()
            memory.append((status.position, process.memory_info().rss))

    teller = Teller(notes.append)
    output = OutputSettings("json", out=folder / "events.jsonl", clips=folder / "clips", clips_max_bytes=20_000_000)
    outputs = Outputs(output, source.name, predictor.labels, show, teller)
    settings = ListenSettings(hop_seconds=hop, first_wait=0.5, longest_wait=10.0)
    listener = Listener(predictor, source, outputs, settings, teller, on_status=on_status)
    source.on_over = listener.stop
    began, processor = time.monotonic(), time.process_time()
    summary = listener.run()
    wall, processor = time.monotonic() - began, time.process_time() - processor

    written = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    if sum(message["type"] == "event" for message in written) != len(closed):
        problems.append("not every event is in the file")
    kept = sum(path.stat().st_size for path in (folder / "clips").iterdir())
    if summary.lost > 0.01 * len(closed) or kept > 20_000_000:
        problems.append(f"{summary.lost} clips were lost, {kept} bytes of them kept")

    # What was given was heard or is counted; what was lost by the source and by the clock is counted too.
    start = source.began or 0.0
    silent = round((source.last - start) * RATE) - source.given - source.lost
    counted = summary.missing - source.lost - source.garbage
    dropped = source.given - source.garbage - summary.heard
    line = (summary.heard + summary.missing) / RATE
    if abs(line - (source.last - start)) > 2.0 + faults * 1e-3:
        problems.append(f"the time line has {line:.3f} s, the simulated day {source.last - start:.3f} s")
    if dropped < 0 or (dropped > 0 and not source.counts["burst"]):
        problems.append(f"{dropped} samples of those given are missing")
    if abs(sum(stop - begin for begin, stop in gaps) * RATE - summary.missing) > 1:
        problems.append("the gaps that were told are not those that were counted")
    if set(states.values()) - {"close"}:
        problems.append("events were left open")
    for label, onset, offset in closed:
        inside = [gap for gap in gaps if gap[0] < offset - 1e-4 and gap[1] > onset + 1e-4]
        if inside or not onset < offset:
            problems.append(f"{label} {onset:.3f} to {offset:.3f} lies in the gap {inside}")
    by_label: dict[str, list[tuple[float, float]]] = {}
    for label, onset, offset in closed:
        by_label.setdefault(label, []).append((onset, offset))
    whole, found = Counter[str](), Counter[str]()
    for label, from_, to in source.sounds:
        from_, to = from_ - start, to - start
        if any(begin < to and stop > from_ for begin, stop in gaps):
            continue
        whole[label] += 1
        found[label] += any(onset < to and offset > from_ for onset, offset in by_label.get(label, []))
    warm = [value for value in memory if value[0] >= min(2.0, hours / 4) * 3600]
    figures = {
        "hours": line / 3600,
        "minutes needed": wall / 60,
        "times real time": line / wall,
        "processor seconds per stream second": processor / line,
        "faults": dict(source.counts),
        "opened again": summary.reopened,
        "samples given": source.given,
        "samples heard": summary.heard,
        "samples in gaps": summary.missing,
        "of them lost by the source": source.lost,
        "of them garbage": source.garbage,
        "of them dropped (too fast)": dropped,
        "of them silence of the source": counted - dropped,
        "difference to the clock (samples)": counted - dropped - silent,
        "gaps": summary.gaps,
        "events": len(closed),
        "sounds between gaps": dict(whole),
        "of them found": dict(found),
        "memory by the hour (MB)": [round(value / 1e6) for _, value in memory[::2]],
        "largest minus smallest (MB)": (max(v for _, v in warm) - min(v for _, v in warm)) / 1e6 if warm else None,
        "slope (MB per hour)": slope([t for t, _ in warm], [v / 1e6 for _, v in warm]),
        "messages": dict(Counter(lines)),
        "clips": summary.parts[0],
        "notes": len(notes),
    }
    if warm and (figures["largest minus smallest (MB)"] or 0) > 10:
        problems.append("memory grew by more than 10 MB")
    if whole and found.total() < 0.9 * whole.total():
        problems.append(f"only {found.total()} of {whole.total()} sounds were found")
    return {**figures, "problems": problems}


class Paced:
    """Samples at real time."""

    name, waits, clocked, reopens, dated = "paced", False, True, False, True
    sample_rate, backlog_seconds = RATE, 0.0

    def __init__(self, samples: np.ndarray) -> None:
        self.samples, self.at = samples, 0
        self.began = 0.0

    def open(self) -> "Paced":
        self.began = listen_run.now()
        return self

    def read(self) -> "np.ndarray | None":
        part = self.samples[self.at : self.at + round(BLOCK_SECONDS * RATE)]
        self.at += len(part)
        time.sleep(max(0.0, self.began + self.at / RATE - listen_run.now()))
        return part if len(part) else None

    def close(self) -> None:
        """Nothing to free."""


def measure_delay(predictor: Predictor, seconds: float, hop: float, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    parts, ends, at = [np.zeros(2 * RATE, np.float32)], [], 2.0
    pieces = [(label, read_piece(name, start, min(stop, start + 3))) for name, label, start, stop in PIECES]
    while at < seconds:
        label, piece = pieces[len(ends) % len(pieces)]
        silence = np.zeros(round(rng.uniform(3, 4) * RATE), np.float32)
        parts += [piece, silence]
        at += len(piece) / RATE
        ends.append((label, at))
        at += len(silence) / RATE
    source = Paced(np.concatenate(parts))
    changes: dict[int, list[tuple[float, dict]]] = {}
    start: dict = {}

    def show(line: str) -> None:
        message = json.loads(line)
        if message["type"] == "event":
            changes.setdefault(message["id"], []).append((listen_run.now() - source.began, message))
        elif message["type"] == "start":
            start.update(message)

    teller = Teller(lambda _: None)
    outputs = Outputs(OutputSettings(format="json"), source.name, predictor.labels, show, teller)
    Listener(predictor, source, outputs, ListenSettings(hop_seconds=hop), teller).run()
    closing, naming, errors = [], [], []
    for events in changes.values():
        told, last = events[-1]
        own = [end for label, end in ends if label == last["event_label"]]
        end = own[int(np.argmin(np.abs(np.array(own) - last["offset"])))] if own else -1.0
        if abs(end - last["offset"]) > 0.5:
            continue
        closing.append(told - end)
        errors.append(last["offset"] - end)
        naming.append(min(when for when, one in events if one["offset"] == last["offset"]) - end)

    def percentiles(values: list[float]) -> dict:
        return {name: round(float(np.percentile(values, q)), 3) for name, q in (("p50", 50), ("p99", 99), ("max", 100))}

    if not closing:
        return {"problems": ["no event ended where a sound did"]}
    return {
        "sounds": len(ends),
        "events with a known end": len(closing),
        "hop (s)": start["hop_seconds"],
        "delay promised (s)": start["delay_seconds"],
        "end of the sound to the closing message (s)": percentiles(closing),
        "end that is told to the closing message (s)": percentiles(
            [c - e for c, e in zip(closing, errors, strict=True)]
        ),
        "end of the sound to the first message with its final end (s)": percentiles(naming),
        "end that is told minus end of the sound (s)": percentiles(errors),
        "problems": [],
    }


def measure_streams(model: str, seconds: float, hop: float) -> dict:
    """Two threads with a network each, as many seconds of a stream as they can."""
    samples = np.concatenate([read_piece(name, start, stop) for name, _, start, stop in PIECES])
    samples = np.resize(samples, round(seconds * RATE))
    block = round(BLOCK_SECONDS * RATE)

    def listen() -> None:
        stream = Predictor(model, threads=1).stream(RATE, hop_seconds=hop)
        ready.wait()
        for start in range(0, len(samples), block):
            stream.feed(samples[start : start + block])

    ready = threading.Barrier(3)
    threads = [threading.Thread(target=listen) for _ in range(2)]
    for thread in threads:
        thread.start()
    ready.wait()
    began, processor = time.monotonic(), time.process_time()
    for thread in threads:
        thread.join()
    wall, processor = time.monotonic() - began, time.process_time() - processor
    return {
        "hop (s)": hop,
        "processor seconds per stream second": processor / (2 * seconds),
        "streams that two cores carry, measured with two threads": 2 * seconds / wall,
        "problems": [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="day, delay, streams (default: all)")
    parser.add_argument("--hours", type=float, default=24.0, help="of the day")
    parser.add_argument("--hop", type=float, default=5.0, help="seconds, of the day (delay and streams: 1)")
    parser.add_argument("--faults", type=int, default=120, help="of the day")
    parser.add_argument("--seconds", type=float, default=120.0, help="of delay and streams")
    parser.add_argument("--model", default="default")
    parser.add_argument("--threads", type=int, default=1, help="of the network, in day and delay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    what = options.what or ["delay", "streams", "day"]
    if unknown := set(what) - {"day", "delay", "streams"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected day, delay or streams")
    results = {}
    for name in sorted(what, key=["delay", "streams", "day"].index):  # the day has a clock of its own
        if name == "streams":
            results[name] = measure_streams(options.model, options.seconds / 2, 1.0)
        else:
            predictor = Predictor(options.model, threads=options.threads)
            if name == "delay":
                results[name] = measure_delay(predictor, options.seconds, 1.0, options.seed)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    results[name] = simulate_day(
                        predictor, options.hours, options.hop, options.faults, options.seed, Path(folder)
                    )
        print(f"\n{name}")
        for key, value in results[name].items():
            print(f"  {key:<62} {round(value, 4) if isinstance(value, float) else value}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(any(result["problems"] for result in results.values()))


if __name__ == "__main__":
    main()
