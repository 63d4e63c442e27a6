"""Polyphonic sound detection scores: published figures, hand-worked cases, other implementations, both ways against
each other."""

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import shared

from htsat.events import Event
from htsat.metrics.psds import PSDS1, PSDS2, PSDSSettings, psds_from_operating_points, psds_from_scores

HALF = PSDSSettings(dtc=0.5, gtc=0.5, alpha_st=0)


def load(path):
    """Read a table without the package's own reader."""
    table = {}
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream, delimiter="\t"):
            found = table.setdefault(row["filename"], [])
            if row["onset"]:
                found.append(Event(row["event_label"], float(row["onset"]), float(row["offset"])))
    return table


def test_figures_of_psds_eval():
    folder = shared("data", "metrics", "dcase_baseline")
    with (folder / "validation_durations.tsv").open() as stream:
        durations = {row["filename"]: float(row["duration"]) for row in csv.DictReader(stream, delimiter="\t")}
    reference = load(folder / "validation.tsv")
    points = [load(path) for path in sorted((folder / "student" / "predictions_operating_points").glob("*.tsv"))]
    assert len(points) == 50
    first = psds_from_operating_points(reference, points, durations, PSDS1)
    assert first.value == pytest.approx(0.334469, abs=5e-7)
    assert psds_from_operating_points(reference, points, durations, PSDS2).value == pytest.approx(0.528100, abs=5e-7)
    # The order of the points, and points twice, make no difference.
    again = psds_from_operating_points(reference, points[::-5] + points[::-5], durations, PSDS1)
    assert again.value == psds_from_operating_points(reference, points[4::5], durations, PSDS1).value <= first.value


# --- by hand -------------------------------------------------------------------------------------


def dogs(*spans, file="a.wav", label="dog"):
    return {file: [Event(label, *span) for span in spans]}


def test_staircase_by_hand():
    # One file of 36 s: a false positive is 100 per hour.
    reference, durations = dogs((0, 2), (4, 6)), {"a.wav": 36.0}
    settings = PSDSSettings(dtc=0.5, gtc=0.5, alpha_st=0, max_efpr=400)
    strict = dogs((0, 2))  # half, no false positive
    loose = dogs((0, 2), (4, 6), (10, 11), (12, 13))  # all, 200 per hour
    noise = dogs((20, 21), (22, 23), (24, 25))  # nothing, 300 per hour
    result = psds_from_operating_points(reference, [loose, noise, strict], durations, settings)
    # 0.5 up to 200, 1 up to 400
    assert result.value == result.per_class["dog"] == pytest.approx(0.75)
    assert result.efpr.tolist() == [0, 200, 300] and result.tpr.tolist() == [0.5, 1, 1]
    assert psds_from_operating_points(reference, [loose], durations, settings).value == pytest.approx(0.5)
    # Up to 100 only the strict point counts; a point at the limit adds no area.
    up_to_100 = PSDSSettings(dtc=0.5, gtc=0.5, alpha_st=0, max_efpr=100)
    assert psds_from_operating_points(reference, [loose, strict], durations, up_to_100).value == pytest.approx(0.5)
    up_to_200 = PSDSSettings(dtc=0.5, gtc=0.5, alpha_st=0, max_efpr=200)
    assert psds_from_operating_points(reference, [loose], durations, up_to_200).value == 0
    # Twice the hours, half the rate: files without any event count.
    twice = psds_from_operating_points(reference, [loose], {**durations, "quiet.wav": 36.0}, settings)
    assert twice.value == pytest.approx(0.75)
    assert psds_from_operating_points(reference, [], durations, settings).value == 0


def test_differences_between_classes_by_hand():
    reference = {"a.wav": [Event("dog", 0, 1), Event("cat", 5, 6)]}
    found, durations = [dogs((0, 1))], {"a.wav": 10.0}
    # One class is found, the other not: mean 0.5, deviation 0.5.
    for alpha_st, value in ((0, 0.5), (0.5, 0.25), (1, 0), (2, 0)):
        settings = PSDSSettings(dtc=0.5, gtc=0.5, alpha_st=alpha_st)
        result = psds_from_operating_points(reference, found, durations, settings)
        assert result.value == pytest.approx(value)
    assert result.per_class == {"cat": 0, "dog": 1}
    # Classes without reference events are left out, and so are those that nobody asked for.
    owl = {"a.wav": [*dogs((0, 1))["a.wav"], Event("owl", 2, 3)]}
    assert psds_from_operating_points(reference, [owl], durations, HALF).per_class.keys() == {"cat", "dog"}
    assert psds_from_operating_points(reference, [owl], durations, PSDS1, labels=["dog", "owl"]).value == 1


