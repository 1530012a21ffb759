"""Sources of negatives: what stands beside the positive in the softmax of a retrieval loss.

| module | what it holds |
| --- | --- |
| `base` | `Negatives`, the protocol, and `Contribution`, what a source adds to a step |
| `batch` | `Batch`, the checked batch that every source is given, and `LogQ`, its correction |
| `batch_reader` | from the arguments of a call to a `Batch` |
| `in_batch`, `explicit` | the batch's other candidates; lists of negatives of each query |
| `uniform` | fresh negatives, drawn uniformly from a corpus or a memory of the stream |
| `drawn` | what sources have in common that draw candidates and encode them |
| `draws` | with what weights the queries use the rows that a step draws |
| `cached` | what the two caches share from step to step: the tower, metrics, refreshes, files |
| `step` | what the two caches do in a step: draw, encode, estimate, learn |
| `shard`, `pool` | the rows that a step draws from: of this replica, or of all replicas |
| `from_cache`, `from_corpus` | a cache that streams; a cache that holds a corpus |
| `samplers` | `Sampler`: the exact sampler and `TreeIndex` behind one call |
| `rows` | rows of a cache on their way through a step |
| `popularity` | the notice that popular candidates repeat and nothing corrects for it |
| `described` | the sources in the configuration of a task |
| `scores` | how a query and a candidate are scored |
| `checks` | checks of arguments |
"""

from negative_cache.layers._negatives.base import Contribution, Negatives
from negative_cache.layers._negatives.batch import Batch
from negative_cache.layers._negatives.explicit import Explicit
from negative_cache.layers._negatives.from_cache import CacheSpec, FromCache
from negative_cache.layers._negatives.from_corpus import FromCorpus
from negative_cache.layers._negatives.in_batch import InBatch
from negative_cache.layers._negatives.uniform import Uniform

__all__ = [
    "Batch",
    "CacheSpec",
    "Contribution",
    "Explicit",
    "FromCache",
    "FromCorpus",
    "InBatch",
    "Negatives",
    "Uniform",
]
