"""Skips the tests of `ops/` under Keras 2: `ops/` knows no Keras, and once is enough."""

import pytest

from negative_cache._compat import IS_KERAS_2


def pytest_runtest_setup():
    if IS_KERAS_2:
        pytest.skip("Runs with the tests under Keras 3: `ops` knows no Keras.")
