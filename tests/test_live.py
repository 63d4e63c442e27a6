"""Live listening: whatever the blocks, rates and gaps, the posteriors and events are those of a recording."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htsat.audio.chunk import Chunk, chunk_stream, num_tokens
from htsat.config import DecodingConfig, InferenceConfig
from htsat.detection.decoder import LiveDecoder, decode_events
from htsat.errors import AudioError, ConfigError, UsageError
from htsat.live import DEFAULT_LOOKAHEAD, LiveStream, SectionEnd, live_config, live_messages, start_message
from htsat.predict import Predictor

LABELS = ["a", "b", "c"]
STEP = 0.04


# --------------------------------------------------------------------------------------------------------- the decoder

spans = st.sampled_from([0.0, 0.04, 0.05, 0.08, 0.1, 0.2, 0.3])


@st.composite
def decodings(draw):
    def one():
        threshold = draw(st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]))
        off = draw(st.sampled_from([None, 0.0, 0.2, 0.3, threshold]))
        return {
            "threshold": threshold,
            "threshold_off": None if off is None else min(off, threshold),
            "median_seconds": draw(spans),
            "min_duration": draw(spans),
            "min_gap": draw(spans),
        }

    shared = one()
    return DecodingConfig(**shared, per_class={"b": one()} if draw(st.booleans()) else {})


@settings(max_examples=400, deadline=None)
@given(decodings(), st.integers(1, 60), st.integers(0, 2**32 - 1), st.data())
def test_the_events_of_any_pieces_are_those_of_the_whole(config, num_frames, seed, data):
    rng = np.random.default_rng(seed)
    # Few values, so that ties with thresholds and long runs are common.
    levels = rng.choice(np.array([0.0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.9, 1.0], np.float32), (num_frames, len(LABELS)))
    posteriors = np.repeat(levels, rng.integers(1, 4), axis=0)[:num_frames]
    duration = (num_frames - data.draw(st.sampled_from([0.0, 0.25, 0.9]))) * STEP
    boundaries = np.arange(num_frames + 1) * STEP
    boundaries[-1] = duration
    expected = decode_events(posteriors, boundaries, LABELS, config)

    decoder = LiveDecoder(LABELS, config, STEP)
    cuts = sorted(data.draw(st.lists(st.integers(0, num_frames - 1), max_size=8)))
    pieces = np.split(posteriors, cuts)
    changes = list(itertools.chain.from_iterable(decoder.push(piece) for piece in pieces[:-1]))
    changes += decoder.finish(pieces[-1], duration)
    closed = [change.event for change in changes if change.state == "close"]
    assert sorted(closed, key=lambda e: (e.onset, LABELS.index(e.event_label))) == expected
    assert decoder.open_events == 0

    # Each is opened once, before anything else is said of it, and closed once, last; its onset never moves.
    for number in range(1, len(expected) + 1):
        states = [change.state for change in changes if change.id == number]
        assert states[0] == "open" and states[-1] == "close" and set(states[1:-1]) <= {"update"}
        assert len({change.event.onset for change in changes if change.id == number}) == 1
    assert len({change.id for change in changes}) == len(expected)


def test_when_events_are_told_worked_by_hand():
    """One frame of 0.04 s each; threshold 0.5, hysteresis 0.2, gaps below 0.1 s bridged, at least 0.08 s long."""
    config = DecodingConfig(threshold=0.5, threshold_off=0.2, min_gap=0.1, min_duration=0.08)
    decoder = LiveDecoder(["a"], config, STEP, start=100, next_id=7)
    told = [decoder.push(np.array([[p]])) for p in (0.3, 0.6, 0.1, 0.1, 0.7, 0.0, 0.0, 0.0)]
    states = [[(c.id, c.state, round(c.event.offset, 2), c.sounding) for c in changes] for changes in told]
    assert states == [
        [],  # only above the lower threshold
        [(7, "open", 100.08, True)],  # reached the upper one, and is long enough
        [(7, "update", 100.08, False)],
        [],
        [(7, "update", 100.2, True)],  # two frames of gap, 0.08 s: still the same event
        [(7, "update", 100.2, False)],
        [],
        [(7, "close", 100.2, False)],  # nothing can bridge 0.12 s
    ]
    assert {change.event.onset for changes in told for change in changes} == {100.0}
    assert told[-1][0].event.probability == pytest.approx(0.7)


def test_the_decoder_refuses_what_would_be_wrong():
    decoder = LiveDecoder(["a", "b"], DecodingConfig(), STEP)
    with pytest.raises(ValueError, match=r"shape \(any, 2\), got \(3, 1\)"):
        decoder.push(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="not numbers"):
        decoder.push(np.full((1, 2), np.nan))
    assert decoder.finish(np.zeros((0, 2)), 0.0) == []
    with pytest.raises(ValueError, match="finished"):
        decoder.push(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="finished"):
        decoder.finish(np.zeros((0, 2)), 0.0)


# ---------------------------------------------------------------------------------------------------------- the chunks


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.data())
def test_rolling_chunks_answer_for_every_token_once(tokens, data):
    chunk_samples = tokens * data.draw(st.integers(1, 9)) + data.draw(st.integers(0, tokens - 1))
    hop = data.draw(st.integers(1, tokens))
    ahead = data.draw(st.integers(0, tokens - hop))
    num_samples = data.draw(st.integers(1, 5 * chunk_samples))
    short = data.draw(st.sampled_from(["pad", "tile"]))
    recording = np.arange(1, num_samples + 1, dtype=np.float32)
    chunks = list(chunk_stream([recording], chunk_samples, tokens, hop, short, 1, ahead))
    answered = [token for chunk in chunks for token in chunk.answers]
    assert answered == list(range(num_tokens(num_samples, chunk_samples, tokens)))
    for chunk in chunks:
        assert chunk.start_token <= chunk.answers.start and chunk.answers.stop <= chunk.start_token + tokens
        heard = recording[chunk.start_sample : chunk.start_sample + chunk.length]
        np.testing.assert_array_equal(chunk.samples[: chunk.length], heard)
        rest = chunk.samples[chunk.length :]
        np.testing.assert_array_equal(rest, np.resize(heard, chunk_samples)[chunk.length :] if len(rest) and
                                      short == "tile" and not chunk.start_token else 0 * rest)  # fmt: skip
    cuts = sorted(data.draw(st.lists(st.integers(0, num_samples), max_size=6)))
    again = list(chunk_stream(np.split(recording, cuts), chunk_samples, tokens, hop, short, 1, ahead))
    assert [(c.start_token, c.length, c.answers) for c in again] == [
        (c.start_token, c.length, c.answers) for c in chunks
    ]
    for one, other in zip(chunks, again, strict=True):
        np.testing.assert_array_equal(one.samples, other.samples)


def test_what_cannot_roll_is_refused():
    with pytest.raises(ValueError, match="lookahead_tokens must be 0 to 4, got 5"):
        chunk_stream([], 100, 8, 4, "pad", 1, 5)
    with pytest.raises(ValueError, match="shifts must be 1"):
        chunk_stream([], 100, 8, 4, "pad", 2, 0)
    with pytest.raises(ConfigError, match="shifts = 1"):
        InferenceConfig(lookahead_seconds=0, shifts=2)
    with pytest.raises(ConfigError, match="one length"):
        InferenceConfig(lookahead_seconds=0, short="native")


# ----------------------------------------------------------------------------------------------------------- the stream


@functools.cache
def predictor(threads: int = 1) -> Predictor:
    return Predictor("default", backend="onnxruntime", threads=threads)


def sound(seconds: float, rate: int, seed: int) -> np.ndarray:
    """Bursts of noise, tones and clicks, so that there is something to be heard."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    waveform = 0.01 * rng.standard_normal(len(time))
    for _ in range(int(seconds)):
        start, length = rng.uniform(0, seconds), rng.uniform(0.05, 2)
        inside = (time >= start) & (time < start + length)
        kind = rng.integers(3)
        if kind == 0:
            waveform[inside] += rng.uniform(0.1, 0.5) * rng.standard_normal(inside.sum())
        elif kind == 1:
            waveform[inside] += 0.3 * np.sin(2 * np.pi * rng.uniform(200, 5000) * time[inside])
        else:
            waveform[inside] += 0.8 * (rng.random(inside.sum()) > 0.9995)
    return waveform.astype(np.float32)


