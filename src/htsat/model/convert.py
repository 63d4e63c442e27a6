"""Published weights in, our model out: every tensor accounted for, nothing executed.

Readable are

- checkpoints of the published code (PyTorch Lightning, names behind ``sed_model.``, or a bare state dict);
- LAION-CLAP's ``.pt`` files (the audio tower, behind ``audio_branch.``);
- Hugging Face's CLAP (``model.safetensors`` or ``pytorch_model.bin``, behind ``audio_model.audio_encoder.``);
- ImageNet weights of Swin (``swin_tiny_c24_patch4_window8_256.pth``), as the start of a training;
- CNN14 of PANNs (``Cnn14_DecisionLevelMax.pth`` and its kin), the baseline of the paper.

Each is brought to the published names first, and from there to ours. The architecture follows from the
shapes, the front end from the mel filters that published checkpoints carry. Pickles are read by
``torch.load(weights_only=True)`` alone, which runs no code of the file.
"""

import contextlib
import os
import pickle
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import numpy as np

from htsat.audio.mel import mel_filterbank
from htsat.config import CheckpointConfig, FrontendConfig, ModelConfig
from htsat.errors import CheckpointError, ConfigError
from htsat.labels import LABEL_SETS, label_set, resolve_labels
from htsat.model.checkpoint import build, read_header, sniff, tensor_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from htsat.model.base import SoundModel

T = TypeVar("T")

Layout = Literal["published", "laion-clap", "hf-clap", "imagenet-swin", "panns"]
Decision = Literal["max", "clip"]
Objective = Literal["multi_label", "single_label"]
MelScale = Literal["slaney", "htk"]

#: sample rates of published front ends (Hz), tried against the mel filters in a checkpoint
_SAMPLE_RATES = (32000, 16000, 48000, 44100, 22050, 24000, 8000)
#: outputs -> label set of the published checkpoints with that many
_LABELS_BY_COUNT = {527: "audioset", 50: "esc50", 35: "speech_commands_v2"}
#: label sets of which a clip has exactly one; the published recipes train them with cross-entropy
_SINGLE_LABEL = ("esc50", "esc10", "speech_commands_v2")

_CONSTANT = "constant, rebuilt from the configuration"
_FUSION = "feature fusion, which acts on inputs longer than one chunk only"
_UNUSED_HEAD = "classifier that the published network stores and never uses"
_UNTRAINED_HEAD = "CLAP trains the encoder alone: these classes no longer fit it"
_OTHER_PART = "not of the audio encoder"
_IMAGE_HEAD = "classifier of images"
_UNUSED_NORM = "batch norm that the published network stores and never uses"

