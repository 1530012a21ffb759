"""Draws from a softmax that all queries of a batch share.

A batch needs, for every query x, the mean of some f(x, y) over y ∼ P(·|x). Instead of drawing for
each query alone, n draws are made from a mixture of the queries' softmaxes,

  Q(y) = Σ_x π_x P(y|x),   Σ_x π_x = 1,

and every query uses every draw y_j with the weight

  w_xj = P(y_j|x) / (n Q(y_j)).

This is multiple importance sampling with the balance heuristic (Veach and Guibas, SIGGRAPH 1995).
For every query Σ_j w_xj f(x, y_j) is unbiased, since E[w_xj f(x, y_j)] = Σ_y Q(y) w f = E_P[f] / n.
For every draw Σ_x π_x w_xj = 1 / n, so that with π in proportion to what each query's mean counts
in the loss, no draw ever counts more than another. `docs/shared_draws.md` has the proofs, and the
bound of the variance.

The functions know no candidates. What draws, and what scores, is the caller's.
"""

import tensorflow as tf

from negative_cache.ops._block_scorer import INADMISSIBLE, is_admissible
from negative_cache.ops._draws import draw_uniforms, inverse_cdf

# The part of π that all queries have alike, so that no weight exceeds B / (n · this).
_DEFENSIVE_SHARE = 0.1
# The largest float32 below 1.
_LAST_PLACE = 1.0 - 2.0**-24


def mixture_shares(log_weights: tf.Tensor) -> tf.Tensor:
    """π: nine tenths in proportion to given weights, one tenth alike for all queries.

    The tenth bounds w_xj by 10 B / n, whatever the given weights are: a defensive mixture
    (Hesterberg, Technometrics 1995).

    Args:
      log_weights: [B] float32. Not above -1e29, or not finite, for a query that nothing can be
        drawn for.

    Returns:
      [B] float32, the shares π. Their sum is one, or zero if nothing can be drawn for any query.
    """
    has_some = tf.math.is_finite(log_weights) & is_admissible(log_weights)
    shares = tf.nn.softmax(tf.where(has_some, log_weights, INADMISSIBLE))
    alike = tf.math.divide_no_nan(1.0, tf.reduce_sum(tf.cast(has_some, tf.float32)))
    mixed = (1.0 - _DEFENSIVE_SHARE) * shares + _DEFENSIVE_SHARE * alike
    return tf.where(has_some, mixed, 0.0)


def choose_queries(shares: tf.Tensor, num_draws: int | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draws the component of the mixture that each of n draws comes from, in n strata.

    The queries divide [0, 1) in proportion to π, and draw j takes the query at (j + u_j) / n, with
    uniform u_j. The variance of a mean over the draws is never above that of independent ones.

    Args:
      shares: [B] float32, π.
      num_draws: n.
      seed: [2] int.

    Returns:
      [n] int32, queries in ascending order; any queries if the shares are all zero. Empty if B = 0.
    """
    num_draws = num_draws if shares.shape[0] else tf.where(tf.size(shares) > 0, num_draws, 0)
    uniforms = draw_uniforms([num_draws], seed)
    places = tf.range(tf.shape(uniforms)[0])
    strata = (tf.cast(places, tf.float32) + uniforms) / tf.cast(num_draws, tf.float32)
    # n - 1 + u is rounded, to n if u is near 1. That place is past the last query with a share.
    return inverse_cdf(shares, tf.minimum(strata, _LAST_PLACE))


def balanced_weights(log_probabilities: tf.Tensor, shares: tf.Tensor) -> tf.Tensor:
    """The weights w_xj = P(y_j|x) / (n Σ_x' π_x' P(y_j|x')) of n draws.

    Args:
      log_probabilities: [B, n] float32, log P(y_j|x); at most -1e29 if the draw is not admissible
        for the query.
      shares: [B] float32, π.

    Returns:
      [B, n] float32, zero if a draw is not admissible for a query.
    """
    has_some = (shares > 0.0)[:, tf.newaxis]
    log_shares = tf.math.log(tf.where(has_some, shares[:, tf.newaxis], 1.0))
    is_some = has_some & is_admissible(log_probabilities)
    log_probabilities = tf.where(is_some, log_probabilities, INADMISSIBLE)
    log_mixture = tf.reduce_logsumexp(log_shares + log_probabilities, axis=0)
    num_draws = tf.cast(tf.maximum(tf.shape(log_probabilities)[1], 1), tf.float32)
    weights = tf.exp(log_probabilities - log_mixture) / num_draws
    return tf.where(is_some & is_admissible(log_mixture), weights, 0.0)
