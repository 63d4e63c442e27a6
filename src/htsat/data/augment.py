"""Augmentation of log-mel spectrograms. Randomness comes from the generator handed in, nothing else."""

import numpy as np
import torch
from torch import Tensor


def random_equaliser(log_mel: Tensor, rng: np.random.Generator, max_db: float) -> Tensor:
    """Add to each clip of (batch, frames, n_mels) dB a smooth random curve over frequency within +-max_db.

    Imitates microphones, distances and rooms (FilterAugment, Nam et al. 2022, with linear bands).
    """
    batch, _, n_mels = log_mel.shape
    curves = []
    for _ in range(batch):
        bands = int(rng.integers(3, 7))
        gains = rng.uniform(-max_db, max_db, bands)
        curves.append(np.interp(np.linspace(0, bands - 1, n_mels), np.arange(bands), gains))
    return log_mel + torch.from_numpy(np.stack(curves)).to(log_mel).unsqueeze(1)


def spec_augment(
    features: Tensor, rng: np.random.Generator, *, time_masks: int, max_frames: int, mel_masks: int, max_mels: int
) -> Tensor:
    """Set random stretches of time and mel bands of (batch, frames, n_mels) to zero (SpecAugment).

    Features are batch-normalised, so that zero is their mean, as in the published code. No mask is wider than
    the clip. Returns a new tensor.
    """
    batch, frames, n_mels = features.shape
    keep = torch.ones(batch, frames, n_mels, dtype=features.dtype, device=features.device)
    for clip in keep:
        for _ in range(time_masks):
            width = int(rng.integers(0, min(max_frames, frames) + 1))
            start = int(rng.integers(0, frames - width + 1))
            clip[start : start + width] = 0
        for _ in range(mel_masks):
            width = int(rng.integers(0, min(max_mels, n_mels) + 1))
            start = int(rng.integers(0, n_mels - width + 1))
            clip[:, start : start + width] = 0
    return features * keep
