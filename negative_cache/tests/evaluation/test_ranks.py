"""Tests of exact ranks against sorting in NumPy."""

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from negative_cache.evaluation import evaluate, positive_ranks, retrieval_metrics
from negative_cache.evaluation import ranks as ranks_module
from negative_cache.tests.evaluation.rank_problems import (
    corpus_batches,
    lookup,
    padded,
    problems,
    problems_with_lists,
    ragged,
    ranks_by_definition,
    ranks_by_sorting,
    real_problem,
    sparse,
    validation_batches,
)

pytestmark = pytest.mark.one_keras


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


@hypothesis.given(
    problems_with_lists(),
    st.sampled_from([1, 3, None]),
    st.sampled_from([1, 2, 1024]),
    st.sampled_from([padded, ragged, sparse]),
)
def test_ranks_with_several_positives_and_excluded_rows(problem, block_size, chunk, listed):
    queries, corpus, positives, excluded = problem
    owners = np.concatenate([[query] * len(own) for query, own in enumerate(positives)])
    rows = np.concatenate([sorted(own) for own in positives]).astype(np.int64)
    order = np.random.default_rng(0).permutation(len(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks_module, "_CHUNK", chunk)
        ranks = positive_ranks(
            queries,
            corpus[rows[order]],
            corpus,
            positive_rows=rows[order],
            positive_queries=owners[order].astype(np.int32),
            excluded_rows=listed(excluded),
            block_size=block_size,
        )
    expected = np.concatenate(ranks_by_definition(queries, corpus, positives, excluded))
    np.testing.assert_array_equal(ranks, expected[order])


def test_excluded_candidates_are_not_among_the_worst_ranks_of_nan():
    queries, corpus = np.ones([2, 3], np.float32), np.full([5, 3], np.nan, np.float32)
    ranks = positive_ranks(
        queries, corpus[:2], corpus, positive_rows=[0, 1], excluded_rows=[[1, 2, 2], [1, -1, -1]]
    )
    # Of five: not the positive itself, and for the first query not 1 and 2. The second query's
    # positive is listed, which changes nothing.
    assert ranks.tolist() == [2, 4]


def test_excluded_where_the_positives_rows_are_not_known():
    queries, corpus = np.ones([1, 1], np.float32), np.float32([[4], [3], [2], [1]])
    ranks = positive_ranks(queries, corpus[2:3], corpus, excluded_rows=[[0, 3]])
    # 4 and 3 are higher than 2, and 4 is left out.
    assert ranks.tolist() == [1]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"positive_rows": [0, 5]}, "`positive_rows` must lie between -1 and 4. .* 0 and 5"),
        ({"positive_rows": [0]}, r"`positive_rows` must be integers of shape \[2\]"),
        ({"positive_rows": [0.0, 1.0]}, "`positive_rows` must be integers .* dtype float32"),
        ({"positive_queries": [0, -1]}, "`positive_queries` must lie between 0 and 1"),
        ({"excluded_rows": [[5], [0]]}, "`excluded_rows` must lie between -1 and 4"),
        ({"excluded_rows": [[0]]}, r"`excluded_rows` must have shape \[2, None\].*\(1, 1\)"),
        ({"excluded_rows": [0, 1]}, r"`excluded_rows` must have shape .*\(2,\)"),
    ],
)
def test_rows_that_do_not_fit_are_refused(kwargs, message):
    queries, corpus = np.ones([2, 3], np.float32), np.ones([5, 3], np.float32)
    with pytest.raises(ValueError, match=message):
        positive_ranks(queries, corpus[:2], corpus, **kwargs)


def test_no_queries_have_no_ranks():
    assert positive_ranks(np.zeros([0, 2]), np.zeros([0, 2]), np.zeros([3, 2])).shape == (0,)


def test_does_not_retrace_for_every_call():
    traces = []
    original = ranks_module._count_higher.python_function

    def counted(*args):
        traces.append(None)
        return original(*args)

    function = tf.function(counted, reduce_retracing=True)
    ranks_module._count_higher, kept = function, ranks_module._count_higher
    try:
        for size in (10, 11, 12, 13, 50):
            corpus = np.zeros([size * 3, 4], np.float32)
            positive_ranks(corpus[:size], corpus[:size], corpus)
    finally:
        ranks_module._count_higher = kept
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


