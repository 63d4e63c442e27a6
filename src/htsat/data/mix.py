"""Synthesise sound scenes with exact onsets from single events and backgrounds.

A scene depends on the mixer's material, the seed and the scene's index only, so that
any process at any time makes the same one.

An event's level is its power between onset and offset, nothing else: the silence around a short sound in its clip does
not count. Sound that nobody labelled is no event and no part of a scene either (``labelled_part``).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray

from htsat.config import _check
from htsat.errors import ConfigError
from htsat.events import Event

Waveform = NDArray[np.float32]

#: seconds; less than this of a longer event, left over by a cut, tells nobody what it was: it is taken out, sound and
#: label together
SLIVER = 0.05
#: seconds of the fades at both ends of what is cut out
FADE = 0.01
#: dB below the loudest 20 ms down to which a clip without noted times is said to sound
ACTIVE_DB = 30.0
#: seconds of silence that end an event in a clip without noted times
ACTIVE_GAP = 0.3
#: dB below its events under which the pauses of a clip are taken for silence and stay as they were recorded
PAUSE_DB = 12.0
#: share of its clip that a steady sound fills
STEADY_SHARE = 0.8
#: draws of a source, and of a place for it, before a scene stays with fewer events
_DRAWS, _PLACES = 4, 20


@dataclass(frozen=True, eq=False)
class Source:
    """Audio of one clip with the parts of it that count as events of ``label``.

    Attributes:
        label: what sounds.
        waveform: (num_samples,) float32.
        parts: (onset, offset) in seconds.
        name: of the clip, for tables.
        start: seconds of the clip before the waveform, for tables.
        steady: whether any stretch of a long part sounds like the whole, as of rain; otherwise, as of a cock's crow,
            parts are used whole.
    """

    label: str
    waveform: Waveform
    parts: tuple[tuple[float, float], ...]
    name: str = ""
    start: float = 0.0
    steady: bool = True

    def __post_init__(self) -> None:
        if not len(self.waveform) or not self.parts:
            raise ValueError(f"a source of {self.label!r} has no samples or no parts")


@dataclass(frozen=True, eq=False)
class LazySource:
    """A source that is read when a scene needs it.

    Attributes:
        label: what sounds.
        load: reads it; the same every time.
    """

    label: str
    load: Callable[[], Source]


@dataclass(frozen=True)
class MixConfig:
    """How scenes are made."""

    max_events: int = 6
    """Most events of a scene."""
    mean_events: float = 2.7
    """Events of a scene on average (1 more than a Poisson number, as far as ``max_events`` lets it)."""
    max_polyphony: int = 2
    """Most events that sound at once; those of one class never overlap."""
    rows: float = 0.1
    """Share of the events that are followed by more of the same source, after short pauses."""
    easy_scenes: int = 0
    """The first scenes of a run are whole clips without background; difficulty rises up to this scene."""
    whole_clip: float = 0.25
    """Share of scenes that hold whole source clips, with their pauses, instead of placed events."""
    background: float = 0.9
    """Share of scenes with a background; the others have digital silence behind them."""
    noise: float = 0.3
    """Share of the backgrounds that are noise, between white and brown, instead of a recording; all of them where there
    are no recordings."""
    min_background_db: float = -58.0
    """Smallest level (RMS) of a background, dB of full scale."""
    max_background_db: float = -32.0
    """Largest level."""
    min_snr_db: float = 4.0
    """Smallest ratio of an event's power to the background's."""
    max_snr_db: float = 28.0
    """Largest ratio."""
    speed: float = 0.15
    """Largest relative change of an event's speed and pitch."""
    texture_min_seconds: float = 1.5
    """Parts of steady sounds longer than this are cut: a random stretch of at least this length is used."""
    texture_max_seconds: float = 5.0
    """Longest stretch of a steady sound."""
    others: float = 0.4
    """Share of scenes that also hold sounds of no class, if the mixer has some; they are no events."""
    others_alone: float = 0.3
    """Share of these that hold nothing else but a background."""
    filter_db: float = 0.0
    """Largest gain of a random filter for each event, smooth over frequency, up and down; 0: none."""
    reverb: float = 0.0
    """Share of scenes in a room (synthetic: noise that decays); events end where the sound itself ends, without its
    reverberation."""
    min_decay_seconds: float = 0.1
    """Shortest time in which a room's reverberation falls by 60 dB."""
    max_decay_seconds: float = 0.8
    """Longest time."""

    def __post_init__(self) -> None:
        _check("max_events", self.max_events, 1, 100)
        _check("mean_events", self.mean_events, 1, 100)
        _check("max_polyphony", self.max_polyphony, 1, 100)
        _check("rows", self.rows, 0, 1)
        _check("easy_scenes", self.easy_scenes, 0, 1_000_000_000)
        _check("whole_clip", self.whole_clip, 0, 1)
        _check("background", self.background, 0, 1)
        _check("noise", self.noise, 0, 1)
        _check("min_background_db", self.min_background_db, -100, 0)
        _check("max_background_db", self.max_background_db, -100, 0)
        _check("min_snr_db", self.min_snr_db, -60, 60)
        _check("max_snr_db", self.max_snr_db, -60, 60)
        _check("speed", self.speed, 0, 1)
        _check("texture_min_seconds", self.texture_min_seconds, 0.01, 600)
        _check("texture_max_seconds", self.texture_max_seconds, 0.01, 600)
        _check("others", self.others, 0, 1)
        _check("others_alone", self.others_alone, 0, 1)
        _check("filter_db", self.filter_db, 0, 40)
        _check("reverb", self.reverb, 0, 1)
        _check("min_decay_seconds", self.min_decay_seconds, 0.01, 20)
        _check("max_decay_seconds", self.max_decay_seconds, 0.01, 20)
        for what, low, high in (
            ("background_db", self.min_background_db, self.max_background_db),
            ("snr_db", self.min_snr_db, self.max_snr_db),
            ("seconds of a texture", self.texture_min_seconds, self.texture_max_seconds),
            ("decay_seconds", self.min_decay_seconds, self.max_decay_seconds),
        ):
            if low > high:
                raise ConfigError(f"smallest {what} {low:g} is above the largest, {high:g}")


