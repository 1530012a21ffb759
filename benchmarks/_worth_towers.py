"""The towers of `worth.py`."""

import tensorflow as tf
from _worth_data import Data

from negative_cache import demo
from negative_cache._compat import keras

DIM, NUM_BLOCKS, NUM_HEADS = 64, 2, 4


class Block(keras.layers.Layer):
    """Attention and two dense layers, each added to its input: [n, words, DIM] -> the same.

    What is added begins small, so that a new tower is near the mean of word vectors. It is trained
    for a thousand steps, not for the hundred thousands that a transformer takes from nothing.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        layers = keras.layers
        self.attention_norm, self.dense_norm = (
            layers.LayerNormalization(),
            layers.LayerNormalization(),
        )
        self.attention = layers.MultiHeadAttention(NUM_HEADS, DIM // NUM_HEADS)
        self.hidden = layers.Dense(4 * DIM, activation="gelu")
        self.output_of_hidden = layers.Dense(DIM)
        self.scales = [
            self.add_weight(
                shape=(DIM,), initializer=keras.initializers.Constant(0.1), name=f"scale_{i}"
            )
            for i in range(2)
        ]

    def call(self, values, attention_mask):
        normed = self.attention_norm(values)
        values += self.scales[0] * self.attention(normed, normed, attention_mask=attention_mask)
        return values + self.scales[1] * self.output_of_hidden(self.hidden(self.dense_norm(values)))


class TransformerTower(keras.layers.Layer):
    """Two transformer blocks over word vectors, and their mean, of unit length: ids -> [n, DIM]."""

    def __init__(self, words: keras.layers.Layer, length: int, **kwargs):
        super().__init__(**kwargs)
        self.words = words
        self.positions = keras.layers.Embedding(length, DIM)
        self.blocks = [Block() for _ in range(NUM_BLOCKS)]
        self.pool = keras.layers.GlobalAveragePooling1D()
        self.normalize = keras.layers.UnitNormalization()

    def call(self, inputs):
        ids = inputs["ids"] if isinstance(inputs, dict) else inputs
        mask = tf.not_equal(ids, 0)
        # As in Vaswani et al.: the initial vectors are small, and Adam moves all weights alike.
        values = DIM**0.5 * self.words(ids) + self.positions(tf.range(tf.shape(ids)[1]))
        for block in self.blocks:
            values = block(values, mask[:, tf.newaxis])
        return self.normalize(self.pool(values, mask=mask))


def make_towers(data: Data, kind: str):
    """(query tower, candidate tower) of a kind; they share their word vectors."""
    words = keras.layers.Embedding(data.vocabulary_size, DIM, mask_zero=True)
    towers = []
    for ids in (data.query_ids, data.candidate_ids):
        is_cheap = kind == "words"
        towers.append(demo.TextTower(words) if is_cheap else TransformerTower(words, ids.shape[1]))
        towers[-1](tf.constant(ids[:1]))
    return tuple(towers)
