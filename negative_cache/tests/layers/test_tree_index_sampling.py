"""Tests of what `TreeIndex` draws and finds: the law of draws, corrections, search."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache.layers import TreeIndex
from negative_cache.ops.tree.cut import Scoring
from negative_cache.ops.tree.law import law_after_correction, proposal_log_law, total_variation
from negative_cache.tests.layers.tree_cases import (
    DIM,
    clustered,
    filled_index,
    make_index,
    queries_of,
)
from negative_cache.tests.statistics import assert_draws_follow
from negative_cache.tests.tree_invariants import check_tree, log_partition

pytestmark = pytest.mark.one_keras


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
    law = proposal_log_law(index.tree, Scoring(tf.constant(queries), transform), 2)
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
    proposal = np.exp(proposal_log_law(index.tree, Scoring(tf.constant(query)), 1))[0]
    sample = index.sample(query, 20000, beam=1, correction_steps=steps, seed=3)
    expected = law_after_correction(proposal / proposal.sum(), target, steps)
    assert_draws_follow(sample.indices.numpy()[0], expected / expected.sum())
    # Each step brings it nearer to the softmax.
    distances = [
        total_variation(law_after_correction(proposal / proposal.sum(), target, k), target)
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
    np.testing.assert_allclose(law_after_correction(proposal, target, 3), expected, atol=1e-12)


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
    proposal = np.exp(proposal_log_law(index.tree, Scoring(tf.constant(queries)), 4))
    rebuilt = TreeIndex(2000, DIM, beam=4)
    rebuilt.index(rows, verbose=0)
    fresh = np.exp(proposal_log_law(rebuilt.tree, Scoring(tf.constant(queries)), 4))
    distance, best = (np.mean(total_variation(its, law)) for its in (proposal, fresh))
    assert distance < 2.0 * best + 0.02


def test_draws_for_chosen_queries_have_their_laws(root_width):
    rng = np.random.default_rng(15)
    index, _ = filled_index(rng)
    queries = queries_of(rng, 4, scale=1.0)
    seen, chosen = [], [3, 0, 3]

    def choose(log_partition):
        seen.append(log_partition)
        return tf.constant(chosen)

    sample, gradient = index.sample_with_gradient(
        queries, 10000, correction_steps=0, seed=2, choose_queries=choose
    )
    expected, its_gradient = index.sample_with_gradient(queries, 1, correction_steps=0)
    # Log Z and its gradient are of all queries, and what the choice is made by.
    np.testing.assert_allclose(sample.log_partition, expected.log_partition, rtol=1e-6)
    np.testing.assert_allclose(seen, [expected.log_partition], rtol=1e-6)
    np.testing.assert_allclose(gradient, its_gradient, rtol=1e-4, atol=1e-5)
    law = np.exp(proposal_log_law(index.tree, Scoring(tf.constant(queries)), 2))
    for draws, query in zip(sample.indices.numpy(), chosen, strict=True):
        assert_draws_follow(draws, law[query] / law[query].sum())
    # Of one query, two draws in the same place are independent.
    assert np.mean(sample.indices[0] == sample.indices[2]) < 0.5


def test_chosen_queries_keep_their_positives_limits_and_faults(root_width):
    rng = np.random.default_rng(11)
    index, vectors = filled_index(rng)
    queries = np.stack([vectors[3], vectors[8], vectors[20], vectors[30]]) * 3
    queries[2] = np.nan
    rows = np.stack(list(vectors.values()))
    positives = np.array([[0, 0], [8, 9], [0, 0], [30, 31]])
    limits = np.array([np.inf, 1e3, np.inf, np.median(queries[3] @ rows.T)], np.float32)
    chosen = [3, 2, 1, 3]
    sample, _ = index.sample_with_gradient(
        queries,
        500,
        beam=500,
        positive_ids=tf.constant(positives),
        max_scores=limits,
        choose_queries=lambda _: tf.constant(chosen),
        seed=3,
    )
    scores = queries @ rows.T
    for i, own in enumerate(positives):
        scores[i, own] = -np.inf
        scores[i, scores[i] > limits[i]] = -np.inf
    found, others = sample.log_partition.numpy(), [0, 1, 3]
    expected = np.logaddexp.reduce(scores[others], axis=1)
    np.testing.assert_allclose(found[others], expected, rtol=1e-4)
    assert not np.isfinite(found[2])
    np.testing.assert_array_equal(sample.indices[1], [-1] * 500)
    for draws, query in zip(sample.indices.numpy(), chosen):
        assert query == 2 or np.all(np.isfinite(scores[query, draws]))


def test_without_draws_there_are_log_z_and_its_gradient(root_width):
    rng = np.random.default_rng(16)
    index, _ = filled_index(rng)
    queries = queries_of(rng, 3)
    queries[1] = np.inf
    expected, its_gradient = index.sample_with_gradient(queries, 2)
    sample, gradient = index.sample_with_gradient(queries, 0)
    assert sample.indices.shape == sample.scores.shape == [3, 0]
    np.testing.assert_array_equal(sample.log_partition, expected.log_partition)
    np.testing.assert_array_equal(gradient, its_gradient)
    np.testing.assert_array_equal(index.sample(queries, 0).log_partition, sample.log_partition)
    empty = make_index()
    nothing, no_gradient = empty.sample_with_gradient(queries[:1], 0)
    assert np.all(np.isneginf(nothing.log_partition)) and np.all(no_gradient == 0.0)
