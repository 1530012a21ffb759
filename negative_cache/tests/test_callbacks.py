"""Tests of the callbacks inside `fit`."""

import copy

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import CachedRetrieval, CacheWarmStart, CorpusMetrics, DualEncoder
from negative_cache._compat import keras
from negative_cache.evaluation import evaluate, retrieval_metrics
from negative_cache.tests.replicas import two_replicas

NUM_CANDIDATES, DIM = 20, 4


class Tower(keras.layers.Layer):
    """Looks up row `features["id"]` of a table of embeddings."""

    def __init__(self, seed):
        super().__init__()
        values = np.random.default_rng(seed).normal(size=[NUM_CANDIDATES, DIM])
        self.table = self.add_weight(
            shape=values.shape, initializer=keras.initializers.Constant(values), name="table"
        )

    def call(self, features):
        return tf.gather(tf.convert_to_tensor(self.table), features["id"])


def make_model(cache_size=8, learning_rate=0.1, run_eagerly=True):
    # Eager unless the graph matters, because tracing `fit` takes seconds.
    tower = Tower(1)
    task = CachedRetrieval(tower, {"id": tf.io.FixedLenFeature([], tf.int64)}, cache_size, seed=1)
    model = DualEncoder(Tower(0), tower, task)
    model.compile(optimizer=keras.optimizers.SGD(learning_rate), run_eagerly=run_eagerly)
    return model


def candidates(count=NUM_CANDIDATES, batch=6):
    return tf.data.Dataset.from_tensor_slices({"id": np.arange(count)}).batch(batch)


def pairs(batch=4):
    ids = {"id": np.arange(NUM_CANDIDATES)}
    return tf.data.Dataset.from_tensor_slices({"query": ids, "candidate": ids}).batch(batch)


def ranks_of(model):
    queries, corpus = model.query_network.table, model.candidate_network.table
    scores = np.asarray(tf.convert_to_tensor(queries)) @ np.asarray(tf.convert_to_tensor(corpus)).T
    return np.sum(scores > np.diag(scores)[:, None] + 1e-6, axis=1)


class Recorder(keras.callbacks.Callback):
    """Keeps the logs of each epoch, as the callbacks after `CorpusMetrics` see them."""

    def __init__(self):
        super().__init__()
        self.logs, self.ranks = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))
        self.ranks.append(ranks_of(self.model))


@pytest.mark.parametrize("candidate_id_key", [None, "id"])
def test_corpus_metrics_are_in_the_logs_of_each_epoch(candidate_id_key):
    model, recorder = make_model(learning_rate=1.0), Recorder()
    metrics = CorpusMetrics(candidates(), pairs(3), k=(1, 5), candidate_id_key=candidate_id_key)
    history = model.fit(pairs(), epochs=3, verbose=0, callbacks=[metrics, recorder])
    for logs, ranks in zip(recorder.logs, recorder.ranks):
        for name, value in retrieval_metrics(ranks, (1, 5)).items():
            assert logs[f"val_{name}"] == pytest.approx(value)
    assert history.history["val_mrr"] == [logs["val_mrr"] for logs in recorder.logs]
    # Towers train, so that the numbers move.
    assert recorder.logs[0]["val_mrr"] != recorder.logs[2]["val_mrr"]


def listed_positives():
    """Validation batches in which query i has the positives i and i + 1, and has seen 0 and i."""
    ids = np.arange(NUM_CANDIDATES)
    positives = np.stack([ids, (ids + 1) % NUM_CANDIDATES], axis=1)
    excluded = np.stack([np.zeros_like(ids), ids], axis=1)
    parts = {"query": {"id": ids}, "positives": positives, "excluded": excluded}
    return tf.data.Dataset.from_tensor_slices(parts).batch(7)


def test_corpus_metrics_of_several_positives_are_in_the_logs():
    model = make_model()
    metrics = CorpusMetrics(candidates(), listed_positives(), k=[3], candidate_id_key="id")
    logs = model.fit(pairs(), verbose=0, callbacks=[metrics]).history
    expected = evaluate(model, candidates(), listed_positives(), [3], candidate_id_key="id")
    assert sorted(expected) == ["hit_rate_at_3", "mrr", "recall_at_3"]
    for name, value in expected.items():
        assert logs[f"val_{name}"] == [value]


