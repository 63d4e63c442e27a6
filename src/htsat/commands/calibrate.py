"""``htsat calibrate``: thresholds, operating points and probabilities of a model, tuned on labelled recordings."""

import dataclasses
import json
import math
import re
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
    from htsat.evaluation.calibrate import DecodingCalibration, FalseAlarms, QuietRecordings
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
    quiet: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DATA",
            help="A folder of recordings without any of the model's classes, or a labelled corpus of other classes: "
            "thresholds are raised until little is detected there. May be repeated.",
            show_default=False,
        ),
    ] = None,
    max_false_alarms: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="PER_HOUR", help="Of all classes together, on the --quiet recordings.", show_default="10"
        ),
    ] = None,
    max_delay: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Only filters with which live detection waits at most so long for the end of an event.",
            show_default="any",
        ),
    ] = None,
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
    if max_false_alarms is not None and not quiet:
        raise UsageError("--max-false-alarms is counted on recordings without events; name them with --quiet")
    if data is None:
        assert take_from is not None
        if quiet or max_delay is not None:
            raise UsageError("--quiet and --max-delay go with DATA; --from takes what was found over as it is")
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
    if quiet and not _timed(development):
        raise DataError(
            f"{data}: has no events with times, so that there are no thresholds to raise; leave out --quiet"
        )
    silent = _quiet_clips(quiet or [], predictor.labels, development)
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
            predictor._backend = recorder.backend
            calm, unheard = _hear_quiet(predictor, silent, progress) if silent else (None, 0)
            decoding = _decoding(
                metric, config, predictor, clips, predictions, before, min_precision, min_recall, min_events,
                calm, 10.0 if max_false_alarms is None else max_false_alarms,
                math.inf if max_delay is None else max_delay, progress,
            )  # fmt: skip
            failed += unheard
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
        "quiet": [place.name for place in quiet or []],
        "max_delay": max_delay,
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
    for words in _warnings(decoding, max_delay):
        tell(words)
    if failed:
        count = len(development.clips) + len(silent)
        tell(f"{failed} of {count} recordings could not be heard; the others were used")
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
        self.backend, self._said, self._next = backend, [], -1  # type: ignore[var-annotated]

    def __call__(self, chunks: Any) -> Any:
        """Run the network, or say again what it said to the same chunks."""
        if self._next >= 0:
            self._next += 1
            return self._said[self._next - 1]
        self._said.append(self.backend(chunks))
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


def _quiet_clips(places: list[Path], labels: list[str], development: "Corpus") -> "list[Clip]":
    """Return the recordings of folders and corpora that hold none of the model's classes.

    A folder that is no corpus gives all recordings below it; those in a folder named like a class are of that class.
    """
    from htsat.data.clips import Clip, is_recording, some
    from htsat.data.corpora import recognise
    from htsat.data.reading import MANIFEST

    classes = {_plain(label): label for label in labels}
    known = {(clip.path.resolve(), clip.index) for clip in development.clips}
    found: dict[tuple[Path, int | None], Clip] = {}
    for place in places:
        if not place.exists():
            raise DataError(f"{place}: there is no such file or folder; --quiet takes recordings without events")
        clips: Sequence[Clip]
        if place.is_file() and is_recording(place):
            clips = [Clip(place, ())]
        elif place.is_dir() and not (place / MANIFEST).is_file() and recognise(place) in (None, "folder"):
            paths = sorted(path for path in place.rglob("*") if is_recording(path) and path.is_file())
            clips = [Clip(path, path.relative_to(place).parts[:-1]) for path in paths]
        else:
            clips = open_data(place, None, "all", [])[0].clips
        if not clips:
            raise DataError(f"{place}: holds no recordings; --quiet takes recordings without events")
        inside = [{classes[_plain(label)] for label in clip.labels if _plain(label) in classes} for clip in clips]
        if left_out := sum(map(bool, inside)):
            names = ", ".join(label for label in labels if any(label in those for those in inside))
            if left_out == len(clips):
                raise DataError(
                    f"{place}: every recording is of a class of the model ({names}); --quiet takes recordings of others"
                )
            tell(f"{place}: {left_out} of {len(clips)} recordings are of classes of the model and left out: {names}")
        kept = {(clip.path.resolve(), clip.index): clip for clip, those in zip(clips, inside, strict=True) if not those}
        if shared := [clip.path.name for key, clip in kept.items() if key in known]:
            raise DataError(
                f"{place}: {len(shared)} recordings are among the labelled ones too, {some(shared)}; "
                "a recording is either quiet or has events"
            )
        found |= kept
    return list(found.values())


