"""What a run trains on, one example at a time.

Every example is a function of the recipe, the data and its position alone (see ``htsat.training.order``), so that
it does not matter which process makes it, when, or how often.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from htsat.data.clips import clip_name
from htsat.data.corpora import Clip, Corpus, open_corpus, read_esc, read_unlabelled, recognise
from htsat.data.mix import at_speed, coloured_noise, cut_background, token_targets
from htsat.data.reading import ClipReader
from htsat.data.shards import ShardClips, open_shards, targets
from htsat.data.split import split_clips, with_groups
from htsat.errors import AudioError, DataError, UsageError
from htsat.events import Event
from htsat.training.material import Material, load_material, training_scene, turned
from htsat.training.order import CLIP, PARTNER, balanced_order, epoch_order
from htsat.training.recipe import Recipe

Waveform = NDArray[np.float32]
Progress = Callable[[str, float], None]
#: clips that are tried in place of an unreadable one
ATTEMPTS = 20


@dataclass(frozen=True, eq=False)
class Example:
    """One training example.

    Attributes:
        waveform: (num_samples,) float32, the same length for all examples of a run.
        clip_target: (num_classes,) float32 in [0, 1].
        frame_target: (num_tokens, num_classes) float32 in [0, 1]; None if the times are unknown.
        position: its place in the run.
        name: the file it is from, for messages.
        teacher: (num_classes,) saved logits of a teacher; None if there are none.
        unreadable: what could not be read on the way to it: (name, reason).
    """

    waveform: Waveform
    clip_target: NDArray[np.float32]
    frame_target: NDArray[np.float32] | None
    position: int
    name: str
    teacher: NDArray[np.float32] | None = None
    unreadable: tuple[tuple[str, str], ...] = ()


class Examples(Protocol):
    """Training examples by position."""

    epoch_size: int
    """Examples per epoch."""

    def example(self, position: int) -> Example:
        """Return the example at a position, from 0 on without end."""


class SceneExamples:
    """Scenes mixed on the fly, and recorded soundscapes, with exact times."""

    def __init__(self, recipe: Recipe, material: Material) -> None:
        self._recipe, self._material = recipe, material
        self.epoch_size = 1000  # scenes never repeat; this only gives epochs a meaning

    def example(self, position: int) -> Example:
        """Return a scene."""
        waveform, frames = training_scene(self._recipe, self._material, position)
        return Example(waveform, frames.max(0), frames, position, f"scene {position}")


class ClipExamples:
    """Labelled clips, cut or filled to one length, augmented.

    Args:
        recipe: with labels.
        clips: to train on.
        reader: at the recipe's rate.
        backgrounds: waveforms to lay behind clips.
        teacher: saved logits (num_classes,) by name of the clip.
    """

    def __init__(
        self,
        recipe: Recipe,
        clips: Sequence[Clip],
        reader: ClipReader,
        backgrounds: Sequence[Waveform] = (),
        teacher: dict[str, NDArray[np.float32]] | None = None,
    ) -> None:
        self._recipe, self._clips, self._reader = recipe, clips, reader
        self._backgrounds, self._teacher = list(backgrounds), teacher
        self._rate = recipe.frontend.sample_rate
        self._length = round(recipe.data.clip_seconds * self._rate)
        config = recipe.checkpoint({})
        size = config.native_size(self._length) if recipe.train.fit == "native" else 1
        self._num_tokens = config.num_tokens // size
        self._token_seconds = config.token_seconds
        self._column = {label: i for i, label in enumerate(recipe.data.labels)}
        self.epoch_size = len(clips)
        corpus = Corpus("", Path(), recipe.data.labels, "multi_label", clips)
        found = targets(corpus)
        owner = np.repeat(np.arange(len(clips)), np.diff(found.offsets))
        by_class = np.argsort(found.indices, kind="stable")
        self._by_class = owner[by_class]
        self._class_offsets = np.searchsorted(found.indices[by_class], np.arange(len(recipe.data.labels) + 1))
        self._order = lru_cache(maxsize=2)(self._make_order)

    def __getstate__(self) -> dict[str, object]:
        """Return what a worker process needs."""
        return {key: value for key, value in self.__dict__.items() if key != "_order"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Begin in a worker process."""
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(self._make_order)

    def _make_order(self, epoch: int) -> NDArray[np.int64]:
        seed = self._recipe.train.seed
        if self._recipe.train.balanced:
            return balanced_order(seed, epoch, self._class_offsets, self._by_class, self.epoch_size)
        return epoch_order(seed, epoch, self.epoch_size)

    def example(self, position: int) -> Example:
        """Return an augmented clip, or a mixture of two."""
        augment, seed = self._recipe.augment, self._recipe.train.seed
        epoch, place = divmod(position, self.epoch_size)
        rng = np.random.default_rng((seed, CLIP, position))
        unreadable: list[tuple[str, str]] = []
        clip, waveform, events = self._varied(int(self._order(epoch)[place]), rng, unreadable)
        target = self._target(clip)
        frames = self._frames(events)
        name = clip_name(clip)
        teacher = None if self._teacher is None else self._teacher.get(clip.path.name)
        if augment.mixup == "waveforms" and rng.random() < augment.mixup_share:
            other = np.random.default_rng((seed, PARTNER, position))
            clip, second, events = self._varied(self._partner(other), other, unreadable)
            share = float(other.uniform(0.05, 0.95))
            waveform = mix_by_loudness(waveform, second, share, self._rate)
            mixed, second_frames = self._target(clip), self._frames(events)
            if self._recipe.train.loss == "ce":
                target = (share * target + (1 - share) * mixed).astype(np.float32)
            else:
                target = np.maximum(target, mixed)
            frames = None if frames is None or second_frames is None else np.maximum(frames, second_frames)
            name += f" + {clip_name(clip)}"
        if self._backgrounds and rng.random() < augment.background_share:
            waveform = self._with_noise(waveform, cut_background(rng, self._backgrounds, len(waveform)), rng)
        if rng.random() < augment.noise_share:
            noise = coloured_noise(rng, len(waveform), exponent=float(rng.uniform(0, 2)))
            waveform = self._with_noise(waveform, noise, rng)
        if augment.gain_db:
            waveform = waveform * np.float32(10 ** (rng.uniform(-augment.gain_db, augment.gain_db) / 20))
        return Example(waveform, target, frames, position, name, teacher, tuple(unreadable))

    def _partner(self, rng: np.random.Generator) -> int:
        if not self._recipe.train.balanced:
            return int(rng.integers(len(self._clips)))
        classes = np.flatnonzero(np.diff(self._class_offsets))
        label = classes[rng.integers(len(classes))]
        return int(self._by_class[rng.integers(self._class_offsets[label], self._class_offsets[label + 1])])

    def _varied(
        self, index: int, rng: np.random.Generator, unreadable: list[tuple[str, str]]
    ) -> tuple[Clip, Waveform, tuple[Event, ...] | None]:
        """Read a clip, or another one if it cannot be read, and bring it to the length of the run."""
        for _ in range(ATTEMPTS):
            clip = self._clips[index]
            try:
                waveform = self._reader.read(clip)
                break
            except AudioError as error:
                unreadable.append((clip_name(clip), str(error)))
                index = int(rng.integers(len(self._clips)))
        else:
            raise DataError(
                f"{ATTEMPTS} clips in a row cannot be read, the last one: {unreadable[-1][1]}; check the disk, and the "
                "data with `htsat data`"
            )
        augment, rate, length = self._recipe.augment, self._rate, self._length
        events = clip.events
        if augment.speed and len(waveform) >= 16:
            speed = float(np.exp(rng.uniform(-1, 1) * np.log1p(augment.speed)))
            waveform = at_speed(waveform, speed)
            events = moved(events, 0.0, 1 / speed, math.inf)
        start = int(rng.integers(len(waveform) - length + 1)) if len(waveform) > length else 0
        waveform = waveform[start : start + length]
        waveform = np.pad(waveform, (0, length - len(waveform)))
        events = moved(events, -start / rate, 1.0, length / rate)
        if augment.shift_seconds:
            shift = round(float(rng.uniform(-augment.shift_seconds, augment.shift_seconds)) * rate)
            kept = waveform[max(0, -shift) : length - max(0, shift)]
            waveform = np.pad(kept, (min(length, max(0, shift)), min(length, max(0, -shift))))
            events = moved(events, shift / rate, 1.0, length / rate)
        if augment.roll:
            turn = int(rng.integers(length))
            waveform = np.roll(waveform, turn)
            if events is not None:
                events = tuple(turned(list(events), turn / rate, length / rate))
        return clip, waveform, events

    def _target(self, clip: Clip) -> NDArray[np.float32]:
        target = np.zeros(len(self._column), np.float32)
        for label in clip.labels:
            target[self._column[label]] = 1
        return target

    def _frames(self, events: tuple[Event, ...] | None) -> NDArray[np.float32] | None:
        if events is None or self._recipe.train.fit in ("tile", "stretch"):
            return None
        return token_targets(events, self._recipe.data.labels, self._num_tokens, self._token_seconds)

    def _with_noise(self, waveform: Waveform, noise: Waveform, rng: np.random.Generator) -> Waveform:
        """Add noise of the same length at a random level below the waveform's."""
        augment = self._recipe.augment
        snr = rng.uniform(augment.min_snr_db, augment.max_snr_db)
        gain = np.sqrt(np.mean(waveform**2) / (np.mean(noise**2) + 1e-12)) * 10 ** (-snr / 20)
        return (waveform + np.float32(gain) * noise).astype(np.float32)


