"""Label sets: the names of a model's outputs, in the order of its outputs.

AudioSet's names and ids are facts of the AudioSet ontology (Google Inc., CC BY 4.0), ESC-50's of Piczak's
``meta/esc50.csv``. Speech Commands has no order of its own: here, and in this package's recipes, it is
alphabetical.
"""

import csv
import functools
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal

from htsat.errors import DataError, UsageError, nearest

#: what ``label_set`` knows
LABEL_SETS = ("audioset", "esc50", "esc10", "speech_commands_v2", "desed")

#: bytes; a file of 100 000 labels has a few megabytes
_MAX_FILE = 16 << 20

# The published map, as indices of the 527 classes (Source: upstream ``config.py``, fl_audioset_mapping). It was
# drawn by index ranges, so that it counts chopping and the microwave oven as frying, rain, ocean and steam as
# running water, foghorn and whistle as alarms, and forgets the water tap. Kept for parity with the paper's table.
_DESED_PUBLISHED: dict[str, tuple[int, ...]] = {
    "Alarm_bell_ringing": (310, *range(388, 403)),
    "Blender": (369,),
    "Cat": tuple(range(81, 86)),
    "Dishes": (364,),
    "Dog": tuple(range(74, 80)),
    "Electric_shaver_toothbrush": (382,),
    "Frying": (366, 367, 368),
    "Running_water": tuple(range(288, 298)),
    "Speech": tuple(range(8)),
    "Vacuum_cleaner": (377,),
}

# The same by meaning: an AudioSet class belongs to a DESED class if what it names would be annotated as that.
_DESED_CORRECTED: dict[str, tuple[str, ...]] = {
    # Bells are in the name of the class and were missing. Out: the foghorn and whistles, which no house has,
    # and dial tones, which are neither alarm nor ring.
    "Alarm_bell_ringing": (
        "Car alarm",
        "Alarm",
        "Telephone",
        "Telephone bell ringing",
        "Ringtone",
        "Alarm clock",
        "Siren",
        "Civil defense siren",
        "Buzzer",
        "Smoke detector, smoke alarm",
        "Fire alarm",
        "Bell",
        "Church bell",
        "Bicycle bell",
        "Doorbell",
        "Ding-dong",
    ),
    "Blender": ("Blender",),
    "Cat": ("Cat", "Purr", "Meow", "Hiss", "Caterwaul"),
    "Dishes": ("Dishes, pots, and pans", "Cutlery, silverware"),
    "Dog": ("Dog", "Bark", "Yip", "Howl", "Bow-wow", "Growling", "Whimper (dog)"),
    # "Toothbrush" is the parent of "Electric toothbrush" in the ontology and scored high on both.
    "Electric_shaver_toothbrush": ("Electric shaver, electric razor", "Toothbrush", "Electric toothbrush"),
    "Frying": ("Frying (food)",),
    # In: what comes from a tap. Streams and waterfalls stay: they are running water, and indoors nothing else sounds
    # like them. Out: rain, which is heard indoors and not annotated, the sea, and steam.
    "Running_water": (
        "Water",
        "Stream",
        "Waterfall",
        "Gurgling",
        "Water tap, faucet",
        "Sink (filling or washing)",
        "Bathtub (filling or washing)",
        "Toilet flush",
    ),
    "Speech": (
        "Speech",
        "Male speech, man speaking",
        "Female speech, woman speaking",
        "Child speech, kid speaking",
        "Conversation",
        "Narration, monologue",
        "Babbling",
        "Speech synthesizer",
    ),
    "Vacuum_cleaner": ("Vacuum cleaner",),
}


def _asset(name: str) -> str:
    return (files("htsat") / "assets" / "labels" / name).read_text(encoding="utf-8")


@functools.cache
def _audioset() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return AudioSet's mids and display names."""
    rows = [line.split("\t") for line in _asset("audioset.tsv").splitlines() if not line.startswith("#")][1:]
    return tuple(row[0] for row in rows), tuple(row[1] for row in rows)


