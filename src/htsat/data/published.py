"""Published corpora in their official layouts: ESC-50, Speech Commands V2 and its like, DESED, AudioSet."""

import csv
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from htsat.data.clips import Checker, Clip, Corpus, columns_of, is_recording, some, split_named
from htsat.data.own import folders_in
from htsat.errors import AudioError, DataError, nearest
from htsat.events import Event
from htsat.labels import audioset_mids, label_set

# ------------------------------------------------------------------ ESC-50, ESC-10

_ESC_TABLES = ("meta/esc50.csv", "meta/esc10.csv")
#: a table of ESC-50's columns beside ``audio/``, as some copies of a part of it have
_ESC_LOOSE = "metadata.csv"
_ESC_COLUMNS = ("filename", "fold", "target", "category", "src_file")


def read_esc(folder: Path) -> list[Clip]:
    """Read ESC-50 or ESC-10: ``audio/`` and ``meta/esc50.csv``, ``meta/esc10.csv`` or ``metadata.csv``.

    ``meta/segments.tsv`` (filename, onset, offset), if there, gives the active parts of each clip.

    Raises:
        DataError: with every problem of the corpus.
    """
    table = next((name for name in _ESC_TABLES if (folder / name).is_file()), None) or esc_table(folder, ten=False)
    if table is None:
        raise DataError(f"{folder}: not an ESC data set: neither {_ESC_TABLES[0]} nor {_ESC_TABLES[1]} is there")
    checker = Checker(folder)
    rows = checker.rows(table, ("filename", "fold", "category"))
    return checker.checked(_esc_clips(checker, table, rows))


def _esc_clips(checker: Checker, table: str, rows: list[tuple[str, dict[str, str]]]) -> list[Clip]:
    """Return the clips of a table, with their active parts, and their source if the table tells it."""
    found: dict[str, Clip] = {}
    for where, row in rows:
        name = row["filename"]
        fold = checker.integer(where, "fold", row["fold"])
        if name in found:
            checker.problems.append(f"{where}: {name} occurs twice")
        elif not row["category"]:
            checker.problems.append(f"{where}: {name} has no category")
        else:
            path = checker.folder / "audio" / name
            found[name] = Clip(path, (row["category"],), folds=frozenset((fold,)), group=row.get("src_file") or None)
    segments = "meta/segments.tsv"
    if not (checker.folder / segments).is_file():
        return list(found.values())
    parts: dict[str, list[Event]] = defaultdict(list)
    before = len(checker.problems)
    for where, row in checker.rows(segments, ("filename", "onset", "offset")):
        name = row["filename"]
        if name not in found:
            checker.unknown(where, name, table, found)
        elif event := checker.event(where, found[name].labels[0], row["onset"], row["offset"]):
            parts[name].append(event)
    idle = [name for name in found if name not in parts]
    if idle and len(checker.problems) == before:
        checker.problems.append(f"{segments}: no active part of {some(idle)}")
    return [
        Clip(clip.path, clip.labels, tuple(parts[name]) if name in parts else None, clip.folds, group=clip.group)
        for name, clip in found.items()
    ]


def esc_table(folder: Path, *, ten: bool) -> str | None:
    """Return which table of a folder lists ESC-50, or ESC-10 if ``ten``; None if there is none."""
    tables = (_ESC_TABLES[1], _ESC_TABLES[0]) if ten else (_ESC_TABLES[0],)
    if found := next((name for name in tables if (folder / name).is_file()), None):
        return found
    return _ESC_LOOSE if {*_ESC_COLUMNS} <= {*columns_of(folder / _ESC_LOOSE)} else None


