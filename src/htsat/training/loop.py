"""The training loop, in execution order.

Order, augmentation and stochastic depth of a step depend on the seed and the step alone (``htsat.training.order``), so
that a resumed run goes on exactly as the uninterrupted one. What the run folder holds: ``htsat.training.runfolder``.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from htsat.data.augment import random_equaliser, spec_masks
from htsat.data.corpora import Clip
from htsat.errors import CheckpointError, HtsatError, OutputError
from htsat.evaluation.evaluate import Evaluation, ModelIdentity, fingerprint, identify
from htsat.evaluation.listen import Heard
from htsat.evaluation.report import html
from htsat.files import write_atomic
from htsat.model.architectures import build_model
from htsat.model.average import average_checkpoints
from htsat.model.base import SoundModel
from htsat.model.checkpoint import save_checkpoint
from htsat.model.runtime import pick_device
from htsat.training.distributed import Ranks, end_with_parent
from htsat.training.examples import (
    Example,
    Examples,
    RunData,
    check_quota,
    data_digest,
    open_run_data,
    seconds_of,
)
from htsat.training.folds import figures
from htsat.training.journal import Journal
from htsat.training.memory import keep_freed_memory
from htsat.training.optim import (
    clip_loss,
    distillation_loss,
    frame_losses,
    learning_rate,
    parameter_groups,
    update_average,
)
from htsat.training.order import MASKS, MIXUP, NETWORK, positions_of
from htsat.training.recipe import Recipe
from htsat.training.runfolder import RunFolder
from htsat.training.start import load_teacher, make_model, set_frozen
from htsat.training.validate import evaluate_clips, headline, listen, score_held_out

#: how long a resumed run waits for the folder: what is left of a killed one may take so long to end
LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Step:
    """What is told of a training step: losses, gradient norm, learning rate and clips per second."""

    step: int
    steps: int
    loss: float
    gradient_norm: float
    learning_rate: float
    clips_per_second: float


class TerminatedError(Exception):
    """A signal asked the run to end; its state is saved.

    Attributes:
        signal: the number of the signal.
    """

    def __init__(self, number: int) -> None:
        """Remember the signal."""
        super().__init__(f"ended by {signal.Signals(number).name}; the state is saved, pass --resume to go on")
        self.signal = number


@dataclass(frozen=True, eq=False)
class Batch:
    """A process's part of a batch: stacked examples."""

    waveforms: Tensor
    clip_targets: Tensor
    frame_targets: Tensor
    has_frames: Tensor
    teacher: Tensor | None
    examples: tuple[Example, ...]


