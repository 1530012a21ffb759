"""Tests of exact ranks against sorting in NumPy."""

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from negative_cache import evaluation
from negative_cache.evaluation import evaluate, positive_ranks, retrieval_metrics, rows_of


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
        patch.setattr(evaluation, "_CHUNK", chunk)
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


@pytest.mark.parametrize("convert", [np.asarray, lambda ids: np.asarray(ids).astype(bytes)])
def test_rows_of(convert):
    corpus = convert([30, 10, 20])
    np.testing.assert_array_equal(rows_of(convert([10, 30, 99, 5]), corpus), [1, 0, -1, -1])
    with pytest.raises(ValueError, match="unique in the corpus. Received twice: .*10"):
        rows_of(convert([10]), convert([10, 30, 10]))


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


@hypothesis.given(problems_with_lists(), st.sampled_from([padded, ragged, sparse]), st.booleans())
@hypothesis.settings(max_examples=10)
def test_evaluates_lists_of_ids_by_definition(problem, listed, shuffle):
    queries, corpus, positives, excluded = problem
    parts = {"query": np.arange(len(queries)), "positives": listed([[*own] for own in positives])}
    if any(excluded):
        parts["excluded"] = listed(excluded)
    metrics = evaluate(
        (lookup(queries), lookup(corpus)),
        corpus_batches(len(corpus), shuffle=shuffle),
        validation_batches(parts, shuffle=shuffle),
        k=(1, 4),
        candidate_id_key="id",
    )
    ranks = ranks_by_definition(queries, corpus, positives, excluded)
    assert metrics == pytest.approx(metrics_by_definition(ranks, (1, 4)))


def real_problem(num_queries=9, num_candidates=40):
    rng = np.random.default_rng(0)
    queries, corpus = rng.normal(size=[num_queries, 3]), rng.normal(size=[num_candidates, 3])
    rows = rng.integers(0, num_candidates, num_queries)
    return queries.astype(np.float32), corpus.astype(np.float32), rows


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


def test_one_listed_positive_is_as_one_candidate_and_its_hit_rate_is_its_recall():
    queries, corpus, rows = real_problem()
    both = {"query": np.arange(9), "candidate": {"row": rows, "id": rows}}
    listed = {"query": np.arange(9), "positives": rows[:, np.newaxis]}
    expected, metrics = (
        evaluate(
            (lookup(queries), lookup(corpus)),
            corpus_batches(len(corpus)),
            validation_batches(parts),
            candidate_id_key="id",
        )
        for parts in (both, listed)
    )
    for cutoff in (1, 10, 100):
        expected[f"hit_rate_at_{cutoff}"] = expected[f"recall_at_{cutoff}"]
    assert metrics == expected


def test_candidate_and_positives_together_are_their_union():
    queries, corpus, rows = real_problem()
    others = (rows + 1) % len(corpus)
    excluded = [{0, 1, 2, int(row)} for row in rows]
    parts = {
        "query": np.arange(9),
        "candidate": {"row": rows, "id": rows},
        # Each query's candidate again, and one more.
        "positives": np.stack([rows, others], axis=1),
        "excluded": padded(excluded),
    }
    metrics = evaluate(
        (lookup(queries), lookup(corpus)),
        corpus_batches(len(corpus)),
        validation_batches(parts),
        k=[5],
        candidate_id_key="id",
    )
    positives = [{int(row), int(other)} for row, other in zip(rows, others)]
    ranks = ranks_by_definition(queries, corpus, positives, excluded)
    assert metrics == pytest.approx(metrics_by_definition(ranks, [5]))


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


def test_excluded_ids_that_are_not_in_the_corpus_change_nothing():
    queries, corpus, rows = real_problem()
    model = (lookup(queries), lookup(corpus))
    candidates = tf.data.Dataset.range(40).batch(7)
    parts = {"query": np.arange(9), "positives": rows[:, np.newaxis]}
    expected = evaluate(model, candidates, [parts])
    excluded = np.full([9, 2], 70)
    assert evaluate(model, candidates, [{**parts, "excluded": excluded}]) == expected
    # Beside one that is.
    excluded[:, 0] = np.argmax(queries @ corpus.T, axis=1)
    assert evaluate(model, candidates, [{**parts, "excluded": excluded}])["mrr"] > expected["mrr"]


def test_the_one_feature_of_a_candidate_has_the_name_that_tasks_give_it():
    queries, corpus, rows = real_problem()
    model = (lookup(queries), lookup(corpus))
    candidates = tf.data.Dataset.range(40).batch(7)
    parts = {"query": np.arange(9), "positives": rows[:, np.newaxis]}
    named = evaluate(model, candidates, [parts], candidate_id_key="candidate")
    assert named == evaluate(model, candidates, [parts])


def test_a_candidate_may_be_outside_of_the_corpus():
    queries, corpus = np.ones([1, 1], np.float32), np.float32([[4], [3], [2], [1]])
    outside = np.float32([[2.5]])

    def tower(features):
        table = tf.concat([corpus, outside], axis=0)
        return tf.gather(table, features["row"])

    parts = {
        "query": [0],
        "candidate": {"row": [4], "id": [4]},
        "positives": [[3, 3, -1]],
        # 99 is not in the corpus, and excluding it changes nothing.
        "excluded": [[0, 99, -1, 0]],
    }
    metrics = evaluate(
        (lookup(queries), tower),
        corpus_batches(4),
        validation_batches(parts),
        k=(2, 3),
        candidate_id_key="id",
    )
    # Scores 3, 2, 1 compete. 2.5 is below 3: rank 1. The positive 1 is below 3 and 2: rank 2; the
    # candidate outside of the corpus does not compete.
    expected = {"recall_at_2": 0.5, "recall_at_3": 1, "hit_rate_at_2": 1, "hit_rate_at_3": 1}
    assert metrics == {**expected, "mrr": 1 / 2}


