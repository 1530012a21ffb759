"""Tests of `contrastive_order` and `neighbor_graph`."""

import warnings

import hypothesis
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf
from hypothesis import strategies as st

from negative_cache import TreeIndex, batching
from negative_cache.batching import bandwidth, contrastive_order, neighbor_graph
from negative_cache.batching import order as order_module

pytestmark = pytest.mark.one_keras


def random_embeddings(num_pairs, dim=8, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=[num_pairs, dim]).astype(dtype) for _ in range(2))


def planted(sizes, seed, noise=0.05):
    """Embeddings near orthogonal centres, one a cluster, shuffled, and the cluster of each pair."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = np.eye(len(sizes), max(len(sizes), 2), dtype=np.float32)
    queries, candidates = (
        centres[labels] + noise * rng.uniform(-1, 1, [len(labels), centres.shape[1]])
        for _ in range(2)
    )
    return queries.astype(np.float32), candidates.astype(np.float32), labels


def assert_permutation(order, num_pairs):
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(num_pairs))


@hypothesis.given(
    st.integers(0, 40),
    st.integers(1, 50),
    st.sampled_from([None, 0.0, 0.5, 0.99]),
    st.sampled_from([None, 3]),
    st.sampled_from([None, 1, 4, 100]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_always_a_permutation(num_pairs, num_neighbors, quantile, num_ids, batch_size, grow, seed):
    rng = np.random.default_rng(seed)
    # Of few values, so that there are ties and duplicates.
    queries, candidates = rng.integers(-1, 2, [2, num_pairs, 2]).astype(np.float32)
    ids = None if num_ids is None else rng.integers(0, num_ids, num_pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        order = contrastive_order(
            queries,
            candidates,
            num_neighbors=num_neighbors,
            quantile=quantile,
            candidate_ids=ids,
            batch_size=batch_size,
            grow=grow and batch_size is not None,
            seed=seed,
        )
    assert_permutation(order, num_pairs)


def neighbors_by_definition(queries, candidates, k, quantile, ids):
    """Of each row, the ids of the neighboring candidates."""
    scores = (queries @ candidates.T).astype(np.float64)
    is_other = ids[:, None] != ids
    threshold = -np.inf if quantile is None else np.quantile(scores[is_other], quantile)
    neighbors = []
    for row in range(len(scores)):
        score_of = {ids[i]: scores[row, i] for i in np.flatnonzero(is_other[row])}
        best = sorted(score_of, key=score_of.get, reverse=True)[:k]
        neighbors.append({i for i in best if score_of[i] > threshold})
    return neighbors


@pytest.mark.parametrize("block_size", [None, 32])
@pytest.mark.parametrize("quantile", [None, 0.9, 0.99])
def test_neighbor_graph_is_as_defined(quantile, block_size, monkeypatch):
    queries, candidates = random_embeddings(100, dim=16)
    # As many blocks of queries as a large N has.
    monkeypatch.setattr(order_module.graphs, "queries_at_a_time", lambda *_: 16)
    graph = neighbor_graph(
        queries, candidates, num_neighbors=5, quantile=quantile, block_size=block_size
    )
    expected = np.zeros([100, 100], bool)
    neighbors = neighbors_by_definition(queries, candidates, 5, quantile, np.arange(100))
    for row, columns in enumerate(neighbors):
        expected[row, list(columns)] = True
    # Nobody is claimed by more than 4 · 5 others, here.
    assert expected.sum(axis=0).max() <= 20
    np.testing.assert_array_equal(graph.toarray(), expected | expected.T)


@pytest.mark.parametrize("with_index", [False, True])
@pytest.mark.parametrize("quantile", [None, 0.9])
def test_neighbors_are_different_candidates_where_ids_are_given(quantile, with_index, monkeypatch):
    monkeypatch.setattr(order_module.graphs, "queries_at_a_time", lambda *_: 16)
    rng = np.random.default_rng(0)
    # Some are frequent, as among the interactions of users.
    ids = np.minimum(rng.geometric(0.1, 200), 30)
    table, queries = rng.normal(size=[31, 8]), rng.normal(size=[200, 8])
    queries, candidates = queries.astype(np.float32), table[ids].astype(np.float32)
    # The 30 candidates are fewer than a leaf holds: this index is exact.
    index = TreeIndex(64, 8) if with_index else None
    graph = neighbor_graph(
        queries, candidates, num_neighbors=5, quantile=quantile, candidate_ids=ids, index=index
    )
    expected = neighbors_by_definition(queries, candidates, 5, quantile, ids)
    rows, columns = graph.nonzero()
    num_lost = 0
    for row in range(200):
        found = columns[rows == row]
        assert ids[row] not in ids[found]
        # Each neighboring candidate by one pair, and those whose neighbor the pair itself is.
        num_lost += len(expected[row] - set(ids[found]))
        others = [pair for pair in found if ids[pair] not in expected[row]]
        assert all(ids[row] in expected[pair] for pair in others)
    # A pair of a rare candidate is claimed by 4 · 5 others at the most.
    assert num_lost < 0.1 * sum(map(len, expected))
    if with_index:
        assert int(index.num_candidates) == len(set(ids))


def test_positives_of_the_query_are_no_neighbors():
    rng = np.random.default_rng(0)
    users, items = np.repeat(np.arange(60), 5), rng.permutation(300) % 150
    # Whoever likes an item is near all that he likes.
    centres, noise = rng.normal(size=[60, 16]), 0.1 * rng.normal(size=[2, 300, 16])
    queries, candidates = (centres[users] + noise).astype(np.float32)
    known = set(zip(users.tolist(), items.tolist()))

    def share_of_known(order, batch_size):
        batches = order.reshape([-1, batch_size])
        others = [(i, j) for batch in batches for i in batch for j in batch if i != j]
        return np.mean([(users[i], items[j]) in known for i, j in others])

    graph = neighbor_graph(
        queries, candidates, num_neighbors=4, candidate_ids=items, query_ids=users
    )
    rows, columns = graph.nonzero()
    assert len(rows) and all(
        (users[i], items[j]) not in known and (users[j], items[i]) not in known
        for i, j in zip(rows, columns)
    )
    arguments = {"num_neighbors": 4, "batch_size": 10, "grow": True, "candidate_ids": items}
    without = contrastive_order(queries, candidates, **arguments)
    order = contrastive_order(queries, candidates, query_ids=users, **arguments)
    assert_permutation(order, 300)
    assert share_of_known(order, 10) < 0.2 * share_of_known(without, 10)


def test_neighbors_are_found_behind_the_positives():
    # The ten candidates of a query are nearest to it; those of the next query come after them.
    users = np.repeat(np.arange(6), 10)
    angles = users + 0.01 * np.random.default_rng(0).uniform(size=60)
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    graph = neighbor_graph(embeddings, embeddings, num_neighbors=3, query_ids=users)
    rows, columns = graph.nonzero()
    assert set(rows.tolist()) == set(range(60))
    assert np.all(np.isin(np.abs(users[rows] - users[columns]), [1, 5]))


def test_a_pair_that_all_are_near_does_not_spoil_the_order():
    queries, candidates, labels = planted([16] * 40, 0)
    hub = np.full([1, 40], 0.3, np.float32)
    queries, candidates = np.concatenate([queries, hub]), np.concatenate([candidates, 9 * hub])
    order = contrastive_order(queries, candidates, num_neighbors=8)
    labels = np.append(labels, 40)[order][:640].reshape([40, 16])
    # Chance would be about 13 of 16.
    assert np.mean([len(set(batch)) for batch in labels]) < 5


def test_equally_frequent_candidates_make_a_graph_for_each_of_their_pairs():
    # Two clusters of five candidates: each has three pairs.
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(10), 3))
    centres = np.repeat(np.eye(2), 5, axis=0) + 0.1 * rng.uniform(size=[10, 2])
    queries = candidates = centres[labels].astype(np.float32)
    graph = neighbor_graph(queries, candidates, num_neighbors=4, candidate_ids=labels)
    num_components, component = scipy.sparse.csgraph.connected_components(graph)
    assert num_components == 6
    for number in range(6):
        own = labels[component == number]
        assert len(own) == 5 and len(set(own)) == 5 and len(set(own // 5)) == 1


def test_neighbor_graph_of_an_index():
    queries, candidates = random_embeddings(300)
    index = TreeIndex(300, 8)
    exact = neighbor_graph(queries, candidates, num_neighbors=4)
    found = neighbor_graph(queries, candidates, num_neighbors=4, index=index)
    # A search by leaves misses some.
    assert found.multiply(exact).nnz > 0.8 * exact.nnz
    assert_permutation(contrastive_order(queries, candidates, index=index), 300)
    with pytest.raises(ValueError, match="300"):
        neighbor_graph(queries, candidates, index=TreeIndex(200, 8))


@hypothesis.given(
    st.lists(st.integers(4, 30), min_size=2, max_size=8), st.integers(1, 3), st.integers(0, 2**16)
)
def test_bandwidth_never_exceeds_that_of_shuffled_pairs(sizes, num_neighbors, seed):
    queries, candidates, _ = planted(sizes, seed)
    graph = neighbor_graph(queries, candidates, num_neighbors=num_neighbors)
    order = contrastive_order(queries, candidates, num_neighbors=num_neighbors, seed=seed)
    # Fewer neighbors than a cluster has: no edge leaves it, and a component is in one piece.
    assert bandwidth(graph, order) < max(sizes)
    rng = np.random.default_rng(seed)
    shuffled = [bandwidth(graph, rng.permutation(len(order))) for _ in range(3)]
    assert bandwidth(graph, order) <= min(shuffled)


@hypothesis.given(st.integers(2, 12), st.integers(2, 12), st.integers(0, 2**16))
def test_planted_clusters_share_batches(size, num_clusters, seed):
    queries, candidates, labels = planted([size] * num_clusters, seed)
    order = contrastive_order(queries, candidates, num_neighbors=size - 1, seed=seed)
    batches = labels[order].reshape([num_clusters, size])
    assert np.all(batches == batches[:, :1])


def test_noisy_clusters_share_batches_more_than_by_chance():
    queries, candidates, labels = planted([32] * 20, 0, noise=0.5)

    def clusters_in_a_batch(order):
        return np.mean([len(set(batch)) for batch in labels[order].reshape([20, 32])])

    order = contrastive_order(queries, candidates)
    grown = contrastive_order(queries, candidates, batch_size=32, grow=True)
    assert_permutation(grown, 640)
    # By chance a batch has pairs of 20 · (1 - (1 - 1/20)³²) = 16 clusters.
    assert clusters_in_a_batch(grown) < clusters_in_a_batch(order) < 14


@pytest.mark.parametrize("make", [np.zeros, np.ones])
def test_equal_embeddings_come_in_random_order(make):
    order = contrastive_order(make([200, 4], np.float32), make([200, 4], np.float32))
    assert_permutation(order, 200)
    # The mean distance of neighbors in a random order is a third of N.
    assert 40 < np.mean(np.abs(np.diff(order))) < 100


def test_duplicates_are_neighbors():
    queries, candidates = random_embeddings(60, dim=32)
    queries = candidates
    twice = np.concatenate([queries, queries]), np.concatenate([candidates, candidates])
    order = contrastive_order(*twice, num_neighbors=1)
    places = np.argsort(order)
    # The two of a pair find one another and nobody else.
    assert np.max(np.abs(places[:60] - places[60:])) == 1


def test_the_seed_decides():
    queries, candidates = random_embeddings(100)
    first, again, other = (contrastive_order(queries, candidates, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float64])
def test_other_dtypes(dtype):
    # Exact in 8 bits.
    queries, candidates = np.random.default_rng(0).integers(-4, 5, [2, 50, 4]).astype(np.float32)
    expected = contrastive_order(queries, candidates)
    result = contrastive_order(tf.cast(queries, dtype), tf.cast(candidates, dtype))
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("kind", ["int", "bytes", "str"])
def test_pairs_of_one_candidate_are_kept_apart(kind, grow):
    queries, candidates, labels = planted([4] * 8, 0)
    ids = {
        "int": labels,
        "bytes": np.array([b"%d" % label for label in labels], object),
        "str": np.array([f"ü{label}" for label in labels]),
    }[kind]
    order = contrastive_order(queries, candidates, candidate_ids=ids, batch_size=4, grow=grow)
    assert_permutation(order, 32)
    assert all(len(set(batch)) == 4 for batch in labels[order].reshape([8, 4]).tolist())


def test_a_candidate_too_frequent_is_warned_of():
    queries, candidates = random_embeddings(20)
    ids = np.where(np.arange(20) < 6, 7, np.arange(20) + 100)
    message = "1 of 20 pairs will share a batch .*: one candidate is in 6 pairs"
    with pytest.warns(UserWarning, match=message):
        order = contrastive_order(queries, candidates, candidate_ids=ids, batch_size=4)
    assert np.all(np.any(ids[order].reshape([5, 4]) == 7, axis=1))


def test_traced_once():
    queries, candidates = random_embeddings(1100, dim=5)
    search = order_module._compiled_search(5, None)
    for num_pairs in (1100, 30, 700):
        contrastive_order(queries[:num_pairs], candidates[:num_pairs])
    assert search.experimental_get_tracing_count() == 1


def test_progress_bar(capsys):
    queries, candidates = random_embeddings(50)
    contrastive_order(queries, candidates)
    assert capsys.readouterr().out == ""
    contrastive_order(queries, candidates, verbose=1)
    assert "50/50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate_embeddings": np.zeros([9, 4])}, r"same shape.*\(10, 4\) and \(9, 4\)"),
        ({"candidate_embeddings": np.zeros([10, 3])}, r"same shape.*\(10, 4\) and \(10, 3\)"),
        ({"query_embeddings": np.zeros([10])}, r"`query_embeddings` must be .*\(10,\)"),
        ({"query_embeddings": np.zeros([10, 4], int)}, "`query_embeddings` must be .* int64"),
        ({"num_neighbors": 0}, "`num_neighbors` must be an integer >= 1. Received: 0"),
        ({"num_neighbors": 1.5}, "`num_neighbors` must be an integer >= 1. Received: 1.5"),
        ({"quantile": 1.0}, r"`quantile` must lie in \[0, 1\). Received: 1.0"),
        ({"quantile": -0.1}, r"`quantile` must lie in \[0, 1\). Received: -0.1"),
        ({"quantile": float("nan")}, r"`quantile` must lie in \[0, 1\). Received: nan"),
        ({"quantile": "0.9"}, r"`quantile` must lie in \[0, 1\). Received: '0.9'"),
        ({"block_size": 0}, "`block_size` must be an integer >= 1. Received: 0"),
        ({"index": 5}, "`index` must be a `TreeIndex`. Received: 5"),
        ({"query_ids": np.arange(9)}, r"`query_ids` must be .* shape \[10\].*\(9,\)"),
        ({"seed": -1}, "`seed` must be an integer >= 0. Received: -1"),
        ({"grow": True}, "`grow` needs `batch_size`"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1. Received: 0"),
        ({"candidate_ids": np.arange(9)}, r"`candidate_ids` must be .* shape \[10\].*\(9,\)"),
        ({"candidate_ids": np.zeros(10)}, "`candidate_ids` must be .* dtype float64"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"query_embeddings": np.zeros([10, 4]), "candidate_embeddings": np.zeros([10, 4])}
    with pytest.raises(ValueError, match=message):
        contrastive_order(**{**arguments, **change})


@pytest.mark.parametrize("name", ["query_embeddings", "candidate_embeddings"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e25])
def test_embeddings_that_are_not_finite(name, value):
    queries, candidates = random_embeddings(10)
    arguments = {"query_embeddings": queries, "candidate_embeddings": candidates}
    arguments[name][[4, 7], 2] = value
    with pytest.raises(ValueError, match=f"`{name}` .* must be finite.* Received 2 rows .* row 4"):
        contrastive_order(**arguments)


def test_public_names():
    import negative_cache

    assert negative_cache.contrastive_order is batching.contrastive_order
    assert negative_cache.GlobalContrastiveBatches is batching.GlobalContrastiveBatches
    assert {"bandwidth", "neighbor_graph"} <= set(batching.__all__)