@dataclass(frozen=True)
class Placed:
    """An event of a scene and where it comes from.

    Attributes:
        event: in the scene.
        source: name of the clip.
        source_onset: seconds in the clip.
        source_offset: seconds in the clip.
        snr_db: level above the scene's background, or above what its level would be.
    """

    event: Event
    source: str
    source_onset: float
    source_offset: float
    snr_db: float


@dataclass(frozen=True, eq=False)
class Scene:
    """A mixed scene.

    Attributes:
        waveform: (num_samples,) float32 in [-1, 1].
        placed: in time order.
        background: which of the mixer's recordings lies behind it; -1 for noise, None for digital silence.
    """

    waveform: Waveform
    placed: tuple[Placed, ...]
    background: int | None

    @property
    def events(self) -> list[Event]:
        """What sounds when, in time order."""
        return [placed.event for placed in self.placed]


@dataclass(frozen=True, eq=False)
class _Piece:
    """Sound to lay into a scene: its parts in samples, and (onset, offset) of each in the clip, in seconds."""

    waveform: Waveform
    parts: list[tuple[int, int]]
    origins: list[tuple[float, float]]


class SceneMixer:
    """Makes scenes of ``seconds`` from sources and backgrounds.

    Args:
        sources: material for events; classes are drawn uniformly, then sources, then parts.
        backgrounds: waveforms; noise stands in for them where there are none.
        sample_rate: Hz, of all the material.
        seconds: length of a scene.
        seed: of all scenes.
        config: how scenes are made.
        others: material of sounds that are of no class: they are laid into scenes and not told, so that a model
            learns that there is more than its classes.

    Raises:
        ValueError: no sources.
    """

    def __init__(
        self,
        sources: Sequence[Source | LazySource],
        backgrounds: Sequence[Waveform],
        *,
        sample_rate: int,
        seconds: float,
        seed: int,
        config: MixConfig,
        others: Sequence[Source] = (),
    ) -> None:
        if not sources:
            raise ValueError("a mixer needs at least one source")
        self._by_label: dict[str, list[Source | LazySource]] = {}
        for source in sources:
            self._by_label.setdefault(source.label, []).append(source)
        self._labels = sorted(self._by_label)
        self.backgrounds = backgrounds
        self._others = others
        self._rate, self._seed, self._config = sample_rate, seed, config
        self._length = round(seconds * sample_rate)
        self._counts = np.arange(1, config.max_events + 1)
        weights = [(config.mean_events - 1) ** n / math.factorial(n) for n in range(config.max_events)]
        self._count_shares = np.array(weights) / sum(weights)

    def scene(self, index: int) -> tuple[Waveform, list[Event]]:
        """Return the waveform (num_samples,) float32 and the events, in time order, of scene ``index``."""
        scene = self.mix(index)
        return scene.waveform, scene.events

    def mix(self, index: int) -> Scene:
        """Return scene ``index`` with the origin of its parts."""
        rng = np.random.default_rng((self._seed, index))
        config = self._config
        canvas = np.zeros(self._length, dtype=np.float32)
        level = 10 ** (rng.uniform(config.min_background_db, config.max_background_db) / 20)
        easy = max(0.0, 1.0 - index / config.easy_scenes) if config.easy_scenes else 0.0
        background = None
        if rng.random() < config.background * (1 - easy):
            noise, background = self._background(rng)
            canvas += noise * np.float32(level)
        room = None
        if config.reverb and rng.random() < config.reverb:
            decay = rng.uniform(config.min_decay_seconds, config.max_decay_seconds)
            room = room_response(rng, self._rate, decay, reverberant_db=rng.uniform(-15, 0))
        others_alone = False
        if self._others and rng.random() < config.others * (1 - easy):
            self._place_others(rng, canvas, level, room)
            others_alone = rng.random() < config.others_alone
        if others_alone:
            placed: list[Placed] = []
        elif rng.random() < easy + config.whole_clip * (1 - easy):
            placed = self._place_clips(rng, canvas, level, room)
        else:
            placed = self._place_events(rng, canvas, level, room)
        peak = float(np.max(np.abs(canvas)))
        if peak > 1.0:
            canvas /= peak
        order = sorted(placed, key=lambda p: (p.event.onset, p.event.event_label))
        return Scene(canvas, tuple(order), background)

    def _draw(self, rng: np.random.Generator) -> Source:
        sources = self._by_label[self._labels[rng.integers(len(self._labels))]]
        found = sources[rng.integers(len(sources))]
        return found if isinstance(found, Source) else found.load()

    def _background(self, rng: np.random.Generator) -> tuple[Waveform, int]:
        """Return a background of power 1 and which recording it is, -1 for noise."""
        number = -1
        if rng.random() < self._config.noise or not len(self.backgrounds):
            noise = coloured_noise(rng, self._length, exponent=rng.uniform(0.0, 2.0))
        else:
            number = int(rng.integers(len(self.backgrounds)))
            recording = self.backgrounds[number]
            if 0 < len(recording) < self._length:
                # Forward and backward in turn: no jump where it begins anew.
                recording = np.pad(recording, (0, self._length - len(recording)), mode="symmetric")
            noise = cut_background(rng, [recording], self._length)
        normalised: Waveform = noise / (np.sqrt(np.mean(noise**2)) + 1e-9)
        return normalised, number

    def _place_clips(
        self, rng: np.random.Generator, canvas: Waveform, level: float, room: Waveform | None
    ) -> list[Placed]:
        """Add whole clips with all their parts: one after the other from the start, or one anywhere."""
        placed: list[Placed] = []
        anywhere = rng.random() < 0.3
        start = 0
        while start < self._length:
            source = self._draw(rng)
            waveform, speed = self._varied(rng, source.waveform)
            if anywhere:
                start = int(rng.integers(0, max(0, self._length - len(waveform)) + 1))
            spans = [(round(a * self._rate / speed), round(b * self._rate / speed)) for a, b in source.parts]
            waveform = without_sliver(waveform, spans, self._length - start, round(SLIVER * self._rate))
            piece = _Piece(
                faded(waveform, round(FADE * self._rate)),
                [(a, min(b, len(waveform))) for a, b in spans],
                [
                    (source.start + a, source.start + min(b, len(waveform) * speed / self._rate))
                    for a, b in source.parts
                ],
            )
            snr = rng.uniform(self._config.min_snr_db, self._config.max_snr_db)
            placed += self._lay(rng, canvas, source, piece, start, level, snr, room)
            if anywhere or rng.random() < 0.2:
                break
            start += max(1, len(waveform) + int(rng.uniform(0, 0.5) * self._rate))
        return placed

    def _place_events(
        self, rng: np.random.Generator, canvas: Waveform, level: float, room: Waveform | None
    ) -> list[Placed]:
        """Add events cut out of their clips at random times."""
        config = self._config
        placed: list[Placed] = []
        spans: list[tuple[str, int, int]] = []

        def add(source: Source, piece: _Piece, start: int, snr: float) -> None:
            placed.extend(self._lay(rng, canvas, source, piece, start, level, snr, room))
            spans.append((source.label, start, start + len(piece.waveform)))

        count = int(rng.choice(self._counts, p=self._count_shares))
        draws = 0
        while len(spans) < count and draws < _DRAWS * count:
            draws += 1
            source = self._draw(rng)
            piece = self._cut(rng, source)
            if piece is None or (start := self._free_place(rng, spans, source.label, len(piece.waveform))) is None:
                continue
            snr = rng.uniform(config.min_snr_db, config.max_snr_db)
            add(source, piece, start, snr)
            if rng.random() >= config.rows:
                continue
            for _ in range(int(rng.integers(1, 4))):
                start = spans[-1][2] + round(rng.uniform(0.1, 1.5) * self._rate)
                piece = self._cut(rng, source)
                if piece is None or len(spans) >= config.max_events:
                    break
                if not self._fits(spans, source.label, start, start + len(piece.waveform)):
                    break
                add(source, piece, start, float(np.clip(snr + rng.normal(0, 2), config.min_snr_db, config.max_snr_db)))
        return placed

    def _place_others(self, rng: np.random.Generator, canvas: Waveform, level: float, room: Waveform | None) -> None:
        """Add one to three sounds of no class at random times, as loud as events are."""
        for _ in range(int(rng.integers(1, 4))):
            source = self._others[int(rng.integers(len(self._others)))]
            piece = self._cut(rng, source)
            if piece is not None:
                start = int(rng.integers(0, self._length - len(piece.waveform) + 1))
                snr = rng.uniform(self._config.min_snr_db, self._config.max_snr_db)
                self._lay(rng, canvas, source, piece, start, level, snr, room)

    def _cut(self, rng: np.random.Generator, source: Source) -> _Piece | None:
        """Cut a part out of a source, of a long steady one a stretch; None if there is nothing to hear."""
        config, rate = self._config, self._rate
        onset, offset = source.parts[rng.integers(len(source.parts))]
        if source.steady and offset - onset > config.texture_min_seconds and rng.random() < 0.9:
            longest = min(offset - onset, config.texture_max_seconds)
            length = rng.uniform(config.texture_min_seconds, longest)
            onset += rng.uniform(0, offset - onset - length)
            offset = onset + length
        waveform, speed = self._varied(rng, source.waveform[round(onset * rate) : round(offset * rate)])
        waveform = waveform[: self._length]
        if len(waveform) < 2 or not waveform.any():
            return None
        if config.filter_db:
            waveform = filtered(rng, waveform, config.filter_db, rate)
        offset = min(offset, onset + len(waveform) * speed / rate)
        origin = (source.start + onset, source.start + offset)
        return _Piece(faded(waveform, round(FADE * rate)), [(0, len(waveform))], [origin])

    def _free_place(
        self, rng: np.random.Generator, spans: Sequence[tuple[str, int, int]], label: str, length: int
    ) -> int | None:
        """Return a random start for an event of ``length`` samples, or None if none was found."""
        for _ in range(_PLACES):
            start = int(rng.integers(0, self._length - length + 1))
            if self._fits(spans, label, start, start + length):
                return start
        return None

    def _fits(self, spans: Sequence[tuple[str, int, int]], label: str, start: int, end: int) -> bool:
        """Return whether an event may lie there: inside, not over one of its class, not over too many others."""
        beside = [(what, a, b) for what, a, b in spans if a < end and b > start]
        if end > self._length or any(what == label for what, _, _ in beside):
            return False
        moments = [start, *(a for _, a, _ in beside if a > start)]
        return all(sum(a <= t < b for _, a, b in beside) < self._config.max_polyphony for t in moments)

    def _lay(
        self, rng: np.random.Generator, canvas: Waveform, source: Source, piece: _Piece, start: int, level: float,
        snr: float, room: Waveform | None,
    ) -> list[Placed]:  # fmt: skip
        """Add a piece, its parts ``snr`` dB above ``level``; return them as they lie in the scene."""
        kept = [(part, origin) for part, origin in zip(piece.parts, piece.origins, strict=True) if part[0] < part[1]]
        power = active_power(piece.waveform, [part for part, _ in kept])
        if not power:
            return []
        waveform = piece.waveform * np.float32(level * 10 ** (snr / 20) / math.sqrt(power))
        if room is not None:
            waveform = reverberant(waveform, room)
        end = min(len(canvas), start + len(waveform))
        canvas[start:end] += waveform[: end - start]
        return [
            Placed(Event(source.label, (start + a) / self._rate, (start + b) / self._rate), source.name, *origin, snr)
            for (a, b), origin in kept
        ]

    def _varied(self, rng: np.random.Generator, waveform: Waveform) -> tuple[Waveform, float]:
        """Return the waveform at a random speed (pitch follows), half of the time, and that speed."""
        if rng.random() < 0.5 or len(waveform) < 16 or not self._config.speed:
            return waveform, 1.0
        speed = float(np.exp(rng.uniform(-1, 1) * np.log1p(self._config.speed)))
        return at_speed(waveform, speed), speed


