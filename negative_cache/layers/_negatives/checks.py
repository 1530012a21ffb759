"""What the retrieval task and its sources of negatives check. Nothing here computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import tensorflow as tf

from negative_cache import _features, _validation
from negative_cache._compat import keras
from negative_cache.layers._corpus import EMBEDDING
from negative_cache.layers._negatives.base import Contribution, Negatives
from negative_cache.layers._state import describe_specs
from negative_cache.layers.cache import Cache
from negative_cache.layers.drift_corrector import DriftCorrector
from negative_cache.layers.frequency import FrequencyEstimator
from negative_cache.layers.temperature import LearnedTemperature
from negative_cache.layers.tree_index import TreeIndex

if TYPE_CHECKING:
    from negative_cache.layers._negatives.cached import CachedNegatives

REDUCTIONS = ("sum_over_batch_size", "sum", "none")

Specs: TypeAlias = Mapping[str, tf.io.FixedLenFeature] | tf.io.FixedLenFeature

# Of the task.


def check_network(network: Any) -> None:
    """Checks `candidate_network`."""
    if not callable(network):
        raise ValueError(
            f"`candidate_network` must be a layer or a function. Received: {network!r}."
        )


def check_reduction(reduction: str | None) -> str:
    """Returns `reduction`, of which None is "none"."""
    reduction = reduction or "none"
    if reduction not in REDUCTIONS:
        raise ValueError(f"`reduction` must be one of {REDUCTIONS}. Received: {reduction!r}.")
    return reduction


def check_scores(temperature: Any, transform: Any) -> float | LearnedTemperature | None:
    """Checks `temperature` and `score_transform`; returns the temperature."""
    if isinstance(temperature, str) and temperature == "learned":
        temperature = LearnedTemperature(0.1, smallest=0.07)
    is_learned = isinstance(temperature, LearnedTemperature)
    if not is_learned and temperature is not None and not isinstance(temperature, int | float):
        raise ValueError(
            '`temperature` must be a number, "learned" or a `LearnedTemperature`. Received:'
            f" {temperature!r}."
        )
    if transform is not None and (not callable(transform) or isinstance(transform, type)):
        raise ValueError(
            f"`score_transform` must be a function or a layer. Received: {transform!r}."
        )
    if temperature is not None and isinstance(transform, LearnedTemperature):
        raise ValueError(
            "A `LearnedTemperature` is the temperature: leave `temperature` out. Received:"
            f" temperature={temperature!r}."
        )
    if not is_learned and temperature is not None and not temperature > 0:
        raise ValueError(f"`temperature` must be positive. Received: {temperature}.")
    return temperature


def check_frequency(value: Any) -> None:
    """Checks `frequency_correction`."""
    if not isinstance(value, bool | FrequencyEstimator | None):
        raise ValueError(
            "`frequency_correction` must be True, False or a `FrequencyEstimator`. Received:"
            f" {value!r}."
        )


def check_needs_ids(candidate_id_key: str | None, **asked: bool) -> None:
    """Checks that there is a `candidate_id_key` if something is asked for that needs it."""
    for name in (name for name, is_asked in asked.items() if is_asked):
        if candidate_id_key is None:
            raise ValueError(f"`{name}` needs a `candidate_id_key`. Received: None.")


def check_sources(negatives: Any) -> tuple[Negatives, ...]:
    """Returns the sources of `negatives`."""
    is_list = isinstance(negatives, Sequence) and len(negatives)
    if not is_list or not all(isinstance(source, Negatives) for source in negatives):
        raise ValueError(
            "`negatives` must be a list of sources of negatives, such as `[InBatch()]`. Received:"
            f" {negatives!r}."
        )
    for what, parts in (
        ("source", negatives),
        ("cache", [source.cache for source in negatives if source.is_cache]),
        ("index", [source.index for source in negatives if source.is_cache]),
        ("corrector", [source.corrector for source in negatives if source.is_cache]),
    ):
        counts = Counter(id(part) for part in parts if part is not None)
        if counts and max(counts.values()) > 1:
            raise ValueError(
                f"Every source of negatives needs a {what} of its own, which a step changes once."
                f" Received one {what} twice in: {negatives!r}."
            )
    return tuple(negatives)


def check_log_names(metrics: Sequence[keras.metrics.Metric]) -> None:
    """Checks that no two sources write one log."""
    names = Counter(metric.name for metric in metrics)
    repeated = sorted(name for name, count in names.items() if count > 1)
    if repeated:
        raise ValueError(
            "Sources of negatives must have different names, which are put before their logs."
            f" Received two that log {repeated}."
        )


def check_explicit_is_taken(negatives: tf.Tensor | None, sources: Sequence[Negatives]) -> None:
    """Checks that `negative_embeddings` are given only if a source takes them."""
    if negatives is not None and not any(source.takes_explicit for source in sources):
        raise ValueError(
            "`negative_embeddings` need `Explicit()` among the `negatives` of the task. Received:"
            f" {list(sources)}."
        )


def check_contribution(contribution: Any, source: Negatives, queries: tf.Tensor) -> Contribution:
    """Returns what the `logits` of a source has returned for `queries` [B, d]."""
    if not isinstance(contribution, Contribution):
        raise ValueError(
            f"`{type(source).__name__}.logits` must return a `Contribution`. Received:"
            f" {contribution!r}."
        )
    if not contribution.logits.shape[:1].is_compatible_with(queries.shape[:1]):
        raise ValueError(
            f"The logits of `{type(source).__name__}` must have shape [batch, negatives], for"
            f" {queries.shape[0]} queries. Received shape: {contribution.logits.shape}."
        )
    return contribution


def check_some_negatives(logits: tf.Tensor, sources: Sequence[Negatives]) -> None:
    """Checks that [B, n] logits are some."""
    if logits.shape[1] == 0:
        raise ValueError(
            "There is nothing to tell a positive from. Received `negative_embeddings=None`, and"
            f" {[type(source).__name__ for source in sources]} as sources of negatives."
        )


# Of a cache.


def check_features(specs: Mapping[str, tf.io.FixedLenFeature], reserved: Sequence[str]) -> None:
    """Checks `feature_specs` of candidates, whose names are not the `reserved` ones."""
    _validation.check_specs(specs)
    found = sorted(set(specs) & set(reserved))
    if found:
        raise ValueError(f"`feature_specs` must not use the names {reserved}. Received: {found}.")


def check_streaming_cache(
    cache: Any, internal_keys: Container[str]
) -> dict[str, tf.io.FixedLenFeature]:
    """Checks the `cache` of `FromCache`, and returns the specs of the candidates' own features."""
    if not isinstance(cache, Cache) or cache.row_key is not None:
        raise ValueError(
            "`cache` must be a `CacheSpec`, or a `Cache` without a `row_key`; `FromCorpus` takes"
            f" one with it. Received: {cache!r}."
        )
    _check_embedding_key(cache)
    return {key: spec for key, spec in cache.specs.items() if key not in internal_keys}


