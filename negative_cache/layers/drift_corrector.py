"""`DriftCorrector`: what all correctors of stale embeddings share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from negative_cache import _validation
from negative_cache.layers._state import StateLayer
from negative_cache.layers._variables import make_state_variable
from negative_cache.ops import contrastive

# Steps that the estimates of a typical age, and of how far to trust the correction, look back.
_AGE_RATE, _TRUST_RATE = 0.05, 0.1
# A tower whose embeddings' lengths differ from one by less normalises them: float16 rounds, too.
_UNIT_TOLERANCE = 0.01
# A correction is stretched to at most so many times that of a row of typical age.
_MAX_SHARE = 2.0

Displacement = Callable[[tf.Tensor, tf.Tensor | None], tf.Tensor]


class Encoded(NamedTuple):
    """Cached candidates that a training step has encoded, in the form of a corrector's examples.

    Attributes:
      stale: [n, d] float32, ĝ, as cached.
      fresh: [n, d] float32, g, of now.
      age: [n] int32, the number of updates since the row was written.
      mask: [n] bool; where False, the entry is none.
      content: [n, c] float32, or None.
    """

    stale: tf.Tensor
    fresh: tf.Tensor
    age: tf.Tensor
    mask: tf.Tensor
    content: tf.Tensor | None = None

    def as_constants(self) -> "Encoded":
        """Without gradient, and with zeros in what is none, which may be anything."""

        def constant(part: tf.Tensor) -> tf.Tensor:
            is_there = tf.reshape(self.mask, [-1] + [1] * (part.shape.rank - 1))
            return tf.stop_gradient(tf.where(is_there, part, tf.zeros_like(part)))

        return Encoded(*(None if part is None else constant(part) for part in self))


class DriftCorrector(StateLayer):
    """Moves stale embeddings to where they would be if they were encoded now.

    A subclass says where to: `displacement_fn` returns a function r of embeddings, which is zero at
    the start. An embedding ĝ that was written `age` updates ago becomes

      h(ĝ) = norm(ĝ + α φ r(ĝ)),    φ = min(age / τ, 2),

    where τ is the mean age of the rows that the training steps encode, as it was lately: a row that
    has just been written is left as it is. The factor α in [0, 1] is the trust in r: the one that
    would have made Σ ‖ĝ + α φ r(ĝ) - g‖² smallest over the rows encoded in the last ten steps or
    so, each before r has learned from it. So a corrector that has learned nothing yet, or has not
    followed a sudden change, does little harm. Where all fresh embeddings so far have been of unit
    length, norm keeps the length that ĝ has; else it does nothing.

    Both factors, and r where it has a state, are in files. Correctors are trained by
    `CachedRetrieval(corrector=…)`; their own `call` applies them to embeddings.

    Args:
      warmup_steps: training steps before the correction is used at all; α is 0 until then.
      content_key: name of a feature [c] of the candidates that r may see beside the embedding, such
        as a fixed projection of the bag of words. It must cost nothing to look at.
    """

    # For files: see `LAYOUT`.
    _layout: Mapping = {}

    def __init__(self, *, warmup_steps: int = 0, content_key: str | None = None, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)
        self.warmup_steps = _validation.check_count(warmup_steps, "warmup_steps", at_least=0)
        self.content_key = content_key
        self.embedding_dim: int | None = None

    def build(self, input_shape: Sequence[int]) -> None:
        """Makes the state for embeddings of shape `input_shape`, [n, d]."""
        if self.content_key is not None:
            raise ValueError(
                "A corrector with a `content_key` is made by the `CachedRetrieval` that has it."
                f" Received: content_key={self.content_key!r}."
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
            # Of the last steps: Σ ⟨h - ĝ, g - ĝ⟩ and Σ ‖h - ĝ‖².
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
        """Corrects embeddings; without gradient.

        Args:
          embeddings: [n, d] float, stale.
          age: [n] int, the number of updates since each was written; the typical age where None.
          content: [n, c] float, the feature `content_key`, where the corrector has one.

        Returns:
          [n, d] float32.
        """
        return self.corrector_fn(self.displacement_fn())(embeddings, age, content)

    def corrector_fn(self, displacement: Displacement) -> Callable[..., tf.Tensor]:
        """`call` as a function, for many parts of a step with the same `displacement_fn()`."""
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
        """Learns from what a training step has encoded, and from nothing else.

        Args:
          encoded: candidates; no gradient flows back to them.
          displacement: what `displacement_fn()` has returned in this step.
          score_fn: candidates [n, d] -> [B, n] scores with the queries of the step.

        Returns:
          A scalar loss whose gradient trains the weights; None where there are none to train.
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
        """A variable that is where the corrector computes."""
        return self._state.typical_age

    def displacement_fn(self) -> Displacement:
        """r, a function (embeddings [n, d] float32, content [n, c] or None) -> [n, d]."""
        raise NotImplementedError

    def rows_to_encode(
        self, embeddings: tf.Variable, filled: tf.Tensor, seed: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor] | None:
        """Rows of the cache to encode for `learn_landmarks` in this step, and a mask of them."""
        del embeddings, filled, seed
        return None

    def learn_landmarks(self, encoded: Encoded) -> None:
        """Learns from the rows that `rows_to_encode` has asked for."""
        del encoded

    def _make_fields(self, dim: int) -> dict:
        """Further state variables."""
        del dim
        return {}

    def _drift_loss(
        self,
        corrected: tf.Tensor,
        encoded: Encoded,
        score_fn: Callable[[tf.Tensor], tf.Tensor] | None,
    ) -> tf.Tensor | None:
        """A loss of `corrected` [n, d] against `encoded.fresh`; None where nothing is trained."""
        del corrected, encoded, score_fn
        return None

    def _observe(self, encoded: Encoded) -> None:
        """Takes note of what was encoded."""
        del encoded

    def _follow_age(self, encoded: Encoded) -> None:
        weight = tf.cast(encoded.mask, tf.float32)
        total = tf.reduce_sum(weight)
        mean = tf.reduce_sum(weight * tf.cast(encoded.age, tf.float32)) / tf.maximum(total, 1.0)
        rate = tf.maximum(1.0 / (1.0 + tf.cast(self._state.num_updates, tf.float32)), _AGE_RATE)
        rate = tf.where(total > 0.0, rate, 0.0)
        self._state.typical_age.assign_add(rate * (mean - self._state.typical_age))

    def _trust(self) -> tf.Tensor:
        """Scalar α."""
        both = tf.convert_to_tensor(self._state.agreement)
        trust = tf.clip_by_value(tf.math.divide_no_nan(both[0], both[1]), 0.0, 1.0)
        return tf.where(self._state.num_updates < self.warmup_steps, 0.0, trust)

    def _moved(self, stale: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        """`stale` [n, d] moved by `step`, to the length it had where embeddings are normalised."""
        # A correction that has gone wrong is none.
        is_finite = tf.reduce_all(tf.math.is_finite(step), axis=1, keepdims=True)
        moved = stale + tf.where(is_finite, step, 0.0)
        # The derivative of a square root has to be kept from zero.
        squares, moved_squares = (
            tf.maximum(tf.reduce_sum(tf.square(values), axis=1, keepdims=True), 1e-12)
            for values in (stale, moved)
        )
        return tf.where(self._state.are_unit, moved * tf.sqrt(squares / moved_squares), moved)

    def _share(self, age: tf.Tensor | None, like: tf.Tensor) -> tf.Tensor:
        """[n, 1] φ; 1 where the age is not known."""
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
    """Scalar Σ ‖h - g‖² / Σ ‖g‖² over the entries that are there."""
    weight = tf.cast(encoded.mask, tf.float32)[:, tf.newaxis]
    error = tf.reduce_sum(weight * tf.math.squared_difference(corrected, encoded.fresh))
    return tf.math.divide_no_nan(error, tf.reduce_sum(weight * tf.square(encoded.fresh)))


def cross_entropy(
    corrected: tf.Tensor, encoded: Encoded, score_fn: Callable[[tf.Tensor], tf.Tensor]
) -> tf.Tensor:
    """Scalar mean over queries of KL(P ‖ P_h), both softmaxes over the entries that are there.

    P has the scores of the fresh embeddings and P_h those of the corrected ones. It is the
    cross-entropy less the entropy of P, which is constant: zero is the best there is.
    """
    logits = [
        contrastive.leave_out(score_fn(embeddings), ~encoded.mask[tf.newaxis])
        for embeddings in (encoded.fresh, corrected)
    ]
    target = tf.stop_gradient(tf.nn.softmax(logits[0]))
    difference = tf.nn.log_softmax(logits[0]) - tf.nn.log_softmax(logits[1])
    divergence = tf.where(target > 0.0, target * tf.where(target > 0.0, difference, 0.0), 0.0)
    # Without a single entry the softmax of nothing is NaN.
    is_some = tf.reduce_any(encoded.mask)
    return tf.where(is_some, contrastive.mean_or_zero(tf.reduce_sum(divergence, axis=1)), 0.0)


def build_corrector(corrector: DriftCorrector, embedding_dim: int, content_dim: int) -> None:
    """Makes a corrector for embeddings of `embedding_dim`, or checks that it is for those.

    Raises:
      ValueError: where it has been made for another width.
    """
    if not corrector.built:
        # Also where that is found out in the middle of a branch of a graph.
        with tf.init_scope():
            corrector.make(embedding_dim, content_dim)
    wanted = (embedding_dim, content_dim)
    if (corrector.embedding_dim, corrector.content_dim) != wanted:
        raise ValueError(
            "`corrector` must be for the embeddings of the cache. Received a corrector of"
            f" dimension {corrector.embedding_dim} with contents of {corrector.content_dim}."
            f" Wanted: {wanted[0]} and {wanted[1]}."
        )
