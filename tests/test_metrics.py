"""Detection and tagging metrics: published figures, hand-worked cases, scikit-learn."""

import csv
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import shared

from htsat.events import Event
from htsat.metrics import tagging
from htsat.metrics.bootstrap import f1_intervals
from htsat.metrics.detection import (
    FileCounts,
    count_event_based,
    count_intersection_based,
    count_segment_based,
    event_based,
    intersection_based,
    segment_based,
    summarise,
)
from htsat.metrics.frames import frame_scores, rasterised


def events(*spans, label="dog"):
    """Return {"a.wav": events} from (onset, offset) pairs."""
    return {"a.wav": [Event(label, *span) for span in spans]}


def counts(scores, label="dog"):
    one = scores.per_class[label]
    return one.tp, one.fp, one.fn


def load(path, delimiter="\t"):
    """Read a DCASE table without the package's own reader."""
    table = {}
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream, delimiter=delimiter):
            file_events = table.setdefault(row["filename"], [])
            if row["onset"]:
                file_events.append(Event(row["event_label"], float(row["onset"]), float(row["offset"])))
    return table


@pytest.fixture(scope="module")
def desed():
    folder = shared("data", "metrics", "htsat_desed")
    expected = json.loads((folder / "expected.json").read_text())
    return load(folder / "answer.tsv"), load(folder / "htsat-test_outputmap.tsv"), expected


@pytest.fixture(scope="module")
def dcase():
    folder = shared("data", "metrics", "dcase_baseline")
    expected = json.loads((folder / "expected.json").read_text())
    return load(folder / "validation.tsv"), load(folder / "student" / "predictions0.5.csv", ","), expected


# --- published figures ---------------------------------------------------------------------------


def test_intersection_reproduces_the_paper(desed):
    reference, estimated, expected = desed
    expected = expected["intersection_dtc0.5_gtc0.5"]
    scores = intersection_based(reference, estimated)
    assert 100 * scores.macro_f1 == pytest.approx(expected["macro"], abs=1e-9)
    assert {label: list(counts(scores, label)) for label in scores.per_class} == expected["counts"]
    for label, f1 in expected["F"].items():
        assert 100 * scores.per_class[label].f1 == pytest.approx(f1, abs=1e-9)


def test_event_based_reproduces_sed_eval(desed):
    reference, estimated, expected = desed
    expected = expected["collar_200ms_20pct"]
    scores = event_based(reference, estimated)
    assert 100 * scores.macro_f1 == pytest.approx(expected["macro"], abs=1e-9)
    assert 100 * scores.micro_f1 == pytest.approx(expected["micro"], abs=1e-9)
    assert 100 * scores.overall.precision == pytest.approx(expected["microP"], abs=1e-9)
    assert 100 * scores.overall.recall == pytest.approx(expected["microR"], abs=1e-9)
    assert scores.per_class.keys() == expected["classes"].keys()
    for label, values in expected["classes"].items():
        one = scores.per_class[label]
        assert counts(scores, label) == (values["Ntp"], values["Nfp"], values["Nfn"])
        percent = [100 * value for value in (one.f1, one.precision, one.recall)]
        assert percent == pytest.approx([values[key] for key in "FPR"], abs=1e-9)


def test_segment_based_reproduces_sed_eval(desed):
    reference, estimated, expected = desed
    expected = expected["segment_1s"]
    scores = segment_based(reference, estimated)
    assert 100 * scores.macro_f1 == pytest.approx(expected["macro"], abs=1e-9)
    assert 100 * scores.micro_f1 == pytest.approx(expected["micro"], abs=1e-9)
    assert {k: 100 * v.f1 for k, v in scores.per_class.items()} == pytest.approx(expected["classes"], abs=1e-9)


def test_dcase_baseline(dcase):
    reference, estimated, expected = dcase
    collar = event_based(reference, estimated)
    assert 100 * collar.macro_f1 == pytest.approx(expected["collar_200ms_20pct"]["macro"], abs=5e-5)
    assert 100 * collar.micro_f1 == pytest.approx(expected["collar_200ms_20pct"]["micro"], abs=5e-5)
    segments = segment_based(reference, estimated)
    assert 100 * segments.macro_f1 == pytest.approx(expected["segment_1s"]["macro"], abs=1e-4)
    assert 100 * segments.micro_f1 == pytest.approx(expected["segment_1s"]["micro"], abs=1e-4)
    intersection = intersection_based(reference, estimated)
    assert 100 * intersection.macro_f1 == pytest.approx(expected["intersection_dtc0.5_gtc0.5_macro"], abs=5e-5)


