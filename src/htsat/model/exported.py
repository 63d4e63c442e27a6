"""Exported models: what an ONNX file of ours says of itself, and the runtimes that run it. Needs no torch.

The metadata of a file hold the configuration of the model, as a checkpoint's do. They are read without any library,
and without the weights: an ONNX file is a message of Protocol Buffers, a list of numbered fields.
"""

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from htsat.config import CheckpointConfig
from htsat.errors import CheckpointError, UsageError
from htsat.model.checkpoint import METADATA_KEY, config_of_text, read_config

Array = NDArray[np.float32]

SUFFIX = ".onnx"
#: names inside the graph
INPUT = "waveform"
OUTPUTS = ("clipwise_logits", "framewise_logits", "embedding")
#: what lies between front end and network: normalised, but in files of older versions
LOG_MEL = "log_mel"
#: fields of ONNX's messages (onnx.proto)
_IR_VERSION, _GRAPH, _METADATA = 1, 7, 14
_INITIALIZER, _EXTERNAL, _LOCATION = 5, 13, 14
#: IR versions that are read; 10 came with opset 21, the newest today is 13
_NEWEST_IR = 13


def read_exported(path: str | os.PathLike[str]) -> CheckpointConfig:
    """Read the configuration of an exported model, without the weights.

    Raises:
        CheckpointError: missing, damaged, of another program or a newer version, or with weights in other files.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise CheckpointError(f"{path}: is empty; export the model again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                found = _header(path, content)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise MemoryError(f"none is left to read {path}") from None
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read ({reason}); check the file and its permissions") from None
    if found.external:
        raise CheckpointError(
            f"{path}: its weights lie in another file ({found.external!r}), which is not read; "
            "export the model again, into one file"
        )
    if not 3 <= found.ir_version <= _NEWEST_IR:
        raise CheckpointError(
            f"{path}: ONNX version {found.ir_version} is not known here (3 to {_NEWEST_IR}); "
            "upgrade htsat, or export the model again"
        )
    if METADATA_KEY not in found.metadata:
        raise CheckpointError(
            f"{path}: is an ONNX file of another program (no {METADATA_KEY!r} metadata); "
            "export the model with `htsat export`"
        )
    return config_of_text(path, found.metadata[METADATA_KEY])


def read_model_config(path: Path) -> CheckpointConfig:
    """Read the configuration of a checkpoint or an exported model.

    Raises:
        CheckpointError: see ``read_config`` and ``read_exported``.
    """
    return read_exported(path) if path.suffix == SUFFIX else read_config(path)


@dataclass(frozen=True)
class _Header:
    ir_version: int
    metadata: dict[str, str]
    external: str | None


def _header(path: Path, content: mmap.mmap) -> _Header:
    damaged = CheckpointError(f"{path}: is no ONNX file, or damaged or cut off; export the model again")
    version, metadata, external = 0, {}, None
    graphs = 0
    try:
        for field, value in _fields(content, 0, len(content)):
            if field == _IR_VERSION and isinstance(value, int):
                version = value
            elif field == _METADATA and isinstance(value, tuple):
                entry = {key: _text(content, span) for key, span in _fields(content, *value)}
                metadata[entry[1]] = entry.get(2, "")
            elif field == _GRAPH and isinstance(value, tuple):
                graphs += 1
                external = external or _external(content, value)
    except (IndexError, KeyError, UnicodeDecodeError, _MalformedError):
        raise damaged from None
    if graphs != 1:
        raise damaged
    return _Header(version, metadata, external)


def _external(content: mmap.mmap, graph: tuple[int, int]) -> str | None:
    """Return the first file that weights lie in; None if they are all here."""
    for field, tensor in _fields(content, *graph):
        if field != _INITIALIZER or not isinstance(tensor, tuple):
            continue
        for part, value in _fields(content, *tensor):
            if part == _LOCATION and value == 1:
                return "unknown"
            if part == _EXTERNAL and isinstance(value, tuple):
                entry = {key: _text(content, span) for key, span in _fields(content, *value)}
                if entry.get(1) == "location":
                    return entry.get(2, "unknown")
    return None


class _MalformedError(Exception):
    """The bytes are no message of Protocol Buffers."""


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """Yield (number, value) of the fields of a message: numbers, and (start, end) of what has a length."""
    while start < end:
        key, start = _varint(content, start, end)
        kind = key & 7
        value: int | tuple[int, int]
        if kind == 0:
            value, start = _varint(content, start, end)
        elif kind == 2:
            length, start = _varint(content, start, end)
            value, start = (start, start + length), start + length
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, start = (start, start + size), start + size
        else:
            raise _MalformedError
        if start > end:
            raise _MalformedError
        yield key >> 3, value


def _varint(content: mmap.mmap, start: int, end: int) -> tuple[int, int]:
    value = 0
    for i in range(10):
        if start + i >= end:
            raise _MalformedError
        byte = content[start + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value, start + i + 1
    raise _MalformedError


def _text(content: mmap.mmap, span: int | tuple[int, int]) -> str:
    if not isinstance(span, tuple):
        raise _MalformedError
    return bytes(content[span[0] : span[1]]).decode("utf-8")


# ------------------------------------------------------------------ running


def check_chunks(chunks: Array, config: CheckpointConfig) -> None:
    """Refuse chunks of another length than an exported graph takes.

    Raises:
        UsageError: recordings are heard at their own length, which such a graph cannot.
    """
    if chunks.shape[1] != config.heard_samples:
        raise UsageError(
            f"an exported model hears {config.heard_samples} samples at once, got {chunks.shape[1]}; "
            "use --short pad or tile, or the backend torch"
        )


class OnnxBackend:
    """Runs an exported model through ONNX Runtime, clip by clip: a clip gets the same bits in any batch.

    Args:
        path: the exported file.
        config: what it says of itself.
        threads: of the CPU; None: one for each core.

    Raises:
        UsageError: ONNX Runtime is not installed, or ``threads`` is below 1.
        CheckpointError: it cannot run the file.
    """

    def __init__(self, path: str | os.PathLike[str], config: CheckpointConfig, *, threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise UsageError("the backend onnxruntime is not installed: pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common class
            raise _refused(path, "ONNX Runtime", error) from None
        self._config = config
        ends = (self._session.get_inputs(), self._session.get_outputs())
        _check_ends(path, config, *({value.name: value.shape[-1] for value in values} for values in ends))

    def __call__(self, chunks: Array) -> tuple[Array, Array, Array]:
        """Map chunks to clip logits, frame logits and embeddings; see ``backends.Backend``."""
        check_chunks(chunks, self._config)
        results = [self._session.run(None, {INPUT: chunks[i : i + 1]}) for i in range(len(chunks))]
        return _three([np.concatenate(parts) for parts in zip(*results, strict=True)], self._config)


class OpenVinoBackend:
    """Runs an exported model through OpenVINO.

    Args:
        path: the exported file.
        config: what it says of itself.
        threads: of the CPU, for each job; None: one for each core.
        jobs: threads of Python that call it at once.
        precision: ``bfloat16`` computes the network so, which processors with instructions for it (AMX, AVX512-BF16)
            do up to four times as fast; the front end, where a quiet sound would drown in the rounding of a loud one,
            stays in float32.

    Raises:
        UsageError: OpenVINO is not installed, ``threads`` is below 1, or the processor has no bfloat16.
        CheckpointError: it cannot run the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: CheckpointConfig,
        *,
        threads: int | None = None,
        jobs: int = 1,
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        try:
            import openvino
        except ImportError:
            raise UsageError("the backend openvino is not installed: pip install 'htsat[openvino]'") from None
        core = openvino.Core()
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings |= {"INFERENCE_NUM_THREADS": threads * jobs, "NUM_STREAMS": jobs}
        self._local = threading.local()  # a request is for one thread at a time
        if precision == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise UsageError("this processor has no instructions for bfloat16; use --precision float32")
        try:
            model = core.read_model(os.fspath(path))
            sizes = (
                {value.get_any_name(): value.get_partial_shape()[-1].get_length() for value in values}
                for values in (model.inputs, model.outputs)
            )
            _check_ends(path, config, *sizes)
            model.reshape([1, config.heard_samples])  # fixed shapes are planned better
            if precision == "float32":
                self._front = None
                self._network = core.compile_model(model, "CPU", settings)
            else:
                front, network = _split(openvino, model)
                self._front = core.compile_model(front, "CPU", settings)
                self._network = core.compile_model(network, "CPU", {**settings, "INFERENCE_PRECISION_HINT": "bf16"})
        except RuntimeError as error:
            raise _refused(path, "OpenVINO", error) from None
        self._config = config

    def __call__(self, chunks: Array) -> tuple[Array, Array, Array]:
        """Map chunks to clip logits, frame logits and embeddings; see ``backends.Backend``."""
        check_chunks(chunks, self._config)
        results = []
        front, network = self._requests()
        for chunk in chunks:
            # Written into tensors of the request: those that share memory with arrays are freed by threads of the
            # runtime, which may wait for Python's lock and hold one of their own that others wait for.
            if front is not None:
                front.get_input_tensor(0).data[0] = chunk
                front.infer()
                network.get_input_tensor(0).data[:] = front.get_output_tensor(0).data
            else:
                network.get_input_tensor(0).data[0] = chunk
            network.infer()
            results.append([network.get_output_tensor(i).data.copy() for i in range(len(self._network.outputs))])
        return _three([np.concatenate(parts) for parts in zip(*results, strict=True)], self._config)

    def _requests(self) -> tuple[Any, Any]:
        """Return what runs front end and network in this thread."""
        if not hasattr(self._local, "requests"):
            front = None if self._front is None else self._front.create_infer_request()
            self._local.requests = (front, self._network.create_infer_request())
        return self._local.requests  # type: ignore[no-any-return]


