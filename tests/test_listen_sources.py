"""Sources of live sound: every byte that comes becomes a sample, and what is missing is said."""

import io
import os
import stat
import struct
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from htsat.apps.listen import sources
from htsat.apps.listen.sources import (
    SAMPLE_FORMATS,
    FfmpegStream,
    FinishedFile,
    GrowingFile,
    Lost,
    Microphone,
    PcmDecoder,
    PcmFormat,
    SourceError,
    StandardInput,
    list_devices,
    open_source,
)
from htsat.audio.decode import down_mix
from htsat.errors import AudioError, UsageError

RATE = 8000
#: what libsndfile calls them
SUBTYPES = {
    "u8": ("PCM_U8", "LITTLE"), "s16le": ("PCM_16", "LITTLE"), "s16be": ("PCM_16", "BIG"),
    "s24le": ("PCM_24", "LITTLE"), "s32le": ("PCM_32", "LITTLE"), "s32be": ("PCM_32", "BIG"),
    "f32le": ("FLOAT", "LITTLE"), "f32be": ("FLOAT", "BIG"), "f64le": ("DOUBLE", "LITTLE"), "f64be": ("DOUBLE", "BIG"),
}  # fmt: skip


def noise(num_samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(-1, 1, (num_samples, channels))
    return values[:, 0] if channels == 1 else values


def encoded(values: np.ndarray, **settings) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, values, RATE, **settings)
    return buffer.getvalue()


def read_back(data: bytes, **settings) -> np.ndarray:
    """What libsndfile reads, mixed to mono as everywhere."""
    values, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True, **settings)
    return down_mix(values)


def heard(connection) -> tuple[np.ndarray, list[Lost]]:
    """Everything up to the end of a connection."""
    pieces, lost = [np.zeros(0, np.float32)], []
    while (found := connection.read()) is not None:
        (lost if isinstance(found, Lost) else pieces).append(found)
    return np.concatenate(pieces), lost


def piped(data: bytes, raw: PcmFormat | None, sizes=(1 << 16,)) -> np.ndarray:
    """What comes of bytes that a program writes into a pipe, in pieces."""
    reading, writing = os.pipe()

    def write():
        with open(writing, "wb", buffering=0) as stream:
            at = 0
            while at < len(data):
                size = sizes[at % len(sizes)]
                stream.write(data[at : at + size])
                at += size

    thread = threading.Thread(target=write)
    thread.start()
    try:
        samples, lost = heard(StandardInput(raw, descriptor=reading).open())
    finally:
        os.close(reading)
        thread.join()
    assert lost == []
    return samples


# --- raw samples ---------------------------------------------------------------------------------


def test_every_format_is_known_to_libsndfile():
    assert SUBTYPES.keys() == SAMPLE_FORMATS.keys()


@pytest.mark.parametrize("name", SAMPLE_FORMATS)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_raw_samples_are_those_that_libsndfile_reads(name, channels):
    subtype, endian = SUBTYPES[name]
    settings = {"format": "RAW", "subtype": subtype, "endian": endian}
    data = encoded(noise(1000, channels), **settings)
    expected = read_back(data, samplerate=RATE, channels=channels, **settings)
    rng = np.random.default_rng(channels)
    decoder, got, at = PcmDecoder(name, channels), [], 0
    while at < len(data):  # cut anywhere
        size = int(rng.integers(1, 40))
        got.append(decoder.decode(data[at : at + size]))
        at += size
    assert np.array_equal(np.concatenate(got), expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5000), st.lists(st.integers(1, 3000), min_size=1, max_size=5))
def test_a_pipe_gives_all_of_its_samples(num_samples, sizes):
    data = noise(num_samples).astype("<f4").tobytes()
    if not data:
        with pytest.raises(AudioError, match="stdin: nothing came"):
            piped(data, PcmFormat(RATE, 1, "f32le"), sizes)
        return
    got = piped(data + b"\1\2", PcmFormat(RATE, 1, "f32le"), sizes)  # half a sample at the end is none
    assert got.tobytes() == data


