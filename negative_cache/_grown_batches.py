"""Batches grown on the neighbor graph, from an order that says where to begin (*ours*).

A cut of an order of small bandwidth leaves most edges of a graph of embeddings outside of batches:
such a graph has no narrow band. Growing keeps several times as many inside.
"""

import heapq

import numpy as np
import scipy.sparse

from negative_cache._pair_ids import NOT_KNOWN, Ids


def grow_batches(
    graph: scipy.sparse.csr_matrix,
    order: np.ndarray,
    batch_size: int,
    ids: Ids = NOT_KNOWN,
) -> np.ndarray:
    """Reorders pairs so that each run of `batch_size` has many edges inside.

    A batch begins with the first pair of the order that is in none yet, and takes, one by one, the
    pair with the most neighbors in it, of equals the first in the order. Where no pair left has a
    neighbor in it, it goes on with the first of the order.

    Args:
      graph: [N, N], symmetric.
      order: [N] int, a permutation.
      batch_size: B.
      ids: a pair is not taken for its neighbors where its candidate is a positive of a query in the
        batch, or a candidate in the batch one of its query.

    Returns:
      [N] int64, a permutation; the last batch is shorter where B does not divide N.
    """
    num_pairs = len(order)
    # Pairs are their places in the order from here on, so that the first is the smallest.
    graph = graph[order][:, order]
    starts, neighbors = graph.indptr.tolist(), graph.indices.tolist()
    mates = _Mates(order, ids)
    is_taken, places, first = [False] * num_pairs, [], 0
    while len(places) < num_pairs:
        size = min(batch_size, num_pairs - len(places))
        counts: dict[int, int] = {}
        heap: list[tuple[int, int]] = []
        mates.clear()
        for _ in range(size):
            place = _pop_best(heap, counts, is_taken, mates)
            if place is None:
                while is_taken[first]:
                    first += 1
                place = first
            is_taken[place] = True
            mates.add(place)
            places.append(place)
            for neighbor in neighbors[starts[place] : starts[place + 1]]:
                if not is_taken[neighbor]:
                    counts[neighbor] = counts.get(neighbor, 0) + 1
                    heapq.heappush(heap, (-counts[neighbor], neighbor))
    return order[np.array(places, np.int64)]


class _Mates:
    """The pairs of a batch, and who can come to them. Pairs are places in `order`."""

    def __init__(self, order: np.ndarray, ids: Ids):
        queries, candidates = (
            (np.arange(len(order)) if codes is None else codes)[order].tolist()
            for codes in (ids.queries, ids.candidates)
        )
        positives: dict[int, set[int]] = {}
        for query, candidate in zip(queries, candidates):
            positives.setdefault(query, set()).add(candidate)
        self._candidates = candidates
        self._positives = [positives[query] for query in queries]
        self.clear()

    def clear(self) -> None:
        self._inside: set[int] = set()
        self._positives_inside: set[int] = set()

    def add(self, place: int) -> None:
        self._inside.add(self._candidates[place])
        self._positives_inside |= self._positives[place]

    def admit(self, place: int) -> bool:
        """Whether no query gets one of its positives as a negative."""
        is_positive = self._candidates[place] in self._positives_inside
        return not is_positive and self._positives[place].isdisjoint(self._inside)


def _pop_best(heap, counts, is_taken, mates: _Mates) -> int | None:
    """The pair with the most neighbors inside, if there is one that can come."""
    while heap:
        count, place = heapq.heappop(heap)
        # A pair is in the heap once for each of its counts; the last one stands.
        is_current = -count == counts[place] and not is_taken[place]
        if is_current and mates.admit(place):
            return place
    return None