def test_cross_triggers_by_hand():
    reference = {"a.wav": [Event("dog", 0, 2), Event("cat", 10, 20), Event("owl", 30, 50)]}
    estimated = [{"a.wav": [Event("dog", 0, 2), Event("dog", 9.3, 10.3), Event("dog", 49.6, 50.6)]}]
    # Two false positives in an hour; 0.3 of the first lies in the cat, 0.4 of the second in the owl.
    durations = {"a.wav": 3600.0}
    curve = PSDSSettings(dtc=0.5, gtc=0.5, cttc=0.35, alpha_ct=0.5, alpha_st=0, max_efpr=1000)
    result = psds_from_operating_points(reference, estimated, durations, curve, labels=["dog", "cat", "owl"])
    # The owl's 20 s hold one cross-trigger, 180 per hour of owls; the mean over two other classes is 90.
    assert result.efpr.tolist() == pytest.approx([0, 2 + 0.5 * 90])
    both = PSDSSettings(dtc=0.5, gtc=0.5, cttc=0.29, alpha_ct=1, alpha_st=0, max_efpr=1000)
    result = psds_from_operating_points(reference, estimated, durations, both)
    assert result.efpr.tolist() == pytest.approx([0, 2 + (180 + 360) / 2])
    # A detection within its own class is no cross-trigger, whatever else sounds.
    together = {"a.wav": [Event("dog", 0, 2), Event("cat", 0, 2)]}
    assert psds_from_operating_points(together, estimated[:1], durations, both, labels=["cat", "dog"]).efpr[1] == 2


def test_events_after_the_end_of_the_file_are_nobodys():
    reference, durations = dogs((0, 2)), {"a.wav": 10.0}
    settings = PSDSSettings(dtc=0.5, gtc=0.5, alpha_st=0, max_efpr=720)
    after = psds_from_operating_points(reference, [dogs((0, 2), (10, 11))], durations, settings)
    assert after.efpr.tolist() == [0] and after.value == 1
    across = psds_from_operating_points(reference, [dogs((0, 2), (9.5, 11))], durations, settings)
    assert across.efpr.tolist() == [0, 360] and across.value == pytest.approx(0.5)


def test_overlapping_events_of_a_class():
    reference = dogs((0, 3), (1, 4), (1, 4))
    result = psds_from_operating_points(reference, [dogs((0, 3.9), (0, 3.9))], {"a.wav": 10.0}, PSDS1)
    assert result.value == 1
    # Half of the seconds are found: all three events are 2 of 3 s heard.
    boundaries = np.arange(11.0)
    scores = {"a.wav": (np.isin(np.arange(10), (1, 2)).astype(float)[:, None], boundaries)}
    exact = psds_from_scores(reference, scores, ["dog"], {"a.wav": 10.0}, PSDSSettings(dtc=1, gtc=0.6, alpha_st=0))
    assert exact.value == 1


def test_exact_by_hand():
    # Frames of 1 s; the event of 2 to 4 s is heard at 0.9, joined with 4 to 5 at 0.5, and with the rest at 0.2.
    posteriors = np.array([0.2, 0.2, 0.9, 0.9, 0.5, 0.2, 0.7, 0.2, 0.2, 0.2])[:, None]
    scores, durations = {"a.wav": (posteriors, np.arange(11.0))}, {"a.wav": 10.0}
    settings = PSDSSettings(dtc=0.7, gtc=0.7, alpha_st=0, max_efpr=720)
    result = psds_from_scores(dogs((2, 4)), scores, ["dog"], durations, settings)
    # At 0.9 a hit without false positive; at 0.7 one false positive, 360 per hour; at 0.5 2 of 3 s are not enough.
    assert result.value == 1 and result.efpr.tolist() == [0, 360, 720]
    # Never above: with the loud second in front the hit costs a false positive.
    posteriors[6] = 0.95
    result = psds_from_scores(dogs((2, 4)), scores, ["dog"], durations, settings)
    assert result.value == pytest.approx(0.5) and result.tpr[:2].tolist() == [0, 1]


# --- both ways, and another implementation --------------------------------------------------------


