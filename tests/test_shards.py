"""Packed shards: what goes in comes out, whatever stops the packing, and damage is named."""

import dataclasses
import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from htsat.data.clips import Clip, Corpus
from htsat.data.reading import ClipReader, open_index
from htsat.data.shards import ShardClips, open_shards, pack, targets, verify
from htsat.errors import AudioError, DataError, OutputError
from htsat.events import Event

RATE = 32_000
LABELS = ("bark", "clock tick", "rain")
SCRIPT = """
import sys, time
from pathlib import Path
from test_shards import make_corpus
from htsat.data.shards import pack
print("ready", flush=True)
pack(make_corpus(Path(sys.argv[1])), Path(sys.argv[2]), sample_rate=32000, shard_clips=4, workers=int(sys.argv[3]),
     progress=lambda line, share: (print(line, flush=True), time.sleep(0.3)))
"""


def make_corpus(folder: Path, count: int = 22) -> Corpus:
    """Return clips of 16 bits in WAV and FLAC with everything that a clip can have; every seventh has no labels."""
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    clips = []
    for number in range(count):
        path = folder / "audio" / f"kläng {number}.{'flac' if number % 2 else 'wav'}"
        if not path.exists():
            soundfile.write(path, random.integers(-20000, 20000, 3200 + number).astype(np.int16), RATE)
        labels = () if number % 7 == 6 else LABELS[number % 3 :] if number % 2 else (LABELS[number % 3],)
        events = (Event(LABELS[0], 0.01, 0.1 / 3), Event(LABELS[1], 0.0, 0.05, 0.5)) if number % 4 == 0 else None
        split = (None, "train", "test")[number % 3]
        clips.append(Clip(path, labels, events, frozenset((1, number + 1)), split, f"gruppe {number // 2} ü"))
    return Corpus("strong", folder, LABELS, "multi_label", tuple(clips))


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a packing but the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".packing.lock"}


def described(clip: Clip) -> Clip:
    """Return a clip without its place."""
    return dataclasses.replace(clip, path=Path(), index=None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory, corpus) -> Corpus:
    return pack(corpus, tmp_path_factory.mktemp("packed") / "out", sample_rate=RATE, shard_clips=4)


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([byte[0] ^ 0xFF]))


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for name, data in contents(folder).items():
        (to / name).write_bytes(data)
    return to


def test_what_went_in_comes_out(corpus, packed):
    assert (packed.name, packed.labels, packed.objective) == (corpus.name, corpus.labels, corpus.objective)
    assert len(packed.clips) == 22
    assert sorted(path.name for path in packed.folder.glob("*.tar")) == [f"shard-{n:05d}.tar" for n in range(6)]
    reader = ClipReader(RATE)
    for number, (clip, original) in enumerate(zip(packed.clips, corpus.clips, strict=True)):
        assert described(clip) == described(original)
        assert (clip.path.name, clip.index) == (f"shard-{number // 4:05d}.tar", number % 4)
        # sixteen bits survive FLAC
        np.testing.assert_array_equal(reader.read(clip), reader.read(original))
        assert reader.duration(clip) == reader.duration(original) == (3200 + number) / RATE
    assert packed.clips[-1] == packed.clips[21]
    with pytest.raises(IndexError):
        packed.clips[22]
    assert verify(packed.folder) == []
    assert packed.clips.durations().sum() == pytest.approx(
        json.loads((packed.folder / "manifest.json").read_text())["seconds"]
    )


def test_any_tar_reads_the_shards(corpus, packed):
    with tarfile.open(packed.folder / "shard-00001.tar") as file:
        assert file.getnames() == [f"{n:08d}.{ending}" for n in range(4, 8) for ending in ("flac", "json")]
        sound, rate = soundfile.read(io.BytesIO(file.extractfile("00000005.flac").read()), dtype="int16")
        about = json.load(file.extractfile("00000005.json"))
    np.testing.assert_array_equal(sound, soundfile.read(corpus.clips[5].path, dtype="int16")[0])
    assert rate == RATE
    assert (about["source"], tuple(about["labels"])) == ("audio/kläng 5.flac", corpus.clips[5].labels)


