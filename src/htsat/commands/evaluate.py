"""``htsat evaluate``: how good models are on labelled recordings."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from htsat.commands.console import Progress, tell
from htsat.errors import DataError, OutputError, UsageError

if TYPE_CHECKING:
    from htsat.data.corpora import Corpus
    from htsat.evaluation.evaluate import ModelIdentity
    from htsat.model.base import SoundModel


class Fit(StrEnum):
    """What is done with clips shorter than the model's input."""

    pad = "pad"
    tile = "tile"
    native = "native"
    stretch = "stretch"
    repeat = "repeat"


class Together(StrEnum):
    """How several models become one."""

    mean = "mean"
    logits = "logits"
    weights = "weights"


class Classes(StrEnum):
    """What a model's classes are counted as."""

    desed = "desed"
    desed_published = "desed-published"


class Decoding(StrEnum):
    """How posteriors become events."""

    model = "model"
    published = "published"


def evaluate(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... DATA",
            help="Models (names, checkpoints, hf://owner/repo; several are an ensemble), and last the labelled data: "
            "a corpus in its official layout, a folder per class, a table, or packed shards.",
        ),
    ],
    corpus: Annotated[
        str | None, typer.Option(metavar="KIND", help="Which corpus the data is.", show_default="recognised")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Score this split: train, validation, test, or all.")] = None,
    fold: Annotated[list[int] | None, typer.Option(min=1, help="Score this fold; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JSON to a file.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a report with pictures to one HTML file.")
    ] = None,
    shifts: Annotated[
        int, typer.Option(min=1, max=100, help="Mean over circular shifts of each clip; 10 as published.")
    ] = 1,
    fit: Annotated[
        Fit | None,
        typer.Option(help="Clips under 10 s; stretch and repeat as published.", show_default="the model's"),
    ] = None,
    classes: Annotated[
        Classes | None,
        typer.Option(help="Count AudioSet's classes as DESED's ten: by meaning, or by the published map."),
    ] = None,
    decoding: Annotated[
        Decoding,
        typer.Option(help="Events by the checkpoint's settings, or by the ten published thresholds of DESED."),
    ] = Decoding.model,
    operating_point: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Events by these settings of the (first) checkpoint: high_precision, balanced, high_recall ...",
            show_default="the checkpoint's usual ones",
        ),
    ] = None,
    time_shifts: Annotated[
        int | None,
        typer.Option(
            min=1, max=32, help="Events: hear each chunk so often, for as much finer time.", show_default="the model's"
        ),
    ] = None,
    ensemble: Annotated[
        Together, typer.Option(help="Several models: mean of their posteriors, of their logits, or of their weights.")
    ] = Together.mean,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Posterior from which a label is given, for several labels per clip.")
    ] = 0.5,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples behind the 95 % intervals; 0: no intervals.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:N or mps.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the network.", show_default="PyTorch's choice")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="10-second chunks per pass of the network.")] = 4,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloaded models are kept; also HTSAT_CACHE.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Address of the model hub; also HTSAT_ENDPOINT.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never download; also HTSAT_OFFLINE=1.")] = False,
) -> None:
    """Score models on labelled recordings: tags, and events where the data tells their times.

    The DESED table of the paper: htsat evaluate MODEL DESED --split test --classes desed-published --decoding
    published, with published weights as MODEL; its F1 is the intersection-based one. With --classes desed alone
    the classes are mapped by meaning and events are found by the checkpoint's thresholds and filters. PSDS and
    frame-level figures are those of the posteriors, before filters and thresholds, whatever the decoding.
    """
    if len(inputs) < 2:
        raise UsageError("give at least a model and, last, the labelled data: htsat evaluate MODEL... DATA")
    *names, folder = inputs
    for path in (out, report):
        if path is not None:
            check_target(path)
    data, part = open_data(Path(folder), corpus, split, fold or [])

    from htsat.data.clips import clip_name
    from htsat.data.reading import ClipReader
    from htsat.evaluation.evaluate import has_events, identify, summarise
    from htsat.evaluation.listen import Listening, posteriors
    from htsat.evaluation.report import html, table, to_json
    from htsat.evaluation.scores import match_labels
    from htsat.files import write_atomic
    from htsat.model.base import IN_TIME
    from htsat.model.checkpoint import read_config
    from htsat.model.hub import resolve

    paths = [resolve(name, cache_dir=cache_dir, endpoint=endpoint, offline=offline or None) for name in names]
    events = has_events(data) and (fit is None or fit.value in IN_TIME)
    for given, option in ((decoding is Decoding.published, "decoding"), (operating_point, "operating-point")):
        if given and not has_events(data):
            raise UsageError(f"{folder}: tells no times of events, so there is nothing to decode; leave out --{option}")
    if operating_point is not None:
        read_config(paths[0]).decoding_at(operating_point)  # a wrong name ends here, before the work
    listening = Listening(
        fit=None if fit is None else fit.value,
        shifts=shifts,
        ensemble="logits" if ensemble is Together.logits else "mean",
        batch_size=batch_size,
        device=device,
        threads=threads,
        events=events,
        classes=None if classes is None else classes.value,
        decoding=decoding.value,
        time_shifts=time_shifts,
        operating_point=operating_point,
    )
    identities = [identify(name, path, read_config(path), listening) for name, path in zip(names, paths, strict=True)]
    for identity in identities:
        if not identity.labels:
            raise UsageError(f"model {identity.name!r} has no classes, it gives embeddings only; choose another")
        match_labels(identity.labels, data.labels, folder)
    models, identities = _load(paths, identities, ensemble)
    heard = []
    with Progress() as progress:
        count = len(data.clips)
        for clip, one in zip(data.clips, posteriors(models, data.clips, ClipReader, listening), strict=True):
            heard.append(one)
            if one.failure is not None:
                progress.clear()
                tell(one.failure)
            progress.update(f"{len(heard)}/{count} clips  {clip_name(clip)}", len(heard) / count, every=500)
        if bootstrap:
            progress.update("intervals", 1.0)
        evaluation = summarise(
            data, heard, identities, listening, part=part, threshold=threshold, bootstrap=bootstrap, seed=seed
        )
    # The figures first: a report that cannot be written does not lose them.
    print(to_json(evaluation) if as_json else table(evaluation), end="", flush=True)
    if out is not None:
        write_atomic(out, to_json(evaluation))
    if report is not None:
        write_atomic(report, html(evaluation, report.parent))
    if evaluation.failures:
        tell(f"{len(evaluation.failures)} of {count} clips could not be scored; the figures are those of the others")
        sys.exit(1)


