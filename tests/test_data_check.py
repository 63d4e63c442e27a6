"""What a check of a corpus finds, on recordings whose flaws are known."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from shared_data import shared

from htsat.data import check
from htsat.data.check import CheckReport, check_corpus
from htsat.data.corpora import Clip, Corpus, open_corpus
from htsat.errors import DataError
from htsat.events import Event

RATE = 8000


def recording(path: Path, seed: int = 0, seconds: float = 1.0, rate: int = RATE, gain: float = 0.1, **settings) -> Path:
    """Write noise; the same seed gives the same sound."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = gain * np.random.default_rng(seed).uniform(-1, 1, round(seconds * rate))
    soundfile.write(path, noise, rate, **settings)
    return path


def a_corpus(folder: Path, *clips: Clip, labels=("dog", "cat"), name="esc50", objective="single_label", warnings=()):
    return Corpus(name, folder, labels, objective, clips, warnings)


def found(report: CheckReport, what: str = "problems") -> list[tuple[str, str]]:
    return [(finding.kind, finding.message) for finding in getattr(report, what)]


@pytest.fixture
def sound(tmp_path: Path) -> Corpus:
    """Two classes in two folds; nothing is wrong."""
    clips = [
        Clip(
            recording(tmp_path / f"{number}.wav", number), (label,), folds=frozenset((fold,)), group=f"source {number}"
        )
        for number, (label, fold) in enumerate([("dog", 1), ("cat", 1), ("dog", 2), ("cat", 2)])
    ]
    return a_corpus(tmp_path, *clips)


def changed(corpus: Corpus, number: int, **changes) -> Corpus:
    clips = list(corpus.clips)
    clips[number] = replace(clips[number], **changes)
    return replace(corpus, clips=tuple(clips))


def test_a_sound_corpus(sound: Corpus, tmp_path: Path) -> None:
    recording(tmp_path / "1.wav", 1, seconds=2.5, rate=16000)
    recording(tmp_path / "2.wav", 2, seconds=4.0)
    seen: list[tuple[int, int]] = []
    report = check_corpus(sound, on_clips=lambda done, total: seen.append((done, total)))
    assert (report.problems, report.warnings) == ((), ())
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert report.durations is not None
    assert vars(report.durations) == pytest.approx(
        {"shortest": 1.0, "median": 1.75, "longest": 4.0, "total_hours": 8.5 / 3600}
    )
    assert (report.sample_rates, report.channels) == ({8000: 3, 16000: 1}, {1: 4})
    assert report.parts == {"fold 1": 2, "fold 2": 2}
    assert report.classes == {"dog": {"fold 1": 1, "fold 2": 1}, "cat": {"fold 1": 1, "fold 2": 1}}
    assert (report.num_clips, report.balance, report.decoded) == (4, 1.0, True)
    assert json.loads(json.dumps(report.to_dict()))["durations"]["longest"] == 4.0


def test_balance_and_channels(tmp_path: Path) -> None:
    clips = [Clip(recording(tmp_path / f"{i}.wav", i), ("dog",)) for i in range(3)]
    soundfile.write(tmp_path / "s.wav", np.random.default_rng(9).uniform(-0.1, 0.1, (RATE, 2)), RATE)
    report = check_corpus(a_corpus(tmp_path, *clips, Clip(tmp_path / "s.wav", ("cat",))))
    assert report.balance == 3.0
    assert report.channels == {1: 3, 2: 1}
    assert report.classes == {"dog": {"all": 3}, "cat": {"all": 1}}


def test_unreadable_recordings_are_named_with_the_reason(sound: Corpus, tmp_path: Path) -> None:
    whole = (tmp_path / "0.wav").read_bytes()
    (tmp_path / "0.wav").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "1.wav").write_text("no sound at all")
    (tmp_path / "2.wav").unlink()
    waveform = np.zeros(RATE)
    waveform[4000] = np.nan
    soundfile.write(tmp_path / "3.wav", waveform, RATE, subtype="FLOAT")
    report = check_corpus(sound)
    kinds, messages = zip(*found(report), strict=True)
    assert set(kinds) == {"unreadable"}
    assert [message.split(":")[0] for message in messages] == ["0.wav", "1.wav", "2.wav", "3.wav"]
    for message, word in zip(messages, ("truncated", "text", "no such file", "0.500 s is NaN"), strict=True):
        assert word in message and str(tmp_path) not in message
    assert report.durations is None and report.sample_rates == {}
    fast = check_corpus(sound, decode=False)
    assert [f.files for f in fast.problems] == [("0.wav",), ("1.wav",), ("2.wav",)], "a NaN lies behind the header"


