"""Exact sampling from a softmax over many candidates, one block of candidates at a time.

The candidates are cut into blocks, and each block into groups. One pass over the blocks scores
every candidate and keeps, for every query, only the sum of exp(score) over each group. The
partition function is the sum of those sums, and a draw is an inverse CDF in three steps: a block in
proportion to its sum, a group of that block likewise, and a candidate of that group, whose few
scores are computed a second time. No [B, C] array exists, no random number or logarithm is spent
per candidate, and more draws per query cost nothing but the last step.

`merge_samples` joins samples over disjoint candidate sets, so that caches, shards and trees share
one rule.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

TensorFn = Callable[[tf.Tensor], tf.Tensor]
Seed = int | tf.Tensor | Sequence[int] | None

# A second scoring of a candidate may round differently from the first. The threshold `max_scores`
# is therefore widened by this relative amount when a drawn group is scored again, so that no
# admitted candidate vanishes.
_RESCORING_TOLERANCE = 1e-4


class SoftmaxSample(NamedTuple):
    """Draws from a softmax over a set of candidates, with the set's log partition.

    `scores - log_partition[:, None]` is the log probability of each draw.

    Attributes:
      indices: [B, S] int64, the drawn candidates; -1 where a query has no admissible candidate.
      scores: [B, S] float32, their scores (log weights included); -inf where `indices` is -1.
      log_partition: [B] float32, log Σ exp(score) over the admissible candidates; -inf where there
        is none.
    """

    indices: tf.Tensor
    scores: tf.Tensor
    log_partition: tf.Tensor


def sample_softmax(
    query_embeddings: tf.Tensor,
    candidate_embeddings: tf.Tensor | tf.Variable,
    *,
    num_samples: int = 1,
    score_transform: TensorFn | None = None,
    embedding_transform: TensorFn | None = None,
    candidate_mask: tf.Tensor | None = None,
    candidate_ids: tf.Tensor | None = None,
    positive_ids: tf.Tensor | None = None,
    log_weights: tf.Tensor | None = None,
    max_scores: tf.Tensor | None = None,
    block_size: int | None = None,
    seed: Seed = None,
) -> SoftmaxSample:
    """Draws candidates y with probability exp s(x, y) / Z(x), exactly, and computes log Z(x).

    The score is s(x, y) = transform(⟨x, y⟩) + log_weight(y), and Z(x) = Σ_y exp s(x, y) over the
    candidates that are admissible for x. The S draws of a query are independent. Nothing of size
    [B, C] is materialised and the candidates are never copied whole. No gradient flows through the
    result.

    Args:
      query_embeddings: [B, d] float.
      candidate_embeddings: [C, d] float32, bfloat16 or float16, a tensor or a variable.
      num_samples: S, the number of draws per query.
      score_transform: elementwise function of the inner products, of any shape, for instance a
        division by a temperature. Scores are inner products where None.
      embedding_transform: function [n, d] -> [n, d] applied to each block of candidates before it
        is scored.
      candidate_mask: [C] bool; candidates with False are left out.
      candidate_ids: [C] ids of any comparable dtype, used with `positive_ids`.
      positive_ids: [B] ids; a candidate with a query's own positive id is left out for that query.
      log_weights: [C] float added to the scores.
      max_scores: [B] float; candidates whose score, before `log_weights`, is higher are left out
        for that query.
      block_size: candidates scored at a time. Chosen from the shapes where None.
      seed: an int or a pair of ints for the same draws at every call; fresh draws under
        `tf.random.set_seed` where None.

    Returns:
      A `SoftmaxSample`.

    Raises:
      ValueError: where a rank, a dimension or a dtype does not fit.
    """
    scorer = _BlockScorer(
        query_embeddings,
        candidate_embeddings,
        score_transform=score_transform,
        embedding_transform=embedding_transform,
        candidate_mask=candidate_mask,
        candidate_ids=candidate_ids,
        positive_ids=positive_ids,
        log_weights=log_weights,
        max_scores=max_scores,
    )
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1. Received: {num_samples}.")
    group_size = _choose_group_size(scorer.num_candidates_hint, scorer.dim, num_samples)
    if block_size is None:
        block_size = _choose_block_size(scorer.num_queries_hint)
    elif block_size < 1:
        raise ValueError(f"`block_size` must be at least 1. Received: {block_size}.")
    else:
        group_size = min(group_size, block_size)
    block_size = min(block_size, scorer.num_candidates_hint)
    block_size = math.ceil(block_size / group_size) * group_size

    block_max, group_sums = _sum_groups(scorer, block_size, group_size)
    block_sums = tf.reduce_sum(group_sums, axis=2)
    overall_max = tf.reduce_max(block_max, axis=1)
    block_weights = block_sums * tf.exp(block_max - _finite_or_zero(overall_max)[:, tf.newaxis])
    log_partition = overall_max + tf.math.log(tf.reduce_sum(block_weights, axis=1))

    uniforms = _uniforms([3, scorer.num_queries, num_samples], seed)
    blocks = _inverse_cdf(block_weights, uniforms[0])
    groups = _inverse_cdf(
        tf.gather(group_sums, blocks, batch_dims=1), uniforms[1][..., tf.newaxis]
    )[..., 0]
    group_starts = (blocks * (block_size // group_size) + groups) * group_size
    rows = group_starts[..., tf.newaxis] + tf.range(group_size)
    scores = scorer.score_rows(tf.reshape(rows, [scorer.num_queries, num_samples * group_size]))
    scores = tf.reshape(scores, [scorer.num_queries, num_samples, group_size])
    weights = tf.exp(scores - _finite_or_zero(tf.reduce_max(scores, axis=2, keepdims=True)))
    picks = _inverse_cdf(weights, uniforms[2][..., tf.newaxis])

    indices = tf.cast(tf.gather(rows, picks, batch_dims=2)[..., 0], tf.int64)
    scores = tf.gather(scores, picks, batch_dims=2)[..., 0]
    return _without_draws_from_nothing(SoftmaxSample(indices, scores, log_partition))


def merge_samples(samples: Sequence[SoftmaxSample], *, seed: Seed = None) -> SoftmaxSample:
    """Merges samples over disjoint candidate sets A, B, … into one sample over their union.

    log Z = logaddexp(log Z_A, log Z_B), and A's draw is kept with probability Z_A / Z,
    independently for every query and draw. The result has the law of a sample drawn over the union
    at once, and the merge is associative.

    Args:
      samples: `SoftmaxSample`s with the same B and S, whose indices are already those of the union.
      seed: as in `sample_softmax`. Must differ from the seeds of the samples themselves.

    Returns:
      A `SoftmaxSample` over the union.

    Raises:
      ValueError: where there is no sample.
    """
    samples = list(samples)
    if not samples:
        raise ValueError("`merge_samples` needs at least one sample. Received none.")
    if len(samples) == 1:
        return samples[0]
    log_partitions = tf.stack([sample.log_partition for sample in samples], axis=1)
    overall_max = tf.reduce_max(log_partitions, axis=1)
    weights = tf.exp(log_partitions - _finite_or_zero(overall_max)[:, tf.newaxis])
    log_partition = overall_max + tf.math.log(tf.reduce_sum(weights, axis=1))
    indices = tf.stack([sample.indices for sample in samples], axis=2)
    scores = tf.stack([sample.scores for sample in samples], axis=2)
    winners = _inverse_cdf(weights, _uniforms(tf.shape(indices)[:2], seed))[..., tf.newaxis]
    return _without_draws_from_nothing(
        SoftmaxSample(
            tf.gather(indices, winners, batch_dims=2)[..., 0],
            tf.gather(scores, winners, batch_dims=2)[..., 0],
            log_partition,
        )
    )


class _BlockScorer:
    """Scores of queries against blocks or chosen rows of the candidates; -inf where a candidate is inadmissible."""

    def __init__(
        self,
        query_embeddings,
        candidate_embeddings,
        *,
        score_transform,
        embedding_transform,
        candidate_mask,
        candidate_ids,
        positive_ids,
        log_weights,
        max_scores,
    ):
        queries = tf.convert_to_tensor(query_embeddings)
        if not is_variable(candidate_embeddings):
            candidate_embeddings = tf.stop_gradient(tf.convert_to_tensor(candidate_embeddings))
        _check_embeddings(queries, candidate_embeddings)
        if (candidate_ids is None) != (positive_ids is None):
            given = "candidate_ids" if positive_ids is None else "positive_ids"
            raise ValueError(
                f"`candidate_ids` and `positive_ids` are used together. Received only `{given}`."
            )
        self._queries = tf.stop_gradient(tf.cast(queries, tf.float32))
        self._candidates = candidate_embeddings
        self._score_transform = score_transform
        self._embedding_transform = embedding_transform
        num_queries, num_candidates = queries.shape[0], candidate_embeddings.shape[0]
        self._mask = _vector(candidate_mask, "candidate_mask", num_candidates, tf.bool)
        self._ids = _vector(candidate_ids, "candidate_ids", num_candidates)
        self._positive_ids = _vector(positive_ids, "positive_ids", num_queries)
        self._log_weights = _vector(log_weights, "log_weights", num_candidates, tf.float32)
        self._max_scores = _vector(max_scores, "max_scores", num_queries, tf.float32)
        if self._ids is not None and self._ids.dtype != self._positive_ids.dtype:
            raise ValueError(
                "`candidate_ids` and `positive_ids` must have one dtype. Received:"
                f" {self._ids.dtype.name} and {self._positive_ids.dtype.name}."
            )
        self.dim = candidate_embeddings.shape[1]
        self.num_queries = num_queries if num_queries is not None else tf.shape(queries)[0]
        self.num_queries_hint = num_queries or 256
        if num_candidates is None:
            num_candidates = tf.shape(candidate_embeddings)[0]
        self.num_candidates = num_candidates
        self.num_candidates_hint = candidate_embeddings.shape[0] or 2**17

    def score_block(self, start, size):
        """[B, size] scores of the `size` candidates from row `start` on."""
        if is_variable(self._candidates):
            # A slice of a variable that scatters have touched copies all of it; a gather copies
            # only these rows.
            block = tf.gather(self._candidates, start + tf.range(size))
        else:
            block = tf.slice(self._candidates, [start, 0], [size, self.dim])
        scores = tf.matmul(self._queries, self._embed(block), transpose_b=True)
        take = lambda values: tf.slice(values, [start], [size])[tf.newaxis]  # noqa: E731
        return self._admit(scores, take, self._max_scores)

    def score_rows(self, rows):
        """[B, n] scores of other rows for each query, `rows` [B, n] int32; rows beyond the last are inadmissible."""
        exists = rows < self.num_candidates
        rows = tf.minimum(rows, self.num_candidates - 1)
        candidates = self._embed(tf.gather(self._candidates, tf.reshape(rows, [-1])))
        candidates = tf.reshape(candidates, [self.num_queries, -1, self.dim])
        scores = tf.matmul(candidates, self._queries[..., tf.newaxis])[..., 0]
        max_scores = self._max_scores
        if max_scores is not None:
            max_scores += _RESCORING_TOLERANCE * tf.maximum(tf.abs(max_scores), 1.0)
        scores = self._admit(scores, lambda values: tf.gather(values, rows), max_scores)
        return tf.where(exists, scores, -math.inf)

    def _embed(self, block):
        if self._embedding_transform is not None:
            block = self._embedding_transform(block)
        return tf.stop_gradient(tf.cast(block, tf.float32))

    def _admit(self, scores, take, max_scores):
        if self._score_transform is not None:
            scores = tf.cast(self._score_transform(scores), tf.float32)
        scores = tf.stop_gradient(scores)
        if max_scores is not None:
            scores = tf.where(scores <= max_scores[:, tf.newaxis], scores, -math.inf)
        if self._log_weights is not None:
            scores += take(self._log_weights)
        if self._mask is not None:
            scores = tf.where(take(self._mask), scores, -math.inf)
        if self._ids is not None:
            accidental_hits = tf.equal(take(self._ids), self._positive_ids[:, tf.newaxis])
            scores = tf.where(accidental_hits, -math.inf, scores)
        return scores


def _sum_groups(scorer: _BlockScorer, block_size: int, group_size: int):
    """Sums exp(score - block maximum) over every group of every block.

    Returns:
      block_max: [B, blocks] float32, the largest score of each block, -inf where it has no
        admissible candidate.
      group_sums: [B, blocks, groups per block] float32.
    """
    groups_per_block = block_size // group_size
    num_full_blocks = scorer.num_candidates // block_size
    remainder = scorer.num_candidates - num_full_blocks * block_size
    has_remainder = remainder if tf.is_tensor(remainder) else bool(remainder)
    num_blocks = num_full_blocks + (1 if has_remainder is not False else 0)

    def sum_block(block, size):
        scores = scorer.score_block(block * block_size, size)
        block_max = tf.reduce_max(scores, axis=1)
        weights = tf.exp(scores - _finite_or_zero(block_max)[:, tf.newaxis])
        if size is not block_size:
            weights = tf.pad(weights, [[0, 0], [0, block_size - size]])
        weights = tf.reshape(weights, [scorer.num_queries, groups_per_block, group_size])
        return block_max, tf.reduce_sum(weights, axis=2)

    def body(block, block_max, group_sums):
        this_max, this_sums = sum_block(block, block_size)
        return block + 1, block_max.write(block, this_max), group_sums.write(block, this_sums)

    block_max, group_sums = (
        tf.TensorArray(tf.float32, num_blocks),
        tf.TensorArray(tf.float32, num_blocks),
    )
    if tf.is_tensor(num_full_blocks) or num_full_blocks > 0:
        _, block_max, group_sums = tf.while_loop(
            lambda block, *_: block < num_full_blocks,
            body,
            (tf.constant(0), block_max, group_sums),
            parallel_iterations=1,
        )
    if has_remainder is not False:
        this_max, this_sums = sum_block(num_full_blocks, remainder)
        block_max = block_max.write(num_full_blocks, this_max)
        group_sums = group_sums.write(num_full_blocks, this_sums)
    return tf.transpose(block_max.stack()), tf.transpose(group_sums.stack(), [1, 0, 2])


def _choose_group_size(num_candidates: int, dim: int, num_samples: int) -> int:
    """The power of two that balances the group sums, B·C/g floats, with the rows drawn again, B·S·g·d floats."""
    balanced = math.sqrt(num_candidates / (num_samples * dim))
    return min(max(2 ** round(math.log2(max(balanced, 1.0))), 16), 256)


def _choose_block_size(num_queries: int) -> int:
    """As many candidates as keep the [B, block] scores at about 2^19 floats, so that they stay in cache."""
    return min(max(2**19 // num_queries, 1024), 2**14)


def _inverse_cdf(weights: tf.Tensor, uniforms: tf.Tensor) -> tf.Tensor:
    """Draws positions in proportion to `weights` [..., n], one for each of `uniforms` [..., S]:
    [..., S] int32.

    A position of weight zero is never drawn, unless all are zero.
    """
    cdf = tf.cumsum(weights, axis=-1)
    positions = tf.searchsorted(cdf, uniforms * cdf[..., -1:], side="right")
    return tf.minimum(positions, tf.shape(weights)[-1] - 1)


def _without_draws_from_nothing(sample: SoftmaxSample) -> SoftmaxSample:
    is_empty = tf.equal(sample.log_partition, -math.inf)[:, tf.newaxis]
    return SoftmaxSample(
        tf.where(is_empty, tf.constant(-1, tf.int64), sample.indices),
        tf.where(is_empty, -math.inf, sample.scores),
        sample.log_partition,
    )


def _uniforms(shape, seed: Seed) -> tf.Tensor:
    if seed is None:
        return tf.random.uniform(shape)
    if isinstance(seed, int):
        seed = [0, seed]
    return tf.random.stateless_uniform(shape, seed, alg="philox")


def _finite_or_zero(values: tf.Tensor) -> tf.Tensor:
    """Replaces the -inf of an empty set, so that subtracting it leaves -inf and not NaN."""
    return tf.where(tf.equal(values, -math.inf), 0.0, values)


def is_variable(values) -> bool:
    return isinstance(values, tf.Variable)


def _check_embeddings(queries: tf.Tensor, candidates) -> None:
    for name, values in (("query_embeddings", queries), ("candidate_embeddings", candidates)):
        if values.shape.rank != 2:
            raise ValueError(
                f"`{name}` must have shape [rows, dim]. Received shape: {values.shape}."
            )
        if not values.dtype.is_floating:
            raise ValueError(
                f"`{name}` must be floating point. Received dtype: {values.dtype.name}."
            )
    if queries.shape[1] != candidates.shape[1] or candidates.shape[1] is None:
        raise ValueError(
            "`query_embeddings` and `candidate_embeddings` must have the same, known last dimension. Received"
            f" shapes: {queries.shape} and {candidates.shape}."
        )


def _vector(values, name: str, size: int | None, dtype: tf.DType | None = None) -> tf.Tensor | None:
    if values is None:
        return None
    values = tf.convert_to_tensor(values)
    if dtype == tf.bool and values.dtype != tf.bool:
        raise ValueError(f"`{name}` must be boolean. Received dtype: {values.dtype.name}.")
    if values.shape.rank != 1 or not values.shape.is_compatible_with([size]):
        raise ValueError(f"`{name}` must have shape [{size}]. Received shape: {values.shape}.")
    return tf.stop_gradient(values if dtype is None else tf.cast(values, dtype))
