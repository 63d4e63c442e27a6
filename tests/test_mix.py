"""Scenes, targets and augmentation: hand-worked cases, and what the waveform itself says of a scene's events."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from htsat.config import from_dict
from htsat.data.augment import random_equaliser, spec_masks
from htsat.data.mix import MixConfig, SceneMixer, Source, at_speed, coloured_noise, faded, token_targets
from htsat.errors import ConfigError
from htsat.events import Event
from htsat.training.material import loud_part, turned, utterances

RATE = 1000
#: one placed event, digital silence behind it, as it was recorded
PLAIN = {"max_events": 1, "whole_clip": 0.0, "background": 0.0, "speed": 0.0}


def square(seconds, level=1.0):
    """A waveform that is never zero, whose RMS is its level."""
    return (level * np.where(np.arange(round(seconds * RATE)) // 5 % 2, 1, -1)).astype(np.float32)


def source(label="dog", seconds=1.0, parts=None, level=1.0):
    return Source(label, square(seconds, level), parts or ((0.0, seconds),))


def mixer(sources=None, backgrounds=(), seed=1, seconds=10.0, **settings):
    sources = [source()] if sources is None else sources
    return SceneMixer(
        sources, backgrounds, sample_rate=RATE, seconds=seconds, seed=seed, config=MixConfig(**(PLAIN | settings))
    )


def varied_mixer(seed=1):
    """Everything that a scene may hold."""
    rng = np.random.default_rng(0)
    sources = [
        source("dog", 0.3), source("cat", 4.0, ((0.5, 0.9), (1.0, 3.9))), source("rain", 12.0), source("rain", 0.05)
    ]  # fmt: skip
    backgrounds = [rng.standard_normal(n).astype(np.float32) for n in (30_000, 4_000)]
    return SceneMixer(sources, backgrounds, sample_rate=RATE, seconds=10.0, seed=seed, config=MixConfig())


# ------------------------------------------------------------------ scenes


def test_scene_depends_on_seed_and_index_only():
    first = varied_mixer()
    forward = {index: first.scene(index) for index in (0, 1, 2, 7, 1000)}
    backward = {index: varied_mixer().scene(index) for index in (1000, 7, 2, 1, 0)}
    again = first.scene(2)
    for index, (waveform, events) in forward.items():
        assert waveform.tobytes() == backward[index][0].tobytes()
        assert events == backward[index][1]
    assert again[0].tobytes() == forward[2][0].tobytes()
    different = [*forward.values(), *(varied_mixer(seed=2).scene(index) for index in forward)]
    assert len({waveform.tobytes() for waveform, _ in different}) == len(different)


def test_scenes_are_well_formed():
    mix = varied_mixer()
    sizes = Counter()
    for index in range(300):
        waveform, events = mix.scene(index)
        assert waveform.shape == (10 * RATE,) and waveform.dtype == np.float32
        assert np.isfinite(waveform).all() and np.abs(waveform).max() <= 1.0
        assert events == sorted(events, key=lambda e: e.onset)
        assert all(e.offset <= 10.0 and e.event_label in ("dog", "cat", "rain") for e in events)
        sizes[len(events)] += 1
    assert min(sizes) >= 1 and len(sizes) >= 4


def test_loud_scenes_are_scaled_not_clipped():
    sine = np.sin(2 * np.pi * 37 * np.arange(9 * RATE) / RATE).astype(np.float32)
    mix = mixer([Source("dog", sine, ((0.0, 9.0),))], min_snr_db=60, max_snr_db=60)
    for index in range(20):
        waveform, (event,) = mix.scene(index)
        inside = waveform[round(event.onset * RATE) + 20 : round(event.offset * RATE) - 20]
        # A sine stays one; cut off at its peaks it would have more power.
        assert np.abs(waveform).max() == 1.0 and np.mean(inside**2) == pytest.approx(0.5, abs=0.01)


def test_energy_of_an_event_lies_between_its_onset_and_its_offset():
    mix = mixer([source(seconds=1.2)])
    onsets = []
    for index in range(50):
        waveform, (event,) = mix.scene(index)
        sounding = np.flatnonzero(waveform)
        # The first and the last sample are the zeros of the fades.
        assert abs(sounding[0] / RATE - event.onset) <= 2 / RATE
        assert abs((sounding[-1] + 1) / RATE - event.offset) <= 2 / RATE
        assert event.duration == pytest.approx(1.2, abs=2 / RATE)
        onsets.append(event.onset)
    assert min(onsets) < 1.5 and max(onsets) > 7.0  # anywhere


@pytest.mark.parametrize("speed", [0.0, 0.5])
def test_parts_of_whole_clips_keep_their_place(speed):
    """The clip is silent outside its parts, so that the waveform tells where they came to lie."""
    parts = ((0.5, 0.8), (1.5, 1.9))
    waveform = np.zeros(2500, np.float32)
    for onset, offset in parts:
        waveform[round(onset * RATE) : round(offset * RATE)] = square(offset - onset)
    mix = mixer([Source("dog", waveform, parts)], whole_clip=1.0, speed=speed)
    durations = set()
    for index in range(60):
        scene, events = mix.scene(index)
        marked = np.zeros(len(scene) + 20, bool)
        for event in events:
            marked[max(0, round(event.onset * RATE) - 3) : round(event.offset * RATE) + 3] = True
            inside = scene[round(event.onset * RATE) + 3 : max(0, round(event.offset * RATE) - 3)]
            # A square wave at another speed passes through zero at its edges only.
            assert not len(inside) or np.mean(np.abs(inside) > 0) > 0.9
            durations.add(round(event.duration, 2))
        assert not scene[~marked[: len(scene)]].any()
    whole = {0.3, 0.4}
    assert whole <= durations
    assert (max(durations) > 0.45) == (speed > 0)


def test_sources_longer_than_the_scene():
    long = source(seconds=25.0, parts=((0.0, 3.0), (12.0, 25.0)))
    for whole_clip in (0.0, 1.0):
        mix = mixer([long], whole_clip=whole_clip, texture_min_seconds=12.5, texture_max_seconds=20.0)
        for index in range(40):
            waveform, events = mix.scene(index)
            assert len(waveform) == 10 * RATE and events
            assert all(event.offset <= 10.0 for event in events)
            if whole_clip:
                assert [(e.onset, e.offset) for e in events] == [(0.0, 3.0)]  # the second part is not in the scene


def test_snr_of_a_single_event_lies_within_its_bounds():
    """The same scene with a silent source is its background alone; the difference is the event."""
    backgrounds = [np.random.default_rng(0).standard_normal(20_000).astype(np.float32)]
    loud, silent = (
        mixer([source(seconds=1.2, level=level)], backgrounds, background=1.0, min_snr_db=3.0, max_snr_db=18.0)
        for level in (0.05, 0.0)
    )
    measured = []
    for index in range(120):
        scene, (event,) = loud.scene(index)
        background, none = silent.scene(index)
        assert not none
        if np.abs(scene).max() == 1.0:
            continue  # scaled as a whole, which the silent one was not
        cut = slice(round(event.onset * RATE), round(event.offset * RATE))
        power = np.mean((scene - background)[cut].astype(float) ** 2)
        measured.append(10 * np.log10(power / np.mean(background.astype(float) ** 2)))
    assert len(measured) > 100
    assert min(measured) >= 3.0 - 0.01 and max(measured) <= 18.0 + 0.01
    assert min(measured) < 5.0 and max(measured) > 16.0


def test_labels_are_balanced_however_many_sources_they_have():
    labels = ["a"] * 40 + ["b"] * 2 + ["c"]
    mix = mixer([source(label, 0.2) for label in labels], max_events=5)
    counts = Counter(event.event_label for index in range(600) for event in mix.scene(index)[1])
    total = sum(counts.values())
    assert total > 1000
    assert all(count / total == pytest.approx(1 / 3, abs=0.05) for count in counts.values())


def test_fewer_events_more_often():
    mix = mixer([source(seconds=0.1)], max_events=4)
    counts = Counter(len(mix.scene(index)[1]) for index in range(1000))
    weights = 1 / np.sqrt([1, 2, 3, 4])
    for number, share in enumerate(weights / weights.sum(), 1):
        assert counts[number] / 1000 == pytest.approx(share, abs=0.05)


def test_difficulty_rises_over_the_easy_scenes():
    """The share of scenes with a background rises linearly to the share that was asked for."""
    background = [np.ones(20_000, np.float32)]

    def share(index):
        """A short source leaves most of the scene silent unless there is a background."""
        ramp = {"background": 0.8, "easy_scenes": 100}
        mixers = (mixer([source(seconds=0.02)], background, seed=seed, seconds=1.0, **ramp) for seed in range(300))
        return np.mean([np.mean(mix.scene(index)[0] != 0) > 0.9 for mix in mixers])

    assert share(0) == 0.0
    assert share(50) == pytest.approx(0.4, abs=0.08)
    assert share(100) == pytest.approx(0.8, abs=0.08)
    assert share(5000) == pytest.approx(0.8, abs=0.08)


def test_the_first_easy_scene_holds_whole_clips():
    clip = source(seconds=3.0, parts=((0.0, 0.2), (2.8, 3.0)))
    whole = [mixer([clip], seed=seed, easy_scenes=10).scene(0)[1] for seed in range(30)]
    assert all(len(events) >= 2 for events in whole)
    placed = [mixer([clip], seed=seed, easy_scenes=10).scene(10)[1] for seed in range(30)]
    assert all(len(events) == 1 for events in placed)


def test_steady_sounds_are_cut_to_stretches():
    mix = mixer([source(seconds=9.0)], texture_min_seconds=1.5, texture_max_seconds=4.0)
    durations = [mix.scene(index)[1][0].duration for index in range(200)]
    cut = [d for d in durations if d < 8.9]
    assert min(cut) >= 1.49 and max(cut) <= 4.01
    assert len(cut) / len(durations) == pytest.approx(0.8, abs=0.08)


def test_mixer_refuses_nothing_to_mix():
    with pytest.raises(ValueError, match="at least one source"):
        mixer([])
    for broken in (Source("dog", square(1), ()), Source("dog", square(0), ((0.0, 1.0),))):
        with pytest.raises(ValueError, match="'dog' has no samples or no parts"):
            mixer([source("cat"), broken])


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"max_events": 0}, "max_events must be between 1"),
        ({"whole_clip": 1.5}, "whole_clip must be between 0 and 1"),
        ({"background": -0.1}, "background"),
        ({"speed": -0.1}, "speed"),
        ({"easy_scenes": -1}, "easy_scenes"),
        ({"min_snr_db": 30.0}, "smallest snr_db 30 is above the largest, 26"),
        ({"texture_min_seconds": 6.0}, "smallest seconds of a texture 6 is above the largest, 5"),
        ({"max_event": 3}, "did you mean 'max_events'"),
    ],
)
def test_mix_settings_are_bounded(settings_, words):
    with pytest.raises(ConfigError, match=words):
        from_dict(MixConfig, settings_, "mix")


def test_faded():
    assert faded(np.ones(6, np.float32), 3).tolist() == [0, 0.5, 1, 1, 0.5, 0]
    assert faded(np.ones(5, np.float32), 3).tolist() == [0, 1, 1, 1, 0]  # no longer than half
    assert faded(np.ones(1, np.float32), 3).tolist() == [1]
    before = np.ones(6, np.float32)
    faded(before, 3)
    assert before.all()


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_coloured_noise_falls_as_its_exponent_says(exponent):
    noise = coloured_noise(np.random.default_rng(0), 1 << 18, exponent)
    assert noise.dtype == np.float32 and len(noise) == 1 << 18
    power = np.abs(np.fft.rfft(noise.astype(float))) ** 2
    octaves = [power[1 << k : 2 << k].mean() for k in range(8, 16)]
    slope = np.polyfit(np.arange(8), np.log2(octaves), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.1)


# ------------------------------------------------------------------ targets


def targets(*events, labels=("dog", "cat"), tokens=5, seconds=1.0):
    found = token_targets([Event(*event) for event in events], labels, tokens, seconds)
    assert found.shape == (tokens, len(labels)) and found.dtype == np.float32
    return found.T.tolist()


def test_targets_of_events_by_hand():
    none = [0.0] * 5
    assert targets() == [none, none]
    assert targets(("dog", 1.0, 3.0)) == [[0, 1, 1, 0, 0], none]
    assert targets(("cat", 0.0, 5.0)) == [none, [1] * 5]
    # Half filled is 1; less, twice the share: 0.25 -> 0.5.
    assert targets(("dog", 0.75, 2.5)) == [[0.5, 1, 1, 0, 0], none]
    assert targets(("dog", 0.5, 2.125)) == [[1, 1, 0.25, 0, 0], none]
    # The last token, to its very end.
    assert targets(("dog", 4.0, 5.0)) == [[0, 0, 0, 0, 1], none]
    assert targets(("dog", 4.96875, 5.0)) == [[0, 0, 0, 0, 1], none]


def test_short_events_always_mark_a_token():
    assert targets(("dog", 2.25, 2.3125)) == [[0, 0, 1, 0, 0], [0] * 5]
    # Over a boundary, the token with more of it; the other what it is filled.
    assert targets(("dog", 1.9375, 2.125)) == [[0, 0.125, 1, 0, 0], [0] * 5]


def test_targets_of_overlapping_events_are_the_larger():
    assert targets(("dog", 0.0, 1.25), ("dog", 1.125, 1.5), ("cat", 1.0, 2.0)) == [[1, 1, 0, 0, 0], [0, 1, 0, 0, 0]]
    assert targets(("dog", 0.0, 1.25), ("dog", 1.75, 3.0)) == [[1, 0.5, 1, 0, 0], [0] * 5]


def test_events_behind_the_last_token_leave_no_mark():
    assert targets(("dog", 5.0, 6.0), ("cat", 7.0, 8.0)) == [[0] * 5, [0] * 5]
    assert targets(("dog", 4.75, 9.0)) == [[0, 0, 0, 0, 1], [0] * 5]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 9.9), st.floats(0.001, 10)), max_size=5))
def test_targets_agree_with_counting_samples(spans):
    """Against a count of 1 ms cells, which knows nothing of edges and overlaps."""
    events = [Event("dog", onset, min(onset + duration, 10.0)) for onset, duration in spans]
    found = token_targets(events, ["dog"], 32, 0.3125)[:, 0]
    cells = (np.arange(100_000) + 0.5) / 10_000
    expected = np.zeros(32)
    for event in events:
        filled = ((cells > event.onset) & (cells < event.offset)).reshape(32, -1).mean(1)
        share = np.minimum(1, 2 * filled)
        expected = np.maximum(expected, share)
        assert found[int(event.onset / 0.3125) : int(event.offset / 0.3125 - 1e-9) + 1].max() == 1.0
    extra = found - expected
    assert extra.min() >= -0.002
    assert (extra > 0.002).sum() <= len(events)  # the tokens that short events always mark


# ------------------------------------------------------------------ turning


def test_turned_events_follow_the_turned_waveform():
    """Impulses at both ends of an event, turned with the waveform."""
    duration, length = 10.0, 10 * RATE
    for onset, offset in ((1.0, 3.0), (0.0, 10.0), (9.0, 10.0), (0.0, 0.5)):
        waveform = np.zeros(length)
        waveform[round(onset * RATE) : round(offset * RATE)] = 1
        for turn in (0, 1, 499, 2500, 7000, 8000, 9000, 9999):
            moved = np.roll(waveform, turn)
            drawn = np.zeros(length)
            for event in turned([Event("dog", onset, offset)], turn / RATE, duration):
                assert event.event_label == "dog" and 0 <= event.onset < event.offset <= duration
                drawn[round(event.onset * RATE) : round(event.offset * RATE)] += 1
            # Pieces below a millisecond are dropped: at this rate, one sample.
            assert np.abs(moved - drawn).sum() <= 1, (onset, offset, turn)


def test_turned_by_hand():
    assert turned([Event("dog", 1.0, 3.0)], 8.0, 10.0) == [Event("dog", 9.0, 10.0), Event("dog", 0.0, 1.0)]
    assert turned([Event("dog", 1.0, 3.0)], 9.5, 10.0) == [Event("dog", 0.5, 2.5)]
    assert turned([], 3.0, 10.0) == []


# ------------------------------------------------------------------ utterances


def test_utterances_join_keywords_with_pauses():
    keywords = [np.pad(square(0.3, level=0.5), 340) for _ in range(20)]
    found = utterances(keywords, RATE, seed=1)
    assert 3 <= len(found) <= 6
    for utterance in found:
        assert utterance.label == "speech" and utterance.waveform.dtype == np.float32
        assert utterance.parts == ((0.0, len(utterance.waveform) / RATE),)
        sounding = np.abs(utterance.waveform) > 0
        assert sounding[0] and sounding[-1]
        assert np.abs(utterance.waveform[sounding]) == pytest.approx(0.1, rel=0.05)
        starts = np.flatnonzero(np.diff(np.concatenate([[0], sounding.astype(int)])) == 1)
        assert 3 <= len(starts) <= 6
    same = utterances(keywords, RATE, seed=1)
    assert [u.waveform.tobytes() for u in same] == [u.waveform.tobytes() for u in found]
    assert utterances(keywords[:5], RATE, seed=1) == []


def test_loud_part():
    waveform = np.pad(square(0.2), (300, 500))
    cut = loud_part(waveform, RATE)
    assert len(cut) == 200 and cut.all()
    quiet = np.concatenate([square(0.1, 0.01), square(0.2), square(0.1, 0.05)])  # -40 dB and -26 dB
    assert len(loud_part(quiet, RATE)) == 300
    assert len(loud_part(np.zeros(500, np.float32), RATE)) == 500
    assert len(loud_part(square(0.01), RATE)) == 10  # shorter than one 20-ms step


# ------------------------------------------------------------------ augmentation


def generators(first, count):
    return [np.random.default_rng((first, clip)) for clip in range(count)]


def test_equaliser_is_a_smooth_curve_within_its_bounds():
    log_mel = torch.randn(16, 50, 64)
    out = random_equaliser(log_mel, generators(0, 16), 6.0)
    gain = out - log_mel
    assert out.shape == log_mel.shape and out.dtype == torch.float32
    assert torch.allclose(gain, gain[:, :1].expand_as(gain), atol=1e-5)  # the same at all times
    curves = gain[:, 0]
    assert curves.abs().max() <= 6.0 + 1e-5 and curves.abs().max() > 4.0
    assert (curves[1:] - curves[:1]).abs().amax(1).min() > 0.5  # another curve for each clip
    assert curves.diff(dim=1).abs().max() <= 12 * 5 / 63 + 1e-4  # at most 6 bands
    again = random_equaliser(log_mel, generators(0, 16), 6.0)
    assert torch.equal(out, again) and not torch.equal(out, random_equaliser(log_mel, generators(1, 16), 6.0))
    assert torch.equal(random_equaliser(log_mel, generators(0, 16), 0.0), log_mel)
    # A clip gets the same curve in any batch.
    alone = random_equaliser(log_mel[5:6], generators(0, 16)[5:6], 6.0)
    assert torch.equal(alone[0], out[5])


def masked(first=0, shape=(8, 100, 64), **changes):
    settings = {"time_masks": 2, "max_frames": 20, "mel_masks": 2, "max_mels": 8} | changes
    keep = spec_masks(generators(first, shape[0]), shape[1], shape[2], **settings)
    assert keep.shape == shape and keep.dtype == torch.float32
    assert set(keep.unique().tolist()) <= {0.0, 1.0}
    return keep == 0


def test_spec_masks_are_whole_frames_and_whole_bands():
    masks = masked(shape=(64, 100, 64))
    frames, bands = masks.all(2), masks.all(1)
    assert torch.equal(masks, frames[:, :, None] | bands[:, None, :])
    assert frames.sum(1).max() <= 40 and bands.sum(1).max() <= 16
    assert frames.sum(1).max() > 20 and bands.sum(1).max() > 8  # two of each
    assert len({tuple(row.tolist()) for row in frames}) > 50  # each clip its own
    assert frames.any(0).float().mean() > 0.95 and bands.any(0).float().mean() > 0.95


def test_spec_masks_depend_on_the_generators_alone():
    torch.manual_seed(1)
    first = masked(3)
    torch.manual_seed(2)
    assert torch.equal(first, masked(3)) and not torch.equal(first, masked(4))


def test_spec_masks_of_no_masks_and_of_small_clips():
    assert not masked(time_masks=0, mel_masks=0).any()
    assert not masked(max_frames=0, max_mels=0).any()
    wide = masked(shape=(64, 5, 4), max_frames=24, max_mels=8)  # masks wider than the clip
    assert wide.any() and not wide.all()


@pytest.mark.parametrize(("length", "speed"), [(23, 0.7333333333333333), (2, 1.0), (1000, 1.15), (1000, 0.85)])
def test_speed_is_linear_interpolation(length, speed):
    """Also where rounding puts the last place behind the last but one sample."""
    waveform = np.random.default_rng(2).standard_normal(length).astype(np.float32)
    places = np.arange(0, length - 1, speed)
    np.testing.assert_allclose(at_speed(waveform, speed), np.interp(places, np.arange(length), waveform), atol=1e-5)
