"""The network: against straightforward code written here, hand-worked cases and invariants.

Agreement with the published implementation is in ``test_golden.py``.
"""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from htsat.audio.mel import log_mel
from htsat.config import FrontendConfig, ModelConfig
from htsat.model.htsat import FITS, HTSAT, ConvStem, ModelOutput, pool_tokens
from htsat.model.swin import (
    DropPath,
    Stage,
    merge_order,
    permute_tokens,
    relative_position_index,
    shift_mask,
    window_order,
)

#: two stages of 16 x 16 and 8 x 8 tokens, 5-s chunks of 40,000 samples, 32 time steps
SMALL_FRONTEND = FrontendConfig(sample_rate=8000, n_fft=256, hop_length=160, n_mels=16, f_max=4000.0)
SMALL = ModelConfig(
    num_classes=5,
    embed_dim=16,
    depths=(2, 2),
    num_heads=(2, 4),
    window_size=4,
    image_size=64,
    chunk_seconds=5.0,
)
CHUNK = 40_000


def randomise(model: HTSAT, seed: int = 0) -> HTSAT:
    """Replace the small initial weights by ones whose every part shows in the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if name.endswith("relative_position_bias_table"):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim >= 2:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.1 * noise)
        assert model.mel_norm.running_mean is not None and model.mel_norm.running_var is not None
        model.mel_norm.running_mean.fill_(-20.0)
        model.mel_norm.running_var.fill_(100.0)
    return model


def build(frontend: FrontendConfig = SMALL_FRONTEND, **changes: Any) -> HTSAT:
    """Return a small model with telling weights, in eval mode; ``changes`` replace settings of ``SMALL``."""
    settings = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__} | changes
    torch.manual_seed(0)
    return randomise(HTSAT(frontend, ModelConfig(**settings)).eval())


def noise(batch: int, num_samples: int = CHUNK, seed: int = 0) -> Tensor:
    """Return (batch, num_samples) float32 noise of changing loudness, so that no two clips and moments are alike."""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.rand(batch, 16, generator=generator).repeat_interleave(-(-num_samples // 16), 1)
    return 0.2 * torch.randn(batch, num_samples, generator=generator) * loudness[:, :num_samples]


def infer(model: HTSAT, waveform: Tensor, *arguments: Any, **options: Any) -> ModelOutput:
    """Return the output without gradients."""
    with torch.no_grad():
        output = model(waveform, *arguments, **options)
    assert isinstance(output, ModelOutput)
    return output


def values(output: ModelOutput) -> dict[str, Tensor]:
    """Return the tensors of an output that are not None, attention aside."""
    named = {
        "clipwise_logits": output.clipwise_logits,
        "framewise_logits": output.framewise_logits,
        "embedding": output.embedding,
    }
    return {name: value for name, value in named.items() if value is not None}


@pytest.fixture
def model() -> HTSAT:
    return build()


@pytest.fixture
def threads() -> Iterator[Any]:
    """A function that sets PyTorch's CPU threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --------------------------------------------------------- the same clip, the same bits

#: real widths (what decides which kernels the linear layers take), but fewer blocks
WIDE: dict[str, Any] = {
    "embed_dim": 96,
    "depths": (1, 2, 2, 1),
    "num_heads": (4, 8, 16, 32),
    "window_size": 8,
    "image_size": 256,
    "chunk_seconds": 10.0,
}


def check_batches(model: HTSAT, waveform: Tensor, sizes: tuple[int, ...], **options: Any) -> None:
    """Assert that each clip of batches of these sizes gets bit for bit what it gets alone."""
    alone = [values(infer(model, clip.unsqueeze(0), **options)) for clip in waveform]
    for size in sizes:
        together = values(infer(model, waveform[:size], **options))
        for i in range(size):
            for name, value in together.items():
                difference = float((value[i] - alone[i][name][0]).abs().max())
                assert torch.equal(value[i], alone[i][name][0]), f"{name} of clip {i} of {size}: {difference:.1e}"


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"token_semantic": False}, {"num_classes": 0}, {"stem": "conv"}],
    ids=["tscam", "mean", "none", "conv"],
)
def test_a_clip_gets_the_same_bits_in_any_batch(threads: Any, changes: dict[str, Any], fit: str) -> None:
    threads(1)
    check_batches(build(**changes), noise(9, 17_000), (2, 3, 5, 8, 9), fit=fit)


@pytest.mark.parametrize("changes", [{"num_classes": 527}, {"num_classes": 527, "token_semantic": False}])
def test_a_clip_gets_the_same_bits_in_any_batch_at_real_widths(threads: Any, changes: dict[str, Any]) -> None:
    threads(1)
    check_batches(build(FrontendConfig(), **(WIDE | changes)), noise(5, 320_000), (2, 5))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"num_classes": 527}, {"num_classes": 10}, {"num_classes": 0}])
