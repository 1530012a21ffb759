"""What `CachedRetrieval` checks of its arguments. Nothing here computes."""

import tensorflow as tf

from negative_cache import _validation
from negative_cache.layers.tree_index import TreeIndex

REDUCTIONS = ("sum_over_batch_size", "sum", "none")


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
                raise ValueError(f"`{name}=True` needs a `candidate_id_key`. Received: None.")
        return
    if key not in specs:
        raise ValueError(
            "`candidate_id_key` must be one of the features in `feature_specs`. Received:"
            f" {key!r}, and specs for {sorted(specs)}."
        )
    dtype = tf.as_dtype(specs[key].dtype)
    if len(specs[key].shape) != 0 or not (dtype.is_integer or dtype == tf.string):
        raise ValueError(
            f"The candidate id must be a scalar integer or string. Received the spec: {specs[key]}."
        )


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
