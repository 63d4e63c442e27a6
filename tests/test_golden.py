"""Our model against stored outputs of the published implementation (float64), on the same weights and signals.

The stored figures come from the published PyTorch code; nothing of it is needed here. Tolerances: the published
code itself is up to 5e-6 away from its own float64 figures when it runs in float32.
"""

import json
import runpy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from htsat.audio.mel import log_mel
from htsat.config import FrontendConfig, ModelConfig
from htsat.model.htsat import HTSAT

GOLDEN = Path(__file__).parent / "data" / "golden"
WEIGHTS = runpy.run_path(str(GOLDEN / "weights.py"))
ARRAYS = np.load(GOLDEN / "official_outputs.npz")
META: dict[str, dict[str, Any]] = json.loads(str(ARRAYS["meta"]))
SHAPES: dict[str, list[int]] = json.loads((GOLDEN / "official_state_dict_shapes.json").read_text())

#: enough for every change; the other cases differ in widths, class counts or rates only
QUICK = ("audioset_10s", "audioset_infer_2s", "scv2_1s_repeated", "no_tscam_10s")
#: largest absolute difference of posteriors and embeddings
TOLERANCE = {torch.float32: 6e-6, torch.float64: 1e-6}


@dataclass(frozen=True, eq=False)
class Case:
    """One stored case: its model with the weights loaded, and its input."""

    name: str
    meta: dict[str, Any]
    model: HTSAT
    waveform: NDArray[np.float32]

    def expected(self, array: str) -> NDArray[np.float64]:
        """Return what the published implementation computed."""
        return np.asarray(ARRAYS[f"{self.name}/{array}"])


def frontend_of(config: dict[str, Any]) -> FrontendConfig:
    """Return our front end for a published configuration."""
    return FrontendConfig(
        sample_rate=config["sample_rate"],
        n_fft=config["window_size"],
        hop_length=config["hop_size"],
        n_mels=config["mel_bins"],
        f_min=config["fmin"],
        f_max=config["fmax"],
    )


def model_of(config: dict[str, Any]) -> HTSAT:
    """Return our model, in eval mode, for a published configuration."""
    model = ModelConfig(
        num_classes=config["classes_num"],
        embed_dim=config["dim"],
        depths=tuple(config["depths"]),
        num_heads=tuple(config["heads"]),
        window_size=config["win"],
        token_semantic=config["enable_tscam"],
    )
    return HTSAT(frontend_of(config), model).eval()


def official_name(name: str) -> str:
    """Return the published name of an entry of our state dict."""
    for ours, official in (
        ("stages.", "layers."),
        (".merge.", ".downsample."),
        ("mel_norm.", "bn0."),
        ("token_semantic.", "tscam_conv."),
    ):
        name = name.replace(ours, official)
    return name


def official_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the published shape: there the patch embedding is a convolution, here the same as a linear layer."""
    return (shape[0], 1, 4, 4) if name == "patch_embed.proj.weight" else shape


def load_golden_weights(model: HTSAT, seed: int) -> None:
    """Give the model the deterministic float64 weights of a case, cast to its precision."""
    state = model.state_dict()
    shapes = {official_name(k): official_shape(k, tuple(v.shape)) for k, v in state.items()}
    golden = WEIGHTS["golden_weights"](shapes, seed)
    for name, value in state.items():
        if official_name(name) in golden:
            state[name] = torch.from_numpy(np.asarray(golden[official_name(name)])).reshape(value.shape)
    model.load_state_dict(state)


def input_of(name: str) -> NDArray[np.float32]:
    """Return the input of a case, (batch, num_samples)."""
    meta = META[name]
    waveform = WEIGHTS["golden_waveform"](meta["seconds"], meta["config"]["sample_rate"], meta["seed"], meta["batch"])
    return np.asarray(waveform)


def cases() -> list[Any]:
    """Return the names of all stored cases, the less telling ones marked slow."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in META]


@pytest.fixture(scope="module", params=cases())
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """One stored case; its model is float64 (so that a cast to float32 rounds each weight once)."""
    meta = META[request.param]
    model = model_of(meta["config"]).double()
    load_golden_weights(model, meta["seed"])
    yield Case(request.param, meta, model, input_of(request.param))


def close(actual: torch.Tensor, expected: NDArray[np.float64], tolerance: float) -> None:
    """Assert the same shape and values within an absolute tolerance."""
    assert tuple(actual.shape) == expected.shape
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=tolerance)


# float64 first: the model is cast down afterwards and the weights are not made twice.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_outputs_are_the_published_ones(case: Case, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and case.name in QUICK[1:]:
        pytest.skip("float64 is checked on the first case here and on the slow ones")
    model = case.model.to(dtype)
    waveform = torch.from_numpy(case.waveform).to(dtype)
    fit = "repeat" if case.meta["infer_mode"] else "stretch"
    with torch.inference_mode():
        spectrogram = model.frontend(waveform)
        output = model(waveform, fit=fit)

    close(spectrogram[:, ::25], case.expected("logmel"), 1e-4)
    close(spectrogram.mean((1, 2)), case.expected("logmel_mean"), 1e-5)
    assert output.clipwise_logits.dtype == dtype
    logits = case.meta["config"]["loss_type"] == "clip_ce"
    clipwise = output.clipwise_logits if logits else output.clipwise_logits.sigmoid()
    close(clipwise, case.expected("clipwise"), TOLERANCE[dtype])
    close(output.framewise_logits.sigmoid(), case.expected("framewise_tokens"), TOLERANCE[dtype])
    if f"{case.name}/latent" in ARRAYS:
        close(output.embedding, case.expected("latent"), TOLERANCE[dtype])


@pytest.mark.parametrize("name", META)
def test_numpy_log_mel_is_the_published_one(name: str) -> None:
    config = frontend_of(META[name]["config"])
    for item, waveform in enumerate(input_of(name)):
        spectrogram = log_mel(waveform, config)
        np.testing.assert_allclose(spectrogram[::25], ARRAYS[f"{name}/logmel"][item], rtol=0, atol=1e-4)
        assert spectrogram.mean() == pytest.approx(ARRAYS[f"{name}/logmel_mean"][item], abs=1e-6)


def test_every_published_weight_has_a_place_in_the_model() -> None:
    """All keys of the published state dict but constants and the head that is stored and never used."""
    state = model_of(META["audioset_10s"]["config"]).state_dict()
    ours = {official_name(k): official_shape(k, tuple(v.shape)) for k, v in state.items()}
    constants = ("spectrogram_extractor.", "logmel_extractor.", "head.")
    rebuilt = ("relative_position_index", "attn_mask")
    official = {k: tuple(v) for k, v in SHAPES.items() if not k.startswith(constants) and not k.endswith(rebuilt)}
    assert ours == official


def test_the_stored_16_khz_case_has_nine_empty_filters() -> None:
    """The published 16-kHz model puts filters above half the sample rate; its weights expect the -100 dB there."""
    config = frontend_of(META["scv2_1s_repeated"]["config"])
    spectrogram = log_mel(input_of("scv2_1s_repeated")[0], config)
    assert (spectrogram == -100.0).all(axis=0).sum() == 9
