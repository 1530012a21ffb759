"""Finds the leaf of a tree index that a vector belongs to."""

import tensorflow as tf

from negative_cache.ops.tree.cut import Tree, take_nodes


def route(tree: Tree, vectors: tf.Tensor) -> tf.Tensor:
    """Descends from the root to the nearest child at each level.

    Args:
      tree: the tree. Every block that a node owns must have at least one node.
      vectors: [n, d] float32.

    Returns:
      [n] int32, the leaf of each vector.
    """
    level = tree.levels[0]
    is_node = tf.convert_to_tensor(level.children)[0] >= 0
    address = nearest(vectors, tf.cast(level.mean[0], tf.float32), is_node)
    for level, below in zip(tree.levels[:-1], tree.levels[1:]):
        block = take_nodes(level.children, address)
        means = tf.cast(tf.gather(below.mean, block), tf.float32)
        distances = tf.reduce_sum((vectors[:, tf.newaxis] - means) ** 2, axis=2)
        is_node = tf.gather(below.children, block) >= 0
        child = tf.argmin(
            tf.where(is_node, distances, tf.float32.max), axis=1, output_type=tf.int32
        )
        address = block * below.mean.shape[1] + child
    return take_nodes(tree.levels[-1].children, address)


def nearest(vectors: tf.Tensor, means: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """[n] int32, the nearest mean of each vector.

    Args:
      vectors: [n, d] float32.
      means: [m, d] float32.
      mask: [m] bool, the means to consider.
    """
    # ‖x‖² - ‖x - c‖² = 2⟨x, c⟩ - ‖c‖²
    nearness = tf.matmul(vectors, 2.0 * means, transpose_b=True) - tf.reduce_sum(means**2, axis=1)
    return tf.argmax(tf.where(mask, nearness, -tf.float32.max), axis=1, output_type=tf.int32)
