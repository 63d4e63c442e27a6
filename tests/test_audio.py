"""Reading audio: the truth is the signal that was written, the header that was forged, or soxr itself."""

import errno
import io
import os
import struct
import sys
import threading
import time
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import example, given, settings
from hypothesis import strategies as st

from htsat.audio import decode
from htsat.audio.decode import AUDIO_SUFFIXES, find_audio, open_audio
from htsat.audio.resample import prefetch, read_audio, resampled_length, stream_audio
from htsat.errors import AudioError

RATE = 32000


def tone(seconds=1.0, rate=RATE, frequency=1000.0, channels=1):
    """(num_samples, channels) of a sine; the second channel is half as loud and so on."""
    time_axis = np.arange(round(seconds * rate)) / rate
    sine = 0.5 * np.sin(2 * np.pi * frequency * time_axis)
    return sine[:, None] / np.arange(1, channels + 1)


def noise(seconds=1.0, rate=RATE, channels=2, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (round(seconds * rate), channels))


def encoded(samples, rate=RATE, file_format="WAV", subtype="PCM_16"):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=file_format, subtype=subtype)
    return buffer.getvalue()


def everything(source, **options):
    with open_audio(source, **options) as reader:
        return np.concatenate(list(reader.blocks(0.25)))


def peak_frequency(samples, rate):
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 1 << 18))
    return np.argmax(spectrum) * rate / (1 << 18)


