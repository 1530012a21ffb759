"""The handlers: one step of training, and the caches that it leaves."""

from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import util
from negative_cache._compat import keras
from negative_cache.handlers import CacheLossHandler, MultiCacheLossHandler
from negative_cache.losses import CacheClassificationLoss, CacheLossReturn
from negative_cache.negative_cache import CacheManager, NegativeCache
from negative_cache.retrieval_fns import MaxScoreRetrievalFn
from negative_cache.tests.replicas import run_on_two_replicas, two_replicas

SPECS = {
    "title": tf.io.FixedLenFeature([], tf.string),
    "embedding": tf.io.FixedLenFeature([2], tf.float32),
}


class ItemNetwork(keras.Model):
    """Embeds "k" as weight · [k, 1], and the "" of an unfilled row, which may be drawn, as "0"."""

    def __init__(self):
        super().__init__()
        self.scale = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")

    def call(self, features):
        number = tf.strings.to_number("0" + features["title"])[:, tf.newaxis]
        return tf.concat([self.scale(number), self.scale(tf.ones_like(number))], axis=1)


def make_handler(loss=None, use_lru=False, **kwargs):
    """A handler that inserts in order, unless `use_lru`, whatever is drawn."""
    loss = loss or CacheClassificationLoss("embedding", ["title"])
    manager = CacheManager(SPECS, cache_size=4, use_lru=use_lru)
    return CacheLossHandler(manager, loss, "embedding", ["title"], **kwargs)


def titles(numbers):
    return {"title": tf.constant([str(number) for number in numbers])}


def step(handler, network, numbers, queries=None, **kwargs):
    features = titles(numbers)
    queries = tf.ones([len(numbers), 2]) if queries is None else queries
    return handler.update_cache_and_compute_loss(
        network, queries, network(features), features, **kwargs
    )


def cached_titles(cache):
    return [int(title or b"-1") for title in cache.data["title"].numpy().tolist()]


def test_is_a_keras_layer_with_a_cache_of_live_variables():
    handler = make_handler(name="handler")
    assert isinstance(handler, keras.layers.Layer)
    assert handler.name == "handler"
    cache = handler.cache
    assert isinstance(cache, NegativeCache)
    step(handler, ItemNetwork(), [3, 5])
    assert cached_titles(cache) == [3, 5, -1, -1]
    np.testing.assert_array_equal(cache.data["embedding"][:2], [[3, 1], [5, 1]])
    np.testing.assert_array_equal(handler.cache.age, [0, 0, 1, 1])


def test_a_step_refreshes_the_drawn_row_and_inserts_the_batch():
    loss = CacheClassificationLoss("embedding", ["title"], reducer=tf.reduce_sum)
    loss._retrieval_fn = MaxScoreRetrievalFn()
    handler, network = make_handler(loss, use_lru=True), ItemNetwork()
    # Every score is 0, and row 0 is drawn. The youngest at once, it is the last to be replaced.
    step(handler, network, [7, 2, 3, 4], queries=tf.zeros([4, 2]))
    assert cached_titles(handler.cache) == [4, 7, 2, 3]
    network.scale.set_weights([np.full([1, 1], 2.0, np.float32)])
    # [1, 1] scores 5, 8, 3 and 4 with the stale rows. With the weight 2, the drawn one is [14, 2]
    # now, and the positive [2, 2].
    value = step(handler, network, [1])
    p_positive = np.exp(4) / (np.exp(4) + np.sum(np.exp([5, 8, 3, 4])))
    np.testing.assert_allclose(value, (1 - p_positive) * (16 - 4), rtol=1e-5)
    assert cached_titles(handler.cache) == [1, 7, 2, 3]
    np.testing.assert_array_equal(
        handler.cache.data["embedding"], [[2, 2], [14, 2], [2, 1], [3, 1]]
    )
    assert handler.cache.age.numpy().tolist() == [0, 0, 1, 1]


def test_gradients_reach_queries_and_network_but_not_the_cache():
    handler, network = make_handler(), ItemNetwork()
    step(handler, network, [1, 2, 3, 4])
    queries = tf.Variable([[0.1, 0.2], [0.3, 0.4]])
    with tf.GradientTape() as tape:
        value = step(handler, network, [1, 2], queries)
    cached = handler.cache.data["embedding"]
    gradients = tape.gradient(value, [queries, network.scale.kernel, cached])
    assert gradients[0] is not None and gradients[1] is not None and gradients[2] is None
    assert not any(variable is cached for variable in handler.trainable_variables)


