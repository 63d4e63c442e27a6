"""DESED's ten classes from AudioSet's 527, and the published way to its events, against loops written out here."""

import csv
import dataclasses
import json
import math

import conftest
import numpy as np
import pytest
import torch
import typer
from conftest import RATE, ToneBackend, tiny_config, write_checkpoint, write_sound
from test_golden import META, input_of, load_golden_weights, model_of

import htsat.evaluation.listen
from htsat import Predictor
from htsat.commands.console import tell
from htsat.commands.evaluate import evaluate
from htsat.config import CheckpointConfig, DecodingConfig, FrontendConfig, InferenceConfig, ModelConfig
from htsat.detection.decoder import decode_events
from htsat.errors import ConfigError, HtsatError, UsageError
from htsat.evaluation.listen import Listening, published_boundaries, waveform_posteriors
from htsat.labels import class_map, counted_classes, desed_decoding, label_set

AUDIOSET, DESED = label_set("audioset"), label_set("desed")
PUBLISHED = Listening(events=True, classes="desed-published", decoding="published", batch_size=1)

#: the paper's map and thresholds: first and last index of each stretch of AudioSet's classes, which are then active
#: above a posterior
PAPER = {
    "Speech": ([(0, 7)], 0.275),
    "Frying": ([(366, 368)], 0.2),
    "Dishes": ([(364, 364)], 0.2),
    "Running_water": ([(288, 297)], 0.23),
    "Blender": ([(369, 369)], 0.48),
    "Electric_shaver_toothbrush": ([(382, 382)], 0.2),
    "Alarm_bell_ringing": ([(310, 310), (388, 402)], 0.18),
    "Cat": ([(81, 85)], 0.51),
    "Dog": ([(74, 79)], 0.39),
    "Vacuum_cleaner": ([(377, 377)], 0.14),
}


