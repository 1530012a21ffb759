"""Keras layers that hold state: the cache, the tree index, and the retrieval task."""

from negative_cache.layers.cache import Cache
from negative_cache.layers.cached_retrieval import CachedRetrieval
from negative_cache.layers.tree_index import TreeIndex

__all__ = ["Cache", "CachedRetrieval", "TreeIndex"]
