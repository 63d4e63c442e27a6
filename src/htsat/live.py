"""Recordings without an end: samples in, events out while they sound.

``LiveStream`` does everything but run the network and knows neither files nor clocks: samples go in, in blocks of any
size and at any rate, and what is ready to be heard comes out (``push``); what the network says of it goes in, and what
became known comes out (``apply``). ``PredictorStream`` does both with a backend.

Each moment is heard once, at the end of as much context as the model takes, with ``lookahead_seconds`` behind it
(``htsat.audio.chunk``). Posteriors and events are those of ``Predictor`` on the same samples with the same
``InferenceConfig``, however they are cut into blocks. Where the source has a gap, what came before it is ended as a
recording is, and what comes behind it begins like one, at its place on the time line of the stream.
"""

import dataclasses
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from htsat.audio.chunk import Chunk, num_tokens
from htsat.audio.resample import Resampler
from htsat.backends import Backend
from htsat.config import CheckpointConfig, DecodingConfig
from htsat.detection.decoder import LiveDecoder, LiveEvent
from htsat.errors import AudioError, UsageError
from htsat.hearing import Framewise, check_level, chunker_of, to_posteriors
from htsat.labels import counted_classes, heard_labels

Array = NDArray[np.float32]

#: seconds between the times at which a stream is heard
DEFAULT_HOP = 1.0
#: seconds that are heard behind each moment
DEFAULT_LOOKAHEAD = 0.2
#: seconds of samples that are taken at once
_BLOCK_SECONDS = 10
_LEAST_RATE, _MOST_RATE = 1000, 768_000


@dataclass(frozen=True)
class LiveGap:
    """A part of a stream that nobody heard.

    Attributes:
        start: seconds on the time line of the stream.
        duration: seconds.
    """

    start: float
    duration: float


@dataclass(frozen=True)
class SectionEnd:
    """There is nothing more to be heard up to here: the end of a stream, or a gap.

    Attributes:
        gap: what follows; None: nothing does.
    """

    gap: LiveGap | None


@dataclass(frozen=True, eq=False)
class LiveResult:
    """What became known of a stream.

    Attributes:
        start: seconds from which on it is known now.
        end: seconds up to which it is known; ``start`` if nothing was added.
        framewise_posteriors: (num_frames, num_classes) float32 in [0, 1], from ``start`` to ``end``.
        frame_boundaries: (num_frames + 1,) float64, seconds.
        clipwise_posteriors: (num_classes,) of the chunk that was heard; None where none was.
        events: what changed.
        gap: the gap that begins at ``end``.
    """

    start: float
    end: float
    framewise_posteriors: Array
    frame_boundaries: NDArray[np.float64]
    clipwise_posteriors: Array | None
    events: list[LiveEvent]
    gap: LiveGap | None = None


def live_config(
    config: CheckpointConfig,
    hop_seconds: float = DEFAULT_HOP,
    lookahead_seconds: float | None = DEFAULT_LOOKAHEAD,
    decoding: DecodingConfig | None = None,
) -> CheckpointConfig:
    """Return the settings with which ``Predictor`` answers as a stream does.

    Args:
        config: of the model.
        hop_seconds: between the times at which a stream is heard; rounded to the model's time steps.
        lookahead_seconds: heard behind each moment, the same; None: chunks that overlap are cross-faded as in
            recordings, which is known a whole chunk later.
        decoding: None: as the model says.

    Raises:
        ConfigError: seconds out of range, or longer than the model's chunks together.
    """
    inference = dataclasses.replace(
        config.inference,
        hop_seconds=hop_seconds,
        lookahead_seconds=lookahead_seconds,
        shifts=1,
        short="tile" if config.inference.short == "tile" else "pad",
    )
    return dataclasses.replace(config, inference=inference, decoding=decoding or config.decoding)


class _Section:
    """A part of a stream without gaps."""

    def __init__(self, config: CheckpointConfig, sample_rate: int, start: float) -> None:
        self.start = start
        self.resampler = Resampler(sample_rate, config.frontend.sample_rate)
        self.chunker = chunker_of(config)
        self.framewise = Framewise(config)
        self.decoder = LiveDecoder(heard_labels(config), config.decoding, config.frame_seconds, start=start)
        self.received = 0  # samples, as they came
        self.ended = False
        self.num_frames = 0  # known
        self.held: list[Array] = []  # posteriors of the last frames, known but not decoded


