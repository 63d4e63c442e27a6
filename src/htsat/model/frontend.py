"""Log-mel front end: waveform -> decibels, on any device, through an FFT."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from htsat.audio.mel import hann_window, mel_filterbank
from htsat.config import FrontendConfig


class LogMel(nn.Module):
    """Log-mel spectrogram in dB, always computed in the precision of the waveform.

    Source: paper section 3.1.1 and torchlibrosa's ``Spectrogram`` + ``LogmelFilterBank`` as the
    published code calls them; theirs is a convolution with DFT matrices, this is an FFT.
    """

    def __init__(self, config: FrontendConfig) -> None:
        super().__init__()
        self.config = config
        bank = mel_filterbank(config)
        self._parts, (low, high) = _halves(bank)
        # Constants, rebuilt from the configuration: never part of a checkpoint. Kept in float64 so that
        # a float64 run is exact; cast when used.
        self._exact = tuple(map(torch.from_numpy, (hann_window(config.n_fft), low, high)))
        self._cast: tuple[Tensor, ...] | None = None

    def _constants(self, waveform: Tensor) -> tuple[Tensor, ...]:
        """Return the window and the filters of both halves, as the waveform is."""
        if self._cast is None or self._cast[0].dtype != waveform.dtype or self._cast[0].device != waveform.device:
            with torch.inference_mode(False):  # they may take part in a gradient later
                self._cast = tuple(value.to(waveform.device, waveform.dtype) for value in self._exact)
        return self._cast

    def forward(self, waveform: Tensor) -> Tensor:
        """Return the log-mel spectrogram.

        Args:
            waveform: (batch, num_samples) float32 or float64, more than n_fft / 2 samples.

        Returns:
            (batch, num_samples // hop_length + 1, n_mels), dB, at least ``config.floor_db``.
        """
        with torch.autocast(waveform.device.type, enabled=False):
            return self._log_mel(waveform)

    def _log_mel(self, waveform: Tensor) -> Tensor:
        window, *filters = self._constants(waveform)
        half = self.config.n_fft // 2
        before, behind = waveform[:, 1 : half + 1].flip(1), waveform[:, -half - 1 : -1].flip(1)
        padded = torch.cat([before, waveform, behind], 1)
        spectrum = torch.fft.rfft(padded.unfold(-1, self.config.n_fft, self.config.hop_length) * window)
        mel = []
        for part, bank in zip(self._parts, filters, strict=True):
            real, imaginary = spectrum.real[..., part], spectrum.imag[..., part]
            mel.append(torch.addcmul(real.square(), imaginary, imaginary) @ bank)
        return 10.0 * torch.log10(torch.cat(mel, -1).clamp_min(10 ** (self.config.floor_db / 10)))


def _halves(bank: NDArray[np.float64]) -> tuple[tuple[slice, slice], tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Cut mel filters (frequencies, n_mels) in two where that leaves out most zeros: low ones are narrow, high few.

    Returns:
        The frequencies that each part takes, and its filters, (those frequencies, some of the n_mels).
    """

    def taken(filters: NDArray[np.float64]) -> slice:
        heard = np.flatnonzero(filters.any(1))
        return slice(int(heard[0]), int(heard[-1]) + 1) if len(heard) else slice(0, 1)

    def cost(cut: int) -> int:
        low, high = taken(bank[:, :cut]), taken(bank[:, cut:])
        return int((low.stop - low.start) * cut + (high.stop - high.start) * (bank.shape[1] - cut))

    cut = min(range(1, bank.shape[1]), key=cost)
    low, high = taken(bank[:, :cut]), taken(bank[:, cut:])
    return (low, high), (bank[low, :cut].copy(), bank[high, cut:].copy())
