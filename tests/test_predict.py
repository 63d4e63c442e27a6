"""The whole path of a recording, against tones at known times and against the network called directly."""

import contextlib
import io
import os
import threading
import time

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE, TOKEN, ToneBackend, sound, tiny_config, write_checkpoint, write_sound

import htsat.predict
from htsat.audio.chunk import chunk_stream
from htsat.audio.decode import AudioReader
from htsat.audio.resample import resample
from htsat.backends import SparingBackend
from htsat.config import DecodingConfig, InferenceConfig
from htsat.errors import AudioError, UsageError
from htsat.formats import read_events
from htsat.hearing import sigmoid, softmax
from htsat.predict import Predictor

EVENTS = {
    1: [("low", 0.35, 0.9)],
    7: [("low", 0.0, 1.2), ("high", 3.1, 3.9), ("low", 5.5, 7.0)],
    10: [("high", 0.0, 10.0), ("low", 4.0, 4.7)],
    25: [("low", 9.5, 10.5), ("high", 14.2, 16.1), ("low", 24.0, 25.0)],
    600: [("low", 0.0, 0.6), ("high", 299.0, 312.5), ("low", 431.0, 432.0), ("low", 599.2, 600.0)],
}


def as_tuples(events):
    return [(e.event_label, e.onset, e.offset) for e in events]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint):
    return Predictor(tiny_checkpoint, device="cpu")


# --- known events --------------------------------------------------------------------------------


@pytest.mark.parametrize(("duration", "sample_rate"), [*((d, 16000) for d in EVENTS), (25, 44100), (10, RATE)])
def test_events_are_found_at_their_times(tone_predictor, tmp_path, duration, sample_rate):
    truth = EVENTS[duration]
    mono = sound(duration, truth, sample_rate)
    stereo = np.stack([mono, mono], axis=1) if duration < 600 else mono
    soundfile.write(tmp_path / "a.flac", stereo, sample_rate)
    prediction = tone_predictor().predict(tmp_path / "a.flac", spectrogram=False)
    assert prediction.duration == pytest.approx(duration, abs=1e-4)
    assert prediction.frame_boundaries[-1] == prediction.duration
    assert prediction.framewise_posteriors.shape == (len(prediction.frame_boundaries) - 1, 2)
    assert sorted(e.event_label for e in prediction.events) == sorted(label for label, *_ in truth)
    for found, (label, onset, offset) in zip(prediction.events, sorted(truth, key=lambda t: t[1]), strict=True):
        assert found.event_label == label
        # a token belongs to an event that fills half of it
        assert abs(found.onset - onset) <= TOKEN / 2 + 1e-3 and abs(found.offset - offset) <= TOKEN / 2 + 1e-3
        assert found.probability == pytest.approx(1 / (1 + np.exp(-6)), abs=1e-6)
    present = {label for label, *_ in truth}
    assert {t.label for t in prediction.tags if t.probability > 0.5} == present
    assert [t.probability for t in prediction.tags] == sorted((t.probability for t in prediction.tags), reverse=True)


def test_model_of_another_rate(tone_predictor, tmp_path):
    path = write_sound(tmp_path / "a.wav", 25, EVENTS[25], 48000)
    events = as_tuples(tone_predictor(sample_rate=16000).predict(path).events)
    assert events == as_tuples(tone_predictor().predict(path).events) and len(events) == 3


@pytest.mark.parametrize("shift", [1, 7, 16, 33])
def test_shifting_the_sound_shifts_the_events(tone_predictor, shift):
    predictor = tone_predictor()
    waveform = sound(22, [("low", 2.0, 3.0), ("high", 9.0, 12.0)])
    later = np.concatenate([np.zeros(shift * 2500, dtype=np.float32), waveform])
    before, after = predictor.predict((waveform, RATE)), predictor.predict((later, RATE))
    assert len(before.events) == 2
    expected = [(label, a + shift * TOKEN, b + shift * TOKEN) for label, a, b in as_tuples(before.events)]
    assert as_tuples(after.events) == expected
    np.testing.assert_array_equal(after.framewise_posteriors[shift:], before.framewise_posteriors)