class LiveStream:
    """One stream; see the module. Not for several threads at once.

    Args:
        config: of the model.
        sample_rate: Hz of the samples that come.
        hop_seconds: see ``live_config``.
        lookahead_seconds: the same.
        decoding: the same.

    Raises:
        UsageError: a sample rate out of range.
        ConfigError: see ``live_config``.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        sample_rate: int,
        *,
        hop_seconds: float = DEFAULT_HOP,
        lookahead_seconds: float | None = DEFAULT_LOOKAHEAD,
        decoding: DecodingConfig | None = None,
    ) -> None:
        if not _LEAST_RATE <= sample_rate <= _MOST_RATE:
            raise UsageError(f"expected a sample rate of {_LEAST_RATE} to {_MOST_RATE} Hz, got {sample_rate}")
        self.config = live_config(config, hop_seconds, lookahead_seconds, decoding)
        self.sample_rate = sample_rate
        self.labels = list(heard_labels(self.config))
        self._counted = counted_classes(self.config)
        self._sections = deque([_Section(self.config, sample_rate, 0.0)])
        self._next_id = 1
        self._finished = False

    @property
    def hop_seconds(self) -> float:
        """Seconds between the times at which the stream is heard."""
        return self.config.hop_tokens * self.config.token_seconds

    @property
    def frame_seconds(self) -> float:
        """Seconds of a frame."""
        return self.config.frame_seconds

    @property
    def delay_seconds(self) -> float:
        """Seconds from the end of an event to when it is known, without the time that hearing takes, at most."""
        ahead = self.config.lookahead_tokens
        lookahead = self.config.heard_tokens - self.config.hop_tokens if ahead is None else ahead
        return self.hop_seconds + lookahead * self.config.token_seconds + self._sections[0].decoder.delay_seconds

    @property
    def received_seconds(self) -> float:
        """Seconds of the time line that came so far, gaps included."""
        return self._sections[-1].start + self._sections[-1].received / self.sample_rate

    @property
    def open_events(self) -> int:
        """How many events sound now."""
        return self._sections[0].decoder.open_events

    def push(self, waveform: Array) -> list[Chunk | SectionEnd]:
        """Take the next samples and return what is ready to be heard, in order.

        Args:
            waveform: (num_samples,) float32 mono, about -1 to 1.

        Raises:
            AudioError: samples that are not finite or far too large; nothing of the block was taken.
            ValueError: not a vector of floats, or the stream is finished.
        """
        self._check_open()
        block = np.array(waveform, dtype=np.float32)
        if block.ndim != 1:
            raise ValueError(f"expected samples of shape (num_samples,), got {block.shape}")
        if not np.isfinite(block).all():
            at = self.received_seconds + int(np.argmin(np.isfinite(block))) / self.sample_rate
            raise AudioError(f"stream: the sample at {at:.3f} s is NaN or infinite; expected finite numbers")
        check_level(block, "stream", self.received_seconds)
        section = self._sections[-1]
        section.received += len(block)
        return list(section.chunker.push(section.resampler.push(block)))

    def gap(self, seconds: float) -> list[Chunk | SectionEnd]:
        """Go on after a time that nobody heard; events end before it.

        Raises:
            ValueError: seconds that are not positive and finite, or the stream is finished.
        """
        self._check_open()
        if not 0 < seconds < float("inf"):
            raise ValueError(f"a gap must last more than 0 s, got {seconds:g}")
        start = self.received_seconds
        work = self._end(LiveGap(start, seconds))
        self._sections.append(_Section(self.config, self.sample_rate, start + seconds))
        return work

    def finish(self) -> list[Chunk | SectionEnd]:
        """End the stream.

        Raises:
            ValueError: it is finished already.
        """
        self._check_open()
        self._finished = True
        return self._end(None)

    def _end(self, gap: LiveGap | None) -> list[Chunk | SectionEnd]:
        section = self._sections[-1]
        section.ended = True
        rest = section.chunker.push(section.resampler.finish())
        return [*rest, *section.chunker.finish(), SectionEnd(gap)]

    def _check_open(self) -> None:
        if self._finished:
            raise ValueError("the stream is finished; use a new one")

    def apply(
        self, work: Chunk | SectionEnd, clip_logits: Array | None = None, frame_logits: Array | None = None
    ) -> LiveResult:
        """Take in what the network says and return what is known by it.

        Args:
            work: what ``push``, ``gap`` and ``finish`` returned, each once, in that order.
            clip_logits: (num_classes,) for the samples of a chunk.
            frame_logits: (num_tokens, num_classes), the same.

        Raises:
            ValueError: a chunk without logits, or logits that are not numbers.
        """
        section = self._sections[0]
        section.decoder.next_id = self._next_id
        clip = None
        if isinstance(work, Chunk):
            if clip_logits is None or frame_logits is None:
                raise ValueError("a chunk needs what the network says of it")
            clip = to_posteriors(clip_logits, self.config)
            if self._counted is not None:
                clip = self._counted(clip)
            section.framewise.add(work, frame_logits)
            rows = section.framewise.take()
            # Where the last frame of an ended section ends is known at its end alone.
            if section.ended:
                section.held.append(rows)
                events = []
            else:
                events = section.decoder.push(rows)
            result = self._result(section, rows, clip, events)
        else:
            num_samples = section.chunker.num_samples
            rows = section.framewise.finish(num_samples)
            duration = num_samples / self.config.frontend.sample_rate
            events = section.decoder.finish(np.concatenate([*section.held, rows]), duration)
            result = self._result(section, rows, clip, events, work.gap)
            if work.gap is not None:
                self._sections.popleft()
        self._next_id = section.decoder.next_id
        return result

    def _result(
        self,
        section: _Section,
        rows: Array,
        clip: Array | None,
        events: list[LiveEvent],
        gap: LiveGap | None = None,
    ) -> LiveResult:
        first, section.num_frames = section.num_frames, section.num_frames + len(rows)
        boundaries = np.arange(first, section.num_frames + 1, dtype=np.float64) * self.config.frame_seconds
        if section.ended and section.num_frames == num_tokens(
            section.chunker.num_samples, self.config.heard_samples, self.config.heard_frames
        ):
            boundaries[-1] = section.chunker.num_samples / self.config.frontend.sample_rate
        boundaries += section.start
        return LiveResult(float(boundaries[0]), float(boundaries[-1]), rows, boundaries, clip, events, gap)


class PredictorStream:
    """A stream that a ``Predictor`` listens to; see ``Predictor.stream``.

    Args:
        config: of the model.
        backend: runs it.
        sample_rate: Hz of the samples that come.
        hop_seconds: see ``live_config``.
        lookahead_seconds: the same.

    Raises:
        UsageError: a sample rate out of range.
        ConfigError: see ``live_config``.

    Attributes:
        state: the stream itself.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        backend: Backend,
        sample_rate: int,
        *,
        hop_seconds: float = DEFAULT_HOP,
        lookahead_seconds: float | None = DEFAULT_LOOKAHEAD,
    ) -> None:
        self.state = LiveStream(config, sample_rate, hop_seconds=hop_seconds, lookahead_seconds=lookahead_seconds)
        self._backend = backend

    def feed(self, waveform: Array) -> list[LiveResult]:
        """Listen to the next samples; see ``LiveStream.push``."""
        step = _BLOCK_SECONDS * self.state.sample_rate
        blocks = [waveform[start : start + step] for start in range(0, len(waveform), step)]
        return [result for block in blocks for result in self._heard(self.state.push(block))]

    def gap(self, seconds: float) -> list[LiveResult]:
        """Go on after a time that nobody heard; see ``LiveStream.gap``."""
        return self._heard(self.state.gap(seconds))

    def finish(self) -> list[LiveResult]:
        """End the stream."""
        return self._heard(self.state.finish())

    def _heard(self, work: Sequence[Chunk | SectionEnd]) -> list[LiveResult]:
        results = []
        for item in work:
            if isinstance(item, Chunk):
                clip_logits, frame_logits, _ = self._backend(item.samples[None])
                results.append(self.state.apply(item, clip_logits[0], frame_logits[0]))
            else:
                results.append(self.state.apply(item))
        return results


