"""Tuned thresholds and probabilities: known optima, other ways to the same answer, and what must not matter."""

import itertools

import numpy as np
import pytest
from conftest import tiny_config

from htsat.config import (
    CalibrationConfig,
    CheckpointConfig,
    ClassDecoding,
    DecodingConfig,
    LogitCalibration,
    from_dict,
    to_dict,
)
from htsat.detection.decoder import decode_events
from htsat.errors import ConfigError, DataError, UsageError
from htsat.evaluation.calibrate import (
    METRICS,
    QuietRecordings,
    _Recordings,
    _Search,
    _Truth,
    calibrate_decoding,
    score,
)
from htsat.evaluation.probabilities import (
    calibrate_one,
    calibrate_several,
    fit_platt,
    fit_temperature,
    frame_truth,
    logits_of,
)
from htsat.events import Event
from htsat.hearing import calibrated, sigmoid, softmax, to_posteriors

STEP = 0.04


def grid(seconds=4.0):
    return np.arange(round(seconds / STEP) + 1) * STEP


def material(count, levels, seed=0, bumps=0.5, noise=0.0):
    """Posteriors of recordings of 4 s with one event of 1 s of each label in every second one.

    ``levels`` is label -> (posterior inside, posterior outside); a share ``bumps`` of the recordings has a false
    alarm of 1 s half way between the two.
    """
    rng = np.random.default_rng(seed)
    posteriors, boundaries, reference = {}, {}, {}
    for i in range(count):
        name, bounds = f"r{i:03d}", grid()
        values = np.zeros((len(bounds) - 1, len(levels)), np.float32)
        reference[name] = []
        for c, (label, (inside, outside)) in enumerate(levels.items()):
            values[:, c] = outside
            start = int(rng.integers(5, 25))
            if rng.random() < bumps:
                values[60 : 60 + 25, c] = (inside + outside) / 2
            if (i + c) % 2 == 0:
                values[start : start + 25, c] = inside
                reference[name].append(Event(label, float(bounds[start]), float(bounds[start + 25])))
        values += noise * rng.standard_normal(values.shape).astype(np.float32)
        posteriors[name], boundaries[name] = np.clip(values, 0, 1), bounds
    return posteriors, boundaries, reference, list(levels)


def random_events(rng, count, files, seconds=4.0, overlapping=True):
    """Events at any time: where one lies exactly at a tolerance, the order of a sum decides."""
    found = {f"r{i}": [] for i in range(files)}
    for _ in range(count):
        name, onset = f"r{rng.integers(files)}", rng.uniform(0, seconds - 0.1)
        event = Event("dog", onset, min(seconds, onset + rng.uniform(0.05, 1.2)))
        if overlapping or all(event.offset <= e.onset or e.offset <= event.onset for e in found[name]):
            found[name].append(event)
    return found


# ------------------------------------------------------------------ counts and decoding are those of everywhere else


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", range(12))
def test_counts_are_those_of_the_metric(metric, seed):
    rng = np.random.default_rng(seed)
    reference = random_events(rng, 30, 6)
    estimated = random_events(rng, 40, 6, overlapping=False)
    bounds = dict.fromkeys(reference, grid())
    recordings = _Recordings(dict.fromkeys(reference, np.zeros((100, 1), np.float32)), bounds, reference, None, 3)
    found = sorted((i, e.onset, e.offset) for i, name in enumerate(recordings.names) for e in estimated[name])
    columns = [np.array([row[c] for row in found]) for c in range(3)]
    counted = _Truth(recordings, metric, "dog").count(*columns)
    for fold in range(3):
        inside = [name for name, part in zip(recordings.names, recordings.folds, strict=True) if part == fold]
        scores = score(
            metric, {n: reference[n] for n in inside}, {n: estimated[n] for n in inside}, dict.fromkeys(inside, 4.0)
        )
        assert counted[fold].tolist() == [scores.overall.tp, scores.overall.fp]


