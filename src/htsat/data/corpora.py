"""Labelled recordings as they lie on disk, read in their official layouts.

Every reader returns ``Clip`` values and checks the whole corpus first: all problems of its tables
and its recordings are reported together in one ``DataError``.
"""

import csv
import math
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from htsat.audio.decode import AUDIO_SUFFIXES
from htsat.errors import DataError, nearest
from htsat.events import Event

#: problems that one message lists; the rest is counted
MAX_LISTED = 20
#: seconds that an event may end after its recording, for tables that round
ROUNDING = 0.01


@dataclass(frozen=True)
class Clip:
    """A labelled recording.

    Attributes:
        path: the audio file.
        labels: what sounds in it.
        events: when; None if only the labels are known.
        folds: cross-validation folds of every recording that went into it; empty if it has none.
        split: the official split that it belongs to (``train``, ``validation``, ``test``); None if there is none.
        group: what no two splits may share: the recording it was cut from, or the speaker; None if unknown.
        index: which clip of a packed file (HDF5, shard) it is; None if the file is the clip.
    """

    path: Path
    labels: tuple[str, ...]
    events: tuple[Event, ...] | None = None
    folds: frozenset[int] = frozenset()
    split: str | None = None
    group: str | None = None
    index: int | None = None


@dataclass(frozen=True)
class Corpus:
    """Labelled recordings to train or score on.

    Attributes:
        name: which corpus it is, as ``open_corpus`` calls it.
        folder: where it lies.
        labels: the classes, in the order of a model's outputs; the same on every machine.
        objective: ``single_label`` if every clip has exactly one label, else ``multi_label``.
        clips: in a fixed order.
    """

    name: str
    folder: Path
    labels: tuple[str, ...]
    objective: Literal["single_label", "multi_label"]
    clips: tuple[Clip, ...]


def read_esc(folder: Path) -> list[Clip]:
    """Read ESC-50 or ESC-10: ``audio/`` and ``meta/esc50.csv`` or ``meta/esc10.csv``.

    ``meta/segments.tsv`` (filename, onset, offset), if there, gives the active parts of each clip.

    Raises:
        DataError: with every problem of the corpus.
    """
    names = ("meta/esc50.csv", "meta/esc10.csv")
    table = next((name for name in names if (folder / name).is_file()), None)
    if table is None:
        raise DataError(f"{folder}: not an ESC data set: neither {names[0]} nor {names[1]} is there")
    corpus = _Corpus(folder)
    found: dict[str, tuple[str, int]] = {}
    for where, row in corpus.rows(table, ("filename", "fold", "category")):
        name = row["filename"]
        fold = corpus.integer(where, "fold", row["fold"])
        if name in found:
            corpus.problems.append(f"{where}: {name} occurs twice")
        elif not row["category"]:
            corpus.problems.append(f"{where}: {name} has no category")
        else:
            found[name] = (row["category"], fold)
    parts: dict[str, list[Event]] = defaultdict(list)
    if (folder / "meta" / "segments.tsv").is_file():
        before = len(corpus.problems)
        for where, row in corpus.rows("meta/segments.tsv", ("filename", "onset", "offset")):
            name = row["filename"]
            if name not in found:
                corpus.unknown(where, name, table, found)
            elif event := corpus.event(where, found[name][0], row["onset"], row["offset"]):
                parts[name].append(event)
        idle = [name for name in found if name not in parts]
        if idle and len(corpus.problems) == before:
            corpus.problems.append(f"meta/segments.tsv: no active part of {_some(idle)}")
    clips = [
        Clip(folder / "audio" / name, (label,), tuple(parts[name]) if parts else None, frozenset((fold,)))
        for name, (label, fold) in found.items()
    ]
    return corpus.checked(clips)


def read_strong(folder: Path) -> list[Clip]:
    """Read recordings with timed events: ``audio/``, ``strong.tsv`` (DCASE columns) and ``durations.tsv``.

    A line of ``strong.tsv`` with neither label nor times stands for a recording without events, as in DCASE.
    ``sources.tsv`` (filename, source_clip), if there, tells the folds of the parts of a mixture from
    the number before the first hyphen of each source clip, as ESC names its files.

    Raises:
        DataError: with every problem of the corpus.
    """
    corpus = _Corpus(folder)
    events: dict[str, list[Event]] = {}
    durations: dict[str, float] = {}
    for where, row in corpus.rows("durations.tsv", ("filename", "duration")):
        if row["filename"] in events:
            corpus.problems.append(f"{where}: {row['filename']} occurs twice")
        events[row["filename"]] = []
        durations[row["filename"]] = corpus.seconds(where, "duration", row["duration"])
    for where, row in corpus.rows("strong.tsv", ("filename", "onset", "offset", "event_label")):
        name, label, onset, offset = row["filename"], row["event_label"], row["onset"], row["offset"]
        if name not in events:
            corpus.unknown(where, name, "durations.tsv", events)
        elif not label and (onset or offset):
            corpus.problems.append(f"{where}: the event of {name} has no label")
        elif label and (event := corpus.event(where, label, onset, offset)):
            if event.offset > durations[name] + ROUNDING:
                corpus.problems.append(
                    f"{where}: {label} ends at {event.offset:g} s, but {name} lasts {durations[name]:g} s"
                )
            events[name].append(event)
    folds: dict[str, set[int]] = defaultdict(set)
    if (folder / "sources.tsv").is_file():
        before = len(corpus.problems)
        for where, row in corpus.rows("sources.tsv", ("filename", "source_clip")):
            name, source = row["filename"], row["source_clip"]
            fold = re.match(r"(\d+)-", source)
            if name not in events:
                corpus.unknown(where, name, "durations.tsv", events)
            elif fold is None or int(fold[1]) < 1:
                corpus.problems.append(f"{where}: expected a source clip like 1-100032-A-0, got {source!r}")
            else:
                folds[name].add(int(fold[1]))
        # A mixture of unknown origin could smuggle a held-out recording into training.
        unknown = [name for name, found in events.items() if found and name not in folds]
        if unknown and len(corpus.problems) == before:
            corpus.problems.append(f"sources.tsv: no source of {_some(unknown)}")
    clips = []
    for name, found in events.items():
        labels = tuple(sorted({event.event_label for event in found}))
        clips.append(Clip(folder / "audio" / name, labels, tuple(found), frozenset(folds[name])))
    return corpus.checked(clips)


