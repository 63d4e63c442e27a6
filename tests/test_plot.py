"""The overview of long recordings and the picture, checked by hand-worked spectra and by the pixels of the PNG."""

import errno
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from htsat.errors import OutputError
from htsat.events import Event
from htsat.plot import PALETTE, SpectrogramOverview, save_plot

RNG = np.random.default_rng(7)


def overview(waveform, sample_rate=32000, max_columns=2000, block=None):
    made = SpectrogramOverview(sample_rate, max_columns)
    for start in range(0, len(waveform), block or len(waveform)):
        made.add(waveform[start : start + (block or len(waveform))].astype(np.float32))
    return made.finish(), made


@pytest.mark.parametrize("block", [1009, 320, 70001])
def test_overview_does_not_depend_on_the_blocks(block):
    # long enough for several merges, a change of the hop and a partial last column
    waveform = RNG.standard_normal(32000 * 37 + 4321) * np.linspace(0.01, 0.3, 32000 * 37 + 4321)
    whole, made = overview(waveform, max_columns=50)
    pieces, _ = overview(waveform, max_columns=50, block=block)
    assert whole.shape == pieces.shape and whole.dtype == np.float32
    np.testing.assert_allclose(pieces, whole, atol=1e-3)
    assert 25 <= len(whole) <= 50
    assert (len(whole) - 1) * made.column_seconds < len(waveform) / 32000 <= len(whole) * made.column_seconds


@pytest.mark.parametrize("sample_rate", [8000, 32000, 44100])
@pytest.mark.parametrize(("max_columns", "duration"), [(2000, 6.0), (64, 60.0)])
def test_tone_shows_at_its_time_and_mel(sample_rate, max_columns, duration):
    hz, onset, offset = 2000.0, 0.25 * duration, 0.75 * duration
    seconds = np.arange(round(duration * sample_rate)) / sample_rate
    sounding = (seconds >= onset) & (seconds < offset)
    columns, made = overview(0.5 * np.sin(2 * np.pi * hz * seconds) * sounding, sample_rate, max_columns)
    # Slaney's mel by hand: 15 at 1 kHz, then 27 for each factor of 6.4
    mel = lambda f: f * 3 / 200 if f < 1000 else 15 + 27 * np.log(f / 1000) / np.log(6.4)  # noqa: E731
    f_max = min(16000.0, sample_rate / 2)
    row = (mel(hz) - mel(50.0)) / (mel(f_max) - mel(50.0)) * 129 - 1
    assert abs(columns.max(axis=0).argmax() - row) <= 0.75
    loud = np.flatnonzero(columns.max(axis=1) > columns.max() - 3)
    assert loud[0] * made.column_seconds == pytest.approx(onset, abs=1.01 * made.column_seconds)
    assert (loud[-1] + 1) * made.column_seconds == pytest.approx(offset, abs=1.01 * made.column_seconds)


def test_merged_column_is_the_power_mean_of_its_stretch():
    # 512 frames of 10 ms whose level changes from frame to frame, so that a mean of dB would differ
    waveform = RNG.standard_normal(320 * 512) * np.repeat(10.0 ** RNG.uniform(-3, 0, 512), 320)
    fine, _ = overview(waveform, max_columns=1000)
    merged, made = overview(waveform, max_columns=64)
    assert fine.shape == (512, 128) and merged.shape == (64, 128) and made.column_seconds == 0.08
    power = (10.0 ** (fine.astype(np.float64) / 10)).reshape(64, 8, 128).mean(axis=1)
    np.testing.assert_allclose(merged, 10 * np.log10(power), atol=1e-3)


@pytest.mark.parametrize("duration", [4, 80])
def test_level_of_white_noise(duration):
    # a bin of Hann-windowed noise holds sigma^2 sum(w^2), a full-scale sine (sum(w) / 2)^2: ratio 6 sigma^2 / n_fft
    columns, made = overview(0.1 * RNG.standard_normal(32000 * duration), max_columns=100)
    assert made.config.n_fft == 1024
    level = 10 * np.log10(np.mean(10.0 ** (columns[2:-2].astype(np.float64) / 10)))
    assert level == pytest.approx(10 * np.log10(0.01 * 6 / 1024), abs=0.15)


