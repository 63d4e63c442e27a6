"""Make the example recordings and their table of events: ``python examples/make_examples.py``.

Every sound is synthesised here from noise, resonances and pulse trains; nothing is copied from a
data set, so the files are free to use for anything, and their onsets and offsets are known
exactly: an event lasts from the first to the last sample that its synthesiser wrote (room echo
excluded). The spectra and the pace of the sounds follow those of real recordings.

The random generators are seeded: each run gives the same sound. Compressed files may differ in
their bytes (Ogg streams carry a random serial number), not in what one hears.
"""

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

Waveform = NDArray[np.float64]
#: power spectral density as (Hz, dB) points, straight lines in between on a logarithmic frequency axis
Spectrum = tuple[tuple[float, float], ...]

RAIN: Spectrum = (
    *((30, -12), (100, -3), (300, -4), (900, -5), (2200, -9), (5000, -13), (8000, -18), (12000, -25), (16000, -30)),
)
#: a rotor's noise below and above a few hundred Hz: blades chop the low part, air and turbine roar in the high part
ROTOR_LOW: Spectrum = ((25, -10), (60, -2), (150, 0), (300, -2), (600, -28), (1200, -60))
ROTOR_HIGH: Spectrum = (
    *((75, -50), (150, -24), (300, -2), (900, -8), (2000, -14), (4000, -24), (8000, -40), (14000, -60)),
)
FIRE: Spectrum = (
    *((25, -2), (50, 0), (120, -6), (300, -16), (900, -27), (2000, -32), (6000, -34), (12000, -37), (16000, -42)),
)
SURF: Spectrum = ((25, -12), (80, -4), (250, -1), (700, -3), (1500, -7), (3000, -14), (6000, -24), (12000, -36))
FOAM: Spectrum = ((100, -30), (500, -12), (1200, -4), (3000, 0), (6000, -4), (10000, -10), (14000, -16))
ROOM: Spectrum = ((20, 0), (60, 0), (200, -10), (1000, -22), (4000, -32), (12000, -40))

#: formants of vowels of an adult voice, Hz
VOWELS = {
    "a": (730.0, 1150.0, 2450.0, 3400.0, 4500.0),
    "e": (530.0, 1800.0, 2500.0, 3500.0, 4500.0),
    "i": (290.0, 2200.0, 2950.0, 3600.0, 4600.0),
    "o": (490.0, 880.0, 2400.0, 3300.0, 4400.0),
    "u": (310.0, 800.0, 2250.0, 3250.0, 4400.0),
    "n": (280.0, 1250.0, 2300.0, 3300.0, 4400.0),
}
FORMANT_WIDTHS = (80.0, 100.0, 140.0, 220.0, 320.0)
#: noise of consonants
CONSONANTS: dict[str, Spectrum] = {
    "s": ((500, -45), (2500, -28), (4500, -4), (6500, 0), (10000, -8), (14000, -20)),
    "f": ((500, -22), (1500, -18), (5000, -14), (9000, -12), (14000, -20)),
    "t": ((500, -26), (2000, -12), (3800, -4), (6000, -6), (10000, -16), (16000, -40)),
    "k": ((400, -22), (1200, -6), (1900, -2), (3500, -10), (8000, -30), (16000, -60)),
}


def decibels(level: float) -> float:
    """Return the amplitude factor of ``level`` dB."""
    return float(10.0 ** (level / 20))


def noise(rng: np.random.Generator, num_samples: int, sample_rate: int, spectrum: Spectrum) -> Waveform:
    """Return (num_samples,) Gaussian noise of RMS 1 with a power spectral density."""
    hz = np.fft.rfftfreq(num_samples, 1 / sample_rate)
    points, levels = np.array(spectrum).T
    gain = 10.0 ** (np.interp(np.log(np.maximum(hz, 1.0)), np.log(points), levels) / 20)
    gain[hz < points[0] / 2] = 0.0
    shaped = np.fft.irfft(np.fft.rfft(rng.standard_normal(num_samples)) * gain, num_samples)
    return np.asarray(shaped / np.sqrt(np.mean(shaped**2)), dtype=np.float64)


