"""Mel filters and the log-mel spectrogram in NumPy (the reference of the front end inside the model)."""

import numpy as np
from numpy.typing import NDArray

from htsat.config import FrontendConfig

#: Slaney's scale is linear below this frequency (Hz) and logarithmic above it
_SLANEY_BREAK_HZ = 1000.0
_SLANEY_HZ_PER_MEL = 200.0 / 3
_SLANEY_LOG_STEP = np.log(6.4) / 27


def hz_to_mel(frequencies: NDArray[np.float64], scale: str) -> NDArray[np.float64]:
    """Return mels for frequencies in Hz on the ``slaney`` or ``htk`` scale."""
    frequencies = np.asarray(frequencies, dtype=np.float64)
    if scale == "htk":
        return np.asarray(2595.0 * np.log10(1.0 + frequencies / 700.0))
    log_part = np.log(np.maximum(frequencies, _SLANEY_BREAK_HZ) / _SLANEY_BREAK_HZ) / _SLANEY_LOG_STEP
    linear = np.minimum(frequencies, _SLANEY_BREAK_HZ) / _SLANEY_HZ_PER_MEL
    return np.asarray(linear + log_part)


def mel_to_hz(mels: NDArray[np.float64], scale: str) -> NDArray[np.float64]:
    """Return frequencies in Hz for mels: the inverse of ``hz_to_mel``."""
    mels = np.asarray(mels, dtype=np.float64)
    if scale == "htk":
        return 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    break_mel = _SLANEY_BREAK_HZ / _SLANEY_HZ_PER_MEL
    linear = mels * _SLANEY_HZ_PER_MEL
    return np.where(mels < break_mel, linear, _SLANEY_BREAK_HZ * np.exp(_SLANEY_LOG_STEP * (mels - break_mel)))


def mel_filterbank(config: FrontendConfig) -> NDArray[np.float64]:
    """Return triangular mel filters, (n_fft / 2 + 1, n_mels) float64.

    On the ``slaney`` scale each filter has unit area in Hz, on ``htk`` unit height, as in
    librosa and torchaudio. Filters above half the sample rate are all zero: at 16 kHz and the
    published ``f_max`` of 14 kHz nine of 64 are, which published weights expect.
    """
    fft_hz = np.fft.rfftfreq(config.n_fft, 1.0 / config.sample_rate)
    low, high = hz_to_mel(np.array([config.f_min, config.f_max]), config.mel_scale)
    edges = mel_to_hz(np.linspace(low, high, config.n_mels + 2), config.mel_scale)
    widths = np.diff(edges)
    rising = (fft_hz[:, None] - edges[:-2]) / widths[:-1]
    falling = (edges[2:] - fft_hz[:, None]) / widths[1:]
    filters = np.maximum(0.0, np.minimum(rising, falling))
    if config.mel_scale == "slaney":
        filters *= 2.0 / (edges[2:] - edges[:-2])
    return filters


def hann_window(n_fft: int) -> NDArray[np.float64]:
    """Return the periodic Hann window, (n_fft,) float64."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)


def log_mel(waveform: NDArray[np.floating], config: FrontendConfig) -> NDArray[np.float64]:
    """Return the log-mel spectrogram of one waveform, computed in float64.

    Args:
        waveform: (num_samples,), longer than n_fft / 2 (reflect padding needs that many).
        config: the front end.

    Returns:
        (num_samples // hop_length + 1, n_mels), dB, at least ``config.floor_db``.
    """
    padded = np.pad(np.asarray(waveform, dtype=np.float64), config.n_fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, config.n_fft)[:: config.hop_length]
    power = np.abs(np.fft.rfft(frames * hann_window(config.n_fft), axis=-1)) ** 2
    return 10.0 * np.log10(np.maximum(power @ mel_filterbank(config), 10 ** (config.floor_db / 10)))
