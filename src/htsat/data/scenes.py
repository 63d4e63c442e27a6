"""Folders of mixed scenes: what ``htsat data mix`` makes of any corpus.

A folder of scenes holds

- ``audio/scene_00000.wav`` and so on;
- ``strong.tsv`` (filename, onset, offset, event_label), ``weak.tsv`` and ``durations.tsv``: a corpus with exact times,
  as ``open_corpus("strong", ...)`` reads it;
- ``sources.tsv``: the clip and the fold that each event was cut from, so that no fold leaks into another;
  ``backgrounds.tsv``: what lies behind each scene;
- ``mix.json``: how it was made. A folder goes on only with the same settings, and may grow;
- ``scenes.jsonl``: a line for each scene that is done, of which the tables are made in the end.

A scene depends on the corpus, the settings, the seed and its number alone, for any number of processes.
"""

import csv
import hashlib
import io
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import soundfile
from numpy.typing import NDArray

from htsat.config import to_dict
from htsat.data.clips import Clip, Corpus, clip_name, some
from htsat.data.mix import LazySource, MixConfig, SceneMixer, Source, labelled_part
from htsat.data.own import read_unlabelled
from htsat.data.reading import ClipReader
from htsat.data.shards import _end_with_parent
from htsat.errors import AudioError, DataError, OutputError, UsageError, nearest
from htsat.files import write_atomic

SETTINGS = "mix.json"
JOURNAL = "scenes.jsonl"
FORMAT = "htsat-scenes"
VERSION = 1
#: soundfile's names of the file formats; samples have 16 bits in both
FORMATS = {"wav": "WAV", "flac": "FLAC"}
#: scenes, and clips, that a process is handed at once
_CHUNK = 8
#: decoded clips that all processes together keep
_CACHE_BYTES = 1_000_000_000

S = TypeVar("S")
T = TypeVar("T")
#: told a line for people and the share done in [0, 1]
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class SceneSettings:
    """How a folder of scenes is made.

    Attributes:
        seconds: length of every scene.
        sample_rate: Hz.
        seed: of all scenes.
        format: of the files, ``wav`` or ``flac``.
        config: how sounds are drawn and placed.
    """

    seconds: float = 10.0
    sample_rate: int = 32_000
    seed: int = 0
    format: str = "wav"
    config: MixConfig = field(default_factory=lambda: MixConfig(background=1.0, whole_clip=0.0))


@dataclass(frozen=True)
class MadeScenes:
    """What ``make_scenes`` did.

    Attributes:
        folder: where the scenes lie.
        scenes: how many there are now.
        kept: how many of them were there before.
        events: how many events they have, by label.
        unreadable: a line for each clip that could not be used.
        ambiguous: clips that were left out, because they have several labels and no times.
    """

    folder: Path
    scenes: int
    kept: int
    events: dict[str, int]
    unreadable: tuple[str, ...]
    ambiguous: int


@dataclass(frozen=True)
class _Unit:
    """What one class has in one clip."""

    clip: Clip
    label: str
    name: str

    @property
    def fold(self) -> str:
        """Its folds, for tables."""
        return ",".join(map(str, sorted(self.clip.folds)))


@dataclass(frozen=True)
class _Plan:
    """Everything a process needs to make scenes."""

    units: tuple[_Unit, ...]
    backgrounds: tuple[Clip, ...]
    settings: SceneSettings
    folder: Path
    cache_bytes: int


