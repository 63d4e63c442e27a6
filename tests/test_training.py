"""The training loop: schedules and losses by hand, runs on a data root in miniature, stopped and resumed."""

import dataclasses
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import TINY, TINY_CLIPS, make_root
from miniature_corpora import make_esc50
from safetensors.torch import load_file

from htsat.config import DecodingConfig
from htsat.errors import CheckpointError, DataError, HtsatError, OutputError
from htsat.events import Event
from htsat.model.checkpoint import load_checkpoint
from htsat.model.htsat import HTSAT
from htsat.training import loop, material
from htsat.training.loop import Batch, train
from htsat.training.material import Soundscape, training_scene
from htsat.training.optim import (
    asymmetric_loss,
    clip_loss,
    distillation_loss,
    frame_losses,
    learning_rate,
    parameter_groups,
    update_average,
)
from htsat.training.recipe import DistillConfig, TrainConfig, load_recipe, recipe_json
from htsat.training.runfolder import RunFolder, cut_log

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
        patch.setattr("htsat.training.journal.has_tensorboard", lambda: False)
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


# ------------------------------------------------------------------ schedule, parameters, losses, scenes


def test_learning_rate_by_hand():
    config = TrainConfig(learning_rate=2.0, warmup=0.1)

    def rate(step, config=config, steps=100):
        return learning_rate(step, config, steps, 7.0)

    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert [rate(step) for step in (10, 55, 100)] == pytest.approx([2.0, 1.0, 0.0])
    assert rate(40) == pytest.approx(1 + math.cos(math.pi / 3))  # a third of the way down
    rates = [rate(step) for step in range(100)]
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a >= b for a, b in pairwise(rates[9:])) and rates[-1] > 0
    # No warm-up at all still has a first step; all warm-up never falls.
    assert rate(0, TrainConfig(learning_rate=2.0, warmup=0.0), 10) == 2.0
    assert rate(9, TrainConfig(learning_rate=2.0, warmup=1.0), 10) == 2.0
    assert rate(0, TrainConfig(learning_rate=2.0), 1) == 2.0
    constant = TrainConfig(learning_rate=2.0, warmup=0.1, schedule="constant")
    assert [rate(step, constant) for step in (0, 9, 10, 99)] == pytest.approx([0.2, 2.0, 2.0, 2.0])


#: relative rates of the epochs 0 to 2, 3 to 10, 11 to 20, 21 to 30, 31 and later: by the released code with its peak
#: of 1e-3, and by the paper, which halves every ten epochs
STAIRS = {"published": (0.02, 0.05, 0.1, 0.1, 0.05, 0.02, 0.03), "halving": (0.05, 0.1, 0.2, 0.2, 0.1, 0.05, 0.05)}


@pytest.mark.parametrize("schedule", ["published", "halving"])
@pytest.mark.parametrize("epoch_steps", [1.0, 12.5])
def test_published_learning_rates(schedule, epoch_steps):
    config = TrainConfig(schedule=schedule, learning_rate=1e-3, warmup=0.5)  # a warm-up of its own
    first, second, third, plateau, half, low, end = STAIRS[schedule]
    expected = [first, second, third, *[plateau] * 8, *[half] * 10, *[low] * 10, *[end] * 69]
    for epoch, share in enumerate(expected):
        for step in (math.ceil(epoch * epoch_steps), math.ceil((epoch + 1) * epoch_steps) - 1):
            assert learning_rate(step, config, 99999, epoch_steps) == pytest.approx(1e-3 * share), epoch
    # At epoch 31 the released code's rate rises again, the paper's does not.
    before, after = (learning_rate(math.ceil(epoch * epoch_steps), config, 99999, epoch_steps) for epoch in (30, 31))
    assert (after > before) == (schedule == "published")


def test_published_rates_are_the_released_formula():
    """``lr_lambda`` of the released ``sed_model.py``, its warm-up [0.02, 0.05, 0.1] and its floor of 0.03."""
    warm = [0.02, 0.05, 0.1]

    def released(epoch):
        if epoch < 3:
            scale = warm[epoch]
        else:
            scale = 0.1
            if epoch > 10:
                scale = 0.05
            if epoch > 20:
                scale = 0.02
            if epoch > 30:
                scale = max(0.02 * 0.98**epoch, 0.03)
        return scale

    config = TrainConfig(schedule="published", learning_rate=1.0)
    assert [learning_rate(epoch, config, 1, 1.0) for epoch in range(100)] == [released(e) for e in range(100)]


