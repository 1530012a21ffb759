"""The arrays of a tree index, and cuts through it that are fine where a query's mass is.

A node n covers |n| candidates. c_n is their mean, v_n their mean squared distance to c_n, and r_n
their radius, a bound on their distances to c_n. For a query x (divided by the temperature), the
mass of the node is Z_n = Σ exp⟨x, y⟩ over its candidates. To second order it is estimated as
|n| exp(⟨x, c_n⟩ + ‖x‖² v_n / 2d). It is bounded by

    |n| exp⟨x, c_n⟩ <= Z_n <= |n| exp⟨x, c_n⟩ cosh(‖x‖ r_n).

The lower bound is Jensen's inequality. The upper bound holds because the convex function exp lies
below its chord over the range of the scores, whose mean is ⟨x, c_n⟩. (It is tighter than the bound
exp(‖x‖ r_n) of Monath et al., arXiv 2303.15311.)

A *cut* is a set of nodes and candidates that cover every candidate exactly once. It starts as all
nodes of the root block. At each level, a fixed number of nodes, those with the largest mass, are
*opened*: they are replaced by their children. All shapes are fixed.
"""

import copy
import math
from typing import NamedTuple, Protocol

import tensorflow as tf

from negative_cache.ops import _execution
from negative_cache.ops._block_scorer import INADMISSIBLE, TensorFn, is_among
from negative_cache.ops.tree.shape import TreeShape

# The columns of `TreeLevel.stats`.
COUNT, SPREAD, RADIUS, ERROR = range(4)
NUM_STATS = 4
# Relative rounding error of one float32 operation.
ROUNDING = 2.0**-24
# Relative rounding error of the logarithm of a sum of exponentials.
_SUM_ROUNDING = 64 * ROUNDING
# Inner nodes opened per opened leaf. Their blocks are smaller than leaves, so opening them is the
# cheaper way to more precise masses.
_INNER_BEAM = 2


class TreeLevel(NamedTuple):
    """The nodes of one level, in blocks, as tensors or variables.

    Attributes:
      mean: [blocks, width, d] float, c_n.
      stats: [blocks, width, 4] float32, with four columns. `COUNT`: |n|. `SPREAD`: v_n. `RADIUS`:
        r_n, at least the distance of every candidate to c_n. `ERROR`: a bound on the distance
        between c_n and the exact mean, from which c_n differs by rounding.
      children: [blocks, width] int32, the block of the next level, or the leaf, that holds the
        node's children; -1 if there is no node.
    """

    mean: tf.Tensor
    stats: tf.Tensor
    children: tf.Tensor


class Candidates(Protocol):
    """The stored candidates, in any representation that inner products can be computed from."""

    def products(
        self, queries: tf.Tensor, members: tf.Tensor, node_products: tf.Tensor
    ) -> tf.Tensor:
        """Inner products of each query with the members of n leaves of its own.

        Args:
          queries: [B, d] float32.
          members: [B, n, leaf_size] int32, the ids in the leaves; -1 for empty slots.
          node_products: [B, n] inner products with the means of the leaves.

        Returns:
          [B, n, leaf_size] float32; arbitrary for empty slots.
        """