def open_esc(folder: Path, labels: Sequence[str] | None, allow_empty: bool, *, ten: bool) -> Corpus:
    """Read ESC-50, or the clips of ESC-10 alone; classes in the order of their ``target``.

    Clips of one recording of Freesound (``src_file``) belong into one fold.
    """
    checker = Checker(folder)
    table = esc_table(folder, ten=ten) or _ESC_TABLES[0]
    select = ten and table != _ESC_TABLES[1]
    rows = checker.rows(table, (*_ESC_COLUMNS, "esc10") if select else _ESC_COLUMNS)
    pairs: list[tuple[str, str, int]] = []
    chosen = set()
    for where, row in rows:
        if re.fullmatch(r"\d{1,9}", row["target"]):
            pairs.append((where, row["category"], int(row["target"])))
        else:
            checker.problems.append(f"{where}: expected a whole number from 0 on as target, got {row['target']!r}")
        if not select or row["esc10"].lower() in ("true", "1"):
            chosen.add(folder / "audio" / row["filename"])
    # What most lines say is right: one wrong line is one problem.
    common = Counter((category, target) for _, category, target in pairs).most_common()
    targets = dict(reversed([pair for pair, _ in common]))
    categories = {target: category for (category, target), _ in reversed(common)}
    for where, category, target in pairs:
        others = [f"{category} is {targets[category]}"] if targets[category] != target else []
        others += [f"{target} is {categories[target]}"] if categories[target] != category else []
        if others:
            words = f"target {target} and category {category} disagree with other lines, where {' and '.join(others)}"
            checker.problems.append(f"{where}: {words}")
    if rows and not chosen and not checker.problems:
        checker.problems.append(f"{table}: no clip has esc10 True; is it ESC-50?")
    # With the active parts read for all, before the ten classes are chosen: the table of parts has all.
    clips = [clip for clip in _esc_clips(checker, table, rows) if clip.path in chosen]
    checker.leaks(clips, "the source", certain=True)
    found = sorted(
        {label for clip in clips for label in clip.labels}, key=lambda label: (targets.get(label, -1), label)
    )
    return checker.corpus(
        "esc10" if ten else "esc50", "single_label", clips,
        found=found, labels=labels, allow_empty=allow_empty,
    )  # fmt: skip


# ------------------------------------------------------------------ keywords

#: Speech Commands' lists, and where it keeps noises; ``read_unlabelled`` reads those
_LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
BACKGROUND_NOISE = "_background_noise_"


def read_keywords(folder: Path, split: str) -> list[Clip]:
    """Read spoken keywords: ``audio/`` and ``metadata.csv`` (filename, keyword, split).

    Raises:
        DataError: with every problem of the split, or if there is no such split.
    """
    checker = Checker(folder)
    rows = checker.rows("metadata.csv", ("filename", "keyword", "split"))
    splits = {row["split"] for _, row in rows}
    if split not in splits and not checker.problems:
        known = f"; found {', '.join(sorted(splits))}{nearest(split, splits)}" if splits else ""
        raise DataError(f"{folder}: metadata.csv has no recording with split {split!r}{known}")
    return checker.checked(_keyword_clips(checker, [(where, row) for where, row in rows if row["split"] == split]))


def _keyword_clips(checker: Checker, rows: list[tuple[str, dict[str, str]]]) -> list[Clip]:
    """Return the clips of a table of keywords; their split if it has a name that is known."""
    clips: dict[str, Clip] = {}
    for where, row in rows:
        name = row["filename"]
        if name in clips:
            checker.problems.append(f"{where}: {name} occurs twice")
        elif not row["keyword"]:
            checker.problems.append(f"{where}: {name} has no keyword")
        split, speaker = split_named(row["split"]), row.get("speaker") or None
        clips[name] = Clip(checker.folder / "audio" / name, (row["keyword"],), split=split, group=speaker)
    return list(clips.values())


def open_keywords(folder: Path, labels: Sequence[str] | None, allow_empty: bool) -> Corpus:
    """Read spoken keywords: ``audio/`` and ``metadata.csv`` (filename, keyword, speaker, split); classes sorted.

    No speaker may stand in two splits.
    """
    checker = Checker(folder)
    rows = checker.rows("metadata.csv", ("filename", "keyword", "speaker", "split"))
    for where, row in rows:
        checker.split(where, row["split"])
    clips = _keyword_clips(checker, rows)
    checker.leaks(clips, "the speaker", certain=True)
    found = sorted({clip.labels[0] for clip in clips} - {""})
    return checker.corpus("keywords", "single_label", clips, found=found, labels=labels, allow_empty=allow_empty)


