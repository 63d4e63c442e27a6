"""Event tables: hand-written texts, round trips, and what a reader must refuse."""

import csv
import errno
import io
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import shared

from htsat.errors import DataError, OutputError, UsageError
from htsat.events import Event, Tag
from htsat.files import write_atomic
from htsat.formats import (
    FORMATS,
    Detections,
    Tags,
    format_events,
    format_for_path,
    format_tags,
    parse_events,
    read_events,
)

STREET = Detections(
    "street.wav", 12.5, [Event("Dog, big", 0.5, 1.25, 0.875), Event('Speech "loud"', 1.0, 3661.0625, 0.5)]
)
QUIET = Detections("quiet.wav", 4.0, [])
TSV_HEAD = "filename\tonset\toffset\tevent_label\n"
READABLE = [name for name, known in FORMATS.items() if known.read]

# --- what is written, by hand --------------------------------------------------------------------

WRITTEN = {
    "table": """\
file        onset    offset  label          probability
street.wav  0.500     1.250  Dog, big             0.875
street.wav  1.000  3661.062  Speech "loud"        0.500
quiet.wav       -         -  (no events)              -
""",
    "tsv": (
        "filename\tonset\toffset\tevent_label\n"
        "street.wav\t0.500\t1.250\tDog, big\n"
        'street.wav\t1.000\t3661.062\tSpeech "loud"\n'
        "quiet.wav\t\t\t\n"
    ),
    "csv": """\
filename,onset,offset,event_label,probability
street.wav,0.5,1.25,"Dog, big",0.875
street.wav,1.0,3661.0625,"Speech ""loud\""",0.5
quiet.wav,,,,
""",
    "raven": (
        "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)"
        "\tEvent Label\tProbability\tBegin File\tFile Offset (s)\n"
        "1\tSpectrogram 1\t1\t0.500000\t1.250000\t0\t14000\tDog, big\t0.875000\tstreet.wav\t0.500000\n"
        '2\tSpectrogram 1\t1\t1.000000\t3661.062500\t0\t14000\tSpeech "loud"\t0.500000\tstreet.wav\t1.000000\n'
    ),
}

