"""Recipes: everything a training run needs to be repeated, in one TOML file."""

import dataclasses
import json
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from htsat.config import (
    USED_BY,
    CheckpointConfig,
    DecodingConfig,
    FrontendConfig,
    InferenceConfig,
    ModelConfig,
    _check,
    from_dict,
    to_dict,
)
from htsat.data.mix import MixConfig
from htsat.errors import ConfigError, nearest


@dataclass(frozen=True)
class DataConfig:
    """What is trained on. Folders lie below the data root."""

    corpus: Literal[
        "scenes", "auto", "audioset", "esc50", "esc10", "speech_commands", "keywords", "desed", "folder", "csv",
        "strong", "shards",
    ] = "scenes"  # fmt: skip
    """``scenes``: mixed on the fly from the folders below; else a corpus as ``htsat data`` knows it."""
    folder: str = "."
    """Where the corpus lies."""
    labels: tuple[str, ...] = ()
    """Classes, in the order of the model's outputs; empty: those of the corpus."""
    test_fold: int = 0
    """Fold held out and scored once, after the last step; 0: none (corpora with a test split are scored on that)."""
    without_folds: tuple[int, ...] = ()
    """Folds kept out of the run altogether, neither trained on nor scored: for another run's test."""
    select: float = 0.0
    """Share of the training clips, by recording or speaker, set apart to select on where the corpus has no validation
    split; 0: none."""
    test: float = 0.0
    """The same for the clips that are scored at the end, where the corpus has no test split."""
    clip_seconds: float = 10.0
    """Clips are cut to this in training, at random, and filled up to it; 0: the shortest native input that holds nine
    of ten clips."""
    score_seconds: float = 0.0
    """Clips are cut to this when they are scored, as ESC-50 cuts the few that are longer; 0: heard whole."""
    unreadable: float = 0.01
    """Share of the clips that may be unreadable; they are left out and listed in ``unreadable.tsv``."""
    cache_gb: float = 4.0
    """Decoded clips kept in memory."""
    esc: str = "esc10"
    """scenes: ESC-50 or ESC-10 with ``meta/segments.tsv``, sources of events."""
    soundscapes: str | None = "soundscapes/train"
    """scenes: mixtures with strong labels; those with a part from the test fold are left out."""
    soundscapes_test: str | None = "soundscapes/val"
    """scenes: mixtures that are scored at the end if every part of them comes from the test fold."""
    backgrounds: str | None = None
    """Recordings laid behind the scenes or clips."""
    speech: str | None = None
    """scenes: keywords (``metadata.csv``); their training split is joined to utterances labelled ``speech``."""

    others: str | None = None
    """scenes: a folder like ESC-50's; its clips of ``other_labels`` are laid into scenes as sounds of no class."""
    other_labels: tuple[str, ...] = ()
    """Classes of ``others``; none: all that are not among ``labels``."""

    def __post_init__(self) -> None:
        if self.corpus == "scenes" and not self.labels:
            raise ConfigError("labels must name at least one class")
        if self.speech is not None and "speech" not in self.labels:
            raise ConfigError("labels lacks 'speech', which the speech recordings are for")
        if both := sorted(set(self.labels) & set(self.other_labels)):
            raise ConfigError(f"{both[0]!r} is among labels and among other_labels; a sound of no class has no label")
        if self.other_labels and self.others is None:
            raise ConfigError("other_labels needs others, the folder that holds them")
        _check("test_fold", self.test_fold, 0, 1_000_000)
        if self.test_fold in self.without_folds:
            raise ConfigError(f"test_fold {self.test_fold} is among without_folds; a fold is scored or kept out")
        for share in ("select", "test", "unreadable"):
            _check(share, getattr(self, share), 0, 1)
        if self.select + self.test > 0.9:
            raise ConfigError(f"select {self.select:g} and test {self.test:g} leave too few clips to train on")
        if self.clip_seconds:
            _check("clip_seconds", self.clip_seconds, 0.05, 60)
        _check("score_seconds", self.score_seconds, 0, 86400)
        _check("cache_gb", self.cache_gb, 0, 100_000)


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to clips in training. All of it depends on the seed and the place in the order of clips alone."""

    mixup: Literal["none", "inputs", "labels", "waveforms"] = "none"
    """``inputs``: log-mels of the batch and its reverse, labels left as they are (published); ``labels``: the same
    with mixed labels; ``waveforms``: two recordings by their loudness, labels by their shares (between-class
    learning, Tokozume et al. 2018)."""
    mixup_alpha: float = 0.5
    """Of the Beta distribution of the shares; ``waveforms`` draws them uniformly."""
    mixup_share: float = 1.0
    """Share of the clips that are mixed, for ``waveforms``."""
    roll: bool = False
    """Turn the clip around a random point in time."""
    gain_db: float = 0.0
    """Largest random gain, up and down."""
    shift_seconds: float = 0.0
    """Move the clip by up to so much, either way; silence follows it."""
    speed: float = 0.0
    """Largest relative change of speed and pitch."""
    background_share: float = 0.0
    """Share of the clips that get a background."""
    noise_share: float = 0.0
    """Share of the clips that get noise, between white and brown."""
    min_snr_db: float = 5.0
    """Smallest ratio of the clip's power to that of a background or noise."""
    max_snr_db: float = 30.0
    """Largest ratio."""
    equaliser_db: float = 0.0
    """Largest gain of the random equaliser."""
    time_masks: int = 0
    """SpecAugment: masked stretches of time."""
    max_frames: int = 24
    """SpecAugment: longest stretch, in log-mel frames."""
    mel_masks: int = 0
    """SpecAugment: masked mel bands."""
    max_mels: int = 8
    """SpecAugment: widest band, in mel bins."""

    def __post_init__(self) -> None:
        _check("mixup_alpha", self.mixup_alpha, 0.01, 100)
        _check("mixup_share", self.mixup_share, 0, 1)
        _check("gain_db", self.gain_db, 0, 60)
        _check("shift_seconds", self.shift_seconds, 0, 60)
        _check("speed", self.speed, 0, 1)
        _check("background_share", self.background_share, 0, 1)
        _check("noise_share", self.noise_share, 0, 1)
        _check("min_snr_db", self.min_snr_db, -60, 60)
        _check("max_snr_db", self.max_snr_db, self.min_snr_db, 60)
        _check("equaliser_db", self.equaliser_db, 0, 60)
        for size in ("time_masks", "max_frames", "mel_masks", "max_mels"):
            _check(size, getattr(self, size), 0, 10_000)


