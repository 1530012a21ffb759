"""Tests of sampling as an accelerator does it. Its law is tested beside that of a CPU."""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from negative_cache.ops import _execution, _large_blocks, sample_softmax_with_gradient
from negative_cache.ops._large_blocks import choose_blocks
from negative_cache.tests.statistics import assert_draws_follow

DIM = 4


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    monkeypatch.setattr(_execution, "device_type", lambda like=None: "GPU")


def random_problem(num_candidates, num_queries=3):
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=[num_queries, DIM]).astype(np.float32),
        rng.normal(size=[num_candidates, DIM]).astype(np.float32),
    )


def in_graph(queries, candidates, **kwargs):
    """Draws in a graph, which XLA compiles a part of, from a variable."""
    variable = tf.Variable(candidates)
    return tf.function(lambda x: sample_softmax_with_gradient(x, variable, **kwargs))(
        tf.constant(queries)
    )


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# One block that is not full; some that are unrolled, the last of which overlaps; a loop of them.
@pytest.mark.parametrize(["size", "block_size"], [(300, None), (700, 256), (3000, 128)])
@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16, tf.float16])
def test_draws_log_partition_and_gradient_are_those_of_the_softmax(size, block_size, dtype):
    queries, candidates = random_problem(size)
    stored = tf.cast(candidates, dtype)
    # A query is rounded to the dtype of what it is multiplied by.
    scores, rows = (
        tf.cast(queries, dtype).numpy().astype(np.float64),
        stored.numpy().astype(np.float64),
    )
    scores = scores @ rows.T
    sample, gradient = in_graph(
        np.repeat(queries, 100, axis=0), stored, num_samples=200, block_size=block_size, seed=1
    )
    expected = np.log(np.sum(np.exp(scores), axis=1))
    np.testing.assert_allclose(sample.log_partition[::100], expected, rtol=1e-5)
    tolerance = {tf.float32: 1e-5, tf.bfloat16: 0.01, tf.float16: 1e-3}[dtype]
    np.testing.assert_allclose(gradient[::100], softmax(scores) @ rows, atol=tolerance)
    indices = sample.indices.numpy().reshape([3, 20_000])
    found = np.take_along_axis(scores, indices, axis=1)
    np.testing.assert_allclose(sample.scores.numpy().reshape(found.shape), found, atol=1e-5)
    for drawn, law in zip(indices, softmax(scores)):
        assert_draws_follow(drawn, law)


def test_what_is_left_out_is_never_drawn_and_the_threshold_holds_for_the_very_scores():
    queries, candidates = random_problem(1000, num_queries=50)
    scores = queries @ candidates.T
    # Of every query some candidate is exactly at the threshold.
    limits = np.sort(scores, axis=1)[:, -20]
    mask = np.arange(1000) % 3 > 0
    sample, _ = in_graph(
        queries,
        candidates,
        num_samples=400,
        block_size=256,
        seed=2,
        candidate_mask=mask,
        candidate_ids=np.arange(1000) % 50,
        positive_ids=np.arange(50),
        max_scores=limits,
        log_weights=np.linspace(0.0, 5.0, 1000, dtype=np.float32),
    )
    indices = sample.indices.numpy()
    assert np.all(mask[indices]) and np.all(indices % 50 != np.arange(50)[:, np.newaxis])
    weights = np.linspace(0.0, 5.0, 1000, dtype=np.float32)
    assert np.all(sample.scores - weights[indices] <= limits[:, np.newaxis] + 1e-6)


@pytest.fixture
def tf32():
    """As TensorFlow is where nobody has changed it; of consequence on a GPU only."""
    tf.config.experimental.enable_tensor_float_32_execution(True)
    yield
    tf.config.experimental.enable_tensor_float_32_execution(False)


def test_the_law_holds_with_tf32(tf32):
    queries, candidates = random_problem(3000)
    sample, _ = in_graph(
        np.repeat(queries, 100, axis=0), candidates, num_samples=200, block_size=256, seed=4
    )
    for drawn, law in zip(sample.indices.numpy().reshape([3, -1]), softmax(queries @ candidates.T)):
        assert_draws_follow(drawn, law)


def test_the_law_holds_under_products_that_round_like_tf32(monkeypatch):
    # Scores of few digits: what scores a candidate a second time, and not alike, would fail.
    product = tf.matmul
    monkeypatch.setattr(
        tf,
        "matmul",
        lambda *args, **kwargs: tf.round(product(*args, **kwargs) * 8.0) / 8.0,
    )
    queries, candidates = random_problem(500)
    scores = np.round(queries @ candidates.T * 8.0) / 8.0
    sample, _ = in_graph(
        np.repeat(queries, 100, axis=0),
        candidates,
        num_samples=200,
        seed=3,
        compute_gradient=False,
        max_scores=np.full(300, 1.5, np.float32),
    )
    scores[scores > 1.5] = -np.inf
    for drawn, law in zip(sample.indices.numpy().reshape([3, -1]), softmax(scores)):
        assert_draws_follow(drawn, law)


