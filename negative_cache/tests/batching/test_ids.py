"""Tests of which pairs share a query or a candidate."""

import types

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import GlobalContrastiveBatches
from negative_cache.batching.ids import Ids, OpenBatch
from negative_cache.tests.batching.contrastive_pairs import clusters, pairs_of


@pytest.mark.parametrize("convert", [np.asarray, tf.constant])
def test_codes_of_integers_and_strings(convert):
    ids = Ids.from_arrays(3, convert([7, 5, 7]), convert(["b", "b", "a"]))
    np.testing.assert_array_equal(ids.queries, [1, 0, 1])
    np.testing.assert_array_equal(ids.candidates, [1, 1, 0])
    assert Ids.from_arrays(3, None, None) == Ids()


def test_an_open_batch_takes_no_false_negative():
    # The query of the pairs 0 and 3 has the candidates 0 and 1; 4 is another pair of candidate 2.
    ids = Ids(np.array([0, 1, 2, 0, 3]), np.array([0, 1, 2, 1, 2]))
    order = np.array([4, 3, 2, 1, 0])
    batch = OpenBatch(ids, order)
    batch.add(4)
    assert [bool(batch.can_take(place)) for place in range(4)] == [True, False, True, False]
    batch.add(2)
    assert [bool(batch.can_take(place)) for place in (0, 1, 3)] == [False, False, False]
    batch.clear()
    assert all(batch.can_take(place) for place in range(5))


def test_ids_of_a_single_feature_and_of_the_task():
    pairs = {"query": np.arange(24) // 3, "candidate": np.arange(24) % 12}
    towers = (lambda ids: tf.one_hot(ids, 24),) * 2
    batches = GlobalContrastiveBatches(
        towers, pairs, 4, query_id_key="query", candidate_id_key="candidate", verbose=0
    )
    np.testing.assert_array_equal(batches._ids.queries, pairs["query"])
    np.testing.assert_array_equal(batches._ids.candidates, pairs["candidate"])

    model = types.SimpleNamespace(
        query_network=towers[0],
        candidate_network=towers[1],
        task=types.SimpleNamespace(candidate_id_key="candidate"),
    )
    batches = GlobalContrastiveBatches(model, pairs, 4, verbose=0)
    for i in range(6):
        assert len(set(batches[i]["candidate"].numpy())) == 4
    dataset = tf.data.Dataset.from_tensor_slices(pairs)
    for batch in GlobalContrastiveBatches.from_dataset(model, dataset, 4):
        assert len(set(batch["candidate"].numpy())) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate_ids": np.arange(3)}, r"`candidate_ids` must be .* shape \[24\]"),
        ({"query_ids": np.arange(3)}, r"`query_ids` must be .* shape \[24\]"),
        ({"candidate_id_key": "id"}, r"`candidate_id_key` must be .* \['candidate'\]. .*'id'"),
        ({"query_id_key": "id"}, r"`query_id_key` must be one of .* a query, \['query'\]. .*'id'"),
    ],
)
def test_ids_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        GlobalContrastiveBatches(clusters()[0], pairs_of(24), 4, **change)
