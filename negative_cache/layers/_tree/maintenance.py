"""Updates of a `TreeIndex`: candidates move, are added and removed, and blocks split.

A moved candidate stays in its leaf if it is inside the leaf's ball and its distance to the centre
is below a limit. The limit is set by the spread of the leaf when it was made, and is lower if the
candidate has moved far. Then only the statistics of its path change. Otherwise the candidate leaves
the leaf and is routed again from the root.

Candidates are placed in chunks. If a candidate does not fit into its leaf, it waits until the leaf
has split. An empty block is released and used again. No work grows with the size of the tree,
unless no block is left to split into.
"""

import functools

import tensorflow as tf

from negative_cache.layers._tree.coded import TreeCandidates
from negative_cache.layers._tree.state import TreeState, tree_levels, write_nodes, write_rows
from negative_cache.ops import _execution
from negative_cache.ops.groups import Groups
from negative_cache.ops.tree.cut import COUNT, RADIUS, SPREAD, Tree, take_nodes
from negative_cache.ops.tree.routing import nearest, route
from negative_cache.ops.tree.shape import TreeShape
from negative_cache.ops.tree.statistics import (
    bisect,
    change_nodes,
    combine,
)

# The number of candidates placed, and of blocks of a level split, in one round.
_PLACED_AT_ONCE, _SPLIT_AT_ONCE = 512, 32
# The smallest fraction of a block that each half gets in a split. Blocks of nodes are split evenly,
# so that no level runs out of blocks if candidates are only added.
_SMALLEST_HALF_OF_LEAF, _SMALLEST_HALF_OF_NODES = 0.25, 0.5
# Limits of squared distances, in units of the candidates' mean squared distance to the centre when
# the leaf was made. Candidates farther from the centre than the first limit leave the leaf. If they
# have moved farther than the third, they leave it beyond the second.
_FARTHEST, _FARTHEST_MOVED, _FAR_MOVE = 4.0, 1.0, 0.1


