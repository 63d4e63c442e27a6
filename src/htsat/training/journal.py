"""Curves for people: TensorBoard, and Weights & Biases where the recipe asks for it.

The exact record of a run is ``log.jsonl``; these follow it. TensorBoard's writer is part of the extra ``train``;
without it there are no curves, which is said once.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsat.config import to_dict
from htsat.errors import UsageError
from htsat.training.recipe import Recipe

if TYPE_CHECKING:
    from htsat.training.loop import Step

#: steps between points of the curves
EVERY = 10


def has_tensorboard() -> bool:
    """Return whether TensorBoard's writer is installed."""
    return importlib.util.find_spec("tensorboard") is not None


class Journal:
    """Writers of curves.

    Args:
        recipe: of the run.
        out: run folder; TensorBoard's files lie in ``tensorboard`` below it.
        start: steps that are done already; curves behind them are dropped.
        on_note: told what a person should know.

    Raises:
        UsageError: the recipe asks for Weights & Biases and it is not installed.
    """

    def __init__(self, recipe: Recipe, out: Path, start: int, on_note: Callable[[str], None]) -> None:
        self._on_note = on_note
        self._board: Any = None
        self._wandb: Any = None
        if has_tensorboard():
            from torch.utils.tensorboard import SummaryWriter

            try:
                self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start or None)
            except OSError as error:
                self._give_up(error)
        if recipe.train.wandb:
            try:
                wandb = importlib.import_module("wandb")
            except ImportError:
                raise UsageError(
                    "train.wandb needs Weights & Biases: pip install 'htsat[wandb]', or set train.wandb = ''"
                ) from None
            name = re.sub(r"[^A-Za-z0-9_-]", "-", out.resolve().name)
            self._wandb = wandb.init(
                project=recipe.train.wandb, id=name, name=name, dir=str(out), config=to_dict(recipe), resume="allow"
            )

    def step(self, step: "Step") -> None:
        """Draw a training step."""
        if step.step % EVERY and step.step != step.steps:
            return
        values = {
            "train/loss": step.loss,
            "train/gradient_norm": step.gradient_norm,
            "train/learning_rate": step.learning_rate,
            "train/clips_per_second": step.clips_per_second,
        }
        self._draw(values, step.step)

    def selection(self, step: int, name: str, score: float) -> None:
        """Draw a score on the selection split."""
        self._draw({f"selection/{name}": score}, step)

    def _draw(self, values: dict[str, float], step: int) -> None:
        if self._board is not None:
            try:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)
            except OSError as error:
                self._give_up(error)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def _give_up(self, error: OSError) -> None:
        """Go on without curves: the exact record lies elsewhere, and tells itself when it cannot be written."""
        self._board = None
        self._on_note(f"no more curves for TensorBoard: they cannot be written ({error.strerror or error})")

    def close(self) -> None:
        """Finish the files."""
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                self._give_up(error)
        if self._wandb is not None:
            self._wandb.finish()
