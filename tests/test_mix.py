"""Scenes, targets and augmentation: hand-worked cases, and what the waveform itself says of a scene's events."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from htsat.config import from_dict
from htsat.data.augment import random_equaliser, spec_masks
from htsat.data.mix import (
    LazySource,
    MixConfig,
    SceneMixer,
    Source,
    active_parts,
    at_speed,
    coloured_noise,
    faded,
    filtered,
    labelled_part,
    reverberant,
    room_response,
    token_targets,
    without_sliver,
)
from htsat.errors import ConfigError
from htsat.events import Event
from htsat.training.material import loud_part, turned, utterances

RATE = 1000
#: one placed event, digital silence behind it, as it was recorded
PLAIN = {"max_events": 1, "whole_clip": 0.0, "background": 0.0, "speed": 0.0, "rows": 0.0}


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
    mix = mixer([Source("dog", waveform, parts)], whole_clip=1.0, speed=speed, min_snr_db=20.0, max_snr_db=20.0)
    durations = set()
    for index in range(60):
        scene, events = mix.scene(index)
        marked = np.zeros(len(scene) + 20, bool)
        for event in events:
            marked[max(0, round(event.onset * RATE) - 3) : round(event.offset * RATE) + 3] = True
            inside = scene[round(event.onset * RATE) + 3 : max(0, round(event.offset * RATE) - 3)]
            # A square wave at another speed passes through zero at its edges only.
            assert not len(inside) or np.mean(np.abs(inside) > 0.1 * np.abs(scene).max()) > 0.8
            durations.add(round(event.duration, 2))
        # What rings at the edges after a change of speed lies far below the sound.
        assert (np.abs(scene[~marked[: len(scene)]]) <= 0.2 * np.abs(scene).max()).all()
        assert speed or not scene[~marked[: len(scene)]].any()
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


@pytest.mark.parametrize(
    ("mean", "shares"),
    # 1, 2, 2, 4/3, which is 2 to the power n over n factorial, over their sum
    [(1.0, [1, 0, 0, 0]), (3.0, [3 / 19, 6 / 19, 6 / 19, 4 / 19])],
)
def test_numbers_of_events_follow_their_mean(mean, shares):
    mix = mixer([source(seconds=0.1)], max_events=4, mean_events=mean)
    counts = Counter(len(mix.scene(index)[1]) for index in range(1000))
    for number, share in enumerate(shares, 1):
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
    assert len(cut) / len(durations) == pytest.approx(0.9, abs=0.06)


def test_other_long_sounds_are_used_whole():
    mix = mixer([Source("rooster", square(4.0), ((0.5, 3.5),), steady=False)])
    assert {round(mix.scene(index)[1][0].duration, 3) for index in range(50)} == {3.0}


def test_mixer_refuses_nothing_to_mix():
    with pytest.raises(ValueError, match="at least one source"):
        mixer([])
    for seconds, parts in ((1, ()), (0, ((0.0, 1.0),))):
        with pytest.raises(ValueError, match="'dog' has no samples or no parts"):
            Source("dog", square(seconds), parts)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"max_events": 0}, "max_events must be between 1"),
        ({"whole_clip": 1.5}, "whole_clip must be between 0 and 1"),
        ({"background": -0.1}, "background"),
        ({"speed": -0.1}, "speed"),
        ({"easy_scenes": -1}, "easy_scenes"),
        ({"min_snr_db": 30.0}, "smallest snr_db 30 is above the largest, 28"),
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


# ------------------------------------------------------------------ levels


def measured_snr(scene, background, events):
    inside = np.concatenate([(scene - background)[round(e.onset * RATE) : round(e.offset * RATE)] for e in events])
    return 10 * np.log10(np.mean(inside.astype(float) ** 2) / np.mean(background.astype(float) ** 2))


def test_whole_clips_are_levelled_by_their_events():
    """A bark of 0.1 s in a clip of 5 s: levelled with its silence it would be 17 dB too loud."""
    backgrounds = [np.random.default_rng(0).standard_normal(20_000).astype(np.float32)]
    clip = np.zeros(5 * RATE, np.float32)
    clip[2000:2100] = square(0.1)
    snr = {"whole_clip": 1.0, "background": 1.0, "min_snr_db": 10.0, "max_snr_db": 10.0, "max_background_db": -50.0}
    loud, silent = (
        mixer([Source("dog", waveform, ((2.0, 2.1),))], backgrounds, **snr) for waveform in (clip, 0 * clip)
    )
    for index in range(30):
        scene, events = loud.scene(index)
        background, none = silent.scene(index)
        assert events and not none
        if len(events) == 1 and events[0].duration == pytest.approx(0.1):
            assert measured_snr(scene, background, events) == pytest.approx(10.0, abs=0.05)


def test_origins_and_levels_are_told():
    """The clip counts its samples, so that the scene tells which of them it holds."""
    ramp = np.arange(1, 3001, dtype=np.float32)
    steady = mixer([Source("rain", ramp, ((0.5, 2.9),), "rain.wav", start=7.0)], texture_min_seconds=0.3)
    for index in range(40):
        scene = steady.mix(index)
        (placed,) = scene.placed
        assert placed.source == "rain.wav" and scene.background is None
        start = round(placed.event.onset * RATE)
        inside = scene.waveform[start + 20 : round(placed.event.offset * RATE) - 20].astype(float)
        # A ramp that rises by g per sample and passes g * n at sample n.
        slope = np.diff(inside).mean()
        assert inside[0] / slope - 20 == pytest.approx((placed.source_onset - 7.0) * RATE + 1, abs=2)
        assert placed.source_offset - placed.source_onset == pytest.approx(placed.event.duration, abs=2 / RATE)
        assert 4 <= placed.snr_db <= 28


# ------------------------------------------------------------------ places


def test_events_of_a_class_never_overlap_and_few_sound_at_once():
    sources = [source(label, 3.0) for label in ("a", "b", "c")]
    mix = mixer(sources, max_events=8, mean_events=6.0, max_polyphony=2, texture_max_seconds=3.0)
    most = 0
    for index in range(100):
        events = mix.scene(index)[1]
        for label in "abc":
            own = [e for e in events if e.event_label == label]
            assert all(a.offset <= b.onset + 1e-9 for a, b in pairwise(own))
        sounding = np.zeros(10 * RATE, int)
        for event in events:
            sounding[round(event.onset * RATE) : round(event.offset * RATE)] += 1
        most = max(most, sounding.max())
    assert most == 2


def test_rows_repeat_a_source_after_short_pauses():
    many = [Source("dog", square(0.2, level), ((0.0, 0.2),), f"dog{level}") for level in (0.1, 0.2, 0.3)]
    mix = mixer(many, rows=1.0, max_events=4, mean_events=1.0)
    sizes = Counter()
    for index in range(100):
        placed = mix.mix(index).placed
        assert len({p.source for p in placed}) == 1 and len(placed) <= 4
        gaps = [b.event.onset - a.event.offset for a, b in pairwise(placed)]
        assert all(0.099 <= gap <= 1.501 for gap in gaps)
        sizes[len(placed)] += 1
    assert all(sizes[n] > 5 for n in (2, 3, 4))


def test_slivers_are_cut_with_their_sound():
    clip = np.arange(1000, dtype=np.float32)
    spans = [(100, 200), (600, 900)]
    assert len(without_sliver(clip, spans, 1000, 50)) == 1000  # there is room
    assert len(without_sliver(clip, spans, 640, 50)) == 600  # 40 samples of 300: none of them
    assert len(without_sliver(clip, spans, 660, 50)) == 660  # 60 stay
    assert len(without_sliver(clip, spans, 130, 50)) == 100
    assert len(without_sliver(clip, spans, 400, 50)) == 400  # between events
    # In scenes: what ends with the scene lasts at least 50 ms, and nothing sounds without an event.
    parts = ((0.0, 0.3), (0.4, 2.0))
    waveform = np.concatenate([square(0.3), np.zeros(100, np.float32), square(1.6)])
    mix = mixer([Source("dog", waveform, parts)], whole_clip=1.0, seconds=2.6)
    cut = 0
    for index in range(400):
        scene, events = mix.scene(index)
        assert all(e.duration >= 0.05 for e in events)
        cut += events[-1].offset == 2.6 and events[-1].duration < 0.3
        drawn = np.zeros(len(scene), bool)
        for event in events:
            drawn[round(event.onset * RATE) : round(event.offset * RATE)] = True
        assert not scene[~drawn].any()
    assert cut > 5


def test_sources_are_read_when_they_are_drawn():
    read = []

    def load(label):
        read.append(label)
        return source(label)

    labels = ["a", "b", "c", "d"]
    lazy = mixer([LazySource(label, lambda label=label: load(label)) for label in labels])
    ready = mixer([source(label) for label in labels])
    assert not read
    for index in range(5):
        assert lazy.scene(index)[0].tobytes() == ready.scene(index)[0].tobytes()
    assert len(read) == 5


def test_backgrounds_are_recordings_or_noise():
    recordings = [np.full(20_000, 0.5, np.float32), np.full(3_000, -0.5, np.float32)]
    quiet = {"background": 1.0, "min_snr_db": 0.0, "max_snr_db": 0.0, "max_background_db": -40.0}
    kinds = Counter()
    for index in range(200):
        scene = mixer([source(seconds=0.1)], recordings, noise=0.3, **quiet).mix(index)
        kinds[scene.background] += 1
        outside = np.ones(len(scene.waveform), bool)
        (event,) = scene.events
        outside[round(event.onset * RATE) : round(event.offset * RATE)] = False
        rest = scene.waveform[outside]
        assert -58.01 <= 20 * np.log10(np.sqrt(np.mean(rest**2))) <= -39.9
        if scene.background is not None and scene.background >= 0:
            assert (np.sign(rest) == (1, -1)[scene.background]).all()  # the short one to the very end
    assert kinds[-1] == pytest.approx(60, abs=20) and kinds[0] > 40 and kinds[1] > 40
    alone = mixer([source(seconds=0.1)], (), **quiet).mix(1)
    assert alone.background == -1 and np.mean(alone.waveform != 0) > 0.99


# ------------------------------------------------------------------ material of events


def test_active_parts_by_hand():
    silence = np.zeros(500, np.float32)
    clip = np.concatenate([silence, square(0.2), silence[:200], square(0.1, 0.5), silence, square(0.4, 0.1), silence])
    # A pause of 0.2 s is bridged, one of 0.5 s is not; 20 dB below the loudest still sounds.
    assert active_parts(clip, RATE) == [(0.5, 1.0), (1.5, 1.9)]
    assert active_parts(np.concatenate([square(0.2), square(0.4, 0.02)]), RATE) == [(0.0, 0.2)]  # 34 dB below
    assert active_parts(silence, RATE) == [] and active_parts(silence[:0], RATE) == []
    assert active_parts(square(0.01), RATE) == [(0.0, 0.01)]


def clip_of(*levels):
    """A clip of half-second steps."""
    return np.concatenate([square(0.5, level) if level else np.zeros(500, np.float32) for level in levels])


def test_labelled_part_drops_what_has_no_label():
    clip = clip_of(0.9, 1.0, 0.01, 1.0, 0.9)  # loud before and after, and a quiet pause
    events = [Event("dog", 0.5, 1.0), Event("dog", 1.5, 2.0)]
    found = labelled_part("dog", clip, RATE, events, "a.wav")
    assert (found.label, found.name, found.start, found.steady) == ("dog", "a.wav", 0.5, False)
    assert found.parts == ((0.0, 0.5), (1.0, 1.5))
    assert found.waveform.tobytes() == clip[500:2000].tobytes()
    # A pause 6 dB below the events holds something: silenced, with fades inside the events.
    loud = labelled_part("dog", clip_of(0.9, 1.0, 0.5, 1.0, 0.9), RATE, events)
    assert not loud.waveform[500:1000].any()
    assert (np.abs(loud.waveform[:490]) == 1).all() and (np.abs(loud.waveform[1010:]) == 1).all()
    assert np.abs(loud.waveform[490:500]).max() < 1.001 and np.abs(loud.waveform[499]) == 0
    # Another class in the pause, however quiet.
    other = labelled_part("dog", clip, RATE, [*events, Event("cat", 1.2, 1.3)])
    assert not other.waveform[500:1000].any() and other.parts == found.parts
    # What another class overlaps is not used; what only touches it is.
    assert labelled_part("dog", clip, RATE, [*events, Event("cat", 0.9, 1.2)]).parts == ((0.0, 0.5),)
    assert labelled_part("dog", clip, RATE, [*events, Event("cat", 1.0, 1.5)]).parts == found.parts
    assert labelled_part("dog", clip, RATE, [Event("dog", 0.5, 1.0), Event("cat", 0.0, 2.5)]) is None
    # Overlapping events of the class are one part; what lies behind the clip's end is cut.
    joined = labelled_part("dog", clip, RATE, [Event("dog", 0.5, 1.5), Event("dog", 1.0, 2.0), Event("dog", 2.4, 9.0)])
    assert joined.parts == ((0.0, 1.5), (1.9, 2.0))
    assert labelled_part("dog", np.zeros(2000, np.float32), RATE, events) is None


def test_labelled_part_without_times_is_what_is_loud():
    found = labelled_part("dog", clip_of(0, 1.0, 0, 0.5, 0), RATE, None)
    assert found.parts == ((0.0, 0.5), (1.0, 1.5)) and found.start == 0.5 and len(found.waveform) == 1500
    assert labelled_part("rain", square(5.0), RATE, None).steady
    assert labelled_part("dog", np.zeros(2000, np.float32), RATE, None) is None


# ------------------------------------------------------------------ sound


@pytest.mark.parametrize("speed", [0.87, 1.0, 1.0837, 1.5])
def test_a_sine_at_another_speed_is_a_sine_of_another_pitch(speed):
    sine = np.sin(2 * np.pi * 0.05 * np.arange(4000)).astype(np.float32)
    found = at_speed(sine, speed)
    assert found.dtype == np.float32 and len(found) == round(4000 / speed)
    expected = np.sin(2 * np.pi * 0.05 * speed * np.arange(len(found)))
    np.testing.assert_allclose(found[100:-100], expected[100:-100], atol=1e-3)


def test_speed_folds_nothing_back():
    """What a faster sound would have above half the sampling rate is gone; interpolation would mirror it."""
    high = np.sin(2 * np.pi * 0.45 * np.arange(4000)).astype(np.float32)
    assert np.abs(at_speed(high, 1.3)[100:-100]).max() < 1e-3
    for length in (0, 1, 2, 17):
        assert len(at_speed(high[:length], 1.15)) == (round(length / 1.15) if length > 1 else length)


def test_rooms_decay_and_leave_the_direct_sound():
    rate = 8000
    response = room_response(np.random.default_rng(1), rate, 0.5, reverberant_db=-6.0)
    assert response[0] == 1 and not response[1:40].any()
    tail = response[40:].astype(float)
    assert 10 * np.log10(np.sum(tail**2)) == pytest.approx(-6.0, abs=0.01)
    power = 10 * np.log10(np.mean(tail.reshape(20, -1) ** 2, axis=1))  # 25 ms each: 3 dB less from one to the next
    assert np.polyfit(np.arange(20), power, 1)[0] == pytest.approx(-3.0, abs=0.3)
    sound = np.random.default_rng(2).standard_normal(500).astype(np.float32)
    np.testing.assert_allclose(reverberant(sound, response), np.convolve(sound, response), atol=1e-3)


def test_reverberation_rings_on_behind_the_event():
    dry, wet = (mixer([source(seconds=0.5)], reverb=share, min_decay_seconds=0.5) for share in (0.0, 1.0))
    for index in range(20):
        (event,) = wet.scene(index)[1]
        waveform = wet.scene(index)[0]
        first = np.flatnonzero(np.abs(waveform) > 1e-6)[0] / RATE
        assert first == pytest.approx(event.onset, abs=0.003)
        if event.offset < 9.0:
            end = round(event.offset * RATE)
            assert np.abs(waveform[end + 20 : end + 100]).max() > 1e-5
    assert dry.scene(0)[1][0].duration == event.duration == pytest.approx(0.5)


def test_filters_stay_within_their_gain():
    noise = np.random.default_rng(0).standard_normal(1 << 15).astype(np.float32)
    curves = []
    for seed in range(4):
        out = filtered(np.random.default_rng(seed), noise, 12.0, 8000)
        assert out.shape == noise.shape and out.dtype == np.float32
        before, after = (np.abs(np.fft.rfft(x.astype(float)))[16:] ** 2 for x in (noise, out))
        edges = np.unique(np.geomspace(1, len(before) - 1, 30).astype(int))
        curves.append(10 * np.log10(np.add.reduceat(after, edges) / np.add.reduceat(before, edges)))
    assert np.abs(curves).max() < 12.5 and np.ptp(curves, axis=0).max() > 6
    np.testing.assert_allclose(filtered(np.random.default_rng(0), noise, 0.0, 8000), noise, atol=1e-4)


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
            # Slivers below 50 ms are dropped.
            assert np.abs(moved - drawn).sum() < 50, (onset, offset, turn)


def test_turned_by_hand():
    assert turned([Event("dog", 1.0, 3.0)], 8.0, 10.0) == [Event("dog", 9.0, 10.0), Event("dog", 0.0, 1.0)]
    assert turned([Event("dog", 1.0, 3.0)], 9.5, 10.0) == [Event("dog", 0.5, 2.5)]
    assert turned([], 3.0, 10.0) == []
    assert turned([Event("dog", 1.0, 3.0)], 7.0, 10.0) == [Event("dog", 8.0, 10.0)]  # to the very end
    # 40 ms are left of 2 s, at either end: no event; the larger part of a 60-ms click is one.
    assert turned([Event("dog", 1.0, 3.0)], 7.04, 10.0) == [Event("dog", 8.04, 10.0)]
    for event, turn, end in ((Event("dog", 1.0, 3.0), 8.96, 1.96), (Event("dog", 1.0, 1.06), 8.98, 0.04)):
        (found,) = turned([event], turn, 10.0)
        assert found.onset == 0.0 and found.offset == pytest.approx(end)


# ------------------------------------------------------------------ utterances


def test_utterances_join_keywords_with_pauses():
    keywords = [("ann", np.pad(square(0.3, level=0.5), 340)) for _ in range(20)]
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
    assert len(utterances(keywords[:3], RATE, seed=1)) == 1
    assert utterances(keywords[:2], RATE, seed=1) == []


def test_utterances_are_of_one_speaker_and_of_many_keywords():
    """Each recording is a square wave of its own period; recordings come ordered by keyword, as in the corpus."""

    def recording(keyword, speaker):
        period = 4 + 2 * (keyword * 3 + speaker)
        return np.where(np.arange(300) % period < period // 2, 0.5, -0.5).astype(np.float32)

    keywords = [(f"speaker {s}", recording(k, s)) for k in range(8) for _ in range(4) for s in range(3)]
    mixed = 0
    found = utterances(keywords, RATE, seed=2)
    assert len(found) > 3 * 32 / 7
    for utterance in found:
        sounding = np.flatnonzero(utterance.waveform)
        pieces = np.split(sounding, np.flatnonzero(np.diff(sounding) > 1) + 1)
        words = []
        for piece in pieces:
            sign = np.sign(utterance.waveform[piece])
            words.append((2 * int(np.flatnonzero(sign != sign[0])[0]) - 4) // 2)
        assert len({word % 3 for word in words}) == 1  # one speaker
        assert utterance.name == f"speaker speaker {words[0] % 3}"
        mixed += len({word // 3 for word in words}) > 1
    assert mixed > 0.9 * len(found)


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


# ------------------------------------------------------------------ sounds of no class


def others_mixer(**settings):
    config = MixConfig(**(PLAIN | {"others": 1.0} | settings))
    other = source("cat", 2.0)
    return SceneMixer([source()], [], sample_rate=RATE, seconds=10.0, seed=3, config=config, others=[other])


def test_other_sounds_are_heard_and_not_told():
    scenes = [others_mixer(others_alone=0.0).scene(index) for index in range(20)]
    assert all({e.event_label for e in events} == {"dog"} for _, events in scenes)
    plain = [mixer(seed=3).scene(index) for index in range(20)]
    assert sum(np.count_nonzero(w) for w, _ in scenes) > 1.5 * sum(np.count_nonzero(w) for w, _ in plain)


def test_some_scenes_hold_other_sounds_alone():
    scenes = [others_mixer(others_alone=0.5).scene(index) for index in range(60)]
    silent = [waveform for waveform, events in scenes if not events]
    assert 15 < len(silent) < 45
    assert all(waveform.any() for waveform in silent)


def test_share_of_scenes_with_other_sounds():
    scenes = [others_mixer(others=0.3, others_alone=1.0).scene(index) for index in range(200)]
    assert 35 < sum(not events for _, events in scenes) < 85


def test_without_other_sounds_scenes_stay_as_they_were():
    with_setting = mixer(others=1.0).scene(4)
    assert with_setting[0].tobytes() == mixer().scene(4)[0].tobytes()