def test_a_concatenation_has_the_events_of_its_parts(tone_predictor):
    predictor = tone_predictor()
    first = sound(12.5, [("low", 1.0, 2.0), ("high", 11.0, 12.0)])  # 40 tokens
    second = sound(4.1, [("high", 1.0, 2.0), ("low", 3.0, 4.0)])
    whole = predictor.predict((np.concatenate([first, second]), RATE))
    a, b = (predictor.predict((part, RATE)) for part in (first, second))
    moved = [(label, onset + 12.5, offset + 12.5) for label, onset, offset in as_tuples(b.events)]
    assert as_tuples(whole.events) == as_tuples(a.events) + moved and len(moved) == 2
    parts = np.concatenate([a.framewise_posteriors, b.framewise_posteriors])
    np.testing.assert_array_equal(whole.framewise_posteriors, parts)


def test_decoding_settings_decide_what_is_an_event(tone_predictor):
    waveform = sound(20, [("low", 2.0, 3.0), ("low", 5.0, 6.0), ("high", 12.0, 12.5)])
    plain = tone_predictor()
    merging = tone_predictor(decoding=DecodingConfig(min_gap=3.0, per_class={"high": {"min_duration": 2.0}}))
    assert [e.event_label for e in plain.predict((waveform, RATE)).events] == ["low", "low", "high"]
    assert [e.event_label for e in merging.predict((waveform, RATE)).events] == ["low"]


@pytest.mark.parametrize(("rule", "expected"), [("max", 1.0), ("mean", 0.25), ("top", 1.0)])
def test_clip_posteriors_are_pooled_over_chunks(tone_predictor, rule, expected):
    # four chunks without overlap, the tone is in the second
    predictor = tone_predictor(inference=InferenceConfig(hop_seconds=10.0, clip_pooling=rule))
    prediction = predictor.predict((sound(40, [("low", 12.0, 14.0)]), RATE))
    on, off = 1 / (1 + np.exp(-6)), 1 / (1 + np.exp(6))
    assert prediction.clipwise_posteriors[0] == pytest.approx(expected * on + (1 - expected) * off, abs=1e-6)
    assert prediction.clipwise_posteriors[1] == pytest.approx(off, abs=1e-6)


# --- the network ---------------------------------------------------------------------------------


def direct(network, waveform, **settings):
    with torch.inference_mode():
        return network(torch.from_numpy(waveform[None]), **settings)


@pytest.mark.parametrize(
    ("seconds", "short"), [(10.0, "pad"), (10.0, "native"), (3.0, "pad"), (3.0, "tile"), (3.0, "native")]
)
def test_one_chunk_is_what_the_network_says(tiny_checkpoint, seconds, short):
    predictor = Predictor(tiny_checkpoint, device="cpu", inference=InferenceConfig(short=short))
    waveform = sound(seconds, [("low", 1.0, 2.0)])
    output = direct(predictor.model, waveform, fit=short)
    prediction = predictor.predict((waveform, RATE))
    assert prediction.framewise_posteriors.std() > 0.05  # or anything would agree
    np.testing.assert_allclose(prediction.clipwise_posteriors, output.clipwise_logits[0].sigmoid(), atol=1e-6)
    np.testing.assert_allclose(prediction.framewise_posteriors, output.framewise_logits[0].sigmoid(), atol=1e-6)
    np.testing.assert_allclose(prediction.embedding, output.embedding[0], atol=1e-5)
    if seconds == 3.0:
        other = direct(predictor.model, waveform, fit="tile" if short == "pad" else "pad")
        assert abs(other.framewise_logits[0].sigmoid().numpy() - prediction.framewise_posteriors).max() > 1e-3


def test_a_short_recording_at_its_own_size(tiny_checkpoint, tmp_path):
    """Tags and events of a file of 3 s are those of the network given half a chunk, cut to the recording."""
    inference, decoding = InferenceConfig(short="native"), DecodingConfig(threshold=0.5)
    predictor = Predictor(tiny_checkpoint, device="cpu", inference=inference, decoding=decoding)
    path = write_sound(tmp_path / "a.wav", 3, [("low", 1.0, 2.0)], RATE, subtype="FLOAT")
    waveform, _ = soundfile.read(path, dtype="float32")
    half = np.pad(waveform, (0, 2 * RATE))
    with torch.inference_mode():
        network = predictor.model
        tokens = network.encode(network.normalise(network.stretch(network.frontend(torch.from_numpy(half)[None]), 128)))
        clipwise, framewise = network.classify(tokens)
    prediction = predictor.predict(path)
    assert prediction.framewise_posteriors.shape == (10, 2) and prediction.frame_boundaries[-1] == 3.0
    np.testing.assert_allclose(prediction.framewise_posteriors, framewise[0, :10].sigmoid(), atol=1e-6)
    np.testing.assert_allclose(prediction.clipwise_posteriors, clipwise[0].sigmoid(), atol=1e-6)
    on = prediction.framewise_posteriors >= 0.5
    for label, column in zip(predictor.labels, on.T, strict=True):
        covered = np.zeros(10, bool)
        for event in (e for e in prediction.events if e.event_label == label):
            covered[round(event.onset / TOKEN) : int(np.ceil(event.offset / TOKEN - 1e-6))] = True
        np.testing.assert_array_equal(covered, column)
    assert 0 < on.sum() < on.size


