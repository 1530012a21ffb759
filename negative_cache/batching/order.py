"""The order of similar pairs, computed from their embeddings.

`contrastive_order` and `neighbor_graph` are public, as names of `batching`.
"""

import functools
import math
import numbers
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import scipy.sparse
import tensorflow as tf
from scipy.sparse import csgraph

from negative_cache import _validation
from negative_cache._compat import keras
from negative_cache.batching import keep_apart
from negative_cache.batching.grow import grow_batches
from negative_cache.batching.ids import Ids
from negative_cache.layers.tree_index import TreeIndex
from negative_cache.ops import neighbor_graph as graphs

# Queries [B, d] and k -> scores and indices [B, k] of their nearest candidates.
_Search: TypeAlias = Callable[[tf.Tensor, int], tuple[tf.Tensor, tf.Tensor]]


def contrastive_order(
    query_embeddings: np.ndarray | tf.Tensor,
    candidate_embeddings: np.ndarray | tf.Tensor,
    *,
    num_neighbors: int = 16,
    quantile: float | None = None,
    candidate_ids: np.ndarray | tf.Tensor | None = None,
    query_ids: np.ndarray | tf.Tensor | None = None,
    batch_size: int | None = None,
    grow: bool = False,
    index: TreeIndex | None = None,
    block_size: int | None = None,
    seed: int = 0,
    verbose: int = 0,
) -> np.ndarray:
    """Orders N pairs so that similar pairs are close together.

    It is the reverse Cuthill-McKee order of `neighbor_graph`, which makes the bandwidth of this
    graph small. The pairs are shuffled first, so that equivalent pairs are in random order. If the
    shuffled order has the smaller bandwidth, for instance because all embeddings are equal, the
    result is the shuffled order.

    Args:
      query_embeddings: [N, d] float, one row for each pair.
      candidate_embeddings: [N, d] float. Row i is the positive of query i.
      num_neighbors: the maximum number of neighbors of a row, which are its largest similarities.
      quantile: keep only similarities above this quantile of all similarities with other
        candidates, in [0, 1). If None, every row keeps `num_neighbors`.
      candidate_ids: [N] integers or strings, needed if candidates are in several pairs. Then the
        neighbors are different candidates, each represented by one of its pairs. With `batch_size`,
        no two pairs of one candidate share a batch, because a pair waits for a later batch. If an
        id is in more pairs than there are batches, as few as possible share one, and there is a
        warning.
      query_ids: [N] integers or strings, needed if queries are in several pairs. Then two pairs are
        not neighbors if one pair's candidate is a positive of the other's query. With `batch_size`,
        few such pairs share a batch. A query with more than 4 · `num_neighbors` positives around it
        has fewer neighbors.
      batch_size: the size of the batches that the order will be cut into. Needed to keep ids apart
        in batches, and for `grow`.
      grow: if True, each batch is filled with the pairs that have the most neighbors in it, instead
        of consecutive pairs of the order. Several times as many neighbors share a batch, but the
        bandwidth of the result is not small. Needs `batch_size`.
      index: a `TreeIndex` for an approximate search, instead of scoring all candidates. It is
        filled with the candidates, and its previous content is lost.
      block_size: the number of candidates that are scored at a time. Chosen if None.
      seed: the seed of all random choices. The result is a function of the seed and the embeddings.
      verbose: 1 shows a progress bar.

    Returns:
      [N] int64, a permutation of the rows.

    Raises:
      ValueError: if shapes do not match, an embedding is not finite, or an argument is out of
        range.

    Examples:
      >>> order = contrastive_order(query_embeddings, candidate_embeddings, num_neighbors=4)
      >>> sorted(order.tolist()) == list(range(len(query_embeddings)))
      True
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
        query_ids=query_ids,
        index=index,
        block_size=block_size,
        seed=seed,
        verbose=verbose,
    )
    order = order_of(graph, seed)
    if batch_size is None:
        return order
    ids = Ids.from_arrays(len(order), query_ids, candidate_ids)
    keep_apart.warn_of_conflicts(ids, batch_size)
    if grow:
        order = grow_batches(graph, order, batch_size, ids)
    return keep_apart.separate(order, ids, batch_size)


def neighbor_graph(
    query_embeddings: np.ndarray | tf.Tensor,
    candidate_embeddings: np.ndarray | tf.Tensor,
    *,
    num_neighbors: int = 16,
    quantile: float | None = None,
    candidate_ids: np.ndarray | tf.Tensor | None = None,
    query_ids: np.ndarray | tf.Tensor | None = None,
    index: TreeIndex | None = None,
    block_size: int | None = None,
    seed: int = 0,
    verbose: int = 0,
) -> scipy.sparse.csr_matrix:
    """Makes the graph that `contrastive_order` orders, which joins each other's hard negatives.

    Pairs i and j are joined if f(x_i)·g(y_j) is one of the `num_neighbors` largest entries of row i
    of f(X) g(Y)ᵀ without positives, and above the quantile, or the same with i and j exchanged.
    With `candidate_ids` the entries are of different candidates, and j is one of the pairs of the
    candidate (`_pairs_of`).

    At most 4 · `num_neighbors` rows can choose the same j: those in which j ranks highest (*ours*).
    Otherwise some pairs would be neighbors of almost all pairs, and then no order has a small
    bandwidth. A row has no neighbors if it loses all its choices in this way. Many rows do if the
    embeddings of candidates differ much in length.

    Arguments and errors are those of `contrastive_order`.

    Returns:
      [N, N] bool, symmetric, without a diagonal. `bandwidth(graph, order)` measures an order of it.
    """
    num_neighbors = _validation.check_count(num_neighbors, "num_neighbors")
    check_quantile(quantile)
    check_index(index)
    if block_size is not None:
        _validation.check_count(block_size, "block_size")
    queries = check_embeddings(query_embeddings, "`query_embeddings`")
    candidates = check_embeddings(candidate_embeddings, "`candidate_embeddings`")
    if queries.shape != candidates.shape:
        raise ValueError(
            "`query_embeddings` and `candidate_embeddings` must have the same shape."
            f" Received shapes: {queries.shape} and {candidates.shape}."
        )
    num_pairs = len(queries)
    ids = Ids.from_arrays(num_pairs, query_ids, candidate_ids)
    if num_pairs < 2:
        return scipy.sparse.csr_matrix((num_pairs, num_pairs), dtype=bool)
    codes = np.arange(num_pairs) if ids.candidates is None else ids.candidates
    positives = _Positives(np.arange(num_pairs) if ids.queries is None else ids.queries, codes)
    rng = np.random.default_rng([_validation.check_count(seed, "seed", at_least=0), 1])
    threshold = -math.inf
    if quantile is not None:
        threshold = graphs.similarity_quantile(queries, candidates, quantile, rng, codes)
    # From here on candidate c is the c-th distinct candidate.
    _, first = np.unique(codes, return_index=True)
    if len(first) < num_pairs:
        candidates = tf.gather(candidates, first)
    if index is None:
        search = _exact_search(candidates, block_size)
    else:
        search = _index_search(index, candidates, verbose)
    found = _neighbors(search, queries, positives, num_neighbors, threshold, verbose)
    if len(first) < num_pairs:
        found = _pairs_of(found, codes, rng)
    if ids.queries is not None:
        found = np.where(positives.are_of(found), -1, found)
    return graphs.symmetric_graph(found, max_claims=4 * num_neighbors)


def order_of(graph: scipy.sparse.csr_matrix, seed: int) -> np.ndarray:
    """Returns [N] int64, the order of small bandwidth that `contrastive_order` describes."""
    order = np.random.default_rng(seed).permutation(graph.shape[0])
    if not graph.nnz:
        return order
    shuffled = graph[order][:, order]
    shuffled.sort_indices()
    reordered = csgraph.reverse_cuthill_mckee(shuffled, symmetric_mode=True)
    is_narrower = graphs.bandwidth(shuffled, reordered) <= graphs.bandwidth(shuffled)
    return order[reordered] if is_narrower else order


def check_quantile(quantile: object) -> float | None:
    """Checks a quantile that may be None."""
    if quantile is None:
        return None
    if not (isinstance(quantile, numbers.Real) and 0.0 <= float(quantile) < 1.0):
        raise ValueError(f"`quantile` must lie in [0, 1). Received: {quantile!r}.")
    return float(quantile)


def check_index(index: object) -> TreeIndex | None:
    """Checks an index that may be None."""
    if index is not None and not isinstance(index, TreeIndex):
        raise ValueError(f"`index` must be a `TreeIndex`. Received: {index!r}.")
    return index


def check_embeddings(
    values: np.ndarray | tf.Tensor, name: str, row_numbers: np.ndarray | None = None
) -> tf.Tensor:
    """Checks embeddings and returns them: [N, d] float32.

    Args:
      values: [N, d] float.
      name: the name of the values, for errors.
      row_numbers: [N] int, the numbers of the rows, for errors. If None, they are 0, …, N - 1.
    """
    values = tf.convert_to_tensor(values)
    if values.shape.rank != 2 or not values.dtype.is_floating:
        raise ValueError(
            f"{name} must be floating point of shape [pairs, dim]. Received dtype"
            f" {values.dtype.name}, shape {values.shape}."
        )
    values = tf.cast(values, tf.float32)
    is_finite = np.isfinite(tf.reduce_sum(tf.square(values), axis=1).numpy())
    if not is_finite.all():
        row = int(np.argmin(is_finite))
        number = row if row_numbers is None else int(row_numbers[row])
        raise ValueError(
            f"{name} and their squared lengths must be finite. Received"
            f" {np.sum(~is_finite)} rows that are not, the first of them row {number}:"
            f" {values[row].numpy()}."
        )
    return values


class _Positives:
    """The positives of each pair's query.

    Args:
      queries: [N] int, the query of each pair.
      candidates: [N] int, the candidate of each pair, from 0 to below C.
    """

    def __init__(self, queries: np.ndarray, candidates: np.ndarray):
        self.num_candidates = int(candidates.max()) + 1
        self._queries, self._candidates = queries, candidates
        self._keys = np.unique(queries * self.num_candidates + candidates)
        # The largest number of positives of a query.
        self.most = int(np.bincount(self._keys // self.num_candidates).max())

    def include(self, rows: slice, found: np.ndarray) -> np.ndarray:
        """Returns [B, k] bool, whether candidates [B, k] are positives of the rows' queries.

        The result for a candidate of -1 has no meaning.
        """
        return self._are_known(self._queries[rows, np.newaxis] * self.num_candidates + found)

    def are_of(self, pairs: np.ndarray) -> np.ndarray:
        """Returns [N, k] bool, whether a row's candidate is a positive of the queries of pairs."""
        candidates = self._candidates[:, np.newaxis]
        return self._are_known(self._queries[pairs] * self.num_candidates + candidates)

    def _are_known(self, keys: np.ndarray) -> np.ndarray:
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return self._keys[places] == keys


