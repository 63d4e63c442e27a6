"""Cross-validation: which runs it makes, what it keeps when it goes on, and its summary by hand."""

import json
import math

import pytest
from miniature import TINY_CLIPS
from miniature_corpora import make_esc50, make_folder

from htsat.errors import DataError, UsageError
from htsat.training.folds import cross_validate, figures
from htsat.training.recipe import load_recipe, recipe_json

FEW = ("dog", "rain")
RECIPE = load_recipe("esc50", [*TINY_CLIPS, "data.corpus=esc50", f"data.labels={list(FEW)}"])
#: accuracy of each fold for the seeds 1 and 2
SCORES = {(1, 1): 0.5, (2, 1): 0.75, (3, 1): 1.0, (1, 2): 0.25, (2, 2): 0.5, (3, 2): 0.75}


@pytest.fixture(scope="module")
def esc(tmp_path_factory):
    return make_esc50(tmp_path_factory.mktemp("esc"), labels=FEW)


class Trainer:
    """Stands for the loop: writes what a finished run leaves, and remembers what it was asked for."""

    def __init__(self, fail_at=None):
        self.asked, self.fail_at = [], fail_at

    def __call__(self, recipe, folder, resume):
        fold, seed = recipe.data.test_fold, recipe.train.seed
        self.asked.append((fold, seed, resume))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_text(recipe_json(recipe))
        if (fold, seed) == self.fail_at:
            raise KeyboardInterrupt
        accuracy = SCORES[fold, seed]
        found = {"accuracy": accuracy, "macro_f1": accuracy / 2}
        if fold == 1:
            found["mean_average_precision"] = 0.125  # not in every report: no mean can be taken
        report = {"steps": 3, "tagging": {"objective": "single_label", "figures": found}, "detection": None}
        (folder / "report.json").write_text(json.dumps(report))
        (folder / "model.safetensors").write_text("weights")
        return folder / "model.safetensors"


def validate(esc, out, trainer, folds=(1, 2, 3), seeds=(1, 2), resume=False, recipe=RECIPE):
    notes = []
    summary = cross_validate(
        recipe, esc, out, folds and list(folds), list(seeds), resume=resume, run=trainer, on_note=notes.append
    )
    return summary, notes


def test_summary_by_hand(esc, tmp_path):
    trainer = Trainer()
    summary, notes = validate(esc, tmp_path, trainer)
    assert trainer.asked == [(fold, seed, False) for seed in (1, 2) for fold in (1, 2, 3)]
    assert notes[0] == "fold1-seed1: training" and len(notes) == 6
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert (summary["folds"], summary["seeds"]) == ([1, 2, 3], [1, 2])
    assert summary["runs"]["fold2-seed2"] == {"accuracy": 0.5, "macro_f1": 0.25}
    # Means over the folds: (0.5 + 0.75 + 1) / 3 and (0.25 + 0.5 + 0.75) / 3; of these mean and sample deviation.
    assert summary["per_seed"] == {"1": {"accuracy": 0.75, "macro_f1": 0.375}, "2": {"accuracy": 0.5, "macro_f1": 0.25}}
    assert summary["total"]["accuracy"] == {"mean": 0.625, "deviation": pytest.approx(0.25 / math.sqrt(2))}
    assert summary["total"]["macro_f1"]["mean"] == 0.3125 and set(summary["total"]) == {"accuracy", "macro_f1"}


def test_one_seed_has_no_deviation(esc, tmp_path):
    summary, _ = validate(esc, tmp_path, Trainer(), seeds=(1,))
    assert summary["total"]["accuracy"] == {"mean": 0.75, "deviation": None}


def test_all_folds_are_those_of_the_data(esc, tmp_path):
    class All(Trainer):
        def __call__(self, recipe, folder, resume):
            SCORES.setdefault((recipe.data.test_fold, 1), 0.0)
            return super().__call__(recipe, folder, resume)

    trainer = All()
    validate(esc, tmp_path, trainer, folds=None, seeds=(1,))
    assert [fold for fold, _, _ in trainer.asked] == [1, 2, 3, 4, 5]


