"""Splits without leakage: hand-worked names, and what must hold for any clips."""

import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature_corpora import make_folder
from shared_data import shared

from htsat.data.corpora import Clip, leaks, open_corpus
from htsat.data.split import folds_of, identical, lacking, recording_of, split_clips, with_groups
from htsat.errors import DataError, UsageError

SHARES = {"train": 0.7, "validation": 0.15, "test": 0.15}


@pytest.mark.parametrize(
    ("name", "recording"),
    [
        ("4-102844-A-49.ogg", "102844"),
        ("100032-3-0-12.wav", "100032"),
        ("0a7c2a8d_nohash_0.wav", "0a7c2a8d"),
        ("00000001_NO_04.ogg", "00000001_NO"),
        ("name_01.wav", "name"),
        ("name-2.flac", "name"),
        ("name (3).mp3", "name"),
        ("name.4.wav", "name"),
        ("rec_00010s.wav", "rec"),
        ("rec_10.5.wav", "rec"),
        ("rec_part2.wav", "rec"),
        ("My recording - Copy 2.wav", "My recording"),
        ("Y-BJNMHMZDcU_50.000_60.000.wav", "Y-BJNMHMZDcU"),
        ("dog_park.wav", "dog_park"),
        ("XC123456.wav", "XC123456"),
        ("007.wav", None),
        ("_1.wav", "_1"),
    ],
)
def test_recording_of(name, recording):
    assert recording_of(name) == recording


def clip(name, *labels, group=None):
    return Clip(Path(name), labels, group=group)


def groups(names, label="dog"):
    clips = [clip(f"{label}/{name}", label) for name in names]
    return [found.group for found in with_groups(clips, names)]


def test_pieces_of_recordings_are_one_group():
    names = [f"{place}_{i:02d}.wav" for place in ("park", "home", "yard") for i in range(4)]
    assert groups(names) == ["park"] * 4 + ["home"] * 4 + ["yard"] * 4


def test_counters_are_no_recordings():
    assert len(set(groups([f"dog_{i:03d}.wav" for i in range(1, 121)]))) == 120
    assert len(set(groups([f"{i}.wav" for i in range(20)]))) == 20
    # Two names of two pieces each may well be two recordings; of thirty pieces, they are the names of two counters.
    assert groups(["a_1.wav", "a_2.wav", "b_1.wav", "b_2.wav"]) == ["a", "a", "b", "b"]
    assert len(set(groups([f"{x}_{i}.wav" for x in "ab" for i in range(15)]))) == 30


def test_a_finer_guess_is_taken_before_none():
    """A recorder's names: site, day and time, piece. Three sites would be enough, one is not, three days are."""
    names = [f"SITE_2024060{day}_0{piece}0000.wav" for day in (1, 2, 3) for piece in range(4)]
    assert groups(names) == [f"SITE_2024060{day}" for day in (1, 2, 3) for _ in range(4)]
    names = [f"{site}_2024060{day}_00{piece}0.wav" for site in "ABC" for day in (1, 2) for piece in range(2)]
    assert groups(names) == [site for site in "ABC" for _ in range(4)]


def test_groups_across_classes_and_folders():
    names = [f"rec{r}_{i}.wav" for r in range(4) for i in range(2)]
    clips = [clip(f"{label}/{name}", label) for label in ("cat", "dog") for name in names]
    found = with_groups(clips, names * 2)
    assert [c.group for c in found] == [f"rec{r}" for r in range(4) for _ in range(2)] * 2
    # What a folder below the class is called says where its clips are from.
    names = [f"site{s}/{i}.wav" for s in range(3) for i in range(5)]
    assert groups(names) == [f"site{s}" for s in range(3) for _ in range(5)]
    # Bare numbers in two classes are not the same recordings.
    clips = [clip(f"{label}/{i}.wav", label) for label in ("cat", "dog") for i in range(5)]
    assert len({c.group for c in with_groups(clips, [f"{i}.wav" for i in range(5)] * 2)}) == 10