# --- intersection-based --------------------------------------------------------------------------


def test_intersection_counts_parts_of_both_sides():
    # Half of the detection inside the reference event, half of the reference event inside the detection.
    assert counts(intersection_based(events((0, 2)), events((1, 3)))) == (1, 0, 0)
    assert counts(intersection_based(events((0, 2)), events((1.1, 3.1)))) == (0, 1, 1)
    # The detection lies within, but covers too little: neither a hit nor a false positive.
    assert counts(intersection_based(events((0, 10)), events((1, 2)))) == (0, 0, 1)
    # Several detections may cover one reference event together...
    assert counts(intersection_based(events((0, 10)), events((0, 3), (5, 8)))) == (1, 0, 0)
    # ...and one detection several reference events.
    assert counts(intersection_based(events((0, 3), (4, 8)), events((0, 8)))) == (2, 0, 0)
    # A detection that fails the detection criterion does not help to cover.
    assert counts(intersection_based(events((0, 4)), events((1, 20)))) == (0, 1, 1)


def test_intersection_criteria():
    reference, estimated = events((0, 10)), events((0, 7))
    assert counts(intersection_based(reference, estimated, gtc=0.7)) == (1, 0, 0)
    assert counts(intersection_based(reference, estimated, gtc=0.71)) == (0, 0, 1)
    assert counts(intersection_based(estimated, reference, dtc=0.71)) == (0, 1, 1)
    with pytest.raises(ValueError, match="dtc"):
        intersection_based(reference, estimated, dtc=0)


def test_overlapping_events_of_a_class_count_once():
    # Two overlapping detections cover 4 of 10 s, not 6.
    assert counts(intersection_based(events((0, 10)), events((0, 3), (1, 4)))) == (0, 0, 1)
    # A detection of 10 s holds 4 s of reference, though the two events together are longer than 5.
    assert counts(intersection_based(events((0, 3), (1, 4)), events((0, 10)))) == (0, 1, 2)
    # An event inside another one must not hide what the longer one covers.
    assert counts(intersection_based(events((0, 10), (1, 2), (3, 4)), events((5, 10)))) == (1, 0, 2)


# --- event-based ---------------------------------------------------------------------------------


def test_collars():
    reference = events((1, 2))
    assert counts(event_based(reference, events((1.15, 2.15)))) == (1, 0, 0)
    assert counts(event_based(reference, events((1.25, 2)))) == (0, 1, 1)
    assert counts(event_based(reference, events((1, 2.25)))) == (0, 1, 1)
    # A fifth of the reference event's length is more than 200 ms from one second on.
    assert counts(event_based(events((1, 6)), events((1, 6.9)))) == (1, 0, 0)
    assert counts(event_based(events((1, 6)), events((1, 7.1)))) == (0, 1, 1)
    # The length is that of the reference event: here the detection would grant itself 1.2 s.
    assert counts(event_based(events((1, 2)), events((1, 7)))) == (0, 1, 1)
    assert counts(event_based(reference, events((1.25, 2)), onset_collar=0.3)) == (1, 0, 0)
    assert counts(event_based(reference, events((1, 2.25)), offset_collar=0.3)) == (1, 0, 0)
    assert counts(event_based(events((1, 6)), events((1, 6.9)), offset_collar_rate=0.1)) == (0, 1, 1)
    # 0.25 is exact in float64: differences at the collar are hits.
    quarter = {"onset_collar": 0.25, "offset_collar": 0.25}
    assert counts(event_based(reference, events((1.25, 1.75)), **quarter)) == (1, 0, 0)
    with pytest.raises(ValueError, match="onset_collar"):
        event_based(reference, reference, onset_collar=-0.1)


def test_tie_at_the_collar_is_compared_as_float():
    # |7.488 - 7.688| is 0.2 or less in float64, a hit, as sed_eval has it.
    assert counts(event_based(events((7.688, 9)), events((7.488, 9)))) == (1, 0, 0)


