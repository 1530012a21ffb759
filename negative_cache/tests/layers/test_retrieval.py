"""Tests of `Retrieval`: what a list of sources of negatives can say."""

import numpy as np
import pytest
import tensorflow as tf

import negative_cache as nc
from negative_cache import (
    CachedRetrieval,
    CacheRefresh,
    CacheWarmStart,
    Explicit,
    FromCache,
    InBatch,
    Retrieval,
)
from negative_cache._compat import keras
from negative_cache.layers import Cache
from negative_cache.tests.layers.corpus_cases import corpus_of
from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    Table,
    call,
    cross_entropy,
    make_queries,
    make_table,
)
from negative_cache.tests.layers.source_cases import (
    SIZE,
    SPECS,
    TABLE,
    Anchors,
    corpus,
    make_model,
    pairs,
    stream,
)


def fill(source, ids):
    source.add({"id": tf.constant(ids, tf.int64)})


def losses_of(task, queries, ids, **kwargs):
    return call(task, queries, ids, TABLE, training=False, **kwargs).numpy()


def test_a_stream_and_a_corpus_in_one_loss():
    tower, queries, ids = Table(TABLE), make_queries(2), [0, 1]
    sources = [InBatch(), Explicit(), stream(), corpus(tower)]
    task = Retrieval(tower, sources, candidate_id_key="id", reduction="none", name="both")
    fill(sources[2], [5, 6, 7])
    explicit = TABLE[[[8], [9]]]
    found = losses_of(task, queries, ids, negative_embeddings=tf.constant(explicit))
    scores = queries.astype(np.float64) @ TABLE.T
    for i in range(2):
        # The stream's rows, which are in the corpus too; all of the corpus but the positive.
        negatives = [1 - i, 8 + i, 5, 6, 7, *(y for y in range(SIZE) if y != i)]
        assert found[i] == pytest.approx(
            cross_entropy(scores[i, i], scores[i, negatives]), rel=1e-5
        )


