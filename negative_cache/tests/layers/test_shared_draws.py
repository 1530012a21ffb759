"""Tests that draws which all queries share give every variable the gradient of all rows.

In expectation, with a stated confidence. The caches are stale but for one test: the draws are then
of what the cache holds, and the gradient is of what the tower is now.
"""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import TreeIndex
from negative_cache.layers._negatives.batch import Queries
from negative_cache.layers._negatives.draws import Draws, shared_weights
from negative_cache.layers._negatives.rows import DrawnRows
from negative_cache.layers._negatives.scores import Scores
from negative_cache.ops import _small_blocks, shared_draws
from negative_cache.tests.layers.retrieval_cases import DIM, make_queries, make_task
from negative_cache.tests.layers.shared_draw_cases import (
    CASES,
    EMPTY_AT_FIRST,
    IDS,
    TABLE,
    Case,
    Sampler,
    make_frozen,
)
from negative_cache.tests.statistics import assert_mean_is

pytestmark = pytest.mark.one_keras

# Σ_x ω̃_x and strata differ much between these.
NUM_DRAWS = 2


@pytest.mark.parametrize("name", CASES)
def test_every_variable_gets_the_gradient_of_all_rows(name):
    case = CASES[name]
    task = make_frozen(case, num_draws=NUM_DRAWS, filled=name not in EMPTY_AT_FIRST)
    sampler = Sampler(case, task)
    expected = sampler.expected()
    for weight, part, values in zip(sampler.weights, expected, sampler.many(500)):
        assert np.any(part != 0.0), weight.name
        assert_mean_is(values, part)


def test_what_is_not_drawn_has_no_weight():
    # An index may draw a row and find that it is none of the query's: nothing is drawn then.
    queries, law = Queries(tf.constant(make_queries(2)), None, None), tf.zeros([2])
    known, are_drawn = tf.gather(TABLE, [3, 0, 5]), tf.constant([True, False, True])
    drawn = DrawnRows({}, are_drawn, known, known, None, None, None)
    weights = shared_weights(queries, drawn, law, tf.constant([0.5, 0.5])).numpy()
    np.testing.assert_array_equal(weights > 0.0, [[True, False, True]] * 2)


def test_a_score_that_does_not_count_may_be_anything():
    queries, rows = tf.constant([[1.0, 0.0], [0.0, 1.0]]), tf.constant([[2.0, -1.0], [3.0, 4.0]])
    weights = tf.constant([[0.5, 0.25], [0.0, 0.75]])
    draws = Draws(weights, are_shared=True)
    with tf.GradientTape() as tape:
        tape.watch([queries, rows])
        # Of the second query, the first draw has the score log -1.
        mean = draws.mean_score(Scores(None, tf.math.log), queries, rows)
    expected = [0.5 * np.log(2.0) + 0.25 * np.log(3.0), 0.75 * np.log(4.0)]
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    by_queries, by_rows = tape.gradient(mean, [queries, rows])
    # Σ_j w_xj y_j / ⟨x, y_j⟩, and Σ_x w_xj x / ⟨x, y_j⟩.
    expected = [[0.5 + 0.25, -0.5 / 2 + 0.25 * 4 / 3], [0.75 * 3 / 4, 0.75]]
    np.testing.assert_allclose(by_queries, expected, rtol=1e-5)
    np.testing.assert_allclose(by_rows, [[0.25, 0.0], [0.25 / 3, 0.75 / 4]], rtol=1e-5)


def test_the_choice_of_a_query_and_the_draw_for_it_share_no_random_number(monkeypatch):
    numbers = {}

    def recording(module):
        exact = module.draw_uniforms

        def draw(shape, seed):
            found = exact(shape, seed)
            numbers.setdefault(module, []).append(found.numpy().reshape(-1))
            return found

        monkeypatch.setattr(module, "draw_uniforms", draw)

    recording(shared_draws)
    recording(_small_blocks)
    task = make_frozen(Case(), num_draws=6)
    sampler = Sampler(Case(), task)
    for _ in range(5):
        sampler.gradients()
    choices, draws = (np.stack(part) for part in numbers.values())
    # Three for each draw: its block, its group, and its place there.
    assert choices.shape == (5, 6) and draws.shape == (5, 18)
    every = np.concatenate([choices, draws], axis=1)
    assert len(np.unique(every)) == every.size


