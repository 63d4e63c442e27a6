"""Count what a model detects in recordings that hold none of its classes.

    python benchmarks/false_alarms.py --model MODEL FOLDER...
    python benchmarks/false_alarms.py --model MODEL --esc ESC-50-master

Every event is a false alarm. Recordings that the model was trained on, also as backgrounds, tell too little of others:
``--esc`` takes the clips of ESC-50's classes that the model does not know. Clips of ``--skip`` classes are left out:
their sounds may be those of a class under another name. Beside each rate stands its 95 % interval (Poisson, as if
events came one by one): few minutes without an event do not say that there are none per hour.
"""

import argparse
import math
from collections import Counter
from pathlib import Path

from htsat.data.clips import is_recording
from htsat.data.corpora import open_corpus
from htsat.detection.decoder import decode_events
from htsat.errors import HtsatError
from htsat.predict import Predictor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="of recordings without its classes")
    parser.add_argument("--esc", type=Path, help="ESC-50's folder: the clips of other classes than the model's")
    parser.add_argument("--skip", default="", help="classes of ESC-50 to leave out, with commas between them")
    parser.add_argument("--model", default="default")
    parser.add_argument("--operating-point", action="append", help="default: the model's decoding and all its points")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    predictor = Predictor(options.model, threads=options.threads)
    decodings = {name: predictor.config.decoding_at(name) for name in options.operating_point or ()}
    if not decodings:
        decodings = {"decoding": predictor.config.decoding, **predictor.config.operating_points}
    recordings = {
        str(folder): [path for path in sorted(folder.iterdir()) if is_recording(path)] for folder in options.folders
    }
    if options.esc:
        left_out = {*options.skip.split(","), *predictor.labels}
        clips = open_corpus("esc50", options.esc).clips
        recordings[f"{options.esc} (other classes)"] = [clip.path for clip in clips if not left_out & set(clip.labels)]
    for name, paths in recordings.items():
        hours = 0.0
        found: dict[str, Counter[str]] = {point: Counter() for point in decodings}
        for path in paths:
            try:
                prediction = predictor.predict(path, spectrogram=False)
            except HtsatError as error:
                print(error)
                continue
            hours += prediction.duration / 3600
            times = prediction.frame_boundaries
            for point, decoding in decodings.items():
                events = decode_events(prediction.framewise_posteriors, times, predictor.labels, decoding)
                found[point].update(event.event_label for event in events)
        print(f"{name}: {len(paths)} recordings, {60 * hours:.1f} minutes")
        for point, counts in found.items():
            per_class = ", ".join(f"{label} {count / hours:.1f}" for label, count in counts.most_common())
            low, high = (bound / hours for bound in rate_interval(counts.total()))
            print(f"  {point}: {counts.total() / hours:.1f} ({low:.1f} to {high:.1f}) events per hour, "
                  f"{counts.total()} in all ({per_class or 'none'})")  # fmt: skip


def rate_interval(count: int) -> tuple[float, float]:
    """Return the expected numbers of events with which so few, or so many, have a probability of 2.5 %."""

    def at_most(number: int, expected: float) -> float:
        return math.fsum(math.exp(k * math.log(expected) - expected - math.lgamma(k + 1)) for k in range(number + 1))

    def solve(number: int, probability: float) -> float:
        low, high = 1e-9, 10.0 * (number + 2)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(number, middle) > probability else (low, middle)
        return middle

    return solve(count - 1, 0.975) if count else 0.0, solve(count, 0.025)


if __name__ == "__main__":
    main()
