"""Batches grown on the neighbor graph, from an order that says where to begin (*ours*).

A cut of an order of small bandwidth leaves most edges of a graph of embeddings outside of batches:
such a graph has no narrow band. Growing keeps several times as many inside.
"""

import heapq

import numpy as np
import scipy.sparse

from negative_cache.batching.ids import NOT_KNOWN, Ids, OpenBatch

# Where nobody has neighbors in a batch: how far to look for somebody who can come.
_NUM_LOOKED_AT = 256


def grow_batches(
    graph: scipy.sparse.csr_matrix,
    order: np.ndarray,
    batch_size: int,
    ids: Ids = NOT_KNOWN,
) -> np.ndarray:
    """Reorders pairs so that each run of `batch_size` has many edges inside.

    A batch begins with the first pair of the order that is in none yet, and takes, one by one, the
    pair with the most neighbors in it, of equals the first in the order. Where no pair left has a
    neighbor in it, it goes on with the first of the order, or of those after it.

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
    batch = OpenBatch(ids, order)
    is_taken, first = [False] * num_pairs, 0
    places: list[int] = []
    while len(places) < num_pairs:
        size = min(batch_size, num_pairs - len(places))
        counts: dict[int, int] = {}
        heap: list[tuple[int, int]] = []
        batch.clear()
        for _ in range(size):
            place = _pop_best(heap, counts, is_taken, batch)
            if place is None:
                while is_taken[first]:
                    first += 1
                place = _first_that_can_come(first, is_taken, batch)
            is_taken[place] = True
            batch.add(place)
            places.append(place)
            for neighbor in neighbors[starts[place] : starts[place + 1]]:
                if not is_taken[neighbor]:
                    counts[neighbor] = counts.get(neighbor, 0) + 1
                    heapq.heappush(heap, (-counts[neighbor], neighbor))
    return order[np.array(places, np.int64)]


def _pop_best(
    heap: list[tuple[int, int]], counts: dict[int, int], is_taken: list[bool], batch: OpenBatch
) -> int | None:
    """The pair with the most neighbors inside, if there is one that can come."""
    while heap:
        count, place = heapq.heappop(heap)
        # A pair is in the heap once for each of its counts; the last one stands.
        is_current = -count == counts[place] and not is_taken[place]
        if is_current and batch.can_take(place):
            return place
    return None


def _first_that_can_come(first: int, is_taken: list[bool], batch: OpenBatch) -> int:
    """The first pair from one on that can come; that one where none near it can."""
    for place in range(first, min(first + _NUM_LOOKED_AT, len(is_taken))):
        if not is_taken[place] and batch.can_take(place):
            return place
    return first