def wander(rng: np.random.Generator, num_samples: int, sample_rate: int, points_per_second: float) -> Waveform:
    """Return (num_samples,) of a smooth random curve, mean 0 and deviation about 1."""
    count = int(num_samples / sample_rate * points_per_second) + 3
    return np.interp(np.linspace(0, count - 1, num_samples), np.arange(count), rng.standard_normal(count))


def fade(waveform: Waveform, sample_rate: int, seconds_in: float, seconds_out: float) -> Waveform:
    """Return the waveform with raised-cosine ramps at its ends."""
    gain = np.ones(len(waveform))
    rise, fall = round(seconds_in * sample_rate), round(seconds_out * sample_rate)
    gain[:rise] = 0.5 - 0.5 * np.cos(np.pi * np.arange(rise) / rise)
    gain[len(gain) - fall :] *= 0.5 + 0.5 * np.cos(np.pi * np.arange(fall) / fall)
    return waveform * gain


def strike(rng: np.random.Generator, sample_rate: int, resonances: Waveform, decays: Waveform, hiss: float) -> Waveform:
    """Return the sound of one hit on a small hard body: decaying resonances and a burst of noise.

    Args:
        rng: the source of the phases and of the noise.
        sample_rate: Hz.
        resonances: (num,) Hz.
        decays: (num,) seconds in which each falls to 1 / e.
        hiss: amplitude of the noise burst relative to one resonance; it decays like the fastest resonance.
    """
    seconds = np.arange(round(6 * float(decays.max()) * sample_rate)) / sample_rate
    phases = rng.uniform(0, 2 * np.pi, len(resonances))
    amplitudes = rng.uniform(0.4, 1.0, len(resonances))
    rings = np.sin(2 * np.pi * resonances[:, None] * seconds + phases[:, None]) * np.exp(-seconds / decays[:, None])
    burst = rng.standard_normal(len(seconds)) * np.exp(-seconds / decays.min()) * hiss
    attack = np.minimum(1.0, seconds / 0.0003)
    return np.asarray((amplitudes @ rings + burst) * attack, dtype=np.float64)


def place(target: Waveform, part: Waveform, start: int) -> None:
    """Add ``part`` to ``target`` at sample ``start``, cut at the end of ``target``."""
    part = part[: max(0, len(target) - start)]
    target[start : start + len(part)] += part


def rain(rng: np.random.Generator, num_samples: int, sample_rate: int) -> Waveform:
    """Return (num_samples,) of rain, RMS 1: the hiss of many far drops and hundreds of near ones a second."""
    swell = 10.0 ** (0.8 * wander(rng, num_samples, sample_rate, 2.5) / 20)
    waveform = noise(rng, num_samples, sample_rate, RAIN) * swell
    drops = np.zeros(num_samples)
    for start in rng.integers(0, num_samples, round(260 * num_samples / sample_rate)):
        pitches = np.minimum(rng.lognormal(np.log(2600), 0.6, 2), 0.45 * sample_rate)
        drop = strike(rng, sample_rate, pitches, rng.uniform(0.0006, 0.004, 2), 0.8)
        place(drops, drop * rng.lognormal(0.0, 0.8), int(start))
    waveform += 0.55 * drops / np.sqrt(np.mean(drops**2))
    return fade(waveform / np.sqrt(np.mean(waveform**2)), sample_rate, 0.15, 0.15)


