import itertools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from negative_cache.ops import product_quantizer as pq


def random_codebooks(rng, num_subspaces=3, num_codes=5, part_dim=2):
    return rng.standard_normal([num_subspaces, num_codes, part_dim]).astype("f")


def train(vectors, num_subspaces, num_codes=256, seed=0):
    return pq.train_codebooks(
        vectors,
        num_subspaces,
        num_codes=num_codes,
        iterations=10,
        rng=np.random.default_rng(seed),
    )


class TestTrainCodebooks:
    def test_every_subspace_has_its_own_codes(self):
        # Part 0 takes the values ±1 and part 1 the values ±10, in all four combinations.
        vectors = np.array(list(itertools.product([-1.0, 1.0], [-10.0, 10.0])) * 5, "f")
        for seed in range(20):
            codebooks = train(vectors, 2, num_codes=3, seed=seed)
            assert codebooks.shape == (2, 3, 1) and codebooks.dtype == np.float32
            if all(len(np.unique(np.sign(codebook))) == 2 for codebook in codebooks):
                np.testing.assert_allclose(np.unique(codebooks[0]), [-1.0, 1.0])
                np.testing.assert_allclose(np.unique(codebooks[1]), [-10.0, 10.0])
                return
        raise AssertionError("No codebook has codes for both values.")

    def test_more_codes_lose_less(self):
        vectors = np.random.default_rng(0).standard_normal([2000, 8]).astype("f")
        errors = []
        for num_subspaces, num_codes in [(2, 4), (2, 32), (4, 32), (4, 256)]:
            codebooks = train(vectors, num_subspaces, num_codes)
            decoded = pq.dequantize(pq.quantize(vectors, codebooks), codebooks)
            errors.append(np.mean((vectors - decoded.numpy()) ** 2))
        assert errors == sorted(errors, reverse=True)
        # A two-dimensional Gaussian in 256 codes: rate-distortion theory says 1/256 at the best.
        assert errors[0] < 0.75 and 1 / 256 < errors[-1] < 0.05

    def test_fewer_vectors_than_codes_lose_nothing(self):
        vectors = np.random.default_rng(0).standard_normal([10, 6]).astype("f")
        codebooks = train(vectors, 3)
        assert codebooks.shape == (3, 256, 2)
        decoded = pq.dequantize(pq.quantize(vectors, codebooks), codebooks)
        np.testing.assert_allclose(decoded, vectors, atol=1e-6)
        np.testing.assert_array_equal(train(vectors[:0], 3), np.zeros([3, 256, 2]))

    @pytest.mark.parametrize(
        ("shape", "num_subspaces", "num_codes", "message"),
        [
            ([9, 6], 4, 256, r"num_subspaces = 4 and shape \(9, 6\)"),
            ([9, 6], 0, 256, r"num_subspaces = 0 and shape \(9, 6\)"),
            ([9, 6], 3, 257, "`num_codes` must lie between 1 and 256. Received: 257"),
            ([9, 6], 3, 0, "`num_codes` must lie between 1 and 256. Received: 0"),
            ([9], 3, 256, r"`vectors` must have shape \[n, d\]. Received shape: \(9,\)"),
        ],
    )
    def test_refuses_what_does_not_fit(self, shape, num_subspaces, num_codes, message):
        with pytest.raises(ValueError, match=message):
            train(np.zeros(shape, "f"), num_subspaces, num_codes)


