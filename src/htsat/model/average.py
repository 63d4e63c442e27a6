"""The mean of several checkpoints of one training: often better than the best of them, at the cost of one.

Source: the published ``main.py``, ``weight_average``: the plain mean of the weights.
"""

import dataclasses
import os
from collections.abc import Sequence

import torch

from htsat.config import CheckpointConfig, to_dict
from htsat.errors import CheckpointError, UsageError
from htsat.model.base import SoundModel
from htsat.model.checkpoint import load_checkpoint


def average_checkpoints(paths: Sequence[str | os.PathLike[str]]) -> SoundModel:
    """Return a model whose weights are the mean of those of several checkpoints.

    Weights and running statistics are averaged in double precision, whole numbers (the batch counter of the batch
    norm) are those of the first. One checkpoint is held beside the sum, however many there are.

    Args:
        paths: checkpoints of the same labels, front end, architecture and objective. Decoding, inference and
            provenance are the first one's; the provenance also names the files.

    Returns:
        The model in evaluation mode, with ``labels`` and ``checkpoint`` set, ready for ``save_checkpoint``.

    Raises:
        UsageError: no paths.
        CheckpointError: one cannot be read, or differs from the first in what the weights mean.
    """
    if not paths:
        raise UsageError("no checkpoints to average; give at least one")
    total: dict[str, torch.Tensor] = {}
    first: tuple[SoundModel, CheckpointConfig] | None = None
    for path in paths:
        model, config = load_checkpoint(path)
        if first is None:
            first = model, config
        else:
            _check_same(path, config, paths[0], first[1])
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                total[name] = total[name].add_(tensor) if name in total else tensor.double()
    assert first is not None
    network, config = first
    weights = {name: (tensor / len(paths)).float() for name, tensor in total.items()}
    network.load_state_dict({**network.state_dict(), **weights}, strict=True)
    provenance = {**config.provenance, "average_of": [os.fspath(path) for path in paths]}
    network.labels, network.checkpoint = config.labels, dataclasses.replace(config, provenance=provenance)
    return network.eval()


def _check_same(
    path: str | os.PathLike[str],
    config: CheckpointConfig,
    first_path: str | os.PathLike[str],
    first: CheckpointConfig,
) -> None:
    """Refuse a checkpoint whose weights do not stand for the same as those of the first."""
    mine, other = to_dict(config), to_dict(first)
    differing = [
        f"{section}.{key} is {value!r} instead of {other[section][key]!r}"
        for section in ("frontend", "model")
        for key, value in mine[section].items()
        if value != other[section][key]
    ]
    if config.objective != first.objective:
        differing.append(f"objective is {config.objective} instead of {first.objective}")
    if len(config.labels) == len(first.labels) and config.labels != first.labels:
        at = next(i for i, pair in enumerate(zip(config.labels, first.labels, strict=True)) if pair[0] != pair[1])
        differing.append(f"label {at} is {config.labels[at]!r} instead of {first.labels[at]!r}")
    if differing:
        raise CheckpointError(
            f"{os.fspath(path)}: cannot be averaged with {os.fspath(first_path)}: {'; '.join(differing)}; "
            "give checkpoints of one training"
        )
