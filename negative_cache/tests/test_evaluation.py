"""Tests of exact ranks against sorting in NumPy."""

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from negative_cache import evaluation
from negative_cache.evaluation import Encoder, positive_ranks, retrieval_metrics, rows_of


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


def ranks_by_sorting(queries, corpus, rows):
    """The first position of the positive's score in each query's descending scores."""
    scores = queries @ corpus.T
    descending = -np.sort(-scores, axis=1)
    own = scores[np.arange(len(rows)), rows]
    return [int(np.flatnonzero(row == score)[0]) for row, score in zip(descending, own)]


@hypothesis.given(problems(), st.sampled_from([1, 3, 7, 8192]), st.booleans())
def test_ranks_are_those_of_sorting(problem, block_size, with_rows):
    queries, corpus, rows = problem
    ranks = positive_ranks(
        queries,
        corpus[rows],
        corpus,
        positive_rows=rows if with_rows else None,
        block_size=block_size,
    )
    assert ranks.dtype == np.int64
    np.testing.assert_array_equal(ranks, ranks_by_sorting(queries, corpus, rows))


@pytest.mark.parametrize("block_size", [100, 999, 1000, 4096])
def test_ranks_of_real_embeddings_in_several_chunks_of_queries(block_size):
    rng = np.random.default_rng(0)
    num_queries = 4096 + 5
    queries = rng.normal(size=[num_queries, 8]).astype(np.float32)
    corpus = rng.normal(size=[1000, 8]).astype(np.float32)
    rows = rng.integers(0, 1000, num_queries)
    scores = queries.astype(np.float64) @ corpus.T.astype(np.float64)
    own = scores[np.arange(num_queries), rows]
    expected = np.sum(scores > own[:, None], axis=1)
    # Scores of 4 million pairs are close enough to a positive's, in a few cases, that float32
    # rounding decides.
    for positive_rows in (rows, None):
        ranks = positive_ranks(
            queries, corpus[rows], corpus, positive_rows=positive_rows, block_size=block_size
        )
        assert np.max(np.abs(ranks - expected)) <= 1
        assert np.mean(ranks != expected) < 0.01


@pytest.mark.parametrize("positive_rows", [None, [0, 1]])
def test_a_model_of_nan_has_the_worst_ranks(positive_rows):
    queries, corpus = np.ones([2, 3], np.float32), np.full([5, 3], np.nan, np.float32)
    ranks = positive_ranks(queries, corpus[:2], corpus, positive_rows=positive_rows)
    # All five candidates are before the positive, or the four that are not the positive itself.
    assert ranks.tolist() == ([5, 5] if positive_rows is None else [4, 4])


def test_a_positive_never_beats_itself_although_rounding_says_so():
    # The score of the positive is given another rounding by hand: a slightly smaller embedding.
    queries, corpus = np.ones([1, 3], np.float32), np.ones([5, 3], np.float32)
    corpus[[0, 4]] = 0.0
    positives = np.full([1, 3], 1.0 - 1e-5, np.float32)
    # Rows 1, 2 and 3 score higher; row 2 is the positive itself, and does not count.
    for block_size in (1, 2, 5):
        kwargs = {"block_size": block_size}
        ranks = positive_ranks(queries, positives, corpus, positive_rows=[2], **kwargs)
        assert ranks.tolist() == [2]
        ranks = positive_ranks(queries, positives, corpus, positive_rows=[-1], **kwargs)
        assert ranks.tolist() == [3]


def test_rows_unknown_within_rounding_is_a_tie():
    queries, corpus = np.ones([1, 3], np.float32), np.ones([1, 3], np.float32)
    positives = np.full([1, 3], 1.0 - 1e-7, np.float32)
    assert positive_ranks(queries, positives, corpus).tolist() == [0]


def test_no_queries_have_no_ranks():
    assert positive_ranks(np.zeros([0, 2]), np.zeros([0, 2]), np.zeros([3, 2])).shape == (0,)


def test_does_not_retrace_for_every_call():
    traces = []
    original = evaluation._count_higher.python_function

    def counted(*args):
        traces.append(None)
        return original(*args)

    function = tf.function(counted, reduce_retracing=True)
    evaluation._count_higher, kept = function, evaluation._count_higher
    try:
        for size in (10, 11, 12, 13, 50):
            corpus = np.zeros([size * 3, 4], np.float32)
            positive_ranks(corpus[:size], corpus[:size], corpus)
    finally:
        evaluation._count_higher = kept
    # Once for the first shape, then once for every shape.
    assert len(traces) == 2


@pytest.mark.parametrize(
    "shapes", [([2, 3], [3, 3], [5, 3]), ([2, 3], [2, 3], [5, 4]), ([2], [2], [5])]
)
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="must have shape .* Received shapes"):
        positive_ranks(*[np.zeros(shape, np.float32) for shape in shapes])


def test_metrics_of_ranks_by_hand():
    metrics = retrieval_metrics(np.array([0, 1, 9, 10]), k=(1, 10))
    # Ranks below 1: one of four; below 10: three of four. MRR: (1 + 1/2 + 1/10 + 1/11) / 4.
    assert metrics == pytest.approx(
        {"recall_at_1": 1 / 4, "recall_at_10": 3 / 4, "mrr": (1 + 1 / 2 + 1 / 10 + 1 / 11) / 4}
    )


@pytest.mark.parametrize("convert", [np.asarray, lambda ids: np.asarray(ids).astype(bytes)])
def test_rows_of(convert):
    corpus = convert([30, 10, 20])
    np.testing.assert_array_equal(rows_of(convert([10, 30, 99, 5]), corpus), [1, 0, -1, -1])
    with pytest.raises(ValueError, match="unique in the corpus. Received twice: .*10"):
        rows_of(convert([10]), convert([10, 30, 10]))


def test_encoder_embeds_in_inference_mode_without_retracing():
    traces = []

    def network(features, training):
        traces.append(training)
        return tf.cast(features, tf.float16)[:, tf.newaxis] * [[1.0, 2.0]]

    encoder, seen = Encoder(network), []
    dataset = tf.data.Dataset.range(10).batch(4)
    embeddings = encoder(dataset, seen.append)
    assert embeddings.dtype == np.float32
    np.testing.assert_array_equal(embeddings, np.arange(10)[:, None] * [[1, 2]])
    assert seen == [1, 2, 3]
    encoder(dataset)
    # One trace for full batches, one for any.
    assert traces == [False, False]


def test_encoder_refuses_an_empty_dataset():
    with pytest.raises(ValueError, match="dataset to embed is empty"):
        Encoder(lambda features, training: features)([])