def moved(events: tuple[Event, ...] | None, by: float, scale: float, duration: float) -> tuple[Event, ...] | None:
    """Return events scaled in time, then moved by ``by`` seconds, cut to 0 and ``duration``; None stays None."""
    if events is None:
        return None
    found = []
    for event in events:
        onset, offset = max(0.0, event.onset * scale + by), min(duration, event.offset * scale + by)
        if offset - onset > 1e-3:
            found.append(dataclasses.replace(event, onset=onset, offset=offset))
    return tuple(found)


def loudness_db(waveform: Waveform, rate: int) -> float:
    """Return the power of the loudest tenth of a waveform, in 100-ms frames, dB."""
    step = max(1, rate // 10)
    if len(waveform) < step:
        return float(10 * np.log10(np.mean(waveform**2) + 1e-10))
    frames = waveform[: len(waveform) // step * step].reshape(-1, step)
    return float(10 * np.log10(np.quantile(np.mean(frames**2, axis=1), 0.9) + 1e-10))


def mix_by_loudness(first: Waveform, second: Waveform, share: float, rate: int) -> Waveform:
    """Mix two waveforms of one length so that they are heard in the proportion ``share`` to 1 - ``share``.

    Source: Tokozume et al., Learning from Between-class Examples (arXiv 1711.10282), equation 2; the loudness is that
    of the loudest tenth, which silence around a short sound does not change.
    """
    difference = loudness_db(first, rate) - loudness_db(second, rate)
    part = 1 / (1 + 10 ** (difference / 20) * (1 - share) / share)
    mixed = (part * first + (1 - part) * second) / math.sqrt(part**2 + (1 - part) ** 2)
    return mixed.astype(np.float32)


# ------------------------------------------------------------------ data of a run


@dataclass(frozen=True, eq=False)
class RunData:
    """The data of a run.

    Attributes:
        recipe: with labels.
        train: examples.
        train_clips: the clips they are made of; empty for scenes.
        select: clips to choose the best weights on; never reported.
        test: clips that are scored once, at the end; never chosen on.
        reader: of the clips.
        folder: where the clips lie.
        corpus: which corpus they are.
        material: of scenes; None for clips.
        notes: what a person should know.
    """

    recipe: Recipe
    train: Examples
    train_clips: Sequence[Clip]
    select: Sequence[Clip]
    test: Sequence[Clip]
    reader: ClipReader | None
    material: Material | None
    folder: Path
    corpus: str
    notes: tuple[str, ...] = ()

    def training_corpus(self) -> Corpus | None:
        """Return the clips that are trained on as a corpus; None for scenes and packed clips."""
        if not len(self.train_clips) or isinstance(self.train_clips, ShardClips):
            return None
        return Corpus(self.corpus, self.folder, self.recipe.data.labels, self.recipe.objective, tuple(self.train_clips))

    def parts(self) -> dict[str, list[str]]:
        """Return the names of the clips of each part, below the data's folder; of packed ones there is no list."""
        found = {}
        for part, clips in (("train", self.train_clips), ("selection", self.select), ("test", self.test)):
            if not isinstance(clips, ShardClips):
                found[part] = [clip_name(clip, self.folder) for clip in clips]
        return found


class CutReader:
    """Reads clips and cuts them to ``seconds``; 0: leaves them whole."""

    def __init__(self, reader: ClipReader, seconds: float) -> None:
        self._reader, self._length = reader, round(seconds * reader.sample_rate) or None

    def read(self, clip: Clip) -> Waveform:
        """Return the beginning of the clip."""
        return self._reader.read(clip)[: self._length]


def with_length(recipe: Recipe, clips: Sequence[Clip], reader: ClipReader) -> Recipe:
    """Return the recipe with the length of its examples, and with hearing short clips later as they are trained."""
    config, seconds = recipe.checkpoint({}), recipe.data.clip_seconds
    if not seconds:
        durations = []
        for i in np.linspace(0, len(clips) - 1, min(len(clips), 200)).astype(int):
            try:
                durations.append(reader.duration(clips[int(i)]))
            except AudioError:
                continue  # met again, counted and listed in training
        # A few samples more than the round number are no reason to double the length.
        most = float(np.quantile(durations, 0.9)) * 0.98 if durations else recipe.model.chunk_seconds
        size = config.native_size(min(config.chunk_samples, round(most * recipe.frontend.sample_rate)))
        seconds = recipe.model.chunk_seconds / size
        recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, clip_seconds=seconds))
    if recipe.train.fit == "tile":  # heard later as it was trained
        return dataclasses.replace(recipe, inference=dataclasses.replace(recipe.inference, short="tile"))
    if recipe.train.fit != "native":
        return recipe
    part = config.native_size(round(seconds * recipe.frontend.sample_rate))
    hop = min(recipe.inference.hop_seconds, recipe.model.chunk_seconds / part / 2)
    inference = dataclasses.replace(recipe.inference, short="native", chunk_part=part, hop_seconds=max(0.1, hop))
    return dataclasses.replace(recipe, inference=inference)