def check_corpus(cache: Any, feature_specs: Specs | None) -> Specs:
    """Checks the `cache` of `FromCorpus`, and returns its `feature_specs`."""
    if not isinstance(cache, Cache) or cache.row_key is None:
        raise ValueError(
            "`cache` must be a `Cache` that covers a corpus, as `Cache.from_dataset` makes it."
            f" Received: {cache!r}."
        )
    _check_embedding_key(cache)
    specs = {key: spec for key, spec in cache.specs.items() if key != EMBEDDING}
    if feature_specs is None:
        feature_specs = _features.as_given(specs, set(specs) == {_features.ONE_FEATURE})
    described = describe_specs(_features.as_dict(feature_specs))
    if described != describe_specs(specs):
        raise ValueError(
            "`feature_specs` must be those of the `cache`. Received:"
            f" {described}. Wanted: {describe_specs(specs)}."
        )
    return feature_specs


def decided_by(cache: Cache, given: Mapping[str, Any]) -> dict[str, Any]:
    """Checks arguments that a cache of a corpus decides on, and returns what it decides.

    Args:
      cache: of a corpus.
      given: the arguments of `CachedRetrieval`, by name.
    """
    decided = {
        "cache_size": (None, cache.cache_size),
        "candidate_id_key": (None, cache.row_key),
        "index": (None, cache.index),
        "embedding_dim": (None, cache.embeddings.shape[1]),
        "embedding_dtype": (tf.float32, cache.embeddings.dtype),
        "use_lru": (True, cache.use_lru),
        "save_cache": (True, cache.saved),
    }
    for name, (default, value) in decided.items():
        # What is the default has not been asked for.
        if given[name] not in (default, value):
            raise ValueError(
                f"`{name}` is decided by the `cache`. Received: {given[name]!r}. Wanted: nothing,"
                f" or {value!r}."
            )
    return {name: value for name, (_, value) in decided.items()}


def check_needs_cache(**asked: Any) -> None:
    """Checks that nothing is asked for that needs a cache."""
    for name in (name for name, value in asked.items() if value):
        raise ValueError(f"`{name}` needs a cache. Received: cache_size=0.")


def _check_embedding_key(cache: Cache) -> None:
    if cache.embedding_key != EMBEDDING:
        raise ValueError(
            f"The embedding of a `cache` must be called {EMBEDDING!r}. Received:"
            f" {cache.embedding_key!r}."
        )


