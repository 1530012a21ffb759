"""What all losses over caches share: their signature, what they return, and the equations."""

import abc
from collections.abc import Callable, Mapping
from typing import NamedTuple

import tensorflow as tf

from negative_cache.negative_cache import NegativeCache
from negative_cache.ops import contrastive

TensorFn = Callable[[tf.Tensor], tf.Tensor]
DocNetwork = Callable[[Mapping[str, tf.Tensor]], tf.Tensor]


class CacheLossReturn(NamedTuple):
    """What a cache loss returns.

    Attributes:
      training_loss: the loss to differentiate. Its value means nothing.
      interpretable_loss: the loss to look at, -log p⁺.
      updated_item_data: source -> feature name -> [m, ...] new values for rows of that source.
      updated_item_indices: source -> [m] int64, their rows in that source.
      updated_item_mask: source -> [m] bool; entries with False must change nothing.
      staleness: ‖ĝ(y) − g(y)‖² / ‖g(y)‖² of the retrieved candidates.
    """

    training_loss: tf.Tensor
    interpretable_loss: tf.Tensor
    updated_item_data: Mapping[str, Mapping[str, tf.Tensor]]
    updated_item_indices: Mapping[str, tf.Tensor]
    updated_item_mask: Mapping[str, tf.Tensor]
    staleness: tf.Tensor


class CacheLoss(abc.ABC):
    """A loss that takes its negatives from caches."""

    @abc.abstractmethod
    def __call__(
        self,
        doc_network: DocNetwork,
        query_embeddings: tf.Tensor,
        pos_doc_embeddings: tf.Tensor,
        cache: Mapping[str, NegativeCache],
    ) -> CacheLossReturn:
        """Computes the loss of [B, d] queries and their positives [B, d].

        Args:
          doc_network: candidates' features (feature name -> [B, ...]) -> their embeddings [B, d].
          query_embeddings: [B, d].
          pos_doc_embeddings: [B, d].
          cache: source -> cache.
        """


class _RetrievalReturn(NamedTuple):
    """What `AbstractCacheClassificationLoss._retrieve_from_cache` returns.

    Attributes:
      retrieved_data: feature name -> [B, ...], the features of the retrieved candidates.
      scores: [B, n] scores of the candidates whose partition counts.
      retrieved_indices: [B, 1] int64, places of the retrieved ones among all sources' rows.
      retrieved_cache_embeddings: [B, d], their embeddings as cached.
    """

    retrieved_data: Mapping[str, tf.Tensor]
    scores: tf.Tensor
    retrieved_indices: tf.Tensor
    retrieved_cache_embeddings: tf.Tensor


class _LossCalculationReturn(NamedTuple):
    """What `AbstractCacheClassificationLoss` computes of a batch, reduced."""

    training_loss: tf.Tensor
    interpretable_loss: tf.Tensor
    staleness: tf.Tensor
    retrieval_return: _RetrievalReturn
    retrieved_negative_embeddings: tf.Tensor


class AbstractCacheClassificationLoss(CacheLoss):
    """A softmax cross-entropy over caches whose retrieval and scores a subclass says.

    The published class to inherit from: override both methods, and in `__call__` make a
    `CacheLossReturn` of what `_calculate_training_loss_and_summaries` returns.
    """

    @abc.abstractmethod
    def _retrieve_from_cache(
        self, query_embeddings: tf.Tensor, cache: Mapping[str, NegativeCache]
    ) -> _RetrievalReturn:
        """Retrieves a candidate for each of [B, d] queries."""

    @abc.abstractmethod
    def _score_documents(self, query_embeddings: tf.Tensor, doc_embeddings: tf.Tensor) -> tf.Tensor:
        """[B] scores of queries [B, d] with the candidate of each [B, d]."""

    def _calculate_training_loss_and_summaries(
        self,
        doc_network: DocNetwork,
        query_embeddings: tf.Tensor,
        pos_doc_embeddings: tf.Tensor,
        cache: Mapping[str, NegativeCache],
        reducer: TensorFn | None = tf.math.reduce_mean,
    ) -> _LossCalculationReturn:
        """The losses and the staleness of a batch, of what the subclass retrieves."""
        retrieved = self._retrieve_from_cache(query_embeddings, cache)
        fresh = doc_network(retrieved.retrieved_data)
        losses = losses_of(
            self._score_documents(query_embeddings, pos_doc_embeddings),
            self._score_documents(query_embeddings, fresh),
            tf.reduce_logsumexp(tf.cast(retrieved.scores, tf.float32), axis=1),
        )
        stale = tf.cast(retrieved.retrieved_cache_embeddings, tf.float32)
        staleness = contrastive.relative_staleness(stale, tf.cast(fresh, tf.float32))
        parts = (reduce_or_zero(part, reducer) for part in (*losses, staleness))
        return _LossCalculationReturn(*parts, retrieved, fresh)


def losses_of(positive_scores, negative_scores, log_partition) -> tuple[tf.Tensor, tf.Tensor]:
    """[B] training losses and [B] interpretable ones, of scores [B] and log Ẑ [B]."""
    # 1 − p⁺ = sigmoid(log Ẑ − s⁺) and −log p⁺ = softplus(log Ẑ − s⁺), both without overflow.
    log_odds = tf.stop_gradient(log_partition - positive_scores)
    training_losses = tf.sigmoid(log_odds) * (negative_scores - positive_scores)
    return training_losses, tf.nn.softplus(log_odds)


def reduce_or_zero(losses: tf.Tensor, reducer: TensorFn | None) -> tf.Tensor:
    """`losses` [B] reduced, or as they are; zero where there are none."""
    if reducer is None:
        return losses
    loss = reducer(losses)
    # The last batch of a replica may be empty: the mean over nothing is NaN.
    return tf.where(tf.size(losses) > 0, loss, tf.zeros_like(loss))
