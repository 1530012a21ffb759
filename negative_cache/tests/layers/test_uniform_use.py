"""Tests of how `Uniform` is given, compiled, trained, distributed, saved and refused."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import CacheSpec, DualEncoder, FromCache, InBatch, Retrieval, Uniform
from negative_cache._compat import keras
from negative_cache.ops import _execution
from negative_cache.tests import gpu_kernels, training_steps
from negative_cache.tests.layers.corpus_cases import corpus_of
from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    INT_ID,
    STRING_ID,
    Table,
    call,
    cross_entropy,
    make_queries,
    make_table,
)
from negative_cache.tests.layers.test_retrieval_files import SavedTable
from negative_cache.tests.layers.uniform_cases import SIZE, SPECS, TABLE, corpus
from negative_cache.tests.replicas import two_replicas


def memory(size=6, count=3, **kwargs):
    return Uniform(feature_specs=SPECS, memory_size=size, num_draws=count, seed=1, **kwargs)


def make_task(source, **kwargs):
    return Retrieval(Table(TABLE), [source], **{"candidate_id_key": "id", **kwargs})


# How it is given, compiled and refused.


@pytest.mark.parametrize("given", ["array", "dataset", "batches"])
def test_a_corpus_may_be_given_in_several_ways(given):
    candidates = {
        "array": {"candidates": np.arange(SIZE)},
        "dataset": {"candidates": tf.data.Dataset.range(SIZE).batch(5)},
        "batches": {
            "candidates": iter([np.arange(7), np.arange(7, SIZE)]),
            "feature_specs": INT_ID,
        },
    }[given]
    asked = []

    def tower(ids):
        asked.append(ids.numpy())
        return tf.gather(TABLE, ids)

    source = Uniform(num_draws=SIZE, seed=1, **candidates)
    task = Retrieval(tower, [source], candidate_id_key="candidate")
    loss = task(make_queries(1), TABLE[:1], tf.constant([0], tf.int64))
    assert sorted(asked[0]) == list(range(SIZE))
    scores = TABLE.astype(np.float64) @ make_queries(1)[0]
    assert float(loss) == pytest.approx(cross_entropy(scores[0], scores), rel=1e-5)


class Modes(Table):
    """A table that keeps the modes it was called in, and adds a loss."""

    modes = ()

    def call(self, features, training=None):
        self.modes = [*self.modes, training]
        self.add_loss(tf.constant(1.0))
        return super().call(features)


def test_the_tower_trains_with_its_draws_and_adds_no_loss_for_them():
    tower = Modes(TABLE)
    task = Retrieval(tower, [Uniform(corpus(), 4)], candidate_id_key="id")
    tower({"id": tf.constant([0])}, training=True)
    before = len(tower.losses)
    for training in (True, False):
        call(task, make_queries(1), [0], TABLE, training=training)
    assert list(tower.modes) == [True, True, False]
    assert len(tower.losses) == before == 1


@pytest.mark.one_keras
def test_compiled_by_xla_it_draws_the_same():
    losses = []
    for jit_compile in (False, True):
        memory = Uniform(feature_specs=SPECS, memory_size=6, num_draws=3, seed=1)
        tower = Table(TABLE)
        task = Retrieval(tower, [Uniform(corpus(), 4, seed=2), memory], candidate_id_key="id")
        assert task.supports_jit
        step = tf.function(
            lambda ids, task=task: task(make_queries(2), tf.gather(TABLE, ids), {"id": ids}),
            jit_compile=jit_compile,
        )
        losses.append([float(step(tf.range(2, dtype=tf.int64) + i)) for i in range(4)])
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.one_keras
@pytest.mark.parametrize("of_stream", [False, True])
def test_a_step_runs_on_a_gpu_and_waits_for_nothing(of_stream, monkeypatch):
    monkeypatch.setattr(_execution, "device_type", lambda like=None: "GPU")
    source = Uniform(training_steps.candidates(range(50)), 8)
    if of_stream:
        source = Uniform(feature_specs=training_steps.SPECS, memory_size=50, num_draws=8)
    task = Retrieval(
        training_steps.Tower(),
        [InBatch(), source],
        candidate_id_key="id",
        remove_accidental_hits=True,
        false_negative_margin=0.1,
        frequency_correction=True,
    )
    model = training_steps.model_of(task)
    batch = training_steps.batch_of(range(training_steps.BATCH))
    step = tf.function(model.train_step).get_concrete_function((batch,))
    report = gpu_kernels.examine(step)
    assert report.without_kernel == report.host_variables == report.to_host == []
    assert report.control_flow == []
    assert gpu_kernels.examine(step, compiled=True).without_kernel == []


@pytest.mark.parametrize(
    ["make", "message"],
    [
        (lambda: Uniform(), "either from `candidates` or from the stream.*memory_size=None"),
        (lambda: Uniform(corpus(), memory_size=4), "memory_size=4, and `candidates`"),
        (lambda: Uniform(memory_size=4), "needs `feature_specs`. Received: None"),
        (
            lambda: Uniform(memory_size=0, feature_specs=SPECS),
            "`memory_size` must be an integer >= 1. Received: 0",
        ),
        (lambda: Uniform(corpus(), 0), "`num_draws` must be an integer >= 1. Received: 0"),
        (lambda: Uniform(corpus(), 13), "num_draws=13 for 12 candidates"),
        (
            lambda: Uniform(memory_size=4, feature_specs=SPECS),
            "num_draws=64 for 4 candidates",
        ),
        (lambda: Uniform(corpus(0)), "`candidates` must hold some. Received none"),
        (lambda: Uniform([], feature_specs=SPECS), "`candidates` must hold some. Received none"),
        (lambda: Uniform([corpus()]), "can only be taken from a `tf.data.Dataset`"),
        (lambda: Uniform(corpus_of(SIZE).unbatch()), "must be tensors"),
        (
            lambda: Uniform(corpus(), feature_specs={"id": STRING_ID}),
            r"`candidates\['id'\]` must have dtype string",
        ),
        (
            lambda: Uniform(
                memory_size=4,
                num_draws=2,
                feature_specs={"log_sampling_probability": INT_ID},
            ),
            "must not use the names",
        ),
        (
            lambda: make_task(Uniform(corpus(), 4), candidate_id_key="title"),
            "`candidate_id_key` must be one of the features in `feature_specs`",
        ),
        (lambda: Uniform(corpus(), 4).fill(corpus(5)), "must have 12 candidates.*Received: 5"),
        (
            lambda: Uniform(memory_size=4, num_draws=2, feature_specs=SPECS).fill(corpus(4)),
            "`fill` is for a corpus.*memory_size=4",
        ),
    ],
)
def test_refuses_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_a_batch_that_is_not_of_the_stream():
    with pytest.raises(ValueError, match="A batch must fit into the cache.*of 3 rows"):
        call(make_task(memory(2, 2)), make_queries(3), [0, 1, 2], TABLE)
    task = make_task(memory(2, 2), candidate_id_key=None)
    with pytest.raises(ValueError, match="`candidate_features` must have exactly the keys"):
        task(make_queries(2), TABLE[:2], {"name": tf.constant(["a", "b"])})


def test_strings_stay_on_the_host():
    titles = {"title": [f"title {i}" for i in range(SIZE)]}
    source = Uniform(titles, 4)
    assert not source.supports_jit
    words = keras.layers.Hashing(50)
    table = keras.layers.Embedding(50, DIM)
    tower = lambda features: table(words(features["title"]))  # noqa: E731
    task = Retrieval(tower, [source], candidate_id_key="title", remove_accidental_hits=True)
    features = {"title": tf.constant(["title 1", "title 2"])}
    assert float(task(tower(features), tower(features), features)) > 0.0


def test_fit_counts_what_is_encoded():
    tower = Table(TABLE)
    sources = [
        InBatch(),
        Uniform(corpus(), 4),
        Uniform(feature_specs=SPECS, memory_size=6, num_draws=2),
    ]
    task = Retrieval(tower, sources, candidate_id_key="id")
    model = DualEncoder(Table(make_table(SIZE, seed=5)), tower, task)
    model.compile(keras.optimizers.SGD(0.1))
    pairs = tf.data.Dataset.from_tensor_slices({"query": corpus(), "candidate": corpus()}).batch(3)
    logs = model.fit(pairs, validation_data=pairs, epochs=2, verbose=0).history
    # Four batches an epoch, of three pairs; with 4 and 2 draws.
    assert logs["candidates_encoded"] == [4 * (3 + 4 + 2), 8 * (3 + 4 + 2)]
    assert logs["val_loss"][1] < logs["val_loss"][0]


def test_half_precision_embeddings_are_scored_in_float32():
    half = TABLE.astype(np.float16)
    policy = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        tower = lambda features: tf.gather(half, features["id"])  # noqa: E731
        task = Retrieval(tower, [Uniform(corpus(), SIZE)], candidate_id_key="id")
        loss = call(task, make_queries(1), [0], half)
        model = make_model()
        assert model.candidate_network(corpus(2)).dtype == tf.float16
        logs = model.fit(pairs(), epochs=2, verbose=0).history
    finally:
        keras.mixed_precision.set_global_policy(policy)
    scores = half.astype(np.float64) @ make_queries(1)[0]
    assert float(loss) == pytest.approx(cross_entropy(scores[0], scores), rel=1e-6)
    assert np.all(np.isfinite(logs["loss"]))


# Replicas.


def test_every_replica_has_draws_and_a_memory_of_its_own():
    strategy = two_replicas()
    with strategy.scope():
        of_corpus, of_stream = Uniform(corpus(), 4, seed=2, scaled=False), memory(4, 4)
        tower = Table(TABLE)
        task = Retrieval(tower, [of_corpus, of_stream], candidate_id_key="id")
    drawn = []
    encode = of_corpus.encode

    def encode_and_keep(features, training=False):
        drawn.append(features["id"])
        return encode(features, training)

    of_corpus.encode = encode_and_keep

    @tf.function
    def step(ids, training=True):
        def of_replica(ids):
            loss = task(queries, tf.gather(TABLE, ids), {"id": ids}, training=training)
            return loss, drawn[-1]

        return strategy.run(of_replica, (ids,))

    queries, batches, losses = tf.constant(make_queries(2)), [[0, 1], [2, 3]], []
    ids = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(batches[context.replica_id_in_sync_group], tf.int64)
    )
    scores = queries.numpy().astype(np.float64) @ TABLE.T
    for number in range(3):
        losses, asked = [strategy.experimental_local_results(part) for part in step(ids)]
        assert sorted(asked[0].numpy()) != sorted(asked[1].numpy())
        for loss, own, draws in zip(losses, batches, asked):
            # Draws of the corpus count once; those of the memory are all that is in it.
            negatives = [*draws.numpy(), *(own * min(number, 2))]
            expected = [cross_entropy(scores[i, own[i]], scores[i, negatives]) for i in range(2)]
            assert float(loss) == pytest.approx(np.mean(expected), rel=1e-5)
    first, again = (
        [float(part) for part in strategy.experimental_local_results(step(ids, training=False)[0])]
        for _ in range(2)
    )
    assert first == again
    counted = {metric.name: float(metric.result()) for metric in task.training_metrics}
    # Two replicas, three steps, a batch of two and two times four draws.
    assert counted["candidates_encoded"] == 2 * 3 * (2 + 8)


# Files.


def pairs():
    pairs = {"query": corpus(), "candidate": corpus()}
    return tf.data.Dataset.from_tensor_slices(pairs).batch(3)


def make_model(seed=0, saved=True):
    keras.utils.set_random_seed(seed)
    tower = SavedTable(SIZE)
    sources = [
        InBatch(),
        FromCache(CacheSpec(SPECS, 6), seed=3),
        # Another corpus for another seed: what is loaded must be that of the file.
        Uniform({"id": np.full(SIZE, seed)}, 4, scaled=False, saved=saved, name="corpus"),
        memory(name="memory", saved=saved),
    ]
    task = Retrieval(tower, sources, candidate_id_key="id", remove_accidental_hits=True)
    model = DualEncoder(SavedTable(SIZE), tower, task)
    model.compile(keras.optimizers.SGD(0.1))
    model(next(iter(pairs())))
    return model


def through_keras_file(model, path):
    model.save(f"{path}/model.keras")
    return keras.models.load_model(f"{path}/model.keras")


def test_a_training_goes_on_from_files_to_the_bit(tmp_path):
    model, other = make_model(), make_model(seed=1)
    model.task.negatives[2].fill(corpus())
    model.fit(pairs(), epochs=2, verbose=0)
    model.save_weights(tmp_path / "all.weights.h5")
    checkpoint = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    from_file = through_keras_file(model, tmp_path)
    encoded = [int(source.num_encoded) for source in model.task.negatives[2:]]
    assert min(encoded) > 0

    def go_on(model):
        losses = model.fit(pairs(), epochs=2, verbose=0).history["loss"]
        return losses, model.get_weights(), model.evaluate(pairs(), verbose=0)

    losses, weights, evaluated = go_on(model)
    # One model for two kinds of files: it is traced once, and has moved on before the second.
    for loaded, load in (
        (from_file, lambda: None),
        (other, lambda: other.load_weights(tmp_path / "all.weights.h5")),
        (other, lambda: tf.train.Checkpoint(model=other).restore(checkpoint).expect_partial()),
    ):
        load()
        for source, its in zip(model.task.negatives[2:], loaded.task.negatives[2:]):
            assert source.get_config() == {**its.get_config(), "seed": source.seed}
        assert [int(source.num_encoded) for source in loaded.task.negatives[2:]] == encoded
        found = go_on(loaded)
        assert found[0] == losses and found[2] == evaluated
        for a, b in zip(found[1], weights, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_corpus_that_is_not_in_the_file_is_given_again(tmp_path):
    model = make_model(saved=False)
    model.task.negatives[2].fill(corpus())
    model.fit(pairs(), verbose=0)
    loaded = through_keras_file(model, tmp_path)
    of_corpus, of_stream = loaded.task.negatives[2:]
    assert int(of_corpus.num_candidates) == int(of_stream.num_candidates) == 0
    with pytest.raises(ValueError, match="has no candidates: its file was written with `saved=F"):
        loaded.fit(pairs(), verbose=0)
    of_corpus.fill(corpus())
    logs = loaded.fit(pairs(), verbose=0).history
    assert np.isfinite(logs["loss"][0]) and int(of_stream.num_candidates) == 6


def test_files_that_do_not_fit_are_refused(tmp_path):
    def model(source):
        tower = SavedTable(SIZE)
        model = DualEncoder(SavedTable(SIZE), tower, Retrieval(tower, [source]))
        model(next(iter(pairs())))
        return model

    path = str(tmp_path / "model.weights.h5")
    model(Uniform(corpus(), 4)).save_weights(path)
    for other in (Uniform(corpus(11), 4), memory(SIZE), Uniform(corpus(), 4, name="other")):
        with pytest.raises(ValueError, match="The state in the file does not fit the layer"):
            model(other).load_weights(path)


def test_a_damaged_number_of_candidates_is_refused():
    source = memory()
    store = {}
    source._memory.save_own_variables(store)
    (name,) = [key for key, value in store.items() if np.shape(value) == ()]
    store[name] = np.array(-1)
    with pytest.raises(ValueError, match="damaged: a number of candidates.*Received: -1"):
        source._memory.load_own_variables(store)
