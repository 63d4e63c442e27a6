"""The baselines CNN14 and CRNN: against the published code, formulas written here, and the physics of time."""

import dataclasses
import importlib
import importlib.util
import json
import math
import signal
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from miniature_corpora import make_esc50
from torch import Tensor
from trainings import AT_STEP, nursery, run_differences

from htsat.config import USED_BY, CheckpointConfig, FrontendConfig, InferenceConfig, ModelConfig
from htsat.errors import CheckpointError, ConfigError
from htsat.labels import label_set
from htsat.model.architectures import build_model
from htsat.model.base import FITS, SoundModel
from htsat.model.baseline import mean_posterior
from htsat.model.checkpoint import count_parameters, load_checkpoint, save_checkpoint, tensor_shapes
from htsat.model.convert import convert
from htsat.predict import Predictor
from htsat.training.optim import is_head, parameter_groups
from htsat.training.start import load_start

FRONTEND = FrontendConfig(sample_rate=8000, n_fft=256, hop_length=80, n_mels=32, f_max=4000.0)
#: by name: chunks of 5 s of 100 frames a second, stretched from 500 to 512
SMALL = {
    "max": ModelConfig(5, "cnn14", cnn_width=2, chunk_seconds=5.0),
    "att": ModelConfig(5, "cnn14", cnn_width=2, decision="att", chunk_seconds=5.0),
    "clip": ModelConfig(5, "cnn14", cnn_width=2, decision="clip", chunk_seconds=5.0),
    "crnn": ModelConfig(5, "crnn", cnn_width=2, rnn_width=8, chunk_seconds=5.0),
}


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """Return a small baseline in eval mode, whose batch norms are no identities."""
    torch.manual_seed(seed)
    model = build_model(FRONTEND, dataclasses.replace(SMALL[name], **changes)).eval()
    randomise(model, seed)
    return model


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Give norms and biases values that show in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        drawn = torch.rand(tensor.shape, generator=generator)
        if name.endswith(("running_var",)):
            tensor.copy_(0.5 + drawn)
        elif name.endswith("running_mean") or (tensor.ndim == 1 and name.endswith("bias")):
            tensor.copy_(0.4 * (drawn - 0.5))
        elif tensor.ndim == 1:
            tensor.copy_(0.8 + 0.4 * drawn)
    norm = model.mel_norm if isinstance(model, SoundModel) else model.bn0
    norm.running_mean.fill_(-30.0)
    norm.running_var.fill_(200.0)