class _Positions(Dataset[Any]):
    """Examples by position, for a loader whose worker processes make them."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __getitem__(self, position: int) -> Example | HtsatError:
        try:
            return self._examples.example(position)
        except HtsatError as error:
            return error  # raised by the loop: a worker's own exception would arrive as a page of text


def begin_worker(number: int) -> None:
    """Begin a process that prepares clips; it lives as long as its training process.

    Signals to the whole group (Ctrl-C, a batch system's) are the training process's to answer: it still needs the
    clips of the step that it saves.
    """
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    tell = sys.excepthook

    def tell_of_others(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Print an error that nobody caught, unless it says that the training process took no more clips."""
        if not issubclass(kind, (ConnectionError, EOFError)):  # it closed before the thread wrote, or read
            tell(kind, error, trace)

    sys.excepthook = tell_of_others  # the thread that hands clips over calls it


def collate(items: Sequence[Example | HtsatError]) -> Batch | HtsatError:
    """Stack examples; or return the first of the errors among them."""
    for item in items:
        if isinstance(item, HtsatError):
            return item
    examples = tuple(item for item in items if isinstance(item, Example))
    frames = next((e.frame_target for e in examples if e.frame_target is not None), None)
    blank = np.zeros((0, len(examples[0].clip_target)), np.float32) if frames is None else np.zeros_like(frames)
    teacher = None
    if all(e.teacher is not None for e in examples):
        teacher = torch.from_numpy(np.stack([e.teacher for e in examples if e.teacher is not None]))
    return Batch(
        torch.from_numpy(np.stack([e.waveform for e in examples])),
        torch.from_numpy(np.stack([e.clip_target for e in examples])),
        torch.from_numpy(np.stack([blank if e.frame_target is None else e.frame_target for e in examples])),
        torch.tensor([e.frame_target is not None for e in examples]),
        teacher,
        examples,
    )


class Network(nn.Module):
    """The part of the model that learns, from the log-mel spectrogram on, as one call (what is shared and compiled)."""

    def __init__(self, model: SoundModel, num_frames: int) -> None:
        super().__init__()
        self.model, self._num_frames = model, num_frames

    def forward(
        self, log_mel: Tensor, keep: Tensor | None, shares: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return clip and frame logits, and those of the tokens if a fine head corrects them, in float32.

        Args:
            log_mel: (batch, T, n_mels), dB.
            keep: (batch, num_frames, n_mels) of 1 and 0, SpecAugment's; None: nothing is masked.
            shares: (batch,) in [0, 1] of each clip in its mixture with its mirror image in the batch; None: no mixup.
        """
        features = self.model.normalise(self.model.stretch(log_mel, self._num_frames))
        if keep is not None:
            features = features * keep
        if shares is not None:
            weight = shares.view(-1, 1, 1)
            features = weight * features + (1 - weight) * features.flip(0)
        found = self.model.analyse(features)
        assert found.clipwise is not None and found.framewise is not None  # a recipe has classes
        coarse = None if found.coarse is None else found.coarse.float()
        return found.clipwise.float(), found.framewise.float(), coarse


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    on_step: Callable[[Step], None] = lambda step: None,
    on_progress: Callable[[str, float], None] = lambda line, share: None,
    on_note: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train a model.

    Args:
        recipe: what to do.
        data: folder that the recipe's data folders lie in.
        out: run folder; made if absent.
        resume: go on from the last saved state.
        on_step: told of every step.
        on_progress: told of reading and scoring.
        on_note: told what a person should know.

    Returns:
        The finished checkpoint, ``out/model.safetensors``.

    Raises:
        OutputError: the run folder cannot be written, is in use, or already holds a run and ``resume`` is False.
        CheckpointError: there is nothing to resume, it is damaged, or it belongs to another recipe or other data.
        DataError, AudioError: the data are incomplete.
        HtsatError: too many losses or gradients in a row are not finite; the weights are those before them.
        TerminatedError: SIGTERM or SIGINT; the state is saved.
    """
    keep_freed_memory()
    ranks = Ranks()
    resume = ranks.from_first(resume)  # a process that looked at the folder later may have found more in it
    folder = RunFolder(out)
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    try:
        with contextlib.ExitStack() as stack:
            problem: Exception | None = None
            run_data: RunData | None = None
            try:
                # Data first, the folder after: once the data are mended, the same command must work again. The folder
                # is the first process's alone: others may be late and see what it has written, or be elsewhere.
                if ranks.first:
                    folder.check(recipe, resume)
                run_data = open_run_data(recipe, data, on_progress)
                if ranks.first:
                    folder.make()
                    stack.enter_context(_locked(out, LOCK_SECONDS if resume else 0))
                    folder.check(recipe, resume)  # again: another run may have begun meanwhile
                    folder.begin(recipe)
            except (HtsatError, OSError) as error:
                problem = error
            ranks.agree(problem)
            assert run_data is not None
            for note in run_data.notes if ranks.first else ():
                on_note(note)
            if recipe.train.threads:
                torch.set_num_threads(recipe.train.threads)
            run = _Run(run_data, folder, ranks, on_step, on_progress, on_note)
            return run.go(resume)
    except RuntimeError as error:
        if "DataLoader worker" in str(error):  # may come at any time: PyTorch raises it on the signal of its end
            raise _worker_ended(error) from None
        if ranks.lost(error):
            raise HtsatError(
                f"process {ranks.rank} of {ranks.world} lost the others; the message of the one that ended first says "
                "why. Start all of them again with --resume"
            ) from None
        raise
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random_state)


def _worker_ended(error: RuntimeError) -> HtsatError:
    return HtsatError(
        f"a process that prepares clips ended ({str(error).splitlines()[0]}); it may have run out of memory: "
        "use fewer train.workers, and --resume"
    )


@contextlib.contextmanager
def _locked(out: Path, seconds: float) -> Iterator[None]:
    """Keep a second process out of the run folder; wait for one that is about to end."""
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise OutputError(f"{out}: another process is training in this folder; wait for it, or stop it") from None
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror or error}; choose another --out") from None
    try:
        yield
    finally:
        lock.release()


