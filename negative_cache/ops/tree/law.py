"""The exact law of a tree's draws over all candidates, for tests with a few queries.

Training does not use this module. Arrays have shape [B, capacity].
"""

import numpy as np
import tensorflow as tf

from negative_cache.ops.tree.cut import Scoring, Tree, TreeLevel, make_cut


def proposal_log_law(tree: Tree, scoring: Scoring, beam: int) -> np.ndarray:
    """[B, capacity] float64, log q(y|x) of draws without correction; -inf where q is zero.

    Args:
      tree: the tree.
      scoring: scores queries [B, d].
      beam: number of leaves to open.
    """
    cut = make_cut(tree, scoring, beam)
    log_partition = tf.reduce_logsumexp(cut.log_masses, axis=1).numpy().astype(np.float64)
    from_above: np.ndarray | None = None
    for depth, (level, nodes) in enumerate(zip(tree.levels, cut.nodes)):
        num_blocks, width = level.children.shape
        law = np.full([len(log_partition), num_blocks * width], -np.inf)
        if from_above is not None:
            means = tree.means_of_blocks(depth, tf.range(num_blocks))
            within = _within_blocks(level, means, scoring)
            law = (from_above[:, :, np.newaxis] + within).reshape(law.shape)
        addresses = (nodes.first.numpy()[..., np.newaxis] + np.arange(width)).reshape(
            [nodes.first.shape[0], -1]
        )
        _put(law, addresses, _log(nodes.log_mass) - log_partition[:, np.newaxis])
        children = tf.reshape(level.children, [-1]).numpy()
        # Empty rows have -1, which is the additional last column. It is dropped.
        from_above = np.full([len(law), tree.shape.num_owned(depth) + 1], -np.inf)
        from_above[:, children] = law
        from_above = from_above[:, :-1]

    assert from_above is not None and cut.ids is not None, "leaves are opened"
    members = tf.convert_to_tensor(tree.members).numpy()
    level = tree.levels[-1]
    leaf_means = np.zeros([len(members) + 1, tree.shape.dim], np.float32)
    means = tf.cast(level.mean, tf.float32).numpy()
    leaf_means[children] = means.reshape([-1, tree.shape.dim])
    node_products = scoring.queries.numpy() @ leaf_means[:-1].T
    everywhere = np.broadcast_to(members, [len(node_products), *members.shape])
    products = tree.candidates.products(
        scoring.queries, tf.constant(everywhere), tf.constant(node_products)
    )
    scores = _log(scoring.of_candidates(products, tf.constant(everywhere)))
    law = from_above[:, :, np.newaxis] + scores - _logsumexp(scores)
    result = np.full([len(law), tree.shape.capacity + 1], -np.inf)
    result[:, members.reshape(-1)] = law.reshape([len(law), -1])
    _put(result, cut.ids.numpy(), _log(cut.scores) - log_partition[:, np.newaxis])
    return result[:, :-1]


def law_after_correction(proposal: np.ndarray, target: np.ndarray, steps: int) -> np.ndarray:
    """The law of an independent Metropolis-Hastings chain that starts at a draw from the proposal.

    With w = target / proposal, a step goes from x to y with probability
    proposal(y) min(1, w(y) / w(x)). The states are sorted by w, so that each sum over x is the sum
    of two partial sums, over smaller and over larger w.

    Args:
      proposal: [N] float, sums to one.
      target: [N] float, sums to one; zero where `proposal` is zero.
      steps: K, the number of steps.

    Returns:
      [N] float, the law after K steps.
    """
    weight = np.divide(target, proposal, out=np.zeros_like(target), where=proposal > 0)
    order = np.argsort(weight, kind="stable")
    weight, start = weight[order], proposal[order]
    positive = weight > 0
    inverse = np.divide(1.0, weight, out=np.zeros_like(weight), where=positive)
    larger = np.cumsum(start[::-1])[::-1] - start
    stays = 1.0 - larger - np.cumsum(start * weight) * inverse
    stays = np.where(positive, np.maximum(stays, 0.0), 1.0 - start[positive].sum())
    law = start.copy()
    for _ in range(steps):
        # From a state of weight zero every move is accepted.
        from_smaller = np.cumsum(law)
        flow = law * inverse
        from_larger = weight * (np.cumsum(flow[::-1])[::-1] - flow)
        law = law * stays + np.where(positive, start * (from_smaller + from_larger), 0.0)
    result = np.empty_like(law)
    result[order] = law
    return result


def total_variation(law: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[...], the total variation ½ Σ |law - target| over the last axis of two arrays [..., N]."""
    return 0.5 * np.abs(law - target).sum(axis=-1)


def _within_blocks(level: TreeLevel, means: tf.Tensor, scoring: Scoring) -> np.ndarray:
    """[B, blocks, width] float64, the log probability of each node within its block."""
    num_blocks, width = level.children.shape
    means = tf.reshape(means, [num_blocks * width, -1])
    stats = tf.reshape(level.stats, [1, num_blocks * width, -1])
    products = tf.matmul(scoring.queries, means, transpose_b=True)
    masses = _log(scoring.log_masses(products, stats)).reshape([-1, num_blocks, width])
    return masses - _logsumexp(masses)


def _log(values: tf.Tensor) -> np.ndarray:
    """`values` as float64, with -inf for inadmissible ones."""
    values = values.numpy().astype(np.float64)
    return np.where(values <= -1e29, -np.inf, values)


def _logsumexp(values: np.ndarray) -> np.ndarray:
    """Log-sum-exp over the last axis, which is kept with size 1; 0 if all values are -inf."""
    largest = np.max(values, axis=-1, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, 0.0)
    total = np.exp(values - largest).sum(axis=-1, keepdims=True)
    return largest + np.log(np.where(total > 0, total, 1.0))


def _put(law: np.ndarray, places: np.ndarray, values: np.ndarray) -> None:
    """Sets law[b, places[b, i]] = values[b, i] for all finite values."""
    places = np.broadcast_to(places, values.shape)
    query, position = np.nonzero(np.isfinite(values))
    law[query, places[query, position]] = values[query, position]
