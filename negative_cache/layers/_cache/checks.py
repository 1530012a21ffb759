"""Checks of what a caller hands to a `Cache`."""

import tensorflow as tf

from negative_cache.layers.tree_index import TreeIndex


def check_index(
    index: TreeIndex,
    cache_size: int,
    embedding: tf.io.FixedLenFeature,
    *,
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