class _Run:
    """One run: what is trained, and the loop."""

    def __init__(
        self,
        data: RunData,
        folder: RunFolder,
        ranks: Ranks,
        on_step: Callable[[Step], None],
        on_progress: Callable[[str, float], None],
        on_note: Callable[[str], None],
    ) -> None:
        self.data, self.recipe, self.config = data, data.recipe, data.recipe.train
        self.folder, self.ranks = folder, ranks
        self.on_step, self.on_progress, self.on_note = on_step, on_progress, on_note
        config = self.config
        if config.batch_size % (ranks.world * config.accumulate):
            raise HtsatError(
                f"batch_size {config.batch_size} cannot be shared by {ranks.world} processes in {config.accumulate} "
                "parts each; choose a multiple of both"
            )
        self.epoch_steps = data.train.epoch_size / config.batch_size
        self.steps = config.steps
        if config.epochs:
            self.steps = max(1, config.min_steps, math.ceil(config.epochs * self.epoch_steps))
            self.steps = min(self.steps, config.max_steps or self.steps)
        self.device = pick_device(config.device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", ranks.local)
        torch.manual_seed(config.seed)
        self.model = make_model(self.recipe, on_note if ranks.first else lambda line: None).to(self.device).train()
        self.model.set_gradient_checkpointing(config.recompute)
        self.average = build_model(self.recipe.frontend, self.recipe.model).to(self.device).eval()
        self.average.load_state_dict(self.model.state_dict())
        self.teacher = load_teacher(self.recipe, self.device)
        self.optimiser = torch.optim.AdamW(
            parameter_groups(
                self.model,
                config.weight_decay,
                decay_all=config.decay_all,
                body_rate=self.recipe.start.body_rate,
            ),
            lr=config.learning_rate,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.amp = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.precision]
        length = round(seconds_of(self.recipe) * self.recipe.frontend.sample_rate)
        native = self.model.geometry.native_frames(length)
        self.num_frames = native if config.fit == "native" else self.model.num_frames
        self.digest = data_digest(data)
        self.unreadable: dict[str, str] = {}
        self.best: list[tuple[float, int]] = []  # (selection score, step), the best first
        self.best_saved: set[int] = set()  # the same steps in the last state, which the next one leaves as a reserve
        self.without_better = 0
        self.skipped = 0
        self.signal = 0

    # -------------------------------------------------------------- the loop

    def go(self, resume: bool) -> Path:
        """Train from the start or the last state to the end, and score."""
        if len(set(self.ranks.gather(self.digest))) > 1:
            raise HtsatError("the processes have different clips or labels; give all machines the same data")
        start = self._restore() if resume else 0
        if self.ranks.first:
            self.folder.cut_logs(start)
        journal = Journal(self.recipe, self.folder.path, start, self.on_note) if self.ranks.first else None
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        with contextlib.ExitStack() as stack:
            if journal is not None:
                stack.callback(journal.close)
            with contextlib.suppress(ValueError):  # signals belong to the main thread
                for number, handler in previous.items():
                    signal.signal(number, self._on_signal)
                    stack.callback(signal.signal, number, handler)
            finished = self._loop(start, journal)
        return self._finish(finished)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signal = number

    def _loop(self, start: int, journal: Journal | None) -> int:
        """Take optimiser steps; return how many the run has."""
        network = self._network(start)
        saved = time.monotonic()
        batches = iter(self._loader(start))
        for step in range(start, self.steps):
            if self._ended_early():
                return step
            if step == self.recipe.start.freeze_steps and self.recipe.start.freeze_steps:
                network = self._network(step)
            began = time.monotonic()
            rate = learning_rate(step, self.config, self.steps, self.epoch_steps)
            loss, norm, finite = self._step(network, batches, step, rate)
            if finite:
                update_average(self.average, self.model, self.config.average_decay, step)
            seconds = time.monotonic() - began
            told = Step(step + 1, self.steps, loss, norm, rate, self.config.batch_size / seconds)
            self.on_step(told)
            if self.ranks.first:
                record = {"step": step + 1, "loss": loss, "gradient_norm": norm, "learning_rate": rate}
                self.folder.append(self.folder.log_path, record)
                timing = {"step": step + 1, "clips_per_second": round(told.clips_per_second, 3)}
                self.folder.append(self.folder.timing_path, timing)
            if journal is not None:
                journal.step(told)
            if self.config.select_steps and ((step + 1) % self.config.select_steps == 0 or step + 1 == self.steps):
                self._select(step + 1, journal)
            number, due = self._asked(saved)
            if number or due or step + 1 == self.steps or self._every(step + 1):
                self._save(step + 1)
                saved = time.monotonic()
            if number:
                raise TerminatedError(number)
        return self.steps

    def _network(self, step: int) -> nn.Module:
        """Return the network for the steps from ``step`` on: frozen, shared and compiled as the recipe says."""
        frozen = self.recipe.start.freeze
        if self.recipe.start.freeze_steps and step >= self.recipe.start.freeze_steps:
            frozen = ()
        set_frozen(self.model, frozen)
        network = self.ranks.wrap(Network(self.model, self.num_frames), self.device)
        return torch.compile(network) if self.config.compile else network  # type: ignore[return-value]

    def _loader(self, start: int) -> DataLoader[Any]:
        config, ranks = self.config, self.ranks
        plan = (
            list(part)
            for step in range(start, self.steps)
            for part in _parts(positions_of(step, config.batch_size, ranks.rank, ranks.world), config.accumulate)
        )
        return DataLoader(
            _Positions(self.data.train),
            batch_sampler=plan,
            # More than there are cores only get into each other's way; what they make is the same.
            num_workers=min(config.workers, os.cpu_count() or 1),
            worker_init_fn=begin_worker,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
        )

    def _step(
        self, network: nn.Module, batches: Iterator[Batch | HtsatError], step: int, rate: float
    ) -> tuple[float, float, bool]:
        """Compute gradients and move the weights; return loss, gradient norm and whether both are finite."""
        config = self.config
        # Running statistics are moved by the forward pass, before it is known whether the step counts.
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        torch.manual_seed(config.seed + 1_000_003 * (step + 1) + 7919 * self.ranks.rank + NETWORK)
        total = 0.0
        culprits: list[str] = []
        names: list[str] = []
        found: dict[str, str] = {}
        for part in range(config.accumulate):
            batch = self._next(batches)
            names += [example.name for example in batch.examples]
            found |= dict(item for example in batch.examples for item in example.unreadable)
            last = part == config.accumulate - 1
            shared = contextlib.nullcontext() if last or self.ranks.world == 1 else network.no_sync()  # type: ignore[operator]
            with shared:
                losses = self._losses(network, batch)
                loss = losses.mean() / config.accumulate
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            value = float(loss.detach())
            if not math.isfinite(value):
                culprits += self._culprits(batch)
            total += value
        self._note_unreadable(found)
        total = self.ranks.sums([total])[0] / self.ranks.world
        self.scaler.unscale_(self.optimiser)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm))
        finite = math.isfinite(norm) and math.isfinite(total)
        if finite:
            for group in self.optimiser.param_groups:
                group["lr"] = rate * group["rate"]
            self.scaler.step(self.optimiser)
            self.skipped = 0
        else:
            with torch.no_grad():
                for buffer, kept in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(kept)
            self._skip(step + 1, total, names if math.isfinite(total) else culprits)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        return total, norm, finite

    def _next(self, batches: Iterator[Batch | HtsatError]) -> Batch:
        """Return the next batch on the device.

        Raises:
            HtsatError: the data ran into a problem, in any process.
        """
        problem: Exception | None = None
        batch: Batch | None = None
        try:
            found = next(batches)
            if isinstance(found, HtsatError):
                problem = found
            else:
                batch = found
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            problem = _worker_ended(error)
        if self.ranks.sums([problem is not None])[0]:
            self.ranks.agree(problem)
        assert batch is not None

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, non_blocking=True)

        return Batch(
            moved(batch.waveforms),
            moved(batch.clip_targets),
            moved(batch.frame_targets),
            moved(batch.has_frames),
            None if batch.teacher is None else moved(batch.teacher),
            batch.examples,
        )

    def _losses(self, network: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of each clip, (batch,)."""
        config, augment, distill = self.config, self.recipe.augment, self.recipe.distill
        positions = [example.position for example in batch.examples]
        with torch.no_grad():
            log_mel = self._log_mel(batch.waveforms)
            rngs = [np.random.default_rng((config.seed, MASKS, position)) for position in positions]
            if augment.equaliser_db:
                log_mel = random_equaliser(log_mel, rngs, augment.equaliser_db)
            keep = None
            if augment.time_masks or augment.mel_masks:
                keep = spec_masks(
                    rngs,
                    self.num_frames,
                    self.recipe.frontend.n_mels,
                    time_masks=augment.time_masks,
                    max_frames=augment.max_frames,
                    mel_masks=augment.mel_masks,
                    max_mels=augment.max_mels,
                ).to(self.device)
            teacher = batch.teacher
            if self.teacher is not None:
                teacher = self.teacher(batch.waveforms)
        shares, targets, frames, has_frames = None, batch.clip_targets, batch.frame_targets, batch.has_frames
        if augment.mixup in ("inputs", "labels"):
            drawn = [np.random.default_rng((config.seed, MIXUP, p)) for p in positions]
            values = [rng.beta(augment.mixup_alpha, augment.mixup_alpha) for rng in drawn]
            shares = torch.tensor(values, dtype=torch.float32, device=self.device)
        if shares is not None and augment.mixup == "labels":
            weight = shares.unsqueeze(1)
            targets = weight * targets + (1 - weight) * targets.flip(0)
            frames = weight.unsqueeze(1) * frames + (1 - weight.unsqueeze(1)) * frames.flip(0)
            has_frames = has_frames & has_frames.flip(0)
            teacher = None if teacher is None else weight * teacher + (1 - weight) * teacher.flip(0)
        with torch.autocast(self.device.type, self.amp, enabled=self.amp != torch.float32):
            clipwise, framewise, coarse = network(log_mel, keep, shares)
        losses = clip_loss(clipwise, targets, config)
        if teacher is not None:
            taught = distillation_loss(clipwise, teacher, config, distill)
            losses = (1 - distill.weight) * losses + distill.weight * taught
        losses = config.weak_weight * losses
        if config.strong_weight and bool(has_frames.any()):
            tokens = None if coarse is None else coarse[has_frames]
            timed = frame_losses(framewise[has_frames], frames[has_frames], config, tokens)
            losses = losses + timed * has_frames / has_frames.float().mean()
        elif coarse is not None:
            losses = losses + 0 * framewise.mean()  # processes wait for a gradient of the fine head from each other
        return losses

    def _log_mel(self, waveforms: Tensor) -> Tensor:
        """Return the log-mel spectrograms of waveforms that are fitted to a chunk as the recipe says."""
        if self.config.fit != "stretch":
            waveforms = self.model.fit_waveform(waveforms, self.config.fit)
        log_mel: Tensor = self.model.frontend(waveforms)
        return log_mel

    # -------------------------------------------------------------- what goes wrong

    def _culprits(self, batch: Batch) -> list[str]:
        """Return the files whose waveform, targets, or logits when heard alone, are not finite."""
        names = []
        # Not the network of the other processes too: they may not be calling it now.
        alone = Network(self.average, self.num_frames)
        with torch.no_grad():
            for i, example in enumerate(batch.examples):
                waveform = batch.waveforms[i : i + 1]
                given = [waveform, batch.clip_targets[i], batch.frame_targets[i]]
                given += [] if batch.teacher is None else [batch.teacher[i]]
                good = all(bool(torch.isfinite(tensor).all()) for tensor in given)
                if good:
                    clipwise, _, _ = alone(self._log_mel(waveform), None, None)
                    good = bool(torch.isfinite(clipwise).all())
                if not good:
                    names.append(example.name)
        return names or [example.name for example in batch.examples]

    def _skip(self, step: int, loss: float, culprits: list[str]) -> None:
        """Note a step that did not reach the weights.

        Args:
            step: that it would have been.
            loss: of all processes.
            culprits: names of this process's clips that may be the cause.

        Raises:
            HtsatError: too many in a row.
        """
        if math.isfinite(loss) and self.scaler.is_enabled() and self.scaler.get_scale() > 1:
            return  # half precision overflowed: the scaler lowers its factor, and the next steps go on
        names = sorted({name for part in self.ranks.gather(culprits) for name in part})
        self.skipped += 1
        what = "loss" if not math.isfinite(loss) else "gradient"
        if self.ranks.first:
            record = {"step": step, "what": what, "clips": names}
            self.folder.append(self.folder.path / "skipped.jsonl", record)
            where = f"; clips: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" if names else ""
            self.on_note(f"step {step}: the {what} is not finite, the weights are left as they were{where}")
        if self.skipped > self.config.max_skipped:
            raise HtsatError(
                f"{self.folder.path}: step {step}: the {what} is not finite, as in the {self.skipped - 1} steps before"
                f"{'; clips: ' + ', '.join(names[:5]) if names else ''}; the weights are those before them. Mend the "
                "clips in skipped.jsonl, or begin a new run with a lower train.learning_rate"
            )

    def _note_unreadable(self, found: dict[str, str]) -> None:
        """List clips that could not be read, of all processes.

        Raises:
            UsageError: more than the recipe allows.
        """
        if not self.ranks.sums([len(found)])[0]:
            return
        before = len(self.unreadable)
        for part in self.ranks.gather(found):
            self.unreadable |= part
        if len(self.unreadable) > before:
            if self.ranks.first:
                self.folder.write_unreadable(self.unreadable)
                self.on_note(f"{len(self.unreadable)} clips cannot be read so far; see unreadable.tsv")
            check_quota(self.recipe, len(self.unreadable), self.data.train.epoch_size)

    # -------------------------------------------------------------- selection

    def _select(self, step: int, journal: Journal | None) -> None:
        """Score the average on the selection split, and keep it if it is among the best."""
        if not len(self.data.select):
            raise HtsatError(
                "train.select_steps needs clips to select on: a corpus with a validation split, or data.select"
            )
        heard = self._listen(self.data.select, f"selection at step {step}")
        evaluation = evaluate_clips(self.recipe, self.data, self.data.select, heard, self._identity(), "selection")
        name, score = headline(evaluation.tagging)
        if self.ranks.first:
            self.folder.append(self.folder.log_path, {"step": step, "selection": {name: score}})
        if journal is not None:
            journal.selection(step, name, score)
        better = not self.best or score > self.best[0][0]
        self.without_better = 0 if better else self.without_better + 1
        ranked = sorted([*self.best, (score, step)], key=lambda item: (-item[0], item[1]))
        self.best = ranked[: self.config.keep_best]
        if (score, step) in self.best and self.ranks.first:
            config = self.recipe.checkpoint({"recipe": self.recipe.description, "step": step, "selection": score})
            save_checkpoint(self._candidate(step), self.average, config)

    def _candidate(self, step: int) -> Path:
        return self.folder.path / f"best-{step:08d}.safetensors"

    def _ended_early(self) -> bool:
        return bool(self.config.patience and self.without_better >= self.config.patience)

    def _listen(self, clips: Sequence[Clip], what: str) -> list[Heard]:
        self._share_average()
        return listen(self.average, self.recipe, self.data, clips, self.ranks, what, self.on_progress)

    def _identity(self) -> ModelIdentity:
        path = self.folder.path / "model.safetensors"
        return ModelIdentity(self.folder.path.name, str(path), "", self.recipe.data.labels, self.recipe.objective)

    def _share_average(self) -> None:
        """Give all processes the first one's average: running statistics differ between them."""
        self.ranks.copy_from_first([*self.average.parameters(), *self.average.buffers()])

    # -------------------------------------------------------------- states

    def _asked(self, saved: float) -> tuple[int, bool]:
        """Return the signal that any process has got (0: none), and whether the first finds that it is time to save.

        All processes return the same; a signal that comes after this is answered at the next step.
        """
        due = time.monotonic() - saved > self.config.save_seconds
        found = self.ranks.gather((self.signal, due))
        return max(number for number, _ in found), found[0][1]

    def _every(self, step: int) -> bool:
        return bool(self.config.save_steps) and step % self.config.save_steps == 0

    def _save(self, step: int) -> None:
        """Save the state; a failure ends all processes."""
        problem: Exception | None = None
        if self.ranks.first:
            state = {
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "scaler": self.scaler.state_dict(),
                "step": step,
                "best": [list(item) for item in self.best],
                "without_better": self.without_better,
                "skipped": self.skipped,
                "unreadable": self.unreadable,
                "data": self.digest,
            }
            try:
                self.folder.save_state(state)
                self._remove_candidates()
            except OutputError as error:
                problem = error
        self.ranks.agree(problem)

    def _remove_candidates(self) -> None:
        """Remove candidates that no state that can be resumed needs any more."""
        now = {step for _, step in self.best}
        kept = now | self.best_saved
        self.best_saved = now
        for path in self.folder.path.glob("best-*.safetensors"):
            if int(path.stem.removeprefix("best-")) not in kept:
                path.unlink(missing_ok=True)

    def _restore(self) -> int:
        """Load the last state and return how many steps it has behind it.

        Raises:
            CheckpointError: it is damaged, or of other data.
        """
        state: dict[str, Any] | None = None
        problem: Exception | None = None
        if self.ranks.first:
            try:
                state = self.folder.load_state()
            except HtsatError as error:
                problem = error
        self.ranks.agree(problem)
        state = self.ranks.from_first(state)
        if state is None:
            return 0  # stopped before the first save: the run begins again
        try:
            if state["data"] != self.digest:
                raise CheckpointError(
                    f"{self.folder.path}: the run was begun with other clips or labels; "
                    "resume it with those, or choose another --out"
                )
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.scaler.load_state_dict(state["scaler"])
            self.best = [(float(score), int(step)) for score, step in state["best"]]
            self.best_saved = {step for _, step in self.best}
            self.without_better, self.skipped = int(state["without_better"]), int(state["skipped"])
            self.unreadable = dict(state["unreadable"])
            step = int(state["step"])
            if not 0 <= step <= self.steps:
                raise ValueError(f"step {step} of {self.steps}")
            return step
        except (RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CheckpointError(
                f"{self.folder.state_path}: cannot be resumed: it does not fit the recipe ({reason}); "
                "it is of another version of htsat: begin a new run"
            ) from None

    # -------------------------------------------------------------- the end

    def _finish(self, steps: int) -> Path:
        """Score what the run has brought forth, once, and write it."""
        problem: Exception | None = None
        if self.best and self.ranks.first:
            # Of the best averages, or of the only one there is; scoring hands it to the other processes.
            ranked = sorted(step for _, step in self.best)
            missing = [step for step in ranked if not self._candidate(step).is_file()]
            try:
                if missing:
                    raise CheckpointError(
                        f"{self._candidate(missing[0])}: is gone; the run cannot be finished without it"
                    )
                result = average_checkpoints([self._candidate(step) for step in ranked])
                self.average.load_state_dict(result.state_dict())
            except HtsatError as error:
                problem = error
        self.ranks.agree(problem)
        report: dict[str, Any] = {"steps": steps, "train_clips": self.data.train.epoch_size}
        if self.best:
            report["selected_steps"] = sorted(step for _, step in self.best)
            report["selection_score"] = self.best[0][0]
        if self.data.material is not None:
            report |= score_held_out(self.average, self.recipe, self.data.material, self.on_progress)
        evaluation: Evaluation | None = None
        if len(self.data.test):
            heard = self._listen(self.data.test, "scoring")
            evaluation = evaluate_clips(self.recipe, self.data, self.data.test, heard, self._identity(), "test")
            report |= {"test_clips": len(self.data.test)} | evaluation.to_dict()
        if self.unreadable:
            report["unreadable_clips"] = sorted(self.unreadable)
        path = self.folder.path / "model.safetensors"
        if self.ranks.first:
            shown = figures(report)
            provenance: dict[str, Any] = {
                "recipe": self.recipe.description,
                "steps": steps,
                "seed": self.config.seed,
                "report": shown,
            }
            if trained_on := self.data.training_corpus():
                provenance["trained_on"] = fingerprint(trained_on)  # what `htsat calibrate` warns of
            checkpoint = self.recipe.checkpoint(provenance)
            try:
                write_atomic(self.folder.path / "report.json", json.dumps(report, indent=1) + "\n")
                save_checkpoint(path, self.average, checkpoint, dtype="float16")
                self.folder.write_parts(self.data.parts())
                if evaluation is not None:
                    identity = identify(self.folder.path.name, path, checkpoint)
                    evaluation = dataclasses.replace(evaluation, models=(identity,))
                    write_atomic(self.folder.path / "report.html", html(evaluation, self.folder.path))
                self.folder.sync()
            except HtsatError as error:
                problem = error
            except OSError as error:
                problem = OutputError(f"{path}: cannot be saved: {error.strerror or error}; mend the disk, --resume")
        self.ranks.agree(problem)
        return path


def _parts(positions: Sequence[int], count: int) -> Iterator[Sequence[int]]:
    """Deal positions out to ``count`` parts, so that mirror images stay together."""
    size = len(positions) // count
    if count == 1:
        yield positions
    elif size % 2 == 0:
        half = size // 2
        for i in range(count):
            head = positions[i * half : (i + 1) * half]
            tail = positions[len(positions) - (i + 1) * half : len(positions) - i * half]
            yield [*head, *tail]
    else:
        yield from (positions[i * size : (i + 1) * size] for i in range(count))
