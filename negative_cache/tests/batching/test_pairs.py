"""Tests that pairs in memory are checked; those of datasets are in `test_shards`."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import GlobalContrastiveBatches
from negative_cache.batching.pairs import check_pairs
from negative_cache.tests.batching.contrastive_pairs import clusters


def test_pairs_become_arrays_or_stay_tensors():
    tensor = tf.range(3)
    pairs, num_pairs = check_pairs({"query": {"id": np.arange(3)}, "candidate": tensor})
    assert num_pairs == 3
    assert pairs["candidate"] is tensor and isinstance(pairs["query"]["id"], np.ndarray)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"query": np.arange(3)}, r"`pairs` must be .* Received: \['query'\]"),
        (np.arange(3), "`pairs` must be .* Received: ndarray"),
        ({"query": np.arange(3), "candidate": np.arange(2)}, r"rows.*\[2, 3\]"),
        ({"query": np.arange(0), "candidate": np.arange(0)}, r"at least one.*\[0\]"),
        ({"query": 1, "candidate": np.arange(2)}, "Received a scalar: 1"),
        (
            {"query": tf.ragged.constant([[1]]), "candidate": np.arange(1)},
            "`pairs` must be dense. Received: RaggedTensor",
        ),
        (tf.data.Dataset.range(3), "from_dataset` takes a `tf.data.Dataset`"),
        (
            {"query": np.array(["a", None, np.nan], object), "candidate": np.arange(3)},
            "objects with 2 other values. The first is None",
        ),
    ],
)
def test_pairs_that_do_not_fit(pairs, message):
    with pytest.raises(ValueError, match=message):
        GlobalContrastiveBatches(clusters()[0], pairs, 4)