def offline(waveform, rate, hop, ahead, decoding=None):
    config = live_config(predictor().config, hop, ahead)
    known = Predictor("default", backend="onnxruntime", threads=1, inference=config.inference, decoding=decoding)
    return known.predict((waveform, rate), spectrogram=False)


#: settings that find something in the sounds above
EAGER = DecodingConfig(threshold=0.2, threshold_off=0.1, median_seconds=0.12, min_gap=0.2, min_duration=0.1)


@pytest.mark.parametrize("hop, ahead", [(1.0, 0.25), (2.5, 0.0), (1.0, None)])
def test_any_blocks_and_rates_give_what_the_recording_gives(hop, ahead):
    check_blocks(hop, ahead, seeds=range(4))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_five_hundred_random_chunkings(part):
    for seed in range(50 * part, 50 * part + 50):
        hop, ahead = [(1.0, 0.25), (0.5, 0.0), (2.5, 1.0), (1.0, None)][seed % 4]
        check_blocks(hop, ahead, seeds=[seed], seconds=12)


def check_blocks(hop, ahead, seeds, seconds=13):
    model = predictor()
    eager = Predictor("default", backend="onnxruntime", threads=1, decoding=EAGER)
    heard = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        rate = int(rng.choice([8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000]))
        waveform = sound(rng.uniform(0.5, seconds), rate, seed)
        expected = offline(waveform, rate, hop, ahead, EAGER)
        stream = eager.stream(rate, hop_seconds=hop, lookahead_seconds=ahead)
        # From single samples to ten seconds.
        longest = float(rng.choice([3e-4, 0.01, 0.1, 1, 10]))
        results, at = [], 0
        while at < len(waveform):
            step = 1 + int(rng.integers(1 + int(longest * rate)))
            results += stream.feed(waveform[at : at + step])
            at += step
        results += stream.finish()
        framewise = np.concatenate([result.framewise_posteriors for result in results])
        np.testing.assert_array_equal(framewise, expected.framewise_posteriors)
        boundaries = np.concatenate([[0.0], *[result.frame_boundaries[1:] for result in results]])
        np.testing.assert_array_equal(boundaries, expected.frame_boundaries)
        closed = [c.event for result in results for c in result.events if c.state == "close"]
        closed.sort(key=lambda event: (event.onset, model.labels.index(event.event_label)))
        assert closed == expected.events
        heard += len(closed)
    assert heard or len(seeds) == 1


