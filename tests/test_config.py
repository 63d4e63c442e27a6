"""The configuration schema: closed, bounded, and the only error it knows is ConfigError."""

import dataclasses
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htsat.config import (
    CheckpointConfig,
    ClassDecoding,
    DecodingConfig,
    FrontendConfig,
    InferenceConfig,
    ModelConfig,
    from_dict,
    to_dict,
)
from htsat.errors import ConfigError, HtsatError, nearest

SECTIONS = (FrontendConfig, ModelConfig, ClassDecoding, DecodingConfig, InferenceConfig)


def small(**changes: Any) -> dict[str, Any]:
    """Return a valid configuration of a two-class checkpoint as plain values, with some sections replaced."""
    return {"frontend": {}, "model": {"num_classes": 2}, "labels": ["dog", "cat"]} | changes


def refused(cls: type, values: Any) -> str:
    """Return the message of the ConfigError that ``values`` raise."""
    with pytest.raises(ConfigError) as caught:
        from_dict(cls, values, "here")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------ known good


def test_defaults_are_the_published_model() -> None:
    config = CheckpointConfig(FrontendConfig(), ModelConfig(), labels=tuple(map(str, range(527))))
    assert config.chunk_samples == 320_000
    assert config.num_frames == 1024
    assert config.num_tokens == 32
    assert config.token_seconds == 0.3125


@pytest.mark.parametrize(("rate", "hop"), [(16000, 160), (44100, 441), (48000, 480)])
def test_other_rates_with_a_hundred_frames_a_second_fit(rate: int, hop: int) -> None:
    config = from_dict(CheckpointConfig, small(frontend={"sample_rate": rate, "hop_length": hop}), "here")
    assert (config.chunk_samples, config.num_tokens) == (10 * rate, 32)


@pytest.mark.parametrize("cls", SECTIONS)
def test_an_empty_table_gives_the_defaults(cls: type) -> None:
    assert from_dict(cls, {}, "here") == cls()


def test_round_trip_through_json() -> None:
    config = from_dict(
        CheckpointConfig,
        small(
            frontend={"sample_rate": 16000, "hop_length": 160, "mel_scale": "htk"},
            decoding={"threshold": 0.4, "threshold_off": 0.2, "per_class": {"dog": {"min_gap": 0.5}}},
            inference={"short": "tile", "hop_seconds": 2},
            provenance={"source": "a run", "scores": [0.1, 0.2], "nested": {"a": None}},
            objective="single_label",
        ),
        "here",
    )
    plain = json.loads(json.dumps(to_dict(config)))
    assert from_dict(CheckpointConfig, plain, "there") == config
    assert plain["model"]["depths"] == [2, 2, 6, 2]
    assert plain["inference"]["hop_seconds"] == 2.0


def test_sections_are_frozen() -> None:
    for cls in SECTIONS:
        name = dataclasses.fields(cls)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cls(), name, 1)


def test_whole_numbers_are_taken_where_fractions_are_expected() -> None:
    assert from_dict(ModelConfig, {"mlp_ratio": 4}, "here").mlp_ratio == 4.0


def test_none_is_taken_only_where_it_means_something() -> None:
    assert from_dict(ClassDecoding, {"threshold_off": None}, "here").threshold_off is None
    assert "here.threshold" in refused(ClassDecoding, {"threshold": None})


# ------------------------------------------------------------------- refusals


def test_an_unknown_key_names_the_nearest_one() -> None:
    assert "unknown key 'hop_lenght'; did you mean 'hop_length'?" in refused(FrontendConfig, {"hop_lenght": 320})
    message = refused(CheckpointConfig, small(model={"num_classes": 2, "embed_dimm": 96}))
    assert message.startswith("here.model: unknown key 'embed_dimm'; did you mean 'embed_dim'?")


def test_an_unknown_key_near_to_nothing_lists_the_known_ones() -> None:
    message = refused(InferenceConfig, {"xyzzy": 1})
    assert "unknown key 'xyzzy'; known: short, chunk_part, hop_seconds, lookahead_seconds, clip_pooling" in message


def test_keys_that_are_no_text_are_refused() -> None:
    assert "unknown key 3" in refused(FrontendConfig, {3: 1})


