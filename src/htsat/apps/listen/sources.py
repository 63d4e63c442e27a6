"""Where live sound comes from: microphones, pipes, growing files, streams that FFmpeg reads, and files for trying.

A source is opened, read in blocks of mono samples, and closed. What it knows to be missing it says (``Lost``); what it
does not say to be missing follows on. Raw PCM is decoded here, as its bytes come; finished files are read by
``htsat.audio``.
"""

import contextlib
import os
import queue
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from numpy.typing import NDArray

from htsat.audio.decode import (
    MAX_CHANNELS,
    MAX_SAMPLE_RATE,
    MIN_SAMPLE_RATE,
    as_float,
    check_format,
    down_mix,
    is_unknown,
    open_audio,
)
from htsat.errors import AudioError, HtsatError, UsageError, nearest

Array = NDArray[np.float32]

#: names of raw samples: FFmpeg's, and what NumPy calls them; those of 24 bits NumPy does not know
SAMPLE_FORMATS = {
    "u8": "u1", "s16le": "<i2", "s16be": ">i2", "s24le": "", "s32le": "<i4", "s32be": ">i4",
    "f32le": "<f4", "f32be": ">f4", "f64le": "<f8", "f64be": ">f8",
}  # fmt: skip
#: seconds of sound in a block, at most: what a message may be late by beside the model's own delay
BLOCK_SECONDS = 0.05
#: addresses that FFmpeg is asked to open
SCHEMES = ("rtsp", "rtsps", "http", "https", "rtmp", "rtmps", "rtp", "udp", "tcp", "srt", "mms")
#: what FFmpeg may open for them: never a file, whatever a playlist says
_PROTOCOLS = "tcp,udp,rtp,srtp,tls,http,https,httpproxy,crypto,hls,rtmp,rtmps,rtmpt,srt,mmsh,mmst"
#: seconds between looks at a file that does not grow
_POLL_SECONDS = 0.1
#: bytes of a WAV file before its samples, at most
_MAX_HEADER = 16 << 20
#: seconds that a recorder may take to go on in a new file without anything having been lost
_SEAM_SECONDS = 1.0


@dataclass(frozen=True)
class Lost:
    """Samples that nobody heard.

    Attributes:
        num_samples: how many, as far as it is known; 0: the sound only does not follow on.
        reason: why, in a few words.
    """

    num_samples: int
    reason: str


class SourceError(AudioError):
    """A source broke off or could not be opened; another try may do better."""


class Connection(Protocol):
    """An open source. ``read`` belongs to one thread, ``close`` to any.

    Attributes:
        sample_rate: Hz.
        backlog_seconds: sound that had been waiting when it was opened.
    """

    sample_rate: int
    backlog_seconds: float

    def read(self) -> "Array | Lost | None":
        """Return the next samples as soon as there are any; None: the end.

        Raises:
            SourceError: it broke off.
            AudioError: it cannot be read at all.
        """

    def close(self) -> None:
        """Free it; a ``read`` that waits returns soon. May be called twice."""


class Source(Protocol):
    """Where sound comes from.

    Attributes:
        name: what messages and tables call it, without passwords.
        waits: it waits until it is read; another one's samples are lost if nobody takes them.
        clocked: its time goes on while no samples come.
        reopens: an end is a failure, after which it is opened again.
        dated: its sound is of now.
    """

    name: str
    waits: bool
    clocked: bool
    reopens: bool
    dated: bool

    def open(self) -> Connection:
        """Connect.

        Raises:
            UsageError: it cannot be had with these settings.
            SourceError: it cannot be had now.
            AudioError: it is no sound.
        """


def check_rate(sample_rate: int) -> None:
    """Refuse a rate that no recording has; raises UsageError."""
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        raise UsageError(f"--sample-rate {sample_rate}: expected {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz")


# ---------------------------------------------------------------------------------------------------
# raw samples


