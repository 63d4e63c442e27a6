"""CNN14: the convolutional network that HTS-AT's paper compares with, as a baseline.

Source: Kong et al., PANNs (arXiv 1912.10211), tables 1 and 2, and the published ``pytorch/models.py``: ``Cnn14``,
``Cnn14_DecisionLevelMax`` and ``Cnn14_DecisionLevelAtt``. Theirs ends in posteriors, this one in their logits.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from htsat.config import FrontendConfig, ModelConfig
from htsat.model.baseline import Baseline, mean_posterior


class CNN14(Baseline):
    """Six blocks of two convolutions, two linear layers, and a decision on the clip.

    Args:
        frontend: log-mel settings.
        model: architecture.
    """

    def __init__(self, frontend: FrontendConfig, model: ModelConfig) -> None:
        super().__init__(frontend, model)
        channels = model.conv_channels
        self.blocks = nn.ModuleList(
            ConvBlock(inputs, outputs) for inputs, outputs in zip((1, *channels), channels, strict=False)
        )
        width = channels[-1]
        self.fc1 = nn.Linear(width, width)
        if model.num_classes:
            self.head = nn.Linear(width, model.num_classes)
            if model.decision == "att":
                self.head_attention = nn.Linear(width, model.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the published code: Xavier's uniform weights, biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def classifiers(self) -> tuple[nn.Linear | nn.Conv2d, ...]:
        """Return the layer whose outputs are the logits; see ``SoundModel``."""
        return (self.head,) if self.config.num_classes else ()

    def encode(self, features: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Map normalised features (batch, T, n_mels) to tokens (batch, width, T // 32)."""
        x = features.unsqueeze(1)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number < len(self.blocks) - 1:
                x = F.avg_pool2d(x, 2)
            x = F.dropout(x, self.config.conv_dropout, self.training)
        return x.mean(3)

    def _head_dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.head_dropout, self.training)

    def _hidden(self, pooled: Tensor) -> Tensor:
        """Map (batch, width) or (batch, time, width) to what the classifier reads, of the same shape."""
        return F.relu(self.fc1(self._head_dropout(pooled)))

    def _pooled(self, tokens: Tensor) -> Tensor:
        """Pool tokens (batch, width, time): a whole clip to (batch, width), or each token to (batch, time, width).

        The sum of maximum and mean, over the clip or over a token and its neighbours.
        """
        if self.config.decision == "clip":
            return tokens.amax(2) + tokens.mean(2)
        return (F.max_pool1d(tokens, 3, 1, 1) + F.avg_pool1d(tokens, 3, 1, 1)).transpose(1, 2)

    def classify(self, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return clip and frame logits, (batch, num_classes) and (batch, num_tokens, num_classes), of tokens.

        With ``decision`` ``clip``, which has no framewise output in the publication, a frame is classified as if the
        clip consisted of it alone.
        """
        if not self.config.num_classes:
            return None, None
        hidden = self._head_dropout(self._hidden(self._pooled(tokens)))
        logits = self.head(hidden)
        if self.config.decision == "clip":
            return logits, self.head(self._head_dropout(self._hidden(2 * tokens.transpose(1, 2))))
        if self.config.decision == "max":
            return logits.amax(1), logits
        attention = self.head_attention(hidden).float().clamp(-10, 10)
        return mean_posterior(logits, attention.log_softmax(1)), logits

    def embed(self, tokens: Tensor) -> Tensor:
        """Return what the classifier reads, (batch, width), the mean over the tokens if it reads each."""
        hidden = self._hidden(self._pooled(tokens))
        return hidden if self.config.decision == "clip" else hidden.mean(1)


class ConvBlock(nn.Module):
    """Two 3 x 3 convolutions, each with batch norm and ReLU: (batch, inputs, T, F) to (batch, outputs, T, F)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed picture."""
        # The layout in which narrow networks are faster on CPUs, and all on GPUs; it stays from block to block.
        x = self.conv1(x).contiguous(memory_format=torch.channels_last)
        x = F.relu(self.norm1(x), inplace=True)
        return F.relu(self.norm2(self.conv2(x)), inplace=True)
