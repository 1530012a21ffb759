"""`NystromCorrector`: applies the drift of a few landmarks to all stale embeddings."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import keras
from negative_cache.layers._dividing import copies
from negative_cache.layers._state import LAYOUT
from negative_cache.layers._variables import make_state_variable, scatter_rows
from negative_cache.layers.drift_corrector import Displacement, DriftCorrector, Encoded
from negative_cache.ops import _execution
from negative_cache.ops import landmarks as _landmarks
from negative_cache.ops.cache_rows import insertion_rows

_LANDMARKS = ("encoded", "uniform", "k-means++")
_KERNELS = ("rbf", "linear")
_SMALLEST_RIDGE = 1e-3


def _landmarks_on(values: Sequence[Mapping[str, np.ndarray]], num_replicas: int) -> list[dict]:
    """The landmarks of the replicas in turn, samples of one law, as no rows of theirs any more."""
    return [
        {**part, "rows": np.full_like(part["rows"], -1)} for part in copies(values, num_replicas)
    ]


@keras.utils.register_keras_serializable("negative_cache")
class NystromCorrector(DriftCorrector):
    """Kernel regression of the drift on landmarks. It needs no training.

    Monath et al. (arXiv 2303.15311). Landmarks Z are candidates with known stale and fresh
    embeddings. The drift of any other candidate is estimated as

      r(ĝ) = k(ĝ, ĝ(Z)) (K_ZZ + λ I)⁻¹ (g(Z) - ĝ(Z)).

    That takes one solve of m equations per step, and a product with m landmarks for each row of the
    cache. `DriftCorrector` defines how r corrects an embedding. The landmarks may have different
    ages; `ops.landmarks.nystrom_coefficients` has the equation for that. The state of the layer is
    the landmarks' stale embeddings, fresh embeddings and ages.

    By default, the landmarks are the rows that training steps have encoded last: draws, refreshed
    rows and, if the cache covers a corpus, positives. They cost no additional encoding. With
    "uniform" and "k-means++", rows of the cache are chosen once, as soon as it holds enough. Every
    step then encodes `num_encoded` of them in turn, in addition to its other rows. They are not
    written back to the cache: a landmark without drift says nothing about the drift of other rows.

    `Corrector` describes how a `TreeIndex` uses the correction.

    Args:
      num_landmarks: m.
      landmarks: "encoded", "uniform" or "k-means++".
      num_encoded: for "uniform" and "k-means++", the number of landmarks that are encoded at each
        step. None encodes all of them, as in the paper.
      kernel: "rbf" is k(u, v) = exp(-‖u - v‖² / 2 b² l²). "linear" is k(u, v) = ⟨u, v⟩ / l² + 1:
        it solves d + 1 equations, and a row costs as much as a layer of width d. l² is the mean
        squared length of the landmarks' stale embeddings.
      bandwidth: b, of the "rbf" kernel.
      ridge: λ >= 0.001.
      warmup_steps: number of training steps before the correction is used.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      >>> task = CachedRetrieval(tower, cache=cache, corrector=NystromCorrector(1024))
    """

    _layout = LAYOUT
    _laws = {**DriftCorrector._laws, "next_slot": copies, "landmarks": _landmarks_on}

    def __init__(
        self,
        num_landmarks: int = 1024,
        *,
        landmarks: str = "encoded",
        num_encoded: int | None = None,
        kernel: str = "rbf",
        bandwidth: float = 2.0,
        ridge: float = 0.1,
        warmup_steps: int = 0,
        **kwargs: Any,
    ):
        super().__init__(warmup_steps=warmup_steps, **kwargs)
        self.num_landmarks = _validation.check_count(num_landmarks, "num_landmarks")
        for name, value, choices in (
            ("landmarks", landmarks, _LANDMARKS),
            ("kernel", kernel, _KERNELS),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {choices}. Received: {value!r}.")
        if not bandwidth > 0:
            raise ValueError(f"`bandwidth` must be positive. Received: {bandwidth}.")
        if not ridge >= _SMALLEST_RIDGE:
            raise ValueError(
                f"`ridge` must be at least {_SMALLEST_RIDGE} for the equations to be solvable in"
                f" float32. Received: {ridge}."
            )
        if num_encoded is not None:
            _validation.check_count(num_encoded, "num_encoded")
            if landmarks == "encoded" or num_encoded > num_landmarks:
                raise ValueError(
                    "`num_encoded` must be at most `num_landmarks`, and cannot be used with"
                    f' landmarks="encoded". Received: num_encoded={num_encoded},'
                    f" num_landmarks={num_landmarks}, landmarks={landmarks!r}."
                )
        self.landmarks, self.num_encoded = landmarks, num_encoded
        self.kernel, self.bandwidth, self.ridge = kernel, bandwidth, ridge

    def displacement_fn(self) -> Displacement:
        weights, stale, length = _execution.as_constant(self._solve, like=self.state_variable)
        if self.kernel == "linear":
            return lambda embeddings, content: tf.matmul(_features(embeddings, length), weights)
        scale = self.bandwidth * length
        return lambda embeddings, content: tf.matmul(
            _landmarks.rbf_kernel(embeddings, stale, scale), weights
        )

    def _solve(self) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns the regression weights, the landmarks' stale embeddings, and the length l."""
        landmarks = {key: tf.convert_to_tensor(v) for key, v in self._state.landmarks.items()}
        is_there = landmarks["age"] >= 0
        stale, fresh = (
            tf.where(is_there[:, tf.newaxis], landmarks[key], 0.0) for key in ("stale", "fresh")
        )
        share = self._share(tf.maximum(landmarks["age"], 0), stale)[:, 0]
        share = tf.where(is_there, share, 0.0)
        count = tf.math.count_nonzero(is_there, dtype=tf.float32)
        length = tf.sqrt(tf.math.divide_no_nan(tf.reduce_sum(tf.square(stale)), count))
        length = tf.where(length > 0.0, length, 1.0)
        if self.kernel == "linear":
            weights = _landmarks.linear_coefficients(
                _features(stale, length), fresh - stale, share, self.ridge
            )
        else:
            kernel = _landmarks.rbf_kernel(stale, stale, self.bandwidth * length)
            weights = _landmarks.nystrom_coefficients(kernel, fresh - stale, share, self.ridge)
        return weights, stale, length

    def rows_to_encode(
        self, embeddings: tf.Variable, filled: tf.Tensor, seed: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor] | None:
        """See `DriftCorrector`. Returns None if the landmarks are rows encoded by the step."""
        if self.landmarks == "encoded":
            return None
        chosen = self._state.landmarks["rows"]
        num_filled = tf.math.count_nonzero(filled)

        def choose() -> tf.Tensor:
            if self.landmarks == "uniform":
                rows = _landmarks.uniform_rows(filled, self.num_landmarks, seed)
            else:
                rows = _landmarks.kmeans_plus_plus_rows(
                    embeddings, filled, self.num_landmarks, seed
                )
            chosen.assign(rows)
            return tf.constant(True)

        are_chosen = chosen[0] >= 0
        are_chosen = tf.cond(
            ~are_chosen & (num_filled >= self.num_landmarks), choose, lambda: are_chosen
        )
        with tf.control_dependencies([are_chosen]):
            rows = tf.gather(chosen, self._next_slots(self.num_encoded or self.num_landmarks))
        return tf.maximum(rows, 0), tf.fill(tf.shape(rows), are_chosen)

    def learn_landmarks(self, encoded: Encoded) -> None:
        """Stores the embeddings of the rows that `rows_to_encode` has chosen."""
        self._remember(encoded, self.num_encoded or self.num_landmarks)

    def _observe(self, encoded: Encoded) -> None:
        if self.landmarks == "encoded":
            size = encoded.mask.shape[0]
            size = tf.size(encoded.mask) if size is None else size
            # If there are more entries than landmarks, evenly spaced ones are kept, so that draws,
            # refreshed rows and positives are all among them.
            is_known = isinstance(size, int)
            count = (min if is_known else tf.minimum)(size, self.num_landmarks)
            chosen = tf.range(count) * size // count
            first = Encoded(
                *(None if part is None else tf.gather(part, chosen) for part in encoded)
            )
            self._remember(first, count, tf.math.count_nonzero(first.mask))

    def _remember(
        self, encoded: Encoded, size: int | tf.Tensor, num_used: int | tf.Tensor | None = None
    ) -> None:
        """Writes `encoded` into the next `size` slots, and advances `next_slot` by `num_used`."""
        slots = insertion_rows(self._next_slots(size), encoded.mask)
        fields = {"stale": encoded.stale, "fresh": encoded.fresh, "age": encoded.age}
        for name, values in fields.items():
            variable = self._state.landmarks[name]
            values = tf.cast(values, variable.dtype)
            scatter_rows(variable, slots.rows, slots.values(values, variable))
        num_used = size if num_used is None else num_used
        self._state.next_slot.assign_add(tf.cast(num_used, tf.int64))

    def _next_slots(self, count: int | tf.Tensor) -> tf.Tensor:
        return (self._state.next_slot + tf.range(count, dtype=tf.int64)) % self.num_landmarks

    def _make_fields(self, dim: int) -> dict:
        size = self.num_landmarks
        return {
            "next_slot": make_state_variable(lambda: tf.zeros([], tf.int64), "next_slot"),
            "landmarks": {
                "stale": make_state_variable(lambda: tf.zeros([size, dim]), "stale"),
                "fresh": make_state_variable(lambda: tf.zeros([size, dim]), "fresh"),
                # -1 in slots without a landmark.
                "age": make_state_variable(lambda: tf.fill([size], -1), "age"),
                "rows": make_state_variable(
                    lambda: tf.fill([size], tf.constant(-1, tf.int64)), "rows"
                ),
            },
        }

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["content_key"]
        return {
            **config,
            "num_landmarks": self.num_landmarks,
            "landmarks": self.landmarks,
            "num_encoded": self.num_encoded,
            "kernel": self.kernel,
            "bandwidth": self.bandwidth,
            "ridge": self.ridge,
        }


def _features(embeddings: tf.Tensor, length: tf.Tensor) -> tf.Tensor:
    """[n, d + 1] features whose inner products are the linear kernel."""
    return tf.pad(embeddings / length, [[0, 0], [0, 1]], constant_values=1.0)
