"""Tables of events as people have them, for scoring: lenient in form, strict in content.

A table has the columns ``filename onset offset event_label``, in any order and among others, between tabs, commas or
semicolons, in quotation marks or not, with any line ends; or it has no header and exactly these four columns, as the
older lists of DCASE do. A row with a filename alone stands for a file without events. The other formats of
``htsat.formats`` are read by their endings.

What a metric cannot mean anything by is a problem (an onset after its offset, a negative time, what is no number, an
event without label), and all problems of a table are told at once. What the metrics have an answer to is a note:

* an event whose onset is its offset lasts no time: it is left out, as psds_eval does;
* equal and overlapping events of one class are scored as they are; see ``htsat.metrics.detection``;
* a label that only one table has: all events of it are misses, or false alarms in no macro F1;
* a file that only one table has: it has no events in the other;
* an event that ends after its file is scored as it is.
"""

import contextlib
import csv
import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from htsat.data.clips import ROUNDING, listed, some
from htsat.errors import DataError, UsageError, nearest
from htsat.events import Event
from htsat.formats import format_for_path, read_events, read_text

_COLUMNS = ("filename", "onset", "offset", "event_label")
#: what others call the columns
_OTHER_NAMES = {
    "filename": ("file", "file_name", "audio", "audio_path", "path", "recording", "clip"),
    "onset": ("start", "begin", "start_time", "onset_time", "event_onset", "from"),
    "offset": ("end", "stop", "end_time", "offset_time", "event_offset", "to"),
    "event_label": ("label", "class", "event", "event_class", "category", "tag"),
    "duration": ("length", "seconds", "dur"),
}
#: endings of tables; .txt is also that of an Audacity label track, which does not name its recording
_TABLES = (".tsv", ".csv", ".txt")
#: what is read as ``htsat.formats`` does, by its ending
_OTHER_FORMATS = ("json", "jsonl", "raven", "webvtt", "textgrid")
_EMPTY = ("", "nan")


@dataclass(frozen=True, eq=False)
class EventTable:
    """The events of one table.

    Attributes:
        path: where it was read.
        events: file name -> events, in the order of the table.
        lines: file name -> line number of each event; 0 where the format has none.
        notes: what a person should know, a line each.
    """

    path: Path
    events: dict[str, list[Event]]
    lines: dict[str, list[int]]
    notes: tuple[str, ...]

    @property
    def labels(self) -> set[str]:
        """The classes that occur."""
        return {event.event_label for events in self.events.values() for event in events}

    @property
    def num_events(self) -> int:
        """How many events there are."""
        return sum(map(len, self.events.values()))


