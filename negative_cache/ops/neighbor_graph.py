"""The graph of hard negatives, by which contrastive batches are ordered.

Pair i is a query with embedding f(x_i) and its positive candidate with embedding g(y_i). Two pairs
are neighbors if one is a hard negative of the other. The similarity matrix f(X) g(Y)ᵀ [N, N] is
never held as a whole: it is computed in blocks, and a few entries of each row are kept. Graphs are
`scipy.sparse.csr_matrix` [N, N] of bool, symmetric, without a diagonal.
"""

import math

import numpy as np
import scipy.sparse
import tensorflow as tf

from negative_cache.ops._block_scorer import INADMISSIBLE, BlockScorer, is_admissible

# Candidates scored at a time; see `_small_blocks` for the reasons to bound it.
_BLOCK_SIZE = 2048
# Candidates per group. At first, only the best of a group is compared with other groups.
_GROUP_SIZE = 16
# Rows and columns of the sample that quantiles are estimated from.
_SAMPLE_SIZE = 1024


def nearest_candidates(
    query_embeddings: tf.Tensor,
    candidate_embeddings: tf.Tensor,
    k: tf.Tensor,
    *,
    block_size: int | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Finds the k largest of each row of f(X) g(Y)ᵀ, exactly.

    The candidates are divided into groups. Each of the k best candidates is in one of the k groups
    with the largest maxima. So only the maximum of each group is kept, and the candidates of the k
    best groups are scored again. Rows of C scores are never sorted.

    Args:
      query_embeddings: [B, d] float.
      candidate_embeddings: [C, d] float.
      k: scalar int32 or int, the number of candidates to find.
      block_size: number of candidates scored at a time; 2,048 if None.

    Returns:
      scores: [B, K] float32 in descending order, with min(k, C) <= K <= k. If K > C, the last
        scores are -inf.
      indices: [B, K] int32; -1 where the score is -inf.
    """
    scorer = BlockScorer(query_embeddings, candidate_embeddings)
    width = math.ceil((block_size or _BLOCK_SIZE) / _GROUP_SIZE)
    block_size = width * _GROUP_SIZE
    num_blocks = -(-scorer.num_candidates // block_size)

    def add_block(block: tf.Tensor, maxima: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
        start = block * block_size
        size = tf.minimum(block_size, scorer.num_candidates - start)
        scores, _ = scorer.score_block(scorer.read_block(start, size), start, size)
        padding = [[0, 0], [0, block_size - size]]
        scores = tf.pad(scores, padding, constant_values=INADMISSIBLE)
        groups = tf.reshape(scores, [-1, _GROUP_SIZE, width])
        return block + 1, maxima.write(block, tf.reduce_max(groups, axis=1))

    _, maxima = tf.while_loop(
        lambda block, _: block < num_blocks,
        add_block,
        (tf.constant(0), tf.TensorArray(tf.float32, num_blocks)),
        parallel_iterations=1,
    )
    # [blocks, B, width] -> [B, groups]
    maxima = tf.reshape(tf.transpose(maxima.stack(), [1, 0, 2]), [-1, num_blocks * width])
    num_groups = tf.minimum(k, num_blocks * width)
    groups = tf.math.top_k(maxima, k=num_groups, sorted=False).indices
    first = groups // width * block_size + groups % width
    rows = first[:, :, tf.newaxis] + tf.range(_GROUP_SIZE) * width
    rows = tf.reshape(rows, [-1, num_groups * _GROUP_SIZE])
    best = tf.math.top_k(scorer.score_rows(rows)[0], k=tf.minimum(k, tf.shape(rows)[1]))
    indices = tf.gather(rows, best.indices, batch_dims=1)
    found = is_admissible(best.values)
    return tf.where(found, best.values, -math.inf), tf.where(found, indices, -1)


def queries_at_a_time(num_candidates: int, dim: int, k: int) -> int:
    """The number of queries with which `nearest_candidates` needs a few hundred megabytes."""
    of_maxima = 2**24 * _GROUP_SIZE // max(num_candidates, 1)
    of_scored_again = 2**25 // max(k * _GROUP_SIZE * dim, 1)
    return max(min(1024, of_maxima, of_scored_again), 16)


def similarity_quantile(
    query_embeddings: tf.Tensor,
    candidate_embeddings: tf.Tensor,
    quantile: float,
    rng: np.random.Generator,
    ids: np.ndarray,
) -> float:
    """Estimates a quantile of the entries of f(X) g(Y)ᵀ from a sample of rows and columns.

    Args:
      query_embeddings: [N, d] float32.
      candidate_embeddings: [N, d] float32.
      quantile: in [0, 1).
      rng: draws the sample.
      ids: [N] int; entries whose row and column have the same id do not count.

    Returns:
      The quantile of up to a million entries; -inf if there are none.
    """
    num_pairs = len(query_embeddings)
    size = min(num_pairs, _SAMPLE_SIZE)
    rows, columns = (rng.choice(num_pairs, size, replace=False) for _ in range(2))
    scores = tf.matmul(
        tf.gather(query_embeddings, rows),
        tf.gather(candidate_embeddings, columns),
        transpose_b=True,
    ).numpy()
    scores = scores[ids[rows][:, np.newaxis] != ids[columns]]
    return float(np.quantile(scores, quantile)) if len(scores) else -math.inf


def symmetric_graph(
    neighbors: np.ndarray, max_claims: int | None = None
) -> scipy.sparse.csr_matrix:
    """The graph with an edge between i and j if one is a neighbor of the other.

    Args:
      neighbors: [N, k] int, the neighbors of each row, the nearest first; -1 for none. A row is
        never its own neighbor.
      max_claims: the largest number of rows that can have the same row as a neighbor. Rows that
        have it earlier in their list of neighbors take precedence. None for no limit.

    Returns:
      [N, N], the graph.
    """
    num_rows, k = neighbors.shape
    # The nearest neighbors of all rows come first, so that their claims take precedence.
    columns, rows = neighbors.T.reshape([-1]), np.tile(np.arange(num_rows), k)
    rows, columns = rows[columns >= 0], columns[columns >= 0]
    if max_claims is not None:
        is_claimed = num_equals_before(columns) < max_claims
        rows, columns = rows[is_claimed], columns[is_claimed]
    ones = np.ones(len(rows), bool)
    graph = scipy.sparse.csr_matrix((ones, (rows, columns)), shape=(num_rows, num_rows))
    return graph.maximum(graph.T).tocsr()


def bandwidth(graph: scipy.sparse.spmatrix, order: np.ndarray | None = None) -> int:
    """The largest distance between two neighbors in an order.

    It is max |π(i) - π(j)| over the edges (i, j), where π(i) is the place of i in the order.

    Args:
      graph: [N, N] sparse.
      order: [N] int, a permutation; 0, …, N - 1 if None.

    Returns:
      The bandwidth; 0 if the graph has no edges.
    """
    edges = graph.tocoo()
    rows, columns = edges.row, edges.col
    if order is not None:
        places = np.empty(len(order), np.int64)
        places[order] = np.arange(len(order))
        rows, columns = places[rows], places[columns]
    return int(np.max(np.abs(rows.astype(np.int64) - columns), initial=0))


def num_equals_before(codes: np.ndarray) -> np.ndarray:
    """[n] int64, the number of equal codes before each code in `codes` [n] int >= 0."""
    counts = np.bincount(codes)
    by_code = np.argsort(codes, kind="stable")
    numbers = np.empty(len(codes), np.int64)
    numbers[by_code] = np.arange(len(codes)) - (np.cumsum(counts) - counts)[codes[by_code]]
    return numbers
