"""The door to labelled recordings: which corpus a folder is, and its clips, classes and splits, checked.

``open_corpus`` reads every layout and reports all problems of the tables and the files together in one
``DataError``; what a person may accept stands in ``Corpus.warnings``. No audio is decoded: whether
a recording can be read is known when it is read.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from htsat.data.clips import (
    MAX_LISTED,
    ROUNDING,
    SPLITS,
    Clip,
    Corpus,
    Leak,
    columns_of,
    find_leaks,
    listed,
    part_of,
    part_order,
    read_table,
    split_named,
)
from htsat.data.own import (
    event_tables,
    folders_in,
    has_recordings,
    label_tables,
    open_csv,
    open_folder,
    open_strong,
    read_strong,
    read_unlabelled,
)
from htsat.data.published import (
    BACKGROUND_NOISE,
    DESED_PARTS,
    desed_root,
    esc_table,
    open_audioset,
    open_desed,
    open_esc,
    open_keywords,
    open_speech_commands,
    read_esc,
    read_keywords,
    segment_tables,
    waveform_files,
)
from htsat.errors import DataError, UsageError, nearest

__all__ = [
    "BACKGROUND_NOISE",
    "DESED_PARTS",
    "KINDS",
    "MAX_LISTED",
    "ROUNDING",
    "SPLITS",
    "Clip",
    "Corpus",
    "Leak",
    "balance",
    "empty_classes",
    "leaks",
    "listed",
    "open_corpus",
    "part_of",
    "read_esc",
    "read_keywords",
    "read_strong",
    "read_table",
    "read_unlabelled",
    "recognise",
]

#: what ``open_corpus`` can read, and what each must have; in the order in which a folder is recognised
_LAYOUTS = {
    "esc50": "audio/ and meta/esc50.csv",
    "esc10": "audio/ and meta/esc10.csv, or meta/esc50.csv with a column esc10",
    "keywords": "audio/ and metadata.csv with columns filename, keyword, speaker and split",
    "speech_commands": "a folder per word, validation_list.txt and testing_list.txt",
    "desed": "audio/ and metadata/ with train/weak.tsv, validation/validation.tsv, eval/public.tsv or others of DESED",
    "audioset": "clips and some of {balanced_train,unbalanced_train,eval}_segments.csv, or HDF5 files of waveforms",
    "strong": "audio/ and strong.tsv with columns filename, onset, offset and event_label",
    "csv": "a .csv or .tsv with columns filename and label, or labels",
    "folder": "a folder of recordings for each class",
}
KINDS = tuple(sorted(_LAYOUTS))


def _fits(kind: str, folder: Path) -> bool:
    """Return whether a folder has what makes a corpus of this kind, by its names alone."""
    tests: dict[str, Callable[[], bool]] = {
        "esc50": lambda: esc_table(folder, ten=False) is not None,
        "esc10": lambda: esc_table(folder, ten=True) is not None,
        "keywords": lambda: {"filename", "keyword"} <= {*columns_of(folder / "metadata.csv")},
        "speech_commands": lambda: any((folder / f"{n}_list.txt").is_file() for n in ("validation", "testing")),
        "desed": lambda: desed_root(folder) is not None,
        "audioset": lambda: bool(segment_tables(folder) or waveform_files(folder)),
        "strong": lambda: bool(
            event_tables(folder) or any(event_tables(path) for path in folders_in(folder) if split_named(path.name))
        ),
        "csv": lambda: bool(label_tables(folder)),
        "folder": lambda: any(map(has_recordings, _class_folders(folder))),
    }
    return tests[kind]()


def recognise(folder: Path) -> str | None:
    """Return which kind of corpus a folder seems to be, as ``open_corpus`` calls it, or None.

    Only names of files and of columns are looked at.
    """
    return next((kind for kind in _LAYOUTS if _fits(kind, folder)), None) if folder.is_dir() else None


def open_corpus(
    kind: str,
    folder: Path,
    *,
    labels: Sequence[str] | None = None,
    allow_empty: bool = False,
    parts: Sequence[str] | None = None,
    layout: Literal["clips", "hdf5"] | None = None,
) -> Corpus:
    """Read a corpus and check it.

    Args:
        kind: which layout: ``audioset``, ``csv``, ``desed``, ``esc10``, ``esc50``, ``folder``, ``keywords``,
            ``speech_commands`` or ``strong``.
        folder: its root; for ``csv`` and ``strong``, also the table itself.
        labels: the classes it must have, in the order of a model's outputs; None for its own order: of ``target`` for
            ESC, of the label set for AudioSet, DESED and Speech Commands, else sorted. Clips with another label are
            problems.
        allow_empty: classes without clips are warnings, as when a part of a corpus is scored; otherwise problems.
            In AudioSet they are always warnings.
        parts: of ``desed`` alone: those of ``DESED_PARTS`` to read, all of which must be there.
        layout: of ``audioset`` alone: clips or HDF5, where both are there.

    Raises:
        UsageError: unknown kind or part, or an option of another kind.
        DataError: another corpus lies there, or with every problem of this one.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown corpus {kind!r}{nearest(kind, KINDS)}; known: {', '.join(KINDS)}")
    if parts is not None and kind != "desed":
        raise UsageError(f"parts {', '.join(parts)}: only desed has parts, not {kind}")
    for part in parts or ():
        if part not in DESED_PARTS:
            known = ", ".join(DESED_PARTS)
            raise UsageError(f"unknown part of DESED {part!r}{nearest(part, DESED_PARTS)}; known: {known}")
    if layout is not None and kind != "audioset":
        raise UsageError(f"layout {layout}: only audioset has layouts, not {kind}")
    if labels is not None and (len(set(labels)) < len(labels) or not labels):
        twice = ", ".join(sorted(label for label, count in Counter(labels).items() if count > 1))
        raise UsageError(f"expected each label once, got {twice + ' twice' if twice else 'none'}")
    if not (kind in ("csv", "strong") and folder.is_file()):
        _check_kind(kind, folder)
    match kind:
        case "esc50" | "esc10":
            return open_esc(folder, labels, allow_empty, ten=kind == "esc10")
        case "speech_commands":
            return open_speech_commands(folder, labels, allow_empty)
        case "keywords":
            return open_keywords(folder, labels, allow_empty)
        case "desed":
            return open_desed(folder, labels, allow_empty, parts)
        case "audioset":
            return open_audioset(folder, labels, layout)
        case "folder":
            return open_folder(folder, labels, allow_empty)
        case "csv":
            return open_csv(folder, labels, allow_empty)
        case _:
            return open_strong(folder, labels, allow_empty)


