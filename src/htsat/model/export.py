"""Export: a network with its front end as one ONNX file, for runtimes that know nothing of torch.

The graph takes waveforms (batch, heard_samples) and gives clip logits, frame logits and embeddings; its metadata hold
the configuration that a checkpoint holds, so that the file says all of itself (``htsat.model.exported`` reads it).

Two steps of the front end are written anew, in terms that every runtime computes fast; both are exact but for rounding:

* the Fourier transform as two small matrix products (Cooley and Tukey with factors 32 and n_fft / 32), where the first
  takes real numbers and the second knows which frequencies the mel filters need;
* the bicubic stretch as the weighted sum of four frames.
"""

import contextlib
import copy
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from htsat.audio.mel import hann_window, mel_filterbank
from htsat.config import CheckpointConfig, FrontendConfig, to_dict
from htsat.errors import ConfigError, OutputError, UsageError
from htsat.files import write_atomic
from htsat.model.base import SoundModel
from htsat.model.checkpoint import FORMAT, METADATA_KEY
from htsat.model.exported import INPUT, LOG_MEL, OUTPUTS, OnnxBackend
from htsat.model.swin import Block, WindowAttention

if TYPE_CHECKING:
    import onnx

Array = NDArray[np.float32]

#: of the ONNX operators; GELU and layer norm are one operator each from here on
OPSET = 20
#: largest difference of a posterior between an export and its model in double precision, unless PyTorch's own rounding
#: is more than half of it
TOLERANCE = 1e-5


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the file.
        size: bytes.
        posterior_difference: the largest between the file and the model in double precision, on noise, a tone, clicks
            and silence.
    """

    path: Path
    size: int
    posterior_difference: float


def export_onnx(model: SoundModel, config: CheckpointConfig, path: str | os.PathLike[str]) -> ExportReport:
    """Write a model as one ONNX file and compare what it says with the model.

    Weights that lose nothing by it, those of a checkpoint in half precision, are stored in half precision.

    Args:
        model: on the CPU, in evaluation mode.
        config: of the model, with its labels and settings.
        path: the file to write, ``.onnx``.

    Raises:
        ConfigError: ``config`` does not describe ``model``, or the front end cannot be exported.
        OutputError: the file cannot be written, or says something else than the model (then nothing is written).
        UsageError: the packages that write ONNX are not installed.
    """
    if (model.config, model.frontend_config) != (config.model, config.frontend):
        raise ConfigError("the configuration does not describe the model; pass the one the model was built with")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"export needs the package {error.name}: pip install 'htsat[export]'") from None
    path = Path(path)
    if config.inference.short == "native":
        # A graph hears one length. Recordings shorter than that are followed by silence.
        config = replace(config, inference=replace(config.inference, short="pad"))
    graph = _Graph(model, config).eval()
    with torch.inference_mode():
        graph(torch.zeros(1, config.heard_samples))  # makes what the stages keep of each size
    program = _program(graph, config)
    written = _finished(program, config)
    content = written.SerializeToString()
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "trial.onnx"
        trial.write_bytes(content)
        difference, own = _differences(model, config, trial)
    tolerance = max(TOLERANCE, 2 * own)
    if not difference <= tolerance:
        raise OutputError(
            f"{path}: not written: its posteriors differ by {difference:.1e} from the model's, more than "
            f"{tolerance:.0e}; please report this with the versions of torch and onnxscript"
        )
    write_atomic(path, content)
    return ExportReport(path, len(content), difference)


class _Graph(nn.Module):
    """What is exported: waveforms of one length in, the three outputs of ``OUTPUTS`` out."""

    def __init__(self, model: SoundModel, config: CheckpointConfig) -> None:
        super().__init__()
        self.model = with_split_attention(model)
        self.front = MatrixLogMel(config.frontend, config.heard_samples)
        taps, weights = stretch_taps(model, self.front.num_frames, config.heard_samples)
        self.register_buffer("taps", taps)
        self.register_buffer("weights", weights)
        self.num_classes = config.model.num_classes
        self.heard_frames = model.geometry.native_frames(config.heard_samples)

    def forward(self, waveform: Tensor) -> tuple[Tensor, ...]:
        log_mel = self.front(waveform)
        assert isinstance(self.taps, Tensor) and isinstance(self.weights, Tensor)
        if self.front.num_frames != self.heard_frames:
            near = log_mel.index_select(1, self.taps).view(log_mel.shape[0], self.heard_frames, 4, -1)
            log_mel = (near * self.weights).sum(2)
        features = self.model.normalise(log_mel)
        found = self.model.analyse(features)
        embedding = self.model.embed(found.tokens)
        if found.clipwise is None or found.framewise is None:
            return embedding, features
        return found.clipwise, found.framewise, embedding, features


class SplitAttention(nn.Module):
    """Attention in windows as runtimes like it: queries, keys and values from a layer each.

    What comes of one layer for all three must be moved before it is multiplied. Of three layers, OpenVINO makes the
    rest, from the moves of heads to the product with the values, one operator.

    Args:
        attention: whose weights it shares.
    """

    def __init__(self, attention: WindowAttention) -> None:
        super().__init__()
        self.whole = attention
        weights, biases = attention.qkv.weight.detach().chunk(3), attention.qkv.bias.detach().chunk(3)
        self.parts = nn.ModuleList(nn.Linear(weight.shape[1], weight.shape[0]) for weight in weights)
        for part, weight, bias in zip(self.parts, weights, biases, strict=True):
            part.weight.data, part.bias.data = weight.clone(), bias.clone()

    def forward(self, x: Tensor, index: Tensor, mask: Tensor | None, maps: list[Tensor] | None = None) -> Tensor:
        """Attend within windows; see ``WindowAttention.forward``."""
        batch, length, width = x.shape
        heads, tokens = self.whole.num_heads, index.shape[0]
        q, k, v = (part(x).view(-1, tokens, heads, width // heads) for part in self.parts)
        logits = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * self.whole.scale
        bias = self.whole._bias(index, mask)
        if bias.shape[0] != 1:
            bias = bias.repeat(batch, 1, 1, 1)
        out = (logits + bias).softmax(-1) @ v.transpose(1, 2)
        return self.whole.proj(out.transpose(1, 2).reshape(batch, length, width))  # type: ignore[no-any-return]


def with_split_attention(model: SoundModel) -> SoundModel:
    """Return a copy of a network with ``SplitAttention`` in its blocks, if it has such."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, Block):
            module.attn = SplitAttention(module.attn)  # type: ignore[assignment]
    return model


