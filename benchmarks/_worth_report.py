"""What `worth.py` has measured, as tables and curves."""

import json
import pathlib

import _measure
import numpy as np
from _worth_methods import IN_BATCH, LARGER_BATCHES

_EQUAL_TIME = "best larger batch"


def read(path: pathlib.Path) -> list[dict]:
    """The lines of a file, if there is one."""
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def best_validation(run: dict) -> float:
    """The best validation MRR of a run."""
    return max(run["validation_mrr"])


def test_mrr(run: dict, metric: str = "mrr") -> float:
    """A test metric at the evaluation with the best validation MRR."""
    return run[f"test_{metric}"][int(np.argmax(run["validation_mrr"]))]


def one_line(run: dict) -> str:
    """A run, in a line."""
    return (
        f"{run['data']}, {run['tower']}, {run['method']}, T {run['temperature']},"
        f" rate {run['rate']}, seed {run['seed']}: validation MRR {best_validation(run):.4f}, test"
        f" {test_mrr(run):.4f} (at the end {run['test_mrr'][-1]:.4f}), {run['ms_per_step']:.1f} ms"
        f" × {run['steps'][-1]:,} steps, {run['candidates_encoded'][-1]:,} encoded"
    )


def report(folder: pathlib.Path, only: dict) -> None:
    """Prints a table for each file of the folder, and draws its curves beside it."""
    for tower in only["tower"]:
        for data in only["data"]:
            runs = [
                line
                for line in read(folder / f"{data}-{tower}.jsonl")
                if line["kind"] == "run" and line["method"] in only["method"]
            ]
            if runs:
                best = {name: at_best(own) for name, own in by_method(runs).items()}
                print(f"\n{data}, {tower}\n\n{_measure.table(rows(best, runs))}")
                plot(best, f"{data}, {tower}", folder / f"{data}-{tower}.png")


def by_method(runs: list[dict]) -> dict[str, list[dict]]:
    """Runs of each method; only those with the options of the last one."""
    last = {run["method"]: run["options"] for run in runs}
    grouped = {}
    for run in runs:
        if run["options"] == last[run["method"]]:
            grouped.setdefault(run["method"], []).append(run)
    return grouped


def at_best(runs: list[dict]) -> list[dict]:
    """The runs of all seeds with the settings at which seed 0 has the best validation MRR."""
    best = max((run for run in runs if run["seed"] == 0), key=best_validation)
    settings = best["temperature"], best["rate"]
    return [run for run in runs if (run["temperature"], run["rate"]) == settings]


def rows(best: dict[str, list[dict]], runs: list[dict]) -> list[dict]:
    """A row of the table for each method, in the order of their first runs."""
    means = {name: float(np.mean([test_mrr(run) for run in own])) for name, own in best.items()}
    larger = [name for name in best if name in LARGER_BATCHES]
    # Chosen on validation, as temperatures are.
    larger = max(
        larger, key=lambda name: np.mean([best_validation(run) for run in best[name]]), default=None
    )
    table = []
    for name, own in best.items():
        mrr = [test_mrr(run) for run in own]
        tried = {run["temperature"] for run in runs if run["method"] == name}
        table.append(
            {
                "method": name + (f" ({_EQUAL_TIME})" if name == larger else ""),
                "B": own[0]["batch_size"],
                "T": own[0]["temperature"],
                "of": len(tried),
                "rate": own[0]["rate"],
                "MRR": f"{means[name]:.4f}",
                "of seeds": " ".join(f"{value:.4f}" for value in mrr),
                "recall@1": f"{np.mean([test_mrr(run, 'recall_at_1') for run in own]):.3f}",
                "@10": f"{np.mean([test_mrr(run, 'recall_at_10') for run in own]):.3f}",
                "@100": f"{np.mean([test_mrr(run, 'recall_at_100') for run in own]):.3f}",
                "to in-batch": _ratio(means, name, IN_BATCH),
                "to larger": _ratio(means, name, larger),
                "steps": own[0]["steps"][-1],
                "ms/step": f"{np.median([run['ms_per_step'] for run in own]):.1f}",
                "seconds to in-batch's best": _to_reach(best, name, "processor_seconds"),
                "encoded to it": _to_reach(best, name, "candidates_encoded"),
            }
        )
    return table


def _ratio(means, name, baseline):
    return f"{means[name] / means[baseline]:.3f}" if baseline in means else ""


def _to_reach(best, name, axis):
    """How much of an axis a method needs to have the best MRR of in-batch, and of what in-batch."""
    if IN_BATCH not in best:
        return ""
    goal = mean_curve(best[IN_BATCH], "test_mrr").max()
    needed = first_at(best[name], axis, goal)
    of_baseline = first_at(best[IN_BATCH], axis, goal)
    return "never" if needed is None else f"{needed:,.0f} ({needed / of_baseline:.2f})"


def first_at(runs, axis, goal):
    """Where the mean curve first is at the goal, between its points by a line."""
    places, curve = mean_curve(runs, axis), mean_curve(runs, "test_mrr")
    above = np.flatnonzero(curve >= goal)
    if not len(above):
        return None
    i = above[0]
    if i == 0:
        return places[0]
    share = (goal - curve[i - 1]) / (curve[i] - curve[i - 1])
    return places[i - 1] + share * (places[i] - places[i - 1])


def mean_curve(runs, key):
    return np.mean([run[key] for run in runs], axis=0)


def plot(best: dict[str, list[dict]], title: str, path: pathlib.Path) -> None:
    """Test MRR by processor time and by candidates encoded, the mean of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, 2, figsize=(11.0, 4.5), layout="constrained", sharey=True)
    colors = pyplot.get_cmap("tab20").colors
    styles = ("-", "--", ":")
    for number, (name, runs) in enumerate(best.items()):
        look = {"color": colors[number % 20], "linestyle": styles[number // 20]}
        for place, axis in zip(axes, ("processor_seconds", "candidates_encoded")):
            curve = mean_curve(runs, "test_mrr")
            place.plot(mean_curve(runs, axis), curve, label=name, **look)
    axes[0].set(xlabel="seconds of processor time", ylabel="MRR over all candidates", title=title)
    axes[1].set(xlabel="candidates encoded", xscale="log")
    axes[1].xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes[1].xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes[1].xaxis.set_minor_locator(ticker.NullLocator())
    for place in axes:
        place.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