def test_two_caches_with_different_towers():
    other_table = make_table(SIZE, seed=7)
    tower, other = Table(TABLE), Table(other_table)
    archive = corpus(other, candidate_network=other, name="archive")
    lagging = stream(candidate_network=other, name="lagging")
    task = Retrieval(
        tower, [stream(name="own"), lagging, archive], candidate_id_key="id", reduction="none"
    )
    own = task.negatives[0]
    queries, ids = make_queries(2), [0, 1]
    fill(own, [5, 6])
    fill(lagging, [7])
    found = losses_of(task, queries, ids)
    scores = queries.astype(np.float64) @ TABLE.T
    other_scores = queries.astype(np.float64) @ other_table.T
    for i in range(2):
        of_archive = [other_scores[i, y] for y in range(SIZE) if y != i]
        negatives = [*scores[i, [5, 6]], other_scores[i, 7], *of_archive]
        assert found[i] == pytest.approx(cross_entropy(scores[i, i], negatives), rel=1e-5)
    call(task, queries, ids, TABLE, training=True)
    rows = lagging.cache.data
    where = np.flatnonzero(np.isin(rows["id"].numpy(), ids) & lagging.cache.filled.numpy())
    np.testing.assert_allclose(
        lagging.cache.embeddings.numpy()[where], other_table[rows["id"].numpy()[where]]
    )
    # Encoded by the other tower, draws are what they were, and nothing of the batch is a row.
    np.testing.assert_allclose(archive.cache.embeddings, other_table, rtol=1e-6)
    where = np.flatnonzero(np.isin(own.cache.data["id"].numpy(), ids) & own.cache.filled.numpy())
    np.testing.assert_allclose(
        own.cache.embeddings.numpy()[where], TABLE[own.cache.data["id"].numpy()[where]]
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_every_source_has_its_part_of_the_gradient_and_is_moved_on(compiled):
    tower = Table(TABLE)
    sources = [stream(num_negatives=2), corpus(tower, corrector=nc.Corrector(hidden_units=4))]
    task = Retrieval(tower, sources, candidate_id_key="id")

    def step(ids):
        with tf.GradientTape() as tape:
            loss = task(tf.constant(make_queries(3)), tower({"id": ids}), {"id": ids})
        variables = [tower.table, *task.negatives[1].corrector.trainable_variables]
        variables = [part if isinstance(part, tf.Variable) else part.value for part in variables]
        return loss, tape.gradient(loss, variables)

    # Something has gone stale.
    tower.table.assign(1.2 * TABLE)
    run = tf.function(step) if compiled else step
    for i in range(3):
        loss, gradients = run(tf.range(3, dtype=tf.int64) + i)
        assert np.isfinite(loss)
    assert np.any(tf.convert_to_tensor(gradients[0]).numpy() != 0.0)
    assert any(np.any(part.numpy() != 0.0) for part in gradients[1:])
    # A candidate that came again stands in another row.
    assert int(sources[0].cache.num_filled) == 6
    assert int(sources[1].cache.step) == 3
    # The corpus, the batches, and the draws of both.
    counted = {metric.name: float(metric.result()) for metric in task.training_metrics}
    assert counted["candidates_encoded"] == SIZE + 3 * (3 + 2 * 3 + 3)


def test_the_usual_list_is_what_cached_retrieval_builds():
    def train(make):
        tower = Table(TABLE)
        task = make(tower)
        ids, queries = tf.constant([0, 1, 2], tf.int64), tf.constant(make_queries(3))
        losses = []
        for _ in range(4):
            with tf.GradientTape() as tape:
                loss = task(queries, tower({"id": ids}), {"id": ids}, training=True)
            gradient = tf.convert_to_tensor(tape.gradient(loss, tower.trainable_variables[0]))
            losses += [loss.numpy(), gradient.numpy()]
        return losses, task

    options = {"temperature": 0.5, "candidate_id_key": "id", "remove_accidental_hits": True}
    by_options, usual = train(
        lambda tower: CachedRetrieval(
            tower,
            SPECS,
            6,
            in_batch_negatives=True,
            num_hard_negatives=1,
            num_negatives=2,
            seed=1,
            **options,
        )
    )
    by_list, _ = train(
        lambda tower: Retrieval(
            tower, [InBatch(num_hard=1), Explicit(), stream(num_negatives=2)], **options
        )
    )
    assert [type(source) for source in usual.negatives] == [InBatch, Explicit, FromCache]
    for a, b in zip(by_options, by_list):
        np.testing.assert_array_equal(a, b)


def test_a_cache_of_the_users_own_needs_no_further_columns():
    tower, queries = Table(TABLE), make_queries(2)
    specs = {**SPECS, "embedding": tf.io.FixedLenFeature([DIM], tf.float32)}
    source = FromCache(Cache(specs, 6), seed=1)
    task = Retrieval(
        tower, [source], candidate_id_key="id", remove_accidental_hits=True, reduction="none"
    )
    fill(source, [0, 5])
    scores = queries.astype(np.float64) @ TABLE.T
    expected = [cross_entropy(scores[0, 0], scores[0, [5]])]
    expected.append(cross_entropy(scores[1, 1], scores[1, [0, 5]]))
    np.testing.assert_allclose(losses_of(task, queries, [0, 1]), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="needs a cache that keeps it: give the source"):
        losses_of(task, queries, [0, 1], candidate_sampling_probability=tf.fill([2], 0.1))


# A source of one's own.


def test_a_source_of_ones_own_has_logits_state_and_a_loss_without_value():
    tower, queries, ids = Table(TABLE), make_queries(2), [0, 1]
    source = Anchors(2, penalty=0.25)
    task = Retrieval(tower, [source], temperature=0.5, reduction="none")
    anchors = source.anchors if isinstance(source.anchors, tf.Variable) else source.anchors.value
    with tf.GradientTape() as tape:
        losses = call(task, queries, ids, TABLE, training=True)
        total = tf.reduce_sum(losses)
    scores = queries.astype(np.float64) @ TABLE.T / 0.5
    negatives = np.tile(queries.astype(np.float64).sum(axis=1)[:, None] / 0.5, [1, 2])
    expected = [cross_entropy(scores[i, i], negatives[i]) for i in range(2)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    # d/da log(e^s⁺ + 2 e^s⁻) is half of the softmax's mass of the negatives times the query; and
    # the penalty is there once, not once a query.
    masses = [1.0 - np.exp(-loss) for loss in expected]
    gradient = sum(mass / 2 * query / 0.5 for mass, query in zip(masses, queries)) + 0.5
    np.testing.assert_allclose(tape.gradient(total, anchors), np.tile(gradient, [2, 1]), rtol=1e-4)
    call(task, queries, ids, TABLE, training=False)
    assert float(tf.convert_to_tensor(source.num_steps)) == 1.0


# Logs and callbacks.


def test_logs_of_several_caches_are_told_apart():
    tower = Table(TABLE)
    sources = [stream(), stream(), corpus(tower), stream(name="third")]
    task = Retrieval(tower, sources, candidate_id_key="id", name="task")
    found = [metric.name for metric in task.training_metrics if metric.name.endswith("fill")]
    assert found == [
        "task_from_cache_fill",
        "task_from_cache_2_fill",
        "task_from_corpus_fill",
        "task_third_fill",
    ]


def test_logs_and_callbacks_know_every_cache(tmp_path):
    model = make_model()
    history = model.fit(
        pairs(),
        epochs=2,
        verbose=0,
        callbacks=[
            CacheWarmStart(corpus_of(SIZE), verbose=0),
            CacheRefresh(every_steps=3, verbose=0),
            nc.CacheSummaries(str(tmp_path)),
        ],
    ).history
    assert {"stream_fill", "fill", "stream_staleness", "staleness", "candidates_encoded"} <= set(
        history
    )
    assert history["stream_fill"] == [1.0, 1.0]
    batches, draws, oldest = 2 * SIZE, 2 * (2 * SIZE) + 2 * SIZE, 2 * 4
    # A row of the first batch makes the cache. It is filled by two updates, of 5 rows and of 1, so
    # that its steps 3, 6 and 9 are the training's 1, 4 and 7. The corpus has the training's steps.
    warm_start, refreshes = 1 + 6, 3 * 6 + 2 * SIZE
    encoded = SIZE + batches + draws + oldest + warm_start + refreshes
    assert history["candidates_encoded"][-1] == encoded


def rows_of(source):
    return {key: tf.convert_to_tensor(values) for key, values in source.cache.data.items()}


def test_a_callback_can_be_about_one_source():
    model = make_model()
    stream_source, corpus_source = model.task.cached_negatives
    model.fit(pairs().take(1), verbose=0)
    stream_source.cache.update(new_items={k: v[:0] for k, v in rows_of(stream_source).items()})
    refresh = CacheRefresh(verbose=0, task=corpus_source)
    refresh.set_model(model)
    refresh.on_train_begin()
    refresh.on_epoch_begin(0)
    assert not np.any(corpus_source.cache.age)
    assert np.any(stream_source.cache.age)


def test_the_logs_of_an_evaluation_leave_out_what_only_training_measures():
    tower = Table(TABLE)
    task = Retrieval(tower, [stream()])

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.tower, self.task = tower, task

        def call(self, features, training=None):
            embeddings = self.tower(features)
            self.add_loss(self.task(embeddings, embeddings, features, training=bool(training)))
            return embeddings

        def test_step(self, data):
            return self.task.evaluation_logs(super().test_step(data))

    model = Model()
    model.compile(keras.optimizers.SGD(0.1))
    data = tf.data.Dataset.from_tensor_slices({"id": np.arange(SIZE)}).batch(3)
    history = model.fit(data, validation_data=data, verbose=2, epochs=3).history
    of_training = {metric.name for metric in task.training_metrics}
    assert {"staleness", "fill", "candidates_encoded"} <= of_training <= set(history)
    for name in of_training:
        assert len(history[name]) == 3 and np.all(np.isfinite(history[name]))
        assert f"val_{name}" not in history
    assert set(model.evaluate(data, verbose=2, return_dict=True)) == {"loss"}