@pytest.mark.parametrize("metric", METRICS)
def test_the_search_decodes_as_the_decoder_does(metric):
    rng = np.random.default_rng(5)
    names = [f"r{i}" for i in range(7)]
    bounds = {name: grid(1.0 + i) for i, name in enumerate(names)}
    posteriors = {name: rng.random((len(b) - 1, 2)).astype(np.float32) ** 2 for name, b in bounds.items()}
    reference = random_events(rng, 25, 7, seconds=1.0)
    recordings = _Recordings(posteriors, bounds, reference, None, 1)
    search = _Search(recordings, metric, "dog", 1)
    rules = itertools.product(search.thresholds[::9], (1.0, 0.4), search.medians[::3], (0.0, 0.3), (0.0, 0.2))
    for threshold, ratio, median, gap, duration in rules:
        off = float(search.off(threshold, ratio, False))
        config = DecodingConfig(float(threshold), off, median, duration, gap)
        scores = recordings.scores(metric, ["cat", "dog"], config)
        dog = scores.per_class["dog"]
        assert search.count((float(threshold), off, median, gap, duration))[0].tolist() == [dog.tp, dog.fp]


# ------------------------------------------------------------------ known optima


@pytest.mark.parametrize("metric", METRICS)
def test_each_class_gets_the_threshold_that_parts_events_from_false_alarms(metric):
    levels = {"loud": (0.9, 0.1), "faint": (0.3, 0.02)}  # false alarms at 0.5 and 0.16: no shared threshold parts both
    found = calibrate_decoding(*material(60, levels), metric)
    assert found.macro_f1 == found.cross_validated_macro_f1 == 1
    assert found.macro_f1_before < 0.6
    loud, faint = (found.decoding.for_label(label) for label in levels)
    assert 0.5 < loud.threshold <= 0.9 and 0.16 < faint.threshold <= 0.3
    assert (found.decoding.median_seconds, found.decoding.min_gap, found.decoding.min_duration) == (0, 0, 0)


def test_the_threshold_lies_on_a_plateau():
    """All thresholds from 0.3 to 0.7 are equally good: neither end is taken."""
    posteriors, boundaries, reference, labels = material(40, {"a": (0.7, 0.05)}, bumps=0)
    for values in posteriors.values():
        values[80:95] = 0.29
    found = calibrate_decoding(posteriors, boundaries, reference, labels)
    assert found.macro_f1 == 1 and 0.35 <= found.decoding.for_label("a").threshold <= 0.65


def test_filters_are_found_where_they_are_needed():
    """Events with holes of one frame, and false alarms of one frame: a median of three frames mends both."""
    posteriors, boundaries, reference, labels = material(60, {"a": (0.9, 0.05)}, bumps=0)
    rng = np.random.default_rng(1)
    for values in posteriors.values():
        for frame in rng.choice(np.arange(2, 98, 4), 8, replace=False):
            values[frame] = 0.95 - values[frame]
    found = calibrate_decoding(posteriors, boundaries, reference, labels)
    settings = found.decoding.for_label("a")
    assert found.macro_f1_before < 0.5
    assert found.cross_validated_macro_f1 > 0.97
    assert settings.median_seconds or (settings.min_gap and settings.min_duration)


def test_what_does_not_matter():
    """The order of files and labels changes nothing, nor does a silent class; twice the same is the same."""
    given = material(24, {"a": (0.7, 0.2), "b": (0.5, 0.1)}, noise=0.08)
    posteriors, boundaries, reference, labels = given
    found = calibrate_decoding(*given)
    turned = {name: posteriors[name][:, ::-1] for name in reversed(posteriors)}
    wide = {name: np.pad(values, ((0, 0), (0, 1))) for name, values in posteriors.items()}
    again = calibrate_decoding(turned, boundaries, dict(reversed(reference.items())), labels[::-1])
    silent = calibrate_decoding(wide, boundaries, reference, [*labels, "silent"])
    for other in (calibrate_decoding(*given), again, silent):
        assert other.macro_f1 == found.macro_f1
        for label in labels:
            assert other.per_class[label] == found.per_class[label]
            for point, config in other.operating_points.items():
                assert config.for_label(label) == found.operating_points[point].for_label(label)


