"""`DriftCorrector`: the base class of the correctors of stale embeddings."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from negative_cache import _validation
from negative_cache.layers._dividing import largest, means
from negative_cache.layers._state import StateLayer
from negative_cache.layers._variables import make_state_variable
from negative_cache.ops import contrastive

# Rates of the moving averages of the typical age and of the trust in the correction.
_AGE_RATE, _TRUST_RATE = 0.05, 0.1
# If the lengths of all embeddings differ from one by less, the tower is taken to normalise them.
# float16 rounds lengths too.
_UNIT_TOLERANCE = 0.01
# The largest correction of a row, as a multiple of that of a row of typical age.
_MAX_SHARE = 2.0

Displacement = Callable[[tf.Tensor, tf.Tensor | None], tf.Tensor]


class Encoded(NamedTuple):
    """Cached candidates that a training step has encoded: the training examples of a corrector.

    Attributes:
      stale: [n, d] float32, ĝ, the cached embeddings.
      fresh: [n, d] float32, g, the current embeddings.
      age: [n] int32, the number of updates since each row was written.
      mask: [n] bool; entries with False are not examples, and may hold any values.
      content: [n, c] float32, the feature `content_key` of the corrector, or None.
    """

    stale: tf.Tensor
    fresh: tf.Tensor
    age: tf.Tensor
    mask: tf.Tensor
    content: tf.Tensor | None = None

    def as_constants(self) -> "Encoded":
        """The examples without gradient, and with zeros in masked entries."""

        def constant(part: tf.Tensor) -> tf.Tensor:
            is_there = tf.reshape(self.mask, [-1] + [1] * (part.shape.rank - 1))
            return tf.stop_gradient(tf.where(is_there, part, tf.zeros_like(part)))

        return Encoded(*(None if part is None else constant(part) for part in self))

    def and_those(self, other: "Encoded") -> "Encoded":
        """Both together."""
        parts = zip(self, other)
        return Encoded(*(None if one is None else _concatenated(one, two) for one, two in parts))

    def finite(self) -> "Encoded":
        """The same, of which candidates whose fresh embedding is not finite are masked."""
        is_finite = tf.reduce_all(tf.math.is_finite(self.fresh), axis=1)
        fresh = tf.where(is_finite[:, tf.newaxis], self.fresh, 0.0)
        return self._replace(fresh=fresh, mask=self.mask & is_finite)


def _concatenated(one: tf.Tensor, two: tf.Tensor) -> tf.Tensor:
    if one.dtype != tf.int32:
        return tf.concat([one, two], axis=0)
    # TensorFlow concatenates int32 on the host, even if they are on an accelerator.
    bits = tf.concat([tf.bitcast(one, tf.uint32), tf.bitcast(two, tf.uint32)], axis=0)
    return tf.bitcast(bits, tf.int32)


class DriftCorrector(StateLayer):
    """Estimates the current embeddings of candidates from their stale ones.

    A subclass defines the displacement r, a function of embeddings that is zero at the start;
    `displacement_fn` returns it. An embedding ĝ that was written `age` updates ago becomes

      h(ĝ) = norm(ĝ + α φ r(ĝ)),    φ = min(age / τ, 2).

    | Symbol | Meaning                                                                     |
    | ------ | --------------------------------------------------------------------------- |
    | τ      | the typical age: a moving average of the ages of the rows that steps encode |
    | φ      | the share of the displacement for the row's age; 0 for a row just written   |
    | α      | the trust in r, in [0, 1]                                                   |
    | norm   | scales to the length of ĝ, if all fresh embeddings so far had unit length   |

    α is the factor that would have minimised Σ ‖ĝ + α φ r(ĝ) - g‖² over the rows encoded in about
    the last ten steps, each predicted before r learned from it. So a corrector does little harm if
    it has learned nothing yet, or has not followed a sudden change.

    Files hold the state of τ and α, and that of r if it has one. `CachedRetrieval(corrector=…)`
    trains a corrector. `call` applies it to embeddings.

    Args:
      warmup_steps: number of training steps before the correction is used; α is 0 until then.
      content_key: name of a feature [c] of the candidates that r takes in addition to the
        embedding, such as a fixed projection of the bag of words. It is read for every cached row,
        so it must not be expensive.
    """

    # Part of the description in files; see `LAYOUT`.
    _layout: Mapping = {}
    # Replicas learn from draws of the same law. Lengths must be one on all of them.
    _laws = {
        "num_updates": largest,
        "typical_age": means,
        "agreement": means,
        "are_unit": lambda values, count: [np.all(values)] * count,
    }

    def __init__(self, *, warmup_steps: int = 0, content_key: str | None = None, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)
        self.warmup_steps = _validation.check_count(warmup_steps, "warmup_steps", at_least=0)
        self.content_key = content_key
        self.embedding_dim: int | None = None

    def build(self, input_shape: Sequence[int]) -> None:
        """Makes the state for embeddings of shape `input_shape`, [n, d]."""
        if self.content_key is not None:
            raise ValueError(
                "A corrector with a `content_key` is made by the `CachedRetrieval` that it is given"
                f" to. Received: content_key={self.content_key!r}."
            )
        self.make(int(input_shape[-1]))

    def make(self, embedding_dim: int, content_dim: int = 0) -> None:
        """Makes the state for embeddings [n, embedding_dim] and contents [n, content_dim]."""
        self.embedding_dim, self.content_dim = embedding_dim, content_dim
        self._hold_state(
            description={
                "embedding_dim": embedding_dim,
                "content_dim": content_dim,
                **self._layout,
            },
            num_updates=make_state_variable(lambda: tf.zeros([], tf.int64), "num_updates"),
            typical_age=make_state_variable(lambda: tf.zeros([]), "typical_age"),
            # Moving averages of Σ ⟨h - ĝ, g - ĝ⟩ and Σ ‖h - ĝ‖².
            agreement=make_state_variable(lambda: tf.zeros([2]), "agreement"),
            are_unit=make_state_variable(lambda: tf.constant(True), "are_unit"),
            **self._make_fields(embedding_dim),
        )
        self.built = True

    def call(
        self,
        embeddings: tf.Tensor,
        age: tf.Tensor | None = None,
        content: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Corrects embeddings. No gradient flows through the result.

        Args:
          embeddings: [n, d] float, stale embeddings.
          age: [n] int, the number of updates since each was written; the typical age if None.
          content: [n, c] float, the feature `content_key`, if the corrector has one.

        Returns:
          [n, d] float32, the corrected embeddings.
        """
        return self.corrector_fn(self.displacement_fn())(embeddings, age, content)

    def corrector_fn(self, displacement: Displacement) -> Callable[..., tf.Tensor]:
        """`call` with a given result of `displacement_fn()`, for several uses in one step."""
        trust = self._trust()

        def correct(
            embeddings: tf.Tensor, age: tf.Tensor | None = None, content: tf.Tensor | None = None
        ) -> tf.Tensor:
            stale = tf.cast(embeddings, tf.float32)
            share = trust * self._share(age, stale)
            return tf.stop_gradient(self._moved(stale, share * displacement(stale, content)))

        return correct

    def learn(
        self,
        encoded: Encoded,
        displacement: Displacement,
        score_fn: Callable[[tf.Tensor], tf.Tensor] | None = None,
    ) -> tf.Tensor | None:
        """Learns from the candidates that a training step has encoded.

        Args:
          encoded: the candidates. No gradient flows to them.
          displacement: the result of `displacement_fn()` in this step.
          score_fn: function from candidates [n, d] to scores [B, n] with the queries of the step.

        Returns:
          A scalar loss whose gradient trains the weights; None if there are no weights to train.
        """
        encoded = encoded.as_constants()
        weight = tf.cast(encoded.mask, tf.float32)[:, tf.newaxis]
        share = self._share(encoded.age, encoded.stale)
        step = share * displacement(encoded.stale, encoded.content)
        lengths = tf.norm(encoded.fresh, axis=1)
        is_unit = (tf.abs(lengths - 1.0) < _UNIT_TOLERANCE) | ~encoded.mask
        self._state.are_unit.assign(self._state.are_unit & tf.reduce_all(is_unit))
        corrected = self._moved(encoded.stale, step)
        loss = self._drift_loss(corrected, encoded, score_fn)
        moved = tf.stop_gradient(corrected) - encoded.stale
        drift = encoded.fresh - encoded.stale
        agreement = tf.stack([tf.reduce_sum(weight * moved * other) for other in (drift, moved)])
        is_finite = tf.reduce_all(tf.math.is_finite(agreement))
        rate = tf.where(is_finite, _TRUST_RATE, 0.0)
        agreement = tf.where(is_finite, agreement, 0.0)
        self._state.agreement.assign(self._state.agreement * (1.0 - rate) + rate * agreement)
        self._observe(encoded)
        self._follow_age(encoded)
        self._state.num_updates.assign_add(1)
        return loss

    @property
    def state_variable(self) -> tf.Variable:
        """A variable on the device that the corrector computes on."""
        return self._state.typical_age

    def displacement_fn(self) -> Displacement:
        """Returns r, a function (embeddings [n, d] float32, content [n, c] or None) -> [n, d]."""
        raise NotImplementedError

    def rows_to_encode(
        self, embeddings: tf.Variable, filled: tf.Tensor, seed: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor] | None:
        """Chooses rows of the cache that this step encodes for `learn_landmarks`.

        Args:
          embeddings: [C, d] variable, the cached embeddings.
          filled: [C] bool, whether each row holds a candidate.
          seed: as in `sample_softmax`.

        Returns:
          rows: [k] int64 and mask: [k] bool, whether to encode each row. None for no rows.
        """
        del embeddings, filled, seed
        return None

    def learn_landmarks(self, encoded: Encoded) -> None:
        """Learns from the rows that `rows_to_encode` has chosen."""
        del encoded

    def _make_fields(self, dim: int) -> dict:
        """Makes the additional state variables of a subclass."""
        del dim
        return {}

    def _drift_loss(
        self,
        corrected: tf.Tensor,
        encoded: Encoded,
        score_fn: Callable[[tf.Tensor], tf.Tensor] | None,
    ) -> tf.Tensor | None:
        """A loss of `corrected` [n, d] against `encoded.fresh`; None if nothing is trained."""
        del corrected, encoded, score_fn
        return None

    def _observe(self, encoded: Encoded) -> None:
        """Lets a subclass store the encoded candidates."""
        del encoded

    def _follow_age(self, encoded: Encoded) -> None:
        weight = tf.cast(encoded.mask, tf.float32)
        total = tf.reduce_sum(weight)
        mean = tf.reduce_sum(weight * tf.cast(encoded.age, tf.float32)) / tf.maximum(total, 1.0)
        rate = tf.maximum(1.0 / (1.0 + tf.cast(self._state.num_updates, tf.float32)), _AGE_RATE)
        rate = tf.where(total > 0.0, rate, 0.0)
        self._state.typical_age.assign_add(rate * (mean - self._state.typical_age))

    def _trust(self) -> tf.Tensor:
        """Scalar float32, α."""
        both = tf.convert_to_tensor(self._state.agreement)
        trust = tf.clip_by_value(tf.math.divide_no_nan(both[0], both[1]), 0.0, 1.0)
        return tf.where(self._state.num_updates < self.warmup_steps, 0.0, trust)

    def _moved(self, stale: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """norm(`stale` + `step`), [n, d]; `stale` is kept if the step is not finite."""
        is_finite = tf.reduce_all(tf.math.is_finite(step), axis=1, keepdims=True)
        moved = stale + tf.where(is_finite, step, 0.0)
        # The derivative of the square root is infinite at zero.
        squares, moved_squares = (
            tf.maximum(tf.reduce_sum(tf.square(values), axis=1, keepdims=True), 1e-12)
            for values in (stale, moved)
        )
        return tf.where(self._state.are_unit, moved * tf.sqrt(squares / moved_squares), moved)

    def _share(self, age: tf.Tensor | None, like: tf.Tensor) -> tf.Tensor:
        """[n, 1] float32, φ; 1 if `age` is None."""
        if age is None:
            return tf.ones_like(like[:, :1])
        relative = tf.math.divide_no_nan(tf.cast(age, tf.float32), self._state.typical_age)
        return tf.clip_by_value(relative, 0.0, _MAX_SHARE)[:, tf.newaxis]

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "warmup_steps": self.warmup_steps,
            "content_key": self.content_key,
        }


