"""Batches grown on the neighbor graph, from an order that says where to begin (*ours*).

A cut of an order of small bandwidth leaves most edges of a graph of embeddings outside of batches:
such a graph has no narrow band. Growing keeps several times as many inside.
"""

import heapq

import numpy as np
import scipy.sparse


def grow_batches(
    graph: scipy.sparse.csr_matrix,
    order: np.ndarray,
    batch_size: int,
    ids: np.ndarray | None = None,
) -> np.ndarray:
    """Reorders pairs so that each run of `batch_size` has many edges inside.

    A batch begins with the first pair of the order that is in none yet, and takes, one by one, the
    pair with the most neighbors in it, of equals the first in the order. Where no pair left has a
    neighbor in it, it goes on with the first of the order.

    Args:
      graph: [N, N], symmetric.
      order: [N] int, a permutation.
      batch_size: B.
      ids: [N] int; a pair is not taken for its neighbors where the batch has its id.

    Returns:
      [N] int64, a permutation; the last batch is shorter where B does not divide N.
    """
    num_pairs = len(order)
    # Pairs are their places in the order from here on, so that the first is the smallest.
    graph = graph[order][:, order]
    starts, neighbors = graph.indptr.tolist(), graph.indices.tolist()
    ids = range(num_pairs) if ids is None else ids[order].tolist()
    is_taken, places, first = [False] * num_pairs, [], 0
    while len(places) < num_pairs:
        size = min(batch_size, num_pairs - len(places))
        counts: dict[int, int] = {}
        heap: list[tuple[int, int]] = []
        ids_inside = set()
        for _ in range(size):
            place = _pop_best(heap, counts, is_taken, ids, ids_inside)
            if place is None:
                while is_taken[first]:
                    first += 1
                place = first
            is_taken[place] = True
            ids_inside.add(ids[place])
            places.append(place)
            for neighbor in neighbors[starts[place] : starts[place + 1]]:
                if not is_taken[neighbor]:
                    counts[neighbor] = counts.get(neighbor, 0) + 1
                    heapq.heappush(heap, (-counts[neighbor], neighbor))
    return order[np.array(places, np.int64)]


def _pop_best(heap, counts, is_taken, ids, ids_inside) -> int | None:
    """The pair with the most neighbors inside, if there is one that can come."""
    while heap:
        count, place = heapq.heappop(heap)
        # A pair is in the heap once for each of its counts; the last one stands.
        is_current = -count == counts[place] and not is_taken[place]
        if is_current and ids[place] not in ids_inside:
            return place
    return None
