"""Small trees that the tests of `TreeIndex` share."""

import functools

import numpy as np

from negative_cache.layers import TreeIndex
from negative_cache.layers._tree import make as make_module
from negative_cache.tests.tree_invariants import log_partition

DIM = 6


def make_index(capacity=300, **arguments):
    return TreeIndex(capacity, DIM, **{"leaf_size": 6, "branching": 4, "beam": 2, **arguments})


def clustered(rng, count, dim=DIM):
    """Vectors of four clusters: [count, dim] float32."""
    centres = np.random.default_rng(0).normal(size=[4, dim])
    rows = centres[rng.integers(4, size=count)] + 0.2 * rng.normal(size=[count, dim])
    return rows.astype(np.float32)


def queries_of(rng, count, scale=3.0):
    return (scale * rng.normal(size=[count, DIM])).astype(np.float32)


@functools.cache
def _shared_index(root_width, **arguments):
    return make_index(**arguments)


def index_of(rows, **arguments):
    """An index that was built over `rows`.

    It is the one that an earlier test was given for the same arguments, filled anew: what it has to
    trace takes longer than most tests.
    """
    index = _shared_index(make_module._MAX_ROOT_WIDTH, **arguments)
    index.num_skipped.assign(0)
    index.index(rows, verbose=0)
    return index


def filled_index(rng, count=200, **arguments):
    """An index of `count` candidates, as `index_of` has it, and their numbers and vectors."""
    rows = clustered(rng, count)
    return index_of(rows, **arguments), dict(enumerate(rows))


def assert_bounds(index, queries, vectors, **arguments):
    lower, upper = index.log_partition_bounds(queries, **arguments)
    expected = log_partition(queries, vectors)
    assert np.all(lower.numpy() <= expected), lower.numpy() - expected
    assert np.all(upper.numpy() >= expected), upper.numpy() - expected
    return upper.numpy() - lower.numpy()
