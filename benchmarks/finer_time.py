"""Finer time steps without training: what shifted hearings bring, and by which rule they are best combined.

    python benchmarks/finer_time.py SOUNDSCAPES [--test OTHER] [--model MODEL] [--files 100]

SOUNDSCAPES and OTHER hold recordings of at most one chunk with ``strong.tsv``. Each is heard eight times, moved by
parts of a token; 1, 2, 4 or all of the hearings are combined. For each rule and metric the decoding (one threshold,
filter and gap for all classes) that is best on SOUNDSCAPES is applied to OTHER, if it is given, once.

Rules, for a frame that is a fraction of a token:

* centre: the token that has its middle there (the product's rule);
* mean, logits, median, least, most: of all tokens that cover it (logits: the mean of the logits);
* deconvolved: Richardson and Lucy's iteration, which undoes the mean over a token and stays positive;
* interpolated: no shifts at all, straight lines between the middles of the tokens.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from htsat.config import CheckpointConfig, DecodingConfig
from htsat.data.corpora import open_corpus
from htsat.data.reading import ClipReader
from htsat.detection.decoder import decode_events
from htsat.hearing import centred, frame_boundaries, frame_posteriors, heard_chunks
from htsat.metrics.detection import event_based, intersection_based
from htsat.predict import Predictor

Array = NDArray[np.float32]
SHIFTS = 8
METRICS = {"event-based": event_based, "intersection": intersection_based}
GRID = [
    DecodingConfig(threshold, threshold * off, median, 0.0, gap)
    for threshold, off, median, gap in itertools.product(
        (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.96), (1.0, 0.5, 0.2), (0.0, 0.3125, 0.9375), (0.0, 0.35)
    )
]


def covering(rows: Array, num_frames: int, shifts: int) -> Array:
    """Return (num_frames, shifts, num_classes): what each token says that covers a frame."""
    index = np.arange(num_frames)[:, None] + np.arange(shifts)
    return rows[np.minimum(index, len(rows) - 1)]


def logit_mean(rows: Array, num_frames: int, shifts: int) -> Array:
    clipped = np.clip(covering(rows, num_frames, shifts).astype(np.float64), 1e-9, 1 - 1e-7)
    return np.asarray(1 / (1 + np.exp(-np.log(clipped / (1 - clipped)).mean(1))), np.float32)


def near_mean(rows: Array, num_frames: int, shifts: int) -> Array:
    """Return the mean of the logits of those tokens whose middle is at most a quarter of a token away."""
    kept = shifts // 2 + 1 - (shifts // 2 + 1 + shifts) % 2
    first = (shifts - kept) // 2
    index = np.minimum(np.arange(num_frames)[:, None] + np.arange(first, first + kept), len(rows) - 1)
    clipped = np.clip(rows[index].astype(np.float64), 1e-9, 1 - 1e-7)
    return np.asarray(1 / (1 + np.exp(-np.log(clipped / (1 - clipped)).mean(1))), np.float32)


def deconvolved(rows: Array, num_frames: int, shifts: int) -> Array:
    """Return frames whose means over tokens are what the tokens say, nearly: few steps, so that noise stays small."""
    padded = num_frames + 2 * (shifts - 1)  # the frames before and behind that some token reaches
    tokens = np.concatenate([rows, np.repeat(rows[-1:], shifts, 0)])[: padded - shifts + 1].astype(np.float64)
    cover = np.arange(len(tokens))[:, None] + np.arange(shifts)
    weight = np.zeros(padded)
    np.add.at(weight, cover, 1 / shifts)
    frames = np.full((padded, rows.shape[1]), 0.5)
    for _ in range(8):
        ratio = tokens / np.maximum(frames[cover].mean(1), 1e-9)
        back = np.zeros_like(frames)
        for part in range(shifts):
            back[part : part + len(tokens)] += ratio / shifts
        frames *= back / weight[:, None]
    return np.clip(frames[shifts - 1 : shifts - 1 + num_frames], 0, 1).astype(np.float32)


def interpolated(rows: Array, num_frames: int, shifts: int) -> Array:
    """Return straight lines between the middles of the unmoved tokens."""
    tokens = rows[shifts - 1 :: shifts]
    middles = (np.arange(len(tokens)) + 0.5) * shifts
    at = np.arange(num_frames) + 0.5
    return np.stack([np.interp(at, middles, column) for column in tokens.T], 1).astype(np.float32)


RULES: dict[str, Callable[[Array, int, int], Array]] = {
    "centre": lambda rows, count, shifts: centred(rows.copy(), count, shifts),
    "mean": lambda rows, count, shifts: covering(rows, count, shifts).mean(1),
    "logits": logit_mean,
    "near": near_mean,
    "median": lambda rows, count, shifts: np.median(covering(rows, count, shifts), axis=1),
    "least": lambda rows, count, shifts: covering(rows, count, shifts).min(1),
    "most": lambda rows, count, shifts: covering(rows, count, shifts).max(1),
    "deconvolved": deconvolved,
    "interpolated": interpolated,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """Recordings as the model hears them: rows of tokens in steps of a ``SHIFTS``-th token, and what is true."""

    rows: list[Array]
    durations: list[float]
    reference: dict[str, list]


def hear(folder: Path, count: int | None, predictor: Predictor) -> Material:
    """Let the model hear recordings ``SHIFTS`` times."""
    config = predictor.config
    clips = [clip for clip in open_corpus("strong", folder).clips if clip.events is not None][:count]
    reader = ClipReader(config.frontend.sample_rate)
    rows, durations = [], []
    for clip in clips:
        waveform = reader.read(clip)
        answers = np.empty((config.heard_tokens, SHIFTS, len(config.labels)), np.float32)
        for chunk in heard_chunks([waveform], config):
            assert not chunk.start_token, f"{clip.path}: longer than a chunk"
            answers[:, SHIFTS - 1 - chunk.shift] = frame_posteriors(
                predictor._backend(chunk.samples[None])[1][0], config
            )
        rows.append(answers.reshape(-1, len(config.labels)))
        durations.append(len(waveform) / config.frontend.sample_rate)
    return Material(rows, durations, {str(clip.path): list(clip.events or ()) for clip in clips})


def posteriors(material: Material, rule: str, shifts: int, config: CheckpointConfig) -> list[tuple[Array, Array]]:
    """Return framewise posteriors and boundaries of each recording by a rule, with ``shifts`` of its hearings."""
    config = dataclasses.replace(config, inference=dataclasses.replace(config.inference, shifts=shifts))
    result = []
    for rows, duration in zip(material.rows, material.durations, strict=True):
        seconds = config.heard_samples / config.frontend.sample_rate / config.heard_frames
        count = int(np.ceil(duration / seconds - 1e-6))
        # of eight rows to a token those of the hearings that are used; the last one is the unmoved one
        kept = rows[SHIFTS // shifts - 1 :: SHIFTS // shifts]
        result.append((RULES[rule](kept, count, shifts), frame_boundaries(count, duration, config)))
    return result


def score(said: Sequence[tuple[Array, Array]], material: Material, labels: Sequence[str], decoding: DecodingConfig):
    """Return macro F1 by metric."""
    estimated = {
        name: decode_events(frames, boundaries, labels, decoding)
        for name, (frames, boundaries) in zip(material.reference, said, strict=True)
    }
    scored = sorted({event.event_label for events in material.reference.values() for event in events})
    return {name: metric(material.reference, estimated, labels=scored).macro_f1 for name, metric in METRICS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--model", default="default")
    parser.add_argument("--files", type=int, default=100, help="of the first folder")
    parser.add_argument("--rules", nargs="*", default=list(RULES))
    options = parser.parse_args()

    predictor = Predictor(options.model, threads=1)
    inference = dataclasses.replace(predictor.config.inference, shifts=SHIFTS)
    predictor.config = config = dataclasses.replace(predictor.config, inference=inference)
    tuned_on = hear(options.folder, options.files, predictor)
    tested_on = hear(options.test, None, predictor) if options.test else None
    print(f"{'rule':14}{'hearings':>9}  {'metric':14}{'tuned':>7}{'test':>7}  decoding")
    for rule in options.rules:
        for shifts in {"interpolated": (SHIFTS,), "centre": (1, 2, 4, SHIFTS)}.get(rule, (4, SHIFTS)):
            said = posteriors(tuned_on, rule, shifts, config)
            scores = [score(said, tuned_on, config.labels, decoding) for decoding in GRID]
            for metric in METRICS:
                best = max(range(len(GRID)), key=lambda index: scores[index][metric])
                test = ""
                if tested_on is not None:
                    again = posteriors(tested_on, rule, shifts, config)
                    test = f"{score(again, tested_on, config.labels, GRID[best])[metric]:.4f}"
                chosen = GRID[best]
                print(
                    f"{rule:14}{1 if rule == 'interpolated' else shifts:>9}  {metric:14}"
                    f"{scores[best][metric]:7.4f}{test:>7}  from {chosen.threshold:g} to {chosen.threshold_off:.3g}, "
                    f"median {chosen.median_seconds:g} s, gap {chosen.min_gap:g} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
