"""Tests of `CachedRetrieval` with a corrector: the corrected law, and who gets which gradient."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache._compat import keras
from negative_cache.layers import Cache, CachedRetrieval, Corrector, NystromCorrector, TreeIndex
from negative_cache.layers._tree.draws import transformed
from negative_cache.ops.tree.cut import Scoring
from negative_cache.ops.tree.law import proposal_log_law
from negative_cache.tests.layers.corpus_cases import (
    corrected_rows,
    drifted,
    losses_of,
    make_corpus_task,
    set_tower,
    step,
    teach,
)
from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    Table,
    call,
    make_queries,
    make_table,
    make_task,
)
from negative_cache.tests.replicas import on_two_replicas, two_replicas
from negative_cache.tests.statistics import assert_draws_follow

SIZE = 12
both = pytest.mark.parametrize(
    "make", [lambda: Corrector(8), lambda: NystromCorrector(SIZE)], ids=["network", "landmarks"]
)


def taught_task(table, corrector, *, steps=3, **kwargs):
    """A task whose rows have different ages, and whose corrector moves them."""
    task = make_corpus_task(table, corrector=corrector, **kwargs)
    for turn in range(steps):
        step(task, make_queries(1), [3 * turn])
    teach(corrector, table, drifted(table), age=2)
    assert len(set(task.cache.age.numpy())) > 1
    assert np.max(np.abs(corrected_rows(task) - task.cache.embeddings)) > 0.05
    return task


# The law.


@pytest.mark.one_keras
@both
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16])
def test_the_loss_is_over_corrected_embeddings(make, dtype):
    table, queries, ids = make_table(SIZE), make_queries(3), [4, 4, 9]
    task = taught_task(table, make(), reduction="none", cache={"embedding_dtype": dtype})
    now = drifted(table)
    loss = call(task, queries, ids, now, training=False)
    expected = losses_of(queries, corrected_rows(task), now, ids)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    stale = tf.cast(task.cache.embeddings, tf.float32).numpy()
    assert np.max(np.abs(loss - losses_of(queries, stale, now, ids))) > 0.01


@both
def test_the_loss_of_a_training_step_has_the_same_value(make):
    table, queries, ids = make_table(SIZE), make_queries(3), [4, 4, 9]
    task = taught_task(table, make())
    losses = [call(task, queries, ids, table, training=training) for training in (False, True)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.one_keras
@both
def test_draws_follow_the_corrected_law(make):
    table, query = make_table(SIZE), make_queries(1)
    task = taught_task(table, make())
    task.cached.num_negatives = 20000
    rows = corrected_rows(task).astype(np.float64)
    draws = []
    encode = task.cached.encode
    task.cached.encode = lambda features, training=False: (
        draws.append(features["id"].numpy()),
        encode(features, training),
    )[1]
    step(task, query, [4])
    law = np.exp(query[0] @ rows.T)
    law[4] = 0.0
    assert_draws_follow(draws[0], law / law.sum())


@both
def test_a_corrector_of_a_cache_that_streams(make):
    table, queries = make_table(SIZE), make_queries(2)
    corrector = make()
    task = make_task(table, SIZE, filled_with=range(8), corrector=corrector, reduction="none")
    step(task, queries, [8, 9])
    teach(corrector, table, drifted(table), age=2)
    loss = call(task, queries, [10, 11], table, training=False)
    rows = corrected_rows(task)[task.cache.filled.numpy()].astype(np.float64)
    for i in range(2):
        positive = queries[i].astype(np.float64) @ table[10 + i]
        partition = np.logaddexp.reduce([positive, *(queries[i] @ rows.T)])
        np.testing.assert_allclose(loss[i], partition - positive, rtol=1e-4)


# What is learned.


@pytest.mark.one_keras
@both
def test_a_drift_is_learned_while_training(make):
    table = make_table(SIZE)
    task = make_corpus_task(table, corrector=make(), num_negatives=8, write_back=False)
    now = drifted(table, 0.1)
    set_tower(task, now)
    weights = task.corrector.trainable_variables
    optimizer = keras.optimizers.Adam(0.02)
    optimizer.build(weights)
    for turn in range(60):
        with tf.GradientTape() as tape:
            loss = step(task, make_queries(4, seed=turn), [turn % SIZE] * 4)
        if weights:
            optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights))
    before = np.sum(np.square(table - now))
    assert np.sum(np.square(corrected_rows(task) - now)) < before / 5


def test_chosen_landmarks_are_not_written_back():
    table = make_table(SIZE)
    corrector = NystromCorrector(6, landmarks="k-means++", kernel="linear", ridge=1e-3)
    task = make_corpus_task(table, corrector=corrector, write_back=False)
    set_tower(task, drifted(table, 0.1))
    for turn in range(6):
        step(task, make_queries(1, seed=turn), [0])
    np.testing.assert_array_equal(task.cache.embeddings, table)
    before = np.sum(np.square(table - drifted(table, 0.1)))
    assert np.sum(np.square(corrected_rows(task) - drifted(table, 0.1))) < before / 5


@pytest.mark.one_keras
@pytest.mark.parametrize(
    "make",
    [
        lambda: Corrector(4),
        lambda: NystromCorrector(6),
        lambda: NystromCorrector(6, landmarks="uniform"),
    ],
    ids=["network", "encoded landmarks", "chosen landmarks"],
)
def test_candidates_that_have_become_nan_teach_nothing(make):
    table = make_table(SIZE)
    task = make_corpus_task(table, corrector=make(), num_negatives=6, refresh_fraction=0.5)
    for turn in range(6):
        now = drifted(table, 0.02 * turn)
        now[::3] = np.nan
        set_tower(task, now)
        weights = task.corrector.trainable_variables
        with tf.GradientTape() as tape:
            loss = step(task, make_queries(2, seed=turn), [1, 2])
        for gradient in tape.gradient(loss, weights):
            assert np.all(np.isfinite(gradient))
        for weight in weights:
            weight.assign_add(tf.ones_like(weight) * 0.01)
        assert np.all(np.isfinite(corrected_rows(task)))


# Gradients.


def gradients(drift_loss, *, reduction="sum_over_batch_size", exact=False):
    """The loss of a step and its gradients by the towers and by the corrector's weights."""
    keras.utils.set_random_seed(0)
    table, queries = make_table(SIZE), tf.Variable(make_queries(3))
    corrector = None if drift_loss is None else Corrector(8, drift_loss=drift_loss)
    task = make_corpus_task(
        table,
        corrector=corrector,
        num_negatives=4,
        reduction=reduction,
        exact_query_gradient=exact,
        in_batch_negatives=True,
    )
    step(task, make_queries(1), [3])
    if corrector is not None:
        teach(corrector, table, drifted(table), age=2)
    set_tower(task, drifted(table))
    tower = task.candidate_network
    features = {"id": tf.constant([4, 5, 9], tf.int64)}
    weights = [] if corrector is None else corrector.trainable_variables
    if corrector is not None:
        learn, losses = corrector.learn, []

        def learn_and_tell(*args, **kwargs):
            losses.append(learn(*args, **kwargs))
            return losses[-1]

        corrector.learn = learn_and_tell
    with tf.GradientTape(persistent=True) as tape:
        loss = task(queries, tower(features), features, training=True)
        drift = losses[0] if weights else None
    by_towers = tape.gradient(loss, [queries, tower.table])
    by_towers[1] = tf.convert_to_tensor(by_towers[1])
    alone = tape.gradient(drift, weights) if weights else []
    to_towers = tape.gradient(drift, [queries, tower.table]) if weights else [None, None]
    return loss, by_towers, tape.gradient(loss, weights), alone, to_towers