def test_corpus_metrics_under_two_replicas_are_those_of_one():
    with two_replicas().scope():
        model = make_model(run_eagerly=False)
    recorder = Recorder()
    by_candidate = CorpusMetrics(candidates(), pairs(3), k=(1, 5), candidate_id_key="id")
    history = model.fit(pairs(), epochs=2, verbose=0, callbacks=[by_candidate, recorder]).history
    # The model trains, and what stands in the logs is of its weights at that time.
    assert history["val_mrr"][0] != history["val_mrr"][1]
    for logs, ranks in zip(recorder.logs, recorder.ranks):
        for name, value in retrieval_metrics(ranks, (1, 5)).items():
            assert logs[f"val_{name}"] == pytest.approx(value)
    alone = make_model()
    for name in ("query_network", "candidate_network"):
        table = getattr(model, name).table
        getattr(alone, name).table.assign(tf.convert_to_tensor(table))
    assert by_candidate.evaluate(alone) == by_candidate.evaluate(model)
    by_lists = CorpusMetrics(candidates(), listed_positives(), k=[3], candidate_id_key="id")
    assert by_lists.evaluate(alone) == by_lists.evaluate(model)


def test_corpus_metrics_of_any_model_whose_networks_are_given():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.users, self.movies = Tower(0), Tower(1)

        def call(self, inputs):
            return tf.reduce_sum(self.users(inputs) * self.movies(inputs), axis=1)

    model = Model()
    model.compile(optimizer="sgd", loss="mse", run_eagerly=True)
    data = tf.data.Dataset.from_tensors(({"id": np.arange(4)}, np.ones(4)))
    networks = (model.users, model.movies)
    metrics = CorpusMetrics(candidates(), pairs(), k=[2], networks=networks)
    logs = model.fit(data, verbose=0, callbacks=[metrics]).history
    expected = evaluate(networks, candidates(), pairs(), k=[2])
    assert {name: logs[f"val_{name}"] for name in expected} == {
        name: [value] for name, value in expected.items()
    }
    without = CorpusMetrics(candidates(), pairs())
    with pytest.raises(ValueError, match="must have `query_network` and `candidate_network`"):
        model.fit(data, verbose=0, callbacks=[without])


def test_corpus_metrics_need_a_model():
    with pytest.raises(ValueError, match="no model to evaluate"):
        CorpusMetrics(candidates(), pairs()).evaluate()


def test_corpus_metrics_compile_the_towers_once():
    calls = []

    class Counted(Tower):
        def call(self, features):
            calls.append(None)
            return super().call(features)

    tower = Counted(0)
    metrics = CorpusMetrics(candidates(), pairs(), networks=(tower, tower))
    for _ in range(3):
        metrics.evaluate()
    before = len(calls)
    metrics.evaluate()
    assert len(calls) == before


def test_corpus_metrics_every_so_many_epochs():
    model, recorder = make_model(), Recorder()
    metrics = CorpusMetrics(candidates(), pairs(), every=2)
    model.fit(pairs(), epochs=4, verbose=0, callbacks=[metrics, recorder])
    found = [logs.get("val_mrr") for logs in recorder.logs]
    assert found[0] is None and found[1] == found[2] > 0.0 and found[3] is not None


def test_early_stopping_monitors_a_corpus_metric():
    model = make_model(learning_rate=0.0)
    callbacks = [
        CorpusMetrics(candidates(), pairs()),
        keras.callbacks.EarlyStopping(monitor="val_mrr", mode="max", patience=2),
    ]
    history = model.fit(pairs(), epochs=20, verbose=0, callbacks=callbacks)
    # Nothing improves at a learning rate of zero: the first epoch, then two of patience.
    assert len(history.epoch) == 3


class Snapshots(keras.callbacks.Callback):
    """Keeps the weights and the cache's embeddings after each epoch."""

    def __init__(self):
        super().__init__()
        self.weights, self.caches = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(self.model.get_weights())
        self.caches.append(self.model.task.cache.embeddings.numpy())


