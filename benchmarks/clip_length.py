"""What a short clip costs in training: at its own length, and repeated to a chunk as published.

Forward, backward and optimiser of the same network on the same clips, taken in turns; medians of the process's CPU
time per clip. Run: python benchmarks/clip_length.py [--rounds 5] [--threads 1]
"""

import argparse
import json
import statistics
import time

import torch

from htsat.config import FrontendConfig, ModelConfig
from htsat.model.htsat import HTSAT, Fit
from htsat.training.recipe import load_recipe

CASES = {
    "published network, 1 s at 16 kHz": (
        FrontendConfig(sample_rate=16000, hop_length=160),
        ModelConfig(num_classes=35),
        1,
    ),
    "published network, 5 s at 32 kHz": (FrontendConfig(), ModelConfig(num_classes=50), 5),
}


def step(model: HTSAT, optimiser: torch.optim.Optimizer, waveforms: torch.Tensor, fit: Fit) -> float:
    """Return the CPU seconds of one training step per clip."""
    began = time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(waveforms, fit).clipwise_logits
    logits.float().logsumexp(1).mean().backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return (time.process_time() - began) / len(waveforms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keywords = load_recipe("speech_commands").with_labels(tuple(str(i) for i in range(35)))
    cases = CASES | {"recipe speech_commands, 1 s": (keywords.frontend, keywords.model, 1)}
    rows = []
    for name, (frontend, config, seconds) in cases.items():
        model = HTSAT(frontend, config).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        waveforms = 0.1 * torch.randn(args.batch, seconds * frontend.sample_rate)
        times: dict[Fit, list[float]] = {"native": [], "tile": []}
        for turn in range(args.rounds + 1):
            for fit, found in times.items():
                found.append(step(model, optimiser, waveforms, fit))
                if turn == 0:
                    found.clear()  # the first one allocates
        native, tile = (statistics.median(times[fit]) * 1000 for fit in ("native", "tile"))
        rows.append({"case": name, "native_ms": native, "tile_ms": tile, "ratio": tile / native})
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'CPU ms per clip and training step':<36} {'native':>8} {'repeated':>9} {'ratio':>6}")
    for row in rows:
        print(f"{row['case']:<36} {row['native_ms']:8.1f} {row['tile_ms']:9.1f} {row['ratio']:6.2f}")


if __name__ == "__main__":
    main()