def _check_kind(kind: str, folder: Path) -> None:
    """Refuse a folder that is no corpus of this kind, and say what it is, or where one is."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; expected {kind}: {_LAYOUTS[kind]}")
    seen = recognise(folder)
    if _fits(kind, folder):
        return
    # Not for those that are known only by looking through every folder below.
    around = [] if kind in ("folder", "audioset") else [*folders_in(folder), folder.parent]
    near = next((path for path in around if _fits(kind, path)), None)
    hint = f"; did you mean {near}?" if near is not None else ""
    if kind == "csv" and (tables := sorted(path for path in folder.iterdir() if path.suffix in (".csv", ".tsv"))):
        hint = "; found " + " and ".join(f"{path.name} with {', '.join(columns_of(path)) or 'none'}" for path in tables)
    looks = f"this looks like {seen}, not {kind}" if seen else f"this is not {kind}"
    raise DataError(f"{folder}: {looks}; expected {_LAYOUTS[kind]}{hint}")


def _class_folders(folder: Path) -> list[Path]:
    """Return the folders that may be classes. ``audio`` is none: it belongs to a table."""
    top = folders_in(folder)
    if top and all(split_named(path.name) for path in top):
        top = [path for split in top for path in folders_in(split)]
    return [path for path in top if path.name != "audio"]


# ------------------------------------------------------------------ what a check reports


def balance(corpus: Corpus) -> dict[str, dict[str, int]]:
    """Return how many clips each class has in each split or fold: label -> part -> count.

    Every label has every part of the corpus, in order: ``train``, ``validation``, ``test``, ``fold 1``..., ``all``.
    """
    parts = sorted({part_of(clip) for clip in corpus.clips}, key=part_order)
    counts = Counter((label, part_of(clip)) for clip in corpus.clips for label in clip.labels)
    return {label: {part: counts[label, part] for part in parts} for label in corpus.labels}


def empty_classes(corpus: Corpus, split: str | None = None) -> list[str]:
    """Return the classes without clips, in order: in all of the corpus, or in one of its splits."""
    there = {label for clip in corpus.clips if split is None or clip.split == split for label in clip.labels}
    return [label for label in corpus.labels if label not in there]


def leaks(corpus: Corpus) -> list[Leak]:
    """Return every group (recording, speaker, video) that two splits or folds share, by name."""
    return find_leaks(corpus.clips)
