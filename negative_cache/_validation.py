"""Checks of arguments, shared by everything that owns a cache.

A check returns its argument as tensors or arrays, or raises a `ValueError` that quotes the argument
it received.
"""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf


def to_numpy(values: object) -> np.ndarray:
    """Converts values to an array through TensorFlow, so that strings become bytes."""
    return tf.convert_to_tensor(values).numpy()


def check_specs(specs: Mapping[str, tf.io.FixedLenFeature]) -> dict[str, tf.io.FixedLenFeature]:
    """Checks that `specs` describe the features of a cache, and returns them as a new dict."""
    if not isinstance(specs, Mapping) or not specs:
        raise ValueError(
            "`specs` must map at least one feature name to a `tf.io.FixedLenFeature`. Received:"
            f" {specs!r}."
        )
    for key, spec in specs.items():
        is_spec = isinstance(spec, tf.io.FixedLenFeature)
        if not is_spec or not tf.TensorShape(spec.shape).is_fully_defined():
            raise ValueError(
                "`specs` must hold a `tf.io.FixedLenFeature` of known shape for every feature."
                f" Received for {key!r}: {spec!r}."
            )
    return dict(specs)


def check_count(value: object, name: str, *, at_least: int = 1) -> int:
    """Checks that an argument is a Python or NumPy integer >= `at_least`, and returns it as int."""
    try:
        count = operator.index(value)  # type: ignore[arg-type]  # The check itself.
    except TypeError:
        count = None
    if count is None or count < at_least:
        raise ValueError(f"`{name}` must be an integer >= {at_least}. Received: {value!r}.")
    return count


def check_embedding(key: str, specs: Mapping[str, tf.io.FixedLenFeature]) -> None:
    """Checks that the feature `key` of `specs` is an embedding.

    Raises:
      ValueError: if `key` is not in `specs`, or its feature is not floating point of rank 1.
    """
    if key not in specs:
        raise ValueError(
            "`embedding_key` must be one of the features in `specs`. Received:"
            f" {key!r}, and specs for {sorted(specs)}."
        )
    spec = specs[key]
    if len(spec.shape) != 1 or not tf.as_dtype(spec.dtype).is_floating:
        raise ValueError(
            f"The embedding must be floating point of shape [dim]. Received the spec: {spec}."
        )


def check_id(key: str, specs: Mapping[str, tf.io.FixedLenFeature], name: str, where: str) -> None:
    """Checks that a feature can be an id.

    Args:
      key: the name of the feature.
      specs: feature name -> spec.
      name: the argument that `key` was given as, for errors.
      where: the argument that `specs` were given as, for errors.

    Raises:
      ValueError: if `key` is not in `specs`, or its feature is not a scalar integer or string.
    """
    if key not in specs:
        raise ValueError(
            f"`{name}` must be one of the features in `{where}`. Received: {key!r}, and specs for"
            f" {sorted(specs)}."
        )
    dtype = tf.as_dtype(specs[key].dtype)
    if len(specs[key].shape) != 0 or not (dtype.is_integer or dtype == tf.string):
        raise ValueError(
            f"The feature `{name}` must be a scalar integer or string. Received the spec:"
            f" {specs[key]}."
        )


def check_rows(rows: tf.Tensor, num_rows: int, name: str) -> tf.Tensor:
    """Returns `rows` [n] as integers. In eager execution it also checks 0 <= rows < `num_rows`."""
    rows = tf.convert_to_tensor(rows)
    if rows.shape.rank not in (1, None) or not rows.dtype.is_integer:
        raise ValueError(
            f"`{name}` must be integers of shape [n]. Received dtype {rows.dtype.name}, shape"
            f" {rows.shape}."
        )
    if tf.executing_eagerly():
        wrong = tf.boolean_mask(rows, (rows < 0) | (rows >= num_rows)).numpy()
        if wrong.size:
            raise ValueError(
                f"`{name}` must lie between 0 and {num_rows - 1}. Received: {wrong[:5].tolist()}."
            )
    return rows


def check_keys(received: Iterable[str], wanted: Iterable[str], *, what: str, exact: bool) -> None:
    """Checks that the keys `received` are the keys `wanted`, or some of them if not `exact`."""
    received, wanted = set(received), set(wanted)
    if received - wanted or (exact and wanted - received):
        relation = "exactly" if exact else "some of"
        raise ValueError(
            f"`{what}` must have {relation} the keys {sorted(wanted)}. Received keys:"
            f" {sorted(received, key=str)}."
        )