def test_silence_and_clipping_are_warnings(sound: Corpus, tmp_path: Path) -> None:
    recording(tmp_path / "0.wav", gain=0)
    recording(tmp_path / "1.wav", gain=0)  # as silent as the first, but no duplicate of it
    recording(tmp_path / "2.wav", gain=3e-5, subtype="FLOAT")
    recording(tmp_path / "3.wav", gain=2.0, subtype="FLOAT")
    report = check_corpus(sound)
    assert report.problems == ()
    *silent, clipped = found(report, "warnings")
    assert silent == [
        *(("silent", "0.wav: digital silence"), ("silent", "1.wav: digital silence"), ("silent", "2.wav: peak -90 dB")),
    ]
    # half of the values of a uniform noise of +-2 lie beyond +-1
    waveform, _ = soundfile.read(tmp_path / "3.wav", dtype="float32")
    beyond = int((abs(waveform) >= 0.9999).sum())
    assert clipped == ("clipped", f"3.wav: {beyond:,} samples at or beyond full scale, peak {abs(waveform).max():.3f}")


def test_duplicates(sound: Corpus, tmp_path: Path) -> None:
    # The same samples in another file format.
    waveform, _ = soundfile.read(tmp_path / "0.wav", dtype="int16")
    soundfile.write(tmp_path / "0.flac", waveform, RATE)
    twin = replace(sound.clips[0], path=tmp_path / "0.flac")
    inside = check_corpus(replace(sound, clips=(*sound.clips, twin)))
    assert found(inside) == []
    assert found(inside, "warnings") == [("duplicate", "the same sound: 0.wav, 0.flac")]
    across = check_corpus(replace(sound, clips=(*sound.clips, replace(twin, folds=frozenset((2,)), group=None))))
    assert found(across) == [("duplicate", "fold 1 and fold 2 hold the same sound: 0.wav, 0.flac")]
    contradiction = check_corpus(replace(sound, clips=(*sound.clips, replace(twin, labels=("cat",)))))
    assert found(contradiction) == [("duplicate", "the same sound is labelled cat and dog: 0.wav, 0.flac")]
    assert contradiction.problems[0].files == ("0.wav", "0.flac")
    twice = check_corpus(replace(sound, clips=(*sound.clips, sound.clips[0])))
    assert found(twice) == [("duplicate", "0.wav: is listed 2 times")]
    # Another rate is another sound.
    soundfile.write(tmp_path / "0.flac", waveform, RATE * 2)
    assert found(check_corpus(replace(sound, clips=(*sound.clips, twin))), "warnings") == []


def test_a_mixture_of_both_folds_duplicates_nothing_of_one(sound: Corpus, tmp_path: Path) -> None:
    recording(tmp_path / "2.wav", 0)
    mixed = changed(sound, 2, folds=frozenset((1, 2)))
    assert found(check_corpus(mixed)) == []


def test_leaks(sound: Corpus) -> None:
    leaking = changed(sound, 2, group="source 0")
    text = "fold 1 and fold 2 share the source or speaker source 0: 0.wav, 2.wav"
    assert found(check_corpus(leaking)) == [("leak", text)]
    # Where groups are guesses from names, the reader of the corpus has warned of them in its own words.
    guessed = replace(leaking, name="folder", warnings=("fold 1 and fold 2 share what seems to be ...",))
    assert found(check_corpus(guessed)) == []
    assert found(check_corpus(guessed), "warnings") == [("corpus", guessed.warnings[0])]


def test_labels(sound: Corpus) -> None:
    report = check_corpus(changed(changed(sound, 0, labels=("dgo",)), 1, labels=("dog", "cat")))
    assert [problem for problem in found(report) if problem[0] == "label"] == [
        ("label", "0.wav: label 'dgo' is none of the 2 classes; did you mean 'dog'?"),
        ("label", "1.wav: has 2 labels (dog, cat); expected exactly one"),
    ]