@given(
    st.one_of(st.none(), st.integers(1, 10**5)),
    st.integers(1, 10**8),
    st.one_of(st.none(), st.integers(1, 10**6)),
)
def test_blocks_cover_all_candidates_within_the_share_of_memory(queries, candidates, block_size):
    size, num_blocks = choose_blocks(
        tf.constant(1) if queries is None else queries, candidates, block_size
    )
    assert size % 128 == 0
    assert (num_blocks - 1) * size < candidates <= num_blocks * size
    if block_size is None:
        most = _large_blocks.SCORES_AT_ONCE / (queries or 1024)
    else:
        most = block_size
    assert size <= math.ceil(max(most, 128) / 128) * 128


@pytest.mark.parametrize("down", [0.0, 1e-3])
def test_a_weight_of_zero_is_never_picked_however_sums_are_rounded(down, monkeypatch):
    rng = np.random.default_rng(0)
    weights = rng.random([1, 1, 1000]).astype(np.float32)
    zeros = rng.random(1000) < 0.5
    zeros[[0, -1]] = True
    weights[..., zeros] = 0.0
    exact = tf.cumsum

    def rounded(values, axis):
        # In parallel, sums of the same may differ, go up and down, and end below the last.
        noise = rng.uniform(1.0 - down, 1.0, values.shape).astype(np.float32)
        return exact(values, axis=axis) * noise

    monkeypatch.setattr(_large_blocks.tf, "cumsum", rounded)
    uniforms = np.concatenate(
        [[0.0, np.nextafter(np.float32(1.0), np.float32(0.0)), 1.0], rng.random(500)]
    )
    picked = _large_blocks._pick(
        tf.constant(weights), tf.constant(uniforms[np.newaxis], tf.float32)
    )
    assert np.all(weights[0, 0, picked.numpy()] > 0.0)


def test_random_numbers_are_those_of_one_block_at_a_time():
    # Of all blocks at once they would be a fourth of the scores.
    variable = tf.Variable(tf.zeros([128 * 64, DIM]))
    shapes = []
    exact = tf.random.stateless_uniform

    def recording(shape, *args, **kwargs):
        shapes.append(shape)
        return exact(shape, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf.random, "stateless_uniform", recording)
        tf.function(
            lambda: sample_softmax_with_gradient(tf.zeros([4, DIM]), variable, block_size=128)
        )()
    assert shapes == [[64, 2], [3, 4, 1]]


def test_a_block_of_which_every_score_is_infinitely_low_is_left_out():
    queries, candidates = random_problem(300)
    candidates[:256] = -np.abs(candidates[:256])
    queries, candidates[256:] = np.abs(queries), np.abs(candidates[256:])
    sample, gradient = in_graph(
        queries,
        candidates,
        block_size=128,
        seed=1,
        score_transform=lambda scores: tf.math.log(tf.maximum(scores, 0.0)),
    )
    products = queries @ candidates[256:].T
    np.testing.assert_allclose(sample.log_partition, np.log(products.sum(axis=1)), rtol=1e-5)
    assert np.all(sample.indices >= 256) and np.all(np.isfinite(gradient))


def test_the_tail_of_many_candidates_counts_for_the_gradient_of_a_float16_cache():
    # One candidate, and 2^17 others of which each has less than 2^-24 of its mass.
    num_others = 2**17
    candidates = np.zeros([num_others + 1, DIM], np.float32)
    candidates[0, 0], candidates[1:, 1] = 17.5, 1.0
    queries = np.array([[1.0, 0.0, 0.0, 0.0]], np.float32)
    _, gradient = in_graph(queries, tf.constant(candidates, tf.float16), seed=1)
    tail = num_others * np.exp(-17.5)
    np.testing.assert_allclose(gradient[0, 1], tail / (1.0 + tail), rtol=1e-2)


@pytest.mark.parametrize("device", ["CPU", "GPU"])
def test_a_tape_keeps_nothing_of_what_happened(device, monkeypatch):
    monkeypatch.setattr(_execution, "device_type", lambda like=None: device)
    temperature = tf.Variable(0.5)
    queries, candidates = map(tf.Variable, random_problem(500))

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            sample, gradient = sample_softmax_with_gradient(
                queries * 1.0,
                candidates,
                score_transform=lambda scores: scores / temperature,
                embedding_transform=lambda rows: rows * temperature,
            )
            total = tf.reduce_sum(sample.scores) + tf.reduce_sum(gradient)
        assert tape.gradient(total, [queries, candidates, temperature]) == [None] * 3
        return total

    calls = [
        operation
        for operation in step.get_concrete_function().graph.get_operations()
        if "PartitionedCall" in operation.type
    ]
    # A call that is recorded also returns what its gradient would need.
    assert [len(call.outputs) for call in calls] == [4]