def open_speech_commands(folder: Path, labels: Sequence[str] | None, allow_empty: bool) -> Corpus:
    """Read Speech Commands V2: a folder per word, ``validation_list.txt`` and ``testing_list.txt``.

    What neither list has is for training. The 35 words are sorted; ``labels`` gives others, in another order. The
    group of a clip is its speaker, the name before ``_nohash_``; the official lists part speakers.
    """
    checker = Checker(folder)
    split_of: dict[str, str] = {}
    for split, table in _LISTS.items():
        for where, name in _lines(checker, table):
            if name in split_of:
                checker.problems.append(f"{where}: {name} is listed twice, for {split_of[name]} and {split}")
            split_of[name] = split
    clips: dict[str, Clip] = {}
    odd = []
    words = folders_in(folder)
    for word in words:
        for path in sorted(path for path in word.iterdir() if is_recording(path)):
            name = f"{word.name}/{path.name}"
            speaker = re.fullmatch(r"(.+)_nohash_\d+", path.stem)
            if speaker is None:
                odd.append(name)
            clips[name] = Clip(
                path, (word.name,), split=split_of.get(name, "train"), group=speaker[1] if speaker else None
            )
    if odd:
        checker.problems.append(f"{len(odd)} names have no speaker, as in yes/0a7c2a8d_nohash_0.wav: {some(odd)}")
    if absent := [name for name in split_of if name not in clips]:
        checker.problems.append(f"{len(absent)} of {len(split_of)} listed recordings are missing: {some(absent)}")
    # A word of the label set without any recording is told as an empty class.
    expected = label_set("speech_commands_v2") if labels is None else labels
    if foreign := [
        word.name for word in words if word.name not in expected and not any(map(is_recording, word.iterdir()))
    ]:
        checker.warnings.append(f"folders without recordings: {some(foreign)}")
    checker.leaks(list(clips.values()), "the speaker", certain=True)
    return checker.corpus(
        "speech_commands", "single_label", list(clips.values()), found=expected, labels=labels, allow_empty=allow_empty,
        stray="; give the words of another version as labels",
    )  # fmt: skip


