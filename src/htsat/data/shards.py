"""Packed shards: a data set of any size in a few large files, with random access to every clip.

A packing is a folder with

- ``shard-00000.tar`` and so on: plain tar files in the WebDataset layout, for each clip its recording
  (``00000042.flac``) and what is known of it (``00000042.json``). Clip ``n`` of the corpus lies in shard
  ``n // shard_clips``; one that cannot be read leaves no gap in the rows of its shard.
- ``shard-00000.json``: checksum and table of contents of each shard, written once the shard is complete. A packing
  that was stopped goes on behind the shards that have one.
- ``packing.json``: what is packed and how; a folder goes on only with the same.
- ``clips.npy``, ``label_*.npy``, ``meta*.npy``: the index of all clips as arrays (``htsat.data.reading``).
- ``manifest.json``, written last: classes, shards and index files with their SHA-256, and what could not be read.

Everything depends on the corpus and the settings alone, so that stopped and uninterrupted packings are the same to
the byte, for any number of processes.

Tar was chosen by measurement (``benchmarks/input_pipeline.py --containers``): fetching a clip from any container
costs 1 to 5 % of decoding it (Parquet: a third), so what counts is that tar needs no library, that any tool opens it,
and that WebDataset readers understand it.
"""

import hashlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import filelock
import numpy as np
import soundfile
from numpy.typing import NDArray

from htsat.audio.decode import open_audio
from htsat.data.clips import Clip, Corpus, listed
from htsat.data.reading import (
    CLIP_RECORD,
    INDEX_FILES,
    MANIFEST,
    MANIFEST_FORMAT,
    MANIFEST_VERSION,
    SHARD_SUFFIX,
    ClipReader,
    ShardIndex,
    open_index,
)
from htsat.errors import AudioError, DataError, OutputError, nearest
from htsat.events import Event
from htsat.files import write_atomic

#: lossless, both: what is packed is what training hears
Codec = Literal["flac", "wav"]
#: called with a line for people and the share done in [0, 1]
Progress = Callable[[str, float], None]

PLAN = "packing.json"
_LOCK = ".packing.lock"
#: what a killed packing may leave: a shard, or a small file (``write_atomic``)
_PARTS = (".shard-*.part", ".htsat-*.part")
_ENCODINGS = {"flac": "FLAC", "wav": "WAV"}


def _silent(line: str, share: float) -> None:
    """Tell nobody."""


# ---------------------------------------------------------------------------------------------------
# packing


@dataclass(frozen=True)
class _Task:
    """One shard to pack: the clips ``first``, ``first + 1``, ... of the corpus, each with its description."""

    path: Path
    first: int
    clips: tuple[Clip, ...]
    metas: tuple[bytes, ...]
    sample_rate: int | None
    codec: Codec
    max_seconds: float | None


def pack(
    corpus: Corpus,
    out: Path,
    *,
    sample_rate: int | None,
    codec: Codec = "flac",
    shard_clips: int = 2048,
    quota: float = 0.01,
    max_seconds: float | None = None,
    workers: int = 0,
    progress: Progress = _silent,
) -> Corpus:
    """Pack the clips of a corpus into shards, or go on where an earlier call was stopped.

    Args:
        corpus: what to pack.
        out: a new folder, or that of the earlier call with the same corpus and settings.
        sample_rate: Hz; clips become mono recordings of 16 bits at this rate, and peaks beyond full scale are cut.
            None keeps the bytes of the files, whatever they hold.
        codec: how resampled clips are stored; ``flac`` takes half the space of ``wav`` and longer to decode.
        shard_clips: clips per shard.
        quota: share of the corpus that may be unreadable; such clips are left out and listed in the manifest.
        max_seconds: longer clips count as unreadable.
        workers: processes that pack shards side by side; 0 packs in this one.
        progress: told after every shard.

    Returns:
        The packed corpus, as ``open_shards`` gives it.

    Raises:
        DataError: nothing to pack, another packing lies or runs in ``out``, clips have no bytes of their own to
            keep, or more than ``quota`` are unreadable; what was packed stays, to go on with a larger quota.
        OutputError: ``out`` cannot be written; what was packed stays.
    """
    if shard_clips < 1 or not 0 <= quota <= 1 or workers < 0:
        raise ValueError(
            f"expected shard_clips >= 1, 0 <= quota <= 1 and workers >= 0, got {shard_clips}, {quota}, {workers}"
        )
    if not len(corpus.clips):
        raise DataError(f"{corpus.folder}: no clips to pack")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(out / _LOCK, timeout=0):
            return _pack(corpus, out, sample_rate, codec, shard_clips, quota, max_seconds, workers, progress)
    except filelock.Timeout as error:
        raise DataError(f"{out}: another process is packing there; wait for it or choose another folder") from error
    except OSError as error:
        raise _output_error(out, error) from error


