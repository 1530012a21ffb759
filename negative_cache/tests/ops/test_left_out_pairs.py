"""Tests of pairs that are left out by id: they are those that a comparison of all pairs finds."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from negative_cache.ops import _block_scorer, _execution, sample_softmax_with_gradient
from negative_cache.ops._left_out_pairs import LeftOutPairs
from negative_cache.tests.statistics import assert_draws_follow

# Few ids, so that they repeat; some are equal in their low 16 bits, or in their low 32 bits.
small_ids = st.builds(
    lambda low, high: low + high, st.integers(-3, 3), st.sampled_from([0, 2**16, -(2**16), 2**20])
)
large_ids = st.builds(
    lambda low, high: low + high,
    small_ids,
    st.sampled_from([0, 2**32, -(2**40), 2**63 - 2**21, -(2**63) + 2**21]),
)


@st.composite
def problems(draw):
    """Ids of candidates [C] and of queries [B, P], of one dtype."""
    dtype, ids = draw(st.sampled_from([(tf.int32, small_ids), (tf.int64, large_ids)]))
    num_queries, num_ids = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    candidates = draw(st.lists(ids, max_size=12))
    wanted = draw(st.lists(ids, min_size=num_queries * num_ids, max_size=num_queries * num_ids))
    wanted = np.array(wanted, dtype.as_numpy_dtype).reshape([num_queries, num_ids])
    return np.array(candidates, dtype.as_numpy_dtype), wanted


def compared(candidates, wanted):
    """[B, C] bool, whether each candidate has one of the ids of each query."""
    return np.any(candidates[np.newaxis, :, np.newaxis] == wanted[:, np.newaxis], axis=2)


def as_mask(pairs, shape):
    """[B, C] bool of the pairs; all of them are in range."""
    mask = np.zeros(shape, bool)
    candidates, queries = pairs.candidates.numpy(), pairs.queries.numpy()
    assert np.all((candidates >= 0) & (queries >= 0))
    mask[queries, candidates] = True
    return mask


@given(problems())
def test_the_pairs_are_those_of_a_comparison_of_all(problem):
    candidates, wanted = problem
    pairs = LeftOutPairs.of(tf.constant(candidates), tf.constant(wanted))
    expected = compared(candidates, wanted)
    np.testing.assert_array_equal(as_mask(pairs, expected.shape), expected)
    assert np.all(np.diff(pairs.candidates.numpy()) >= 0)


@given(problems(), st.integers(1, 5), st.booleans())
def test_blocks_have_their_pairs(problem, block_size, as_tensors):
    candidates, wanted = problem
    pairs = LeftOutPairs.of(tf.constant(candidates), tf.constant(wanted))
    expected = compared(candidates, wanted)
    for start in range(0, len(candidates), block_size):
        size = min(block_size, len(candidates) - start)
        place = (tf.constant(start), tf.constant(size)) if as_tensors else (start, size)
        part = expected[:, start : start + size]
        scores = np.random.default_rng(0).normal(size=part.shape).astype(np.float32)
        changed = pairs.between(*place).set_to(tf.constant(scores), -7.0)
        np.testing.assert_array_equal(changed, np.where(part, np.float32(-7.0), scores))


def test_of_candidates_that_are_all_left_out_none_is_missed():
    candidates, wanted = np.full([500], 7), np.full([40, 3], 7)
    pairs = LeftOutPairs.of(tf.constant(candidates), tf.constant(wanted))
    assert np.all(as_mask(pairs, [40, 500]))


def test_sizes_may_be_unknown():
    @tf.function(
        input_signature=[tf.TensorSpec([None], tf.int64)] + [tf.TensorSpec([None, None], tf.int64)]
    )
    def mask(candidates, wanted):
        scores = tf.zeros([tf.shape(wanted)[0], tf.size(candidates)])
        return LeftOutPairs.of(candidates, wanted).set_to(scores, 1.0)

    rng = np.random.default_rng(0)
    for num_candidates, num_queries, num_ids in ((30, 4, 2), (5, 0, 2), (5, 3, 0), (0, 3, 1)):
        candidates = rng.integers(5, size=num_candidates)
        wanted = rng.integers(8, size=[num_queries, num_ids])
        np.testing.assert_array_equal(mask(candidates, wanted), compared(candidates, wanted))


# In `sample_softmax`, of so many candidates that pairs are looked for.

QUERIES, CANDIDATES, DIM = 5, 2500, 4


def problem_of(dtype="int64", num_ids=2):
    """Queries, candidates, and ids: many candidates with one id, and ids that are nobody's."""
    rng = np.random.default_rng(0)
    queries = rng.normal(size=[QUERIES, DIM]).astype(np.float32)
    candidates = rng.normal(size=[CANDIDATES, DIM]).astype(np.float32)
    info = np.iinfo(dtype)
    values = np.array([info.min, info.min // 2, 0, 1, 3, info.max // 2, info.max], dtype)
    ids = rng.choice(values, size=CANDIDATES)
    wanted = rng.choice(values, size=[QUERIES, num_ids])
    wanted[0] = 2
    return queries, candidates, ids, wanted


def masks():
    """None, a mask that leaves out nothing, and one that does."""
    return [None, np.ones([CANDIDATES], bool), np.arange(CANDIDATES) % 7 > 0]


def by_formula(queries, candidates, left_out):
    """log Z [B], its gradient [B, d] and P [B, C], in float64."""
    scores = queries.astype(np.float64) @ candidates.astype(np.float64).T
    scores[left_out] = -np.inf
    log_partition = np.logaddexp.reduce(scores, axis=1)
    law = np.exp(scores - log_partition[:, np.newaxis])
    return log_partition, law @ candidates, law


@pytest.fixture
def joined(monkeypatch):
    """Whether ids were joined, in the order of the calls, and on how many candidates."""
    seen = []
    exact = LeftOutPairs.of.__func__

    def spy(cls, candidate_ids, positive_ids):
        seen.append(candidate_ids.shape[0])
        return exact(cls, candidate_ids, positive_ids)

    monkeypatch.setattr(LeftOutPairs, "of", classmethod(spy))
    return seen


# One block; one that does not divide the candidates; many.
@pytest.mark.parametrize("block_size", [None, 700, 64])
@pytest.mark.parametrize("mask", range(3))
@pytest.mark.parametrize("in_graph", [False, True])
def test_many_candidates_are_left_out_as_few_are(block_size, mask, in_graph, joined):
    queries, candidates, ids, wanted = problem_of()
    mask = masks()[mask]
    variable = tf.Variable(candidates)

    def sample(queries, wanted):
        return sample_softmax_with_gradient(
            queries,
            variable,
            num_samples=50,
            candidate_ids=ids,
            positive_ids=wanted,
            candidate_mask=mask,
            block_size=block_size,
            seed=3,
        )

    if in_graph:
        unknown = [tf.TensorSpec([None, DIM]), tf.TensorSpec([None, 2], tf.int64)]
        sample = tf.function(sample, input_signature=unknown)
        empty, no_gradient = sample(queries[:0], wanted[:0])
        assert empty.indices.shape == [0, 50] and no_gradient.shape == [0, DIM]
    found, gradient = sample(queries, wanted)
    assert joined == [CANDIDATES]
    left_out = compared(ids, wanted)
    if mask is not None:
        left_out |= ~mask
    log_partition, expected, law = by_formula(queries, candidates, left_out)
    np.testing.assert_allclose(found.log_partition, log_partition, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-5)
    for drawn, out, its_law in zip(found.indices.numpy(), left_out, law):
        assert not np.any(out[drawn])
        # The chi-square test pools all but the likely ones.
        assert_draws_follow(drawn, its_law)


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
)
def test_ids_of_every_dtype_are_left_out(dtype, joined):
    queries, candidates, ids, wanted = problem_of(dtype)
    found, _ = sample_softmax_with_gradient(
        queries, candidates, candidate_ids=ids, positive_ids=wanted
    )
    assert joined == [CANDIDATES]
    log_partition, _, _ = by_formula(queries, candidates, compared(ids, wanted))
    np.testing.assert_allclose(found.log_partition, log_partition, rtol=1e-5)


def test_strings_are_left_out_by_comparison(joined):
    queries, candidates, ids, wanted = problem_of()
    found, _ = sample_softmax_with_gradient(
        queries, candidates, candidate_ids=ids.astype(str), positive_ids=wanted.astype(str)
    )
    assert joined == []
    log_partition, _, _ = by_formula(queries, candidates, compared(ids, wanted))
    np.testing.assert_allclose(found.log_partition, log_partition, rtol=1e-5)


@pytest.mark.parametrize("place", ["CPU", "GPU", "XLA"])
def test_draws_are_those_of_a_comparison_of_all_pairs(place, joined, monkeypatch):
    queries, candidates, ids, wanted = problem_of(num_ids=3)
    device = "GPU" if place == "GPU" else "CPU"
    monkeypatch.setattr(_execution, "device_type", lambda like=None: device)
    sample = functools.partial(
        sample_softmax_with_gradient,
        queries,
        candidates,
        num_samples=20,
        candidate_ids=ids,
        positive_ids=wanted,
        candidate_mask=masks()[2],
        block_size=512,
        seed=5,
    )
    found, gradient = tf.function(sample, jit_compile=place == "XLA")()
    # Of an accelerator it would make several kernels, and a computation on the host.
    assert joined == ([CANDIDATES] if place == "CPU" else [])
    monkeypatch.setattr(_block_scorer, "_MANY_CANDIDATES", CANDIDATES + 1)
    # XLA's random numbers may be others.
    expected, expected_gradient = tf.function(sample, jit_compile=place == "XLA")()
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.log_partition, expected.log_partition, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("num_candidates", [2047, 2048])
@pytest.mark.parametrize("in_graph", [False, True])
def test_a_mask_that_becomes_full_is_read_each_time(num_candidates, in_graph):
    queries, candidates, _, _ = problem_of()
    candidates = candidates[:num_candidates]
    filled = tf.Variable(np.arange(num_candidates) < 10)

    def log_partition():
        sample, _ = sample_softmax_with_gradient(queries, candidates, candidate_mask=filled)
        return sample.log_partition

    log_partition = tf.function(log_partition) if in_graph else log_partition
    for count in (10, num_candidates - 1, num_candidates, 0):
        filled.assign(np.arange(num_candidates) < count)
        left_out = np.broadcast_to(~filled.numpy(), [QUERIES, num_candidates])
        with np.errstate(invalid="ignore"):
            expected, _, _ = by_formula(queries, candidates, left_out)
        np.testing.assert_allclose(log_partition(), expected, rtol=1e-5)


def test_a_query_that_everything_is_left_out_of_draws_nothing():
    queries, candidates, ids, wanted = problem_of()
    ids[:] = wanted[1, 0]
    found, gradient = sample_softmax_with_gradient(
        queries, candidates, candidate_ids=ids, positive_ids=wanted
    )
    is_empty = np.all(compared(ids, wanted), axis=1)
    assert is_empty[1] and not is_empty[0]
    np.testing.assert_array_equal(found.indices[:, 0] == -1, is_empty)
    np.testing.assert_array_equal(np.isneginf(found.log_partition), is_empty)
    np.testing.assert_array_equal(np.all(gradient.numpy() == 0.0, axis=1), is_empty)


def test_the_scorer_of_some_queries_leaves_out_theirs():
    queries, candidates, ids, wanted = problem_of()
    scorer = _block_scorer.BlockScorer(
        queries, candidates, candidate_ids=tf.constant(ids), positive_ids=tf.constant(wanted)
    )
    block, chosen = scorer.read_block(0, CANDIDATES), [4, 0, 4]
    scores, _ = scorer.score_block(block, 0, CANDIDATES)
    part, _ = scorer.of_queries(tf.constant(chosen)).score_block(block, 0, CANDIDATES)
    np.testing.assert_allclose(part, scores.numpy()[chosen], rtol=1e-4, atol=1e-5)
    left_out = part.numpy() == _block_scorer.INADMISSIBLE
    np.testing.assert_array_equal(left_out, compared(ids, wanted)[chosen])