def test_noise_is_not_believed():
    """Posteriors that know nothing of the events: the cross-validated figure does not pretend."""
    posteriors, boundaries, reference, labels = material(40, {"a": (0.9, 0.1)})
    rng = np.random.default_rng(0)
    posteriors = {name: rng.random(values.shape).astype(np.float32) for name, values in posteriors.items()}
    found = calibrate_decoding(posteriors, boundaries, reference, labels)
    assert found.cross_validated_macro_f1 <= found.macro_f1 < 0.35


def test_classes_with_few_events():
    posteriors, boundaries, reference, labels = material(40, {"a": (0.9, 0.1), "rare": (0.9, 0.1), "never": (0.9, 0.1)})
    rare = [name for name, found in reference.items() if any(e.event_label == "rare" for e in found)][:4]
    kept = {
        name: [e for e in found if e.event_label == "a" or (e.event_label == "rare" and name in rare)]
        for name, found in reference.items()
    }
    before = DecodingConfig(0.33, per_class={"never": {"threshold": 0.44}})
    found = calibrate_decoding(posteriors, boundaries, kept, labels, before=before)
    shared = found.decoding.for_label("something else")
    assert found.decoding.for_label("rare") == shared
    assert found.decoding.for_label("never") == ClassDecoding(0.44, 0.44)
    levels = {label: one.level for label, one in found.per_class.items()}
    assert (levels["rare"], levels["never"]) == ("shared settings", "as before")
    assert found.per_class["rare"].events == 4 and found.per_class["rare"].cross_validated_f1 is None
    with pytest.raises(DataError, match=r"no class has the 500 events.*label more"):
        calibrate_decoding(posteriors, boundaries, kept, labels, min_events=500)


def test_a_group_is_never_on_both_sides():
    given = material(20, {"a": (0.9, 0.1)})
    with pytest.raises(DataError, match="two recordings"):
        calibrate_decoding(*given, groups=dict.fromkeys(given[0], "one"))
    halves = {name: name[-1] for name in given[0]}
    recordings = _Recordings(*given[:3], halves, 5)
    for letter in set(halves.values()):
        parts = {p for n, p in zip(recordings.names, recordings.folds, strict=True) if halves[n] == letter}
        assert len(parts) == 1


@pytest.mark.parametrize("metric", METRICS)
def test_operating_points_reach_what_was_asked_for(metric):
    """Events and false alarms with posteriors that overlap: precision and recall cannot both be had."""
    rng = np.random.default_rng(2)
    posteriors, boundaries, reference, labels = material(150, {"a": (1.0, 0.0)}, bumps=0)
    for name, values in posteriors.items():
        values *= np.float32(np.clip(rng.normal(0.65, 0.15), 0.05, 1))
        values[70:90] = np.clip(rng.normal(0.35, 0.15), 0.01, 1)
        reference[name] = [e for e in reference[name] if e.offset <= 70 * STEP]
    found = calibrate_decoding(posteriors, boundaries, reference, labels, metric, min_precision=0.95, min_recall=0.97)
    one = found.per_class["a"]
    assert one.unreachable == ()
    assert one.points["high_precision"].precision >= 0.95
    assert one.points["high_recall"].recall >= 0.97
    assert one.points["balanced"].f1 >= max(one.points[p].f1 for p in ("high_precision", "high_recall")) - 0.02
    precise, balanced, recall = (found.operating_points[p].for_label("a").threshold for p in
                                 ("high_precision", "balanced", "high_recall"))  # fmt: skip
    assert precise >= balanced >= recall
    # The figures are those of the decoder and the metric.
    for point, config in found.operating_points.items():
        estimated = {n: decode_events(posteriors[n], boundaries[n], labels, config) for n in posteriors}
        assert score(metric, reference, estimated, dict.fromkeys(posteriors, 4.0)).per_class["a"] == one.points[point]


def test_a_single_detection_has_no_precision():
    """Above 0.9 there is one detection, a right one, and below it as many wrong as right ones."""
    posteriors, boundaries, reference, labels = material(40, {"a": (0.7, 0.01)}, bumps=0)
    wrong = [name for name, events in reference.items() if not events]
    for name in wrong:
        posteriors[name][20:45] = 0.7
    first = next(name for name in posteriors if name not in wrong)
    posteriors[first][posteriors[first] > 0.5] = 0.97
    found = calibrate_decoding(posteriors, boundaries, reference, labels)
    precise = found.per_class["a"].points["high_precision"]
    assert (precise.tp, precise.fp) == (20, 20) and "high_precision" in found.per_class["a"].unreachable