class Tree(NamedTuple):
    """A tree index as tensors or variables.

    Attributes:
      shape: the sizes of the arrays.
      levels: the node levels, from the root down.
      members: [num_leaves, leaf_size] int32, the ids in each leaf; -1 in empty slots.
      candidates: the stored candidates.
      mean_transform: function [n, d] -> [n, d] applied to means before they are scored.
    """

    shape: TreeShape
    levels: tuple[TreeLevel, ...]
    members: tf.Tensor
    candidates: Candidates
    mean_transform: TensorFn | None = None

    def means_of_blocks(self, depth: int, blocks: tf.Tensor) -> tf.Tensor:
        """[..., width, d] float32, the (transformed) means of the nodes in `blocks` [...]."""
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
      transform: elementwise, nondecreasing function of the inner products; None for the identity.
      candidate_ids: [capacity] ids of the candidates, compared with `positive_ids`. If None, the id
        of a candidate is its index.
      positive_ids: [B] or [B, P]; candidates with a positive id of the query are excluded for that
        query.
      max_scores: [B]; candidates with a higher score are excluded for that query.
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

    def of_queries(self, chosen: tf.Tensor) -> "Scoring":
        """The scoring of some of the queries, [n] int32, which may come several times."""
        part = copy.copy(self)
        part.queries = tf.gather(self.queries, chosen)
        if self._positive_ids is not None:
            part._positive_ids = tf.gather(self._positive_ids, chosen)
        if self._max_scores is not None:
            part._max_scores = tf.gather(self._max_scores, chosen)
        return part

    def log_masses(self, products: tf.Tensor, stats: tf.Tensor) -> tf.Tensor:
        """Estimates log Z_n to second order; `INADMISSIBLE` for empty nodes.

        The second-order term ‖x‖² v_n / 2d is limited to ‖x‖ r_n.

        With `max_scores`, the scores in a node are assumed to be normal with variance σ². Then the
        share Φ(z), z = (max - ⟨x, c_n⟩ - σ²) / σ, of the mass remains. The gradient with respect to
        the query treats the set of excluded candidates as fixed. It is the mean of the remaining
        candidates under their softmax: c_n + (1 - φ(z) / σ Φ(z)) v_n x / d.

        Args:
          products: [B, ...] inner products with the means.
          stats: [..., 4], the statistics of the nodes.

        Returns:
          [B, ...] float32.
        """
        count, spread, radius, _ = tf.unstack(stats, axis=-1)
        # The derivative of the square root is infinite at zero.
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
        """Bounds log Z_n from below and above; `INADMISSIBLE` for empty nodes.

        Without a transform, the bounds are those of the module's docstring, adjusted for the error
        e of the mean score. With R = ‖x‖ r_n, the lower bound takes the smallest possible mean
        ⟨x, c_n⟩ - e. The upper bound is the chord of exp at the largest possible mean ⟨x, c_n⟩ + e.
        With a transform t, |n| exp t(⟨x, c_n⟩ ± R) bound Z_n. R and e include `rounding`.

        Args:
          products: [B, ...] inner products with the means.
          stats: [..., 4], the statistics of the nodes.
          rounding: [B], the largest error of an inner product.

        Returns:
          lower: [B, ...] float32.
          upper: [B, ...] float32.
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
        """[B, ...] scores of candidates; `INADMISSIBLE` if the id is -1 or excluded.

        Args:
          products: [B, ...] inner products with the candidates.
          ids: [B, ...] int32, the candidates.
        """
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
        """The scores, and their derivatives with respect to the inner products."""
        if self._transform is None:
            return products, 1.0
        with tf.GradientTape() as tape:
            tape.watch(products)
            scores = self._transform(products)
        slopes = tape.gradient(scores, products, unconnected_gradients="zero")
        return scores, tf.stop_gradient(tf.where(tf.math.is_finite(slopes), slopes, 0.0))

    def _like(self, values: tf.Tensor, other: tf.Tensor) -> tf.Tensor:
        """`values` [B] reshaped to [B, 1, ...], with the rank of `other`."""
        return tf.reshape(values, [-1] + [1] * (other.shape.rank - 1))


class CutNodes(NamedTuple):
    """The nodes of one level that were scored for each query.

    Attributes:
      products: [B, n] inner products with the means.
      stats: [B or 1, n, 4], the statistics of the nodes.
      log_mass: [B, n], the estimates of log Z_n. `INADMISSIBLE` for nodes that are empty, and for
        opened nodes, which are not in the cut.
      first: [B or 1, n / width], the address of the first node of each block.
      opened: [B, k] int32, the positions of the opened nodes; None if no node was opened.
    """

    products: tf.Tensor
    stats: tf.Tensor
    log_mass: tf.Tensor
    first: tf.Tensor
    opened: tf.Tensor | None = None


class Cut(NamedTuple):
    """A cut for each query.

    Attributes:
      nodes: for each node level, the nodes that were scored.
      ids: [B, n] int32, the candidates of the opened leaves, -1 for empty slots; None if no leaf
        was opened.
      products: [B, n] float32, the candidates' inner products with the query.
      scores: [B, n] float32, the candidates' scores; `INADMISSIBLE` if they are excluded.
    """

    nodes: tuple[CutNodes, ...]
    ids: tf.Tensor | None = None
    products: tf.Tensor | None = None
    scores: tf.Tensor | None = None

    @property
    def log_masses(self) -> tf.Tensor:
        """[B, n], the log mass of each part of the cut: nodes level by level, then candidates."""
        parts = [nodes.log_mass for nodes in self.nodes]
        return tf.concat(parts if self.scores is None else [*parts, self.scores], axis=1)


def make_cut(tree: Tree, scoring: Scoring, beam: int, *, open_leaves: bool = True) -> Cut:
    """Cuts the tree for each query, opening the heaviest nodes of each level.

    Args:
      tree: the tree.
      scoring: scores queries [B, d].
      beam: number of leaves to open. On each level above, twice as many nodes are opened. If there
        are fewer, all are opened.
      open_leaves: whether leaves are opened, into single candidates.

    Returns:
      The `Cut`.
    """
    level = tree.levels[0]
    # All queries share the means of the root block, so one matrix product scores them.
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
        # -1 for empty nodes.
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
    """Bounds log Z from below and above: Z is the sum of the masses of the cut's parts.

    Args:
      cut: a cut for the queries of `scoring`.
      scoring: must not exclude candidates, because the bounds of nodes do not consider that.
      rounding: [B], the largest error of an inner product.

    Returns:
      lower: [B] float32; -inf if there are no candidates.
      upper: [B] float32; -inf if there are no candidates.
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
    """Returns log Φ, but at least about -70."""
    return tf.math.log(0.5 * tf.math.erfc(-values / math.sqrt(2.0)) + 1e-30)


