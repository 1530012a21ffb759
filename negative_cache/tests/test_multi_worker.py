"""Two workers of a `MultiWorkerMirroredStrategy`, as two processes."""

import signal
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import BackupAndRestore
from negative_cache._compat import IS_KERAS_2
from negative_cache.layers import Cache, FrequencyEstimator
from negative_cache.layers._variables import by_replica, make_state_variable
from negative_cache.tests import multi_worker_cases, multi_worker_fit
from negative_cache.tests.replicas import two_replicas
from negative_cache.tests.worker_processes import NUM_WORKERS, run_workers


@pytest.mark.slow
@pytest.mark.end_to_end
def test_two_workers_do_what_two_replicas_do(tmp_path):
    finished = run_workers(multi_worker_cases.__name__, tmp_path, folder=tmp_path)
    of_workers = [worker.result() for worker in finished]
    for name, case in multi_worker_cases.CASES.items():
        expected = case(two_replicas(), tmp_path)
        assert len(expected) == NUM_WORKERS and expected[0] != expected[1]
        for worker, wanted in zip(of_workers, expected):
            (received,) = worker[name]
            assert received.keys() == wanted.keys()
            for key, values in wanted.items():
                if isinstance(values[0], str):
                    assert received[key] == values, key
                else:
                    np.testing.assert_allclose(received[key], values, 1e-4, 1e-5, err_msg=key)
    if not IS_KERAS_2:
        assert "Keras 3 has no `fit` and no `evaluate`" in of_workers[0]["refusal"]


@pytest.mark.skipif(not IS_KERAS_2, reason="Keras 3 has no `fit` for several workers")
@pytest.mark.slow
@pytest.mark.end_to_end
def test_a_fit_goes_on_after_one_of_the_workers_was_killed(tmp_path):
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    # The chief writes its third backup. The other is about to give its own an index.
    killed = run_workers(
        multi_worker_fit.__name__, 1, "rename", 6, parts, folder=tmp_path, succeed=False
    )
    assert killed[1].returncode == -signal.SIGKILL and killed[0].returncode != 0
    assert indices(tmp_path / "parts") == ["ckpt-4.index", "ckpt-6.index"]
    assert indices(tmp_path / "parts_worker_1") == ["ckpt-2.index", "ckpt-4.index"]
    # New processes go on, and then train another model that nothing interrupts.
    finished = run_workers(multi_worker_fit.__name__, 0, "never", 0, parts, whole, folder=tmp_path)
    resumed, expected = zip(*(worker.result() for worker in finished))
    assert resumed == expected
    assert expected[0]["mirrored"] == expected[1]["mirrored"]
    assert expected[0]["logs"] == expected[1]["logs"]
    np.testing.assert_allclose(*expected[0]["evaluated"], rtol=1e-6)
    titles = [set(worker["titles"]) for worker in expected]
    assert titles[0] != titles[1] and titles[0] | titles[1] <= set(multi_worker_cases.WORDS)
    assert not list(tmp_path.glob("parts*")) and not list(tmp_path.glob("whole*"))


def indices(folder):
    return sorted(path.name for path in folder.glob("ckpt-*.index"))


@pytest.mark.parametrize(
    ("of_workers", "expected"),
    [
        ([[], []], None),
        ([[6], []], None),
        ([[4, 6], [2, 4]], 4),
        ([[4, 6], [2, 4, 6]], 6),
        ([[4, 6], []], "by worker: \\[\\[4, 6\\], \\[\\]\\]"),
        ([[6], [4]], "by worker: \\[\\[6\\], \\[4\\]\\]"),
    ],
)
def test_workers_agree_on_a_backup(of_workers, expected):
    callback = BackupAndRestore("backup")
    callback._backups = mock.Mock(**{"numbers.return_value": of_workers[0]})
    rows = np.array([numbers + [-1] * (3 - len(numbers)) for numbers in of_workers])
    callback._workers = mock.Mock(**{"gather.return_value": rows})
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"(?s)do not belong together.*{expected}"):
            callback._newest_of_all()
    else:
        assert callback._newest_of_all() == expected
    callback._workers.gather.assert_called_once_with(rows[0].tolist())


@pytest.mark.parametrize("dtype", [tf.string, tf.int32])
def test_a_worker_makes_a_variable_for_each_of_its_replicas(dtype):
    strategy = tf.distribute.MultiWorkerMirroredStrategy._from_local_devices(("CPU:0", "CPU:1"))
    calls = []

    def initial_value():
        calls.append(None)
        return tf.constant(["a", "b"]) if dtype == tf.string else tf.constant([-1, 2])

    with strategy.scope():
        variable = make_state_variable(initial_value, "state")
    parts = by_replica(variable)
    assert [part.device.rpartition("/")[2] for part in parts] == ["device:CPU:0", "device:CPU:1"]
    assert [part.name for part in parts] == ["state:0", "state/replica_1:0"]
    assert len(calls) == 1
    for part in parts:
        np.testing.assert_array_equal(part.numpy(), initial_value().numpy())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cache({"embedding": tf.io.FixedLenFeature([2], tf.float32)}, 4),
        lambda: FrequencyEstimator(4),
    ],
    ids=["Cache", "FrequencyEstimator"],
)
def test_a_strategy_without_replicas_is_refused(make):
    # A real one would connect this process to servers.
    strategy = mock.Mock(spec=tf.distribute.ParameterServerStrategy)
    with mock.patch.object(tf.distribute, "get_strategy", return_value=strategy):
        with pytest.raises(ValueError, match="ParameterServerStrategy` has no place for it. Use a"):
            make()