def clock(rng: np.random.Generator, num_samples: int, sample_rate: int, per_second: float = 2.0) -> Waveform:
    """Return (num_samples,) of a ticking clock, peak 1: tick and tock, each three knocks of the escapement."""
    waveform = np.zeros(num_samples)
    modes = np.array([310.0, 620.0, 1130.0, 1740.0, 2380.0, 3150.0, 3890.0, 4720.0, 5600.0, 6900.0])
    modes = modes[modes < 0.45 * sample_rate]
    decays = np.geomspace(0.025, 0.004, len(modes))
    knocks = ((0.0, 0.45), (0.009, 1.0), (0.026, 0.35))
    sides = [
        [strike(np.random.default_rng(seed), sample_rate, modes * pitch, decays, 1.0) * level for _, level in knocks]
        for seed, pitch in ((1, 1.0), (2, 0.93))
    ]
    for index in range(int(np.ceil(num_samples / sample_rate * per_second - 0.15))):
        jitter = abs(rng.normal(0.0, 0.0015)) if index else 0.0
        for (delay, _), knock in zip(knocks, sides[index % 2], strict=True):
            place(waveform, knock * rng.uniform(0.88, 1.0), round((index / per_second + jitter + delay) * sample_rate))
    return np.asarray(waveform / np.abs(waveform).max(), dtype=np.float64)


def helicopter(rng: np.random.Generator, num_samples: int, sample_rate: int, blade_hz: float = 14.0) -> Waveform:
    """Return (num_samples,) of a rotor, RMS 1: thumps at the blade rate, chopped noise and a turbine's whine."""
    seconds = np.arange(num_samples) / sample_rate
    phase = np.cumsum(blade_hz * (1 + 0.01 * wander(rng, num_samples, sample_rate, 1.0))) / sample_rate
    loudness = 10.0 ** (1.2 * wander(rng, num_samples, sample_rate, 4.0) / 20)
    beat = np.exp(-0.5 * (((phase % 1.0) - 0.3) / 0.13) ** 2)
    chopped = noise(rng, num_samples, sample_rate, ROTOR_LOW) * (0.6 + 0.9 * beat)
    chopped += 0.7 * noise(rng, num_samples, sample_rate, ROTOR_HIGH) * (1 + 0.25 * beat)
    thump = sum(np.cos(2 * np.pi * k * (phase - 0.3)) * decibels(-2.2 * abs(k - 4)) for k in range(2, 12))
    whine = sum(
        np.sin(2 * np.pi * hz * seconds + 3 * np.cumsum(wander(rng, num_samples, sample_rate, 8.0)) / sample_rate)
        for hz in (1180.0, 2360.0, 3120.0)
        if hz < 0.45 * sample_rate
    )
    waveform = (chopped + 0.25 * thump + 0.012 * whine) * loudness
    return fade(waveform / np.sqrt(np.mean(waveform**2)), sample_rate, 0.2, 0.2)


def fire(rng: np.random.Generator, num_samples: int, sample_rate: int) -> Waveform:
    """Return (num_samples,) of a crackling fire, RMS 1: a flickering rumble and clusters of crackles."""
    flicker = 10.0 ** (3.0 * wander(rng, num_samples, sample_rate, 5.0) / 20)
    waveform = noise(rng, num_samples, sample_rate, FIRE) * flicker
    crackles = np.zeros(num_samples)
    start = 0.02
    while start < num_samples / sample_rate:
        pitches = np.minimum(rng.lognormal(np.log(3500), 0.7, 3), 0.45 * sample_rate)
        decays = rng.uniform(0.0004, 0.0035, 3)
        crackle = strike(rng, sample_rate, pitches, decays, 1.5)
        place(crackles, crackle * min(rng.pareto(1.3) + 0.15, 6.0), round(start * sample_rate))
        # a piece of wood gives several crackles in quick succession, then rests
        start += rng.exponential(0.012) if rng.random() < 0.62 else rng.exponential(0.22)
    waveform += 1.1 * crackles / np.sqrt(np.mean(crackles**2))
    return fade(waveform / np.sqrt(np.mean(waveform**2)), sample_rate, 0.05, 0.1)


