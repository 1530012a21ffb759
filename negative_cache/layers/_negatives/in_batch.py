"""`InBatch`: the batch's other candidates as negatives."""

from typing import Any

import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import keras
from negative_cache.layers._negatives.base import Contribution, Negatives
from negative_cache.layers._negatives.batch import Batch
from negative_cache.ops import contrastive


@keras.utils.register_keras_serializable("negative_cache")
class InBatch(Negatives):
    """The batch's other candidates are negatives of a query, with exact gradient.

    Args:
      num_hard: keep only so many of the highest-scoring ones of each query; None keeps all.
      **kwargs: of the layer.

    Raises:
      ValueError: if `num_hard` is not positive.
    """

    includes_positive = True

    def __init__(self, num_hard: int | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        if num_hard is not None:
            num_hard = _validation.check_count(num_hard, "num_hard")
        self.num_hard = num_hard

    def logits(self, batch: Batch, training: bool) -> Contribution:
        del training
        left_out = batch.is_positive | batch.not_negatives
        logits = contrastive.leave_out(batch.pair_logits, left_out)
        if self.num_hard is not None:
            logits = contrastive.keep_hardest(logits, self.num_hard)
        return Contribution(logits)

    def num_stream_draws(self, num_candidates: tf.Tensor) -> tf.Tensor:
        return tf.cast(num_candidates, tf.float32)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "num_hard": self.num_hard}
