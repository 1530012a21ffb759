"""The headline claims of the four papers, what was measured of each, and why that differs.

Every number comes out of a file of results. What `report.py` trains is one small problem, so that
some claims are held against the longer runs of other scripts, each named with its command.
"""

import json
import pathlib
from collections.abc import Callable

from _worth_report import test_mrr

RESULTS = pathlib.Path("benchmarks/results")
# The runs of a table: method -> runs of its seeds.
Best = dict[str, list[dict]]


def claims(tables: dict[str, list[Best]], mark: Callable[[pathlib.Path], str]) -> list[dict]:
    """For each paper its claim, the sentences of what was measured, and why they differ.

    Args:
      tables: for each kind of towers, the tables of the report, of which each ratio is taken from
        the first that has both methods.
      mark: the mark of figures in a file of older code, or "".
    """
    return [
        {
            "paper": "Negative cache (Lindgren et al., NeurIPS 2021)",
            "claimed": "With a cache of stale embeddings, of which a very small share ρ is encoded"
            " again at each step, training is about as good as with fresh ones, and better than"
            " in-batch.",
            "measured": _those_there(
                *(_cache(runs, tower) for tower, runs in tables.items()), _small_share(mark)
            ),
            "why": "With tens of thousands of candidates, a batch of 64 is already a fair sample:"
            " there is less to gain than with millions. ρ matters less here because draws and the"
            " batch's positives are written to the cache too.",
        },
        {
            "paper": "Tree index and Nyström (Monath et al., arXiv 2303.15311)",
            "claimed": "Half the gap to the oracle that other methods leave, with 150 times less"
            " accelerator memory.",
            "measured": _those_there(
                _tree_gap(mark),
                _tree_memory(mark),
                _stale("Nyström", mark),
                *(_to_oracle(runs, tower, "tree", "nystrom") for tower, runs in tables.items()),
            ),
            "why": "The gap is that of a matrix encoded once an epoch. Writing draws back closes"
            " most of it, with or without a tree: in a small corpus a tree gains nothing over exact"
            " draws. The memory is that of an index without embeddings, whose draws follow the"
            " softmax less closely. At equal time Nyström pays for its kernel regression, which is"
            " most of a cheap step.",
        },
        {
            "paper": "Correctors (Monath et al., ICML 2024, arXiv 2409.01890)",
            "claimed": "With no refresh after the first fill, the accuracy of a frequent refresh,"
            " with 4 to 80 times fewer candidates encoded.",
            "measured": _those_there(
                _stale("corrector", mark),
                *(_to_oracle(runs, tower, "corrector") for tower, runs in tables.items()),
            ),
            "why": "All candidates encoded are counted here, the batch's and the first"
            " fill too, where the paper counts what keeps the cache fresh. Of word vectors that are"
            " trained from scratch, an item's drift is largely its own and no function of its old"
            " embedding, and to correct all rows takes most of a cheap step.",
        },
        {
            "paper": "Global contrastive batch sampling (Sachidananda et al., ICML 2023, arXiv"
            " 2210.12874)",
            "claimed": "Batches of similar pairs narrow the gap between the loss over the batches"
            " and that over all candidates, and retrieve better than shuffled ones without mining.",
            "measured": _those_there(
                _contrastive("t0.05", mark),
                _contrastive("t0.1", mark),
                _gap(mark),
                *(_equal_time(runs, tower) for tower, runs in tables.items()),
            ),
            "why": "The first figures are at equal steps. Here the order costs as much"
            " as many steps of a cheap tower, and the budget is of processor time. The gain is"
            " largest at temperatures too low for shuffled batches. The paper fine-tunes pretrained"
            " encoders.",
        },
    ]


def _those_there(*parts):
    return [part for part in parts if part]


def _mean(runs):
    return sum(map(test_mrr, runs)) / len(runs)


def _ratio(tables, name, baseline):
    """The ratio of the MRRs of two methods, or None if no table has both."""
    for best in tables:
        if name in best and baseline in best:
            return f"{_mean(best[name]) / _mean(best[baseline]):.2f}"
    return None


