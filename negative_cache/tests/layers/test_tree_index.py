"""Tests of `TreeIndex`: its invariants, its bounds, and what it refuses."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from negative_cache._compat import keras
from negative_cache.layers import TreeIndex
from negative_cache.layers import tree_index as tree_index_module
from negative_cache.ops import tree_law
from negative_cache.ops.tree_cut import Scoring
from negative_cache.tests.replicas import two_replicas
from negative_cache.tests.statistics import assert_draws_follow
from negative_cache.tests.tree_invariants import check_tree, log_partition

DIM = 6


@pytest.fixture(params=[4096, 12], ids=["one level", "many levels"])
def root_width(request, monkeypatch):
    """Trees of one node level, and of several."""
    monkeypatch.setattr(tree_index_module, "_MAX_ROOT_WIDTH", request.param)
    return request.param


def make_index(capacity=300, **arguments):
    return TreeIndex(capacity, DIM, **{"leaf_size": 6, "branching": 4, "beam": 2, **arguments})


def clustered(rng, count, dim=DIM):
    """Vectors of four clusters: [count, dim] float32."""
    centres = np.random.default_rng(0).normal(size=[4, dim])
    rows = centres[rng.integers(4, size=count)] + 0.2 * rng.normal(size=[count, dim])
    return rows.astype(np.float32)


def queries_of(rng, count, scale=3.0):
    return (scale * rng.normal(size=[count, DIM])).astype(np.float32)


def filled_index(rng, count=200, **arguments):
    index = make_index(**arguments)
    rows = clustered(rng, count)
    index.index(rows, verbose=0)
    return index, dict(enumerate(rows))


def assert_bounds(index, queries, vectors, **arguments):
    lower, upper = index.log_partition_bounds(queries, **arguments)
    expected = log_partition(queries, vectors)
    assert np.all(lower.numpy() <= expected), lower.numpy() - expected
    assert np.all(upper.numpy() >= expected), upper.numpy() - expected
    return upper.numpy() - lower.numpy()


def test_an_empty_tree(root_width):
    index = make_index()
    check_tree(index, {})
    queries = queries_of(np.random.default_rng(0), 2)
    sample, log_probability = index.sample_with_log_probability(queries, 3)
    np.testing.assert_array_equal(sample.indices, -np.ones([2, 3]))
    np.testing.assert_array_equal(sample.scores, np.full([2, 3], -np.inf))
    np.testing.assert_array_equal(sample.log_partition, [-np.inf] * 2)
    assert not np.any(np.isnan(log_probability))
    for bound in index.log_partition_bounds(queries):
        np.testing.assert_array_equal(bound, [-np.inf] * 2)
    scores, indices = index.top_k(queries, 2)
    np.testing.assert_array_equal(indices, -np.ones([2, 2]))
    np.testing.assert_array_equal(scores, np.full([2, 2], -np.inf))
    _, gradient = index.sample_with_gradient(queries)
    np.testing.assert_array_equal(gradient, np.zeros([2, DIM]))


def test_a_tree_built_at_once(root_width):
    rng = np.random.default_rng(1)
    index, vectors = filled_index(rng)
    check_tree(index, vectors)
    assert_bounds(index, queries_of(rng, 4), vectors)


@functools.cache
def shared_index(is_deep):
    """One that examples build anew: its functions are traced once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_index_module, "_MAX_ROOT_WIDTH", 12 if is_deep else 4096)
        return make_index(capacity=120)


@given(seed=st.integers(0, 2**16), is_deep=st.booleans(), start=st.integers(0, 60))
@settings(max_examples=12)
def test_invariants_and_bounds_hold_after_any_sequence_of_changes(seed, is_deep, start):
    rng = np.random.default_rng(seed)
    index = shared_index(is_deep)
    skipped = int(index.num_skipped)
    index.index(clustered(rng, start), verbose=0)
    vectors = {i: row for i, row in enumerate(index._candidates.embeddings.numpy()[:start])}
    for _ in range(12):
        kind = rng.choice(
            ["move", "jump", "collapse", "remove", "tighten"], p=[0.4, 0.3, 0.1, 0.1, 0.1]
        )
        ids = rng.choice(120, 24, replace=False)
        rows = clustered(rng, 24)
        if kind == "tighten":
            index.tighten()
            continue
        if kind == "remove":
            index.remove(ids)
            vectors = {i: row for i, row in vectors.items() if i not in set(ids.tolist())}
            continue
        if kind == "move":
            near = np.stack([vectors.get(i, row) for i, row in zip(ids.tolist(), rows)])
            rows = (near + 0.05 * rng.normal(size=near.shape)).astype(np.float32)
        if kind == "collapse":
            rows[:] = rows[0]
        index.update(ids, rows)
        vectors.update(zip(ids.tolist(), rows))
    check_tree(index, vectors)
    queries = queries_of(rng, 4, scale=10.0 ** rng.uniform(-2, 1.5))
    loose = assert_bounds(index, queries, vectors, beam=int(rng.integers(1, 30)))
    assert int(index.num_skipped) == skipped
    index.tighten()
    check_tree(index, vectors)
    if vectors:
        tight = assert_bounds(index, queries, vectors, beam=30)
        assert np.all(tight <= loose + 1e-2 * (1 + np.abs(loose)))


