"""Training examples: what is done to a waveform is done to its events; the same example whoever makes it."""

import dataclasses
import math
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import RATE, TINY_CLIPS, write_audio
from miniature_corpora import make_csv, make_esc50, make_folder, make_speech_commands
from torch.utils.data import DataLoader

from htsat.data.augment import spec_masks
from htsat.data.corpora import Clip
from htsat.data.reading import ClipReader
from htsat.data.split import recording_of
from htsat.errors import AudioError, ConfigError, DataError, UsageError
from htsat.events import Event
from htsat.training.examples import (
    ClipExamples,
    check_quota,
    data_digest,
    folds_in,
    mix_by_loudness,
    moved,
    open_run_data,
    saved_logits,
    with_length,
)
from htsat.training.loop import _Positions, collate
from htsat.training.recipe import load_recipe

LABELS = ("bell", "dog", "rain")
SECONDS = 4.0
PLAIN = (
    "augment.mixup=none", "augment.roll=false", "augment.gain_db=0", "augment.speed=0", "augment.equaliser_db=0",
    "augment.time_masks=0", "augment.mel_masks=0", "train.balanced=false", "data.clip_seconds=4.0",
)  # fmt: skip


def clips_recipe(*overrides, labels=LABELS):
    return load_recipe("esc50", [*TINY_CLIPS, *PLAIN, *overrides]).with_labels(labels)


class Memory:
    """Reads clips from memory, by their file names; what is missing cannot be read."""

    sample_rate = RATE

    def __init__(self, waveforms):
        self.waveforms = waveforms

    def read(self, clip):
        if clip.path.name not in self.waveforms:
            raise AudioError(f"{clip.path}: is damaged")
        return self.waveforms[clip.path.name].copy()


def tone(hertz, seconds=SECONDS, level=0.5):
    """A sine of whole periods: two of different frequencies are orthogonal."""
    return (level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


#: one tone per class, of very different levels
PITCH, LEVEL = {"bell": 100, "dog": 250, "rain": 1000}, {"bell": 0.9, "dog": 0.2, "rain": 0.01}


def tones(count=6):
    """Clips of one tone each, in turn of each class, and their reader."""
    clips, waveforms = [], {}
    for number in range(count):
        label = LABELS[number % 3]
        clips.append(Clip(Path(f"{label}{number}.wav"), (label,)))
        waveforms[f"{label}{number}.wav"] = tone(PITCH[label], level=LEVEL[label])
    return clips, Memory(waveforms)


def amplitudes(waveform):
    """Return the amplitude of each class's tone, by projection."""
    return np.array([2 * float(np.mean(waveform * tone(PITCH[label], level=1.0))) for label in LABELS])


# ------------------------------------------------------------------ times


def timed(seconds, onset, offset, **settings):
    """One clip that is silent but for an event, and examples of it."""
    waveform = np.zeros(round(seconds * RATE), np.float32)
    waveform[round(onset * RATE) : round(offset * RATE)] = 0.5
    events = (Event("dog", onset, offset),)
    recipe = clips_recipe(*(f"augment.{key}={value}" for key, value in settings.items()))
    return ClipExamples(recipe, [Clip(Path("a.wav"), ("dog",), events)], Memory({"a.wav": waveform}))


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"roll": "true"}, {"speed": 0.5}, {"shift_seconds": 1.5}, {"speed": 0.3, "roll": "true"},
        {"speed": 0.5, "shift_seconds": 2.0, "roll": "true", "gain_db": 6.0},
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("seconds", "onset", "offset"), [(4.0, 1.0, 2.5), (10.0, 4.0, 6.0), (2.0, 0.0, 2.0), (1.0, 0.3, 0.4)]
)
def test_events_follow_the_waveform(settings, seconds, onset, offset):
    """Whatever turned, moved, cut or stretched the clip: it sounds where its events are, and nowhere else."""
    examples = timed(seconds, onset, offset, **settings)
    durations = set()
    for seed in range(25):
        _, waveform, events = examples._varied(0, np.random.default_rng(seed), [])
        assert waveform.shape == (round(SECONDS * RATE),) and waveform.dtype == np.float32
        drawn = np.zeros(len(waveform) + 1, bool)
        for event in events:
            assert event.event_label == "dog" and 0 <= event.onset < event.offset <= SECONDS + 1e-9
            drawn[round(event.onset * RATE) : round(event.offset * RATE)] = True
        # Edges ring after a change of speed (below a tenth of the step); slivers that turning leaves are dropped.
        sounding = np.abs(waveform) > 0.12
        wrong = int((drawn[:-1] != sounding).sum())
        assert wrong <= 12 + ("roll" in settings) * 0.05 * RATE, (seed, wrong)
        durations.add(round(float(np.mean(sounding)), 3))
    assert len(durations) > 1 or "speed" not in settings


