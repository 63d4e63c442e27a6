"""The networks whose weights several candidates share, and what they say in double precision."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from htsat.apps.bench.measure import BenchError
from htsat.config import CheckpointConfig, FrontendConfig, ModelConfig
from htsat.hearing import sigmoid

if TYPE_CHECKING:
    from htsat.model.base import SoundModel

Array = NDArray[np.float32]

#: name of the network of published size with random weights
FULL = "full"
#: different clips that posteriors are compared on
CLIPS = 2
#: largest difference of a float32 posterior from double precision, unless PyTorch's own is more than half of it
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Sources:
    """The files of a network before it is prepared.

    Attributes:
        name: of the network.
        checkpoint: None: it has random weights, or is exported alone.
        export: None: there is none yet.
    """

    name: str
    checkpoint: Path | None
    export: Path | None


@dataclass(frozen=True)
class Subject:
    """A network that is ready to be measured.

    Attributes:
        name: of the network.
        checkpoint: for PyTorch; None if it is exported alone.
        export: for the other runtimes; None if none of them is to be measured.
        reference: file with the clips and the exact posteriors.
        tolerance: largest difference from these that counts as rounding in float32.
        seconds: of a clip.
        parameters: learned numbers; None if only the exported file is there.
        flops: of one clip; None if unknown.
        plain_size: parameters and operations of the plainly written network; None if it is not to be measured.
    """

    name: str
    checkpoint: Path | None
    export: Path | None
    reference: Path
    tolerance: float
    seconds: float
    parameters: int
    flops: int | None
    plain_size: tuple[int, int] | None


def full_config(classes: int = 527) -> CheckpointConfig:
    """Return the configuration of the network of published size."""
    return CheckpointConfig(
        FrontendConfig(), ModelConfig(num_classes=classes), labels=tuple(str(i) for i in range(classes))
    )


def randomised(config: CheckpointConfig, seed: int = 0) -> "SoundModel":
    """Return a network with random weights.

    They are not as small as at the start of training: posteriors that are all 0.5 would agree whatever is computed.
    """
    import torch

    from htsat.model.architectures import build_model

    torch.manual_seed(seed)
    model = build_model(config.frontend, config.model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("relative_position_bias_table"):
                parameter.normal_(std=0.5)
            elif parameter.ndim >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.mel_norm.running_mean.fill_(-20.0)  # type: ignore[union-attr]
        model.mel_norm.running_var.fill_(100.0)  # type: ignore[union-attr]
    return model


def prepare(
    sources: Sources, folder: Path, wants_export: bool, wants_plain: bool, config: CheckpointConfig | None = None
) -> Subject:
    """Make the files of a network and the posteriors that all who run it must agree on.

    Args:
        sources: what there is.
        folder: for what is made.
        wants_export: export it if it is not.
        wants_plain: count the operations of the plainly written network, too.
        config: of the random network, where ``sources`` name no file.

    Raises:
        CheckpointError: a file cannot be used.
        OutputError: it cannot be exported.
    """
    if sources.checkpoint is None and sources.export is not None:
        return _exported_alone(sources, sources.export, folder)
    import torch

    from htsat.apps.bench.baselines import size
    from htsat.apps.bench.plain import plain_port_of
    from htsat.model.checkpoint import load_checkpoint, save_checkpoint
    from htsat.model.export import both_precisions, export_onnx

    path, export = sources.checkpoint, sources.export
    if path is None:
        config = config or full_config()
        model, path = randomised(config), folder / f"{sources.name}.safetensors"
        save_checkpoint(path, model, config)
    else:
        model, config = load_checkpoint(path)
    chunks = clips(config)
    one = torch.from_numpy(chunks[:1])
    # First of all: what is kept while nothing needs gradients cannot take part in what does.
    parameters, flops = size(model, one, train_path=True)
    plain_size = size(plain_port_of(model), one) if wants_plain else None
    if wants_export and export is None:
        export = folder / f"{sources.name}.onnx"
        export_onnx(model, config, export)
    single, double = both_precisions(model, chunks)
    tolerance = max(TOLERANCE, 2 * difference(single, double))
    return Subject(
        sources.name,
        path,
        export,
        _written(folder, sources.name, chunks, double),
        tolerance,
        config.heard_samples / config.frontend.sample_rate,
        parameters,
        flops,
        plain_size,
    )


def _exported_alone(sources: Sources, export: Path, folder: Path) -> Subject:
    """Prepare an exported file: what ONNX Runtime says in float32 stands for what is exact."""
    from htsat.backends import open_model
    from htsat.model.checkpoint import count_parameters

    runner = open_model(export, backend="onnxruntime", threads=1)
    chunks = clips(runner.config)
    exact = [sigmoid(logits).astype(np.float64) for logits in runner.backend(chunks)[:2]]
    seconds = runner.config.heard_samples / runner.config.frontend.sample_rate
    reference = _written(folder, sources.name, chunks, exact)
    return Subject(
        sources.name, None, export, reference, 2 * TOLERANCE, seconds, count_parameters(runner.config), None, None
    )


def clips(config: CheckpointConfig) -> Array:
    """Return what posteriors are compared on: noise, and a tone that stops above faint noise."""
    rate, samples = config.frontend.sample_rate, config.heard_samples
    rng = np.random.default_rng(1)
    time = np.arange(samples) / rate
    tone = 0.5 * np.sin(2 * math.pi * 440 * time) * (time < time[-1] / 2) + 1e-2 * rng.standard_normal(samples)
    return np.stack([0.1 * rng.standard_normal(samples), tone]).astype(np.float32)


def batch_of(chunks: Array, size: int) -> Array:
    """Return a batch of clips that repeats the given ones."""
    return np.ascontiguousarray(chunks[np.arange(size) % len(chunks)])


def difference(found: "list[NDArray[np.floating]]", exact: "list[NDArray[np.floating]]") -> float:
    """Return the largest difference of posteriors.

    Raises:
        BenchError: some are not finite, or others than expected.
    """
    largest = 0.0
    for a, b in zip(found, exact, strict=True):
        if a.shape != b.shape:
            raise BenchError(f"its posteriors have shape {a.shape}, expected {b.shape}")
        distance = float(np.abs(a.astype(np.float64) - b).max())
        if not math.isfinite(distance):
            raise BenchError("its posteriors are not finite")
        largest = max(largest, distance)
    return largest


def _written(folder: Path, name: str, chunks: Array, exact: list[NDArray[np.float64]]) -> Path:
    path = folder / f"{name}.npz"
    np.savez(path, chunks=chunks, clipwise=exact[0], framewise=exact[1])
    return path