def test_a_clip_gets_the_same_bits_in_any_batch_of_the_published_size(threads: Any, changes: dict[str, Any]) -> None:
    threads(1)
    model = build(FrontendConfig(), **(WIDE | {"depths": (2, 2, 6, 2)} | changes))
    check_batches(model, noise(9, 320_000), (2, 3, 5, 8, 9))


def test_a_clip_gets_the_same_posteriors_in_any_batch_on_two_threads(threads: Any) -> None:
    """Two threads split a batch where its size suggests, so only rounding may differ."""
    threads(2)
    model = build(FrontendConfig(), num_classes=527, **WIDE)
    waveform = noise(3, 320_000)
    together = infer(model, waveform)
    for i in range(3):
        alone = infer(model, waveform[i : i + 1])
        for name in ("clipwise_logits", "framewise_logits"):
            a, b = getattr(together, name)[i].sigmoid(), getattr(alone, name)[0].sigmoid()
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_order_of_a_batch_does_not_matter(threads: Any, model: HTSAT) -> None:
    threads(1)
    waveform, order = noise(4), torch.tensor([2, 0, 3, 1])
    for name, value in values(infer(model, waveform[order])).items():
        assert torch.equal(value, values(infer(model, waveform))[name][order])


# ------------------------------------------------------------------- window permutations


def cut(x: Tensor, height: int, width: int | None = None) -> Tensor:
    """Cut pictures (batch, rows, columns, features) into windows by slicing, (batch, windows, N, features)."""
    width = width or height
    windows = [
        x[:, r : r + height, c : c + width].flatten(1, 2)
        for r in range(0, x.shape[1], height)
        for c in range(0, x.shape[2], width)
    ]
    return torch.stack(windows, 1)