def test_thousands_of_updates():
    rng = np.random.default_rng(3)
    index, vectors = filled_index(rng, count=300)
    for step in range(150):
        ids = rng.choice(300, 32, replace=False)
        drift = 0.3 if step % 5 == 0 else 0.02
        rows = np.stack([vectors[i] for i in ids.tolist()]) + drift * rng.normal(size=[32, DIM])
        rows = rows.astype(np.float32)
        index.update(ids, rows)
        vectors.update(zip(ids.tolist(), rows))
        if step % 25 == 0:
            assert_bounds(index, queries_of(rng, 4), vectors)
    check_tree(index, vectors)


@given(
    temperature=st.floats(0.02, 5.0),
    dim=st.integers(1, 40),
    count=st.integers(1, 300),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=15)
def test_bounds_of_random_trees(temperature, dim, count, seed):
    rng = np.random.default_rng(seed)
    index = TreeIndex(300, dim, leaf_size=8, branching=4, beam=int(rng.integers(1, 9)))
    rows = clustered(rng, count, dim) * np.float32(10.0 ** rng.uniform(-2, 1))
    index.index(rows, verbose=0)
    queries = rng.normal(size=[5, dim]).astype(np.float32)
    lower, upper = index.log_partition_bounds(queries, temperature=temperature)
    expected = log_partition(queries.astype(np.float64) / temperature, dict(enumerate(rows)))
    assert np.all(lower.numpy() <= expected) and np.all(expected <= upper.numpy())


def test_bounds_with_a_transform_contain_the_log_partition(root_width):
    rng = np.random.default_rng(4)
    index, vectors = filled_index(rng)
    queries = queries_of(rng, 5)
    lower, upper = index.log_partition_bounds(queries, score_transform=tf.nn.softplus)
    rows = np.stack(list(vectors.values())).astype(np.float64)
    scores = np.logaddexp(0.0, queries.astype(np.float64) @ rows.T)
    expected = np.logaddexp.reduce(scores, axis=1)
    assert np.all(lower.numpy() <= expected) and np.all(expected <= upper.numpy())


def test_opening_everything_is_exact(root_width):
    rng = np.random.default_rng(5)
    index, vectors = filled_index(rng, count=90)
    queries = queries_of(rng, 3)
    expected = log_partition(queries, vectors)
    sample, log_probability = index.sample_with_log_probability(
        queries, 2000, beam=500, correction_steps=0, seed=1
    )
    np.testing.assert_allclose(sample.log_partition, expected, rtol=1e-5)
    np.testing.assert_allclose(
        log_probability, sample.scores - sample.log_partition[:, None], atol=1e-5
    )
    rows = np.stack(list(vectors.values()))
    probabilities = np.exp(queries @ rows.T - expected[:, np.newaxis])
    for draws, law in zip(sample.indices.numpy(), probabilities):
        assert_draws_follow(draws, law / law.sum())
    _, gradient = index.sample_with_gradient(queries, beam=500)
    np.testing.assert_allclose(gradient, probabilities @ rows, rtol=1e-3, atol=1e-4)
    scores, indices = index.top_k(queries, 7, beam=500)
    products = queries @ rows.T
    np.testing.assert_array_equal(indices, np.argsort(-products, axis=1)[:, :7])
    np.testing.assert_allclose(scores, -np.sort(-products, axis=1)[:, :7], rtol=1e-5)


