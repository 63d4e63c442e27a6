"""Evaluation: scikit-learn, ``Predictor`` and hand-worked cases are the truth."""

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import RATE, sound, tiny_config, write_checkpoint

from htsat.config import DecodingConfig, InferenceConfig
from htsat.data.clips import Clip, Corpus
from htsat.detection.decoder import decode_events
from htsat.errors import AudioError, CheckpointError, DataError, UsageError
from htsat.evaluation.evaluate import ModelIdentity, fingerprint, has_events, select, summarise
from htsat.evaluation.listen import (
    Heard,
    Listening,
    join_shards,
    posteriors,
    shard,
    shift_offsets,
    waveform_posteriors,
)
from htsat.evaluation.report import html, link, table, to_json
from htsat.evaluation.scores import _Resampled, match_labels, reference_matrix, score_detection, score_tagging
from htsat.events import Event
from htsat.hearing import to_posteriors
from htsat.metrics import tagging
from htsat.metrics.detection import event_based, intersection_based, segment_based
from htsat.metrics.frames import frame_scores
from htsat.metrics.psds import PSDS1, PSDS2, psds_from_scores


def cases(count, seed=0):
    """Random (reference, posteriors), most with ties, some with classes that no clip or every clip has."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        clips, classes = int(random.integers(2, 60)), int(random.integers(2, 8))
        truth = random.random((clips, classes)) < random.random(classes)
        scores = random.random((clips, classes))
        if random.random() < 0.7:
            scores = np.round(scores, int(random.integers(0, 3)))
        yield truth, scores.astype(random.choice([np.float32, np.float64]))


# --- metrics ------------------------------------------------------------------------------------


def test_average_precision_and_roc_area_are_those_of_scikit_learn():
    from sklearn.metrics import average_precision_score, roc_auc_score

    compared = 0
    for truth, scores in cases(300):
        mine, area = tagging.average_precision(truth, scores), tagging.roc_auc(truth, scores)
        theirs = []
        for c in range(truth.shape[1]):
            if not truth[:, c].any():
                assert math.isnan(mine[c]) and math.isnan(area[c])
                continue
            theirs.append(average_precision_score(truth[:, c], scores[:, c]))
            assert mine[c] == pytest.approx(theirs[-1], abs=1e-9)
            if not truth[:, c].all():
                assert area[c] == pytest.approx(roc_auc_score(truth[:, c], scores[:, c]), abs=1e-9)
            compared += 1
        if theirs:
            assert tagging.mean_average_precision(truth, scores) == pytest.approx(np.mean(theirs), abs=1e-9)
    assert compared > 1000


def test_precision_recall_f1_are_those_of_scikit_learn():
    from sklearn.metrics import f1_score, precision_recall_fscore_support

    for truth, scores in cases(100, seed=1):
        chosen = scores >= 0.5
        present = truth.any(axis=0)
        mine = tagging.precision_recall_f1(truth, chosen)
        theirs = precision_recall_fscore_support(truth, chosen, average=None, zero_division=0)
        for a, b in zip(mine, theirs, strict=False):
            np.testing.assert_allclose(a[present], b[present], atol=1e-12)
            assert np.isnan(a[~present]).all()
        if present.any():
            assert tagging.macro_f1(truth, chosen) == pytest.approx(np.mean(theirs[2][present]))
        if truth.any() or chosen.any():
            expected = f1_score(truth, chosen, average="micro", zero_division=0)
            assert tagging.micro_f1(truth, chosen) == pytest.approx(expected)


def test_top_k_accuracy():
    from sklearn.metrics import top_k_accuracy_score

    random = np.random.default_rng(2)
    scores, own = random.random((80, 9)), random.integers(0, 9, 80)
    for k in range(1, 9):
        assert tagging.top_k_accuracy(own, scores, k) == pytest.approx(top_k_accuracy_score(own, scores, k=k))
    tied = np.array([[0.2, 0.4, 0.4]] * 3)  # argmax takes the first of equals
    assert tagging.truth_ranks([0, 1, 2], tied).tolist() == [2, 0, 1]
    assert tagging.top_k_accuracy([0, 1, 2], tied, 1) == tagging.accuracy([0, 1, 2], tied.argmax(axis=1))


def test_brier_score_is_that_of_scikit_learn():
    from sklearn.metrics import brier_score_loss

    for truth, scores in cases(30, seed=3):
        expected = [brier_score_loss(t, s, pos_label=True) for t, s in zip(truth.T, scores.T, strict=True)]
        np.testing.assert_allclose(tagging.brier_score(truth, scores), expected, atol=1e-7)


def test_calibration_by_hand():
    posterior = [0.0, 0.1, 0.1, 0.6, 0.6, 0.6, 0.6, 1.0]
    came_true = [0, 0, 1, 1, 1, 1, 0, 1]
    wide = tagging.calibration_curve(came_true, posterior, bins=2)
    assert wide.count.tolist() == [3, 5]
    np.testing.assert_allclose(wide.posterior, [0.2 / 3, 3.4 / 5])
    np.testing.assert_allclose(wide.frequency, [1 / 3, 4 / 5])
    assert wide.error == pytest.approx(3 / 8 * (0.8 / 3) + 5 / 8 * 0.12)
    # Four of eight are 0.6: equal posteriors are not torn apart, whatever their order.
    mass = tagging.calibration_curve(came_true, posterior, bins=4, binning="equal_mass")
    assert mass.count.tolist() == [1, 2, 5]  # borders 0.1, 0.6 and 0.6 (the third, fifth and seventh of eight)
    turned = tagging.calibration_curve(came_true[::-1], posterior[::-1], bins=4, binning="equal_mass")
    assert turned.error == pytest.approx(mass.error)
    # Distinct posteriors: bins of the same number of clips.
    even = tagging.calibration_curve([0, 1] * 6, np.linspace(0, 1, 12), bins=4, binning="equal_mass")
    assert even.count.tolist() == [3, 3, 3, 3]
    assert tagging.calibration_curve([0, 1, 1], [0.0, 1.0, 1.0]).error == 0
    # 1 is in the last bin and 0 in the first one.
    assert tagging.calibration_curve([0, 1], [0.0, 1.0], bins=10).count.tolist() == [1, 1]


def test_precision_recall_curve_encloses_the_average_precision():
    from sklearn.metrics import precision_recall_curve

    for truth, scores in cases(50, seed=4):
        if not truth[:, 0].any():
            continue
        recall, precision = tagging.precision_recall_curve(truth[:, 0], scores[:, 0])
        their_precision, their_recall, _ = precision_recall_curve(truth[:, 0], scores[:, 0])
        np.testing.assert_allclose(recall, their_recall[-2::-1])
        np.testing.assert_allclose(precision, their_precision[-2::-1])
        area = np.sum(np.diff(recall, prepend=0) * precision)
        assert area == pytest.approx(tagging.average_precision(truth, scores)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tagging.top_k_accuracy([0], [[0.5, 0.5]], 0), "k must be at least 1"),
        (lambda: tagging.truth_ranks([2], [[0.5, 0.5]]), "class index 2"),
        (lambda: tagging.truth_ranks([0], [[0.5, math.nan]]), "NaN"),
        (lambda: tagging.calibration_curve([1], [1.5]), r"posteriors in \[0, 1\]"),
        (lambda: tagging.calibration_curve([1, 0], [0.5]), "same length"),
        (lambda: tagging.calibration_curve([1], [0.5], bins=0), "at least 1 bin"),
        (lambda: tagging.precision_recall_curve([0], [0.5]), "no positive clip"),
        (lambda: tagging.precision_recall_f1([[1]], [[2]]), "0 and 1"),
    ],
)
def test_metrics_refuse_what_makes_no_sense(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- scores -------------------------------------------------------------------------------------

LABELS = ("a", "b", "c", "d", "e", "f", "g")


def single(clips=60, seed=5, labels=LABELS):
    random = np.random.default_rng(seed)
    truth = np.eye(len(labels), dtype=bool)[random.integers(0, len(labels), clips)]
    scores = random.random((clips, len(labels))) + truth * 0.6
    return truth, scores / scores.sum(axis=1, keepdims=True)


def test_single_label_scores():
    truth, scores = single()
    result = score_tagging(LABELS, "single_label", truth, scores)
    own, chosen = truth.argmax(axis=1), scores.argmax(axis=1)
    assert result.figures["accuracy"] == np.mean(own == chosen)
    assert result.figures["top_5_accuracy"] == tagging.top_k_accuracy(own, scores, 5)
    assert result.figures["brier_score"] == pytest.approx(np.mean(np.sum((scores - truth) ** 2, axis=1)))
    expected = tagging.calibration_curve(own == chosen, scores.max(axis=1)).error
    assert result.figures["calibration_error_equal_width"] == pytest.approx(expected)
    assert np.trace(result.confusion) == np.sum(own == chosen)
    assert result.labels == LABELS
    assert (result.threshold, result.intervals, result.without_positives) == (None, {}, ())


def test_classes_without_clips_are_named_and_in_no_mean():
    truth = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1]], dtype=bool)
    scores = np.array([[0.9, 0.8, 0.7], [0.1, 0.2, 0.6], [0.05, 0.1, 0.9]])
    result = score_tagging(("a", "b", "c"), "multi_label", truth, scores)
    assert (result.without_positives, result.without_negatives) == (("b",), ("c",))
    assert math.isnan(result.per_class["b"].average_precision) and math.isnan(result.per_class["b"].f1)
    # a: hits at ranks 1 and 3
    assert result.per_class["a"].average_precision == pytest.approx((1 + 2 / 3) / 2)
    assert result.figures["mean_average_precision"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    assert result.figures["mean_roc_auc"] == pytest.approx(0.5)
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["per_class"]["b"]["average_precision"] is None
    assert values["classes_without_positives"] == ["b"]


@pytest.mark.parametrize("objective", ["single_label", "multi_label"])
def test_a_resample_scores_like_clips_repeated(objective):
    random = np.random.default_rng(6)
    if objective == "single_label":
        truth, scores = single(40)
    else:
        truth, scores = random.random((40, 7)) < 0.2, np.round(random.random((40, 7)), 1)
    truth[:, 3] = False if objective == "multi_label" else truth[:, 3]
    given = scores == scores.max(axis=1, keepdims=True) if objective == "single_label" else scores >= 0.5
    weights = np.stack([np.bincount(random.integers(0, 40, 40), minlength=40) for _ in range(5)]).astype(float)
    found = _Resampled(truth, scores, given, objective == "single_label")(weights)
    for row, counts in enumerate(weights.astype(int)):
        again = score_tagging(LABELS, objective, np.repeat(truth, counts, 0), np.repeat(scores, counts, 0)).figures
        assert found.keys() == {name for name in again if "calibration" not in name}
        for name, values in found.items():
            assert values[row] == pytest.approx(again[name], nan_ok=True), name


def test_intervals():
    truth, scores = single(400, seed=7)
    result = score_tagging(LABELS, "single_label", truth, scores, bootstrap=2000, seed=1)
    p = result.figures["accuracy"]
    half = 1.96 * math.sqrt(p * (1 - p) / 400)  # of the binomial distribution
    assert result.intervals["accuracy"] == pytest.approx((p - half, p + half), abs=0.01)
    for name, (low, high) in result.intervals.items():
        assert low <= result.figures[name] <= high
    again = score_tagging(LABELS, "single_label", truth, scores, bootstrap=2000, seed=1)
    assert again.intervals == result.intervals
    other = score_tagging(LABELS, "single_label", truth, scores, bootstrap=2000, seed=2)
    assert other.intervals != result.intervals
    # Perfect answers stay perfect in every resample.
    perfect = score_tagging(LABELS, "single_label", truth, truth.astype(float), bootstrap=50)
    assert perfect.intervals["accuracy"] == (1, 1)
    assert perfect.intervals["d_prime"] == (math.inf, math.inf)
    assert perfect.to_dict()["intervals"]["d_prime"] == [None, None]


def test_score_tagging_refuses():
    truth, scores = single(10)
    with pytest.raises(ValueError, match=r"\(num_clips, 7\)"):
        score_tagging(LABELS, "single_label", truth[:, :6], scores)
    with pytest.raises(DataError, match="clip 0 has 0 labels"):
        score_tagging(LABELS, "single_label", np.zeros_like(truth), scores)
    with pytest.raises(UsageError, match="bootstrap"):
        score_tagging(LABELS, "single_label", truth, scores, bootstrap=-1)


def detections(seed=8, files=40):
    random = np.random.default_rng(seed)
    reference, estimated = {}, {}
    for i in range(files):
        events = []
        for label in random.choice(["dog", "cat"], int(random.integers(0, 4))):
            onset = float(random.uniform(0, 8))
            events.append(Event(str(label), onset, onset + float(random.uniform(0.3, 2))))
        reference[f"{i}.wav"] = events
        moved = [Event(e.event_label, e.onset + 0.1, e.offset + float(random.uniform(0, 0.5))) for e in events]
        estimated[f"{i}.wav"] = [e for e in moved if random.random() < 0.8] + ([Event("cat", 9, 9.5)] if i % 5 else [])
    return reference, estimated


def test_score_detection():
    reference, estimated = detections()
    result = score_detection(reference, estimated, ("cat", "dog", "owl"), bootstrap=300)
    assert result.intersection == intersection_based(reference, estimated, labels=("cat", "dog", "owl"))
    assert result.event_based == event_based(reference, estimated)
    assert result.segment_based == segment_based(reference, estimated)
    assert result.without_reference == ("owl",)
    for name, scores in result.by_metric.items():
        low, high = result.intervals[name]
        assert low < scores.macro_f1 < high
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["event_based"]["macro_f1"] == result.event_based.macro_f1
    assert values["intersection"]["per_class"]["dog"]["tp"] == result.intersection.per_class["dog"].tp
    # One file: every resample is that file.
    one = {"0.wav": [Event("dog", 0, 1), Event("cat", 2, 3)]}
    alone = score_detection(one, {"0.wav": [Event("dog", 0, 1)]}, ("cat", "dog"), bootstrap=5)
    assert alone.intervals == {"intersection": (0.5, 0.5), "event_based": (0.5, 0.5), "segment_based": (0.5, 0.5)}


def test_labels_are_matched_by_name():
    assert match_labels(("a", "b", "c"), ("c", "a")) == [2, 0]
    with pytest.raises(DataError, match=r"esc: .*lacks 2 of the 3 labels: 'dgo'; did you mean 'dog'\?; 'zzz'; rename"):
        match_labels(("dog", "cat"), ("dgo", "cat", "zzz"), "esc")
    clips = [Clip(Path("x.wav"), ("b",)), Clip(Path("y.wav"), ("a", "b")), Clip(Path("z.wav"), ())]
    assert reference_matrix(clips, ("a", "b")).astype(int).tolist() == [[0, 1], [1, 1], [0, 0]]
    with pytest.raises(DataError, match=r"x.wav: its label 'b' is not a class"):
        reference_matrix(clips, ("a",))


# --- listening ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def waveforms():
    lengths = (0.4, 3.0, 10.0, 5.0, 23.7, 10.0)
    return [sound(s, [("low", 0, s / 2), ("high", s / 3, s)], seed=i) for i, s in enumerate(lengths)]


@pytest.fixture(scope="module")
def network(tiny_checkpoint):
    from htsat.model.runtime import load_model

    return load_model(tiny_checkpoint)


def other_network(folder, seed=1, **settings):
    from htsat.model.runtime import load_model

    return load_model(write_checkpoint(folder / f"other{seed}.safetensors", tiny_config(**settings), seed))


def all_posteriors(models, waveforms, **settings):
    return np.stack([heard.posteriors for heard in waveform_posteriors(models, waveforms, Listening(**settings))])


@pytest.mark.parametrize("fit", ["pad", "tile", "native"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_clips_get_what_a_predictor_gives(network, tiny_checkpoint, waveforms, fit, batch_size):
    from htsat.predict import Predictor

    predictor = Predictor(tiny_checkpoint, device="cpu", inference=InferenceConfig(short=fit))
    listening = Listening(fit=fit, batch_size=batch_size, events=True)
    found = list(waveform_posteriors([network], waveforms, listening))
    assert len(found) == len(waveforms)
    for waveform, heard in zip(waveforms, found, strict=True):
        expected = predictor.predict((waveform, RATE), spectrogram=False)
        np.testing.assert_array_equal(heard.posteriors, expected.clipwise_posteriors)
        assert list(heard.events) == expected.events
        assert (heard.duration, heard.failure) == (expected.duration, None)
        assert heard.framewise.dtype == np.float32
        np.testing.assert_array_equal(heard.framewise, expected.framewise_posteriors)
        np.testing.assert_array_equal(heard.boundaries, expected.frame_boundaries)
    assert any(heard.events for heard in found)


def test_single_label_posteriors_add_up_to_one(tmp_path, waveforms):
    model = other_network(tmp_path, objective="single_label")
    np.testing.assert_allclose(all_posteriors([model], waveforms[:2]).sum(axis=1), 1, rtol=1e-6)


def test_shifts_are_the_published_ones(network, waveforms):
    assert shift_offsets(10) == (0, 100, 300, 600, 1000, 1500, 2100, 2800, 3600, 4500)
    moved = list(waveforms[:2])
    total = np.zeros((2, 2))
    for i in range(4):  # as published: the moved waveform is moved again
        total += all_posteriors([network], moved)
        step = 100 * (i + 1)
        moved = [np.concatenate([waveform[step:], waveform[:step]]) for waveform in moved]
    np.testing.assert_allclose(all_posteriors([network], waveforms[:2], shifts=4), total / 4, rtol=1e-6)


@pytest.mark.parametrize("fit", ["stretch", "repeat"])
def test_published_fits(network, waveforms, fit):
    import torch

    short = [waveforms[1], waveforms[3]]
    found = all_posteriors([network], short, fit=fit, batch_size=2)
    for waveform, values in zip(short, found, strict=True):
        with torch.inference_mode():
            expected = network(torch.from_numpy(waveform)[None], fit).clipwise_logits.sigmoid()[0].numpy()
        np.testing.assert_allclose(values, expected, rtol=1e-6)
    # A full chunk is the same by every fit, a longer clip is cut into chunks.
    np.testing.assert_allclose(
        all_posteriors([network], [waveforms[2], waveforms[4]], fit=fit),
        all_posteriors([network], [waveforms[2], waveforms[4]]), atol=1e-6,
    )  # fmt: skip
    with pytest.raises(UsageError, match="distorts time"):
        Listening(fit=fit, events=True)
    tiny = next(waveform_posteriors([network], [np.zeros(20, np.float32)], Listening(fit=fit)))
    assert "waveform 0: has 20 samples" in tiny.failure and np.isnan(tiny.posteriors).all()


def test_ensembles(network, tmp_path, waveforms):
    import torch

    second = other_network(tmp_path, seed=1)
    swapped = other_network(tmp_path, seed=2, labels=("high", "low"))
    alone = [all_posteriors([model], waveforms) for model in (network, second, swapped)]
    alone[2] = alone[2][:, ::-1]  # classes are matched by name
    np.testing.assert_allclose(all_posteriors([network, second, swapped], waveforms), np.mean(alone, 0), rtol=1e-6)
    whole = waveforms[2]
    with torch.inference_mode():
        logits = [model(torch.from_numpy(whole)[None]).clipwise_logits[0].numpy() for model in (network, second)]
    expected = to_posteriors(np.mean(logits, axis=0), network.checkpoint)
    np.testing.assert_allclose(all_posteriors([network, second], [whole], ensemble="logits")[0], expected, rtol=1e-5)
    # One model, one pass: both means are what it says.
    np.testing.assert_array_equal(all_posteriors([network], waveforms, ensemble="logits"), alone[0])
    together = list(waveform_posteriors([network, network], waveforms, Listening(events=True)))
    single_model = list(waveform_posteriors([network], waveforms, Listening(events=True)))
    assert [heard.events for heard in together] == [heard.events for heard in single_model]
    members = [list(waveform_posteriors([m], waveforms, Listening(events=True))) for m in (network, swapped)]
    for heard, one, other in zip(
        waveform_posteriors([network, swapped], waveforms, Listening(events=True)), *members, strict=True
    ):
        np.testing.assert_allclose(heard.framewise, (one.framewise + other.framewise[:, ::-1]) / 2, rtol=1e-6)


def test_models_that_do_not_go_together(network, tmp_path, waveforms):
    others = {
        "other labels": other_network(tmp_path, seed=3, labels=("low", "hihg")),
        "single_label, the first multi_label": other_network(tmp_path, seed=4, objective="single_label"),
        "one sample rate": other_network(tmp_path, seed=5, sample_rate=16000),
    }
    for message, model in others.items():
        with pytest.raises(UsageError, match=message):
            list(waveform_posteriors([network, model], waveforms[:1]))
    with pytest.raises(UsageError, match="no model"):
        list(waveform_posteriors([], waveforms[:1]))
    for settings in ({"fit": "squeeze"}, {"shifts": 0}, {"batch_size": 0}, {"ensemble": "sum"}):
        with pytest.raises(UsageError):
            Listening(**settings)


def test_a_model_in_training_goes_on_training(network, waveforms):
    network.train()
    try:
        expected = all_posteriors([network], waveforms[:1])
        assert network.training
    finally:
        network.eval()
    np.testing.assert_array_equal(all_posteriors([network], waveforms[:1]), expected)


class MemoryReader:
    """Reads clips from a dictionary: name -> waveform at ``RATE``, or an error."""

    def __init__(self, found, sample_rate=RATE):
        self.found, self.sample_rate = found, sample_rate

    def __call__(self, sample_rate):
        return MemoryReader(self.found, sample_rate)

    def read(self, clip):
        waveform = self.found[clip.path.name]
        if isinstance(waveform, Exception):
            raise waveform
        return np.repeat(waveform, self.sample_rate // RATE)


def test_clips_that_cannot_be_heard_do_not_stop_the_others(network, waveforms):
    found = {
        "a.wav": waveforms[1],
        "b.wav": AudioError("b.wav: is no recording"),
        "c.wav": np.full(RATE, np.nan, np.float32),
        "d.wav": waveforms[3],
    }
    clips = [Clip(Path(name), ("low",)) for name in found]
    done = []
    heard = list(posteriors([network], clips, MemoryReader(found), Listening(batch_size=3), on_progress=done.append))
    assert done == [1, 2, 3, 4]
    assert [one.failure is None for one in heard] == [True, False, False, True]
    assert heard[1].failure == "b.wav: is no recording"
    assert "c.wav: the model's answer is not a number" in heard[2].failure
    expected = all_posteriors([network], [waveforms[1], waveforms[3]])
    np.testing.assert_array_equal([heard[0].posteriors, heard[3].posteriors], expected)
    assert all(one.framewise is None for one in heard)


def test_framewise_posteriors_are_kept_where_events_are_known(network, waveforms):
    found = {"a.wav": waveforms[1], "b.wav": waveforms[3], "c.wav": waveforms[0]}
    known = ((Event("low", 0.0, 1.0),), None, ())
    clips = [Clip(Path(name), ("low",), events) for name, events in zip(found, known, strict=True)]
    heard = list(posteriors([network], clips, MemoryReader(found), Listening(events=True)))
    assert [one.framewise is not None and one.boundaries is not None for one in heard] == [True, False, True]
    assert heard[1].events is not None


def test_an_operating_point_is_that_of_the_first_model(tmp_path, waveforms):
    low, high = DecodingConfig(threshold=0.3), DecodingConfig(threshold=0.8)
    first = other_network(tmp_path, seed=7, operating_points={"high_recall": low, "high_precision": high})
    second = other_network(tmp_path, seed=8)
    at = {}
    for name in (None, "high_recall", "high_precision"):
        listening = Listening(events=True, operating_point=name)
        heard = list(waveform_posteriors([first, second], waveforms, listening))
        decoding = {"high_recall": low, "high_precision": high}.get(name, DecodingConfig())
        for one in heard:
            assert list(one.events) == decode_events(one.framewise, one.boundaries, ("low", "high"), decoding)
        at[name] = [one.events for one in heard]
    assert at["high_recall"] != at[None] != at["high_precision"]
    with pytest.raises(UsageError, match=r"unknown operating point 'high_recal'.*did you mean 'high_recall'"):
        list(waveform_posteriors([first], waveforms, Listening(events=True, operating_point="high_recal")))
    with pytest.raises(UsageError, match="thresholds of its own"):
        Listening(events=True, classes="desed-published", decoding="published", operating_point="high_recall")


def test_ensemble_of_two_rates(network, tmp_path, waveforms):
    second = other_network(tmp_path, seed=6, sample_rate=16000)
    clips, found = [Clip(Path("a.wav"), ("low",))], {"a.wav": waveforms[2]}
    heard = next(posteriors([network, second], clips, MemoryReader(found)))
    doubled = all_posteriors([second], [np.repeat(waveforms[2], 2)])
    expected = (all_posteriors([network], [waveforms[2]]) + doubled) / 2
    np.testing.assert_allclose([heard.posteriors], expected, rtol=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("count", [0, 1, 5, 6, 17])
def test_shards_hold_each_clip_once(world, count):
    parts = [list(shard(count, rank, world)) for rank in range(world)]
    assert sorted(i for part in parts for i in part) == list(range(count))
    assert join_shards(parts) == list(range(count))


def test_processes_together_give_the_bits_of_one(network, waveforms):
    whole = all_posteriors([network], waveforms)
    parts = []
    for rank in range(4):
        mine = [waveforms[i] for i in shard(len(waveforms), rank, 4)]
        parts.append([heard.posteriors for heard in waveform_posteriors([network], mine, Listening(batch_size=2))])
    np.testing.assert_array_equal(join_shards(parts), whole)
    with pytest.raises(UsageError, match="rank of 0 to 1"):
        shard(3, 2, 2)
    with pytest.raises(ValueError, match="expected parts"):
        join_shards([[1], [2, 3]])


def timed_corpus(waveforms):
    """Clips with events of two classes, of which the second one is the model's first; the last clip has none."""
    clips = []
    for i, waveform in enumerate(waveforms):
        whole = len(waveform) / RATE
        events = [
            Event("high", 0.1 * whole, 0.9 * whole),
            Event("low", 0.0, 0.4 * whole),
            Event("low", 0.5 * whole, whole),
        ]
        kept = tuple(events[: (0 if i == len(waveforms) - 1 else 1 + i % 3)])
        clips.append(Clip(Path(f"/data/set/{i}.wav"), tuple({e.event_label for e in kept}), kept))
    return corpus_of(clips, ("high", "low"), "multi_label")


