"""``htsat score``: how good a table of events is, by every metric and its full name."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from htsat.commands.console import tell
from htsat.errors import DataError, UsageError

if TYPE_CHECKING:
    from htsat.evaluation.scores import DetectionReport, Difference
    from htsat.evaluation.tables import EventTable
    from htsat.metrics.detection import ClassScores, MacroScores
    from htsat.metrics.psds import PSDSResult

_T = TypeVar("_T")


def score(
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE", help="The truth: columns filename, onset, offset, event_label.")
    ],
    estimated: Annotated[Path, typer.Argument(metavar="ESTIMATED", help="What was detected, in the same columns.")],
    durations: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Lengths of the recordings: filename, duration.")
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL", help="Score this class; may be repeated.", show_default="all that occur"),
    ] = None,
    dtc: Annotated[
        float, typer.Option(help="Intersection-based: least part of a detection inside reference events.")
    ] = 0.5,
    gtc: Annotated[
        float, typer.Option(help="Intersection-based: least part of a reference event inside detections.")
    ] = 0.5,
    onset_collar: Annotated[float, typer.Option(help="Event-based: seconds between the onsets, at most.")] = 0.2,
    offset_collar: Annotated[float, typer.Option(help="Event-based: seconds between the offsets, at most.")] = 0.2,
    offset_collar_rate: Annotated[
        float, typer.Option(help="Event-based: the same as a part of the event's length; the larger one holds.")
    ] = 0.2,
    segment: Annotated[float, typer.Option(help="Segment-based: length of a segment (s).")] = 1.0,
    cut: Annotated[
        bool, typer.Option("--cut", help="Segment-based: leave out segments after the end of a file (--durations).")
    ] = False,
    operating_points: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="PSDS1 and PSDS2 of a folder of tables, one per threshold (--durations)."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="OTHER",
            help="Another system's events in the same files: tell how much higher the scores are, with intervals.",
        ),
    ] = None,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples behind the 95 % intervals; 0: no intervals.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
    per_class: Annotated[bool, typer.Option("--per-class", help="Show every class.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JSON to a file.")] = None,
) -> None:
    """Score a table of detected events against the truth, without any recording."""
    for wanted, name in ((operating_points, "--operating-points"), (cut or None, "--cut")):
        if wanted is not None and durations is None:
            raise UsageError(f"{name} needs the lengths of the recordings: give --durations FILE")

    from htsat.evaluation.scores import DetectionSettings, compare_detection, score_detection
    from htsat.evaluation.tables import compare_tables, find_tables, read_durations, read_event_table
    from htsat.files import write_atomic
    from htsat.metrics.psds import PSDS1, PSDS2, psds_from_operating_points

    settings = DetectionSettings(dtc, gtc, onset_collar, offset_collar, offset_collar_rate, segment)
    inputs = _Inputs()
    truth, found = inputs.read(read_event_table, reference), inputs.read(read_event_table, estimated)
    other = inputs.read(read_event_table, against) if against is not None else None
    seconds = inputs.read(read_durations, durations) if durations is not None else None
    folder = (inputs.read(find_tables, operating_points) or []) if operating_points is not None else []
    points = [inputs.read(read_event_table, path) for path in folder]
    if inputs.failed or truth is None or found is None:
        sys.exit(1)
    for note in (*truth.notes, *found.notes, *compare_tables(truth, found, labels=labels, durations=seconds)):
        tell(f"note: {note}")

    # Files that only the durations name are files without events.
    events = {**{file: [] for file in seconds or ()}, **truth.events}
    occurring = truth.labels | found.labels | (other.labels if other is not None else set())
    classes = sorted(occurring) if labels is None else list(dict.fromkeys(labels))
    report = score_detection(
        events,
        found.events,
        classes,
        durations=seconds if cut else None,
        settings=settings,
        bootstrap=bootstrap,
        seed=seed,
    )
    differences: dict[str, dict[str, Difference]] = {}
    if other is not None:
        for note in (*other.notes, *compare_tables(truth, other, labels=labels, durations=seconds)):
            tell(f"note: {note}")
        differences = compare_detection(
            events,
            found.events,
            other.events,
            classes,
            durations=seconds if cut else None,
            settings=settings,
            resamples=bootstrap or 1000,
            seed=seed,
        )
    psds: dict[str, PSDSResult] = {}
    if seconds is not None and points:
        tables = [point.events for point in points if point is not None]
        try:
            for name, demands in (("psds1", PSDS1), ("psds2", PSDS2)):
                psds[name] = psds_from_operating_points(events, tables, seconds, demands, labels=classes)
        except ValueError as error:
            raise DataError(f"{durations}: {error}; add them") from None
    values = report.to_dict()
    if psds:
        values["psds"] = {name: {"value": one.value, "per_class": one.per_class} for name, one in psds.items()}
        values["psds"]["operating_points"] = len(points)
    if differences:
        values["difference"] = {
            name: {kind: {"value": one.value, "interval": list(one.interval)} for kind, one in both.items()}
            for name, both in differences.items()
        }
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, indent=2) + "\n"
    table = _table(truth, found, report, psds, len(points), per_class)
    if against is not None:
        table += "\n" + _comparison(against, report, differences)
    print(text if as_json else table, end="", flush=True)
    if out is not None:
        write_atomic(out, text)


class _Inputs:
    """Reads all files before the first failure ends the run, so that all can be mended at once."""

    def __init__(self) -> None:
        self.failed = False

    def read(self, reader: Callable[[Path], _T], path: Path) -> _T | None:
        """Return what ``reader`` makes of a file, or tell why not."""
        try:
            return reader(path)
        except DataError as error:
            tell(str(error))
            self.failed = True
            return None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _table(
    truth: "EventTable",
    found: "EventTable",
    report: "DetectionReport",
    psds: "dict[str, PSDSResult]",
    num_points: int,
    per_class: bool,
) -> str:
    """Return all scores as aligned columns."""
    from htsat.formats import aligned
    from htsat.metrics.psds import PSDS1, PSDS2

    titles = report.settings.titles
    intervals = {"macro": report.intervals, "micro": report.micro_intervals}
    several = bool(report.intervals)
    rates = ["precision", "recall", "error rate", "deletions", "insertions", "substitutions"]
    rows = [["metric", "value", *(["95 % interval"] if several else []), *rates]]
    for name, scores in report.by_metric.items():
        for kind, f1, means in (("macro", scores.macro_f1, scores.macro), ("micro", scores.micro_f1, scores.overall)):
            row = [f"{titles[name]}, {kind}", _number(f1)]
            if several:
                low, high = intervals[kind][name]
                row.append(f"{low:.4f} to {high:.4f}")
            rows.append([*row, *_rates(means), _number(getattr(means, "substitution_rate", None))])
    width = len(rows[0])
    counted = f"{num_points} operating point{'' if num_points == 1 else 's'}"
    for name, demands in (("psds1", PSDS1), ("psds2", PSDS2)):
        if name in psds:
            title = (
                f"{name.upper()} (DTC = GTC = {demands.dtc:g}, CTTC {demands.cttc:g}, alpha_ct {demands.alpha_ct:g}, "
                f"alpha_st {demands.alpha_st:g}, max. eFPR {demands.max_efpr:g}/h), {counted}"
            )
            rows.append([title, _number(psds[name].value), *[""] * (width - 2)])
    lines = [
        f"{side}  {table.path}: {len(table.events)} files, {table.num_events} events"
        for side, table in (("reference", truth), ("estimated", found))
    ]
    text = "\n".join(lines) + "\n\n" + aligned(rows)
    if not per_class:
        return text
    for name, scores in report.by_metric.items():
        head = [titles[name], "F1", *rates[:-1], "hits", "false alarms", "misses"]
        body = [
            [label, _number(one.f1), *_rates(one), str(one.tp), str(one.fp), str(one.fn)]
            for label, one in scores.per_class.items()
        ]
        text += "\n" + aligned([head, *body])
    if psds:
        head = ["area below the staircase of a class", *(name.upper() for name in psds)]
        first = next(iter(psds.values()))
        body = [[label, *(_number(one.per_class[label]) for one in psds.values())] for label in first.per_class]
        text += "\n" + aligned([head, *body])
    return text


def _comparison(against: Path, report: "DetectionReport", differences: "dict[str, dict[str, Difference]]") -> str:
    """Return how much higher the scores are than those of another system."""
    from htsat.formats import aligned

    rows = [[f"higher than {against}", "by", "95 % interval", ""]]
    for name, both in differences.items():
        for kind, one in both.items():
            low, high = one.interval
            verdict = "higher" if low > 0 else "lower" if high < 0 else "not told apart"
            title = f"{report.settings.titles[name]}, {kind.removesuffix('_f1')}"
            value = "-" if one.value is None else f"{one.value:+.4f}"
            rows.append([title, value, f"{low:+.4f} to {high:+.4f}", verdict])
    return aligned(rows)


def _rates(scores: "ClassScores | MacroScores") -> list[str]:
    """Return precision, recall, and the rates that every score has."""
    values: tuple[Any, ...] = (
        scores.precision, scores.recall, scores.error_rate, scores.deletion_rate, scores.insertion_rate
    )  # fmt: skip
    return [_number(value) for value in values]