def _split(openvino: Any, model: Any) -> tuple[Any, Any]:
    """Cut a graph of fixed shapes at the log-mel: front end and network."""
    whole = model.clone()
    front = openvino.Model([openvino.opset13.result(_log_mel(model))], model.get_parameters(), "front")
    cut = _log_mel(whole)
    entry = openvino.opset13.parameter(cut.get_partial_shape(), openvino.Type.f32, name=LOG_MEL)
    for reader in list(cut.get_target_inputs()):
        reader.replace_source_output(entry.output(0))
    return front, openvino.Model(whole.get_results(), [entry, *whole.get_parameters()], "network")


def _log_mel(model: Any) -> Any:
    ends = (output for node in model.get_ordered_ops() for output in node.outputs())
    return next(output for output in ends if LOG_MEL in output.get_names())


def _three(outputs: list[Array], config: CheckpointConfig) -> tuple[Array, Array, Array]:
    """Return clip logits, frame logits and embeddings; those of no classes where there are none."""
    if len(outputs) == 1:
        count = len(outputs[0])
        none = np.zeros((count, config.heard_tokens, 0), np.float32)
        return none[:, 0], none, outputs[0]
    clip, frame, embedding = outputs
    return clip, frame, embedding


def short_of_memory(error: BaseException) -> bool:
    """Return whether an error of NumPy or of a runtime says that there is too little memory.

    Most have no class of their own for this: PyTorch has one on GPUs only.
    """
    text = str(error).lower()
    phrases = ("out of memory", "allocate memory", "failed to allocate", "bad_alloc", "bad allocation")
    return isinstance(error, MemoryError) or any(phrase in text for phrase in phrases)


