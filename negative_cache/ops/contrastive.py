"""The parts of a softmax cross-entropy with negatives from several sources.

Logits are float32. A logit of `NOT_A_CANDIDATE` contributes nothing to the loss or its gradient. It
is finite, so that `tf.debugging.enable_check_numerics` accepts it.
"""

from collections.abc import Callable

import tensorflow as tf

from negative_cache.ops import _execution

# The exponential of this is zero next to that of any logit.
NOT_A_CANDIDATE = -1e30


def leave_out(logits: tf.Tensor, left_out: tf.Tensor) -> tf.Tensor:
    """Sets `logits` [...] to `NOT_A_CANDIDATE` wherever `left_out` [...] bool is True."""
    return tf.where(left_out, NOT_A_CANDIDATE, logits)


def keep_hardest(logits: tf.Tensor, count: int) -> tf.Tensor:
    """[B, min(count, N)], the `count` largest of each row of `logits` [B, N].

    If N = 0 the result has one column, of `NOT_A_CANDIDATE`.
    """
    if not logits.shape[1]:
        # `tf.math.top_k` of an empty row has no gradient.
        logits = tf.pad(logits, [[0, 0], [0, 1]], constant_values=NOT_A_CANDIDATE)
    count = tf.minimum(count, tf.shape(logits)[1])
    # The gradient of top-k computes with integers. Without XLA, an accelerator would leave those to
    # the host.
    return _execution.compiled(
        lambda values: tf.math.top_k(values, k=count, sorted=False).values, logits
    )


def value_with_gradient(value: tf.Tensor, surrogate: tf.Tensor) -> tf.Tensor:
    """A tensor with the value of `value` and the gradient of `surrogate`, of the same shape."""
    # The difference is computed first: it is exactly zero, however large the surrogate is.
    return tf.stop_gradient(value) + (surrogate - tf.stop_gradient(surrogate))


def softmax_loss(positive_logits: tf.Tensor, negative_logits: tf.Tensor) -> tf.Tensor:
    """-log softmax of the positive among the negatives.

    L = -s⁺ + log(exp s⁺ + Σ exp s⁻). A query without a single negative has a loss of zero.

    Args:
      positive_logits: [B] float32.
      negative_logits: [B, n] float32.

    Returns:
      [B] float32.
    """
    # Relative to the positive, so that a small loss is not the difference of two large numbers.
    margins = negative_logits - positive_logits[:, tf.newaxis]
    return tf.reduce_logsumexp(tf.pad(margins, [[0, 0], [1, 0]]), axis=1)


def losses_of_one_draw(
    positive_scores: tf.Tensor, negative_scores: tf.Tensor, log_partition: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The losses of one draw ŷ per query from the softmax over the cache (Lindgren et al., 2021).

    With p⁺ = exp s⁺ / (exp s⁺ + Ẑ), held constant, the training loss is (1 − p⁺) (ŝ − s⁺). Its
    expected gradient is that of the interpretable loss −log p⁺.

    Args:
      positive_scores: [B] float32, s⁺.
      negative_scores: [B] float32, ŝ, the scores of the draws.
      log_partition: [B] float32, log Ẑ.

    Returns:
      training_losses: [B] float32.
      interpretable_losses: [B] float32.
    """
    # 1 − p⁺ = sigmoid(log Ẑ − s⁺) and −log p⁺ = softplus(log Ẑ − s⁺), both without overflow.
    log_odds = tf.stop_gradient(log_partition - positive_scores)
    training_losses = tf.sigmoid(log_odds) * (negative_scores - positive_scores)
    return training_losses, tf.nn.softplus(log_odds)


def reduce_losses(
    losses: tf.Tensor, reduction: str, sample_weight: tf.Tensor | None = None
) -> tf.Tensor:
    """Multiplies `losses` [B] by `sample_weight` [B] and reduces them to one, as Keras does.

    Args:
      losses: [B] float32.
      reduction: "sum_over_batch_size" (the mean over the batch, whatever the weights sum to),
        "sum", or "none".
      sample_weight: [B] float32.

    Returns:
      Scalar float32, zero for an empty batch; or [B] if `reduction` is "none".
    """
    if sample_weight is not None:
        losses *= sample_weight
    if reduction == "none":
        return losses
    return tf.reduce_sum(losses) if reduction == "sum" else mean_or_zero(losses)


def mean_or_zero(values: tf.Tensor) -> tf.Tensor:
    """Scalar mean of `values` [n]; zero if n = 0, as in the last batch of a replica."""
    return tf.math.divide_no_nan(tf.reduce_sum(values), tf.cast(tf.size(values), values.dtype))


def reduce_or_zero(
    losses: tf.Tensor, reducer: Callable[[tf.Tensor], tf.Tensor] | None
) -> tf.Tensor:
    """`reducer(losses)` for `losses` [B], zero if B = 0. Without a reducer, `losses` themselves."""
    if reducer is None:
        return losses
    loss = reducer(losses)
    # The last batch of a replica may be empty, and the mean of an empty batch is NaN.
    return tf.where(tf.size(losses) > 0, loss, tf.zeros_like(loss))


def relative_staleness(cached: tf.Tensor, fresh: tf.Tensor) -> tf.Tensor:
    """[...], ‖ĝ - g‖² / ‖g‖² over the last dimension of two tensors [..., d]; zero if ‖g‖ = 0."""
    return tf.math.divide_no_nan(
        tf.reduce_sum(tf.math.squared_difference(cached, fresh), axis=-1),
        tf.reduce_sum(tf.square(fresh), axis=-1),
    )
