"""The front end alone: from a waveform to its log-mel spectrogram, in the ways that there are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from htsat.apps.bench.measure import Sample, Times, processes, sample, take_turns
from htsat.config import FrontendConfig
from htsat.errors import HtsatError

Array = NDArray[np.float32]

#: the published one is a convolution with DFT matrices; ours is an FFT in PyTorch, two matrix products in graphs
WAYS = ("convolution", "torch", "onnxruntime", "openvino")
ROUNDS = 20
#: untimed calls before each that is timed: a call is so short that what the others left in the caches would tell
WARM = 2


@dataclass(frozen=True)
class FrontRow:
    """Figures of one way; milliseconds per clip.

    Attributes:
        way: of ``WAYS``.
        rounds: calls that were timed.
        median_ms: by the clock.
        min_ms: the same.
        processor_ms: the least of all threads together.
    """

    way: str
    rounds: int
    median_ms: float
    min_ms: float
    processor_ms: float


@dataclass(frozen=True)
class FrontJob:
    """Runs the front end in a process.

    Attributes:
        way: of ``WAYS``.
        config: the front end.
        num_samples: of the clip.
        threads: of the CPU.
        graph: the exported one; not needed by PyTorch.
    """

    way: str
    config: FrontendConfig
    num_samples: int
    threads: int
    graph: Path | None = None

    @property
    def name(self) -> str:
        """Name of the way."""
        return self.way

    def start(self) -> Callable[[Any], Any]:
        """Make ready; see ``measure.Job``. Its answers are a ``Sample``, or, asked for "said", the spectrogram."""
        waveform = (0.1 * np.random.default_rng(0).standard_normal((1, self.num_samples))).astype(np.float32)
        call = partial(self._load(), waveform)

        def answer(request: Any) -> Any:
            if request == "said":
                return call()
            for _ in range(WARM):
                call()
            return sample(call)

        return answer

    def _load(self) -> Callable[[Array], Array]:
        if self.way == "onnxruntime":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            session = onnxruntime.InferenceSession(self.graph, options, providers=["CPUExecutionProvider"])
            return lambda waveform: session.run(None, {session.get_inputs()[0].name: waveform})[0]
        if self.way == "openvino":
            import openvino

            settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": self.threads, "NUM_STREAMS": 1}
            model = openvino.Core().read_model(self.graph)
            model.reshape([1, self.num_samples])
            request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

            def infer(waveform: Array) -> Array:
                request.get_input_tensor(0).data[:] = waveform
                request.infer()
                return request.get_output_tensor(0).data  # type: ignore[no-any-return]

            return infer
        import torch
        from torch import nn

        torch.set_num_threads(self.threads)
        if self.way == "torch":
            from htsat.model.frontend import LogMel

            network: nn.Module = LogMel(self.config)
        else:
            from htsat.apps.bench.plain import PlainLogMel, PlainSpectrogram

            spectrogram = PlainSpectrogram(self.config.n_fft, self.config.hop_length)
            network = nn.Sequential(spectrogram, PlainLogMel(self.config), nn.Flatten(0, 1))

        def forward(waveform: Array) -> Array:
            with torch.inference_mode():
                return network(torch.from_numpy(waveform)).numpy()  # type: ignore[no-any-return]

        return forward


def write_graph(config: FrontendConfig, num_samples: int, path: Path) -> None:
    """Export the front end alone."""
    from htsat.model.export import front_end_graph

    path.write_bytes(front_end_graph(config, num_samples))


def measure_front(
    jobs: Sequence[FrontJob],
    rounds: int | None,
    on_progress: Callable[[str, float], None],
    on_failure: Callable[[str, HtsatError], None],
) -> list[FrontRow]:
    """Return the figures of each way.

    Args:
        jobs: one for each.
        rounds: calls that are timed; None: a few.
        on_progress: told what happens, and the share that is done.
        on_failure: told of each that cannot be run.
    """
    rows = []
    with processes(jobs, on_failure, lambda name: on_progress(f"front end: loading {name}", 0.0)) as workers:
        counts = {worker.name: 1 + (rounds or ROUNDS) for worker in workers}
        calls = {worker.name: partial(worker.ask, "time") for worker in workers}
        found: dict[str, list[Sample]] = take_turns(calls, counts, lambda name: on_progress(f"front end: {name}", 0.5))
    for name, samples in found.items():
        times = Times.of([1000 * one.wall for one in samples[1:]])
        processor = min(1000 * one.processor for one in samples[1:])
        rows.append(FrontRow(name, len(samples) - 1, times.median, times.minimum, processor))
    return rows
