"""`CachedNegatives`: what a cache that streams and a cache of a corpus have in common as sources."""

from __future__ import annotations

import dataclasses
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from negative_cache import _features, _towers, _validation
from negative_cache._compat import kept_losses, keras
from negative_cache.layers._negatives import checks
from negative_cache.layers._negatives.base import Contribution, Negatives
from negative_cache.layers._negatives.batch import Batch
from negative_cache.layers._negatives.rows import EncodedRows, RowCorrection
from negative_cache.layers._negatives.samplers import sampler_of
from negative_cache.layers._state import StateLayer, next_seed, on_every_replica
from negative_cache.layers._variables import is_on_host, make_state_variable
from negative_cache.layers.cache import Cache
from negative_cache.layers.drift_corrector import DriftCorrector, build_corrector
from negative_cache.layers.tree_index import TreeIndex
from negative_cache.metrics import Latest, MeanIfAny
from negative_cache.ops import SoftmaxSample, _execution, contrastive
from negative_cache.ops.cache_rows import take_rows
from negative_cache.ops.landmarks import uniform_rows

if TYPE_CHECKING:
    from negative_cache.layers.retrieval import Retrieval

_DIMENSION = "embedding_dim"


@dataclasses.dataclass(frozen=True)
class _Pending:
    """What a training step has encoded: drawn rows, the oldest rows; and the corrector's loss."""

    drawn: EncodedRows
    oldest: EncodedRows | None
    drift_loss: tf.Tensor | None


