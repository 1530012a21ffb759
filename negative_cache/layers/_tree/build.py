"""Construction of a tree over given embeddings, on the host."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from negative_cache._compat import keras
from negative_cache.layers._tree.checks import usable_rows
from negative_cache.layers._tree.state import empty_topology
from negative_cache.ops.tree.build import Topology, build_topology
from negative_cache.ops.tree.shape import TreeShape


class BuiltTree(NamedTuple):
    """A tree over some of the rows of an array.

    Attributes:
      topology: the topology of the tree. Its members are numbers of rows.
      max_norm: the largest norm of an embedding in the tree.
      num_left_out: the number of rows that are not finite or too long.
    """

    topology: Topology
    max_norm: float
    num_left_out: int


def build_tree(
    embeddings: np.ndarray, shape: TreeShape, dtype: tf.DType, *, seed: int, verbose: int
) -> BuiltTree:
    """Clusters embeddings into leaves and nodes.

    Args:
      embeddings: [n, d] float.
      shape: the sizes of the tree.
      dtype: the dtype that the embeddings will be stored in.
      seed: seed of the clustering.
      verbose: 1 for a progress bar, 0 for none.
    """
    ids, max_norm = usable_rows(embeddings, dtype)
    points = embeddings if len(ids) == len(embeddings) else embeddings[ids]
    progress = keras.utils.Progbar(len(ids), unit_name="candidate", verbose=verbose)
    topology = build_topology(
        points,
        shape,
        rng=np.random.default_rng(seed),
        on_progress=progress.add if verbose else None,
    )
    if not len(ids):
        topology = empty_topology(shape)
    elif points is not embeddings:
        members = topology.members
        members = np.where(members >= 0, ids[members], -1).astype(np.int32)
        topology = topology._replace(members=members)
    return BuiltTree(topology, max_norm, len(embeddings) - len(ids))