def sea_waves(rng: np.random.Generator, num_samples: int, sample_rate: int) -> Waveform:
    """Return (num_samples,) of surf, RMS 1: swells that break into foam and draw back."""
    seconds = np.arange(num_samples) / sample_rate
    surf, foam = (noise(rng, num_samples, sample_rate, spectrum) for spectrum in (SURF, FOAM))
    swell, breaking = np.full(num_samples, 0.5), np.full(num_samples, 0.2)
    crest = rng.uniform(1.2, 1.8)
    while crest < seconds[-1] + 4:
        before = seconds < crest
        swell += np.where(before, np.exp((seconds - crest) / 1.1), np.exp((crest - seconds) / 1.5))
        late = seconds - crest - 0.35
        breaking += np.where(late < 0, np.exp(late / 0.35), np.exp(-late / 1.2)) * rng.uniform(0.7, 1.0)
        crest += rng.uniform(3.4, 4.6)
    waveform = surf * swell + 0.35 * foam * breaking
    return fade(waveform / np.sqrt(np.mean(waveform**2)), sample_rate, 0.3, 0.3)


def speech(rng: np.random.Generator, num_samples: int, sample_rate: int, pitch: float = 125.0) -> Waveform:
    """Return (num_samples,) of speech-like syllables, peak 1: consonant noise and vowels with gliding formants."""
    waveform = np.zeros(num_samples)
    seconds = np.arange(num_samples) / sample_rate
    # knots of the curves that the voice follows: time, loudness of the voice, formants
    times, loudness, formants = [0.0], [0.0], [VOWELS["a"]]
    now, in_phrase = 0.0, 0
    end = num_samples / sample_rate - 0.3
    while now < end:
        consonant = str(rng.choice([*CONSONANTS, "n", "n", ""]))
        vowel = VOWELS[str(rng.choice([*"aeiou"]))]
        if consonant in CONSONANTS:
            plosive = consonant in "tk"
            length = 0.025 if plosive else rng.uniform(0.07, 0.11)
            now += 0.045 if plosive and in_phrase else 0.0
            burst = noise(rng, round(length * sample_rate), sample_rate, CONSONANTS[consonant])
            level = {"s": 0.09, "f": 0.035, "t": 0.10, "k": 0.11}[consonant]
            rise = 0.002 if plosive else 0.025
            place(waveform, fade(burst, sample_rate, rise, 0.012) * level, round(now * sample_rate))
            now += length
        elif consonant == "n":
            times += [now + 0.02, now + 0.06]
            loudness += [0.35, 0.4]
            formants += [VOWELS["n"]] * 2
            now += 0.06
        length = rng.uniform(0.09, 0.19)
        stress = rng.uniform(0.6, 1.0)
        target = VOWELS[str(rng.choice([*"aeiou"]))] if rng.random() < 0.3 else vowel
        times += [now, now + 0.03, now + length - 0.02, now + length + 0.02]
        loudness += [0.1 if consonant else 0.4, stress, 0.8 * stress, 0.0 if rng.random() < 0.3 else 0.15]
        formants += [vowel, vowel, target, target]
        now += length + 0.02
        in_phrase += 1
        if in_phrase > rng.integers(5, 10):
            in_phrase = 0
            times.append(now)
            loudness.append(0.0)
            formants.append(vowel)
            now += rng.uniform(0.18, 0.32)
    times.append(end + 0.3)
    loudness.append(0.0)
    formants.append(VOWELS["a"])
    knots = np.array(times)
    voice = np.interp(seconds, knots, np.array(loudness))
    tracks = [np.interp(seconds, knots, track) for track in np.array(formants).T]
    # the pitch falls over a phrase of about two seconds and moves with the stress
    melody = pitch * (1.12 - 0.1 * (seconds % 2.1) + 0.12 * voice + 0.015 * wander(rng, num_samples, sample_rate, 6.0))
    phase = 2 * np.pi * np.cumsum(melody) / sample_rate
    for harmonic in range(1, int(min(5500.0, 0.45 * sample_rate) / pitch)):
        hz = harmonic * melody
        level = harmonic**-0.75
        transfer = np.ones(num_samples)
        for track, width in zip(tracks, FORMANT_WIDTHS, strict=True):
            ratio = hz / track
            transfer = transfer / np.sqrt((1 - ratio**2) ** 2 + (ratio * width / track) ** 2)
        waveform += 0.1 * level * transfer * voice * np.sin(harmonic * phase + 0.4 * harmonic)
    return fade(waveform / np.abs(waveform).max(), sample_rate, 0.005, 0.02)


