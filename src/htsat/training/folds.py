"""Cross-validation: one run per fold and seed, and their summary."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from htsat.errors import UsageError
from htsat.files import write_atomic
from htsat.training.examples import folds_in
from htsat.training.recipe import Recipe, recipe_json

#: runs a recipe in a folder and returns its checkpoint
Train = Callable[[Recipe, Path, bool], Path]


def cross_validate(
    recipe: Recipe,
    data: Path,
    out: Path,
    folds: Sequence[int] | None,
    seeds: Sequence[int],
    *,
    resume: bool,
    run: Train,
    on_note: Callable[[str], None],
) -> dict[str, Any]:
    """Train one model per fold and seed, each in its own run folder below ``out``, and sum their scores up.

    Args:
        recipe: of all runs; its test fold and seed are replaced.
        data: data root.
        out: folder of the run folders ``fold1-seed1`` ... and of ``summary.json``.
        folds: which to hold out, one after the other; None: all there are.
        seeds: of the runs of each fold.
        resume: go on: finished runs are kept, an interrupted one continues.
        run: trains one.
        on_note: told what is done.

    Returns:
        The summary: the reports' figures per run, their mean over the folds for each seed, and mean and deviation of
        that over the seeds.

    Raises:
        UsageError: no such fold.
    """
    known = folds_in(recipe, data)
    chosen = known if folds is None else list(folds)
    if not chosen or (unknown := sorted(set(chosen) - set(known))):
        have = ", ".join(map(str, known)) or "none"
        wanted = "" if not chosen else f" {', '.join(map(str, unknown))}"
        raise UsageError(f"no fold{wanted} to hold out; there are {have}")
    reports: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        for fold in chosen:
            name = f"fold{fold}-seed{seed}"
            one = dataclasses.replace(
                recipe,
                data=dataclasses.replace(recipe.data, test_fold=fold),
                train=dataclasses.replace(recipe.train, seed=seed),
            )
            folder = out / name
            if resume and _is_finished(folder, one):
                on_note(f"{name}: finished before")
            else:
                on_note(f"{name}: training")
                run(one, folder, resume and (folder / "recipe.json").exists())
            reports[name] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            summary = _summary(reports, chosen, seeds)
            write_atomic(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _is_finished(folder: Path, recipe: Recipe) -> bool:
    """Return whether this very run is done."""
    try:
        kept = (folder / "recipe.json").read_text(encoding="utf-8")
    except OSError:
        return False
    done = (folder / "report.json").is_file() and (folder / "model.safetensors").is_file()
    return done and kept == recipe_json(recipe)


def figures(report: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a report that means can be taken of."""
    found = dict(report.get("tagging", report).get("figures", report))
    detection = report.get("detection") or {}
    for name, scores in detection.items():
        if isinstance(scores, dict) and isinstance(scores.get("macro_f1"), float):
            found[f"{name}_macro_f1"] = scores["macro_f1"]
    for name in ("psds1", "psds2"):
        if name in detection:
            found[name] = detection[name]["value"]
    if "frame_level" in detection:
        found["frame_mean_average_precision"] = detection["frame_level"]["mean_average_precision"]
    return {k: v for k, v in found.items() if isinstance(v, float)}


def _summary(reports: dict[str, dict[str, Any]], folds: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
    runs = {name: figures(report) for name, report in reports.items()}
    per_seed: dict[str, dict[str, float]] = {}
    for seed in seeds:
        done = [runs[f"fold{fold}-seed{seed}"] for fold in folds if f"fold{fold}-seed{seed}" in runs]
        if len(done) == len(folds):
            shared = set.intersection(*(set(found) for found in done))
            names = [name for name in done[0] if name in shared]
            per_seed[str(seed)] = {name: statistics.fmean(found[name] for found in done) for name in names}
    total = {}
    if per_seed:
        for name in next(iter(per_seed.values())):
            values = [found[name] for found in per_seed.values() if name in found]
            total[name] = {
                "mean": statistics.fmean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
            }
    return {"folds": list(folds), "seeds": list(seeds), "total": total, "per_seed": per_seed, "runs": runs}
