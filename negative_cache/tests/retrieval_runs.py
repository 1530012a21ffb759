"""Short trainings that between them use every option of `CachedRetrieval`, and what they compute.

A `Run` is one configuration: `record()` trains it for a few steps and returns losses, gradients and
states as arrays. Two parts of the repository use the same runs. `benchmarks/same_numbers.py`
compares two commits bit by bit, and `layers/test_recorded_values.py` compares with committed
values. Only public names are used here, so that the module runs as it is before and after a change
of the code behind them.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf

import negative_cache as nc
from negative_cache._compat import keras
from negative_cache.tests.replicas import two_replicas

NUM_QUERIES, NUM_STEPS, DIM, NUM_CANDIDATES, CACHE_SIZE = 4, 8, 4, 24, 10
# Of the tower, and of what is learned besides: a corrector diverges at the tower's.
TOWER_RATE, LEARNED_RATE = 0.3, 0.05
CONTENT_SIZE = 3


@keras.utils.register_keras_serializable("negative_cache.tests")
class Table(keras.layers.Layer):
    """A tower that looks embeddings up by the id of a candidate.

    In training it returns other embeddings than in inference, as dropout would, but not at random:
    who mixes up the two modes gets other numbers.

    Args:
      seed: of the table [NUM_CANDIDATES, DIM].
      unit: whether embeddings have unit length, then in both modes.
      output_dtype: of the embeddings.
      penalty: factor of a loss of the tower's own, Σ ‖embedding‖².
      broken: a candidate whose embedding is not finite; it is never in a batch.
    """

    def __init__(
        self, seed=0, unit=False, output_dtype="float32", penalty=0.0, broken=None, **kwargs
    ):
        super().__init__(**kwargs)
        self.options = {
            "seed": seed,
            "unit": unit,
            "output_dtype": output_dtype,
            "penalty": penalty,
            "broken": broken,
        }
        values = np.random.default_rng(seed).normal(size=[NUM_CANDIDATES, DIM])
        if broken is not None:
            values[broken] = np.nan
        self.table = self.add_weight(
            shape=values.shape, initializer=keras.initializers.Constant(values), name="table"
        )

    def call(self, features, training=None):
        ids = features
        if isinstance(features, Mapping):
            ids = features["title"] if "title" in features else features["id"]
        if ids.dtype == tf.string:
            # An unfilled row of a cache has no title.
            ids = tf.strings.to_number(tf.where(tf.equal(ids, ""), "0", ids), tf.int64)
        embeddings = tf.gather(tf.convert_to_tensor(self.table), ids)
        if self.options["penalty"]:
            self.add_loss(self.options["penalty"] * tf.reduce_sum(embeddings**2))
        embeddings *= 1.1 if training else 1.0
        if self.options["unit"]:
            embeddings = tf.math.l2_normalize(embeddings, axis=1)
        return tf.cast(embeddings, self.options["output_dtype"])

    def get_config(self):
        return {**super().get_config(), **self.options}


@keras.utils.register_keras_serializable("negative_cache.tests")
def squashed(scores):
    """A score transform that is increasing and not linear."""
    return 3.0 * tf.tanh(scores / 3.0)


# How candidates are described: what a tower takes, and the specs of that.
SPECS = {
    "id": {"id": tf.io.FixedLenFeature([], tf.int64)},
    "title": {"title": tf.io.FixedLenFeature([], tf.string)},
    "tensor": tf.io.FixedLenFeature([], tf.int64),
    "content": {
        "id": tf.io.FixedLenFeature([], tf.int64),
        "content": tf.io.FixedLenFeature([CONTENT_SIZE], tf.float32),
    },
}
ID_KEYS = {"id": "id", "title": "title", "tensor": "candidate", "content": "id"}
_CONTENT = np.random.default_rng(5).normal(size=[NUM_CANDIDATES, CONTENT_SIZE])


def as_ids(kind: str, ids):
    """`ids`, integers of any shape, in the form that the feature has; -1 is padding."""
    ids = tf.constant(ids, tf.int64)
    if kind != "title":
        return ids
    return tf.where(ids < 0, "", tf.strings.as_string(ids))


def as_features(kind: str, ids):
    """The features [n, ...] of candidates [n], as `SPECS[kind]` describes them."""
    if kind == "tensor":
        return as_ids(kind, ids)
    features = {ID_KEYS[kind]: as_ids(kind, ids)}
    if kind == "content":
        features["content"] = tf.constant(_CONTENT[np.asarray(ids)], tf.float32)
    return features


# Arguments of a call: functions of a random generator, the batch's ids and the kind of features.


def sample_weight(rng, ids, kind):
    return {"sample_weight": tf.constant(rng.uniform(0.5, 1.5, NUM_QUERIES), tf.float32)}


def probabilities(rng, ids, kind):
    values = tf.constant(rng.uniform(0.01, 0.2, len(ids)), tf.float32)
    return {"candidate_sampling_probability": values}


def score_mask(rng, ids, kind):
    return {"score_mask": tf.constant(rng.random([NUM_QUERIES, len(ids)]) < 0.7)}


def explicit(rng, ids, kind):
    values = tf.constant(rng.normal(size=[NUM_QUERIES, 3, DIM]), tf.float32)
    return {"negative_embeddings": values}


def explicit_with_mask(rng, ids, kind):
    """Short ones, in half precision."""
    values = tf.constant(rng.normal(size=[NUM_QUERIES, 2, DIM]), tf.float16)
    mask = tf.constant(rng.random([NUM_QUERIES, 2]) < 0.7)
    return {"negative_embeddings": values, "negative_mask": mask}


def explicit_with_ids(rng, ids, kind):
    negative_ids = rng.integers(0, NUM_CANDIDATES, [NUM_QUERIES, 3])
    negative_ids[0, 0] = ids[0]
    mask = rng.random([NUM_QUERIES, 3]) < 0.7
    return {
        **explicit(rng, ids, kind),
        "negative_ids": as_ids(kind, negative_ids),
        "negative_mask": tf.constant(mask),
    }


def known_padded(rng, ids, kind):
    known = rng.integers(-2, NUM_CANDIDATES, [NUM_QUERIES, 5])
    known[1, 0] = ids[2]
    return {"known_positive_ids": as_ids(kind, np.maximum(known, -1))}


def known_ragged(rng, ids, kind):
    lengths = rng.integers(0, 5, NUM_QUERIES)
    known = as_ids(kind, rng.integers(0, NUM_CANDIDATES, lengths.sum()))
    return {"known_positive_ids": tf.RaggedTensor.from_row_lengths(known, lengths)}


def default_training(rng, ids, kind):
    return {"training": None}


def no_metrics(rng, ids, kind):
    return {"compute_metrics": False}


def no_batch_metrics(rng, ids, kind):
    return {"compute_batch_metrics": False}


# What is done with a task before each of its steps.


def warm_start(training, step):
    if step == 0 and training.run.corpus is None:
        training.task.add_to_cache(training.features([3, 5, 7, 9, 11]))


def drift(training, step):
    """Moves all embeddings alike, which is what a corrector can learn."""
    warm_start(training, step)
    turn = np.random.default_rng(6).normal(size=[DIM, DIM])
    table = tf.convert_to_tensor(training.current_tower.table)
    training.current_tower.table.assign(
        table + 0.1 * table @ tf.constant(turn - turn.T, tf.float32) + 0.05
    )


def warm_start_with_probabilities(training, step):
    if step == 0:
        probability = tf.constant([0.1, 0.05, 0.2, 0.3], tf.float32)
        training.task.add_to_cache(training.features([3, 5, 7, 9]), probability)


def add_a_broken_one(training, step):
    if step in (1, 3):
        training.task.add_to_cache(training.features([2, NUM_CANDIDATES - 1, 6]))


def refresh(training, step):
    if step in (2, 4):
        training.task.refresh_cache(batch_size=4, verbose=0)


def fill_again(training, step):
    if step == 3:
        ids = np.arange(NUM_CANDIDATES)
        batches = [training.features(ids[start : start + 7]) for start in range(0, len(ids), 7)]
        training.task.fill_cache(batches, verbose=0)


def restore(training, step):
    """Goes on with a new task that a checkpoint is read into."""
    if step != 3:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = tf.train.Checkpoint(task=training.task).write(f"{folder}/checkpoint")
        training.make_task()
        tf.train.Checkpoint(task=training.task).read(path).expect_partial()


def from_own_configuration(training, step):
    if step == 0:
        training.task = nc.CachedRetrieval.from_config(training.task.get_config())


@dataclasses.dataclass(frozen=True)
class Run:
    """A configuration of `CachedRetrieval`, and how it is trained.

    Attributes:
      name: of the run.
      options: makes the arguments of the constructor.
      kind: of the features, a key of `SPECS`.
      corpus: arguments of `Cache.from_dataset`; None for a cache that streams.
      arguments: what a call is given besides the batch.
      before_step: what is done before each step.
      tower: arguments of `Table`.
      network: what the task gets for the tower.
      num_further: candidates of a batch beyond the positives.
      query_dtype: of the query embeddings.
      in_graph: whether steps run in a `tf.function`.
      in_tests: whether the tests compare with recorded values. Not where rounding, which another
        processor does otherwise, might change a decision: in half precision, and in a tree whose
        farthest candidate, which is at its leaf's border, is written again as it was.
    """

    name: str
    options: Callable[[], dict]
    kind: str = "id"
    corpus: Callable[[], dict] | None = None
    arguments: tuple[Callable, ...] = ()
    before_step: Callable = lambda training, step: None
    tower: Mapping = dataclasses.field(default_factory=dict)
    network: Callable = lambda tower: tower
    num_further: int = 0
    query_dtype: str = "float32"
    in_graph: bool = False
    in_tests: bool = False

    def record(self) -> dict[str, np.ndarray]:
        """Trains, and returns everything that was computed: "step 0/loss" and so on."""
        keras.utils.set_random_seed(11)
        training = Training(self)
        arrays = {}
        for step in range(NUM_STEPS):
            self.before_step(training, step)
            for name, value in {**training.step(step), **training.metrics()}.items():
                arrays[f"step {step}/{name}"] = value
            if step in (2, NUM_STEPS - 1):
                for name, value in training.evaluate(step).items():
                    arrays[f"step {step}/evaluation/{name}"] = value
        arrays.update({f"end/{name}": value for name, value in training.state().items()})
        return {name: as_array(value) for name, value in arrays.items()}


class Training:
    """A task of a `Run`, and its tower."""

    def __init__(self, run: Run):
        self.run = run
        self.make_task()

    def make_task(self) -> None:
        run = self.run
        self.tower = Table(**run.tower)
        options = {"temperature": 0.8, "seed": 1, **run.options()}
        # Says that it is left out.
        options = {name: value for name, value in options.items() if value is not Ellipsis}
        if run.corpus is not None:
            ids = np.arange(NUM_CANDIDATES)
            dataset = tf.data.Dataset.from_tensor_slices(self.features(ids)).batch(5)
            cache = {"candidate_id_key": ID_KEYS[run.kind], "verbose": 0, **run.corpus()}
            options["cache"] = nc.Cache.from_dataset(dataset, self.tower, **cache)
        else:
            options = {"feature_specs": SPECS[run.kind], "cache_size": CACHE_SIZE, **options}
        self.task = nc.CachedRetrieval(run.network(self.tower), **options)
        self._function = tf.function(self.gradients) if run.in_graph else self.gradients

    def features(self, ids):
        return as_features(self.run.kind, ids)

    def batch(self, step: int):
        """Query embeddings, candidate features and further arguments of a call."""
        rng = np.random.default_rng(100 + step)
        queries = tf.constant(rng.normal(size=[NUM_QUERIES, DIM]), self.run.query_dtype)
        # Some come often. The last candidate never does.
        size = NUM_QUERIES + self.run.num_further
        ids = np.minimum(rng.geometric(0.1, size) - 1, NUM_CANDIDATES - 2)
        arguments = {}
        for make in self.run.arguments:
            arguments.update(make(rng, ids, self.run.kind))
        return queries, self.features(ids), arguments

    def step(self, step: int) -> dict:
        """One step of SGD; its loss and gradients, and the weights after it."""
        loss, penalty, gradients = self._function(*self.batch(step))
        self.descend(gradients[1:])
        return {
            "loss": loss,
            "penalty": penalty,
            "query gradient": gradients[0],
            "tower gradient": gradients[1],
            **{f"gradient of learned {i}": g for i, g in enumerate(gradients[2:])},
            "weights": self.current_tower.table,
        }

    def descend(self, gradients) -> None:
        """Changes the weights by the gradients of the tower and of what else is learned."""
        self.current_tower.table.assign_sub(TOWER_RATE * gradients[0])
        for variable, gradient in zip(self._learned(), gradients[1:]):
            if gradient is not None:
                variable.assign_sub(LEARNED_RATE * gradient)

    def evaluate(self, step: int) -> dict:
        """Loss and gradients in inference mode, of other pairs."""
        queries, features, arguments = self.batch(1000 + step)
        for name in ("compute_metrics", "compute_batch_metrics", "training"):
            arguments.pop(name, None)
        variables = [self.current_tower.table]
        with tf.GradientTape() as tape:
            tape.watch(queries)
            candidates = self.current_tower(features, training=False)
            loss = self.task(queries, candidates, features, training=False, **arguments)
        gradients = tape.gradient(loss, [queries, *variables])
        return {"loss": loss, "query gradient": gradients[0], "tower gradient": gradients[1]}

    def metrics(self) -> dict:
        metrics = sorted(self.task.metrics, key=lambda metric: metric.name)
        return {f"metrics/{metric.name}": metric.result() for metric in metrics}

    def state(self) -> dict:
        """What the task and its parts have kept."""
        task, cache, ids = self.task, self.task.cache, np.arange(NUM_CANDIDATES)
        sizes = [int(np.prod(variable.shape)) for variable in task.trainable_variables]
        state = {"sizes of trained variables": np.sort(np.array(sizes))}
        queries = tf.constant(np.random.default_rng(8).normal(size=[3, DIM]), tf.float32)
        if cache is not None:
            state.update({f"cache/{name}": cache.data[name] for name in sorted(cache.data)})
            names = ("age", "filled", "num_filled", "num_skipped", "step")
            state.update({f"cache/{name}": getattr(cache, name) for name in names})
            if cache.row_key is not None:
                state["cache/rows of ids"] = cache.rows_of(as_ids(self.run.kind, [*ids, 99]))
        if task.index is not None:
            bounds = task.index.log_partition_bounds(queries, temperature=0.8)
            found = task.index.top_k(queries, 5)
            state.update(zip(("index/lower", "index/upper"), bounds))
            state.update(zip(("index/top scores", "index/top rows"), found))
        if task.corrector is not None:
            key = task.corrector.content_key
            content = None if key is None else tf.convert_to_tensor(cache.data[key])
            state["corrected"] = task.corrector(cache.embeddings, cache.age, content)
            for i, variable in enumerate(task.corrector.trainable_variables):
                state[f"corrector/weight {i}"] = variable
        if task.frequency is not None:
            state["frequency/probability"] = task.frequency.probability(ids)
            state["frequency/occupancy"] = task.frequency.occupancy
        return state

    @property
    def current_tower(self):
        """The tower of now: a task made from its configuration has its own."""
        network = self.task.candidate_network
        return network if isinstance(network, Table) else self.tower

    def _learned(self):
        """What is trained besides the tower."""
        parts = (self.task.corrector, self.task.score_transform)
        layers = [part for part in parts if isinstance(part, keras.layers.Layer)]
        return [variable for layer in layers for variable in layer.trainable_variables]

    def gradients(self, queries, features, arguments):
        """Loss and gradients of a training step, and the tower's own loss."""
        with tf.GradientTape() as tape:
            tape.watch(queries)
            candidates = self.current_tower(features, training=True)
            loss = self.task(queries, candidates, features, **{"training": True, **arguments})
            penalty = tf.add_n([tf.zeros([]), *self.current_tower.losses])
            objective = tf.reduce_sum(loss) + penalty
        gradients = tape.gradient(objective, [queries, self.current_tower.table, *self._learned()])
        gradients = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
        return loss, penalty, gradients


