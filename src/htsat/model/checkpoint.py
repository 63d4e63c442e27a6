"""Our checkpoint: one safetensors file that rebuilds its own model.

The tensors are the model's state dict. The header's metadata entry ``htsat`` holds JSON: the format
number and a ``CheckpointConfig`` (front end, architecture, labels, decoding, provenance). There is
nothing to execute in it, and nothing is allocated before the header is found consistent: the
configuration lies inside its bounds and demands exactly the tensors that the file holds.

Reading the configuration needs neither torch nor safetensors.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from htsat.config import FINE_DILATIONS, FINE_KERNEL, CheckpointConfig, from_dict, to_dict
from htsat.errors import CheckpointError, ConfigError, OutputError, UsageError
from htsat.files import write_atomic

if TYPE_CHECKING:
    from htsat.model.base import SoundModel

#: number of the file format that this version writes and reads
FORMAT = 1
#: metadata entry of the safetensors header that makes a file ours
METADATA_KEY = "htsat"
#: bytes; a header of ours has about 50 KB, and 5 MB with 100 000 labels
MAX_HEADER = 16 << 20
#: elements of one attention mask; the published model has 2^18, a square of 1024 at patch 4 has 2^22
MAX_MASK = 1 << 26

Kind = Literal["missing", "empty", "checkpoint", "safetensors", "pickle", "unknown"]
StorageType = Literal["float32", "float16", "bfloat16"]

#: stored types that become float32 weights
_FLOATS = ("F64", "F32", "F16", "BF16")
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        metadata: free entries, str to str.
        shapes: tensor name -> shape.
        dtypes: tensor name -> type as safetensors writes it, e.g. ``F32``.
    """

    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]


