"""Corpora in their official layouts: miniatures whole and broken in many ways, and the real ones."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from miniature import RATE, make_root, write_table
from miniature_corpora import (
    AUDIOSET_CLASSES,
    STRONG_COLUMNS,
    make_audioset,
    make_csv,
    make_desed,
    make_esc50,
    make_folder,
    make_speech_commands,
    make_strong,
    video_of,
)
from shared_data import shared

from htsat.data.corpora import (
    BACKGROUND_NOISE,
    KINDS,
    balance,
    empty_classes,
    leaks,
    open_corpus,
    read_unlabelled,
    recognise,
)
from htsat.data.reading import ClipReader
from htsat.errors import DataError, UsageError
from htsat.events import Event
from htsat.labels import label_set

ESC_LABELS = ("dog", "cat", "rain", "hand_saw")
WORDS = ("backward", "cat", "yes")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpora")
    make_esc50(root / "esc50", labels=ESC_LABELS)
    make_speech_commands(root / "speech_commands", words=WORDS)
    make_desed(root / "desed")
    make_audioset(root / "audioset")
    make_audioset(root / "hdf5", hdf5=True)
    make_folder(root / "folder")
    make_folder(root / "splits", recordings=1, splits=("train", "val", "test"))
    make_csv(root / "csv")
    make_csv(root / "multi", multi=True, split=True)
    make_strong(root / "strong")
    make_root(root / "everyday")
    return root


@pytest.fixture
def copy(whole, tmp_path):
    """Return a function that copies a corpus, to break it."""

    def link(source, target):
        """Audio is only ever deleted or replaced here; tables are edited."""
        return os.link(source, target) if source.endswith(".wav") else shutil.copyfile(source, target)

    return lambda name: Path(shutil.copytree(whole / name, tmp_path / name, copy_function=link))


def edit(path, old, new, count=1):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, count), encoding="utf-8")


def problems(kind, folder, **options):
    """Return what is wrong with a corpus: one line that begins with its folder."""
    with pytest.raises(DataError) as caught:
        open_corpus(kind, folder, **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(folder))
    return message


# ------------------------------------------------------------------ what is read


def test_esc50(whole):
    corpus = open_corpus("esc50", whole / "esc50")
    assert corpus.labels == ("dog", "cat", "rain", "hand_saw")  # targets 0, 5, 10, 49: not the alphabet
    assert (corpus.name, corpus.objective, corpus.warnings) == ("esc50", "single_label", ())
    assert len(corpus.clips) == 4 * 5 * 2
    by_name = {clip.path.name: clip for clip in corpus.clips}
    assert by_name["3-100199-B-49.wav"].labels == ("hand_saw",)
    assert by_name["3-100199-B-49.wav"].group == by_name["3-100199-A-49.wav"].group == "100199"
    assert all(clip.folds == {int(clip.path.name[0])} and clip.split is None for clip in corpus.clips)
    assert balance(corpus) == {label: {f"fold {fold}": 2 for fold in range(1, 6)} for label in corpus.labels}
    assert leaks(corpus) == []


def test_esc10_of_esc50(whole):
    corpus = open_corpus("esc10", whole / "esc50")
    assert (corpus.name, corpus.labels, len(corpus.clips)) == ("esc10", ("dog", "rain"), 20)


def test_esc10_of_its_own_with_active_parts(whole):
    corpus = open_corpus("esc10", whole / "everyday/esc10")
    assert len(corpus.clips) == 40 and corpus.clips[0].events == (Event("chainsaw", 0.0, 1.0),)


def test_esc_beside_audio(copy):
    root = copy("esc50")
    (root / "meta/esc50.csv").rename(root / "metadata.csv")
    assert recognise(root) == "esc50"
    assert len(open_corpus("esc50", root).clips) == 40 and len(open_corpus("esc10", root).clips) == 20


def test_speech_commands(whole):
    corpus = open_corpus("speech_commands", whole / "speech_commands", labels=WORDS)
    assert corpus.labels == WORDS
    assert balance(corpus) == {word: {"train": 4, "validation": 1, "test": 1} for word in WORDS}
    assert {clip.group for clip in corpus.clips if clip.split == "test"} == {"eb3f7d82"}
    assert {clip.path.parent.name for clip in corpus.clips} == set(WORDS)
    # The noises are no class, but can be had.
    assert [clip.path.name for clip in read_unlabelled(corpus.folder / BACKGROUND_NOISE)] == ["white_noise.wav"]


def test_speech_commands_has_35_words(tmp_path):
    words = label_set("speech_commands_v2")
    for word in words:
        (tmp_path / word).mkdir()
        (tmp_path / word / "0a7c2a8d_nohash_0.wav").touch()
    for name in ("validation_list.txt", "testing_list.txt"):
        (tmp_path / name).touch()
    assert open_corpus("speech_commands", tmp_path).labels == words


def test_keywords(whole):
    corpus = open_corpus("keywords", whole / "everyday/arabic_speech_commands")
    assert corpus.labels == ("down", "enter", "five") and corpus.objective == "single_label"
    assert balance(corpus)["five"] == {"train": 6, "validation": 2}
    assert {clip.group for clip in corpus.clips if clip.split == "validation"} == {"00000006", "00000007"}


def test_desed(whole):
    corpus = open_corpus("desed", whole / "desed")
    assert corpus.labels == label_set("desed") and corpus.objective == "multi_label"
    assert Counter(clip.split for clip in corpus.clips) == {"train": 20, "validation": 21, "test": 11}
    # Of twenty training clips, ten have labels alone; those without labels are no clips.
    assert sum(clip.events is None for clip in corpus.clips) == 10
    assert all(clip.labels or clip.events == () for clip in corpus.clips)
    first = corpus.clips[0]
    assert (first.path.name, first.labels) == (
        "Ywideo-_0000_0.000_10.000.wav", ("Alarm_bell_ringing", "Blender")
    ) and first.group == "wideo-_0000"  # fmt: skip
    (public,) = [clip for clip in corpus.clips if clip.path.name == "pideo-_0003_30.000_40.000.wav"]
    assert public.events == (Event("Dishes", 0.0, 0.25), Event("Dog", 0.25, 0.5)) and public.group == "pideo-_0003"
    assert sum(clip.path.name == "silent.wav" and clip.events == () for clip in corpus.clips) == 2
    assert len(corpus.warnings) == 1 and "strong (metadata/train/audioset_strong.tsv)" in corpus.warnings[0]


def test_desed_by_parts_and_as_unpacked(copy):
    root = copy("desed")
    chosen = open_corpus("desed", root, parts=("weak", "public"))
    assert Counter(clip.split for clip in chosen.clips) == {"train": 10, "test": 11} and chosen.warnings == ()
    # Archives unpack into dataset/; one misspells a folder of tables; some keep 16 kHz copies alone.
    (root / "dataset").mkdir()
    for name in ("audio", "metadata"):
        (root / name).rename(root / "dataset" / name)
    dataset = root / "dataset"
    (dataset / "metadata/train/synthetic21_train").rename(dataset / "metadata/train/synhtetic21_train")
    (dataset / "audio/train/weak").rename(dataset / "audio/train/weak_16k")
    for path in (dataset / "audio/validation/validation").iterdir():
        path.rename(dataset / "audio/validation" / path.name)
    (dataset / "audio/validation/validation").rmdir()
    again = open_corpus("desed", root)
    assert recognise(root) == "desed" and len(again.clips) == 52
    assert [clip.labels for clip in again.clips if clip.split == "train"][:10] == [c.labels for c in chosen.clips[:10]]


def test_desed_of_2019(tmp_path):
    (tmp_path / "audio/train/synthetic").mkdir(parents=True)
    (tmp_path / "audio/train/synthetic/0.wav").touch()
    write_table(tmp_path / "metadata/train/synthetic.tsv", STRONG_COLUMNS, [("0.wav", 1, 2, "Cat")])
    (clip,) = open_corpus("desed", tmp_path, allow_empty=True).clips
    assert clip.path == tmp_path / "audio/train/synthetic/0.wav" and clip.events == (Event("Cat", 1.0, 2.0),)


@pytest.mark.parametrize("name", ["audioset", "hdf5"])
def test_audioset(whole, name):
    corpus = open_corpus("audioset", whole / name)
    names = label_set("audioset")
    assert corpus.labels == names and corpus.objective == "multi_label" and recognise(whole / name) == "audioset"
    # Ten segments in each table, of which the eighth has no recording: Cat (81), Music (137) among them.
    expected = {}
    for number in (n for n in range(30) if n % 10 != 7):
        one, two = AUDIOSET_CLASSES[number % 5], AUDIOSET_CLASSES[(number + 1) % 5]
        expected[video_of(number)] = ({names[one], names[two]} if number % 10 >= 5 else {names[one]}, number)
    assert {clip.group: set(clip.labels) for clip in corpus.clips} == {v: found for v, (found, _) in expected.items()}
    assert all(clip.split == ("test" if expected[clip.group][1] >= 20 else "train") for clip in corpus.clips)
    assert "1 of 10" in " ".join(corpus.warnings) and "522 of 527 classes have no clips" in corpus.warnings[-1]
    assert set(empty_classes(corpus)) == set(names) - {names[index] for index in AUDIOSET_CLASSES}


def test_audioset_layouts_hold_the_same_sound(whole):
    clips = {clip.group: clip for clip in open_corpus("audioset", whole / "audioset").clips}
    packed = {clip.group: clip for clip in open_corpus("audioset", whole / "hdf5").clips}
    assert clips.keys() == packed.keys() and all(clip.index is not None for clip in packed.values())
    reader = ClipReader(RATE)
    for video, clip in packed.items():
        difference = np.abs(reader.read(clip) - reader.read(clips[video])).max()
        assert difference <= 0.51 / 32767, video


def test_audioset_whose_tables_know_both(copy, whole):
    """A workspace of PANNs has tables, clips and packed files; the packed ones are taken unless told."""
    root = copy("audioset")
    shutil.copytree(whole / "hdf5/hdf5s", root / "hdf5s")
    assert all(clip.index is not None for clip in open_corpus("audioset", root).clips)
    assert all(clip.index is None for clip in open_corpus("audioset", root, layout="clips").clips)


def test_folder(whole):
    corpus = open_corpus("folder", whole / "folder")
    assert corpus.labels == ("bell", "dog", "rain") and balance(corpus)["dog"] == {"all": 12}
    groups = Counter(clip.group for clip in corpus.clips)
    assert groups == {f"{letter}a{recording}": 3 for letter in "bdr" for recording in "klmn"}


def test_folder_with_splits(whole):
    corpus = open_corpus("folder", whole / "splits")
    assert balance(corpus) == {label: {"train": 3, "validation": 3, "test": 3} for label in ("bell", "dog", "rain")}
    assert leaks(corpus) == [] and recognise(whole / "splits") == "folder"


def test_folder_goes_deep_and_tells_what_it_leaves(copy):
    root = copy("folder")
    (root / "dog/site/day").mkdir(parents=True)
    (root / "dog/dak_00.wav").rename(root / "dog/site/day/00.WAV")
    (root / "loose.wav").touch()
    for name in (".trash", "_noise"):
        (root / name).mkdir()
        (root / name / "x.wav").touch()
    (root / "dog/.DS_Store").touch()
    (root / "dog/._dak_01.wav").touch()
    corpus = open_corpus("folder", root)
    assert len(corpus.clips) == 36 and corpus.labels == ("bell", "dog", "rain")
    (deep,) = [clip for clip in corpus.clips if clip.path.name == "00.WAV"]
    assert deep.labels == ("dog",) and deep.group == "site/day"
    assert any("loose.wav" in line for line in corpus.warnings) and any(".trash, _noise" in w for w in corpus.warnings)


def test_csv(whole):
    corpus = open_corpus("csv", whole / "csv")
    assert (corpus.objective, corpus.labels, len(corpus.clips)) == ("single_label", ("bell", "dog", "rain"), 12)
    assert corpus.clips[4].path == whole / "csv/audio/sitee.wav" and corpus.clips[4].labels == ("dog",)
    assert open_corpus("csv", whole / "csv/sounds.csv").clips == corpus.clips
    multi = open_corpus("csv", whole / "multi")
    assert multi.objective == "multi_label" and multi.clips[1].labels == ("dog", "rain")
    assert balance(multi) == {
        "bell": {"train": 3, "validation": 1, "test": 2},
        "dog": {"train": 3, "validation": 1, "test": 2},
        "rain": {"train": 3, "validation": 2, "test": 1},
    }


def test_csv_with_other_columns(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.wav").write_text(name)
    columns = ("path", "labels", "fold", "group")
    rows = [("a.wav", "dog, cat", 1, "x"), ("b.wav", "", 2, "y"), ("c.wav", "cat", 1, "")]
    write_table(tmp_path / "all.tsv", columns, rows)
    a, b, c = open_corpus("csv", tmp_path).clips
    assert (a.labels, a.folds, a.group) == (("dog", "cat"), {1}, "x") and (b.labels, c.group) == ((), None)


def test_strong(whole, copy):
    corpus = open_corpus("strong", whole / "strong")
    assert len(corpus.clips) == 9 and corpus.labels == ("bell", "dog", "rain") and corpus.warnings == ()
    assert corpus.clips[1].events == (Event("dog", 0.05, 0.2), Event("rain", 0.25, 0.4))
    assert (corpus.clips[8].labels, corpus.clips[8].events) == ((), ())
    assert open_corpus("strong", whole / "strong/strong.tsv").clips == corpus.clips
    root = copy("strong")
    edit(root / "strong.tsv", "scenei.wav\t\t\t\n", "")
    (warning,) = open_corpus("strong", root).warnings
    assert "1 recordings have no line and are not used: scenei.wav" in warning


def test_strong_by_splits(whole):
    corpus = open_corpus("strong", whole / "everyday/soundscapes")
    assert Counter(clip.split for clip in corpus.clips) == {"train": 12, "validation": 6}
    assert {fold for clip in corpus.clips if clip.split == "validation" for fold in clip.folds} == {4}


@pytest.mark.parametrize(
    ("kind", "name"),
    [("esc50", "esc50"), ("folder", "folder"), ("csv", "multi"), ("strong", "strong"), ("desed", "desed")],
)
def test_labels_give_the_order_and_more_classes_if_allowed(whole, kind, name):
    own = open_corpus(kind, whole / name).labels
    turned = tuple(reversed(own))
    assert open_corpus(kind, whole / name, labels=turned).labels == turned
    more = (*own, "unicorn")
    assert f"1 of {len(more)} classes have no clips: unicorn" in problems(kind, whole / name, labels=more)
    corpus = open_corpus(kind, whole / name, labels=more, allow_empty=True)
    assert corpus.labels == more and any("unicorn" in line for line in corpus.warnings)
    assert empty_classes(corpus) == ["unicorn"]
    fewer = (*own[1:], own[0] + "s")
    message = problems(kind, whole / name, labels=fewer)
    assert (
        f"the label {own[0]!r}, which is not one of the {len(own)} expected; did you mean {own[0] + 's'!r}?" in message
    )


def test_every_kind_is_recognised(whole):
    found = {name: recognise(whole / name) for name in os.listdir(whole) if name != "everyday"}
    expected = {name: name for name in found} | {
        "hdf5": "audioset", "splits": "folder", "multi": "csv"
    }  # fmt: skip
    assert found == expected
    everyday = {path.name: recognise(path) for path in (whole / "everyday").iterdir()}
    assert everyday == {
        "esc10": "esc10", "soundscapes": "strong", "arabic_speech_commands": "keywords", "backgrounds": None
    }  # fmt: skip
    assert recognise(whole / "nowhere") is None


# ------------------------------------------------------------------ what is refused


def test_wrong_corpus_is_named(whole):
    folders = {"esc50": "esc50", "speech_commands": "speech_commands", "desed": "desed", "audioset": "audioset",
               "csv": "csv", "strong": "strong", "keywords": "everyday/arabic_speech_commands"}  # fmt: skip
    for real, folder in folders.items():
        for kind in set(KINDS) - {real}:
            if (kind, real) in (("esc10", "esc50"), ("folder", "speech_commands")):
                continue
            message = problems(kind, whole / folder)
            assert f"this looks like {real}, not {kind}; expected " in message, (kind, real)
    assert "this looks like folder, not csv" in problems("csv", whole / "folder")
    assert "this is not esc50; expected audio/ and meta/esc50.csv" in problems("esc50", whole / "everyday/backgrounds")
    assert "there is no such folder; expected esc50" in problems("esc50", whole / "nowhere")


def test_root_beside_the_named_one(whole):
    assert f"did you mean {whole / 'esc50'}?" in problems("esc50", whole)
    assert f"did you mean {whole / 'desed'}?" in problems("desed", whole / "desed/audio")


def test_wrong_options(whole):
    for kind, options, words in (
        ("esc5", {}, "unknown corpus 'esc5'; did you mean 'esc50'?"),
        ("esc50", {"parts": ["weak"]}, "only desed has parts"),
        ("esc50", {"layout": "hdf5"}, "only audioset has layouts"),
        ("desed", {"parts": ["weka"]}, "did you mean 'weak'?"),
        ("esc50", {"labels": ["a", "b", "a"]}, "expected each label once, got a twice"),
        ("esc50", {"labels": []}, "expected each label once, got none"),
    ):
        with pytest.raises(UsageError, match=words.replace("?", r"\?")):
            open_corpus(kind, whole / "esc50", **options)


def test_esc_problems(copy):
    root = copy("esc50")
    table = root / "meta/esc50.csv"
    edit(table, "1-100050-A-0.wav,1,0,dog", "1-100050-A-0.wav,1,1,dog")
    edit(table, "1-100055-A-5.wav,1,5,cat", "1-100055-A-5.wav,1,5,kat")
    edit(table, "2-100105-A-5.wav,2,5,", "2-100105-A-5.wav,2,five,")
    edit(table, "3-100150-B-0.wav,3,", "3-100150-B-0.wav,2,")
    edit(table, "4-100249-B-49.wav", "4-100249-A-49.wav")
    (root / "audio/5-100250-A-0.wav").unlink()
    message = problems("esc50", root)
    for words in (
        "line 2: target 1 and category dog disagree with other lines, where dog is 0; ",
        "line 4: target 5 and category kat disagree with other lines, where 5 is cat; ",
        "expected a whole number from 0 on as target, got 'five'",
        "fold 2 and fold 3 share the source 100150: 3-100150-A-0.wav, 3-100150-B-0.wav",
        "4-100249-A-49.wav occurs twice",
        "recordings are missing: 5-100250-A-0.wav",
    ):
        assert words in message, words


def test_esc_without_columns_and_without_the_ten(copy):
    root = copy("esc50")
    edit(root / "meta/esc50.csv", "target,category,esc10,src_file", "goal,category,ten,source")
    assert "no column target, src_file; found filename, fold, goal" in problems("esc50", root)
    assert "no column target, src_file, esc10" in problems("esc10", root)


def test_speech_commands_problems(copy):
    root = copy("speech_commands")
    edit(root / "validation_list.txt", "cat/c1d39ce8_nohash_0.wav\n", "cat/c1d39ce8_nohash_7.wav\n")
    edit(root / "testing_list.txt", "yes/", "yes/c1d39ce8_nohash_0.wav\nyes/")
    (root / "cat/odd.wav").touch()
    (root / "tree").mkdir()
    (root / "tree/0a7c2a8d_nohash_0.wav").touch()
    shutil.rmtree(root / "backward")
    message = problems("speech_commands", root, labels=("backward", "cat", "three", "yes"))
    for words in (
        "testing_list.txt line 3: yes/c1d39ce8_nohash_0.wav is listed twice, for validation and test",
        "listed recordings are missing: backward/c1d39ce8_nohash_0.wav, cat/c1d39ce8_nohash_7.wav",
        "1 names have no speaker, as in yes/0a7c2a8d_nohash_0.wav: cat/odd.wav",
        "share the speaker c1d39ce8",
        "1 clips have the label 'tree', which is not one of the 4 expected; did you mean 'three'?",
        "2 of 4 classes have no clips: backward, three",
    ):
        assert words in message, words
    (root / "testing_list.txt").unlink()
    assert "testing_list.txt: cannot be read: No such file" in problems("speech_commands", root, labels=WORDS)


def test_speech_commands_of_another_version(whole):
    message = problems("speech_commands", whole / "speech_commands")
    assert "32 of 35 classes have no clips: bed, bird" in message


def test_keywords_problems(copy):
    folder = copy("everyday") / "arabic_speech_commands"
    edit(
        folder / "metadata.csv",
        "enter/00000002_NO_01.wav,enter,00000002,1,train",
        "enter/00000002_NO_01.wav,enter,00000002,1,trane",
    )
    edit(
        folder / "metadata.csv",
        "down/00000003_NO_01.wav,down,00000003,1,train",
        "down/00000003_NO_01.wav,down,00000003,1,val",
    )
    message = problems("keywords", folder)
    assert "expected train, validation, test as split, got 'trane'" in message
    assert "share the speaker 00000003: 00000003_NO_01.wav" in message


def test_desed_problems(copy):
    root = copy("desed")
    weak, validation = root / "metadata/train/weak.tsv", root / "metadata/validation/validation.tsv"
    edit(weak, "Alarm_bell_ringing,Blender", "Alarm_bell_ringing,Blendr")
    edit(weak, "\tBlender,Cat", "\t")
    edit(validation, "0.25\t0.5\tBlender", "0.25\t0.7\tBlender")
    edit(validation, "0.0\t0.25\tDog", "0.25\t0.0\tDog")
    (root / "audio/train/synthetic21_train/soundscapes/3.wav").unlink()
    shutil.rmtree(root / "audio/eval")
    message = problems("desed", root)
    for words in (
        "1 clips have the label 'Blendr', which is not one of the 10 expected; did you mean 'Blender'?",
        "metadata/train/weak.tsv line 3: Ywideo-_0001_10.000_20.000.wav has no label",
        "validation/validation.tsv line 3: Blender ends at 0.7 s, but Yvideo-_0000_0.000_10.000.wav lasts 0.5 s",
        "got onset 0.25 and offset 0.0",
        "1 of 10 recordings are missing in soundscapes: 3.wav",
        "metadata/eval/public.tsv: no folder of its recordings; expected audio/eval/public or audio/eval/public_16k",
    ):
        assert words in message, words
    assert "parts not found: strong (metadata/train/audioset_strong.tsv)" in problems("desed", root, parts=("strong",))


def test_desed_lacks_videos_that_are_gone(copy):
    root = copy("desed")
    gone = sorted((root / "audio/train/weak").iterdir())
    gone[0].unlink()
    corpus = open_corpus("desed", root)
    assert f"metadata/train/weak.tsv: 1 of 10 recordings are missing in weak: {gone[0].name}" in corpus.warnings
    assert len(corpus.clips) == 51
    for path in gone[1:]:
        path.unlink()
    assert "10 of 10 recordings are missing in weak" in problems("desed", root)


def test_audioset_problems(copy):
    root = copy("audioset")
    table = root / "balanced_train_segments.csv"
    lines = table.read_text().splitlines()
    lines[4] = lines[4].replace('"/m/0bt9lr"', '"/m/0dgw9r,/m/0nothing"')
    lines[5] = lines[5].split(",")[0] + ", 30.000"
    lines[6] = lines[6].replace("90.000, 100.000", "90.000, 80.000")
    lines.append(lines[3])
    table.write_text("\n".join(lines) + "\n")
    (root / "eval_segments.csv").write_text((root / "eval_segments.csv").read_text() + lines[7] + "\n")
    message = problems("audioset", root)
    first, fifth = video_of(0), video_of(4)
    for words in (
        "class ids that are none of the 527 classes: /m/0dgw9r (Human sounds), /m/0nothing",
        'balanced_train_segments.csv line 6: expected YTID, start_seconds, end_seconds, "class,class"',
        "line 7: expected 0 <= start < end in seconds, got 90 and 80",
        f"balanced_train_segments.csv line 14: {first} occurs twice, first in balanced_train_segments.csv line 4",
        f"eval_segments.csv line 14: {fifth} occurs twice, first in balanced_train_segments.csv line 8",
    ):
        assert words in message, words


def test_audioset_without_any_clip(copy):
    root = copy("audioset")
    shutil.rmtree(root / "audio")
    (root / "audio").mkdir()
    assert f"none of the 30 clips has a recording below audio/; expected such as {video_of(0)}.wav" in problems(
        "audioset", root
    )


@pytest.mark.parametrize(
    ("video", "name"),
    [
        ("Yabcdefghij", "Yabcdefghij.wav"),
        ("Yabcdefghij", "YYabcdefghij.flac"),
        ("abcdefghi_5", "Yabcdefghi_5.wav"),
        ("abcde_12_30", "abcde_12_30_40.000_50.000.wav"),
        ("-----------", "Y-----------_30000.mp3"),
        ("Y123456789_", "Y123456789__5.wav"),
    ],
)
def test_audioset_names(tmp_path, video, name):
    (tmp_path / "audio/x/y").mkdir(parents=True)
    (tmp_path / "audio/x/y" / name).touch()
    (tmp_path / "eval_segments.csv").write_text(f'# c\n# n\n# YTID\n{video}, 30.000, 40.000, "/m/09x0r"\n')
    (clip,) = open_corpus("audioset", tmp_path).clips
    assert (clip.path.name, clip.group, clip.labels, clip.split) == (name, video, ("Speech",), "test")


def test_audioset_with_other_classes(copy):
    root = copy("audioset")
    edit(root / "class_labels_indices.csv", "\n1,", "\n7,")
    assert "class_labels_indices.csv: the column 'index' must count 0, 1, 2..." in problems("audioset", root)
    (root / "class_labels_indices.csv").unlink()
    assert open_corpus("audioset", root).labels == label_set("audioset")


def test_hdf5_problems(copy):
    import h5py

    root = copy("hdf5") / "hdf5s/waveforms"
    with h5py.File(root / "balanced_train.h5", "r+") as file:
        targets = file["target"][:, :10]
        del file["target"]
        file["target"] = targets
    with h5py.File(root / "eval.h5", "r+") as file:
        del file["audio_name"]
    (root / "unbalanced_train/unbalanced_train_part01.h5").write_bytes(b"not HDF5")
    (root / "unbalanced_train").rename(root / "more")
    shutil.copy(root / "more/unbalanced_train_part00.h5", root / "more/part.h5")
    message = problems("audioset", root.parents[1])
    for words in (
        "balanced_train.h5: waveform (10, 1600) needs audio_name (10,) and target (10, 527), got (10,) and (10, 10)",
        "eval.h5: no audio_name; found target, waveform",
        "unbalanced_train_part01.h5: cannot be opened as HDF5",
        "more/part.h5: expected a name that tells the split, such as balanced_train.h5 or eval.h5",
    ):
        assert words in message, words


def test_hdf5_that_repeats_and_leaks(copy):
    root = copy("hdf5") / "hdf5s/waveforms"
    shutil.copy(root / "balanced_train.h5", root / "balanced_train_copy.h5")
    corpus = open_corpus("audioset", root.parents[1])
    assert len(corpus.clips) == 27 and any("9 of 10 rows repeat a clip" in line for line in corpus.warnings)
    shutil.copy(root / "eval.h5", root / "unbalanced_train/unbalanced_train_part01.h5")
    assert "9 videos stand in both train and test: " in problems("audioset", root.parents[1])


def test_folder_problems(copy):
    root = copy("folder")
    (root / "empty").mkdir()
    message = problems("folder", root, labels=("bell", "dogs", "rain"))
    assert "1 class folders hold no recordings: empty" in message
    assert "12 clips have the label 'dog', which is not one of the 3 expected; did you mean 'dogs'?; rename" in message
    assert "1 of 3 classes have no clips: dogs" in message
    corpus = open_corpus("folder", root, allow_empty=True)
    assert corpus.labels == ("bell", "dog", "empty", "rain") and empty_classes(corpus) == ["empty"]
    for name in ("empty", "dog", "rain"):
        shutil.rmtree(root / name)
    assert "only one class, bell; expected a folder for each of two or more" in problems("folder", root)


def test_folder_with_splits_that_leak(copy):
    root = copy("splits")
    shutil.copy(root / "train/dog/dak_00.wav", root / "test/dog/other.wav")
    (root / "val/bell/bbk_00.wav").rename(root / "val/bell/bak_07.wav")
    shutil.rmtree(root / "val/rain")
    (root / "val/rain").mkdir()
    corpus = open_corpus("folder", root)
    told = " ".join(corpus.warnings)
    assert "train and test share what seems to be the recording dak: " in told and "other.wav" in told
    assert "train and validation share what seems to be the recording bak: " in told
    assert "1 class folders hold no recordings: val/rain" in told
    assert {(leak.group, leak.parts) for leak in leaks(corpus)} == {
        ("dak", ("train", "test")), ("bak", ("train", "validation"))
    }  # fmt: skip
    shutil.rmtree(root / "train/bell")
    assert any("1 classes have no clips to train on: bell" in line for line in open_corpus("folder", root).warnings)
    assert empty_classes(open_corpus("folder", root), "train") == ["bell"]
    shutil.copytree(root / "val", root / "valid")
    assert "two folders for validation" in problems("folder", root)


def test_csv_problems(copy):
    root = copy("multi")
    table = root / "sounds.csv"
    edit(table, "sitea.wav,bell", "sitea.wav,bell; bell ")
    edit(table, "siteb.wav,dog;rain,train", "siteb.wav,dog;rain,trial")
    edit(table, "sitec.wav", "sited.wav")
    edit(table, "sitee.wav", "")
    (root / "audio/sitef.wav").unlink()
    message = problems("csv", root)
    for words in (
        "sounds.csv line 2: sitea.wav has a label twice",
        "sounds.csv line 3: expected train, validation, test as split, got 'trial'",
        "sounds.csv line 5: sited.wav occurs twice",
        "sounds.csv line 6: no filename",
        "recordings are missing: sitef.wav",
    ):
        assert words in message, words
    shutil.copy(table, root / "again.csv")
    assert "expected one table with columns filename and label, found again.csv, sounds.csv" in problems("csv", root)


def test_csv_without_columns_or_labels(copy):
    root = copy("csv")
    edit(root / "sounds.csv", "siteb.wav,dog", "siteb.wav,")
    assert "sounds.csv line 3: siteb.wav has no label" in problems("csv", root)
    edit(root / "sounds.csv", "filename,label", "filename,class")
    message = problems("csv", root)
    assert "this is not csv; expected a .csv or .tsv with columns filename and label, or labels; found" in message
    assert "found sounds.csv with filename, class" in message
    with pytest.raises(DataError, match=r"sounds\.csv: no column label; found filename, class"):
        open_corpus("csv", root / "sounds.csv")


def test_csv_groups_that_leak(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.wav").write_text(name)
    rows = [("a.wav", "x", 1, "g"), ("b.wav", "y", 2, "g"), ("c.wav", "y", 1, "h"), ("d.wav", "x", 2, "i")]
    write_table(tmp_path / "t.csv", ("filename", "label", "fold", "group"), rows)
    assert "fold 1 and fold 2 share the group g: a.wav, b.wav" in problems("csv", tmp_path)


@pytest.mark.parametrize("durations", [False, True])
def test_strong_problems(tmp_path, durations):
    root = make_strong(tmp_path, durations=durations)
    table = root / "strong.tsv"
    edit(table, "scenea.wav\t0.25\t0.4", "scenea.wav\t0.25\t0.6")
    edit(table, "sceneb.wav\t0.05\t0.2", "sceneb.wav\t0.2\t0.05")
    edit(table, "scenec.wav\t0.05\t0.2\train", "scenec.wav\t0.05\t0.2\t")
    (root / "audio/scened.wav").unlink()
    message = problems("strong", root)
    ends = (
        "strong.tsv line 3: dog ends at 0.6 s, but"
        if durations
        else "strong.tsv: scenea.wav has an event that ends at 0.6"
    )
    for words in (ends, "lasts 0.5 s", "got onset 0.2 and offset 0.05", "the event of scenec.wav has no label",
                  "recordings are missing: scened.wav"):  # fmt: skip
        assert words in message, words
    edit(table, "offset", "end")
    assert "strong.tsv: no column offset; found filename, onset, end, event_label" in problems("strong", root)


def test_strong_with_a_recording_that_is_none(copy):
    root = copy("strong")
    (root / "audio/scenea.wav").unlink()
    (root / "audio/scenea.wav").write_text("no sound")
    assert "scenea.wav" in problems("strong", root)


def test_strong_without_the_one_table(copy):
    root = copy("strong")
    (root / "strong.tsv").rename(root / "events.tsv")
    assert len(open_corpus("strong", root).clips) == 9
    shutil.copy(root / "events.tsv", root / "more.tsv")
    assert "found events.tsv, more.tsv" in problems("strong", root)


# ------------------------------------------------------------------ the real corpora


def test_real_esc10():
    corpus = open_corpus("esc10", shared("data", "esc10"))
    assert corpus.labels == label_set("esc10") and corpus.warnings == () and leaks(corpus) == []
    assert balance(corpus) == {label: {f"fold {fold}": 8 for fold in (1, 2, 3, 4)} for label in corpus.labels}
    assert len({clip.group for clip in corpus.clips}) == 247
    assert "this looks like esc10, not esc50" in problems("esc50", shared("data", "esc10"))


def test_real_esc50_fold4():
    folder = shared("data", "esc50_fold4")
    corpus = open_corpus("esc50", folder, labels=label_set("esc50"))
    assert corpus.labels == open_corpus("esc50", folder).labels and len(corpus.clips) == 373
    ten = open_corpus("esc10", folder)
    assert ten.labels == label_set("esc10") and len(ten.clips) == 80


def test_real_keywords():
    corpus = open_corpus("keywords", shared("data", "arabic_speech_commands"))
    assert len(corpus.labels) == 35 and corpus.labels == tuple(sorted(corpus.labels))
    assert set(map(tuple, (parts.items() for parts in balance(corpus).values()))) == {
        (("train", 72), ("validation", 24))
    }
    assert len({clip.group for clip in corpus.clips}) == 24 and leaks(corpus) == []


def test_real_soundscapes():
    corpus = open_corpus("strong", shared("data", "soundscapes"), labels=label_set("esc10"))
    assert Counter(clip.split for clip in corpus.clips) == {"train": 500, "validation": 120}
    assert recognise(shared("data", "soundscapes")) == "strong"


def test_real_desed_tables(tmp_path):
    """The published validation and evaluation: annotations end up to 0.115 s after the published durations."""
    tables = shared("data", "metrics")
    for source, table, audio in (
        ("dcase_baseline/validation.tsv", "validation/validation.tsv", "validation/validation"),
        ("htsat_desed/answer.tsv", "eval/public.tsv", "eval/public"),
    ):
        (tmp_path / "metadata" / table).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tables / source, tmp_path / "metadata" / table)
        (tmp_path / "audio" / audio).mkdir(parents=True)
        for line in (tables / source).read_text().splitlines()[1:]:
            (tmp_path / "audio" / audio / line.split("\t")[0]).touch()
    durations = "validation_durations.tsv"
    shutil.copy(tables / "dcase_baseline" / durations, tmp_path / "metadata/validation" / durations)
    corpus = open_corpus("desed", tmp_path)
    assert Counter(clip.split for clip in corpus.clips) == {"validation": 1168, "test": 692}
    assert all(clip.group is not None for clip in corpus.clips)
    rows = sum(len(clip.events) for clip in corpus.clips if clip.split == "test")
    lines = (tables / "htsat_desed/answer.tsv").read_text().splitlines()[1:]
    assert rows == sum(bool(line.split("\t")[3]) for line in lines)


def test_real_names_as_a_folder_nobody_prepared(tmp_path):
    """ESC-50's fold 4 as a folder per class: the names alone give the sources back."""
    source = open_corpus("esc50", shared("data", "esc50_fold4"))
    for clip in source.clips:
        (tmp_path / clip.labels[0]).mkdir(exist_ok=True)
        (tmp_path / clip.labels[0] / clip.path.name).symlink_to(clip.path)
    corpus = open_corpus("folder", tmp_path)
    assert corpus.labels == tuple(sorted(source.labels)) and len(corpus.clips) == 373
    told = {clip.path.name: clip.group for clip in source.clips}
    # A class of fewer than three sources is split by clips; no source of another class is torn.
    sources = {label: len({c.group for c in source.clips if c.labels == (label,)}) for label in source.labels}
    for clip in corpus.clips:
        if sources[clip.labels[0]] >= 3:
            assert clip.group == told[clip.path.name]


def test_soundfile_reads_what_the_miniature_wrote(whole):
    """The miniatures are sound, not only names."""
    info = soundfile.info(whole / "folder/dog/dak_00.wav")
    assert (info.samplerate, info.frames) == (RATE, RATE // 10)
