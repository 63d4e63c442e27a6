"""Everybody's own recordings: a folder per class, a table of labels, tables of timed events."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from htsat.audio.decode import open_audio
from htsat.data.clips import SPLITS, Checker, Clip, Corpus, columns_of, is_recording, some, split_named
from htsat.data.split import with_groups
from htsat.errors import AudioError, DataError

#: columns that may name the recording, and hold its one label or its several
FILE_COLUMNS = ("filename", "file", "path")
LABEL_COLUMNS = ("label", "labels")
EVENT_COLUMNS = ("filename", "onset", "offset", "event_label")
#: what is not a class, though it is a folder: ``_background_noise_`` and the like, and what systems leave behind
_NO_CLASS = (".", "_")


def read_strong(folder: Path) -> list[Clip]:
    """Read recordings with timed events: ``audio/``, ``strong.tsv`` (DCASE columns) and ``durations.tsv``.

    A line of ``strong.tsv`` with neither label nor times stands for a recording without events, as in DCASE.
    ``sources.tsv`` (filename, source_clip), if there, tells the folds of the parts of a mixture from
    the number before the first hyphen of each source clip, as ESC names its files.

    Raises:
        DataError: with every problem of the corpus.
    """
    checker = Checker(folder)
    durations = checker.durations("durations.tsv")
    events = checker.events("strong.tsv", durations, known="durations.tsv")
    folds = _folds_of_sources(checker, "sources.tsv", {name: bool(found) for name, found in events.items()})
    clips = []
    for name, found in events.items():
        labels = tuple(sorted({event.event_label for event in found}))
        clips.append(Clip(folder / "audio" / name, labels, tuple(found), frozenset(folds.get(name, ()))))
    return checker.checked(clips)


def _folds_of_sources(checker: Checker, table: str, has_events: dict[str, bool]) -> dict[str, set[int]]:
    """Return the folds of every mixture; empty ones if there is no table of their sources.

    A column ``fold`` tells them (numbers with commas between them, or nothing), else the names of the source clips,
    which are then ESC's.
    """
    folds: dict[str, set[int]] = defaultdict(set)
    if not (checker.folder / table).is_file():
        return folds
    before = len(checker.problems)
    for where, row in checker.rows(table, ("filename", "source_clip")):
        name, source = row["filename"], row["source_clip"]
        fold = re.match(r"(\d+)-", source)
        if name not in has_events:
            checker.unknown(where, name, "durations.tsv", has_events)
        elif "fold" in row:
            told = [part.strip() for part in (row["fold"] or "").split(",") if part.strip()]
            folds[name].update(checker.integer(where, "fold", part) for part in told)
        elif fold is None or int(fold[1]) < 1:
            checker.problems.append(f"{where}: expected a source clip like 1-100032-A-0, got {source!r}")
        else:
            folds[name].add(int(fold[1]))
    # A mixture of unknown origin could smuggle a held-out recording into training.
    unknown = [name for name, found in has_events.items() if found and name not in folds]
    if unknown and len(checker.problems) == before:
        checker.problems.append(f"{table}: no source of {some(unknown)}")
    return folds


def read_unlabelled(folder: Path) -> list[Clip]:
    """Read every recording of a folder, without labels.

    Raises:
        DataError: the folder is missing, cannot be listed, or holds no recordings.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if is_recording(path))
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be listed: {error.strerror or error}") from None
    return Checker(folder).checked([Clip(path, ()) for path in paths])


# ------------------------------------------------------------------ a folder per class