def _records(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of every row that is not blank.

    Raises:
        csv.Error: a quotation mark that does not end.
    """
    if delimiter == "\t":
        for number, line in enumerate(text.split("\n"), 1):
            if line and not line.isspace():
                yield number, _unquoted(line.rstrip("\r"))
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    number = 1
    for cells in reader:
        if any(cell.strip() for cell in cells):
            yield number, cells
        number = reader.line_num + 1


def _unquoted(line: str) -> list[str]:
    """Return the cells of a row between tabs."""
    if '"' in line:
        # Row by row: a lone quotation mark is a character here, and must not swallow the rows below.
        with contextlib.suppress(csv.Error):
            return next(csv.reader([line], delimiter="\t", strict=True))
    return line.split("\t")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _header(path: Path, first: Sequence[str], columns: Sequence[str]) -> list[str] | None:
    """Return the names of the columns; None if the first row is one of four columns without names.

    Raises:
        DataError: a column is missing; what it may be called instead is named.
    """
    names = [cell.strip() for cell in first]
    if lacking := [column for column in columns if column not in names]:
        if len(columns) == len(names) == 4 and len(lacking) == 4 and _is_number(names[1]) and _is_number(names[2]):
            return None
        hints = []
        for column in lacking:
            others = [name for name in names if name.lower() in (column, *_OTHER_NAMES[column])]
            free = [name for name in names if name not in columns]
            hint = f"; rename {others[0]!r}" if others else nearest(column, free)
            hints.append(f"no column {column!r}{hint}")
        raise DataError(
            f"{path}: {'; '.join(hints)}; found {', '.join(map(repr, names))}; expected a header with "
            f"{', '.join(columns)} between tabs or commas"
        )
    return names


def _rows(path: Path, columns: Sequence[str], problems: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells of ``columns``) of the rows of a table, without the spaces around them.

    Raises:
        DataError: it cannot be read, is empty, or lacks columns.
    """
    text = read_text(path)
    first = next((line for line in text.splitlines() if line.strip()), None)
    if first is None:
        raise DataError(
            f"{path}: the file is empty; expected a header with {', '.join(columns)} (alone, if there is nothing below)"
        )
    delimiter = next((mark for mark in "\t,;" if mark in first), "\t")
    started, width, places = False, 0, list[int]()
    try:
        for number, cells in _records(text, delimiter):
            if not started:
                names, started = _header(path, cells, columns), True
                width = len(columns if names is None else names)
                places = [i if names is None else names.index(column) for i, column in enumerate(columns)]
                if names is not None:
                    continue
            while len(cells) > width and not cells[-1].strip():
                cells.pop()
            if len(cells) > width:
                problems.append(f"line {number}: {len(cells)} cells under {width} columns; quote cells with delimiters")
                continue
            cells += [""] * (width - len(cells))
            yield number, [cells[place].strip() for place in places]
    except csv.Error as error:
        problems.append(f"a row cannot be taken apart ({error}); close the quotation mark")


def _seconds(cell: str, what: str, where: str, problems: list[str]) -> float:
    """Return a time, or NaN and a problem."""
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        problems.append(f"{where}: {what} {cell!r} is not a number of seconds; write it like 1.25")
        return math.nan
    return value


def read_event_table(path: Path) -> EventTable:
    """Read a table of events; see the module's conventions.

    Raises:
        DataError: it cannot be read or has problems; all are named, each with its row and remedy.
    """
    try:
        format = format_for_path(path)
    except UsageError:
        format = "tsv"
    if format in _OTHER_FORMATS:
        read = {item.file: item.events for item in read_events(path, format)}
        return _with_notes(path, read, {file: [0] * len(events) for file, events in read.items()}, [])
    problems: list[str] = []
    events: dict[str, list[Event]] = {}
    lines: dict[str, list[int]] = {}
    nothing: list[str] = []
    for number, (file, onset, offset, label) in _rows(path, _COLUMNS, problems):
        where = f"line {number} ({file})" if file else f"line {number}"
        if not file:
            problems.append(f"{where}: the filename is missing")
            continue
        events.setdefault(file, [])
        lines.setdefault(file, [])
        if label.lower() in _EMPTY:
            if onset.lower() in _EMPTY and offset.lower() in _EMPTY:
                continue
            problems.append(f"{where}: the event has no event_label")
            continue
        if onset.lower() in _EMPTY or offset.lower() in _EMPTY:
            lacking = "onset" if onset.lower() in _EMPTY else "offset"
            problems.append(f"{where}: {label!r} has no {lacking}; give its time, or leave all three cells empty")
            continue
        begin, end = (_seconds(cell, what, where, problems) for cell, what in ((onset, "onset"), (offset, "offset")))
        if math.isnan(begin) or math.isnan(end):
            continue
        if begin < 0 or end < 0:
            problems.append(
                f"{where}: {'onset' if begin < 0 else 'offset'} {min(begin, end):g} is negative; times are seconds "
                "from the beginning of the file"
            )
        elif begin > end:
            problems.append(f"{where}: onset {begin:g} is after offset {end:g}; swap them")
        elif begin == end:
            nothing.append(where)
        else:
            events[file].append(Event(label, begin, end))
            lines[file].append(number)
    if problems:
        raise DataError(f"{path}: {listed(problems)}")
    notes = []
    if nothing:
        notes.append(f"{_count(len(nothing), 'event')} without length left out: {some(nothing)}")
    return _with_notes(path, events, lines, notes)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _with_notes(
    path: Path, events: dict[str, list[Event]], lines: dict[str, list[int]], notes: list[str]
) -> EventTable:
    """Return a table, with notes on events of one class that overlap."""
    equal, overlapping = [], []
    for file, found in events.items():
        last: dict[str, Event] = {}
        for event, line in sorted(zip(found, lines[file], strict=True), key=lambda both: (both[0].onset, both[1])):
            before = last.get(event.event_label)
            where = f"line {line} ({file})" if line else file
            if before is not None and (before.onset, before.offset) == (event.onset, event.offset):
                equal.append(where)
            elif before is not None and event.onset < before.offset:
                overlapping.append(where)
            if before is None or event.offset > before.offset:
                last[event.event_label] = event
    if equal:
        notes.append(f"{_count(len(equal), 'event')} equal to another one, each scored on its own: {some(equal)}")
    if overlapping:
        notes.append(
            f"{_count(len(overlapping), 'event')} overlapping another one of the class; what they share covers once: "
            f"{some(overlapping)}"
        )
    return EventTable(path, events, lines, tuple(f"{path}: {note}" for note in notes))


def read_durations(path: Path) -> dict[str, float]:
    """Read a table of durations (filename, duration in seconds).

    Raises:
        DataError: it cannot be read or has problems; all are named, each with its row.
    """
    problems: list[str] = []
    durations: dict[str, float] = {}
    for number, (file, duration) in _rows(path, ("filename", "duration"), problems):
        where = f"line {number} ({file})"
        value = _seconds(duration, "duration", where, problems)
        if value <= 0:
            problems.append(f"{where}: duration {value:g} is not above 0")
        elif not math.isnan(value) and durations.setdefault(file, value) != value:
            problems.append(f"{where}: duration {value:g}, but {durations[file]:g} in a row above; keep one")
    if problems:
        raise DataError(f"{path}: {listed(problems)}")
    return durations


def find_tables(folder: Path) -> list[Path]:
    """Return the tables in a folder, by name.

    Raises:
        DataError: there is no such folder, or no table in it.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; give the folder with one table per threshold")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in _TABLES and not p.name.startswith("."))
    if not found:
        raise DataError(f"{folder}: holds no table ({' '.join(_TABLES)}); expected one per threshold")
    return found


def compare_tables(
    reference: EventTable,
    estimated: EventTable,
    *,
    labels: Collection[str] | None = None,
    durations: Mapping[str, float] | None = None,
) -> list[str]:
    """Return notes on what fits badly between two tables, a line each.

    Args:
        reference: the truth.
        estimated: what was detected.
        labels: the classes to score; None: all that occur.
        durations: file name -> seconds.
    """
    notes = []
    if not reference.num_events:
        notes.append(f"{reference.path}: there is no event, so that every F1 is 0")
    if not estimated.num_events:
        notes.append(f"{estimated.path}: there is no event, so that every reference event is missed")
    known = reference.labels | estimated.labels
    wanted = known if labels is None else set(labels)
    if absent := sorted(wanted - known):
        notes.append(f"labels that neither table has: {_named(absent, known)}")
    if ignored := sorted(known - wanted):
        notes.append(f"labels that are not scored: {some([repr(label) for label in ignored])}")
    if reference.num_events and estimated.num_events:
        for one, other, what in (
            (estimated, reference, "all its events are false alarms, in no macro F1"),
            (reference, estimated, "all its events are missed"),
        ):
            if unknown := sorted((one.labels - other.labels) & wanted):
                notes.append(
                    f"{one.path}: labels that {other.path} does not have ({what}): {_named(unknown, other.labels)}"
                )
    for one, other in ((estimated, reference), (reference, estimated)):
        lone = [file for file in one.events if file not in other.events and one.events[file]]
        if lone and other.events:
            notes.append(
                f"{one.path}: {_count(len(lone), 'file')} that {other.path} does not have, scored as without events "
                f"there: {_named(lone, other.events.keys() - one.events.keys())}"
            )
    if durations is not None:
        notes += _beyond(reference, durations) + _beyond(estimated, durations)
    return notes


def _beyond(table: EventTable, durations: Mapping[str, float]) -> list[str]:
    """Return notes on events that end after their files, and on files of which nobody knows the end."""
    notes, long = [], []
    unlisted = [file for file, events in table.events.items() if events and file not in durations]
    for file, events in table.events.items():
        limit = durations.get(file, math.inf) + ROUNDING
        for event, line in zip(events, table.lines[file], strict=True):
            if event.offset > limit:
                place = f"line {line} ({file})" if line else file
                long.append(f"{place} ends at {event.offset:g} of {durations[file]:g} s")
    if long:
        notes.append(
            f"{table.path}: {_count(len(long), 'event')} beyond the end of the file, scored whole: {some(long)}"
        )
    if unlisted:
        notes.append(f"{table.path}: {_count(len(unlisted), 'file')} without a duration: {_named(unlisted, durations)}")
    return notes


def _named(names: Sequence[str], known: Collection[str]) -> str:
    """Return the first five names, each with the nearest known one, and the number of the others."""
    # In a large corpus every name resembles another, and looking for it takes long.
    near = known if len(known) <= 1000 else ()
    words = [f"{name!r}{nearest(name, near)}" for name in names[:5]]
    return "; ".join(words) + (f"; and {len(names) - 5} more" if len(names) > 5 else "")
