"""Tests of models and layers that are loaded on another number of replicas: see also
`layers/test_cache_other_replicas.py`."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import BackupAndRestore, CachedRetrieval, DualEncoder
from negative_cache._compat import IS_KERAS_2, keras
from negative_cache.layers import (
    Cache,
    Corrector,
    FrequencyEstimator,
    NystromCorrector,
    TreeIndex,
    Uniform,
)
from negative_cache.layers._state import next_seed
from negative_cache.layers._variables import by_replica
from negative_cache.ops.cache_rows import is_filled
from negative_cache.tests.layers.retrieval_cases import DIM, INT_ID, Table, make_queries, make_table
from negative_cache.tests.replicas import run_on, scope_of

SIZE, NUM_QUERIES = 13, 5
MOVES = [(1, 2), (2, 1), (2, 4), (4, 2)]
# What rows were encoded by, and the tower of now.
STALE, TABLE = make_table(SIZE, seed=3), make_table(SIZE, seed=4)
QUERIES, POSITIVES = make_queries(NUM_QUERIES), np.array([0, 3, 4, 7, 12])


@keras.utils.register_keras_serializable("negative_cache_tests")
class IdTower(Table):
    """`Table`, which a file describes."""

    def __init__(self):
        super().__init__(STALE)

    def get_config(self):
        return {}


def make_model(kind, num_replicas, rows=None, seed=1):
    """A model whose rows are part of a `kind` of pool, of `rows` for each replica."""
    with scope_of(num_replicas):
        tower = IdTower()
        options = {"candidate_id_key": "id", "reduction": "sum", "seed": seed}
        if kind != "stream":
            size = -(-SIZE // num_replicas)
            specs = {"id": INT_ID, "embedding": tf.io.FixedLenFeature([DIM], tf.float32)}
            # A beam of all leaves opens them all, so that nothing is an estimate.
            has_index = kind == "corpus with an index"
            index = TreeIndex(size, DIM, leaf_size=4, beam=99) if has_index else None
            cache = Cache(specs, size, row_key="id", sharded=True, index=index)
            task = CachedRetrieval(tower, cache=cache, **options)
        else:
            options |= {"remove_accidental_hits": True, "pool": "replicas", "embedding_dim": DIM}
            task = CachedRetrieval(tower, {"id": INT_ID}, rows, **options)
        model = DualEncoder(IdTower(), tower, task)
        ids = {"id": tf.constant([0, 1], tf.int64)}
        model({"query": ids, "candidate": ids})
    return model


def filled(kind, num_replicas, rows=None):
    """Such a model, whose rows are stale embeddings of a part of the candidates."""
    model = make_model(kind, num_replicas, rows)
    task, ids = model.task, np.arange(SIZE)
    with scope_of(num_replicas):
        if kind != "stream":
            task.cache.fill([{"id": ids, "embedding": STALE}], verbose=0)
        else:
            task.add_to_cache({"id": tf.constant(ids[:-2])})
    for network in (model.query_network, model.candidate_network):
        network.table.assign(TABLE)
    return model


def rows_of(cache):
    """{id: embedding} of all replicas."""
    found = {}
    for ids, embeddings, stamps in zip(
        *map(by_replica, (cache.data["id"], cache.embeddings, cache._times.stamps))
    ):
        mask = is_filled(stamps.value()).numpy()
        found |= dict(zip(ids.numpy()[mask].tolist(), embeddings.numpy()[mask]))
    return found


def dense_loss(rows):
    """The sum over the queries, by one softmax over all rows but the positive's own."""
    queries = QUERIES.astype(np.float64)
    losses = []
    for query, positive in zip(queries, POSITIVES):
        others = np.stack([row for key, row in rows.items() if key != positive])
        logits = np.concatenate([[query @ TABLE[positive]], others @ query])
        losses.append(np.logaddexp.reduce(logits) - logits[0])
    return sum(losses)


def losses_of(model, num_replicas, training=False):
    """[R], the loss of the same queries on every replica."""
    found = {}

    def call(replica):
        features = {"id": tf.constant(POSITIVES)}
        candidates = model.candidate_network(features)
        found[int(replica)] = model.task(
            tf.constant(QUERIES), candidates, features, training=training
        ).numpy()

    run_on(num_replicas, call)
    return [found[replica] for replica in range(num_replicas)]