def _ratios(tables, tower, pairs):
    """A sentence with the ratios of those pairs that there are."""
    found = [(text, _ratio(tables, *pair)) for text, pair in pairs.items()]
    parts = [f"{text} {ratio}" for text, ratio in found if ratio is not None]
    return f"This report, {tower}: ratios of MRR, {', '.join(parts)}." if parts else ""


def _cache(tables, tower):
    return _ratios(
        tables,
        tower,
        {
            "published cache to in-batch": ("published", "in-batch"),
            "the default cache to in-batch": ("own draws", "in-batch"),
            "corpus with ρ = 0.001 to the oracle": (_of_corpus("corpus", tower), "oracle"),
        },
    )


def _to_oracle(tables, tower, *names):
    pairs = {f"{name} to the oracle": (_of_corpus(name, tower), "oracle") for name in names}
    return _ratios(tables, tower, pairs)


def _of_corpus(name, tower):
    """A method of a corpus, with the draws that suit the towers."""
    return f"{name} 16" if tower == "transformer" else name


def _equal_time(tables, tower):
    return _ratios(
        tables,
        tower,
        {
            "ordered to shuffled": ("contrastive", "in-batch"),
            "in groups of 8 to shuffled": ("contrastive groups", "in-batch"),
        },
    )


def _file(name):
    path = RESULTS / name
    return path, json.loads(path.read_text())


def _by_setting(rows):
    return {row["setting"]: row for row in rows}


def _small_share(mark):
    path, found = _file("staleness_words_scratch.json")
    rows = _by_setting(found["rows"])
    small, oracle = rows["rho = 0.001"], rows["oracle"]
    return (
        f"`staleness.py --regime scratch`{mark(path)}: ρ = 0.001 has MRR {small['mrr']} for"
        f" {small['candidates encoded']:,} candidates encoded, the oracle {oracle['mrr']} for"
        f" {oracle['candidates encoded']:,}."
    )


def _tree_gap(mark):
    path, found = _file("tree_training.json")
    gaps = {(row["MRR"], row["setting"]): row for row in found["gaps"]}
    tree = gaps["mean of evaluations", "tree"]["to the stale gap"]
    matrix = gaps["mean of evaluations", "matrix, written back"]["to the stale gap"]
    return (
        f"`tree_training.py`{mark(path)}: the tree has {tree} of the gap of a matrix encoded once"
        f" an epoch, a matrix that is written back {matrix}."
    )


def _tree_memory(mark):
    path, found = _file("tree_index.json")
    row = next(row for row in found["memory"] if row["residual bytes"] == 8)
    return (
        f"`tree_index.py`{mark(path)}: an index without embeddings is"
        f" {row['float32 cache / index']:.0f} times smaller than a float32 cache (10⁶ candidates,"
        " d = 768)."
    )


def _stale(setting, mark):
    path, found = _file("staleness_transformer_finetune.json")
    rows = _by_setting(found["rows"])
    own, often = rows[setting], rows["10 times an epoch"]
    factor = often["candidates encoded"] / own["candidates encoded"]
    return (
        f"`staleness.py --tower transformer`{mark(path)}: {setting} has MRR {own['mrr']} without a"
        f" refresh, a refresh 10 times an epoch {often['mrr']} for {factor:.1f} times as many"
        f" candidates encoded; the drift is {own['ratio'].split()[0]} times smaller."
    )


def _contrastive(name, mark):
    path, found = _file(f"contrastive_training_{name}.json")
    rows = _by_setting(found["rows"])
    return (
        f"`contrastive_training.py --temperature {found['options']['temperature']}`{mark(path)}:"
        f" ordered to shuffled {rows['ordered']['to shuffled']:.2f}, in groups of 8"
        f" {rows['ordered, groups of 8']['to shuffled']:.2f}."
    )


def _gap(mark):
    path, found = _file("contrastive_gap.json")
    closed = {
        row["batches"]: row["gap closed by"]
        for row in found["rows"]
        if (row["steps"], row["quantile"], row["B"]) == (500, "None", 64)
    }
    return (
        f"`contrastive_batches.py --part gap`{mark(path)}: the published order closes"
        f" {closed['ordered']:.0%} of the gap at B = 64, grown batches {closed['grown']:.0%}."
    )
