"""Time and memory of a training step: ours, a plain port of the published HTS-AT, and AST, in one run.

    python benchmarks/training_step.py [--threads 2] [--rounds 3] [--batch 8] [--ast-batch 2]
                                       [--precisions float32 bfloat16] [--json FILE] [--prefer] [--keep-memory]

A step is waveform to loss, backward pass and AdamW, on ten-second clips with 527 classes, in float32 and under
bfloat16 autocast; weights are random. The three networks:

* ours: ``htsat``'s default model at 32 kHz, binary cross-entropy on logits;
* plain: ``plain_port.py``, written as the published code is (without its stochastic depth, which costs it nothing
  here), binary cross-entropy on posteriors as published;
* AST: ``transformers``' ``ASTForAudioClassification`` in its default configuration but for the classes, at 16 kHz,
  behind a PyTorch port of Kaldi's filter bank (1024 frames x 128 bands), binary cross-entropy on logits.

Each network lives in a process of its own, so that its peak memory is its own; the processes step in turn, A B C A
B C, so that what else runs on the machine meets all of them. Ratios are the figures to read. AST's step takes many
seconds, so it steps on fewer clips; its forward and backward pass are divided by those, and its AdamW, whose cost
does not depend on the clips, by the batch of the others. All three use the same AdamW (fused; weight decay on
everything). Peak memory is the resident set of the whole process after all rounds, hence with gradients and the state
of AdamW; it is given at the batch that was timed and, of all three, at AST's.

Processor time counts all threads. It is the steadier figure on a busy machine with ``--threads 1``; with more,
threads that wait for each other count as working.
"""

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from plain_port import PlainHTSAT
from speed import busy, cpu_name, load, positive
from torch import Tensor, nn
from torch.nn import functional as F

from htsat.config import FrontendConfig, ModelConfig
from htsat.model.htsat import HTSAT

CLASSES = 527
SECONDS = 10
NETWORKS = ("ours", "plain", "AST")
PRECISIONS = ("float32", "bfloat16")
#: share of all processors that others may use before the figures are called doubtful
OTHERS = 0.1


class KaldiFilterBank(nn.Module):
    """Waveform (batch, num_samples) at 16 kHz -> normalised log filter bank (batch, 1024, 128), as AST is fed.

    Kaldi's ``fbank`` with a Hann window and without dither, as in transformers' ``ASTFeatureExtractor``.
    """

    def __init__(self) -> None:
        from transformers.audio_utils import mel_filter_bank

        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the lowest band holds no bin, in Kaldi too
            filters = mel_filter_bank(
                num_frequency_bins=257,
                num_mel_filters=128,
                min_frequency=20,
                max_frequency=8000,
                sampling_rate=16000,
                norm=None,
                mel_scale="kaldi",
                triangularize_in_mel_space=True,
            )
        self.register_buffer("filters", torch.from_numpy(filters).float())
        self.register_buffer("window", torch.hann_window(400, periodic=False))
        self.filters: Tensor
        self.window: Tensor

    @torch.no_grad()
    def forward(self, waveform: Tensor) -> Tensor:
        frames = waveform.unfold(-1, 400, 160)
        frames = frames - frames.mean(-1, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
        spectrum = torch.fft.rfft((frames - 0.97 * previous) * self.window, 512)
        power = spectrum.real.square() + spectrum.imag.square()
        bands = (power @ self.filters).clamp_min(1.192092955078125e-07).log()[:, :1024]
        return (F.pad(bands, (0, 0, 0, 1024 - bands.shape[1])) + 4.2677393) / (2 * 4.5689974)


def build(network: str, batch: int) -> tuple[nn.Module, Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """Return a network in training mode, what runs it on a batch, and the loss of what that returns."""
    torch.manual_seed(0)
    targets = (torch.rand(batch, CLASSES) < 0.01).float()
    if network == "AST":
        from transformers import ASTConfig, ASTForAudioClassification

        filter_bank = KaldiFilterBank()
        ast = ASTForAudioClassification(ASTConfig(num_labels=CLASSES)).train()  # type: ignore[call-arg]
        waveform = 0.1 * torch.randn(batch, 16000 * SECONDS)

        def run_ast() -> Tensor:
            with torch.autocast("cpu", enabled=False):
                bands = filter_bank(waveform)
            logits: Tensor = ast(bands).logits
            return logits

        return ast, run_ast, lambda logits: F.binary_cross_entropy_with_logits(logits.float(), targets)
    frontend, config = FrontendConfig(), ModelConfig(num_classes=CLASSES)
    waveform = 0.1 * torch.randn(batch, frontend.sample_rate * SECONDS)
    if network == "plain":
        port = PlainHTSAT(frontend, config).train()

        def run_plain() -> Tensor:
            posteriors: Tensor = port(waveform)["clipwise"]
            return posteriors

        return port, run_plain, lambda posteriors: F.binary_cross_entropy(posteriors.float(), targets)
    model = HTSAT(frontend, config).train()

    def run_ours() -> Tensor:
        logits: Tensor = model(waveform).clipwise_logits
        return logits

    return model, run_ours, lambda logits: F.binary_cross_entropy_with_logits(logits.float(), targets)


@dataclass(frozen=True)
class Job:
    """What a process is to measure: a network, its batch and how."""

    network: str
    batch: int
    precision: str
    threads: int
    keep_memory: bool


@dataclass(frozen=True)
class Step:
    """One step: seconds of its parts by the clock, processor seconds, and the peak memory so far."""

    forward: float
    backward: float
    optimiser: float
    processor: float
    processor_optimiser: float
    peak_gb: float
    loss: float


def serve(connection: Connection, job: Job) -> None:
    """Build a network, tell how many parameters it has, and make a step whenever asked to, until told False."""
    if job.keep_memory:
        keep_memory()
    torch.set_num_threads(job.threads)
    model, run, loss_of = build(job.network, job.batch)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    connection.send(sum(parameter.numel() for parameter in model.parameters()))
    while connection.recv():
        start, start_processor = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=job.precision == "bfloat16"):
            output = run()
        loss = loss_of(output)
        forward = time.perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        backward, before = time.perf_counter(), time.process_time()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        end, end_processor = time.perf_counter(), time.process_time()
        # Kilobytes on Linux, bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        connection.send(
            Step(
                forward - start,
                backward - forward,
                end - backward,
                end_processor - start_processor,
                end_processor - before,
                peak / 1e9,
                float(loss.detach()),
            )
        )


