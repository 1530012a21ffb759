"""From embeddings of pairs to an order in which similar pairs are near one another.

`batching` describes the method; both functions are public there.
"""

import functools
import math
import warnings
from collections.abc import Callable

import numpy as np
import scipy.sparse
import tensorflow as tf
from scipy.sparse import csgraph

from negative_cache import _batch_conflicts, _held_out, _validation
from negative_cache._compat import keras
from negative_cache._grown_batches import grow_batches
from negative_cache.ops import neighbor_graph as graphs


def contrastive_order(
    query_embeddings: np.ndarray | tf.Tensor,
    candidate_embeddings: np.ndarray | tf.Tensor,
    *,
    num_neighbors: int = 16,
    quantile: float | None = None,
    candidate_ids: np.ndarray | tf.Tensor | None = None,
    batch_size: int | None = None,
    grow: bool = False,
    index=None,
    block_size: int | None = None,
    seed: int = 0,
    verbose: int = 0,
) -> np.ndarray:
    """Orders N pairs so that similar ones are near one another.

    It is the reverse Cuthill-McKee order of `neighbor_graph`, which makes the bandwidth of that
    graph small. The pairs are shuffled first, so that pairs alike in everything are in random
    order. Where the shuffled order happens to have the smaller bandwidth, as it may if all
    embeddings are equal, it is the result.

    Args:
      query_embeddings: [N, d] float, one row a pair.
      candidate_embeddings: [N, d] float; row i is the positive of query i.
      num_neighbors: the largest similarities of a row to keep, at most.
      quantile: keep only similarities above this quantile of all, in [0, 1). None keeps
        `num_neighbors` of every row, so that no pair is left without neighbors.
      candidate_ids: [N] integers or strings. Pairs with the same id are not neighbors, and with
        `batch_size` not of one batch: pairs that would be are swapped with pairs of the nearest
        batch where they fit. If an id occurs in more pairs than there are full batches, that may
        be impossible; then as many as can be are kept apart, with a warning.
      batch_size: the batches that the order will be cut into, if `candidate_ids` are to be kept
        apart in them, or for `grow`.
      grow: whether to fill batches, one after the other, with the pairs that have the most
        neighbors in them, and not with consecutive ones of the order. It puts several times as many
        neighbors into shared batches; the bandwidth of the result is not small. Needs `batch_size`.
      index: a `TreeIndex` with these candidate embeddings, to search instead of all candidates.
      block_size: candidates scored at a time. Chosen where None.
      seed: of all that is random; the result is a function of it and the embeddings.
      verbose: 1 shows a progress bar.

    Returns:
      [N] int64, a permutation of the rows.

    Raises:
      ValueError: where shapes do not fit, an embedding is not finite, or an argument is out of
        range.
    """
    if batch_size is not None:
        _validation.check_count(batch_size, "batch_size")
    elif grow:
        raise ValueError("`grow` needs `batch_size`. Received: `batch_size=None`.")
    graph = neighbor_graph(
        query_embeddings,
        candidate_embeddings,
        num_neighbors=num_neighbors,
        quantile=quantile,
        candidate_ids=candidate_ids,
        index=index,
        block_size=block_size,
        seed=seed,
        verbose=verbose,
    )
    order = order_of(graph, seed)
    if batch_size is None:
        return order
    codes = None
    if candidate_ids is not None:
        codes = checked_codes(candidate_ids, len(order), batch_size)
    if grow:
        order = grow_batches(graph, order, batch_size, codes)
    if codes is not None:
        order = _batch_conflicts.separate_ids(order, codes, batch_size)
    return order


def neighbor_graph(
    query_embeddings: np.ndarray | tf.Tensor,
    candidate_embeddings: np.ndarray | tf.Tensor,
    *,
    num_neighbors: int = 16,
    quantile: float | None = None,
    candidate_ids: np.ndarray | tf.Tensor | None = None,
    index=None,
    block_size: int | None = None,
    seed: int = 0,
    verbose: int = 0,
) -> scipy.sparse.csr_matrix:
    """The graph that `contrastive_order` orders: which pairs are each other's hard negatives.

    Pairs i and j are joined where f(x_i)·g(y_j) is one of the `num_neighbors` largest entries of
    row i of f(X) g(Y)ᵀ without the diagonal, and above the quantile, or the same with i and j
    exchanged. Arguments and errors are those of `contrastive_order`.

    Returns:
      [N, N] bool, symmetric, without a diagonal. `bandwidth(graph, order)` measures an order of it.
    """
    num_neighbors = _validation.check_count(num_neighbors, "num_neighbors")
    if quantile is not None and not 0.0 <= quantile < 1.0:
        raise ValueError(f"`quantile` must lie in [0, 1). Received: {quantile!r}.")
    queries = _embeddings(query_embeddings, "query_embeddings")
    candidates = _embeddings(candidate_embeddings, "candidate_embeddings")
    if queries.shape != candidates.shape:
        raise ValueError(
            "`query_embeddings` and `candidate_embeddings` must have the same shape, a row a pair."
            f" Received shapes: {queries.shape} and {candidates.shape}."
        )
    num_pairs = len(queries)
    ids = None
    if candidate_ids is not None:
        ids = checked_codes(candidate_ids, num_pairs)
    if num_pairs < 2:
        return scipy.sparse.csr_matrix((num_pairs, num_pairs), dtype=bool)
    threshold = -math.inf
    if quantile is not None:
        rng = np.random.default_rng(seed)
        threshold = graphs.similarity_quantile(queries, candidates, quantile, rng, ids)
    search = _exact_search(candidates, ids, block_size)
    if index is not None:
        search = _index_search(index, num_pairs)
    neighbors = _neighbors(search, queries, num_neighbors, threshold, ids, verbose)
    return graphs.symmetric_graph(neighbors)


