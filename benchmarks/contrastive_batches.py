"""What batches of similar pairs do on `installed_code`, and what ordering the pairs costs.

    python benchmarks/contrastive_batches.py --part gap        # ten minutes on two cores
    python benchmarks/contrastive_batches.py --part training   # an hour and a half
    python benchmarks/contrastive_batches.py --part order      # half an hour

Towers, data and settings are the demo's; without a cache the negatives are those of the batch.

gap: the demo's towers, trained with shuffled batches. With L the loss over all N candidates and
L_B that over a batch's, ordering is to make the gap L - L_B smaller; also the bandwidth of the
neighbor graph, and the share of its edges inside batches.

training: MRR at equal steps, by where the negatives come from. Ordered batches are ordered anew at
each pass over the pairs. `--duplicates 0.3` adds copies of that share of the pairs, under ids of
their own, so that they are negatives of their originals.

order: seconds and peak memory of `contrastive_order` on N pairs in clusters, with d = 64, with the
exact search and with a `TreeIndex`, each in a new process.
"""

import argparse
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import _measure
import numpy as np
import tensorflow as tf

import negative_cache as nc
from negative_cache import _batch_conflicts, demo
from negative_cache._compat import keras
from negative_cache._contrastive_order import order_of
from negative_cache._grown_batches import grow_batches
from negative_cache.batching import bandwidth, neighbor_graph
from negative_cache.datasets import installed_code

METRICS = ("mrr", "recall_at_1", "recall_at_10", "recall_at_100")
SHUFFLED, ORDERED, GROWN = "shuffled", "ordered", "grown"
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
BATCH_SIZES = (16, 64, 256, 1024)
QUANTILES = (None, 0.99, 0.999)


class Pairs:
    """The training pairs as features, of which some may be there twice."""

    def __init__(self, data: demo.Data, options):
        train, duplicates = data.corpus.train[: options.max_pairs], options.duplicates
        copies = np.random.default_rng(0).choice(train, int(duplicates * len(train)), False)
        rows = np.concatenate([train, copies])
        ids = np.concatenate([train, len(data.corpus) + np.arange(len(copies))]).astype(np.int32)
        candidates = {"ids": data.code_ids[rows], "row": ids}
        self.features = {"query": data.query_ids[rows], "candidate": candidates}
        self.num_pairs = len(rows)


def make_model(data: demo.Data, settings: demo.Settings, cache_size: int) -> nc.DualEncoder:
    """The demo's model."""
    keras.utils.set_random_seed(settings.seed)
    words = keras.layers.Embedding(data.vocabulary_size, settings.dim, mask_zero=True)
    query_tower, candidate_tower = demo.TextTower(words), demo.TextTower(words)
    task = nc.CachedRetrieval(
        candidate_tower,
        {
            "ids": tf.io.FixedLenFeature([demo.CODE_LENGTH], tf.int64),
            "row": tf.io.FixedLenFeature([], tf.int32),
        },
        cache_size,
        temperature=settings.temperature,
        exact_query_gradient=settings.exact_query_gradient,
        in_batch_negatives=True,
        candidate_id_key="row",
        remove_accidental_hits=True,
    )
    model = nc.DualEncoder(query_tower, candidate_tower, task)
    model.compile(optimizer=keras.optimizers.Adam(settings.learning_rate))
    return model


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
    model = make_model(data, settings, settings.cache_size if with_cache else 0)
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


def measure_training(options) -> dict:
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
    return {"rows": rows, "runs": runs}


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


