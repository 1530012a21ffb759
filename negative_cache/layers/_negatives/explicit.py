"""`Explicit`: negatives that a batch lists for each query."""

import tensorflow as tf

from negative_cache._compat import keras
from negative_cache.layers._negatives.base import Contribution, Negatives
from negative_cache.layers._negatives.batch import Batch


@keras.utils.register_keras_serializable("negative_cache")
class Explicit(Negatives):
    """The `negative_embeddings` of a call are negatives of their queries, with exact gradient.

    A batch that lists none has none. Those that are padding by `negative_mask`, and those whose
    `negative_ids` are among the ids left out for their query, are no negatives.

    Examples:
      >>> task = Retrieval(candidate_tower, [InBatch(), Explicit()], temperature=0.1)
      >>> negatives = candidate_embeddings[:, tf.newaxis]  # [B, M, d], here with M = 1
      >>> features = {"title": titles}
      >>> loss = task(
      ...     query_embeddings, candidate_embeddings, features, negative_embeddings=negatives
      ... )
    """

    takes_explicit = True

    def logits(self, batch: Batch, training: bool) -> Contribution:
        del training
        if batch.explicit is None:
            return Contribution(tf.zeros([batch.num_queries, 0]))
        listed = batch.explicit
        return Contribution(batch.own_logits(listed.embeddings, listed.mask, listed.ids))
