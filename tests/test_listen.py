"""``htsat listen``: what is heard is what ``Predictor`` hears, every second is accounted for, and nothing stops it."""

import contextlib
import dataclasses
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import RATE, TOKEN, sound, write_sound
from hypothesis import given, settings
from hypothesis import strategies as st

import htsat.apps.listen.outputs as outputs_module
import htsat.apps.listen.run as run_module
from htsat.apps.listen.outputs import AppendFile, Clips, Command, Heard, Outputs, OutputSettings, Ring, Teller, Webhook
from htsat.apps.listen.run import Clock, Listener, ListenSettings, Reader
from htsat.apps.listen.sources import Lost, SourceError, open_source
from htsat.errors import AudioError, OutputError, UsageError
from htsat.events import Event
from htsat.formats import read_events
from htsat.live import live_config

EVENTS = [("low", 3 * TOKEN, 8 * TOKEN), ("high", 20 * TOKEN, 24 * TOKEN), ("low", 40 * TOKEN, 42 * TOKEN)]
SECONDS = 50 * TOKEN


class Script:
    """A source that does what a list says: samples, losses, errors, seconds of silence, and ``end``.

    Each list is one connection; a source that is opened more often repeats the last one.
    """

    def __init__(self, *connections, waits=True, clocked=False, reopens=False, dated=False, rate=RATE):
        self.name = "script"
        self.waits, self.clocked, self.reopens, self.dated = waits, clocked, reopens, dated
        self.connections, self.rate = connections, rate
        self.opened = 0

    def open(self):
        self.opened += 1
        steps = self.connections[min(self.opened, len(self.connections)) - 1]
        if isinstance(steps, Exception):
            raise steps
        return Playing(steps, self.rate)


class Playing:
    backlog_seconds = 0.0

    def __init__(self, steps, rate):
        self.sample_rate = rate
        self.steps, self.closed = iter(steps), threading.Event()

    def read(self):
        for step in self.steps:
            if isinstance(step, (int, float)):
                self.closed.wait(step)
                if self.closed.is_set():
                    return None
            elif isinstance(step, Exception):
                raise step
            elif callable(step):
                step()
            else:
                return step
        return None

    def close(self):
        self.closed.set()


class Told:
    """Collects what is told."""

    def __init__(self):
        self.lines: list[str] = []
        self.notes: list[str] = []
        self.states: list = []

    @property
    def messages(self):
        return [json.loads(line) for line in self.lines]

    def of(self, kind):
        return [message for message in self.messages if message["type"] == kind]

    @property
    def closed(self):
        return [message for message in self.of("event") if message["state"] == "close"]


def listener(predictor, source, told, output=None, **settings):
    teller = Teller(told.notes.append)
    output = output or OutputSettings(format="json")
    outputs = Outputs(output, source.name, predictor.labels, told.lines.append, teller)
    settings = {"stall_seconds": 0.3, "first_wait": 0.05, "longest_wait": 0.2, **settings}
    return Listener(predictor, source, outputs, ListenSettings(**settings), teller, on_status=told.states.append)


def listen_to(predictor, source, output=None, **settings):
    told = Told()
    summary = listener(predictor, source, told, output, **settings).run()
    return summary, told


def expected(predictor, waveform, start=0.0):
    """The events that ``Predictor`` finds with the same settings."""
    config = predictor.config
    predictor.config = live_config(config, 1.0, 0.2)
    try:
        events = predictor.predict((waveform, RATE), spectrogram=False).events
    finally:
        predictor.config = config
    return [(e.event_label, e.onset + start, e.offset + start, e.probability) for e in events]


def found(messages):
    keys = ("event_label", "onset", "offset", "probability")
    return sorted((tuple(message[key] for key in keys) for message in messages), key=lambda event: event[1:])


def blocks_of(waveform, sizes):
    at, blocks = 0, []
    while at < len(waveform):
        size = sizes[len(blocks) % len(sizes)]
        blocks.append(waveform[at : at + size])
        at += size
    return blocks


