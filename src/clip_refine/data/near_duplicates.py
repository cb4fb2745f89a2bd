"""Images that look the same, by perceptual hash."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BITS = 64
_ROWS = 1024


def near_groups(hashes: NDArray[np.uint64], distance: int) -> list[list[int]]:
    """Groups of positions whose hashes differ in few bits, directly or over others of the group.

    Hashes at a distance of d agree in one of d + 1 parts, so only those that share a part are
    compared: about a second for 100,000 images that look different.

    Args:
        hashes: (N,) of 64 bits.
        distance: Largest number of bits that differ.

    Returns:
        Groups of two or more, by their first position.

    Example:
        >>> near_groups(np.array([0b1111, 0, 0b0111, 1 << 40], dtype=np.uint64), 1)
        [[0, 2], [1, 3]]
    """
    unique, group_of = np.unique(hashes, return_inverse=True)
    edges = [pairs for pairs in _near_pairs(unique, distance) if len(pairs)]
    ends = np.concatenate(edges).T if edges else np.empty((2, 0), np.int64)
    links = coo_array((np.ones(ends.shape[1], np.int8), tuple(ends)), shape=(len(unique),) * 2)
    component = connected_components(links, directed=False)[1][group_of]
    order = np.argsort(component, kind="stable")
    starts = np.flatnonzero(np.diff(component[order])) + 1
    groups = [group.tolist() for group in np.split(order, starts) if len(group) > 1]
    return sorted(groups)


def _near_pairs(unique: NDArray[np.uint64], distance: int) -> Iterator[NDArray[np.int64]]:
    """(P, 2) positions of pairs of different hashes; a pair may come several times."""
    edges = np.linspace(0, BITS, distance + 2).astype(int)
    for low, high in pairwise(edges):
        part = (unique >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(part, kind="stable")
        starts = np.flatnonzero(np.diff(part[order])) + 1
        for bucket in np.split(order, starts):
            for at in range(0, len(bucket) - 1, _ROWS):
                yield _compare(unique, bucket[at : at + _ROWS], bucket[at:], distance)


def _compare(
    unique: NDArray[np.uint64], rows: NDArray[np.int64], others: NDArray[np.int64], distance: int
) -> NDArray[np.int64]:
    differing = np.bitwise_count(unique[rows, None] ^ unique[None, others])
    row, other = np.nonzero(differing <= distance)
    pairs = np.stack([rows[row], others[other]], axis=1)
    return pairs[pairs[:, 0] != pairs[:, 1]]
