"""Readers of labelled recordings: on a data root in miniature, broken in many ways, and on the real corpora."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from miniature import CLASSES, FOLDS, TINY, make_root
from shared_data import shared

from htsat.data import corpora
from htsat.data.corpora import read_esc, read_keywords, read_strong, read_table, read_unlabelled
from htsat.errors import ConfigError, DataError
from htsat.events import Event
from htsat.training import material as material_module
from htsat.training.material import load_material
from htsat.training.recipe import load_recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("data") / "whole")


@pytest.fixture
def root(whole, tmp_path):
    """A copy to break."""

    def copy(source, target):
        """Audio is only ever deleted here; tables are edited."""
        return os.link(source, target) if source.endswith(".wav") else shutil.copyfile(source, target)

    return Path(shutil.copytree(whole, tmp_path / "root", copy_function=copy))


def edit(path, old, new, count=1):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, count), encoding="utf-8")


def problems(read, *args):
    """Return what a reader complains of: one line."""
    with pytest.raises(DataError) as caught:
        read(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------ what is read


def test_esc(whole):
    clips = read_esc(whole / "esc10")
    assert len(clips) == len(CLASSES) * len(FOLDS)
    assert Counter(clip.labels for clip in clips) == {(label,): len(FOLDS) for label in CLASSES}
    first = clips[0]
    assert first.path.name == "1-100-A-0.wav" and first.path.is_file()
    assert (first.labels, first.events, first.folds) == (
        ("chainsaw",), (Event("chainsaw", 0.0, 1.0),), frozenset({1})
    )  # fmt: skip
    assert all(clip.path.name.startswith(f"{fold}-") for clip in clips for fold in clip.folds)


def test_esc_without_segments_and_as_esc50(root):
    (root / "esc10/meta/segments.tsv").unlink()
    (root / "esc10/meta/esc10.csv").rename(root / "esc10/meta/esc50.csv")
    clips = read_esc(root / "esc10")
    assert len(clips) == 40 and all(clip.events is None for clip in clips)


def test_strong(whole):
    clips = read_strong(whole / "soundscapes/train")
    assert [clip.path.name for clip in clips] == [f"train_{i:04d}.wav" for i in range(12)]
    rows = [line.split("\t") for line in (whole / "soundscapes/train/strong.tsv").read_text().splitlines()[1:]]
    expected = [(name, Event(label, float(onset), float(offset))) for name, onset, offset, label in rows]
    assert [(clip.path.name, event) for clip in clips for event in clip.events] == expected
    sources = [line.split("\t") for line in (whole / "soundscapes/train/sources.tsv").read_text().splitlines()[1:]]
    for clip in clips:
        assert clip.folds == {int(row[4].split("-")[0]) for row in sources if row[0] == clip.path.name}
        assert clip.labels == tuple(sorted({event.event_label for event in clip.events}))
    assert any(len(clip.folds) == 2 for clip in clips)


def test_strong_recording_without_events(root):
    folder = root / "soundscapes/train"
    with (folder / "durations.tsv").open("a") as file:
        file.write("empty.wav\t5.0\n")
    with (folder / "strong.tsv").open("a") as file:
        file.write("empty.wav\t\t\t\n")
    shutil.copy(folder / "audio/train_0000.wav", folder / "audio/empty.wav")
    (clip,) = [clip for clip in read_strong(folder) if clip.path.name == "empty.wav"]
    assert (clip.labels, clip.events, clip.folds) == ((), (), frozenset())


def test_keywords(whole):
    train, val = (read_keywords(whole / "arabic_speech_commands", split) for split in ("train", "val"))
    assert Counter(clip.labels for clip in train) == {("down",): 6, ("enter",): 6, ("five",): 6}
    assert len(val) == 6
    assert not {clip.path.name for clip in train} & {clip.path.name for clip in val}  # by speaker


def test_unlabelled(root):
    for name in ("LICENSE.md", "._park.wav"):
        (root / "backgrounds" / name).write_text("not audio")
    clips = read_unlabelled(root / "backgrounds")
    assert [(clip.path.name, clip.labels, clip.events) for clip in clips] == [
        ("park.wav", (), None), ("street.wav", (), None)
    ]  # fmt: skip


def test_table_of_a_spreadsheet(tmp_path):
    """Byte order mark, Windows line ends, an empty line, quotes, a column too many."""
    path = tmp_path / "table.csv"
    path.write_bytes('\ufefffilename,label\r\n"a, b.wav",dog\r\n\r\nc.wav,cat,more\r\n'.encode())
    rows = read_table(path, ("filename", "label"))
    assert [(line, row["filename"], row["label"]) for line, row in rows] == [
        (2, "a, b.wav", "dog"), (4, "c.wav", "cat")
    ]  # fmt: skip


# ------------------------------------------------------------------ what is refused


def test_esc_tells_every_problem_at_once(root):
    meta = root / "esc10/meta"
    edit(meta / "esc10.csv", "1-100-A-0.wav,1,", "1-100-A-0.wav,one,")
    edit(meta / "esc10.csv", "1-101-A-1.wav,1,", "1-101-A-1.wav,0,")
    edit(meta / "esc10.csv", "1-103-A-3.wav,1,3,crying_baby", "1-103-A-3.wav,1,3,")
    edit(meta / "esc10.csv", "1-104-A-4.wav", "1-105-A-5.wav")
    edit(meta / "segments.tsv", "1-106-A-6.wav\t1\train\t0.0\t1.0", "1-106-A-6.wav\t1\train\t1.0\t0.5")
    edit(meta / "segments.tsv", "1-107-A-7.wav\t1\trooster\t0.25", "1-107-A-7.wav\t1\trooster\tsoon")
    edit(meta / "segments.tsv", "1-108-A-8.wav", "nowhere.wav")
    edit(meta / "segments.tsv", "1-109-A-9.wav\t1\tsneezing\t0.0\t1.0", "1-109-A-9.wav\t1\tsneezing\t0.0\tnan")
    for name in ("1-102-A-2.wav", "4-139-A-9.wav"):
        (root / "esc10/audio" / name).unlink()
    message = problems(read_esc, root / "esc10")
    for words in (
        "meta/esc10.csv line 2: expected a whole number from 1 on as fold, got 'one'",
        "meta/esc10.csv line 3: expected a whole number from 1 on as fold, got '0'",
        "meta/esc10.csv line 5: 1-103-A-3.wav has no category",
        "meta/esc10.csv line 7: 1-105-A-5.wav occurs twice",
        "meta/segments.tsv line 8: event 'rain': expected 0 <= onset < offset in seconds, got onset 1.0 and offset 0.5",
        "meta/segments.tsv line 9: expected onset and offset in seconds, got 'soon' and '0.75'",
        "meta/segments.tsv line 10: nowhere.wav is not in meta/esc10.csv",
        "meta/segments.tsv line 11: event 'sneezing': expected",
        "recordings are missing: 1-102-A-2.wav, 4-139-A-9.wav",
        str(root / "esc10"),
    ):
        assert words in message, words


def test_esc_segments_must_cover_every_clip(root):
    edit(root / "esc10/meta/segments.tsv", "1-100-A-0.wav\t1\tchainsaw\t0.0\t1.0\n", "")
    assert "no active part of 1-100-A-0.wav" in problems(read_esc, root / "esc10")


def test_strong_tells_every_problem_at_once(root):
    folder = root / "soundscapes/train"
    (folder / "audio/train_0003.wav").unlink()
    edit(folder / "durations.tsv", "train_0004.wav\t5.0", "train_0004.wav\tlong")
    edit(folder / "durations.tsv", "train_0005.wav\t5.0", "train_0005.wav\t0.5")
    rows = "train_0000.wav\t3.0\t2.0\tdog\ntrain_0001.wav\t1.0\t2.0\t\ntrain_9999.wav\t1.0\t2.0\tdog\n"
    rows += "train_0002.wav\t1,5\t2.0\tdog\ntrain_0002.wav\t-1\t2.0\tdog\n"
    with (folder / "strong.tsv").open("a") as file:
        file.write(rows)
    edit(folder / "sources.tsv", "\t1-", "\tA-")
    message = problems(read_strong, folder)
    for words in (
        "durations.tsv line 6: expected seconds as duration, got 'long'",
        "but train_0005.wav lasts 0.5 s",
        "got onset 3.0 and offset 2.0",
        "the event of train_0001.wav has no label",
        "train_9999.wav is not in durations.tsv",
        "expected onset and offset in seconds, got '1,5' and '2.0'",
        "got onset -1.0",
        "sources.tsv line 2: expected a source clip like 1-100032-A-0, got 'A-",
        "1 of 12 recordings are missing: train_0003.wav",
    ):
        assert words in message, words


def test_strong_events_of_unknown_origin(root):
    """A mixture whose parts are not told could hold the test fold."""
    path = root / "soundscapes/train/sources.tsv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("train_0006")))
    assert "no source of train_0006.wav" in problems(read_strong, root / "soundscapes/train")


def test_long_lists_are_cut(root):
    for path in (root / "esc10/audio").iterdir():
        path.unlink()
    assert problems(read_esc, root / "esc10").endswith("40 of 40 recordings are missing: 1-100-A-0.wav, "
        "1-101-A-1.wav, 1-102-A-2.wav, 1-103-A-3.wav, 1-104-A-4.wav and 35 more")  # fmt: skip
    edit(root / "esc10/meta/segments.tsv", "\t0.", "\t?", count=-1)
    message = problems(read_esc, root / "esc10")
    assert message.count(";") == corpora.MAX_LISTED and "41 problems" in message and message.endswith("and 21 more")


@pytest.mark.parametrize(
    ("read", "table", "columns"),
    [
        (read_esc, "esc10/meta/esc10.csv", ("filename", "fold", "category")),
        (read_esc, "esc10/meta/segments.tsv", ("onset", "offset")),
        (read_strong, "soundscapes/val/strong.tsv", ("filename", "onset", "offset", "event_label")),
        (read_strong, "soundscapes/val/durations.tsv", ("filename", "duration")),
        (read_strong, "soundscapes/val/sources.tsv", ("source_clip",)),
        (lambda folder: read_keywords(folder, "train"), "arabic_speech_commands/metadata.csv", ("keyword", "split")),
    ],
)
def test_columns_that_are_missing_are_named(root, read, table, columns):
    path = root / table
    header, rest = path.read_text().split("\n", 1)
    for column in columns:
        header = header.replace(column, f"no{column[1:]}")
    path.write_text(f"{header}\n{rest}")
    folder = path.parent if path.parent.name != "meta" else path.parents[1]
    message = problems(read, folder)
    assert f"{path.name}: no column {', '.join(columns)}; found " in message
    assert message.count(";") == 1  # one problem, not one for each row


def test_tables_that_are_none(root, tmp_path):
    assert "neither meta/esc50.csv nor meta/esc10.csv" in problems(read_esc, tmp_path)
    both = problems(read_strong, tmp_path / "away")
    assert "durations.tsv: cannot be read: No such file" in both and "strong.tsv: cannot be read: No such file" in both
    table = root / "soundscapes/val/strong.tsv"
    table.write_bytes(b"\xff\xfe\x00binary")
    assert "strong.tsv: cannot be read as a table in UTF-8" in problems(read_strong, table.parent)
    table.write_text("")
    assert "found none" in problems(read_strong, table.parent)
    table.write_text("filename\tonset\toffset\tevent_label\nval_0000.wav\t1.0\n\nval_0000.wav\t1\t2\n")
    assert "fewer fields than the 4 columns in line 2, 4" in problems(read_strong, table.parent)


def test_keywords_without_the_split(root):
    folder = root / "arabic_speech_commands"
    message = problems(read_keywords, folder, "trains")
    assert "no recording with split 'trains'; found train, val; did you mean 'train'?" in message
    (folder / "audio/down/00000000_NO_01.wav").unlink()
    edit(folder / "metadata.csv", "enter/00000001_NO_01.wav,enter", "enter/00000001_NO_01.wav,")
    message = problems(read_keywords, folder, "train")
    assert "00000000_NO_01.wav" in message and "enter/00000001_NO_01.wav has no keyword" in message
    assert len(read_keywords(folder, "val")) == 6  # whole


def test_unlabelled_without_recordings(tmp_path):
    assert "no recordings found" in problems(read_unlabelled, tmp_path)
    assert "cannot be listed: No such file" in problems(read_unlabelled, tmp_path / "away")


# ------------------------------------------------------------------ a whole data root against a recipe


def names_read(monkeypatch, recipe, root):
    """Return the material of a run, every recording replaced by a constant, and those constants by name."""
    constants: dict[str, float] = {}

    def read_audio(path, rate):
        # Exact in float32; and in int16, to which soundscapes are rounded.
        constants[path.name] = (len(constants) + 1) / 32767
        # Clips with active parts last 5 s.
        seconds = 5 if "esc10" in path.parts else 1
        return material_module.np.full(seconds * rate, constants[path.name], material_module.np.float32)

    monkeypatch.setattr(material_module, "read_audio", read_audio)
    return load_material(recipe, root, lambda line, share: None), constants


def check_fold_is_held_out(monkeypatch, recipe, root, fold):
    material, constants = names_read(monkeypatch, recipe, root)
    names = {round(value * 32767): name for name, value in constants.items()}

    def name_of(waveform):
        return names[round(float(waveform[0]) * 32767)]

    sources = {name_of(s.waveform) for group in material.mixer._by_label.values() for s in group if s.label != "speech"}
    tested = {name_of(clip.waveform) for clip in material.test_clips}
    clips = {clip.path.name: clip for clip in read_esc(root / "esc10")}
    assert tested == {name for name in clips if name.startswith(f"{fold}-")}
    assert sources == set(clips) - tested and sources and tested

    used = {s.name for s in material.soundscapes}
    held_out = {s.name for s in material.test_soundscapes}
    for part, wanted, excluded in (("train", used, True), ("val", held_out, False)):
        origins: dict[str, set[str]] = {}
        for line in (root / "soundscapes" / part / "sources.tsv").read_text().splitlines()[1:]:
            cells = line.split("\t")
            origins.setdefault(cells[0], set()).add(cells[4][0])
        if excluded:
            assert wanted == {name for name, found in origins.items() if str(fold) not in found}
        else:
            assert wanted == {name for name, found in origins.items() if found == {str(fold)}}
    assert all(name_of(s.waveform) == s.name for s in material.soundscapes + material.test_soundscapes)
    assert not used & held_out
    return used, held_out


@pytest.mark.parametrize("fold", FOLDS)
def test_held_out_fold_never_enters_training(whole, monkeypatch, fold):
    used, held_out = check_fold_is_held_out(
        monkeypatch, load_recipe("everyday", [*TINY, f"data.test_fold={fold}"]), whole, fold
    )
    assert 0 < len(used) < 12 or fold == 4
    assert len(held_out) == (6 if fold == 4 else 0)


def test_no_held_out_fold_trains_on_all(whole, monkeypatch):
    recipe = load_recipe("everyday", [*TINY, "data.test_fold=0"])
    material, _ = names_read(monkeypatch, recipe, whole)
    assert sum(len(group) for label, group in material.mixer._by_label.items() if label != "speech") == 40
    assert (len(material.soundscapes), material.test_clips, material.test_soundscapes) == (12, [], [])


def test_speech_of_other_splits_is_not_read(whole, monkeypatch):
    _, constants = names_read(monkeypatch, load_recipe("everyday", TINY), whole)
    speakers = {name.split("_")[0] for name in constants if "_NO_" in name}
    assert speakers == {f"{speaker:08d}" for speaker in range(6)}


def test_problems_of_all_corpora_at_once(root):
    (root / "esc10/audio/1-100-A-0.wav").unlink()
    edit(root / "soundscapes/val/strong.tsv", "val_0001.wav", "val_1001.wav")
    shutil.rmtree(root / "backgrounds")
    (root / "arabic_speech_commands/metadata.csv").unlink()
    message = problems(load_material, load_recipe("everyday", TINY), root, print)
    for words in ("1-100-A-0.wav", "val_1001.wav is not in durations.tsv", "backgrounds: the folder", "metadata.csv"):
        assert words in message, words
    assert message.startswith("4 problems: ")


def test_contradictions_between_data_and_recipe(root):
    recipe = load_recipe("everyday", [*TINY, "data.test_fold=7"])
    assert "no clips of the test fold 7; there are folds 1, 2, 3, 4" in problems(load_material, recipe, root, print)

    recipe = load_recipe("everyday", TINY)
    strong = root / "soundscapes/train/strong.tsv"
    before = strong.read_text()
    edit(strong, "\tdog", "\tdogs")
    assert "classes that the recipe lacks: dogs; did you mean 'dog'?" in problems(load_material, recipe, root, print)
    strong.write_text(before)

    # Only the test fold holds crying babies: nothing to learn them from.
    table = root / "esc10/meta/esc10.csv"
    before = table.read_text()
    for fold in (1, 2, 3):
        edit(table, f",{fold},3,crying_baby", f",{fold},3,baby")
    message = problems(load_material, recipe, root, print)
    assert "no recordings of crying_baby beside the test fold 4" in message
    table.write_text(before)

    metadata = root / "arabic_speech_commands/metadata.csv"
    lines = metadata.read_text().splitlines(keepends=True)
    metadata.write_text("".join(lines[:6]))
    assert "5 keywords to train on; expected at least 6" in problems(load_material, recipe, root, print)
    metadata.write_text("".join(lines))

    (root / "soundscapes/train/sources.tsv").unlink()
    assert "may hold recordings of a fold held out: add sources.tsv" in problems(load_material, recipe, root, print)


# ------------------------------------------------------------------ the real corpora


def test_real_esc10():
    clips = read_esc(shared("data", "esc10"))
    assert len(clips) == 320
    assert set(Counter(clip.labels for clip in clips).values()) == {32} and len({c.labels for c in clips}) == 10
    assert set(Counter((c.labels, c.folds) for c in clips).values()) == {8}
    assert all(c.folds == {int(c.path.name[0])} for c in clips)
    assert sum(len(c.events) for c in clips) == 472
    assert all(e.offset <= 5.0 for c in clips for e in c.events)


def test_real_soundscapes():
    folder = shared("data", "soundscapes")
    train, val = read_strong(folder / "train"), read_strong(folder / "val")
    assert (len(train), len(val)) == (500, 120)
    assert (sum(len(c.events) for c in train), sum(len(c.events) for c in val)) == (1354, 330)
    for part, clips in (("train", train), ("val", val)):
        # weak.tsv is another file of the corpus, which the reader does not open.
        weak = dict(line.split("\t") for line in (folder / part / "weak.tsv").read_text().splitlines()[1:])
        assert {c.path.name: ",".join(c.labels) for c in clips} == weak
    assert frozenset.union(*(c.folds for c in train)) == {1, 2, 3}
    assert {c.folds for c in val} == {frozenset({4})}


def test_real_keywords_and_backgrounds():
    clips = {split: read_keywords(shared("data", "arabic_speech_commands"), split) for split in ("train", "val")}
    assert sum(map(len, clips.values())) == 3360
    assert len({c.labels for c in clips["train"]}) == 35
    speakers = {split: {c.path.name.split("_")[0] for c in found} for split, found in clips.items()}
    assert (len(speakers["train"]), len(speakers["val"])) == (18, 6) and not speakers["train"] & speakers["val"]
    assert len(read_unlabelled(shared("data", "backgrounds"))) == 4


@pytest.mark.parametrize("fold", [1, 4])
def test_real_held_out_fold_never_enters_training(monkeypatch, fold):
    recipe = load_recipe("everyday", [f"data.test_fold={fold}", "frontend.sample_rate=1000", "frontend.f_max=500.0"])
    used, held_out = check_fold_is_held_out(monkeypatch, recipe, shared("data"), fold)
    assert len(held_out) == (120 if fold == 4 else 0)
    assert len(used) == {1: 194, 4: 500}[fold]


# ------------------------------------------------------------------ sounds of no class


def make_others(root):
    """A folder like ESC-50's: two clips of a class that counts and three of others, of folds 1 and 2."""
    folder = root / "others"
    (folder / "audio").mkdir(parents=True)
    (folder / "meta").mkdir()
    rows = [("1-1-A-0.wav", 1, "dog"), ("1-2-A-5.wav", 1, "cat"), ("2-3-A-5.wav", 2, "cat"), ("2-4-A-6.wav", 2, "hen")]
    lines = ["filename,fold,target,category"]
    for name, fold, label in rows:
        shutil.copyfile(next((root / "esc10/audio").glob("*.wav")), folder / "audio" / name)
        lines.append(f"{name},{fold},0,{label}")
    (folder / "meta/esc50.csv").write_text("\n".join(lines) + "\n")


