"""``htsat evaluate``: a model that hears tones exactly, on data whose scores are known beforehand."""

import csv
import json

import pytest
import typer
from conftest import ToneBackend, tiny_config, write_checkpoint, write_sound

import htsat.evaluation.listen
from htsat.commands.console import tell
from htsat.commands.evaluate import evaluate
from htsat.config import DecodingConfig
from htsat.errors import HtsatError, UsageError


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command with models that hear the tones; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(htsat.evaluation.listen, "TorchBackend", lambda network, **_: ToneBackend(network.checkpoint))
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
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def folder(tmp_path):
    """Eight clips in a folder per class; one of ``low`` holds the other tone."""
    data = tmp_path / "data"
    for label in ("low", "high"):
        for i in range(4):
            heard = "high" if label == "low" and i == 3 else label
            write_sound(data / label / f"{label}{i}.wav", 2.0 + i / 100, [(heard, 0.0, 2.0)])
    return data


def test_a_folder_per_class(run, tiny_checkpoint, folder, tmp_path):
    code, out, err = run(tiny_checkpoint, folder, "--report", tmp_path / "r.html", "--out", tmp_path / "r.json")
    assert (code, err) == (0, "")
    assert "accuracy" in out and "0.8750" in out  # seven of eight
    assert "8 clips, 2 classes" in out and "to 1.0000" in out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["tagging"]["figures"]["accuracy"] == 7 / 8
    assert result["data"]["labels"] == ["high", "low"]
    assert result["tagging"]["confusion_matrix"] == [[4, 0], [1, 3]]
    assert result["tagging"]["per_class"]["low"]["recall"] == 0.75
    assert "low3.wav" in (tmp_path / "r.html").read_text()
    code, out, err = run(tiny_checkpoint, folder, "--json", "--bootstrap", "0", "--batch-size", 3)
    printed = json.loads(out)
    assert printed["tagging"]["figures"] == result["tagging"]["figures"]
    assert printed["tagging"]["intervals"] == {}
    assert printed["data"]["fingerprint"] == result["data"]["fingerprint"]


def test_unreadable_clips_are_named_and_the_rest_is_scored(run, tiny_checkpoint, folder):
    (folder / "low" / "low3.wav").write_bytes(b"RIFF no sound at all")
    code, out, err = run(tiny_checkpoint, folder, "--json")
    assert code == 1
    assert "low3.wav" in err and "1 of 8 clips could not be scored" in err
    result = json.loads(out)
    assert result["tagging"]["figures"]["accuracy"] == 1
    assert [row["file"] for row in result["unreadable"]] == [str(folder / "low" / "low3.wav")]
    for path in folder.rglob("*.wav"):
        path.write_bytes(b"RIFF no sound at all")
    code, out, err = run(tiny_checkpoint, folder)
    assert (code, out) == (1, "") and "none of its 8 clips can be scored" in err


