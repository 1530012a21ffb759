"""Tests of what must be exact where a GPU rounds the factors of products to TF32.

It does so by default. Here products are rounded by hand, and everything is traced as on a GPU.
"""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import TreeIndex, evaluation
from negative_cache.evaluation import ranks
from negative_cache.ops import _execution
from negative_cache.ops._precision import matmul_in_full

pytestmark = pytest.mark.one_keras


def to_tf32(values):
    """Float32 rounded to ten bits behind the point, ties to even."""
    bits = tf.bitcast(tf.cast(values, tf.float32), tf.uint32)
    last = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, np.uint32(13)), np.uint32(1))
    bits = tf.bitwise.bitwise_and(bits + np.uint32(0xFFF) + last, np.uint32(0xFFFFE000))
    return tf.bitcast(bits, tf.float32)


@pytest.fixture(autouse=True)
def tf32(monkeypatch):
    product, einsum = tf.matmul, tf.einsum
    monkeypatch.setattr(
        tf, "matmul", lambda a, b, **kwargs: product(to_tf32(a), to_tf32(b), **kwargs)
    )
    monkeypatch.setattr(
        tf, "einsum", lambda equation, *parts: einsum(equation, *map(to_tf32, parts))
    )
    monkeypatch.setattr(_execution, "device_type", lambda like=None: "GPU")
    # Traced anew, with these products.
    monkeypatch.setattr(ranks, "_count_higher", tf.function(ranks._count_higher.python_function))
    tf.config.experimental.enable_tensor_float_32_execution(True)
    yield
    tf.config.experimental.enable_tensor_float_32_execution(False)


def unit(shape, seed=0):
    values = np.random.default_rng(seed).normal(size=shape)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def test_a_product_in_full_has_all_digits():
    a, b = unit([50, 96]), unit([80, 96], seed=1)
    exact = a.astype(np.float64) @ b.T
    assert np.abs(tf.matmul(a, b, transpose_b=True) - exact).max() > 1e-5
    in_full = tf.function(matmul_in_full)(a, b, transpose_b=True)
    assert np.abs(in_full - exact).max() < 5e-7
    a[0, 0], b[1, 1] = np.nan, np.inf
    in_full = matmul_in_full(a, b, transpose_b=True).numpy()
    assert np.all(np.isnan(in_full[0])) and not np.any(np.isfinite(in_full[:, 1]))
    assert np.all(np.isfinite(np.delete(in_full[1:], 1, axis=1)))


@pytest.mark.parametrize("with_rows", [False, True])
def test_a_positive_does_not_lose_to_itself_or_to_what_is_a_little_lower(with_rows):
    corpus = unit([2000, 64])
    queries = unit([2000, 64], seed=1)
    queries = 0.1 * queries + corpus
    rows = np.arange(2000) if with_rows else None
    ranks = evaluation.positive_ranks(queries, corpus, corpus, positive_rows=rows)
    exact = queries.astype(np.float64) @ corpus.T
    own = np.diag(exact)[:, np.newaxis]
    # But for what is within rounding of float32.
    np.testing.assert_array_equal(ranks, np.sum(exact > own + 1e-6, axis=1))


def test_bounds_of_the_partition_hold():
    embeddings, queries = unit([1000, 48]), 20.0 * unit([64, 48], seed=1)
    index = TreeIndex(1000, 48, beam=16)
    index.index(embeddings, verbose=0)
    scores = queries.astype(np.float64) @ embeddings.T
    expected = np.log(np.sum(np.exp(scores), axis=1))
    for beam in (2, 100):
        lower, upper = index.log_partition_bounds(queries, beam=beam)
        assert np.all(lower <= expected) and np.all(expected <= upper)
    # All leaves are open.
    assert np.max(upper - lower) < 0.1
