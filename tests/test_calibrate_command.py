"""``htsat calibrate`` from recordings to a checkpoint that detects better, and what it says on the way."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from conftest import TONES, sound, tiny_config, write_checkpoint, write_sound

from htsat.config import CalibrationConfig, DecodingConfig, LogitCalibration
from htsat.errors import CheckpointError
from htsat.model.checkpoint import load_checkpoint, read_config, read_header, with_config


def write_scenes(folder, count=14, times=True):
    """Recordings of 10 s with one or two tones of 2.5 s at whole tokens, and their tables."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        starts = 0.3125 * rng.integers([0, 16], [7, 24])
        events = [(label, float(s), float(s) + 2.5) for label, s in zip(TONES, starts, strict=True)]
        events = events[: 1 + i % 2] if i % 3 else events[::-1][:1]
        write_sound(folder / "audio" / f"s{i:02d}.wav", 10.0, events, sample_rate=8000)
        rows += [(f"s{i:02d}.wav", onset, offset, label) for label, onset, offset in events]
    with (folder / "strong.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("filename", "onset", "offset", "event_label"), *rows])
    return folder


@pytest.fixture
def badly_set(tmp_path):
    """A model whose thresholds hear nothing: its posteriors are 0.9975 at most."""
    return write_checkpoint(tmp_path / "badly.safetensors", tiny_config(decoding=DecodingConfig(0.999)))


def test_from_recordings_to_a_checkpoint_that_detects(command, badly_set, tmp_path):
    data, out = write_scenes(tmp_path / "scenes"), tmp_path / "tuned.safetensors"
    before = badly_set.read_bytes()
    code, printed, told = command("calibrate", badly_set, data, "--out", out, model=None)
    assert (code, told) == (0, [])
    assert "not test figures" in printed and "event_based macro F1: 0.0000 before, 1.0000 after" in printed
    assert badly_set.read_bytes() == before
    config = read_config(out)
    assert list(config.operating_points) == ["high_precision", "balanced", "high_recall"]
    assert config.decoding == config.operating_points["balanced"]
    assert config.calibration.framewise and config.calibration.clipwise
    told_of = config.provenance["calibration"]
    assert told_of["data"]["clips"] == 14 and len(told_of["data"]["fingerprint"]) == 64
    assert told_of["decoding"]["macro_f1"] == 1 and told_of["decoding"]["metric"] == "event_based"
    # The weights are the same bytes.
    (first, _), (second, _) = load_checkpoint(badly_set), load_checkpoint(out)
    for name, tensor in first.state_dict().items():
        assert (second.state_dict()[name] == tensor).all(), name

    recording = write_sound(tmp_path / "one.wav", 10.0, [("low", 2.5, 5.0)], sample_rate=8000)
    heard = {}
    for options in ([], ["--operating-point", "balanced"], ["--operating-point", "high_recall"]):
        code, printed, _ = command("detect", recording, "--format", "json", *options, model=out)
        heard[tuple(options)] = [(e["event_label"], e["onset"], e["offset"]) for e in json.loads(printed)[0]["events"]]
        assert code == 0
    assert set(map(tuple, heard.values())) == {(("low", 2.5, 5.0),)}
    assert json.loads(command("detect", recording, "--format", "json", model=badly_set)[1])[0]["events"] == []

    code, _, told = command("detect", recording, "--operating-point", "high_recal", model=out)
    assert code == 2 and "did you mean 'high_recall'?; the model has high_precision, balanced, high_recall" in told[0]
    code, _, told = command("detect", recording, "--operating-point", "balanced", model=badly_set)
    assert code == 2 and "the model has none; htsat calibrate finds some" in told[0]
    code, printed, _ = command("info", out, model=None)
    assert code == 0 and "operating_points" in printed and "high_precision" in printed and "calibration" in printed


def test_json_metric_and_no_probabilities(command, badly_set, tmp_path):
    data, out = write_scenes(tmp_path / "scenes"), tmp_path / "tuned.safetensors"
    arguments = ("calibrate", badly_set, data, "--out", out, "--json", "--metric", "intersection", "--no-probabilities")
    code, printed, told = command(*arguments, model=None)
    found = json.loads(printed)
    assert (code, told, found["checkpoint"]) == (0, [], str(out))
    assert found["decoding"]["metric"] == "intersection" and found["probabilities"] == {}
    assert found["decoding"]["per_class"]["low"]["points"]["balanced"]["f1"] == 1
    assert read_config(out).calibration == CalibrationConfig()
    # A second time with the result as the model, in its own place: the same settings.
    code, printed, _ = command("calibrate", out, data, *arguments[3:3], "--out", out, *arguments[5:], model=None)
    assert code == 0 and json.loads(printed)["decoding"]["macro_f1_before"] == 1


def test_the_calibrated_model_says_what_was_tuned_on(tone_predictor, tmp_path):
    """Recordings of several chunks: posteriors are calibrated before they are joined."""
    from htsat.commands.calibrate import _Recorder

    predictor = tone_predictor()
    recorder = _Recorder(predictor._backend)
    predictor._backend = recorder
    given = (sound(23.0, [("low", 3.0, 9.0), ("high", 12.0, 17.1)]), 8000)
    first = predictor.predict(given)
    calls = len(recorder.backend.calls)
    calibration = CalibrationConfig(LogitCalibration((0.5, 1.0), (0.3, 0.0)), LogitCalibration((0.4, 2.0), (1.0, 0.0)))
    predictor.config = dataclasses.replace(predictor.config, calibration=calibration)
    recorder.replay()
    replayed = predictor.predict(given)
    assert len(recorder.backend.calls) == calls
    predictor._backend = recorder.backend
    real = predictor.predict(given)
    np.testing.assert_array_equal(replayed.framewise_posteriors, real.framewise_posteriors)
    np.testing.assert_array_equal(replayed.clipwise_posteriors, real.clipwise_posteriors)
    assert (real.framewise_posteriors != first.framewise_posteriors).any()


def test_clips_without_times(command, tiny_checkpoint, tmp_path):
    data, out = tmp_path / "clips", tmp_path / "tuned.safetensors"
    for label in TONES:
        for i in range(8):
            write_sound(data / label / f"{label}{i}.wav", 3.0 + i / 100, [(label, 0.0, 2.5)])
    code, printed, told = command("calibrate", tiny_checkpoint, data, "--out", out, model=None)
    assert code == 0 and "no events with times" in told[0]
    assert "probabilities, clipwise" in printed and "macro F1" not in printed
    config = read_config(out)
    assert config.calibration.clipwise and not config.calibration.framewise
    assert (config.operating_points, config.decoding) == ({}, read_config(tiny_checkpoint).decoding)
    arguments = ("calibrate", tiny_checkpoint, data, "--out", out, "--no-probabilities")
    code, _, told = command(*arguments, model=None)
    assert code == 1 and "nothing that it could calibrate" in told[-1]


def test_what_is_told_and_refused(command, tiny_checkpoint, tmp_path):
    data = write_scenes(tmp_path / "scenes", count=4)
    out = tmp_path / "tuned.safetensors"
    code, _, told = command("calibrate", tiny_checkpoint, data, "--out", tmp_path / "none" / "x", model=None)
    assert code == 1 and "does not exist" in told[0]
    code, _, told = command("calibrate", tiny_checkpoint, data, "--out", out, model=None)
    assert code == 1 and "no class has the 5 events" in told[0] and not out.exists()
    code, _, told = command("calibrate", tiny_checkpoint, data, "--out", out, "--metric", "psds", model=None)
    assert code == 2


def test_data_that_the_model_was_trained_on_is_told(command, tmp_path):
    from htsat.data.corpora import open_corpus
    from htsat.evaluation.evaluate import fingerprint

    data, out = write_scenes(tmp_path / "scenes"), tmp_path / "tuned.safetensors"
    digest = fingerprint(open_corpus("strong", data))
    model = write_checkpoint(tmp_path / "m.safetensors", tiny_config(provenance={"data": {"fingerprint": digest}}))
    code, _, told = command("calibrate", model, data, "--out", out, model=None)
    assert code == 0 and "was trained on this data" in told[0]


def test_a_configuration_is_changed_without_touching_the_weights(tiny_checkpoint, tmp_path):
    config = read_config(tiny_checkpoint)
    changed = dataclasses.replace(config, decoding=DecodingConfig(0.123), provenance={"name": "Größe"})
    target = tmp_path / "changed.safetensors"
    with_config(tiny_checkpoint, target, changed)
    assert read_config(target) == changed
    assert read_header(target).metadata["format"] == "pt"
    old, new = tiny_checkpoint.read_bytes(), target.read_bytes()
    ends = [8 + int.from_bytes(content[:8], "little") for content in (old, new)]
    assert old[ends[0] :] == new[ends[1] :] and ends[1] % 8 == 0
    with_config(target, target, config)
    assert read_config(target) == config
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, embed_dim=16))
    with pytest.raises(CheckpointError, match=r"not of one model|labels do not fit"):
        with_config(tiny_checkpoint, tmp_path / "x.safetensors", other)