@dataclass(frozen=True)
class StartConfig:
    """What the weights are before the first step."""

    model: str = ""
    """A name (``htsat models``), a checkpoint, published weights, or Swin-Tiny ImageNet weights; empty: random."""
    freeze: tuple[str, ...] = ()
    """Beginnings of the names of weights that do not learn, e.g. ``mel_norm``, ``patch_embed``, ``stages.0``."""
    freeze_steps: int = 0
    """Steps after which frozen weights learn too; 0: never."""
    body_rate: float = 1.0
    """Learning rate of everything but the head, relative to the head's."""

    def __post_init__(self) -> None:
        _check("freeze_steps", self.freeze_steps, 0, 100_000_000)
        _check("body_rate", self.body_rate, 0, 1)
        if self.freeze_steps and not self.freeze:
            raise ConfigError("freeze_steps without freeze: name the weights that are frozen first")


@dataclass(frozen=True)
class DistillConfig:
    """Learning from a teacher's posteriors beside the labels (knowledge distillation)."""

    teacher: str = ""
    """Any model that ``htsat`` loads; it hears what the student hears."""
    logits: str = ""
    """Saved clip logits (``.npz`` with ``names``, ``labels``, ``logits``), below the data root."""
    weight: float = 0.5
    """Share of the teacher in the clip loss."""
    temperature: float = 1.0
    """Both logits are divided by this."""

    def __post_init__(self) -> None:
        _check("weight", self.weight, 0, 1)
        _check("temperature", self.temperature, 0.1, 100)
        if self.teacher and self.logits:
            raise ConfigError("teacher and logits exclude each other; give one")


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 2500
    """Optimiser steps; not used if ``epochs`` is given."""
    epochs: float = 0.0
    """Passes over the training clips; 0: ``steps`` counts."""
    min_steps: int = 0
    """At least so many steps, however few the clips are; with ``epochs``."""
    max_steps: int = 0
    """At most so many steps, with ``epochs``; 0: no limit."""
    batch_size: int = 16
    """Clips or scenes per optimiser step, over all processes."""
    accumulate: int = 1
    """Parts that a process computes its share of a batch in, to save memory."""
    seed: int = 1
    """Of weights, order and augmentation."""
    fit: Literal["native", "tile", "pad", "stretch"] = "native"
    """Clips shorter than a chunk: at their own length, repeated (published training), followed by silence, or
    stretched."""
    balanced: bool = False
    """Draw classes evenly instead of clips."""
    loss: Literal["auto", "bce", "ce", "asymmetric"] = "bce"
    """Of the clip logits: each class for itself (``bce``), exactly one class (``ce``), or asymmetric (Ridnik et al.
    2021); ``auto``: ``ce`` if every clip has exactly one label, else ``bce``."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over the classes."""
    asymmetric_gamma: float = 4.0
    """Focusing exponent of the negatives, for ``asymmetric``."""
    asymmetric_margin: float = 0.05
    """Posterior of a negative below which it has no loss, for ``asymmetric``."""
    schedule: Literal["cosine", "halving", "published", "constant"] = "cosine"
    """After the warm-up: half a cosine to 0; halved every 10 epochs down to a twentieth (the paper); the released
    code's steps (0.02, 0.05, 0.1 of the rate in the epochs 1 to 3 and so on, rising again at epoch 31); constant."""
    learning_rate: float = 1e-3
    """At the peak, after the warm-up."""
    warmup: float = 0.06
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.05
    """Of matrices and kernels; biases, norms, position tables and the frequency embedding have none."""
    decay_all: bool = False
    """Decay every weight, as published."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    average_decay: float = 0.998
    """Of the exponential moving average of the weights, which is what is scored and saved; 0: the weights."""
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the network in training (autocast); the front end and the losses are float32."""
    recompute: bool = False
    """Recompute activations in the backward pass to save memory."""
    compile: bool = False
    """Compile the network with ``torch.compile``."""
    prior: float = 0.06
    """Posterior of every class before the first step; 0: as the layers are made."""
    soundscape_share: float = 0.3
    """scenes: share of recorded soundscapes instead of fresh mixtures."""
    strong_weight: float = 1.0
    """Weight of the framewise loss, for clips with timed events."""
    token_weight: float = 0.5
    """With a fine head: weight of the framewise loss of the tokens, relative to that of the fine steps."""
    weak_weight: float = 1.0
    """Weight of the clipwise loss."""
    single_weight: float = 0.0
    """Weight of the cross-entropy between classes on tokens where exactly one sounds."""
    select_steps: int = 0
    """Steps between scores on the selection split; 0: only the last weights count."""
    keep_best: int = 1
    """The mean of this many best averages, by their selection scores, is the result."""
    patience: int = 0
    """Scores without a better one after which the run ends early; 0: never."""
    max_skipped: int = 20
    """Steps in a row with a non-finite loss or gradient, which do not reach the weights, after which the run ends."""
    save_seconds: float = 60.0
    """Time between states to resume from."""
    save_steps: int = 0
    """Steps between states to resume from, besides; 0: only by time."""
    workers: int = 0
    """Processes that prepare clips, per training process; 0: the training process itself."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` ..."""
    threads: int = 0
    """CPU threads; 0: PyTorch's choice."""
    wandb: str = ""
    """Project of Weights & Biases to log to (extra ``wandb``); empty: none."""

    def __post_init__(self) -> None:
        _check("steps", self.steps, 1, 100_000_000)
        _check("epochs", self.epochs, 0, 1_000_000)
        _check("min_steps", self.min_steps, 0, 100_000_000)
        _check("max_steps", self.max_steps, 0, 100_000_000)
        if self.max_steps and self.min_steps > self.max_steps:
            raise ConfigError(f"min_steps {self.min_steps} is above max_steps {self.max_steps}")
        _check("batch_size", self.batch_size, 1, 65536)
        _check("accumulate", self.accumulate, 1, 65536)
        _check("seed", self.seed, 0, 2**32 - 1)
        _check("label_smoothing", self.label_smoothing, 0, 1)
        _check("asymmetric_gamma", self.asymmetric_gamma, 0, 20)
        _check("asymmetric_margin", self.asymmetric_margin, 0, 0.5)
        _check("learning_rate", self.learning_rate, 0, 10)
        _check("warmup", self.warmup, 0, 1)
        _check("weight_decay", self.weight_decay, 0, 10)
        _check("clip_norm", self.clip_norm, 1e-6, 1e6)
        _check("average_decay", self.average_decay, 0, 1)
        _check("prior", self.prior, 0, 0.99)
        _check("soundscape_share", self.soundscape_share, 0, 1)
        for weight in ("strong_weight", "token_weight", "weak_weight", "single_weight"):
            _check(weight, getattr(self, weight), 0, 1e6)
        _check("select_steps", self.select_steps, 0, 100_000_000)
        _check("keep_best", self.keep_best, 1, 100)
        _check("patience", self.patience, 0, 1_000_000)
        _check("max_skipped", self.max_skipped, 0, 1_000_000)
        _check("save_seconds", self.save_seconds, 0, 1e9)
        _check("save_steps", self.save_steps, 0, 100_000_000)
        _check("workers", self.workers, 0, 1024)
        _check("threads", self.threads, 0, 1024)


