"""Formats what `report.py` has measured: `benchmarks/RESULTS.md` and its plots."""

import datetime
import functools
import pathlib
from collections.abc import Mapping, Sequence

import _measure
import _report_claims
import _worth_report
import numpy as np
from _report_plan import (
    BUDGETS,
    DATA,
    DESCRIPTIONS,
    METHODS_OF,
    RECOMMENDED,
    SWEEPS,
)
from _worth_methods import IN_BATCH, LARGER_BATCHES, METHODS, REFERENCE

OLDER = "†"
_TRAILER, _ALL = "Changes-runs-of", "all methods"
# What the figures of `report.py`, and those of the other scripts, are made by.
_CODE = ("negative_cache", ":!negative_cache/tests")
_OWN_CODE = tuple(
    f"benchmarks/_worth_{part}.py" for part in ("data", "methods", "parts", "run", "towers")
)
# The budget of the runs of `worth.py`.
_SWEEP = "sweep"
# In the order of the report.
_INTRODUCTIONS = {
    "quick": "A few steps of everything, which show that it runs.",
    "hour": "**An hour for the whole report.** The time of {steps:,} steps of the default cache,"
    " about {seconds:.0f} seconds of processor time.",
    "full": "**`--full`.** The time of {steps:,} steps of the default cache, about {seconds:.0f}"
    " seconds of processor time.",
    _SWEEP: "**Recorded by `worth.py`**, each method at the best of the temperatures tried. The"
    " time of {steps:,} steps of the default cache, about {seconds:.0f} seconds of processor time.",
}
_TITLES = {"words": "Cheap towers: means of word vectors", "transformer": "Transformers"}


@functools.cache
def changed_since(commit: str, code: tuple[str, ...] = (*_CODE, *_OWN_CODE)) -> frozenset[str]:
    """The methods whose runs have changed since a commit; `_ALL` among them if nobody knows which.

    A commit whose message has the trailer "Changes-runs-of: tree, oracle" has changed the runs of
    these methods only. A commit with another trailer, or none, has changed all.

    Args:
      commit: its hash.
      code: paths of what the runs are made by.
    """
    every = frozenset({_ALL})
    if not commit or commit.endswith("+") or not _measure.git("cat-file", "-t", commit):
        return every
    if not _measure.git("diff", "--name-only", commit, "--", *code):
        return frozenset()
    is_in_history = _measure.git("merge-base", commit, "HEAD") == _measure.git(
        "rev-parse", f"{commit}^{{commit}}"
    )
    if not is_in_history or _measure.git("diff", "--name-only", "HEAD", "--", *code):
        return every
    trailers = f"--format=%(trailers:key={_TRAILER},valueonly,separator=%x2C)"
    changes = _measure.git("log", trailers, f"{commit}..HEAD", "--", *code).splitlines()
    names = {name.strip() for line in changes for name in line.split(",")}
    return frozenset(names) if names and names <= METHODS.keys() else every


def is_older(line: Mapping) -> bool:
    """Whether what made a line of `report.py` has changed since."""
    return not changed_since(line.get("commit", "")).isdisjoint({_ALL, line["method"]})


def mark_of(path: pathlib.Path) -> str:
    """The mark of a file of results, by the commit that it was added or changed with."""
    commit = _measure.git("log", "-1", "--format=%h", "--", str(path.resolve())).strip()
    return OLDER if changed_since(commit, _CODE) else ""


def write(folder: pathlib.Path, output: pathlib.Path) -> None:
    """Writes the report of the lines in a folder, and its plots beside them."""
    lines = {tower: read(folder / f"{DATA}-{tower}.jsonl") for tower in METHODS_OF}
    runs = [run for own in lines.values() for run in own]
    sections, tables = [], {}
    for tower, own in lines.items():
        sections.append(f"## {_TITLES[tower]}")
        sweep = [{**run, "budget": _SWEEP} for run in read(SWEEPS / f"{DATA}-{tower}.jsonl")]
        tables[tower] = []
        for budget in _INTRODUCTIONS:
            best = best_of([run for run in own + sweep if run["budget"] == budget], tower)
            if best:
                tables[tower].append(best)
                sections.append(section(tower, budget, best, folder, output))
    if not any(tables.values()):
        raise ValueError(f"There are no runs in {folder}: call report.py without --write first.")
    claims = [claim_text(**claim) for claim in _report_claims.claims(tables, mark_of)]
    parts = [_HEAD, origin(runs), *sections, _CLAIMS_HEAD, *claims]
    parts += ["## The methods", markdown(methods(tables))]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n\n".join(parts) + "\n")
    print(f"written to {output}")