def test_same_content_is_one_group(tmp_path):
    root = make_folder(tmp_path, recordings=3, pieces=1)
    shutil.copy(root / "dog/dak_00.wav", root / "rain/another.wav")
    shutil.copy(root / "dog/dak_00.wav", root / "bell/third.wav")
    by_name = {c.path.name: c.group for c in open_corpus("folder", root).clips}
    assert by_name["dak_00.wav"] == by_name["another.wav"] == by_name["third.wav"]
    assert len(set(by_name.values())) == 9


def test_identical(tmp_path):
    long = b"x" * 100_000
    contents = {"a": b"1", "b": b"2", "c": b"1", "d": b"12", "e": long, "f": long[:-1] + b"y", "g": long, "h": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = identical([*tmp_path.iterdir(), tmp_path / "absent", tmp_path / "a"])
    assert [[path.name for path in same] for same in found] in ([["a", "c"], ["e", "g"]], [["e", "g"], ["a", "c"]])


# ------------------------------------------------------------------ splits


def check_split(clips, parts, shares):
    """What holds for every split: nothing lost, nothing torn, each class in each part that it has groups for."""
    assert list(parts) == list(shares)
    assert Counter(map(id, clips)) == Counter(id(c) for found in parts.values() for c in found)
    where = defaultdict(set)
    for part, found in parts.items():
        for c in found:
            where[c.group or c.path].add(part)
    assert all(len(found) == 1 for found in where.values())


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=80),
    st.integers(0, 3),
    st.sampled_from([SHARES, {"train": 0.8, "validation": 0.2}, {"a": 1.0}, {"x": 0.25, "y": 0.25, "z": 0.5}]),
)
@settings(max_examples=150, deadline=None)
def test_split_of_any_clips(pairs, seed, shares):
    """Each group is of one class here, so that every class with enough groups must be in every part."""
    clips = [clip(f"{i}.wav", f"c{label}", group=f"{label}/{group}") for i, (label, group) in enumerate(pairs)]
    parts = split_clips(clips, shares, seed)
    check_split(clips, parts, shares)
    told = {line.split(":")[0] for line in lacking(parts)}
    for label in {c.labels[0] for c in clips}:
        count = len({c.group for c in clips if c.labels == (label,)})
        present = sum(any(c.labels == (label,) for c in found) for found in parts.values())
        assert present == min(count, len(shares))
        assert (label in told) == (count < len(shares))


@given(
    st.lists(st.tuples(st.sets(st.integers(0, 4), max_size=3), st.integers(0, 12)), min_size=1, max_size=40),
    st.randoms(use_true_random=False),
)
@settings(max_examples=100, deadline=None)
def test_split_does_not_depend_on_the_order(found, shuffler):
    clips = [
        clip(f"{i:03}.wav", *map(str, sorted(labels)), group=str(group)) for i, (labels, group) in enumerate(found)
    ]
    parts = split_clips(clips, SHARES, 3)
    check_split(clips, parts, SHARES)
    again = list(clips)
    shuffler.shuffle(again)
    turned = split_clips(again, SHARES, 3)
    assert {part: set(found) for part, found in parts.items()} == {part: set(found) for part, found in turned.items()}


def test_shares_are_kept_in_each_class():
    clips = [
        clip(f"{label}{i}.wav", label) for label, count in (("a", 100), ("b", 40), ("c", 20)) for i in range(count)
    ]
    parts = split_clips(clips, SHARES, 1)
    counts = {part: Counter(c.labels[0] for c in found) for part, found in parts.items()}
    assert counts == {
        "train": {"a": 70, "b": 28, "c": 14}, "validation": {"a": 15, "b": 6, "c": 3}, "test": {"a": 15, "b": 6, "c": 3}
    }  # fmt: skip
    assert set(parts["test"]) != set(split_clips(clips, SHARES, 2)["test"])
    # It depends on where the corpus lies as little as on the machine.
    moved = [clip(f"/elsewhere/{c.path}", *c.labels) for c in clips]
    assert [c.path.name for c in split_clips(moved, SHARES, 1)["test"]] == [c.path.name for c in parts["test"]]


