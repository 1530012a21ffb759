"""Settings of the test suite: devices, seeds, Hypothesis. It has no fixtures of single tests."""

import importlib.metadata
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis
import pytest
import tensorflow as tf

from negative_cache._compat import IS_KERAS_2

SEED = 20210426
NUM_CPU_DEVICES = 4


def _split_cpu() -> None:
    """Makes four logical CPU devices, on which MirroredStrategy runs with two or four replicas.

    TensorFlow allows this only before its runtime starts: a module of the package that makes a
    tensor when it is imported would break it.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * NUM_CPU_DEVICES
    )


class _TensorFlowRandom:
    """TensorFlow's global seed with the methods that Hypothesis needs to replay an example.

    Without it an example that draws from TensorFlow's global generator could not be shrunk.
    """

    def __init__(self):
        self._state = SEED

    def seed(self, seed):
        self._state = seed
        tf.random.set_seed(seed)

    def getstate(self):
        return self._state

    def setstate(self, state):
        self.seed(state)


_split_cpu()
# On a GPU products are rounded to TF32 otherwise, of which tests of exactness know nothing. A test
# of the law of draws has it on.
tf.config.experimental.enable_tensor_float_32_execution(False)

# Hypothesis holds only a weak reference to it.
_TENSORFLOW_RANDOM = _TensorFlowRandom()
hypothesis.register_random(_TENSORFLOW_RANDOM)

# No deadline: the first example of a test traces its functions.
hypothesis.settings.register_profile(
    "deterministic",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=25,
    stateful_step_count=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
# HYPOTHESIS_PROFILE=explore looks for new counterexamples.
hypothesis.settings.register_profile(
    "explore",
    hypothesis.settings.get_profile("deterministic"),
    derandomize=False,
    max_examples=500,
    print_blob=True,
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "deterministic"))


def pytest_collection_modifyitems(items):
    """Skips under Keras 2 what is marked `one_keras`, as all tests of `ops/` are."""
    of_ops = pathlib.Path(__file__).parent / "ops"
    for item in items:
        if of_ops in item.path.parents:
            item.add_marker("one_keras")
        if IS_KERAS_2 and item.get_closest_marker("one_keras"):
            item.add_marker(pytest.mark.skip(reason="Runs with the tests under Keras 3."))


def pytest_report_header():
    # tf.keras has no __version__ when it is Keras 2.
    legacy = tf.keras.layers.Layer.__module__.startswith("tf_keras")
    name = "tf_keras" if legacy else "keras"
    version = importlib.metadata.version(name)
    return f"tensorflow {tf.__version__}, tf.keras is {name} {version}"


@pytest.fixture(autouse=True)
def _seed():
    """Seeds Python, NumPy and TensorFlow, so that a test's result does not depend on the others."""
    tf.keras.utils.set_random_seed(SEED)