# --- WAV streams ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["WAV", "WAVEX", "RF64"])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_wav_stream_is_known_by_its_header(format, subtype, channels):
    data = encoded(noise(3000, channels), format=format, subtype=subtype)
    assert np.array_equal(piped(data, None, (700, 3, 64)), read_back(data))
    assert np.array_equal(piped(data, PcmFormat(44100, 2, "u8")), read_back(data))  # whatever else is said


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x7FFFF000, 0xFFFFFFFF - 36])
def test_a_wav_stream_of_unknown_length_goes_on_to_the_end(size):
    data = bytearray(encoded(noise(3000), format="WAV", subtype="PCM_16"))
    data[40:44] = struct.pack("<I", size)
    assert len(piped(bytes(data), None)) == 3000


def test_what_follows_the_samples_of_a_wav_stream_is_no_sound():
    data = encoded(noise(3000), format="WAV", subtype="PCM_16")
    assert len(piped(data + b"LIST" + struct.pack("<I", 500) + bytes(500), None)) == 3000


def test_chunks_before_the_samples_are_skipped():
    data = encoded(noise(3000), format="WAV", subtype="PCM_16")
    extra = b"bext" + struct.pack("<I", 601) + bytes(602)
    assert np.array_equal(piped(data[:12] + extra + data[12:], None, (50,)), read_back(data))


def wav_header(code=1, channels=1, rate=RATE, bits=16, name=b"data", size=100) -> bytes:
    body = struct.pack("<HHIIHH", code, channels, rate, 0, 0, bits)
    return b"RIFF\0\0\0\0WAVEfmt " + struct.pack("<I", 16) + body + name + struct.pack("<I", size)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (wav_header(rate=1), "the sample rate is 1 Hz"),
        (wav_header(rate=655350), "the sample rate is 655350 Hz"),
        (wav_header(channels=255), "has 255 channels"),
        (wav_header(channels=0), "has 0 channels"),
        (wav_header(code=0x55), "has samples of 16 bits in coding 85"),
        (wav_header(bits=12), "has samples of 12 bits"),
        (wav_header(name=b"junk", size=1 << 31), "longer than 16 MiB"),
        (wav_header()[:30], "breaks off"),
        (wav_header(name=b"junk", size=64) + bytes(64), "breaks off"),
        (b"RIFF\0\0\0\0WAVE" + 5 * (b"none" + bytes(4)), "breaks off"),
        (b"RIFF\0\0\0\0WAVEdata" + bytes(8), "does not say what its samples are"),
    ],
)
def test_a_bad_wav_header_is_refused(data, message):
    with pytest.raises(AudioError, match=message):
        piped(data, None)


def test_empty_chunks_without_end_are_no_header():
    taken = [0]

    def take(count):
        taken[0] += count
        return (b"none" + bytes(4))[:count]

    with pytest.raises(AudioError, match="no samples behind it"):
        sources.read_wav_header(take, "x")
    assert taken[0] < 1 << 25


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes(100), "stdin: has no WAV header; say what its samples are: --sample-rate 48000"),
        (b"fLaC" + bytes(100), "stdin: is a compressed file.*ffmpeg"),
        (b"OggS" + bytes(100), "stdin: is a compressed file.*ffmpeg"),
    ],
)
def test_bytes_that_nobody_explains_are_refused(data, message):
    with pytest.raises(UsageError, match=message):
        piped(data, None)


# --- files ---------------------------------------------------------------------------------------


def test_a_finished_file_is_read_whole_and_at_its_speed(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, noise(4000), RATE)
    expected, _ = soundfile.read(path, dtype="float32")
    began = time.monotonic()
    samples, _ = heard(FinishedFile(path, 2.0).open())
    assert np.array_equal(samples, expected)
    assert 0.24 <= time.monotonic() - began < 2
    connection = FinishedFile(path, 0.01).open()
    threading.Timer(0.1, connection.close).start()
    assert len(heard(connection)[0]) <= 800  # a read that waits returns


def collected(connection):
    """Read in a thread; returns a list that grows, of samples and losses."""
    found: list = []

    def read():
        try:
            while (item := connection.read()) is not None:
                found.append(item)
        except AudioError as error:
            found.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return found, thread


