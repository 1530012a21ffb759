"""The candidates of a `TreeIndex` without embeddings: residuals coded in a few bytes."""

from typing import NoReturn, TypeAlias

import numpy as np
import tensorflow as tf

from negative_cache.layers._tree.state import LeafPlan, write_nodes, write_rows
from negative_cache.layers._tree.stored import RowTransform, StoredEmbeddings
from negative_cache.layers._variables import make_state_variable
from negative_cache.ops.groups import Groups
from negative_cache.ops.product_quantizer import (
    dequantize,
    lookup_scores,
    lookup_tables,
    quantize,
    train_codebooks,
)
from negative_cache.ops.tree.cut import ERROR, RADIUS, SPREAD, take_nodes
from negative_cache.ops.tree.shape import TreeShape
from negative_cache.ops.tree.statistics import (
    candidate_stats,
    combine,
    distances_round_up,
    round_means,
)

_NUM_CODES = 256
# The number of residuals that codebooks are trained on, and of k-means iterations.
_TRAINED_ON, _ITERATIONS = 2**15, 10
# The largest number of principal directions that are coded. They hold most of the residuals'
# variance, in a third of the memory at d = 768.
_MAX_DIRECTIONS = 256
# The number of coordinates of embeddings that are coded at a time.
_CODED_AT_ONCE = 2**22