def _pack(
    corpus: Corpus,
    out: Path,
    sample_rate: int | None,
    codec: Codec,
    shard_clips: int,
    quota: float,
    max_seconds: float | None,
    workers: int,
    progress: Progress,
) -> Corpus:
    num_clips = len(corpus.clips)
    plan = {
        "format": MANIFEST_FORMAT,
        "version": MANIFEST_VERSION,
        "name": corpus.name,
        "objective": corpus.objective,
        "labels": list(corpus.labels),
        "sample_rate": sample_rate,
        "codec": "original" if sample_rate is None else codec,
        "shard_clips": shard_clips,
        "max_seconds": max_seconds,
        "clips": num_clips,
        "sha256": _digest(corpus, whole_files=sample_rate is None),
    }
    labels = targets(corpus)
    _claim(out, plan)
    for part in _parts(out):
        part.unlink()
    starts = range(0, num_clips, shard_clips)
    paths = [out / f"shard-{number:05d}{SHARD_SUFFIX}" for number in range(len(starts))]

    unreadable: list[str] = []
    done = 0

    def account(path: Path, contents: dict[str, Any]) -> None:
        nonlocal done
        done += 1
        unreadable.extend(entry["reason"] for entry in contents["unreadable"])
        if len(unreadable) > quota * num_clips:
            raise DataError(
                f"{out}: {len(unreadable)} of {num_clips} clips cannot be read, more than the quota of {quota:g}; "
                f"mend them or raise the quota and pack again to go on: {listed(unreadable)}"
            )
        progress(f"packed {path.name}", done / len(paths))

    def missing() -> Iterator[_Task]:
        for start, path in zip(starts, paths, strict=True):
            contents = _contents(path)
            if contents is not None:
                account(path, contents)
                continue
            clips = tuple(corpus.clips[i] for i in range(start, min(start + shard_clips, num_clips)))
            metas = tuple(_meta(corpus, clip) for clip in clips)
            yield _Task(path, start, clips, metas, sample_rate, codec, max_seconds)

    for task, contents in _each(missing(), workers):
        account(task.path, contents)
    _write_index(corpus, labels, out, plan, paths)
    return open_shards(out)