def tensor_shapes(config: CheckpointConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor in the state dict of ``build_model(config.frontend, config.model)``.

    Computed without building anything, so that a file can be refused before memory is asked for.
    """
    shapes = _Shapes()
    shapes.batch_norm("mel_norm", config.frontend.n_mels)
    add = {"htsat": _htsat_shapes, "cnn14": _cnn14_shapes, "crnn": _crnn_shapes}[config.model.architecture]
    add(shapes, config)
    return shapes


class _Shapes(dict[str, tuple[int, ...]]):
    """Tensor name -> shape, filled layer by layer."""

    def norm(self, name: str, width: int) -> None:
        self[f"{name}.weight"] = self[f"{name}.bias"] = (width,)

    def linear(self, name: str, rows: int, columns: int) -> None:
        self[f"{name}.weight"], self[f"{name}.bias"] = (rows, columns), (rows,)

    def batch_norm(self, name: str, width: int) -> None:
        self.norm(name, width)
        self[f"{name}.running_mean"] = self[f"{name}.running_var"] = (width,)
        self[f"{name}.num_batches_tracked"] = ()


def _htsat_shapes(shapes: _Shapes, config: CheckpointConfig) -> None:
    model, frontend = config.model, config.frontend
    if model.stem == "patch":
        shapes.linear("patch_embed.proj", model.embed_dim, model.patch_size**2)
    else:
        levels, inputs = model.patch_size.bit_length() - 1, 1
        for level in range(levels):
            outputs = model.embed_dim >> (levels - 1 - level)
            for i in range(2):
                shapes[f"patch_embed.blocks.{level}.{3 * i}.weight"] = (outputs, inputs, 3, 3)
                shapes.batch_norm(f"patch_embed.blocks.{level}.{3 * i + 1}", outputs)
                inputs = outputs
    shapes.norm("patch_embed.norm", model.embed_dim)
    if model.frequency_embedding:
        shapes["frequency_embedding"] = (frontend.n_mels // model.patch_size, model.embed_dim)
    for i, (depth, heads) in enumerate(zip(model.depths, model.num_heads, strict=True)):
        width = model.embed_dim << i
        window = min(model.window_size, model.image_size // model.patch_size >> i)
        hidden = int(width * model.mlp_ratio)
        for j in range(depth):
            block = f"stages.{i}.blocks.{j}"
            shapes.norm(f"{block}.norm1", width)
            shapes.linear(f"{block}.attn.qkv", 3 * width, width)
            shapes.linear(f"{block}.attn.proj", width, width)
            shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
            shapes.norm(f"{block}.norm2", width)
            shapes.linear(f"{block}.mlp.fc1", hidden, width)
            shapes.linear(f"{block}.mlp.fc2", width, hidden)
        if i < len(model.depths) - 1:
            shapes.norm(f"stages.{i}.merge.norm", 4 * width)
            shapes[f"stages.{i}.merge.reduction.weight"] = (2 * width, 4 * width)
    last = len(model.depths) - 1
    width = model.embed_dim << last
    shapes.norm("norm", width)
    if model.num_classes and model.token_semantic:
        rows = (model.image_size // model.patch_size >> last) // (model.image_size // frontend.n_mels)
        shapes["token_semantic.weight"] = (model.num_classes, width, rows, 3)
        shapes["token_semantic.bias"] = (model.num_classes,)
    elif model.num_classes:
        shapes.linear("head", model.num_classes, width)
    if model.num_classes and model.fine_frames:
        _fine_shapes(shapes, config)


def _fine_shapes(shapes: _Shapes, config: CheckpointConfig) -> None:
    model, n_mels, width = config.model, config.frontend.n_mels, config.model.fine_width
    shapes["fine.spectrum.weight"] = (width, n_mels, 3 * model.fine_frames)
    shapes["fine.spectrum.bias"] = (width,)
    for stage in range(len(model.depths)):
        # Each stage has half the frequencies of the one before, and twice its width.
        shapes.linear(f"fine.sources.{stage}", width, n_mels // model.patch_size * model.embed_dim)
    for i in range(len(FINE_DILATIONS)):
        block = f"fine.mixing.{i}"
        shapes.norm(f"{block}.norm", width)
        shapes[f"{block}.time.weight"], shapes[f"{block}.time.bias"] = (width, 1, FINE_KERNEL), (width,)
        shapes.linear(f"{block}.fc1", 2 * width, width)
        shapes.linear(f"{block}.fc2", width, 2 * width)
    shapes.norm("fine.norm", width)
    shapes.linear("fine.out", model.num_classes, width)


def _cnn14_shapes(shapes: _Shapes, config: CheckpointConfig) -> None:
    model, inputs = config.model, 1
    for i, outputs in enumerate(model.conv_channels):
        for j in (1, 2):
            shapes[f"blocks.{i}.conv{j}.weight"] = (outputs, inputs, 3, 3)
            shapes.batch_norm(f"blocks.{i}.norm{j}", outputs)
            inputs = outputs
    shapes.linear("fc1", inputs, inputs)
    if model.num_classes:
        shapes.linear("head", model.num_classes, inputs)
        if model.decision == "att":
            shapes.linear("head_attention", model.num_classes, inputs)


def _crnn_shapes(shapes: _Shapes, config: CheckpointConfig) -> None:
    model, inputs = config.model, 1
    for i, outputs in enumerate(model.conv_channels):
        shapes[f"blocks.{i}.conv.weight"] = (outputs, inputs, 3, 3)
        shapes.batch_norm(f"blocks.{i}.norm", outputs)
        shapes[f"blocks.{i}.gated.weight"], shapes[f"blocks.{i}.gated.bias"] = (outputs, outputs, 1, 1), (outputs,)
        inputs = outputs
    units = model.rnn_width
    for layer, columns in enumerate((inputs, 2 * units)):
        for direction in ("", "_reverse"):
            for kind, width in (("ih", columns), ("hh", units)):
                shapes[f"rnn.weight_{kind}_l{layer}{direction}"] = (3 * units, width)
                shapes[f"rnn.bias_{kind}_l{layer}{direction}"] = (3 * units,)
    if model.num_classes:
        shapes.linear("head", model.num_classes, 2 * units)
        shapes.linear("head_attention", model.num_classes, 2 * units)


def count_parameters(config: CheckpointConfig) -> int:
    """Return the number of learned parameters of the model (running statistics are none)."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return sum(math.prod(shape) for name, shape in tensor_shapes(config).items() if not name.endswith(statistics))


# ---------------------------------------------------------------- reading


def sniff(path: str | os.PathLike[str]) -> Kind:
    """Say what a file seems to be, from its first bytes; nothing is unpickled.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        raise _unreadable(path, error) from None
    if not start:
        return "empty"
    if _is_pickle(start):
        return "pickle"
    if len(start) < 9 or start[8:9] != b"{":
        return "unknown"
    try:
        return "checkpoint" if METADATA_KEY in read_header(path).metadata else "safetensors"
    except CheckpointError:
        return "safetensors"


def _is_pickle(start: bytes) -> bool:
    """Say whether a file begins like ``torch.save``'s: a zip archive, or a bare pickle of protocol 2 to 5."""
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file; the weights are not touched.

    Raises:
        CheckpointError: missing, unreadable, no safetensors file, damaged, or shorter or longer than it says.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            return _parse_header(path, file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; `htsat models` lists the models that can be had by name"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if path.is_dir():
        return CheckpointError(f"{path}: is a folder; give the checkpoint file inside it")
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}; give a file that you may read")


def _parse_header(path: Path, file: BinaryIO, size: int) -> Header:
    start = file.read(9)
    if not start:
        raise CheckpointError(f"{path}: the file is empty; download or save it again")
    if _is_pickle(start):
        raise CheckpointError(
            f"{path}: looks like a PyTorch pickle, not a safetensors checkpoint; "
            f"convert it once with `htsat convert {path.name} {path.stem}.safetensors`"
        )
    if start[:6] == b"<html>" or start[:9].lower() == b"<!doctype":
        raise CheckpointError(f"{path}: is a web page, not a checkpoint; download the file itself")
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{" or length > MAX_HEADER:
        # A cut-off file still begins like one of ours: only these few bytes can be judged.
        raise CheckpointError(
            f"{path}: is not a safetensors checkpoint, or its beginning is damaged; download or save it again"
        )
    text = start[8:] + file.read(length - 1)
    if len(text) < length:
        raise CheckpointError(
            f"{path}: ends inside its header, after {size:,} bytes; the file is cut off, download or save it again"
        )
    damaged = CheckpointError(f"{path}: the safetensors header is damaged; download or save it again")
    try:
        raw = json.loads(text)
        metadata = raw.pop("__metadata__", {})
        shapes = {name: tuple(entry["shape"]) for name, entry in raw.items()}
        dtypes = {name: entry["dtype"] for name, entry in raw.items()}
        ends = [entry["data_offsets"][1] for entry in raw.values()]
        plain = all(type(n) is int and n >= 0 for n in [*ends, *(n for shape in shapes.values() for n in shape)])
        plain &= all(isinstance(v, str) for v in [*metadata.values(), *dtypes.values()])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise damaged from None
    if not plain:
        raise damaged
    expected = 8 + length + max(ends, default=0)
    if size < expected:
        raise CheckpointError(
            f"{path}: holds {size:,} of {expected:,} bytes; the file is cut off, download or save it again"
        )
    if size > expected:
        raise CheckpointError(
            f"{path}: holds {size:,} bytes where its header describes {expected:,}; the file is damaged, "
            "download or save it again"
        )
    return Header(metadata, shapes, dtypes)


def read_config(path: str | os.PathLike[str]) -> CheckpointConfig:
    """Read the configuration of one of our checkpoints, without torch and without the weights.

    Raises:
        CheckpointError: damaged, of another program, of a newer version, or a configuration that is
            malformed or does not fit the weights beside it.
    """
    path = Path(path)
    header = read_header(path)
    config = _config(path, header)
    _check_tensors(path, config, header)
    return config


def _config(path: Path, header: Header) -> CheckpointConfig:
    if METADATA_KEY not in header.metadata:
        raise CheckpointError(
            f"{path}: is a safetensors file of another program (no {METADATA_KEY!r} metadata); if it holds HTS-AT "
            f"weights, convert it once with `htsat convert {path.name} {path.stem}-htsat.safetensors`"
        )
    return config_of_text(path, header.metadata[METADATA_KEY])


def config_of_text(path: Path, text: str) -> CheckpointConfig:
    """Return the configuration that the metadata of a file hold.

    Raises:
        CheckpointError: they are damaged or of a newer version.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: the {METADATA_KEY!r} metadata is damaged; download or save the file again")
    number = values.pop("format", None)
    if type(number) is not int or number < 1:
        raise CheckpointError(
            f"{path}: the checkpoint's format number is {number!r}, expected {FORMAT}; the file is damaged"
        )
    if number > FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {number} is newer than this htsat reads (format {FORMAT}); upgrade htsat"
        )
    try:
        return from_dict(CheckpointConfig, values, "configuration")
    except (ConfigError, ArithmeticError, RecursionError) as error:  # numbers may be too large even to be printed
        raise CheckpointError(f"{path}: {error}; the checkpoint is damaged or was edited by hand") from None


def _names(names: list[str]) -> str:
    """Return up to three names, and how many more there are; names in a file may hold anything."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name if name.isprintable() else repr(name) for name in names[:3]) + more


def _check_tensors(path: Path, config: CheckpointConfig, header: Header) -> None:
    """Refuse a file whose tensors are not exactly those that its configuration demands."""
    expected = tensor_shapes(config)
    advice = "the configuration and the weights are not of one model; save or convert the checkpoint again"
    if missing := [name for name in expected if name not in header.shapes]:
        raise CheckpointError(f"{path}: lacks {len(missing)} of {len(expected)} tensors: {_names(missing)}; {advice}")
    if unexpected := [name for name in header.shapes if name not in expected]:
        raise CheckpointError(
            f"{path}: holds {len(unexpected)} tensors its model has not: {_names(unexpected)}; {advice}"
        )
    for name, shape in expected.items():
        if header.shapes[name] != shape:
            what = "labels do not fit the weights: " if name.startswith(("token_semantic", "head")) else ""
            raise CheckpointError(
                f"{path}: {what}tensor {name} has shape {list(header.shapes[name])} where the configuration "
                f"demands {list(shape)}; {advice}"
            )
        allowed = ("I64",) if name.endswith("num_batches_tracked") else _FLOATS
        if header.dtypes[name] not in allowed:
            raise CheckpointError(
                f"{path}: tensor {name} is stored as {header.dtypes[name]}, expected {' or '.join(allowed)}; "
                "save or convert the checkpoint again"
            )
    if config.model.architecture != "htsat":
        return
    side, window = config.model.image_size // config.model.patch_size, config.model.window_size
    if side * side * window * window > MAX_MASK:
        raise CheckpointError(
            f"{path}: image_size {config.model.image_size} with patch_size {config.model.patch_size} and window_size "
            f"{window} asks for attention masks beyond {MAX_MASK * 4 >> 20} MB; "
            "the checkpoint is damaged or was edited by hand"
        )


def load_checkpoint(path: str | os.PathLike[str]) -> "tuple[SoundModel, CheckpointConfig]":
    """Rebuild a model from one of our checkpoints.

    Returns:
        The model on the CPU in eval mode, float32 whatever type is stored, and its configuration.

    Raises:
        CheckpointError: see ``read_config``; also if the weights hold NaN or infinite values.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    config = read_config(path)
    try:
        stored = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; download or save it again") from None
    weights = {}
    for name in list(stored):
        tensor = stored.pop(name)
        if tensor.is_floating_point():
            # A copy: the tensors of load_file are views of the mapped file, which may change under a running model.
            tensor = tensor.to(torch.float32, copy=True)
            if not math.isfinite(tensor.sum().item()):
                raise CheckpointError(
                    f"{path}: tensor {name} holds NaN or infinite values; the training that made it diverged"
                )
        weights[name] = tensor
    model = build(config)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval(), config


def build(config: CheckpointConfig) -> "SoundModel":
    """Return a model whose weights have shapes but no values yet: ``load_state_dict(..., assign=True)`` brings them.

    Drawing random values for 31 million weights, only to overwrite them, would take longer than reading a file.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    from htsat.model.architectures import build_model

    class WeightsOnMeta(TorchFunctionMode):
        """Create what ``torch.empty`` creates, which is the layers' weights, without storage.

        Constants (position indices, masks, mel filters) are made by other functions and so stay real; a model
        built on the meta device as a whole would lack them. Holds for this thread only.
        """

        def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Any,
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:
            kwargs = dict(kwargs or {})
            if func is torch.empty:
                kwargs["device"] = "meta"
            return func(*args, **kwargs)

    with WeightsOnMeta():
        return build_model(config.frontend, config.model)


# ---------------------------------------------------------------- writing


def save_checkpoint(
    path: str | os.PathLike[str], model: "SoundModel", config: CheckpointConfig, dtype: StorageType = "float32"
) -> None:
    """Write a checkpoint: the old file at ``path``, if any, stays whole until the new one is.

    Args:
        path: the file, by custom ending in ``.safetensors``; its folder must exist.
        model: on any device.
        config: must describe ``model``.
        dtype: how weight matrices are stored. Vectors (norms, biases, running statistics) stay float32: they
            are 0.2 % of the bytes, and the statistics span a range that half precision represents badly.

    Raises:
        ConfigError: ``config`` does not describe ``model``.
        OutputError: the file cannot be written, or the weights are not finite in ``dtype``.
        UsageError: unknown ``dtype``.
    """
    import torch
    from safetensors.torch import save

    path = Path(path)
    types: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in types:
        raise UsageError(f"{path}: dtype must be one of {', '.join(types)}, got {dtype!r}")
    weights = model.state_dict()
    expected = tensor_shapes(config)
    if (model.config, model.frontend_config) != (config.model, config.frontend) or {
        name: tuple(tensor.shape) for name, tensor in weights.items()
    } != expected:
        raise ConfigError(
            f"{path}: the configuration does not describe the model; pass the one the model was built with"
        )
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            stored = tensor.detach().to("cpu", types[dtype] if tensor.ndim > 1 else torch.float32).contiguous()
            if not math.isfinite(stored.float().sum().item()):
                raise OutputError(
                    f"{path}: not written: tensor {name} holds NaN, infinite or, as {dtype}, too large values; "
                    "look for a diverged training, or store float32"
                )
            weights[name] = stored
        else:
            weights[name] = tensor.detach().cpu()
    text = json.dumps({"format": FORMAT, **to_dict(config)}, ensure_ascii=False, allow_nan=False)
    # "format": "pt" is what other safetensors readers expect of torch weights.
    write_atomic(path, save(weights, {"format": "pt", METADATA_KEY: text}))


def with_config(source: str | os.PathLike[str], target: str | os.PathLike[str], config: CheckpointConfig) -> None:
    """Write a checkpoint with the weights of another, byte for byte, and a configuration of its own.

    Args:
        source: one of our checkpoints.
        target: the file to write; may be ``source`` itself.
        config: must demand exactly the tensors that ``source`` holds.

    Raises:
        CheckpointError: ``source`` cannot be read, or ``config`` does not fit its weights.
        OutputError: ``target`` cannot be written.
    """
    source = Path(source)
    _check_tensors(source, config, read_header(source))
    try:
        content = source.read_bytes()
    except OSError as error:
        raise _unreadable(source, error) from None
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    text = json.dumps({"format": FORMAT, **to_dict(config)}, ensure_ascii=False, allow_nan=False)
    entries["__metadata__"] = {**entries.get("__metadata__", {}), METADATA_KEY: text}
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    # The tensors begin at a multiple of eight bytes, as safetensors writes them.
    header += b" " * (-len(header) % 8)
    write_atomic(target, len(header).to_bytes(8, "little") + header + content[end:])