# ------------------------------------------------------------------ the material of events


def active_parts(waveform: Waveform, rate: int) -> list[tuple[float, float]]:
    """Return where a clip sounds, in seconds: stretches of 20-ms steps within ``ACTIVE_DB`` of the loudest.

    Pauses shorter than ``ACTIVE_GAP`` belong to the sound. None if it is silent.
    """
    step = max(1, round(0.02 * rate))
    edges = np.arange(0, len(waveform), step)
    if not len(edges) or not waveform.any():
        return []
    power = np.add.reduceat(waveform.astype(np.float64) ** 2, edges) / np.diff(np.append(edges, len(waveform)))
    loud = np.flatnonzero(power > power.max() * 10 ** (-ACTIVE_DB / 10))
    # steps between two loud ones: a pause of so many
    breaks = np.flatnonzero((np.diff(loud) - 1) * step >= ACTIVE_GAP * rate)
    firsts, lasts = loud[np.append(0, breaks + 1)], loud[np.append(breaks, len(loud) - 1)]
    return [
        (int(a) * step / rate, min((int(b) + 1) * step, len(waveform)) / rate)
        for a, b in zip(firsts, lasts, strict=True)
    ]


def labelled_part(
    label: str,
    waveform: Waveform,
    rate: int,
    events: Sequence[Event] | None,
    name: str = "",
) -> Source | None:
    """Make a source of a clip, without the sound that nobody labelled as ``label``.

    It is cut to the stretch between the first onset and the last offset. Pauses in it stay as they were recorded if
    they are ``PAUSE_DB`` quieter than the events; louder ones hold something, and events of other classes lie
    in others: those are silenced. Parts that an event of another class overlaps are not used.

    Args:
        label: the class.
        waveform: (num_samples,) of the whole clip.
        rate: Hz.
        events: of the clip, of any class; None where the times are unknown: then the parts that are loud.
        name: of the clip.

    Returns:
        The source, or None if nothing of the class can be heard alone.
    """
    found = [Event(label, *part) for part in active_parts(waveform, rate)] if events is None else list(events)
    others = [event for event in found if event.event_label != label]
    duration = len(waveform) / rate
    parts: list[tuple[float, float]] = []
    for event in sorted((e for e in found if e.event_label == label), key=lambda e: e.onset):
        onset, offset = event.onset, min(event.offset, duration)
        if onset >= offset or any(o.onset < event.offset and o.offset > event.onset for o in others):
            continue
        if parts and onset <= parts[-1][1]:
            parts[-1] = (parts[-1][0], max(parts[-1][1], offset))
        else:
            parts.append((onset, offset))
    spans = [(round(a * rate), round(b * rate)) for a, b in parts]
    power = active_power(waveform, spans)
    if not power:
        return None
    first, last = spans[0][0], spans[-1][1]
    clean = waveform[first:last].copy()
    for (_, end), (begin, _) in itertools.pairwise(spans):
        pause = waveform[end:begin]
        disturbed = any(o.onset * rate < begin and o.offset * rate > end for o in others)
        if disturbed or active_power(pause, [(0, len(pause))]) > power * 10 ** (-PAUSE_DB / 10):
            # Fades lie inside the parts, so that the pause is silent from end to end.
            fade = min(round(FADE * rate), end - spans[0][0], last - begin)
            ramp = np.linspace(0, 1, fade, dtype=np.float32)
            clean[end - first - fade : end - first] *= ramp[::-1]
            clean[begin - first : begin - first + fade] *= ramp
            clean[end - first : begin - first] = 0
    return Source(
        label, clean, tuple((a - first / rate, b - first / rate) for a, b in parts), name, first / rate,
        steady=len(parts) == 1 and parts[0][1] - parts[0][0] >= STEADY_SHARE * duration,
    )  # fmt: skip