@pytest.mark.parametrize("exact", [False, True])
def test_towers_do_not_see_the_loss_of_the_corrector(exact):
    results = [gradients(drift_loss, exact=exact) for drift_loss in ("mse", "cross_entropy")]
    (loss, by_towers, by_weights, _, to_towers), (other, by_towers_too, by_weights_too, *_) = (
        results
    )
    assert float(loss) == float(other)
    for left, right in zip(by_towers, by_towers_too):
        np.testing.assert_array_equal(left, right)
        assert np.max(np.abs(left)) > 1e-3
    assert to_towers == [None, None]
    # Which are different losses of the corrector.
    assert not np.allclose(by_weights[0], by_weights_too[0], rtol=0.1)


@pytest.mark.parametrize("drift_loss", ["mse", "cross_entropy"])
def test_the_corrector_does_not_see_the_loss_of_the_task(drift_loss):
    _, _, by_weights, alone, _ = gradients(drift_loss)
    for gradient, expected in zip(by_weights, alone):
        assert np.max(np.abs(expected)) > 1e-6
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


# With an index.


def make_index(**kwargs):
    return TreeIndex(SIZE, DIM, **{"leaf_size": 4, "branching": 4, **kwargs})


@pytest.mark.one_keras
@both
def test_with_everything_opened_an_index_gives_the_corrected_loss(make):
    table, queries, ids = make_table(SIZE), make_queries(3), [4, 4, 9]
    index = make_index(beam=500, correction_steps=0)
    task = taught_task(table, make(), reduction="none", cache={"index": index})
    loss = call(task, queries, ids, table, training=False)
    expected = losses_of(queries, corrected_rows(task), table, ids)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.one_keras
