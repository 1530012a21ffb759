"""What is run on two replicas of one process and on two workers, and must give the same.

`python -m negative_cache.tests.multi_worker_cases folder` is a worker. It prints its results as
JSON.
"""

import functools
import json
import pathlib
import sys

import numpy as np
import tensorflow as tf

from negative_cache import CachedRetrieval, DualEncoder, evaluation, layers, losses, util
from negative_cache._compat import IS_KERAS_2, keras
from negative_cache.handlers import CacheLossHandler
from negative_cache.layers._variables import by_replica, make_state_variable, scatter_rows
from negative_cache.negative_cache import CacheManager
from negative_cache.retrieval_fns import MaxScoreRetrievalFn

DTYPES = (
    *(tf.bool, tf.string, tf.float16, tf.bfloat16, tf.float32, tf.float64),
    *(tf.int8, tf.int16, tf.int32, tf.int64, tf.uint8, tf.uint16, tf.uint32, tf.uint64),
)
WORDS = [f"word {i}" for i in range(24)]
TITLE = {"title": tf.io.FixedLenFeature([], tf.string)}
SPECS = {
    **TITLE,
    "year": tf.io.FixedLenFeature([], tf.int32),
    "embedding": tf.io.FixedLenFeature([2], tf.bfloat16),
}
# For each step and replica, the words of a batch.
STEPS = [
    [[0, 1, 2, 3], [4, 5, 6, 7]],
    [[8, 9, 2, 10], [3, 11, 5, 12]],
    [[0, 9, 1, 4], [13, 4, 7, 6]],
]


class Tower(keras.layers.Layer):
    """A vector for each word."""

    def __init__(self, key=None):
        super().__init__()
        self.key = key
        self.look_up = keras.layers.StringLookup(vocabulary=WORDS)
        self.table = keras.layers.Embedding(len(WORDS) + 1, 4)

    def call(self, inputs):
        return self.table(self.look_up(inputs if self.key is None else inputs[self.key]))


def make_model(**kwargs):
    """A compiled model whose cache holds strings."""
    tower = Tower("title")
    task = CachedRetrieval(
        tower,
        TITLE,
        16,
        candidate_id_key="title",
        remove_accidental_hits=True,
        in_batch_negatives=True,
        seed=3,
        **kwargs,
    )
    model = DualEncoder(Tower(), tower, task)
    model.compile(keras.optimizers.Adam(0.1))
    return model


def states(strategy, folder):
    """State variables of every dtype, of which each replica writes one row."""
    written = {}
    for dtype in DTYPES:
        with strategy.scope():
            variable = make_state_variable(functools.partial(_as, dtype, tf.ones([3])), dtype.name)

        def write(dtype=dtype, variable=variable):
            row = tf.cast(util.replica_id(), tf.float32)
            scatter_rows(variable, tf.constant([1], tf.int64), _as(dtype, row[tf.newaxis]))

        strategy.run(write)
        written[dtype.name] = [_listed(part) for part in by_replica(variable)]
    return _by_replica(written)


def files(strategy, folder):
    """The rows of a cache that was loaded from a checkpoint, and from a file of Keras."""
    with strategy.scope():
        cache, *others = (layers.Cache(SPECS, 3) for _ in range(3))

    def write():
        row = util.replica_id()[tf.newaxis]
        embedding = tf.cast(tf.stack([row, row + 1], axis=1), tf.bfloat16)
        new = {"title": tf.as_string(row + 7), "year": row - 3, "embedding": embedding}
        cache.update(new_items=new)

    strategy.run(write)
    path = tf.train.Checkpoint(cache=cache).write(f"{folder}/checkpoint")
    tf.train.Checkpoint(cache=others[0]).read(path).assert_consumed()
    store = {}
    cache.save_own_variables(store)
    others[1].load_own_variables(store)
    rows = {}
    for i, other in enumerate(others):
        for key, variable in other.data.items():
            rows[f"{key}_{i}"] = [_listed(part) for part in by_replica(variable)]
    return _by_replica(rows)


def training(strategy, folder, **kwargs):
    """Weights, rows and losses of a training loop of one's own."""
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = make_model(**kwargs)
        model(_batch_of(STEPS[0][0]), training=False)
        optimizer = model.optimizer
        optimizer.build(model.trainable_variables)

    def step(words):
        batch = _batch_of(words[util.replica_id()])
        with tf.GradientTape() as tape:
            loss = model.compute_loss(batch, y_pred=model(batch, training=True), training=True)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return loss

    train = tf.function(
        lambda words: strategy.reduce("SUM", strategy.run(step, [words]), axis=None)
    )
    loss = [float(train(tf.constant(words))) for words in STEPS]
    cache = model.task.cache
    weights = np.concatenate([np.ravel(weight) for weight in model.trainable_variables])
    results = {"loss": loss, "weights": weights.tolist()}
    rows = {
        "titles": [_listed(part) for part in by_replica(cache.data["title"])],
        "embeddings": [_listed(part) for part in by_replica(cache.embeddings)],
    }
    return [{**results, **of_replica} for of_replica in _by_replica(rows)]


