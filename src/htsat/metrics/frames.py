"""Scores of framewise posteriors, without any threshold or decoding.

Every frame of every file is one item to rank, and all frames count the same, however long they are. A class is active
in a frame if its events, overlaps counted once, cover at least half of the frame; time after the last frame is not
scored. On these items each class has the average precision and the area under the ROC curve of
``htsat.metrics.tagging`` (those of scikit-learn); the means are over the classes for which the figure is defined:
average precision needs an active frame, the ROC curve an active and an inactive one.

They tell how well the posteriors separate the time in which a class sounds from the time in which it does not. They
say nothing of boundaries or of events that fall to pieces, and long events count more than short ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from htsat.events import Event
from htsat.metrics.overlap import check_sides, joined, spans_by_label
from htsat.metrics.tagging import average_precision, roc_auc


@dataclass(frozen=True, eq=False)
class FrameScores:
    """Scores of framewise posteriors; see the module's conventions.

    Attributes:
        mean_average_precision: in [0, 1]; NaN if no class has an active frame.
        mean_roc_auc: in [0, 1]; NaN if no class has active and inactive frames.
        average_precision: (num_classes,); NaN where it is not defined.
        roc_auc: (num_classes,); NaN where it is not defined.
    """

    mean_average_precision: float
    mean_roc_auc: float
    average_precision: NDArray[np.float64]
    roc_auc: NDArray[np.float64]


def rasterised(events: Sequence[Event], labels: Sequence[str], boundaries: ArrayLike) -> NDArray[np.bool_]:
    """Return in which frames which class is active.

    Args:
        events: of one file; those of classes not in ``labels`` are left out.
        labels: of the classes.
        boundaries: (num_frames + 1,) seconds.

    Returns:
        (num_frames, num_classes); see the module's conventions.
    """
    edges = np.asarray(boundaries, dtype=np.float64)
    active = np.zeros((len(edges) - 1, len(labels)), dtype=np.bool_)
    by_label = spans_by_label({"": events}, labels, {"": 0})
    for column, label in enumerate(labels):
        if label not in by_label:
            continue
        spans = joined(by_label[label])
        # Seconds of events up to each boundary; rounding must not decide about halves.
        passed = np.clip(edges[:, None], spans.onset, spans.offset) - spans.onset
        active[:, column] = np.diff(passed.sum(axis=1)) >= 0.5 * np.diff(edges) - 1e-9
    return active


def frame_scores(
    reference: Mapping[str, Sequence[Event]],
    scores: Mapping[str, tuple[ArrayLike, ArrayLike]],
    labels: Sequence[str],
) -> FrameScores:
    """Score framewise posteriors against reference events (see the module's conventions).

    Args:
        reference: file name -> true events; a file that it does not name has none.
        scores: file name -> posteriors (num_frames, num_classes) and boundaries of the frames (num_frames + 1,) in
            seconds. The files that are scored. Any monotonic score may stand in for a posterior.
        labels: of the classes, in the order of the posteriors.

    Raises:
        ValueError: posteriors that do not fit their boundaries or the labels, NaN posteriors, or no frames at all.
        TypeError: events that are no mapping from file to events, or a single text as ``labels``.
    """
    check_sides(reference, labels)
    truth, posteriors = [], []
    for file, (given, boundaries) in scores.items():
        values = np.asarray(given)
        active = rasterised(reference.get(file, ()), labels, boundaries)
        if values.shape != active.shape:
            raise ValueError(
                f"{file!r}: expected posteriors of shape {active.shape} for these boundaries and labels, "
                f"got {values.shape}"
            )
        truth.append(active)
        posteriors.append(values)
    if not sum(map(len, truth)):
        raise ValueError("there are no frames to score")
    all_truth, all_posteriors = np.concatenate(truth), np.concatenate(posteriors)
    precision, area = average_precision(all_truth, all_posteriors), roc_auc(all_truth, all_posteriors)
    means = [float(np.mean(v[~np.isnan(v)])) if not np.isnan(v).all() else float("nan") for v in (precision, area)]
    return FrameScores(means[0], means[1], precision, area)
