"""``htsat score``: published figures, forms of tables, and what is wrong with them."""

import json

import numpy as np
import pytest
from shared_data import shared

HEADER = "filename\tonset\toffset\tevent_label\n"
TRUTH = HEADER + "a.wav\t0\t1\tdog\na.wav\t2\t3\tcat\nb.wav\t0\t1\tdog\nquiet.wav\t\t\t\n"
FOUND = HEADER + "a.wav\t0\t1\tdog\nb.wav\t5\t6\tdog\nb.wav\t7\t8\tcat\n"


@pytest.fixture
def score(command, tmp_path):
    """Write texts to tables and score them: returns (exit code, JSON or text, stderr lines)."""

    def run(reference=TRUTH, estimated=FOUND, *options, names=("ref.tsv", "est.tsv"), json_wanted=True, **others):
        paths = []
        for name, text in zip((*names, *others), (reference, estimated, *others.values()), strict=True):
            path = tmp_path / name.replace("__", ".")
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
            paths.append(path)
        options = [str(option).replace("DIR", str(tmp_path)) for option in options]
        code, out, err = command("score", *paths[:2], *options, *(["--json"] if json_wanted else []), model=None)
        err = [line.replace(f"{tmp_path}/", "") for line in err]
        return code, json.loads(out) if json_wanted and out else out, err

    return run


# --- figures -------------------------------------------------------------------------------------


def test_the_figures_of_the_paper(command):
    folder = shared("data", "metrics", "htsat_desed")
    code, out, _ = command("score", folder / "answer.tsv", folder / "htsat-test_outputmap.tsv", "--json", model=None)
    assert code == 0
    found, expected = json.loads(out), json.loads((folder / "expected.json").read_text())
    truth = expected["intersection_dtc0.5_gtc0.5"]
    assert 100 * found["intersection"]["macro_f1"] == pytest.approx(truth["macro"], abs=1e-9)
    for label, f1 in truth["F"].items():
        one = found["intersection"]["per_class"][label]
        assert 100 * one["f1"] == pytest.approx(f1, abs=1e-9)
        assert [one["tp"], one["fp"], one["fn"]] == truth["counts"][label]
    truth, event_based = expected["collar_200ms_20pct"], found["event_based"]
    values = [event_based["macro_f1"], event_based["micro_f1"], event_based["overall"]["error_rate"] / 100]
    assert [100 * v for v in values] == pytest.approx([truth["macro"], truth["micro"], truth["ER"]], abs=1e-9)
    for label, one in event_based["per_class"].items():
        values = truth["classes"][label]
        assert [one["tp"], one["fp"], one["fn"]] == [values["Ntp"], values["Nfp"], values["Nfn"]]
        assert 100 * one["f1"] == pytest.approx(values["F"], abs=1e-9)
    truth, segment_based = expected["segment_1s"], found["segment_based"]
    assert 100 * segment_based["macro_f1"] == pytest.approx(truth["macro"], abs=1e-9)
    assert 100 * segment_based["micro_f1"] == pytest.approx(truth["micro"], abs=1e-9)
    for label, f1 in truth["classes"].items():
        assert 100 * segment_based["per_class"][label]["f1"] == pytest.approx(f1, abs=1e-9)


def test_the_figures_of_the_dcase_baseline(command, tmp_path):
    folder = shared("data", "metrics", "dcase_baseline")
    options = ["--durations", folder / "validation_durations.tsv"]
    options += ["--operating-points", folder / "student" / "predictions_operating_points", "--per-class"]
    paths = folder / "validation.tsv", folder / "student" / "predictions0.5.csv"
    code, out, err = command("score", *paths, *options, "--out", tmp_path / "scores.json", model=None)
    assert code == 0
    lines = {line.split("  ")[0]: line.split() for line in out.splitlines() if line}
    assert "0.6374" in lines["intersection-based F1 (DTC = GTC = 0.5), macro"]
    assert "0.3987" in lines["event-based F1 (200 ms collars, 20 %), macro"]
    # Error, deletion, insertion and substitution rates as sed_eval printed them.
    line = lines["event-based F1 (200 ms collars, 20 %), micro"]
    assert [round(float(v), 2) for v in line[-4:]] == [1.03, 0.61, 0.39, 0.02]
    line = lines["segment-based F1 (1 s), micro"]
    assert [round(float(v), 2) for v in line[-4:]] == [0.38, 0.20, 0.09, 0.09]
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["psds"]["psds1"]["value"] == pytest.approx(0.334469, abs=5e-7)
    assert found["psds"]["psds2"]["value"] == pytest.approx(0.528100, abs=5e-7)
    figures = [found[name][kind] for name in ("event_based", "segment_based") for kind in ("macro_f1", "micro_f1")]
    assert [round(100 * f1, 4) for f1 in figures] == [39.8728, 40.9501, 69.3526, 75.4658]
    assert any("beyond the end of the file" in line for line in err)