def test_the_settings_of_another_model_are_taken_over(command, badly_set, tmp_path):
    """The model that is used was trained on everything; what fits it was found with one that held data out."""
    data, tuned, out = write_scenes(tmp_path / "scenes"), tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    assert command("calibrate", badly_set, data, "--out", tuned, model=None)[0] == 0
    whole = write_checkpoint(tmp_path / "whole.safetensors", tiny_config(decoding=DecodingConfig(0.7)))
    assert command("calibrate", whole, "--from", tuned, "--out", out, model=None) == (0, f"{out}\n", [])
    found, taken = read_config(tuned), read_config(out)
    for name in ("calibration", "decoding", "operating_points", "inference"):
        assert getattr(found, name) == getattr(taken, name), name
    assert taken.provenance["calibration"]["taken_over"]["from"] == str(tuned)
    assert len(taken.provenance["calibration"]["data"]["fingerprint"]) == 64

    other = write_checkpoint(tmp_path / "other.safetensors", tiny_config(labels=("low", "other")))
    for arguments, words in (
        ((whole, "--from", badly_set), "was not calibrated"),
        ((other, "--from", tuned), "has other classes"),
        ((whole, data, "--from", tuned), "give either DATA"),
        ((whole,), "give either DATA"),
    ):
        code, _, told = command("calibrate", *arguments, "--out", tmp_path / "no.safetensors", model=None)
        assert code == 2 and words in told[0] and not (tmp_path / "no.safetensors").exists()