def start_message(stream: LiveStream, model: str) -> dict[str, Any]:
    """Return the first of the messages that tell a stream to other programs; see ``live_messages``."""
    return {
        "type": "start",
        "model": model,
        "labels": stream.labels,
        "sample_rate": stream.sample_rate,
        "hop_seconds": stream.hop_seconds,
        "delay_seconds": stream.delay_seconds,
        "frame_seconds": stream.frame_seconds,
    }


def live_messages(
    result: LiveResult, labels: Sequence[str], *, top: int = 5, posteriors: bool = False
) -> list[dict[str, Any]]:
    """Return a result as plain values, one message each, as ``htsat listen --json`` and the WebSocket send them.

    Args:
        result: of a stream.
        labels: of its classes.
        top: how many tags to tell.
        posteriors: also the framewise posteriors, with four digits.
    """
    messages: list[dict[str, Any]] = []
    if posteriors and len(result.framewise_posteriors):
        step = float(np.diff(result.frame_boundaries).max())
        rows = np.round(result.framewise_posteriors.astype(np.float64), 4).tolist()
        messages.append({"type": "frames", "start": result.start, "frame_seconds": step, "posteriors": rows})
    for change in result.events:
        event = dataclasses.asdict(change.event)
        messages.append({"type": "event", "state": change.state, "id": change.id, **event, "sounding": change.sounding})
    if result.clipwise_posteriors is not None:
        order = np.argsort(-result.clipwise_posteriors, kind="stable")[:top]
        tags = [{"label": labels[i], "probability": float(result.clipwise_posteriors[i])} for i in order]
        messages.append({"type": "progress", "time": result.end, "tags": tags})
    if result.gap is not None:
        messages.append({"type": "gap", "start": result.gap.start, "duration": result.gap.duration})
    return messages
