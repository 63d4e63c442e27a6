"""Time and memory of a training step: ours, the plainly written HTS-AT, and AST.

A step is waveform to loss, backward pass and AdamW (fused; weight decay on everything), on ten-second clips with random
weights, in float32 and under bfloat16 autocast. Ours and AST have binary cross-entropy on logits, the plain one on
posteriors, as published. AST's step takes seconds per clip, so it has fewer clips; its forward and backward pass are
divided by those, and its AdamW, whose cost does not depend on the clips, by the batch of the others. Peak memory is
that of the whole process, hence with gradients and the state of AdamW; it is given at the batch that was timed and, of
all, at AST's.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from htsat.apps.bench.measure import BenchError, Times, peak_memory, processes, take_turns
from htsat.config import CheckpointConfig, FrontendConfig, ModelConfig
from htsat.errors import HtsatError

if TYPE_CHECKING:
    from torch import Tensor, nn

Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
#: what can be trained here
NETWORKS = ("plain", "torch", "ast")
#: clips in a step of AST, at most
AST_BATCH = 2
ROUNDS = 3


@dataclass(frozen=True)
class Step:
    """One step: seconds of its parts, processor seconds of all threads, and the peak memory so far.

    Attributes:
        passes: seconds of the forward and the backward pass.
        optimiser: seconds of AdamW.
        processor_passes: processor seconds of the passes.
        processor_optimiser: those of AdamW.
        peak: bytes.
        loss: of the batch.
    """

    passes: float
    optimiser: float
    processor_passes: float
    processor_optimiser: float
    peak: int
    loss: float


@dataclass(frozen=True)
class TrainingJob:
    """Trains a network in its process.

    Attributes:
        network: of ``NETWORKS``.
        batch: clips in a step.
        precision: of the passes.
        threads: of the CPU.
        frontend: of ours and the plain one.
        model: the same.
    """

    network: str
    batch: int
    precision: Precision
    threads: int
    frontend: FrontendConfig
    model: ModelConfig

    @property
    def name(self) -> str:
        """Name of the network."""
        return self.network

    def start(self) -> Callable[[Any], Step]:
        """Build the network; see ``measure.Job``."""
        import torch

        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        network, loss_of, rate = self._built()
        network.train()
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
        waveform = 0.1 * torch.randn(self.batch, round(self.model.chunk_seconds * rate))
        targets = (torch.rand(self.batch, self.model.num_classes) < 0.01).float()

        def step(_: Any) -> Step:
            clock, processor = [time.perf_counter()], [time.process_time()]
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
                output = network(waveform)
            loss = loss_of(output, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            clock.append(time.perf_counter())
            processor.append(time.process_time())
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            clock.append(time.perf_counter())
            processor.append(time.process_time())
            (passes, optimising), (working, work) = (
                [b - a for a, b in itertools.pairwise(times)] for times in (clock, processor)
            )
            return Step(passes, optimising, working, work, peak_memory(), float(loss.detach()))

        return step

    def _built(self) -> "tuple[nn.Module, Callable[[Any, Tensor], Tensor], int]":
        """Return a network, the loss of what it says, and Hz of what it hears."""
        from torch.nn import functional as F

        if self.network == "ast":
            from htsat.apps.bench.baselines import AST, RATES

            return (
                AST(self.model.num_classes),
                lambda logits, targets: F.binary_cross_entropy_with_logits(logits.float(), targets),
                RATES["ast"],
            )
        if self.network == "plain":
            from htsat.apps.bench.plain import PlainHTSAT

            return (
                PlainHTSAT(self.frontend, self.model),
                lambda said, targets: F.binary_cross_entropy(said["clipwise"].float(), targets),
                self.frontend.sample_rate,
            )
        from htsat.model.architectures import build_model

        return (
            build_model(self.frontend, self.model),
            lambda output, targets: F.binary_cross_entropy_with_logits(output.clipwise_logits.float(), targets),
            self.frontend.sample_rate,
        )


@dataclass(frozen=True)
class TrainingRow:
    """Figures of a network in one precision; times are milliseconds per clip.

    Attributes:
        network: of ``NETWORKS``.
        precision: of the passes.
        batch: clips in a step.
        rounds: steps that were timed.
        median_ms: by the clock.
        min_ms: the same.
        processor_ms: the least of all threads together.
        peak_bytes: that its process held at most; 0 if unknown.
        peak_bytes_small: the same with steps on as many clips as AST's.
    """

    network: str
    precision: str
    batch: int
    rounds: int
    median_ms: float
    min_ms: float
    processor_ms: float
    peak_bytes: int
    peak_bytes_small: int


def measure_training(
    names: Sequence[str],
    batch: int,
    rounds: int | None,
    threads: int,
    on_progress: Callable[[str, float], None],
    on_failure: Callable[[str, HtsatError], None],
    config: CheckpointConfig,
) -> list[TrainingRow]:
    """Return the figures of all networks, in float32 and bfloat16.

    Args:
        names: of ``NETWORKS``.
        batch: clips in a step; of AST at most two.
        rounds: steps to be timed; None: a few.
        threads: of the CPU.
        on_progress: told what happens, and the share that is done.
        on_failure: told of each network that fails.
        config: of ours and the plain one.
    """
    rows: list[TrainingRow] = []
    small = min(batch, AST_BATCH)
    for number, precision in enumerate(PRECISIONS):
        jobs = [
            TrainingJob(name, small if name == "ast" else batch, precision, threads, config.frontend, config.model)
            for name in names
        ]
        batches = {job.name: job.batch for job in jobs}
        with processes(jobs, on_failure) as workers:
            calls = {worker.name: partial(worker.ask, None) for worker in workers}
            counts = dict.fromkeys(calls, 1 + (rounds or ROUNDS))  # one to warm up

            def turn(name: str, number: int = number, precision: str = precision) -> None:
                on_progress(f"training step, {precision}: {name}", number / len(PRECISIONS))

            steps: dict[str, list[Step]] = {name: found[1:] for name, found in take_turns(calls, counts, turn).items()}
        for job in jobs:
            if job.name not in steps:
                continue
            found = steps[job.name]
            if not all(math.isfinite(step.loss) for step in found):
                on_failure(job.name, BenchError(f"{job.name}: its loss is not finite in {precision}; not shown"))
                continue
            peak = peak_small = found[-1].peak
            if batches[job.name] != small:
                with processes([replace(job, batch=small)]) as [worker]:
                    peak_small = [worker.ask(None) for _ in range(2)][-1].peak
            rows.append(_row(job, batch, found, peak, peak_small))
    return rows


def _row(job: TrainingJob, batch: int, steps: Sequence[Step], peak: int, peak_small: int) -> TrainingRow:
    times = Times.of([1000 * (step.passes / job.batch + step.optimiser / batch) for step in steps])
    processor = min(1000 * (step.processor_passes / job.batch + step.processor_optimiser / batch) for step in steps)
    return TrainingRow(
        job.name,
        job.precision,
        job.batch,
        len(steps),
        times.median,
        times.minimum,
        processor,
        peak,
        peak_small,
    )
