"""Time and memory of ``htsat detect`` and ``htsat tag`` on recordings of many hours.

    python benchmarks/long_recording.py [--hours 1 10] [--model CHECKPOINT] [--limit-gb 1.5]

Makes a recording of each length (8 kHz mono FLAC, about 15 MB an hour, deleted at the end), runs each command in a
process of its own on one CPU thread, and prints a markdown table with the largest resident memory of that process.
Exits with 1 if a run fails or exceeds the limit. Without --model, a random network with 527 classes at 32 kHz that is
so small that its time hardly counts: what is measured is the path around the network.

The one thing that may grow is the result: the framewise posteriors of 527 classes take 24 MB an hour.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

RATE = 8000
COMMANDS = {"detect": ["--format", "tsv"], "tag": ["--json"]}
MAKE_MODEL = """
import sys, torch
from htsat.config import CheckpointConfig, FrontendConfig, ModelConfig
from htsat.labels import label_set
from htsat.model.checkpoint import save_checkpoint
from htsat.model.htsat import HTSAT
torch.manual_seed(0)
frontend = FrontendConfig(n_fft=2048, hop_length=1600, n_mels=16)
model = ModelConfig(num_classes=527, embed_dim=16, depths=(1, 1), num_heads=(2, 4), patch_size=4, image_size=64)
config = CheckpointConfig(frontend, model, labels=tuple(label_set("audioset")))
save_checkpoint(sys.argv[1], HTSAT(config.frontend, config.model), config)
"""


def write_recording(path: Path, hours: float) -> None:
    """Write faint noise with a second of a tone every minute, minute by minute."""
    rng = np.random.default_rng(0)
    seconds = np.arange(RATE) / RATE
    tone = (8000 * np.sin(2 * np.pi * 880 * seconds)).astype(np.int16)
    with soundfile.SoundFile(path, "w", RATE, 1, subtype="PCM_16") as file:
        for _ in range(round(hours * 60)):
            minute = rng.integers(-4, 5, 60 * RATE, dtype=np.int16)
            minute[30 * RATE : 31 * RATE] += tone
            file.write(minute)


def run(arguments: list[str]) -> tuple[int, float, float]:
    """Run a command; return its exit code, seconds and largest resident memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    # not getrusage: that would be the largest of all processes so far
    _, status, usage = os.wait4(process.pid, 0)
    unit = 1 if sys.platform == "darwin" else 1024
    return os.waitstatus_to_exitcode(status), time.perf_counter() - start, usage.ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hours", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--model", help="a checkpoint or a name (default: a narrow random network)")
    parser.add_argument("--limit-gb", type=float, default=1.5)
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model is None:
            model = str(Path(folder, "model.safetensors"))
            subprocess.run([sys.executable, "-c", MAKE_MODEL, model], check=True)
        print("| command | hours | minutes | x real time | largest memory (MB) |", flush=True)
        print("| --- | ---: | ---: | ---: | ---: |", flush=True)
        for hours in options.hours:
            recording = Path(folder, "recording.flac")
            write_recording(recording, hours)
            for command, arguments in COMMANDS.items():
                code, seconds, memory = run(
                    [sys.executable, "-m", "htsat", command, str(recording), "--model", model, *arguments]
                )
                speed = hours * 3600 / seconds
                print(f"| {command} | {hours:g} | {seconds / 60:.1f} | {speed:.0f} | {memory / 1e6:.0f} |", flush=True)
                failed |= code != 0 or memory > options.limit_gb * 1e9
    if failed:
        sys.exit(f"a run failed or took more than {options.limit_gb:g} GB")


if __name__ == "__main__":
    main()
