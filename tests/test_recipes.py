"""Recipes: every shipped one is whole, its network can be built, and whatever is wrong is told in one line."""

import dataclasses
import json

import pytest
import torch

from htsat.config import to_dict
from htsat.errors import ConfigError
from htsat.model.htsat import HTSAT
from htsat.training.recipe import Recipe, load_recipe, recipe_json, shipped_recipes

SHIPPED = [(name, published) for published in (False, True) for name in shipped_recipes(published=published)]


@pytest.mark.parametrize(("name", "published"), SHIPPED)
def test_every_shipped_recipe_parses(name, published):
    recipe = load_recipe(name, published=published)
    assert recipe.description and "\n" not in recipe.description
    assert len(recipe.data.labels) == recipe.model.num_classes
    assert recipe == load_recipe(str(shipped_recipes(published=published)[name]))
    # The schema is closed: the resolved recipe is a recipe again.
    assert json.loads(recipe_json(recipe)) == json.loads(json.dumps(to_dict(recipe)))
    # Its network exists, with as many classes as any corpus may have.
    with torch.device("meta"):
        HTSAT(recipe.frontend, dataclasses.replace(recipe.model, num_classes=7))
    if published:
        # Nothing that is ours beside what the paper or its code has.
        assert (recipe.model.stem, recipe.model.embed_dim, recipe.model.depths) == ("patch", 96, (2, 2, 6, 2))
        assert not recipe.model.frequency_embedding and recipe.frontend.floor_db == -100.0
        assert recipe.train.decay_all and recipe.train.schedule == "published" and recipe.train.average_decay == 0
        assert recipe.augment.mixup in ("none", "inputs")


def test_names_of_recipes():
    ours, published = shipped_recipes(), shipped_recipes(published=True)
    assert {"everyday", "esc50"} <= ours.keys()
    # `--published` has a counterpart of each, and a reader of a list finds no other.
    assert published.keys() <= ours.keys()


def test_a_recipe_for_classes(tmp_path):
    recipe = load_recipe("esc50").with_labels(("dog", "rain"))
    assert (recipe.data.labels, recipe.model.num_classes) == (("dog", "rain"), 2)
    assert recipe.checkpoint({"a": 1}).objective == "single_label"
    assert recipe.checkpoint({"a": 1}).provenance == {"a": 1}
    several = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, loss="bce"))
    assert several.checkpoint({}).objective == "multi_label"


