"""Tests that an uneven stream of candidates is noticed once, with what to set, and no other is."""

import re
import warnings

import numpy as np
import pytest
import tensorflow as tf

from negative_cache._compat import keras
from negative_cache.layers import (
    Cache,
    CachedRetrieval,
    CacheSpec,
    Corrector,
    FrequencyEstimator,
    FromCache,
    InBatch,
    Retrieval,
    TreeIndex,
)
from negative_cache.layers._negatives.popularity import Popularity, PopularityWatch
from negative_cache.models import DualEncoder
from negative_cache.tests.layers.retrieval_cases import DIM, INT_ID, Table, make_table
from negative_cache.tests.replicas import run_on_two_replicas, two_replicas

NUM_CANDIDATES = 50
NOTICE = "Popular candidates repeat in the training stream"


def zipf(num_candidates, exponent=1.0):
    """Probabilities in proportion to 1, 1 / 2^a, 1 / 3^a …"""
    weights = np.arange(1.0, num_candidates + 1.0) ** -exponent
    return weights / weights.sum()


def draws_of(law, num_draws, seed=0):
    return np.random.default_rng(seed).choice(len(law), size=num_draws, p=law)


def passes(ids, num_passes):
    """Shuffled passes over `ids`."""
    rng = np.random.default_rng(1)
    return np.concatenate([rng.permutation(ids) for _ in range(num_passes)])


def movielens_like():
    """Draws of 1,682 candidates whose popularity has a squared coefficient of variation of 1.8.

    So has that of the movies of MovieLens 100K. A log-normal of this spread has σ² = log(1 + 1.8).
    """
    quantiles = (np.arange(1682) + 0.5) / 1682
    normal = np.sqrt(2.0) * tf.math.erfinv(2.0 * quantiles - 1.0).numpy()
    law = np.exp(np.sqrt(np.log(2.8)) * normal)
    return draws_of(law / law.sum(), 80_000)


