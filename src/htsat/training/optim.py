"""Losses, parameter groups, the learning rate and the average of the weights: pure functions of the recipe."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from htsat.training.recipe import DistillConfig, TrainConfig

#: the released code's learning rates in the first epochs, relative to the peak; the last one stays until epoch 10
_PUBLISHED_RATES = (0.02, 0.05, 0.1)
#: the same of the paper's text
_PAPER_RATES = (0.05, 0.1, 0.2)


def learning_rate(step: int, config: TrainConfig, steps: int, epoch_steps: float) -> float:
    """Return the learning rate of a step counted from 0.

    Args:
        step: from 0.
        config: schedule, peak and warm-up.
        steps: of the run.
        epoch_steps: steps per epoch, for the schedules that go by epochs.
    """
    peak = config.learning_rate
    if config.schedule in ("halving", "published"):
        epoch = int(step / epoch_steps)
        first, second, third = _PAPER_RATES if config.schedule == "halving" else _PUBLISHED_RATES
        if epoch <= 10:
            return peak * (first, second, third)[min(epoch, 2)]
        if epoch <= 20:
            return peak * second
        if epoch <= 30 or config.schedule == "halving":
            return peak * first
        return peak * 0.03  # max(first * 0.98 ** epoch, 0.03): written for the paper's rates, it rises with these
    warmup = max(1, round(config.warmup * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def is_head(name: str) -> bool:
    """Say whether a weight belongs to the classifier."""
    return name.startswith(("token_semantic.", "head.", "head_attention.", "fine.out."))


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_all: bool = False, body_rate: float = 1.0
) -> list[dict[str, Any]]:
    """Split parameters: matrices and kernels decay; biases, norms, position tables and the frequency embedding do not.

    Args:
        model: a network of ours.
        weight_decay: of those that decay.
        decay_all: as published.
        body_rate: learning rate of everything but the head, relative; each group tells its own in ``rate``.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        small = parameter.ndim < 2 or name.endswith(("relative_position_bias_table", "frequency_embedding"))
        groups.setdefault((decay_all or not small, is_head(name)), []).append(parameter)
    return [
        {"params": found, "weight_decay": weight_decay if decays else 0.0, "rate": 1.0 if head else body_rate}
        for (decays, head), found in sorted(groups.items())
    ]


def asymmetric_loss(logits: Tensor, targets: Tensor, gamma: float, margin: float) -> Tensor:
    """Return the asymmetric loss of logits against targets in [0, 1], of their shape.

    Negatives are focused by ``gamma`` and their posterior is lowered by ``margin`` first; positives have plain
    cross-entropy. Source: Ridnik et al., Asymmetric Loss (arXiv 2009.14119), equations 4 to 7.
    """
    lowered = (torch.sigmoid(logits) - margin).clamp_min(0)
    negative = -torch.log1p(-lowered.clamp_max(1 - 1e-7)) * lowered.pow(gamma)
    return -targets * F.logsigmoid(logits) + (1 - targets) * negative


def clip_loss(logits: Tensor, targets: Tensor, config: TrainConfig) -> Tensor:
    """Return the loss of each clip, (batch,), of clip logits (batch, num_classes) against targets in [0, 1].

    ``ce`` takes targets that sum to 1; ``bce`` and ``asymmetric`` are means over the classes.
    """
    if config.loss == "ce":
        smooth = (1 - config.label_smoothing) * targets + config.label_smoothing / targets.shape[1]
        return -(smooth * logits.log_softmax(1)).sum(1)
    smooth = (1 - config.label_smoothing) * targets + config.label_smoothing / 2
    if config.loss == "asymmetric":
        return asymmetric_loss(logits, smooth, config.asymmetric_gamma, config.asymmetric_margin).mean(1)
    return F.binary_cross_entropy_with_logits(logits, smooth, reduction="none").mean(1)


def distillation_loss(logits: Tensor, teacher: Tensor, config: TrainConfig, distill: DistillConfig) -> Tensor:
    """Return the loss of each clip, (batch,), of clip logits against a teacher's, both divided by the temperature.

    For ``ce`` the cross-entropy with the teacher's distribution, else the binary one with its posteriors; times the
    temperature squared, so that gradients keep their size (Hinton et al. 2015).
    """
    student, teacher = logits / distill.temperature, teacher / distill.temperature
    if config.loss == "ce":
        found = -(teacher.softmax(1) * student.log_softmax(1)).sum(1)
    else:
        found = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction="none").mean(1)
    return found * distill.temperature**2


def frame_losses(framewise: Tensor, targets: Tensor, config: TrainConfig, coarse: Tensor | None = None) -> Tensor:
    """Return the weighted framewise losses of a batch.

    Args:
        framewise: (batch, num_frames, num_classes) logits.
        targets: of the same shape, in [0, 1].
        config: weights of the losses.
        coarse: (batch, tokens, num_classes) logits of the tokens that a fine head corrects; None without a fine head.
            As in ``token_targets``, a token that an event fills at least half is 1, below that twice the share.
    """
    strong = F.binary_cross_entropy_with_logits(framewise, targets)
    if coarse is not None:
        of_tokens = targets.view(len(targets), coarse.shape[1], -1, targets.shape[2]).mean(2).mul(2).clamp_max(1)
        strong = strong + config.token_weight * F.binary_cross_entropy_with_logits(coarse, of_tokens)
    if not config.single_weight:
        return config.strong_weight * strong
    # Which class it is, on the tokens where one sounds alone: a far clearer signal early on than many
    # independent yes-or-no questions whose answer is nearly always no.
    alone = ((targets > 0).sum(2) == 1) & (targets.amax(2) == 1)
    single = F.cross_entropy(framewise[alone], targets[alone].argmax(1)) if alone.any() else framewise.sum() * 0
    return config.strong_weight * strong + config.single_weight * single


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the average towards the model; early steps count more, so that the start is forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    mine: list[Tensor] = list(average.parameters())
    theirs: list[Tensor] = list(model.parameters())
    torch._foreach_lerp_(mine, theirs, 1 - decay)
    for buffer, new in zip(average.buffers(), model.buffers(), strict=True):
        if buffer.is_floating_point():
            buffer.lerp_(new, 1 - decay)
        else:
            buffer.copy_(new)