def av_encoded(container, codec, samples, rate):
    av = pytest.importorskip("av", reason="needs PyAV (the extra `codecs`)")
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        stream.bit_rate = 64000
        frame = av.AudioFrame.from_ndarray(samples.T.astype(np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        resampler = av.AudioResampler(format=stream.codec_context.format.name, layout="mono", rate=rate)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            output.mux(stream.encode(part))
    return buffer.getvalue()


class Pipe(io.RawIOBase):
    """What standard input is: bytes that cannot be sought."""

    def __init__(self, data):
        self._data = io.BytesIO(data)

    def readable(self):
        return True

    def readinto(self, target):
        return self._data.readinto(target)


# formats


LOSSLESS = [
    ("WAV", "PCM_U8", 8),
    ("WAV", "PCM_16", 16),
    ("WAV", "PCM_24", 24),
    ("WAV", "PCM_32", 24),
    ("WAV", "FLOAT", 24),
    ("WAV", "DOUBLE", 24),
    ("WAVEX", "PCM_16", 16),
    ("RF64", "PCM_16", 16),
    ("W64", "PCM_16", 16),
    ("AIFF", "PCM_16", 16),
    ("AIFF", "PCM_24", 24),
    ("AIFF", "FLOAT", 24),
    ("CAF", "PCM_16", 16),
    ("AU", "PCM_16", 16),
    ("FLAC", "PCM_16", 16),
    ("FLAC", "PCM_24", 24),
    ("CAF", "ALAC_16", 16),
]
LOSSY = [
    ("OGG", "VORBIS", 44100),
    ("OGG", "OPUS", 48000),
    ("MP3", "MPEG_LAYER_III", 44100),
    ("WAV", "ULAW", 8000),
    ("WAV", "IMA_ADPCM", 44100),
]


@pytest.mark.parametrize(("file_format", "subtype", "bits"), LOSSLESS)
def test_lossless_formats_give_the_samples_written(file_format, subtype, bits):
    samples = noise()
    data = encoded(samples, 44100, file_format, subtype)
    with open_audio(data) as reader:
        assert (reader.sample_rate, reader.num_channels, reader.duration) == (44100, 2, len(samples) / 44100)
        got = np.concatenate(list(reader.blocks(0.1)))
        assert not reader.truncated
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, samples.mean(axis=1), atol=2.0 ** (2 - bits))


@pytest.mark.parametrize(("file_format", "subtype", "rate"), LOSSY)
def test_lossy_formats_keep_the_tone_and_the_length(file_format, subtype, rate):
    if not soundfile.check_format(file_format, subtype):
        pytest.skip("this libsndfile cannot write it")
    data = encoded(tone(3.0, rate, channels=2), rate, file_format, subtype)
    got = everything(data)
    assert abs(len(got) - 3 * rate) <= 512
    assert peak_frequency(got, rate) == pytest.approx(1000, abs=1)
    assert np.sqrt(np.mean(got**2)) == pytest.approx(0.375 / np.sqrt(2), rel=0.03)
    whole, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    np.testing.assert_allclose(got, whole.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [
        ("ipod", "aac", 44100),
        ("mp4", "aac", 48000),
        ("adts", "aac", 44100),
        ("webm", "libopus", 48000),
        ("matroska", "aac", 22050),
        ("avi", "pcm_s16le", 32000),
        ("asf", "wmav2", 44100),
        ("caf", "alac", 44100),
        ("ipod", "alac", 44100),
        ("ac3", "ac3", 48000),
    ],
)
def test_codecs_keep_the_tone_and_the_length(container, codec, rate):
    data = av_encoded(container, codec, tone(3.0, rate), rate)
    with open_audio(data) as reader:
        got = np.concatenate(list(reader.blocks(0.5)))
        assert (reader.sample_rate, reader.num_channels) == (rate, 1)
    # encoders add delay and padding; nothing may be lost, except that this WMA encoder keeps its last frame
    assert (-2048 if codec == "wmav2" else 0) <= len(got) - 3 * rate <= 4096
    assert peak_frequency(got, rate) == pytest.approx(1000, abs=1)
    assert np.sqrt(np.mean(got**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.05)


def test_picture_without_sound_is_refused():
    av = pytest.importorskip("av", reason="needs PyAV (the extra `codecs`)")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        output.mux(stream.encode(None))
    with pytest.raises(AudioError, match=r"^silent.mkv: the file has no sound track; .*name a recording"):
        open_audio(buffer.getvalue(), "silent.mkv")


def test_only_listed_formats_reach_a_decoder():
    """FFmpeg and libsndfile read VOC; a format that nobody needs is only a way to attack them."""
    pytest.importorskip("av", reason="needs PyAV (the extra `codecs`)")
    with pytest.raises(AudioError, match=r"^x: not a recording that can be read; expected WAV"):
        open_audio(encoded(tone(), RATE, "VOC"), "x")


def test_playlists_cannot_open_other_files(tmp_path):
    pytest.importorskip("av", reason="needs PyAV (the extra `codecs`)")
    other = tmp_path / "secret.wav"
    other.write_bytes(encoded(tone()))
    playlists = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{other}\n#EXT-X-ENDLIST\n",
        "list.ffconcat": f"ffconcat version 1.0\nfile '{other}'\n",
    }
    for name, text in playlists.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(AudioError, match=r"this is text, not a recording"):
            open_audio(tmp_path / name)


@pytest.mark.parametrize(
    "head", [b"\0\0\0\x1cftypM4A ", b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81", b"\xff\xf1\x50\x80\x29\xbf\xfc\xde"]
)
def test_missing_extra_is_named(monkeypatch, head):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match=r'^talk: .*pip install "htsat\[codecs\]"$'):
        open_audio(head + bytes(100), "talk")


def test_core_formats_need_no_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for file_format in ("WAV", "FLAC"):
        assert len(everything(encoded(tone(), RATE, file_format))) == RATE
    with pytest.raises(AudioError, match=r"this is text") as caught:
        open_audio(b"hello " * 100, "notes.wav")
    assert "htsat[codecs]" not in str(caught.value)


# limits


@pytest.mark.parametrize("rate", [4000, 8000, 11025, 22050, 44100, 48000, 96000, 192000, 384000])
@pytest.mark.parametrize("seconds", [0.05, 1.0])
def test_every_legal_rate(rate, seconds):
    got = read_audio(encoded(tone(seconds, rate, 500), rate), RATE)
    assert len(got) == int(round(seconds * rate) * RATE / rate + 0.5)
    if seconds == 1.0:
        assert peak_frequency(got, RATE) == pytest.approx(500, abs=1)


@pytest.mark.parametrize("channels", range(1, 17))
def test_channels_are_averaged(channels):
    values = np.random.default_rng(channels).uniform(-0.5, 0.5, (300, channels))
    for source in (encoded(values, RATE, "WAV", "FLOAT"), (values, RATE), (values.T, RATE)):
        np.testing.assert_allclose(everything(source), values.mean(axis=1), atol=1e-7)


def forged(rate=RATE, channels=1, frames=100):
    """A 16-bit WAV with any header."""
    body = bytes(2 * channels * frames)
    header = struct.pack("<HHIIHH", 1, channels, rate, (rate * channels * 2) & 0xFFFFFFFF, channels * 2, 16)
    return (
        b"RIFF"
        + struct.pack("<I", 36 + len(body))
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + header
        + b"data"
        + struct.pack("<I", len(body))
        + body
    )


@pytest.mark.parametrize("rate", [1, 3999, 384001, 10_000_000, 2**31 - 1])
def test_absurd_rates(rate):
    for source in (forged(rate=rate), (np.zeros(100), rate)):
        with pytest.raises(AudioError, match=rf"^x: the sample rate is {rate} Hz; expected 4000 to 384000 Hz, export"):
            open_audio(source, "x")


def test_too_many_channels():
    for source in (forged(channels=17), (np.zeros((100, 17)), RATE), (np.zeros((17, 100)), RATE)):
        with pytest.raises(AudioError, match=r"^x: the recording has 17 channels; expected 1 to 16"):
            open_audio(source, "x")


@pytest.mark.parametrize("rate", [0.5, 16000.5, "16000", None, float("nan")])
def test_sample_rate_of_an_array_must_be_whole(rate):
    with pytest.raises(AudioError, match=r"^<waveform>: the sample rate is .*expected a whole number"):
        open_audio((np.zeros(100), rate))
    with open_audio((np.zeros(100), 16000.0)) as reader:
        assert reader.sample_rate == 16000


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_samples_are_named_with_their_time(bad):
    samples = noise(3.0)
    samples[round(2.5 * RATE), 1] = bad
    samples[round(2.7 * RATE), 0] = bad
    for source in (encoded(samples, RATE, "WAV", "FLOAT"), (samples, RATE)):
        with (
            open_audio(source, "x.wav") as reader,
            pytest.raises(AudioError, match=r"^x.wav: the sample at 2.500 s is NaN or infinite"),
        ):
            list(reader.blocks(0.3))


def test_loud_silent_and_double_are_legal():
    loud = 1000 * tone()
    np.testing.assert_allclose(everything(encoded(loud, RATE, "WAV", "DOUBLE")), loud[:, 0], rtol=1e-6)
    assert not everything(encoded(np.zeros((100, 1)))).any()


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64"])
def test_arrays_of_every_type(dtype):
    wave = tone(0.1)[:, 0]
    scale = {"i": 2.0 ** (np.dtype(dtype).itemsize * 8 - 1), "u": 128.0, "f": 1.0}[np.dtype(dtype).kind]
    values = (wave * scale + (128 if dtype == "uint8" else 0)).astype(dtype)
    got = everything((values, RATE))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wave, atol=1.01 / 128 if "8" in dtype else 1e-3)
    assert not np.shares_memory(got, values)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(100, bool),
        np.zeros(100, complex),
        np.array(["a"]),
        np.zeros((2, 3, 4)),
        np.zeros(()),
        np.zeros(0),
        np.zeros((0, 2)),
    ],
)
def test_arrays_that_are_no_waveform(values):
    with pytest.raises(AudioError, match=r"^<waveform>: .*expected"):
        open_audio((values, RATE))


