"""Splits without leakage: what was cut from one recording, or is one speaker, never stands on both sides.

Corpora that tell their groups (``Clip.group``) are split by them. For recordings that nobody prepared, the group is
guessed from the names (``recording_of``) and from the files' bytes (``identical``). Every split is the same on every
machine and in any order of the clips: it depends on names below the corpus's folder, labels, shares and seed.
"""

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from htsat.data.clips import Clip
from htsat.errors import DataError, UsageError

#: groups that a class needs so that train, validation and test can each have one
FEWEST_GROUPS = 3
#: clips from which on two groups are too few to be the truth about a class
MANY_CLIPS = 6
#: bytes that tell most different recordings of one size apart, so that few are read whole
_HEAD_BYTES = 1 << 16

#: names that tell their recording by a known rule
_NAMED = (
    re.compile(r"\d+-(\d+)-[A-Z]-\d+"),  # ESC-50: fold-source-take-class
    re.compile(r"(\d+)-\d+-\d+-\d+"),  # UrbanSound8K: source-class-occurrence-slice
    re.compile(r"(.+)_nohash_\d+"),  # Speech Commands: speaker_nohash_utterance
)
#: the end of a name that counts pieces of one recording: ``_01``, ``-2``, `` (3)``, ``_00010s``, ``_part4``, ``_10.5``
_COUNTER = re.compile(
    r"(?:\s*\(\d+\)|[\s_.-]+(?:copy|part|pt|segment|seg|chunk|clip|piece|slice|take)?[\s_.-]?\d+(?:\.\d+)?(?:ms|sec|s)?)$",
    re.IGNORECASE,
)


def recording_of(name: str) -> str | None:
    """Return the recording that a clip seems to be cut from, by its file name; None if the name tells nothing.

    ``4-102844-A-49.ogg`` is of 102844, as ESC-50 names its clips; ``rec_01.wav``, ``rec-2.wav``, ``rec (3).wav`` and
    ``rec_00010s.wav`` are of ``rec``; a bare number tells nothing.
    """
    stems = _stems(name)
    return stems[0] if stems else None


def _stems(name: str) -> list[str]:
    """Return what a clip's recording may be called, the coarsest guess first.

    A name that ends with a counter is that of one piece, not of a recording, and is not among them.
    """
    stem = Path(name).stem
    for pattern in _NAMED:
        if found := pattern.fullmatch(stem):
            return [found[1]]
    if re.fullmatch(r"\d*", stem):
        return []
    stems = [stem]
    while (shorter := _COUNTER.sub("", stems[0])) and shorter != stems[0]:
        stems.insert(0, shorter)
    return stems[:-1] or stems


def with_groups(clips: Sequence[Clip], names: Sequence[str]) -> list[Clip]:
    """Return the clips, each with the recording it seems to be cut from as its group.

    A class whose names only count (``dog_001`` to ``dog_120``) would become one group, which cannot be split. Where
    the coarsest guess leaves a class fewer than three groups, the next finer one is taken, and in the end each
    clip by itself. Files of the same content are one group in any case.

    Args:
        clips: with their labels; groups that they have are replaced.
        names: of each clip, relative to the folder of its class or corpus. A sub-folder counts as part of a
            recording's name, and as the recording where the rest of the name tells nothing.
    """
    chains = [_chain(name, clip) for name, clip in zip(names, clips, strict=True)]
    by_label: dict[str, list[int]] = defaultdict(list)
    for index, clip in enumerate(clips):
        for label in clip.labels or ("",):
            by_label[label].append(index)
    levels = [0] * len(clips)
    for members in by_label.values():
        deepest = max(len(chains[i]) for i in members) - 1
        level = next((d for d in range(deepest) if _enough([_at(chains[i], d) for i in members])), deepest)
        for i in members:
            levels[i] = max(levels[i], level)
    groups = [_at(chain, level) for chain, level in zip(chains, levels, strict=True)]

    # Two groups that hold the same file are one.
    root = {group: group for group in groups}

    def find(group: str) -> str:
        while root[group] != group:
            group = root[group]
        return group

    place = {clip.path: group for clip, group in zip(clips, groups, strict=True)}
    for same in identical(place):
        for path in same[1:]:
            first, other = sorted((find(place[same[0]]), find(place[path])))
            root[other] = first
    return [replace(clip, group=find(group)) for clip, group in zip(clips, groups, strict=True)]


def _chain(name: str, clip: Clip) -> list[str]:
    """Return the guesses for a clip's group, coarse to fine; the last stands for the clip alone."""
    folder = Path(name).parent.as_posix()
    below = "" if folder == "." else f"{folder}/"
    alone = " ".join([*([clip.split] if clip.split else []), *clip.labels, name])
    stems = [below + stem for stem in _stems(name)] or ([folder] if below else [])
    return [*stems, alone]


def _at(chain: Sequence[str], level: int) -> str:
    return chain[min(level, len(chain) - 1)]


def _enough(groups: Sequence[str]) -> bool:
    """Return whether a class can be split by these groups."""
    count = len(set(groups))
    return count >= FEWEST_GROUPS or (count > 1 and len(groups) < MANY_CLIPS)


