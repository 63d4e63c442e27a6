"""``htsat train``: what it prints, what it leaves, and one line with the right exit code for whatever is wrong."""

import dataclasses
import json
import shutil

import pytest
from miniature import TINY_CLIPS
from miniature_corpora import make_esc50, make_speech_commands

import htsat.cli
from htsat.data.corpora import open_corpus
from htsat.errors import HtsatError
from htsat.evaluation.evaluate import fingerprint
from htsat.model.checkpoint import read_config
from htsat.training import loop
from htsat.training.recipe import load_recipe, recipe_json

FEW = ("dog", "rain")
SETTINGS = (*TINY_CLIPS, "data.corpus=esc50", f"data.labels={list(FEW)}", "data.test_fold=1", "train.steps=2")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        patch.setattr("htsat.training.journal.has_tensorboard", lambda: False)
        yield


@pytest.fixture(scope="module")
def esc(tmp_path_factory):
    return make_esc50(tmp_path_factory.mktemp("esc"), labels=FEW)


def options(*settings):
    return [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run ``htsat train`` in this process; returns (exit code, stdout, stderr lines)."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["htsat", "train", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            htsat.cli.main()
        out, err = capsys.readouterr()
        return exit.value.code, out, err.splitlines()

    return run


@pytest.fixture(scope="module")
def finished(esc, tmp_path_factory, quick):
    out = tmp_path_factory.mktemp("runs") / "out"
    loop.train(load_recipe("esc50", list(SETTINGS)), esc, out)
    return out


def test_a_run_from_the_command_line(run, esc, finished, tmp_path):
    code, out, err = run("esc50", "--data", esc, "--out", tmp_path / "out", *options())
    assert code == 0
    *figures, path = out.splitlines()
    assert path == str(tmp_path / "out/model.safetensors")
    assert err[-1] == f"htsat: done; try it: htsat tag --model {path} RECORDING"
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert figures[0].split() == ["accuracy", f"{report['tagging']['figures']['accuracy']:.4f}"]
    assert (report["steps"], report["train_clips"], report["test_clips"]) == (2, 16, 4)
    assert read_config(path).labels == FEW
    # The same as from Python.
    assert report == json.loads((finished / "report.json").read_text()) | {"models": report.get("models")}


def test_json_is_the_report(run, esc, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    code, text, _ = run("esc50", "--data", esc, "--out", out, "--resume", "--json", *options())
    assert code == 0
    shown, end = json.JSONDecoder().raw_decode(text)
    assert shown == json.loads((out / "report.json").read_text())
    assert text[end:].strip() in ("", str(out / "model.safetensors"))


def test_the_checkpoint_tells_what_it_was_trained_on(esc, finished):
    """The same clips, read anew, have the fingerprint that it holds; without a fold fewer are trained on."""
    corpus = open_corpus("esc50", esc, labels=FEW)
    clips = tuple(clip for clip in corpus.clips if 1 not in clip.folds)
    told = read_config(finished / "model.safetensors").provenance["trained_on"]
    assert told == fingerprint(dataclasses.replace(corpus, clips=clips)) != fingerprint(corpus)


def test_show_prints_the_resolved_recipe(run, tmp_path):
    code, out, err = run("esc50", "--data", "nowhere", "--show", *options("train.seed=9"))
    assert (code, err) == (0, []) and out == recipe_json(load_recipe("esc50", [*SETTINGS, "train.seed=9"]))
    code, out, _ = run("esc50", "--data", "nowhere", "--show", "--published", "--start", "some model")
    expected = load_recipe("esc50", ['start.model="some model"'], published=True)
    assert (code, out) == (0, recipe_json(expected))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["esc5"], 2, "esc5: neither a shipped recipe"),
        (["esc5"], 2, "did you mean 'esc50'?"),
        (["esc50", "--set", "train.step=5"], 2, "unknown key 'step'; did you mean 'steps'?"),
        (["esc50", "--set", "train.steps"], 2, "--set train.steps: expected section.key=value"),
        (["esc50", "--folds", "1,x"], 2, "--folds 1,x: expected whole numbers such as 1,2,3"),
        (["esc50", "--folds", ""], 2, "--folds : expected whole numbers"),
        (["esc50", "--folds", "1,1"], 2, "--folds 1,1: expected different numbers, none below 0"),
        (["esc50", "--seeds", "-1"], 2, "--seeds -1: expected different numbers, none below 0"),
        (["esc50", "--folds", "8"], 2, "no fold 8 to hold out; there are 1, 2, 3, 4, 5"),
        (["esc50", "--sets", "a=1"], 2, "no such option: --sets"),
    ],
)
def test_wrong_usage_is_one_line(run, esc, tmp_path, arguments, code, words):
    settings = options() if arguments[1:2] != ["--set"] else []
    found = run(*arguments, "--data", esc, "--out", tmp_path / "out", *settings)
    assert found[:2] == (code, "") and len(found[2]) == 1, found
    assert found[2][0].startswith("htsat: ") and words in found[2][0]
    assert not (tmp_path / "out").exists()


