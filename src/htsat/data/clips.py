"""What every reader of labelled recordings shares: its values, and checks that tell all problems at once."""

import csv
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
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
#: the splits, as clips call them
SPLITS = ("train", "validation", "test")

Objective = Literal["single_label", "multi_label"]

#: what tables and folders call a split
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass(frozen=True, slots=True)
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
        warnings: what a person should know and may accept, a line each, such as recordings that are absent.
    """

    name: str
    folder: Path
    labels: tuple[str, ...]
    objective: Objective
    clips: Sequence[Clip]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leak:
    """Clips of one recording or speaker that stand on both sides of a split.

    Attributes:
        group: what they share.
        parts: the splits or folds that share it, such as ``train`` or ``fold 2``.
        clips: all clips of the group.
    """

    group: str
    parts: tuple[str, ...]
    clips: tuple[Clip, ...]


def split_named(name: str) -> str | None:
    """Return the split that a table or a folder means by ``name`` (``val``, ``Dev``, ``testing``...), or None."""
    return _SPLIT_NAMES.get(name.strip().lower())


def part_of(clip: Clip) -> str:
    """Return the words for what a clip belongs to: its split, else its folds (``fold 2``), else ``all``."""
    if clip.split is not None:
        return clip.split
    if not clip.folds:
        return "all"
    return ("fold " if len(clip.folds) == 1 else "folds ") + ", ".join(map(str, sorted(clip.folds)))


def clip_name(clip: Clip, folder: Path | None = None) -> str:
    """Return what messages call a clip: its path, below ``folder`` if it lies there, and its row in a packed file."""
    path = clip.path
    if folder is not None and path.is_relative_to(folder):
        path = path.relative_to(folder)
    return str(path) if clip.index is None else f"{path} row {clip.index}"


def find_leaks(clips: Iterable[Clip]) -> list[Leak]:
    """Return the groups that two splits or folds share, by name. A mixture of several folds counts for none."""
    groups: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        if clip.group is not None and len(clip.folds) < 2:
            groups[clip.group].append(clip)
    parts = {group: sorted({part_of(clip) for clip in found}, key=part_order) for group, found in groups.items()}
    return [Leak(g, tuple(parts[g]), tuple(groups[g])) for g in sorted(groups) if len(parts[g]) > 1]


def part_order(part: str) -> tuple[int, int, str]:
    """Return by what parts are sorted: splits in their order, then folds by number, then the rest."""
    number = re.match(r"folds? (\d+)", part)
    return (SPLITS.index(part) if part in SPLITS else len(SPLITS), int(number[1]) if number else 0, part)


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
        raise DataError(f"{path}: fewer fields than the {len(found)} columns in line {some(short)}")
    return rows


def columns_of(path: Path) -> tuple[str, ...]:
    """Return the column names of a table, as ``read_table`` finds them; none if it is not a readable table."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return tuple(next(csv.reader(file, delimiter="," if path.suffix == ".csv" else "\t"), ()))
    except (OSError, UnicodeDecodeError, csv.Error):
        return ()


def is_recording(path: Path) -> bool:
    """Return whether a name is that of a recording; those with a leading dot are what some systems leave beside."""
    return path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith(".")


