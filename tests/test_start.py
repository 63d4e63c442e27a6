"""What a run starts from, what stays frozen, and its teacher."""

import dataclasses

import numpy as np
import pytest
import torch
from miniature import TINY_CLIPS
from miniature_corpora import make_esc50

from htsat.config import InferenceConfig
from htsat.errors import CheckpointError, ConfigError
from htsat.model.checkpoint import load_checkpoint, save_checkpoint
from htsat.model.htsat import HTSAT
from htsat.training import loop
from htsat.training.recipe import load_recipe
from htsat.training.start import Teacher, load_start, make_model, set_frozen

LABELS = ("dog", "rain", "clock_tick")


def recipe_of(*overrides, labels=LABELS):
    return load_recipe("esc50", [*TINY_CLIPS, *overrides]).with_labels(labels)


def network(recipe, seed=0):
    torch.manual_seed(seed)
    model = HTSAT(recipe.frontend, recipe.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.mel_norm.running_mean.fill_(-30.0)
    model.labels, model.checkpoint = recipe.data.labels, recipe.checkpoint({})
    return model


def saved(path, labels=("rain", "cat", "dog"), *overrides):
    """Save a network of the same size with other classes."""
    recipe = recipe_of(*overrides, labels=labels)
    model = network(recipe, seed=5)
    save_checkpoint(path, model, recipe.checkpoint({}))
    return model


# ------------------------------------------------------------------ weights


def test_classes_of_the_same_name_are_taken_over(tmp_path):
    other = saved(tmp_path / "a.safetensors")
    model = network(recipe_of())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    note = load_start(model, str(tmp_path / "a.safetensors"), LABELS)
    assert note.endswith("a.safetensors: 2 of 3 classes taken over")
    theirs, found = other.state_dict(), model.state_dict()
    for name, tensor in found.items():
        if not name.startswith("token_semantic"):
            assert torch.equal(tensor, theirs[name]), name
    for name in ("token_semantic.weight", "token_semantic.bias"):
        assert torch.equal(found[name][0], theirs[name][2])  # dog
        assert torch.equal(found[name][1], theirs[name][0])  # rain
        assert torch.equal(found[name][2], before[name][2])  # clock_tick starts anew


def test_all_classes_and_no_classes(tmp_path):
    saved(tmp_path / "same.safetensors", LABELS[::-1])
    assert load_start(network(recipe_of()), str(tmp_path / "same.safetensors"), LABELS).endswith("same.safetensors")
    model = network(recipe_of())
    before = model.token_semantic.weight.clone()
    saved(tmp_path / "none.safetensors", ("x", "y"))
    assert "0 of 3 classes" in load_start(model, str(tmp_path / "none.safetensors"), LABELS)
    assert torch.equal(model.token_semantic.weight, before)
    note = load_start(network(recipe_of("frontend.floor_db=-80")), str(tmp_path / "same.safetensors"), LABELS)
    assert note.endswith("; its front end has other settings")


def test_another_architecture_is_refused_and_nothing_is_loaded(tmp_path):
    saved(tmp_path / "wide.safetensors", LABELS, "model.embed_dim=32")
    model = network(recipe_of())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"wide.safetensors: is of another architecture.*\[16, 16\].*as `htsat in"
    ):
        load_start(model, str(tmp_path / "wide.safetensors"), LABELS)
    saved(tmp_path / "conv.safetensors", LABELS, "model.stem=conv")
    with pytest.raises(CheckpointError, match=r"tensor patch_embed.proj.weight must be .* the file lacks it"):
        load_start(model, str(tmp_path / "conv.safetensors"), LABELS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match="nowhere"):
        load_start(model, str(tmp_path / "nowhere.safetensors"), LABELS)


def test_the_prior_is_what_an_untrained_model_says():
    notes = []
    model = make_model(recipe_of("train.prior=0.2"), notes.append)
    assert torch.sigmoid(model.token_semantic.bias).tolist() == pytest.approx([0.2] * 3) and not notes
    torch.manual_seed(1)
    plain = make_model(recipe_of("train.prior=0.0"), notes.append)
    torch.manual_seed(1)
    assert torch.equal(plain.token_semantic.bias, HTSAT(plain.frontend_config, plain.config).token_semantic.bias)


# ------------------------------------------------------------------ frozen weights


