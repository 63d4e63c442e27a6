"""Folders of mixed scenes: what the recordings say of their tables, and ``htsat data mix`` as a user meets it."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from miniature import PITCHES, make_root, write_audio, write_table
from miniature_corpora import make_folder
from shared_data import shared

import htsat.cli
from htsat.data.corpora import open_corpus
from htsat.data.mix import MixConfig
from htsat.data.scenes import SceneSettings, make_scenes
from htsat.errors import DataError, OutputError, UsageError

RATE = 8000
#: silence behind the events, so that they alone are heard
ALONE = SceneSettings(5.0, RATE, config=MixConfig(background=0.0, whole_clip=0.0))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def esc(root):
    return open_corpus("esc10", root / "esc10")


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------ scenes


def test_scenes_sound_where_and_as_their_tables_say(esc, tmp_path):
    """Each class is a tone of its own pitch: its level rises at the onset and falls at the offset, to the sample."""
    made = make_scenes(esc, tmp_path / "scenes", count=25, settings=ALONE)
    assert (made.scenes, made.kept, made.unreadable, made.ambiguous) == (25, 0, (), 0)
    rows = table(tmp_path / "scenes/strong.tsv")
    assert sum(made.events.values()) == len(rows) and set(made.events) <= set(PITCHES)
    for name in {row["filename"] for row in rows}:
        scene, rate = soundfile.read(tmp_path / "scenes/audio" / name)
        assert (rate, len(scene)) == (RATE, 5 * RATE)
        drawn = np.zeros(len(scene), bool)
        own = [row for row in rows if row["filename"] == name]
        for row in own:
            onset, offset = (float(row[key]) * RATE for key in ("onset", "offset"))
            assert onset == pytest.approx(round(onset), abs=0.01) and offset == pytest.approx(round(offset), abs=0.01)
            drawn[round(onset) : round(offset)] = True
            # Sounds at its edges (behind the fades) and nowhere silent for a period in between.
            inside = np.abs(scene[round(onset) + 40 : round(offset) - 40])
            assert np.maximum.reduceat(inside, np.arange(0, len(inside), 40)).min() > 0
        assert not scene[~drawn].any()
        lone = [row for row in own if len(own) == 1]
        for row in lone:
            cut = scene[round(float(row["onset"]) * RATE) : round(float(row["offset"]) * RATE)]
            pitch = np.argmax(np.abs(np.fft.rfft(cut, 8 * RATE))) / 8
            assert 1 / 1.16 <= pitch / PITCHES[row["event_label"]] <= 1.16  # as far as the speed may change


def test_levels_are_those_of_the_table(esc, tmp_path):
    """One event in noise: the power between its times less that of the noise around it."""
    settings = SceneSettings(5.0, RATE, config=MixConfig(background=1.0, noise=1.0, whole_clip=0.0, max_events=1))
    make_scenes(esc, tmp_path / "a", count=40, settings=settings)
    measured = []
    for row in table(tmp_path / "a/sources.tsv"):
        scene, _ = soundfile.read(tmp_path / "a/audio" / row["filename"])
        inside = np.zeros(len(scene), bool)
        inside[round(float(row["onset"]) * RATE) : round(float(row["offset"]) * RATE)] = True
        background = np.mean(scene[~inside] ** 2)
        snr = 10 * np.log10(np.mean(scene[inside] ** 2) / background - 1)
        measured.append((float(row["snr_db"]), snr))
    difference = np.diff(measured, axis=1)
    # Brown noise is not the same power everywhere; the median is exact.
    assert len(measured) == 40 and abs(np.median(difference)) < 0.3
    assert np.ptp(measured, axis=0)[0] > 15 and np.min(measured, axis=0)[0] >= 4


def test_tables_agree_and_open_as_a_corpus(esc, root, tmp_path):
    out = tmp_path / "scenes"
    make_scenes(esc, out, count=12, settings=ALONE, folds=[1, 3], backgrounds=root / "backgrounds")
    corpus = open_corpus("strong", out, labels=esc.labels, allow_empty=True)
    assert [clip.path.name for clip in corpus.clips] == [f"scene_{index:05d}.wav" for index in range(12)]
    assert not corpus.warnings or all("no clips" in line for line in corpus.warnings)
    sources, strong = table(out / "sources.tsv"), table(out / "strong.tsv")
    shared_columns = ("filename", "onset", "offset", "event_label")
    assert [[row[c] for c in shared_columns] for row in sources] == [[row[c] for c in shared_columns] for row in strong]
    labels = {clip.path.name: clip.labels[0] for clip in esc.clips}
    for row in sources:
        assert row["source_clip"].startswith(("1-", "3-")) and row["fold"] == row["source_clip"][0]
        assert labels[row["source_clip"]] == row["event_label"]
    for clip in corpus.clips:
        assert clip.folds == {int(row["fold"]) for row in sources if row["filename"] == clip.path.name}
    weak = {row["filename"]: row["event_labels"] for row in table(out / "weak.tsv")}
    assert weak == {clip.path.name: ",".join(clip.labels) for clip in corpus.clips}
    assert {row["duration"] for row in table(out / "durations.tsv")} == {"5"}
    assert {row["background"] for row in table(out / "backgrounds.tsv")} == {""}


def test_backgrounds_are_named(esc, root, tmp_path):
    settings = SceneSettings(5.0, RATE)
    make_scenes(esc, tmp_path, count=20, settings=settings, backgrounds=root / "backgrounds")
    names = Counter(row["background"] for row in table(tmp_path / "backgrounds.tsv"))
    assert set(names) == {"park.wav", "street.wav", "noise"}


def test_same_seed_same_bytes_for_any_number_of_processes(esc, tmp_path):
    settings = SceneSettings(2.0, RATE, seed=3)
    for name, jobs in (("a", 1), ("b", 2)):
        make_scenes(esc, tmp_path / name, count=20, settings=settings, jobs=jobs)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    make_scenes(esc, tmp_path / "c", count=20, settings=SceneSettings(2.0, RATE, seed=4))
    first, other = contents(tmp_path / "a"), contents(tmp_path / "c")
    sounds = [name for name in first if name.startswith("audio")]
    assert len(sounds) == 20 and all(first[name] != other[name] for name in sounds)


def test_stopped_and_grown_folders_are_those_made_at_once(esc, tmp_path):
    make_scenes(esc, tmp_path / "whole", count=12, settings=ALONE)
    out = tmp_path / "parts"

    def stop(line, share):
        if line.startswith("scene 5 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_scenes(esc, out, count=8, settings=ALONE, progress=stop)
    assert not (out / "strong.tsv").exists()
    with (out / "scenes.jsonl").open("a") as journal:
        journal.write('{"index": 7, "filena')  # a line that was being written
    before = (out / "audio/scene_00002.wav").stat().st_mtime_ns
    (out / "audio/scene_00003.wav").unlink()
    made = make_scenes(esc, out, count=8, settings=ALONE)
    assert made.kept == 4 and (out / "audio/scene_00002.wav").stat().st_mtime_ns == before
    made = make_scenes(esc, out, count=12, settings=ALONE)
    assert made.kept == 8
    assert contents(out) == contents(tmp_path / "whole")
    made = make_scenes(esc, out, count=12, settings=ALONE)
    assert made.kept == 12 and contents(out) == contents(tmp_path / "whole")


def test_other_settings_and_other_folders_are_refused(esc, root, tmp_path):
    out = tmp_path / "scenes"
    make_scenes(esc, out, count=2, settings=ALONE)
    before = contents(out)
    for settings, words in (
        (SceneSettings(5.0, RATE, 1, config=ALONE.config), r"seed was 0, is 1"),
        (SceneSettings(4.0, RATE, config=ALONE.config), r"seconds was 5.0, is 4.0"),
        (SceneSettings(5.0, RATE), r"config.background was 0.0, is 1.0"),
    ):
        with pytest.raises(DataError, match=words):
            make_scenes(esc, out, count=2, settings=settings)
    with pytest.raises(DataError, match="other clips, folds"):
        make_scenes(esc, out, count=2, settings=ALONE, folds=[1])
    with pytest.raises(DataError, match="holds 2 scenes, more than the 1 asked for"):
        make_scenes(esc, out, count=1, settings=ALONE)
    assert contents(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/mix.json").write_text("[1, 2]")
    for name in ("full", "odd"):
        with pytest.raises(OutputError, match="is not empty and holds no mixed scenes"):
            make_scenes(esc, tmp_path / name, count=1, settings=ALONE)
        assert len(contents(tmp_path / name)) == 1
    with pytest.raises(OutputError, match="this is a file"):
        make_scenes(esc, tmp_path / "full/thesis.txt", count=1, settings=ALONE)


def test_wrong_labels_folds_and_settings(esc, tmp_path):
    for words, arguments in (
        ("no class 'dogs'; did you mean 'dog'", {"labels": ["dogs"]}),
        ("no clips of fold 7; folds there: 1, 2, 3, 4", {"folds": [7]}),
        ("unknown format 'wave'; did you mean 'wav'", {"settings": SceneSettings(format="wave")}),
        ("expected 1 to", {"count": 0}),
        ("sample rate of 4000", {"settings": SceneSettings(sample_rate=10)}),
        ("scenes of 0.1", {"settings": SceneSettings(seconds=0.01)}),
    ):
        with pytest.raises(UsageError, match=words):
            make_scenes(esc, tmp_path / "out", **({"count": 1} | arguments))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ other corpora


def test_clips_that_cannot_be_used_are_named(tmp_path):
    folder = make_folder(tmp_path / "sounds", seconds=0.3)
    broken = next((folder / "bell").iterdir())
    broken.write_text("no sound")
    write_audio(folder / "dog/silent.wav", np.zeros(800, np.float32))
    corpus = open_corpus("folder", folder)
    for _ in range(2):  # also when nothing is left to do
        made = make_scenes(corpus, tmp_path / "out", count=10, settings=SceneSettings(2.0, RATE))
        assert len(made.unreadable) == 2
        assert str(broken) in made.unreadable[0] and "silent.wav: is silent" in made.unreadable[1]
    used = {row["source_clip"] for row in table(tmp_path / "out/sources.tsv")}
    assert used and broken.relative_to(folder).as_posix() not in used
    assert open_corpus("strong", tmp_path / "out", allow_empty=True).clips
    for path in folder.rglob("*.wav"):
        path.write_text("no sound")
    with pytest.raises(DataError, match="not one clip can be mixed"):
        make_scenes(corpus, tmp_path / "none", count=1)


def test_scenes_of_scenes_use_events_that_sound_alone(tmp_path):
    """Of timed events, only those that no other class overlaps; their class alone is heard."""
    time = np.arange(4 * RATE) / RATE
    low, high = (0.2 * np.sin(2 * np.pi * pitch * time) for pitch in (300, 2000))
    on = lambda *spans: sum(((time >= a) & (time < b)) for a, b in spans)  # noqa: E731
    write_audio(
        tmp_path / "in/audio/a.wav", (low * on((0.5, 1.0), (2.0, 3.0)) + high * on((1.2, 1.6), (2.5, 3.5))).astype("f4")
    )
    events = [("low", 0.5, 1.0), ("high", 1.2, 1.6), ("low", 2.0, 3.0), ("high", 2.5, 3.5)]
    write_table(
        tmp_path / "in/strong.tsv", ("filename", "onset", "offset", "event_label"),
        [("a.wav", onset, offset, label) for label, onset, offset in events],
    )  # fmt: skip
    config = MixConfig(background=0.0, whole_clip=0.0, speed=0.0, max_polyphony=1)
    corpus = open_corpus("strong", tmp_path / "in")
    make_scenes(corpus, tmp_path / "out", count=15, settings=SceneSettings(4.0, RATE, config=config))
    seen = set()
    for row in table(tmp_path / "out/sources.tsv"):
        span = float(row["src_onset"]), float(row["src_offset"])
        assert span == {"low": (0.5, 1.0), "high": (1.2, 1.6)}[row["event_label"]] and row["source_clip"] == "a.wav"
        scene, _ = soundfile.read(tmp_path / "out/audio" / row["filename"])
        cut = scene[round(float(row["onset"]) * RATE) : round(float(row["offset"]) * RATE)]
        power = np.abs(np.fft.rfft(cut * np.hanning(len(cut)), 8000)) ** 2
        assert (
            power[{"low": 300, "high": 2000}[row["event_label"]]]
            > 1e3 * power[{"low": 2000, "high": 300}[row["event_label"]]]
        )
        seen.add(row["event_label"])
    assert seen == {"low", "high"}


def test_clips_of_several_labels_without_times_are_counted(tmp_path):
    rows = [("a.wav", "dog"), ("b.wav", "cat"), ("c.wav", "dog;cat")]
    for name, _ in rows:
        write_audio(tmp_path / "in/audio" / name, np.full(4000, 0.1, np.float32))
    write_table(tmp_path / "in/sounds.csv", ("filename", "labels"), rows)
    corpus = open_corpus("csv", tmp_path / "in")
    made = make_scenes(corpus, tmp_path / "out", count=5, settings=SceneSettings(2.0, RATE))
    assert made.ambiguous == 1
    assert {row["source_clip"] for row in table(tmp_path / "out/sources.tsv")} <= {"a.wav", "b.wav"}


def test_real_clips_make_scenes_like_the_recorded_ones(tmp_path):
    """Numbers of events, lengths and overlap of scenes from the same clips, against the tables of the recorded set."""
    recorded = table(shared("data", "soundscapes", "train") / "sources.tsv")
    corpus = open_corpus("esc10", shared("data", "esc10"))
    config = MixConfig(background=0.0, whole_clip=0.0, rows=0.0)
    labels = ["dog", "rain", "rooster"]
    settings = SceneSettings(10.0, RATE, config=config)
    make_scenes(corpus, tmp_path, count=60, settings=settings, folds=[1], labels=labels)
    mixed = table(tmp_path / "sources.tsv")
    assert all(row["source_clip"].startswith("1-") for row in mixed)
    counts = [np.mean(list(Counter(row["filename"] for row in rows).values())) for rows in (recorded, mixed)]
    assert counts[1] == pytest.approx(counts[0], abs=0.6)
    for label in labels:
        own = [
            np.median([float(r["offset"]) - float(r["onset"]) for r in rows if r["event_label"] == label])
            for rows in (recorded, mixed)
        ]
        assert own[1] == pytest.approx(own[0], rel=0.35), label
    levels = [float(row["snr_db"]) for row in mixed]
    stated = [float(row["snr_db"]) for row in recorded]
    assert config.min_snr_db <= min(stated) and max(stated) <= config.max_snr_db
    assert min(levels) < 8 and max(levels) > 24


# ------------------------------------------------------------------ the command


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``htsat data``; returns (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["htsat", "data", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            htsat.cli.main()
        return exit.value.code, *capsys.readouterr()

    return call


def test_command(run, root, tmp_path):
    out = tmp_path / "scenes"
    arguments = ("mix", root / "esc10", "--out", out, "--backgrounds", root / "backgrounds", "--sample-rate", RATE)
    small = ("--seconds", 2, "--labels", "dog,rain", "--folds", "1,2", "--jobs", 1, "--format", "flac")
    code, text, err = run(*arguments, *small, "--count", 4, "--max-events", 2, "--set", "reverb=0.5")
    assert (code, err) == (0, "") and text.startswith(f"{out}: 4 scenes, ")
    settings = json.loads((out / "mix.json").read_text())["settings"]
    assert settings["config"]["reverb"] == 0.5 and settings["config"]["max_events"] == 2
    assert len(list((out / "audio").glob("*.flac"))) == 4
    assert soundfile.info(out / "audio/scene_00000.flac").samplerate == RATE
    assert {row["event_label"] for row in table(out / "strong.tsv")} <= {"dog", "rain"}
    code, text, _ = run(*arguments, *small, "--count", 6, "--max-events", 2, "--set", "reverb=0.5", "--json")
    report = json.loads(text)
    assert (code, report["scenes"], report["kept"], report["folder"]) == (0, 6, 4, str(out))
    # The corpus is checked by the same command, in its old form.
    code, text, _ = run("strong", out, "--jobs", 1)
    assert code == 0 and "6 clips" in text


def test_command_of_a_table_and_unreadable_clips(run, tmp_path):
    folder = make_folder(tmp_path / "sounds", seconds=0.3)
    rows = [(path.relative_to(tmp_path).as_posix(), path.parent.name) for path in sorted(folder.rglob("*.wav"))]
    write_table(tmp_path / "list.csv", ("filename", "label"), rows)
    Path(tmp_path / rows[0][0]).write_text("no sound")
    code, text, err = run("mix", tmp_path / "list.csv", "--out", tmp_path / "out", "--count", 2, "--jobs", 1)
    assert code == 1 and "2 scenes" in text
    assert len(err.splitlines()) == 1 and rows[0][0] in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("mix", "esc10", "--out", "out", "--set", "reverb=much"), 2, "expected key=number"),
        (("mix", "esc10", "--out", "out", "--set", "reverbs=1"), 2, "did you mean 'reverb'"),
        (("mix", "esc10", "--out", "out", "--min-snr", "50"), 2, "smallest snr_db 50 is above the largest"),
        (("mix", "esc10", "--out", "out", "--folds", "one"), 2, "expected whole numbers"),
        (("mix", "esc10", "--out", "out", "--labels", "dogs"), 2, "did you mean 'dog'"),
        (("mix", "esc10"), 2, "--out"),
        (("mix", "esc10", "--out", "esc10"), 1, "is not empty and holds no mixed scenes"),
        (("mix", "nowhere", "--out", "out"), 1, "there is no such folder"),
        (("mix", "esc10", "--out", "out", "--backgrounds", "nowhere"), 1, "nowhere: the folder cannot be listed"),
        (("mixed", "esc10"), 2, "unknown corpus 'mixed'"),
    ],
)
def test_wrong_input(run, root, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "esc10").symlink_to(root / "esc10")
    found, text, err = run(*arguments)
    assert (found, text) == (code, "") and words in err and err.startswith("htsat")
    assert not (tmp_path / "out").exists()


def test_both_forms_have_their_help(run):
    code, text, _ = run("--help")
    assert code == 0 and "htsat data mix" in text and "--download" in text and "--min-snr" not in text
    code, text, _ = run("mix", "--help")
    assert code == 0 and "htsat data mix" in text and "--min-snr" in text and "--download" not in text