class PcmDecoder:
    """Turns bytes of raw samples into mono blocks; frames may be cut anywhere.

    Args:
        sample_format: one of ``SAMPLE_FORMATS``.
        channels: how many lie beside each other.

    Raises:
        UsageError: unknown format, or a number of channels that no recording has.
    """

    def __init__(self, sample_format: str, channels: int) -> None:
        if sample_format not in SAMPLE_FORMATS:
            close = nearest(sample_format, SAMPLE_FORMATS)
            raise UsageError(f"--sample-format {sample_format}: expected {', '.join(SAMPLE_FORMATS)}{close}")
        if not 1 <= channels <= MAX_CHANNELS:
            raise UsageError(f"--channels {channels}: expected 1 to {MAX_CHANNELS}")
        kind = SAMPLE_FORMATS[sample_format]
        self._dtype = np.dtype(kind) if kind else None
        self._channels = channels
        self.frame_bytes = channels * (self._dtype.itemsize if self._dtype is not None else 3)
        self._rest = b""

    def decode(self, data: bytes) -> Array:
        """Return the samples that are whole now, (num_samples,); the rest waits for more bytes."""
        data = self._rest + data
        whole = len(data) - len(data) % self.frame_bytes
        self._rest = data[whole:]
        if self._dtype is not None:
            values: NDArray[Any] = np.frombuffer(data[:whole], self._dtype)
        else:  # three bytes become the upper ones of four
            wide = np.zeros((whole // 3, 4), np.uint8)
            wide[:, 1:] = np.frombuffer(data[:whole], np.uint8).reshape(-1, 3)
            values = wide.view("<i4")[:, 0]
        return down_mix(as_float(values.reshape(-1, self._channels)))


@dataclass(frozen=True)
class PcmFormat:
    """How raw samples are to be read.

    Attributes:
        sample_rate: Hz.
        channels: beside each other.
        sample_format: one of ``SAMPLE_FORMATS``.
        num_bytes: how many follow; None: up to the end.
    """

    sample_rate: int
    channels: int = 1
    sample_format: str = "s16le"
    num_bytes: int | None = None

    def __post_init__(self) -> None:
        check_rate(self.sample_rate)
        PcmDecoder(self.sample_format, self.channels)


#: coding and bits of a sample in a WAV header: 1 is integers, 3 is floats
_WAV_FORMATS = {
    (1, 8): "u8", (1, 16): "s16le", (1, 24): "s24le", (1, 32): "s32le", (3, 32): "f32le", (3, 64): "f64le"
}  # fmt: skip


def is_wav(head: bytes) -> bool:
    """Whether these first 12 bytes begin a WAV file."""
    return head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE"


def read_wav_header(take: Callable[[int], bytes], name: str) -> PcmFormat:
    """Read the header of a WAV stream, from behind its first 12 bytes up to its first sample.

    Args:
        take: gives the next bytes, fewer than asked for at the end only.
        name: what messages call it.

    Raises:
        AudioError: no header of samples that can be read, or they lie outside the limits.
    """
    coding, wide = None, None
    read, kind, size = 12, b"", 0
    for _ in range(4096):  # no writer makes more chunks
        head = take(8)
        if len(head) < 8:
            kind = b""
            break
        kind, size = head[:4], struct.unpack("<I", head[4:])[0]
        read += 8 + size
        if kind == b"data":
            break
        if read > _MAX_HEADER:
            raise AudioError(f"{name}: the WAV header is longer than {_MAX_HEADER >> 20} MiB; it is damaged")
        body = take(size + size % 2)
        if kind == b"fmt " and len(body) >= 16:
            code, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
            if code == 0xFFFE and len(body) >= 26:  # the extended header: the coding begins the identifier
                code = struct.unpack("<H", body[24:26])[0]
            coding = code, channels, rate, bits
        elif kind == b"ds64" and len(body) >= 16:
            wide = struct.unpack("<Q", body[8:16])[0]
    if kind != b"data":
        raise AudioError(f"{name}: the WAV header breaks off or has no samples behind it; record it again")
    if coding is None:
        raise AudioError(f"{name}: the WAV header does not say what its samples are; record it again")
    code, channels, rate, bits = coding
    check_format(name, rate, channels)
    if (code, bits) not in _WAV_FORMATS:
        raise AudioError(
            f"{name}: the WAV has samples of {bits} bits in coding {code}; expected 8 to 32-bit integers or floats, "
            "pipe it through ffmpeg -i - -f wav -"
        )
    if size == 0xFFFFFFFF and wide:
        size = wide
    # What programs write that do not know how long a stream will be: nothing, or about as much as the field holds.
    unknown = size == 0 or is_unknown(size)
    return PcmFormat(rate, channels, _WAV_FORMATS[code, bits], None if unknown else size)


class PcmConnection:
    """Samples that come as bytes.

    Args:
        read: gives some of the next bytes, up to as many as asked for; none: the end.
        close: frees what gives them.
        format: of the samples.
        backlog_seconds: see ``Connection``.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        close: Callable[[], None],
        format: PcmFormat,
        head: bytes = b"",
        backlog_seconds: float = 0.0,
    ) -> None:
        self.sample_rate = format.sample_rate
        self.backlog_seconds = backlog_seconds
        self._read, self.close, self._head = read, close, head
        self._decoder = PcmDecoder(format.sample_format, format.channels)
        self._left = format.num_bytes
        self._block = max(1, round(BLOCK_SECONDS * format.sample_rate)) * self._decoder.frame_bytes

    def read(self) -> Array | None:
        """See ``Connection``."""
        while True:
            wanted = self._block if self._left is None else min(self._block, self._left)
            data, self._head = self._head or (self._read(wanted) if wanted else b""), b""
            if not data:
                return None
            if self._left is not None:
                data = data[: self._left]
                self._left -= len(data)
            samples = self._decoder.decode(data)
            if len(samples):
                return samples


def _opened(
    read: Callable[[int], bytes],
    close: Callable[[], None],
    raw: PcmFormat | None,
    name: str,
    *,
    growing: bool = False,
) -> tuple[PcmFormat, bytes]:
    """Look at the first bytes of a stream; return its format and those of them that are samples.

    Raises:
        UsageError: it has no header and nobody said what it is.
        AudioError: it is a file of another kind, or empty.
    """

    def take(count: int) -> bytes:
        data = b""
        while len(data) < count and (more := read(count - len(data))):
            data += more
        return data

    head = take(12)
    if is_wav(head):
        found = read_wav_header(take, name)
        return (PcmFormat(found.sample_rate, found.channels, found.sample_format) if growing else found), b""
    if not head:
        raise AudioError(f"{name}: nothing came; expected sound")
    if raw is not None:
        return raw, head
    if head[:4] in (b"fLaC", b"OggS") or head[:3] == b"ID3" or head[4:8] == b"ftyp":
        raise UsageError(f"{name}: is a compressed file; expected WAV or raw samples, pipe it: ffmpeg -i ... -f wav -")
    raise UsageError(
        f"{name}: has no WAV header; say what its samples are: --sample-rate 48000 --channels 1 --sample-format s16le"
    )


class StandardInput:
    """Raw samples or a WAV stream from stdin.

    Args:
        raw: what the samples are if no WAV header says it.
        waits: who writes waits for us (or else loses what we cannot take).
    """

    name = "stdin"
    clocked = True
    reopens = False
    dated = True

    def __init__(self, raw: PcmFormat | None, *, waits: bool = True, descriptor: int = 0) -> None:
        self.waits = waits
        self._raw, self._descriptor = raw, descriptor

    def open(self) -> Connection:
        """See ``Source``."""

        # Not sys.stdin: a thread that waits in its lock would keep the process from ending.
        def read(count: int) -> bytes:
            try:
                return os.read(self._descriptor, count)
            except OSError as error:
                raise AudioError(f"stdin: cannot be read ({error.strerror}); direct sound to it") from None

        def close() -> None:
            """Whoever waits for stdin waits until it ends; nobody else reads it."""

        format, head = _opened(read, close, self._raw, self.name)
        return PcmConnection(read, close, format, head)


# ---------------------------------------------------------------------------------------------------
# files


class _ReplacedError(Exception):
    """Another file has the name now, or this one begins anew."""


class GrowingFile:
    """A recording that is still being written: WAV, whose header's sizes are ignored, or raw samples.

    Args:
        path: the file.
        raw: what its samples are if no WAV header says it.
        from_end: begin with what comes from now on.
    """

    waits = True
    clocked = False
    reopens = False
    dated = True

    def __init__(self, path: Path, raw: PcmFormat | None, *, from_end: bool = False) -> None:
        self.name = str(path)
        self._path, self._raw, self._from_end = path, raw, from_end

    def open(self) -> Connection:
        """See ``Source``."""
        return _Growing(self._path, self._raw, self._from_end)


class _Growing:
    """A file that is read as it grows; who writes it may begin a new one under its name."""

    def __init__(self, path: Path, raw: PcmFormat | None, from_end: bool) -> None:
        self._path, self._raw = path, raw
        self._closed = threading.Event()
        self._file: BinaryIO | None = None
        self._last = time.monotonic()
        self._pcm = self._begin(from_end)
        self.sample_rate = self._pcm.sample_rate
        self.backlog_seconds = self._pcm.backlog_seconds

    def _begin(self, from_end: bool) -> PcmConnection:
        """Open the file that has the name now."""
        while True:
            try:
                if self._file is not None:
                    self._file.close()
                self._file = open(self._path, "rb", buffering=0)  # noqa: SIM115 - closed by close
            except OSError as error:
                raise AudioError(f"{self._path}: cannot be opened ({error.strerror}); check the path") from None
            try:
                format, head = _opened(self._bytes, self.close, self._raw, str(self._path), growing=True)
            except _ReplacedError:
                continue
            except HtsatError:
                self._file.close()
                raise
            frame = PcmDecoder(format.sample_format, format.channels).frame_bytes
            waiting = max(0, os.fstat(self._file.fileno()).st_size - self._file.tell() + len(head))
            if from_end:
                self._file.seek(waiting - waiting % frame - len(head), os.SEEK_CUR)
                waiting, head = 0, b""
            return PcmConnection(self._bytes, self.close, format, head, waiting / frame / format.sample_rate)

    def _bytes(self, count: int) -> bytes:
        """Return the next bytes of the file, waiting for them; none: it was closed."""
        file = self._file
        assert file is not None
        while not self._closed.is_set():
            try:
                replaced = self._replaced(file)
                # Read after the look: what was written before the change of files is not lost.
                data = file.read(count)
            except (OSError, ValueError) as error:
                if self._closed.is_set():
                    break
                raise AudioError(f"{self._path}: reading failed ({error}); check the disk") from None
            if data:
                return data
            if replaced:
                raise _ReplacedError
            self._closed.wait(_POLL_SECONDS)
        return b""

    def _replaced(self, file: BinaryIO) -> bool:
        """Whether the name is another file's, or this one is shorter than what was read of it."""
        try:
            named = self._path.stat()
        except FileNotFoundError:  # taken away, and not yet made anew
            return False
        own = os.fstat(file.fileno())
        return (named.st_dev, named.st_ino) != (own.st_dev, own.st_ino) or own.st_size < file.tell()

    def read(self) -> Array | Lost | None:
        """See ``Connection``."""
        try:
            samples = self._pcm.read()
        except _ReplacedError:
            last = self._last
            self._pcm = self._begin(from_end=False)
            if self._pcm.sample_rate != self.sample_rate:
                raise AudioError(
                    f"{self._path}: was replaced by a file of {self._pcm.sample_rate} Hz, it had {self.sample_rate} "
                    "Hz; start again"
                ) from None
            missing = time.monotonic() - last - self._pcm.backlog_seconds
            lost = round(missing * self.sample_rate) if missing > _SEAM_SECONDS else 0
            return Lost(lost, "the file was replaced or begins anew")
        self._last = time.monotonic()
        return samples

    def close(self) -> None:
        """See ``Connection``."""
        self._closed.set()
        if self._file is not None:
            self._file.close()


class FinishedFile:
    """A whole recording of any format, played at a speed, for trying.

    Args:
        path: the file.
        speed: times real time; 0: as fast as it is heard.
    """

    waits = True
    clocked = False
    reopens = False
    dated = False

    def __init__(self, path: Path, speed: float = 1.0) -> None:
        self.name = str(path)
        self._path, self._speed = path, speed

    def open(self) -> Connection:
        """See ``Source``."""
        return _Playing(self._path, self._speed)


class _Playing:
    backlog_seconds = 0.0

    def __init__(self, path: Path, speed: float) -> None:
        self._reader = open_audio(path)
        self.sample_rate = self._reader.sample_rate
        self._closed = threading.Event()
        self._blocks = self._paced(speed)

    def _paced(self, speed: float) -> Iterator[Array]:
        """Yield the recording, each block when its last sample would have sounded."""
        done, began = 0, time.monotonic()
        size = round(BLOCK_SECONDS * self.sample_rate) if speed else self.sample_rate
        for block in self._reader.blocks(2.0):
            for start in range(0, len(block), size):
                part = block[start : start + size]
                done += len(part)
                if speed:
                    due = began + done / self.sample_rate / speed
                    self._closed.wait(max(0.0, due - time.monotonic()))
                yield part

    def read(self) -> Array | None:
        """See ``Connection``."""
        samples = None if self._closed.is_set() else next(self._blocks, None)
        if samples is None:  # by the thread that reads: a decoder must not be freed under it
            self._reader.close()
        return samples

    def close(self) -> None:
        """See ``Connection``."""
        self._closed.set()


# ---------------------------------------------------------------------------------------------------
# streams


def without_password(url: str) -> str:
    """Return an address as messages may show it."""
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, place, parts.path, "..." if parts.query else "", ""))