class CachedNegatives(Negatives, StateLayer):
    """The filled rows of a cache as negatives of queries: one logit for all of them.

    With ĝ the cached embeddings and g those of now, the logit is the log partition

      log Z(x) = log Σ_y exp(score(x, ĝ(y)) + log_weight(y)),

    and its gradient is estimated from draws ŷ in proportion to exp(score(x, ĝ(ŷ)) + log_weight(ŷ)),
    which are encoded: it is that of their mean score(x, g(ŷ)), or with `exact_query_gradient` that
    of ⟨x, ∇_x log Z⟩ + mean of (score(x, g(ŷ)) - score(x, ĝ(ŷ))), with ∇_x log Z and ĝ constant
    (Lindgren et al., NeurIPS 2021).

    A cache with an index draws from that: the law is nearly the same, and log Z and its gradient
    are the index's estimates. With a corrector h, every ĝ above is h(ĝ).

    A subclass says which rows are no negatives of a query, what the rows weigh, and what of a batch
    is written.
    """

    encodes_candidates = True

    def __init__(
        self,
        *,
        num_negatives: int,
        exact_query_gradient: bool,
        corrector: DriftCorrector | None,
        refresh_fraction: float,
        probe_size: int,
        probe_every: int,
        candidate_network: Callable[..., tf.Tensor] | None,
        seed: int | None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.num_negatives = _validation.check_count(num_negatives, "num_negatives")
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
        self.seed = random.randrange(2**31) if seed is None else operator.index(seed)
        self._cache: Cache | None = None

    def _make_state(self, use_lru: bool) -> None:
        """To be called once by a subclass, when it knows its rows."""
        checks.check_schedule(self, use_lru)
        if self.corrector is not None:
            host_keys = () if self._cache is None else self._cache.host_keys
            checks.check_corrector(self, host_keys)
        # Whatever seed a training began with, it goes on with it from a file.
        seed_and_step = tf.constant([self.seed, 0], tf.int64)
        self._hold_state(
            description={},
            sampling=make_state_variable(lambda: seed_and_step, "sampling"),
            num_encoded=make_state_variable(lambda: tf.zeros([], tf.int64), "num_encoded"),
        )
        # Of strings, and of what is kept on the host, XLA knows nothing. Keras 3 asks before it
        # compiles by itself.
        is_apart = self._cache is not None and not self._cache.supports_jit
        is_apart |= any(is_on_host(spec.dtype) for spec in self.feature_specs.values())
        self.supports_jit = not is_apart and (self.index is None or self.index.supports_jit)
        # Kept, so that a refresh every few steps does not trace every time.
        self._untracked.reencode = tf.function(self._reencode, reduce_retracing=True)

    # What a subclass says.

    cache_size: int
    # Feature name -> spec, of what the rows were encoded from; under a fixed name if that is one
    # tensor and no dictionary.
    feature_specs: Mapping[str, tf.io.FixedLenFeature]
    takes_one_tensor: bool

    @property
    def index(self) -> TreeIndex | None:
        """The `TreeIndex` that negatives are drawn from, if one is."""
        raise NotImplementedError

    def _left_out(self, batch: Batch) -> dict[str, tf.Tensor]:
        """The sampler's options `candidate_ids` and `positive_ids`, if rows are left out by id."""
        raise NotImplementedError

    def _log_weights(self, batch: Batch) -> tf.Tensor | None:
        """[C] float32 that is added to the scores of the rows."""
        raise NotImplementedError

    def _own_rows(self, batch: Batch) -> EncodedRows | None:
        """The batch's candidates as rows that are in the cache already, for the corrector."""
        raise NotImplementedError

    def _write(self, batch: Batch, encoded: EncodedRows | None) -> None:
        """Ends the step of the cache: new candidates of a batch, and rows that were encoded."""
        raise NotImplementedError

    # The task, and the cache.

    def bind(self, task: Retrieval, log_prefix: str) -> None:
        super().bind(task, log_prefix)
        prefix = self._bound.prefix
        self._staleness = MeanIfAny(name=prefix + "staleness")
        self._log_partition = MeanIfAny(name=prefix + "log_partition")
        self._fill = Latest(name=prefix + "fill")
        self._skipped_rows = Latest(name=prefix + "skipped_rows")
        names = ["probe_staleness", "probe_corrected_staleness"]
        num_probes = 0 if not self.probe_size else 1 if self.corrector is None else 2
        self._probe_metrics = [Latest(name=prefix + name) for name in names[:num_probes]]
        known_dims = [_towers.known_output_dim(self._tower)]
        if self._cache is not None:
            known_dims.append(self._cache.embeddings.shape[1])
        for dim in known_dims:
            if dim is not None:
                self.build_cache(dim)

    @property
    def cache(self) -> Cache | None:
        """The `Cache`, or None while the embedding dimension is unknown: until the first call."""
        return self._cache

    @property
    def has_own_tower(self) -> bool:
        """Whether the rows are encoded by another tower than the task's."""
        return self.candidate_network is not None

    @property
    def _tower(self) -> Callable[..., tf.Tensor]:
        return self.candidate_network if self.has_own_tower else self.get_task().candidate_network

    @property
    def num_encoded(self) -> tf.Tensor:
        return tf.convert_to_tensor(self._state.num_encoded)

    @property
    def training_metrics(self) -> Sequence[keras.metrics.Metric]:
        metrics = [self._staleness, self._log_partition, self._fill, self._skipped_rows]
        return [*metrics, *self._probe_metrics]

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
        if not self._cache.use_lru:
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

    def encode(self, features: Mapping[str, tf.Tensor], training: bool = False) -> tf.Tensor:
        """[n, d] float32, candidates encoded by the tower of the rows, and counted.

        Args:
          features: feature name -> [n, ...].
          training: whether the tower trains.
        """
        inputs = features[_features.ONE_FEATURE] if self.takes_one_tensor else features
        # What the tower adds to the loss counts for the batch's own encoding, which is not here.
        with kept_losses(self._tower):
            embeddings = _towers.embed(self._tower, inputs, training)
        self.build_cache(embeddings.shape[1])
        self._count(tf.shape(embeddings)[0])
        return tf.cast(embeddings, tf.float32)

    # A step.

    def logits(self, batch: Batch, training: bool) -> Contribution:
        if not training:
            sample, _ = self._draw(batch, self._correction(), seed=0, compute_gradient=False)
            return Contribution(sample.log_partition[:, tf.newaxis])
        self._probe()
        seed = next_seed(self._state.sampling)
        exact = self.exact_query_gradient
        correction = self._correction()
        sample, query_gradient = self._draw(batch, correction, seed, compute_gradient=exact)
        self._report(sample)
        drawn = self._encode_drawn(sample, batch)
        stale = self._stale(drawn.rows)
        self._staleness.update_state(
            contrastive.relative_staleness(stale, drawn.embeddings),
            sample_weight=tf.cast(drawn.mask, tf.float32),
        )
        surrogate = batch.scores.mean_of_draws(
            batch.queries, drawn.embeddings, drawn.mask, self.num_negatives
        )
        if exact:
            surrogate += tf.reduce_sum(batch.queries * query_gradient, axis=1)
            known = stale if correction is None else correction.correct(stale, drawn.rows)
            # What the transform learns has its gradient from the draws alone, as they were drawn.
            surrogate -= batch.scores.mean_of_draws(
                batch.queries, known, drawn.mask, self.num_negatives, as_given=True
            )
        logit = contrastive.value_with_gradient(sample.log_partition, surrogate)
        drawn = EncodedRows(drawn.rows, tf.stop_gradient(drawn.embeddings), drawn.mask)
        oldest = self._encode_oldest(batch)
        drift_loss = None
        if correction is not None:
            drift_loss = self._learn(correction, batch, drawn, oldest, seed)
        return Contribution(logit[:, tf.newaxis], _Pending(drawn, oldest, drift_loss))

    def end_step(self, batch: Batch, contribution: Contribution) -> tf.Tensor | None:
        pending = contribution.pending
        encoded = pending.drawn if self.write_back else None
        if pending.oldest is not None:
            encoded = pending.oldest if encoded is None else encoded.and_those(pending.oldest)
        self._write(batch, encoded)
        self._fill.update_state(tf.cast(self._cache.num_filled, tf.float32) / self.cache_size)
        self._skipped_rows.update_state(self._cache.num_skipped)
        return pending.drift_loss

    @property
    def write_back(self) -> bool:
        """Whether draws are written back."""
        return True

    def staleness_of(self, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """[n] staleness of filled `rows` [n], as they are and as corrected, by encoding them."""
        fresh = self.encode(self._features_at(rows))
        stale = known = self._stale(rows)
        correction = self._correction()
        if correction is not None:
            known = correction.correct(stale, rows)
        before, after = (contrastive.relative_staleness(part, fresh) for part in (stale, known))
        return before, after

    def _correction(self) -> RowCorrection | None:
        if self.corrector is None or self._cache is None:
            return None
        return RowCorrection(self.corrector, self._cache)

    def _draw(
        self,
        batch: Batch,
        correction: RowCorrection | None,
        seed: tf.Tensor | int,
        compute_gradient: bool,
    ) -> tuple[SoftmaxSample, tf.Tensor | None]:
        """Draws S rows a query; if `compute_gradient`, [B, d] ∇_x log Z comes with them."""
        options = {
            "score_transform": batch.scores.transform,
            "row_transform": None if correction is None else correction.correct,
            "max_scores": batch.max_scores,
            "seed": seed,
            "compute_gradient": compute_gradient,
            "log_zero": contrastive.NOT_A_CANDIDATE,
            **self._left_out(batch),
        }
        log_weights = self._log_weights(batch)
        if log_weights is not None:
            options["log_weights"] = log_weights
        sampler = sampler_of(self._cache)
        return sampler.sample_with_gradient(batch.queries, self.num_negatives, **options)

    def _report(self, sample: SoftmaxSample) -> None:
        is_some = tf.math.is_finite(sample.log_partition)
        is_some &= sample.log_partition > 0.5 * contrastive.NOT_A_CANDIDATE
        self._log_partition.update_state(
            tf.where(is_some, sample.log_partition, 0.0), tf.cast(is_some, tf.float32)
        )

    def _encode_drawn(self, sample: SoftmaxSample, batch: Batch) -> EncodedRows:
        is_drawn = tf.reshape(sample.indices >= 0, [-1])
        rows = tf.reshape(tf.maximum(sample.indices, 0), [-1])
        # A query without an admissible row has its own positive encoded instead.
        own = tf.range(tf.size(rows)) // self.num_negatives
        fresh = self.encode(self._features_of(rows, is_drawn, batch, own), training=True)
        return EncodedRows(rows, fresh, is_drawn)

    def _encode_oldest(self, batch: Batch) -> EncodedRows | None:
        """The oldest rows, encoded; None if no rows are refreshed in turn.

        ρC rows at each step, rounded; if that is less than a half, one every 1 / ρC steps.
        """
        per_step = self.refresh_fraction * self._cache.cache_size
        if not per_step:
            return None
        count = max(round(per_step), 1)
        rows = self._cache.oldest(count)
        filled = self._cache.is_filled(rows)

        def encode():
            own = tf.zeros_like(rows)
            features = self._features_of(rows, filled, batch, own)
            return tf.stop_gradient(self.encode(features))

        if per_step >= 0.5:
            return EncodedRows(rows, encode(), filled)
        is_due = tf.equal(self._cache.step % round(1.0 / per_step), 0)
        dim = self._cache.embeddings.shape[1]
        embeddings = tf.cond(is_due, encode, lambda: tf.zeros([count, dim]))
        return EncodedRows(rows, embeddings, filled & is_due)

    def _learn(
        self,
        correction: RowCorrection,
        batch: Batch,
        drawn: EncodedRows,
        oldest: EncodedRows | None,
        seed: tf.Tensor,
    ) -> tf.Tensor | None:
        """Lets the corrector learn from all rows that were encoded; its loss."""
        examples = drawn
        own = self._own_rows(batch)
        if own is not None:
            examples = examples.and_those(own)
        if oldest is not None:
            examples = examples.and_those(oldest)
        examples = examples.finite()
        self._learn_landmarks(correction, batch, seed)
        return _execution.compiled(
            lambda encoded: self.corrector.learn(
                encoded,
                correction.displacement,
                lambda embeddings: batch.scores.of_all_pairs_as_given(batch.queries, embeddings),
            ),
            correction.examples(examples, self._stale(examples.rows)),
            like=self.corrector.state_variable,
        )

    def _learn_landmarks(self, correction: RowCorrection, batch: Batch, seed: tf.Tensor) -> None:
        """Encodes the rows that the corrector asks for, if it asks for some."""
        asked = self.corrector.rows_to_encode(self._cache.embeddings, self._cache.filled, seed)
        if asked is None:
            return
        rows, are_there = asked
        are_there &= self._cache.is_filled(rows)
        features = self._features_of(rows, are_there, batch, tf.zeros_like(rows))
        fresh = tf.stop_gradient(self.encode(features))
        are_there &= tf.reduce_all(tf.math.is_finite(fresh), axis=1)
        landmarks = EncodedRows(rows, fresh, are_there)
        _execution.compiled(
            self.corrector.learn_landmarks,
            correction.examples(landmarks, self._stale(rows)),
            like=self.corrector.state_variable,
        )

    def _probe(self) -> None:
        """Measures the staleness of some rows, if it is time to."""
        if not self.probe_size:
            return
        seed = next_seed(self._state.sampling)
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
                for part, old in zip(self.staleness_of(rows), before)
            )

        is_due = is_filled & tf.equal((self._cache.step + 1) % self.probe_every, 0)
        values = tf.cond(is_due, measure, lambda: before)
        for metric, value in zip(self._probe_metrics, values):
            metric.update_state(value)

    def _stale(self, rows: tf.Tensor) -> tf.Tensor:
        return tf.stop_gradient(tf.cast(tf.gather(self._cache.embeddings, rows), tf.float32))

    def _features_at(self, rows: tf.Tensor) -> dict[str, tf.Tensor]:
        """The features [n, ...] of `rows` [n], as the tower takes them."""
        return {key: tf.gather(self._cache.data[key], rows) for key in self.feature_specs}

    def _features_of(
        self, rows: tf.Tensor, is_there: tf.Tensor, batch: Batch, substitutes: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """`_features_at(rows)` if `is_there`, else those of the batch's candidates `substitutes`.

        An unfilled row's empty features might be outside of what the tower knows, and give NaN.
        """
        features, known = self._features_at(rows), self._features_in(batch)
        if known is None:
            return features
        for key, values in features.items():
            mask = tf.reshape(is_there, [-1] + [1] * (values.shape.rank - 1))
            # A batch may be empty, and have no row to stand in.
            nothing = tf.zeros([1, *values.shape[1:]], values.dtype)
            stand_ins = take_rows(tf.concat([known[key], nothing], axis=0), substitutes)
            features[key] = tf.where(mask, values, stand_ins)
        return features

    def _features_in(self, batch: Batch) -> dict[str, tf.Tensor] | None:
        """The batch's features that the cache has; None if the cache is of other things."""
        found = {key: batch.features[key] for key in self.feature_specs if key in batch.features}
        if self.has_own_tower and len(found) < len(self.feature_specs):
            return None
        return _validation.check_items(
            found, self.feature_specs, what="candidate_features", exact=True
        )

    def _reencode(self, rows: tf.Tensor) -> None:
        def rewrite(rows):
            self._cache.rewrite(rows, self.encode(self._features_at(rows)))

        on_every_replica(rewrite, rows)

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
            "num_negatives": self.num_negatives,
            "exact_query_gradient": self.exact_query_gradient,
            "corrector": serialize(self.corrector),
            "refresh_fraction": self.refresh_fraction,
            "probe_size": self.probe_size,
            "probe_every": self.probe_every,
            "candidate_network": serialize(self.candidate_network),
            "seed": self.seed,
        }


def count_encoded(counter: tf.Variable, count: tf.Tensor | int) -> None:
    """Adds to a counter, of a replica or, outside of the replicas, once for all of them."""
    count = tf.cast(tf.convert_to_tensor(count), tf.int64)

    def add_to_first():
        context = tf.distribute.get_replica_context()
        is_first = tf.equal(context.replica_id_in_sync_group, 0)
        counter.assign_add(tf.where(is_first, count, 0))

    if tf.distribute.in_cross_replica_context():
        on_every_replica(add_to_first)
    else:
        counter.assign_add(count)