def groups(**settings):
    recipe = tiny(*settings.pop("overrides", []))
    model = HTSAT(recipe.frontend, recipe.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = parameter_groups(model, 0.05, **settings)
    assert sorted(names[id(p)] for group in found for p in group["params"]) == sorted(names.values())
    return [(g["weight_decay"], g["rate"], [names[id(parameter)] for parameter in g["params"]]) for g in found]


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_each_parameter_is_in_one_group(stem):
    found = groups(overrides=[f"model.stem={stem}"])
    decay = [name for weight_decay, _, names in found if weight_decay == 0.05 for name in names]
    rest = [name for weight_decay, _, names in found if weight_decay == 0.0 for name in names]
    # Each kind of parameter named by hand, so that a new kind must be decided on.
    for name in decay:
        assert name.endswith(
            ("qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight", "reduction.weight", "token_semantic.weight",
             "patch_embed.proj.weight", "0.weight", "3.weight", "fine.spectrum.weight", "sources.1.weight",
             "sources.2.weight", "time.weight", "fine.out.weight")
        ), name  # fmt: skip
    for name in rest:
        last = (".bias", "relative_position_bias_table", "frequency_embedding", "1.weight", "4.weight")
        assert name.endswith(last) or "norm" in name, name
    for part in ("norm1.weight", "patch_embed.norm.weight", "mel_norm.weight", "merge.norm.weight", "qkv.bias"):
        assert any(name.endswith(part) for name in rest), part
    assert {"norm.weight", "frequency_embedding"} <= set(rest)
    assert all(rate == 1.0 for _, rate, _ in found)


def test_groups_of_published_training_and_of_a_slow_body():
    assert {weight_decay for weight_decay, _, _ in groups(decay_all=True)} == {0.05}
    found = groups(body_rate=0.1)
    head = {name for _, rate, names in found if rate == 1.0 for name in names}
    assert head == {"token_semantic.weight", "token_semantic.bias", "fine.out.weight", "fine.out.bias"}
    assert all(rate == 0.1 for _, rate, names in found if not head & set(names))


def test_frame_losses_by_hand():
    """Two tokens, two classes; every term computed with logarithms of probabilities."""
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]]])  # posteriors 0.5, 0.75; 0.5, 0.5
    targets = torch.tensor([[[0.0, 1.0], [0.5, 0.0]]])
    strong = -(math.log(0.5) + math.log(0.75) + math.log(0.5) + math.log(0.5)) / 4
    single = -math.log(3 / 4)  # the first token alone has one class that is fully on
    for strong_weight, single_weight, expected in ((1, 0, strong), (0, 1, single), (2, 3, 2 * strong + 3 * single)):
        config = TrainConfig(strong_weight=strong_weight, single_weight=single_weight)
        assert float(frame_losses(logits, targets, config)) == pytest.approx(expected, rel=1e-5)
    # No token where one class is alone: the term is zero and has a gradient.
    logits.requires_grad_()
    nothing = frame_losses(logits, torch.ones_like(targets), TrainConfig(strong_weight=0, single_weight=1))
    nothing.backward()
    assert nothing.item() == 0.0 and not logits.grad.any()


def test_clip_losses_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), 0.0]])  # sigmoid 0.5, 0.75; softmax 1/4, 3/4
    targets = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    log = math.log
    plain = [-(log(0.5) + log(0.75)) / 2, -(log(0.25) + log(0.5)) / 2]
    assert clip_loss(logits, targets, TrainConfig(loss="bce")).tolist() == pytest.approx(plain)
    single = [-log(3 / 4), -log(1 / 4)]
    assert clip_loss(logits, targets, TrainConfig(loss="ce")).tolist() == pytest.approx(single)
    # Smoothing by 0.2: of one class among two 0.9 and 0.1; of each class for itself 0.9 instead of 1, 0.1 of 0.
    smooth = [-0.9 * log(3 / 4) - 0.1 * log(1 / 4), -0.9 * log(1 / 4) - 0.1 * log(3 / 4)]
    config = TrainConfig(loss="ce", label_smoothing=0.2)
    assert clip_loss(logits, targets, config).tolist() == pytest.approx(smooth)
    config = TrainConfig(loss="bce", label_smoothing=0.2)
    first = (-log(0.5) - 0.9 * log(0.75) - 0.1 * log(0.25)) / 2
    assert clip_loss(logits, targets, config).tolist()[0] == pytest.approx(first)
    # PyTorch's own smoothing agrees, with more classes.
    many, chosen = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 6, 3, 3, 1])
    theirs = torch.nn.functional.cross_entropy(many, chosen, label_smoothing=0.3, reduction="none")
    config = TrainConfig(loss="ce", label_smoothing=0.3)
    ours = clip_loss(many, torch.nn.functional.one_hot(chosen, 7).float(), config)
    torch.testing.assert_close(ours, theirs)


