"""Clips per second of one core: reading, decoding, resampling and cropping, beside what a training step consumes.

    python benchmarks/input_pipeline.py [--data FOLDER] [--clips 48] [--rounds 5] [--containers] [--json FILE]

Clips of ten seconds, mono, cut at random from the recordings of a folder (without one: noise with an envelope), are
written to a temporary folder in every form and read in random order, warm from the page cache, on one thread. Forms
are measured in turn, one round each, so that what else runs on the machine meets all of them; figures are medians
of rounds. "train" is a training step (forward, backward, AdamW; bfloat16 autocast, batch 8, one thread) of the
full-size model and of the bundled one on such clips.

``--containers`` also compares the containers that packed shards could have had; those whose library is not
installed (h5py, pyarrow, lmdb) are left out. Prints markdown tables; ``--json`` also writes the figures.
"""

import argparse
import importlib.metadata
import importlib.util
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

import htsat
from htsat.apps.bench.measure import cpu_name, load_average
from htsat.audio.decode import AUDIO_SUFFIXES
from htsat.audio.resample import read_audio
from htsat.config import FrontendConfig, ModelConfig
from htsat.data.clips import Clip, Corpus
from htsat.data.reading import ClipReader
from htsat.data.shards import open_shards, pack
from htsat.model.htsat import HTSAT

RATE = 32_000
SECONDS = 10
ORIGINAL_RATE = 44_100
BATCH = 8
#: format and subtype that libsndfile writes for each ending
FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}

Waveform = NDArray[np.float32]


def waveforms(folder: Path | None, count: int, sample_rate: int, seed: int = 0) -> list[Waveform]:
    """Return clips of 10 s cut at random from the recordings of a folder laid end to end, or noise."""
    random = np.random.default_rng(seed)
    size = SECONDS * sample_rate
    if folder is None:
        steps = np.repeat(random.uniform(0, 0.3, (count, SECONDS * 4)), sample_rate // 4, axis=1)
        return list((steps * random.standard_normal((count, size))).clip(-1, 1).astype(np.float32))
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not paths:
        raise SystemExit(f"{folder}: no recordings found")
    random.shuffle(paths)  # type: ignore[arg-type]
    clips: list[Waveform] = []
    held = np.zeros(0, dtype=np.float32)
    while len(clips) < count:
        for path in paths:
            held = np.concatenate([held, read_audio(path, sample_rate).clip(-1, 1)])
            while len(held) >= size and len(clips) < count:
                clips.append(held[:size])
                held = held[size:]
            if len(clips) == count:
                break
    return clips


def encoded(waveform: Waveform, sample_rate: int, kind: str) -> bytes:
    """Return a recording as the bytes of a file."""
    buffer = io.BytesIO()
    container, subtype = FORMATS[kind]
    soundfile.write(buffer, waveform, sample_rate, format=container, subtype=subtype)
    return buffer.getvalue()


def crop(waveform: Waveform, at: float) -> Waveform:
    """Return 10 s from a position in [0, 1], padded with silence, as training does."""
    size = SECONDS * RATE
    if len(waveform) <= size:
        return np.pad(waveform, (0, size - len(waveform)))
    start = int(at * (len(waveform) - size))
    return waveform[start : start + size].copy()


def rounds_of(candidates: dict[str, Callable[[int], object]], count: int, rounds: int) -> dict[str, float]:
    """Return the median seconds per clip of each candidate; in every round each reads all clips in a new order."""
    random = np.random.default_rng(1)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, call in candidates.items():
            order = random.permutation(count).tolist()
            start = time.process_time()
            for index in order:
                call(index)
            # time of this process alone: others on the machine slow it down, but do not count
            if number:
                seconds[name].append((time.process_time() - start) / count)
    return {name: statistics.median(values) for name, values in seconds.items()}


def forms(folder: Path, source: Path | None, count: int) -> dict[str, tuple[list[Clip], int]]:
    """Write the material in every form; return the clips and bytes per clip of each."""
    found: dict[str, tuple[list[Clip], int]] = {}
    at_original, at_rate = (waveforms(source, count, rate) for rate in (ORIGINAL_RATE, RATE))
    for rate, material in ((ORIGINAL_RATE, at_original), (RATE, at_rate)):
        for kind in FORMATS:
            clips = []
            for number, waveform in enumerate(material):
                path = folder / f"{rate}_{number:05d}.{kind}"
                path.write_bytes(encoded(waveform, rate, kind))
                clips.append(Clip(path, ("sound",)))
            found[f"{kind} {rate / 1000:g} kHz"] = clips, sum(clip.path.stat().st_size for clip in clips) // count
    if importlib.util.find_spec("h5py"):
        import h5py

        path = folder / "waveforms.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("waveform", data=np.stack([np.rint(w * 32767).astype(np.int16) for w in at_rate]))
            file.attrs.create("sample_rate", data=RATE, dtype=np.int32)
        found["HDF5 int16 32 kHz"] = (
            [Clip(path, ("sound",), index=i) for i in range(count)],
            path.stat().st_size // count,
        )
    for name, kind, rate, codec in (
        ("shards of FLAC, 32 kHz", "wav 44.1 kHz", RATE, "flac"),
        ("shards of WAV, 32 kHz", "wav 44.1 kHz", RATE, "wav"),
        ("shards of originals (ogg 44.1 kHz)", "ogg 44.1 kHz", None, "original"),
    ):
        out = folder / f"shards_{codec}"
        corpus = Corpus("bench", folder, ("sound",), "single_label", tuple(found[kind][0]))
        pack(corpus, out, sample_rate=rate, codec="wav" if codec == "wav" else "flac")
        size = sum(path.stat().st_size for path in out.iterdir())
        found[name] = list(open_shards(out).clips), size // count
    return found


def pipeline(found: dict[str, tuple[list[Clip], int]], rounds: int) -> list[dict[str, Any]]:
    """Measure each form: stages one by one, and all of them as training reads a clip."""
    reader = ClipReader(RATE)
    count = len(next(iter(found.values()))[0])
    positions = np.random.default_rng(2).random(count)
    whole: dict[str, Callable[[int], object]] = {}
    stages: dict[str, Callable[[int], object]] = {}
    for name, (clips, _) in found.items():
        whole[name] = lambda i, clips=clips: crop(reader.read(clips[i]), positions[i])  # type: ignore[misc]
        rate = ORIGINAL_RATE if "44.1" in name else RATE
        native = ClipReader(rate)
        stages[f"decode {name}"] = lambda i, native=native, clips=clips: native.read(clips[i])  # type: ignore[misc]
    example = np.random.default_rng(3).uniform(-1, 1, SECONDS * ORIGINAL_RATE).astype(np.float32)
    stages["resample"] = lambda i: read_audio((example, ORIGINAL_RATE), RATE)
    stages["crop"] = lambda i: crop(np.zeros(SECONDS * RATE + 1000, dtype=np.float32), positions[i])
    seconds = rounds_of({**whole, **stages}, count, rounds)
    rows = []
    for name, (_, size) in found.items():
        rows.append(
            {
                "form": name,
                "bytes_per_clip": size,
                "decode_ms": 1000 * seconds[f"decode {name}"],
                "resample_ms": 1000 * seconds["resample"] if "44.1" in name else 0.0,
                "crop_ms": 1000 * seconds["crop"],
                "clips_per_second": 1 / seconds[name],
            }
        )
    return rows


def training(rounds: int) -> list[dict[str, Any]]:
    """Measure a training step of the full-size and of the bundled model."""
    rows = []
    for name, model in (
        ("full size, 527 classes", HTSAT(FrontendConfig(), ModelConfig())),
        ("bundled", htsat.load_model("default")),
    ):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters())
        waveform = 0.1 * torch.randn(BATCH, SECONDS * model.frontend_config.sample_rate)
        seconds = []
        for number in range(rounds + 1):
            start = time.process_time()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(waveform).clipwise_logits
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits.float(), torch.zeros_like(logits.float())
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if number:
                seconds.append(time.process_time() - start)
        rows.append({"model": name, "clips_per_second": BATCH / statistics.median(seconds)})
    return rows


