"""What `TreeIndex` costs and how close to the softmax it draws.

    python benchmarks/tree_index.py                     # hours on two cores, and 24 GB
    python benchmarks/tree_index.py --part law memory   # ten minutes
    python benchmarks/tree_index.py --part speed --sizes 100000 --data trained

Parts, each a table or two; what `_tree_data` says is the data:

* `law`: total variation of the exact law of draws to the softmax, mean |error of log Z|, and the
  relative bias of the queries' gradient ‖E_law[y] - E_P[y]‖ / ‖E_P[y] - y⁺‖, with both norms over
  all queries, and as the median of the queries' own; against beam and correction steps; also drawn.
  y⁺ is a query's positive, or where it has none the nearest candidate.
* `memory`: bytes of an index without embeddings next to a float32 cache of a million candidates,
  d = 768; and its accuracy, on the trained embeddings mapped to 768 dimensions at random, which
  codes of consecutive dimensions do not know of.
* `speed`: `sample` with beam 8, 12 and 32 and `sample_with_gradient` against `ops.sample_softmax`,
  in graphs, B = 64; then updates of 1,000 candidates that move a little or far. A process a size.
* `build`: seconds and peak memory of `index`. A process a size.
* `search`: `top_k` against faiss (the extra `benchmarks`) at the same recall@k, two threads each.
  A process a size.

A run of some parts leaves the other parts of the record as they are.
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import _measure
import _tree_data
import _tree_law
import _tree_speed

SIZES = {
    "speed": (100_000, 1_000_000, 5_000_000, 20_000_000),
    "build": (100_000, 1_000_000, 20_000_000),
    "search": (28_757, 1_000_000),
    "memory": (100_000,),
}
# Of larger ones, only the first kind of data.
LARGE = 10_000_000


def law(options):
    rows, perplexity = [], {}
    for kind in options.data:
        some, perplexity[kind] = _tree_law.compare_laws(kind, options.queries)
        rows.extend(some)
        show(f"law, median perplexity {perplexity[kind]:.0f}", some)
    plot_laws(rows, options.output.with_name("tree_index_law.png"))
    return {"median perplexity": perplexity, "queries": options.queries, "rows": rows}


def memory(options):
    rows = []
    for size in sizes("memory", options):
        rows.extend(_tree_law.compare_residuals(size, options.queries))
    show("memory", rows)
    return rows


def speed(options):
    draws, updates = [], []
    for kind, size in problems("speed", options):
        pair = _measure.in_new_process(_tree_speed.compare, kind, size, options.repeats)
        if pair is None:
            print(f"speed of {size} {kind} candidates: killed")
            continue
        for name, rows, row in zip(("draws", "updates"), (draws, updates), pair):
            rows.append(row)
            show(name, [row])
    return {"draws": draws, "updates": updates}


def build(options):
    rows = []
    for kind, size in problems("build", options):
        row = _measure.in_new_process(_tree_speed.build, kind, size)
        rows.append(row or {"data": kind, "N": size, "seconds": "killed"})
        show("build", rows[-1:])
    return rows


def search(options):
    rows = []
    for kind, size in problems("search", options):
        some = _measure.in_new_process(_search, kind, size, options.repeats)
        if some is None:
            print(f"search in {size} {kind} candidates: killed")
            continue
        rows.extend(some)
        show("search", some)
    return rows


def _search(*arguments):
    # Only this part needs faiss.
    import _tree_search

    return _tree_search.compare(*arguments)


def sizes(part, options):
    return options.sizes or SIZES[part]


def problems(part, options):
    for size in sizes(part, options):
        for kind in options.data if size < LARGE else options.data[:1]:
            yield kind, size


def show(title, rows):
    print(f"\n{title}\n{_measure.table(rows)}", flush=True)


def plot_laws(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = pyplot.subplots(
        3, len(kinds), figsize=(4.5 * len(kinds), 8.5), layout="constrained", squeeze=False
    )
    for column, kind in zip(axes.T, kinds):
        some = [row for row in rows if row["data"] == kind]
        for axis, quantity in zip(column, ("total variation", "bias", "median bias")):
            for beam in _tree_law.BEAMS:
                values = [row[quantity] for row in some if row["beam"] == beam]
                axis.plot(values, marker=".", label=f"beam {beam}")
            default = next(row for row in some if row[""])
            place = _tree_law.STEPS.index(default["steps"])
            axis.plot(place, default[quantity], "ko", fillstyle="none", label="default")
            axis.set_xticks(range(len(_tree_law.STEPS)), _tree_law.STEPS)
            axis.set(ylabel=quantity, ylim=(0, None))
            axis.grid(alpha=0.3)
        column[0].set_title(f"{kind}, N = {some[0]['N']:,}")
        column[-1].set_xlabel("correction steps")
    lines = axes[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=len(lines[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"\nplotted to {path}")


PARTS = {"law": law, "memory": memory, "speed": speed, "build": build, "search": search}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS))
    parser.add_argument("--data", nargs="+", choices=_tree_data.KINDS, default=_tree_data.KINDS)
    parser.add_argument("--sizes", nargs="+", type=int, help="for all parts but law")
    parser.add_argument("--queries", type=int, default=200, help="for law and memory")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/tree_index.json")
    )
    options = parser.parse_args()
    record = json.loads(options.output.read_text()) if options.output.exists() else {}
    record.pop("machine", None)
    for part in options.parts:
        record[part] = PARTS[part](options)
        _measure.save(options.output, record)


if __name__ == "__main__":
    main()
