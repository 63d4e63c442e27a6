"""From a corpus and what models said of its clips to one ``Evaluation``: figures, identities, mistakes."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from htsat.config import CheckpointConfig
from htsat.data.clips import Clip, Corpus, clip_name
from htsat.errors import CheckpointError, DataError, UsageError, nearest
from htsat.evaluation.listen import Heard, Listening, listening_config
from htsat.evaluation.scores import (
    DetectionReport,
    TaggingScores,
    match_labels,
    reference_matrix,
    score_detection,
    score_tagging,
)
from htsat.labels import heard_labels


@dataclass(frozen=True)
class ModelIdentity:
    """Which model was evaluated.

    Attributes:
        name: as it was given.
        file: the checkpoint.
        sha256: of the file.
        labels: its classes, or those that they are counted as.
        objective: what it was trained for.
    """

    name: str
    file: str
    sha256: str
    labels: tuple[str, ...]
    objective: str


@dataclass(frozen=True, eq=False)
class Mistake:
    """A clip, or one label of it, that the models got wrong.

    Attributes:
        clip: the recording.
        truth: the label that it has, or that was wrongly given to it.
        given: the most probable label (single label); None for several labels.
        probability: of the wrong answer: of ``given``, or that ``truth`` is there where it is not.
        true_probability: posterior of the true label, for a single label and for labels that were missed.
        missed: for several labels: whether the label was missed, not wrongly given.
    """

    clip: Clip
    truth: str
    given: str | None
    probability: float
    true_probability: float
    missed: bool = False


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How good models are on a corpus.

    Attributes:
        models: one, or the members of an ensemble.
        corpus: the clips that were to be scored.
        part: which part of the data they are, in words (``fold 4``); empty for all of it.
        listening: how the models listened.
        clips: those that could be scored, in order.
        reference: (num_clips, num_classes) bool, classes of the corpus.
        posteriors: (num_clips, num_classes) float32.
        tagging: clip-level scores.
        detection: scores of events; None if there are none to score.
        failures: (clip, reason) of those that could not be scored.
        bootstrap: number of resamples behind the intervals.
        seed: of the resamples.
    """

    models: tuple[ModelIdentity, ...]
    corpus: Corpus
    part: str
    listening: Listening
    clips: tuple[Clip, ...]
    reference: NDArray[np.bool_]
    posteriors: NDArray[np.float32]
    tagging: TaggingScores
    detection: DetectionReport | None
    failures: tuple[tuple[Clip, str], ...]
    bootstrap: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        listening = dataclasses.asdict(self.listening)
        return {
            "models": [
                {
                    "name": model.name,
                    "file": model.file,
                    "sha256": model.sha256,
                    "classes": len(model.labels),
                    "objective": model.objective,
                }
                for model in self.models
            ],
            "data": {
                "corpus": self.corpus.name,
                "folder": str(self.corpus.folder),
                "part": self.part or None,
                "clips": len(self.corpus.clips),
                "labels": list(self.corpus.labels),
                "fingerprint": fingerprint(self.corpus),
            },
            "listening": {key: listening[key] for key in ("fit", "shifts", "ensemble")},
            "classes": listening["classes"],
            "events": {key: listening[key] for key in ("decoding", "time_shifts", "operating_point")},
            "bootstrap": {"resamples": self.bootstrap, "seed": self.seed},
            "tagging": self.tagging.to_dict(),
            "detection": None if self.detection is None else self.detection.to_dict(),
            "unreadable": [{"file": clip_name(clip), "error": reason} for clip, reason in self.failures],
        }

    def mistakes(self, count: int) -> list[Mistake]:
        """Return the worst mistakes, the worst first.

        For a single label: by how much more probable the wrong label was than the true one. For several: by how far
        the posterior of a label is on the wrong side of the threshold; a label that is nearly certain and absent
        may be a mistake of the reference.
        """
        labels, scores = self.corpus.labels, self.posteriors
        if self.tagging.objective == "single_label":
            rows = np.arange(len(scores))
            own, chosen = self.reference.argmax(axis=1), scores.argmax(axis=1)
            margin = scores[rows, chosen] - scores[rows, own]
            wrong = np.flatnonzero(own != chosen)
            worst = wrong[np.argsort(-margin[wrong], kind="stable")][:count]
            return [
                Mistake(
                    self.clips[i], labels[own[i]], labels[chosen[i]], float(scores[i, chosen[i]]),
                    float(scores[i, own[i]]),
                )
                for i in worst
            ]  # fmt: skip
        threshold = self.tagging.threshold or 0.0
        beyond = np.where(self.reference, threshold - scores, scores - threshold)
        beyond = np.where(self.reference == (scores >= threshold), -np.inf, beyond)
        order = np.argsort(-beyond, axis=None, kind="stable")[:count]
        found = []
        for row, column in zip(*np.unravel_index(order, beyond.shape), strict=True):
            if np.isfinite(beyond[row, column]):
                value, missed = float(scores[row, column]), bool(self.reference[row, column])
                found.append(Mistake(self.clips[row], labels[column], None, value, value, missed))
        return found