class Checker:
    """Collects the problems of one corpus, so that all are told at once and mended at once.

    Attributes:
        folder: where the corpus lies; every message begins with it.
        problems: what makes the corpus useless, in the order found.
        warnings: what a person should know.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.warnings: list[str] = []

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

    def split(self, where: str, text: str) -> str | None:
        """Return the split that a table names, or None where it is unknown."""
        found = split_named(text)
        if found is None:
            self.problems.append(f"{where}: expected {', '.join(SPLITS)} as split, got {text!r}")
        return found

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

    def events(
        self, table: str, durations: dict[str, float], *, known: str = "", slack: float = ROUNDING
    ) -> dict[str, list[Event]]:
        """Read a table with DCASE's columns: the events of each recording, in the order of the table.

        Args:
            table: filename, onset, offset, event_label; a line with neither label nor times stands for a recording
                without events.
            durations: seconds of the recordings, as far as they are known.
            known: the table of durations, if it must name every recording; then its order is kept.
            slack: seconds that an event may end after its recording.
        """
        events: dict[str, list[Event]] = {name: [] for name in durations} if known else {}
        for where, row in self.rows(table, ("filename", "onset", "offset", "event_label")):
            name, label, onset, offset = row["filename"], row["event_label"], row["onset"], row["offset"]
            if known and name not in events:
                self.unknown(where, name, known, events)
                continue
            found = events.setdefault(name, [])
            if not label and (onset or offset):
                self.problems.append(f"{where}: the event of {name} has no label")
            elif label and (event := self.event(where, label, onset, offset)):
                if event.offset > durations.get(name, math.inf) + slack:
                    self.problems.append(
                        f"{where}: {label} ends at {event.offset:g} s, but {name} lasts {durations[name]:g} s"
                    )
                found.append(event)
        return events

    def durations(self, table: str) -> dict[str, float]:
        """Read a table of durations (filename, duration in seconds), in its order."""
        durations: dict[str, float] = {}
        for where, row in self.rows(table, ("filename", "duration")):
            if row["filename"] in durations:
                self.problems.append(f"{where}: {row['filename']} occurs twice")
            durations[row["filename"]] = self.seconds(where, "duration", row["duration"])
        return durations

    def checked(self, clips: list[Clip]) -> list[Clip]:
        """Return the clips, if their files exist and nothing was found wrong before."""
        there = {path: path.is_file() for path in {clip.path for clip in clips}}
        if absent := [clip.path.name for clip in clips if not there[clip.path]]:
            self.problems.append(f"{len(absent)} of {len(clips)} recordings are missing: {some(absent)}")
        if not clips and not self.problems:
            self.problems.append("no recordings found")
        if self.problems:
            raise DataError(f"{self.folder}: {listed(self.problems)}")
        return clips

    def leaks(self, clips: Sequence[Clip], what: str, *, certain: bool) -> None:
        """Note every group that two splits or folds share.

        Args:
            clips: all of the corpus.
            what: what a group is, in words such as ``the speaker``.
            certain: the corpus itself tells the groups; where they are guessed from names, a leak is a warning.
        """
        lines = [
            f"{' and '.join(leak.parts)} share {what} {leak.group}: {some([clip.path.name for clip in leak.clips])}"
            for leak in find_leaks(clips)
        ]
        if certain:
            self.problems += lines
        elif lines:
            self.warnings.append(listed(lines))

    def corpus(
        self,
        name: str,
        objective: Objective,
        clips: list[Clip],
        *,
        found: Sequence[str],
        labels: Sequence[str] | None,
        allow_empty: bool,
        stray: str = "",
    ) -> Corpus:
        """Return the corpus, if nothing is wrong with it.

        Args:
            name: as ``open_corpus`` calls it.
            objective: as in ``Corpus``.
            clips: all of it.
            found: the labels of the corpus itself, in its order.
            labels: the labels that it must have, in the order of a model; None for its own.
            allow_empty: a label without clips is a warning, no problem.
            stray: what to do about clips with another label, for the message.
        """
        order = tuple(found if labels is None else labels)
        counts = Counter(label for clip in clips for label in clip.labels)
        for label in [label for label in counts if label not in set(order)]:
            self.problems.append(
                f"{counts[label]} clips have the label {label!r}, which is not one of the {len(order)} expected"
                f"{nearest(label, order)}{stray}"
            )
        empty = [label for label in order if label not in counts]
        if empty and counts:
            words = f"{len(empty)} of {len(order)} classes have no clips: {some(empty)}"
            (self.warnings if allow_empty else self.problems).append(words)
        trained = {label for clip in clips if clip.split == "train" for label in clip.labels}
        if trained and (untrained := [label for label in order if label in counts and label not in trained]):
            self.warnings.append(f"{len(untrained)} classes have no clips to train on: {some(untrained)}")
        return Corpus(name, self.folder, order, objective, tuple(self.checked(clips)), tuple(self.warnings))


def listed(problems: Sequence[str]) -> str:
    """Return problems as one line: all of them, or the first ``MAX_LISTED`` and the number of the others."""
    more = f"; and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    count = f"{len(problems)} problems: " if len(problems) > 1 else ""
    return count + "; ".join(problems[:MAX_LISTED]) + more


def some(names: Sequence[str]) -> str:
    """Return the first five names and the number of the others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
