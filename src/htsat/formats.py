"""Event tables and tag lists as text, and back.

======== ============================== ========== =====================================================
format   endings                        recordings holds
======== ============================== ========== =====================================================
table    (none)                         several    aligned columns for people; write only
tsv      .tsv                           several    DCASE: filename, onset, offset, event_label
csv      .csv                           several    the same and the probability, exact numbers
json     .json                          several    everything, exact numbers
jsonl    .jsonl                         several    everything, one recording a line
audacity .txt                           one        label track: onset, offset, label
raven    .selections.txt .raven.txt     several    Raven selection table, with probability
webvtt   .vtt                           one        captions of a web video or audio player
textgrid .TextGrid                      one        Praat: one interval tier per label
======== ============================== ========== =====================================================

What a format cannot hold is lost: durations survive in json, jsonl and textgrid only, probabilities in json,
jsonl, csv and raven only (otherwise 1 when read back). Seconds are exact in json, jsonl and csv, to a
millisecond in tsv and webvtt, to a microsecond in audacity, raven and textgrid; an event never shrinks to
nothing.

Labels keep every character in json, jsonl, csv and textgrid. The line-based formats (tsv, audacity, raven,
webvtt, table) cannot hold tabs and line breaks: each becomes a space, and spaces around a label are removed.

A recording without events is kept as a row with empty cells in tsv and csv (as in the DESED ground truth);
a raven table cannot show it. Formats of one recording do not name it: it is called like the file that is
read, without the format's ending.
"""

import csv
import html
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htsat.errors import DataError, UsageError, nearest
from htsat.events import Event, Tag


@dataclass(frozen=True)
class Detections:
    """The events of one recording.

    Attributes:
        file: name of the recording.
        duration: its length in seconds; None: unknown.
        events: what sounds when.
    """

    file: str
    duration: float | None
    events: list[Event]


@dataclass(frozen=True)
class Tags:
    """The tags of one recording.

    Attributes:
        file: name of the recording.
        duration: its length in seconds; None: unknown.
        tags: what sounds, most probable first.
    """

    file: str
    duration: float | None
    tags: list[Tag]


# Everything that some reader takes for the end of a line or a cell.
_BREAKS = re.compile("[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")


def _one_line(text: str) -> str:
    """Return ``text`` with tabs and line breaks as spaces."""
    return _BREAKS.sub(" ", text)


def _cell_label(label: str) -> str:
    """Return a label as line-based formats hold it."""
    return _one_line(label).strip()


def _rounded(event: Event, decimals: int) -> tuple[int, int]:
    """Return onset and offset in units of ``10 ** -decimals`` seconds, at least one unit apart."""
    scale = 10**decimals
    onset, offset = round(event.onset * scale), round(event.offset * scale)
    if onset < offset:
        return onset, offset
    # Widen to the side where the event lies, so that neither end moves by more than a unit.
    return (onset - 1, onset) if event.offset * scale < onset else (onset, onset + 1)


def _fixed(units: int, decimals: int) -> str:
    """Return ``units * 10 ** -decimals`` as text, without the detour over a float."""
    whole, part = divmod(units, 10**decimals)
    return f"{whole}.{part:0{decimals}d}"


def _seconds(event: Event, decimals: int) -> tuple[str, str]:
    """Return onset and offset of an event as text."""
    onset, offset = _rounded(event, decimals)
    return _fixed(onset, decimals), _fixed(offset, decimals)


def _malformed(name: str, line_number: int, line: str, problem: str, expected: str) -> DataError:
    """Return the error of a line that cannot be read."""
    shown = line if len(line) <= 120 else line[:117] + "..."
    return DataError(f"{name}: line {line_number}: {problem} in {shown!r}; expected {expected}")


def _number(cell: str) -> float:
    """Return a cell as a finite number; ValueError otherwise."""
    value = float(cell)
    if not math.isfinite(value):
        raise ValueError(f"{cell!r} is not a finite number")
    return value


