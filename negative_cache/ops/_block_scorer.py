"""Scores of queries with a block or a selection of candidates, and the rules that exclude some.

`sample_softmax` and `top_k_scores` share this module. It never copies the whole array of
candidates.
"""

import copy
from collections.abc import Callable
from typing import TypeAlias, TypedDict

import tensorflow as tf

from negative_cache.ops import _execution
from negative_cache.ops._left_out_pairs import LeftOutPairs

TensorFn: TypeAlias = Callable[[tf.Tensor], tf.Tensor]
RowTransform: TypeAlias = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

# The score of a candidate that is not admissible. Its exponential is zero next to that of any other
# score. Unlike -inf, it stays finite if no candidate is admissible.
INADMISSIBLE = -1e30

# The largest number of ids per query that is compared in an unrolled loop.
_UNROLLED_IDS = 8

# Below this, comparing all pairs is faster than finding the few that are left out.
_MANY_CANDIDATES = 2048

# A second scoring of a candidate may round differently from the first, by this relative amount.
RESCORING_TOLERANCE = 1e-4


class ScoringOptions(TypedDict, total=False):
    """Keyword arguments of `BlockScorer`. `sample_softmax` documents most of them.

    `masked_rows_are_finite` says that the embeddings of rows with False in `candidate_mask` are
    finite too, so that they can be multiplied by zero.
    """

    score_transform: TensorFn | None
    embedding_transform: TensorFn | None
    row_transform: RowTransform | None
    candidate_mask: tf.Tensor | None
    candidate_ids: tf.Tensor | None
    positive_ids: tf.Tensor | None
    log_weights: tf.Tensor | None
    max_scores: tf.Tensor | None
    masked_rows_are_finite: bool


