"""Construction of a tree in NumPy on the host: which candidates share a leaf, which nodes a parent.

A tree has node levels 0 to L - 1, and leaves below them. The nodes of a level are the rows of its
blocks. The children of a node are the rows of one block of the next level, or the slots of one leaf
if the node is on the last level. Level 0 is a single block, the root block. The address of a row is
block · width + row.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from negative_cache.ops._clustering import max_groups, partition, read_rows
from negative_cache.ops.tree.shape import TreeShape

# Coordinates that are read at a time to compute means.
_BLOCK_ENTRIES = 2**22


class Topology(NamedTuple):
    """The children and parents of a tree.

    The used blocks and leaves of a level come first, and so do the used rows of a block.

    Attributes:
      children: for each node level, [num_blocks, width] int32: the block of the next level that
        each row owns, or the leaf if it is the last level; -1 in an empty row.
      owners: for each node level except level 0, and then for the leaves, [num_blocks] int32: the
        address, one level up, of the row that owns each block or leaf; -1 if it is unused.
      members: [num_leaves, leaf_size] int32, the candidate in each slot; -1 in an empty slot.
    """

    children: list[np.ndarray]
    owners: list[np.ndarray]
    members: np.ndarray


def build_topology(
    points: np.ndarray,
    shape: TreeShape,
    *,
    rng: np.random.Generator,
    on_progress: Callable[[int], None] | None = None,
) -> Topology:
    """Builds a tree over points from its leaves to its root.

    Neighbouring points form leaves, leaves with neighbouring means form blocks, and so on up to the
    root block. Leaves and blocks are filled as the shape says, or more if there is not enough room.

    Args:
      points: [n, d] float, finite, of any floating dtype. They may be memory-mapped, and are not
        copied as a whole.
      shape: the sizes of the tree.
      rng: makes all random choices.
      on_progress: function of a number of points, called each time that so many more points have
        been assigned to leaves.

    Returns:
      The `Topology`. Candidate i is row i of `points`.

    Raises:
      ValueError: if the points do not fit into the tree.
    """
    levels = len(shape.widths)
    available = _available(shape)
    fill = _fitting_fill(
        len(points), shape.leaf_size, shape.leaf_fill, available[levels], "`leaf_size`"
    )
    groups = partition(points, shape.leaf_size, fill=fill, rng=rng, on_progress=on_progress)
    members, _ = _tabulate(groups, shape.num_leaves, shape.leaf_size)
    means = _means(points, members)
    children: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    for level in reversed(range(levels)):
        width = shape.widths[level]
        if level:
            fill = _fitting_fill(
                len(means), width, shape.node_fill, available[level], f"`widths[{level}]`"
            )
            groups = partition(means, width, fill=fill, rng=rng)
        else:
            groups = np.zeros([len(means)], np.int32)
        table, used_owners = _tabulate(groups, shape.num_blocks[level], width)
        num_below = shape.num_leaves if level == levels - 1 else shape.num_blocks[level + 1]
        children.insert(0, table)
        owners.insert(0, _padded(used_owners, num_below))
        means = _means(means, table)
    return Topology(children, owners, members)


def _available(shape: TreeShape) -> list[int]:
    """The number of usable blocks of each node level, and then of usable leaves.

    A block is usable if a row of the level above can own it.
    """
    available = [1]
    for width, num_below in zip(shape.widths, [*shape.num_blocks[1:], shape.num_leaves]):
        available.append(min(num_below, available[-1] * width))
    return available


def _fitting_fill(count: int, size: int, fill: float, available: int, name: str) -> float:
    """The smallest fill >= `fill` with which `count` points or blocks fit `available` blocks."""
    if count > available * size:
        raise ValueError(
            "A level of the tree must have room for all points or blocks of the level below."
            f" Received: {count} points or blocks for {available} blocks with {name} = {size}."
        )
    if max_groups(count, size, fill) <= available:
        return fill
    # The quotient may have been rounded down, so it is raised slightly.
    return min(count / (available * size) * (1.0 + 1e-9), 1.0)


def _tabulate(groups: np.ndarray, num_blocks: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Gives every entry of `groups` [n] a row in the block of its group.

    Returns:
      table: [num_blocks, width] int32, the entry in each row, in ascending order; -1 if empty.
      addresses: [n] int32, the row of each entry.
    """
    sizes = np.bincount(groups, minlength=num_blocks)
    # Added to an entry's position in the order of the groups, this gives its address.
    shifts = np.arange(num_blocks) * width - (np.cumsum(sizes) - sizes)
    order = np.argsort(groups, kind="stable")
    addresses = np.arange(order.size) + shifts[groups[order]]
    table = np.full([num_blocks * width], -1, np.int32)
    table[addresses] = order
    by_entry = np.empty([order.size], np.int32)
    by_entry[order] = addresses
    return table.reshape([num_blocks, width]), by_entry


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    return np.pad(values, [0, size - values.size], constant_values=-1)


def _means(points: np.ndarray, table: np.ndarray) -> np.ndarray:
    """[used, d] float32, the mean point of each used block of a `table` [num_blocks, width]."""
    num_used = np.count_nonzero(table[:, 0] >= 0)
    dim = points.shape[1]
    means = np.empty([num_used, dim], np.float32)
    step = max(_BLOCK_ENTRIES // (table.shape[1] * dim), 1)
    for start in range(0, num_used, step):
        part = table[start : min(start + step, num_used)]
        filled = part >= 0
        sizes = filled.sum(axis=1)
        members = read_rows(points, part[filled])
        sums = np.add.reduceat(members, np.cumsum(sizes) - sizes, axis=0)
        means[start : start + step] = sums / sizes[:, np.newaxis]
    return means