def test_asymmetric_loss_is_its_formula():
    """Of single numbers, as the paper writes it: L+ = log p; L- = p_m^gamma log(1 - p_m), p_m = max(p - m, 0)."""
    for logit in (-6.0, -3.0, -0.5, 0.0, 1.0, 4.0, 9.0):
        p = 1 / (1 + math.exp(-logit))
        lowered = max(p - 0.05, 0)
        for y in (0.0, 0.3, 1.0):
            expected = -y * math.log(p) - (1 - y) * lowered**4 * math.log(1 - lowered)
            found = asymmetric_loss(torch.tensor([logit]), torch.tensor([y]), 4.0, 0.05)
            assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    # Easy negatives cost nothing; without focusing and margin it is the binary cross-entropy.
    assert float(asymmetric_loss(torch.tensor([-4.0]), torch.zeros(1), 4.0, 0.05)) == 0.0
    logits = torch.linspace(-8, 8, 33, requires_grad=True)
    targets = (torch.arange(33) % 3 / 2).float()
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    torch.testing.assert_close(asymmetric_loss(logits, targets, 0.0, 0.0), plain, rtol=1e-4, atol=1e-5)
    config = TrainConfig(loss="asymmetric", asymmetric_gamma=2.0, asymmetric_margin=0.1)
    rows = clip_loss(logits[:32].view(2, 16), targets[:32].view(2, 16), config)
    torch.testing.assert_close(rows, asymmetric_loss(logits, targets, 2.0, 0.1)[:32].view(2, 16).mean(1))


@pytest.mark.parametrize("value", [-200.0, 200.0])
def test_losses_of_extreme_logits_are_finite(value):
    for target in (0.0, 1.0):
        for loss in ("bce", "ce", "asymmetric"):
            logits = torch.full((1, 3), value, requires_grad=True)
            found = clip_loss(logits, torch.full((1, 3), target), TrainConfig(loss=loss)).sum()
            found.backward()
            assert torch.isfinite(found) and torch.isfinite(logits.grad).all(), (loss, target)


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_distillation_pulls_to_the_teacher(loss):
    """By hand, the gradient is T (q_student - q_teacher): divided by the classes where it is a mean over them."""
    student, teacher = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[0.3, 1.5, -1.0]])
    for temperature in (1.0, 3.0):
        logits = student.clone().requires_grad_()
        config = DistillConfig(temperature=temperature)
        distillation_loss(logits, teacher, TrainConfig(loss=loss), config).sum().backward()
        if loss == "ce":
            expected = (student / temperature).softmax(1) - (teacher / temperature).softmax(1)
        else:
            expected = ((student / temperature).sigmoid() - (teacher / temperature).sigmoid()) / 3
        torch.testing.assert_close(logits.grad, temperature * expected)
    same = teacher.clone().requires_grad_()
    distillation_loss(same, teacher, TrainConfig(loss=loss), DistillConfig()).sum().backward()
    assert same.grad.abs().max() < 1e-6


def test_scenes_of_soundscapes_longer_than_a_chunk(root):
    """An event behind the end of the chunk must not come back at its beginning."""
    recipe = tiny("train.soundscape_share=1.0", "train.seed=3", "model.fine_frames=0")
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
    recipe = tiny("train.soundscape_share=1.0", "model.fine_frames=0")
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
        ".lock", "recipe.json", "log.jsonl", "timing.jsonl", "state.pt", "report.json", "model.safetensors", "parts.tsv"
    }  # fmt: skip
    assert (out / "recipe.json").read_text() == recipe_json(recipe)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    rates = [learning_rate(step, recipe.train, STEPS, 500.0) for step in range(STEPS)]
    assert [line["learning_rate"] for line in log] == rates
    assert all(math.isfinite(v) and v > 0 for line in log for v in line.values())
    timing = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timing] == list(range(1, STEPS + 1))
    assert all(line["clips_per_second"] > 0 for line in timing)