class CodedResiduals:
    """Represents a candidate as the centre of its leaf plus a product-quantised residual.

    The centre of a leaf stays fixed until the leaf splits, so that codes stay valid. The distance
    between the centre and the exact mean is part of the node's error.

    Before coding, residuals are rotated to their principal directions, which are divided among the
    parts of a code so that each part gets large and small variances (after Ge et al., CVPR 2013).
    Without the rotation, a part would consist of neighbouring coordinates. If the embeddings fill
    only a subspace, several parts might then code the same information.

    Args:
      shape: the sizes of the tree.
      num_bytes: m, the bytes of a candidate's code. If 0, there are no residuals, and a candidate
        is represented by the centre of its leaf alone.
      leaf_means: [blocks, width, d] variable, the centres of the leaves.
      leaf_stats: [blocks, width, 4] variable, the statistics of the leaves' nodes.
    """

    leaf_means_move = False
    leaf_mean_dtype = tf.bfloat16
    # To save memory, leaves are large and full.
    leaves = LeafPlan(size=1024, fill=0.9, spare=1.15)

    def __init__(
        self,
        shape: TreeShape,
        num_bytes: int,
        leaf_means: tf.Variable,
        leaf_stats: tf.Variable,
    ):
        self._shape = shape
        self._means = leaf_means
        self._stats = leaf_stats
        self._is_indexed = make_state_variable(lambda: tf.constant(False), "is_indexed")
        self.variables = {"is_indexed": self._is_indexed}
        self._has_codes = num_bytes > 0
        if not self._has_codes:
            return
        nodes = leaf_stats.shape[:2]
        self._off = make_state_variable(lambda: tf.zeros(nodes), "off")
        codes = [shape.capacity, num_bytes]
        self._codes = make_state_variable(lambda: tf.zeros(codes, tf.uint8), "codes")
        part = max(min(shape.dim, _MAX_DIRECTIONS) // num_bytes, 1)
        books = [num_bytes, _NUM_CODES, part]
        self._books = make_state_variable(lambda: tf.zeros(books, tf.bfloat16), "codebooks")
        self._basis = make_state_variable(
            lambda: tf.eye(shape.dim, part * num_bytes, dtype=tf.bfloat16), "basis"
        )
        self.variables |= {
            "off": self._off,
            "codes": self._codes,
            "codebooks": self._books,
            "basis": self._basis,
        }

    def transformed(self, row_transform: RowTransform) -> NoReturn:
        """Raises a `ValueError`: there are no embeddings to apply a function to."""
        raise ValueError(
            "`row_transform` needs an index with store_embeddings=True. Received an index with"
            " store_embeddings=False."
        )

    def products(
        self, queries: tf.Tensor, members: tf.Tensor, node_products: tf.Tensor
    ) -> tf.Tensor:
        """See `ops.tree.cut.Candidates`."""
        num_leaves, size = members.shape[1:]
        products = tf.repeat(node_products[..., tf.newaxis], size, axis=2)
        if not self._has_codes:
            return products
        ids = tf.reshape(tf.maximum(members, 0), [-1, num_leaves * size])
        tables = lookup_tables(self._along_basis(queries), self._codebooks())
        residual_products = lookup_scores(tables, tf.gather(self._codes, ids))
        return products + tf.reshape(residual_products, [-1, num_leaves, size])

    def rounded(self, vectors: tf.Tensor) -> tf.Tensor:
        """Returns `vectors` unchanged: the statistics use them before they are coded."""
        return vectors

    def read(self, ids: tf.Tensor, node: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Reads vectors of candidates.

        Args:
          ids: [n] int32, the candidates.
          node: [n] int32, the nodes of their leaves.

        Returns:
          vectors: [n, d] float32.
          errors: [n] float32, bounds on the errors of the vectors.
        """
        vectors = self._centres(node)
        if not self._has_codes:
            return vectors, take_nodes(self._stats, node)[:, RADIUS]
        return vectors + self._decode(tf.gather(self._codes, ids)), take_nodes(self._off, node)

    def read_members(self, members: tf.Tensor, node: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """`read` for the members [n, leaf_size] of leaves, given the leaves' nodes [n].

        The results for empty slots are arbitrary.
        """
        size = self._shape.leaf_size
        vectors, errors = self.read(tf.reshape(tf.maximum(members, 0), [-1]), tf.repeat(node, size))
        vectors = tf.reshape(vectors, [-1, size, self._shape.dim])
        return vectors, tf.reshape(errors, [-1, size])

    def write(
        self, ids: tf.Tensor, vectors: tf.Tensor, node: tf.Tensor, mask: tf.Tensor
    ) -> tf.Tensor:
        """Codes and stores vectors.

        Args:
          ids: [n] int32, the candidates.
          vectors: [n, d] float32.
          node: [n] int32, the nodes of their leaves.
          mask: [n] bool, which entries to store.

        Returns:
          [n] float32, the errors of `vectors`, for the statistics: zero.
        """
        if self._has_codes:
            residuals = vectors - self._centres(node)
            codes, off = self._encode(residuals)
            write_rows(self._codes, ids, codes, mask)
            groups = Groups.of(node, mask)
            off = groups.max(off)
            off = tf.maximum(off, take_nodes(self._off, groups.numbers))
            write_nodes(self._off, groups.numbers, off, groups.is_some)
        return tf.zeros(tf.shape(ids))

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
        """Computes centres and statistics of leaves after a split, and codes residuals again.

        Args:
          ids: [n, leaf_size] int32, the candidates.
          vectors: [n, leaf_size, d] float32, the vectors from `read`.
          errors: [n, leaf_size] float32, the errors from `read`.
          is_there: [n, leaf_size] bool, whether each candidate belongs to the leaf.
          old_node: [n] int32, the node of the leaf that was split.
          node: [n] int32, the node of the leaf.
          mask: [n] bool, which leaves to write.

        Returns:
          mean: [n, d] float32, the centres.
          stats: [n, 4] float32.
        """
        mean, stats = combine(vectors, candidate_stats(is_there, errors))
        if not self._has_codes:
            # All candidates are read as one point, so their spread is taken from the old node.
            stats += take_nodes(self._stats, old_node) * tf.one_hot(SPREAD, stats.shape[-1])
            return round_means(mean, stats, self.leaf_mean_dtype)
        mean, stats = round_means(mean, stats, self.leaf_mean_dtype)
        codes, off = self._encode(vectors - mean[:, tf.newaxis])
        off = tf.reduce_max(tf.where(is_there, errors + off, 0.0), axis=1)
        written = tf.reshape(is_there & mask[:, tf.newaxis], [-1])
        codes = tf.reshape(codes, [-1, codes.shape[-1]])
        write_rows(self._codes, tf.reshape(ids, [-1]), codes, written)
        write_nodes(self._off, node, off, mask)
        return mean, stats

    def copy_nodes(self, blocks: tf.Tensor, new_blocks: tf.Tensor, mask: tf.Tensor) -> None:
        """Copies the values stored per node of the last level from `blocks` to `new_blocks`.

        Args:
          blocks: [n] int32.
          new_blocks: [n] int32. A node keeps its row within the block.
          mask: [n] bool, which blocks to copy.
        """
        if self._has_codes:
            write_rows(self._off, new_blocks, tf.gather(self._off, blocks), mask)

    def clear(self) -> None:
        """Resets the state when all candidates have been removed."""
        self._is_indexed.assign(False)
        if self._has_codes:
            self._off.assign(tf.zeros_like(self._off))

    @property
    def accepts_updates(self) -> tf.Tensor:
        """Scalar bool, whether `load` has been called: codes need centres and codebooks."""
        return tf.convert_to_tensor(self._is_indexed)

    def summary(self, members: tf.Tensor, node: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the unchanged centres of leaves, and bounds no looser than before."""
        vectors, errors = self.read_members(members, node)
        centre, stats = self._centres(node), take_nodes(self._stats, node)
        there = tf.cast(members >= 0, tf.float32)
        distances = tf.norm(vectors - centre[:, tf.newaxis], axis=2)
        reach = tf.reduce_max(there * (distances * distances_round_up(vectors) + errors), axis=1)
        known, known_stats = combine(vectors, candidate_stats(members >= 0, errors))
        missed = tf.norm(known - centre, axis=1) + known_stats[:, ERROR]
        columns = tf.unstack(stats, axis=1)
        columns[RADIUS] = tf.minimum(columns[RADIUS], reach)
        columns[ERROR] = tf.minimum(columns[ERROR], missed)
        return centre, tf.stack(columns, axis=1)

    def load(
        self,
        embeddings: np.ndarray,
        members: np.ndarray,
        owners: np.ndarray,
        rng: np.random.Generator,
    ) -> None:
        """Stores all candidates of a topology: computes the leaves' statistics, then the codes.

        Args:
          embeddings: [n, d] float; candidate i is row i.
          members: [num_leaves, leaf_size] int32, the candidate in each slot; -1 in empty slots.
          owners: [num_leaves] int32, the node of each leaf; -1 if the leaf is unused.
          rng: chooses the residuals that the codebooks are trained on.
        """
        self._is_indexed.assign(bool(np.any(members >= 0)))
        used = np.flatnonzero(owners >= 0)
        size = max(_CODED_AT_ONCE // (self._shape.leaf_size * self._shape.dim), 1)
        parts = [used[start : start + size] for start in range(0, len(used), size)]
        for leaves in parts:
            self._load_leaves(embeddings, members[leaves], owners[leaves])
        if not self._has_codes:
            return
        slots = np.flatnonzero(members >= 0)
        slots = rng.choice(slots, min(_TRAINED_ON, len(slots)), replace=False)
        nodes = owners[slots // self._shape.leaf_size]
        vectors = _rows(embeddings, members.reshape(-1)[slots])
        residuals = vectors - self._centres(nodes)
        num_parts = self._codes.shape[1]
        basis = _principal_directions(residuals.numpy(), self._basis.shape[1], num_parts)
        self._basis.assign(tf.cast(basis, tf.bfloat16))
        books = train_codebooks(
            self._along_basis(residuals).numpy(),
            num_parts,
            num_codes=_NUM_CODES,
            iterations=_ITERATIONS,
            rng=rng,
        )
        self._books.assign(tf.cast(books, tf.bfloat16))
        for leaves in parts:
            some = members[leaves]
            ids = some[some >= 0]
            node = np.repeat(owners[leaves], np.sum(some >= 0, axis=1))
            self.write(ids, _rows(embeddings, ids), node, tf.fill([len(ids)], True))

    def _load_leaves(self, embeddings: np.ndarray, members: np.ndarray, node: np.ndarray) -> None:
        vectors = _rows(embeddings, np.maximum(members, 0).reshape(-1))
        vectors = tf.reshape(vectors, [*members.shape, self._shape.dim])
        stats = candidate_stats(members >= 0, tf.zeros(members.shape))
        mean, stats = round_means(*combine(vectors, stats), self.leaf_mean_dtype)
        everywhere = tf.fill([len(node)], True)
        write_nodes(self._means, node, mean, everywhere)
        write_nodes(self._stats, node, stats, everywhere)

    def _encode(self, residuals: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns codes [..., m] of residuals [..., d], and bounds [...] on the coding errors."""
        codes = quantize(self._along_basis(residuals), self._codebooks())
        off = tf.norm(residuals - self._decode(codes), axis=-1)
        # The second term bounds the rounding of the sum with a centre.
        return codes, off * distances_round_up(residuals) + 1e-6 * tf.norm(residuals, axis=-1)

    def _decode(self, codes: tf.Tensor) -> tf.Tensor:
        """Returns the residuals [..., d] that codes [..., m] represent."""
        return tf.matmul(
            dequantize(codes, self._codebooks()),
            tf.cast(tf.convert_to_tensor(self._basis), tf.float32),
            transpose_b=True,
        )

    def _along_basis(self, vectors: tf.Tensor) -> tf.Tensor:
        return tf.matmul(vectors, tf.cast(tf.convert_to_tensor(self._basis), tf.float32))

    def _centres(self, node: tf.Tensor) -> tf.Tensor:
        return tf.cast(take_nodes(self._means, node), tf.float32)

    def _codebooks(self) -> tf.Tensor:
        return tf.cast(tf.convert_to_tensor(self._books), tf.float32)


# The candidates of a tree, in either representation.
TreeCandidates: TypeAlias = StoredEmbeddings | CodedResiduals


def _principal_directions(residuals: np.ndarray, count: int, num_parts: int) -> np.ndarray:
    """[d, count] float, the principal directions of residuals [n, d] with the largest variances.

    They are dealt out to the parts of a code in turn, so that each part gets large and small
    variances.
    """
    _, directions = np.linalg.eigh(residuals.T @ residuals)
    by_variance = directions[:, ::-1][:, :count]
    return by_variance[:, np.argsort(np.arange(count) % num_parts, kind="stable")]


def _rows(embeddings: np.ndarray, ids: np.ndarray) -> tf.Tensor:
    return tf.convert_to_tensor(np.asarray(embeddings[ids], np.float32))
