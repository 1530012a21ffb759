"""The variables of a `TreeIndex`, and functions that write single nodes of them."""

import types
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tensorflow as tf

from negative_cache.layers._variables import (
    StateVariable,
    make_state_variable,
    scatter_nodes,
    scatter_rows,
)
from negative_cache.ops import masked_rows
from negative_cache.ops.tree.build import Topology
from negative_cache.ops.tree.cut import NUM_STATS, TreeLevel, take_nodes
from negative_cache.ops.tree.shape import TreeShape

# The variables of a tree. `make_tree_variables` documents the names.
TreeState: TypeAlias = types.SimpleNamespace


class LeafPlan(NamedTuple):
    """The default size and number of leaves.

    Attributes:
      size: the largest number of candidates in a leaf, if the user does not set it.
      fill: the mean fraction of a leaf that is filled when a tree is built over a corpus.
      spare: the number of leaves, as a multiple of those that such a tree fills.
    """

    size: int
    fill: float
    spare: float


def make_tree_variables(shape: TreeShape, leaf_mean_dtype: tf.DType) -> dict[str, Any]:
    """Makes the variables of a tree, as fields of a `StateLayer`.

    `assign_topology` gives them their first values.

    Returns:
      mean, stats, children: node level -> variable, as in `ops.tree.cut.TreeLevel`.
      owners: level from 1 to L (the leaves) -> [num_blocks] int32, the address of the node that
        owns each block, or -1.
      free: level from 1 to L -> [num_blocks] int32, a stack of the blocks that no node owns.
      num_free: level from 1 to L -> scalar int32, the height of that stack.
      first_spread: [blocks, width] float32, v_n of each node of the last level when its leaf was
        made.
      members: [num_leaves, leaf_size] int32, the candidate in each slot; -1 in empty slots.
      position: [capacity] int32, the slot of each candidate, leaf · leaf_size + place in the leaf;
        -1 if the candidate is not in the tree.
      max_norm: scalar float32, at least the norm of every candidate.
      num_skipped: scalar int64, the number of rows of updates left out so far.
    """
    last = shape.num_levels - 1

    def make(name: str, size: list[int], dtype: tf.DType, value: float = 0) -> StateVariable:
        return make_state_variable(lambda: tf.cast(tf.fill(size, value), dtype), name)

    fields: dict[str, Any] = {
        "mean": {},
        "stats": {},
        "children": {},
        "owners": {},
        "free": {},
        "num_free": {},
        "first_spread": make(
            "first_spread", [shape.num_blocks[last], shape.widths[last]], tf.float32
        ),
        "members": make("members", [shape.num_leaves, shape.leaf_size], tf.int32, -1),
        "position": make("position", [shape.capacity], tf.int32, -1),
        "max_norm": make("max_norm", [], tf.float32),
        "num_skipped": make("num_skipped", [], tf.int64),
    }
    for depth in range(shape.num_levels):
        nodes = [shape.num_blocks[depth], shape.widths[depth]]
        dtype = leaf_mean_dtype if depth == last else tf.float32
        level = str(depth)
        fields["mean"][level] = make(f"mean_{depth}", [*nodes, shape.dim], dtype)
        fields["stats"][level] = make(f"stats_{depth}", [*nodes, NUM_STATS], tf.float32)
        fields["children"][level] = make(f"children_{depth}", nodes, tf.int32, -1)
        below, owned = str(depth + 1), [shape.num_owned(depth)]
        fields["owners"][below] = make(f"owners_{depth + 1}", owned, tf.int32, -1)
        fields["free"][below] = make(f"free_{depth + 1}", owned, tf.int32)
        fields["num_free"][below] = make(f"num_free_{depth + 1}", [], tf.int32)
    return fields


