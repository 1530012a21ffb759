"""Tests of what `Retrieval` and its sources of negatives refuse, and of what they put up with."""

import functools
import warnings

import numpy as np
import pytest
import tensorflow as tf

import negative_cache as nc
from negative_cache import (
    CacheSpec,
    Contribution,
    Explicit,
    FromCache,
    FromCorpus,
    InBatch,
    Negatives,
    Retrieval,
)
from negative_cache.layers import Cache
from negative_cache.tests.layers.corpus_cases import corpus_of
from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    INT_ID,
    STRING_ID,
    Table,
    call,
    make_queries,
)
from negative_cache.tests.layers.source_cases import SIZE, SPECS, TABLE, corpus, stream


def losses_of(task, queries, ids, **kwargs):
    return call(task, queries, ids, TABLE, training=False, **kwargs).numpy()


CORPUS = Cache.from_dataset(corpus_of(SIZE), Table(TABLE), candidate_id_key="id", verbose=0)
INDEXED = CacheSpec(SPECS, 6, index=nc.TreeIndex(6, DIM))
CORRECTOR = nc.Corrector(hidden_units=4)


def _task(*sources, **kwargs):
    return Retrieval(Table(TABLE), list(sources), **kwargs)


@pytest.mark.parametrize(
    ["make", "message"],
    [
        (lambda: _task(), r"must be a list of sources of negatives.*Received: \[\]"),
        (lambda: Retrieval(Table(TABLE), InBatch()), "must be a list of sources of negatives"),
        (lambda: _task("batch"), "must be a list of sources of negatives"),
        (
            lambda: _task(stream(name="one"), stream(name="one")),
            r"must have different names.*one_fill.*one_staleness",
        ),
        (lambda: _task(InBatch(num_hard=0)), "`num_hard` must be an integer >= 1. Received: 0"),
        (lambda: CacheSpec(SPECS, 0), "`cache_size` must be an integer >= 1. Received: 0"),
        (lambda: CacheSpec(SPECS, 4, index="tree"), "`index` must be a `TreeIndex`"),
        (lambda: FromCache("cache"), "must be a `CacheSpec`, or a `Cache` without a `row_key`"),
        (lambda: FromCache(corpus(Table(TABLE)).cache), "`FromCorpus` takes one with it"),
        (lambda: FromCorpus(CacheSpec(SPECS, 4)), "must be a `Cache` that covers a corpus"),
        (lambda: stream(num_negatives=0), "`num_negatives` must be an integer >= 1"),
        (lambda: stream(refresh_fraction=2.0), r"must be in \[0, 1\]. Received: 2.0"),
        (lambda: stream(candidate_network=3), "must be a layer or a function. Received: 3"),
        (
            lambda: _task(stream(), remove_accidental_hits=True),
            "`remove_accidental_hits` needs a `candidate_id_key`",
        ),
        (
            lambda: _task(stream(), candidate_id_key="title"),
            "`candidate_id_key` must be one of the features",
        ),
        (
            lambda: _task(corpus(Table(TABLE)), candidate_id_key="title"),
            "must be that of its corpus. Received: 'title'. Wanted: 'id'",
        ),
        (
            lambda: _task(corpus(Table(TABLE)), candidate_id_key="id", frequency_correction=True),
            "no `frequency_correction` with a `cache` of a corpus",
        ),
        (
            lambda: _task(stream(), candidate_id_key="id", frequency_correction=True),
            "with `use_lru=False` only",
        ),
    ],
)
def test_refuses_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ["make", "what"],
    [
        (lambda: [stream()] * 2, "source"),
        (lambda: [FromCorpus(CORPUS, name=name) for name in "ab"], "cache"),
        (lambda: [FromCache(INDEXED, name=name) for name in "ab"], "index"),
        (lambda: [stream(corrector=CORRECTOR, name=name) for name in "ab"], "corrector"),
    ],
)
def test_what_a_step_changes_belongs_to_one_source(make, what):
    with pytest.raises(ValueError, match=f"Received one {what} twice"):
        _task(*make(), candidate_id_key="id")


def test_sources_can_be_used_again_if_their_task_could_not_be_made():
    tower = Table(TABLE)
    sources = [stream(), corpus(tower)]
    with pytest.raises(ValueError, match="`candidate_id_key` must be one of the features"):
        Retrieval(tower, sources, candidate_id_key="title")
    # The stream is bound before the corpus refuses.
    with pytest.raises(ValueError, match="must be that of its corpus"):
        Retrieval(tower, sources, name="first")
    task = Retrieval(tower, sources, candidate_id_key="id")
    assert all(source.get_task() is task for source in sources)
    # Nothing is logged of the tasks that could not be made.
    names = [metric.name for source in sources for metric in source.metrics]
    assert sorted(names) == sorted(
        {metric.name for metric in task.training_metrics} - {"candidates_encoded"}
    )


def test_a_corpus_of_other_things_is_not_taken_for_the_batchs():
    ids = tf.constant([f"{i}" for i in range(SIZE)])
    others = tf.data.Dataset.from_tensor_slices({"id": ids}).batch(5)

    def embed(features):
        return tf.gather(TABLE, tf.strings.to_number(features["id"], tf.int32))

    cache = Cache.from_dataset(others, embed, candidate_id_key="id", verbose=0)
    task = _task(FromCorpus(cache, candidate_network=embed), candidate_id_key="id")
    with pytest.raises(ValueError, match="where it is string, and must not be something else"):
        losses_of(task, make_queries(2), [0, 1])