def samples_of(found) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *(item for item in found if isinstance(item, np.ndarray))])


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_a_growing_file_is_read_as_it_grows(tmp_path):
    path = tmp_path / "a.wav"
    data = bytearray(encoded(noise(9000), format="WAV", subtype="PCM_16"))
    expected = read_back(bytes(data))
    data[40:44] = struct.pack("<I", 100)  # a recorder that counts later
    with path.open("wb", buffering=0) as stream:
        stream.write(data[:20])
        threading.Timer(0.2, lambda: stream.write(data[20 : 44 + 4001])).start()  # opened before its header is whole
        connection = GrowingFile(path, None).open()
        assert connection.sample_rate == RATE
        found, thread = collected(connection)
        wait_for(lambda: len(samples_of(found)) == 2000)
        stream.write(data[44 + 4001 :])
        wait_for(lambda: len(samples_of(found)) == 9000)
    connection.close()
    thread.join(5)
    assert not thread.is_alive()
    assert np.array_equal(samples_of(found), expected)


def test_what_waits_in_a_growing_file_is_told_or_left_out(tmp_path):
    path = tmp_path / "a.raw"
    path.write_bytes(noise(4000).astype("<f4").tobytes())
    raw = PcmFormat(RATE, 1, "f32le")
    connection = GrowingFile(path, raw).open()
    assert connection.backlog_seconds == 0.5
    assert len(connection.read()) > 0
    connection.close()
    connection = GrowingFile(path, raw, from_end=True).open()
    assert connection.backlog_seconds == 0
    with path.open("ab") as stream:
        stream.write(np.array([0.5, 0.25], "<f4").tobytes())
    assert connection.read().tolist() == [0.5, 0.25]
    connection.close()


@pytest.mark.parametrize("how", ["renamed", "truncated"])
def test_a_file_that_begins_anew_is_noticed(tmp_path, how):
    path = tmp_path / "a.wav"
    first, second = (encoded(noise(3000 - 1000 * i, seed=i), format="WAV", subtype="FLOAT") for i in range(2))
    path.write_bytes(first)
    connection = GrowingFile(path, None).open()
    found, thread = collected(connection)
    wait_for(lambda: len(samples_of(found)) == 3000)
    if how == "renamed":
        with path.open("ab") as stream:  # what the old one still gets is not lost
            path.rename(tmp_path / "old.wav")
            stream.write(np.ones(100, "<f4").tobytes())
        (tmp_path / "new.wav").write_bytes(second)
        (tmp_path / "new.wav").rename(path)
        expected = [read_back(first), np.ones(100, np.float32), read_back(second)]
    else:
        path.write_bytes(second)
        expected = [read_back(first), read_back(second)]
    total = sum(map(len, expected))
    wait_for(lambda: len(samples_of(found)) == total)
    connection.close()
    thread.join(5)
    assert np.array_equal(samples_of(found), np.concatenate(expected))
    assert [item.reason for item in found if isinstance(item, Lost)] == ["the file was replaced or begins anew"]
    assert [item.num_samples for item in found if isinstance(item, Lost)] == [0]


def test_a_file_that_comes_back_late_or_with_another_rate(tmp_path, monkeypatch):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(noise(800), format="WAV"))
    connection = GrowingFile(path, None).open()
    found, _ = collected(connection)
    wait_for(lambda: len(samples_of(found)) == 800)
    path.unlink()
    time.sleep(1.3)
    path.write_bytes(encoded(noise(800), format="WAV"))
    wait_for(lambda: len(samples_of(found)) == 1600)
    (lost,) = (item for item in found if isinstance(item, Lost))
    assert 1.1 * RATE < lost.num_samples < 8 * RATE
    path.unlink()
    soundfile.write(path, noise(800), 2 * RATE)
    wait_for(lambda: isinstance(found[-1], AudioError))
    assert "was replaced by a file of 16000 Hz, it had 8000 Hz" in str(found[-1])
    connection.close()


def test_files_that_are_none(tmp_path):
    with pytest.raises(AudioError, match=r"missing\.wav: cannot be opened"):
        GrowingFile(tmp_path / "missing.wav", None).open()
    with pytest.raises(AudioError, match=r"missing\.wav: there is no such file"):
        FinishedFile(tmp_path / "missing.wav").open()
    (tmp_path / "a").write_bytes(bytes(100))
    with pytest.raises(UsageError, match="has no WAV header"):
        GrowingFile(tmp_path / "a", None).open()