def _lines(checker: Checker, table: str) -> list[tuple[str, str]]:
    """Return the lines of a list of names, each with the words for its place."""
    try:
        text = (checker.folder / table).read_text(encoding="utf-8")
    except OSError as error:
        checker.problems.append(f"{table}: cannot be read: {error.strerror or error}")
        return []
    except UnicodeDecodeError:
        checker.problems.append(f"{table}: is no UTF-8 text; expected a name on each line")
        return []
    lines = [(f"{table} line {number}", line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    return [(where, line) for where, line in lines if line]


# ------------------------------------------------------------------ DESED


@dataclass(frozen=True)
class _Part:
    """A part of DESED.

    Attributes:
        name: what ``parts`` of ``open_corpus`` calls it.
        split: which split it is.
        tables: patterns of its tables, all of which are read; the first pattern that matches counts.
        audio: folders that may hold its recordings, the full sample rate first; ``*`` is the folder of the table.
        complete: published whole, so that an absent recording is a problem; others came from a video site one by
            one, and every copy lacks some.
        timed: has events, else labels alone.
    """

    name: str
    split: str
    tables: tuple[str, ...]
    audio: tuple[str, ...]
    complete: bool
    timed: bool = True


#: Source: DESED's README (DCASE 2019 to 2021) and the recipes of DCASE's DESED_task (2021 to 2024)
_DESED_PARTS = (
    _Part("weak", "train", ("train/weak.tsv",), ("train/weak", "train/weak_16k"), complete=False, timed=False),
    _Part(
        "synthetic", "train",
        ("train/syn*/soundscapes.tsv", "train/synthetic*.tsv", "train/soundscapes.tsv"),
        ("train/*/soundscapes", "train/*/soundscapes_16k", "train/*", "train/soundscapes", "train/synthetic"),
        complete=True,
    ),
    _Part(
        "strong", "train", ("train/audioset_strong.tsv",),
        ("train/strong_label_real", "train/strong_label_real_16k"), complete=False,
    ),
    _Part(
        "validation", "validation", ("validation/validation.tsv", "validation/validation_old.tsv", "validation.tsv"),
        ("validation/validation", "validation/validation_16k", "validation"), complete=False,
    ),
    _Part(
        "synthetic_validation", "validation", ("validation/syn*/soundscapes.tsv",),
        ("validation/*/soundscapes", "validation/*/soundscapes_16k"), complete=True,
    ),
    _Part("public", "test", ("eval/public.tsv",), ("eval/public", "eval/public_16k"), complete=True),
)  # fmt: skip
DESED_PARTS = tuple(part.name for part in _DESED_PARTS)
#: seconds that an annotation may end after its recording: the published durations are cut to 0.1 s, and the
#: annotation of one clip ends 0.115 s after it
_DESED_SLACK = 0.15


def desed_root(folder: Path) -> Path | None:
    """Return where ``metadata`` lies: the folder, or its ``dataset`` as the archives unpack; None if nowhere."""
    patterns = [pattern for part in _DESED_PARTS for pattern in part.tables]
    for root in (folder, folder / "dataset"):
        if any(next((root / "metadata").glob(pattern), None) for pattern in patterns):
            return root
    return None


def open_desed(folder: Path, labels: Sequence[str] | None, allow_empty: bool, parts: Sequence[str] | None) -> Corpus:
    """Read DESED: ``metadata/`` and ``audio/`` as DCASE lays them out, or those below ``dataset/``.

    Weak labels, synthetic soundscapes and strong labels are for training (labels without events, and events),
    validation and synthetic validation for validation, the public evaluation for testing. Parts that are absent
    are told in the warnings. The group of a recorded clip is its video.

    Args:
        folder: the root.
        labels: as in ``open_corpus``.
        allow_empty: as in ``open_corpus``.
        parts: those of ``DESED_PARTS`` that must be there, and alone count; None for whatever is there.
    """
    root = desed_root(folder) or folder
    checker = Checker(root)
    clips: list[Clip] = []
    absent = []
    for part in _DESED_PARTS:
        if parts is not None and part.name not in parts:
            continue
        found = ([*sorted((root / "metadata").glob(pattern))] for pattern in part.tables)
        tables = next((tables for tables in found if tables), [])
        if not tables:
            absent.append(f"{part.name} (metadata/{' or metadata/'.join(part.tables)})")
        for table in tables:
            clips += _desed_clips(checker, part, table)
    if absent:
        (checker.warnings if parts is None else checker.problems).append(f"parts not found: {'; '.join(absent)}")
    checker.leaks(clips, "the video", certain=False)
    return checker.corpus(
        "desed", "multi_label", clips, found=label_set("desed"), labels=labels, allow_empty=allow_empty
    )


def _desed_clips(checker: Checker, part: _Part, path: Path) -> list[Clip]:
    """Return the clips of one table that have a recording."""
    table = path.relative_to(checker.folder).as_posix()
    # Beside soundscapes.tsv its folder tells which set it is, else the table itself. One archive misspells it.
    own = (path.parent.name if path.name == "soundscapes.tsv" else path.stem).replace("synhtetic", "synthetic")
    places = [place.replace("*", own) for place in part.audio]
    audio = next(
        (checker.folder / "audio" / place for place in places if (checker.folder / "audio" / place).is_dir()), None
    )
    labelled: dict[str, tuple[tuple[str, ...], tuple[Event, ...] | None]] = {}
    if part.timed:
        durations: dict[str, float] = {}
        for name in ("durations.tsv", f"{path.stem}_durations.tsv"):
            if (path.parent / name).is_file():
                durations = checker.durations((path.parent / name).relative_to(checker.folder).as_posix())
        for name, events in checker.events(table, durations, slack=_DESED_SLACK).items():
            labelled[name] = (tuple(sorted({event.event_label for event in events})), tuple(events))
    else:
        for where, row in checker.rows(table, ("filename", "event_labels")):
            if row["filename"] in labelled:
                checker.problems.append(f"{where}: {row['filename']} occurs twice")
            present = {label.strip() for label in row["event_labels"].split(",")} - {""}
            if not present:
                checker.problems.append(f"{where}: {row['filename']} has no label")
            labelled[row["filename"]] = (tuple(sorted(present)), None)
    if not labelled:
        return []
    if audio is None:
        checker.problems.append(f"{table}: no folder of its recordings; expected audio/{' or audio/'.join(places)}")
        return []
    there = {entry.name for entry in audio.iterdir()}
    if missing := [name for name in labelled if name not in there]:
        words = f"{table}: {len(missing)} of {len(labelled)} recordings are missing in {audio.name}: {some(missing)}"
        failed = part.complete or len(missing) == len(labelled)
        (checker.problems if failed else checker.warnings).append(words)
    return [
        Clip(
            audio / name,
            present,
            events,
            split=part.split,
            group=_video_named(name) if re.search(r"_\d[\d.]*_\d[\d.]*\.\w+$", name) else None,
        )
        for name, (present, events) in labelled.items()
        if name in there
    ]


# ------------------------------------------------------------------ AudioSet

_SEGMENTS = {
    "balanced_train_segments": "train",
    "unbalanced_train_segments": "train",
    "eval_segments": "test",
}
_SEGMENT_FOLDERS = ("", "metadata", "csv", "segments")
_CLASSES = "class_labels_indices.csv"
#: folders below the root where packed files are looked for, as in hdf5s/waveforms/unbalanced_train
_HDF5_DEPTH = 3


def _in_folders(folder: Path, name: str) -> Path | None:
    """Return where a table of AudioSet lies: in its root or one of the usual folders."""
    return next((path for place in _SEGMENT_FOLDERS if (path := folder / place / name).is_file()), None)


def segment_tables(folder: Path) -> list[Path]:
    """Return AudioSet's tables of segments that are there, in their official order."""
    return [path for name in _SEGMENTS if (path := _in_folders(folder, f"{name}.csv"))]


def waveform_files(folder: Path) -> list[Path]:
    """Return the HDF5 files of waveforms below, by name; PANNs keeps indexes of them, which are left out."""
    from htsat.data.reading import HDF5_SUFFIXES

    found = []
    for root, folders, files in os.walk(folder):
        # Two million clips need not be looked through: they lie below audio.
        folders[:] = [name for name in folders if not name.startswith(".") and name not in ("indexes", "audio")]
        if len(Path(root).relative_to(folder).parts) == _HDF5_DEPTH:
            folders.clear()
        found += [Path(root, name) for name in files if Path(name).suffix.lower() in HDF5_SUFFIXES]
    return sorted(found)


def open_audioset(folder: Path, labels: Sequence[str] | None, layout: Literal["clips", "hdf5"] | None) -> Corpus:
    """Read AudioSet: segment tables and a folder of clips, or HDF5 files of waveforms as PANNs and HTS-AT pack them.

    Tables: ``balanced_train_segments.csv``, ``unbalanced_train_segments.csv`` and ``eval_segments.csv`` (those that
    are there), in the root, ``metadata/``, ``csv/`` or ``segments/``. Clips: anywhere below ``audio/``, or below the
    root where there is no ``audio/``, named by their video: ``ID.wav``, ``YID.wav``, ``ID_30.wav``,
    ``ID_30000.wav`` (milliseconds), ``YID_30.000_40.000.wav``. No copy of AudioSet has all clips: absent ones are
    told in the warnings. HDF5: every ``*.h5`` below, whose name tells the split (``balanced_train.h5``,
    ``unbalanced_train_part00.h5``, ``eval.h5``).

    Classes are the 527 of ``class_labels_indices.csv``, which is read if it is there. Those without clips are told
    in the warnings.

    Args:
        folder: the root.
        labels: as in ``open_corpus``.
        layout: which to read; None for HDF5 where there is any.
    """
    checker = Checker(folder)
    mids, names = _audioset_classes(checker)
    if layout is None:
        layout = "hdf5" if waveform_files(folder) else "clips"
    if layout == "hdf5":
        clips = _hdf5_clips(checker, names)
    else:
        clips = _segment_clips(checker, dict(zip(mids, names, strict=True)))
    splits: dict[str, set[str]] = defaultdict(set)
    for clip in clips:
        splits[clip.group or ""].add(clip.split or "")
    if shared := [video for video, found in splits.items() if video and len(found) > 1]:
        checker.problems.append(f"{len(shared)} videos stand in both train and test: {some(shared)}")
    return checker.corpus("audioset", "multi_label", clips, found=names, labels=labels, allow_empty=True)


def _audioset_classes(checker: Checker) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return ids and names of the classes, in order."""
    path = _in_folders(checker.folder, _CLASSES)
    if path is None:
        return audioset_mids(), label_set("audioset")
    rows = checker.rows(path.relative_to(checker.folder).as_posix(), ("index", "mid", "display_name"))
    if [row["index"] for _, row in rows] != [str(index) for index in range(len(rows))]:
        checker.problems.append(f"{path.name}: the column 'index' must count 0, 1, 2... in the order of the classes")
    if len({row["mid"] for _, row in rows}) < len(rows) or len({row["display_name"] for _, row in rows}) < len(rows):
        checker.problems.append(f"{path.name}: a class occurs twice")
    return tuple(row["mid"] for _, row in rows), tuple(row["display_name"] for _, row in rows)


def _segments(checker: Checker, path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (place, video, class ids) of each line of a segment table; malformed ones become problems."""
    table = path.relative_to(checker.folder).as_posix()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file, skipinitialspace=True), start=1):
                if not row or row[0].startswith("#"):
                    continue
                where = f"{table} line {number}"
                try:
                    video, start, end = row[0], float(row[1]), float(row[2])
                    ids = [mid for mid in row[3].split(",") if mid]
                except (IndexError, ValueError):
                    expected = 'YTID, start_seconds, end_seconds, "class,class"'
                    checker.problems.append(f"{where}: expected {expected}, got {', '.join(row)[:80]!r}")
                    continue
                if not 0 <= start < end:
                    checker.problems.append(f"{where}: expected 0 <= start < end in seconds, got {start:g} and {end:g}")
                yield where, video, ids
    except OSError as error:
        checker.problems.append(f"{table}: cannot be read: {error.strerror or error}")
    except (UnicodeDecodeError, csv.Error) as error:
        checker.problems.append(f"{table}: cannot be read as a table in UTF-8: {error}")