def _plain(label: str) -> str:
    """Return a label without what different tables write differently."""
    return re.sub(r"[\W_]+", " ", label.casefold()).strip()


def _hear_quiet(predictor: "Predictor", clips: "list[Clip]", progress: Progress) -> "tuple[QuietRecordings, int]":
    """Return what the model says of quiet recordings, and how many of them cannot be heard."""
    from htsat.data.clips import clip_name
    from htsat.evaluation.calibrate import QuietRecordings

    heard, predictions, failed = _listen(predictor, clips, progress, "quiet: ")
    if not heard:
        raise DataError(f"none of the {failed} quiet recordings can be heard; see the reasons above")
    names = [clip_name(clip) for clip in heard]
    calm = QuietRecordings(
        {name: one.framewise_posteriors for name, one in zip(names, predictions, strict=True)},
        {name: one.frame_boundaries for name, one in zip(names, predictions, strict=True)},
        {name: clip.group or name for name, clip in zip(names, heard, strict=True)},
    )
    return calm, failed


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
    quiet: "QuietRecordings | None",
    max_false_alarms: float,
    max_delay: float,
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
        quiet=quiet,
        max_false_alarms=max_false_alarms,
        max_delay=max_delay,
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
    if decoding.false_alarms is not None:
        lines += ["", *_alarm_lines(decoding, decoding.false_alarms)]
    return "\n".join(lines) + "\n"


def _alarm_lines(decoding: "DecodingCalibration", alarms: "FalseAlarms") -> list[str]:
    """Return what quiet recordings brought and cost."""
    from htsat.formats import aligned

    def rate(count: int) -> str:
        return f"{alarms.per_hour(count):.1f}"

    unseen = "" if alarms.cross_validated is None else f", {rate(alarms.cross_validated)} cross-validated"
    lines = [
        f"false alarms per hour on {alarms.recordings} quiet recordings, {60 * alarms.hours:.1f} minutes: "
        f"{rate(alarms.before)} before thresholds were raised, {rate(alarms.after)} after{unseen}; "
        f"limit {alarms.limit:g}",
        ", ".join(f"{name} {rate(count)}" for name, count in alarms.points.items()),
        f"{decoding.metric} macro F1: {alarms.macro_f1_before:.4f} before thresholds were raised, "
        f"{decoding.macro_f1:.4f} after; cross-validated {alarms.cross_validated_macro_f1_before:.4f} and "
        f"{decoding.cross_validated_macro_f1:.4f}",
    ]
    rows = [["label", "on before", "on", "per hour before", "per hour", "F1 before", "F1"]]
    for label, one in alarms.per_class.items():
        if one.before or one.threshold != one.threshold_before:
            f1 = ["-" if value is None else f"{value:.3f}" for value in (one.f1_before, one.f1)]
            on = [f"{one.threshold_before:.3g}", f"{one.threshold:.3g}"]
            rows.append([label, *on, rate(one.before), rate(one.after), *f1])
    return [*lines, aligned(rows).rstrip("\n")] if len(rows) > 1 else lines


def _warnings(decoding: "DecodingCalibration | None", max_delay: float | None) -> list[str]:
    """Return what a person must know before trusting the figures."""
    if decoding is None:
        return []
    words = []
    slow = [
        label for label, one in decoding.per_class.items()
        if one.level == "as before" and max_delay is not None
        and (own := decoding.decoding.for_label(label)).median_seconds / 2 + own.min_gap > max_delay
    ]  # fmt: skip
    if slow:
        words.append(f"classes without events keep their filters, which wait for longer than {max_delay:g} s: "
                     + ", ".join(slow))  # fmt: skip
    alarms = decoding.false_alarms
    if alarms is None:
        return words
    minutes = 60 * alarms.hours
    if not alarms.reached:
        left = ", ".join(
            f"{label} {alarms.per_hour(one.after):.1f}" + ("" if one.tuned else " (too few events to raise it)")
            for label, one in alarms.per_class.items() if one.after
        )  # fmt: skip
        words.append(
            f"the limit of {alarms.limit:g} false alarms per hour is not reached: "
            f"{alarms.per_hour(alarms.after):.1f} are left: {left}"
        )
    if alarms.limit * alarms.hours < 3:
        enough = (
            "no length of recordings shows a rate of 0"
            if not alarms.limit
            else f"{180 / alarms.limit:.3g} minutes without a false alarm would show {alarms.limit:g} per hour"
        )
        words.append(
            f"{minutes:.1f} minutes of quiet recordings tell little: one false alarm in them is {60 / minutes:.3g} per "
            f"hour, and none means fewer than {180 / minutes:.3g} per hour (with 95 % confidence); {enough}"
        )
    return words
