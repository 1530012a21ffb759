"""`CachedRetrieval`: the retrieval task with the usual list of negatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from negative_cache import _features, _validation
from negative_cache._compat import deserialize, keras
from negative_cache.layers._negatives import checks
from negative_cache.layers._negatives.base import Negatives
from negative_cache.layers._negatives.cached import CachedNegatives
from negative_cache.layers._negatives.explicit import Explicit
from negative_cache.layers._negatives.from_cache import CacheSpec, FromCache
from negative_cache.layers._negatives.from_corpus import FromCorpus
from negative_cache.layers._negatives.in_batch import InBatch
from negative_cache.layers._negatives.pool import check_pool, check_pool_of_corpus
from negative_cache.layers._negatives.rows import INTERNAL_KEYS
from negative_cache.layers._state import describe_specs, fixed_seed, specs_of
from negative_cache.layers._variables import is_on_host
from negative_cache.layers.cache import Cache
from negative_cache.layers.drift_corrector import DriftCorrector
from negative_cache.layers.frequency import FrequencyEstimator
from negative_cache.layers.retrieval import Retrieval
from negative_cache.layers.temperature import LearnedTemperature
from negative_cache.layers.tree_index import TreeIndex

# The arguments that are attributes too, and that a configuration holds as they are.
_OF_CACHES = (
    "cache_size",
    "num_draws",
    "num_negatives",
    "use_lru",
    "exact_query_gradient",
    "save_cache",
    "seed",
    "refresh_fraction",
    "probe_size",
    "probe_every",
)
_PLAIN = (*_OF_CACHES, "in_batch_negatives", "num_hard_negatives", "write_back", "pool")


@keras.utils.register_keras_serializable("negative_cache")
class CachedRetrieval(Retrieval):
    """Softmax cross-entropy of a two-tower model, with a large cache of negatives behind it.

    This is `Retrieval` with the usual list of sources of negatives, built from arguments: `InBatch`
    with `in_batch_negatives`, `Explicit`, and `FromCorpus` with a `cache` or else `FromCache`.

    It is to a cache what `tfrs.tasks.Retrieval` is to a batch. The logits of a query are its
    positive, the other candidates of the batch if you ask for them, explicit negatives if you give
    some, and one logit for the whole cache: its log partition under the cached embeddings. A few
    candidates are drawn from the cache in proportion to exp(score). They are encoded again and
    carry the gradient of that logit. So the *value* of the loss is the cross-entropy over
    everything, and progress bars and `EarlyStopping` can use it, while its *gradient* costs
    `num_negatives` encoded candidates for each query (Lindgren et al., NeurIPS 2021).

    The drawn candidates' fresh embeddings are written back. The batch's candidates then replace the
    rows that were used longest ago. A call with `training=False` only reads the cache.

    A candidate whose embedding is not finite never enters the cache; the metric `skipped_rows`
    counts such candidates. The layer does not deduplicate: a candidate that came several times may
    stand in several rows. Under a `tf.distribute` strategy every replica has its own cache.

    With a `cache` that covers a corpus (`Cache.from_dataset`), every candidate is a negative from
    the first step on. The positive's own row is always left out. Positives are encoded anyway, and
    are written to their rows. Rows that neither draws nor positives reach become stale. There are
    three remedies: `refresh_fraction` encodes them in turn, the callback `CacheRefresh` encodes all
    rows at once, and a `corrector` estimates where they are without encoding them.

    TensorFlow checkpoints, `.weights.h5` and `.keras` files hold the cache and the state of the
    sampling. A training that continues from one draws what it would have drawn.

    Args:
      candidate_network: the candidate tower, a Keras layer or a function: candidate features with a
        batch dimension -> [n, d] embeddings.
      feature_specs: feature name -> `tf.io.FixedLenFeature` (shape without the batch, dtype) of
        what the tower needs, or one such spec if the tower takes a single tensor. Not needed with a
        `cache`.
      cache_size: C, the number of cached candidates. 0 trains without a cache, the baseline to
        compare with. Not needed with a `cache`.
      temperature: scores are inner products divided by it: a number; "learned", which stands for
        `LearnedTemperature(0.1, smallest=0.07)` and suits embeddings of length 1; or a
        `LearnedTemperature` of your own. The attribute `temperature`, and the logs if it is
        learned, have its value of now.
      score_transform: elementwise function of the (divided) inner products. If it learns something,
        it must be a Keras layer: Keras does not find variables that a function closes over. Their
        gradient is estimated by the draws. On a GPU, XLA must be able to compile the function.
      num_negatives: S, rows of the cache drawn for each query and encoded at every training step; 1
        if neither this nor `num_draws` is given.
      num_draws: n, rows drawn and encoded at every step for all queries of the batch together (of a
        replica's batch), instead of S for each: see `docs/shared_draws.md`.
      in_batch_negatives: whether the batch's other candidates are negatives too, with exact
        gradient.
      num_hard_negatives: keep only this many of the highest-scoring in-batch negatives of a query.
      candidate_id_key: name of the feature that identifies a candidate; scalar int or string. If
        `feature_specs` is a single spec, the name is "candidate".
      remove_accidental_hits: leave out negatives that have the positive's id. Needs
        `candidate_id_key`.
      index: a `TreeIndex` with the cache's size as its capacity. Negatives are then drawn from it,
        in time that hardly grows with the cache. Rows that a step writes move in it in the same
        step. `score_transform` must be nondecreasing, and neither `frequency_correction` nor
        `candidate_sampling_probability` can be used. With `exact_query_gradient` the queries'
        gradient is that of the index's estimate of log Z, which no Metropolis-Hastings step
        corrects; the draws are corrected. A given `cache` has its index already.
      corrector: a `Corrector` or a `NystromCorrector`, which estimates where stale embeddings are
        now. Draws, the log partition and its gradient use corrected embeddings.
      cache: a cache that covers a corpus, as `Cache.from_dataset` makes it. It decides on
        `feature_specs`, `cache_size`, `candidate_id_key`, `index` and `embedding_dtype`. It holds
        every candidate once, so no correction for frequency applies; `in_batch_negatives` count
        twice with it, as themselves and as their rows.
      refresh_fraction: ρ in [0, 1], the share of the rows that are encoded again at each step,
        those touched longest ago first, in inference mode and without gradient. ρ C is rounded to
        whole rows; below a half, one row is encoded every 1 / (ρ C) steps. Needs `use_lru=True`,
        as `corrector` and `probe_size` do: only then the age of a row is that of its embedding.
      write_back: whether draws, and with a `cache` the positives, are written back. False changes
        rows by `refresh_fraction` and `CacheRefresh` only, for baselines with a stale cache. Only
        with a `cache`.
      probe_size: how many random rows are encoded every `probe_every` steps, only to measure how
        stale the cache is. The logs have the mean of ‖ĝ - g‖² / ‖g‖² of the last probe as
        `probe_staleness`, and with a corrector h that of h(ĝ) as `probe_corrected_staleness`.
        Unlike the rows of `staleness`, these rows are not drawn for their scores. 0 for none.
      probe_every: steps from one probe to the next.
      use_lru: see `Cache`.
      false_negative_margin: leave out in-batch and cached negatives that score above the positive
        minus this margin; they are likely unlabelled positives.
      exact_query_gradient: whether the cache's part of the queries' gradient is computed and not
        sampled. It is the mean of the cached embeddings under the softmax, and costs the sampler a
        second matrix product. The draws then only correct it for staleness, as a control variate:
        ∇_x log Z ≈ Σ_y P̂(y|x) s' ĝ(y) + mean over the draws of s' (g(ŷ) - ĝ(ŷ)), with s' the
        derivative of the score by the inner product. The expectation is that of the sampled
        estimator, Σ_y P̂(y|x) s' g(y), for stale and fresh caches; the remaining variance is that
        of g - ĝ. The candidate tower's gradient is always sampled.
      frequency_correction: subtract from each score the log of the expected number of times its
        candidate stands among the negatives. The partition is then an estimate over the corpus and
        not over the stream, in which popular candidates repeat. It is the first thing to try for a
        recommender, and needs no cache: `cache_size=0`. True estimates frequencies online
        by a `FrequencyEstimator` of 4 million buckets, enough for 140,000 candidates (30 buckets
        each); give your own for more. A bucket takes 12 bytes, in memory and in files, also in
        files without the cache. Needs `candidate_id_key`, and with a cache `use_lru=False`: the
        correction takes the cache for a sample of the stream, but LRU keeps rows that are drawn
        often for longer. `candidate_sampling_probability` in a call assumes the same, and warns
        with LRU. None is False, with a warning if candidates turn out to repeat unevenly.
      reduction: "sum_over_batch_size" (the mean over the batch), "sum", or "none" for [B].
      metrics: Keras metrics updated with (query embeddings, positive embeddings) and the sample
        weights, if there are any. With `tfrs.metrics.FactorizedTopK`, scores are compared and not
        ids.
      batch_metrics: Keras metrics updated with (labels [B, N], scores [B, N]) of the batch and the
        sample weights, if there are any.
      loss_metrics: Keras metrics updated with the loss.
      embedding_dim: d; taken from the first call if it is None.
      embedding_dtype: of the cached embeddings. bfloat16 and float16 halve the memory.
      save_cache: whether files hold the cache. Files without it are smaller, and a training that
        continues from one starts with an empty cache.
      pool: "replicas" for the caches, and the batches, of all replicas of a strategy as one: every
        query has the negatives of all of them. A given `cache` must be `sharded`. None for those of
        its own replica. See `docs/distributed.md`.
      seed: seed of the draws; random if it is None, except under `keras.utils.set_random_seed`.
      **kwargs: of the layer. A given `name` is put before the names of its metrics in the logs,
        which tells several tasks in one model apart.

    Raises:
      ValueError: if an argument is out of range or contradicts another.

    Examples:
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
        temperature: float | str | LearnedTemperature | None = None,
        score_transform: Callable[[tf.Tensor], tf.Tensor] | None = None,
        num_negatives: int | None = None,
        num_draws: int | None = None,
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
        frequency_correction: bool | FrequencyEstimator | None = None,
        reduction: str | None = "sum_over_batch_size",
        metrics: Sequence[keras.metrics.Metric] | keras.metrics.Metric | None = None,
        batch_metrics: Sequence[keras.metrics.Metric] | None = None,
        loss_metrics: Sequence[keras.metrics.Metric] | None = None,
        embedding_dim: int | None = None,
        embedding_dtype: str | tf.DType = tf.float32,
        save_cache: bool = True,
        pool: str | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        decided = {
            "cache_size": cache_size,
            "candidate_id_key": candidate_id_key,
            "index": index,
            "embedding_dim": embedding_dim,
            "embedding_dtype": tf.as_dtype(embedding_dtype),
            "use_lru": use_lru,
            "save_cache": save_cache,
        }
        if cache is not None:
            feature_specs = checks.check_corpus(cache, feature_specs)
            decided = checks.decided_by(cache, decided)
            remove_accidental_hits = True
        elif feature_specs is None or cache_size is None:
            raise ValueError(
                "A task needs `feature_specs` and `cache_size`, or a `cache`. Received:"
                f" feature_specs={feature_specs!r}, cache_size={cache_size}."
            )
        checks.check_network(candidate_network)
        pool = check_pool(pool)
        cache_size = _validation.check_count(decided["cache_size"], "cache_size", at_least=0)
        named_specs = dict(_features.as_dict(feature_specs))
        checks.check_features(named_specs, INTERNAL_KEYS)
        id_key = decided["candidate_id_key"]
        if id_key is not None:
            _validation.check_id(id_key, named_specs, "candidate_id_key", "feature_specs")
        seed = fixed_seed(seed)
        num_draws, num_negatives = checks.check_draws(num_draws, num_negatives)
        of_rows: dict[str, Any] = {
            "num_draws": num_draws,
            "num_negatives": num_negatives,
            "exact_query_gradient": exact_query_gradient,
            "corrector": corrector,
            "refresh_fraction": refresh_fraction,
            "probe_size": probe_size,
            "probe_every": probe_every,
            "seed": seed,
        }
        spec = None
        if cache is None and cache_size:
            dim, dtype = embedding_dim, embedding_dtype
            spec = CacheSpec(feature_specs, cache_size, use_lru, index, dim, dtype, save_cache)
        elif cache is None:
            asked = ("corrector", "refresh_fraction", "probe_size")
            checks.check_needs_cache(index=index, **{name: of_rows[name] for name in asked})
        sources = _of_the_batch(in_batch_negatives, num_hard_negatives, pool)
        sources += _of_rows(cache, spec, feature_specs, write_back, pool, of_rows)
        super().__init__(
            candidate_network,
            sources,
            temperature=temperature,
            score_transform=score_transform,
            candidate_id_key=id_key,
            remove_accidental_hits=remove_accidental_hits,
            false_negative_margin=false_negative_margin,
            frequency_correction=frequency_correction,
            reduction=reduction,
            metrics=metrics,
            batch_metrics=batch_metrics,
            loss_metrics=loss_metrics,
            **kwargs,
        )
        self.feature_specs = named_specs
        self.embedding_dtype = decided["embedding_dtype"]
        self.in_batch_negatives = in_batch_negatives
        self.num_hard_negatives = num_hard_negatives
        self.write_back, self.pool = write_back, pool
        for name in _OF_CACHES:
            setattr(self, name, {**decided, **of_rows}[name])
        self._takes_one_tensor = not isinstance(feature_specs, Mapping)
        if any(is_on_host(spec.dtype) for spec in named_specs.values()):
            self.supports_jit = False

    @property
    def cached(self) -> CachedNegatives | None:
        """The source of negatives that is a cache; None with `cache_size=0`."""
        return next(iter(self.cached_negatives), None)

    @property
    def cache(self) -> Cache | None:
        """The `Cache`, or None while the embedding dimension is unknown: until the first call."""
        return None if self.cached is None else self.cached.cache

    @property
    def index(self) -> TreeIndex | None:
        """The `TreeIndex` that negatives are drawn from, if one is."""
        return None if self.cached is None else self.cached.index

    @property
    def corrector(self) -> DriftCorrector | None:
        """What estimates where stale embeddings are now, if something does."""
        return None if self.cached is None else self.cached.corrector

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
          ValueError: if features do not match `feature_specs`, or n exceeds `cache_size`.
        """
        if self.cached is None:
            raise ValueError("There is no cache to add candidates to. Received: cache_size=0.")
        if not isinstance(self.cached, FromCache):
            raise ValueError("A cache that covers a corpus is filled by `fill_cache`.")
        features = self._check_features(candidate_features)
        self.cached.add(features, candidate_sampling_probability)

    def embed_candidates(
        self, candidate_features: Mapping[str, tf.Tensor] | tf.Tensor
    ) -> tf.Tensor:
        """Encodes candidates in inference mode and without gradient; makes the cache if need be.

        Args:
          candidate_features: the features [n, ...] of n candidates.

        Returns:
          [n, d] float32.

        Raises:
          ValueError: if features do not match `feature_specs`.
        """
        features = self._check_features(candidate_features)
        if self.cached is not None:
            return tf.stop_gradient(self.cached.encode(features))
        inputs = _features.as_given(features, self._takes_one_tensor)
        return tf.stop_gradient(self.negatives[0].encode(inputs))

    def fill_cache(self, candidates: Iterable, *, verbose: int = 1) -> None:
        """Encodes a corpus into the `cache` that covers it, whatever it held.

        Args:
          candidates: batches of candidate features, in the order of the rows.
          verbose: 1 for a progress bar, 0 for none.

        Raises:
          ValueError: as `Cache.from_dataset`, and if the cache does not cover a corpus.
        """
        if not isinstance(self.cached, FromCorpus):
            raise ValueError(
                "`fill_cache` is for a task with a `cache` that covers a corpus; others are filled"
                " by `add_to_cache`."
            )
        self.cached.fill(candidates, verbose=verbose)

    def refresh_cache(self, batch_size: int = 1024, verbose: int = 1) -> None:
        """Encodes all filled rows again, in inference mode; their ages begin again.

        Args:
          batch_size: rows encoded at a time.
          verbose: 1 for a progress bar, 0 for none.

        Raises:
          ValueError: if there is no cache, `batch_size` is not positive, or `use_lru` is False.
        """
        if self.cached is None:
            raise ValueError("There is no cache to refresh, or none yet.")
        self.cached.refresh(batch_size, verbose=verbose)

    def get_config(self) -> dict[str, Any]:
        serialize = keras.utils.serialize_keras_object
        config = super().get_config()
        del config["negatives"], config["own_networks"]
        # A cache that streams is made by the task; one of a corpus was given, with its index.
        is_corpus = isinstance(self.cached, FromCorpus)
        specs = _features.as_given(self.feature_specs, self._takes_one_tensor)
        return {
            **config,
            **{name: getattr(self, name) for name in _PLAIN},
            "feature_specs": describe_specs(specs),
            "corrector": serialize(self.corrector),
            "cache": serialize(self.cache) if is_corpus else None,
            "index": None if is_corpus else serialize(self.index),
            "embedding_dim": None if self.cache is None else self.cache.embeddings.shape[1],
            "embedding_dtype": self.embedding_dtype.name,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CachedRetrieval:
        config = {
            **config,
            **{name: deserialize(config[name]) for name in ("corrector", "cache", "index")},
            "feature_specs": specs_of(config["feature_specs"]),
            # How many rows a corpus has depends on the replicas of now.
            "cache_size": None if config["cache"] else config["cache_size"],
        }
        return super().from_config(config)

    def _check_features(self, features: Mapping[str, tf.Tensor] | tf.Tensor) -> dict:
        if self._takes_one_tensor:
            features = _features.as_dict(features)
        return _validation.check_items(
            features, self.feature_specs, what="candidate_features", exact=True
        )


def _of_the_batch(in_batch: bool, num_hard: int | None, pool: str | None) -> list[Negatives]:
    """The sources that need no cache."""
    if not in_batch:
        if num_hard is not None:
            raise ValueError(
                "`num_hard_negatives` needs `in_batch_negatives=True`. Received:"
                f" num_hard_negatives={num_hard}, in_batch_negatives=False."
            )
        return [Explicit()]
    if num_hard is not None:
        _validation.check_count(num_hard, "num_hard_negatives")
    return [InBatch(num_hard, pool), Explicit()]


def _of_rows(
    cache: Cache | None,
    spec: CacheSpec | None,
    feature_specs: Any,
    write_back: bool,
    pool: str | None,
    options: Mapping[str, Any],
) -> list[Negatives]:
    """The source that is a cache, if there is one: of a corpus, or streaming."""
    if cache is not None:
        check_pool_of_corpus(pool, cache)
        return [FromCorpus(cache, write_back=write_back, feature_specs=feature_specs, **options)]
    if not write_back:
        raise ValueError(
            "`write_back=False` is for a `cache` that covers a corpus. Received: cache=None."
        )
    return [] if spec is None else [FromCache(spec, pool=pool, **options)]
