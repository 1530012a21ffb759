"""`CachedNegatives`: what a streaming cache and a cache of a corpus have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from negative_cache import _features, _towers, _validation, util
from negative_cache._compat import RunningMean, deserialize, keras
from negative_cache.layers._negatives import checks
from negative_cache.layers._negatives.base import Contribution
from negative_cache.layers._negatives.batch import Batch
from negative_cache.layers._negatives.drawn import DrawnNegatives
from negative_cache.layers._negatives.pool import PooledShard, check_replicas
from negative_cache.layers._negatives.rows import EncodedRows, RowCorrection
from negative_cache.layers._negatives.shard import Shard
from negative_cache.layers._negatives.step import CachedStep, Outcome, probe
from negative_cache.layers._state import next_seed, on_every_replica
from negative_cache.layers._variables import is_on_host
from negative_cache.layers.cache import Cache
from negative_cache.layers.drift_corrector import DriftCorrector, build_corrector
from negative_cache.layers.tree_index import TreeIndex
from negative_cache.metrics import LatestValue
from negative_cache.ops.cache_rows import take_rows

if TYPE_CHECKING:
    from negative_cache.layers.retrieval import Retrieval

_DIMENSION = "embedding_dim"


class CachedNegatives(DrawnNegatives):
    """The filled rows of a cache as negatives of queries: one logit for all of them.

    What lasts from step to step is here: the cache, the state of the sampling, the metrics. What
    happens in a step is `step.CachedStep`.

    A subclass says which rows are no negatives of a query, what the rows weigh, and what of a batch
    is written.
    """

    is_cache = True
    _is_lost_in_folders = True
    # Whether draws are written back.
    write_back = True
    # "replicas" if the caches of all replicas are one pool.
    pool: str | None = None

    def __init__(
        self,
        *,
        num_draws: int | None,
        num_negatives: int | None,
        exact_query_gradient: bool,
        corrector: DriftCorrector | None,
        refresh_fraction: float,
        probe_size: int,
        probe_every: int,
        candidate_network: Callable[..., tf.Tensor] | None,
        seed: int | None,
        **kwargs: Any,
    ):
        super().__init__(seed=seed, **kwargs)
        self.num_draws, self.num_negatives = checks.check_draws(num_draws, num_negatives)
        self.exact_query_gradient = exact_query_gradient
        self.corrector = corrector
        if not 0.0 <= refresh_fraction <= 1.0:
            raise ValueError(f"`refresh_fraction` must be in [0, 1]. Received: {refresh_fraction}.")
        self.refresh_fraction = refresh_fraction
        self.probe_size = _validation.check_count(probe_size, "probe_size", at_least=0)
        self.probe_every = _validation.check_count(probe_every, "probe_every")
        if candidate_network is not None:
            checks.check_network(candidate_network)
        self.candidate_network = candidate_network
        self._cache: Cache | None = None

    def _make_state(self, use_lru: bool) -> None:
        """To be called once by a subclass, when it knows its rows."""
        checks.check_schedule(self, use_lru)
        if self.corrector is not None:
            host_keys = () if self._cache is None else self._cache.host_keys
            checks.check_corrector(self, host_keys)
        self._hold_draws()
        # Of strings, and of what is kept on the host, XLA knows nothing. Keras 3 asks before it
        # compiles by itself.
        is_apart = self._cache is not None and not self._cache.supports_jit
        is_apart |= any(is_on_host(spec.dtype) for spec in self.feature_specs.values())
        # Nor can it compile what TensorFlow's strategies send from replica to replica.
        is_apart |= self.pool is not None and tf.distribute.has_strategy()
        self.supports_jit = not is_apart and (self.index is None or self.index.supports_jit)
        # Kept, so that a refresh every few steps does not trace every time.
        self._untracked.reencode = tf.function(self._reencode, reduce_retracing=True)

    # What a subclass says.

    cache_size: int

    @property
    def index(self) -> TreeIndex | None:
        """The `TreeIndex` that negatives are drawn from, if one is."""
        raise NotImplementedError

    def left_out_ids(self, batch: Batch) -> tf.Tensor | None:
        """[B, P] int64, fingerprints of what is no negative of each query; None for nothing."""
        raise NotImplementedError

    def left_out_rows(self, ids: tf.Tensor) -> dict[str, tf.Tensor]:
        """The sampler's options that leave out `ids` [B, P], fingerprints."""
        raise NotImplementedError

    def ids_at(self, rows: tf.Tensor) -> tf.Tensor:
        """[n] int64, the fingerprints that `rows` [n] are left out by."""
        raise NotImplementedError

    def log_weights(self, batch: Batch) -> tf.Tensor | None:
        """[C] float32 that is added to the scores of the rows."""
        raise NotImplementedError

    def own_rows(self, batch: Batch) -> EncodedRows | None:
        """The batch's candidates as rows that are in the cache already, for the corrector."""
        raise NotImplementedError

    def write(self, batch: Batch, encoded: EncodedRows | None) -> None:
        """Ends the step of the cache: new candidates of a batch, and rows that were encoded."""
        raise NotImplementedError

    # The task, and the cache.

    def bind(self, task: Retrieval, prefix: str) -> None:
        super().bind(task, prefix)
        if self.candidate_network is task.candidate_network:
            self.candidate_network = None
        if self.has_own_tower:
            # Its weights must be there before an optimizer takes the model's. Keras may call a
            # layer built that is not.
            example = self._inputs(_features.example_of(self.feature_specs))
            _towers.Encoder(self._tower).output_dim(example)
        known_dims = [_towers.known_output_dim(self._tower)]
        if self._cache is not None:
            known_dims.append(self._cache.embeddings.shape[1])
        for dim in known_dims:
            if dim is not None:
                self.build_cache(dim)

    def make_metrics(self) -> None:
        prefix = self.log_prefix
        self._staleness = RunningMean(name=prefix + "staleness")
        self._log_partition = RunningMean(name=prefix + "log_partition")
        self._fill = LatestValue(name=prefix + "fill")
        self._skipped_rows = LatestValue(name=prefix + "skipped_rows")
        names = ["probe_staleness", "probe_corrected_staleness"]
        num_probes = 0 if not self.probe_size else 1 if self.corrector is None else 2
        self.probe_metrics = [LatestValue(name=prefix + name) for name in names[:num_probes]]

    @property
    def cache(self) -> Cache | None:
        """The `Cache`, or None while the embedding dimension is unknown: until the first call."""
        return self._cache

    def get_cache(self) -> Cache:
        """The `Cache`, when it is there.

        Raises:
          ValueError: if the embedding dimension is not known yet.
        """
        if self._cache is None:
            raise ValueError(
                "There is no cache yet: it is made when the embedding dimension is known, by the"
                " first call."
            )
        return self._cache

    @property
    def has_own_tower(self) -> bool:
        """Whether the rows are encoded by another tower than the task's."""
        return self.candidate_network is not None

    @property
    def _tower(self) -> Callable[..., tf.Tensor]:
        if self.candidate_network is not None:
            return self.candidate_network
        return super()._tower

    @property
    def training_metrics(self) -> Sequence[keras.metrics.Metric]:
        metrics = [self._staleness, self._log_partition, self._fill, self._skipped_rows]
        return [*metrics, *self.probe_metrics]

    def _build_corrector(self, embedding_dim: int) -> None:
        if self.corrector is not None:
            key = self.corrector.content_key
            content_dim = 0 if key is None else self.feature_specs[key].shape[0]
            build_corrector(self.corrector, embedding_dim, content_dim)

    def refresh(self, batch_size: int = 1024, *, verbose: int = 1) -> None:
        """Encodes all filled rows again, in inference mode; their ages begin again.

        Args:
          batch_size: rows encoded at a time.
          verbose: 1 for a progress bar, 0 for none.

        Raises:
          ValueError: if there is no cache yet, `batch_size` is not positive, or the cache has
            `use_lru=False`.
        """
        _validation.check_count(batch_size, "batch_size")
        if self._cache is None:
            raise ValueError("There is no cache to refresh, or none yet.")
        cache = self._cache
        if not cache.use_lru:
            raise ValueError(
                "A refresh makes rows young, and would change which are replaced first. Received:"
                " use_lru=False."
            )
        filled = np.flatnonzero(cache.filled_on_any_replica())
        bar = keras.utils.Progbar(len(filled), unit_name="candidate", verbose=verbose)
        for start in range(0, len(filled), batch_size):
            rows = filled[start : start + batch_size]
            self._untracked.reencode(tf.constant(rows, tf.int64))
            bar.add(len(rows))

    def encode(self, features: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """[n, d] float32, candidates encoded by the tower of the rows, and counted.

        Args:
          features: feature name -> [n, ...].
          training: whether the tower trains.
        """
        embeddings = super().encode(self._inputs(features), training)
        self.build_cache(embeddings.shape[1])
        self._count(tf.shape(embeddings)[0])
        return embeddings

    def _inputs(self, features: Mapping[str, tf.Tensor]) -> Any:
        return _features.as_given(features, self.takes_one_tensor)

    @property
    def pool_size(self) -> int:
        """The rows that each query has as negatives when all are filled; R C of a pool."""
        num_shards = tf.distribute.get_strategy().num_replicas_in_sync
        return self.cache_size * (1 if self.pool is None else num_shards)

    # A step.

    def logits(self, batch: Batch, training: bool) -> Contribution:
        if not training:
            log_partition = CachedStep(self, batch).log_partition()
            return Contribution(log_partition[:, tf.newaxis])
        if self.probe_size:
            probe(self, next_seed(self._state.sampling))
        outcome = CachedStep(self, batch).sampled_log_partition(next_seed(self._state.sampling))
        self._log_partition.update_state(
            outcome.log_partition, sample_weight=tf.cast(outcome.has_negatives, tf.float32)
        )
        self._staleness.update_state(
            outcome.staleness, sample_weight=tf.cast(outcome.is_drawn, tf.float32)
        )
        return Contribution(outcome.logit[:, tf.newaxis], outcome)

    def end_step(self, batch: Batch, contribution: Contribution) -> tf.Tensor | None:
        outcome: Outcome = contribution.pending
        encoded = outcome.drawn if self.write_back else None
        if outcome.oldest is not None:
            encoded = outcome.oldest if encoded is None else encoded.and_those(outcome.oldest)
        self.write(batch, encoded)
        self._fill.update_state(tf.cast(self.get_cache().num_filled, tf.float32) / self.cache_size)
        self._skipped_rows.update_state(self.get_cache().num_skipped)
        return outcome.drift_loss

    def make_shard(self, batch: Batch, correction: RowCorrection | None) -> Shard:
        """The rows that a step draws from."""
        check_replicas(self)
        is_pooled = self.pool is not None and util.num_replicas() > 1
        return (PooledShard if is_pooled else Shard)(self, batch, correction)

    def correction(self) -> RowCorrection | None:
        """The corrector as it is now, if there is one."""
        return None if self.corrector is None else RowCorrection(self.corrector, self.get_cache())

    def stale(self, rows: tf.Tensor) -> tf.Tensor:
        """[n, d] float32, the cached embeddings of `rows` [n], without gradient."""
        return tf.stop_gradient(tf.cast(tf.gather(self.get_cache().embeddings, rows), tf.float32))

    def features_at(self, rows: tf.Tensor) -> dict[str, tf.Tensor]:
        """The features [n, ...] of `rows` [n], as the tower takes them."""
        return {key: tf.gather(self.get_cache().data[key], rows) for key in self.feature_specs}

    def features_of(
        self, rows: tf.Tensor, are_there: tf.Tensor, batch: Batch, substitutes: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """`features_at(rows)` if they are there, else those of candidates of the batch."""
        return self.with_stand_ins(self.features_at(rows), are_there, batch, substitutes)

    def with_stand_ins(
        self,
        features: Mapping[str, tf.Tensor],
        are_there: tf.Tensor,
        batch: Batch,
        substitutes: tf.Tensor,
    ) -> dict[str, tf.Tensor]:
        """Features [n, ...], in which candidates of the batch stand in for those not there.

        An unfilled row's empty features might be outside of what the tower knows, and give NaN.
        """
        features = dict(features)
        if not self.knows_features_of(batch):
            return features
        known = self.features_in(batch)
        for key, values in features.items():
            mask = tf.reshape(are_there, [-1] + [1] * (values.shape.rank - 1))
            # A batch may be empty, and have no row to stand in.
            nothing = tf.zeros([1, *values.shape[1:]], values.dtype)
            stand_ins = take_rows(tf.concat([known[key], nothing], axis=0), substitutes)
            features[key] = tf.where(mask, values, stand_ins)
        return features

    def knows_features_of(self, batch: Batch) -> bool:
        """Whether rows are of what the batch's candidates are: they must be, by the same tower."""
        return not self.has_own_tower or all(
            _is_of(batch.features.get(key), spec) for key, spec in self.feature_specs.items()
        )

    def _reencode(self, rows: tf.Tensor) -> None:
        def rewrite(rows: tf.Tensor) -> None:
            self.get_cache().rewrite(rows, self.encode(self.features_at(rows)))

        def rewrite_filled(rows: tf.Tensor) -> None:
            # Another replica may have filled more rows than this one.
            cache = self.get_cache()
            some_row = tf.argmax(tf.cast(cache.filled, tf.float32))
            rows = tf.where(cache.is_filled(rows), rows, some_row)
            tf.cond(cache.num_filled > 0, lambda: rewrite(rows), lambda: None)

        num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
        on_every_replica(rewrite if num_replicas == 1 else rewrite_filled, rows)

    def _count(self, count: tf.Tensor | int) -> None:
        """Counts candidates that a replica has encoded or, outside of them, all have at once."""
        count_encoded(self._state.num_encoded, count)

    # Files.

    def save_own_variables(self, store: Any) -> None:
        """Writes the state into a Keras file; called by Keras."""
        super().save_own_variables(store)
        if self._cache is not None:
            store[_DIMENSION] = np.array([self._cache.embeddings.shape[1]])

    def load_own_variables(self, store: Any) -> None:
        """Reads the state from a Keras file; called by Keras before it reads that of the cache."""
        super().load_own_variables(store)
        if _DIMENSION in store:
            self.build_cache(int(np.asarray(store[_DIMENSION])[0]))

    def get_config(self) -> dict[str, Any]:
        serialize = keras.utils.serialize_keras_object
        return {
            **super().get_config(),
            "num_draws": self.num_draws,
            "num_negatives": self.num_negatives,
            "exact_query_gradient": self.exact_query_gradient,
            "corrector": serialize(self.corrector),
            "refresh_fraction": self.refresh_fraction,
            "probe_size": self.probe_size,
            "probe_every": self.probe_every,
            "candidate_network": serialize(self.candidate_network),
            "seed": self.seed,
        }


def own_network(config: Mapping[str, Any]) -> Callable[..., tf.Tensor] | None:
    """The `candidate_network` of a configuration; a task hands in one that sources share."""
    network = config["candidate_network"]
    return deserialize(network) if isinstance(network, Mapping) else network


def _is_of(values: tf.Tensor | None, spec: tf.io.FixedLenFeature) -> bool:
    """Whether values [n, ...] may be those of a feature with a spec."""
    if values is None:
        return False
    is_of_kind = _features.are_of_one_kind(values.dtype, tf.as_dtype(spec.dtype))
    return is_of_kind and values.shape[1:].is_compatible_with(spec.shape)


def count_encoded(counter: tf.Variable, count: tf.Tensor | int) -> None:
    """Adds to a counter, of a replica or, outside of the replicas, once for all of them."""
    count = tf.cast(tf.convert_to_tensor(count), tf.int64)

    def add_to_first() -> None:
        context = tf.distribute.get_replica_context()
        is_first = tf.equal(context.replica_id_in_sync_group, 0)
        counter.assign_add(tf.where(is_first, count, 0))

    if tf.distribute.in_cross_replica_context():
        on_every_replica(add_to_first)
    else:
        counter.assign_add(count)
