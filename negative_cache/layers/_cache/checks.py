"""Checks of the arguments of a `Cache`."""

from collections.abc import Mapping, Sequence

import tensorflow as tf

from negative_cache import _validation
from negative_cache.layers._cache.writer import RowUpdates
from negative_cache.layers.tree_index import TreeIndex


def check_index(
    index: TreeIndex,
    cache_size: int,
    embedding: tf.io.FixedLenFeature,
    *,
    saved: bool,
    is_filled_at_once: bool,
) -> None:
    """Checks that `index` fits the rows of a cache.

    Args:
      index: the index.
      cache_size: C, the number of rows.
      embedding: the spec of the embedding.
      saved: whether files hold the rows of the cache.
      is_filled_at_once: whether the cache covers a corpus.

    Raises:
      ValueError: if it does not fit.
    """
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
            "An index over the rows of a cache that streams must store embeddings. Without them, it"
            " cannot start empty. Received an index with store_embeddings=False."
        )
    if index.get_config()["saved"] != saved:
        raise ValueError(
            "`index` must be saved if and only if the cache is, because a tree is useless without"
            f" its rows. Received an index with saved={not saved} and a cache with saved={saved}."
        )


def check_on_host(on_host: Sequence[str], embedding_key: str, index: TreeIndex | None) -> None:
    """Checks that the embeddings are not on the host if every step reads all of them."""
    if embedding_key in on_host and index is None:
        raise ValueError(
            "Without an `index`, every step reads all embeddings, so they cannot be `on_host`."
            f" Received: {on_host!r}."
        )


def check_sharded(sharded: bool, row_key: str | None) -> None:
    """Checks that the rows of a cache can be divided among replicas.

    Raises:
      ValueError: if the cache is none of a corpus.
    """
    if sharded and row_key is None:
        raise ValueError(
            "Only a cache that covers a corpus, with a `row_key`, can be `sharded`: the caches that"
            ' stream are one pool by `pool="replicas"` of their source. Received: row_key=None.'
        )


def check_updates(
    items: Mapping[str, tf.Tensor] | None,
    indices: tf.Tensor | None,
    mask: tf.Tensor | None,
    specs: Mapping[str, tf.io.FixedLenFeature],
) -> RowUpdates | None:
    """New values of existing rows, checked.

    Args:
      items: feature name -> [m, ...], for any of the features in `specs`; None for no updates.
      indices: [m] int, the rows.
      mask: [m] bool; entries with False change nothing. None for all.
      specs: feature name -> spec.

    Raises:
      ValueError: if names, dtypes or shapes do not match.
    """
    if items is None:
        return None
    items = _validation.check_items(items, specs, what="updated_item_data", exact=False)
    like = next(iter(items.values()))
    indices = _validation.check_indices(
        indices, like, what="updated_item_indices", needed_by="updated_item_data"
    )
    mask = _validation.check_mask(mask, like, what="updated_item_mask")
    return RowUpdates(items, indices, mask)
