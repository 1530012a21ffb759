"""Tests of `CacheRefresh`, and of what `fit` logs of a cache of a corpus."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import CachedRetrieval, CacheRefresh, DualEncoder
from negative_cache._compat import keras
from negative_cache.layers import Cache, NystromCorrector
from negative_cache.tests.layers.corpus_cases import corpus_of
from negative_cache.tests.layers.retrieval_cases import INT_ID, Table, make_table
from negative_cache.tests.replicas import two_replicas

SIZE, BATCH = 12, 2
STEPS = SIZE // BATCH


def make_model(
    corrector=None, *, streaming=False, learning_rate=0.1, compile_kwargs=None, **kwargs
):
    query_tower, candidate_tower = Table(make_table(SIZE, 1)), Table(make_table(SIZE))
    if streaming:
        kwargs = {"feature_specs": {"id": INT_ID}, "cache_size": SIZE, **kwargs}
    else:
        kwargs["cache"] = Cache.from_dataset(
            corpus_of(SIZE), candidate_tower, candidate_id_key="id", verbose=0
        )
    task = CachedRetrieval(candidate_tower, corrector=corrector, seed=1, **kwargs)
    model = DualEncoder(query_tower, candidate_tower, task)
    compile_kwargs = compile_kwargs or {"run_eagerly": True}
    model.compile(keras.optimizers.SGD(0.1), **compile_kwargs)
    return model


def pairs():
    ids = {"id": np.arange(SIZE)}
    return tf.data.Dataset.from_tensor_slices({"query": ids, "candidate": ids}).batch(BATCH)


class Refreshes(keras.callbacks.Callback):
    """Counts the steps that the cache has made at each refresh of a model's."""

    def __init__(self, model):
        super().__init__()
        self.steps, refresh = [], model.task.cached.refresh

        def refresh_and_tell(*args, **kwargs):
            refresh(*args, **kwargs)
            cache = model.task.cache
            assert not np.any(cache.age)
            now = tf.convert_to_tensor(model.candidate_network.table)
            np.testing.assert_allclose(cache.embeddings, now, rtol=1e-6)
            self.steps.append(int(cache.step))

        model.task.cached.refresh = refresh_and_tell


def test_refreshes_when_an_epoch_begins_but_for_the_first():
    model = make_model(write_back=False)
    seen = Refreshes(model)
    model.fit(pairs(), epochs=3, verbose=0, callbacks=[CacheRefresh(verbose=0)])
    assert seen.steps == [STEPS, 2 * STEPS]


def test_epochs_of_another_fit_go_on_where_the_last_one_ended():
    model, callback = make_model(write_back=False), CacheRefresh(verbose=0)
    seen = Refreshes(model)
    for _ in range(2):
        model.fit(pairs(), epochs=2, verbose=0, callbacks=[callback])
    assert seen.steps == [STEPS, 2 * STEPS, 3 * STEPS]


@pytest.mark.parametrize("every", [1, 4, 5])
def test_refreshes_every_so_many_steps_across_epochs(every):
    model = make_model(write_back=False)
    seen = Refreshes(model)
    model.fit(pairs(), epochs=3, verbose=0, callbacks=[CacheRefresh(every, verbose=0)])
    assert seen.steps == list(range(every, 3 * STEPS + 1, every))


def test_executions_of_several_steps_end_with_the_refresh_that_was_due():
    kwargs = {"steps_per_execution": 3, "jit_compile": False}
    model = make_model(write_back=False, compile_kwargs=kwargs)
    seen = Refreshes(model)
    model.fit(pairs(), epochs=2, verbose=0, callbacks=[CacheRefresh(5, verbose=0)])
    # Executions end after steps 3, 6, 9 and 12; refreshes were due after 5 and 10.
    assert seen.steps == [6, 12]


def test_a_cache_that_streams_is_refreshed():
    model = make_model(streaming=True)
    seen = Refreshes(model)
    model.fit(pairs(), epochs=2, verbose=0, callbacks=[CacheRefresh(verbose=0)])
    assert seen.steps == [STEPS]


def test_shows_a_bar_where_asked(capsys):
    model = make_model(write_back=False)
    model.fit(pairs(), epochs=2, verbose=0, callbacks=[CacheRefresh(batch_size=5, verbose=0)])
    assert capsys.readouterr().out == ""
    model.fit(pairs(), epochs=2, verbose=0, callbacks=[CacheRefresh(batch_size=5)])
    assert "12/12" in capsys.readouterr().out


def test_what_is_refreshed_is_in_the_logs():
    logs = [
        make_model(write_back=False)
        .fit(pairs(), epochs=3, verbose=0, callbacks=callbacks)
        .history["candidates_encoded"]
        for callbacks in ([], [CacheRefresh(verbose=0)])
    ]
    # The corpus at first, then positives and one draw for each query.
    without = [SIZE + 2 * SIZE * epoch for epoch in (1, 2, 3)]
    assert logs == [without, [without[0], without[1] + SIZE, without[2] + 2 * SIZE]]


def test_logs_outlast_the_end_of_an_epoch():
    model = make_model(
        NystromCorrector(4), write_back=False, probe_size=SIZE, probe_every=2 * STEPS
    )
    history = model.fit(pairs(), epochs=4, verbose=0).history
    for name in ("probe_staleness", "probe_corrected_staleness"):
        values = history[name]
        # Probed at the end of the second epoch and of the fourth.
        assert values[0] == 0.0 and values[1] == values[2] > 0.0 and values[3] != values[2]


def test_two_replicas_train_and_refresh_with_a_corrector():
    with two_replicas().scope():
        model = make_model(
            NystromCorrector(4),
            refresh_fraction=0.1,
            compile_kwargs={"jit_compile": False},
        )
    history = model.fit(pairs(), epochs=2, verbose=0, callbacks=[CacheRefresh(verbose=0)]).history
    assert np.all(np.isfinite(history["loss"]))
    # Each has rows of its own, which are those of the same candidates.
    ids = two_replicas().experimental_local_results(model.task.cache.data["id"])
    assert [values.numpy().tolist() for values in ids] == [list(range(SIZE))] * 2
    with two_replicas().scope():
        model.task.refresh_cache(verbose=0)
    rows = two_replicas().experimental_local_results(model.task.cache.embeddings)
    table = tf.convert_to_tensor(model.candidate_network.table)
    for values in rows:
        np.testing.assert_allclose(values, table, rtol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"every_steps": 0}, "`every_steps` must be an integer >= 1. Received: 0"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1. Received: 0"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        CacheRefresh(**arguments)


def test_refuses_a_model_without_a_cache():
    model = make_model(streaming=True, cache_size=0, in_batch_negatives=True)
    with pytest.raises(ValueError, match="There is no cache: the model needs"):
        model.fit(pairs(), verbose=0, callbacks=[CacheRefresh()])
