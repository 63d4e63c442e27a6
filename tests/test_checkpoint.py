"""Our checkpoint file: exact round trips, and one clear error for everything that is not one."""

import dataclasses
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from htsat.config import CheckpointConfig, DecodingConfig, FrontendConfig, InferenceConfig, ModelConfig, to_dict
from htsat.errors import CheckpointError, ConfigError, OutputError, UsageError
from htsat.model.checkpoint import (
    MAX_HEADER,
    count_parameters,
    load_checkpoint,
    read_config,
    read_header,
    save_checkpoint,
    sniff,
    tensor_shapes,
)
from htsat.model.htsat import HTSAT

SMALL = ModelConfig(num_classes=3, embed_dim=16, depths=(2, 2), num_heads=(2, 4))
CONFIG = CheckpointConfig(
    FrontendConfig(),
    SMALL,
    labels=("a", "b", "ç"),
    objective="single_label",
    decoding=DecodingConfig(threshold=0.4, per_class={"b": {"threshold": 0.2}}),
    provenance={"data": "synthetic", "figures": {"mAP": 0.5}},
)


def make(config: CheckpointConfig = CONFIG) -> HTSAT:
    torch.manual_seed(0)
    model = HTSAT(config.frontend, config.model).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a good checkpoint."""
    path = tmp_path_factory.mktemp("good") / "x.safetensors"
    save_checkpoint(path, make(), CONFIG)
    return path.read_bytes()


def rewritten(whole: bytes, path: Path, **changes: object) -> Path:
    """A copy with the settings in its header changed; ``name__inner`` reaches inside a section; None removes."""
    (path.parent / "in.safetensors").write_bytes(whole)
    tensors = load_file(path.parent / "in.safetensors")
    values = {"format": 1} | to_dict(CONFIG)
    for key, value in changes.items():
        *sections, name = key.split("__")
        target = values
        for section in sections:
            target = target[section]
        if value is None:
            target.pop(name)
        else:
            target[name] = value
    save_file(tensors, path, {"htsat": json.dumps(values)})
    return path


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(),
        SMALL,
        ModelConfig(num_classes=0, embed_dim=24, depths=(1, 2, 1), num_heads=(2, 4, 8)),
        ModelConfig(num_classes=5, embed_dim=16, depths=(1,), num_heads=(2,), token_semantic=False),
        ModelConfig(num_classes=5, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=64 // 2, mlp_ratio=2.5),
        ModelConfig(num_classes=2, embed_dim=8, depths=(1, 1), num_heads=(1, 1), patch_size=8, image_size=256),
        ModelConfig(num_classes=2, embed_dim=16, depths=(1, 1), num_heads=(1, 1), patch_size=8, stem="conv"),
        ModelConfig(num_classes=2, embed_dim=8, depths=(1,), num_heads=(1,), patch_size=2, stem="conv"),
        ModelConfig(num_classes=2, embed_dim=8, depths=(1,), num_heads=(1,), frequency_embedding=True),
    ],
    ids=["published", "small", "encoder", "no-tscam", "window", "patch", "conv", "conv of 2", "embedding"],
)
def test_shapes_are_foretold(model: ModelConfig) -> None:
    config = CheckpointConfig(FrontendConfig(), model, labels=tuple(map(str, range(model.num_classes))))
    network = HTSAT(config.frontend, model)
    assert tensor_shapes(config) == {name: tuple(t.shape) for name, t in network.state_dict().items()}
    assert count_parameters(config) == sum(p.numel() for p in network.parameters())


def test_round_trip_is_exact(tmp_path: Path) -> None:
    model = make()
    save_checkpoint(tmp_path / "x.safetensors", model, CONFIG)
    loaded, config = load_checkpoint(tmp_path / "x.safetensors")
    assert config == read_config(tmp_path / "x.safetensors") == CONFIG
    assert type(loaded) is HTSAT
    assert not loaded.training
    assert all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    waveform = torch.randn(2, 320000) * 0.1
    with torch.inference_mode():
        ours, theirs = loaded(waveform), model(waveform)
    assert torch.equal(ours.framewise_logits, theirs.framewise_logits)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_round_trip_with_a_convolutional_stem(tmp_path: Path, dtype: str) -> None:
    model = ModelConfig(
        num_classes=3, embed_dim=16, depths=(1, 1), num_heads=(2, 4), patch_size=8, stem="conv",
        frequency_embedding=True, drop_path=0.05,
    )  # fmt: skip
    config = dataclasses.replace(CONFIG, model=model, inference=InferenceConfig(short="native"))
    network = make(config)
    save_checkpoint(tmp_path / "x.safetensors", network, config, dtype=dtype)  # type: ignore[arg-type]
    loaded, found = load_checkpoint(tmp_path / "x.safetensors")
    assert found == config
    state = loaded.state_dict()
    assert any(name.startswith("patch_embed.blocks.2.") for name in state)
    for name, tensor in network.state_dict().items():
        expected = tensor.half().float() if dtype == "float16" and tensor.ndim > 1 else tensor
        assert torch.equal(state[name], expected), name
    if dtype == "float32":
        waveform = torch.randn(1, 100_000) * 0.1
        with torch.inference_mode():
            ours, theirs = loaded(waveform, "native"), network(waveform, "native")
        assert torch.equal(ours.framewise_logits, theirs.framewise_logits)


def test_a_stem_of_patches_is_no_convolutional_one(tmp_path: Path, whole: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"lacks 24 of 90 tensors: patch_embed.blocks.0.0.weight"):
        read_config(rewritten(whole, tmp_path / "x.safetensors", model__stem="conv"))


def test_loaded_model_trains(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x.safetensors", make(), CONFIG)
    model, _ = load_checkpoint(tmp_path / "x.safetensors")
    model.train()(torch.randn(2, 320000) * 0.1).clipwise_logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_rounds_matrices_once_and_keeps_vectors(tmp_path: Path, dtype: str, error: float) -> None:
    model = make()
    save_checkpoint(tmp_path / "x.safetensors", model, CONFIG, dtype=dtype)  # type: ignore[arg-type]
    loaded, _ = load_checkpoint(tmp_path / "x.safetensors")
    for name, tensor in model.state_dict().items():
        got = loaded.state_dict()[name]
        assert got.dtype == tensor.dtype
        if tensor.ndim > 1:
            assert torch.equal(got, tensor.to(getattr(torch, dtype)).float())
            torch.testing.assert_close(got, tensor, rtol=error, atol=1e-7)
        else:
            assert torch.equal(got, tensor)


def test_file_is_plain_safetensors(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x.safetensors", make(), CONFIG)
    assert set(load_file(tmp_path / "x.safetensors")) == set(tensor_shapes(CONFIG))
    assert json.loads(read_header(tmp_path / "x.safetensors").metadata["htsat"])["format"] == 1


def test_configuration_is_read_without_torch(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(whole)
    code = (
        "import sys; from htsat.model.checkpoint import read_config; "
        f"print(read_config({str(tmp_path / 'x.safetensors')!r}).labels[0]); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "a\n"), done.stderr


# ---------------------------------------------------------------- writing


def test_saving_replaces_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, make(), CONFIG)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"x\.safetensors: cannot be written: the disk is full"):
        save_checkpoint(path, make(), CONFIG, dtype="float16")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]
    monkeypatch.undo()
    save_checkpoint(path, make(), CONFIG, dtype="float16")
    assert len(path.read_bytes()) < len(before)


def test_interrupt_while_saving_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "x.safetensors", make(), CONFIG)
    assert not os.listdir(tmp_path)


def test_saved_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x.safetensors", make(), CONFIG)
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_refusals_to_write(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"the folder .* does not exist"):
        save_checkpoint(tmp_path / "absent" / "x.safetensors", make(), CONFIG)
    with pytest.raises(UsageError, match="float32, float16, bfloat16, got 'int8'"):
        save_checkpoint(tmp_path / "x.safetensors", make(), CONFIG, dtype="int8")  # type: ignore[arg-type]
    for other in (
        dataclasses.replace(CONFIG, frontend=FrontendConfig(sample_rate=16000, hop_length=160)),
        dataclasses.replace(CONFIG, model=dataclasses.replace(SMALL, embed_dim=32)),
    ):
        with pytest.raises(ConfigError, match="does not describe the model"):
            save_checkpoint(tmp_path / "x.safetensors", make(), other)
    model = make()
    model.stages[0].blocks[0].mlp.fc1.weight.data[0, 0] = 1e5
    with pytest.raises(OutputError, match=r"fc1\.weight holds NaN, infinite or, as float16, too large"):
        save_checkpoint(tmp_path / "x.safetensors", model, CONFIG, dtype="float16")
    save_checkpoint(tmp_path / "x.safetensors", model, CONFIG, dtype="bfloat16")
    model.norm.bias.data[0] = float("nan")
    with pytest.raises(OutputError, match=r"norm\.bias holds NaN"):
        save_checkpoint(tmp_path / "y.safetensors", model, CONFIG)
    assert os.listdir(tmp_path) == ["x.safetensors"]


# ---------------------------------------------------------------- everything that is not a checkpoint


def refused(path: Path, message: str) -> None:
    """Both ways in must give the same one-line error, which names the file."""
    for function in (read_config, load_checkpoint):
        with pytest.raises(CheckpointError, match=message) as caught:
            function(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    refused(path, "no such file; `htsat models`")
    refused(tmp_path, "is a folder")
    path.touch()
    refused(path, "the file is empty")
    for archive in (True, False):
        torch.save({"state_dict": {}}, path, _use_new_zipfile_serialization=archive)
        refused(path, r"looks like a PyTorch pickle.*`htsat convert model\.ckpt model\.safetensors`")
        assert sniff(path) == "pickle"
    path.write_text("<!DOCTYPE html><html>quota exceeded</html>")
    refused(path, "is a web page")
    path.write_bytes(b"RIFF" + bytes(100))
    refused(path, "is not a safetensors checkpoint")
    save_file({"x": torch.zeros(2)}, path)
    refused(path, r"of another program \(no 'htsat' metadata\).*htsat convert")
    assert sniff(path) == "safetensors"
    path.write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + b"{" + bytes(100))
    refused(path, "is not a safetensors checkpoint")


@pytest.mark.parametrize(
    "header",
    [
        b"{}}",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": 7, "shape": [1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"__metadata__": [], "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"htsat": 3}}',
        b'{"x": ' * 5000,
        b'{"x": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}',
    ],
)
def test_damaged_headers(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(path, "header is damaged|of another program")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncated_anywhere(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 5000))
    (tmp_path / "x.safetensors").write_bytes(whole[:size])
    refused(tmp_path / "x.safetensors", "empty|cut off|beginning is damaged")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_anywhere_in_the_header(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever a header says, the answer is a model that fits it or a CheckpointError."""
    header = 8 + int.from_bytes(whole[:8], "little")
    at = data.draw(st.integers(0, header - 1))
    piece = data.draw(st.binary(min_size=1, max_size=4) | st.sampled_from([b"9", b"0", b'"', b"}", b"-", b"null"]))
    (tmp_path / "x.safetensors").write_bytes(whole[:at] + piece + whole[at + len(piece) :])
    try:
        model, config = load_checkpoint(tmp_path / "x.safetensors")
    except CheckpointError as error:
        assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)
    else:
        assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == tensor_shapes(config)


