"""Making posteriors mean what they say: scale and bias of each class's logits, fitted by maximum likelihood.

Of models of several labels each class gets ``scale * logit + bias`` (Platt, 1999); of models of exactly one label all
classes share one scale, the inverse of a temperature (Guo et al., ICML 2017, arXiv 1706.04599). Both are convex, small
problems, solved by Newton's method; a Gaussian prior of standard deviation 1 around the identity keeps the answer
finite where few examples, or perfectly separated ones, would drive it away. A calibration is kept only where it is
better on recordings that it was not fitted on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from htsat.config import LogitCalibration
from htsat.errors import DataError
from htsat.events import Event
from htsat.metrics.tagging import brier_score, calibration_curve

Floats = NDArray[np.float64]

#: largest logit that a float32 posterior below 1 tells apart, rounded up; smaller posteriors say no more than that
_LARGEST_LOGIT = 30.0
#: the least that a class needs on either side, with the label and without
_MIN_EXAMPLES = 5
_MAX_STEPS = 100


@dataclass(frozen=True)
class ProbabilityFigures:
    """How well posteriors tell probabilities: means over the classes (or of the one label); 0 is best in all.

    Attributes:
        nll: negative log-likelihood, nats for each example.
        brier_score: mean squared distance of posterior and truth; with one label their sum over the classes.
        calibration_error: ECE, bins of equal mass; with one label of the confidence in the most probable one.
    """

    nll: float
    brier_score: float
    calibration_error: float


@dataclass(frozen=True)
class ProbabilityCalibration:
    """A calibration and what it changes.

    Attributes:
        calibration: of the model's logits.
        classes: the labels whose logits it changes; with one label all of them.
        before: figures without it.
        after: figures with it, on the examples that it was fitted on.
        cross_validated: figures of examples that it was not fitted on.
    """

    calibration: LogitCalibration
    classes: tuple[str, ...]
    before: ProbabilityFigures
    after: ProbabilityFigures
    cross_validated: ProbabilityFigures

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values; the calibration is in the checkpoint."""
        figures = {name: asdict(getattr(self, name)) for name in ("before", "after", "cross_validated")}
        return {"classes": list(self.classes), **figures}