def check_items(
    items: Mapping[str, tf.Tensor],
    specs: Mapping[str, tf.io.FixedLenFeature],
    *,
    what: str,
    exact: bool,
) -> dict[str, tf.Tensor]:
    """Checks a batch of items, or of parts of items, against the specs of a cache.

    Floating point features may have another floating point dtype, for instance in mixed precision,
    and are cast. No other dtype is converted, except the dtype of Python and NumPy values.

    Args:
      items: feature name -> [n, ...] values, the same n for every feature.
      specs: feature name -> spec of a single item's value.
      what: the name of the argument, for errors.
      exact: whether `items` must have every feature of `specs`, or only some.

    Returns:
      The items as tensors with the dtypes of `specs`.

    Raises:
      ValueError: if names, dtypes, shapes or numbers of items do not match.
    """
    if not isinstance(items, Mapping):
        raise ValueError(f"`{what}` must map feature names to values. Received: {items!r}.")
    check_keys(items, specs, what=what, exact=exact)
    if not items:
        raise ValueError(f"`{what}` must have some of the keys {sorted(specs)}. Received none.")
    items = {key: _check_feature(value, specs[key], what, key) for key, value in items.items()}
    sizes = {key: value.shape[0] for key, value in items.items()}
    if len(set(sizes.values()) - {None}) > 1:
        raise ValueError(
            f"Every feature of `{what}` must have the same number of items. Received: {sizes}."
        )
    return items


def check_fits(items: Mapping[str, tf.Tensor], cache_size: int, *, what: str) -> None:
    """Checks that a batch of items is no larger than the cache."""
    size = max((value.shape[0] or 0) for value in items.values())
    if size > cache_size:
        raise ValueError(
            f"A batch must fit into the cache. Received `{what}` of {size} rows for a `cache_size`"
            f" of {cache_size}."
        )


def check_mask(mask: tf.Tensor | None, like: tf.Tensor, *, what: str) -> tf.Tensor:
    """Returns `mask` as [n] bool, where `like` has n items. A mask of None becomes all True."""
    if mask is None:
        return tf.ones(tf.shape(like)[:1], tf.bool)
    mask = tf.convert_to_tensor(mask)
    if mask.dtype != tf.bool or not mask.shape.is_compatible_with(like.shape[:1]):
        raise ValueError(
            f"`{what}` must be boolean of shape {like.shape[:1]}. Received: {_describe(mask)}."
        )
    return mask


def check_indices(
    indices: tf.Tensor | None, like: tf.Tensor, *, what: str, needed_by: str
) -> tf.Tensor:
    """Returns `indices` as [n] int64, where `like` has n items."""
    if indices is None:
        raise ValueError(f"`{needed_by}` needs `{what}`. Received None.")
    indices = tf.convert_to_tensor(indices)
    if not indices.dtype.is_integer or not indices.shape.is_compatible_with(like.shape[:1]):
        raise ValueError(
            f"`{what}` must be integers of shape {like.shape[:1]}. Received: {_describe(indices)}."
        )
    return tf.cast(indices, tf.int64)


def _check_feature(value: Any, spec: tf.io.FixedLenFeature, what: str, key: str) -> tf.Tensor:
    dtype, shape = tf.as_dtype(spec.dtype), tf.TensorShape([None]).concatenate(spec.shape)
    wanted = f"`{what}[{key!r}]` must have dtype {dtype.name} and shape {shape}."
    has_dtype = tf.is_tensor(value) or isinstance(value, tf.Variable)
    try:
        value = tf.convert_to_tensor(value, None if has_dtype else dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{wanted} Received: {value!r}.") from error
    both_floating = value.dtype.is_floating and dtype.is_floating
    if (value.dtype != dtype and not both_floating) or not value.shape.is_compatible_with(shape):
        raise ValueError(f"{wanted} Received: {_describe(value)}.")
    return tf.cast(value, dtype) if value.dtype != dtype else value


def _describe(value: tf.Tensor) -> str:
    return f"dtype {value.dtype.name}, shape {value.shape}"
