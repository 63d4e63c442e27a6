"""Scores of a run: on its selection split, and once on what was held out. Only the loop chooses by the former."""

from collections.abc import Sequence
from typing import Any

import torch

from htsat.data.corpora import Clip, Corpus
from htsat.data.mix import Source
from htsat.detection.decoder import decode_events
from htsat.evaluation.evaluate import Evaluation, ModelIdentity, summarise
from htsat.evaluation.listen import Heard, Listening, join_shards, posteriors, shard
from htsat.evaluation.scores import TaggingScores
from htsat.events import Event
from htsat.grid import FrameGrid
from htsat.metrics.detection import event_based, intersection_based
from htsat.model.htsat import HTSAT, Fit
from htsat.training.distributed import Ranks
from htsat.training.examples import CutReader, RunData
from htsat.training.material import Material, Progress, Soundscape
from htsat.training.recipe import Recipe


def listen(
    model: HTSAT, recipe: Recipe, data: RunData, clips: Sequence[Clip], ranks: Ranks, what: str, progress: Progress
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
    intervals = 1000 if part == "test" else 0
    return summarise(corpus, heard, [identity], listening(recipe), part=part, bootstrap=intervals)


def headline(scores: TaggingScores) -> tuple[str, float]:
    """Return name and value of the score that runs are selected by: accuracy, or mAP for clips of several labels."""
    name = "accuracy" if scores.objective == "single_label" else "mean_average_precision"
    return name, scores.figures[name]


def score_held_out(model: HTSAT, recipe: Recipe, material: Material, progress: Progress) -> dict[str, Any]:
    """Return accuracy on the held-out clips and detection scores on the held-out soundscapes, as fractions.

    Accuracy is over the classes that the clips have; both ways to fill a chunk with a short clip are told.
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
        estimated = detect_soundscapes(model, recipe, material.test_soundscapes)
        reference = {s.name: list(s.events) for s in material.test_soundscapes}
        present = {event.event_label for events in reference.values() for event in events}
        scored = [label for label in recipe.data.labels if label in present]
        report["soundscapes"] = len(reference)
        report["intersection_macro_f1"] = intersection_based(reference, estimated, labels=scored).macro_f1
        report["event_based_macro_f1"] = event_based(reference, estimated, labels=scored).macro_f1
    return report


def clip_accuracy(
    model: HTSAT,
    recipe: Recipe,
    clips: Sequence[Source],
    classes: Sequence[str],
    fit: Fit,
) -> float:
    """Return the share of clips whose most probable class, among ``classes``, is theirs."""
    columns = [recipe.data.labels.index(label) for label in classes]
    right = 0
    for clip in clips:
        with torch.inference_mode():
            logits = model(torch.from_numpy(clip.waveform[: model.chunk_samples]).unsqueeze(0), fit).clipwise_logits
        assert logits is not None
        right += classes[int(logits[0, columns].argmax())] == clip.label
    return right / len(clips)


def detect_soundscapes(model: HTSAT, recipe: Recipe, soundscapes: Sequence[Soundscape]) -> dict[str, list[Event]]:
    """Return the events of recordings of one chunk, decoded with the recipe's settings: name -> events."""
    estimated = {}
    for soundscape in soundscapes:
        with torch.inference_mode():
            waveform = torch.from_numpy(soundscape.waveform[: model.chunk_samples]).unsqueeze(0)
            logits = model(waveform).framewise_logits
        assert logits is not None
        duration = waveform.shape[1] / recipe.frontend.sample_rate
        grid = FrameGrid.uniform(recipe.model.chunk_seconds / model.num_tokens, duration)
        posteriors = logits[0].sigmoid().numpy()
        estimated[soundscape.name] = decode_events(posteriors, grid.boundaries, recipe.data.labels, recipe.decoding)
    return estimated
