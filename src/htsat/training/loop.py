"""The training loop, in execution order, and its run folder.

A run folder holds ``recipe.json`` (resolved), ``log.jsonl`` (one line per log interval),
``state.pt`` (to resume from), and at the end ``model.safetensors`` and ``report.json``.
Scenes, augmentation and dropout of a step depend on the seed and the step alone, so that a
resumed run goes on exactly as the uninterrupted one; lines of the log behind the resumed state are cut.
"""

import json
import math
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from htsat.data.augment import random_equaliser, spec_augment
from htsat.errors import CheckpointError, HtsatError, OutputError
from htsat.files import write_atomic
from htsat.model.checkpoint import save_checkpoint
from htsat.model.htsat import HTSAT, pool_tokens
from htsat.training.material import Material, load_material, training_scene
from htsat.training.recipe import Recipe, TrainConfig, recipe_json
from htsat.training.validate import score_held_out


@dataclass(frozen=True)
class Step:
    """What is told of a training step: losses, gradient norm, learning rate and scenes per second."""

    step: int
    steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    scenes_per_second: float


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step counted from 0: linear warm-up, then half a cosine to 0."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters: matrices and kernels decay; biases, norms and relative position tables do not."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        small = parameter.ndim < 2 or name.endswith("relative_position_bias_table")
        (rest if small else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def losses(model: HTSAT, framewise: Tensor, targets: Tensor, config: TrainConfig) -> Tensor:
    """Return the loss of token logits (batch, num_tokens, num_classes) against targets of the same shape in [0, 1]."""
    framewise = framewise.float()
    strong = binary_cross_entropy_with_logits(framewise, targets)
    clipwise = pool_tokens(framewise, model.config.clip_pooling)
    weak = binary_cross_entropy_with_logits(clipwise, targets.amax(1))
    # Which class it is, on the tokens where one sounds alone: a far clearer signal early on than many
    # independent yes-or-no questions whose answer is nearly always no.
    alone = ((targets > 0).sum(2) == 1) & (targets.amax(2) == 1)
    single = cross_entropy(framewise[alone], targets[alone].argmax(1)) if alone.any() else framewise.sum() * 0
    return config.strong_weight * strong + config.weak_weight * weak + config.single_weight * single


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    on_step: Callable[[Step], None] = lambda step: None,
    on_progress: Callable[[str, float], None] = lambda line, share: None,
) -> Path:
    """Train a model.

    Args:
        recipe: what to do.
        data: folder that the recipe's data folders lie in.
        out: run folder; made if absent.
        resume: go on from ``out/state.pt``.
        on_step: told of every step.
        on_progress: told of reading and scoring.

    Returns:
        The finished checkpoint, ``out/model.safetensors``.

    Raises:
        OutputError: the run folder cannot be written, or already holds a run and ``resume`` is False.
        CheckpointError: there is nothing to resume, it is damaged, or it belongs to another recipe.
        DataError, AudioError: the data are incomplete.
        HtsatError: the gradient is no longer finite; the last saved state stays as it was.
    """
    config = recipe.train
    state_path, log_path = out / "state.pt", out / "log.jsonl"
    _open_run_folder(out, recipe, resume)
    try:
        material = load_material(recipe, data, on_progress)
    except BaseException:
        if not resume:
            # Nothing was trained: once the data are mended, the same command must work again.
            (out / "recipe.json").unlink(missing_ok=True)
        raise

    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    try:
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        model = HTSAT(recipe.frontend, recipe.model).train()
        model.set_prior(0.06)  # about the share of tokens that a class is on
        average = HTSAT(recipe.frontend, recipe.model).eval()
        average.load_state_dict(model.state_dict())
        optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.learning_rate)
        start = _restore(state_path, model, average, optimizer, config.steps) if resume else 0
        _cut_log(log_path, start)

        saved = time.monotonic()
        for step in range(start, config.steps):
            began = time.monotonic()
            waveforms, targets = _batch(recipe, material, step)
            torch.manual_seed(config.seed + 1_000_003 * (step + 1))  # of stochastic depth
            rng = np.random.default_rng((config.seed, step, 2))
            with torch.no_grad():
                log_mel = random_equaliser(model.frontend(waveforms), rng, config.equaliser_db)
            features = model.normalise(model.stretch(log_mel))
            features = spec_augment(
                features,
                rng,
                time_masks=config.time_masks,
                max_frames=config.max_frames,
                mel_masks=config.mel_masks,
                max_mels=config.max_mels,
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
                _, framewise = model.classify(model.encode(features))
            assert framewise is not None  # a recipe has classes
            loss = losses(model, framewise, targets, config)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm))
            if not math.isfinite(norm):
                raise HtsatError(
                    f"{out}: step {step + 1}: the gradient is not finite; "
                    "begin a new run with a lower train.learning_rate"
                )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _update_average(average, model, config.average_decay, step)

            seconds = time.monotonic() - began
            rate = learning_rate(step, config)
            told = Step(step + 1, config.steps, float(loss.detach()), norm, rate, len(targets) / seconds)
            on_step(told)
            _append(log_path, told)
            if time.monotonic() - saved > config.save_seconds or step + 1 == config.steps:
                _save_state(state_path, model, average, optimizer, step + 1)
                saved = time.monotonic()
        report = score_held_out(average, recipe, material, on_progress)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random_state)

    write_atomic(out / "report.json", json.dumps(report, indent=1) + "\n")
    checkpoint = recipe.checkpoint(
        {"recipe": recipe.description, "steps": config.steps, "seed": config.seed, "report": report}
    )
    save_checkpoint(out / "model.safetensors", average, checkpoint, dtype="float16")
    return out / "model.safetensors"