def test_summaries():
    loss = CacheClassificationLoss("embedding", ["title"], reducer=None)
    handler, network = make_handler(loss=loss), ItemNetwork()
    step(handler, network, [1, 2, 3, 4])
    with mock.patch.object(tf.summary, "scalar") as scalar:
        # All rows are fresh. The query [1, 1] scores 2 with its positive [1, 1], 1 + k with [k, 1].
        step(handler, network, [1])
    written = {call.args[0]: call.args[1].numpy() for call in scalar.call_args_list}
    assert sorted(written) == ["cache/interpretable_prediction_loss", "cache/staleness"]
    expected = np.log(np.sum(np.exp([2, 2, 3, 4, 5]))) - 2
    np.testing.assert_allclose(written["cache/interpretable_prediction_loss"], expected, rtol=1e-5)
    assert written["cache/staleness"] == 0


def test_in_a_tf_function_without_retrace():
    handler, network = make_handler(), ItemNetwork()
    network(titles([1]))
    num_traces = 0

    @tf.function
    def train_step(features):
        nonlocal num_traces
        num_traces += 1
        return handler.update_cache_and_compute_loss(
            network, tf.ones([2, 2]), network(features), features
        )

    for numbers in ([1, 2], [3, 4], [5, 6]):
        assert np.isfinite(train_step(titles(numbers)))
    assert num_traces == 1
    assert {5, 6} <= set(cached_titles(handler.cache))


@pytest.mark.parametrize("names_its_source", [True, False])
def test_any_callable_is_a_loss(names_its_source):
    def cache_loss(doc_network, query_embeddings, pos_doc_embeddings, cache):
        ((source, received),) = cache.items()
        assert isinstance(received, NegativeCache)
        updates = {"embedding": tf.fill([1, 2], 9.0)}, tf.constant([1]), tf.constant([True])
        if names_its_source:
            updates = tuple({source: update} for update in updates)
        return CacheLossReturn(tf.constant(5.0), tf.constant(6.0), *updates, tf.constant(7.0))

    handler = make_handler(loss=cache_loss)
    assert step(handler, ItemNetwork(), [3]).numpy() == 5.0
    np.testing.assert_array_equal(handler.cache.data["embedding"], [[3, 1], [9, 9], [0, 0], [0, 0]])


def test_a_loss_may_update_nothing():
    handler = make_handler(loss=lambda **_: CacheLossReturn(1.0, 1.0, None, None, None, 0.0))
    step(handler, ItemNetwork(), [3])
    assert cached_titles(handler.cache) == [3, -1, -1, -1]


def test_checkpoint(tmp_path):
    handler = make_handler()
    step(handler, ItemNetwork(), [3, 5])
    path = tf.train.Checkpoint(handler=handler).save(str(tmp_path / "checkpoint"))
    restored = make_handler()
    tf.train.Checkpoint(handler=restored).restore(path).assert_consumed()
    assert cached_titles(restored.cache) == [3, 5, -1, -1]
    np.testing.assert_array_equal(restored.cache.age, handler.cache.age)


@pytest.mark.parametrize("use_cross_replica", [False, True])
def test_under_two_replicas(use_cross_replica):
    with two_replicas().scope():
        handler = make_handler(use_cross_replica=use_cross_replica)
        network = ItemNetwork()
        network(titles([1]))

    def replica_step():
        features = {"title": tf.as_string([util.replica_id() + 10])}
        value = handler.update_cache_and_compute_loss(
            network, tf.ones([1, 2]), network(features), features
        )
        data = handler.cache.data
        return value, {key: tf.gather(data[key], tf.range(4)) for key in data}

    for replica, (value, data) in enumerate(run_on_two_replicas(replica_step)):
        assert np.isfinite(value)
        expected = [10, 11, -1, -1] if use_cross_replica else [10 + replica, -1, -1, -1]
        assert [int(title or b"-1") for title in data["title"].numpy()] == expected
        filled = [number for number in expected if number >= 0]
        np.testing.assert_array_equal(data["embedding"][: len(filled), 0], filled)