def test_a_search_opens_the_best_node_and_not_the_heaviest():
    rng = np.random.default_rng(5)
    # Six candidates in one place, and one in another, which is nearer to the query.
    many, one = np.eye(2, DIM, dtype=np.float32)
    rows = np.concatenate([many + 1e-3 * rng.normal(size=[6, DIM]), one[np.newaxis]])
    index = make_index(capacity=7)
    index.index(rows.astype(np.float32), verbose=0)
    query = (0.5 * many + one)[np.newaxis]
    # 6 exp 0.5 > exp 1.
    scores, indices = index.top_k(query, 1, beam=1)
    np.testing.assert_array_equal(indices, [[6]])
    np.testing.assert_allclose(scores, [[1.0]], rtol=1e-6)


def test_a_search_for_more_than_the_opened_leaves_hold(root_width):
    rng = np.random.default_rng(5)
    index, vectors = filled_index(rng)
    queries = queries_of(rng, 3)
    # One leaf has 6 slots.
    scores, indices = index.top_k(queries, 20, beam=1)
    found = indices.numpy() >= 0
    assert scores.shape == indices.shape == (3, 20)
    assert np.all(found[:, 0]) and not np.any(found[:, 6:])
    np.testing.assert_array_equal(np.isneginf(scores), ~found)
    rows = np.stack(list(vectors.values()))
    products = np.take_along_axis(queries @ rows.T, np.maximum(indices, 0), axis=1)
    np.testing.assert_allclose(scores.numpy()[found], products[found], rtol=1e-5)


@pytest.mark.parametrize("transform", [None, tf.nn.softplus])
def test_draws_have_the_stated_law(root_width, transform):
    rng = np.random.default_rng(6)
    index, vectors = filled_index(rng)
    queries = queries_of(rng, 2, scale=1.0)
    sample, log_probability = index.sample_with_log_probability(
        queries, 20000, correction_steps=0, seed=2, score_transform=transform
    )
    law = tree_law.proposal_log_law(index.tree, Scoring(tf.constant(queries), transform), 2)
    np.testing.assert_allclose(np.exp(law).sum(axis=1), 1.0, atol=1e-4)
    for draws, their_law, stated in zip(sample.indices.numpy(), law, log_probability.numpy()):
        np.testing.assert_allclose(their_law[draws], stated, atol=1e-4)
        assert_draws_follow(draws, np.exp(their_law) / np.exp(their_law).sum())


@pytest.mark.parametrize("steps", [1, 3])
def test_corrected_draws_have_the_law_of_the_chain(steps):
    rng = np.random.default_rng(7)
    index, vectors = filled_index(rng, count=60)
    query = queries_of(rng, 1, scale=1.0)
    rows = np.stack(list(vectors.values())).astype(np.float64)
    target = np.exp(query.astype(np.float64) @ rows.T)[0]
    target = np.append(target / target.sum(), np.zeros(300 - len(rows)))
    proposal = np.exp(tree_law.proposal_log_law(index.tree, Scoring(tf.constant(query)), 1))[0]
    sample = index.sample(query, 20000, beam=1, correction_steps=steps, seed=3)
    expected = tree_law.law_after_correction(proposal / proposal.sum(), target, steps)
    assert_draws_follow(sample.indices.numpy()[0], expected / expected.sum())
    # Each step brings it nearer to the softmax.
    distances = [
        tree_law.total_variation(
            tree_law.law_after_correction(proposal / proposal.sum(), target, k), target
        )
        for k in range(6)
    ]
    assert distances[0] > 0.005 and np.all(np.diff(distances) < 0.0)


def test_many_corrections_give_the_softmax():
    rng = np.random.default_rng(8)
    index, vectors = filled_index(rng, count=60)
    query = queries_of(rng, 1, scale=0.5)
    rows = np.stack(list(vectors.values())).astype(np.float64)
    target = np.exp(query.astype(np.float64) @ rows.T)[0]
    sample = index.sample(query, 4000, beam=1, correction_steps=40, seed=4)
    assert_draws_follow(sample.indices.numpy()[0], target / target.sum())