def _batch(recipe: Recipe, material: Material, step: int) -> tuple[Tensor, Tensor]:
    size = recipe.train.batch_size
    scenes = [training_scene(recipe, material, step * size + i) for i in range(size)]
    return (
        torch.from_numpy(np.stack([waveform for waveform, _ in scenes])),
        torch.from_numpy(np.stack([targets for _, targets in scenes])),
    )


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the model; early steps count more, so that the start is forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
        mine.lerp_(theirs, 1 - decay)
    for buffer, new in zip(average.buffers(), model.buffers(), strict=True):
        if buffer.is_floating_point():
            buffer.lerp_(new, 1 - decay)
        else:
            buffer.copy_(new)


def _open_run_folder(out: Path, recipe: Recipe, resume: bool) -> None:
    recipe_path = out / "recipe.json"
    if resume:
        try:
            kept = recipe_path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            raise CheckpointError(f"{out}: nothing to resume: it holds no recipe.json; leave out --resume") from None
        if kept != recipe_json(recipe):
            raise CheckpointError(
                f"{out}: holds a run of another recipe{_difference(kept, recipe)}; "
                "resume it with that one, or choose another --out"
            )
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any((out / name).exists() for name in ("recipe.json", "state.pt", "model.safetensors")):
            raise OutputError(f"{out}: already holds a run; pass --resume to go on with it, or choose another --out")
    except OSError as error:
        raise OutputError(f"{out}: the run folder cannot be made: {error.strerror}; choose another --out") from None
    write_atomic(recipe_path, recipe_json(recipe))


def _difference(kept: str, recipe: Recipe) -> str:
    """Return in which settings the recipe text of a run folder differs, if it can be told."""
    try:
        before, now = _flat(json.loads(kept)), _flat(json.loads(recipe_json(recipe)))
    except (ValueError, RecursionError):
        return ""
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    return f" (other {', '.join(names[:3])}{' ...' if len(names) > 3 else ''})" if names else ""


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _restore(path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> int:
    """Load a saved state and return how many steps it has behind it."""
    if not path.exists():
        return 0  # stopped before the first save: the run begins again
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step = int(state["step"])
        if not 0 <= step <= steps:
            raise ValueError(f"step {step} of {steps}")
        return step
    # Whatever a damaged file makes of the reader; the remedy is the same.
    except (
        OSError,
        EOFError,
        RuntimeError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be resumed: the file is damaged ({reason}); "
            "delete it and pass --resume to begin this run again"
        ) from None


def _save_state(path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path}: the training state cannot be saved: {error}; free space and use --resume") from None


def _cut_log(path: Path, steps: int) -> None:
    """Keep one line of the log per step up to ``steps``: what came after the saved state is made again."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}; mend its permissions") from None
    kept: dict[int, str] = {}
    for line in lines:
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, TypeError, LookupError):
            continue  # the line that the end of the process cut off
        if line.endswith("\n") and step <= steps:
            kept[step] = line  # the last one counts: its step led to the saved state
    if len(kept) < len(lines):
        write_atomic(path, "".join(kept[step] for step in sorted(kept)))


def _append(path: Path, step: Step) -> None:
    record = {
        "step": step.step,
        "loss": round(step.loss, 6),
        "gradient_norm": round(step.gradient_norm, 4),
        "learning_rate": step.learning_rate,
        "scenes_per_second": round(step.scenes_per_second, 2),
    }
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}; free space and use --resume"
        ) from None
