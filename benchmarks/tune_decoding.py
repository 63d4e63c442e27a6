"""Choose decoding settings on sounds that the models have not heard.

    python benchmarks/tune_decoding.py --data DATA RUN...

Each RUN is a folder of ``htsat train everyday --set data.test_fold=K``. Its model listens to scenes mixed
from the clips of fold K, which it was not trained on; the settings that give the best intersection-based
macro F1 over the scenes of all runs are printed as TOML for the recipe. A fold that is reported on (the
soundscapes of fold 4, say) must not be among the runs.
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import torch

from htsat.config import DecodingConfig, from_dict
from htsat.data.mix import SceneMixer, Source
from htsat.detection.decoder import decode_events
from htsat.events import Event
from htsat.grid import FrameGrid
from htsat.metrics.detection import intersection_based
from htsat.model.checkpoint import load_checkpoint
from htsat.training.material import load_material
from htsat.training.recipe import Recipe


def scenes_of(run: Path, data: Path, count: int) -> tuple[list, dict[str, list[Event]], Recipe]:
    """Return (name, posteriors) of each scene, the reference events, and the run's recipe."""
    recipe = from_dict(Recipe, json.loads((run / "recipe.json").read_text(encoding="utf-8")), str(run / "recipe.json"))
    fold = recipe.data.test_fold
    # Decoding may name the speech class, which is left out here, and is not used to mix scenes.
    held_out = dataclasses.replace(
        recipe, decoding=DecodingConfig(), data=dataclasses.replace(recipe.data, soundscapes=None, speech=None)
    )
    held_out = dataclasses.replace(
        held_out,
        data=dataclasses.replace(held_out.data, labels=tuple(x for x in recipe.data.labels if x != "speech")),
        model=dataclasses.replace(
            recipe.model, num_classes=recipe.model.num_classes - ("speech" in recipe.data.labels)
        ),
    )
    material = load_material(held_out, data, lambda line, share: None)
    rate = recipe.frontend.sample_rate
    sources = [Source(c.label, c.waveform, c.parts) for c in material.test_clips]
    mixer = SceneMixer(
        sources,
        material.mixer.backgrounds,
        sample_rate=rate,
        seconds=recipe.model.chunk_seconds,
        seed=10_000 + fold,
        config=dataclasses.replace(recipe.mix, easy_scenes=0, whole_clip=0.0, background=1.0),
    )
    model, _ = load_checkpoint(run / "model.safetensors")
    posteriors, reference = [], {}
    for index in range(count):
        waveform, events = mixer.scene(index)
        with torch.inference_mode():
            logits = model(torch.from_numpy(waveform).unsqueeze(0)).framewise_logits
        name = f"fold{fold}_{index:04d}"
        posteriors.append((name, logits[0].sigmoid().numpy()))
        reference[name] = events
    return posteriors, reference, recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=150, help="per run")
    options = parser.parse_args()

    posteriors, reference = [], {}
    for run in options.runs:
        more, events, recipe = scenes_of(run, options.data, options.scenes)
        posteriors += more
        reference |= events
    labels = recipe.data.labels
    grid = FrameGrid.uniform(recipe.model.chunk_seconds / posteriors[0][1].shape[0], recipe.model.chunk_seconds)
    scored = [label for label in labels if label != "speech"]

    def scores(config: DecodingConfig) -> dict[str, float]:
        estimated = {name: decode_events(p, grid.boundaries, labels, config) for name, p in posteriors}
        result = intersection_based(reference, estimated, labels=scored)
        # a class without an event in these few scenes counts nothing
        return {label: result.per_class[label].f1 if label in result.per_class else 0.0 for label in scored}

    def mean(per_class: dict[str, float]) -> float:
        return sum(per_class.values()) / len(per_class)

    tried = []
    for threshold, off, median, gap, least in itertools.product(
        (0.2, 0.3, 0.4, 0.5, 0.6, 0.7), (1.0, 0.5), (0.0, 0.9375, 1.5625), (0.0, 0.7), (0.0,)
    ):
        config = DecodingConfig(threshold, threshold * off, median, least, gap)
        tried.append((mean(scores(config)), config))
    best, config = max(tried, key=lambda pair: pair[0])
    print(
        f"# {len(posteriors)} scenes; plain 0.5: {mean(scores(DecodingConfig())):.4f}; one setting: {best:.4f} {config}"
    )

    # Then each class by itself: its F1 does not depend on the settings of the others.
    per_class: dict[str, dict[str, float]] = {label: {} for label in scored}
    final = scores(config)
    for threshold, off, median in itertools.product(
        [i / 20 for i in range(2, 18)], (1.0, 0.6), (0.0, 0.9375, 1.5625, 2.1875)
    ):
        settings = {"threshold": threshold, "threshold_off": round(threshold * off, 4), "median_seconds": median}
        for label, f1 in scores(config.changed(**settings)).items():
            if f1 > final[label] + 1e-9:
                final[label], per_class[label] = f1, settings
    print(f"# per class: {mean(final):.4f} " + ", ".join(f"{k} {v:.3f}" for k, v in final.items()))
    print("[decoding]")
    for key in ("threshold", "threshold_off", "median_seconds", "min_duration", "min_gap"):
        print(f"{key} = {getattr(config, key)}")
    print("\n[decoding.per_class]")
    for label, settings in per_class.items():
        if settings:
            print(f"{label} = {{ " + ", ".join(f"{k} = {v}" for k, v in settings.items()) + " }")


if __name__ == "__main__":
    main()
