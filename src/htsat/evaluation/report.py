"""An ``Evaluation`` for people: a table for the terminal, and one HTML file that holds all its pictures.

The pictures are SVG, written here: they need no library, stay sharp, and their text can be searched. The file loads
nothing but, when asked to play them, the recordings beside it. Every label and name of a file is escaped.
"""

import json
import math
import os
import urllib.parse
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from htsat.data.clips import Clip, clip_name
from htsat.evaluation.evaluate import Evaluation, Mistake
from htsat.evaluation.scores import DETECTION_TITLES, PSDS, TITLES, DetectionReport, Interval, psds_demands
from htsat.formats import aligned
from htsat.metrics.tagging import CalibrationCurve, precision_recall_curve
from htsat.plot import PALETTE

#: rows of the list of mistakes, classes drawn as curves, classes of the largest confusion matrix, points of a curve
MISTAKES, CURVES, CONFUSED, POINTS = 30, 60, 60, 160
_BLUE, _ORANGE, _GREEN = PALETTE[0], PALETTE[1], PALETTE[2]
#: figures at the top of the report, if they are there
_CARDS = ("accuracy", "mean_average_precision", "mean_roc_auc", "macro_f1", "calibration_error_equal_width")


def to_json(evaluation: Evaluation) -> str:
    """Return the evaluation as JSON text."""
    return json.dumps(evaluation.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def number(value: float) -> str:
    """Return a fraction for people: four digits, a dash for what is not defined."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.4f}"


def notes(evaluation: Evaluation) -> list[str]:
    """Return what a reader must know beside the figures, a line each."""
    tagging, corpus = evaluation.tagging, evaluation.corpus
    lines = []
    classes = len(evaluation.models[0].labels)
    if classes > len(corpus.labels):
        rule = "the most probable of these is the answer" if tagging.objective == "single_label" else "these are scored"
        lines.append(f"the data has {len(corpus.labels)} of the model's {classes} classes; {rule}")
    if tagging.threshold is not None:
        lines.append(f"precision, recall and F1: a label is given from a posterior of {tagging.threshold:g} on")
    for labels, what in (
        (tagging.without_positives, "no clip has; they are in no mean"),
        (tagging.without_negatives, "every clip has; they have no ROC curve"),
    ):
        if labels:
            lines.append(f"{len(labels)} of {len(corpus.labels)} labels {what}: {', '.join(labels)}")
    if evaluation.detection is None and any(clip.events is not None for clip in corpus.clips):
        why = "each clip has one label" if corpus.objective == "single_label" else "this fit distorts time"
        lines.append(f"the data tells the times of events; they are not scored, as {why}")
    if evaluation.detection is not None and evaluation.detection.without_reference:
        names = ", ".join(evaluation.detection.without_reference)
        lines.append(f"labels without a reference event, in no macro F1: {names}")
    if evaluation.detection is not None:
        lines += _thresholds_notes(evaluation.detection)
    if len(evaluation.models) > 1:
        lines.append(f"ensemble of {len(evaluation.models)} models: {_ensemble(evaluation)}")
    if evaluation.listening.shifts > 1:
        lines.append(f"mean over {evaluation.listening.shifts} circular shifts of each clip")
    if evaluation.listening.classes:
        lines.append(
            f"AudioSet's classes counted as {evaluation.listening.classes}: the largest posterior of those that belong"
        )
    if evaluation.listening.decoding == "published":
        lines.append("events: the published thresholds, no filter")
    if evaluation.listening.operating_point is not None:
        lines.append(f"events: decoded at the operating point {evaluation.listening.operating_point}")
    if (evaluation.listening.time_shifts or 1) > 1:
        lines.append(f"events: each chunk heard {evaluation.listening.time_shifts} times, for finer time steps")
    if evaluation.listening.fit is not None:
        lines.append(f"clips shorter than the model's input: {evaluation.listening.fit}")
    if evaluation.bootstrap:
        lines.append(f"intervals: 95 % of {evaluation.bootstrap} bootstrap resamples of the clips")
    return lines


def _thresholds_notes(detection: DetectionReport) -> list[str]:
    """Return what the figures of all thresholds demand, and what they are of."""
    lines = [f"{name.upper()}: {psds_demands(PSDS[name])}" for name in detection.psds]
    if detection.frames is not None and detection.frame_seconds is not None:
        lines.append(
            "PSDS (exact) and frame-level figures: of the posteriors at all thresholds, before filters and decoding; "
            f"frames of {1000 * detection.frame_seconds:.4g} ms"
        )
    return lines


def _ensemble(evaluation: Evaluation) -> str:
    return "mean of the logits" if evaluation.listening.ensemble == "logits" else "mean of the posteriors"


def _data_line(evaluation: Evaluation) -> str:
    corpus, part = evaluation.corpus, evaluation.part
    count = f"{len(evaluation.clips)} of {len(corpus.clips)}" if evaluation.failures else str(len(corpus.clips))
    where = f", {part}" if part else ""
    return f"{corpus.name}{where}: {count} clips, {len(corpus.labels)} classes ({corpus.folder})"


def _headline(evaluation: Evaluation) -> list[tuple[str, str, float, Interval | None]]:
    """Return name, title, value and interval of every figure."""
    tagging, detection = evaluation.tagging, evaluation.detection
    rows = [
        (name, TITLES[name], tagging.figures[name], tagging.intervals.get(name))
        for name in TITLES
        if name in tagging.figures
    ]
    if detection is not None:
        for name, scores in detection.by_metric.items():
            title = DETECTION_TITLES[name]
            rows.append((name, f"{title}, macro", scores.macro_f1, detection.intervals.get(name)))
            rows.append((f"{name}_micro", f"{title}, micro", scores.micro_f1, detection.micro_intervals.get(name)))
            if scores.overall.error_rate is not None:
                error_title = detection.settings.error_titles[name]
                rows.append((f"{name}_error_rate", error_title, scores.overall.error_rate, None))
        for name, one in detection.psds.items():
            demands = PSDS[name]
            rows.append((name, f"{name.upper()} (DTC = GTC = {demands.dtc:g})", one.value, None))
        if detection.frames is not None:
            frames = detection.frames
            rows.append(("frame_map", "frame-level mean average precision (mAP)", frames.mean_average_precision, None))
            rows.append(("frame_auc", "frame-level mean area under the ROC curve", frames.mean_roc_auc, None))
    return rows


def table(evaluation: Evaluation) -> str:
    """Return the evaluation as text in aligned columns."""
    lines = [f"model  {m.name}, {len(m.labels)} classes, sha256 {m.sha256[:12]}" for m in evaluation.models]
    lines += [f"data   {_data_line(evaluation)}", *(f"note   {note}" for note in notes(evaluation)), ""]
    figures = [["metric", "value", "95 % interval"]]
    for _, title, value, interval in _headline(evaluation):
        figures.append([title, number(value), f"{number(interval[0])} to {number(interval[1])}" if interval else ""])
    lines += [aligned(figures)]
    classes = [["class", "clips", "average precision", "ROC area", "precision", "recall", "F1"]]
    for label, one in evaluation.tagging.per_class.items():
        values = (one.average_precision, one.roc_auc, one.precision, one.recall, one.f1)
        classes.append([label, str(one.positives), *map(number, values)])
    lines.append(aligned(classes).rstrip("\n"))
    for title, _, (head, *body) in _detection_tables(evaluation):
        lines += ["", title, aligned([head, *body]).rstrip("\n")]
    return "\n".join(lines) + "\n"


def _detection_tables(evaluation: Evaluation) -> list[tuple[str, str, list[list[str]]]]:
    """Return title, what is said of all classes, and rows with a head, for each view of the events' classes."""
    detection = evaluation.detection
    if detection is None:
        return []
    tables = []
    for name, scores in detection.by_metric.items():
        rows = [["class", "F1", "precision", "recall", "error rate", "hits", "false alarms", "misses"]]
        for label, c in scores.per_class.items():
            ratios = (c.f1, c.precision, c.recall, math.nan if c.error_rate is None else c.error_rate)
            rows.append([label, *map(number, ratios), str(c.tp), str(c.fp), str(c.fn)])
        said = f"macro {number(scores.macro_f1)}, micro {number(scores.micro_f1)}"
        tables.append((DETECTION_TITLES[name], said, rows))
    if detection.psds or detection.frames is not None:
        head = ["class", *(f"{name.upper()} area" for name in detection.psds)]
        areas = [one.per_class for one in detection.psds.values()]
        words = [
            f"{name.upper()} {number(one.value)} ({psds_demands(PSDS[name])})" for name, one in detection.psds.items()
        ]
        figures: list[NDArray[np.float64]] = []
        if detection.frames is not None:
            head += ["frame-level average precision", "frame-level ROC area"]
            figures = [detection.frames.average_precision, detection.frames.roc_auc]
            words.append(f"frame-level mAP {number(detection.frames.mean_average_precision)}")
        rows = [head]
        for index, label in enumerate(detection.labels):
            values = [*(area.get(label, math.nan) for area in areas), *(float(figure[index]) for figure in figures)]
            rows.append([label, *map(number, values)])
        tables.append(("at all thresholds", "; ".join(words), rows))
    return tables


# ---------------------------------------------------------------------- HTML

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; color: #1F2430;
  background: #F6F7F9; margin: 0; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 0 0 12px; }
p { margin: 0 0 8px; } .grey, small { color: #5B6472; }
section { background: #fff; border: 1px solid #D9DDE3; border-radius: 10px; padding: 20px 22px; margin-top: 18px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(176px, 1fr)); gap: 14px; margin-top: 18px; }
.card { background: #fff; border: 1px solid #D9DDE3; border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 27px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span { display: block; color: #5B6472; font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid #E8EBEF; vertical-align: middle; }
th { color: #5B6472; font-weight: 600; font-size: 13px; } .n { text-align: right; white-space: nowrap; }
td { overflow-wrap: anywhere; } .scroll { overflow: auto; max-height: 620px; }
svg { max-width: 100%; height: auto; display: block; } svg text { font-size: 12px; fill: #1F2430; }
svg .grey { fill: #5B6472; } svg .pale { fill: #fff; } audio { height: 32px; width: 220px; display: block; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 0 18px; }
a { color: #0060A0; } code { overflow-wrap: anywhere; font-size: 13px; } ul { margin: 0; padding-left: 20px; }
"""


def html(evaluation: Evaluation, folder: Path) -> str:
    """Return the report as one HTML text.

    Args:
        evaluation: what to report.
        folder: where the report will lie; links to the recordings are relative to it.
    """
    title = f"{' + '.join(model.name for model in evaluation.models)} on {evaluation.corpus.name}"
    parts = [
        f"<h1>{escape(title)}</h1><p class=grey>{escape(_data_line(evaluation))}</p>",
        _cards(evaluation),
        _section("All figures", _figures(evaluation)),
        _section("Average precision of each class", _scroll(_bars(evaluation))),
        '<div class="two">',
        _section("Precision and recall", _curves(evaluation)),
        _section("Calibration", _calibration(evaluation.tagging.calibration, evaluation.tagging.objective)),
        "</div>",
        _confusion(evaluation),
        *_detection(evaluation),
        _mistakes(evaluation, folder),
        _section("Each class in numbers", _scroll(_class_table(evaluation))),
        _failures(evaluation),
        _section("What was evaluated", _identity(evaluation)),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body><main>{''.join(part + chr(10) for part in parts if part)}</main></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _scroll(content: str) -> str:
    return f'<div class="scroll">{content}</div>'


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: int) -> str:
    """Return a table of cells that are HTML already; from column ``numeric`` on they are numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=n' if i >= numeric else ''}>{c}</{tag}>" for i, c in enumerate(cells))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f"<table><thead><tr>{line([escape(h) for h in head], 'th')}</tr></thead><tbody>{body}</tbody></table>"


def _range(interval: Interval | None) -> str:
    return f"{number(interval[0])} to {number(interval[1])}" if interval else ""


def _cards(evaluation: Evaluation) -> str:
    names = [*_CARDS[:4], *DETECTION_TITLES, *PSDS] if evaluation.detection is not None else _CARDS
    cards = [
        f"<div class=card><span>{escape(title)}</span><b>{number(value)}</b><span>{_range(interval)}</span></div>"
        for name, title, value, interval in _headline(evaluation)
        if name in names
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def _figures(evaluation: Evaluation) -> str:
    rows = [[escape(title), number(value), _range(i)] for _, title, value, i in _headline(evaluation)]
    said = "".join(f"<li>{escape(note)}</li>" for note in notes(evaluation))
    return _rows(("metric", "value", "95 % interval"), rows, 1) + (f"<p></p><ul class=grey>{said}</ul>" if said else "")


def _svg(width: float, height: float, content: Iterable[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{escape(label)}">{"".join(content)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "", turn: float = 0) -> str:
    extra = f' class="{kind}"' if kind else ""
    extra += f' transform="rotate({turn:g} {x:g} {y:g})"' if turn else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _bars(evaluation: Evaluation) -> str:
    """Draw a bar per class, the best first; those without a figure last."""
    classes = sorted(
        evaluation.tagging.per_class.items(),
        key=lambda item: -item[1].average_precision if item[1].positives else math.inf,
    )
    step, left, full = 22, 250, 560
    drawn = []
    for row, (label, one) in enumerate(classes):
        y = row * step
        value = one.average_precision
        clips = f"{one.positives} clips" if one.positives else "no clip"
        bar = "" if math.isnan(value) else f'<rect x="{left}" y="{y + 4}" width="{max(1.0, value * full):.1f}" '
        bar += f'height="14" rx="3" fill="{_BLUE}"/>' if bar else ""
        drawn.append(
            f"<g><title>{escape(label)}: {number(value)}, {clips}</title>"
            f"{_text(left - 10, y + 15, _short(label, 34), 'end')}"
            f'<rect x="{left}" y="{y + 4}" width="{full}" height="14" rx="3" fill="#EEF1F4"/>{bar}'
            f"{_text(left + full + 10, y + 15, number(value))}"
            f"{_text(left + full + 66, y + 15, clips, kind='grey')}</g>"
        )
    return _svg(980, len(classes) * step + 4, drawn, "average precision of each class")


class _Square:
    """A plot from (0, 0) to (1, 1) with axes."""

    left, top, side = 46.0, 8.0, 340.0

    def x(self, value: float) -> float:
        return self.left + self.side * value

    def y(self, value: float) -> float:
        return self.top + self.side * (1 - value)

    def axes(self, across: str, up: str) -> list[str]:
        drawn = []
        for tick in (0, 0.25, 0.5, 0.75, 1):
            for x1, y1, x2, y2 in ((tick, 0, tick, 1), (0, tick, 1, tick)):
                drawn.append(
                    f'<line x1="{self.x(x1):g}" y1="{self.y(y1):g}" x2="{self.x(x2):g}" y2="{self.y(y2):g}" '
                    'stroke="#E3E7EC"/>'
                )
            drawn.append(_text(self.x(tick), self.y(0) + 18, f"{tick:g}", "middle", "grey"))
            drawn.append(_text(self.x(0) - 8, self.y(tick) + 4, f"{tick:g}", "end", "grey"))
        drawn.append(_text(self.x(0.5), self.y(0) + 36, across, "middle"))
        drawn.append(_text(12, self.y(0.5), up, "middle", turn=-90))
        return drawn

    def path(self, xs: NDArray[np.floating], ys: NDArray[np.floating]) -> str:
        return "M" + "L".join(f"{self.x(float(x)):.1f} {self.y(float(y)):.1f}" for x, y in zip(xs, ys, strict=True))


def _thinned(xs: NDArray[np.floating], ys: NDArray[np.floating]) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return at most about ``POINTS`` points of a curve, its first and last among them."""
    if len(xs) <= POINTS:
        return xs, ys
    # by recall, not by rank: the many points at the end of a long list lie on top of each other
    kept = np.unique(np.append(np.searchsorted(xs, np.linspace(0, 1, POINTS)).clip(0, len(xs) - 1), [0, len(xs) - 1]))
    return xs[kept], ys[kept]


def _curves(evaluation: Evaluation) -> str:
    """Draw a precision-recall curve per class, and that of all labels together."""
    plot = _Square()
    classes = [i for i, one in enumerate(evaluation.tagging.per_class.values()) if one.positives]
    if not classes:
        return ""
    labels = evaluation.corpus.labels
    shown = sorted(classes, key=lambda i: -int(evaluation.reference[:, i].sum()))[:CURVES]
    drawn = plot.axes("recall", "precision")
    for index in shown:
        recall, precision = precision_recall_curve(evaluation.reference[:, index], evaluation.posteriors[:, index])
        path = plot.path(*_thinned(np.append(0, recall), np.append(precision[0], precision)))
        drawn.append(
            f'<path d="{path}" fill="none" stroke="{_BLUE}" stroke-opacity="0.35" stroke-width="1.4">'
            f"<title>{escape(labels[index])}</title></path>"
        )
    recall, precision = precision_recall_curve(evaluation.reference.ravel(), evaluation.posteriors.ravel())
    path = plot.path(*_thinned(np.append(0, recall), np.append(precision[0], precision)))
    drawn.append(f'<path d="{path}" fill="none" stroke="{_ORANGE}" stroke-width="2.6"/>')
    which = "each class" if len(shown) == len(classes) else f"the {len(shown)} classes with the most clips"
    said = f"<p class=grey>Thin: {which}; thick: all labels of all clips in one list.</p>"
    return _svg(400, 392, drawn, "precision-recall curves") + said


def _calibration(curve: CalibrationCurve, objective: str) -> str:
    plot = _Square()
    drawn = plot.axes("posterior", "share that is right" if objective == "single_label" else "share that is there")
    drawn.append(f'<path d="{plot.path(np.array([0, 1]), np.array([0, 1]))}" stroke="#5B6472" stroke-dasharray="4 4"/>')
    most = int(curve.count.max())
    for posterior, frequency, count in zip(curve.posterior, curve.frequency, curve.count, strict=True):
        x, y = plot.x(float(posterior)), plot.y(float(frequency))
        radius = 3 + 7 * math.sqrt(int(count) / most)
        drawn.append(
            f'<line x1="{x:.1f}" y1="{plot.y(float(posterior)):.1f}" x2="{x:.1f}" y2="{y:.1f}" stroke="{_BLUE}"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{_BLUE}" fill-opacity="0.75">'
            f"<title>posterior {posterior:.3f}, true in {frequency:.3f} of {count}</title></circle>"
        )
    what = "posterior of the given label" if objective == "single_label" else "posteriors of all labels"
    said = f"The {what}, in bins of equal width: the larger a dot, the more it stands for."
    return _svg(400, 392, drawn, "calibration curve") + f"<p class=grey>{said}</p>"


def _confusion(evaluation: Evaluation) -> str:
    """Draw the confusion matrix of a single label, and list its largest confusions."""
    matrix, labels = evaluation.tagging.confusion, evaluation.corpus.labels
    if matrix is None:
        return ""
    content = ""
    if len(labels) <= CONFUSED:
        cell = max(15.0, min(46.0, 660 / len(labels)))
        longest = max(len(_short(label, 24)) for label in labels)
        left, top = 20 + 7.2 * longest, 16 + 6.2 * longest
        drawn = []
        for i, label in enumerate(labels):
            total = max(1, int(matrix[i].sum()))
            drawn.append(_text(left - 8, top + (i + 0.5) * cell + 4, _short(label, 24), "end"))
            drawn.append(_text(left + (i + 0.5) * cell + 3, top - 8, _short(label, 24), turn=-58))
            for j, count in enumerate(matrix[i].tolist()):
                share = count / total
                colour = _BLUE if i == j else _ORANGE
                x, y = left + j * cell, top + i * cell
                title = f"{label}, taken for {labels[j]}: {count} of {total}"
                fill = f'fill="{colour}" fill-opacity="{0.12 + 0.88 * share:.2f}"' if count else 'fill="#F1F3F6"'
                drawn.append(
                    f'<rect x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{cell - 1:.1f}" height="{cell - 1:.1f}" '
                    f'rx="2" {fill}><title>{escape(title)}</title></rect>'
                )
                if count and cell >= 22:
                    kind = "pale" if share > 0.5 else ""
                    drawn.append(_text(x + cell / 2, y + cell / 2 + 4, str(count), "middle", kind))
        width = left + len(labels) * cell + 4.4 * longest + 8
        content = _scroll(_svg(width, top + len(labels) * cell + 6, drawn, "confusion matrix"))
        content += "<p class=grey>Rows: true label; columns: given label; colour: share of the row.</p>"
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = [k for k in np.argsort(-wrong, axis=None, kind="stable")[:15] if wrong.flat[k]]
    rows = [
        [escape(labels[k // len(labels)]), escape(labels[k % len(labels)]), str(wrong.flat[k])] for k in map(int, order)
    ]
    if rows:
        content += _rows(("true label", "was taken for", "clips"), rows, 2)
    return _section("Confusions", content)


def _detection(evaluation: Evaluation) -> list[str]:
    return [
        _section(
            f"Events: {title}",
            f"<p>{escape(said)}</p>" + _scroll(_rows(head, ([escape(label), *values] for label, *values in body), 1)),
        )
        for title, said, (head, *body) in _detection_tables(evaluation)
    ]


def link(clip: Clip, folder: Path) -> str:
    """Return the address of a recording, relative to a folder where that is possible."""
    try:
        path = os.path.relpath(clip.path.absolute(), folder.absolute())
    except ValueError:  # on another drive
        return clip.path.absolute().as_uri()
    return urllib.parse.quote(os.fsencode(Path(path).as_posix()))


def _mistakes(evaluation: Evaluation, folder: Path) -> str:
    found = evaluation.mistakes(MISTAKES)
    if not found:
        return _section("Worst mistakes", "<p>None.</p>")
    single = evaluation.tagging.objective == "single_label"
    head = ("recording", *(("true label", "given label") if single else ("label", "mistake")), "posterior")
    rows = []
    for mistake in found:
        clip = mistake.clip
        name = escape(Path(clip_name(clip)).name)
        where = name
        if clip.index is None:
            address = escape(link(clip, folder))
            where = f'<a href="{address}">{name}</a><audio controls preload="none" src="{address}"></audio>'
        rows.append([where, escape(mistake.truth), *_told(mistake)])
    return _section("Worst mistakes", _scroll(_rows(head, rows, 3)))


def _told(mistake: Mistake) -> tuple[str, str]:
    if mistake.given is not None:
        return escape(mistake.given), f"{mistake.probability:.3f} <small>(true {mistake.true_probability:.3f})</small>"
    return ("missed" if mistake.missed else "given, not there"), f"{mistake.probability:.3f}"


def _class_table(evaluation: Evaluation) -> str:
    head = (
        "class",
        "clips",
        "average precision",
        "ROC area",
        "precision",
        "recall",
        "F1",
        "Brier",
        "calibration error",
    )
    rows = []
    for label, one in evaluation.tagging.per_class.items():
        values = (one.average_precision, one.roc_auc, one.precision, one.recall, one.f1)
        rest = (one.brier_score, one.calibration_error)
        rows.append([escape(label), str(one.positives), *map(number, (*values, *rest))])
    return _rows(head, rows, 1)


def _failures(evaluation: Evaluation) -> str:
    items = "".join(f"<li>{escape(reason)}</li>" for _, reason in evaluation.failures)
    return _section(f"{len(evaluation.failures)} clips could not be scored", f"<ul>{items}</ul>") if items else ""


def _identity(evaluation: Evaluation) -> str:
    data = evaluation.to_dict()["data"]
    rows = [
        ["model", f"{escape(m.name)}<br><code>{escape(m.file)}</code><br><code>sha256 {m.sha256}</code>"]
        for m in evaluation.models
    ]
    rows.append(["data", f"{escape(_data_line(evaluation))}<br><code>labels sha256 {data['fingerprint']}</code>"])
    listening = evaluation.listening
    fit = listening.fit or "as the checkpoint says"
    rows.append(["listening", f"short clips: {escape(fit)}; shifts: {listening.shifts}; {_ensemble(evaluation)}"])
    return _rows(("", ""), rows, 2)
