"""What the convolutional baselines have in common: their frames, and clip posteriors as means of frame posteriors.

Convolutions take any number of frames. A chunk that is a whole number of 32 frames, such as the 10.24 s of converted
weights, is therefore never stretched: frame i lies at i hops. The log-mel of any other chunk, such as 1001 frames of
10 s, is stretched as HTS-AT's is, to 1024 frames.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from htsat.errors import ConfigError
from htsat.model.base import Fit, SoundModel


class Baseline(SoundModel):
    """A convolutional network."""

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Refuse it: batch norms would count the statistics of a batch twice.

        Raises:
            ConfigError: ``enabled``.
        """
        if enabled:
            raise ConfigError(
                f"activations of {self.config.architecture} cannot be recomputed; leave train.recompute false and "
                "raise train.accumulate to save memory"
            )

    def stretch(self, log_mel: Tensor, num_frames: int | None = None) -> Tensor:
        """Bring log-mel frames (batch, T, n_mels) to (batch, num_frames, n_mels); see ``SoundModel.stretch``.

        Where a chunk needs no stretching nothing is stretched: what is too long is cut off (of a centred spectrogram
        the last frame, on the end of the chunk), what is too short is followed by silence.
        """
        num_frames = num_frames or self.num_frames
        if self.geometry.stretches:
            return super().stretch(log_mel, num_frames)
        missing = max(0, num_frames - log_mel.shape[1])
        return F.pad(log_mel[:, :num_frames], (0, 0, 0, missing), value=self.frontend_config.floor_db)

    def fill(self, log_mel: Tensor, fit: Fit) -> Tensor:
        """Return the frames that ``encode`` takes; see ``SoundModel.fill``.

        Where a chunk needs no stretching, ``stretch`` and ``repeat`` leave the frames as they are, as the published
        evaluation does; they may be any number, but a token's at least.
        """
        if self.geometry.stretches or fit not in ("stretch", "repeat"):
            return super().fill(log_mel, fit)
        if fit == "repeat":
            log_mel = log_mel.repeat(1, max(1, self.num_frames // log_mel.shape[1]), 1)
        return self.stretch(log_mel, max(self.config.token_frames, log_mel.shape[1]))


def mean_posterior(framewise_logits: Tensor, log_weights: Tensor) -> Tensor:
    """Return the logits of the weighted means over time of frame posteriors, float32.

    Args:
        framewise_logits: (batch, num_tokens, num_classes).
        log_weights: of the same shape; their exponentials add up to 1 over the tokens.

    Returns:
        (batch, num_classes). Exact also where the mean rounds to 0 or 1: with weights w that add up to 1 the logit of
        sum w s(x) is log(sum w s(x)) - log(sum w s(-x)), where s is the sigmoid.
    """
    with torch.autocast(framewise_logits.device.type, enabled=False):
        logits, weights = framewise_logits.float(), log_weights.float()
        on = torch.logsumexp(weights + F.logsigmoid(logits), 1)
        return on - torch.logsumexp(weights + F.logsigmoid(-logits), 1)
