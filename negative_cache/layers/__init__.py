"""Keras layers that hold state: the cache, and the retrieval task that trains against it."""

from negative_cache.layers.cache import Cache
from negative_cache.layers.cached_retrieval import CachedRetrieval

__all__ = ["Cache", "CachedRetrieval"]