def test_what_cannot_be_reached_is_told():
    posteriors, boundaries, reference, labels = material(40, {"a": (0.8, 0.1)}, bumps=0)
    for name in list(posteriors)[::2]:
        posteriors[name] = np.full_like(posteriors[name], 0.001)  # these events are never heard
    found = calibrate_decoding(posteriors, boundaries, reference, labels, min_recall=0.9)
    assert "high_recall" in found.per_class["a"].unreachable


def test_wrong_usage():
    given = material(6, {"a": (0.9, 0.1)})
    with pytest.raises(UsageError, match=r"unknown metric 'event_base'; did you mean 'event_based'"):
        calibrate_decoding(*given, "event_base")
    with pytest.raises(UsageError, match=r"min_recall must be above 0 and at most 1, got 1.5"):
        calibrate_decoding(*given, min_recall=1.5)
    with pytest.raises(UsageError, match=r"max_false_alarms must be 0 or more, got -1"):
        calibrate_decoding(*given, max_false_alarms=-1)
    with pytest.raises(UsageError, match=r"max_delay must be 0 or more, got nan"):
        calibrate_decoding(*given, max_delay=float("nan"))


# ------------------------------------------------------------------ quiet recordings, and filters that do not wait


def loud_and_faint():
    """40 recordings with 20 events of each class: those of ``a`` at 0.95 or 0.75, those of ``b`` at 0.95."""
    posteriors, boundaries, reference, labels = material(40, {"a": (0.95, 0.01), "b": (0.95, 0.01)}, bumps=0)
    for name in list(posteriors)[::4]:
        posteriors[name][:, 0] = np.minimum(posteriors[name][:, 0], 0.75)
    return posteriors, boundaries, reference, labels


