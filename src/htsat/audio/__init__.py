"""From files and bytes to mono waveforms, log-mel spectrograms and chunks. No torch here."""