def test_max_seconds():
    assert len(read_audio(encoded(tone(2.0)), RATE, max_seconds=2.0)) == 2 * RATE
    with pytest.raises(AudioError, match=r"^x: the recording is longer than the limit of 1.9 s"):
        open_audio(encoded(tone(2.0)), "x", max_seconds=1.9)
    flac = unknown_length_flac(tone(30.0))
    reader = open_audio(flac, "x", max_seconds=5.0)
    seen = 0
    with reader, pytest.raises(AudioError, match=r"longer than the limit of 5 s"):
        for block in reader.blocks(1.0):
            seen += len(block)
    assert seen <= 5 * RATE, "the limit holds while streaming, when the header does not tell"


def test_memory_does_not_grow_with_the_recording(tmp_path):
    path = tmp_path / "hour.wav"
    with soundfile.SoundFile(path, "w", 4000, 1, "PCM_U8") as file:
        for _ in range(60):
            file.write(np.zeros(60 * 4000))
    tracemalloc.start()
    total = sum(len(block) for block in stream_audio(path, 4000, block_seconds=60))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 3600 * 4000
    assert peak < 12e6, "the whole would be 58 MB"


def test_block_length_is_bounded_by_memory(monkeypatch):
    monkeypatch.setattr(decode, "_MAX_BLOCK_VALUES", 1600)
    with open_audio((np.zeros((RATE, 16)), RATE)) as reader:
        assert max(map(len, reader.blocks(10.0))) == 100


