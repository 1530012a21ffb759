"""How large the arrays of a tree index are: its levels, and the blocks of each."""

import dataclasses
import math

# How full the blocks of nodes must be, on average, for all leaves to be used.
_WORST_NODE_FILL = 0.75


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """The sizes of a tree, all fixed when it is made.

    A tree has node levels 0, …, L-1 and below them its leaves. The nodes of a level lie in blocks
    of equal width, and a node owns one block of the next level, which holds its children; level 0
    is one block, the root block. A node of the last level owns a leaf, a block of candidates. There
    are at least as many nodes as there are blocks for them to own.

    Attributes:
      capacity: the number of candidates, whose ids are 0, …, capacity - 1.
      dim: d.
      leaf_size: candidates of a leaf at the most.
      num_leaves: leaves.
      widths: for each node level, the nodes of a block.
      num_blocks: for each node level, the blocks; one at level 0.
      leaf_fill: the part of a leaf that a tree built at once fills, on average.
      node_fill: likewise of a block of nodes.
    """

    capacity: int
    dim: int
    leaf_size: int
    num_leaves: int
    widths: tuple[int, ...]
    num_blocks: tuple[int, ...]
    leaf_fill: float
    node_fill: float

    @classmethod
    def of(
        cls,
        capacity: int,
        dim: int,
        *,
        leaf_size: int,
        branching: int,
        max_root_width: int,
        leaf_fill: float,
        node_fill: float = 0.66,
        spare: float,
    ) -> "TreeShape":
        """The shape with the fewest levels whose root block is at most `max_root_width` wide.

        It has `spare` times as many leaves as a tree that is built at once fills, so that one that
        grows, or whose candidates move, finds leaves to split into.
        """
        num_leaves = math.ceil(spare * capacity / (leaf_fill * leaf_size)) + 2
        widths: list[int] = []
        num_blocks: list[int] = []
        to_own = num_leaves
        while to_own > max_root_width:
            to_own = math.ceil(to_own / (_WORST_NODE_FILL * branching)) + 2
            widths.insert(0, branching)
            num_blocks.insert(0, to_own)
        return cls(
            capacity=capacity,
            dim=dim,
            leaf_size=leaf_size,
            num_leaves=num_leaves,
            widths=(to_own, *widths),
            num_blocks=(1, *num_blocks),
            leaf_fill=leaf_fill,
            node_fill=node_fill,
        )

    @property
    def num_levels(self) -> int:
        """L, the number of node levels."""
        return len(self.widths)

    def num_owned(self, level: int) -> int:
        """The number of blocks, or of leaves, that nodes of `level` may own."""
        return self.num_leaves if level == self.num_levels - 1 else self.num_blocks[level + 1]
