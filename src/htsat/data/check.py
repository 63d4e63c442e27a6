"""What is in a corpus, and what is wrong with it, found by looking at every recording.

The readers of ``htsat.data.corpora`` check tables and names; this looks at the sound: what cannot be read, is silent or
clipped, occurs twice, stands on both sides of a split, or does not fit its labels. Nothing is changed.
"""

import hashlib
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from htsat.audio.decode import AudioReader, open_audio
from htsat.data.clips import clip_name, part_order, some
from htsat.data.corpora import ROUNDING, Clip, Corpus, balance, leaks, part_of
from htsat.data.reading import HDF5_SAMPLE_RATE, SHARD_SUFFIX, ClipReader, open_hdf5, open_index
from htsat.errors import DataError, HtsatError, nearest

#: told how many clips have been looked at, and how many there are
OnClips = Callable[[int, int], None]

FindingKind = Literal["unreadable", "label", "class", "event", "duplicate", "leak", "silent", "clipped", "corpus"]

#: a clip whose peak lies below this (-80 dB of full scale) is called silent
SILENCE = 1e-4
#: samples at or beyond full scale from which on a clip is called clipped; a lone peak may just touch it
CLIPPED_SAMPLES = 10
_FULL_SCALE = 0.9999
#: seconds that encoders and editors take from a recording's end; events beyond are a warning, farther out a problem
_TRIMMED = 0.15
#: the readers of these guess from names which clips belong together, and warn of it themselves
_GUESSED_GROUPS = ("folder", "csv", "strong", "desed")
#: clips handed to a process at once
_CHUNK = 16


@dataclass(frozen=True)
class Finding:
    """Something about one or several clips that a person should look at.

    Attributes:
        kind: what it is about.
        message: one line.
        files: the clips, as names relative to the corpus' folder; with ``row`` and number in packed files.
    """

    kind: FindingKind
    message: str
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Durations:
    """Lengths of the clips that could be read.

    Attributes:
        shortest: seconds.
        median: seconds.
        longest: seconds.
        total_hours: hours.
    """

    shortest: float
    median: float
    longest: float
    total_hours: float


