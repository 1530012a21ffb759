"""What a `TreeIndex` that follows the embeddings is worth in training, on `installed_code`.

    python benchmarks/tree_training.py               # forty minutes on two cores

The candidates are a fixed set of functions, and row i of every store is candidate i. The loss is
softmax cross-entropy over the positive and all other candidates,

    L = -s(x, y⁺) + log(exp s(x, y⁺) + Z(x)),    Z(x) = Σ_y exp s(x, ĝ(y)) without y⁺,

with the value of log Z from stored embeddings ĝ, and its gradient from S draws a query, which are
encoded. Settings differ in where ĝ is stored and in what is written to it; towers, their first
weights, the order of the data, the optimizer and the number of steps are the same. The oracle
encodes every candidate at every step. What a setting misses of the oracle's MRR is its gap; the
question is whether the tree's is at most half of that of a matrix which is encoded once an epoch.
In-batch and uniform negatives are there for orientation.

The training step below is also an example of a `TreeIndex` in a loop of one's own.
"""

import argparse
import dataclasses
import math
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import _measure
import numpy as np
import tensorflow as tf

import negative_cache as nc
from negative_cache import demo
from negative_cache._compat import keras
from negative_cache.datasets import installed_code
from negative_cache.layers import TreeIndex
from negative_cache.ops import contrastive, sample_softmax_with_gradient