def test_scores_at_all_thresholds(network, tiny_checkpoint, waveforms):
    """The metrics themselves, on what ``Predictor`` says; the same from several processes, bit by bit."""
    from htsat.predict import Predictor

    corpus = timed_corpus(waveforms)
    listening = Listening(events=True)
    one_model = [ModelIdentity("m", "m", "", ("low", "high"), "multi_label")]
    found = dict(zip((clip.path.name for clip in corpus.clips), waveforms, strict=True))
    shards = []
    for rank in range(3):
        mine = [corpus.clips[i] for i in shard(len(found), rank, 3)]
        shards.append(list(posteriors([network], mine, MemoryReader(found), listening)))
    texts = set()
    for heard in (list(posteriors([network], corpus.clips, MemoryReader(found), listening)), join_shards(shards)):
        evaluation = summarise(corpus, heard, one_model, listening, bootstrap=20)
        texts.add(to_json(evaluation))
    assert len(texts) == 1

    predictor = Predictor(tiny_checkpoint, device="cpu")
    said = {str(c.path): predictor.predict((found[c.path.name], RATE), spectrogram=False) for c in corpus.clips}
    scores = {name: (one.framewise_posteriors, one.frame_boundaries) for name, one in said.items()}
    reference = {str(clip.path): clip.events for clip in corpus.clips}
    durations = {name: one.duration for name, one in said.items()}
    values = json.loads(texts.pop())["detection"]
    for name, settings in (("psds1", PSDS1), ("psds2", PSDS2)):
        expected = psds_from_scores(reference, scores, ("low", "high"), durations, settings)
        assert values[name]["value"] == expected.value
        assert values[name]["per_class"] == expected.per_class and set(expected.per_class) == {"low", "high"}
        assert values[name]["settings"] == dataclasses.asdict(settings)
    assert any(values["psds2"]["per_class"].values())
    frames, level = frame_scores(reference, scores, ("low", "high")), values["frame_level"]
    assert level["mean_average_precision"] == pytest.approx(frames.mean_average_precision)
    assert level["mean_roc_auc"] == pytest.approx(frames.mean_roc_auc)
    for index, label in enumerate(("low", "high")):
        assert level["per_class"][label]["average_precision"] == frames.average_precision[index]
        assert level["per_class"][label]["roc_auc"] == frames.roc_auc[index]
    assert level["frame_seconds"] == 0.3125

    for text in (table(evaluation), html(evaluation, Path("/data"))):
        assert "PSDS1 (DTC = GTC = 0.7)" in text and "PSDS2 (DTC = GTC = 0.1)" in text
        assert "DTC = GTC = 0.7, CTTC 0.3, alpha_CT 0, alpha_ST 1, 100 false positives an hour" in text
        assert "DTC = GTC = 0.1, CTTC 0.3, alpha_CT 0.5, alpha_ST 1, 100 false positives an hour" in text
        assert "before filters" in text and "frames of 312.5 ms" in text
        assert f"{values['psds2']['value']:.4f}" in text and f"{level['mean_average_precision']:.4f}" in text
        assert "event-based error rate (200 ms collars, 20 %)" in text
        assert f"{values['event_based']['overall']['error_rate']:.4f}" in text
    micro = re.search(r"intersection-based F1 .*, micro +(\S+) +(\S+) to (\S+)", table(evaluation))
    low, high = values["intersection"]["micro_f1_interval"]
    assert micro.groups() == tuple(f"{v:.4f}" for v in (values["intersection"]["micro_f1"], low, high))
    Structure(html(evaluation, Path("/data")))

    # Scores that models are chosen by leave them out, and so do clips without framewise posteriors.
    without = summarise(corpus, heard, one_model, listening, all_thresholds=False)
    bare = [dataclasses.replace(one, framewise=None, boundaries=None) for one in heard]
    for evaluation in (without, summarise(corpus, bare, one_model, listening)):
        values = evaluation.to_dict()["detection"]
        assert not {"psds1", "psds2", "frame_level"} & values.keys() and "PSDS" not in table(evaluation)


