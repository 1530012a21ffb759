"""The rows of several caches as one list of C candidates."""

from collections.abc import Mapping, Sequence

import tensorflow as tf


class CacheSources:
    """The rows of all sources as one list of candidates, in the order of the sources' names.

    Args:
      sources: source -> feature name -> [rows, ...], tensors or variables.
      embedding_key: name of the feature that is the embedding, [rows, dim].
      data_keys: names of the other features that `gather` returns.
      dim: the embedding dimension of queries.

    Raises:
      ValueError: if a source lacks a feature, or its embeddings do not have shape [rows, dim].

    Attributes:
      sources: source -> feature name -> [rows, ...].
      offsets: source -> the index of its first row.
      size: C, the number of rows of all sources.
    """

    def __init__(
        self,
        sources: Mapping[str, Mapping[str, tf.Tensor]],
        embedding_key: str,
        data_keys: Sequence[str],
        dim: int,
    ):
        # Sorted, because workers must gather the features of their shards in the same order.
        self._keys = sorted({embedding_key, *data_keys})
        self.sources = {source: sources[source] for source in sorted(sources)}
        self._sizes = {}
        for source, data in self.sources.items():
            _check_source(source, data, self._keys, embedding_key, dim)
            rows = data[embedding_key]
            self._sizes[source] = rows.shape[0] or tf.shape(rows, out_type=tf.int64)[0]
        self.offsets, self.size = {}, 0
        for source, size in self._sizes.items():
            self.offsets[source] = self.size
            self.size += size

    @property
    def is_one_of_known_size(self) -> bool:
        """Whether there is a single source whose number of rows is known during tracing."""
        return len(self.sources) == 1 and isinstance(self.size, int)

    def locate(self, indices: tf.Tensor) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]:
        """Finds candidates in their sources.

        Args:
          indices: [n] int64, candidates. An index outside [0, C) is in no source.

        Returns:
          rows: source -> [n] int64 rows; 0 for candidates of another source.
          masks: source -> [n] bool, whether the candidate is in this source.
        """
        rows, masks = {}, {}
        for source, offset in self.offsets.items():
            local = indices - offset
            masks[source] = (local >= 0) & (local < self._sizes[source])
            rows[source] = tf.where(masks[source], local, tf.zeros_like(local))
        return rows, masks

    def gather(self, indices: tf.Tensor) -> dict[str, tf.Tensor]:
        """Reads the features of candidates.

        Args:
          indices: [n] int64, candidates.

        Returns:
          Feature name -> [n, ...]. The values for an index outside [0, C) are arbitrary.
        """
        rows, masks = self.locate(indices)
        features = {}
        for key in self._keys:
            first, *others = (tf.gather(self.sources[source][key], rows[source]) for source in rows)
            value = first
            for source, part in zip(list(rows)[1:], others):
                mask = tf.reshape(masks[source], [-1] + [1] * (part.shape.rank - 1))
                value = tf.where(mask, part, value)
            # Integers have no gradient, and TensorFlow would run `tf.stop_gradient` on the host.
            is_float = value.dtype.is_floating or value.dtype.is_complex
            features[key] = tf.stop_gradient(value) if is_float else value
        return features


def _check_source(
    source: str,
    data: Mapping[str, tf.Tensor],
    keys: Sequence[str],
    embedding_key: str,
    dim: int,
) -> None:
    if not set(keys) <= set(data):
        raise ValueError(
            f"The cache {source!r} must have the features {keys} (`embedding_key` and `data_keys`)."
            f" Received a cache with the features {sorted(data)}."
        )
    shape = tf.TensorShape(data[embedding_key].shape)
    if shape.rank != 2 or shape[0] == 0 or not shape[1:].is_compatible_with([dim]):
        raise ValueError(
            f"The embeddings {embedding_key!r} of the cache {source!r} must have shape"
            f" [rows, {dim}], with rows > 0, for queries of dimension {dim}. Received shape:"
            f" {shape}."
        )