def check_draws(num_draws: int | None, num_negatives: int | None) -> tuple[int | None, int | None]:
    """Checks `num_draws` and `num_negatives`; without both, a query has one draw of its own."""
    if num_draws is not None and num_negatives is not None:
        raise ValueError(
            "`num_draws` are shared by all queries, `num_negatives` are of each query: give one of"
            f" them. Received: num_draws={num_draws}, num_negatives={num_negatives}."
        )
    if num_draws is not None:
        return _validation.check_count(num_draws, "num_draws"), None
    return None, _validation.check_count(
        1 if num_negatives is None else num_negatives, "num_negatives"
    )


def check_schedule(source: CachedNegatives, use_lru: bool) -> None:
    """Checks what goes by the age of rows against the cache of a source."""
    if source.probe_size > source.cache_size:
        raise ValueError(
            "`probe_size` must be at most the number of rows of the cache. Received:"
            f" {source.probe_size} for {source.cache_size} rows."
        )
    asked = {
        "corrector": source.corrector is not None,
        "refresh_fraction": source.refresh_fraction > 0.0,
        "probe_size": source.probe_size > 0,
    }
    for name in (name for name, is_asked in asked.items() if is_asked and not use_lru):
        raise ValueError(
            f"`{name}` needs `use_lru=True`: without, a row's age is not that of its embedding."
            " Received: use_lru=False."
        )


def check_corrector(source: CachedNegatives, host_keys: Container[str]) -> None:
    """Checks the `corrector` of a source whose cache has `host_keys` in host memory."""
    corrector, index = source.corrector, source.index
    if not isinstance(corrector, DriftCorrector):
        raise ValueError(
            f"`corrector` must be a `Corrector` or a `NystromCorrector`. Received: {corrector!r}."
        )
    num_landmarks = getattr(corrector, "num_landmarks", 0)
    if num_landmarks > source.cache_size:
        raise ValueError(
            "There must be no more landmarks than rows of the cache. Received:"
            f" num_landmarks={num_landmarks} for {source.cache_size} rows."
        )
    key = corrector.content_key
    if index is not None and not index.store_embeddings:
        raise ValueError(
            "A `corrector` needs an index that stores embeddings. Received one with"
            " store_embeddings=False."
        )
    if index is not None and key is not None:
        raise ValueError(
            "A corrector with a `content_key` cannot be used with an `index`, whose nodes have no"
            f" content. Received: content_key={key!r}."
        )
    if key is None:
        return
    spec = source.feature_specs.get(key)
    if spec is None or len(spec.shape) != 1 or not tf.as_dtype(spec.dtype).is_floating:
        raise ValueError(
            "The `content_key` of a corrector must be one of the features in `feature_specs`,"
            f" floating point of shape [size]. Received: {key!r}, and specs:"
            f" {describe_specs(source.feature_specs)}."
        )
    if key in host_keys:
        raise ValueError(
            "The `content_key` of a corrector is looked at of every row, and cannot be `on_host`."
            f" Received: {key!r}."
        )


def check_weighting(
    is_weighted: bool, index: TreeIndex | None, name: str = "candidate_sampling_probability"
) -> None:
    """Checks that cached candidates are not weighted if an index draws from them."""
    if is_weighted and index is not None:
        raise ValueError(
            f"`{name}` cannot be used with an `index`, whose nodes know no weights of single"
            " candidates."
        )


# Of a call.


