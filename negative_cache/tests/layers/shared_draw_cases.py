"""Tasks whose queries share draws, and the gradient that they are to have in expectation.

The reference has every row of the cache as a logit's part of its own. It knows no draws.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from negative_cache import Corrector, LearnedTemperature, NystromCorrector, TreeIndex
from negative_cache.tests.layers.corpus_cases import (
    corrected_rows,
    drifted,
    make_corpus_task,
    step,
    teach,
)
from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    Curve,
    freeze_cache,
    make_queries,
    make_table,
    make_task,
)

NUM_CANDIDATES, IDS = 16, [0, 1, 2, 3, 4]
# 1 and 2 are positives too.
CACHED = [5, 6, 7, 8, 9, 10, 1, 2]
# The table of the tower of now, and of the tower that filled the cache.
TABLE = make_table(NUM_CANDIDATES)
STALE = drifted(TABLE, 0.3)


@dataclasses.dataclass(frozen=True)
class Case:
    """A task, a call of it, and what of it matters to the gradient.

    Attributes:
      task: the arguments of `CachedRetrieval`; values that are functions are called.
      call: arguments of a call.
      cached: the candidates in the cache; None for a corpus, in which all are.
      left_out: [B, C] bool, the rows that are no negatives of a query by their ids.
      log_weights: [C], what is added to the scores of the rows.
      log_expected: [B], what is taken from the batch's scores by the log Q correction.
      explicit: [B, M] the candidates that are listed as negatives.
      known: what makes of the stale rows [C, d] what the sampler knows, if something does.
      set_up: changes the task before its first step.
    """

    task: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cached: list[int] | None = dataclasses.field(default_factory=lambda: CACHED)
    left_out: np.ndarray | None = None
    log_weights: np.ndarray | None = None
    log_expected: np.ndarray | None = None
    explicit: np.ndarray | None = None
    known: Callable[[Any], np.ndarray] | None = None
    set_up: Callable[[Any], None] | None = None

    @property
    def rows(self) -> list[int]:
        """The candidates in the rows."""
        return list(range(NUM_CANDIDATES)) if self.cached is None else self.cached


def own_rows(rows):
    """[B, C] bool, the rows that hold the positive of a query."""
    return np.equal(np.array(IDS)[:, np.newaxis], np.array(rows)[np.newaxis])


def make_frozen(case, *, stale=STALE, filled=True, **kwargs):
    """The task of a case, whose cache the tower of `stale` has filled and no step changes."""
    kwargs = {key: value() if callable(value) else value for key, value in case.task.items()} | {
        "reduction": "sum",
        **kwargs,
    }
    if case.cached is None:
        task = make_corpus_task(stale, **kwargs)
    else:
        size = max(len(case.cached), len(IDS))
        task = make_task(
            stale, cache_size=size, filled_with=case.cached if filled else (), **kwargs
        )
    if case.set_up is not None:
        case.set_up(task)
    task.candidate_network.table.assign(TABLE)
    freeze(task)
    return task


def freeze(task):
    """Lets no step change the cache or the corrector."""
    freeze_cache(task)
    if task.corrector is not None:
        task.corrector.learn = lambda *args: None
        task.corrector.rows_to_encode = lambda *args: None


def as_variable(weight):
    """A variable of Keras 3 has one of TensorFlow."""
    return weight if isinstance(weight, tf.Variable) else weight.value


def repeated(gradients, shapes, count):
    """[count, ...] of each tensor, of `shapes`, that `gradients()` returns, in one graph."""

    @tf.function
    def sample():
        arrays = [tf.TensorArray(tf.float32, count, element_shape=shape) for shape in shapes]
        for i in tf.range(count):
            arrays = [array.write(i, part) for array, part in zip(arrays, gradients())]
        return [array.stack() for array in arrays]

    return [part.numpy() for part in sample()]


class Sampler:
    """Gradients of training steps of a task with a frozen cache."""

    def __init__(self, case, task):
        self._case, self._task = case, task
        self.queries = tf.Variable(make_queries(len(IDS)))
        learned = [] if task.score_transform is None else task.score_transform.trainable_variables
        tower = task.candidate_network
        self.weights = [as_variable(part) for part in (self.queries, tower.table, *learned)]

    def gradients(self):
        """Of one step: a list of those of the queries, the table, and what a transform learns."""
        case, task, tower = self._case, self._task, self._task.candidate_network
        features = {"id": tf.constant(IDS, tf.int64)}
        more = dict(case.call)
        with tf.GradientTape() as tape:
            if case.explicit is not None:
                flat = {"id": tf.constant(case.explicit.reshape(-1), tf.int64)}
                shape = [*case.explicit.shape, DIM]
                more["negative_embeddings"] = tf.reshape(tower(flat), shape)
            loss = task(
                tf.convert_to_tensor(self.queries), tower(features), features, training=True, **more
            )
        return [tf.convert_to_tensor(part) for part in tape.gradient(loss, self.weights)]

    def many(self, count):
        """[count, ...] for each weight."""
        # What a first call makes, no loop may make.
        first = self.gradients()
        return repeated(self.gradients, [part.shape for part in first], count)

    def expected(self):
        """The gradients, by all rows of the cache at once."""
        with tf.GradientTape() as tape:
            loss = dense_loss(self._case, self._task, tf.convert_to_tensor(self.queries))
        return [tf.convert_to_tensor(part).numpy() for part in tape.gradient(loss, self.weights)]


def dense_loss(case, task, queries):
    """The sum of the losses, with the value of stale rows and the gradient of fresh ones."""
    options = case.task
    transform = tf.identity if task.score_transform is None else task.score_transform
    table = tf.convert_to_tensor(task.candidate_network.table)
    queries /= options.get("temperature", 1.0)
    positives = transform(tf.reduce_sum(queries * tf.gather(table, IDS), axis=1))

    known = task.cache.embeddings.numpy() if case.known is None else case.known(task)
    known = known[: len(case.rows)]
    scores = tf.stop_gradient(transform(queries @ known.T))
    left_out = np.zeros(scores.shape, bool) if case.left_out is None else case.left_out
    margin = options.get("false_negative_margin")
    if margin is not None:
        limit = tf.stop_gradient(positives) - margin
        left_out = left_out | (scores > limit[:, tf.newaxis]).numpy()
        assert 0 < np.sum(left_out) < left_out.size
    if case.log_weights is not None:
        scores += case.log_weights
    scores = tf.where(left_out, -1e30, scores)
    law = tf.where(left_out, 0.0, tf.nn.softmax(scores))
    log_partition = tf.where(np.all(left_out, axis=1), -1e30, tf.reduce_logsumexp(scores, axis=1))
    fresh = transform(queries @ tf.transpose(tf.gather(table, case.rows)))
    mean = tf.reduce_sum(law * fresh, axis=1)
    logits = [(log_partition + (mean - tf.stop_gradient(mean)))[:, tf.newaxis]]

    if options.get("in_batch_negatives"):
        in_batch = transform(queries @ tf.transpose(tf.gather(table, IDS)))
        if case.log_expected is not None:
            in_batch -= case.log_expected
            positives -= case.log_expected
        logits.append(tf.where(tf.eye(len(IDS), dtype=tf.bool), -1e30, in_batch))
    if case.explicit is not None:
        listed = tf.gather(table, case.explicit)
        logits.append(transform(tf.reduce_sum(queries[:, tf.newaxis] * listed, axis=2)))
    logits = tf.concat([positives[:, tf.newaxis], *logits], axis=1)
    losses = tf.reduce_logsumexp(logits, axis=1) - positives
    return tf.reduce_sum(losses * case.call.get("sample_weight", 1.0))


def teach_once(task):
    """Lets rows have ages, and the corrector move them."""
    for turn in range(3):
        step(task, make_queries(1), [3 * turn])
    teach(task.corrector, STALE, TABLE, age=2)
    assert np.max(np.abs(corrected_rows(task) - task.cache.embeddings)) > 0.1


# 8 rows and 5 candidates of the batch are 13 draws from the stream.
BATCH_P = np.float32([0.2, 0.05, 0.3, 0.01, 0.1])
ROW_P = np.float32([0.3, 0.2, 0.02, 0.1, 0.05, 0.4, 0.1, 0.01])


def add_with_probabilities(task):
    task.add_to_cache({"id": tf.constant(CACHED, tf.int64)}, tf.constant(ROW_P))


EXPLICIT = np.array([[9, 11], [12, 3], [15, 15], [0, 1], [13, 14]])
# Query 0 has nothing left; query 3 shares an id with no row.
KNOWN = np.array([CACHED, [5, 6] + [1] * 6, [2] * 8, [15] * 8, [5, 6, 7, 8, 9, 10, 1, 4]])
KNOWN_ROWS = np.any(np.array(CACHED)[np.newaxis, :, np.newaxis] == KNOWN[:, np.newaxis], axis=2)

CASES = {
    "default": Case(),
    "sampled": Case({"exact_query_gradient": False}),
    "divided": Case({"temperature": 0.5}),
    "in-batch, accidental hits": Case(
        {"in_batch_negatives": True, "remove_accidental_hits": True}, left_out=own_rows(CACHED)
    ),
    "known positives": Case(
        {"in_batch_negatives": False},
        {"known_positive_ids": KNOWN},
        left_out=KNOWN_ROWS | own_rows(CACHED),
    ),
    "margin": Case({"false_negative_margin": -0.2}),
    "margin, sampled": Case({"false_negative_margin": 0.3, "exact_query_gradient": False}),
    "explicit": Case({"exact_query_gradient": False}, explicit=EXPLICIT),
    "log Q": Case(
        {"in_batch_negatives": True, "use_lru": False},
        {"candidate_sampling_probability": tf.constant(BATCH_P)},
        log_weights=-np.log(13 * ROW_P),
        log_expected=np.log(13 * BATCH_P),
        set_up=add_with_probabilities,
    ),
    "learned temperature": Case({"score_transform": lambda: LearnedTemperature(0.5)}),
    "learned temperature, sampled": Case(
        {"score_transform": lambda: LearnedTemperature(0.5), "exact_query_gradient": False}
    ),
    "curve": Case({"score_transform": Curve, "in_batch_negatives": True}),
    "corpus": Case(cached=None, left_out=own_rows(range(NUM_CANDIDATES))),
    "corrector": Case(
        {"corrector": Corrector},
        cached=None,
        left_out=own_rows(range(NUM_CANDIDATES)),
        known=corrected_rows,
        set_up=teach_once,
    ),
    "Nyström, sampled": Case(
        {"corrector": lambda: NystromCorrector(6), "exact_query_gradient": False},
        cached=None,
        left_out=own_rows(range(NUM_CANDIDATES)),
        known=corrected_rows,
        set_up=teach_once,
    ),
    "index": Case({"index": lambda: TreeIndex(len(CACHED), DIM)}),
    "sample weights": Case({}, {"sample_weight": tf.constant([1.0, 0.0, 3.0, 0.5, 0.0])}),
}
# The log Q case fills its cache itself.
EMPTY_AT_FIRST = {"log Q"}
