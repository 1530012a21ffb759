"""Tests that training steps run on a GPU, on a machine that has none.

`on_gpu` lets functions be traced as they are on a GPU. What XLA compiles then runs on the CPU.
"""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import TreeIndex
from negative_cache._compat import keras
from negative_cache.layers._cache import times
from negative_cache.layers._variables import Int32Variable, make_state_variable, scatter_rows
from negative_cache.ops import _execution
from negative_cache.tests import gpu_kernels
from negative_cache.tests.kerases import under_both
from negative_cache.tests.training_steps import (
    BATCH,
    NUM_ROWS,
    SPECS,
    TASKS,
    TASKS_ON_HOST,
    TASKS_WITH_BRANCHES,
    TITLED,
    batch_of,
    candidates,
    covering,
    model_of,
    published_step,
    streaming,
    titled,
)
from negative_cache.tests.tree_invariants import check_tree

COMPILED = {
    "in-batch": 4,
    "shared draws": 3,
    "corrector": 5,
    "corrector, cross-entropy": 5,
    "Nyström": 5,
    "Nyström, linear": 5,
    "refreshed": 3,
    "index": 3,
    "index, corrector": 6,
    "index, bfloat16": 3,
    "corpus, refreshed and corrected": 7,
    "corpus, index": 3,
    "corpus, coded index": 3,
}