def read_keywords(folder: Path, split: str) -> list[Clip]:
    """Read spoken keywords: ``audio/`` and ``metadata.csv`` (filename, keyword, split).

    Raises:
        DataError: with every problem of the split, or if there is no such split.
    """
    corpus = _Corpus(folder)
    rows = corpus.rows("metadata.csv", ("filename", "keyword", "split"))
    splits = {row["split"] for _, row in rows}
    if split not in splits and not corpus.problems:
        known = f"; found {', '.join(sorted(splits))}{nearest(split, splits)}" if splits else ""
        raise DataError(f"{folder}: metadata.csv has no recording with split {split!r}{known}")
    clips: dict[str, Clip] = {}
    for where, row in rows:
        if row["split"] != split:
            continue
        if row["filename"] in clips:
            corpus.problems.append(f"{where}: {row['filename']} occurs twice")
        elif not row["keyword"]:
            corpus.problems.append(f"{where}: {row['filename']} has no keyword")
        clips[row["filename"]] = Clip(folder / "audio" / row["filename"], (row["keyword"],))
    return corpus.checked(list(clips.values()))


def read_unlabelled(folder: Path) -> list[Clip]:
    """Read every recording of a folder, without labels.

    Raises:
        DataError: the folder is missing, cannot be listed, or holds no recordings.
    """
    try:
        # Names with a leading dot are not recordings but what some systems leave beside them.
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in AUDIO_SUFFIXES and not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be listed: {error.strerror or error}") from None
    return _Corpus(folder).checked([Clip(path, ()) for path in paths])


def read_table(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Read a CSV (``.csv``) or tab-separated table with a header line: (line number, fields) of each row.

    Raises:
        DataError: the file is missing, or lacks some of ``columns``, or lines have too few fields.
    """
    try:
        # utf-8-sig: spreadsheets write a byte order mark, which must not become part of the first column's name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="," if path.suffix == ".csv" else "\t")
            rows = [(reader.line_num, row) for row in reader]
            found = reader.fieldnames or []
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table in UTF-8: {error}") from None
    if lacking := [c for c in columns if c not in found]:
        raise DataError(f"{path}: no column {', '.join(lacking)}; found {', '.join(found) or 'none'}")
    if short := [str(line) for line, row in rows if any(row[c] is None for c in columns)]:
        raise DataError(f"{path}: fewer fields than the {len(found)} columns in line {_some(short)}")
    return rows


class _Corpus:
    """Collects the problems of one corpus, so that all are told at once and mended at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []

    def rows(self, name: str, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
        """Return the rows of a table, each with the words that name its place; none if it cannot be read."""
        try:
            return [(f"{name} line {line}", row) for line, row in read_table(self.folder / name, columns)]
        except DataError as error:
            self.problems.append(str(error).removeprefix(f"{self.folder}/"))
            return []

    def unknown(self, where: str, name: str, table: str, known: Collection[str]) -> None:
        """Note a name that ``table`` lacks; not where that table could not be read, which is one problem, not many."""
        if known:
            self.problems.append(f"{where}: {name} is not in {table}")

    def integer(self, where: str, what: str, text: str) -> int:
        """Return a whole number from 1 on; 1 stands in for a malformed one."""
        if re.fullmatch(r"\d{1,9}", text) and int(text) >= 1:
            return int(text)
        self.problems.append(f"{where}: expected a whole number from 1 on as {what}, got {text!r}")
        return 1

    def seconds(self, where: str, what: str, text: str) -> float:
        """Return a positive number of seconds; infinity stands in for a malformed one."""
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if 0 < value < math.inf:
            return value
        self.problems.append(f"{where}: expected seconds as {what}, got {text!r}")
        return math.inf

    def event(self, where: str, label: str, onset: str, offset: str) -> Event | None:
        """Return an event, or None where its times are malformed."""
        try:
            times = float(onset), float(offset)
        except ValueError:
            self.problems.append(f"{where}: expected onset and offset in seconds, got {onset!r} and {offset!r}")
            return None
        try:
            return Event(label, *times)
        except ValueError as error:
            self.problems.append(f"{where}: {error}")
            return None

    def checked(self, clips: list[Clip]) -> list[Clip]:
        """Return the clips, if their files exist and nothing was found wrong before."""
        if absent := [clip.path.name for clip in clips if not clip.path.is_file()]:
            self.problems.append(f"{len(absent)} of {len(clips)} recordings are missing: {_some(absent)}")
        if not clips and not self.problems:
            self.problems.append("no recordings found")
        if self.problems:
            raise DataError(f"{self.folder}: {listed(self.problems)}")
        return clips


def listed(problems: Sequence[str]) -> str:
    """Return problems as one line: all of them, or the first ``MAX_LISTED`` and the number of the others."""
    more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    count = f"{len(problems)} problems: " if len(problems) > 1 else ""
    return count + "; ".join(problems[:MAX_LISTED]) + more


def _some(names: Sequence[str]) -> str:
    """Return the first five names and the number of the others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