def strong(tmp_path):
    data = tmp_path / "strong"
    events = {"a.wav": [("low", 1.25, 3.75)], "b.wav": [("high", 0.0, 2.5), ("low", 5.0, 7.5)], "c.wav": []}
    rows = []
    for name, found in events.items():
        write_sound(data / "audio" / name, 10.0, found)
        rows += [(name, onset, offset, label) for label, onset, offset in found] or [(name, "", "", "")]
    for table, columns, lines in (
        ("strong.tsv", ("filename", "onset", "offset", "event_label"), rows),
        ("durations.tsv", ("filename", "duration"), [(name, 10.0) for name in events]),
    ):
        with (data / table).open("w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([columns, *lines])
    return data


def test_events_are_scored_by_three_metrics(run, tiny_checkpoint, tmp_path):
    data = strong(tmp_path)
    code, out, err = run(tiny_checkpoint, data, "--json", "--bootstrap", 10)
    assert (code, err) == (0, "")
    detection = json.loads(out)["detection"]
    # The tones begin and end with the model's time steps of 0.3125 s.
    for metric in ("intersection", "event_based", "segment_based"):
        assert detection[metric]["macro_f1"] == 1
        assert detection[metric]["micro_f1_interval"] == [1, 1]
    assert (detection["psds1"]["value"], detection["psds2"]["value"]) == (1, 1)
    assert detection["psds1"]["per_class"] == {"high": 1, "low": 1}
    assert (detection["frame_level"]["mean_average_precision"], detection["frame_level"]["mean_roc_auc"]) == (1, 1)
    code, out, err = run(tiny_checkpoint, data)
    assert "intersection-based F1" in out and "event-based F1" in out and "segment-based F1" in out
    assert "PSDS1 (DTC = GTC = 0.7)" in out and "frame-level mean average precision" in out


def test_operating_points_are_chosen_by_name(run, tmp_path, tiny_checkpoint, folder):
    """The tones have posteriors of 0.9975: a threshold above that finds nothing, and PSDS does not mind."""
    data = strong(tmp_path)
    points = {"deaf": DecodingConfig(threshold=0.999), "balanced": DecodingConfig(threshold=0.5)}
    model = write_checkpoint(tmp_path / "points.safetensors", tiny_config(operating_points=points))
    for name, f1 in (("deaf", 0), ("balanced", 1)):
        code, out, err = run(model, data, "--json", "--operating-point", name, "--bootstrap", 0)
        assert (code, err) == (0, "")
        result = json.loads(out)
        assert result["events"]["operating_point"] == name
        assert result["detection"]["event_based"]["macro_f1"] == f1 and result["detection"]["psds1"]["value"] == 1
    assert "decoded at the operating point deaf" in run(model, data, "--operating-point", "deaf")[1]
    for arguments, message in (
        ((model, data, "--operating-point", "balance"), "did you mean 'balanced'"),
        ((tiny_checkpoint, data, "--operating-point", "balanced"), "the model has none"),
        ((model, folder, "--operating-point", "balanced"), "leave out --operating-point"),
        ((model, data, "--operating-point", "deaf", "--decoding", "published"), "leave out the operating point"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_ensembles_and_their_identity(run, tiny_checkpoint, tmp_path, folder):
    other = write_checkpoint(tmp_path / "other.safetensors", tiny_config(), seed=1)
    for together in ("mean", "logits"):
        code, out, _ = run(tiny_checkpoint, other, folder, "--json", "--ensemble", together, "--shifts", 2)
        result = json.loads(out)
        assert code == 0 and result["tagging"]["figures"]["accuracy"] == 7 / 8
        assert result["listening"] == {"fit": None, "shifts": 2, "ensemble": together}
        assert len({model["sha256"] for model in result["models"]}) == 2
    code, out, _ = run(tiny_checkpoint, other, folder, "--json", "--ensemble", "weights")
    assert [model["name"][:12] for model in json.loads(out)["models"]] == ["mean weights"]


def table(tmp_path, rows, columns=("filename", "label", "split")):
    data = tmp_path / "table"
    for i, row in enumerate(rows):
        write_sound(data / row[0], 1.0 + i / 100, [("low", 0, 1)])
    with (data / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return data


def test_splits_must_be_chosen(run, tiny_checkpoint, tmp_path):
    data = table(tmp_path, [("a.wav", "low", "train"), ("b.wav", "low", "test"), ("c.wav", "low", "test")])
    code, _, err = run(tiny_checkpoint, data, "--corpus", "csv")
    assert code == 2 and "choose with --split" in err
    for split, clips in (("test", 2), ("all", 3)):
        code, out, err = run(tiny_checkpoint, data, "--corpus", "csv", "--split", split, "--json", "--bootstrap", 0)
        assert (code, json.loads(out)["data"]["clips"]) == (0, clips)
        assert json.loads(out)["data"]["part"] == (split if split == "test" else None)
    code, _, err = run(tiny_checkpoint, data, "--corpus", "csv", "--split", "tset")
    assert code == 2 and "did you mean 'test'" in err


def test_wrong_inputs(run, tiny_checkpoint, folder, tmp_path):
    embeddings = write_checkpoint(tmp_path / "e.safetensors", tiny_config(labels=()))
    (tmp_path / "empty").mkdir()
    for arguments, code, message in (
        ((folder,), 2, "htsat evaluate MODEL... DATA"),
        ((tiny_checkpoint, tmp_path / "no"), 1, "there is no such file or folder"),
        ((tiny_checkpoint, tmp_path / "empty"), 1, "say which it is with --corpus"),
        ((tiny_checkpoint, folder, "--corpus", "esc5"), 2, "did you mean 'esc50'"),
        ((tiny_checkpoint, folder, "--fold", 1), 2, "no clip of fold 1; it has none"),
        ((tiny_checkpoint, folder, "--out", tmp_path / "no" / "r.json"), 1, "does not exist"),
        ((tiny_checkpoint, folder, "--report", tmp_path), 1, "is a folder"),
        ((tmp_path / "no.safetensors", folder), 1, "no.safetensors"),
        ((embeddings, folder), 2, "has no classes"),
    ):
        found, out, err = run(*arguments)
        assert (found, out) == (code, ""), err
        assert message in err and err.count("\n") == 1
    (folder / "low").rename(folder / "lwo")
    code, out, err = run(tiny_checkpoint, folder)
    assert (code, out) == (1, "") and "lacks 1 of the 2 labels: 'lwo'; did you mean 'low'?" in err