def noise(batch: int, num_samples: int, seed: int = 0) -> Tensor:
    """Return (batch, num_samples) noise whose loudness changes every eighth of its length."""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.rand(batch, 8, generator=generator).repeat_interleave(-(-num_samples // 8), 1)[:, :num_samples]
    return 0.3 * torch.randn(batch, num_samples, generator=generator) * loudness


def config_of(model: SoundModel, **settings: Any) -> CheckpointConfig:
    return CheckpointConfig(model.frontend_config, model.config, labels=model.labels, **settings)


# ------------------------------------------------------------------ the published network


def published_code() -> Any:
    """Return the module of PANNs' networks; its package would fetch a list of labels on import, so it is left out."""
    pytest.importorskip("torchlibrosa", reason="the published code of PANNs needs torchlibrosa")
    found = importlib.util.find_spec("panns_inference")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the published code of PANNs is not installed (pip install panns-inference)")
    package = types.ModuleType("published_panns")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["published_panns"] = package
    return importlib.import_module("published_panns.models")


@pytest.mark.parametrize(
    ("kind", "decision", "share"),
    [
        ("Cnn14_DecisionLevelMax", "max", 16),
        ("Cnn14", "clip", 16),
        pytest.param("Cnn14_DecisionLevelMax", "max", 1, marks=pytest.mark.slow),
    ],
)
def test_published_weights_give_the_published_posteriors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, decision: str, share: int
) -> None:
    """Of the published code, whole or with a ``share``-th of the channels."""
    code = published_code()
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(code, "ConvBlock", lambda in_channels, out_channels: torch.nn.Identity())  # made below
        published = getattr(code, kind)(32000, 1024, 320, 64, 50, 14000, 527).eval()
    channels = [1, *(2 ** (6 + i) // share for i in range(6))]
    for i in range(6):
        setattr(published, f"conv_block{i + 1}", code.ConvBlock(channels[i], channels[i + 1]).eval())
    published.fc1 = torch.nn.Linear(2048 // share, 2048 // share)
    published.fc_audioset = torch.nn.Linear(2048 // share, 527)
    torch.nn.init.xavier_uniform_(published.fc_audioset.weight, gain=2.0)
    randomise(published)
    path = tmp_path / f"{kind}.pth"
    torch.save({"iteration": 1, "model": published.state_dict(), "sampler": {"seed": np.int64(3)}}, path)
    model, config, report = convert(path)
    assert (config.model.decision, config.labels[0], config.objective) == (decision, "Speech", "multi_label")
    assert report.layout == "panns" and not (report.missing or report.unexpected or report.mismatched)
    assert all(name.startswith(("spectrogram_extractor.", "logmel_extractor.")) for name in report.set_aside)
    assert len(report.loaded) + len(report.set_aside) == len(published.state_dict())
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())

    for num_samples in (320_000, 100_000):  # 10 s of AudioSet: 1001 frames, of which 31 steps are made
        waveform = noise(1, num_samples)
        with torch.inference_mode():
            expected, output = published(waveform), model(waveform, "stretch")
        clip = output.clipwise_logits.sigmoid()
        assert float(expected["clipwise_output"].std()) > 0.02  # they differ
        torch.testing.assert_close(clip, expected["clipwise_output"], rtol=0, atol=2e-5)
        tokens = (num_samples // 320 + 1) // 32
        assert output.framewise_logits.shape == (1, tokens, 527)
        if decision == "max":
            # Theirs repeats each step 32 times and the last one to the end.
            steps = expected["framewise_output"][:, : 32 * tokens : 32]
            torch.testing.assert_close(output.framewise_logits.sigmoid(), steps, rtol=0, atol=2e-5)
        else:
            torch.testing.assert_close(output.embedding, expected["embedding"], rtol=1e-4, atol=1e-4)


def with_published_names(model: SoundModel) -> dict[str, Tensor]:
    """Return the weights of a CNN14 as the published code names them; made to be read, so without any table."""
    named = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[:2] = [f"conv_block{int(parts[1]) + 1}"]
            parts[1] = parts[1].replace("norm", "bn")
        heads = {"mel_norm": "bn0", "head": "fc_audioset", "fc1": "fc1"}
        if "head_attention.weight" in model.state_dict():
            heads |= {"head": "att_block.cla", "head_attention": "att_block.att"}
        parts[0] = heads.get(parts[0], parts[0])
        if parts[0].startswith("att_block") and tensor.ndim == 2:
            tensor = tensor.unsqueeze(2)
        named[".".join(parts)] = tensor
    return named


def test_weights_with_attention_are_recognised(tmp_path: Path) -> None:
    source = build("att")
    weights = with_published_names(source)
    weights |= {f"att_block.bn_att.{name}": torch.ones(5) for name in ("weight", "bias", "running_mean")}
    path = tmp_path / "Cnn14_DecisionLevelAtt_mAP=0.425.pth"
    torch.save({"model": weights}, path)
    model, config, report = convert(path, labels=list("abcde"), sample_rate=8000, hop_length=80, f_max=4000.0)
    assert config.model.decision == "att" and config.model.cnn_width == 2
    assert set(report.set_aside.values()) == {"batch norm that the published network stores and never uses"}
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_decision_that_weights_do_not_tell_is_said(tmp_path: Path) -> None:
    path = tmp_path / "cnn.pth"
    torch.save(with_published_names(build("max")), path)
    given: dict[str, Any] = {"labels": list("abcde"), "sample_rate": 8000, "hop_length": 80, "f_max": 4000.0}
    _, config, report = convert(path, **given)
    assert config.model.decision == "clip" and "by the name of the file" in " ".join(report.notes)
    assert convert(path, **given, decision="max")[1].model.decision == "max"


def test_other_networks_of_panns_are_refused(tmp_path: Path) -> None:
    weights = {name: t for name, t in with_published_names(build("max")).items() if "conv_block6" not in name}
    torch.save(weights, tmp_path / "Cnn10.pth")
    with pytest.raises(CheckpointError, match=r"not of a CNN14 that htsat can rebuild .*missing"):
        convert(tmp_path / "Cnn10.pth", labels=list("abcde"), sample_rate=8000, f_max=4000.0)


# ------------------------------------------------------------------ decisions


def test_mean_posterior_is_the_mean_of_posteriors() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64).softmax(1)
    mean = (weights * logits.sigmoid()).sum(1)
    torch.testing.assert_close(mean_posterior(logits, weights.log()), mean.logit().float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_mean_posterior_keeps_its_slope_where_posteriors_round_to_one_or_zero(sign: int) -> None:
    logits = torch.full((1, 3, 1), 60.0 * sign, requires_grad=True)
    found = mean_posterior(logits, torch.full((1, 3, 1), 1 / 3).log())
    found.sum().backward()
    assert float(found.detach()) == pytest.approx(60 * sign, rel=1e-6)
    assert logits.grad is not None and float(logits.grad.sum()) == pytest.approx(1, rel=1e-5)


def test_decisions_by_hand() -> None:
    tokens = torch.rand(2, 64, 6)
    for name in ("max", "att", "clip"):
        model = build(name)
        with torch.no_grad():
            clip, frames = model.classify(tokens)

        def layers(pooled: Tensor, model: Any = model) -> Tensor:
            return (pooled @ model.fc1.weight.T + model.fc1.bias).clamp_min(0)

        if name == "clip":
            hidden = layers(tokens.amax(2) + tokens.mean(2))
            torch.testing.assert_close(clip, hidden @ model.head.weight.T + model.head.bias)
            torch.testing.assert_close(model.embed(tokens), hidden)
            alone = model.classify(tokens[:, :, 2:3])[0]  # a clip of one step
            torch.testing.assert_close(frames[:, 2], alone)
            continue
        steps = []
        for t in range(6):
            near = tokens[:, :, max(0, t - 1) : t + 2]
            steps.append(layers(near.amax(2) + near.sum(2) / 3))
        hidden = torch.stack(steps, 1)
        torch.testing.assert_close(frames, hidden @ model.head.weight.T + model.head.bias)
        if name == "max":
            assert torch.equal(clip, frames.amax(1))
        else:
            attention = (hidden @ model.head_attention.weight.T + model.head_attention.bias).clamp(-10, 10).softmax(1)
            torch.testing.assert_close(clip.sigmoid(), (attention * frames.sigmoid()).sum(1))


def test_crnn_weighs_frames_by_attention() -> None:
    model, tokens = build("crnn"), torch.randn(2, 16, 9)
    with torch.no_grad():
        clip, frames = model.classify(tokens)
        x = tokens.transpose(1, 2)
        strong, attention = model.head(x).sigmoid(), model.head_attention(x).softmax(2)
    torch.testing.assert_close(frames.sigmoid(), strong)
    torch.testing.assert_close(clip.sigmoid(), (strong * attention).sum(1) / attention.sum(1))


@pytest.mark.parametrize("n_mels", [8, 40, 64, 128])
def test_crnn_takes_any_number_of_mel_bins(n_mels: int) -> None:
    frontend = dataclasses.replace(FRONTEND, n_mels=n_mels)
    model = build_model(frontend, SMALL["crnn"]).eval()
    assert model.encode(torch.randn(1, 64, n_mels)).shape == (1, 16, 16)


# ------------------------------------------------------------------ time


def test_geometry() -> None:
    """Ten seconds are 1001 frames, stretched to 1024; 10.24 s are 1024 frames as they are."""
    published = FrontendConfig()
    for seconds, stretches in ((10.0, True), (10.24, False)):
        for architecture, tokens in (("cnn14", 32), ("crnn", 256)):
            config = CheckpointConfig(
                published,
                ModelConfig(0, architecture, chunk_seconds=seconds),  # type: ignore[arg-type]
            )
            assert (config.num_frames, config.num_tokens, config.stretches) == (1024, tokens, stretches)
            assert config.native_sizes == ((1, 2, 4, 8, 16) if tokens == 32 else (1, 2, 4, 8, 16, 32))
            assert config.token_seconds == pytest.approx(seconds / tokens)


class Through(torch.nn.Module):
    """In place of recurrent layers: what comes in."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


def symmetric(name: str, **changes: Any) -> Any:
    """Return a baseline whose convolutions are the same forwards and backwards in time, without recurrent layers."""
    model = build(name, **changes)
    if name == "crnn":
        model.rnn = Through()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = (module.weight.data + module.weight.data.flip(2)) / 2
    return model


@pytest.mark.parametrize("name", ["max", "crnn"])
def test_what_is_turned_around_in_time_gives_tokens_turned_around(name: str) -> None:
    """So each token lies in the middle of what it hears."""
    model, features = symmetric(name), torch.randn(1, 512, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(features.flip(1)).flip(2), model.encode(features))


@pytest.mark.parametrize("seconds", [5.0, 5.12])
@pytest.mark.parametrize("name", ["max", "crnn"])
def test_a_token_hears_what_lies_around_its_time(name: str, seconds: float) -> None:
    """The sound that moves a token, by its gradient, lies around the token's time."""
    model = symmetric(name, chunk_seconds=seconds)
    step = seconds / model.num_tokens
    times = torch.arange(model.chunk_samples) / 8000
    waveform = 0.1 * torch.randn(1, model.chunk_samples, generator=torch.Generator().manual_seed(0))
    waveform.requires_grad_()
    tokens = model.encode(model.normalise(model.fill(model.frontend(waveform), "pad")))
    errors = []
    for token in range(3, model.num_tokens - 3, max(1, model.num_tokens // 16)):
        (gradient,) = torch.autograd.grad(tokens[0, :, token].sum(), waveform, retain_graph=True)
        weight = gradient[0].square()
        errors.append(float((weight * times).sum() / weight.sum()) - (token + 0.5) * step)
    # Frames lie on multiples of the hop, half of it (5 ms) before the middle of their share of time; stretching makes
    # up for it towards the end. Noise is uneven.
    assert abs(np.mean(errors) + 0.0025) < 0.1 * step + 0.006
    assert np.abs(errors).max() < 0.5 * step + 0.01


def test_a_chunk_of_whole_steps_is_not_stretched() -> None:
    model = build("max", chunk_seconds=5.12)
    log_mel = torch.randn(1, 513, 32)
    assert torch.equal(model.stretch(log_mel), log_mel[:, :512])
    assert torch.equal(model.stretch(log_mel[:, :129], 128), log_mel[:, :128])
    short = model.stretch(log_mel[:, :100])
    assert torch.equal(short[:, :100], log_mel[:, :100]) and bool((short[:, 100:] == -100).all())
    assert torch.equal(model.fill(log_mel[:, :100], "stretch"), log_mel[:, :100])
    assert torch.equal(model.fill(log_mel[:, :200], "repeat"), log_mel[:, :200].repeat(1, 2, 1))
    assert model.fill(log_mel[:, :10], "stretch").shape[1] == 32
    assert build("max").stretch(log_mel[:, :501]).shape[1] == 512


@pytest.mark.parametrize("seconds", [5.0, 5.12])
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("name", SMALL)
def test_every_length_is_taken_and_a_clip_gets_the_same_bits_in_any_batch(name: str, fit: Any, seconds: float) -> None:
    model = build(name, chunk_seconds=seconds)
    limit = model.chunk_samples
    with torch.inference_mode():
        for num_samples in (200, 2500, limit // 2, limit):
            waveform = noise(3, num_samples)
            together = model(waveform, fit)
            alone = model(waveform[1:2], fit)
            assert torch.equal(together.clipwise_logits[1], alone.clipwise_logits[0])
            assert torch.equal(together.framewise_logits[1], alone.framewise_logits[0])
            assert bool(torch.isfinite(together.framewise_logits).all())
            if fit in ("pad", "tile", "native"):
                tokens = -(-num_samples * model.num_tokens // limit)
                assert together.framewise_logits.shape == (3, tokens, 5)


@pytest.mark.parametrize("name", ["max", "att", "crnn"])
def test_recordings_of_any_length(tmp_path: Path, name: str) -> None:
    """The parts of a long recording lie at their times: a burst is found where it is, by a hand-made detector."""
    model = build(name, chunk_seconds=5.12)
    config = dataclasses.replace(config_of(model), inference=InferenceConfig(short="native", hop_seconds=2.0))
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, config)
    predictor = Predictor(path, device="cpu")
    for seconds in (0.3, 2.0, 5.12, 13.7):
        waveform = noise(1, round(seconds * 8000))[0].numpy()
        found = predictor.predict((waveform, 8000))
        tokens = -(-len(waveform) * model.num_tokens // model.chunk_samples)
        assert found.framewise_posteriors.shape == (tokens, 5)
        assert found.frame_boundaries[-1] == pytest.approx(seconds)
        assert found.frame_boundaries[1] == pytest.approx(min(seconds, 5.12 / model.num_tokens))
    # What is repeated every 5.12 s, chunk after chunk, is heard again and again at the same place.
    period = noise(1, model.chunk_samples)[0].numpy()
    found = predictor.predict((np.tile(period, 3), 8000)).framewise_posteriors
    middle, before = found[model.num_tokens : 2 * model.num_tokens], found[: model.num_tokens]
    inside = slice(model.num_tokens // 4, model.num_tokens // 2)
    assert np.abs(middle[inside] - before[inside]).max() < 0.1 * max(0.05, float(np.ptp(found)))


# ------------------------------------------------------------------ settings and files


@pytest.mark.parametrize("name", SMALL)
def test_round_trip(tmp_path: Path, name: str) -> None:
    model = build(name)
    config = config_of(model)
    assert tensor_shapes(config) == {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    save_checkpoint(tmp_path / "model.safetensors", model, config)
    other, read = load_checkpoint(tmp_path / "model.safetensors")
    assert read == config and type(other) is type(model)
    waveform = noise(2, 20_000)
    with torch.inference_mode():
        before, after = model(waveform), other(waveform)
    assert torch.equal(before.clipwise_logits, after.clipwise_logits)
    assert torch.equal(before.framewise_logits, after.framewise_logits)
    # A loaded model trains: recurrent layers keep a list of their weights.
    other.train()(waveform).clipwise_logits.sum().backward()
    assert all(p.grad is not None for key, p in other.named_parameters() if not key.startswith("head_att"))


def test_known_sizes() -> None:
    """80,753,615 is the number of parameters of Cnn14 in table 3 of its paper (80.8 million)."""
    settings: dict[str, Any] = {"labels": tuple(map(str, range(527)))}
    assert count_parameters(CheckpointConfig(FrontendConfig(), ModelConfig(527, "cnn14"), **settings)) == 80_753_615
    assert count_parameters(CheckpointConfig(FrontendConfig(), ModelConfig(0, "crnn"))) == pytest.approx(
        1.1e6, rel=0.05
    )


def test_a_setting_of_another_architecture_is_refused() -> None:
    for name in USED_BY:
        assert name in ModelConfig.__dataclass_fields__
    for settings in ({"embed_dim": 64}, {"stem": "conv"}, {"rnn_width": 64}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))} is a setting of .*leave it"):
            ModelConfig(5, "cnn14", **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="decision is a setting of cnn14, but the architecture is 'htsat'"):
        ModelConfig(5, decision="att")
    with pytest.raises(ConfigError, match="32 or more"):
        CheckpointConfig(FrontendConfig(n_mels=16), ModelConfig(0, "cnn14"))
    with pytest.raises(ConfigError, match="cannot be recomputed"):
        build("max").set_gradient_checkpointing(True)


def test_heads_priors_and_groups() -> None:
    for name in ("max", "att", "crnn"):
        model = build(name)
        heads = [key for key, _ in model.named_parameters() if is_head(key)]
        assert {key.split(".")[0] for key in heads} == ({"head"} if name == "max" else {"head", "head_attention"})
        model.set_prior(0.05)
        torch.nn.init.zeros_(model.head.weight)
        with torch.no_grad():
            output = model(noise(1, 8000))
        torch.testing.assert_close(output.clipwise_logits.sigmoid(), torch.full((1, 5), 0.05))
        groups = parameter_groups(model, 0.1, body_rate=0.5)
        assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["att", "crnn"])
def test_a_training_starts_from_one_with_other_classes(tmp_path: Path, name: str) -> None:
    source, target = build(name), build(name, seed=1, num_classes=2)
    config = dataclasses.replace(config_of(source), labels=("a", "b", "c", "d", "e"))
    save_checkpoint(tmp_path / "model.safetensors", source, config)
    kept = target.head.bias[1].clone()
    load_start(target, str(tmp_path / "model.safetensors"), ("d", "new"))
    assert torch.equal(target.head.weight[0], source.head.weight[3]) and target.head.bias[1] == kept
    assert torch.equal(target.head_attention.weight[0], source.head_attention.weight[3])
    body = {key: tensor for key, tensor in source.state_dict().items() if not is_head(key)}
    assert all(torch.equal(target.state_dict()[key], tensor) for key, tensor in body.items())
    with pytest.raises(CheckpointError, match="of another architecture"):
        load_start(build("crnn" if name == "att" else "att"), str(tmp_path / "model.safetensors"), ("d",))


# ------------------------------------------------------------------ training

#: chunks of 5 s, half-second clips, all that is random switched on
RECIPE = """
description = "A baseline in miniature"
[data]
corpus = "esc50"
folder = "."
clip_seconds = 0.5
select = 0.3
test_fold = 5
[frontend]
sample_rate = 8000
n_fft = 256
hop_length = 80
n_mels = 32
f_max = 4000.0
[model]
architecture = "{architecture}"
cnn_width = 2
chunk_seconds = 5.0
[train]
loss = "{loss}"
steps = 4
batch_size = 4
threads = 1
select_steps = 2
save_steps = 2
keep_best = 2
precision = "{precision}"
[augment]
mixup = "labels"
time_masks = 1
max_frames = 8
mel_masks = 1
max_mels = 4
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_esc50(tmp_path_factory.mktemp("data"), seconds=0.5, labels=label_set("esc50")[:3])


@pytest.mark.parametrize(
    ("architecture", "loss", "precision"), [("cnn14", "bce", "float32"), ("crnn", "ce", "bfloat16")]
)
def test_a_resumed_training_ends_as_the_whole_one(
    data: Path, tmp_path: Path, architecture: str, loss: str, precision: str
) -> None:
    """Through the command, killed in the third step; dropout is part of what must come again."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(architecture=architecture, loss=loss, precision=precision))

    def train(name: str, *more: str, **settings: Any) -> Any:
        return nursery().run(["train", recipe, "--data", data, "--out", tmp_path / name, *more], **settings)

    whole = train("whole")
    assert whole.codes == [0], whole.errors
    assert train("cut", mishaps={0: AT_STEP.format(n=3, after=False)}).codes == [-signal.SIGKILL]
    assert train("cut", "--resume").codes == [0]
    assert not run_differences(tmp_path / "whole", tmp_path / "cut")
    losses = [json.loads(line).get("loss") for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(loss) for loss in losses if loss is not None)
    model, config = load_checkpoint(tmp_path / "whole" / "model.safetensors")
    assert config.model.architecture == architecture and config.labels == label_set("esc50")[:3]
    found = Predictor(tmp_path / "whole" / "model.safetensors", device="cpu").predict(
        (np.zeros(4000, np.float32), 8000)
    )
    assert found.framewise_posteriors.shape == (-(-4000 * model.num_tokens // model.chunk_samples), 3)