def learning(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_frozen_by_the_beginnings_of_names():
    model = network(recipe_of())
    everything = {name for name, _ in model.named_parameters()}
    assert learning(model) == everything
    set_frozen(model, ("patch_embed", "stages.0", "mel_norm.weight"))
    assert learning(model) == {
        name for name in everything if not name.startswith(("patch_embed", "stages.0")) and name != "mel_norm.weight"
    }
    set_frozen(model, ())
    assert learning(model) == everything
    with pytest.raises(ConfigError, match=r"start.freeze: no weights begin with 'patch_embd'"):
        set_frozen(model, ("stages", "patch_embd"))
    assert learning(model) == everything


@pytest.fixture(scope="module")
def esc(tmp_path_factory):
    return make_esc50(tmp_path_factory.mktemp("esc"), labels=LABELS)


@pytest.fixture
def trained(esc, tmp_path, monkeypatch):
    """Run a recipe; returns its run folder, notes and the weights after each step."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("htsat.training.journal.has_tensorboard", lambda: False)
    after: list[dict[str, torch.Tensor]] = []
    update = loop.update_average

    def _update(average, model, decay, step):
        after.append({name: tensor.detach().clone() for name, tensor in model.named_parameters()})
        update(average, model, decay, step)

    monkeypatch.setattr(loop, "update_average", _update)

    def run(*overrides):
        after.clear()
        notes = []
        few = f"data.labels={list(LABELS)}"
        recipe = load_recipe("esc50", [*TINY_CLIPS, "data.corpus=esc50", few, "data.test_fold=5", *overrides])
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        loop.train(recipe, esc, out, on_note=notes.append)
        return out, notes, list(after)

    return run


def test_frozen_weights_learn_from_the_given_step_on(trained):
    _, _, after = trained('start.freeze=["stages", "patch_embed"]', "start.freeze_steps=2", "train.steps=4")
    frozen = "stages.0.blocks.0.mlp.fc1.weight"
    assert torch.equal(after[0][frozen], after[1][frozen])
    assert not torch.equal(after[1][frozen], after[2][frozen])
    for step in range(3):
        assert not torch.equal(after[step]["norm.weight"], after[step + 1]["norm.weight"])
    _, _, always = trained('start.freeze=["stages"]', "train.steps=3")
    assert torch.equal(always[0][frozen], always[2][frozen])


def test_a_slow_body(trained):
    """Adam's first step is the learning rate in each weight, whatever the gradient."""
    common = ("train.warmup=0", "train.schedule=constant", "train.weight_decay=0", "train.learning_rate=0.01")
    _, _, after = trained("start.body_rate=0.1", "train.steps=2", *common)
    moved = {name: float((after[1][name] - after[0][name]).abs().max()) for name in after[0]}
    head = max(moved["token_semantic.weight"], moved["token_semantic.bias"])
    body = max(value for name, value in moved.items() if not name.startswith("token_semantic"))
    assert 0.002 < head < 0.03 and 0.0002 < body < 0.003


def test_a_run_from_a_checkpoint(trained, tmp_path):
    other = saved(tmp_path / "other.safetensors")
    out, notes, after = trained(
        f"start.model={tmp_path / 'other.safetensors'}", "train.learning_rate=0", "train.steps=1"
    )
    assert any("2 of 3 classes taken over" in note for note in notes)
    start = dict(other.named_parameters())
    for name, tensor in after[0].items():
        if not name.startswith("token_semantic"):
            assert torch.equal(tensor, start[name]), name
    assert load_checkpoint(out / "model.safetensors")[1].labels == LABELS


# ------------------------------------------------------------------ teachers


def test_a_teacher_says_what_its_model_says_in_the_students_order():
    recipe = recipe_of(labels=("cat", "clock_tick", "dog", "rain"))
    model = network(recipe)
    model.checkpoint = dataclasses.replace(model.checkpoint, inference=InferenceConfig(short="native", hop_seconds=1))
    teacher = Teacher(model, LABELS, recipe.frontend.sample_rate)
    waveforms = 0.1 * torch.randn(2, 4000)
    with torch.no_grad():
        expected = model(waveforms, "native").clipwise_logits[:, [2, 3, 1]]
    found = teacher(waveforms)
    assert torch.equal(found, expected) and not found.requires_grad and not found.is_inference()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    teacher.train()  # as whoever holds it may do: it still hears as before


def test_teachers_that_do_not_fit():
    model = network(recipe_of(labels=("dog", "rain", "clocktick")))
    with pytest.raises(ConfigError, match=r"hears 8000 Hz, the student 16000 Hz; set frontend.sample_rate"):
        Teacher(model, LABELS, 16000)
    with pytest.raises(ConfigError, match=r"lacks 1 of the 3 classes: clock_tick; did you mean 'clocktick'\?"):
        Teacher(model, LABELS, 8000)


def test_the_teacher_alone_decides_where_its_weight_is_one(trained, tmp_path, monkeypatch):
    """Against the mean cross-entropy of the student's and the teacher's distributions, computed here."""
    teacher = saved(tmp_path / "teacher.safetensors", LABELS)
    seen = []
    losses = loop._Run._losses

    def _losses(run, network_, batch):
        found = losses(run, network_, batch)
        seen.append((batch.waveforms.clone(), found.detach()))
        return found

    monkeypatch.setattr(loop._Run, "_losses", _losses)
    forward = loop.Network.forward
    logits = []

    def _forward(self, *arguments):
        found = forward(self, *arguments)
        logits.append(found[0].detach())
        return found

    monkeypatch.setattr(loop.Network, "forward", _forward)
    path = tmp_path / "teacher.safetensors"
    trained(f"distill.teacher={path}", "distill.weight=1.0", "distill.temperature=2.0", "train.steps=1")
    with torch.no_grad():
        # A saved teacher without a setting of its own pads.
        said = teacher(seen[0][0], teacher.checkpoint.inference.short).clipwise_logits
    p, q = torch.softmax(said.double() / 2, 1), torch.log_softmax(logits[0].double() / 2, 1)
    np.testing.assert_allclose(seen[0][1].numpy(), (-4 * (p * q).sum(1)).numpy(), rtol=1e-4)
