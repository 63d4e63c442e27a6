"""``htsat calibrate``: thresholds, operating points and probabilities of a model, tuned on labelled recordings."""

import dataclasses
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from htsat.commands.console import Progress, tell
from htsat.commands.evaluate import Classes, check_target, open_data
from htsat.errors import ConfigError, DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from htsat.backends import Backend
    from htsat.config import CheckpointConfig
    from htsat.data.clips import Clip, Corpus
    from htsat.evaluation.calibrate import DecodingCalibration
    from htsat.evaluation.probabilities import ProbabilityCalibration
    from htsat.events import Event
    from htsat.predict import Prediction, Predictor


class TunedMetric(StrEnum):
    """What the thresholds make best."""

    event_based = "event_based"
    intersection = "intersection"
    segment_based = "segment_based"


def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name, a checkpoint, or hf://owner/repo.")],
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA",
            help="Labelled recordings that the model was neither trained on nor will be tested on, as for evaluate; "
            "thresholds need events with times.",
            show_default=False,
        ),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(metavar="CHECKPOINT", help="The calibrated checkpoint to write.")],
    take_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="CHECKPOINT",
            help="Instead of DATA: take over what was found for another model with the same classes, such as one of "
            "the same recipe that held recordings out.",
        ),
    ] = None,
    metric: Annotated[
        TunedMetric, typer.Option(help="F1 that thresholds and filters make best.")
    ] = TunedMetric.event_based,
    corpus: Annotated[
        str | None, typer.Option(metavar="KIND", help="Which corpus the data is.", show_default="recognised")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Use this split: train, validation, test, or all.")] = None,
    fold: Annotated[list[int] | None, typer.Option(min=1, help="Use this fold; may be repeated.")] = None,
    min_precision: Annotated[
        float, typer.Option(min=0.01, max=1, help="Precision of the operating point high_precision.")
    ] = 0.9,
    min_recall: Annotated[
        float, typer.Option(min=0.01, max=1, help="Recall of the operating point high_recall.")
    ] = 0.9,
    min_events: Annotated[
        int, typer.Option(min=1, help="Classes with fewer events keep the settings that all classes share.")
    ] = 5,
    no_probabilities: Annotated[
        bool, typer.Option("--no-probabilities", help="Leave the posteriors as they are; thresholds alone.")
    ] = False,
    shifts: Annotated[
        int | None,
        typer.Option(
            min=1, max=32, help="Finer times, as for detect; kept in the checkpoint.", show_default="the model's"
        ),
    ] = None,
    classes: Annotated[
        Classes | None,
        typer.Option(
            help="Count AudioSet's classes as DESED's, as for detect; kept in the checkpoint.",
            show_default="the model's",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:N or mps.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the network.", show_default="PyTorch's choice")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Chunks per pass of the network.")] = 4,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloaded models are kept; also HTSAT_CACHE.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Address of the model hub; also HTSAT_ENDPOINT.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never download; also HTSAT_OFFLINE=1.")] = False,
) -> None:
    """Tune thresholds, filters, operating points and probabilities; figures on this data are no test figures."""
    check_target(out)
    if (data is None) == (take_from is None):
        raise UsageError("give either DATA to tune on, or --from a checkpoint to take the settings of")
    if data is None:
        assert take_from is not None
        _take_over(model, take_from, out, cache_dir, endpoint, offline)
        return
    development, part = open_data(data, corpus, split, fold or [])

    from htsat.config import CalibrationConfig
    from htsat.evaluation.evaluate import fingerprint, identify
    from htsat.evaluation.scores import match_labels
    from htsat.model.checkpoint import read_config, with_config
    from htsat.model.hub import resolve
    from htsat.predict import Predictor

    path = resolve(model, cache_dir=cache_dir, endpoint=endpoint, offline=offline or None)
    stored = read_config(path)
    if not stored.labels:
        raise UsageError(f"model {model!r} has no classes, it gives embeddings only; choose another (htsat models)")
    inference = stored.inference if shifts is None else dataclasses.replace(stored.inference, shifts=shifts)
    inference = inference if classes is None else dataclasses.replace(inference, classes=classes.value)
    try:
        config = dataclasses.replace(stored, inference=inference)
    except ConfigError as error:
        raise UsageError(f"these settings do not go together: {error}") from None
    predictor = Predictor(path, device=device, threads=threads, batch_size=batch_size, inference=inference)
    columns = match_labels(predictor.labels, development.labels, str(data))
    seen = fingerprint(development)
    if seen in json.dumps({key: value for key, value in config.provenance.items() if key != "calibration"}):
        tell(f"{data}: the model was trained on this data; thresholds found on it expect too much of other recordings")

    found: dict[str, ProbabilityCalibration] = {}
    with Progress() as progress:
        predictor.config = config
        recorder = _Recorder(predictor._backend)
        predictor._backend = recorder
        clips, predictions, failed = _listen(predictor, development.clips, progress, "")
        if not clips:
            raise DataError(f"{data}: none of its {failed} recordings can be heard; see the reasons above")
        folds = _folds(clips)
        before = {one.file: one.events for one in predictions}
        if not no_probabilities:
            if config.calibration != CalibrationConfig():
                config = dataclasses.replace(config, calibration=CalibrationConfig())
                predictor.config = config
                recorder.replay()
                clips, predictions, _ = _listen(predictor, clips, progress, "again, as the network says: ")
            progress.update("probabilities", 1.0)
            config, found = _probabilities(config, predictor, development, clips, predictions, folds, columns)
            if config.calibration != CalibrationConfig():
                predictor.config = config
                recorder.replay()
                clips, predictions, _ = _listen(predictor, clips, progress, "again, calibrated: ")
        decoding = None
        if _timed(development):
            decoding = _decoding(
                metric, config, predictor, clips, predictions, before, min_precision, min_recall, min_events, progress
            )
            config = dataclasses.replace(
                config, decoding=decoding.decoding, operating_points=dict(decoding.operating_points)
            )
        else:
            progress.clear()
            tell(f"{data}: has no events with times, so thresholds and filters stay; only probabilities are calibrated")
            if not found:
                raise DataError(f"{data}: there is nothing that it could calibrate; give recordings with timed events")
    figures: dict[str, Any] = {
        "data": {
            "corpus": development.name, "part": part, "fingerprint": seen, "clips": len(clips),
            "model_sha256": identify(model, path, stored).sha256,
        },
        "probabilities": {name: one.to_dict() for name, one in found.items()},
        "decoding": None if decoding is None else decoding.to_dict(),
    }  # fmt: skip
    config = dataclasses.replace(config, provenance={**config.provenance, "calibration": figures})
    with_config(path, out, config)
    if as_json:
        print(json.dumps({"checkpoint": str(out), **figures}, indent=1))
    else:
        print(_table(config, figures, decoding, found), end="")
        print(f"\n{out}")
    if failed:
        tell(f"{failed} of {failed + len(clips)} recordings could not be heard; the others were used")
        sys.exit(1)


def _take_over(model: str, source: str, out: Path, cache_dir: Path | None, endpoint: str | None, offline: bool) -> None:
    """Write ``model`` with the calibration of ``source``."""
    from htsat.evaluation.evaluate import identify
    from htsat.model.checkpoint import read_config, with_config
    from htsat.model.hub import resolve

    path, other = (resolve(m, cache_dir=cache_dir, endpoint=endpoint, offline=offline or None) for m in (model, source))
    mine, theirs = read_config(path), read_config(other)
    if "calibration" not in theirs.provenance:
        raise UsageError(f"--from {source}: was not calibrated; run htsat calibrate on it first")
    if mine.labels != theirs.labels or (mine.objective, mine.framewise) != (theirs.objective, theirs.framewise):
        raise UsageError(f"--from {source}: has other classes than {model}; what was found for them does not fit")
    if mine.token_seconds != theirs.token_seconds:
        raise UsageError(
            f"--from {source}: has time steps of {theirs.token_seconds:g} s, {model} of {mine.token_seconds:g} s; "
            "what was found for one does not fit the other"
        )
    origin = {"from": source, "sha256": identify(source, other, theirs).sha256}
    figures = {**theirs.provenance["calibration"], "taken_over": origin}
    config = dataclasses.replace(
        mine,
        calibration=theirs.calibration,
        decoding=theirs.decoding,
        operating_points=theirs.operating_points,
        inference=dataclasses.replace(mine.inference, shifts=theirs.inference.shifts, classes=theirs.inference.classes),
        provenance={**mine.provenance, "calibration": figures},
    )
    with_config(path, out, config)
    print(out)


class _Recorder:
    """Keeps what the network says, so that posteriors can be made of it again when they are calibrated."""

    def __init__(self, backend: "Backend") -> None:
        self._backend, self._said, self._next = backend, [], -1  # type: ignore[var-annotated]

    def __call__(self, chunks: Any) -> Any:
        """Run the network, or say again what it said to the same chunks."""
        if self._next >= 0:
            self._next += 1
            return self._said[self._next - 1]
        self._said.append(self._backend(chunks))
        return self._said[-1]

    def replay(self) -> None:
        """Answer from now on what was answered from the beginning, in the same order."""
        self._next = 0


def _timed(corpus: "Corpus") -> bool:
    from htsat.evaluation.evaluate import has_events

    return has_events(corpus)


def _listen(
    predictor: "Predictor", clips: "Sequence[Clip]", progress: Progress, words: str
) -> "tuple[list[Clip], list[Prediction], int]":
    """Return the clips that can be heard, what the model says of them, and how many others there are."""
    from htsat.data.clips import clip_name
    from htsat.data.reading import ClipReader
    from htsat.errors import AudioError

    rate = predictor.config.frontend.sample_rate
    reader = ClipReader(rate)
    heard, predictions = [], []
    for done, clip in enumerate(clips, 1):
        try:
            waveform = reader.read(clip)
            predictions.append(predictor.predict((waveform, rate), name=clip_name(clip), spectrogram=False))
            heard.append(clip)
        except (AudioError, DataError) as error:
            progress.clear()
            tell(str(error))
        progress.update(f"{words}{done}/{len(clips)} clips  {clip_name(clip)}", done / len(clips), every=500)
    return heard, predictions, len(clips) - len(heard)


def _folds(clips: "Sequence[Clip]") -> "NDArray[np.intp]":
    """Return which group of the cross-validation each clip is in."""
    from htsat.data.clips import clip_name
    from htsat.evaluation.calibrate import fold_numbers

    return fold_numbers([clip.group or clip_name(clip) for clip in clips], 5)


def _probabilities(
    config: "CheckpointConfig",
    predictor: "Predictor",
    corpus: "Corpus",
    clips: "Sequence[Clip]",
    predictions: "Sequence[Prediction]",
    folds: "NDArray[np.intp]",
    columns: "list[int]",
) -> "tuple[CheckpointConfig, dict[str, ProbabilityCalibration]]":
    """Return the configuration with calibrated logits of clips and, where the data tells times, of frames."""
    import numpy as np

    from htsat.config import CalibrationConfig
    from htsat.evaluation.probabilities import calibrate_one, calibrate_several, frame_truth
    from htsat.evaluation.scores import reference_matrix

    if config.inference.classes is not None:
        tell("classes counted from those of AudioSet have no logits of their own, so probabilities stay as they are")
        return config, {}
    found = {}
    truth = reference_matrix(clips, corpus.labels)
    posteriors = np.stack([one.clipwise_posteriors for one in predictions])
    if config.objective == "multi_label":
        found["clipwise"] = calibrate_several(posteriors[:, columns], truth, folds, columns, config.labels)
    elif corpus.objective == "single_label":
        own = np.asarray(columns)[truth.argmax(axis=1)]
        found["clipwise"] = calibrate_one(posteriors, own, folds, config.labels)
    else:
        tell("the model gives each clip one label and the data several, so probabilities of clips stay as they are")
    if _timed(corpus):
        known = [(clip.events or (), one, fold) for clip, one, fold in zip(clips, predictions, folds, strict=True)]
        active = np.concatenate([frame_truth(events, p.frame_boundaries, corpus.labels) for events, p, _ in known])
        said = np.concatenate([p.framewise_posteriors for _, p, _ in known])
        groups = np.concatenate([np.full(len(p.framewise_posteriors), fold) for _, p, fold in known])
        # Neighbouring frames say the same: a second of them counts as one example.
        weight = min(1.0, sum(p.duration for _, p, _ in known) / len(said))
        if config.framewise == "sigmoid":
            found["framewise"] = calibrate_several(said[:, columns], active, groups, columns, config.labels, weight)
        elif (one := active.sum(axis=1) == 1).any():
            own = np.asarray(columns)[active[one].argmax(axis=1)]
            found["framewise"] = calibrate_one(said[one], own, groups[one], config.labels, weight)
    calibration = CalibrationConfig(**{name: one.calibration for name, one in found.items()})
    return dataclasses.replace(config, calibration=calibration), found


def _decoding(
    metric: TunedMetric,
    config: "CheckpointConfig",
    predictor: "Predictor",
    clips: "Sequence[Clip]",
    predictions: "Sequence[Prediction]",
    before: "dict[str, list[Event]]",
    min_precision: float,
    min_recall: float,
    min_events: int,
    progress: Progress,
) -> "DecodingCalibration":
    """Tune the decoding settings on clips with timed events; ``before`` is what the model found as it was."""
    from htsat.evaluation.calibrate import calibrate_decoding, score

    timed = {p.file: (clip, p) for clip, p in zip(clips, predictions, strict=True) if clip.events is not None}
    reference = {name: clip.events or () for name, (clip, _) in timed.items()}
    found = calibrate_decoding(
        {name: p.framewise_posteriors for name, (_, p) in timed.items()},
        {name: p.frame_boundaries for name, (_, p) in timed.items()},
        reference,
        predictor.labels,
        metric.value,
        before=config.decoding,
        groups={name: clip.group or name for name, (clip, _) in timed.items()},
        min_events=min_events,
        min_precision=min_precision,
        min_recall=min_recall,
        on_progress=lambda done, count: progress.update(f"thresholds {done}/{count} classes", done / count),
    )
    scores = score(
        metric.value, reference, {name: before[name] for name in timed}, {n: p.duration for n, (_, p) in timed.items()}
    )
    return dataclasses.replace(found, macro_f1_before=scores.macro_f1)


def _table(
    config: "CheckpointConfig",
    figures: dict[str, Any],
    decoding: "DecodingCalibration | None",
    found: "dict[str, ProbabilityCalibration]",
) -> str:
    """Return all figures for people."""
    from htsat.formats import aligned

    data = figures["data"]
    part = f", {data['part']}" if data["part"] else ""
    lines = [
        f"Tuned on {data['clips']} recordings of {data['corpus']}{part}: figures on the data that settings were chosen "
        "on, not test figures.",
        "Cross-validated: settings chosen without the recordings that they are scored on.",
    ]
    for name, one in found.items():
        lines += ["", f"probabilities, {name}: {len(one.classes)} of {len(config.labels)} classes changed"]
        rows = [["", "before", "after", "cross-validated"]]
        for key, title in (("nll", "NLL"), ("brier_score", "Brier score"), ("calibration_error", "ECE, equal mass")):
            values = (getattr(when, key) for when in (one.before, one.after, one.cross_validated))
            rows.append([title, *(f"{value:.4f}" for value in values)])
        lines.append(aligned(rows).rstrip("\n"))
    if decoding is None:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        f"{decoding.metric} macro F1: {decoding.macro_f1_before:.4f} before, {decoding.macro_f1:.4f} after, "
        f"{decoding.cross_validated_macro_f1:.4f} cross-validated",
    ]
    rows = [["label", "events", "settings", "on", "off", "median", "gap", "least", "F1", "cross-val.",
             "precise P/R", "balanced P/R", "recall P/R"]]  # fmt: skip
    for label, one_class in decoding.per_class.items():
        settings = decoding.decoding.for_label(label)
        off = settings.threshold if settings.threshold_off is None else settings.threshold_off
        seconds = (settings.median_seconds, settings.min_gap, settings.min_duration)
        points = []
        for point in ("high_precision", "balanced", "high_recall"):
            scores = one_class.points.get(point)
            missed = "*" if point in one_class.unreachable else ""
            points.append("-" if scores is None else f"{scores.precision:.2f}/{scores.recall:.2f}{missed}")
        balanced = one_class.points.get("balanced")
        unseen = one_class.cross_validated_f1
        rows.append(
            [label, str(one_class.events), one_class.level, f"{settings.threshold:.3g}", f"{off:.3g}"]
            + [f"{value:.3g}" for value in seconds]
            + ["-" if balanced is None else f"{balanced.f1:.3f}", "-" if unseen is None else f"{unseen:.3f}"]
            + points
        )
    lines.append(aligned(rows).rstrip("\n"))
    few = [label for label, one_class in decoding.per_class.items() if one_class.cross_validated_f1 is None]
    if few:
        lines.append(f"too few events for settings of their own: {', '.join(few)}")
    if any(one_class.unreachable for one_class in decoding.per_class.values()):
        lines.append("* the precision or recall asked for is not reached; the nearest is taken")
    return "\n".join(lines) + "\n"
