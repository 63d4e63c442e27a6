"""From files, bytes, file objects and arrays to blocks of mono samples: the one place that reads recordings.

Everything that enters passes ``open_audio``, which holds the limits: 4,000 to 384,000 Hz, 1 to 16
channels, at least one sample, only finite samples. They are checked on the header, before anything
is allocated, and again while samples stream, because a header may lie. Peaks above 1, digital
silence and every sample width are legal.

Decoders: libsndfile reads WAV, RF64, W64, AIFF, AU, CAF, FLAC, Ogg, Opus and MP3. PyAV (the extra
``codecs``) reads what libsndfile does not know: M4A, MP4, AAC, WebM, Matroska, WMA and others. Which
one gets a file is decided by its first bytes, never by its name. PyAV sees the bytes alone and a
fixed list of containers, so that a playlist cannot make it open other files or addresses.

Truncation: a recording that ends more than 0.1 s (or 1 %, whichever is longer) before its header
says raises an error, as does an Ogg file that breaks off inside a page; ``allow_truncated`` uses what
is there. Formats that promise no length (MP3 without a Xing header, raw AAC, streamed WAV with an
unknown length) are used up to their end.
"""

import contextlib
import glob
import io
import operator
import os
import stat
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, BinaryIO, Protocol, Self

import numpy as np
import soundfile
from numpy.typing import NDArray

from htsat.errors import AudioError

#: a file name, an encoded recording, a binary file object (read from its position), or (waveform, sample_rate)
AudioSource = str | os.PathLike[str] | bytes | BinaryIO | tuple[NDArray[Any], int]

#: Hz; below, no model hears anything; above, a header is damaged
MIN_SAMPLE_RATE = 4_000
MAX_SAMPLE_RATE = 384_000
MAX_CHANNELS = 16
#: bytes that an input without seek (a pipe) may put into a temporary file
MAX_SPOOL_BYTES = 16 << 30
#: samples times channels decoded at once, whatever block length is asked for: bounds memory (64 MB)
_MAX_BLOCK_VALUES = 1 << 24
#: pipes below this many bytes stay in memory
_SPOOL_IN_MEMORY = 8 << 20

#: endings by which folders are searched (files named explicitly may have any)
AUDIO_SUFFIXES = frozenset([
    ".3gp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".au", ".avi", ".caf", ".flac", ".flv", ".m4a",
    ".m4b", ".m4v", ".mka", ".mkv", ".mov", ".mp3", ".mp4", ".mpg", ".oga", ".ogg", ".opus", ".rf64", ".snd", ".ts",
    ".w64", ".wav", ".wave", ".weba", ".webm", ".wma", ".wmv", ".wv",
])  # fmt: skip

_EXPECTED = "WAV, FLAC, Ogg, Opus, MP3, AIFF or CAF"
_CODECS_HINT = 'M4A, MP4, AAC, WebM and others need: pip install "htsat[codecs]"'
#: the only containers FFmpeg may look for: no playlists, no scripts, nothing that opens further inputs
_DEMUXERS = "mov,matroska,asf,aac,loas,ac3,eac3,amr,ape,wv,avi,flv,mpeg,mpegts,ogg,mp3,wav,w64,flac,aiff,caf"
#: containers whose stream duration is written in the file, not estimated from the bit rate
_DEMUXERS_WITH_DURATION = ("mov", "matroska", "asf")

