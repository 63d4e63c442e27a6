"""CRNN: convolutions and recurrent layers, the kind of network that DCASE task 4 gives as a baseline.

Source: the baselines of DCASE 2019 to 2023 task 4 (Turpault et al. 2019; Ronchini et al. 2021): seven gated
convolutions with average pooling that keep a quarter of the frames, two bidirectional GRU layers, and a clip posterior
that is a mean of frame posteriors weighted by attention. Theirs pools 128 mel bins away in seven steps; here each block
halves the mel bins that are left, so that any number goes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from htsat.config import FrontendConfig, ModelConfig
from htsat.model.baseline import Baseline, mean_posterior

#: blocks that halve the number of frames
_TIME_POOLS = 2
#: least attention that a class can get in a frame
_LEAST_ATTENTION = 1e-7


class CRNN(Baseline):
    """Seven gated convolutions, two recurrent layers, and attention over time.

    Args:
        frontend: log-mel settings.
        model: architecture.
    """

    def __init__(self, frontend: FrontendConfig, model: ModelConfig) -> None:
        super().__init__(frontend, model)
        channels, rows = model.conv_channels, frontend.n_mels
        self.blocks = nn.ModuleList()
        for number, (inputs, outputs) in enumerate(zip((1, *channels), channels, strict=False)):
            pool = (2 if number < _TIME_POOLS else 1, 2 if rows > 1 else 1)
            self.blocks.append(GatedConvBlock(inputs, outputs, pool))
            rows //= pool[1]
        self.rnn = nn.GRU(channels[-1], model.rnn_width, num_layers=2, batch_first=True, bidirectional=True)
        if model.num_classes:
            self.head = nn.Linear(2 * model.rnn_width, model.num_classes)
            self.head_attention = nn.Linear(2 * model.rnn_width, model.num_classes)

    def classifiers(self) -> tuple[nn.Linear | nn.Conv2d, ...]:
        """Return the layer whose outputs are the logits; see ``SoundModel``."""
        return (self.head,) if self.config.num_classes else ()

    def encode(self, features: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Map normalised features (batch, T, n_mels) to tokens (batch, 2 rnn_width, T // 4)."""
        x = features.unsqueeze(1)
        for block in self.blocks:
            x = F.dropout(block(x), self.config.conv_dropout, self.training)
        x = x.mean(3).transpose(1, 2)
        with torch.autocast(x.device.type, enabled=False):  # errors of rounding would go from step to step
            tokens: Tensor = self.rnn(x.to(self.mel_norm.weight.dtype))[0]
        return tokens.transpose(1, 2)

    def classify(self, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return clip and frame logits, (batch, num_classes) and (batch, num_tokens, num_classes), of tokens.

        The attention of a frame is spread over the classes; over time it counts relative to the others of its class.
        """
        if not self.config.num_classes:
            return None, None
        x = F.dropout(tokens.transpose(1, 2), self.config.head_dropout, self.training)
        framewise = self.head(x)
        attention = self.head_attention(x).float().log_softmax(2).clamp_min(math.log(_LEAST_ATTENTION))
        return mean_posterior(framewise, attention.log_softmax(1)), framewise

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the mean token, (batch, 2 rnn_width)."""
        return tokens.mean(2)


class GatedConvBlock(nn.Module):
    """A 3 x 3 convolution with batch norm, gated by its own sigmoid, then average pooling.

    Maps (batch, inputs, T, F) to (batch, outputs, T // pool[0], F // pool[1]).
    """

    def __init__(self, inputs: int, outputs: int, pool: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.gated = nn.Conv2d(outputs, outputs, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed picture."""
        # The layout that convolutions of so few channels are fast in; it stays from block to block.
        x = self.norm(self.conv(x).contiguous(memory_format=torch.channels_last))
        return F.avg_pool2d(self.gated(x) * x.sigmoid(), self.pool)
