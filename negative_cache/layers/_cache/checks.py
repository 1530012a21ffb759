"""Checks of what a caller hands to a `Cache`."""

from collections.abc import Sequence

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


def check_on_host(on_host: Sequence[str], embedding_key: str, index: TreeIndex | None) -> None:
    """Checks that the embeddings are not on the host where every step needs all of them."""
    if embedding_key in on_host and index is None:
        raise ValueError(
            "Without an `index` the embeddings are all read at every step, and cannot be"
            f" `on_host`. Received: {on_host!r}."
        )