def test_frame_targets_of_an_example():
    """Tokens of 5 s / 16: an event from 1 to 2.5 s fills the tokens 4 to 7 and a part of the one before."""
    example = timed(4.0, 1.0, 2.5).example(0)
    token = 5 / 16
    shares = [max(0, min(2.5, (i + 1) * token) - max(1.0, i * token)) / token for i in range(16)]
    expected = [min(1.0, 2 * share) for share in shares]
    np.testing.assert_allclose(example.frame_target[:, 1], expected, atol=1e-6)
    assert not example.frame_target[:, [0, 2]].any() and example.clip_target.tolist() == [0, 1, 0]
    # A clip without known times has no frames; nor has one whose time is distorted.
    clips, reader = tones()
    assert ClipExamples(clips_recipe(), clips, reader).example(0).frame_target is None
    stretched = dataclasses.replace(clips_recipe("train.fit=tile"))
    found = ClipExamples(stretched, [Clip(Path("bell0.wav"), ("bell",), (Event("bell", 0, 1),))], reader).example(0)
    assert found.frame_target is None


def test_moved_events_by_hand():
    events = (Event("dog", 1.0, 2.0), Event("rain", 3.0, 6.0))
    assert moved(events, -1.5, 1.0, 3.0) == (Event("dog", 0.0, 0.5), Event("rain", 1.5, 3.0))
    assert moved(events, 0.0, 0.5, math.inf) == (Event("dog", 0.5, 1.0), Event("rain", 1.5, 3.0))
    assert moved(events, -2.0, 1.0, 1.0) == () and moved(None, 1.0, 1.0, 1.0) is None


# ------------------------------------------------------------------ mixtures


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.8])
@pytest.mark.parametrize(("first", "second"), [(0.5, 0.5), (0.9, 0.01), (0.02, 0.7)])
def test_mixtures_are_heard_in_their_shares(share, first, second):
    """Tokozume et al., equations 1 and 2, with loudness in dB; and what they are for: amplitudes in that proportion."""
    bell, dog = tone(100, level=first), tone(250, level=second)
    mixed = mix_by_loudness(bell, dog, share, RATE)
    difference = 20 * math.log10(first / second)
    part = 1 / (1 + 10 ** (difference / 20) * (1 - share) / share)
    expected = (part * bell + (1 - part) * dog) / math.sqrt(part**2 + (1 - part) ** 2)
    np.testing.assert_allclose(mixed, expected, rtol=1e-3, atol=1e-5)
    bell_amplitude, dog_amplitude, _ = amplitudes(mixed)
    assert bell_amplitude / (bell_amplitude + dog_amplitude) == pytest.approx(share, rel=1e-3)