def open_run_data(recipe: Recipe, root: Path, progress: Progress) -> RunData:
    """Read what the recipe names below ``root``.

    Raises:
        DataError: with every problem of the data.
        AudioError: a recording of scenes cannot be decoded.
    """
    if recipe.data.corpus == "scenes":
        material = load_material(recipe, root, progress)
        return RunData(recipe, SceneExamples(recipe, material), (), (), (), None, material, root, "scenes")
    corpus = _open(recipe, root / recipe.data.folder)
    recipe = recipe.with_labels(corpus.labels)
    if recipe.train.loss == "auto":
        loss: Literal["bce", "ce"] = "ce" if corpus.objective == "single_label" else "bce"
        recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, loss=loss))
    if recipe.train.loss == "ce" and corpus.objective != "single_label":
        raise DataError(
            f"{corpus.folder}: has clips with several labels or none, which train.loss 'ce' cannot learn; "
            "set train.loss = 'bce'"
        )
    train, select, test, notes = _parts(recipe, corpus)
    reader = ClipReader(recipe.frontend.sample_rate, cache_bytes=round(recipe.data.cache_gb * 2**30))
    recipe = with_length(recipe, train, reader)
    backgrounds: list[Waveform] = []
    if recipe.data.backgrounds and recipe.augment.background_share:
        backgrounds = [reader.read(clip) for clip in read_unlabelled(root / recipe.data.backgrounds)]
    teacher = None
    if recipe.distill.logits:
        teacher = saved_logits(root / recipe.distill.logits, recipe.data.labels)
    seconds = min(len(train) * recipe.data.clip_seconds, 1e9)
    if seconds * recipe.frontend.sample_rate * 4 < reader.cache_bytes:
        # All of it fits: read before the workers start, who then share it.
        for done, clip in enumerate(train):
            progress(f"reading {clip.path.name}", done / len(train))
            try:
                reader.read(clip)
            except AudioError:
                continue  # met again, counted and listed in training
    examples = ClipExamples(recipe, train, reader, backgrounds, teacher)
    return RunData(recipe, examples, train, select, test, reader, None, corpus.folder, corpus.name, tuple(notes))


