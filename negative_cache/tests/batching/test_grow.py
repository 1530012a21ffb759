"""Tests of batches that are grown on a graph."""

import hypothesis
import numpy as np
import scipy.sparse
from hypothesis import strategies as st

from negative_cache.batching.grow import grow_batches
from negative_cache.batching.ids import Ids


def graph_of(edges, num_pairs):
    joined = np.zeros([num_pairs, num_pairs], bool)
    for i, j in edges:
        joined[i, j] = joined[j, i] = True
    return scipy.sparse.csr_matrix(joined)


def test_by_hand():
    # 0 brings 3; of 1, 4 (a neighbor of both) and 5, 4 comes next, then 1 before 5, by the order.
    graph = graph_of([(0, 3), (0, 1), (0, 4), (3, 4), (3, 5)], 6)
    order = np.array([0, 3, 1, 2, 4, 5])
    assert grow_batches(graph, order, 4).tolist() == [0, 3, 4, 1, 2, 5]


def test_where_no_neighbor_is_left_it_goes_on_with_the_order():
    order = np.array([2, 0, 3, 1])
    assert grow_batches(graph_of([], 4), order, 3).tolist() == [2, 0, 3, 1]
    assert grow_batches(graph_of([(2, 1)], 4), order, 3).tolist() == [2, 1, 0, 3]


def test_a_neighbor_that_would_be_a_false_negative_waits():
    graph = graph_of([(0, 1), (0, 2), (1, 2)], 4)
    assert grow_batches(graph, np.arange(4), 2).tolist() == [0, 1, 2, 3]
    same_candidate = Ids(candidates=np.array([0, 0, 1, 2]))
    assert grow_batches(graph, np.arange(4), 2, same_candidate).tolist() == [0, 2, 1, 3]
    same_query = Ids(queries=np.array([0, 0, 1, 2]))
    assert grow_batches(graph, np.arange(4), 2, same_query).tolist() == [0, 2, 1, 3]
    # Candidate 1, of the pair 1, is a positive of the query of 0 by the pair 3, and the reverse.
    for queries, candidates in (([0, 1, 2, 0], [0, 1, 2, 1]), ([0, 1, 2, 1], [0, 1, 2, 0])):
        by_another_pair = Ids(np.array(queries), np.array(candidates))
        assert grow_batches(graph, np.arange(4), 2, by_another_pair).tolist() == [0, 2, 1, 3]


@hypothesis.given(st.integers(0, 40), st.integers(1, 9), st.booleans(), st.integers(0, 2**32 - 1))
def test_always_a_permutation_that_keeps_edges_inside(num_pairs, batch_size, has_ids, seed):
    rng = np.random.default_rng(seed)
    edges = rng.integers(0, max(num_pairs, 1), [2 * num_pairs, 2])
    graph = graph_of(edges[edges[:, 0] != edges[:, 1]], num_pairs)
    ids = Ids(*rng.integers(0, 5, [2, num_pairs])) if has_ids else Ids()
    order = rng.permutation(num_pairs)
    grown = grow_batches(graph, order, batch_size, ids)
    assert grown.dtype == np.int64
    np.testing.assert_array_equal(np.sort(grown), np.arange(num_pairs))
    np.testing.assert_array_equal(grown, grow_batches(graph, order, batch_size, ids))
