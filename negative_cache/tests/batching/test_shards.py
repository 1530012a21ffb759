"""Tests of `GlobalContrastiveBatches.from_dataset`."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import GlobalContrastiveBatches
from negative_cache.batching.plan import BatchMaker
from negative_cache.batching.shards import Shards
from negative_cache.tests.batching.contrastive_pairs import (
    NUM_PAIRS,
    PAIRS,
    Recorder,
    assert_each_once,
    clusters,
    make_model,
    make_plan,
    pairs_of,
)


def shards(model, num_pairs=NUM_PAIRS, batch_size=5, **options):
    dataset = tf.data.Dataset.from_tensor_slices(
        PAIRS if num_pairs == NUM_PAIRS else pairs_of(num_pairs)
    )
    options = {"shard_size": 10, "verbose": 0, **options}
    return GlobalContrastiveBatches.from_dataset(model, dataset, batch_size, **options)


@pytest.mark.parametrize("shard_size", [5, 7, 10, 100])
@pytest.mark.parametrize("drop_remainder", [False, True])
def test_shards_are_passes_over_all_pairs(shard_size, drop_remainder):
    dataset = shards(make_model(), shard_size=shard_size, drop_remainder=drop_remainder)
    assert isinstance(dataset, tf.data.Dataset)
    assert int(dataset.cardinality()) == 4 + (not drop_remainder)
    for _ in range(2):
        batches = [batch["query"]["id"].numpy() for batch in dataset]
        assert [len(batch) for batch in batches] == [5, 5, 5, 5] + [2] * (not drop_remainder)
        seen = np.concatenate(batches)
        if drop_remainder:
            assert len(set(seen)) == 20
        else:
            assert_each_once(batches)


def test_shards_hold_consecutive_pairs_and_clusters_share_batches():
    towers, labels = clusters(num_clusters=10)
    labels = np.sort(labels)
    embeddings = tf.one_hot(labels, 10)
    towers = (lambda ids: tf.gather(embeddings, ids),) * 2
    dataset = shards(towers, 40, batch_size=4, shard_size=20, num_neighbors=3, grow=True)
    batches = [batch["query"].numpy() for batch in dataset]
    assert_each_once(batches, 40)
    for shard in (batches[:5], batches[5:]):
        assert np.ptp(np.concatenate(shard)) == 19
        assert sum(len(set(labels[batch])) == 1 for batch in shard) >= 3


def test_shards_are_ordered_by_the_weights_of_now():
    model = make_model(learning_rate=1.0)
    dataset = shards(model, shard_size=100)
    passes = []
    for _ in range(2):
        passes.append([batch["query"]["id"].numpy().tolist() for batch in dataset])
    # Nothing was trained: the same pass again.
    assert passes[0] == passes[1]
    model.fit(dataset, epochs=1, verbose=0)
    assert [batch["query"]["id"].numpy().tolist() for batch in dataset] != passes[0]


@pytest.mark.parametrize("cache_size", [0, 8])
def test_fit_shards(cache_size):
    model = make_model(cache_size)
    recorder = Recorder(model)
    model.fit(shards(model), epochs=2, verbose=0)
    for epoch in recorder.epochs(5):
        assert_each_once(epoch)
    recorder.batches.clear()
    model.fit(shards(model).repeat(), epochs=3, steps_per_epoch=4, verbose=0)
    assert len(recorder.batches) == 12
    assert_each_once(recorder.batches[:5])


def test_shards_keep_ids_apart_and_start_shuffled():
    model = make_model()
    # In the first shard of 16 five ids are twice; six would not fit in what is left of the second.
    ids = np.tile(np.arange(11), 2)
    dataset = tf.data.Dataset.from_tensor_slices({"query": {"id": ids}, "candidate": {"id": ids}})
    for start_epoch, initial_epoch in ((0, 0), (1, 0), (1, 1)):
        batches = GlobalContrastiveBatches.from_dataset(
            model,
            dataset,
            4,
            shard_size=16,
            candidate_id_key="id",
            start_epoch=start_epoch,
            initial_epoch=initial_epoch,
            verbose=0,
        )
        for batch in batches:
            assert len(set(batch["query"]["id"].numpy())) == len(batch["query"]["id"])


def test_passes_over_shards_are_counted_when_trained():
    model = make_model(learning_rate=1.0)
    epochs = []
    dataset = shards(
        model, shard_size=11, random_fraction=lambda epoch: epochs.append(epoch) or 0.5
    )
    list(dataset)
    list(dataset)
    assert set(epochs) == {0}
    model.fit(dataset, epochs=2, verbose=0)
    epochs.clear()
    list(dataset)
    assert set(epochs) == {2}


def test_embeddings_that_are_not_finite_are_named_by_their_place_in_the_dataset():
    broken = tf.Variable(17, dtype=tf.int64)
    tower = lambda ids: 1.0 / tf.cast(ids[:, tf.newaxis] != broken, tf.float32)  # noqa: E731
    dataset = shards((tower, tower), 24, batch_size=4, shard_size=10)
    with pytest.raises(tf.errors.InvalidArgumentError, match="query embeddings .* row 17"):
        list(dataset)


def test_pairs_left_of_a_shard_keep_their_place_in_the_dataset():
    broken = tf.Variable(-1, dtype=tf.int64)
    tower = lambda ids: 1.0 / tf.cast(ids[:, tf.newaxis] != broken, tf.float32)  # noqa: E731
    plan = make_plan(batch_size=4, num_neighbors=3, embedding_batch_size=8)
    maker = BatchMaker((tower, tower), plan)
    options = {"candidate_id_key": None, "query_id_key": None, "initial_epoch": 0}
    dataset = tf.data.Dataset.from_tensor_slices(pairs_of(24))
    # Not read ahead, as a dataset may be.
    batches = Shards(maker, dataset, shard_size=10, **options)()
    seen = np.concatenate([next(batches)["query"] for _ in range(2)])
    left = sorted(set(range(10)) - set(seen.tolist()))
    assert len(left) == 2
    broken.assign(left[1])
    with pytest.raises(ValueError, match=f"query embeddings .* row {left[1]}:"):
        next(batches)


def test_shards_differ_in_what_is_drawn_and_know_queries():
    towers, labels = clusters(num_clusters=12)
    dataset = shards(towers, 48, batch_size=4, shard_size=24, start_epoch=9)
    batches = [batch["query"].numpy() for batch in dataset]
    first, second = np.concatenate(batches[:6]), np.concatenate(batches[6:])
    assert np.any(first != second - 24)

    pairs = tf.data.Dataset.from_tensor_slices(
        {"query": {"row": np.arange(48), "user": labels}, "candidate": {"row": np.arange(48)}}
    )
    tower = lambda features: towers[0](features["row"])  # noqa: E731
    options = {"shard_size": 48, "num_neighbors": 3, "grow": True}
    shared = []
    for key in (None, "user"):
        dataset = GlobalContrastiveBatches.from_dataset(
            (tower, tower), pairs, 4, query_id_key=key, **options
        )
        users = [batch["query"]["user"].numpy() for batch in dataset]
        shared.append(sum(4 - len(set(batch)) for batch in users))
    assert shared[1] <= 2 < 20 < shared[0]


def test_shards_warn_of_frequent_candidates():
    towers, _ = clusters()
    tower = lambda row: towers[0](row["row"] if isinstance(row, dict) else row)  # noqa: E731
    rows = np.arange(24)
    dataset = tf.data.Dataset.from_tensor_slices(
        {"query": rows, "candidate": {"row": rows, "id": np.zeros(24, np.int64)}}
    )
    batches = GlobalContrastiveBatches.from_dataset(
        (tower, tower), dataset, 4, candidate_id_key="id", verbose=0
    )
    with pytest.warns(UserWarning, match="18 of 24 pairs will share a batch"):
        list(batches)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": tf.data.Dataset.range(3)}, "`dataset` must be .* dictionaries"),
        ({"dataset": [1]}, "`dataset` must be .* Received elements: None"),
        (
            {"dataset": tf.data.Dataset.from_tensor_slices(pairs_of(24)).repeat()},
            "`dataset` must be finite",
        ),
        (
            {"dataset": tf.data.Dataset.from_tensor_slices(pairs_of(24)).batch(4)},
            "`dataset` must hold single pairs",
        ),
        (
            {
                "dataset": tf.data.Dataset.from_tensors(
                    {"query": 1, "candidate": tf.sparse.from_dense([1])}
                )
            },
            "`dataset` must be dense",
        ),
        (
            {
                "dataset": tf.data.Dataset.from_tensor_slices(pairs_of(24)).batch(
                    4, drop_remainder=True
                ),
                "candidate_id_key": "candidate",
            },
            "`dataset` must hold single pairs",
        ),
        ({"candidate_id_key": "id"}, r"`candidate_id_key` must be .* \['candidate'\]. .*'id'"),
        ({"batch_size": 30, "drop_remainder": True}, "24 pairs and `batch_size=30`"),
        ({"group_size": 3}, "`group_size` must divide `batch_size`. Received: 3 and 5"),
        ({"initial_epoch": -1}, "`initial_epoch` must be an integer >= 0. Received: -1"),
        ({"shard_size": 4}, "`shard_size` must be at least `batch_size`. Received: 4 and 5"),
        ({"shard_size": 0}, "`shard_size` must be an integer >= 1. Received: 0"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1. Received: 0"),
        ({"num_neighbors": 0}, "`num_neighbors` must be an integer >= 1. Received: 0"),
    ],
)
def test_bad_arguments_of_shards(change, message):
    arguments = {
        "model": clusters()[0],
        "dataset": tf.data.Dataset.from_tensor_slices(pairs_of(24)),
        "batch_size": 5,
    }
    with pytest.raises(ValueError, match=message):
        GlobalContrastiveBatches.from_dataset(**{**arguments, **change})
