"""Docstrings and the summaries they give."""

import pytest

from negative_cache.datasets import _summary
from negative_cache.tests.datasets.source_trees import load


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("Return the thing called `foo`. More here.", "Return the thing called foo."),
        ("Return e.g. The mean of x. Then stop.", "Return e.g. The mean of x."),
        ("Add an axis to this `~.axes.Axes`.", "Add an axis to this axes.Axes."),
        ("Make a :class:`~a.b.C` of two.", "Make a a.b.C of two."),
        ("Read a `page <http://x.org>`_ of text.", "Read a page of text."),
        ("Make a [Hann window][hann] of n [1]_.", "Make a Hann window of n."),
        ("Solve the following problem ::\n\n  x", "Solve the following problem"),
        ("f(x, y=1) -> int\n\nAdd the two given numbers.", "Add the two given numbers."),
        ("Add the two\nnumbers\n:param x: One.", "Add the two numbers"),
        ("Add the two numbers\nArgs:\n  x: One.", "Add the two numbers"),
        ("Only three words.", None),
        ("One - 2 + 3 = 4", None),
        (":param x: the first of all", None),
        ("See the other function instead.", None),
        ("Deprecated: use the other function.", None),
        ("(This docstring will be overwritten)", None),
        ("atom = <one of the atoms>", None),
        ("Вычисляет сумму двух чисел with an English tail", None),
        ("", None),
    ],
)
def test_summary(docstring, summary):
    assert _summary.summarize(docstring) == summary


def test_summary_keeps_lone_surrogates_out(tmp_path):
    source = 'def f(x):\n    "Keep the \\ud800 words of this."\n    return x + 1\n'
    corpus = load(tmp_path, {"a.py": source})
    assert corpus.summaries[0] == "Keep the words of this."
