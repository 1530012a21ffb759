"""Tests of which Keras the package runs on, and of what it says to one it does not support."""

import os
import subprocess
import sys

import pytest
import tensorflow as tf

from negative_cache import _compat
from negative_cache.tests.replicas import two_replicas


def import_error(program="", **variables):
    """The last line that a process prints which runs `program` and imports the package."""
    result = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport negative_cache"],
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: ")
    return last_line


@pytest.mark.end_to_end
def test_another_backend_is_a_clear_import_error():
    error = import_error(KERAS_BACKEND="jax")
    assert "KERAS_BACKEND='jax'" in error
    assert "set KERAS_BACKEND=tensorflow" in error


@pytest.mark.one_keras
@pytest.mark.end_to_end
def test_a_missing_keras_2_is_a_clear_import_error():
    without = "import sys; sys.modules['tf_keras'] = None"
    error = import_error(without, TF_USE_LEGACY_KERAS="1")
    assert "run `pip install tf-keras` (the extra `negative-cache[keras2]`" in error


def test_keras_is_that_of_tensorflow():
    assert _compat.keras.layers.Layer is tf.keras.layers.Layer
    is_legacy = os.environ.get("TF_USE_LEGACY_KERAS") == "1"
    assert is_legacy == _compat.IS_KERAS_2


@pytest.mark.parametrize("module", ["os", "tensorflow", "builtins.os", "subprocess"])
def test_a_file_cannot_name_any_function_there_is(module):
    config = {"module": module, "class_name": "function", "config": "system"}
    with pytest.raises(ValueError, match="A file can only name functions that are registered"):
        _compat.deserialize({**config, "registered_name": "function"})


def test_functions_of_keras_and_registered_ones_come_out_of_a_file():
    @_compat.keras.utils.register_keras_serializable("test_compat")
    def twice(scores):
        return 2.0 * scores

    for function in (twice, _compat.keras.activations.tanh):
        config = _compat.keras.utils.serialize_keras_object(function)
        assert _compat.deserialize(config) is function
    assert _compat.deserialize(None) is None


def test_loss_is_divided_by_the_number_of_replicas():
    loss = tf.constant(6.0)
    assert _compat.scale_loss_for_distribution(loss).numpy() == 6.0
    strategy = two_replicas()
    results = strategy.run(lambda: _compat.scale_loss_for_distribution(loss))
    for result in strategy.experimental_local_results(results):
        assert result.numpy() == 3.0
