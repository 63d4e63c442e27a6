"""What runs a network: PyTorch, ONNX Runtime or OpenVINO, behind one call.

A checkpoint is run by PyTorch. A model that was exported (``htsat export``) needs no PyTorch: ONNX Runtime comes with
the package, OpenVINO is faster with large models. The bundled model is here as both.
"""

import importlib.util
import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from htsat.config import CheckpointConfig
from htsat.errors import UsageError
from htsat.model.checkpoint import read_config
from htsat.model.exported import SUFFIX, OnnxBackend, OpenVinoBackend, read_exported, short_of_memory
from htsat.model.hub import bundled_export, resolve

if TYPE_CHECKING:
    from htsat.model.base import SoundModel

Array = NDArray[np.float32]
BackendName = Literal["auto", "torch", "compiled", "onnxruntime", "openvino"]
Precision = Literal["float32", "bfloat16"]

#: package of each
_PACKAGES = {"torch": "torch", "compiled": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}
#: packages that not everyone has, and what to tell pip to get them
REMEDIES = {
    "torch": "'htsat[torch]'",
    "safetensors": "'htsat[torch]'",
    "huggingface_hub": "'htsat[torch]'",
    "onnx": "'htsat[export]'",
    "onnxscript": "'htsat[export]'",
    "onnxruntime": "onnxruntime",
    "openvino": "'htsat[openvino]'",
    "transformers": "'htsat[bench]'",
}
#: bytes of an exported file from which on OpenVINO's longer start is worth its speed
_LARGE = 32_000_000


class Backend(Protocol):
    """Runs the network on chunks."""

    def __call__(self, chunks: Array) -> tuple[Array, Array, Array]:
        """Map (batch, heard_samples), or a native size of it, to clip logits, frame logits and embeddings.

        Shapes: (batch, num_classes), (batch, num_tokens, num_classes) and (batch, width).
        """