def test_posteriors_and_their_durations_go_together():
    reference = {"a": [Event("dog", 0.0, 1.0)], "b": []}
    scores = {"a": ([[0.9], [0.1]], [0.0, 1.0, 2.0]), "b": ([[0.2], [0.3]], [0.0, 1.0, 2.0])}
    report = score_detection(reference, reference, ("dog",), durations={"a": 2.0, "b": 2.0}, scores=scores)
    # The event is found above 0.3, before any false alarm.
    assert (report.psds1.value, report.psds2.value, report.frames.mean_average_precision) == (1, 1, 1)
    with pytest.raises(UsageError, match="have no duration"):
        score_detection(reference, reference, ("dog",), scores=scores)
    with pytest.raises(UsageError, match=r"num_frames, 2"):
        score_detection(reference, reference, ("dog", "cat"), durations={"a": 2.0, "b": 2.0}, scores=scores)
    assert score_detection(reference, reference, ("dog",)).psds == {}


# --- averages of weights ------------------------------------------------------------------------


def test_average_of_checkpoints(tmp_path):
    from htsat.model.average import average_checkpoints
    from htsat.model.checkpoint import load_checkpoint, save_checkpoint

    paths = [write_checkpoint(tmp_path / f"{seed}.safetensors", tiny_config(), seed) for seed in range(3)]
    model = average_checkpoints(paths)
    states = [load_checkpoint(path)[0].state_dict() for path in paths]
    for name, tensor in model.state_dict().items():
        stacked = np.stack([state[name].numpy() for state in states])
        if tensor.is_floating_point():
            np.testing.assert_allclose(tensor.numpy(), stacked.astype(np.float64).mean(axis=0), rtol=1e-6, atol=1e-9)
            assert str(tensor.dtype) == "torch.float32"
        else:
            np.testing.assert_array_equal(tensor.numpy(), stacked[0])
    assert model.labels == ("low", "high") and not model.training
    assert model.checkpoint.provenance["average_of"] == [str(path) for path in paths]
    # Weights that agree stay as they are, bit for bit, and the result is a checkpoint like any other.
    same = average_checkpoints([paths[0]] * 3)
    for name, tensor in same.state_dict().items():
        assert tensor.equal(states[0][name]), name
    save_checkpoint(tmp_path / "mean.safetensors", model, model.checkpoint)
    assert load_checkpoint(tmp_path / "mean.safetensors")[1] == model.checkpoint


