"""A training step of every kind, for tests of where they run."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from negative_cache import (
    Cache,
    CachedRetrieval,
    Corrector,
    DualEncoder,
    NystromCorrector,
    TreeIndex,
    handlers,
    losses,
)
from negative_cache._compat import keras
from negative_cache.negative_cache import CacheManager

NUM_ROWS, DIM, BATCH = 300, 8, 16
SPECS = {
    "x": tf.io.FixedLenFeature([DIM], tf.float32),
    "id": tf.io.FixedLenFeature([], tf.int64),
    "count": tf.io.FixedLenFeature([], tf.int32),
    "flags": tf.io.FixedLenFeature([2], tf.bool),
    "bytes": tf.io.FixedLenFeature([3], tf.uint8),
    "small": tf.io.FixedLenFeature([], tf.int16),
}


class Tower(keras.layers.Layer):
    """A dense layer of the feature "x" that sees all others too."""

    def __init__(self):
        super().__init__(autocast=False)
        self.dense = keras.layers.Dense(DIM, dtype="float32")
        self.dense.build([None, DIM])

    def call(self, features):
        others = [
            tf.reduce_sum(tf.reshape(tf.cast(features[key], tf.float32), [-1, size]), axis=1)
            for key, size in (("count", 1), ("flags", 2), ("bytes", 3), ("small", 1))
        ]
        return self.dense(features["x"]) + 1e-3 * tf.add_n(others)[:, tf.newaxis]


def candidates(ids) -> dict[str, np.ndarray]:
    """Features of candidates `ids`."""
    ids = np.asarray(ids)
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=[NUM_ROWS, DIM]).astype(np.float32)[ids],
        "id": ids.astype(np.int64),
        "count": (ids % 7).astype(np.int32),
        "flags": np.stack([ids % 2 == 0, ids % 3 == 0], axis=-1),
        "bytes": np.stack([ids % 5, ids % 11, ids % 13], axis=-1).astype(np.uint8),
        "small": (ids % 17 - 8).astype(np.int16),
    }


def titled(ids) -> dict[str, np.ndarray]:
    """Features of candidates `ids`, with a string."""
    return {**candidates(ids), "title": np.array([f"candidate {i}" for i in ids])}


def batch_of(ids, features=candidates) -> dict:
    """A batch of a `DualEncoder` of positives `ids`, as tensors."""
    features = {key: tf.constant(values) for key, values in features(ids).items()}
    return {"query": features, "candidate": features}


def model_of(task: CachedRetrieval, features=candidates) -> DualEncoder:
    """A compiled model whose towers are one, with all of its variables."""
    model = DualEncoder(task.candidate_network, task.candidate_network, task)
    model.compile(keras.optimizers.SGD(0.1), jit_compile=False)
    model(batch_of(range(BATCH), features))
    model.optimizer.build(model.trainable_variables)
    return model


def streaming(specs=SPECS, **kwargs) -> CachedRetrieval:
    """A task whose cache streams."""
    settings = {"temperature": 0.5, "candidate_id_key": "id", "embedding_dim": DIM, "seed": 1}
    return CachedRetrieval(Tower(), specs, NUM_ROWS, **{**settings, **kwargs})


def covering(cache=None, features=candidates, **kwargs) -> CachedRetrieval:
    """A task whose cache covers a corpus."""
    tower = Tower()
    corpus = tf.data.Dataset.from_tensor_slices(features(range(NUM_ROWS))).batch(100)
    cache = {"candidate_id_key": "id", "verbose": 0, **(cache or {})}
    cache = Cache.from_dataset(corpus, tower, **cache)
    return CachedRetrieval(tower, cache=cache, **{"temperature": 0.5, "seed": 1, **kwargs})


def _index(**kwargs):
    # Two levels.
    return TreeIndex(NUM_ROWS, DIM, leaf_size=8, branching=4, beam=4, **kwargs)


def _coded(**kwargs):
    return _index(store_embeddings=False, residual_bytes=4, **kwargs)


TASKS: dict[str, Callable[[], CachedRetrieval]] = {
    "default": streaming,
    "in-batch": lambda: streaming(
        in_batch_negatives=True,
        remove_accidental_hits=True,
        num_hard_negatives=4,
        false_negative_margin=0.1,
        num_negatives=2,
    ),
    "shared draws": lambda: streaming(num_draws=8),
    "sampled gradient": lambda: streaming(exact_query_gradient=False, use_lru=False),
    "learned temperature": lambda: streaming(temperature="learned", in_batch_negatives=True),
    "score transform": lambda: streaming(score_transform=lambda scores: 3.0 * tf.tanh(scores)),
    "bfloat16": lambda: streaming(embedding_dtype="bfloat16"),
    "float16": lambda: streaming(embedding_dtype="float16"),
    "frequency": lambda: streaming(
        frequency_correction=True, use_lru=False, in_batch_negatives=True
    ),
    "corrector": lambda: streaming(corrector=Corrector(hidden_units=16, content_key="x")),
    "corrector, cross-entropy": lambda: streaming(
        corrector=Corrector(hidden_units=16, drift_loss="both")
    ),
    "Nyström": lambda: streaming(corrector=NystromCorrector(20)),
    "Nyström, linear": lambda: streaming(corrector=NystromCorrector(20, kernel="linear")),
    "refreshed": lambda: streaming(refresh_fraction=0.05),
    "index": lambda: streaming(index=_index()),
    "index, corrector": lambda: streaming(
        index=_index(), corrector=Corrector(hidden_units=16), false_negative_margin=0.1
    ),
    "index, bfloat16": lambda: streaming(
        index=_index(embedding_dtype="bfloat16"), embedding_dtype="bfloat16"
    ),
    "corpus": covering,
    "corpus, refreshed and corrected": lambda: covering(
        refresh_fraction=0.05, corrector=NystromCorrector(20), in_batch_negatives=True
    ),
    "corpus, index": lambda: covering({"index": _index()}),
    "corpus, coded index": lambda: covering({"index": _coded()}),
}
# What is not done at every step: the host decides.
TASKS_WITH_BRANCHES: dict[str, Callable[[], CachedRetrieval]] = {
    "probed": lambda: streaming(probe_size=8, probe_every=2),
    "refreshed now and then": lambda: covering(refresh_fraction=0.001),
    "Nyström, uniform": lambda: streaming(
        corrector=NystromCorrector(20, landmarks="uniform", num_encoded=5)
    ),
    "Nyström, k-means++": lambda: streaming(
        corrector=NystromCorrector(20, landmarks="k-means++", num_encoded=5)
    ),
}


# Those of which a part is on the host; features come with a title.
TITLED = {**SPECS, "title": tf.io.FixedLenFeature([], tf.string)}
TASKS_ON_HOST: dict[str, Callable[[], CachedRetrieval]] = {
    "strings": lambda: streaming(TITLED, in_batch_negatives=True, remove_accidental_hits=True),
    "strings, corrector": lambda: streaming(TITLED, corrector=Corrector(hidden_units=16)),
    "strings as ids": lambda: streaming(
        TITLED, candidate_id_key="title", remove_accidental_hits=True, refresh_fraction=0.05
    ),
    "corpus of strings": lambda: covering({"candidate_id_key": "title"}, titled),
    "corpus, features on the host": lambda: covering(
        {"on_host": ["bytes", "count"]}, titled, corrector=NystromCorrector(20)
    ),
    "corpus, index, ids on the host": lambda: covering(
        {"on_host": ["id"], "index": _index()}, titled
    ),
    "corpus, all on the host": lambda: covering(
        {"on_host": [*TITLED, "embedding"], "index": _coded()}, titled, refresh_fraction=0.05
    ),
}


def published_step(**kwargs) -> Callable:
    """A step of the published handler, whose loss takes `kwargs`: features -> loss, gradient."""
    specs = {**SPECS, "embedding": tf.io.FixedLenFeature([DIM], tf.float32)}
    tower, keys = Tower(), list(SPECS)
    loss = losses.CacheClassificationLoss("embedding", keys, **kwargs)
    handler = handlers.CacheLossHandler(CacheManager(specs, NUM_ROWS), loss, "embedding", keys)

    def step(features):
        with tf.GradientTape() as tape:
            embeddings = tower(features)
            loss = handler.update_cache_and_compute_loss(tower, embeddings, embeddings, features)
        return loss, tape.gradient(loss, tower.trainable_variables)

    return step