def test_original_bytes_are_kept(corpus, tmp_path):
    out = pack(corpus, tmp_path / "out", sample_rate=None, shard_clips=100)
    index = open_index(out.folder)
    reader = ClipReader(16_000)
    for clip, original in zip(out.clips, corpus.clips, strict=True):
        assert index.read(clip.path, clip.index) == original.path.read_bytes()
        np.testing.assert_array_equal(reader.read(clip), reader.read(original))
    with pytest.raises(DataError, match=r"22 of 22 clips are parts of packed files .* give a sample rate"):
        pack(out, tmp_path / "again", sample_rate=None)


@pytest.mark.parametrize("rate", [RATE, 16_000])
def test_wave_shards_read_as_flac_shards_do(corpus, packed, tmp_path, rate):
    """They have a shorter way to the samples; it must lead to the same ones."""
    out = pack(corpus, tmp_path / "out", sample_rate=RATE, codec="wav")
    reader = ClipReader(rate)
    for wav, flac in zip(out.clips, packed.clips, strict=True):
        np.testing.assert_array_equal(reader.read(wav), reader.read(flac))


def test_peaks_beyond_full_scale_are_cut_and_never_wrap(tmp_path):
    path = tmp_path / "loud.wav"
    soundfile.write(path, np.array([1.5, -1.5, 1.0, -1.0, 0.25]), RATE, subtype="FLOAT")
    corpus = Corpus("folder", tmp_path, ("a",), "single_label", (Clip(path, ("a",)),))
    for codec in ("wav", "flac"):
        clip = pack(corpus, tmp_path / codec, sample_rate=RATE, codec=codec).clips[0]
        top = 32767 / 32768
        np.testing.assert_array_equal(ClipReader(RATE).read(clip), np.float32([top, -1, top, -1, 0.25]))


def test_packing_from_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    samples = np.random.default_rng(0).integers(-32768, 32768, (3, 640)).astype(np.int16)
    with h5py.File(tmp_path / "eval.h5", "w") as file:
        file.create_dataset("waveform", data=samples)
    clips = tuple(Clip(tmp_path / "eval.h5", ("a",), index=row) for row in range(3))
    out = pack(Corpus("audioset", tmp_path, ("a",), "multi_label", clips), tmp_path / "out", sample_rate=RATE)
    for row in range(3):
        read = ClipReader(RATE).read(out.clips[row])
        # Their full scale is 32767, that of FLAC 32768: rounding moves by half a step, cutting at most by a whole one.
        error = np.abs(read - samples[row] / 32767)
        assert error.max() <= 1.001 / 32768
        assert error[np.abs(samples[row].astype(int)) < 32767].max() <= 0.501 / 32768


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_packing_goes_on_to_the_same_bytes(corpus, packed, tmp_path, workers):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", SCRIPT, str(corpus.folder), str(out), str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        for line in process.stdout:
            if line.startswith("packed"):
                break
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    if workers:
        time.sleep(0.5)  # its processes notice that it is gone
    finished = {path: path.stat() for path in out.glob("*.tar") if path.with_suffix(".json").exists()}
    assert finished
    assert not (out / "manifest.json").exists()
    with pytest.raises(DataError, match=r"no manifest\.json; expected packed shards, finish the packing"):
        open_shards(out)
    pack(corpus, out, sample_rate=RATE, shard_clips=4)
    assert contents(out) == contents(packed.folder)
    for path, before in finished.items():
        after = path.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_stopped_anywhere_the_packing_goes_on(tmp_path):
    """Every state on the way: the files of a packing in the order in which they appear, cut off after each."""
    corpus = make_corpus(tmp_path / "corpus", 6)
    whole = contents(pack(corpus, tmp_path / "whole", sample_rate=RATE, shard_clips=3).folder)
    order = ["packing.json", "shard-00000.tar", "shard-00000.json", "shard-00001.tar", "shard-00001.json"]
    order += ["clips.npy", "label_offsets.npy", "label_indices.npy", "meta_offsets.npy", "meta.npy", "manifest.json"]
    assert sorted(order) == sorted(whole)
    for count in range(len(order)):
        out = tmp_path / str(count)
        out.mkdir()
        for name in order[:count]:
            (out / name).write_bytes(whole[name])
        # what is left of the file that was being written
        (out / ".htsat-0123456789abcdef.part").write_bytes(b"half")
        (out / ".shard-00001-42.part").write_bytes(b"half")
        pack(corpus, out, sample_rate=RATE, shard_clips=3)
        assert contents(out) == whole, f"after {order[:count][-1:]}"