def test_what_is_printed(score):
    code, out, err = score(TRUTH, FOUND, "--per-class", json_wanted=False)
    assert code == 0 and err == []
    assert "reference " in out and "3 files, 3 events" in out
    assert "event-based F1 (200 ms collars, 20 %), macro" in out and "\nevent F1" not in out
    # dog: one of two found, one false alarm; cat: missed, one false alarm.
    line = next(line for line in out.splitlines() if line.startswith("intersection-based F1 (DTC = GTC = 0.5), macro"))
    assert line.split()[-7:] == ["0.2500", "0.2500", "0.2500", "1.5000", "0.7500", "0.7500", "-"]
    names = ["--dtc", 0.7, "--gtc", 0.3, "--offset-collar", 0.5, "--offset-collar-rate", 0.5, "--segment", 0.1]
    out = score(TRUTH, FOUND, *names, json_wanted=False)[1]
    for title in ("DTC 0.7, GTC 0.3", "collars of 200 ms and 500 ms, 50 %", "segment-based F1 (0.1 s)"):
        assert title in out


def test_options(score):
    code, values, _ = score(TRUTH, FOUND, "--bootstrap", 200, "--seed", 3)
    low, high = values["event_based"]["macro_f1_interval"]
    assert code == 0 and low < values["event_based"]["macro_f1"] < high
    assert values["event_based"]["micro_f1_interval"][1] > 0
    assert score(TRUTH, FOUND, "--bootstrap", 200, "--seed", 3)[1] == values
    values = score(TRUTH, FOUND, "--labels", "dog")[1]
    assert values["intersection"]["per_class"].keys() == {"dog"} and values["intersection"]["macro_f1"] == 0.5
    moved = FOUND.replace("a.wav\t0\t1", "a.wav\t0.3\t1")
    assert score(TRUTH, moved)[1]["event_based"]["micro_f1"] == 0
    assert score(TRUTH, moved, "--onset-collar", 0.4)[1]["event_based"]["micro_f1"] == pytest.approx(1 / 3)
    durations = "filename\tduration\na.wav\t3\nb.wav\t3\nquiet.wav\t3\nsilent.wav\t3\n"
    code, values, err = score(TRUTH, FOUND, "--durations", "DIR/d.tsv", d__tsv=durations)
    assert values["segment_based"]["overall"]["fp"] == 2 and values["clips"] == 4
    assert len(err) == 1 and "est.tsv: 2 events beyond the end of the file" in err[0]
    assert "line 3 (b.wav) ends at 6 of 3 s" in err[0]
    values = score(TRUTH, FOUND, "--durations", "DIR/d.tsv", "--cut", d__tsv=durations)[1]
    assert values["segment_based"]["overall"]["fp"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--operating-points", "DIR"], "--operating-points needs the lengths of the recordings: give --durations"),
        (["--cut"], "--cut needs"),
        (["--dtc", "0"], "dtc must be above 0"),
        (["--gtc", "nan"], "gtc must be"),
        (["--onset-collar", "-1"], "onset_collar must be 0 or more"),
        (["--segment", "0"], "segment_seconds must be above 0"),
        (["--bootstrap", "-1"], "--bootstrap"),
    ],
)
def test_wrong_usage(score, options, words):
    code, out, err = score(TRUTH, FOUND, *options)
    assert (code, out) == (2, "") and len(err) == 1 and words in err[0]


# --- forms of tables -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        FOUND.replace("\n", "\r\n"),
        "\ufeff" + FOUND,
        FOUND.encode("utf-16"),
        FOUND.replace("\t", ","),
        FOUND.replace("\t", ";"),
        FOUND.removeprefix(HEADER),
        FOUND.rstrip("\n") + "\n\n  \n",
        "\t".join(HEADER.split()) + "\n" + "".join(f'"{r[0]}"\t{r[1]}\t{r[2]}\t"{r[3]}"\n' for r in
            [line.split("\t") for line in FOUND.splitlines()[1:]]),
        ",event_label,onset,offset,filename,probability\n"
        "0,dog,0,1,a.wav,0.9\n1,dog,5.0,6e0,b.wav,0.8\n2, cat ,7,8, b.wav,\n",
        FOUND + "nothing.wav\t\t\t\nnothing.wav\tnan\tnan\tnan\nshort.wav\n",
        FOUND.replace("\n", "\t\t\n"),
    ],
)  # fmt: skip
def test_forms(score, text):
    code, values, err = score(TRUTH, text)
    assert code == 0 and err == []
    expected = score(TRUTH, FOUND)[1]
    assert {k: v for k, v in values.items() if k != "clips"} == {k: v for k, v in expected.items() if k != "clips"}