def _segment_clips(checker: Checker, name_of: dict[str, str]) -> list[Clip]:
    """Return the clips of the segment tables that have a recording."""
    folder = checker.folder
    tables = segment_tables(folder)
    if not tables:
        checker.problems.append(f"no segment tables; expected {', '.join(f'{name}.csv' for name in _SEGMENTS)}")
    recordings: dict[str, Path] = {}
    top = folder / "audio" if (folder / "audio").is_dir() else folder
    for root, folders, files in os.walk(top):
        folders.sort()
        for file in sorted(files):
            if is_recording(path := Path(root, file)):
                recordings.setdefault(_video_named(file), path)
    clips: list[Clip] = []
    seen: dict[str, str] = {}
    foreign: dict[str, int] = defaultdict(int)
    known_labels: dict[tuple[str, ...], tuple[str, ...]] = {}
    listed = 0
    for table in tables:
        absent: list[str] = []
        count = 0
        for where, video, ids in _segments(checker, table):
            count += 1
            if video in seen:
                checker.problems.append(f"{where}: {video} occurs twice, first in {seen[video]}")
                continue
            seen[video] = where
            for mid in ids:
                if mid not in name_of:
                    foreign[mid] += 1
            if (recording := recordings.get(video)) is None:
                absent.append(video)
                continue
            # Few sets of labels occur, of many clips: each is kept once.
            present = tuple(name_of[mid] for mid in dict.fromkeys(ids) if mid in name_of)
            present = known_labels.setdefault(present, present)
            clips.append(Clip(recording, present, split=_SEGMENTS[table.stem], group=video))
        listed += count
        if absent:
            checker.warnings.append(f"{table.name}: {len(absent)} of {count} clips have no recording: {some(absent)}")
    if listed and not clips:
        checker.problems.append(
            f"none of the {listed} clips has a recording below {top.name}/; expected such as {next(iter(seen))}.wav"
        )
    if foreign:
        told = _ontology_names(folder)
        shown = [f"{mid} ({told[mid]})" if mid in told else mid for mid in sorted(foreign)]
        checker.problems.append(f"class ids that are none of the {len(name_of)} classes: {some(shown)}")
    return clips


