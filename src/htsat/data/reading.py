"""The waveform of a clip, wherever it lies: a file of its own, a row of an HDF5 file, or a row of a packed shard.

HDF5 files are those of PANNs and HTS-AT: ``waveform`` of (num_clips, num_samples) int16 and the attribute
``sample_rate``. Full scale is 32767, as published; the older files of float32 are taken as they are.

Packed shards (``htsat.data.shards`` writes them) are tar files of ordinary recordings. A folder of them has an index
of fixed-size records that is mapped into memory, so that two million clips cost a process no more than the pages
it touches, and all processes of a machine share those.
"""

import io
import json
import os
import wave
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from htsat.audio.decode import open_audio
from htsat.audio.resample import read_audio
from htsat.data.clips import Clip
from htsat.errors import AudioError, DataError

HDF5_SUFFIXES = frozenset((".h5", ".hdf5"))
SHARD_SUFFIX = ".tar"
#: Hz of HDF5 files that do not say; the published ones are all of this rate
HDF5_SAMPLE_RATE = 32_000
#: what the published code divides int16 samples by
HDF5_FULL_SCALE = np.float32(32767)
#: open HDF5 files that a reader keeps per process; AudioSet has 43 of them
MAX_OPEN_FILES = 64

MANIFEST = "manifest.json"
MANIFEST_FORMAT = "htsat-shards"
MANIFEST_VERSION = 1
#: one record per clip: where its recording lies in its shard, the CRC-32 of those bytes, its length in seconds,
#: which of the manifest's splits it belongs to (-1: none)
CLIP_RECORD = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc32", "<u4"), ("split", "<i4"), ("seconds", "<f8")])
#: files of the index and the types of their elements
INDEX_FILES = {
    "clips.npy": CLIP_RECORD,
    "label_offsets.npy": np.dtype("<i8"),
    "label_indices.npy": np.dtype("<i4"),
    "meta_offsets.npy": np.dtype("<i8"),
    "meta.npy": np.dtype("u1"),
}


