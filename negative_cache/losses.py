"""Losses whose negatives come from caches.

A loss draws one negative for each query from the softmax over all cached candidates, and encodes
it again. The loss returns its value, and the fresh embeddings that the caches should store.

Shapes: B queries of dimension d, C candidates in all caches, G queries on all replicas.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import tensorflow as tf

from negative_cache import _validation, retrieval_fns, util
from negative_cache.negative_cache import NegativeCache
from negative_cache.ops import (
    SoftmaxSample,
    contrastive,
    merge_samples,
    sample_softmax_with_gradient,
    top_k_scores,
)
from negative_cache.ops.cache_sources import CacheSources

TensorFn: TypeAlias = Callable[[tf.Tensor], tf.Tensor]
DocNetwork: TypeAlias = Callable[[Mapping[str, tf.Tensor]], tf.Tensor]
_Updates: TypeAlias = tuple[
    Mapping[str, Mapping[str, tf.Tensor]], Mapping[str, tf.Tensor], Mapping[str, tf.Tensor]
]


class CacheLossReturn(NamedTuple):
    """The result of a cache loss.

    Attributes:
      training_loss: the loss to differentiate. Its value has no meaning.
      interpretable_loss: the loss to look at, -log p⁺.
      updated_item_data: source -> feature name -> [m, ...] new values for rows of this source.
      updated_item_indices: source -> [m] int64, the rows of these values.
      updated_item_mask: source -> [m] bool. Entries with False must change nothing.
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
          doc_network: candidates' features (feature name -> [B, ...]) -> embeddings [B, d].
          query_embeddings: [B, d].
          pos_doc_embeddings: [B, d].
          cache: source -> cache.
        """


class _RetrievalReturn(NamedTuple):
    """The result of `AbstractCacheClassificationLoss._retrieve_from_cache`.

    Attributes:
      retrieved_data: feature name -> [B, ...], the features of the retrieved candidates.
      scores: [B, n] scores of the candidates in the partition.
      retrieved_indices: [B, 1] int64, the retrieved candidates among the rows of all sources.
      retrieved_cache_embeddings: [B, d], the cached embeddings of the retrieved candidates.
    """

    retrieved_data: Mapping[str, tf.Tensor]
    scores: tf.Tensor
    retrieved_indices: tf.Tensor
    retrieved_cache_embeddings: tf.Tensor


class _LossCalculationReturn(NamedTuple):
    """The result of `AbstractCacheClassificationLoss` for a batch, reduced."""

    training_loss: tf.Tensor
    interpretable_loss: tf.Tensor
    staleness: tf.Tensor
    retrieval_return: _RetrievalReturn
    retrieved_negative_embeddings: tf.Tensor


class AbstractCacheClassificationLoss(CacheLoss):
    """A softmax cross-entropy over caches whose retrieval and scores a subclass defines.

    This is the published base class. Override both abstract methods. In `__call__`, make a
    `CacheLossReturn` from the result of `_calculate_training_loss_and_summaries`.
    """

    @abc.abstractmethod
    def _retrieve_from_cache(
        self, query_embeddings: tf.Tensor, cache: Mapping[str, NegativeCache]
    ) -> _RetrievalReturn:
        """Retrieves one candidate for each of the queries [B, d]."""

    @abc.abstractmethod
    def _score_documents(self, query_embeddings: tf.Tensor, doc_embeddings: tf.Tensor) -> tf.Tensor:
        """Returns the [B] scores of queries [B, d] with their candidates [B, d]."""

    def _calculate_training_loss_and_summaries(
        self,
        doc_network: DocNetwork,
        query_embeddings: tf.Tensor,
        pos_doc_embeddings: tf.Tensor,
        cache: Mapping[str, NegativeCache],
        reducer: TensorFn | None = tf.math.reduce_mean,
    ) -> _LossCalculationReturn:
        """Computes the losses and the staleness for the candidates that the subclass retrieves."""
        retrieved = self._retrieve_from_cache(query_embeddings, cache)
        fresh = doc_network(retrieved.retrieved_data)
        losses = contrastive.losses_of_one_draw(
            self._score_documents(query_embeddings, pos_doc_embeddings),
            self._score_documents(query_embeddings, fresh),
            tf.reduce_logsumexp(tf.cast(retrieved.scores, tf.float32), axis=1),
        )
        stale = tf.cast(retrieved.retrieved_cache_embeddings, tf.float32)
        staleness = contrastive.relative_staleness(stale, tf.cast(fresh, tf.float32))
        training_loss, interpretable_loss, staleness = (
            contrastive.reduce_or_zero(part, reducer) for part in (*losses, staleness)
        )
        return _LossCalculationReturn(
            training_loss, interpretable_loss, staleness, retrieved, fresh
        )


class CacheClassificationLoss(AbstractCacheClassificationLoss):
    """Softmax cross-entropy over the positive and everything cached, from one draw per query.

    With scores s and cached embeddings ĝ (Lindgren, Reddi, Guo and Kumar, "Efficient Training of
    Retrieval Models using Negative Cache", NeurIPS 2021):

      ŷ ~ exp ŝ(x, y) / Ẑ(x),  Ẑ(x) = Σ_y exp ŝ(x, y)            over the cached y
      p⁺ = exp s(x, y⁺) / (exp s(x, y⁺) + Ẑ(x))                   held constant
      training loss = (1 − p⁺) (s(x, ŷ) − s(x, y⁺))               ŷ encoded again

    If the cached embeddings are fresh, the expected gradient of the training loss is the gradient
    of −log p⁺. No gradient flows into the cache. Rows that were never filled are candidates too.

    Candidates are scored block by block, without any [B, C] array, in two cases: with `top_k` over
    one cache, and without `top_k` if the retrieval function is Gumbel-max at inverse temperature 1.

    Args:
      embedding_key: the feature that holds the cached embeddings, [C, d].
      data_keys: the features that `doc_network` encodes.
      score_transform: elementwise function of the inner products, for instance a division by a
        temperature. If None, scores are inner products.
      top_k: the number of candidates that `util.approximate_top_k_with_indices` keeps. The
        partition and the draw are over these candidates. It must divide C. If None, all are kept.
      reducer: function of the [B] losses. If None, the losses are returned unreduced.
    """

    def __init__(
        self,
        embedding_key: str,
        data_keys: Sequence[str],
        score_transform: TensorFn | None = None,
        top_k: int | None = None,
        reducer: TensorFn | None = tf.math.reduce_mean,
    ):
        if top_k is not None:
            top_k = _validation.check_count(top_k, "top_k")
        self.embedding_key = embedding_key
        self.data_keys = (data_keys,) if isinstance(data_keys, str) else tuple(data_keys)
        self.score_transform = score_transform
        self.top_k = top_k
        self.reducer = reducer
        self._retrieval_fn = retrieval_fns.GumbelMaxRetrievalFn()

    def __call__(
        self,
        doc_network: DocNetwork,
        query_embeddings: tf.Tensor,
        pos_doc_embeddings: tf.Tensor,
        cache: Mapping[str, NegativeCache],
    ) -> CacheLossReturn:
        """Computes the loss of a batch. The arguments are those of `CacheLoss`."""
        queries, positives = _check_pairs(query_embeddings, pos_doc_embeddings)
        candidates = self._candidates_of(cache, queries)
        if type(self)._retrieve_from_cache is not CacheClassificationLoss._retrieve_from_cache:
            found = self._calculate_training_loss_and_summaries(
                doc_network, query_embeddings, pos_doc_embeddings, cache, self.reducer
            )
            indices = tf.cast(found.retrieval_return.retrieved_indices[:, 0], tf.int64)
            fresh = tf.stop_gradient(found.retrieved_negative_embeddings)
            return CacheLossReturn(
                found.training_loss,
                found.interpretable_loss,
                *self._updates(indices, fresh, candidates),
                found.staleness,
            )

        indices, log_partition = self._retrieve(tf.stop_gradient(queries), candidates)
        features = self._fetch(indices, candidates)
        stale = tf.cast(features[self.embedding_key], tf.float32)
        fresh = doc_network({key: features[key] for key in self.data_keys})
        fresh = _check_encoded(fresh, queries.shape)

        training_loss, interpretable_loss = contrastive.losses_of_one_draw(
            self._score_documents(queries, positives),
            self._score_documents(queries, fresh),
            log_partition,
        )
        fresh = tf.stop_gradient(fresh)
        staleness = contrastive.relative_staleness(stale, tf.cast(fresh, tf.float32))
        return CacheLossReturn(
            contrastive.reduce_or_zero(training_loss, self.reducer),
            contrastive.reduce_or_zero(interpretable_loss, self.reducer),
            *self._updates(indices, fresh, candidates),
            contrastive.reduce_or_zero(staleness, self.reducer),
        )

    def _retrieve_from_cache(
        self, query_embeddings: tf.Tensor, cache: Mapping[str, NegativeCache]
    ) -> _RetrievalReturn:
        """Retrieves from all scores. `__call__` avoids computing them if it can."""
        queries = tf.convert_to_tensor(query_embeddings)
        candidates = self._candidates_of(cache, queries)
        scores = self._score_all(tf.stop_gradient(queries), candidates)
        indices, _ = self._retrieve_from_scores(scores)
        features = candidates.gather(indices)
        data = {key: features[key] for key in self.data_keys}
        return _RetrievalReturn(data, scores, indices[:, tf.newaxis], features[self.embedding_key])

    def _candidates_of(
        self, cache: Mapping[str, NegativeCache], queries: tf.Tensor
    ) -> CacheSources:
        """Returns the rows of all sources as one list of candidates."""
        if not isinstance(cache, Mapping) or not cache:
            raise ValueError(
                f"`cache` must map at least one source to a `NegativeCache`. Received: {cache!r}."
            )
        sources = {source: cache[source].data for source in cache}
        return CacheSources(sources, self.embedding_key, self.data_keys, queries.shape[1])

    def _retrieve(
        self, queries: tf.Tensor, candidates: CacheSources
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the drawn candidates [B] int64, with -1 for no candidate, and log Ẑ [B]."""
        if self._samples_by_blocks():
            sample = self._sample(queries, candidates)
            return sample.indices[:, 0], sample.log_partition
        if self.top_k is not None and candidates.is_one_of_known_size:
            (source,) = candidates.sources.values()
            best = top_k_scores(
                queries,
                source[self.embedding_key],
                self.top_k,
                approximate=True,
                score_transform=self.score_transform,
            )
            return self._draw(*best)
        return self._retrieve_from_scores(self._score_all(queries, candidates))

    def _fetch(self, indices: tf.Tensor, candidates: CacheSources) -> dict[str, tf.Tensor]:
        """Returns the features [B, ...] of drawn candidates."""
        return candidates.gather(indices)

    def _updates(self, indices: tf.Tensor, fresh: tf.Tensor, candidates: CacheSources) -> _Updates:
        """Returns the three `updated_item_…` fields of `CacheLossReturn`."""
        data = {source: {self.embedding_key: fresh} for source in candidates.sources}
        return data, *candidates.locate(indices)

    def _samples_by_blocks(self) -> bool:
        return self.top_k is None and retrieval_fns.draws_from_softmax(self._retrieval_fn)

    def _sample(self, queries: tf.Tensor, candidates: CacheSources) -> SoftmaxSample:
        samples = []
        for source, offset in candidates.offsets.items():
            embeddings = candidates.sources[source][self.embedding_key]
            sample, _ = sample_softmax_with_gradient(
                queries,
                embeddings,
                score_transform=self.score_transform,
                compute_gradient=False,
                log_zero=contrastive.NOT_A_CANDIDATE,
            )
            samples.append(_shift(sample, offset))
        return merge_samples(samples, log_zero=contrastive.NOT_A_CANDIDATE)

    def _score_all(self, queries: tf.Tensor, candidates: CacheSources) -> tf.Tensor:
        embeddings = [
            tf.cast(source[self.embedding_key], tf.float32)
            for source in candidates.sources.values()
        ]
        products = tf.matmul(
            tf.cast(queries, tf.float32), tf.concat(embeddings, axis=0), transpose_b=True
        )
        return tf.stop_gradient(self._transform(products))

    def _retrieve_from_scores(self, scores: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if self.top_k is None:
            return self._draw(scores)
        return self._draw(*util.approximate_top_k_with_indices(scores, self.top_k))

    def _draw(
        self, scores: tf.Tensor, columns: tf.Tensor | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Applies the retrieval function to `scores` [B, n] of the candidates `columns`."""
        picks = tf.convert_to_tensor(self._retrieval_fn(scores))
        if not picks.dtype.is_integer or not picks.shape.is_compatible_with([scores.shape[0], 1]):
            raise ValueError(
                f"`_retrieval_fn` must return integers of shape {[scores.shape[0], 1]}. Received:"
                f" dtype {picks.dtype.name}, shape {picks.shape}."
            )
        indices = tf.cast(picks, tf.int64)
        if columns is not None:
            indices = tf.gather(columns, indices, batch_dims=1)
        return indices[:, 0], tf.reduce_logsumexp(scores, axis=1)

    def _score_documents(self, query_embeddings: tf.Tensor, doc_embeddings: tf.Tensor) -> tf.Tensor:
        """Returns the [B] scores of queries [B, d] with their candidates [B, d]."""
        products = tf.cast(query_embeddings, tf.float32) * tf.cast(doc_embeddings, tf.float32)
        return self._transform(tf.reduce_sum(products, axis=1))

    def _transform(self, products: tf.Tensor) -> tf.Tensor:
        return products if self.score_transform is None else self.score_transform(products)


class DistributedCacheClassificationLoss(CacheClassificationLoss):
    """`CacheClassificationLoss` over the union of all replicas' caches.

    The rows of each replica are its shard. Every query has the candidates of all shards. The loss
    works under every `tf.distribute` strategy. Outside a replica context, or with one replica, it
    equals `CacheClassificationLoss`.

    1. Every replica gets all G queries, and samples from its own shard for each query.
    2. The samples go to the queries' replicas, which merge them into one draw and one partition.
    3. The drawn candidates go to all replicas. Their owners send back the features to encode.
    4. The fresh embeddings go to all replicas. Masks select the rows that each replica owns, so
       updates have G entries.

    With `top_k` or another retrieval function, the loss needs the scores of the union, shard after
    shard. It moves G times C scores to every replica. The shards must have the same size.
    """

    def _retrieve(
        self, queries: tf.Tensor, candidates: CacheSources
    ) -> tuple[tf.Tensor, tf.Tensor]:
        batch = _GlobalBatch(queries)
        if not self._samples_by_blocks():
            scores = self._score_all(batch.values, candidates)
            return self._retrieve_from_scores(
                batch.local_part(util.cross_replica_concat(scores, axis=1))
            )
        sample = self._sample(batch.values, candidates)
        by_shard = SoftmaxSample(*(batch.stack_local_parts(values) for values in sample))
        merged = merge_samples(
            [
                _shift(
                    SoftmaxSample(*(values[shard] for values in by_shard)), shard * candidates.size
                )
                for shard in range(util.num_replicas())
            ],
            log_zero=contrastive.NOT_A_CANDIDATE,
        )
        return merged.indices[:, 0], merged.log_partition

    def _fetch(self, indices: tf.Tensor, candidates: CacheSources) -> dict[str, tf.Tensor]:
        batch = _GlobalBatch(indices)
        rows = _rows_of_own_shard(batch.values, candidates)
        owners = tf.maximum(indices, 0) // candidates.size
        columns = tf.range(tf.shape(indices, out_type=tf.int64)[0])
        where = tf.stack([owners, columns], axis=1)
        features = candidates.gather(rows)
        return {
            key: tf.gather_nd(batch.stack_local_parts(part), where)
            for key, part in features.items()
        }

    def _updates(self, indices: tf.Tensor, fresh: tf.Tensor, candidates: CacheSources) -> _Updates:
        rows = _rows_of_own_shard(util.cross_replica_concat(indices, axis=0), candidates)
        fresh = util.cross_replica_concat(fresh, axis=0)
        return super()._updates(rows, fresh, candidates)


class _GlobalBatch:
    """The `local` tensors [B, ...] of all replicas, where B may differ between replicas.

    Attributes:
      values: [G, ...], the tensors of all replicas, concatenated.
    """

    def __init__(self, local: tf.Tensor):
        self.values = util.cross_replica_concat(local, axis=0)
        self._size = tf.shape(local)[0]
        sizes = util.cross_replica_concat(self._size[tf.newaxis], axis=0)
        self._start = tf.reduce_sum(sizes[: util.replica_id()])

    def local_part(self, values: tf.Tensor) -> tf.Tensor:
        """Returns [B, ...], the entries of `values` [G, ...] that belong to this replica."""
        return values[self._start : self._start + self._size]

    def stack_local_parts(self, values: tf.Tensor) -> tf.Tensor:
        """Returns [replicas, B, ...], this replica's entries of all replicas' `values` [G, ...]."""
        stacked = util.cross_replica_concat(values[tf.newaxis], axis=0)
        return stacked[:, self._start : self._start + self._size]


def _rows_of_own_shard(indices: tf.Tensor, candidates: CacheSources) -> tf.Tensor:
    """Converts candidates [n] of the union to rows of this replica's shard, or -1."""
    rows = indices - tf.cast(util.replica_id(), tf.int64) * candidates.size
    return tf.where((indices >= 0) & (rows >= 0) & (rows < candidates.size), rows, -1)


def _shift(sample: SoftmaxSample, offset: int | tf.Tensor) -> SoftmaxSample:
    """Adds `offset` to the indices of a sample, except to -1, which stands for no draw."""
    is_draw = sample.indices >= 0
    return sample._replace(indices=tf.where(is_draw, sample.indices + offset, sample.indices))


def _check_pairs(
    query_embeddings: tf.Tensor, pos_doc_embeddings: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    queries = tf.convert_to_tensor(query_embeddings)
    positives = tf.convert_to_tensor(pos_doc_embeddings)
    is_matrix = queries.shape.rank == 2 and queries.shape[1] is not None
    if not is_matrix or not queries.shape.is_compatible_with(positives.shape):
        raise ValueError(
            "`query_embeddings` and `pos_doc_embeddings` must have the same shape [batch, dim]."
            f" Received shapes: {queries.shape} and {positives.shape}."
        )
    return queries, positives


def _check_encoded(embeddings: tf.Tensor, wanted: tf.TensorShape) -> tf.Tensor:
    embeddings = tf.convert_to_tensor(embeddings)
    if embeddings.shape.rank != 2 or not embeddings.shape.is_compatible_with(wanted):
        raise ValueError(
            f"`doc_network` must return embeddings of shape {wanted}. Received shape:"
            f" {embeddings.shape}."
        )
    return embeddings