METRICS = ("mrr", "recall_at_1", "recall_at_10", "recall_at_100")
# How runs are compared by their MRRs [seeds, evaluations]. At the end of an epoch, what is encoded
# once an epoch is oldest.
READOUTS = {
    "at the end": lambda mrr: mrr[:, -1],
    "mean of evaluations": lambda mrr: mrr.mean(axis=1),
    "best evaluation": lambda mrr: mrr.max(axis=1),
}
# In which all candidates are encoded.
_BLOCKS = 16


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where negatives come from.

    Attributes:
      store: "matrix" or "tree"; None for negatives that no stored embeddings choose.
      refreshes: how often in an epoch all candidates are encoded; None for every step, 0 for once,
        at the start.
      write_back: whether drawn rows and the batch's positives are written to the store.
      control_variate: whether the queries' gradient is that of log Z and draws only correct it, or
        all of it comes from draws.
    """

    store: str | None = None
    refreshes: int | None = 0
    write_back: bool = False
    control_variate: bool = True


ORACLE, MATRIX, TREE = "oracle", "matrix, written back", "tree"
STALE, STALE_PLAIN = "stale, once an epoch", "stale, draws alone"
STALE_4 = "stale, 4 times an epoch"
IN_BATCH, UNIFORM = "in-batch", "uniform"
SETTINGS = {
    ORACLE: Setting("matrix", refreshes=None),
    STALE: Setting("matrix", refreshes=1),
    STALE_PLAIN: Setting("matrix", refreshes=1, control_variate=False),
    STALE_4: Setting("matrix", refreshes=4),
    MATRIX: Setting("matrix", write_back=True),
    TREE: Setting("tree", write_back=True),
    UNIFORM: Setting(),
    IN_BATCH: Setting(),
}


class Problem:
    """The candidates as word ids, which of them have training pairs, and who is asked for.

    Args:
      num_candidates: how many of the training and validation functions, at random, to have as
        candidates; None for all of them. At most a third are for validation.
    """

    def __init__(self, num_candidates: int | None):
        corpus = installed_code.load()
        rng = np.random.default_rng(0)
        if num_candidates is None:
            num_candidates = len(corpus.validation) + len(corpus.train)
        validation = rng.permutation(corpus.validation)[: num_candidates // 3]
        train = rng.permutation(corpus.train)[: num_candidates - len(validation)]
        rows = np.sort(np.concatenate([validation, train]))
        columns = (getattr(corpus, field.name)[rows] for field in dataclasses.fields(corpus))
        corpus = installed_code.Corpus(*columns)
        data = demo.Data(corpus)
        self.num_candidates = len(corpus)
        self.train, self.validation = corpus.train, corpus.validation
        self.vocabulary_size = data.vocabulary_size
        self.query_ids, self.code_ids = tf.constant(data.query_ids), tf.constant(data.code_ids)
        # Texts of about the same length together, so that little padding is encoded.
        lengths = np.count_nonzero(data.code_ids, axis=1)
        order = np.argsort(lengths, kind="stable")
        self._place = tf.constant(np.argsort(order))
        self._blocks = [
            tf.constant(data.code_ids[block, : max(lengths[block])])
            for block in np.array_split(order, _BLOCKS)
        ]

    def encode_all(self, tower) -> tf.Tensor:
        """[N, d] embeddings of all candidates."""
        embeddings = tf.concat([tower(block) for block in self._blocks], axis=0)
        return tf.gather(embeddings, self._place)

    def batches(self, batch_size: int, seed: int):
        """Epochs without end, each [steps, batch_size] rows of training pairs."""
        rng = np.random.default_rng(seed)
        steps = len(self.train) // batch_size
        while True:
            rows = rng.permutation(self.train)[: steps * batch_size]
            yield rows.reshape([steps, batch_size])


class Matrix:
    """Embeddings of all candidates, whose softmax is drawn from exactly."""

    def __init__(self, num_candidates: int, dim: int):
        self.embeddings = tf.Variable(tf.zeros([num_candidates, dim]), trainable=False)

    def fill(self, embeddings):
        self.embeddings.assign(embeddings)

    def draw(self, queries, **options):
        return sample_softmax_with_gradient(queries, self.embeddings, **options)

    def write(self, rows, embeddings):
        self.embeddings.scatter_nd_update(rows[:, tf.newaxis], embeddings)


class Tree:
    """The same in a `TreeIndex`, whose draws follow the softmax nearly."""

    def __init__(self, num_candidates: int, dim: int):
        self.index = TreeIndex(num_candidates, dim)

    @property
    def embeddings(self):
        return self.index.tree.candidates.embeddings

    def fill(self, embeddings):
        self.index.index(embeddings, verbose=0)

    def draw(self, queries, **options):
        return self.index.sample_with_gradient(queries, **options)

    def write(self, rows, embeddings):
        self.index.update(rows, embeddings)


class Training:
    """Two towers and the step that trains them with one of the settings."""

    def __init__(self, problem: Problem, name: str, options, seed: int):
        keras.utils.set_random_seed(seed)
        self.problem, self.name, self.setting = problem, name, SETTINGS[name]
        self.num_draws, self.temperature = options.draws, options.temperature
        words = keras.layers.Embedding(problem.vocabulary_size, options.dim, mask_zero=True)
        words.build([None, None])
        self.query_tower, self.candidate_tower = demo.TextTower(words), demo.TextTower(words)
        self.variables = words.trainable_variables
        self.optimizer = keras.optimizers.Adam(options.learning_rate)
        self.optimizer.build(self.variables)
        self.encode_all = tf.function(lambda: problem.encode_all(self.candidate_tower))
        self.store = None
        if self.setting.store is not None:
            store = {"matrix": Matrix, "tree": Tree}[self.setting.store]
            self.store = store(problem.num_candidates, options.dim)
            self.store.fill(self.encode_all())

    @tf.function(autograph=False)
    def step(self, rows):
        """One step on the pairs `rows` [B]; returns the loss."""
        if self.setting.refreshes is None:
            self.store.fill(self.encode_all())
        with tf.GradientTape() as tape:
            queries = self.query_tower(tf.gather(self.problem.query_ids, rows)) / self.temperature
            positives = self._encode(rows)
            positive_scores = tf.reduce_sum(queries * positives, axis=1)
            if self.store is not None:
                log_partition, drawn, fresh = self._log_partition_of_store(queries, rows)
                negative_scores = log_partition[:, tf.newaxis]
            elif self.name == UNIFORM:
                negative_scores = self._uniform_scores(queries, rows)
            else:
                scores = tf.matmul(queries, positives, transpose_b=True)
                is_positive = tf.eye(rows.shape[0], dtype=tf.bool)
                negative_scores = contrastive.leave_out(scores, is_positive)
            loss = tf.reduce_mean(contrastive.softmax_loss(positive_scores, negative_scores))
        gradients = tape.gradient(loss, self.variables)
        self.optimizer.apply_gradients(zip(gradients, self.variables))
        if self.setting.write_back:
            self._write(tf.concat([rows, drawn], axis=0), tf.concat([positives, fresh], axis=0))
        return loss

    def _log_partition_of_store(self, queries, rows):
        """[B] log Z with the gradient of draws, the draws [B * S] and their embeddings."""
        sample, query_gradient = self.store.draw(
            queries,
            num_samples=self.num_draws,
            compute_gradient=self.setting.control_variate,
            candidate_ids=tf.range(self.problem.num_candidates, dtype=rows.dtype),
            positive_ids=rows,
        )
        drawn = tf.reshape(sample.indices, [-1])
        fresh = self._encode(drawn)
        surrogate = tf.reduce_mean(self._scores(queries, fresh), axis=1)
        if self.setting.control_variate:
            # ⟨x, ∇_x log Z⟩ has the gradient by the queries, which draws only correct for what is
            # stale. That by the candidates is of draws alone.
            stale = tf.stop_gradient(tf.gather(self.store.embeddings, drawn))
            surrogate += tf.reduce_sum(queries * query_gradient, axis=1)
            surrogate -= tf.reduce_mean(self._scores(queries, stale), axis=1)
        return contrastive.value_with_gradient(sample.log_partition, surrogate), drawn, fresh

    def _uniform_scores(self, queries, rows):
        """[B, S] scores of S uniform draws out of the other N - 1, each for (N - 1) / S of them."""
        others = self.problem.num_candidates - 1
        drawn = tf.random.uniform([rows.shape[0], self.num_draws], maxval=others, dtype=rows.dtype)
        drawn += tf.cast(drawn >= rows[:, tf.newaxis], rows.dtype)
        scores = self._scores(queries, self._encode(tf.reshape(drawn, [-1])))
        return scores + math.log(others / self.num_draws)

    def _scores(self, queries, embeddings):
        """[B, S] scores of queries with S candidates each, [B * S, d]."""
        embeddings = tf.reshape(embeddings, [queries.shape[0], -1, embeddings.shape[1]])
        return tf.einsum("bd,bsd->bs", queries, embeddings)

    def _encode(self, rows):
        return self.candidate_tower(tf.gather(self.problem.code_ids, rows))

    def _write(self, rows, embeddings):
        """Writes embeddings [n, d] of rows [n], those that come several times once."""
        unique, entry = tf.unique(rows)
        first = tf.math.unsorted_segment_min(tf.range(rows.shape[0]), entry, tf.size(unique))
        self.store.write(unique, tf.gather(embeddings, first))


def train(problem: Problem, name: str, options, seed: int) -> dict:
    """Trains with one setting; `history` is what the evaluations show."""
    training = Training(problem, name, options, seed)
    setting, batches = training.setting, problem.batches(options.batch_size, seed)
    history = {metric: [] for metric in ("step", *METRICS, "loss", "staleness")}
    seconds = []
    for _ in range(options.epochs):
        epoch = next(batches)
        marks = np.arange(1, options.evaluations + 1) * len(epoch) // options.evaluations
        refreshes = setting.refreshes or 0
        due = {len(epoch) * refresh // refreshes for refresh in range(refreshes)}
        for step, rows in enumerate(epoch):
            if step in due:
                training.store.fill(training.encode_all())
            start = time.perf_counter()
            training.step(tf.constant(rows)).numpy()
            seconds.append(time.perf_counter() - start)
            if step + 1 in marks:
                for key, value in {"step": len(seconds), **evaluate(training)}.items():
                    history[key].append(value)
    if name == TREE and training.store.index.num_skipped.numpy():
        print(f"the tree skipped {training.store.index.num_skipped.numpy()} rows")
    print(f"seed {seed}, {name}: MRR", *(f"{mrr:.4f}" for mrr in history["mrr"]), flush=True)
    return {
        "setting": name,
        "seed": seed,
        "ms/step": 1000 * float(np.median(seconds)),
        "candidates encoded": candidates_encoded(setting, name, len(seconds), problem, options),
        "history": history,
    }


def evaluate(training: Training) -> dict:
    """What there is to know of the two towers and the store as they are now.

    Returns:
      The metrics of the validation queries among all candidates; `loss`, exactly, of as many
      training pairs; and the mean of ‖ĝ - g‖² / ‖g‖² over the store.
    """
    problem, rows = training.problem, training.problem.validation
    candidates = training.encode_all()
    queries = training.query_tower(tf.gather(problem.query_ids, rows))
    ranks = nc.evaluation.positive_ranks(
        queries, tf.gather(candidates, rows), candidates, positive_rows=rows
    )
    staleness = 0.0
    if training.store is not None and training.setting.refreshes is not None:
        staleness = contrastive.relative_staleness(training.store.embeddings, candidates)
        staleness = float(tf.reduce_mean(staleness))
    rows = problem.train[:: max(len(problem.train) // len(rows), 1)]
    queries = training.query_tower(tf.gather(problem.query_ids, rows)) / training.temperature
    sample, _ = sample_softmax_with_gradient(queries, candidates, compute_gradient=False)
    positive_scores = tf.reduce_sum(queries * tf.gather(candidates, rows), axis=1)
    loss = float(tf.reduce_mean(sample.log_partition - positive_scores))
    return {**nc.evaluation.retrieval_metrics(ranks), "loss": loss, "staleness": staleness}


def candidates_encoded(setting: Setting, name: str, steps: int, problem: Problem, options) -> int:
    """How many embeddings of candidates the training has needed."""
    if setting.refreshes is None:
        return steps * problem.num_candidates
    fills = 0 if setting.store is None else max(setting.refreshes * options.epochs, 1)
    per_step = options.batch_size * (1 if name == IN_BATCH else 1 + options.draws)
    return fills * problem.num_candidates + steps * per_step


def of_runs(runs: list[dict], name: str, metric: str) -> np.ndarray:
    """[seeds, evaluations] of a metric of one setting."""
    return np.array([run["history"][metric] for run in runs if run["setting"] == name])


def summary(runs: list[dict], epochs: int) -> list[dict]:
    """A row of the table for each setting: means over the seeds, at the end if nothing else."""
    rows = []
    for name in SETTINGS:
        own = [run for run in runs if run["setting"] == name]
        final = {metric: of_runs(runs, name, metric)[:, -1] for metric in (*METRICS, "loss")}
        staleness = of_runs(runs, name, "staleness")
        per_epoch = staleness.shape[1] // epochs
        rows.append(
            {
                "setting": name,
                "mrr": float(final["mrr"].mean()),
                "of seeds": " ".join(f"{mrr:.3f}" for mrr in final["mrr"]),
                **{metric: float(final[metric].mean()) for metric in METRICS[1:]},
                "training loss": float(final["loss"].mean()),
                "staleness": float(staleness.mean()),
                "at epochs' ends": float(staleness[:, per_epoch - 1 :: per_epoch].mean()),
                "candidates encoded": own[0]["candidates encoded"],
                "ms/step": float(np.median([run["ms/step"] for run in own])),
            }
        )
    return rows


def gaps(runs: list[dict]) -> list[dict]:
    """What each setting misses of the oracle's MRR, seed by seed, and relative to the stale one."""
    rows = []
    for readout, reduce in READOUTS.items():
        mrr = {name: reduce(of_runs(runs, name, "mrr")) for name in SETTINGS}
        for name in (name for name in SETTINGS if name != ORACLE):
            gap, stale_gap = mrr[ORACLE] - mrr[name], mrr[ORACLE] - mrr[STALE]
            rows.append(
                {
                    "MRR": readout,
                    "setting": name,
                    "gap": f"{gap.mean():.4f}",
                    "of seeds": " ".join(f"{value:.4f}" for value in gap),
                    "to the stale gap": f"{gap.mean() / stale_gap.mean():.2f}",
                    "ratios of seeds": " ".join(f"{value:.2f}" for value in gap / stale_gap),
                }
            )
    return rows