def is_url(source: str) -> bool:
    """Whether a source is an address rather than a file."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


class FfmpegStream:
    """A stream that FFmpeg reads, as a child process that gives raw samples on a pipe.

    Args:
        url: the address; no shell sees it.
        sample_rate: Hz that FFmpeg is to give.

    Raises:
        UsageError: FFmpeg is not installed, or is not to open such an address.
    """

    waits = False
    clocked = True
    reopens = True
    dated = True

    def __init__(self, url: str, sample_rate: int) -> None:
        self.name = without_password(url)
        scheme = urlsplit(url).scheme.lower()
        if scheme not in SCHEMES:
            raise UsageError(f"{self.name}: expected a file or an address of {', '.join(SCHEMES)}")
        program = shutil.which("ffmpeg")
        if program is None:
            raise UsageError(f"{self.name}: streams are read by ffmpeg, which is not installed; install it")
        self._url, self._rate = url, sample_rate
        self._arguments = [
            program, "-nostdin", "-hide_banner", "-loglevel", "error", "-protocol_whitelist", _PROTOCOLS,
            *(["-rtsp_transport", "tcp"] if scheme.startswith("rtsp") else []),
            "-i", url, "-vn", "-sn", "-dn", "-ac", "1", "-ar", str(sample_rate), "-f", "s16le", "pipe:1",
        ]  # fmt: skip

    def open(self) -> Connection:
        """See ``Source``."""
        return _Ffmpeg(self._arguments, self._rate, self.name, self._url)


class _Ffmpeg:
    backlog_seconds = 0.0

    def __init__(self, arguments: list[str], sample_rate: int, name: str, url: str) -> None:
        self.sample_rate = sample_rate
        self._name, self._url = name, url
        try:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for us to handle
            )
        except OSError as error:
            raise SourceError(f"{name}: ffmpeg cannot be started ({error.strerror})") from None
        self._said = ""
        self._listener = threading.Thread(target=self._note_errors, name="htsat-ffmpeg-errors", daemon=True)
        self._listener.start()
        self._closing, self._reading = threading.Lock(), threading.Lock()
        self._pcm = PcmConnection(self._bytes, self.close, PcmFormat(sample_rate))

    def _note_errors(self) -> None:
        """Keep the last line that FFmpeg says."""
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            # FFmpeg may say much in weeks, and a line may be anything.
            for line in iter(lambda: stream.readline(4096), b""):
                said = line.decode("utf-8", "replace").strip().replace(self._url, self._name)
                self._said = said or self._said

    def _bytes(self, count: int) -> bytes:
        assert self._process.stdout is not None
        with self._reading:
            return b"" if self._process.stdout.closed else os.read(self._process.stdout.fileno(), count)

    def read(self) -> Array | None:
        """See ``Connection``."""
        samples = self._pcm.read()
        if samples is None:
            self.close()
            self._listener.join(1.0)
            if self._said:
                raise SourceError(f"{self._name}: the stream broke off ({self._said})")
        return samples

    def close(self) -> None:
        """See ``Connection``."""
        with self._closing:
            if self._process.poll() is None:
                self._process.terminate()
                try:
                    self._process.wait(2.0)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()
            # Behind the end of the process a read ends too.
            if self._reading.acquire(timeout=1.0):
                assert self._process.stdout is not None
                self._process.stdout.close()
                self._reading.release()


# ---------------------------------------------------------------------------------------------------
# microphones


def _sounddevice() -> Any:
    """Return the module that reaches sound cards; UsageError without it."""
    try:
        import sounddevice
    except ImportError:
        raise UsageError("a microphone needs sounddevice, which is not installed: pip install 'htsat[live]'") from None
    except OSError:
        raise UsageError("a microphone needs the PortAudio library: install libportaudio2 (apt, dnf, brew)") from None
    return sounddevice


@dataclass(frozen=True)
class InputDevice:
    """A microphone or another input of a sound card.

    Attributes:
        number: by which it can be chosen.
        name: by a part of which it can be chosen.
        channels: that it has.
        sample_rate: Hz that it prefers.
        default: it is taken if none is named.
    """

    number: int
    name: str
    channels: int
    sample_rate: int
    default: bool


def list_devices() -> list[InputDevice]:
    """Return the inputs that can be listened to.

    Raises:
        UsageError: sound cards cannot be reached here.
    """
    module = _sounddevice()
    first = module.default.device[0]
    return [
        InputDevice(
            number, str(item["name"]), int(item["max_input_channels"]), round(item["default_samplerate"]),
            number == first,
        )
        for number, item in enumerate(module.query_devices())
        if item["max_input_channels"] > 0
    ]  # fmt: skip


class Microphone:
    """An input of a sound card.

    Args:
        device: its number or a part of its name; None: the system's choice.
        sample_rate: Hz; None: what it prefers.
        channels: to be mixed.

    Raises:
        UsageError: there is no such device, or it has not this rate or these channels.
    """

    waits = False
    clocked = True
    reopens = True
    dated = True

    def __init__(self, device: str | None = None, sample_rate: int | None = None, channels: int = 1) -> None:
        self._module = _sounddevice()
        self._device = int(device) if device is not None and device.isdecimal() else device
        self._channels = channels
        if sample_rate is not None:
            check_rate(sample_rate)
        try:
            found = self._module.query_devices(self._device, "input")
            self._rate = sample_rate or round(found["default_samplerate"])
            self._module.check_input_settings(
                device=self._device, channels=channels, samplerate=self._rate, dtype="float32"
            )
        except (ValueError, self._module.PortAudioError) as error:
            wanted = "a microphone" if device is None else f"the device {device!r}"
            raise UsageError(
                f"{wanted} cannot be had ({' '.join(str(error).split())}); see htsat listen --list-devices"
            ) from None
        self.name = str(found["name"])
        self._opened = False

    def open(self) -> Connection:
        """See ``Source``."""
        if self._opened:
            # PortAudio looks for devices when it starts: one that was plugged in again is found no other way.
            self._module._terminate()
            self._module._initialize()
        self._opened = True
        return _Recording(self._module, self._device, self._rate, self._channels, self.name)


class _Recording:
    """A microphone that records; PortAudio's thread fills a queue."""

    backlog_seconds = 0.0

    def __init__(self, module: Any, device: int | str | None, rate: int, channels: int, name: str) -> None:
        self.sample_rate = rate
        self._module, self._name = module, name
        # The reader takes blocks at once; what is too much for everybody else is counted in its buffer.
        self._blocks: queue.SimpleQueue[tuple[NDArray[np.float32], float, bool] | None] = queue.SimpleQueue()
        self._due: float | None = None
        self._held: Array | None = None
        try:
            self._stream = module.InputStream(
                device=device,
                samplerate=rate,
                channels=channels,
                dtype="float32",
                blocksize=round(BLOCK_SECONDS * rate),
                callback=self._on_block,
                finished_callback=self._on_end,
            )
            self._stream.start()
        except (ValueError, module.PortAudioError) as error:
            raise SourceError(f"{name}: cannot be opened ({' '.join(str(error).split())})") from None

    def _on_block(self, samples: NDArray[np.float32], frames: int, at: Any, status: Any) -> None:
        """Take a block from PortAudio, which goes on only when this returns."""
        self._blocks.put((samples.copy(), float(at.inputBufferAdcTime), bool(status.input_overflow)))

    def _on_end(self) -> None:
        self._blocks.put(None)

    def read(self) -> Array | Lost | None:
        """See ``Connection``."""
        if self._held is not None:
            held, self._held = self._held, None
            return held
        block = self._blocks.get()
        if block is None:
            return None
        values, began, overflowed = block
        due, self._due = self._due, began + len(values) / self.sample_rate
        samples = down_mix(values)
        if not overflowed:
            return samples
        # PortAudio tells that samples are lost, not how many: its clock does, where it has one.
        missing = 0 if due is None else round((began - due) * self.sample_rate)
        self._held = samples
        return Lost(max(1, missing), "the sound card's buffer overflowed")

    def close(self) -> None:
        """See ``Connection``."""
        with contextlib.suppress(self._module.PortAudioError):  # a device that is gone
            self._stream.close()
        self._blocks.put(None)


