"""Pairs of one batch that share a candidate, and how to keep them apart.

Where two pairs of a batch have the same candidate, it is a negative of one query and the positive
of that same query. Batches are consecutive runs of `batch_size` places in an order, the last one
shorter where `batch_size` does not divide N.
"""

import heapq

import numpy as np


def count_conflicts(order: np.ndarray, ids: np.ndarray, batch_size: int) -> int:
    """How many pairs come after one of the same id in their batch.

    Args:
      order: [N] int, a permutation.
      ids: [N] int, at least 0 and below N.
      batch_size: of the batches that the order is cut into.
    """
    keys = np.arange(len(order)) // batch_size * len(order) + ids[order]
    return len(order) - len(np.unique(keys))


def unavoidable_conflicts(ids: np.ndarray, batch_size: int) -> int:
    """How many conflicts every order has.

    An id can be in each of the F full batches, and s ids in the short one of s pairs, too.
    """
    return int(np.sum(_surplus(np.bincount(ids), *divmod(len(ids), batch_size))))


def separate_ids(order: np.ndarray, ids: np.ndarray, batch_size: int) -> np.ndarray:
    """Moves pairs until as few as can be share a batch with a pair of the same id.

    An order without conflicts stays as it is. Otherwise batches are filled from the front of the
    order with pairs of different ids; a pair whose id is in the batch waits for the next. That an
    id never has more pairs left than there are batches for them, such *critical* ids go first.

    Then no conflict remains but those that no order avoids. For with F full batches and s further
    places left, let every id have at most F pairs, or F + 1 for n₁ ≤ s ids (to begin with, pairs
    beyond that count as pairs of other ids). There are at least B ids, since FB + s ≤ F·ids + n₁.
    If n₀ ids have F pairs, (n₁ + n₀) F + n₁ ≤ FB + s, so that n₁ + n₀ ≤ B + (s - n₁) / F: the n₁
    find places in the batch, and those of the n₀ that find none are at most s - n₁. So with F - 1
    full batches left it is true again, and in the end of s pairs with different ids.

    Args:
      order: [N] int, a permutation.
      ids: [N] int, at least 0 and below N.
      batch_size: of the batches that the order is cut into.

    Returns:
      [N], another permutation.
    """
    if not count_conflicts(order, ids, batch_size):
        return np.array(order)
    num_full, rest = divmod(len(order), batch_size)
    waiting = _Waiting(_without_surplus(ids[order], num_full, rest), num_full)
    places = [waiting.take(batch_size, num_full - batch) for batch in range(num_full)]
    places.append(waiting.take(rest, 1))
    return order[np.concatenate([np.array(batch, np.int64) for batch in places])]


def _surplus(counts: np.ndarray, num_full: int, rest: int) -> np.ndarray:
    """How many pairs of each id are more than there are batches that it can be in."""
    limits = np.full(len(counts), num_full)
    most_frequent = np.argsort(-counts, kind="stable")[:rest]
    limits[most_frequent] += 1
    return np.maximum(counts - limits, 0)


def _without_surplus(ids: np.ndarray, num_full: int, rest: int) -> np.ndarray:
    """Ids of which the surplus, the last pairs of each, have got ids of their own."""
    counts = np.bincount(ids)
    allowed = counts - _surplus(counts, num_full, rest)
    by_id = np.argsort(ids, kind="stable")
    number = np.empty(len(ids), np.int64)
    number[by_id] = np.arange(len(ids)) - (np.cumsum(counts) - counts)[ids[by_id]]
    is_surplus = number >= allowed[ids]
    return np.where(is_surplus, len(counts) + np.cumsum(is_surplus), ids)


class _Waiting:
    """Places of the order that are in no batch yet.

    Args:
      ids: [N] int, the id at each place.
      num_full: F.
    """

    def __init__(self, ids: np.ndarray, num_full: int):
        _, codes, counts = np.unique(ids, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        self._places = np.argsort(codes, kind="stable").tolist()
        # Of each id: where its places begin that are left, and where they end.
        self._next, self._ends = (ends - counts).tolist(), ends.tolist()
        self._queue = sorted((self._places[start], i) for i, start in enumerate(self._next))
        self._critical: list[int] = []
        # Ids that become critical when so many full batches are left; wrong once a pair is taken.
        self._soon_critical: list[list[int]] = [[] for _ in range(num_full + 1)]
        for i, count in enumerate(counts.tolist()):
            self._soon_critical[min(count, num_full)].append(i)

    def take(self, size: int, num_full: int) -> list[int]:
        """Takes the places of the next batch, when so many full ones are left with it."""
        taken = set(self._take_critical(size, num_full))
        places = [self._places[self._next[i]] for i in taken]
        while len(places) < size:
            place, i = heapq.heappop(self._queue)
            # Each id is in the queue with its first place; others were taken as critical.
            if i not in taken and self._num_left(i) and place == self._places[self._next[i]]:
                taken.add(i)
                places.append(place)
        for i in taken:
            self._next[i] += 1
            if num_left := self._num_left(i):
                heapq.heappush(self._queue, (self._places[self._next[i]], i))
                if num_left < num_full - 1:
                    self._soon_critical[num_left].append(i)
        return sorted(places)

    def _take_critical(self, size: int, num_full: int) -> list[int]:
        """Ids with no fewer pairs than full batches are left, the most frequent first."""
        if num_full < len(self._soon_critical):
            new = self._soon_critical[num_full]
            self._critical += [i for i in new if self._num_left(i) >= num_full]
        # An id is once in the list, and stays: of the batches left there is now one fewer, too.
        self._critical = [i for i in dict.fromkeys(self._critical) if self._num_left(i)]
        self._critical.sort(key=lambda i: (-self._num_left(i), self._places[self._next[i]]))
        return self._critical[:size]

    def _num_left(self, i: int) -> int:
        return self._ends[i] - self._next[i]