@pytest.mark.parametrize(
    ("sizes", "shares", "expected"),
    [((30, 5, 5), (0.8, 0.1, 0.1), [30, 5, 5]), ((40, 1, 3), (0.4, 0.3, 0.3), [40, 1, 3])],
)
def test_large_groups_go_where_there_is_room(sizes, shares, expected):
    clips = [clip(f"{g}-{i}.wav", "a", group=f"g{g}") for g, size in enumerate(sizes) for i in range(size)]
    parts = split_clips(clips, dict(zip(("train", "validation", "test"), shares, strict=True)))
    assert [len(found) for found in parts.values()] == expected


def test_classes_that_cannot_be_split_are_told():
    clips = [*(clip(f"a{i}.wav", "a") for i in range(10)), clip("b0.wav", "b"), clip("b1.wav", "b"), clip("c.wav", "c")]
    parts = split_clips(clips, SHARES)
    assert lacking(parts) == ["b: none in test (2 recordings)", "c: none in validation and test (1 recording)"]
    assert lacking(parts, ["d"]) == ["d: none in train and validation and test (0 recordings)"]


@pytest.mark.parametrize("shares", [{}, {"a": 0.5, "b": 0.4}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}])
def test_shares_that_are_none(shares):
    with pytest.raises(UsageError, match="expected shares above 0 that sum to 1, got"):
        split_clips([clip("a.wav", "a")], shares)


def test_nothing_to_split():
    with pytest.raises(DataError, match="no clips"):
        split_clips([], SHARES)


def test_folds():
    rng = np.random.default_rng(0)
    clips = [clip(f"{i}.wav", f"c{i % 4}", group=f"{i % 4}-{rng.integers(12)}") for i in range(200)]
    folded = folds_of(clips, 5, seed=2)
    assert [c.path for c in folded] == [c.path for c in clips]
    assert all(len(c.folds) == 1 for c in folded) and {min(c.folds) for c in folded} == {1, 2, 3, 4, 5}
    where = defaultdict(set)
    for c in folded:
        where[c.group].add(c.folds)
    assert all(len(found) == 1 for found in where.values())
    assert max(Counter(c.folds for c in folded).values()) <= 1.4 * 200 / 5
    assert Counter(frozenset(c.labels) for c in folded if c.folds == {1}).keys() == {
        frozenset({f"c{i}"}) for i in range(4)
    }
    with pytest.raises(UsageError, match="at least 2 folds"):
        folds_of(clips, 1)
    with pytest.raises(DataError, match=r"200 clips of \d+ recordings cannot be split into 90 folds"):
        folds_of(clips, 90)


def test_real_folder_has_no_leak(tmp_path):
    """ESC-50's fold 4, split by names alone, tears no source that its table knows, where a class has enough."""
    source = open_corpus("esc50", shared("data", "esc50_fold4"))
    parts = split_clips(source.clips, {"train": 0.8, "validation": 0.2}, 0)
    check_split(source.clips, parts, {"train": 0, "validation": 0})
    assert lacking(parts) == [
        f"{label}: none in validation (1 recording)"
        for label in sorted(source.labels)
        if len({c.group for c in source.clips if c.labels == (label,)}) == 1
    ]
    assert 0.75 < len(parts["train"]) / 373 < 0.85


def test_real_folds_of_esc10():
    corpus = open_corpus("esc10", shared("data", "esc10"))
    folded = folds_of(corpus.clips, 4)
    counts = Counter((c.labels, c.folds) for c in folded)
    assert len(counts) == 40 and min(counts.values()) >= 6 and max(counts.values()) <= 10
    assert leaks(corpus) == []