def logits_of(posteriors: ArrayLike) -> Floats:
    """Return the logits that a sigmoid made these posteriors of, from -30 to 30."""
    values = np.asarray(posteriors, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.asarray(np.clip(np.log(values) - np.log1p(-values), -_LARGEST_LOGIT, _LARGEST_LOGIT))


def frame_truth(events: Sequence[Event], boundaries: Floats, labels: Sequence[str]) -> NDArray[np.bool_]:
    """Return in which frames each class sounds, (num_frames, num_classes): in those whose middle an event holds."""
    middle = (boundaries[1:] + boundaries[:-1]) / 2
    truth = np.zeros((len(middle), len(labels)), dtype=np.bool_)
    place = {label: i for i, label in enumerate(labels)}
    for event in events:
        if event.event_label in place:
            truth[(middle >= event.onset) & (middle < event.offset), place[event.event_label]] = True
    return truth


def fit_platt(logits: ArrayLike, truth: ArrayLike, weight: float = 1.0) -> tuple[float, float]:
    """Return scale and bias that make a class's logits tell its probability.

    Args:
        logits: (num_examples,).
        truth: (num_examples,) of 0 and 1.
        weight: what an example counts against the prior: less than 1 where neighbours say the same.

    Returns:
        ``(1.0, 0.0)`` where a larger logit does not mean a larger probability.
    """
    x, y = np.asarray(logits, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    design = np.stack([x, np.ones_like(x)])
    start = np.array([1.0, 0.0])

    def loss(at: Floats) -> float:
        z = at @ design
        return float(weight * np.sum(np.logaddexp(0, z) - y * z) + np.sum((at - start) ** 2) / 2)

    def slopes(at: Floats) -> tuple[Floats, Floats]:
        p = np.exp(-np.logaddexp(0, -(at @ design)))
        gradient = weight * design @ (p - y) + at - start
        curvature = weight * (design * (p * (1 - p))) @ design.T + np.eye(2)
        return gradient, curvature

    scale, bias = _newton(start, loss, slopes)
    return (float(scale), float(bias)) if 0.01 <= scale <= 100 and abs(bias) <= 100 else (1.0, 0.0)


def fit_temperature(log_posteriors: ArrayLike, truth: ArrayLike, weight: float = 1.0) -> float:
    """Return the scale (the inverse of a temperature) that makes posteriors adding up to 1 tell probabilities.

    Args:
        log_posteriors: (num_examples, num_classes), or the logits.
        truth: (num_examples,) class of each.
        weight: see ``fit_platt``.
    """
    x, y = np.asarray(log_posteriors, dtype=np.float64), np.asarray(truth, dtype=np.intp)
    own = x[np.arange(len(x)), y]
    start = np.array([1.0])

    def loss(at: Floats) -> float:
        z = at[0] * x
        return float(weight * np.sum(_log_sum_exp(z) - at[0] * own) + (at[0] - 1) ** 2 / 2)

    def slopes(at: Floats) -> tuple[Floats, Floats]:
        z = at[0] * x
        p = np.exp(z - _log_sum_exp(z)[:, None])
        mean = (p * x).sum(axis=1)
        variance = (p * x**2).sum(axis=1) - mean**2
        return np.array([weight * np.sum(mean - own) + at[0] - 1]), np.array([[weight * variance.sum() + 1]])

    return float(np.clip(_newton(start, loss, slopes)[0], 0.01, 100))


def _log_sum_exp(values: Floats) -> Floats:
    top = values.max(axis=1, keepdims=True)
    return np.asarray((top + np.log(np.exp(values - top).sum(axis=1, keepdims=True)))[:, 0])


def _newton(
    start: Floats, loss: Callable[[Floats], float], slopes: Callable[[Floats], tuple[Floats, Floats]]
) -> Floats:
    """Return where a strictly convex function is least; each step is halved until it leads down."""
    at, value = start, loss(start)
    for _ in range(_MAX_STEPS):
        gradient, curvature = slopes(at)
        step = np.linalg.solve(curvature, gradient)
        if gradient @ step < 1e-12 * max(1.0, abs(value)):
            break
        length = 1.0
        while (lower := loss(at - length * step)) > value - 1e-4 * length * float(gradient @ step) and length > 1e-9:
            length /= 2
        at, value = at - length * step, lower
    return at


def calibrate_several(
    posteriors: ArrayLike,
    truth: ArrayLike,
    folds: ArrayLike,
    columns: Sequence[int],
    labels: Sequence[str],
    weight: float = 1.0,
) -> ProbabilityCalibration:
    """Calibrate posteriors that a sigmoid made: scale and bias for each class that has enough examples.

    Args:
        posteriors: (num_examples, num_columns), those of the classes that the data knows.
        truth: (num_examples, num_columns) of 0 and 1.
        folds: (num_examples,) group of each in the cross-validation, from 0.
        columns: which class of the model each column is.
        labels: all classes of the model.
        weight: see ``fit_platt``.

    Raises:
        DataError: there is nothing to fit on.
    """
    logits, wanted, groups = logits_of(posteriors), np.asarray(truth, dtype=np.bool_), np.asarray(folds)
    if not logits.size:
        raise DataError("there is nothing to calibrate on; give labelled recordings")
    scale, bias = np.ones(len(labels)), np.zeros(len(labels))
    after, held_out = logits.copy(), logits.copy()
    changed = []
    for i, column in enumerate(columns):
        x, y = logits[:, i], wanted[:, i]
        if min(y.sum(), len(y) - y.sum()) * weight < _MIN_EXAMPLES:
            continue
        unseen = x.copy()
        for group in np.unique(groups):
            inside = groups == group
            a, b = fit_platt(x[~inside], y[~inside], weight)
            unseen[inside] = a * x[inside] + b
        if _nll(unseen, y) >= _nll(x, y):
            continue
        # Six digits: what is stored is what was used.
        scale[column], bias[column] = (round(value, 6) for value in fit_platt(x, y, weight))
        after[:, i], held_out[:, i] = scale[column] * x + bias[column], unseen
        changed.append(labels[column])
    calibration = LogitCalibration()
    if changed:
        calibration = LogitCalibration(tuple(scale.tolist()), tuple(bias.tolist()))
    figures = [_figures(values, wanted) for values in (logits, after, held_out)]
    return ProbabilityCalibration(calibration, tuple(changed), *figures)


def calibrate_one(
    posteriors: ArrayLike, truth: ArrayLike, folds: ArrayLike, labels: Sequence[str], weight: float = 1.0
) -> ProbabilityCalibration:
    """Calibrate posteriors that add up to 1 over the classes: one scale of all logits.

    Args:
        posteriors: (num_examples, num_classes), all classes of the model.
        truth: (num_examples,) class of each.
        folds: (num_examples,) group of each in the cross-validation, from 0.
        labels: all classes of the model.
        weight: see ``fit_platt``.

    Raises:
        DataError: there is nothing to fit on.
    """
    values, own, groups = np.asarray(posteriors, dtype=np.float64), np.asarray(truth, dtype=np.intp), np.asarray(folds)
    if not len(own):
        raise DataError("there is nothing to calibrate on; give labelled recordings")
    logs = np.log(np.maximum(values, math.exp(-4 * _LARGEST_LOGIT)))
    unseen = logs.copy()
    for group in np.unique(groups):
        inside = groups == group
        unseen[inside] *= fit_temperature(logs[~inside], own[~inside], weight)
    scale = round(fit_temperature(logs, own, weight), 6)
    before, held_out = _one_label_figures(logs, own), _one_label_figures(unseen, own)
    if held_out.nll >= before.nll:
        return ProbabilityCalibration(LogitCalibration(), (), before, before, before)
    return ProbabilityCalibration(
        LogitCalibration((scale,)), tuple(labels), before, _one_label_figures(scale * logs, own), held_out
    )


def _nll(logits: Floats, truth: NDArray[np.bool_]) -> float:
    return float(np.mean(np.logaddexp(0, logits) - truth * logits))


def _figures(logits: Floats, truth: NDArray[np.bool_]) -> ProbabilityFigures:
    posteriors = np.exp(-np.logaddexp(0, -logits))
    errors = [calibration_curve(t, p, binning="equal_mass").error for t, p in zip(truth.T, posteriors.T, strict=True)]
    return ProbabilityFigures(_nll(logits, truth), float(brier_score(truth, posteriors).mean()), float(np.mean(errors)))


def _one_label_figures(logs: Floats, own: NDArray[np.intp]) -> ProbabilityFigures:
    normal = logs - _log_sum_exp(logs)[:, None]
    posteriors = np.exp(normal)
    chosen = posteriors.argmax(axis=1)
    confidence = np.minimum(posteriors.max(axis=1), 1.0)
    truth = own[:, None] == np.arange(logs.shape[1])
    return ProbabilityFigures(
        -float(normal[np.arange(len(own)), own].mean()),
        float(brier_score(truth, posteriors).sum()),
        calibration_curve(chosen == own, confidence, binning="equal_mass").error,
    )