def test_checkpoints_that_cannot_be_averaged(tmp_path):
    from htsat.model.average import average_checkpoints

    first = write_checkpoint(tmp_path / "first.safetensors", tiny_config())
    for message, settings in {
        r"label 1 is 'hihg' instead of 'high'": {"labels": ("low", "hihg")},
        r"model.num_classes is 1 instead of 2": {"labels": ("low",)},
        r"objective is single_label instead of multi_label": {"objective": "single_label"},
        r"frontend.sample_rate is 16000 instead of 8000": {"sample_rate": 16000},
    }.items():
        other = write_checkpoint(tmp_path / "other.safetensors", tiny_config(**settings))
        with pytest.raises(CheckpointError, match=f"other.safetensors: cannot be averaged .*{message}"):
            average_checkpoints([first, other])
    with pytest.raises(UsageError, match="no checkpoints"):
        average_checkpoints([])


# --- evaluation and reports ---------------------------------------------------------------------

NASTY = '<script>alert("x")</script>'


def identity(labels):
    return ModelIdentity(f"model {NASTY}", f"/models/{NASTY}.safetensors", "ab" * 32, tuple(labels), "multi_label")


def corpus_of(clips, labels, objective, folder=Path("/data/set")):
    return Corpus("csv", folder, tuple(labels), objective, tuple(clips))