class BlockScorer:
    """Computes s(x, y) + log_weight(y), or `INADMISSIBLE` if y is excluded for the query x.

    The arguments are those of `sample_softmax` and `ScoringOptions`. The constructor checks them.

    Attributes:
      num_queries: B, an int if it is known during tracing, else a scalar tensor.
      num_candidates: C, an int if it is known during tracing, else a scalar tensor.
      dim: d.
      has_known_size: whether C is known during tracing.
    """

    def __init__(
        self,
        query_embeddings: tf.Tensor,
        candidate_embeddings: tf.Tensor | tf.Variable,
        *,
        score_transform: TensorFn | None = None,
        embedding_transform: TensorFn | None = None,
        row_transform: RowTransform | None = None,
        candidate_mask: tf.Tensor | None = None,
        candidate_ids: tf.Tensor | None = None,
        positive_ids: tf.Tensor | None = None,
        log_weights: tf.Tensor | None = None,
        max_scores: tf.Tensor | None = None,
        masked_rows_are_finite: bool = False,
    ):
        queries = tf.convert_to_tensor(query_embeddings)
        self._is_variable = isinstance(candidate_embeddings, tf.Variable)
        if not self._is_variable:
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
        if embedding_transform is not None and row_transform is not None:
            raise ValueError(
                "`embedding_transform` and `row_transform` exclude each other. Received both."
            )
        self._embedding_transform = embedding_transform
        self._row_transform = row_transform
        num_queries, num_candidates = queries.shape[0], candidate_embeddings.shape[0]
        self._may_hide_nan = candidate_mask is not None and not masked_rows_are_finite
        self._mask = _vector(candidate_mask, "candidate_mask", num_candidates, tf.bool)
        self._ids = _vector(candidate_ids, "candidate_ids", num_candidates)
        self._positive_ids = _ids_of_queries(positive_ids, num_queries)
        self._log_weights = _vector(log_weights, "log_weights", num_candidates, tf.float32)
        self._max_scores = _vector(max_scores, "max_scores", num_queries, tf.float32)
        ids, positive_ids = self._ids, self._positive_ids
        if ids is not None and positive_ids is not None and ids.dtype != positive_ids.dtype:
            raise ValueError(
                "`candidate_ids` and `positive_ids` must have one dtype. Received:"
                f" {ids.dtype.name} and {positive_ids.dtype.name}."
            )
        like = candidate_embeddings if self._is_variable else None
        is_for_cpu = not _execution.is_in_xla() and not _execution.is_on_accelerator(like)
        is_large = num_candidates is not None and num_candidates >= _MANY_CANDIDATES
        self._pairs = self._is_full = None
        if is_for_cpu and is_large:
            if ids is not None and positive_ids is not None and ids.dtype.is_integer:
                self._pairs = LeftOutPairs.of(ids, positive_ids)
            if self._mask is not None:
                self._is_full = tf.reduce_all(self._mask)
        self.dim = candidate_embeddings.shape[1]
        self.has_known_size = num_candidates is not None
        self.num_queries = tf.shape(queries)[0] if num_queries is None else num_queries
        self.num_candidates = num_candidates
        if num_candidates is None:
            self.num_candidates = tf.shape(candidate_embeddings)[0]

    def of_queries(self, chosen: tf.Tensor) -> "BlockScorer":
        """The scorer of some of the queries, [n] int32, which may come several times."""
        part = copy.copy(self)
        part._queries = tf.gather(self._queries, chosen)
        if self._positive_ids is not None:
            part._positive_ids = tf.gather(self._positive_ids, chosen)
        if self._max_scores is not None:
            part._max_scores = tf.gather(self._max_scores, chosen)
        # Those are of all queries.
        part._pairs = None
        num_chosen = part._queries.shape[0]
        part.num_queries = tf.shape(chosen)[0] if num_chosen is None else num_chosen
        return part

    def read_block(
        self, start: int | tf.Tensor, size: int | tf.Tensor, *, as_kept: bool = False
    ) -> tf.Tensor:
        """[size, d], the (transformed) embeddings of `size` candidates, beginning at `start`.

        They are float32. With `as_kept` they keep their 16-bit dtype if XLA can multiply them in
        it.
        """
        rows = start + tf.range(size)
        if self._is_variable and not _execution.is_in_xla():
            # After a scatter, every slice of a variable copies the whole variable. A gather copies
            # these rows only. XLA makes neither copy.
            block = tf.gather(self._candidates, rows)
        else:
            candidates = tf.convert_to_tensor(self._candidates)
            block = tf.slice(candidates, [start, 0], [size, self.dim])
        is_short = block.dtype in (tf.bfloat16, tf.float16) and not self._is_transformed
        if as_kept and is_short and _execution.is_in_xla():
            return block
        return self._embed(block, rows)

    def score_block(
        self,
        block: tf.Tensor,
        start: int | tf.Tensor,
        size: int | tf.Tensor,
        *,
        with_slopes: bool = False,
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Computes the scores of all queries with a block from `read_block(start, size)`.

        Args:
          block: [size, d], the embeddings.
          start: index of the block's first candidate.
          size: number of candidates in the block.
          with_slopes: whether to compute `slopes`.

        Returns:
          scores: [B, size] float32.
          slopes: [B, size] float32, the derivatives of the score with respect to the inner product.
            None if `with_slopes` is False or there is no `score_transform`: they are all one then.
        """
        products = _matmul(self._queries, block, transpose=True)
        slopes = None
        if with_slopes and self._score_transform is not None:
            with tf.GradientTape() as tape:
                tape.watch(products)
                transformed = self._score_transform(products)
            slopes = tf.stop_gradient(tape.gradient(transformed, products))

        def take(values: tf.Tensor) -> tf.Tensor:
            return tf.slice(values, [start], [size])[tf.newaxis]

        pairs = None if self._pairs is None else self._pairs.between(start, size)
        return self._admit(products, take, self._max_scores, pairs), slopes

    def combine(
        self,
        weights: tf.Tensor,
        slopes: tf.Tensor | None,
        block: tf.Tensor,
        start: int | tf.Tensor,
        size: int | tf.Tensor,
    ) -> tf.Tensor:
        """[B, d] float32, Σ_y weight · slope · y over a block from `read_block(start, size)`.

        Args:
          weights: [B, size] float32, zero for inadmissible candidates.
          slopes: the second result of `score_block`.
          block: [size, d], the embeddings.
          start: index of the block's first candidate.
          size: number of candidates in the block.
        """
        if slopes is not None:
            # The slope of an excluded candidate may be NaN or inf.
            weights = tf.where(weights > 0.0, weights * slopes, 0.0)
        if self._may_hide_nan:
            is_there = tf.slice(self._mask, [start], [size])
            block = tf.where(is_there[:, tf.newaxis], block, tf.zeros([], block.dtype))
        if block.dtype == tf.float16:
            # In float16 all weights below 3e-8 of the largest become zero, and there may be many.
            block = tf.cast(block, tf.float32)
        return _matmul(weights, block)

    def score_rows(self, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Computes the scores of each query with its own selection of candidates.

        Args:
          rows: [B, n] int32, the candidates of each query. Indices >= C are inadmissible.

        Returns:
          scores: [B, n] float32.
          widened_scores: [B, n] float32, the same with `max_scores` raised by
            `RESCORING_TOLERANCE`, so that every candidate that `score_block` admitted is admitted
            again. None without `max_scores`.
        """
        exists = rows < self.num_candidates
        rows = tf.minimum(rows, self.num_candidates - 1)
        flat_rows = tf.reshape(rows, [-1])
        candidates = self._embed(tf.gather(self._candidates, flat_rows), flat_rows)
        candidates = tf.reshape(candidates, [self.num_queries, -1, self.dim])
        products = tf.matmul(candidates, self._queries[..., tf.newaxis])[..., 0]

        def admit(max_scores: tf.Tensor) -> tf.Tensor:
            scores = self._admit(products, lambda values: tf.gather(values, rows), max_scores)
            return tf.where(exists, scores, INADMISSIBLE)

        scores = admit(self._max_scores)
        if self._max_scores is None:
            return scores, None
        wider = RESCORING_TOLERANCE * tf.maximum(tf.abs(self._max_scores), 1.0)
        return scores, admit(self._max_scores + wider)

    @property
    def _is_transformed(self) -> bool:
        return self._embedding_transform is not None or self._row_transform is not None

    def _embed(self, block: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
        if self._embedding_transform is not None:
            block = self._embedding_transform(block)
        if self._row_transform is not None:
            block = self._row_transform(block, rows)
        return tf.stop_gradient(tf.cast(block, tf.float32))

    def _admit(
        self,
        products: tf.Tensor,
        take: TensorFn,
        max_scores: tf.Tensor | None,
        pairs: LeftOutPairs | None = None,
    ) -> tf.Tensor:
        scores = products
        if self._score_transform is not None:
            scores = tf.stop_gradient(tf.cast(self._score_transform(products), tf.float32))
            # A score of -inf counts as inadmissible. NaN stays NaN.
            scores = tf.maximum(scores, INADMISSIBLE)
        if max_scores is not None:
            scores = tf.where(scores <= max_scores[:, tf.newaxis], scores, INADMISSIBLE)
        if self._log_weights is not None:
            scores = tf.maximum(scores + take(self._log_weights), INADMISSIBLE)
        if self._mask is not None:
            scores = self._leave_out_masked(scores, take)
        if pairs is not None:
            scores = pairs.set_to(scores, INADMISSIBLE)
        elif self._ids is not None:
            is_positive = is_among(take(self._ids), self._positive_ids)
            scores = tf.where(is_positive, INADMISSIBLE, scores)
        return scores

    def _leave_out_masked(self, scores: tf.Tensor, take: TensorFn) -> tf.Tensor:
        def leave_out() -> tf.Tensor:
            return tf.where(take(self._mask), scores, INADMISSIBLE)

        # A pass over all scores takes a while on a CPU, and a full cache needs none.
        return (
            leave_out()
            if self._is_full is None
            else tf.cond(self._is_full, lambda: scores, leave_out)
        )


def _matmul(one: tf.Tensor, block: tf.Tensor, transpose: bool = False) -> tf.Tensor:
    """Float32 product of `one` [n, m] float32 with `block` [m, k], or [k, m] if `transpose`.

    If the block has a 16-bit dtype, `one` is rounded to that dtype and the products are summed in
    float32. Only XLA can do that.
    """
    if block.dtype == tf.float32:
        return tf.matmul(one, block, transpose_b=transpose)
    return tf.raw_ops.BatchMatMulV3(
        x=tf.cast(one, block.dtype), y=block, Tout=tf.float32, adj_y=transpose
    )


def is_among(ids: tf.Tensor, of_queries: tf.Tensor) -> tf.Tensor:
    """[B, ...] bool, whether each of `ids` [B or 1, ...] is one of the ids `of_queries` [B, P]."""
    shape = [-1] + [1] * (ids.shape.rank - 1)

    def matches(i: int | tf.Tensor) -> tf.Tensor:
        return tf.equal(ids, tf.reshape(of_queries[:, i], shape))

    # One id at a time: a comparison with all of them at once would take P times the memory.
    count = of_queries.shape[1]
    if count is not None and 1 <= count <= _UNROLLED_IDS:
        found = matches(0)
        for i in range(1, count):
            found |= matches(i)
        return found
    nothing = tf.zeros(tf.shape(of_queries)[:1], tf.bool)
    nothing = tf.reshape(nothing, shape) & tf.zeros_like(ids, tf.bool)
    return tf.while_loop(
        lambda i, _: i < tf.shape(of_queries)[1],
        lambda i, found: (i + 1, found | matches(i)),
        (tf.constant(0), nothing),
        shape_invariants=(tf.TensorShape([]), tf.TensorShape([None] * ids.shape.rank)),
    )[1]


def is_admissible(scores: tf.Tensor) -> tf.Tensor:
    """Whether each score is that of an admissible candidate.

    For log partitions: whether each set has an admissible candidate.
    """
    return scores > 0.5 * INADMISSIBLE


def _check_embeddings(queries: tf.Tensor, candidates: tf.Tensor | tf.Variable) -> None:
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
            "`query_embeddings` and `candidate_embeddings` must have the same, known last"
            f" dimension. Received shapes: {queries.shape} and {candidates.shape}."
        )


def _ids_of_queries(ids: tf.Tensor | None, num_queries: int | None) -> tf.Tensor | None:
    """`positive_ids` as a tensor [B, P], or None if there are none."""
    if ids is None:
        return None
    ids = tf.convert_to_tensor(ids)
    if ids.shape.rank not in (1, 2) or not ids.shape[:1].is_compatible_with([num_queries]):
        raise ValueError(
            f"`positive_ids` must have shape [{num_queries}] or [{num_queries}, ids]. Received"
            f" shape: {ids.shape}."
        )
    return ids if ids.shape.rank == 2 else ids[:, tf.newaxis]


def _vector(
    values: tf.Tensor | None, name: str, size: int | None, dtype: tf.DType | None = None
) -> tf.Tensor | None:
    if values is None:
        return None
    values = tf.convert_to_tensor(values)
    if dtype == tf.bool and values.dtype != tf.bool:
        raise ValueError(f"`{name}` must be boolean. Received dtype: {values.dtype.name}.")
    if values.shape.rank != 1 or not values.shape.is_compatible_with([size]):
        raise ValueError(f"`{name}` must have shape [{size}]. Received shape: {values.shape}.")
    return tf.stop_gradient(values if dtype is None else tf.cast(values, dtype))
