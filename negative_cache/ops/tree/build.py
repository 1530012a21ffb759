"""Which candidates share a leaf of a tree, and which nodes a parent, in NumPy on the host.

A tree has node levels 0 to L - 1 and leaves below them. Nodes are rows of blocks: the children of
one node are the rows of one block of the level below, or the slots of one leaf. Level 0 is a
single block, the root. The address of a row is block · width + row.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from negative_cache.ops._clustering import max_groups, partition, read_rows
from negative_cache.ops.tree.shape import TreeShape

# Coordinates read at a time where means are taken.
_BLOCK_ENTRIES = 2**22


class Topology(NamedTuple):
    """Who is whose child. The used blocks and leaves of a level are the first; so are used rows.

    Attributes:
      children: for each node level, [num_blocks, width] int32: the block of the level below, or at
        the last level the leaf, under each row; -1 in an empty row.
      owners: for each node level but the root's, and then for the leaves, [num_blocks] int32: the
        address in the level above of the row that each block or leaf is under; -1 if unused.
      members: [num_leaves, leaf_size] int32, the point in each slot; -1 in an empty slot.
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

    Neighbouring points form leaves, leaves of neighbouring means form blocks, and so on until the
    blocks of a level are the rows of the root. Fills are those of the shape where there is room
    for them, else higher.

    Args:
      points: [n, d] float, finite, of any dtype and memory-mapped or not; never copied whole.
      shape: the sizes of the tree.
      rng: makes all random choices.
      on_progress: called with a number of points, whenever so many more have their leaf.

    Returns:
      The `Topology`, in which the candidates are the row numbers 0 to n - 1 of `points`.

    Raises:
      ValueError: where the points do not fit into the tree.
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
    """Blocks of each node level, then leaves, that there are and that can be under a row."""
    available = [1]
    for width, num_below in zip(shape.widths, [*shape.num_blocks[1:], shape.num_leaves]):
        available.append(min(num_below, available[-1] * width))
    return available


def _fitting_fill(count: int, size: int, fill: float, available: int, name: str) -> float:
    """The smallest fill from `fill` up with which `count` things need no more than `available`."""
    if count > available * size:
        raise ValueError(
            f"A level of the tree must hold all that is below it. Received: {count} points or"
            f" blocks for {available} blocks with {name} = {size}."
        )
    if max_groups(count, size, fill) <= available:
        return fill
    # A little more than the quotient, which may have been rounded down.
    return min(count / (available * size) * (1.0 + 1e-9), 1.0)


def _tabulate(groups: np.ndarray, num_blocks: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Gives every entry of `groups` [n] a row in the block of its group.

    Returns:
      table: [num_blocks, width] int32, the entry in each row, in ascending order; -1 where empty.
      addresses: [n] int32, the row of each entry.
    """
    sizes = np.bincount(groups, minlength=num_blocks)
    # From the place of an entry in the order of the groups to its address.
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
    """The mean point of each used block of a `table` [num_blocks, width]: [used, d] float32."""
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