def mean_squared_error(corrected: tf.Tensor, encoded: Encoded) -> tf.Tensor:
    """Scalar Σ ‖h - g‖² / Σ ‖g‖² over the entries with True in `encoded.mask`."""
    weight = tf.cast(encoded.mask, tf.float32)[:, tf.newaxis]
    error = tf.reduce_sum(weight * tf.math.squared_difference(corrected, encoded.fresh))
    return tf.math.divide_no_nan(error, tf.reduce_sum(weight * tf.square(encoded.fresh)))


def cross_entropy(
    corrected: tf.Tensor, encoded: Encoded, score_fn: Callable[[tf.Tensor], tf.Tensor]
) -> tf.Tensor:
    """Scalar mean over queries of KL(P ‖ P_h).

    P and P_h are the softmaxes over the entries with True in `encoded.mask`, of the scores of the
    fresh and of the corrected embeddings. The divergence is the cross-entropy minus the entropy of
    P, which is constant. So its minimum is zero.
    """
    logits = [
        contrastive.leave_out(score_fn(embeddings), ~encoded.mask[tf.newaxis])
        for embeddings in (encoded.fresh, corrected)
    ]
    target = tf.stop_gradient(tf.nn.softmax(logits[0]))
    difference = tf.nn.log_softmax(logits[0]) - tf.nn.log_softmax(logits[1])
    divergence = tf.where(target > 0.0, target * tf.where(target > 0.0, difference, 0.0), 0.0)
    # If all entries are masked, the softmax is NaN.
    is_some = tf.reduce_any(encoded.mask)
    return tf.where(is_some, contrastive.mean_or_zero(tf.reduce_sum(divergence, axis=1)), 0.0)


def build_corrector(corrector: DriftCorrector, embedding_dim: int, content_dim: int) -> None:
    """Makes the corrector's state for the given dimensions, or checks the existing state.

    Raises:
      ValueError: if the corrector has been made for other dimensions.
    """
    if not corrector.built:
        # The first call may be inside a branch of a graph.
        with tf.init_scope():
            corrector.make(embedding_dim, content_dim)
    wanted = (embedding_dim, content_dim)
    if (corrector.embedding_dim, corrector.content_dim) != wanted:
        raise ValueError(
            "`corrector` must be for the embeddings of the cache. Received a corrector of"
            f" dimension {corrector.embedding_dim} with contents of {corrector.content_dim}."
            f" Wanted: {wanted[0]} and {wanted[1]}."
        )
