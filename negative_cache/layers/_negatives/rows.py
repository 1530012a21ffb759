"""Rows of a cache on their way through a step: their names, what was encoded, corrections."""

from __future__ import annotations

from collections.abc import Mapping
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


class DrawnRows(NamedTuple):
    """Rows that a step has drawn, with what it needs to know of them, wherever they are kept.

    Attributes:
      features: feature name -> [m, ...], as the tower takes them.
      mask: [m] bool; where it is False nothing was drawn, and all else may be anything.
      stale: [m, d] float32, the cached embeddings.
      known: [m, d] float32, the same as the sampler has seen them: corrected, if there is a
        corrector.
      age: [m] int32, the number of updates since each row was written; None without a corrector.
      ids: [m] int64, fingerprints of the candidates' ids; None if nothing is left out by its id.
      log_weights: [m] float32, what was added to the scores; None if nothing was.
    """

    features: Mapping[str, tf.Tensor]
    mask: tf.Tensor
    stale: tf.Tensor
    known: tf.Tensor
    age: tf.Tensor | None
    ids: tf.Tensor | None
    log_weights: tf.Tensor | None


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
        return self.correct_and_age(embeddings, rows)[0]

    def correct_and_age(
        self, embeddings: tf.Tensor, rows: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Corrected embeddings [n, d] of `rows` [n], and [n] int32 the ages of these."""
        age = self._cache.age_of(rows)
        return self._correct(embeddings, age, self._content(rows)), age

    def examples(self, encoded: EncodedRows, stale: tf.Tensor) -> Encoded:
        """Encoded rows of this replica, and what they were, [n, d], as what a corrector learns."""
        rows = encoded.rows
        age = self._cache.age_of(rows)
        return Encoded(stale, encoded.embeddings, age, encoded.mask, self._content(rows))

    def examples_of_drawn(self, rows: DrawnRows, fresh: tf.Tensor) -> Encoded:
        """Drawn rows, wherever they are kept, with their embeddings [m, d] of now."""
        content = None
        if self._content_key is not None:
            content = tf.cast(rows.features[self._content_key], tf.float32)
        return Encoded(rows.stale, fresh, rows.age, rows.mask, content)

    def _content(self, rows: tf.Tensor) -> tf.Tensor | None:
        if self._content_key is None:
            return None
        return tf.cast(tf.gather(self._cache.data[self._content_key], rows), tf.float32)