def written_out(tokens, num_samples):
    """Events of (tokens, 527) posteriors of a clip at 32 kHz, frame by frame: (label, onset, offset), sorted."""
    length = math.ceil(num_samples // 320 * 1.024)
    step = 0.01 / 1.024
    repeat = 1024 // len(tokens)
    events = []
    for label, (stretches, threshold) in PAPER.items():
        onset = None
        frames = min(length, 1024)
        for frame in range(frames + 1):
            active = False
            if frame < frames:
                for first, last in stretches:
                    for index in range(first, last + 1):
                        active = active or float(tokens[frame // repeat, index]) > threshold
            if active and onset is None:
                onset = frame
            if not active and onset is not None:
                events.append((label, onset * step, frame * step))
                onset = None
    return sorted(events)


def close(events, expected):
    found = sorted((event.event_label, event.onset, event.offset) for event in events)
    assert [event[0] for event in found] == [event[0] for event in expected]
    np.testing.assert_allclose([e[1:] for e in found], [e[1:] for e in expected], rtol=0, atol=1e-9)


def test_a_label_sounds_where_any_of_its_classes_does():
    rng = np.random.default_rng(0)
    order = rng.permutation(527)
    labels = ["another", *(AUDIOSET[i] for i in order)]
    posteriors = rng.random((6, 528)).astype(np.float32) ** 8
    counted = class_map("desed-published", labels)(posteriors)
    assert counted.shape == (6, 10) and counted.dtype == np.float32
    place = {index: 1 + position for position, index in enumerate(order)}
    for column, label in enumerate(DESED):
        for row in range(6):
            members = [i for first, last in PAPER[label][0] for i in range(first, last + 1)]
            assert counted[row, column] == max(posteriors[row, place[i]] for i in members)
    np.testing.assert_array_equal(class_map("desed-published", labels)(posteriors[0]), counted[0])
    # By meaning: the tap runs, chopping is no frying.
    one = np.zeros(528, np.float32)
    one[labels.index("Water tap, faucet")] = one[labels.index("Chopping (food)")] = 1
    assert {DESED[i] for i in np.flatnonzero(class_map("desed", labels)(one))} == {"Running_water"}
    assert {DESED[i] for i in np.flatnonzero(class_map("desed-published", labels)(one))} == {"Frying"}


def test_thresholds_are_exceeded_not_reached():
    decoding = desed_decoding()
    for column, label in enumerate(DESED):
        threshold = PAPER[label][1]
        nearest = np.float32(threshold)
        for value in (np.nextafter(nearest, np.float32(0)), nearest, np.nextafter(nearest, np.float32(1))):
            frames = np.zeros((3, 10), np.float32)
            frames[1, column] = value
            events = decode_events(frames, np.arange(4.0), DESED, decoding)
            assert [(e.event_label, e.onset, e.offset) for e in events] == [(label, 1, 2)] * (float(value) > threshold)


@pytest.mark.parametrize(
    ("seconds", "end"),
    # ends of events at the end of clips in the detections that were published with the paper
    [
        (10.0, 10.0), (11.0, 10.0), (9.0, 9.00390625), (8.0, 8.0078125), (7.1486875, 7.1484375), (7.0, 7.001953125),
        (4.0, 4.00390625), (0.001, 0.0),
    ],
)  # fmt: skip
def test_the_end_of_a_clip_is_where_the_published_detections_have_it(seconds, end):
    config = CheckpointConfig(FrontendConfig(), ModelConfig(), labels=AUDIOSET)
    boundaries = published_boundaries(round(seconds * 32000), config)
    assert boundaries[-1] == end
    np.testing.assert_array_equal(boundaries[:-1], np.arange(len(boundaries) - 1) * 0.3125)
    assert len(boundaries) == math.ceil(end / 0.3125) + 1


def test_a_map_worked_by_hand():
    """Two tokens of a clip that ends within the second: 0.5 s are 50 frames, 51.2 after the stretch, so 52."""
    config = CheckpointConfig(FrontendConfig(), ModelConfig(), labels=AUDIOSET)
    tokens = np.zeros((2, 527), np.float32)
    tokens[0, 3] = 0.28  # a kind of speech
    tokens[:, 376] = 0.9  # the electric toothbrush, which the published map forgets
    tokens[0, 368], tokens[1, 366] = 0.3, 0.21  # the microwave oven, then chopping: both frying
    tokens[1, 377], tokens[0, 377] = 0.141, 0.139  # the vacuum cleaner's threshold is 0.14
    counted = class_map("desed-published", AUDIOSET)(tokens)
    events = decode_events(counted, published_boundaries(16000, config), DESED, desed_decoding())
    end = 52 * 0.009765625
    assert [(e.event_label, e.onset, e.offset) for e in events] == [
        ("Frying", 0.0, end), ("Speech", 0.0, 0.3125), ("Vacuum_cleaner", 0.3125, end),
    ]  # fmt: skip
    assert sorted((e.event_label, e.onset, e.offset) for e in events) == written_out(
        np.concatenate([tokens, np.zeros((30, 527))]), 16000
    )


@pytest.mark.slow
def test_golden_outputs_become_the_published_events():
    """From stored outputs of the published network, moved so that they cross the thresholds, to events."""
    meta = META["audioset_10s"]
    model = model_of(meta["config"])
    load_golden_weights(model, meta["seed"])
    arrays = np.load(conftest.Path(__file__).parent / "data" / "golden" / "official_outputs.npz")
    golden = np.asarray(arrays["audioset_10s/framewise_tokens"], np.float64)
    logits = np.log(golden / (1 - golden))
    bias = np.zeros(527)
    for stretches, threshold in PAPER.values():
        for first, last in stretches:
            for index in range(first, last + 1):
                # Between two tokens, far from both: a class is active in a share of the time that differs.
                values = np.sort(logits[:, :, index].ravel())
                gaps = np.diff(values)
                middle = len(values) // 2 + index % 7
                at = middle + int(gaps[middle : middle + 8].argmax())
                bias[index] = np.log(threshold / (1 - threshold)) - (values[at] + values[at + 1]) / 2
    with torch.no_grad():
        model.token_semantic.bias += torch.from_numpy(bias).to(model.token_semantic.bias)
    model.checkpoint = dataclasses.replace(model.checkpoint, labels=AUDIOSET)
    heard = list(waveform_posteriors([model], list(input_of("audioset_10s")), PUBLISHED))
    count = 0
    for one, tokens in zip(heard, 1 / (1 + np.exp(-logits - bias)), strict=True):
        expected = written_out(tokens, 320000)
        close(one.events, expected)
        count += len(expected)
    assert count > 20


@pytest.fixture(scope="module")
def audioset(tmp_path_factory):
    """A small random network with AudioSet's labels, at the published rate and grid."""
    model = ModelConfig(num_classes=527, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    config = CheckpointConfig(
        FrontendConfig(), model, labels=AUDIOSET, inference=InferenceConfig(short="tile", shifts=2),
        decoding=DecodingConfig(threshold=0.9, per_class={"Bark": {"threshold": 0.1}}),
    )  # fmt: skip
    return write_checkpoint(tmp_path_factory.mktemp("audioset") / "m.safetensors", config)


def test_clips_of_other_lengths_are_heard_as_published(audioset):
    """Silence behind short clips, nothing of what follows 10 s, one hearing: whatever the checkpoint says."""
    model = Predictor(audioset, device="cpu").model
    for count in (320000, 233333, 100, 352001):
        waveform = np.random.default_rng(count).standard_normal(count).astype(np.float32)
        (one,) = waveform_posteriors([model], [waveform], PUBLISHED)
        padded = np.zeros(320000, np.float32)
        padded[: min(count, 320000)] = waveform[:320000]
        with torch.inference_mode():
            output = model(torch.from_numpy(padded)[None])
        expected = written_out(output.framewise_logits[0].sigmoid().numpy(), count)
        assert (len(expected) > 3) == (count > 100)
        close(one.events, expected)
        assert one.duration == count / 32000 and one.posteriors.shape == (10,)
        clip = class_map("desed-published", AUDIOSET)(output.clipwise_logits[0].sigmoid().numpy())
        np.testing.assert_allclose(one.posteriors, clip, atol=1e-6)


@pytest.mark.parametrize("classes", ["desed", "desed-published"])
def test_a_predictor_that_counts_classes(audioset, classes):
    waveform = np.random.default_rng(1).standard_normal(400000).astype(np.float32)
    predictor = Predictor(audioset, device="cpu", classes=classes, batch_size=1, threads=1)
    prediction = predictor.predict((waveform, 32000), spectrogram=False)
    counted = class_map(classes, AUDIOSET)
    plain = Predictor(audioset, device="cpu", batch_size=1, threads=1).predict((waveform, 32000), spectrogram=False)
    assert prediction.labels == list(DESED) and {tag.label for tag in prediction.tags} == set(DESED)
    np.testing.assert_array_equal(prediction.clipwise_posteriors, counted(plain.clipwise_posteriors))
    assert prediction.framewise_posteriors.shape == (len(plain.framewise_posteriors), 10)
    assert {event.event_label for event in prediction.events} <= set(DESED)
    listening = Listening(events=True, classes=classes, batch_size=1)
    (one,) = waveform_posteriors([predictor.model], [waveform], listening)
    assert one.posteriors.tobytes() == prediction.clipwise_posteriors.tobytes()
    assert list(one.events) == prediction.events


def test_settings_for_other_labels_live_in_a_checkpoint(audioset):
    config = Predictor(audioset, device="cpu").config
    with pytest.raises(ConfigError, match="'Frying' that the model lacks"):
        dataclasses.replace(config, decoding=DecodingConfig(per_class={"Frying": {"threshold": 0.2}}))
    stored = dataclasses.replace(
        config,
        inference=InferenceConfig(classes="desed"),
        decoding=DecodingConfig(per_class={"Frying": {"threshold": 0.2}, "Bark": {"threshold": 0.2}}),
    )
    assert counted_classes(stored).labels == DESED
    wrong = dataclasses.replace(stored, decoding=DecodingConfig(per_class={"Fryin": {"threshold": 0.2}}))
    with pytest.raises(UsageError, match="'Fryin', which neither the model nor desed has; did you mean 'Frying'"):
        counted_classes(wrong)


def test_wrong_settings(tiny_checkpoint, audioset):
    with pytest.raises(UsageError, match="unknown classes 'dsed'; did you mean 'desed'"):
        class_map("dsed", AUDIOSET)
    with pytest.raises(UsageError, match=r"the model has 2 classes and lacks \d+ of those, first 'Bell'"):
        Predictor(tiny_checkpoint, device="cpu", classes="desed")
    for changes, message in (
        ({"fit": "stretch", "events": False}, "leave out fit and shifts"),
        ({"time_shifts": 4}, "leave out fit and shifts"),
        ({"decoding": "publish"}, "decoding must be model or published"),
    ):
        with pytest.raises(UsageError, match=message):
            dataclasses.replace(PUBLISHED, **changes)
    model = Predictor(audioset, device="cpu").model
    without = dataclasses.replace(PUBLISHED, classes=None)
    with pytest.raises(UsageError, match="the model lacks 'Alarm_bell_ringing'; count AudioSet's classes"):
        list(waveform_posteriors([model], [np.ones(10, np.float32)], without))
    # A model of DESED's own classes needs no map.
    own = tiny_config(labels=DESED)
    assert htsat.evaluation.listen.listening_config(own, without).decoding == desed_decoding()


# ---------------------------------------------------------------- the commands


@pytest.fixture
def tones(monkeypatch):
    """Two tones that a model hears as chopping, of which only the published map makes frying, and as barking."""
    monkeypatch.setattr(conftest, "TONES", {"Chopping (food)": 1000.0, "Bark": 3000.0})
    for place in (htsat.evaluation.listen, htsat.model.runtime):
        monkeypatch.setattr(place, "TorchBackend", lambda network, **_: ToneBackend(network.checkpoint))


@pytest.fixture
def model(tmp_path):
    return write_checkpoint(tmp_path / "audioset.safetensors", tiny_config(labels=AUDIOSET))


@pytest.fixture
def desed(tones, tmp_path):
    """DESED's public evaluation in miniature."""
    folder = tmp_path / "DESED"
    heard = {
        "a.wav": (10.0, [("Chopping (food)", 1.25, 3.75), ("Bark", 5.0, 7.5)]),
        "b.wav": (8.0, [("Bark", 5.0, 8.0)]),
    }
    rows = []
    for name, (seconds, events) in heard.items():
        write_sound(folder / "audio" / "eval" / "public" / name, seconds, events, sample_rate=RATE)
        rows += [(name, on, off, "Dog" if label == "Bark" else "Frying") for label, on, off in events]
    (folder / "metadata" / "eval").mkdir(parents=True)
    with (folder / "metadata" / "eval" / "public.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("filename", "onset", "offset", "event_label"), *rows])
    return folder


@pytest.fixture
def run(capsys):
    app = typer.Typer()
    app.command()(evaluate)

    def call(*arguments):
        capsys.readouterr()
        code = 0
        try:
            app(list(map(str, arguments)), standalone_mode=False)
        except HtsatError as error:
            tell(str(error))
            code = 2 if isinstance(error, UsageError) else 1
        return code, *capsys.readouterr()

    return call


def test_the_table_of_the_paper_in_one_command(run, model, desed):
    arguments = (model, desed, "--json", "--bootstrap", 0)
    code, out, _ = run(*arguments, "--classes", "desed-published", "--decoding", "published")
    assert code == 0
    result = json.loads(out)
    assert result["classes"] == "desed-published"
    assert result["events"] == {"decoding": "published", "time_shifts": None, "operating_point": None}
    assert result["models"][0]["classes"] == 10 and result["data"]["labels"] == list(DESED)
    # The clip of 8 s ends at 8.0078 s, within every tolerance.
    for metric in ("intersection", "event_based"):
        assert result["detection"][metric]["macro_f1"] == 1
    told = run(*arguments[:2], "--bootstrap", 0, "--classes", "desed-published", "--decoding", "published")[1]
    assert "AudioSet's classes counted as desed-published" in told and "the published thresholds, no filter" in told
    told = run(*arguments[:2], "--bootstrap", 0, "--classes", "desed", "--time-shifts", 3)[1]
    assert "each chunk heard 3 times" in told and "published" not in told
    # By meaning there is no frying.
    result = json.loads(run(*arguments, "--classes", "desed")[1])
    assert result["detection"]["intersection"]["per_class"]["Frying"]["f1"] == 0
    assert result["detection"]["intersection"]["per_class"]["Dog"]["f1"] == 1
    # One hearing and five give the same where events begin and end with tokens.
    result = json.loads(run(*arguments, "--classes", "desed", "--time-shifts", 5)[1])
    assert result["detection"]["event_based"]["per_class"]["Dog"]["f1"] == 1
    for more, code, message in (
        ((), 1, "lacks"),
        (("--classes", "desed", "--decoding", "published", "--fit", "tile"), 2, "leave out fit and shifts"),
        (("--decoding", "published"), 2, "classes desed-published"),
    ):
        found, out, err = run(*arguments, *more)
        # The miniature lacks other parts of DESED, of which the lines before tell.
        assert (found, out) == (code, "") and message in err.splitlines()[-1]


def test_a_published_decoding_needs_events(run, tones, model, tmp_path):
    for label in ("Dog", "Cat"):
        write_sound(tmp_path / "data" / label / "0.wav", 1.0, [], sample_rate=RATE)
    code, _, err = run(model, tmp_path / "data", "--decoding", "published")
    assert code == 2 and "tells no times of events" in err


def test_detect(command, tones, model, tmp_path):
    path = write_sound(tmp_path / "a.wav", 6.0, [("Chopping (food)", 1.25, 2.5), ("Bark", 3.75, 5.0)], sample_rate=RATE)
    for classes, expected in (
        ("desed", ["Dog"]), ("desed-published", ["Frying", "Dog"]),
    ):  # fmt: skip
        code, out, _ = command("detect", path, "--format", "json", "--classes", classes, model=model)
        events = json.loads(out)[0]["events"]
        assert code == 0 and [event["event_label"] for event in events] == expected
        assert (events[-1]["onset"], events[-1]["offset"]) == (3.75, 5.0)
    code, out, err = command("detect", path, "--classes", "desed")
    assert (code, out, len(err)) == (2, "", 1) and "choose a model of AudioSet" in err[0]
