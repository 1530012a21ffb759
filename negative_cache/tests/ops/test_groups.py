"""Tests of groups of equal numbers: against Python's sets and lists."""

import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from negative_cache.ops.groups import Groups


@given(st.lists(st.integers(0, 5), max_size=12), st.data())
def test_groups(numbers, data):
    mask = data.draw(st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers)))
    groups = Groups.of(tf.constant(numbers, tf.int32), tf.constant(mask, tf.bool))
    wanted = sorted({n for n, m in zip(numbers, mask) if m})
    is_some = groups.is_some.numpy()
    assert groups.numbers.numpy()[is_some].tolist() == wanted
    sums = groups.sum(tf.constant([2.0**i for i in range(len(numbers))])).numpy()
    for place, number in enumerate(wanted):
        entries = [i for i, (n, m) in enumerate(zip(numbers, mask)) if m and n == number]
        assert sums[place] == sum(2.0**i for i in entries)
        assert groups.rank.numpy()[entries].tolist() == list(range(len(entries)))
