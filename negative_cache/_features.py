"""Features of queries and candidates: one tensor, or a dictionary of tensors.

A batch of n rows is one tensor [n, ...], or a dictionary of such tensors. A single tensor has the
name of its side, "candidate" or "query". A cache holds the tensor under this name, and
`candidate_id_key` and `query_id_key` refer to it by this name.

Tensors may be ragged or sparse, and most functions also take NumPy arrays. This module calls no
tower.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import tensorflow as tf

# Values of n rows: [n, ...].
Values: TypeAlias = tf.Tensor | tf.RaggedTensor | tf.SparseTensor | np.ndarray
Features: TypeAlias = Values | Mapping[str, Values]
Spec: TypeAlias = tf.io.FixedLenFeature | tf.TypeSpec
Specs: TypeAlias = Spec | Mapping[str, Spec]

_Part = TypeVar("_Part")
_FeaturesT = TypeVar("_FeaturesT", bound=Features)

# The name of a candidate's only feature if its features are a single tensor.
ONE_FEATURE = "candidate"


def as_dict(features: _Part | Mapping[str, _Part], side: str = ONE_FEATURE) -> Mapping[str, _Part]:
    """Returns features or specs as a dictionary, in which a single one has the name of its side.

    Args:
      features: one tensor or spec, or a dictionary of them.
      side: "candidate" or "query".
    """
    return features if isinstance(features, Mapping) else {side: features}


def as_given(by_name: Mapping[str, _Part], is_one: bool) -> _Part | Mapping[str, _Part]:
    """Returns features or specs as they were before `as_dict`.

    Args:
      by_name: a dictionary of features of candidates, or of their specs.
      is_one: whether they were a single one.
    """
    return by_name[ONE_FEATURE] if is_one else by_name


def id_key_of(features: Features | Specs, key: str | None, side: str = ONE_FEATURE) -> str | None:
    """Returns `key`, or if it is None and the features are one tensor, the name of this tensor.

    Args:
      features: one tensor or spec, or a dictionary of them.
      key: the argument `candidate_id_key` or `query_id_key`.
      side: "candidate" or "query".
    """
    return side if key is None and not isinstance(features, Mapping) else key


def id_feature(
    features: _Part | Mapping[str, _Part], key: str | None, side: str = ONE_FEATURE
) -> _Part:
    """Returns the feature, or its spec, that the argument `{side}_id_key` names.

    Args:
      features: one tensor or spec, or a dictionary of them.
      key: the argument, see `id_key_of`.
      side: "candidate" or "query".

    Raises:
      ValueError: if `key` is not the name of a feature.
    """
    by_name, key = as_dict(features, side), id_key_of(features, key, side)
    if key is None or key not in by_name:
        note = "" if by_name is features else ", the name of a single tensor"
        raise ValueError(
            f"`{side}_id_key` must be one of the features of a {side}, {sorted(by_name)}{note}."
            f" Received: {key!r}."
        )
    return by_name[key]


def fingerprint(ids: tf.Tensor) -> tf.Tensor:
    """Converts `ids` to [n] int64, so that ids of every dtype are compared as integers."""
    return (
        tf.strings.to_hash_bucket_fast(ids, 2**63 - 1)
        if ids.dtype == tf.string
        else tf.cast(ids, tf.int64)
    )


def are_of_one_kind(dtype: tf.DType, other: tf.DType) -> bool:
    """Whether ids of two dtypes can be compared: both are strings, or neither is."""
    return (dtype == tf.string) == (other == tf.string)


def specs_of_rows(
    dataset: tf.data.Dataset,
) -> tf.io.FixedLenFeature | dict[str, tf.io.FixedLenFeature]:
    """Reads `feature_specs`, the specs of one row, from a dataset of batches.

    Args:
      dataset: batches of features.

    Returns:
      A dictionary of `tf.io.FixedLenFeature`, or a single one if a batch is a single tensor.

    Raises:
      ValueError: if `dataset` has no `element_spec`, or a feature is not dense.
    """
    element = getattr(dataset, "element_spec", None)
    if element is None:
        raise ValueError(
            "`feature_specs` can only be taken from a `tf.data.Dataset`. Received: None, and"
            f" {type(dataset).__name__}."
        )
    parts: Mapping[str, tf.TypeSpec] = as_dict(element)
    for key, part in parts.items():
        is_tensor = isinstance(part, tf.TensorSpec) and part.shape.rank is not None
        if not is_tensor or part.shape.rank < 1 or not part.shape[1:].is_fully_defined():
            raise ValueError(
                "Features must be tensors [n, ...] with only the batch dimension unknown. Received"
                f" for {key!r}: {part!r}."
            )
    specs = {
        key: tf.io.FixedLenFeature(list(part.shape[1:]), part.dtype) for key, part in parts.items()
    }
    return as_given(specs, parts is not element)


def blank(shape: Sequence[int], dtype: str | tf.DType) -> tf.Tensor:
    """Returns a tensor of zeros, or of empty strings."""
    return tf.fill(shape, "") if tf.as_dtype(dtype) == tf.string else tf.zeros(shape, dtype)


def example_of(specs: Mapping[str, Spec], num_rows: int = 1) -> dict[str, tf.Tensor]:
    """Returns features of `num_rows` rows of zeros or empty strings that match `specs`."""
    return {key: blank([num_rows, *spec.shape], spec.dtype) for key, spec in specs.items()}


def specs_of_any_size(features: Features) -> Specs:
    """Returns the specs of batches like `features`, with any number of rows.

    NumPy arrays and scalars are returned unchanged.
    """
    return tf.nest.map_structure(_spec_of_any_size, features)


def take(features: Features, rows: np.ndarray) -> Features:
    """Returns rows of a nest of arrays and tensors, as tensors."""
    return tf.nest.map_structure(
        lambda values: (
            tf.convert_to_tensor(values[rows])
            if isinstance(values, np.ndarray)
            else tf.gather(values, rows)
        ),
        features,
    )


def first_rows(features: _FeaturesT, count: int) -> _FeaturesT:
    """Returns the first `count` rows of features.

    Raises:
      ValueError: if they are those of one row, and no batch.
    """
    check_batched(features)
    return tf.nest.map_structure(lambda values: values[:count], features)


def num_rows(features: Features) -> int:
    """Returns the number of rows of features that are arrays or tensors of known size.

    Raises:
      ValueError: if they are those of one row, and no batch.
    """
    check_batched(features)
    return int(tf.nest.flatten(features)[0].shape[0])


def check_batched(features: Features) -> None:
    """Raises a `ValueError` if a feature is a scalar, and so none of a batch."""
    for values in tf.nest.flatten(features):
        if tf.TensorShape(getattr(values, "shape", None)).rank == 0:
            raise ValueError(
                "Features must come in batches, [n, ...]. Received a scalar: is a `.batch(…)` of"
                " the dataset missing?"
            )


def concatenate(parts: Sequence[_Part]) -> _Part:
    """Concatenates the rows of all `parts`, which are nests of arrays."""
    return tf.nest.map_structure(lambda *values: np.concatenate(values), *parts)


def _spec_of_any_size(values: Any) -> Any:
    if not tf.is_tensor(values) or not values.shape.rank:
        return values
    shape = [None, *values.shape[1:]]
    if isinstance(values, tf.RaggedTensor):
        return tf.RaggedTensorSpec(shape, values.dtype, values.ragged_rank, values.row_splits.dtype)
    if isinstance(values, tf.SparseTensor):
        return tf.SparseTensorSpec(shape, values.dtype)
    return tf.TensorSpec(shape, values.dtype)
