"""Finer time by hearing a recording several times, moved by parts of a token: edges, borders, lengths, memory."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from conftest import RATE, TOKEN, tiny_config, write_checkpoint, write_sound

import htsat.hearing
from htsat import Predictor
from htsat.audio.chunk import Stitcher, chunk_stream, num_tokens, token_sample
from htsat.config import CheckpointConfig, InferenceConfig, from_dict
from htsat.errors import ConfigError, UsageError
from htsat.evaluation.listen import Listening, waveform_posteriors
from htsat.hearing import centred, heard_chunks, sigmoid

#: tokens of a chunk of ``tiny_config``
TOKENS = 32


class Gauge:
    """A network that says of each token which part of its samples are 1, and knows nothing of the other tokens."""

    def __init__(self, config):
        self._samples = config.chunk_samples // config.num_tokens

    def __call__(self, chunks):
        part = chunks.reshape(len(chunks), -1, self._samples).mean(axis=2)
        frames = np.stack([12 * (part - 0.5), np.full_like(part, -9)], axis=2).astype(np.float32)
        return frames.max(axis=1), frames, part[:, :1].astype(np.float32)


@pytest.fixture
def gauge(tiny_checkpoint):
    def make(**inference):
        predictor = Predictor(tiny_checkpoint, device="cpu", inference=InferenceConfig(**inference), batch_size=3)
        predictor._backend = Gauge(predictor.config)
        return predictor

    return make


def activity(seconds, events):
    time = (np.arange(round(seconds * RATE)) + 0.5) / RATE
    return sum(((time > onset) & (time < offset)).astype(np.float32) for onset, offset in events)


def found(predictor, waveform):
    prediction = predictor.predict((waveform, RATE), spectrogram=False)
    return [(event.onset, event.offset) for event in prediction.events]


@pytest.mark.parametrize("shifts", [1, 2, 3, 4, 5, 8, 25])
@pytest.mark.parametrize(("seconds", "hop"), [(10.0, 5.0), (3.3, 5.0), (27.7, 5.0), (41.0, 10.0), (33.3, 3.1)])
def test_edges_at_parts_of_a_token_are_found_exactly(gauge, shifts, seconds, hop):
    step = TOKEN / shifts
    rng = np.random.default_rng(shifts)
    events, frame = [], int(rng.integers(0, 2 * shifts))
    # Not the last token: what is said of its second half is what is said of it as a whole.
    while (frame + 4 * shifts) * step < seconds - TOKEN:
        length = int(rng.integers(max(1, round(0.7 * shifts)), 3 * shifts + 1))
        events.append((frame * step, (frame + length) * step))
        frame += length + int(rng.integers(shifts, 3 * shifts + 1))
    assert found(gauge(shifts=shifts, hop_seconds=hop), activity(seconds, events)) == pytest.approx(
        np.array(events), abs=1e-9
    )


@pytest.mark.parametrize("shifts", [2, 3, 8])
@pytest.mark.parametrize("seconds", [0.2, 4.0, 10.0, 12.3])
def test_events_reach_both_ends_of_a_recording(gauge, shifts, seconds):
    predictor = gauge(shifts=shifts)
    prediction = predictor.predict((np.ones(round(seconds * RATE), np.float32), RATE), spectrogram=False)
    step = TOKEN / shifts
    if seconds > TOKEN:
        (event,) = prediction.events
        # Of a last frame that the recording does not reach the middle of, most is silence.
        assert event.onset == 0 and event.offset in (seconds, seconds // step * step)
    assert len(prediction.framewise_posteriors) == -(-round(seconds * RATE) * shifts // round(TOKEN * RATE))
    np.testing.assert_allclose(prediction.frame_boundaries[:-1], np.arange(len(prediction.framewise_posteriors)) * step)
    assert prediction.frame_boundaries[-1] == seconds


def test_the_last_half_token_of_a_full_chunk_says_what_its_last_token_says(gauge):
    step = TOKEN / 8
    for frames, expected in ((1, []), (5, [(10 - 5 * step, 10.0)])):
        assert found(gauge(shifts=8), activity(10, [(10 - frames * step, 10)])) == expected


@pytest.mark.parametrize("shifts", [1, 3, 4])
def test_models_heard_at_native_size(tiny_checkpoint, shifts):
    """Parts of a chunk, without overlap: the borders between them are no borders of what is said."""
    config = dataclasses.replace(
        tiny_config(), inference=InferenceConfig(short="native", chunk_part=2, hop_seconds=5.0, shifts=shifts)
    )
    assert config.native_sizes[:2] == (1, 2)
    step = TOKEN / shifts
    for seconds in (1.3, 5.0, 13.0):
        events = [(2 * step, (2 + 2 * shifts) * step)]
        if seconds > 10:
            events += [(5 - TOKEN, 5 + step), (10 + step, 10 + 2 * TOKEN)]
        predictor = Predictor(tiny_checkpoint, device="cpu", inference=config.inference)
        predictor._backend = Gauge(predictor.config)
        assert found(predictor, activity(seconds, events)) == pytest.approx(np.array(events), abs=1e-9)


# ---------------------------------------------------------------- chunks


@pytest.mark.parametrize("short", ["pad", "tile"])
@pytest.mark.parametrize("count", [1, 7, 99, 100, 101, 260, 1000])
@pytest.mark.parametrize(
    ("chunk", "tokens", "hop", "shifts"), [(100, 8, 4, 4), (100, 7, 7, 3), (64, 4, 1, 16), (9, 1, 1, 9)]
)
def test_moved_chunks_are_the_recording_a_little_earlier(short, count, chunk, tokens, hop, shifts):
    recording = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    # Around the recording: silence, or repetitions of one that is not longer than a chunk.
    wide = np.tile(recording, 2 * (chunk // count + 2))
    zero = count * (chunk // count + 2)
    if short == "pad" or count >= chunk:
        wide, zero = np.concatenate([np.zeros(chunk), recording, np.zeros(2 * chunk)]), chunk
    plain = list(chunk_stream([recording], chunk, tokens, hop, short))
    for blocks in ([recording], np.array_split(recording, 1 + count // 13)):
        moved = list(chunk_stream(blocks, chunk, tokens, hop, short, shifts))
        assert [(c.start_token, c.shift) for c in moved] == [
            (c.start_token, shift) for c in plain for shift in reversed(range(shifts))
        ]
        for one in moved:
            assert one.start_sample == token_sample(one.start_token * shifts - one.shift, chunk, tokens * shifts)
            at = zero + one.start_sample
            np.testing.assert_array_equal(one.samples, wide[at : at + chunk].astype(np.float32))
        for one, unmoved in zip(plain, moved[shifts - 1 :: shifts], strict=True):
            assert (one.start_sample, one.length) == (unmoved.start_sample, unmoved.length)
            assert one.samples.tobytes() == unmoved.samples.tobytes()


def test_chunks_refuse_shifts_below_a_sample():
    with pytest.raises(ValueError, match=r"shifts must be 1 to 12 \(samples of a token\), got 13"):
        chunk_stream([], 100, 8, 4, "pad", 13)
    with pytest.raises(ValueError, match="got 0"):
        chunk_stream([], 100, 8, 4, "pad", 0)


# ---------------------------------------------------------------- the rule


@pytest.mark.parametrize("shifts", range(1, 10))
@pytest.mark.parametrize("missing", [0, 3])
def test_a_frame_gets_the_tokens_with_the_nearest_middles(monkeypatch, shifts, missing):
    monkeypatch.setattr(htsat.hearing, "_ROWS_AT_ONCE", 7)
    frames = 40
    rows = np.random.default_rng(shifts).random((frames + max(0, shifts // 2 - missing), 2)).astype(np.float32)
    middles = np.arange(len(rows)) - (shifts - 1) + shifts / 2
    expected = []
    for frame in range(frames):
        distance = np.round(abs(middles - (frame + 0.5)), 6)
        nearest = rows[distance == distance.min()]
        # An even number of frames has two tokens at the same distance, and the last stands for one that is missing.
        expected.append(nearest.mean(axis=0))
    np.testing.assert_allclose(centred(rows.copy(), frames, shifts), expected, rtol=1e-6)


def test_one_hearing_gives_exactly_what_a_token_says(tmp_path):
    """The same as chunks stitched on the grid of tokens, bit for bit."""
    path = write_checkpoint(tmp_path / "m.safetensors", tiny_config())
    predictor = Predictor(path, device="cpu", batch_size=1, threads=1)
    for seconds in (3.0, 10.0, 23.4):
        waveform = np.random.default_rng(1).standard_normal(round(seconds * RATE)).astype(np.float32)
        stitcher = Stitcher(2, TOKENS)
        for chunk in chunk_stream([waveform], 10 * RATE, TOKENS, 16, "pad"):
            stitcher.add(chunk.start_token, sigmoid(predictor._backend(chunk.samples[None])[1][0]))
        expected = stitcher.finish(num_tokens(len(waveform), 10 * RATE, TOKENS))
        once = predictor.predict((waveform, RATE), spectrogram=False)
        assert once.framewise_posteriors.tobytes() == expected.tobytes()
        before = predictor.config
        predictor.config = dataclasses.replace(before, inference=InferenceConfig(shifts=4))
        often = predictor.predict((waveform, RATE), spectrogram=False)
        predictor.config = before
        # What sounds does not depend on when.
        assert often.clipwise_posteriors.tobytes() == once.clipwise_posteriors.tobytes()
        assert often.embedding.tobytes() == once.embedding.tobytes()
        assert often.tags == once.tags
        # Two of four tokens have their middles at the middles of frames 1 and 2 of four, so that they mix.
        assert len(often.framewise_posteriors) in (4 * len(once.framewise_posteriors) - i for i in range(4))


def test_evaluation_hears_the_same(tmp_path):
    path = write_checkpoint(tmp_path / "m.safetensors", tiny_config(inference=InferenceConfig(shifts=3)))
    predictor = Predictor(path, device="cpu", batch_size=1, threads=1)
    waveforms = [np.random.default_rng(i).standard_normal(n).astype(np.float32) for i, n in enumerate((20000, 190001))]
    for listening in (
        Listening(events=True, batch_size=1),
        Listening(events=True, batch_size=1, time_shifts=6),
        Listening(events=True, batch_size=1, time_shifts=1),
        Listening(events=True, batch_size=1, shifts=2),
    ):
        shifts = listening.time_shifts or 3
        predictor.config = dataclasses.replace(predictor.config, inference=InferenceConfig(shifts=shifts))
        for waveform, one in zip(waveforms, waveform_posteriors([predictor.model], waveforms, listening), strict=True):
            prediction = predictor.predict((waveform, RATE), spectrogram=False)
            assert list(one.events) == prediction.events and len(one.events) > 1
            if listening.shifts == 1:
                assert one.posteriors.tobytes() == prediction.clipwise_posteriors.tobytes()


def test_an_ensemble_may_be_heard_on_one_finer_grid(tmp_path):
    configs = [tiny_config(inference=InferenceConfig(shifts=shifts)) for shifts in (1, 4)]
    paths = [write_checkpoint(tmp_path / f"{i}.safetensors", config, seed=i) for i, config in enumerate(configs)]
    models = [Predictor(path, device="cpu").model for path in paths]
    waveform = np.ones(RATE, np.float32)
    with pytest.raises(UsageError, match="has other time steps than the first"):
        list(waveform_posteriors(models, [waveform], Listening(events=True)))
    assert len(list(waveform_posteriors(models, [waveform], Listening(events=True, time_shifts=2)))) == 1


def test_frames_are_made_in_the_memory_of_the_tokens():
    rows = np.full((400_000, 8), 0.25, np.float32)
    tracemalloc.start()
    frames = centred(rows, 399_000, 8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.shares_memory(frames, rows) and len(frames) == 399_000 and (frames == 0.25).all()
    assert peak < rows.nbytes / 8


# ---------------------------------------------------------------- settings


def test_settings_are_checked_and_stored(tmp_path):
    for value, message in ((0, "between 1 and 32"), (33, "between 1 and 32"), (2.5, "expected int")):
        with pytest.raises(ConfigError, match=message):
            from_dict(InferenceConfig, {"shifts": value}, "inference")
    coarse = tiny_config(sample_rate=1000)
    model = dataclasses.replace(coarse.model, chunk_seconds=0.5)
    with pytest.raises(ConfigError, match=r"shifts 32 gives 1024 time steps in 500 samples; choose at most 15"):
        CheckpointConfig(
            dataclasses.replace(coarse.frontend, hop_length=5, n_fft=64),
            model,
            labels=coarse.labels,
            inference=InferenceConfig(shifts=32, hop_seconds=0.5),
        )
    config = tiny_config(inference=InferenceConfig(shifts=4))
    path = write_checkpoint(tmp_path / "m.safetensors", config)
    assert Predictor(path).config.inference.shifts == 4
    assert config.heard_frames == 4 * TOKENS
    assert sum(1 for _ in heard_chunks([np.ones(RATE, np.float32)], config)) == 4
    for value in (0, 33):
        with pytest.raises(UsageError, match=f"time_shifts must be 1 to 32, got {value}"):
            Listening(time_shifts=value)


def test_commands(command, tmp_path):
    path = write_sound(tmp_path / "a.wav", 6.0, [("low", 1.25, 3.0)])
    code, out, _ = command("detect", path, "--format", "csv")
    assert code == 0 and ",1.25,3.125," in out
    code, out, _ = command("detect", path, "--format", "csv", "--shifts", "5")
    assert code == 0 and ",1.25,3.0," in out
    code, out, err = command("detect", path, "--shifts", "33")
    assert (code, out, len(err)) == (2, "", 1) and "--shifts" in err[0]
    assert command("tag", path)[0] == 0
