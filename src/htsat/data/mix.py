"""Synthesise sound scenes with exact onsets from single events and backgrounds.

A scene depends on the mixer's material, the seed and the scene's index only, so that
any process at any time makes the same one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from htsat.config import _check
from htsat.errors import ConfigError
from htsat.events import Event

Waveform = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Source:
    """Audio of one clip with the parts of it that count as events of ``label``.

    Attributes:
        label: what sounds.
        waveform: (num_samples,) float32.
        parts: (onset, offset) in seconds.
    """

    label: str
    waveform: Waveform
    parts: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class MixConfig:
    """How scenes are made."""

    max_events: int = 5
    """Events per scene: 1 to this many, few more often than many."""
    easy_scenes: int = 0
    """The first scenes of a run are whole clips without background; difficulty rises up to this scene."""
    whole_clip: float = 0.35
    """Share of scenes that hold one or two whole source clips instead of placed events."""
    background: float = 0.75
    """Share of scenes with a background; the others have digital silence behind them."""
    min_snr_db: float = 5.0
    """Smallest ratio of an event's power to the background's."""
    max_snr_db: float = 26.0
    """Largest ratio."""
    speed: float = 0.15
    """Largest relative change of an event's speed and pitch."""
    texture_min_seconds: float = 1.5
    """Parts longer than this are steady sounds: a random stretch of at least this length is used."""
    texture_max_seconds: float = 5.0
    """Longest stretch of a steady sound."""

    def __post_init__(self) -> None:
        _check("max_events", self.max_events, 1, 100)
        _check("easy_scenes", self.easy_scenes, 0, 1_000_000_000)
        _check("whole_clip", self.whole_clip, 0, 1)
        _check("background", self.background, 0, 1)
        _check("min_snr_db", self.min_snr_db, -60, 60)
        _check("max_snr_db", self.max_snr_db, -60, 60)
        _check("speed", self.speed, 0, 1)
        _check("texture_min_seconds", self.texture_min_seconds, 0.01, 600)
        _check("texture_max_seconds", self.texture_max_seconds, 0.01, 600)
        for what, low, high in (
            ("snr_db", self.min_snr_db, self.max_snr_db),
            ("seconds of a texture", self.texture_min_seconds, self.texture_max_seconds),
        ):
            if low > high:
                raise ConfigError(f"smallest {what} {low:g} is above the largest, {high:g}")


