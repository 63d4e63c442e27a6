"""``htsat train``: a model from a recipe and labelled recordings."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from htsat.commands.console import Progress, tell
from htsat.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from htsat.training.loop import Step
    from htsat.training.recipe import Recipe

#: figures that a finished run shows, the most important ones first
SHOWN = (
    "accuracy", "mean_average_precision", "mean_roc_auc", "macro_f1", "accuracy_pad", "accuracy_tile",
    "intersection_macro_f1", "event_based_macro_f1", "psds1", "psds2",
)  # fmt: skip


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="audioset, desed, esc50, everyday, folder (your own recordings), speech_commands, or a TOML file.",
        ),
    ],
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="The corpus, or the folder that the recipe's folders lie in.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Run folder: log, state to resume from, finished model, report.",
            show_default="runs/RECIPE",
        ),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Train as the released code of the paper does, every quirk included.")
    ] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting of the recipe.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--start", metavar="MODEL", help="Weights to start from: a name, a checkpoint, published weights."
        ),
    ] = None,
    folds: Annotated[
        str | None, typer.Option(metavar="all|1,2,...", help="Cross-validate: hold out each of these folds in turn.")
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="1,2,...", help="Repeat with each of these seeds.", show_default="the recipe's"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, exactly where it was saved.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the resolved recipe and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Train a model by a recipe; stopped runs go on with --resume exactly where they were saved.

    On several GPUs or machines start it with torchrun: torchrun --nproc-per-node 8 -m htsat train RECIPE ...
    """
    from htsat.training.folds import cross_validate
    from htsat.training.loop import TerminatedError
    from htsat.training.recipe import load_recipe, recipe_json

    overrides = [*(set_ or []), *([f"start.model={json.dumps(start)}"] if start else [])]
    try:
        settings = load_recipe(recipe, overrides, published=published)
    except ConfigError as error:
        raise UsageError(str(error)) from None
    if show:
        print(recipe_json(settings), end="")
        return
    target = out or Path("runs") / Path(recipe).stem
    try:
        if folds is None and seeds is None:
            path = _train_one(settings, data, target, resume)
            if _is_first():
                _report(target, as_json)
                print(path)
                tell(f"done; try it: htsat tag --model {path} RECORDING")
            return
        chosen_seeds = [settings.train.seed] if seeds is None else _numbers(seeds, "--seeds")
        summary = cross_validate(
            settings,
            data,
            target,
            None if folds in (None, "all") else _numbers(folds or "", "--folds"),
            chosen_seeds,
            resume=resume,
            run=lambda one, folder, again: _train_one(one, data, folder, again),
            on_note=tell if _is_first() else lambda line: None,
        )
    except TerminatedError as error:
        tell(str(error))
        raise typer.Exit(128 + error.signal) from None
    if _is_first():
        _show_summary(summary, as_json)


def _is_first() -> bool:
    """Say whether this is the only process of a run, or the first: the others keep silent."""
    return os.environ.get("RANK", "0") == "0"


def _numbers(text: str, option: str) -> list[int]:
    """Return the numbers of a comma-separated list."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: expected whole numbers such as 1,2,3") from None
    if len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise UsageError(f"{option} {text}: expected different numbers, none below 0")
    return numbers


def _train_one(recipe: "Recipe", data: Path, out: Path, resume: bool) -> Path:
    """Run one training with progress on stderr."""
    from htsat.training.loop import train as run_training

    with Progress() as progress:

        def on_step(step: "Step") -> None:
            line = f"loss {step.loss:.4f}  lr {step.learning_rate:.2e}  {step.clips_per_second:.1f} clips/s"
            progress.update(f"step {step.step}/{step.steps}  {line}", step.step / step.steps, every=50)

        def on_note(line: str) -> None:
            progress.clear()
            tell(line)

        if not _is_first():
            return run_training(recipe, data, out, resume=resume)
        return run_training(
            recipe, data, out, resume=resume, on_step=on_step, on_progress=progress.update, on_note=on_note
        )


def _report(out: Path, as_json: bool) -> None:
    """Print what a finished run was scored."""
    from htsat.training.folds import figures

    text = (out / "report.json").read_text(encoding="utf-8")
    if as_json:
        sys.stdout.write(text)
        return
    found = figures(json.loads(text))
    for name in SHOWN:
        if name in found:
            print(f"{name.replace('_', ' '):<24} {found[name]:.4f}")


def _show_summary(summary: dict[str, Any], as_json: bool) -> None:
    """Print the scores of a cross-validation."""
    if as_json:
        print(json.dumps(summary, indent=1))
        return
    names = [name for name in SHOWN if name in summary["total"]][:4]
    width = max(len(name) for name in [*summary["runs"], "mean"])
    print("  ".join([" " * width, *names]))
    for run, found in summary["runs"].items():
        print(
            "  ".join([run.ljust(width), *(f"{found.get(name, float('nan')):.4f}".rjust(len(name)) for name in names)])
        )
    print(
        "  ".join(["mean".ljust(width), *(f"{summary['total'][name]['mean']:.4f}".rjust(len(name)) for name in names)])
    )
    if all(summary["total"][name]["deviation"] is not None for name in names):
        cells = (f"{summary['total'][name]['deviation']:.4f}".rjust(len(name)) for name in names)
        print("  ".join(["+-".ljust(width), *cells]))