def active_power(waveform: Waveform, spans: Sequence[tuple[int, int]]) -> float:
    """Return the mean power of a waveform inside ``spans`` of samples; 0 of none."""
    if not spans:
        return 0.0
    inside = np.concatenate([waveform[a:b] for a, b in spans])
    return float(np.mean(inside.astype(np.float64) ** 2)) if len(inside) else 0.0


def without_sliver(waveform: Waveform, spans: Sequence[tuple[int, int]], length: int, least: int) -> Waveform:
    """Return the first ``length`` samples, or fewer: cut before an event of which less than ``least`` would be left.

    Args:
        waveform: (num_samples,).
        spans: (onset, offset) of its events in samples.
        length: samples that there is room for.
        least: samples; an event that is shorter as a whole may stay.
    """
    if length >= len(waveform):
        return waveform
    slivers = [a for a, b in spans if a < length < b and length - a < least]
    return waveform[: min(slivers, default=length)]


# ------------------------------------------------------------------ sound


def at_speed(waveform: Waveform, speed: float) -> Waveform:
    """Return a waveform played ``speed`` times as fast: pitch and length follow, nothing folds back (soxr's HQ)."""
    if speed == 1.0 or len(waveform) < 2:
        return waveform
    length = max(1, round(len(waveform) / speed))
    changed: Waveform = soxr.resample(waveform, speed, 1.0, quality="HQ")[:length]
    return np.pad(changed, (0, length - len(changed)))


