import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negative_cache.ops.tree.build import build_topology
from negative_cache.ops.tree.shape import TreeShape


def make_shape(leaf_size, num_leaves, widths, num_blocks, leaf_fill=0.6, node_fill=0.7):
    return TreeShape(
        capacity=leaf_size * num_leaves,
        dim=2,
        leaf_size=leaf_size,
        num_leaves=num_leaves,
        widths=widths,
        num_blocks=num_blocks,
        leaf_fill=leaf_fill,
        node_fill=node_fill,
    )


# Each has room for 200 points at least.
SHAPES = {
    1: make_shape(8, 70, (90,), (1,)),
    2: make_shape(8, 60, (11, 8), (1, 11)),
    3: make_shape(4, 100, (6, 5, 8), (1, 5, 22)),
}


def build(points, shape, seed=0, **kwargs):
    return build_topology(points, shape, rng=np.random.default_rng(seed), **kwargs)


def points_of_leaves(topology, points):
    return [points[row[row >= 0]] for row in topology.members if row[0] >= 0]


def used_first(table):
    """Whether no filled entry of a row comes after an empty one."""
    filled = table >= 0
    return np.array_equal(filled, np.sort(filled, axis=-1)[..., ::-1])


@given(
    st.integers(0, 2**31),
    st.sampled_from(sorted(SHAPES)),
    st.one_of(st.integers(0, 20), st.integers(20, 200)),
    st.booleans(),
)
def test_children_and_owners_are_one_tree_over_all_points(seed, levels, num_points, discrete):
    shape = SHAPES[levels]
    rng = np.random.default_rng(seed)
    points = rng.standard_normal([num_points, 3]).astype("f")
    topology = build(np.round(points) if discrete else points, shape, seed)

    assert topology.members.shape == (shape.num_leaves, shape.leaf_size)
    assert [table.shape for table in topology.children] == list(zip(shape.num_blocks, shape.widths))
    assert [owner.size for owner in topology.owners] == [*shape.num_blocks[1:], shape.num_leaves]
    for array in [*topology.children, *topology.owners, topology.members]:
        assert array.dtype == np.int32
        assert used_first(array)

    members = topology.members[topology.members >= 0]
    np.testing.assert_array_equal(np.sort(members), np.arange(num_points))
    is_used = [table[:, 0] >= 0 for table in [*topology.children[1:], topology.members]]
    for table, owner, used in zip(topology.children, topology.owners, is_used):
        # A block has an owner just if it has a child, and its owner's child is that block.
        np.testing.assert_array_equal(owner >= 0, used)
        np.testing.assert_array_equal(table.ravel()[owner[used]], np.flatnonzero(used))
        assert np.count_nonzero(table >= 0) == np.count_nonzero(used)


def test_neighbours_are_together_at_every_level():
    # Twelve clusters of four points, in three groups of four: leaves of 4 and blocks of 4.
    rng = np.random.default_rng(0)
    coarse = np.repeat(np.arange(3), 16)
    fine = np.repeat(np.arange(12), 4)
    points = np.stack([1000.0 * coarse, 10.0 * fine], axis=1) + rng.standard_normal([48, 2]) / 10
    shuffled = rng.permutation(48)
    shape = make_shape(4, 12, (3, 4), (1, 3), leaf_fill=1.0, node_fill=1.0)
    # k-means from random points need not find the clusters, but often does.
    for seed in range(20):
        topology = build(points[shuffled].astype("f"), shape, seed)
        leaves = fine[shuffled][topology.members]
        if (leaves == leaves[:, :1]).all():
            blocks = coarse[shuffled][topology.members[topology.children[1], 0]]
            if (blocks == blocks[:, :1]).all():
                return
    raise AssertionError("Leaves and blocks mix well separated clusters.")


def test_uses_the_fills_of_the_shape_where_there_is_room():
    points = np.random.default_rng(0).standard_normal([120, 3]).astype("f")
    topology = build(points, make_shape(10, 100, (100, 10), (1, 100), 0.5, 0.8))
    # 120 / (0.5 * 10) = 24 leaves, 24 / (0.8 * 10) = 3 blocks.
    assert np.count_nonzero(topology.owners[1] >= 0) == 24
    assert np.count_nonzero(topology.owners[0] >= 0) == 3


@pytest.mark.parametrize(
    "shape",
    [
        make_shape(10, 13, (13,), (1,), 0.5),
        make_shape(10, 12, (12,), (1,), 0.5),
        make_shape(10, 99, (12,), (1,), 0.5),
        make_shape(10, 99, (3, 4), (1, 3), 0.5, 0.5),
        make_shape(10, 99, (3, 4), (1, 99), 0.5, 0.5),
        make_shape(10, 12, (2, 2, 3), (1, 9, 9), 0.5, 0.5),
    ],
)
def test_fills_more_where_there_is_no_room(shape):
    points = np.random.default_rng(0).standard_normal([120, 3]).astype("f")
    topology = build(points, shape)
    np.testing.assert_array_equal(np.sort(topology.members[topology.members >= 0]), np.arange(120))
    with pytest.raises(ValueError, match="Received: 131 points or blocks for 1[23] blocks"):
        build(np.zeros([131, 3], "f"), shape)


def test_reports_progress_of_the_points():
    placed = []
    points = np.random.default_rng(0).standard_normal([150, 3]).astype("f")
    build(points, SHAPES[3], on_progress=placed.append)
    assert sum(placed) == 150


def test_leaves_are_grouped_by_their_unweighted_means():
    # Two leaves a block. The leaves at 0, 1 and 10, 11 have means that pair them, whatever
    # number of points they have.
    values = np.repeat([0.0, 1.0, 10.0, 11.0], [1, 4, 4, 1])[:, np.newaxis].astype("f")
    shape = make_shape(4, 4, (2, 2), (1, 2), leaf_fill=0.625, node_fill=1.0)
    found = False
    for seed in range(20):
        topology = build(values, shape, seed)
        leaves = [np.unique(leaf) for leaf in points_of_leaves(topology, values)]
        if all(leaf.size == 1 for leaf in leaves) and len(leaves) == 4:
            pairs = [sorted(leaves[leaf][0] for leaf in row) for row in topology.children[1]]
            assert sorted(pairs) == [[0.0, 1.0], [10.0, 11.0]]
            found = True
    assert found
