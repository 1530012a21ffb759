"""What batches of similar pairs are worth in MRR on `installed_code`, at equal steps.

    python benchmarks/contrastive_training.py --temperature 0.1      # half an hour a temperature
    python benchmarks/contrastive_training.py --batch-size 16
    python benchmarks/contrastive_training.py --duplicates 0.3
    python benchmarks/contrastive_training.py --steps 4000 --settings shuffled --settings grown

Towers, data and settings are the demo's; without a cache the negatives are those of the batch.
Batches are ordered anew at each pass over the pairs. `--duplicates 0.3` adds copies of that share
of the pairs, under ids of their own, so that they are negatives of their originals.
"""

import argparse
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import _measure
import numpy as np
from _contrastive import GROWN, ORDERED, SHUFFLED, Pairs, loss_of_all

import negative_cache as nc
from negative_cache import demo
from negative_cache._compat import keras
from negative_cache.datasets import installed_code

METRICS = ("mrr", "recall_at_1", "recall_at_10", "recall_at_100")
# What `GlobalContrastiveBatches` is told, and whether there is a cache.
SETTINGS = {
    SHUFFLED: ({"start_epoch": 10**6}, False),
    ORDERED: ({}, False),
    GROWN: ({"grow": True}, False),
    "ordered, groups of 8": ({"group_size": 8}, False),
    "grown, groups of 8": ({"grow": True, "group_size": 8}, False),
    "grown, groups of 4": ({"grow": True, "group_size": 4}, False),
    "grown, half random": ({"grow": True, "random_fraction": 0.5}, False),
    "grown for three passes": (
        {"grow": True, "random_fraction": lambda epoch: float(epoch >= 3)},
        False,
    ),
    "cache": ({"start_epoch": 10**6}, True),
    "ordered + cache": ({}, True),
    "grown + cache": ({"grow": True}, True),
    "grown, groups of 4 + cache": ({"grow": True, "group_size": 4}, True),
}


class LossesOverAll(keras.callbacks.Callback):
    """Logs the softmax loss over the whole corpus, of training and of validation queries."""

    def __init__(self, data: demo.Data, temperature: float):
        super().__init__()
        self._data, self._temperature = data, temperature

    def set_model(self, model):
        super().set_model(model)
        self._embed_queries, self._embed_candidates = nc.evaluation.encoders_of(model)

    def on_epoch_end(self, epoch, logs=None):
        data, corpus = self._data, self._data.corpus
        candidates = self._embed_candidates(data.candidates(np.arange(len(corpus))))
        for name, rows in (("train", corpus.train[:4096]), ("val", corpus.validation)):
            pairs = data.pairs(rows).batch(1024)
            queries = self._embed_queries(pairs.map(lambda pair: pair["query"]))
            loss = loss_of_all(queries, candidates, candidates[rows], self._temperature)
            logs[f"{name}_loss_over_all"] = loss


def train(data: demo.Data, pairs: Pairs, name: str, seed: int, options) -> dict:
    """Trains with one of `SETTINGS`; `history` is what the evaluations show."""
    schedule, with_cache = SETTINGS[name]
    settings = demo.Settings(
        steps=options.steps,
        batch_size=options.batch_size,
        temperature=options.temperature,
        seed=seed,
    )
    model = demo.make_model(data, settings.cache_size if with_cache else 0, settings)
    steps_per_epoch = options.steps // options.evaluations
    batches = nc.GlobalContrastiveBatches(
        model,
        pairs.features,
        options.batch_size,
        num_neighbors=options.num_neighbors,
        drop_remainder=True,
        batches_per_epoch=steps_per_epoch,
        seed=seed,
        verbose=0,
        **schedule,
    )
    corpus = data.corpus
    evaluation = nc.CorpusMetrics(
        data.candidates(np.arange(len(corpus))),
        data.pairs(corpus.validation).batch(1024),
        candidate_id_key="row",
    )
    callbacks = [evaluation, LossesOverAll(data, settings.temperature)]
    if with_cache:
        order = np.random.default_rng(seed).permutation(corpus.train)
        callbacks.insert(0, nc.CacheWarmStart(data.candidates(order), verbose=0))
    start = time.perf_counter()
    history = model.fit(batches, epochs=options.evaluations, callbacks=callbacks, verbose=0).history
    history = {key: [float(value) for value in values] for key, values in history.items()}
    print(f"seed {seed}, {name}: MRR", *(f"{mrr:.4f}" for mrr in history["val_mrr"]), flush=True)
    return {
        "setting": name,
        "seed": seed,
        "seconds": time.perf_counter() - start,
        "steps": [steps_per_epoch * (epoch + 1) for epoch in range(options.evaluations)],
        "history": history,
    }