class SparingBackend:
    """Runs another backend, on fewer chunks at once where there is too little memory for all of them.

    Args:
        backend: that runs the network.
        on_note: told, once, in a line.
    """

    def __init__(self, backend: Backend, on_note: Callable[[str], None] | None = None) -> None:
        self.backend, self._on_note = backend, on_note
        self._most: int | None = None  # chunks at once that memory holds; None: there was always enough
        self._lock = threading.Lock()

    def __call__(self, chunks: Array) -> tuple[Array, Array, Array]:
        """Map chunks to clip logits, frame logits and embeddings; see ``Backend``.

        Raises:
            MemoryError: there is too little for a single chunk.
        """
        while True:
            size = min(len(chunks), self._most or len(chunks))
            reason = ""
            try:
                parts = [self.backend(chunks[start : start + size]) for start in range(0, len(chunks), size)]
                clip, frame, embedding = (np.concatenate(part) for part in zip(*parts, strict=True))
                return clip, frame, embedding
            except Exception as error:  # those of ONNX Runtime have no common class
                if not short_of_memory(error):
                    raise
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            # Out here the error, and with it what its frames hold, is gone.
            if size == 1:
                raise MemoryError(f"no memory for a batch of 1: {reason}")
            self._spare(size)

    def _spare(self, size: int) -> None:
        """Run half as many at once from here on."""
        with self._lock:
            first = self._most is None
            self._most = min(self._most or size, max(1, size // 2))
        if first and self._on_note is not None:
            self._on_note(f"too little memory for {size} chunks at once, so fewer are heard at once")


@dataclass(frozen=True, eq=False)
class Runner:
    """A model that is ready to run.

    Attributes:
        backend: runs it.
        name: of the backend, never ``auto``.
        config: of the model.
        path: the checkpoint or exported file.
        jobs: calls at once that its threads are for.
        network: the PyTorch model, if that runs it.
    """

    backend: Backend
    name: str
    config: CheckpointConfig
    path: Path
    jobs: int = 1
    network: "SoundModel | None" = None


def cores() -> int:
    """Return how many threads this process may keep busy: its share of the processors, in a container too."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no such limit, or another system
        pass
    return count


def installed(backend: str) -> bool:
    """Return whether the package that a backend needs is here; nothing is imported."""
    return has_package(_PACKAGES[backend])


def has_package(package: str) -> bool:
    """Return whether a package is here; nothing is imported."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


def usable(model: str | os.PathLike[str], path: Path) -> list[str]:
    """Return the backends that are installed and run a model in float32, the one that ``auto`` takes first.

    Args:
        model: as it was asked for.
        path: the file that was found for it.
    """
    checkpoint, export = _forms(model, path)
    fitting = [*(("torch", "compiled") if checkpoint else ()), *(("onnxruntime", "openvino") if export else ())]
    found = [name for name in fitting if installed(name)]
    if found:
        first = _chosen(path, checkpoint, export, "auto", "float32")
        found = [first, *(name for name in found if name != first)]
    return found


def _forms(model: str | os.PathLike[str], path: Path) -> tuple[Path | None, Path | None]:
    """Return the checkpoint and the exported file of a model, as far as it has both."""
    return (None, path) if path.suffix == SUFFIX else (path, bundled_export(model))


def open_model(
    model: str | os.PathLike[str] = "default",
    *,
    backend: BackendName = "auto",
    precision: Precision = "float32",
    device: str = "auto",
    threads: int | None = None,
    jobs: int | Literal["auto"] = 1,
    recordings: int | None = None,
    native: bool = False,
    on_note: Callable[[str], None] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    endpoint: str | None = None,
    offline: bool | None = None,
) -> Runner:
    """Return a model with the backend that runs it.

    Args:
        model: a name, a checkpoint, an exported file, or ``hf://owner/repo``.
        backend: ``auto``: the fastest one that is installed and can run it.
        precision: of the network; ``bfloat16`` is for ``torch``, ``compiled`` and ``openvino``.
        device: of PyTorch; the others run on the CPU.
        threads: of the CPU; None: one for each core.
        jobs: calls at once that share the threads; ``auto``: one for each of them, but with PyTorch, whose threads are
            those of the whole process.
        recordings: the most jobs that there will be; None: many.
        native: recordings will be heard at their own length, which exported graphs cannot.
        on_note: told in a line if memory is too small for the chunks of a call.
        cache_dir: where downloaded models are kept.
        endpoint: address of the model hub.
        offline: never download.

    Raises:
        CheckpointError, DownloadError: the model cannot be had.
        UsageError: the backend is unknown, not installed, or cannot run this model so.
        MemoryError: there is too little to load it.
    """
    if backend != "auto" and backend not in _PACKAGES:
        raise UsageError(f"unknown backend {backend!r}; expected auto, {', '.join(_PACKAGES)}")
    if precision not in ("float32", "bfloat16"):
        raise UsageError(f"unknown precision {precision!r}; expected float32 or bfloat16")
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    path = resolve(model, cache_dir=cache_dir, endpoint=endpoint, offline=offline)
    checkpoint, export = _forms(model, path)
    if native and checkpoint is not None:
        export = None
    name = _chosen(path, checkpoint, export, device, precision) if backend == "auto" else str(backend)
    if jobs != "auto":
        at_once = jobs
    else:
        at_once = 1 if name in ("torch", "compiled") else min(recordings or cores(), threads or cores())
    if at_once > 1 or (threads is None and device in ("auto", "cpu")):
        threads = max(1, (threads or cores()) // at_once)
    if not installed(name):
        raise UsageError(f"the backend {name} is not installed: pip install {REMEDIES[_PACKAGES[name]]}")
    if name in ("torch", "compiled"):
        if checkpoint is None:
            raise UsageError(f"{path}: is exported, which torch does not run; use the checkpoint, or --backend auto")
        from htsat.model.runtime import TorchBackend, load_model

        try:
            network = load_model(checkpoint)
            torch_backend = TorchBackend(
                network, device=device, threads=threads, precision=precision, compiled=name == "compiled"
            )
        except RuntimeError as error:
            if not short_of_memory(error):
                raise
            raise MemoryError(f"none is left to load {checkpoint}") from None
        return Runner(SparingBackend(torch_backend, on_note), name, network.checkpoint, path, at_once, network)
    if export is None:
        raise UsageError(
            f"{path}: is a checkpoint, which {name} does not run; export it first: htsat export {path.name} "
            f"{path.stem}{SUFFIX}"
        )
    if device not in ("auto", "cpu"):
        raise UsageError(f"the backend {name} runs on the CPU, not on {device!r}; use --backend torch")
    if name == "onnxruntime" and precision != "float32":
        raise UsageError("the backend onnxruntime computes in float32; use --backend openvino for bfloat16")
    config = read_exported(export)
    exported: Backend
    if name == "onnxruntime":
        exported = OnnxBackend(export, config, threads=threads)
    else:
        exported = OpenVinoBackend(export, config, threads=threads, jobs=at_once, precision=precision)
    return Runner(SparingBackend(exported, on_note), name, config, path, at_once)


def _chosen(path: Path, checkpoint: Path | None, export: Path | None, device: str, precision: str) -> str:
    """Return the fastest backend that is installed and can run the model on the device."""
    if export is not None and device in ("auto", "cpu"):
        if device == "auto" and checkpoint is not None and installed("torch") and _has_gpu():
            return "torch"
        if precision != "float32":
            order = ["openvino"]
        elif export.stat().st_size >= _LARGE:
            order = ["openvino", "onnxruntime"]
        else:
            order = ["onnxruntime", "openvino"]
        for name in order:
            if installed(name):
                return name
    if checkpoint is None:
        return "openvino" if precision != "float32" else "onnxruntime"  # which the caller finds missing
    if not installed("torch") and export is not None and precision != "float32":
        raise UsageError(f"{precision} needs the backend openvino or torch: pip install 'htsat[openvino]'")
    if not installed("torch"):
        read_config(path)
        raise UsageError(
            f"{path}: running a checkpoint needs PyTorch: pip install 'htsat[torch]'; or export it where that is "
            f"installed (htsat export {path.name} {path.stem}{SUFFIX}) and use the exported file"
        )
    return "torch"


def _has_gpu() -> bool:
    """Return whether there seems to be a GPU that PyTorch can use; cheap, nothing is imported."""
    if sys.platform == "darwin":
        return False
    return Path("/dev/nvidiactl").exists() or (sys.platform == "win32" and shutil.which("nvidia-smi") is not None)