def test_early_stopping_restores_the_best_weights_and_leaves_the_cache():
    # At this learning rate the MRR falls sooner or later.
    model, snapshots = make_model(learning_rate=30.0), Snapshots()
    callbacks = [
        CorpusMetrics(candidates(), pairs()),
        snapshots,
        keras.callbacks.EarlyStopping("val_mrr", mode="max", patience=2, restore_best_weights=True),
    ]
    history = model.fit(pairs(), epochs=20, verbose=0, callbacks=callbacks).history
    best = int(np.argmax(history["val_mrr"]))
    assert best == len(history["val_mrr"]) - 3 < 17
    kept, last = snapshots.weights[best], snapshots.weights[-1]
    for restored, expected in zip(model.get_weights(), kept):
        np.testing.assert_array_equal(restored, expected)
    assert any(np.any(a != b) for a, b in zip(kept, last))
    # The cache is no weight: it is as training has left it, and training can go on.
    np.testing.assert_array_equal(model.task.cache.embeddings, snapshots.caches[-1])
    assert np.any(snapshots.caches[best] != snapshots.caches[-1])
    assert callbacks[0].evaluate()["mrr"] == pytest.approx(max(history["val_mrr"]))
    model.task.refresh_cache(verbose=0)
    rows = model.task.cache.data["id"]
    expected = np.take(model.candidate_network.table, rows, axis=0)
    np.testing.assert_allclose(model.task.cache.embeddings, expected, rtol=1e-6)


def test_corpus_metrics_of_a_model_at_any_time(capsys):
    model = make_model()
    metrics = CorpusMetrics(candidates(), pairs(), k=[1], verbose=1)
    expected = retrieval_metrics(ranks_of(model), [1])
    assert metrics.evaluate(model) == pytest.approx(expected)
    # 20 candidates in batches of 6.
    assert "4/4" in capsys.readouterr().out