def evaluated(objective="single_label", labels=("a", NASTY, "c & d"), clips=12, failing=1, **settings):
    """An evaluation of random posteriors; the model has one class more than the data."""
    random = np.random.default_rng(9)
    made, heard = [], []
    for i in range(clips):
        own = (labels[i % 2],) if objective == "single_label" else labels[: i % 3]
        events = None if objective == "single_label" else tuple(Event(label, 1.0, 2.0) for label in own)
        made.append(Clip(Path(f'/data/set/audio/{i} "{NASTY}" %23#ü.wav'.replace("/script", "script")), own, events))
        values = random.random(len(labels) + 1).astype(np.float32)
        found = None if events is None else tuple(e for e in events if random.random() < 0.7)
        heard.append(Heard(values, found, 10.0))
    for i in range(failing):
        heard[i] = Heard(np.full(len(labels) + 1, np.nan, np.float32), failure=f"{made[i].path}: broken")
    corpus = corpus_of(made, labels, objective)
    models = [identity(("other", *labels))]
    return summarise(corpus, heard, models, Listening(), part="fold 4", **settings)


def test_summarise_takes_the_classes_of_the_data_by_name():
    evaluation = evaluated(bootstrap=20)
    assert evaluation.posteriors.shape == (11, 3)
    random = np.random.default_rng(9)
    first = [random.random(4).astype(np.float32) for _ in range(2)][1]
    np.testing.assert_array_equal(evaluation.posteriors[0], first[1:])
    assert evaluation.tagging.num_clips == 11
    assert [reason for _, reason in evaluation.failures] == [f"{evaluation.corpus.clips[0].path}: broken"]
    assert evaluation.tagging.without_positives == ("c & d",)
    text = table(evaluation)
    assert "the data has 3 of the model's 4 classes" in text
    assert "1 of 3 labels no clip has; they are in no mean: c & d" in text
    assert "11 of 12 clips" in text
    with pytest.raises(DataError, match=r"none of its 12 clips can be scored; the first: .*broken"):
        evaluated(failing=12)
    with pytest.raises(DataError, match="lacks 1 of the 1 labels: 'othr'; did you mean 'other'"):
        summarise(corpus_of([], ("othr",), "single_label"), [], [identity(("other",))], Listening())


