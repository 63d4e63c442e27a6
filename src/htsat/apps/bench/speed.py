"""Time and memory from waveforms to posteriors, of each candidate, and how far they are from exact ones."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from htsat.apps.bench.candidates import BASELINES, OWN, Candidate
from htsat.apps.bench.measure import (
    BenchError,
    Job,
    Sample,
    Times,
    forget_peak,
    held_memory,
    processes,
    sample,
    take_turns,
)
from htsat.apps.bench.subjects import Subject, batch_of, difference
from htsat.errors import HtsatError
from htsat.hearing import sigmoid

Array = NDArray[np.float32]
#: from waveforms (batch, num_samples) to clip and frame posteriors; nothing of a network with other weights
Call = Callable[[Array], list[Array]]

#: seconds that a candidate may be timed for at each batch size, if rounds are not asked for
BUDGET = 12.0
#: calls timed of each candidate that is not slow, and of each that is
ROUNDS, FEWEST = 5, 2
#: seconds of a call from which on it is long enough to need no untimed call before it
LONG = 0.5


@dataclass(frozen=True)
class Trial:
    """What a candidate did when it was first called.

    Attributes:
        clipwise: largest difference of clip posteriors from exact ones; None without a reference.
        framewise: the same of frames.
        seconds: that a call takes once warm.
    """

    clipwise: float | None
    framewise: float | None
    seconds: float


@dataclass(frozen=True)
class SpeedJob:
    """Runs a candidate in its process.

    Attributes:
        candidate: what runs.
        subject: whose weights it has; None of a baseline.
        threads: of the CPU.
        classes: of a baseline.
    """

    candidate: Candidate
    subject: Subject | None
    threads: int
    classes: int = 527

    @property
    def name(self) -> str:
        """Name of the candidate."""
        return self.candidate.name

    def start(self) -> Callable[[Any], Any]:
        """Load the network; see ``measure.Job``."""
        exact: dict[str, NDArray[Any]] = {}
        if self.subject is None:
            from htsat.apps.bench.baselines import RATES, SECONDS

            chunks = 0.1 * np.random.default_rng(1).standard_normal((1, RATES[self.candidate.kind] * SECONDS))
        else:
            with np.load(self.subject.reference) as stored:
                exact = dict(stored)
            chunks = exact.pop("chunks")
        call = self._load()
        forget_peak()
        return partial(self._answer, call, chunks.astype(np.float32), exact, held_memory())

    def _answer(
        self, call: Call, chunks: Array, exact: dict[str, NDArray[Any]], held: int, request: tuple[str, int]
    ) -> Any:
        """Do what is asked for: ("try", batch) gives a ``Trial``, ("time", batch) a ``Sample``, ("held", 0) bytes."""
        wanted, batch = request
        if wanted == "held":
            return held
        waveforms = batch_of(chunks, batch)
        if wanted == "time":
            return sample(lambda: call(waveforms))
        found = call(waveforms)
        clipwise = framewise = None
        if exact:
            try:
                clipwise, framewise = (
                    difference([posteriors], [batch_of(exact[name], batch)])
                    for posteriors, name in zip(found, ("clipwise", "framewise"), strict=True)
                )
            except BenchError as error:
                raise BenchError(f"{self.name}: {error}; not timed") from None
        largest = max(clipwise or 0.0, framewise or 0.0)
        if self.subject is not None and self.candidate.is_float32 and largest > self.subject.tolerance:
            raise BenchError(
                f"{self.name}: its posteriors differ by {largest:.1e} from those in double precision, more than "
                f"{self.subject.tolerance:.0e}, which rounding does not explain; not timed"
            )
        start = time.perf_counter()
        call(waveforms)
        return Trial(clipwise, framewise, time.perf_counter() - start)

    def _load(self) -> Call:
        kind = self.candidate.kind
        if kind in OWN:
            from htsat.backends import open_model

            assert self.subject is not None
            path = self.subject.export if self.candidate.is_exported else self.subject.checkpoint
            assert path is not None
            backend, precision = OWN[kind]
            runner = open_model(path, backend=backend, precision=precision, device="cpu", threads=self.threads)

            def own(waveforms: Array) -> list[Array]:
                return [sigmoid(logits) for logits in runner.backend(waveforms)[:2]]

            return own
        import torch

        torch.set_num_threads(self.threads)
        if kind in BASELINES:
            from htsat.apps.bench.baselines import build

            network = build(kind, self.classes)

            def baseline(waveforms: Array) -> list[Array]:
                with torch.inference_mode():
                    network(torch.from_numpy(waveforms))
                return []

            return baseline
        from htsat.apps.bench.plain import plain_port_of
        from htsat.model.checkpoint import load_checkpoint

        assert self.subject is not None and self.subject.checkpoint is not None
        model, config = load_checkpoint(self.subject.checkpoint)
        port = plain_port_of(model)
        del model

        def plain(waveforms: Array) -> list[Array]:
            with torch.inference_mode():
                said = port(torch.from_numpy(waveforms))
            # Its framewise output repeats each token.
            framewise = said["framewise"][:, :: said["framewise"].shape[1] // config.heard_tokens]
            return [said["clipwise"].numpy(), framewise.numpy()]

        return plain


@dataclass(frozen=True)
class SpeedRow:
    """Figures of a candidate at a batch size; times are milliseconds per clip.

    Attributes:
        candidate: its name.
        batch: clips in a call.
        rounds: calls that were timed.
        median_ms: by the clock.
        min_ms: the same.
        processor_ms: the least of all threads together.
        peak_bytes: that its process held at most; 0 if unknown.
        added_bytes: those beyond what it held with the network loaded.
        clipwise_difference: largest of posteriors from those in double precision; None of other networks.
        framewise_difference: the same of frames.
        samples_ms: all by the clock.
    """

    candidate: str
    batch: int
    rounds: int
    median_ms: float
    min_ms: float
    processor_ms: float
    peak_bytes: int
    added_bytes: int
    clipwise_difference: float | None
    framewise_difference: float | None
    samples_ms: tuple[float, ...]


def measure_speed(
    jobs: Sequence[Job],
    batches: Sequence[int],
    rounds: int | None,
    on_progress: Callable[[str, float], None],
    on_failure: Callable[[str, HtsatError], None],
) -> list[SpeedRow]:
    """Return the figures of all candidates that can be run, batch by batch.

    Args:
        jobs: one per candidate.
        batches: clips in a call.
        rounds: calls to be timed of each; None: as many as fit a few seconds.
        on_progress: told what happens, and the share that is done.
        on_failure: told of each candidate that fails, which is then measured no more.
    """
    rows: list[SpeedRow] = []
    with processes(jobs, on_failure, lambda name: on_progress(f"loading {name}", 0.0)) as workers:
        held = {worker.name: worker.ask(("held", 0)) for worker in workers}
        for number, batch in enumerate(sorted(set(batches))):  # memory grows with the batch and is never given back
            trials: dict[str, Trial] = {}
            for worker in list(workers):
                on_progress(f"batch {batch}: trying {worker.name}", (number + 0.1) / len(set(batches)))
                try:
                    trials[worker.name] = worker.ask(("try", batch))
                except HtsatError as error:
                    on_failure(worker.name, error)
                    workers.remove(worker)

            def timed(name: str, batch: int = batch, trials: dict[str, Trial] = trials) -> Sample | None:
                """Let a worker run once, after an untimed call where that takes no time worth speaking of."""
                for worker in workers:
                    if worker.name == name:
                        try:
                            if trials[name].seconds < LONG:
                                worker.ask(("time", batch))
                            found: Sample = worker.ask(("time", batch))
                            return found
                        except HtsatError as error:
                            on_failure(name, error)
                            workers.remove(worker)
                            break
                return None

            calls = {worker.name: partial(timed, worker.name) for worker in workers}
            counts = {name: rounds or usual_rounds(trials[name].seconds) for name in calls}
            turns, done = max(1, sum(counts.values())), 0

            def turn(name: str, batch: int = batch, number: int = number, turns: int = turns) -> None:
                nonlocal done
                on_progress(f"batch {batch}: {name}", (number + 0.2 + 0.8 * done / turns) / len(set(batches)))
                done += 1

            for name, found in take_turns(calls, counts, turn).items():
                if samples := [one for one in found if one is not None]:
                    rows.append(_row(name, batch, trials[name], held[name], samples))
    return rows


def usual_rounds(seconds: float) -> int:
    """Return how often a call of so many seconds is timed, if nobody says."""
    return max(FEWEST, min(ROUNDS, int(BUDGET / max(seconds, 1e-9))))


def _row(name: str, batch: int, trial: Trial, held: int, samples: list[Sample]) -> SpeedRow:
    wall = [1000 * s.wall / batch for s in samples]
    times, peak = Times.of(wall), max(s.peak for s in samples)
    return SpeedRow(
        name,
        batch,
        len(samples),
        times.median,
        times.minimum,
        min(1000 * s.processor / batch for s in samples),
        peak,
        max(0, peak - held),
        trial.clipwise,
        trial.framewise,
        tuple(wall),
    )