def test_ids_of_a_sources_own_candidates_are_of_the_kind_of_the_candidates():
    class Listed(Negatives):
        def logits(self, batch, training):
            listed = tf.zeros([2, 1, DIM])
            return Contribution(batch.own_logits(listed, ids=tf.constant([["a"], ["b"]])))

    task = _task(Listed(), candidate_id_key="id", remove_accidental_hits=True)
    with pytest.raises(ValueError, match="must be of the kind of the candidates' ids.*string"):
        losses_of(task, make_queries(2), [0, 1])


def test_logits_of_another_batch_are_refused():
    class Broadcast(Negatives):
        def logits(self, batch, training):
            return Contribution(tf.zeros([1, 3]))

    with pytest.raises(ValueError, match=r"for 2 queries. Received shape: \(1, 3\)"):
        losses_of(_task(Broadcast()), make_queries(2), [0, 1])


def test_sources_are_layers_that_are_not_called():
    with pytest.raises(TypeError, match="A `InBatch` is not called"):
        InBatch()(tf.zeros([2, 2]))


def test_a_class_named_by_letters_has_no_name_of_its_own():
    class ANCENegatives(FromCache):
        pass

    for _ in range(2):
        task = _task(ANCENegatives(CacheSpec(SPECS, 4)))
        assert "fill" in [metric.name for metric in task.training_metrics]


def test_xla_is_told_of_ids_that_are_strings():
    task = Retrieval(lambda features: tf.zeros([2, DIM]), [InBatch()], candidate_id_key="title")

    @tf.function(jit_compile=True)
    def loss(queries):
        return task(queries, queries, {"title": tf.constant(["a", "b"])})

    with pytest.raises(ValueError, match="XLA knows no strings, which the ids 'title' are"):
        loss(tf.ones([2, DIM]))


def test_a_source_takes_features_as_its_tower_does():
    source = FromCache(CacheSpec(INT_ID, 4), seed=1)
    task = Retrieval(lambda ids: tf.gather(TABLE, ids), [source])
    # The dimension is not known before.
    with pytest.warns(UserWarning, match="with `use_lru=False` only"):
        source.add(tf.constant([3, 4], tf.int64), [0.1, 0.2])
    assert int(source.cache.num_filled) == 2
    queries = make_queries(2)
    assert float(task(queries, TABLE[:2], np.array([0, 1]), training=False)) > 0.0


def test_a_source_belongs_to_one_task():
    source = stream()
    with pytest.raises(ValueError, match="is not one of the `negatives` of a task yet"):
        source.get_task()
    _task(source)
    with pytest.raises(ValueError, match="belongs to one task: make another one"):
        _task(source)


def test_what_no_source_takes_is_refused():
    task, queries = _task(InBatch()), make_queries(2)
    with pytest.raises(ValueError, match=r"need `Explicit\(\)` among the `negatives`"):
        losses_of(task, queries, [0, 1], negative_embeddings=tf.zeros([2, 1, DIM]))
    with pytest.raises(ValueError, match="nothing to tell a positive from"):
        losses_of(_task(Explicit()), queries, [0, 1])
    with pytest.raises(ValueError, match="`candidate_features` must have exactly the keys"):
        _task(stream())(queries, TABLE[:2], {"name": tf.constant(["a", "b"])})


def test_probabilities_and_lru_do_not_go_together_unnoticed():
    table, queries = TABLE, make_queries(2)
    given = {"candidate_sampling_probability": tf.fill([2], 0.1)}
    task = _task(stream())
    with pytest.warns(UserWarning, match="with `use_lru=False` only"):
        call(task, queries, [0, 1], table, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(task, queries, [0, 1], table, **given)
        without_lru = _task(FromCache(CacheSpec(SPECS, 6, use_lru=False), seed=1))
        call(without_lru, queries, [0, 1], table, **given)


def test_xla_is_not_offered_to_strings():
    towers = functools.partial(Retrieval, lambda features: tf.zeros([2, DIM]))
    assert towers([stream(), InBatch()]).supports_jit
    assert not towers([FromCache(CacheSpec({"title": STRING_ID}, 4)), InBatch()]).supports_jit


def test_a_sources_own_tower_that_is_the_tasks_is_none_of_its_own():
    tower = Table(TABLE)
    source = stream(candidate_network=tower)
    task = Retrieval(tower, [source])
    assert not source.has_own_tower
    call(task, make_queries(2), [0, 1], TABLE, training=True)
    # The batch's embeddings are taken, and not computed again: two draws are all.
    assert int(source.num_encoded) == 2


def test_without_a_cache_features_may_be_ragged():
    queries, ids = make_queries(2), tf.constant([0, 1], tf.int64)
    features = {"id": ids, "words": tf.ragged.constant([[1], [2, 3]])}
    task = Retrieval(Table(TABLE), [InBatch()], candidate_id_key="id", remove_accidental_hits=True)
    losses = [task(queries, TABLE[:2], part) for part in (features, {"id": ids})]
    assert float(losses[0]) == float(losses[1]) > 0.0