def check_embeddings(
    query_embeddings: tf.Tensor, candidate_embeddings: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns `query_embeddings` [B, d] and `candidate_embeddings` [N, d], N >= B, as float32."""
    queries = tf.convert_to_tensor(query_embeddings)
    candidates = tf.convert_to_tensor(candidate_embeddings)
    for name, values in (("query_embeddings", queries), ("candidate_embeddings", candidates)):
        if values.shape.rank != 2 or not values.dtype.is_floating:
            raise ValueError(
                f"`{name}` must be floating point of shape [batch, dim]. Received dtype"
                f" {values.dtype.name}, shape {values.shape}."
            )
    if queries.shape[1] != candidates.shape[1]:
        raise ValueError(
            "`query_embeddings` and `candidate_embeddings` must have the same dimension. Received"
            f" shapes: {queries.shape} and {candidates.shape}."
        )
    num_queries, num_candidates = queries.shape[0], candidates.shape[0]
    if None not in (num_queries, num_candidates) and num_candidates < num_queries:
        raise ValueError(
            "Every query needs a positive: `candidate_embeddings` must have at least as many rows"
            f" as `query_embeddings`. Received shapes: {candidates.shape} and {queries.shape}."
        )
    return tf.cast(queries, tf.float32), tf.cast(candidates, tf.float32)


def check_negatives(negatives: tf.Tensor, queries: tf.Tensor) -> tf.Tensor:
    """Returns `negative_embeddings` [B, M, d] as float32."""
    negatives = tf.convert_to_tensor(negatives)
    wanted = tf.TensorShape([queries.shape[0], None, queries.shape[1]])
    if not negatives.shape.is_compatible_with(wanted) or not negatives.dtype.is_floating:
        raise ValueError(
            "`negative_embeddings` must be floating point of shape [batch, negatives, dim], here"
            f" {wanted}. Received dtype {negatives.dtype.name}, shape {negatives.shape}."
        )
    return tf.cast(negatives, tf.float32)


def check_id_kind(ids: tf.Tensor, dtype: tf.DType, name: str, id_key: str | None) -> None:
    """Checks that `ids` are strings if the feature `id_key`, of `dtype`, is, and only then."""
    if not _features.are_of_one_kind(ids.dtype, dtype):
        raise ValueError(
            f"`{name}` must be of the kind of the feature {id_key!r}, {dtype.name}. Received dtype:"
            f" {ids.dtype.name}."
        )


def check_negative_mask(mask: tf.Tensor, negatives: tf.Tensor) -> tf.Tensor:
    """Returns `negative_mask` [B, M] bool as a tensor, for `negatives` [B, M, d]."""
    mask = tf.convert_to_tensor(mask)
    if mask.dtype != tf.bool or not mask.shape.is_compatible_with(negatives.shape[:2]):
        raise ValueError(
            f"`negative_mask` must be boolean of shape [batch, negatives], here"
            f" {negatives.shape[:2]}. Received dtype {mask.dtype.name}, shape {mask.shape}."
        )
    return mask


def check_negative_ids(ids: tf.Tensor, negatives: tf.Tensor) -> None:
    """Checks `negative_ids` [B, M] of `negatives` [B, M, d]."""
    if not ids.shape.is_compatible_with(negatives.shape[:2]):
        raise ValueError(
            f"`negative_ids` must have shape [batch, negatives], here {negatives.shape[:2]}."
            f" Received shape {ids.shape}."
        )


def check_known_positives(
    ids: tf.Tensor | tf.RaggedTensor, queries: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns `known_positive_ids` as [B, P], and [B, P] bool, which of them are no padding."""
    if isinstance(ids, tf.RaggedTensor):
        is_there = tf.sequence_mask(ids.row_lengths())
        ids = ids.to_tensor()
    else:
        ids = tf.convert_to_tensor(ids)
        is_there = tf.not_equal(ids, "" if ids.dtype == tf.string else -1)
    is_id = ids.dtype == tf.string or ids.dtype.is_integer
    if not is_id or ids.shape.rank != 2 or not queries.shape[:1].is_compatible_with(ids.shape[:1]):
        raise ValueError(
            "`known_positive_ids` must be integers or strings of shape [batch, ids], ragged or"
            f" padded, for {queries.shape[0]} queries. Received dtype {ids.dtype.name}, shape"
            f" {ids.shape}."
        )
    return ids, is_there


def check_score_mask(mask: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
    """Returns `score_mask` [B, N] bool as a tensor, B and N being those of `scores`."""
    mask = tf.convert_to_tensor(mask)
    if mask.dtype != tf.bool or not mask.shape.is_compatible_with(scores.shape):
        raise ValueError(
            f"`score_mask` must be boolean of shape [batch, candidates], here {scores.shape}."
            f" Received dtype {mask.dtype.name}, shape {mask.shape}."
        )
    return mask


def check_weights(weights: tf.Tensor | None, queries: tf.Tensor) -> tf.Tensor | None:
    """Returns `sample_weight` as [B] float32, B being the number of queries; None if it is None."""
    if weights is None:
        return None
    weights = tf.reshape(tf.cast(weights, tf.float32), [-1])
    check_rows(weights, queries, "sample_weight", rank=1)
    return weights


def check_dimension(embedding_dim: int, cached: tf.Variable) -> None:
    """Checks the dimension of embeddings against that of the `cached` ones [C, d]."""
    if embedding_dim != cached.shape[1]:
        raise ValueError(
            f"The cache holds embeddings of dimension {cached.shape[1]}. Received embeddings of"
            f" {embedding_dim}."
        )


def check_rows(values: tf.Tensor, like: tf.Tensor, name: str, rank: int | None = None) -> None:
    """Checks that `values` have as many rows as `like`, and where given the `rank`."""
    wanted = like.shape[:1].concatenate([None] * ((rank or values.shape.rank) - 1))
    if not values.shape.is_compatible_with(wanted):
        raise ValueError(f"`{name}` must have shape {wanted}. Received shape: {values.shape}.")
