"""From files: whole commands in cold processes, and the reading of recordings."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from htsat.apps.bench.measure import BenchError, Times, apart, take_turns

#: what libsndfile writes by ending: format, subtype
FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
#: Hz and seconds of the recording that is read
RATE, SECONDS = 44100, 60.0
#: Hz that networks hear
HEARD = 32000
ROUNDS = 5


@dataclass(frozen=True)
class StartupRow:
    """A command in a process of its own, from its start to its end.

    Attributes:
        command: what is run.
        rounds: how often.
        median_s: seconds.
        min_s: seconds.
    """

    command: str
    rounds: int
    median_s: float
    min_s: float


@dataclass(frozen=True)
class DecodeRow:
    """Reading a recording: decoded, mixed to mono and resampled.

    Attributes:
        format: ending of the file.
        rounds: how often.
        median_s: seconds.
        min_s: the same.
        times_real_time: seconds of sound per second, by the median.
    """

    format: str
    rounds: int
    median_s: float
    min_s: float
    times_real_time: float


def startup_commands(clip: Path, backends: Sequence[str], with_torch: bool) -> dict[str, list[str]]:
    """Return the commands whose time is taken, with those of Python alone and of importing torch to compare with."""
    htsat = [sys.executable, "-m", "htsat"]
    commands = {"python -c pass": [sys.executable, "-c", "pass"], "htsat --help": [*htsat, "--help"]}
    if with_torch:
        commands["python -c 'import torch'"] = [sys.executable, "-c", "import torch"]
    for backend in backends:
        commands[f"htsat tag, {backend}"] = [*htsat, "tag", str(clip), "--backend", backend, "--offline"]
    return commands


def measure_startup(
    backends: Sequence[str], with_torch: bool, rounds: int | None, on_progress: Callable[[str, float], None]
) -> list[StartupRow]:
    """Return the times of whole commands, files in the system's cache.

    Args:
        backends: that run the bundled model here.
        with_torch: import torch, to compare.
        rounds: how often each is run; None: a few times.
        on_progress: told what happens, and the share that is done.
    """
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.wav"
        apart("a recording", write_recording, clip, HEARD, 10.0, "wav", 1)
        commands = startup_commands(clip, backends, with_torch)
        counts = dict.fromkeys(commands, 1 + (rounds or ROUNDS))  # one to fill the caches
        turns, done = sum(counts.values()), 0

        def turn(name: str) -> None:
            nonlocal done
            on_progress(f"starting: {name}", done / turns)
            done += 1

        calls = {name: partial(whole, name, command) for name, command in commands.items()}
        found = take_turns(calls, counts, turn)
    times = {name: Times.of(seconds[1:]) for name, seconds in found.items()}
    return [StartupRow(name, counts[name] - 1, t.median, t.minimum) for name, t in times.items()]


def whole(name: str, command: Sequence[str]) -> float:
    """Return the seconds of a process from its start to its end.

    Raises:
        BenchError: it failed.
    """
    start = time.perf_counter()
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    seconds = time.perf_counter() - start
    if result.returncode:
        said = result.stderr.strip().splitlines()
        raise BenchError(f"{name}: ended with code {result.returncode} ({said[-1] if said else 'and said nothing'})")
    return seconds


def write_recording(path: Path, rate: int, seconds: float, ending: str, channels: int) -> None:
    """Write noise with a tone above it."""
    import soundfile

    time = np.arange(round(rate * seconds)) / rate
    noise = 0.05 * np.random.default_rng(0).standard_normal((len(time), channels))
    format, subtype = FORMATS[ending]
    waveform = noise + 0.3 * np.sin(2 * np.pi * 440 * time)[:, None]
    with soundfile.SoundFile(path, "w", rate, channels, subtype, format=format) as file:
        for first in range(0, len(waveform), rate):  # libsndfile's Vorbis cannot take minutes at once
            file.write(waveform[first : first + rate])


def measure_decode(rounds: int | None, on_progress: Callable[[str, float], None]) -> list[DecodeRow]:
    """Return how fast recordings are read, a minute of stereo at 44.1 kHz to mono at 32 kHz.

    Args:
        rounds: how often each is read; None: a few times.
        on_progress: told what happens, and the share that is done.
    """
    on_progress("reading recordings", 0.0)
    found = apart("reading", read_formats, rounds or ROUNDS, SECONDS)
    rows = []
    for ending, seconds in found.items():
        times = Times.of(seconds)
        rows.append(DecodeRow(ending, len(seconds), times.median, times.minimum, SECONDS / times.median))
    return rows


def read_formats(rounds: int, seconds: float) -> dict[str, list[float]]:
    """Return the seconds that reading a recording in each format takes, each time."""
    from htsat.audio.resample import read_audio

    def read(path: Path) -> float:
        start = time.perf_counter()
        read_audio(path, HEARD)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        paths = {ending: Path(folder) / f"recording.{ending}" for ending in FORMATS}
        for ending, path in paths.items():
            write_recording(path, RATE, seconds, ending, 2)
        calls = {ending: partial(read, path) for ending, path in paths.items()}
        found = take_turns(calls, dict.fromkeys(calls, 1 + rounds), rest=0.0)
    return {ending: values[1:] for ending, values in found.items()}
