"""Functions that losses and handlers share: approximate top-k, and gathering over replicas."""

import tensorflow as tf


def approximate_top_k_with_indices(
    negative_scores: tf.Tensor, k: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Keeps the best candidate of each of k equal runs of candidates.

    Run i holds the columns from i C / k to below (i + 1) C / k. The best candidate of all is always
    kept.

    Args:
      negative_scores: [B, C] scores.
      k: the number of runs. It must divide C.

    Returns:
      scores: [B, k], the highest score of each run.
      indices: [B, k] int64, the columns of these scores. Of equal scores the first one is kept.

    Raises:
      ValueError: if `negative_scores` is not a matrix, or `k` does not divide C.
    """
    negative_scores = tf.convert_to_tensor(negative_scores)
    if negative_scores.shape.rank != 2:
        raise ValueError(
            "`negative_scores` must have shape [batch, candidates]. Received shape:"
            f" {negative_scores.shape}."
        )
    num_candidates = negative_scores.shape[1]
    if k < 1 or (num_candidates is not None and num_candidates % k):
        raise ValueError(
            f"`k` must divide the number of candidates. Received: k = {k} and {num_candidates}"
            " candidates."
        )
    batch_size, run_size = tf.shape(negative_scores)[0], tf.shape(negative_scores)[1] // k
    runs = tf.reshape(negative_scores, [batch_size, k, run_size])
    starts = tf.range(k, dtype=tf.int64) * tf.cast(run_size, tf.int64)
    return tf.reduce_max(runs, axis=2), starts + tf.argmax(runs, axis=2, output_type=tf.int64)


def cross_replica_concat(tensor: tf.Tensor, axis: int, name: str | None = None) -> tf.Tensor:
    """Concatenates the tensors of all replicas, in the order of the replicas.

    Outside a replica context, or with one replica, it returns `tensor`. Gradients of a
    part flow back to its replica, summed over the replicas that used it. Sizes along `axis` may
    differ between replicas.

    Args:
      tensor: a tensor of known rank and any dtype, including string.
      axis: the axis to concatenate along.
      name: a name for the operation.

    Returns:
      The concatenation, the same on all replicas.

    Raises:
      ValueError: if `tensor` has no such axis.
    """
    with tf.name_scope(name or "cross_replica_concat"):
        tensor = tf.convert_to_tensor(tensor)
        rank = tensor.shape.rank
        if rank is None or not -rank <= axis < rank:
            raise ValueError(
                f"`axis` must be an axis of `tensor`. Received: axis = {axis} and a tensor of shape"
                f" {tensor.shape}."
            )
        if num_replicas() == 1:
            return tf.identity(tensor)
        axis %= rank
        if tensor.dtype == tf.string:
            gathered = _gather_strings(tensor, axis)
        else:
            carried = tf.cast(tensor, _carrier_dtype(tensor.dtype))
            gathered = tf.cast(_all_gather(carried, axis), tensor.dtype)
        # The collective operation forgets the static shape.
        shape = tensor.shape.as_list()
        return tf.ensure_shape(gathered, [*shape[:axis], None, *shape[axis + 1 :]])


def cross_replica_sum(tensor: tf.Tensor) -> tf.Tensor:
    """Sums the tensors of all replicas. Outside a replica context, it returns `tensor`.

    Args:
      tensor: a tensor of one shape on all replicas, float or int32 or int64.

    Returns:
      The sum, the same on all replicas, without gradient.
    """
    tensor = tf.stop_gradient(tensor)
    if num_replicas() == 1:
        return tensor
    # One number more in front: TensorFlow ends the process if there is nothing to add up.
    sent = tf.concat([tf.zeros([1], tensor.dtype), tf.reshape(tensor, [-1])], axis=0)
    total = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, sent)
    return tf.reshape(total[1:], tf.shape(tensor))


def num_replicas() -> int:
    """Returns the number of replicas to gather from, which is 1 outside a replica context."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def replica_id() -> tf.Tensor:
    """Returns the number of this replica among `num_replicas()`, a scalar int32."""
    if num_replicas() == 1:
        return tf.constant(0)
    return tf.convert_to_tensor(tf.distribute.get_replica_context().replica_id_in_sync_group)


def _all_gather(tensor: tf.Tensor, axis: int) -> tf.Tensor:
    context = tf.distribute.get_replica_context()
    if isinstance(context.strategy, tf.distribute.TPUStrategy):
        # Sizes are constants there, and none is zero.
        return context.all_gather(tensor, axis=axis)
    # TensorFlow ends the process if no replica has anything. So the first one has one more entry,
    # in front, and every dimension that may be zero is longer by one.
    is_first = tf.cast(tf.equal(replica_id(), 0), tf.int32)
    before = is_first * tf.one_hot(axis, tensor.shape.rank, dtype=tf.int32)
    after = [int(i != axis and not size) for i, size in enumerate(tensor.shape)]
    padded = tf.pad(tensor, tf.stack([before, tf.constant(after)], axis=1))
    kept = [slice(None, -1) if more else slice(None) for more in after]
    kept[axis] = slice(1, None)
    return context.all_gather(padded, axis=axis)[tuple(kept)]


def _carrier_dtype(dtype: tf.DType) -> tf.DType:
    """Returns a dtype for collective operations that holds every value of `dtype`."""
    if dtype in (tf.float16, tf.float32, tf.float64, tf.int32, tf.int64):
        return dtype
    if dtype.is_floating:
        return tf.float32
    return tf.int64 if dtype in (tf.uint32, tf.uint64) else tf.int32


def _gather_strings(strings: tf.Tensor, axis: int) -> tf.Tensor:
    """Gathers strings as padded bytes, because collective operations only carry numbers."""
    lengths = _all_gather(tf.strings.length(strings), axis)
    longest = tf.maximum(tf.reduce_max(lengths), 1)
    codes = tf.io.decode_raw(strings, tf.uint8, fixed_length=longest)
    codes = _all_gather(tf.cast(codes, tf.int32), axis)
    characters = tf.constant([bytes([code]) for code in range(256)])
    joined = tf.strings.reduce_join(tf.gather(characters, codes), axis=-1)
    return tf.strings.substr(joined, tf.zeros_like(lengths), lengths)
