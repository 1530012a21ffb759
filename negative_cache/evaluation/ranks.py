"""Exact ranks of positives in a corpus, and the metrics that follow from them.

Positives are ranked in chunks, against one block of the corpus at a time.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import keras
from negative_cache._features import Features
from negative_cache._towers import Encoder, TowerPair, encoders_of
from negative_cache.evaluation import held_out
from negative_cache.evaluation.held_out import Pairs, rows_of
from negative_cache.ops._precision import matmul_in_full

# Where positives are not identified in the corpus, a candidate within rounding of the positive's
# score is taken for the positive itself.
_RELATIVE_TIE = 1e-6

# Positives ranked at a time, and scores of a block: enough for the matmul, few enough that a block
# is compared while it is in the processor's cache.
_CHUNK, _BLOCK_SCORES, _BLOCK_EMBEDDINGS = 1024, 2**21, 2**21
# float32 counts exactly up to here.
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
    * `"candidate"`: features of B candidates; row i is the positive of query i.
    * `"positives"`: ids of each query's positives in the corpus, instead of `"candidate"` or beside
      it; then the positives of a query are all that either names, each once.
    * `"excluded"`, optional: ids of candidates that do not compete for this query, such as those
      the user has already seen. Ids that are not in the corpus change nothing.

    Ids are a `tf.RaggedTensor` or `tf.SparseTensor` [B, None], or a tensor [B, E] padded with -1,
    or with "" where ids are strings. They are those of the candidate feature `candidate_id_key`.

    With R the positives of a query and rank(p) the number of candidates, without the excluded ones,
    that score higher than p, ties not counted (nor what is within float32 rounding of one, such as
    an exact copy of p under another id), the metrics are these means over the queries:

    * `recall_at_{k}`: |{p in R: rank(p) < k}| / |R|. Other positives compete for the first k
      places, and nothing caps |R|, so that fewer than |R| places cannot give 1.
    * `mrr`: 1 / (1 + rank of the best positive).
    * `hit_rate_at_{k}`, where batches have `"positives"`: whether the best positive's rank is below
      k. With one positive a query it is the recall.

    A positive is ranked even if it is listed as excluded. Queries without any positive do not enter
    the means. A positive whose score is NaN has the worst rank.

    Args:
      model: has `query_network` and `candidate_network`, as a `DualEncoder` has, or is the pair
        `(query_network, candidate_network)`: layers, models or functions, features -> [n, d].
      candidates: batches of candidate features, the corpus, re-iterable (a batched
        `tf.data.Dataset`).
      validation: batches as above; read once, in any order.
      k: the cut-offs.
      candidate_id_key: name of the candidate feature that is unique in the corpus, integers or
        strings. `"positives"` and `"excluded"` need it, unless a candidate's features are one
        tensor: that tensor is the id then, under the name "candidate".
      verbose: 1 shows a progress bar while the corpus is encoded.

    Returns:
      The metrics by name.

    Raises:
      ValueError: where `k`, the model or a batch does not fit, an id stands in the corpus twice, or
        positives are not in it, all before the corpus is encoded; where a second pass over
        `candidates`, made only if ids are used, brings others than the first.

    Example:
      >>> evaluate(model, candidates.batch(1024), validation.batch(1024), candidate_id_key="title")
      {"recall_at_1": …, "recall_at_10": …, "recall_at_100": …, "mrr": …}
      >>> evaluate((user_model, movie_model), movies.batch(1024), validation.batch(1024))
    """
    check_cutoffs(k)
    query_encoder, candidate_encoder = encoders_of(model)
    ids_of = functools.partial(held_out.ids_of, key=candidate_id_key)
    held = held_out.read(
        validation,
        embed_query=query_encoder.embed,
        embed_candidate=candidate_encoder.embed,
        ids_of=ids_of,
        uses_ids=candidate_id_key is not None,
    )
    corpus_ids = None
    if held.candidate_ids is not None:
        corpus_ids = held_out.concatenate(ids_of(features) for features in candidates)
        if not len(corpus_ids):
            raise ValueError("The dataset to embed is empty: `candidates` has no batches.")
    positives, excluded = held.look_up(corpus_ids)
    corpus = _encode_corpus(candidates, candidate_encoder, ids_of, corpus_ids, verbose)
    thresholds = _thresholds_of_pairs(held.queries, positives, held.positives, corpus)
    ranks = _ranks(
        held.queries,
        thresholds,
        corpus,
        positives.queries,
        None if corpus_ids is None else positives.rows,
        excluded,
    )
    return retrieval_metrics(ranks, k, positives.queries if held.lists_positives else None)


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
      positive_rows: [M] int64, the row of each positive in the corpus, which then never counts as
        higher than itself; -1 for a positive that is not in the corpus. In any case a candidate
        whose score is within float32 rounding of the positive's is a tie, and ties do not count.
      positive_queries: [M] int64, the query that each positive belongs to. Where None there is one
        positive a query, in order, M = Q. A query's positives do count against one another.
      excluded_rows: [Q, None] int64, ragged or padded with -1: rows of the corpus that never count
        as higher for this query, unless they are its own `positive_rows`.
      block_size: candidates scored at a time. Chosen from the shapes where None.

    Returns:
      [M] int64 ranks, 0 for a positive that no candidate beats.

    Raises:
      ValueError: where the shapes do not fit, or a row or a query does not exist.
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
    rows = None
    if positive_rows is not None:
        rows = _check_indices(positive_rows, "positive_rows", num_positives, num_candidates, -1)
    excluded = None
    known = Pairs.of_unknown_rows(owners) if rows is None else Pairs(owners, rows)
    if excluded_rows is not None:
        excluded_queries, excluded_rows = held_out.flatten(
            excluded_rows, "excluded_rows", num_queries
        )
        size = len(excluded_rows)
        listed = _check_indices(excluded_rows, "excluded_rows", size, num_candidates, -1)
        excluded = Pairs(excluded_queries, listed).unique().without(known)
    queries, positives = queries.numpy(), positives.numpy()
    own_queries = queries if one_each else queries[owners]
    thresholds = _thresholds(own_queries, positives)
    return _ranks(queries, thresholds, candidates, owners, rows, excluded, block_size)