def _ontology_names(folder: Path) -> dict[str, str]:
    """Return the names of all ids of the ontology, if ``ontology.json`` is there, for messages about unknown ones."""
    path = _in_folders(folder, "ontology.json")
    try:
        entries = json.loads(path.read_text(encoding="utf-8")) if path else []
        return {entry["id"]: entry["name"] for entry in entries}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _split_of_file(path: Path) -> str | None:
    """Return the split of an HDF5 file by its name, else by that of its folder."""
    for name in (path.stem.lower(), path.parent.name.lower()):
        for word, split in (("train", "train"), ("eval", "test"), ("test", "test"), ("val", "validation")):
            if word in name:
                return split
    return None


def _hdf5_clips(checker: Checker, names: Sequence[str]) -> list[Clip]:
    """Return the clips of all HDF5 files; rows that were left empty when they were packed are absent ones."""
    from htsat.data.reading import open_hdf5

    clips: list[Clip] = []
    known_labels: dict[bytes, tuple[str, ...]] = {}
    seen: dict[str, str] = {}
    files = waveform_files(checker.folder)
    if not files:
        checker.problems.append("no HDF5 files of waveforms; expected balanced_train.h5, eval.h5 and the like")
    for path in files:
        table = path.relative_to(checker.folder).as_posix()
        split = _split_of_file(path)
        if split is None:
            checker.problems.append(
                f"{table}: expected a name that tells the split, such as balanced_train.h5 or eval.h5"
            )
        try:
            with open_hdf5(path) as file:
                if lacking := [key for key in ("audio_name", "target") if key not in file]:
                    checker.problems.append(f"{table}: no {' and no '.join(lacking)}; found {', '.join(file)}")
                    continue
                audio_names, targets, shape = file["audio_name"][:], file["target"][:], file["waveform"].shape
        except AudioError as error:
            checker.problems.append(str(error).removeprefix(f"{checker.folder}/"))
            continue
        except OSError as error:
            checker.problems.append(f"{table}: cannot be read: {error}; copy it again")
            continue
        if targets.shape != (shape[0], len(names)) or audio_names.shape != (shape[0],):
            checker.problems.append(
                f"{table}: waveform {shape} needs audio_name ({shape[0]},) and target ({shape[0]}, {len(names)}), "
                f"got {audio_names.shape} and {targets.shape}"
            )
            continue
        absent = twice = 0
        for row, (name, target) in enumerate(zip(audio_names, targets, strict=True)):
            text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
            if not text:
                absent += 1
                continue
            video = _video_named(text)
            if video in seen and seen[video] == split:
                twice += 1
                continue
            seen[video] = split or ""
            key = target.tobytes()
            if key not in known_labels:
                known_labels[key] = tuple(names[i] for i in target.nonzero()[0])
            clips.append(Clip(path, known_labels[key], split=split, group=video, index=row))
        if absent:
            checker.warnings.append(f"{table}: {absent} of {shape[0]} rows hold no clip")
        if twice:
            checker.warnings.append(f"{table}: {twice} of {shape[0]} rows repeat a clip of before and are not used")
    return clips


def _video_named(name: str) -> str:
    """Return the video of a recording ``Y<id>.wav`` or ``<id>.wav``, perhaps with times. AudioSet has a clip of each.

    An id has eleven characters, so that neither a leading Y nor times can be mistaken for a part of it.
    """
    stem = Path(name).name.rsplit(".", 1)[0]
    found = re.fullmatch(r"Y?([\w-]{11})(?:_[\d.]+){0,2}", stem)
    return found[1] if found else stem