def identical(paths: Iterable[Path]) -> list[list[Path]]:
    """Return the files that have the same content: lists of two and more, sorted. Absent files are left out."""

    def size(path: Path) -> int:
        return path.stat().st_size

    def digest(limit: int | None) -> Callable[[Path], bytes]:
        def of(path: Path) -> bytes:
            with path.open("rb") as file:
                if limit is not None:
                    return hashlib.sha256(file.read(limit)).digest()
                return hashlib.file_digest(file, "sha256").digest()

        return of

    def parted(alike: list[list[Path]], key: Callable[[Path], int | bytes]) -> list[list[Path]]:
        """Part each list of files that may be the same by ``key``, and drop those that are alone."""
        parts = []
        for paths in alike:
            by_key: dict[int | bytes, list[Path]] = defaultdict(list)
            for path in paths:
                by_key[key(path)].append(path)
            parts += [found for found in by_key.values() if len(found) > 1]
        return parts

    there = sorted(path for path in set(paths) if path.is_file())
    # Cheapest first: most files differ in size, or in their first bytes.
    return parted(parted(parted([there], size), digest(_HEAD_BYTES)), digest(None))


# ------------------------------------------------------------------ splits


def split_clips(clips: Sequence[Clip], shares: Mapping[str, float], seed: int = 0) -> dict[str, list[Clip]]:
    """Split clips at random, alike in every class, no group in two parts.

    A class with at least as many groups as there are parts has one in each, where clips with several labels allow it;
    with fewer, the parts of the largest shares come first (``lacking`` tells). Then each group goes where its
    classes are farthest below their share.

    Args:
        clips: to be split; one without a group is a group by itself.
        shares: name of each part and its share of the clips, > 0, that sum to 1.
        seed: of the random order.

    Returns:
        The clips of each part, in the order of ``clips``.

    Raises:
        UsageError: shares that are none.
        DataError: there are no clips.
    """
    if not shares or any(not share > 0 for share in shares.values()) or not math.isclose(sum(shares.values()), 1.0):
        given = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise UsageError(f"expected shares above 0 that sum to 1, got {given or 'none'}")
    if not clips:
        raise DataError("there are no clips to split")
    groups: dict[str, list[int]] = defaultdict(list)
    for index, clip in enumerate(clips):
        groups[_key(clip)].append(index)
    names = sorted(groups)
    names = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    # An unlabelled clip counts as a class of its own kind, so that those are shared out too.
    counts = {name: Counter(label for i in groups[name] for label in clips[i].labels or ("",)) for name in names}
    totals: Counter[str] = Counter()
    for count in counts.values():
        totals.update(count)
    have: dict[str, Counter[str]] = {part: Counter() for part in shares}
    part_of: dict[str, str] = {}

    def put(name: str, part: str) -> None:
        part_of[name] = part
        have[part].update(counts[name])

    holders: dict[str, list[str]] = {label: [] for label in sorted(totals)}
    for name in names:
        for label in counts[name]:
            holders[label].append(name)
    by_share = sorted(shares, key=lambda part: -shares[part])
    for label in sorted(holders, key=lambda label: len(holders[label])):
        parts = by_share[: len(holders[label])]
        # Small parts choose first: a group that is too large for them belongs into the largest.
        for part in reversed(parts):
            free = [name for name in holders[label] if name not in part_of]
            if free and not have[part][label]:
                want = shares[part] * totals[label]
                put(min(free, key=lambda name: abs(counts[name][label] - want)), part)
    for name in sorted((n for n in names if n not in part_of), key=lambda n: -counts[n].total()):

        def lack(part: str, count: Counter[str] = counts[name]) -> float:
            return sum(
                n * (shares[part] * totals[label] - have[part][label]) / totals[label] for label, n in count.items()
            )

        put(name, max(by_share, key=lack))
    found: dict[str, list[Clip]] = {part: [] for part in shares}
    for clip in clips:
        found[part_of[_key(clip)]].append(clip)
    return found


def _key(clip: Clip) -> str:
    """Return the group of a clip; without one, the clip itself."""
    return f"group {clip.group}" if clip.group is not None else f"clip {clip.path.as_posix()} {clip.index}"


def folds_of(clips: Sequence[Clip], k: int, seed: int = 0) -> list[Clip]:
    """Return the clips, in their order, each with one of the folds 1 to ``k``, by the rules of ``split_clips``.

    Raises:
        UsageError: fewer than two folds.
        DataError: there are fewer groups than folds.
    """
    if k < 2:
        raise UsageError(f"expected at least 2 folds, got {k}")
    if (count := len({_key(clip) for clip in clips})) < k:
        raise DataError(f"{len(clips)} clips of {count} recordings cannot be split into {k} folds; ask for fewer")
    parts = split_clips(clips, {str(fold): 1 / k for fold in range(1, k + 1)}, seed)
    fold_of = {_key(clip): frozenset((int(fold),)) for fold, found in parts.items() for clip in found}
    return [replace(clip, folds=fold_of[_key(clip)]) for clip in clips]


def lacking(parts: Mapping[str, Sequence[Clip]], labels: Sequence[str] | None = None) -> list[str]:
    """Return a line for every class that some part lacks: which, and of how many groups it is.

    Args:
        parts: as ``split_clips`` returns them.
        labels: the classes; None for those that occur.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    present: dict[str, set[str]] = defaultdict(set)
    for part, clips in parts.items():
        for clip in clips:
            for label in clip.labels:
                groups[label].add(_key(clip))
                present[label].add(part)
    lines = []
    for label in sorted(groups) if labels is None else labels:
        if missing := [part for part in parts if part not in present[label]]:
            count = len(groups[label])
            lines.append(f"{label}: none in {' and '.join(missing)} ({count} recording{'s' * (count != 1)})")
    return lines
