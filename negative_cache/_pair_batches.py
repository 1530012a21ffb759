"""From an order of pairs to the batches of an epoch, and the features of those batches.

NumPy only knows rows here; nothing is embedded. N pairs, batches of B.
"""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from negative_cache import _batch_conflicts


def cut_batches(
    order: np.ndarray,
    batch_size: int,
    *,
    random_fraction: float = 0.0,
    ids: np.ndarray | None = None,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Cuts an order into batches, and puts the batches in random sequence.

    Args:
      order: [N] int, a permutation.
      batch_size: B.
      random_fraction: share of the batches of B whose pairs are shuffled among these batches.
      ids: [N] int; pairs with the same are kept apart where they can be.
      rng: draws everything.

    Returns:
      Rows of the batches. The last one is shorter where B does not divide N.
    """
    order = np.array(order)
    num_full = len(order) // batch_size
    full = order[: num_full * batch_size].reshape([num_full, batch_size])
    mixed = rng.choice(num_full, round(random_fraction * num_full), replace=False)
    full[mixed] = rng.permutation(full[mixed].reshape([-1])).reshape([-1, batch_size])
    if ids is not None:
        order = _batch_conflicts.separate_ids(order, ids, batch_size)
    full = order[: num_full * batch_size].reshape([num_full, batch_size])
    rest = order[num_full * batch_size :]
    return [*full[rng.permutation(num_full)], *([rest] if len(rest) else [])]


def check_pairs(pairs) -> tuple[dict, int]:
    """Checks features of pairs, and returns them as arrays or tensors, and N."""
    if not isinstance(pairs, Mapping) or not {"query", "candidate"} <= set(pairs):
        received = sorted(pairs) if isinstance(pairs, Mapping) else type(pairs).__name__
        raise ValueError(
            f'`pairs` must be a dictionary with "query" and "candidate". Received: {received}.'
        )
    pairs = tf.nest.map_structure(_as_array, dict(pairs))
    sizes = sorted({len(values) for values in tf.nest.flatten(pairs)})
    if len(sizes) != 1 or not sizes[0]:
        raise ValueError(
            "All features of `pairs` must have the same number of rows, at least one. Received:"
            f" {sizes}."
        )
    return pairs, sizes[0]


def check_fraction(fraction, name: str) -> float:
    """Checks that an argument is a share, from 0 to 1."""
    if not np.isscalar(fraction) or not 0.0 <= fraction <= 1.0:
        raise ValueError(f"`{name}` must lie between 0 and 1. Received: {fraction!r}.")
    return float(fraction)


def take(features, rows: np.ndarray):
    """Rows of features, a nest of arrays and tensors, as tensors."""
    return tf.nest.map_structure(
        lambda values: (
            tf.convert_to_tensor(values[rows])
            if isinstance(values, np.ndarray)
            else tf.gather(values, rows)
        ),
        features,
    )


def num_rows(features) -> int:
    """N, of features of N rows."""
    return len(tf.nest.flatten(features)[0])


def concatenate(parts: list):
    """Rows of all `parts`, nests of arrays, one after the other."""
    return tf.nest.map_structure(lambda *values: np.concatenate(values), *parts)


def _as_array(values):
    array = values if tf.is_tensor(values) else np.asarray(values)
    if not len(array.shape):
        raise ValueError(f"Features of `pairs` must have rows. Received a scalar: {values!r}.")
    return array
