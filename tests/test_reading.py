"""Reading clips: whole files, rows of HDF5 files in the published layout, and what several processes need."""

import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from htsat.audio.resample import read_audio, resampled_length
from htsat.data.clips import Clip
from htsat.data.reading import ClipReader
from htsat.errors import AudioError

h5py = pytest.importorskip("h5py")

RATE = 32_000


def write_published(path: Path, waveforms: np.ndarray) -> None:
    """Write the layout of PANNs and HTS-AT, field by field as ``pack_waveforms_to_hdf5`` of PANNs creates it."""
    count, length = waveforms.shape
    with h5py.File(path, "w") as file:
        file.create_dataset("audio_name", shape=(count,), dtype="S20")
        file.create_dataset("waveform", shape=(count, length), dtype=np.int16)
        file.create_dataset("target", shape=(count, 527), dtype=bool)
        file.attrs.create("sample_rate", data=RATE, dtype=np.int32)
        for row in range(count):
            file["audio_name"][row] = f"Y{row:011d}.wav".encode()
            file["waveform"][row] = waveforms[row]
            file["target"][row, row] = True


@pytest.fixture
def samples() -> np.ndarray:
    random = np.random.default_rng(0)
    samples = random.integers(-32768, 32768, (4, 6400)).astype(np.int16)
    samples[0, :4] = (-32768, -32767, 32767, 0)
    return samples


@pytest.fixture
def published(tmp_path, samples) -> Path:
    path = tmp_path / "balanced_train.h5"
    write_published(path, samples)
    return path


def test_a_plain_file_reads_as_read_audio_does(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, (4410, 2)), 44_100)
    reader = ClipReader(RATE)
    waveform = reader.read(Clip(path, ("a",)))
    assert waveform.dtype == np.float32
    assert len(waveform) == resampled_length(4410, 44_100, RATE) == 3200
    np.testing.assert_array_equal(waveform, read_audio(path, RATE))
    assert reader.duration(Clip(path, ("a",))) == pytest.approx(0.1)


def test_hdf5_rows_are_those_of_the_published_code(published, samples):
    reader = ClipReader(RATE)
    for row in range(len(samples)):
        # int16_to_float32 of both repositories
        expected = (samples[row] / 32767.0).astype(np.float32)
        np.testing.assert_array_equal(reader.read(Clip(published, (), index=row)), expected)
    assert reader.duration(Clip(published, (), index=0)) == 0.2
    # the one value beyond full scale that int16 has
    assert reader.read(Clip(published, (), index=0))[0] == np.float32(-32768 / 32767)


def test_hdf5_at_another_rate_is_resampled(published, samples):
    waveform = ClipReader(16_000).read(Clip(published, (), index=1))
    expected = read_audio(((samples[1] / 32767.0).astype(np.float32), RATE), 16_000)
    assert len(waveform) == 3200
    np.testing.assert_array_equal(waveform, expected)


def test_hdf5_without_a_rate_is_of_32_khz_and_float_samples_stay(tmp_path):
    path = tmp_path / "old.hdf5"
    waveform = np.linspace(-1, 1, 64, dtype=np.float32)[None]
    with h5py.File(path, "w") as file:
        file.create_dataset("waveform", data=waveform)
    np.testing.assert_array_equal(ClipReader(RATE).read(Clip(path, (), index=0)), waveform[0])


@pytest.mark.parametrize("row", [4, -1])
def test_a_row_that_does_not_exist_is_named(published, row):
    with pytest.raises(AudioError, match=rf"balanced_train\.h5 row {row}: there is no such row; expected 0 to 3"):
        ClipReader(RATE).read(Clip(published, (), index=row))


def test_hdf5_errors_name_the_file_and_what_is_wrong(tmp_path, published):
    reader = ClipReader(RATE)
    with pytest.raises(AudioError, match=r"none\.h5: there is no such file"):
        reader.read(Clip(tmp_path / "none.h5", (), index=0))
    cut = tmp_path / "cut.h5"
    cut.write_bytes(published.read_bytes()[:5000])
    with pytest.raises(AudioError, match=r"cut\.h5: cannot be opened as HDF5 .*truncated"):
        reader.read(Clip(cut, (), index=0))
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file.create_dataset("target", data=np.zeros(3))
    with pytest.raises(AudioError, match=r"other\.h5: expected 'waveform' .* found target"):
        reader.read(Clip(other, (), index=0))
    with h5py.File(other, "w") as file:
        file.create_dataset("waveform", data=np.zeros((2, 3)))
    with pytest.raises(AudioError, match=r"other\.h5: expected 'waveform' .* found float64 of shape \(2, 3\)"):
        reader.read(Clip(other, (), index=0))


def test_max_seconds_holds_for_every_kind(tmp_path, published):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(6400), RATE)
    reader = ClipReader(RATE, max_seconds=0.1)
    for clip, name in ((Clip(path, ()), "a.wav"), (Clip(published, (), index=2), "balanced_train.h5 row 2")):
        with pytest.raises(AudioError, match=rf"{name}: .*longer than the limit of 0\.1 s"):
            reader.read(clip)


def test_cached_waveforms_are_the_same_and_safe_from_the_caller(tmp_path, published):
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(1).uniform(-1, 1, 6400), RATE, subtype="PCM_24")
    clips = [Clip(path, ()), *(Clip(published, (), index=row) for row in range(4))]
    plain, caching = ClipReader(RATE), ClipReader(RATE, cache_bytes=3 * 6400 * 4)
    expected = [plain.read(clip) for clip in clips]
    for _ in range(3):
        for clip, waveform in zip(clips, expected, strict=True):
            read = caching.read(clip)
            np.testing.assert_array_equal(read, waveform)
            read[:] = 7  # the caller may do with it what he likes
    # Three of five fit, and can be had without their files; a reader that travelled takes none along.
    path.unlink()
    published.rename(tmp_path / "gone.h5")
    fresh = pickle.loads(pickle.dumps(caching))
    np.testing.assert_array_equal(caching.read(clips[0]), expected[0])
    np.testing.assert_array_equal(caching.read(clips[2]), expected[2])
    with pytest.raises(AudioError):
        fresh.read(clips[0])
    assert (fresh.sample_rate, fresh.cache_bytes, fresh.max_seconds) == (RATE, 3 * 6400 * 4, None)


def read_in_process(reader: ClipReader, clip: Clip) -> bytes:
    return reader.read(clip).tobytes()


@pytest.mark.parametrize("method", [m for m in ("fork", "spawn") if m in multiprocessing.get_all_start_methods()])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_several_processes_read_at_once(published, method):
    reader = ClipReader(RATE)
    clips = [Clip(published, (), index=row) for row in range(4)] * 8
    expected = [reader.read(clip).tobytes() for clip in clips]  # opens the file before the others start
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        assert list(pool.map(read_in_process, [reader] * len(clips), clips)) == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process_inherits_the_reader_itself(published):
    """As workers of a data loader do: nothing is pickled, the open file is in the memory that was copied."""
    reader = ClipReader(RATE)
    clip = Clip(published, (), index=3)
    expected = reader.read(clip).tobytes()
    before = reader._hdf5[published]
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        same = reader.read(clip).tobytes() == expected and reader._hdf5[published] is not before
        os.write(send, b"y" if same else b"n")
        os._exit(0)
    assert os.read(receive, 1) == b"y"
    os.waitpid(child, 0)
    assert reader.read(clip).tobytes() == expected
    assert reader._hdf5[published] is before