# sources


def test_all_kinds_of_source_give_the_same(tmp_path, monkeypatch):
    samples = noise(0.5)
    data = encoded(samples, RATE, "FLAC")
    path = tmp_path / "böse name\n[1].flac"
    path.write_bytes(data)
    expected = everything(data)
    assert len(expected) == RATE // 2
    behind = io.BytesIO(b"header" + data)
    behind.seek(6)
    with open(path, "rb") as file:
        sources = [path, str(path), io.BytesIO(data), behind, file, Pipe(data), bytearray(data), memoryview(data)]
        for source in sources:
            np.testing.assert_array_equal(everything(source), expected)
        assert not file.closed, "the caller's file object stays open"
    monkeypatch.setattr(decode, "_SPOOL_IN_MEMORY", 100)
    np.testing.assert_array_equal(everything(Pipe(data)), expected)


def test_operating_system_pipe():
    data = encoded(noise(2.0))
    read_end, write_end = os.pipe()

    def write():
        with os.fdopen(write_end, "wb") as file:
            file.write(data)

    writer = threading.Thread(target=write)
    writer.start()
    with os.fdopen(read_end, "rb") as pipe:
        np.testing.assert_array_equal(everything(pipe), everything(data))
    writer.join()


def test_endless_pipe_is_refused(monkeypatch):
    monkeypatch.setattr(decode, "MAX_SPOOL_BYTES", 3 << 20)
    with pytest.raises(AudioError, match=r"^<stream>: the stream exceeds"):
        open_audio(Pipe(bytes(5 << 20)))


def test_wrong_sources():
    for source in (3, None, ["a.wav"]):
        with pytest.raises(TypeError, match=r"expected a path, bytes"):
            open_audio(source)
    with pytest.raises(AudioError, match=r"gives text; expected bytes"):
        open_audio(io.StringIO("RIFF"))
    closed = io.BytesIO(encoded(tone()))
    closed.close()
    with pytest.raises(AudioError, match=r"closed"):
        open_audio(closed)
    spent = io.BytesIO(encoded(tone()))
    spent.seek(0, 2)
    with pytest.raises(AudioError, match=r"nothing follows the position of the file object"):
        open_audio(spent)


def test_blocks_are_read_once():
    with open_audio(encoded(tone())) as reader:
        list(reader.blocks())
        with pytest.raises(RuntimeError, match=r"once"):
            list(reader.blocks())