@dataclass(frozen=True)
class CheckReport:
    """What ``check_corpus`` found.

    Attributes:
        name: of the corpus, as ``open_corpus`` calls it.
        folder: where it lies.
        objective: see ``Corpus``.
        decoded: whether the sound itself was looked at, or headers alone.
        num_clips: of the corpus.
        parts: clips in each split or fold.
        classes: by label, clips in each split or fold.
        durations: None if no clip could be read.
        sample_rates: clips at each rate in Hz.
        channels: clips with each number of channels.
        balance: clips of the largest class over clips of the smallest that has any; None without labels.
        problems: what makes training or scores wrong.
        warnings: what a person may accept.
    """

    name: str
    folder: Path
    objective: str
    decoded: bool
    num_clips: int
    parts: dict[str, int]
    classes: dict[str, dict[str, int]]
    durations: Durations | None
    sample_rates: dict[int, int]
    channels: dict[int, int]
    balance: float | None
    problems: tuple[Finding, ...]
    warnings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON knows."""

        def plain(findings: Iterable[Finding]) -> list[dict[str, Any]]:
            return [{"kind": f.kind, "message": f.message, "files": list(f.files)} for f in findings]

        return {
            "corpus": self.name,
            "folder": str(self.folder),
            "objective": self.objective,
            "decoded": self.decoded,
            "clips": self.num_clips,
            "parts": self.parts,
            "classes": self.classes,
            "durations": vars(self.durations) if self.durations else None,
            "sample_rates": {str(rate): count for rate, count in self.sample_rates.items()},
            "channels": {str(number): count for number, count in self.channels.items()},
            "balance": self.balance,
            "problems": plain(self.problems),
            "warnings": plain(self.warnings),
        }


@dataclass(frozen=True)
class _Facts:
    """What one recording says of itself; ``error`` alone if it cannot be read, None where only decoding tells."""

    duration: float | None = None
    sample_rate: int = 0
    channels: int = 0
    peak: float | None = None
    clipped: int = 0
    digest: bytes = b""
    error: str = ""


def check_corpus(corpus: Corpus, *, decode: bool = True, jobs: int = 1, on_clips: OnClips | None = None) -> CheckReport:
    """Look at every clip of a corpus and say what is there and what is wrong.

    Args:
        corpus: as ``open_corpus`` returns it.
        decode: decode every recording; otherwise headers alone are read, and damage behind them, silence, clipping and
            duplicates stay unknown.
        jobs: processes that read.
        on_clips: told of progress.

    Raises:
        DataError: a process that reads was killed.
    """
    facts: list[_Facts] = []
    for fact in _look(corpus.clips, decode, jobs):
        facts.append(fact)
        if on_clips is not None:
            on_clips(len(facts), len(corpus.clips))
    read = [fact for fact in facts if not fact.error]
    problems, warnings = _Findings(corpus, facts).all()
    seconds = [fact.duration for fact in read if fact.duration is not None]
    parts = Counter(part_of(clip) for clip in corpus.clips)
    classes = balance(corpus)
    sizes = [total for by_part in classes.values() if (total := sum(by_part.values()))]
    return CheckReport(
        name=corpus.name,
        folder=corpus.folder,
        objective=corpus.objective,
        decoded=decode,
        num_clips=len(corpus.clips),
        parts={part: parts[part] for part in sorted(parts, key=part_order)},
        classes=classes,
        durations=Durations(min(seconds), median(seconds), max(seconds), sum(seconds) / 3600) if seconds else None,
        sample_rates=dict(sorted(Counter(fact.sample_rate for fact in read).items())),
        channels=dict(sorted(Counter(fact.channels for fact in read).items())),
        balance=max(sizes) / min(sizes) if sizes else None,
        problems=tuple(problems),
        warnings=tuple(warnings),
    )


# ---------------------------------------------------------------- reading


def _look(clips: Sequence[Clip], decode: bool, jobs: int) -> Iterator[_Facts]:
    """Yield the facts of every clip, in order."""
    # Labels and events need not travel to the processes.
    bare = (Clip(clip.path, (), index=clip.index) for clip in clips)
    if jobs <= 1 or len(clips) <= _CHUNK:
        yield from map(partial(_facts, decode=decode), bare)
        return
    # Not forked: this process may hold threads, whose locks a fork would copy in whatever state they are.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            yield from pool.map(partial(_facts, decode=decode), bare, chunksize=_CHUNK)
        except BrokenProcessPool as error:
            raise DataError(
                "a process that reads recordings was killed, for want of memory or by a recording; "
                "try with one process (--jobs 1)"
            ) from error


def _facts(clip: Clip, decode: bool) -> _Facts:
    try:
        with _open(clip) as reader:
            if not decode:
                return _Facts(reader.duration, reader.sample_rate, reader.num_channels)
            peak, clipped, samples = 0.0, 0, 0
            digest = hashlib.blake2b(str(reader.sample_rate).encode(), digest_size=16)
            for block in reader.blocks():
                level = np.abs(block)
                peak = max(peak, float(level.max()))
                clipped += int(np.count_nonzero(level >= _FULL_SCALE))
                samples += len(block)
                digest.update(np.ascontiguousarray(block).data)
            seconds = samples / reader.sample_rate
            return _Facts(seconds, reader.sample_rate, reader.num_channels, peak, clipped, digest.digest())
    except HtsatError as error:
        return _Facts(error=str(error))


def _open(clip: Clip) -> AudioReader:
    """Open a clip at the rate it was recorded at, wherever it lies."""
    if clip.index is None:
        return open_audio(clip.path)
    if clip.path.suffix == SHARD_SUFFIX:
        return open_audio(open_index(clip.path.parent).read(clip.path, clip.index), f"{clip.path} row {clip.index}")
    reader = _hdf5_reader(clip.path)
    return open_audio((reader.read(clip), reader.sample_rate), f"{clip.path} row {clip.index}")


@lru_cache(maxsize=64)
def _hdf5_reader(path: Path) -> ClipReader:
    """Return a reader at the rate of an HDF5 file, so that nothing is resampled."""
    with open_hdf5(path) as file:
        return ClipReader(int(file.attrs.get("sample_rate", HDF5_SAMPLE_RATE)))


# ---------------------------------------------------------------- judging


class _Findings:
    """Judges the clips of a corpus by their facts."""

    def __init__(self, corpus: Corpus, facts: Sequence[_Facts]) -> None:
        self.corpus = corpus
        self.pairs = list(zip(corpus.clips, facts, strict=True))
        self.problems: list[Finding] = []
        self.warnings: list[Finding] = []

    def all(self) -> tuple[list[Finding], list[Finding]]:
        """Return problems and warnings, by kind, in the order of the clips."""
        self._recordings()
        self._labels()
        self._classes()
        self._events()
        self._duplicates()
        self._leaks()
        # What the corpus' reader said already, unless it was found again.
        known = {finding.message for finding in (*self.problems, *self.warnings)}
        told = [Finding("corpus", text) for text in self.corpus.warnings if text not in known]
        return self.problems, told + self.warnings

    def _note(self, into: list[Finding], kind: FindingKind, what: str, *clips: Clip) -> None:
        names = tuple(clip_name(clip, self.corpus.folder) for clip in clips)
        into.append(Finding(kind, f"{names[0]}: {what}" if len(names) == 1 else what, names))

    def _recordings(self) -> None:
        for clip, fact in self.pairs:
            if fact.error:
                # The reader's message begins with the whole path.
                what = fact.error.removeprefix(f"{clip.path}: ").removeprefix(f"{clip.path} row {clip.index}: ")
                self._note(self.problems, "unreadable", what, clip)
        for clip, fact in self.pairs:
            if fact.peak is not None and fact.peak < SILENCE:
                level = f"peak {20 * np.log10(fact.peak):.0f} dB" if fact.peak else "digital silence"
                self._note(self.warnings, "silent", level, clip)
        for clip, fact in self.pairs:
            if fact.clipped >= CLIPPED_SAMPLES:
                what = f"{fact.clipped:,} samples at or beyond full scale, peak {fact.peak:.3f}"
                self._note(self.warnings, "clipped", what, clip)

    def _labels(self) -> None:
        known = set(self.corpus.labels)
        for clip, _ in self.pairs:
            for label in dict.fromkeys(clip.labels):
                if label not in known:
                    what = f"label {label!r} is none of the {len(known)} classes{nearest(label, known)}"
                    self._note(self.problems, "label", what, clip)
            if self.corpus.objective == "single_label" and len(clip.labels) != 1:
                what = f"has {len(clip.labels)} labels ({', '.join(clip.labels)}); expected exactly one"
                self._note(self.problems, "label", what, clip)

    def _classes(self) -> None:
        """A class without clips cannot be learnt; one without clips in a split cannot be measured there."""
        clips, labels = self.corpus.clips, self.corpus.labels
        counts = Counter((part_of(clip), label) for clip in clips for label in clip.labels)
        anywhere = {label for _, label in counts}
        # Whoever holds a part of AudioSet knows that it is one.
        grave = self.warnings if self.corpus.name == "audioset" else self.problems
        if absent := [label for label in labels if label not in anywhere]:
            grave.append(Finding("class", f"{len(absent)} of {len(labels)} classes have no clips: {some(absent)}"))
        if any(len(clip.folds) > 1 for clip in clips if clip.split is None):
            return  # mixtures of several folds: their folds divide nothing
        for part in sorted({part for part, _ in counts} - {"all"}, key=part_order):
            lacking = [label for label in labels if label in anywhere and not counts[part, label]]
            if lacking:
                where = "to train on" if part == "train" else f"in {part}"
                text = f"{len(lacking)} classes have no clips {where}: {some(lacking)}"
                (grave if part == "train" else self.warnings).append(Finding("class", text))

    def _events(self) -> None:
        for clip, fact in self.pairs:
            for event in clip.events or ():
                over = event.offset - (np.inf if fact.duration is None else fact.duration)
                if over > ROUNDING:
                    what = (
                        f"{event.event_label} ends at {event.offset:g} s, but the recording lasts {fact.duration:g} s"
                    )
                    self._note(self.warnings if over <= _TRIMMED else self.problems, "event", what, clip)
                if event.event_label not in clip.labels:
                    self._note(self.problems, "event", f"{event.event_label} has times, but is no label of it", clip)

    def _duplicates(self) -> None:
        """The same samples at the same rate, whatever file they lie in; silences are all alike and left out."""
        listed_clips: dict[tuple[Path, int | None], list[Clip]] = defaultdict(list)
        same: dict[bytes, list[Clip]] = defaultdict(list)
        for clip, fact in self.pairs:
            listed_clips[clip.path, clip.index].append(clip)
            if fact.digest and fact.peak is not None and fact.peak >= SILENCE:
                same[fact.digest].append(clip)
        for clips in listed_clips.values():
            if len(clips) > 1:
                self._note(self.problems, "duplicate", f"is listed {len(clips)} times", clips[0])
        for clips in same.values():
            distinct = list({(clip.path, clip.index): clip for clip in clips}.values())
            if len(distinct) < 2:
                continue
            names = some([clip_name(clip, self.corpus.folder) for clip in distinct])
            parts = {part_of(clip) for clip in distinct if clip.split is not None or len(clip.folds) == 1}
            labels = {tuple(sorted(clip.labels)) for clip in distinct if clip.labels}
            if len(parts) > 1:
                where = " and ".join(sorted(parts, key=part_order))
                self._note(self.problems, "duplicate", f"{where} hold the same sound: {names}", *distinct)
            if len(labels) > 1:
                which = " and ".join(sorted(", ".join(found) for found in labels))
                self._note(self.problems, "duplicate", f"the same sound is labelled {which}: {names}", *distinct)
            if len(parts) < 2 and len(labels) < 2:
                self._note(self.warnings, "duplicate", f"the same sound: {names}", *distinct)

    def _leaks(self) -> None:
        if self.corpus.name in _GUESSED_GROUPS:
            return
        for leak in leaks(self.corpus):
            names = some([clip_name(clip, self.corpus.folder) for clip in leak.clips])
            what = f"{' and '.join(leak.parts)} share the source or speaker {leak.group}: {names}"
            self._note(self.problems, "leak", what, *leak.clips)