def test_report_and_checkpoint(root, finished):
    out = finished("float32")
    report = json.loads((out / "report.json").read_text())
    assert (report["test_fold"], report["clips"], report["soundscapes"], report["steps"]) == (4, 10, 6, STEPS)
    for name in ("accuracy_pad", "accuracy_tile", "intersection_macro_f1", "event_based_macro_f1", "psds1", "psds2"):
        assert 0 <= report[name] <= 1, name

    model, config = load_checkpoint(out / "model.safetensors")
    recipe = tiny()
    assert (config.labels, config.frontend, config.model) == (recipe.data.labels, recipe.frontend, recipe.model)
    shown = config.provenance["report"]
    assert shown.items() <= report.items() and {"accuracy_pad", "intersection_macro_f1"} <= shown.keys()
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
    state = RunFolder(out).load_state()
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
    update_average(mine, theirs, 0.998, step=0)  # decay (1 + 0) / (10 + 0)
    assert mine.weight.item() == pytest.approx(0.1 * 1 + 0.9 * 11)
    assert mine.running_mean.item() == pytest.approx(18.0) and int(mine.num_batches_tracked) == 7
    mine.weight.data.fill_(1.0)
    update_average(mine, theirs, 0.998, step=1_000_000)
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
    assert json.loads((tmp_path / "report.json").read_text()) == {"steps": 1, "train_clips": 1000}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_run_equals_the_uninterrupted_one(root, tmp_path, finished, precision):
    recipe = tiny(f"train.precision={precision}")
    saves = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, save_seconds=0.0))
    out = tmp_path / "out"
    with pytest.raises(StopError):
        train(saves, root, out, on_step=stop_at(4))
    assert RunFolder(out).load_state()["step"] == 3
    torch.manual_seed(99)  # whatever the process did before
    told = []
    train(saves, root, out, resume=True, on_step=told.append)
    assert [step.step for step in told] == [4, 5, 6]
    assert_same(weights(out), weights(finished(precision)))
    assert (out / "log.jsonl").read_bytes() == (finished(precision) / "log.jsonl").read_bytes()
    assert (out / "report.json").read_bytes() == (finished(precision) / "report.json").read_bytes()


def test_log_has_each_step_once_after_a_resume(root, tmp_path, finished, monkeypatch):
    """The state is older than the log, whose last line was cut off with the process."""
    save = RunFolder.save_state
    monkeypatch.setattr(
        RunFolder, "save_state", lambda folder, state: save(folder, state) if state["step"] == 2 else None
    )
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
    cut_log(path, 3)
    assert not path.exists()
    lines = ['{"step": 1}', '{"step": 2}', "noise", '{"step": 2, "again": 1}', '{"step": 3}', '{"step": 4}']
    path.write_text("\n".join(lines) + "\n")
    cut_log(path, 3)
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
    for name in ("recipe.json", "state.pt", "state.previous.pt", "model.safetensors"):
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
    assert not (tmp_path / "out" / "recipe.json").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "text", "other", "tensor", "step", "newer"])