def _refused(path: str | os.PathLike[str], runtime: str, error: Exception) -> CheckpointError | MemoryError:
    if short_of_memory(error):
        return MemoryError(f"none is left to load {path}")
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(f"{path}: {runtime} cannot run it ({reason}); export the model again")


def _check_ends(
    path: str | os.PathLike[str], config: CheckpointConfig, inputs: dict[str, Any], outputs: dict[str, Any]
) -> None:
    """Refuse a graph that takes or gives something else than its configuration says.

    Args:
        path: for messages.
        config: what the file says of itself.
        inputs: by name, the size of the last axis.
        outputs: the same of what it gives.
    """
    if list(inputs) != [INPUT] or tuple(outputs) not in (OUTPUTS, OUTPUTS[-1:]):
        raise CheckpointError(
            f"{path}: takes {', '.join(inputs)} and gives {', '.join(outputs)}, which no model of ours does; "
            "export the model again"
        )
    if inputs[INPUT] != config.heard_samples:
        raise CheckpointError(
            f"{path}: takes {inputs[INPUT]} samples where its settings make {config.heard_samples}; "
            "graph and settings are not of one model, export it again"
        )
    classes = outputs.get(OUTPUTS[0], 0)
    if classes != len(config.labels):
        raise CheckpointError(
            f"{path}: gives {classes} classes where its labels name {len(config.labels)}; "
            "graph and settings are not of one model, export it again"
        )