def test_the_law_after_correction_is_that_of_the_transition_matrix():
    rng = np.random.default_rng(9)
    proposal, target = rng.dirichlet(np.ones(7)), rng.dirichlet(np.ones(7))
    target[2] = 0.0
    target /= target.sum()
    weight = target / proposal
    matrix = np.zeros([7, 7])
    for x in range(7):
        for y in range(7):
            if x != y:
                ratio = 1.0 if weight[x] == 0 else min(1.0, weight[y] / weight[x])
                matrix[x, y] = proposal[y] * (0.0 if weight[y] == 0 else ratio)
        matrix[x, x] = 1.0 - matrix[x].sum()
    expected = proposal @ np.linalg.matrix_power(matrix, 3)
    np.testing.assert_allclose(
        tree_law.law_after_correction(proposal, target, 3), expected, atol=1e-12
    )


def test_the_gradient_is_that_of_the_log_partition(root_width):
    rng = np.random.default_rng(10)
    index, _ = filled_index(rng)
    queries = queries_of(rng, 2, scale=1.0)
    _, gradient = index.sample_with_gradient(queries, temperature=0.5)
    step = 1e-2
    for column in range(DIM):
        shift = np.zeros([1, DIM], np.float32)
        shift[0, column] = step
        # By the queries divided by the temperature.
        above, below = (
            index.sample(queries + sign * 0.5 * shift, temperature=0.5).log_partition
            for sign in (1.0, -1.0)
        )
        np.testing.assert_allclose(
            gradient[:, column], (above - below) / (2 * step), rtol=0.05, atol=0.02
        )


def test_positives_and_high_scores_are_left_out(root_width):
    rng = np.random.default_rng(11)
    index, vectors = filled_index(rng)
    queries = np.stack([vectors[3], vectors[8]]) * 3
    rows = np.stack(list(vectors.values()))
    ids = tf.range(300, dtype=tf.int64) // 4
    positives = tf.constant([0, 2], tf.int64)
    sample = index.sample(queries, 500, candidate_ids=ids, positive_ids=positives, beam=500, seed=1)
    scores = queries @ rows.T
    scores[0, 0:4] = scores[1, 8:12] = -np.inf
    np.testing.assert_allclose(sample.log_partition, np.logaddexp.reduce(scores, axis=1), rtol=1e-5)
    for draws, left_out in zip(sample.indices.numpy(), (range(4), range(8, 12))):
        assert not set(draws.tolist()) & set(left_out)
    # Without opening all of them too, nothing left out is ever drawn.
    sample = index.sample(queries, 500, candidate_ids=ids, positive_ids=positives, seed=1)
    for draws, left_out in zip(sample.indices.numpy(), (range(4), range(8, 12))):
        assert not set(draws.tolist()) & set(left_out)
    limits = np.sort(queries @ rows.T, axis=1)[:, -5]
    scores = queries @ rows.T
    scores[scores > limits[:, np.newaxis] + 1e-5] = -np.inf
    sample = index.sample(queries, 500, max_scores=limits + 1e-5, beam=500, seed=1)
    np.testing.assert_allclose(sample.log_partition, np.logaddexp.reduce(scores, axis=1), rtol=1e-5)
    for draws, left_out in zip(sample.indices.numpy(), np.isneginf(scores)):
        assert not set(draws.tolist()) & set(np.flatnonzero(left_out).tolist())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_embeddings_of_half_precision(dtype):
    rng = np.random.default_rng(12)
    index, vectors = filled_index(rng, embedding_dtype=dtype)
    ids = rng.choice(200, 50, replace=False)
    rows = clustered(rng, 50)
    index.update(ids, rows)
    vectors.update(zip(ids.tolist(), rows))
    kept = {i: tf.cast(tf.cast(row, dtype), tf.float32).numpy() for i, row in vectors.items()}
    check_tree(index, kept)
    assert_bounds(index, queries_of(rng, 3), kept)


def test_rows_that_are_not_finite_are_skipped_and_counted():
    rng = np.random.default_rng(13)
    rows = clustered(rng, 40)
    rows[3], rows[17, 1] = np.nan, np.inf
    index = make_index()
    index.index(rows, verbose=0)
    vectors = {i: row for i, row in enumerate(rows) if i not in (3, 17)}
    check_tree(index, vectors)
    assert int(index.num_skipped) == 2
    new = clustered(rng, 3)
    new[1, 2] = np.nan
    index.update([3, 5, 50], new)
    vectors.update({3: new[0], 50: new[2]})
    check_tree(index, vectors)
    assert int(index.num_skipped) == 3