def test_other_formats(score):
    events = [{"event_label": "dog", "onset": 0, "offset": 1, "probability": 1}]
    found = json.dumps([{"file": "a.wav", "duration": 3, "events": events}])
    code, values, _ = score(TRUTH, found, names=("ref.tsv", "est.json"))
    assert code == 0 and values["event_based"]["overall"]["tp"] == 1
    assert score(TRUTH, FOUND.removeprefix(HEADER), names=("ref.tsv", "est.txt"))[0] == 0
    assert score(TRUTH, FOUND, names=("ref.tsv", "predictions_0.5"))[0] == 0


def test_a_quotation_mark_in_a_label(score):
    text = TRUTH.replace("cat", '"cat')
    values = score(text, text)[1]
    assert values["event_based"]["per_class"].keys() == {'"cat', "dog"} and values["event_based"]["macro_f1"] == 1


# --- what is wrong with tables -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "est.tsv: the file is empty; expected a header with filename, onset"),
        ("\n \n", "the file is empty"),
        (FOUND.replace("onset", "start"), "no column 'onset'; rename 'start'; found 'filename', 'start'"),
        (FOUND.replace("event_label", "labels"), "no column 'event_label'; did you mean 'labels'?"),
        (FOUND.replace("onset", "Onset"), "no column 'onset'; rename 'Onset'"),
        ("filename\tevent_label\na.wav\tdog\n", "no column 'onset'; no column 'offset'"),
        ("0.5\t1.5\tdog\n", "expected a header with filename, onset, offset, event_label"),
        (HEADER + "a.wav\t3\t2\tdog\n", "line 2 (a.wav): onset 3 is after offset 2; swap them"),
        (HEADER + "a.wav\t-1\t2\tdog\n", "line 2 (a.wav): onset -1 is negative"),
        (HEADER + "a.wav\tx\t2\tdog\n", "line 2 (a.wav): onset 'x' is not a number of seconds; write it like 1.25"),
        (HEADER + "a.wav\t0,5\t2\tdog\n", "onset '0,5' is not a number"),
        (HEADER + "a.wav\t0\tinf\tdog\n", "offset 'inf' is not a number"),
        (HEADER + "a.wav\t0\tnan\tdog\n", "'dog' has no offset"),
        (HEADER + "a.wav\t0\t1\t\n", "line 2 (a.wav): the event has no event_label"),
        (HEADER + "a.wav\t\t\tdog\n", "'dog' has no onset"),
        (HEADER + "\t0\t1\tdog\n", "line 2: the filename is missing"),
        (HEADER + "a.wav\t0\t1\tdog\t7\n", "line 2: 5 cells under 4 columns"),
        ('filename,onset,offset,event_label\n"a.wav,0,1,dog\n', "close the quotation mark"),
        (b"\xff\xfa\x00\x80", "no text in UTF-8"),
    ],
)
def test_bad_tables(score, text, words):
    for reference, estimated, name in ((TRUTH, text, "est.tsv"), (text, FOUND, "ref.tsv")):
        code, out, err = score(reference, estimated)
        assert (code, out) == (1, "") and len(err) == 1
        assert err[0].startswith(f"htsat: {name}: ") and words.removeprefix("est.tsv: ") in err[0]


def test_all_problems_are_told_at_once(score):
    rows = [f"{i}.wav\t{i + 1}\t{i}\tdog\n" for i in range(30)]
    code, _, err = score("".join([HEADER, *rows]), HEADER + "a.wav\t-1\t-1\tdog\nb.wav\tx\ty\tcat\n")
    assert code == 1 and len(err) == 2
    assert "ref.tsv: 30 problems: line 2 (0.wav): onset 1 is after offset 0" in err[0]
    assert "line 21 (19.wav)" in err[0] and "line 22" not in err[0] and "and 10 more" in err[0]
    assert "est.tsv: 3 problems: " in err[1] and "onset 'x'" in err[1] and "offset 'y'" in err[1]