def test_silence_around_a_sound_does_not_change_its_loudness():
    short = np.pad(tone(100, 1.0), (0, round(3 * RATE)))
    one, other = (mix_by_loudness(w, tone(250), 0.5, RATE)[:RATE] for w in (tone(100), short))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_silence_can_be_mixed():
    for pair in (
        (np.zeros(RATE, np.float32), tone(100, 1.0)),
        (np.zeros(RATE, np.float32),) * 2,
        (tone(100, 0.01),) * 2,
    ):
        assert np.isfinite(mix_by_loudness(*pair, 0.3, RATE)).all()


@pytest.mark.parametrize("balanced", ["false", "true"])
def test_labels_of_mixtures_are_what_is_heard(balanced):
    clips, reader = tones(9)
    settings = ("augment.mixup=waveforms", "augment.mixup_share=1", f"train.balanced={balanced}")
    examples = ClipExamples(clips_recipe(*settings), clips, reader)
    pairs = Counter()
    for position in range(60):
        example = examples.example(position)
        heard = amplitudes(example.waveform)
        np.testing.assert_allclose(example.clip_target, heard / heard.sum(), atol=0.01)
        assert example.clip_target.sum() == pytest.approx(1, abs=1e-6)
        pairs[tuple(np.flatnonzero(example.clip_target))] += 1
        assert " + " in example.name
    assert set(pairs) == {(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)}
    # With independent labels each class that sounds counts in full.
    several = ClipExamples(clips_recipe(*settings, "train.loss=bce"), clips, reader)
    for position in range(30):
        target = several.example(position).clip_target
        assert np.array_equal(target > 0, examples.example(position).clip_target > 0) and set(target) <= {0, 1}


def test_share_of_mixtures():
    clips, reader = tones()
    examples = ClipExamples(clips_recipe("augment.mixup=waveforms", "augment.mixup_share=0.3"), clips, reader)
    mixed = np.mean([" + " in examples.example(position).name for position in range(300)])
    assert mixed == pytest.approx(0.3, abs=0.08)


@pytest.mark.parametrize("kind", ["background", "noise"])
def test_noise_lies_within_its_bounds(kind):
    clips, reader = tones()
    rng = np.random.default_rng(0)
    backgrounds = (
        [rng.standard_normal(n).astype(np.float32) for n in (10 * RATE, 50_000)] if kind == "background" else []
    )
    settings = ["augment.min_snr_db=3", "augment.max_snr_db=20", f"augment.{kind}_share=1", "data.backgrounds=b"]
    examples = ClipExamples(clips_recipe(*settings), clips, reader, backgrounds)
    plain = ClipExamples(clips_recipe(), clips, reader)
    found = []
    for position in range(60):
        clean, noisy = plain.example(position).waveform, examples.example(position).waveform
        found.append(10 * np.log10(np.mean(clean**2) / np.mean((noisy - clean) ** 2)))
    assert min(found) >= 2.99 and max(found) <= 20.01 and min(found) < 6 and max(found) > 17


def test_gain_lies_within_its_bounds():
    clips, reader = tones()
    examples, plain = (ClipExamples(clips_recipe(*s), clips, reader) for s in (["augment.gain_db=6"], []))
    gains = [
        20 * np.log10(np.abs(examples.example(p).waveform).max() / np.abs(plain.example(p).waveform).max())
        for p in range(60)
    ]
    assert min(gains) < -4 and max(gains) > 4 and max(map(abs, gains)) <= 6.001


# ------------------------------------------------------------------ masks


def masks(rngs):
    return spec_masks(rngs, 100, 64, time_masks=2, max_frames=20, mel_masks=2, max_mels=8)


def test_masks_of_a_clip_do_not_depend_on_its_batch():
    together = masks([np.random.default_rng(seed) for seed in range(6)])
    for seed in range(6):
        assert torch.equal(masks([np.random.default_rng(seed)])[0], together[seed])


# ------------------------------------------------------------------ order, processes