WRITTEN_ALONE = {
    "audacity": '0.500000\t1.250000\tDog, big\n1.000000\t3661.062500\tSpeech "loud"\n',
    "webvtt": """\
WEBVTT

00:00:00.500 --> 00:00:01.250
Dog, big

00:00:01.000 --> 01:01:01.062
Speech "loud"
""",
    "textgrid": """\
File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 3661.062500
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "Dog, big"
        xmin = 0
        xmax = 3661.062500
        intervals: size = 3
        intervals [1]:
            xmin = 0.000000
            xmax = 0.500000
            text = ""
        intervals [2]:
            xmin = 0.500000
            xmax = 1.250000
            text = "Dog, big"
        intervals [3]:
            xmin = 1.250000
            xmax = 3661.062500
            text = ""
    item [2]:
        class = "IntervalTier"
        name = "Speech ""loud\"""
        xmin = 0
        xmax = 3661.062500
        intervals: size = 2
        intervals [1]:
            xmin = 0.000000
            xmax = 1.000000
            text = ""
        intervals [2]:
            xmin = 1.000000
            xmax = 3661.062500
            text = "Speech ""loud\"""
""",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_written_text(name):
    assert format_events([STREET, QUIET], name) == WRITTEN[name]


@pytest.mark.parametrize("name", WRITTEN_ALONE)
def test_written_text_of_one_recording(name):
    assert format_events([STREET], name) == WRITTEN_ALONE[name]


def test_webvtt_escapes_what_players_interpret():
    text = format_events([Detections("a", None, [Event("R&B <live> -->", 0, 1)])], "webvtt")
    assert text.splitlines()[-1] == "R&amp;B &lt;live&gt; --&gt;"


def test_json_is_the_public_surface():
    plain = [
        {
            "file": "street.wav",
            "duration": 12.5,
            "events": [
                {"event_label": "Dog, big", "onset": 0.5, "offset": 1.25, "probability": 0.875},
                {"event_label": 'Speech "loud"', "onset": 1.0, "offset": 3661.0625, "probability": 0.5},
            ],
        },
        {"file": "quiet.wav", "duration": 4.0, "events": []},
    ]
    assert json.loads(format_events([STREET, QUIET], "json")) == plain
    assert [json.loads(line) for line in format_events([STREET, QUIET], "jsonl").splitlines()] == plain
    assert json.loads(format_events([Detections("ü.wav", None, [])], "json"))[0]["duration"] is None
    assert "ü.wav" in format_events([Detections("ü.wav", None, [])], "json")


def test_raven_of_one_recording_names_no_file_and_several_lie_end_to_end():
    assert "Begin File" not in format_events([STREET], "raven")
    second = Detections("b.wav", 3.0, [Event("cat", 1, 2)])
    row = format_events([STREET, second], "raven").splitlines()[-1].split("\t")
    assert (row[0], row[3], row[4], row[-2], row[-1]) == ("3", "13.500000", "14.500000", "b.wav", "1.000000")
    with pytest.raises(UsageError, match=r"b.wav.*duration.*--out DIR"):
        format_events([STREET, Detections("b.wav", None, [])], "raven")


def test_textgrid_of_overlapping_events_and_of_nothing():
    overlapping = Detections("a", 4.0, [Event("dog", 0, 2), Event("dog", 1, 3), Event("dog", 2, 4)])
    text = format_events([overlapping], "textgrid")
    assert text.count('name = "dog"') == 2
    assert parse_events(text, "textgrid", name="a.TextGrid") == [overlapping]
    for nothing in (Detections("a", 4.0, []), Detections("a", None, [])):
        text = format_events([nothing], "textgrid")
        assert "intervals: size = 1" in text
        assert parse_events(text, "textgrid", name="a.TextGrid")[0].events == []


# --- round trips ---------------------------------------------------------------------------------

# Surrogates are no text, and an empty label is refused by most formats (see below).
LABELS = st.text(min_size=1, max_size=12).filter(lambda label: label.strip())
FILES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp", "Zs"]), min_size=1, max_size=12)
TIMES = st.floats(0, 1e5) | st.floats(0, 0.01) | st.integers(0, 3).map(float)


@st.composite
def an_event(draw):
    onset, offset = sorted((draw(TIMES), draw(TIMES)))
    if onset == offset:
        offset = onset + draw(st.sampled_from([1e-7, 0.0004, 1.0]))
    return Event(draw(LABELS), onset, offset, draw(st.floats(0, 1)))


RECORDINGS = st.lists(
    st.builds(Detections, FILES, st.floats(0, 1e5), st.lists(an_event(), max_size=5)),
    max_size=3,
    unique_by=lambda item: item.file,
)


def close(read, written, seconds):
    """Assert that events are equal to within ``seconds``, ignoring probabilities."""
    assert len(read) == len(written)
    for ours, original in zip(read, written, strict=True):
        assert abs(ours.onset - original.onset) <= seconds + 1e-9
        assert abs(ours.offset - original.offset) <= seconds + 1e-9


@settings(max_examples=100, deadline=None)
@given(RECORDINGS)
def test_exact_formats_return_what_was_written(items):
    for name in ("json", "jsonl"):
        assert parse_events(format_events(items, name), name, name="x") == items
    without = [Detections(item.file, None, item.events) for item in items]
    assert parse_events(format_events(items, "csv"), "csv", name="x") == without
    # The standard library's reader agrees with our quoting.
    rows = list(csv.reader(io.StringIO(format_events(items, "csv"), newline="")))
    assert [row[3] for row in rows[1:]] == [
        label for item in items for label in ([e.event_label for e in item.events] or [""])
    ]


@settings(max_examples=100, deadline=None)
@given(RECORDINGS)
def test_tables_of_several_recordings_return_to_a_millisecond(items):
    read = parse_events(format_events(items, "tsv"), "tsv", name="x")
    assert [item.file for item in read] == [item.file for item in items]
    for ours, original in zip(read, items, strict=True):
        close(ours.events, original.events, 1e-3)
    read = parse_events(format_events(items, "raven"), "raven", name="x")
    audible = [item for item in items if item.events]
    if len(items) > 1 and audible:
        assert [item.file for item in read] == [item.file for item in audible]
        for ours, original in zip(read, audible, strict=True):
            close(ours.events, original.events, 2e-6)
            probabilities = [e.probability for e in original.events]
            assert [e.probability for e in ours.events] == pytest.approx(probabilities, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(an_event(), max_size=5))
def test_formats_of_one_recording_return_what_was_written(events):
    item = Detections("street", 10.0, events)
    for name, ending, seconds in (("audacity", ".txt", 1e-6), ("webvtt", ".vtt", 1e-3), ("raven", ".raven.txt", 1e-6)):
        (read,) = parse_events(format_events([item], name), name, name=f"folder/street{ending}")
        assert read.file == "street"
        close(read.events, events, seconds)
        expected = [" ".join(e.event_label.splitlines()) for e in events]
        if all(label.isprintable() and label == label.strip() for label in expected):
            assert [e.event_label for e in read.events] == expected
    (read,) = parse_events(format_events([item], "textgrid"), "textgrid", name="street.TextGrid")
    assert read.duration >= 10.0
    for label in {e.event_label for e in events}:
        ours, original = ([e for e in side if e.event_label == label] for side in (read.events, events))
        ours, original = (sorted(side, key=lambda e: (round(e.onset, 6), e.offset)) for side in (ours, original))
        close(ours, original, 1e-6)
    assert len(read.events) == len(events)


NASTY = ["tab\there", "two\nlines", "mac\rline", 'say "hi"', "a, b", "ünï 日本 🐕", "a --> b", "<b>&amp;", "\\x", "nan"]


@pytest.mark.parametrize("label", NASTY)
@pytest.mark.parametrize("name", READABLE)
def test_labels(name, label, tmp_path):
    """Every label survives, through a file; line-based formats turn breaks into spaces."""
    path = tmp_path / f"x{FORMATS[name].endings[0]}"
    write_atomic(path, format_events([Detections("x", 5.0, [Event(label, 1, 2)])], name))
    (item,) = read_events(path)
    keeps = name in ("csv", "json", "jsonl", "textgrid")
    spaced = label.replace("\t", " ").replace("\n", " ").replace("\r", " ")
    assert [e.event_label for e in item.events] == [label if keeps else spaced]


@pytest.mark.parametrize("name", READABLE)
@pytest.mark.parametrize("span", [(0.0, 1e-9), (0.0006, 0.0007), (0.0014, 0.00149), (7.4999999, 7.5), (2, 2.00000001)])
def test_no_event_vanishes(name, span):
    (item,) = parse_events(format_events([Detections("x", 9.0, [Event("click", *span)])], name), name, name="x.tsv")
    close(item.events, [Event("click", *span)], 1e-3)


# --- what others write ---------------------------------------------------------------------------


def test_desed_tables():
    """Ground truth with event-free files, and predictions with an extra column and another order."""
    folder = shared("data", "metrics", "dcase_baseline")
    truth = read_events(folder / "validation.tsv")
    assert len(truth) == 1168
    assert sum(not item.events for item in truth) == 15
    assert sum(len(item.events) for item in truth) == 4239 - 15
    found = read_events(folder / "student" / "predictions0.5.csv")
    assert sum(len(item.events) for item in found) == 3312
    assert found[0].events[0] == Event("Vacuum_cleaner", 0.0, 9.984)


def test_tsv_variants():
    text = (
        "\ufeffonset\toffset\tfilename\tevent_label\textra\r\n"
        '0.1\t0.2\ta.wav\tDog \tx\r\n\r\n\t\tb.wav\t\t\r\nnan\tNaN\tc.wav\tnan\r\n1e0\t2\ta.wav\t"Cat\r\n'
    )
    assert parse_events(text, "tsv", name="x") == [
        Detections("a.wav", None, [Event("Dog", 0.1, 0.2), Event('"Cat', 1, 2)]),
        Detections("b.wav", None, []),
        Detections("c.wav", None, []),
    ]
    assert parse_events(TSV_HEAD + "a.wav\n", "tsv", name="x") == [Detections("a.wav", None, [])]


def test_audacity_with_frequencies_and_crlf():
    text = "0.5\t1\tDog bark\r\n\\\t100.0\t2000.0\r\n2\t3\tA\tB\r\n"
    assert parse_events(text, "audacity", name="C:\\x\\street.wav.TXT") == [
        Detections("street.wav", None, [Event("Dog bark", 0.5, 1), Event("A\tB", 2, 3)])
    ]


def test_raven_views_and_birdnet_columns():
    header = "Selection\tView\tBegin Time (s)\tEnd Time (s)\tSpecies\tConfidence\n"
    text = header + "1\tWaveform 1\t1\t2\tWren\t0.75\n1\tSpectrogram 1\t1\t2\tWren\t0.75\n"
    assert parse_events(text, "raven", name="a.selections.txt") == [Detections("a", None, [Event("Wren", 1, 2, 0.75)])]
    assert parse_events(header, "raven", name="a.raven.txt") == [Detections("a", None, [])]


def test_webvtt_with_notes_names_styles_and_tags():
    text = (
        "\ufeffWEBVTT - title\r\n\r\nNOTE made by hand\r\n\r\n7\r\n00:01.000 --> 00:02.500 align:start\r\n"
        "<v Bob>Rain &amp;\r\nwind</v>\r\n\r\n100:00:00.000 --> 100:00:01.000\r\nDog"
    )
    assert parse_events(text, "webvtt", name="x.vtt")[0].events == [
        Event("Rain & wind", 1.0, 2.5),
        Event("Dog", 360000.0, 360001.0),
    ]


def test_short_textgrid_with_points_and_utf16(tmp_path):
    text = (
        'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n3.5\n<exists>\n2\n"IntervalTier"\n"a"\n0\n3.5\n2\n'
        '0\n1\n"Dog"\n1\n3.5\n"  "\n"TextTier"\n"b"\n0\n3.5\n1\n2\n"click"\n'
    )
    expected = [Detections("a", 3.5, [Event("Dog", 0, 1)])]
    assert parse_events(text, "textgrid", name="a.TextGrid") == expected
    (tmp_path / "a.TextGrid").write_bytes(text.encode("utf-16"))
    assert read_events(tmp_path / "a.TextGrid") == expected
    absent = 'File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\nxmax = 2\ntiers? <absent>\n'
    assert parse_events(absent, "textgrid", name="a.TextGrid") == [Detections("a", 2.0, [])]


def test_same_events_as_praatio(tmp_path):
    textgrid = pytest.importorskip("praatio.textgrid")
    path = tmp_path / "a.TextGrid"
    item = Detections("a", 9.0, [Event('say "hi"', 0.5, 1.25), Event("dog", 2, 3), Event("dog", 4, 5)])
    write_atomic(path, format_events([item], "textgrid"))
    read = textgrid.openTextgrid(str(path), includeEmptyIntervals=False)
    assert [tuple(entry) for entry in read.getTier("dog").entries] == [(2, 3, "dog"), (4, 5, "dog")]
    assert [tuple(entry) for entry in read.getTier('say "hi"').entries] == [(0.5, 1.25, 'say "hi"')]
    assert read.maxTimestamp == 9


def test_same_cues_as_webvtt_py():
    webvtt = pytest.importorskip("webvtt")
    item = Detections("a", 9.0, [Event("R&B <live>", 0.5, 1.25), Event("dog", 3600, 3601)])
    captions = webvtt.from_string(format_events([item], "webvtt")).captions
    assert [(c.start, c.end) for c in captions] == [("00:00:00.500", "00:00:01.250"), ("01:00:00.000", "01:00:01.000")]


# --- what is refused -----------------------------------------------------------------------------

GRID_HEAD = '"ooTextFile"\n"TextGrid"\n0\n3\n<exists>\n1\n'


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tsv", "", ["x.in: the table is empty", "filename, onset, offset, event_label", "tabs"]),
        ("tsv", "a.wav\t0\t1\tdog\n", ["line 1:", "header lacks filename, onset", "a.wav", "columns filename"]),
        ("tsv", TSV_HEAD + "a.wav\t0\t1\tdog\nb\tzero\t1\tdog\n", ["x.in: line 3:", "'zero'", "b\\tzero", "tabs"]),
        ("tsv", TSV_HEAD + "a.wav\t0\tinf\tdog\n", ["line 2:", "inf"]),
        ("tsv", TSV_HEAD + "a.wav\t2\t1\tdog\n", ["line 2:", "onset < offset"]),
        ("tsv", TSV_HEAD + "a.wav\t-1\t1\tdog\n", ["line 2:", "onset < offset"]),
        ("tsv", TSV_HEAD + "a.wav\t1\t2\t\n", ["line 2:", "label is missing"]),
        ("tsv", TSV_HEAD + "a.wav\t\t2\tdog\n", ["line 2:", "''"]),
        ("tsv", TSV_HEAD + "\t1\t2\tdog\n", ["line 2:", "filename is missing"]),
        ("tsv", TSV_HEAD + "a.wav\t1\t2\tdog\tmore\n", ["line 2:", "5 cells under 4 columns"]),
        ("csv", "filename,onset,offset\n", ["line 1:", "event_label", "commas"]),
        ("csv", 'filename,onset,offset,event_label\n"a\n.wav",0,1,dog\na,0,1,"b', ["line 4:", 'a,0,1,"b']),
        ("csv", "filename,onset,offset,event_label,probability\na,0,1,b,1.5\n", ["line 2:", "1.5"]),
        ("json", "[\n{]", ["line 2:", "'{]'", '"events"']),
        ("json", '{"file": "a"}', ["got dict", "a list of"]),
        ("json", '[{"duration": 1, "events": []}]', ["x.in: entry 1", '"file" is missing']),
        ("json", '[{"file": "a", "duration": true, "events": []}]', ['"duration" is True']),
        ("json", '[{"file": "a", "duration": Infinity, "events": []}]', ['"duration" is inf']),
        ("json", '[{"file": "a", "duration": 1' + "0" * 400 + ', "events": []}]', ['"duration" is 1000']),
        ("json", '[{"file": "a"}]', ['"events" is missing']),
        ("json", '[{"file": "a", "events": [{"onset": 1}]}]', ["event 1", "event_label"]),
        ("json", '[{"file": "a", "events": [{"event_label": "b", "onset": "1", "offset": 2}]}]', ["onset '1'"]),
        ("json", '[{"file": "a", "events": [{"event_label": "b", "onset": NaN, "offset": 2}]}]', ["onset nan"]),
        ("json", '[{"file": "a", "events": [{"event_label": "b", "onset": 3, "offset": 2}]}]', ["onset < offset"]),
        ("json", "[" * 100_000, ["cannot be read as JSON"]),
        ("jsonl", '{"file": "a", "events": []}\n{"file"\n', ["line 2:", "'{\"file\"'"]),
        ("jsonl", '{"file": "a", "events": []}\n3\n', ["line 2:", "got int"]),
        ("audacity", "0\t1\tdog\n0 1 cat\n", ["line 2:", "1 columns", "0 1 cat", "separated by tabs"]),
        ("audacity", "1\t1\tpoint\n", ["line 1:", "onset < offset", "point"]),
        ("raven", "Selection\n", ["line 1:", "Begin Time (s), End Time (s)"]),
        ("raven", "Begin Time (s)\tEnd Time (s)\n1\t2\n", ["line 2:", "no column of labels", "Event Label"]),
        ("webvtt", "00:01.000 --> 00:02.000\nDog\n", ["line 1:", "'WEBVTT'"]),
        ("webvtt", "WEBVTT\n\n0:1 --> 00:02.000\nDog\n", ["line 3:", "no valid times", "HH:MM:SS.mmm"]),
        ("webvtt", "WEBVTT\n\n00:01.000 --> 00:02.000\n\n", ["line 3:", "label is missing"]),
        ("textgrid", "", ["line 1:", "ends before ooTextFile"]),
        ("textgrid", '"ooTextFile"\n"Pitch"\n', ["line 2:", "'Pitch' instead of 'TextGrid'"]),
        ("textgrid", GRID_HEAD + '"IntervalTier"\n"a"\n0\n3\n1\n0\n"Dog"\n', ["line 13:", "no xmax"]),
        ("textgrid", GRID_HEAD + '"IntervalTier"\n"a"\n0\n3\n999999999\n0\n1\n"Dog"\n', ["ends before xmin"]),
        ("textgrid", GRID_HEAD + '"IntervalTier"\n"a"\n0\n3\n1\n2\n1\n"Dog"\n', ["line 12:", "onset < offset"]),
        ("textgrid", GRID_HEAD + '"Formant"\n"a"\n0\n3\n1\n2\n1\n"Dog"\n', ["unknown class of tier 'Formant'"]),
        ("textgrid", GRID_HEAD + '"IntervalTier"\n"a"\n0\n3\n1.2.3\n', ["line 11:", "'1.2.3'"]),
    ],
)
def test_malformed_text_is_named(name, text, words):
    with pytest.raises(DataError) as caught:
        parse_events(text, name, name="x.in")
    message = str(caught.value)
    for word in ["x.in", "expected", *words]:
        assert word in message, message
    assert "\n" not in message


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(READABLE), st.text("0123456789.-\t,\n\"'{}[]:>WEBVTTxab \r\\", max_size=60), st.integers(0, 400))
def test_damaged_text_is_read_or_refused(name, junk, at):
    """Whatever the text, a reader returns recordings or raises DataError."""
    text = format_events([STREET], name)
    damaged = text[: at % (len(text) + 1)] + junk + text[at % (len(text) + 1) :][len(junk) :]
    try:
        assert isinstance(parse_events(damaged, name, name="x"), list)
    except DataError as error:
        assert "x" in str(error)


