"""A layer that has a candidate tower and a cache of what it encodes."""

import re
from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import RunningMean, kept_losses, keras
from negative_cache.layers import _cached_negatives, _networks, _retrieval_checks
from negative_cache.layers._corpus import ONE_FEATURE, Corpus
from negative_cache.layers._state import StateLayer, next_seed, on_every_replica
from negative_cache.layers._variables import is_on_host, make_state_variable
from negative_cache.layers.cache import Cache
from negative_cache.layers.drift_corrector import build_corrector
from negative_cache.layers.tree_index import TreeIndex
from negative_cache.metrics import Latest
from negative_cache.ops.landmarks import uniform_rows

_DIMENSION = "embedding_dim"


class CachingLayer(StateLayer):
    """The side of `CachedRetrieval` that is about the cache and not about the loss.

    A subclass has the arguments of `CachedRetrieval` as attributes, then calls
    `_make_cache_state`, and in a training step `_negatives().sampled_log_partition`,
    `_update_cache` and `_end_step`.
    """

    _is_lost_in_folders = True

    def _make_cache_state(
        self, cache: Cache | None, index: TreeIndex | None, embedding_dim: int | None
    ) -> None:
        # Whatever seed a training began with, it goes on with it from a file.
        seed_and_step = tf.constant([self.seed, 0], tf.int64)
        self._hold_state(
            # A cache holds fingerprints of this feature.
            description={"candidate_id_key": self.candidate_id_key},
            sampling=make_state_variable(lambda: seed_and_step, "sampling"),
            total_encoded=make_state_variable(lambda: tf.zeros([], tf.int64), "total_encoded"),
        )
        if self.cache_size:
            prefix = _log_prefix(self)
            self._staleness = RunningMean(name=prefix + "staleness")
            self._log_partition = RunningMean(name=prefix + "log_partition")
            self._fill = Latest(name=prefix + "fill")
            self._skipped_rows = Latest(name=prefix + "skipped_rows")
            self._encoded = Latest(name=prefix + "candidates_encoded")
            names = ["probe_staleness", "probe_corrected_staleness"]
            num_probes = 0 if not self.probe_size else 1 if self.corrector is None else 2
            self._probe_metrics = [Latest(name=prefix + name) for name in names[:num_probes]]
        self._cache = cache
        if cache is not None:
            self._count(cache.num_filled)
        # Of strings, and of what is kept on the host, XLA knows nothing. Keras 3 asks before it
        # compiles by itself.
        is_apart = cache is not None and not cache.supports_jit
        is_apart |= any(is_on_host(spec.dtype) for spec in self.feature_specs.values())
        self.supports_jit = not is_apart and (index is None or index.supports_jit)
        self.built = True
        # The cache's, once there is one: Keras is to find it there only.
        self._untracked.index = index
        # Kept, so that a refresh every few steps does not trace every time.
        self._untracked.reencode = tf.function(self._reencode, reduce_retracing=True)
        if index is not None:
            embedding_dim = index.embedding_dim
        known_dim = _networks.known_output_dim(self.candidate_network)
        if cache is not None and known_dim is not None:
            self.build_cache(known_dim)
        if embedding_dim or known_dim:
            self.build_cache(embedding_dim or known_dim)

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
        metrics = [self._staleness, self._log_partition, self._fill, self._skipped_rows]
        return [*metrics, self._encoded, *self._probe_metrics]

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
        if self._cache is not None and self._cache.row_key is not None:
            raise ValueError("A cache that covers a corpus is filled by `fill_cache`.")
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
        if self.corrector is not None:
            key = self.corrector.content_key
            content_dim = 0 if key is None else self.feature_specs[key].shape[0]
            build_corrector(self.corrector, embedding_dim, content_dim)

    def fill_cache(self, candidates: Iterable, *, verbose: int = 1) -> None:
        """Encodes a corpus into the `cache` that covers it, whatever it held.

        Args:
          candidates: batches of candidate features, in the order of the rows.
          verbose: 1 for a progress bar, 0 for none.

        Raises:
          ValueError: as `Cache.from_dataset`, and where the cache does not cover a corpus.
        """
        if self._cache is None or self._cache.row_key is None:
            raise ValueError(
                "`fill_cache` is for a task with a `cache` that covers a corpus; others are filled"
                " by `add_to_cache`."
            )
        specs = self.feature_specs[ONE_FEATURE] if self._takes_one_tensor else self.feature_specs
        corpus = Corpus(candidates, self.candidate_network, specs, self.candidate_id_key)
        self._cache.fill(corpus.items(), verbose=verbose)
        self._count(self._cache.num_filled)

    def refresh_cache(self, batch_size: int = 1024, verbose: int = 1) -> None:
        """Encodes all filled rows anew, in inference mode; their ages begin again.

        Args:
          batch_size: rows encoded at a time.
          verbose: 1 for a progress bar, 0 for none.

        Raises:
          ValueError: where there is no cache, `batch_size` is not positive, or `use_lru` is False.
        """
        _validation.check_count(batch_size, "batch_size")
        if not self.cache_size or self._cache is None:
            raise ValueError("There is no cache to refresh, or none yet.")
        if not self.use_lru:
            raise ValueError(
                "A refresh makes rows young, and would change which are replaced first. Received:"
                " use_lru=False."
            )
        filled = np.flatnonzero(self._cache.filled.numpy())
        bar = keras.utils.Progbar(len(filled), unit_name="candidate", verbose=verbose)
        for start in range(0, len(filled), batch_size):
            rows = filled[start : start + batch_size]
            self._untracked.reencode(tf.constant(rows, tf.int64))
            bar.add(len(rows))

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

    def _negatives(self):
        """The cache as negatives; not kept, so that Keras finds its parts as attributes only."""
        return _cached_negatives.CachedNegatives(
            self._cache,
            encode=self._encode,
            scores=self._scores,
            metrics=_cached_negatives.CacheMetrics(*self.training_metrics[:4]),
            num_draws=self.num_negatives,
            exact_query_gradient=self.exact_query_gradient,
            schedule=_cached_negatives.Schedule(self.write_back, self.refresh_fraction),
            corrector=self.corrector,
        )

    def _update_cache(self, items, updates):
        self._negatives().update(items, updates)

    def _reencode(self, rows):
        on_every_replica(self._negatives().reencode, rows)

    def _count(self, count):
        """Counts candidates that a replica has encoded or, outside of them, all have at once."""
        count = tf.cast(tf.convert_to_tensor(count), tf.int64)

        def add_to_first():
            context = tf.distribute.get_replica_context()
            is_first = tf.equal(context.replica_id_in_sync_group, 0)
            self._state.total_encoded.assign_add(tf.where(is_first, count, 0))

        if tf.distribute.in_cross_replica_context():
            on_every_replica(add_to_first)
        else:
            self._state.total_encoded.assign_add(count)

    def _probe(self):
        """Measures the staleness of some rows, where it is time to."""
        if not self.probe_size:
            return
        seed = self._next_seed()
        is_filled = self._cache.num_filled >= self.probe_size

        before = tuple(metric.result() for metric in self._probe_metrics)
        before += (0.0,) * (2 - len(before))

        def measure():
            rows = uniform_rows(self._cache.filled, self.probe_size, seed)
            # Rows written by the step before say nothing of those that wait.
            weight = tf.cast(tf.gather(self._cache.age, rows) > 0, tf.float32)
            total = tf.reduce_sum(weight)
            return tuple(
                tf.where(
                    total > 0.0, tf.math.divide_no_nan(tf.reduce_sum(weight * part), total), old
                )
                for part, old in zip(self._negatives().staleness(rows), before)
            )

        is_due = is_filled & tf.equal((self._cache.step + 1) % self.probe_every, 0)
        values = tf.cond(is_due, measure, lambda: before)
        for metric, value in zip(self._probe_metrics, values):
            metric.update_state(value)

    def _end_step(self, count):
        """Counts the `count` candidates of a batch, which the layer has not encoded itself."""
        self._count(count)
        num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
        self._encoded.update_state(self._state.total_encoded * num_replicas)

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
        inputs = features[ONE_FEATURE] if self._takes_one_tensor else features
        # What the tower adds to the loss counts for the batch's own encoding, which is not here.
        with kept_losses(self.candidate_network):
            embeddings = _networks.embed(self.candidate_network, inputs, training)
        self.build_cache(embeddings.shape[1])
        if self.cache_size:
            self._count(tf.shape(embeddings)[0])
        return tf.cast(embeddings, tf.float32)

    def _next_seed(self):
        """[2] int64, another one at every step and on every replica."""
        return next_seed(self._state.sampling)

    def _check_features(self, features):
        if self._takes_one_tensor and not isinstance(features, Mapping):
            features = {ONE_FEATURE: features}
        return _validation.check_items(
            features, self.feature_specs, what="candidate_features", exact=True
        )


def _log_prefix(layer: keras.layers.Layer) -> str:
    """What tells the logs of a task that has been given a name from those of others."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(layer).__name__).lower()
    is_automatic = re.fullmatch(rf"{re.escape(words)}(_\d+)?", layer.name)
    return "" if is_automatic else f"{layer.name}_"
