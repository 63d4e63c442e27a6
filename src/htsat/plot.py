"""One picture of a recording: spectrogram, events and posteriors above each other on one time axis.

``SpectrogramOverview`` reduces a recording of any length to a spectrogram of bounded size while it
streams by; ``save_plot`` draws. NumPy alone does the first; Matplotlib (``pip install
"htsat[plot]"``) is imported inside the second, object by object, so that no global state of
Matplotlib is read or changed and threads may draw at once.
"""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from htsat.audio.mel import hann_window, hz_to_mel, mel_filterbank
from htsat.config import FrontendConfig
from htsat.errors import OutputError, UsageError
from htsat.events import Event
from htsat.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

_Across = Literal["left", "center", "right"]

#: what ``save_plot`` can write, lower case
PICTURE_ENDINGS = (".png", ".pdf", ".svg")

#: seconds between the frames of a short recording
_FRAME_SECONDS = 0.01
#: once a column holds this many frames, every second one is left out: 10 hours in seconds, not minutes
_MAX_DENSE_FRAMES = 8
#: power relative to a full-scale sine: -120 dB, below the noise of 16-bit samples
_POWER_FLOOR = 1e-12

#: colours of Okabe and Ito (2008), told apart with any colour vision; their yellow is too pale on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4B8A", "#7F7F7F")
_INK, _GREY, _RULE, _PANEL = "#1F2430", "#6B7280", "#D9DDE3", "#F6F7F9"
#: from paper to ink through blue and plum, lightness falling evenly: prints well and leaves the hues to the events
_SPECTROGRAM_COLOURS = ("#F6F7F9", "#E3EBF4", "#B9D0E8", "#8AA6D6", "#6F78BF", "#5E4A9C", "#472770", "#220F3D")

_WIDTH, _DPI = 12.0, 150
#: inches: heights of the panels' parts, and gaps
_TITLE_HEIGHT, _SPECTROGRAM_HEIGHT, _EVENT_ROW, _POSTERIOR_ROW = 0.86, 2.7, 0.34, 0.42
_GAP, _AXIS_HEIGHT, _RIGHT = 0.42, 0.52, 0.62
_LABEL_CHARACTERS = 30

_FREQUENCY_TICKS = (100, 200, 500, 1000, 2000, 4000, 8000, 16000)
#: a curve has about as many steps as the picture has pixels
_MAX_STEPS = 1800
#: for names of files and labels that DejaVu Sans, which comes with Matplotlib, cannot write
_FURTHER_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Hiragino Sans", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic"),
    *("Arial Unicode MS", "Noto Sans Devanagari", "Noto Emoji", "Segoe UI Symbol"),
)
_TICK_STEPS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30),
    *(60, 120, 300, 600, 900, 1800, 3600, 7200, 4 * 3600, 6 * 3600, 12 * 3600, 24 * 3600),
)