@dataclass(frozen=True)
class Recipe:
    """A training run."""

    description: str
    """One line for people."""
    data: DataConfig
    frontend: FrontendConfig = field(default_factory=FrontendConfig)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(num_classes=0))
    train: TrainConfig = field(default_factory=TrainConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    start: StartConfig = field(default_factory=StartConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        if self.data.labels and len(self.data.labels) != self.model.num_classes:
            raise ConfigError(
                f"data.labels names {len(self.data.labels)} classes but model.num_classes is {self.model.num_classes}"
            )
        if not self.data.labels and self.model.num_classes:
            raise ConfigError(
                f"model.num_classes is {self.model.num_classes} but data.labels is empty; leave num_classes 0, which "
                "stands for the classes of the corpus"
            )
        if self.data.corpus == "scenes":
            for name, wanted in (("balanced", False), ("loss", "bce"), ("fit", "native")):
                if getattr(self.train, name) != wanted:
                    raise ConfigError(f"train.{name} does not go with data.corpus 'scenes'; leave it {wanted!r}")
        if self.model.fine_frames and not self.train.strong_weight:
            raise ConfigError("model.fine_frames: a fine head learns from timed events alone; set train.strong_weight")
        if self.augment.background_share and not self.data.backgrounds:
            raise ConfigError("augment.background_share needs data.backgrounds, a folder of recordings")
        if self.distill.logits and self.augment.mixup not in ("none", "inputs"):
            raise ConfigError(
                f"distill.logits are of whole recordings and do not go with augment.mixup {self.augment.mixup!r}; "
                "use distill.teacher, which hears what the student hears"
            )
        if self.train.batch_size % self.train.accumulate:
            raise ConfigError(
                f"batch_size {self.train.batch_size} cannot be computed in {self.train.accumulate} equal parts; "
                "choose an accumulate that divides it"
            )
        if self.data.corpus != "scenes" and self.data.clip_seconds > self.model.chunk_seconds:
            raise ConfigError(
                f"clip_seconds {self.data.clip_seconds:g} is longer than a chunk, {self.model.chunk_seconds:g} s"
            )
        # Holds the checks that involve several sections: to fail now, not when the trained model is to be saved.
        self.checkpoint({})

    @property
    def objective(self) -> Literal["single_label", "multi_label"]:
        """What the models of this run are for: exactly one label per clip, or several."""
        return "single_label" if self.train.loss == "ce" else "multi_label"

    def checkpoint(self, provenance: dict[str, Any]) -> CheckpointConfig:
        """Return the configuration of the checkpoints of this run."""
        return CheckpointConfig(
            self.frontend,
            self.model,
            labels=self.data.labels,
            objective=self.objective,
            framewise="softmax" if self.objective == "single_label" else "sigmoid",
            decoding=self.decoding,
            inference=self.inference,
            provenance=provenance,
        )

    def with_labels(self, labels: tuple[str, ...]) -> Self:
        """Return the recipe for these classes."""
        return dataclasses.replace(
            self,
            data=dataclasses.replace(self.data, labels=labels),
            model=dataclasses.replace(self.model, num_classes=len(labels)),
        )


def shipped_recipes(*, published: bool = False) -> dict[str, Path]:
    """Return the recipes inside the package: name -> file.

    Args:
        published: those that follow the released code of the paper, every quirk included, instead of ours.
    """
    folder = Path(str(resources.files("htsat") / "recipes"))
    folder = folder / "published" if published else folder
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_recipe(name_or_path: str, overrides: list[str] | None = None, *, published: bool = False) -> Recipe:
    """Read a shipped recipe by name, or a TOML file, and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: unknown recipe, unreadable TOML, unknown key, wrong type or value out of range.
    """
    shipped = shipped_recipes(published=published)
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        known = ", ".join(shipped)
        kind = "published recipe" if published else "shipped recipe"
        raise ConfigError(f"{name_or_path}: neither a {kind} ({known}) nor a file{nearest(name_or_path, shipped)}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None
    shipped_with = dict(values["model"]) if isinstance(values.get("model"), dict) else {}
    for override in overrides or []:
        _apply(values, override)
    model, data = values.setdefault("model", {}), values.get("data", {})
    if isinstance(model, dict) and model.get("architecture") != shipped_with.get("architecture"):
        # Another architecture on the command line: what the recipe says of its own one alone does not count.
        for key, architectures in USED_BY.items():
            if model.get("architecture") not in architectures and model.get(key) == shipped_with.get(key):
                model.pop(key, None)
    if isinstance(model, dict) and isinstance(data, dict) and isinstance(data.get("labels", []), list):
        model.setdefault("num_classes", len(data.get("labels", [])))
    return from_dict(Recipe, values, path.name)


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one ``section.key=value`` in nested tables; the value is TOML, or else a plain string."""
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected section.key=value, e.g. train.steps=500")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = values
    *sections, last = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {section} is not a section")
    table[last] = value


def recipe_json(recipe: Recipe) -> str:
    """Return the resolved recipe as JSON text, as it is stored in a run folder."""
    return json.dumps(to_dict(recipe), indent=1, sort_keys=True) + "\n"