def _open(recipe: Recipe, folder: Path) -> Corpus:
    kind = recipe.data.corpus
    if kind == "auto":
        found = recognise(folder)
        if found is None:
            raise DataError(f"{folder}: no known layout of labelled recordings; see `htsat data --help`")
        kind = found  # type: ignore[assignment]
    labels = recipe.data.labels or None
    corpus = open_shards(folder) if kind == "shards" else open_corpus(kind, folder, labels=labels)
    if kind == "shards" and labels is not None:
        if unknown := sorted(set(corpus.labels) - set(labels)):
            raise DataError(f"{folder}: holds classes that data.labels lacks: {', '.join(unknown[:5])}")
        corpus = dataclasses.replace(corpus, labels=labels)
    return corpus


def _parts(recipe: Recipe, corpus: Corpus) -> tuple[Sequence[Clip], Sequence[Clip], Sequence[Clip], list[str]]:
    """Return the clips to train on, to select on and to score, and what a person should know."""
    data, notes = recipe.data, list(corpus.warnings)
    if isinstance(corpus.clips, ShardClips):
        if data.without_folds:
            raise DataError(f"{corpus.folder}: packed clips know no folds; leave data.without_folds empty")
        parts = {split: _in_split(corpus.clips, split) for split in ("train", "validation", "test")}
        train, select, test = (parts[s] for s in ("train", "validation", "test"))
        if not len(train):
            train = corpus.clips
        return train, select, test, notes
    clips = list(corpus.clips)
    folds = sorted({fold for clip in clips for fold in clip.folds})
    for fold in {data.test_fold, *data.without_folds} - {0, *folds}:
        known = ", ".join(map(str, folds)) or "none"
        raise DataError(f"{corpus.folder}: no clips of the held-out fold {fold}; there are folds {known}")
    clips = [clip for clip in clips if not clip.folds & set(data.without_folds)]
    test = [clip for clip in clips if clip.split == "test"]
    select = [clip for clip in clips if clip.split == "validation"]
    train = [clip for clip in clips if clip.split not in ("test", "validation")]
    if data.test_fold:
        test = [clip for clip in train if data.test_fold in clip.folds]
        train = [clip for clip in train if data.test_fold not in clip.folds]
    shares = {"test": 0.0 if test else data.test, "select": 0.0 if select else data.select}
    shares = {name: share for name, share in shares.items() if share}
    if shares:
        if not any(clip.group for clip in train):
            train = with_groups(train, [clip.path.stem for clip in train])
        found = split_clips(train, {"train": 1 - sum(shares.values())} | shares, recipe.train.seed)
        train, test, select = found["train"], found.get("test", test), found.get("select", select)
    missing = set(corpus.labels) - {label for clip in train for label in clip.labels}
    if missing:
        names = [label for label in corpus.labels if label in missing]
        if recipe.train.loss == "ce":
            raise DataError(f"{corpus.folder}: no clips to train on of {', '.join(names[:10])}")
        notes.append(f"no clips to train on of {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}")
    if not train:
        raise DataError(f"{corpus.folder}: no clips to train on")
    if select and not test and not recipe.train.select_steps:
        test, select = select, []  # nothing is chosen on them, so they may be reported
        notes.append(f"the {len(test)} clips of the validation split are scored: nothing is selected on them")
    return train, select, test, notes


