"""Handlers: Keras layers that own the caches of a cache loss and keep them up to date.

A handler computes the loss of a batch and writes the fresh embeddings that the loss returns to
their rows. Then the batch's positives enter the cache. A handler holds its caches as
`layers.Cache`, whose variables are updated in place.
"""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import tensorflow as tf

from negative_cache import _validation, util
from negative_cache._compat import keras
from negative_cache.layers.cache import Cache
from negative_cache.losses import CacheLossReturn, DocNetwork
from negative_cache.negative_cache import CacheManager, NegativeCache
from negative_cache.ops import contrastive

CacheLossFn: TypeAlias = Callable[..., CacheLossReturn]

_SOURCE = "cache"


class _Handler(keras.layers.Layer):
    """The base of both handlers: caches of named sources, and a training step with them."""

    def __init__(
        self,
        cache_managers: Mapping[str, CacheManager],
        cache_loss: CacheLossFn,
        embedding_key: str,
        data_keys: Sequence[str],
        use_cross_replica: bool,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        data_keys = (data_keys,) if isinstance(data_keys, str) else tuple(data_keys)
        _check_arguments(cache_managers, cache_loss, embedding_key, data_keys)
        self.cache_loss = cache_loss
        self.embedding_key = embedding_key
        self.data_keys = data_keys
        self.use_cross_replica = use_cross_replica
        # Keras would search a dict for layers.
        self.cache_managers = types.MappingProxyType(dict(cache_managers))
        self._caches = {
            source: Cache(manager.specs, manager.cache_size, embedding_key, manager.use_lru)
            for source, manager in cache_managers.items()
        }
        # TensorFlow checkpoints leave out layers that Keras 3 finds in a dict.
        self._checkpointed = tf.train.Checkpoint(caches=dict(self._caches))
        self.built = True

    def _as_negative_caches(self) -> dict[str, NegativeCache]:
        return {source: cache.as_negative_cache() for source, cache in self._caches.items()}

    def _step(
        self,
        item_network: DocNetwork,
        query_embeddings: tf.Tensor,
        pos_item_embeddings: tf.Tensor,
        features: Mapping[str, tf.Tensor],
        masks: Mapping[str, tf.Tensor],
    ) -> tf.Tensor:
        """Computes the loss and updates the caches.

        `masks` maps each source to [B] bool, True for the new items that enter its cache.
        """
        new_items = self._new_items(pos_item_embeddings, features)
        loss = CacheLossReturn(
            *self.cache_loss(
                doc_network=item_network,
                query_embeddings=query_embeddings,
                pos_doc_embeddings=pos_item_embeddings,
                cache=self._as_negative_caches(),
            )
        )
        _write_summaries(loss)
        updates = self._refreshed_rows(loss)
        if self.use_cross_replica:
            new_items = {key: _concat_replicas(value) for key, value in new_items.items()}
            masks = {source: _concat_replicas(mask) for source, mask in masks.items()}
            updates = {source: _concat_updates(update) for source, update in updates.items()}
        for source, cache in self._caches.items():
            cache.update(
                new_items=new_items, new_items_mask=masks[source], **updates.get(source, {})
            )
        return loss.training_loss

    def _new_items(
        self, pos_item_embeddings: tf.Tensor, features: Mapping[str, tf.Tensor]
    ) -> dict[str, tf.Tensor]:
        missing = set(self.data_keys) - set(features)
        if missing:
            raise ValueError(
                f"`features` must have the data keys {list(self.data_keys)}. Received keys:"
                f" {sorted(features)}."
            )
        new_items = {key: features[key] for key in self.data_keys}
        new_items[self.embedding_key] = tf.stop_gradient(pos_item_embeddings)
        return new_items

    def _refreshed_rows(self, loss: CacheLossReturn) -> dict[str, dict[str, tf.Tensor]]:
        """Returns source -> the arguments of `Cache.update` that write the fresh embeddings."""
        data = loss.updated_item_data or {}
        _validation.check_keys(data, self._caches, what="updated_item_data", exact=False)
        masks = loss.updated_item_mask or {}
        return {
            source: {
                "updated_item_data": data[source],
                "updated_item_indices": loss.updated_item_indices[source],
                "updated_item_mask": masks.get(source),
            }
            for source in data
            if data[source]
        }


class CacheLossHandler(_Handler):
    """Owns one cache.

    Args:
      cache_manager: a `CacheManager` with the features and the size of the cache.
      cache_loss: a `losses.CacheLoss`, or any callable with its signature. It is called with
        keyword arguments. It may return the updates of its only source without a source name.
      embedding_key: the feature that holds the embeddings.
      data_keys: the features that the item network encodes. The cache holds exactly these features
        and the embeddings.
      use_cross_replica: if True, the batches of all replicas enter every replica's cache, and so do
        the rows that any replica has refreshed. The caches stay equal. If False, each replica's
        cache takes the batches of its own replica. Use False with
        `DistributedCacheClassificationLoss`: it joins the caches of all replicas, so an item in
        every cache would be a candidate several times.
      **kwargs: arguments of a Keras layer, for instance `name`.

    Raises:
      ValueError: if the features of `cache_manager` are not `data_keys` and `embedding_key`.

    Examples:
      >>> from negative_cache.losses import CacheClassificationLoss
      >>> specs = {
      ...     "id": tf.io.FixedLenFeature([], tf.int64),
      ...     "embedding": tf.io.FixedLenFeature([2], tf.float32),
      ... }
      >>> handler = CacheLossHandler(
      ...     CacheManager(specs, cache_size=3, use_lru=False),
      ...     CacheClassificationLoss("embedding", ["id"]),
      ...     embedding_key="embedding",
      ...     data_keys=["id"],
      ... )
      >>> loss = handler.update_cache_and_compute_loss(
      ...     lambda features: tf.one_hot(features["id"], 2),
      ...     query_embeddings=tf.eye(2),
      ...     pos_item_embeddings=tf.eye(2),
      ...     features={"id": tf.constant([8, 9], tf.int64)},
      ... )
      >>> handler.cache.data["id"].numpy().tolist()
      [8, 9, 0]
    """

    def __init__(
        self,
        cache_manager: CacheManager,
        cache_loss: CacheLossFn,
        embedding_key: str,
        data_keys: Sequence[str],
        use_cross_replica: bool = False,
        **kwargs: Any,
    ):
        super().__init__(
            {_SOURCE: cache_manager},
            cache_loss,
            embedding_key,
            data_keys,
            use_cross_replica,
            **kwargs,
        )

    @property
    def cache_manager(self) -> CacheManager:
        """The manager that the handler was made with."""
        return self.cache_managers[_SOURCE]

    @property
    def cache(self) -> NegativeCache:
        """The cache. Its data are the live variables."""
        return self._caches[_SOURCE].as_negative_cache()

    def update_cache_and_compute_loss(
        self,
        item_network: DocNetwork,
        query_embeddings: tf.Tensor,
        pos_item_embeddings: tf.Tensor,
        features: Mapping[str, tf.Tensor],
    ) -> tf.Tensor:
        """Computes the loss of a batch against the current cache, then updates the cache.

        Writes the summaries `cache/interpretable_prediction_loss` and `cache/staleness`.

        Args:
          item_network: items' features (feature name -> [n, ...]) -> embeddings [n, d].
          query_embeddings: [B, d].
          pos_item_embeddings: [B, d], the embeddings of the queries' positive items.
          features: feature name -> [B, ...], the features of the positive items, with at least
            the `data_keys`.

        Returns:
          The training loss.

        Raises:
          ValueError: if `features` lack a data key.
        """
        masks = {_SOURCE: tf.ones(tf.shape(pos_item_embeddings)[:1], tf.bool)}
        return self._step(item_network, query_embeddings, pos_item_embeddings, features, masks)

    def _refreshed_rows(self, loss: CacheLossReturn) -> dict[str, dict[str, tf.Tensor]]:
        data = loss.updated_item_data or {}
        names_sources = all(part is None or isinstance(part, Mapping) for part in data.values())
        if not names_sources:
            loss = loss._replace(
                updated_item_data={_SOURCE: data},
                updated_item_indices={_SOURCE: loss.updated_item_indices},
                updated_item_mask={_SOURCE: loss.updated_item_mask},
            )
        return super()._refreshed_rows(loss)


class MultiCacheLossHandler(_Handler):
    """Owns several caches, whose candidates are all negatives.

    Args:
      cache_managers: source -> `CacheManager` with the features and the size of its cache.
      cache_loss: a `losses.CacheLoss`, or any callable with its signature. It is called with
        keyword arguments.
      embedding_key: the feature that holds the embeddings.
      data_keys: the features that the item network encodes. A cache holds exactly these features
        and the embeddings.
      use_cross_replica: if True, the batches of all replicas enter every replica's caches, and so
        do the rows that any replica has refreshed. The caches stay equal. If False, each replica's
        caches take the batches of its own replica. Use False with
        `DistributedCacheClassificationLoss`: it joins the caches of all replicas, so an item in
        every cache would be a candidate several times.
      **kwargs: arguments of a Keras layer, for instance `name`.

    Raises:
      ValueError: if there is no cache manager, or one whose features are not `data_keys` and
        `embedding_key`.
    """

    def __init__(
        self,
        cache_managers: Mapping[str, CacheManager],
        cache_loss: CacheLossFn,
        embedding_key: str,
        data_keys: Sequence[str],
        use_cross_replica: bool = False,
        **kwargs: Any,
    ):
        super().__init__(
            cache_managers, cache_loss, embedding_key, data_keys, use_cross_replica, **kwargs
        )

    @property
    def cache(self) -> dict[str, NegativeCache]:
        """Source -> cache. The data of a cache are the live variables."""
        return self._as_negative_caches()

    def update_cache_and_compute_loss(
        self,
        item_network: DocNetwork,
        query_embeddings: tf.Tensor,
        pos_item_embeddings: tf.Tensor,
        features: Mapping[str, tf.Tensor],
        new_items_cache: str | Mapping[str, tf.Tensor] | None = None,
    ) -> tf.Tensor:
        """Computes the loss of a batch against the current caches, then updates the caches.

        Writes the summaries `cache/interpretable_prediction_loss` and `cache/staleness`.

        Args:
          item_network: items' features (feature name -> [n, ...]) -> embeddings [n, d].
          query_embeddings: [B, d].
          pos_item_embeddings: [B, d], the embeddings of the queries' positive items.
          features: feature name -> [B, ...], the features of the positive items, with at least
            the `data_keys`.
          new_items_cache: the caches that the positive items enter. It is the name of one source,
            or source -> [B] bool mask of the items that enter its cache. No item enters the cache
            of a source that is absent. If None, all items enter every cache.

        Returns:
          The training loss.

        Raises:
          ValueError: if `features` lack a data key, or `new_items_cache` names an unknown source.
        """
        masks = self._new_items_masks(new_items_cache, tf.shape(pos_item_embeddings)[:1])
        return self._step(item_network, query_embeddings, pos_item_embeddings, features, masks)

    def _new_items_masks(
        self, new_items_cache: str | Mapping[str, tf.Tensor] | None, shape: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """Returns source -> [B] bool, True for the new items that enter its cache."""
        if new_items_cache is None:
            return {source: tf.ones(shape, tf.bool) for source in self._caches}
        if not isinstance(new_items_cache, Mapping):
            new_items_cache = {new_items_cache: tf.ones(shape, tf.bool)}
        _validation.check_keys(new_items_cache, self._caches, what="new_items_cache", exact=False)
        nothing = tf.zeros(shape, tf.bool)
        return {source: new_items_cache.get(source, nothing) for source in self._caches}


def _write_summaries(loss: CacheLossReturn) -> None:
    interpretable_loss = contrastive.mean_or_zero(tf.convert_to_tensor(loss.interpretable_loss))
    tf.summary.scalar("cache/interpretable_prediction_loss", interpretable_loss)
    staleness = contrastive.mean_or_zero(tf.convert_to_tensor(loss.staleness))
    tf.summary.scalar("cache/staleness", staleness)


def _concat_replicas(value: tf.Tensor) -> tf.Tensor:
    return util.cross_replica_concat(tf.convert_to_tensor(value), axis=0)


def _concat_updates(update: Mapping[str, Any]) -> dict[str, Any]:
    """Concatenates the arguments of `Cache.update` that write fresh rows, over all replicas."""
    data, mask = update["updated_item_data"], update["updated_item_mask"]
    return {
        "updated_item_data": {key: _concat_replicas(value) for key, value in data.items()},
        "updated_item_indices": _concat_replicas(update["updated_item_indices"]),
        "updated_item_mask": None if mask is None else _concat_replicas(mask),
    }


def _check_arguments(
    cache_managers: Mapping[str, CacheManager],
    cache_loss: CacheLossFn,
    embedding_key: str,
    data_keys: Sequence[str],
) -> None:
    if not callable(cache_loss):
        raise ValueError(f"`cache_loss` must be callable. Received: {cache_loss!r}.")
    if not isinstance(cache_managers, Mapping) or not cache_managers:
        raise ValueError(
            "`cache_managers` must map at least one source to a `CacheManager`. Received:"
            f" {cache_managers!r}."
        )
    for source, manager in cache_managers.items():
        if not isinstance(manager, CacheManager):
            raise ValueError(f"A `CacheManager` is needed for {source!r}. Received: {manager!r}.")
        if set(manager.specs) != {embedding_key, *data_keys}:
            raise ValueError(
                "A cache must hold the `data_keys` and the `embedding_key` and nothing else."
                f" Received `data_keys` = {list(data_keys)} and `embedding_key` ="
                f" {embedding_key!r} for a cache {source!r} of {sorted(manager.specs)}."
            )