def test_matching_is_optimal():
    # In the order of time the first detection would take the first reference event, leaving the
    # second detection (that fits only this one) without a partner.
    reference = events((1.0, 2.0), (1.2, 2.0))
    estimated = events((0.85, 2.0), (1.1, 2.0))
    assert counts(event_based(reference, estimated)) == (2, 0, 0)
    assert counts(event_based(estimated, reference)) == (2, 0, 0)
    # One detection cannot be two events.
    assert counts(event_based(reference, events((1.1, 2.0)))) == (1, 0, 1)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(1, 4)), max_size=5),
    st.lists(st.tuples(st.integers(0, 8), st.integers(1, 4)), max_size=5),
)
def test_matching_is_as_large_as_any(reference, estimated):
    """The matching equals the best one of all assignments, found by trying them."""
    reference = [(onset / 10, (onset + length) / 10) for onset, length in reference]
    estimated = [(onset / 10, (onset + length) / 10) for onset, length in estimated]

    def fits(i, j):
        return abs(reference[i][0] - estimated[j][0]) < 0.25 and abs(reference[i][1] - estimated[j][1]) < 0.25

    short, long = sorted((range(len(reference)), range(len(estimated))), key=len)
    swapped = len(reference) > len(estimated)
    best = max(
        sum(fits(j, i) if swapped else fits(i, j) for i, j in zip(short, chosen, strict=True))
        for chosen in itertools.permutations(long, len(short))
    )
    collars = {"onset_collar": 0.25, "offset_collar": 0.25, "offset_collar_rate": 0}
    scores = event_based(events(*reference), events(*estimated), **collars)
    assert scores.overall.tp == best
    assert (scores.overall.fp, scores.overall.fn) == (len(estimated) - best, len(reference) - best)


def test_a_long_chain_of_matches():
    # Every detection fits two neighbours and the last reference event finds its only partner taken: all
    # matches before it must move on by one.
    reference = [(0, 50 + 0.3 * i) for i in range(800)]
    estimated = [(1 - 1e-4 * i, 50 + 0.3 * i + 0.15) for i in range(-1, 799)]
    scores = event_based(events(*reference), events(*estimated), onset_collar=2, offset_collar_rate=0)
    assert counts(scores) == (800, 0, 0)


# --- segment-based -------------------------------------------------------------------------------


def test_segments():
    # Reference is active in segments 0 1 2, the detection in 2 3.
    scores = segment_based(events((0.5, 2.1)), events((2.9, 4.0)))
    assert counts(scores) == (1, 1, 2)
    assert scores.per_class["dog"].precision == 0.5
    assert scores.per_class["dog"].recall == pytest.approx(1 / 3)
    assert scores.per_class["dog"].f1 == pytest.approx(0.4)
    # Two events in one segment are one active segment.
    assert counts(segment_based(events((0.1, 0.2), (0.5, 0.6)), events((0.9, 1.0)))) == (1, 0, 0)
    # 0.3 / 0.1 is 2.9999999999999996, yet the event begins with the fourth segment.
    assert counts(segment_based(events((0.3, 0.4)), events((0.3, 0.4)), segment_seconds=0.1)) == (1, 0, 0)
    # So is 0.1 * 3 above 0.3: the event ends with the third segment.
    assert counts(segment_based(events((0, 0.3)), events((0, 0.1 * 3)), segment_seconds=0.1)) == (3, 0, 0)
    with pytest.raises(ValueError, match="segment_seconds"):
        segment_based(events(), events(), segment_seconds=0)


def test_segments_after_the_end_do_not_count():
    reference, estimated = events((8, 10)), events((8, 10.24))
    assert counts(segment_based(reference, estimated)) == (2, 1, 0)
    assert counts(segment_based(reference, estimated, durations={"a.wav": 10.0})) == (2, 0, 0)
    assert counts(segment_based(reference, estimated, durations={"b.wav": 10.0})) == (2, 1, 0)


