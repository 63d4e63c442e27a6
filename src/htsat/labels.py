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
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from htsat.config import CheckpointConfig, DecodingConfig
from htsat.errors import DataError, UsageError, nearest

#: what ``label_set`` knows
LABEL_SETS = ("audioset", "esc50", "esc10", "speech_commands_v2", "desed")
#: what ``class_map`` knows: DESED's classes by meaning, and by the published map
CLASS_MAPS = ("desed", "desed-published")

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

# The published thresholds (Source: upstream ``fl_evaluate.py``, fl_mapping, those of the token-semantic model). They
# were set by hand, and no development set is named.
_DESED_THRESHOLDS = {
    "Speech": 0.275,
    "Frying": 0.2,
    "Dishes": 0.2,
    "Running_water": 0.23,
    "Blender": 0.48,
    "Electric_shaver_toothbrush": 0.2,
    "Alarm_bell_ringing": 0.18,
    "Cat": 0.51,
    "Dog": 0.39,
    "Vacuum_cleaner": 0.14,
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


@dataclass(frozen=True)
class ClassMap:
    """Counts the classes of a model as those of another label set.

    Attributes:
        name: one of ``CLASS_MAPS``.
        labels: the other label set.
        members: for each of its labels the indices of the model's classes that count as it, at least one.
    """

    name: str
    labels: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]

    def __call__(self, posteriors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the posteriors of the other label set: (..., classes of the model) -> (..., labels).

        A label sounds where any of its classes does, so its posterior is the largest of theirs: it is at a threshold
        where one of them is.
        """
        columns = [posteriors[..., list(members)].max(axis=-1) for members in self.members]
        return np.stack(columns, axis=-1)


def class_map(name: str, labels: Sequence[str]) -> ClassMap:
    """Return the map from a model's classes to another label set.

    Args:
        name: ``desed`` (its ten classes by meaning) or ``desed-published`` (as in the paper's table).
        labels: of the model, in order of its outputs: AudioSet's display names, all that the map needs.

    Raises:
        UsageError: unknown map, or a model that lacks some of the classes that it needs.
    """
    if name not in CLASS_MAPS:
        raise UsageError(f"unknown classes {name!r}{nearest(name, CLASS_MAPS)}; known: {', '.join(CLASS_MAPS)}")
    names, place = label_set("audioset"), {label: index for index, label in enumerate(labels)}
    mapped = desed_map("published" if name == "desed-published" else "corrected")
    needed = {label: [names[index] for index in members] for label, members in mapped.items()}
    lacking = [member for members in needed.values() for member in members if member not in place]
    if lacking:
        raise UsageError(
            f"classes {name!r} are made of AudioSet's, but the model has {len(place)} classes and lacks "
            f"{len(lacking)} of those, first {lacking[0]!r}{nearest(lacking[0], place)}; choose a model of AudioSet"
        )
    members = tuple(tuple(place[member] for member in needed[label]) for label in label_set("desed"))
    return ClassMap(name, label_set("desed"), members)


def counted_classes(config: CheckpointConfig) -> ClassMap | None:
    """Return what a checkpoint's classes are counted as (``inference.classes``); None: as themselves.

    Raises:
        UsageError: the model lacks classes of the map, or decoding settings name a label that neither set has.
    """
    if config.inference.classes is None:
        return None
    counted = class_map(config.inference.classes, config.labels)
    for decoding in (config.decoding, *config.operating_points.values()):
        for label in decoding.per_class:
            if label not in counted.labels and label not in config.labels:
                raise UsageError(
                    f"decoding names the label {label!r}, which neither the model nor {counted.name} has"
                    f"{nearest(label, counted.labels)}"
                )
    return counted


def heard_labels(config: CheckpointConfig) -> tuple[str, ...]:
    """Return the labels of the posteriors that a checkpoint gives: the model's, or what they are counted as.

    Raises:
        UsageError: see ``counted_classes``.
    """
    counted = counted_classes(config)
    return config.labels if counted is None else counted.labels


def desed_decoding() -> DecodingConfig:
    """Return the published decoding of DESED's ten classes: a threshold for each, no filter, every length and gap.

    A published frame is active above its threshold, one of ours at or above it: the thresholds are the next larger
    numbers that a posterior can be.
    """
    per_class = {}
    for label, threshold in _DESED_THRESHOLDS.items():
        above = np.float32(threshold)
        if float(above) <= threshold:
            above = np.nextafter(above, np.float32(1))
        per_class[label] = {"threshold": float(above)}
    return DecodingConfig(per_class=per_class)


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