def test_usage_errors():
    for name in ("audacity", "webvtt", "textgrid"):
        with pytest.raises(UsageError, match=f"{name} holds one recording, got 2; .*--out DIR"):
            format_events([STREET, QUIET], name)
        assert isinstance(format_events([], name), str)
    with pytest.raises(UsageError, match="did you mean 'audacity'"):
        format_events([STREET], "audacty")
    with pytest.raises(UsageError, match="for people"):
        parse_events("", "table", name="x")
    with pytest.raises(DataError, match=r"street.wav: an event has an empty label.*tsv"):
        format_events([Detections("street.wav", None, [Event(" \t", 0, 1)])], "tsv")
    assert parse_events(format_events([Detections("x", None, [Event("", 0, 1)])], "json"), "json", name="x")


def test_format_by_ending():
    endings = {
        "a.tsv": "tsv",
        "a.csv": "csv",
        "a.JSON": "json",
        "a.jsonl": "jsonl",
        "d.ir/a.txt": "audacity",
        "a.selections.txt": "raven",
        "a.raven.txt": "raven",
        "a.vtt": "webvtt",
        "a.TextGrid": "textgrid",
        "a.textgrid": "textgrid",
    }
    assert {path: format_for_path(path) for path in endings} == endings
    with pytest.raises(UsageError, match=r"a\.jsn.*did you mean '\.json'"):
        format_for_path("a.jsn")
    with pytest.raises(UsageError, match=r"folder.*known: \.tsv"):
        format_for_path("folder")


