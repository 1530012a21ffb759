"""Exact retrieval metrics over a whole corpus, without a top-k.

Only the ranks of each query's positives are needed: the number of candidates that score higher.
Counting them block by block costs one matmul and one comparison, holds no [Q, C] matrix, and every
recall@k and the MRR follow from it.

`evaluate` goes from towers and datasets to metrics; the callback `CorpusMetrics` calls it at the
end of an epoch. `positive_ranks` and `retrieval_metrics` are its two steps, on embeddings; both are
in `ranks`. How validation batches are read is in `held_out`.

Shapes: Q queries, C candidates (the corpus), M positives, one or several a query, dimension d.
"""

from negative_cache._towers import Encoder, encoders_of
from negative_cache.evaluation.held_out import rows_of
from negative_cache.evaluation.ranks import (
    check_cutoffs,
    evaluate,
    positive_ranks,
    retrieval_metrics,
)

__all__ = [
    "Encoder",
    "check_cutoffs",
    "encoders_of",
    "evaluate",
    "positive_ranks",
    "retrieval_metrics",
    "rows_of",
]
