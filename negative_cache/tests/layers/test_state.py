"""Tests of what the layers with state have in common."""

import pytest
import tensorflow as tf

from negative_cache.layers import Cache, FrequencyEstimator, TreeIndex


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Cache({"embedding": tf.io.FixedLenFeature([2], tf.float32)}, 4),
        lambda: TreeIndex(4, 2),
        lambda: FrequencyEstimator(4),
    ],
    ids=["Cache", "TreeIndex", "FrequencyEstimator"],
)
@pytest.mark.parametrize("in_graph", [False, True])
def test_a_layer_that_only_holds_state_is_not_called(layer, in_graph):
    layer = layer()
    call = tf.function(lambda inputs: layer(inputs)) if in_graph else layer
    with pytest.raises(TypeError, match=f"A `{type(layer).__name__}` is not called: .*methods"):
        call(tf.zeros([1, 2]))
