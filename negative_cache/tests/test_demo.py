"""The demo, from its command line to its table, on two packages of the standard library."""

import asyncio
import email
import importlib.util
import json
import pathlib
import sys

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
    demo.main(["--steps", "8", "--cache-size", "1024", "--output", str(output), "--query", query])

    printed = capsys.readouterr().out
    assert f"“{query}”" in printed
    table = printed[printed.index("MRR  recall@1") :]
    for row in ("in-batch softmax", "negative cache", "ratio"):
        assert row in table
    assert (output / "mrr.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((output / "results.json").read_text())
    in_batch, cached = record["results"]
    assert in_batch["steps"] == cached["steps"] == list(range(1, 9))
    # 8 steps of 64 positives; the cache is filled first and one draw a query is encoded too.
    assert in_batch["candidates_encoded"] == 8 * 64
    assert cached["candidates_encoded"] == min(1024, len(corpus.train)) + 8 * 64 * 2
    for result in record["results"]:
        assert all(0.0 < mrr <= 1.0 for mrr in result["history"]["val_mrr"])


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
    "arguments", [["--steps", "0"], ["--cache-size", "10"], ["--num-negatives", "0"], ["--what"]]
)
def test_bad_arguments_are_refused_by_name(arguments, capsys):
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert arguments[0] in capsys.readouterr().err
