"""Keras layers that hold state: the cache, correctors, the tree index, and the retrieval task."""

from negative_cache.layers.cache import Cache
from negative_cache.layers.cached_retrieval import CachedRetrieval
from negative_cache.layers.corrector import Corrector
from negative_cache.layers.drift_corrector import DriftCorrector
from negative_cache.layers.frequency import FrequencyEstimator
from negative_cache.layers.nystrom_corrector import NystromCorrector
from negative_cache.layers.temperature import LearnedTemperature
from negative_cache.layers.tree_index import TreeIndex

__all__ = [
    "Cache",
    "CachedRetrieval",
    "Corrector",
    "DriftCorrector",
    "FrequencyEstimator",
    "LearnedTemperature",
    "NystromCorrector",
    "TreeIndex",
]
