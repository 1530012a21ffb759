"""A step of a cache as a source of negatives, in the order of the paper: draw, encode, estimate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from negative_cache.layers._negatives.batch import Batch
from negative_cache.layers._negatives.draws import Draws, shared_weights
from negative_cache.layers._negatives.rows import EncodedRows, RowCorrection
from negative_cache.layers._negatives.samplers import sampler_of
from negative_cache.ops import SoftmaxSample, _execution, contrastive, shared_draws
from negative_cache.ops.landmarks import uniform_rows

if TYPE_CHECKING:
    from negative_cache.layers._negatives.cached import CachedNegatives


class Outcome(NamedTuple):
    """What a training step has found out.

    Attributes:
      logit: [B] float32, the log partition, with the sampled gradient.
      log_partition: [B] float32, without gradient; 0 for queries without negatives.
      has_negatives: [B] bool, whether there is a row that is a negative of the query.
      drawn: the m drawn rows, without gradient.
      staleness: [m] float32, ‖ĝ - g‖² / ‖g‖² of the drawn rows.
      oldest: the oldest rows, encoded; None if no rows are refreshed in turn.
      drift_loss: scalar whose gradient trains the corrector; None if nothing is trained.
    """

    logit: tf.Tensor
    log_partition: tf.Tensor
    has_negatives: tf.Tensor
    drawn: EncodedRows
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
        return self._sample(0, self._options(), seed=0, compute_gradient=False)[0].log_partition

    def sampled_log_partition(self, seed: tf.Tensor) -> Outcome:
        """The log partition with the sampled gradient, and what there is to write.

        Args:
          seed: [2] int64.
        """
        options = self._options()
        sample, query_gradient = self._draw(seed, options)
        log_partition = sample.log_partition
        rows = tf.reshape(tf.maximum(sample.indices, 0), [-1])
        is_drawn = tf.reshape(sample.indices >= 0, [-1])
        drawn = self._encode_drawn(rows, is_drawn)
        stale = self._source.stale(rows)
        staleness = contrastive.relative_staleness(stale, drawn.embeddings)
        # The cached embeddings as the sampler has seen them.
        known = stale if self._correction is None else self._correction.correct(stale, rows)
        draws = self._weigh(sample, EncodedRows(rows, known, is_drawn), options)
        surrogate = self._surrogate(draws, drawn.embeddings, known, query_gradient)
        drawn = EncodedRows(rows, tf.stop_gradient(drawn.embeddings), is_drawn)
        oldest = self._encode_oldest()
        has_negatives = _has_negatives(log_partition)
        return Outcome(
            logit=contrastive.value_with_gradient(log_partition, surrogate),
            log_partition=tf.where(has_negatives, log_partition, 0.0),
            has_negatives=has_negatives,
            drawn=drawn,
            staleness=staleness,
            oldest=oldest,
            drift_loss=self._learn(drawn, oldest, seed),
        )

    def _options(self) -> dict[str, Any]:
        """How the sampler is to score rows, and which it is to leave out."""
        correction, log_weights = self._correction, self._source.log_weights(self._batch)
        options: dict[str, Any] = {
            "score_transform": self._batch.scores.transform,
            "row_transform": None if correction is None else correction.correct,
            "max_scores": self._batch.max_scores,
            "log_zero": contrastive.NOT_A_CANDIDATE,
            **self._source.left_out_rows(self._batch),
        }
        if log_weights is not None:
            options["log_weights"] = log_weights
        return options

    def _sample(
        self, num_samples: int, options: dict[str, Any], **more: Any
    ) -> tuple[SoftmaxSample, tf.Tensor | None]:
        sampler = sampler_of(self._source.get_cache())
        return sampler.sample_with_gradient(self._batch.queries, num_samples, **options, **more)

    def _draw(
        self, seed: tf.Tensor, options: dict[str, Any]
    ) -> tuple[SoftmaxSample, tf.Tensor | None]:
        """Draws S rows a query, or n in all, and [B, d] ∇_x log Z if it is to be exact."""
        wanted = {"seed": seed, "compute_gradient": self._source.exact_query_gradient}
        per_query, num_draws = self._source.num_negatives, self._source.num_draws
        if per_query is not None:
            return self._sample(per_query, options, **wanted)

        def choose(log_partition: tf.Tensor) -> tf.Tensor:
            # No step has a seed of negative numbers.
            other_seed = tf.bitwise.invert(seed)
            return shared_draws.choose_queries(self._shares(log_partition), num_draws, other_seed)

        return self._sample(1, options, choose_queries=choose, **wanted)

    def _weigh(self, sample: SoftmaxSample, drawn: EncodedRows, options: dict[str, Any]) -> Draws:
        """The weights of the draws, of which the sampler knows the embeddings of `drawn`."""
        if self._source.num_negatives is not None:
            return Draws.own(sample)
        log_partition = sample.log_partition
        shares, queries = self._shares(log_partition), self._batch.queries
        weights = shared_weights(queries, drawn, log_partition, shares, options)
        return Draws(weights, are_shared=True)

    def _shares(self, log_partition: tf.Tensor) -> tf.Tensor:
        """[B] float32, π: how much each query's negatives matter to the loss.

        The gradient of a query's loss by its log Z is at most 1 - p⁺ = Z / (exp s⁺ + Z); it is less
        if there are other sources.
        """
        log_odds = log_partition - self._batch.positive_logits
        log_weights = tf.where(
            _has_negatives(log_partition),
            tf.math.log_sigmoid(log_odds),
            contrastive.NOT_A_CANDIDATE,
        )
        return tf.stop_gradient(shared_draws.mixture_shares(log_weights))

    def _encode_drawn(self, rows: tf.Tensor, is_drawn: tf.Tensor) -> EncodedRows:
        """Encodes the drawn `rows` [m]."""
        # Where nothing is drawn, a positive of the batch is encoded instead.
        per_query = self._source.num_negatives
        places = tf.range(tf.size(rows))
        if per_query is None:
            stand_ins = places % tf.maximum(self._batch.num_queries, 1)
        else:
            stand_ins = places // per_query
        features = self._source.features_of(rows, is_drawn, self._batch, stand_ins)
        return EncodedRows(rows, self._source.encode(features, training=True), is_drawn)

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
        self, drawn: EncodedRows, oldest: EncodedRows | None, seed: tf.Tensor
    ) -> tf.Tensor | None:
        """Lets the corrector learn from all rows that were encoded; its loss."""
        correction = self._correction
        if correction is None:
            return None
        source, batch = self._source, self._batch
        examples = drawn
        for more in (source.own_rows(batch), oldest):
            if more is not None:
                examples = examples.and_those(more)
        examples = examples.finite()
        self._learn_landmarks(correction, seed)
        return _execution.compiled(
            lambda encoded: correction.corrector.learn(
                encoded,
                correction.displacement,
                lambda embeddings: batch.scores.of_all_pairs(
                    tf.stop_gradient(batch.queries), embeddings, as_given=True
                ),
            ),
            correction.examples(examples, source.stale(examples.rows)),
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


def _has_negatives(log_partition: tf.Tensor) -> tf.Tensor:
    """[B] bool, whether there is a row that is a negative of each query."""
    has_some = log_partition > 0.5 * contrastive.NOT_A_CANDIDATE
    return tf.math.is_finite(log_partition) & has_some


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
