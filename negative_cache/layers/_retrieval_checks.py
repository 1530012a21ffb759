"""What `CachedRetrieval` checks of its arguments. Nothing here computes."""

from collections.abc import Container, Mapping
from typing import NamedTuple

import tensorflow as tf

from negative_cache import _validation
from negative_cache._features import ONE_FEATURE
from negative_cache.layers._corpus import EMBEDDING
from negative_cache.layers._state import describe_specs
from negative_cache.layers.cache import Cache
from negative_cache.layers.drift_corrector import DriftCorrector
from negative_cache.layers.frequency import FrequencyEstimator
from negative_cache.layers.temperature import LearnedTemperature
from negative_cache.layers.tree_index import TreeIndex

REDUCTIONS = ("sum_over_batch_size", "sum", "none")


class Given(NamedTuple):
    """Arguments that a cache of a corpus decides on, as they were given."""

    feature_specs: Mapping[str, tf.io.FixedLenFeature] | tf.io.FixedLenFeature | None
    cache_size: int | None
    candidate_id_key: str | None
    index: TreeIndex | None
    embedding_dim: int | None
    embedding_dtype: tf.DType
    use_lru: bool
    save_cache: bool


def check_corpus(cache, given: Given) -> Given:
    """Checks a `cache` against the arguments that it decides on, and returns those."""
    if not isinstance(cache, Cache) or cache.row_key is None:
        raise ValueError(
            "`cache` must be a `Cache` that covers a corpus, as `Cache.from_dataset` makes it."
            f" Received: {cache!r}."
        )
    if cache.embedding_key != EMBEDDING:
        raise ValueError(
            f"The embedding of a `cache` must be called {EMBEDDING!r}. Received:"
            f" {cache.embedding_key!r}."
        )
    specs = {key: spec for key, spec in cache.specs.items() if key != EMBEDDING}
    feature_specs = given.feature_specs
    if feature_specs is None:
        feature_specs = specs[ONE_FEATURE] if set(specs) == {ONE_FEATURE} else specs
    is_mapping = isinstance(feature_specs, Mapping)
    described = describe_specs(feature_specs if is_mapping else {ONE_FEATURE: feature_specs})
    if described != describe_specs(specs):
        raise ValueError(
            "`feature_specs` must be those of the `cache`. Received:"
            f" {described}. Wanted: {describe_specs(specs)}."
        )
    decided = {
        "cache_size": cache.cache_size,
        "candidate_id_key": cache.row_key,
        "index": cache.index,
        "embedding_dim": cache.embeddings.shape[1],
        "embedding_dtype": cache.embeddings.dtype,
        "use_lru": cache.use_lru,
        "save_cache": cache.saved,
    }
    # What is the default has not been asked for.
    defaults = Given(None, None, None, None, None, tf.float32, True, True)._asdict()
    for name, value in decided.items():
        received = getattr(given, name)
        if received not in (defaults[name], value):
            raise ValueError(
                f"`{name}` is decided by the `cache`. Received: {received!r}. Wanted: nothing, or"
                f" {value!r}."
            )
    return Given(feature_specs, **decided)