class SpectrogramOverview:
    """Mel spectrogram of a recording of any length, in bounded memory.

    Frames of about 32 ms every 10 ms are averaged into columns. Whenever there are more than
    ``max_columns``, neighbours are merged by two and the step between columns doubles, so an hour
    costs no more memory than a minute. The result does not depend on the sizes of the blocks.

    Attributes:
        config: the mel filters (``f_min``, ``f_max``, ``n_mels``); 50 Hz to 16 kHz or half the sample rate.
        column_seconds: length of the stretch of time that each column stands for; the last may be shorter.
    """

    def __init__(self, sample_rate: int, max_columns: int = 2000) -> None:
        """Start an overview.

        Args:
            sample_rate: Hz.
            max_columns: the most columns to keep, at least 2; an odd number is rounded down.

        Raises:
            ConfigError: sample_rate is out of range.
            ValueError: max_columns is below 2.
        """
        if max_columns < 2:
            raise ValueError(f"max_columns must be at least 2, got {max_columns}")
        # at least 32 ms: bins of 31 Hz, narrower than the narrowest of the filters, which therefore never stay empty
        n_fft = 1 << int(np.ceil(np.log2(max(16.0, 0.032 * sample_rate))))
        self.config = FrontendConfig(
            sample_rate=sample_rate,
            n_fft=n_fft,
            hop_length=max(1, round(_FRAME_SECONDS * sample_rate)),
            n_mels=128,
            f_min=50.0,
            f_max=min(16000.0, sample_rate / 2),
        )
        self._max_columns = max_columns - max_columns % 2
        filters = mel_filterbank(self.config)
        window = hann_window(n_fft)
        # the mean over each filter, and 0 dB for a full-scale sine that one bin holds
        self._filters = filters / filters.sum(axis=0) / (window.sum() / 2) ** 2
        self._window = window.astype(np.float32)
        self._hop = self.config.hop_length
        self._frames_per_column = 1
        self._columns = np.empty((self._max_columns, self.config.n_mels))
        self._num_columns = 0
        self._pending = np.zeros(n_fft // 2 + 1)
        self._num_pending = 0
        # frame k is centred on its stretch, k to k + 1 hops, so half a window less half a hop precedes the sound
        self._buffer = np.zeros(max(1 << 17, 8 * n_fft), dtype=np.float32)
        self._num_buffered = (n_fft - self._hop) // 2
        self._num_samples = 0
        self._num_covered = 0

    @property
    def column_seconds(self) -> float:
        """Seconds from one column to the next."""
        return self._hop * self._frames_per_column / self.config.sample_rate

    def add(self, block: NDArray[np.floating]) -> None:
        """Take in the next samples.

        Args:
            block: (num_samples,), any number of them, mono.
        """
        if block.ndim != 1:
            raise ValueError(f"block must be one channel of samples, got shape {block.shape}")
        self._num_samples += len(block)
        # frames are computed only when the buffer is full, at the same places whatever the sizes of the blocks
        while len(block):
            room = len(self._buffer) - self._num_buffered
            part, block = block[:room], block[room:]
            self._buffer[self._num_buffered : self._num_buffered + len(part)] = part
            self._num_buffered += len(part)
            if self._num_buffered == len(self._buffer):
                self._consume(last=False)

    def finish(self) -> NDArray[np.float32]:
        """Return the overview; nothing can be added afterwards.

        Returns:
            (num_columns, n_mels) float32, dB relative to a full-scale sine, at least -120. No columns if
            nothing was added.
        """
        self._consume(last=False)
        # fewer samples than one frame needs are left: silence behind them completes the frames that reach over the end
        self._buffer[self._num_buffered :] = 0.0
        self._num_buffered = len(self._buffer)
        self._consume(last=True)
        columns = self._columns[: self._num_columns]
        if self._num_pending:
            columns = np.concatenate([columns, [self._pending / self._num_pending @ self._filters]])
        return (10.0 * np.log10(np.maximum(columns, _POWER_FLOOR))).astype(np.float32)

    def _consume(self, last: bool) -> None:
        """Turn the buffered samples into columns and keep what the next frame needs."""
        n_fft = self.config.n_fft
        start = 0
        while True:
            # in pieces that stay in the processor's cache, and none beyond a merge, which may change the hop
            count = min(128, (self._num_buffered - start - n_fft) // self._hop + 1)
            if last:
                count = min(count, self._num_left())
            if count <= 0:
                break
            until_merge = (self._max_columns - self._num_columns) * self._frames_per_column - self._num_pending
            if not until_merge:
                start += self._merge()
                continue
            count = min(count, until_merge)
            samples = self._buffer[start : start + (count - 1) * self._hop + n_fft]
            frames = np.lib.stride_tricks.sliding_window_view(samples, n_fft)[:: self._hop]
            spectrum = np.fft.rfft(frames * self._window, axis=-1)
            self._accumulate(spectrum.real**2 + spectrum.imag**2)
            start += count * self._hop
            self._num_covered += count * self._hop
        rest = self._buffer[start : self._num_buffered].copy()
        self._buffer[: len(rest)] = rest
        self._num_buffered = len(rest)

    def _num_left(self) -> int:
        """Frames from here to the end; a stretch of less than half a hop is left out, but for the first."""
        left = self._num_samples - self._num_covered
        return (left + self._hop // 2) // self._hop if self._num_covered else -(-left // self._hop)

    def _accumulate(self, power: NDArray[np.floating]) -> None:
        """Add (num_frames, n_fft / 2 + 1) power spectra to the columns; they fit before the next merge."""
        first = (self._frames_per_column - self._num_pending) % self._frames_per_column
        starts = np.arange(first, len(power), self._frames_per_column)
        if first:
            starts = np.concatenate([[0], starts])
        sums = np.add.reduceat(power, starts, axis=0, dtype=np.float64)
        sums[0] += self._pending
        num_complete, self._num_pending = divmod(self._num_pending + len(power), self._frames_per_column)
        stop = self._num_columns + num_complete
        self._columns[self._num_columns : stop] = sums[:num_complete] / self._frames_per_column @ self._filters
        self._num_columns = stop
        self._pending = sums[-1] if self._num_pending else np.zeros_like(self._pending)

    def _merge(self) -> int:
        """Merge neighbouring columns by two and return how many samples later the next frame begins."""
        self._num_columns //= 2
        self._columns[: self._num_columns] = (self._columns[0::2] + self._columns[1::2]) / 2
        n_fft = self.config.n_fft
        if self._frames_per_column < _MAX_DENSE_FRAMES or 3 * self._hop > n_fft:
            self._frames_per_column *= 2
            return 0
        # frames stay centred on their stretches, which are now longer
        shift = (n_fft - self._hop) // 2 - (n_fft - 2 * self._hop) // 2
        self._hop *= 2
        return shift


def save_plot(
    path: str | os.PathLike[str],
    *,
    title: str,
    duration: float,
    spectrogram: NDArray[np.floating],
    f_min: float,
    f_max: float,
    boundaries: NDArray[np.floating],
    posteriors: NDArray[np.floating],
    labels: Sequence[str],
    events: Sequence[Event],
    top: int = 6,
    column_seconds: float | None = None,
) -> None:
    """Draw a recording with its events and posteriors and write the picture.

    Drawn are the ``top`` classes: first those with events, the most probable first, then those with
    the highest posteriors. A class has the same colour and the same place in both panels.

    Args:
        path: the picture; its ending (.png, .pdf or .svg) chooses the format.
        title: heading, usually the name of the recording.
        duration: seconds.
        spectrogram: (num_columns, n_mels) dB over the duration, from ``SpectrogramOverview.finish``.
        f_min: Hz, lower edge of its lowest mel filter.
        f_max: Hz, upper edge of its highest mel filter.
        boundaries: (num_frames + 1,) seconds, the frames of the posteriors.
        posteriors: (num_frames, num_classes) in [0, 1].
        labels: one per class.
        events: what to show as bars, any order, with labels among ``labels``.
        top: the most classes to show, at least 1.
        column_seconds: length of a column of the spectrogram; None: the columns share the duration evenly.

    Raises:
        OutputError: Matplotlib is missing, the ending is unknown, or the file cannot be written.
        UsageError: top is below 1.
        ValueError: the arrays do not fit each other.
    """
    path = Path(path)
    if path.suffix.lower() not in PICTURE_ENDINGS:
        raise OutputError(f"{path}: expected a picture ending in .png, .pdf or .svg; rename it")
    if top < 1:
        raise UsageError(f"top must be at least 1, got {top}")
    if posteriors.shape != (len(boundaries) - 1, len(labels)):
        raise ValueError(
            f"posteriors must be (frames, classes) = ({len(boundaries) - 1}, {len(labels)}), got {posteriors.shape}"
        )
    if not duration > 0:
        raise ValueError(f"duration must be above 0 seconds, got {duration}")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        missing = f'{path}: drawing needs Matplotlib, which is missing; run: pip install "htsat[plot]"'
        raise OutputError(missing) from None

    shown = _ranked(posteriors, labels, events, top)
    colours = {label: PALETTE[rank % len(PALETTE)] for rank, label in enumerate(shown)}
    sounding = {event.event_label for event in events}
    event_rows = [label for label in shown if label in sounding]
    hidden = len(sounding) - len(event_rows)

    event_height = _EVENT_ROW * max(1, len(event_rows))
    posterior_height = _POSTERIOR_ROW * max(1, len(shown))
    height = _TITLE_HEIGHT + _SPECTROGRAM_HEIGHT + event_height + posterior_height + 2 * _GAP + _AXIS_HEIGHT
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    write = _Writer(figure)
    names = {label: write.drawable(label) for label in shown}
    names = {k: v if len(v) <= _LABEL_CHARACTERS else v[: _LABEL_CHARACTERS - 1] + "…" for k, v in names.items()}
    left = max([0.75, *(write.width(name, 9.5) + 0.42 for name in names.values())])

    across = _WIDTH - left - _RIGHT

    def panel(floor: float, tall: float) -> "Axes":
        axes = figure.add_axes((left / _WIDTH, floor / height, across / _WIDTH, tall / height))
        axes.set_xlim(0, duration)
        axes.set_facecolor("white")
        axes.tick_params(length=0, labelbottom=False, labelleft=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return axes

    ticks, format_time, time_unit = _time_ticks(duration)
    per_inch = duration / across
    # lower edges of the three panels
    curve_floor = _AXIS_HEIGHT
    event_floor = curve_floor + posterior_height + _GAP
    sound_floor = event_floor + event_height + _GAP

    heading = write.fitted(write.drawable(title), 15, across, bold=True)
    write.text(left, height - 0.34, heading, 15, _INK, bold=True)
    facts = f"{_spoken(duration)}  ·  {len(events) or 'no'} event{'' if len(events) == 1 else 's'}"
    if hidden:
        facts += f"  ·  {hidden} more label{'' if hidden == 1 else 's'} with events not shown"
    write.text(left, height - 0.62, facts, 9.5, _GREY)

    sound = panel(sound_floor, _SPECTROGRAM_HEIGHT)
    low, high = _draw_spectrogram(sound, spectrogram, duration, column_seconds)
    for hz, share in _frequency_ticks(f_min, f_max, spectrogram.shape[1]):
        place = sound_floor + share * _SPECTROGRAM_HEIGHT
        write.text(left - 0.14, place, f"{hz / 1000:g}{' kHz' if hz == 1000 else ''}", 8.5, _GREY, "right")
        figure.add_artist(_rule(figure, left - 0.08, left - 0.02, place))
    if len(spectrogram):
        _draw_scale(figure, sound_floor, low, high, write)

    timeline = panel(event_floor, event_height)
    write.text(left, event_floor + event_height + 0.16, "Events", 8.5, _GREY)
    _draw_events(timeline, [e for e in events if e.event_label in event_rows], event_rows, colours, per_inch, write)
    for index, label in enumerate(event_rows):
        place = event_floor + event_height - (index + 0.5) * _EVENT_ROW
        write.text(left - 0.14, place, names[label], 9.5, _INK, "right")
    if not event_rows:
        write.text(left + 0.12, event_floor + event_height / 2, "no events", 9.5, _GREY)

    curves = panel(curve_floor, posterior_height)
    write.text(left, curve_floor + posterior_height + 0.16, "Posteriors", 8.5, _GREY)
    write.text(_WIDTH - _RIGHT + 0.1, curve_floor + posterior_height + 0.16, "peak", 8.5, _GREY)
    indices = [list(labels).index(label) for label in shown]
    _draw_posteriors(curves, boundaries, posteriors[:, indices], [colours[label] for label in shown])
    for index, label in enumerate(shown):
        place = curve_floor + posterior_height - (index + 0.6) * _POSTERIOR_ROW
        peak = float(posteriors[:, indices[index]].max()) if len(posteriors) else 0.0
        write.text(left - 0.14, place, names[label], 9.5, _INK, "right")
        write.text(_WIDTH - _RIGHT + 0.1, place, f"{peak:.2f}", 8.5, _GREY)

    for axes in (timeline, curves):
        axes.vlines(ticks, 0, 1, transform=axes.get_xaxis_transform(), color=_RULE, linewidth=0.7, zorder=1)
    for seconds in ticks:
        write.text(left + seconds / per_inch, curve_floor - 0.19, format_time(seconds), 9, _GREY, "center")
    write.text(left - 0.34, curve_floor - 0.19, time_unit, 8.5, _GREY, "right")

    _write_file(path, figure, path.suffix.lower().removeprefix("."))


def _ranked(posteriors: NDArray[np.floating], labels: Sequence[str], events: Sequence[Event], top: int) -> list[str]:
    """Return the labels to show: with events first, then by probability."""
    probabilities: dict[str, float] = {}
    for event in events:
        probabilities[event.event_label] = max(event.probability, probabilities.get(event.event_label, 0.0))
    chosen = sorted(probabilities, key=lambda label: -probabilities[label])[:top]
    peaks = posteriors.max(axis=0) if len(posteriors) else np.zeros(len(labels))
    for index in np.argsort(-peaks, kind="stable"):
        if len(chosen) >= min(top, len(labels)):
            break
        if labels[index] not in probabilities:
            chosen.append(labels[index])
    return chosen


def _frequency_ticks(f_min: float, f_max: float, n_mels: int) -> list[tuple[int, float]]:
    """Return round frequencies in Hz and their places as shares of the height of ``n_mels`` rows."""
    low, high, *mels = hz_to_mel(np.array([f_min, f_max, *_FREQUENCY_TICKS]), "slaney").tolist()
    ticks: list[tuple[int, float]] = []
    for hz, mel in zip(reversed(_FREQUENCY_TICKS), reversed(mels), strict=True):
        # the middle of row i lies at edge i + 1 of n_mels + 2 edges that are even in mel
        share = ((mel - low) / (high - low) * (n_mels + 1) - 0.5) / n_mels
        crowded = ticks and ticks[-1][1] - share < 0.16 / _SPECTROGRAM_HEIGHT
        if 0.01 < share < 1.01 and not crowded:
            ticks.append((hz, min(share, 1.0)))
    return ticks


def _time_ticks(duration: float) -> tuple[list[float], Callable[[float], str], str]:
    """Return the places of round times in seconds, how to write them, and the unit where the numbers do not show it."""
    step = next((step for step in _TICK_STEPS if duration / step <= 12), duration / 10)
    ticks = [index * step for index in range(int(duration / step + 1e-9) + 1)]
    if duration < 60:
        return ticks, lambda seconds: f"{seconds:.10g} s", ""
    if duration < 3600:
        return ticks, lambda seconds: f"{int(seconds // 60)}:{int(seconds % 60):02d}", "min:s"
    return ticks, lambda seconds: f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}", "h:min"


def _spoken(duration: float) -> str:
    """Return a duration for the eye: ``8.5 s``, ``3 min 20 s``, ``10 h 0 min``."""
    if duration < 60:
        return f"{duration:.3g} s"
    seconds = round(duration)
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def _rule(figure: "Figure", start: float, stop: float, y: float) -> "Line2D":
    """Return a thin horizontal line, in inches."""
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()
    line = Line2D([start / width, stop / width], [y / height, y / height], color=_GREY, linewidth=0.6)
    line.set_transform(figure.transFigure)
    return line


def _draw_scale(figure: "Figure", floor: float, low: float, high: float, write: "_Writer") -> None:
    """Draw what the colours of the spectrogram mean, right of it."""
    from matplotlib.colors import LinearSegmentedColormap

    width, height = figure.get_size_inches()
    x, tall = _WIDTH - _RIGHT + 0.1, 0.9
    axes = figure.add_axes((x / width, floor / height, 0.09 / width, tall / height))
    axes.set_axis_off()
    colours = LinearSegmentedColormap.from_list("paper_to_ink", _SPECTROGRAM_COLOURS)
    axes.imshow(np.linspace(0, 1, 64)[:, None], cmap=colours, origin="lower", aspect="auto")
    for level, y in ((high, floor + tall - 0.05), (low, floor + 0.05)):
        write.text(x + 0.13, y, f"{level:.0f}".replace("-", "\N{MINUS SIGN}"), 7.5, _GREY)
    write.text(x, floor + tall + 0.13, "dB", 7.5, _GREY)


class _Writer:
    """Puts text on a figure, measured in inches from its lower left corner."""

    def __init__(self, figure: "Figure") -> None:
        from matplotlib import font_manager

        self._figure = figure
        present = set(font_manager.get_font_names())
        self._families = ["DejaVu Sans", *(family for family in _FURTHER_FONTS if family in present)]
        paths = [font_manager.findfont(family) for family in self._families]
        self._fonts = [font_manager.get_font(path) for path in paths]

    def drawable(self, text: str) -> str:
        """Return ``text`` on one line, with a box for each character that no font has (no warning, no surprise)."""
        return "".join(
            character if any(font.get_char_index(ord(character)) for font in self._fonts) else "□"
            for character in " ".join(text.split())
        )

    def artist(
        self, x: float, y: float, text: str, size: float, colour: str, across: _Across = "left", bold: bool = False
    ) -> "Text":
        """Return ``text`` as an artist, vertically centred, not yet on the figure."""
        from matplotlib.text import Text

        width, height = self._figure.get_size_inches()
        artist = Text(
            x / width,
            y / height,
            text,
            color=colour,
            fontsize=size,
            fontfamily=self._families,
            fontweight="bold" if bold else "normal",
            horizontalalignment=across,
            verticalalignment="center_baseline",
            # a dollar sign in a file name is no formula
            parse_math=False,
            usetex=False,
        )
        artist.set_transform(self._figure.transFigure)
        artist.set_figure(self._figure)
        return artist

    def text(
        self, x: float, y: float, text: str, size: float, colour: str, across: _Across = "left", bold: bool = False
    ) -> None:
        """Draw ``text`` at (x, y)."""
        self._figure.add_artist(self.artist(x, y, text, size, colour, across, bold))

    def width(self, text: str, size: float, bold: bool = False) -> float:
        """Return the width of ``text`` in inches."""
        artist = self.artist(0.0, 0.0, text, size, _INK, bold=bold)
        renderer = self._figure.canvas.get_renderer()  # type: ignore[attr-defined]
        return float(artist.get_window_extent(renderer).width / self._figure.dpi)

    def fitted(self, text: str, size: float, width: float, bold: bool = False) -> str:
        """Return ``text``, with its middle left out if it is wider than ``width`` inches."""
        kept = text
        length = len(text)
        while length > 2 and self.width(kept, size, bold) > width:
            length = min(length - 1, int(length * width / self.width(kept, size, bold)) + 1)
            kept = text[: (length + 1) // 2] + "…" + text[len(text) - length // 2 :]
        return kept


def _draw_spectrogram(
    axes: "Axes", spectrogram: NDArray[np.floating], duration: float, column_seconds: float | None
) -> tuple[float, float]:
    """Draw (num_columns, n_mels) dB, row i from height i to i + 1, and return the range of the colours in dB."""
    from matplotlib.colors import LinearSegmentedColormap

    num_columns, n_mels = spectrogram.shape
    low, high = 0.0, 0.0
    axes.set_facecolor(_PANEL)
    if num_columns:
        # the background stays pale whatever its level, and a recording without contrast stays pale as a whole
        high = float(np.percentile(spectrogram, 99.8))
        low = max(float(np.percentile(spectrogram, 10)), high - 75.0)
        high = max(high, low + 20.0)
        axes.imshow(
            spectrogram.T,
            cmap=LinearSegmentedColormap.from_list("paper_to_ink", _SPECTROGRAM_COLOURS),
            vmin=low,
            vmax=high,
            origin="lower",
            aspect="auto",
            extent=(0.0, num_columns * column_seconds if column_seconds else duration, 0.0, float(n_mels)),
        )
    axes.set_xlim(0, duration)
    axes.set_ylim(0, n_mels)
    return low, high


def _draw_events(
    axes: "Axes", events: Sequence[Event], rows: Sequence[str], colours: dict[str, str], per_inch: float, write: _Writer
) -> None:
    """Draw a rounded bar per event, one row per label, with the probability where it fits.

    Args:
        axes: the panel; its rows get the heights 0 to len(rows) from the bottom.
        events: events of these rows.
        rows: labels from top to bottom.
        colours: one per label.
        per_inch: seconds per inch.
        write: the text of the figure.
    """
    from matplotlib.patches import BoxStyle, FancyBboxPatch

    axes.set_ylim(0, max(1, len(rows)))
    half = 0.34
    end = axes.get_xlim()[1]

    def bar(onset: float, seconds: float, middle: float, colour: str, order: float) -> None:
        radius = min(0.075, seconds / per_inch / 2) * per_inch
        axes.add_patch(
            FancyBboxPatch(
                (onset, middle - half),
                seconds,
                2 * half,
                boxstyle=BoxStyle.Round(pad=0, rounding_size=radius),
                mutation_aspect=1 / _EVENT_ROW / per_inch,
                facecolor=colour,
                edgecolor="none",
                zorder=order,
            )
        )

    for row in range(max(1, len(rows))):
        bar(0.0, end, row + 0.5, _PANEL, 0.5)
    slivers: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        seconds = min(event.offset, end) - event.onset
        if seconds <= 0:
            continue
        middle = len(rows) - rows.index(event.event_label) - 0.5
        inches = seconds / per_inch
        colour = colours[event.event_label]
        if inches < 0.05:
            # all slivers of a row are one artist: a night of birdsong has thousands; none is too thin to be seen
            slivers.setdefault(event.event_label, []).append((event.onset, max(seconds, 0.016 * per_inch)))
            continue
        bar(event.onset, seconds, middle, colour, 3)
        if inches > 0.42:
            red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
            dark = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 < 0.3
            ink = "white" if dark else _INK
            artist = write.artist(0, 0, f"{event.probability:.2f}", 8, ink, "center", bold=True)
            artist.set_position((event.onset + seconds / 2, middle))
            artist.set_transform(axes.transData)
            artist.set_zorder(4)
            axes.figure.add_artist(artist)
    for label, stretches in slivers.items():
        middle = len(rows) - rows.index(label) - 0.5
        axes.broken_barh(stretches, (middle - half, 2 * half), facecolor=colours[label], edgecolor="none", zorder=3)


def _draw_posteriors(
    axes: "Axes", boundaries: NDArray[np.floating], posteriors: NDArray[np.floating], colours: Sequence[str]
) -> None:
    """Draw (num_frames, num_rows) posteriors as one stepped curve per row and colour, each from 0 to 1 in its row."""
    # room below for half the width of a line at 0
    axes.set_ylim(-0.04, max(1, len(colours)))
    height = 0.84
    if len(posteriors) > 2 * _MAX_STEPS:
        # more frames than pixels: the highest of each group, so that no peak is lost
        starts = np.arange(0, len(posteriors), -(-len(posteriors) // _MAX_STEPS))
        posteriors = np.maximum.reduceat(posteriors, starts, axis=0)
        boundaries = np.append(boundaries[starts], boundaries[-1])
    corners = np.repeat(np.asarray(boundaries, dtype=np.float64), 2)[1:-1]
    for row, colour in enumerate(colours):
        base = len(colours) - 1 - row
        axes.axhline(base, color=_RULE, linewidth=0.7, zorder=1)
        if len(posteriors):
            curve = base + height * np.repeat(posteriors[:, row], 2)
            axes.fill_between(corners, base, curve, color=colour, alpha=0.22, linewidth=0, zorder=2)
            axes.plot(corners, curve, color=colour, linewidth=1.3, solid_joinstyle="round", zorder=3)


def _write_file(path: Path, figure: "Figure", kind: str) -> None:
    """Draw the figure and write it whole or not at all."""
    # no date in the file: the same picture is the same bytes
    metadata = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, dpi=_DPI, metadata=metadata)
    write_atomic(path, drawn.getvalue())
