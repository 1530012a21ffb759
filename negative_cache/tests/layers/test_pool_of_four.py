"""Tests of a pool over four replicas, in a process that has no other strategy."""

import subprocess
import sys

import pytest

from negative_cache.tests.layers import four_replicas
from negative_cache.tests.worker_processes import environment


@pytest.mark.one_keras
@pytest.mark.slow
def test_four_replicas_of_which_some_have_no_rows_or_queries():
    done = subprocess.run(
        [sys.executable, "-m", four_replicas.__name__],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the gradient of all rows") == len(four_replicas.TESTED)
