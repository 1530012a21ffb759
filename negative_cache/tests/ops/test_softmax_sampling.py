import functools
import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from negative_cache.ops import (
    SoftmaxSample,
    _execution,
    merge_samples,
    sample_softmax,
    sample_softmax_with_gradient,
)
from negative_cache.tests.statistics import assert_draws_follow

QUERIES, CANDIDATES, DIM = 3, 50, 4


@pytest.fixture(autouse=True, params=["CPU", "GPU"])
def device_type(request, monkeypatch):
    """Draws as on a CPU, and as on a GPU: by other code, of the same law."""
    monkeypatch.setattr(_execution, "device_type", lambda like=None: request.param)
    return request.param


def random_problem(seed=0, queries=QUERIES, candidates=CANDIDATES, dim=DIM):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(queries, dim)).astype("f"), rng.normal(size=(candidates, dim)).astype(
        "f"
    )


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def log_sum_exp(scores):
    peak = scores.max(axis=1)
    return peak + np.log(np.exp(scores - peak[:, None]).sum(axis=1))


def assert_law(query, candidates, scores, *, draws=20_000, **kwargs):
    """Asserts that the draws of one query [d] follow the softmax of `scores` [C]."""
    sample = sample_softmax(
        np.repeat(query[None], 100, axis=0), candidates, num_samples=draws // 100, seed=3, **kwargs
    )
    assert_draws_follow(sample.indices.numpy(), softmax(scores))
    np.testing.assert_allclose(sample.log_partition, log_sum_exp(scores[None])[0], rtol=1e-5)
    np.testing.assert_allclose(sample.scores, scores[sample.indices.numpy()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_size", [None, 1, 7, 16, 50, 64])
def test_draws_follow_the_softmax_whatever_the_blocks(block_size):
    queries, candidates = random_problem()
    for query in queries:
        assert_law(query, candidates, candidates @ query, block_size=block_size)


def test_draws_follow_the_softmax_over_many_blocks_and_groups():
    queries, candidates = random_problem(candidates=1500)
    assert_law(queries[0], candidates, candidates @ queries[0], block_size=256)


def test_draws_of_one_query_are_independent():
    queries, candidates = random_problem(candidates=6)
    sample = sample_softmax(
        np.repeat(queries[:1], 20_000, axis=0), candidates, num_samples=2, seed=5
    )
    p = softmax(candidates @ queries[0])
    pairs = sample.indices.numpy() @ [6, 1]
    assert_draws_follow(pairs, np.outer(p, p).reshape(-1))


def test_masks_weights_and_transforms_shape_the_law():
    queries, candidates = random_problem(candidates=40)
    rng = np.random.default_rng(1)
    mask, weights, ids = rng.random(40) < 0.7, rng.normal(size=40).astype("f"), np.arange(40) // 2
    scores = np.tanh((2 * candidates) @ queries[0]) * 3
    scores = np.where(scores <= 2.5, scores, -np.inf) + weights
    scores = np.where(mask & (ids != 4), scores, -np.inf)
    assert np.isfinite(scores).sum() > 10
    assert_law(
        queries[0],
        candidates,
        scores,
        block_size=16,
        score_transform=lambda s: tf.tanh(s) * 3,
        embedding_transform=lambda block: block * 2,
        candidate_mask=mask,
        log_weights=weights,
        candidate_ids=ids,
        positive_ids=np.full(100, 4),
        max_scores=np.full(100, 2.5),
    )


def test_what_the_limit_leaves_out_is_not_drawn_however_near_it_is():
    # The best candidate is above the limit by less than scores may differ when computed again, and
    # has ten thousand times the mass of all others.
    queries, candidates = random_problem(queries=64, candidates=200)
    scores = queries.astype("d") @ candidates.T.astype("d")
    best = scores.argmax(axis=1)
    scale = (12.0 / (np.sort(scores, axis=1)[:, -1] - np.sort(scores, axis=1)[:, -2]))[:, None]
    queries, scores = (scale * queries).astype("f"), scale * scores
    limits = (scores.max(axis=1) * (1.0 - 3e-5)).astype("f")
    sample = sample_softmax(queries, candidates, num_samples=50, max_scores=limits, seed=1)
    assert np.all(sample.indices.numpy() != best[:, None])
    scores[np.arange(64), best] = -np.inf
    np.testing.assert_allclose(sample.log_partition, log_sum_exp(scores), rtol=1e-4)
    assert np.all(sample.scores - sample.log_partition[:, None] < 1e-3)


def test_copies_of_the_limit_are_drawn_as_the_partition_counts_them():
    # Half of the candidates score exactly the limit, as the copies of a positive do.
    queries, candidates = random_problem(queries=64, candidates=512, dim=16)
    candidates[::2] = candidates[0]
    limits = np.einsum("bd,d->b", 3.0 * queries, candidates[0])
    sample = sample_softmax(3.0 * queries, candidates, num_samples=50, max_scores=limits, seed=1)
    assert np.all(sample.indices.numpy() >= 0)
    assert np.all(sample.scores - sample.log_partition[:, None] < 1e-3)


@pytest.mark.parametrize("transform", [None, tf.tanh])
def test_what_masked_rows_hold_is_of_no_consequence(transform):
    queries, candidates = random_problem()
    mask = np.arange(CANDIDATES) % 3 > 0
    dirty = np.where(mask[:, None], candidates, np.nan).astype("f")
    results = [
        sample_softmax_with_gradient(
            queries, rows, candidate_mask=mask, score_transform=transform, block_size=16, seed=1
        )
        for rows in (candidates, dirty)
    ]
    for clean, other in zip(tf.nest.flatten(results[0]), tf.nest.flatten(results[1])):
        np.testing.assert_allclose(clean, other, rtol=1e-5, atol=1e-6)


# Of 40 rows: one block, blocks that do not divide it, and single rows.
@pytest.mark.parametrize("block_size", [None, 7, 1])
@pytest.mark.parametrize("as_variable", [False, True])
def test_rows_are_transformed_each_in_its_own_way(block_size, as_variable):
    queries, candidates = random_problem(candidates=40)
    scale, shift = np.random.default_rng(2).normal(size=[2, 40, 1]).astype("f")

    def transform(block, rows):
        assert block.shape[0] == rows.shape[0] and rows.dtype == tf.int32
        return block * tf.gather(scale, rows) + tf.gather(shift, rows)

    moved = candidates * scale + shift
    assert_law(
        queries[0],
        tf.Variable(candidates) if as_variable else candidates,
        moved @ queries[0],
        block_size=block_size,
        row_transform=transform,
    )


def test_the_gradient_is_that_of_transformed_rows():
    queries, candidates = random_problem(candidates=40)
    scale = np.random.default_rng(2).normal(size=[40, 1]).astype("f")
    _, gradient = sample_softmax_with_gradient(
        queries,
        candidates,
        row_transform=lambda block, rows: block * tf.gather(scale, rows),
        block_size=16,
    )
    moved = candidates * scale
    expected = [softmax(moved @ query) @ moved for query in queries]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_embeddings_are_transformed_in_one_way_only():
    queries, candidates = random_problem()
    with pytest.raises(ValueError, match="`embedding_transform` and `row_transform` exclude each"):
        sample_softmax(
            queries,
            candidates,
            embedding_transform=lambda block: block,
            row_transform=lambda block, rows: block,
        )


@pytest.mark.parametrize("ids", [[b"a", b"b", b"a"], np.array([5, 6, 5], np.int32)])
def test_a_query_never_draws_its_own_positive(ids):
    queries, candidates = random_problem(queries=200, candidates=3)
    positive_ids = np.repeat(ids[:1], 200)
    sample = sample_softmax(
        queries, candidates, candidate_ids=ids, positive_ids=positive_ids, num_samples=4
    )
    assert set(sample.indices.numpy().reshape(-1)) == {1}
    np.testing.assert_allclose(sample.log_partition, queries @ candidates[1], rtol=1e-5)


@pytest.mark.parametrize("block_size", [None, 2, 3])
def test_a_query_without_candidates_draws_nothing(block_size):
    queries, candidates = random_problem(candidates=5)
    sample = sample_softmax(
        queries,
        candidates,
        num_samples=2,
        candidate_ids=[7, 7, 7, 7, 7],
        positive_ids=[7, 8, 7],
        block_size=block_size,
    )
    np.testing.assert_array_equal(sample.log_partition[::2], [-math.inf] * 2)
    np.testing.assert_array_equal(sample.indices[::2], -np.ones([2, 2]))
    np.testing.assert_array_equal(sample.scores[::2], np.full([2, 2], -math.inf))
    assert np.all(sample.indices[1] >= 0) and np.isfinite(sample.log_partition[1])


def test_no_candidates_at_all_give_an_empty_sample():
    sample, gradient = sample_softmax_with_gradient(
        tf.ones([2, DIM]), tf.zeros([0, DIM]), num_samples=3
    )
    np.testing.assert_array_equal(sample.log_partition, [-math.inf] * 2)
    np.testing.assert_array_equal(sample.indices, -np.ones([2, 3]))
    np.testing.assert_array_equal(sample.scores, np.full([2, 3], -math.inf))
    np.testing.assert_array_equal(gradient, np.zeros([2, DIM]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("block_size", [None, 16])
def test_a_score_that_is_not_finite_is_seen_in_the_partition_and_nothing_is_drawn(bad, block_size):
    queries, candidates = random_problem()
    candidates[7] = [bad, 0.0, 0.0, 0.0]
    queries[0, 0], queries[1, 0] = 1.0, 2.0
    sample = sample_softmax(queries[:2], candidates, num_samples=3, block_size=block_size)
    # Taken for an empty set of candidates, it would be a loss of zero that nobody notices.
    assert not np.any(sample.log_partition < math.inf)
    np.testing.assert_array_equal(sample.indices, -np.ones([2, 3]))
    candidates[7] = 0.0
    finite = sample_softmax(queries[:2], candidates, num_samples=3)
    merged = merge_samples([sample, finite])
    assert not np.any(merged.log_partition < math.inf)
    np.testing.assert_array_equal(merged.indices, -np.ones([2, 3]))


def test_huge_scores_neither_overflow_nor_lose_the_maximum():
    candidates = np.array([[1e4], [-1e4], [1e4 - 1], [0.0]], "f")
    sample = sample_softmax(
        np.array([[1.0], [-1.0]], "f"), candidates, num_samples=50, block_size=1
    )
    # Query 1: log(exp 1e4 + exp(1e4 - 1)) = 1e4 + log(1 + 1/e); query -1: 1e4 from the second
    # candidate alone.
    np.testing.assert_allclose(
        sample.log_partition, [1e4 + math.log(1 + math.exp(-1)), 1e4], rtol=1e-7
    )
    assert set(sample.indices[0].numpy()) == {0, 2} and set(sample.indices[1].numpy()) == {1}


def test_log_partition_of_a_block_whose_first_candidates_have_no_probability_to_speak_of():
    # Two blocks of 64, each 16 groups of 4 and so 4 groups: log Z is not to be had from the first 4
    # of the second block, whose probabilities are exp(-200).
    candidates = np.full([128, 1], -150.0, "f")
    candidates[68:] = 50.0
    sample = sample_softmax(np.ones([2, 1], "f"), candidates, num_samples=100, block_size=64)
    np.testing.assert_allclose(sample.log_partition, [50.0 + math.log(60)] * 2, rtol=1e-6)
    assert np.all(sample.indices.numpy() >= 68)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("as_variable", [False, True])
def test_log_partition_agrees_with_float64(dtype, as_variable):
    queries, candidates = random_problem(candidates=5000, dim=16)
    candidates = tf.cast(candidates, dtype)
    rounded = tf.cast(candidates, tf.float64).numpy()
    expected = log_sum_exp(queries.astype("d") @ rounded.T)
    stored = tf.Variable(candidates) if as_variable else candidates
    np.testing.assert_allclose(sample_softmax(queries, stored).log_partition, expected, rtol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_compiles_and_is_deterministic_under_a_seed(jit_compile):
    queries, candidates = random_problem(candidates=3000)
    function = tf.function(
        functools.partial(sample_softmax, num_samples=3, seed=[1, 2], block_size=1024),
        jit_compile=jit_compile,
    )
    eager = sample_softmax(queries, candidates, num_samples=3, seed=[1, 2], block_size=1024)
    compiled = function(queries, tf.Variable(candidates))
    np.testing.assert_array_equal(compiled.indices, eager.indices)
    np.testing.assert_allclose(compiled.log_partition, eager.log_partition, rtol=1e-5)
    other = sample_softmax(queries, candidates, num_samples=3, seed=[1, 3], block_size=1024)
    assert np.any(other.indices.numpy() != eager.indices.numpy())


def test_sizes_may_be_unknown_when_traced():
    spec = tf.TensorSpec([None, DIM])
    function = tf.function(
        functools.partial(sample_softmax, seed=1, block_size=16), input_signature=[spec, spec]
    )
    for size in (3, 16, 33):
        queries, candidates = random_problem(candidates=size)
        expected = log_sum_exp(queries @ candidates.T)
        sample = function(queries, candidates)
        np.testing.assert_allclose(sample.log_partition, expected, rtol=1e-5)
        assert np.all((sample.indices.numpy() >= 0) & (sample.indices.numpy() < size))


def test_no_gradient_flows():
    queries, candidates = map(tf.constant, random_problem())
    with tf.GradientTape() as tape:
        tape.watch([queries, candidates])
        sample = sample_softmax(queries, candidates)
        total = tf.reduce_sum(sample.log_partition) + tf.reduce_sum(sample.scores)
    assert tape.gradient(total, [queries, candidates]) == [None, None]


@pytest.mark.parametrize("block_size", [None, 16, 7])
@pytest.mark.parametrize("transform", [None, lambda s: 3 * tf.tanh(s)])
def test_gradient_of_the_log_partition_is_that_of_autodiff(block_size, transform):
    queries, candidates = map(tf.constant, random_problem(candidates=40))
    weights = tf.range(40, dtype=tf.float32) / 10
    ids = tf.range(40) // 2
    with tf.GradientTape() as tape:
        tape.watch(queries)
        products = tf.matmul(queries, 2 * candidates, transpose_b=True)
        scores = products if transform is None else transform(products)
        is_positive = ids[tf.newaxis] == tf.constant([3, 4, 99])[:, tf.newaxis]
        scores = tf.where(is_positive, -math.inf, scores + weights)
        log_partition = tf.reduce_logsumexp(scores, axis=1)
    expected = tape.gradient(log_partition, queries)
    sample, gradient = sample_softmax_with_gradient(
        queries,
        candidates,
        block_size=block_size,
        score_transform=transform,
        embedding_transform=lambda block: 2 * block,
        log_weights=weights,
        candidate_ids=ids,
        positive_ids=[3, 4, 99],
    )
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sample.log_partition, log_partition, rtol=1e-5)


def test_gradient_of_an_empty_log_partition_is_zero():
    queries, candidates = random_problem(candidates=5)
    ids = np.zeros(5, "i")
    _, gradient = sample_softmax_with_gradient(
        queries, candidates, candidate_ids=ids, positive_ids=[0, 1, 0], block_size=2
    )
    np.testing.assert_array_equal(gradient[::2], np.zeros([2, DIM]))
    assert np.any(gradient[1])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 2**31 - 1))
def test_any_split_merges_to_the_whole_log_partition(sizes, seed):
    queries, candidates = random_problem(seed, candidates=sum(sizes))
    ends = np.cumsum(sizes)
    parts = [
        offset(sample_softmax(queries, candidates[end - size : end]), end - size)
        for size, end in zip(sizes, ends, strict=True)
    ]
    merged = merge_samples(parts)
    np.testing.assert_allclose(
        merged.log_partition, log_sum_exp(queries @ candidates.T), rtol=1e-4, atol=1e-5
    )
    scores = np.take_along_axis(queries @ candidates.T, merged.indices.numpy(), axis=1)
    np.testing.assert_allclose(merged.scores, scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grouping", ["flat", "left", "right"])
def test_merged_draws_follow_the_softmax_over_the_union(grouping):
    queries, candidates = random_problem(candidates=12)
    repeated = np.repeat(queries[:1], 200, axis=0)
    a, b, c = (
        offset(sample_softmax(repeated, candidates[start:end], num_samples=100, seed=start), start)
        for start, end in ((0, 2), (2, 9), (9, 12))
    )
    merged = {
        "flat": lambda: merge_samples([a, b, c], seed=100),
        "left": lambda: merge_samples([merge_samples([a, b], seed=100), c], seed=101),
        "right": lambda: merge_samples([a, merge_samples([b, c], seed=100)], seed=101),
    }[grouping]()
    assert_draws_follow(merged.indices.numpy(), softmax(candidates @ queries[0]))


def test_merging_with_an_empty_sample_changes_nothing():
    queries, candidates = random_problem()
    sample = sample_softmax(queries, candidates, num_samples=2)
    empty = sample_softmax(
        queries, candidates, num_samples=2, candidate_mask=np.zeros(CANDIDATES, bool)
    )
    merged = merge_samples([empty, sample])
    np.testing.assert_array_equal(merged.indices, sample.indices)
    np.testing.assert_allclose(merged.log_partition, sample.log_partition, rtol=1e-6)
    nothing = merge_samples([empty, empty])
    np.testing.assert_array_equal(nothing.indices, empty.indices)
    np.testing.assert_array_equal(nothing.log_partition, empty.log_partition)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate_embeddings": np.zeros([5, 3], "f")}, r"\(3, 4\) and \(5, 3\)"),
        (
            {"query_embeddings": np.zeros([4], "f")},
            r"`query_embeddings` must have shape \[rows, dim\].*\(4,\)",
        ),
        ({"candidate_embeddings": np.zeros([5, 4], "i")}, "floating point.*int32"),
        ({"candidate_mask": np.ones(7, bool)}, r"`candidate_mask` must have shape \[50\].*\(7,\)"),
        ({"candidate_mask": np.ones(50, "i")}, "`candidate_mask` must be boolean.*int32"),
        ({"candidate_ids": np.zeros(50, "i")}, "only `candidate_ids`"),
        (
            {"candidate_ids": np.zeros(50, "i"), "positive_ids": np.zeros(3, "i8")},
            "int32 and int64",
        ),
        ({"log_weights": np.zeros([50, 1], "f")}, "`log_weights`"),
        ({"max_scores": np.zeros(50, "f")}, "`max_scores`"),
        ({"num_samples": -1}, "`num_samples`.*-1"),
        ({"block_size": 0}, "`block_size`.*0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    queries, candidates = random_problem()
    arguments = {"query_embeddings": queries, "candidate_embeddings": candidates, **change}
    with pytest.raises(ValueError, match=message):
        sample_softmax(**arguments)


def test_merging_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        merge_samples([])


def offset(sample: SoftmaxSample, start: int) -> SoftmaxSample:
    return sample._replace(indices=sample.indices + start)