# --- FFmpeg --------------------------------------------------------------------------------------


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch):
    """Put a program called ffmpeg first: a Python script that knows its arguments as ``sys.argv``."""

    def make(script: str) -> Path:
        path = tmp_path / "bin" / "ffmpeg"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable} -S\nimport sys, time, os\n{script}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
        return path

    return make


def test_ffmpeg_gives_samples_and_sees_the_address_as_it_is(ffmpeg, tmp_path):
    ffmpeg(f"open({str(tmp_path / 'seen')!r}, 'w').write(repr(sys.argv[1:]))\nos.write(1, bytes(range(256)) * 40)")
    url = "rtsp://user:secret@cam/a b;$(touch x)?key=1"
    source = FfmpegStream(url, RATE)
    assert source.name == "rtsp://cam/a b;$(touch x)?..."
    connection = source.open()
    samples, _ = heard(connection)
    expected = np.frombuffer(bytes(range(256)) * 40, "<i2").astype(np.float32) / np.float32(32768)
    assert np.array_equal(samples, expected) and connection.sample_rate == RATE
    seen = eval((tmp_path / "seen").read_text())
    assert seen[seen.index("-i") + 1] == url
    assert seen[-7:] == ["-ac", "1", "-ar", "8000", "-f", "s16le", "pipe:1"]
    assert "file" not in seen[seen.index("-protocol_whitelist") + 1].split(",")
    assert seen[seen.index("-rtsp_transport") + 1] == "tcp"


def test_what_ffmpeg_says_is_told_without_the_password(ffmpeg):
    ffmpeg("sys.stderr.write('first\\n' + sys.argv[sys.argv.index('-i') + 1] + ': Connection refused\\n'); sys.exit(1)")
    with pytest.raises(SourceError) as error:
        heard(FfmpegStream("http://me:secret@host/x", RATE).open())
    assert str(error.value) == "http://host/x: the stream broke off (http://host/x: Connection refused)"


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_hanging_ffmpeg_is_ended(ffmpeg, stubborn):
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else ""
    ffmpeg(f"{ignore}os.write(1, b'ab')\ntime.sleep(600)")
    connection = FfmpegStream("http://host/x", RATE).open()
    assert len(connection.read()) == 1
    found, thread = collected(connection)
    connection.close()
    thread.join(10)
    assert not thread.is_alive() and found == [] and connection._process.poll() is not None


def test_streams_need_ffmpeg_and_a_known_kind_of_address(monkeypatch, tmp_path, ffmpeg):
    ffmpeg("")
    for bad in ("file:///etc/passwd", "concat://a", "gopher://x"):
        with pytest.raises(UsageError, match="expected a file or an address of rtsp"):
            open_source(bad)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UsageError, match=r"rtsp://cam/1: streams are read by ffmpeg, which is not installed"):
        open_source("rtsp://u:p@cam/1")


# --- microphones ---------------------------------------------------------------------------------


class FakeSoundCard(types.ModuleType):
    """sounddevice as far as it is used: one microphone, whose callback the test calls."""

    class PortAudioError(Exception):
        pass

    def __init__(self):
        super().__init__("sounddevice")
        self.default = types.SimpleNamespace(device=(1, 0))
        self.devices = [
            {"name": "Speaker", "max_input_channels": 0, "default_samplerate": 44100.0},
            {"name": "USB Microphone", "max_input_channels": 2, "default_samplerate": 8000.0},
        ]
        self.streams: list = []
        self.restarts = 0
        self.broken = False
        card = self

        class InputStream:
            def __init__(self, **settings):
                if card.broken:
                    raise card.PortAudioError("Device unavailable [PaErrorCode -9985]")
                self.settings, self.closed = settings, False
                card.streams.append(self)

            def start(self):
                self.started = True

            def close(self):
                self.closed = True

            def give(self, samples, at=0.0, overflow=False):
                status = types.SimpleNamespace(input_overflow=overflow)
                values = np.repeat(np.asarray(samples, np.float32)[:, None], self.settings["channels"], axis=1)
                self.settings["callback"](values, len(values), types.SimpleNamespace(inputBufferAdcTime=at), status)
                values[:] = 7  # PortAudio uses its memory again

        self.InputStream = InputStream

    def query_devices(self, device=None, kind=None):
        if kind is None:
            return self.devices
        if device in (None, 1) or (isinstance(device, str) and device in "USB Microphone"):
            return self.devices[1]
        raise ValueError(f"No input device matching {device!r}")

    def check_input_settings(self, device, channels, samplerate, dtype):
        if channels > 2 or samplerate not in (8000, 16000):
            raise self.PortAudioError("Invalid sample rate [PaErrorCode -9997]")

    def _terminate(self):
        self.restarts += 1

    def _initialize(self):
        assert self.restarts