def open_source(
    source: str | None,
    *,
    sample_rate: int | None = None,
    channels: int = 1,
    sample_format: str = "s16le",
    device: str | None = None,
    follow: bool = False,
    from_end: bool = False,
    speed: float = 1.0,
    waits: bool | None = None,
    stream_rate: int = 32_000,
) -> Source:
    """Return the source that a command line names; nothing is opened yet but the list of sound cards.

    Args:
        source: None: a microphone; ``-``: stdin; an address; or a file.
        sample_rate: Hz of raw samples, or that a microphone or FFmpeg is to give.
        channels: of raw samples or a microphone.
        sample_format: of raw samples.
        device: of the microphone.
        follow: the file grows.
        from_end: begin where the growing file ends now.
        speed: of a finished file, times real time; 0: as fast as it is heard.
        waits: see ``Source``; None: as the source is. Only for stdin.
        stream_rate: Hz of FFmpeg's samples if ``sample_rate`` is None.

    Raises:
        UsageError: no such source, or settings that are not for it.
    """
    if not 1 <= channels <= MAX_CHANNELS:
        raise UsageError(f"--channels {channels}: expected 1 to {MAX_CHANNELS}")
    raw = None if sample_rate is None else PcmFormat(sample_rate, channels, sample_format)
    PcmDecoder(sample_format, channels)
    file = source is not None and source != "-" and not is_url(source)
    for given, name, fits, what in (
        (device is not None, "--device", source is None, "microphones"),
        (follow, "--follow", file, "files"),
        (from_end, "--from-end", follow, "--follow"),
        (speed != 1.0, "--speed", file and not follow, "finished files"),
        (waits is not None, "--wait", source == "-", "stdin"),
    ):
        if given and not fits:
            raise UsageError(f"{name} is for {what}, not for {source or 'a microphone'}; leave it out")
    if source is None:
        return Microphone(device, sample_rate, channels)
    if source == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("stdin: is the keyboard or closed; direct sound to it: arecord ... | htsat listen -")
        return StandardInput(raw, waits=True if waits is None else waits)
    if is_url(source):
        return FfmpegStream(source, sample_rate or stream_rate)
    return GrowingFile(Path(source), raw, from_end=from_end) if follow else FinishedFile(Path(source), speed)