def _in_split(clips: ShardClips, split: str) -> Sequence[Clip]:
    try:
        return clips.in_split(split)
    except DataError:
        return ()


def saved_logits(path: Path, labels: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Read a teacher's clip logits: ``.npz`` with ``names`` (N,), ``labels`` (C,) and ``logits`` (N, C).

    Returns:
        Logits in the order of ``labels`` by file name.

    Raises:
        DataError: unreadable, not of that form, or lacking a class.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            names, own, logits = (file[key] for key in ("names", "labels", "logits"))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read as saved logits ({error}); expected .npz with names, labels and logits"
        ) from None
    own_labels = [str(label) for label in own]
    if logits.shape != (len(names), len(own_labels)) or not np.isfinite(logits).all():
        raise DataError(
            f"{path}: expected finite logits of shape ({len(names)}, {len(own_labels)}), got {logits.shape}"
        )
    if lacking := [label for label in labels if label not in own_labels]:
        raise DataError(f"{path}: the teacher lacks the classes {', '.join(lacking[:5])}")
    order = [own_labels.index(label) for label in labels]
    return {str(name): logits[i, order].astype(np.float32) for i, name in enumerate(names)}


def folds_in(recipe: Recipe, root: Path) -> list[int]:
    """Return the folds of the recipe's data, in order.

    Raises:
        DataError: with every problem of the data.
    """
    if recipe.data.corpus == "scenes":
        clips: Sequence[Clip] = read_esc(root / recipe.data.esc)
    else:
        clips = _open(recipe, root / recipe.data.folder).clips
    return sorted({fold for clip in clips for fold in clip.folds})


