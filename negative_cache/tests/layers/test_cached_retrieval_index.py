"""Tests of `CachedRetrieval(index=…)`: a tree that follows the cache, and is drawn from."""

import numpy as np
import pytest
import tensorflow as tf

import negative_cache as nc
from negative_cache._compat import keras
from negative_cache.layers import Cache, CachedRetrieval, TreeIndex
from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    INT_ID,
    Table,
    call,
    freeze_cache,
    make_queries,
    make_table,
    make_task,
)
from negative_cache.tests.replicas import run_on_two_replicas, two_replicas
from negative_cache.tests.tree_invariants import check_tree

ALL = {"beam": 200}


def make_index(capacity=6, dim=DIM, **arguments):
    return TreeIndex(capacity, dim, leaf_size=4, branching=4, **arguments)


def assert_follows(index, cache):
    rows = np.flatnonzero(cache.filled.numpy())
    check_tree(index, {int(row): cache.embeddings.numpy()[row] for row in rows})


@pytest.mark.one_keras
def test_the_index_follows_every_update_of_a_cache():
    rng = np.random.default_rng(0)
    index = make_index(40)
    specs = {"id": INT_ID, "embedding": tf.io.FixedLenFeature([DIM], tf.float32)}
    cache = Cache(specs, 40, index=index)
    for step in range(8):
        new = rng.normal(size=[8, DIM]).astype(np.float32)
        new[1, 0] = np.nan if step == 3 else 0.0
        updates = {}
        if step:
            updates = {
                # A row twice, and one that is masked.
                "updated_item_indices": [0, 1, 1, 2],
                "updated_item_data": {"embedding": rng.normal(size=[4, DIM]).astype(np.float32)},
                "updated_item_mask": [True, True, True, False],
            }
        cache.update(
            new_items={"id": tf.range(8, dtype=tf.int64), "embedding": new},
            new_items_mask=np.arange(8) != step,
            **updates,
        )
        assert_follows(index, cache)
    assert int(index.num_skipped) == 0 and int(cache.num_skipped) == 1
    # What has no embedding moves nothing.
    cache.update(
        new_items={"id": tf.zeros([0], tf.int64), "embedding": tf.zeros([0, DIM])},
        updated_item_data={"id": tf.constant([5], tf.int64)},
        updated_item_indices=[3],
    )
    assert_follows(index, cache)


@pytest.mark.one_keras
def test_masked_and_unfilled_rows_are_as_without_an_index():
    index = make_index(6)
    specs = {"id": INT_ID, "embedding": tf.io.FixedLenFeature([DIM], tf.float32)}
    cache = Cache(specs, 6, index=index)
    cache.update(
        new_items={"id": [1, 2], "embedding": tf.ones([2, DIM])},
        updated_item_indices=[4, 999],
        updated_item_data={"embedding": 2.0 * tf.ones([2, DIM])},
        updated_item_mask=[True, False],
    )
    assert_follows(index, cache)
    assert int(index.num_candidates) == 2


@pytest.mark.one_keras
def test_a_query_whose_proposals_are_all_left_out_has_no_gradient_of_a_draw():
    table, queries = make_table(), make_queries(1)
    # Every cached candidate is the positive: none is a negative.
    index = make_index(beam=1, correction_steps=0)
    task = make_task(table, index=index, filled_with=[3, 3, 3], remove_accidental_hits=True)
    freeze_cache(task)
    variable = tf.Variable(queries)
    with tf.GradientTape() as tape:
        ids = tf.constant([3], tf.int64)
        loss = task(variable, tf.constant(table[3:4]), {"id": ids}, training=True)
    np.testing.assert_allclose(loss, 0.0)
    np.testing.assert_array_equal(tape.gradient(loss, variable), np.zeros([1, DIM]))


@pytest.mark.one_keras
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"remove_accidental_hits": True},
        {"false_negative_margin": 0.1, "temperature": 0.5},
        {"score_transform": tf.nn.softplus},
    ],
)
def test_with_everything_opened_the_loss_is_that_of_the_cache(arguments, exact):
    table, queries = make_table(), make_queries(3)
    arguments = {"exact_query_gradient": exact, "filled_with": [0, 4, 5, 7], **arguments}
    losses, gradients = [], []
    for index in (None, make_index(**ALL)):
        task = make_task(table, index=index, num_negatives=200, **arguments)
        assert task.index is index
        # What a step writes is of no consequence here, and takes long to trace.
        freeze_cache(task)
        variable = tf.Variable(queries)
        with tf.GradientTape() as tape:
            loss = task(
                variable, tf.constant(table[:3]), {"id": tf.range(3, dtype=tf.int64)}, training=True
            )
        losses.append(loss.numpy())
        gradients.append(tape.gradient(loss, variable).numpy())
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    # The drawn candidates are fresh, so the exact gradient is all of it.
    np.testing.assert_allclose(gradients[1], gradients[0], atol=1e-5 if exact else 0.15)


