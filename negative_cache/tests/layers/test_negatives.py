"""Tests of what sources of negatives are made with: `encode`, `own_logits`, `Contribution`."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import Contribution, Explicit, InBatch, Negatives, Retrieval
from negative_cache._compat import keras
from negative_cache.ops.contrastive import NOT_A_CANDIDATE
from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    Table,
    call,
    cross_entropy,
    make_queries,
    make_table,
)

TABLE = make_table(12)


class Listed(Negatives):
    """Candidates of fixed ids, encoded by the task's tower; keeps what it was given."""

    def __init__(self, ids, mask=None, **kwargs):
        super().__init__(**kwargs)
        self.ids, self.mask = np.array(ids), mask

    def logits(self, batch, training):
        embeddings = self.encode({"id": tf.reshape(self.ids, [-1])}, training)
        embeddings = tf.reshape(embeddings, [*self.ids.shape, DIM])
        self.found = batch.own_logits(embeddings, self.mask, self.ids)
        return Contribution(self.found)


class Fixed(Negatives):
    """Whatever logits it was made with."""

    def __init__(self, values, **kwargs):
        super().__init__(**kwargs)
        self.values = values

    def logits(self, batch, training):
        return Contribution(self.values)


@pytest.mark.parametrize("removes", [False, True])
def test_own_logits_leave_out_padding_and_right_ids(removes):
    queries = make_queries(2)
    # Query 0 has the positive 0, which stands in its list; query 1 has padding.
    source = Listed([[0, 5], [6, 7]], mask=tf.constant([[True, True], [True, False]]))
    task = Retrieval(
        Table(TABLE),
        [source],
        temperature=0.5,
        candidate_id_key="id",
        remove_accidental_hits=removes,
        reduction="none",
    )
    losses = call(task, queries, [0, 1], TABLE, training=False)
    scores = queries.astype(np.float64) @ TABLE.T / 0.5
    first = NOT_A_CANDIDATE if removes else scores[0, 0]
    expected = [[first, scores[0, 5]], [scores[1, 6], NOT_A_CANDIDATE]]
    np.testing.assert_allclose(source.found, expected, rtol=1e-5)
    kept = scores[0, [5] if removes else [0, 5]]
    expected = [cross_entropy(scores[0, 0], kept), cross_entropy(scores[1, 1], scores[1, [6]])]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_padding_may_be_embedded_as_nan():
    source = Fixed(None)
    mask = tf.constant([[True, False]])

    def logits(batch, training):
        embeddings = tf.stack([batch.candidates, batch.candidates * float("nan")], axis=1)
        return Contribution(batch.own_logits(embeddings, mask))

    source.logits = logits
    task = Retrieval(Table(TABLE), [source])
    queries, candidates = tf.Variable(make_queries(1)), tf.constant(TABLE[[3]])
    with tf.GradientTape() as tape:
        # Half of the mass is that of the positive, and half that of its copy.
        loss = task(tf.identity(queries), candidates, {"id": tf.constant([3])})
    assert float(loss) == pytest.approx(np.log(2.0), rel=1e-5)
    np.testing.assert_allclose(tape.gradient(loss, queries), np.zeros([1, DIM]), atol=1e-5)


def test_encode_has_the_gradient_of_the_tower_and_adds_no_losses():
    tower = keras.Sequential(
        [keras.layers.Input([DIM]), keras.layers.Dense(DIM, activity_regularizer="l2")]
    )
    candidates = tf.constant(TABLE[:3])
    source = Fixed(None)
    task = Retrieval(tower, [source])
    tower(candidates)
    num_losses, kernel = len(tower.losses), tower.layers[-1].kernel
    with tf.GradientTape() as tape:
        found = source.encode(candidates, training=True)
        total = tf.reduce_sum(found)
    assert source.get_task() is task
    assert len(tower.losses) == num_losses
    np.testing.assert_allclose(found, tower(candidates), rtol=1e-6)
    kernel = kernel if isinstance(kernel, tf.Variable) else kernel.value
    # d/dW of the sum of x W is the sum of the x, for each column.
    expected = np.tile(TABLE[:3].sum(axis=0)[:, None], [1, DIM])
    np.testing.assert_allclose(tape.gradient(total, kernel), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "values", [tf.zeros([2]), tf.zeros([2, 1, 1]), tf.zeros([2, 1], tf.float16)]
)
def test_refuses_logits_that_are_none(values):
    task = Retrieval(Table(TABLE), [InBatch(), Explicit(), Fixed(values)])
    with pytest.raises(ValueError, match=r"must be float32 of shape \[batch, negatives\]. Recei"):
        call(task, make_queries(2), [0, 1], TABLE)


def test_a_source_without_a_task_or_logits_says_so():
    with pytest.raises(ValueError, match="is not one of the `negatives` of a task yet"):
        InBatch(name="lonely").encode(tf.zeros([1, DIM]))
    with pytest.raises(NotImplementedError, match="Negatives has no `logits`"):
        call(Retrieval(Table(TABLE), [Negatives()]), make_queries(1), [0], TABLE)
