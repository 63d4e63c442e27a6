"""Scores of a run: on its selection split, and once on what was held out. Only the loop chooses by the former."""

from collections.abc import Iterator, Sequence
from typing import Any

from htsat.data.corpora import Clip, Corpus
from htsat.data.mix import Source
from htsat.errors import DataError
from htsat.evaluation.evaluate import Evaluation, ModelIdentity, summarise
from htsat.evaluation.listen import Heard, Listening, join_shards, posteriors, shard, waveform_posteriors
from htsat.evaluation.scores import PSDS, TaggingScores, finite
from htsat.metrics.bootstrap import f1_intervals
from htsat.metrics.detection import count_event_based, count_intersection_based
from htsat.metrics.detection import summarise as summarise_counts
from htsat.metrics.psds import psds_from_scores
from htsat.model.base import Fit, SoundModel
from htsat.training.distributed import Ranks
from htsat.training.examples import CutReader, RunData
from htsat.training.material import Material, Progress, Soundscape, Waveform
from htsat.training.recipe import Recipe

#: behind the 95 % intervals of the last scores
RESAMPLES = 1000


def listen(
    model: SoundModel, recipe: Recipe, data: RunData, clips: Sequence[Clip], ranks: Ranks, what: str, progress: Progress
) -> list[Heard]:
    """Return what a model says of clips, as ``tag`` and ``detect`` would hear them; each is heard by one process."""
    assert data.reader is not None
    cut = CutReader(data.reader, recipe.data.score_seconds)
    model.labels, model.checkpoint = recipe.data.labels, recipe.checkpoint({})
    own = [clips[i] for i in shard(len(clips), ranks.rank, ranks.world)]
    heard: list[Heard] = []
    for result in posteriors([model], own, lambda rate: cut, listening(recipe)):
        heard.append(result)
        progress(what, len(heard) / len(own))
    return join_shards(ranks.gather(heard))


def listening(recipe: Recipe) -> Listening:
    """Return how the clips of a run are heard when it is scored."""
    stretched = recipe.train.fit == "stretch"
    return Listening(fit="stretch" if stretched else None, events=not stretched and recipe.objective == "multi_label")


def evaluate_clips(
    recipe: Recipe, data: RunData, clips: Sequence[Clip], heard: Sequence[Heard], identity: ModelIdentity, part: str
) -> Evaluation:
    """Score what a model said of clips.

    Raises:
        DataError: not one of the clips could be read.
    """
    corpus = Corpus(data.corpus, data.folder, recipe.data.labels, recipe.objective, tuple(clips))
    # Only the last scores are for people: those that models are chosen by come often, and must not take long.
    test = part == "test"
    return summarise(
        corpus,
        heard,
        [identity],
        listening(recipe),
        part=part,
        bootstrap=RESAMPLES if test else 0,
        all_thresholds=test,
    )


def headline(scores: TaggingScores) -> tuple[str, float]:
    """Return name and value of the score that runs are selected by: accuracy, or mAP for clips of several labels."""
    name = "accuracy" if scores.objective == "single_label" else "mean_average_precision"
    return name, scores.figures[name]


def score_held_out(model: SoundModel, recipe: Recipe, material: Material, progress: Progress) -> dict[str, Any]:
    """Return accuracy on the held-out clips and detection scores on the held-out soundscapes, as fractions.

    Accuracy is over the classes that the clips have; both ways to fill a chunk with a short clip are told. Detection is
    scored over the classes that have events: F1 of the events, with 95 % intervals over the soundscapes, and PSDS of
    the posteriors, before filters and thresholds.
    """
    report: dict[str, Any] = {}
    if material.test_clips:
        classes = sorted({clip.label for clip in material.test_clips})
        report["test_fold"] = recipe.data.test_fold
        report["clips"] = len(material.test_clips)
        for fit in ("pad", "tile"):
            progress(f"scoring clips ({fit})", 0.0)
            report[f"accuracy_{fit}"] = clip_accuracy(model, recipe, material.test_clips, classes, fit)
    if material.test_soundscapes:
        progress("scoring soundscapes", 0.5)
        heard = hear_soundscapes(model, recipe, material.test_soundscapes)
        estimated = {name: list(one.events or ()) for name, one in heard.items()}
        reference = {s.name: list(s.events) for s in material.test_soundscapes}
        present = {event.event_label for events in reference.values() for event in events}
        scored = [label for label in recipe.data.labels if label in present]
        report["soundscapes"] = len(reference)
        report["intervals"] = {}
        for name, count in (("intersection", count_intersection_based), ("event_based", count_event_based)):
            counts = count(reference, estimated, labels=scored)
            report[f"{name}_macro_f1"] = summarise_counts(counts).macro_f1
            intervals = f1_intervals(counts, RESAMPLES, recipe.train.seed)
            report["intervals"][f"{name}_macro_f1"] = [finite(bound) for bound in intervals["macro_f1"]]
        durations = {name: one.duration for name, one in heard.items()}
        scores = {
            name: (one.framewise, one.boundaries)
            for name, one in heard.items()
            if one.framewise is not None and one.boundaries is not None
        }
        # Classes without events are in no PSDS, as they are in no macro F1.
        for name, settings in PSDS.items():
            report[name] = psds_from_scores(reference, scores, recipe.data.labels, durations, settings).value
    return report


def clip_accuracy(
    model: SoundModel,
    recipe: Recipe,
    clips: Sequence[Source],
    classes: Sequence[str],
    fit: Fit,
) -> float:
    """Return the share of clips whose most probable class, among ``classes``, is theirs."""
    columns = [recipe.data.labels.index(label) for label in classes]
    waveforms = [clip.waveform[: recipe.checkpoint({}).chunk_samples] for clip in clips]
    heard = _hear(model, recipe, waveforms, Listening(fit=fit))
    right = [classes[int(h.posteriors[columns].argmax())] == c.label for h, c in zip(heard, clips, strict=True)]
    return sum(right) / len(clips)


def hear_soundscapes(model: SoundModel, recipe: Recipe, soundscapes: Sequence[Soundscape]) -> dict[str, Heard]:
    """Return what a model says of recordings, by name; events as ``detect`` would tell them with its settings."""
    heard = _hear(model, recipe, [s.waveform for s in soundscapes], Listening(events=True))
    return {s.name: h for s, h in zip(soundscapes, heard, strict=True)}


def _hear(model: SoundModel, recipe: Recipe, waveforms: Sequence[Waveform], listening: Listening) -> Iterator[Heard]:
    """Yield what a model says of waveforms.

    Raises:
        DataError: the answer is not a number.
    """
    model.labels, model.checkpoint = recipe.data.labels, recipe.checkpoint({})
    for heard in waveform_posteriors([model], waveforms, listening):
        if heard.failure is not None:
            raise DataError(heard.failure)
        yield heard