# --- what is heard -------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 20_000), min_size=1, max_size=6))
def test_any_blocks_give_the_events_of_the_whole(shared_tone_predictor, sizes):
    predictor = shared_tone_predictor
    waveform = sound(SECONDS, EVENTS)
    sizes = [max(size, len(waveform) // 400) for size in sizes]
    summary, told = listen_to(predictor, Script(blocks_of(waveform, sizes)))
    assert found(told.closed) == sorted(expected(predictor, waveform), key=lambda e: e[1:])
    assert len(told.closed) == len(EVENTS) == summary.events
    assert (summary.heard, summary.missing, summary.gaps) == (len(waveform), 0, 0)
    assert told.messages[0]["type"] == "start" and told.messages[-1] == {"type": "end", "duration": SECONDS}
    assert told.notes == []


@pytest.fixture(scope="module")
def shared_tone_predictor(tiny_checkpoint):
    """As ``tone_predictor`` makes it, for tests that repeat themselves."""
    from conftest import ToneBackend, tiny_config

    from htsat.predict import Predictor

    predictor = Predictor(tiny_checkpoint, device="cpu")
    predictor.config = dataclasses.replace(tiny_config(), decoding=predictor.config.decoding)
    predictor._backend = ToneBackend(predictor.config)
    return predictor


def test_what_is_lost_is_a_gap_with_its_length(tone_predictor):
    predictor = tone_predictor()
    waveform = sound(SECONDS, EVENTS)
    cut = 22 * TOKEN  # in the middle of the second event
    at = round(cut * RATE)
    source = Script([waveform[:at], Lost(RATE // 2, "the test took them"), Lost(1, "and one more"), waveform[at:]])
    summary, told = listen_to(predictor, source)
    missing = RATE // 2 + 1
    assert (summary.heard, summary.missing, summary.gaps) == (len(waveform), missing, 1)
    assert told.of("gap") == [{"type": "gap", "start": cut, "duration": missing / RATE, "time": None}]
    halves = [*expected(predictor, waveform[:at]), *expected(predictor, waveform[at:], cut + missing / RATE)]
    assert len(halves) == len(EVENTS) + 1  # one event was cut into two
    assert np.allclose([e[1:] for e in found(told.closed)], sorted(e[1:] for e in halves), rtol=0, atol=1e-9)
    assert told.messages[-1]["duration"] == pytest.approx(SECONDS + missing / RATE)
    assert told.notes == [f"script: {missing / RATE:.3f} s are missing at {cut:.1f} s: and one more"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_values_that_are_no_samples_are_counted(tone_predictor, value):
    waveform = sound(20.0, [("low", 2 * TOKEN, 4 * TOKEN)])
    garbage = np.full(3 * RATE, value, np.float32)
    summary, told = listen_to(tone_predictor(), Script(blocks_of(np.concatenate([waveform, garbage, waveform]), [800])))
    assert (summary.heard, summary.missing, summary.gaps) == (2 * len(waveform), 3 * RATE, 1)
    assert len(told.closed) == 2 and told.of("gap")[0]["start"] == 20.0
    assert "values that are no samples" in told.notes[0]


def test_garbage_without_end_is_told_now_and_then(tone_predictor):
    garbage = np.full(RATE, np.nan, np.float32)
    summary, told = listen_to(tone_predictor(), Script([garbage] * 35))
    assert (summary.heard, summary.missing, summary.gaps) == (0, 35 * RATE, 4)
    assert len(told.notes) == 1
    assert told.messages[-1] == {"type": "end", "duration": 35.0}


def test_a_source_without_samples(tone_predictor):
    summary, told = listen_to(tone_predictor(), Script([]))
    assert (summary.heard, summary.missing) == (0, 0)
    assert [message["type"] for message in told.messages] == ["start", "end"]


# --- too slow, silent, broken --------------------------------------------------------------------


def slowed(predictor, seconds):
    backend = predictor._backend

    def slow(chunks):
        time.sleep(seconds)
        return backend(chunks)

    predictor._backend = slow
    return predictor


def test_samples_that_nobody_has_time_for_are_counted(tone_predictor):
    """2 s of room, a network that takes 0.3 s each second of sound, and 40 s of sound in half a second."""
    waveform = sound(40.0, [])
    steps = [step for block in blocks_of(waveform, [RATE]) for step in (block, 0.012)]
    summary, told = listen_to(slowed(tone_predictor(), 0.3), Script(steps, waits=False), buffer_seconds=2.0)
    assert summary.heard + summary.missing == len(waveform)
    assert summary.missing > 10 * RATE and 1 <= summary.gaps <= 12
    assert sum(gap["duration"] for gap in told.of("gap")) == pytest.approx(summary.missing / RATE)
    assert "listening is slower than the sound comes" in told.notes[0] and len(told.notes) == 1


def test_a_source_that_waits_loses_nothing(tone_predictor):
    waveform = sound(10.0, [])
    source = Script(blocks_of(waveform, [4000]))
    summary, _ = listen_to(slowed(tone_predictor(), 0.05), source, buffer_seconds=1.0)
    assert (summary.heard, summary.missing) == (len(waveform), 0)


def test_the_buffer_is_bounded():
    """100 s of sound at once and nobody who listens."""
    block = np.zeros(RATE, np.float32)
    for waits in (False, True):
        reader = Reader(Script([block] * 100, waits=waits), 5.0)
        time.sleep(0.2)
        assert reader.buffered_seconds <= 5.0
        assert reader.thread.is_alive() == waits
        heard = lost = 0
        while not isinstance(item := reader.get(5.0), run_module._Ended):
            if isinstance(item, run_module._Piece):
                heard += len(item.samples)
            elif isinstance(item, run_module._Gone):
                lost += item.lost.num_samples
        assert heard + lost == 100 * RATE and (lost == 0) == waits
        reader.thread.join(5)


def test_a_stall_is_a_gap_by_the_clock_and_the_source_is_opened_again(tone_predictor):
    waveform = sound(5.0, [("low", 4 * TOKEN, 16 * TOKEN)])  # sounds to the end
    steps = [waveform, 60], [waveform, AudioError("it is over")]
    source = Script(*steps, waits=False, clocked=True, reopens=True, dated=True)
    began = time.monotonic()
    told = Told()
    running = listener(tone_predictor(), source, told, retries=1)
    with pytest.raises(SourceError, match="it is over; gave up after 1 retries"):
        running.run()
    assert 0.3 < time.monotonic() - began < 5 and source.opened == 2
    gaps = told.of("gap")
    assert gaps[0]["start"] == 5.0 and sum(gap["duration"] for gap in gaps) > 0.3
    events = found(told.closed)
    assert len(events) == 2 and events[0][1:3] == (4 * TOKEN, 16 * TOKEN)
    assert told.notes[1].startswith("script: no samples for 0.3 s; trying again in 0.0")
    assert told.notes[-1] == "script: sound comes again"
    assert told.messages[-1]["type"] == "end"  # in order, whatever was wrong
    assert told.messages[-1]["duration"] == pytest.approx(10 + sum(gap["duration"] for gap in gaps))


@pytest.mark.parametrize("first", ["sound", "lost", "garbage"])
def test_time_without_sound_is_counted_once(tone_predictor, monkeypatch, first):
    """5 s, 3 s of nothing, and behind them 1 s that may be lost too: whatever it is, the clock is right."""
    clock = [100.0]

    def later(seconds):
        def step():
            clock[0] += seconds

        return step

    monkeypatch.setattr(run_module, "now", lambda: clock[0])
    monkeypatch.setattr("random.uniform", lambda low, high: 0.0)
    block = np.zeros(RATE, np.float32)
    second = {"sound": block, "lost": Lost(RATE, "x"), "garbage": block * np.float32(np.nan)}[first]
    more = [step for _ in range(5) for step in (later(1), block)]
    source = Script(
        [*more, SourceError("gone")], [later(3), later(1), second, *more], clocked=True, reopens=True, dated=True
    )
    told = Told()
    with pytest.raises(SourceError, match="script: ended"):
        listener(tone_predictor(), source, told, retries=1).run()
    missing = sum(gap["duration"] for gap in told.of("gap"))
    assert missing == 3 + (first != "sound") and told.messages[-1]["duration"] == 14 == clock[0] - 100
    assert told.notes.count("script: sound comes again") == 1


def test_waiting_for_a_source_backs_off(tone_predictor, monkeypatch):
    """A source that never comes: each wait is about twice as long, up to the limit, and each try is told."""
    source = Script(SourceError("script: nobody there"), reopens=True)
    told = Told()
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    with pytest.raises(SourceError, match="gave up after 4 retries"):
        listener(tone_predictor(), source, told, retries=4, first_wait=0.02, longest_wait=0.1).run()
    assert source.opened == 5
    waits = [float(note.rpartition(" in ")[2].removesuffix(" s")) for note in told.notes]
    assert waits == [0.0, 0.0, 0.1, 0.1]  # 0.02, 0.04, 0.08, 0.1
    assert told.lines == []


def test_a_source_that_can_never_be_had_ends_at_once(tone_predictor):
    source = Script(UsageError("the device 'x' cannot be had"), reopens=True)
    with pytest.raises(UsageError, match="cannot be had"):
        listen_to(tone_predictor(), source)
    assert source.opened == 1


def test_a_mistake_in_a_source_is_not_tried_again(tone_predictor):
    source = Script([sound(5.0, []), KeyError("a mistake")], reopens=True)
    with pytest.raises(KeyError, match="a mistake"):
        listen_to(tone_predictor(), source)
    assert source.opened == 1


def test_a_source_that_breaks_off_closes_its_events(tone_predictor):
    """Not one that is opened again: what was heard is told, then the failure."""
    waveform = sound(5.0, [("low", 4 * TOKEN, 16 * TOKEN)])
    told = Told()
    with pytest.raises(AudioError, match="the disk is gone"):
        listener(tone_predictor(), Script([waveform, AudioError("the disk is gone")]), told).run()
    assert len(told.closed) == 1 and told.messages[-1] == {"type": "end", "duration": 5.0}


def test_a_stalled_pipe_waits_and_says_so(tone_predictor):
    waveform = sound(5.0, [])
    steps = [waveform, 0.6, *blocks_of(waveform, [400])]
    source = Script(steps, clocked=True, dated=True)
    summary, told = listen_to(tone_predictor(), source)
    assert source.opened == 1
    assert 0.5 * RATE < summary.missing < 3 * RATE and summary.heard == 2 * len(waveform)
    assert "no samples for 0.3 s; waiting for more" in told.notes[1] and told.notes[-1] == "script: sound comes again"
    # a file has no clock: what is not written yet is not missing
    summary, told = listen_to(tone_predictor(), Script(steps))
    assert summary.missing == 0 and len(told.notes) == 2


def test_a_source_that_hangs_for_ever_is_given_up(tone_predictor, monkeypatch):
    """Its threads do not become more and more."""

    class Hanging(Script):
        def open(self):
            self.opened += 1
            time.sleep(3)
            raise SourceError("late")

    monkeypatch.setattr(run_module, "_MAX_HANGING", 2)
    source = Hanging([], reopens=True)
    with pytest.raises(SourceError, match="3 tries hang in the source, start again"):
        listen_to(tone_predictor(), source, stall_seconds=0.05, first_wait=0.01, longest_wait=0.01)
    assert source.opened == 3


def test_stopping_closes_events_and_tells_the_end(tone_predictor):
    waveform = sound(8.0, [("low", 4 * TOKEN, 8.0)])
    told = Told()
    running = listener(tone_predictor(), Script([waveform, 60]), told, stall_seconds=0)
    threading.Timer(0.3, running.stop).start()
    summary = running.run()
    assert summary.heard == len(waveform)
    assert [event["offset"] for event in told.closed] == [8.0]
    assert told.messages[-1] == {"type": "end", "duration": 8.0}


def test_what_there_is_no_time_for_at_the_end_is_counted(tone_predictor, monkeypatch):
    monkeypatch.setattr(run_module, "_REST_SECONDS", 0.3)
    waveform = sound(20.0, [])
    told = Told()
    running = listener(slowed(tone_predictor(), 0.2), Script([*blocks_of(waveform, [RATE]), 60]), told, stall_seconds=0)
    threading.Timer(0.2, running.stop).start()
    began = time.monotonic()
    summary = running.run()
    assert time.monotonic() - began < 4
    assert summary.heard + summary.missing == len(waveform) and summary.heard and summary.missing > 5 * RATE
    assert "there was no time left" in told.notes[0]


def test_status(tone_predictor):
    seconds = np.arange(2 * RATE) / RATE
    waveform = np.sqrt(2) * 0.1 * np.sin(2 * np.pi * 500 * seconds)
    told = Told()
    running = listener(tone_predictor(), Script([waveform.astype(np.float32), 1.0], dated=True), told, stall_seconds=0)
    running.run()
    state = told.states[-1]
    assert (state.position, state.heard, state.gaps, state.connected, state.buffered) == (2.0, 2.0, 0, True, 0.0)
    assert any(state.level == pytest.approx(-20, abs=0.01) for state in told.states)
    assert 0 < state.factor < 1 and state.delay > 0 and state.sounding == ()


def test_the_clock_is_that_of_the_earliest_arrivals():
    clock = Clock()
    assert clock.at(1.0) is None
    for second in range(1, 1200):
        # The sound card's second is 0.1 % too long, and the network is late by up to 3 s.
        clock.note(float(second), 100 + 1.001 * second + (second * 7 % 30) / 10)
    at = clock.at(1199.0)
    assert at is not None and abs(at - (100 + 1.001 * 1199)) < 0.7  # what ten minutes are wrong by
    clock.restart()
    clock.note(1200.0, 5000.0)
    assert clock.at(1190.0) == 4990.0


def test_times_of_the_day(tone_predictor):
    waveform = sound(SECONDS, EVENTS)
    began = datetime(2026, 5, 1, 6, tzinfo=UTC)
    _, told = listen_to(tone_predictor(), Script([waveform, Lost(RATE, "x"), waveform[:RATE]]), began=began)
    for event in told.closed:
        for name in ("onset", "offset"):
            told_time = datetime.fromisoformat(event[f"{name}_time"])
            assert abs(told_time - began - timedelta(seconds=event[name])) < timedelta(milliseconds=1.1)
    assert told.of("gap")[0]["time"] == (began + timedelta(seconds=SECONDS)).isoformat(timespec="milliseconds")
    # of now: the last sample came just now
    _, told = listen_to(tone_predictor(), Script([waveform], dated=True))
    last = datetime.fromisoformat(told.closed[-1]["offset_time"])
    assert last.tzinfo is not None
    assert abs(datetime.now(UTC) - last - timedelta(seconds=SECONDS - EVENTS[-1][2])) < timedelta(seconds=2)
    _, told = listen_to(tone_predictor(), Script([waveform]))
    assert {event["onset_time"] for event in told.closed} == {None}


# --- lines ---------------------------------------------------------------------------------------


def test_lines_for_people_and_tables(tone_predictor, tmp_path):
    waveform, predictor = sound(SECONDS, EVENTS), tone_predictor()
    began = datetime(2026, 5, 1, 6, tzinfo=UTC)
    _, told = listen_to(predictor, Script([waveform]), OutputSettings(), began=began)
    assert len(told.lines) == 4 and told.lines[0].split() == ["time", "onset", "offset", "label", "probability"]
    assert told.lines[1].split() == ["2026-05-01", "06:00:00.937", "0.938", "2.500", "low", "0.998"]
    _, told = listen_to(predictor, Script([waveform]), OutputSettings(format="tsv"))
    path = tmp_path / "events.tsv"
    path.write_text("\n".join(told.lines) + "\n")
    (detections,) = read_events(path)
    assert detections.file == "script"
    assert [(e.event_label, e.onset, e.offset) for e in detections.events] == [
        (label, round(onset, 3), round(offset, 3)) for label, onset, offset in EVENTS
    ]
    assert all(0.99 < e.probability < 1 for e in detections.events)


def test_labels_and_probabilities_choose_events(tone_predictor):
    predictor = tone_predictor()
    backend = predictor._backend

    def unsure(chunks):  # "low" is 0.998 probable, "high" only 0.731
        clip, frame, embedding = backend(chunks)
        frame[:, :, 1] = np.minimum(frame[:, :, 1], 1)
        return clip, frame, embedding

    waveform = sound(SECONDS, EVENTS)
    for output, labels in (
        ({"min_probability": 0.9}, ["low", "low"]),
        ({"labels": ("high",)}, ["high"]),
        ({}, ["low", "high", "low"]),
        ({"labels": ("high",), "min_probability": 0.9}, []),
    ):
        predictor._backend = unsure
        summary, told = listen_to(predictor, Script([waveform]), OutputSettings(format="json", **output))
        assert [event["event_label"] for event in told.closed] == labels and summary.events == len(labels)
        assert [e["id"] for e in told.of("event") if e["state"] == "open"] == [e["id"] for e in told.closed]
    with pytest.raises(UsageError, match="--label hig: the model does not know it; did you mean 'high'"):
        listen_to(predictor, Script([]), OutputSettings(labels=("hig",)))


def test_an_event_that_becomes_probable_late_is_opened_late(tone_predictor):
    predictor = tone_predictor()
    backend, calls = predictor._backend, [0]

    def growing(chunks):
        calls[0] += 1
        clip, frame, embedding = backend(chunks)
        return clip, np.minimum(frame, 0.5 if calls[0] < 4 else 6), embedding

    predictor._backend = growing
    waveform = sound(SECONDS, [("low", TOKEN, 30 * TOKEN)])
    _, told = listen_to(predictor, Script([waveform]), OutputSettings(format="json", min_probability=0.9))
    states = [(event["id"], event["state"]) for event in told.of("event")]
    assert states[0] == (1, "open") and states[-1] == (1, "close") and states.count((1, "open")) == 1
    assert all(event["probability"] >= 0.9 for event in told.of("event"))


# --- files ---------------------------------------------------------------------------------------


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_grows_over_restarts(tone_predictor, tmp_path):
    path = tmp_path / "events.jsonl"
    waveform = sound(SECONDS, EVENTS)
    for run in range(1, 3):
        listen_to(tone_predictor(), Script([waveform, Lost(800, "x"), waveform[:800]]), OutputSettings(out=path))
        lines = lines_of(path)
        kinds = ["start", "event", "event", "event", "gap", "end"]
        assert [line["type"] for line in lines] == kinds * run
        assert lines[0]["source"] == "script"
    with path.open("ab") as stream:
        stream.write(b'{"type":"event","id":3,"ons')  # the power went
    told = Told()
    output = AppendFile(path, Teller(told.notes.append))
    output.write('{"type":"end"}')
    assert output.close() == 0
    assert len(lines_of(path)) == 13 and "was cut off" in told.notes[0]


def test_a_table_grows_with_one_head(tone_predictor, tmp_path):
    path = tmp_path / "events.tsv"
    for run in range(1, 3):
        listen_to(tone_predictor(), Script([sound(SECONDS, EVENTS)]), OutputSettings(out=path))
        assert len(path.read_text().splitlines()) == 1 + 3 * run
    path.write_text(path.read_text() + "script\t1.0\t2")
    listen_to(tone_predictor(), Script([sound(SECONDS, EVENTS)]), OutputSettings(out=path))
    (detections,) = read_events(path)
    assert len(detections.events) == 9


def test_whole_lines_without_an_end_are_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"type":"a"}\n{"type":"b"}')
    file = AppendFile(path, Teller([].append))
    file.write('{"type":"c"}')
    file.close()
    assert [line["type"] for line in lines_of(path)] == ["a", "b", "c"]


def test_a_file_for_each_day_and_one_that_was_moved(tmp_path, monkeypatch):
    class Calendar(datetime):
        day_now = 1

        @classmethod
        def now(cls, tz=None):
            return cls(2026, 5, cls.day_now, 12, tzinfo=UTC)

    monkeypatch.setattr(outputs_module, "datetime", Calendar)
    file = AppendFile(tmp_path / "e.tsv", Teller([].append), head="onset", daily=True)
    file.write("1")
    Calendar.day_now = 2
    file.write("2")
    (tmp_path / "e-2026-05-02.tsv").rename(tmp_path / "moved.tsv")
    file.write("3")
    assert file.close() == 0
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert texts == {"e-2026-05-01.tsv": "onset\n1\n", "moved.tsv": "onset\n2\n", "e-2026-05-02.tsv": "onset\n3\n"}


def test_a_full_disk_keeps_lines_until_there_is_room(tmp_path, monkeypatch):
    path, told, room = tmp_path / "a.jsonl", [], [5]
    real = os.write

    def write(descriptor, data):  # takes a part, as a disk does that becomes full
        taken = data[: room[0]]
        if not taken:
            raise OSError(28, "No space left on device")
        room[0] -= len(taken)
        return real(descriptor, taken)

    file = AppendFile(path, Teller(told.append))
    monkeypatch.setattr(os, "write", write)
    for i in range(20):
        file.write(json.dumps({"type": str(i)}))
    assert path.read_bytes() == b"" and len(told) == 1 and "No space left on device); 1 lines wait" in told[0]
    room[0] = 10_000
    file.write('{"type": "20"}')
    assert [line["type"] for line in lines_of(path)] == [str(i) for i in range(21)]
    room[0] = 0
    monkeypatch.setattr(outputs_module, "_MAX_BACKLOG", 3)
    for _ in range(5):
        file.write("{}")
    assert file.close() == 5 and file.dropped == 2


def test_files_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="No such file or directory"):
        AppendFile(tmp_path / "no" / "a.jsonl", Teller([].append))
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        AppendFile(tmp_path / "a.jsonl", Teller([].append))


def test_messages_that_repeat_themselves_are_rare(monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    teller = Teller(told.append)
    for second in range(130):
        now[0] = second
        teller.rarely("a", "again")
    assert told == ["again", "again (and 59 times more before)", "again (and 59 times more before)"]


# --- clips ---------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=20), st.integers(1, 20), st.data())
def test_the_ring_holds_the_last_samples(steps, size, data):
    ring, all_samples = Ring(size), np.zeros(0, np.float32)
    for gap, count in steps:
        block = np.zeros(count, np.float32) if gap else np.arange(1, count + 1, dtype=np.float32) + len(all_samples)
        ring.skip(count) if gap else ring.add(block)
        all_samples = np.concatenate([all_samples, block])
    assert ring.position == len(all_samples)
    start = data.draw(st.integers(-5, len(all_samples) + 5))
    stop = data.draw(st.integers(start, len(all_samples) + 5))
    first, samples = ring.cut(start, stop)
    kept = max(start, len(all_samples) - size, 0)
    assert first == kept and np.array_equal(samples, all_samples[kept : max(kept, stop)])


def test_clips_hold_exactly_their_events(tone_predictor, tmp_path):
    waveform = sound(SECONDS, EVENTS)
    folder = tmp_path / "clips"
    output = OutputSettings(format="json", clips=folder, margin=0.5)
    summary, told = listen_to(tone_predictor(), Script(blocks_of(waveform, [700])), output)
    paths = sorted(folder.iterdir())
    assert summary.parts == ["clips: 3 done, 0 lost"] and len(paths) == 3
    for path, (label, onset, offset) in zip(paths, EVENTS, strict=True):
        assert path.name.startswith(f"{max(0, onset - 0.5):013.3f}_{label}_")
        samples, rate = soundfile.read(path)
        first, last = round((onset - 0.5) * RATE), min(len(waveform), round((offset + 0.5) * RATE))
        assert rate == RATE and len(samples) == last - first
        assert np.abs(samples - np.clip(waveform[first:last], -1, 1)).max() <= 2**-15
    assert len(told.closed) == 3


def test_of_a_long_event_the_beginning_is_saved(tone_predictor, tmp_path):
    waveform = sound(60.0, [("low", 4 * TOKEN, 160 * TOKEN)])
    output = OutputSettings(clips=tmp_path, clip_seconds=10, margin=1, out=tmp_path / "e.jsonl")
    listen_to(tone_predictor(), Script(blocks_of(waveform, [4000])), output)
    (path,) = tmp_path.glob("*.flac")
    samples, _ = soundfile.read(path)
    first = round((4 * TOKEN - 1) * RATE)
    assert np.abs(samples - waveform[first : first + 11 * RATE]).max() <= 2**-15  # the margin behind is the event


def heard(number=1, onset=1.0, offset=2.0, label="dog", **settings) -> Heard:
    return Heard(number, "close", Event(label, onset, offset, 0.75), "script", **settings)


def test_the_oldest_clips_are_deleted_and_nothing_else(tmp_path):
    (tmp_path / "mine.flac").write_bytes(bytes(10_000))
    (tmp_path / "000000001.000_dog_000007.flac").write_bytes(bytes(10_000))
    done: list[Heard] = []
    output = OutputSettings(margin=0, clips_max_bytes=30_000)
    clips = Clips(tmp_path, output, RATE, 1.0, Teller([].append), done.append)
    rng = np.random.default_rng(0)
    clips.ring.add(rng.uniform(-1, 1, 8 * RATE).astype(np.float32))
    for number in range(1, 6):  # about 16 KB each
        clips.event(heard(number, onset=number, offset=number + 1, label="a/b c"))
        clips.tick()
    assert clips.worker.close(10) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["000000005.000_a_b_c_000005.flac", "mine.flac"]
    assert [one.clip.name for one in done][-1] == names[0]


def test_a_full_disk_loses_clips_and_nothing_else(tmp_path, monkeypatch):
    fails = iter([False, True, False])
    real = outputs_module.write_atomic

    def write(path, data):
        if next(fails):
            raise OutputError(f"{path}: cannot be written: the disk is full")
        real(path, data)

    monkeypatch.setattr(outputs_module, "write_atomic", write)
    done, told = [], []
    clips = Clips(tmp_path, OutputSettings(margin=0), RATE, 1.0, Teller(told.append), done.append)
    clips.ring.add(np.zeros(8 * RATE, np.float32))
    for number in range(1, 4):
        clips.event(heard(number, onset=number, offset=number + 1))
        clips.tick()
    assert clips.worker.close(10) == 1
    assert [one.clip is not None for one in done] == [True, False, True]
    assert len(told) == 1 and "the disk is full" in told[0] and len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(OutputError, match="cannot be used for clips"):
        Clips(tmp_path / "a", OutputSettings(), RATE, 1.0, Teller([].append), [].append)


# --- webhooks and commands -----------------------------------------------------------------------


class Hook:
    """A server that answers POSTs as a list says: codes, or seconds to wait first; the last one repeats."""

    def __init__(self, *answers):
        self.bodies, self.headers, self.count = [], [], 0
        hook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = answers[min(hook.count, len(answers) - 1)]
                hook.count += 1
                if isinstance(answer, float):
                    time.sleep(answer)
                    answer = 200
                if answer == 200:
                    hook.bodies.append(json.loads(body))
                    hook.headers.append(dict(self.headers))
                with contextlib.suppress(OSError):
                    self.send_response(answer)
                    self.send_header("Location", "/elsewhere")
                    self.end_headers()

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def test_webhooks_get_each_event(tone_predictor, tmp_path, monkeypatch):
    monkeypatch.setenv("HTSAT_WEBHOOK_TOKEN", "abc")
    with Hook(200) as hook:
        output = OutputSettings(format="json", webhooks=(hook.url,), clips=tmp_path)
        summary, told = listen_to(tone_predictor(), Script([sound(SECONDS, EVENTS)]), output)
    assert summary.lost == 0 and summary.parts[1] == f"webhook {hook.url}: 3 done, 0 lost"
    assert [body["event_label"] for body in hook.bodies] == ["low", "high", "low"]
    for body, message in zip(hook.bodies, told.closed, strict=True):
        assert Path(body.pop("clip")).is_file() and body == message
    assert hook.headers[0]["Authorization"] == "Bearer abc" and hook.headers[0]["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("answers", "tries", "error"),
    [
        ((503, 500, 429, 200), 4, None),
        ((404,), 1, "answers 404"),
        ((302,), 1, "answers 302"),  # a redirect would lose the event
        ((500,), 5, "answers 500"),
    ],
)
def test_webhooks_are_tried_again_where_that_may_help(answers, tries, error):
    with Hook(*answers) as hook:
        webhook = Webhook(hook.url, first_wait=0.01)
        if error is None:
            webhook(heard())
        else:
            with pytest.raises(OutputError, match=error):
                webhook(heard())
    assert hook.count == tries


def test_dead_and_slow_webhooks_do_not_hold_up_the_listening(tone_predictor, monkeypatch):
    monkeypatch.setattr(outputs_module, "_HOOK_SECONDS", 0.2)
    waveform = sound(SECONDS, EVENTS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}/"
    with Hook(0.5) as slow:
        output = OutputSettings(format="json", webhooks=(dead, slow.url))
        summary, told = listen_to(tone_predictor(), Script([waveform]), output)
        assert len(told.closed) == 3 and summary.lost == 6 and len(told.notes) == 2
        assert "Connection refused; an event was not delivered" in " ".join(told.notes)
        assert "timed out; an event was not delivered" in " ".join(told.notes)
        time.sleep(0.4)  # the slow one is still answering


def test_what_waits_for_a_webhook_is_bounded(monkeypatch):
    told = []
    release = threading.Event()
    worker = outputs_module.Worker("webhook", lambda _: release.wait(5), Teller(told.append), limit=3)
    time.sleep(0.05)
    assert [worker.put(i) for i in range(10)].count(True) in (3, 4)
    release.set()
    assert worker.close(5) in (6, 7) and len(told) == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/x", "expected http://HOST"),
        ("file:///etc/passwd", "expected http://HOST"),
        ("http://", "expected http://HOST"),
        ("https://me:secret@host/x", "HTSAT_WEBHOOK_TOKEN"),
    ],
)
def test_webhooks_that_are_none(url, message):
    with pytest.raises(UsageError, match=message) as error:
        Webhook(url)
    assert "secret" not in str(error.value)


def script(path: Path, text: str) -> str:
    path.write_text(f"import sys, os, json, time\n{text}")
    return f"{sys.executable} '{path}'"


def test_commands_get_each_event_without_a_shell(tone_predictor, tmp_path):
    log = tmp_path / "log"
    line = script(
        tmp_path / "a b.py",
        f"""
event = json.load(sys.stdin)
with open({str(log)!r}, "a") as file:
    names = sorted(name for name in os.environ if name.startswith("HTSAT_"))
    print(json.dumps([event, sys.argv[1:], {{name: os.environ[name] for name in names}}]), file=file)
print("noise")
""",
    )
    output = OutputSettings(format="json", commands=(f"{line} '$HOME; rm x' b",))
    summary, told = listen_to(tone_predictor(), Script([sound(SECONDS, [("low", 0, TOKEN), *EVENTS])]), output)
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert summary.lost == 0 and [entry[0] for entry in entries] == told.closed
    assert entries[0][1] == ["$HOME; rm x", "b"]
    values = entries[0][2]
    assert (values["HTSAT_EVENT_LABEL"], values["HTSAT_ONSET"], values["HTSAT_OFFSET"]) == ("low", "0.0", "0.3125")
    assert values["HTSAT_CLIP"] == "" and values["HTSAT_SOURCE"] == "script"


def test_commands_that_fail_or_hang(tmp_path):
    with pytest.raises(OutputError, match="failed with exit code 3"):
        Command(script(tmp_path / "a.py", "sys.exit(3)"), 20)(heard())
    child = f"""
import subprocess
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
time.sleep(60)
"""
    began = time.monotonic()
    with pytest.raises(OutputError, match="took longer than 1 s and was ended"):
        Command(script(tmp_path / "b.py", child), 1)(heard())
    assert time.monotonic() - began < 10
    group = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 5
    with pytest.raises(ProcessLookupError):  # with all that it started
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.05)
    Command(f"{sys.executable} -c ''", 20)(heard())  # one that does not read


@pytest.mark.parametrize("line", ["", "no-such-program-anywhere a", "echo 'a"])
def test_commands_that_are_none(line):
    with pytest.raises(UsageError, match="--exec"):
        Command(line, 1)


# --- the command ---------------------------------------------------------------------------------


def test_listening_to_a_file(command, tmp_path, tone_predictor):
    path = write_sound(tmp_path / "a.wav", SECONDS, EVENTS, sample_rate=RATE)
    code, out, err = command("listen", path, "--speed", 0, "--json", "--operating-point", "x")
    assert (code, out) == (2, "") and "unknown operating point 'x'" in err[-1]
    code, out, err = command("listen", path, "--speed", 0, "--json")
    messages = [json.loads(line) for line in out.splitlines()]
    waveform, _ = soundfile.read(path, dtype="float32")
    closed = [m for m in messages if m["type"] == "event" and m["state"] == "close"]
    assert code == 0 and found(closed) == sorted(expected(tone_predictor(), waveform), key=lambda e: e[1:])
    assert err[-1] == f"htsat: heard {SECONDS:.1f} s, 3 events"
    code, out, err = command("listen", path, "--speed", 0, "--quiet", "--out", tmp_path / "e.tsv", "--daily")
    assert (code, err) == (0, []) and len(out.splitlines()) == 4
    assert [p.name for p in tmp_path.glob("e-*.tsv")] == [f"e-{datetime.now():%Y-%m-%d}.tsv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.wav", "--json", "--tsv"], "--json and --tsv exclude each other"),
        (["a.wav", "--frames"], "--frames is for --json; give that too"),
        (["a.wav", "--daily"], "--daily is for --out FILE"),
        (["a.wav", "--clips-max-bytes", "1G"], "--clips-max-bytes is for --clips DIR"),
        (["a.wav", "--clips", "x", "--clips-max-bytes", "many"], "expected a size such as 500M"),
        (["a.wav", "--start", "noon"], "--start noon: expected a time such as"),
        (["a.wav", "--hop", "0"], "greater than or equal to 0.1"),
        (["a.wav", "--hop", "10"], "--hop 10 and --lookahead 0.2 do not fit the model: hop_seconds 10 and"),
        (["a.wav", "--webhook", "ftp://x"], "expected http://HOST"),
        (["a.wav", "--exec", "nothing-there"], "there is no such program"),
        (["a.wav", "--backend", "abacus"], "unknown backend 'abacus'"),
        (["gopher://x"], "expected a file or an address"),
    ],
)
def test_wrong_usage(command, arguments, message):
    code, out, err = command("listen", *arguments)
    assert (code, out) == (2, "") and message in err[-1]


