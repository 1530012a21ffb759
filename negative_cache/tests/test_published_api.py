"""Tests that code written for the published modules runs as it is, name by name."""

import inspect

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import filter_fns, handlers, losses, negative_cache, retrieval_fns, util
from negative_cache.tests.replicas import on_two_replicas, two_replicas

SPECS = {
    "id": tf.io.FixedLenFeature([], tf.int64),
    "embedding": tf.io.FixedLenFeature([2], tf.float32),
}
# Module -> name -> the parameters of what it is called with.
PUBLISHED = {
    negative_cache: {
        "NegativeCache": ["data", "age"],
        "CacheManager": ["specs", "cache_size", "use_lru"],
        "CacheManager.init_cache": ["self"],
        "CacheManager.update_cache": [
            "self",
            "cache",
            "new_items",
            "new_items_mask",
            "updated_item_data",
            "updated_item_indices",
            "updated_item_mask",
        ],
    },
    losses: {
        "CacheLossReturn": [
            "training_loss",
            "interpretable_loss",
            "updated_item_data",
            "updated_item_indices",
            "updated_item_mask",
            "staleness",
        ],
        "CacheLoss.__call__": [
            "self",
            "doc_network",
            "query_embeddings",
            "pos_doc_embeddings",
            "cache",
        ],
        "AbstractCacheClassificationLoss._retrieve_from_cache": [
            "self",
            "query_embeddings",
            "cache",
        ],
        "AbstractCacheClassificationLoss._score_documents": [
            "self",
            "query_embeddings",
            "doc_embeddings",
        ],
        "CacheClassificationLoss": [
            "embedding_key",
            "data_keys",
            "score_transform",
            "top_k",
            "reducer",
        ],
        "DistributedCacheClassificationLoss": [
            "embedding_key",
            "data_keys",
            "score_transform",
            "top_k",
            "reducer",
        ],
    },
    handlers: {
        "CacheLossHandler": [
            "cache_manager",
            "cache_loss",
            "embedding_key",
            "data_keys",
            "use_cross_replica",
        ],
        "CacheLossHandler.update_cache_and_compute_loss": [
            "self",
            "item_network",
            "query_embeddings",
            "pos_item_embeddings",
            "features",
        ],
    },
    retrieval_fns: {
        "AbstractRetrievalFn.__call__": ["self", "scores"],
        "MaxScoreRetrievalFn": [],
        "GumbelMaxRetrievalFn": ["inv_temp"],
    },
    filter_fns: {
        "CacheFilterFn.__call__": ["self", "cache", "new_items"],
        "IsInCacheFilterFn": ["keys"],
    },
    util: {
        "approximate_top_k_with_indices": ["negative_scores", "k"],
        "cross_replica_concat": ["tensor", "axis"],
    },
}


@pytest.mark.parametrize(
    ["module", "name", "parameters"],
    [(module, name, value) for module, names in PUBLISHED.items() for name, value in names.items()],
)
def test_every_published_name_is_there_and_takes_what_it_took(module, name, parameters):
    found = module
    for part in name.split("."):
        found = getattr(found, part)
    received = [key for key in inspect.signature(found).parameters if key != "kwargs"]
    assert received[: len(parameters)] == parameters


def test_update_cache_takes_keywords_and_nothing_at_all():
    manager = negative_cache.CacheManager(SPECS, 3)
    cache = manager.init_cache()
    with pytest.raises(TypeError):
        manager.update_cache(cache, {})
    for _ in range(2):
        cache = manager.update_cache(cache)
    assert cache.age.numpy().tolist() == [2, 2, 2]
    cache = manager.update_cache(cache, updated_item_data={"id": [7]}, updated_item_indices=[1])
    assert cache.age.numpy().tolist() == [3, 0, 3]
    assert cache.data["id"].numpy().tolist() == [0, 7, 0]


def test_the_filter_looks_at_rows_and_not_at_ages():
    cache = negative_cache.NegativeCache(data={"id": tf.constant([5, 6], tf.int64)}, age=None)
    mask = filter_fns.IsInCacheFilterFn(keys=("id",))(cache, {"id": tf.constant([6, 7], tf.int64)})
    assert mask.numpy().tolist() == [False, True]