@both
def test_an_index_is_kept_and_its_bounds_are_of_stale_embeddings(make):
    table, queries = make_table(SIZE), make_queries(3)
    index = make_index()
    task = taught_task(table, make(), cache={"index": index}, refresh_fraction=0.2)
    set_tower(task, drifted(table))
    for turn in range(3):
        # Of as many as in the steps before: the update of the index is not traced again.
        step(task, queries[:1], [turn])
        rows = task.cache.embeddings.numpy()
        np.testing.assert_array_equal(index._candidates.embeddings, rows)
        lower, upper = index.log_partition_bounds(queries)
        exact = np.logaddexp.reduce(queries.astype(np.float64) @ rows.T, axis=1)
        assert np.all(lower <= exact) and np.all(exact <= upper)


def by_row(rows):
    """A transform of embeddings that differs from row to row; of means, by the average."""
    shift = np.random.default_rng(5).normal(size=[rows, 1]).astype(np.float32)

    def transform(embeddings, ids):
        if ids is None:
            return 1.2 * embeddings
        return 1.2 * embeddings + 0.3 * tf.gather(shift, ids)

    return transform, shift


def test_draws_of_an_index_follow_the_stated_law_of_corrected_candidates(root_width):
    table = make_table(60)
    query = make_queries(1)
    index = TreeIndex(60, DIM, leaf_size=4, branching=4, beam=2)
    index.index(table, verbose=0)
    transform, shift = by_row(60)
    sample, log_probability = index.sample_with_log_probability(
        query, 20000, correction_steps=0, seed=3, row_transform=transform
    )
    tree = transformed(index.tree, index._candidates, transform)
    law = proposal_log_law(tree, Scoring(tf.constant(query)), index.beam)[0]
    np.testing.assert_allclose(np.exp(law).sum(), 1.0, atol=1e-4)
    draws = sample.indices.numpy()[0]
    np.testing.assert_allclose(law[draws], log_probability[0], atol=1e-4)
    assert_draws_follow(draws, np.exp(law) / np.exp(law).sum())
    moved = 1.2 * table + 0.3 * shift
    np.testing.assert_allclose(sample.scores[0], (query @ moved.T)[0, draws], rtol=1e-4, atol=1e-5)


def test_correction_steps_lead_to_the_corrected_softmax(root_width):
    table, query = make_table(60), 0.5 * make_queries(1)
    index = TreeIndex(60, DIM, leaf_size=4, branching=4, beam=1)
    index.index(table, verbose=0)
    transform, shift = by_row(60)
    sample = index.sample(query, 4000, correction_steps=40, seed=4, row_transform=transform)
    law = np.exp(query[0].astype(np.float64) @ (1.2 * table + 0.3 * shift).T)
    assert_draws_follow(sample.indices.numpy(), law / law.sum())


def test_coded_candidates_are_not_transformed():
    index = TreeIndex(60, DIM, store_embeddings=False, residual_bytes=1)
    index.index(make_table(60), verbose=0)
    with pytest.raises(ValueError, match="`row_transform` needs an index with store_embeddings"):
        index.sample(make_queries(1), row_transform=by_row(60)[0])


# Content.