def _recording(name: str, format: str) -> str:
    """Return the recording that a file of a one-recording format is about."""
    base = re.split(r"[/\\]", name)[-1]
    for ending in FORMATS[format].endings:
        if base.lower().endswith(ending.lower()) and len(base) > len(ending):
            return base[: -len(ending)]
    return base


def _quoted(text: str) -> str:
    """Return ``text`` in quotation marks, its own ones doubled (CSV and Praat)."""
    return '"' + text.replace('"', '""') + '"'


class _Collector:
    """Gathers events by recording, in order of first appearance."""

    def __init__(self) -> None:
        self.events: dict[str, list[Event]] = {}

    def add(self, file: str, event: Event | None) -> None:
        """Note a recording and, if there is one, its event."""
        found = self.events.setdefault(file, [])
        if event is not None:
            found.append(event)

    def result(self) -> list[Detections]:
        """Return what was gathered."""
        return [Detections(file, None, events) for file, events in self.events.items()]


# --- table ---------------------------------------------------------------------------------------


def _printable(text: str) -> str:
    """Return ``text`` safe for a terminal: no control characters, hence no escape sequences."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def aligned(rows: Sequence[Sequence[str]], right: Sequence[bool] | None = None) -> str:
    """Return rows as columns of equal width, two spaces apart.

    Args:
        rows: cells, as many in each.
        right: which columns are flush right; None: all but the first.
    """
    if right is None:
        right = [column > 0 for column in range(len(rows[0]))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(right))]
    lines = (
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    )
    return "\n".join(lines) + "\n"


def _write_table(detections: Sequence[Detections]) -> str:
    rows = [("file", "onset", "offset", "label", "probability")]
    for item in detections:
        file = _printable(item.file)
        if not item.events:
            rows.append((file, "-", "-", "(no events)", "-"))
        for event in item.events:
            onset, offset = _seconds(event, 3)
            rows.append((file, onset, offset, _printable(_cell_label(event.event_label)), f"{event.probability:.3f}"))
    return aligned(rows, (False, True, True, False, True))


# --- tables with a header: tsv, csv, raven --------------------------------------------------------

_COLUMNS = ("filename", "onset", "offset", "event_label")


@dataclass(frozen=True)
class _Row:
    """A row of a table with a header, for the parser and for its error messages."""

    name: str
    number: int
    line: str
    cells: dict[str, str]
    expected: str

    def malformed(self, problem: str) -> DataError:
        """Return the error of this row."""
        return _malformed(self.name, self.number, self.line, problem, self.expected)

    def event(self, onset: str, offset: str, label: str, probability: str | None) -> Event:
        """Return the event of this row, or raise DataError."""
        try:
            times = _number(onset), _number(offset)
            certainty = _number(probability) if probability else 1.0
        except ValueError as error:
            raise self.malformed(str(error)) from None
        if not label.strip():
            raise self.malformed("the label is missing")
        try:
            return Event(label, *times, certainty)
        except ValueError as error:
            raise self.malformed(str(error)) from None


def _rows(text: str, name: str, delimiter: str, required: Sequence[str]) -> Iterator[_Row]:
    """Yield the rows of a table with a header; columns in any order, others ignored.

    Cells that are missing at the end of a row are empty.

    Raises:
        DataError: a column of the header is missing, or a row has more cells than the header.
    """
    between = "tabs" if delimiter == "\t" else "commas"
    expected = f"columns {', '.join(required)} separated by {between}"
    lines = text.removeprefix("\ufeff").split("\n")

    def records() -> Iterator[tuple[int, list[str]]]:
        if delimiter == "\t":
            # No quoting: a quotation mark in a label is just a character.
            for number, line in enumerate(lines, 1):
                yield number, line.removesuffix("\r").split("\t")
            return
        reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
        start = 1
        try:
            for cells in reader:
                yield start, cells
                start = reader.line_num + 1
        except csv.Error as error:
            line = lines[start - 1] if start <= len(lines) else ""
            raise _malformed(name, start, line, str(error), expected) from None

    header: list[str] = []
    for number, cells in records():
        if not any(cell.strip() for cell in cells):
            continue
        # The csv module counts lone carriage returns as lines too, so its numbers may run ahead.
        line = lines[min(number, len(lines)) - 1].removesuffix("\r")
        if not header:
            header = [cell.strip() for cell in cells]
            missing = [column for column in required if column not in header]
            if missing:
                raise _malformed(name, number, line, f"the header lacks {', '.join(missing)}", expected)
            continue
        if len(cells) > len(header):
            raise _malformed(name, number, line, f"{len(cells)} cells under {len(header)} columns", expected)
        padded = cells + [""] * (len(header) - len(cells))
        yield _Row(name, number, line, dict(zip(header, padded, strict=True)), expected)
    if not header:
        raise DataError(f"{name}: the table is empty; expected a header with {expected}")


def _read_columns(text: str, name: str, delimiter: str) -> list[Detections]:
    """Read tsv or csv."""
    found = _Collector()
    for row in _rows(text, name, delimiter, _COLUMNS):
        file, onset, offset, label = (row.cells[column] for column in _COLUMNS)
        if not file:
            raise row.malformed("the filename is missing")
        # pandas may have written the empty cells of a recording without events as nan.
        if all(cell.strip().lower() in ("", "nan") for cell in (onset, offset, label)):
            found.add(file, None)
            continue
        label = label.strip() if delimiter == "\t" else label
        found.add(file, row.event(onset, offset, label, row.cells.get("probability", "").strip()))
    return found.result()


def _write_tsv(detections: Sequence[Detections]) -> str:
    lines = ["\t".join(_COLUMNS)]
    for item in detections:
        file = _one_line(item.file)
        if not item.events:
            lines.append(f"{file}\t\t\t")
        for event in item.events:
            lines.append("\t".join((file, *_seconds(event, 3), _cell_label(event.event_label))))
    return "\n".join(lines) + "\n"


def _read_tsv(text: str, name: str) -> list[Detections]:
    return _read_columns(text, name, "\t")


def _csv_line(cells: Sequence[str]) -> str:
    # Not csv.writer: with "\n" as line end it leaves a lone carriage return unquoted, which readers split at.
    return ",".join(_quoted(cell) if re.search('[,"\r\n]|^ | $', cell) else cell for cell in cells) + "\n"


def _write_csv(detections: Sequence[Detections]) -> str:
    lines = [_csv_line((*_COLUMNS, "probability"))]
    for item in detections:
        if not item.events:
            lines.append(_csv_line((item.file, "", "", "", "")))
        for event in item.events:
            numbers = (repr(float(value)) for value in (event.onset, event.offset, event.probability))
            onset, offset, probability = numbers
            lines.append(_csv_line((item.file, onset, offset, event.event_label, probability)))
    return "".join(lines)


def _read_csv(text: str, name: str) -> list[Detections]:
    return _read_columns(text, name, ",")


_RAVEN_COLUMNS = ("Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)")
# The band that the published front end hears; Raven draws the box of each selection from these.
_RAVEN_BAND = ("0", "14000")
_RAVEN_LABELS = ("Event Label", "Annotation", "Common Name", "Species", "Label")
_RAVEN_PROBABILITIES = ("Probability", "Confidence", "Score")


def _write_raven(detections: Sequence[Detections]) -> str:
    several = len(detections) > 1
    header = [*_RAVEN_COLUMNS, "Event Label", "Probability"]
    lines = ["\t".join(header + ["Begin File", "File Offset (s)"] * several)]
    # Raven lays several recordings end to end: its times count from the start of the first one.
    start = 0
    selection = 0
    for item in detections:
        for event in item.events:
            selection += 1
            onset, offset = _rounded(event, 6)
            times = _fixed(start + onset, 6), _fixed(start + offset, 6)
            cells = [str(selection), "Spectrogram 1", "1", *times, *_RAVEN_BAND]
            cells += [_cell_label(event.event_label), f"{event.probability:.6f}"]
            if several:
                cells += [_one_line(item.file), _fixed(onset, 6)]
            lines.append("\t".join(cells))
        if several:
            if item.duration is None:
                raise UsageError(
                    f"{item.file}: its duration is unknown, but a raven table of several recordings needs it; "
                    "write one file per recording (--out DIR)"
                )
            start += round(item.duration * 10**6)
    return "\n".join(lines) + "\n"


def _read_raven(text: str, name: str) -> list[Detections]:
    found = _Collector()
    seen: set[tuple[str, ...]] = set()
    for row in _rows(text, name, "\t", ("Begin Time (s)", "End Time (s)")):
        cells = row.cells
        label_column = next((column for column in _RAVEN_LABELS if column in cells), None)
        if label_column is None:
            raise row.malformed(f"no column of labels ({', '.join(_RAVEN_LABELS)})")
        probability = next((cells[column].strip() for column in _RAVEN_PROBABILITIES if column in cells), "")
        file = cells.get("Begin File", "") or _recording(name, "raven")
        # Raven repeats a selection once per view (Waveform 1, Spectrogram 1).
        identity = (file, cells.get("Selection", ""), cells["Begin Time (s)"], cells["End Time (s)"])
        if cells.get("Selection", "").strip():
            if identity in seen:
                continue
            seen.add(identity)
        event = row.event(cells["Begin Time (s)"], cells["End Time (s)"], cells[label_column].strip(), probability)
        within = cells.get("File Offset (s)", "").strip()
        if within:
            try:
                onset = _number(within)
            except ValueError as error:
                raise row.malformed(str(error)) from None
            event = row.event(repr(onset), repr(onset + event.duration), event.event_label, repr(event.probability))
        found.add(file, event)
    if not found.events:
        found.add(_recording(name, "raven"), None)
    return found.result()


# --- json, jsonl ---------------------------------------------------------------------------------


def _plain_detections(item: Detections) -> dict[str, Any]:
    return {
        "file": item.file,
        "duration": None if item.duration is None else float(item.duration),
        "events": [
            {
                "event_label": event.event_label,
                "onset": float(event.onset),
                "offset": float(event.offset),
                "probability": float(event.probability),
            }
            for event in item.events
        ],
    }


def _write_json(detections: Sequence[Detections]) -> str:
    plain = [_plain_detections(item) for item in detections]
    return json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=2) + "\n"


def _write_jsonl(detections: Sequence[Detections]) -> str:
    return "".join(
        json.dumps(_plain_detections(item), ensure_ascii=False, allow_nan=False) + "\n" for item in detections
    )


_JSON_ITEM = '{"file", "duration", "events": [{"event_label", "onset", "offset", "probability"}]}'


def _json_number(value: Any) -> bool:
    # Compared, not asked with math.isfinite: an integer of hundreds of digits does not fit a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _from_plain(item: Any, where: str) -> Detections:
    """Return one recording of parsed JSON, or raise DataError naming ``where``."""

    def malformed(problem: str) -> DataError:
        return DataError(f"{where}: {problem}; expected {_JSON_ITEM}")

    if not isinstance(item, dict):
        raise malformed(f"got {type(item).__name__}")
    file, duration, events = item.get("file"), item.get("duration"), item.get("events")
    if not isinstance(file, str):
        raise malformed('"file" is missing or no text')
    if duration is not None and not (_json_number(duration) and duration >= 0):
        raise malformed(f'"duration" is {duration!r}')
    if not isinstance(events, list):
        raise malformed('"events" is missing or no list')
    read = []
    for number, event in enumerate(events, 1):
        if not isinstance(event, dict) or not isinstance(event.get("event_label"), str):
            raise malformed(f'event {number} has no "event_label"')
        values = [event.get("onset"), event.get("offset"), event.get("probability", 1.0)]
        if not all(_json_number(value) for value in values):
            raise malformed(f"event {number} has onset {values[0]!r}, offset {values[1]!r}, probability {values[2]!r}")
        try:
            read.append(Event(event["event_label"], *(float(value) for value in values)))
        except ValueError as error:
            raise malformed(str(error)) from None
    return Detections(file, None if duration is None else float(duration), read)


def _load_json(text: str, name: str, first_line: int, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1]
        raise _malformed(name, first_line + error.lineno - 1, line, f"no JSON ({error.msg})", expected) from None
    except (RecursionError, ValueError) as error:
        # Nested beyond reason, or a number of thousands of digits.
        raise DataError(f"{name}: cannot be read as JSON ({error}); expected {expected}") from None


def _read_json(text: str, name: str) -> list[Detections]:
    plain = _load_json(text.removeprefix("\ufeff"), name, 1, f"a list of {_JSON_ITEM}")
    if not isinstance(plain, list):
        raise DataError(f"{name}: got {type(plain).__name__}; expected a list of {_JSON_ITEM}")
    return [_from_plain(item, f"{name}: entry {number}") for number, item in enumerate(plain, 1)]


def _read_jsonl(text: str, name: str) -> list[Detections]:
    found = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            found.append(_from_plain(_load_json(line, name, number, _JSON_ITEM), f"{name}: line {number}"))
    return found


# --- audacity ------------------------------------------------------------------------------------

_AUDACITY = "onset, offset and label separated by tabs (seconds, onset before offset)"


def _write_audacity(detections: Sequence[Detections]) -> str:
    lines = []
    for item in detections:
        for event in item.events:
            lines.append("\t".join((*_seconds(event, 6), _cell_label(event.event_label))) + "\n")
    return "".join(lines)


def _read_audacity(text: str, name: str) -> list[Detections]:
    events = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        line = line.removesuffix("\r")
        # A line that begins with a backslash holds the frequencies of the label before it.
        if not line.strip() or line.startswith("\\"):
            continue
        cells = line.split("\t", 2)
        if len(cells) < 3:
            raise _malformed(name, number, line, f"{len(cells)} columns", _AUDACITY)
        row = _Row(name, number, line, {}, _AUDACITY)
        events.append(row.event(cells[0], cells[1], cells[2].strip(), None))
    return [Detections(_recording(name, "audacity"), None, events)]


# --- webvtt --------------------------------------------------------------------------------------

_VTT_TIMING = re.compile(r"\s*((?:\d+:)?\d\d:\d\d\.\d{3})\s+-->\s+((?:\d+:)?\d\d:\d\d\.\d{3})(?:\s.*)?")
_VTT = "a cue: 'HH:MM:SS.mmm --> HH:MM:SS.mmm', then the label on the next line"


def _clock(milliseconds: int) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}.{milliseconds:03d}"


def _write_webvtt(detections: Sequence[Detections]) -> str:
    lines = ["WEBVTT\n"]
    for item in detections:
        for event in item.events:
            onset, offset = (_clock(units) for units in _rounded(event, 3))
            label = _cell_label(event.event_label).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            lines.append(f"\n{onset} --> {offset}\n{label}\n")
    return "".join(lines)


def _read_webvtt(text: str, name: str) -> list[Detections]:
    lines = [line.removesuffix("\r") for line in text.removeprefix("\ufeff").split("\n")]
    if not re.match(r"WEBVTT(?:[ \t]|$)", lines[0]):
        raise _malformed(name, 1, lines[0], "no WebVTT signature", "'WEBVTT' on the first line")
    events = []
    number = 1
    while number < len(lines):
        line = lines[number]
        number += 1
        if "-->" not in line:
            continue  # blank, a note, a style, or the name of a cue
        row = _Row(name, number, line, {}, _VTT)
        timing = _VTT_TIMING.fullmatch(line)
        if timing is None:
            raise row.malformed("no valid times")
        times = []
        for clock in timing.groups():
            seconds = 0.0
            for part in clock.split(":"):
                seconds = seconds * 60 + float(part)
            times.append(repr(seconds))
        payload = []
        while number < len(lines) and lines[number].strip():
            payload.append(lines[number])
            number += 1
        label = html.unescape(re.sub(r"<[^>]*>", "", " ".join(payload))).strip()
        events.append(row.event(times[0], times[1], label, None))
    return [Detections(_recording(name, "webvtt"), None, events)]


# --- textgrid ------------------------------------------------------------------------------------


def _write_textgrid(detections: Sequence[Detections]) -> str:
    events = [event for item in detections for event in item.events]
    known = [round(item.duration * 10**6) for item in detections if item.duration is not None]
    spans = sorted(((*_rounded(event, 6), event.event_label) for event in events), key=lambda span: span[:2])
    # A TextGrid must have a length; without duration and events it is one second.
    end = max([offset for _, offset, _ in spans] + known, default=0) or 10**6
    # Intervals of a tier cannot overlap: events of one label that do go to a second tier of that name.
    tiers: list[tuple[str, list[tuple[int, int]]]] = []
    for onset, offset, label in spans:
        for name, tier in tiers:
            if name == label and tier[-1][1] <= onset:
                tier.append((onset, offset))
                break
        else:
            tiers.append((label, [(onset, offset)]))
    tiers = sorted(tiers, key=lambda tier: tier[0]) or [("events", [])]

    limits = f"xmin = 0\n{{indent}}xmax = {_fixed(end, 6)}\n"
    lines = ['File type = "ooTextFile"\nObject class = "TextGrid"\n\n', limits.format(indent="")]
    lines.append(f"tiers? <exists>\nsize = {len(tiers)}\nitem []:\n")
    for number, (label, tier) in enumerate(tiers, 1):
        # Gaps are intervals with empty text, from one event to the next and to both ends.
        intervals: list[tuple[int, int, str]] = []
        last = 0
        for onset, offset in tier:
            if onset > last:
                intervals.append((last, onset, ""))
            intervals.append((onset, offset, label))
            last = offset
        if end > last:
            intervals.append((last, end, ""))
        indent = " " * 8
        lines.append(f'    item [{number}]:\n{indent}class = "IntervalTier"\n{indent}name = {_quoted(label)}\n')
        lines.append(indent + limits.format(indent=indent))
        lines.append(f"{indent}intervals: size = {len(intervals)}\n")
        for count, (onset, offset, text) in enumerate(intervals, 1):
            lines.append(f"{indent}intervals [{count}]:\n")
            lines.append(f"{indent}    xmin = {_fixed(onset, 6)}\n{indent}    xmax = {_fixed(offset, 6)}\n")
            lines.append(f"{indent}    text = {_quoted(text)}\n")
    return "".join(lines)


# Praat reads free-standing numbers, quoted texts and <flags>; all other words are decoration, which is why
# its long and its short text format are one and the same to a reader.
_PRAAT_TOKEN = re.compile(r'"(?P<text>(?:[^"]|"")*+)"|(?<!\S)(?P<number>[-+]?[\d.]+(?:[eE][-+]?\d+)?)(?!\S)|![^\n]*')
_TEXTGRID = "a Praat TextGrid (text file) with interval tiers"


def _read_textgrid(text: str, name: str) -> list[Detections]:
    tokens = [token for token in _PRAAT_TOKEN.finditer(text) if not token.group().startswith("!")]
    position = 0

    def malformed(at: int, problem: str) -> DataError:
        number = text.count("\n", 0, at) + 1
        return _malformed(name, number, text.split("\n")[number - 1].strip(), problem, _TEXTGRID)

    def take(kind: str, what: str) -> str:
        nonlocal position
        if position >= len(tokens):
            raise malformed(len(text), f"the file ends before {what}")
        value = tokens[position].group(kind)
        if value is None:
            raise malformed(tokens[position].start(), f"no {what}")
        position += 1
        return str(value)

    def take_number(what: str) -> float:
        value = take("number", what)
        try:
            return _number(value)
        except ValueError:
            raise malformed(tokens[position - 1].start(), f"{value!r} is no {what}") from None

    for expected in ("ooTextFile", "TextGrid"):
        found = take("text", expected)
        if found != expected:
            raise malformed(tokens[position - 1].start(), f"{found[:40]!r} instead of {expected!r}")
    take_number("xmin")
    duration = take_number("xmax")
    events = []
    # Without tiers ("tiers? <absent>") there is no number of tiers either.
    for _ in range(int(take_number("number of tiers")) if position < len(tokens) else 0):
        kind = take("text", "class of a tier")
        take("text", "name of a tier")
        take_number("xmin")
        take_number("xmax")
        if kind not in ("IntervalTier", "TextTier"):
            raise malformed(tokens[position - 1].start(), f"unknown class of tier {kind[:40]!r}")
        for _ in range(int(take_number("number of intervals"))):
            at = tokens[position].start() if position < len(tokens) else len(text)
            onset = take_number("xmin")
            # Points of a TextTier have no length, so they are no events.
            offset = take_number("xmax") if kind == "IntervalTier" else None
            label = take("text", "text").replace('""', '"')
            if offset is None or not label.strip():
                continue
            try:
                events.append(Event(label, onset, offset))
            except ValueError as error:
                raise malformed(at, str(error)) from None
    events.sort(key=lambda event: event.onset)
    return [Detections(_recording(name, "textgrid"), duration, events)]


# --- the registry --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A format of event tables.

    Attributes:
        endings: of file names; the first one is used to name new files.
        description: one line for people.
        write: recordings -> text.
        read: text and the name for messages -> recordings; None: the format is for people.
        single: it holds one recording only.
        any_label: labels of white space only survive.
    """

    endings: tuple[str, ...]
    description: str
    write: Callable[[Sequence[Detections]], str]
    read: Callable[[str, str], list[Detections]] | None
    single: bool = False
    any_label: bool = False


