"""Runs the examples with the arguments that a user gives on the command line.

Those that choose their Keras, or start a process of their own, run in a process of their own.
"""

import email
import os
import pathlib
import re
import runpy
import subprocess
import sys
import sysconfig

import numpy as np
import pytest

from negative_cache._compat import IS_KERAS_2
from negative_cache.tests.datasets import movielens_files

ROOT = pathlib.Path(__file__).parents[2]
MOVIELENS_TFRS = ROOT / "examples" / "movielens_tfrs.py"
SERVING = ROOT / "examples" / "serving.py"
CONTRASTIVE_BATCHES = ROOT / "examples" / "contrastive_batches.py"
TREE_INDEX = ROOT / "examples" / "tree_index.py"
STALE_EMBEDDINGS = ROOT / "examples" / "stale_embeddings.py"
SEVERAL_DEVICES = ROOT / "examples" / "several_devices.py"
OWN_NEGATIVES = ROOT / "examples" / "own_negatives.py"
FROM_CSV = ROOT / "examples" / "from_csv.py"

if not MOVIELENS_TFRS.exists():
    pytest.skip("The examples are not part of an installed package.", allow_module_level=True)


def run(*arguments, script=MOVIELENS_TFRS, **variables):
    environment = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Runs a script as `python script arguments`, but in this process: what it prints."""

    def run_here(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run_here


# The script chooses its Keras itself: a second run would show nothing new.
runs_once = pytest.mark.skipif(not IS_KERAS_2, reason="Runs with the tests under Keras 2.")


@runs_once
@pytest.mark.slow
@pytest.mark.end_to_end
def test_movielens_tfrs_trains_and_prints_a_row_for_every_task(tmp_path):
    folder = movielens_files.generate(tmp_path, num_users=20, num_movies=120, num_ratings=500)
    done = run("--data", folder, "--epochs", 1, "--batch-size", 40, "--cache-size", 64)
    assert done.returncode == 0, done.stderr
    assert "500 ratings, 20 users, 120 movies" in done.stdout
    table = done.stdout[done.stdout.index("accuracy of the top") :].splitlines()
    assert table[0].split()[4:9] == ["1", "5", "10", "50", "100"]
    rows = {}
    for line in table[1:]:
        name, *cells = re.split(r"\s{2,}", line)
        rows[name] = [float(cell) for cell in cells]
    assert list(rows) == [
        "tfrs.tasks.Retrieval",
        "CachedRetrieval, no cache",
        "CachedRetrieval, 64 rows",
    ]
    for *accuracies, milliseconds in rows.values():
        # The top 5 include the top 1, and so on; 100 of 120 movies have most of the positives.
        assert accuracies == sorted(accuracies) and 0.5 < accuracies[-1] <= 1.0
        assert milliseconds > 0.0


@runs_once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "https://grouplens.org/datasets/movielens/100k"),
        (["--batch-size", "65", "--cache-size", "64"], "--batch-size must be 1 to --cache-size"),
        (["--batch-size", "0"], "--batch-size must be 1 to --cache-size, received 0"),
        (["--epochs", "0"], "--epochs must be 1 or more, received 0"),
    ],
)
def test_movielens_tfrs_refuses_bad_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    main = runpy.run_path(str(MOVIELENS_TFRS))["main"]
    monkeypatch.setattr(sys, "argv", ["movielens_tfrs.py", "--data", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@runs_once
@pytest.mark.end_to_end
def test_movielens_tfrs_refuses_keras_3_in_one_line():
    done = run("--data", "ml-100k", TF_USE_LEGACY_KERAS="0")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "TF-Recommenders needs Keras 2: unset TF_USE_LEGACY_KERAS, or set it to 1."
    )


@pytest.mark.slow
@pytest.mark.end_to_end
def test_serving_answers_from_a_process_that_has_tensorflow_only(tmp_path):
    done = run("--output", tmp_path, script=SERVING, TF_USE_LEGACY_KERAS=str(int(IS_KERAS_2)))
    assert done.returncode == 0, done.stderr
    answers = dict(re.findall(r"^user (\d+) -> (.*)$", done.stdout, re.MULTILINE))
    # User i likes movies of taste i % 10.
    for user in ("3", "4"):
        assert re.findall(r"of taste (\d)", answers[user]) == [user] * 5


@pytest.mark.slow
@pytest.mark.end_to_end
def test_several_devices_train_with_one_pool():
    # A strategy of its own needs a process of its own.
    keras = {"TF_USE_LEGACY_KERAS": str(int(IS_KERAS_2))}
    done = run("--epochs", 2, script=SEVERAL_DEVICES, **keras)
    assert done.returncode == 0, done.stderr
    (different,) = re.findall(r"2 replicas with (\S+) different candidates", done.stdout)
    # Two caches of 1,000 rows, some of which batches have written again.
    assert 1500 < int(different.replace(",", "")) <= 2000
    assert float(re.search(r"MRR of the training queries: (\S+)", done.stdout).group(1)) > 0.1


@pytest.mark.slow
@pytest.mark.end_to_end
def test_tree_index_trains_and_searches(run_here):
    printed = run_here(TREE_INDEX, "--candidates", 2000, "--steps", 150)
    first, last = map(float, re.search(r"loss (\S+) in .* steps, (\S+) in", printed).groups())
    assert last < 0.5 * first
    assert float(re.search(r"by the index: (\S+)%", printed).group(1)) > 80.0


@pytest.mark.slow
@pytest.mark.end_to_end
def test_stale_embeddings_are_corrected(run_here):
    arguments = ("--candidates", 4000, "--epochs", 4, "--corrector", "nystrom")
    printed = run_here(STALE_EMBEDDINGS, *arguments)
    stale, corrected = (
        float(re.findall(rf"{name}: (\S+)", printed)[-1])
        for name in ("probe_staleness", "probe_corrected_staleness")
    )
    assert corrected < 0.8 * stale


@pytest.mark.slow
@pytest.mark.end_to_end
def test_contrastive_batches_find_more_than_shuffled_ones(run_here):
    printed = run_here(CONTRASTIVE_BATCHES)
    found = dict(re.findall(r"^(.*): loss \S+, MRR (\S+)$", printed, re.MULTILINE))
    assert list(found) == ["shuffled", "contrastive", "contrastive, of shards"]
    assert float(found["contrastive"]) > float(found["shuffled"]) + 0.02
    assert float(found["contrastive, of shards"]) > float(found["shuffled"]) + 0.02


@pytest.mark.slow
@pytest.mark.end_to_end
def test_negatives_of_ones_own_are_trained_on_and_go_on_from_files(run_here, monkeypatch):
    # A package in the place of all of the standard library.
    package = {"stdlib": pathlib.Path(email.__file__).parent}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: package)
    printed = run_here(OWN_NEGATIVES, "--epochs", 2)
    lines = dict(re.findall(r"^(.*): (MRR .*)$", printed, re.MULTILINE))
    assert list(lines) == ["without", "with", "from the .keras file", "from the backup"]
    assert lines["from the .keras file"] == lines["from the backup"]
    mrr, visits, beaten = (
        [float(re.search(pattern, line).group(1)) for line in list(lines.values())[1:3]]
        for pattern in (r"MRR (\S+),", r"(\d+) visits", r"beaten (\S+)%")
    )
    assert mrr[0] > 0.2
    assert visits[1] == pytest.approx(1.5 * visits[0])
    assert 50.0 < beaten[0] < beaten[1]


@pytest.mark.slow
@pytest.mark.end_to_end
def test_a_csv_becomes_a_retriever_that_answers(run_here, tmp_path):
    run_here(FROM_CSV, tmp_path / "pairs.csv", "--generate")
    printed = run_here(FROM_CSV, tmp_path / "pairs.csv", "--output", tmp_path / "retriever")
    mrr = re.findall(r"val_mrr: (\S+)", printed)
    assert float(re.search(r"^test: .*, mrr (\S+)$", printed, re.MULTILINE).group(1)) > 0.12
    assert 3 < len(mrr) < 50, "Training did not stop by the validation MRR."
    # User i likes items of taste i % 20.
    user, items = re.search(r"^user (\d+) -> (.*)$", printed, re.MULTILINE).groups()
    assert [int(item) % 20 for item in re.findall(r"\d+", items)] == [int(user) % 20] * 5


def test_what_a_user_has_had_is_passed_over():
    example = runpy.run_path(str(FROM_CSV))
    users = np.array(["a", "b", "a", "a", "b", "c", "a"])
    items = np.array(["1", "1", "2", "3", "2", "1", "4"])
    train, validation, test = example["split"](users)
    assert [rows.tolist() for rows in (train, validation, test)] == [[0, 2], [1, 3], [4, 5, 6]]
    assert example["items_before"](users, items, test) == [["1"], [], ["1", "2", "3"]]