class ClipReader:
    """Reads clips as mono waveforms at one rate; the same samples every time, cached or not.

    Safe to hand to other processes: after a fork each opens its files anew, and a pickled reader takes neither open
    files nor cached waveforms along.
    """

    def __init__(self, sample_rate: int, *, max_seconds: float | None = None, cache_bytes: int = 0) -> None:
        """Prepare; nothing is opened yet.

        Args:
            sample_rate: Hz of the waveforms.
            max_seconds: refuse longer recordings.
            cache_bytes: memory for waveforms that were read, kept as they are (float32). The first ones that fit
                stay: in an order that changes from epoch to epoch, none is better to keep than another.
        """
        self.sample_rate = sample_rate
        self.max_seconds = max_seconds
        self.cache_bytes = cache_bytes
        self._cache: dict[tuple[Path, int | None], NDArray[np.float32]] = {}
        self._cached_bytes = 0
        self._hdf5: dict[Path, Any] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs."""
        return {"sample_rate": self.sample_rate, "max_seconds": self.max_seconds, "cache_bytes": self.cache_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start afresh with the settings of the other process."""
        self.__init__(**state)  # type: ignore[misc]

    def read(self, clip: Clip) -> NDArray[np.float32]:
        """Return the clip as (num_samples,) float32 at ``sample_rate``, nominal [-1, 1]; the caller's own array.

        Raises:
            AudioError: it cannot be read; the message names the file, and the row of a packed one.
            DataError: the index of the packed shards is missing or damaged, so that none of them can be read.
        """
        key = (clip.path, clip.index)
        cached = self._cache.get(key)
        if cached is not None:
            return cached.copy()
        waveform = self._decode(clip)
        if self._cached_bytes + waveform.nbytes <= self.cache_bytes:
            self._cache[key] = waveform.copy()
            self._cached_bytes += waveform.nbytes
        return waveform

    def duration(self, clip: Clip) -> float:
        """Return the clip's length in seconds; decodes it only where the header of its file does not tell.

        Raises:
            AudioError: see ``read``; damage beyond the header may go unnoticed.
        """
        if clip.index is None:
            with open_audio(clip.path, max_seconds=self.max_seconds) as reader:
                if reader.duration is not None:
                    return reader.duration
                return sum(map(len, reader.blocks())) / reader.sample_rate
        if clip.path.suffix == SHARD_SUFFIX:
            return float(open_index(clip.path.parent).record(clip.path, clip.index)["seconds"])
        waveforms, sample_rate = self._hdf5_rows(clip)
        return int(waveforms.shape[1]) / sample_rate

    def _decode(self, clip: Clip) -> NDArray[np.float32]:
        if clip.index is None:
            return read_audio(clip.path, self.sample_rate, max_seconds=self.max_seconds)
        name = _row_name(clip.path, clip.index)
        if clip.path.suffix == SHARD_SUFFIX:
            index = open_index(clip.path.parent)
            data = index.read(clip.path, clip.index)
            source = _wave(data) if index.manifest["codec"] == "wav" else data
            return read_audio(source, self.sample_rate, max_seconds=self.max_seconds, name=name)
        waveforms, sample_rate = self._hdf5_rows(clip)
        try:
            row = waveforms[clip.index]
        except OSError as error:
            raise AudioError(f"{name}: the row is damaged ({_reason(error)}); copy the file again") from error
        waveform = row.astype(np.float32)
        if row.dtype == np.int16:
            waveform /= HDF5_FULL_SCALE
        return read_audio((waveform, sample_rate), self.sample_rate, max_seconds=self.max_seconds, name=name)

    def _hdf5_rows(self, clip: Clip) -> tuple[Any, int]:
        """Return the dataset ``waveform`` of the clip's file, which holds its row, and its sample rate."""
        if self._process != os.getpid():
            # open files of another process share its position in them and the library's locks
            self._hdf5, self._process = {}, os.getpid()
        file = self._hdf5.get(clip.path)
        if file is None:
            if len(self._hdf5) >= MAX_OPEN_FILES:
                self._hdf5.pop(next(iter(self._hdf5))).close()
            file = self._hdf5[clip.path] = open_hdf5(clip.path)
        waveforms = file["waveform"]
        index = clip.index or 0
        if not 0 <= index < len(waveforms):
            raise AudioError(
                f"{_row_name(clip.path, index)}: there is no such row; expected 0 to {len(waveforms) - 1}, "
                "use the index that was made with this file"
            )
        return waveforms, int(file.attrs.get("sample_rate", HDF5_SAMPLE_RATE))