def stretch_taps(model: SoundModel, frames: int, samples: int) -> tuple[Tensor, Tensor]:
    """Return the frames that each stretched frame is made of, (4 T,) int64, and their weights, (1, T, 4, 1)."""
    target = model.geometry.native_frames(samples)
    with torch.inference_mode(False), torch.no_grad():
        matrix = model.stretch(torch.eye(frames, dtype=torch.float64).unsqueeze(0), target)[0]
    _, taps = matrix.abs().topk(min(4, frames), dim=1)
    taps = F.pad(taps.sort(1).values, (0, max(0, 4 - frames)))
    weights = matrix.gather(1, taps)
    if frames < 4:
        weights[:, frames:] = 0
    return taps.reshape(-1), weights.view(1, target, 4, 1).float()


class MatrixLogMel(nn.Module):
    """The log-mel spectrogram as matrix products, for graphs.

    Maps (batch, num_samples) to (batch, num_samples // hop_length + 1, n_mels), as ``LogMel`` does. With n = b n1 + n2
    and k = k1 + a k2 (a x b = n_fft) the transform of a windowed frame x is

        X[k] = sum over n2 of exp(-2 pi i n2 (k1 / n_fft + k2 / b)) * (sum over n1 of exp(-2 pi i n1 k1 / a) x[n]),

    for k1 up to a / 2 alone: the others are conjugates of these. What is real for k1 = 0 and k1 = a / 2 shares one
    matrix, so that all a / 2 matrices have one size.

    Args:
        config: the front end.
        num_samples: of a waveform.

    Raises:
        ConfigError: n_fft is odd.
    """

    def __init__(self, config: FrontendConfig, num_samples: int) -> None:
        super().__init__()
        n_fft = config.n_fft
        if n_fft % 2:
            raise ConfigError(f"n_fft {n_fft} is odd; only even ones can be exported")
        self.config = config
        self.num_frames = num_samples // config.hop_length + 1
        a = math.gcd(n_fft, 32)
        self.a, self.b = a, n_fft // a
        self.first: Tensor
        self.second: Tensor
        self.filters: Tensor
        first, second, filters = _transform(config, a)
        self.register_buffer("window", torch.from_numpy(hann_window(n_fft)).float().view(a, self.b))
        self.register_buffer("first", torch.from_numpy(first).float())
        self.register_buffer("second", torch.from_numpy(second).float())
        self.register_buffer("filters", torch.from_numpy(filters).float())
        # Frames begin every hop: of blocks of this size a frame is made of whole ones.
        self.block = math.gcd(config.hop_length, self.b)
        frames = torch.arange(self.num_frames).unsqueeze(1) * (config.hop_length // self.block)
        self.register_buffer("blocks", (frames + torch.arange(n_fft // self.block)).view(-1))

    def forward(self, waveform: Tensor) -> Tensor:
        """Return the log-mel spectrogram."""
        half, batch = self.config.n_fft // 2, waveform.shape[0]
        before, behind = waveform[:, 1 : half + 1].flip(1), waveform[:, -half - 1 : -1].flip(1)
        padded = torch.cat([before, waveform, behind], 1)
        count = padded.shape[1] // self.block
        blocks = padded[:, : count * self.block].reshape(batch, count, self.block)
        assert isinstance(self.blocks, Tensor) and isinstance(self.window, Tensor)
        frames = blocks.index_select(1, self.blocks).view(batch * self.num_frames, self.a, self.b) * self.window
        mixed = torch.matmul(self.first, frames)  # (frames, a, b): rows 2 j and 2 j + 1 go to matrix j
        mixed = mixed.view(-1, self.a // 2, 2 * self.b).transpose(0, 1)
        spectrum = torch.matmul(mixed, self.second)
        columns = self.second.shape[2] // 2
        power = spectrum[..., :columns].square() + spectrum[..., columns:].square()
        power = power.transpose(0, 1).reshape(batch, self.num_frames, -1)
        return 10.0 * torch.log10((power @ self.filters).clamp_min(10 ** (self.config.floor_db / 10)))


def _transform(config: FrontendConfig, a: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the two matrices of the transform and the mel filters in the order of their result.

    Returns:
        first: (a, a), from n1 to the real and imaginary parts for k1: rows (0, a / 2), (1 re, 1 im), (2 re, 2 im) ...
        second: (a / 2, 2 b, 2 columns), from those over n2 to real parts, then imaginary ones.
        filters: (a / 2 x columns, n_mels).
    """
    n_fft, bank = config.n_fft, mel_filterbank(config)
    b = n_fft // a
    heard = np.asarray(bank.any(1))  # frequencies that some filter takes
    n1, n2 = np.arange(a), np.arange(b)

    def chosen(k1: int) -> list[tuple[int, int]]:
        """Return (k2, frequency) of what is to be computed for k1, each frequency once in all."""
        both = [(k2, k1 + a * k2) for k2 in range(b)]
        if k1 in (0, a // 2):  # their own conjugates
            return [(k2, k) for k2, k in both if k <= n_fft // 2 and heard[k]]
        return [(k2, min(k, n_fft - k)) for k2, k in both if heard[min(k, n_fft - k)]]

    def turned(k1: int, k2: list[int]) -> NDArray[np.complex128]:
        return np.asarray(np.exp(-2j * np.pi * (n2[:, None] * k1 / n_fft + np.outer(n2, k2) / b)))

    rows = [np.ones(a), np.cos(np.pi * n1)]
    ends = chosen(0), chosen(a // 2)
    groups: list[list[int]] = [[k for _, k in ends[0]] + [k for _, k in ends[1]]]
    real = [turned(0, [k2 for k2, _ in ends[0]]), turned(a // 2, [k2 for k2, _ in ends[1]])]
    upper = np.concatenate([real[0], np.zeros_like(real[1])], 1)
    lower = np.concatenate([np.zeros_like(real[0]), real[1]], 1)
    stacked = np.concatenate([upper, lower], 0)
    matrices = [(stacked.real, stacked.imag)]
    for k1 in range(1, a // 2):
        wave = np.exp(-2j * np.pi * n1 * k1 / a)
        rows += [wave.real, wave.imag]
        found = chosen(k1)
        turn = turned(k1, [k2 for k2, _ in found])
        # (re + i im) (t re + i t im)
        matrices.append((np.concatenate([turn.real, -turn.imag], 0), np.concatenate([turn.imag, turn.real], 0)))
        groups.append([k for _, k in found])
    columns = max(1, *map(len, groups))
    second = np.zeros((a // 2, 2 * b, 2 * columns))
    filters = np.zeros((a // 2, columns, config.n_mels))
    for j, ((re, im), frequencies) in enumerate(zip(matrices, groups, strict=True)):
        count = len(frequencies)
        second[j, :, :count], second[j, :, columns : columns + count] = re, im
        filters[j, :count] = bank[frequencies]
    return np.stack(rows), second, filters.reshape(-1, config.n_mels)


# ------------------------------------------------------------------ writing


def _program(graph: _Graph, config: CheckpointConfig) -> "onnx.ModelProto":
    """Trace the graph; the batch may have any size."""
    names = OUTPUTS if graph.num_classes else OUTPUTS[-1:]
    return _traced(graph, config.heard_samples, [*names, LOG_MEL])


def _traced(graph: nn.Module, num_samples: int, outputs: list[str]) -> "onnx.ModelProto":
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            (torch.zeros(2, num_samples),),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes={"waveform": {0: torch.export.Dim("batch", min=1, max=1024)}},
            input_names=[INPUT],
            output_names=outputs,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    proto: onnx.ModelProto = program.model_proto
    return proto


def front_end_graph(config: FrontendConfig, num_samples: int) -> bytes:
    """Return the front end alone as an ONNX file: waveforms of one length in, log-mel spectrograms out."""
    content: bytes = _traced(MatrixLogMel(config, num_samples).eval(), num_samples, [LOG_MEL]).SerializeToString()
    return content


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep to ourselves what the exporter says of packages that are absent."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _finished(proto: "onnx.ModelProto", config: CheckpointConfig) -> "onnx.ModelProto":
    """Leave out what tells of the machine it was made on, store weights small, and add the configuration."""
    import onnx
    from onnx import numpy_helper

    del proto.graph.output[-1]  # the log-mel keeps its name and is no output
    proto.producer_name, proto.producer_version, proto.doc_string = "htsat", "", ""
    del proto.metadata_props[:]
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in proto.graph.value_info:
        del value.metadata_props[:]
    del proto.graph.metadata_props[:]
    for function in proto.functions:
        del function.metadata_props[:]
    halves = []
    for tensor in proto.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or math.prod(tensor.dims) < 1000:
            continue
        values, name = numpy_helper.to_array(tensor), tensor.name
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.array_equal(half.astype(np.float32), values):
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
            halves.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*halves, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    text = json.dumps({"format": FORMAT, **to_dict(config)}, ensure_ascii=False, allow_nan=False)
    entry = proto.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, text
    onnx.checker.check_model(proto)
    return proto


def _differences(model: SoundModel, config: CheckpointConfig, path: Path) -> tuple[float, float]:
    """Return how far the posteriors of an export and of PyTorch lie from those of the model in double precision.

    Of a model without classes: embeddings, relative to the largest. Heard are noise of two levels, a tone that stops,
    clicks, and silence.
    """
    rate, samples = config.frontend.sample_rate, config.heard_samples
    rng = np.random.default_rng(1)
    time = np.arange(samples) / rate
    clicks = np.zeros(samples)
    clicks[:: max(1, rate // 2)] = 0.9
    waveforms = [
        0.1 * rng.standard_normal(samples),
        1e-3 * rng.standard_normal(samples),
        0.5 * np.sin(2 * np.pi * 440 * time) * (time < time[-1] / 2) + 1e-4 * rng.standard_normal(samples),
        clicks,
        np.zeros(samples),
    ]
    chunks = np.stack(waveforms).astype(np.float32)
    *logits, embedding = map(torch.from_numpy, OnnxBackend(path, config, threads=1)(chunks))
    exported = [embedding.numpy()] if not config.labels else [part.double().sigmoid().numpy() for part in logits]
    single, double = both_precisions(model, chunks)
    return _distance(exported, double), _distance(single, double)


def both_precisions(model: SoundModel, chunks: Array) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Return what a model says of chunks in single and in double precision.

    Args:
        model: on the CPU, in evaluation mode.
        chunks: (batch, heard_samples), or a native size of it.

    Returns:
        Twice clip and frame posteriors; of a model without classes the embeddings.
    """
    waveform = torch.from_numpy(chunks)
    with torch.inference_mode():
        outputs = model(waveform, "native"), copy.deepcopy(model).double()(waveform.double(), "native")
    single, double = (
        [output.embedding.numpy()]
        if output.clipwise_logits is None or output.framewise_logits is None
        else [logits.double().sigmoid().numpy() for logits in (output.clipwise_logits, output.framewise_logits)]
        for output in outputs
    )
    return single, double


def _distance(found: list[NDArray[Any]], exact: list[NDArray[Any]]) -> float:
    """Return the largest difference of posteriors; of embeddings relative to the largest."""
    scale = max(1.0, *(float(np.abs(b).max()) for b in exact))  # posteriors are at most 1
    return float(np.max([np.abs(a - b).max() for a, b in zip(found, exact, strict=True)])) / scale  # NaN stays NaN
