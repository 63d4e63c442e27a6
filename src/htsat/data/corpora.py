"""Labelled recordings as they lie on disk, read in their official layouts.

Every reader returns ``Clip`` values and checks the whole corpus first: all problems are
reported together in one ``DataError``.
"""

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from htsat.audio.decode import AUDIO_SUFFIXES
from htsat.errors import DataError
from htsat.events import Event


@dataclass(frozen=True)
class Clip:
    """A labelled recording.

    Attributes:
        path: the audio file.
        labels: what sounds in it.
        events: when; None if only the labels are known.
        folds: cross-validation folds of every recording that went into it; empty if it has none.
    """

    path: Path
    labels: tuple[str, ...]
    events: tuple[Event, ...] | None = None
    folds: frozenset[int] = frozenset()


def read_esc(folder: Path) -> list[Clip]:
    """Read ESC-50 or ESC-10: ``audio/`` and ``meta/esc50.csv`` or ``meta/esc10.csv``.

    ``meta/segments.tsv`` (filename, onset, offset), if there, gives the active parts of each clip.
    """
    tables = [folder / "meta" / name for name in ("esc50.csv", "esc10.csv")]
    table = next((t for t in tables if t.is_file()), None)
    if table is None:
        raise DataError(f"{folder}: not an ESC data set: neither meta/esc50.csv nor meta/esc10.csv is there")
    parts: dict[str, list[tuple[float, float]]] = defaultdict(list)
    segments = folder / "meta" / "segments.tsv"
    if segments.is_file():
        for row in read_table(segments, ("filename", "onset", "offset")):
            parts[row["filename"]].append((float(row["onset"]), float(row["offset"])))
    clips = []
    for row in read_table(table, ("filename", "fold", "category")):
        label = row["category"]
        events = tuple(Event(label, a, b) for a, b in parts[row["filename"]]) if parts else None
        clips.append(Clip(folder / "audio" / row["filename"], (label,), events, frozenset((int(row["fold"]),))))
    return _checked(folder, clips)


def read_strong(folder: Path) -> list[Clip]:
    """Read recordings with timed events: ``audio/``, ``strong.tsv`` (DCASE columns) and ``durations.tsv``.

    ``sources.tsv`` (filename, source_clip), if there, tells the folds of the parts of a mixture from
    the first character of each source clip, as ESC names its files.
    """
    events: dict[str, list[Event]] = {
        row["filename"]: [] for row in read_table(folder / "durations.tsv", ("filename", "duration"))
    }
    problems = []
    for number, row in enumerate(read_table(folder / "strong.tsv", ("filename", "onset", "offset", "event_label")), 2):
        if row["filename"] not in events:
            problems.append(f"strong.tsv line {number}: {row['filename']} is not in durations.tsv")
            continue
        try:
            if row["event_label"]:
                event = Event(row["event_label"], float(row["onset"]), float(row["offset"]))
                events[row["filename"]].append(event)
        except ValueError as error:
            problems.append(f"strong.tsv line {number}: {error}")
    if problems:
        raise DataError(f"{folder}: {len(problems)} problems: {'; '.join(problems[:10])}")
    folds: dict[str, set[int]] = defaultdict(set)
    if (folder / "sources.tsv").is_file():
        for row in read_table(folder / "sources.tsv", ("filename", "source_clip")):
            folds[row["filename"]].add(int(row["source_clip"][0]))
    clips = [
        Clip(folder / "audio" / name, tuple(sorted({e.event_label for e in found})), tuple(found), frozenset(folds[name]))
        for name, found in events.items()
    ]
    return _checked(folder, clips)


def read_keywords(folder: Path, split: str) -> list[Clip]:
    """Read spoken keywords: ``audio/`` and ``metadata.csv`` (filename, keyword, split)."""
    rows = read_table(folder / "metadata.csv", ("filename", "keyword", "split"))
    clips = [Clip(folder / "audio" / r["filename"], (r["keyword"],)) for r in rows if r["split"] == split]
    if not clips:
        raise DataError(f"{folder}/metadata.csv: no recording with split {split!r}")
    return _checked(folder, clips)


def read_unlabelled(folder: Path) -> list[Clip]:
    """Read every recording of a folder, without labels."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    clips = [Clip(path, ()) for path in sorted(folder.iterdir()) if path.suffix.lower() in AUDIO_SUFFIXES]
    return _checked(folder, clips)


def read_table(path: Path, columns: Iterable[str]) -> list[Mapping[str, str]]:
    """Read a CSV (``.csv``) or tab-separated table with a header line.

    Raises:
        DataError: the file is missing, or lacks one of ``columns``, or a line has too few fields.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, delimiter="," if path.suffix == ".csv" else "\t")
            rows = list(reader)
            found = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table: {error}") from None
    lacking = [c for c in columns if c not in found]
    if lacking:
        raise DataError(f"{path}: column {', '.join(lacking)} is missing; found {', '.join(found)}")
    for number, row in enumerate(rows, 2):
        if any(row[c] is None for c in columns):
            raise DataError(f"{path} line {number}: expected the fields {', '.join(columns)}, got {list(row.values())}")
    return rows


def _checked(folder: Path, clips: list[Clip]) -> list[Clip]:
    absent = [clip.path.name for clip in clips if not clip.path.is_file()]
    if absent:
        raise DataError(f"{folder}: {len(absent)} of {len(clips)} recordings are missing, e.g. {', '.join(absent[:5])}")
    if not clips:
        raise DataError(f"{folder}: no recordings found")
    return clips