def an_hour(*levels, parts=4):
    """Recordings of an hour together, in 36 s steps, in which class ``c`` rises to each of ``levels[c]`` once."""
    values = np.full((parts, 100 // parts, len(levels)), 0.01, np.float32)
    for c, peaks in enumerate(levels):
        for i, peak in enumerate(peaks):
            values[i % parts, 2 * (i // parts) + 1, c] = peak
    names = [f"quiet{i}" for i in range(parts)]
    bounds = np.arange(100 // parts + 1) * 36.0
    return QuietRecordings(dict(zip(names, values, strict=True)), dict.fromkeys(names, bounds))


def thresholds(config, labels):
    return [config.for_label(label).threshold for label in labels]


@pytest.mark.parametrize("metric", METRICS)
def test_thresholds_are_raised_where_it_costs_least(metric):
    """10 false alarms at 0.85: the 6 of ``b`` cost nothing, the 4 of ``a`` half of its events."""
    given = loud_and_faint()
    labels = given[3]
    quiet = an_hour([0.85] * 4, [0.85] * 6)
    plain = calibrate_decoding(*given, metric)
    assert plain.false_alarms is None and plain.macro_f1 == 1 and max(thresholds(plain.decoding, labels)) <= 0.75
    whole = 2 * 10 / (10 + 20)
    for limit, left, on, f1 in (
        (12, (4, 6), [None, None], (1, 1)),
        (4, (4, 0), [None, 0.9], (1, 1)),
        (3, (0, 0), [0.9, 0.9], (whole, 1)),
    ):
        found = calibrate_decoding(*given, metric, quiet=quiet, max_false_alarms=limit)
        alarms = found.false_alarms
        assert (alarms.before, alarms.after, alarms.hours, alarms.recordings) == (10, sum(left), 1, 4)
        assert alarms.reached and alarms.limit == limit
        expected = [t or old for t, old in zip(on, thresholds(plain.decoding, labels), strict=True)]
        assert thresholds(found.decoding, labels) == pytest.approx(expected)
        for label, count, value in zip(labels, left, f1, strict=True):
            one = alarms.per_class[label]
            assert (one.tuned, one.after, one.f1_before) == (True, count, 1)
            if metric != "segment_based":
                assert one.f1 == pytest.approx(value)
        assert found.macro_f1 == pytest.approx(np.mean([alarms.per_class[label].f1 for label in labels]))
        assert alarms.macro_f1_before == plain.macro_f1
        assert alarms.cross_validated_macro_f1_before == plain.cross_validated_macro_f1
        # Every recording is like the others: what is learned from three of them holds for the fourth.
        assert alarms.cross_validated == sum(left)
        points = found.operating_points
        assert points["high_recall"] == plain.operating_points["high_recall"]
        for label in labels:
            strict, balanced = (points[name].for_label(label) for name in ("high_precision", "balanced"))
            old = plain.decoding.for_label(label)
            assert strict.threshold >= balanced.threshold
            ratio = old.threshold_off / old.threshold
            assert balanced.threshold_off / balanced.threshold == pytest.approx(ratio, abs=1e-3)


def test_no_more_is_given_up_than_is_needed():
    """Of ``a``'s false alarms one must go: to 0.8 none of its events is lost, to 0.999 all would be."""
    given = loud_and_faint()
    quiet = an_hour([0.74, 0.85, 0.96, 0.97], [0.9985])
    found = calibrate_decoding(*given, quiet=quiet, max_false_alarms=4)
    # That of b is as dear as all of b's events, those of a up to its events at 0.75 are free.
    assert found.macro_f1 == 1 and found.false_alarms.after == 4
    assert 0.74 < found.decoding.for_label("a").threshold <= 0.75
    last = calibrate_decoding(*given, quiet=quiet, max_false_alarms=0)
    assert last.false_alarms.after == 0 and last.macro_f1 == 0
    assert thresholds(last.decoding, ["a", "b"]) == [0.98, 0.999]


def test_a_limit_that_cannot_be_reached():
    """Full posteriors stay whatever the threshold; a class with few events, or none, keeps its settings."""
    posteriors, boundaries, reference, labels = loud_and_faint()
    rare = [name for name, events in reference.items() if any(e.event_label == "b" for e in events)][3:]
    for name in rare:
        reference[name] = [e for e in reference[name] if e.event_label == "a"]
    wide = {name: np.pad(values, ((0, 0), (0, 1))) for name, values in posteriors.items()}
    before = DecodingConfig(per_class={"never": {"threshold": 0.44}})
    quiet = an_hour([0.85, 1.0, 1.0], [0.99, 0.99], [0.5])
    settings = {"before": before, "quiet": quiet, "max_false_alarms": 0}
    found = calibrate_decoding(wide, boundaries, reference, [*labels, "never"], **settings)
    alarms = found.false_alarms
    assert (alarms.before, alarms.after, alarms.reached) == (6, 5, False)
    told = {label: (one.tuned, one.before, one.after) for label, one in alarms.per_class.items()}
    assert told == {"a": (True, 3, 2), "b": (False, 2, 2), "never": (False, 1, 1)}
    assert found.decoding.for_label("never").threshold == 0.44
    plain = alarms.to_dict()
    assert (plain["reached"], plain["per_hour_before"], plain["per_hour"]) == (False, 6, 5)
    alone = QuietRecordings({"x": np.zeros((0, 3), np.float32)}, {"x": np.zeros(1)})
    with pytest.raises(DataError, match="no sound in the quiet recordings"):
        calibrate_decoding(wide, boundaries, reference, [*labels, "never"], quiet=alone)


def test_false_alarms_are_what_the_decoder_finds():
    """Noise for posteriors, recordings of any length; the order of files does not matter."""
    rng = np.random.default_rng(4)
    given = material(40, {"a": (0.8, 0.2), "b": (0.7, 0.1)}, noise=0.1)
    bounds = {f"q{i}": grid(1.0 + 3 * i) for i in range(6)}
    noise = {name: rng.random((len(b) - 1, 2)).astype(np.float32) for name, b in bounds.items()}
    quiet = QuietRecordings(noise, bounds)
    found = calibrate_decoding(*given, quiet=quiet, max_false_alarms=1000)
    for name, config in found.operating_points.items():
        events = [e for n in noise for e in decode_events(noise[n], bounds[n], given[3], config)]
        assert found.false_alarms.points[name] == len(events)
        if name == "balanced":
            counts = {label: sum(e.event_label == label for e in events) for label in given[3]}
            assert counts == {label: one.after for label, one in found.false_alarms.per_class.items()}
    assert found.false_alarms.hours == pytest.approx(sum(b[-1] for b in bounds.values()) / 3600)
    assert found.false_alarms.after <= 1000 * found.false_alarms.hours < found.false_alarms.before
    turned = QuietRecordings(dict(reversed(noise.items())), bounds)
    assert calibrate_decoding(*given, quiet=turned, max_false_alarms=1000) == found
    one = dict.fromkeys(noise, "one night")
    assert calibrate_decoding(*given, quiet=QuietRecordings(noise, bounds, one)).false_alarms.cross_validated is None


def test_filters_that_do_not_wait():
    """Events with holes of one frame, which a median of three frames, 0.12 s, or a gap of 0.1 s mends."""
    posteriors, boundaries, reference, labels = material(60, {"a": (0.9, 0.05)}, bumps=0)
    rng = np.random.default_rng(1)
    for values in posteriors.values():
        for frame in rng.choice(np.arange(2, 98, 4), 8, replace=False):
            values[frame] = 0.95 - values[frame]
    for delay in (0.0, 0.05, 0.06, 0.16):
        found = calibrate_decoding(posteriors, boundaries, reference, labels, max_delay=delay)
        for config in found.operating_points.values():
            settings = config.for_label("a")
            assert settings.median_seconds / 2 + settings.min_gap <= delay + 1e-6
        assert (found.macro_f1 > 0.97) == (delay >= 0.06)


# ------------------------------------------------------------------ probabilities


def test_a_known_scale_and_bias_are_recovered():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 100_000)
    truth = rng.random(len(logits)) < 1 / (1 + np.exp(-(0.6 * logits - 1.2)))
    scale, bias = fit_platt(logits, truth)
    assert (scale, bias) == pytest.approx((0.6, -1.2), abs=0.02)


def test_platt_is_the_least_of_a_fine_grid():
    rng = np.random.default_rng(1)
    x = rng.normal(0, 2, 40)
    y = rng.random(40) < 1 / (1 + np.exp(-(1.7 * x + 0.5)))
    scale, bias = fit_platt(x, y, weight=0.5)

    def loss(a, b):
        p = 1 / (1 + np.exp(-(a * x + b)))
        return -0.5 * np.log(np.where(y, p, 1 - p)).sum() + (a - 1) ** 2 / 2 + b**2 / 2

    grid_a, grid_b = np.arange(0.02, 4, 0.02), np.arange(-2, 2, 0.02)
    values = [(loss(a, b), a, b) for a in grid_a for b in grid_b]
    assert loss(scale, bias) <= min(values)[0] + 1e-9
    assert (scale, bias) == pytest.approx(min(values)[1:], abs=0.021)


def test_the_prior_keeps_separated_examples_finite():
    scale, bias = fit_platt([-8.0] * 20 + [8.0] * 20, [0] * 20 + [1] * 20)
    assert 1 <= scale < 1.1 and abs(bias) < 0.1
    assert fit_platt([3.0] * 50 + [-3.0] * 50, [0] * 50 + [1] * 50) == (1.0, 0.0)  # the wrong way round


def test_a_known_temperature_is_recovered():
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 3, (30_000, 5))
    p = np.exp(0.5 * logits)
    truth = (rng.random(len(p))[:, None] > np.cumsum(p / p.sum(axis=1, keepdims=True), axis=1)).sum(axis=1)
    logs = np.log(softmax(logits.astype(np.float32)).astype(np.float64))
    assert fit_temperature(logs, truth) == pytest.approx(0.5, abs=0.015)
    one = calibrate_one(np.exp(logs), truth, np.arange(len(truth)) % 5, list("abcde"))
    assert one.calibration.scale == (pytest.approx(0.5, abs=0.015),) and one.calibration.bias == ()
    assert one.cross_validated.nll < one.before.nll
    assert one.cross_validated.calibration_error < one.before.calibration_error / 5


def test_classes_are_calibrated_one_by_one():
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, (20_000, 3)).astype(np.float32)
    truth = rng.random(logits.shape) < 1 / (1 + np.exp(-(np.array([1, 2, 0.5]) * logits + np.array([0, 1, -1]))))
    truth[:, 2] = False
    truth[:3, 2] = True  # too few to learn from
    labels = ["other", "a", "b", "c"]
    found = calibrate_several(sigmoid(logits), truth, np.arange(len(logits)) % 5, [1, 2, 3], labels)
    assert "b" in found.classes and "c" not in found.classes
    assert found.calibration.scale[2] == pytest.approx(2, abs=0.1) and found.calibration.bias[2] == pytest.approx(
        1, abs=0.1
    )
    assert (found.calibration.scale[0], found.calibration.bias[0]) == (1, 0)
    assert (found.calibration.scale[3], found.calibration.bias[3]) == (1, 0)
    assert (
        found.cross_validated.nll < found.before.nll and found.after.calibration_error < found.before.calibration_error
    )


def test_logits_come_back():
    logits = np.array([-29.0, -5, 0, 3, 10], np.float32)
    np.testing.assert_allclose(logits_of(sigmoid(logits)), logits, atol=2e-3)
    assert logits_of([0.0, 1.0]).tolist() == [-30, 30]


def test_frames_hold_an_event_by_their_middle():
    truth = frame_truth([Event("a", 0.5, 2.4), Event("else", 0, 4)], np.arange(5.0), ["a", "b"])
    assert truth[:, 0].tolist() == [True, True, False, False] and not truth[:, 1].any()


# ------------------------------------------------------------------ in the configuration, and where posteriors are made


def test_posteriors_are_made_of_calibrated_logits():
    logits = np.random.default_rng(0).normal(0, 3, (4, 2)).astype(np.float32)
    plain = tiny_config()
    assert calibrated(logits, plain.calibration.clipwise) is logits
    changed = tiny_config(calibration=CalibrationConfig(LogitCalibration((2.0, 0.5), (1.0, -1.0))))
    np.testing.assert_array_equal(to_posteriors(logits, plain), sigmoid(logits))
    expected = 1 / (1 + np.exp(-(logits.astype(np.float64) * [2, 0.5] + [1, -1])))
    np.testing.assert_allclose(to_posteriors(logits, changed), expected, rtol=1e-5)
    single = tiny_config(objective="single_label", calibration=CalibrationConfig(LogitCalibration((0.5,))))
    np.testing.assert_array_equal(to_posteriors(logits, single), softmax(logits / 2))


def test_the_configuration_is_a_closed_schema():
    config = tiny_config(
        calibration=CalibrationConfig(framewise=LogitCalibration((1.5, 2.0), (0.0, 0.1))),
        operating_points={"high_recall": DecodingConfig(0.2, per_class={"low": {"threshold": 0.1}})},
    )
    assert from_dict(CheckpointConfig, to_dict(config), "x") == config
    old = {k: v for k, v in to_dict(tiny_config()).items() if k not in ("calibration", "operating_points")}
    assert from_dict(CheckpointConfig, old, "x") == tiny_config()
    assert config.decoding_at("high_recall").threshold == 0.2
    with pytest.raises(UsageError, match=r"'high_recal'; did you mean 'high_recall'.; the model has high_recall"):
        config.decoding_at("high_recal")
    with pytest.raises(UsageError, match="the model has none; htsat calibrate"):
        tiny_config().decoding_at("balanced")
    with pytest.raises(ConfigError, match=r"operating point 'a' names the label 'lo' .*did you mean 'low'"):
        tiny_config(operating_points={"a": DecodingConfig(per_class={"lo": {"threshold": 0.1}})})
    with pytest.raises(ConfigError, match="letters, digits and underscores"):
        tiny_config(operating_points={"a b": DecodingConfig()})
    with pytest.raises(ConfigError, match=r"calibration.clipwise has 3 scales and 0 biases for 2 classes"):
        tiny_config(calibration=CalibrationConfig(LogitCalibration((1.0, 1.0, 1.0))))
    with pytest.raises(ConfigError, match="scale must be between"):
        LogitCalibration((0.0,))
