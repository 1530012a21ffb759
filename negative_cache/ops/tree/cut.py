"""The arrays of a tree index, and cuts through it that are finest where a query's mass is.

A node n covers |n| candidates with mean c_n, mean squared distance v_n to it, and radius r_n. For a
query x (divided by the temperature) the sum Z_n of exp⟨x, y⟩ over them is estimated to second order
as |n| exp(⟨x, c_n⟩ + ‖x‖² v_n / 2d), and bounded by

    |n| exp⟨x, c_n⟩ <= Z_n <= |n| exp⟨x, c_n⟩ cosh(‖x‖ r_n),

from below by Jensen's inequality, from above because the convex function exp lies below its chord
over the range of the scores, whose mean is ⟨x, c_n⟩ (after Monath et al., arXiv 2303.15311, who
bound by exp(‖x‖ r_n)).

A *cut* is a set of nodes and candidates that cover every candidate once. It starts as all nodes of
the root block, and at every level a fixed number of nodes, the heaviest, are replaced by their
children. All shapes are fixed.
"""

import math
from typing import NamedTuple, Protocol

import tensorflow as tf

from negative_cache.ops import _execution
from negative_cache.ops._block_scorer import INADMISSIBLE, TensorFn, is_among
from negative_cache.ops.tree.shape import TreeShape

# The columns of `TreeLevel.stats`.
COUNT, SPREAD, RADIUS, ERROR = range(4)
NUM_STATS = 4
# Rounding of one float32 operation.
ROUNDING = 2.0**-24
# Of the logarithm of a sum of exponentials.
_SUM_ROUNDING = 64 * ROUNDING
# Inner nodes opened for each leaf that is: their blocks are smaller than leaves, and opening them
# is the cheaper way to finer masses.
_INNER_BEAM = 2


class TreeLevel(NamedTuple):
    """The nodes of one level, in blocks; tensors or variables.

    Attributes:
      mean: [blocks, width, d] float, c_n.
      stats: [blocks, width, 4] float32: |n|; v_n; r_n, no smaller than the distance of any
        candidate to c_n; and a bound of the distance of c_n to the exact mean, which rounding
        moves it away from.
      children: [blocks, width] int32, the block of the next level, or the leaf, that holds the
        node's children; -1 where there is no node.
    """

    mean: tf.Tensor
    stats: tf.Tensor
    children: tf.Tensor


class Candidates(Protocol):
    """What is known of the candidates themselves."""

    def products(
        self, queries: tf.Tensor, members: tf.Tensor, node_products: tf.Tensor
    ) -> tf.Tensor:
        """[B, n, leaf_size] inner products of queries [B, d] with members of n leaves for each.

        Args:
          queries: [B, d] float32.
          members: [B, n, leaf_size] int32, ids; any value of -1 may be returned for -1.
          node_products: [B, n] inner products with the means of the leaves.
        """


class Tree(NamedTuple):
    """A tree index as arrays, tensors or variables.

    Attributes:
      shape: their sizes.
      levels: the node levels.
      members: [num_leaves, leaf_size] int32, the ids in each leaf; -1 in empty slots.
      candidates: what scores them.
      mean_transform: function [n, d] -> [n, d] applied to means before they are scored.
    """

    shape: TreeShape
    levels: tuple[TreeLevel, ...]
    members: tf.Tensor
    candidates: Candidates
    mean_transform: TensorFn | None = None

    def means_of_blocks(self, depth: int, blocks: tf.Tensor) -> tf.Tensor:
        """[..., width, d] float32, the (transformed) means of the nodes of blocks [...]."""
        return self._transformed(tf.gather(self.levels[depth].mean, blocks))

    def means_of_nodes(self, depth: int, addresses: tf.Tensor) -> tf.Tensor:
        """[..., d] float32, the (transformed) means of the nodes at `addresses` [...]."""
        return self._transformed(take_nodes(self.levels[depth].mean, addresses))

    def _transformed(self, means: tf.Tensor) -> tf.Tensor:
        means = tf.cast(means, tf.float32)
        if self.mean_transform is None:
            return means
        flat = tf.reshape(means, [-1, means.shape[-1]])
        return tf.reshape(self.mean_transform(flat), tf.shape(means))