def test_damaged_state(root, tmp_path, finished, damage):
    """Bytes that were changed are noticed by the checksum; a state of something else by what it lacks."""
    out = Path(shutil.copytree(finished("float32"), tmp_path / "out"))
    path, folder = out / "state.pt", RunFolder(out)
    content, state = path.read_bytes(), folder.load_state()
    words = r"state.pt: .*cannot be resumed: the file is damaged; delete it and its previous one"
    if damage in ("other", "tensor", "step", "newer"):
        words = r"state.pt: cannot be resumed: it does not fit the recipe .*begin a new run"
        path.unlink()
        model = {name: tensor for name, tensor in state["model"].items() if name != "norm.bias"}
        changed = {
            "other": {"weights": torch.ones(3)},
            "tensor": state | {"model": model},
            "step": state | {"step": STEPS + 1},
            "newer": {key: value for key, value in state.items() if key != "optimiser"},
        }
        folder.save_state(changed[damage])
    elif damage == "text":
        path.write_text("not a state")
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"cut": content[:middle], "empty": b"", "bit": flipped}[damage])
    log = (out / "log.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=words) as caught:
        train(tiny("train.precision=float32"), root, out, resume=True)
    assert "\n" not in str(caught.value)
    assert (out / "log.jsonl").read_bytes() == log


def test_the_state_before_replaces_a_damaged_one(root, tmp_path, finished):
    recipe = tiny("train.precision=float32", "train.save_steps=1")
    out = tmp_path / "out"
    with pytest.raises(StopError):
        train(recipe, root, out, on_step=stop_at(5))
    states = [(out / name).read_bytes() for name in ("state.pt", "state.previous.pt")]
    (out / "state.pt").write_bytes(states[0][:-1])
    told = []
    train(recipe, root, out, resume=True, on_step=told.append)
    assert [step.step for step in told] == [4, 5, 6] and steps_of(out) == [1, 2, 3, 4, 5, 6]
    assert_same(weights(out), weights(finished("float32")))


def test_state_that_cannot_be_saved(root, tmp_path):
    """The last good state stays; the message tells how to go on."""
    recipe = tiny("train.save_seconds=0.0")
    out = tmp_path / "out"
    with pytest.raises(StopError):
        train(recipe, root, out, on_step=stop_at(3))
    before = (out / "state.pt").read_bytes()
    (out / "state.tmp").mkdir()  # in the way of the new one
    with pytest.raises(OutputError, match=r"state.pt: the training state cannot be saved: .*free space and use --res"):
        train(recipe, root, out, resume=True)
    assert (out / "state.pt").read_bytes() == before
    (out / "state.tmp").rmdir()
    train(recipe, root, out, resume=True)
    assert steps_of(out) == [1, 2, 3, 4, 5, 6]


def test_log_that_cannot_be_written(root, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"log.jsonl: cannot be written: .*use --resume"):
        train(tiny(), root, out, on_step=lambda step: (out / "log.jsonl").mkdir())


def diverging(monkeypatch, steps):
    """Make the loss of these steps infinite; returns the weights before each step."""
    seen: list[dict[str, torch.Tensor]] = []
    losses = loop._Run._losses

    def _losses(run, network, batch):
        seen.append({name: value.detach().clone() for name, value in run.model.state_dict().items()})
        value = losses(run, network, batch)
        return value * torch.inf if len(seen) in steps else value

    monkeypatch.setattr(loop._Run, "_losses", _losses)
    return seen


def test_a_loss_that_is_not_finite_does_not_reach_the_weights(root, tmp_path, monkeypatch):
    seen = diverging(monkeypatch, {3})
    notes = []
    train(tiny("train.precision=float32"), root, tmp_path, on_note=notes.append)
    assert_same(seen[3], seen[2])  # statistics of the batch norm as well
    assert not torch.equal(seen[2]["norm.weight"], seen[1]["norm.weight"])
    assert not torch.equal(seen[4]["norm.weight"], seen[3]["norm.weight"])
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    (skipped,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert (skipped["step"], skipped["what"]) == (3, "loss") and skipped["clips"] == ["scene 4", "scene 5"]
    assert len(notes) == 1 and "step 3: the loss is not finite" in notes[0] and "scene 4, scene 5" in notes[0]
    assert (tmp_path / "model.safetensors").exists()


def test_too_many_losses_that_are_not_finite_end_the_run(root, tmp_path, monkeypatch):
    seen = diverging(monkeypatch, {3, 4, 5})
    recipe = tiny("train.precision=float32", "train.save_seconds=0.0", "train.max_skipped=2")
    with pytest.raises(HtsatError, match=r"step 5: the loss is not finite, as in the 2 steps before.*lower train.lear"):
        train(recipe, root, tmp_path)
    assert_same(seen[4], seen[2])
    state = RunFolder(tmp_path).load_state()
    assert state["step"] == 4 and all(torch.isfinite(value).all() for value in state["model"].values())
    assert not (tmp_path / "model.safetensors").exists()


# ------------------------------------------------------------------ what is done with a batch


def test_mixed_inputs_by_hand():
    """Each clip with its mirror image in the batch, after the batch norm: what the rest of the network is given."""
    recipe = tiny()
    torch.manual_seed(0)
    model = HTSAT(recipe.frontend, recipe.model).eval()
    network = loop.Network(model, model.num_frames)
    log_mel = torch.randn(4, model.num_frames, 64) * 10 - 30
    keep = (torch.rand(4, model.num_frames, 64) > 0.3).float()
    shares = torch.tensor([0.9, 0.25, 0.5, 0.0])
    with torch.no_grad():
        features = model.normalise(log_mel) * keep
        mixed = torch.stack(
            [
                0.9 * features[0] + 0.1 * features[3],
                0.25 * features[1] + 0.75 * features[2],
                0.5 * features[2] + 0.5 * features[1],
                features[0],
            ]
        )
        expected = model.analyse(mixed)
        found = network(log_mel, keep, shares)
        torch.testing.assert_close(found[0], expected.clipwise)
        torch.testing.assert_close(found[1], expected.framewise)
        torch.testing.assert_close(found[2], expected.coarse)
        plain = network(log_mel, None, None)
        torch.testing.assert_close(plain[0], model.classify(model.encode(model.normalise(log_mel)))[0])


def recorded(monkeypatch, root, tmp_path, *overrides):
    """Take one step; return what the network, and what the loss, was given."""
    given, targets = [], []
    forward, loss = loop.Network.forward, loop.clip_loss

    def _forward(network, log_mel, keep, shares):
        given.append((log_mel, keep, shares))
        return forward(network, log_mel, keep, shares)

    def _loss(logits, target, config):
        targets.append(target)
        return loss(logits, target, config)

    monkeypatch.setattr(loop.Network, "forward", _forward)
    monkeypatch.setattr(loop, "clip_loss", _loss)
    recipe = tiny("train.steps=1", "train.batch_size=4", "data.test_fold=0", "train.precision=float32", *overrides)
    train(recipe, root, tmp_path / str(len(list(tmp_path.iterdir()))))
    monkeypatch.undo()
    monkeypatch.setattr("htsat.training.journal.has_tensorboard", lambda: False)
    return given, targets


def test_mixup_of_inputs_leaves_labels_and_mixup_of_labels_mixes_them(root, tmp_path, monkeypatch):
    (plain,), (labels,) = recorded(monkeypatch, root, tmp_path, "augment.time_masks=0", "augment.mel_masks=0")
    (inputs,), (same,) = recorded(monkeypatch, root, tmp_path, "augment.mixup=inputs")
    _, (mixed,) = recorded(monkeypatch, root, tmp_path, "augment.mixup=labels")
    assert plain[1] is None and plain[2] is None and torch.equal(plain[0], inputs[0])
    shares = inputs[2]
    assert shares.shape == (4,) and ((shares >= 0) & (shares <= 1)).all() and len(set(shares.tolist())) == 4
    assert torch.equal(same, labels)
    for clip in range(4):
        expected = shares[clip] * labels[clip] + (1 - shares[clip]) * labels[3 - clip]
        torch.testing.assert_close(mixed[clip], expected)


def test_parts_of_a_batch_are_what_the_whole_batch_is(root, tmp_path, monkeypatch):
    """Computed in two parts: the same masks, shares and labels for each clip, and each with the same partner."""
    whole, targets = recorded(monkeypatch, root, tmp_path, "augment.mixup=labels")
    parts, in_parts = recorded(monkeypatch, root, tmp_path, "augment.mixup=labels", "train.accumulate=2")
    assert (len(whole), len(parts)) == (1, 2)
    for place in range(3):  # log-mel, masks, shares; the first part has the first and the last clip
        rows = torch.stack([parts[0][place][0], parts[1][place][0], parts[1][place][1], parts[0][place][1]])
        assert torch.equal(rows, whole[0][place])
    assert torch.equal(torch.stack([in_parts[0][0], in_parts[1][0], in_parts[1][1], in_parts[0][1]]), targets[0])


def test_frame_loss_counts_each_timed_clip_alike(root, tmp_path, monkeypatch):
    """Of four clips of which one has times, the mean over the batch holds the loss of that one once."""
    found = []
    losses = loop._Run._losses

    def _losses(run, network, batch):
        has = torch.tensor([False, True, False, False])
        some = dict(vars(batch)) | {"has_frames": has}
        value = losses(run, network, Batch(**some))
        without = losses(run, network, Batch(**(some | {"has_frames": torch.zeros(4, dtype=torch.bool)})))
        found.append((value - without).detach())
        return value

    monkeypatch.setattr(loop._Run, "_losses", _losses)
    settings = ("train.steps=1", "train.batch_size=4", "data.test_fold=0", "train.precision=float32")
    train(tiny(*settings, "model.drop_path=0", "train.single_weight=0.0"), root, tmp_path)
    extra = found[0]
    assert extra[1] > 0.1 and not extra[[0, 2, 3]].abs().gt(1e-5).any()
    # At the prior of 0.06 a silent token costs log(1 / 0.94), a sounding one log(1 / 0.06): the mean lies between.
    assert -math.log(0.94) / 2 < float(extra.mean()) < -math.log(0.06)


# ------------------------------------------------------------------ selection, unreadable clips

FEW = ("dog", "rain")


@pytest.fixture(scope="module")
def esc(tmp_path_factory):
    return make_esc50(tmp_path_factory.mktemp("esc"), labels=FEW)


def clips_recipe(*overrides):
    few = (
        "data.corpus=esc50",
        f"data.labels={list(FEW)}",
        "data.test_fold=5",
        "data.select=0.3",
        "train.steps=8",
        "train.min_steps=0",
    )
    return load_recipe("esc50", [*TINY_CLIPS, *few, *overrides])


def scored(monkeypatch, *scores):
    """Let the selection split be scored like this, one after the other."""
    left = list(scores)
    monkeypatch.setattr(loop, "headline", lambda found: ("accuracy", left.pop(0)))
    return left


def test_the_mean_of_the_best_and_an_early_end(esc, tmp_path, monkeypatch):
    """Best at step 2 and again at 4; three scores without a better one end the run after step 5."""
    left = scored(monkeypatch, 0.1, 0.5, 0.4, 0.5, 0.3, 0.9)
    recipe = clips_recipe("train.select_steps=1", "train.keep_best=2", "train.patience=3", "train.save_steps=1")
    candidates = {}

    def on_step(step):
        for path in tmp_path.glob("best-*.safetensors"):
            candidates.setdefault(path.name, load_file(path))

    train(recipe, esc, tmp_path, on_step=on_step)
    assert left == [0.9]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["steps"], report["selected_steps"], report["selection_score"]) == (5, [2, 4], 0.5)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["selection"]["accuracy"] for line in log if "selection" in line] == [0.1, 0.5, 0.4, 0.5, 0.3]
    candidates |= {path.name: load_file(path) for path in tmp_path.glob("best-*.safetensors")}
    first, second = (candidates[f"best-{step:08d}.safetensors"] for step in (2, 4))
    assert not torch.equal(first["norm.weight"], second["norm.weight"])
    for name, tensor in weights(tmp_path).items():
        if tensor.is_floating_point():
            expected = ((first[name].double() + second[name].double()) / 2).float()
            assert torch.equal(tensor, expected.to(tensor.dtype)), name


