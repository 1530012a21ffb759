"""The demo, from its command line to its table, on two packages of the standard library."""

import asyncio
import dataclasses
import email
import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

from negative_cache import demo
from negative_cache.datasets import installed_code


@pytest.mark.end_to_end
def test_trains_prints_plots_and_answers(tmp_path, monkeypatch, capsys):
    roots = [pathlib.Path(package.__file__).parent for package in (asyncio, email)]
    corpus = installed_code.load(tmp_path / "cache", roots=roots, verbose=0)
    monkeypatch.setattr(installed_code, "load", lambda: corpus)
    query = "parse a date from a header"
    output = tmp_path / "results"
    arguments = ["--steps", "8", "--patience", "8", "--cache-size", "1024"]
    demo.main([*arguments, "--output", str(output), "--query", query])

    printed = capsys.readouterr().out
    assert f"“{query}”" in printed
    table = printed[printed.index("MRR  recall@1") :]
    for row in ("in-batch softmax", "negative cache", "ratio"):
        assert row in table
    assert (output / "mrr.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((output / "results.json").read_text())
    in_batch, cached = record["results"]
    assert in_batch["steps"] == cached["steps"] == list(range(1, 9))
    for result in record["results"]:
        mrr = result["history"]["val_mrr"]
        assert all(0.0 < one <= 1.0 for one in mrr)
        # The first of the best, of one evaluation a step.
        assert (
            mrr[result["kept_step"] - 1] == max(mrr) > max([0.0, *mrr[: result["kept_step"] - 1]])
        )
        assert f"{result['test']['mrr']:.3f}" in table
    # So many steps of 64 positives; the cache is filled first and a draw a query is encoded too.
    assert in_batch["candidates_encoded"] == in_batch["kept_step"] * 64
    filled = min(1024, len(corpus.train))
    assert cached["candidates_encoded"] == filled + cached["kept_step"] * 64 * 2


@pytest.mark.end_to_end
def test_a_training_stops_and_its_best_weights_are_evaluated_on_other_queries(tmp_path):
    root = pathlib.Path(email.__file__).parent
    corpus = installed_code.load(tmp_path / "cache", roots=[root], verbose=0)
    data = demo.Data(corpus)
    # Steps so long that the MRR falls.
    settings = demo.Settings(steps=30, evaluations=30, patience=2, learning_rate=3.0, dim=8)
    result = demo.train("in-batch softmax", data, 0, settings)
    mrr = result.history["val_mrr"]
    assert len(mrr) == result.kept_step + 2 < 30
    networks = result.model.query_network, result.model.candidate_network
    queries = networks[0](data.query_ids).numpy().astype(np.float64)
    scores = queries @ networks[1](data.code_ids).numpy().astype(np.float64).T
    ranks = 1 + np.sum(scores > np.diag(scores)[:, None] + 1e-6, axis=1)
    # The weights are those of the best step, and the reported figure is not the one chosen by.
    assert np.mean(1 / ranks[corpus.validation]) == pytest.approx(max(mrr), rel=0.02)
    assert np.mean(1 / ranks[corpus.test]) == pytest.approx(result.test["mrr"], rel=0.02)
    all_steps = dataclasses.replace(settings, steps=3, patience=None)
    fixed = demo.train("in-batch softmax", data, 0, all_steps)
    assert fixed.kept_step == 3 and fixed.steps == [1, 2, 3]


@pytest.mark.end_to_end
def test_without_matplotlib_it_says_so_first_and_does_all_else(tmp_path, monkeypatch, capsys):
    corpus = installed_code.load(
        tmp_path / "cache", roots=[pathlib.Path(email.__file__).parent], verbose=0
    )
    monkeypatch.setattr(installed_code, "load", lambda: corpus)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    demo.main(["--steps", "2", "--cache-size", "1024", "--output", str(tmp_path / "results")])
    printed = capsys.readouterr().out
    assert printed.startswith("There will be no plot: matplotlib is not installed")
    assert "“" in printed and (tmp_path / "results" / "results.json").exists()
    assert not (tmp_path / "results" / "mrr.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--patience", "0"],
        ["--cache-size", "10"],
        ["--num-negatives", "0"],
        ["--what"],
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, capsys):
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert arguments[0] in capsys.readouterr().err
