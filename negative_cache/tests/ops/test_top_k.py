import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from negative_cache import util
from negative_cache.ops import _execution, top_k_scores


def integers(seed, queries, candidates, dim=3):
    """Small integers, whose inner products are exact, with many ties."""
    rng = np.random.default_rng(seed)
    return (
        rng.integers(-3, 4, [queries, dim]).astype("f"),
        rng.integers(-3, 4, [candidates, dim]).astype("f"),
    )


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 40), st.sampled_from([None, 1, 7]))
def test_exact_top_k_is_that_of_sorting(seed, num_candidates, k, block_size):
    k = min(k, num_candidates)
    queries, candidates = integers(seed, 3, num_candidates)
    scores, indices = top_k_scores(queries, candidates, k, block_size=block_size)
    expected = queries @ candidates.T
    order = np.argsort(-expected, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(scores, np.take_along_axis(expected, order, axis=1))


@given(
    st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9), st.sampled_from([None, 1, 4, 7])
)
def test_approximate_top_k_is_the_best_of_each_run(seed, k, run_size, block_size):
    queries, candidates = integers(seed, 3, k * run_size)
    scores, indices = top_k_scores(queries, candidates, k, approximate=True, block_size=block_size)
    runs = (queries @ candidates.T).reshape([3, k, run_size])
    np.testing.assert_array_equal(scores, runs.max(axis=2))
    np.testing.assert_array_equal(indices, runs.argmax(axis=2) + run_size * np.arange(k))
    expected = util.approximate_top_k_with_indices(queries @ candidates.T, k)
    np.testing.assert_array_equal(indices, expected[1])


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("block_size", [None, 3])
def test_inadmissible_candidates_are_not_found(approximate, block_size):
    queries, candidates = integers(0, 2, 8)
    mask = np.array([0, 0, 1, 0, 0, 0, 1, 1], bool)
    scores, indices = top_k_scores(
        queries, candidates, 4, approximate=approximate, candidate_mask=mask, block_size=block_size
    )
    found = indices.numpy() >= 0
    assert set(indices.numpy()[found]) <= {2, 6, 7}
    np.testing.assert_array_equal(found, np.isfinite(scores))
    if approximate:
        # Runs {0, 1} and {4, 5} have no admissible candidate.
        np.testing.assert_array_equal(found, [[False, True, False, True]] * 2)
    else:
        np.testing.assert_array_equal(found, [[True, True, True, False]] * 2)


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize(["device", "jit_compile"], [("CPU", False), ("CPU", True), ("GPU", False)])
def test_compiles_on_a_variable(approximate, device, jit_compile, monkeypatch):
    monkeypatch.setattr(_execution, "device_type", lambda like=None: device)
    queries, candidates = integers(1, 4, 96)
    variable = tf.Variable(candidates)
    function = tf.function(
        lambda q: top_k_scores(q, variable, 6, approximate=approximate, block_size=20),
        jit_compile=jit_compile,
    )
    scores, indices = function(tf.constant(queries))
    expected = top_k_scores(queries, candidates, 6, approximate=approximate)
    np.testing.assert_array_equal(scores, expected[0])
    np.testing.assert_array_equal(indices, expected[1])


@pytest.mark.parametrize(
    ("k", "approximate", "message"),
    [(0, False, "k = 0"), (11, False, "k = 11 and 10"), (3, True, "must divide.*k = 3 and 10")],
)
def test_bad_k_is_named(k, approximate, message):
    queries, candidates = integers(0, 2, 10)
    with pytest.raises(ValueError, match=message):
        top_k_scores(queries, candidates, k, approximate=approximate)
