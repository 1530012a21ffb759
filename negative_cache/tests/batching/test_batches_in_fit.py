"""Tests of `GlobalContrastiveBatches` in `fit`: when epochs begin, and with which weights."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import (
    BackupAndRestore,
    CachedRetrieval,
    DualEncoder,
    GlobalContrastiveBatches,
)
from negative_cache._compat import IS_KERAS_2, keras
from negative_cache.tests.batching.contrastive_pairs import (
    PAIRS,
    TITLES,
    Recorder,
    TitleTower,
    Tower,
    assert_each_once,
    make_model,
    read,
)
from negative_cache.tests.replicas import two_replicas


@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize("cache_size", [0, 8])
def test_fit_sees_each_pair_once_an_epoch_and_others_together(cache_size, grow):
    model = make_model(cache_size)
    recorder = Recorder(model)
    batches = GlobalContrastiveBatches(model, PAIRS, 5, num_neighbors=2, grow=grow, verbose=0)
    assert len(batches) == 5
    model.fit(batches, epochs=3, verbose=0)
    epochs = recorder.epochs(5)
    assert len(epochs) == 3
    compositions = set()
    for epoch in epochs:
        assert_each_once(epoch)
        assert sorted(map(len, epoch)) == [2, 5, 5, 5, 5]
        compositions.add(frozenset(frozenset(batch.tolist()) for batch in epoch))
    assert len(compositions) == 3
    if cache_size:
        assert int(model.task.cache.num_filled) == cache_size


def test_fit_orders_by_the_weights_of_the_epochs_beginning():
    model = make_model(learning_rate=1.0)
    batches = GlobalContrastiveBatches(model, PAIRS, 5, num_neighbors=2, verbose=0)
    orders, embeddings = [], []

    class AtEpochs(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            embeddings.append(batches.embed())

        def on_epoch_end(self, epoch, logs=None):
            orders.append(batches.order)

    model.fit(batches, epochs=3, verbose=0, callbacks=[AtEpochs()])
    assert any(np.any(orders[0] != order) for order in orders[1:])
    for epoch, (queries, candidates) in enumerate(embeddings):
        towers = Tower(queries), Tower(candidates)
        alone = GlobalContrastiveBatches(
            towers, PAIRS, 5, num_neighbors=2, initial_epoch=epoch, verbose=0
        )
        read(alone)
        np.testing.assert_array_equal(alone.order, orders[epoch])


def test_training_is_deterministic_under_a_seed():
    runs = []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(0)
        model = make_model()
        recorder = Recorder(model)
        batches = GlobalContrastiveBatches(model, PAIRS, 5, seed=seed, verbose=0)
        model.fit(batches, epochs=2, verbose=0)
        runs.append([batch.tolist() for batch in recorder.batches])
    assert runs[0] == runs[1] != runs[2]


def test_fit_again_and_evaluate_begin_no_epoch_that_is_not_trained():
    model = make_model()
    batches = GlobalContrastiveBatches(model, PAIRS, 5, verbose=0)
    model.fit(batches, epochs=2, verbose=0)
    model.evaluate(batches, verbose=0)
    model.fit(batches, epochs=1, verbose=0)
    assert batches._epoch == 3


def test_fit_with_steps_per_epoch_begins_no_pass_before_one_is_over():
    model = make_model()
    recorder = Recorder(model)
    batches = GlobalContrastiveBatches(model, PAIRS, 5, verbose=0)
    model.fit(batches, epochs=5, steps_per_epoch=2, verbose=0, shuffle=False)
    if IS_KERAS_2:
        # It begins each of its epochs with the first batch: of another pass.
        assert len(recorder.batches) == 10 and batches._epoch == 5
    else:
        assert_each_once(recorder.batches[:5])
        assert batches._epoch == 2


def test_batches_per_epoch_goes_on_where_it_stopped():
    model = make_model()
    recorder = Recorder(model)
    batches = GlobalContrastiveBatches(model, PAIRS, 5, batches_per_epoch=3, verbose=0)
    assert len(batches) == 3
    model.fit(batches, epochs=5, verbose=0, shuffle=False)
    # 15 batches are three passes of 5.
    for epoch in recorder.epochs(5):
        assert_each_once(epoch)
    assert batches._epoch == 3


class Interrupt(keras.callbacks.Callback):
    """Interrupts training after some batches."""

    def __init__(self, num_batches):
        super().__init__()
        self.num_left = num_batches

    def on_train_batch_end(self, batch, logs=None):
        self.num_left -= 1
        if not self.num_left:
            raise KeyboardInterrupt


class Orders(keras.callbacks.Callback):
    """Remembers the order of each epoch, and what it should be."""

    def __init__(self, batches):
        super().__init__()
        self.batches, self.orders, self.expected = batches, [], []

    def on_epoch_begin(self, epoch, logs=None):
        towers = [Tower(embeddings) for embeddings in self.batches.embed()]
        alone = GlobalContrastiveBatches(
            towers, PAIRS, 5, num_neighbors=2, initial_epoch=epoch, verbose=0
        )
        read(alone)
        self.expected.append(alone.order)

    def on_epoch_end(self, epoch, logs=None):
        self.orders.append(self.batches.order)


def test_a_killed_training_goes_on(tmp_path):
    def make(**options):
        keras.utils.set_random_seed(0)
        model = make_model(learning_rate=1.0)
        model({name: {"id": features["id"][:5]} for name, features in PAIRS.items()})
        return model, GlobalContrastiveBatches(
            model, PAIRS, 5, num_neighbors=2, verbose=0, **options
        )

    model, batches = make()
    whole = Orders(batches)
    model.fit(batches, epochs=4, verbose=0, shuffle=False, callbacks=[whole])
    model, batches = make()
    backup = BackupAndRestore(tmp_path / "backup", save_freq="epoch")
    with pytest.raises(KeyboardInterrupt):
        model.fit(batches, epochs=4, verbose=0, shuffle=False, callbacks=[backup, Interrupt(12)])
    model, batches = make(initial_epoch=2)
    # A look at the batches before: the order of weights that are not restored yet.
    model(batches[0])
    backup = BackupAndRestore(tmp_path / "backup", save_freq="epoch")
    resumed = Orders(batches)
    callbacks = [backup, resumed]
    if IS_KERAS_2:
        callbacks.insert(
            1, keras.callbacks.LambdaCallback(on_train_begin=lambda logs: batches.restart())
        )
    model.fit(batches, epochs=4, verbose=0, shuffle=False, callbacks=callbacks)
    assert len(resumed.orders) == 2 and batches._epoch == 4
    for order, expected, uninterrupted in zip(resumed.orders, resumed.expected, whole.orders[2:]):
        np.testing.assert_array_equal(order, expected)
        np.testing.assert_array_equal(order, uninterrupted)


def test_restart_after_an_interrupt():
    model = make_model(learning_rate=1.0)
    batches = GlobalContrastiveBatches(model, PAIRS, 5, num_neighbors=2, verbose=0)
    with pytest.raises(KeyboardInterrupt):
        model.fit(batches, epochs=2, verbose=0, callbacks=[Interrupt(8)])
    batches.restart()
    # Twice is as once. The interrupted epoch, the second, begins anew.
    batches.restart()
    assert batches._epoch == 1
    orders = Orders(batches)
    model.fit(batches, initial_epoch=1, epochs=3, verbose=0, callbacks=[orders])
    np.testing.assert_array_equal(orders.orders, orders.expected)
    assert batches._epoch == 3


def test_a_loop_of_ones_own():
    model = make_model(learning_rate=1.0)
    batches = GlobalContrastiveBatches(model, PAIRS, 5, num_neighbors=2, verbose=0)
    orders = []
    for _ in range(3):
        seen = []
        for batch in batches:
            seen.append(batch["query"]["id"].numpy())
            model.train_on_batch(batch)
        assert_each_once(seen)
        orders.append(batches.order)
    assert batches._epoch == 3
    assert np.any(orders[0] != orders[1])


@pytest.mark.parametrize("steps_per_epoch", [1, 2])
def test_steps_per_epoch_orders_once_a_pass(steps_per_epoch):
    model = make_model(learning_rate=1.0)
    batches = GlobalContrastiveBatches(model, PAIRS, 4, verbose=0)
    embed, calls = batches._maker.embed, []
    batches._maker.embed = lambda pairs: calls.append(1) or embed(pairs)
    recorder = Recorder(model)
    model.fit(batches, epochs=12 // steps_per_epoch, steps_per_epoch=steps_per_epoch, verbose=0)
    if not IS_KERAS_2:
        assert len(calls) <= 3
        assert_each_once(recorder.batches[:6])
        assert_each_once(recorder.batches[6:12])


def test_restored_weights_order_the_epoch_on_two_replicas():
    with two_replicas().scope():
        model = make_model(run_eagerly=False, learning_rate=1.0)
    batches = GlobalContrastiveBatches(model, PAIRS, 6, num_neighbors=2, verbose=0)
    table = model.query_network.table
    values = np.random.default_rng(5).normal(size=table.shape)
    callbacks = [keras.callbacks.LambdaCallback(on_train_begin=lambda logs: table.assign(values))]
    if IS_KERAS_2:
        callbacks.append(
            keras.callbacks.LambdaCallback(on_train_begin=lambda logs: batches.restart())
        )
    expected = []

    class AtEpoch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            towers = [Tower(embeddings) for embeddings in batches.embed()]
            alone = GlobalContrastiveBatches(towers, PAIRS, 6, num_neighbors=2, verbose=0)
            read(alone)
            expected.append(alone.order)

    model.fit(batches, epochs=1, verbose=0, callbacks=[*callbacks, AtEpoch()])
    np.testing.assert_array_equal(batches.order, expected[0])


@pytest.mark.parametrize("network", ["query_network", "candidate_network"])
def test_any_weight_that_changes_is_seen(network):
    model = make_model(learning_rate=0.0)
    table = getattr(model, network).table
    batches = GlobalContrastiveBatches(model, PAIRS, 5, verbose=0)
    read(batches)
    batches.on_epoch_end()
    read(batches)
    assert batches._epoch == 1
    # The norm is the same.
    table.assign(tf.convert_to_tensor(table)[:, ::-1])
    batches.on_epoch_end()
    read(batches)
    assert batches._epoch == 2


def test_restart_orders_by_the_weights_of_then():
    model = make_model(learning_rate=1.0)
    batches = GlobalContrastiveBatches(model, PAIRS, 5, num_neighbors=2, verbose=0)
    model.fit(batches, epochs=2, verbose=0)
    batches[0]
    order = batches.order
    batches.restart()
    batches[0]
    np.testing.assert_array_equal(batches.order, order)


def test_several_passes_in_an_epoch_are_of_one_order():
    model = make_model()
    batches = GlobalContrastiveBatches(model, PAIRS, 5, batches_per_epoch=15, verbose=0)
    embed, calls = batches._maker.embed, []
    batches._maker.embed = lambda pairs: calls.append(1) or embed(pairs)
    rows = read(batches)
    assert len(calls) == 1 and batches._epoch == 3
    for i in range(3):
        assert_each_once(rows[5 * i : 5 * i + 5])


def test_nothing_is_traced_in_later_epochs():
    model = make_model(cache_size=8, run_eagerly=False)
    batches = GlobalContrastiveBatches(model, PAIRS, 5, embedding_batch_size=8, verbose=0)
    model.fit(batches, epochs=2, verbose=0)
    traces = [model.query_network.traces, model.candidate_network.traces]
    model.fit(batches, epochs=3, verbose=0)
    assert [model.query_network.traces, model.candidate_network.traces] == traces


def test_fit_on_two_replicas():
    with two_replicas().scope():
        model = make_model(run_eagerly=False)
    batches = GlobalContrastiveBatches(model, PAIRS, 6, verbose=0)
    history = model.fit(batches, epochs=2, verbose=0).history
    assert np.all(np.isfinite(history["loss"])) and batches._epoch == 2


def test_each_replica_trains_on_whole_groups():
    with two_replicas().scope():
        model = make_model(run_eagerly=False)
    seen, train_step = [], model.train_step

    def record(data):
        batch = data[0] if isinstance(data, tuple) else data
        tf.py_function(lambda ids: seen.append(ids.numpy()), [batch["query"]["id"]], [])
        return train_step(data)

    model.train_step = record
    options = {"group_size": 4, "drop_remainder": True, "verbose": 0}
    batches = GlobalContrastiveBatches(model, PAIRS, 8, **options)
    model.fit(batches, epochs=1, verbose=0)
    # Two batches, each of two groups: four that are next to each other in the order, as in a ring.
    places = np.argsort(batches.order)
    assert len(seen) == 4 and len(set(np.concatenate(seen))) == 16
    for ids in seen:
        own = places[ids]
        assert any(set((own - first) % len(places)) == {0, 1, 2, 3} for first in own)


@pytest.mark.parametrize("kind", ["array", "object", "bytes", "tensor"])
def test_strings(kind):
    titles = {
        "array": TITLES,
        "object": TITLES.astype(object),
        "bytes": np.array([title.encode() for title in TITLES]),
        "tensor": tf.constant(TITLES),
    }[kind]
    network = TitleTower()
    specs = {"title": tf.io.FixedLenFeature([], tf.string)}
    task = CachedRetrieval(network, specs, 0, in_batch_negatives=True, candidate_id_key="title")
    model = DualEncoder(network, network, task)
    model.compile(optimizer=keras.optimizers.SGD(0.1), run_eagerly=True)
    pairs = {"query": {"title": titles}, "candidate": {"title": titles}}
    batches = GlobalContrastiveBatches(model, pairs, 5, candidate_id_key="title", verbose=0)
    model.fit(batches, epochs=2, verbose=0)
    seen = np.concatenate([batches[i]["query"]["title"].numpy() for i in range(len(batches))])
    assert sorted(title.decode() for title in seen) == sorted(TITLES)


@pytest.mark.skipif(not IS_KERAS_2, reason="TF-Recommenders imports under Keras 2 only.")
def test_a_model_of_tfrs():
    import tensorflow_recommenders as tfrs

    class TitleModel(tfrs.Model):
        def __init__(self):
            super().__init__()
            self.query_model, self.candidate_model = TitleTower(), TitleTower()
            self.task = tfrs.tasks.Retrieval()

        def compute_loss(self, features, training=False):
            return self.task(
                self.query_model(features["query"]),
                self.candidate_model(features["candidate"]),
                candidate_ids=features["candidate"]["title"],
            )

    model = TitleModel()
    model.compile(optimizer="adam")
    pairs = {"query": {"title": TITLES}, "candidate": {"title": TITLES}}
    towers = model.query_model, model.candidate_model
    batches = GlobalContrastiveBatches(towers, pairs, 5, candidate_id_key="title", verbose=0)
    history = model.fit(batches, epochs=2, verbose=0).history
    assert np.all(np.isfinite(history["loss"])) and batches._epoch == 2
