"""The sizes of the arrays of a tree index: its levels, and the blocks of each level."""

import dataclasses
import math

# The mean fill of the blocks of nodes that is needed to use all leaves.
_WORST_NODE_FILL = 0.75


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """The sizes of a tree, all fixed when it is made.

    A tree has node levels 0, …, L - 1, and leaves below them. The nodes of a level lie in blocks of
    equal width. A node owns one block of the next level, which holds its children. Level 0 is a
    single block, the root block. A node of the last level owns a leaf, a block of candidates. Each
    level has at least as many nodes as there are blocks for them to own.

    Attributes:
      capacity: N, the number of candidates, whose ids are 0, …, N - 1.
      dim: d.
      leaf_size: the largest number of candidates in a leaf.
      num_leaves: the number of leaves.
      widths: for each node level, the number of nodes in a block.
      num_blocks: for each node level, the number of blocks; 1 for level 0.
      leaf_fill: the mean fraction of a leaf that is filled when a tree is built over a corpus.
      node_fill: the mean fraction of a block of nodes that is filled then.
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
        """The shape with the fewest levels for which the root block has <= `max_root_width` nodes.

        Args:
          capacity: N, the number of candidates.
          dim: d.
          leaf_size: the largest number of candidates in a leaf.
          branching: the number of nodes in a block below level 0.
          max_root_width: the largest number of nodes in the root block.
          leaf_fill: see `TreeShape`.
          node_fill: see `TreeShape`.
          spare: the number of leaves, as a multiple of those that a tree built over a full corpus
            fills. The additional leaves are there to split into when candidates move or are added.
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
        """The number of blocks, or of leaves, that the nodes of `level` can own."""
        return self.num_leaves if level == self.num_levels - 1 else self.num_blocks[level + 1]