def test_classes_without_clips(sound: Corpus) -> None:
    corpus = replace(sound, labels=("dog", "cat", "owl"))
    assert found(check_corpus(corpus)) == [("class", "1 of 3 classes have no clips: owl")]
    assert found(check_corpus(changed(sound, 2, labels=("cat",))), "warnings") == [
        ("class", "1 classes have no clips in fold 2: dog")
    ]
    splits = [replace(clip, split=["train", "test"][number % 2]) for number, clip in enumerate(sound.clips)]
    report = check_corpus(replace(sound, clips=tuple(splits)))  # dogs to train on, cats to test with
    assert found(report) == [("class", "1 classes have no clips to train on: cat")]
    assert found(report, "warnings") == [("class", "1 classes have no clips in test: dog")]
    # Said by the reader of the corpus already: not twice.
    told = check_corpus(replace(corpus, warnings=("1 of 3 classes have no clips: owl", "other")))
    assert found(told, "warnings") == [("corpus", "other")]


def test_events(sound: Corpus) -> None:
    events = (Event("dog", 0.5, 1.005), Event("dog", 0.1, 1.05), Event("dog", 0.2, 1.5), Event("cat", 0.0, 0.5))
    report = check_corpus(changed(sound, 0, events=events))
    assert found(report, "warnings") == [("event", "0.wav: dog ends at 1.05 s, but the recording lasts 1 s")]
    assert found(report) == [
        ("event", "0.wav: dog ends at 1.5 s, but the recording lasts 1 s"),
        ("event", "0.wav: cat has times, but is no label of it"),
    ]


def test_processes_find_the_same(tmp_path: Path) -> None:
    clips = [Clip(recording(tmp_path / f"{i}.wav", i % 30), ("dog",)) for i in range(40)]
    (tmp_path / "7.wav").write_bytes(b"RIFF")
    corpus = a_corpus(tmp_path, *clips, labels=("dog",))
    alone = check_corpus(corpus)
    assert [f.kind for f in alone.warnings] == ["duplicate"] * 9
    assert check_corpus(corpus, jobs=2) == alone


def test_killed_process(sound: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_facts", _die)
    with pytest.raises(DataError, match="was killed"):
        check_corpus(replace(sound, clips=sound.clips * 10), jobs=2)


def _die(clip: Clip, decode: bool) -> None:
    os._exit(9)


def test_packed_clips(sound: Corpus, tmp_path: Path) -> None:
    from htsat.data.shards import open_shards, pack

    recording(tmp_path / "3.wav", gain=0)
    pack(sound, tmp_path / "packed", sample_rate=None)
    report = check_corpus(open_shards(tmp_path / "packed"))
    ((kind, message),) = found(report, "warnings")
    assert (kind, message) == ("silent", "shard-00000.tar row 3: digital silence")
    shard = tmp_path / "packed" / "shard-00000.tar"
    content = bytearray(shard.read_bytes())
    content[content.index(b"RIFF") + 100] ^= 1
    shard.write_bytes(content)
    assert [(f.kind, f.files) for f in check_corpus(open_shards(tmp_path / "packed")).problems] == [
        ("unreadable", ("shard-00000.tar row 0",))
    ]


def test_hdf5_rows(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "clips.h5", "w") as file:
        file["waveform"] = np.array([[0] * 500, [32767] * 500, [100] * 500], np.int16)
        file.attrs["sample_rate"] = 1000 * 8
    clips = [Clip(tmp_path / "clips.h5", ("dog",), index=i) for i in range(4)]
    report = check_corpus(a_corpus(tmp_path, *clips, labels=("dog",)))
    assert report.sample_rates == {8000: 3}
    assert [f.kind for f in report.warnings] == ["silent", "clipped"]
    assert [f.files for f in report.problems] == [("clips.h5 row 3",)]


def test_esc10() -> None:
    """The active parts of six clips were marked up to 5 s, a little after the clips themselves end."""
    report = check_corpus(open_corpus("esc10", shared("data", "esc10")), decode=False)
    assert (report.num_clips, report.parts) == (320, {f"fold {n}": 80 for n in (1, 2, 3, 4)})
    assert set(report.sample_rates) == {44100}
    assert report.problems == ()
    assert [f.kind for f in report.warnings] == ["event"] * 6