def as_keras(model, make, new, folder):
    model.save(folder / "model.keras")
    with scope_of(new):
        return keras.models.load_model(folder / "model.keras", compile=False)


def as_weights(model, make, new, folder):
    model.save_weights(folder / "model.weights.h5")
    fresh = make()
    with scope_of(new):
        fresh.load_weights(folder / "model.weights.h5")
    return fresh


def as_checkpoint(model, make, new, folder):
    path = tf.train.Checkpoint(model=model).write(str(folder / "model"))
    fresh = make()
    tf.train.Checkpoint(model=fresh).read(path).expect_partial()
    return fresh


def as_tensorflow_weights(model, make, new, folder):
    model.save_weights(str(folder / "model"), save_format="tf")
    fresh = make()
    with scope_of(new):
        fresh.load_weights(str(folder / "model")).expect_partial()
    return fresh


ONLY_KERAS_2 = pytest.mark.skipif(not IS_KERAS_2, reason="a format of Keras 2")


@pytest.mark.parametrize(
    "kind, old, new, save",
    [
        ("corpus", 2, 1, as_keras),
        ("stream", 1, 2, as_keras),
        ("corpus", 1, 2, as_weights),
        ("stream", 2, 1, as_weights),
        ("corpus", 2, 1, as_checkpoint),
        ("stream", 1, 2, as_checkpoint),
        pytest.param("stream", 2, 1, as_tensorflow_weights, marks=ONLY_KERAS_2),
        ("corpus", 4, 2, as_weights),
        ("corpus with an index", 2, 1, as_keras),
        ("corpus with an index", 1, 2, as_checkpoint),
        ("stream", 4, 2, as_checkpoint),
    ],
)
def test_a_model_has_the_loss_of_all_rows_and_goes_on(kind, old, new, save, tmp_path):
    # With `.keras` the cache has the size that is in the file.
    rows = SIZE if save is as_keras else 1 + SIZE // old
    model = filled(kind, old, rows)
    expected = rows_of(model.task.cache)
    assert len(expected) == (SIZE - 2 if kind == "stream" else SIZE)
    loaded = save(model, lambda: make_model(kind, new, SIZE, seed=2), new, tmp_path)
    found = rows_of(loaded.task.cache)
    assert found.keys() == expected.keys()
    for key, embedding in expected.items():
        np.testing.assert_array_equal(found[key], embedding)
    np.testing.assert_allclose(losses_of(loaded, new), [dense_loss(expected)] * new, rtol=1e-5)
    assert np.all(np.isfinite(losses_of(loaded, new, training=True)))
    if kind != "stream":
        found = rows_of(loaded.task.cache)
        for key in POSITIVES.tolist():
            np.testing.assert_array_equal(found[key], TABLE[key])
        np.testing.assert_allclose(losses_of(loaded, new), [dense_loss(found)] * new, rtol=1e-5)


def reload(layer, fresh):
    store = {}
    layer.save_own_variables(store)
    fresh.load_own_variables(store)
    return fresh


@pytest.mark.parametrize("old, new", MOVES)
def test_no_two_steps_and_replicas_have_the_same_seed(old, new):
    def make(num_replicas, seed):
        with scope_of(num_replicas):
            return Uniform({"id": np.arange(5)}, num_draws=2, seed=seed)

    def seeds(source, num_replicas, num_steps):
        found = []
        for _ in range(num_steps):
            run_on(
                num_replicas,
                lambda replica: found.append(tuple(next_seed(source._state.sampling).numpy())),
            )
        return found

    source = make(old, seed=7)
    before = seeds(source, old, 3)
    for part, count in zip(by_replica(source._state.num_encoded), (5, 6, 8, 9)):
        part.assign(count)
    fresh = reload(source, make(new, seed=8))
    after = seeds(fresh, new, 3)
    assert len({*before, *after}) == 3 * (old + new)
    assert {seed for seed, _ in (*before, *after)} == {7}
    counts = [int(part) for part in by_replica(fresh._state.num_encoded)]
    assert sum(counts) == sum((5, 6, 8, 9)[:old]) and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("old, new", MOVES)