def open_data(data: Path, kind: str | None, split: str | None, folds: list[int]) -> "tuple[Corpus, str]":
    """Return the clips to score, and which part of the data they are, in words."""
    from htsat.data.corpora import KINDS, open_corpus, recognise
    from htsat.data.reading import MANIFEST
    from htsat.data.shards import open_shards
    from htsat.evaluation.evaluate import select

    if kind in (None, "shards") and (data / MANIFEST).is_file():
        corpus = open_shards(data)
    else:
        if kind is None and not data.exists():
            raise DataError(f"{data}: there is no such file or folder; give the labelled data last")
        found = kind or ("csv" if data.is_file() else recognise(data))
        if found is None:
            raise DataError(
                f"{data}: is no corpus that can be recognised; say which it is with --corpus ({', '.join(KINDS)})"
            )
        corpus = open_corpus(found, data, allow_empty=True)
    for warning in corpus.warnings:
        tell(warning)
    splits = sorted({clip.split for clip in corpus.clips if clip.split is not None})
    if split is None and not folds and len(splits) > 1:
        raise UsageError(
            f"{data}: has the splits {', '.join(splits)}; choose with --split which to score, or --split all"
        )
    selected = select(corpus, None if split == "all" else split, folds)
    words = [split] if split not in (None, "all") else []
    words += [f"{'fold' if len(folds) == 1 else 'folds'} {', '.join(map(str, folds))}"] if folds else []
    return selected, ", ".join(map(str, words))


def _load(
    paths: list[Path], identities: "list[ModelIdentity]", together: Together
) -> "tuple[list[SoundModel], list[ModelIdentity]]":
    """Return the models, or the one that has the mean of their weights."""
    import hashlib

    from htsat.evaluation.evaluate import ModelIdentity
    from htsat.model.average import average_checkpoints
    from htsat.model.runtime import load_model

    if together is not Together.weights or len(paths) == 1:
        return [load_model(path) for path in paths], identities
    first = identities[0]
    # It lies in no file: it is known by those that it is made of.
    digest = hashlib.sha256("".join(identity.sha256 for identity in identities).encode()).hexdigest()
    name = f"mean weights of {', '.join(identity.name for identity in identities)}"
    files = ", ".join(identity.file for identity in identities)
    return [average_checkpoints(paths)], [ModelIdentity(name, files, digest, first.labels, first.objective)]


def check_target(path: Path) -> None:
    """Refuse a file for results that cannot be written, before hours are spent on them."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist; create it or choose another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: no permission to write there; choose another folder")
