"""`Corrector`: a small network that learns to update stale embeddings."""

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import keras
from negative_cache.layers.drift_corrector import (
    Displacement,
    DriftCorrector,
    Encoded,
    cross_entropy,
    mean_squared_error,
)

_DRIFT_LOSSES = ("mse", "cross_entropy", "both")


@keras.utils.register_keras_serializable("negative_cache")
class Corrector(DriftCorrector):
    """A two-layer residual network that maps stale embeddings to current ones.

    Monath et al., ICML 2024 (arXiv 2409.01890). Candidates are drawn by their corrected embeddings,
    P_h(y|x) ∝ exp score(x, h(ĝ(y))). The draws are encoded, and their fresh embeddings train the
    network for the next step. The embedding ĝ is moved in proportion to

      r(ĝ) = ‖ĝ‖ W₂ gelu(W₁ ĝ √d / ‖ĝ‖ + b₁) + ‖ĝ‖ b₂,    W₂ = b₂ = 0 at the start,

    so that h begins as the identity. h scales r by the age of the row and by how reliable r has
    been in recent steps; `DriftCorrector` defines it. The sampler applies h to one block of the
    cache at a time. A corrected cache is never stored.

    Pass it as `CachedRetrieval(corrector=Corrector())`. The optimizer of the model trains it in the
    same `fit`, on all rows that a training step encodes anyway: the draws, refreshed rows and, if
    the cache covers a corpus, the positives. The drift loss sends no gradient to the towers, and
    the task's loss sends none to the corrector. (An optimizer that clips by the *global* norm
    combines the gradients of both.)

    With a `TreeIndex`, the means of nodes are corrected too, and guide the draws. Candidates are
    scored exactly by their corrected embeddings, so Metropolis-Hastings steps lead to P_h. Spreads
    and radii remain those of the stale embeddings. So the log partition is an estimate from
    corrected means and stale spreads. `TreeIndex.log_partition_bounds` bounds the partition of the
    *stale* embeddings; there are no proven bounds for the corrected ones.

    Args:
      hidden_units: width of the hidden layer. Scoring a cached row takes d multiplications per
        query; the correction adds about 2 · hidden_units · d per row. A wider layer is more
        accurate and slower.
      drift_loss: the loss of the corrector over the encoded rows. "mse" is Σ ‖h(ĝ) - g‖² / Σ ‖g‖².
        "cross_entropy" compares the softmaxes over these rows under fresh and under corrected
        embeddings. "both" is their sum.
      learning_rate_multiplier: multiplies the steps that the model's optimizer takes with the
        corrector's weights. This works with every optimizer. An effective learning rate of about
        1e-3 with Adam is a good start: a multiplier of 50 if the towers are fine-tuned at 2e-5.
      warmup_steps: number of training steps before the correction is used.
      content_key: name of a feature of the candidates that is an additional input of the first
        layer, as in `DriftCorrector`. It cannot be used with an index, because nodes do not have
        it.

    Raises:
      ValueError: if an argument is out of range.

    Examples:
      >>> corrector = Corrector(hidden_units=512)
      >>> task = CachedRetrieval(tower, cache=cache, corrector=corrector)
      >>> fresher = corrector(stale_embeddings)
    """

    def __init__(
        self,
        hidden_units: int = 256,
        *,
        drift_loss: str = "mse",
        learning_rate_multiplier: float = 1.0,
        warmup_steps: int = 0,
        content_key: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(warmup_steps=warmup_steps, content_key=content_key, **kwargs)
        self.hidden_units = _validation.check_count(hidden_units, "hidden_units")
        if drift_loss not in _DRIFT_LOSSES:
            raise ValueError(
                f"`drift_loss` must be one of {_DRIFT_LOSSES}. Received: {drift_loss!r}."
            )
        if not 0 < learning_rate_multiplier < math.inf:
            raise ValueError(
                "`learning_rate_multiplier` must be positive and finite. Received:"
                f" {learning_rate_multiplier}."
            )
        self.drift_loss = drift_loss
        self.learning_rate_multiplier = learning_rate_multiplier
        self._network: _ResidualNetwork | None = None

    def make(self, embedding_dim: int, content_dim: int = 0) -> None:
        self._network = _ResidualNetwork(
            embedding_dim + content_dim,
            self.hidden_units,
            embedding_dim,
            self.learning_rate_multiplier,
            name="network",
        )
        super().make(embedding_dim, content_dim)

    def displacement_fn(self) -> Displacement:
        network = self._network
        assert network is not None, "`make` comes first"

        def displacement(stale: tf.Tensor, content: tf.Tensor | None) -> tf.Tensor:
            lengths = tf.maximum(tf.norm(stale, axis=1, keepdims=True), 1e-6)
            inputs = [stale * (stale.shape[1] ** 0.5 / lengths)]
            if self.content_key is not None:
                inputs.append(tf.cast(content, tf.float32))
            return lengths * network(tf.concat(inputs, axis=1))

        return displacement

    def _drift_loss(
        self,
        corrected: tf.Tensor,
        encoded: Encoded,
        score_fn: Callable[[tf.Tensor], tf.Tensor] | None,
    ) -> tf.Tensor:
        loss = tf.constant(0.0)
        if self.drift_loss != "cross_entropy":
            loss += mean_squared_error(corrected, encoded)
        if self.drift_loss != "mse":
            if score_fn is None:
                raise ValueError(
                    f"`score_fn` is needed for drift_loss={self.drift_loss!r}. Received: None."
                )
            loss += cross_entropy(corrected, encoded, score_fn)
        return loss

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "hidden_units": self.hidden_units,
            "drift_loss": self.drift_loss,
            "learning_rate_multiplier": self.learning_rate_multiplier,
        }


class _ResidualNetwork(keras.layers.Layer):
    """W₂ gelu(W₁ x + b₁) + b₂, zero at the start, with its own multiplier m of the learning rate.

    A weight w is stored as the variable v = w / m. The gradient with respect to w is passed to v
    unchanged. So a step of any optimizer moves w m times as far as without the multiplier.
    """

    def __init__(
        self, num_inputs: int, hidden_units: int, dim: int, multiplier: float, **kwargs: Any
    ):
        super().__init__(autocast=False, dtype="float32", **kwargs)
        self.multiplier = multiplier
        normal = keras.initializers.RandomNormal(stddev=num_inputs**-0.5 / multiplier)
        self.inner = self._make("inner", [num_inputs, hidden_units], normal)
        self.inner_bias = self._make("inner_bias", [hidden_units])
        self.outer = self._make("outer", [hidden_units, dim])
        self.outer_bias = self._make("outer_bias", [dim])
        self.built = True

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        names = ("inner", "inner_bias", "outer", "outer_bias")
        inner, inner_bias, outer, outer_bias = (self._weight(name) for name in names)
        hidden = tf.nn.gelu(tf.matmul(inputs, inner) + inner_bias, approximate=True)
        return tf.matmul(hidden, outer) + outer_bias

    def _make(
        self,
        name: str,
        shape: list[int],
        initializer: str | keras.initializers.Initializer = "zeros",
    ) -> Any:
        return self.add_weight(name=name, shape=shape, initializer=initializer, dtype="float32")

    def _weight(self, name: str) -> tf.Tensor:
        variable = tf.convert_to_tensor(getattr(self, name))
        return variable + tf.stop_gradient((self.multiplier - 1.0) * variable)