def test_an_interrupted_cross_validation_goes_on(esc, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        validate(esc, tmp_path, Trainer(fail_at=(2, 1)))
    partly = json.loads((tmp_path / "summary.json").read_text())
    assert partly["runs"].keys() == {"fold1-seed1"} and partly["per_seed"] == {} and partly["total"] == {}
    trainer = Trainer()
    summary, notes = validate(esc, tmp_path, trainer, resume=True)
    # The finished run is kept, the interrupted one resumed, the others begun.
    assert trainer.asked == [(2, 1, True), (3, 1, False), (1, 2, False), (2, 2, False), (3, 2, False)]
    assert notes[:2] == ["fold1-seed1: finished before", "fold2-seed1: training"]
    assert summary["total"]["accuracy"]["mean"] == 0.625


def test_a_finished_run_of_another_recipe_is_not_taken_for_this_one(esc, tmp_path):
    validate(esc, tmp_path, Trainer(), folds=(1,), seeds=(1,))
    other = load_recipe(
        "esc50", [*TINY_CLIPS, "data.corpus=esc50", f"data.labels={list(FEW)}", "train.learning_rate=0.5"]
    )
    trainer = Trainer()
    validate(esc, tmp_path, trainer, folds=(1,), seeds=(1,), resume=True, recipe=other)
    assert trainer.asked == [(1, 1, True)]  # which the loop then refuses
    (tmp_path / "fold1-seed1/report.json").unlink()
    trainer = Trainer()
    validate(esc, tmp_path, trainer, folds=(1,), seeds=(1,), resume=True, recipe=other)
    assert trainer.asked == [(1, 1, True)]


def test_folds_that_are_none(esc, tmp_path):
    with pytest.raises(UsageError, match=r"no fold 7, 9 to hold out; there are 1, 2, 3, 4, 5"):
        validate(esc, tmp_path, Trainer(), folds=(1, 9, 7))
    folder = make_folder(tmp_path / "folder")
    recipe = load_recipe("esc50", [*TINY_CLIPS, "data.corpus=folder"])
    with pytest.raises(UsageError, match=r"no fold to hold out; there are none"):
        validate(folder, tmp_path, Trainer(), folds=None, recipe=recipe)
    with pytest.raises(UsageError, match=r"no fold 1 to hold out; there are none"):
        validate(folder, tmp_path, Trainer(), folds=(1,), recipe=recipe)
    with pytest.raises(DataError, match="no such folder"):
        validate(tmp_path / "away", tmp_path, Trainer())
    assert not list(tmp_path.glob("fold*-seed*"))


def test_figures_of_reports():
    tagging = {
        "objective": "multi_label",
        "threshold": 0.5,
        "figures": {"mean_average_precision": 0.5, "d_prime": None},
    }
    assert figures({"tagging": tagging, "steps": 3, "selection_score": 0.25}) == {"mean_average_precision": 0.5}
    detection = {"intersection": {"macro_f1": 0.75, "per_class": {}}, "event_based": {"macro_f1": 0.25}, "clips": 3}
    assert figures({"tagging": tagging, "detection": detection}) == {
        "mean_average_precision": 0.5, "intersection_macro_f1": 0.75, "event_based_macro_f1": 0.25,
    }  # fmt: skip
    detection |= {"psds1": {"value": 0.125}, "psds2": {"value": 0.5}}
    detection["frame_level"] = {"mean_average_precision": None, "mean_roc_auc": 0.5}
    assert figures({"tagging": tagging, "detection": detection}) == {
        "mean_average_precision": 0.5, "intersection_macro_f1": 0.75, "event_based_macro_f1": 0.25,
        "psds1": 0.125, "psds2": 0.5,
    }  # fmt: skip
    # Of scenes, whose report is flat.
    flat = {"accuracy_pad": 0.5, "clips": 10, "test_fold": 1, "psds1": 0.25, "intervals": {"event_based": [0.0, 1.0]}}
    assert figures(flat) == {"accuracy_pad": 0.5, "psds1": 0.25}