def keep_memory() -> None:
    """Let glibc keep freed memory instead of giving it back to the system, which must clear it at every step."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        raise SystemExit("--keep-memory is for glibc; leave it out")
    m_trim_threshold, m_mmap_threshold = -1, -3
    library.mallopt(m_mmap_threshold, 2**30)
    library.mallopt(m_trim_threshold, 2**31 - 1)


@contextmanager
def processes(jobs: list[Job]) -> Iterator[list[tuple[Connection, int]]]:
    """Start a process per job; give the connection to each and its number of parameters."""
    context = multiprocessing.get_context("spawn")  # nothing of this process, least of all its memory, is inherited
    started, ends = [], []
    try:
        for job in jobs:
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            started.append(process)
            ends.append(mine)
        yield [(end, end.recv()) for end in ends]
        for end in ends:
            end.send(False)
        for process in started:
            process.join()
    finally:
        for process in started:
            process.terminate()


def step(connection: Connection) -> Step:
    """Let a process make one step."""
    connection.send(True)
    result: Step = connection.recv()
    if not math.isfinite(result.loss):
        raise SystemExit("a loss is not finite: nothing to compare")
    return result


def prefer() -> None:
    """Ask Linux to prefer this session's programs to those of others while it measures (needs to be root)."""
    try:
        Path("/proc/self/autogroup").write_text("-15")
    except OSError as error:
        raise SystemExit(f"--prefer: {error}; leave it out") from None


def processor_seconds() -> tuple[float, float] | None:
    """Return the seconds that all processors of the machine have worked, and those that there were; Linux only."""
    try:
        times = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return (sum(times) - times[3] - times[4]) / os.sysconf("SC_CLK_TCK"), sum(times) / os.sysconf("SC_CLK_TCK")


