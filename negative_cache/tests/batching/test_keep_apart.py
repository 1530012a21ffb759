"""Tests that pairs of one candidate are kept out of each other's batches."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from negative_cache.batching import keep_apart
from negative_cache.batching.ids import Ids


def separate(order, ids, batch_size):
    return keep_apart.separate(order, Ids(candidates=ids), batch_size)


def conflicts_by_definition(order, ids, batch_size):
    batches = [ids[order[i : i + batch_size]] for i in range(0, len(order), batch_size)]
    return sum(len(batch) - len(set(batch.tolist())) for batch in batches)


@st.composite
def problems(draw, feasible):
    """An order, ids and a batch size; if `feasible`, no id is in more pairs than full batches."""
    batch_size = draw(st.integers(1, 8))
    num_pairs = draw(st.integers(1, 60))
    most = max(num_pairs // batch_size, 1) if feasible else num_pairs
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = np.concatenate(
        [np.full(rng.integers(1, most + 1), number) for number in range(num_pairs)]
    )[:num_pairs]
    # Equal ids in a row or not.
    order = rng.permutation(num_pairs) if draw(st.booleans()) else np.arange(num_pairs)
    return order, ids, batch_size


@hypothesis.given(problems(feasible=True))
def test_no_conflict_is_left_where_no_id_is_too_frequent(problem):
    order, ids, batch_size = problem
    result = separate(order, ids, batch_size)
    assert sorted(result) == list(range(len(order)))
    assert conflicts_by_definition(result, ids, batch_size) == 0


@hypothesis.given(problems(feasible=False))
def test_as_few_conflicts_are_left_as_can_be(problem):
    order, ids, batch_size = problem
    before = conflicts_by_definition(order, ids, batch_size)
    assert keep_apart.count_conflicts(order, ids, batch_size) == before
    result = separate(order, ids, batch_size)
    assert sorted(result) == list(range(len(order)))
    after = conflicts_by_definition(result, ids, batch_size)
    assert after == keep_apart.unavoidable_conflicts(ids, batch_size)


@hypothesis.given(st.integers(1, 7), st.lists(st.integers(0, 3), min_size=1, max_size=7))
def test_unavoidable_conflicts_are_those_of_the_best_order(batch_size, ids):
    ids = np.unique(ids, return_inverse=True)[1]
    best = min(
        conflicts_by_definition(np.array(order), ids, batch_size)
        for order in itertools.permutations(range(len(ids)))
    )
    assert keep_apart.unavoidable_conflicts(ids, batch_size) == best


@pytest.mark.parametrize("num_batches", [2, 5])
def test_an_id_too_frequent_is_in_every_batch(num_batches):
    # 0 is in more than half of the pairs, the others are all different.
    num_pairs = 4 * num_batches
    ids = np.where(np.arange(num_pairs) < 3 * num_batches, 0, np.arange(num_pairs))
    result = separate(np.arange(num_pairs), ids, 4)
    assert np.all(np.any(ids[result].reshape([num_batches, 4]) == 0, axis=1))


def test_a_pair_waits_for_the_next_batch():
    # Only the second of the two 7 must wait: the batches after the next are as they were.
    ids = np.array([0, 1, 7, 7, 2, 3, 4, 5, 6, 8, 9, 10])
    result = separate(np.arange(12), ids, 4)
    assert result.tolist() == [0, 1, 2, 4, 3, 5, 6, 7, 8, 9, 10, 11]


def test_frequent_ids_are_spread():
    # 0 is in as many pairs as there are batches, all at the end.
    ids = np.array([1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0])
    result = separate(np.arange(12), ids, 3)
    assert result.tolist() == [0, 1, 8, 2, 3, 9, 4, 5, 10, 6, 7, 11]


def test_an_order_without_conflicts_stays():
    order = np.random.default_rng(0).permutation(20)
    np.testing.assert_array_equal(separate(order, np.arange(20), 6), order)
    assert separate(order[:0], order[:0], 6).shape == (0,)


@hypothesis.given(problems(feasible=False), st.integers(1, 30), st.integers(0, 2**16))
def test_known_queries_make_no_more_conflicts_of_candidates(problem, num_queries, seed):
    order, candidates, batch_size = problem
    queries = np.random.default_rng(seed).integers(0, num_queries, len(order))
    result = keep_apart.separate(order, Ids(queries, candidates), batch_size)
    assert sorted(result) == list(range(len(order)))
    after = conflicts_by_definition(result, candidates, batch_size)
    assert after == keep_apart.unavoidable_conflicts(candidates, batch_size)


def test_positives_of_one_query_are_kept_apart():
    # Four pairs of each of 100 queries, in a row.
    queries = np.repeat(np.arange(100), 4)
    for candidates in (None, np.arange(400) % 200):
        result = keep_apart.separate(np.arange(400), Ids(queries, candidates), 8)
        batches = queries[result].reshape([50, 8]).tolist()
        repeated = [len(batch) - len(set(batch)) for batch in batches]
        # 6 of 8 before; all but a few of the last now, for which nobody else is left.
        assert sum(repeated[:40]) == 0 and sum(repeated) < 30