class Scoring:
    """Scores of a batch of queries with nodes and candidates.

    Args:
      queries: [B, d] float32.
      transform: elementwise, nondecreasing function of the inner products.
      candidate_ids: [capacity] ids, compared with `positive_ids`; candidates are their own ids
        where None.
      positive_ids: [B] or [B, P]; candidates with an id of a query's own are left out for it.
      max_scores: [B]; candidates that score higher are left out.
    """

    def __init__(
        self,
        queries: tf.Tensor,
        transform: TensorFn | None = None,
        *,
        candidate_ids: tf.Tensor | None = None,
        positive_ids: tf.Tensor | None = None,
        max_scores: tf.Tensor | None = None,
    ):
        self.queries = queries
        self._transform = transform
        self._candidate_ids = candidate_ids
        if positive_ids is not None:
            if candidate_ids is not None:
                positive_ids = tf.convert_to_tensor(positive_ids, candidate_ids.dtype)
            else:
                positive_ids = tf.cast(positive_ids, tf.int32)
            if positive_ids.shape.rank == 1:
                positive_ids = positive_ids[:, tf.newaxis]
        self._positive_ids = positive_ids
        self._max_scores = None if max_scores is None else tf.cast(max_scores, tf.float32)

    def log_masses(self, products: tf.Tensor, stats: tf.Tensor) -> tf.Tensor:
        """Estimates of log Z_n [B, ...] from inner products with the means.

        They are `INADMISSIBLE` for empty nodes. The second-order term is at most ‖x‖ r_n. Where
        candidates of high scores are left out, it is as if the node's scores were normal: of their
        exponentials' sum the part Φ(z), z = (max - ⟨x, c_n⟩ - σ²) / σ, is left, with their variance
        σ². The gradient by the query then is that of a limit which leaves the same candidates out
        wherever the query goes, as it does: the mean c_n + (1 - φ(z) / σ Φ(z)) v_n x / d of those
        that are left, under their softmax.
        """
        count, spread, radius, _ = tf.unstack(stats, axis=-1)
        # The derivative of a square root has to be kept from zero.
        squares = tf.reduce_sum(tf.square(self.queries), axis=1)
        norms = self._like(tf.sqrt(tf.maximum(squares, 1e-30)), products)
        scores, slopes = self._transformed(products)
        reach = slopes * norms * radius
        variance = (slopes * norms) ** 2 * spread / self.queries.shape[1]
        second_order = tf.minimum(0.5 * variance, reach)
        if self._max_scores is not None:
            deviation = tf.sqrt(tf.maximum(variance, 1e-12))
            room = (self._like(self._max_scores, products) - scores - variance) / deviation
            log_part = tf.stop_gradient(_log_normal_cdf(room))
            density = tf.exp(-0.5 * tf.square(room)) / math.sqrt(2.0 * math.pi)
            lost = tf.stop_gradient(density * tf.exp(-log_part) / deviation)
            slowed = second_order - tf.stop_gradient(second_order)
            second_order += log_part - lost * slowed
        log_masses = scores + second_order + tf.math.log(tf.maximum(count, 1.0))
        return tf.where(count > 0.0, log_masses, INADMISSIBLE)

    def bounds(
        self, products: tf.Tensor, stats: tf.Tensor, rounding: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Bounds of log Z_n [B, ...] from below and above; `INADMISSIBLE` for empty nodes.

        With a transform, |n| times its values at ⟨x, c_n⟩ ± ‖x‖ r_n bound Z_n. The centre may miss
        the exact mean of the scores by up to `e`: the lower bound is that of the smallest possible
        mean, and the chord of exp at the largest one is the upper.

        Args:
          products: [B, ...] inner products with the means.
          stats: [..., 4].
          rounding: [B], what an inner product may be off by.
        """
        count, _, radius, error = tf.unstack(stats, axis=-1)
        norms = self._like(tf.norm(self.queries, axis=1), products)
        rounding = self._like(rounding, products)
        reach = norms * radius + rounding
        log_count = tf.math.log(tf.maximum(count, 1.0))
        if self._transform is None:
            off = tf.minimum(norms * error + rounding, reach)
            lower = products - off
            # cosh R + e/R sinh R = (exp R (1 + e/R) + exp -R (1 - e/R)) / 2
            share = off / tf.maximum(reach, 1e-30)
            upper = products + reach
            upper += tf.math.log(0.5 * (1.0 + share + tf.exp(-2.0 * reach) * (1.0 - share)))
        else:
            lower, upper = self._transform(products - reach), self._transform(products + reach)
        return tuple(
            tf.where(count > 0.0, log_count + bound, INADMISSIBLE) for bound in (lower, upper)
        )

    def of_candidates(self, products: tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
        """Scores [B, ...] of candidates; `INADMISSIBLE` for ids of -1 and for those left out."""
        scores = products if self._transform is None else self._transform(products)
        admissible = ids >= 0
        if self._positive_ids is not None:
            their_ids = ids
            if self._candidate_ids is not None:
                their_ids = tf.gather(self._candidate_ids, tf.maximum(ids, 0))
            admissible &= ~is_among(their_ids, self._positive_ids)
        if self._max_scores is not None:
            admissible &= scores <= self._like(self._max_scores, scores)
        return tf.where(admissible, scores, INADMISSIBLE)

    def _transformed(self, products: tf.Tensor) -> tf.Tensor:
        """Scores, and their derivatives by the inner product."""
        if self._transform is None:
            return products, 1.0
        with tf.GradientTape() as tape:
            tape.watch(products)
            scores = self._transform(products)
        slopes = tape.gradient(scores, products, unconnected_gradients="zero")
        return scores, tf.stop_gradient(tf.where(tf.math.is_finite(slopes), slopes, 0.0))

    def _like(self, values: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
        """[B, 1, ...], of the rank of `other`."""
        return tf.reshape(values, [-1] + [1] * (other.shape.rank - 1))


class CutNodes(NamedTuple):
    """The nodes of one level that were scored, for each query.

    Attributes:
      products: [B, n] inner products with the means.
      stats: [B or 1, n, 4].
      log_mass: [B, n]; `INADMISSIBLE` for nodes that are empty, or that were opened and so are
        not in the cut.
      first: [B or 1, n / width], the addresses of the first node of each block.
      opened: [B, k] int32, which of the nodes were opened; None where none was.
    """

    products: tf.Tensor
    stats: tf.Tensor
    log_mass: tf.Tensor
    first: tf.Tensor
    opened: tf.Tensor | None = None


class Cut(NamedTuple):
    """A cut for each query.

    Attributes:
      nodes: for each node level, its nodes.
      ids: [B, n] int32, the candidates of the opened leaves, -1 for empty slots; None where no
        leaf was opened.
      products: [B, n] float32, their inner products.
      scores: [B, n] float32, their scores; `INADMISSIBLE` where they are left out.
    """

    nodes: tuple[CutNodes, ...]
    ids: tf.Tensor | None = None
    products: tf.Tensor | None = None
    scores: tf.Tensor | None = None

    @property
    def log_masses(self) -> tf.Tensor:
        """[B, n], level by level, and the candidates last."""
        parts = [nodes.log_mass for nodes in self.nodes]
        return tf.concat(parts if self.scores is None else [*parts, self.scores], axis=1)


def make_cut(tree: Tree, scoring: Scoring, beam: int, *, open_leaves: bool = True) -> Cut:
    """Cuts the tree for each query, opening the heaviest nodes of each level.

    Args:
      tree: the tree.
      scoring: of the queries [B, d].
      beam: leaves to open, or all where there are fewer; of inner nodes twice as many are opened
        at each level.
      open_leaves: whether leaves are opened at all, to single candidates.
    """
    level = tree.levels[0]
    # The means of the root block as the dense matrix that they are.
    products = tf.matmul(scoring.queries, tree.means_of_blocks(0, 0), transpose_b=True)
    stats = tf.convert_to_tensor(level.stats)
    first = tf.zeros([1, 1], tf.int32)
    all_nodes = []
    for depth, level in enumerate(tree.levels):
        log_mass = scoring.log_masses(products, stats)
        is_last = depth == tree.shape.num_levels - 1
        if is_last and not open_leaves:
            all_nodes.append(CutNodes(products, stats, log_mass, first))
            return Cut(tuple(all_nodes))
        width = tree.shape.widths[depth]
        num_opened = beam if is_last else _INNER_BEAM * beam
        heaviest, nodes = tf.math.top_k(log_mass, k=min(num_opened, products.shape[1]))
        in_cut = _leave_out(log_mass, nodes)
        all_nodes.append(CutNodes(products, stats, in_cut, first, nodes))
        address = _take(first, nodes // width) + nodes % width
        # Of empty nodes, -1.
        block = tf.where(heaviest > INADMISSIBLE, take_nodes(level.children, address), -1)
        if is_last:
            members = tf.gather(tree.members, tf.maximum(block, 0))
            members = tf.where(block[..., tf.newaxis] >= 0, members, -1)
            node_products = tf.gather(products, nodes, batch_dims=1)
            products = tree.candidates.products(scoring.queries, members, node_products)
            ids, products = _flat(members), _flat(products)
            return Cut(tuple(all_nodes), ids, products, scoring.of_candidates(products, ids))
        products, stats = _score_blocks(tree, depth + 1, scoring.queries, block)
        first = tf.maximum(block, 0) * tree.shape.widths[depth + 1]
    raise AssertionError("a tree has at least one level")


def log_partition_bounds(
    cut: Cut, scoring: Scoring, rounding: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """[B] bounds of log Z from below and above: the sums of those of the cut's parts.

    Args:
      cut: of the queries of `scoring`.
      scoring: without candidates left out, of which the bounds of nodes know nothing.
      rounding: [B], what an inner product may be off by.
    """
    lower: list[tf.Tensor] = []
    upper: list[tf.Tensor] = []
    for nodes in cut.nodes:
        for parts, bound in zip(
            (lower, upper), scoring.bounds(nodes.products, nodes.stats, rounding)
        ):
            bound = tf.maximum(bound, INADMISSIBLE)
            parts.append(bound if nodes.opened is None else _leave_out(bound, nodes.opened))
    if cut.ids is not None:
        margin = rounding[:, tf.newaxis]
        lower.append(scoring.of_candidates(cut.products - margin, cut.ids))
        upper.append(scoring.of_candidates(cut.products + margin, cut.ids))
    bounds = []
    for parts, sign in ((lower, -1.0), (upper, 1.0)):
        bound = tf.reduce_logsumexp(tf.concat(parts, axis=1), axis=1)
        bound += sign * _SUM_ROUNDING * (1.0 + tf.abs(bound))
        bounds.append(without_nothing(bound))
    return bounds[0], bounds[1]


def _log_normal_cdf(values: tf.Tensor) -> tf.Tensor:
    """Logarithm of Φ, no less than about -70."""
    return tf.math.log(0.5 * tf.math.erfc(-values / math.sqrt(2.0)) + 1e-30)


def without_nothing(log_partition: tf.Tensor, log_zero: float = -math.inf) -> tf.Tensor:
    """`log_zero` where there is no candidate. What is NaN stays NaN."""
    return tf.where(log_partition <= 0.5 * INADMISSIBLE, log_zero, log_partition)


def take_nodes(values: tf.Tensor, addresses: tf.Tensor) -> tf.Tensor:
    """The values [blocks, width, ...] of the nodes at `addresses`, whatever their shape."""
    width = values.shape[1]
    if _execution.is_in_xla():
        # It has no kernel for the nodes of a variable, and reads a tensor of it without a copy.
        values = tf.convert_to_tensor(values)
    return tf.gather_nd(values, tf.stack([addresses // width, addresses % width], axis=-1))


def _score_blocks(
    tree: Tree, depth: int, queries: tf.Tensor, block: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Products [B, n * width] with the nodes of blocks [B, n], and their stats; -1 is empty."""
    level, dim = tree.levels[depth], queries.shape[1]
    held = tf.maximum(block, 0)
    means = tree.means_of_blocks(depth, held)
    num_queries = tf.shape(queries)[0]
    size = block.shape[1] * level.mean.shape[1]
    means = tf.reshape(means, [num_queries, size, dim])
    stats = tf.gather(level.stats, held)
    stats = tf.where((block >= 0)[..., tf.newaxis, tf.newaxis], stats, 0.0)
    products = tf.matmul(means, queries[..., tf.newaxis])[..., 0]
    return products, tf.reshape(stats, [num_queries, size, NUM_STATS])


def _take(values: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
    """values[b, positions[b, i]]; `values` may have one row for all b."""
    if values.shape[0] == 1 and values.shape[1] == 1:
        return tf.zeros_like(positions) + values
    return tf.gather(values, positions, batch_dims=1)


def _leave_out(log_mass: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
    """`log_mass` [B, n] with `INADMISSIBLE` at `positions` [B, k]."""
    rows = tf.range(tf.shape(positions)[0])[:, tf.newaxis] + tf.zeros_like(positions)
    where = tf.stack([rows, positions], axis=-1)
    return tf.tensor_scatter_nd_update(log_mass, where, tf.fill(tf.shape(positions), INADMISSIBLE))


def _flat(values: tf.Tensor) -> tf.Tensor:
    return tf.reshape(values, [tf.shape(values)[0], values.shape[1] * values.shape[2]])
