"""Draws from a softmax by way of a tree index, and search for the best candidates in it.

A draw takes a part of the query's cut in proportion to its mass. Where that is a node, the draw
goes on down: at each level it takes a child in proportion to the children's masses, and in the leaf
a candidate in proportion to the exponential of its score. So inside of a leaf the law is exact, and
what differs from the softmax is how much goes to each of the nodes that were not opened. The
probability q(y) of every draw is known. Independent Metropolis-Hastings steps with q as proposal
bring the law to the softmax itself: a new draw y' replaces y with probability
min(1, w(y') / w(y)), where w = exp(score) / q.
"""

import math
from typing import NamedTuple

import tensorflow as tf

from negative_cache.ops._block_scorer import INADMISSIBLE, is_admissible
from negative_cache.ops._draws import Seed, draw_uniforms, inverse_cdf, wide_inverse_cdf
from negative_cache.ops.softmax_sampling import SoftmaxSample
from negative_cache.ops.tree.cut import (
    Cut,
    Scoring,
    Tree,
    make_cut,
    take_nodes,
    without_nothing,
)


class TreeDraws(NamedTuple):
    """Draws from the proposal.

    Attributes:
      ids: [B, T] int32.
      scores: [B, T] float32; `INADMISSIBLE` for a candidate that is left out.
      log_probability: [B, T] float32, log q.
    """

    ids: tf.Tensor
    scores: tf.Tensor
    log_probability: tf.Tensor


def sample_tree(
    tree: Tree,
    scoring: Scoring,
    *,
    num_samples: int,
    beam: int,
    correction_steps: int,
    seed: Seed = None,
    compute_gradient: bool = False,
    log_zero: float = -math.inf,
) -> tuple[SoftmaxSample, tf.Tensor, tf.Tensor | None]:
    """Draws candidates nearly in proportion to exp(score), and estimates log Z.

    Args:
      tree: the tree.
      scoring: of the queries [B, d].
      num_samples: S, draws for each query.
      beam: leaves to open.
      correction_steps: K, Metropolis-Hastings steps for each draw.
      seed: as in `sample_softmax`.
      compute_gradient: whether the gradient is wanted.
      log_zero: as in `sample_softmax_with_gradient`.

    Returns:
      A `SoftmaxSample` with exact scores and the cut's estimate of log Z; the proposal's
      log probability of each draw [B, S], which is that of the draw itself where K = 0; and the
      gradient of the estimate by the query [B, d], or None where it is not wanted.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(scoring.queries)
        cut = make_cut(tree, scoring, beam)
        log_masses = cut.log_masses
    # The softmax is one fused operation: log Z follows from it, as log mass - log P of any part.
    probability = tf.nn.softmax(log_masses)
    heaviest = tf.maximum(tf.reduce_max(log_masses, axis=1), INADMISSIBLE)
    log_partition = heaviest - tf.math.log(tf.reduce_max(probability, axis=1))
    gradient = None
    if compute_gradient:
        # ∇ log Z = Σ P ∇ log mass
        gradient = tape.gradient(log_masses, scoring.queries, output_gradients=probability)
        has_some = is_admissible(log_partition)[:, tf.newaxis]
        gradient = tf.stop_gradient(tf.where(has_some, gradient, 0.0))
    num_queries = tf.shape(log_masses)[0]
    num_draws = num_samples * (1 + correction_steps)
    random = draw_uniforms([tree.shape.num_levels + 3, num_queries, num_draws], seed)
    position = wide_inverse_cdf(probability, random[0], random[1])
    log_probability = tf.gather(log_masses, position, batch_dims=1) - log_partition[:, tf.newaxis]
    draws = _descend(tree, scoring, cut, position, log_probability, random[2:-1])
    ids, scores, log_probability = _correct(draws, random[-1], num_samples, correction_steps)

    has_law = tf.math.is_finite(log_partition)[:, tf.newaxis]
    found = is_admissible(scores) & has_law
    sample = SoftmaxSample(
        tf.where(found, tf.cast(ids, tf.int64), tf.constant(-1, tf.int64)),
        tf.where(found, scores, log_zero),
        without_nothing(log_partition, log_zero),
    )
    sample = SoftmaxSample(*(tf.stop_gradient(part) for part in sample))
    return sample, tf.stop_gradient(log_probability), gradient


def search_tree(tree: Tree, queries: tf.Tensor, k: int, beam: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The k best candidates of the leaves that a cut opens: scores and ids [B, k], best first.

    The nodes opened are those that promise the best candidate, not the heaviest: see `_ByBest`.
    Where there are fewer than k candidates, scores are -inf and ids -1.
    """
    cut = make_cut(tree, _ByBest(queries), beam)
    assert cut.scores is not None and cut.ids is not None, "leaves are opened"
    # The leaves may have fewer slots than k.
    missing = [[0, 0], [0, max(k - cut.scores.shape[1], 0)]]
    best = tf.math.top_k(tf.pad(cut.scores, missing, constant_values=INADMISSIBLE), k=k)
    ids = tf.gather(tf.pad(cut.ids, missing, constant_values=-1), best.indices, batch_dims=1)
    ids = tf.cast(ids, tf.int64)
    found = is_admissible(best.values)
    return (
        tf.where(found, best.values, -math.inf),
        tf.where(found, ids, tf.constant(-1, tf.int64)),
    )


