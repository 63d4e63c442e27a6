"""Recipes and the training loop: schedules by hand, runs on a data root in miniature, stopped and resumed."""

import dataclasses
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import TINY, make_root
from safetensors.torch import load_file

from htsat.config import DecodingConfig, to_dict
from htsat.errors import CheckpointError, ConfigError, DataError, HtsatError, OutputError
from htsat.events import Event
from htsat.model.checkpoint import load_checkpoint
from htsat.model.htsat import HTSAT
from htsat.training import loop, material
from htsat.training.loop import learning_rate, losses, parameter_groups, train
from htsat.training.material import Soundscape, training_scene
from htsat.training.recipe import TrainConfig, load_recipe, recipe_json, shipped_recipes

STEPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Keep what was decoded between runs, and do not wait for the disk."""
    decoded: dict[tuple, np.ndarray] = {}
    read_audio = material.read_audio

    def remember(path, rate):
        if (path, rate) not in decoded:
            decoded[path, rate] = read_audio(path, rate)
        return decoded[path, rate].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(material, "read_audio", remember)
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


def tiny(*overrides):
    return load_recipe("everyday", [*TINY, f"train.steps={STEPS}", *overrides])


def weights(out):
    return load_file(out / "model.safetensors")


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def steps_of(out):
    return [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]


class StopError(Exception):
    """Stands for whatever ends a process."""


def stop_at(number):
    def on_step(step):
        if step.step == number:
            raise StopError

    return on_step


# ------------------------------------------------------------------ recipes


def test_every_shipped_recipe_parses():
    assert "everyday" in shipped_recipes()
    for name, path in shipped_recipes().items():
        recipe = load_recipe(name)
        assert recipe.description and len(recipe.data.labels) == recipe.model.num_classes
        assert recipe == load_recipe(str(path))
        # The schema is closed: the resolved recipe is a recipe again.
        assert json.loads(recipe_json(recipe)) == json.loads(json.dumps(to_dict(recipe)))
        HTSAT(recipe.frontend, recipe.model)


def test_overrides():
    recipe = load_recipe(
        "everyday",
        [
            "train.steps=7", "train.precision=float32", 'train.precision="bfloat16"', "mix.speed = 0.5 ",
            "data.speech='x=y'",
            "model.depths=[1, 2, 3]", "decoding.per_class.dog.threshold=0.8", "description=a run",
            "train.learning_rate=1",
        ],
    )  # fmt: skip
    assert (recipe.train.steps, recipe.train.precision, recipe.mix.speed) == (7, "bfloat16", 0.5)
    assert (recipe.data.speech, recipe.model.depths, recipe.description) == ("x=y", (1, 2, 3), "a run")
    assert recipe.decoding.for_label("dog").threshold == 0.8
    assert type(recipe.train.learning_rate) is float  # as if the recipe said 1.0
    assert load_recipe("everyday") == load_recipe("everyday", [])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.step=5", r"everyday.toml.train: unknown key 'step'; did you mean 'steps'\?"),
        ("trian.steps=5", r"unknown key 'trian'; did you mean 'train'\?"),
        ("train.steps=many", r"train.steps: expected int, got 'many'"),
        ("train.steps=5.5", r"train.steps: expected int, got 5.5"),
        ("train.steps=", r"train.steps: expected int, got ''"),
        ("train.steps", r"--set train.steps: expected section.key=value"),
        ("=5", r"--set =5: expected section.key=value"),
        ("train=5", r"train: expected a table"),
        ("description.text=5", r"description is not a section"),
        ("train.steps=0", r"train: steps must be between 1 and"),
        ("train.seed=-1", r"seed must be between 0"),
        ("train.time_masks=-1", r"time_masks must be between 0"),
        ("train.learning_rate=nan", r"learning_rate: expected a finite number"),
        ("train.precision=float16", r"expected one of 'float32', 'bfloat16', got 'float16'"),
        ("mix.min_snr_db=40", r"mix: smallest snr_db 40 is above the largest"),
        ("data.test_fold=-1", r"test_fold must be between 0"),
        ("data.labels=[]", r"labels must name at least one class"),
        ('data.labels=["dog"]', r"labels lacks 'speech'"),
        ("model.num_classes=10", r"data.labels names 11 classes but model.num_classes is 10"),
        # What would otherwise be found when the trained model is saved.
        ("decoding.per_class.dogs.threshold=0.8", r"decoding names the label 'dogs' .*did you mean 'dog'\?"),
        ("frontend.hop_length=160", r"chunk_seconds 10 gives 2001 frames, more than the 1024"),
        ("inference.hop_seconds=11.0", r"hop_seconds 11 leaves gaps"),
    ],
)
def test_wrong_overrides(override, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load_recipe("everyday", [override])
    assert "\n" not in str(caught.value)


def test_recipes_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"everyda: neither .* nor a file; did you mean 'everyday'\?"):
        load_recipe("everyda")
    with pytest.raises(ConfigError, match="neither a shipped recipe"):
        load_recipe(str(tmp_path))
    for content in (b"[train\nsteps = 5", b"\xff\xfe\x00", b"a = 1\na = 2"):
        (tmp_path / "broken.toml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"broken.toml: cannot be read as TOML"):
            load_recipe(str(tmp_path / "broken.toml"))
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ConfigError, match=r"empty.toml: key 'description' is missing"):
        load_recipe(str(tmp_path / "empty.toml"))


# ------------------------------------------------------------------ schedule, parameters, losses, scenes


def test_learning_rate_by_hand():
    config = TrainConfig(steps=100, learning_rate=2.0, warmup=0.1)
    assert [learning_rate(step, config) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert [learning_rate(step, config) for step in (10, 55, 100)] == pytest.approx([2.0, 1.0, 0.0])
    assert learning_rate(40, config) == pytest.approx(1 + math.cos(math.pi / 3))  # a third of the way down
    rates = [learning_rate(step, config) for step in range(100)]
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a >= b for a, b in pairwise(rates[9:])) and rates[-1] > 0
    # No warm-up at all still has a first step; all warm-up never falls.
    assert learning_rate(0, TrainConfig(steps=10, learning_rate=2.0, warmup=0.0)) == 2.0
    assert learning_rate(9, TrainConfig(steps=10, learning_rate=2.0, warmup=1.0)) == 2.0
    assert learning_rate(0, TrainConfig(steps=1, learning_rate=2.0)) == 2.0


def groups():
    recipe = tiny()
    model = HTSAT(recipe.frontend, recipe.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = parameter_groups(model, 0.05)
    assert [group["weight_decay"] for group in found] == [0.05, 0.0]
    return [[names[id(parameter)] for parameter in group["params"]] for group in found], sorted(names.values())


def test_each_parameter_is_in_one_group():
    (decay, rest), every = groups()
    assert sorted(decay + rest) == every
    # Each kind of parameter named by hand, so that a new kind must be decided on.
    for name in decay:
        assert name.endswith(
            ("qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight", "reduction.weight", "token_semantic.weight",
             "patch_embed.proj.weight", "frequency_embedding")
        ), name  # fmt: skip
    for name in rest:
        assert name.endswith((".bias", "relative_position_bias_table")) or "norm" in name, name
    for part in ("norm1.weight", "patch_embed.norm.weight", "mel_norm.weight", "merge.norm.weight", "qkv.bias"):
        assert any(name.endswith(part) for name in rest), part
    assert "norm.weight" in rest


def test_frequency_embedding_decays():
    """Unlike the relative position tables: so the bundled model was trained."""
    (decay, _), _ = groups()
    assert "frequency_embedding" in decay


def test_losses_by_hand():
    """Two tokens, two classes; every term computed with logarithms of probabilities."""
    recipe = tiny("model.clip_pooling=mean")
    model = HTSAT(recipe.frontend, recipe.model)
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]]])  # posteriors 0.5, 0.75; 0.5, 0.5
    targets = torch.tensor([[[0.0, 1.0], [0.5, 0.0]]])
    strong = -(math.log(0.5) + math.log(0.75) + math.log(0.5) + math.log(0.5)) / 4
    clip = 1 / (1 + 3**-0.5)  # the mean logit of the second class is log(3) / 2
    weak = (-math.log(0.5) - math.log(clip)) / 2  # a target of 0.5 at a posterior of 0.5 costs log 2 as well
    single = -math.log(3 / 4)  # the first token alone has one class that is fully on
    for weights_, expected in (
        ((1, 0, 0), strong), ((0, 1, 0), weak), ((0, 0, 1), single), ((1, 2, 3), strong + 2 * weak + 3 * single)
    ):  # fmt: skip
        config = TrainConfig(strong_weight=weights_[0], weak_weight=weights_[1], single_weight=weights_[2])
        assert float(losses(model, logits, targets, config)) == pytest.approx(expected, rel=1e-5)
    # No token where one class is alone: the term is zero and has a gradient.
    logits.requires_grad_()
    nothing = losses(model, logits, torch.ones_like(targets), TrainConfig(strong_weight=0, weak_weight=0))
    nothing.backward()
    assert nothing.item() == 0.0 and not logits.grad.any()


def test_scenes_of_soundscapes_longer_than_a_chunk(root):
    """An event behind the end of the chunk must not come back at its beginning."""
    recipe = tiny("train.soundscape_share=1.0", "train.seed=3")
    rate, labels = recipe.frontend.sample_rate, recipe.data.labels
    samples = np.zeros(8 * rate, np.int16)
    events = (Event("dog", 1.0, 2.0), Event("rain", 4.0, 7.0), Event("rooster", 6.0, 7.0))
    samples[rate : 2 * rate] = samples[4 * rate : 7 * rate] = 9000
    found = material.Material(None, [Soundscape("long", samples, events)], [], [])
    for index in range(20):
        waveform, targets = training_scene(recipe, found, index)
        assert waveform.shape == (5 * rate,) and targets.shape == (8, 11)
        assert set(np.flatnonzero(targets.any(0))) == {labels.index("dog"), labels.index("rain")}
        sounding = (np.abs(waveform) > 0).reshape(8, -1).mean(1)
        assert (targets.max(1)[sounding > 0.6] == 1).all() and not targets[sounding == 0].any()


def test_scenes_of_short_soundscapes_are_filled_with_silence(root):
    recipe = tiny("train.soundscape_share=1.0")
    samples = np.full(2 * recipe.frontend.sample_rate, 9000, np.int16)
    found = material.Material(None, [Soundscape("short", samples, (Event("dog", 0.0, 2.0),))], [], [])
    waveform, targets = training_scene(recipe, found, 0)
    assert np.mean(np.abs(waveform) > 0) == pytest.approx(0.4, abs=1e-3)
    assert targets.sum() == pytest.approx(2 / 0.625, abs=1)


# ------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def finished(root, quick, tmp_path_factory):
    """Precision -> the run folder of an uninterrupted run, made when first asked for."""
    folders: dict[str, Path] = {}

    def run(precision):
        if precision not in folders:
            out = tmp_path_factory.mktemp("runs") / precision
            train(tiny(f"train.precision={precision}"), root, out)
            folders[precision] = out
        return folders[precision]

    return run


def test_run_folder(root, finished):
    out = finished("float32")
    recipe = tiny("train.precision=float32")
    assert {path.name for path in out.iterdir()} == {
        "recipe.json", "log.jsonl", "state.pt", "report.json", "model.safetensors"
    }  # fmt: skip
    assert (out / "recipe.json").read_text() == recipe_json(recipe)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    assert [line["learning_rate"] for line in log] == [learning_rate(step, recipe.train) for step in range(STEPS)]
    assert all(math.isfinite(v) and v > 0 for line in log for v in line.values())


def test_report_and_checkpoint(root, finished):
    out = finished("float32")
    report = json.loads((out / "report.json").read_text())
    assert (report["test_fold"], report["clips"], report["soundscapes"]) == (4, 10, 6)
    for name in ("accuracy_pad", "accuracy_tile", "intersection_macro_f1", "event_based_macro_f1"):
        assert 0 <= report[name] <= 1, name

    model, config = load_checkpoint(out / "model.safetensors")
    recipe = tiny()
    assert (config.labels, config.frontend, config.model) == (recipe.data.labels, recipe.frontend, recipe.model)
    assert config.provenance["report"] == report
    # The accuracy again, from files and the saved model, by the plainest means.
    columns = [config.labels.index(label) for label in config.labels if label != "speech"]
    for fit in ("pad", "tile"):
        right = 0
        for line in (root / "esc10/meta/esc10.csv").read_text().splitlines()[1:]:
            name, fold, _, label = line.split(",")[:4]
            if fold == "4":
                waveform = material.read_audio(root / "esc10/audio" / name, config.frontend.sample_rate)
                with torch.no_grad():
                    logits = model(torch.from_numpy(waveform)[None], fit).clipwise_logits[0]
                right += config.labels[max(columns, key=lambda c, logits=logits: logits[c])] == label
        assert right / 10 == report[f"accuracy_{fit}"]


def test_what_is_saved_is_the_average(finished):
    out = finished("float32")
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["step"] == STEPS
    saved = weights(out)
    for name, tensor in state["average"].items():
        if name in saved:
            assert torch.equal(saved[name].float(), tensor.to(saved[name].dtype).float()), name
    assert not torch.equal(state["average"]["norm.weight"], state["model"]["norm.weight"])


def test_average_by_hand():
    """Early steps count more; statistics of the batch norm are averaged, its counter is copied."""
    mine, theirs = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    with torch.no_grad():
        theirs.weight.fill_(11.0)
        theirs.running_mean.fill_(20.0)
        theirs.num_batches_tracked.fill_(7)
    loop._update_average(mine, theirs, 0.998, step=0)  # decay (1 + 0) / (10 + 0)
    assert mine.weight.item() == pytest.approx(0.1 * 1 + 0.9 * 11)
    assert mine.running_mean.item() == pytest.approx(18.0) and int(mine.num_batches_tracked) == 7
    mine.weight.data.fill_(1.0)
    loop._update_average(mine, theirs, 0.998, step=1_000_000)
    assert mine.weight.item() == pytest.approx(0.998 * 1 + 0.002 * 11, rel=1e-5)


def test_a_run_leaves_torch_as_it_was(root, tmp_path, finished):
    threads = torch.get_num_threads()
    inside = []

    def on_step(step):
        inside.append(torch.get_num_threads())
        raise StopError

    try:
        torch.set_num_threads(2)
        torch.manual_seed(5)
        before = torch.get_rng_state()
        with pytest.raises(StopError):
            train(tiny("train.threads=1"), root, tmp_path / "out", on_step=on_step)
        assert torch.equal(before, torch.get_rng_state())
        assert (inside, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(threads)


def test_another_seed_is_another_run(root, tmp_path, finished):
    told = []
    recipe = tiny("train.precision=float32", "train.steps=1", "train.seed=2", "data.test_fold=0")
    train(recipe, root, tmp_path, on_step=told.append)
    first = json.loads((finished("float32") / "log.jsonl").read_text().splitlines()[0])
    assert told[0].loss != pytest.approx(first["loss"], abs=1e-5)
    # Without a test fold nothing is scored.
    assert json.loads((tmp_path / "report.json").read_text()) == {}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_run_equals_the_uninterrupted_one(root, tmp_path, finished, precision):
    recipe = tiny(f"train.precision={precision}")
    saves = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, save_seconds=0.0))
    out = tmp_path / "out"
    with pytest.raises(StopError):
        train(saves, root, out, on_step=stop_at(4))
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 3
    torch.manual_seed(99)  # whatever the process did before
    told = []
    train(saves, root, out, resume=True, on_step=told.append)
    assert [step.step for step in told] == [4, 5, 6]
    assert_same(weights(out), weights(finished(precision)))
    whole = [json.loads(line) for line in (finished(precision) / "log.jsonl").read_text().splitlines()]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for a, b in zip(log, whole, strict=True):
        assert a | {"scenes_per_second": 0} == b | {"scenes_per_second": 0}
    assert (out / "report.json").read_bytes() == (finished(precision) / "report.json").read_bytes()


def test_log_has_each_step_once_after_a_resume(root, tmp_path, finished, monkeypatch):
    """The state is older than the log, whose last line was cut off with the process."""
    save = loop._save_state
    monkeypatch.setattr(loop, "_save_state", lambda *args: save(*args) if args[-1] == 2 else None)
    recipe = tiny("train.precision=float32", "train.save_seconds=0.0")
    out = tmp_path / "out"
    with pytest.raises(StopError):
        train(recipe, root, out, on_step=stop_at(5))
    assert steps_of(out) == [1, 2, 3, 4]
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    monkeypatch.undo()
    train(recipe, root, out, resume=True)
    assert steps_of(out) == [1, 2, 3, 4, 5, 6]
    assert_same(weights(out), weights(finished("float32")))


def test_resume_before_the_first_save_begins_again(root, tmp_path, finished):
    recipe = tiny("train.precision=float32")
    out = tmp_path / "out"
    with pytest.raises(StopError):
        train(recipe, root, out, on_step=stop_at(3))
    assert steps_of(out) == [1, 2] and not (out / "state.pt").exists()
    train(recipe, root, out, resume=True)
    assert steps_of(out) == [1, 2, 3, 4, 5, 6]
    assert_same(weights(out), weights(finished("float32")))


def test_resuming_a_finished_run_scores_it_again(root, tmp_path, finished):
    out = Path(shutil.copytree(finished("float32"), tmp_path / "out"))
    for name in ("model.safetensors", "report.json"):
        (out / name).unlink()
    told = []
    train(tiny("train.precision=float32"), root, out, resume=True, on_step=told.append)
    assert not told and steps_of(out) == [1, 2, 3, 4, 5, 6]
    assert_same(weights(out), weights(finished("float32")))
    assert (out / "report.json").read_bytes() == (finished("float32") / "report.json").read_bytes()


def test_cut_log_keeps_the_last_line_of_each_step(tmp_path):
    path = tmp_path / "log.jsonl"
    loop._cut_log(path, 3)
    assert not path.exists()
    lines = ['{"step": 1}', '{"step": 2}', "noise", '{"step": 2, "again": 1}', '{"step": 3}', '{"step": 4}']
    path.write_text("\n".join(lines) + "\n")
    loop._cut_log(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2, "again": 1}\n{"step": 3}\n'


# ------------------------------------------------------------------ refusals


def test_resume_with_another_recipe(root, tmp_path, finished):
    out = Path(shutil.copytree(finished("float32"), tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(CheckpointError, match=r"another recipe \(other train.learning_rate\); resume it with"):
        train(tiny("train.precision=float32", "train.learning_rate=0.1"), root, out, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "recipe.json").write_text("{")
    with pytest.raises(CheckpointError, match="run of another recipe; resume it with that"):
        train(tiny("train.precision=float32"), root, out, resume=True)


def test_run_folder_in_use(root, tmp_path):
    for name in ("recipe.json", "state.pt", "model.safetensors"):
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        (out / name).write_text("precious")
        with pytest.raises(OutputError, match="already holds a run; pass --resume to go on with it, or choose"):
            train(tiny(), root, out)
        assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "precious")]


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_nothing_to_resume(root, tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=f"{name}: nothing to resume: it holds no recipe.json; leave out"):
        train(tiny(), root, tmp_path / name, resume=True)


def test_run_folder_cannot_be_made(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/run: the run folder cannot be made: .*choose another --out"):
        train(tiny(), root, tmp_path / "file" / "run")
    with pytest.raises(OutputError, match="file: the run folder cannot be made"):
        train(tiny(), root, tmp_path / "file")
    with pytest.raises(CheckpointError, match="nothing to resume"):
        train(tiny(), root, tmp_path / "file", resume=True)


def test_missing_data_do_not_use_up_the_run_folder(root, tmp_path):
    for _ in range(2):
        with pytest.raises(DataError, match="not an ESC data set"):
            train(tiny(), tmp_path / "away", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "tensor", "step", "text"])
def test_damaged_state(root, tmp_path, finished, damage):
    out = Path(shutil.copytree(finished("float32"), tmp_path / "out"))
    path = out / "state.pt"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a state")
    elif damage == "other":
        torch.save({"weights": torch.ones(3)}, path)
    elif damage == "tensor":
        torch.save(torch.ones(3), path)
    else:
        torch.save(torch.load(path, weights_only=True) | {"step": STEPS + 1}, path)
    log = (out / "log.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"state.pt: cannot be resumed: .*delete it and pass --resume") as caught:
        train(tiny("train.precision=float32"), root, out, resume=True)
    assert "\n" not in str(caught.value)
    assert (out / "log.jsonl").read_bytes() == log


def test_state_that_cannot_be_saved(root, tmp_path):
    """The last good state stays; the message tells how to go on."""
    recipe = tiny("train.save_seconds=0.0")
    out = tmp_path / "out"
    with pytest.raises(StopError):
        train(recipe, root, out, on_step=stop_at(3))
    before = (out / "state.pt").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OutputError, match=r"state.pt: the training state cannot be saved: .*No space left"):
            train(recipe, root, out, resume=True)
    assert (out / "state.pt").read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", "recipe.json", "state.pt"]


def test_log_that_cannot_be_written(root, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"log.jsonl: cannot be written: .*use --resume"):
        train(tiny(), root, out, on_step=lambda step: (out / "log.jsonl").mkdir())


def test_gradient_that_is_not_finite_stops_before_the_weights(root, tmp_path, monkeypatch):
    recipe = tiny("train.save_seconds=0.0")
    out = tmp_path / "out"
    calls = []
    losses_ = loop.losses

    def diverging(model, *args):
        calls.append({name: value.clone() for name, value in model.named_parameters()})
        value = losses_(model, *args)
        if len(calls) == 3:
            model_seen.append(model)
            return value * torch.inf
        return value

    model_seen: list[HTSAT] = []
    monkeypatch.setattr(loop, "losses", diverging)
    with pytest.raises(HtsatError, match=r"step 3: the gradient is not finite; begin a new run with a lower"):
        train(recipe, root, out)
    for name, value in model_seen[0].named_parameters():
        assert torch.equal(value, calls[2][name]), name
    assert not torch.equal(calls[2]["norm.weight"], calls[1]["norm.weight"])  # steps before did move them
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["step"] == 2 and steps_of(out) == [1, 2]
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert not (out / "model.safetensors").exists()


# ------------------------------------------------------------------ learning


@pytest.mark.slow
def test_loss_falls_and_the_held_out_fold_is_recognised(root, tmp_path):
    """Ten pure tones: whole clips without background or augmentation, then scored on clips of another fold."""
    recipe = load_recipe(
        "everyday",
        [
            *TINY, "train.steps=60", "train.batch_size=4", "train.learning_rate=3e-3", "train.precision=float32",
            "train.average_decay=0.9", "train.equaliser_db=0", "train.time_masks=0", "train.mel_masks=0",
            "train.soundscape_share=0", "mix.whole_clip=1", "mix.background=0", "mix.speed=0", "model.drop_path=0",
        ],
    )  # fmt: skip
    told = []
    train(recipe, root, tmp_path, on_step=told.append)
    loss = [step.loss for step in told]
    assert np.mean(loss[-10:]) < 0.35 * np.mean(loss[:5])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["accuracy_pad"] >= 0.8 and report["accuracy_tile"] >= 0.8  # one in ten by chance


def test_detection_of_the_report_uses_the_recipes_decoding(root, tmp_path, finished):
    """With a threshold that every token reaches, each class sounds from the beginning to the end of each recording."""
    from htsat.training.validate import detect_soundscapes

    model, _ = load_checkpoint(finished("float32") / "model.safetensors")
    recipe = dataclasses.replace(tiny(), decoding=DecodingConfig(threshold=0.0))
    short = Soundscape("short", np.zeros(3 * 8000 + 100, np.int16), ())
    full = Soundscape("full", np.zeros(5 * 8000, np.int16), ())
    found = detect_soundscapes(model, recipe, [short, full])
    for name, duration in (("short", 3.0125), ("full", 5.0)):
        assert {e.event_label for e in found[name]} == set(recipe.data.labels)
        assert all((e.onset, e.offset) == (0.0, pytest.approx(duration)) for e in found[name])
