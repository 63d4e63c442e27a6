"""From corpora on disk to decoded training material in memory."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from htsat.audio.resample import read_audio
from htsat.data.corpora import Clip, listed, read_esc, read_keywords, read_strong, read_unlabelled
from htsat.data.mix import SLIVER, SceneMixer, Source, active_parts, labelled_part, token_targets
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
    others = read(read_esc, data.others)

    folds = sorted({fold for clip in esc for fold in clip.folds})
    esc = [clip for clip in esc if clip.labels[0] in data.labels]
    held_out = {data.test_fold, *data.without_folds}
    train = [clip for clip in esc if not held_out & clip.folds]
    test = [clip for clip in esc if data.test_fold in clip.folds]
    other_labels = set(data.other_labels) or {clip.labels[0] for clip in others} - set(data.labels)
    if others and (strange := other_labels - {clip.labels[0] for clip in others}):
        problems.append(f"{root / str(data.others)}: no recordings of {', '.join(sorted(strange))} (other_labels)")
    others = [clip for clip in others if clip.labels[0] in other_labels and not held_out & clip.folds]
    if data.others and not others and not problems:
        problems.append(f"{root / data.others}: no clips of other classes beside the folds held out")
    if not problems:
        problems += _contradictions(recipe, root, train, soundscapes + test_soundscapes, keywords)
        if data.test_fold and not test:
            known = ", ".join(map(str, folds))
            problems.append(f"{root / data.esc}: no clips of the test fold {data.test_fold}; there are folds {known}")
    if problems:
        raise DataError(listed(problems))
    soundscapes = [clip for clip in soundscapes if not held_out & clip.folds]
    test_soundscapes = [clip for clip in test_soundscapes if clip.folds == {data.test_fold}]

    todo = len(train) + len(soundscapes) + len(backgrounds) + len(keywords) + len(test)
    todo += len(others) + len(test_soundscapes)
    done = 0

    def decode(clip: Clip) -> Waveform:
        nonlocal done
        done += 1
        progress(f"reading {clip.path.name}", done / todo)
        return read_audio(clip.path, rate)

    def whole(clip: Clip) -> Source:
        """Return a clip as it is."""
        waveform = decode(clip)
        parts = [(e.onset, e.offset) for e in clip.events or ()] or [(0.0, len(waveform) / rate)]
        return Source(clip.labels[0], waveform, tuple(parts), clip.path.name)

    def source(clip: Clip) -> Source:
        """Return the labelled part of a clip."""
        if (found := labelled_part(clip.labels[0], decode(clip), rate, clip.events, clip.path.name)) is None:
            raise DataError(f"{clip.path}: is silent where {clip.labels[0]} should sound; leave it out of its table")
        return found

    sources = [source(clip) for clip in train]
    sources += utterances([(clip.group, decode(clip)) for clip in keywords], rate, recipe.train.seed)
    mixer = SceneMixer(
        sources,
        [decode(clip) for clip in backgrounds],
        sample_rate=rate,
        seconds=recipe.model.chunk_seconds,
        seed=recipe.train.seed,
        config=recipe.mix,
        others=[source(clip) for clip in others],
    )

    def soundscape(clip: Clip) -> Soundscape:
        samples = np.clip(decode(clip) * 32767, -32768, 32767).astype(np.int16)
        return Soundscape(clip.path.name, samples, clip.events or ())

    return Material(
        mixer,
        [soundscape(clip) for clip in soundscapes],
        [whole(clip) for clip in test],
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
    elif keywords and max(Counter(clip.group for clip in keywords).values()) < KEYWORDS_PER_UTTERANCE[0]:
        problems.append(
            f"{root / str(data.speech)}: no speaker has {KEYWORDS_PER_UTTERANCE[0]} keywords, which an utterance needs"
        )
    strange = {label for clip in soundscapes for label in clip.labels} - set(data.labels)
    if strange:
        names = ", ".join(sorted(strange)) + nearest(min(strange), data.labels)
        problems.append(f"{root}: the soundscapes hold classes that the recipe lacks: {names}")
    unknown = [clip.path.name for clip in soundscapes if clip.events and not clip.folds]
    if (data.test_fold or data.without_folds) and unknown:
        problems.append(
            f"{unknown[0]} and {len(unknown) - 1} other soundscapes may hold recordings of a fold held out: "
            "add sources.tsv, or hold out no fold"
        )
    return problems


def utterances(keywords: Sequence[tuple[str | None, Waveform]], rate: int, seed: int) -> list[Source]:
    """Join spoken keywords, cut to their loud part, three to six at a time with short pauses between them.

    Every utterance is of one speaker; his keywords are shuffled, since recordings come ordered by keyword.

    Args:
        keywords: speaker and waveform of each; None stands for one unknown speaker.
        rate: Hz.
        seed: of the order, the numbers and the pauses.
    """
    rng = np.random.default_rng((seed, len(keywords)))
    spoken: dict[str, list[Waveform]] = {}
    for speaker, waveform in keywords:
        spoken.setdefault(speaker or "", []).append(loud_part(waveform, rate))
    sources = []
    least, most = KEYWORDS_PER_UTTERANCE
    for speaker in sorted(spoken):
        rest = [spoken[speaker][i] for i in rng.permutation(len(spoken[speaker]))]
        while len(rest) >= least:
            count = int(rng.integers(least, most + 1))
            pieces = []
            for waveform in rest[:count]:
                rms = float(np.sqrt(np.mean(waveform**2))) + 1e-9
                pieces += [0.1 * waveform / rms, np.zeros(int(rng.uniform(0.02, 0.15) * rate), np.float32)]
            joined = np.concatenate(pieces[:-1]).astype(np.float32)
            sources.append(Source("speech", joined, ((0.0, len(joined) / rate),), f"speaker {speaker}".rstrip()))
            rest = rest[count:]
    return sources


def loud_part(waveform: Waveform, rate: int) -> Waveform:
    """Cut a waveform to the stretch from where it first sounds to where it last does; a silent one stays whole."""
    parts = active_parts(waveform, rate)
    return waveform[round(parts[0][0] * rate) : round(parts[-1][1] * rate)] if parts else waveform


def training_scene(recipe: Recipe, material: Material, index: int) -> tuple[Waveform, NDArray[np.float32]]:
    """Return scene ``index`` of a run: waveform (chunk_samples,) and framewise targets (num_tokens, num_classes).

    It depends on the recipe's seed and the index only.
    """
    rng = np.random.default_rng((recipe.train.seed, index, 1))
    rate = recipe.frontend.sample_rate
    chunk = round(recipe.model.chunk_seconds * rate)
    if material.soundscapes and rng.random() < recipe.train.soundscape_share:
        soundscape = material.soundscapes[rng.integers(len(material.soundscapes))]
        waveform, events = _heard(soundscape, chunk, rate)
        # Turning the recording around a random point is as natural a mixture, and a new one.
        turn = _turning_point(rng, events, chunk, rate)
        waveform = np.roll(waveform, turn) * np.float32(10 ** rng.uniform(-0.5, 0.3))
        events = turned(events, turn / rate, chunk / rate)
    else:
        waveform, events = material.mixer.scene(index)
    checkpoint = recipe.checkpoint({})
    targets = token_targets(events, recipe.data.labels, checkpoint.num_tokens, checkpoint.token_seconds)
    return waveform, targets


def _heard(soundscape: Soundscape, chunk: int, rate: int) -> tuple[Waveform, list[Event]]:
    """Return the first ``chunk`` samples of a soundscape, silence behind a shorter one, and the events in them.

    Only what the chunk holds: an event behind its end would be turned to a place where nothing sounds. Of an event of
    which the chunk holds a sliver, neither sound nor label stay.
    """
    waveform = np.pad(soundscape.waveform[:chunk], (0, max(0, chunk - len(soundscape.samples))))
    end = chunk / rate
    events = []
    for event in soundscape.events:
        if event.onset < end < event.offset and end - event.onset < SLIVER:
            waveform[round(event.onset * rate) :] = 0
        elif event.onset < end:
            events.append(replace(event, offset=min(event.offset, end)))
    return waveform, events


def _turning_point(rng: np.random.Generator, events: Sequence[Event], chunk: int, rate: int) -> int:
    """Return by how many samples to turn a recording: at random, but cutting no sliver off an event if it can be."""
    turn = 0
    for _ in range(20):
        turn = int(rng.integers(chunk))
        seam = (chunk - turn) / rate
        if not any(
            0 < seam - e.onset < min(SLIVER, e.duration) or 0 < e.offset - seam < min(SLIVER, e.duration)
            for e in events
        ):
            break
    return turn


def turned(events: list[Event], by: float, duration: float) -> list[Event]:
    """Return events of a recording of ``duration`` seconds turned forward by ``by`` seconds, cut at the end.

    Slivers that the cut leaves of longer events are no events.

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
        least = min(SLIVER, 0.5 * event.duration)
        out += [Event(event.event_label, a, b) for a, b in pieces if b - a >= least]
    return out
