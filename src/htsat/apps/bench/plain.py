"""HTS-AT as one would write it from its published description: what ``htsat bench`` counts as 1.

A straightforward port, on purpose: the STFT is a convolution with DFT matrices, every block rolls the square, cuts
it into windows and puts it together again, attention is written out and its maps are averaged per stage, and each
token of the framewise output is repeated 32 times. It takes the weights of our model and gives the same figures.

It stands for the published code: the same operations in the same order, 14.14 GFLOP per ten-second clip in both,
without that code's other dependencies and its unused last layer.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from htsat.audio.mel import mel_filterbank
from htsat.config import FrontendConfig, ModelConfig
from htsat.errors import ConfigError
from htsat.model.base import SoundModel


def unlike(frontend: FrontendConfig, config: ModelConfig) -> str | None:
    """Return in what a network is not the published one, and so cannot be written as plainly; None if it is."""
    if config.architecture != "htsat":
        return f"is a {config.architecture}"
    if not config.num_classes or not config.token_semantic or config.clip_pooling != "mean":
        return "has another head"
    if config.fine_frames:
        return "has a fine head"
    if config.stem != "patch" or config.frequency_embedding:
        return "makes its tokens otherwise"
    return None if frontend.floor_db == -100 else "hears another floor"


class PlainSpectrogram(nn.Module):
    """Waveform (batch, num_samples) -> power spectrogram (batch, 1, T, n_fft / 2 + 1), by convolution."""

    def __init__(self, n_fft: int, hop_length: int) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        sample = torch.arange(n_fft, dtype=torch.float64)
        window = 0.5 - 0.5 * torch.cos(2 * math.pi * sample / n_fft)
        # k n modulo n_fft keeps the angle small, hence exact.
        angle = 2 * math.pi * (torch.outer(torch.arange(n_fft // 2 + 1), torch.arange(n_fft)) % n_fft) / n_fft
        self.register_buffer("real", (torch.cos(angle.double()) * window).float().unsqueeze(1))
        self.register_buffer("imag", (-torch.sin(angle.double()) * window).float().unsqueeze(1))
        self.real: Tensor
        self.imag: Tensor

    def forward(self, waveform: Tensor) -> Tensor:
        """Return the power spectrogram."""
        x = F.pad(waveform[:, None, :], (self.n_fft // 2, self.n_fft // 2), mode="reflect")
        real = F.conv1d(x, self.real, stride=self.hop_length)
        imag = F.conv1d(x, self.imag, stride=self.hop_length)
        return (real**2 + imag**2)[:, None, :, :].transpose(2, 3)


class PlainLogMel(nn.Module):
    """Power spectrogram (batch, 1, T, bins) -> log-mel spectrogram (batch, 1, T, n_mels), dB."""

    def __init__(self, config: FrontendConfig) -> None:
        super().__init__()
        self.register_buffer("filters", torch.from_numpy(mel_filterbank(config)).float())
        self.filters: Tensor

    def forward(self, power: Tensor) -> Tensor:
        """Return the log-mel spectrogram."""
        return 10.0 * torch.log10(torch.clamp(torch.matmul(power, self.filters), min=1e-10))


def cut_windows(x: Tensor, window_size: int) -> Tensor:
    """(batch, H, W, C) -> (batch * windows, window_size, window_size, C)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window_size, window_size, width // window_size, window_size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window_size, window_size, channels)


def join_windows(windows: Tensor, window_size: int, height: int, width: int) -> Tensor:
    """(batch * windows, window_size, window_size, C) -> (batch, H, W, C)."""
    rows, columns = height // window_size, width // window_size
    x = windows.view(-1, rows, columns, window_size, window_size, windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, height, width, windows.shape[-1])