def folders_in(folder: Path) -> list[Path]:
    """Return the folders right below, hidden ones and those with a leading underscore left out, by name."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(_NO_CLASS))
    except OSError:
        return []


def has_recordings(folder: Path) -> bool:
    """Return whether a recording lies anywhere below."""
    return next(_recordings(folder), None) is not None


def _recordings(folder: Path) -> Iterator[Path]:
    """Yield every recording below; not in hidden folders, nor through links to folders."""
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in files if is_recording(Path(name)))


def open_folder(folder: Path, labels: Sequence[str] | None, allow_empty: bool) -> Corpus:
    """Read a folder per class, perhaps below ``train``, ``validation`` and ``test``.

    Classes are the names of the folders, sorted; recordings lie anywhere below. The recording that a clip
    was cut from is guessed from the clips' names (see ``htsat.data.split``).
    """
    checker = Checker(folder)
    top = folders_in(folder)
    is_split = bool(top) and all(split_named(path.name) for path in top)
    roots = [(split_named(path.name), path) for path in top] if is_split else [(None, folder)]
    if twice := [split for split in SPLITS if sum(split == found for found, _ in roots) > 1]:
        checker.problems.append(f"two folders for {some(twice)}; expected one of each of {', '.join(SPLITS)}")
    for place in dict.fromkeys([folder, *(root for _, root in roots)]):
        _note_strays(checker, place)
    clips: list[Clip] = []
    names: list[str] = []
    bare: list[Path] = []
    for split, root in sorted(roots, key=lambda pair: SPLITS.index(pair[0]) if pair[0] else 0):
        for class_folder in folders_in(root):
            paths = sorted(_recordings(class_folder))
            if not paths:
                bare.append(class_folder)
            clips += [Clip(path, (class_folder.name,), split=split) for path in paths]
            names += [path.relative_to(class_folder).as_posix() for path in paths]
    classes = {label for clip in clips for label in clip.labels}
    if bare:
        where = some([path.relative_to(folder).as_posix() for path in bare])
        words = f"{len(bare)} class folders hold no recordings: {where}; remove them or add recordings"
        harmless = allow_empty or all(path.name in classes for path in bare)
        (checker.warnings if harmless else checker.problems).append(words)
    if labels is None and len(classes) == 1:
        checker.problems.append(f"only one class, {some(sorted(classes))}; expected a folder for each of two or more")
    clips = with_groups(clips, names)
    checker.leaks(clips, "what seems to be the recording", certain=False)
    return checker.corpus(
        "folder", "single_label", clips, found=sorted(classes | {path.name for path in bare}), labels=labels,
        # Folders that hold nothing were told above.
        allow_empty=labels is None or allow_empty, stray="; rename its folder",
    )  # fmt: skip


def _note_strays(checker: Checker, folder: Path) -> None:
    """Warn of what lies beside the class folders and is not used."""
    try:
        beside = sorted(folder.iterdir())
    except OSError as error:
        checker.problems.append(f"{folder}: the folder cannot be listed: {error.strerror or error}")
        return
    where = "" if folder == checker.folder else f"{folder.relative_to(checker.folder).as_posix()}: "
    if loose := [path.name for path in beside if is_recording(path) and path.is_file()]:
        checker.warnings.append(
            f"{where}{len(loose)} recordings lie in no class folder and are not used: {some(loose)}"
        )
    hidden = [
        path.name for path in beside if path.is_dir() and path.name.startswith(_NO_CLASS) and has_recordings(path)
    ]
    if hidden:
        checker.warnings.append(f"{where}folders with a leading '.' or '_' are no classes, not used: {some(hidden)}")


# ------------------------------------------------------------------ a table of labels


def label_tables(folder: Path) -> list[Path]:
    """Return the tables of a folder that have a column for the recording and one for its labels, by name."""
    try:
        tables = sorted(p for p in folder.iterdir() if p.suffix in (".csv", ".tsv") and not p.name.startswith("."))
    except OSError:
        return []
    return [path for path in tables if {*FILE_COLUMNS} & (found := {*columns_of(path)}) and {*LABEL_COLUMNS} & found]


def open_csv(place: Path, labels: Sequence[str] | None, allow_empty: bool) -> Corpus:
    """Read a table of recordings: ``place`` is the table, or a folder with one.

    Columns: ``filename`` (or ``file``, ``path``), relative to the table's folder or its ``audio/``; ``label``, or
    ``labels`` with ``;`` between them, or ``,`` where no line has a ``;``. If there: ``split``, ``fold``, and
    ``group`` (what no two splits may share). Without ``group``, it is guessed from the names.
    """
    tables = [place] if place.is_file() else label_tables(place)
    folder = place.parent if place.is_file() else place
    checker = Checker(folder)
    if len(tables) != 1:
        names = ", ".join(path.name for path in tables)
        raise DataError(
            f"{place}: expected one table with columns filename and label, found {names or 'none'}; name it"
        )
    table = tables[0].name
    columns = columns_of(tables[0])
    file_column = next((name for name in FILE_COLUMNS if name in columns), FILE_COLUMNS[0])
    label_column = next((name for name in LABEL_COLUMNS if name in columns), LABEL_COLUMNS[0])
    rows = checker.rows(table, (file_column, label_column))
    separator = ";" if any(";" in row[label_column] for _, row in rows) else ","
    clips: dict[str, Clip] = {}
    for where, row in rows:
        name = row[file_column]
        if label_column == "label":
            found = [row["label"].strip()]
        else:
            found = [label for part in row["labels"].split(separator) if (label := part.strip())]
        if not name:
            checker.problems.append(f"{where}: no {file_column}")
            continue
        if name in clips:
            checker.problems.append(f"{where}: {name} occurs twice")
        elif found == [""]:
            checker.problems.append(f"{where}: {name} has no label")
        if len(set(found)) < len(found):
            checker.problems.append(f"{where}: {name} has a label twice: {row['labels']}")
        path = folder / name
        if not path.is_file() and (folder / "audio" / name).is_file():
            path = folder / "audio" / name
        clips[name] = Clip(
            path,
            tuple(dict.fromkeys(found)),
            folds=frozenset([checker.integer(where, "fold", row["fold"] or "")] if "fold" in columns else []),
            split=checker.split(where, row["split"] or "") if "split" in columns else None,
            group=row["group"] or None if "group" in columns else None,
        )
    told = "group" in columns
    grouped = list(clips.values()) if told else with_groups(list(clips.values()), list(clips))
    checker.leaks(grouped, "the group" if told else "what seems to be the recording", certain=told)
    return checker.corpus(
        "csv", "single_label" if label_column == "label" else "multi_label", grouped,
        found=sorted({label for clip in grouped for label in clip.labels if label}), labels=labels,
        allow_empty=allow_empty,
    )  # fmt: skip


# ------------------------------------------------------------------ timed events


def event_tables(folder: Path) -> list[Path]:
    """Return the tables of timed events of a folder: ``strong.tsv``, or else every TSV with DCASE's columns."""
    if (folder / "strong.tsv").is_file():
        return [folder / "strong.tsv"]
    try:
        tables = sorted(path for path in folder.iterdir() if path.suffix == ".tsv" and not path.name.startswith("."))
    except OSError:
        return []
    return [path for path in tables if {*EVENT_COLUMNS} <= {*columns_of(path)}]