def plot(runs: list[dict], path: pathlib.Path) -> None:
    """MRR against steps: the mean of the seeds, and the range of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 4.5), layout="constrained")
    for name in SETTINGS:
        steps, mrr = of_runs(runs, name, "step")[0], of_runs(runs, name, "mrr")
        (line,) = axes.plot(steps, mrr.mean(axis=0), marker=".", label=name)
        axes.fill_between(
            steps, mrr.min(axis=0), mrr.max(axis=0), color=line.get_color(), alpha=0.2
        )
    axes.set(xlabel="training steps", ylabel="MRR over all candidates")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, help="all, if not given")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=4, help="in an epoch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=1, help="negatives drawn for a query")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results/tree_training.json")
    )
    options = parser.parse_args()
    problem = Problem(options.candidates)
    print(
        f"{problem.num_candidates:,} candidates, {len(problem.train):,} training pairs,"
        f" {len(problem.validation):,} validation queries"
    )
    runs = [
        train(problem, name, options, seed) for seed in range(options.seeds) for name in SETTINGS
    ]
    rows, gap_rows = summary(runs, options.epochs), gaps(runs)
    print("\n" + _measure.table(rows))
    print("\nGaps to the oracle\n\n" + _measure.table(gap_rows))
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    record = {"options": settings, "rows": rows, "gaps": gap_rows, "runs": runs}
    _measure.save(options.output, record)
    plot(runs, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
