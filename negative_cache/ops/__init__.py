"""Stateless TensorFlow functions: the mathematics of the package, without Keras or variables.

Shapes: B queries of dimension d, C candidates, S draws per query. Scores and log partitions are
float32, whatever the dtype of the embeddings. No gradient flows through a function unless its
docstring says so.
"""

from negative_cache.ops.cache_rows import OldestRows, insertion_rows, masked_rows, oldest_rows
from negative_cache.ops.softmax_sampling import (
    SoftmaxSample,
    merge_samples,
    sample_softmax,
    sample_softmax_with_gradient,
)
from negative_cache.ops.top_k import top_k_scores

__all__ = [
    "OldestRows",
    "SoftmaxSample",
    "insertion_rows",
    "masked_rows",
    "merge_samples",
    "oldest_rows",
    "sample_softmax",
    "sample_softmax_with_gradient",
    "top_k_scores",
]