# --- all three -----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [intersection_based, event_based, segment_based])
def test_averages_and_classes(metric):
    reference = {
        "a.wav": [Event("dog", 0, 1), Event("cat", 2, 3)],
        "b.wav": [Event("dog", 0, 1), Event("cow", 4, 5)],
        "quiet.wav": [],
    }
    estimated = {
        "a.wav": [Event("dog", 0, 1), Event("hen", 2, 3)],
        "b.wav": [Event("dog", 6, 7), Event("cow", 4, 5)],
        "unknown.wav": [Event("dog", 0, 1)],
    }
    scores = metric(reference, estimated)
    assert list(scores.per_class) == ["cat", "cow", "dog", "hen"]
    assert counts(scores, "cat") == (0, 0, 1)
    assert counts(scores, "cow") == (1, 0, 0)
    assert counts(scores, "dog") == (1, 2, 1)  # a hit of another file is no hit
    assert counts(scores, "hen") == (0, 1, 0)
    # cat 0 (missed), cow 1, dog 2 / 5; hen has no reference events and no part in the mean.
    assert scores.macro_f1 == pytest.approx((0 + 1 + 0.4) / 3)
    assert scores.micro_f1 == pytest.approx(2 * 2 / (2 * 2 + 3 + 2))
    assert (scores.overall.tp, scores.overall.fp, scores.overall.fn) == (2, 3, 2)

    some = metric(reference, estimated, labels=["dog", "cow", "owl"])
    assert list(some.per_class) == ["cow", "dog"]
    assert some.macro_f1 == pytest.approx(0.7)

    perfect = metric(reference, reference)
    assert (perfect.macro_f1, perfect.micro_f1) == (1, 1)
    nothing = metric({}, {})
    assert (nothing.macro_f1, nothing.micro_f1, nothing.per_class) == (0, 0, {})
    assert metric({}, estimated).micro_f1 == 0
    assert metric(reference, {}).macro_f1 == 0
    with pytest.raises(TypeError, match="mapping"):
        metric([Event("dog", 0, 1)], estimated)
    with pytest.raises(TypeError, match="single text"):
        metric(reference, estimated, labels="dog")


@pytest.mark.parametrize("metric", [intersection_based, event_based, segment_based])
def test_order_of_events_does_not_matter(metric, desed):
    reference, estimated, _ = desed
    reversed_ = [{file: found[::-1] for file, found in reversed(side.items())} for side in (reference, estimated)]
    assert metric(*reversed_) == metric(reference, estimated)


# --- error rates ---------------------------------------------------------------------------------


def rates(scores):
    return (
        scores.error_rate,
        scores.deletion_rate,
        scores.insertion_rate,
        getattr(scores, "substitution_rate", None),
    )


#: what sed_eval 0.2.1 gives for the tables of these two folders: overall, then the means over classes
SED_EVAL_RATES = {
    ("desed", event_based): (
        (1.874864376130199, 0.9160940325497288, 0.9385171790235082, 0.020253164556962026),
        (2.4461962802418196, 0.914314663689977, 1.5318816165518423, None),
    ),
    ("desed", segment_based): (
        (0.5460665258711721, 0.22914466737064415, 0.24775607180570222, 0.06916578669482576),
        (0.5613016852872887, 0.3303494200809044, 0.23095226520638445, None),
    ),
    ("dcase", event_based): (
        (1.0291193181818183, 0.6103219696969697, 0.3944128787878788, 0.024384469696969696),
        (1.1850246017126331, 0.5972663599615575, 0.5877582417510755, None),
    ),
    ("dcase", segment_based): (
        (0.37519636934892653, 0.19680572525746204, 0.0892825973119218, 0.08910804677954268),
        (0.5679321982599661, 0.33677980813466957, 0.23115239012529654, None),
    ),
}


@pytest.mark.parametrize(("name", "metric"), SED_EVAL_RATES, ids=lambda value: getattr(value, "__name__", value))
def test_rates_are_those_of_sed_eval(name, metric, request):
    scores = metric(*request.getfixturevalue(name)[:2])
    overall, macro = SED_EVAL_RATES[name, metric]
    assert rates(scores.overall) == pytest.approx(overall, abs=1e-12)
    assert rates(scores.macro) == pytest.approx(macro, abs=1e-12)
    for one in scores.per_class.values():
        assert one.error_rate == pytest.approx((one.fp + one.fn) / (one.tp + one.fn))


def test_the_published_rates(desed):
    reference, estimated, expected = desed
    error_rate = event_based(reference, estimated).overall.error_rate
    assert error_rate == pytest.approx(expected["collar_200ms_20pct"]["ER"], abs=1e-12)


def labelled(**spans):
    """Return {"a.wav": events} from label=[(onset, offset), ...]."""
    return {"a.wav": [Event(label, *span) for label, found in spans.items() for span in found]}