def test_failing_medium_is_no_truncation():
    class Failing(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 50_000:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    with (
        open_audio(Failing(encoded(noise(5.0))), "usb.wav", allow_truncated=True) as reader,
        pytest.raises(AudioError, match=r"^usb.wav: reading failed \(Input/output error\)"),
    ):
        list(reader.blocks())


# bad files


def make_bad(tmp_path, kind):
    path = tmp_path / f"{kind}.wav"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("onset\toffset\n" * 50)
    elif kind == "random":
        path.write_bytes(b"\xff\xfe" + np.random.default_rng(1).bytes(5000))
    elif kind == "bare":
        path.write_bytes(b"RIFF\x24\0\0\0WAVE")
    elif kind == "no_samples":
        path.write_bytes(encoded(np.zeros((0, 1))))
    elif kind == "no_samples_then_notes":
        data = forged(frames=0)
        path.write_bytes(data + b"LIST\x04\0\0\0INFO")
    elif kind == "folder":
        path.mkdir()
    elif kind == "broken_link":
        path.symlink_to(tmp_path / "gone.wav")
    elif kind == "circular_link":
        path.symlink_to(path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "truncated_m4a":
        path.write_bytes(b"\0\0\0\x1cftypM4A \0\0\2\0" + bytes(200))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "there is no such file; expected a recording, check the path"),
        ("empty", "the file is empty .0 bytes.; expected a recording, copy it again"),
        ("text", "this is text, not a recording; expected WAV, FLAC"),
        ("random", "not a recording that can be read; expected WAV, FLAC"),
        (
            "bare",
            "it begins like a WAV file but cannot be read; it is damaged, cut off or of a rare coding, copy it again",
        ),
        ("no_samples", "the recording has no samples; expected at least one, record or export it again"),
        ("no_samples_then_notes", "the recording has no samples; expected at least one"),
        ("folder", "this is a folder; expected a recording, name a file in it"),
        ("broken_link", "this is a link to .*gone.wav, which does not exist; expected a recording, restore"),
        ("circular_link", "it cannot be opened .*; expected a readable file, check the path"),
        ("fifo", "this is a pipe; expected a file, give '-'"),
        ("truncated_m4a", "(it begins like a media file but cannot be read|.*htsat.codecs.)"),
    ],
)
@pytest.mark.parametrize("with_codecs", [True, False])
def test_bad_files_get_one_clear_line(tmp_path, monkeypatch, capfd, kind, message, with_codecs):
    if kind == "fifo" and not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    if not with_codecs:
        monkeypatch.setitem(sys.modules, "av", None)
    path = make_bad(tmp_path, kind)
    with pytest.raises(AudioError) as caught:
        everything(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    with pytest.raises(AudioError, match=message):
        everything(path, name="short")
    assert capfd.readouterr() == ("", "")


def test_device_is_refused():
    if not os.path.exists("/dev/null"):
        pytest.skip("no devices here")
    with pytest.raises(AudioError, match=r"^/dev/null: this is a device or socket; expected a file"):
        open_audio("/dev/null")


def test_unreadable_permissions(tmp_path, monkeypatch):
    path = tmp_path / "locked.wav"
    path.write_bytes(encoded(tone()))
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything: let the system call fail as it does for others

        def refuse(name, mode):
            raise PermissionError(errno.EACCES, "Permission denied", name)

        monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(AudioError, match=r"locked.wav: no permission to read it; .*change its permissions"):
        open_audio(path)


def test_unprintable_names_stay_on_one_line(tmp_path):
    with pytest.raises(AudioError) as caught:
        open_audio(os.fsdecode(os.fsencode(tmp_path) + b"/a\nb\xff.wav"))
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


# truncation


def xing_offset(data):
    return max(data[:400].find(b"Xing"), data[:400].find(b"Info"))


@pytest.mark.parametrize(
    ("file_format", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "PCM_24"),
        ("WAV", "FLOAT"),
        ("RF64", "PCM_16"),
        ("W64", "PCM_16"),
        ("AIFF", "PCM_16"),
        ("AU", "PCM_16"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
        ("CAF", "PCM_16"),
    ],
)
def test_truncated_files(file_format, subtype, capfd):
    data = encoded(noise(6.0, 48000), 48000, file_format, subtype)
    whole = everything(data)
    for part in (0.4, 0.9):
        cut = data[: int(part * len(data))]
        with pytest.raises(
            AudioError, match=r"^x: the file is truncated: .*; copy it again or pass --allow-truncated$"
        ):
            everything(cut, name="x")
        assert capfd.readouterr() == ("", "")
        if file_format == "CAF" and "av" not in sys.modules:
            pytest.importorskip("av", reason="libsndfile refuses truncated CAF")
        with open_audio(cut, allow_truncated=True) as reader:
            got = np.concatenate(list(reader.blocks(10.0)))  # one block: its good part must not be lost
            assert reader.truncated
        capfd.readouterr()  # mpg123 remarks on truncated MP3 that it is made to read
        assert 0.7 * part < len(got) / len(whole) < 1.1 * part
        if file_format != "MP3":
            # mpg123 conceals the frames around a missing bit reservoir
            np.testing.assert_allclose(got[:-5000], whole[: len(got) - 5000], atol=1e-6)


def test_chunk_sizes_beyond_any_file():
    data = bytearray(encoded(noise(0.1), RATE, "W64"))
    data[56:64] = struct.pack("<Q", 2**64 - 8)  # the size of the chunk before the samples
    with pytest.raises(AudioError):
        everything(bytes(data))


def test_damaged_files_raise_nothing_else():
    """Whatever bytes are changed: samples, or one AudioError on one line."""
    rng = np.random.default_rng(0)
    good = [
        encoded(noise(0.3, 44100), 44100, f, s)
        for f, s in [("WAV", "PCM_16"), ("W64", "FLOAT"), ("FLAC", "PCM_16"), ("CAF", "ALAC_16")]
    ]
    good += [
        encoded(noise(0.3, 44100), 44100, "AIFF"),
        encoded(noise(0.3, 48000), 48000, "OGG", "VORBIS"),
        encoded(noise(0.3), RATE, "RF64"),
    ]
    outcomes = set()
    for turn in range(210):
        data = bytearray(good[turn % len(good)])
        for at in rng.integers(0, 200 if turn % 2 else len(data), 4):
            data[at] = rng.choice([0, 127, 128, 255, rng.integers(256)])
        try:
            outcomes.add(np.isfinite(everything(bytes(data), max_seconds=100, allow_truncated=turn % 3 == 0)).all())
        except AudioError as error:
            assert "\n" not in str(error)
            outcomes.add("error")
    assert outcomes == {True, "error"}


def test_truncated_message_gives_the_lengths():
    data = encoded(noise(10.0))
    with pytest.raises(AudioError, match=r"its header promises 10.0 s, 3.2 s could be read"):
        open_audio(data[: 44 + round(0.32 * (len(data) - 44))])


def test_a_few_missing_samples_are_no_truncation():
    data = encoded(noise(20.0, 8000), 8000)
    assert len(everything(data[:-3200])) == 20 * 8000 - 800  # 0.1 s
    assert len(everything(data[:-6400])) == 20 * 8000 - 1600  # 0.2 s = 1 %
    with pytest.raises(AudioError, match=r"truncated"):
        everything(data[:-7000])


@pytest.mark.parametrize("container", ["matroska", "webm", "adts"])
def test_truncated_codecs(container):
    data = av_encoded(container, "libopus" if container == "webm" else "aac", noise(4.0, 48000, 1), 48000)
    cut = data[: len(data) // 2]
    if container == "adts":  # promises no length, and only its last packet is lost
        assert 1.5 < len(everything(cut)) / 48000 < 2.5
        return
    with pytest.raises(AudioError, match=r"^x: the file is truncated: its header promises 4.0 s, "):
        everything(cut, name="x")
    assert 1.5 < len(everything(cut, allow_truncated=True)) / 48000 < 2.5


def test_damage_in_the_middle_of_flac():
    data = bytearray(encoded(noise(6.0), RATE, "FLAC"))
    whole = everything(bytes(data))
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    with pytest.raises(AudioError, match=r"^x: the file is (truncated|damaged)"):
        everything(bytes(data), name="x")
    got = everything(bytes(data), allow_truncated=True)
    assert 0.4 * len(whole) < len(got) < 0.6 * len(whole)
    np.testing.assert_array_equal(got, whole[: len(got)])


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0xFFFFFFDB, 0x7FFFFFFF, 0x7FFFF000, 0x80000000])
def test_streamed_wav_of_unknown_length_is_read_to_its_end(size):
    samples = noise(1.0)
    data = bytearray(encoded(samples))
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", size)
    got = everything(bytes(data))
    np.testing.assert_allclose(got, samples.mean(axis=1), atol=1e-4)