def check_schedule(task, cache) -> None:
    """Checks what of the cache of a task is encoded and corrected."""
    if not 0.0 <= task.refresh_fraction <= 1.0:
        raise ValueError(
            f"`refresh_fraction` must be in [0, 1]. Received: {task.refresh_fraction}."
        )
    _validation.check_count(task.probe_size, "probe_size", at_least=0)
    _validation.check_count(task.probe_every, "probe_every")
    if cache is None and not task.write_back:
        raise ValueError(
            "`write_back=False` is for a `cache` that covers a corpus. Received: cache=None."
        )
    asked = {
        "corrector": task.corrector is not None,
        "refresh_fraction": task.refresh_fraction > 0.0,
        "probe_size": task.probe_size > 0,
    }
    if not task.cache_size:
        for name in (name for name, is_asked in asked.items() if is_asked):
            raise ValueError(f"`{name}` needs a cache. Received: cache_size=0.")
        return
    if task.probe_size > task.cache_size:
        raise ValueError(
            "`probe_size` must be at most the number of rows of the cache. Received:"
            f" {task.probe_size} for {task.cache_size} rows."
        )
    for name in (name for name, is_asked in asked.items() if is_asked and not task.use_lru):
        raise ValueError(
            f"`{name}` needs `use_lru=True`: without, a row's age is not that of its embedding."
            " Received: use_lru=False."
        )
    if cache is None and task.frequency_correction and task.use_lru:
        raise ValueError(
            "`frequency_correction` takes the cache for a sample of the stream, which it is with"
            " `use_lru=False` only: LRU keeps candidates that are drawn often. Received:"
            " use_lru=True."
        )
    if cache is not None and task.frequency_correction:
        raise ValueError(
            "There is no `frequency_correction` with a `cache`: it holds every candidate once."
        )
    if task.corrector is not None:
        check_corrector(task.corrector, task, () if cache is None else cache.host_keys)


def check_probabilities(are_given: bool, cache: Cache | None) -> None:
    """Checks that no candidate of a corpus, which has each once, is weighted."""
    if are_given and cache is not None and cache.row_key is not None:
        raise ValueError(
            "There is no `candidate_sampling_probability` with a `cache` that covers a corpus: it"
            " holds every candidate once."
        )


def check_corrector(corrector, task, host_keys: Container[str]) -> None:
    """Checks the `corrector` of a task whose cache has `host_keys` in host memory."""
    if not isinstance(corrector, DriftCorrector):
        raise ValueError(
            f"`corrector` must be a `Corrector` or a `NystromCorrector`. Received: {corrector!r}."
        )
    num_landmarks = getattr(corrector, "num_landmarks", 0)
    if num_landmarks > task.cache_size:
        raise ValueError(
            "There must be no more landmarks than rows of the cache. Received:"
            f" num_landmarks={num_landmarks} for {task.cache_size} rows."
        )
    key = corrector.content_key
    if key is None:
        return
    spec = task.feature_specs.get(key)
    if spec is None or len(spec.shape) != 1 or not tf.as_dtype(spec.dtype).is_floating:
        raise ValueError(
            "The `content_key` of a corrector must be one of the features in `feature_specs`,"
            f" floating point of shape [size]. Received: {key!r}, and specs:"
            f" {describe_specs(task.feature_specs)}."
        )
    if key in host_keys:
        raise ValueError(
            "The `content_key` of a corrector is looked at of every row, and cannot be `on_host`."
            f" Received: {key!r}."
        )