EVERYTHING = (
    "augment.mixup=waveforms", "augment.mixup_share=0.5", "augment.roll=true", "augment.gain_db=6", "augment.speed=0.2",
    "augment.shift_seconds=0.1", "augment.noise_share=0.5", "train.balanced=true", "data.clip_seconds=0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("folder"), recordings=3, pieces=2, seconds=0.3)


def from_files(folder):
    paths = sorted(folder.rglob("*.wav"))
    clips = [Clip(path, (path.parent.name,)) for path in paths]
    return ClipExamples(clips_recipe(*EVERYTHING), clips, ClipReader(RATE, cache_bytes=1 << 20))


def same(first, second):
    return (
        first.waveform.tobytes() == second.waveform.tobytes()
        and np.array_equal(first.clip_target, second.clip_target)
        and (first.position, first.name) == (second.position, second.name)
    )


def test_an_example_depends_on_its_position_alone(folder):
    examples = from_files(folder)
    expected = [examples.example(position) for position in range(40)]  # more than two epochs
    again, copy = from_files(folder), pickle.loads(pickle.dumps(examples))
    for position in (39, 3, 18, 0, 21, 3):
        assert same(again.example(position), expected[position])
        assert same(copy.example(position), expected[position])
    assert len({example.waveform.tobytes() for example in expected}) == 40
    other = ClipExamples(clips_recipe(*EVERYTHING, "train.seed=2"), examples._clips, examples._reader)
    assert not any(same(other.example(position), expected[position]) for position in range(10))


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_make_the_same_examples(folder, context, workers):
    examples = from_files(folder)
    plan = [[0, 1, 7], [2, 39], [3], [5, 4]]
    loader = DataLoader(
        _Positions(examples),
        batch_sampler=iter(plan),
        num_workers=workers,
        multiprocessing_context=context,
        collate_fn=collate,
    )
    for batch, positions in zip(loader, plan, strict=True):
        for row, (example, position) in enumerate(zip(batch.examples, positions, strict=True)):
            expected = examples.example(position)
            assert same(example, expected)
            assert batch.waveforms[row].numpy().tobytes() == expected.waveform.tobytes()
            assert batch.clip_targets[row].tolist() == expected.clip_target.tolist()
        assert not batch.has_frames.any() and batch.teacher is None


def test_an_epoch_is_every_clip_once_and_balanced_every_class_equally_often():
    clips, reader = tones(9)
    clips = [*clips[:4], clips[6]]  # bell, dog, rain, bell, bell
    examples = ClipExamples(clips_recipe(), clips, reader)
    assert examples.epoch_size == 5
    for epoch in range(3):
        names = [examples.example(5 * epoch + place).name for place in range(5)]
        assert sorted(names) == sorted(str(clip.path) for clip in clips)
    balanced = ClipExamples(clips_recipe("train.balanced=true"), clips * 3, reader)
    targets = sum(balanced.example(position).clip_target for position in range(15))
    assert targets.tolist() == [5, 5, 5]


# ------------------------------------------------------------------ what cannot be read


def test_unreadable_clips_are_replaced_and_told():
    clips, reader = tones(6)
    del reader.waveforms["dog1.wav"]
    examples = ClipExamples(clips_recipe(), clips, reader)
    found = [examples.example(position) for position in range(6)]
    (replaced,) = [example for example in found if example.unreadable]
    assert replaced.unreadable[0] == ("dog1.wav", "dog1.wav: is damaged")
    assert replaced.name != "dog1.wav"
    heard = amplitudes(replaced.waveform)
    assert heard.argmax() == replaced.clip_target.argmax() and replaced.clip_target.sum() == 1
    # The same one every time.
    assert same(ClipExamples(clips_recipe(), clips, reader).example(replaced.position), replaced)


def test_a_disk_that_is_gone_ends_the_run():
    clips, _ = tones(6)
    with pytest.raises(DataError, match=r"20 clips in a row cannot be read, the last one: \w+.wav: is damaged; check"):
        ClipExamples(clips_recipe(), clips, Memory({})).example(0)


def test_quota_of_unreadable_clips():
    recipe = clips_recipe("data.unreadable=0.1")
    check_quota(recipe, 2, 29)
    with pytest.raises(UsageError, match=r"3 of 29 clips cannot be read, more than the 2 that data.unreadable 0.1 all"):
        check_quota(recipe, 3, 29)
    with pytest.raises(UsageError, match=r"1 of 5 clips .* more than the 0"):
        check_quota(recipe, 1, 5)


# ------------------------------------------------------------------ saved logits


def test_saved_logits_come_in_the_order_of_the_labels(tmp_path):
    logits = np.arange(8, dtype=np.float32).reshape(2, 4)
    names, labels = ["bell0.wav", "rain2.wav"], ["rain", "cat", "bell", "dog"]
    np.savez(tmp_path / "t.npz", names=names, labels=labels, logits=logits)
    found = saved_logits(tmp_path / "t.npz", LABELS)
    assert {name: row.tolist() for name, row in found.items()} == {"bell0.wav": [2, 3, 0], "rain2.wav": [6, 7, 4]}
    clips, reader = tones(3)
    examples = ClipExamples(clips_recipe(), clips, reader, teacher=found)
    for position in range(3):
        example = examples.example(position)
        expected = found.get(Path(example.name).name)
        assert example.teacher is None if expected is None else example.teacher.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": ["rain", "bell", "cat", "mouse"]}, "the teacher lacks the classes dog"),
        ({"logits": np.zeros((2, 3))}, r"expected finite logits of shape \(2, 4\), got \(2, 3\)"),
        ({"logits": np.full((2, 4), np.nan)}, "expected finite logits"),
        ({"logits": None}, "cannot be read as saved logits"),
    ],
)
def test_saved_logits_that_are_none(tmp_path, changes, words):
    good = {"names": ["a.wav", "b.wav"], "labels": ["rain", "cat", "bell", "dog"], "logits": np.zeros((2, 4))}
    np.savez(tmp_path / "t.npz", **{key: value for key, value in (good | changes).items() if value is not None})
    with pytest.raises(DataError, match=words) as caught:
        saved_logits(tmp_path / "t.npz", LABELS)
    assert "\n" not in str(caught.value) and "t.npz" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_files_that_are_no_saved_logits(tmp_path, content):
    if content is not None:
        (tmp_path / "t.npz").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as saved logits"):
        saved_logits(tmp_path / "t.npz", LABELS)