def filtered(rng: np.random.Generator, waveform: Waveform, most_db: float, rate: int) -> Waveform:
    """Return the waveform through a random smooth filter: gains up to ``most_db`` at six points over the octaves."""
    # Room for the filter to ring, which is cut off again.
    size = len(waveform) + round(0.05 * rate)
    octaves = np.log2(np.maximum(np.fft.rfftfreq(size, 1 / rate), 1.0))
    points = np.linspace(np.log2(60), np.log2(rate / 2), 6)
    gains = np.interp(octaves, points, rng.uniform(-most_db, most_db, len(points)))
    spectrum = np.fft.rfft(waveform, size) * 10 ** (gains / 20)
    return np.fft.irfft(spectrum, size)[: len(waveform)].astype(np.float32)


def room_response(rng: np.random.Generator, rate: int, decay_seconds: float, reverberant_db: float) -> Waveform:
    """Return the response of a synthetic room: the direct sound, 1, and after 5 ms noise that decays exponentially.

    Args:
        rng: of the noise.
        rate: Hz.
        decay_seconds: in which the noise falls by 60 dB.
        reverberant_db: energy of all the noise relative to the direct sound.
    """
    early, length = max(1, round(0.005 * rate)), max(2, round(decay_seconds * rate))
    tail = rng.standard_normal(length) * 10 ** (-3 * np.arange(length) / (decay_seconds * rate))
    tail *= math.sqrt(10 ** (reverberant_db / 10) / np.sum(tail**2))
    return np.concatenate([[1.0], np.zeros(early - 1), tail]).astype(np.float32)