@pytest.mark.parametrize("num_draws", [1, 5, 9])
def test_any_number_of_draws_has_that_mean(num_draws):
    case = Case({"exact_query_gradient": False})
    task = make_frozen(case, num_draws=num_draws)
    encoded = int(task.cached.num_encoded)
    sampler = Sampler(case, task)
    for part, values in zip(sampler.expected(), sampler.many(500)):
        assert_mean_is(values, part)
    # With one step before the loop.
    assert int(task.cached.num_encoded) - encoded == 501 * num_draws


@pytest.mark.parametrize("cached", [[7], [7, 1]])
def test_a_cache_of_fewer_rows_than_draws(cached):
    case = Case(cached=cached)
    sampler = Sampler(case, make_frozen(case, num_draws=9))
    for part, values in zip(sampler.expected(), sampler.many(300)):
        assert_mean_is(values, part)


def test_a_fresh_cache_leaves_the_queries_gradient_without_variance():
    case = CASES["in-batch, accidental hits"]
    sampler = Sampler(case, make_frozen(case, stale=TABLE, num_draws=NUM_DRAWS))
    expected = sampler.expected()
    by_query, by_table = sampler.many(300)
    np.testing.assert_allclose(by_query, np.tile(expected[0], [300, 1, 1]), rtol=1e-4, atol=1e-5)
    assert_mean_is(by_table, expected[1])
    assert np.max(by_table.std(axis=0)) > 0.01


def test_more_draws_have_less_variance():
    variances = {}
    for num_draws in (2, 8):
        case = Case({"exact_query_gradient": False})
        by_query, by_table = Sampler(case, make_frozen(case, num_draws=num_draws)).many(400)
        variances[num_draws] = by_query.var(axis=0).sum() + by_table.var(axis=0).sum()
    # Strata make it better than a fourth.
    assert variances[8] < 0.3 * variances[2]


def test_as_many_shared_draws_as_queries_have_less_variance_than_their_own():
    case = Case({"exact_query_gradient": False})
    variances = []
    for kwargs in ({"num_draws": len(IDS)}, {"num_negatives": 1}):
        by_query, by_table = Sampler(case, make_frozen(case, **kwargs)).many(400)
        variances.append(by_query.var(axis=0).sum() + by_table.var(axis=0).sum())
    assert variances[0] < 0.7 * variances[1]


def test_an_index_that_estimates_has_nearly_that_gradient():
    # 60 candidates in leaves of 4, two of which are opened.
    rng = np.random.default_rng(3)
    table = rng.normal(size=[60, DIM]).astype(np.float32)
    cached = list(range(5, 60))
    index = TreeIndex(len(cached), DIM, leaf_size=4, branching=4, beam=2)
    task = make_task(
        table, len(cached), filled_with=cached, index=index, num_draws=8, reduction="sum"
    )
    task.cached.end_step = lambda batch, contribution: None
    queries, by_table = make_queries(len(IDS)), []
    tower = task.candidate_network

    @tf.function
    def gradient():
        features = {"id": tf.constant(IDS, tf.int64)}
        with tf.GradientTape() as tape:
            loss = task(tf.constant(queries), tf.constant(table[IDS]), features, training=True)
        weight = tower.table if isinstance(tower.table, tf.Variable) else tower.table.value
        return tf.convert_to_tensor(tape.gradient(loss, weight))

    by_table = np.mean([gradient() for _ in range(300)], axis=0)
    scores = queries.astype(np.float64) @ table[cached].T
    log_partition = np.logaddexp.reduce(scores, axis=1)
    positive = np.sum(queries * table[IDS], axis=1)
    share = 1.0 / (1.0 + np.exp(positive - log_partition))
    law = np.exp(scores - log_partition[:, np.newaxis])
    expected = np.zeros_like(table)
    expected[cached] = np.einsum("b,by,bd->yd", share, law, queries)
    error = np.linalg.norm(by_table - expected) / np.linalg.norm(expected)
    assert error < 0.15, error