class SceneMixer:
    """Makes scenes of ``seconds`` from sources and backgrounds.

    Args:
        sources: material for events; classes are drawn uniformly, then sources, then parts.
        backgrounds: waveforms, at least as long as a scene.
        sample_rate: Hz, of all the material.
        seconds: length of a scene.
        seed: of all scenes.
        config: how scenes are made.

    Raises:
        ValueError: no sources, or one without samples or parts.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        backgrounds: Sequence[Waveform],
        *,
        sample_rate: int,
        seconds: float,
        seed: int,
        config: MixConfig,
    ) -> None:
        if not sources:
            raise ValueError("a mixer needs at least one source")
        self._by_label: dict[str, list[Source]] = {}
        for source in sources:
            if not len(source.waveform) or not source.parts:
                raise ValueError(f"a source of {source.label!r} has no samples or no parts")
            self._by_label.setdefault(source.label, []).append(source)
        self._labels = sorted(self._by_label)
        self.backgrounds = list(backgrounds)
        self._rate, self._seed, self._config = sample_rate, seed, config
        self._length = round(seconds * sample_rate)

    def scene(self, index: int) -> tuple[Waveform, list[Event]]:
        """Return the waveform (num_samples,) float32 and the events, in time order, of scene ``index``."""
        rng = np.random.default_rng((self._seed, index))
        config = self._config
        scene = np.zeros(self._length, dtype=np.float32)
        level = 10 ** rng.uniform(-2.6, -1.6)  # RMS of the background
        easy = max(0.0, 1.0 - index / config.easy_scenes) if config.easy_scenes else 0.0
        if self.backgrounds and rng.random() < config.background * (1 - easy):
            scene += self._background(rng) * level
        if rng.random() < easy + config.whole_clip * (1 - easy):
            events = self._place_clips(rng, scene, level)
        else:
            events = self._place_events(rng, scene, level)
        peak = float(np.max(np.abs(scene)))
        if peak > 1.0:
            scene /= peak
        return scene, sorted(events, key=lambda e: (e.onset, e.event_label))

    def _draw(self, rng: np.random.Generator) -> Source:
        sources = self._by_label[self._labels[rng.integers(len(self._labels))]]
        return sources[rng.integers(len(sources))]

    def _background(self, rng: np.random.Generator) -> Waveform:
        if rng.random() < 0.3:
            noise = coloured_noise(rng, self._length, exponent=rng.uniform(0.0, 2.0))
        else:
            noise = cut_background(rng, self.backgrounds, self._length)
        normalised: Waveform = noise / (np.sqrt(np.mean(noise**2)) + 1e-9)
        return normalised

    def _place_clips(self, rng: np.random.Generator, scene: Waveform, level: float) -> list[Event]:
        """Add whole clips with all their parts: one after the other from the start, or one anywhere."""
        events: list[Event] = []
        anywhere = rng.random() < 0.3
        start = 0
        while start < self._length:
            source = self._draw(rng)
            waveform, speed = self._varied(rng, source.waveform)
            if anywhere:
                start = int(rng.integers(0, max(0, self._length - len(waveform)) + 1))
            waveform = waveform[: self._length - start]
            scene[start : start + len(waveform)] += waveform * self._gain(rng, waveform, level)
            for onset, offset in source.parts:
                self._note(events, source.label, start / self._rate + onset / speed, (offset - onset) / speed)
            if anywhere or rng.random() < 0.2:
                break
            start += len(waveform) + int(rng.uniform(0, 0.5) * self._rate)
        return events

    def _place_events(self, rng: np.random.Generator, scene: Waveform, level: float) -> list[Event]:
        """Add events cut out of their clips at random times."""
        config, rate = self._config, self._rate
        events: list[Event] = []
        weights = 1.0 / np.sqrt(np.arange(1, config.max_events + 1))
        for _ in range(rng.choice(np.arange(1, config.max_events + 1), p=weights / weights.sum())):
            source = self._draw(rng)
            onset, offset = source.parts[rng.integers(len(source.parts))]
            if offset - onset > config.texture_min_seconds and rng.random() < 0.8:
                longest = min(offset - onset, config.texture_max_seconds)
                length = rng.uniform(config.texture_min_seconds, longest)
                onset += rng.uniform(0, offset - onset - length)
                offset = onset + length
            cut = source.waveform[round(onset * rate) : round(offset * rate)]
            waveform, _ = self._varied(rng, cut)
            if len(waveform) < 2 or not waveform.any():
                continue
            waveform = faded(waveform, round(0.01 * rate))[: self._length]
            start = int(rng.integers(0, self._length - len(waveform) + 1))
            scene[start : start + len(waveform)] += waveform * self._gain(rng, waveform, level)
            self._note(events, source.label, start / rate, len(waveform) / rate)
        return events

    def _note(self, events: list[Event], label: str, onset: float, duration: float) -> None:
        offset = min(onset + duration, self._length / self._rate)
        if 0 <= onset < offset:
            events.append(Event(label, onset, offset))

    def _gain(self, rng: np.random.Generator, waveform: Waveform, level: float) -> float:
        snr = rng.uniform(self._config.min_snr_db, self._config.max_snr_db)
        rms = float(np.sqrt(np.mean(waveform**2))) + 1e-9
        return float(level * 10 ** (snr / 20) / rms)

    def _varied(self, rng: np.random.Generator, waveform: Waveform) -> tuple[Waveform, float]:
        """Return the waveform at a random speed (pitch follows), half of the time, and that speed."""
        if rng.random() < 0.5 or len(waveform) < 16:
            return waveform, 1.0
        speed = float(np.exp(rng.uniform(-1, 1) * np.log1p(self._config.speed)))
        return at_speed(waveform, speed), speed


def at_speed(waveform: Waveform, speed: float) -> Waveform:
    """Return a waveform played ``speed`` times as fast, by linear interpolation: pitch and length follow."""
    places = np.arange(0, len(waveform) - 1, speed)
    before = np.minimum(places.astype(np.int64), len(waveform) - 2)  # arange may overshoot by a rounding error
    share = (places - before).astype(np.float32)
    here: Waveform = waveform[before]
    faster: Waveform = here + share * (waveform[before + 1] - here)
    return faster


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