def test_recordings_longer_than_a_chunk_have_no_size_of_their_own(tiny_checkpoint, tiny):
    waveform = sound(11, [("low", 3.0, 9.0)])
    native = Predictor(tiny_checkpoint, device="cpu", inference=InferenceConfig(short="native"))
    a, b = native.predict((waveform, RATE)), tiny.predict((waveform, RATE))
    np.testing.assert_array_equal(a.framewise_posteriors, b.framewise_posteriors)


def test_a_clip_alone_is_the_clip_in_a_batch(tiny):
    clips = np.stack([sound(10, [("low", 1.0 + i, 3.0 + i)], seed=i) for i in range(4)])
    with torch.inference_mode():
        batch = tiny.model(torch.from_numpy(clips)).framewise_logits.sigmoid().numpy()
    for clip, expected in zip(clips, batch, strict=True):
        np.testing.assert_allclose(tiny.predict((clip, RATE)).framewise_posteriors, expected, atol=1e-6)


def test_shift_by_the_hop_of_the_chunks(tiny):
    waveform = sound(30, [("low", 3.0, 9.0), ("high", 12.0, 19.0), ("low", 22.0, 27.0)])
    whole, tail = tiny.predict((waveform, RATE)), tiny.predict((waveform[5 * RATE :], RATE))
    assert whole.framewise_posteriors.shape == (96, 2) and tail.framewise_posteriors.shape == (80, 2)
    # 16 tokens are a hop; the first hop of the tail has lost the chunk that began before it
    np.testing.assert_allclose(tail.framewise_posteriors[16:], whole.framewise_posteriors[32:], atol=1e-6)
    assert abs(tail.framewise_posteriors[:16] - whole.framewise_posteriors[16:32]).max() > 1e-3


def test_long_recordings_blend_their_chunks(tiny):
    waveform = sound(17, [("low", 3.0, 9.0)])
    expected, weight = np.zeros((55, 2)), np.zeros((55, 1))
    ramp = np.minimum(np.arange(32), np.arange(32)[::-1])[:, None] + 0.5
    for chunk in chunk_stream([waveform], 80000, 32, 16, "pad"):
        rows = direct(tiny.model, chunk.samples).framewise_logits[0].sigmoid().numpy()
        at = slice(chunk.start_token, chunk.start_token + 32)
        expected[at] += ramp * rows
        weight[at] += ramp
    np.testing.assert_allclose(tiny.predict((waveform, RATE)).framewise_posteriors, expected / weight, atol=1e-6)


def test_batch_size_does_not_matter(tiny_checkpoint):
    waveform = sound(47, [("low", 3.0, 9.0), ("high", 30.0, 44.0)])
    results = [Predictor(tiny_checkpoint, device="cpu", batch_size=n).predict((waveform, RATE)) for n in (1, 4, 100)]
    for other in results[1:]:
        np.testing.assert_allclose(other.framewise_posteriors, results[0].framewise_posteriors, atol=1e-6)
        np.testing.assert_allclose(other.clipwise_posteriors, results[0].clipwise_posteriors, atol=1e-6)
        np.testing.assert_allclose(other.embedding, results[0].embedding, atol=1e-5)
    with pytest.raises(UsageError, match="batch_size"):
        Predictor(tiny_checkpoint, batch_size=0)


@pytest.mark.parametrize("block_seconds", [0.37, 3.3, 60.0])
def test_blocks_of_decoding_do_not_matter(tiny, monkeypatch, block_seconds):
    waveform = sound(23, [("low", 3.0, 9.0)], 44100)
    before = tiny.predict((waveform, 44100))
    monkeypatch.setattr(htsat.predict, "resample", lambda reader, rate: resample(reader, rate, block_seconds))
    after = tiny.predict((waveform, 44100))
    np.testing.assert_array_equal(after.framewise_posteriors, before.framewise_posteriors)
    np.testing.assert_allclose(after.overview.spectrogram, before.overview.spectrogram, atol=1e-3)


