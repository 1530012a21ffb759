"""The operations that change the variables of a `TreeIndex`."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from negative_cache.layers._state import on_every_replica_of
from negative_cache.layers._tree.build import BuiltTree
from negative_cache.layers._tree.checks import is_usable
from negative_cache.layers._tree.coded import TreeCandidates
from negative_cache.layers._tree.maintenance import TreeMaintenance
from negative_cache.layers._tree.state import TreeState, assign_topology, empty_topology
from negative_cache.layers._tree.tightening import tighten
from negative_cache.ops import _execution
from negative_cache.ops.groups import Groups
from negative_cache.ops.tree.cut import RADIUS, SPREAD, Tree
from negative_cache.ops.tree.shape import TreeShape


class TreeUpkeep:
    """Fills, empties and updates a tree. It skips and counts rows that cannot be applied.

    A call outside the replicas of the strategy that it was made under applies to all replicas.

    Args:
      shape: the sizes of the tree.
      state: its variables; see `make_tree_variables`.
      candidates: the storage of the candidates' vectors.
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
        self._strategy = tf.distribute.get_strategy()
        self._maintenance = TreeMaintenance(shape, state, candidates)
        # AutoGraph has nothing to convert here, and would take longer than the tracing itself.
        compiled = functools.partial(
            tf.function,
            autograph=False,
            reduce_retracing=True,
            jit_compile=_execution.is_to_be_compiled(state.max_norm) or None,
        )
        self._compiled_update = compiled(self._update)
        self._compiled_remove = compiled(self._remove)
        self._compiled_tighten = compiled(self._tighten)

    @property
    def tree(self) -> Tree:
        """The tree, made of the variables."""
        return self._maintenance.tree

    def clear(self) -> None:
        """Removes all candidates."""
        self._on_every_replica(self._clear)

    def load(self, built: BuiltTree, embeddings: np.ndarray, seed: int) -> None:
        """Replaces the tree by one that was built over `embeddings` [n, d]."""
        self._on_every_replica(lambda: self._load(built, embeddings, seed))

    def update(self, ids: tf.Tensor, embeddings: tf.Tensor, mask: tf.Tensor) -> None:
        """Moves or adds the candidates `ids` [m] int32 with True in `mask` [m]."""
        self._on_every_replica(self._compiled_update, ids, embeddings, mask)

    def remove(self, ids: tf.Tensor, mask: tf.Tensor) -> None:
        """Removes the candidates `ids` [m] int32 with True in `mask` [m]."""
        self._on_every_replica(self._compiled_remove, ids, mask)

    def tighten(self) -> None:
        """Recomputes all statistics."""
        self._on_every_replica(self._compiled_tighten)

    def _on_every_replica(self, function: Callable[..., None], *args: Any) -> None:
        # Outside the scope of the strategy, only one replica would be changed.
        on_every_replica_of(self._strategy, function, *args)

    def _clear(self) -> None:
        assign_topology(self._state, empty_topology(self._shape))
        self._candidates.clear()
        self._state.max_norm.assign(0.0)

    def _load(self, built: BuiltTree, embeddings: np.ndarray, seed: int) -> None:
        topology = built.topology
        assign_topology(self._state, topology)
        self._candidates.clear()
        self._candidates.load(
            embeddings, topology.members, topology.owners[-1], np.random.default_rng(seed)
        )
        self._state.max_norm.assign(built.max_norm)
        self._state.num_skipped.assign_add(built.num_left_out)
        self._compiled_tighten()
        last_stats = tf.convert_to_tensor(self.tree.levels[-1].stats)
        self._state.first_spread.assign(last_stats[..., SPREAD])

    def _update(self, ids: tf.Tensor, embeddings: tf.Tensor, mask: tf.Tensor) -> None:
        usable = self._usable(ids, mask) & self._candidates.accepts_updates
        embeddings = self._candidates.rounded(embeddings)
        usable &= is_usable(embeddings)
        embeddings = tf.where(usable[:, tf.newaxis], embeddings, 0.0)
        longest = tf.reduce_max(tf.concat([tf.norm(embeddings, axis=1), [0.0]], axis=0))
        self._state.max_norm.assign(tf.maximum(self._state.max_norm, longest))
        refused = self._maintenance.update(tf.where(usable, ids, 0), embeddings, usable)
        skipped = tf.math.count_nonzero(mask & ~usable) + tf.cast(refused, tf.int64)
        self._state.num_skipped.assign_add(skipped)

    def _remove(self, ids: tf.Tensor, mask: tf.Tensor) -> None:
        usable = self._usable(ids, mask)
        self._maintenance.remove(tf.where(usable, ids, 0), usable)
        self._state.num_skipped.assign_add(tf.math.count_nonzero(mask & ~usable))

    def _tighten(self) -> None:
        tighten(self._shape, self._state, self._candidates)
        # Every embedding is inside the ball of a node of the root block.
        root = self.tree.levels[0]
        norms = tf.norm(tf.cast(root.mean, tf.float32), axis=2)
        longest = tf.reduce_max(norms + root.stats[..., RADIUS]) * (1.0 + 1e-5)
        self._state.max_norm.assign(tf.minimum(self._state.max_norm, longest))

    def _usable(self, ids: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        """[m] bool, whether each id is in range, has True in `mask`, and does not occur earlier."""
        mask = mask & (ids >= 0) & (ids < self._shape.capacity)
        return mask & (Groups.of(ids, mask).rank == 0)