def read(path: pathlib.Path) -> list[dict]:
    """The runs of a file; of those that were repeated, the last."""
    keys = ("budget", "method", "options", "temperature", "rate", "seed")
    runs = [line for line in _worth_report.read(path) if line["kind"] == "run"]
    return list({str([run.get(key) for key in keys]): run for run in runs}.values())


def best_of(runs: Sequence[dict], tower: str) -> dict[str, list[dict]]:
    """The runs of each method at its best temperature, in the order of the table."""
    grouped = _worth_report.by_method(runs)
    return {
        name: _worth_report.at_best(grouped[name])
        for name in METHODS_OF[tower]
        if any(run["seed"] == 0 for run in grouped.get(name, ()))
    }


def section(tower, budget, best, folder, output) -> str:
    """The table and the plot of a kind of towers with a budget."""
    labels = {name: DESCRIPTIONS[name][0] for name in best}
    path = folder / f"{DATA}-{tower}-{budget}.png"
    title = f"{DATA}, {tower}"
    _worth_report.plot({labels[name]: own for name, own in best.items()}, title, path)
    timed = [
        own[0]["processor_seconds"][-1] for name, own in best.items() if METHODS[name].is_timed
    ]
    seeds = sorted({len(own) for own in best.values()})
    intro = _INTRODUCTIONS[budget].format(steps=_steps(tower, budget), seconds=np.median(timed))
    lines = [
        f"{intro} {_seeds(seeds)}",
        markdown(table(best)),
        f"![MRR by time and by candidates encoded]({path.relative_to(output.parent)})",
    ]
    missing = [DESCRIPTIONS[name][0] for name in METHODS_OF[tower] if name not in best]
    if missing:
        lines.append(f"Not measured: {'; '.join(missing)}.")
    return "\n\n".join(lines)


def _steps(tower, budget):
    return BUDGETS["full" if budget == _SWEEP else budget].cache_steps[tower]


def _seeds(counts):
    if len(counts) == 1:
        return f"Seeds: {counts[0]}."
    return f"Seeds: {counts[0]} to {counts[-1]}, see the column; the others have not been run yet."


def table(best: Mapping[str, list[dict]]) -> list[dict]:
    """A row for each method: means over its seeds."""
    means = {name: _mean_test(own, "mrr") for name, own in best.items()}
    same_time = _same_time(best)
    rows = []
    for name, own in best.items():
        notes = [
            note
            for note, is_true in (
                ("the recommended cache", name == RECOMMENDED[own[0]["tower"]]),
                ("the same time a step as the default cache", name == same_time),
            )
            if is_true
        ]
        label = DESCRIPTIONS[name][0] + OLDER * any(map(is_older, own))
        encoded = np.mean([run["candidates_encoded"][-1] for run in own])
        rows.append(
            {
                "method": f"{label} ({'; '.join(notes)})" if notes else label,
                "T": own[0]["temperature"],
                "MRR": f"{means[name]:.3f}",
                "of seeds": " ".join(f"{_worth_report.test_mrr(run):.3f}"[1:] for run in own),
                "to in-batch": f"{means[name] / means[IN_BATCH]:.2f}" if IN_BATCH in means else "",
                **{f"recall@{k}": f"{_mean_test(own, f'recall_at_{k}'):.3f}" for k in (1, 10, 100)},
                "steps": f"{own[0]['steps'][-1]:,}",
                "ms a step": f"{np.median([run['ms_per_step'] for run in own]):.1f}",
                "candidates encoded": f"{encoded:,.0f}",
                "seconds to in-batch's best MRR": _to_reach(best, name, "processor_seconds"),
                "encoded to it": _to_reach(best, name, "candidates_encoded"),
                "peak memory, MB": _peak(own),
            }
        )
    return rows