class _ByBest(Scoring):
    """Scores whose "mass" of a node is the largest score that it may be expected to have.

    Of |n| scores of mean ⟨x, c_n⟩ and variance σ² = ‖x‖² v_n / d, if they are normal, that is about
    ⟨x, c_n⟩ + σ √(2 log |n|). It is also the least that (log Z_n) / β is, as estimated to second
    order, over all inverse temperatures β.
    """

    def log_masses(self, products: tf.Tensor, stats: tf.Tensor) -> tf.Tensor:
        """As of `Scoring`: [B, ...], `INADMISSIBLE` for empty nodes."""
        count, spread, radius, _ = tf.unstack(stats, axis=-1)
        norms = self._like(tf.norm(self.queries, axis=1), products)
        deviations = tf.sqrt(2.0 * tf.math.log(tf.maximum(count, 1.0)))
        above = tf.minimum(deviations * tf.sqrt(spread / self.queries.shape[1]), radius)
        return tf.where(count > 0.0, products + norms * above, INADMISSIBLE)


def _descend(
    tree: Tree,
    scoring: Scoring,
    cut: Cut,
    position: tf.Tensor,
    log_probability: tf.Tensor,
    random: tf.Tensor,
) -> TreeDraws:
    """Goes down from parts of the cut to candidates.

    Args:
      tree: the tree.
      scoring: of the queries.
      cut: of the tree.
      position: [B, T] int32, which part of the cut each draw has taken.
      log_probability: [B, T], of that.
      random: [L, B, T] uniforms.
    """
    num_levels = tree.shape.num_levels
    depth_of_part, address, num_nodes = _locate(tree, cut, position)
    queries = scoring.queries
    for depth, level in enumerate(tree.levels):
        is_here = depth_of_part <= depth
        block = take_nodes(level.children, tf.where(is_here, address, 0))
        block = tf.maximum(block, 0)
        if depth < num_levels - 1:
            below = tree.levels[depth + 1]
            means = tree.means_of_blocks(depth + 1, block)
            products = tf.einsum("btwd,bd->btw", means, queries)
            masses = scoring.log_masses(products, tf.gather(below.stats, block))
            child, its_log_probability = _pick(masses, random[depth])
            address = tf.where(is_here, block * tree.shape.widths[depth + 1] + child, address)
        else:
            members = tf.gather(tree.members, block)
            means = tree.means_of_nodes(depth, tf.where(is_here, address, 0))
            node_products = tf.einsum("btd,bd->bt", means, queries)
            products = tree.candidates.products(queries, members, node_products)
            scores = scoring.of_candidates(products, members)
            slot, its_log_probability = _pick(scores, random[depth])
            scores = tf.gather(scores, slot, batch_dims=2)
            ids = tf.gather(members, slot, batch_dims=2)
        log_probability += tf.where(is_here, its_log_probability, 0.0)

    # What the cut holds as single candidates is drawn already.
    assert cut.scores is not None and cut.ids is not None, "leaves are opened"
    in_cut = depth_of_part == num_levels
    candidate = tf.clip_by_value(position - num_nodes, 0, cut.ids.shape[1] - 1)
    return TreeDraws(
        tf.where(in_cut, tf.gather(cut.ids, candidate, batch_dims=1), ids),
        tf.where(in_cut, tf.gather(cut.scores, candidate, batch_dims=1), scores),
        log_probability,
    )


def _locate(tree: Tree, cut: Cut, position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, int]:
    """Where the parts of a cut at `position` [B, T] are.

    Returns:
      depth: [B, T] int32, the level of a part that is a node; the number of levels for others.
      address: [B, T] int32, of a node.
      num_nodes: how many parts of the cut are nodes. They come first.
    """
    address = tf.zeros_like(position)
    start = 0
    depth_of_part = tf.fill(tf.shape(position), tree.shape.num_levels)
    for depth, nodes in enumerate(cut.nodes):
        size = nodes.log_mass.shape[1]
        is_here = (position >= start) & (position < start + size)
        node = tf.clip_by_value(position - start, 0, size - 1)
        width = tree.shape.widths[depth]
        first = nodes.first
        if depth > 0:
            first = tf.gather(nodes.first, node // width, batch_dims=1)
        address = tf.where(is_here, first + node % width, address)
        depth_of_part = tf.where(is_here, depth, depth_of_part)
        start += size
    return depth_of_part, address, start


def _pick(log_masses: tf.Tensor, random: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Positions [B, T] drawn in proportion to the masses [B, T, n], and their log probability."""
    position = inverse_cdf(tf.nn.softmax(log_masses), random[..., tf.newaxis])[..., 0]
    log_mass = tf.gather(log_masses, position, batch_dims=2)
    return position, log_mass - tf.reduce_logsumexp(log_masses, axis=2)


def _correct(draws: TreeDraws, random: tf.Tensor, num_samples: int, steps: int) -> TreeDraws:
    """The states [B, S] of S independent chains after `steps` steps, out of B x S(K + 1) draws."""
    # Of the same shape: the draws of one chain, step by step.
    parts = [
        tf.reshape(part, [-1, num_samples, 1 + steps])
        # A random number may be zero.
        for part in (*draws, tf.math.log(tf.maximum(random, 1e-30)))
    ]
    ids, scores, log_probability, log_uniform = parts
    log_weight = tf.where(is_admissible(scores), scores - log_probability, INADMISSIBLE)
    state = [part[..., 0] for part in (ids, scores, log_probability, log_weight)]
    for step in range(1, 1 + steps):
        proposal = [part[..., step] for part in (ids, scores, log_probability, log_weight)]
        accepted = log_uniform[..., step] < proposal[-1] - state[-1]
        state = [tf.where(accepted, new, old) for new, old in zip(proposal, state)]
    return TreeDraws(*state[:3])