def reverberant(waveform: Waveform, response: Waveform) -> Waveform:
    """Return a waveform in a room, longer by what rings on."""
    length = len(waveform) + len(response) - 1
    size = 1 << (length - 1).bit_length()
    spectrum = np.fft.rfft(waveform, size) * np.fft.rfft(response, size)
    return np.fft.irfft(spectrum, size)[:length].astype(np.float32)


def cut_background(rng: np.random.Generator, recordings: Sequence[Waveform], length: int) -> Waveform:
    """Return a random stretch of one of the recordings, (length,); silence follows a shorter recording."""
    recording = recordings[int(rng.integers(len(recordings)))]
    start = int(rng.integers(max(1, len(recording) - length)))
    stretch = recording[start : start + length]
    return np.pad(stretch, (0, length - len(stretch)))


def coloured_noise(rng: np.random.Generator, length: int, exponent: float) -> Waveform:
    """Return noise with power falling as 1 / frequency^exponent: 0 white, 1 pink, 2 brown; (length,) float32."""
    spectrum = np.fft.rfft(rng.standard_normal(length).astype(np.float32))
    spectrum *= np.maximum(np.arange(len(spectrum)), 16.0) ** (-exponent / 2)
    return np.fft.irfft(spectrum, length).astype(np.float32)