def pooled(strategy, folder):
    """The same, with the caches and the batches of both replicas as one."""
    return training(strategy, folder, pool="replicas")


def evaluated(strategy, folder):
    """Metrics over a corpus that is divided, and the words that each replica has encoded."""
    table = np.random.default_rng(0).normal(size=[len(WORDS), 4]).astype(np.float32)
    encoded = [set() for _ in range(2)]

    def record(replica, words):
        encoded[int(replica)].update(word.decode() for word in words.numpy().tolist())

    def tower(words):
        tf.py_function(record, [util.replica_id(), words], [])
        numbers = tf.strings.to_number(tf.strings.substr(words, 5, 2), tf.int32)
        return tf.ensure_shape(tf.gather(table, numbers), [None, 4])

    def query_tower(numbers):
        return tf.gather(-table, numbers)

    words = tf.data.Dataset.from_tensor_slices(WORDS)
    numbers = np.arange(12)
    lists = {"positives": [3, 5], "excluded": [1, 7]}
    validation = {
        "query": numbers,
        **{
            name: np.array([[WORDS[number + step] for step in steps] for number in numbers])
            for name, steps in lists.items()
        },
    }
    # Workers read it in orders of their own.
    validation = tf.data.Dataset.from_tensor_slices(validation).shuffle(12).batch(5)
    # Six batches, so that no replica repeats one for want of its own.
    with strategy.scope():
        metrics = evaluation.evaluate(
            (query_tower, tower),
            words.batch(4),
            validation,
            (1, 3, 9),
            candidate_id_key="candidate",
        )
    local = strategy.experimental_local_results(strategy.run(util.replica_id))
    values = [metrics[name] for name in sorted(metrics)]
    return [{"metrics": values, "encoded": sorted(encoded[int(replica)])} for replica in local]


def published(strategy, folder):
    """Losses of the published API, and the rows that its handlers leave."""
    results = {}
    for name in ("CacheClassificationLoss", "DistributedCacheClassificationLoss"):
        for use_cross_replica in (False, True):
            loss = getattr(losses, name)("embedding", ["title"])
            loss._retrieval_fn = MaxScoreRetrievalFn()
            specs = {**TITLE, "embedding": tf.io.FixedLenFeature([2], tf.float32)}
            with strategy.scope():
                handler = CacheLossHandler(
                    CacheManager(specs, 4), loss, "embedding", ["title"], use_cross_replica
                )
            run = tf.function(lambda step: strategy.run(step))  # noqa: B023
            step = functools.partial(_handle, handler)
            values = [strategy.experimental_local_results(run(step)) for _ in range(2)]
            case = f"{name}_{use_cross_replica}"
            results[f"{case}_losses"] = [[float(x) for x in part] for part in zip(*values)]
            titles = by_replica(handler.cache.data["title"])
            results[f"{case}_titles"] = [_listed(part) for part in titles]
    return _by_replica(results)


def refusal(strategy):
    """What Keras 3 says to a `fit` of several workers."""
    with strategy.scope():
        model = make_model()
    try:
        model.fit(tf.data.Dataset.from_tensors(_batch_of(STEPS[0][0])), verbose=0)
    except ValueError as error:
        return str(error)


# Only `training` may differ under Keras 2. The workers of all cases are the same processes.
_OF_ONE_KERAS = () if IS_KERAS_2 else (states, files, pooled, evaluated, published)
CASES = {case.__name__: case for case in (training, *_OF_ONE_KERAS)}


def _handle(handler):
    numbers = tf.as_string([util.replica_id(), util.replica_id() + 2])

    def network(features):
        number = tf.strings.to_number("0" + features["title"])[:, tf.newaxis]
        return tf.concat([number, tf.ones_like(number)], axis=1)

    features = {"title": numbers}
    queries = tf.cast(util.replica_id() + 1, tf.float32) * tf.constant([[0.1, 0.2], [0.3, -0.1]])
    return handler.update_cache_and_compute_loss(network, queries, network(features), features)


def _batch_of(words):
    words = tf.gather(WORDS, words)
    return {"query": words, "candidate": {"title": words}}


def _as(dtype, values):
    return tf.as_string(values) if dtype == tf.string else tf.cast(values, dtype)


def _listed(variable):
    values = variable.numpy()
    if values.dtype == object:
        return [text.decode() for text in values.tolist()]
    return values.astype(float).tolist()


def _by_replica(parts):
    """From the parts of the replicas by name to names and parts by replica."""
    return [dict(zip(parts, each)) for each in zip(*parts.values())]


if __name__ == "__main__":
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    number = strategy.cluster_resolver.task_id
    folder = pathlib.Path(sys.argv[1]) / f"worker_{number}"
    results = {name: case(strategy, folder) for name, case in CASES.items()}
    print(json.dumps({**results, "refusal": None if IS_KERAS_2 else refusal(strategy)}))