TRAINED_IN_A_GRAPH = [
    "in-batch",
    "corrector, cross-entropy",
    "index, corrector",
    "corpus, coded index",
]


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(_execution, "device_type", lambda like=None: "GPU")
    # A large cache's queue of rows, that a CPU needs, is there and not used.
    monkeypatch.setattr(times, "_QUEUE_SIZE", NUM_ROWS // 2)


def examine(model, features=candidates):
    """Reports of a training step in a graph, and of one that XLA compiles; the step."""
    step = tf.function(model.train_step)
    traced = step.get_concrete_function((batch_of(range(BATCH), features),))
    return gpu_kernels.examine(traced), gpu_kernels.examine(traced, compiled=True), step


def assert_runs_on_a_gpu(report, *, branches=False):
    assert report.without_kernel == []
    assert report.host_variables == []
    assert report.to_host == []
    assert bool(report.control_flow) == branches, report.control_flow


def assert_keeps_no_scores(step):
    """Asserts that a step has nothing of the size of the scores of all rows for its gradient."""
    step = step.get_concrete_function((batch_of(range(BATCH)),))
    # What a gradient needs of a call or a loop leaves it as an output.
    largest = max(
        (tensor.shape.num_elements() or 0, operation.type)
        for operation in step.graph.get_operations()
        for tensor in operation.outputs
    )
    assert 0 < largest[0] < NUM_ROWS * BATCH, largest


def assert_trains(model, step):
    """Asserts that six steps change all weights, and fill the cache and its index."""
    before = [weight.numpy() for weight in model.trainable_variables]
    rng = np.random.default_rng(0)
    for _ in range(6):
        logs = step((batch_of(rng.choice(NUM_ROWS, BATCH, replace=False)),))
    assert all(np.isfinite(float(value)) for value in tf.nest.flatten(logs)), logs
    # Those of a corrector too.
    for old, weight in zip(before, model.trainable_variables):
        assert np.any(old != weight.numpy()), weight.name
    cache = model.task.cache
    assert int(cache.step) == 6 and int(cache.num_filled) == np.count_nonzero(cache.filled) > BATCH
    # Every row is one candidate's: its features go with its id.
    rows = np.flatnonzero(cache.filled)
    expected = candidates(cache.data["id"].numpy()[rows])
    for key in SPECS:
        np.testing.assert_array_equal(cache.data[key].numpy()[rows], expected[key], err_msg=key)
    if cache.index is not None:
        assert int(cache.index.num_candidates) == len(rows)
    if cache.index is not None and cache.index.store_embeddings:
        check_tree(cache.index, {int(row): cache.embeddings.numpy()[row] for row in rows})


# To trace a step takes longest, so that it is traced once for all that is asserted of it.
# Of Keras in it are the optimizer, metrics and weights, which these tasks have between them.
@pytest.mark.parametrize("name", under_both(TRAINED_IN_A_GRAPH, TASKS))
def test_a_step_has_kernels_on_a_gpu_keeps_no_scores_and_trains(name, on_gpu):
    model = model_of(TASKS[name]())
    report, compiled, step = examine(model)
    assert_runs_on_a_gpu(report)
    # Draws and the update of the cache; the update of the index; of a corrector what it learns, and
    # the ages of the rows that it is corrected by, the equations of Nyström's, and so on.
    assert report.compiled == COMPILED.get(name, 2)
    assert compiled.without_kernel == []
    if "index" not in name:
        assert_keeps_no_scores(step)
    if name in TRAINED_IN_A_GRAPH:
        assert_trains(model, step)


@pytest.mark.parametrize("name", under_both(["probed"], TASKS_WITH_BRANCHES))
def test_every_operation_of_a_branch_has_a_kernel_on_a_gpu(name, on_gpu):
    model = model_of(TASKS_WITH_BRANCHES[name]())
    report, compiled, _ = examine(model)
    assert_runs_on_a_gpu(report, branches=True)
    assert compiled.without_kernel == []


@pytest.mark.one_keras
@pytest.mark.parametrize("name", TASKS_ON_HOST)
def test_a_step_with_something_on_the_host_copies_rows_and_not_the_cache(name, on_gpu):
    # The second of two CPUs stands for a GPU: what is left on the first is on the host.
    with tf.device("CPU:1"):
        model = model_of(TASKS_ON_HOST[name](), titled)
        assert not model.task.supports_jit
        report, _, step = examine(model, titled)
        copies = [*report.to_host, *report.to_device]
        assert copies and max(copies).num_rows < NUM_ROWS, max(copies)
        rng = np.random.default_rng(0)
        for _ in range(3):
            ids = rng.choice(NUM_ROWS, BATCH, replace=False)
            logs = step((batch_of(ids, titled),))
    assert all(np.isfinite(float(value)) for value in tf.nest.flatten(logs)), logs
    cache = model.task.cache
    rows = np.flatnonzero(cache.filled)
    expected = titled(cache.data["id"].numpy()[rows])
    for key in TITLED:
        values = cache.data[key].numpy()[rows]
        values = values.astype(str) if key == "title" else values
        np.testing.assert_array_equal(values, expected[key], err_msg=key)
        place = tf.DeviceSpec.from_string(cache.data[key].device).device_index
        assert place == (0 if key in cache.on_host else 1)


@pytest.mark.one_keras
@pytest.mark.parametrize("kwargs", [{}, {"top_k": 10}])
def test_every_operation_of_a_published_step_has_a_kernel_on_a_gpu(kwargs, on_gpu):
    step = tf.function(published_step(**kwargs))
    features = batch_of(range(BATCH))["candidate"]
    assert_runs_on_a_gpu(gpu_kernels.examine(step.get_concrete_function(features)))


@pytest.mark.one_keras
def test_a_layer_runs_where_it_was_made_wherever_the_step_is(on_gpu):
    with tf.device("CPU:1"):
        model = model_of(TASKS["index, corrector"]())
    logs = tf.function(model.train_step)((batch_of(range(BATCH)),))
    assert all(np.isfinite(float(value)) for value in tf.nest.flatten(logs))
    assert int(model.task.cache.num_filled) == BATCH


@pytest.mark.one_keras
def test_nothing_is_compiled_where_nobody_wants_it(on_gpu, monkeypatch):
    monkeypatch.setenv("NEGATIVE_CACHE_XLA", "0")
    model = model_of(TASKS["index, corrector"]())
    report, _, _ = examine(model)
    assert report.compiled == 0


@pytest.mark.one_keras
def test_the_registry_shows_what_a_gpu_refuses():
    flags = tf.Variable([False] * 4)
    counts = tf.Variable([0] * 4)
    nodes = tf.Variable(tf.zeros([4, 2, 3]))

    @tf.function
    def step(rows):
        tf.raw_ops.ResourceScatterUpdate(
            resource=flags.handle, indices=tf.cast(rows, tf.int64), updates=rows > 0
        )
        counts.assign_add([1] * 4)
        tf.raw_ops.ResourceGatherNd(
            resource=nodes.handle, indices=rows[:, tf.newaxis], dtype=tf.float32
        )
        return tf.cond(rows[0] > 0, lambda: rows, lambda: -rows)

    function = step.get_concrete_function(tf.constant([1, 2]))
    report = gpu_kernels.examine(function)
    assert [text.split()[0] for text in report.without_kernel] == ["ResourceScatterUpdate"]
    assert len(report.host_variables) == 1 and "int32" in report.host_variables[0]
    assert len(report.control_flow) == 1
    in_xla = gpu_kernels.examine(function, compiled=True)
    assert [text.split()[0] for text in in_xla.without_kernel] == ["ResourceGatherNd"]
    assert in_xla.control_flow == []


def run(function, *args, device, monkeypatch, jit_compile=None):
    """`function(*args)` in a graph, as on a device."""
    monkeypatch.setattr(_execution, "device_type", lambda like=None: device)
    return tf.function(function, jit_compile=jit_compile)(*args)


def items_of(ids, offset=0.0):
    features = {key: tf.constant(values) for key, values in candidates(ids).items()}
    return {**features, "embedding": features["x"] + offset}


@pytest.mark.one_keras
@pytest.mark.parametrize("jit_compile", [None, True])
@pytest.mark.parametrize("make", [streaming, covering])
def test_a_compiled_update_is_that_of_a_cpu(make, jit_compile, monkeypatch):
    caches = []
    for _ in range(2):
        # One tower for both.
        keras.utils.set_random_seed(0)
        caches.append(make().cache)
    extra = {"log_sampling_probability", "candidate_id_key"} & set(caches[0].specs)

    def update(cache, new, old, mask):
        items = items_of(new)
        items |= {key: tf.zeros([len(new)], cache.specs[key].dtype) for key in extra}
        refreshed = {"embedding": items_of(old, offset=1.0)["embedding"]}
        cache.update(
            new_items=items,
            new_items_mask=mask,
            updated_item_data=refreshed,
            updated_item_indices=tf.constant(old),
            updated_item_mask=~mask[: len(old)],
        )

    rng = np.random.default_rng(0)
    for count in (BATCH, BATCH, BATCH):
        new, old = (rng.choice(NUM_ROWS, count, replace=False) for _ in range(2))
        mask = tf.constant(rng.random(count) < 0.5)
        for cache, device in zip(caches, ("CPU", "GPU")):
            run(
                lambda mask, cache=cache: update(cache, new, old, mask),  # noqa: B023
                mask,
                device=device,
                monkeypatch=monkeypatch,
                jit_compile=jit_compile if device == "GPU" else None,
            )
    for key in caches[0].specs:
        np.testing.assert_array_equal(caches[0].data[key], caches[1].data[key], err_msg=key)
    np.testing.assert_array_equal(caches[0].age, caches[1].age)
    np.testing.assert_array_equal(caches[0].filled, caches[1].filled)
    assert int(caches[0].num_filled) == int(caches[1].num_filled) > 0


@pytest.mark.one_keras
@pytest.mark.parametrize("name", ["bfloat16", "index", "corpus, refreshed and corrected"])
def test_a_step_that_xla_compiles_trains(name, on_gpu):
    model = model_of(TASKS[name]())
    assert_trains(model, tf.function(model.train_step, jit_compile=True))


@pytest.mark.one_keras
@pytest.mark.parametrize("limited", [False, True])
def test_draws_of_a_tree_are_the_same_under_xla(limited):
    rng = np.random.default_rng(0)
    index = TreeIndex(300, 8, leaf_size=8, branching=4, beam=4)
    # Leaves of one candidate among them, which have no spread.
    index.index(rng.normal(size=[80, 8]).astype(np.float32), verbose=0)
    # One query scores everything alike.
    queries = tf.constant(rng.normal(size=[6, 8]) * np.arange(6)[:, np.newaxis], tf.float32)
    options = {"max_scores": np.full(6, 2.0, np.float32)} if limited else {}
    (plain, gradient), (compiled, compiled_gradient) = (
        tf.function(
            lambda: index.sample_with_gradient(queries, 3, seed=(1, 2), **options),
            jit_compile=jit_compile,
        )()
        for jit_compile in (None, True)
    )
    np.testing.assert_array_equal(plain.indices, compiled.indices)
    np.testing.assert_allclose(plain.log_partition, compiled.log_partition, rtol=1e-5)
    np.testing.assert_allclose(gradient, compiled_gradient, rtol=1e-3, atol=1e-5)


class TestInt32Variable:
    def test_it_reads_as_int32_and_is_kept_as_unsigned(self):
        values = np.array([[-5, 0], [7, tf.int32.min], [tf.int32.max, -1]], np.int32)
        variable = make_state_variable(lambda: tf.constant(values), "counts")
        assert isinstance(variable, Int32Variable) and variable.variable.dtype == tf.uint32
        assert variable.dtype == tf.int32 and variable.shape == [3, 2] and len(variable) == 3
        for read in (
            variable.numpy(),
            np.asarray(variable),
            tf.convert_to_tensor(variable),
            tf.gather(variable, [0, 1, 2]),
            tf.function(lambda: tf.gather(variable, [0, 1, 2]))(),
            tf.gather_nd(variable, [[0], [1], [2]]),
            variable[:],
        ):
            assert read.dtype == np.int32
            np.testing.assert_array_equal(read, values)
        assert repr(variable) == "<Int32Variable 'counts:0' shape=(3, 2)>"

    def test_it_counts_and_goes_round_as_a_variable_does(self):
        variable = make_state_variable(lambda: tf.constant([3, -4]), "counts")
        assert [int(value) for value in variable] == [3, -4]
        np.testing.assert_array_equal(variable.value(), [3, -4])
        scalar = make_state_variable(lambda: tf.constant(-7), "count")
        assert int(scalar) == -7
        with pytest.raises(TypeError, match="has no length"):
            len(scalar)

    def test_it_is_written_as_int32(self):
        variable = make_state_variable(lambda: tf.zeros([4], tf.int32), "counts")
        variable.assign([1, -2, 3, -4])
        variable.assign_add([-3, -3, -3, -3])
        np.testing.assert_array_equal(variable, [-2, -5, 0, -7])
        variable.assign_sub([-1, 1, -1, 1])
        np.testing.assert_array_equal(variable, [-1, -6, 1, -8])
        scatter_rows(variable, tf.constant([2, 0]), tf.constant([-100, 200]))
        np.testing.assert_array_equal(variable, [200, -6, -100, -8])


@pytest.mark.one_keras
@pytest.mark.parametrize("name", [name for name in TASKS if "index" not in name])
def test_on_a_cpu_no_step_keeps_the_scores_of_all_rows_for_its_gradient(name):
    assert_keeps_no_scores(tf.function(model_of(TASKS[name]()).train_step))