def test_a_missing_key_is_named() -> None:
    assert "key 'model' is missing" in refused(CheckpointConfig, {"frontend": {}})


@pytest.mark.parametrize("values", [None, 3, "text", [("sample_rate", 1)]])
def test_a_section_must_be_a_table(values: Any) -> None:
    assert f"here: expected a table of settings, got {type(values).__name__}" in refused(FrontendConfig, values)


@pytest.mark.parametrize(
    ("cls", "key", "value", "expected"),
    [
        (FrontendConfig, "sample_rate", "32000", "expected int"),
        (FrontendConfig, "sample_rate", 32000.0, "expected int"),
        (FrontendConfig, "sample_rate", True, "expected int"),
        (FrontendConfig, "f_min", True, "expected float"),
        (FrontendConfig, "f_min", math.nan, "finite"),
        (FrontendConfig, "f_max", math.inf, "finite"),
        (FrontendConfig, "mel_scale", "bark", "expected one of 'slaney', 'htk'"),
        (ModelConfig, "token_semantic", 1, "expected bool"),
        (ModelConfig, "depths", 4, "expected a list"),
        (ModelConfig, "depths", "2262", "expected a list"),
        (ModelConfig, "depths", [2, 2.5, 6, 2], "expected int"),
        (ModelConfig, "depths", [2, None, 6, 2], "expected int"),
        (DecodingConfig, "per_class", [], "expected a table"),
        (DecodingConfig, "per_class", {"dog": 0.5}, "expected a table"),
        (DecodingConfig, "per_class", {"dog": {"threshold": "high"}}, "expected float"),
    ],
)
def test_a_wrong_type_is_named(cls: type, key: str, value: Any, expected: str) -> None:
    message = refused(cls, {key: value})
    assert message.startswith(f"here.{key}")
    assert expected in message


def test_items_of_lists_are_named_by_position() -> None:
    assert refused(ModelConfig, {"depths": [2, 2, "6", 2]}).startswith("here.depths[2]: ")


@pytest.mark.parametrize(
    ("cls", "values", "low", "high"),
    [
        (FrontendConfig, {"sample_rate": (999, 384_001)}, "1000", "384000"),
        (FrontendConfig, {"n_fft": (15, 16385)}, "16", "16384"),
        (FrontendConfig, {"hop_length": (0, 1025)}, "1", "1024"),
        (FrontendConfig, {"n_mels": (7, 513)}, "8", "512"),
        (FrontendConfig, {"f_min": (-1, 16001)}, "0", "16000"),
        (FrontendConfig, {"f_max": (50, 32001)}, "51", "32000"),
        (ModelConfig, {"num_classes": (-1, 100_001)}, "0", "100000"),
        (ModelConfig, {"embed_dim": (7, 1025)}, "8", "1024"),
        (ModelConfig, {"window_size": (1, 33)}, "2", "32"),
        (ModelConfig, {"patch_size": (0, 33)}, "1", "32"),
        (ModelConfig, {"image_size": (15, 2049)}, "16", "2048"),
        (ModelConfig, {"mlp_ratio": (0.4, 16.5)}, "0.5", "16"),
        (ModelConfig, {"drop_path": (-0.1, 0.95)}, "0", "0.9"),
        (ModelConfig, {"chunk_seconds": (0.4, 61)}, "0.5", "60"),
        (ClassDecoding, {"threshold": (-0.1, 1.1)}, "0", "1"),
        (ClassDecoding, {"median_seconds": (-1, 61)}, "0", "60"),
        (ClassDecoding, {"min_duration": (-1, 601)}, "0", "600"),
        (ClassDecoding, {"min_gap": (-1, 601)}, "0", "600"),
        (InferenceConfig, {"hop_seconds": (0.05, 61)}, "0.1", "60"),
    ],
)
def test_bounds_are_named(cls: type, values: dict[str, tuple[float, float]], low: str, high: str) -> None:
    ((key, outside),) = values.items()
    for value in outside:
        message = refused(cls, {key: value})
        assert re.fullmatch(rf"here: {key} must be between {re.escape(low)} and {re.escape(high)}, got \S+", message)


