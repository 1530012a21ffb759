"""Sources of negatives and models of `worth.py` that the package does not have.

They are short on purpose: what other methods do, as their papers say it.
"""

import numpy as np
import tensorflow as tf
from _worth_data import Data

import negative_cache as nc
from negative_cache._compat import keras
from negative_cache.ops import contrastive


class UniformDraws(nc.Negatives):
    """n training candidates a step, uniform, the same for all queries, with exact gradient."""

    encodes_candidates = True

    def __init__(self, data: Data, num_draws: int, **kwargs):
        super().__init__(**kwargs)
        self.rows = tf.constant(data.train_candidates)
        self.ids = tf.constant(data.candidate_ids)
        self.num_draws = num_draws
        self.count = self.add_weight(shape=(), dtype="int64", trainable=False, name="count")

    @property
    def num_encoded(self):
        return tf.convert_to_tensor(self.count)

    def logits(self, batch, training):
        drawn = tf.random.uniform([self.num_draws], maxval=tf.size(self.rows), dtype=tf.int32)
        rows = tf.gather(self.rows, drawn)
        embeddings = self.encode({"ids": tf.gather(self.ids, rows), "row": rows}, training)
        return nc.Contribution(_shared_logits(batch, embeddings, rows))

    def end_step(self, batch, contribution):
        self.count.assign_add(self.num_draws)


class CrossBatchMemory(nc.Negatives):
    """The embeddings of the last batches, as they were (Wang et al., arXiv 1912.06798).

    They are never encoded again, and no gradient reaches the tower through them.

    Args:
      size: how many embeddings are kept.
      dim: d.
      start: how many embeddings pass before the memory counts, since those of the first steps
        change too fast.
      **kwargs: of the layer.
    """

    def __init__(self, size: int, dim: int, start: int, **kwargs):
        super().__init__(**kwargs)
        self.size, self.start = size, start

        def state(name, shape, dtype, initializer="zeros"):
            return self.add_weight(
                shape=shape, dtype=dtype, initializer=initializer, trainable=False, name=name
            )

        self.embeddings = state("embeddings", (size, dim), "float32")
        self.rows = state("rows", (size,), "int64", keras.initializers.Constant(-1))
        self.next = state("next", (), "int64")

    def logits(self, batch, training):
        rows = tf.cast(tf.convert_to_tensor(self.rows), tf.int32)
        logits = _shared_logits(batch, tf.convert_to_tensor(self.embeddings), rows)
        is_none = (rows < 0) | (self.next < self.start)
        return nc.Contribution(contrastive.leave_out(logits, is_none[tf.newaxis]))

    def end_step(self, batch, contribution):
        count = tf.cast(batch.num_candidates, tf.int64)
        places = ((self.next + tf.range(count)) % self.size)[:, tf.newaxis]
        rows = tf.cast(batch.features["row"], tf.int64)
        embeddings = tf.stop_gradient(batch.candidates)
        for variable, values in ((self.embeddings, embeddings), (self.rows, rows)):
            variable = getattr(variable, "value", variable)
            variable.scatter_nd_update(places, values)
        self.next.assign_add(count)


def _shared_logits(batch, embeddings, rows):
    """[B, n] scores of n candidates with all queries, without the own positive of each."""
    logits = batch.scores.of_all_pairs(batch.queries, embeddings)
    positives = batch.features["row"][: batch.num_queries]
    return contrastive.leave_out(logits, positives[:, tf.newaxis] == rows[tf.newaxis])


