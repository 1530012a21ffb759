"""Small sources of negatives, and a model of them, that the tests of `Retrieval` share."""

import numpy as np
import tensorflow as tf

from negative_cache import (
    CacheSpec,
    Contribution,
    DualEncoder,
    FromCache,
    FromCorpus,
    InBatch,
    Negatives,
    Retrieval,
)
from negative_cache._compat import keras
from negative_cache.layers import Cache
from negative_cache.tests.layers.corpus_cases import corpus_of
from negative_cache.tests.layers.retrieval_cases import DIM, INT_ID, Table, make_table

SIZE = 12
SPECS = {"id": INT_ID}
TABLE = make_table(SIZE)


def stream(size=6, **kwargs):
    return FromCache(CacheSpec(SPECS, size), seed=1, **kwargs)


def corpus(tower, size=SIZE, **kwargs):
    cache = Cache.from_dataset(corpus_of(size), tower, candidate_id_key="id", verbose=0)
    return FromCorpus(cache, seed=2, **kwargs)


@keras.utils.register_keras_serializable("test")
class Anchors(Negatives):
    """Learned negatives, and how many steps they have seen."""

    def __init__(self, count, penalty=0.0, **kwargs):
        super().__init__(**kwargs)
        self.count, self.penalty = count, penalty
        ones = keras.initializers.Ones()
        self.anchors = self.add_weight(shape=(count, DIM), initializer=ones, name="anchors")
        self.num_steps = self.add_weight(
            shape=(), initializer="zeros", trainable=False, name="num_steps"
        )

    def logits(self, batch, training):
        anchors = tf.convert_to_tensor(self.anchors)
        return Contribution(batch.scores.of_all_pairs(batch.queries, anchors), pending="seen")

    def end_step(self, batch, contribution):
        assert contribution.pending == "seen"
        self.num_steps.assign_add(1.0)
        return self.penalty * tf.reduce_sum(tf.square(tf.convert_to_tensor(self.anchors)))

    def get_config(self):
        return {**super().get_config(), "count": self.count, "penalty": self.penalty}


def make_model(seed=0):
    keras.utils.set_random_seed(seed)
    query_tower, tower = Table(make_table(SIZE, seed=5 + seed)), Table(make_table(SIZE, seed=seed))
    sources = [
        InBatch(),
        stream(num_negatives=2, name="stream"),
        corpus(tower, refresh_fraction=0.1),
        Anchors(2),
    ]
    model = DualEncoder(query_tower, tower, Retrieval(tower, sources, candidate_id_key="id"))
    model.compile(keras.optimizers.SGD(0.1))
    return model


def pairs(order=range(SIZE)):
    ids = {"id": np.array(order)}
    return tf.data.Dataset.from_tensor_slices({"query": ids, "candidate": ids}).batch(3)