def test_every_kind_of_source_gives_the_same(tiny, tmp_path):
    path = write_sound(tmp_path / "a.wav", 12, [("low", 3.0, 9.0)], RATE, subtype="FLOAT")
    waveform, _ = soundfile.read(path, dtype="float32")
    with open(path, "rb") as stream:
        sources = [path, str(path), path.read_bytes(), stream, io.BytesIO(path.read_bytes()), (waveform, RATE)]
        predictions = [tiny.predict(source) for source in sources]
    for other in predictions[1:]:
        np.testing.assert_array_equal(other.framewise_posteriors, predictions[0].framewise_posteriors)
    assert [p.file for p in predictions] == [*[str(path)] * 2, "<bytes>", str(path), "<stream>", "<waveform>"]
    assert tiny.predict(path, name="street").file == "street"


def test_single_label_is_softmax(tmp_path):
    labels = ("dog", "rain", "bell")
    path = write_checkpoint(tmp_path / "s.safetensors", tiny_config(labels, objective="single_label"))
    predictor = Predictor(path, device="cpu")
    waveform = sound(10, [("low", 2.0, 5.0)])
    output = direct(predictor.model, waveform)
    prediction = predictor.predict((waveform, RATE))
    np.testing.assert_allclose(prediction.clipwise_posteriors, output.clipwise_logits[0].softmax(-1), atol=1e-6)
    np.testing.assert_allclose(prediction.framewise_posteriors, output.framewise_logits[0].sigmoid(), atol=1e-6)


def test_encoder_gives_embeddings_only(tmp_path):
    path = write_checkpoint(tmp_path / "encoder.safetensors", tiny_config(()))
    predictor = Predictor(path, device="cpu")
    prediction = predictor.predict((sound(10, []), RATE))
    assert prediction.tags == [] and prediction.events == [] and prediction.framewise_posteriors.shape == (32, 0)
    np.testing.assert_allclose(prediction.embedding, direct(predictor.model, sound(10, [])).embedding[0], atol=1e-5)


@pytest.mark.parametrize("sample_rate", [11025, 22050, 44100])
def test_tokens_of_a_fractional_number_of_samples(tone_predictor, sample_rate):
    predictor = tone_predictor(sample_rate=sample_rate)
    predictor._backend = lambda chunks: tuple(np.zeros((len(chunks), *shape)) for shape in ((2,), (32, 2), (3,)))
    edge = sample_rate * TOKEN
    for tokens in (1, 2, 3, 31, 32, 33, 70):
        for count in {int(tokens * edge) - 1, int(tokens * edge), int(tokens * edge) + 1, int(tokens * edge) + 2}:
            prediction = predictor.predict((np.zeros(count), sample_rate), spectrogram=False)
            assert prediction.duration == count / sample_rate == prediction.frame_boundaries[-1]
            assert len(prediction.framewise_posteriors) == pytest.approx(count / edge + 0.5, abs=0.501)


# --- numbers -------------------------------------------------------------------------------------


def test_posteriors_of_extreme_logits():
    logits = np.array([-1000.0, -80.0, -30.0, -9.0, 0.0, 2.0, 30.0, 1000.0], dtype=np.float32)
    exact = 1 / (1 + np.exp(-logits[1:-1].astype(np.float64)))
    np.testing.assert_allclose(sigmoid(logits)[1:-1], exact, rtol=1e-6)  # small ones too: ranks depend on them
    assert sigmoid(logits)[0] == 0 and sigmoid(logits)[-1] == 1 and sigmoid(logits).dtype == np.float32
    assert np.all(np.diff(sigmoid(np.linspace(-80, 10, 1000, dtype=np.float32))) > 0)
    rows = np.array([[1000.0, 999.0], [-1000.0, -1000.0]], dtype=np.float32)
    np.testing.assert_allclose(softmax(rows), [[1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))], [0.5, 0.5]], rtol=1e-6)


def test_silence_and_a_single_sample(tiny):
    assert np.isfinite(tiny.predict((np.zeros(RATE * 12), RATE)).framewise_posteriors).all()
    prediction = tiny.predict((np.ones(1), 384000))
    assert prediction.duration == 1 / RATE and prediction.framewise_posteriors.shape == (1, 2)


def test_levels(tiny):
    waveform = sound(12, [])
    assert np.isfinite(tiny.predict((waveform * 2.0**31, RATE)).clipwise_posteriors).all()
    for sample in (1e20, -3e38):
        waveform[RATE * 11] = sample
        with pytest.raises(AudioError, match=r"loud: samples after \d+ s exceed .*export"):
            tiny.predict((waveform, RATE), name="loud")