def test_table_cannot_command_the_terminal():
    text = format_events([Detections("a\x1b[2J.wav", None, [Event("x\x1b]0;pwned\x07", 0, 1)])], "table")
    assert "\x1b" not in text
    assert "\x07" not in text


def test_unreadable_files(tmp_path):
    with pytest.raises(DataError, match=r"missing\.tsv: cannot be read \(No such file"):
        read_events(tmp_path / "missing.tsv")
    (tmp_path / "binary.tsv").write_bytes(b"RIFF\xff\x00")
    with pytest.raises(DataError, match=r"binary\.tsv: no text in UTF-8 \(at byte 4\)"):
        read_events(tmp_path / "binary.tsv")


# --- tags ----------------------------------------------------------------------------------------


def test_tags():
    items = [Tags("a,b.wav", 2.0, [Tag("Dog", 0.75), Tag('"x"', 0.1)]), Tags("quiet.wav", None, [])]
    assert format_tags(items, "csv") == (
        'filename,label,probability\n"a,b.wav",Dog,0.75\n"a,b.wav","""x""",0.1\nquiet.wav,,\n'
    )
    assert json.loads(format_tags(items, "json")) == [
        {
            "file": "a,b.wav",
            "duration": 2.0,
            "tags": [{"label": "Dog", "probability": 0.75}, {"label": '"x"', "probability": 0.1}],
        },
        {"file": "quiet.wav", "duration": None, "tags": []},
    ]
    assert format_tags(items, "table") == (
        "file       label      probability\n"
        "a,b.wav    Dog              0.750\n"
        'a,b.wav    "x"              0.100\n'
        "quiet.wav  (no tags)            -\n"
    )
    with pytest.raises(UsageError, match="did you mean 'json'"):
        format_tags(items, "jsn")