class GradCache(nc.DualEncoder):
    """The exact gradient of a large batch, encoded in parts (Gao et al., arXiv 2101.06983).

    A step encodes all parts without keeping their activations, takes the gradient of the loss by
    the embeddings, and encodes each part again to lead it to the weights. Of activations it holds
    those of one part.

    Args:
      num_parts: into how many equal parts a batch is split.
    """

    def __init__(self, *args, num_parts: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_parts = num_parts

    def train_step(self, batch):
        parts = self._split(batch)
        queries, candidates = self._embed_without_graph(parts)
        with tf.GradientTape() as tape:
            tape.watch([queries, candidates])
            loss = self.task(queries, candidates, batch["candidate"], training=True)
        by_embedding = tape.gradient(loss, [queries, candidates])
        gradients = self._gradients_of_parts(parts, by_embedding)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"loss": loss}

    def _split(self, batch):
        flat = [tf.split(part, self.num_parts) for part in tf.nest.flatten(batch)]
        return [tf.nest.pack_sequence_as(batch, part) for part in zip(*flat)]

    def _embed_without_graph(self, parts):
        embeddings = []
        for part in parts:
            # One after the other, or their activations would be there at once.
            with tf.control_dependencies([embeddings[-1]["candidate"]] if embeddings else []):
                embeddings.append(self(tf.nest.map_structure(tf.identity, part), training=True))
        return (
            tf.concat([part[name] for part in embeddings], axis=0)
            for name in ("query", "candidate")
        )

    def _gradients_of_parts(self, parts, by_embedding):
        """The sum over the parts of the gradient by each weight."""
        total, last = None, []
        by_part = zip(*(tf.split(gradient, self.num_parts) for gradient in by_embedding))
        for part, (by_query, by_candidate) in zip(parts, by_part):
            with tf.control_dependencies(last):
                part = tf.nest.map_structure(tf.identity, part)
            with tf.GradientTape() as tape:
                embeddings = self(part, training=True)
                surrogate = tf.reduce_sum(embeddings["query"] * by_query)
                surrogate += tf.reduce_sum(embeddings["candidate"] * by_candidate)
            gradients = tape.gradient(surrogate, self.trainable_variables)
            total = gradients if total is None else list(map(_add, total, gradients))
            last = [
                part.values if isinstance(part, tf.IndexedSlices) else part for part in gradients
            ]
        return total


def _add(first, second):
    if not isinstance(first, tf.IndexedSlices):
        return first + second
    values = tf.concat([first.values, second.values], axis=0)
    indices = tf.concat([first.indices, second.indices], axis=0)
    return tf.IndexedSlices(values, indices, first.dense_shape)


class BothDirections(nc.DualEncoder):
    """The mean of the softmax of queries over candidates and that of candidates over queries.

    Args:
      reverse: the task of candidates over queries; the query tower is its candidate network.
    """

    def __init__(self, *args, reverse: nc.Retrieval, **kwargs):
        super().__init__(*args, **kwargs)
        self.reverse = reverse

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        rows = x["candidate"]["row"]
        # Another query of the same candidate is no negative of it.
        is_other = rows[:, tf.newaxis] != rows[tf.newaxis]
        is_own = tf.eye(tf.shape(rows)[0], dtype=tf.bool)
        reverse = self.reverse(
            y_pred["candidate"],
            y_pred["query"],
            x["query"],
            score_mask=is_other | is_own,
            training=training,
        )
        return (loss + reverse) / 2


def corpus_rows(data: Data, with_held_out: bool) -> np.ndarray:
    """The candidates of a corpus: those that are trained on, or all.

    A softmax over candidates that never are positives learns that they are improbable, and ranks
    them below the others: those of the held-out queries, by which it is measured.
    """
    return np.arange(data.num_candidates) if with_held_out else data.train_candidates


def corpus_cache(
    data: Data, rows: np.ndarray, tower, index: nc.TreeIndex | None = None
) -> nc.Cache:
    """A cache of some candidates, drawn from by an index if there is one."""
    return nc.Cache.from_dataset(
        data.candidates(rows),
        tower,
        data.specs(data.candidate_ids),
        candidate_id_key="row",
        cache_size=len(rows),
        index=index,
        verbose=0,
    )


def rows_for_warm_start(data: Data, seed: int) -> np.ndarray:
    """The candidates of the training pairs in random order, as often as the stream brings them."""
    return np.random.default_rng(seed).permutation(data.train[:, 1])