class TestCodes:
    @given(st.integers(0, 2**31), st.sampled_from([(), (7,), (2, 3), (0,)]))
    def test_quantize_takes_the_nearest_code_of_each_part(self, seed, leading):
        rng = np.random.default_rng(seed)
        codebooks = random_codebooks(rng)
        vectors = rng.standard_normal([*leading, 6]).astype("f")
        codes = pq.quantize(vectors, codebooks)
        parts = vectors.reshape([*leading, 3, 1, 2])
        expected = ((parts - codebooks) ** 2).sum(axis=-1).argmin(axis=-1)
        assert codes.dtype == tf.uint8
        np.testing.assert_array_equal(codes, expected)

    @given(st.integers(0, 2**31), st.sampled_from([(), (7,), (2, 3), (0,)]))
    def test_dequantize_puts_the_codes_side_by_side(self, seed, leading):
        rng = np.random.default_rng(seed)
        codebooks = random_codebooks(rng)
        codes = rng.integers(0, 5, [*leading, 3]).astype(np.uint8)
        expected = [codebooks[part][codes[..., part]] for part in range(3)]
        vectors = pq.dequantize(codes, codebooks)
        assert vectors.dtype == tf.float32
        np.testing.assert_array_equal(vectors, np.concatenate(expected, axis=-1))
        np.testing.assert_array_equal(pq.quantize(vectors, codebooks), codes)

    def test_all_codes_fit_into_a_byte(self):
        codebooks = np.arange(256, dtype="f").reshape([1, 256, 1])
        codes = pq.quantize(codebooks[0], codebooks)
        np.testing.assert_array_equal(codes[:, 0], np.arange(256))
        np.testing.assert_array_equal(pq.dequantize(codes, codebooks), codebooks[0])

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_lookups_are_inner_products_with_the_decoded_vectors(self, jit_compile):
        rng = np.random.default_rng(0)
        codebooks = random_codebooks(rng)
        queries = rng.standard_normal([4, 6]).astype("f")
        codes = rng.integers(0, 5, [4, 9, 3]).astype(np.uint8)

        @tf.function(jit_compile=jit_compile)
        def score(queries, codes):
            return pq.lookup_scores(pq.lookup_tables(queries, codebooks), codes)

        decoded = pq.dequantize(codes, codebooks)
        expected = np.einsum("bd,bnd->bn", queries, decoded)
        np.testing.assert_allclose(score(queries, codes), expected, rtol=1e-5, atol=1e-5)

    def test_compiles_and_takes_a_batch_of_unknown_size(self):
        rng = np.random.default_rng(0)
        codebooks = random_codebooks(rng)
        vectors = rng.standard_normal([7, 2, 6]).astype("f")

        def code_and_decode(vectors):
            codes = pq.quantize(vectors, codebooks)
            return codes, pq.dequantize(codes, codebooks)

        expected_codes, expected_vectors = code_and_decode(vectors)
        spec = [tf.TensorSpec([None, 2, 6], tf.float32)]
        for function in (
            tf.function(code_and_decode, input_signature=spec),
            tf.function(code_and_decode, jit_compile=True),
        ):
            codes, decoded = function(tf.constant(vectors))
            np.testing.assert_array_equal(codes, expected_codes)
            np.testing.assert_array_equal(decoded, expected_vectors)

    def test_half_precision_is_computed_in_float32(self):
        rng = np.random.default_rng(0)
        codebooks = random_codebooks(rng)
        vectors = tf.cast(rng.standard_normal([7, 6]), tf.bfloat16)
        exact = tf.cast(vectors, tf.float32)
        np.testing.assert_array_equal(
            pq.quantize(vectors, codebooks), pq.quantize(exact, codebooks)
        )
        tables = pq.lookup_tables(vectors, codebooks)
        np.testing.assert_array_equal(tables, pq.lookup_tables(exact, codebooks))

    @pytest.mark.parametrize(
        ("function", "shape", "name", "size"),
        [
            (pq.quantize, [4, 5], "vectors", 6),
            (pq.quantize, [], "vectors", 6),
            (pq.dequantize, [4, 6], "codes", 3),
            (pq.lookup_tables, [4, 3], "queries", 6),
            (lambda codes, codebooks: pq.lookup_scores(codebooks, codes), [3, 4, 2], "codes", 5),
        ],
    )
    def test_refuses_dimensions_that_do_not_fit(self, function, shape, name, size):
        codebooks = random_codebooks(np.random.default_rng(0))
        with pytest.raises(ValueError, match=f"`{name}` must have a last dimension of {size}.*"):
            function(np.zeros(shape, np.uint8), codebooks)