@pytest.mark.parametrize("form", ["padded", "ragged", "numpy"])
def test_string_ids_and_candidates_that_are_their_ids(form):
    queries, corpus, rows = real_problem()
    names = [f"title {row}" for row in range(len(corpus))]
    positives, excluded = [{int(row)} for row in rows], [{0, 1, 2}] * len(rows)
    lists = [[[names[row] for row in own] for own in sets] for sets in (positives, excluded)]
    if form == "ragged":
        lists = [ragged(values, dtype=tf.string) for values in lists]
    else:
        lists = [padded(values, "") for values in lists]
    parts = {"query": np.arange(9), "positives": lists[0], "excluded": lists[1]}
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(names, np.arange(len(names))), -1
    )
    metrics = evaluate(
        (lookup(queries), lambda titles: tf.gather(corpus, table.lookup(titles))),
        tf.data.Dataset.from_tensor_slices(names).batch(7),
        [parts] if form == "numpy" else validation_batches(parts),
        k=[5],
    )
    ranks = ranks_by_definition(queries, corpus, positives, excluded)
    assert metrics == pytest.approx(metrics_by_definition(ranks, [5]))


def never(features):
    raise AssertionError("The corpus is encoded.")


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"query": [0]}, r"\"candidate\" or \"positives\". Received: \['query'\]"),
        ({"positives": [[0]]}, r"Received: \['positives'\]"),
        ({"query": [0], "positives": [[0, 9, 8]]}, r"'positives' must be .* \[9, 8\] \(2 of 3"),
        ({"query": [0], "positives": [0]}, r"`positives` must have shape \[1, None\].*\(1,\)"),
        ({"query": [0], "positives": [[b"a"]]}, "must be of one kind. .*object and int64"),
        ({"query": [0], "positives": [[-1]]}, "No query of the validation dataset has a positive"),
        (
            {"query": [0], "positives": ragged([[0]])[:, tf.newaxis]},
            r"`positives` must have shape \[1, None\]",
        ),
    ],
)
def test_validation_that_does_not_fit_is_refused_before_the_corpus_is_encoded(parts, message):
    towers = (lookup(np.zeros([1, 2], np.float32)), never)
    with pytest.raises(ValueError, match=message):
        evaluate(towers, corpus_batches(5), [parts], candidate_id_key="id")


@pytest.mark.parametrize(
    "candidates, kwargs, message",
    [
        ([{"id": [0, 1, 0]}], {"candidate_id_key": "id"}, "unique in the corpus. Received twice"),
        ([{"id": [0, -1]}], {"candidate_id_key": "id"}, "'positives' is padded with -1, but"),
        ([{"id": [0, 1]}], {"candidate_id_key": "x"}, r"candidate, \['id'\]. Received: 'x'"),
        ([{"id": [0, 1]}], {}, r"candidate, \['id'\]. Received: None"),
        ([[0, 1]], {"candidate_id_key": "id"}, "as a single tensor is called. Received: 'id'"),
        ([{"id": [[0], [1]]}], {"candidate_id_key": "id"}, r"ids must have shape \[n\].*\(2, 1\)"),
        ([], {"candidate_id_key": "id"}, "dataset to embed is empty: `candidates`"),
    ],
)
def test_candidates_that_do_not_fit_are_refused_before_they_are_encoded(
    candidates, kwargs, message
):
    towers = (lookup(np.zeros([1, 2], np.float32)), never)
    with pytest.raises(ValueError, match=message):
        evaluate(towers, candidates, [{"query": [0], "positives": [[0]]}], **kwargs)


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "validation dataset to embed is empty"),
        ([(1, 2)], "must be a dictionary .* Received: tuple"),
        ([{"query": [0, 0], "candidate": [0]}], "as many rows. Received: 2 and 1"),
        (
            [{"query": [0], "candidate": [0]}, {"query": [0], "positives": [[0]]}],
            r"same parts. Received \['positives', 'query'\] after \['candidate', 'query'\]",
        ),
    ],
)
def test_validation_batches_that_do_not_fit(batches, message):
    tower = lookup(np.zeros([1, 2], np.float32))
    with pytest.raises(ValueError, match=message):
        evaluate((tower, tower), [[0]], batches)


@pytest.mark.parametrize("model", [object(), (tf.identity,), (tf.identity, None)])
def test_what_has_not_two_towers_is_refused(model):
    with pytest.raises(ValueError, match="`query_network` and `candidate_network`, or be the pair"):
        evaluate(model, [[0]], [{"query": [0], "candidate": [0]}])


def test_candidates_that_change_between_passes_are_refused():
    class Changing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield {"row": [0, 1], "id": [0, self.passes]}

    tower = lookup(np.zeros([2, 2], np.float32))
    with pytest.raises(
        ValueError, match="same candidates at every pass. .* 2 and then 2, of which 1"
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