class NearestOfOneSource(losses.AbstractCacheClassificationLoss):
    """A loss of the user's, on the published base class."""

    def _retrieve_from_cache(self, query_embeddings, cache):
        data = cache["cache"].data
        embeddings = tf.convert_to_tensor(data["embedding"])
        scores = tf.matmul(query_embeddings, embeddings, transpose_b=True)
        indices = retrieval_fns.MaxScoreRetrievalFn()(scores)
        return losses._RetrievalReturn(
            retrieved_data={"id": tf.gather(data["id"], indices[:, 0])},
            scores=scores,
            retrieved_indices=indices,
            retrieved_cache_embeddings=tf.gather(embeddings, indices[:, 0]),
        )

    def _score_documents(self, query_embeddings, doc_embeddings):
        return tf.reduce_sum(query_embeddings * doc_embeddings, axis=1)

    def __call__(self, *, doc_network, query_embeddings, pos_doc_embeddings, cache):
        found = self._calculate_training_loss_and_summaries(
            doc_network, query_embeddings, pos_doc_embeddings, cache
        )
        return losses.CacheLossReturn(
            training_loss=found.training_loss,
            interpretable_loss=found.interpretable_loss,
            updated_item_data={"cache": None},
            updated_item_indices={"cache": None},
            updated_item_mask={"cache": None},
            staleness=found.staleness,
        )


def make_handler(loss, **kwargs):
    manager = negative_cache.CacheManager(SPECS, cache_size=4)
    return handlers.CacheLossHandler(
        cache_manager=manager,
        cache_loss=loss,
        embedding_key="embedding",
        data_keys=("id",),
        **kwargs,
    )


def network(features):
    return tf.one_hot(features["id"] % 2, 2) * tf.cast(features["id"][:, tf.newaxis], tf.float32)


def step(handler, ids):
    ids = tf.constant(ids, tf.int64)
    return handler.update_cache_and_compute_loss(
        item_network=network,
        query_embeddings=tf.eye(2)[: len(ids)],
        pos_item_embeddings=network({"id": ids}),
        features={"id": ids},
    )


def test_a_loss_on_the_published_base_class_called_by_keyword():
    handler = make_handler(NearestOfOneSource())
    assert handler.cache_manager.cache_size == 4
    step(handler, [2, 3])
    assert handler.cache.data["id"].numpy().tolist() == [2, 3, 0, 0]
    # Query (1, 0) with its positive 4: score 4, of the cache 2, 0, 0, 0; (0, 1) with 1: 3.
    loss = step(handler, [4, 1])
    odds = np.array([np.exp(2.0) + 3.0, np.exp(3.0) + 3.0]) / np.exp([4.0, 1.0])
    share = odds / (1.0 + odds)
    assert float(loss) == pytest.approx(np.mean(share * [2.0 - 4.0, 3.0 - 1.0]), rel=1e-5)
    assert handler.cache.data["id"].numpy().tolist() == [2, 3, 4, 1]


def test_methods_of_the_published_loss_may_be_overridden():
    class Scaled(losses.CacheClassificationLoss):
        def _score_documents(self, query_embeddings, doc_embeddings):
            return 2.0 * super()._score_documents(query_embeddings, doc_embeddings)

    class First(losses.CacheClassificationLoss):
        def _retrieve_from_cache(self, query_embeddings, cache):
            found = super()._retrieve_from_cache(query_embeddings, cache)
            data = cache["cache"].data
            zeros = tf.zeros_like(found.retrieved_indices)
            return found._replace(
                retrieved_indices=zeros,
                retrieved_data={"id": tf.gather(data["id"], zeros[:, 0])},
                retrieved_cache_embeddings=tf.gather(data["embedding"], zeros[:, 0]),
            )

    values = {}
    for kind in (losses.CacheClassificationLoss, Scaled, First):
        handler = make_handler(kind("embedding", ["id"]))
        step(handler, [2, 3])
        values[kind] = float(step(handler, [4, 1]))
        assert isinstance(handler.cache_loss, losses.AbstractCacheClassificationLoss)
    assert len(set(values.values())) == 3


def test_retrieval_functions_are_modules_whose_variables_are_found():
    module = tf.Module()
    module.retrieval = retrieval_fns.GumbelMaxRetrievalFn(inv_temp=tf.Variable(2.0))
    assert len(module.trainable_variables) == 1
    assert issubclass(retrieval_fns.AbstractRetrievalFn, tf.Module)


def test_across_replicas_the_caches_stay_equal():
    with two_replicas().scope():
        handler = make_handler(
            losses.CacheClassificationLoss("embedding", ["id"]), use_cross_replica=True
        )

    def replica_step(number):
        ids = tf.constant([2, 3], tf.int64) + 2 * tf.cast(number, tf.int64)
        # What each replica draws, and so refreshes, is its own.
        table = tf.random.stateless_uniform([40, 2], [tf.cast(number, tf.int32), 0])
        fresh = lambda features: tf.gather(table, features["id"])  # noqa: E731
        handler.update_cache_and_compute_loss(fresh, tf.eye(2), tf.gather(table, ids), {"id": ids})
        return {
            **{k: tf.identity(v) for k, v in handler.cache.data.items()},
            "age": handler.cache.age,
        }

    step_on_both = on_two_replicas(
        lambda: replica_step(tf.distribute.get_replica_context().replica_id_in_sync_group)
    )
    for _ in range(3):
        first, second = step_on_both()
        for key in first:
            np.testing.assert_array_equal(first[key], second[key], err_msg=key)