def test_a_better_score_starts_the_patience_anew(esc, tmp_path, monkeypatch):
    left = scored(monkeypatch, 0.5, 0.4, 0.6, 0.1, 0.6, 0.9, 0.9, 0.9)
    recipe = clips_recipe("train.select_steps=1", "train.patience=2")
    train(recipe, esc, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["steps"], report["selected_steps"], len(left)) == (5, [3], 3)


def test_selection_needs_clips(esc, tmp_path):
    with pytest.raises(HtsatError, match=r"train.select_steps needs clips to select on: .*data.select"):
        train(clips_recipe("train.select_steps=1", "data.select=0"), esc, tmp_path)


def test_epochs_are_turned_into_steps(esc, tmp_path):
    """20 clips and batches of 4: an epoch is five steps."""
    for number, (settings, steps) in enumerate(
        [
            (("train.epochs=0.5",), 3),
            (("train.epochs=0.1", "train.min_steps=2"), 2),
            (("train.epochs=9", "train.max_steps=1"), 1),
        ]
    ):
        told = []
        train(
            clips_recipe("data.select=0", "data.test_fold=0", *settings),
            esc,
            tmp_path / str(number),
            on_step=told.append,
        )
        assert len(told) == told[0].steps == steps


def test_unreadable_clips_are_listed_up_to_the_quota(esc, tmp_path):
    root = Path(shutil.copytree(esc, tmp_path / "esc"))
    damaged = sorted((root / "audio").glob("1-*.wav"))[0]
    damaged.write_bytes(b"RIFF but no more")
    notes = []
    out = tmp_path / "out"
    train(clips_recipe("data.select=0", "data.unreadable=0.07"), root, out, on_note=notes.append)  # 1 of 16
    header, line = (out / "unreadable.tsv").read_text().splitlines()
    assert header == "filename\treason" and line.split("\t")[0].endswith(damaged.name)
    assert sum("1 clips cannot be read so far" in note for note in notes) == 1
    (listed,) = json.loads((out / "report.json").read_text())["unreadable_clips"]
    assert listed.endswith(damaged.name)
    with pytest.raises(HtsatError, match=r"1 of 16 clips cannot be read, more than the 0 that data.unreadable 0.05"):
        train(clips_recipe("data.select=0", "data.unreadable=0.05"), root, tmp_path / "other")
    assert not (tmp_path / "other/model.safetensors").exists()


