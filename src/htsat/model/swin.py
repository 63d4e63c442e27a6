"""Swin transformer stages on tokens that are kept in window order.

A token is one row of a (batch, tokens, width) tensor. Layer norms, linear layers and residuals do
not care in which order the tokens lie, so cyclic shifts, window partition and patch merging are all
one *permutation* of rows, composed beforehand: between two blocks there is a single gather, or none.

Orders: *raster* (row by row over the square), *window* (window by window, each in raster order) and
*shifted* (the same after rolling the square by half a window).

Source: Liu et al., Swin Transformer (arXiv 2103.14030), as in the published HTS-AT ``model/htsat.py``.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

#: added to attention logits between tokens that are neighbours only through the cyclic shift (published value)
MASKED = -100.0


def window_order(resolution: int, window_size: int, shift: int = 0) -> Tensor:
    """Return the raster index of each token in window order, (resolution^2,) int64.

    Args:
        resolution: side of the square in tokens, a multiple of window_size.
        window_size: side of a window in tokens.
        shift: tokens by which the square is rolled up and left first.
    """
    raster = torch.arange(resolution * resolution, device="cpu").view(resolution, resolution)
    raster = torch.roll(raster, (-shift, -shift), (0, 1))
    windows = resolution // window_size
    return raster.view(windows, window_size, windows, window_size).transpose(1, 2).reshape(-1)


def merge_order(resolution: int) -> Tensor:
    """Return raster indices so that every four consecutive tokens form one 2 x 2 patch, (resolution^2,) int64.

    Patches lie in raster order; inside a patch the order is top left, bottom left, top right, bottom
    right, which is the order of the published ``PatchMerging`` concatenation.
    """
    half = resolution // 2
    raster = torch.arange(resolution * resolution, device="cpu").view(half, 2, half, 2)
    return raster.permute(0, 2, 3, 1).reshape(-1)


def shift_mask(resolution: int, window_size: int, shift: int) -> Tensor:
    """Return what to add to the attention logits of each shifted window, (windows, N, N), 0 or MASKED."""
    sides = torch.zeros(resolution, dtype=torch.int64, device="cpu")
    sides[-window_size:-shift] = 1
    sides[-shift:] = 2
    region = (3 * sides[:, None] + sides[None, :]).reshape(-1)[window_order(resolution, window_size)]
    region = region.view(-1, window_size * window_size)
    return torch.where(region[:, None, :] == region[:, :, None], 0.0, MASKED)


def relative_position_index(window_size: int) -> Tensor:
    """Return for each pair of tokens of a window the row of the bias table, (N, N) int64."""
    position = torch.arange(window_size, device="cpu")
    rows, columns = torch.meshgrid(position, position, indexing="ij")
    delta_row = rows.reshape(-1, 1) - rows.reshape(1, -1) + window_size - 1
    delta_column = columns.reshape(-1, 1) - columns.reshape(1, -1) + window_size - 1
    return delta_row * (2 * window_size - 1) + delta_column


class _Permute(torch.autograd.Function):
    """Gather rows by a permutation; the gradient is the inverse gather (index_select's would scatter-add)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grad[0].index_select(1, torch.argsort(order)), None


def permute_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Return ``x`` (batch, tokens, width) with its tokens in ``order``, a permutation (tokens,) int64."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Permute.apply(x, order)  # type: ignore[no-any-return, no-untyped-call]
    return x.index_select(1, order)


def linear(layer: nn.Linear, x: Tensor, activation: Literal["none", "gelu"] = "none") -> Tensor:
    """Apply a linear layer, and GELU if asked for.

    Without gradients on a CPU both are one oneDNN call: torch's linear layer goes to MKL, which is slower at
    these shapes (a quarter on AMD), and writes what GELU reads again.
    """
    fused = (
        x.is_cpu
        and x.dtype == layer.weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
    if fused:
        return torch.ops.mkldnn._linear_pointwise(  # type: ignore[no-any-return]
            x, layer.weight, layer.bias, activation, [], "none"
        )
    x = layer(x)
    return F.gelu(x) if activation == "gelu" else x


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the whole branch of a clip with probability ``rate``."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return x (batch, ...), with the rows of dropped clips zero and the others scaled up."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (kept / keep)


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a relative position bias.

    Args:
        width: features per token.
        num_heads: attention heads.
        window_size: side of a window in tokens.
        mask: (windows, N, N) from ``shift_mask``, or None in unshifted blocks.
    """

    relative_position_index: Tensor
    mask: Tensor | None

    def __init__(self, width: int, num_heads: int, window_size: int, mask: Tensor | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.tokens = window_size * window_size
        self.scale = (width // num_heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window_size), persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    def _bias(self) -> Tensor:
        """Return position bias plus mask, (windows or 1, heads, N, N)."""
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(
            self.tokens, self.tokens, -1
        )
        bias = bias.permute(2, 0, 1).unsqueeze(0)
        if self.mask is not None:
            bias = bias + self.mask.to(bias.dtype).unsqueeze(1)
        return bias

    def forward(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Attend within windows.

        Args:
            x: (batch, tokens, width) in window order.
            maps: if given, the attention map (batch, windows, heads, N, N) is appended to it.

        Returns:
            (batch, tokens, width) in the same order.
        """
        batch, length, width = x.shape
        windows = length // self.tokens
        qkv = linear(self.qkv, x).view(batch * windows, self.tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch * windows, heads, N, head width)
        bias = self._bias().to(q.dtype)
        fused = maps is None and (x.is_cuda or not torch.is_grad_enabled())
        if not fused:
            # Also the faster way to train on a CPU, whose fused backward is slow at 64 tokens.
            logits = (q * self.scale) @ k.transpose(-2, -1)
            logits = logits.view(batch, windows, self.num_heads, self.tokens, self.tokens) + bias
            attention = logits.softmax(-1)
            if maps is not None:
                maps.append(attention)
            out = attention.view(batch * windows, self.num_heads, self.tokens, self.tokens).to(v.dtype) @ v
        elif bias.shape[0] == 1 or batch == 1:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.repeat(batch, 1, 1, 1), scale=self.scale)
        return linear(self.proj, out.transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    """Feed-forward layer with GELU: (..., width) -> (..., width)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transformed tokens."""
        return linear(self.fc2, linear(self.fc1, x, "gelu"))


class Block(nn.Module):
    """Transformer block: attention in windows and a feed-forward layer, each behind a norm and around a residual."""

    def __init__(
        self, width: int, num_heads: int, window_size: int, mask: Tensor | None, mlp_ratio: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, num_heads, window_size, mask)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Return tokens (batch, tokens, width) in the order they came in."""
        x = x + self.drop_path(self.attn(self.norm1(x), maps))
        return x + self.drop_path(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class PatchMerging(nn.Module):
    """Join each 2 x 2 patch of tokens into one of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, width), four consecutive tokens a patch, to (batch, tokens / 4, 2 width)."""
        batch, length, width = x.shape
        return linear(self.reduction, self.norm(x.reshape(batch, length // 4, 4 * width)))


class Stage(nn.Module):
    """Blocks at one resolution, alternately unshifted and shifted, then patch merging (but in the last stage).

    Takes and returns tokens in raster order of the square.
    """

    def __init__(
        self,
        *,
        width: int,
        resolution: int,
        depth: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float,
        drop_path: list[float],
        merge: bool,
    ) -> None:
        super().__init__()
        window_size = min(window_size, resolution)
        shift = 0 if resolution <= window_size else window_size // 2
        mask = shift_mask(resolution, window_size, shift) if shift else None
        self.blocks = nn.ModuleList(
            Block(width, num_heads, window_size, mask if i % 2 else None, mlp_ratio, drop_path[i]) for i in range(depth)
        )
        self.merge = PatchMerging(width) if merge else None

        orders = [window_order(resolution, window_size, shift if i % 2 else 0) for i in range(depth)]
        raster = torch.arange(resolution * resolution, device="cpu")
        out = merge_order(resolution) if merge else raster
        current = raster  # raster index of each token as it lies now
        for step, target in enumerate([*orders, out]):
            move = torch.argsort(current)[target]
            still = torch.equal(move, raster)
            self.register_buffer(f"move{step}", None if still else move, persistent=False)
            current = target
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Map (batch, resolution^2, width) to (batch, resolution^2 / 4, 2 width); the last stage keeps the shape."""
        for step, block in enumerate(self.blocks):
            x = self._move(x, step)
            if self.gradient_checkpointing and torch.is_grad_enabled() and maps is None:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, maps)
        x = self._move(x, len(self.blocks))
        return x if self.merge is None else self.merge(x)

    def _move(self, x: Tensor, step: int) -> Tensor:
        order = getattr(self, f"move{step}")
        return x if order is None else permute_tokens(x, order)