def test_rates_by_hand():
    reference = labelled(dog=[(0, 1), (2, 3), (4, 5)], cat=[(6, 7)])
    estimated = labelled(dog=[(0, 1)], cat=[(2, 3), (4.1, 5.1), (9, 10)])
    # A dog is found, two dogs are taken for cats, the cat is missed, and a cat is heard where nothing is.
    scores = event_based(reference, estimated)
    assert rates(scores.per_class["dog"]) == pytest.approx((2 / 3, 2 / 3, 0, None))
    assert rates(scores.per_class["cat"]) == (4, 1, 3, None)
    assert rates(scores.overall) == (1, 1 / 4, 1 / 4, 2 / 4)
    assert (scores.overall.fp, scores.overall.fn) == (3, 3)
    assert rates(scores.macro) == pytest.approx(((2 / 3 + 4) / 2, (2 / 3 + 1) / 2, 3 / 2, None))
    # Precision of the classes: 1 and 0.
    assert scores.macro.precision == 0.5 and scores.macro.recall == pytest.approx(1 / 6)
    # The intersection-based metric knows no substitutions.
    overall = intersection_based(reference, estimated).overall
    assert (overall.tp, overall.fp, overall.fn) == (1, 3, 3)
    assert rates(overall) == (6 / 4, 3 / 4, 3 / 4, None)
    # Segments 0 2 4 6 are active, 0 2 4 5 9 are detected: 0 is right, in 2 and 4 the class is wrong.
    overall = segment_based(reference, estimated).overall
    assert rates(overall) == (5 / 4, 1 / 4, 2 / 4, 2 / 4)


def test_substitutions_use_each_event_once():
    reference = labelled(dog=[(0, 1), (0, 1)], cat=[(0.1, 1.1)])
    # One owl for three events.
    assert rates(event_based(reference, labelled(owl=[(0, 1)])).overall) == (1, 2 / 3, 0, 1 / 3)
    # Where the first that fits is taken, the next is.
    two = labelled(owl=[(0, 1), (0.1, 1.1)])
    assert rates(event_based(labelled(dog=[(0, 1), (0, 1)]), two).overall) == (1, 0, 0, 1)
    # What is matched in its own class is no substitution.
    assert rates(event_based(reference, labelled(dog=[(0, 1)] * 2, owl=[(5, 6)])).overall) == (2 / 3, 1 / 3, 1 / 3, 0)
    # Not across files.
    elsewhere = {"b.wav": labelled(owl=[(0, 1)])["a.wav"]}
    assert event_based(reference, elsewhere).overall.substitution_rate == 0
    assert segment_based(reference, elsewhere).overall.substitution_rate == 0


@pytest.mark.parametrize("metric", [intersection_based, event_based, segment_based])
def test_without_reference_events_there_is_no_rate(metric):
    scores = metric({}, events((0, 1)))
    assert rates(scores.per_class["dog"]) == rates(scores.overall) == rates(scores.macro) == (None,) * 4


# --- overlaps ------------------------------------------------------------------------------------

many_spans = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)), max_size=8)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(many_spans, many_spans), min_size=1, max_size=3), st.sampled_from([0.1, 0.3, 0.5, 0.7, 1.0]))
def test_intersection_counts_seconds(files, criterion):
    """Events of whole tenths of seconds, counted tenth by tenth."""
    reference, estimated, expected = {}, {}, np.zeros(3, int)
    for number, sides in enumerate(files):
        truth, found = ([set(range(a, a + n)) for a, n in side] for side in sides)
        for side, spans in ((reference, sides[0]), (estimated, sides[1])):
            side[f"{number}.wav"] = [Event("dog", a / 8, (a + n) / 8) for a, n in spans]
        covered = set().union(*truth)
        passed = [one for one in found if len(one & covered) >= criterion * len(one)]
        heard = set().union(*passed)
        hits = sum(len(one & heard) >= criterion * len(one) for one in truth)
        expected += hits, len(found) - len(passed), len(truth) - hits
    overall = intersection_based(reference, estimated, dtc=criterion, gtc=criterion).overall
    assert [overall.tp, overall.fp, overall.fn] == expected.tolist()