def seconds_of(recipe: Recipe) -> float:
    """Return the length of a run's examples in seconds."""
    return recipe.model.chunk_seconds if recipe.data.corpus == "scenes" else recipe.data.clip_seconds


def data_digest(data: RunData) -> str:
    """Return a digest of which clips, with which labels, a run trains, selects and is scored on."""
    parts = {"labels": data.recipe.data.labels}
    found = hashlib.sha256(json.dumps(parts).encode())
    for clips in (data.train_clips, data.select, data.test):
        if isinstance(clips, ShardClips):
            found.update(json.dumps([len(clips), clips.packing.manifest], sort_keys=True, default=str).encode())
            continue
        found.update(f"{len(clips)}\n".encode())
        for clip in clips:
            found.update(f"{clip.path.name}\t{clip.index}\t{','.join(clip.labels)}\n".encode(errors="replace"))
    return found.hexdigest()


def check_quota(recipe: Recipe, unreadable: int, num_clips: int) -> None:
    """Refuse to go on when too many clips cannot be read.

    Raises:
        UsageError: more than the recipe allows.
    """
    allowed = math.floor(recipe.data.unreadable * num_clips)
    if unreadable > allowed:
        raise UsageError(
            f"{unreadable} of {num_clips} clips cannot be read, more than the {allowed} that data.unreadable "
            f"{recipe.data.unreadable:g} allows; they are listed in unreadable.tsv: mend or remove them, or raise it"
        )
