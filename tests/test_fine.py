"""The fine head: it starts from the tokens, its steps lie where the sound is, and it costs little."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from htsat.config import CheckpointConfig, FrontendConfig, ModelConfig
from htsat.errors import ConfigError
from htsat.model.checkpoint import load_checkpoint, save_checkpoint
from htsat.model.htsat import HTSAT
from htsat.training.optim import frame_losses
from htsat.training.recipe import Recipe, TrainConfig, load_recipe
from htsat.training.start import load_start

SMALL = ModelConfig(num_classes=3, embed_dim=16, depths=(1, 1, 1), num_heads=(2, 2, 2), patch_size=8)
FINE = dataclasses.replace(SMALL, fine_frames=4, fine_width=16)


def pair() -> tuple[HTSAT, HTSAT]:
    """Return a model without and one with a fine head, with the same other weights."""
    torch.manual_seed(3)
    plain = HTSAT(FrontendConfig(), SMALL).eval()
    torch.manual_seed(3)
    return plain, HTSAT(FrontendConfig(), FINE).eval()


@pytest.mark.parametrize("seconds", [10.0, 5.0, 1.25])
def test_untrained_it_gives_the_token_logits_interpolated(seconds: float) -> None:
    plain, fine = pair()
    waveform = 0.1 * torch.randn(2, round(seconds * 32000), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        tokens, steps = plain(waveform, "native"), fine(waveform, "native")
    assert torch.equal(tokens.clipwise_logits, steps.clipwise_logits)
    assert torch.equal(tokens.embedding, steps.embedding)
    coarse = tokens.framewise_logits
    assert steps.framewise_logits.shape == (2, 8 * coarse.shape[1], 3)
    # Linear between the middles of tokens, which lie between the 4th and the 5th of their 8 steps.
    expected = coarse[:, :-1] + (coarse[:, 1:] - coarse[:, :-1]) * (0.5 / 8)
    assert torch.allclose(steps.framewise_logits[:, 4:-8:8], expected, atol=1e-5)


@pytest.mark.parametrize("frames", [1024, 512, 128])
def test_every_source_of_the_head_lies_at_the_time_and_frequency_of_the_sound(frames: int) -> None:
    _, model = pair()
    for name, parameter in model.named_parameters():
        if ".attn.proj." in name:  # tokens do not hear of each other: what changes is the token of the sound alone
            torch.nn.init.zeros_(parameter)
    quiet, loud = torch.zeros(1, frames, 64), torch.zeros(1, frames, 64)
    first = frames // 2 + 40  # inside one patch, and one token of the last stage
    loud[0, first : first + 4, 41:47] = 5.0
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    with torch.inference_mode():
        model.encode(quiet, None, before)
        model.encode(loud, None, after)
    for stage, (a, b) in enumerate(zip(before, after, strict=True)):
        cells = 8 >> stage
        assert a.shape == (1, frames // (8 << stage), cells * (16 << stage))
        changed = (a - b).abs().view(a.shape[1], cells, -1).sum(2)
        assert changed.nonzero().tolist() == [[first // (8 << stage), 5 >> stage]]


def test_the_unfolded_raster_is_the_fold_undone() -> None:
    model, _ = pair()
    tokens = torch.randn(2, 128, 8, 16)
    for groups, sides in ((4, (32, 32)), (1, (8, 128))):
        assert torch.equal(model.unfold(model.fold(tokens, groups), sides, groups), tokens)


def test_the_loss_of_tokens_counts_half_filled_tokens_as_full() -> None:
    coarse, framewise = torch.zeros(1, 2, 1), torch.zeros(1, 8, 1)
    targets = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 1]).view(1, 8, 1)  # a token filled half, one filled a quarter
    config = TrainConfig(token_weight=2.0, strong_weight=3.0)
    expected = F.binary_cross_entropy_with_logits(framewise, targets)
    expected = expected + 2 * F.binary_cross_entropy_with_logits(coarse, torch.tensor([1.0, 0.5]).view(1, 2, 1))
    assert torch.allclose(frame_losses(framewise, targets, config, coarse), 3 * expected)


def test_it_starts_on_weights_without_one_and_its_own_are_taken_over(tmp_path: Path) -> None:
    plain, fine = pair()
    labels = ("a", "b", "c")
    save_checkpoint(tmp_path / "plain.safetensors", plain, CheckpointConfig(FrontendConfig(), SMALL, labels))
    with torch.no_grad():
        for parameter in fine.parameters():
            parameter.add_(1.0)
        fine.fine.out.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))  # type: ignore[union-attr]
    assert "the fine head starts anew" in load_start(fine, str(tmp_path / "plain.safetensors"), labels)
    assert all(torch.equal(tensor, fine.state_dict()[name]) for name, tensor in plain.state_dict().items())

    save_checkpoint(tmp_path / "fine.safetensors", fine, CheckpointConfig(FrontendConfig(), FINE, labels))
    other = HTSAT(FrontendConfig(), dataclasses.replace(FINE, num_classes=2))
    note = load_start(other, str(tmp_path / "fine.safetensors"), ("c", "new"))
    assert "1 of 2 classes" in note and "anew" not in note
    assert other.fine is not None
    assert other.fine.out.bias[0] == 3 and other.fine.out.bias[1] == 0
    assert torch.equal(other.fine.norm.weight, fine.fine.norm.weight)  # type: ignore[union-attr]
    again, _ = load_checkpoint(tmp_path / "fine.safetensors")
    assert again.num_tokens == 256


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="does not divide the 32 frames"):
        dataclasses.replace(SMALL, fine_frames=5)
    with pytest.raises(ConfigError, match="timed events"):
        load_recipe("desed", ["model.fine_frames=4", "train.strong_weight=0"])
    assert isinstance(load_recipe("desed", ["model.fine_frames=4"]), Recipe)
