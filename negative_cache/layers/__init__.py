"""Keras layers that hold state: the retrieval task, its sources of negatives, and their parts."""

from negative_cache.layers._negatives import (
    Batch,
    CacheSpec,
    Contribution,
    Explicit,
    FromCache,
    FromCorpus,
    InBatch,
    Negatives,
    Uniform,
)
from negative_cache.layers.cache import Cache
from negative_cache.layers.cached_retrieval import CachedRetrieval
from negative_cache.layers.corrector import Corrector
from negative_cache.layers.drift_corrector import DriftCorrector
from negative_cache.layers.frequency import FrequencyEstimator
from negative_cache.layers.nystrom_corrector import NystromCorrector
from negative_cache.layers.retrieval import Retrieval
from negative_cache.layers.temperature import LearnedTemperature
from negative_cache.layers.tree_index import TreeIndex

__all__ = [
    "Batch",
    "Cache",
    "CacheSpec",
    "CachedRetrieval",
    "Contribution",
    "Corrector",
    "DriftCorrector",
    "Explicit",
    "FrequencyEstimator",
    "FromCache",
    "FromCorpus",
    "InBatch",
    "LearnedTemperature",
    "Negatives",
    "NystromCorrector",
    "Retrieval",
    "TreeIndex",
    "Uniform",
]