def _claim(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan into an empty folder, or see that the one there is the same."""
    text = _json(plan)
    try:
        found = (out / PLAN).read_text(encoding="utf-8")
    except FileNotFoundError:
        if set(out.iterdir()) - {out / _LOCK, *_parts(out)}:
            raise DataError(f"{out}: the folder holds other files; choose an empty or a new one") from None
        write_atomic(out / PLAN, text)
        return
    except UnicodeDecodeError:
        found = ""
    if found != text:
        try:
            before = json.loads(found)
            differing = [key for key in plan if before[key] != plan[key]]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{out / PLAN}: damaged; choose a new folder") from None
        what = ", ".join("the clips" if key == "sha256" else key for key in differing) or "its text"
        raise DataError(f"{out}: another packing lies there, it differs in {what}; choose a new folder")


def _parts(out: Path) -> list[Path]:
    """Return the unfinished files of a packing that was killed."""
    return [path for pattern in _PARTS for path in out.glob(pattern)]


def _digest(corpus: Corpus, *, whole_files: bool) -> str:
    """Return a checksum of what is known of the clips, in their order."""
    digest = hashlib.sha256()
    packed = 0
    for clip in corpus.clips:
        digest.update(_meta(corpus, clip) + b"\n")
        packed += clip.index is not None
    if packed and whole_files:
        raise DataError(
            f"{corpus.folder}: {packed} of {len(corpus.clips)} clips are parts of packed files and have no bytes of "
            "their own to keep; give a sample rate"
        )
    return digest.hexdigest()


def _meta(corpus: Corpus, clip: Clip) -> bytes:
    """Return what is known of a clip, but for its sound, as JSON."""
    try:
        source = clip.path.relative_to(corpus.folder)
    except ValueError:
        source = clip.path
    return _json(
        {
            "source": source.as_posix(),
            "index": clip.index,
            "labels": clip.labels,
            "events": None
            if clip.events is None
            else [[event.event_label, event.onset, event.offset, event.probability] for event in clip.events],
            "folds": sorted(clip.folds),
            "split": clip.split,
            "group": clip.group,
        }
    ).encode("ascii")


def _contents(path: Path) -> dict[str, Any] | None:
    """Return the table of contents of a complete shard; None if it is absent or incomplete."""
    try:
        contents: dict[str, Any] = json.loads(path.with_suffix(".json").read_bytes())
        size = path.stat().st_size
    except (FileNotFoundError, ValueError):
        return None
    return contents if contents["bytes"] == size else None


def _each(tasks: Iterator[_Task], workers: int) -> Iterator[tuple[_Task, dict[str, Any]]]:
    """Pack shards here or in other processes; yield each with its table of contents when it is complete."""
    if not workers:
        for task in tasks:
            yield task, _pack_shard(task)
        return
    # spawned: a fork would copy the locks that threads of this process hold
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        running: dict[Future[dict[str, Any]], _Task] = {}
        try:
            for task in tasks:
                running[pool.submit(_pack_shard, task)] = task
                # a few wait for the workers: no more, for each holds the clips of a shard
                while len(running) >= 2 * workers:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield running.pop(future), future.result()
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a packing process was killed (out of memory?); pack again with fewer workers to go on"
            ) from error
        finally:
            for future in running:
                future.cancel()


def _end_with_parent() -> None:
    """Let this worker end when the process that started it is gone: killed, it could not tell its workers."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="htsat-parent", daemon=True).start()


def _pack_shard(task: _Task) -> dict[str, Any]:
    """Write a shard, then its table of contents, which is returned; unreadable clips are left out."""
    reader = None if task.sample_rate is None else ClipReader(task.sample_rate, max_seconds=task.max_seconds)
    rows: dict[str, list[Any]] = {"clip": [], "offset": [], "size": [], "crc32": [], "seconds": []}
    unreadable: list[dict[str, Any]] = []
    part = task.path.with_name(f".{task.path.stem}-{os.getpid()}.part")
    digest = hashlib.sha256()
    position = 0
    try:
        with part.open("wb") as stream:

            def write(data: bytes) -> None:
                nonlocal position
                stream.write(data)
                digest.update(data)
                position += len(data)

            def member(name: str, data: bytes) -> int:
                """Append a file; return where its data begins."""
                info = tarfile.TarInfo(name)
                info.size = len(data)
                write(info.tobuf(tarfile.USTAR_FORMAT))
                start = position
                write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
                return start

            for number, (clip, meta) in enumerate(zip(task.clips, task.metas, strict=True), task.first):
                try:
                    if reader is None:
                        data, seconds = _original(clip.path, task.max_seconds)
                        suffix = clip.path.suffix.lower()
                    else:
                        waveform = reader.read(clip)
                        data, seconds = (
                            _encode(waveform, reader.sample_rate, task.codec),
                            len(waveform) / reader.sample_rate,
                        )
                        suffix = f".{task.codec}"
                except AudioError as error:
                    unreadable.append({"clip": number, "reason": str(error)})
                    continue
                rows["clip"].append(number)
                rows["offset"].append(member(f"{number:08d}{suffix}", data))
                rows["size"].append(len(data))
                rows["crc32"].append(zlib.crc32(data))
                rows["seconds"].append(seconds)
                member(f"{number:08d}.json", meta)
            # the end of a tar file: two empty blocks, filled up to a whole record
            write(bytes(2 * tarfile.BLOCKSIZE))
            write(bytes(-position % tarfile.RECORDSIZE))
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(task.path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _output_error(task.path, error) from error
    contents = {
        "file": task.path.name,
        "clips": len(rows["clip"]),
        "bytes": position,
        "sha256": digest.hexdigest(),
        "unreadable": unreadable,
        "rows": rows,
    }
    write_atomic(task.path.with_suffix(".json"), _json(contents))
    return contents


def _original(path: Path, max_seconds: float | None) -> tuple[bytes, float]:
    """Return the bytes of a recording, decoded once to see that they can be, and its length in seconds."""
    with open_audio(path, max_seconds=max_seconds) as reader:
        seconds = sum(map(len, reader.blocks())) / reader.sample_rate
    try:
        return path.read_bytes(), seconds
    except OSError as error:
        raise AudioError(f"{path}: reading failed ({error.strerror or error}); check the disk") from error


def _encode(waveform: NDArray[np.float32], sample_rate: int, codec: Codec) -> bytes:
    """Return a mono recording of 16 bits; decoders divide by 32768."""
    samples = np.clip(np.rint(waveform * np.float32(32768)), -32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, sample_rate, format=_ENCODINGS[codec], subtype="PCM_16")
    return buffer.getvalue()


def _write_index(corpus: Corpus, labels: "Targets", out: Path, plan: dict[str, Any], paths: Sequence[Path]) -> None:
    """Write the index of all shards, and the manifest; nothing where they are there and right."""
    shards, unreadable, tables = [], [], []
    for path in paths:
        contents = _contents(path)
        if contents is None:
            raise DataError(f"{path}: disappeared while the data set was being packed; pack again to go on")
        shards.append({key: contents[key] for key in ("file", "clips", "bytes", "sha256")})
        unreadable += [
            {"source": corpus.clips[entry["clip"]].path.as_posix(), **entry} for entry in contents["unreadable"]
        ]
        tables.append(contents["rows"])
    count = sum(shard["clips"] for shard in shards)
    records = np.zeros(count, dtype=CLIP_RECORD)
    for field in ("offset", "size", "crc32", "seconds"):
        records[field] = np.concatenate([np.asarray(rows[field], dtype=CLIP_RECORD[field]) for rows in tables])

    numbers = np.concatenate([np.asarray(rows["clip"], dtype=np.int64) for rows in tables])
    labels = labels.take(numbers)
    splits: dict[str, int] = {}
    meta_offsets, meta = np.zeros(count + 1, np.int64), io.BytesIO()
    for row, number in enumerate(numbers.tolist()):
        clip = corpus.clips[number]
        meta.write(_meta(corpus, clip))
        meta_offsets[row + 1] = meta.tell()
        records["split"][row] = -1 if clip.split is None else splits.setdefault(clip.split, len(splits))
    columns = {
        "clips.npy": records,
        "label_offsets.npy": labels.offsets,
        "label_indices.npy": labels.indices,
        "meta_offsets.npy": meta_offsets,
        "meta.npy": np.frombuffer(meta.getvalue(), dtype=np.uint8),
    }
    checksums = {}
    for name, column in columns.items():
        buffer = io.BytesIO()
        np.save(buffer, column.astype(INDEX_FILES[name], copy=False), allow_pickle=False)
        data = buffer.getvalue()
        checksums[name] = hashlib.sha256(data).hexdigest()
        _write_once(out / name, data)
    manifest = {
        **{key: plan[key] for key in plan if key != "sha256"},
        "clips": count,
        "seconds": float(records["seconds"].sum()),
        "splits": list(splits),
        "shards": shards,
        "index": checksums,
        "unreadable": unreadable,
    }
    _write_once(out / MANIFEST, json.dumps(manifest, indent=1).encode("ascii") + b"\n")


def _write_once(path: Path, data: bytes) -> None:
    """Write a file, unless it has this content: others may have mapped it."""
    if not path.is_file() or path.read_bytes() != data:
        write_atomic(path, data)


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _output_error(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path}: cannot be written ({error.strerror or error}); free some space or choose another folder, "
        "then pack again to go on"
    )


# ---------------------------------------------------------------------------------------------------
# opening


class ShardClips(Sequence[Clip]):
    """The clips of packed shards, or some of them, made when they are asked for.

    Two million of them take no more memory than the pages of the index that are touched.
    """

    def __init__(self, folder: Path, numbers: NDArray[np.int64] | None = None) -> None:
        """Open ``folder``; ``numbers`` says which clips of it, in which order (None: all).

        Raises:
            DataError: no finished packing lies there, or its index is damaged.
        """
        self.packing = open_index(folder)
        self.numbers = numbers

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to other processes as a path: they map the same index."""
        return ShardClips, (self.packing.folder, self.numbers)

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.packing) if self.numbers is None else len(self.numbers)

    @overload
    def __getitem__(self, item: int) -> Clip: ...
    @overload
    def __getitem__(self, item: slice) -> "ShardClips": ...
    def __getitem__(self, item: int | slice) -> "Clip | ShardClips":
        """Return a clip, or a part of the sequence that is lazy as well."""
        if isinstance(item, slice):
            return ShardClips(self.packing.folder, self._all()[item])
        position = range(len(self))[item]
        number = position if self.numbers is None else int(self.numbers[position])
        path, row = self.packing.place(number)
        meta = _described(self.packing, number)
        events = None if meta["events"] is None else tuple(Event(*event) for event in meta["events"])
        return Clip(
            path, tuple(meta["labels"]), events, frozenset(meta["folds"]), meta["split"], meta["group"], index=row
        )

    def in_split(self, split: str) -> "ShardClips":
        """Return the clips of an official split.

        Raises:
            DataError: there is no such split.
        """
        splits = self.packing.manifest["splits"]
        if split not in splits:
            known = f"there are {', '.join(splits)}{nearest(split, splits)}" if splits else "there are none"
            raise DataError(f"{self.packing.folder}: no split {split!r}; {known}")
        numbers = self._all()
        return ShardClips(
            self.packing.folder, numbers[self.packing.columns["clips.npy"]["split"][numbers] == splits.index(split)]
        )

    def durations(self) -> NDArray[np.float64]:
        """Return the length of each clip in seconds."""
        return np.asarray(self.packing.columns["clips.npy"]["seconds"][self._all()], dtype=np.float64)

    def _all(self) -> NDArray[np.int64]:
        return np.arange(len(self.packing), dtype=np.int64) if self.numbers is None else self.numbers


def _described(index: ShardIndex, number: int) -> dict[str, Any]:
    """Return what ``_meta`` said of a clip of the whole folder."""
    start, end = index.columns["meta_offsets.npy"][number : number + 2].tolist()
    meta: dict[str, Any] = json.loads(index.columns["meta.npy"][start:end].tobytes())
    return meta


def open_shards(folder: Path) -> Corpus:
    """Open a packed data set; its ``clips`` are a ``ShardClips``, whose items ``ClipReader`` reads.

    Raises:
        DataError: no finished packing lies there, or its index is damaged.
    """
    clips = ShardClips(folder)
    manifest = clips.packing.manifest
    # lazy: a tuple of millions of clips would take gigabytes in every process
    return Corpus(manifest["name"], folder, tuple(manifest["labels"]), manifest["objective"], clips)


@dataclass(frozen=True, eq=False)
class Targets:
    """Which classes sound in which clip: those of clip ``i`` are ``indices[offsets[i] : offsets[i + 1]]``.

    Attributes:
        offsets: (num_clips + 1,) int64.
        indices: (num_labels,) int32, places in the label set.
    """

    offsets: NDArray[np.int64]
    indices: NDArray[np.int32]

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.offsets) - 1

    def take(self, numbers: NDArray[np.int64]) -> "Targets":
        """Return those of some clips, in the order of ``numbers``."""
        counts = np.diff(self.offsets)[numbers]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        # where each label lies now: at the start of its clip, and on from there one by one
        places = np.repeat(self.offsets[:-1][numbers] - offsets[:-1], counts) + np.arange(offsets[-1])
        return Targets(offsets, self.indices[places])

    def of(self, clip: int) -> NDArray[np.int32]:
        """Return the classes of a clip."""
        return self.indices[self.offsets[clip] : self.offsets[clip + 1]]


def targets(corpus: Corpus) -> Targets:
    """Return the labels of every clip as places in ``corpus.labels``, as arrays: what balanced sampling needs.

    Raises:
        DataError: labels that are not in the label set, all of them.
    """
    clips: Sequence[Clip] = corpus.clips
    if isinstance(clips, ShardClips):
        columns = clips.packing.columns
        found = Targets(np.asarray(columns["label_offsets.npy"]), np.asarray(columns["label_indices.npy"]))
        if clips.numbers is not None:
            found = found.take(clips.numbers)
        packed = clips.packing.manifest["labels"]
        if packed == list(corpus.labels):
            return found
        code = {label: place for place, label in enumerate(corpus.labels)}
        places = np.asarray([code.get(label, -1) for label in packed], dtype=np.int32)
        _known(corpus, {packed[i] for i in np.unique(found.indices).tolist() if places[i] < 0})
        return Targets(found.offsets, places[found.indices])
    code = {label: place for place, label in enumerate(corpus.labels)}
    _known(corpus, {label for clip in clips for label in clip.labels if label not in code})
    return Targets(
        np.cumsum([0, *(len(clip.labels) for clip in clips)], dtype=np.int64),
        np.asarray([code[label] for clip in clips for label in clip.labels], dtype=np.int32),
    )


def _known(corpus: Corpus, unknown: set[str]) -> None:
    """Raise DataError if there are unknown labels."""
    if unknown:
        problems = [
            f"label {label!r} is not in the label set{nearest(label, corpus.labels)}" for label in sorted(unknown)
        ]
        raise DataError(f"{corpus.folder}: {listed(problems)}")


# ---------------------------------------------------------------------------------------------------
# verifying


def verify(folder: Path, progress: Progress = _silent) -> list[str]:
    """Read a packing from end to end and return what is wrong with it, one line each; nothing if it is whole.

    Every damaged shard is named, and every damaged clip in it, with the recording it was made from. To mend a
    shard, delete it and pack again.

    Raises:
        DataError: no finished packing lies there, or its index cannot be opened at all.
    """
    index = ShardIndex.open(folder)
    problems = []
    for name, expected in index.manifest["index"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            problems.append(f"{folder / name}: its checksum is wrong; pack again to mend it")
    if problems:
        # what a damaged index says of the clips is worth nothing
        return problems
    for number, shard in enumerate(index.manifest["shards"]):
        path = folder / shard["file"]
        try:
            digest = _sha256(path)
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror or error}); copy it again or pack again")
        else:
            if digest != shard["sha256"]:
                problems.append(f"{path}: its checksum is wrong; delete it and pack again, or copy it again")
                for row in range(shard["clips"]):
                    try:
                        index.read(path, row)
                    except AudioError as error:
                        source = _described(index, int(index.first[number]) + row)["source"]
                        problems.append(f"{error} (made from {source})")
        progress(f"verified {path.name}", (number + 1) / len(index.shards))
    return problems


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