def test_in_a_graph_bad_indices_are_skipped_and_counted():
    rng = np.random.default_rng(14)
    index, vectors = filled_index(rng)
    update = tf.function(index.update)
    rows = clustered(rng, 6)
    update(tf.constant([4, -1, 300, 4, 2**40, 7], tf.int64), tf.constant(rows))
    vectors.update({4: rows[0], 7: rows[5]})
    check_tree(index, vectors)
    assert int(index.num_skipped) == 4


@pytest.mark.parametrize("dtype, far", [("float32", 1e20), ("float16", 7e4), ("bfloat16", 3e38)])
def test_rows_too_long_to_be_squared_are_skipped_and_counted(root_width, dtype, far):
    rng = np.random.default_rng(14)
    index, vectors = filled_index(rng, embedding_dtype=dtype)
    vectors = {i: tf.cast(tf.cast(row, dtype), tf.float32).numpy() for i, row in vectors.items()}
    index.update([3, 250], np.full([2, DIM], far, np.float32))
    check_tree(index, vectors)
    assert int(index.num_skipped) == 2
    assert_bounds(index, queries_of(rng, 2), vectors)
    rows = np.stack(list(vectors.values()))
    rows[7] = far
    index.index(rows, verbose=0)
    check_tree(index, {i: row for i, row in enumerate(rows) if i != 7})
    assert int(index.num_skipped) == 3


def test_queries_without_a_law_draw_nothing(root_width):
    rng = np.random.default_rng(14)
    index, _ = filled_index(rng)
    queries = queries_of(rng, 3)
    queries[0, 1], queries[2] = np.nan, np.inf
    sample = index.sample(queries, 4)
    np.testing.assert_array_equal(sample.indices[0::2], -np.ones([2, 4]))
    assert np.all(sample.indices[1] >= 0)
    assert not np.any(np.isfinite(sample.log_partition[0::2]))


def test_scores_above_a_limit_are_left_out_of_the_masses_of_nodes():
    rng = np.random.default_rng(14)
    index = TreeIndex(4000, DIM, beam=4)
    rows = clustered(rng, 4000)
    index.index(rows, verbose=0)
    queries = queries_of(rng, 8, scale=2.0)
    scores = queries @ rows.T
    limits = np.median(scores, axis=1)
    left = np.where(scores <= limits[:, np.newaxis], scores, -np.inf)
    expected = np.logaddexp.reduce(left, axis=1)
    error = np.abs(index.sample(queries, max_scores=limits).log_partition - expected)
    without = np.abs(index.sample(queries).log_partition - expected)
    assert np.mean(error) < 0.5 < 3.0 < np.mean(without)


def test_draws_stay_near_the_softmax_as_candidates_drift():
    rng = np.random.default_rng(14)
    index = TreeIndex(2000, DIM, beam=4)
    rows = clustered(rng, 2000)
    target = clustered(np.random.default_rng(99), 2000)
    index.index(rows, verbose=0)
    for step in range(10):
        rows = (rows + (target - rows) / (10 - step)).astype(np.float32)
        index.update(range(2000), rows)
    check_tree(index, dict(enumerate(rows)))
    queries = queries_of(rng, 8, scale=2.0)
    scores = queries.astype(np.float64) @ rows.T
    law = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
    proposal = np.exp(tree_law.proposal_log_law(index.tree, Scoring(tf.constant(queries)), 4))
    rebuilt = TreeIndex(2000, DIM, beam=4)
    rebuilt.index(rows, verbose=0)
    fresh = np.exp(tree_law.proposal_log_law(rebuilt.tree, Scoring(tf.constant(queries)), 4))
    distance, best = (np.mean(tree_law.total_variation(its, law)) for its in (proposal, fresh))
    assert distance < 2.0 * best + 0.02


def test_bounds_allow_for_the_rounding_of_scores():
    rng = np.random.default_rng(14)
    rows = np.full([50, DIM], 1.7, np.float32) + 1e-6 * rng.normal(size=[50, DIM])
    index = make_index()
    index.index(rows.astype(np.float32), verbose=0)
    queries = queries_of(rng, 50, scale=1e4)
    vectors = dict(enumerate(rows.astype(np.float32)))
    assert_bounds(index, queries, vectors, beam=1)
    assert_bounds(index, queries, vectors, beam=50)


