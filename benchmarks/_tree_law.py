"""How close to the softmax a `TreeIndex` draws: the exact law of its draws, no sampling."""

import _tree_data
import numpy as np
import tensorflow as tf

import negative_cache as nc
from negative_cache.ops.tree.cut import Scoring
from negative_cache.ops.tree.law import law_after_correction, proposal_log_law, total_variation

BEAMS, STEPS = (4, 8, 12, 16, 32, 64), (0, 1, 2, 4, 8)
# Without embeddings: bytes of the residuals, and the size that the memory is given for.
WIDE_DIM, WIDE_SIZE, WIDE_NOISE = 768, 1_000_000, 0.1
RESIDUAL_BYTES = (0, 8, 12)
_QUERIES_AT_ONCE = 16


def compare_laws(kind: str, num_queries: int) -> tuple[list[dict], float]:
    """A row for each beam and number of steps, and the median perplexity."""
    problem = _tree_data.make(kind)
    queries, positives = _queries_and_positives(kind, problem, num_queries)
    candidates = problem.candidates.astype(np.float64)
    target, log_partition = softmax(queries @ candidates.T)
    expected = target @ candidates
    gradients = expected - candidates[positives]

    index = nc.TreeIndex(len(candidates), candidates.shape[1])
    index.index(problem.candidates, verbose=0)
    rows = []
    for beam in BEAMS:
        error = log_partition_error(index, queries, log_partition, beam)
        proposal = proposals(index, queries, beam)
        for steps in STEPS:
            law = corrected(proposal, target, steps)
            bias = np.linalg.norm(law @ candidates - expected, axis=1)
            row = {
                "data": kind,
                "N": len(candidates),
                "beam": beam,
                "steps": steps,
                "error of log Z": error,
                "total variation": float(total_variation(law, target).mean()),
                "bias": float(np.linalg.norm(bias) / np.linalg.norm(gradients)),
                "median bias": float(np.median(bias / np.linalg.norm(gradients, axis=1))),
            }
            is_default = beam == index.beam and steps == index.correction_steps
            rows.append({**row, "": "default" if is_default else ""})
    entropy = -np.sum(target * np.log(np.maximum(target, 1e-300)), axis=1)
    return rows, float(np.exp(np.median(entropy)))


def compare_residuals(size: int, num_queries: int) -> list[dict]:
    """A row for each number of bytes: memory at `WIDE_SIZE`, accuracy at `size` candidates."""
    candidates, queries = _widened(_tree_data.make("trained", size))
    queries = queries[:num_queries] * _tree_data.SCALE
    target, log_partition = softmax(queries.astype(np.float64) @ candidates.T.astype(np.float64))
    dense_bytes = 4 * WIDE_SIZE * WIDE_DIM
    rows = []
    for num_bytes in RESIDUAL_BYTES:
        settings = {"store_embeddings": False, "residual_bytes": num_bytes}
        used = nc.TreeIndex(WIDE_SIZE, WIDE_DIM, **settings).num_bytes
        index = nc.TreeIndex(size, WIDE_DIM, **settings)
        index.index(candidates, verbose=0)
        stand_ins = decoded(index)
        estimated, _ = softmax((queries @ stand_ins.T).astype(np.float64))
        proposal = proposals(index, queries, index.beam)
        law = corrected(proposal, estimated, index.correction_steps)
        distances = np.linalg.norm(stand_ins - candidates, axis=1)
        rows.append(
            {
                "residual bytes": num_bytes,
                f"MB at N = {WIDE_SIZE}": used / 1e6,
                "float32 cache / index": dense_bytes / used,
                "N": size,
                "error of log Z": log_partition_error(index, queries, log_partition, index.beam),
                "TV, K=0": float(total_variation(proposal, target).mean()),
                f"TV, K={index.correction_steps}": float(total_variation(law, target).mean()),
                "TV of what codes stand for": float(total_variation(estimated, target).mean()),
                "squared distance to it": float(np.mean(distances**2)),
            }
        )
    return rows


def softmax(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [Q, N] and log Z [Q]."""
    log_partition = np.logaddexp.reduce(scores, axis=1)
    return np.exp(scores - log_partition[:, np.newaxis]), log_partition


def proposals(index: nc.TreeIndex, queries: np.ndarray, beam: int) -> np.ndarray:
    """[Q, N], the law of draws without correction."""
    parts = []
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        scoring = Scoring(tf.constant(queries[start : start + _QUERIES_AT_ONCE]))
        parts.append(np.exp(proposal_log_law(index.tree, scoring, beam)))
    law = np.concatenate(parts)
    # Off by the rounding of float32.
    return law / law.sum(axis=1, keepdims=True)


def corrected(proposal: np.ndarray, target: np.ndarray, steps: int) -> np.ndarray:
    """[Q, N], the law after `steps` Metropolis-Hastings steps."""
    pairs = zip(proposal, target)
    return np.stack([law_after_correction(one, aim, steps) for one, aim in pairs])


def log_partition_error(index, queries, log_partition, beam) -> float:
    """Mean |error of log Z|."""
    estimates = [
        index.sample(queries[start : start + 64], beam=beam).log_partition.numpy()
        for start in range(0, len(queries), 64)
    ]
    return float(np.abs(np.concatenate(estimates) - log_partition).mean())


def decoded(index: nc.TreeIndex) -> np.ndarray:
    """[N, d], what an index without embeddings has for each candidate."""
    tree, last = index.tree, index.tree_shape.num_levels - 1
    children = tf.convert_to_tensor(tree.levels[last].children).numpy().reshape(-1)
    owners = np.zeros([index.tree_shape.num_leaves], np.int32)
    owners[children[children >= 0]] = np.flatnonzero(children >= 0)
    result = np.empty([index.capacity, index.embedding_dim], np.float32)
    for leaf, members in enumerate(tf.convert_to_tensor(tree.members).numpy()):
        ids = members[members >= 0]
        if len(ids):
            node = tf.fill([len(ids)], owners[leaf])
            result[ids] = tree.candidates.read(tf.constant(ids), node)[0].numpy()
    return result


def _queries_and_positives(kind, problem, count):
    """Queries with the scale in them; a cluster's positive is the nearest candidate."""
    if kind == "trained":
        _, queries, positives = _tree_data.trained()
        chosen = np.random.default_rng(0).choice(len(queries), count, replace=False)
        return queries[chosen] * _tree_data.SCALE, positives[chosen]
    queries = problem.queries[:count]
    return queries * _tree_data.SCALE, np.argmax(queries @ problem.candidates.T, axis=1)


def _widened(problem):
    """Both mapped to `WIDE_DIM` dimensions without a change of angles; candidates with noise."""
    rng = np.random.default_rng(0)
    dim = problem.candidates.shape[1]
    basis = np.linalg.qr(rng.standard_normal([WIDE_DIM, dim]))[0].T.astype(np.float32)
    candidates = _tree_data.moved(problem.candidates @ basis, WIDE_NOISE, rng)
    return candidates, problem.queries @ basis
