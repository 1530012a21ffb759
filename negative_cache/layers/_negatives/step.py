"""A step of a cache as a source of negatives, in the order of the paper: draw, encode, estimate."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import tensorflow as tf

from negative_cache.layers._negatives.batch import Batch
from negative_cache.layers._negatives.draws import Draws
from negative_cache.layers._negatives.rows import DrawnRows, EncodedRows, RowCorrection
from negative_cache.layers._negatives.shard import Shard, has_negatives
from negative_cache.ops import _execution, contrastive
from negative_cache.ops.landmarks import uniform_rows

if TYPE_CHECKING:
    from negative_cache.layers._negatives.cached import CachedNegatives


class Outcome(NamedTuple):
    """What a training step has found out.

    Attributes:
      logit: [B] float32, the log partition, with the sampled gradient.
      log_partition: [B] float32, without gradient; 0 for queries without negatives.
      has_negatives: [B] bool, whether there is a row that is a negative of the query.
      drawn: the rows of this replica that were drawn, without gradient, by its own queries or, out
        of a pool, by those of all replicas.
      is_drawn: [m] bool, which of the m draws for this replica's queries there are.
      staleness: [m] float32, ‖ĝ - g‖² / ‖g‖² of these draws.
      oldest: the oldest rows, encoded; None if no rows are refreshed in turn.
      drift_loss: scalar whose gradient trains the corrector; None if nothing is trained.
    """

    logit: tf.Tensor
    log_partition: tf.Tensor
    has_negatives: tf.Tensor
    drawn: EncodedRows
    is_drawn: tf.Tensor
    staleness: tf.Tensor
    oldest: EncodedRows | None
    drift_loss: tf.Tensor | None


class CachedStep:
    """The filled rows of a cache as negatives of one batch.

    With ĝ the cached embeddings and g those of now, the logit of a cache is the log partition

      log Z(x) = log Σ_y exp(score(x, ĝ(y)) + log_weight(y)),

    and its gradient is estimated from draws ŷ in proportion to exp(score(x, ĝ(ŷ)) + log_weight(ŷ)),
    which are encoded: it is that of a weighted mean score(x, g(ŷ)), or with `exact_query_gradient`
    that of ⟨x, ∇_x log Z⟩ + weighted mean of (score(x, g(ŷ)) - score(x, ĝ(ŷ))), with ∇_x log Z and
    ĝ constant (Lindgren et al., NeurIPS 2021).

    Each query has S draws of its own, which weigh the same; or all queries share n draws, with the
    weights of `ops.shared_draws`.

    A cache with an index draws from that: the law is nearly the same, and log Z and its gradient
    are the index's estimates. With a corrector h, every ĝ above is h(ĝ).

    Args:
      source: has the cache, the tower and the options.
      batch: the queries, and candidates that stand in for rows that there are not.
    """

    def __init__(self, source: CachedNegatives, batch: Batch):
        self._source = source
        self._batch = batch
        self._correction = source.correction()

    def log_partition(self) -> tf.Tensor:
        """[B] float32, without gradient; changes nothing."""
        return self._shard().log_partition()

    def sampled_log_partition(self, seed: tf.Tensor) -> Outcome:
        """The log partition with the sampled gradient, and what there is to write.

        Args:
          seed: [2] int64.
        """
        shard = self._shard()
        log_partition, query_gradient, drawn, draws = shard.draw(seed)
        embeddings = self._encode_drawn(drawn)
        staleness = contrastive.relative_staleness(drawn.stale, embeddings)
        surrogate = self._surrogate(draws, embeddings, drawn.known, query_gradient)
        fresh = tf.stop_gradient(embeddings)
        oldest = self._encode_oldest()
        has_some = has_negatives(log_partition)
        return Outcome(
            logit=contrastive.value_with_gradient(log_partition, surrogate),
            log_partition=tf.where(has_some, log_partition, 0.0),
            has_negatives=has_some,
            drawn=shard.bring_home(fresh, drawn.mask),
            is_drawn=drawn.mask,
            staleness=staleness,
            oldest=oldest,
            drift_loss=self._learn(drawn, fresh, oldest, seed),
        )

    def _shard(self) -> Shard:
        return self._source.make_shard(self._batch, self._correction)

    def _encode_drawn(self, drawn: DrawnRows) -> tf.Tensor:
        """[m, d] float32, with gradient."""
        # Where nothing is drawn, a positive of the batch is encoded instead.
        per_query = self._source.num_negatives
        places = tf.range(tf.size(drawn.mask))
        if per_query is None:
            stand_ins = places % tf.maximum(self._batch.num_queries, 1)
        else:
            stand_ins = places // per_query
        features = self._source.with_stand_ins(drawn.features, drawn.mask, self._batch, stand_ins)
        return self._source.encode(features, training=True)

    def _surrogate(
        self,
        draws: Draws,
        fresh: tf.Tensor,
        known: tf.Tensor,
        query_gradient: tf.Tensor | None,
    ) -> tf.Tensor:
        """[B] float32, what has the gradient of the log partition, and not its value."""
        queries, scores = self._batch.queries, self._batch.scores
        surrogate = draws.mean_score(scores, queries, fresh)
        if query_gradient is None:
            return surrogate
        surrogate += tf.reduce_sum(queries * query_gradient, axis=1)
        # What the transform learns has its gradient from the draws alone, as they were drawn.
        return surrogate - draws.mean_score(scores, queries, known, as_given=True)

    def _encode_oldest(self) -> EncodedRows | None:
        """ρC rows at each step, rounded; if that is less than a half, one every 1 / ρC steps."""
        source, cache = self._source, self._source.get_cache()
        per_step = source.refresh_fraction * cache.cache_size
        if not per_step:
            return None
        count = max(round(per_step), 1)
        rows = cache.oldest(count)
        filled = cache.is_filled(rows)

        def encode() -> tf.Tensor:
            features = source.features_of(rows, filled, self._batch, tf.zeros_like(rows))
            return tf.stop_gradient(source.encode(features))

        if per_step >= 0.5:
            return EncodedRows(rows, encode(), filled)
        is_due = tf.equal(cache.step % round(1.0 / per_step), 0)
        dim = cache.embeddings.shape[1]
        embeddings = tf.cond(is_due, encode, lambda: tf.zeros([count, dim]))
        return EncodedRows(rows, embeddings, filled & is_due)

    def _learn(
        self,
        drawn: DrawnRows,
        fresh: tf.Tensor,
        oldest: EncodedRows | None,
        seed: tf.Tensor,
    ) -> tf.Tensor | None:
        """Lets the corrector learn from all rows that were encoded; its loss."""
        correction = self._correction
        if correction is None:
            return None
        source, batch = self._source, self._batch
        examples = correction.examples_of_drawn(drawn, fresh)
        more = source.own_rows(batch)
        if more is None or oldest is None:
            more = more or oldest
        else:
            more = more.and_those(oldest)
        if more is not None:
            examples = examples.and_those(correction.examples(more, source.stale(more.rows)))
        self._learn_landmarks(correction, seed)
        return _execution.compiled(
            lambda encoded: correction.corrector.learn(
                encoded,
                correction.displacement,
                lambda embeddings: batch.scores.of_all_pairs(
                    tf.stop_gradient(batch.queries), embeddings, as_given=True
                ),
            ),
            examples.finite(),
            like=correction.corrector.state_variable,
        )

    def _learn_landmarks(self, correction: RowCorrection, seed: tf.Tensor) -> None:
        """Encodes the rows that the corrector asks for, if it asks for some."""
        source, cache = self._source, self._source.get_cache()
        corrector = correction.corrector
        asked = corrector.rows_to_encode(cache.embeddings, cache.filled, seed)
        if asked is None:
            return
        rows, are_there = asked
        are_there &= cache.is_filled(rows)
        features = source.features_of(rows, are_there, self._batch, tf.zeros_like(rows))
        fresh = tf.stop_gradient(source.encode(features))
        are_there &= tf.reduce_all(tf.math.is_finite(fresh), axis=1)
        landmarks = EncodedRows(rows, fresh, are_there)
        _execution.compiled(
            corrector.learn_landmarks,
            correction.examples(landmarks, source.stale(rows)),
            like=corrector.state_variable,
        )


def probe(source: CachedNegatives, seed: tf.Tensor) -> None:
    """Measures the staleness of some rows, if it is time to, without changing them.

    Args:
      source: has the cache, and the metrics to update.
      seed: [2] int64.
    """
    cache, metrics = source.get_cache(), source.probe_metrics
    is_filled = cache.num_filled >= source.probe_size
    before = tuple(metric.result() for metric in metrics)
    before += (0.0,) * (2 - len(before))

    def measure() -> tuple[tf.Tensor, ...]:
        rows = uniform_rows(cache.filled, source.probe_size, seed)
        # Rows written by the step before say nothing of those that wait.
        weight = tf.cast(tf.gather(cache.age, rows) > 0, tf.float32)
        total = tf.reduce_sum(weight)
        return tuple(
            tf.where(total > 0.0, tf.math.divide_no_nan(tf.reduce_sum(weight * part), total), old)
            for part, old in zip(_staleness(source, rows), before)
        )

    is_due = is_filled & tf.equal((cache.step + 1) % source.probe_every, 0)
    values = tf.cond(is_due, measure, lambda: before)
    for metric, value in zip(metrics, values):
        metric.update_state(value)


def _staleness(source: CachedNegatives, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """[n] staleness of filled `rows` [n], as they are and as corrected, by encoding them."""
    fresh = source.encode(source.features_at(rows))
    stale = known = source.stale(rows)
    correction = source.correction()
    if correction is not None:
        known = correction.correct(stale, rows)
    before, after = (contrastive.relative_staleness(part, fresh) for part in (stale, known))
    return before, after