def echo(rng: np.random.Generator, waveform: Waveform, sample_rate: int, seconds: float, level: float) -> Waveform:
    """Return the waveform with an echo at ``level`` dB that decays by 60 dB in ``seconds``, as in a room."""
    tail = np.arange(round(seconds * sample_rate)) / sample_rate
    response = rng.standard_normal(len(tail)) * 10.0 ** (-3 * tail / seconds) * np.minimum(1.0, tail / 0.004)
    response *= decibels(level) / np.sqrt(np.sum(response**2))
    response[0] = 1.0
    size = len(waveform) + len(response)
    return np.fft.irfft(np.fft.rfft(waveform, size) * np.fft.rfft(response, size), size)[: len(waveform)]


@dataclass
class Recording:
    """A recording in the making.

    Attributes:
        filename: name of the file; its ending chooses the format.
        sample_rate: Hz.
        waveform: (num_samples, num_channels), nominal [-1, 1].
        events: (onset, offset, event_label) with seconds.
    """

    filename: str
    sample_rate: int
    waveform: NDArray[np.float64]
    events: list[tuple[float, float, str]] = field(default_factory=list)

    @classmethod
    def quiet(cls, seed: int, filename: str, sample_rate: int, duration: float, num_channels: int = 1) -> "Recording":
        """Return the background alone: a quiet room, -62 dB."""
        rng = np.random.default_rng(seed)
        num_samples = round(duration * sample_rate)
        channels = [decibels(-62) * noise(rng, num_samples, sample_rate, ROOM) for _ in range(num_channels)]
        return cls(filename, sample_rate, np.stack(channels, axis=1))

    def add(self, label: str, onset: float, waveform: NDArray[np.float64]) -> None:
        """Mix in a sound, (num_samples,) or (num_samples, num_channels), from ``onset`` seconds on."""
        start = round(onset * self.sample_rate)
        stop = start + len(waveform)
        self.waveform[start:stop] += waveform if waveform.ndim == 2 else waveform[:, None]
        self.events.append((onset, stop / self.sample_rate, label))


def clock_alone() -> Recording:
    """3 s, 16 kHz, mono: shorter than what the model hears at once."""
    recording = Recording.quiet(10, "clock.wav", 16000, 3.0)
    rng = np.random.default_rng(11)
    recording.add("clock_tick", 0.5, decibels(-9) * clock(rng, 40000, 16000, per_second=4.0))
    return recording


def rain_and_clock() -> Recording:
    """10 s, 32 kHz, mono: a clock ticks, then rain sets in."""
    recording = Recording.quiet(20, "rain_and_clock.ogg", 32000, 10.0)
    rng = np.random.default_rng(21)
    ticking = echo(rng, clock(rng, round(7.6 * 32000), 32000), 32000, 0.35, -10)
    recording.add("clock_tick", 1.0, decibels(-6) * ticking)
    recording.add("rain", 4.0, decibels(-31) * rain(rng, 192000, 32000))
    return recording


def waves() -> Recording:
    """7 s, 32 kHz, mono: surf."""
    recording = Recording.quiet(30, "waves.flac", 32000, 7.0)
    recording.add("sea_waves", 1.0, decibels(-25) * sea_waves(np.random.default_rng(31), 6 * 32000, 32000))
    return recording


