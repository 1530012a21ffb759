"""Pairs of one batch that share a candidate, and how to keep them apart.

Where two pairs of a batch have the same candidate, it is a negative of one query and the positive
of that same query. Batches are consecutive runs of `batch_size` places in an order, the last one
shorter where `batch_size` does not divide N.
"""

from collections import Counter

import numpy as np


def count_conflicts(order: np.ndarray, ids: np.ndarray, batch_size: int) -> int:
    """How many pairs come after one of the same id in their batch.

    Args:
      order: [N] int, a permutation.
      ids: [N] int, at least 0 and below N.
      batch_size: of the batches that the order is cut into.
    """
    return len(order) - len(np.unique(_keys(order, ids, batch_size)))


def separate_ids(order: np.ndarray, ids: np.ndarray, batch_size: int) -> np.ndarray:
    """Swaps pairs between batches until no two of a batch have the same id.

    Each pair that comes after one of the same id in its batch b changes places with a pair of the
    nearest batch b' that has not its id, and where some pair has an id that b does not have; all
    other pairs stay where they are. Every swap adds an id to b, or one to both, so that there are
    at most as many swaps as conflicts.

    If no id occurs in more pairs than there are full batches, no conflict remains. For, of the full
    batches with a conflict, let b have the fewest different ids, and a be one that it has twice.
    Some full batch b' does not have a, and has at least as many different ids as b: so one of them
    is not in b, and there is a swap left to do. Likewise where b is the short batch and all others
    are done. If some id occurs more often, conflicts may remain.

    Args:
      order: [N] int, a permutation.
      ids: [N] int, at least 0 and below N.
      batch_size: of the batches that the order is cut into.

    Returns:
      [N], another permutation.
    """
    order = np.array(order)
    batches = _Batches(order, ids, batch_size)
    places = batches.conflicting_places()
    while len(places):
        is_left = [not batches.separate(place) for place in places]
        # What could not be separated may be so after others have been, but not forever.
        if all(is_left):
            break
        places = places[is_left]
    return order


def _keys(order: np.ndarray, ids: np.ndarray, batch_size: int) -> np.ndarray:
    """[N] int64, the same for the pairs of one batch that have the same id."""
    return np.arange(len(order)) // batch_size * len(order) + ids[order]


class _Batches:
    """An order in the course of its repair, which changes it in place."""

    def __init__(self, order: np.ndarray, ids: np.ndarray, batch_size: int):
        self._order, self._ids, self._batch_size = order, ids, batch_size
        self._num_batches = -(-len(order) // batch_size)
        self._counters: dict[int, Counter] = {}
        with_id = np.unique(_keys(order, ids, batch_size)) % len(order)
        self._num_batches_with = np.bincount(with_id, minlength=len(order))

    def conflicting_places(self) -> np.ndarray:
        """Places of pairs that come after one of the same id in their batch."""
        keys = _keys(self._order, self._ids, self._batch_size)
        _, first = np.unique(keys, return_index=True)
        return np.setdiff1d(np.arange(len(self._order)), first)

    def separate(self, place: int) -> bool:
        """Moves the pair at a place away if it is in conflict; whether it is in none, then."""
        batch, own = place // self._batch_size, self._ids[self._order[place]]
        here = self._count(batch)
        if here[own] < 2:
            return True
        if self._num_batches_with[own] == self._num_batches:
            return False
        for distance in range(1, self._num_batches):
            for other in (batch - distance, batch + distance):
                lacks_it = 0 <= other < self._num_batches and not self._count(other)[own]
                if lacks_it and self._swap(place, batch, other):
                    return True
        return False

    def _swap(self, place: int, batch: int, other: int) -> bool:
        """Swaps with the pair of another batch that is nearest, if any can come; whether so."""
        here, there = self._count(batch), self._count(other)
        start = other * self._batch_size
        places = range(start, min(start + self._batch_size, len(self._order)))
        for other_place in places if other > batch else reversed(places):
            moved = self._ids[self._order[other_place]]
            if here[moved]:
                continue
            own = self._ids[self._order[place]]
            self._order[[place, other_place]] = self._order[[other_place, place]]
            here[own] -= 1
            here[moved] += 1
            there[own] += 1
            there[moved] -= 1
            # The batch still has a pair with `own`; the other has lost `moved` if it had one only.
            self._num_batches_with[own] += 1
            self._num_batches_with[moved] += 1 if there[moved] else 0
            return True
        return False

    def _count(self, batch: int) -> Counter:
        """How many pairs of each id a batch has."""
        if batch not in self._counters:
            start = batch * self._batch_size
            members = self._order[start : start + self._batch_size]
            self._counters[batch] = Counter(self._ids[members].tolist())
        return self._counters[batch]
