"""Count what a model detects in recordings that hold none of its classes.

    python benchmarks/false_alarms.py --model MODEL FOLDER...
    python benchmarks/false_alarms.py --model MODEL --esc ESC-50-master

Every event is a false alarm. Recordings that the model was trained on, also as backgrounds, tell too little of others:
``--esc`` takes the clips of ESC-50's classes that the model does not know. Clips of ``--skip`` classes are left out:
their sounds may be those of a class under another name.
"""

import argparse
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
            print(f"  {point}: {counts.total() / hours:.1f} events per hour ({per_class or 'none'})")


if __name__ == "__main__":
    main()