def helicopter_over_fire() -> Recording:
    """15 s, 32 kHz, mono: a helicopter passes over a camp fire."""
    rate = 32000
    recording = Recording.quiet(40, "helicopter_over_fire.ogg", rate, 15.0)
    rng = np.random.default_rng(41)
    recording.add("crackling_fire", 0.8, decibels(-35) * fire(rng, round(13.4 * rate), rate))
    rotor = helicopter(rng, 6 * rate, rate)
    nearness = np.interp(np.arange(len(rotor)) / rate, [0.0, 2.5, 3.5, 6.0], [-12.0, 0.0, 0.0, -12.0])
    recording.add("helicopter", 5.0, decibels(-20) * rotor * 10.0 ** (nearness / 20))
    return recording


def street() -> Recording:
    """25 s, 44.1 kHz, stereo: somebody talks, a rotor passes from left to right, rain begins."""
    rate = 44100
    recording = Recording.quiet(50, "street.ogg", rate, 25.0, num_channels=2)
    rng = np.random.default_rng(51)

    def pan(waveform: Waveform, position: Waveform | float) -> NDArray[np.float64]:
        # equal power: position -1 is left, 1 is right
        angle = (np.asarray(position) + 1) * np.pi / 4
        return np.stack([waveform * np.cos(angle), waveform * np.sin(angle)], axis=1) * 2**0.5

    for onset, seconds, position, pitch in ((1.5, 4.0, -0.4, 122.0), (18.0, 3.5, 0.35, 195.0)):
        talk = echo(rng, speech(rng, round(seconds * rate), rate, pitch), rate, 0.25, -14)
        recording.add("speech", onset, decibels(-11) * pan(talk, position))
    rotor = helicopter(rng, 8 * rate, rate, blade_hz=17.0)
    nearness = np.interp(np.arange(len(rotor)) / rate, [0.0, 3.5, 4.5, 8.0], [-10.0, 0.0, 0.0, -10.0])
    passing = pan(rotor * 10.0 ** (nearness / 20), np.linspace(-0.9, 0.9, len(rotor)))
    recording.add("helicopter", 6.5, decibels(-19) * passing)
    # drops fall on both sides alike, but not the same drops
    both = np.stack([rain(rng, round(12.0 * rate), rate) for _ in range(2)], axis=1)
    recording.add("rain", 12.5, decibels(-33) * both)
    recording.events.sort()
    return recording


RECORDINGS: tuple[Callable[[], Recording], ...] = (clock_alone, rain_and_clock, waves, helicopter_over_fire, street)


def write(recording: Recording, folder: Path) -> Path:
    """Write one recording into ``folder`` and return its path."""
    path = folder / recording.filename
    compression = 0.55 if path.suffix == ".ogg" else None
    num_channels = recording.waveform.shape[1]
    with soundfile.SoundFile(path, "w", recording.sample_rate, num_channels, compression_level=compression) as file:
        # the Vorbis encoder wants small pieces
        for start in range(0, len(recording.waveform), recording.sample_rate):
            file.write(recording.waveform[start : start + recording.sample_rate])
    return path


def main() -> None:
    """Write every recording and ``events.tsv``, beside this script or into ``--out``."""
    parser = argparse.ArgumentParser(description="Make the example recordings and their table of events.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    folder: Path = parser.parse_args().out
    rows = []
    for make in RECORDINGS:
        recording = make()
        path = write(recording, folder)
        rows += [(path.name, f"{onset:.3f}", f"{offset:.3f}", label) for onset, offset, label in recording.events]
        print(f"{path.name}: {len(recording.events)} events")
    with open(folder / "events.tsv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["filename", "onset", "offset", "event_label"])
        table.writerows(rows)


if __name__ == "__main__":
    main()