def open_hdf5(path: Path) -> Any:
    """Open an HDF5 file of waveforms (an ``h5py.File`` to read from) and check its layout.

    Raises:
        AudioError: it cannot be opened, or lacks ``waveform``, or h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise AudioError(f'{path}: HDF5 files need h5py; install it with: pip install "htsat[hdf5]"') from error
    try:
        # a data set on a read-only or network disk may know no locks, and nobody writes to it
        file = h5py.File(path, "r", locking="best-effort")
    except FileNotFoundError as error:
        raise AudioError(f"{path}: there is no such file; expected an HDF5 file, check the path") from error
    except OSError as error:
        raise AudioError(f"{path}: cannot be opened as HDF5 ({_reason(error)}); copy the file again") from error
    found = file.get("waveform")
    if found is None or getattr(found, "ndim", 0) != 2 or found.dtype not in (np.int16, np.float32):
        what = ", ".join(file) or "nothing" if found is None else f"{found.dtype} of shape {found.shape}"
        file.close()
        raise AudioError(f"{path}: expected 'waveform' of (num_clips, num_samples) int16 or float32, found {what}")
    return file


class ShardIndex:
    """The index of a folder of packed shards.

    Attributes:
        folder: where the shards and the index lie.
        manifest: what ``manifest.json`` says.
        shards: name of each shard's file.
        first: (num_shards + 1,) number of the first clip of each shard, and of all clips.
        columns: the files of the index, mapped into memory; see ``INDEX_FILES``.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.shards: tuple[str, ...] = tuple(shard["file"] for shard in manifest["shards"])
        self.first = np.cumsum([0, *(shard["clips"] for shard in manifest["shards"])])
        self._numbers = {name: number for number, name in enumerate(self.shards)}
        self.columns: dict[str, NDArray[Any]] = {}
        for name, dtype in INDEX_FILES.items():
            try:
                column = np.load(folder / name, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{folder / name}: cannot be read ({error}); pack the data set again") from error
            if column.dtype != dtype or column.ndim != 1:
                raise DataError(f"{folder / name}: expected {dtype}, found {column.dtype}; pack the data set again")
            self.columns[name] = column
        self._clips = self.columns["clips.npy"]
        if len(self._clips) != self.first[-1]:
            raise DataError(
                f"{folder}: {MANIFEST} counts {self.first[-1]} clips, clips.npy {len(self._clips)}; "
                "they belong to different packings, pack the data set again"
            )

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self._clips)

    def number(self, path: Path, row: int) -> int:
        """Return which clip of the whole folder is a row of a shard.

        Raises:
            AudioError: no such shard or row.
        """
        shard = self._numbers.get(path.name)
        rows = 0 if shard is None else int(self.first[shard + 1] - self.first[shard])
        if shard is None or not 0 <= row < rows:
            expected = f"it has {rows} rows" if rows else f"{MANIFEST} does not know the shard"
            raise AudioError(f"{_row_name(path, row)}: there is no such row; {expected}, open the shards again")
        return int(self.first[shard]) + row

    def place(self, number: int) -> tuple[Path, int]:
        """Return shard and row of a clip of the whole folder."""
        shard = int(np.searchsorted(self.first, number, side="right")) - 1
        return self.folder / self.shards[shard], number - int(self.first[shard])

    def record(self, path: Path, row: int) -> Any:
        """Return the ``CLIP_RECORD`` of a row of a shard; see ``number``."""
        return self._clips[self.number(path, row)]

    def read(self, path: Path, row: int) -> bytes:
        """Return the recording in a row of a shard, as it was packed.

        Raises:
            AudioError: the shard is absent, too short, or other bytes lie there than were packed.
        """
        record = self.record(path, row)
        name, size = _row_name(path, row), int(record["size"])
        try:
            # Opened for each clip: no position or handle that processes could share, and it costs microseconds.
            with path.open("rb", buffering=0) as stream:
                stream.seek(int(record["offset"]))
                data = stream.read(size)
        except OSError as error:
            raise AudioError(f"{name}: cannot be read ({_reason(error)}); check the disk and the path") from error
        if len(data) != size:
            raise AudioError(f"{name}: the shard ends too early; copy it again or pack the data set again")
        if zlib.crc32(data) != record["crc32"]:
            raise AudioError(f"{name}: its checksum is wrong; the shard is damaged, copy it again or pack it again")
        return data

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the manifest of a folder and map its index.

        Raises:
            DataError: no finished packing lies there, or its index is damaged.
        """
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise DataError(
                f"{folder}: no {MANIFEST}; expected packed shards, finish the packing or check the path"
            ) from error
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}); pack the data set again") from error
        known = isinstance(manifest, dict) and manifest.get("format") == MANIFEST_FORMAT
        if not known or manifest.get("version") != MANIFEST_VERSION:
            raise DataError(f"{path}: not a manifest of packed shards of version {MANIFEST_VERSION}; pack them again")
        return cls(folder, manifest)


@lru_cache(maxsize=16)
def _opened(folder: Path, version: tuple[int, int]) -> ShardIndex:
    return ShardIndex.open(folder)


def open_index(folder: Path) -> ShardIndex:
    """Return the index of a folder of packed shards, opened once per process and packing; see ``ShardIndex.open``."""
    try:
        found = (folder / MANIFEST).stat()
    except OSError:
        return ShardIndex.open(folder)  # which tells what is wrong
    return _opened(folder, (found.st_mtime_ns, found.st_size))


def _wave(data: bytes) -> tuple[NDArray[np.float32], int]:
    """Return waveform and rate of a WAV file that ``pack`` made: what ``read_audio`` finds in it, in less time."""
    with wave.open(io.BytesIO(data)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32)
        return samples / np.float32(32768), file.getframerate()


def _row_name(path: Path, row: int) -> str:
    return f"{path} row {row}"


def _reason(error: OSError) -> str:
    """Return the first line of what the system or the HDF5 library says."""
    return (error.strerror or str(error) or "unknown reason").splitlines()[0]