def test_a_gap_ends_what_came_before_and_is_marked():
    first, second = sound(12.3, 16000, 1), sound(4.4, 16000, 2)
    model = Predictor("default", backend="onnxruntime", threads=1, decoding=EAGER)
    stream = model.stream(16000)
    results = [*stream.feed(first), *stream.gap(60.5), *stream.feed(second), *stream.finish()]
    [gap] = [result.gap for result in results if result.gap]
    assert (gap.start, gap.duration) == (12.3, 60.5)
    events = [c.event for result in results for c in result.events if c.state == "close"]
    parts = [offline(part, 16000, 1.0, DEFAULT_LOOKAHEAD, EAGER) for part in (first, second)]
    shifted = [dataclasses.replace(e, onset=72.8 + e.onset, offset=72.8 + e.offset) for e in parts[1].events]
    assert sorted(map(key, events)) == sorted(map(key, [*parts[0].events, *shifted]))
    ids = [c.id for result in results for c in result.events if c.state == "open"]
    assert ids == list(range(1, len(events) + 1))
    assert stream.state.received_seconds == pytest.approx(77.2)
    known = [(r.start, r.end) for r in results if r.end > r.start]
    assert known[0][0] == 0 and known[-1][1] == pytest.approx(77.2)
    assert sum(end - start for start, end in known) == pytest.approx(12.3 + 4.4)


