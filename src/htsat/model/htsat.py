"""HTS-AT: fold, Swin stages, token-semantic head; what comes before them is ``htsat.model.base``.

``encode`` embeds patches, folds them to a square and passes them through the Swin stages.

Source: Chen et al., HTS-AT (arXiv 2202.00874) and the published ``model/htsat.py``.
"""

import math

import torch
from torch import Tensor, nn

from htsat.config import FrontendConfig, ModelConfig
from htsat.model.base import FITS, IN_TIME, Analysis, Fit, ModelOutput, SoundModel
from htsat.model.fine import FineHead
from htsat.model.swin import Sides, Stage

# The first four are of every network and can be had from here too.
__all__ = ["FITS", "HTSAT", "IN_TIME", "ConvStem", "Fit", "ModelOutput", "PatchEmbed", "pool_tokens"]


class HTSAT(SoundModel):
    """The network with its front end.

    Args:
        frontend: log-mel settings.
        model: architecture.
    """

    def __init__(self, frontend: FrontendConfig, model: ModelConfig) -> None:
        super().__init__(frontend, model)
        self.groups = model.image_size // frontend.n_mels  # stretches of time stacked along the frequency axis

        side = model.image_size // model.patch_size
        stem = PatchEmbed if model.stem == "patch" else ConvStem
        self.patch_embed = stem(model.patch_size, model.embed_dim)
        mel_rows = frontend.n_mels // model.patch_size
        self.frequency_embedding = (
            nn.Parameter(torch.zeros(mel_rows, model.embed_dim)) if model.frequency_embedding else None
        )
        blocks = sum(model.depths)
        drop_path = [model.drop_path * i / max(1, blocks - 1) for i in range(blocks)]
        self.stages = nn.ModuleList()
        for i, depth in enumerate(model.depths):
            first = sum(model.depths[:i])
            self.stages.append(
                Stage(
                    width=model.embed_dim << i,
                    resolution=side >> i,
                    depth=depth,
                    num_heads=model.num_heads[i],
                    window_size=model.window_size,
                    mlp_ratio=model.mlp_ratio,
                    drop_path=drop_path[first : first + depth],
                    merge=i < len(model.depths) - 1,
                )
            )
        self.width = model.embed_dim << (len(model.depths) - 1)
        self.side = side >> (len(model.depths) - 1)
        self.norm = nn.LayerNorm(self.width)
        if model.num_classes and model.token_semantic:
            self.token_semantic = nn.Conv2d(
                self.width, model.num_classes, (self.side // self.groups, 3), padding=(0, 1)
            )
        elif model.num_classes:
            self.head = nn.Linear(self.width, model.num_classes)
        self.reset_parameters()
        self.fine: FineHead | None = None
        if model.fine_frames and model.num_classes:
            mel_cells = [frontend.n_mels // (model.patch_size << i) for i in range(len(model.depths))]
            sources = [cells * (model.embed_dim << i) for i, cells in enumerate(mel_cells)]
            # After the other weights, which it leaves as they would be without it.
            self.fine = FineHead(frontend.n_mels, sources, model.num_classes, model.fine_frames, model.fine_width)

    def reset_parameters(self) -> None:
        """Initialise as the published code: linear layers and position tables normal(0, 0.02), norms 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("relative_position_bias_table"):
                nn.init.trunc_normal_(parameter, std=0.02)
        if self.frequency_embedding is not None:
            # Waves of several lengths along the frequency axis, so that rows differ from the first step on.
            rows, width = self.frequency_embedding.shape
            waves = 2.0 ** torch.linspace(-1, 3, width // 2, device="cpu")
            angle = math.pi * torch.arange(rows, device="cpu").unsqueeze(1) / rows * waves
            self.frequency_embedding.data.copy_(0.5 * torch.cat([angle.sin(), angle.cos()], 1))

    def classifiers(self) -> tuple[nn.Linear | nn.Conv2d, ...]:
        """Return the layer whose outputs are the logits; see ``SoundModel``."""
        if not self.config.num_classes:
            return ()
        return (self.token_semantic if self.config.token_semantic else self.head,)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of each block in the backward pass instead of keeping them."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.gradient_checkpointing = enabled

    def fold(self, tokens: Tensor, groups: int | None = None) -> Tensor:
        """Stack stretches of time along the frequency axis: the square of paper figure 1.

        Args:
            tokens: (batch, time, frequency, width).
            groups: number of stretches; None: as many as fill the square (4 in the published one).

        Returns:
            (batch, time x frequency, width), the raster order of a picture whose row is
            stretch * frequencies + frequency and whose column is the time within the stretch.
        """
        groups = groups or self.groups
        batch, time, _, width = tokens.shape
        stretches = tokens.reshape(batch, groups, time // groups, -1, width)
        return stretches.transpose(2, 3).reshape(batch, -1, width)

    def unfold(self, tokens: Tensor, sides: Sides, groups: int) -> Tensor:
        """Undo ``fold``: put the stretches of a raster (batch, rows x columns, width) one after the other again.

        Returns:
            (batch, time, frequency, width).
        """
        batch, _, width = tokens.shape
        stretches = tokens.view(batch, groups, sides[0] // groups, sides[1], width)
        return stretches.transpose(2, 3).reshape(batch, groups * sides[1], -1, width)

    def encode(self, features: Tensor, maps: list[Tensor] | None = None, taps: list[Tensor] | None = None) -> Tensor:
        """Map normalised features (batch, num_frames, n_mels) to tokens (batch, width, frequency, time).

        The picture of the last stage is unfolded again, so that the last axis is time. ``num_frames`` is that of
        the square or of one of the shorter native sizes (``CheckpointConfig.native_sizes``).

        Args:
            features: normalised.
            maps: if given, the attention maps are appended to it.
            taps: if given, the tokens of each stage before merging are appended: (batch, time, frequency x width).
        """
        x: Tensor = self.patch_embed(features)
        if self.frequency_embedding is not None:
            x = x + self.frequency_embedding
        time, frequencies = x.shape[1:3]
        groups = max(1, features.shape[1] // self.config.image_size)
        x = self.fold(x, groups)
        sides = (groups * frequencies, time // groups)
        for i, stage in enumerate(self.stages):
            before: list[Tensor] | None = None if taps is None else []
            x = stage(x, sides, maps, before)
            if taps is not None and before is not None:
                taps.append(self.unfold(before[0], sides, groups).flatten(2))
            if i < len(self.stages) - 1:
                sides = (sides[0] // 2, sides[1] // 2)
        return self.unfold(self.norm(x), sides, groups).permute(0, 3, 2, 1)

    def analyse(self, features: Tensor, maps: list[Tensor] | None = None) -> Analysis:
        """Return tokens and logits; with a fine head the framewise logits are its own, on a finer grid."""
        taps: list[Tensor] | None = None if self.fine is None else []
        tokens = self.encode(features, maps, taps)
        clipwise, framewise = self.classify(tokens)
        if self.fine is None or taps is None or framewise is None:
            return Analysis(tokens, clipwise, framewise)
        return Analysis(tokens, clipwise, self.fine(features, taps, framewise), framewise)

    def classify(self, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return clip and frame logits, (batch, num_classes) and (batch, num_tokens, num_classes), of tokens.

        Published behaviour kept without the token-semantic head: a frame is the *sum* of its frequency tokens.
        """
        if not self.config.num_classes:
            return None, None
        if not self.config.token_semantic:
            clipwise = self.head(tokens.mean((2, 3)))
            return clipwise, self.head(tokens.sum(2).transpose(1, 2))
        framewise = self.token_semantic(tokens).squeeze(2).transpose(1, 2)
        return pool_tokens(framewise, self.config.clip_pooling), framewise

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the mean token, (batch, width)."""
        return tokens.mean((2, 3))


class PatchEmbed(nn.Module):
    """Cut features into patches and project each (paper section 2.1).

    Maps (batch, frames, n_mels) to (batch, frames / p, n_mels / p, width).
    """

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(patch_size * patch_size, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """Return one token per patch."""
        batch, frames, n_mels = features.shape
        p = self.patch_size
        patches = features.view(batch, frames // p, p, n_mels // p, p).permute(0, 1, 3, 4, 2)
        return self.norm(self.proj(patches.flatten(3)))  # type: ignore[no-any-return]


class ConvStem(nn.Module):
    """A small convolutional network in place of the patch projection: the local patterns come built in.

    At every resolution from half the spectrogram's to the tokens' a 3 x 3 convolution of stride 2 and one of stride 1,
    each with batch norm and ReLU; the width doubles every time. It sees the spectrogram as it is, before it is folded.
    Source: Xiao et al., Early Convolutions Help Transformers See Better (arXiv 2106.14881).

    Maps (batch, frames, n_mels) to (batch, frames / p, n_mels / p, width), where p is a power of 2.
    """

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        levels = patch_size.bit_length() - 1
        self.blocks = nn.ModuleList()
        inputs = 1
        for level in range(levels):
            outputs = width >> (levels - 1 - level)
            layers: list[nn.Module] = []
            for stride in (2, 1):
                convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
                layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            self.blocks.append(nn.Sequential(*layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """Return one token per patch."""
        x = features.unsqueeze(1)
        for block in self.blocks:
            # The layout that convolutions of many channels are fast in, on CPUs and GPUs.
            x = block(x).contiguous(memory_format=torch.channels_last)
        return self.norm(x.permute(0, 2, 3, 1))  # type: ignore[no-any-return]


def pool_tokens(framewise_logits: Tensor, rule: str) -> Tensor:
    """Pool token logits (batch, num_tokens, num_classes) over time to clip logits (batch, num_classes).

    ``mean`` is the published rule: an event must last for most of a clip to carry it. ``logmeanexp`` is a
    smooth maximum, for models whose tokens are trained to be on only while an event sounds.
    """
    if rule == "mean":
        return framewise_logits.mean(1)
    return torch.logsumexp(framewise_logits, 1) - math.log(framewise_logits.shape[1])