def identify(name: str, path: Path, config: CheckpointConfig, listening: Listening | None = None) -> ModelIdentity:
    """Return the identity of a checkpoint.

    Args:
        name: as it was given.
        path: of the file.
        config: its settings.
        listening: how it is heard, which may count its classes as others.

    Raises:
        CheckpointError: the file cannot be read.
        UsageError: the model lacks classes that are to be counted.
    """
    labels = heard_labels(listening_config(config, listening or Listening()))
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}; check the file") from None
    return ModelIdentity(name, str(path), digest, labels, config.objective)


def fingerprint(corpus: Corpus) -> str:
    """Return a digest of what was scored: names below the folder, labels and events of the clips, in order."""
    digest = hashlib.sha256()
    for clip in corpus.clips:
        path = clip.path.relative_to(corpus.folder) if clip.path.is_relative_to(corpus.folder) else clip.path
        events = [(e.event_label, e.onset, e.offset) for e in clip.events] if clip.events is not None else None
        digest.update(repr((path.as_posix(), clip.index, clip.labels, events)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def select(corpus: Corpus, split: str | None = None, folds: Sequence[int] = ()) -> Corpus:
    """Return the corpus with the clips of a split, or of folds; a mixture belongs to folds that hold all its parts.

    Raises:
        UsageError: the corpus has no such split or fold.
    """
    clips = corpus.clips
    if split is not None:
        known = sorted({clip.split for clip in clips if clip.split is not None})
        clips = tuple(clip for clip in clips if clip.split == split)
        if not clips:
            have = f"it has {', '.join(known)}{nearest(split, known)}" if known else "it has none"
            raise UsageError(f"{corpus.folder}: no clip of the split {split!r}; {have}")
    if folds:
        there = sorted({fold for clip in clips for fold in clip.folds})
        if absent := [str(fold) for fold in folds if fold not in there]:
            have = f"it has folds {', '.join(map(str, there))}" if there else "it has none"
            raise UsageError(f"{corpus.folder}: no clip of fold {', '.join(absent)}; {have}")
        clips = tuple(clip for clip in clips if clip.folds and clip.folds <= set(folds))
        if not clips:
            raise UsageError(f"{corpus.folder}: no clip is of fold {', '.join(map(str, folds))} alone; give more folds")
    return corpus if clips is corpus.clips else dataclasses.replace(corpus, clips=clips)


def has_events(corpus: Corpus) -> bool:
    """Return whether events are to be scored: clips with any number of labels that are told with their times.

    Where each clip has exactly one label, times say which part of it was cut out, not when what sounds.
    """
    return corpus.objective == "multi_label" and any(clip.events is not None for clip in corpus.clips)


def summarise(
    corpus: Corpus,
    heard: Sequence[Heard],
    models: Sequence[ModelIdentity],
    listening: Listening,
    *,
    part: str = "",
    threshold: float = 0.5,
    bootstrap: int = 0,
    seed: int = 0,
    all_thresholds: bool = True,
) -> Evaluation:
    """Score what models said of the clips of a corpus.

    Args:
        corpus: with the clips that were heard.
        heard: what ``posteriors`` gave for them, in their order.
        models: the first one's labels are those of the posteriors.
        listening: how they were heard.
        part: which part of the data it is, in words.
        threshold: posterior from which a label is given, for several labels per clip.
        bootstrap: resamples for the intervals; 0: none.
        seed: of the resamples.
        all_thresholds: also score the framewise posteriors, where all clips whose events are known have them.

    Raises:
        DataError: labels that the model lacks, or no clip could be heard.
    """
    columns = match_labels(models[0].labels, corpus.labels, str(corpus.folder))
    pairs = list(zip(corpus.clips, heard, strict=True))
    good = [(clip, one) for clip, one in pairs if one.failure is None]
    if not good:
        first = next((one.failure for _, one in pairs), "it holds none")
        raise DataError(f"{corpus.folder}: none of its {len(pairs)} clips can be scored; the first: {first}")
    clips = tuple(clip for clip, _ in good)
    reference = reference_matrix(clips, corpus.labels)
    scores = np.stack([one.posteriors for _, one in good])[:, columns]
    tagging = score_tagging(
        corpus.labels, corpus.objective, reference, scores, threshold=threshold, bootstrap=bootstrap, seed=seed
    )
    detection = None
    timed = [(clip, one) for clip, one in good if clip.events is not None and one.events is not None]
    if timed and has_events(corpus):
        names = [clip_name(clip) for clip, _ in timed]
        framewise = {
            name: (one.framewise[:, columns], one.boundaries)
            for name, (_, one) in zip(names, timed, strict=True)
            if all_thresholds and one.framewise is not None and one.boundaries is not None
        }
        detection = score_detection(
            {name: clip.events or () for name, (clip, _) in zip(names, timed, strict=True)},
            {name: one.events or () for name, (_, one) in zip(names, timed, strict=True)},
            corpus.labels,
            durations={name: one.duration for name, (_, one) in zip(names, timed, strict=True)},
            scores=framewise if len(framewise) == len(timed) else None,
            bootstrap=bootstrap,
            seed=seed,
        )
    failures = tuple((clip, one.failure) for clip, one in pairs if one.failure is not None)
    return Evaluation(
        tuple(models), corpus, part, listening, clips, reference, scores, tagging, detection, failures, bootstrap, seed
    )