FORMATS: dict[str, Format] = {
    "table": Format((), "aligned columns for people", _write_table, None, any_label=True),
    "tsv": Format((".tsv",), "DCASE table: filename, onset, offset, event_label", _write_tsv, _read_tsv),
    "csv": Format((".csv",), "filename, onset, offset, event_label, probability", _write_csv, _read_csv),
    "json": Format((".json",), "one list of recordings with events", _write_json, _read_json, any_label=True),
    "jsonl": Format((".jsonl",), "one recording with events a line", _write_jsonl, _read_jsonl, any_label=True),
    "audacity": Format((".txt",), "Audacity label track", _write_audacity, _read_audacity, single=True),
    "raven": Format((".selections.txt", ".raven.txt"), "Raven selection table", _write_raven, _read_raven),
    "webvtt": Format((".vtt",), "WebVTT captions", _write_webvtt, _read_webvtt, single=True),
    "textgrid": Format((".TextGrid",), "Praat TextGrid", _write_textgrid, _read_textgrid, single=True),
}


def _known_format(format: str) -> Format:
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}{nearest(format, FORMATS)}; known: {', '.join(FORMATS)}")
    return FORMATS[format]


def format_for_path(path: str | os.PathLike[str]) -> str:
    """Return the name of the format that a file name's ending stands for.

    Raises:
        UsageError: the ending is unknown; the nearest known one is named.
    """
    name = Path(path).name
    endings = {ending.lower(): format for format, known in FORMATS.items() for ending in known.endings}
    # The longest first: .raven.txt is also .txt.
    for ending in sorted(endings, key=len, reverse=True):
        if name.lower().endswith(ending):
            return endings[ending]
    known = [ending for format in FORMATS.values() for ending in format.endings]
    hint = nearest(Path(name).suffix, known) if Path(name).suffix else ""
    raise UsageError(f"{os.fspath(path)}: no event format has this ending{hint}; known: {' '.join(known)}")