def without_nothing(log_partition: tf.Tensor, log_zero: float = -math.inf) -> tf.Tensor:
    """Replaces the log partition of an empty set by `log_zero`. NaN stays NaN."""
    return tf.where(log_partition <= 0.5 * INADMISSIBLE, log_zero, log_partition)


def take_nodes(values: tf.Tensor, addresses: tf.Tensor) -> tf.Tensor:
    """The entries of `values` [blocks, width, ...] of the nodes at `addresses`, of any shape."""
    width = values.shape[1]
    if _execution.is_in_xla():
        # XLA has no kernel for `tf.gather_nd` of a variable. The conversion to a tensor does not
        # copy in XLA.
        values = tf.convert_to_tensor(values)
    return tf.gather_nd(values, tf.stack([addresses // width, addresses % width], axis=-1))


def _score_blocks(
    tree: Tree, depth: int, queries: tf.Tensor, block: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Inner products with the nodes of blocks.

    Args:
      tree: the tree.
      depth: the level of the nodes.
      queries: [B, d] float32.
      block: [B, n] int32, the blocks; -1 for none, whose nodes count as empty.

    Returns:
      products: [B, n · width] float32.
      stats: [B, n · width, 4] float32.
    """
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
    """values[b, positions[b, i]], or values[0, 0] if `values` is [1, 1]."""
    if values.shape[0] == 1 and values.shape[1] == 1:
        return tf.zeros_like(positions) + values
    return tf.gather(values, positions, batch_dims=1)


def _leave_out(log_mass: tf.Tensor, positions: tf.Tensor) -> tf.Tensor:
    """`log_mass` [B, n], set to `INADMISSIBLE` at `positions` [B, k]."""
    rows = tf.range(tf.shape(positions)[0])[:, tf.newaxis] + tf.zeros_like(positions)
    where = tf.stack([rows, positions], axis=-1)
    return tf.tensor_scatter_nd_update(log_mass, where, tf.fill(tf.shape(positions), INADMISSIBLE))


def _flat(values: tf.Tensor) -> tf.Tensor:
    return tf.reshape(values, [tf.shape(values)[0], values.shape[1] * values.shape[2]])