def _peak(runs):
    """The most of the seeds; `worth.py` does not measure it."""
    if not all("peak_bytes" in run for run in runs):
        return ""
    return f"{max(run['peak_bytes'] for run in runs) / 1e6:,.0f}"


def _mean_test(runs, metric):
    return float(np.mean([_worth_report.test_mrr(run, metric) for run in runs]))


def _same_time(best):
    """The larger batch whose steps take most nearly as long as those of the default cache."""
    if REFERENCE not in best:
        return None
    milliseconds = {
        name: np.median([run["ms_per_step"] for run in own]) for name, own in best.items()
    }
    larger = [name for name in best if name in LARGER_BATCHES]
    return min(
        larger,
        key=lambda name: abs(np.log(milliseconds[name] / milliseconds[REFERENCE])),
        default=None,
    )


def _to_reach(best, name, axis):
    if IN_BATCH not in best:
        return ""
    goal = _worth_report.mean_curve(best[IN_BATCH], "test_mrr").max()
    needed = _worth_report.first_at(best[name], axis, goal)
    return "never" if needed is None else f"{needed:,.0f}"


def claim_text(paper: str, claimed: str, measured: Sequence[str], why: str) -> str:
    """A claim of a paper, as a list under a heading."""
    figures = "".join(f"\n  * {sentence}" for sentence in measured)
    return (
        f"### {paper}\n\n* **Claimed**: {claimed}\n* **Measured**:{figures}\n"
        f"* **Why they differ**: {why}"
    )


def methods(tables: Mapping[str, Sequence[Mapping]]) -> list[dict]:
    """What each method of the tables is."""
    names = {name for own in tables.values() for best in own for name in best}
    return [
        {"method": label, "negatives": what}
        for name, (label, what) in DESCRIPTIONS.items()
        if name in names
    ]


def origin(runs: Sequence[dict]) -> str:
    """On which machines and commits the lines were measured."""
    if not runs:
        return "No runs of `report.py` yet."
    machines = {
        f"{machine['processor']}, {machine['cores']} cores, TensorFlow {machine['tensorflow']},"
        f" Python {machine['python']}"
        for machine in (run["machine"] for run in runs)
    }
    older = {run["commit"] for run in runs if is_older(run)}
    commits = [
        (commit or "unknown") + OLDER * (commit in older)
        for commit in dict.fromkeys(run["commit"] for run in runs)
    ]
    return (
        f"Machine: {'; '.join(sorted(machines))}. Commits: {', '.join(commits)}."
        f" One thread a run, two runs at a time. Written on {datetime.date.today().isoformat()}."
    )


def markdown(rows: Sequence[Mapping[str, object]]) -> str:
    """A table whose columns are the keys of the first row."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row[column]) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


_HEAD = f"""# Results

`make report` writes this page out of `benchmarks/results/`. Do not edit it. `benchmarks/README.md`
says what each script measures, and has longer runs.

Every method is given the same processor time, on one thread, without evaluations; caches are
filled out of it. Data are the functions of the installed packages (`installed_code`): a query is
the summary of a function, and all functions are ranked. Cheap towers have all of them as
candidates, transformers of two blocks 8,192. B = 64 if a method does not say otherwise, d = 64.
A corpus are the candidates that are trained on, if a method does not say otherwise.

* **T** is the best temperature of the method's runs by `worth.py`, if there are some. Otherwise it
  is the better of 0.07 and 0.1, or 0.1 with transformers. Validation MRR of seed 0 chooses.
* **MRR** and **recall** are of test queries, at the evaluation with the best validation MRR; means
  over the seeds.
* **Candidates encoded** count the batch's, drawn and refreshed ones, and what fills caches. Queries
  and evaluations are not counted.
* **Seconds to in-batch's best MRR** are of processor time, until the mean curve first is where that
  of in-batch, B = 64, is at its best.
* **Peak memory** is that of the process while it trains, TensorFlow and the data included.
* {OLDER} marks figures of a commit after which the package, or how runs are made, has changed."""

_CLAIMS_HEAD = f"""## The papers' claims

Claims are in our words. Figures of scripts other than `report.py` are of recorded runs, with the
settings of `benchmarks/README.md`. {OLDER} means that the package has changed since then."""
