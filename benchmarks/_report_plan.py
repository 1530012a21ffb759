"""What `report.py` trains: the methods for each kind of towers, their temperatures and budgets."""

import dataclasses
import pathlib

import _worth_report

DATA = "code"
SEEDS = 3
# Evaluations of a run, a divisor of those of `worth.py`.
EVALUATIONS = {"words": 8, "transformer": 4}
# The runs of `worth.py`, which are tabled too, and choose temperatures.
SWEEPS = pathlib.Path("benchmarks/results/worth")
# Tried with seed 0 by methods that no sweep of `worth.py` has tried. With transformers, nearly all
# methods with a sweep are best at 0.1.
TEMPERATURES = {"words": (0.07, 0.1), "transformer": (0.1,)}
FULL_TEMPERATURES = dict.fromkeys(TEMPERATURES, (0.05, 0.07, 0.1, 0.15))


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much each method is given.

    Attributes:
      cache_steps: for each kind of towers, the steps of a cache whose processor time each method is
        given.
      temperatures: for each kind of towers, those of methods without a sweep.
      seeds: how many.
    """

    cache_steps: dict[str, int]
    temperatures: dict[str, tuple[float, ...]]
    seeds: int


BUDGETS = {
    "hour": Budget({"words": 1000, "transformer": 320}, TEMPERATURES, SEEDS),
    "full": Budget({"words": 2000, "transformer": 1000}, FULL_TEMPERATURES, SEEDS),
    "quick": Budget({"words": 60, "transformer": 32}, dict.fromkeys(TEMPERATURES, (0.1,)), 1),
}

# Names of `_worth_methods.METHODS`, in the order of the tables.
METHODS_OF = {
    "words": (
        "in-batch",
        "own draws",
        "recipe",
        "in-batch 256",
        "in-batch 512",
        "memory",
        "uniform",
        "published",
        "16 shared draws",
        "4 own draws",
        "sampled gradient",
        "refreshed",
        "corpus",
        "tree",
        "nystrom",
        "corrector",
        "contrastive",
        "contrastive groups",
        "oracle",
    ),
    "transformer": (
        "in-batch",
        "own draws",
        "16 shared draws",
        "in-batch 96",
        "in-batch 128",
        "memory",
        "uniform",
        "published",
        "recipe",
        "corpus 16",
        "tree 16",
        "nystrom 16",
        "corrector 16",
        "contrastive",
        "contrastive groups",
        "oracle",
        "oracle of all",
    ),
}

# (label, what it is). "The batch" are the other candidates of the batch. Methods with a corpus have
# the batch too.
DESCRIPTIONS = {
    "in-batch": ("in-batch, B = 64", "the batch"),
    "in-batch 96": ("in-batch, B = 96", "a larger batch"),
    "in-batch 128": ("in-batch, B = 128", "a larger batch"),
    "in-batch 256": ("in-batch, B = 256", "a larger batch"),
    "in-batch 512": ("in-batch, B = 512", "a larger batch"),
    "memory": (
        "cross-batch memory",
        "the batch, and the embeddings of the last batches as they were, as many as a cache has"
        " (arXiv 1912.06798)",
    ),
    "uniform": ("64 uniform draws", "the batch, and 64 uniform candidates for all queries"),
    "published": (
        "published cache",
        "a cache as published: one draw a query, its sampled gradient, no batch",
    ),
    "own draws": ("cache, the default", "the batch and `FromCache`: one draw for each query"),
    "recipe": ("cache, 32 shared draws", "`FromCache(num_draws=32)`"),
    "16 shared draws": ("cache, 16 shared draws", "`FromCache(num_draws=16)`"),
    "4 own draws": ("cache, 4 draws a query", "`FromCache(num_negatives=4)`"),
    "sampled gradient": ("cache, sampled gradient", "`FromCache(exact_query_gradient=False)`"),
    "refreshed": ("cache, ρ = 0.001", "`FromCache(refresh_fraction=0.001)`"),
    "corpus": ("corpus, ρ = 0.001", "`FromCorpus(refresh_fraction=0.001)`"),
    "tree": ("corpus, tree", "`FromCorpus` of a cache with a `TreeIndex`"),
    "nystrom": ("corpus, Nyström", "`FromCorpus(corrector=NystromCorrector())`"),
    "corrector": ("corpus, corrector", "`FromCorpus(corrector=Corrector())`"),
    "corpus 16": (
        "corpus, 16 shared draws, ρ = 0.001",
        "`FromCorpus(num_draws=16, refresh_fraction=0.001)`",
    ),
    "tree 16": (
        "corpus, 16 shared draws, tree",
        "`FromCorpus(num_draws=16)` of a cache with a `TreeIndex`",
    ),
    "nystrom 16": (
        "corpus, 16 shared draws, Nyström",
        "`FromCorpus(num_draws=16, corrector=NystromCorrector())`",
    ),
    "corrector 16": (
        "corpus, 16 shared draws, corrector",
        "`FromCorpus(num_draws=16, corrector=Corrector())`",
    ),
    "contrastive": (
        "contrastive batches",
        "the batch, of `GlobalContrastiveBatches` from the second pass on",
    ),
    "contrastive groups": (
        "contrastive batches, groups of 8",
        "the same with `group_size=8`",
    ),
    "oracle": (
        "oracle",
        "a corpus that is encoded again every 10 steps (40 with transformers), 4 draws a query; it"
        " is given steps, not time",
    ),
    "oracle of all": (
        "oracle, held-out candidates too",
        "the same over all candidates: those of the held-out queries are negatives, and never"
        " positives",
    ),
}
# What the README recommends for each kind of towers.
RECOMMENDED = {"words": "own draws", "transformer": "16 shared draws"}


def temperatures(method: str, tower: str, budget: Budget) -> tuple[float, ...]:
    """Those to try with seed 0: the best one of the runs of `worth.py`, if it has tried several."""
    runs = [
        line
        for line in _worth_report.read(SWEEPS / f"{DATA}-{tower}.jsonl")
        if line["kind"] == "run" and line["method"] == method
    ]
    if len({run["temperature"] for run in runs}) < 2:
        return budget.temperatures[tower]
    (own,) = _worth_report.by_method(runs).values()
    return (_worth_report.at_best(own)[0]["temperature"],)
