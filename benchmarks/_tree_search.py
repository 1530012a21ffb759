"""`TreeIndex.top_k` against the indices of faiss, at the same recall."""

import functools
import time
from collections.abc import Callable

import _measure
import _tree_data
import faiss
import numpy as np
import tensorflow as tf

import negative_cache as nc

BATCH, THREADS = 64, 2
NUM_QUERIES = 512
K, RECALLS = (10, 100), (0.9, 0.95)
# Links of a node of HNSW, and how widely it is built. IVF has 4 √N lists.
HNSW_LINKS, HNSW_BUILD = 32, 80
_LARGEST = {"tree": 1024, "IVF": 2048, "HNSW": 2048}

Search = Callable[[np.ndarray, int, int], np.ndarray]


def compare(kind: str, size: int, repeats: int) -> list[dict]:
    """A row for each k and recall; in a process of its own."""
    faiss.omp_set_num_threads(THREADS)
    candidates, queries = _tree_data.make(kind, size)
    queries = np.ascontiguousarray(queries[:NUM_QUERIES])
    methods, building = {}, {}
    for name, make in (("tree", _tree), ("IVF", _ivf), ("HNSW", _hnsw)):
        start = time.perf_counter()
        methods[name] = make(candidates)
        building[f"{name} built, s"] = time.perf_counter() - start

    exact = faiss.IndexFlatIP(candidates.shape[1])
    exact.add(candidates)
    truth = exact.search(queries, max(K))[1]
    rows = []
    for k in K:
        recalls = {
            name: functools.cache(functools.partial(_recall, search, queries, truth[:, :k]))
            for name, search in methods.items()
        }
        for recall in RECALLS:
            row = {"data": kind, "N": size, "k": k, "recall": recall}
            functions = {}
            for name, search in methods.items():
                effort = _smallest_effort(recalls[name], recall, _LARGEST[name])
                row[f"{name}, effort"] = effort
                row[f"{name}, recall"] = recalls[name](effort)
                functions[name] = _over_batches(search, queries, k, effort)
            milliseconds = _measure.medians(functions, repeats=repeats)
            batches = len(queries) // BATCH
            for name, value in milliseconds.items():
                row[f"{name}, ms"] = value / batches
            row.update(building)
            rows.append(row)
    return rows


def _tree(candidates) -> Search:
    """Its effort is the beam."""
    index = nc.TreeIndex(*candidates.shape)
    index.index(candidates, verbose=0)
    compiled = {}

    def search(queries, k, beam):
        if (k, beam) not in compiled:
            signature = tf.TensorSpec([BATCH, candidates.shape[1]])
            function = tf.function(lambda queries: index.top_k(queries, k, beam=beam)[1])
            compiled[k, beam] = function.get_concrete_function(signature)
        return compiled[k, beam](tf.constant(queries)).numpy()

    return search


def _ivf(candidates) -> Search:
    """Its effort is `nprobe`."""
    dim = candidates.shape[1]
    lists = int(4 * np.sqrt(len(candidates)))
    index = faiss.index_factory(dim, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(candidates)
    index.add(candidates)

    def search(queries, k, effort):
        index.nprobe = effort
        return index.search(queries, k)[1]

    return search


def _hnsw(candidates) -> Search:
    """Its effort is `efSearch`."""
    index = faiss.IndexHNSWFlat(candidates.shape[1], HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = HNSW_BUILD
    index.add(candidates)

    def search(queries, k, effort):
        index.hnsw.efSearch = effort
        return index.search(queries, k)[1]

    return search


def _smallest_effort(recall_of: Callable[[int], float], recall: float, largest: int) -> int:
    """By doubling and then halving; `largest` where the recall is not reached."""
    enough = 1
    while enough < largest and recall_of(enough) < recall:
        enough *= 2
    too_little = enough // 2
    while enough < largest and enough - too_little > max(too_little // 8, 1):
        middle = (enough + too_little) // 2
        if recall_of(middle) < recall:
            too_little = middle
        else:
            enough = middle
    return enough


def _recall(search, queries, truth, effort) -> float:
    k = truth.shape[1]
    parts = zip(_batches(queries), _batches(truth))
    found = [
        len(np.intersect1d(one, other))
        for some, true in parts
        for one, other in zip(search(some, k, effort), true)
    ]
    return float(np.mean(found) / k)


def _over_batches(search, queries, k, effort):
    """A function that searches for all queries, so that threads of the others go to sleep."""

    def run():
        for some in _batches(queries):
            search(some, k, effort)
        return ()

    return run


def _batches(rows):
    return np.split(rows, len(rows) // BATCH)