def test_packing_again_writes_nothing(corpus, packed):
    before = {path: path.stat() for path in packed.folder.iterdir() if path.name != ".packing.lock"}
    pack(corpus, packed.folder, sample_rate=RATE, shard_clips=4, workers=2)
    assert {path: path.stat().st_mtime_ns for path in before} == {p: s.st_mtime_ns for p, s in before.items()}
    assert {path.stat().st_ino for path in before} == {s.st_ino for s in before.values()}


def test_other_settings_or_files_are_refused(corpus, packed, tmp_path):
    with pytest.raises(DataError, match="another packing lies there, it differs in codec, shard_clips; choose a new"):
        pack(corpus, packed.folder, sample_rate=RATE, codec="wav", shard_clips=5)
    fewer = dataclasses.replace(corpus, clips=corpus.clips[1:])
    with pytest.raises(DataError, match="it differs in clips, the clips"):
        pack(fewer, packed.folder, sample_rate=RATE, shard_clips=4)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="the folder holds other files"):
        pack(corpus, tmp_path, sample_rate=RATE)
    with pytest.raises(DataError, match="no clips to pack"):
        pack(dataclasses.replace(corpus, clips=()), tmp_path / "new", sample_rate=RATE)
    with pytest.raises(OutputError, match="cannot be written"):
        pack(corpus, tmp_path / "notes.txt", sample_rate=RATE)


def test_two_cannot_pack_into_one_folder(corpus, tmp_path):
    def meanwhile(line: str, share: float) -> None:
        with pytest.raises(DataError, match="another process is packing there"):
            pack(corpus, tmp_path / "out", sample_rate=RATE)

    pack(corpus, tmp_path / "out", sample_rate=RATE, shard_clips=30, progress=meanwhile)


def test_unknown_labels_are_all_told_before_anything_is_written(corpus, tmp_path):
    clips = (*corpus.clips, Clip(corpus.clips[0].path, ("barks",)), Clip(corpus.clips[1].path, ("snow",)))
    with pytest.raises(DataError, match=r"2 problems: label 'barks' .*did you mean 'bark'\?; label 'snow'"):
        pack(dataclasses.replace(corpus, clips=clips), tmp_path / "out", sample_rate=RATE)
    assert contents(tmp_path / "out") == {}