_W64_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")
#: first bytes of containers that only PyAV reads: offset, bytes
_CODEC_MAGIC = (
    (4, b"ftyp"),
    (4, b"moov"),
    (0, b"\x1a\x45\xdf\xa3"),
    (0, bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")),
    (0, b"\x0b\x77"),
    (0, b"#!AMR"),
    (0, b"MAC "),
    (0, b"wvpk"),
    (0, b"FLV"),
    (0, b"\x00\x00\x01\xba"),
)


def _shown(name: str) -> str:
    """Return ``name`` on one printable line, whatever bytes a file name has."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name) or "''"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.3f} s"


class _View:
    """A seekable binary stream that begins where it stood and remembers errors of the medium.

    Decoders call back into it from C, where an exception cannot travel: a failing disk becomes the
    end of the data, and ``check`` raises afterwards. It has no ``name`` by which a decoder could
    guess a format.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self.start = stream.tell()
        self._overlay: tuple[int, bytes] = (0, b"")
        self._error: OSError | None = None
        self.size = stream.seek(0, os.SEEK_END) - self.start
        stream.seek(self.start)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            self._stream.seek(self.start + offset if whence == os.SEEK_SET else offset, whence)
        except (OSError, ValueError):
            return -1
        return self.tell()

    def tell(self) -> int:
        return self._stream.tell() - self.start

    def read(self, size: int = -1) -> bytes:
        try:
            position = self.tell()
            data = self._stream.read(size)
        except OSError as error:
            self._error = error
            return b""
        at, patch = self._overlay
        if patch and position < at + len(patch) and at < position + len(data):
            patched = bytearray(data)
            for i, value in enumerate(patch):
                if 0 <= at + i - position < len(patched):
                    patched[at + i - position] = value
            return bytes(patched)
        return data

    def at(self, offset: int, size: int) -> bytes:
        """Return up to ``size`` bytes from ``offset``, which a damaged header may put anywhere."""
        if offset >= self.size:
            return b""
        self.seek(offset)
        return self.read(size)

    def overlay(self, offset: int, patch: bytes) -> None:
        """Show ``patch`` instead of the bytes at ``offset``."""
        self._overlay = (offset, patch)

    def check(self) -> None:
        if self._error is not None:
            reason = self._error.strerror or str(self._error)
            raise AudioError(f"{self._name}: reading failed ({reason}); check the disk or connection and copy it again")


class _Decoder(Protocol):
    """What a decoder offers to ``AudioReader``."""

    sample_rate: int
    num_channels: int
    #: samples per channel that the header promises; None if it does not
    num_frames: int | None
    #: why decoding stopped early, once it has
    failure: str | None
    #: decoding stopped at the last piece of the file, where at most that piece is lost
    failed_at_end: bool

    def pieces(self, num_frames: int) -> Iterator[NDArray[np.float32]]:
        """Yield (n, num_channels) float32 with n about ``num_frames`` until the end or a failure."""

    def close(self) -> None:
        """Free the decoder."""


class AudioReader:
    """An open recording, to be read once, in order. A context manager.

    Attributes:
        name: what messages call it.
        sample_rate: Hz, 4,000 to 384,000.
        num_channels: 1 to 16.
        duration: seconds, or None if the header does not tell.
        truncated: the recording is shorter than its header says (final once ``blocks`` has ended).
    """

    def __init__(
        self,
        name: str,
        decoder: _Decoder,
        view: _View | None,
        resources: contextlib.ExitStack,
        *,
        truncated: bool,
        allow_truncated: bool,
        max_seconds: float | None,
    ) -> None:
        self.name = name
        self.sample_rate = decoder.sample_rate
        self.num_channels = decoder.num_channels
        self.duration = None if decoder.num_frames is None else decoder.num_frames / decoder.sample_rate
        self.truncated = truncated
        self._decoder = decoder
        self._view = view
        self._resources = resources
        self._allow_truncated = allow_truncated
        self._max_seconds = max_seconds
        self._started = False

    def __enter__(self) -> Self:
        """Return the reader."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the reader."""
        self.close()

    def close(self) -> None:
        """Close the file, if this reader opened it. May be called twice."""
        self._resources.close()

    def blocks(self, block_seconds: float = 10.0) -> Iterator[NDArray[np.float32]]:
        """Yield the recording as mono blocks in order; memory does not grow with its length.

        Channels are averaged. The samples do not depend on the length of the blocks.

        Args:
            block_seconds: about how much to decode at once; blocks of many channels at high rates are shorter.

        Yields:
            (num_samples,) float32, num_samples >= 1, at ``sample_rate``.

        Raises:
            AudioError: damaged, truncated (see ``open_audio``), longer than ``max_seconds``, without
                samples, or a sample is NaN or infinite.
            RuntimeError: called twice; a stream can be read once.
        """
        if self._started:
            raise RuntimeError(f"{self.name}: blocks can be read once; open the recording again")
        self._started = True
        wanted = max(1, min(round(block_seconds * self.sample_rate), _MAX_BLOCK_VALUES // self.num_channels))
        done = 0
        for piece in self._decoder.pieces(wanted):
            if not len(piece):
                continue
            block = down_mix(piece)
            finite = np.isfinite(block)
            if not finite.all():
                at = (done + int(np.argmin(finite))) / self.sample_rate
                raise AudioError(
                    f"{self.name}: the sample at {at:.3f} s is NaN or infinite; "
                    "expected finite numbers, export the recording again or cut that part out"
                )
            done += len(block)
            _check_length(self.name, done / self.sample_rate, self._max_seconds)
            yield block
        self._check_end(done)

    def _check_end(self, num_samples: int) -> None:
        """Judge what was decoded against what the header promised."""
        if self._view is not None:
            self._view.check()
        read = num_samples / self.sample_rate
        promised = self.duration
        failure = self._decoder.failure
        if promised is not None and promised - read > _tolerance(promised):
            self.truncated = True
            if not self._allow_truncated or not num_samples:
                raise _truncated(self.name, _promise(promised, read))
        elif failure is not None:
            self.truncated = True
            harmless = promised is not None or (self._decoder.failed_at_end and num_samples > 0)
            if not harmless and (not self._allow_truncated or not num_samples):
                raise AudioError(
                    f"{self.name}: the file is damaged after {_seconds(read)} ({failure}); "
                    "copy it again or pass --allow-truncated"
                )
        if not num_samples:
            raise _without_samples(self.name)


def _tolerance(promised: float) -> float:
    """Seconds that may be missing: encoders count their delay and padding differently."""
    return max(0.1, 0.01 * promised)


def _promise(promised: float, read: float) -> str:
    return f"its header promises {_seconds(promised)}, {_seconds(read)} could be read"


def _truncated(name: str, how: str) -> AudioError:
    return AudioError(f"{name}: the file is truncated: {how}; copy it again or pass --allow-truncated")


def _without_samples(name: str) -> AudioError:
    return AudioError(f"{name}: the recording has no samples; expected at least one, record or export it again")


def _check_length(name: str, seconds: float, max_seconds: float | None) -> None:
    if max_seconds is not None and seconds > max_seconds:
        raise AudioError(f"{name}: the recording is longer than the limit of {max_seconds:g} s; cut it into parts")


def down_mix(piece: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mean over channels, (n,), of (n, num_channels); a new array."""
    mono = piece[:, 0].astype(np.float32)
    if piece.shape[1] > 1:
        # column by column: ten times as fast as mean(axis=1) over two columns
        with np.errstate(over="ignore", invalid="ignore"):
            for channel in range(1, piece.shape[1]):
                mono += piece[:, channel]
        mono /= np.float32(piece.shape[1])
    return mono


def check_format(name: str, sample_rate: int, num_channels: int) -> None:
    """Raise AudioError unless rate and channels are within the limits."""
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        raise AudioError(
            f"{name}: the sample rate is {sample_rate} Hz; expected {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} Hz, "
            "export the recording again with its true rate"
        )
    if not 1 <= num_channels <= MAX_CHANNELS:
        raise AudioError(
            f"{name}: the recording has {num_channels} channels; expected 1 to {MAX_CHANNELS}, "
            "export fewer channels or a mix"
        )


def as_float(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return samples as float32; integers scaled so that full scale is [-1, 1)."""
    if values.dtype.kind == "i":
        return (values / np.float64(2 ** (8 * values.dtype.itemsize - 1))).astype(np.float32)
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - np.float32(128)) / np.float32(128)
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False)


# ---------------------------------------------------------------------------------------------------
# decoders


class _ForwardSoundFile(soundfile.SoundFile):  # type: ignore[misc]
    """soundfile seeks to where it already stands after each read, which FLAC of unknown length refuses."""

    def seekable(self) -> bool:
        return False


class _SoundFileDecoder:
    """libsndfile."""

    def __init__(self, name: str, view: _View, kind: str, has_promise: bool) -> None:
        view.seek(0)
        self._file = _ForwardSoundFile(view)
        self.sample_rate = int(self._file.samplerate)
        self.num_channels = int(self._file.channels)
        try:
            check_format(name, self.sample_rate, self.num_channels)
        except AudioError:
            self._file.close()
            raise
        frames = int(self._file.frames)
        # FLAC of unknown length reports 2^63 - 1; MP3 without a Xing header an estimate
        unknown = frames < 0 or frames >= 1 << 62 or (kind == "MP3" and not has_promise)
        self.num_frames = None if unknown else frames
        self.failure: str | None = None
        self.failed_at_end = False

    def pieces(self, num_frames: int) -> Iterator[NDArray[np.float32]]:
        done = 0
        num_frames = min(num_frames, self.num_frames or num_frames)
        while True:
            out = np.zeros((num_frames, self.num_channels), dtype=np.float32)
            try:
                piece = self._file.read(out=out)
            except soundfile.SoundFileError as error:
                # the good part before the damage is in `out` already
                self.failure = str(error).strip(" .:") or "the decoder lost the signal"
                with contextlib.suppress(soundfile.SoundFileError):
                    yield out[: max(0, min(int(self._file.tell()) - done, num_frames))]
                return
            if not len(piece):
                return
            done += len(piece)
            yield piece

    def close(self) -> None:
        self._file.close()


class _ArrayDecoder:
    """A waveform in memory."""

    def __init__(self, name: str, waveform: Any, sample_rate: Any) -> None:
        values = np.asarray(waveform)
        if values.dtype.kind not in "if" and values.dtype != np.uint8:
            raise AudioError(f"{name}: samples are of type {values.dtype}; expected float, signed integer or uint8")
        if values.ndim == 1:
            values = values[:, None]
        if values.ndim != 2:
            raise AudioError(
                f"{name}: the waveform has shape {np.shape(waveform)}; "
                "expected (num_samples,) or (num_samples, channels)"
            )
        if not values.size:
            raise _without_samples(name)
        if values.shape[0] < values.shape[1]:
            values = values.T
        if isinstance(sample_rate, float) and sample_rate.is_integer():
            sample_rate = int(sample_rate)
        try:
            self.sample_rate = operator.index(sample_rate)
        except TypeError as error:
            raise AudioError(f"{name}: the sample rate is {sample_rate!r}; expected a whole number of Hz") from error
        self._values = values
        self.num_channels = values.shape[1]
        self.num_frames: int | None = len(values)
        self.failure: str | None = None
        self.failed_at_end = False
        check_format(name, self.sample_rate, self.num_channels)

    def pieces(self, num_frames: int) -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(self._values), num_frames):
            yield as_float(self._values[start : start + num_frames])

    def close(self) -> None:
        """Nothing to free."""


def _import_av() -> ModuleType:
    """Return PyAV; ImportError without the extra ``codecs``."""
    import av

    return av


class _AvDecoder:
    """FFmpeg through PyAV. The first frame is decoded at once: headers of HE-AAC give half the true rate."""

    def __init__(self, av: ModuleType, name: str, view: _View) -> None:
        view.seek(0)
        self._name = name
        self._error: type[Exception] = av.error.FFmpegError
        self._container = av.open(view, options={"format_whitelist": _DEMUXERS})
        try:
            if not self._container.streams.audio:
                raise AudioError(f"{name}: the file has no sound track; expected one, name a recording with sound")
            self._stream = self._container.streams.audio[0]
            codec = self._stream.codec_context
            if codec is None:
                raise AudioError(f"{name}: the sound is coded in a way that FFmpeg does not know; convert it to FLAC")
            if codec.sample_rate and codec.channels:
                check_format(name, codec.sample_rate, codec.channels)
            self.failure: str | None = None
            self.failed_at_end = False
            self.sample_rate = 0
            self.num_channels = 0
            self._frames = self._decode()
            self._first: NDArray[np.float32] | None = next(self._frames, None)
            if self._first is None:
                raise AudioError(f"{name}: no sound could be decoded; the file is damaged or cut off, copy it again")
            self.num_frames = self._promised_frames()
        except BaseException:
            self._container.close()
            raise

    def _promised_frames(self) -> int | None:
        if not self._container.format.name.startswith(_DEMUXERS_WITH_DURATION):
            return None
        if self._stream.duration is not None:
            return round(float(self._stream.duration * self._stream.time_base) * self.sample_rate)
        # the length of a file with pictures may be that of the pictures
        if self._container.duration is not None and len(self._container.streams) == 1:
            return round(float(self._container.duration) * self.sample_rate / 1_000_000)
        return None

    def _decode(self) -> Iterator[NDArray[np.float32]]:
        """Yield each decoded frame as (n, num_channels), setting rate and channels at the first."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except self._error as error:
                self.failure = _reason(error)
                return
            if packet is None:
                return
            try:
                frames = packet.decode()
            except self._error as error:
                if not self.sample_rate:
                    continue  # a broadcast may begin inside a packet
                self.failure = _reason(error)
                with contextlib.suppress(self._error):
                    following = next(packets, None)
                    self.failed_at_end = following is None or not following.size
                return
            for frame in frames:
                yield self._samples(frame)

    def _samples(self, frame: Any) -> NDArray[np.float32]:
        channels = int(frame.layout.nb_channels)
        if not self.sample_rate:
            check_format(self._name, int(frame.sample_rate), channels)
            self.sample_rate, self.num_channels = int(frame.sample_rate), channels
        elif (int(frame.sample_rate), channels) != (self.sample_rate, self.num_channels):
            raise AudioError(
                f"{self._name}: the sound changes from {self.sample_rate} Hz and {self.num_channels} channels to "
                f"{frame.sample_rate} Hz and {channels}; expected one format, convert the file to WAV or FLAC"
            )
        values = frame.to_ndarray()
        values = values.T if frame.format.is_planar else values.reshape(-1, channels)
        return as_float(values)

    def pieces(self, num_frames: int) -> Iterator[NDArray[np.float32]]:
        held = [] if self._first is None else [self._first]
        self._first = None
        count = sum(map(len, held))
        for frame in self._frames:
            held.append(frame)
            count += len(frame)
            if count >= num_frames:
                yield np.concatenate(held)
                held, count = [], 0
        if held:
            yield np.concatenate(held)

    def close(self) -> None:
        self._container.close()


def _reason(error: Exception) -> str:
    """Return FFmpeg's words without its numbers and our stream's address."""
    text = getattr(error, "strerror", None) or str(error)
    return text[0].lower() + text[1:]


# ---------------------------------------------------------------------------------------------------
# headers


def _sniff(head: bytes) -> str:
    """Return the name of the libsndfile format that ``head`` begins, ``"codecs"`` for PyAV's, or ``""``."""
    if head[:4] in (b"RIFF", b"RIFX", b"RF64"):
        return "codecs" if head[8:12] == b"AVI " else "WAV"
    if head[:16] == _W64_RIFF:
        return "W64"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "AIFF"
    for magic, kind in ((b"fLaC", "FLAC"), (b"OggS", "Ogg"), (b"caff", "CAF"), (b".snd", "AU"), (b"ID3", "MP3")):
        if head.startswith(magic):
            return kind
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        # MPEG audio layers II and III in a legal frame header; layer 00 is ADTS (raw AAC)
        layer, version = head[1] & 0x06, head[1] & 0x18
        if layer in (0x02, 0x04) and version != 0x08 and head[2] & 0xF0 != 0xF0 and head[2] & 0x0C != 0x0C:
            return "MP3"
        return "codecs" if head[1] & 0xF6 == 0xF0 else ""
    if any(head[at : at + len(magic)] == magic for at, magic in _CODEC_MAGIC):
        return "codecs"
    return ""


def is_unknown(size: int) -> bool:
    """Whether a 32-bit chunk size is one of the place-holders that streaming encoders write."""
    return 0x7FFF0000 <= size <= 0x80001000 or 0xFFFF0000 <= size <= 0xFFFFFFFF


def _data_chunk(view: _View) -> tuple[int, int, int] | None:
    """Find the sample data of WAV, RF64, W64, AIFF, AU and CAF.

    libsndfile silently takes what is there, so the sizes are read here.

    Returns:
        (offset of the size field, offset of the data, promised bytes), or None if there is no such chunk.
    """
    head = view.at(0, 40)
    if head.startswith(b".snd"):
        start, size = struct.unpack(">II", head[4:12])
        return 8, start, size
    if head.startswith(b"caff"):
        return _caf_data_chunk(view)
    wide = head.startswith(_W64_RIFF)
    order = ">" if head[:4] in (b"FORM", b"RIFX") else "<"
    position = 40 if wide else 12
    long_size = None
    # no writer makes more chunks; a loop of empty ones must not hang
    for _ in range(4096):
        header = view.at(position, 24 if wide else 8)
        if len(header) < (24 if wide else 8):
            return None
        kind = header[:4]
        if wide:
            size = struct.unpack("<Q", header[16:])[0] - 24
            if size < 0:
                return None
            if kind == b"data":
                return position + 16, position + 24, size
            position += 24 + size + -size % 8
            continue
        size = struct.unpack(order + "I", header[4:])[0]
        if kind == b"ds64":
            sizes = view.at(position + 8, 16)
            long_size = struct.unpack("<Q", sizes[8:])[0] if len(sizes) == 16 else None
        if kind in (b"data", b"SSND"):
            if size == 0xFFFFFFFF and long_size is not None:
                size = long_size
            return position + 4, position + 8, size
        position += 8 + size + size % 2
    return None


def _caf_data_chunk(view: _View) -> tuple[int, int, int] | None:
    position = 8
    for _ in range(4096):
        header = view.at(position, 12)
        if len(header) < 12:
            return None
        size = struct.unpack(">q", header[4:])[0]
        if size < 0:
            return None  # -1: up to the end of the file
        if header[:4] == b"data":
            return position + 4, position + 12, size
        position += 12 + size
    return None


def _xing(view: _View) -> tuple[float, int, int] | None:
    """Return (seconds, promised bytes, present bytes) of an MP3 file with a Xing header.

    Source: the LAME tag specification. Checked here because libsndfile's decoder reports a mismatch
    on the standard error stream of the process.
    """
    start = 0
    head = view.at(0, 10)
    if head.startswith(b"ID3") and len(head) == 10:
        start = 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
    frame = view.at(start, 200)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    if at < 4 or len(frame) < at + 16 or frame[0] != 0xFF:
        return None
    version, rate_index = frame[1] >> 3 & 3, frame[2] >> 2 & 3
    flags, frames, size = struct.unpack(">III", frame[at + 4 : at + 16])
    if flags & 3 != 3 or rate_index == 3 or version == 1:
        return None
    rate = (44100, 48000, 32000)[rate_index] >> {3: 0, 2: 1, 0: 2}[version]
    return frames * (1152 if version == 3 else 576) / rate, size, view.size - start


def _ogg_is_cut(view: _View) -> bool:
    """Whether the file ends inside an Ogg page (at most 65,307 bytes): Ogg has no total length to compare."""
    tail = view.at(max(0, view.size - 65_307), 65_307)
    at = tail.rfind(b"OggS\0")
    if at < 0:
        return False
    if at + 27 > len(tail):
        return True
    segments = tail[at + 27 : at + 27 + tail[at + 26]]
    return len(segments) < tail[at + 26] or at + 27 + len(segments) + sum(segments) > len(tail)


def _repair_unwritten_size(view: _View) -> None:
    """Let a WAV whose data size was never filled in (a stream, a recorder that lost power) be read to its end."""
    found = _data_chunk(view)
    if found is None or found[2] != 0 or view.at(0, 4) not in (b"RIFF", b"RIFX"):
        return
    size_at, start, _ = found
    following = view.at(start, 8)
    if len(following) < 8:
        return
    order = "<" if view.at(0, 4) == b"RIFF" else ">"
    rest = view.size - start - 8
    if following[:4].isascii() and 0 <= rest - struct.unpack(order + "I", following[4:])[0] <= 1:
        return  # a recording without samples, followed by a chunk of notes
    view.overlay(size_at, b"\xff\xff\xff\xff")


# ---------------------------------------------------------------------------------------------------
# opening


def open_audio(
    source: AudioSource,
    name: str | None = None,
    *,
    allow_truncated: bool = False,
    max_seconds: float | None = None,
) -> AudioReader:
    """Open a recording for streaming.

    Args:
        source: a path; the bytes of an encoded file; a binary file object, read from its position and
            left open (one that cannot seek goes through a temporary file); or ``(waveform, sample_rate)``
            with a waveform of (num_samples,), (num_samples, channels) or (channels, num_samples), the
            shorter axis being the channels. Integer samples are scaled to [-1, 1).
        name: what messages call it; by default the path, or ``<bytes>``, ``<stream>``, ``<waveform>``.
        allow_truncated: use what is left of a recording that ends before its header says.
        max_seconds: refuse longer recordings, by the header or as soon as more is decoded.

    Raises:
        AudioError: the source cannot be opened, is not a recording, or lies outside the limits. One line.
        TypeError: ``source`` is none of the above.
    """
    with contextlib.ExitStack() as opening:
        view: _View | None = None
        cut: str | None = None
        decoder: _Decoder
        if isinstance(source, tuple):
            if len(source) != 2:
                raise TypeError(f"expected (waveform, sample_rate), got a tuple of {len(source)}")
            name = _shown(name or "<waveform>")
            decoder = _ArrayDecoder(name, source[0], source[1])
        else:
            name, stream = _open_stream(source, name, opening)
            view = _View(stream, name)
            decoder, cut = _open_decoder(name, view, allow_truncated)
        opening.callback(decoder.close)
        if cut is not None and not allow_truncated:
            raise _truncated(name, cut)
        if decoder.num_frames == 0:
            raise _without_samples(name)
        _check_length(name, (decoder.num_frames or 0) / decoder.sample_rate, max_seconds)
        return AudioReader(
            name,
            decoder,
            view,
            opening.pop_all(),
            truncated=cut is not None,
            allow_truncated=allow_truncated,
            max_seconds=max_seconds,
        )


def _open_stream(source: Any, name: str | None, opening: contextlib.ExitStack) -> tuple[str, BinaryIO]:
    """Return the name for messages and a seekable binary stream."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _shown(name or "<bytes>"), io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        name = _shown(name or os.fsdecode(path))
        return name, opening.enter_context(_open_file(os.fsdecode(path), name))
    if not hasattr(source, "read"):
        raise TypeError(
            f"expected a path, bytes, a binary file object or (waveform, sample_rate), got {type(source).__name__}"
        )
    if name is None:
        own = getattr(source, "name", None)
        name = own if isinstance(own, str) else "<stream>"
    name = _shown(name)
    if isinstance(source, io.TextIOBase):
        raise AudioError(f"{name}: the file object gives text; expected bytes, open it with mode 'rb'")
    try:
        seekable = bool(source.seekable()) if hasattr(source, "seekable") else hasattr(source, "seek")
    except ValueError as error:
        raise AudioError(f"{name}: the file object is closed; expected an open one") from error
    return name, source if seekable else _spool(source, name, opening)


def _open_file(path: str, name: str) -> BinaryIO:
    """Open a regular file, or raise AudioError saying what stands in the way."""
    try:
        mode = Path(path).stat().st_mode
        if stat.S_ISDIR(mode):
            raise AudioError(f"{name}: this is a folder; expected a recording, name a file in it")
        if stat.S_ISFIFO(mode):
            raise AudioError(f"{name}: this is a pipe; expected a file, give '-' and direct the pipe to standard input")
        if not stat.S_ISREG(mode):
            raise AudioError(f"{name}: this is a device or socket; expected a file, record it first")
        return open(path, "rb")
    except FileNotFoundError as error:
        if Path(path).is_symlink():
            raise AudioError(
                f"{name}: this is a link to {_shown(str(Path(path).readlink()))}, which does not exist; "
                "expected a recording, restore the target or remove the link"
            ) from error
        raise AudioError(f"{name}: there is no such file; expected a recording, check the path") from error
    except PermissionError as error:
        raise AudioError(
            f"{name}: no permission to read it; expected a readable file, change its permissions"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise AudioError(f"{name}: it cannot be opened ({reason}); expected a readable file, check the path") from error


def _spool(source: BinaryIO, name: str, opening: contextlib.ExitStack) -> BinaryIO:
    """Copy a stream that cannot seek into memory or, when longer, a temporary file."""
    spool = opening.enter_context(tempfile.SpooledTemporaryFile(_SPOOL_IN_MEMORY))  # noqa: SIM115
    total = 0
    try:
        while data := source.read(1 << 20):
            if not isinstance(data, (bytes, bytearray, memoryview)):
                raise AudioError(f"{name}: the file object gives {type(data).__name__}; expected bytes")
            total += len(data)
            if total > MAX_SPOOL_BYTES:
                raise AudioError(
                    f"{name}: the stream exceeds {MAX_SPOOL_BYTES >> 30} GiB; expected a recording that ends"
                )
            spool.write(data)
    except OSError as error:
        reason = error.strerror or str(error)
        raise AudioError(
            f"{name}: copying the stream to a temporary file failed ({reason}); save it as a file"
        ) from error
    spool.seek(0)
    return spool  # type: ignore[return-value]


def _open_decoder(name: str, view: _View, allow_truncated: bool) -> tuple[_Decoder, str | None]:
    """Choose a decoder by the first bytes.

    Returns:
        the decoder, and how the file is truncated as far as its header tells, else None.
    """
    if view.size <= 0:
        where = "nothing follows the position of the file object" if view.start else "the file is empty"
        raise AudioError(f"{name}: {where} (0 bytes); expected a recording, copy it again")
    kind = _sniff(view.at(0, 64))
    view.check()
    cut: str | None = None
    if kind == "CAF":
        # before decoding: libsndfile refuses a truncated one, PyAV takes what is there without a word
        found = _data_chunk(view)
        if found is not None and view.size - found[1] < 0.99 * found[2]:
            cut = f"its header promises {found[2]} bytes of sound, {max(0, view.size - found[1])} are there"
            if not allow_truncated:
                raise _truncated(name, cut)
    if kind not in ("", "codecs"):
        with contextlib.suppress(soundfile.SoundFileError):
            return _open_sound_file(name, view, kind, allow_truncated)
        view.check()
    try:
        av = _import_av()
    except ImportError as error:
        if kind == "codecs":
            raise AudioError(f"{name}: libsndfile does not know this format; {_CODECS_HINT}") from error
        raise _unreadable(name, view, kind, f"; {_CODECS_HINT}") from error
    try:
        return _AvDecoder(av, name, view), cut
    except (av.error.FFmpegError, ValueError, OSError, RuntimeError) as error:
        view.check()
        raise _unreadable(name, view, kind, "") from error


def _open_sound_file(name: str, view: _View, kind: str, allow_truncated: bool) -> tuple[_Decoder, str | None]:
    cut: str | None = None
    has_promise = True
    if kind == "MP3":
        xing = _xing(view)
        has_promise = xing is not None
        if xing is not None and xing[1] > xing[2]:
            readable = xing[0] * xing[2] / xing[1]
            if xing[0] - readable > _tolerance(xing[0]):
                cut = _promise(xing[0], readable)
                if not allow_truncated:
                    raise _truncated(name, cut)
    elif kind == "Ogg":
        cut = "it breaks off inside an Ogg page" if _ogg_is_cut(view) else None
    elif kind == "WAV":
        _repair_unwritten_size(view)
    # the view is libsndfile's from the moment it is opened: nothing here may move its position afterwards
    found = _data_chunk(view) if kind in ("WAV", "W64", "AIFF", "AU") else None
    decoder = _SoundFileDecoder(name, view, kind, has_promise)
    if found is not None and decoder.num_frames and not is_unknown(found[2]):
        read = decoder.num_frames / decoder.sample_rate
        promised = read * found[2] / max(1, view.size - found[1])
        if promised - read > _tolerance(promised):
            cut = _promise(promised, read)
    return decoder, cut


def _unreadable(name: str, view: _View, kind: str, hint: str) -> AudioError:
    """Return the error for a file that no decoder takes. What decoders say here misleads more than it helps."""
    head = view.at(0, 4096)
    if kind:
        what = "a media file" if kind == "codecs" else f"{'an' if kind[0] in 'AOM' else 'a'} {kind} file"
        return AudioError(
            f"{name}: it begins like {what} but cannot be read; it is damaged, cut off or of a rare coding, "
            "copy it again or convert it to FLAC"
        )
    if head.isascii() and b"\0" not in head:
        return AudioError(f"{name}: this is text, not a recording; expected {_EXPECTED}")
    return AudioError(f"{name}: not a recording that can be read; expected {_EXPECTED}{hint}")


# ---------------------------------------------------------------------------------------------------
# finding


def find_audio(inputs: Iterable[str | os.PathLike[str]], *, recursive: bool = True) -> Iterator[Path | AudioError]:
    """Expand files, folders and patterns to the recordings they name, lazily and in a fixed order.

    A file is taken whatever its ending. A folder gives its files with an ending in ``AUDIO_SUFFIXES``,
    sorted, hidden ones left out, then its sub-folders (links to folders are not followed: they may be
    circular). A name that does not exist but has ``*``, ``?`` or ``[`` is a pattern that no shell
    expanded. Any other name is given back as it is: reading it raises the error that describes it.

    One bad input does not lose the others: what cannot be listed is yielded as an ``AudioError`` in its
    place, for the caller to report and to count as failed. A path that occurs again is left out.
    """
    seen: set[str] = set()
    for entry in inputs:
        text = os.fspath(entry)
        if not os.path.lexists(text) and glob.has_magic(text):
            matches = sorted(glob.glob(text, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
            if not matches:
                yield AudioError(f"{_shown(text)}: no file matches this pattern; check it")
        else:
            matches = [text]
        for match in matches:
            for found in _find_in_folder(match, recursive) if Path(match).is_dir() else (Path(match),):
                if isinstance(found, AudioError):
                    yield found
                elif str(found) not in seen:
                    seen.add(str(found))
                    yield found


def _find_in_folder(folder: str, recursive: bool) -> Iterator[Path | AudioError]:
    """Yield the recordings below ``folder``, and an error for each folder that cannot be listed."""
    errors: list[OSError] = []
    count = 0
    for root, folders, files in os.walk(folder, onerror=errors.append):
        folders[:] = sorted(f for f in folders if recursive and not f.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and Path(file).suffix.lower() in AUDIO_SUFFIXES:
                count += 1
                yield Path(root, file)
    for error in errors:
        where = _shown(os.fsdecode(error.filename)) if error.filename else _shown(folder)
        yield AudioError(f"{where}: the folder cannot be listed ({error.strerror}); change its permissions")
    if not count and not errors:
        endings = " ".join(sorted(AUDIO_SUFFIXES))
        yield AudioError(f"{_shown(folder)}: the folder has no recordings; expected files ending in {endings}")
