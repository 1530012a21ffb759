"""Conflicts: two pairs of a batch where one pair's candidate is a positive of the other's query.

This candidate is then a positive and an in-batch negative of the same query. The most common
conflict is two pairs with the same candidate. Batches are consecutive runs of `batch_size` places
in an order. The last one is shorter if `batch_size` does not divide N.
"""

import heapq
import warnings
from collections.abc import Iterable

import numpy as np

from negative_cache.batching.ids import Ids, OpenBatch
from negative_cache.ops.neighbor_graph import num_equals_before

# If queries are known, a batch of B pairs defers at most this many times B pairs.
_MAX_DEFERRED = 4


def count_conflicts(order: np.ndarray, ids: np.ndarray, batch_size: int) -> int:
    """Counts the pairs that follow a pair with the same id in their batch.

    Args:
      order: [N] int, a permutation.
      ids: [N] int, from 0 to below N.
      batch_size: the size of the batches that the order is cut into.
    """
    keys = np.arange(len(order)) // batch_size * len(order) + ids[order]
    return len(order) - len(np.unique(keys))


def unavoidable_conflicts(ids: np.ndarray, batch_size: int) -> int:
    """Returns the number of conflicts that no order avoids.

    An id can be in each of the F full batches once. A last batch of s pairs has room for s ids.
    """
    return int(np.sum(_surplus(np.bincount(ids), *divmod(len(ids), batch_size))))


def warn_of_conflicts(ids: Ids, batch_size: int, stacklevel: int = 3) -> bool:
    """Warns if a candidate is in more pairs than batches, and returns whether it warned."""
    if ids.candidates is None:
        return False
    conflicts = unavoidable_conflicts(ids.candidates, batch_size)
    if conflicts:
        warnings.warn(
            f"{conflicts} of {len(ids.candidates)} pairs will share a batch of {batch_size} with"
            " another pair of their candidate: one candidate is in"
            f" {np.bincount(ids.candidates).max()} pairs. `remove_accidental_hits` in the task"
            " keeps a candidate from being its own negative. Smaller batches have fewer of them.",
            stacklevel=stacklevel,
        )
    return bool(conflicts)


def separate(order: np.ndarray, ids: Ids, batch_size: int) -> np.ndarray:
    """Moves pairs so that as few as possible share a batch with a pair of the same candidate.

    An order without such conflicts does not change, unless queries are known. Otherwise batches are
    filled from the front of the order with pairs of different candidates. A pair whose candidate is
    already in the batch waits for the next batch. A candidate is *critical* if it has at least as
    many pairs left as there are full batches left. Pairs of critical candidates go first.

    Then the only conflicts are those that no order avoids. Proof: with F full batches and s further
    places left, assume that every candidate has at most F pairs, except that n₁ ≤ s candidates have
    F + 1. (At the beginning, pairs beyond that count as pairs of other candidates.) There are at
    least B candidates, because FB + s ≤ F·candidates + n₁. If n₀ candidates have F pairs, then
    (n₁ + n₀) F + n₁ ≤ FB + s, so n₁ + n₀ ≤ B + (s - n₁) / F. Thus the n₁ candidates find places in
    the batch, and at most s - n₁ of the n₀ candidates find none. So the assumption holds again with
    F - 1 full batches left, and finally for s pairs with different candidates.

    If queries are known, a pair also waits if its candidate is a positive of a query in the batch,
    or a candidate in the batch is a positive of its query. Critical pairs do not wait for this
    reason, and the number of waiting pairs is limited. So this kind of conflict becomes rare, but
    may remain.

    Args:
      order: [N] int, a permutation.
      ids: the ids of the pairs.
      batch_size: the size of the batches that the order is cut into.

    Returns:
      [N], another permutation.
    """
    num_pairs = len(order)
    candidates = np.arange(num_pairs) if ids.candidates is None else ids.candidates
    if ids.queries is None and not count_conflicts(order, candidates, batch_size):
        return np.array(order)
    num_full, rest = divmod(num_pairs, batch_size)
    open_batch = None if ids.queries is None else OpenBatch(ids, order)
    waiting = _WaitingPairs(
        _without_surplus(candidates[order], num_full, rest), num_full, open_batch
    )
    places = [waiting.take(batch_size, num_full - batch) for batch in range(num_full)]
    places.append(waiting.take(rest, 1))
    return order[np.concatenate([np.array(batch, np.int64) for batch in places])]


