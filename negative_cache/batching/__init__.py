"""Which pairs share a batch: batches of similar pairs have hard in-batch negatives.

Global contrastive batch sampling (Sachidananda, Yang and Zhu, ICML 2023, arXiv 2210.12874) orders
all pairs (x_i, y_i) so that those whose queries score high with each other's candidates are near
one another, and cuts the order into batches. The model and the loss stay as they are.

| Step | Module |
| --- | --- |
| Features of pairs are checked, and their ids read | `pairs`, `ids` |
| Embeddings become a graph of neighbors, and the graph an order | `order` |
| Batches are grown on the graph, if wanted | `grow` |
| Pairs that would be false negatives of each other are moved apart | `keep_apart` |
| The steps of an epoch, by one plan | `plan` |
| The batches of `fit`: of pairs in memory, or of shards of a dataset | `batches`, `shards` |

N pairs, batches of B, embeddings of dimension d. Modules other than `order`, `plan` and what uses
them know rows only, in NumPy.
"""

from negative_cache.batching.batches import GlobalContrastiveBatches
from negative_cache.batching.order import contrastive_order, neighbor_graph
from negative_cache.ops.neighbor_graph import bandwidth

__all__ = ["GlobalContrastiveBatches", "bandwidth", "contrastive_order", "neighbor_graph"]