def key(event):
    return event.event_label, round(event.onset, 9), round(event.offset, 9), event.probability


def test_silence_between_two_gaps_and_an_empty_stream():
    stream = LiveStream(predictor().config, 32000)
    assert stream.push(np.zeros(0, np.float32)) == []
    work = [*stream.gap(2.0), *stream.gap(3.0), *stream.finish()]
    assert [type(item) for item in work] == [SectionEnd] * 3
    results = [stream.apply(item) for item in work]
    assert [(r.start, r.end, r.events) for r in results] == [(0, 0, []), (2, 2, []), (5, 5, [])]
    assert [r.gap and (r.gap.start, r.gap.duration) for r in results] == [(0, 2), (2, 3), None]
    with pytest.raises(ValueError, match="finished"):
        stream.push(np.zeros(1, np.float32))


def test_memory_is_bounded():
    """What a stream holds after an hour is what it holds after a minute."""
    config = predictor().config
    stream = LiveStream(config, 32000)
    block = np.zeros(32000, np.float32)
    clip = np.full(len(config.labels), -9, np.float32)
    frames = np.full((config.heard_tokens, len(config.labels)), -9, np.float32)

    def held() -> int:
        section = stream._sections[0]
        parts = [*section.chunker._held, *section.framewise._stitcher._pages, section.decoder._rows]
        return sum(part.nbytes for part in parts)

    sizes = []
    for second in range(1800):
        for item in stream.push(block):
            stream.apply(item, clip, frames)
        if second > 30:
            sizes.append(held())
    assert max(sizes[-600:]) <= max(sizes[:600]) + 10_000


def test_bad_samples_lose_nothing():
    stream = LiveStream(predictor().config, 16000)
    stream.push(np.zeros(8000, np.float32))
    with pytest.raises(AudioError, match=r"sample at 0\.500 s is NaN or infinite"):
        stream.push(np.full(10, np.inf, np.float32))
    with pytest.raises(AudioError, match="exceed"):
        stream.push(np.full(10, 1e20, np.float32))
    with pytest.raises(ValueError, match=r"\(num_samples,\)"):
        stream.push(np.zeros((10, 2), np.float32))
    assert stream.received_seconds == 0.5
    with pytest.raises(UsageError, match="sample rate"):
        LiveStream(predictor().config, 0)
    with pytest.raises(ConfigError, match="together exceed a chunk"):
        LiveStream(predictor().config, 16000, hop_seconds=6, lookahead_seconds=6)
    with pytest.raises(ValueError, match="needs what the network says"):
        stream.apply(Chunk(np.zeros(320000, np.float32), 0, 0, 1, answers=range(26)))


def test_messages():
    stream = Predictor("default", backend="onnxruntime", threads=1, decoding=EAGER).stream(16000)
    first = start_message(stream.state, "default")
    assert first["type"] == "start" and first["labels"] == stream.state.labels and first["hop_seconds"] == 26 / 25.6
    results = [*stream.feed(sound(5, 16000, 3)), *stream.gap(1.5)]
    messages = [m for r in results for m in live_messages(r, stream.state.labels, top=2, posteriors=True)]
    assert [m for m in messages if m["type"] == "gap"] == [{"type": "gap", "start": 5.0, "duration": 1.5}]
    rows = [row for m in messages if m["type"] == "frames" for row in m["posteriors"]]
    assert len(rows) == 128 and all(len(row) == len(stream.state.labels) for row in rows)
    assert all(len(m["tags"]) == 2 for m in messages if m["type"] == "progress")