def test_more_bytes_than_described(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(whole + b"x")
    refused(tmp_path / "x.safetensors", "where its header describes")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2 is newer than this htsat reads.*upgrade htsat"),
        ({"format": None}, "format number is None"),
        ({"format": "1"}, "format number is '1'"),
        ({"format": True}, "format number is True"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"model__embed_dims": 16}, "unknown key 'embed_dims'; did you mean 'embed_dim'"),
        ({"model__depths": "2-2"}, r"model\.depths: expected a list"),
        ({"labels": ["a", "b"]}, "2 labels for 3 classes"),
        ({"labels": ["a", "b", "c", "d"], "model__num_classes": 4, "decoding": {}}, "labels do not fit the weights"),
        ({"model__embed_dim": 32}, r"tensor patch_embed\.proj\.weight has shape \[16, 16\].*demands \[32, 16\]"),
        ({"model__depths": [2, 1]}, "holds 13 tensors its model has not"),
        ({"model__depths": [2, 3]}, r"lacks 13 of \d+ tensors: stages\.1\.blocks\.2\.norm1\.weight"),
        ({"model__depths": []}, "1 to 6 stages"),
        ({"frontend__n_mels": 32}, r"tensor mel_norm\.weight has shape \[64\]"),
    ],
)
def test_configuration_that_does_not_fit(
    whole: bytes, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    refused(rewritten(whole, tmp_path / "x.safetensors", **changes), message)


def test_metadata_that_is_no_configuration(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for text in ("", "[1]", "{" * 9000, '{"a": ' * 9000, "null"):
        save_file({"x": torch.zeros(1)}, path, {"htsat": text})
        refused(path, "metadata is damaged")
    save_file({"x": torch.zeros(1)}, path, {"htsat": '{"format": 1}'})
    refused(path, "key 'frontend' is missing")


def test_tensors_that_do_not_fit(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)
    tensors = load_file(path)
    metadata = dict(read_header(path).metadata)

    def put(**changes: torch.Tensor | None) -> None:
        changed = {k.replace("__", "."): v for k, v in changes.items()}
        path.write_bytes(save({k: v for k, v in (tensors | changed).items() if v is not None}, metadata))

    put(norm__bias=None)
    refused(path, r"lacks 1 of \d+ tensors: norm\.bias")
    put(spare=torch.zeros(1))
    refused(path, "holds 1 tensors its model has not: spare")
    put(norm__bias=torch.zeros(33))
    refused(path, r"tensor norm\.bias has shape \[33\]")
    put(norm__bias=torch.zeros(32, dtype=torch.int64))
    refused(path, r"norm\.bias is stored as I64")
    put(norm__bias=torch.full((32,), float("inf")))
    with pytest.raises(CheckpointError, match=r"norm\.bias holds NaN or infinite"):
        load_checkpoint(path)
    put(norm__bias=torch.full((32,), 0.25, dtype=torch.float64))
    assert load_checkpoint(path)[0].norm.bias.dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [
        {"model__embed_dim": 10**9},
        {"model__embed_dim": 1024, "model__num_heads": [1, 1, 1, 1, 1, 1], "model__depths": [64] * 6},
        {"model__image_size": 2048, "model__patch_size": 1},
        {"model__depths": [10**12, 2]},
        {"model__embed_dim": 10**400},
        {"model__mlp_ratio": 10**400},
        {"frontend__n_mels": 10**9},
        {"frontend__n_fft": 10**9},
        {"model__num_classes": 10**8},
    ],
)
def test_huge_sizes_are_refused_before_memory_is_asked_for(
    whole: bytes, tmp_path: Path, changes: dict[str, object]
) -> None:
    path = rewritten(whole, tmp_path / "x.safetensors", **changes)
    tracemalloc.start()
    try:
        refused(path, "x.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_square_that_needs_huge_masks_is_refused(tmp_path: Path) -> None:
    """Weights do not grow with the square, masks do: the tensors of this file fit its configuration."""
    model = ModelConfig(
        num_classes=0, embed_dim=8, depths=(1,), num_heads=(1,), patch_size=1, image_size=2048, window_size=32
    )
    config = CheckpointConfig(FrontendConfig(), model)
    tensors = {name: torch.zeros(shape) for name, shape in tensor_shapes(config).items()}
    tensors["mel_norm.num_batches_tracked"] = torch.tensor(0)
    save_file(tensors, tmp_path / "x.safetensors", {"htsat": json.dumps({"format": 1} | to_dict(config))})
    refused(tmp_path / "x.safetensors", "attention masks beyond")


def test_unreadable_file(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)

    def denied(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        read_config(path)


def test_loaded_weights_do_not_follow_the_file(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)
    model, _ = load_checkpoint(path)
    before = model.norm.weight.detach().numpy().copy()
    with open(path, "r+b") as file:
        file.seek(len(whole) // 2)
        file.write(bytes(len(whole) // 2))
    assert np.array_equal(model.norm.weight.detach().numpy(), before)
    assert all(p.isfinite().all() and p.abs().sum() > 0 for p in model.parameters())
