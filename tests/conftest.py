"""Detectors whose answers are known, for tests of the whole path from a file to its events."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import soundfile

from htsat.config import CheckpointConfig, FrontendConfig, InferenceConfig, ModelConfig

#: what ``ToneBackend`` hears, by label
TONES = {"low": 1000.0, "high": 3000.0}
#: Hz and seconds: small, for speed
RATE, TOKEN = 8000, 0.3125


def tiny_config(labels=tuple(TONES), sample_rate=RATE, **settings) -> CheckpointConfig:
    """A network of a few thousand weights with the published grid: chunks of 10 s, 32 tokens in each."""
    frontend = FrontendConfig(
        sample_rate=sample_rate,
        n_fft=1 << (sample_rate // 10).bit_length(),
        hop_length=sample_rate // 20,
        n_mels=16,
        f_max=min(14000, sample_rate / 2),
    )
    model = ModelConfig(
        num_classes=len(labels), embed_dim=8, depths=(2, 1), num_heads=(1, 2), patch_size=4, image_size=64
    )
    return CheckpointConfig(frontend, model, labels=tuple(labels), **settings)


def write_checkpoint(path: Path, config: CheckpointConfig, seed: int = 0) -> Path:
    """Save a network with weights so large that its posteriors differ from token to token."""
    import torch

    from htsat.model.checkpoint import save_checkpoint
    from htsat.model.htsat import HTSAT

    torch.manual_seed(seed)
    network = HTSAT(config.frontend, config.model).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
        network.mel_norm.running_mean.fill_(-25.0)
        network.mel_norm.running_var.fill_(60.0)
    save_checkpoint(path, network, config)
    return path


class ToneBackend:
    """Says in which tokens of a chunk the tones of ``TONES`` sound, by NumPy alone.

    A token's logit is +6 if a sine of amplitude 0.5 fills at least half of it, else -6; a clip's is its largest.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self.calls: list[int] = []

    def __call__(self, chunks):
        self.calls.append(len(chunks))
        tokens = chunks.reshape(len(chunks), self.config.num_tokens, -1)
        rate = self.config.frontend.sample_rate
        spectrum = np.abs(np.fft.rfft(tokens)) ** 2 / tokens.shape[-1] ** 2 * 2  # sums to the mean power of a token
        hz = np.fft.rfftfreq(tokens.shape[-1], 1 / rate)
        frame = np.full((*tokens.shape[:2], len(self.config.labels)), -6, dtype=np.float32)
        for label, tone in TONES.items():
            if label in self.config.labels:
                power = spectrum[:, :, abs(hz - tone) < 200].sum(axis=2)
                frame[:, :, self.config.labels.index(label)][power >= 0.5 * 0.125] = 6
        return frame.max(axis=1), frame, spectrum[:, :, :4].mean(axis=1).astype(np.float32)


def sound(duration: float, events, sample_rate=RATE, seed=3):
    """A waveform of faint noise in which (label, onset, offset) sound."""
    seconds = np.arange(round(duration * sample_rate)) / sample_rate
    waveform = 0.01 * np.random.default_rng(seed).standard_normal(len(seconds))
    for label, onset, offset in events:
        waveform += 0.5 * np.sin(2 * np.pi * TONES[label] * seconds) * ((seconds >= onset) & (seconds < offset))
    return waveform.astype(np.float32)


def write_sound(path: Path, duration: float, events, sample_rate=16000, **settings) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound(duration, events, sample_rate), sample_rate, **settings)
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Checkpoint of a random network with the labels of ``TONES``."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny.safetensors", tiny_config())


@pytest.fixture
def tone_predictor(tiny_checkpoint):
    """Make a ``Predictor`` that finds the tones; keyword arguments are those of ``tiny_config`` and ``Predictor``."""
    from htsat.predict import Predictor

    def make(sample_rate=RATE, labels=tuple(TONES), objective="multi_label", inference=None, **settings):
        predictor = Predictor(tiny_checkpoint, device="cpu", **settings)
        config = tiny_config(labels, sample_rate, objective=objective, inference=inference or InferenceConfig())
        predictor.config = dataclasses.replace(config, decoding=predictor.config.decoding)
        predictor.labels = list(labels)
        predictor._backend = ToneBackend(config)
        return predictor

    return make


@pytest.fixture
def command(monkeypatch, capsysbinary, tiny_checkpoint):
    """Run ``htsat`` in this process with a model that hears ``TONES``; returns (exit code, stdout, stderr lines)."""
    import htsat.cli
    import htsat.model.runtime

    monkeypatch.setattr(htsat.model.runtime, "TorchBackend", lambda network, **_: ToneBackend(network.checkpoint))

    def run(name, *arguments, model=tiny_checkpoint):
        options = ["--model", str(model)] if model is not None else []
        monkeypatch.setattr("sys.argv", ["htsat", name, *map(str, arguments), *options])
        capsysbinary.readouterr()
        with pytest.raises(SystemExit) as exit:
            htsat.cli.main()
        out, err = capsysbinary.readouterr()
        return exit.value.code, out.decode(), err.decode().splitlines()

    return run