# ------------------------------------------------------------------ parts of a corpus

FEW = ("dog", "rain", "clock_tick")


@pytest.fixture(scope="module")
def esc(tmp_path_factory):
    return make_esc50(tmp_path_factory.mktemp("esc"), labels=FEW)


def opened(root, *overrides, corpus="esc50", labels=FEW):
    named = f"data.labels={list(labels)}" if labels else "data.labels=[]"
    recipe = load_recipe("esc50", [*TINY_CLIPS, *PLAIN, f"data.corpus={corpus}", named, *overrides])
    return open_run_data(recipe, root, lambda line, share: None)


def names(clips):
    return {clip.path.name for clip in clips}


@pytest.mark.parametrize("fold", [1, 5])
def test_the_test_fold_is_held_out(esc, fold):
    data = opened(esc, f"data.test_fold={fold}")
    assert len(data.train_clips) == 24 and len(data.test) == 6 and not len(data.select)
    assert all(name.startswith(f"{fold}-") for name in names(data.test))
    assert not any(name.startswith(f"{fold}-") for name in names(data.train_clips))
    assert data.train.epoch_size == 24 and data.recipe.data.labels == FEW and data.recipe.model.num_classes == 3


def test_all_folds_are_trained_on_without_a_test_fold(esc):
    assert len(opened(esc).train_clips) == 30
    with pytest.raises(DataError, match=r"no clips of the held-out fold 9; there are folds 1, 2, 3, 4, 5"):
        opened(esc, "data.test_fold=9")
    assert folds_in(opened(esc).recipe, esc) == [1, 2, 3, 4, 5]


