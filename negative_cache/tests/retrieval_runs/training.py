"""What a run is, how it is trained, and what of it is recorded."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf

import negative_cache as nc
from negative_cache._compat import keras
from negative_cache.tests.replicas import two_replicas
from negative_cache.tests.retrieval_runs.inputs import (
    CACHE_SIZE,
    DIM,
    ID_KEYS,
    NUM_CANDIDATES,
    NUM_QUERIES,
    NUM_STEPS,
    SPECS,
    Table,
    as_features,
    as_ids,
)

# Of the tower, and of what is learned besides: a corrector diverges at the tower's.
TOWER_RATE, LEARNED_RATE = 0.3, 0.05


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
