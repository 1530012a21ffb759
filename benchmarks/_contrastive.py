"""Pairs and losses that the benchmarks of contrastive batches share."""

import numpy as np
import tensorflow as tf

import negative_cache as nc
from negative_cache import demo

SHUFFLED, ORDERED, GROWN = "shuffled", "ordered", "grown"


class Pairs:
    """The training pairs as features, of which some may be there twice."""

    def __init__(self, data: demo.Data, options):
        train, duplicates = data.corpus.train[: options.max_pairs], options.duplicates
        copies = np.random.default_rng(0).choice(train, int(duplicates * len(train)), False)
        rows = np.concatenate([train, copies])
        ids = np.concatenate([train, len(data.corpus) + np.arange(len(copies))]).astype(np.int32)
        candidates = {"ids": data.code_ids[rows], "row": ids}
        self.features = {"query": data.query_ids[rows], "candidate": candidates}
        self.num_pairs = len(rows)


def loss_of_all(queries, candidates, positives, temperature: float) -> float:
    """The mean softmax loss over all candidates; row i of `positives` is that of query i."""
    partition = [
        nc.ops.sample_softmax(queries[start : start + 1024] / temperature, candidates).log_partition
        for start in range(0, len(queries), 1024)
    ]
    positive_scores = tf.reduce_sum(queries * positives, axis=1) / temperature
    return float(tf.reduce_mean(tf.concat(partition, axis=0) - positive_scores))
