"""How an index over a cache's embeddings follows the updates of the cache."""

from collections.abc import Callable

import tensorflow as tf

from negative_cache.layers.tree_index import TreeIndex
from negative_cache.ops.groups import Groups


def check_index(
    index: TreeIndex,
    cache_size: int,
    embedding: tf.io.FixedLenFeature,
    saved: bool,
    is_filled_at_once: bool,
) -> None:
    """Checks that `index` is for rows of a cache."""
    if not isinstance(index, TreeIndex):
        raise ValueError(f"`index` must be a `TreeIndex`. Received: {index!r}.")
    wanted, received = (cache_size, embedding.shape[0]), (index.capacity, index.embedding_dim)
    if received != wanted:
        raise ValueError(
            "`index` must have the capacity and the dimension of the cache. Received: capacity ="
            f" {received[0]}, embedding_dim = {received[1]}. Wanted: {wanted[0]} and {wanted[1]}."
        )
    if not index.store_embeddings and not is_filled_at_once:
        raise ValueError(
            "An index over the rows of a cache that streams must store embeddings: without, it"
            " cannot grow from an empty cache. Received an index with store_embeddings=False."
        )
    if index.get_config()["saved"] != saved:
        raise ValueError(
            "`index` must be saved if, and only if, the cache is: a tree of other rows is of no"
            f" use. Received an index with saved={not saved} and a cache with saved={saved}."
        )


def follow(
    index: TreeIndex,
    is_filled: Callable[[tf.Tensor], tf.Tensor],
    rows: tf.Tensor,
    embeddings: tf.Tensor,
    mask: tf.Tensor,
) -> None:
    """Brings `index` up to date with rows whose embeddings have changed.

    Args:
      index: over the rows.
      is_filled: rows [n] -> [n] bool, which of them hold a candidate.
      rows: [n] int64; a row may come several times.
      embeddings: [n, d], those of the rows as they are now.
      mask: [n] bool, which of the rows have changed.
    """
    numbers = tf.cast(rows, tf.int32)
    mask &= Groups.of(numbers, mask).rank == 0
    mask &= is_filled(rows)
    index.update(numbers, embeddings, mask)