def test_missing_files(score):
    code, _, err = score(TRUTH, FOUND, "--durations", "DIR/none.tsv", "--operating-points", "DIR/none")
    assert code == 1 and len(err) == 2
    assert "none.tsv: cannot be read" in err[0] and "none: there is no such folder" in err[1]


def test_bad_durations(score):
    options = ["--durations", "DIR/d.tsv"]
    text = "filename\tduration\na.wav\t-1\nb.wav\tx\nc.wav\t5\nc.wav\t6\nc.wav\t5\n"
    code, _, err = score(TRUTH, FOUND, *options, d__tsv=text)
    assert code == 1 and "d.tsv: 3 problems: line 2 (a.wav): duration -1 is not above 0; line 3" in err[0]
    assert "line 5 (c.wav): duration 6, but 5 in a row above" in err[0]
    code, _, err = score(TRUTH, FOUND, *options, d__tsv="filename\tlength\na.wav\t9\n")
    assert code == 1 and "no column 'duration'; rename 'length'" in err[0]


def test_psds_of_a_folder(score, tmp_path):
    folder = tmp_path / "points"
    folder.mkdir()
    options = ["--durations", "DIR/d.tsv", "--operating-points", "DIR/points"]
    durations = "filename\tduration\n" + "".join(f"{f}.wav\t9\n" for f in ("a", "b", "quiet"))
    code, _, err = score(TRUTH, FOUND, *options, d__tsv=durations)
    assert code == 1 and "points: holds no table" in err[0]
    (folder / "0.5.tsv").write_text(TRUTH)
    code, values, _ = score(TRUTH, FOUND, *options, d__tsv=durations)
    assert code == 0 and values["psds"]["operating_points"] == 1
    assert values["psds"]["psds1"] == {"value": 1, "per_class": {"cat": 1, "dog": 1}}
    out = score(TRUTH, FOUND, *options, "--per-class", d__tsv=durations, json_wanted=False)[1]
    assert "PSDS2 (DTC = GTC = 0.1, CTTC 0.3, alpha_ct 0.5, alpha_st 1, max. eFPR 100/h), 1 operating point " in out
    code, _, err = score(TRUTH, FOUND, *options, d__tsv=durations.replace("quiet.wav", "Quiet.wav"))
    assert code == 1 and "d.tsv: 1 of 4 files have no duration: 'quiet.wav'; did you mean 'Quiet.wav'?" in err[-1]
    (folder / "0.1.tsv").write_text(HEADER + "a.wav\t3\t2\tdog\n")
    code, _, err = score(TRUTH, FOUND, *options, d__tsv=durations)
    assert code == 1 and "points/0.1.tsv: line 2 (a.wav): onset 3 is after offset 2" in err[-1]


# --- oddities that the metrics have an answer to -------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (FOUND.replace("dog", "Dog"), ["est.tsv: labels that ref.tsv does not have", "'Dog'; did you mean 'dog'?"]),
        (FOUND + "c.wav\t0\t1\tdog\n", ["est.tsv: 1 file that ref.tsv does not have, scored as without events there"]),
        (FOUND.replace("a.wav", "a_wav"), ["'a_wav'; did you mean 'a.wav'?"]),
        (FOUND + "b.wav\t1\t1\tdog\n", ["est.tsv: 1 event without length left out: line 5 (b.wav)"]),
        (FOUND + "b.wav\t5\t6\tdog\n", ["1 event equal to another one, each scored on its own: line 5 (b.wav)"]),
        (FOUND + "b.wav\t5.5\t6.5\tdog\n", ["1 event overlapping another one of the class", "line 5 (b.wav)"]),
        (HEADER, ["est.tsv: there is no event, so that every reference event is missed"]),
    ],
)
def test_oddities_are_notes(score, text, words):
    code, values, err = score(TRUTH, text)
    assert code == 0 and 0 <= values["segment_based"]["micro_f1"] <= 1
    for word in words:
        assert any(line.startswith("htsat: note: ") and word in line for line in err), err


