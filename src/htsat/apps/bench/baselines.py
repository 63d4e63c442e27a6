"""The networks that HTS-AT is compared with, each from waveform to what it says, with random weights.

* AST: ``transformers``' ``ASTForAudioClassification`` in its default configuration (fused attention), 16 kHz, behind
  Kaldi's filter bank in PyTorch, which is several times as fast as the NumPy one that comes with it;
* CLAP: ``transformers``' ``ClapAudioModel``, itself an HTS-AT, at 48 kHz, without classes, behind our front end;
* CNN14 of PANNs: ours, which holds the published weights exactly.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from htsat.config import FrontendConfig, ModelConfig
from htsat.model.architectures import build_model
from htsat.model.frontend import LogMel

#: seconds of a clip
SECONDS = 10
#: names, and Hz that each hears
RATES = {"ast": 16000, "clap": 48000, "cnn14": 32000}


class KaldiFilterBank(nn.Module):
    """Waveform (batch, num_samples) at 16 kHz -> normalised log filter bank (batch, 1024, 128), as AST is fed.

    Kaldi's ``fbank`` with a Hann window and without dither, as in transformers' ``ASTFeatureExtractor``.
    """

    def __init__(self) -> None:
        from transformers.audio_utils import mel_filter_bank

        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the lowest band holds no bin, in Kaldi too
            filters = mel_filter_bank(
                num_frequency_bins=257,
                num_mel_filters=128,
                min_frequency=20,
                max_frequency=8000,
                sampling_rate=16000,
                norm=None,
                mel_scale="kaldi",
                triangularize_in_mel_space=True,
            )
        self.register_buffer("filters", torch.from_numpy(filters).float())
        self.register_buffer("window", torch.hann_window(400, periodic=False))
        self.filters: Tensor
        self.window: Tensor

    @torch.no_grad()
    def forward(self, waveform: Tensor) -> Tensor:
        """Return the bands."""
        frames = waveform.unfold(-1, 400, 160)
        frames = frames - frames.mean(-1, keepdim=True)
        previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
        spectrum = torch.fft.rfft((frames - 0.97 * previous) * self.window, 512)
        power = spectrum.real.square() + spectrum.imag.square()
        bands = (power @ self.filters).clamp_min(1.192092955078125e-07).log()[:, :1024]
        return (F.pad(bands, (0, 0, 0, 1024 - bands.shape[1])) + 4.2677393) / (2 * 4.5689974)


class AST(nn.Module):
    """Waveform (batch, num_samples) at 16 kHz -> logits (batch, classes)."""

    def __init__(self, classes: int) -> None:
        from transformers import ASTConfig, ASTForAudioClassification

        super().__init__()
        self.filter_bank = KaldiFilterBank()
        self.network = ASTForAudioClassification(ASTConfig(num_labels=classes))  # type: ignore[call-arg]

    def forward(self, waveform: Tensor) -> Tensor:
        """Return the logits."""
        with torch.autocast("cpu", enabled=False):
            bands = self.filter_bank(waveform)
        return self.network(bands).logits  # type: ignore[no-any-return]


class CLAP(nn.Module):
    """Waveform (batch, num_samples) at 48 kHz -> embedding (batch, 768)."""

    def __init__(self) -> None:
        from transformers import ClapAudioConfig, ClapAudioModel

        super().__init__()
        self.front_end = LogMel(FrontendConfig(sample_rate=48000, hop_length=480))
        self.network = ClapAudioModel(ClapAudioConfig())

    def forward(self, waveform: Tensor) -> Tensor:
        """Return the embedding."""
        log_mel = self.front_end(waveform).unsqueeze(1)
        return self.network(input_features=log_mel, is_longer=None).pooler_output  # type: ignore[no-any-return]


class CNN14(nn.Module):
    """Waveform (batch, num_samples) at 32 kHz -> logits (batch, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        config = ModelConfig(num_classes=classes, architecture="cnn14", decision="clip")
        self.network = build_model(FrontendConfig(), config)

    def forward(self, waveform: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(waveform).clipwise_logits  # type: ignore[no-any-return]


def build(name: str, classes: int) -> nn.Module:
    """Return a baseline in evaluation mode; its input has ``RATES[name]`` samples a second."""
    torch.manual_seed(0)
    network: nn.Module = CLAP() if name == "clap" else {"ast": AST, "cnn14": CNN14}[name](classes)
    return network.eval()


def size(module: nn.Module, waveform: Tensor, *, train_path: bool = False) -> tuple[int, int]:
    """Return a network's parameters, and the floating-point operations of its matrix products, convolutions and FFTs.

    A product counts as one operation and its addition as another, a real FFT of n samples as 2.5 n log2 n. What works
    element by element is not counted.

    Args:
        module: maps waveforms.
        waveform: what it is run on; on the device ``meta`` nothing is computed.
        train_path: count what runs while gradients are kept: ours has kernels without, which no counter knows.
    """

    def transform(shape: Sequence[int], dims: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(2.5 * math.prod(shape) * math.log2(shape[dims[-1]]))

    counted: dict[Any, Callable[..., Any]] = {torch.ops.aten._fft_r2c: transform}
    counter = FlopCounterMode(display=False, custom_mapping=counted)
    # The fused attention of CPUs is no operation that the counter knows.
    with counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(train_path):
        module(waveform)
    return sum(parameter.numel() for parameter in module.parameters()), counter.get_total_flops()


def baseline_size(name: str, classes: int) -> tuple[int, int]:
    """Return parameters and operations of one clip of a baseline."""
    # AST is large enough that it had better not be run for this.
    device = "meta" if name == "ast" else "cpu"
    return size(build(name, classes).to(device), torch.zeros(1, RATES[name] * SECONDS, device=device))