@functools.cache
def label_set(name: str) -> tuple[str, ...]:
    """Return the labels of a known set, in the order of a model's outputs.

    Args:
        name: ``audioset`` (527 display names), ``esc50``, ``esc10`` (the ten classes of ESC-10, in ESC-50's order),
            ``speech_commands_v2`` (35 words, alphabetical) or ``desed`` (10, alphabetical).

    Raises:
        UsageError: unknown name.
    """
    if name not in LABEL_SETS:
        raise UsageError(f"unknown label set {name!r}{nearest(name, LABEL_SETS)}; known: {', '.join(LABEL_SETS)}")
    return _audioset()[1] if name == "audioset" else tuple(json.loads(_asset("label_sets.json"))[name])


def audioset_mids() -> tuple[str, ...]:
    """Return the ids of AudioSet's 527 classes in the ontology, e.g. ``/m/09x0r`` for speech, in index order."""
    return _audioset()[0]


def desed_map(which: Literal["published", "corrected"] = "corrected") -> dict[str, tuple[int, ...]]:
    """Return which AudioSet outputs count as each DESED class: DESED label -> indices of ``label_set("audioset")``.

    A DESED class is on where any of its AudioSet classes is, so its posterior is the largest of theirs.

    Args:
        which: ``published`` (for parity with the paper's DESED table) or ``corrected`` (by meaning).

    Raises:
        UsageError: unknown map.
    """
    if which == "published":
        return dict(_DESED_PUBLISHED)
    if which != "corrected":
        raise UsageError(f"unknown DESED class map {which!r}; known: published, corrected")
    names = label_set("audioset")
    return {label: tuple(sorted(map(names.index, members))) for label, members in _DESED_CORRECTED.items()}


def read_labels(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read labels from a file: one a line, or a CSV with a column ``display_name`` or ``label``, perhaps ``index``.

    Blank lines and lines that begin with ``#`` do not count. AudioSet's ``class_labels_indices.csv`` is such a CSV.

    Raises:
        DataError: missing, unreadable, empty, no UTF-8 text, or indices that are not 0, 1, 2...
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_FILE:
            raise DataError(f"{path}: is larger than {_MAX_FILE >> 20} MB; expected a text file with one label a line")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: is no UTF-8 text; expected one label a line or a CSV") from None
    except OSError as error:
        raise DataError(
            f"{path}: labels cannot be read: {error.strerror or error}; "
            f"give a text file with one label a line, or one of {', '.join(LABEL_SETS)}"
        ) from None
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        raise DataError(f"{path}: holds no labels; expected one a line")
    columns = next(csv.reader(lines[:1]))
    column = next((name for name in ("display_name", "label") if name in columns), None)
    if column is None or len(columns) < 2:
        return tuple(line.strip() for line in lines)
    rows = list(csv.DictReader(lines))
    if any(not row[column] for row in rows):
        raise DataError(f"{path}: a row lacks its {column}; every output needs one label")
    if "index" in columns and [row["index"] for row in rows] != [str(i) for i in range(len(rows))]:
        raise DataError(f"{path}: the column 'index' must count 0, 1, 2... in order of the model's outputs")
    return tuple(row[column].strip() for row in rows)


def resolve_labels(labels: str | os.PathLike[str] | Sequence[str]) -> tuple[str, ...]:
    """Return labels given as the name of a label set, as a file, or as a sequence of them.

    Raises:
        DataError: neither a known set nor a readable file of labels.
    """
    if isinstance(labels, str):
        if labels in LABEL_SETS:
            return label_set(labels)
        if not Path(labels).is_file():
            raise DataError(
                f"labels {labels!r}: neither a file nor a label set{nearest(labels, LABEL_SETS)}; "
                f"give a text file with one label a line, or one of {', '.join(LABEL_SETS)}"
            )
        return read_labels(labels)
    if isinstance(labels, os.PathLike):
        return read_labels(labels)
    return tuple(labels)
