"""Tests of the neighbor graph against sorting in NumPy."""

import hypothesis
import numpy as np
import pytest
import scipy.sparse
from hypothesis import strategies as st

from negative_cache.ops import neighbor_graph as graphs


def distinct_scores(num_queries, num_candidates, seed):
    """Queries [B, 1] of ones, so that the scores of a row are the candidates, all different."""
    values = np.random.default_rng(seed).permutation(num_candidates) - num_candidates // 2
    return np.ones([num_queries, 1], np.float32), values[:, np.newaxis].astype(np.float32)


@hypothesis.given(
    st.integers(1, 5),
    st.integers(1, 150),
    st.integers(1, 20),
    st.integers(1, 64),
    st.integers(0, 9),
)
def test_nearest_candidates_are_those_of_sorting(num_queries, num_candidates, k, block_size, seed):
    queries, candidates = distinct_scores(num_queries, num_candidates, seed)
    scores, indices = graphs.nearest_candidates(queries, candidates, k, block_size=block_size)
    size = min(k, num_candidates)
    expected = np.argsort(-candidates[:, 0])[:size]
    for row in range(num_queries):
        np.testing.assert_array_equal(indices[row, :size], expected)
        np.testing.assert_array_equal(scores[row, :size], candidates[expected, 0])
    # What is more than there are candidates is nothing.
    assert np.all(indices[:, size:] == -1) and np.all(np.isneginf(scores[:, size:]))


@pytest.mark.parametrize("block_size", [None, 16, 100])
def test_nearest_candidates_of_real_embeddings(block_size):
    rng = np.random.default_rng(0)
    queries, candidates = (rng.normal(size=[n, 8]).astype(np.float32) for n in (33, 5000))
    _, indices = graphs.nearest_candidates(queries, candidates, 10, block_size=block_size)
    np.testing.assert_array_equal(indices, np.argsort(-(queries @ candidates.T), axis=1)[:, :10])


def test_similarity_quantile_of_all_pairs_and_of_a_sample():
    rng = np.random.default_rng(0)
    queries, candidates = (rng.normal(size=[200, 4]).astype(np.float32) for _ in range(2))
    scores = (queries @ candidates.T)[~np.eye(200, dtype=bool)]
    # 200 are fewer than the sample: the quantile is that of all.
    own = np.arange(200)
    quantile = graphs.similarity_quantile(queries, candidates, 0.9, np.random.default_rng(1), own)
    assert quantile == pytest.approx(np.quantile(scores, 0.9), abs=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_SAMPLE_SIZE", 100)
        rng = np.random.default_rng(1)
        quantile = graphs.similarity_quantile(queries, candidates, 0.9, rng, own)
    assert 0.85 < np.mean(scores < quantile) < 0.95


def test_similarity_quantile_leaves_pairs_of_one_id_out():
    queries = candidates = np.float32([[1.0], [1.0], [2.0]])
    ids = np.int64([0, 0, 1])
    # Of 1·1, 1·2, 2·1 twice each, the pairs (0, 1) and (1, 0) do not count: all left are 2.
    rng = np.random.default_rng(0)
    assert graphs.similarity_quantile(queries, candidates, 0.0, rng, ids) == 2.0
    assert graphs.similarity_quantile(queries, candidates, 0.5, rng, np.zeros(3)) == -np.inf


def test_symmetric_graph_joins_in_both_directions():
    graph = graphs.symmetric_graph(np.int32([[1, 2], [-1, -1], [0, -1]]))
    # 0 -> 1, 0 -> 2 and 2 -> 0.
    np.testing.assert_array_equal(
        graph.toarray(), np.array([[0, 1, 1], [1, 0, 0], [1, 0, 0]], bool)
    )


def test_symmetric_graph_of_limited_claims():
    # All three others have 0 as a neighbor: 1 as the first, 2 and 3 as the second.
    neighbors = np.int32([[-1, -1], [0, -1], [3, 0], [2, 0]])
    graph = graphs.symmetric_graph(neighbors, max_claims=2)
    rows, columns = scipy.sparse.triu(graph).nonzero()
    assert set(zip(rows.tolist(), columns.tolist())) == {(0, 1), (0, 2), (2, 3)}


def test_bandwidth_by_hand():
    # A path 0 - 1 - 2 - 3 has bandwidth 1; in the order 0, 2, 1, 3 the edge (0, 1) spans 2.
    graph = scipy.sparse.diags([1.0, 1.0], [1, -1], shape=(4, 4))
    assert graphs.bandwidth(graph) == 1
    assert graphs.bandwidth(graph, np.array([0, 2, 1, 3])) == 2
    assert graphs.bandwidth(graph, np.array([0, 2, 3, 1])) == 3
    assert graphs.bandwidth(scipy.sparse.csr_matrix((3, 3))) == 0


def test_queries_at_a_time_is_bounded():
    for arguments in ((10, 4, 3), (10**5, 64, 17), (10**8, 64, 17), (10**5, 4096, 65)):
        size = graphs.queries_at_a_time(*arguments)
        assert 16 <= size <= 1024
    assert graphs.queries_at_a_time(1, 1, 1) == 1024
