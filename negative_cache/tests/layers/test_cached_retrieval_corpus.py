"""Tests of `CachedRetrieval` with a cache of a corpus: what is written, refreshed and reported."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache._compat import keras
from negative_cache.layers import (
    Cache,
    CachedRetrieval,
    Corrector,
    NystromCorrector,
    TreeIndex,
)
from negative_cache.tests.layers.corpus_cases import (
    CountingTable,
    corpus_of,
    drifted,
    losses_of,
    make_corpus_task,
    set_tower,
    step,
)
from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    INT_ID,
    call,
    make_queries,
    make_table,
    make_task,
)


def fresh_rows(task, table):
    """Which rows of the cache are those of `table` [C, d]."""
    return np.flatnonzero(np.all(np.isclose(task.cache.embeddings, table), axis=1)).tolist()


# The loss.


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_over_the_corpus_but_for_the_positive_itself(training):
    table, queries, ids = make_table(12), make_queries(3), [4, 4, 9]
    task = make_corpus_task(table, reduction="none")
    # The cache is stale, and its row of the positive is left out all the same.
    now = drifted(table)
    set_tower(task, now)
    loss = call(task, queries, ids, now, training=training)
    np.testing.assert_allclose(loss, losses_of(queries, table, now, ids), rtol=1e-5)


def test_candidates_that_are_not_in_the_corpus_have_the_whole_of_it_as_negatives():
    table, queries = make_table(12), make_queries(1)
    task = make_corpus_task(table[:8], tower=None)
    loss = task(
        tf.constant(queries),
        tf.constant(table[10:11]),
        {"id": tf.constant([10], tf.int64)},
        training=False,
    )
    scores = (queries @ table.T)[0].astype(np.float64)
    expected = np.logaddexp.reduce([scores[10], *scores[:8]]) - scores[10]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


# What is written.


def test_positives_and_draws_are_written_to_their_rows():
    table = make_table(12)
    task = make_corpus_task(table)
    set_tower(task, drifted(table))
    # Almost all mass is on candidate 6: it is what is drawn.
    query = 50.0 * table[6:7] / np.linalg.norm(table[6])
    drawn = int(np.argmax(np.where(np.arange(12) == 2, -np.inf, (query @ table.T)[0])))
    step(task, query, [2])
    assert fresh_rows(task, drifted(table)) == sorted([2, drawn])
    assert np.flatnonzero(task.cache.age.numpy() == 0).tolist() == sorted([2, drawn])
    assert task.cache.data["id"].numpy().tolist() == list(range(12))


def test_candidates_of_unknown_ids_are_skipped_and_reported():
    table = make_table(12)
    task = make_corpus_task(table[:8])
    set_tower(task, table[:8] + 1.0)
    features = {"id": tf.constant([1, 10, 11], tf.int64)}
    task(tf.constant(make_queries(2)), tf.constant(table[[1, 10, 11]]), features, training=True)
    assert task.cache.data["id"].numpy().tolist() == list(range(8))
    assert float(task.cached._skipped_rows.result()) == int(task.cache.num_skipped) == 2


def test_without_write_back_only_refreshes_write():
    table = make_table(12)
    task = make_corpus_task(table, write_back=False)
    set_tower(task, drifted(table))
    for _ in range(3):
        step(task, make_queries(2), [4, 99 % 12])
    np.testing.assert_array_equal(task.cache.embeddings, table)
    assert task.cache.age.numpy().tolist() == [3] * 12
    assert int(task.cache.num_skipped) == 0
    task.refresh_cache(verbose=0)
    np.testing.assert_allclose(task.cache.embeddings, drifted(table), rtol=1e-6)


# Refreshes.


@pytest.mark.one_keras
@pytest.mark.parametrize("fraction, per_step", [(0.25, 3), (0.3, 4), (1.0, 12), (0.05, 1)])
def test_the_oldest_rows_are_refreshed_at_each_step(fraction, per_step):
    table = make_table(12)
    task = make_corpus_task(table, write_back=False, refresh_fraction=fraction)
    for turn in range(4):
        now = drifted(table, seed=turn)
        set_tower(task, now)
        step(task, make_queries(1), [0])
        start = turn * per_step
        expected = sorted({row % 12 for row in range(start, start + per_step)})
        assert fresh_rows(task, now) == expected
        assert np.flatnonzero(task.cache.age.numpy() == 0).tolist() == expected


def test_below_half_a_row_one_is_refreshed_every_so_many_steps():
    table = make_table(12)
    task = make_corpus_task(table, write_back=False, refresh_fraction=1 / 36)
    written = []
    for turn in range(9):
        now = drifted(table, seed=turn)
        set_tower(task, now)
        step(task, make_queries(1), [0])
        written.append(fresh_rows(task, now))
    assert written == [[0], [], [], [1], [], [], [2], [], []]


def test_draws_come_to_no_harm_from_refreshes_of_the_same_rows():
    table = make_table(12)
    task = make_corpus_task(table, refresh_fraction=1.0, num_negatives=5)
    set_tower(task, drifted(table))
    step(task, make_queries(3), [3, 3, 5])
    np.testing.assert_allclose(task.cache.embeddings, drifted(table), rtol=1e-6)
    assert not np.any(task.cache.age)


def test_a_cache_that_streams_is_refreshed_too():
    table = make_table(12)
    task = make_task(table, 8, filled_with=[3, 1, 7, 2], refresh_fraction=0.5)
    set_tower(task, drifted(table))
    step(task, make_queries(1), [5])
    # The oldest rows are those never filled, of which there is nothing to encode.
    assert np.sum(task.cache.filled) == 5
    task.refresh_cache(verbose=0)
    ids = task.cache.data["id"].numpy()[task.cache.filled.numpy()]
    assert sorted(ids) == [1, 2, 3, 5, 7]
    np.testing.assert_allclose(
        task.cache.embeddings.numpy()[task.cache.filled.numpy()], drifted(table)[ids], rtol=1e-6
    )


@pytest.mark.parametrize("batch_size", [5, 12, 100])
def test_refreshing_makes_all_rows_fresh(batch_size, capsys):
    table = make_table(12)
    task = make_corpus_task(table)
    step(task, make_queries(2), [0, 1])
    set_tower(task, drifted(table))
    task.refresh_cache(batch_size=batch_size)
    np.testing.assert_allclose(task.cache.embeddings, drifted(table), rtol=1e-6)
    assert not np.any(task.cache.age)
    assert "12/12" in capsys.readouterr().out


def test_filling_encodes_the_corpus_anew():
    table = make_table(12)
    task = make_corpus_task(table, cache={"cache_size": 16})
    set_tower(task, drifted(table))
    task.fill_cache(corpus_of(10), verbose=0)
    np.testing.assert_allclose(task.cache.embeddings[:10], drifted(table)[:10], rtol=1e-6)
    assert int(task.cache.num_filled) == 10
    assert task.cache.rows_of(tf.constant([9, 10], tf.int64)).numpy().tolist() == [9, -1]


@pytest.mark.one_keras
def test_an_index_follows_what_is_refreshed():
    table = make_table(12)
    index = TreeIndex(12, DIM, leaf_size=4, branching=4)
    task = make_corpus_task(table, cache={"index": index}, refresh_fraction=0.25)
    set_tower(task, drifted(table))
    step(task, make_queries(2), [10, 11])
    assert task.index is index
    np.testing.assert_array_equal(index._candidates.embeddings, task.cache.embeddings)
    task.refresh_cache(verbose=0)
    np.testing.assert_allclose(index._candidates.embeddings, drifted(table), rtol=1e-6)


# What is reported.


@pytest.mark.one_keras
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"refresh_fraction": 0.25},
        {"refresh_fraction": 1 / 36},
        {"probe_size": 6, "probe_every": 2},
        {"corrector": lambda: NystromCorrector(5, landmarks="uniform", num_encoded=2)},
        {"corrector": lambda: Corrector(4), "write_back": False},
    ],
    ids=["draws", "refreshes", "rare refreshes", "probes", "landmarks", "network"],
)
def test_every_candidate_that_is_encoded_is_counted(arguments):
    table = make_table(12)
    arguments = {key: value() if callable(value) else value for key, value in arguments.items()}
    tower = CountingTable(table)
    # What the cache encodes before there is a task counts.
    task = make_corpus_task(table, tower=tower, num_negatives=3, **arguments)
    for _ in range(4):
        # The positives, which are not encoded by the layer, are encoded by `step`.
        step(task, make_queries(2), [4, 9])
    assert float(task._encoded.result()) == tower.num_asked
    task.refresh_cache(batch_size=5, verbose=0)
    task.fill_cache(corpus_of(12), verbose=0)
    step(task, make_queries(2), [4, 9])
    assert float(task._encoded.result()) == tower.num_asked


@pytest.mark.parametrize("corrector", [None, lambda: NystromCorrector(12, kernel="linear")])
def test_probes_of_the_whole_cache_are_its_staleness(corrector):
    table = make_table(12)
    corrector = None if corrector is None else corrector()
    task = make_corpus_task(
        table, write_back=False, probe_size=12, probe_every=1, corrector=corrector
    )
    for turn in range(5):
        now = drifted(table, 0.05 * (turn + 1))
        set_tower(task, now)
        if corrector is not None:
            corrected = corrector(task.cache.embeddings, task.cache.age).numpy()
        step(task, make_queries(2), [turn, turn + 5])
    probes = {metric.name: float(metric.result()) for metric in task.cached.probe_metrics}
    names = ["probe_staleness", "probe_corrected_staleness"][: 1 if corrector is None else 2]
    assert list(probes) == names

    def staleness(values):
        return np.mean(np.sum(np.square(values - now), axis=1) / np.sum(np.square(now), axis=1))

    np.testing.assert_allclose(probes["probe_staleness"], staleness(table), rtol=1e-4)
    if corrector is not None:
        # Before the step has taught anything.
        expected = staleness(corrected)
        np.testing.assert_allclose(probes["probe_corrected_staleness"], expected, rtol=1e-3)
        assert expected < 0.8 * staleness(table)


def test_probes_leave_out_what_the_step_before_has_written():
    table = make_table(12)
    task = make_corpus_task(
        table, write_back=False, refresh_fraction=0.25, probe_size=12, probe_every=1
    )
    # Rows 0, 1, 2 were written by the first step.
    step(task, make_queries(1), [0])
    now = drifted(table)
    set_tower(task, now)
    step(task, make_queries(1), [0])
    error = np.sum(np.square(table - now), axis=1) / np.sum(np.square(now), axis=1)
    np.testing.assert_allclose(task.cached.probe_metrics[0].result(), np.mean(error[3:]), rtol=1e-4)


def test_probes_are_taken_every_so_many_steps():
    table = make_table(12)
    task = make_corpus_task(table, write_back=False, probe_size=4, probe_every=3)
    values = []
    for turn in range(7):
        set_tower(task, drifted(table, 0.1 * (turn + 1)))
        step(task, make_queries(1), [0])
        values.append(float(task.cached.probe_metrics[0].result()))
    assert values[0] == values[1] == 0.0
    assert 0.0 < values[2] == values[3] == values[4] < values[5] == values[6]


# Refused.


def refuse(message, **kwargs):
    with pytest.raises(ValueError, match=message):
        make_corpus_task(make_table(12), **kwargs)


@pytest.mark.one_keras
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"refresh_fraction": 1.5}, r"`refresh_fraction` must be in \[0, 1\]. Received: 1.5"),
        ({"refresh_fraction": -0.1}, r"`refresh_fraction` must be in \[0, 1\]"),
        ({"refresh_fraction": float("nan")}, r"`refresh_fraction` must be in \[0, 1\]"),
        ({"refresh_fraction": 0.5, "cache": {"use_lru": False}}, "needs `use_lru=True`"),
        ({"probe_size": 13}, "`probe_size` must be at most .* 13 for 12 rows"),
        ({"probe_size": -1}, "`probe_size` must be an integer >= 0"),
        ({"probe_every": 0}, "`probe_every` must be an integer >= 1"),
        ({"frequency_correction": True}, "no `frequency_correction` with a `cache`"),
        ({"cache_size": 13}, "`cache_size` is decided by the `cache`. Received: 13. Wanted: .* 12"),
        ({"candidate_id_key": "title"}, "`candidate_id_key` is decided by the `cache`.*'title'"),
        ({"embedding_dim": 4}, "`embedding_dim` is decided by the `cache`. Received: 4"),
        (
            {"feature_specs": {"id": tf.io.FixedLenFeature([], tf.int32)}},
            "(?s)`feature_specs` must be those of the `cache`.*int32.*Wanted.*int64",
        ),
        ({"corrector": "corrector"}, "`corrector` must be a `Corrector` or a `NystromCorrector`"),
        (
            {"corrector": lambda: NystromCorrector(13)},
            "no more landmarks than rows .*num_landmarks=13 for 12 rows",
        ),
        ({"corrector": lambda: Corrector(content_key="words")}, "`content_key` .* 'words'"),
        # An id is no content.
        ({"corrector": lambda: Corrector(content_key="id")}, "floating point of shape .* 'id'"),
    ],
)
def test_constructor_refuses(arguments, message):
    corrector = arguments.get("corrector")
    if callable(corrector):
        arguments = {**arguments, "corrector": corrector()}
    refuse(message, **arguments)


def test_a_corrector_for_other_embeddings_is_refused():
    corrector = Corrector(4)
    corrector.build((None, DIM + 1))
    refuse(
        f"for the embeddings of the cache.*dimension {DIM + 1} .*Wanted: {DIM}", corrector=corrector
    )


def test_content_is_refused_with_an_index():
    index = TreeIndex(12, DIM)
    words = np.ones([12, 2], np.float32)
    dataset = tf.data.Dataset.from_tensor_slices({"id": np.arange(12), "words": words}).batch(4)
    tower = CountingTable(make_table(12))
    cache = Cache.from_dataset(dataset, tower, candidate_id_key="id", index=index, verbose=0)
    with pytest.raises(ValueError, match="`content_key` cannot be used with an `index`"):
        CachedRetrieval(tower, cache=cache, corrector=Corrector(content_key="words"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"corrector": Corrector(4)}, "`corrector` needs a cache. Received: cache_size=0"),
        ({"refresh_fraction": 0.5}, "`refresh_fraction` needs a cache"),
        ({"probe_size": 1}, "`probe_size` needs a cache"),
        ({"write_back": False, "cache_size": 6}, "`write_back=False` is for a `cache`"),
    ],
)
def test_what_needs_a_cache_is_refused_without(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_task(make_table(), **{"cache_size": 0, **arguments})


def test_a_task_needs_a_cache_or_what_makes_one():
    with pytest.raises(ValueError, match="needs `feature_specs` and `cache_size`, or a `cache`"):
        CachedRetrieval(keras.layers.Dense(DIM), {"id": INT_ID})
    streaming = make_task(make_table(), filled_with=[1]).cache
    with pytest.raises(ValueError, match="`cache` must be a `Cache` that covers a corpus"):
        CachedRetrieval(keras.layers.Dense(DIM), cache=streaming)


def test_a_cache_is_filled_by_what_is_for_it():
    with pytest.raises(ValueError, match="covers a corpus is filled by `fill_cache`"):
        make_corpus_task(make_table(12)).add_to_cache({"id": tf.constant([1], tf.int64)})
    with pytest.raises(ValueError, match="(?s)`fill_cache` is for a task .* `add_to_cache`"):
        make_task(make_table()).fill_cache(corpus_of(3))
    with pytest.raises(ValueError, match="no cache to refresh"):
        make_task(make_table(), 0).refresh_cache()
    with pytest.raises(ValueError, match="`batch_size` must be an integer >= 1"):
        make_corpus_task(make_table(12)).refresh_cache(batch_size=0)


def test_rows_that_are_not_filled_take_no_turn_at_refreshing():
    table = make_table(9)
    table[4] = np.nan
    task = make_corpus_task(table, cache={"cache_size": 12}, refresh_fraction=1 / 12)
    for _ in range(30):
        step(task, make_queries(1), [0])
    ages = task.cache.age.numpy()[task.cache.filled.numpy()]
    assert len(ages) == 8
    assert np.max(ages) <= 8


def test_a_candidate_that_comes_twice_fills_its_row_once():
    table = make_table(6)
    holed = table.copy()
    holed[3] = np.nan
    task = make_corpus_task(holed)
    set_tower(task, table)
    step(task, make_queries(2), [3, 3])
    assert task.cache.num_filled.numpy() == np.count_nonzero(task.cache.filled) == 6


@pytest.mark.parametrize(
    "kwargs", [{"corrector": Corrector(4)}, {"probe_size": 2}, {"refresh_fraction": 0.5}]
)
def test_ages_of_embeddings_need_lru(kwargs):
    with pytest.raises(ValueError, match="needs `use_lru=True`"):
        make_task(make_table(), 8, use_lru=False, **kwargs)


def test_no_probabilities_with_a_corpus():
    task = make_corpus_task(make_table(6))
    probabilities = {"candidate_sampling_probability": [0.5, 0.1]}
    with pytest.raises(ValueError, match="holds every candidate once"):
        step(task, make_queries(2), [0, 1], **probabilities)


def test_no_tower_of_another_width_than_that_of_the_cache():
    tower = keras.Sequential([keras.layers.Input([3]), keras.layers.Dense(DIM + 1)])
    cache = Cache(
        {
            "candidate": tf.io.FixedLenFeature([], tf.int64),
            "embedding": tf.io.FixedLenFeature([DIM], tf.float32),
        },
        4,
        row_key="candidate",
    )
    with pytest.raises(ValueError, match=f"dimension {DIM}. Received embeddings of {DIM + 1}"):
        CachedRetrieval(tower, cache=cache)


def test_a_batch_may_have_more_rows_than_the_corpus_and_one_candidate_many_times():
    table = make_table(5)
    task = make_corpus_task(table)
    ids = np.array([0, 1, 1, 4, 4, 4, 2, 0])
    for run in (lambda f: f(), lambda f: tf.function(f)()):
        assert np.isfinite(run(lambda: step(task, make_queries(8), ids)))
    assert int(task.cache.num_filled) == 5 and int(task.cache.num_skipped) == 0
    np.testing.assert_allclose(task.cache.embeddings, table, rtol=1e-6)
    features = {"id": tf.constant([3, 3, 3, 3, 3, 3], tf.int64)}
    first = np.arange(6.0)[:, np.newaxis] + np.ones([6, DIM])
    task.cache.update(new_items={**features, "embedding": first})
    np.testing.assert_array_equal(task.cache.embeddings[3], [1.0] * DIM)


def test_metrics_may_be_set_as_those_of_a_retrieval_task_are():
    table = make_table(5)
    task = make_corpus_task(table, metrics=keras.metrics.MeanSquaredError(name="a"))
    assert [metric.name for metric in task.factorized_metrics] == ["a"]
    task.factorized_metrics = keras.metrics.MeanSquaredError(name="b")
    step(task, make_queries(2), np.array([0, 1]))
    (metric,) = task.factorized_metrics
    assert metric.name == "b" and float(metric.result()) > 0.0
    task.factorized_metrics = None
    assert task.factorized_metrics == []