# ---------------------------------------------------------------------------------------------------
# containers


def _tar(folder: Path, items: list[bytes]) -> tuple[Callable[[int], bytes], Path]:
    path = folder / "items.tar"
    offsets = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        for number, item in enumerate(items):
            info = tarfile.TarInfo(f"{number:08d}")
            info.size = len(item)
            offsets.append(file.offset + tarfile.BLOCKSIZE)
            file.addfile(info, io.BytesIO(item))

    def read(index: int) -> bytes:
        with path.open("rb", buffering=0) as stream:
            stream.seek(offsets[index])
            return stream.read(len(items[index]))

    return read, path


def _zip(folder: Path, items: list[bytes]) -> tuple[Callable[[int], bytes], Path]:
    path = folder / "items.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for number, item in enumerate(items):
            file.writestr(f"{number:08d}", item)
    opened = zipfile.ZipFile(path)
    return lambda index: opened.read(f"{index:08d}"), path


def _hdf5(folder: Path, items: list[bytes]) -> tuple[Callable[[int], bytes], Path]:
    import h5py

    path = folder / "items.h5"
    offsets = np.cumsum([0, *map(len, items)])
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=np.frombuffer(b"".join(items), dtype=np.uint8))
    data = h5py.File(path, "r")["data"]
    return lambda index: data[offsets[index] : offsets[index + 1]].tobytes(), path