@pytest.fixture
def card(monkeypatch):
    card = FakeSoundCard()
    monkeypatch.setitem(sys.modules, "sounddevice", card)
    return card


def test_a_microphone_gives_what_its_callback_gets(card):
    source = open_source(None, channels=2)
    assert source.name == "USB Microphone"
    connection = source.open()
    (stream,) = card.streams
    assert stream.settings["samplerate"] == connection.sample_rate == 8000 and stream.settings["blocksize"] == 400
    blocks = [noise(800, seed=i).astype(np.float32) for i in range(3)]
    for i, block in enumerate(blocks):
        stream.give(block, at=10 + 0.1 * i)
    for block in blocks:
        assert np.array_equal(connection.read(), block)
    connection.close()
    assert stream.closed and connection.read() is None
    source.open()
    assert card.restarts == 1  # a microphone that was plugged in again is found
    card.streams[-1].settings["finished_callback"]()  # it was pulled out
    card.broken = True
    with pytest.raises(SourceError, match=r"USB Microphone: cannot be opened \(Device unavailable"):
        source.open()


def test_overflows_of_the_sound_card_are_counted(card):
    connection = Microphone().open()
    (stream,) = card.streams
    stream.give(np.zeros(800), at=5.0)
    stream.give(np.ones(800), at=5.35, overflow=True)  # due at 5.1
    stream.give(np.zeros(800), at=5.45, overflow=True)  # on time: how much is missing nobody knows
    got = [connection.read() for _ in range(5)]
    assert got[1] == Lost(2000, "the sound card's buffer overflowed") and got[3].num_samples == 1
    assert [len(got[i]) for i in (0, 2, 4)] == [800, 800, 800] and got[2].min() == 1
    connection.close()


def test_devices_are_listed(card):
    (device,) = list_devices()
    assert (device.number, device.name, device.channels, device.sample_rate, device.default) == (
        1, "USB Microphone", 2, 8000, True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "Nokia"}, "the device 'Nokia' cannot be had .*--list-devices"),
        ({"device": "9"}, "the device '9' cannot be had"),
        ({"sample_rate": 12345}, "Invalid sample rate"),
        ({"channels": 3}, "a microphone cannot be had"),
        ({"sample_rate": 0}, "--sample-rate 0: expected 4000 to 384000"),
    ],
)
def test_devices_that_cannot_be_had(card, settings, message):
    with pytest.raises(UsageError, match=message):
        open_source(None, **settings)


def test_without_the_package_or_its_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(UsageError, match=r"pip install 'htsat\[live\]'"):
        open_source(None)
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')")
    monkeypatch.delitem(sys.modules, "sounddevice")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="libportaudio2"):
        list_devices()


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("-", {"sample_rate": 0}, "--sample-rate 0: expected 4000 to 384000 Hz"),
        ("-", {"sample_rate": 48000, "sample_format": "s16"}, "--sample-format s16: expected u8, .*did you mean 's16"),
        ("-", {"sample_rate": 48000, "channels": 0}, "--channels 0: expected 1 to 16"),
        ("a.wav", {"device": "1"}, "--device is for microphones, not for a.wav"),
        ("-", {"follow": True}, "--follow is for files, not for -"),
        ("a.wav", {"from_end": True}, "--from-end is for --follow"),
        ("http://x/y", {"speed": 2.0}, "--speed is for finished files"),
        ("a.wav", {"speed": 2.0, "follow": True}, "--speed is for finished files"),
        ("a.wav", {"waits": False}, "--wait is for stdin"),
    ],
)
def test_options_that_make_no_sense(source, settings, message):
    with pytest.raises(UsageError, match=message):
        open_source(source, **settings)