def test_a_missing_file_and_a_webhook_that_fails(command, tmp_path):
    code, _, err = command("listen", tmp_path / "none.wav")
    assert code == 1 and "there is no such file" in err[-1]
    path = write_sound(tmp_path / "a.wav", SECONDS, EVENTS)
    with Hook(404) as hook:
        code, out, err = command("listen", path, "--speed", 0, "--webhook", hook.url)
    assert code == 1 and len(out.splitlines()) == 4 and err[-1].endswith("0 done, 3 lost")


MAIN = """
import conftest, htsat.backends, htsat.cli, htsat.predict
config = conftest.tiny_config()
runner = htsat.backends.Runner(conftest.ToneBackend(config), "tones", config, None)
htsat.predict.open_model = lambda *_, **__: runner
htsat.cli.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_pipe_in_a_real_process_until_a_signal(tmp_path, number, code):
    arguments = ["listen", "-", "--sample-rate", str(RATE), "--sample-format", "f32le", "--json"]
    out = tmp_path / "e.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments, "--out", str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )
    with process:
        end = 46 * TOKEN  # a moment at which is listened
        waveform = sound(end, [("low", 3 * TOKEN, 8 * TOKEN), ("high", 40 * TOKEN, end)])
        process.stdin.write(waveform.astype("<f4").tobytes())
        process.stdin.flush()
        seen = []
        for line in process.stdout:
            seen.append(json.loads(line))
            if seen[-1]["type"] == "progress" and seen[-1]["time"] > 14:  # all has come
                break
        process.send_signal(number)
        seen += [json.loads(line) for line in process.stdout]
        errors = process.stderr.read().decode().splitlines()
        assert process.wait(20) == code
    closed = [(m["event_label"], m["offset"]) for m in seen if m["type"] == "event" and m["state"] == "close"]
    assert closed == [("low", 8 * TOKEN), ("high", end)]
    assert seen[-1] == {"type": "end", "duration": end} == lines_of(out)[-1]
    assert errors[0] == "htsat: listening to stdin with default on tones; stop with Ctrl+C"
    assert errors[1:] == ["htsat: heard 14.4 s, 2 events", *(["htsat: interrupted"] if code == 130 else [])]


def test_a_stream_that_breaks_off_is_opened_again(command, tmp_path, monkeypatch):
    """Through a program called ffmpeg that gives 5 s and fails, three times."""
    raw = (sound(5.0, [("low", 4 * TOKEN, 16 * TOKEN)], 8000) * 32767).astype("<i2")
    (tmp_path / "raw").write_bytes(raw.tobytes())
    program = tmp_path / "ffmpeg"
    program.write_text(
        f"#!{sys.executable} -S\nimport os, sys\nos.write(1, open({str(tmp_path / 'raw')!r}, 'rb').read())\n"
        "sys.stderr.write('Connection reset by peer')\nsys.exit(1)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("random.uniform", lambda low, high: 0.02)
    code, out, err = command(
        "listen", "rtsp://me:secret@camera/1", "--retries", 2, "--json", "--sample-rate", RATE, "--label", "low"
    )
    messages = [json.loads(line) for line in out.splitlines()]
    closed = [m for m in messages if m["type"] == "event" and m["state"] == "close"]
    gaps = [m for m in messages if m["type"] == "gap"]
    assert code == 1 and len(closed) == 3 and len(gaps) == 2 and messages[-1]["type"] == "end"
    assert messages[-1]["duration"] == pytest.approx(15 + sum(gap["duration"] for gap in gaps))
    last = "rtsp://camera/1: the stream broke off (Connection reset by peer); gave up after 2 retries"
    assert err[-1] == f"htsat: {last}" and "secret" not in out + " ".join(err)


def test_a_microphone_that_loses_samples_and_is_pulled_out(tone_predictor, monkeypatch):
    from test_listen_sources import FakeSoundCard

    card = FakeSoundCard()
    monkeypatch.setitem(sys.modules, "sounddevice", card)
    source, told = open_source(None), Told()
    running = listener(tone_predictor(), source, told, stall_seconds=0.5)
    thread = threading.Thread(target=running.run)
    thread.start()

    def give(number, first=0.0, overflow=False):
        end = time.monotonic() + 10
        while len(card.streams) < number:
            assert time.monotonic() < end
            time.sleep(0.01)
        for i in range(10):
            card.streams[-1].give(np.zeros(800), at=first + 0.1 * i, overflow=overflow and not i)
            time.sleep(0.005)

    give(1)
    give(1, first=3.0, overflow=True)  # due at 1.0
    card.streams[-1].settings["finished_callback"]()  # pulled out
    give(2)
    give(3)  # nothing comes: opened again after the time that it may stall
    running.stop()
    thread.join(10)
    (overflow,) = (gap for gap in told.of("gap") if gap["duration"] == 2.0)
    assert overflow["start"] == 1.0 and len(told.of("gap")) >= 3
    assert any("the sound card's buffer overflowed" in note for note in told.notes)
    assert any("USB Microphone: ended; trying again" in note for note in told.notes)
    assert any("USB Microphone: no samples for 0.5 s; trying again" in note for note in told.notes)
    heard = told.messages[-1]["duration"] - sum(gap["duration"] for gap in told.of("gap"))
    assert heard == pytest.approx(4.0)
    assert all(stream.closed for stream in card.streams)


def test_devices_are_listed(command, monkeypatch, capsysbinary):
    import types

    card = types.ModuleType("sounddevice")
    card.default = types.SimpleNamespace(device=(0, 0))
    card.query_devices = lambda: [{"name": "USB\x1b Mic", "max_input_channels": 2, "default_samplerate": 48000.0}]
    monkeypatch.setitem(sys.modules, "sounddevice", card)
    code, out, err = command("listen", "--list-devices")
    assert code == 0 and err == []
    assert out.splitlines()[1].split() == ["0", "USB\\x1b", "Mic", "2", "48000", "default"]
    card.query_devices = list
    code, out, err = command("listen", "--list-devices")
    assert code == 2 and "no microphone was found" in err[-1]
