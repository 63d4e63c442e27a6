"""A data root in miniature: the folders and tables of the real one, a pure tone for each class."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

RATE = 8000
SECONDS = 5.0
CLASSES = (
    "chainsaw", "clock_tick", "crackling_fire", "crying_baby", "dog",
    "helicopter", "rain", "rooster", "sea_waves", "sneezing",
)  # fmt: skip
FOLDS = (1, 2, 3, 4)
PITCHES = dict(zip(CLASSES, np.geomspace(300, 3300, len(CLASSES)), strict=True))
KEYWORDS = ("down", "enter", "five")

#: what makes the shipped recipe fit the miniature: chunks of 5 s, 8 tokens of 0.625 s, some 50 000 weights
TINY = (
    f"frontend.sample_rate={RATE}", "frontend.n_fft=256", "frontend.hop_length=160", "frontend.f_max=4000.0",
    "model.image_size=128", f"model.chunk_seconds={SECONDS}",
    "model.embed_dim=16", "model.depths=[1, 1, 1]", "model.num_heads=[2, 2, 2]", "model.window_size=4",
    "train.threads=1", "train.steps=12", "train.batch_size=2", "data.test_fold=4",
)  # fmt: skip

#: what makes a recipe for clips fit the miniature corpora: half a second each, at the smallest native input
TINY_CLIPS = (
    f"frontend.sample_rate={RATE}", "frontend.n_fft=256", "frontend.hop_length=160", "frontend.f_max=4000.0",
    "model.stem=patch", "model.patch_size=4", "model.image_size=128", f"model.chunk_seconds={SECONDS}",
    "model.embed_dim=16", "model.depths=[1, 1, 1]", "model.num_heads=[2, 2, 2]", "model.window_size=4",
    "data.clip_seconds=0.5", "train.threads=1", "train.epochs=0", "train.steps=3", "train.batch_size=4",
    "train.precision=float32",
)  # fmt: skip


def tone(label: str, seconds: float, phase: float = 0.0) -> np.ndarray:
    """Return the sound of a class."""
    time = np.arange(round(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * PITCHES[label] * time + phase)).astype(np.float32)


def write_audio(path: Path, waveform: np.ndarray) -> None:
    """Write a WAV file that reads back bit by bit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, RATE, subtype="FLOAT")


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a CSV or tab-separated table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t", lineterminator="\n")
        writer.writerows([columns, *rows])


def make_root(root: Path) -> Path:
    """Make the data root; always the same one."""
    rng = np.random.default_rng(1)
    clips, segments = [], []
    for number, (fold, label) in enumerate([(fold, label) for fold in FOLDS for label in CLASSES]):
        name = f"{fold}-{number + 100}-A-{CLASSES.index(label)}.wav"
        onset, offset = (0.25, 0.75) if number % 3 else (0.0, 1.0)
        waveform = np.zeros(RATE, np.float32)
        waveform[round(onset * RATE) : round(offset * RATE)] = tone(label, offset - onset, rng.uniform(0, 6))
        write_audio(root / "esc10" / "audio" / name, waveform)
        clips.append((name, fold, CLASSES.index(label), label, True, number + 100, "A"))
        segments.append((name, fold, label, onset, offset))
    write_table(
        root / "esc10/meta/esc10.csv", ("filename", "fold", "target", "category", "esc10", "src_file", "take"), clips
    )
    write_table(root / "esc10/meta/segments.tsv", ("filename", "fold", "category", "onset", "offset"), segments)

    for split, folds, count in (("train", (1, 2, 3), 12), ("val", (4,), 6)):
        _make_soundscapes(root / "soundscapes" / split, split, [c for c in clips if c[1] in folds], count, rng)
    for name in ("park.wav", "street.wav"):
        write_audio(root / "backgrounds" / name, 0.01 * rng.standard_normal(2 * RATE * 5).astype(np.float32))

    words = []
    for keyword in KEYWORDS:
        for speaker in range(8):
            name = f"{keyword}/{speaker:08d}_NO_01.wav"
            spoken = 0.2 * rng.standard_normal(RATE // 2).astype(np.float32)
            write_audio(root / "arabic_speech_commands/audio" / name, np.pad(spoken, RATE // 4))
            words.append((name, keyword, f"{speaker:08d}", 1, "train" if speaker < 6 else "val"))
    write_table(
        root / "arabic_speech_commands/metadata.csv", ("filename", "keyword", "speaker", "round", "split"), words
    )
    return root


def _make_soundscapes(folder: Path, split: str, clips: Sequence[tuple], count: int, rng: np.random.Generator) -> None:
    strong, weak, durations, sources = [], [], [], []
    for number in range(count):
        name = f"{split}_{number:04d}.wav"
        waveform = 0.001 * rng.standard_normal(round(SECONDS * RATE)).astype(np.float32)
        labels = set()
        for part in range(1 + number % 2):
            # Each second mixture joins two folds, where there are two.
            clip = clips[(number * 7 + part * 13) % len(clips)]
            onset = round(float(rng.uniform(0, 3.9)), 3)
            sound = tone(clip[3], 1.0)
            start = round(onset * RATE)
            waveform[start : start + len(sound)] += sound
            strong.append((name, onset, round(onset + 1.0, 3), clip[3]))
            sources.append((name, onset, round(onset + 1.0, 3), clip[3], clip[0], 0.0, 1.0, 20.0))
            labels.add(clip[3])
        write_audio(folder / "audio" / name, waveform)
        weak.append((name, ",".join(sorted(labels))))
        durations.append((name, SECONDS))
    write_table(folder / "strong.tsv", ("filename", "onset", "offset", "event_label"), strong)
    write_table(folder / "weak.tsv", ("filename", "event_labels"), weak)
    write_table(folder / "durations.tsv", ("filename", "duration"), durations)
    columns = ("filename", "onset", "offset", "event_label", "source_clip", "src_onset", "src_offset", "snr_db")
    write_table(folder / "sources.tsv", columns, sources)
