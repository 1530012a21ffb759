"""Rows of a cache on their way through a step: their names, what was encoded, corrections."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from negative_cache.layers._corpus import EMBEDDING
from negative_cache.layers.cache import Cache
from negative_cache.layers.drift_corrector import DriftCorrector, Encoded

# What a row holds besides the candidate's own features.
CANDIDATE_ID = "candidate_id_key"
LOG_PROBABILITY = "log_sampling_probability"
INTERNAL_KEYS = (EMBEDDING, CANDIDATE_ID, LOG_PROBABILITY)


class EncodedRows(NamedTuple):
    """Rows that were encoded, and their embeddings of now.

    Attributes:
      rows: [n] int64; a row may come several times.
      embeddings: [n, d] float32.
      mask: [n] bool; where it is False, there is no such row, and nothing is to be written.
    """

    rows: tf.Tensor
    embeddings: tf.Tensor
    mask: tf.Tensor

    def and_those(self, other: EncodedRows) -> EncodedRows:
        """Both together."""
        return EncodedRows(*(tf.concat(parts, axis=0) for parts in zip(self, other)))

    def finite(self) -> EncodedRows:
        """The same, of which rows that are not finite are masked."""
        is_finite = tf.reduce_all(tf.math.is_finite(self.embeddings), axis=1)
        embeddings = tf.where(is_finite[:, tf.newaxis], self.embeddings, 0.0)
        return EncodedRows(self.rows, embeddings, self.mask & is_finite)


class RowCorrection:
    """A corrector in one step, as a function of rows of the cache.

    Args:
      corrector: estimates where stale embeddings are now.
      cache: knows the rows' ages and contents.
    """

    def __init__(self, corrector: DriftCorrector, cache: Cache):
        self.corrector = corrector
        self._cache, self._content_key = cache, corrector.content_key
        self.displacement = corrector.displacement_fn()
        self._correct = corrector.corrector_fn(self.displacement)

    def correct(self, embeddings: tf.Tensor, rows: tf.Tensor | None) -> tf.Tensor:
        """Corrects embeddings [n, d] of `rows` [n]; `rows` are None for means of many."""
        if rows is None:
            return self._correct(embeddings)
        return self._correct(embeddings, self._cache.age_of(rows), self._content(rows))

    def examples(self, encoded: EncodedRows, stale: tf.Tensor) -> Encoded:
        """Encoded rows, and what they were, [n, d], as what a corrector learns from."""
        rows = encoded.rows
        age = self._cache.age_of(rows)
        return Encoded(stale, encoded.embeddings, age, encoded.mask, self._content(rows))

    def _content(self, rows: tf.Tensor) -> tf.Tensor | None:
        if self._content_key is None:
            return None
        return tf.cast(tf.gather(self._cache.data[self._content_key], rows), tf.float32)