def write_night(folder, events=(), count=3):
    """Recordings of half a minute in which no tone sounds but those given."""
    for i in range(count):
        write_sound(folder / f"night{i}.wav", 30.0, events, sample_rate=8000)
    return folder


def test_quiet_recordings(command, badly_set, tmp_path):
    """``low`` is heard six times where nothing should be: only a threshold above its posterior stops that."""
    data, out = write_scenes(tmp_path / "scenes"), tmp_path / "tuned.safetensors"
    night, calm = write_night(tmp_path / "night", [("low", 2.5, 5.0), ("low", 10.0, 12.5)]), tmp_path / "calm"
    arguments = ("calibrate", badly_set, data, "--out", out, "--no-probabilities")
    code, printed, told = command(*arguments, "--quiet", write_night(calm), "--json", model=None)
    found = json.loads(printed)["decoding"]["false_alarms"]
    assert (code, found["before"], found["after"], found["limit"], found["recordings"]) == (0, 0, 0, 10, 3)
    assert found["hours"] == pytest.approx(90 / 3600) and found["reached"] and found["per_hour"] == 0
    # 90 s: one in them is 40 per hour, and 3 per 90 s cannot be excluded; 3 per 10 per hour takes 18 minutes.
    assert len(told) == 1 and "1.5 minutes of quiet recordings tell little" in told[0]
    assert "is 40 per hour, and none means fewer than 120 per hour" in told[0] and "18 minutes without" in told[0]
    plain = read_config(out)
    assert read_config(out).provenance["calibration"]["decoding"]["false_alarms"] == found
    assert json.loads(printed)["quiet"] == ["calm"]

    quiet = ("--quiet", calm, "--quiet", night, "--quiet", night / "night0.wav", "--max-false-alarms")
    code, printed, told = command(*arguments, *quiet, "200", model=None)
    assert code == 0 and told == []
    assert "on 6 quiet recordings, 3.0 minutes: 120.0 before thresholds were raised, 120.0 after" in printed
    assert read_config(out).decoding == plain.decoding
    code, printed, _ = command(*arguments, *quiet, "100", "--json", model=None)
    found = json.loads(printed)["decoding"]
    assert (code, found["false_alarms"]["before"], found["false_alarms"]["after"]) == (0, 6, 0)
    assert (found["false_alarms"]["macro_f1_before"], found["macro_f1"]) == (1, 0.5)
    low, high = (read_config(out).decoding.for_label(label).threshold for label in ("low", "high"))
    assert low > plain.decoding.for_label("low").threshold and high == plain.decoding.for_label("high").threshold
    assert read_config(out).operating_points["high_precision"].for_label("low").threshold >= low
    old = plain.operating_points["high_recall"]
    assert read_config(out).operating_points["high_recall"] == old
    # The taken-over settings bring the figures along.
    whole = write_checkpoint(tmp_path / "whole.safetensors", tiny_config())
    assert command("calibrate", whole, "--from", out, "--out", tmp_path / "w.safetensors", model=None)[0] == 0
    taken = read_config(tmp_path / "w.safetensors").provenance["calibration"]
    assert taken["decoding"]["false_alarms"] == found["false_alarms"]