def test_frequencies_are_those_of_all_streams_together(old, new):
    def make(num_replicas):
        with scope_of(num_replicas):
            return FrequencyEstimator(64, learning_rate=0.5)

    def estimates(estimator, num_replicas):
        found = []
        run_on(
            num_replicas,
            lambda replica: found.append(
                estimator.probability(tf.constant([1, 2, 3], tf.int64)).numpy()
            ),
        )
        return found

    estimator = make(old)
    # Candidate 1 comes in every batch of 4 everywhere, 2 on the first replica only.
    for _ in range(3):
        run_on(
            old,
            lambda replica: estimator.update(
                tf.constant([1, 2 if int(replica) == 0 else 4, 5, 6], tf.int64)
            ),
        )
    fresh = reload(estimator, make(new))
    # After 3 batches the gap of each is 4. The one that never came: once in all that was seen.
    expected = [1 / 4, 1 / 4, 1 / (12 * old + 1)]
    for found in estimates(fresh, new):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    # On all of them the next gaps begin where the last ones ended.
    run_on(new, lambda replica: fresh.update(tf.constant([1, 4, 5, 6], tf.int64)))
    for found in estimates(fresh, new):
        np.testing.assert_allclose(found[:2], [1 / 4, 1 / 4], rtol=1e-6)


def test_frequencies_of_streams_that_differ_are_averaged():
    def make(num_replicas):
        with scope_of(num_replicas):
            return FrequencyEstimator(64, learning_rate=1.0)

    estimator = make(2)
    for size in (4, 8):
        run_on(
            2,
            lambda replica: estimator.update(
                tf.range(size * (1 + int(replica)), dtype=tf.int64)  # noqa: B023
            ),
        )
    # The last gaps are 8 and 16; 12 and 24 were seen, the last batch right now.
    fresh = reload(estimator, make(1))
    assert fresh.probability(tf.constant([0], tf.int64)).numpy()[0] == pytest.approx(1 / 12)
    fresh.update(tf.constant([0, 0, 9], tf.int64))
    assert fresh.probability(tf.constant([0], tf.int64)).numpy()[0] == pytest.approx(2 / 3)


def memory(num_replicas, size=4):
    with scope_of(num_replicas):
        specs = {"id": INT_ID, "title": tf.io.FixedLenFeature([], tf.string)}
        return Uniform(feature_specs=specs, memory_size=size, num_draws=1, seed=1)._memory


def push(layer, num_replicas, ids_of):
    def write(replica):
        ids = np.array(ids_of(int(replica)))
        features = {"id": ids, "title": np.array([f"title {i}" for i in ids])}
        log_probability = tf.constant(-0.5 * ids, tf.float32)
        layer.push({k: tf.constant(v) for k, v in features.items()}, log_probability)

    run_on(num_replicas, write)


def candidates_in(layer):
    """For each replica, the ids in its rows, with what else belongs to them checked."""
    found = []
    numbers = by_replica(layer._state.num_written)
    for replica, number in enumerate(numbers):
        parts = {key: by_replica(v)[replica].numpy() for key, v in layer._state.data.items()}
        count = min(int(number), layer.size)
        ids = parts["id"][:count].tolist()
        assert parts["title"][:count].tolist() == [f"title {i}".encode() for i in ids]
        (other,) = parts.keys() - {"id", "title"}
        assert parts[other][:count].tolist() == [-0.5 * i for i in ids]
        found.append(ids)
    return found