def as_array(value) -> np.ndarray:
    """A tensor as an array that .npz files can hold; None is an empty one."""
    if value is None:
        return np.zeros([0])
    array = value if isinstance(value, np.ndarray) else tf.convert_to_tensor(value).numpy()
    if np.asarray(array).dtype == object:
        return np.asarray(array).astype(np.bytes_)
    if tf.as_dtype(np.asarray(array).dtype).is_floating:
        # Exact for what is shorter, such as bfloat16, which NumPy does not know.
        return np.asarray(array, np.float64 if array.dtype == np.float64 else np.float32)
    return np.asarray(array)


@dataclasses.dataclass(frozen=True)
class FittedRun(Run):
    """A run of `DualEncoder.fit`, whose model has the task as a part.

    Attributes:
      callbacks: makes those of `fit`.
    """

    callbacks: Callable[[], list] = list

    def record(self):
        keras.utils.set_random_seed(11)
        training = Training(self)
        query_network = Table(seed=3)
        model = nc.DualEncoder(query_network, training.tower, training.task)
        model.compile(optimizer=keras.optimizers.SGD(0.1))
        rng = np.random.default_rng(4)
        ids = rng.integers(0, NUM_CANDIDATES, [2, NUM_STEPS * NUM_QUERIES])
        pairs = {"query": training.features(ids[0]), "candidate": training.features(ids[1])}
        dataset = tf.data.Dataset.from_tensor_slices(pairs).batch(NUM_QUERIES)
        fitting = {"validation_data": dataset.take(2), "shuffle": False, "verbose": 0}
        history = model.fit(dataset, epochs=2, callbacks=self.callbacks(), **fitting).history
        arrays = {f"history/{name}": np.array(history[name]) for name in sorted(history)}
        arrays["query weights"], arrays["weights"] = query_network.table, training.tower.table
        arrays.update({f"end/{name}": value for name, value in training.state().items()})
        return {name: as_array(value) for name, value in arrays.items()}