def faded(waveform: Waveform, length: int) -> Waveform:
    """Return the waveform with linear fades of ``length`` samples at both ends."""
    length = min(length, len(waveform) // 2)
    if length == 0:
        return waveform
    ramp = np.linspace(0, 1, length, dtype=np.float32)
    out = waveform.copy()
    out[:length] *= ramp
    out[-length:] *= ramp[::-1]
    return out


def token_targets(
    events: Sequence[Event], labels: Sequence[str], num_tokens: int, token_seconds: float
) -> NDArray[np.float32]:
    """Return framewise targets, (num_tokens, num_classes) in [0, 1].

    A token that an event fills at least half is 1; below, twice the filled share. The token
    that holds most of an event is always 1, so that no short event is lost. Events after the last
    token leave no mark.
    """
    targets = np.zeros((num_tokens, len(labels)), dtype=np.float32)
    edges = np.arange(num_tokens + 1) * token_seconds
    for event in events:
        overlap = np.minimum(edges[1:], event.offset) - np.maximum(edges[:-1], event.onset)
        share = np.clip(2 * overlap / token_seconds, 0, 1)
        if overlap.max() <= 0:
            continue
        share[int(np.argmax(overlap))] = 1.0
        column = targets[:, labels.index(event.event_label)]
        np.maximum(column, share, out=column)
    return targets