def notices(function):
    """The texts of the notices that `function` causes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(one.message) for one in caught if NOTICE in str(one.message)]


def count(watch, ids, batch_size=4096):
    step = tf.function(watch.count, reduce_retracing=True)
    for start in range(0, len(ids), batch_size):
        step(tf.constant(ids[start : start + batch_size], tf.int64))


def noticed_in(ids):
    watch = PopularityWatch([InBatch()])
    count(watch, ids)
    return notices(watch.look)


def test_measures_by_hand():
    # Three candidates that came 3, 2 and 1 times, of which two share a bucket once.
    counts = np.zeros([100_000])
    counts[[7, 20, 30]] = [3, 2, 1]
    found = Popularity.of_counts(counts)
    # Of the 6 · 5 ordered pairs of draws 3 · 2 + 2 · 1 are of one candidate. Of buckets so many,
    # collisions play no role.
    assert found.num_draws == 6
    assert found.num_candidates == pytest.approx(3.0, rel=1e-4)
    assert found.repeat_rate == pytest.approx(8 / 30, rel=1e-3)
    assert found.skew == pytest.approx(3 * 8 / 30, rel=1e-3)


@pytest.mark.parametrize("num_candidates", [300, 30_000])
def test_collisions_of_buckets_are_taken_out(num_candidates):
    law, num_buckets = zipf(num_candidates, 0.5), 3000
    ids = draws_of(law, 200_000)
    buckets = np.random.default_rng(2).integers(num_buckets, size=num_candidates)
    found = Popularity.of_counts(np.bincount(buckets[ids], minlength=num_buckets))
    # Σ n_y² has a relative error of about sqrt(2 / 3000) = 2.6 % over the hash functions, and D, of
    # ten candidates a bucket, one of sqrt(e^10 / 3000) / 10 = 27 %.
    occurrences = np.bincount(ids)
    pairs = np.sum(occurrences * (occurrences - 1.0)) / (len(ids) * (len(ids) - 1.0))
    assert found.repeat_rate == pytest.approx(pairs, rel=0.1)
    assert found.num_candidates == pytest.approx(np.sum(occurrences > 0), rel=0.5)


UNEVEN = {
    "Zipf": lambda: draws_of(zipf(5000), 20_000),
    "Zipf, no more draws than needed": lambda: draws_of(zipf(100_000), 4096),
    "twenty candidates": lambda: draws_of(zipf(20), 5000),
    "as MovieLens": movielens_like,
    "in passes over uneven pairs": lambda: passes(draws_of(zipf(1000), 3000), 10),
    "sorted": lambda: np.sort(draws_of(zipf(1000), 5000)),
}
EVEN = {
    "distinct": lambda: np.arange(3_000_000),
    "distinct, in part of a second pass": lambda: passes(np.arange(4000), 2)[:6000],
    "distinct, in many passes": lambda: passes(np.arange(1000), 50),
    "five queries each, in a row": lambda: np.repeat(np.arange(2000), 5),
    "five queries each, shuffled": lambda: passes(np.repeat(np.arange(2000), 5), 3),
    "uniform draws": lambda: draws_of(np.full([1000], 1e-3), 20_000),
    "uniform draws of many": lambda: draws_of(np.full([10**6], 1e-6), 20_000),
    # The most that chance does: a skew of 1.30 if every candidate has 1.8 pairs on average.
    "passes over few uniform pairs": lambda: passes(draws_of(np.full([5000], 2e-4), 9000), 20),
    "twenty candidates": lambda: draws_of(np.full([20], 0.05), 5000),
    "a few classes": lambda: draws_of(np.array([0.7, 0.2, 0.1]), 20_000),
    "too few draws": lambda: draws_of(zipf(100), 4095),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_an_uneven_stream_is_noticed(name):
    assert len(noticed_in(UNEVEN[name]())) == 1


@pytest.mark.parametrize("name", EVEN)
def test_an_even_stream_is_not(name):
    assert not noticed_in(EVEN[name]())


def test_a_notice_has_the_measured_numbers():
    ids = movielens_like()
    (notice,) = noticed_in(ids)
    occurrences = np.unique(ids, return_counts=True)[1].astype(np.float64)
    pairs = np.sum(occurrences * (occurrences - 1.0)) / (len(ids) * (len(ids) - 1.0))
    found = re.search(
        r"Of 80,000 candidates so far, about ([\d,]+) w.* probability of (\S+), which is (\S+) t",
        notice,
    )
    num, rate, skew = (float(number.replace(",", "")) for number in found.groups())
    assert num == pytest.approx(len(occurrences), rel=0.02)
    # They are rounded to two digits.
    assert rate == pytest.approx(pairs, rel=0.05)
    assert skew == pytest.approx(len(occurrences) * pairs, rel=0.05)


def test_a_stream_that_becomes_uneven_is_noticed_later_and_once():
    watch = PopularityWatch([InBatch()])
    count(watch, passes(np.arange(5000), 1))
    assert not notices(watch.look)
    count(watch, draws_of(zipf(5000), 4000))
    # The counts are read again when there are 10,000.
    assert not notices(watch.look)
    count(watch, draws_of(zipf(5000), 16_000))
    assert len(notices(watch.look)) == 1
    count(watch, draws_of(zipf(5000), 50_000))
    assert not notices(watch.look)


# Tasks.

POPULAR = draws_of(zipf(NUM_CANDIDATES), 4160)
EVENLY = passes(np.arange(NUM_CANDIDATES), 84)


def make_task(cache_size=64, **kwargs):
    kwargs = {
        "candidate_id_key": "id",
        "in_batch_negatives": True,
        "remove_accidental_hits": True,
        "seed": 1,
        **kwargs,
    }
    return CachedRetrieval(Table(make_table(NUM_CANDIDATES)), {"id": INT_ID}, cache_size, **kwargs)


def make_model(task, **kwargs):
    model = DualEncoder(Table(make_table(NUM_CANDIDATES)), task.candidate_network, task)
    model.compile(keras.optimizers.SGD(0.01), **kwargs)
    return model


def batches_of(ids, **more):
    features = {"id": np.asarray(ids, np.int64)}
    pairs = {"query": features, "candidate": features, **more}
    return tf.data.Dataset.from_tensor_slices(pairs).batch(64, drop_remainder=True)


def fit(task, ids=POPULAR, epochs=1, compile_with=(), **more):
    model = make_model(task, **dict(compile_with))
    return notices(lambda: model.fit(batches_of(ids, **more), epochs=epochs, verbose=0))


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.one_keras)])
@pytest.mark.parametrize("cache_size", [0, 64])
def test_fit_notices_once(cache_size, jit_compile):
    found = fit(make_task(cache_size), epochs=3, compile_with={"jit_compile": jit_compile})
    assert len(found) == 1
    assert "Set `frequency_correction=True`" in found[0]
    assert ("and `use_lru=False`" in found[0]) == (cache_size > 0)
    assert "set `frequency_correction=False`" in found[0]


SILENT = {
    "evenly": lambda: (make_task(), EVENLY),
    "decided against": lambda: (make_task(frequency_correction=False), POPULAR),
    "corrected": lambda: (make_task(frequency_correction=True, use_lru=False), POPULAR),
    "corrected by an estimator": lambda: (
        make_task(0, frequency_correction=FrequencyEstimator(1000)),
        POPULAR,
    ),
    "no ids": lambda: (make_task(candidate_id_key=None, remove_accidental_hits=False), POPULAR),
    "corpus": lambda: (of_corpus(), POPULAR),
}


def of_corpus():
    tower = Table(make_table(NUM_CANDIDATES))
    corpus = tf.data.Dataset.from_tensor_slices({"id": np.arange(NUM_CANDIDATES)}).batch(10)
    cache = Cache.from_dataset(corpus, tower, candidate_id_key="id", verbose=0)
    return CachedRetrieval(tower, cache=cache, in_batch_negatives=True)


@pytest.mark.one_keras
@pytest.mark.parametrize("name", SILENT)
def test_fit_is_silent(name):
    task, ids = SILENT[name]()
    assert not fit(task, ids)


def test_given_probabilities_are_a_correction():
    probability = zipf(NUM_CANDIDATES)[POPULAR].astype(np.float32)
    more = {"candidate_sampling_probability": probability}
    assert not fit(make_task(use_lru=False), **more)
    assert not fit(make_task(0), **more)


class OwnModel(keras.Model):
    """A model that is no `DualEncoder`, with steps of its own, as TF-Recommenders has them."""

    def __init__(self, task):
        super().__init__()
        self.task = task

    def loss_of(self, data, training):
        embeddings = self.task.candidate_network(data["candidate"])
        return self.task(embeddings, embeddings, data["candidate"], training=training)

    def train_step(self, data):
        return {"loss": self.loss_of(data, True)}

    def test_step(self, data):
        return {"loss": self.loss_of(data, False)}


def test_another_model_notices_when_it_is_evaluated():
    model = OwnModel(make_task(0))
    model.compile(keras.optimizers.SGD(0.01))
    batches = batches_of(POPULAR)

    def train():
        model.fit(batches, epochs=2, validation_data=batches.take(1), verbose=0)
        model.evaluate(batches.take(1), verbose=0)

    assert len(notices(train)) == 1


def test_loops_of_ones_own_notice():
    def loop(task, is_compiled):
        def step(features):
            embeddings = task.candidate_network(features)
            return task(embeddings, embeddings, features, training=True)

        step = tf.function(step) if is_compiled else step
        for batch in batches_of(POPULAR):
            step(batch["candidate"])

    assert len(notices(lambda: loop(make_task(0), False))) == 1
    task = make_task(0)
    assert not notices(lambda: loop(task, True))
    assert len(notices(task.check_popularity)) == 1
    assert not notices(task.check_popularity)
    without = make_task(0, frequency_correction=False)
    loop(without, True)
    assert not notices(without.check_popularity)


def test_an_evaluation_counts_nothing():
    task = make_task(0)
    model = make_model(task)
    batches = batches_of(POPULAR)
    assert not notices(lambda: [model.evaluate(batches, verbose=0) for _ in range(2)])


def test_replicas_are_counted_together():
    # Neither has enough draws alone.
    halves = tf.constant(POPULAR[:4160].reshape([2, -1]), tf.int64)
    alone = PopularityWatch([InBatch()])
    alone.count(halves[0])
    assert not notices(alone.look)
    with two_replicas().scope():
        watch = PopularityWatch([InBatch()])

    def step():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        watch.count(tf.gather(halves, replica))
        watch.look()
        return tf.zeros([])

    assert not notices(lambda: run_on_two_replicas(step))
    assert len(notices(watch.look)) == 1


@pytest.mark.parametrize("name", ["index", "corrector", "refresh_fraction", "probe_size"])
def test_what_does_not_go_with_the_correction_is_named(name):
    option = {
        "index": lambda: TreeIndex(64, DIM),
        "corrector": lambda: Corrector(hidden_units=4),
        "refresh_fraction": lambda: 0.1,
        "probe_size": lambda: 4,
    }[name]()
    task = make_task(embedding_dim=DIM, **{name: option})
    count(task._watch, POPULAR)
    (found,) = notices(task.check_popularity)
    assert f"With `{name}` a streaming cache cannot be corrected" in found
    assert "`Cache.from_dataset`" in found
    with pytest.raises(ValueError, match="use_lru|index"):
        make_task(embedding_dim=DIM, frequency_correction=True, use_lru=False, **{name: option})


def test_a_cache_without_lru_is_told_no_more_than_the_correction():
    cache = FromCache(CacheSpec({"id": INT_ID}, 64, use_lru=False))
    tower = Table(make_table(NUM_CANDIDATES))
    task = Retrieval(tower, [InBatch(), cache], candidate_id_key="id")
    count(task._watch, POPULAR)
    (found,) = notices(task.check_popularity)
    assert "Set `frequency_correction=True`, or" in found and "use_lru" not in found


@pytest.mark.parametrize("value", [None, False, True])
def test_configurations_hold_what_was_decided(value):
    tower = keras.layers.Embedding(5, DIM)
    one_tensor = tf.io.FixedLenFeature([], tf.int64)
    kwargs = {"candidate_id_key": "candidate", "in_batch_negatives": True}
    task = CachedRetrieval(tower, one_tensor, 0, frequency_correction=value, **kwargs)
    config = task.get_config()
    again = CachedRetrieval.from_config(config)
    assert (again.frequency is not None) == (value is True)
    assert (again._watch is not None) == (value is None)
    assert again.get_config()["frequency_correction"] == config["frequency_correction"]


@pytest.mark.parametrize("kind", ["weights.h5", "checkpoint"])
@pytest.mark.parametrize("before", [None, False])
def test_files_do_not_hold_the_counts(before, kind, tmp_path):
    path = str(tmp_path / "model")
    models = []
    for value in (before, None if before is False else False):
        # Two steps take less time than to trace one.
        models.append(make_model(make_task(frequency_correction=value), run_eagerly=True))
        models[-1].fit(batches_of(EVENLY[:128]), verbose=0)
    if kind == "checkpoint":
        tf.train.Checkpoint(model=models[0]).write(path)
        status = tf.train.Checkpoint(model=models[1]).read(path)
        status.assert_existing_objects_matched()
        status.assert_consumed()
    else:
        models[0].save_weights(path + ".weights.h5")
        models[1].load_weights(path + ".weights.h5")
    first, second = (model.task.cache.embeddings for model in models)
    np.testing.assert_array_equal(first, second)


def test_an_exported_training_step_counts(tmp_path):
    task = make_task(0)

    class Step(tf.Module):
        def __init__(self):
            super().__init__()
            self.task = task

        @tf.function(input_signature=[tf.TensorSpec([64], tf.int64)])
        def __call__(self, ids):
            embeddings = self.task.candidate_network({"id": ids})
            return self.task(embeddings, embeddings, {"id": ids}, training=True)

    step = Step()
    ids = tf.constant(POPULAR[:64])
    expected = step(ids)
    tf.saved_model.save(step, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    np.testing.assert_allclose(loaded(ids), expected, rtol=1e-6)