# --- resamples of files --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [count_intersection_based, count_event_based, count_segment_based])
def test_counts_of_files_add_up(count, dcase):
    reference, estimated, _ = dcase
    counts = count(reference, estimated)
    assert set(counts.files) == {*reference, *estimated}
    half = len(counts.files) // 2
    for part in (slice(0, half), slice(half, None)):
        names = counts.files[part]
        alone = count({f: reference.get(f, []) for f in names}, {f: estimated.get(f, []) for f in names})
        substitutions = None if counts.substitutions is None else counts.substitutions[part]
        assert summarise(FileCounts(names, counts.labels, counts.counts[part], substitutions)) == summarise(alone)


def test_intervals_are_those_of_evaluating_again(dcase):
    """A resample by matrix product is the metric on the drawn files."""
    reference, estimated, _ = dcase
    files = list(reference)[:60]
    reference, estimated = ({f: side.get(f, []) for f in files} for side in (reference, estimated))
    random, macro, micro = np.random.default_rng(5), [], []
    for drawn in random.integers(0, 60, (40, 60)):
        scores = event_based(
            {f"{i}": reference[files[k]] for i, k in enumerate(drawn)},
            {f"{i}": estimated[files[k]] for i, k in enumerate(drawn)},
        )
        macro.append(scores.macro_f1)
        micro.append(scores.micro_f1)
    found = f1_intervals(count_event_based(reference, estimated), 40, seed=5)
    for name, values in (("macro_f1", macro), ("micro_f1", micro)):
        assert found[name] == pytest.approx(np.quantile(values, (0.025, 0.975), method="nearest"), abs=1e-12)
    assert f1_intervals(count_event_based(reference, estimated), 0) == {}
    with pytest.raises(ValueError, match="resamples"):
        f1_intervals(count_event_based(reference, estimated), -1)


# --- frames --------------------------------------------------------------------------------------


def test_rasterised_by_hand():
    edges = [0, 1, 2, 3, 3.5]
    # From 0.5 on half of the frame is covered; two parts of 0.25 s make half a frame, not if they are the same.
    found = [Event("dog", 0.5, 1.4), Event("cat", 2, 2.25), Event("cat", 2.5, 2.75), Event("owl", 0, 9)]
    found += [Event("cat", 1, 1.25), Event("cat", 1, 1.25), Event("dog", 3.3, 3.5), Event("cat", 3.25, 3.5)]
    assert rasterised(found, ("cat", "dog"), edges).astype(int).T.tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]
    # Halves of frames of 0.1 s are halves, however they are rounded.
    for frame in range(40):
        half = [Event("dog", (frame + 0.5) / 10, (frame + 1) / 10)]
        assert np.flatnonzero(rasterised(half, ("dog",), np.arange(41) * 0.1)).tolist() == [frame]


def test_frame_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(2)
    labels, reference, scores, truth = ("cat", "dog", "owl"), {}, {}, []
    for number in range(6):
        first = random.integers(0, 30, 3)
        # Events that begin and end with frames, so that their truth needs no rule.
        grid = np.zeros((40 + number, 3), bool)
        reference[f"{number}"] = []
        for column, label in enumerate(labels[:2]):
            grid[first[column] : first[column] + 7, column] = True
            reference[f"{number}"].append(Event(label, first[column] * 0.25, (first[column] + 7) * 0.25))
        scores[f"{number}"] = (np.round(random.random(grid.shape) + 0.3 * grid, 2), np.arange(len(grid) + 1) * 0.25)
        truth.append(grid)
    scores["quiet"] = (random.random((8, 3)), np.arange(9) * 0.25)
    all_truth = np.concatenate([*truth, np.zeros((8, 3), bool)])
    posteriors = np.concatenate([given for given, _ in scores.values()])
    found = frame_scores(reference, scores, labels)
    precision = [metrics.average_precision_score(all_truth[:, k], posteriors[:, k]) for k in range(2)]
    area = [metrics.roc_auc_score(all_truth[:, k], posteriors[:, k]) for k in range(2)]
    assert found.average_precision[:2] == pytest.approx(precision, abs=1e-9) and np.isnan(found.average_precision[2])
    assert found.roc_auc[:2] == pytest.approx(area, abs=1e-9) and np.isnan(found.roc_auc[2])
    assert found.mean_average_precision == pytest.approx(np.mean(precision))
    assert found.mean_roc_auc == pytest.approx(np.mean(area))
    with pytest.raises(ValueError, match="'0': expected posteriors of shape"):
        frame_scores(reference, {"0": (np.zeros((5, 3)), np.arange(5))}, labels)
    with pytest.raises(ValueError, match="no frames"):
        frame_scores(reference, {}, labels)


