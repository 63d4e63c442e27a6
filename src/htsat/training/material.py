"""From corpora on disk to decoded training material in memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from htsat.audio.resample import read_audio
from htsat.data.corpora import Clip, listed, read_esc, read_keywords, read_strong, read_unlabelled
from htsat.data.mix import SceneMixer, Source, token_targets
from htsat.errors import DataError, nearest
from htsat.events import Event
from htsat.training.recipe import Recipe

Waveform = NDArray[np.float32]
#: fewest and most keywords that are joined to one utterance
KEYWORDS_PER_UTTERANCE = (3, 6)
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
        return self.samples.astype(np.float32) / np.float32(32767)


@dataclass(frozen=True, eq=False)
class Material:
    """Everything a run trains and is scored on.

    Attributes:
        mixer: makes training scenes.
        soundscapes: recorded scenes to train on.
        test_clips: those of the held-out fold.
        test_soundscapes: recorded scenes made from the held-out fold alone.
    """

    mixer: SceneMixer
    soundscapes: list[Soundscape]
    test_clips: list[Source]
    test_soundscapes: list[Soundscape]


def load_material(recipe: Recipe, root: Path, progress: Progress) -> Material:
    """Read and decode what the recipe names below ``root``.

    Nothing of the test fold enters the training material: neither its clips nor a mixture with a part of it.

    Raises:
        DataError: a corpus is missing or incomplete, or holds labels that the recipe does not know; with the
            problems of all of them.
        AudioError: a recording cannot be decoded.
    """
    data, rate = recipe.data, recipe.frontend.sample_rate
    problems: list[str] = []

    def read(reader: Callable[..., list[Clip]], folder: str | None, *split: str) -> list[Clip]:
        try:
            return reader(root / folder, *split) if folder else []
        except DataError as error:
            problems.append(str(error))
            return []

    esc = read(read_esc, data.esc)
    soundscapes = read(read_strong, data.soundscapes)
    test_soundscapes = read(read_strong, data.soundscapes_test if data.test_fold else None)
    backgrounds = read(read_unlabelled, data.backgrounds)
    keywords = read(read_keywords, data.speech, "train")

    folds = sorted({fold for clip in esc for fold in clip.folds})
    esc = [clip for clip in esc if clip.labels[0] in data.labels]
    train = [clip for clip in esc if data.test_fold not in clip.folds]
    test = [clip for clip in esc if data.test_fold in clip.folds]
    if not problems:
        problems += _contradictions(recipe, root, train, soundscapes + test_soundscapes, keywords)
        if data.test_fold and not test:
            known = ", ".join(map(str, folds))
            problems.append(f"{root / data.esc}: no clips of the test fold {data.test_fold}; there are folds {known}")
    if problems:
        raise DataError(listed(problems))
    soundscapes = [clip for clip in soundscapes if data.test_fold not in clip.folds]
    test_soundscapes = [clip for clip in test_soundscapes if clip.folds == {data.test_fold}]

    todo = len(train) + len(soundscapes) + len(backgrounds) + len(keywords) + len(test) + len(test_soundscapes)
    done = 0

    def decode(clip: Clip) -> Waveform:
        nonlocal done
        done += 1
        progress(f"reading {clip.path.name}", done / todo)
        return read_audio(clip.path, rate)

    def source(clip: Clip) -> Source:
        waveform = decode(clip)
        parts = [(e.onset, e.offset) for e in clip.events or ()] or [(0.0, len(waveform) / rate)]
        return Source(clip.labels[0], waveform, tuple(parts))

    sources = [source(clip) for clip in train]
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
        [source(clip) for clip in test],
        [soundscape(clip) for clip in test_soundscapes],
    )


def _contradictions(
    recipe: Recipe, root: Path, train: list[Clip], soundscapes: list[Clip], keywords: list[Clip]
) -> list[str]:
    """Return what is wrong between the corpora and the recipe."""
    data = recipe.data
    problems = []
    lacking = set(data.labels) - {clip.labels[0] for clip in train} - ({"speech"} if keywords else set())
    if lacking:
        rest = f" beside the test fold {data.test_fold}" if data.test_fold else ""
        names = ", ".join(label for label in data.labels if label in lacking)
        problems.append(f"{root / data.esc}: no recordings of {names}{rest}")
    if 0 < len(keywords) < KEYWORDS_PER_UTTERANCE[1]:
        problems.append(
            f"{root / str(data.speech)}: {len(keywords)} keywords to train on; "
            f"expected at least {KEYWORDS_PER_UTTERANCE[1]}, which one utterance may need"
        )
    strange = {label for clip in soundscapes for label in clip.labels} - set(data.labels)
    if strange:
        names = ", ".join(sorted(strange)) + nearest(min(strange), data.labels)
        problems.append(f"{root}: the soundscapes hold classes that the recipe lacks: {names}")
    unknown = [clip.path.name for clip in soundscapes if clip.events and not clip.folds]
    if data.test_fold and unknown:
        problems.append(
            f"{unknown[0]} and {len(unknown) - 1} other soundscapes may hold recordings of the test fold: "
            "add sources.tsv, or set data.test_fold = 0"
        )
    return problems


def utterances(keywords: list[Waveform], rate: int, seed: int) -> list[Source]:
    """Join spoken keywords, cut to their loud part, three to six at a time with short pauses between them."""
    rng = np.random.default_rng((seed, len(keywords)))
    spoken = [loud_part(waveform, rate) for waveform in keywords]
    sources = []
    least, most = KEYWORDS_PER_UTTERANCE
    while len(spoken) >= most:
        count = int(rng.integers(least, most + 1))
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
    if len(waveform) < step:
        return waveform
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
        # Only what the chunk holds: an event behind its end would be turned to a place where nothing sounds.
        events = [
            replace(event, offset=min(event.offset, recipe.model.chunk_seconds))
            for event in soundscape.events
            if event.onset < recipe.model.chunk_seconds
        ]
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
    """Return events of a recording of ``duration`` seconds turned forward by ``by`` seconds, cut at the end.

    Args:
        events: inside 0 to ``duration``.
        by: at least 0, less than ``duration``; seconds.
        duration: seconds.
    """
    out = []
    for event in events:
        onset, offset = event.onset + by, event.offset + by
        if onset < duration:
            pieces = [(onset, min(offset, duration)), (0.0, offset - duration)]
        else:
            pieces = [(onset - duration, offset - duration)]
        out += [Event(event.event_label, a, b) for a, b in pieces if b - a > 1e-3]
    return out