def test_the_off_threshold_may_not_exceed_the_threshold() -> None:
    assert "threshold_off must be between 0 and 0.3" in refused(ClassDecoding, {"threshold": 0.3, "threshold_off": 0.4})


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"depths": [2, 2], "num_heads": [4, 8, 16]}, "must name the same 1 to 6 stages"),
        ({"depths": [], "num_heads": []}, "must name the same 1 to 6 stages"),
        ({"depths": [1] * 7, "num_heads": [1] * 7}, "must name the same 1 to 6 stages"),
        ({"depths": [2, 0, 6, 2]}, "depths must be between 1 and 64, got 0"),
        ({"num_heads": [5, 8, 16, 32]}, "num_heads[0] = 5 does not divide the width 96"),
        ({"num_heads": [4, 8, 16, 0]}, "num_heads must be between 1 and 256, got 0"),
        ({"image_size": 250}, "must be a multiple of patch_size x 2^(stages - 1) = 32"),
        ({"window_size": 7}, "no multiple of window_size 7"),
    ],
)
def test_impossible_geometry_is_named(model: dict[str, Any], expected: str) -> None:
    assert expected in refused(ModelConfig, model)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"labels": ["dog"]}, "1 labels for 2 classes"),
        ({"labels": ["dog", "dog"]}, "label 'dog' occurs twice"),
        ({"decoding": {"per_class": {"dgo": {}}}}, "label 'dgo' that the model lacks; did you mean 'dog'?"),
        ({"frontend": {"n_mels": 60}}, "image_size 256 must be a multiple of n_mels 60"),
        ({"model": {"num_classes": 2, "chunk_seconds": 11}}, "gives 1101 frames, more than the 1024"),
        ({"model": {"num_classes": 2, "chunk_seconds": 4}}, "hop_seconds 5 leaves gaps between chunks of 4 s"),
        ({"objective": "ranking"}, "expected one of 'multi_label', 'single_label'"),
    ],
)
def test_sections_that_contradict_each_other_are_refused(changes: dict[str, Any], expected: str) -> None:
    assert expected in refused(CheckpointConfig, small(**changes))


@pytest.mark.parametrize("n_mels", [8, 16])
def test_stretches_thinner_than_a_token_of_the_last_stage_are_refused(n_mels: int) -> None:
    """A token of the last stage is 32 cells high: a stretch of 16 mel bins would be half a token."""
    assert f"n_mels {n_mels} must be a multiple of" in refused(CheckpointConfig, small(frontend={"n_mels": n_mels}))


def test_native_sizes_of_the_published_model_by_hand() -> None:
    """Its picture has 4 stretches of 64 mel rows and 256 columns; after 32-fold merging two columns must remain."""
    config = CheckpointConfig(FrontendConfig(), ModelConfig(num_classes=1), labels=("a",))
    assert config.native_sizes == (1, 2, 4, 8, 16)
    for seconds, size in ((10, 1), (5.01, 1), (5, 2), (2.5, 4), (2.4, 4), (1.25, 8), (1, 8), (0.625, 16), (0.01, 16)):
        num_samples = round(seconds * 32000)
        assert config.native_size(num_samples) == size, seconds
        assert config.native_samples(num_samples) == 320000 // size >= num_samples
        assert config.native_frames(num_samples) == 1024 // size


