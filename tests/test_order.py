"""The order of clips: counted by hand, and the same for any number of processes."""

import itertools
from collections import Counter

import numpy as np
import pytest

from htsat.training.loop import _parts
from htsat.training.order import balanced_order, epoch_order, positions_of

#: clips 0 to 5 of class 0, 6 and 7 of class 1, none of class 2, clip 8 of class 3, which clip 0 also has
OFFSETS = np.array([0, 6, 8, 8, 10])
CLIPS = np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 8])


def test_an_epoch_is_every_clip_once():
    orders = [epoch_order(seed, epoch, 50) for seed in (1, 2) for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert (epoch_order(1, 0, 50) == orders[0]).all()
    assert list(epoch_order(1, 0, 1)) == [0] and len(epoch_order(1, 0, 0)) == 0


def drawn(seed=1, epoch=0, length=36):
    return balanced_order(seed, epoch, OFFSETS, CLIPS, length)


def test_classes_come_equally_often_by_hand():
    """36 places for three classes with clips: twelve for each."""
    counts = Counter(drawn().tolist())
    assert set(counts) == set(range(9))
    # Twelve times one of six clips: each twice. Clip 0 is also drawn for class 3, which shares its twelve evenly.
    assert [counts[clip] for clip in range(1, 6)] == [2] * 5
    assert (counts[6], counts[7]) == (6, 6)
    assert counts[8] == 6 and counts[0] == 2 + 6


def test_each_round_has_every_class_once():
    order = drawn(length=30)
    for first in range(0, 30, 3):
        found = order[first : first + 3].tolist()
        assert sum(clip in (6, 7) for clip in found) == 1
        assert sum(clip in range(1, 6) for clip in found) <= 1 and sum(clip == 8 for clip in found) <= 1
    # In random order: the same class is not always the first.
    assert len({order[first] in (6, 7) for first in range(0, 30, 3)}) == 2


def test_a_class_gives_every_clip_before_one_twice():
    turns = set()
    for epoch in range(5):
        of_first = [clip for clip in drawn(epoch=epoch, length=54).tolist() if clip in range(1, 6)]
        for turn in range(3):
            assert sorted(of_first[5 * turn : 5 * turn + 5]) == [1, 2, 3, 4, 5]
            turns.add(tuple(of_first[5 * turn : 5 * turn + 5]))
        of_second = [clip for clip in drawn(epoch=epoch, length=54).tolist() if clip in (6, 7)]
        assert all(of_second[i] != of_second[i + 1] for i in range(0, 18, 2))
    assert len(turns) > 8  # in another order each time


def test_balanced_epochs_differ_and_repeat():
    orders = [drawn(seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4 and (drawn(1, 0) == orders[0]).all()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 10])
def test_lengths_that_are_no_whole_rounds(length):
    order = drawn(length=length)
    assert len(order) == length
    assert sum(clip in (6, 7) for clip in order.tolist()) in (length // 3, -(-length // 3))


def test_no_class_has_clips():
    with pytest.raises(ValueError, match="no class has clips"):
        balanced_order(1, 0, np.zeros(4, np.int64), np.zeros(0, np.int64), 5)


# ------------------------------------------------------------------ processes


@pytest.mark.parametrize("batch_size", [1, 2, 6, 8, 12, 24])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_share_a_batch(batch_size, world):
    for step in (0, 1, 7):
        shares = [list(positions_of(step, batch_size, rank, world)) for rank in range(world)]
        everything = list(range(step * batch_size, (step + 1) * batch_size))
        assert sorted(itertools.chain(*shares)) == everything  # each once, none missing
        assert all(share == sorted(share) for share in shares)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        if batch_size % (2 * world) == 0:
            # What is mixed with its mirror image in the share is what it would be mixed with in the whole batch.
            partner = dict(zip(everything, reversed(everything), strict=True))
            for share in shares:
                assert [partner[p] for p in share] == share[::-1]


def test_shares_by_hand():
    assert list(positions_of(2, 4, 0, 1)) == [8, 9, 10, 11]
    assert [list(positions_of(0, 8, rank, 2)) for rank in (0, 1)] == [[0, 2, 5, 7], [1, 3, 4, 6]]
    assert [list(positions_of(1, 6, rank, 2)) for rank in (0, 1)] == [[6, 8, 10], [7, 9, 11]]


@pytest.mark.parametrize(("size", "count"), [(8, 1), (8, 2), (8, 4), (6, 2), (12, 3), (5, 5)])
def test_parts_of_a_batch_keep_mirror_images_together(size, count):
    positions = list(range(100, 100 + size))
    parts = [list(part) for part in _parts(positions, count)]
    assert sorted(itertools.chain(*parts)) == positions and {len(part) for part in parts} == {size // count}
    if size // count % 2 == 0:
        partner = dict(zip(positions, reversed(positions), strict=True))
        assert all([partner[p] for p in part] == part[::-1] for part in parts)
