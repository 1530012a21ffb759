"""Exact ranks of positives in a corpus, and the metrics that follow from them.

Positives are ranked in chunks, and each chunk is compared with one block of the corpus at a time.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from negative_cache import _validation
from negative_cache._features import Features
from negative_cache._towers import TowerPair, encoders_of, scope_of
from negative_cache.evaluation import corpus, validation_set
from negative_cache.evaluation.corpus import Part
from negative_cache.evaluation.replicas import Replicas
from negative_cache.evaluation.validation_set import Pairs
from negative_cache.ops._precision import matmul_in_full

# Positives ranked at a time, and the sizes of a block. They are large enough for a fast matmul, and
# small enough that a block is compared while it is in the processor's cache.
_CHUNK, _BLOCK_SCORES, _BLOCK_EMBEDDINGS = 1024, 2**21, 2**21
# float32 counts exactly up to this number.
_LARGEST_BLOCK = 2**24


def evaluate(
    model: TowerPair,
    candidates: Iterable[Features],
    validation: Iterable[Mapping[str, Features]],
    k: Sequence[int] = (1, 10, 100),
    *,
    candidate_id_key: str | None = None,
    verbose: int = 0,
) -> dict[str, float]:
    """Ranks the positives of every validation query among all candidates.

    A validation batch is a dictionary of B rows:

    * `"query"`: features of B queries.
    * `"candidate"`: features of B candidates. Row i is the positive of query i.
    * `"positives"`: ids of each query's positives in the corpus. They replace `"candidate"`, or add
      to it. In the second case the positives of a query are the union of both.
    * `"excluded"`, optional: ids of candidates that do not compete for this query, for instance
      those that the user has already seen. Ids that are not in the corpus have no effect.

    Ids are a `tf.RaggedTensor` or `tf.SparseTensor` [B, None], or a tensor [B, E] that is padded
    with -1 (with "" if ids are strings). They are values of the candidate feature
    `candidate_id_key`.

    Let R be the positives of a query. Let rank(p) be the number of candidates that score higher
    than p and are not excluded. Ties do not count as higher, and a difference within float32
    rounding is a tie, so an exact copy of p under another id does not count. The metrics are means
    over queries:

    * `recall_at_{k}`: |{p in R: rank(p) < k}| / |R|. The positives of a query also compete with
      each other, and |R| is not capped at k, so the recall is below 1 if k < |R|.
    * `mrr`: 1 / (1 + rank of the best positive).
    * `hit_rate_at_{k}`, only if batches have `"positives"`: whether the best positive's rank is
      below k. If each query has one positive, it equals the recall.

    Under a `MirroredStrategy` or a `MultiWorkerMirroredStrategy`, that of the model or the current
    one, the corpus is divided among the replicas, batch by batch. Each encodes and scores its part,
    and the counts of higher candidates are added, so that all get the same metrics. All workers
    must call this function, and read `candidates` in one order. See docs/distributed.md.

    A positive is ranked even if it is listed as excluded. Queries without any positive do not enter
    the means. A positive whose score is NaN has the worst rank.

    Args:
      model: a model with `query_network` and `candidate_network`, such as a `DualEncoder`, or the
        pair `(query_network, candidate_network)`. Networks are layers, models or functions,
        features -> [n, d].
      candidates: the corpus as batches of candidate features, re-iterable, for instance a batched
        `tf.data.Dataset`.
      validation: batches as described above. They are read once, in any order.
      k: the cut-offs.
      candidate_id_key: name of a candidate feature that is unique in the corpus, integers or
        strings. `"positives"` and `"excluded"` need it. If a candidate's features are one tensor,
        this tensor is the id, and its name is "candidate".
      verbose: 1 shows a progress bar while the corpus is encoded.

    Returns:
      The metrics by name.

    Raises:
      ValueError: if `k`, the model or a batch is not valid, an id is in the corpus twice, or a
        positive is not in the corpus. All of this is checked before the corpus is encoded. Also if
        two passes over `candidates` yield different candidates. The second pass is only needed if
        ids are used.

    Examples:
      >>> towers = query_tower, candidate_tower
      >>> metrics = evaluate(towers, candidates.batch(1024), validation.batch(1024))
      >>> list(metrics)
      ['recall_at_1', 'recall_at_10', 'recall_at_100', 'mrr']
    """
    check_cutoffs(k)
    query_encoder, candidate_encoder = encoders_of(model)
    ids_of = functools.partial(validation_set.ids_of, key=candidate_id_key)
    with scope_of(model):
        replicas = Replicas(tf.distribute.get_strategy())
        examples = validation_set.read(
            validation,
            embed_query=query_encoder.embed,
            embed_candidate=candidate_encoder.embed,
            ids_of=ids_of,
            uses_ids=candidate_id_key is not None,
        )
        corpus_ids = None
        if examples.candidate_ids is not None:
            corpus_ids = corpus.read_ids(candidates, ids_of, replicas)
        positives, excluded = examples.look_up(corpus_ids)
        # A validation dataset that shuffles has another order in another process.
        queries, embeddings = map(replicas.from_first, (examples.queries, examples.positives))
        positives = positives.map(replicas.from_first)
        excluded = None if excluded is None else excluded.map(replicas.from_first)
        parts = corpus.encode(
            candidates,
            candidate_encoder,
            ids_of,
            corpus_ids,
            replicas,
            dim=queries.shape[1],
            verbose=verbose,
        )
        thresholds = corpus.thresholds_of_pairs(queries, positives, embeddings, parts, replicas)
        ranks = _ranks(queries, thresholds, parts, positives, excluded, replicas)
    return retrieval_metrics(ranks, k, positives.queries if examples.lists_positives else None)


def positive_ranks(
    query_embeddings: tf.Tensor,
    positive_embeddings: tf.Tensor,
    candidate_embeddings: tf.Tensor,
    *,
    positive_rows: tf.Tensor | None = None,
    positive_queries: tf.Tensor | None = None,
    excluded_rows: tf.Tensor | tf.RaggedTensor | None = None,
    block_size: int | None = None,
) -> np.ndarray:
    """Counts, for each positive, the candidates that score higher for its query.

    Args:
      query_embeddings: [Q, d] float.
      positive_embeddings: [M, d] float.
      candidate_embeddings: [C, d] float, the corpus.
      positive_rows: [M] int64, the row of each positive in the corpus, or -1 for a positive that is
        not in the corpus. With a row, a positive never counts as higher than itself. In any case a
        candidate whose score is within float32 rounding of the positive's score is a tie, and ties
        do not count.
      positive_queries: [M] int64, the query of each positive. If None, each query has one positive,
        in the same order, and M = Q. A query's positives count against each other.
      excluded_rows: [Q, None] int64, ragged or padded with -1. These rows of the corpus never count
        as higher for a query, unless they are its own `positive_rows`.
      block_size: the number of candidates that are scored at a time. If None, it is chosen from the
        shapes.

    Returns:
      [M] int64 ranks, 0 for a positive that no candidate beats.

    Raises:
      ValueError: if the shapes do not match, or a row or a query does not exist.
    """
    queries, positives, candidates = (
        tf.cast(tf.convert_to_tensor(values), tf.float32)
        for values in (query_embeddings, positive_embeddings, candidate_embeddings)
    )
    one_each = positive_queries is None
    if (
        queries.shape.rank != 2
        or queries.shape[1:] != candidates.shape[1:]
        or queries.shape[1:] != positives.shape[1:]
        or (one_each and queries.shape != positives.shape)
    ):
        raise ValueError(
            "Queries and positives must have shape [queries, dim] and candidates [candidates, dim]."
            f" Received shapes: {queries.shape}, {positives.shape} and {candidates.shape}."
        )
    (num_queries, _), num_positives = queries.shape, positives.shape[0]
    num_candidates = candidates.shape[0]
    owners = np.arange(num_positives) if one_each else positive_queries
    owners = _check_indices(owners, "positive_queries", num_positives, num_queries, 0)
    excluded, known = None, Pairs.of_unknown_rows(owners)
    if positive_rows is not None:
        rows = _check_indices(positive_rows, "positive_rows", num_positives, num_candidates, -1)
        known = Pairs(owners, rows)
    if excluded_rows is not None:
        excluded_queries, excluded_rows = validation_set.flatten(
            excluded_rows, "excluded_rows", num_queries
        )
        size = len(excluded_rows)
        listed = _check_indices(excluded_rows, "excluded_rows", size, num_candidates, -1)
        excluded = Pairs(excluded_queries, listed).unique().without(known)
    queries, positives = queries.numpy(), positives.numpy()
    own_queries = queries if one_each else queries[owners]
    thresholds = corpus.thresholds(own_queries, positives)
    parts, replicas = [Part(candidates)], Replicas(None)
    return _ranks(queries, thresholds, parts, known, excluded, replicas, block_size)


def retrieval_metrics(
    ranks: np.ndarray, k: Sequence[int] = (1, 10, 100), queries: np.ndarray | None = None
) -> dict[str, float]:
    """Computes `recall_at_{k}`, the share of ranks below k, and `mrr`, the mean of 1 / (rank + 1).

    Args:
      ranks: [M] int, 0 for the best rank.
      k: the cut-offs.
      queries: [M] int, the query of each rank, needed if queries have several positives. Then the
        metrics are means over queries. Recall is the share of a query's ranks below k, MRR is that
        of its best rank, and `hit_rate_at_{k}` is whether its best rank is below k. If None, every
        rank belongs to another query, and there is no hit rate, as it would equal the recall.

    Returns:
      The metrics by name.
    """
    if queries is None:
        metrics = {f"recall_at_{cutoff}": float(np.mean(ranks < cutoff)) for cutoff in k}
        return {**metrics, "mrr": float(np.mean(1.0 / (ranks + 1.0)))}
    _, queries, counts = np.unique(queries, return_inverse=True, return_counts=True)
    best = np.full(len(counts), np.iinfo(np.int64).max)
    np.minimum.at(best, queries, ranks)
    recalls = {
        f"recall_at_{cutoff}": float(np.mean(np.bincount(queries, ranks < cutoff) / counts))
        for cutoff in k
    }
    hit_rates = {f"hit_rate_at_{cutoff}": float(np.mean(best < cutoff)) for cutoff in k}
    return {**recalls, **hit_rates, "mrr": float(np.mean(1.0 / (best + 1.0)))}


def check_cutoffs(k: Sequence[int]) -> None:
    """Checks that `k` is a sequence of positive cut-offs."""
    if not isinstance(k, Sequence | np.ndarray) or not len(k) or min(k) < 1:
        raise ValueError(f"`k` must be positive cut-offs. Received: {k}.")


def _check_indices(
    indices: np.ndarray | tf.Tensor, name: str, size: int, limit: int, smallest: int
) -> np.ndarray:
    """Checks that indices are [size] integers from `smallest` to below `limit`."""
    indices = _validation.to_numpy(indices)
    if indices.shape != (size,) or indices.dtype.kind not in "iu":
        raise ValueError(
            f"`{name}` must be integers of shape [{size}]. Received dtype {indices.dtype}, shape"
            f" {indices.shape}."
        )
    if size and not smallest <= indices.min() <= indices.max() < limit:
        raise ValueError(
            f"`{name}` must lie between {smallest} and {limit - 1}. Received values between"
            f" {indices.min()} and {indices.max()}."
        )
    return indices.astype(np.int64)


def _ranks(
    queries: np.ndarray,
    thresholds: np.ndarray,
    parts: Sequence[Part],
    positives: Pairs,
    excluded: Pairs | None,
    replicas: Replicas,
    block_size: int | None = None,
) -> np.ndarray:
    """Returns [M] ranks, for chunks of positives in the order of their queries.

    Each replica counts the higher candidates of its part, and the counts are added.
    """
    candidates = replicas.on_devices([tf.convert_to_tensor(part.embeddings) for part in parts])
    ranks = np.zeros(len(thresholds), np.int64)
    order = np.argsort(positives.queries, kind="stable")
    knows_rows = np.any(positives.rows >= 0)
    for start in range(0, len(order), _CHUNK):
        chunk = order[start : start + _CHUNK]
        used, owners = np.unique(positives.queries[chunk], return_inverse=True)
        rows = lists = None
        if knows_rows:
            rows = replicas.place([part.places_of(positives.rows[chunk]) for part in parts])
        if excluded is not None:
            listed = _of_queries(excluded, used)
            lists = replicas.place([_of_part(listed, part) for part in parts])
        size = block_size or min(_BLOCK_SCORES // len(chunk), _BLOCK_EMBEDDINGS // queries.shape[1])
        ranks[chunk] = replicas.run_and_sum(
            _count_higher,
            tf.constant(queries[used]),
            tf.constant(thresholds[chunk]),
            candidates,
            None if len(used) == len(chunk) else tf.constant(owners),
            rows,
            lists,
            tf.constant(min(max(size, 1), _LARGEST_BLOCK)),
        )
        if excluded is not None:
            # `_count_higher` counts all excluded candidates.
            num_excluded = np.bincount(listed.queries, minlength=len(used))
            ranks[chunk] -= num_excluded[owners]
    return ranks


def _of_queries(pairs: Pairs, queries: np.ndarray) -> Pairs:
    """Returns the pairs of `queries`, with the position in `queries` for each query."""
    first = np.searchsorted(pairs.queries, queries[0])
    last = np.searchsorted(pairs.queries, queries[-1], side="right")
    positions = np.searchsorted(queries, pairs.queries[first:last])
    is_of_query = queries[positions] == pairs.queries[first:last]
    return Pairs(positions[is_of_query], pairs.rows[first:last][is_of_query])


def _of_part(pairs: Pairs, part: Part) -> tf.Tensor:
    """Returns [n, 2], the query and the row in a part of each of its pairs, by row."""
    places = part.places_of(pairs.rows)
    found = np.stack([pairs.queries, places], axis=1)[places >= 0]
    return tf.constant(found[np.argsort(found[:, 1], kind="stable")])


@tf.function(reduce_retracing=True)
def _count_higher(
    queries: tf.Tensor,
    thresholds: tf.Tensor,
    candidates: tf.Tensor,
    positive_queries: tf.Tensor | None,
    positive_rows: tf.Tensor | None,
    excluded: tf.Tensor | None,
    block_size: tf.Tensor,
) -> tf.Tensor:
    """Counts candidates whose score is not <= the threshold of a positive.

    Args:
      queries: [U, d] float32.
      thresholds: [M] float32.
      candidates: [C, d] float32.
      positive_queries: [M] int64, or None if the positives are those of the queries in order.
      positive_rows: [M] int64 rows that are not counted, or None.
      excluded: [n, 2] int64 queries and rows, in the order of rows. They are always counted.
      block_size: the number of candidates that are scored at a time.

    Returns:
      [M] int64 counts.
    """
    count = tf.zeros(tf.shape(thresholds), tf.int64)
    if excluded is not None:
        excluded_queries, excluded_rows = excluded[:, 0], excluded[:, 1]
    for start in tf.range(0, tf.shape(candidates)[0], block_size):
        scores = matmul_in_full(queries, candidates[start : start + block_size], transpose_b=True)
        start = tf.cast(start, tf.int64)
        size = tf.shape(scores, out_type=tf.int64)[1]
        if excluded is not None:
            here = tf.searchsorted(excluded_rows, tf.stack([start, start + size]))
            rows = excluded_rows[here[0] : here[1]] - start
            entries = tf.stack([excluded_queries[here[0] : here[1]], rows], axis=1)
            nothing = tf.fill(tf.shape(rows), np.float32("nan"))
            scores = tf.tensor_scatter_nd_update(scores, entries, nothing)
        if positive_queries is not None:
            scores = tf.gather(scores, positive_queries)
        # Counting the complement gives NaN scores the worst rank, not the best.
        # A float32 sum is the fastest count. `tf.math.count_nonzero` would double the total time.
        is_not_higher = tf.cast(scores <= thresholds[:, tf.newaxis], tf.float32)
        count += size - tf.cast(tf.reduce_sum(is_not_higher, axis=1), tf.int64)
        if positive_rows is not None:
            local_rows = positive_rows - start
            is_here = (local_rows >= 0) & (local_rows < size)
            own_scores = tf.gather(scores, tf.where(is_here, local_rows, 0), batch_dims=1)
            is_counted = 1 - tf.cast(own_scores <= thresholds, tf.int64)
            count -= tf.where(is_here, is_counted, 0)
    return count