def test_worst_mistakes_come_first():
    labels = ("a", "b")
    clips = [Clip(Path(f"/data/set/{i}.wav"), ("a",)) for i in range(4)]
    said = [(0.9, 0.1), (0.35, 0.5), (0.1, 0.95), (0.3, 0.6)]
    heard = [Heard(np.array(values, np.float32)) for values in said]
    found = summarise(corpus_of(clips, labels, "single_label"), heard, [identity(labels)], Listening()).mistakes(2)
    assert [(m.clip.path.name, m.truth, m.given) for m in found] == [("2.wav", "a", "b"), ("3.wav", "a", "b")]
    assert found[0].probability == pytest.approx(0.95) and found[0].true_probability == pytest.approx(0.1)
    several = summarise(corpus_of(clips, labels, "multi_label"), heard, [identity(labels)], Listening()).mistakes(99)
    assert [(m.clip.path.name, m.truth, m.missed) for m in several] == [
        ("2.wav", "b", False), ("2.wav", "a", True), ("3.wav", "a", True),
        ("1.wav", "a", True), ("3.wav", "b", False), ("1.wav", "b", False),
    ]  # fmt: skip


class Structure(HTMLParser):
    """Checks that what is opened is closed, and collects what a browser would load or run."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.tags, self.data = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.data.append(data)


@pytest.mark.parametrize("objective", ["single_label", "multi_label"])
def test_report_is_whole_and_safe(objective):
    evaluation = evaluated(objective, bootstrap=20)
    text = html(evaluation, Path("/data/reports"))
    page = Structure(text)
    assert "script" not in page.tags and "<script" not in text
    assert NASTY in "".join(page.data)
    # Nothing is loaded but the recordings beside it.
    assert page.addresses and all(address.startswith("../set/audio/") for address in page.addresses)
    assert {"audio", "svg", "table"} <= set(page.tags)
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == (4 if objective == "single_label" else 3)
    for picture in pictures:
        ElementTree.fromstring(picture)
    assert "nan" not in "".join(pictures)
    assert "could not be scored" in text
    assert ("intersection-based F1" in text) == (objective == "multi_label")
    values = json.loads(to_json(evaluation))
    assert values["data"]["clips"] == 12 and len(values["unreadable"]) == 1
    assert (values["detection"] is None) == (objective == "single_label")


def test_report_of_many_classes_stays_small():
    labels = [f"class {i}" for i in range(300)]
    random = np.random.default_rng(10)
    clips = [Clip(Path(f"/data/set/{i}.wav"), (labels[i % 250],)) for i in range(600)]
    heard = [Heard(random.random(300).astype(np.float32)) for _ in clips]
    text = html(summarise(corpus_of(clips, labels, "single_label"), heard, [identity(labels)], Listening()), Path("/"))
    Structure(text)
    assert len(text) < 1_000_000
    assert "the 60 classes with the most clips" in text and "was taken for" in text


def test_links_find_the_recording(tmp_path):
    import urllib.parse
    import urllib.request

    path = tmp_path / "audio" / "a #1 100% ü?.wav"
    path.parent.mkdir()
    path.write_bytes(b"here")
    folder = tmp_path / "reports"
    address = link(Clip(path, ()), folder)
    assert ":" not in address
    whole = urllib.parse.urljoin(folder.as_uri() + "/", address)
    with urllib.request.urlopen(whole) as found:
        assert found.read() == b"here"


def test_a_row_of_a_packed_file_has_no_player():
    clips = [dataclasses.replace(Clip(Path("/data/set/all.h5"), ("a",)), index=i) for i in range(2)]
    heard = [Heard(np.array([0.1, 0.9], np.float32)) for _ in clips]
    labels = ("a", "b")
    evaluation = summarise(corpus_of(clips, labels, "single_label"), heard, [identity(labels)], Listening())
    text = html(evaluation, Path("/data"))
    assert "<audio" not in text and "all.h5 row 1" in text


def test_selecting_parts_of_a_corpus():
    def clip(name, folds=(), split=None):
        return Clip(Path(f"/data/set/{name}"), ("a",), folds=frozenset(folds), split=split)

    corpus = corpus_of([clip("1", {1}), clip("2", {2}), clip("12", {1, 2}), clip("3", {3})], "a", "single_label")
    names = lambda corpus: [c.path.name for c in corpus.clips]  # noqa: E731
    assert names(select(corpus)) == ["1", "2", "12", "3"]
    assert names(select(corpus, folds=[1])) == ["1"]  # the mixture also holds what is of fold 2
    assert names(select(corpus, folds=[1, 2])) == ["1", "2", "12"]
    with pytest.raises(UsageError, match="no clip of fold 7; it has folds 1, 2, 3"):
        select(corpus, folds=[7])
    with pytest.raises(UsageError, match="no clip of the split 'test'; it has none"):
        select(corpus, "test")
    parted = corpus_of([clip("1", split="train"), clip("2", split="test")], "a", "single_label")
    assert names(select(parted, "test")) == ["2"]
    with pytest.raises(UsageError, match=r"'tset'; it has test, train; did you mean 'test'\?"):
        select(parted, "tset")
    assert fingerprint(corpus) != fingerprint(select(corpus, folds=[1]))
    moved = corpus_of(
        [dataclasses.replace(c, path=Path("/b") / c.path.name) for c in corpus.clips], "a", "single_label", Path("/b")
    )
    assert fingerprint(corpus) == fingerprint(moved)


def test_events_are_scored_where_they_say_what_sounds_when():
    timed = [Clip(Path("/x.wav"), ("a",), (Event("a", 0, 1),))]
    assert has_events(corpus_of(timed, "a", "multi_label"))
    assert not has_events(corpus_of(timed, "a", "single_label"))
    assert not has_events(corpus_of([Clip(Path("/x.wav"), ("a",))], "a", "multi_label"))