def measure(arguments: argparse.Namespace, precision: str) -> list[dict[str, object]]:
    """Return one row per network: figures per clip in milliseconds, and all its steps."""
    batches = {name: arguments.ast_batch if name == "AST" else arguments.batch for name in NETWORKS}
    jobs = [Job(name, batches[name], precision, arguments.threads, arguments.keep_memory) for name in NETWORKS]
    steps: dict[str, list[Step]] = {name: [] for name in NETWORKS}
    with processes(jobs) as workers:
        parameters = dict(zip(NETWORKS, (count for _, count in workers), strict=True))
        for number in range(1 + arguments.rounds):  # one to warm up
            for name, (connection, _) in zip(NETWORKS, workers, strict=True):
                result = step(connection)
                if number:
                    steps[name].append(result)
    memory = {"AST": steps["AST"][-1].peak_gb}
    for job in jobs:
        if job.network not in memory:
            with processes([replace(job, batch=arguments.ast_batch)]) as [worker]:
                memory[job.network] = [step(worker[0]) for _ in range(2)][-1].peak_gb
    rows: list[dict[str, object]] = []
    for name in NETWORKS:
        wall = [1000 * ((s.forward + s.backward) / batches[name] + s.optimiser / arguments.batch) for s in steps[name]]
        work = [
            1000 * ((s.processor - s.processor_optimiser) / batches[name] + s.processor_optimiser / arguments.batch)
            for s in steps[name]
        ]
        rows.append(
            {
                "precision": precision,
                "network": name,
                "parameters": parameters[name],
                "batch": batches[name],
                "median_ms": statistics.median(wall),
                "min_ms": min(wall),
                "processor_ms": min(work),
                "peak_gb": steps[name][-1].peak_gb,
                "peak_gb_at_ast_batch": memory[name],
                "steps": [asdict(s) for s in steps[name]],
            }
        )
    for row in rows:
        for figure in ("median_ms", "min_ms", "processor_ms"):
            row[f"{figure}_of_ast"] = row[figure] / rows[-1][figure]  # type: ignore[operator]
    return rows


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads of each network (default 2)")
    parser.add_argument("--rounds", type=positive, default=3, help="measured steps of each network (default 3)")
    parser.add_argument("--batch", type=positive, default=8, help="clips in a step of ours and plain (default 8)")
    parser.add_argument("--ast-batch", type=positive, default=2, help="clips in a step of AST (default 2)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this file")
    parser.add_argument("--prefer", action="store_true", help="outrank other programs while measuring (Linux, root)")
    parser.add_argument(
        "--keep-memory", action="store_true", help="all three keep freed memory instead of returning it (glibc)"
    )
    arguments = parser.parse_args()
    try:
        import transformers
    except ImportError:
        print("AST needs transformers: pip install transformers", file=sys.stderr)
        return 1
    was_busy, load_before = busy(), load()
    if arguments.prefer:
        prefer()
    before, children_before = processor_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN)

    rows = [row for precision in arguments.precisions for row in measure(arguments, precision)]

    after, children = processor_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN)
    others = None
    if before and after:
        ours = children.ru_utime + children.ru_stime - children_before.ru_utime - children_before.ru_stime
        others = max(0.0, (after[0] - before[0] - ours) / (after[1] - before[1]))
    machine = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": cpu_name(),
        "processors": os.cpu_count(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "keep_memory": arguments.keep_memory,
        "load_before": load_before,
        "load_after": load(),
        "share_of_others": others,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1), encoding="utf-8")

    print(f"Training step on {SECONDS}-s clips, {CLASSES} classes: milliseconds per clip, and share of AST's\n")
    print(
        "| precision | network | parameters, M | batch | median | min | processor, min | of AST: median | min "
        f"| processor | peak GB | peak GB at batch {arguments.ast_batch} |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['precision']} | {row['network']} | {row['parameters'] / 1e6:.1f} | {row['batch']} "  # type: ignore[operator]
            f"| {row['median_ms']:.0f} | {row['min_ms']:.0f} | {row['processor_ms']:.0f} "
            f"| {row['median_ms_of_ast']:.1%} | {row['min_ms_of_ast']:.1%} | {row['processor_ms_of_ast']:.1%} "
            f"| {row['peak_gb']:.2f} | {row['peak_gb_at_ast_batch']:.2f} |"
        )
    print(
        f"\ntorch {machine['torch']}, transformers {machine['transformers']}, {arguments.threads} threads of "
        f"{os.cpu_count()} ({cpu_name()}), {arguments.rounds} rounds, interleaved"
    )
    print(f"load average before: {load_before}; after: {load()}")
    if others is not None:
        print(f"share of all processors that other programs used meanwhile: {others:.0%}")
    if was_busy or (others or 0.0) > OTHERS:
        print(
            "warning: other programs ran meanwhile; trust ratios, of minima and of processor time most, and no times",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