def format_events(detections: Sequence[Detections], format: str) -> str:
    """Return recordings with their events as text.

    Args:
        detections: the recordings.
        format: a name in ``FORMATS``.

    Raises:
        UsageError: unknown format, several recordings for a format of one, or a raven table of several
            recordings without their durations.
        DataError: a label of white space only, where the format cannot hold it.
    """
    known = _known_format(format)
    if known.single and len(detections) > 1:
        raise UsageError(
            f"{format} holds one recording, got {len(detections)}; write one file per recording (--out DIR)"
        )
    if not known.any_label:
        for item in detections:
            if any(not event.event_label.strip() for event in item.events):
                raise DataError(f"{item.file}: an event has an empty label, which {format} cannot hold; use json")
    return known.write(detections)


def parse_events(text: str, format: str, *, name: str) -> list[Detections]:
    """Read recordings with their events from text.

    Args:
        text: the table, line ends as they are.
        format: a name in ``FORMATS`` but ``table``.
        name: of the file the text comes from: for messages, and to name the recording where the format does not.

    Returns:
        Recordings in order of first appearance; events in the order of the text (textgrid: by onset).

    Raises:
        UsageError: unknown format, or one for people.
        DataError: malformed text; names the file, the line, what it holds and what was expected.
    """
    known = _known_format(format)
    if known.read is None:
        readable = ", ".join(key for key, value in FORMATS.items() if value.read)
        raise UsageError(f"{format} is for people and cannot be read back; readable: {readable}")
    return known.read(text, name)


