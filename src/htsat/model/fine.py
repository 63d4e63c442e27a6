"""The fine head: framewise logits several times finer than the tokens of the last stage.

The last stage knows what sounds, on a coarse grid (0.31 s in the published network); earlier stages and the
spectrogram itself know when something changes. The head brings all of them to one fine grid, lets neighbouring steps
exchange what they know, and corrects the token logits, which it starts from: untrained it gives exactly those,
interpolated, so that it can be put on any weights. It adds 4 % to the time of the published network.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from htsat.config import FINE_DILATIONS, FINE_KERNEL


class TimeMixing(nn.Module):
    """Residual block over time: a depthwise dilated convolution, then a feed-forward layer on each step.

    Maps (batch, steps, width) to the same shape.
    """

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        padding = dilation * (FINE_KERNEL // 2)
        self.time = nn.Conv1d(width, width, FINE_KERNEL, padding=padding, dilation=dilation, groups=width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed steps."""
        mixed = self.time(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.fc2(F.gelu(self.fc1(mixed)))  # type: ignore[no-any-return]


class FineHead(nn.Module):
    """Framewise logits on a fine grid.

    Args:
        n_mels: mel bins of the features.
        sources: width x frequencies of the tokens of each stage, before merging.
        num_classes: outputs.
        frames: log-mel frames per step.
        width: of the head.
    """

    def __init__(self, n_mels: int, sources: Sequence[int], num_classes: int, frames: int, width: int) -> None:
        super().__init__()
        # Each step sees its own frames and those of the steps beside it.
        self.spectrum = nn.Conv1d(n_mels, width, 3 * frames, stride=frames, padding=frames)
        self.sources = nn.ModuleList(nn.Linear(source, width) for source in sources)
        self.mixing = nn.ModuleList(TimeMixing(width, dilation) for dilation in FINE_DILATIONS)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, num_classes)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor, taps: Sequence[Tensor], coarse: Tensor) -> Tensor:
        """Return (batch, T / frames, num_classes).

        Args:
            features: (batch, T, n_mels), normalised.
            taps: per stage (batch, time, width x frequencies), its tokens side by side along frequency.
            coarse: (batch, num_tokens, num_classes), the token logits.
        """
        x = self.spectrum(features.transpose(1, 2)).transpose(1, 2)
        steps = x.shape[1]
        for layer, tap in zip(self.sources, taps, strict=True):
            x = x + interpolated(layer(tap), steps)
        for block in self.mixing:
            x = block(x)
        return self.out(self.norm(x)) + interpolated(coarse, steps)  # type: ignore[no-any-return]


def interpolated(x: Tensor, steps: int) -> Tensor:
    """Interpolate (batch, time, width) linearly to (batch, steps, width); values belong to the middle of their step."""
    return F.interpolate(x.transpose(1, 2), steps, mode="linear", align_corners=False).transpose(1, 2)
