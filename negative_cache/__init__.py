"""Drop-in losses and layers that train dual encoders against enormous pools of negatives.

Everything that most users need can be imported from this package. The modules of the published
Google Research API keep their names and places, and are attributes of the package:
`negative_cache`, `losses`, `handlers`, `retrieval_fns`, `filter_fns` and `util`.
"""

# `_compat` comes first: it rejects an environment in which the other imports would fail.
from negative_cache import (  # noqa: F401
    _compat,
    batching,
    datasets,
    evaluation,
    filter_fns,
    handlers,
    layers,
    losses,
    negative_cache,
    ops,
    retrieval_fns,
    util,
)
from negative_cache.backup import BackupAndRestore
from negative_cache.batching import GlobalContrastiveBatches, contrastive_order
from negative_cache.callbacks import CacheRefresh, CacheSummaries, CacheWarmStart, CorpusMetrics
from negative_cache.layers import (
    Batch,
    Cache,
    CachedRetrieval,
    CacheSpec,
    Contribution,
    Corrector,
    Explicit,
    FrequencyEstimator,
    FromCache,
    FromCorpus,
    InBatch,
    LearnedTemperature,
    Negatives,
    NystromCorrector,
    Retrieval,
    TreeIndex,
    Uniform,
)
from negative_cache.models import DualEncoder
from negative_cache.version import __version__

__all__ = [
    "BackupAndRestore",
    "Batch",
    "Cache",
    "CacheRefresh",
    "CacheSpec",
    "CacheSummaries",
    "CacheWarmStart",
    "CachedRetrieval",
    "Contribution",
    "CorpusMetrics",
    "Corrector",
    "DualEncoder",
    "Explicit",
    "FrequencyEstimator",
    "FromCache",
    "FromCorpus",
    "GlobalContrastiveBatches",
    "InBatch",
    "LearnedTemperature",
    "Negatives",
    "NystromCorrector",
    "Retrieval",
    "TreeIndex",
    "Uniform",
    "__version__",
    "batching",
    "contrastive_order",
    "datasets",
    "evaluation",
    "filter_fns",
    "handlers",
    "layers",
    "losses",
    "negative_cache",
    "ops",
    "retrieval_fns",
    "util",
]