# --- running -------------------------------------------------------------------------------------


def test_progress(tone_predictor):
    heard = []
    waveform = np.zeros(RATE * 33)
    tone_predictor(batch_size=2).predict((waveform, RATE), on_progress=lambda *args: heard.append(args))
    # chunks at 0, 5, 10, 15, 20 and, reaching the end, 23.125 s
    assert heard == [(15.0, 33.0), (25.0, 33.0), (33.0, 33.0)]


class Rationed(ToneBackend):
    """Notes at each call how many samples were read by then, after waiting for the reader to come ahead and stop."""

    def __init__(self, config, read):
        super().__init__(config)
        self.read, self.seen = read, []

    def __call__(self, chunks):
        # A busy machine may hold the reader up: what it must come to is waited for, however long within reason.
        ahead = min(25 + 10 * len(self.seen), 120) * RATE
        patience = time.monotonic() + 20
        while self.read[0] < ahead and time.monotonic() < patience:
            time.sleep(0.01)
        last, still = -1, 0
        while still < 10:  # the reader stands still for 0.1 s
            still = still + 1 if self.read[0] == last else 0
            last = self.read[0]
            time.sleep(0.01)
        self.seen.append(last)
        return super().__call__(chunks)


def test_decoding_runs_ahead_but_not_away(tone_predictor, monkeypatch):
    read = [0]

    def counting(reader, rate):
        for block in resample(reader, rate, 1.0):
            read[0] += len(block)
            yield block

    monkeypatch.setattr(htsat.predict, "resample", counting)
    predictor = tone_predictor(batch_size=2)
    predictor._backend = Rationed(predictor.config, read)
    predictor.predict((np.zeros(RATE * 120), RATE))
    seconds = np.array(predictor._backend.seen) / RATE
    needed = np.array([15 + 10 * i for i in range(len(seconds))])  # two chunks, each 5 s further
    early = slice(0, 8)
    assert np.all(seconds[early] >= needed[early] + 10), "the next batch is ready while this one is worked on"
    assert np.all(seconds[early] <= needed[early] + 25), "memory is bounded"


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failing_network_leaves_no_thread(tone_predictor, tmp_path, monkeypatch, error):
    path = write_sound(tmp_path / "a.wav", 200, [])
    predictor = tone_predictor()
    close, running = AudioReader.close, []

    def watched(reader):
        running.append([t for t in threading.enumerate() if t.name == "htsat-prefetch"])
        close(reader)

    monkeypatch.setattr(AudioReader, "close", watched)

    def fail(chunks):
        raise error

    predictor._backend = fail
    with pytest.raises(error):
        predictor.predict(path)
    assert running == [[]], "the decoder was freed under the thread that decodes"


def test_damage_in_the_middle(tone_predictor, tmp_path):
    path = write_sound(tmp_path / "a.wav", 30, EVENTS[25])
    path.write_bytes(path.read_bytes()[: 16000 * 2 * 20])
    with pytest.raises(AudioError, match=r"a\.wav: the file is truncated"):
        tone_predictor().predict(path)
    left = tone_predictor().predict(path, allow_truncated=True)
    assert left.duration == pytest.approx(20, abs=0.01) and [e.event_label for e in left.events] == ["low", "high"]


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to", "DefaultCPUAllocator: can't allocate memory: you"])
def test_too_little_memory(tone_predictor, message):
    predictor = tone_predictor()

    def fail(chunks):
        raise RuntimeError(message)

    predictor._backend = SparingBackend(fail)
    with pytest.raises(MemoryError, match="batch of 1"):
        predictor.predict((np.zeros(100), RATE))
    message = "shapes do not fit"
    with pytest.raises(RuntimeError, match="shapes"):
        predictor.predict((np.zeros(100), RATE))


def test_two_threads_may_share_a_predictor(tiny):
    waveforms = [sound(27, [("low", 2.0 + i, 9.0)], seed=i) for i in range(3)]
    expected = [tiny.predict((w, RATE)).framewise_posteriors for w in waveforms]
    found = [None] * 3

    def work(i):
        found[i] = tiny.predict((waveforms[i], RATE)).framewise_posteriors

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


# --- results -------------------------------------------------------------------------------------


