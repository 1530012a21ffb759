"""From an order of pairs to the batches of an epoch, and the features of those batches.

NumPy only knows rows here; nothing is embedded. N pairs, batches of B.
"""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from negative_cache import _batch_conflicts, _features
from negative_cache._pair_ids import NOT_KNOWN, Ids


def cut_batches(
    order: np.ndarray,
    batch_size: int,
    *,
    group_size: int | None = None,
    random_fraction: float = 0.0,
    ids: Ids = NOT_KNOWN,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Cuts an order into batches, and puts the batches in random sequence.

    Args:
      order: [N] int, a permutation.
      batch_size: B.
      group_size: how many consecutive pairs stay together, a divisor of B; B where None. A batch
        is made of random groups.
      random_fraction: share of the batches of B whose pairs are shuffled among these batches. They
        are two at least, where it is not 0.
      ids: of the pairs; what would be false negatives of each other is kept apart.
      rng: draws everything.

    Returns:
      Rows of the batches. The last one is shorter where B does not divide N.
    """
    order = np.array(order)
    num_full = len(order) // batch_size
    if group_size not in (None, batch_size):
        groups = order[: len(order) // group_size * group_size].reshape([-1, group_size])
        groups[:] = rng.permutation(groups)
    full = order[: num_full * batch_size].reshape([num_full, batch_size])
    num_mixed = round(random_fraction * num_full)
    if random_fraction:
        num_mixed = min(max(num_mixed, 2), num_full)
    mixed = rng.choice(num_full, num_mixed, replace=False)
    full[mixed] = rng.permutation(full[mixed].reshape([-1])).reshape([-1, batch_size])
    order = _batch_conflicts.separate(order, ids, batch_size)
    full = order[: num_full * batch_size].reshape([num_full, batch_size])
    rest = order[num_full * batch_size :]
    return [*full[rng.permutation(num_full)], *([rest] if len(rest) else [])]


_WANTED = '{"query": queries, "candidate": candidates}'


def check_pairs(pairs) -> tuple[dict, int]:
    """Checks features of pairs, and returns them as arrays or tensors, and N."""
    if isinstance(pairs, tf.data.Dataset):
        raise ValueError(
            "`pairs` must be features in memory; `GlobalContrastiveBatches.from_dataset` takes a"
            f" `tf.data.Dataset`. Received: {pairs!r}."
        )
    if not isinstance(pairs, Mapping) or not {"query", "candidate"} <= set(pairs):
        received = sorted(pairs) if isinstance(pairs, Mapping) else type(pairs).__name__
        raise ValueError(
            f"`pairs` must be a dictionary such as {_WANTED}, each an array or a dictionary of"
            f" arrays. Received: {received}."
        )
    pairs = tf.nest.map_structure(_as_array, dict(pairs))
    sizes = sorted({len(values) for values in tf.nest.flatten(pairs)})
    if len(sizes) != 1 or not sizes[0]:
        raise ValueError(
            "All features of `pairs` must have the same number of rows, at least one. Received:"
            f" {sizes}."
        )
    return pairs, sizes[0]


def check_dataset(dataset, query_id_key: str | None, candidate_id_key: str | None) -> dict:
    """Checks a dataset of single pairs, and returns the specification of its elements."""
    spec = getattr(dataset, "element_spec", None)
    if not isinstance(spec, Mapping) or not {"query", "candidate"} <= set(spec):
        raise ValueError(
            f"`dataset` must be a `tf.data.Dataset` of dictionaries, single pairs {_WANTED}."
            f" Received elements: {spec!r}."
        )
    parts = tf.nest.flatten(dict(spec))
    if not all(isinstance(part, tf.TensorSpec) for part in parts):
        raise ValueError(f"Features of `dataset` must be dense. Received elements: {spec!r}.")
    # Of batches: as many of everything, or any number.
    sizes = {part.shape[0] if part.shape.rank else "one" for part in parts}
    ids = []
    for name, key in (("query", query_id_key), ("candidate", candidate_id_key)):
        if key is not None:
            ids.append(_features.id_feature(spec[name], key, name))
    if sizes == {None} or any(part.shape.rank for part in ids):
        raise ValueError(
            "`dataset` must hold single pairs: `dataset.unbatch()` has those of batches. Received"
            f" elements: {spec!r}."
        )
    if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ValueError(
            "`dataset` must be finite, for a pass over it has an end: repeat the result, not what"
            " it is made of. Received a dataset of infinite cardinality."
        )
    return dict(spec)


def check_fraction(fraction, name: str) -> float:
    """Checks that an argument is a share, from 0 to 1."""
    try:
        value = float(fraction)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"`{name}` must lie between 0 and 1. Received: {fraction!r}.")
    return value


def _as_array(values):
    if isinstance(values, (tf.RaggedTensor, tf.SparseTensor)):
        raise ValueError(f"Features of `pairs` must be dense. Received: {type(values).__name__}.")
    array = values if tf.is_tensor(values) else np.asarray(values)
    if not len(array.shape):
        raise ValueError(
            "Features of `pairs` must be arrays or tensors of a row a pair; make arrays of lists"
            f" with `np.asarray`. Received a scalar: {values!r}."
        )
    if isinstance(array, np.ndarray) and array.dtype == object:
        is_text = np.array([isinstance(value, (str, bytes)) for value in array.flat], bool)
        if not is_text.all():
            value = array.flat[np.argmin(is_text)]
            raise ValueError(
                "Features of `pairs` must be numbers or strings without missing values. Received an"
                f" array of objects with {np.sum(~is_text)} others, the first of them {value!r}."
            )
    return array
