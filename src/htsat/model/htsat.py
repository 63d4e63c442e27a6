"""HTS-AT: log-mel front end, fold, Swin stages, token-semantic head.

Stages of ``HTSAT.forward``, each a method that can be called alone:

    waveform -> fit_waveform -> frontend -> stretch -> normalise -> encode (embed, fold, Swin stages) -> classify

Source: Chen et al., HTS-AT (arXiv 2202.00874) and the published ``model/htsat.py``.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from htsat.config import CheckpointConfig, FrontendConfig, InferenceConfig, ModelConfig
from htsat.model.frontend import LogMel
from htsat.model.swin import Stage

#: how a waveform that does not fill a chunk is fitted to it
Fit = Literal["pad", "tile", "native", "stretch", "repeat"]
FITS: tuple[Fit, ...] = ("pad", "tile", "native", "stretch", "repeat")
#: those that never distort time
IN_TIME: tuple[Fit, ...] = ("pad", "tile", "native")


@dataclass(frozen=True, eq=False)
class ModelOutput:
    """What the network says of a batch.

    Attributes:
        clipwise_logits: (batch, num_classes); None without classes.
        framewise_logits: (batch, num_frames, num_classes), one row per token, never repeated; None without classes.
        embedding: (batch, width), the mean token before the head (the published ``latent_output``).
        attention: per block (batch, windows, heads, N, N) if asked for, else empty.
    """

    clipwise_logits: Tensor | None
    framewise_logits: Tensor | None
    embedding: Tensor
    attention: tuple[Tensor, ...] = ()


class HTSAT(nn.Module):
    """The network with its front end.

    Args:
        frontend: log-mel settings.
        model: architecture.
    """

    def __init__(self, frontend: FrontendConfig, model: ModelConfig) -> None:
        super().__init__()
        # CheckpointConfig holds the checks that involve both sections; labels do not matter here.
        geometry = CheckpointConfig(
            frontend,
            model,
            labels=tuple(str(i) for i in range(model.num_classes)),
            inference=InferenceConfig(hop_seconds=min(model.chunk_seconds, InferenceConfig.hop_seconds)),
        )
        self.frontend_config, self.config = frontend, model
        self.chunk_samples, self.num_frames = geometry.chunk_samples, geometry.num_frames
        self.num_tokens = geometry.num_tokens
        # Replaced by ``load_model``, with the names and settings that came with the weights.
        self.labels: tuple[str, ...] = geometry.labels
        self.checkpoint = self.geometry = geometry
        self.groups = model.image_size // frontend.n_mels  # stretches of time stacked along the frequency axis

        self.frontend = LogMel(frontend)
        self.mel_norm = nn.BatchNorm1d(frontend.n_mels)
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

    def set_prior(self, probability: float) -> None:
        """Let an untrained head expect each class with this probability, which spares training its first steps."""
        bias = (self.token_semantic if self.config.token_semantic else self.head).bias
        assert bias is not None
        nn.init.constant_(bias, math.log(probability / (1 - probability)))

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of each block in the backward pass instead of keeping them."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.gradient_checkpointing = enabled

    # ------------------------------------------------------------------ input

    def fit_waveform(self, waveform: Tensor, fit: Fit) -> Tensor:
        """Bring waveforms (batch, num_samples) to the length whose log-mel is stretched to the square.

        ``pad`` appends silence and ``tile`` repeats the waveform up to one chunk, so that time is never
        distorted; ``native`` appends silence up to the shortest input that holds it (half a chunk, a quarter ...),
        which costs that part of a chunk's work. ``stretch`` and ``repeat`` leave the waveform as it is: there the
        log-mel is stretched.

        Raises:
            ValueError: not (batch, num_samples), too short, or longer than the square.
        """
        if fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")
        if waveform.ndim != 2:
            raise ValueError(f"waveform must be (batch, num_samples), got shape {tuple(waveform.shape)}")
        if not waveform.is_floating_point():
            raise ValueError(f"waveform must be floating point in [-1, 1], got {waveform.dtype}")
        if not len(waveform):
            raise ValueError("waveform holds no clip: its shape is (0, num_samples)")
        num_samples = waveform.shape[1]
        in_chunk = fit in IN_TIME
        limit = self.chunk_samples if in_chunk else self.num_frames * self.frontend_config.hop_length - 1
        least = 1 if in_chunk else self.frontend_config.n_fft // 2 + 1
        if not least <= num_samples <= limit:
            rate = self.frontend_config.sample_rate
            raise ValueError(
                f"waveform has {num_samples} samples ({num_samples / rate:.2f} s at {rate} Hz); with fit={fit!r} the "
                f"model takes {least} to {limit}; htsat.Predictor handles recordings of any length"
            )
        if not in_chunk or num_samples == self.chunk_samples:
            return waveform
        if fit in ("pad", "native"):
            length = self.chunk_samples if fit == "pad" else self.geometry.native_samples(num_samples)
            return F.pad(waveform, (0, length - num_samples))
        repeats = -(-self.chunk_samples // num_samples)
        return waveform.repeat(1, repeats)[:, : self.chunk_samples]

    def stretch(self, log_mel: Tensor, num_frames: int | None = None) -> Tensor:
        """Interpolate log-mel frames (batch, T, n_mels) to the (batch, num_frames, n_mels) that the stages take.

        Bicubic with aligned corners, as published: frame i of T lands at i (num_frames - 1) / (T - 1).

        Args:
            log_mel: (batch, T, n_mels).
            num_frames: frames of a native size; None: those that fill the square.
        """
        num_frames = num_frames or self.num_frames
        if log_mel.shape[1] == num_frames:
            return log_mel
        size = (num_frames, log_mel.shape[2])
        return F.interpolate(log_mel.unsqueeze(1), size, mode="bicubic", align_corners=True).squeeze(1)

    def normalise(self, log_mel: Tensor) -> Tensor:
        """Batch-normalise each mel bin of (batch, T, n_mels)."""
        return self.mel_norm(log_mel.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]

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

    # ---------------------------------------------------------------- network

    def encode(self, features: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Map normalised features (batch, num_frames, n_mels) to tokens (batch, width, frequency, num_tokens).

        The picture of the last stage is unfolded again, so that the last axis is time. ``num_frames`` is that of
        the square or of one of the shorter native sizes (``CheckpointConfig.native_sizes``).
        """
        x: Tensor = self.patch_embed(features)
        if self.frequency_embedding is not None:
            x = x + self.frequency_embedding
        time, frequencies = x.shape[1:3]
        groups = max(1, features.shape[1] // self.config.image_size)
        x = self.fold(x, groups)
        sides = (groups * frequencies, time // groups)
        for stage in self.stages:
            x = stage(x, sides, maps)
            sides = (sides[0] // 2, sides[1] // 2)
        x = self.norm(x)
        batch, rows = x.shape[0], self.side // self.groups
        x = x.view(batch, groups, rows, -1, self.width)
        return x.permute(0, 4, 2, 1, 3).reshape(batch, self.width, rows, -1)

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

    def forward(self, waveform: Tensor, fit: Fit = "pad", *, attention: bool = False) -> ModelOutput:
        """Name what sounds in each waveform, and when.

        Args:
            waveform: (batch, num_samples) mono at the model's sample rate, nominal [-1, 1], at most one chunk.
            fit: what to do if it is shorter than a chunk. ``pad``, ``tile`` or ``native`` (never distort time; the
                framewise output ends with the waveform; see ``fit_waveform``), ``stretch`` (the published evaluation
                path) or ``repeat`` (the published ``infer_mode``); the last two return all tokens of the square, as
                published.
            attention: also return the attention maps (slower).

        Raises:
            ValueError: wrong shape or length; see ``fit_waveform``.
        """
        waveform, num_samples = self.fit_waveform(waveform, fit), waveform.shape[1]
        inferring = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if waveform.device.type == "cpu" and inferring:
            # Clip by clip: no slower on a CPU, needs a fraction of the memory, and a clip gets the same bits in any
            # batch (matrix products and reductions may choose their order of summation by the size of the batch).
            clips = [self._run(clip.unsqueeze(0), fit, attention) for clip in waveform]
            output = clips[0] if len(clips) == 1 else _concatenate(clips)
        else:
            output = self._run(waveform, fit, attention)
        if output.framewise_logits is None or fit not in IN_TIME:
            return output
        num_frames = -(-num_samples * self.num_tokens // self.chunk_samples)
        return replace(output, framewise_logits=output.framewise_logits[:, :num_frames])

    def _run(self, waveform: Tensor, fit: Fit, attention: bool) -> ModelOutput:
        """Run the network on waveforms that fit it."""
        log_mel = self.frontend(waveform)
        num_frames = self.num_frames
        if fit == "native":
            num_frames = self.geometry.native_frames(waveform.shape[1])
        if fit == "repeat":
            log_mel = log_mel.repeat(1, self.num_frames // log_mel.shape[1], 1)
        maps: list[Tensor] | None = [] if attention else None
        tokens = self.encode(self.normalise(self.stretch(log_mel, num_frames)), maps)
        # Pooled over the whole chunk also when the clip is shorter: this is what the head was trained on.
        clipwise, framewise = self.classify(tokens)
        return ModelOutput(clipwise, framewise, tokens.mean((2, 3)), tuple(maps or ()))


def _concatenate(outputs: list[ModelOutput]) -> ModelOutput:
    """Join the outputs of single clips to those of a batch."""

    def joined(tensors: list[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    return ModelOutput(
        joined([o.clipwise_logits for o in outputs]),
        joined([o.framewise_logits for o in outputs]),
        torch.cat([o.embedding for o in outputs]),
        tuple(torch.cat(maps) for maps in zip(*(o.attention for o in outputs), strict=True)),
    )


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