# Hugging Face's names -> published names; query, key and value are joined separately.
_HF_RENAMES = (
    (r"^batch_norm\.", "bn0."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
# PANNs' names -> ours, but for the numbers of the blocks.
_PANNS_RENAMES = (
    (r"^bn0\.", "mel_norm."),
    (r"\.bn([12])\.", r".norm\1."),
    (r"^fc_audioset\.", "head."),
    (r"^att_block\.cla\.", "head."),
    (r"^att_block\.att\.", "head_attention."),
)
# Published names -> ours.
_RENAMES = (
    (r"^bn0\.", "mel_norm."),
    (r"^layers\.", "stages."),
    (r"\.downsample\.", ".merge."),
    (r"^tscam_conv\.", "token_semantic."),
)


@dataclass(frozen=True)
class ConversionReport:
    """What became of every tensor of a source.

    Attributes:
        source: the file.
        layout: which of the known layouts it has.
        loaded: our names of the tensors that were taken.
        missing: our names of tensors that the source lacks.
        unexpected: names in the source that no part of the network has.
        mismatched: "name: shape in the source, shape expected".
        set_aside: name in the source -> why it is not needed.
        notes: what was assumed, for people.
    """

    source: str
    layout: Layout
    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    set_aside: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """Return the report as a few lines of text."""
        lines = [f"{self.source}: {self.layout} layout, {len(self.loaded)} tensors loaded"]
        lines += [f"  set aside {count}: {reason}" for reason, count in Counter(self.set_aside.values()).items()]
        for title in ("missing", "unexpected", "mismatched"):
            if names := getattr(self, title):
                lines.append(f"  {title} {len(names)}: {_some(names)}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def _some(names: Sequence[str]) -> str:
    """Return the first few names and how many more there are; names in a file may hold anything."""
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def convert(
    source: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | Sequence[str] | None = None,
    sample_rate: int | None = None,
    hop_length: int | None = None,
    f_min: float | None = None,
    f_max: float | None = None,
    mel_scale: MelScale | None = None,
    objective: Objective | None = None,
    decision: Decision | None = None,
) -> "tuple[SoundModel, CheckpointConfig, ConversionReport]":
    """Read published weights.

    Args:
        source: the file, or a folder with a ``model.safetensors`` or ``pytorch_model.bin`` in it.
        labels: a label set's name, a file of labels or the labels. Default: AudioSet for 527 outputs, ESC-50 for 50,
            Speech Commands for 35 (alphabetical; published checkpoints of it may have any order of classes).
        sample_rate: Hz. Default: what the mel filters in the source say; 48000 for CLAP.
        hop_length: samples. Default: a hundredth of a second, as all published front ends have.
        f_min: Hz. Default 50.
        f_max: Hz. Default 14000.
        mel_scale: default ``slaney``, or ``htk`` for fused CLAP towers.
        objective: default ``single_label`` for ESC-50 and Speech Commands labels, else ``multi_label``.
        decision: how a CNN14 decides on a clip, which does not show in its weights (those with attention aside).
            Default: ``max`` if the file's name has "DecisionLevel" in it, else ``clip``.

    Returns:
        The model (CPU, eval mode, float32), its configuration, and what became of each tensor.
        CLAP towers and image weights become encoders without classes. The class layer that LAION's files store
        beside a CLAP tower is set aside: contrastive training moved the encoder away from under it.

    Raises:
        CheckpointError: not readable without running code, no HTS-AT, a tensor missing, left over or of another
            shape, or settings or labels that are needed or do not fit.
        DataError: ``labels`` cannot be read.
    """
    path = _file(Path(source))
    state, layout, set_aside, notes = _published(path, _read(path))
    fused = _FUSION in set_aside.values()
    model = _cnn14(path, state, decision, notes) if layout == "panns" else _architecture(path, state, layout)
    _set_aside_heads(state, layout, model, set_aside)
    # Fused CLAP towers were trained on torchaudio's filters, the others on the published ones, whatever is stored.
    given = _Given(sample_rate, hop_length, f_min, f_max, mel_scale or ("htk" if fused else None))
    frontend = _frontend(path, state, layout, given, notes)
    _set_aside_constants(state, set_aside)

    named, chosen = _labels(path, labels, model.num_classes, notes)
    if objective is None:
        objective = "single_label" if chosen in _SINGLE_LABEL else "multi_label"
    model = _config(path, lambda: _with_chunk(model, frontend, notes))
    config = _config(
        path,
        lambda: CheckpointConfig(
            frontend, model, labels=named, objective=objective, provenance={"source": path.name, "layout": layout}
        ),
    )

    weights, report = _match(path, state, layout, tensor_shapes(config), set_aside, notes)
    if layout == "imagenet-swin":
        weights |= _initial_norm(frontend.n_mels)
    _refuse_gaps(path, report)
    network = build(config)
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval(), config, report


def _with_chunk(model: ModelConfig, frontend: FrontendConfig, notes: list[str]) -> ModelConfig:
    """Return the architecture with chunks of the length that its frames ask for."""
    if model.architecture == "cnn14":
        seconds = 1024 * frontend.hop_length / frontend.sample_rate
        notes.append(
            f"chunks last {seconds:g} s, 32 time steps of 32 frames as they are; published figures are of clips heard "
            "without silence behind them: htsat evaluate --fit stretch, which stretches nothing here"
        )
        return replace(model, chunk_seconds=seconds)
    frames = model.image_size * (model.image_size // frontend.n_mels)
    if 10 * frontend.sample_rate // frontend.hop_length + 1 <= frames:
        return model
    seconds = (frames - 1) * frontend.hop_length / frontend.sample_rate
    notes.append(f"chunks last {seconds:.2f} s: ten seconds have more frames than the square holds")
    return replace(model, chunk_seconds=seconds)


def imagenet_start(model: "SoundModel", path: str | os.PathLike[str]) -> ConversionReport:
    """Load ImageNet weights of Swin into a model that is about to be trained.

    The patch projection is averaged over the colours, as upstream ``main.py`` does it; the normalisation of mel bins
    and the head keep their values, the classifier of images is dropped. The paper starts its AudioSet runs from
    ``swin_tiny_c24_patch4_window8_256.pth``.

    Returns:
        The report; ``missing`` names what kept its values.

    Raises:
        CheckpointError: not Swin weights of the model's size, or not readable without running code.
    """
    import torch

    path = _file(Path(path))
    state, layout, set_aside, notes = _published(path, _read(path))
    if layout != "imagenet-swin":
        raise CheckpointError(
            f"{path}: has the {layout} layout, expected ImageNet weights of Swin (three input colours); "
            "convert it with `htsat convert` and start from the checkpoint instead"
        )
    _set_aside_heads(state, layout, model.config, set_aside)
    _set_aside_constants(state, set_aside)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights, report = _match(path, state, layout, own, set_aside, notes)
    _refuse_gaps(path, report)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in weights:
                tensor.copy_(weights[name])
    return report


def _own_to_audio(name: str) -> bool:
    """Say whether our tensor has no counterpart in an image model."""
    return name.startswith(("mel_norm.", "token_semantic.", "head."))


# ---------------------------------------------------------------- files


def _file(path: Path) -> Path:
    """Return the file of weights: ``path``, or the one inside the folder ``path``."""
    if not path.is_dir():
        return path
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(
        f"{path}: is a folder without model.safetensors or pytorch_model.bin; give the file of weights"
    )


def _read(path: Path) -> "dict[str, Tensor]":
    """Return the tensors of a file by the names they have there."""
    kind = sniff(path)
    if kind == "checkpoint":
        raise CheckpointError(f"{path}: is an htsat checkpoint already; use it as it is")
    if kind == "safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        read_header(path)
        try:
            return dict(load_file(path))
        except (SafetensorError, ValueError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}; download it again") from None
    if kind == "pickle":
        return _tensors(path, _unpickle(path))
    if kind == "missing":
        raise CheckpointError(f"{path}: no such file; give the path of the published weights")
    if kind == "empty":
        raise CheckpointError(f"{path}: the file is empty; download it again")
    raise CheckpointError(
        f"{path}: neither a PyTorch nor a safetensors file; if it was downloaded, it may be a web page or damaged: "
        "download it again"
    )


class _Inert:
    """Takes the place of a class that weights do not need: accepts whatever a pickle builds from it, does nothing."""

    def __new__(cls, *args: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _InertDict(_Inert):
    """The same for mappings: torch's restricted reader fills plain and ordered dictionaries only."""

    def __new__(cls, *args: Any) -> "_InertDict":
        return OrderedDict()  # type: ignore[return-value]


# What training frameworks leave beside the weights: numbers, paths, settings, names of callbacks. A stand-in is put
# in their place and the real class is never imported, so that nothing listed here can run either.
_HARMLESS = re.compile(
    r"(numpy|argparse|pathlib|omegaconf|pytorch_lightning|lightning|lightning_fabric|lightning_utilities|torchmetrics)\."
    r"|builtins\.(bool|bytes|complex|dict|float|frozenset|int|list|object|range|set|slice|str|tuple)$"
    r"|collections\.(defaultdict|deque)$|torch\.optim\.|torch\.(device|Size|Generator)$"
)
_standing_in = threading.Lock()


@contextlib.contextmanager
def _stand_ins(path: Path) -> Iterator[None]:
    """Let the restricted reader pass over harmless classes of a zip pickle; refuse a pickle that names any other."""
    import torch

    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except ValueError:
        # Before PyTorch 1.6 a file was no archive: nothing to look up, and what the reader does not know it refuses.
        names = []
    if foreign := [name for name in names if not _HARMLESS.match(name)]:
        raise CheckpointError(
            f"{path}: not loaded: this pickle asks for {_some(foreign)}, which could run code, and nothing of it was "
            "run; if you trust its origin, save its state_dict alone with PyTorch and convert that"
        )
    pairs: list[Any] = [(_InertDict if re.search(r"[Dd]ict", name) else _Inert, name) for name in names]
    with _standing_in, torch.serialization.safe_globals(pairs):
        yield


def _unpickle(path: Path) -> Any:
    """Return what a ``torch.save`` file holds, through the reader that runs no code."""
    import warnings

    import torch

    with open(path, "rb") as file:
        archive = file.read(4) == b"PK\x03\x04"
    try:
        with _stand_ins(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and typed storage: of no use to the reader
            # Mapped: of a CLAP file with optimizer states, only the audio tower is ever read from disk.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"it asks for {match[1]}, which could run code"
        raise CheckpointError(
            f"{path}: not loaded: this pickle holds more than weights ({reason}), and nothing of it was run; "
            "if you trust its origin, save its state_dict alone with PyTorch and convert that"
        ) from None
    except (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError) as error:
        raise _damaged(path, error) from None
    except (RuntimeError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"{path}: damaged or no PyTorch file ({reason}); download it again")


def _tensors(path: Path, content: Any) -> "dict[str, Tensor]":
    """Find the state dict in what a training framework saved."""
    import torch

    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no tensors by name, expected a state dict; convert the file of weights itself"
        )
    return tensors


# ---------------------------------------------------------------- names


def _published(
    path: Path, tensors: "dict[str, Tensor]"
) -> "tuple[dict[str, Tensor], Layout, dict[str, str], list[str]]":
    """Bring tensors to the published names: ``(state, layout, set aside, notes)``."""
    import torch

    anchor = "patch_embed.proj.weight"
    prefixes = [name.removesuffix(anchor) for name in tensors if name == anchor or name.endswith("." + anchor)]
    if not prefixes and "conv_block1.conv1.weight" in tensors:
        return _from_panns(tensors)
    if len(prefixes) != 1:
        found = f"holds {len(prefixes)} networks" if prefixes else "holds no HTS-AT"
        advice = "convert weights of HTS-AT, CLAP's HTS-AT tower, Swin or CNN14"
        if prefixes:
            advice = "convert one of them alone"
        raise CheckpointError(f"{path}: {found} ({len(tensors)} tensors, {_some(sorted(tensors))}); {advice}")
    prefix = prefixes[0]
    state: dict[str, Tensor] = {}
    set_aside: dict[str, str] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix):
            set_aside[name] = _OTHER_PART
        elif re.match(r"(patch_embed\.)?(fusion_model|mel_conv[12]d)\.", inner):
            set_aside[name] = _FUSION
        else:
            state[inner] = tensor

    layout: Layout = "published"
    if any(".attention.self." in name for name in state):
        layout = "hf-clap"
        state = _from_hf(state)
    elif state[anchor].ndim == 4 and state[anchor].shape[1] == 3:
        layout = "imagenet-swin"
        state[anchor] = state[anchor].mean(1, keepdim=True)
    elif "audio_branch" in prefix:
        layout = "laion-clap"
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            state[name] = tensor.float()
    return state, layout, set_aside, []


def _from_panns(
    tensors: "dict[str, Tensor]",
) -> "tuple[dict[str, Tensor], Layout, dict[str, str], list[str]]":
    """Bring PANNs' names to ours; see ``_published``."""
    state: dict[str, Tensor] = {}
    set_aside: dict[str, str] = {}
    for name, tensor in tensors.items():
        own = re.sub(r"^conv_block([1-9])\.", lambda match: f"blocks.{int(match[1]) - 1}.", name)
        for pattern, replacement in _PANNS_RENAMES:
            own = re.sub(pattern, replacement, own)
        if name.startswith("att_block.bn_att."):
            set_aside[name] = _UNUSED_NORM
        elif own.startswith("head") and tensor.ndim == 3 and tensor.shape[2] == 1:
            state[own] = tensor.squeeze(2).float()  # a convolution of one step is a linear layer
        else:
            state[own] = tensor.float() if tensor.is_floating_point() else tensor
    return state, "panns", set_aside, []


def _from_hf(state: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Rename Hugging Face's tensors and join each query, key and value, which the published code keeps as one."""
    import torch

    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in _HF_RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(part in renamed and renamed[part].shape[1:] == renamed[name].shape[1:] for part in parts):
            renamed[name.replace(".query.", ".qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def _set_aside_heads(state: "dict[str, Tensor]", layout: Layout, model: ModelConfig, set_aside: dict[str, str]) -> None:
    """Take classifiers that our network has no use for out of ``state``."""
    for name in list(state):
        reason = None
        if layout == "imagenet-swin" and name.startswith("head."):
            reason = _IMAGE_HEAD
        elif layout in ("laion-clap", "hf-clap") and name.startswith(("head.", "tscam_conv.")):
            reason = _UNTRAINED_HEAD
        elif layout == "published" and model.token_semantic and name.startswith("head."):
            reason = _UNUSED_HEAD
        if reason:
            set_aside[name] = reason
            del state[name]


def _set_aside_constants(state: "dict[str, Tensor]", set_aside: dict[str, str]) -> None:
    for name in list(state):
        if name.startswith(("spectrogram_extractor.", "logmel_extractor.")) or name.endswith(
            ("relative_position_index", "attn_mask")
        ):
            set_aside[name] = _CONSTANT
            del state[name]


def _match(
    path: Path,
    state: "dict[str, Tensor]",
    layout: Layout,
    expected: Mapping[str, tuple[int, ...]],
    set_aside: Mapping[str, str],
    notes: Sequence[str],
) -> "tuple[dict[str, Tensor], ConversionReport]":
    """Rename published tensors to ours and compare them with what our network has."""
    import torch

    weights: dict[str, Tensor] = {}
    unexpected, mismatched = [], {}
    for name, tensor in state.items():
        own = name
        for pattern, replacement in _RENAMES:
            own = re.sub(pattern, replacement, own)
        if own == "patch_embed.proj.weight":
            tensor = tensor.flatten(1)  # a convolution whose stride is its kernel is a linear map of patches
        if own not in expected:
            unexpected.append(name)
        elif tuple(tensor.shape) != expected[own]:
            mismatched[own] = f"{name}: {list(tensor.shape)}, expected {list(expected[own])}"
        else:
            # A copy, so that the model keeps no mapped file alive.
            weights[own] = tensor.clone(memory_format=torch.contiguous_format)
    for name in expected:
        norm, is_count, _ = name.partition(".num_batches_tracked")
        if is_count and f"{norm}.running_var" in weights:
            # A count of training steps, which old files lack and nothing here reads.
            weights.setdefault(name, torch.tensor(0))
    report = ConversionReport(
        str(path),
        layout,
        loaded=tuple(weights),
        missing=tuple(name for name in expected if name not in weights and name not in mismatched),
        unexpected=tuple(unexpected),
        mismatched=tuple(mismatched.values()),
        set_aside=dict(set_aside),
        notes=tuple(notes),
    )
    return weights, report


def _refuse_gaps(path: Path, report: ConversionReport) -> None:
    """Never load in part: raise if anything is missing, left over or of another shape.

    An image model lacks what only an audio model has; its report names that as missing, and it is no error.
    """
    missing = [name for name in report.missing if report.layout != "imagenet-swin" or not _own_to_audio(name)]
    problems = [
        f"{len(names)} {title}: {_some(names)}"
        for title, names in (
            ("missing", missing),
            ("of another shape", report.mismatched),
            ("unknown", report.unexpected),
        )
        if names
    ]
    if problems:
        what = "a CNN14" if report.layout == "panns" else "an HTS-AT"
        raise CheckpointError(
            f"{path}: these weights are not of {what} that htsat can rebuild ({'; '.join(problems)}); "
            "nothing was loaded"
        )


def _initial_norm(n_mels: int) -> "dict[str, Tensor]":
    """Return the state of an untrained normalisation of mel bins, which image weights lack."""
    import torch

    return {
        "mel_norm.weight": torch.ones(n_mels),
        "mel_norm.bias": torch.zeros(n_mels),
        "mel_norm.running_mean": torch.zeros(n_mels),
        "mel_norm.running_var": torch.ones(n_mels),
        "mel_norm.num_batches_tracked": torch.tensor(0),
    }


# ---------------------------------------------------------------- configuration


def _config(path: Path, make: Callable[[], T]) -> T:
    """Return what ``make`` builds, its ConfigError as a CheckpointError about ``path``."""
    try:
        return make()
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; these weights make no network that htsat can rebuild") from None


def _architecture(path: Path, state: "Mapping[str, Tensor]", layout: Layout) -> ModelConfig:
    """Infer the architecture from the shapes of published tensors."""

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in state or state[name].ndim != ndim or 0 in state[name].shape:
            got = f"has shape {list(state[name].shape)}" if name in state else "is missing"
            raise CheckpointError(
                f"{path}: tensor {name} {got}, expected {ndim} axes; the file is damaged or no HTS-AT"
            )
        return tuple(state[name].shape)

    width, channels, patch, across = shape("patch_embed.proj.weight", 4)
    if channels != 1 or patch != across:
        raise CheckpointError(
            f"{path}: patches of {channels} x {patch} x {across} cells are not supported, expected one channel and "
            "a square; CLAP towers with channel-map fusion cannot be converted"
        )
    first_norm = re.compile(r"layers\.(\d+)\.blocks\.\d+\.norm1\.weight$")
    blocks = Counter(int(match[1]) for name in state if (match := first_norm.match(name)))
    if not blocks or sorted(blocks) != list(range(len(blocks))):
        raise CheckpointError(
            f"{path}: holds no stages of blocks (layers.0.blocks.0...); the file is damaged or no HTS-AT"
        )
    tables = [shape(f"layers.{i}.blocks.0.attn.relative_position_bias_table", 2) for i in range(len(blocks))]
    window = (round(tables[0][0] ** 0.5) + 1) // 2

    # The side of the square shows only in the masks of shifted windows; all published models have 256.
    image = 256
    mask = state.get("layers.0.blocks.1.attn_mask")
    if mask is not None and mask.ndim == 3:
        image = round(mask.shape[0] ** 0.5) * window * patch

    num_classes, token_semantic = 0, True
    if layout == "published":
        if "tscam_conv.weight" in state:
            num_classes = shape("tscam_conv.weight", 4)[0]
        elif "head.weight" in state:
            num_classes, token_semantic = shape("head.weight", 2)[0], False
    return _config(
        path,
        lambda: ModelConfig(
            num_classes=num_classes,
            embed_dim=width,
            depths=tuple(blocks[i] for i in range(len(blocks))),
            num_heads=tuple(heads for _, heads in tables),
            window_size=window,
            patch_size=patch,
            image_size=image,
            mlp_ratio=shape("layers.0.blocks.0.mlp.fc1.weight", 2)[0] / width,
            token_semantic=token_semantic,
        ),
    )


def _cnn14(path: Path, state: "Mapping[str, Tensor]", decision: Decision | None, notes: list[str]) -> ModelConfig:
    """Infer the architecture of a CNN14 from its tensors, by our names."""
    width, head = state["blocks.0.conv1.weight"].shape[0], state.get("head.weight")
    if "head_attention.weight" in state:
        how: Literal["max", "att", "clip"] = "att"
    else:
        how = decision or ("max" if "decisionlevel" in path.name.lower() else "clip")
        why = "as given" if decision else "by the name of the file"
        notes.append(
            f"decision {how!r} {why}; Cnn14 ('clip') and Cnn14_DecisionLevelMax ('max') store the same tensors"
        )
    return _config(
        path,
        lambda: ModelConfig(
            num_classes=0 if head is None else head.shape[0], architecture="cnn14", cnn_width=width, decision=how
        ),
    )


@dataclass(frozen=True)
class _Given:
    """Front-end settings that the caller insists on; None: infer."""

    sample_rate: int | None
    hop_length: int | None
    f_min: float | None
    f_max: float | None
    mel_scale: MelScale | None


def _frontend(
    path: Path, state: "Mapping[str, Tensor]", layout: Layout, given: _Given, notes: list[str]
) -> FrontendConfig:
    """Infer the front end: from what the caller gives, the mel filters in the source, or its layout."""
    norm = state.get("mel_norm.weight" if layout == "panns" else "bn0.weight")
    n_mels = 64 if layout == "imagenet-swin" else 0 if norm is None else norm.shape[0]
    window = state.get("spectrogram_extractor.stft.conv_real.weight")
    n_fft = window.shape[-1] if window is not None else 1024

    def config(sample_rate: int) -> FrontendConfig:
        return FrontendConfig(
            sample_rate=sample_rate,
            n_fft=n_fft,
            hop_length=given.hop_length or sample_rate // 100,
            n_mels=n_mels,
            f_min=50.0 if given.f_min is None else given.f_min,
            f_max=14000.0 if given.f_max is None else given.f_max,
            mel_scale=given.mel_scale or "slaney",
        )

    filters = state.get("logmel_extractor.melW")
    told = None
    if filters is not None and n_fft >= 16 and tuple(filters.shape) == (n_fft // 2 + 1, n_mels):
        told = _rate_of_filters(filters.numpy(), n_fft, given)
    sample_rate = given.sample_rate or told
    if sample_rate is None and layout in ("hf-clap", "laion-clap"):
        sample_rate = 48000
    if sample_rate is None and layout == "imagenet-swin":
        sample_rate = 32000
    if sample_rate is None:
        what = "mel filters of no published front end" if filters is not None else "no mel filters"
        raise CheckpointError(
            f"{path}: holds {what}, so its sample rate is unknown; give --sample-rate (published: 32000 for AudioSet "
            "and ESC-50, 16000 for Speech Commands, 48000 for CLAP)"
        )
    if given.sample_rate and told and given.sample_rate != told:
        notes.append(f"sample rate {given.sample_rate} Hz as given, though the source's mel filters are for {told} Hz")
    if layout == "imagenet-swin":
        notes.append(f"front end at {sample_rate} Hz by default; the normalisation of mel bins is untrained")
    return _config(path, lambda: config(sample_rate))


def _rate_of_filters(filters: "np.ndarray[Any, Any]", n_fft: int, given: _Given) -> int | None:
    """Return the sample rate (Hz) for which ``filters`` are the Slaney filters of published front ends, or None."""
    for rate in _SAMPLE_RATES:
        f_min, f_max = 50.0 if given.f_min is None else given.f_min, given.f_max or 14000.0
        if f_max > rate or f_min >= f_max:
            continue
        expected = mel_filterbank(
            FrontendConfig(rate, n_fft, hop_length=1, n_mels=filters.shape[1], f_min=f_min, f_max=f_max)
        )
        if np.allclose(filters, expected, rtol=1e-3, atol=1e-6):
            return rate
    return None


def _labels(
    path: Path, labels: str | os.PathLike[str] | Sequence[str] | None, num_classes: int, notes: list[str]
) -> tuple[tuple[str, ...], str | None]:
    """Return one label per output, and the name of their label set if it is a known one."""
    if labels is None:
        if num_classes == 0:
            return (), None
        name = _LABELS_BY_COUNT.get(num_classes)
        if name is None:
            raise CheckpointError(
                f"{path}: has {num_classes} outputs, which is no published label set; give --labels with a file of "
                f"{num_classes} labels, one a line, in the order of the outputs"
            )
        notes.append(f"labels: {name}, by the number of outputs")
        if name == "speech_commands_v2":
            notes.append("published code numbers these classes in the order of a folder listing: check a recording")
        return label_set(name), name
    named = resolve_labels(labels)
    if len(named) != num_classes:
        raise CheckpointError(
            f"{path}: has {num_classes} outputs, but {len(named)} labels were given; give one label per output"
            if num_classes
            else f"{path}: is an encoder without classes, but {len(named)} labels were given; leave them out"
        )
    return named, next((name for name in LABEL_SETS if label_set(name) == named), None)
