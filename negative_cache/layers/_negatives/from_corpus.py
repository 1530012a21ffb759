"""`FromCorpus`: negatives out of a cache that holds a whole corpus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from negative_cache import _features, util
from negative_cache._compat import deserialize, keras
from negative_cache.layers._corpus import EMBEDDING, Corpus
from negative_cache.layers._negatives import checks
from negative_cache.layers._negatives.batch import Batch
from negative_cache.layers._negatives.cached import CachedNegatives, own_network
from negative_cache.layers._negatives.from_cache import as_updates
from negative_cache.layers._negatives.pool import gather_rows
from negative_cache.layers._negatives.rows import EncodedRows
from negative_cache.layers._state import describe_specs, specs_of
from negative_cache.layers._variables import by_replica
from negative_cache.layers.cache import Cache
from negative_cache.layers.drift_corrector import DriftCorrector
from negative_cache.layers.tree_index import TreeIndex

if TYPE_CHECKING:
    from negative_cache.layers._negatives.base import Contribution
    from negative_cache.layers.retrieval import Retrieval


@keras.utils.register_keras_serializable("negative_cache")
class FromCorpus(CachedNegatives):
    """Every candidate of a corpus is a negative, but the positive: one logit for all of them.

    As with `FromCache`, but each candidate stands in one row from the first step on. A query's
    positive is left out by its row, and the batch's candidates, which are encoded anyway, are
    written to their rows. What is stale are the rows that neither draws nor positives come to:
    `refresh_fraction` encodes them in turn, the callback `CacheRefresh` all at once, and a
    `corrector` estimates where they are without encoding them.

    Under a `tf.distribute` strategy every replica holds the whole corpus, or with a cache that is
    `sharded` its own part of it. Then every query has the rows of all replicas as negatives.

    Every candidate is there once, so that there are no corrections for popularity. `InBatch` beside
    it counts the batch's candidates twice, as themselves and as their rows.

    Args:
      cache: a cache that covers a corpus, as `Cache.from_dataset` makes it.
      write_back: whether draws and the batch's candidates are written. False leaves rows as they
        are but for refreshes: a cache that is stale on purpose, as baselines have it.
      num_negatives: see `FromCache`.
      num_draws: see `FromCache`.
      exact_query_gradient: see `FromCache`.
      corrector: see `FromCache`.
      refresh_fraction: see `FromCache`.
      probe_size: see `FromCache`.
      probe_every: see `FromCache`.
      feature_specs: what the tower takes, if the corpus has one feature that is called "candidate"
        and the tower takes a dictionary all the same.
      candidate_network: the tower of the corpus, if that is not the task's. The batch's candidates
        are then no rows of it: none is written, and positives are left out if they have the
        feature that is the cache's `row_key`.
      seed: see `FromCache`.
      **kwargs: of the layer; see `Negatives`.

    Raises:
      ValueError: if an argument is out of range or does not go with the cache.

    Examples:
      >>> cache = Cache.from_dataset(candidates.batch(1024), tower, candidate_id_key="title")
      >>> source = FromCorpus(cache, refresh_fraction=0.001)
      >>> task = Retrieval(tower, [source], candidate_id_key="title", remove_accidental_hits=True)
    """

    def __init__(
        self,
        cache: Cache,
        *,
        write_back: bool = True,
        num_negatives: int | None = None,
        num_draws: int | None = None,
        exact_query_gradient: bool = True,
        corrector: DriftCorrector | None = None,
        refresh_fraction: float = 0.0,
        probe_size: int = 0,
        probe_every: int = 100,
        feature_specs: Mapping[str, tf.io.FixedLenFeature] | tf.io.FixedLenFeature | None = None,
        candidate_network: Callable[..., tf.Tensor] | None = None,
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
        feature_specs = checks.check_corpus(cache, feature_specs)
        self.write_back = write_back
        self.takes_one_tensor = not isinstance(feature_specs, Mapping)
        self.feature_specs = dict(_features.as_dict(feature_specs))
        self.cache_size = cache.cache_size
        self._cache = cache
        self._row_key = str(cache.row_key)
        self.pool = "replicas" if cache.sharded else None
        self._make_state(cache.use_lru)
        self._count(self._num_filled())

    @property
    def index(self) -> TreeIndex | None:
        return self.get_cache().index

    def bind(self, task: Retrieval, prefix: str) -> None:
        if task.frequency is not None:
            raise ValueError(
                "There is no `frequency_correction` with a `cache` of a corpus: it holds every"
                " candidate once."
            )
        super().bind(task, prefix)
        if not self.has_own_tower and task.candidate_id_key != self._row_key:
            raise ValueError(
                "The `candidate_id_key` of a task must be that of its corpus. Received:"
                f" {task.candidate_id_key!r}. Wanted: {self._row_key!r}."
            )

    def build_cache(self, embedding_dim: int) -> None:
        """Checks the dimension of the cache.

        Raises:
          ValueError: if the cache holds embeddings of another dimension.
        """
        checks.check_dimension(embedding_dim, self.get_cache().embeddings)
        self._build_corrector(embedding_dim)

    def fill(self, candidates: Iterable, *, verbose: int = 1) -> None:
        """Encodes the corpus into the cache, whatever it held.

        Args:
          candidates: batches of candidate features, in the order of the rows.
          verbose: 1 for a progress bar, 0 for none.

        Raises:
          ValueError: as `Cache.from_dataset`.
        """
        specs = self._plain_specs()
        corpus = Corpus(candidates, self._tower, specs, self._row_key)
        self.get_cache().fill(corpus.items(), verbose=verbose)
        self._count(self._num_filled())

    def logits(self, batch: Batch, training: bool) -> Contribution:
        if batch.log_q is not None:
            raise ValueError(
                "There is no `candidate_sampling_probability` with a `cache` that covers a corpus:"
                " it holds every candidate once."
            )
        return super().logits(batch, training)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "cache": keras.utils.serialize_keras_object(self._cache),
            "write_back": self.write_back,
            "feature_specs": describe_specs(self._plain_specs()),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FromCorpus:
        return cls(
            **{
                **config,
                "cache": deserialize(config["cache"]),
                "feature_specs": specs_of(config["feature_specs"]),
                "corrector": deserialize(config["corrector"]),
                "candidate_network": own_network(config),
            }
        )

    def _plain_specs(self) -> Mapping[str, tf.io.FixedLenFeature] | tf.io.FixedLenFeature:
        return _features.as_given(self.feature_specs, self.takes_one_tensor)

    def left_out_ids(self, batch: Batch) -> tf.Tensor | None:
        row_key = self._row_key
        own = batch.features.get(row_key)
        if own is None or own.shape.rank != 1:
            # By a tower of its own, the corpus may hold other things than the batch.
            return None
        wanted = tf.as_dtype(self.feature_specs[row_key].dtype)
        if not _features.are_of_one_kind(own.dtype, wanted):
            raise ValueError(
                f"The feature {row_key!r} identifies the rows of a corpus, where it is"
                f" {wanted.name}, and must not be something else in a batch. Received dtype:"
                f" {own.dtype.name}."
            )
        ids = batch.left_out_ids if row_key == self.get_task().candidate_id_key else None
        if ids is None:
            ids = _features.fingerprint(own[: batch.num_queries])[:, tf.newaxis]
        return ids

    def left_out_rows(self, ids: tf.Tensor) -> dict[str, tf.Tensor]:
        # A fingerprint is its own.
        rows = self.get_cache().rows_of(tf.reshape(ids, [-1]))
        return {"positive_ids": tf.reshape(rows, tf.shape(ids))}

    def ids_at(self, rows: tf.Tensor) -> tf.Tensor:
        return _features.fingerprint(tf.gather(self.get_cache().data[self._row_key], rows))

    def log_weights(self, batch: Batch) -> tf.Tensor | None:
        del batch
        return None

    def own_rows(self, batch: Batch) -> EncodedRows | None:
        if self.has_own_tower:
            return None
        rows = self.get_cache().rows_of(batch.features[self._row_key])
        is_known = (rows >= 0) & self.get_cache().is_filled(tf.maximum(rows, 0))
        return EncodedRows(tf.maximum(rows, 0), batch.candidates, is_known)

    def write(self, batch: Batch, encoded: EncodedRows | None) -> None:
        if self.has_own_tower:
            # Nothing of the batch is a row.
            self._update(encoded)
            return
        if self.pool is not None and util.num_replicas() > 1:
            self._write_to_shards(batch, encoded)
            return
        items = {**self.features_in(batch), EMBEDDING: batch.candidates}
        mask = None if self.write_back else tf.zeros([batch.num_candidates], tf.bool)
        self.get_cache().update(new_items=items, new_items_mask=mask, **as_updates(encoded))

    def _write_to_shards(self, batch: Batch, encoded: EncodedRows | None) -> None:
        """`write`, if the batch's candidates are rows of other replicas too."""
        cache, features = self.get_cache(), self.features_in(batch)
        if not self.write_back:
            self._update(encoded)
            return
        ids = _features.fingerprint(batch.features[self._row_key])
        replica = tf.fill(tf.shape(ids), util.replica_id())
        ids, replicas, embeddings = gather_rows([ids, replica, batch.candidates])
        rows = cache.rows_of(ids)
        is_here = rows >= 0
        # What is on no replica.
        is_unknown = tf.equal(util.cross_replica_sum(tf.cast(is_here, tf.int32)), 0)
        cache.count_skipped(is_unknown & tf.equal(replicas, util.replica_id()))
        items = {key: util.cross_replica_concat(features[key], axis=0) for key in features}
        items[EMBEDDING] = embeddings
        cache.update(new_items=items, new_items_mask=is_here, **as_updates(encoded))

    def _num_filled(self) -> tf.Tensor:
        """Scalar int64, the rows that hold a candidate, of all shards in this process."""
        num_filled = self.get_cache().num_filled
        parts = by_replica(num_filled) if self.pool is not None else [num_filled]
        return tf.add_n([tf.convert_to_tensor(part) for part in parts])

    def _update(self, encoded: EncodedRows | None) -> None:
        """Ends the step of the cache with no new candidates."""
        items = _features.example_of(self.get_cache().specs, num_rows=0)
        self.get_cache().update(new_items=items, **as_updates(encoded))
