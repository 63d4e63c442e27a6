"""Recipes: everything a training run needs to be repeated, in one TOML file."""

import json
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from htsat.config import (
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
    """What is trained on: folders below the data root."""

    labels: tuple[str, ...]
    """Classes, in the order of the model's outputs."""
    esc: str = "esc10"
    """ESC-50 or ESC-10 with ``meta/segments.tsv``: sources of events."""
    soundscapes: str | None = "soundscapes/train"
    """Mixtures with strong labels; those with a part from the test fold are left out."""
    soundscapes_test: str | None = "soundscapes/val"
    """Mixtures that are scored at the end if every part of them comes from the test fold."""
    backgrounds: str = "backgrounds"
    """Recordings laid behind the scenes."""
    speech: str | None = None
    """Spoken keywords (``metadata.csv``); their training split is joined to utterances labelled ``speech``."""
    test_fold: int = 0
    """Fold held out and scored once, after the last step; 0: train on all, score nothing."""

    def __post_init__(self) -> None:
        if not self.labels:
            raise ConfigError("labels must name at least one class")
        if self.speech is not None and "speech" not in self.labels:
            raise ConfigError("labels lacks 'speech', which the speech recordings are for")
        _check("test_fold", self.test_fold, 0, 1_000_000)


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 2500
    """Optimiser steps."""
    batch_size: int = 16
    """Scenes per step."""
    seed: int = 1
    """Of weights, scenes and augmentation."""
    learning_rate: float = 1e-3
    """At the peak, after the warm-up; then it falls to 0 along a cosine."""
    warmup: float = 0.06
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.05
    """Of matrices, kernels and the frequency embedding; biases, norms and relative position tables have none."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    average_decay: float = 0.998
    """Of the exponential moving average of the weights, which is what is saved."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the network in training (autocast); the front end and the losses are float32."""
    soundscape_share: float = 0.3
    """Share of scenes that are recorded soundscapes instead of fresh mixtures."""
    strong_weight: float = 1.0
    """Weight of the framewise loss."""
    weak_weight: float = 1.0
    """Weight of the clipwise loss."""
    single_weight: float = 1.0
    """Weight of the cross-entropy between classes on tokens where exactly one sounds."""
    equaliser_db: float = 5.0
    """Largest gain of the random equaliser."""
    time_masks: int = 2
    """SpecAugment: masked stretches of time."""
    max_frames: int = 24
    """SpecAugment: longest stretch, in log-mel frames."""
    mel_masks: int = 2
    """SpecAugment: masked mel bands."""
    max_mels: int = 8
    """SpecAugment: widest band, in mel bins."""
    save_seconds: float = 60.0
    """Time between checkpoints for resuming."""
    threads: int = 0
    """CPU threads; 0: all."""

    def __post_init__(self) -> None:
        _check("steps", self.steps, 1, 10_000_000)
        _check("batch_size", self.batch_size, 1, 65536)
        _check("seed", self.seed, 0, 2**32 - 1)
        _check("learning_rate", self.learning_rate, 0, 10)
        _check("warmup", self.warmup, 0, 1)
        _check("weight_decay", self.weight_decay, 0, 10)
        _check("clip_norm", self.clip_norm, 1e-6, 1e6)
        _check("average_decay", self.average_decay, 0, 1)
        _check("soundscape_share", self.soundscape_share, 0, 1)
        for weight in ("strong_weight", "weak_weight", "single_weight"):
            _check(weight, getattr(self, weight), 0, 1e6)
        _check("equaliser_db", self.equaliser_db, 0, 60)
        for size in ("time_masks", "max_frames", "mel_masks", "max_mels"):
            _check(size, getattr(self, size), 0, 10_000)
        _check("save_seconds", self.save_seconds, 0, 1e9)
        _check("threads", self.threads, 0, 1024)


@dataclass(frozen=True)
class Recipe:
    """A training run."""

    description: str
    """One line for people."""
    data: DataConfig
    frontend: FrontendConfig
    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)

    def __post_init__(self) -> None:
        if len(self.data.labels) != self.model.num_classes:
            raise ConfigError(
                f"data.labels names {len(self.data.labels)} classes but model.num_classes is {self.model.num_classes}"
            )
        # Holds the checks that involve several sections: to fail now, not when the trained model is to be saved.
        self.checkpoint({})

    def checkpoint(self, provenance: dict[str, Any]) -> CheckpointConfig:
        """Return the configuration of the checkpoints of this run."""
        return CheckpointConfig(
            self.frontend,
            self.model,
            labels=self.data.labels,
            decoding=self.decoding,
            inference=self.inference,
            provenance=provenance,
        )


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes inside the package: name -> file."""
    folder = Path(str(resources.files("htsat") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a shipped recipe by name, or a TOML file, and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: unknown recipe, unreadable TOML, unknown key, wrong type or value out of range.
    """
    shipped = shipped_recipes()
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        known = ", ".join(shipped)
        raise ConfigError(
            f"{name_or_path}: neither a shipped recipe ({known}) nor a file{nearest(name_or_path, shipped)}"
        )
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None
    for override in overrides or []:
        _apply(values, override)
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