class TreeMaintenance:
    """Changes the variables of a tree.

    Args:
      shape: the sizes of the tree.
      state: its variables; see `make_tree_variables`.
      candidates: the storage of the candidates' vectors; see `stored` and `coded`.
    """

    def __init__(
        self,
        shape: TreeShape,
        state: TreeState,
        candidates: TreeCandidates,
    ):
        self._shape = shape
        self._state = state
        self._candidates = candidates
        self._last = shape.num_levels - 1

    @property
    def tree(self) -> Tree:
        """The tree, made of the variables."""
        return Tree(self._shape, tree_levels(self._state), self._state.members, self._candidates)

    def update(self, ids: tf.Tensor, vectors: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """Moves candidates to new vectors, or adds them.

        Args:
          ids: [m] int32 in [0, capacity), distinct among entries with True in `mask`.
          vectors: [m, d] float32, rounded to the dtype in which they are stored.
          mask: [m] bool, which entries to apply.

        Returns:
          Scalar int32, the number of candidates without room. They are not in the tree any more.
        """
        is_known, position, node = self._locate(ids, mask)
        old_vectors, old_errors = self._candidates.read(ids, node)
        level = self.tree.levels[-1]
        means = tf.cast(take_nodes(level.mean, node), tf.float32)
        radius = take_nodes(level.stats, node)[:, RADIUS]
        distance = tf.norm(vectors - means, axis=1)
        # The ball alone is no limit: it grows as its candidates scatter.
        spread = take_nodes(self._state.first_spread, node)
        has_moved = tf.reduce_sum((vectors - old_vectors) ** 2, axis=1) > _FAR_MOVE * spread
        limit = tf.where(has_moved, _FARTHEST_MOVED, _FARTHEST) * spread
        stays = is_known & (distance <= radius) & (distance**2 <= limit)
        new_errors = self._candidates.write(ids, vectors, node, stays)
        self._change_paths(
            tf.concat([node, node], axis=0),
            tf.concat([old_vectors, vectors], axis=0),
            tf.concat([-tf.cast(is_known, tf.float32), tf.cast(stays, tf.float32)], axis=0),
            tf.concat([old_errors, new_errors], axis=0),
        )
        self._take_out(ids, position, is_known & ~stays)
        return self._insert(ids, vectors, mask & ~stays)

    def remove(self, ids: tf.Tensor, mask: tf.Tensor) -> None:
        """Removes the candidates `ids` [m] with True in `mask` [m] from the tree."""
        is_known, position, node = self._locate(ids, mask)
        vectors, errors = self._candidates.read(ids, node)
        self._change_paths(node, vectors, -tf.cast(is_known, tf.float32), errors)
        self._take_out(ids, position, is_known)

    def _locate(self, ids: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Finds candidates `ids` [m] in the tree.

        Returns:
          is_known: [m] bool, whether the candidate is in the tree and has True in `mask`.
          position: [m] int32, its slot, or 0.
          node: [m] int32, the node of its leaf, or that of leaf 0.
        """
        position = tf.gather(self._state.position, ids)
        is_known = mask & (position >= 0)
        position = tf.maximum(position, 0)
        return is_known, position, self._owner(self._last + 1, position // self._shape.leaf_size)

    def _insert(self, ids: tf.Tensor, vectors: tf.Tensor, pending: tf.Tensor) -> tf.Tensor:
        """Places the candidates with True in `pending` [m].

        Returns the number of candidates without room.
        """

        def place_some(
            pending: tf.Tensor, is_stuck: tf.Tensor, num_refused: tf.Tensor
        ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            chosen, is_one = _first_pending(pending)
            some_ids, some = tf.gather(ids, chosen), tf.gather(vectors, chosen)
            leaf = tf.cond(
                is_stuck, lambda: self._nearest_with_room(some), lambda: route(self.tree, some)
            )
            placed = self._place(some_ids, some, leaf, is_one)
            waiting = is_one & ~placed
            has_split = tf.cond(
                tf.reduce_any(waiting),
                lambda: self._split_leaves(leaf, waiting),
                lambda: tf.constant(False),
            )
            # If no block is left to split into, the next round takes any leaf with room.
            is_now_stuck = ~tf.reduce_any(placed) & ~has_split
            refused = waiting & is_stuck & is_now_stuck
            num_refused += tf.math.count_nonzero(refused, dtype=tf.int32)
            is_left = waiting & ~refused
            pending = tf.tensor_scatter_nd_update(pending, chosen[:, tf.newaxis], is_left)
            return pending, is_now_stuck, num_refused

        *_, num_refused = tf.while_loop(
            lambda pending, *_: tf.reduce_any(pending),
            place_some,
            (pending, tf.constant(False), tf.constant(0)),
            parallel_iterations=1,
        )
        return num_refused

    def _place(
        self, ids: tf.Tensor, vectors: tf.Tensor, leaf: tf.Tensor, mask: tf.Tensor
    ) -> tf.Tensor:
        """Puts candidates with True in `mask` into free slots of their leaves.

        Returns [n] bool, whether each candidate has been placed.
        """
        rank = Groups.of(leaf, mask).rank
        slot, placed = _free_place(tf.gather(self._state.members, leaf), rank)
        placed &= mask
        position = leaf * self._shape.leaf_size + slot
        write_nodes(self._state.members, position, ids, placed)
        write_rows(self._state.position, ids, position, placed)
        node = self._owner(self._last + 1, leaf)
        errors = self._candidates.write(ids, vectors, node, placed)
        self._change_paths(node, vectors, tf.cast(placed, tf.float32), errors)
        return placed

    def _nearest_with_room(self, vectors: tf.Tensor) -> tf.Tensor:
        """[n] int32, for each of `vectors` [n, d] the nearest of the leaves with the most room."""
        occupied = tf.convert_to_tensor(self._state.members) >= 0
        room = self._shape.leaf_size - tf.math.count_nonzero(occupied, axis=1, dtype=tf.int32)
        is_owned = tf.convert_to_tensor(self._state.owners[str(self._last + 1)]) >= 0
        room = tf.where(is_owned, room, 0)
        most, leaves = tf.math.top_k(room, k=min(_PLACED_AT_ONCE, self._shape.num_leaves))
        means = take_nodes(self.tree.levels[-1].mean, self._owner(self._last + 1, leaves))
        choice = nearest(vectors, tf.cast(means, tf.float32), most > 0)
        return tf.gather(leaves, choice)

    def _take_out(self, ids: tf.Tensor, position: tf.Tensor, mask: tf.Tensor) -> None:
        """Empties the slots of candidates that have been removed from the statistics already.

        It also releases leaves that become empty, except leaf 0.
        """
        write_nodes(self._state.members, position, tf.fill(tf.shape(ids), -1), mask)
        write_rows(self._state.position, ids, tf.fill(tf.shape(ids), -1), mask)
        leaves = Groups.of(position // self._shape.leaf_size, mask)
        count = take_nodes(
            self._state.stats[str(self._last)], self._owner(self._last + 1, leaves.numbers)
        )[:, COUNT]
        is_empty = leaves.is_some & (count == 0.0) & (leaves.numbers != 0)
        tf.cond(
            tf.reduce_any(is_empty),
            lambda: self._give_up(self._last + 1, leaves.numbers, is_empty),
            lambda: None,
        )

    def _give_up(self, depth: int, blocks: tf.Tensor, mask: tf.Tensor) -> None:
        """Releases empty blocks of level `depth`, and then blocks above that become empty."""
        level = str(depth)
        node = self._owner(depth, blocks)
        write_nodes(self._state.children[str(depth - 1)], node, tf.fill(tf.shape(node), -1), mask)
        write_rows(self._state.owners[level], blocks, tf.fill(tf.shape(node), -1), mask)
        top = self._state.num_free[level]
        place = tf.convert_to_tensor(top) + tf.cumsum(tf.cast(mask, tf.int32)) - 1
        write_rows(self._state.free[level], tf.maximum(place, 0), blocks, mask)
        top.assign_add(tf.math.count_nonzero(mask, dtype=tf.int32))
        if depth == 1:
            return
        parents = Groups.of(node // self._shape.widths[depth - 1], mask)
        children = tf.gather(self._state.children[str(depth - 1)], parents.numbers)
        self._give_up(
            depth - 1, parents.numbers, parents.is_some & tf.reduce_all(children < 0, axis=1)
        )

    def _split_leaves(self, leaf: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """Splits leaves with True in `mask`, after full blocks above them.

        Returns a scalar bool, whether any block or leaf was split.
        """
        groups = Groups.of(leaf, mask)
        requests = [_first(groups.numbers, groups.is_some)]
        for depth in range(self._last, 0, -1):
            blocks, wanted = requests[0]
            parents = self._owner(depth + 1, blocks) // self._shape.widths[depth]
            children = tf.gather(self._state.children[str(depth)], parents)
            is_full = tf.reduce_all(children >= 0, axis=1)
            groups = Groups.of(parents, wanted & is_full)
            requests.insert(0, (groups.numbers, groups.is_some))
        has_split = tf.constant(False)
        for depth, (blocks, wanted) in enumerate(requests, start=1):
            has_split |= tf.cond(
                tf.reduce_any(wanted),
                functools.partial(self._split, depth, blocks, wanted),
                lambda: tf.constant(False),
            )
        return has_split

    def _split(self, depth: int, blocks: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """Splits blocks of level `depth`: half of each moves to a free block with a new owner.

        A block without a free block, or without a free row for its owner, is not split. Returns a
        scalar bool, whether any block was split.
        """
        level, above = str(depth), str(depth - 1)
        width = self._shape.widths[depth - 1]
        node = self._owner(depth, blocks)
        parents = node // width
        rank = Groups.of(parents, mask).rank
        place, has_place = _free_place(tf.gather(self._state.children[above], parents), rank)
        mask &= has_place
        top = tf.convert_to_tensor(self._state.num_free[level])
        order = tf.cumsum(tf.cast(mask, tf.int32)) - 1
        mask &= order < top
        new_blocks = tf.gather(self._state.free[level], tf.maximum(top - 1 - order, 0))
        self._state.num_free[level].assign_sub(tf.math.count_nonzero(mask, dtype=tf.int32))
        new_node = parents * width + place
        write_nodes(self._state.children[above], new_node, new_blocks, mask)
        write_rows(self._state.owners[level], new_blocks, new_node, mask)
        if depth > self._last:
            halves = self._halve_leaves((blocks, new_blocks), (node, new_node), mask)
        else:
            halves = self._halve_nodes(depth, blocks, new_blocks, mask)
        for at, (mean, stats) in zip((node, new_node), halves):
            write_nodes(self._state.mean[above], at, mean, mask)
            write_nodes(self._state.stats[above], at, stats, mask)
            if depth > self._last:
                write_nodes(self._state.first_spread, at, stats[:, SPREAD], mask)
        return tf.reduce_any(mask)

    def _halve_leaves(
        self,
        leaves: tuple[tf.Tensor, tf.Tensor],
        nodes: tuple[tf.Tensor, tf.Tensor],
        mask: tf.Tensor,
    ) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """Moves candidates from old to new leaves.

        Args:
          leaves: the old and the new leaves, [n] int32 each.
          nodes: their nodes, [n] int32 each.
          mask: [n] bool, which leaves to split.

        Returns:
          The means [n, d] and statistics [n, 4] of the old and of the new leaves.
        """
        size = self._shape.leaf_size
        members = tf.gather(self._state.members, leaves[0])
        ids = tf.maximum(members, 0)
        vectors, errors = self._candidates.read_members(members, nodes[0])
        stays = bisect(vectors, members >= 0, _SMALLEST_HALF_OF_LEAF)
        halves = []
        for part, leaf, node in zip((stays, (members >= 0) & ~stays), leaves, nodes):
            write_rows(self._state.members, leaf, tf.where(part, members, -1), mask)
            position = leaf[:, tf.newaxis] * size + tf.range(size)
            written = tf.reshape(part & mask[:, tf.newaxis], [-1])
            write_rows(
                self._state.position, tf.reshape(ids, [-1]), tf.reshape(position, [-1]), written
            )
            halves.append(
                self._candidates.recentre(ids, vectors, errors, part, nodes[0], node, mask)
            )
        return halves

    def _halve_nodes(
        self, depth: int, blocks: tf.Tensor, new_blocks: tf.Tensor, mask: tf.Tensor
    ) -> list[tuple[tf.Tensor, tf.Tensor]]:
        """Moves nodes from `blocks` [n] of level `depth` to `new_blocks` [n].

        Returns the means [n, d] and statistics [n, 4] of the old and of the new blocks.
        """
        level, below = str(depth), str(depth + 1)
        children = tf.gather(self._state.children[level], blocks)
        means = tf.gather(self._state.mean[level], blocks)
        stats = tf.gather(self._state.stats[level], blocks)
        is_there = children >= 0
        vectors = tf.cast(means, tf.float32)
        stays = bisect(vectors, is_there, _SMALLEST_HALF_OF_NODES)
        goes = is_there & ~stays
        halves = []
        for part, to in ((stays, blocks), (goes, new_blocks)):
            part_stats = tf.where(part[..., tf.newaxis], stats, 0.0)
            write_rows(self._state.children[level], to, tf.where(part, children, -1), mask)
            write_rows(self._state.stats[level], to, part_stats, mask)
            halves.append(combine(vectors, part_stats))
        write_rows(self._state.mean[level], new_blocks, means, mask)
        if depth == self._last:
            spread = tf.gather(self._state.first_spread, blocks)
            write_rows(self._state.first_spread, new_blocks, spread, mask)
            self._candidates.copy_nodes(blocks, new_blocks, mask)
        width = self._shape.widths[depth]
        address = new_blocks[:, tf.newaxis] * width + tf.range(width)
        moved = tf.reshape(goes & mask[:, tf.newaxis], [-1])
        owned = tf.reshape(tf.maximum(children, 0), [-1])
        write_rows(self._state.owners[below], owned, tf.reshape(address, [-1]), moved)
        return halves

    def _change_paths(
        self, address: tf.Tensor, vectors: tf.Tensor, signs: tf.Tensor, errors: tf.Tensor
    ) -> None:
        """Updates the statistics of nodes and their ancestors after candidates enter or leave.

        Args:
          address: [n] int32, nodes of the last level.
          vectors: [n, d] float32, the candidates.
          signs: [n] float32, 1 if the candidate enters, -1 if it leaves, 0 for no change.
          errors: [n] float32, bounds on the errors of `vectors`.
        """
        for depth in range(self._last, -1, -1):
            level = str(depth)
            groups = Groups.of(address, signs != 0.0)
            means = tf.cast(take_nodes(self._state.mean[level], groups.numbers), tf.float32)
            stats = take_nodes(self._state.stats[level], groups.numbers)
            moves = self._candidates.leaf_means_move or depth < self._last
            means, stats = change_nodes(means, stats, groups, vectors, signs, errors, moves=moves)
            write_nodes(self._state.mean[level], groups.numbers, means, groups.is_some)
            write_nodes(self._state.stats[level], groups.numbers, stats, groups.is_some)
            if depth > 0:
                address = self._owner(depth, address // self._shape.widths[depth])

    def _owner(self, depth: int, blocks: tf.Tensor) -> tf.Tensor:
        """The addresses of the nodes, on level `depth` - 1, that own `blocks`; 0 if none does."""
        return tf.maximum(tf.gather(self._state.owners[str(depth)], blocks), 0)


def _first_pending(pending: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The positions of the first few True in `pending` [m].

    In XLA, which needs fixed shapes, other positions follow if there are too few. Returns the
    positions [k] int32, and [k] bool, whether each position has True.
    """
    if _execution.is_in_xla():
        return _first(tf.range(tf.size(pending)), pending, _PLACED_AT_ONCE)
    # No other positions: routing is the slowest part.
    chosen = tf.cast(tf.where(pending)[:_PLACED_AT_ONCE, 0], tf.int32)
    return chosen, tf.ones_like(chosen, tf.bool)


def _free_place(taken: tf.Tensor, rank: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds a free row in each block.

    Args:
      taken: [n, width] int32, the rows of each block; -1 for free ones.
      rank: [n] int32; 0 for the first free row of a block, 1 for the second, and so on.

    Returns:
      place: [n] int32, the row.
      has_place: [n] bool, whether there is one.
    """
    is_free = taken < 0
    order = tf.cumsum(tf.cast(is_free, tf.int32), axis=1) - 1
    is_it = is_free & (order == rank[:, tf.newaxis])
    return tf.argmax(is_it, axis=1, output_type=tf.int32), tf.reduce_any(is_it, axis=1)


def _first(
    numbers: tf.Tensor, mask: tf.Tensor, count: int = _SPLIT_AT_ONCE
) -> tuple[tf.Tensor, tf.Tensor]:
    """The first `count` numbers: those with True in `mask` [m] first, then others.

    Returns the numbers [k] int32, and [k] bool, whether each has True in `mask`.
    """
    chosen = tf.argsort(tf.cast(~mask, tf.int32), stable=True)[:count]
    return tf.gather(numbers, chosen), tf.gather(mask, chosen)
