"""Tests of `BatchPlan`, and of how an order is cut."""

import dataclasses

import numpy as np
import pytest

from negative_cache.batching import plan
from negative_cache.tests.batching.contrastive_pairs import assert_each_once, make_plan


def test_a_plan_is_checked_once_and_does_not_change():
    batch_plan = make_plan(batch_size=np.int64(8))
    assert type(batch_plan.batch_size) is int
    assert batch_plan.group_size == 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch_plan.seed = 1
    with pytest.raises(ValueError, match="`group_size` must divide `batch_size`. Received: 3 and"):
        dataclasses.replace(batch_plan, group_size=3)


def test_the_number_of_batches():
    assert [make_plan().num_batches(n) for n in (0, 7, 8, 9)] == [0, 1, 1, 2]
    dropping = make_plan(drop_remainder=True)
    assert [dropping.num_batches(n) for n in (0, 7, 8, 9)] == [0, 0, 1, 1]
    dropping.check_not_empty(8)
    with pytest.raises(ValueError, match="Received: 7 pairs and `batch_size=8`"):
        dropping.check_not_empty(7)


def test_the_random_fraction_of_an_epoch():
    some = make_plan(start_epoch=2, random_fraction=0.25)
    assert [some.random_fraction_of(epoch) for epoch in range(4)] == [1.0, 1.0, 0.25, 0.25]
    schedule = make_plan(start_epoch=2, random_fraction=lambda epoch: epoch / 4)
    assert [schedule.random_fraction_of(epoch) for epoch in range(4)] == [1.0, 1.0, 0.5, 0.75]
    with pytest.raises(ValueError, match=r"`random_fraction\(epoch\)` must lie .* Received: 1.25"):
        schedule.random_fraction_of(5)


def test_groups_of_the_rest_move_too():
    in_rest = set()
    for seed in range(20):
        cut = plan.cut_batches(np.arange(22), 8, group_size=2, rng=np.random.default_rng(seed))
        assert [len(batch) for batch in cut] == [8, 8, 6]
        assert_each_once(cut, 22)
        assert all(np.all(batch[1::2] == batch[::2] + 1) for batch in cut)
        in_rest |= set(cut[-1].tolist())
    assert in_rest == set(range(22))


def test_a_small_random_fraction_mixes_two_batches():
    cut = plan.cut_batches(np.arange(40), 4, random_fraction=0.01, rng=np.random.default_rng(0))
    assert sum(np.ptp(batch) != 3 for batch in cut) == 2