def others_of(root, *settings):
    recipe = load_recipe("everyday", [*TINY, "data.others='others'", *settings])
    return [source.name for source in load_material(recipe, root, lambda line, share: None).mixer._others]


def test_other_sounds_are_those_of_other_classes(root):
    make_others(root)
    assert others_of(root, "data.test_fold=0") == ["1-2-A-5.wav", "2-3-A-5.wav", "2-4-A-6.wav"]
    assert others_of(root, "data.test_fold=0", "data.other_labels=['hen']") == ["2-4-A-6.wav"]
    assert others_of(root, "data.test_fold=1") == ["2-3-A-5.wav", "2-4-A-6.wav"]


def test_wrong_other_sounds_are_told(root):
    make_others(root)
    base = [*TINY, "data.others='others'"]
    recipe = load_recipe("everyday", [*base, "data.other_labels=['cow']"])
    assert "others: no recordings of cow (other_labels)" in problems(load_material, recipe, root, print)
    recipe = load_recipe("everyday", [*base, "data.test_fold=1", "data.without_folds=[2]"])
    assert "others: no clips of other classes beside the folds held out" in problems(load_material, recipe, root, print)
    with pytest.raises(ConfigError, match="'dog' is among labels and among other_labels"):
        load_recipe("everyday", [*base, "data.other_labels=['dog']"])
    with pytest.raises(ConfigError, match="other_labels needs others"):
        load_recipe("everyday", [*TINY, "data.other_labels=['cow']"])
