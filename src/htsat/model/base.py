"""What every network has: the front end, the fit of waveforms to a chunk, and the way from there to the outputs.

Stages of ``SoundModel.forward``, each a method that can be called alone:

    waveform -> fit_waveform -> frontend -> fill -> normalise -> encode -> classify, embed

``htsat.model.htsat``, ``cnn14`` and ``crnn`` give the last three.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from htsat.config import CheckpointConfig, FrontendConfig, InferenceConfig, ModelConfig
from htsat.model.frontend import LogMel

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
        embedding: (batch, width), what the network makes of a clip before its classes (published ``latent_output``).
        attention: per block (batch, windows, heads, N, N) if asked for, else empty.
    """

    clipwise_logits: Tensor | None
    framewise_logits: Tensor | None
    embedding: Tensor
    attention: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Analysis:
    """What the network makes of features.

    Attributes:
        tokens: the last axis is time.
        clipwise: (batch, num_classes) logits; None without classes.
        framewise: (batch, num_frames, num_classes) logits at the finest resolution that there is; None without classes.
        coarse: (batch, tokens, num_classes) logits of the tokens that a fine head corrects; None without a fine head.
    """

    tokens: Tensor
    clipwise: Tensor | None
    framewise: Tensor | None
    coarse: Tensor | None = None


class SoundModel(nn.Module, ABC):
    """A network with its front end.

    Args:
        frontend: log-mel settings.
        model: architecture.

    Attributes:
        frontend_config: the first argument.
        config: the second.
        geometry: both with placeholders for what comes with weights; lengths in samples, frames and tokens.
        labels: one per class; numbers until weights with names are loaded.
        checkpoint: ``geometry`` until weights with settings are loaded, then theirs.
        chunk_samples: samples of a chunk.
        num_frames: log-mel frames that a chunk is brought to.
        num_tokens: time steps of the framewise output of a chunk.
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
        self.frontend = LogMel(frontend)
        self.mel_norm = nn.BatchNorm1d(frontend.n_mels)

    @abstractmethod
    def classifiers(self) -> tuple[nn.Linear | nn.Conv2d, ...]:
        """Return the layers whose outputs are the logits of the classes, at most one; none without classes."""

    @abstractmethod
    def encode(self, features: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Map normalised features (batch, T, n_mels) to tokens, whose last axis is time.

        Args:
            features: of a chunk (T is ``num_frames``) or one of the native sizes (``CheckpointConfig.native_sizes``).
            maps: if given, attention maps are appended to it, by networks that have some.
        """

    @abstractmethod
    def classify(self, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return clip and frame logits, (batch, num_classes) and (batch, num_tokens, num_classes), of tokens."""

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Return the embedding of clips, (batch, width), of tokens."""

    def set_prior(self, probability: float) -> None:
        """Let an untrained head expect each class with this probability, which spares training its first steps."""
        for layer in self.classifiers():
            assert layer.bias is not None
            nn.init.constant_(layer.bias, math.log(probability / (1 - probability)))

    @abstractmethod
    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        Raises:
            ConfigError: the network cannot do without them.
        """

    # ------------------------------------------------------------------ input

    def fit_waveform(self, waveform: Tensor, fit: Fit) -> Tensor:
        """Bring waveforms (batch, num_samples) to the length whose log-mel is stretched to ``num_frames``.

        ``pad`` appends silence and ``tile`` repeats the waveform up to one chunk, so that time is never
        distorted; ``native`` appends silence up to the shortest input that holds it (half a chunk, a quarter ...),
        which costs that part of a chunk's work. ``stretch`` and ``repeat`` leave the waveform as it is: there the
        log-mel is stretched.

        Raises:
            ValueError: not (batch, num_samples), too short, or too long.
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
        limit = self.chunk_samples
        if not in_chunk:
            limit = max(limit, self.num_frames * self.frontend_config.hop_length - 1)
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
        """Interpolate log-mel frames (batch, T, n_mels) to the (batch, num_frames, n_mels) that ``encode`` takes.

        Bicubic with aligned corners, as published: frame i of T lands at i (num_frames - 1) / (T - 1).

        Args:
            log_mel: (batch, T, n_mels).
            num_frames: frames of a native size; None: those of a chunk.
        """
        num_frames = num_frames or self.num_frames
        if log_mel.shape[1] == num_frames:
            return log_mel
        size = (num_frames, log_mel.shape[2])
        return F.interpolate(log_mel.unsqueeze(1), size, mode="bicubic", align_corners=True).squeeze(1)

    def normalise(self, log_mel: Tensor) -> Tensor:
        """Batch-normalise each mel bin of (batch, T, n_mels)."""
        return self.mel_norm(log_mel.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]

    def fill(self, log_mel: Tensor, fit: Fit) -> Tensor:
        """Bring the log-mel (batch, T, n_mels) of waveforms that ``fit_waveform`` made to the frames of ``encode``.

        ``stretch`` interpolates, ``repeat`` repeats it as often as it fits first, the others stretch by the constant
        factor of a chunk.
        """
        if fit == "repeat":
            log_mel = log_mel.repeat(1, self.num_frames // log_mel.shape[1], 1)
        return self.stretch(log_mel)

    # ---------------------------------------------------------------- network

    def analyse(self, features: Tensor, maps: list[Tensor] | None = None) -> Analysis:
        """Return tokens and logits of normalised features (batch, T, n_mels); arguments as of ``encode``."""
        tokens = self.encode(features, maps)
        return Analysis(tokens, *self.classify(tokens))

    def forward(self, waveform: Tensor, fit: Fit = "pad", *, attention: bool = False) -> ModelOutput:
        """Name what sounds in each waveform, and when.

        Args:
            waveform: (batch, num_samples) mono at the model's sample rate, nominal [-1, 1], at most one chunk.
            fit: what to do if it is shorter than a chunk. ``pad``, ``tile`` or ``native`` (never distort time; the
                framewise output ends with the waveform; see ``fit_waveform``), ``stretch`` (the published evaluation
                path) or ``repeat`` (the published ``infer_mode``); the last two return all tokens, as published.
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
        if fit == "native":
            log_mel = self.stretch(log_mel, self.geometry.native_frames(waveform.shape[1]))
        else:
            log_mel = self.fill(log_mel, fit)
        maps: list[Tensor] | None = [] if attention else None
        # Pooled over the whole chunk also when the clip is shorter: this is what the head was trained on.
        found = self.analyse(self.normalise(log_mel.to(self.mel_norm.weight.dtype)), maps)
        return ModelOutput(found.clipwise, found.framewise, self.embed(found.tokens), tuple(maps or ()))


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
