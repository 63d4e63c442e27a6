"""Models that hear recordings in parts of a chunk: what ``Predictor`` says is what the network says of each part."""

import dataclasses

import numpy as np
import pytest
import torch

from htsat import Predictor
from htsat.config import CheckpointConfig, FrontendConfig, InferenceConfig, ModelConfig
from htsat.errors import ConfigError
from htsat.model.checkpoint import save_checkpoint
from htsat.model.htsat import HTSAT

FRONTEND = FrontendConfig(sample_rate=8000, n_fft=256, hop_length=80, f_max=4000.0)
MODEL = ModelConfig(
    num_classes=3, embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=4, patch_size=8, stem="conv",
)  # fmt: skip
CONFIG = CheckpointConfig(
    FRONTEND,
    MODEL,
    labels=("a", "b", "c"),
    inference=InferenceConfig(short="native", chunk_part=4, hop_seconds=2.5),
)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    torch.manual_seed(3)
    model = HTSAT(FRONTEND, MODEL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("model") / "quarter.safetensors"
    save_checkpoint(path, model, CONFIG)
    return Predictor(str(path), threads=1)


def sound(seconds):
    return (0.1 * np.random.default_rng(1).standard_normal(round(seconds * 8000))).astype(np.float32)


def said(predictor, waveform):
    with torch.inference_mode():
        output = predictor.model(torch.from_numpy(waveform)[None], "native")
    return output.clipwise_logits[0].sigmoid().numpy(), output.framewise_logits[0].sigmoid().numpy()


@pytest.mark.parametrize("seconds", [2.5, 2.0, 1.25, 0.3])
def test_a_recording_within_a_part_is_heard_alone(predictor, seconds):
    waveform = sound(seconds)
    prediction = predictor.predict((waveform, 8000), spectrogram=False)
    clip, frames = said(predictor, waveform)
    np.testing.assert_allclose(prediction.clipwise_posteriors, clip, atol=1e-6)
    np.testing.assert_allclose(prediction.framewise_posteriors, frames, atol=1e-6)
    assert prediction.frame_boundaries[-1] == pytest.approx(seconds)


def test_a_long_recording_is_heard_part_by_part(predictor):
    waveform = sound(7.5)
    prediction = predictor.predict((waveform, 8000), spectrogram=False)
    parts = [said(predictor, part) for part in np.split(waveform, 3)]
    np.testing.assert_allclose(prediction.framewise_posteriors, np.concatenate([f for _, f in parts]), atol=1e-6)
    np.testing.assert_allclose(prediction.clipwise_posteriors, np.max([c for c, _ in parts], axis=0), atol=1e-6)
    np.testing.assert_allclose(np.diff(prediction.frame_boundaries), CONFIG.token_seconds, atol=1e-9)


def test_parts_that_the_model_does_not_take_are_refused():
    with pytest.raises(ConfigError, match=r"chunk_part 3 is none of the parts .* 1, 2, 4"):
        dataclasses.replace(CONFIG, inference=InferenceConfig(chunk_part=3, hop_seconds=1.0))
    with pytest.raises(ConfigError, match=r"hop_seconds 5 leaves gaps between chunks of 2.5 s"):
        dataclasses.replace(CONFIG, inference=InferenceConfig(chunk_part=4, hop_seconds=5.0))


def test_framewise_posteriors_of_exactly_one_label_add_up_to_one(predictor):
    before = predictor.config
    predictor.config = dataclasses.replace(before, objective="single_label", framewise="softmax")
    try:
        waveform = sound(2.5)
        prediction = predictor.predict((waveform, 8000), spectrogram=False)
    finally:
        predictor.config = before
    np.testing.assert_allclose(prediction.framewise_posteriors.sum(1), 1, atol=1e-6)
    with torch.inference_mode():
        logits = predictor.model(torch.from_numpy(waveform)[None], "native").framewise_logits[0]
    np.testing.assert_allclose(prediction.framewise_posteriors, logits.softmax(1).numpy(), atol=1e-6)