def test_a_memory_of_the_stream_is_divided_and_goes_on():
    layer = memory(2)
    for start in (0, 3):
        push(layer, 2, lambda replica: [10 * replica + start + i for i in range(3)])  # noqa: B023
    # The last four of each: 2 … 5, and 12 … 15.
    for new, size in ((4, 2), (1, 8)):
        fresh = reload(layer, memory(new, size))
        shards = candidates_in(fresh)
        assert sorted(sum(shards, [])) == [2, 3, 4, 5, 12, 13, 14, 15]
        assert {len(shard) for shard in shards} == {size}
        push(fresh, new, lambda replica: [100 + replica])
        # The oldest goes first.
        left = set(sum(candidates_in(fresh), []))
        assert len(left) == 8 and left >= {4, 5, 14, 15} and len(left & {2, 12}) <= 1
    with pytest.warns(UserWarning, match="8 rows .* the 4 oldest were dropped"):
        fresh = reload(layer, memory(1, 4))
    assert sorted(candidates_in(fresh)[0]) == [4, 5, 14, 15]


def test_a_memory_of_a_corpus_is_the_same_on_every_replica():
    def make(num_replicas, first):
        with scope_of(num_replicas):
            return Uniform({"id": first + np.arange(5)}, num_draws=1, seed=1)._memory

    for old, new in ((1, 2), (2, 1)):
        fresh = reload(make(old, first=7), make(new, first=0))
        for part in by_replica(fresh._state.data["id"]):
            assert part.numpy().tolist() == [7, 8, 9, 10, 11]
        assert [int(part) for part in by_replica(fresh._state.num_written)] == [5] * new


@pytest.mark.parametrize("old, new", [(1, 2), (2, 1), (2, 4)])
@pytest.mark.parametrize("make", [Corrector, lambda: NystromCorrector(3, landmarks="uniform")])
def test_correctors_go_on_with_what_all_replicas_have_learned(make, old, new):
    def made(num_replicas):
        with scope_of(num_replicas):
            corrector = make()
            corrector.make(DIM)
        return corrector

    corrector, fresh = made(old), made(new)
    state = corrector._state
    for replica in range(old):
        for variable, value in (
            (state.num_updates, 6),
            (state.typical_age, 2.0 + replica),
            (state.agreement, [1.0 + replica, 2.0]),
            (state.are_unit, replica == 0),
        ):
            by_replica(variable)[replica].assign(value)
        if isinstance(corrector, NystromCorrector):
            by_replica(state.landmarks["stale"])[replica].assign(tf.fill([3, DIM], 1.0 + replica))
            by_replica(state.landmarks["rows"])[replica].assign([2, 1, 0])
    reload(corrector, fresh)
    mean = (old - 1) / 2
    for replica in range(new):
        state = [by_replica(v)[replica].numpy().tolist() for v in _learned(fresh)]
        assert state == [6, 2.0 + mean, [1.0 + mean, 2.0], old == 1]
        if isinstance(fresh, NystromCorrector):
            landmarks = {k: by_replica(v)[replica].numpy() for k, v in _landmarks(fresh).items()}
            assert np.all(landmarks["stale"] == 1.0 + replica % old)
            # They were rows of a cache that is divided otherwise now.
            assert landmarks["rows"].tolist() == [-1] * 3


def _learned(corrector):
    state = corrector._state
    return state.num_updates, state.typical_age, state.agreement, state.are_unit


def _landmarks(corrector):
    return corrector._state.landmarks


@pytest.mark.parametrize("old, new", [(1, 2), (2, 1)])
def test_a_backup_goes_on_on_as_many_replicas_only(old, new, tmp_path):
    def begin(num_replicas):
        model = make_model("stream", num_replicas, rows=3)
        model.compile("adam")
        backup = BackupAndRestore(str(tmp_path / "backup"))
        backup.set_model(model)
        backup.set_params({})
        backup.on_train_begin()
        return backup

    begin(old)._save(1, 0, 4)
    with pytest.raises(ValueError, match=f"of {old} of {old} replicas. Wanted: of {new} of {new}"):
        begin(new)
    assert begin(old)._progress.numpy().tolist() == [1, 0, 4]


def test_a_saved_model_has_the_rows_of_every_replica(tmp_path):
    cache, module = filled("stream", 2, 7).task.cache, tf.Module()
    module.cache = cache
    tf.saved_model.save(module, str(tmp_path / "model"))
    module.cache = fresh = Cache(cache.specs, 12)
    tf.train.Checkpoint(module).read(str(tmp_path / "model/variables/variables")).expect_partial()
    assert rows_of(fresh).keys() == rows_of(cache).keys()
