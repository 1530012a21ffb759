"""The candidates of a `TreeIndex` with stored embeddings; `coded` is for one without."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from negative_cache.layers._tree.state import LeafPlan, write_rows
from negative_cache.layers._variables import make_state_variable, scatter_rows
from negative_cache.ops.tree.statistics import candidate_stats, combine

_WRITTEN_AT_ONCE = 2**16

# (vectors [n, d] float32, ids [n], or None if the vectors are means of nodes) -> vectors [n, d]
RowTransform = Callable[[tf.Tensor, tf.Tensor | None], tf.Tensor]


class StoredEmbeddings:
    """Stores the embeddings of the candidates, so that scores are exact.

    The methods without further documentation are those of `CodedResiduals`.

    Args:
      capacity: the number of candidates.
      dim: d.
      dtype: dtype of the stored embeddings.
    """

    leaf_means_move = True
    leaf_mean_dtype = tf.float32
    # Leaves have room for new candidates.
    leaves = LeafPlan(size=64, fill=0.66, spare=2.0)

    def __init__(self, capacity: int, dim: int, dtype: tf.DType):
        self._capacity, self._dtype = capacity, dtype
        self.embeddings = make_state_variable(lambda: tf.zeros([capacity, dim], dtype), "rows")

    def transformed(self, row_transform: RowTransform) -> "TransformedCandidates":
        """The candidates with `row_transform` applied before they are scored."""
        return TransformedCandidates(self.embeddings, row_transform)

    @property
    def variables(self) -> dict[str, tf.Variable]:
        """The variables that files hold."""
        return {"embeddings": self.embeddings}

    def products(
        self, queries: tf.Tensor, members: tf.Tensor, node_products: tf.Tensor
    ) -> tf.Tensor:
        """See `ops.tree.cut.Candidates`."""
        return TransformedCandidates(self.embeddings).products(queries, members, node_products)

    def rounded(self, vectors: tf.Tensor) -> tf.Tensor:
        """`vectors` [n, d] float32, rounded to the stored dtype."""
        return tf.cast(tf.cast(vectors, self._dtype), tf.float32)

    def read(self, ids: tf.Tensor, node: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns vectors [..., d] float32 of candidates `ids` [...], and their errors, zero."""
        del node
        vectors = tf.cast(tf.gather(self.embeddings, ids), tf.float32)
        return vectors, tf.zeros(tf.shape(ids))

    def write(
        self, ids: tf.Tensor, vectors: tf.Tensor, node: tf.Tensor, mask: tf.Tensor
    ) -> tf.Tensor:
        """Stores `vectors` [n, d] wherever `mask` [n] is True. Returns their errors [n], zero."""
        del node
        write_rows(self.embeddings, ids, vectors, mask)
        return tf.zeros(tf.shape(ids))

    def read_members(self, members: tf.Tensor, node: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """`read` for the members [n, leaf_size] of leaves; arbitrary for empty slots."""
        del node
        return self.read(tf.maximum(members, 0), None)

    def recentre(
        self,
        ids: tf.Tensor,
        vectors: tf.Tensor,
        errors: tf.Tensor,
        is_there: tf.Tensor,
        old_node: tf.Tensor,
        node: tf.Tensor,
        mask: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Computes means and statistics of leaves after a split; see `CodedResiduals.recentre`."""
        del ids, old_node, node, mask
        return combine(vectors, candidate_stats(is_there, errors))

    def copy_nodes(self, blocks: tf.Tensor, new_blocks: tf.Tensor, mask: tf.Tensor) -> None:
        """Does nothing, because nothing is stored per node."""

    @property
    def accepts_updates(self) -> tf.Tensor:
        """Scalar bool, True: updates need no earlier `load`."""
        return tf.constant(True)

    def clear(self) -> None:
        """Does nothing, because old embeddings are never read."""

    def summary(self, members: tf.Tensor, node: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Mean [n, d] and statistics [n, 4] of leaves with `members` [n, leaf_size]."""
        vectors, errors = self.read_members(members, node)
        return combine(vectors, candidate_stats(members >= 0, errors))

    def load(
        self,
        embeddings: np.ndarray,
        members: np.ndarray,
        owners: np.ndarray,
        rng: np.random.Generator,
    ) -> None:
        """Stores those of `embeddings` [n, d] whose row number is among `members`."""
        del owners, rng
        is_member = np.zeros(self._capacity, bool)
        is_member[members[members >= 0]] = True
        for start in range(0, len(embeddings), _WRITTEN_AT_ONCE):
            ids = start + np.flatnonzero(is_member[start : start + _WRITTEN_AT_ONCE])
            rows = tf.cast(np.asarray(embeddings[ids], np.float32), self._dtype)
            scatter_rows(self.embeddings, tf.constant(ids), rows)


class TransformedCandidates:
    """`ops.tree.cut.Candidates` with stored embeddings and an optional transform.

    Args:
      embeddings: [capacity, d] variable.
      row_transform: applied to embeddings before they are scored; None for no transform.
    """

    def __init__(self, embeddings: tf.Variable, row_transform: RowTransform | None = None):
        self._embeddings, self._row_transform = embeddings, row_transform

    def products(
        self, queries: tf.Tensor, members: tf.Tensor, node_products: tf.Tensor
    ) -> tf.Tensor:
        """See `ops.tree.cut.Candidates`."""
        del node_products
        num_leaves, size = members.shape[1:]
        ids = tf.reshape(tf.maximum(members, 0), [-1, num_leaves * size])
        vectors = tf.cast(tf.gather(self._embeddings, ids), tf.float32)
        if self._row_transform is not None:
            flat = tf.reshape(vectors, [-1, vectors.shape[-1]])
            moved = self._row_transform(flat, tf.reshape(ids, [-1]))
            vectors = tf.reshape(moved, tf.shape(vectors))
        products = tf.matmul(vectors, queries[..., tf.newaxis])
        return tf.reshape(products, [-1, num_leaves, size])