@pytest.mark.parametrize(
    "transform", [tf.floor, lambda s: tf.where(s > 0.5, s, -np.inf)], ids=["floor", "cutoff"]
)
def test_bounds_with_transforms_that_are_flat_or_minus_infinity(root_width, transform):
    rng = np.random.default_rng(14)
    index, vectors = filled_index(rng)
    queries = queries_of(rng, 5)
    lower, upper = index.log_partition_bounds(queries, score_transform=transform, beam=2)
    scores = queries.astype(np.float64) @ np.stack(list(vectors.values())).T.astype(np.float64)
    expected = np.logaddexp.reduce(transform(tf.constant(scores)).numpy(), axis=1)
    assert np.all(lower.numpy() <= expected) and np.all(expected <= upper.numpy())


def test_a_strategy_is_known_outside_of_its_scope():
    rows = clustered(np.random.default_rng(14), 20)
    with two_replicas().scope():
        index = make_index()
    index.index(rows, verbose=0)
    index.update([30], rows[:1])
    results = two_replicas().run(lambda: index.num_candidates)
    counts = [int(count) for count in two_replicas().experimental_local_results(results)]
    assert counts == [21, 21]


def test_masked_entries_change_nothing():
    rng = np.random.default_rng(15)
    index, vectors = filled_index(rng)
    rows = clustered(rng, 3)
    index.update([2, 2, -7], rows, mask=[False, True, False])
    vectors[2] = rows[1]
    check_tree(index, vectors)
    index.update([5, 6], rows[:2], mask=[False, False])
    check_tree(index, vectors)
    assert int(index.num_skipped) == 0


def test_a_full_tree_without_free_blocks_still_takes_every_candidate():
    rng = np.random.default_rng(16)
    index = make_index(capacity=60)
    vectors = {}
    # Far apart, so that leaves hold few and no leaf is free in the end.
    for start in range(0, 60, 20):
        rows = (10.0 * rng.normal(size=[20, DIM])).astype(np.float32)
        index.update(range(start, start + 20), rows)
        vectors.update(zip(range(start, start + 20), rows))
    for _ in range(40):
        ids = rng.choice(60, 30, replace=False)
        rows = np.repeat(10.0 * rng.normal(size=[1, DIM]), 30, axis=0).astype(np.float32)
        index.update(ids, rows)
        vectors.update(zip(ids.tolist(), rows))
    check_tree(index, vectors)
    assert int(index.num_skipped) == 0


def test_does_not_retrace():
    rng = np.random.default_rng(17)
    index, vectors = filled_index(rng)
    traces = []

    @tf.function
    def step(ids, rows, queries):
        traces.append(None)
        index.update(ids, rows)
        return index.sample(queries, 2, seed=[0, 1])

    for _ in range(3):
        ids = rng.choice(300, 40, replace=False)
        rows = clustered(rng, 40)
        sample = step(tf.constant(ids), tf.constant(rows), tf.constant(queries_of(rng, 3)))
        vectors.update(zip(ids.tolist(), rows))
        assert np.all(sample.indices.numpy() >= 0)
    check_tree(index, vectors)
    assert len(traces) == 1


def test_two_replicas_have_trees_of_their_own():
    strategy = two_replicas()
    rng = np.random.default_rng(18)
    rows = clustered(rng, 20)
    with strategy.scope():
        index = make_index()
        index.index(rows[:12], verbose=0)

    @tf.function
    def step(new):
        def replica_step():
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            index.update([20 + replica], tf.gather(new, [replica]))
            return index.sample(tf.ones([1, DIM])).log_partition

        return strategy.run(replica_step)

    results = strategy.experimental_local_results(step(tf.constant(rows[12:14])))
    for replica, result in enumerate(results):
        vectors = dict(enumerate(rows[:12])) | {20: rows[12 + replica]}
        expected = log_partition(np.ones([1, DIM]), vectors)
        lower = expected - 1.0
        assert lower <= result.numpy() <= expected + 1.0


def test_codes_follow_the_directions_in_which_residuals_lie():
    rng = np.random.default_rng(20)
    basis = np.linalg.qr(rng.normal(size=[32, 8]))[0].T
    rows = (rng.normal(size=[2000, 8]) @ basis).astype(np.float32)
    index = TreeIndex(2000, 32, store_embeddings=False, residual_bytes=4)
    index.index(rows, verbose=0)
    queries = (rng.normal(size=[20, 8]) @ basis).astype(np.float32)
    scores, indices = index.top_k(queries, 2000, beam=100)
    products = np.take_along_axis(queries @ rows.T, indices.numpy(), axis=1)
    # Two of the eight directions to a byte leave 2^-8 of the variance at the least, k-means 0.006.
    # Eight coordinates in a row, each a mixture of all directions, leave 0.044.
    assert np.var(scores - products) < 0.02 * np.var(products)


