"""Makes the parts of a new `TreeIndex`."""

from typing import Any, NamedTuple

import tensorflow as tf

from negative_cache.layers._tree.checks import check_residual_bytes
from negative_cache.layers._tree.coded import CodedResiduals, TreeCandidates
from negative_cache.layers._tree.state import make_tree_variables
from negative_cache.layers._tree.stored import StoredEmbeddings
from negative_cache.ops.tree.shape import TreeShape

# A matrix product with this many means takes about as long as opening a few dozen blocks.
_MAX_ROOT_WIDTH = 10_000


class TreeParts(NamedTuple):
    """A tree without candidates.

    Attributes:
      shape: the sizes of the tree.
      candidates: the storage of the candidates' vectors.
      fields: all variables, as fields of a `StateLayer`.
    """

    shape: TreeShape
    candidates: TreeCandidates
    fields: dict[str, Any]


def make_tree(
    capacity: int,
    dim: int,
    *,
    leaf_size: int | None,
    branching: int,
    dtype: tf.DType | None,
    residual_bytes: int,
) -> TreeParts:
    """Makes the variables of a tree.

    Args:
      capacity: N, the number of candidates.
      dim: d.
      leaf_size: the largest number of candidates in a leaf; chosen by the storage if None.
      branching: the largest number of children of a node.
      dtype: the dtype of stored embeddings; None if they are not stored.
      residual_bytes: without embeddings, the bytes of a candidate's residual.
    """
    if dtype is None:
        check_residual_bytes(residual_bytes, dim)
    kind = CodedResiduals if dtype is None else StoredEmbeddings
    shape = TreeShape.of(
        capacity,
        dim,
        leaf_size=kind.leaves.size if leaf_size is None else leaf_size,
        branching=branching,
        max_root_width=_MAX_ROOT_WIDTH,
        leaf_fill=kind.leaves.fill,
        spare=kind.leaves.spare,
    )
    fields = make_tree_variables(shape, kind.leaf_mean_dtype)
    candidates: TreeCandidates
    if dtype is None:
        last = str(shape.num_levels - 1)
        means, stats = fields["mean"][last], fields["stats"][last]
        candidates = CodedResiduals(shape, residual_bytes, means, stats)
    else:
        candidates = StoredEmbeddings(capacity, dim, dtype)
    return TreeParts(shape, candidates, {**fields, "candidates": candidates.variables})