def test_a_labelled_corpus_as_quiet_recordings(command, badly_set, tmp_path):
    data, out = write_scenes(tmp_path / "scenes"), tmp_path / "tuned.safetensors"
    other = tmp_path / "other"
    for label, events in (("LOW", [("low", 1.0, 3.5)]), ("wind", []), ("hum", [])):
        write_sound(other / label / f"{label}.wav", 10.0, events, sample_rate=8000)
    table = "filename,label\nother/LOW/LOW.wav,Low\nother/wind/wind.wav,wind\nother/hum/hum.wav,hum\n"
    (tmp_path / "other.csv").write_text(table)
    for place in (other, tmp_path / "other.csv"):
        arguments = ("calibrate", badly_set, data, "--out", out, "--quiet", place, "--json")
        code, printed, told = command(*arguments, model=None)
        assert code == 0 and any(line.endswith("1 of 3 recordings are of classes of the model and left out: low")
                                 for line in told)  # fmt: skip
        assert json.loads(printed)["decoding"]["false_alarms"]["recordings"] == 2
    (other / "hum" / "broken.wav").write_bytes(b"no sound")
    code, printed, told = command(*("calibrate", badly_set, data, "--out", out, "--quiet", other), model=None)
    assert code == 1 and "broken.wav" in " ".join(told) and "1 of 17 recordings could not be heard" in told[-1]
    assert out.exists()


def test_a_limit_that_cannot_be_reached_is_told(command, badly_set, tmp_path, monkeypatch):
    import htsat.evaluation.calibrate

    monkeypatch.setattr(htsat.evaluation.calibrate, "_STRICT", ())
    data, night = write_scenes(tmp_path / "scenes"), write_night(tmp_path / "night", [("low", 2.5, 5.0)])
    arguments = ("calibrate", badly_set, data, "--out", tmp_path / "x.safetensors", "--no-probabilities")
    code, _, told = command(*arguments, "--quiet", night, "--max-false-alarms", "0", model=None)
    assert code == 0 and "the limit of 0 false alarms per hour is not reached: 120.0 are left: low 120.0" in told[0]
    assert "no length of recordings shows a rate of 0" in told[1]


def test_quiet_recordings_that_are_refused(command, badly_set, tmp_path):
    data, out = write_scenes(tmp_path / "scenes"), tmp_path / "tuned.safetensors"
    night, empty = write_night(tmp_path / "night"), tmp_path / "empty"
    empty.mkdir()
    write_sound(tmp_path / "known" / "low" / "a.wav", 3.0, [])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.wav").write_bytes(b"no sound")
    clips = tmp_path / "clips"
    for label in TONES:
        for i in range(4):
            write_sound(clips / label / f"{label}{i}.wav", 3.0 + i / 100, [(label, 0.0, 2.5)])
    for arguments, status, words in (
        ((data, "--quiet", tmp_path / "none"), 1, "there is no such file or folder"),
        ((data, "--quiet", empty), 1, "empty: holds no recordings"),
        ((data, "--quiet", tmp_path / "known"), 1, "every recording is of a class of the model (low)"),
        ((data, "--quiet", data / "audio"), 1, "14 recordings are among the labelled ones too, s00.wav, s01.wav"),
        ((data, "--quiet", tmp_path / "broken"), 1, "none of the 1 quiet recordings can be heard"),
        ((data, "--max-false-alarms", "5"), 2, "name them with --quiet"),
        ((data, "--quiet", night, "--max-false-alarms", "-1"), 2, "max-false-alarms"),
        ((data, "--max-delay", "-0.1"), 2, "max-delay"),
        (("--from", badly_set, "--quiet", night), 2, "go with DATA"),
        (("--from", badly_set, "--max-delay", "1"), 2, "go with DATA"),
        ((clips, "--quiet", night), 1, "no events with times"),
    ):
        code, _, told = command("calibrate", badly_set, *arguments, "--out", out, model=None)
        assert (code, words in " ".join(told)) == (status, True), (arguments, told)
        assert not out.exists()


def test_filters_that_wait_are_left_out(command, tmp_path):
    data, out = write_scenes(tmp_path / "scenes"), tmp_path / "tuned.safetensors"
    slow = DecodingConfig(0.5, per_class={"silent": {"median_seconds": 1.0, "min_gap": 0.2}})
    model = write_checkpoint(tmp_path / "m.safetensors", tiny_config(labels=(*TONES, "silent"), decoding=slow))
    code, _, told = command("calibrate", model, data, "--out", out, "--max-delay", "0.3", model=None)
    assert code == 0
    assert told == ["htsat: classes without events keep their filters, which wait for longer than 0.3 s: silent"]
    for config in read_config(out).operating_points.values():
        for label in TONES:
            assert config.for_label(label).median_seconds / 2 + config.for_label(label).min_gap <= 0.3
