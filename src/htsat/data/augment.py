"""Augmentation of log-mel spectrograms.

Randomness comes from the generators handed in, one per clip, nothing else: what happens to a clip does not depend
on the batch it is in.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def random_equaliser(log_mel: Tensor, rngs: Sequence[np.random.Generator], max_db: float) -> Tensor:
    """Add to each clip of (batch, frames, n_mels) dB a smooth random curve over frequency within +-max_db.

    Imitates microphones, distances and rooms (FilterAugment, Nam et al. 2022, with linear bands).
    """
    n_mels = log_mel.shape[2]
    curves = []
    for rng in rngs:
        bands = int(rng.integers(3, 7))
        gains = rng.uniform(-max_db, max_db, bands)
        curves.append(np.interp(np.linspace(0, bands - 1, n_mels), np.arange(bands), gains))
    return log_mel + torch.from_numpy(np.stack(curves)).to(log_mel).unsqueeze(1)


def spec_masks(
    rngs: Sequence[np.random.Generator],
    frames: int,
    n_mels: int,
    *,
    time_masks: int,
    max_frames: int,
    mel_masks: int,
    max_mels: int,
) -> Tensor:
    """Return (batch, frames, n_mels) of 1 and 0: random stretches of time and mel bands of each clip are 0.

    Batch-normalised features are multiplied by it, so that what is masked gets their mean, as in the published code
    (SpecAugment). No mask is wider than the clip.
    """
    keep = torch.ones(len(rngs), frames, n_mels)
    for clip, rng in zip(keep, rngs, strict=True):
        for _ in range(time_masks):
            width = int(rng.integers(0, min(max_frames, frames) + 1))
            start = int(rng.integers(0, frames - width + 1))
            clip[start : start + width] = 0
        for _ in range(mel_masks):
            width = int(rng.integers(0, min(max_mels, n_mels) + 1))
            start = int(rng.integers(0, n_mels - width + 1))
            clip[:, start : start + width] = 0
    return keep