def check_settings(task, index, reserved_names: tuple[str, ...]) -> None:
    """Checks the constructor's arguments, which `task` has as attributes but for `index`."""
    if task.reduction not in REDUCTIONS:
        raise ValueError(f"`reduction` must be one of {REDUCTIONS}. Received: {task.reduction!r}.")
    if not callable(task.candidate_network):
        raise ValueError(
            "`candidate_network` must be a layer or a function. Received:"
            f" {task.candidate_network!r}."
        )
    _validation.check_count(task.num_negatives, "num_negatives")
    _validation.check_count(task.cache_size, "cache_size", at_least=0)
    if task.temperature is not None and not isinstance(task.temperature, int | float):
        raise ValueError(
            "`temperature` must be a number. To learn it, leave it out and give"
            f" `score_transform=LearnedTemperature()`. Received: {task.temperature!r}."
        )
    transform = task.score_transform
    if transform is not None and (not callable(transform) or isinstance(transform, type)):
        raise ValueError(
            f"`score_transform` must be a function or a layer. Received: {transform!r}."
        )
    if task.temperature is not None and isinstance(transform, LearnedTemperature):
        raise ValueError(
            "A `LearnedTemperature` is the temperature: leave `temperature` out. Received:"
            f" temperature={task.temperature}."
        )
    if task.temperature is not None and not task.temperature > 0:
        raise ValueError(f"`temperature` must be positive. Received: {task.temperature}.")
    if task.num_hard_negatives is not None:
        _validation.check_count(task.num_hard_negatives, "num_hard_negatives")
        if not task.in_batch_negatives:
            raise ValueError(
                "`num_hard_negatives` needs `in_batch_negatives=True`. Received:"
                f" num_hard_negatives={task.num_hard_negatives}, in_batch_negatives=False."
            )
    _validation.check_specs(task.feature_specs)
    reserved = sorted(set(task.feature_specs) & set(reserved_names))
    if reserved:
        raise ValueError(
            f"`feature_specs` must not use the names {reserved_names}. Received: {reserved}."
        )
    _check_candidate_id(task)
    if index is not None:
        if not isinstance(index, TreeIndex):
            raise ValueError(f"`index` must be a `TreeIndex`. Received: {index!r}.")
        if not task.cache_size:
            raise ValueError("`index` needs a cache. Received: cache_size=0.")
        check_weighting(task.frequency_correction, index, "frequency_correction")
        if task.corrector is not None and not index.store_embeddings:
            raise ValueError(
                "A `corrector` needs an index that stores embeddings. Received one with"
                " store_embeddings=False."
            )
        if task.corrector is not None and task.corrector.content_key is not None:
            raise ValueError(
                "A corrector with a `content_key` cannot be used with an `index`, whose nodes have"
                f" no content. Received: content_key={task.corrector.content_key!r}."
            )


def check_weighting(is_weighted: bool, index, name: str = "candidate_sampling_probability") -> None:
    """Checks that cached candidates are not weighted where an index draws from them."""
    if is_weighted and index is not None:
        raise ValueError(
            f"`{name}` cannot be used with an `index`, whose nodes know no weights of single"
            " candidates."
        )


def _check_candidate_id(task) -> None:
    key, specs = task.candidate_id_key, task.feature_specs
    if key is None:
        for name in ("remove_accidental_hits", "frequency_correction"):
            if getattr(task, name):
                raise ValueError(f"`{name}` needs a `candidate_id_key`. Received: None.")
        return
    _validation.check_id(key, specs, "candidate_id_key", "feature_specs")


def check_embeddings(queries: tf.Tensor, candidates: tf.Tensor) -> None:
    """Checks `query_embeddings` [B, d] and `candidate_embeddings` [N, d], N >= B."""
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


def check_negatives(negatives: tf.Tensor, queries: tf.Tensor) -> None:
    """Checks `negative_embeddings` [B, M, d]."""
    wanted = tf.TensorShape([queries.shape[0], None, queries.shape[1]])
    if not negatives.shape.is_compatible_with(wanted) or not negatives.dtype.is_floating:
        raise ValueError(
            "`negative_embeddings` must be floating point of shape [batch, negatives, dim], here"
            f" {wanted}. Received dtype {negatives.dtype.name}, shape {negatives.shape}."
        )


def check_frequency(value) -> None:
    """Checks `frequency_correction`."""
    if not isinstance(value, bool | FrequencyEstimator):
        raise ValueError(
            "`frequency_correction` must be True, False or a `FrequencyEstimator`. Received:"
            f" {value!r}."
        )


def check_id_kind(task, ids: tf.Tensor, name: str) -> None:
    """Checks that `ids` are strings where those of the task's candidates are, and only there."""
    wanted = tf.as_dtype(task.feature_specs[task.candidate_id_key].dtype)
    if (ids.dtype == tf.string) != (wanted == tf.string):
        raise ValueError(
            f"`{name}` must be of the kind of the feature {task.candidate_id_key!r},"
            f" {wanted.name}. Received dtype: {ids.dtype.name}."
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


def check_known_positives(ids, queries: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
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


def check_weights(weights: tf.Tensor, queries: tf.Tensor) -> tf.Tensor:
    """Returns `sample_weight` as [B] float32, B being the number of queries."""
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