class ReplicatedRun(Run):
    """A run on two replicas, each with batches and a cache of its own.

    Needs two logical CPU devices. Of the state, only the caches are recorded.
    """

    def record(self):
        keras.utils.set_random_seed(11)
        strategy = two_replicas()
        with strategy.scope():
            training = Training(self)
        step_fn = tf.function(lambda *batch: strategy.run(training.gradients, batch))

        def rows():
            cache = training.task.cache
            return {**{key: tf.identity(cache.data[key]) for key in cache.data}, "age": cache.age}

        read_fn = tf.function(lambda: strategy.run(rows))
        arrays = {}
        for step in range(NUM_STEPS):
            batches = [training.batch(step), training.batch(500 + step)]
            batch = tf.nest.map_structure(
                lambda *parts: strategy.experimental_distribute_values_from_function(
                    lambda context: parts[context.replica_id_in_sync_group]  # noqa: B023
                ),
                *batches,
            )
            loss, _, gradients = tf.nest.map_structure(
                strategy.experimental_local_results, step_fn(*batch)
            )
            training.descend([tf.add_n(parts) for parts in gradients[1:]])
            for replica in range(2):
                arrays[f"step {step}/replica {replica}/loss"] = loss[replica]
                arrays[f"step {step}/replica {replica}/query gradient"] = gradients[0][replica]
            arrays[f"step {step}/weights"] = training.tower.table
            for name, value in training.metrics().items():
                arrays[f"step {step}/{name}"] = value
        for key, parts in read_fn().items():
            for replica, value in enumerate(strategy.experimental_local_results(parts)):
                arrays[f"end/replica {replica}/cache/{key}"] = value
        return {name: as_array(value) for name, value in arrays.items()}