def test_metrics_of_several_ranks_a_query_by_hand():
    metrics = retrieval_metrics(
        np.array([0, 4, 11, 2]), k=(1, 3, 10), queries=np.array([7, 2, 7, 7])
    )
    # Query 7 has ranks 0, 11 and 2, query 2 has rank 4.
    assert metrics == pytest.approx(
        {
            "recall_at_1": (1 / 3 + 0) / 2,
            "recall_at_3": (2 / 3 + 0) / 2,
            "recall_at_10": (2 / 3 + 1) / 2,
            "hit_rate_at_1": 1 / 2,
            "hit_rate_at_3": 1 / 2,
            "hit_rate_at_10": 1,
            "mrr": (1 / 1 + 1 / 5) / 2,
        }
    )


@pytest.mark.parametrize("candidate_id_key", [None, "id"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_evaluates_one_positive_a_query(candidate_id_key, shuffle):
    queries, corpus, rows = real_problem()
    positives = {"row": rows, "id": rows}
    metrics = evaluate(
        (lookup(queries), lookup(corpus)),
        corpus_batches(len(corpus), shuffle=shuffle),
        validation_batches({"query": np.arange(9), "candidate": positives}, shuffle=shuffle),
        k=(1, 4),
        candidate_id_key=candidate_id_key,
    )
    ranks = np.array(ranks_by_sorting(queries, corpus, rows))
    expected = {
        "recall_at_1": np.mean(ranks < 1),
        "recall_at_4": np.mean(ranks < 4),
        "mrr": np.mean(1 / (1 + ranks)),
    }
    assert metrics == pytest.approx(expected)


def test_copies_of_a_positive_under_other_ids_are_ties_whatever_rounding_says():
    # Half of the candidates are copies: each query's positive is the best, and so are its copies.
    rng = np.random.default_rng(0)
    table = np.repeat(rng.normal(size=[200, 300]), 4, axis=0).astype(np.float32)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    ids = np.arange(0, 800, 4)
    validation = [{"query": ids, "candidate": {"id": ids}}]
    candidates = [{"id": np.arange(start, start + 37)} for start in range(0, 740, 37)]
    candidates.append({"id": np.arange(740, 800)})
    tower = lookup(table)
    model = (tower, lambda features: tower(features["id"]))
    for key in ("id", None):
        metrics = evaluate(model, candidates, validation, k=[1], candidate_id_key=key)
        assert metrics == {"recall_at_1": 1.0, "mrr": 1.0}


@pytest.mark.parametrize("model", [object(), (tf.identity,), (tf.identity, None)])
def test_what_has_not_two_towers_is_refused(model):
    with pytest.raises(ValueError, match="`query_network` and `candidate_network`, or be a pair"):
        evaluate(model, [[0]], [{"query": [0], "candidate": [0]}])


def test_candidates_that_change_between_passes_are_refused():
    class Changing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield {"row": [0, 1], "id": [0, self.passes]}

    tower = lookup(np.zeros([2, 2], np.float32))
    with pytest.raises(
        ValueError, match="same candidates in every pass, .* 2 and then 2, in which 1 .* missing"
    ):
        evaluate(
            (tower, tower), Changing(), [{"query": [0], "positives": [[0]]}], candidate_id_key="id"
        )


def test_evaluates_any_object_with_two_towers():
    queries, corpus, rows = real_problem()

    class Model:
        query_network, candidate_network = (
            staticmethod(lookup(queries)),
            staticmethod(lookup(corpus)),
        )

    metrics = evaluate(
        Model(), [np.arange(len(corpus))], [{"query": np.arange(9), "candidate": rows}], k=[3]
    )
    ranks = np.array(ranks_by_sorting(queries, corpus, rows))
    assert metrics == pytest.approx(
        {"recall_at_3": np.mean(ranks < 3), "mrr": np.mean(1 / (1 + ranks))}
    )
