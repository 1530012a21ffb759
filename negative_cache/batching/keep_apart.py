"""Pairs of one batch of which one's candidate is a positive of the other's query.

Such a candidate is a negative and a positive of the same query; above all where two pairs have the
same candidate. Batches are consecutive runs of `batch_size` places in an order, the last one
shorter where `batch_size` does not divide N.
"""

import heapq
import warnings
from collections.abc import Iterable

import numpy as np

from negative_cache.batching.ids import Ids, OpenBatch
from negative_cache.ops.neighbor_graph import num_equals_before

# How many pairs that wait are asked, for one that comes to a batch, if queries are known.
_NUM_ASKED = 4


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


def warn_of_conflicts(ids: Ids, batch_size: int, stacklevel: int = 3) -> bool:
    """Warns of candidates that are in too many pairs to be in each batch only once; whether so."""
    if ids.candidates is None:
        return False
    conflicts = unavoidable_conflicts(ids.candidates, batch_size)
    if conflicts:
        warnings.warn(
            f"{conflicts} of {len(ids.candidates)} pairs will share a batch of {batch_size} with"
            " another pair of their candidate: one candidate is in"
            f" {np.bincount(ids.candidates).max()} pairs. `remove_accidental_hits` in the task"
            " keeps it from being its own negative; smaller batches hold fewer.",
            stacklevel=stacklevel,
        )
    return bool(conflicts)


def separate(order: np.ndarray, ids: Ids, batch_size: int) -> np.ndarray:
    """Moves pairs until as few as can be share a batch with a pair of the same candidate.

    An order without such conflicts stays as it is, unless queries are known. Otherwise batches are
    filled from the front of the order with pairs of different candidates; a pair whose candidate is
    in the batch waits for the next. That a candidate never has more pairs left than there are
    batches for them, such *critical* ones go first.

    Then no conflict remains but those that no order avoids. For with F full batches and s further
    places left, let every candidate have at most F pairs, or F + 1 for n₁ ≤ s candidates (to begin
    with, pairs beyond that count as pairs of other candidates). There are at least B candidates,
    since FB + s ≤ F·candidates + n₁. If n₀ have F pairs, (n₁ + n₀) F + n₁ ≤ FB + s, so that
    n₁ + n₀ ≤ B + (s - n₁) / F: the n₁ find places in the batch, and those of the n₀ that find none
    are at most s - n₁. So with F - 1 full batches left it is true again, and in the end of s pairs
    with different candidates.

    Where queries are known, pairs that are not critical wait, too, if their candidate is a positive
    of a query in the batch, or the reverse; but not where too many would have to: these are fewer
    than in the order, not none.

    Args:
      order: [N] int, a permutation.
      ids: of the pairs.
      batch_size: of the batches that the order is cut into.

    Returns:
      [N], another permutation.
    """
    num_pairs = len(order)
    candidates = np.arange(num_pairs) if ids.candidates is None else ids.candidates
    if ids.queries is None and not count_conflicts(order, candidates, batch_size):
        return np.array(order)
    num_full, rest = divmod(num_pairs, batch_size)
    open_batch = None if ids.queries is None else OpenBatch(ids, order)
    waiting = _Waiting(_without_surplus(candidates[order], num_full, rest), num_full, open_batch)
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
    is_surplus = num_equals_before(ids) >= allowed[ids]
    return np.where(is_surplus, len(counts) + np.cumsum(is_surplus), ids)


class _Waiting:
    """Places of the order that are in no batch yet.

    Args:
      ids: [N] int, the candidate's id at each place.
      num_full: F.
      batch: says, besides, which places it can take, where queries are known.
    """

    def __init__(self, ids: np.ndarray, num_full: int, batch: OpenBatch | None):
        _, codes, counts = np.unique(ids, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        self._batch = batch
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
        self._welcome(taken)
        asked: list[tuple[int, int]] = []
        while len(taken) < size and self._queue and len(asked) < _NUM_ASKED * size:
            place, i = heapq.heappop(self._queue)
            # Each id is in the queue with its first place; others were taken as critical.
            if i in taken or not self._num_left(i) or place != self._first(i):
                continue
            if self._batch is None or self._batch.can_take(place):
                taken.add(i)
                self._welcome([i])
            else:
                asked.append((place, i))
        # Where too few can come, the first of the others do.
        num_missing = size - len(taken)
        taken.update(i for _, i in asked[:num_missing])
        for waits in asked[num_missing:]:
            heapq.heappush(self._queue, waits)
        places = sorted(self._first(i) for i in taken)
        for i in taken:
            self._next[i] += 1
            if num_left := self._num_left(i):
                heapq.heappush(self._queue, (self._first(i), i))
                if num_left < num_full - 1:
                    self._soon_critical[num_left].append(i)
        if self._batch is not None:
            self._batch.clear()
        return places

    def _welcome(self, ids: Iterable[int]) -> None:
        if self._batch is not None:
            for i in ids:
                self._batch.add(self._first(i))

    def _first(self, i: int) -> int:
        return self._places[self._next[i]]

    def _take_critical(self, size: int, num_full: int) -> list[int]:
        """Ids with no fewer pairs than full batches are left, the most frequent first."""
        if num_full < len(self._soon_critical):
            new = self._soon_critical[num_full]
            self._critical += [i for i in new if self._num_left(i) >= num_full]
        # An id is once in the list, and stays: of the batches left there is now one fewer, too.
        self._critical = [i for i in dict.fromkeys(self._critical) if self._num_left(i)]
        self._critical.sort(key=lambda i: (-self._num_left(i), self._first(i)))
        return self._critical[:size]

    def _num_left(self, i: int) -> int:
        return self._ends[i] - self._next[i]