# --- writing -------------------------------------------------------------------------------------


def test_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "out.tsv"
    write_atomic(path, "ü\r\n")
    assert path.read_bytes() == b"\xc3\xbc\r\n"
    path.chmod(0o640)
    write_atomic(str(path), b"\x00")
    assert path.read_bytes() == b"\x00"
    assert path.stat().st_mode & 0o777 == 0o640
    link = tmp_path / "link.tsv"
    link.symlink_to(path)
    write_atomic(link, "new")
    assert link.is_symlink()
    assert path.read_text() == "new"
    # An undecodable file name reaches JSON as a surrogate; the escape reads back as the same.
    write_atomic(path, format_events([Detections("\udc80.wav", None, [])], "json"))
    assert read_events(path, "json") == [Detections("\udc80.wav", None, [])]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.tsv", "out.tsv"]


def test_write_errors_name_path_reason_and_remedy(tmp_path):
    (tmp_path / "file").write_text("kept")
    for path, words in (
        (tmp_path / "no" / "out.tsv", "does not exist; create it"),
        (tmp_path / "file" / "out.tsv", "is not a folder; choose another"),
        (tmp_path, "it is a folder; give the name of a file"),
        (tmp_path / ("x" * 300), "too long; choose another path"),
    ):
        with pytest.raises(OutputError, match=words) as caught:
            write_atomic(path, "data")
        assert str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize(("code", "words"), [("ENOSPC", "disk is full; free some"), ("EROFS", "read-only; choose")])
def test_a_failure_on_the_way_leaves_the_old_file(tmp_path, monkeypatch, step, code, words):
    path = tmp_path / "out.tsv"
    path.write_text("old")
    number = getattr(errno, code)

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OutputError, match=words):
        write_atomic(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["out.tsv"]
    assert path.read_text() == "old"

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["out.tsv"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_no_permission(tmp_path):
    locked = tmp_path / "locked.tsv"
    locked.write_text("old")
    locked.chmod(0o444)
    with pytest.raises(OutputError, match="no permission"):
        write_atomic(locked, "new")
    assert locked.read_text() == "old"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_are_written_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(path, "data")
    assert os.read(reader, 10) == b"data"
    os.close(reader)
    assert path.is_fifo()
