"""What draws cached candidates: one call before the exact sampler and before `TreeIndex`."""

from typing import Any, Protocol

import tensorflow as tf

from negative_cache.layers.cache import Cache
from negative_cache.ops import SoftmaxSample, sample_softmax_with_gradient


class Sampler(Protocol):
    """Draws rows of a cache nearly, or exactly, in proportion to exp(score)."""

    def sample_with_gradient(
        self, query_embeddings: tf.Tensor, num_samples: int = 1, **options: Any
    ) -> tuple[SoftmaxSample, tf.Tensor | None]:
        """Draws S rows for each query, and the gradient of the log partition by the queries.

        Args:
          query_embeddings: [B, d] float32, divided by the temperature.
          num_samples: S.
          **options: of `ops.sample_softmax_with_gradient`, from `score_transform` on.
            `positive_ids` without `candidate_ids` are rows.
        """


class ExactSampler:
    """Draws the filled rows of a cache exactly in proportion to exp(score).

    Args:
      cache: the rows.
    """

    def __init__(self, cache: Cache):
        self._cache = cache

    def sample_with_gradient(
        self, query_embeddings: tf.Tensor, num_samples: int = 1, **options: Any
    ) -> tuple[SoftmaxSample, tf.Tensor | None]:
        """See `Sampler`."""
        if "positive_ids" in options and "candidate_ids" not in options:
            options["candidate_ids"] = tf.range(self._cache.cache_size, dtype=tf.int64)
        return sample_softmax_with_gradient(
            query_embeddings,
            self._cache.embeddings,
            num_samples=num_samples,
            candidate_mask=self._cache.filled,
            # Nothing else ever enters a cache.
            masked_rows_are_finite=True,
            **options,
        )


def sampler_of(cache: Cache) -> Sampler:
    """The index of a cache, or else the exact sampler over its rows."""
    return ExactSampler(cache) if cache.index is None else cache.index
