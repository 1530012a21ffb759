"""Problems that tests of ranks share, and their answers by definition."""

import numpy as np
import tensorflow as tf
from hypothesis import strategies as st


@st.composite
def problems(draw):
    """Queries, a corpus with many ties, and each query's row, out of small integers.

    Inner products of small integers are exact in float32, so that ties are ties.
    """
    dim = draw(st.integers(1, 3))
    num_queries, num_candidates = draw(st.integers(1, 6)), draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    largest = draw(st.integers(0, 3))
    queries = rng.integers(-largest, largest + 1, [num_queries, dim])
    corpus = rng.integers(-largest, largest + 1, [num_candidates, dim])
    rows = rng.integers(0, num_candidates, [num_queries])
    return queries.astype(np.float32), corpus.astype(np.float32), rows


@st.composite
def problems_with_lists(draw):
    """A problem, and for each query the set of its positives and the set of its excluded rows."""
    queries, corpus, _ = draw(problems())
    rows = st.sets(st.integers(0, len(corpus) - 1), max_size=6)
    positives, excluded = (
        draw(st.lists(rows, min_size=len(queries), max_size=len(queries))) for _ in range(2)
    )
    positives[0].add(draw(st.integers(0, len(corpus) - 1)))
    return queries, corpus, positives, excluded


def ranks_by_definition(queries, corpus, positives, excluded):
    """For each query, the ranks of its positives in ascending order of their rows."""
    ranks = []
    for query, own, left_out in zip(queries, positives, excluded):
        scores = corpus @ query
        competing = [row for row in range(len(corpus)) if row in own or row not in left_out]
        higher = [sum(scores[row] > scores[positive] for row in competing) for positive in own]
        ranks.append([higher[i] for i in np.argsort(list(own))])
    return ranks


def metrics_by_definition(ranks, k):
    """Of the queries that have a positive."""
    ranks = [own for own in ranks if own]
    metrics = {"mrr": np.mean([1 / (1 + min(own)) for own in ranks])}
    for cutoff in k:
        found = [[rank < cutoff for rank in own] for own in ranks]
        metrics[f"recall_at_{cutoff}"] = np.mean([np.mean(own) for own in found])
        metrics[f"hit_rate_at_{cutoff}"] = np.mean([any(own) for own in found])
    return metrics


def padded(lists, value=-1):
    """[n, longest + 1] of sets or lists, so that padding is there, and not sorted."""
    width = max(map(len, lists)) + 1
    return np.array([[value] * (width - len(row)) + list(row)[::-1] for row in lists])


def ragged(lists, value=None, dtype=tf.int64):
    return tf.ragged.constant([list(row) for row in lists], dtype=dtype, ragged_rank=1)


def sparse(lists, value=None):
    return ragged(lists).to_sparse()


def ranks_by_sorting(queries, corpus, rows):
    """The first position of the positive's score in each query's descending scores."""
    scores = queries @ corpus.T
    descending = -np.sort(-scores, axis=1)
    own = scores[np.arange(len(rows)), rows]
    return [int(np.flatnonzero(row == score)[0]) for row, score in zip(descending, own)]


def lookup(table):
    """A tower: the rows of a table that features, or their feature `"row"`, name."""

    def network(features):
        rows = features["row"] if isinstance(features, dict) else features
        return tf.gather(table, rows)

    return network


def corpus_batches(size, batch=3, convert=lambda row: row, shuffle=False):
    rows = tf.data.Dataset.range(size)
    rows = rows.shuffle(size, reshuffle_each_iteration=True) if shuffle else rows
    return rows.map(lambda row: {"row": row, "id": convert(row)}).batch(batch)


def validation_batches(parts, batch=2, shuffle=False):
    dataset = tf.data.Dataset.from_tensor_slices(parts)
    size = dataset.cardinality()
    dataset = dataset.shuffle(size, reshuffle_each_iteration=True) if shuffle else dataset
    return dataset.batch(batch)


def real_problem(num_queries=9, num_candidates=40):
    rng = np.random.default_rng(0)
    queries, corpus = rng.normal(size=[num_queries, 3]), rng.normal(size=[num_candidates, 3])
    rows = rng.integers(0, num_candidates, num_queries)
    return queries.astype(np.float32), corpus.astype(np.float32), rows