def tree_limits(
    shape: TreeShape, state: TreeState
) -> Iterator[tuple[str, StateVariable, float, float]]:
    """Yields the valid range of each variable, for `StateLayer._limits`."""
    for depth in range(shape.num_levels):
        level, below, num_owned = str(depth), str(depth + 1), shape.num_owned(depth)
        num_nodes = shape.num_blocks[depth] * shape.widths[depth]
        yield "a child", state.children[level], -1, num_owned - 1
        yield "an owner", state.owners[below], -1, num_nodes - 1
        yield "a free block", state.free[below], 0, num_owned - 1
        yield "the number of free blocks", state.num_free[below], 0, num_owned
        largest = float(np.finfo(np.float32).max)
        yield "a mean", state.mean[level], -largest, largest
        yield "a statistic", state.stats[level], 0.0, largest
    yield "a member", state.members, -1, shape.capacity - 1
    yield "a slot", state.position, -1, shape.num_leaves * shape.leaf_size - 1


def tree_levels(state: TreeState) -> tuple[TreeLevel, ...]:
    """The node levels, made of the variables."""
    return tuple(
        TreeLevel(state.mean[level], state.stats[level], state.children[level])
        for level in sorted(state.mean, key=int)
    )


def empty_topology(shape: TreeShape) -> Topology:
    """A tree with a single path and no candidates.

    Routing needs a path, so leaf 0 is never released.
    """
    children = [
        np.full([blocks, width], -1, np.int32)
        for blocks, width in zip(shape.num_blocks, shape.widths)
    ]
    owners = [np.full([shape.num_owned(depth)], -1, np.int32) for depth in range(shape.num_levels)]
    for level, owner in zip(children, owners):
        level[0, 0] = owner[0] = 0
    return Topology(children, owners, np.full([shape.num_leaves, shape.leaf_size], -1, np.int32))


def assign_topology(state: TreeState, topology: Topology) -> None:
    """Assigns a topology, with the slots and free blocks that follow from it.

    It sets the means and statistics to zero.
    """
    for depth, (level, owner) in enumerate(zip(topology.children, topology.owners)):
        below = str(depth + 1)
        state.children[str(depth)].assign(level)
        state.owners[below].assign(owner)
        unused = np.flatnonzero(owner < 0)[::-1]
        free = np.zeros(owner.shape, np.int32)
        free[: len(unused)] = unused
        state.free[below].assign(free)
        state.num_free[below].assign(len(unused))
        for statistics in (state.mean[str(depth)], state.stats[str(depth)]):
            statistics.assign(tf.zeros(statistics.shape, statistics.dtype))
    state.first_spread.assign(tf.zeros_like(state.first_spread))
    members = topology.members
    state.members.assign(members)
    slots = np.flatnonzero(members >= 0)
    position = np.full(state.position.shape, -1, np.int32)
    position[members.reshape(-1)[slots]] = slots
    state.position.assign(position)


def write_nodes(
    variable: tf.Variable, addresses: tf.Tensor, values: tf.Tensor, mask: tf.Tensor
) -> None:
    """Writes `values` [n, ...] to the nodes at `addresses` [n] wherever `mask` [n] is True.

    The addresses with True must be distinct. The variable is [blocks, width, ...]. It can also be
    `members` [num_leaves, leaf_size], with slots as addresses.
    """
    rows = masked_rows(addresses, mask)
    values = tf.cast(tf.gather(values, rows.sources), variable.dtype)
    # If all entries are masked, they write the present value of the first node.
    values = tf.where(rows.any_written, values, take_nodes(variable, tf.zeros_like(rows.rows[:1])))
    width = variable.shape[1]
    indices = tf.stack([rows.rows // width, rows.rows % width], axis=-1)
    scatter_nodes(variable, indices, values)


def write_rows(variable: tf.Variable, rows: tf.Tensor, values: tf.Tensor, mask: tf.Tensor) -> None:
    """Writes `values` [n, ...] to `rows` [n] of a variable wherever `mask` [n] is True."""
    rows = masked_rows(rows, mask)
    scatter_rows(variable, rows.rows, rows.values(tf.cast(values, variable.dtype), variable))