def test_config_round_trip():
    index = make_index(store_embeddings=False, residual_bytes=2, beam=5, saved=False)
    config = index.get_config()
    assert TreeIndex.from_config(config).get_config() == config


@pytest.mark.parametrize("arguments", [{}, {"store_embeddings": False, "residual_bytes": 2}])
def test_a_checkpoint_and_a_keras_file_hold_the_tree(tmp_path, arguments):
    rng = np.random.default_rng(19)
    index, _ = filled_index(rng, **arguments)
    index.update(range(190, 210), clustered(rng, 20))
    queries = queries_of(rng, 3)
    expected = index.sample(queries, 3, seed=7)
    path = tf.train.Checkpoint(index=index).save(str(tmp_path / "checkpoint"))
    restored = make_index(**arguments)
    tf.train.Checkpoint(index=restored).restore(path).assert_consumed()
    inputs = keras.Input([1])
    weights = str(tmp_path / "model.weights.h5")
    models = []
    for tree in (index, make_index(**arguments)):
        model = keras.Model(inputs, inputs)
        model.tree = tree
        models.append(model)
    models[0].save_weights(weights)
    models[1].load_weights(weights)
    for tree in (restored, models[1].tree):
        for got, wanted in zip(tree.sample(queries, 3, seed=7), expected):
            np.testing.assert_array_equal(got, wanted)
        assert int(tree.num_candidates) == 210
    with pytest.raises(ValueError, match="Wanted"):
        tf.train.Checkpoint(index=make_index(capacity=400, **arguments)).restore(path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"capacity": 0}, "`capacity`"),
        ({"beam": 0}, "`beam`"),
        ({"correction_steps": -1}, "`correction_steps`"),
        ({"leaf_size": 1}, "`leaf_size`"),
        ({"leaf_size": 0}, "`leaf_size`"),
        ({"branching": 3}, "`branching`"),
        ({"embedding_dtype": "foo"}, "`embedding_dtype`"),
        ({"embedding_dtype": tf.float64}, "`embedding_dtype`"),
        ({"embedding_dtype": tf.int32}, "`embedding_dtype`"),
        ({"store_embeddings": False, "residual_bytes": 4}, "`residual_bytes`"),
    ],
)
def test_constructor_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_index(**arguments)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda index: index.index(np.zeros([3, 5], np.float32)), "`embeddings` must have shape"),
        (lambda index: index.index(np.zeros([3, DIM], np.int32)), "floating"),
        (lambda index: index.index(np.zeros([301, DIM], np.float32)), "`capacity`"),
        (lambda index: index.update([1], np.zeros([1, 5], np.float32)), "must have shape"),
        (lambda index: index.update([1, 2], np.zeros([1, DIM], np.float32)), "`indices`"),
        (lambda index: index.update([300], np.zeros([1, DIM], np.float32)), "300"),
        (lambda index: index.update([-1], np.zeros([1, DIM], np.float32)), "-1"),
        (lambda index: index.update([2, 2], np.zeros([2, DIM], np.float32)), "more than once: 2"),
        (lambda index: index.remove([1, 1]), "more than once"),
        (lambda index: index.sample(np.zeros([2, 5], np.float32)), "`query_embeddings`"),
        (lambda index: index.sample(np.zeros([2, DIM], np.float32), 0), "`num_samples`"),
        (lambda index: index.sample(np.zeros([2, DIM], np.float32), beam=0), "`beam`"),
        (lambda index: index.top_k(np.zeros([2, DIM], np.float32), 0), "`k`"),
        (lambda index: index.top_k(np.zeros([2, DIM], np.float32), 301), "`k`"),
        (
            lambda index: index.sample(np.zeros([2, DIM], np.float32), positive_ids=[1, 2]),
            "together",
        ),
        (
            lambda index: tf.function(index.index)(np.zeros([3, DIM], np.float32)),
            "`index` builds",
        ),
    ],
)
def test_calls_refuse_and_change_nothing(call, message):
    rng = np.random.default_rng(20)
    index, vectors = filled_index(rng, count=30)
    with pytest.raises(ValueError, match=message):
        call(index)
    check_tree(index, vectors)