@pytest.mark.parametrize("workers", [2])
def test_workers_change_nothing(esc, tmp_path, workers):
    settings = ("data.select=0", "train.steps=3", "augment.mixup=waveforms")
    for number in (0, workers):
        train(clips_recipe(*settings, f"train.workers={number}"), esc, tmp_path / str(number))
    assert_same(weights(tmp_path / "0"), weights(tmp_path / str(workers)))


# ------------------------------------------------------------------ learning


@pytest.mark.slow
def test_loss_falls_and_the_held_out_fold_is_recognised(root, tmp_path):
    """Ten pure tones: whole clips without background or augmentation, then scored on clips of another fold."""
    recipe = load_recipe(
        "everyday",
        [
            *TINY, "train.steps=60", "train.batch_size=4", "train.learning_rate=3e-3", "train.precision=float32",
            "train.average_decay=0.9", "augment.equaliser_db=0", "augment.time_masks=0", "augment.mel_masks=0",
            "train.soundscape_share=0", "mix.whole_clip=1", "mix.background=0", "mix.speed=0", "model.drop_path=0",
            "train.single_weight=1", "train.weak_weight=1",
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
    from htsat.training.validate import hear_soundscapes

    model, _ = load_checkpoint(finished("float32") / "model.safetensors")
    recipe = dataclasses.replace(tiny(), decoding=DecodingConfig(threshold=0.0))
    short = Soundscape("short", np.zeros(3 * 8000 + 100, np.int16), ())
    full = Soundscape("full", np.zeros(5 * 8000, np.int16), ())
    found = hear_soundscapes(model, recipe, [short, full])
    for name, duration in (("short", 3.0125), ("full", 5.0)):
        assert {e.event_label for e in found[name].events} == set(recipe.data.labels)
        assert all((e.onset, e.offset) == (0.0, pytest.approx(duration)) for e in found[name].events)


def test_scores_of_soundscapes_are_those_of_a_predictor(finished):
    from htsat.metrics.detection import event_based, intersection_based
    from htsat.metrics.psds import PSDS1, PSDS2, psds_from_scores
    from htsat.predict import Predictor
    from htsat.training.validate import score_held_out

    path = finished("float32") / "model.safetensors"
    model, config = load_checkpoint(path)
    recipe = dataclasses.replace(tiny(), decoding=DecodingConfig(threshold=0.5))
    random = np.random.default_rng(4)
    # Events of two classes only: what the model says of the others is not scored.
    soundscapes = []
    for i in range(16):
        seconds = 3.0 + i % 3
        samples = (random.standard_normal(round(seconds * 8000)) * 300 * 30 ** (i % 2)).astype(np.int16)
        events = tuple(Event(config.labels[c], 0.5 * c, seconds) for c in range(min(i, 2)))
        soundscapes.append(Soundscape(f"{i}", samples, events))
    found = score_held_out(model, recipe, material.Material(None, [], [], soundscapes), lambda line, share: None)
    predictor = Predictor(path, device="cpu", decoding=recipe.decoding)
    said = {s.name: predictor.predict((s.waveform, 8000), spectrogram=False) for s in soundscapes}
    reference = {s.name: s.events for s in soundscapes}
    estimated = {name: one.events for name, one in said.items()}
    scores = {name: (one.framewise_posteriors, one.frame_boundaries) for name, one in said.items()}
    durations = {name: one.duration for name, one in said.items()}
    for name, settings in (("psds1", PSDS1), ("psds2", PSDS2)):
        assert found[name] == psds_from_scores(reference, scores, config.labels, durations, settings).value
    for name, metric in (("intersection_macro_f1", intersection_based), ("event_based_macro_f1", event_based)):
        assert found[name] == metric(reference, estimated, labels=config.labels[:2]).macro_f1
        low, high = found["intervals"][name]
        assert low <= found[name] <= high
    assert found["psds2"] > 0 and found["soundscapes"] == 16