def test_unreadable_clips_are_left_out_up_to_the_quota(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", 10)
    for number in (0, 5, 6):
        corpus.clips[number].path.write_bytes(b"RIFF nothing")
    out = tmp_path / "out"
    told = []
    with pytest.raises(
        DataError, match=r"2 of 10 clips cannot be read, more than the quota of 0\.1; .*kläng 0.*kläng 5"
    ):
        pack(corpus, out, sample_rate=RATE, shard_clips=3, quota=0.1, progress=lambda line, share: told.append(share))
    assert told == [0.25]
    packed = pack(corpus, out, sample_rate=RATE, shard_clips=3, quota=0.3)
    assert [described(clip) for clip in packed.clips] == [described(corpus.clips[n]) for n in (1, 2, 3, 4, 7, 8, 9)]
    assert [clip.index for clip in packed.clips] == [0, 1, 0, 1, 0, 1, 0]
    reader = ClipReader(RATE)
    for clip, number in zip(packed.clips, (1, 2, 3, 4, 7, 8, 9), strict=True):
        np.testing.assert_array_equal(reader.read(clip), reader.read(corpus.clips[number]))
    unreadable = json.loads((out / "manifest.json").read_text())["unreadable"]
    assert [entry["clip"] for entry in unreadable] == [0, 5, 6]
    assert all(str(corpus.clips[entry["clip"]].path) in entry["reason"] for entry in unreadable)
    assert verify(out) == []


def test_a_shard_without_any_readable_clip(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", 6)
    for number in (2, 3):
        corpus.clips[number].path.write_bytes(b"")
    packed = pack(corpus, tmp_path / "out", sample_rate=RATE, shard_clips=2, quota=0.5)
    assert [(c.path.name[9:11], c.index) for c in packed.clips] == [("00", 0), ("00", 1), ("02", 0), ("02", 1)]
    assert verify(tmp_path / "out") == []


def test_damage_is_named(packed, tmp_path):
    folder = copy_of(packed.folder, tmp_path / "copy")
    corpus = open_shards(folder)
    clip = corpus.clips[9]
    record = open_index(folder).record(clip.path, clip.index)
    damage(clip.path, int(record["offset"] + record["size"] - 1))
    damage(folder / "shard-00004.tar", 0)
    (folder / "shard-00005.tar").unlink()
    reader = ClipReader(RATE)
    with pytest.raises(AudioError, match=r"shard-00002\.tar row 1: its checksum is wrong"):
        reader.read(clip)
    assert len(reader.read(corpus.clips[8])) == 3208  # its neighbours are whole
    with pytest.raises(AudioError, match=r"shard-00005\.tar row 0: cannot be read"):
        reader.read(corpus.clips[20])
    for row in (4, -1):
        with pytest.raises(AudioError, match=rf"shard-00002\.tar row {row}: there is no such row; it has 4 rows"):
            reader.read(dataclasses.replace(clip, index=row))
    found = verify(folder)
    assert [problem.removeprefix(f"{folder}/").split(":")[0] for problem in found] == [
        "shard-00002.tar",
        "shard-00002.tar row 1",
        "shard-00004.tar",  # a header is damaged: no clip
        "shard-00005.tar",
    ]
    assert "audio/kläng 9.flac" in found[1]
    clip.path.write_bytes(clip.path.read_bytes()[: int(record["offset"]) + 10])
    with pytest.raises(AudioError, match=r"shard-00002\.tar row 1: the shard ends too early"):
        reader.read(clip)


def test_deleted_shards_are_packed_again(corpus, packed, tmp_path):
    folder = copy_of(packed.folder, tmp_path / "copy")
    (folder / "shard-00003.tar").unlink()
    (folder / "shard-00001.tar").write_bytes(b"cut off")
    pack(corpus, folder, sample_rate=RATE, shard_clips=4)
    assert contents(folder) == contents(packed.folder)


def test_a_damaged_index_is_named(packed, tmp_path):
    folder = copy_of(packed.folder, tmp_path / "copy")
    damage(folder / "label_indices.npy", 130)
    assert verify(folder) == [f"{folder / 'label_indices.npy'}: its checksum is wrong; pack again to mend it"]
    np.save(folder / "clips.npy", np.load(folder / "clips.npy")[:-1])
    with pytest.raises(DataError, match=r"manifest\.json counts 22 clips, clips\.npy 21"):
        ShardClips(folder)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest"):
        ShardClips(folder)


def test_targets_are_the_labels(corpus, packed):
    random = np.random.default_rng(0)
    order = random.permutation(22)
    lazy = dataclasses.replace(packed, clips=ShardClips(packed.folder, order))
    reordered = dataclasses.replace(packed, labels=LABELS[::-1])
    for made, clips, labels in (
        (targets(corpus), corpus.clips, LABELS),
        (targets(packed), corpus.clips, LABELS),
        (targets(reordered), corpus.clips, LABELS[::-1]),
        (targets(lazy), [corpus.clips[i] for i in order], LABELS),
    ):
        assert (made.offsets.dtype, made.indices.dtype) == (np.int64, np.int32)
        assert [tuple(labels[i] for i in made.of(n)) for n in range(len(made))] == [clip.labels for clip in clips]
    for whole in (corpus, packed):
        with pytest.raises(DataError, match=r"2 problems: label 'clock tick' is not in the label set; label 'rain'"):
            targets(dataclasses.replace(whole, labels=("bark",)))


def test_parts_stay_lazy(corpus, packed):
    clips = packed.clips
    assert isinstance(clips, ShardClips)
    part = clips[3:20:4]
    assert isinstance(part, ShardClips)
    assert list(part) == list(clips)[3:20:4]
    assert list(part[::-1]) == list(clips)[3:20:4][::-1]
    train = part.in_split("train")
    assert [described(clip) for clip in train] == [described(c) for c in corpus.clips[3:20:4] if c.split == "train"]
    with pytest.raises(DataError, match=r"no split 'tran'; there are train, test; did you mean 'train'\?"):
        clips.in_split("tran")


def read_in_process(reader: ClipReader, clips: ShardClips, number: int) -> bytes:
    return reader.read(clips[number]).tobytes()


@pytest.mark.parametrize("method", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_several_processes_read_at_once(packed, method):
    reader, clips = ClipReader(16_000), packed.clips[1:]
    expected = [reader.read(clip).tobytes() for clip in clips]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        read = pool.map(read_in_process, [reader] * len(clips), [clips] * len(clips), range(len(clips)))
        assert list(read) == expected
    assert len(pickle.dumps(packed.clips)) < 500


def test_memory_does_not_grow_with_the_clips(packed, tmp_path):
    """A folder of two million clips costs a process megabytes; as ``Clip`` values they would be gigabytes."""
    count = 2_000_000
    folder = tmp_path / "large"
    folder.mkdir()
    meta = np.frombuffer(
        json.dumps(
            {"source": "a", "labels": ["rain"], "events": None, "folds": [], "split": "train", "group": "a"}
        ).encode(),
        dtype=np.uint8,
    )
    records = np.zeros(count, dtype=np.load(packed.folder / "clips.npy").dtype)
    np.save(folder / "clips.npy", records)
    np.save(folder / "label_offsets.npy", np.arange(count + 1))
    np.save(folder / "label_indices.npy", np.full(count, 2, np.int32))
    np.save(folder / "meta_offsets.npy", np.arange(count + 1) * len(meta))
    np.save(folder / "meta.npy", np.tile(meta, count))
    manifest = json.loads((packed.folder / "manifest.json").read_text())
    shards = [{"file": f"shard-{n:05d}.tar", "clips": 2000, "bytes": 0, "sha256": ""} for n in range(1000)]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "splits": ["train"], "shards": shards}))
    script = f"""
from pathlib import Path
import numpy as np
from htsat.data.shards import open_shards, targets

def private():
    # what this process alone holds: pages of mapped files are shared and given back at will
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

before = private()
corpus = open_shards(Path({str(folder)!r}))
found = targets(corpus)
counts = np.bincount(found.indices)
for number in np.random.default_rng(0).integers(0, len(corpus.clips), 2000):
    assert corpus.clips[int(number)].index == number % 2000
print([len(corpus.clips), counts.tolist(), private() - before])
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    number, found, megabytes = json.loads(result.stdout)
    assert (number, found) == (count, [0, 0, count])
    assert megabytes < 40