@pytest.mark.parametrize("architecture", ["cnn14", "crnn"])
@pytest.mark.parametrize("name", ["everyday", "events", "esc50"])
def test_baselines_train_by_the_same_recipes(name, architecture):
    ours = load_recipe(name)
    recipe = load_recipe(name, [f"model.architecture={architecture}"])
    same = dataclasses.replace(recipe, model=ours.model)
    assert same == ours and recipe.model.architecture == architecture and not recipe.model.fine_frames
    with pytest.raises(ConfigError, match="embed_dim is a setting of htsat"):
        load_recipe(name, [f"model.architecture={architecture}", "model.embed_dim=32"])


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
        ("augment.mixap='none'", r"everyday.toml.augment: unknown key 'mixap'; did you mean 'mixup'\?"),
        ("start.modell='x'", r"everyday.toml.start: unknown key 'modell'; did you mean 'model'\?"),
        ("distill.temprature=2", r"everyday.toml.distill: unknown key 'temprature'; did you mean 'temperature'\?"),
        ("data.corpus=esc51", r"data.corpus: expected one of .* got 'esc51'; did you mean 'esc50'\?"),
        ("train.steps=many", r"train.steps: expected int, got 'many'"),
        ("train.steps=5.5", r"train.steps: expected int, got 5.5"),
        ("train.steps=", r"train.steps: expected int, got ''"),
        ("train.steps", r"--set train.steps: expected section.key=value"),
        ("=5", r"--set =5: expected section.key=value"),
        ("train=5", r"train: expected a table"),
        ("data=5", r"data: expected a table"),
        ("model=5", r"model: expected a table"),
        ("data.labels=dog", r"data.labels: expected a list, got 'dog'"),
        ("description.text=5", r"description is not a section"),
        ("train.steps=0", r"train: steps must be between 1 and"),
        ("train.seed=-1", r"seed must be between 0"),
        ("augment.time_masks=-1", r"augment: time_masks must be between 0"),
        ("augment.min_snr_db=31", r"augment: max_snr_db must be between 31 and 60, got 30"),
        ("train.learning_rate=nan", r"learning_rate: expected a finite number"),
        ("train.precision=float8", r"expected one of 'float32', 'bfloat16', 'float16', got 'float8'"),
        ("train.batch_size=7", r"^everyday.toml: batch_size 7 cannot be computed in 2 equal parts; choose an acc"),
        ("mix.min_snr_db=40", r"mix: smallest snr_db 40 is above the largest"),
        ("data.test_fold=-1", r"test_fold must be between 0"),
        ("data.select=0.95", r"select 0.95 and test 0 leave too few clips to train on"),
        ("data.labels=[]", r"labels must name at least one class"),
        ('data.labels=["dog"]', r"labels lacks 'speech'"),
        ("model.num_classes=10", r"data.labels names 11 classes but model.num_classes is 10"),
        ("train.loss=ce", r"train.loss does not go with data.corpus 'scenes'; leave it 'bce'"),
        ("train.balanced=true", r"train.balanced does not go with data.corpus 'scenes'; leave it False"),
        ("train.fit=tile", r"train.fit does not go with data.corpus 'scenes'; leave it 'native'"),
        ("start.freeze_steps=5", r"start: freeze_steps without freeze: name the weights"),
        # What would otherwise be found when the trained model is saved.
        ("decoding.per_class.dogs.threshold=0.8", r"decoding names the label 'dogs' .*did you mean 'dog'\?"),
        ("frontend.hop_length=160", r"chunk_seconds 10 gives 2001 frames, more than the 1024"),
        ("inference.hop_seconds=11.0", r"hop_seconds 11 leaves gaps"),
    ],
)
def test_wrong_overrides(override, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load_recipe("everyday", ["train.accumulate=2", override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.num_classes=10"], r"model.num_classes is 10 but data.labels is empty; leave num_classes 0"),
        (["data.clip_seconds=11.0"], r"clip_seconds 11 is longer than a chunk, 10 s"),
        (["augment.background_share=0.5"], r"augment.background_share needs data.backgrounds, a folder"),
        (["distill.logits=a.npz"], r"distill.logits are of whole recordings .* use distill.teacher, which hears"),
        (["distill.logits=a.npz", "distill.teacher=b"], r"teacher and logits exclude each other; give one"),
    ],
)
def test_settings_of_clips_that_contradict_each_other(overrides, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load_recipe("esc50", overrides)
    assert "\n" not in str(caught.value)
    # What resolves the contradiction is accepted.
    load_recipe("esc50", ["distill.logits=a.npz", "augment.mixup=inputs"])
    load_recipe("esc50", ["augment.background_share=0.5", "data.backgrounds=noise"])


def test_recipes_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"everyda: neither .* nor a file; did you mean 'everyday'\?"):
        load_recipe("everyda")
    with pytest.raises(ConfigError, match=r"everyda: neither a published recipe \("):
        load_recipe("everyda", published=True)
    with pytest.raises(ConfigError, match="neither a shipped recipe"):
        load_recipe(str(tmp_path))
    for content in (b"[train\nsteps = 5", b"\xff\xfe\x00", b"a = 1\na = 2"):
        (tmp_path / "broken.toml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"broken.toml: cannot be read as TOML"):
            load_recipe(str(tmp_path / "broken.toml"))
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ConfigError, match=r"empty.toml: key 'description' is missing"):
        load_recipe(str(tmp_path / "empty.toml"))


def test_a_short_recipe_is_enough(tmp_path):
    (tmp_path / "own.toml").write_text('description = "own"\n[data]\ncorpus = "folder"\n')
    recipe = load_recipe(str(tmp_path / "own.toml"))
    assert isinstance(recipe, Recipe) and recipe.model.num_classes == 0 and recipe.model.embed_dim == 96
