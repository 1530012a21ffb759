"""`CachedRetrieval`: the retrieval task with a cache of negatives behind it."""

import operator
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import RunningMean, become_task, keras
from negative_cache.layers import _cached_negatives, _networks, _retrieval_checks, _retrieval_config
from negative_cache.layers._cached_negatives import CANDIDATE_ID, EMBEDDING
from negative_cache.layers._scores import Scores
from negative_cache.layers._state import StateLayer, make_state_variable, next_seed
from negative_cache.layers.cache import Cache
from negative_cache.layers.frequency import FrequencyEstimator
from negative_cache.layers.tree_index import TreeIndex
from negative_cache.metrics import Latest
from negative_cache.ops import contrastive

_ONE_FEATURE = "candidate"
_DIMENSION = "embedding_dim"


@keras.utils.register_keras_serializable("negative_cache")
class CachedRetrieval(StateLayer):
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

    TensorFlow checkpoints, `.weights.h5` and `.keras` files hold the cache and the state of the
    sampling, so that a training that goes on from one draws what it would have drawn.

    Args:
      candidate_network: the candidate tower, a Keras layer or a function: candidate features with a
        batch dimension -> [n, d] embeddings.
      feature_specs: feature name -> `tf.io.FixedLenFeature` (shape without the batch, dtype) of
        what the tower needs, or one such spec where the tower takes a single tensor.
      cache_size: C, the number of cached candidates. 0 trains without a cache, the baseline to
        compare with.
      temperature: scores are inner products divided by it.
      score_transform: elementwise function of the (divided) inner products.
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
        frequency: neither `frequency_correction` nor `candidate_sampling_probability`.
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
        and not over the stream, in which popular candidates repeat. Estimated online
        (`FrequencyEstimator`). Needs `candidate_id_key`. It takes the cache for a sample of the
        stream, which it is with `use_lru=False`; LRU keeps rows that are drawn often for longer.
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
        feature_specs: Mapping[str, tf.io.FixedLenFeature] | tf.io.FixedLenFeature,
        cache_size: int,
        *,
        temperature: float | None = None,
        score_transform: Callable[[tf.Tensor], tf.Tensor] | None = None,
        num_negatives: int = 1,
        in_batch_negatives: bool = False,
        num_hard_negatives: int | None = None,
        candidate_id_key: str | None = None,
        remove_accidental_hits: bool = False,
        index: TreeIndex | None = None,
        use_lru: bool = True,
        false_negative_margin: float | None = None,
        exact_query_gradient: bool = True,
        frequency_correction: bool = False,
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
        # policy is.
        super().__init__(autocast=False, **kwargs)
        self._takes_one_tensor = not isinstance(feature_specs, Mapping)
        self.feature_specs = (
            {_ONE_FEATURE: feature_specs} if self._takes_one_tensor else dict(feature_specs)
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
        self.frequency_correction = frequency_correction
        self.embedding_dtype = tf.as_dtype(embedding_dtype)
        self.reduction = reduction or "none"
        _retrieval_checks.check_settings(self, index, _cached_negatives.INTERNAL_KEYS)
        self.save_cache = save_cache
        self.seed = random.randrange(2**31) if seed is None else operator.index(seed)
        # Whatever seed a training began with, it goes on with it from a file.
        seed_and_step = tf.constant([self.seed, 0], tf.int64)
        self._hold_state(
            # A cache holds fingerprints of this feature.
            description={"candidate_id_key": candidate_id_key},
            sampling=make_state_variable(lambda: seed_and_step, "sampling"),
        )
        self._scores = Scores(temperature, score_transform)
        self._task_metrics = _as_list(metrics)
        self._batch_metrics = _as_list(batch_metrics)
        self._loss_metrics = _as_list(loss_metrics)
        if cache_size:
            self._staleness = RunningMean(name="staleness")
            self._log_partition = RunningMean(name="log_partition")
            self._fill = Latest(name="fill")
            self._skipped_rows = Latest(name="skipped_rows")
        self._frequency = (
            # Odd, because ids are often multiples of a power of two, which would share few buckets.
            FrequencyEstimator(num_buckets=max(4 * cache_size, 2**16) | 1)
            if frequency_correction
            else None
        )
        self._cache = None
        # XLA has no strings, and no index. Keras 3 asks before it compiles by itself.
        self.supports_jit = index is None and not any(
            tf.as_dtype(spec.dtype) == tf.string for spec in self.feature_specs.values()
        )
        self.built = True
        # The cache's, once there is one: Keras is to find it there only.
        self._untracked.index = index
        embedding_dim = embedding_dim or _networks.known_output_dim(candidate_network)
        if index is not None:
            embedding_dim = index.embedding_dim
        if embedding_dim is not None:
            self.build_cache(embedding_dim)

    @property
    def cache(self) -> Cache | None:
        """The `Cache`, or None while the embedding dimension is unknown: until the first call."""
        return self._cache

    @property
    def index(self) -> TreeIndex | None:
        """The `TreeIndex` that negatives are drawn from, if one is."""
        return self._untracked.index

    @property
    def training_metrics(self) -> list[keras.metrics.Metric]:
        """The metrics that only a training call updates."""
        if not self.cache_size:
            return []
        return [self._staleness, self._log_partition, self._fill, self._skipped_rows]

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

        Returns:
          Scalar float32, or [B] where `reduction` is "none".

        Raises:
          ValueError: where features do not match `feature_specs`, a shape does not fit, or N
            exceeds `cache_size`.
        """
        training = True if training is None else training
        queries = tf.convert_to_tensor(query_embeddings)
        candidates = tf.convert_to_tensor(candidate_embeddings)
        _retrieval_checks.check_embeddings(queries, candidates)
        queries, candidates = tf.cast(queries, tf.float32), tf.cast(candidates, tf.float32)
        items = self._cache_items(candidate_features, candidates, candidate_sampling_probability)
        if self.cache_size and training:
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
        log_expected = self._log_expected_occurrences(items, has_probabilities)
        positive_logits, in_batch_logits = positive_scores, raw_scores
        if log_expected is not None:
            in_batch_logits -= log_expected
            if has_probabilities and self.in_batch_negatives:
                positive_logits -= log_expected[:num_queries]
        is_positive = tf.eye(num_queries, tf.shape(candidates)[0], dtype=tf.bool)
        not_a_negative = self._not_a_negative(items, raw_scores, threshold)
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
            negative_logits.append(self._scores.of_own(scaled_queries, explicit))
        updates = None
        if self.cache_size:
            cache_logit, updates = self._cache_logit(
                scaled_queries, items, threshold, has_probabilities, training
            )
            negative_logits.append(cache_logit[:, tf.newaxis])
        if not negative_logits:
            raise ValueError(
                "There is nothing to tell a positive from. Received `cache_size=0`,"
                " `in_batch_negatives=False` and `negative_embeddings=None`."
            )

        loss = contrastive.softmax_loss(positive_logits, tf.concat(negative_logits, axis=1))
        loss = contrastive.reduce_losses(loss, self.reduction, **weight)
        if updates is not None:
            self._update_cache(items, updates)
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

    def add_to_cache(
        self,
        candidate_features: Mapping[str, tf.Tensor] | tf.Tensor,
        candidate_sampling_probability: tf.Tensor | None = None,
    ) -> None:
        """Encodes candidates, in inference mode and without gradient, and puts them in the cache.

        Args:
          candidate_features: the features [n, ...] of n <= `cache_size` candidates.
          candidate_sampling_probability: [n] float, as in `call`.

        Raises:
          ValueError: where features do not match `feature_specs` or n exceeds `cache_size`.
        """
        if not self.cache_size:
            raise ValueError("There is no cache to add candidates to. Received: cache_size=0.")
        embeddings = self.embed_candidates(candidate_features)
        items = self._cache_items(candidate_features, embeddings, candidate_sampling_probability)
        self._negatives().add(items)

    def embed_candidates(
        self, candidate_features: Mapping[str, tf.Tensor] | tf.Tensor
    ) -> tf.Tensor:
        """Encodes candidates in inference mode and without gradient; makes the cache if need be.

        Args:
          candidate_features: the features [n, ...] of n candidates.

        Returns:
          [n, d] float32.

        Raises:
          ValueError: where features do not match `feature_specs`.
        """
        features = self._check_features(candidate_features)
        return tf.stop_gradient(self._encode(features, training=False))

    def build_cache(self, embedding_dim: int) -> None:
        """Makes the cache, once the embedding dimension is known; checks it against a made one.

        Raises:
          ValueError: where the cache holds embeddings of another dimension.
        """
        if not self.cache_size:
            return
        if self._cache is None:
            self._cache = _cached_negatives.make_cache(
                self.feature_specs,
                tf.io.FixedLenFeature([embedding_dim], self.embedding_dtype),
                has_ids=self.candidate_id_key is not None,
                cache_size=self.cache_size,
                use_lru=self.use_lru,
                saved=self.save_cache,
                index=self._untracked.index,
            )
        _retrieval_checks.check_dimension(embedding_dim, self._cache.embeddings)

    def save_own_variables(self, store):
        """Writes the state into a Keras file; called by Keras."""
        super().save_own_variables(store)
        if self._cache is not None:
            store[_DIMENSION] = np.array([self._cache.embeddings.shape[1]])

    def load_own_variables(self, store):
        """Reads the state from a Keras file; called by Keras before it reads that of the cache."""
        super().load_own_variables(store)
        if _DIMENSION in store:
            self.build_cache(int(np.asarray(store[_DIMENSION])[0]))

    def get_config(self):
        specs = self.feature_specs[_ONE_FEATURE] if self._takes_one_tensor else self.feature_specs
        metrics = {
            "metrics": self._task_metrics,
            "batch_metrics": self._batch_metrics,
            "loss_metrics": self._loss_metrics,
        }
        return {**super().get_config(), **_retrieval_config.to_config(self, specs, metrics)}

    @classmethod
    def from_config(cls, config):
        return cls(**_retrieval_config.from_config(config))

    def _negatives(self):
        """The cache as negatives; not kept, so that Keras finds its parts as attributes only."""
        return _cached_negatives.CachedNegatives(
            self._cache,
            encode=self._encode,
            scores=self._scores,
            metrics=_cached_negatives.CacheMetrics(*self.training_metrics),
            num_draws=self.num_negatives,
            exact_query_gradient=self.exact_query_gradient,
        )

    def _cache_logit(self, scaled_queries, items, threshold, has_probabilities, training):
        """[B] log partition of the cache, and the refreshed rows of a training step."""
        log_expected = self._log_expected_occurrences(items, has_probabilities, of_rows=True)
        conditions = _cached_negatives.Conditions(
            positive_ids=(
                items[CANDIDATE_ID][: tf.shape(scaled_queries)[0]]
                if self.remove_accidental_hits
                else None
            ),
            max_scores=threshold,
            log_weights=None if log_expected is None else -log_expected,
        )
        if not training:
            return self._negatives().log_partition(scaled_queries, conditions), None
        return self._negatives().sampled_log_partition(
            scaled_queries, items, conditions, self._next_seed()
        )

    def _update_cache(self, items, updates):
        self._negatives().update(items, updates)

    def _not_a_negative(self, items, scores, threshold):
        """[B, N] bool, the in-batch candidates that are no negatives, or are the positive."""
        left_out = tf.zeros_like(scores, tf.bool)
        if self.remove_accidental_hits:
            ids = items[CANDIDATE_ID]
            left_out |= tf.equal(ids[: tf.shape(scores)[0], tf.newaxis], ids[tf.newaxis])
        if threshold is not None:
            left_out |= scores > threshold[:, tf.newaxis]
        return left_out

    def _log_expected_occurrences(self, items, has_probabilities, of_rows=False):
        """[N] log of how often each of the batch's candidates is expected among the negatives.

        Where `of_rows`, [C] the same for the cached candidates.
        """
        if not has_probabilities and self._frequency is None:
            return None
        # The number of draws from the stream that are negatives now.
        num_negatives = tf.shape(items[EMBEDDING])[0] if self.in_batch_negatives else 0
        if self.cache_size:
            num_negatives += self._cache.num_filled
        return _cached_negatives.log_expected_occurrences(
            self._cache.data if of_rows else items,
            num_negatives,
            frequency=None if has_probabilities else self._frequency,
            are_cached=of_rows,
        )

    def _cache_items(self, candidate_features, embeddings, probabilities):
        """A batch's candidates as cache rows: features, embeddings, ids and probabilities."""
        features = self._check_features(candidate_features)
        self.build_cache(embeddings.shape[1])
        return _cached_negatives.make_rows(
            features,
            embeddings,
            probabilities,
            id_key=self.candidate_id_key,
            has_cache=bool(self.cache_size),
        )

    def _encode(self, features, training):
        inputs = features[_ONE_FEATURE] if self._takes_one_tensor else features
        embeddings = _networks.embed(self.candidate_network, inputs, training)
        self.build_cache(embeddings.shape[1])
        return tf.cast(embeddings, tf.float32)

    def _next_seed(self):
        """[2] int64, another one at every step and on every replica."""
        return next_seed(self._state.sampling)

    def _check_features(self, features):
        if self._takes_one_tensor and not isinstance(features, Mapping):
            features = {_ONE_FEATURE: features}
        return _validation.check_items(
            features, self.feature_specs, what="candidate_features", exact=True
        )


def _as_list(metrics) -> list:
    if metrics is None:
        return []
    return list(metrics) if isinstance(metrics, Sequence) else [metrics]
