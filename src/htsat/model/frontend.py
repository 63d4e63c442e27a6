"""Log-mel front end: waveform -> decibels, on any device, through an FFT."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        # Constants, rebuilt from the configuration: never part of a checkpoint. Kept in float64 so that
        # a float64 run is exact; cast when used.
        self._window = torch.from_numpy(hann_window(config.n_fft))
        self._filters = torch.from_numpy(mel_filterbank(config))
        self._cast: tuple[Tensor, Tensor] | None = None

    def _constants(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        if self._cast is None or self._cast[0].dtype != waveform.dtype or self._cast[0].device != waveform.device:
            with torch.inference_mode(False):  # they may take part in a gradient later
                kind = (waveform.device, waveform.dtype)
                self._cast = (self._window.to(*kind), self._filters.to(*kind))
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
        window, filters = self._constants(waveform)
        half = self.config.n_fft // 2
        padded = F.pad(waveform.unsqueeze(1), (half, half), mode="reflect").squeeze(1)
        frames = padded.unfold(-1, self.config.n_fft, self.config.hop_length) * window
        spectrum = torch.fft.rfft(frames)
        power = spectrum.real.square() + spectrum.imag.square()
        return 10.0 * torch.log10((power @ filters).clamp_min(10 ** (self.config.floor_db / 10)))
