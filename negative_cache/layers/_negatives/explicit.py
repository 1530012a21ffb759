"""`Explicit`: negatives that a batch lists for each query."""

import tensorflow as tf

from negative_cache._compat import keras
from negative_cache.layers._negatives.base import Contribution, Negatives
from negative_cache.layers._negatives.batch import Batch
from negative_cache.ops import contrastive
from negative_cache.ops._block_scorer import is_among


@keras.utils.register_keras_serializable("negative_cache")
class Explicit(Negatives):
    """The `negative_embeddings` of a call are negatives of their queries, with exact gradient.

    A batch that lists none has none. Those that are padding by `negative_mask`, and those whose
    `negative_ids` are among the ids left out for their query, are no negatives.
    """

    takes_explicit = True

    def logits(self, batch: Batch, training: bool) -> Contribution:
        del training
        if batch.explicit is None:
            return Contribution(tf.zeros([batch.num_queries, 0]))
        embeddings, mask = batch.explicit.embeddings, batch.explicit.mask
        if mask is not None:
            # Padding may be embedded as anything.
            embeddings = tf.where(mask[..., tf.newaxis], embeddings, 0.0)
        logits = batch.scores.of_own(batch.queries, embeddings)
        if mask is not None:
            logits = contrastive.leave_out(logits, ~mask)
        if batch.explicit.ids is not None:
            is_right = is_among(batch.explicit.ids, batch.left_out_ids)
            logits = contrastive.leave_out(logits, is_right)
        return Contribution(logits)
