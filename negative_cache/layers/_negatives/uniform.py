"""`Uniform`: fresh negatives, drawn uniformly from a corpus or from a memory of the stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from negative_cache import _features, _validation
from negative_cache._compat import keras
from negative_cache._features import fingerprint
from negative_cache.layers._cache.rows import CacheRows
from negative_cache.layers._dividing import State, copies, deal, divided_rows
from negative_cache.layers._negatives import checks
from negative_cache.layers._negatives.base import Contribution
from negative_cache.layers._negatives.batch import Batch
from negative_cache.layers._negatives.cached import count_encoded
from negative_cache.layers._negatives.drawn import DrawnNegatives
from negative_cache.layers._negatives.rows import LOG_PROBABILITY
from negative_cache.layers._state import (
    StateLayer,
    describe_specs,
    next_seed,
    on_every_replica,
    specs_of,
)
from negative_cache.layers._variables import (
    StateVariable,
    by_replica,
    is_on_host,
    make_state_variable,
    scatter_rows,
)
from negative_cache.ops import contrastive
from negative_cache.ops._block_scorer import is_among
from negative_cache.ops.cache_rows import take_rows

if TYPE_CHECKING:
    from negative_cache.layers.retrieval import Retrieval


@keras.utils.register_keras_serializable("negative_cache")
class Uniform(DrawnNegatives):
    """Candidates drawn uniformly are negatives of all queries, with exact gradient.

    n candidates y₁ … y_n are drawn at each training step, encoded by the tower of now, and compared
    with every query. Nothing is stale, and nothing depends on the scores: it is the cheap baseline
    that a cache must beat, and goes well beside one, whose draws are hard. The draws of a step are
    distinct, and each is uniform (`draw_evenly`). They come from one of two places:

    * A corpus: `candidates`. It is read once, and its features are kept.
    * The stream, if the corpus is unknown: `feature_specs` and `memory_size`. The features of the
      last M candidates of the batches are kept, first in, first out. Candidates of the batch itself
      enter at the end of its step. Until the memory holds n, there are fewer negatives. Under a
      `tf.distribute` strategy every replica has a memory of its own.

    With N the number of candidates drawn from, each score gets + log(N / n), so that

      Σ_i (N / n) exp s(x, y_i) has the expectation Σ_y exp s(x, y),

    the sum of `FromCorpus` or `FromCache` over as many rows: one takes the place of the other at
    the same temperature. With `scaled=False` a draw counts once, as in `InBatch`.

    Draws from the stream are as frequent as it brings them, and `frequency_correction` or
    `candidate_sampling_probability` correct them as they do the batch. Draws from a corpus need no
    correction. So corrected, `InBatch` beside them is mixed negative sampling (Yang et al., 2020).

    A negative is left out if its id is that of a positive, as `remove_accidental_hits` and
    `known_positive_ids` say, or if it scores above a `false_negative_margin`.

    An evaluation changes nothing. Its draws have the same law, and a fixed seed.

    Args:
      candidates: the corpus, a batch of features [N, ...] or batches of them, such as a
        `tf.data.Dataset`. Features are a dictionary, or a single array.
      num_draws: n, at most N or M.
      feature_specs: feature name -> `tf.io.FixedLenFeature` (shape without the batch, dtype) of
        what the tower needs, or one such spec if the tower takes a single tensor. If None, it is
        taken from the `candidates`. It must have the task's `candidate_id_key`.
      memory_size: M, how many candidates of the stream are kept, without `candidates`.
      scaled: whether draws are weighted as above.
      saved: whether files hold the features. If not, a corpus must be given again, to `fill`, when
        a `.keras` file is loaded; a memory begins empty.
      seed: seed of the draws; random (but under `keras.utils.set_random_seed`) if None.
      **kwargs: of the layer; see `Negatives`.

    Raises:
      ValueError: if an argument is out of range or contradicts another.

    Examples:
      >>> source = Uniform({"id": np.arange(1000)}, num_draws=64)
      >>> task = Retrieval(candidate_tower, [InBatch(), source], candidate_id_key="id")
    """

    def __init__(
        self,
        candidates: _features.Features | Iterable | None = None,
        num_draws: int = 64,
        *,
        feature_specs: checks.Specs | None = None,
        memory_size: int | None = None,
        scaled: bool = True,
        saved: bool = True,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(seed=seed, **kwargs)
        if (candidates is None) == (memory_size is None):
            raise ValueError(
                "Draws come either from `candidates` or from the stream, with a `memory_size`."
                f" Received: memory_size={memory_size!r}, and"
                f" {'no ' if candidates is None else ''}`candidates`."
            )
        corpus = None
        if memory_size is not None:
            size = _validation.check_count(memory_size, "memory_size")
            if feature_specs is None:
                raise ValueError("A `memory_size` needs `feature_specs`. Received: None.")
        else:
            if feature_specs is None:
                feature_specs = _specs_of(candidates)
            corpus = _read(candidates, feature_specs)
            size = _features.num_rows(corpus)
        self.takes_one_tensor = not isinstance(feature_specs, Mapping)
        self.feature_specs = dict(_features.as_dict(feature_specs))
        checks.check_features(self.feature_specs, (LOG_PROBABILITY,))
        self.num_draws = _validation.check_count(num_draws, "num_draws")
        if self.num_draws > size:
            raise ValueError(
                "There must be no more draws than candidates. Received:"
                f" num_draws={num_draws} for {size} candidates."
            )
        self.memory_size = memory_size
        self.scaled = scaled
        is_stream = memory_size is not None
        self._memory = CandidateMemory(
            self.feature_specs, size, is_stream=is_stream, saved=saved, name="candidates"
        )
        if corpus is not None:
            self._memory.fill(corpus)
        self._hold_draws()
        # Of strings, XLA knows nothing. Keras 3 asks before it compiles by itself.
        self.supports_jit = not any(is_on_host(spec.dtype) for spec in self.feature_specs.values())

    def bind(self, task: Retrieval, prefix: str) -> None:
        if task.candidate_id_key is not None:
            _validation.check_id(
                task.candidate_id_key, self.feature_specs, "candidate_id_key", "feature_specs"
            )
        super().bind(task, prefix)

    @property
    def num_candidates(self) -> tf.Tensor:
        """Scalar int64, how many candidates there are to draw from; on a replica, its own."""
        return self._memory.num_filled

    @property
    def is_of_stream(self) -> bool:
        return self.memory_size is not None

    def num_stream_draws(self, num_candidates: tf.Tensor) -> tf.Tensor | None:
        if self.memory_size is None:
            return None
        num_filled = tf.cast(self._memory.num_filled, tf.float32)
        # Of scaled ones the draws stand for all that is in the memory.
        return num_filled if self.scaled else tf.minimum(num_filled, float(self.num_draws))

    def fill(self, candidates: _features.Features | Iterable) -> None:
        """Replaces the corpus by another one of the same size, or gives one that is not in a file.

        Args:
          candidates: as in the constructor.

        Raises:
          ValueError: if the features do not match, or their number, or there is no corpus.
        """
        if self.memory_size is not None:
            raise ValueError(
                "`fill` is for a corpus, and a memory of the stream fills by itself. Received:"
                f" memory_size={self.memory_size}."
            )
        corpus = _read(candidates, self._plain_specs())
        if _features.num_rows(corpus) != self._memory.size:
            raise ValueError(
                f"The corpus must have {self._memory.size} candidates, as before. Received:"
                f" {_features.num_rows(corpus)}."
            )
        self._memory.fill(corpus)

    def logits(self, batch: Batch, training: bool) -> Contribution:
        memory = self._memory
        if self.memory_size is None and not memory.holds_some():
            raise ValueError(
                f"The source {self.name!r} has no candidates: its file was written with"
                " `saved=False`. Give them to its `fill`."
            )
        if training:
            seed = next_seed(self._state.sampling)
            count_encoded(self._state.num_encoded, self.num_draws)
        else:
            # The first step of a training has the number 1.
            seed = tf.convert_to_tensor(self._state.sampling) * tf.constant([1, 0], tf.int64)
        rows, part_sizes = draw_evenly(memory.num_filled, self.num_draws, seed)
        features = self._features_at(rows, batch)
        embeddings = self.encode(_features.as_given(features, self.takes_one_tensor), training)
        scores = batch.scores.of_all_pairs(batch.queries, embeddings)
        left_out = tf.equal(part_sizes, 0)[tf.newaxis]
        id_key = self.get_task().candidate_id_key
        ids = None if id_key is None else fingerprint(features[id_key])
        if ids is not None and batch.left_out_ids is not None:
            left_out |= is_among(ids[tf.newaxis], batch.left_out_ids)
        if batch.max_scores is not None:
            left_out |= scores > batch.max_scores[:, tf.newaxis]
        logits = scores + self._log_weights(batch, rows, ids, part_sizes)
        return Contribution(contrastive.leave_out(logits, left_out))

    def end_step(self, batch: Batch, contribution: Contribution) -> tf.Tensor | None:
        if self.memory_size is not None:
            self._memory.push(self.features_in(batch), batch.log_probability)
        return None

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_draws": self.num_draws,
            "feature_specs": describe_specs(self._plain_specs()),
            "memory_size": self.memory_size,
            "scaled": self.scaled,
            "saved": self._memory.saved,
            "seed": self.seed,
            "num_candidates": self._memory.size,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Uniform:
        config = {**config, "feature_specs": specs_of(config["feature_specs"])}
        num_candidates = config.pop("num_candidates")
        if config["memory_size"] is not None:
            return cls(**config)
        # The candidates themselves are in the file with the weights.
        specs = config["feature_specs"]
        blank = _features.example_of(_features.as_dict(specs), num_candidates)
        source = cls(_features.as_given(blank, not isinstance(specs, Mapping)), **config)
        source._memory.forget()
        return source

    def _plain_specs(self) -> checks.Specs:
        return _features.as_given(self.feature_specs, self.takes_one_tensor)

    def _features_at(self, rows: tf.Tensor, batch: Batch) -> dict[str, tf.Tensor]:
        """The features of `rows` [n]; of an empty memory, those of a candidate of the batch.

        What is blank might be outside of what the tower knows, and give NaN.
        """
        features = self._memory.features_at(rows)
        if self.memory_size is None:
            return features
        is_filled = self._memory.num_filled > 0
        for key, values in self.features_in(batch).items():
            # A batch may be empty, too.
            nothing = _features.blank([1, *values.shape[1:]], values.dtype)
            first = take_rows(tf.concat([values, nothing], axis=0), tf.zeros_like(rows))
            features[key] = tf.where(is_filled, features[key], first)
        return features

    def _log_weights(
        self, batch: Batch, rows: tf.Tensor, ids: tf.Tensor | None, part_sizes: tf.Tensor
    ) -> tf.Tensor:
        """[n] float32, what is added to the scores of `rows` [n] with `ids` [n]."""
        weights = tf.zeros(tf.shape(rows))
        if self.scaled:
            weights = tf.math.log(tf.maximum(tf.cast(part_sizes, tf.float32), 1.0))
        if batch.log_q is None or self.memory_size is None:
            return weights
        log_probability = self._memory.log_probability_at(rows)
        return weights - batch.log_q.log_expected(log_probability, ids, are_cached=True)


class CandidateMemory(StateLayer):
    """The features of candidates: of a corpus, or the last ones of a stream.

    Args:
      specs: feature name -> spec.
      size: N or M, the number of rows.
      is_stream: whether candidates come with the log probability that a stream brings them.
      saved: whether files hold the rows.
      **kwargs: of the layer.
    """

    def __init__(
        self,
        specs: Mapping[str, tf.io.FixedLenFeature],
        size: int,
        *,
        is_stream: bool,
        saved: bool,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.size, self.saved, self._specs = size, saved, dict(specs)
        self._is_stream = is_stream
        kept = dict(specs)
        if is_stream:
            kept[LOG_PROBABILITY] = tf.io.FixedLenFeature([], tf.float32)
        self._hold_state(
            description={"size": size, "specs": describe_specs(kept)},
            saved=saved,
            divisible=["size"] if is_stream else [],
            data=CacheRows(kept, size, ()).variables,
            num_written=make_state_variable(lambda: tf.zeros([], tf.int64), "num_written"),
        )
        self.built = True

    @property
    def num_filled(self) -> tf.Tensor:
        """Scalar int64, how many rows hold a candidate: the first ones."""
        return tf.minimum(tf.convert_to_tensor(self._state.num_written), self.size)

    def holds_some(self) -> bool:
        """Whether a row holds a candidate, as known when a function is traced."""
        with tf.init_scope():
            return bool(by_replica(self._state.num_written)[0].numpy())

    def features_at(self, rows: tf.Tensor) -> dict[str, tf.Tensor]:
        """The features [n, ...] of `rows` [n]."""
        return {key: tf.gather(self._state.data[key], rows) for key in self._specs}

    def log_probability_at(self, rows: tf.Tensor) -> tf.Tensor:
        """[n] float32, that the `rows` [n] of a stream came with."""
        return tf.gather(self._state.data[LOG_PROBABILITY], rows)

    def fill(self, corpus: Mapping[str, tf.Tensor]) -> None:
        """Writes all rows, feature name -> [N, ...]."""

        def write(corpus: Mapping[str, tf.Tensor]) -> None:
            for key, values in corpus.items():
                self._state.data[key].assign(values)
            self._state.num_written.assign(self.size)

        on_every_replica(write, corpus)

    def forget(self) -> None:
        """Empties all rows."""
        on_every_replica(self._state.num_written.assign, tf.zeros([], tf.int64))

    def push(self, features: Mapping[str, tf.Tensor], log_probability: tf.Tensor) -> None:
        """Writes n <= M new candidates over the oldest ones.

        Args:
          features: feature name -> [n, ...].
          log_probability: [n] float32.

        Raises:
          ValueError: if n is known and larger than M.
        """
        _validation.check_fits(features, self.size, what="candidate_features")
        start = tf.convert_to_tensor(self._state.num_written)
        # A range of int64 would take its limits from the device to the host.
        places = start + tf.cast(tf.range(tf.size(log_probability)), tf.int64)
        rows = tf.math.floormod(places, tf.constant(self.size, tf.int64))
        for key, values in {**features, LOG_PROBABILITY: log_probability}.items():
            scatter_rows(self._state.data[key], rows, tf.stop_gradient(values))
        self._state.num_written.assign_add(tf.size(log_probability, out_type=tf.int64))

    def _limits(self) -> Iterator[tuple[str, StateVariable, float, float]]:
        yield "a number of candidates", self._state.num_written, 0, np.inf

    def _divided(self, states: list[State], num_replicas: int) -> list[State]:
        if not self._is_stream:
            return copies(states, num_replicas)
        numbers = [int(state["num_written"]) for state in states]
        sizes = [len(state["data"][LOG_PROBABILITY]) for state in states]
        filled = [min(number, size) for number, size in zip(numbers, sizes)]
        ages = np.concatenate([np.arange(count)[::-1] for count in filled])
        # The next row to be written is the oldest.
        rows = [
            (number - count + np.arange(count)) % size
            for number, count, size in zip(numbers, filled, sizes)
        ]
        dealt = deal(ages, num_replicas, self.size, self.name)
        data = divided_rows([state["data"] for state in states], rows, dealt, self.size)
        return [{"data": part, "num_written": np.int64(len(own))} for part, own in zip(data, dealt)]


def draw_evenly(
    num_candidates: tf.Tensor, count: int, seed: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Draws n of N rows: one from each of n parts of equal size, without looking at all N.

    The rows form a circle, which is cut at a random place into n runs of ⌊N / n⌋ or ⌈N / n⌉ rows,
    and one row of each run is drawn uniformly. So each draw is uniform over all rows, no two are
    equal, and for any values v with draws y_i from runs of m_i rows, Σ_i m_i v(y_i) has the
    expectation Σ_y v(y). With runs of one size its variance is at most that of independent draws,
    and on average over all orders of the rows it is that of draws without replacement.

    Args:
      num_candidates: N, scalar int64. With N < n some parts are empty.
      count: n.
      seed: [2] int64.

    Returns:
      rows: [n] int64; 0 for an empty part if N = 0, else some row.
      part_sizes: [n] int64, the m_i.
    """
    edges = tf.range(count + 1, dtype=tf.int64) * num_candidates // count
    part_sizes = edges[1:] - edges[:-1]
    # Of 64 random bits, the remainder is uniform but for 2⁻⁶⁴ N.
    numbers = tf.random.stateless_uniform(
        [count + 1], seed, minval=None, maxval=None, dtype=tf.int64, alg="philox"
    )
    places = edges[:-1] + tf.math.floormod(numbers[1:], tf.maximum(part_sizes, 1))
    rows = tf.math.floormod(places + numbers[0] // 2, tf.maximum(num_candidates, 1))
    return rows, part_sizes


def _specs_of(candidates: Any) -> checks.Specs:
    """The specs of one candidate."""
    if _is_one_batch(candidates):
        candidates = tf.data.Dataset.from_tensors(candidates)
    return _features.specs_of_rows(candidates)


def _read(candidates: Any, feature_specs: checks.Specs) -> dict[str, tf.Tensor]:
    """All candidates, feature name -> [N, ...]; read once.

    Raises:
      ValueError: if there are none, or they do not match the specs.
    """
    takes_one_tensor = not isinstance(feature_specs, Mapping)
    specs = _validation.check_specs(_features.as_dict(feature_specs))
    # Of no rows, so that there is something to concatenate.
    batches = [_features.example_of(specs, num_rows=0)]
    for features in [candidates] if _is_one_batch(candidates) else candidates:
        if takes_one_tensor:
            features = _features.as_dict(features)
        batches.append(_validation.check_items(features, specs, what="candidates", exact=True))
    corpus = {key: tf.concat([batch[key] for batch in batches], axis=0) for key in specs}
    if not _features.num_rows(corpus):
        raise ValueError("`candidates` must hold some. Received none.")
    return corpus


def _is_one_batch(candidates: Any) -> bool:
    is_array = tf.is_tensor(candidates) or isinstance(candidates, np.ndarray | tf.Variable)
    return is_array or isinstance(candidates, Mapping)