def unknown_length_flac(samples):
    data = bytearray(encoded(samples, RATE, "FLAC"))
    data[21] &= 0xF0  # STREAMINFO: 36 bits of total samples
    data[22:26] = bytes(4)
    return bytes(data)


def test_flac_of_unknown_length():
    samples = noise(2.3)
    data = unknown_length_flac(samples)
    with open_audio(data) as reader:
        assert reader.duration is None
        np.testing.assert_allclose(np.concatenate(list(reader.blocks(0.5))), samples.mean(axis=1), atol=1e-4)
    with pytest.raises(AudioError, match=r"^x: the file is damaged after "):
        everything(data[: len(data) // 2], name="x")


def test_mp3_without_header_promises_nothing():
    samples = np.concatenate([np.zeros((5 * 44100, 1)), noise(5.0, 44100, 1)])
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 44100, format="MP3", subtype="MPEG_LAYER_III", bitrate_mode="VARIABLE")
    data = buffer.getvalue()
    assert xing_offset(data) > 0
    bare = data[data.index(data[:2], 4) :]  # without the first frame, which holds the header
    with open_audio(bare) as reader:
        assert reader.duration is None
        assert sum(map(len, reader.blocks())) == pytest.approx(len(samples), abs=5000)
    with open_audio(data) as reader:
        assert reader.duration == pytest.approx(10.0, abs=0.1)


# finding


def test_find_audio(tmp_path):
    names = [
        "b.wav",
        "a.FLAC",
        "sub/c.mp3",
        "sub/deep/d.m4a",
        ".hidden.wav",
        ".cache/e.wav",
        "notes.txt",
        "[x].wav",
        "empty/readme.md",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(*inputs, recursive=True):
        return [
            str(entry) if isinstance(entry, AudioError) else entry.relative_to(tmp_path).as_posix()
            for entry in find_audio(inputs, recursive=recursive)
        ]

    assert found(tmp_path) == ["[x].wav", "a.FLAC", "b.wav", "sub/c.mp3", "sub/deep/d.m4a"]
    assert found(tmp_path, recursive=False) == ["[x].wav", "a.FLAC", "b.wav"]
    assert found(tmp_path / "notes.txt", tmp_path / "gone.wav") == ["notes.txt", "gone.wav"]
    assert found(str(tmp_path / "*.wav")) == ["[x].wav", "b.wav"]
    assert found(str(tmp_path / "**" / "*.m4a")) == ["sub/deep/d.m4a"]
    assert found(str(tmp_path / "[x].wav")) == ["[x].wav"], "an existing name is no pattern"
    assert found(tmp_path / "b.wav", tmp_path) == ["b.wav", "[x].wav", "a.FLAC", "sub/c.mp3", "sub/deep/d.m4a"]
    empty, pattern, good = found(tmp_path / "empty", str(tmp_path / "*.xyz"), tmp_path / "b.wav")
    assert "empty: the folder has no recordings; expected files ending in .3gp" in empty
    assert ".wav" in empty
    assert "*.xyz: no file matches this pattern" in pattern
    assert good == "b.wav", "one bad input does not lose the others"


def test_find_audio_does_not_follow_circles(tmp_path):
    (tmp_path / "a.wav").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list(find_audio([tmp_path])) == [tmp_path / "a.wav"]
    assert list(find_audio([tmp_path / "loop"])) == [tmp_path / "loop" / "a.wav"]


def test_find_audio_reports_folders_it_cannot_list(tmp_path, monkeypatch):
    (tmp_path / "a.wav").touch()
    (tmp_path / "locked").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    path, error = find_audio([tmp_path])
    assert path == tmp_path / "a.wav"
    assert isinstance(error, AudioError)
    assert "locked: the folder cannot be listed (Permission denied)" in str(error)


def test_suffixes_are_lower_case():
    assert {".wav", ".flac", ".mp3", ".ogg", ".m4a"} <= AUDIO_SUFFIXES
    assert all(s == s.lower() and s.startswith(".") for s in AUDIO_SUFFIXES)


# resampling


RATES = [4000, 8000, 16000, 22050, 31999, 32000, 44100, 48000, 96000, 384000]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9000),
    st.sampled_from(RATES),
    st.sampled_from([16000, 32000, 48000]),
    st.floats(1e-4, 0.3),
    st.integers(0, 2**32 - 1),
)
@example(1, 384000, 16000, 0.1, 0)  # rounds to no sample
def test_streaming_equals_whole(num_samples, rate_in, rate_out, block_seconds, seed):
    waveform = np.random.default_rng(seed).standard_normal(num_samples).astype(np.float32)
    blocks = list(stream_audio((waveform, rate_in), rate_out, block_seconds=block_seconds))
    got = np.concatenate(blocks)
    assert all(len(block) for block in blocks)
    assert got.dtype == np.float32
    assert (
        len(got)
        == resampled_length(num_samples, rate_in, rate_out)
        == max(1, int(num_samples * rate_out / rate_in + 0.5))
    )
    np.testing.assert_array_equal(got, read_audio((waveform, rate_in), rate_out))
    whole = soxr.resample(waveform, rate_in, rate_out, quality="HQ")
    np.testing.assert_array_equal(got, whole if len(whole) else np.zeros(1))


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 96000])
def test_resampling_keeps_frequency_level_and_time(rate):
    wave = tone(2.0, rate, 1234.5)[:, 0]
    wave[: rate // 2] = 0  # the onset at 0.5 s tells the delay
    got = read_audio((wave, rate), RATE)
    assert peak_frequency(got[RATE:], RATE) == pytest.approx(1234.5, abs=0.5)
    assert np.sqrt(np.mean(got[RATE:-2000] ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=1e-3)
    onset = np.argmax(np.abs(got) > 0.2) / RATE
    assert onset == pytest.approx(np.argmax(np.abs(wave) > 0.2) / rate, abs=2e-4)


def test_no_alias_when_the_rate_falls():
    assert np.abs(read_audio((tone(1.0, 48000, 15000)[:, 0], 48000), 16000)[500:-500]).max() < 1e-4


# prefetching


def alive():
    return [t for t in threading.enumerate() if t.name == "htsat-prefetch"]


def ended(seconds=2.0):
    until = time.monotonic() + seconds
    while alive() and time.monotonic() < until:
        time.sleep(0.005)
    return not alive()


def test_prefetch_keeps_order_and_ends():
    assert list(prefetch(iter(range(1000)), depth=3)) == list(range(1000))
    assert list(prefetch([], depth=1)) == []
    assert ended()
    with pytest.raises(ValueError, match=r"depth"):
        prefetch([1], depth=0)


def test_prefetch_runs_ahead_in_another_thread_but_not_far():
    made = []

    def source():
        for i in range(100):
            made.append((i, threading.current_thread() is threading.main_thread()))
            yield i

    items = prefetch(source(), depth=4)
    assert next(items) == 0
    until = time.monotonic() + 2
    while len(made) < 4 and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(0.05)
    assert 4 <= len(made) <= 5, "four wait while the consumer holds one"
    assert not any(main for _, main in made)
    items.close()


def test_prefetch_raises_after_the_good_items():
    def source():
        yield 1
        yield 2
        raise AudioError("x: damaged")

    seen = []
    with pytest.raises(AudioError, match=r"x: damaged"):
        seen.extend(prefetch(source()))
    assert seen == [1, 2]
    assert ended()


@pytest.mark.parametrize("how", ["close", "drop", "exception"])
def test_prefetch_ends_when_the_consumer_stops(how):
    closed = threading.Event()

    def source():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    held = source()  # as long as someone holds it, only the thread closes it
    items = prefetch(held, depth=2)
    if how == "exception":
        with pytest.raises(KeyError):
            for _ in items:
                raise KeyError
    else:
        next(items)
        if how == "close":
            items.close()
    del items
    assert closed.wait(2), "the source is closed too"
    assert ended()


def test_prefetch_of_a_recording_frees_the_file(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(noise(5.0)))
    items = prefetch(stream_audio(path, 16000, block_seconds=0.1))
    next(items)
    items.close()
    assert ended()
    if Path("/proc/self/fd").exists():
        links = [os.readlink(f) for f in map(str, Path("/proc/self/fd").iterdir()) if os.path.islink(f)]
        assert str(path) not in links