def _exact_search(candidates: tf.Tensor, block_size: int | None) -> _Search:
    """Makes a search that scores all candidates."""
    compiled = _compiled_search(candidates.shape[1], block_size)
    return lambda queries, k: compiled(queries, candidates, tf.constant(k))


@functools.lru_cache(maxsize=16)
def _compiled_search(
    dim: int, block_size: int | None
) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Compiles `nearest_candidates` once for any number of queries and candidates."""
    embeddings = tf.TensorSpec([None, dim], tf.float32)
    return tf.function(
        lambda queries, candidates, k: graphs.nearest_candidates(
            queries, candidates, k, block_size=block_size
        ),
        input_signature=[embeddings, embeddings, tf.TensorSpec([], tf.int32)],
    )


def _index_search(index: TreeIndex, candidates: tf.Tensor, verbose: int) -> _Search:
    """Fills an index with the candidates and makes a search with it."""
    index.index(candidates, verbose=verbose)
    return index.top_k


def _neighbors(
    search: _Search,
    queries: tf.Tensor,
    positives: _Positives,
    num_neighbors: int,
    threshold: float,
    verbose: int,
) -> np.ndarray:
    """Finds the candidates nearest to each query, without its positives.

    Args:
      search: queries [B, d], k -> scores and indices [B, k] of the C candidates.
      queries: [N, d] float32.
      positives: the `_Positives` of the queries.
      num_neighbors: k.
      threshold: a neighbor must have a higher score.
      verbose: 1 shows a progress bar.

    Returns:
      [N, k] int32 candidates, with -1 for no candidate.
    """
    num_pairs, dim = queries.shape
    # The search finds positives too. Queries with very many positives get fewer neighbors.
    k = num_neighbors + min(positives.most, 4 * num_neighbors)
    k = min(k, positives.num_candidates)
    neighbors = np.full([num_pairs, min(num_neighbors, k)], -1, np.int32)
    step = graphs.queries_at_a_time(positives.num_candidates, dim, k)
    bar = keras.utils.Progbar(num_pairs, unit_name="row") if verbose else None
    for start in range(0, num_pairs, step):
        rows = slice(start, min(start + step, num_pairs))
        scores, found = (values.numpy() for values in search(queries[rows], k))
        is_neighbor = (found >= 0) & (scores > threshold) & ~positives.include(rows, found)
        # Neighbors come first, in the order of their scores.
        best = np.argsort(~is_neighbor, axis=1, kind="stable")[:, :num_neighbors]
        found = np.take_along_axis(np.where(is_neighbor, found, -1), best, axis=1)
        neighbors[rows, : found.shape[1]] = found
        if bar is not None:
            bar.add(len(found))
    return neighbors


def _pairs_of(neighbors: np.ndarray, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Chooses a pair for each neighboring candidate.

    The pairs of each candidate are numbered at random. The neighbors of pair number r of a
    candidate are pairs number r of other candidates, modulo the number of their pairs. Pairs with
    the same number have different candidates. If all candidates are equally frequent, these pairs
    form a graph of their own, and fill batches in which no candidate occurs twice.

    Args:
      neighbors: [N, k] int candidates, with -1 for no candidate.
      codes: [N] int, the candidate of each pair.
      rng: the generator that numbers the pairs.

    Returns:
      [N, k] int pairs, with -1 for no pair.
    """
    shuffled = rng.permutation(len(codes))
    numbers = np.empty(len(codes), np.int64)
    numbers[shuffled] = graphs.num_equals_before(codes[shuffled])
    pairs = np.lexsort([numbers, codes])
    counts = np.bincount(codes)
    starts = np.cumsum(counts) - counts
    found = pairs[starts[neighbors] + numbers[:, np.newaxis] % counts[neighbors]]
    return np.where(neighbors >= 0, found, -1)