def _index(**options):
    """A tree of several levels, small as it is."""
    options = {"leaf_size": 4, "branching": 4, "beam": 2, **options}
    return nc.TreeIndex(options.pop("capacity", NUM_CANDIDATES), DIM, **options)


def _metrics():
    return {
        "metrics": [
            keras.metrics.MeanSquaredError(name="squared"),
            keras.metrics.CosineSimilarity(),
        ],
        "batch_metrics": [keras.metrics.TopKCategoricalAccuracy(k=2, name="top_2")],
        "loss_metrics": [keras.metrics.Mean(name="mean_loss")],
    }


_IN_BATCH = {"in_batch_negatives": True}
_BY_ID = {"candidate_id_key": "id", "remove_accidental_hits": True}
RUNS = (
    # A cache that streams.
    Run("streaming", dict, in_tests=True),
    Run("streaming, in graph", dict, in_graph=True),
    Run("streaming, not LRU", lambda: {"use_lru": False}, before_step=warm_start, in_tests=True),
    Run(
        "streaming, three draws and the batch",
        lambda: {"num_negatives": 3, **_IN_BATCH, "embedding_dim": DIM},
        in_tests=True,
    ),
    Run(
        "sampled query gradient",
        lambda: {"exact_query_gradient": False, "num_negatives": 2},
        before_step=warm_start,
        in_tests=True,
    ),
    Run(
        "sampled query gradient, in graph, with the batch",
        lambda: {"exact_query_gradient": False, **_IN_BATCH},
        in_graph=True,
    ),
    Run(
        "hard negatives, margin, accidental hits, more candidates",
        lambda: {
            **_IN_BATCH,
            **_BY_ID,
            "num_hard_negatives": 2,
            "false_negative_margin": 0.1,
            "num_negatives": 2,
        },
        num_further=3,
        in_tests=True,
    ),
    Run(
        "negative margin, transform",
        lambda: {"false_negative_margin": -0.5, "score_transform": squashed, **_IN_BATCH},
        before_step=warm_start,
    ),
    Run(
        "no temperature, transform, sampled query gradient",
        lambda: {
            "temperature": None,
            "score_transform": squashed,
            "exact_query_gradient": False,
        },
    ),
    Run(
        "learned temperature",
        lambda: {
            "temperature": None,
            "score_transform": nc.LearnedTemperature(0.7, largest=2.0),
            **_IN_BATCH,
        },
        before_step=warm_start,
        in_tests=True,
    ),
    Run(
        "learned temperature, sampled query gradient, in graph",
        lambda: {
            "temperature": None,
            "score_transform": nc.LearnedTemperature(0.7, largest=2.0),
            "exact_query_gradient": False,
        },
        in_graph=True,
    ),
    # What a call is given.
    Run(
        "weights, sum, metrics",
        lambda: {**_IN_BATCH, "reduction": "sum", **_metrics()},
        arguments=(sample_weight, score_mask),
        in_tests=True,
    ),
    Run(
        "weights, none",
        lambda: {"reduction": "none", **_metrics(), "name": "second"},
        arguments=(sample_weight, default_training),
        num_further=2,
    ),
    Run("no reduction", lambda: {"reduction": None, **_IN_BATCH}, arguments=(score_mask,)),
    Run(
        "metrics without the task's",
        lambda: {**_metrics(), **_IN_BATCH, **_BY_ID},
        arguments=(no_metrics, score_mask),
    ),
    Run(
        "metrics without the batch's",
        lambda: {**_metrics(), "metrics": keras.metrics.CosineSimilarity()},
        arguments=(no_batch_metrics,),
        in_graph=True,
    ),
    Run("explicit negatives", lambda: _IN_BATCH, arguments=(explicit,)),
    Run(
        "explicit negatives with ids and mask",
        lambda: {**_IN_BATCH, **_BY_ID},
        arguments=(explicit_with_ids, score_mask),
        num_further=2,
        in_tests=True,
    ),
    Run(
        "explicit negatives, known positives, strings",
        lambda: {"candidate_id_key": "title", **_IN_BATCH},
        kind="title",
        arguments=(explicit_with_ids, known_padded),
        before_step=warm_start,
        in_tests=True,
    ),
    Run(
        "known positives, ragged, in graph",
        lambda: {**_IN_BATCH, **_BY_ID, "num_hard_negatives": 3},
        arguments=(known_ragged, explicit_with_ids),
        in_graph=True,
    ),
    Run(
        "known positives, ragged, strings, margin",
        lambda: {"candidate_id_key": "title", "false_negative_margin": 0.0, **_IN_BATCH},
        kind="title",
        arguments=(known_ragged,),
        num_further=2,
    ),
    Run(
        "a single tensor",
        lambda: {**_IN_BATCH, **_BY_ID, "candidate_id_key": "candidate"},
        kind="tensor",
        before_step=warm_start,
        in_tests=True,
    ),
    Run(
        "the tower is a function",
        dict,
        network=lambda tower: lambda features, training: tower(features, training=training),
    ),
    Run("a tower with a loss of its own", lambda: _IN_BATCH, tower={"penalty": 0.01}),
    Run("seed left out", lambda: {"seed": ...}),
    # Dtypes.
    Run("bfloat16 cache", lambda: {"embedding_dtype": "bfloat16", **_IN_BATCH}),
    Run(
        "float16 cache, index",
        lambda: {
            "embedding_dtype": tf.float16,
            "index": _index(capacity=CACHE_SIZE, embedding_dtype="float16"),
        },
    ),
    Run(
        "mixed embeddings",
        lambda: {**_IN_BATCH, **_metrics()},
        tower={"output_dtype": "bfloat16"},
        query_dtype="float16",
        arguments=(explicit_with_mask,),
    ),
    # Corrections for frequency.
    Run(
        "frequency correction",
        lambda: {
            "frequency_correction": nc.FrequencyEstimator(997, learning_rate=0.2),
            "use_lru": False,
            "candidate_id_key": "id",
        },
        before_step=warm_start,
        in_tests=True,
    ),
    Run(
        "frequency correction of the default size, in batch",
        lambda: {
            "frequency_correction": True,
            "use_lru": False,
            **_IN_BATCH,
            **_BY_ID,
            "num_negatives": 2,
        },
        in_graph=True,
    ),
    Run(
        "frequency correction and probabilities",
        lambda: {
            "frequency_correction": nc.FrequencyEstimator(997),
            "use_lru": False,
            "candidate_id_key": "id",
            **_IN_BATCH,
            **_metrics(),
        },
        arguments=(probabilities,),
        before_step=warm_start,
    ),
    Run(
        "frequency correction, no cache",
        lambda: {
            "frequency_correction": nc.FrequencyEstimator(997),
            "cache_size": 0,
            "candidate_id_key": "title",
            **_IN_BATCH,
        },
        kind="title",
    ),
    Run(
        "probabilities",
        lambda: {"use_lru": False},
        arguments=(probabilities,),
        before_step=warm_start_with_probabilities,
        in_tests=True,
    ),
    Run(
        "probabilities, in batch",
        lambda: {"use_lru": False, **_IN_BATCH, **_metrics(), "false_negative_margin": 0.1},
        arguments=(probabilities, sample_weight),
        before_step=warm_start,
        num_further=2,
        in_tests=True,
    ),
    # Without a cache.
    Run(
        "no cache",
        lambda: {"cache_size": 0, **_IN_BATCH, **_BY_ID, **_metrics()},
        arguments=(score_mask, probabilities, known_padded),
        num_further=3,
        in_tests=True,
    ),
    Run("no cache, explicit negatives", lambda: {"cache_size": 0}, arguments=(explicit,)),
    # What else changes the rows.
    Run(
        "refreshes and rows that are refused",
        lambda: {"refresh_fraction": 0.2, **_IN_BATCH, "probe_size": 2, "probe_every": 2},
        before_step=lambda training, step: (
            add_a_broken_one(training, step),
            refresh(training, step),
        ),
        tower={"broken": NUM_CANDIDATES - 1},
    ),
    Run(
        "restored from a checkpoint",
        lambda: {"embedding_dim": DIM, "num_negatives": 2, **_metrics()},
        before_step=restore,
    ),
    Run(
        "restored from a checkpoint without the cache",
        lambda: {"embedding_dim": DIM, "save_cache": False, **_IN_BATCH},
        before_step=restore,
    ),
    Run(
        "from its own configuration",
        lambda: {
            **_metrics(),
            **_IN_BATCH,
            **_BY_ID,
            "embedding_dim": DIM,
            "cache_size": 20,
            "corrector": nc.Corrector(hidden_units=5),
            "score_transform": squashed,
            "false_negative_margin": 0.2,
        },
        before_step=lambda training, step: (
            from_own_configuration(training, step),
            drift(training, step),
        ),
    ),
    Run(
        "index",
        lambda: {"index": _index(capacity=CACHE_SIZE), "num_negatives": 2, **_IN_BATCH, **_BY_ID},
        before_step=warm_start,
        in_tests=True,
    ),
    Run(
        "index, margin, transform, sampled query gradient, in graph",
        lambda: {
            "index": _index(capacity=CACHE_SIZE),
            "false_negative_margin": 0.3,
            "score_transform": squashed,
            "exact_query_gradient": False,
        },
        in_graph=True,
    ),
    # Correctors.
    Run(
        "corrector",
        lambda: {"cache_size": 20, "corrector": nc.Corrector(hidden_units=6), "num_negatives": 2},
        in_tests=True,
        before_step=drift,
    ),
    Run(
        "corrector of unit embeddings, probes, none",
        lambda: {
            "cache_size": 20,
            "corrector": nc.Corrector(hidden_units=6, drift_loss="both", warmup_steps=1),
            "reduction": "none",
            "probe_size": 3,
            "probe_every": 2,
            "temperature": None,
            "score_transform": nc.LearnedTemperature(0.3),
        },
        tower={"unit": True},
        before_step=drift,
    ),
    Run(
        "corrector with content",
        lambda: {
            "cache_size": 20,
            "corrector": nc.Corrector(hidden_units=6, content_key="content"),
            "refresh_fraction": 0.3,
            "embedding_dim": DIM,
            **_IN_BATCH,
        },
        kind="content",
        in_tests=True,
        before_step=drift,
    ),
    Run(
        "corrector and index, in graph",
        lambda: {
            "cache_size": 20,
            "corrector": nc.Corrector(hidden_units=6, learning_rate_multiplier=2.0),
            "index": _index(capacity=20),
            "num_negatives": 2,
        },
        in_graph=True,
        before_step=drift,
    ),
    Run(
        "Nyström, landmarks encoded",
        lambda: {
            "cache_size": 20,
            "corrector": nc.NystromCorrector(5),
            "num_negatives": 2,
            "refresh_fraction": 0.1,
        },
        in_tests=True,
        before_step=drift,
    ),
    Run(
        "Nyström, uniform landmarks, corpus",
        lambda: {"corrector": nc.NystromCorrector(6, landmarks="uniform", num_encoded=2)},
        corpus=dict,
        before_step=drift,
    ),
    Run(
        "Nyström, k-means++, linear kernel, in graph",
        lambda: {
            "corrector": nc.NystromCorrector(4, landmarks="k-means++", kernel="linear"),
            **_IN_BATCH,
        },
        corpus=dict,
        in_graph=True,
        before_step=drift,
    ),
    # A cache that covers a corpus.
    Run("corpus", dict, corpus=dict, in_tests=True),
    Run("corpus in graph", lambda: {**_IN_BATCH, "num_negatives": 2}, corpus=dict, in_graph=True),
    Run(
        "corpus, four rows refreshed a step",
        lambda: {
            "refresh_fraction": 0.17,
            "num_negatives": 2,
            "probe_size": 4,
            "probe_every": 2,
            "exact_query_gradient": False,
        },
        corpus=dict,
        num_further=2,
        in_tests=True,
    ),
    Run(
        "corpus, a row refreshed every third step, no write-back",
        lambda: {"refresh_fraction": 0.015, "write_back": False, **_IN_BATCH},
        corpus=dict,
        in_tests=True,
    ),
    Run(
        "corpus, the same in graph, with a corrector and probes",
        lambda: {
            "refresh_fraction": 0.015,
            "write_back": False,
            "corrector": nc.Corrector(hidden_units=6, drift_loss="cross_entropy"),
            "probe_size": 3,
            "probe_every": 3,
        },
        corpus=dict,
        before_step=drift,
        in_graph=True,
    ),
    Run(
        "corpus of strings, known positives, explicit negatives, margin",
        lambda: {"false_negative_margin": 0.2},
        kind="title",
        corpus=lambda: {"embedding_dtype": "float16"},
        arguments=(known_padded, explicit_with_ids),
    ),
    Run(
        "corpus of single tensors, ids on the host, not saved",
        lambda: {"refresh_fraction": 0.1},
        kind="tensor",
        corpus=lambda: {"on_host": ["candidate"], "saved": False},
        arguments=(sample_weight,),
        in_graph=True,
    ),
    Run(
        "corpus filled again, refreshed, with a row that is refused",
        lambda: {"corrector": nc.Corrector(hidden_units=6)},
        corpus=dict,
        tower={"broken": NUM_CANDIDATES - 1},
        before_step=lambda training, step: (fill_again(training, step), refresh(training, step)),
    ),
    Run(
        "corpus and index",
        lambda: {"num_negatives": 2, "refresh_fraction": 0.1, "false_negative_margin": 0.3},
        corpus=lambda: {"index": _index()},
        arguments=(known_padded,),
    ),
    Run(
        "corpus and index, no write-back, in graph, with a corrector",
        lambda: {"write_back": False, "corrector": nc.Corrector(hidden_units=6), **_IN_BATCH},
        corpus=lambda: {"index": _index()},
        before_step=drift,
        in_graph=True,
        in_tests=True,
    ),
    Run(
        "corpus and coded index",
        lambda: {"num_negatives": 2},
        corpus=lambda: {"index": _index(store_embeddings=False, residual_bytes=2)},
        in_tests=True,
    ),
    Run(
        "corpus and index without residuals, bfloat16, in graph",
        lambda: {"exact_query_gradient": False, **_IN_BATCH},
        corpus=lambda: {
            "index": _index(store_embeddings=False, residual_bytes=0),
            "embedding_dtype": "bfloat16",
        },
        in_graph=True,
    ),
    # What single changes of the code were seen to leave alone above.
    Run(
        "a batch metric that sees every score",
        lambda: {
            **_IN_BATCH,
            **_BY_ID,
            "false_negative_margin": 0.5,
            "batch_metrics": [
                keras.metrics.CategoricalCrossentropy(from_logits=True, name="batch_loss")
            ],
        },
        arguments=(score_mask, sample_weight),
        num_further=2,
    ),
    Run(
        "probes of more rows than are filled at first",
        lambda: {"probe_size": 6, "probe_every": 1, "num_negatives": 2},
    ),
    Run(
        "restored from a checkpoint, frequencies",
        lambda: {
            "frequency_correction": nc.FrequencyEstimator(997),
            "use_lru": False,
            "candidate_id_key": "id",
            "embedding_dim": DIM,
        },
        before_step=restore,
    ),
    Run(
        "restored from a checkpoint, corpus, index, corrector, learned temperature",
        lambda: {
            "corrector": nc.Corrector(hidden_units=6),
            "temperature": None,
            "score_transform": nc.LearnedTemperature(0.7),
            "refresh_fraction": 0.1,
        },
        corpus=lambda: {"index": _index()},
        before_step=lambda training, step: (restore(training, step), drift(training, step)),
    ),
    # Inside of a model, and on two replicas.
    FittedRun(
        "fit, a tower with a loss of its own",
        lambda: {**_IN_BATCH, "num_negatives": 2},
        tower={"penalty": 0.01},
    ),
    FittedRun(
        "fit, streaming, warm start",
        lambda: {**_IN_BATCH, **_BY_ID, **_metrics()},
        callbacks=lambda: [nc.CacheWarmStart([as_features("id", np.arange(7))], verbose=0)],
    ),
    FittedRun(
        "fit, corpus, corrector, refreshes",
        lambda: {"corrector": nc.Corrector(hidden_units=6), "refresh_fraction": 0.1},
        corpus=dict,
        callbacks=lambda: [nc.CacheRefresh(every_steps=3, batch_size=7, verbose=0)],
    ),
    ReplicatedRun("two replicas", lambda: {**_IN_BATCH, **_BY_ID, **_metrics()}),
    ReplicatedRun(
        "two replicas, corpus",
        lambda: {"refresh_fraction": 0.1, "num_negatives": 2, "probe_size": 3, "probe_every": 3},
        corpus=dict,
    ),
)