def test_the_content_of_rows_is_seen():
    table, words = make_table(SIZE), np.eye(SIZE, dtype=np.float32)[:, :5]
    tower = Table(table)
    features = {"id": np.arange(SIZE), "words": words}
    dataset = tf.data.Dataset.from_tensor_slices(features).batch(5)
    cache = Cache.from_dataset(dataset, tower, candidate_id_key="id", verbose=0)
    corrector = Corrector(8, content_key="words")
    task = CachedRetrieval(tower, cache=cache, corrector=corrector, reduction="none", seed=1)
    queries, ids = make_queries(2), np.array([4, 9])
    batch = {"id": tf.constant(ids), "words": tf.constant(words[ids])}
    for _ in range(3):
        task(tf.constant(queries), tf.constant(table[ids]), batch, training=True)
    for weight in corrector.trainable_variables:
        weight.assign(np.random.default_rng(0).normal(size=weight.shape))
    corrector._state.agreement.assign([1.0, 1.0])
    corrector._state.typical_age.assign(2.0)
    corrected = corrector(cache.embeddings, cache.age, words).numpy()
    loss = task(tf.constant(queries), tf.constant(table[ids]), batch, training=False)
    np.testing.assert_allclose(loss, losses_of(queries, corrected, table, ids), rtol=1e-4)
    others = corrector(cache.embeddings, cache.age, words[::-1]).numpy()
    assert not np.allclose(corrected, others, atol=0.01)


# As a graph.


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: Corrector(8), id="network"),
        pytest.param(
            lambda: NystromCorrector(6), id="encoded landmarks", marks=pytest.mark.one_keras
        ),
        pytest.param(
            lambda: NystromCorrector(6, landmarks="uniform", num_encoded=2), id="chosen landmarks"
        ),
    ],
)
@pytest.mark.parametrize(
    "jit_compile",
    [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.one_keras])],
)
def test_a_compiled_training_is_traced_once(make, jit_compile):
    table = make_table(SIZE)
    task = make_corpus_task(
        table, corrector=make(), refresh_fraction=0.1, probe_size=4, probe_every=2
    )
    variables = [*task.candidate_network.trainable_variables, *task.corrector.trainable_variables]
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(variables)
    traces = []

    @tf.function(jit_compile=jit_compile)
    def compiled(ids):
        traces.append(None)
        with tf.GradientTape() as tape:
            loss = task(
                tf.ones([4, DIM]), task.candidate_network({"id": ids}), {"id": ids}, training=True
            )
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return loss

    for start in range(0, 40, 4):
        assert np.isfinite(compiled(tf.range(start, start + 4, dtype=tf.int64) % SIZE))
        task.refresh_cache(batch_size=SIZE, verbose=0)
    assert len(traces) == 1
    assert np.all(np.isfinite(corrected_rows(task)))
    assert task.cached._untracked.reencode.experimental_get_tracing_count() == 1


@both
def test_replicas_learn_each_from_what_it_has_encoded(make):
    table = make_table(SIZE)
    with two_replicas().scope():
        task = make_corpus_task(table, corrector=make(), num_negatives=3)

    def replica_step():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        ids = tf.cast(tf.range(2) + 2 * replica, tf.int64)
        candidates = tf.gather(table, ids) + 1.0
        task(tf.ones([2, DIM]), candidates, {"id": ids}, training=True)
        return task.cache.age, task.cache.rows_of(ids), task.corrector._state.num_updates + 0

    step_on_both = on_two_replicas(replica_step)
    for _ in range(2):
        results = step_on_both()
    for replica, (age, rows, num_updates) in enumerate(results):
        positives = [2 * replica, 2 * replica + 1]
        assert rows.numpy().tolist() == positives
        assert np.all(age.numpy()[positives] == 0) and np.max(age) == 2
        assert int(num_updates) == 2


class LearnedScale(keras.layers.Layer):
    """Scores by a temperature that is learned."""

    def __init__(self):
        super().__init__()
        self.scale = self.add_weight(name="scale", shape=(), initializer="ones")

    def call(self, products):
        return products * tf.convert_to_tensor(self.scale)


def test_the_drift_loss_does_not_reach_a_learned_temperature():
    gradients = []
    for drift_loss in ("mse", "cross_entropy"):
        table, scale = make_table(9, seed=3), LearnedScale()
        corrector = Corrector(8, drift_loss=drift_loss)
        task = make_corpus_task(table, corrector=corrector, score_transform=scale)
        set_tower(task, drifted(table))
        with tf.GradientTape() as tape:
            loss = step(task, make_queries(3, seed=5), [0, 1, 2])
        gradients.append(float(tape.gradient(loss, scale.scale)))
    assert gradients[0] != 0.0
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-6)