# --- tagging -------------------------------------------------------------------------------------


def test_accuracy_and_confusion_by_hand():
    assert tagging.accuracy([0, 1, 2, 2], [0, 2, 2, 1]) == 0.5
    assert tagging.confusion_matrix([0, 1, 2, 2], [0, 2, 2, 1], 4).tolist() == [
        [1, 0, 0, 0],
        [0, 0, 1, 0],
        [0, 1, 1, 0],
        [0, 0, 0, 0],
    ]


def test_average_precision_by_hand():
    # Hits at ranks 1 and 3: (1/1 + 2/3) / 2. With the last two tied the recall gained at rank 4 counts 2/4.
    assert tagging.average_precision([[1], [0], [1], [0]], [[0.9], [0.8], [0.7], [0.1]])[0] == pytest.approx(5 / 6)
    assert tagging.average_precision([[1], [0], [1], [0]], [[0.9], [0.8], [0.1], [0.1]])[0] == pytest.approx(0.75)


def test_auc_and_d_prime_by_hand():
    # Pairs (positive, negative): 3 of 4 in order, one tie counts half.
    assert tagging.roc_auc([[1], [1], [0], [0]], [[0.9], [0.5], [0.5], [0.1]])[0] == pytest.approx(0.875)
    assert tagging.d_prime(0.5) == 0
    # Gaussians one standard deviation apart: P(positive > negative) = Phi(1 / sqrt(2)).
    assert tagging.d_prime((1 + math.erf(0.5)) / 2) == pytest.approx(1, abs=1e-9)
    assert (tagging.d_prime(0), tagging.d_prime(1)) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="area"):
        tagging.d_prime(1.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [3, 20, 10**6])
def test_same_as_scikit_learn(dtype, levels):
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(levels)
    truth = random.random((200, 12)) < np.linspace(0.02, 0.9, 12)
    truth[0], truth[1] = True, False
    posteriors = (random.integers(0, levels, truth.shape) / levels).astype(dtype)
    expected = metrics.average_precision_score(truth, posteriors, average=None)
    assert tagging.average_precision(truth, posteriors) == pytest.approx(expected, abs=1e-9)
    assert tagging.mean_average_precision(truth.astype(int), posteriors) == pytest.approx(expected.mean(), abs=1e-9)
    expected = metrics.roc_auc_score(truth, posteriors, average=None)
    assert tagging.roc_auc(truth, posteriors) == pytest.approx(expected, abs=1e-9)
    a, b = random.integers(0, 12, (2, 200))
    assert np.array_equal(tagging.confusion_matrix(a, b, 12), metrics.confusion_matrix(a, b, labels=range(12)))
    assert tagging.accuracy(a, b) == pytest.approx(metrics.accuracy_score(a, b), abs=1e-12)


def test_classes_without_positives_are_left_out():
    truth = np.array([[1, 0, 1], [0, 0, 1]])
    posteriors = np.array([[0.9, 0.5, 0.5], [0.1, 0.5, 0.5]])
    assert np.isnan(tagging.average_precision(truth, posteriors)).tolist() == [False, True, False]
    assert np.isnan(tagging.roc_auc(truth, posteriors)).tolist() == [False, True, True]
    assert tagging.mean_average_precision(truth, posteriors) == 1
    with pytest.raises(ValueError, match="no class"):
        tagging.mean_average_precision(np.zeros((2, 3)), posteriors)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tagging.accuracy([0, 1], [0]), "2 clips"),
        (lambda: tagging.accuracy([], []), "no clips"),
        (lambda: tagging.accuracy([0], [[0.1, 0.9]]), "argmax"),
        (lambda: tagging.accuracy([0.5], [0]), "class indices"),
        (lambda: tagging.confusion_matrix([0, 3], [0, 1], 3), "3 classes"),
        (lambda: tagging.confusion_matrix([0, -1], [0, 1], 3), "-1"),
        (lambda: tagging.average_precision([[1, 0]], [[0.5]]), "same shape"),
        (lambda: tagging.average_precision([[2]], [[0.5]]), "0 and 1"),
        (lambda: tagging.average_precision([[1]], [[np.nan]]), "NaN"),
        (lambda: tagging.roc_auc(np.zeros((0, 2)), np.zeros((0, 2))), "no clips"),
    ],
)
def test_tagging_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
