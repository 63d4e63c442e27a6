"""Models ready for use: by name, on a device, with NumPy arrays going in and out."""

import copy
import os
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from htsat.errors import UsageError
from htsat.model.base import SoundModel
from htsat.model.checkpoint import load_checkpoint
from htsat.model.exported import SUFFIX
from htsat.model.hub import resolve

Array = NDArray[np.float32]


def load_model(
    model: str | os.PathLike[str] = "default",
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    endpoint: str | None = None,
    offline: bool | None = None,
) -> SoundModel:
    """Return a model in evaluation mode, with its labels in ``.labels`` and all settings in ``.checkpoint``.

    Args:
        model: a name (``htsat models``), a checkpoint file, or ``hf://owner/repo``.
        cache_dir: where downloaded models are kept; None: the usual place.
        endpoint: address of the model hub; None: the usual one.
        offline: True: never download.

    Raises:
        CheckpointError, DownloadError: the model cannot be had.
    """
    path = resolve(model, cache_dir=cache_dir, endpoint=endpoint, offline=offline)
    if path.suffix == SUFFIX:
        raise UsageError(f"{path}: is an exported model, which has no PyTorch network; use htsat.Predictor")
    network, config = load_checkpoint(path)
    network.labels, network.checkpoint = config.labels, config
    return network


class TorchBackend:
    """Runs a network through PyTorch.

    Args:
        model: in evaluation mode; moved to the device.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        threads: CPU threads; None leaves PyTorch's setting.
        precision: of the network; the front end is computed in float32 always.
        compiled: compile it with ``torch.compile``, which takes up to a minute at the first batch.

    Raises:
        UsageError: the device is unknown or absent.
    """

    def __init__(
        self,
        model: SoundModel,
        *,
        device: str = "auto",
        threads: int | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
        compiled: bool = False,
    ) -> None:
        if threads is not None:
            if threads < 1:
                raise UsageError(f"threads must be at least 1, got {threads}")
            torch.set_num_threads(threads)
        self.device = pick_device(device)
        self._model = model.to(self.device).eval()
        if precision == "bfloat16":
            self._model = copy.deepcopy(self._model).bfloat16()
        if compiled:
            self._model.compile(dynamic=False)  # each length for itself: some kernels of the fine head fail otherwise

    def __call__(self, chunks: Array) -> tuple[Array, Array, Array]:
        """Map chunks to clip logits, frame logits and embeddings; see ``backends.Backend``."""
        try:
            with torch.inference_mode():
                output = self._model(torch.from_numpy(chunks).to(self.device), "native")
        except RuntimeError as error:
            # Named, not imported: that would take longer than all the rest of PyTorch.
            if "TorchDynamoException" not in (kind.__name__ for kind in type(error).__mro__):
                raise
            reason = str(error).strip().splitlines()[0]
            raise UsageError(
                f"torch.compile cannot compile the network here ({reason}); it needs a C++ compiler; "
                "use --backend torch"
            ) from None
        none: Any = output.embedding.new_zeros((len(chunks), self._model.num_tokens, 0))
        framewise = none if output.framewise_logits is None else output.framewise_logits
        clipwise = none[:, 0] if output.clipwise_logits is None else output.clipwise_logits
        clip, frame, embedding = (t.float().cpu().numpy() for t in (clipwise, framewise, output.embedding))
        return clip, frame, embedding


def pick_device(device: str) -> torch.device:
    """Return the device that a name stands for.

    Raises:
        UsageError: unknown name, or a device that this machine or this PyTorch lacks.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"device {device!r} cannot be used ({reason}); expected auto, cpu, cuda, cuda:N or mps"
        ) from None
    return chosen