def read_text(path: str | os.PathLike[str]) -> str:
    """Return the text of a table in UTF-8 or, with a byte order mark, UTF-16; line ends as they are.

    Raises:
        DataError: the file cannot be read or is no text.
    """
    name = os.fspath(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}); check the path") from error
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: no text in {error.encoding.upper()} (at byte {error.start}); save the table as UTF-8"
        ) from None


def read_events(path: str | os.PathLike[str], format: str | None = None) -> list[Detections]:
    """Read recordings with their events from a file.

    Args:
        path: the file, in UTF-8 or, with a byte order mark (as Praat writes it), UTF-16.
        format: a name in ``FORMATS``; None: by the ending.

    Raises:
        UsageError: unknown ending or format.
        DataError: the file cannot be read, is no text, or is malformed.
    """
    chosen = format or format_for_path(path)
    return parse_events(read_text(path), chosen, name=os.fspath(path))


# --- tags ----------------------------------------------------------------------------------------


def _tags_table(items: Sequence[Tags]) -> str:
    rows = [("file", "label", "probability")]
    for item in items:
        if not item.tags:
            rows.append((_printable(item.file), "(no tags)", "-"))
        for tag in item.tags:
            rows.append((_printable(item.file), _printable(tag.label), f"{tag.probability:.3f}"))
    return aligned(rows, (False, False, True))