class PlainAttention(nn.Module):
    """Attention inside windows, written out; returns its maps as well."""

    def __init__(self, dim: int, window_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        span = torch.arange(window_size)
        position = torch.stack(torch.meshgrid(span, span, indexing="ij")).flatten(1)
        delta = (position[:, :, None] - position[:, None, :]).permute(1, 2, 0) + window_size - 1
        self.register_buffer("index", delta[:, :, 0] * (2 * window_size - 1) + delta[:, :, 1])
        self.index: Tensor

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the new tokens of the windows, and the attention maps."""
        count, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(count, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        attention = (query * self.scale) @ key.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.index.view(-1)].view(tokens, tokens, -1)
        attention = attention + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            windows = mask.shape[0]
            attention = attention.view(count // windows, windows, self.num_heads, tokens, tokens)
            attention = (attention + mask.unsqueeze(1).unsqueeze(0)).view(-1, self.num_heads, tokens, tokens)
        attention = torch.softmax(attention, dim=-1)
        return self.proj((attention @ value).transpose(1, 2).reshape(count, tokens, dim)), attention


class PlainMlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the new tokens."""
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class PlainBlock(nn.Module):
    """Transformer block that rolls the square before its attention and back after it."""

    def __init__(self, dim: int, side: int, num_heads: int, window_size: int, shift: int, mlp_ratio: float) -> None:
        super().__init__()
        self.side, self.window_size, self.shift = side, window_size, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = PlainAttention(dim, window_size, num_heads)
        self.mlp = PlainMlp(dim, int(dim * mlp_ratio))
        mask = None
        if shift:
            region = torch.zeros(1, side, side, 1)
            slices = (slice(0, -window_size), slice(-window_size, -shift), slice(-shift, None))
            for number, (rows, columns) in enumerate((r, c) for r in slices for c in slices):
                region[:, rows, columns, :] = number
            region = cut_windows(region, window_size).view(-1, window_size * window_size)
            mask = (region.unsqueeze(1) != region.unsqueeze(2)).float() * -100.0
        self.register_buffer("mask", mask)
        self.mask: Tensor | None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new tokens, and the attention maps."""
        batch, tokens, dim = x.shape
        shortcut = x
        x = self.norm1(x).view(batch, self.side, self.side, dim)
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = cut_windows(x, self.window_size).view(-1, self.window_size * self.window_size, dim)
        windows, attention = self.attn(windows, self.mask)
        windows = windows.view(-1, self.window_size, self.window_size, dim)
        x = join_windows(windows, self.window_size, self.side, self.side)
        if self.shift:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        x = shortcut + x.view(batch, tokens, dim)
        return x + self.mlp(self.norm2(x)), attention


class PlainMerging(nn.Module):
    """Concatenate each 2 x 2 patch and halve its width."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return a quarter of the tokens, twice as wide."""
        batch, _, dim = x.shape
        x = x.view(batch, self.side, self.side, dim)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.reduction(self.norm(x.view(batch, -1, 4 * dim)))  # type: ignore[no-any-return]


class PlainStage(nn.Module):
    """Blocks of one resolution; returns the mean of their attention maps too."""

    def __init__(
        self, dim: int, side: int, depth: int, num_heads: int, window_size: int, mlp_ratio: float, merge: bool
    ) -> None:
        super().__init__()
        window_size = min(window_size, side)
        shift = 0 if side <= window_size else window_size // 2
        self.blocks = nn.ModuleList(
            PlainBlock(dim, side, num_heads, window_size, shift if i % 2 else 0, mlp_ratio) for i in range(depth)
        )
        self.merge = PlainMerging(dim, side) if merge else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new tokens, and the mean of the attention maps."""
        maps = []
        for block in self.blocks:
            x, attention = block(x)
            maps.append(attention.unsqueeze(0))
        if self.merge is not None:
            x = self.merge(x)
        return x, torch.mean(torch.cat(maps, dim=0), dim=0)


class PlainHTSAT(nn.Module):
    """The whole network with the token-semantic head: waveform -> posteriors."""

    def __init__(self, frontend: FrontendConfig, config: ModelConfig) -> None:
        super().__init__()
        if reason := unlike(frontend, config):
            raise ConfigError(f"the plain network is the published one; this one {reason}")
        self.config = config
        self.groups = config.image_size // frontend.n_mels
        self.frames = config.image_size * self.groups
        side = config.image_size // config.patch_size
        self.spectrogram = PlainSpectrogram(frontend.n_fft, frontend.hop_length)
        self.log_mel = PlainLogMel(frontend)
        self.bn0 = nn.BatchNorm2d(frontend.n_mels)
        self.patch_proj = nn.Conv2d(1, config.embed_dim, config.patch_size, config.patch_size)
        self.patch_norm = nn.LayerNorm(config.embed_dim)
        last = len(config.depths) - 1
        self.stages = nn.ModuleList(
            PlainStage(
                config.embed_dim * 2**i,
                side // 2**i,
                depth,
                config.num_heads[i],
                config.window_size,
                config.mlp_ratio,
                merge=i < last,
            )
            for i, depth in enumerate(config.depths)
        )
        width = config.embed_dim * 2**last
        self.norm = nn.LayerNorm(width)
        self.token_height = side // 2**last // self.groups
        self.tscam_conv = nn.Conv2d(width, config.num_classes, (self.token_height, 3), padding=(0, 1))

    def fold(self, x: Tensor) -> Tensor:
        """(batch, 1, T, n_mels) -> (batch, 1, image_size, image_size), stretched to fill it."""
        if x.shape[2] < self.frames:
            x = F.interpolate(x, (self.frames, x.shape[3]), mode="bicubic", align_corners=True)
        x = x.permute(0, 1, 3, 2).contiguous()
        x = x.reshape(x.shape[0], 1, x.shape[2], self.groups, x.shape[3] // self.groups)
        x = x.permute(0, 1, 3, 2, 4).contiguous()
        return x.reshape(x.shape[0], 1, self.config.image_size, self.config.image_size)

    def forward(self, waveform: Tensor) -> dict[str, Tensor]:
        """Return clip posteriors, repeated framewise posteriors and the mean token."""
        x = self.log_mel(self.spectrogram(waveform))
        x = self.bn0(x.transpose(1, 3)).transpose(1, 3)
        x = self.patch_norm(self.patch_proj(self.fold(x)).flatten(2).transpose(1, 2))
        for stage in self.stages:
            x, _ = stage(x)
        x = self.norm(x)
        batch, tokens, width = x.shape
        side = math.isqrt(tokens)
        x = x.permute(0, 2, 1).contiguous().reshape(batch, width, side, side)
        x = x.reshape(batch, width, side // self.token_height, self.token_height, side)
        x = x.permute(0, 1, 3, 2, 4).contiguous().reshape(batch, width, self.token_height, -1)
        latent = torch.flatten(F.adaptive_avg_pool1d(torch.flatten(x, 2), 1), 1)
        x = torch.flatten(self.tscam_conv(x), 2)
        framewise = torch.sigmoid(x).permute(0, 2, 1).contiguous()
        repeat = self.frames // framewise.shape[1]
        framewise = framewise[:, :, None, :].repeat(1, 1, repeat, 1).reshape(batch, -1, framewise.shape[2])
        clipwise = torch.sigmoid(torch.flatten(F.adaptive_avg_pool1d(x, 1), 1))
        return {"clipwise": clipwise, "framewise": framewise, "latent": latent}


def plain_port_of(model: SoundModel) -> PlainHTSAT:
    """Return the plain port with the weights of our model, in eval mode."""
    port = PlainHTSAT(model.frontend_config, model.config).eval()
    state = {}
    for name, value in model.state_dict().items():
        for ours, plain in (
            ("mel_norm.", "bn0."),
            ("patch_embed.proj.", "patch_proj."),
            ("patch_embed.norm.", "patch_norm."),
            ("token_semantic.", "tscam_conv."),
        ):
            name = name.replace(ours, plain)
        state[name] = value.view_as(port.patch_proj.weight) if name == "patch_proj.weight" else value
    constants = {name: value for name, value in port.state_dict().items() if name not in state}
    unknown = [n for n in constants if not n.endswith((".real", ".imag", ".filters", ".index", ".mask"))]
    if unknown:
        raise ConfigError(f"weights of the plain network that the model does not give: {', '.join(unknown)}")
    port.load_state_dict(state | constants)
    return port