def decoded(posteriors, boundaries, labels, threshold):
    events = []
    for column, label in enumerate(labels):
        edges = np.diff(np.concatenate([[0], posteriors[:, column] >= threshold, [0]]).astype(int))
        for i, j in zip(np.flatnonzero(edges > 0), np.flatnonzero(edges < 0), strict=True):
            events.append(Event(label, float(boundaries[i]), float(boundaries[j])))
    return events


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.sampled_from([3, 10, 10**6]))
def test_exact_is_the_limit_of_all_thresholds(seed, frames, levels):
    random = np.random.default_rng(seed)
    labels = ["cat", "dog", "owl"]
    reference, scores, durations = {}, {}, {}
    for number in range(int(random.integers(1, 5))):
        file, length = f"{number}.wav", int(random.integers(1, frames + 1))
        # Times on a grid of 1/16 s, so that ties with the criteria happen and are exact.
        boundaries = np.cumsum(np.append(0, random.integers(1, 6, length))) / 16
        reference[file] = []
        for _ in range(int(random.integers(0, 5))):
            onset = float(random.integers(0, 16 * 4)) / 16
            reference[file].append(Event(str(random.choice(labels)), onset, onset + float(random.integers(1, 32)) / 16))
        rough = random.random((length, 3)) + 0.3 * random.random((length, 1)).cumsum(axis=0) % 1
        scores[file] = (np.floor(rough * levels) / levels, boundaries)
        durations[file] = float(boundaries[-1]) if random.random() < 0.7 else float(boundaries[-1]) * 0.8 + 0.01
    thresholds = np.unique(np.concatenate([posteriors.ravel() for posteriors, _ in scores.values()]))
    points = [{f: decoded(*both, labels, threshold) for f, both in scores.items()} for threshold in thresholds]
    for criterion in (0.25, 0.5, 0.75):
        settings = PSDSSettings(criterion, criterion, cttc=0.25, alpha_ct=0.5, alpha_st=0.5, max_efpr=3000)
        expected = psds_from_operating_points(reference, points, durations, settings)
        found = psds_from_scores(reference, scores, labels, durations, settings)
        assert found.value == pytest.approx(expected.value, abs=1e-9)
        assert found.per_class == pytest.approx(expected.per_class, abs=1e-9)
    # Fewer thresholds never find more.
    few = psds_from_operating_points(reference, points[::3], durations, settings)
    assert all(few.per_class[label] <= found.per_class[label] + 1e-9 for label in few.per_class)


def test_figures_of_sed_scores_eval():
    """What sed_scores_eval 0.0.4 gives for the same posteriors."""
    labels, reference, scores, durations = ("bell", "cat", "dog"), {}, {}, {}
    for f in range(12):
        boundaries = np.arange(51) * 0.2
        t = (boundaries[:-1] + boundaries[1:]) / 2
        reference[f"{f}.wav"] = events = [
            Event(
                labels[(f + k) % 3],
                round(0.5 + 1.3 * k + 0.1 * f, 3),
                round(0.5 + 1.3 * k + 0.1 * f + 0.9 + 0.35 * ((f * k) % 4), 3),
            )
            for k in range(f % 4)
        ]
        p = np.stack([0.5 + 0.3 * np.sin(1.7 * f + (2.1 + 0.3 * k) * t + k) for k in range(3)], axis=1)
        for e in events:
            k = labels.index(e.event_label)
            p[(t > e.onset + 0.1) & (t < e.offset - 0.05 * (f % 3)), k] += 0.25
            p[(t > e.onset) & (t < e.offset), (k + 1) % 3] += 0.1
        scores[f"{f}.wav"], durations[f"{f}.wav"] = (np.round(p, 4), boundaries), 600.0
    third = PSDSSettings(dtc=0.5, gtc=0.5, cttc=0.3, alpha_ct=1.0, alpha_st=0.5, max_efpr=1000)
    expected = {PSDS1: 0.4044117532482867, PSDS2: 0.725718514719279, third: 0.34000391968555904}
    for demands, value in expected.items():
        assert psds_from_scores(reference, scores, labels, durations, demands).value == pytest.approx(value, abs=1e-12)
    # Only the order of the posteriors counts.
    logits = {f: (np.log(p / (1.2 - p)), boundaries) for f, (p, boundaries) in scores.items()}
    assert psds_from_scores(reference, logits, labels, durations, PSDS1).value == pytest.approx(expected[PSDS1])


# --- refusals ------------------------------------------------------------------------------------

GOOD = (np.zeros((2, 1)), np.arange(3.0))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PSDSSettings(dtc=0, gtc=0.5), "dtc"),
        (lambda: PSDSSettings(dtc=0.5, gtc=float("nan")), "gtc"),
        (lambda: PSDSSettings(0.5, 0.5, alpha_ct=2), "alpha_ct"),
        (lambda: PSDSSettings(0.5, 0.5, alpha_st=-1), "alpha_st"),
        (lambda: PSDSSettings(0.5, 0.5, max_efpr=0), "max_efpr"),
        (lambda: psds_from_operating_points(dogs((0, 1)), [], {"a.wavv": 1}, HALF), "no duration.*mean 'a.wavv'"),
        (lambda: psds_from_operating_points({}, [dogs((0, 1))], {"b": 1}, HALF), "no duration"),
        (lambda: psds_from_operating_points(dogs((0, 1)), [], {"a.wav": 0}, HALF), "above 0, got 0"),
        (lambda: psds_from_scores(dogs((0, 1)), {}, ["dog"], {"a.wav": 9}, HALF), "no posteriors: 'a.wav'"),
        (lambda: psds_from_scores({}, {"a": GOOD}, ["dog", "cat"], {"a": 9}, HALF), r"\(num_frames, 2\)"),
        (lambda: psds_from_scores({}, {"a": (GOOD[0], [0, 1, 1])}, ["dog"], {"a": 9}, HALF), "each after"),
        (lambda: psds_from_scores({}, {"a": (GOOD[0] * np.nan, GOOD[1])}, ["dog"], {"a": 9}, HALF), "NaN"),
    ],
)
def test_psds_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