def join(windows: Tensor, sides: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Put windows back into pictures: the inverse of ``cut``."""
    (rows, columns), (height, width) = sides, window
    x = windows.new_empty(windows.shape[0], rows, columns, windows.shape[-1])
    for number in range(windows.shape[1]):
        r, c = divmod(number, columns // width)
        tile = windows[:, number].view(-1, height, width, windows.shape[-1])
        x[:, r * height : (r + 1) * height, c * width : (c + 1) * width] = tile
    return x


@pytest.mark.parametrize(("side", "window", "shift"), [(8, 4, 0), (8, 4, 2), (16, 8, 4), (4, 4, 0), (12, 3, 1)])
def test_window_order_is_roll_and_cut(side: int, window: int, shift: int) -> None:
    x = torch.randn(2, side, side, 3)
    expected = cut(torch.roll(x, (-shift, -shift), (1, 2)), window).flatten(1, 2)
    assert torch.equal(x.flatten(1, 2)[:, window_order((side, side), (window, window), (shift, shift))], expected)


@pytest.mark.parametrize("side", [2, 8, 16])
def test_merge_order_is_the_published_concatenation(side: int) -> None:
    x = torch.randn(2, side, side, 3)
    parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
    expected = torch.cat(parts, -1).flatten(1, 2)
    assert torch.equal(x.flatten(1, 2)[:, merge_order((side, side))].reshape(2, -1, 12), expected)


@pytest.mark.parametrize(("side", "window", "shift"), [(8, 4, 2), (16, 8, 4), (12, 4, 1)])
def test_shift_mask_forbids_what_only_the_roll_made_neighbours(side: int, window: int, shift: int) -> None:
    """Two tokens of a rolled window may attend to each other iff they lie less than a window apart in the square."""
    position = torch.cartesian_prod(torch.arange(side), torch.arange(side)).view(1, side, side, 2)
    windows = cut(torch.roll(position, (-shift, -shift), (1, 2)), window)[0]
    apart = (windows[:, :, None] - windows[:, None, :]).abs().amax(-1)
    expected = torch.where(apart < window, 0.0, -100.0)
    assert torch.equal(shift_mask((side, side), (window, window), (shift, shift)), expected)


@pytest.mark.parametrize("window", [2, 4, 8])
def test_relative_position_index_is_the_offset_of_two_tokens(window: int) -> None:
    index = relative_position_index(window)
    for a in range(window * window):
        for b in range(window * window):
            rows, columns = a // window - b // window, a % window - b % window
            assert index[a, b] == (rows + window - 1) * (2 * window - 1) + columns + window - 1


def plain_stage(stage: Stage, x: Tensor, sides: tuple[int, int], largest: int) -> Tensor:
    """Compute a stage as its description says: roll, cut, attend window by window and head by head, join, roll back."""
    window = (min(largest, sides[0]), min(largest, sides[1]))
    batch, width = x.shape[0], x.shape[2]
    tokens = [(r, c) for r in range(window[0]) for c in range(window[1])]
    offsets = [
        [(a[0] - b[0] + largest - 1) * (2 * largest - 1) + a[1] - b[1] + largest - 1 for b in tokens] for a in tokens
    ]
    for number, block in enumerate(stage.blocks):
        attn: Any = block.attn
        shift = [largest // 2 if number % 2 and side > largest else 0 for side in sides]
        square = torch.roll(block.norm1(x).unflatten(1, sides), (-shift[0], -shift[1]), (1, 2))  # type: ignore[operator]
        windows = cut(square, *window)
        heads = []
        for head in range(attn.num_heads):
            size = width // attn.num_heads
            rows = slice(head * size, (head + 1) * size)
            q, k, v = (
                windows @ attn.qkv.weight[i * width :][rows].T + attn.qkv.bias[i * width :][rows] for i in range(3)
            )
            logits = q @ k.transpose(-1, -2) / size**0.5
            logits = logits + attn.relative_position_bias_table[torch.tensor(offsets), head]
            if any(shift):
                place = torch.cartesian_prod(torch.arange(sides[0]), torch.arange(sides[1])).view(1, *sides, 2)
                place = cut(torch.roll(place, (-shift[0], -shift[1]), (1, 2)), *window)[0]
                apart = (place[:, :, None] - place[:, None, :]).abs()
                logits = logits + torch.where((apart < torch.tensor(window)).all(-1), 0.0, -100.0)
            logits = logits - logits.amax(-1, keepdim=True)
            heads.append(logits.exp() / logits.exp().sum(-1, keepdim=True) @ v)
        out = join(torch.cat(heads, -1) @ attn.proj.weight.T + attn.proj.bias, sides, window)
        x = x + torch.roll(out, (shift[0], shift[1]), (1, 2)).reshape(batch, -1, width)
        mlp: Any = block.mlp
        hidden = block.norm2(x) @ mlp.fc1.weight.T + mlp.fc1.bias  # type: ignore[operator]
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        x = x + hidden @ mlp.fc2.weight.T + mlp.fc2.bias
    if stage.merge is None:
        return x
    square = x.view(batch, *sides, width)
    parts = [square[:, r::2, c::2] for c in (0, 1) for r in (0, 1)]
    merged = stage.merge.norm(torch.cat(parts, -1).flatten(1, 2))
    return merged @ stage.merge.reduction.weight.T  # type: ignore[no-any-return]


@pytest.mark.parametrize("grad", [False, True], ids=["fused", "explicit"])
@pytest.mark.parametrize(
    ("sides", "depth", "merge"),
    [
        ((16, 16), 2, True), ((8, 8), 3, True), ((8, 8), 2, False), ((4, 4), 2, False), ((2, 2), 1, True),
        ((8, 16), 3, True), ((4, 16), 2, True), ((2, 8), 2, False), ((4, 8), 3, True), ((2, 2), 2, False),
    ],
)  # fmt: skip
def test_a_stage_is_roll_cut_attend_join(sides: tuple[int, int], depth: int, merge: bool, grad: bool) -> None:
    torch.manual_seed(0)
    stage = Stage(
        width=12,
        resolution=16 if sides[0] < sides[1] else sides[1],
        depth=depth,
        num_heads=3,
        window_size=4,
        mlp_ratio=2.0,
        drop_path=[0.0] * depth,
        merge=merge,
    ).double()
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    x = torch.randn(3, sides[0] * sides[1], 12, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        actual = stage(x, sides)
        torch.testing.assert_close(actual, plain_stage(stage, x, sides, stage.window_size), rtol=1e-10, atol=1e-10)


def test_permutation_has_the_gradients_of_plain_indexing() -> None:
    order = torch.randperm(7)
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 7, 3, dtype=torch.float64)
    (actual,) = torch.autograd.grad((permute_tokens(x, order) * weight).square().sum(), x)
    (expected,) = torch.autograd.grad((x[:, order] * weight).square().sum(), x)
    assert torch.equal(actual, expected)
    assert torch.autograd.gradcheck(lambda t: permute_tokens(t, order), (x,))
    assert torch.autograd.gradgradcheck(lambda t: permute_tokens(t, order).square(), (x,))


# --------------------------------------------------------------------------- attention


@pytest.mark.parametrize("batch", [1, 3])
def test_fused_and_explicit_attention_agree(model: HTSAT, batch: int) -> None:
    waveform = noise(batch)
    fused = values(infer(model, waveform))
    explicit = values(infer(model, waveform, attention=True))
    with_gradients = values(model(waveform))
    for name, value in fused.items():
        torch.testing.assert_close(value, explicit[name], rtol=0, atol=2e-6)
        torch.testing.assert_close(value, with_gradients[name], rtol=0, atol=2e-6)


def test_attention_maps_are_distributions_over_the_window(model: HTSAT) -> None:
    maps = infer(model, noise(2), attention=True).attention
    shapes = [tuple(attention.shape) for attention in maps]
    assert shapes == [(2, 16, 2, 16, 16)] * 2 + [(2, 4, 4, 16, 16)] * 2
    for attention in maps:
        assert (attention >= 0).all()
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    # The last window of a shifted block holds the four corners of the square: quarters that must not mix.
    corners = maps[1][:, -1].view(2, 2, 4, 4, 4, 4)
    assert corners[:, :, :2, :2, 2:, :].max() < 1e-30
    assert corners[:, :, :2, :2, :2, 2:].max() < 1e-30
    assert infer(model, noise(1)).attention == ()


def test_changed_position_tables_take_effect() -> None:
    """Whatever the model keeps between calls, the weights in use are the ones it has now."""
    model, other = build(), build()
    waveform = noise(1)
    infer(model, waveform)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("relative_position_bias_table"):
                parameter.mul_(-2.0)
    changed = infer(model, waveform)
    assert not torch.equal(changed.embedding, infer(other, waveform).embedding)
    other.load_state_dict(model.state_dict())
    assert torch.equal(changed.embedding, infer(other, waveform).embedding)
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            parameter.data.zero_()
    assert not torch.equal(changed.embedding, infer(model, waveform).embedding), "a table changed through .data"


def test_a_model_made_in_inference_mode_can_be_given_new_weights() -> None:
    with torch.inference_mode():
        model, waveform = build(), noise(1)
        model(waveform)
        other = randomise(build(), seed=1)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(waveform).embedding, other(waveform).embedding)


# --------------------------------------------------------------------------- training


def training_run(checkpointing: bool) -> tuple[dict[str, Tensor], int]:
    """Return the gradients of one step with drop path, and the bytes kept from the forward for the backward pass."""
    model = build(drop_path=0.5).train()
    model.set_gradient_checkpointing(checkpointing)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(noise(4))
    assert output.clipwise_logits is not None
    F.binary_cross_entropy_with_logits(output.clipwise_logits, torch.full((4, 5), 0.25)).backward()  # type: ignore[no-untyped-call]
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
    return gradients, sum(kept.values())


def test_gradient_checkpointing_gives_the_same_gradients_from_less_memory(threads: Any) -> None:
    threads(1)
    plain, kept = training_run(checkpointing=False)
    checkpointed, kept_checkpointed = training_run(checkpointing=True)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-6, atol=1e-8, msg=name)
        assert gradient.abs().max() > 0, name
    assert kept_checkpointed < kept / 3


def test_gradients_are_the_slopes_of_the_loss() -> None:
    """Directional derivative by central differences, in float64, through everything from waveform to logits."""
    model = build().double()
    waveform = noise(2).double().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return model(x).framewise_logits.square().mean()  # type: ignore[no-any-return]

    (gradient,) = torch.autograd.grad(loss(waveform), waveform)
    direction = torch.randn(waveform.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    step = 1e-7
    with torch.no_grad():
        slope = (loss(waveform + step * direction) - loss(waveform - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-4)


def test_gradients_of_the_waveform_after_inference(model: HTSAT) -> None:
    """Nothing that the model keeps from a call in inference mode may stand in the way of a backward pass."""
    with torch.inference_mode():
        model(noise(1))
    waveform = noise(1).requires_grad_()
    model(waveform).embedding.sum().backward()
    assert waveform.grad is not None and waveform.grad.abs().max() > 0


def test_the_front_end_keeps_its_precision_under_autocast(model: HTSAT) -> None:
    with torch.no_grad():
        expected = model.frontend(noise(2))
        with torch.autocast("cpu", torch.bfloat16):
            actual = model.frontend(noise(2))
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_a_training_step_under_autocast_gives_gradients() -> None:
    model = build().train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(noise(2))
        assert output.clipwise_logits.dtype == torch.bfloat16
        loss = output.clipwise_logits.float().square().mean()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_drop_path_drops_whole_clips_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer = DropPath(0.25).train()
    out = layer(torch.ones(4000, 2, 3))
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(out.amin((1, 2)), out.amax((1, 2)))
    assert float(out.mean()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(layer.eval()(torch.ones(4, 2)), torch.ones(4, 2))


# ------------------------------------------------------------------------ fitting a clip


def test_pad_appends_silence(model: HTSAT) -> None:
    clip = noise(2, 15_000)
    fitted = model.fit_waveform(clip, "pad")
    assert torch.equal(fitted, torch.cat([clip, torch.zeros(2, CHUNK - 15_000)], 1))


@pytest.mark.parametrize("num_samples", [1, 7_000, 20_000, 39_999])
def test_tile_repeats_the_waveform_up_to_a_chunk(model: HTSAT, num_samples: int) -> None:
    clip = noise(2, num_samples)
    fitted = model.fit_waveform(clip, "tile")
    assert fitted.shape == (2, CHUNK)
    assert torch.equal(fitted, clip[:, torch.arange(CHUNK) % num_samples])


@pytest.mark.parametrize("fit", FITS)
def test_a_whole_chunk_is_left_alone(model: HTSAT, fit: Any) -> None:
    clip = noise(2)
    assert model.fit_waveform(clip, fit) is clip


@pytest.mark.parametrize(
    ("num_samples", "native"), [(1, 2_500), (2_501, 5_000), (10_000, 10_000), (10_001, 20_000), (20_001, 40_000)]
)
def test_native_appends_silence_up_to_the_next_size(model: HTSAT, num_samples: int, native: int) -> None:
    """This model takes a chunk, or a half, a quarter, an eighth, a sixteenth of it."""
    clip = noise(2, num_samples)
    fitted = model.fit_waveform(clip, "native")
    assert torch.equal(fitted, torch.cat([clip, torch.zeros(2, native - num_samples)], 1))


def test_native_size_is_the_model_of_that_size(threads: Any) -> None:
    """A sixteenth of this model's chunk is a square again: a whole model with the same weights takes just that."""
    threads(1)
    frontend = FrontendConfig(sample_rate=8000, n_fft=512, hop_length=320, n_mels=16, f_max=4000.0)
    large = build(frontend, window_size=2, chunk_seconds=10.0)
    small = build(frontend, window_size=2, chunk_seconds=0.625, image_size=16)
    small.load_state_dict(large.state_dict())
    for num_samples in (5_000, 4_321):
        clip = noise(2, num_samples)
        expected = values(infer(small, clip, "pad"))
        for name, value in values(infer(large, clip, "native")).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    # Tokens of 2500 samples: two of them, the last one begun.
    assert expected["framewise_logits"].shape == (2, 2, 5)


def test_a_chunk_is_the_same_in_every_way_that_keeps_time(model: HTSAT) -> None:
    whole = values(infer(model, noise(2), "pad"))
    assert all(torch.equal(value, whole[name]) for name, value in values(infer(model, noise(2), "native")).items())


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_short_clips_cost_their_share(stem: str) -> None:
    model = build(stem=stem)

    def work(num_samples: int, fit: str) -> int:
        with FlopCounterMode(display=False) as counter:
            infer(model, noise(1, num_samples), fit)
        return counter.get_total_flops()

    chunk = work(CHUNK, "native")
    assert work(10_000, "pad") == chunk
    for size in (2, 4, 8, 16):
        assert work(CHUNK // size, "native") == pytest.approx(chunk / size, rel=0.12), size


def test_gradients_reach_all_weights_at_the_smallest_native_size() -> None:
    model = build(stem="conv").train()
    values(model(noise(2, CHUNK // 16), "native"))["framewise_logits"].square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("fit", ["stretch", "repeat"])
def test_stretch_and_repeat_leave_the_waveform_to_the_log_mel(model: HTSAT, fit: Any) -> None:
    clip = noise(1, 12_345)
    assert model.fit_waveform(clip, fit) is clip


def test_a_tiled_half_is_the_half_repeated_by_hand(threads: Any, model: HTSAT) -> None:
    threads(1)
    half = noise(2, CHUNK // 2)
    tiled, by_hand = infer(model, half, "tile"), infer(model, torch.cat([half, half], 1))
    assert torch.equal(tiled.embedding, by_hand.embedding)
    assert torch.equal(values(tiled)["clipwise_logits"], values(by_hand)["clipwise_logits"])
    assert torch.equal(values(tiled)["framewise_logits"], values(by_hand)["framewise_logits"][:, :16])


def test_repeat_is_whole_repeats_of_the_log_mel_then_stretched(threads: Any, model: HTSAT) -> None:
    threads(1)
    clip = noise(2, 160 * 99)  # 100 frames: repeated twice in 256
    with torch.no_grad():
        frames = model.frontend(clip)
        assert frames.shape == (2, 100, 16)
        tokens = model.encode(model.normalise(model.stretch(torch.cat([frames, frames], 1))))
        _, expected = model.classify(tokens)
    assert expected is not None
    torch.testing.assert_close(values(infer(model, clip, "repeat"))["framewise_logits"], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("num_samples", "tokens"), [(1, 1), (1250, 1), (1251, 2), (20_000, 16), (20_001, 17), (39_999, 32), (40_000, 32)]
)
@pytest.mark.parametrize("fit", ["pad", "tile", "native"])
def test_framewise_output_ends_with_the_clip(model: HTSAT, fit: Any, num_samples: int, tokens: int) -> None:
    """A token is 1250 samples; one that the clip only begins counts."""
    output = values(infer(model, noise(1, num_samples), fit))
    assert output["framewise_logits"].shape == (1, tokens, 5)
    assert output["clipwise_logits"].shape == (1, 5)
    assert output["embedding"].shape == (1, 32)


@pytest.mark.parametrize("fit", ["stretch", "repeat"])
def test_stretched_clips_keep_all_tokens_as_published(model: HTSAT, fit: Any) -> None:
    assert values(infer(model, noise(1, 10_000), fit))["framewise_logits"].shape == (1, 32, 5)


def test_stretching_keeps_ends_and_length(model: HTSAT) -> None:
    frames = torch.randn(2, 100, 16)
    stretched = model.stretch(frames)
    assert stretched.shape == (2, 256, 16)
    torch.testing.assert_close(stretched[:, [0, -1]], frames[:, [0, -1]])
    # 256 = 5 x 51 + 1: every fifth frame of 52 stretched ones is an original.
    torch.testing.assert_close(model.stretch(frames[:, :52])[:, ::5], frames[:, :52], rtol=0, atol=1e-5)
    whole = torch.randn(2, 256, 16)
    assert model.stretch(whole) is whole


@pytest.mark.parametrize(
    ("fit", "num_samples", "limits"),
    [
        ("pad", 40_001, "1 to 40000"),
        ("tile", 50_000, "1 to 40000"),
        ("native", 40_001, "1 to 40000"),
        ("pad", 0, "1 to 40000"),
        ("stretch", 128, "129 to 40959"),
        ("stretch", 40_960, "129 to 40959"),
        ("repeat", 0, "129 to 40959"),
    ],
)
def test_errors_name_lengths(model: HTSAT, fit: Any, num_samples: int, limits: str) -> None:
    with pytest.raises(ValueError, match=f"waveform has {num_samples} samples .* takes {limits}"):
        model(torch.zeros(1, num_samples), fit)


@pytest.mark.parametrize("num_samples", [129, 40_959])
def test_the_longest_and_the_shortest_are_taken(model: HTSAT, num_samples: int) -> None:
    assert torch.isfinite(infer(model, noise(1, num_samples), "stretch").embedding).all()


def test_wrong_waveforms_are_named(model: HTSAT) -> None:
    with pytest.raises(ValueError, match=r"\(batch, num_samples\), got shape \(40000,\)"):
        model(torch.zeros(CHUNK))
    with pytest.raises(ValueError, match=r"floating point in .* got torch\.int16"):
        model(torch.zeros(1, CHUNK, dtype=torch.int16))
    with pytest.raises(ValueError, match="fit must be one of pad, tile, native, stretch, repeat, got 'crop'"):
        model(torch.zeros(1, CHUNK), "crop")


def test_an_empty_batch_is_named(model: HTSAT) -> None:
    with pytest.raises(ValueError, match="holds no clip"):
        model(torch.zeros(0, CHUNK))


# ------------------------------------------------------------------ stages of the forward


def test_fold_stacks_stretches_of_time(model: HTSAT) -> None:
    """64 steps of 4 mel rows become a square of 16 x 16: four stretches of 16 steps, one under the other."""
    tokens = torch.randn(2, 64, 4, 3)
    square = model.fold(tokens).view(2, 16, 16, 3)
    for stretch in range(4):
        for row in range(4):
            for column in range(16):
                assert torch.equal(square[:, stretch * 4 + row, column], tokens[:, stretch * 16 + column, row])


def test_patches_are_cells_of_four_frames_and_four_mel_bins(model: HTSAT) -> None:
    """Weights are stored as those of the published convolution on the folded square: (mel bin, frame)."""
    features = torch.randn(2, 256, 16)
    embed = model.patch_embed
    weight = embed.proj.weight.view(16, 4, 4)
    with torch.no_grad():
        actual = embed(features)
        cell = features[:, 8:12, 4:8]
        expected = embed.norm(torch.einsum("btm,cmt->bc", cell, weight) + embed.proj.bias)
    assert actual.shape == (2, 64, 4, 16)
    torch.testing.assert_close(actual[:, 2, 1], expected)


@pytest.mark.parametrize(("patch_size", "width"), [(4, 16), (8, 16), (2, 8)])
def test_conv_stem_is_local_and_moves_with_its_input(patch_size: int, width: int) -> None:
    """One token per patch; where a feature lies decides which tokens feel it, a patch later the same ones a step on."""
    torch.manual_seed(0)
    stem = ConvStem(patch_size, width).eval()
    features = torch.randn(2, 16 * patch_size, 8 * patch_size)
    with torch.no_grad():
        tokens = stem(features)
        assert tokens.shape == (2, 16, 8, width)
        moved = stem(features.roll((patch_size, patch_size), (1, 2)))
        torch.testing.assert_close(moved[:, 4:14, 4:6], tokens[:, 3:13, 3:5], rtol=1e-4, atol=1e-5)
        changed = features.clone()
        changed[:, 8 * patch_size] += 5
        felt = (stem(changed) - tokens).abs().amax((0, 2, 3)) > 1e-6
    steps = torch.nonzero(felt).flatten().tolist()
    # Two convolutions of three cells at each resolution see up to three patches either way.
    assert 8 in steps and min(steps) >= 5 and max(steps) <= 11


def test_conv_stem_by_hand() -> None:
    """Patches of 2 x 2: one convolution of stride 2 and one of stride 1, each with batch norm and ReLU; layer norm."""
    torch.manual_seed(0)
    stem = ConvStem(2, 8).eval()
    features = torch.randn(1, 8, 6)
    first, second = stem.blocks[0][0], stem.blocks[0][3]  # type: ignore[index]
    scale = (1 + 1e-5) ** -0.5  # a batch norm that has seen nothing
    padded = F.pad(features[0], (1, 1, 1, 1))
    middle = torch.zeros(8, 6, 5)
    with torch.no_grad():
        for row in range(4):
            for column in range(3):
                cell = padded[2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
                middle[:, row + 1, column + 1] = ((first.weight[:, 0] * cell).sum((1, 2)) * scale).clamp_min(0)
        expected = torch.zeros(4, 3, 8)
        for row in range(4):
            for column in range(3):
                cell = middle[:, row : row + 3, column : column + 3]
                expected[row, column] = ((second.weight * cell).sum((1, 2, 3)) * scale).clamp_min(0)
        torch.testing.assert_close(stem(features)[0], F.layer_norm(expected, (8,)), rtol=1e-4, atol=1e-5)


def test_tokens_come_out_in_the_order_of_time(model: HTSAT) -> None:
    """With stages that pass the square through, token (frequency, time) is the one that went in there."""
    square = torch.arange(8 * 8).view(1, 64, 1).expand(1, 64, 32).float()
    model.norm = torch.nn.Identity()  # type: ignore[assignment]
    model.fold = lambda tokens, groups: square  # type: ignore[method-assign]
    for stage in model.stages:
        stage.forward = lambda x, sides, *taps: x
    with torch.no_grad():
        tokens = model.encode(torch.zeros(1, 256, 16))
    assert tokens.shape == (1, 32, 2, 32)
    for stretch in range(4):
        for frequency in range(2):
            for step in range(8):
                row = stretch * 2 + frequency
                assert tokens[0, 0, frequency, stretch * 8 + step] == row * 8 + step


def test_frequency_embedding_is_added_to_the_tokens_of_its_mel_rows() -> None:
    model = build(frequency_embedding=True)
    assert model.frequency_embedding is not None and model.frequency_embedding.shape == (4, 16)
    seen: list[Tensor] = []
    model.stages[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    features = torch.randn(1, 256, 16)
    with torch.no_grad():
        model.encode(features)
        expected = model.fold(model.patch_embed(features) + model.frequency_embedding)
        model.frequency_embedding.zero_()
        model.encode(features)
    assert torch.equal(seen[0], expected)
    assert torch.equal(seen[1], model.fold(model.patch_embed(features)))


def test_normalise_acts_on_mel_bins(model: HTSAT) -> None:
    frames = torch.randn(2, 30, 16) * 3 - 20
    norm = model.mel_norm
    assert norm.running_mean is not None and norm.running_var is not None
    expected = (frames - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    with torch.no_grad():
        torch.testing.assert_close(model.normalise(frames), expected)


def test_clip_logits_are_the_mean_of_token_logits(model: HTSAT) -> None:
    output = values(infer(model, noise(2)))
    torch.testing.assert_close(output["clipwise_logits"], output["framewise_logits"].mean(1))


def test_pooling_rules() -> None:
    logits = torch.tensor([[[0.0, 5.0], [0.0, 5.0], [0.0, 5.0], [8.0, 5.0]]], dtype=torch.float64)
    assert pool_tokens(logits, "mean").tolist() == [[2.0, 5.0]]
    expected = [[np.log((3 + np.exp(8.0)) / 4), 5.0]]
    np.testing.assert_allclose(pool_tokens(logits, "logmeanexp").numpy(), expected, rtol=1e-14)


def test_head_without_the_token_semantic_module() -> None:
    model = build(token_semantic=False)
    with torch.no_grad():
        tokens = model.encode(torch.randn(2, 256, 16))
        clipwise, framewise = model.classify(tokens)
    assert clipwise is not None and framewise is not None
    weight, bias = model.head.weight, model.head.bias
    torch.testing.assert_close(clipwise, tokens.flatten(2).mean(2) @ weight.T + bias)
    expected = torch.einsum("bcft,kc->btk", tokens, weight) + bias
    torch.testing.assert_close(framewise, expected, rtol=1e-4, atol=1e-5)


def test_no_classes_gives_an_embedding_only() -> None:
    model = build(num_classes=0)
    output = infer(model, noise(2))
    assert output.clipwise_logits is None
    assert output.framewise_logits is None
    assert output.embedding.shape == (2, 32)
    assert not [name for name in model.state_dict() if name.startswith(("head", "token_semantic"))]


# ------------------------------------------------------------------------------ front end


@pytest.mark.parametrize(
    "config",
    [
        FrontendConfig(),
        FrontendConfig(sample_rate=16000, hop_length=160),
        FrontendConfig(sample_rate=44100, hop_length=441),
        FrontendConfig(sample_rate=48000, hop_length=480, mel_scale="htk"),
    ],
    ids=["32k", "16k", "44.1k", "48k"],
)
def test_front_ends_of_all_rates_are_the_numpy_reference(config: FrontendConfig) -> None:
    torch.manual_seed(0)
    settings = WIDE | {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
    model = randomise(HTSAT(config, ModelConfig(num_classes=3, **settings)).eval())
    waveform = noise(1, 10 * config.sample_rate)
    expected = log_mel(waveform[0].numpy(), config)
    assert expected.shape == (1001, 64)
    with torch.no_grad():
        np.testing.assert_allclose(model.frontend(waveform)[0].numpy(), expected, rtol=0, atol=2e-4)
        exact = model.frontend(waveform.double())[0]
    np.testing.assert_allclose(exact.numpy(), expected, rtol=0, atol=1e-9)
    assert values(infer(model, waveform))["framewise_logits"].shape == (1, 32, 3)


def test_silence_is_the_floor(model: HTSAT) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model.frontend(torch.zeros(1, CHUNK)), torch.full((1, 251, 16), -100.0))


def test_a_tone_lands_in_its_mel_bin() -> None:
    frontend = FrontendConfig()
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * torch.arange(32_000) / 32_000).unsqueeze(0)
    with torch.no_grad():
        spectrogram = build(frontend, **WIDE).frontend(tone)[0]
    # Slaney's scale is linear below 1 kHz: bin i is centred on 50 + (i + 1) of 65 equal mel steps up to 14 kHz.
    top = 15 + 27 * np.log(14_000 / 1000) / np.log(6.4)
    step = (top - 0.75) / 65
    assert int(spectrogram[20:-20].mean(0).argmax()) == round((440 * 3 / 200 - 0.75) / step) - 1


def test_float64_is_float32_but_for_rounding(model: HTSAT) -> None:
    single = values(infer(model, noise(2)))
    double = values(infer(model.double(), noise(2).double()))
    for name, value in double.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(single[name].double(), value, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------- sizes


def parameters(dim: int, depths: tuple[int, ...], heads: tuple[int, ...], classes: int) -> int:
    """Count the parameters of the published architecture with the token-semantic head, term by term."""
    count = 2 * 64 + (16 * dim + dim) + 2 * dim  # mel norm, patch projection and norm
    for stage, (depth, head) in enumerate(zip(depths, heads, strict=True)):
        width = dim * 2**stage
        attention = width * 3 * width + 3 * width + width * width + width + 15 * 15 * head
        mlp = width * 4 * width + 4 * width + 4 * width * width + width
        count += depth * (attention + mlp + 4 * width)
        if stage < 3:
            count += 2 * 4 * width + 4 * width * 2 * width
    return count + 2 * 8 * dim + (8 * dim * 2 * 3 * classes + classes)


@pytest.mark.parametrize(
    ("dim", "depths", "published"),
    [
        (96, (2, 2, 6, 2), 29_963_431),
        (128, (2, 2, 12, 2), None),
        (256, (2, 2, 12, 2), None),
    ],
    ids=["tiny", "base", "large"],
)
def test_variants_have_the_published_number_of_parameters(
    dim: int, depths: tuple[int, ...], published: int | None
) -> None:
    heads = (4, 8, 16, 32)
    with torch.device("meta"):
        model = HTSAT(FrontendConfig(), ModelConfig(embed_dim=dim, depths=depths, num_heads=heads))
    actual = sum(parameter.numel() for parameter in model.parameters())
    assert actual == parameters(dim, depths, heads, 527)
    assert published in (None, actual)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_chunks_shorter_than_the_usual_hop_between_chunks_can_be_built() -> None:
    """The hop is a setting of inference on recordings, none of the network."""
    model = build(FrontendConfig(8000, 256, 80, 16, f_max=4000.0), chunk_seconds=2.5)
    assert infer(model, noise(1, 20_000)).embedding.shape == (1, 32)


def test_logits_keep_their_size_at_the_start() -> None:
    """Freshly made models are near undecided: no class is favoured by more than a few hundredths."""
    torch.manual_seed(0)
    model = HTSAT(SMALL_FRONTEND, SMALL).eval()
    assert values(infer(model, noise(2)))["framewise_logits"].abs().max() < 2.0


def test_state_dict_holds_weights_only(model: HTSAT) -> None:
    names = set(model.state_dict())
    buffers = {"mel_norm.running_mean", "mel_norm.running_var", "mel_norm.num_batches_tracked"}
    assert names == {name for name, _ in model.named_parameters()} | buffers


# --------------------------------------------------------------------- the rest of the world


def test_the_network_needs_torch_and_numpy_only() -> None:
    script = (
        "import sys, torch, numpy; before = set(sys.modules); import htsat.model.htsat\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(new - set(sys.stdlib_module_names) - {'torch', 'numpy', 'htsat'}))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
