"""`CachedRetrieval`: the retrieval task with a cache of negatives behind it."""

import operator
import random
from collections.abc import Callable, Mapping, Sequence

import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import become_task, kept_losses, keras
from negative_cache._features import ONE_FEATURE, fingerprint
from negative_cache.layers import _cached_negatives, _retrieval_checks, _retrieval_config
from negative_cache.layers._cached_negatives import CANDIDATE_ID, EMBEDDING
from negative_cache.layers._caching_layer import CachingLayer
from negative_cache.layers._scores import Scores
from negative_cache.layers.cache import Cache
from negative_cache.layers.drift_corrector import DriftCorrector
from negative_cache.layers.frequency import FrequencyEstimator
from negative_cache.layers.tree_index import TreeIndex
from negative_cache.ops import contrastive
from negative_cache.ops._block_scorer import is_among

# Of 12 bytes each; 2 % of 100,000 candidates share theirs.
_NUM_BUCKETS = 2**22


@keras.utils.register_keras_serializable("negative_cache")
class CachedRetrieval(CachingLayer):
    """Softmax cross-entropy of a two-tower model, with a large cache of negatives behind it.

    It is to a cache what `tfrs.tasks.Retrieval` is to a batch. The logits of a query are its
    positive, optionally the other candidates of the batch, optionally explicit negatives, and one
    logit for the whole cache: its log partition under the cached embeddings. A few candidates are
    drawn from the cache in proportion to exp(score), encoded afresh, and carry the gradient of that
    logit. So the *value* of the loss is the cross-entropy over everything, fit for progress bars
    and `EarlyStopping`, while its *gradient* costs `num_negatives` encoded candidates a query
    (Lindgren et al., NeurIPS 2021).

    The drawn candidates' fresh embeddings are written back, and the batch's candidates then replace
    the rows that were used longest ago. A training call changes the cache; a call with
    `training=False` only reads it.

    A candidate whose embedding is not finite never enters the cache; the metric `skipped_rows`
    counts them. What the layer does not do: a candidate that came several times may stand in
    several rows, and under a `tf.distribute` strategy every replica has a cache of its own.

    With a `cache` that covers a corpus (`Cache.from_dataset`), every candidate is a negative from
    the first step on, the positive's own row is always left out, and positives, which are encoded
    anyway, are written to their rows. What is stale then are the rows that neither draws nor
    positives come to: `refresh_fraction` encodes them in turn, the callback `CacheRefresh` all at
    once, and a `corrector` estimates where they are without encoding them.

    TensorFlow checkpoints, `.weights.h5` and `.keras` files hold the cache and the state of the
    sampling, so that a training that goes on from one draws what it would have drawn.

    Args:
      candidate_network: the candidate tower, a Keras layer or a function: candidate features with a
        batch dimension -> [n, d] embeddings.
      feature_specs: feature name -> `tf.io.FixedLenFeature` (shape without the batch, dtype) of
        what the tower needs, or one such spec where the tower takes a single tensor. Not needed
        with a `cache`.
      cache_size: C, the number of cached candidates. 0 trains without a cache, the baseline to
        compare with. Not needed with a `cache`.
      temperature: scores are inner products divided by it; a number.
      score_transform: elementwise function of the (divided) inner products. What it learns must be
        weights of a Keras layer, as those of `LearnedTemperature` are: variables that a function
        closes over are not known to Keras. Their gradient is that of the draws. On a GPU, XLA must
        be able to compile it.
      num_negatives: S, draws from the cache per query, encoded at every training step.
      in_batch_negatives: whether the batch's other candidates are negatives too, with exact
        gradient.
      num_hard_negatives: keep only so many of the highest-scoring in-batch negatives of each query.
      candidate_id_key: name of the feature that identifies a candidate; scalar int or string.
        Where `feature_specs` is a single spec, its name is "candidate".
      remove_accidental_hits: leave out negatives that have the positive's id. Needs
        `candidate_id_key`.
      index: a `TreeIndex` with the cache's size as its capacity. Negatives are then drawn from it,
        in time that hardly grows with the cache; the rows that a step writes move in it in the same
        step. `score_transform` must be nondecreasing with it, and there are no corrections for
        frequency: neither `frequency_correction` nor `candidate_sampling_probability`. With
        `exact_query_gradient` the queries' gradient is that of the index's estimate of log Z, which
        unlike the draws no Metropolis-Hastings step corrects. A `cache` that is given has its index
        already.
      corrector: a `Corrector` or a `NystromCorrector`, which estimates where stale embeddings are
        now. Draws, the log partition and its gradient are those of corrected embeddings.
      cache: a cache that covers a corpus, as `Cache.from_dataset` makes it. It decides on
        `feature_specs`, `cache_size`, `candidate_id_key`, `index` and `embedding_dtype`. Every
        candidate is in it once, so that there are no corrections for frequency;
        `in_batch_negatives` count twice with it, as themselves and as their rows.
      refresh_fraction: ρ in [0, 1], the share of the rows that are encoded anew at each step, those
        touched longest ago, in inference mode and without gradient. ρ C is rounded to whole rows;
        below a half, one row is encoded every 1 / (ρ C) steps. Like `corrector` and `probe_size`
        it needs `use_lru=True`, with which the age of a row is that of its embedding.
      write_back: whether draws, and with a `cache` the positives, are written back. False leaves
        rows as they are but for `refresh_fraction` and `CacheRefresh`: a cache that is stale on
        purpose, as baselines have it. Only with a `cache`.
      probe_size: rows, other ones each time, that are encoded every `probe_every` steps only to see
        how stale the cache is: `probe_staleness` in the logs, and with a corrector
        `probe_corrected_staleness`, each the last mean of ‖ĝ - g‖² / ‖g‖², with h(ĝ) for ĝ. Unlike
        those of `staleness` they are not drawn for their scores. 0 for none.
      probe_every: as said.
      use_lru: as in `Cache`.
      false_negative_margin: leave out in-batch and cached negatives that score above the positive
        minus this margin; they are likely unlabelled positives.
      exact_query_gradient: whether the cache's part of the queries' gradient is computed and not
        sampled. It is the mean of the cached embeddings under the softmax, which the pass that
        samples yields at the price of a second matrix product. The draws then only correct it for
        staleness, as a control variate: ∇_x log Z ≈ Σ_y P̂(y|x) s' ĝ(y) + mean over the draws of
        s' (g(ŷ) - ĝ(ŷ)), with s' the derivative of the score by the inner product. The expectation
        is that of the sampled estimator, Σ_y P̂(y|x) s' g(y), stale cache or fresh; what is left of
        the variance is that of g - ĝ. The candidate tower's gradient is sampled in any case.
      frequency_correction: subtract from each score the log of the expected number of times its
        candidate stands among the negatives, so that the partition is an estimate over the corpus
        and not over the stream, in which popular candidates repeat. Estimated online, by a
        `FrequencyEstimator` of 4 million buckets, or the one that is given: 30 buckets for each
        candidate of the corpus are enough. Needs `candidate_id_key`, and with a cache
        `use_lru=False`: it takes the cache for a sample of the stream, in which LRU keeps rows that
        are drawn often for longer. `candidate_sampling_probability` in a call assumes the same, of
        which nothing is checked. 12 bytes a bucket, in memory and in files, also in those without
        the cache.
      reduction: "sum_over_batch_size" (the mean over the batch), "sum", or "none" for [B].
      metrics: Keras metrics updated with (query embeddings, positive embeddings), and with the
        sample weights where there are any; for instance `tfrs.metrics.FactorizedTopK`, which then
        compares scores and not ids.
      batch_metrics: Keras metrics updated with (labels [B, N], scores [B, N]) of the batch, and
        with the sample weights where there are any.
      loss_metrics: Keras metrics updated with the loss.
      embedding_dim: d. Taken from the first call where None.
      embedding_dtype: of the cached embeddings. bfloat16 and float16 halve the memory.
      save_cache: whether files hold the cache. Without it they are smaller, and a training that
        goes on from one starts with an empty cache.
      seed: seed of the draws; random (but under `keras.utils.set_random_seed`) where None.
      **kwargs: of the layer. A `name` that is given is put before those of its metrics in the logs,
        which several tasks in one model need.

    Raises:
      ValueError: where an argument is out of range or contradicts another.

    Example:
      >>> task = CachedRetrieval(
      ...     candidate_tower,
      ...     {"title": tf.io.FixedLenFeature([], tf.string)},
      ...     cache_size=65536,
      ...     temperature=0.05,
      ...     in_batch_negatives=True,
      ...     candidate_id_key="title",
      ...     remove_accidental_hits=True,
      ... )
      >>> loss = task(query_embeddings, candidate_embeddings, {"title": titles}, training=True)
    """

    def __init__(
        self,
        candidate_network: Callable[..., tf.Tensor],
        feature_specs: Mapping[str, tf.io.FixedLenFeature] | tf.io.FixedLenFeature | None = None,
        cache_size: int | None = None,
        *,
        temperature: float | None = None,
        score_transform: Callable[[tf.Tensor], tf.Tensor] | None = None,
        num_negatives: int = 1,
        in_batch_negatives: bool = False,
        num_hard_negatives: int | None = None,
        candidate_id_key: str | None = None,
        remove_accidental_hits: bool = False,
        index: TreeIndex | None = None,
        corrector: DriftCorrector | None = None,
        cache: Cache | None = None,
        refresh_fraction: float = 0.0,
        write_back: bool = True,
        probe_size: int = 0,
        probe_every: int = 100,
        use_lru: bool = True,
        false_negative_margin: float | None = None,
        exact_query_gradient: bool = True,
        frequency_correction: bool | FrequencyEstimator = False,
        reduction: str | None = "sum_over_batch_size",
        metrics: Sequence[keras.metrics.Metric] | keras.metrics.Metric | None = None,
        batch_metrics: Sequence[keras.metrics.Metric] | None = None,
        loss_metrics: Sequence[keras.metrics.Metric] | None = None,
        embedding_dim: int | None = None,
        embedding_dtype: str | tf.DType = tf.float32,
        save_cache: bool = True,
        seed: int | None = None,
        **kwargs,
    ):
        become_task(CachedRetrieval)
        # Embeddings are scored in float32 and features keep their dtypes, whatever the precision
        # policy is. Of another dtype, Keras 3 would let metrics count in half precision.
        super().__init__(**{"autocast": False, "dtype": "float32", **kwargs})
        if cache is not None:
            given = _retrieval_checks.Given(
                feature_specs,
                cache_size,
                candidate_id_key,
                index,
                embedding_dim,
                tf.as_dtype(embedding_dtype),
                use_lru,
                save_cache,
            )
            given = _retrieval_checks.check_corpus(cache, given)
            feature_specs, cache_size, candidate_id_key, index, embedding_dim = given[:5]
            embedding_dtype, use_lru, save_cache = given[5:]
            remove_accidental_hits = True
        elif feature_specs is None or cache_size is None:
            raise ValueError(
                "A task needs `feature_specs` and `cache_size`, or a `cache`. Received:"
                f" feature_specs={feature_specs!r}, cache_size={cache_size}."
            )
        self._takes_one_tensor = not isinstance(feature_specs, Mapping)
        self.feature_specs = (
            {ONE_FEATURE: feature_specs} if self._takes_one_tensor else dict(feature_specs)
        )
        self.candidate_network = candidate_network
        self.cache_size = cache_size
        self.temperature = temperature
        self.score_transform = score_transform
        self.num_negatives = num_negatives
        self.in_batch_negatives = in_batch_negatives
        self.num_hard_negatives = num_hard_negatives
        self.candidate_id_key = candidate_id_key
        self.remove_accidental_hits = remove_accidental_hits
        self.use_lru = use_lru
        self.false_negative_margin = false_negative_margin
        self.exact_query_gradient = exact_query_gradient
        _retrieval_checks.check_frequency(frequency_correction)
        self.frequency_correction = frequency_correction is not False
        self.embedding_dtype = tf.as_dtype(embedding_dtype)
        self.reduction = reduction or "none"
        self.corrector = corrector
        self.refresh_fraction = refresh_fraction
        self.write_back = write_back
        self.probe_size = probe_size
        self.probe_every = probe_every
        _retrieval_checks.check_settings(self, index, _cached_negatives.INTERNAL_KEYS)
        _retrieval_checks.check_schedule(self, cache)
        self.save_cache = save_cache
        self.seed = random.randrange(2**31) if seed is None else operator.index(seed)
        self._scores = Scores(temperature, score_transform)
        self._task_metrics = _as_list(metrics)
        self._batch_metrics = _as_list(batch_metrics)
        self._loss_metrics = _as_list(loss_metrics)
        self._frequency = None
        if isinstance(frequency_correction, FrequencyEstimator):
            self._frequency = frequency_correction
        elif frequency_correction:
            self._frequency = FrequencyEstimator(max(4 * cache_size, _NUM_BUCKETS))
        self._make_cache_state(cache, index, embedding_dim)

    @property
    def factorized_metrics(self) -> list[keras.metrics.Metric]:
        """The `metrics`, under the name that `tfrs.tasks.Retrieval` has for them; may be set."""
        return self._task_metrics

    @factorized_metrics.setter
    def factorized_metrics(self, metrics) -> None:
        self._task_metrics = _as_list(metrics)

    def __call__(self, *args, **kwargs):
        # The tower is called before, and Keras forgets what a layer inside of this one has added.
        with kept_losses(self.candidate_network):
            return super().__call__(*args, **kwargs)

    @property
    def frequency(self) -> FrequencyEstimator | None:
        """What estimates the candidates' frequencies, where `frequency_correction` is."""
        return self._frequency

    def call(
        self,
        query_embeddings: tf.Tensor,
        candidate_embeddings: tf.Tensor,
        candidate_features: Mapping[str, tf.Tensor] | tf.Tensor,
        sample_weight: tf.Tensor | None = None,
        candidate_sampling_probability: tf.Tensor | None = None,
        negative_embeddings: tf.Tensor | None = None,
        training: bool | None = None,
        compute_metrics: bool = True,
        compute_batch_metrics: bool = True,
        score_mask: tf.Tensor | None = None,
        negative_ids: tf.Tensor | None = None,
        negative_mask: tf.Tensor | None = None,
        known_positive_ids: tf.Tensor | tf.RaggedTensor | None = None,
    ) -> tf.Tensor:
        """Computes the loss and, in training, moves the cache on by one step.

        Args:
          query_embeddings: [B, d] float.
          candidate_embeddings: [N, d] float, N >= B; row i is the positive of query i, rows from B
            on are further candidates of the batch.
          candidate_features: the features [N, ...] that `candidate_embeddings` were computed from.
          sample_weight: [B] float.
          candidate_sampling_probability: [N] float, the probability that a draw from the training
            stream is each candidate, for the log Q correction; clipped from below at 1e-9, or
            without a cache at 1e-6 as there. As in `tfrs.tasks.Retrieval` the
            correction then applies to the positive too where `in_batch_negatives`; it does not
            otherwise, nor under `frequency_correction`.
          negative_embeddings: [B, M, d] float, explicit negatives of each query.
          training: whether to draw, encode and update the cache. None means True.
          compute_metrics: whether to update `metrics`.
          compute_batch_metrics: whether to update `batch_metrics`.
          score_mask: [B, N] bool, which of the batch's candidates each query is compared with. Its
            positive always is one, and the cache is not affected.
          negative_ids: [B, M], the ids of the explicit negatives, of the kind of the feature
            `candidate_id_key`: those that are a positive of their query are left out, where
            `remove_accidental_hits` or `known_positive_ids` say so.
          negative_mask: [B, M] bool, which of the explicit negatives there are; the others are
            padding, whatever they are.
          known_positive_ids: [B, P] ids of further candidates that are right for each query, of the
            kind of the feature `candidate_id_key`: a `tf.RaggedTensor`, or padded with -1, or with
            "" where ids are strings. They are left
            out of its negatives in the batch, among the explicit ones and in the cache, as is its
            own positive then. Needs `candidate_id_key`.

        Returns:
          Scalar float32, or [B] where `reduction` is "none".

        Raises:
          ValueError: where features do not match `feature_specs`, a shape does not fit, or N
            exceeds the size of a cache that streams.
        """
        training = True if training is None else training
        queries = tf.convert_to_tensor(query_embeddings)
        candidates = tf.convert_to_tensor(candidate_embeddings)
        _retrieval_checks.check_embeddings(queries, candidates)
        queries, candidates = tf.cast(queries, tf.float32), tf.cast(candidates, tf.float32)
        items = self._cache_items(candidate_features, candidates, candidate_sampling_probability)
        streams = self._cache is not None and self._cache.row_key is None
        if streams and training:
            _validation.check_fits(items, self.cache_size, what="candidate_features")
        weight = {}
        if sample_weight is not None:
            weight["sample_weight"] = _retrieval_checks.check_weights(sample_weight, queries)
        num_queries = tf.shape(queries)[0]
        scaled_queries = self._scores.scale(queries)
        raw_scores = self._scores.of_all_pairs(scaled_queries, candidates)
        positive_scores = tf.linalg.diag_part(raw_scores)
        threshold = None
        if self.false_negative_margin is not None:
            threshold = tf.stop_gradient(positive_scores) - self.false_negative_margin

        if self._frequency is not None and training:
            self._frequency.update(items[CANDIDATE_ID])
        has_probabilities = candidate_sampling_probability is not None
        _retrieval_checks.check_weighting(has_probabilities, self.index)
        _retrieval_checks.check_probabilities(has_probabilities, self._cache)
        log_expected = self._log_expected_occurrences(items, has_probabilities)
        positive_logits, in_batch_logits = positive_scores, raw_scores
        if log_expected is not None:
            in_batch_logits -= log_expected
            if has_probabilities and self.in_batch_negatives:
                positive_logits -= log_expected[:num_queries]
        is_positive = tf.eye(num_queries, tf.shape(candidates)[0], dtype=tf.bool)
        left_out = self._ids_left_out(items, queries, known_positive_ids)
        not_a_negative = self._not_a_negative(items, raw_scores, threshold, left_out)
        if score_mask is not None:
            not_a_negative |= ~_retrieval_checks.check_score_mask(score_mask, raw_scores)
        not_a_negative &= ~is_positive

        negative_logits = []
        if self.in_batch_negatives:
            in_batch = contrastive.leave_out(in_batch_logits, is_positive | not_a_negative)
            if self.num_hard_negatives is not None:
                in_batch = contrastive.keep_hardest(in_batch, self.num_hard_negatives)
            negative_logits.append(in_batch)
        if negative_embeddings is not None:
            explicit = tf.convert_to_tensor(negative_embeddings)
            _retrieval_checks.check_negatives(explicit, queries)
            explicit = tf.cast(explicit, tf.float32)
            ids = None
            if left_out is not None and negative_ids is not None:
                ids = tf.convert_to_tensor(negative_ids)
                _retrieval_checks.check_id_kind(self, ids, "negative_ids")
                ids = fingerprint(ids)
            negative_logits.append(
                self._scores_of_explicit(scaled_queries, explicit, negative_mask, ids, left_out)
            )
        step = None
        if self.cache_size:
            if training:
                self._probe()
            cache_logit, step = self._cache_logit(
                scaled_queries, items, threshold, has_probabilities, training, left_out
            )
            negative_logits.append(cache_logit[:, tf.newaxis])
        if not negative_logits:
            raise ValueError(
                "There is nothing to tell a positive from. Received `cache_size=0`,"
                " `in_batch_negatives=False` and `negative_embeddings=None`."
            )

        loss = contrastive.softmax_loss(positive_logits, tf.concat(negative_logits, axis=1))
        loss = contrastive.reduce_losses(loss, self.reduction, **weight)
        if step is not None:
            if step.drift_loss is not None:
                # For the gradient of the corrector, which is none of the task's loss.
                drift_loss = step.drift_loss
                if self.reduction == "none":
                    drift_loss /= tf.cast(num_queries, tf.float32)
                loss = contrastive.value_with_gradient(loss, loss + drift_loss)
            self._update_cache(items, step.refreshed)
            self._end_step(tf.shape(candidates)[0])
        for metric in self._loss_metrics:
            metric.update_state(loss)
        if compute_metrics:
            for metric in self._task_metrics:
                metric.update_state(queries, candidates[:num_queries], **weight)
        if compute_batch_metrics and self._batch_metrics:
            batch_logits = contrastive.leave_out(in_batch_logits, not_a_negative)
            batch_logits = tf.maximum(batch_logits, tf.float32.min / 100.0)
            for metric in self._batch_metrics:
                metric.update_state(tf.cast(is_positive, tf.float32), batch_logits, **weight)
        return loss

    def get_config(self):
        specs = self.feature_specs[ONE_FEATURE] if self._takes_one_tensor else self.feature_specs
        metrics = {
            "metrics": self._task_metrics,
            "batch_metrics": self._batch_metrics,
            "loss_metrics": self._loss_metrics,
        }
        return {**super().get_config(), **_retrieval_config.to_config(self, specs, metrics)}

    @classmethod
    def from_config(cls, config):
        return cls(**_retrieval_config.from_config(config))

    def _cache_logit(self, scaled_queries, items, threshold, has_probabilities, training, left_out):
        """[B] log partition of the cache, and what else a training step is."""
        log_expected = None
        if self._cache.row_key is None:
            # A corpus has every candidate once.
            log_expected = self._log_expected_occurrences(items, has_probabilities, of_rows=True)
        conditions = _cached_negatives.Conditions(
            positive_ids=left_out,
            max_scores=threshold,
            log_weights=None if log_expected is None else -log_expected,
        )
        if not training:
            return self._negatives().log_partition(scaled_queries, items, conditions), None
        step = self._negatives().sampled_log_partition(
            scaled_queries, items, conditions, self._next_seed()
        )
        return step.log_partition, step

    def _ids_left_out(self, items, queries, known_positive_ids):
        """[B, P] int64, fingerprints of the candidates that are no negatives of each query.

        The first is the positive's own. None where nothing is left out by its id.
        """
        is_known = known_positive_ids is not None
        if is_known and self.candidate_id_key is None:
            raise ValueError("`known_positive_ids` needs a `candidate_id_key`. Received: None.")
        if not is_known and not self.remove_accidental_hits:
            return None
        own = items[CANDIDATE_ID][: tf.shape(queries)[0], tf.newaxis]
        if not is_known:
            return own
        ids, is_there = _retrieval_checks.check_known_positives(known_positive_ids, queries)
        _retrieval_checks.check_id_kind(self, ids, "known_positive_ids")
        return tf.concat([own, tf.where(is_there, fingerprint(ids), own)], axis=1)

    def _not_a_negative(self, items, scores, threshold, left_out):
        """[B, N] bool, the in-batch candidates that are no negatives, or are the positive."""
        no_negatives = tf.zeros_like(scores, tf.bool)
        if left_out is not None:
            no_negatives |= is_among(items[CANDIDATE_ID][tf.newaxis], left_out)
        if threshold is not None:
            no_negatives |= scores > threshold[:, tf.newaxis]
        return no_negatives

    def _scores_of_explicit(self, scaled_queries, explicit, mask, ids, left_out):
        """[B, M] logits of explicit negatives [B, M, d]."""
        if mask is not None:
            mask = _retrieval_checks.check_negative_mask(mask, explicit)
            # Padding may be embedded as anything.
            explicit = tf.where(mask[..., tf.newaxis], explicit, 0.0)
        scores = self._scores.of_own(scaled_queries, explicit)
        if mask is not None:
            scores = contrastive.leave_out(scores, ~mask)
        if ids is not None:
            _retrieval_checks.check_negative_ids(ids, explicit)
            scores = contrastive.leave_out(scores, is_among(ids, left_out))
        return scores

    def _log_expected_occurrences(self, items, has_probabilities, of_rows=False):
        """[N] log of how often each of the batch's candidates is expected among the negatives.

        Where `of_rows`, [C] the same for the cached candidates.
        """
        if not has_probabilities and self._frequency is None:
            return None
        # The number of draws from the stream that are negatives now.
        num_negatives = tf.constant(0.0)
        if self.in_batch_negatives:
            num_negatives += tf.cast(tf.shape(items[EMBEDDING])[0], tf.float32)
        if self.cache_size:
            num_negatives += tf.cast(self._cache.num_filled, tf.float32)
        return _cached_negatives.log_expected_occurrences(
            self._cache.data if of_rows else items,
            num_negatives,
            frequency=None if has_probabilities else self._frequency,
            are_cached=of_rows,
        )


def _as_list(metrics) -> list:
    if metrics is None:
        return []
    return list(metrics) if isinstance(metrics, Sequence) else [metrics]
