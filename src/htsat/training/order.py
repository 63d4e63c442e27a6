"""The order in which clips are trained on: a function of (seed, epoch, place) alone.

A run is one line of positions 0, 1, 2 ...; position ``p`` is place ``p % n`` of epoch ``p // n``, where ``n`` is the
number of training clips. Optimiser step ``s`` takes the positions ``s * batch_size`` and following. How many
processes share them, and how many workers prepare them, changes nothing.
"""

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
#: what the random generators of a run are for, so that no two of them are alike
SHUFFLE, BALANCE, CLIP, MASKS, MIXUP, NETWORK, PARTNER = range(10, 17)


def epoch_order(seed: int, epoch: int, num_clips: int) -> Indices:
    """Return the clips of an epoch, each once, (num_clips,)."""
    return np.random.default_rng((seed, SHUFFLE, epoch)).permutation(num_clips)


def balanced_order(seed: int, epoch: int, offsets: Indices, clips: Indices, length: int) -> Indices:
    """Return an epoch in which all classes come equally often, whatever the number of their clips.

    Classes are dealt out in rounds, each class once per round in random order; a class gives its clips in random
    order and begins anew when it is through. Classes without clips are left out.

    Args:
        seed: of the run.
        epoch: from 0.
        offsets: (num_classes + 1,); the clips of class ``c`` are ``clips[offsets[c] : offsets[c + 1]]``.
        clips: indices of clips, class after class; a clip with several labels occurs in each.
        length: clips in the epoch.

    Returns:
        (length,) indices of clips.

    Raises:
        ValueError: no class has clips.
    """
    sizes = np.diff(offsets)
    classes = np.flatnonzero(sizes)
    if not len(classes):
        raise ValueError("no class has clips")
    rng = np.random.default_rng((seed, BALANCE, epoch))
    rounds = -(-length // len(classes))
    drawn = rng.permuted(np.tile(classes, (rounds, 1)), axis=1).reshape(-1)[:length]
    order = np.empty(length, dtype=np.int64)
    for label in classes:
        places = np.flatnonzero(drawn == label)
        own = clips[offsets[label] : offsets[label + 1]]
        turns = -(-len(places) // len(own))
        order[places] = np.concatenate([rng.permutation(own) for _ in range(turns)] or [own[:0]])[: len(places)]
    return order


def positions_of(step: int, batch_size: int, rank: int, world: int) -> range | list[int]:
    """Return which positions of a step a process takes, in increasing order.

    A clip and its mirror image in the batch (first and last, second and last but one ...) stay together where the
    batch can be dealt out in pairs, so that mixing a batch with its reverse pairs the same clips on any number of
    processes.
    """
    first = step * batch_size
    if world == 1:
        return range(first, first + batch_size)
    if batch_size % (2 * world) == 0:
        return [first + i for i in range(batch_size) if min(i, batch_size - 1 - i) % world == rank]
    return range(first + rank, first + batch_size, world)
