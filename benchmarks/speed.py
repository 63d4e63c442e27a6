"""Speed of our model against a plain port of the same network, side by side in one run.

    python benchmarks/speed.py [--threads 2] [--rounds 9] [--batches 1 8]

Ten-second clips at 32 kHz, waveform to clip and frame posteriors, float32, random weights (the same in both),
527 classes. The two are measured in turn, A B A B, so that what else runs on the machine meets both; ratios are the
figures to read, and the ratio of minima is the steadier one. Prints a markdown table.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from plain_port import PlainHTSAT, plain_port_of
from torch import Tensor

from htsat.config import FrontendConfig, ModelConfig
from htsat.model.htsat import HTSAT

#: largest difference of posteriors between the two at which they count as the same network
AGREEMENT = 1e-5


def make_models(seed: int = 0) -> tuple[HTSAT, PlainHTSAT]:
    """Return our 527-class model and the plain port with the same random weights.

    Weights are random, but not as small as at the start of training: posteriors that are all 0.5 would agree
    whatever is computed.
    """
    torch.manual_seed(seed)
    model = HTSAT(FrontendConfig(), ModelConfig()).eval()
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
    return model, plain_port_of(model)


def ours(model: HTSAT, waveform: Tensor) -> tuple[Tensor, Tensor]:
    """Return clip and frame posteriors, (batch, num_classes) and (batch, num_tokens, num_classes)."""
    output = model(waveform)
    return output.clipwise_logits.sigmoid(), output.framewise_logits.sigmoid()


def plain(port: PlainHTSAT, waveform: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same of the plain port; its framewise output is 1024 repeated rows."""
    output = port(waveform)
    return output["clipwise"], output["framewise"]


def agreement(model: HTSAT, port: PlainHTSAT, waveform: Tensor) -> float:
    """Return the largest difference between the posteriors of the two."""
    clip_a, frame_a = ours(model, waveform)
    clip_b, frame_b = plain(port, waveform)
    frame_b = frame_b[:, :: frame_b.shape[1] // frame_a.shape[1]]
    return max(float((clip_a - clip_b).abs().max()), float((frame_a - frame_b).abs().max()))


def interleave(candidates: dict[str, Callable[[], object]], rounds: int, warmups: int = 2) -> dict[str, list[float]]:
    """Return seconds per call of each candidate, called in turn ``rounds`` times after some warm-up calls."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warmups + rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if number >= warmups:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def cpu_name() -> str:
    """Return the CPU's model name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def load() -> str:
    """Return the load averages of 1, 5 and 15 minutes."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"


def busy() -> bool:
    """Tell whether other programs already use more than a quarter of a core."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.25


def positive(text: str) -> int:
    """Return a positive integer of the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def main() -> int:
    """Measure and print; exit code 1 if the two do not agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads of PyTorch (default 2)")
    parser.add_argument("--rounds", type=positive, default=9, help="measured calls of each model (default 9)")
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 8], help="batch sizes (default 1 8)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    was_busy, load_before = busy(), load()

    model, port = make_models()
    generator = torch.Generator().manual_seed(1)
    rows = []
    with torch.inference_mode():
        for batch in arguments.batches:
            waveform = 0.1 * torch.randn(batch, model.chunk_samples, generator=generator)
            difference = agreement(model, port, waveform)
            if difference > AGREEMENT:
                print(f"batch {batch}: posteriors differ by {difference:.1e}, nothing to compare", file=sys.stderr)
                return 1
            seconds = interleave(
                {
                    "plain": lambda waveform=waveform: plain(port, waveform),  # type: ignore[misc]
                    "ours": lambda waveform=waveform: ours(model, waveform),  # type: ignore[misc]
                },
                arguments.rounds,
            )
            per_clip = {name: [1000 * s / batch for s in values] for name, values in seconds.items()}
            median = {name: statistics.median(values) for name, values in per_clip.items()}
            least = {name: min(values) for name, values in per_clip.items()}
            times = [median["plain"], least["plain"], median["ours"], least["ours"]]
            ratios = [median["plain"] / median["ours"], least["plain"] / least["ours"]]
            cells = [str(batch), *(f"{t:.1f}" for t in times), *(f"{r:.2f}" for r in ratios), f"{difference:.1e}"]
            rows.append(f"| {' | '.join(cells)} |")

    print("Milliseconds per 10-s clip, waveform to posteriors, 527 classes, float32\n")
    print(
        "| batch | plain, median | plain, min | ours, median | ours, min | ratio of medians | ratio of minima "
        "| largest difference |"
    )
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    print(
        f"\ntorch {torch.__version__}, {arguments.threads} threads of {os.cpu_count()} ({cpu_name()}), "
        f"{arguments.rounds} rounds, interleaved"
    )
    print(f"load average before: {load_before}; after: {load()}")
    if was_busy:
        print(
            "warning: other programs were running when this began; trust ratios, of minima most, and no times",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
