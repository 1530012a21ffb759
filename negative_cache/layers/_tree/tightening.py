"""Recomputes the statistics of every node of a `TreeIndex`, by passes over its blocks."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from negative_cache.layers._tree.coded import TreeCandidates
from negative_cache.layers._tree.state import TreeState, write_nodes
from negative_cache.ops.tree.cut import RADIUS, take_nodes
from negative_cache.ops.tree.shape import TreeShape
from negative_cache.ops.tree.statistics import combine, distances_round_up

# The number of coordinates of candidates or means that are read at a time.
_READ_AT_ONCE = 2**22


def tighten(shape: TreeShape, state: TreeState, candidates: TreeCandidates) -> None:
    """Recomputes means, spreads, radii and errors, from the leaves up.

    At every level, the radii are then distances of the farthest candidates. During maintenance they
    grow with every movement of a mean.
    """
    last = shape.num_levels - 1
    leaf_owners = state.owners[str(last + 1)]

    def tighten_leaves(leaves: tf.Tensor) -> None:
        node = tf.gather(leaf_owners, leaves)
        members = tf.gather(state.members, leaves)
        mean, stats = candidates.summary(members, tf.maximum(node, 0))
        write_nodes(state.mean[str(last)], node, mean, node >= 0)
        write_nodes(state.stats[str(last)], node, stats, node >= 0)

    _for_blocks(shape.num_leaves, shape.leaf_size * shape.dim, tighten_leaves)
    for depth in range(last, 0, -1):
        _combine_blocks(shape, state, depth)
    if last == 0:
        return

    # Radii combined from the radii of children are loose. These are measured on the candidates.
    def measure(leaves: tf.Tensor, radii: list[tf.Tensor]) -> list[tf.Tensor]:
        members = tf.gather(state.members, leaves)
        node = tf.gather(leaf_owners, leaves)
        is_owned, node = node >= 0, tf.maximum(node, 0)
        vectors, errors = candidates.read_members(members, node)
        is_there = (members >= 0) & is_owned[:, tf.newaxis]
        for depth in range(last - 1, -1, -1):
            width = shape.widths[depth + 1]
            node = tf.maximum(tf.gather(state.owners[str(depth + 1)], node // width), 0)
            means = take_nodes(state.mean[str(depth)], node)[:, tf.newaxis]
            distances = tf.norm(vectors - means, axis=2) * distances_round_up(vectors) + errors
            farthest = tf.reduce_max(tf.where(is_there, distances, 0.0), axis=1)
            measured = tf.math.unsorted_segment_max(farthest, node, radii[depth].shape[0])
            radii[depth] = tf.maximum(radii[depth], measured)
        return radii

    radii = [tf.zeros([shape.num_blocks[d] * shape.widths[d]]) for d in range(last)]
    radii = _for_blocks(shape.num_leaves, shape.leaf_size * shape.dim, measure, radii)
    for depth, radius in enumerate(radii):
        stats = state.stats[str(depth)]
        columns = tf.unstack(tf.convert_to_tensor(stats), axis=-1)
        columns[RADIUS] = tf.minimum(
            columns[RADIUS], tf.reshape(radius, [shape.num_blocks[depth], shape.widths[depth]])
        )
        stats.assign(tf.stack(columns, axis=-1))


def _combine_blocks(shape: TreeShape, state: TreeState, depth: int) -> None:
    def combine_some(blocks: tf.Tensor) -> None:
        node = tf.gather(state.owners[str(depth)], blocks)
        means = tf.cast(tf.gather(state.mean[str(depth)], blocks), tf.float32)
        mean, stats = combine(means, tf.gather(state.stats[str(depth)], blocks))
        write_nodes(state.mean[str(depth - 1)], node, mean, node >= 0)
        write_nodes(state.stats[str(depth - 1)], node, stats, node >= 0)

    _for_blocks(shape.num_blocks[depth], shape.widths[depth] * shape.dim, combine_some)


def _for_blocks(
    num_blocks: int, block_size: int, function: Callable[..., Any], *values: Any
) -> Any:
    """Calls `function(blocks, *values)` for all blocks, several at a time.

    The function returns new values for the next call. All calls get the same number of blocks, so
    the last call gets some blocks again.
    """
    size = min(max(_READ_AT_ONCE // block_size, 1), num_blocks)

    def body(start: tf.Tensor, *values: Any) -> tuple[Any, ...]:
        blocks = tf.minimum(start, num_blocks - size) + tf.range(size)
        new_values = function(blocks, *values)
        return (start + size, *([new_values] if values else []))

    results = tf.while_loop(
        lambda start, *_: start < num_blocks,
        body,
        (tf.constant(0), *values),
        parallel_iterations=1,
    )
    return results[1] if values else None