def _arrow(folder: Path, items: list[bytes], batch: int = 64) -> tuple[Callable[[int], bytes], Path]:
    import pyarrow as pa

    path = folder / "items.arrow"
    schema = pa.schema([("data", pa.binary())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(items), batch):
            writer.write_batch(pa.record_batch([pa.array(items[start : start + batch], pa.binary())], schema=schema))
    opened = pa.ipc.open_file(pa.memory_map(str(path)))
    return lambda index: opened.get_batch(index // batch).column(0)[index % batch].as_py(), path


def _parquet(folder: Path, items: list[bytes], batch: int = 16) -> tuple[Callable[[int], bytes], Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / "items.parquet"
    pq.write_table(pa.table({"data": pa.array(items, pa.binary())}), path, row_group_size=batch, compression="none")
    opened = pq.ParquetFile(path, memory_map=True)
    return lambda index: opened.read_row_group(index // batch, use_threads=False).column(0)[index % batch].as_py(), path


def _lmdb(folder: Path, items: list[bytes]) -> tuple[Callable[[int], bytes], Path]:
    import lmdb

    path = folder / "items.lmdb"
    environment = lmdb.open(str(path), subdir=False, map_size=2 * sum(map(len, items)) + (1 << 26), lock=False)
    with environment.begin(write=True) as transaction:
        for number, item in enumerate(items):
            transaction.put(f"{number:08d}".encode(), item, append=True)

    def read(index: int) -> bytes:
        with environment.begin() as transaction:
            return bytes(transaction.get(f"{index:08d}".encode()))

    return read, path


#: container: library that it needs ("" for Python's own), and its maker
CONTAINERS: dict[str, tuple[str, Callable[[Path, list[bytes]], tuple[Callable[[int], bytes], Path]]]] = {
    "tar + index": ("", _tar),
    "zip (stored)": ("", _zip),
    "HDF5 (bytes + offsets)": ("h5py", _hdf5),
    "LMDB": ("lmdb", _lmdb),
    "Arrow IPC, batches of 64": ("pyarrow", _arrow),
    "Parquet, row groups of 16": ("pyarrow", _parquet),
}


def installed_size(library: str) -> int:
    """Return the bytes of an installed distribution."""
    if not library:
        return 0
    files = importlib.metadata.files(library) or []
    return sum(path.stat().st_size for file in files if (path := Path(str(file.locate()))).is_file())


def containers(folder: Path, source: Path | None, count: int, rounds: int) -> list[dict[str, Any]]:
    """Measure how fast each container gives FLAC recordings back, alone and with decoding."""
    items = [encoded(waveform, RATE, "flac") for waveform in waveforms(source, count, RATE)]
    candidates: dict[str, Callable[[int], object]] = {}
    sizes: dict[str, int] = {}
    for name, (library, make) in CONTAINERS.items():
        if library and not importlib.util.find_spec(library):
            continue
        fetch, path = make(folder, items)
        if any(fetch(index) != item for index, item in enumerate(items)):
            raise SystemExit(f"{name}: gives back other bytes than went in")
        sizes[name] = path.stat().st_size
        candidates[f"fetch {name}"] = fetch
        candidates[name] = lambda i, fetch=fetch: read_audio(fetch(i), RATE)  # type: ignore[misc]
    seconds = rounds_of(candidates, count, rounds)
    payload = sum(map(len, items))
    return [
        {
            "container": name,
            "fetch_us": 1e6 * seconds[f"fetch {name}"],
            "clips_per_second": 1 / seconds[name],
            "overhead_percent": 100 * (sizes[name] / payload - 1),
            "library": CONTAINERS[name][0] or "Python's own",
            "library_mb": installed_size(CONTAINERS[name][0]) / 1e6,
        }
        for name in sizes
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as a markdown table."""
    heads = list(rows[0])
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [
            f"{v:.0f}" if isinstance(v, float) and v >= 100 else f"{v:.2f}" if isinstance(v, float) else str(v)
            for v in row.values()
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def positive(text: str) -> int:
    """Return a positive integer of the command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of recordings to cut clips from (default: noise)")
    parser.add_argument("--clips", type=positive, default=48, help="clips of each form (default 48)")
    parser.add_argument("--rounds", type=positive, default=5, help="measured rounds (default 5)")
    parser.add_argument("--containers", action="store_true", help="also compare containers for packed shards")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = load_average()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures["input"] = pipeline(forms(folder, arguments.data, arguments.clips), arguments.rounds)
        if arguments.containers:
            figures["containers"] = containers(folder, arguments.data, arguments.clips, arguments.rounds)
    figures["train"] = training(max(1, arguments.rounds // 2))
    loads = {"load_before": before, "load_after": load_average()}
    figures["machine"] = {"cpu": cpu_name(), "cores": os.cpu_count(), **loads}
    for title, key in (
        ("Reading one 10-s clip at 32 kHz, one core", "input"),
        ("Containers of FLAC recordings", "containers"),
        ("What training consumes, one core", "train"),
    ):
        if key in figures:
            print(f"{title}\n\n{table(figures[key])}\n")
    print(", ".join(f"{name} {value}" for name, value in figures["machine"].items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
