"""`FromCache`: negatives out of a cache that streams."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from negative_cache import _features, _validation, util
from negative_cache._compat import deserialize, keras
from negative_cache._features import fingerprint
from negative_cache.layers._corpus import EMBEDDING
from negative_cache.layers._negatives import checks
from negative_cache.layers._negatives.batch import Batch
from negative_cache.layers._negatives.cached import CachedNegatives, own_network
from negative_cache.layers._negatives.pool import check_pool, emptiest_first
from negative_cache.layers._negatives.rows import (
    CANDIDATE_ID,
    INTERNAL_KEYS,
    LOG_PROBABILITY,
    EncodedRows,
)
from negative_cache.layers._state import describe_specs, on_every_replica, specs_of
from negative_cache.layers.cache import Cache
from negative_cache.layers.drift_corrector import DriftCorrector
from negative_cache.layers.tree_index import TreeIndex
from negative_cache.ops.cache_rows import take_rows

if TYPE_CHECKING:
    from negative_cache.layers._negatives.base import Contribution
    from negative_cache.layers.retrieval import Retrieval


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """What a streaming cache is to hold, which is made when the embedding dimension is known.

    Args:
      feature_specs: feature name -> `tf.io.FixedLenFeature` (shape without the batch, dtype) of
        what the tower needs, or one such spec if the tower takes a single tensor.
      cache_size: C, the number of cached candidates.
      use_lru: as in `Cache`.
      index: a `TreeIndex` with the cache's size as its capacity.
      embedding_dim: d; taken from the first batch if it is None.
      embedding_dtype: of the cached embeddings. bfloat16 and float16 halve the memory.
      saved: whether files hold the rows.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      >>> spec = CacheSpec({"title": tf.io.FixedLenFeature([], tf.string)}, cache_size=65536)
      >>> spec.cache_size
      65536
    """

    feature_specs: Mapping[str, tf.io.FixedLenFeature] | tf.io.FixedLenFeature
    cache_size: int
    use_lru: bool = True
    index: TreeIndex | None = None
    embedding_dim: int | None = None
    embedding_dtype: str | tf.DType = tf.float32
    saved: bool = True

    def __post_init__(self) -> None:
        _validation.check_count(self.cache_size, "cache_size")
        checks.check_features(self.named_specs, INTERNAL_KEYS)
        if self.index is not None and not isinstance(self.index, TreeIndex):
            raise ValueError(f"`index` must be a `TreeIndex`. Received: {self.index!r}.")

    @property
    def named_specs(self) -> dict[str, tf.io.FixedLenFeature]:
        """Feature name -> spec; a single tensor has a fixed name."""
        return dict(_features.as_dict(self.feature_specs))

    def make(self, embedding_dim: int, *, has_ids: bool) -> Cache:
        """The cache, for embeddings [n, d].

        Args:
          embedding_dim: d.
          has_ids: whether candidates have ids that the cache is to know.
        """
        specs = {
            **self.named_specs,
            EMBEDDING: tf.io.FixedLenFeature([embedding_dim], tf.as_dtype(self.embedding_dtype)),
            LOG_PROBABILITY: tf.io.FixedLenFeature([], tf.float32),
        }
        if has_ids:
            specs[CANDIDATE_ID] = tf.io.FixedLenFeature([], tf.int64)
        return Cache(
            specs,
            self.cache_size,
            EMBEDDING,
            self.use_lru,
            saved=self.saved,
            index=self.index,
            name="cache",
        )

    def get_config(self) -> dict[str, Any]:
        """The arguments as JSON values."""
        return {
            "feature_specs": describe_specs(self.feature_specs),
            "cache_size": self.cache_size,
            "use_lru": self.use_lru,
            "index": keras.utils.serialize_keras_object(self.index),
            "embedding_dim": self.embedding_dim,
            "embedding_dtype": tf.as_dtype(self.embedding_dtype).name,
            "saved": self.saved,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CacheSpec:
        """The inverse of `get_config`."""
        specs = specs_of(config["feature_specs"])
        return cls(**{**config, "feature_specs": specs, "index": deserialize(config["index"])})


@keras.utils.register_keras_serializable("negative_cache")
class FromCache(CachedNegatives):
    """The candidates of a cache that streams are negatives: one logit for all of them.

    The logit is the cache's log partition; a few candidates are drawn in proportion to exp(score)
    and encoded by the tower of now, and carry its gradient. Their embeddings are written back, and
    the batch's candidates then replace the rows that were used longest ago.

    A candidate that came several times may stand in several rows. Under a `tf.distribute` strategy
    every replica has a cache of its own, of the candidates of its own batches. With
    `pool="replicas"` all of them are one pool: every query has the negatives of all replicas.

    Args:
      cache: a `CacheSpec`; or a `Cache` without a `row_key` whose embedding is called "embedding".
      num_negatives: S, rows drawn for each query and encoded at every training step; 1 if neither
        this nor `num_draws` is given.
      num_draws: n, rows drawn and encoded at every step for all queries of the batch together (of a
        replica's batch), instead of S for each: see `docs/shared_draws.md`.
      exact_query_gradient: whether the queries' gradient is computed and not sampled, see
        `CachedRetrieval`.
      corrector: a `Corrector` or a `NystromCorrector`, which estimates where stale embeddings are
        now.
      refresh_fraction: ρ in [0, 1], the share of the rows that are encoded again at each step,
        those touched longest ago.
      probe_size: rows that are encoded every `probe_every` steps only to see how stale they are.
      probe_every: steps from one probe to the next.
      candidate_network: the tower of the rows, if that is not the task's. The batch's candidates
        are then encoded by it too, in inference mode, to enter the cache.
      pool: "replicas" for the caches of all replicas of the `tf.distribute` strategy as one, with
        R C rows on R replicas; each of them then scores the queries of all. None for its own rows
        only. See `docs/distributed.md`.
      seed: seed of the draws; random (but under `keras.utils.set_random_seed`) if None.
      **kwargs: of the layer; see `Negatives`.

    Raises:
      ValueError: if an argument is out of range or does not go with the cache.

    Examples:
      >>> source = FromCache(CacheSpec(specs, cache_size=65536), num_negatives=2)
      >>> task = Retrieval(candidate_tower, [InBatch(), source], temperature=0.05)
    """

    def __init__(
        self,
        cache: CacheSpec | Cache,
        *,
        num_negatives: int | None = None,
        num_draws: int | None = None,
        exact_query_gradient: bool = True,
        corrector: DriftCorrector | None = None,
        refresh_fraction: float = 0.0,
        probe_size: int = 0,
        probe_every: int = 100,
        candidate_network: Callable[..., tf.Tensor] | None = None,
        pool: str | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            num_draws=num_draws,
            num_negatives=num_negatives,
            exact_query_gradient=exact_query_gradient,
            corrector=corrector,
            refresh_fraction=refresh_fraction,
            probe_size=probe_size,
            probe_every=probe_every,
            candidate_network=candidate_network,
            seed=seed,
            **kwargs,
        )
        if isinstance(cache, CacheSpec):
            specs = cache.named_specs
            self.takes_one_tensor = not isinstance(cache.feature_specs, Mapping)
        else:
            specs = checks.check_streaming_cache(cache, INTERNAL_KEYS)
            self.takes_one_tensor = set(specs) == {_features.ONE_FEATURE}
            self._cache = cache
        self.pool = check_pool(pool)
        self.feature_specs = specs
        self.cache_size = cache.cache_size
        self.use_lru = cache.use_lru
        self._has_warned = False
        # An index is the cache's, once there is one: Keras is to find it there only.
        self._bound.cache = cache
        self._make_state(cache.use_lru)

    @property
    def index(self) -> TreeIndex | None:
        return self._bound.cache.index

    def bind(self, task: Retrieval, prefix: str) -> None:
        checks.check_weighting(task.frequency is not None, self.index, "frequency_correction")
        if task.frequency is not None and self.use_lru:
            raise ValueError(
                "`frequency_correction` takes the cache for a sample of the stream, which it is"
                " with `use_lru=False` only: LRU keeps candidates that are drawn often. Received:"
                " use_lru=True."
            )
        self._id_key = task.candidate_id_key
        if self._id_key is not None:
            _validation.check_id(
                self._id_key, self.feature_specs, "candidate_id_key", "feature_specs"
            )
        super().bind(task, prefix)
        spec = self._bound.cache
        if isinstance(spec, CacheSpec):
            dim = spec.embedding_dim if spec.index is None else spec.index.embedding_dim
            if dim:
                self.build_cache(dim)

    def build_cache(self, embedding_dim: int) -> None:
        """Makes the cache, if it is not made yet; checks its dimension.

        Raises:
          ValueError: if the cache holds embeddings of another dimension.
        """
        if self._cache is None:
            self._cache = self._bound.cache.make(embedding_dim, has_ids=self._id_key is not None)
        checks.check_dimension(embedding_dim, self.get_cache().embeddings)
        self._build_corrector(embedding_dim)

    def add(
        self,
        candidate_features: Mapping[str, tf.Tensor] | tf.Tensor,
        candidate_sampling_probability: tf.Tensor | None = None,
    ) -> None:
        """Encodes candidates, in inference mode and without gradient, and puts them in the cache.

        Outside of the replicas of a strategy, every replica's cache gets them. Of a `pool` each
        gets a part, those with the fewest rows first.

        Args:
          candidate_features: the features [n, ...] of n <= C candidates, or R C for a pool.
          candidate_sampling_probability: [n] float, as in `Retrieval.call`.

        Raises:
          ValueError: if features do not match the cache, or n exceeds C.
        """
        features = _validation.check_items(
            _features.as_dict(candidate_features),
            self.feature_specs,
            what="candidate_features",
            exact=True,
        )
        embeddings = tf.stop_gradient(self.encode(features))
        if candidate_sampling_probability is not None:
            self._check_keeps_probabilities()
        about = self.get_task().about_candidates(
            features, embeddings, candidate_sampling_probability
        )
        rows = self._new_rows(features, embeddings, *about)
        if self.pool is not None and tf.distribute.in_cross_replica_context():
            _validation.check_fits(rows, self.pool_size, what="candidate_features")
            on_every_replica(self._add_own_part, rows)
        else:
            self.get_cache().update(new_items=rows)

    def _add_own_part(self, rows: Mapping[str, tf.Tensor]) -> None:
        cache, count = self.get_cache(), tf.shape(rows[EMBEDDING])[0]
        num_filled = tf.cast(cache.num_filled, tf.int32)[tf.newaxis]
        num_filled = util.cross_replica_concat(num_filled, axis=0)
        owners = emptiest_first(num_filled, count, tf.cast(cache.step, tf.int32))
        is_own = tf.equal(owners, util.replica_id())
        # Own ones first, so that their number and not that of all must fit.
        order = tf.argsort(tf.cast(is_own, tf.int32), direction="DESCENDING", stable=True)
        order = order[: self.cache_size]
        own = {key: take_rows(values, order) for key, values in rows.items()}
        cache.update(new_items=own, new_items_mask=tf.gather(is_own, order))

    def logits(self, batch: Batch, training: bool) -> Contribution:
        if batch.log_q is not None:
            checks.check_weighting(True, self.index)
            if batch.log_q.frequency is None:
                self._check_keeps_probabilities()
        if training:
            size = {"embedding": batch.candidates}
            _validation.check_fits(size, self.cache_size, what="candidate_features")
        return super().logits(batch, training)

    def num_stream_draws(self, num_candidates: tf.Tensor) -> tf.Tensor:
        del num_candidates
        num_filled = tf.cast(self.get_cache().num_filled, tf.float32)
        return num_filled if self.pool is None else util.cross_replica_sum(num_filled)

    def get_config(self) -> dict[str, Any]:
        cache = self._bound.cache
        if isinstance(cache, CacheSpec):
            if self._cache is not None:
                dim = int(self.get_cache().embeddings.shape[1])
                cache = dataclasses.replace(cache, embedding_dim=dim)
            described = cache.get_config()
        else:
            described = keras.utils.serialize_keras_object(cache)
        return {**super().get_config(), "cache": described, "pool": self.pool}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FromCache:
        cache = config["cache"]
        is_spec = "class_name" not in cache
        return cls(
            **{
                **config,
                "cache": CacheSpec.from_config(cache) if is_spec else deserialize(cache),
                "corrector": deserialize(config["corrector"]),
                "candidate_network": own_network(config),
            }
        )

    def left_out_ids(self, batch: Batch) -> tf.Tensor | None:
        return batch.left_out_ids

    def left_out_rows(self, ids: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"candidate_ids": self._row_ids(), "positive_ids": ids}

    def ids_at(self, rows: tf.Tensor) -> tf.Tensor:
        data: dict[str, Any] = self.get_cache().data
        if CANDIDATE_ID in data:
            return tf.gather(data[CANDIDATE_ID], rows)
        return fingerprint(tf.gather(_features.id_feature(data, self._id_key), rows))

    def _row_ids(self) -> tf.Tensor:
        """[C] int64, fingerprints of the rows' ids."""
        if CANDIDATE_ID in self.get_cache().specs:
            return tf.convert_to_tensor(self.get_cache().data[CANDIDATE_ID])
        data: dict[str, Any] = self.get_cache().data
        return fingerprint(tf.convert_to_tensor(_features.id_feature(data, self._id_key)))

    def log_weights(self, batch: Batch) -> tf.Tensor | None:
        if batch.log_q is None:
            return None
        log_probability = ids = None
        if batch.log_q.frequency is not None:
            ids = self._row_ids()
        else:
            log_probability = tf.convert_to_tensor(self.get_cache().data[LOG_PROBABILITY])
        return -batch.log_q.log_expected(log_probability, ids, are_cached=True)

    def _check_keeps_probabilities(self) -> None:
        if LOG_PROBABILITY not in self.get_cache().specs:
            raise ValueError(
                "`candidate_sampling_probability` needs a cache that keeps it: give the source a"
                f" `CacheSpec`. Received a cache of {sorted(self.get_cache().specs)}."
            )
        if self.use_lru and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "`candidate_sampling_probability` takes the cache for a sample of the stream, which"
                " it is with `use_lru=False` only: LRU keeps candidates that are drawn often, and"
                " the correction counts them too often.",
                stacklevel=2,
            )

    def own_rows(self, batch: Batch) -> EncodedRows | None:
        del batch
        return None

    def write(self, batch: Batch, encoded: EncodedRows | None) -> None:
        features, embeddings = self.features_in(batch), batch.candidates
        if self.has_own_tower:
            embeddings = tf.stop_gradient(self.encode(features))
        rows = self._new_rows(features, embeddings, batch.ids, batch.log_probability)
        self.get_cache().update(new_items=rows, **as_updates(encoded))

    def _new_rows(
        self,
        features: Mapping[str, tf.Tensor],
        embeddings: tf.Tensor,
        ids: tf.Tensor | None,
        log_probability: tf.Tensor,
    ) -> dict[str, tf.Tensor]:
        known = {
            **features,
            EMBEDDING: embeddings,
            LOG_PROBABILITY: log_probability,
            CANDIDATE_ID: ids,
        }
        return {key: known[key] for key in self.get_cache().specs}


def as_updates(encoded: EncodedRows | None) -> dict[str, Any]:
    """Encoded rows as what `Cache.update` takes."""
    if encoded is None:
        return {}
    return {
        "updated_item_data": {EMBEDDING: encoded.embeddings},
        "updated_item_indices": encoded.rows,
        "updated_item_mask": encoded.mask,
    }