def retrieval_metrics(
    ranks: np.ndarray, k: Sequence[int] = (1, 10, 100), queries: np.ndarray | None = None
) -> dict[str, float]:
    """Computes `recall_at_{k}`, the share of ranks below k, and `mrr`, the mean of 1 / (rank + 1).

    Args:
      ranks: [M] int, 0 for the best rank.
      k: the cut-offs.
      queries: [M] int, the query that each rank belongs to, where queries have several positives.
        Then these are means over the queries: recall the share of a query's ranks below k, MRR that
        of its best rank, and `hit_rate_at_{k}` says whether its best rank is below k. Where None,
        every rank is of another query, and there is no hit rate: it is the recall.
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
    """Checks that `k` are cut-offs of a recall."""
    if not isinstance(k, Sequence | np.ndarray) or not len(k) or min(k) < 1:
        raise ValueError(f"`k` must be positive cut-offs. Received: {k}.")


def _check_indices(
    indices: np.ndarray | tf.Tensor, name: str, size: int, limit: int, smallest: int
) -> np.ndarray:
    """[size] int64, from `smallest` to below `limit`."""
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


def _encode_corpus(
    candidates: Iterable[Features],
    encoder: Encoder,
    ids_of: Callable[[Features], np.ndarray],
    expected_ids: np.ndarray | None,
    verbose: int,
) -> np.ndarray:
    """[C, d] embeddings, in the order of `expected_ids` where the ids are known."""
    ids_by_batch = []

    def batches() -> Iterator[Features]:
        for features in candidates:
            if expected_ids is not None:
                ids_by_batch.append(ids_of(features))
            yield features

    bar = _progress_bar(candidates, verbose)
    corpus = encoder(batches(), bar.update if bar else None)
    if expected_ids is None:
        return corpus
    ids = held_out.concatenate(ids_by_batch)
    if np.array_equal(ids, expected_ids):
        return corpus
    # A dataset that shuffles has another order at each pass.
    rows = rows_of(expected_ids, ids)
    if len(ids) != len(expected_ids) or np.any(rows < 0):
        raise ValueError(
            "`candidates` must be the same candidates at every pass. Received"
            f" {len(expected_ids)} and then {len(ids)}, of which {np.sum(rows >= 0)} the same."
        )
    return corpus[rows]


def _progress_bar(batches: Iterable[Features], verbose: int) -> keras.utils.Progbar | None:
    if not verbose:
        return None
    size = getattr(batches, "cardinality", None)
    size = int(size()) if size is not None else -1
    return keras.utils.Progbar(size if size > 0 else None, unit_name="batch")


def _thresholds(queries: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """[n] what a candidate must exceed to be higher: the positive's score, and its rounding.

    A copy of the positive, under another id, is scored in another product and may differ by it.
    """
    scores = tf.reduce_sum(queries * positives, axis=1).numpy()
    lengths = np.linalg.norm(queries, axis=1) * np.linalg.norm(positives, axis=1)
    return scores + _RELATIVE_TIE * lengths


def _thresholds_of_pairs(
    queries: np.ndarray, positives: Pairs, embeddings: np.ndarray, corpus: np.ndarray
) -> np.ndarray:
    """[M] thresholds of positives: the first of `embeddings`, the others of their rows."""
    parts = [_thresholds(queries[: len(embeddings)], embeddings)] if len(embeddings) else []
    for start in range(len(embeddings), len(positives.queries), 2**16):
        chunk = slice(start, start + 2**16)
        parts.append(_thresholds(queries[positives.queries[chunk]], corpus[positives.rows[chunk]]))
    return np.concatenate(parts)


def _ranks(
    queries: np.ndarray,
    thresholds: np.ndarray,
    candidates: tf.Tensor | np.ndarray,
    positive_queries: np.ndarray,
    positive_rows: np.ndarray | None,
    excluded: Pairs | None,
    block_size: int | None = None,
) -> np.ndarray:
    """[M] ranks, of a chunk of positives in the order of their queries at a time."""
    candidates = tf.convert_to_tensor(candidates)
    ranks = np.zeros(len(thresholds), np.int64)
    order = np.argsort(positive_queries, kind="stable")
    for start in range(0, len(order), _CHUNK):
        chunk = order[start : start + _CHUNK]
        used, owners = np.unique(positive_queries[chunk], return_inverse=True)
        excluded_here = None
        if excluded is not None:
            excluded_here = _of_queries(excluded, used)
        size = block_size or min(_BLOCK_SCORES // len(chunk), _BLOCK_EMBEDDINGS // queries.shape[1])
        higher = _count_higher(
            queries[used],
            thresholds[chunk],
            candidates,
            None if len(used) == len(chunk) else owners,
            None if positive_rows is None else positive_rows[chunk],
            excluded_here,
            tf.constant(min(max(size, 1), _LARGEST_BLOCK)),
        )
        ranks[chunk] = higher.numpy()
        if excluded_here is not None:
            # Excluded candidates are counted as higher.
            ranks[chunk] -= np.bincount(excluded_here[:, 0], minlength=len(used))[owners]
    return ranks


def _of_queries(pairs: Pairs, queries: np.ndarray) -> np.ndarray:
    """[n, 2] positions in `queries` and rows of those of `pairs`, in the order of rows."""
    first = np.searchsorted(pairs.queries, queries[0])
    last = np.searchsorted(pairs.queries, queries[-1], side="right")
    positions = np.searchsorted(queries, pairs.queries[first:last])
    is_of_query = queries[positions] == pairs.queries[first:last]
    found = np.stack([positions, pairs.rows[first:last]], axis=1)[is_of_query]
    return found[np.argsort(found[:, 1], kind="stable")]


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
    """[M] int64: how many candidates are not known to score at most a positive's threshold.

    `excluded` [n, 2], of queries and rows in the order of rows, are counted always.
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
        # All but those that do not score higher: a model of NaN has the worst ranks, not the best.
        # A sum of float32 is the fastest count: `tf.math.count_nonzero` doubles the time of it all.
        is_not_higher = tf.cast(scores <= thresholds[:, tf.newaxis], tf.float32)
        count += size - tf.cast(tf.reduce_sum(is_not_higher, axis=1), tf.int64)
        if positive_rows is not None:
            local_rows = positive_rows - start
            is_here = (local_rows >= 0) & (local_rows < size)
            own_scores = tf.gather(scores, tf.where(is_here, local_rows, 0), batch_dims=1)
            is_counted = 1 - tf.cast(own_scores <= thresholds, tf.int64)
            count -= tf.where(is_here, is_counted, 0)
    return count
