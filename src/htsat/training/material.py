"""From corpora on disk to decoded training material in memory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from htsat.audio.resample import read_audio
from htsat.data.corpora import Clip, read_esc, read_keywords, read_strong, read_unlabelled
from htsat.data.mix import SceneMixer, Source, token_targets
from htsat.errors import DataError
from htsat.events import Event
from htsat.training.recipe import Recipe

Waveform = NDArray[np.float32]
#: called with a line for people and the share done in [0, 1]
Progress = Callable[[str, float], None]


@dataclass(frozen=True, eq=False)
class Soundscape:
    """A recorded mixture: waveform (num_samples,) float32 in [-1, 1] kept as int16, with its events."""

    name: str
    samples: NDArray[np.int16]
    events: tuple[Event, ...]

    @property
    def waveform(self) -> Waveform:
        """Samples as float32."""
        return self.samples.astype(np.float32) / 32767


@dataclass(frozen=True, eq=False)
class Material:
    """Everything a run trains and is scored on.

    Attributes:
        mixer: makes training scenes.
        soundscapes: recorded scenes to train on.
        test_clips: (waveform, label) of the held-out fold.
        test_soundscapes: recorded scenes made from the held-out fold alone.
    """

    mixer: SceneMixer
    soundscapes: list[Soundscape]
    test_clips: list[tuple[Waveform, str]]
    test_soundscapes: list[Soundscape]


def load_material(recipe: Recipe, root: Path, progress: Progress) -> Material:
    """Read and decode what the recipe names below ``root``.

    Nothing of the test fold enters the training material: neither its clips nor a mixture with a part of it.

    Raises:
        DataError: a corpus is missing or incomplete, or holds labels that the recipe does not know.
        AudioError: a recording cannot be decoded.
    """
    data, rate = recipe.data, recipe.frontend.sample_rate
    esc = read_esc(root / data.esc)
    soundscapes = read_strong(root / data.soundscapes) if data.soundscapes else []
    test_soundscapes = read_strong(root / data.soundscapes_test) if data.soundscapes_test and data.test_fold else []
    backgrounds = read_unlabelled(root / data.backgrounds)
    keywords = read_keywords(root / data.speech, "train") if data.speech else []
    esc = [clip for clip in esc if clip.labels[0] in data.labels]
    known = {label for clip in esc for label in clip.labels} | ({"speech"} if keywords else set())
    lacking = [label for label in data.labels if label not in known]
    if lacking:
        raise DataError(f"{root}: no recordings of {', '.join(lacking)} in {data.esc}")
    strange = {label for clip in soundscapes + test_soundscapes for label in clip.labels} - set(data.labels)
    if strange:
        raise DataError(f"{root}: the soundscapes hold classes that the recipe lacks: {', '.join(sorted(strange))}")

    train = [clip for clip in esc if data.test_fold not in clip.folds]
    test = [clip for clip in esc if data.test_fold in clip.folds]
    if data.test_fold and not test:
        raise DataError(f"{root / data.esc}: fold {data.test_fold} has no clips")
    soundscapes = [clip for clip in soundscapes if data.test_fold not in clip.folds]
    test_soundscapes = [clip for clip in test_soundscapes if clip.folds == {data.test_fold}]

    todo = len(train) + len(soundscapes) + len(backgrounds) + len(keywords) + len(test) + len(test_soundscapes)
    done = 0

    def decode(clip: Clip) -> Waveform:
        nonlocal done
        done += 1
        progress(f"reading {clip.path.name}", done / todo)
        return read_audio(clip.path, rate)

    sources = []
    for clip in train:
        waveform = decode(clip)
        parts = [(e.onset, e.offset) for e in clip.events or ()] or [(0.0, len(waveform) / rate)]
        sources.append(Source(clip.labels[0], waveform, tuple(parts)))
    sources += utterances([decode(clip) for clip in keywords], rate, recipe.train.seed)
    mixer = SceneMixer(
        sources,
        [decode(clip) for clip in backgrounds],
        sample_rate=rate,
        seconds=recipe.model.chunk_seconds,
        seed=recipe.train.seed,
        config=recipe.mix,
    )

    def soundscape(clip: Clip) -> Soundscape:
        samples = np.clip(decode(clip) * 32767, -32768, 32767).astype(np.int16)
        return Soundscape(clip.path.name, samples, clip.events or ())

    return Material(
        mixer,
        [soundscape(clip) for clip in soundscapes],
        [(decode(clip), clip.labels[0]) for clip in test],
        [soundscape(clip) for clip in test_soundscapes],
    )


def utterances(keywords: list[Waveform], rate: int, seed: int) -> list[Source]:
    """Join spoken keywords, cut to their loud part, three to six at a time with short pauses between them."""
    rng = np.random.default_rng((seed, len(keywords)))
    spoken = [loud_part(waveform, rate) for waveform in keywords]
    sources = []
    while len(spoken) >= 6:
        count = int(rng.integers(3, 7))
        pieces = []
        for waveform in spoken[:count]:
            rms = float(np.sqrt(np.mean(waveform**2))) + 1e-9
            pieces += [0.1 * waveform / rms, np.zeros(int(rng.uniform(0.02, 0.15) * rate), np.float32)]
        joined = np.concatenate(pieces[:-1]).astype(np.float32)
        sources.append(Source("speech", joined, ((0.0, len(joined) / rate),)))
        spoken = spoken[count:]
    return sources


def loud_part(waveform: Waveform, rate: int, below_peak_db: float = 30.0) -> Waveform:
    """Cut a waveform to the stretch between the first and the last 20 ms within ``below_peak_db`` of the loudest."""
    step = round(0.02 * rate)
    frames = waveform[: len(waveform) // step * step].reshape(-1, step)
    power = np.mean(frames**2, axis=1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-below_peak_db / 10))
    return waveform[loud[0] * step : (loud[-1] + 1) * step] if len(loud) else waveform


def training_scene(recipe: Recipe, material: Material, index: int) -> tuple[Waveform, NDArray[np.float32]]:
    """Return scene ``index`` of a run: waveform (chunk_samples,) and framewise targets (num_tokens, num_classes).

    It depends on the recipe's seed and the index only.
    """
    rng = np.random.default_rng((recipe.train.seed, index, 1))
    chunk = round(recipe.model.chunk_seconds * recipe.frontend.sample_rate)
    if material.soundscapes and rng.random() < recipe.train.soundscape_share:
        soundscape = material.soundscapes[rng.integers(len(material.soundscapes))]
        waveform = np.pad(soundscape.waveform[:chunk], (0, max(0, chunk - len(soundscape.samples))))
        events = list(soundscape.events)
        # Turning the recording around a random point is as natural a mixture, and a new one.
        turn = int(rng.integers(chunk))
        waveform = np.roll(waveform, turn) * np.float32(10 ** rng.uniform(-0.5, 0.3))
        events = turned(events, turn / recipe.frontend.sample_rate, recipe.model.chunk_seconds)
    else:
        waveform, events = material.mixer.scene(index)
    num_frames = recipe.model.image_size * recipe.model.image_size // recipe.frontend.n_mels
    num_tokens = num_frames // (recipe.model.patch_size << (len(recipe.model.depths) - 1))
    targets = token_targets(events, recipe.data.labels, num_tokens, recipe.model.chunk_seconds / num_tokens)
    return waveform, targets


def turned(events: list[Event], by: float, duration: float) -> list[Event]:
    """Return events of a recording of ``duration`` seconds turned forward by ``by`` seconds, cut at the end."""
    out = []
    for event in events:
        onset, offset = event.onset + by, event.offset + by
        pieces = [(onset, min(offset, duration)), (0.0, offset - duration)] if onset < duration else [
            (onset - duration, offset - duration)
        ]
        out += [Event(event.event_label, a, b) for a, b in pieces if b - a > 1e-3]
    return out
