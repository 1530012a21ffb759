"""Draws from a tree and bounds on the log partition, behind the methods of `TreeIndex`."""

import functools
import math
from typing import TypedDict

import tensorflow as tf

from negative_cache.layers._tree.coded import TreeCandidates
from negative_cache.layers._tree.stored import RowTransform
from negative_cache.ops import SoftmaxSample, _execution
from negative_cache.ops._block_scorer import TensorFn
from negative_cache.ops._draws import Choice, Seed, seed_or_random
from negative_cache.ops.tree.cut import ROUNDING, Scoring, Tree, log_partition_bounds, make_cut
from negative_cache.ops.tree.sampling import sample_tree


class ScoreOptions(TypedDict, total=False):
    """The keyword arguments of `draw`; see `DrawOptions`."""

    score_transform: TensorFn | None
    candidate_ids: tf.Tensor | None
    positive_ids: tf.Tensor | None
    max_scores: tf.Tensor | None
    seed: Seed
    choose_queries: Choice | None


class DrawOptions(ScoreOptions, total=False):
    """Keyword arguments of draws. `TreeIndex.sample_with_log_probability` documents them."""

    temperature: float | tf.Tensor | None
    beam: int | None
    row_transform: RowTransform | None


def transformed(tree: Tree, candidates: TreeCandidates, row_transform: RowTransform | None) -> Tree:
    """The tree with `row_transform` applied to candidates and means of nodes before scoring."""
    if row_transform is None:
        return tree
    return tree._replace(
        mean_transform=lambda means: row_transform(means, None),
        candidates=candidates.transformed(row_transform),
    )


def draw(
    tree: Tree,
    queries: tf.Tensor,
    num_samples: int,
    *,
    beam: int,
    correction_steps: int,
    like: tf.Variable,
    score_transform: TensorFn | None = None,
    candidate_ids: tf.Tensor | None = None,
    positive_ids: tf.Tensor | None = None,
    max_scores: tf.Tensor | None = None,
    seed: Seed = None,
    compute_gradient: bool = False,
    log_zero: float = -math.inf,
    choose_queries: Choice | None = None,
) -> tuple[SoftmaxSample, tf.Tensor, tf.Tensor | None]:
    """`ops.tree.sampling.sample_tree` on the device of `like`, hidden from gradient tapes."""
    if candidate_ids is not None and positive_ids is None:
        raise ValueError("`candidate_ids` needs `positive_ids`. Received only `candidate_ids`.")
    scoring = Scoring(
        queries,
        score_transform,
        candidate_ids=candidate_ids,
        positive_ids=positive_ids,
        max_scores=max_scores,
    )
    sample = functools.partial(
        sample_tree,
        tree,
        scoring,
        num_samples=num_samples,
        beam=beam,
        correction_steps=correction_steps,
        seed=seed_or_random(seed),
        compute_gradient=compute_gradient,
        log_zero=log_zero,
        choose=choose_queries,
    )
    return _execution.as_constant(sample, like=like)


def bound(
    tree: Tree,
    queries: tf.Tensor,
    score_transform: TensorFn | None,
    *,
    beam: int,
    open_leaves: bool,
    max_norm: tf.Variable,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Bounds the log partition from below and above.

    Args:
      tree: the tree.
      queries: [B, d] float32.
      score_transform: elementwise, nondecreasing function of the inner products, or None.
      beam: number of leaves to open.
      open_leaves: whether leaves are opened, into single candidates.
      max_norm: scalar variable, at least the norm of every candidate.

    Returns:
      lower: [B] float32.
      upper: [B] float32.
    """
    scoring = Scoring(queries, score_transform)
    cut = make_cut(tree, scoring, beam, open_leaves=open_leaves)
    # The worst-case rounding error of a sum of d products.
    rounding = ROUNDING * (2 * tree.shape.dim + 8)
    if _execution.rounds_factors(max_norm):
        rounding += 2.0 * _execution.FACTOR_ROUNDING
    norms = tf.norm(queries, axis=1) * max_norm
    return log_partition_bounds(cut, scoring, rounding * norms)
