"""Published weights into our model: each published layout, made small; the truth is Hugging Face's CLAP, run live."""

import argparse
import json
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from shared_data import shared
from torch import Tensor

from htsat.audio.mel import mel_filterbank
from htsat.config import CheckpointConfig, FrontendConfig, ModelConfig
from htsat.errors import CheckpointError, DataError
from htsat.labels import label_set
from htsat.model.checkpoint import load_checkpoint, save_checkpoint
from htsat.model.convert import convert, imagenet_start
from htsat.model.htsat import HTSAT

WIDTH, DEPTHS, HEADS = 16, (2, 2), (2, 4)


def published_state(classes: int = 527, sample_rate: int = 32000, tscam: bool = True) -> dict[str, Tensor]:
    """A state dict of the published code: names written down by hand, width 16, two stages."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    state = {
        "spectrogram_extractor.stft.conv_real.weight": torch.zeros(513, 1, 1024),
        "spectrogram_extractor.stft.conv_imag.weight": torch.zeros(513, 1, 1024),
        "logmel_extractor.melW": torch.from_numpy(
            mel_filterbank(FrontendConfig(sample_rate, hop_length=sample_rate // 100))
        ).float(),
        "bn0.weight": values(64) + 1,
        "bn0.bias": values(64),
        "bn0.running_mean": values(64) - 20,
        "bn0.running_var": values(64).abs() + 50,
        "bn0.num_batches_tracked": torch.tensor(7),
        "patch_embed.proj.weight": values(WIDTH, 1, 4, 4),
        "patch_embed.proj.bias": values(WIDTH),
        "patch_embed.norm.weight": values(WIDTH) + 1,
        "patch_embed.norm.bias": values(WIDTH),
    }
    for i, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        width, side = WIDTH << i, 64 >> i
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            if j % 2:
                state[f"{block}.attn_mask"] = torch.zeros((side // 8) ** 2, 64, 64)
            state |= {
                f"{block}.norm1.weight": values(width) + 1,
                f"{block}.norm1.bias": values(width),
                f"{block}.attn.relative_position_bias_table": values(225, heads),
                f"{block}.attn.relative_position_index": torch.zeros(64, 64, dtype=torch.int64),
                f"{block}.attn.qkv.weight": values(3 * width, width),
                f"{block}.attn.qkv.bias": values(3 * width),
                f"{block}.attn.proj.weight": values(width, width),
                f"{block}.attn.proj.bias": values(width),
                f"{block}.norm2.weight": values(width) + 1,
                f"{block}.norm2.bias": values(width),
                f"{block}.mlp.fc1.weight": values(4 * width, width),
                f"{block}.mlp.fc1.bias": values(4 * width),
                f"{block}.mlp.fc2.weight": values(width, 4 * width),
                f"{block}.mlp.fc2.bias": values(width),
            }
    state |= {
        "layers.0.downsample.reduction.weight": values(2 * WIDTH, 4 * WIDTH),
        "layers.0.downsample.norm.weight": values(4 * WIDTH) + 1,
        "layers.0.downsample.norm.bias": values(4 * WIDTH),
        "norm.weight": values(2 * WIDTH) + 1,
        "norm.bias": values(2 * WIDTH),
    }
    if tscam:
        state |= {
            "tscam_conv.weight": values(classes, 2 * WIDTH, 8, 3),
            "tscam_conv.bias": values(classes),
            "head.weight": values(classes, classes),
            "head.bias": values(classes),
        }
    else:
        state |= {"head.weight": values(classes, 2 * WIDTH), "head.bias": values(classes)}
    return state


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(path: Path, content: object, **options: object) -> Path:
    torch.save(content, path, **options)
    return path


# ---------------------------------------------------------------- published code


@pytest.mark.parametrize("prefix", ["sed_model.", ""])
def test_published_checkpoint_loads_every_tensor(tmp_path: Path, prefix: str) -> None:
    state = published_state()
    path = saved(tmp_path / "HTSAT_AudioSet_Saved_1.ckpt", {"epoch": 3, "state_dict": prefixed(state, prefix)})
    model, config, report = convert(path)

    own = model.state_dict()
    same = {
        "mel_norm.running_mean": "bn0.running_mean",
        "patch_embed.proj.bias": "patch_embed.proj.bias",
        "stages.0.merge.reduction.weight": "layers.0.downsample.reduction.weight",
        "stages.0.merge.norm.bias": "layers.0.downsample.norm.bias",
        "stages.1.blocks.0.attn.qkv.weight": "layers.1.blocks.0.attn.qkv.weight",
        "stages.1.blocks.1.attn.relative_position_bias_table": "layers.1.blocks.1.attn.relative_position_bias_table",
        "stages.0.blocks.1.mlp.fc2.weight": "layers.0.blocks.1.mlp.fc2.weight",
        "token_semantic.weight": "tscam_conv.weight",
        "norm.weight": "norm.weight",
    }
    for ours, published in same.items():
        assert torch.equal(own[ours], state[published]), ours
    assert torch.equal(own["patch_embed.proj.weight"], state["patch_embed.proj.weight"].reshape(WIDTH, 16))
    assert set(report.loaded) == set(own)
    assert len(report.loaded) + len(report.set_aside) == len(state)
    assert not report.missing and not report.unexpected and not report.mismatched
    assert "never uses" in report.set_aside["head.weight"]
    assert "set aside" in report.summary()

    assert config.frontend == FrontendConfig()
    assert (config.model.embed_dim, config.model.depths, config.model.num_heads) == (WIDTH, DEPTHS, HEADS)
    assert (config.model.window_size, config.model.image_size, config.model.num_classes) == (8, 256, 527)
    assert config.labels == label_set("audioset")
    assert config.objective == "multi_label"
    assert not model.training


def test_every_name_of_the_published_model_is_known(tmp_path: Path) -> None:
    shapes = json.loads(shared("golden", "official_state_dict_shapes.json").read_text())
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    state["bn0.num_batches_tracked"] = torch.tensor(0)
    state["logmel_extractor.melW"] = torch.from_numpy(mel_filterbank(FrontendConfig())).float()
    path = saved(tmp_path / "x.ckpt", {"state_dict": prefixed(state, "sed_model.")})
    model, config, report = convert(path)
    assert config.model == ModelConfig()
    assert sum(p.numel() for p in model.parameters()) == sum(
        np.prod(shape)
        for name, shape in shapes.items()
        if name not in report.set_aside and not name.endswith(("running_mean", "running_var", "tracked"))
    )


@pytest.mark.parametrize("rate", [16000, 32000, 48000])
def test_sample_rate_follows_the_stored_mel_filters(tmp_path: Path, rate: int) -> None:
    _, config, _ = convert(saved(tmp_path / "x.ckpt", published_state(sample_rate=rate)))
    assert (config.frontend.sample_rate, config.frontend.hop_length) == (rate, rate // 100)


def test_sample_rate_is_asked_for_where_nothing_tells_it(tmp_path: Path) -> None:
    state = {k: v for k, v in published_state().items() if not k.startswith(("spectrogram", "logmel"))}
    path = saved(tmp_path / "x.ckpt", state)
    with pytest.raises(CheckpointError, match="--sample-rate"):
        convert(path)
    _, config, _ = convert(path, sample_rate=16000)
    assert (config.frontend.sample_rate, config.frontend.hop_length) == (16000, 160)

    state["logmel_extractor.melW"] = torch.rand(513, 64)
    with pytest.raises(CheckpointError, match=r"no published front end.*--sample-rate"):
        convert(saved(tmp_path / "y.ckpt", state))


def test_given_settings_win_over_inferred_ones(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.ckpt", published_state(classes=50))
    _, config, _ = convert(
        path, sample_rate=16000, hop_length=200, f_min=0, f_max=8000, mel_scale="htk", objective="multi_label"
    )
    assert config.frontend == FrontendConfig(16000, hop_length=200, f_min=0, f_max=8000, mel_scale="htk")
    assert config.objective == "multi_label"


def test_conflicting_sample_rate_is_noted(tmp_path: Path) -> None:
    _, config, report = convert(saved(tmp_path / "x.ckpt", published_state()), sample_rate=16000)
    assert config.frontend.sample_rate == 16000
    assert any("32000 Hz" in note for note in report.notes)


def test_short_hop_shortens_the_chunk_to_what_the_square_holds(tmp_path: Path) -> None:
    _, config, report = convert(saved(tmp_path / "x.ckpt", published_state()), hop_length=160)
    assert config.model.chunk_seconds == pytest.approx(1023 * 160 / 32000)
    assert any("chunks last" in note for note in report.notes)


@pytest.mark.parametrize(
    ("classes", "name", "objective"),
    [(527, "audioset", "multi_label"), (50, "esc50", "single_label"), (35, "speech_commands_v2", "single_label")],
)
def test_labels_follow_the_number_of_outputs(tmp_path: Path, classes: int, name: str, objective: str) -> None:
    _, config, _ = convert(saved(tmp_path / "x.ckpt", published_state(classes)))
    assert (config.labels, config.objective) == (label_set(name), objective)


def test_labels_are_asked_for_and_must_fit(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.ckpt", published_state(10))
    with pytest.raises(CheckpointError, match=r"10 outputs.*--labels"):
        convert(path)
    with pytest.raises(CheckpointError, match="10 outputs, but 50 labels"):
        convert(path, labels="esc50")
    with pytest.raises(DataError, match="did you mean 'desed'"):
        convert(path, labels="desde")
    with pytest.raises(CheckpointError, match="occurs twice"):
        convert(path, labels=["a"] * 10)
    assert convert(path, labels="desed")[1].labels == label_set("desed")
    assert convert(path, labels="esc10")[1].objective == "single_label"
    assert convert(path, labels=list("abcdefghij"))[1].labels == tuple("abcdefghij")
    (tmp_path / "labels.txt").write_text("\n".join("jihgfedcba"))
    assert convert(path, labels=tmp_path / "labels.txt")[1].labels == tuple("jihgfedcba")


def test_head_without_token_semantic_module(tmp_path: Path) -> None:
    state = published_state(50, tscam=False)
    model, config, _ = convert(saved(tmp_path / "x.ckpt", state))
    assert not config.model.token_semantic
    assert torch.equal(model.head.weight, state["head.weight"])


def test_half_precision_and_absent_step_counter_are_fine(tmp_path: Path) -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in published_state(50).items()}
    state["logmel_extractor.melW"] = published_state(50)["logmel_extractor.melW"]
    del state["bn0.num_batches_tracked"]
    model, _, _ = convert(saved(tmp_path / "x.ckpt", state))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_converted_model_survives_saving(tmp_path: Path) -> None:
    model, config, _ = convert(saved(tmp_path / "x.ckpt", published_state(50)))
    save_checkpoint(tmp_path / "x.safetensors", model, config)
    loaded, _ = load_checkpoint(tmp_path / "x.safetensors")
    waveform = torch.randn(1, 32000) * 0.1
    with torch.inference_mode():
        assert torch.equal(loaded(waveform).framewise_logits, model(waveform).framewise_logits)


# ---------------------------------------------------------------- nothing in silence


def test_missing_tensor(tmp_path: Path) -> None:
    state = published_state(50)
    del state["layers.1.blocks.0.mlp.fc1.bias"]
    with pytest.raises(CheckpointError, match=r"x\.ckpt.*1 missing: stages\.1\.blocks\.0\.mlp\.fc1\.bias"):
        convert(saved(tmp_path / "x.ckpt", state))


def test_unknown_tensor(tmp_path: Path) -> None:
    state = published_state(50) | {"absolute_pos_embed": torch.zeros(1, 4096, WIDTH)}
    with pytest.raises(CheckpointError, match="1 unknown: absolute_pos_embed"):
        convert(saved(tmp_path / "x.ckpt", state))


def test_tensor_of_another_shape(tmp_path: Path) -> None:
    state = published_state(50) | {"norm.weight": torch.zeros(7)}
    with pytest.raises(CheckpointError, match=r"1 of another shape: norm\.weight: \[7\], expected \[32\]"):
        convert(saved(tmp_path / "x.ckpt", state))


def test_several_networks_in_one_file(tmp_path: Path) -> None:
    state = prefixed(published_state(50), "sed_models.0.") | prefixed(published_state(50), "sed_models.1.")
    with pytest.raises(CheckpointError, match="holds 2 networks"):
        convert(saved(tmp_path / "x.ckpt", state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_embed.proj.weight": torch.zeros(16, 4, 4, 4)}, "4 x 4 x 4"),
        ({"patch_embed.proj.weight": torch.zeros(16)}, "expected 4 axes"),
        ({"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(0, 4)}, "expected 2 axes"),
        ({"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(10**6, 4)}, "window_size"),
        ({"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(225, 7)}, "does not divide"),
        ({"layers.0.blocks.1.attn_mask": torch.zeros(10**6, 1, 1)}, "image_size"),
        ({"layers.7.blocks.0.norm1.weight": torch.zeros(3)}, "no stages"),
        ({"bn0.weight": torch.zeros(4)}, "n_mels"),
        ({"bn0.weight": torch.zeros(48)}, "multiple of n_mels"),
    ],
)
def test_absurd_shapes_are_refused(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(saved(tmp_path / "x.ckpt", published_state(50) | change), sample_rate=32000)


# ---------------------------------------------------------------- pickles


class Canary:
    """Unpickling this writes a file."""

    def __init__(self, path: Path, function: object = os.mkdir) -> None:
        self.path, self.function = path, function

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return self.function, (str(self.path),)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "function", [os.mkdir, os.system, eval, exec, Path.mkdir, np.load], ids=lambda f: f.__qualname__
)
def test_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, archive: bool, function: object
) -> None:
    canary = tmp_path / "canary"
    argument = f"__import__('os').mkdir({str(canary)!r})" if function in (eval, exec) else canary
    if function is os.system:
        argument = f"mkdir {canary}"
    content = {"state_dict": published_state(50), "callbacks": Canary(argument, function)}
    path = saved(tmp_path / "x.ckpt", content, _use_new_zipfile_serialization=archive)
    if function is not np.load or not archive:
        with pytest.raises(CheckpointError, match=r"x\.ckpt: not loaded: this pickle .*nothing of it was run"):
            convert(path)
    else:
        convert(path)  # of a harmless family of names: a stand-in took the call
    assert not canary.exists()
    if function is os.mkdir:
        pickle.loads(pickle.dumps(Canary(canary)))
        assert canary.exists(), "the canary itself must work"


def test_what_training_frameworks_leave_is_passed_over(tmp_path: Path) -> None:
    content = {
        "state_dict": prefixed(published_state(50), "sed_model."),
        "hyper_parameters": argparse.Namespace(rate=1e-3),
        "best": np.float64(0.471),
        "array": np.arange(3),
        "counts": defaultdict(int, a=1),
        "folder": Path("runs"),
        "order": OrderedDict(a=1),
        "device": torch.device("cpu"),
    }
    path = saved(tmp_path / "x.ckpt", content)
    # Old Lightning keys its callbacks by class: put such a key in, by name, without having Lightning.
    patched = tmp_path / "y.ckpt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(patched, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                names = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n}s"
                assert data.endswith(b"u.")
                data = data[:-1] + b"X\x09\x00\x00\x00callbacks}" + names + b"s."
            new.writestr(entry, data)
    for source in (path, patched):
        _, config, _ = convert(source)
        assert config.model.num_classes == 50


def test_legacy_pickle_of_weights_loads(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", published_state(50), _use_new_zipfile_serialization=False)
    assert convert(path)[1].model.num_classes == 50


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    whole = saved(tmp_path / "x.ckpt", published_state(50)).read_bytes()
    for size in (4, 40, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.ckpt").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.ckpt"):
            convert(tmp_path / "cut.ckpt")
    (tmp_path / "page.ckpt").write_text("<html><body>quota exceeded</body></html>")
    with pytest.raises(CheckpointError, match=r"page\.ckpt: neither"):
        convert(tmp_path / "page.ckpt")
    (tmp_path / "empty.ckpt").touch()
    with pytest.raises(CheckpointError, match="empty"):
        convert(tmp_path / "empty.ckpt")
    with pytest.raises(CheckpointError, match="no such file"):
        convert(tmp_path / "absent.ckpt")
    with pytest.raises(CheckpointError, match="folder without"):
        convert(tmp_path)
    with pytest.raises(CheckpointError, match="no tensors"):
        convert(saved(tmp_path / "list.pt", [1, 2]))
    with pytest.raises(CheckpointError, match="holds no HTS-AT"):
        convert(saved(tmp_path / "other.pt", {"fc.weight": torch.zeros(2, 2)}))
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="damaged or no PyTorch file"):
        convert(tmp_path / "archive.zip")
    frontend, model = FrontendConfig(), ModelConfig(num_classes=0, embed_dim=8, depths=(1,), num_heads=(1,))
    save_checkpoint(tmp_path / "own.safetensors", HTSAT(frontend, model), CheckpointConfig(frontend, model))
    with pytest.raises(CheckpointError, match="already"):
        convert(tmp_path / "own.safetensors")


# ---------------------------------------------------------------- CLAP


def hf_tower(fused: bool) -> "torch.nn.Module":
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.ClapAudioConfig(
        patch_embeds_hidden_size=WIDTH,
        depths=list(DEPTHS),
        num_attention_heads=list(HEADS),
        hidden_size=WIDTH << 1,
        num_hidden_layers=len(DEPTHS),
        enable_fusion=fused,
        fusion_type="aff_2d" if fused else None,
        aff_block_r=4,
    )
    tower = transformers.ClapAudioModel(config).eval()
    with torch.no_grad():
        for name, tensor in tower.state_dict().items():
            if name.endswith("running_mean"):
                tensor.normal_(-20, 5)
            elif name.endswith("running_var"):
                tensor.uniform_(50, 150)
            elif tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return tower


def hf_embedding(tower: torch.nn.Module, log_mel: Tensor, fused: bool) -> Tensor:
    features = log_mel.unsqueeze(1)
    if fused:  # four views of a short input are four copies of it
        features = features.expand(-1, 4, -1, -1)
    longer = torch.zeros(len(log_mel), 1, dtype=torch.bool)
    with torch.no_grad():
        return tower(input_features=features, is_longer=longer).pooler_output


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_hugging_face_clap_gives_the_same_embedding(tmp_path: Path, fused: bool, safe: bool) -> None:
    tower = hf_tower(fused)
    if safe:
        tower.save_pretrained(tmp_path)
        source = tmp_path
    else:
        state = prefixed(tower.state_dict(), "audio_model.") | {"logit_scale_a": torch.tensor(1.0)}
        source = saved(tmp_path / "pytorch_model.bin", state)
    model, config, report = convert(source)
    assert (config.model.num_classes, config.labels) == (0, ())
    assert (config.frontend.sample_rate, config.frontend.hop_length) == (48000, 480)
    assert config.frontend.mel_scale == ("htk" if fused else "slaney")
    assert any("fusion" in reason for reason in report.set_aside.values()) == fused
    assert not report.missing and not report.unexpected

    waveform = torch.randn(2, 480000, generator=torch.Generator().manual_seed(3)) * 0.1
    with torch.no_grad():
        output = model(waveform)
        log_mel = model.frontend(waveform)
    assert output.clipwise_logits is None
    expected = hf_embedding(tower, log_mel, fused)
    assert expected.std() > 0.1
    torch.testing.assert_close(output.embedding, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_clap_front_end_is_that_of_the_feature_extractor(tmp_path: Path, fused: bool) -> None:
    transformers = pytest.importorskip("transformers")
    tower = hf_tower(fused)
    tower.save_pretrained(tmp_path)
    model, config, _ = convert(tmp_path)
    # 50 Hz is what the towers were trained with (LAION's model configurations).
    extractor = transformers.ClapFeatureExtractor(
        frequency_min=50, truncation="fusion" if fused else "rand_trunc", padding="pad"
    )
    waveform = np.random.default_rng(0).normal(0, 0.1, 480000).astype(np.float32)
    features = extractor(waveform, sampling_rate=48000, return_tensors="pt")["input_features"]
    with torch.no_grad():
        ours = model.frontend(torch.from_numpy(waveform)[None])
    torch.testing.assert_close(ours, features[:, 0], rtol=0, atol=2e-3)  # dB
    filters = extractor.mel_filters if fused else extractor.mel_filters_slaney
    np.testing.assert_allclose(mel_filterbank(config.frontend), filters, atol=1e-6)


@pytest.mark.parametrize("prefix", ["module.audio_branch.", "audio_branch."])
def test_laion_checkpoint_gives_the_same_embedding(tmp_path: Path, prefix: str) -> None:
    tower = hf_tower(False)
    hf = {name.removeprefix("audio_encoder."): tensor for name, tensor in tower.state_dict().items()}
    state = published_state(sample_rate=48000)
    joined = {"bn0.weight": "batch_norm.weight", "bn0.bias": "batch_norm.bias"}
    joined |= {f"bn0.running_{k}": f"batch_norm.running_{k}" for k in ("mean", "var")}
    for name in state:
        own = (
            name.replace("norm1", "layernorm_before")
            .replace("norm2", "layernorm_after")
            .replace("attn.proj", "attention.output.dense")
            .replace("attn.relative", "attention.self.relative")
            .replace("mlp.fc1", "intermediate.dense")
            .replace("mlp.fc2", "output.dense")
        )
        if "attn.qkv." in name:
            parts = [own.replace("attn.qkv", f"attention.self.{part}") for part in ("query", "key", "value")]
            state[name] = torch.cat([hf[part] for part in parts])
        elif joined.get(name, own) in hf:
            state[name] = hf[joined.get(name, own)]
    other = {"module.text_branch.embeddings.weight": torch.zeros(3, 4), "module.logit_scale_a": torch.tensor(1.0)}
    content = {"epoch": 15, "name": "630k", "state_dict": prefixed(state, prefix) | other}
    model, config, report = convert(saved(tmp_path / "630k-best.pt", content))

    assert config.model.num_classes == 0
    assert (config.frontend.sample_rate, config.frontend.mel_scale) == (48000, "slaney")
    assert "no longer fit" in report.set_aside["tscam_conv.weight"]
    assert "not of the audio encoder" in report.set_aside["module.text_branch.embeddings.weight"]
    waveform = torch.randn(1, 480000, generator=torch.Generator().manual_seed(3)) * 0.1
    with torch.no_grad():
        expected = hf_embedding(tower, model.frontend(waveform), False)
        torch.testing.assert_close(model(waveform).embedding, expected, rtol=0, atol=1e-5)


def test_fused_laion_checkpoint_uses_the_filters_it_was_trained_on(tmp_path: Path) -> None:
    state = published_state(sample_rate=48000) | {
        "patch_embed.mel_conv2d.weight": torch.zeros(WIDTH, 1, 4, 12),
        "patch_embed.fusion_model.local_att.0.weight": torch.zeros(4, WIDTH, 1, 1),
    }
    _, config, report = convert(saved(tmp_path / "x.pt", prefixed(state, "module.audio_branch.")))
    assert config.frontend == FrontendConfig(48000, hop_length=480, mel_scale="htk")
    assert sum("fusion" in reason for reason in report.set_aside.values()) == 2


def test_clap_without_stored_filters_runs_at_48_khz(tmp_path: Path) -> None:
    state = {k: v for k, v in published_state().items() if not k.startswith(("spectrogram", "logmel"))}
    _, config, _ = convert(saved(tmp_path / "x.pt", prefixed(state, "audio_branch.")))
    assert config.frontend == FrontendConfig(48000, hop_length=480)


def test_labels_for_an_encoder_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", prefixed(published_state(sample_rate=48000), "audio_branch."))
    with pytest.raises(CheckpointError, match="encoder without classes"):
        convert(path, labels="audioset")


def test_safetensors_of_the_published_layout(tmp_path: Path) -> None:
    save_file(published_state(50), tmp_path / "x.safetensors")
    assert convert(tmp_path / "x.safetensors")[1].labels == label_set("esc50")


# ---------------------------------------------------------------- ImageNet


def image_weights(window: int = 8) -> dict[str, Tensor]:
    """A state dict of the published Swin code: three colours, 1000 classes, no mel normalisation."""
    drop = ("spectrogram", "logmel", "bn0", "tscam", "head")
    state = {k: v for k, v in published_state().items() if not k.startswith(drop)}
    state["patch_embed.proj.weight"] = torch.randn(WIDTH, 3, 4, 4)
    state["head.weight"], state["head.bias"] = torch.randn(1000, 2 * WIDTH), torch.randn(1000)
    if window != 8:
        for name in state:
            if name.endswith("relative_position_bias_table"):
                state[name] = torch.zeros((2 * window - 1) ** 2, state[name].shape[1])
    return state


def small_model(classes: int = 5, embed_dim: int = WIDTH) -> HTSAT:
    torch.manual_seed(0)
    return HTSAT(FrontendConfig(), ModelConfig(classes, embed_dim=embed_dim, depths=DEPTHS, num_heads=HEADS))


def test_imagenet_start_fills_the_stages_and_leaves_the_head(tmp_path: Path) -> None:
    weights = image_weights()
    path = saved(tmp_path / "swin.pth", {"model": weights})
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = imagenet_start(model, path)
    colours = weights["patch_embed.proj.weight"]
    mean = (colours[:, 0] + colours[:, 1] + colours[:, 2]) / 3
    torch.testing.assert_close(model.patch_embed.proj.weight, mean.reshape(WIDTH, 16))
    assert torch.equal(model.stages[1].blocks[1].mlp.fc1.weight, weights["layers.1.blocks.1.mlp.fc1.weight"])
    assert torch.equal(model.token_semantic.weight, before["token_semantic.weight"])
    assert torch.equal(model.mel_norm.running_var, before["mel_norm.running_var"])
    assert set(report.missing) == {n for n in before if n.startswith(("mel_norm.", "token_semantic."))}
    assert set(report.loaded) == set(before) - set(report.missing)
    assert "classifier of images" in report.set_aside["head.weight"]


def test_imagenet_start_refuses_what_does_not_fit(tmp_path: Path) -> None:
    other_width = small_model(embed_dim=24)
    before = other_width.patch_embed.proj.weight.clone()
    path = saved(tmp_path / "swin.pth", {"model": image_weights()})
    with pytest.raises(CheckpointError, match="of another shape"):
        imagenet_start(other_width, path)
    assert torch.equal(other_width.patch_embed.proj.weight, before)
    with pytest.raises(CheckpointError, match=r"relative_position_bias_table: \[169"):
        imagenet_start(small_model(), saved(tmp_path / "w7.pth", {"model": image_weights(window=7)}))
    with pytest.raises(CheckpointError, match="published layout, expected ImageNet"):
        imagenet_start(small_model(), saved(tmp_path / "x.ckpt", published_state()))
    incomplete = image_weights()
    del incomplete["norm.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: norm\.weight"):
        imagenet_start(small_model(), saved(tmp_path / "i.pth", {"model": incomplete}))


def test_imagenet_weights_convert_to_an_encoder(tmp_path: Path) -> None:
    model, config, report = convert(saved(tmp_path / "swin.pth", {"model": image_weights()}))
    assert config.model.num_classes == 0
    assert config.frontend.sample_rate == 32000
    assert {name.split(".")[0] for name in report.missing} == {"mel_norm"}
    assert torch.equal(model.mel_norm.running_var, torch.ones(64))
    with torch.inference_mode():
        assert model(torch.randn(1, 32000) * 0.1).embedding.isfinite().all()