def _tags_csv(items: Sequence[Tags]) -> str:
    lines = [_csv_line(("filename", "label", "probability"))]
    for item in items:
        if not item.tags:
            lines.append(_csv_line((item.file, "", "")))
        for tag in item.tags:
            lines.append(_csv_line((item.file, tag.label, repr(float(tag.probability)))))
    return "".join(lines)


def _tags_json(items: Sequence[Tags]) -> str:
    plain = [
        {
            "file": item.file,
            "duration": None if item.duration is None else float(item.duration),
            "tags": [{"label": tag.label, "probability": float(tag.probability)} for tag in item.tags],
        }
        for item in items
    ]
    return json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=2) + "\n"


TAG_FORMATS: dict[str, Callable[[Sequence[Tags]], str]] = {"table": _tags_table, "json": _tags_json, "csv": _tags_csv}


def format_tags(items: Sequence[Tags], format: str) -> str:
    """Return recordings with their tags as text.

    Args:
        items: the recordings.
        format: ``table`` (for people), ``json`` or ``csv`` (filename, label, probability; exact numbers).

    Raises:
        UsageError: unknown format.
    """
    if format not in TAG_FORMATS:
        raise UsageError(f"unknown format {format!r}{nearest(format, TAG_FORMATS)}; known: {', '.join(TAG_FORMATS)}")
    return TAG_FORMATS[format](items)
