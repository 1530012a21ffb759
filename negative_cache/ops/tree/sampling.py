"""Draws from a softmax through a tree index, and search for the best candidates in it.

A draw takes a part of the query's cut in proportion to its mass. If that part is a node, the draw
descends: at each level it takes a child in proportion to the children's masses. In the leaf it
takes a candidate in proportion to exp(score). So the law within a leaf is exact. The law as a whole
differs from the softmax only in the mass that each node gets, because that is an estimate.

The probability q(y) of every draw is known. Independent Metropolis-Hastings steps with q as the
proposal bring the law towards the softmax: a new draw y' replaces y with probability
min(1, w(y') / w(y)), where w = exp(score) / q.
"""

import math
from typing import Any, NamedTuple

import tensorflow as tf

from negative_cache.ops._block_scorer import INADMISSIBLE, is_admissible
from negative_cache.ops._draws import Choice, Seed, draw_uniforms, inverse_cdf, wide_inverse_cdf
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
    """Draws from the proposal q.

    Attributes:
      ids: [B, T] int32, the drawn candidates.
      scores: [B, T] float32, their scores; `INADMISSIBLE` for an excluded candidate.
      log_probability: [B, T] float32, log q of the candidates.
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
    choose: Choice | None = None,
) -> tuple[SoftmaxSample, tf.Tensor, tf.Tensor | None]:
    """Draws candidates nearly in proportion to exp(score), and estimates log Z.

    Args:
      tree: the tree.
      scoring: scores queries [B, d].
      num_samples: S, the number of draws per query. 0 only estimates log Z.
      beam: number of leaves to open.
      correction_steps: K, the number of Metropolis-Hastings steps per draw.
      seed: as in `sample_softmax`.
      compute_gradient: whether to compute the gradient.
      log_zero: as in `sample_softmax_with_gradient`.
      choose: chooses the n queries that draws are made for, which then stand for B in the shapes of
        draws; all queries if None.

    Returns:
      sample: a `SoftmaxSample`, with the scores of the draws and the cut's estimate of log Z.
      log_probability: [B, S] float32, log q of each draw. If K = 0, it is the log probability of
        the draw itself.
      gradient: [B, d] float32, the gradient of the estimate of log Z with respect to the query;
        None if `compute_gradient` is False.
    """
    options: dict[str, Any] = {"beam": beam, "correction_steps": correction_steps, "seed": seed}
    if choose is not None:
        of_all, _, gradient = sample_tree(
            tree,
            scoring,
            num_samples=0,
            compute_gradient=compute_gradient,
            log_zero=log_zero,
            **options,
        )
        some = scoring.of_queries(choose(of_all.log_partition))
        of_some, log_probability, _ = sample_tree(
            tree, some, num_samples=num_samples, log_zero=log_zero, **options
        )
        return of_some._replace(log_partition=of_all.log_partition), log_probability, gradient
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(scoring.queries)
        cut = make_cut(tree, scoring, beam)
        log_masses = cut.log_masses
    # The softmax is one fused operation. log Z follows from it: log Z = log mass - log P of any
    # part.
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
    if not num_samples:
        nothing = tf.zeros([num_queries, 0])
        log_partition = tf.stop_gradient(without_nothing(log_partition, log_zero))
        return SoftmaxSample(tf.cast(nothing, tf.int64), nothing, log_partition), nothing, gradient
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
    """Finds the k best candidates in the leaves that a cut opens.

    The cut opens the nodes that are expected to have the highest scores, not those with the largest
    mass; see `_ByBest`.

    Args:
      tree: the tree.
      queries: [B, d] float32.
      k: number of candidates to find.
      beam: number of leaves to open.

    Returns:
      scores: [B, k] float32, inner products in descending order; -inf for missing candidates.
      ids: [B, k] int64; -1 where the score is -inf.
    """
    cut = make_cut(tree, _ByBest(queries), beam)
    assert cut.scores is not None and cut.ids is not None, "leaves are opened"
    # The opened leaves may have fewer than k slots.
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
    """Scoring in which the "log mass" of a node is the expected largest score of its candidates.

    For |n| normal scores with mean ⟨x, c_n⟩ and variance σ² = ‖x‖² v_n / d, that is about
    ⟨x, c_n⟩ + σ √(2 log |n|). It is also the minimum, over all inverse temperatures β, of
    (log Z_n) / β with Z_n estimated to second order.
    """

    def log_masses(self, products: tf.Tensor, stats: tf.Tensor) -> tf.Tensor:
        """[B, ...], the expected largest score of each node; `INADMISSIBLE` for empty nodes."""
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
    """Descends from parts of the cut to candidates.

    Args:
      tree: the tree.
      scoring: scores queries [B, d].
      cut: a cut for these queries.
      position: [B, T] int32, the part of the cut that each draw has taken.
      log_probability: [B, T] float32, the log probability of that part.
      random: [L, B, T] uniform random numbers.

    Returns:
      The `TreeDraws`.
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

    # If the part is a single candidate, no descent is needed.
    assert cut.scores is not None and cut.ids is not None, "leaves are opened"
    in_cut = depth_of_part == num_levels
    candidate = tf.clip_by_value(position - num_nodes, 0, cut.ids.shape[1] - 1)
    return TreeDraws(
        tf.where(in_cut, tf.gather(cut.ids, candidate, batch_dims=1), ids),
        tf.where(in_cut, tf.gather(cut.scores, candidate, batch_dims=1), scores),
        log_probability,
    )


def _locate(tree: Tree, cut: Cut, position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, int]:
    """Finds the parts of a cut at `position` [B, T] in the tree.

    Returns:
      depth: [B, T] int32, the level of the node; L, the number of levels, for a candidate.
      address: [B, T] int32, the address of the node; 0 for a candidate.
      num_nodes: the number of parts of the cut that are nodes. They come before the candidates.
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
    """Draws positions in proportion to masses.

    Args:
      log_masses: [B, T, n] float32.
      random: [B, T] uniform random numbers.

    Returns:
      position: [B, T] int32.
      log_probability: [B, T] float32, of the drawn positions.
    """
    position = inverse_cdf(tf.nn.softmax(log_masses), random[..., tf.newaxis])[..., 0]
    log_mass = tf.gather(log_masses, position, batch_dims=2)
    return position, log_mass - tf.reduce_logsumexp(log_masses, axis=2)


def _correct(draws: TreeDraws, random: tf.Tensor, num_samples: int, steps: int) -> TreeDraws:
    """Runs S independent Metropolis-Hastings chains of K steps per query.

    Args:
      draws: [B, S · (K + 1)] draws from the proposal.
      random: [B, S · (K + 1)] uniform random numbers.
      num_samples: S.
      steps: K.

    Returns:
      The last states of the chains [B, S], as `TreeDraws`.
    """
    # The last axis holds the draws of one chain, step by step.
    parts = [
        tf.reshape(part, [-1, num_samples, 1 + steps])
        # A uniform random number may be zero.
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