def test_a_compiled_training_keeps_the_index_in_step_with_the_cache():
    table = make_table(40)
    index = make_index(16)
    task = make_task(table, 16, index=index, in_batch_negatives=True, num_negatives=2)
    optimizer = keras.optimizers.SGD(0.5)
    optimizer.build(task.candidate_network.trainable_variables)
    traces = []

    @tf.function
    def step(ids):
        traces.append(None)
        with tf.GradientTape() as tape:
            candidates = task.candidate_network({"id": ids})
            loss = task(tf.ones([4, DIM]), candidates, {"id": ids}, training=True)
        variables = task.candidate_network.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return loss

    for start in range(0, 60, 4):
        assert np.isfinite(step(tf.range(start, start + 4, dtype=tf.int64) % 40))
        assert_follows(index, task.cache)
    assert len(traces) == 1


@pytest.mark.one_keras
def test_inference_reads_the_index_only():
    table, queries = make_table(), make_queries(2)
    index = make_index(**ALL)
    task = make_task(table, index=index, filled_with=[1, 2, 3])
    plain = make_task(table, filled_with=[1, 2, 3])
    losses = [call(t, queries, [5, 6], table, training=False) for t in (task, plain)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert int(index.num_candidates) == 3


def test_fit_save_and_go_on(tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, size=64)
    data = tf.data.Dataset.from_tensor_slices(
        {"query": rng.normal(size=[64, DIM]).astype(np.float32), "candidate": {"id": ids}}
    ).batch(8)

    def make_model():
        keras.utils.set_random_seed(0)
        query_network = keras.layers.Dense(DIM)
        candidate_network = Table(make_table(50))
        task = CachedRetrieval(
            candidate_network,
            {"id": INT_ID},
            32,
            temperature=0.5,
            candidate_id_key="id",
            remove_accidental_hits=True,
            index=make_index(32),
            seed=3,
        )
        model = nc.DualEncoder(query_network, candidate_network, task)
        model.compile(optimizer=keras.optimizers.SGD(0.1))
        return model

    model = make_model()
    history = model.fit(data, epochs=2, verbose=0).history
    assert np.all(np.isfinite(history["loss"]))
    assert_follows(model.task.index, model.task.cache)
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    weights = str(tmp_path / "model.weights.h5")
    model.save_weights(weights)
    expected = model.fit(data, shuffle=False, verbose=0).history["loss"]
    copy = make_model()
    copy.fit(data.take(1), verbose=0)
    for load in (
        lambda: tf.train.Checkpoint(model=copy).restore(path),
        lambda: copy.load_weights(weights),
    ):
        load()
        assert_follows(copy.task.index, copy.task.cache)
        losses = copy.fit(data, shuffle=False, verbose=0).history["loss"]
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_config_round_trip():
    task = CachedRetrieval(keras.layers.Dense(DIM), INT_ID, 6, index=make_index(beam=3))
    copy = CachedRetrieval.from_config(task.get_config())
    assert copy.index.beam == 3 and copy.cache.index is copy.index


def test_two_replicas_have_indices_of_their_own():
    with two_replicas().scope():
        index = make_index(8, **ALL)
        task = make_task(make_table(), 8, index=index, in_batch_negatives=True)
    table = make_table()

    def step():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        ids = tf.cast(tf.range(2) + 2 * replica, tf.int64)
        task(tf.ones([2, DIM]), tf.gather(table, ids), {"id": ids}, training=True)
        return index.top_k(tf.ones([1, DIM]), 8)[0]

    results = run_on_two_replicas(step)
    for replica, scores in enumerate(results):
        expected = np.sort(table[2 * replica : 2 * replica + 2].sum(axis=1))[::-1]
        np.testing.assert_allclose(scores[0, :2], expected, rtol=1e-5)
        assert np.all(np.isneginf(scores[0, 2:]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"index": lambda: make_index(7)}, "capacity = 7"),
        ({"index": lambda: make_index(6, dim=5)}, "dimension"),
        ({"index": lambda: make_index(saved=False)}, "saved"),
        ({"index": lambda: make_index(), "frequency_correction": True}, "frequency_correction"),
        ({"index": lambda: "tree"}, "TreeIndex"),
        (
            {"index": lambda: make_index(store_embeddings=False, residual_bytes=1)},
            "must store embeddings",
        ),
        ({"index": lambda: make_index(), "cache_size": 0}, "cache_size=0"),
    ],
)
def test_constructor_refuses(arguments, message):
    arguments = {**arguments, "index": arguments["index"]()}
    with pytest.raises(ValueError, match=message):
        task = make_task(make_table(), **arguments)
        call(task, make_queries(2), [0, 1], make_table())


def test_call_refuses_probabilities():
    table = make_table()
    task = make_task(table, index=make_index())
    with pytest.raises(ValueError, match="candidate_sampling_probability"):
        call(task, make_queries(2), [0, 1], table, candidate_sampling_probability=[0.5, 0.5])