def measure(options) -> None:
    data = demo.Data(installed_code.load())
    pairs = Pairs(data, options)
    print(f"{pairs.num_pairs:,} pairs, {pairs.num_pairs // options.batch_size} batches in a pass")
    names, runs = options.settings or list(SETTINGS), []
    for seed in range(options.seeds):
        for name in names:
            runs.append(train(data, pairs, name, seed, options))
        rows = rows_of(runs, names, options.compare_at)
        save(options, {"rows": rows, "runs": runs})
    print("\n" + _measure.table(rows))


def rows_of(runs: list[dict], names: list[str], compare_at: int) -> list[dict]:
    """A row for each setting: means over seeds, at a step and at the end."""
    steps = runs[0]["steps"]
    at = int(np.searchsorted(steps, min(compare_at, steps[-1])))
    own = {name: [run for run in runs if run["setting"] == name] for name in names}
    mrr = {name: np.array([run["history"]["val_mrr"] for run in own[name]]) for name in names}
    rows = []
    for name in names:
        mean = mrr[name].mean(axis=0)
        row = {"setting": name, "step": steps[at]}
        for metric in METRICS:
            values = [run["history"][f"val_{metric}"][at] for run in own[name]]
            row[metric] = float(np.mean(values))
        row["mrr of seeds"] = " ".join(f"{value:.4f}" for value in mrr[name][:, at])
        if SHUFFLED in names:
            row["to shuffled"] = row["mrr"] / float(mrr[SHUFFLED][:, at].mean())
        row["last mrr"] = float(mean[-1])
        row["best mrr"], row["best step"] = float(mean.max()), steps[int(mean.argmax())]
        for loss in ("train_loss_over_all", "val_loss_over_all"):
            row[loss] = float(np.mean([run["history"][loss][-1] for run in own[name]]))
        row["batch loss"] = float(np.mean([run["history"]["loss"][at] for run in own[name]]))
        row["seconds"] = float(np.median([run["seconds"] for run in own[name]]))
        rows.append(row)
    return rows


def save(options, record: dict) -> None:
    """Writes the record and a plot of MRR against steps."""
    path = options.output
    if path is None:
        name = f"contrastive_training_t{options.temperature}"
        name += f"_b{options.batch_size}" if options.batch_size != 64 else ""
        name += f"_d{options.duplicates}" if options.duplicates else ""
        name += f"_{options.steps}steps" if options.steps != 2000 else ""
        path = pathlib.Path(f"benchmarks/results/{name}.json")
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    _measure.save(path, {"options": settings, **record})
    plot(record["runs"], f"temperature {options.temperature}", path.with_suffix(".png"))


def plot(runs: list[dict], title: str, path: pathlib.Path) -> None:
    """MRR against steps, with the range of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.0), layout="constrained")
    for name in dict.fromkeys(run["setting"] for run in runs):
        mrr = np.array([run["history"]["val_mrr"] for run in runs if run["setting"] == name])
        (line,) = axes.plot(runs[0]["steps"], mrr.mean(axis=0), marker="o", label=name)
        axes.fill_between(
            runs[0]["steps"], mrr.min(axis=0), mrr.max(axis=0), color=line.get_color(), alpha=0.15
        )
    axes.set(xlabel="steps", ylabel="MRR over all candidates", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=demo.Settings.batch_size)
    parser.add_argument("--temperature", type=float, default=demo.Settings.temperature)
    parser.add_argument("--num-neighbors", type=int, default=16)
    parser.add_argument("--duplicates", type=float, default=0.0, help="share of pairs copied")
    parser.add_argument("--max-pairs", type=int, help="of the training pairs; all")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--evaluations", type=int, default=4)
    parser.add_argument("--compare-at", type=int, default=2000, help="step of the table")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", action="append", choices=SETTINGS, help="all")
    parser.add_argument("--output", type=pathlib.Path)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
