"""Tests of validation batches: one or several positives a query, ids, excluded candidates."""

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from negative_cache.evaluation import evaluate, rows_of
from negative_cache.tests.evaluation.rank_problems import (
    corpus_batches,
    lookup,
    metrics_by_definition,
    padded,
    problems_with_lists,
    ragged,
    ranks_by_definition,
    real_problem,
    sparse,
    validation_batches,
)


@pytest.mark.parametrize("convert", [np.asarray, lambda ids: np.asarray(ids).astype(bytes)])
def test_rows_of(convert):
    corpus = convert([30, 10, 20])
    np.testing.assert_array_equal(rows_of(convert([10, 30, 99, 5]), corpus), [1, 0, -1, -1])
    with pytest.raises(ValueError, match="unique in the corpus. Received twice: .*10"):
        rows_of(convert([10]), convert([10, 30, 10]))


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
        ([[0, 1]], {"candidate_id_key": "id"}, "the name of a single tensor. Received: 'id'"),
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
        ([{"query": [0, 0], "candidate": [0]}], "equally many rows. Received: 2 and 1"),
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