def order_of(graph: scipy.sparse.csr_matrix, seed: int) -> np.ndarray:
    """[N] int64, the order of small bandwidth that `contrastive_order` describes."""
    order = np.random.default_rng(seed).permutation(graph.shape[0])
    if not graph.nnz:
        return order
    shuffled = graph[order][:, order]
    shuffled.sort_indices()
    reordered = csgraph.reverse_cuthill_mckee(shuffled, symmetric_mode=True)
    is_narrower = graphs.bandwidth(shuffled, reordered) <= graphs.bandwidth(shuffled)
    return order[reordered] if is_narrower else order


def checked_codes(ids, num_pairs: int, batch_size: int | None = None) -> np.ndarray:
    """[N] int64 codes from 0 on of ids, integers or strings.

    With a batch size it warns of ids that are too frequent to be in a batch once only.
    """
    ids = _held_out.to_numpy(ids)
    if ids.shape != (num_pairs,) or ids.dtype.kind not in "iuO":
        raise ValueError(
            f"`candidate_ids` must be integers or strings of shape [{num_pairs}]. Received dtype"
            f" {ids.dtype}, shape {ids.shape}."
        )
    values, codes, counts = np.unique(ids, return_inverse=True, return_counts=True)
    if batch_size is not None and counts.max(initial=0) > max(num_pairs // batch_size, 1):
        warnings.warn(
            f"Some batches will hold a candidate twice: {values[np.argmax(counts)]} is in"
            f" {counts.max()} pairs, and {num_pairs} pairs make {num_pairs // batch_size} full"
            f" batches of {batch_size}. Smaller batches, or `remove_accidental_hits` in the task,"
            " keep it from being its own negative.",
            stacklevel=3,
        )
    return codes.astype(np.int64)


def _embeddings(values, name: str) -> tf.Tensor:
    """[N, d] float32."""
    values = tf.convert_to_tensor(values)
    if values.shape.rank != 2 or not values.dtype.is_floating:
        raise ValueError(
            f"`{name}` must be floating point of shape [pairs, dim]. Received dtype"
            f" {values.dtype.name}, shape {values.shape}."
        )
    values = tf.cast(values, tf.float32)
    is_finite = np.isfinite(values.numpy()).all(axis=1)
    if not is_finite.all():
        row = int(np.argmin(is_finite))
        raise ValueError(
            f"`{name}` must be finite. Received {np.sum(~is_finite)} rows that are not, the first"
            f" of them row {row}: {values[row].numpy()}."
        )
    return values


def _exact_search(candidates: tf.Tensor, ids: np.ndarray | None, block_size: int | None):
    """Finds the nearest of all candidates: queries [B, d], their rows, k -> scores and indices."""
    compiled = _compiled_search(candidates.shape[1], block_size, ids is not None)
    ids = None if ids is None else tf.constant(ids)

    def search(queries, rows, k):
        own_ids = () if ids is None else (ids, tf.gather(ids, rows))
        return compiled(queries, candidates, tf.constant(k), *own_ids)

    return search


@functools.lru_cache(maxsize=16)
def _compiled_search(dim: int, block_size: int | None, has_ids: bool) -> Callable:
    """`nearest_candidates`, compiled once for any number of queries and candidates."""
    embeddings = tf.TensorSpec([None, dim], tf.float32)
    ids = [tf.TensorSpec([None], tf.int64)] * 2 if has_ids else []

    def search(queries, candidates, k, candidate_ids=None, positive_ids=None):
        return graphs.nearest_candidates(
            queries,
            candidates,
            k,
            candidate_ids=candidate_ids,
            positive_ids=positive_ids,
            block_size=block_size,
        )

    signature = [embeddings, embeddings, tf.TensorSpec([], tf.int32), *ids]
    return tf.function(search, input_signature=signature)


def _index_search(index, num_pairs: int):
    """The same by an index."""
    if int(index.num_candidates) != num_pairs:
        raise ValueError(
            "`index` must hold the candidates of all pairs. Received an index of"
            f" {int(index.num_candidates)} candidates for {num_pairs} pairs."
        )
    return lambda queries, rows, k: index.top_k(queries, k)


def _neighbors(search, queries, num_neighbors, threshold, ids, verbose) -> np.ndarray:
    """[N, k] int32 neighbors of each query that score above a threshold; -1 for none."""
    num_pairs, dim = queries.shape
    ids = np.arange(num_pairs) if ids is None else ids
    # The pair itself is found, too.
    k = min(num_neighbors + 1, num_pairs)
    neighbors = np.full([num_pairs, k - 1], -1, np.int32)
    step = graphs.queries_at_a_time(num_pairs, dim, k)
    bar = keras.utils.Progbar(num_pairs, unit_name="row") if verbose else None
    for start in range(0, num_pairs, step):
        rows = np.arange(start, min(start + step, num_pairs))
        scores, found = search(queries[start : start + step], rows, k)
        scores, found = scores.numpy(), found.numpy()
        is_neighbor = (found >= 0) & (scores > threshold)
        is_neighbor &= ids[np.maximum(found, 0)] != ids[rows][:, np.newaxis]
        # The others first, in the order of their scores.
        best = np.argsort(~is_neighbor, axis=1, kind="stable")[:, : k - 1]
        found = np.where(is_neighbor, found, -1)
        found = np.take_along_axis(found, best, axis=1)
        neighbors[rows, : found.shape[1]] = found
        if bar is not None:
            bar.add(len(rows))
    return neighbors
