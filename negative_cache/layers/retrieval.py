"""`Retrieval`: the softmax cross-entropy of a two-tower model over sources of negatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from negative_cache import _features
from negative_cache._compat import deserialize, kept_losses, keras
from negative_cache.layers._dividing import shares
from negative_cache.layers._negatives import checks
from negative_cache.layers._negatives.base import Contribution, Negatives, given_name, log_prefixes
from negative_cache.layers._negatives.batch import Batch
from negative_cache.layers._negatives.batch_reader import BatchReader
from negative_cache.layers._negatives.cached import CachedNegatives, count_encoded
from negative_cache.layers._negatives.described import describe_sources, sources_of
from negative_cache.layers._negatives.popularity import watch_of
from negative_cache.layers._negatives.scores import Scores
from negative_cache.layers._state import LAYOUT, StateLayer
from negative_cache.layers._variables import make_state_variable
from negative_cache.layers.frequency import FrequencyEstimator, estimator_of
from negative_cache.layers.temperature import LearnedTemperature
from negative_cache.metrics import CurrentValue, LatestValue
from negative_cache.ops import contrastive


@keras.utils.register_keras_serializable("negative_cache")
class Retrieval(StateLayer):
    """Softmax cross-entropy of queries' positives among negatives from a list of sources.

    The loss of a query is

      -s⁺ + log(exp s⁺ + Σ_sources Σ exp s⁻),

    and each source brings some of the s⁻: the other candidates of the batch (`InBatch`), lists that
    come with the batch (`Explicit`), uniform draws (`Uniform`), a cache that streams (`FromCache`),
    a cache of a corpus (`FromCorpus`), or what a subclass of `Negatives` finds. `CachedRetrieval`
    builds the usual list out of its arguments.

    A training call moves the sources on by one step; a call with `training=False` only reads them.

    Args:
      candidate_network: the candidate tower, a Keras layer or a function: candidate features with a
        batch dimension -> [n, d] embeddings.
      negatives: the sources, in the order of their logits.
      temperature: scores are inner products divided by it: a number; "learned", which stands for
        `LearnedTemperature(0.1, smallest=0.07)` and suits embeddings of length 1; or a
        `LearnedTemperature` of your own. The attribute `temperature` is its value of now.
      score_transform: elementwise function, or a layer, of the (divided) inner products.
      candidate_id_key: name of the feature that identifies a candidate; scalar int or string. If
        the features are a single tensor, its name is "candidate".
      remove_accidental_hits: leave out negatives that have the positive's id. Needs
        `candidate_id_key`.
      false_negative_margin: leave out negatives of the batch and of caches that score above the
        positive minus this margin; they are likely unlabelled positives. Explicit negatives stay. A
        source of your own compares with `batch.max_scores`.
      frequency_correction: subtract from each score the log of the expected number of times its
        candidate stands among the negatives, in the batch and in caches. It is the first thing to
        try for a recommender, and needs no cache. True makes a `FrequencyEstimator` of 4 million
        buckets. Needs `candidate_id_key`. None warns if candidates turn out to repeat unevenly.
      reduction: "sum_over_batch_size" (the mean over the batch), "sum", or "none" for [B].
      metrics: Keras metrics updated with (query embeddings, positive embeddings).
      batch_metrics: Keras metrics updated with (labels [B, N], scores [B, N]) of the batch.
      loss_metrics: Keras metrics updated with the loss.
      **kwargs: of the layer. A `name` that is given is put before those of its metrics in the logs.

    Raises:
      ValueError: if an argument is out of range or contradicts another.

    Examples:
      >>> task = Retrieval(
      ...     candidate_tower,
      ...     [InBatch(), FromCache(CacheSpec(specs, 65536)), FromCorpus(archive)],
      ...     temperature=0.05,
      ...     candidate_id_key="title",
      ... )
      >>> loss = task(query_embeddings, candidate_embeddings, {"title": titles}, training=True)
    """

    _is_lost_in_folders = True

    _laws = {"num_encoded": shares}

    def __init__(
        self,
        candidate_network: Callable[..., tf.Tensor],
        negatives: Sequence[Negatives],
        *,
        temperature: float | str | LearnedTemperature | None = None,
        score_transform: Callable[[tf.Tensor], tf.Tensor] | None = None,
        candidate_id_key: str | None = None,
        remove_accidental_hits: bool = False,
        false_negative_margin: float | None = None,
        frequency_correction: bool | FrequencyEstimator | None = None,
        reduction: str | None = "sum_over_batch_size",
        metrics: Sequence[keras.metrics.Metric] | keras.metrics.Metric | None = None,
        batch_metrics: Sequence[keras.metrics.Metric] | None = None,
        loss_metrics: Sequence[keras.metrics.Metric] | None = None,
        **kwargs: Any,
    ):
        # Embeddings are scored in float32 and features keep their dtypes, whatever the precision
        # policy is. Of another dtype, Keras 3 would let metrics count in half precision.
        super().__init__(**{"autocast": False, "dtype": "float32", **kwargs})
        checks.check_network(candidate_network)
        self._temperature = checks.check_scores(temperature, score_transform)
        checks.check_frequency(frequency_correction)
        self.candidate_network = candidate_network
        self.score_transform = score_transform
        self.candidate_id_key = candidate_id_key
        self.remove_accidental_hits = remove_accidental_hits
        self.false_negative_margin = false_negative_margin
        self.reduction = checks.check_reduction(reduction)
        checks.check_needs_ids(
            candidate_id_key,
            remove_accidental_hits=remove_accidental_hits,
            frequency_correction=bool(frequency_correction),
        )
        self._task_metrics = _as_list(metrics)
        self._batch_metrics = _as_list(batch_metrics)
        self._loss_metrics = _as_list(loss_metrics)
        sources = checks.check_sources(negatives)
        sizes = [getattr(source, "cache_size", 0) for source in sources]
        self._frequency = estimator_of(frequency_correction, sizes)
        self._is_undecided = frequency_correction is None
        self._watch = None
        if self._is_undecided and candidate_id_key is not None:
            self._watch = watch_of(sources)
        self._hold_state(
            # A cache holds fingerprints of this feature.
            description={**LAYOUT, "candidate_id_key": candidate_id_key},
            num_encoded=make_state_variable(lambda: tf.zeros([], tf.int64), "num_encoded"),
        )
        self._scores = Scores(self._temperature, score_transform)
        self._reader = BatchReader(
            self._scores,
            sources,
            id_key=candidate_id_key,
            leaves_out_ids=remove_accidental_hits,
            margin=false_negative_margin,
            frequency=self._frequency,
        )
        self._num_sources = len(sources)
        prefix = given_name(self)
        self._encoded = None
        if any(source.encodes_candidates for source in sources):
            self._encoded = LatestValue(name=prefix + "candidates_encoded")
        self._current_temperature = None
        if isinstance(self._temperature, LearnedTemperature):
            name = prefix + "temperature"
            self._current_temperature = CurrentValue(lambda: self.temperature, name=name)
        try:
            for i, (source, own_prefix) in enumerate(zip(sources, log_prefixes(sources))):
                # Of layers in a list, TensorFlow checkpoints of Keras 3 would lose the state.
                setattr(self, f"_source_{i}", source)
                source.bind(self, prefix + own_prefix)
            for source in sources:
                source.make_metrics()
            checks.check_log_names(self.training_metrics)
        except Exception:
            # So that they can be given to a task without the fault.
            for source in sources:
                source.release(self)
            raise
        self.supports_jit = all(getattr(source, "supports_jit", True) for source in sources)
        self.built = True

    @property
    def temperature(self) -> float | tf.Tensor | None:
        """What inner products are divided by: the number, or if it is learned its value of now."""
        return self._scores.temperature

    @property
    def negatives(self) -> tuple[Negatives, ...]:
        """The sources of negatives."""
        return tuple(getattr(self, f"_source_{i}") for i in range(self._num_sources))

    @property
    def cached_negatives(self) -> tuple[CachedNegatives, ...]:
        """The sources that are caches."""
        return tuple(part for part in self.negatives if isinstance(part, CachedNegatives))

    @property
    def own_networks(self) -> list[Callable[..., tf.Tensor]]:
        """The towers of caches that are not encoded by the task's tower, each once."""
        networks: list[Callable[..., tf.Tensor]] = []
        for source in self.cached_negatives:
            network = source.candidate_network
            if network is not None and not any(network is other for other in networks):
                networks.append(network)
        return networks

    @property
    def frequency(self) -> FrequencyEstimator | None:
        """What estimates the candidates' frequencies, if there is a `frequency_correction`."""
        return self._frequency

    @property
    def factorized_metrics(self) -> list[keras.metrics.Metric]:
        """The `metrics`, under the name that `tfrs.tasks.Retrieval` has for them; may be set."""
        return self._task_metrics

    @factorized_metrics.setter
    def factorized_metrics(
        self, metrics: Sequence[keras.metrics.Metric] | keras.metrics.Metric | None
    ) -> None:
        self._task_metrics = _as_list(metrics)

    @property
    def training_metrics(self) -> list[keras.metrics.Metric]:
        """The metrics that only a training call updates."""
        metrics = [metric for source in self.negatives for metric in source.training_metrics]
        own = (self._encoded, self._current_temperature)
        return metrics + [metric for metric in own if metric is not None]

    def evaluation_logs(self, logs: Mapping[str, Any]) -> dict[str, Any]:
        """The logs of an evaluation, without what only training measures.

        Keras logs every metric of a model in an evaluation too, where those of training are zero or
        left over. `DualEncoder` leaves them out. Another model does so in its `test_step`:

        >>> def test_step(self, data):
        ...     return self.task.evaluation_logs(super().test_step(data))

        Args:
          logs: metric name -> value.
        """
        of_training = {metric.name for metric in self.training_metrics}
        return {name: value for name, value in logs.items() if name not in of_training}

    def check_popularity(self) -> None:
        """Warns, once, if popular candidates repeat in the training stream and nothing corrects it.

        `DualEncoder` does so after each epoch, and every call of the task that runs or is traced
        does. Only a loop of compiled steps without evaluations has to do it by itself.
        """
        if self._watch is not None:
            self._watch.look()

    def build_cache(self, embedding_dim: int) -> None:
        """Makes the caches that wait for the embedding dimension; checks it against made ones.

        Raises:
          ValueError: if a cache holds embeddings of another dimension.
        """
        for source in self.negatives:
            source.build_cache(embedding_dim)

    def about_candidates(
        self,
        features: Mapping[str, tf.Tensor],
        embeddings: tf.Tensor,
        probabilities: tf.Tensor | None,
    ) -> tuple[tf.Tensor | None, tf.Tensor]:
        """[n] fingerprints of candidates' ids, if they have some, and [n] log probabilities."""
        return self._reader.about_candidates(features, embeddings, probabilities)

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict:
        children = super()._trackable_children(save_type, **kwargs)
        if self._watch is not None and save_type == "savedmodel":
            # An exported training step has it. Checkpoints do without.
            children["watch"] = self._watch.trackable
        return children

    def __call__(self, *args: Any, **kwargs: Any) -> tf.Tensor:
        # The tower is called before, and Keras forgets what a layer inside of this one has added.
        with kept_losses(self.candidate_network):
            loss = super().__call__(*args, **kwargs)
        self.check_popularity()
        return loss

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
        """Computes the loss and, in training, moves the sources on by one step.

        Args:
          query_embeddings: [B, d] float.
          candidate_embeddings: [N, d] float, N >= B; row i is the positive of query i, rows from B
            on are further candidates of the batch.
          candidate_features: the features [N, ...] that `candidate_embeddings` were computed from.
          sample_weight: [B] float.
          candidate_sampling_probability: [N] float, the probability that a draw from the training
            stream is each candidate, for the log Q correction; clipped from below at 1e-9, or
            without a cache at 1e-6 as in `tfrs.tasks.Retrieval`. As there, the correction then
            applies to the positive too if its batch is among the negatives; it does not otherwise,
            nor under `frequency_correction`.
          negative_embeddings: [B, M, d] float, explicit negatives of each query.
          training: whether to draw, encode and update the caches. None means True.
          compute_metrics: whether to update `metrics`.
          compute_batch_metrics: whether to update `batch_metrics`.
          score_mask: [B, N] bool, which of the batch's candidates each query is compared with. Its
            positive always is one, and caches are not affected.
          negative_ids: [B, M], the ids of the explicit negatives, of the kind of the feature
            `candidate_id_key`: those that are a positive of their query are left out, if
            `remove_accidental_hits` or `known_positive_ids` say so.
          negative_mask: [B, M] bool, which of the explicit negatives there are; the others are
            padding, whatever they are.
          known_positive_ids: [B, P] ids of further candidates that are right for each query, of the
            kind of the feature `candidate_id_key`: a `tf.RaggedTensor`, or padded with -1, or with
            "" if ids are strings. They are left out of its negatives in the batch, among the
            explicit ones and in caches, as is its own positive then. Needs `candidate_id_key`.

        Returns:
          Scalar float32, or [B] if `reduction` is "none".

        Raises:
          ValueError: if features do not match the specs of a cache, a shape does not fit, or N
            exceeds the size of a cache that streams.
        """
        training = True if training is None else training
        queries, candidates = checks.check_embeddings(query_embeddings, candidate_embeddings)
        self.build_cache(candidates.shape[1])
        weight = checks.check_weights(sample_weight, queries)
        checks.check_explicit_is_taken(negative_embeddings, self.negatives)
        batch = self._reader.read(
            queries,
            candidates,
            self._check_features(candidate_features),
            probabilities=candidate_sampling_probability,
            explicit=(negative_embeddings, negative_mask, negative_ids),
            score_mask=score_mask,
            known_positive_ids=known_positive_ids,
            training=training,
        )
        if training and self._watch is not None and candidate_sampling_probability is None:
            self._watch.count(batch.ids)
        contributions = [
            checks.check_contribution(source.logits(batch, training), source, queries)
            for source in self.negatives
        ]
        negative_logits = tf.concat([part.logits for part in contributions], axis=1)
        checks.check_some_negatives(negative_logits, self.negatives)
        loss = contrastive.softmax_loss(batch.positive_logits, negative_logits)
        loss = contrastive.reduce_losses(loss, self.reduction, weight)
        if training:
            loss = self._end_step(batch, contributions, loss)
        for metric in self._loss_metrics:
            metric.update_state(loss)
        weighted = {} if weight is None else {"sample_weight": weight}
        if compute_metrics:
            for metric in self._task_metrics:
                metric.update_state(queries, candidates[: batch.num_queries], **weighted)
        if compute_batch_metrics:
            self._update_batch_metrics(batch, **weighted)
        return loss

    def get_config(self) -> dict[str, Any]:
        serialize = keras.utils.serialize_keras_object
        frequency, undecided = self._frequency, None if self._is_undecided else False
        return {
            **super().get_config(),
            "candidate_network": serialize(self.candidate_network),
            **describe_sources(self.negatives, self.own_networks),
            "temperature": serialize(self._temperature),
            "score_transform": serialize(self.score_transform),
            "candidate_id_key": self.candidate_id_key,
            "remove_accidental_hits": self.remove_accidental_hits,
            "false_negative_margin": self.false_negative_margin,
            "frequency_correction": serialize(frequency) if frequency else undecided,
            "reduction": self.reduction,
            **self._described_metrics(),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Retrieval:
        objects = ("candidate_network", "temperature", "score_transform")
        lists = ("metrics", "batch_metrics", "loss_metrics")
        frequency = config["frequency_correction"]
        config = dict(config)
        if "negatives" in config:
            config["negatives"] = sources_of(config["negatives"], config.pop("own_networks"))
        return cls(
            **{
                **config,
                **{name: deserialize(config[name]) for name in objects},
                **{name: [deserialize(part) for part in config[name]] for name in lists},
                "frequency_correction": deserialize(frequency) if frequency else frequency,
            }
        )

    def _described_metrics(self) -> dict[str, list]:
        serialize = keras.utils.serialize_keras_object
        return {
            "metrics": [serialize(metric) for metric in self._task_metrics],
            "batch_metrics": [serialize(metric) for metric in self._batch_metrics],
            "loss_metrics": [serialize(metric) for metric in self._loss_metrics],
        }

    def _check_features(self, features: Mapping[str, tf.Tensor] | tf.Tensor) -> dict:
        """The batch's features as tensors by name."""
        dtypes = {
            key: spec.dtype
            for source in self.negatives
            for key, spec in getattr(source, "feature_specs", {}).items()
        }
        return {
            # Those of a task that keeps none may be ragged or sparse.
            key: values if tf.is_tensor(values) else tf.convert_to_tensor(values, dtypes.get(key))
            for key, values in _features.as_dict(features).items()
        }

    def _update_batch_metrics(self, batch: Batch, **weighted: tf.Tensor) -> None:
        if not self._batch_metrics:
            return
        scores = contrastive.leave_out(batch.pair_logits, batch.not_negatives)
        scores = tf.maximum(scores, tf.float32.min / 100.0)
        for metric in self._batch_metrics:
            metric.update_state(tf.cast(batch.is_positive, tf.float32), scores, **weighted)

    def _end_step(
        self, batch: Batch, contributions: Sequence[Contribution], loss: tf.Tensor
    ) -> tf.Tensor:
        """Ends the step of every source; the loss, with the gradient of theirs."""
        for source, contribution in zip(self.negatives, contributions):
            own_loss = source.end_step(batch, contribution)
            if own_loss is not None:
                if self.reduction == "none":
                    own_loss /= tf.cast(batch.num_queries, tf.float32)
                loss = contrastive.value_with_gradient(loss, loss + own_loss)
        if self._encoded is not None:
            # Those of the batch, which the task has not encoded itself.
            count_encoded(self._state.num_encoded, batch.num_candidates)
            total = tf.convert_to_tensor(self._state.num_encoded)
            total += tf.add_n([source.num_encoded for source in self.negatives])
            num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
            self._encoded.update_state(total * num_replicas)
        return loss


def _as_list(metrics: Any) -> list[keras.metrics.Metric]:
    if isinstance(metrics, Sequence):
        return list(metrics)
    return [] if metrics is None else [metrics]
