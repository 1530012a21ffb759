"""Batches grown on the neighbor graph, with first pairs taken from an order (*ours*).

A graph of embeddings has no narrow band. If an order of small bandwidth is cut into batches, most
edges of the graph connect different batches. Growing keeps several times as many edges inside.
"""

import heapq

import numpy as np
import scipy.sparse

from negative_cache.batching.ids import UNKNOWN_IDS, Ids, OpenBatch

# If no remaining pair has neighbors in a batch, this many pairs are tried.
_SEARCH_LENGTH = 256


def grow_batches(
    graph: scipy.sparse.csr_matrix,
    order: np.ndarray,
    batch_size: int,
    ids: Ids = UNKNOWN_IDS,
) -> np.ndarray:
    """Reorders pairs so that each run of `batch_size` has many edges inside.

    A batch begins with the first pair of the order that is in no batch yet. Then it takes one pair
    after the other, each time the pair with the most neighbors in the batch. Among equal pairs it
    takes the first in the order. If no remaining pair has a neighbor in the batch, it takes the
    first remaining pair of the order that `ids` admit.

    Args:
      graph: [N, N], symmetric.
      order: [N] int, a permutation.
      batch_size: B.
      ids: the ids of the pairs. A pair is not admitted if its candidate is a positive of a query in
        the batch, or if a candidate in the batch is a positive of its query.

    Returns:
      [N] int64, a permutation. The last batch is shorter if B does not divide N.
    """
    num_pairs = len(order)
    # From here on a pair is its place in the order, so that the first pair is the smallest number.
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
                place = _first_admissible(first, is_taken, batch)
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
    """Removes and returns the admissible pair with the most neighbors in the batch, if any."""
    while heap:
        count, place = heapq.heappop(heap)
        # The heap has an entry for each earlier count of a pair. Only the last count is valid.
        is_current = -count == counts[place] and not is_taken[place]
        if is_current and batch.can_take(place):
            return place
    return None


def _first_admissible(first: int, is_taken: list[bool], batch: OpenBatch) -> int:
    """Returns the first admissible pair from `first` on, or `first` if the search finds none."""
    for place in range(first, min(first + _SEARCH_LENGTH, len(is_taken))):
        if not is_taken[place] and batch.can_take(place):
            return place
    return first
