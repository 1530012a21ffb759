"""Checks of the pairs to batch, in memory or in a dataset, before they are embedded."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from negative_cache import _features
from negative_cache._features import Features, Specs

_EXAMPLE_PAIRS = '{"query": queries, "candidate": candidates}'


def check_pairs(pairs: Mapping[str, Features]) -> tuple[dict[str, Features], int]:
    """Checks features of pairs. Returns them as arrays or tensors, and the number of pairs."""
    if isinstance(pairs, tf.data.Dataset):
        raise ValueError(
            "`pairs` must be features in memory. `GlobalContrastiveBatches.from_dataset` takes a"
            f" `tf.data.Dataset`. Received: {pairs!r}."
        )
    if not isinstance(pairs, Mapping) or not {"query", "candidate"} <= set(pairs):
        received = sorted(pairs) if isinstance(pairs, Mapping) else type(pairs).__name__
        raise ValueError(
            f"`pairs` must be a dictionary such as {_EXAMPLE_PAIRS}. Each entry is an array or a"
            f" dictionary of arrays. Received: {received}."
        )
    arrays = tf.nest.map_structure(_as_array, dict(pairs))
    sizes = sorted({len(values) for values in tf.nest.flatten(arrays)})
    if len(sizes) != 1 or not sizes[0]:
        raise ValueError(
            "All features of `pairs` must have the same number of rows, at least one. Received:"
            f" {sizes}."
        )
    return arrays, sizes[0]


def check_dataset(
    dataset: tf.data.Dataset, query_id_key: str | None, candidate_id_key: str | None
) -> dict[str, Specs]:
    """Checks a dataset of single pairs, and returns the specs of its elements."""
    spec = getattr(dataset, "element_spec", None)
    if not isinstance(spec, Mapping) or not {"query", "candidate"} <= set(spec):
        raise ValueError(
            f"`dataset` must be a `tf.data.Dataset` of dictionaries, single pairs {_EXAMPLE_PAIRS}."
            f" Received elements: {spec!r}."
        )
    parts = tf.nest.flatten(dict(spec))
    if not all(isinstance(part, tf.TensorSpec) for part in parts):
        raise ValueError(f"Features of `dataset` must be dense. Received elements: {spec!r}.")
    # If these are batches, all features have the same first dimension, or None.
    sizes = {part.shape[0] if part.shape.rank else "one" for part in parts}
    ids = []
    for name, key in (("query", query_id_key), ("candidate", candidate_id_key)):
        if key is not None:
            ids.append(_features.id_feature(spec[name], key, name))
    if sizes == {None} or any(part.shape.rank for part in ids):
        raise ValueError(
            "`dataset` must hold single pairs. If it holds batches, use `dataset.unbatch()`."
            f" Received elements: {spec!r}."
        )
    if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "`dataset` must be finite, because a pass over it must end. Repeat the resulting"
            " batches instead. Received a dataset of infinite cardinality."
        )
    return dict(spec)


def _as_array(values: Any) -> np.ndarray | tf.Tensor:
    if isinstance(values, (tf.RaggedTensor, tf.SparseTensor)):
        raise ValueError(f"Features of `pairs` must be dense. Received: {type(values).__name__}.")
    array = values if tf.is_tensor(values) else np.asarray(values)
    if not len(array.shape):
        raise ValueError(
            "Features of `pairs` must be arrays or tensors with a row for each pair. Convert lists"
            f" with `np.asarray`. Received a scalar: {values!r}."
        )
    if isinstance(array, np.ndarray) and array.dtype == object:
        is_text = np.array([isinstance(value, (str, bytes)) for value in array.flat], bool)
        if not is_text.all():
            value = array.flat[np.argmin(is_text)]
            raise ValueError(
                "Features of `pairs` must be numbers or strings without missing values. Received an"
                f" array of objects with {np.sum(~is_text)} other values. The first is {value!r}."
            )
    return array
