"""Candidate towers of different price, for the same data."""

import tensorflow as tf

from negative_cache import demo
from negative_cache._compat import keras


class TransformerTower(keras.layers.Layer):
    """Two transformer blocks over word vectors, and their mean, of unit length: ids -> [n, d].

    The blocks add to the word vectors (normalisation first in each), so that the tower begins near
    the demo's, the mean of word vectors, which has no other parameters.
    """

    def __init__(self, words: keras.layers.Layer, length: int, dim: int, **kwargs):
        super().__init__(**kwargs)
        layers = keras.layers
        self.words = words
        self.positions = layers.Embedding(length, dim)
        self.blocks = []
        for _ in range(2):
            attention = layers.MultiHeadAttention(num_heads=4, key_dim=dim // 4)
            hidden, output = layers.Dense(2 * dim, activation="gelu"), layers.Dense(dim)
            norms = layers.LayerNormalization(), layers.LayerNormalization()
            self.blocks.append((*norms, attention, hidden, output))
        # Keras does not look into tuples.
        self.parts = [part for block in self.blocks for part in block]
        self.pool = layers.GlobalAveragePooling1D()
        self.normalize = layers.UnitNormalization()

    def call(self, inputs):
        ids = inputs["ids"] if isinstance(inputs, dict) else inputs
        mask = tf.not_equal(ids, 0)
        values = self.words(ids) + self.positions(tf.range(tf.shape(ids)[1]))
        for first_norm, second_norm, attention, hidden, output in self.blocks:
            normed = first_norm(values)
            values += attention(normed, normed, attention_mask=mask[:, tf.newaxis])
            values += output(hidden(second_norm(values)))
        return self.normalize(self.pool(values, mask=mask))


def make_towers(kind: str, vocabulary_size: int, length: int, dim: int):
    """(query tower, candidate tower) that share their word vectors.

    Args:
      kind: "words", both as in the demo, or "transformer" for the candidates.
      vocabulary_size: number of words.
      length: words of a candidate at the most.
      dim: d.
    """
    words = keras.layers.Embedding(vocabulary_size, dim, mask_zero=True)
    candidate_tower = (
        demo.TextTower(words) if kind == "words" else TransformerTower(words, length, dim)
    )
    query_tower = demo.TextTower(words)
    for tower in (query_tower, candidate_tower):
        tower(tf.ones([1, length], tf.int64))
    return query_tower, candidate_tower
