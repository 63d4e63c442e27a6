"""Published corpora in miniature: their exact folders, tables and names, with a short tone for each class."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from miniature import RATE, write_audio, write_table

from htsat.labels import audioset_mids, label_set

#: ESC-50's columns
ESC_COLUMNS = ("filename", "fold", "target", "category", "esc10", "src_file", "take")
STRONG_COLUMNS = ("filename", "onset", "offset", "event_label")
#: speakers of the miniature of Speech Commands, and what they are for
SPEAKERS = {"0a7c2a8d": "train", "1b4c9b89": "train", "9db2bfe9": "train", "c1d39ce8": "validation", "eb3f7d82": "test"}
#: AudioSet's classes in the miniature, as indices of its 527
AUDIOSET_CLASSES = (0, 74, 81, 137, 288)


def pitch_of(number: int, count: int) -> float:
    """Return the pitch in Hz of a class among ``count``."""
    return float(300 * 11 ** (number / max(count - 1, 1)))


def beep(number: int, count: int, seconds: float, seed: int) -> np.ndarray:
    """Return the sound of a class: a tone in faint noise, another one for each seed."""
    rng = np.random.default_rng([number, seed])
    time = np.arange(round(seconds * RATE)) / RATE
    wave = 0.3 * np.sin(2 * np.pi * pitch_of(number, count) * time + rng.uniform(0, 6))
    return (wave + 0.003 * rng.standard_normal(len(time))).astype(np.float32)


def make_esc50(root: Path, *, seconds: float = 0.1, labels: Sequence[str] | None = None) -> Path:
    """Make ESC-50: 5 folds, of each class one source with two takes in each; ``labels`` keeps a few classes only."""
    ten, every = label_set("esc10"), label_set("esc50")
    rows = []
    for target, label in enumerate(every):
        if labels is not None and label not in labels:
            continue
        for fold in range(1, 6):
            source = 100000 + 50 * fold + target
            for take in "AB":
                name = f"{fold}-{source}-{take}-{target}.wav"
                write_audio(root / "audio" / name, beep(target, len(every), seconds, source * 2 + (take == "B")))
                rows.append((name, fold, target, label, label in ten, source, take))
    # The official table is sorted by file name.
    write_table(root / "meta/esc50.csv", ESC_COLUMNS, sorted(rows))
    return root


def make_speech_commands(root: Path, *, seconds: float = 0.1, words: Sequence[str] | None = None) -> Path:
    """Make Speech Commands V2: an utterance of every speaker for each word, two of the first one."""
    every = label_set("speech_commands_v2")
    lists: dict[str, list[str]] = {"validation": [], "test": []}
    for number, word in enumerate(every):
        if words is not None and word not in words:
            continue
        for index, (speaker, split) in enumerate([("0a7c2a8d", "train"), *SPEAKERS.items()]):
            name = f"{word}/{speaker}_nohash_{int(index == 0)}.wav"
            write_audio(root / name, beep(number, len(every), seconds, index))
            if split != "train":
                lists[split].append(name)
    for split, name in (("validation", "validation_list.txt"), ("test", "testing_list.txt")):
        (root / name).write_text("".join(f"{line}\n" for line in lists[split]))
    write_audio(root / "_background_noise_/white_noise.wav", beep(0, 1, 2.0, 9))
    (root / "_background_noise_/README.md").write_text("noises\n")
    (root / "README.md").write_text("Speech Commands Data Set v0.02\n")
    (root / "LICENSE").write_text("CC BY 4.0\n")
    (root / ".DS_Store").write_bytes(b"\0")
    return root


def make_desed(root: Path, *, seconds: float = 0.5) -> Path:
    """Make DESED as DCASE 2021 lays it out: every part, 10 clips each, one class and its neighbour in each."""
    labels = label_set("desed")

    def clip(number: int, seed: int) -> np.ndarray:
        half = seconds / 2
        return np.concatenate([beep(number, 10, half, seed), beep((number + 1) % 10, 10, half, seed)])

    def recorded(number: int, letter: str) -> str:
        return f"Y{letter}ideo-_{number:04d}_{10 * number}.000_{10 * number + 10}.000.wav"

    weak = []
    for number in range(10):
        name = recorded(number, "w")
        write_audio(root / "audio/train/weak" / name, clip(number, 1))
        write_audio(root / "audio/train/unlabel_in_domain" / recorded(number, "u"), clip(number, 2))
        weak.append((name, ",".join([labels[number], labels[(number + 1) % 10]])))
    write_table(root / "metadata/train/weak.tsv", ("filename", "event_labels"), weak)
    parts = (
        ("train/synthetic21_train/soundscapes", "train/synthetic21_train/soundscapes.tsv", lambda n: f"{n}.wav"),
        ("validation/validation", "validation/validation.tsv", lambda n: recorded(n, "v")),
        (
            "validation/synthetic21_validation/soundscapes", "validation/synthetic21_validation/soundscapes.tsv",
            lambda n: f"{n}.wav",
        ),
        ("eval/public", "eval/public.tsv", lambda n: recorded(n, "p").removeprefix("Y")),
    )  # fmt: skip
    for seed, (folder, table, name_of) in enumerate(parts, start=3):
        strong, durations = [], []
        for number in range(10):
            name = name_of(number)
            write_audio(root / "audio" / folder / name, clip(number, seed))
            strong.append((name, 0.0, round(seconds / 2, 3), labels[number]))
            strong.append((name, round(seconds / 2, 3), seconds, labels[(number + 1) % 10]))
            durations.append((name, seconds))
        if "synthetic" not in folder:
            write_audio(root / "audio" / folder / "silent.wav", np.zeros(round(seconds * RATE), np.float32))
            strong.append(("silent.wav", "", "", ""))
            durations.append(("silent.wav", seconds))
        write_table(root / "metadata" / table, STRONG_COLUMNS, strong)
        beside = "durations.tsv" if "synthetic" in folder else f"{Path(table).stem}_durations.tsv"
        if "validation" in folder:
            write_table(root / "metadata" / Path(table).parent / beside, ("filename", "duration"), durations)
    return root


def video_of(number: int) -> str:
    """Return the id of a video: eleven characters, some of which names use otherwise."""
    return f"{'-_Y'[number % 3]}{number:05d}ab-_Z"


def make_audioset(root: Path, *, hdf5: bool = False, seconds: float = 0.2) -> Path:
    """Make AudioSet: three tables of 10 segments, five classes alone and in pairs; one recording of each is absent.

    With ``hdf5``, the recordings lie in ``hdf5s/waveforms`` as PANNs packs them: int16 with names and targets, an
    absent one as an empty row, and an index beside; else in a folder of clips for each table.
    """
    mids, names = audioset_mids(), label_set("audioset")
    classes = [(index, mid, name) for index, (mid, name) in enumerate(zip(mids, names, strict=True))]
    write_table(root / "class_labels_indices.csv", ("index", "mid", "display_name"), classes)
    entries = [{"id": mid, "name": name} for mid, name in zip(mids, names, strict=True)]
    (root / "ontology.json").write_text(json.dumps([*entries, {"id": "/m/0dgw9r", "name": "Human sounds"}]))
    packed = {
        "balanced_train_segments": "balanced_train.h5",
        "unbalanced_train_segments": "unbalanced_train/unbalanced_train_part00.h5",
        "eval_segments": "eval.h5",
    }
    for part, (table, file) in enumerate(packed.items()):
        lines = [
            "# Segments csv created Sun Mar  5 10:54:31 2017",
            "# num_ytids=10, num_segs=10, num_unique_labels=5, num_positive_labels=15",
            "# YTID, start_seconds, end_seconds, positive_labels",
        ]
        rows = []
        for number in range(10):
            video = video_of(10 * part + number)
            found = [AUDIOSET_CLASSES[number % 5], *([AUDIOSET_CLASSES[(number + 1) % 5]] if number >= 5 else [])]
            ids = ",".join(mids[index] for index in found)
            lines.append(f'{video}, {30 * number}.000, {30 * number + 10}.000, "{ids}"')
            wave = sum(beep(AUDIOSET_CLASSES.index(index), 5, seconds, 10 * part + number) for index in found)
            rows.append((video, found, wave if number != 7 else None))
        (root / f"{table}.csv").write_text("\n".join(lines) + "\n")
        if hdf5:
            _pack(root / "hdf5s/waveforms" / file, rows, round(seconds * RATE))
        else:
            for number, (video, _, wave) in enumerate(rows):
                times = ("", f"_{30 * number}.000_{30 * number + 10}.000", f"_{30 * number}", f"_{30000 * number}")
                name = f"{'Y' if number % 2 else ''}{video}{times[part if number else 3]}.wav"
                if wave is not None:
                    write_audio(root / "audio" / table / name, wave)
    if hdf5:
        _pack(root / "hdf5s/indexes/balanced_train.h5", [], 0)
    return root


def _pack(path: Path, rows: Sequence[tuple[str, list[int], np.ndarray | None]], num_samples: int) -> None:
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        names = file.create_dataset("audio_name", (len(rows),), "S20")
        targets = file.create_dataset("target", (len(rows), 527), bool)
        file.attrs.create("sample_rate", RATE, dtype=np.int32)
        if not num_samples:
            file.create_dataset("hdf5_path", (0,), "S200")
            return
        waveforms = file.create_dataset("waveform", (len(rows), num_samples), np.int16)
        for row, (video, found, wave) in enumerate(rows):
            if wave is not None:
                names[row] = f"Y{video}.wav".encode()
                waveforms[row] = np.round(wave * 32767).astype(np.int16)
                targets[row] = np.isin(np.arange(527), found)


def make_folder(
    root: Path, *, classes: Sequence[str] = ("bell", "dog", "rain"), recordings: int = 4, pieces: int = 3,
    seconds: float = 0.1, splits: Sequence[str] = ()
) -> Path:  # fmt: skip
    """Make a folder per class, each with pieces of a few recordings; below each of ``splits``, if given."""
    for part, split in enumerate(splits or [""]):
        for number, label in enumerate(classes):
            for recording in range(recordings):
                for piece in range(pieces):
                    name = f"{label[0]}{'abcd'[part]}{'klmnopqrst'[recording]}_{piece:02d}.wav"
                    wave = beep(number, len(classes), seconds, 1000 * part + 10 * recording + piece)
                    write_audio(root / split / label / name, wave)
    return root


def make_csv(root: Path, *, multi: bool = False, split: bool = False, seconds: float = 0.1) -> Path:
    """Make a table of 12 recordings with one label each or several, and perhaps splits."""
    labels = ("bell", "dog", "rain")
    rows = []
    for number in range(12):
        name = f"site{'abcdefghijkl'[number]}.wav"
        found = [labels[number % 3], *([labels[(number + 1) % 3]] if multi and number % 2 else [])]
        write_audio(root / "audio" / name, sum(beep(labels.index(label), 3, seconds, number) for label in found))
        parts = [("train", "val", "test")[max(0, number // 3 - 1)]] if split else []
        rows.append((name, ";".join(found), *parts))
    columns = ("filename", "labels" if multi else "label", *(["split"] if split else []))
    write_table(root / "sounds.csv", columns, rows)
    return root


def make_strong(root: Path, *, durations: bool = False, seconds: float = 0.5) -> Path:
    """Make eight recordings with two timed events each, and one without."""
    labels = ("bell", "dog", "rain")
    strong, lengths = [], []
    for number in range(9):
        name = f"scene{'abcdefghi'[number]}.wav"
        wave = np.zeros(round(seconds * RATE), np.float32)
        for part in range(2 if number < 8 else 0):
            onset, length = round((0.1 + 0.4 * part) * seconds, 3), round(0.3 * seconds, 3)
            sound = beep((number + part) % 3, 3, length, number)
            wave[round(onset * RATE) :][: len(sound)] += sound
            strong.append((name, onset, round(onset + length, 3), labels[(number + part) % 3]))
        if number == 8:
            strong.append((name, "", "", ""))
        write_audio(root / "audio" / name, wave)
        lengths.append((name, seconds))
    write_table(root / "strong.tsv", STRONG_COLUMNS, strong)
    if durations:
        write_table(root / "durations.tsv", ("filename", "duration"), lengths)
    return root