@pytest.mark.parametrize(
    "model",
    [
        {"image_size": 128, "n_mels": 128},
        {"image_size": 192, "n_mels": 64, "window_size": 4},
        {"image_size": 192, "n_mels": 48, "patch_size": 4, "window_size": 6},
        {"image_size": 128, "n_mels": 16, "patch_size": 2, "stem": "conv"},
    ],
)
def test_native_sizes_fit_every_stage(model: dict[str, Any]) -> None:
    """Whatever is offered, each stage can be cut into windows and merged; checked by running it."""
    import torch

    from htsat.model.htsat import HTSAT

    frontend = FrontendConfig(sample_rate=8000, n_fft=256, hop_length=160, n_mels=model.pop("n_mels"), f_max=4000.0)
    network = HTSAT(
        frontend,
        ModelConfig(num_classes=2, embed_dim=8, depths=(2, 2), num_heads=(1, 1), chunk_seconds=1.0, **model),
    ).eval()
    config = network.geometry
    assert config.native_sizes[0] == 1
    for size in config.native_sizes:
        with torch.inference_mode():
            tokens = network.encode(torch.zeros(1, config.num_frames // size, frontend.n_mels))
        assert tokens.shape[-1] * size == config.num_tokens


def test_conv_stems_that_cannot_be() -> None:
    assert "needs a patch_size of 2, 4, 8" in refused(ModelConfig, {"stem": "conv", "patch_size": 1})
    assert "needs a patch_size of 2, 4, 8" in refused(ModelConfig, {"stem": "conv", "patch_size": 12})
    narrow = {"stem": "conv", "patch_size": 32, "embed_dim": 8, "num_heads": [1, 1, 1, 1]}
    assert "embed_dim 8 is too narrow for the stem 'conv' of 32" in refused(ModelConfig, narrow)


def test_bounds_hold_before_anything_is_allocated() -> None:
    """Each number may be in bounds while all together ask for more memory than any machine has."""
    model = {"num_classes": 2, "embed_dim": 1024, "depths": [64] * 6, "num_heads": [1] * 6, "image_size": 2048}
    refused(CheckpointConfig, small(model=model))


def test_exceptions_per_class() -> None:
    config = DecodingConfig(threshold=0.5, min_gap=0.2, per_class={"dog": {"threshold": 0.3}})
    assert config.for_label("dog") == ClassDecoding(threshold=0.3, min_gap=0.2)
    assert config.for_label("cat") == ClassDecoding(threshold=0.5, min_gap=0.2)
    assert "did you mean 'threshold'" in refused(DecodingConfig, {"per_class": {"dog": {"treshold": 0.3}}})
    assert "per_class.dog" in refused(DecodingConfig, {"per_class": {"dog": {"threshold": 2}}})


def test_changed_settings_hold_for_every_class() -> None:
    config = DecodingConfig(per_class={"dog": {"threshold": 0.3, "min_gap": 1.0}, "cat": {"threshold": 0.2}})
    changed = config.changed(threshold=0.6)
    assert changed.per_class == {"dog": {"min_gap": 1.0}}
    assert changed.for_label("dog") == ClassDecoding(threshold=0.6, min_gap=1.0)
    assert config.per_class["cat"] == {"threshold": 0.2}


def test_config_errors_are_ours() -> None:
    assert issubclass(ConfigError, HtsatError)


def test_nearest_name() -> None:
    assert nearest("treshold", ["threshold", "min_gap"]) == "; did you mean 'threshold'?"
    assert nearest("zzz", ["threshold"]) == ""


# ----------------------------------------------------------------------- junk

#: the values that a hostile JSON or TOML file may hold
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 8, 64, 256, 10**400])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["slaney", "pad", "max", "multi_label"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def spoilt(draw: st.DrawFn, cls: type) -> Any:
    """Draw the plain values of a valid section of which one or two, at any depth, are replaced by junk."""
    values = small() if cls is CheckpointConfig else {}
    values = to_dict(from_dict(cls, values, "valid"))
    for _ in range(draw(st.integers(1, 2))):
        table = values
        key = draw(st.sampled_from(sorted(table)))
        while isinstance(table[key], dict) and table[key] and draw(st.booleans()):
            table = table[key]
            key = draw(st.sampled_from(sorted(table)))
        table[key] = draw(JUNK)
    return values


@pytest.mark.parametrize("cls", [*SECTIONS, CheckpointConfig])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_junk_raises_nothing_but_config_errors(cls: type, data: st.DataObject) -> None:
    values = data.draw(st.one_of(spoilt(cls), spoilt(cls), JUNK))
    try:
        config: Any = from_dict(cls, values, "here")
    except ConfigError as error:
        assert str(error).startswith("here")
    else:
        assert from_dict(cls, to_dict(config), "there") == config


@pytest.mark.parametrize(
    "values",
    [
        {"sample_rate": 10**400},
        {"f_min": 10**400},
        {"f_min": -(10**400)},
        {"mel_scale": []},
        {"mel_scale": {}},
        {"mel_scale": None},
        {"sample_rate": float("nan")},
    ],
)
def test_junk_found_before(values: dict[str, Any]) -> None:
    refused(FrontendConfig, values)


def test_numbers_too_large_for_a_float_are_refused_with_their_key() -> None:
    assert refused(DecodingConfig, {"per_class": {"dog": {"threshold": 10**400}}}).startswith("here.per_class.dog")