def test_short_and_silent_recordings():
    assert SpectrogramOverview(32000).finish().shape == (0, 128)
    assert overview(np.ones(1))[0].shape == (1, 128)
    assert np.all(overview(np.zeros(5000))[0] == -120)
    with pytest.raises(ValueError, match="one channel"):
        SpectrogramOverview(32000).add(np.zeros((5, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="max_columns"):
        SpectrogramOverview(32000, 1)


def plot(path, duration=100.0, events=(), labels=("dog", "rain", "horn"), posteriors=None, title="street.ogg", top=6):
    num_frames = 320 if posteriors is None else len(posteriors)
    save_plot(
        path,
        title=title,
        duration=duration,
        spectrogram=RNG.normal(-80, 5, (300, 128)).astype(np.float32),
        f_min=50.0,
        f_max=16000.0,
        boundaries=np.linspace(0, duration, num_frames + 1),
        posteriors=np.zeros((num_frames, len(labels))) if posteriors is None else posteriors,
        labels=list(labels),
        events=list(events),
        top=top,
    )


def pixels(path):
    image = pytest.importorskip("matplotlib.image").imread(path)
    return np.round(image[..., :3] * 255).astype(int)


def columns_of(image, colour):
    """Return for each row of pixels where it has exactly this colour, (height, width) bool."""
    return np.all(image == [int(colour[i : i + 2], 16) for i in (1, 3, 5)], axis=-1)


def test_bars_lie_where_the_events_are(tmp_path):
    # narrow enough for no text on the bars; the third is thinner than a pixel and still seen
    events = [
        Event("rain", 60.0, 63.0, 0.7),
        Event("dog", 20.0, 23.0, 0.9),
        Event("dog", 40.0, 41.5, 0.6),
        Event("rain", 90.0, 90.001, 0.4),
    ]
    plot(tmp_path / "a.png", events=events)
    image = pixels(tmp_path / "a.png")
    height, width = image.shape[:2]
    assert 1500 <= width <= 2400 and 600 <= height <= 2000
    assert np.all(image[0] == 255) and np.all(image[:, 0] == 255)
    track = columns_of(image, "#F6F7F9")
    # dog first: its event is the most probable
    for colour, spans in ((PALETTE[0], [(20.0, 23.0), (40.0, 41.5)]), (PALETTE[1], [(60.0, 63.0), (90.0, 90.001)])):
        bar = columns_of(image, colour)
        rows = np.flatnonzero((bar.sum(axis=1) > 20) & (track.sum(axis=1) > 800))
        middle = rows[len(rows) // 2]
        line, ground = bar[middle], np.flatnonzero(track[middle])
        starts, stops = (np.flatnonzero(np.diff(np.concatenate([[0], line, [0]])) == sign) for sign in (1, -1))
        assert len(starts) == len(spans)
        per_second = (ground[-1] + 1 - ground[0]) / 100.0
        for start, stop, (onset, offset) in zip(starts, stops, spans, strict=True):
            assert start == pytest.approx(ground[0] + onset * per_second, abs=2)
            assert stop == pytest.approx(ground[0] + max(offset * per_second, onset * per_second + 2.4), abs=2)


def test_same_colour_in_both_panels_and_only_top_classes(tmp_path):
    labels = [f"class {index}" for index in range(527)]
    posteriors = np.zeros((320, 527))
    posteriors[100:120, 400] = 0.95
    posteriors[200:220, 12] = 0.8
    plot(tmp_path / "a.png", events=[Event("class 12", 62.5, 68.75, 0.8)], labels=labels, posteriors=posteriors, top=2)
    image = pixels(tmp_path / "a.png")
    sounding, other, third = (columns_of(image, PALETTE[rank]) for rank in range(3))
    # class 12 has an event, hence the first colour; class 400 has a curve alone; nothing else is drawn
    bar = np.flatnonzero(sounding.sum(axis=1) > 60)
    assert bar[-1] - bar[0] > 60
    assert other.any() and not third.any()
    assert np.flatnonzero(other.any(axis=1))[0] > bar[0]


@pytest.mark.parametrize("duration", [0.02, 1.0, 36000.0])
def test_any_length_any_name_without_warnings(tmp_path, duration):
    num_frames = max(1, int(duration / 0.3125))
    labels = ["鳥のさえずり", "A very long label that nobody would ever want to read in full", "$\\nothing_1$"]
    posteriors = RNG.uniform(0, 1, (num_frames, 3))
    events = [Event(labels[index % 3], onset, onset + 1.0) for index, onset in enumerate(np.arange(0, duration, 30.0))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        title = "録音\n$\\nothing{07}$ \udce4\U0001f426" + "long " * 60
        plot(tmp_path / "Nächte 鳥.png", duration, events, labels, posteriors, title)
    assert pixels(tmp_path / "Nächte 鳥.png").shape[1] > 1000
    assert os.listdir(tmp_path) == ["Nächte 鳥.png"]


def test_vector_formats(tmp_path):
    for name, head in (("a.PDF", b"%PDF"), ("a.svg", b"<?xml")):
        plot(tmp_path / name, events=[Event("dog", 1.0, 2.0)])
        assert (tmp_path / name).read_bytes().startswith(head)


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OutputError, match=r'a\.png: .*pip install "htsat\[plot\]"'):
        plot(tmp_path / "a.png")


def test_unknown_ending(tmp_path):
    with pytest.raises(OutputError, match=r"a\.bmp: .*\.png, \.pdf or \.svg"):
        plot(tmp_path / "a.bmp")


def test_failure_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match=r"missing.a\.png: .*does not exist"):
        plot(tmp_path / "missing" / "a.png")
    # the picture is drawn, and then cannot take its place
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OutputError, match=r"a\.png: .*it is a folder"):
        plot(tmp_path / "a.png")
    assert os.listdir(tmp_path) == ["a.png"]


def test_read_only_folder(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(OutputError, match="no permission"):
        plot(folder / "a.png")
    assert not list(Path(folder).iterdir())


def test_old_picture_survives_a_failed_one(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.png"]
