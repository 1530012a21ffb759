"""Embeddings for the benchmarks of `TreeIndex`: of a trained model, and of clusters at random.

Of both kinds there are as many as one asks for. The trained ones are those of the demo's towers on
`installed_code`, and beyond its 28,757 functions copies of them, each moved by Gaussian noise of a
quarter of its length and brought back to unit length. Queries are held-out summaries. The clustered
ones are unit vectors around a random centre for every hundred of them, moved from it by noise of
0.8 of its length; queries are more points of the same clusters.
"""

import hashlib
import pathlib
import tempfile
from typing import NamedTuple

import numpy as np

import negative_cache as nc
from negative_cache import demo
from negative_cache.datasets import installed_code

KINDS = ("trained", "clustered")
# Scores are inner products of unit vectors times this.
SCALE = 20.0
DIM = 64
NUM_QUERIES = 2048
COPY_NOISE = 0.25
CLUSTER_SIZE, CLUSTER_NOISE = 100, 0.8
_ROWS_AT_ONCE = 2**18


class Problem(NamedTuple):
    """Candidates [N, d] and queries [Q, d], unit float32."""

    candidates: np.ndarray
    queries: np.ndarray


def make(kind: str, size: int | None = None) -> Problem:
    """`size` candidates of a kind, in an array filled block by block, and queries."""
    if kind == "clustered":
        return _clustered(size or 30_000)
    candidates, queries, _ = trained()
    queries = queries[np.random.default_rng(0).permutation(len(queries))[:NUM_QUERIES]]
    return Problem(_copies(candidates, size or len(candidates)), queries)


def trained() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidates [N, d], held-out queries [Q, d] and the rows of their positives [Q].

    The model is trained once; the embeddings are kept in the folder for temporary files.
    """
    settings = demo.Settings(steps=2000, patience=None, dim=DIM)
    corpus = installed_code.load()
    key = repr((settings, nc.__version__, list(corpus.names)))
    folder = pathlib.Path(tempfile.gettempdir()) / "negative_cache_benchmarks"
    path = folder / f"embeddings-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if not path.exists():
        data = demo.Data(corpus)
        model = demo.train("for the embeddings", data, settings.cache_size, settings).model
        encoder = nc.evaluation.Encoder(model.candidate_network)
        candidates = np.asarray(encoder(data.candidates(np.arange(len(corpus)))))
        queries = model.query_network(data.query_ids[corpus.validation]).numpy()
        folder.mkdir(exist_ok=True)
        np.savez(path, candidates=candidates, queries=queries)
    with np.load(path) as arrays:
        return arrays["candidates"], arrays["queries"], corpus.validation


def moved(rows: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors [n, d], each moved by Gaussian noise of `noise` times its length, about."""
    scale = np.float32(noise / np.sqrt(rows.shape[1]))
    rows = rows + scale * rng.standard_normal(rows.shape, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _copies(candidates, size):
    """The candidates first, then their copies, row i of row i mod N."""
    result = np.empty([size, candidates.shape[1]], np.float32)
    rng = np.random.default_rng(0)
    for start in range(0, size, _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, size))
        noise = np.where(rows < len(candidates), 0.0, COPY_NOISE)[:, np.newaxis]
        result[rows] = moved(candidates[rows % len(candidates)], noise.astype(np.float32), rng)
    return result


def _clustered(size):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal([max(size // CLUSTER_SIZE, 1), DIM], np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)

    def points(count):
        return moved(centres[rng.integers(len(centres), size=count)], CLUSTER_NOISE, rng)

    candidates = np.empty([size, DIM], np.float32)
    for start in range(0, size, _ROWS_AT_ONCE):
        candidates[start : start + _ROWS_AT_ONCE] = points(min(_ROWS_AT_ONCE, size - start))
    return Problem(candidates, points(NUM_QUERIES))