def open_strong(place: Path, labels: Sequence[str] | None, allow_empty: bool) -> Corpus:
    """Read recordings with timed events: ``place`` is a table, a folder with one, or has one for each split.

    The table is ``strong.tsv``, or the only TSV with DCASE's columns (filename, onset, offset, event_label);
    recordings are relative to its folder or its ``audio/``. No event may end after its recording: ``durations.tsv``
    (filename, duration) tells, if there, and names every recording; otherwise their headers do. ``sources.tsv``
    is read as ``read_strong`` says. Folders named after splits (``train``, ``val``, ``test``) with a table each
    give the splits.
    """
    folder = place.parent if place.is_file() else place
    checker = Checker(folder)
    tables: list[tuple[str | None, Path]]
    if place.is_file():
        tables = [(None, place)]
    elif not (tables := [(None, path) for path in event_tables(folder)]):
        parts = [(split_named(path.name), path) for path in folders_in(folder)]
        tables = [(split, table) for split, path in parts if split for table in event_tables(path)]
        tables.sort(key=lambda pair: (SPLITS.index(pair[0] or "train"), pair[1]))
    splits = [split for split, _ in tables]
    if not tables or len(set(splits)) < len(splits):
        names = ", ".join(path.relative_to(folder).as_posix() for _, path in tables) or "none"
        raise DataError(
            f"{place}: expected strong.tsv, or one TSV with columns {', '.join(EVENT_COLUMNS)}; found {names}"
        )
    clips: list[Clip] = []
    for split, table in tables:
        clips += _events_of(checker, table, split)
    checker.leaks(clips, "what seems to be the recording", certain=False)
    found = sorted({label for clip in clips for label in clip.labels})
    return checker.corpus("strong", "multi_label", clips, found=found, labels=labels, allow_empty=allow_empty)


def _events_of(checker: Checker, table: Path, split: str | None) -> list[Clip]:
    """Return the clips of one table of events."""
    beside = table.parent
    prefix = f"{beside.relative_to(checker.folder).as_posix()}/" if beside != checker.folder else ""

    def place(name: str) -> Path:
        return beside / name if (beside / name).is_file() else beside / "audio" / name

    if (beside / "durations.tsv").is_file():
        known = f"{prefix}durations.tsv"
        events = checker.events(prefix + table.name, checker.durations(known), known=known)
    else:
        events = checker.events(prefix + table.name, {})
        for name, found in events.items():
            end = max((event.offset for event in found), default=0.0)
            duration = _duration(checker, place(name))
            if duration is not None and end > duration + 0.01:
                checker.problems.append(
                    f"{prefix}{table.name}: {name} has an event that ends at {end:g} s, but lasts {duration:g} s"
                )
    folds = _folds_of_sources(checker, f"{prefix}sources.tsv", {name: bool(found) for name, found in events.items()})
    clips = []
    for name, found in events.items():
        present = tuple(sorted({event.event_label for event in found}))
        clips.append(Clip(place(name), present, tuple(found), frozenset(folds.get(name, ())), split))
    listed_paths = {clip.path for clip in clips}
    around = {path.parent for path in listed_paths if path.parent.is_dir()}
    unlisted = sorted(
        path.name for folder in around for path in folder.iterdir() if is_recording(path) and path not in listed_paths
    )
    if unlisted:
        checker.warnings.append(
            f"{prefix}{table.name}: {len(unlisted)} recordings have no line and are not used: {some(unlisted)}"
        )
    # Mixtures have names that count; where they tell folds, those say more than the names.
    return clips if folds else with_groups(clips, list(events))


def _duration(checker: Checker, path: Path) -> float | None:
    """Return the seconds that a recording's header tells; None if it is absent, which is told elsewhere."""
    if not path.is_file():
        return None
    try:
        with open_audio(path) as reader:
            return reader.duration
    except AudioError as error:
        checker.problems.append(str(error))
        return None
