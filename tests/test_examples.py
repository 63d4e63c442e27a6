"""The example recordings are what their script makes, and sound when their table says."""

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")

FOLDER = Path(__file__).parent.parent / "examples"
#: from Hz to Hz, where a sound stands out against the others of its recording, and the quantile of its level over
#: time: the loudest moments of knocks, the middle of lasting noise
BANDS = {
    "clock_tick": (1000, 7000, 1.0),
    "rain": (6000, 14000, 0.5),
    "sea_waves": (200, 4000, 0.5),
    "crackling_fire": (2000, 8000, 1.0),
    "helicopter": (80, 600, 0.5),
    "speech": (150, 1200, 0.9),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Run the script once and return the folder it wrote."""
    spec = importlib.util.spec_from_file_location("make_examples", FOLDER / "make_examples.py")
    module = importlib.util.module_from_spec(spec)
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "make_examples", module)
        patch.setattr(sys, "argv", ["make_examples.py", "--out", str(folder)])
        spec.loader.exec_module(module)
        module.main()
    return folder


def table(folder):
    with open(folder / "events.tsv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file, delimiter="\t"))


RECORDINGS = sorted({row[0] for row in table(FOLDER)[1:]})


@pytest.mark.parametrize("name", RECORDINGS)
def test_stored_recording_is_what_the_script_makes(made, name):
    stored, rate = soundfile.read(FOLDER / name, always_2d=True)
    again, rate_again = soundfile.read(made / name, always_2d=True)
    assert rate == rate_again and stored.shape == again.shape
    # other versions of the codec round differently; another seed or level would leave no likeness
    tolerance = 1e-3 if name.endswith(".ogg") else 1e-8
    assert np.mean((stored - again) ** 2) < tolerance * np.mean(stored**2)
    assert np.abs(stored).max() < 0.99
    assert (FOLDER / name).stat().st_size < 500_000


def test_table_is_what_the_script_makes(made):
    rows = table(FOLDER)
    assert rows == table(made)
    assert rows[0] == ["filename", "onset", "offset", "event_label"]
    assert {path.name for path in made.iterdir()} == {*RECORDINGS, "events.tsv"}
    for name, onset, offset, label in rows[1:]:
        assert label in BANDS
        assert 0 <= float(onset) < float(offset) <= soundfile.info(FOLDER / name).duration


def test_formats_vary():
    infos = [soundfile.info(FOLDER / name) for name in RECORDINGS]
    assert {info.format for info in infos} == {"WAV", "OGG", "FLAC"}
    assert {info.channels for info in infos} == {1, 2}
    assert {16000, 32000, 44100} <= {info.samplerate for info in infos}


def level(waveform, rate, start, stop, band):
    """Return the power in ``band`` in dB, a quantile over the stretches of 20 ms between two times."""
    size = round(0.02 * rate)
    part = waveform[max(0, round(start * rate)) : round(stop * rate)].mean(axis=1)
    frames = np.lib.stride_tricks.sliding_window_view(part, size)[:: size // 4]
    power = np.abs(np.fft.rfft(frames * np.hanning(size), axis=1)) ** 2
    hz = np.fft.rfftfreq(size, 1 / rate)
    return 10 * np.log10(np.quantile(power[:, (hz > band[0]) & (hz < band[1])].sum(axis=1), band[2]) + 1e-12)


@pytest.mark.parametrize(("name", "onset", "offset", "label"), table(FOLDER)[1:])
def test_event_sounds_from_onset_to_offset(name, onset, offset, label):
    waveform, rate = soundfile.read(FOLDER / name, always_2d=True)
    onset, offset, band = float(onset), float(offset), BANDS[label]
    before = level(waveform, rate, onset - 0.5, onset - 0.005, band)
    after = level(waveform, rate, onset, onset + 0.5, band)
    assert after > before + 6
    if offset + 0.3 < len(waveform) / rate:
        inside = level(waveform, rate, offset - 0.5, offset, band)
        outside = level(waveform, rate, offset + 0.05, offset + 0.5, band)
        assert inside > outside + 3