def test_save(tone_predictor, tmp_path):
    prediction = tone_predictor().predict((sound(12, [("low", 2.0, 4.0)]), RATE), name="a.wav")
    for ending in ("tsv", "csv", "json"):
        prediction.save(tmp_path / f"x.{ending}")
        (read,) = read_events(tmp_path / f"x.{ending}")
        assert (read.file, [e.event_label for e in read.events]) == ("a.wav", ["low"])
        assert read.events[0].onset == pytest.approx(prediction.events[0].onset, abs=1e-3)
    prediction.save(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UsageError, match="ending"):
        prediction.save(tmp_path / "x.tvs")
    without = tone_predictor().predict((np.zeros(99), RATE), spectrogram=False)
    with pytest.raises(UsageError, match="spectrogram=True"):
        without.save(tmp_path / "y.png")
    assert not (tmp_path / "y.png").exists()
    assert "low" in str(prediction) and "1.875" in str(prediction)


@pytest.mark.parametrize("name", ["Straße 街 \u00a0.wav", os.fsdecode(b"caf\xe9.wav")])
def test_names_are_kept_as_given(tone_predictor, tmp_path, name):
    with contextlib.suppress(OSError):  # some file systems refuse such names
        path = write_sound(tmp_path / "a.wav", 2, EVENTS[1]).rename(tmp_path / name)
        prediction = tone_predictor().predict(path)
        assert prediction.file == str(path)
        prediction.save(tmp_path / "x.json")
        assert read_events(tmp_path / "x.json")[0].file == str(path)


# ------------------------------------------------------------------ many recordings at once


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    for i in range(9):
        soundfile.write(folder / f"{i}.wav", 0.1 * rng.standard_normal(16000 + 3000 * i), 16000)
    (folder / "4.wav").write_bytes(b"no recording")
    return [folder / f"{i}.wav" for i in range(9)]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_many_at_once_are_what_each_is_alone(clips, backend):
    at_once = htsat.Predictor("default", backend=backend, threads=3, jobs=3)
    told = []
    found = list(at_once.predict_many(clips, on_progress=lambda *state: told.append(state)))
    alone = htsat.Predictor("default", backend=backend, threads=1)
    assert [type(one).__name__ for one in found] == [*["Prediction"] * 4, "AudioError", *["Prediction"] * 4]
    for path, one in zip(clips, found, strict=True):
        if path.stem != "4":
            wanted = alone.predict(path)
            assert one.file == str(path) and one.events == wanted.events
            assert one.framewise_posteriors.tobytes() == wanted.framewise_posteriors.tobytes()
    assert {number for number, _, _ in told} == set(range(9)) - {4}


def test_many_are_read_a_few_ahead_and_stopped(clips):
    predictor = htsat.Predictor("default", threads=2, jobs=2)
    taken = []

    def sources():
        for path in clips * 10:
            taken.append(path)
            yield path

    results = predictor.predict_many(sources())
    next(results)
    assert len(taken) <= 6
    results.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("htsat-p")]


def test_a_stop_does_not_wait_for_the_end(tmp_path):
    """Closing it while an hour is being heard ends at the next batch."""
    soundfile.write(tmp_path / "hour.wav", np.zeros(3600 * 4000, np.int16), 4000)
    soundfile.write(tmp_path / "short.wav", np.zeros(4000, np.int16), 4000)
    reached = []
    predictor = htsat.Predictor("default", threads=2, jobs=2, batch_size=1)
    results = predictor.predict_many(
        [tmp_path / "short.wav", tmp_path / "hour.wav"], on_progress=lambda _, done, __: reached.append(done)
    )
    next(results)
    results.close()
    assert max(reached) < 1800


def test_threads_are_shared_by_the_jobs(monkeypatch):
    given = []

    def backend(path, config, *, threads):
        given.append(threads)
        return htsat.model.exported.OnnxBackend(path, config, threads=1)

    monkeypatch.setattr("htsat.backends.OnnxBackend", backend)
    monkeypatch.setattr("htsat.backends.cores", lambda: 16)
    for settings in (
        {}, {"threads": 4}, {"jobs": "auto"}, {"jobs": "auto", "recordings": 2}, {"jobs": 5}, {"jobs": 3, "threads": 2},
        {"jobs": "auto", "recordings": 1},
    ):  # fmt: skip
        htsat.Predictor("default", backend="onnxruntime", **settings)
    assert given == [16, 4, 1, 8, 3, 1, 16]
    with pytest.raises(UsageError, match="jobs must be at least 1, got 0"):
        htsat.Predictor("default", jobs=0)


def test_pytorch_takes_one_job_by_itself(tiny_checkpoint):
    assert htsat.Predictor(tiny_checkpoint, jobs="auto")._jobs == 1