def make_scenes(
    corpus: Corpus,
    out: Path,
    *,
    count: int,
    settings: SceneSettings | None = None,
    backgrounds: Path | None = None,
    labels: Sequence[str] | None = None,
    folds: Sequence[int] | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> MadeScenes:
    """Mix scenes of the clips of a corpus into a folder; go on if it holds some of the same settings.

    Args:
        corpus: clips with one label each, or with events.
        out: the folder, absent, empty, or of scenes.
        count: scenes that it shall hold, from number 0 on.
        settings: how they are made; None: the defaults.
        backgrounds: folder of recordings to lay behind; None: noise.
        labels: classes to use; None: all.
        folds: folds to take clips from; None: all.
        jobs: processes.
        progress: told what is done.

    Raises:
        UsageError: a label or fold that the corpus lacks, or settings that make no sense.
        DataError: nothing to mix, or scenes of other settings lie there.
        OutputError: something else lies there, or it cannot be written.
    """
    settings = settings or SceneSettings()
    told = progress or (lambda line, share: None)
    _check_settings(settings, count)
    units, ambiguous = _select(corpus, labels, folds)
    behind = read_unlabelled(backgrounds) if backgrounds else []
    identity = _identity(settings, units, behind)
    done, problems = _open_folder(out, identity, count)
    kept = len(done)
    if kept < count:
        units, behind, problems = _survey(units, behind, settings.sample_rate, jobs, told)
        if not units:
            raise DataError(f"{corpus.folder}: not one clip can be mixed: {some(problems)}")
        plan = _Plan(tuple(units), tuple(behind), settings, out, _CACHE_BYTES // max(1, jobs))
        todo = [index for index in range(count) if index not in done]
        for record in _each(partial(_make, plan), todo, jobs):
            _note(out, record)
            done[record["index"]] = record
            told(f"scene {len(done):,} of {count:,}", len(done) / count)
    records = [done[index] for index in range(count)]
    _write_tables(out, records, settings)
    write_atomic(out / JOURNAL, "".join(_line(record) for record in records))
    _write_settings(out, identity, problems)
    found = [event["event_label"] for record in records for event in record["events"]]
    counts = {label: found.count(label) for label in sorted(set(found))}
    return MadeScenes(out, count, kept, counts, tuple(problems), ambiguous)


# ------------------------------------------------------------------ what is mixed


def _check_settings(settings: SceneSettings, count: int) -> None:
    if settings.format not in FORMATS:
        hint = nearest(settings.format, FORMATS)
        raise UsageError(f"unknown format {settings.format!r}{hint}; known: {', '.join(FORMATS)}")
    if not 1 <= count <= 10_000_000:
        raise UsageError(f"expected 1 to 10,000,000 scenes, got {count}")
    if not 0.1 <= settings.seconds <= 600:
        raise UsageError(f"expected scenes of 0.1 to 600 s, got {settings.seconds:g}")
    if not 4000 <= settings.sample_rate <= 192_000:
        raise UsageError(f"expected a sample rate of 4000 to 192000 Hz, got {settings.sample_rate}")
    if settings.seed < 0:
        raise UsageError(f"expected a seed from 0 on, got {settings.seed}")


def _select(corpus: Corpus, labels: Sequence[str] | None, folds: Sequence[int] | None) -> tuple[list[_Unit], int]:
    """Return what each class has in each clip that may be used, and how many clips have several labels and no times."""
    for label in labels or ():
        if label not in corpus.labels:
            hint = nearest(label, corpus.labels)
            raise UsageError(f"{corpus.folder}: no class {label!r}{hint}; there are {some(corpus.labels)}")
    known = {fold for clip in corpus.clips for fold in clip.folds}
    for fold in folds or ():
        if fold not in known:
            there = ", ".join(map(str, sorted(known))) or "none"
            raise UsageError(f"{corpus.folder}: no clips of fold {fold}; folds there: {there}")
    wanted = set(corpus.labels if labels is None else labels)
    units, ambiguous = [], 0
    for clip in corpus.clips:
        if folds is not None and not (clip.folds and clip.folds <= set(folds)):
            continue
        if clip.events is None and len(clip.labels) > 1:
            ambiguous += bool(wanted & set(clip.labels))
            continue
        name = clip_name(clip, corpus.folder).replace("\\", "/").removeprefix("audio/")
        units += [_Unit(clip, label, name) for label in clip.labels if label in wanted]
    if not units:
        many = f"; {ambiguous} clips have several labels and no times" if ambiguous else ""
        raise DataError(
            f"{corpus.folder}: nothing to mix{many}; expected clips of one label, or with timed events, of the labels "
            "and folds asked for"
        )
    return units, ambiguous


def _identity(settings: SceneSettings, units: Sequence[_Unit], backgrounds: Sequence[Clip]) -> dict[str, Any]:
    """Return what two runs must share for their scenes to be the same."""
    lines = [
        f"{unit.name}\t{unit.label}\t{[(e.event_label, e.onset, e.offset) for e in unit.clip.events or ()]}"
        for unit in units
    ]
    return {
        **to_dict(settings),
        "clips": {"number": len(units), "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest()},
        "backgrounds": [clip.path.name for clip in backgrounds],
    }


def _survey(
    units: Sequence[_Unit], backgrounds: Sequence[Clip], sample_rate: int, jobs: int, told: Progress
) -> tuple[list[_Unit], list[Clip], list[str]]:
    """Read everything once: return the units and backgrounds that can be used, and what is wrong with the others."""
    tasks = [*units, *(_Unit(clip, "", clip.path.name) for clip in backgrounds)]
    problems: dict[int, str] = {}
    usable: list[int] = []
    for done, (number, problem) in enumerate(_each(partial(_look, sample_rate), list(enumerate(tasks)), jobs), 1):
        told(f"reading {tasks[number].name}", done / len(tasks))
        if problem is None:
            usable.append(number)
        elif problem:
            problems[number] = problem
    usable.sort()
    kept = [tasks[i] for i in usable if i < len(units)]
    behind = [tasks[i].clip for i in usable if i >= len(units)]
    return kept, behind, list(dict.fromkeys(problems[i] for i in sorted(problems)))


def _look(sample_rate: int, task: tuple[int, _Unit]) -> tuple[int, str | None]:
    """Return the number of a unit and what is wrong with it: None if nothing, empty if it sounds with others only."""
    number, unit = task
    try:
        waveform = ClipReader(sample_rate).read(unit.clip)
    except (AudioError, DataError) as error:
        return number, str(error)
    if not waveform.any():
        return number, f"{clip_name(unit.clip)}: is silent; leave it out or record it again"
    if unit.label and labelled_part(unit.label, waveform, sample_rate, unit.clip.events) is None:
        return number, ""
    return number, None


# ------------------------------------------------------------------ making


@dataclass(frozen=True)
class _Backgrounds(Sequence[NDArray[np.float32]]):
    """Recordings that are read when one is needed."""

    clips: tuple[Clip, ...]
    reader: ClipReader

    def __len__(self) -> int:
        return len(self.clips)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.float32]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[NDArray[np.float32]]: ...
    def __getitem__(self, index: int | slice) -> NDArray[np.float32] | Sequence[NDArray[np.float32]]:
        if isinstance(index, slice):
            return _Backgrounds(self.clips[index], self.reader)
        return self.reader.read(self.clips[index])


def _load(unit: _Unit, reader: ClipReader) -> Source:
    waveform = reader.read(unit.clip)
    source = labelled_part(unit.label, waveform, reader.sample_rate, unit.clip.events, unit.name)
    if source is None:
        raise AudioError(f"{clip_name(unit.clip)}: has changed while scenes were made of it; start again")
    return source


@lru_cache(maxsize=1)
def _mixer(plan: _Plan) -> SceneMixer:
    """Return the mixer of a plan, with the clips that it has read."""
    reader = ClipReader(plan.settings.sample_rate, cache_bytes=plan.cache_bytes)
    return SceneMixer(
        [LazySource(unit.label, partial(_load, unit, reader)) for unit in plan.units],
        _Backgrounds(plan.backgrounds, reader),
        sample_rate=plan.settings.sample_rate,
        seconds=plan.settings.seconds,
        seed=plan.settings.seed,
        config=plan.settings.config,
    )


def _make(plan: _Plan, index: int) -> dict[str, Any]:
    """Write the recording of a scene; return what is in it."""
    settings = plan.settings
    scene = _mixer(plan).mix(index)
    filename = f"scene_{index:05d}.{settings.format}"
    file = io.BytesIO()
    samples = np.round(np.clip(scene.waveform * 32767, -32768, 32767)).astype(np.int16)
    soundfile.write(file, samples, settings.sample_rate, format=FORMATS[settings.format], subtype="PCM_16")
    write_atomic(plan.folder / "audio" / filename, file.getvalue())
    if scene.background is None:
        background = ""
    else:
        background = plan.backgrounds[scene.background].path.name if scene.background >= 0 else "noise"
    folds = {unit.name: unit.fold for unit in plan.units}
    events = [
        {
            "onset": placed.event.onset,
            "offset": placed.event.offset,
            "event_label": placed.event.event_label,
            "source_clip": placed.source,
            "fold": folds[placed.source],
            "src_onset": placed.source_onset,
            "src_offset": placed.source_offset,
            "snr_db": placed.snr_db,
        }
        for placed in scene.placed
    ]
    return {"index": index, "filename": filename, "background": background, "events": events}


def _each(do: Callable[[S], T], items: Sequence[S], jobs: int) -> Iterator[T]:
    """Do something with every item, here or in processes; yield the results as they come."""
    if jobs <= 1 or len(items) <= _CHUNK:
        yield from map(do, items)
        return
    # Not forked: this process may hold threads, whose locks a fork would copy in whatever state they are.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as pool:
        running: set[Future[list[T]]] = set()
        waiting = [items[first : first + _CHUNK] for first in range(0, len(items), _CHUNK)][::-1]
        try:
            while waiting or running:
                # A few wait for the processes: no more, so that a stop does not last.
                while waiting and len(running) < 2 * jobs:
                    running.add(pool.submit(_all, do, waiting.pop()))
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield from future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that mixes scenes was killed, for want of memory or by a recording; what is done is kept, "
                "go on with fewer processes (--jobs 1)"
            ) from error
        finally:
            for future in running:
                future.cancel()


def _all(do: Callable[[S], T], items: Sequence[S]) -> list[T]:
    return [do(item) for item in items]


# ------------------------------------------------------------------ the folder


def _open_folder(out: Path, identity: dict[str, Any], count: int) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Return the scenes that are done, by number, and what was wrong with clips when they were; prepare a new folder.

    Raises:
        DataError: scenes of other settings, or more of them, lie there.
        OutputError: something else lies there, or nothing can be written.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: this is a file; give the name of a folder for the scenes")
    there = [path for path in out.iterdir() if not path.name.startswith(".htsat-")] if out.is_dir() else []
    if not there:
        try:
            (out / "audio").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{out}: cannot be made ({error.strerror or error}); choose another folder") from error
        _write_settings(out, identity, [])
        return {}, []
    try:
        before = json.loads((out / SETTINGS).read_bytes())
        problems = [str(line) for line in before["unreadable"]] if before["format"] == FORMAT else None
        settings = before["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        problems = None
    if problems is None:
        raise OutputError(f"{out}: is not empty and holds no mixed scenes; choose another folder or empty it")
    if before["version"] != VERSION:
        raise DataError(f"{out}: made by another version of htsat; choose another folder")
    _compare(out, settings, identity, "")
    (out / "audio").mkdir(exist_ok=True)
    done = {
        index: record for index, record in _records(out / JOURNAL) if (out / "audio" / record["filename"]).is_file()
    }
    if done and max(done) >= count:
        raise DataError(f"{out}: holds {len(done):,} scenes, more than the {count:,} asked for; choose another folder")
    return done, problems


def _compare(out: Path, before: dict[str, Any], now: dict[str, Any], prefix: str) -> None:
    """Refuse to go on with other settings."""
    for key in now:
        old, new = before.get(key), now[key]
        if old == new:
            continue
        if key == "clips":
            raise DataError(f"{out}: holds scenes of other clips, folds, labels or times; choose another folder")
        if isinstance(old, dict) and isinstance(new, dict):
            _compare(out, old, new, f"{key}.")
        raise DataError(
            f"{out}: holds scenes of other settings ({prefix}{key} was {old}, is {new}); choose another folder"
        )


def _records(journal: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and record of each scene that is noted; a line that was being written may be broken."""
    if not journal.is_file():
        return
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            yield int(record["index"]), record
        except (ValueError, KeyError, TypeError):
            continue


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _note(out: Path, record: dict[str, Any]) -> None:
    """Note a scene that is done."""
    try:
        with (out / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(_line(record))
    except OSError as error:
        raise OutputError(f"{out / JOURNAL}: cannot be written ({error.strerror or error}); free some space") from error


def _write_settings(out: Path, identity: dict[str, Any], problems: Sequence[str]) -> None:
    values = {"format": FORMAT, "version": VERSION, "settings": identity, "unreadable": list(problems)}
    write_atomic(out / SETTINGS, json.dumps(values, indent=1) + "\n")


def _write_tables(out: Path, records: Sequence[dict[str, Any]], settings: SceneSettings) -> None:
    """Write the tables of all scenes."""
    duration = _number(round(settings.seconds * settings.sample_rate) / settings.sample_rate)
    strong, weak, sources = [], [], []
    for record in records:
        name, events = record["filename"], record["events"]
        times = [(_number(event["onset"]), _number(event["offset"]), event["event_label"]) for event in events]
        # Neither label nor times: a scene without events.
        strong += [(name, *row) for row in times] or [(name, "", "", "")]
        weak.append((name, ",".join(sorted({event["event_label"] for event in events}))))
        for row, event in zip(times, events, strict=True):
            origin = (_number(event["src_onset"]), _number(event["src_offset"]), _number(event["snr_db"]))
            sources.append((name, *row, event["source_clip"], *origin, event["fold"]))
    _write(out / "strong.tsv", ("filename", "onset", "offset", "event_label"), strong)
    _write(out / "weak.tsv", ("filename", "event_labels"), weak)
    _write(out / "durations.tsv", ("filename", "duration"), [(record["filename"], duration) for record in records])
    _write(out / "backgrounds.tsv", ("filename", "background"), [(r["filename"], r["background"]) for r in records])
    columns = ("filename", "onset", "offset", "event_label", "source_clip", "src_onset", "src_offset", "snr_db", "fold")
    _write(out / "sources.tsv", columns, sources)


def _write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows([columns, *rows])
    write_atomic(path, text.getvalue())


def _number(value: float) -> str:
    """Return a number to the microsecond, finer than any sample."""
    return f"{value:.6f}".rstrip("0").rstrip(".")