def loss_of_batches(queries, candidates, order, batch_size: int, temperature: float) -> float:
    """The mean in-batch softmax loss of full batches of consecutive pairs."""
    losses = []
    for rows in order[: len(order) // batch_size * batch_size].reshape([-1, batch_size]):
        scores = tf.matmul(queries[rows], candidates[rows], transpose_b=True) / temperature
        losses.append(tf.reduce_mean(tf.reduce_logsumexp(scores, 1) - tf.linalg.diag_part(scores)))
    return float(tf.reduce_mean(losses))


def loss_of_all(queries, candidates, positives, temperature: float) -> float:
    """The mean softmax loss over all candidates; row i of `positives` is that of query i."""
    partition = [
        nc.ops.sample_softmax(queries[start : start + 1024] / temperature, candidates).log_partition
        for start in range(0, len(queries), 1024)
    ]
    positive_scores = tf.reduce_sum(queries * positives, axis=1) / temperature
    return float(tf.reduce_mean(tf.concat(partition, axis=0) - positive_scores))


def share_inside(graph, order, batch_size: int) -> float:
    """The share of a graph's edges that join pairs of one batch."""
    batch_of = np.empty(len(order), np.int64)
    batch_of[order] = np.arange(len(order)) // batch_size
    edges = graph.tocoo()
    return float(np.mean(batch_of[edges.row] == batch_of[edges.col]))


def measure_gap(options) -> dict:
    data = demo.Data(installed_code.load())
    pairs = Pairs(data, options)
    rows = []
    settings = demo.Settings(batch_size=options.batch_size, temperature=options.temperature)
    model, trained = make_model(data, settings, 0), 0
    for steps in options.gap_steps:
        batches = nc.GlobalContrastiveBatches(
            model, pairs.features, options.batch_size, start_epoch=10**6, seed=trained, verbose=0,
            batches_per_epoch=steps - trained or 1, drop_remainder=True,
        )  # fmt: skip
        if steps > trained:
            model.fit(batches, verbose=0)
        trained = steps
        queries, candidates = batches.embed()
        loss = loss_of_all(queries, candidates, candidates, settings.temperature)
        shuffled = np.random.default_rng(0).permutation(pairs.num_pairs)
        for quantile in QUANTILES:
            graph = neighbor_graph(
                queries, candidates, num_neighbors=options.num_neighbors, quantile=quantile
            )
            order = order_of(graph, seed=0)
            for size in (size for size in BATCH_SIZES if size <= pairs.num_pairs):
                orders = {
                    SHUFFLED: shuffled,
                    ORDERED: order,
                    GROWN: grow_batches(graph, order, size),
                }
                losses = {
                    name: loss_of_batches(queries, candidates, each, size, settings.temperature)
                    for name, each in orders.items()
                }
                rows += [
                    {
                        "steps": steps,
                        "quantile": str(quantile),
                        "B": size,
                        "batches": name,
                        "loss over all": loss,
                        "over batches": losses[name],
                        "gap closed by": 1 - (loss - losses[name]) / (loss - losses[SHUFFLED]),
                        "bandwidth": bandwidth(graph, each),
                        "edges inside": share_inside(graph, each, size),
                    }
                    for name, each in orders.items()
                ]
    print("\n" + _measure.table(rows))
    return {"rows": rows}


def clustered_pairs(num_pairs: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit embeddings of queries and candidates near one of N / 50 centres."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal([max(num_pairs // 50, 1), dim], np.float32)
    candidates = centres[rng.integers(len(centres), size=num_pairs)]
    candidates += 0.7 * rng.standard_normal([num_pairs, dim], np.float32)
    candidates /= np.linalg.norm(candidates, axis=1, keepdims=True)
    queries = candidates + 0.1 * rng.standard_normal([num_pairs, dim], np.float32)
    return queries / np.linalg.norm(queries, axis=1, keepdims=True), candidates


def measure_order_of(num_pairs: int, dim: int, num_neighbors: int, search: str) -> dict:
    """Seconds, and the growth of the resident set at its peak."""
    warm = clustered_pairs(2000, dim)
    nc.contrastive_order(*warm, num_neighbors=num_neighbors)
    queries, candidates = clustered_pairs(num_pairs, dim)
    before = _measure.resident("VmRSS")
    _measure.reset_peak()
    marks, index = [time.perf_counter()], None
    if search == "TreeIndex":
        index = nc.TreeIndex(num_pairs, dim)
    # The two steps of `contrastive_order`.
    graph = neighbor_graph(queries, candidates, num_neighbors=num_neighbors, index=index)
    marks.append(time.perf_counter())
    order = order_of(graph, seed=0)
    marks.append(time.perf_counter())
    peak = _measure.resident("VmHWM")
    grown = grow_batches(graph, order, 64)
    marks.append(time.perf_counter())
    ids = np.random.default_rng(0).integers(num_pairs // 4, size=num_pairs)
    _batch_conflicts.separate_ids(order, ids, 64)
    marks.append(time.perf_counter())
    graph_seconds, order_seconds, grow_seconds, ids_seconds = np.diff(marks).tolist()
    return {
        "N": num_pairs,
        "search": search,
        "seconds": graph_seconds + order_seconds,
        "of them graph": graph_seconds,
        "order": order_seconds,
        "MB more at the peak": (peak - before) / 1e6,
        "MB in all": peak / 1e6,
        "bandwidth": bandwidth(graph, order),
        "edges inside batches of 64": share_inside(graph, order, 64),
        "inside grown ones": share_inside(graph, grown, 64),
        "seconds to grow": grow_seconds,
        "to separate ids": ids_seconds,
    }


def measure_order(options) -> dict:
    rows = []
    for num_pairs in options.sizes:
        for search in ("exact", "TreeIndex"):
            row = _measure.in_new_process(
                measure_order_of, num_pairs, 64, options.num_neighbors, search
            )
            rows.append(row or {"N": num_pairs, "search": search, "seconds": "killed"})
            print(rows[-1], flush=True)
    print("\n" + _measure.table(rows))
    return {"rows": rows}


def save(options, record: dict):
    path = options.output
    if path is None:
        name = f"contrastive_batches_{options.part}"
        if options.part == "training":
            name += f"_b{options.batch_size}_t{options.temperature}_{options.steps}steps"
            name += f"_d{options.duplicates}" if options.duplicates else ""
        path = pathlib.Path(f"benchmarks/results/{name}.json")
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    _measure.save(path, {"options": settings, **record})


PARTS = {"gap": measure_gap, "training": measure_training, "order": measure_order}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--batch-size", type=int, default=demo.Settings.batch_size)
    parser.add_argument("--temperature", type=float, default=demo.Settings.temperature)
    parser.add_argument("--num-neighbors", type=int, default=16)
    parser.add_argument("--duplicates", type=float, default=0.0, help="share of pairs copied")
    parser.add_argument("--max-pairs", type=int, help="of the training pairs; all")
    parser.add_argument("--steps", type=int, default=4000, help="training")
    parser.add_argument("--evaluations", type=int, default=8, help="training")
    parser.add_argument("--compare-at", type=int, default=2000, help="training: step of the table")
    parser.add_argument("--seeds", type=int, default=3, help="training")
    parser.add_argument("--settings", action="append", choices=SETTINGS, help="training; all")
    parser.add_argument("--gap-steps", type=int, nargs="+", default=[0, 500, 2000])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 3 * 10**5])
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    save(options, PARTS[options.part](options))


if __name__ == "__main__":
    main()
