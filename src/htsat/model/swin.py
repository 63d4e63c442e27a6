"""Swin transformer stages on tokens that are kept in window order.

A token is one row of a (batch, tokens, width) tensor. Layer norms, linear layers and residuals do
not care in which order the tokens lie, so cyclic shifts, window partition and patch merging are all
one *permutation* of rows, composed beforehand: between two blocks there is a single gather, or none.

Orders: *raster* (row by row), *window* (window by window, each in raster order) and *shifted* (the same
after rolling the raster by half a window). The raster of a full chunk is the published square; that of a
shorter clip is a part of it, with windows that are smaller where it is narrower than they are.

Source: Liu et al., Swin Transformer (arXiv 2103.14030), as in the published HTS-AT ``model/htsat.py``.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

#: rows and columns
Sides = tuple[int, int]
#: added to attention logits between tokens that are neighbours only through the cyclic shift (published value)
MASKED = -100.0


def window_order(sides: Sides, window: Sides, shift: Sides = (0, 0)) -> Tensor:
    """Return the raster index of each token in window order, (rows x columns,) int64.

    Args:
        sides: rows and columns of the raster in tokens, multiples of the window's.
        window: rows and columns of a window in tokens.
        shift: tokens by which the raster is rolled up and left first.
    """
    (rows, columns), (height, width) = sides, window
    raster = torch.arange(rows * columns, device="cpu").view(rows, columns)
    raster = torch.roll(raster, (-shift[0], -shift[1]), (0, 1))
    return raster.view(rows // height, height, columns // width, width).transpose(1, 2).reshape(-1)


def merge_order(sides: Sides) -> Tensor:
    """Return raster indices so that every four consecutive tokens form one 2 x 2 patch, (rows x columns,) int64.

    Patches lie in raster order; inside a patch the order is top left, bottom left, top right, bottom
    right, which is the order of the published ``PatchMerging`` concatenation.
    """
    rows, columns = sides
    raster = torch.arange(rows * columns, device="cpu").view(rows // 2, 2, columns // 2, 2)
    return raster.permute(0, 2, 3, 1).reshape(-1)


def shift_mask(sides: Sides, window: Sides, shift: Sides) -> Tensor:
    """Return what to add to the attention logits of each shifted window, (windows, N, N), 0 or MASKED."""
    regions = []
    for side, size, by in zip(sides, window, shift, strict=True):
        region = torch.zeros(side, dtype=torch.int64, device="cpu")
        if by:
            region[-size:-by] = 1
            region[-by:] = 2
        regions.append(region)
    region = (3 * regions[0][:, None] + regions[1][None, :]).reshape(-1)[window_order(sides, window)]
    region = region.view(-1, window[0] * window[1])
    return torch.where(region[:, None, :] == region[:, :, None], 0.0, MASKED)


def relative_position_index(window_size: int, window: Sides | None = None) -> Tensor:
    """Return for each pair of tokens of a window the row of the bias table, (N, N) int64.

    Args:
        window_size: side of the square window that the table is for.
        window: rows and columns of a smaller window, which uses a part of the table; None: the square one.
    """
    height, width = window or (window_size, window_size)
    rows, columns = torch.meshgrid(torch.arange(height, device="cpu"), torch.arange(width, device="cpu"), indexing="ij")
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


@dataclass(frozen=True, eq=False)
class Plan:
    """How the tokens of a stage are moved and attend, for one size of its raster.

    Attributes:
        moves: before each block, and after the last one: where each token comes from, (tokens,); None: they stay.
        index: (N, N) rows of the bias table for each pair of tokens of a window.
        mask: (windows, N, N), what shifted blocks add to their attention logits; None if nothing is shifted.
        back: from the order that patch merging takes to raster order; None: they are the same.
    """

    moves: tuple[Tensor | None, ...]
    index: Tensor
    mask: Tensor | None
    back: Tensor | None


def plan_stage(sides: Sides, window_size: int, depth: int, merge: bool, device: torch.device) -> Plan:
    """Plan a stage of ``depth`` blocks on a raster of ``sides``, followed by patch merging or not."""
    window = (min(window_size, sides[0]), min(window_size, sides[1]))
    shift = tuple(0 if side <= size else window_size // 2 for side, size in zip(sides, window, strict=True))
    shift = (shift[0], shift[1])
    raster = torch.arange(sides[0] * sides[1], device="cpu")
    orders = [window_order(sides, window, shift if i % 2 else (0, 0)) for i in range(depth)]
    current, moves = raster, []  # raster index of each token as it lies now
    for target in [*orders, merge_order(sides) if merge else raster]:
        move = torch.argsort(current)[target]
        moves.append(None if torch.equal(move, raster) else move.to(device))
        current = target
    mask = shift_mask(sides, window, shift).to(device) if depth > 1 and any(shift) else None
    back = None if torch.equal(current, raster) else torch.argsort(current).to(device)
    return Plan(tuple(moves), relative_position_index(window_size, window).to(device), mask, back)


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a relative position bias.

    Args:
        width: features per token.
        num_heads: attention heads.
        window_size: side of the largest window in tokens.
    """

    def __init__(self, width: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (width // num_heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))

    def _bias(self, index: Tensor, mask: Tensor | None) -> Tensor:
        """Return position bias plus mask, (windows or 1, heads, N, N)."""
        bias = self.relative_position_bias_table[index.view(-1)].view(*index.shape, -1)
        bias = bias.permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            bias = bias + mask.to(bias.dtype).unsqueeze(1)
        return bias

    def forward(self, x: Tensor, index: Tensor, mask: Tensor | None, maps: list[Tensor] | None = None) -> Tensor:
        """Attend within windows.

        Args:
            x: (batch, tokens, width) in window order.
            index: (N, N) rows of the bias table, where N is the number of tokens of a window.
            mask: (windows, N, N) in shifted blocks.
            maps: if given, the attention map (batch, windows, heads, N, N) is appended to it.

        Returns:
            (batch, tokens, width) in the same order.
        """
        batch, length, width = x.shape
        tokens = index.shape[0]
        windows = length // tokens
        qkv = linear(self.qkv, x).view(batch * windows, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (batch * windows, heads, N, head width)
        bias = self._bias(index, mask).to(q.dtype)
        fused = maps is None and (x.is_cuda or not torch.is_grad_enabled())
        if not fused:
            # Also the faster way to train on a CPU, whose fused backward is slow at 64 tokens.
            logits = (q * self.scale) @ k.transpose(-2, -1)
            logits = logits.view(batch, windows, self.num_heads, tokens, tokens) + bias
            attention = logits.softmax(-1)
            if maps is not None:
                maps.append(attention)
            out = attention.view(batch * windows, self.num_heads, tokens, tokens).to(v.dtype) @ v
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

    def __init__(self, width: int, num_heads: int, window_size: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, num_heads, window_size)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, x: Tensor, index: Tensor, mask: Tensor | None, maps: list[Tensor] | None = None) -> Tensor:
        """Return tokens (batch, tokens, width) in the order they came in; see ``WindowAttention.forward``."""
        x = x + self.drop_path(self.attn(self.norm1(x), index, mask, maps))
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

    Takes and returns tokens in raster order.
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
        # Of the largest raster, the square: it decides the size of the position tables.
        self.window_size = min(window_size, resolution)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, self.window_size, mlp_ratio, drop_path[i]) for i in range(depth)
        )
        self.merge = PatchMerging(width) if merge else None
        self.gradient_checkpointing = False
        self._plans: dict[tuple[Sides, torch.device], Plan] = {}

    def plan(self, sides: Sides, device: torch.device) -> Plan:
        """Return the plan for a raster of ``sides``, made once."""
        key = (sides, device)
        if key not in self._plans:
            with torch.inference_mode(False):  # it may take part in a gradient later
                self._plans[key] = plan_stage(sides, self.window_size, len(self.blocks), self.merge is not None, device)
        return self._plans[key]

    def forward(
        self, x: Tensor, sides: Sides, maps: list[Tensor] | None = None, taps: list[Tensor] | None = None
    ) -> Tensor:
        """Map (batch, rows x columns, width) to (batch, tokens / 4, 2 width); the last stage keeps the shape.

        Args:
            x: tokens in raster order.
            sides: of the raster.
            maps: if given, attention maps are appended to it.
            taps: if given, the tokens before merging, in raster order, are appended to it.
        """
        plan = self.plan(sides, x.device)
        for i, block in enumerate(self.blocks):
            x = _moved(x, plan.moves[i])
            mask = plan.mask if i % 2 else None
            if self.gradient_checkpointing and torch.is_grad_enabled() and maps is None:
                x = checkpoint(block, x, plan.index, mask, use_reentrant=False)
            else:
                x = block(x, plan.index, mask, maps)
        x = _moved(x, plan.moves[-1])
        if taps is not None:
            taps.append(_moved(x, plan.back))
        return x if self.merge is None else self.merge(x)


def _moved(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else permute_tokens(x, order)