def test_folds_kept_out_are_neither_trained_on_nor_scored(esc):
    data = opened(esc, "data.test_fold=2", "data.without_folds=[1, 4]")
    assert {name[0] for name in names(data.train_clips)} == {"3", "5"} and {n[0] for n in names(data.test)} == {"2"}
    with pytest.raises(DataError, match=r"no clips of the held-out fold 9"):
        opened(esc, "data.without_folds=[9]")
    with pytest.raises(ConfigError, match="test_fold 2 is among without_folds"):
        opened(esc, "data.test_fold=2", "data.without_folds=[2]")


def test_the_selection_share_has_no_recording_in_common(esc):
    """Two takes of each recording: both on one side."""
    data = opened(esc, "data.test_fold=2", "data.select=0.25")
    parts = [names(data.train_clips), names(data.select), names(data.test)]
    assert sum(map(len, parts)) == 30 and len(set.union(*parts)) == 30
    recordings = [{recording_of(name) for name in part} for part in parts]
    assert not recordings[0] & recordings[1] and not recordings[1] & recordings[2] and not recordings[0] & recordings[2]
    assert {label for clip in data.select for label in clip.labels} == set(FEW)
    assert names(opened(esc, "data.test_fold=2", "data.select=0.25").select) == parts[1]
    assert names(opened(esc, "data.test_fold=2", "data.select=0.25", "train.seed=7").select) != parts[1]


def test_shares_of_a_folder_are_by_recording(folder):
    data = opened(folder, "data.select=0.3", "data.test=0.3", corpus="folder", labels=())
    recordings = [{clip.path.stem[:-3] for clip in part} for part in (data.train_clips, data.select, data.test)]
    assert all(recordings) and sum(map(len, recordings)) == len(set.union(*recordings)) == 9
    assert data.recipe.data.labels == ("bell", "dog", "rain")


def test_official_splits_are_kept(tmp_path):
    words = ("backward", "bed")
    root = make_speech_commands(tmp_path, words=words)
    data = opened(root, "data.select=0.5", "data.test=0.3", corpus="speech_commands", labels=words)
    speakers = [{clip.path.name[:8] for clip in part} for part in (data.train_clips, data.select, data.test)]
    assert speakers == [{"0a7c2a8d", "1b4c9b89", "9db2bfe9"}, {"c1d39ce8"}, {"eb3f7d82"}]


def test_what_cannot_be_learnt_is_refused(esc, folder):
    with pytest.raises(DataError, match="rain"):
        opened(esc, labels=("dog", "clock_tick"))
    with pytest.raises(DataError, match="cat"):
        opened(folder, corpus="folder", labels=(*LABELS, "cat"))
    with pytest.raises(DataError, match="no known layout of labelled recordings"):
        opened(esc / "away", corpus="auto", labels=())