def test_data_are_asked_for(run):
    code, out, err = run("esc50")
    assert (code, out, len(err)) == (2, "", 1) and "missing option '--data'" in err[0]


def test_wrong_data(run, esc, tmp_path):
    arguments = ["esc50", "--out", tmp_path / "out", *options()]
    code, _, err = run(*arguments, "--data", tmp_path / "away")
    assert code == 1 and len(err) == 1 and "away: there is no such folder" in err[0]
    words = make_speech_commands(tmp_path / "words", words=("bed", "bird"))
    code, _, err = run(*arguments, "--data", words)
    assert code == 1 and len(err) == 1 and "this looks like speech_commands, not esc50" in err[0]
    # Once the data are mended, the same command works.
    assert run(*arguments, "--data", esc)[0] == 0


def test_runs_are_not_overwritten(run, esc, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    code, text, err = run("esc50", "--data", esc, "--out", out, *options())
    assert (code, text, len(err)) == (1, "", 1) and "already holds a run; pass --resume to go on with it" in err[0]
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_resuming_what_is_something_else(run, esc, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    resume = ["esc50", "--out", out, "--resume"]
    code, _, err = run(*resume, "--data", esc, *options("train.seed=2"))
    assert code == 1 and len(err) == 1 and "a run of another recipe (other train.seed)" in err[0]
    other = make_esc50(tmp_path / "other", labels=FEW)
    table = other / "meta/esc50.csv"
    lines = table.read_text().splitlines(keepends=True)
    (other / "audio" / lines[-1].split(",")[0]).unlink()
    table.write_text("".join(lines[:-1]))
    code, _, err = run(*resume, "--data", other, *options())
    assert code == 1 and len(err) == 1 and "begun with other clips or labels; resume it with those" in err[0]
    code, _, err = run("esc50", "--out", tmp_path / "new", "--resume", "--data", esc, *options())
    assert code == 1 and len(err) == 1 and "nothing to resume" in err[0]
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_cross_validation_from_the_command_line(run, esc, tmp_path, monkeypatch):
    arguments = ["esc50", "--data", esc, "--out", tmp_path / "cv", "--folds", "1,3", *options()]
    train = loop.train

    def failing(recipe, *rest, **options_):
        if recipe.data.test_fold == 3:
            raise HtsatError("the power is gone")
        return train(recipe, *rest, **options_)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", failing)
        code, _, err = run(*arguments)
    assert code == 1 and err[-1] == "htsat: the power is gone"
    weights = (tmp_path / "cv/fold1-seed1/model.safetensors").read_bytes()
    code, out, err = run(*arguments, "--resume", "--seeds", "1")
    assert code == 0 and "htsat: fold1-seed1: finished before" in err and "htsat: fold3-seed1: training" in err
    assert (tmp_path / "cv/fold1-seed1/model.safetensors").read_bytes() == weights
    header, first, third, mean = out.splitlines()
    assert header.split()[0] == "accuracy" and (first.split()[0], third.split()[0]) == ("fold1-seed1", "fold3-seed1")
    column = [float(line.split()[1]) for line in (first, third, mean)]
    assert column[2] == pytest.approx((column[0] + column[1]) / 2, abs=1e-4)
    assert {path.name for path in (tmp_path / "cv").iterdir()} == {"fold1-seed1", "fold3-seed1", "summary.json"}
    code, out, _ = run(*arguments, "--resume", "--json")
    assert code == 0 and json.loads(out) == json.loads((tmp_path / "cv/summary.json").read_text())
