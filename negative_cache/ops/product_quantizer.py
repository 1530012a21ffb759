"""Product quantisation: vectors in a few bytes, scored by table look-ups (Jégou et al., 2011).

A vector x of d dimensions is divided into m parts. Part j is replaced by the nearest entry of its
own codebook c_j. The numbers of these entries are the vector's code, of m bytes. An inner product
becomes a sum over the parts,

  ⟨q, x⟩ ≈ Σ_j ⟨q_j, c_j[code_j(x)]⟩,

and its terms are looked up in a table that is made once per query. Codebooks are
[m, num_codes, d / m] float32 throughout. Codes have no gradient.
"""

import numpy as np
import tensorflow as tf

from negative_cache.ops._clustering import lloyd

# A code is one uint8 per part.
_MAX_CODES = 256


def train_codebooks(
    vectors: np.ndarray,
    num_subspaces: int,
    *,
    num_codes: int = _MAX_CODES,
    iterations: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Trains codebooks by k-means in every subspace, in NumPy on the host.

    Args:
      vectors: [n, d] float, a sample. If n <= `num_codes`, the codebooks hold all parts exactly.
      num_subspaces: m, which must divide d.
      num_codes: number of entries per codebook, at most 256.
      iterations: number of k-means iterations.
      rng: draws the first entries.

    Returns:
      [m, num_codes, d / m] float32; zero if there are no vectors.

    Raises:
      ValueError: if `vectors` is not a matrix, `num_subspaces` does not divide d, or `num_codes` is
        out of range.
    """
    if vectors.ndim != 2:
        raise ValueError(f"`vectors` must have shape [n, d]. Received shape: {vectors.shape}.")
    if num_subspaces < 1 or vectors.shape[1] % num_subspaces:
        raise ValueError(
            "`num_subspaces` must divide the dimension of `vectors`. Received: num_subspaces ="
            f" {num_subspaces} and shape {vectors.shape}."
        )
    if not 1 <= num_codes <= _MAX_CODES:
        raise ValueError(f"`num_codes` must lie between 1 and {_MAX_CODES}. Received: {num_codes}.")
    codebooks = [
        lloyd(part, num_codes, iterations=iterations, rng=rng)[1]
        for part in np.split(vectors, num_subspaces, axis=1)
    ]
    return np.stack(codebooks)


def quantize(vectors: tf.Tensor, codebooks: tf.Tensor) -> tf.Tensor:
    """Codes every vector by the nearest codebook entry of each of its parts.

    Among equally near entries, the one with the smallest number is taken. The function computes
    m · num_codes scores per vector at once. So quantise many vectors in blocks.

    Args:
      vectors: [..., d] float.
      codebooks: [m, num_codes, d / m] float32.

    Returns:
      [..., m] uint8.

    Raises:
      ValueError: if the dimensions do not fit.
    """
    vectors, codebooks = _as_float32(vectors), _as_float32(codebooks)
    parts = _split(vectors, codebooks, "vectors")
    shape = tf.shape(parts)[:-1]
    parts = tf.transpose(tf.reshape(parts, [-1, *codebooks.shape[::2]]), [1, 0, 2])
    # ‖x - c‖² = ‖x‖² - 2(⟨x, c⟩ - ½‖c‖²), and the first term is the same for all entries c.
    half_norms = 0.5 * tf.reduce_sum(tf.square(codebooks), axis=2)
    scores = tf.matmul(parts, codebooks, transpose_b=True) - half_norms[:, tf.newaxis]
    codes = tf.transpose(tf.argmax(scores, axis=2, output_type=tf.int32))
    return tf.reshape(tf.cast(codes, tf.uint8), shape)


def dequantize(codes: tf.Tensor, codebooks: tf.Tensor) -> tf.Tensor:
    """Returns the approximate vectors that the codes represent.

    Args:
      codes: [..., m] uint8.
      codebooks: [m, num_codes, d / m] float32.

    Returns:
      [..., d] float32.

    Raises:
      ValueError: if the dimensions do not fit.
    """
    codes, codebooks = tf.convert_to_tensor(codes), _as_float32(codebooks)
    num_subspaces, num_codes, part_dim = codebooks.shape
    _check_last_dimension(codes, num_subspaces, "codes", codebooks)
    parts = tf.gather(
        tf.reshape(codebooks, [num_subspaces * num_codes, part_dim]),
        _flat_codes(codes, num_codes),
    )
    return tf.reshape(parts, tf.concat([tf.shape(codes)[:-1], [num_subspaces * part_dim]], axis=0))


def lookup_tables(queries: tf.Tensor, codebooks: tf.Tensor) -> tf.Tensor:
    """Computes the inner products of every query's parts with all codebook entries.

    Args:
      queries: [B, d] float.
      codebooks: [m, num_codes, d / m] float32.

    Returns:
      [B, m, num_codes] float32.

    Raises:
      ValueError: if the dimensions do not fit.
    """
    queries, codebooks = _as_float32(queries), _as_float32(codebooks)
    return tf.einsum("bmd,mcd->bmc", _split(queries, codebooks, "queries"), codebooks)


def lookup_scores(tables: tf.Tensor, codes: tf.Tensor) -> tf.Tensor:
    """Computes the inner products of each query with its own quantised vectors.

    With XLA this is ten times faster than without, and no [B, n, m] array exists.

    Args:
      tables: [B, m, num_codes] float32, the `lookup_tables` of the queries.
      codes: [B, n, m] uint8.

    Returns:
      [B, n] float32.

    Raises:
      ValueError: if the dimensions do not fit.
    """
    tables, codes = tf.convert_to_tensor(tables), tf.convert_to_tensor(codes)
    _, num_subspaces, num_codes = tables.shape
    _check_last_dimension(codes, num_subspaces, "codes", tables)
    flat_tables = tf.reshape(tables, [-1, num_subspaces * num_codes])
    terms = tf.gather(flat_tables, _flat_codes(codes, num_codes), batch_dims=1)
    return tf.reduce_sum(terms, axis=2)


def _as_float32(values: np.ndarray | tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.convert_to_tensor(values), tf.float32)


def _split(vectors: tf.Tensor, codebooks: tf.Tensor, name: str) -> tf.Tensor:
    """Reshapes `vectors` [..., d] to [..., m, d / m]."""
    num_subspaces, _, part_dim = codebooks.shape
    _check_last_dimension(vectors, num_subspaces * part_dim, name, codebooks)
    shape = tf.concat([tf.shape(vectors)[:-1], [num_subspaces, part_dim]], axis=0)
    return tf.reshape(vectors, shape)


def _flat_codes(codes: tf.Tensor, num_codes: int) -> tf.Tensor:
    """[..., m] int32, the index of every code in the concatenation of all codebooks."""
    return tf.cast(codes, tf.int32) + num_codes * tf.range(codes.shape[-1])


def _check_last_dimension(values: tf.Tensor, size: int, name: str, other: tf.Tensor) -> None:
    if values.shape.rank == 0 or values.shape[-1] != size:
        raise ValueError(
            f"`{name}` must have a last dimension of {size} for codebooks or tables of shape"
            f" {other.shape}. Received shape: {values.shape}."
        )