@pytest.mark.parametrize(
    ("lengths", "seconds", "part"),
    [
        ([1.0] * 20, 1.25, 4),
        ([1.26] * 20, 1.25, 4),  # a few samples more than a quarter
        ([1.3] * 20, 2.5, 2),
        ([1.0] * 19 + [4.0], 1.25, 4),  # nine of ten count
        ([1.0] * 17 + [4.0] * 3, 5.0, 1),
        ([30.0] * 3, 5.0, 1),
        ([0.01], 0.625, 8),
    ],
)
def test_length_of_clips_by_the_data(lengths, seconds, part):
    """A chunk of 5 s, of which the model also takes a half, a quarter and an eighth."""
    clips = [Clip(Path(f"{number}.wav"), ("dog",)) for number in range(len(lengths))]

    class Lengths(Memory):
        def duration(self, clip):
            return lengths[int(clip.path.stem)]

    recipe = with_length(clips_recipe("data.clip_seconds=0"), clips, Lengths({}))
    assert (recipe.data.clip_seconds, recipe.inference.chunk_part, recipe.inference.short) == (seconds, part, "native")
    assert recipe.inference.hop_seconds == pytest.approx(max(0.1, seconds / 2))
    assert recipe.checkpoint({}).heard_samples == seconds * RATE
    # A length that is given stays; the published ways have no chunks but whole ones.
    given = with_length(clips_recipe("data.clip_seconds=2.0"), clips, Lengths({}))
    assert (given.data.clip_seconds, given.inference.chunk_part) == (2.0, 2)
    for fit, short in (("tile", "tile"), ("pad", "pad"), ("stretch", "pad")):  # heard as they are trained
        recipe = clips_recipe("data.clip_seconds=2.0", f"train.fit={fit}")
        found = with_length(recipe, clips, Lengths({}))
        assert found.inference.short == short
        assert found == dataclasses.replace(recipe, inference=dataclasses.replace(recipe.inference, short=short))


def test_clips_that_nothing_is_selected_on_are_scored(tmp_path):
    root = make_csv(tmp_path, split=True)
    table = (root / "sounds.csv").read_text()
    (root / "sounds.csv").write_text(table.replace(",test\n", ",train\n"))
    for settings, parts in (((), (9, 0, 3)), (("train.select_steps=1",), (9, 3, 0))):
        data = opened(root, *settings, corpus="csv", labels=())
        assert (len(data.train_clips), len(data.select), len(data.test)) == parts
        assert any("are scored: nothing is selected on them" in note for note in data.notes) == (not settings)


def test_digest_tells_other_data_apart(esc, tmp_path):
    first = data_digest(opened(esc, "data.test_fold=1"))
    assert data_digest(opened(esc, "data.test_fold=1")) == first
    elsewhere = make_esc50(tmp_path / "moved", labels=FEW)
    assert data_digest(opened(elsewhere, "data.test_fold=1")) == first  # the same data in another place
    assert data_digest(opened(esc, "data.test_fold=2")) != first
    assert data_digest(opened(esc, "data.test_fold=1", labels=FEW[::-1])) != first
    table = elsewhere / "meta/esc50.csv"
    table.write_text(table.read_text().replace("-A-0.wav,3,0,dog", "-A-0.wav,3,10,rain"))
    assert data_digest(opened(elsewhere, "data.test_fold=1")) != first


def test_all_clips_that_fit_are_read_beforehand(esc):
    told = []
    recipe = load_recipe("esc50", [*TINY_CLIPS, *PLAIN, "data.corpus=esc50", f"data.labels={list(FEW)}"])
    data = open_run_data(recipe, esc, lambda line, share: told.append((line, share)))
    assert len(told) == 30 and told[0][0].startswith("reading ") and 0 <= told[-1][1] <= 1
    assert len(data.reader._cache) == 30
    told.clear()
    recipe = load_recipe(
        "esc50", [*TINY_CLIPS, *PLAIN, "data.corpus=esc50", f"data.labels={list(FEW)}", "data.cache_gb=0"]
    )
    assert not open_run_data(recipe, esc, lambda line, share: told.append(line)).reader._cache and not told


def test_backgrounds_of_clips(esc, tmp_path):
    write_audio(tmp_path / "noise/hum.wav", tone(50, 6.0))
    recipe = load_recipe(
        "esc50",
        [
            *TINY_CLIPS, *PLAIN, "data.corpus=esc50", f"data.labels={list(FEW)}", "augment.background_share=1",
            f"data.backgrounds={tmp_path / 'noise'}", "augment.max_snr_db=5",
        ],
    )  # fmt: skip
    waveform = open_run_data(recipe, esc, lambda line, share: None).train.example(0).waveform
    assert np.abs(waveform[RATE:]).max() > 0  # a tenth of a second of sound, then the background alone
