"""`DrawnNegatives`: what sources that draw candidates and encode them have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from negative_cache import _validation
from negative_cache.layers._dividing import seeds_after, shares
from negative_cache.layers._negatives.base import Negatives, given_name
from negative_cache.layers._negatives.batch import Batch
from negative_cache.layers._state import StateLayer, fixed_seed
from negative_cache.layers._variables import make_state_variable


class DrawnNegatives(Negatives, StateLayer):
    """Negatives that are drawn, by a seed that files hold, and encoded.

    Args:
      seed: seed of the draws; random (but under `keras.utils.set_random_seed`) if None.
      **kwargs: of the layer.
    """

    encodes_candidates = True

    _laws = {"sampling": seeds_after, "num_encoded": shares}

    # What a subclass says: feature name -> spec, of what candidates are encoded from; under a fixed
    # name if that is one tensor and no dictionary.
    feature_specs: Mapping[str, tf.io.FixedLenFeature]
    takes_one_tensor: bool

    def __init__(self, *, seed: int | None, **kwargs: Any):
        super().__init__(**kwargs)
        self.seed = fixed_seed(seed)

    def _hold_draws(self) -> None:
        """Makes the state of the draws; to be called once, by the constructor of a subclass."""
        # Whatever seed a training began with, it goes on with it from a file.
        seed_and_step = tf.constant([self.seed, 0], tf.int64)
        self._hold_state(
            # Two sources in another order are not each other's.
            description={"name": given_name(self)},
            sampling=make_state_variable(lambda: seed_and_step, "sampling"),
            num_encoded=make_state_variable(lambda: tf.zeros([], tf.int64), "num_encoded"),
        )

    @property
    def num_encoded(self) -> tf.Tensor:
        return tf.convert_to_tensor(self._state.num_encoded)

    def features_in(self, batch: Batch) -> dict[str, tf.Tensor]:
        """The batch's features that the source's candidates have, checked."""
        found = {key: batch.features[key] for key in self.feature_specs if key in batch.features}
        return _validation.check_items(
            found, self.feature_specs, what="candidate_features", exact=True
        )