def test_labels_of_one_table_are_scored_by_definition(score):
    _, values, err = score(TRUTH, FOUND.replace("cat", "owl"))
    scores = values["event_based"]
    assert (scores["per_class"]["owl"]["fp"], scores["per_class"]["cat"]["fn"]) == (1, 1)
    # The owl is in no macro F1: dog 0.5, cat 0.
    assert scores["macro_f1"] == 0.25 and scores["overall"]["fp"] == 2
    assert scores["per_class"]["owl"]["error_rate"] is None
    assert values["classes_without_reference"] == ["owl"] and len(err) == 2
    _, values, err = score(TRUTH, FOUND, "--labels", "dgo", "--labels", "cat")
    assert "labels that neither table has: 'dgo'; did you mean 'dog'?" in err[0] and "not scored: 'dog'" in err[1]


def test_no_reference_event(score):
    code, values, err = score(HEADER, FOUND)
    assert code == 0 and "ref.tsv: there is no event, so that every F1 is 0" in err[0]
    assert values["intersection"]["macro_f1"] == 0 and values["event_based"]["overall"]["error_rate"] is None
    assert score(HEADER, HEADER, "--bootstrap", 10)[0] == 0
    assert score(HEADER, FOUND, "--bootstrap", 10)[1]["event_based"]["macro_f1_interval"] == [None, None]


def test_equal_and_overlapping_events_break_no_metric(score):
    text = HEADER + "a.wav\t0\t2\tdog\n" * 3 + "a.wav\t1\t3\tdog\na.wav\t0\t9\tdog\n"
    _, values, err = score(text, text)
    assert all(values[name]["macro_f1"] == 1 for name in ("intersection", "event_based", "segment_based"))
    assert sum("equal to another" in line for line in err) == 2


# --- against another system ----------------------------------------------------------------------


def test_a_system_is_as_good_as_itself(score):
    code, found, _ = score(TRUTH, FOUND, "--against", "DIR/other.tsv", other__tsv=FOUND)
    assert code == 0
    for both in found["difference"].values():
        for one in both.values():
            assert one == {"value": 0.0, "interval": [0.0, 0.0]}


def test_the_difference_is_that_of_the_scores(score):
    _, one, _ = score()
    _, perfect, _ = score(TRUTH, TRUTH)
    code, found, _ = score(TRUTH, FOUND, "--against", "DIR/other.tsv", other__tsv=TRUTH)
    assert code == 0
    for metric, both in found["difference"].items():
        for kind, difference in both.items():
            assert difference["value"] == pytest.approx(one[metric][kind] - perfect[metric][kind])
            assert difference["interval"][0] <= difference["value"] <= difference["interval"][1] <= 0


def test_a_small_advantage_in_every_file_is_told(score):
    """In forty files one system finds one event more: their own intervals overlap, that of the difference is clear."""
    rng = np.random.default_rng(0)
    truth, good, better = [], [], []
    for file in range(40):
        for number in range(10):
            row = f"{file}.wav\t{2 * number}\t{2 * number + 1}\tdog\n"
            truth.append(row)
            found = number < 1 or rng.random() < file / 40
            good += [row] * found
            better += [row] * (found or number == 9)
    texts = [HEADER + "".join(rows) for rows in (truth, better, good)]
    code, found, _ = score(texts[0], texts[1], "--against", "DIR/other.tsv", "--bootstrap", 500, other__tsv=texts[2])
    _, lower, _ = score(texts[0], texts[2], "--bootstrap", 500)
    assert code == 0
    assert found["event_based"]["macro_f1_interval"][0] < lower["event_based"]["macro_f1_interval"][1]
    assert found["difference"]["event_based"]["macro_f1"]["interval"][0] > 0
    _, table, _ = score(texts[0], texts[1], "--against", "DIR/other.tsv", json_wanted=False, other__tsv=texts[2])
    assert "higher than" in table and table.count(" higher\n") >= 2


def test_the_other_system_may_know_other_classes(score):
    other = FOUND + "a.wav\t4\t5\towl\n"
    code, found, _ = score(TRUTH, FOUND, "--against", "DIR/other.tsv", other__tsv=other)
    assert code == 0 and found["difference"]["event_based"]["macro_f1"]["value"] == 0
    assert found["difference"]["event_based"]["micro_f1"]["value"] == pytest.approx(2 / 6 - 2 / 7)


def test_the_other_system_may_know_other_files(score):
    other = HEADER + "c.wav\t0\t1\tdog\n"
    code, found, err = score(TRUTH, FOUND, "--against", "DIR/other.tsv", other__tsv=other)
    assert code == 0 and found["difference"]["event_based"]["micro_f1"]["value"] > 0
    assert any("c.wav" in line for line in err)
    code, _, err = score(TRUTH, FOUND, "--against", "DIR/none.tsv")
    assert code == 1 and "none.tsv" in err[0]
