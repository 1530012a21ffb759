"""Exact retrieval metrics over a whole corpus, without a top-k.

The metrics only need the rank of each positive, which is the number of candidates that score
higher. Counting these block by block costs one matmul and one comparison, and needs no [Q, C]
matrix. The ranks give recall@k for every k, and the MRR.

`evaluate` computes metrics from towers and datasets. The callback `CorpusMetrics` calls it at the
end of an epoch. Its two steps, `positive_ranks` and `retrieval_metrics`, work on
embeddings. All three are in `ranks`. `validation_set` reads the validation batches, and `corpus`
encodes the corpus. Under a strategy `replicas` divides it.

Shapes: Q queries, C candidates (the corpus), M positives (one or several for each query),
dimension d.
"""

from negative_cache._towers import Encoder, encoders_of
from negative_cache.evaluation.ranks import (
    check_cutoffs,
    evaluate,
    positive_ranks,
    retrieval_metrics,
)
from negative_cache.evaluation.validation_set import rows_of

__all__ = [
    "Encoder",
    "check_cutoffs",
    "encoders_of",
    "evaluate",
    "positive_ranks",
    "retrieval_metrics",
    "rows_of",
]
