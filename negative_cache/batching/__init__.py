"""Batches of similar pairs, which have hard in-batch negatives.

Global contrastive batch sampling (Sachidananda, Yang and Zhu, ICML 2023, arXiv 2210.12874) orders
all pairs (x_i, y_i) so that pairs whose queries score high with each other's candidates are close
together. Then it cuts the order into batches. The model and the loss do not change.

| Step | Module |
| --- | --- |
| Check the features of pairs, and read their ids | `pairs`, `ids` |
| Make a graph of neighbors from embeddings, and an order from the graph | `order` |
| Grow batches on the graph, if wanted | `grow` |
| Move pairs apart that would be false negatives of each other | `keep_apart` |
| Plan an epoch, and make its batches | `plan` |
| Yield the batches of `fit`, of pairs in memory or of shards of a dataset | `batches`, `shards` |

Shapes: N pairs, batches of B pairs, embeddings of dimension d. The modules `grow` and
`keep_apart` only work with rows in NumPy, not with features or embeddings.
"""

from negative_cache.batching.batches import GlobalContrastiveBatches
from negative_cache.batching.order import contrastive_order, neighbor_graph
from negative_cache.ops.neighbor_graph import bandwidth

__all__ = ["GlobalContrastiveBatches", "bandwidth", "contrastive_order", "neighbor_graph"]