def make_multi_handler(**kwargs):
    managers = {"news": CacheManager(SPECS, 4), "books": CacheManager(SPECS, 2, use_lru=False)}
    loss = kwargs.pop("loss", CacheClassificationLoss("embedding", ["title"]))
    return MultiCacheLossHandler(managers, loss, "embedding", ["title"], **kwargs)


@pytest.mark.parametrize(
    ("new_items_cache", "news", "books"),
    [
        (None, [8, 9, -1, -1], [8, 9]),
        ("books", [-1] * 4, [8, 9]),
        ({"news": [False, True]}, [9, -1, -1, -1], [-1, -1]),
        ({"news": [False, True], "books": [True, False]}, [9, -1, -1, -1], [8, -1]),
    ],
)
def test_new_items_enter_the_caches_they_are_meant_for(new_items_cache, news, books):
    # A loss without updates, since nothing can be drawn from caches without items.
    handler = make_multi_handler(loss=lambda **_: CacheLossReturn(1.0, 1.0, {}, {}, {}, 0.0))
    step(handler, ItemNetwork(), [8, 9], new_items_cache=new_items_cache)
    assert sorted(handler.cache) == ["books", "news"]
    assert cached_titles(handler.cache["news"]) == news
    assert cached_titles(handler.cache["books"]) == books


def test_draws_refresh_their_own_cache():
    loss = CacheClassificationLoss("embedding", ["title"])
    handler, network = make_multi_handler(loss=loss), ItemNetwork()
    # By hand, because a drawn row must have a title.
    for source, numbers in {"books": [1, 2], "news": [3, 4, 5, 6]}.items():
        embeddings = tf.cast([[number, 1] for number in numbers], tf.float32)
        handler._caches[source].update(new_items={**titles(numbers), "embedding": embeddings})
    network(titles([1]))
    network.scale.set_weights([np.full([1, 1], 10.0, np.float32)])
    # The columns are books 1 and 2, then news 3, 4, 5 and 6.
    loss._retrieval_fn = lambda scores: tf.constant([[1], [4]])
    step(handler, network, [8, 9], new_items_cache={})
    np.testing.assert_array_equal(handler.cache["books"].data["embedding"], [[1, 1], [20, 10]])
    np.testing.assert_array_equal(
        handler.cache["news"].data["embedding"], [[3, 1], [4, 1], [50, 10], [6, 1]]
    )
    # Only news is LRU.
    assert handler.cache["books"].age.numpy().tolist() == [1, 1]
    assert handler.cache["news"].age.numpy().tolist() == [1, 1, 0, 1]


LOSS = CacheClassificationLoss("embedding", ["title"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((CacheManager(SPECS, 4), LOSS, "e", ["title"]), r"`embedding_key` = 'e'.*\['embedding', "),
        ((CacheManager(SPECS, 4), LOSS, "embedding", ["x"]), r"`data_keys` = \['x'\].*'title'\]"),
        ((CacheManager(SPECS, 4), LOSS, "embedding", []), r"nothing else.*`data_keys` = \[\]"),
        ((CacheManager(SPECS, 4), None, "embedding", ["title"]), "`cache_loss` must be callable"),
        ((SPECS, LOSS, "embedding", ["title"]), "A `CacheManager` is needed for 'cache'"),
    ],
)
def test_bad_handler(arguments, message):
    with pytest.raises(ValueError, match=message):
        CacheLossHandler(*arguments)


def test_no_cache_manager():
    with pytest.raises(ValueError, match="`cache_managers` must map at least one.*Received: {}"):
        MultiCacheLossHandler({}, LOSS, "embedding", ["title"])


def test_bad_step():
    with pytest.raises(ValueError, match=r"`features` must have.*\['title'\].*\['name'\]"):
        make_handler().update_cache_and_compute_loss(
            ItemNetwork(), tf.ones([1, 2]), tf.ones([1, 2]), {"name": tf.constant(["1"])}
        )
    with pytest.raises(ValueError, match="`new_items_cache`.*some of.*'books', 'news'.*'songs'"):
        step(make_multi_handler(), ItemNetwork(), [1], new_items_cache="songs")
    with pytest.raises(ValueError, match="5 rows for a `cache_size` of 4"):
        step(make_handler(), ItemNetwork(), range(5))
