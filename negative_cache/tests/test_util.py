import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from negative_cache import util
from negative_cache.tests.replicas import run_on_two_replicas, two_replicas

pytestmark = pytest.mark.one_keras


@given(k=st.integers(1, 4), run_size=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_approximate_top_k_keeps_the_best_of_each_run(k, run_size, seed):
    scores = np.random.default_rng(seed).integers(0, 5, [3, k * run_size]).astype(np.float32)
    kept, indices = util.approximate_top_k_with_indices(tf.constant(scores), k)
    for row in range(3):
        runs = np.split(scores[row], k)
        np.testing.assert_array_equal(kept[row], [run.max() for run in runs])
        expected = [i * run_size + run.argmax() for i, run in enumerate(runs)]
        np.testing.assert_array_equal(indices[row], expected)


def test_approximate_top_k_of_unknown_shape():
    function = tf.function(util.approximate_top_k_with_indices, autograph=False)
    function = function.get_concrete_function(tf.TensorSpec([None, None]), 2)
    scores, indices = function(tf.constant([[1.0, 4.0, 3.0, 2.0]]))
    assert (scores.numpy().tolist(), indices.numpy().tolist()) == ([[4.0, 3.0]], [[1, 2]])


@pytest.mark.parametrize(
    ("shape", "k", "message"),
    [
        ([2, 5], 2, "`k` must divide the number of candidates. Received: k = 2 and 5"),
        ([2, 5], 0, "Received: k = 0"),
        ([5], 1, r"\[batch, candidates\].*\(5,\)"),
    ],
)
def test_bad_top_k(shape, k, message):
    with pytest.raises(ValueError, match=message):
        util.approximate_top_k_with_indices(tf.zeros(shape), k)


def test_concat_outside_a_replica_context_is_the_identity():
    np.testing.assert_array_equal(util.cross_replica_concat([[1, 2]], axis=0), [[1, 2]])
    with two_replicas().scope():
        np.testing.assert_array_equal(util.cross_replica_concat([[1, 2]], axis=0), [[1, 2]])


VALUES = {
    tf.string: [[b"a", b"", b"\xff\x00 bytes"], ["é".encode(), b"longer than the rest", b"b"]],
    tf.bool: [[True, False, True], [False, False, True]],
    tf.uint8: [[0, 255, 1], [2, 3, 4]],
    tf.uint32: [[2**32 - 1, 0, 1], [2, 3, 4]],
    tf.uint64: [[2**64 - 1, 0, 1], [2, 3, 4]],
    tf.int64: [[-(2**60), 0, 1], [2, 3, 4]],
    tf.bfloat16: [[0.5, -2, 1], [2, 3, 4]],
    tf.float32: [[0.1, -2, 1], [2, 3, 4]],
}


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", VALUES, ids=lambda dtype: dtype.name)
def test_concat_of_two_replicas(dtype, axis):
    values = tf.constant(VALUES[dtype], dtype)

    def concat():
        row = values[util.replica_id()]
        return util.cross_replica_concat(row[tf.newaxis], axis, name="all")

    expected = values if axis == 0 else tf.reshape(values, [1, 6])
    for result in run_on_two_replicas(concat):
        assert result.dtype == dtype
        assert result.numpy().tolist() == expected.numpy().tolist()


def test_gradient_of_concat_goes_to_the_part_it_belongs_to():
    def gradient():
        # Two rows on the first replica and one on the second.
        rows = tf.ones([2 - util.replica_id(), 1])
        with tf.GradientTape() as tape:
            tape.watch(rows)
            everything = util.cross_replica_concat(rows, axis=0)
            loss = tf.reduce_sum(everything[:, 0] * tf.constant([1.0, 10.0, 100.0]))
        return tape.gradient(loss, rows)

    # Both replicas use every row, so that each weight arrives twice.
    first, second = run_on_two_replicas(gradient)
    assert first.numpy().tolist() == [[2.0], [20.0]]
    assert second.numpy().tolist() == [[200.0]]


@pytest.mark.parametrize("shape", [[0], [0, 3], [2, 0], [0, 0]])
@pytest.mark.parametrize("dtype", [tf.float32, tf.string])
def test_concat_of_nothing(shape, dtype):
    # Without an entry more, TensorFlow ends the process.
    for axis in range(len(shape)):
        expected = [2 * size if i == axis else size for i, size in enumerate(shape)]
        for result in run_on_two_replicas(
            lambda axis=axis: util.cross_replica_concat(
                tf.zeros(shape) if dtype == tf.float32 else tf.fill(shape, "a"), axis
            )
        ):
            assert result.dtype == dtype and result.shape.as_list() == expected


def test_bad_axis():
    with pytest.raises(ValueError, match=r"`axis`.*axis = 1 and a tensor of shape \(2,\)"):
        util.cross_replica_concat(tf.zeros([2]), axis=1)