def _surplus(counts: np.ndarray, num_full: int, rest: int) -> np.ndarray:
    """Returns, for each id, the number of its pairs beyond the batches that it can be in."""
    limits = np.full(len(counts), num_full)
    most_frequent = np.argsort(-counts, kind="stable")[:rest]
    limits[most_frequent] += 1
    return np.maximum(counts - limits, 0)


def _without_surplus(ids: np.ndarray, num_full: int, rest: int) -> np.ndarray:
    """Returns ids in which each surplus pair, the last ones of an id, has a new id of its own."""
    counts = np.bincount(ids)
    allowed = counts - _surplus(counts, num_full, rest)
    is_surplus = num_equals_before(ids) >= allowed[ids]
    return np.where(is_surplus, len(counts) + np.cumsum(is_surplus), ids)


class _WaitingPairs:
    """The places of the order that are in no batch yet.

    Args:
      ids: [N] int, the candidate's id at each place.
      num_full: F, the number of full batches.
      batch: the batch that is being filled, if queries are known. It limits the places that can
        be taken.
    """

    def __init__(self, ids: np.ndarray, num_full: int, batch: OpenBatch | None):
        _, codes, counts = np.unique(ids, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        self._batch = batch
        self._places = np.argsort(codes, kind="stable").tolist()
        # For each id, the range in `_places` of its remaining places.
        self._next, self._ends = (ends - counts).tolist(), ends.tolist()
        self._queue = sorted((self._places[start], i) for i, start in enumerate(self._next))
        self._critical: list[int] = []
        # Number of full batches left -> ids that become critical then. An entry is outdated once a
        # pair of its id is taken.
        self._soon_critical: list[list[int]] = [[] for _ in range(num_full + 1)]
        for i, count in enumerate(counts.tolist()):
            self._soon_critical[min(count, num_full)].append(i)

    def take(self, size: int, num_full: int) -> list[int]:
        """Takes the places of the next batch, with `num_full` full batches left including it."""
        taken = set(self._take_critical(size, num_full))
        self._add_to_batch(taken)
        deferred: list[tuple[int, int]] = []
        while len(taken) < size and self._queue and len(deferred) < _MAX_DEFERRED * size:
            place, i = heapq.heappop(self._queue)
            # An id is in the queue with its first place. Other entries were taken as critical.
            if i in taken or not self._num_left(i) or place != self._first_place(i):
                continue
            if self._batch is None or self._batch.can_take(place):
                taken.add(i)
                self._add_to_batch([i])
            else:
                deferred.append((place, i))
        # If too few pairs are admissible, the batch is filled with the first deferred ones.
        num_missing = size - len(taken)
        taken.update(i for _, i in deferred[:num_missing])
        for waits in deferred[num_missing:]:
            heapq.heappush(self._queue, waits)
        places = sorted(self._first_place(i) for i in taken)
        for i in taken:
            self._next[i] += 1
            if num_left := self._num_left(i):
                heapq.heappush(self._queue, (self._first_place(i), i))
                if num_left < num_full - 1:
                    self._soon_critical[num_left].append(i)
        if self._batch is not None:
            self._batch.clear()
        return places

    def _add_to_batch(self, ids: Iterable[int]) -> None:
        if self._batch is not None:
            for i in ids:
                self._batch.add(self._first_place(i))

    def _first_place(self, i: int) -> int:
        return self._places[self._next[i]]

    def _take_critical(self, size: int, num_full: int) -> list[int]:
        """Returns up to `size` critical ids, the most frequent first."""
        if num_full < len(self._soon_critical):
            new = self._soon_critical[num_full]
            self._critical += [i for i in new if self._num_left(i) >= num_full]
        # A critical id stays critical, because it loses at most one pair with each batch.
        self._critical = [i for i in dict.fromkeys(self._critical) if self._num_left(i)]
        self._critical.sort(key=lambda i: (-self._num_left(i), self._first_place(i)))
        return self._critical[:size]

    def _num_left(self, i: int) -> int:
        return self._ends[i] - self._next[i]
