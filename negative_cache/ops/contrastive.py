"""The pieces of a softmax cross-entropy whose negatives come from several places.

Logits are float32; one of `NOT_A_CANDIDATE` takes part in nothing, gradient included. It is finite,
for those who check that all numbers are (`tf.debugging.enable_check_numerics`).
"""

from collections.abc import Callable

import tensorflow as tf

from negative_cache.ops import _execution

# The exponential of it is zero beside that of any logit.
NOT_A_CANDIDATE = -1e30


def leave_out(logits: tf.Tensor, left_out: tf.Tensor) -> tf.Tensor:
    """Sets `logits` [...] to `NOT_A_CANDIDATE` where `left_out` [...] bool."""
    return tf.where(left_out, NOT_A_CANDIDATE, logits)


def keep_hardest(logits: tf.Tensor, count: int) -> tf.Tensor:
    """Keeps the `count` largest of each row of `logits` [B, N], or all: [B, min(count, N)]."""
    if not logits.shape[1]:
        # Of none at all, `tf.math.top_k` has no gradient.
        logits = tf.pad(logits, [[0, 0], [0, 1]], constant_values=NOT_A_CANDIDATE)
    count = tf.minimum(count, tf.shape(logits)[1])
    # The gradient of a top-k counts in integers, which an accelerator leaves to the host.
    return _execution.compiled(
        lambda values: tf.math.top_k(values, k=count, sorted=False).values, logits
    )


def value_with_gradient(value: tf.Tensor, surrogate: tf.Tensor) -> tf.Tensor:
    """A tensor with the value of one and the gradient of another, both of the same shape."""
    # The difference comes first: it is zero exactly, however large the surrogate is.
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
    # Relative to the positive, so that a small loss is no difference of two large numbers.
    margins = negative_logits - positive_logits[:, tf.newaxis]
    return tf.reduce_logsumexp(tf.pad(margins, [[0, 0], [1, 0]]), axis=1)


def losses_of_one_draw(
    positive_scores: tf.Tensor, negative_scores: tf.Tensor, log_partition: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """The losses of one draw ŷ per query from the softmax over Ẑ.

    With p⁺ = exp s⁺ / (exp s⁺ + Ẑ), held constant, the training loss is (1 − p⁺) (ŝ − s⁺), whose
    expected gradient is that of the interpretable loss −log p⁺.

    Args:
      positive_scores: s⁺ [B] float32.
      negative_scores: ŝ [B] float32, of the drawn ones.
      log_partition: log Ẑ [B] float32.

    Returns:
      [B] training losses and [B] interpretable ones.
    """
    # 1 − p⁺ = sigmoid(log Ẑ − s⁺) and −log p⁺ = softplus(log Ẑ − s⁺), both without overflow.
    log_odds = tf.stop_gradient(log_partition - positive_scores)
    training_losses = tf.sigmoid(log_odds) * (negative_scores - positive_scores)
    return training_losses, tf.nn.softplus(log_odds)


def reduce_losses(
    losses: tf.Tensor, reduction: str, sample_weight: tf.Tensor | None = None
) -> tf.Tensor:
    """Weighs `losses` [B] by `sample_weight` [B] and makes them one, as Keras does.

    Args:
      losses: [B] float32.
      reduction: "sum_over_batch_size" (the mean over the batch, whatever the weights sum to),
        "sum", or "none".
      sample_weight: [B] float32.

    Returns:
      Scalar float32, zero of an empty batch; or [B] where `reduction` is "none".
    """
    if sample_weight is not None:
        losses *= sample_weight
    if reduction == "none":
        return losses
    return tf.reduce_sum(losses) if reduction == "sum" else mean_or_zero(losses)


def mean_or_zero(values: tf.Tensor) -> tf.Tensor:
    """Scalar mean of `values` [n]; zero where there are none, as a replica's last batch may be."""
    return tf.math.divide_no_nan(tf.reduce_sum(values), tf.cast(tf.size(values), values.dtype))


def reduce_or_zero(
    losses: tf.Tensor, reducer: Callable[[tf.Tensor], tf.Tensor] | None
) -> tf.Tensor:
    """`losses` [B] reduced, or as they are; zero where there are none."""
    if reducer is None:
        return losses
    loss = reducer(losses)
    # The last batch of a replica may be empty: the mean over nothing is NaN.
    return tf.where(tf.size(losses) > 0, loss, tf.zeros_like(loss))


def relative_staleness(cached: tf.Tensor, fresh: tf.Tensor) -> tf.Tensor:
    """‖ĝ - g‖² / ‖g‖² along the last dimension of two tensors [..., d]; zero where ‖g‖ is."""
    return tf.math.divide_no_nan(
        tf.reduce_sum(tf.math.squared_difference(cached, fresh), axis=-1),
        tf.reduce_sum(tf.square(fresh), axis=-1),
    )