def test_corpus_metrics_follow_the_model_they_are_set_to():
    metrics = CorpusMetrics(candidates(), pairs(), k=[1])
    first, second = make_model(), make_model()
    second.query_network.table.assign(second.candidate_network.table)
    assert metrics.evaluate(first) == pytest.approx(retrieval_metrics(ranks_of(first), [1]))
    assert metrics.evaluate(second) == pytest.approx(retrieval_metrics(ranks_of(second), [1]))
    assert metrics.evaluate(first)["mrr"] != metrics.evaluate(second)["mrr"]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"k": ()}, "`k` must be positive cut-offs. Received: ()"),
        ({"k": (0, 1)}, "`k` must be positive cut-offs"),
        ({"every": 0}, "`every` must be at least 1. Received: 0"),
    ],
)
def test_corpus_metrics_refuse(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CorpusMetrics(candidates(), pairs(), **kwargs)


class LookAtBegin(keras.callbacks.Callback):
    """Looks at the cache before the first step."""

    def on_train_begin(self, logs=None):
        cache, strategy = self.model.task.cache, self.model.distribute_strategy
        self.embeddings = cache.embeddings.numpy()
        self.cached = [
            rows.numpy()[filled.numpy()].tolist()
            for rows, filled in zip(
                strategy.experimental_local_results(cache.data["id"]),
                strategy.experimental_local_results(strategy.run(lambda: cache.filled)),
            )
        ]


@pytest.mark.parametrize("count, cached", [(20, range(8)), (8, range(8)), (5, range(5))])
@pytest.mark.parametrize("batch", [3, 10])
def test_warm_start_fills_the_cache_before_the_first_step(count, cached, batch, capsys):
    model, look = make_model(cache_size=8), LookAtBegin()
    warm_start = CacheWarmStart(candidates(count, batch))
    model.fit(pairs(), epochs=1, verbose=0, callbacks=[warm_start, look])
    assert look.cached == [list(cached)]
    # The tower's table as it was made, before any step.
    table = np.random.default_rng(1).normal(size=[NUM_CANDIDATES, DIM])
    np.testing.assert_allclose(look.embeddings[: len(cached)], table[list(cached)], rtol=1e-6)
    out = capsys.readouterr().out
    assert f"{len(cached)}/8" in out
    # The bar is over: whatever is printed next has a line of its own.
    assert out.endswith("\n")


def test_warm_start_leaves_a_cache_with_rows_alone():
    model, look = make_model(), LookAtBegin()
    model.task.add_to_cache({"id": tf.constant([17], tf.int64)})
    model.fit(pairs(), epochs=1, verbose=0, callbacks=[CacheWarmStart(candidates()), look])
    assert look.cached == [[17]]


def test_warm_start_is_silent_where_asked(capsys):
    model = make_model()
    model.fit(pairs(), verbose=0, callbacks=[CacheWarmStart(candidates(), verbose=0)])
    assert capsys.readouterr().out == ""


def test_warm_start_fills_the_cache_of_every_replica():
    strategy = two_replicas()
    with strategy.scope():
        model = make_model(run_eagerly=False)
    look = LookAtBegin()
    model.fit(pairs(), epochs=1, verbose=0, callbacks=[CacheWarmStart(candidates()), look])
    assert look.cached == [list(range(8))] * 2


def test_warm_start_refuses_an_empty_dataset_and_a_task_without_cache():
    with pytest.raises(ValueError, match="dataset to fill the cache from is empty"):
        make_model().fit(pairs(), verbose=0, callbacks=[CacheWarmStart(candidates().take(0))])
    with pytest.raises(ValueError, match="There is no cache: the model needs"):
        make_model(cache_size=0).fit(pairs(), verbose=0, callbacks=[CacheWarmStart(candidates())])


def test_warm_start_reads_a_generator_from_its_first_batch_on():
    model = make_model(cache_size=8)
    warm_start = CacheWarmStart((batch for batch in candidates(8, batch=4)), verbose=0)
    warm_start.set_model(model)
    warm_start.on_train_begin()
    assert model.task.cache.data["id"].numpy().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def table_of(model):
    return tf.convert_to_tensor(model.candidate_network.table).numpy()


def test_a_checkpoint_of_the_best_epoch_is_that_of_an_epoch_that_was_evaluated(tmp_path):
    # Better at the first evaluation than at the second, and nobody knows of the epochs between.
    model, found = make_model(learning_rate=0.5), iter([0.5, 0.25])
    metrics = CorpusMetrics(candidates(), pairs(), every=2)
    metrics.evaluate = lambda model=None: {"mrr": next(found)}
    path = str(tmp_path / "best.weights.h5")
    best = keras.callbacks.ModelCheckpoint(
        path, monitor="val_mrr", mode="max", save_best_only=True, save_weights_only=True
    )
    tables = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: tables.append(table_of(model))
    )
    history = model.fit(pairs(), epochs=5, verbose=0, callbacks=[metrics, best, look]).history
    assert history["val_mrr"] == [0.5, 0.5, 0.25, 0.25]
    model.load_weights(path)
    np.testing.assert_array_equal(table_of(model), tables[1])
    assert np.any(tables[1] != tables[2])


@pytest.mark.parametrize(
    "make",
    [
        lambda: CacheWarmStart(candidates().unbatch()),
        lambda: CorpusMetrics(candidates().unbatch(), pairs()),
        lambda: CorpusMetrics(candidates(), pairs().unbatch()),
    ],
)
def test_datasets_without_batches_are_refused(make):
    with pytest.raises(ValueError, match=r"a scalar: is a `.batch\(…\)` of the dataset missing"):
        make_model().fit(pairs(), verbose=0, callbacks=[make()])


def test_a_fit_without_batches_is_refused():
    with pytest.raises(ValueError, match=r"a scalar: is a `.batch\(…\)` of the dataset missing"):
        make_model().fit(pairs().unbatch(), verbose=0)


@pytest.mark.parametrize("make", [CorpusMetrics, lambda c, v: CacheWarmStart(c, verbose=0)])
def test_callbacks_can_be_copied_as_tuners_copy_them(make):
    callback = make(candidates(), pairs())
    again = copy.deepcopy([callback])[0]
    assert again is not callback and again.candidates is callback.candidates
