"""What batches of similar pairs hold, and what ordering the pairs costs.

    python benchmarks/contrastive_batches.py --part gap        # ten minutes on two cores
    python benchmarks/contrastive_batches.py --part order      # ten minutes
    python benchmarks/contrastive_batches.py --part interactions

gap: the demo's towers on `installed_code`, trained with shuffled batches. With L the loss over all
N candidates and L_B that over a batch's, ordering is to make the gap L - L_B smaller; also the
bandwidth of the neighbor graph, and the share of its edges inside batches.

interactions: the same gap for synthetic users with several positives among items of which some are
popular, by which ids the order is given; positives of a user do not count as negatives. Also the
share of in-batch negatives that are other positives of their user.

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
from _contrastive import GROWN, ORDERED, SHUFFLED, Pairs, loss_of_all

import negative_cache as nc
from negative_cache import demo
from negative_cache.batching import bandwidth, keep_apart, neighbor_graph
from negative_cache.batching.grow import grow_batches
from negative_cache.batching.ids import Ids
from negative_cache.batching.order import order_of
from negative_cache.datasets import installed_code

BATCH_SIZES = (16, 64, 256, 1024)
QUANTILES = (None, 0.99, 0.999)


def loss_of_batches(queries, candidates, order, batch_size: int, temperature: float) -> float:
    """The mean in-batch softmax loss of full batches of consecutive pairs."""
    losses = []
    for rows in order[: len(order) // batch_size * batch_size].reshape([-1, batch_size]):
        scores = tf.matmul(queries[rows], candidates[rows], transpose_b=True) / temperature
        losses.append(tf.reduce_mean(tf.reduce_logsumexp(scores, 1) - tf.linalg.diag_part(scores)))
    return float(tf.reduce_mean(losses))


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
    model, trained = demo.make_model(data, 0, settings), 0
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


def popular(num_items: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Items of which some are drawn far more often than others, none in more than 1 % of draws."""
    popularity = 1.0 / (np.arange(num_items) + 20.0) ** 0.9
    return rng.choice(num_items, size, p=popularity / popularity.sum())


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
    # The hardest for it: pairs of one candidate are next to one another, and some are frequent.
    ids = np.empty(num_pairs, np.int64)
    ids[order] = np.sort(popular(num_pairs // 4, num_pairs, np.random.default_rng(0)))
    keep_apart.separate(order, Ids(candidates=ids), 64)
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
    path = options.output or pathlib.Path(f"benchmarks/results/contrastive_{options.part}.json")
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    _measure.save(path, {"options": settings, **record})


def interactions(num_users: int, num_items: int, dim: int, rng: np.random.Generator):
    """Users and items [N] of some ten interactions a user, and unit embeddings of both."""
    centres = rng.standard_normal([num_items // 50, dim])
    tastes, kinds = (rng.integers(len(centres), size=n) for n in (num_users, num_items))
    items = centres[kinds] + 0.7 * rng.standard_normal([num_items, dim])
    users = centres[tastes] + 0.7 * rng.standard_normal([num_users, dim])
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    users /= np.linalg.norm(users, axis=1, keepdims=True)
    pairs = set()
    for user in range(num_users):
        drawn = popular(num_items, 200, rng)
        liked = drawn[np.argsort(-(items[drawn] @ users[user]))[:12]]
        pairs |= {(user, int(item)) for item in liked}
    pairs = np.array(sorted(pairs))
    return pairs[:, 0], pairs[:, 1], users.astype(np.float32), items.astype(np.float32)


def measure_interactions(options) -> dict:
    rng = np.random.default_rng(0)
    users, items, user_embeddings, item_embeddings = interactions(3000, 4000, 64, rng)
    queries, candidates, size = user_embeddings[users], item_embeddings[items], options.batch_size
    is_positive = np.zeros([len(user_embeddings), len(item_embeddings)], bool)
    is_positive[users, items] = True

    def losses(order=None):
        """Mean loss without other positives of the user, and their share in the batches."""
        batches = order[: len(order) // size * size].reshape([-1, size])
        values, shares = [], []
        for rows in batches:
            columns = items[rows] if order is not all_pairs else np.arange(len(item_embeddings))
            is_other = is_positive[users[rows][:, np.newaxis], columns].copy()
            own = columns == items[rows][:, np.newaxis]
            shares.append(np.mean(is_other & ~own))
            scores = queries[rows] @ item_embeddings[columns].T / options.temperature
            scores = np.where(is_other & ~own, -np.inf, scores)
            positive = np.sum(queries[rows] * candidates[rows], axis=1) / options.temperature
            values.append(np.mean(np.logaddexp.reduce(scores, axis=1) - positive))
        return float(np.mean(values)), float(np.mean(shares))

    all_pairs = np.arange(len(users))
    of_all, _ = losses(all_pairs)
    shuffled = keep_apart.separate(rng.permutation(len(users)), Ids(candidates=items), size)
    of_shuffled, share = losses(shuffled)
    rows = [{"batches": SHUFFLED, "ids": "candidate", "gap closed by": 0.0, "positives": share}]
    ids = {
        "none, then separated": {},
        "candidate": {"candidate_ids": items},
        "candidate, query": {"candidate_ids": items, "query_ids": users},
    }
    for name, given in ids.items():
        for grow in (False, True):
            order = nc.contrastive_order(
                queries,
                candidates,
                num_neighbors=options.num_neighbors,
                batch_size=size,
                grow=grow,
                **given,
            )
            if not given:
                order = keep_apart.separate(order, Ids(candidates=items), size)
            loss, share = losses(order)
            closed = 1 - (of_all - loss) / (of_all - of_shuffled)
            rows.append(
                {
                    "batches": GROWN if grow else ORDERED,
                    "ids": name,
                    "gap closed by": closed,
                    "positives": share,
                }
            )
    print(f"{len(users):,} interactions; most of a candidate: {np.bincount(items).max()}")
    print("\n" + _measure.table(rows))
    return {"rows": rows}


PARTS = {
    "gap": measure_gap,
    "interactions": measure_interactions,
    "order": measure_order,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--batch-size", type=int, default=demo.Settings.batch_size)
    parser.add_argument("--temperature", type=float, default=demo.Settings.temperature)
    parser.add_argument("--num-neighbors", type=int, default=16)
    parser.add_argument("--duplicates", type=float, default=0.0, help="share of pairs copied")
    parser.add_argument("--max-pairs", type=int, help="of the training pairs; all")
    parser.add_argument("--gap-steps", type=int, nargs="+", default=[0, 500, 2000])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**5, 3 * 10**5])
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    save(options, PARTS[options.part](options))


if __name__ == "__main__":
    main()
