"""Tests of a temperature that is learned: its gradient under every option, and its bounds.

With u = x / T, p = ⟨u, y⟩, scores s = f(p) and the law P of the softmax over the positive and all
negatives, ∂p/∂log T = -p, and so the loss L = -s⁺ + log Σ exp(s + log weight) has

  dL / d log T = f'(p⁺) p⁺ - Σ P f'(p) p,

in which, for rows of a cache, P is the law of their cached embeddings, and p of those of now.
"""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

import negative_cache as nc
from negative_cache import Corrector, LearnedTemperature, TreeIndex
from negative_cache._compat import keras
from negative_cache.tests.layers.corpus_cases import drifted, make_corpus_task
from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    Table,
    freeze_cache,
    make_queries,
    make_table,
    make_task,
)
from negative_cache.tests.layers.source_cases import SIZE, Anchors
from negative_cache.tests.statistics import assert_mean_is

IDS, CACHED = [0, 1, 2], [5, 6, 7, 8, 9, 1]
T = 0.7
EXPLICIT = np.random.default_rng(3).normal(size=[len(IDS), 2, DIM]).astype(np.float32)


def squash(scores):
    return 3.0 * tf.tanh(scores / 2.0)


@dataclasses.dataclass
class Group:
    """Negatives [B, n, d] of one source: as it knows them, and as they are now."""

    known: np.ndarray
    now: np.ndarray
    is_left_out: np.ndarray
    log_weights: np.ndarray


def expected_slopes(queries, positives, groups, transform):
    """[B] dL / d log T by the formula above, in float64."""

    def score(p):
        return 3.0 * np.tanh(p / 2.0) if transform else p

    def slope(p):
        return 1.5 / np.cosh(p / 2.0) ** 2 * p if transform else p

    scaled = queries.astype(np.float64) / T
    own = np.sum(scaled * positives, axis=1, keepdims=True)
    logits, slopes = [score(own)], [slope(own)]
    for group in groups:
        known = score(np.einsum("bd,bnd->bn", scaled, group.known)) + group.log_weights
        logits.append(np.where(group.is_left_out, -np.inf, known))
        slopes.append(slope(np.einsum("bd,bnd->bn", scaled, group.now)))
    logits, slopes = np.concatenate(logits, axis=1), np.concatenate(slopes, axis=1)
    law = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    return slopes[:, 0] - np.sum(law * slopes, axis=1)


class Case:
    """A task with a learned temperature, and the derivative by hand.

    Args:
      options: of `CachedRetrieval`, and some of the case's own.
      is_stale: whether the tower moves after the cache was filled.
    """

    def __init__(self, options, is_stale=False):
        self.options = dict(options)
        table = make_table(SIZE)
        kwargs = {name: value() if callable(value) else value for name, value in options.items()}
        self._is_corpus = kwargs.pop("corpus", False)
        self._has_explicit = kwargs.pop("explicit", False)
        if kwargs.pop("transform", False):
            kwargs["score_transform"] = squash
        temperature = LearnedTemperature(T, smallest=0.1)
        kwargs = {"reduction": "sum", "num_negatives": 3, **kwargs, "temperature": temperature}
        if self._is_corpus:
            self._cached = list(range(SIZE))
            self.task = make_corpus_task(table, **kwargs)
        else:
            self._cached = CACHED if kwargs.get("cache_size", True) else []
            self.task = make_task(table, filled_with=self._cached, **kwargs)
        if self._cached:
            # Every draw is from the same law.
            freeze_cache(self.task)
        if "frequency_correction" in options:
            # 2 of 8 draws were candidate 1.
            self.task.frequency.update(tf.constant([5, 6, 7, 8, 9, 1, 1, 0], tf.int64))
            self.task.frequency.update = lambda ids: None
        self.then, self.now = table, drifted(table) if is_stale else table
        self.task.candidate_network.table.assign(self.now)
        self.queries = make_queries(len(IDS))
        self.weight = temperature.log_temperature

    def loss_and_slope(self, **kwargs):
        """The loss of a training step, and its derivative by log T as TensorFlow has it."""
        if self._has_explicit:
            kwargs["negative_embeddings"] = tf.constant(EXPLICIT)
        features = {"id": tf.constant(IDS, tf.int64)}
        with tf.GradientTape() as tape:
            positives = self.task.candidate_network(features)
            loss = self.task(tf.constant(self.queries), positives, features, **kwargs)
        weight = self.weight if isinstance(self.weight, tf.Variable) else self.weight.value
        return loss, tf.convert_to_tensor(tape.gradient(loss, weight))

    def expected(self):
        """[B] dL / d log T of each query."""
        scaled = self.queries.astype(np.float64) / T
        positives = np.sum(scaled * self.now[IDS], axis=1, keepdims=True)
        groups = [self._group(self._cached, self.then)] if self._cached else []
        for group in groups:
            group.is_left_out |= np.equal.outer(IDS, self._cached) & self._leaves_out_ids
        if "in_batch_negatives" in self.options:
            group = self._group(IDS, self.now)
            group.is_left_out |= np.eye(len(IDS), dtype=bool)
            groups.append(group)
        margin = self.options.get("false_negative_margin")
        for group in groups:
            scores = np.einsum("bd,bnd->bn", scaled, group.known)
            if margin is not None:
                group.is_left_out |= scores > positives - margin
            if "frequency_correction" in self.options:
                group.log_weights -= self._log_expected(group)
        if "num_hard_negatives" in self.options:
            group = groups[-1]
            scores = np.einsum("bd,bnd->bn", scaled, group.known)
            scores = np.where(group.is_left_out, -np.inf, scores)
            group.is_left_out |= scores < scores.max(axis=1, keepdims=True)
        if self._has_explicit:
            zeros = np.zeros(EXPLICIT.shape[:2])
            groups.append(Group(EXPLICIT, EXPLICIT, zeros.astype(bool), zeros))
        return expected_slopes(self.queries, self.now[IDS], groups, "transform" in self.options)

    @property
    def _leaves_out_ids(self):
        return self._is_corpus or "remove_accidental_hits" in self.options

    def _group(self, ids, table):
        shape = [len(IDS), len(ids)]
        known, now = (np.broadcast_to(part[ids], [*shape, DIM]) for part in (table, self.now))
        return Group(known, now, np.zeros(shape, bool), np.zeros(shape))

    def _log_expected(self, group):
        """Of n draws, the candidates of the group stand among the negatives so often."""
        ids = CACHED if group.known.shape[1] == len(CACHED) else IDS
        probability = self.task.frequency.probability(tf.constant(ids, tf.int64)).numpy()
        return np.log((len(CACHED) + len(IDS)) * probability)


CASES = {
    "cache": {},
    "in-batch": {"in_batch_negatives": True, "cache_size": 0},
    "hardest of the batch": {
        "in_batch_negatives": True,
        "num_hard_negatives": 1,
        "cache_size": 0,
    },
    "explicit": {"explicit": True, "cache_size": 0},
    "all": {"in_batch_negatives": True, "explicit": True, "remove_accidental_hits": True},
    "margin": {"false_negative_margin": -0.2, "in_batch_negatives": True},
    "frequency": {
        "frequency_correction": True,
        "use_lru": False,
        "in_batch_negatives": True,
    },
    "transform": {"transform": True, "in_batch_negatives": True},
    "corrector": {"corrector": Corrector},
    "index": {"index": lambda: TreeIndex(len(CACHED), DIM)},
    "corpus": {"corpus": True},
    "corpus, transform": {"corpus": True, "transform": True},
}
DRAWN = [name for name, options in CASES.items() if options.get("cache_size", True)]


@pytest.mark.one_keras
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_exact_with_a_fresh_cache(name):
    case = Case(CASES[name])
    _, slope = case.loss_and_slope()
    expected = case.expected()
    assert np.all(np.abs(expected) > 1e-3)
    np.testing.assert_allclose(slope, expected.sum(), rtol=1e-4)


@pytest.mark.one_keras
@pytest.mark.parametrize("is_exact", [True, False], ids=["exact", "sampled"])
@pytest.mark.parametrize("name", DRAWN)
def test_the_gradient_is_so_in_expectation_with_a_stale_cache(name, is_exact):
    case = Case({**CASES[name], "exact_query_gradient": is_exact}, is_stale=True)
    slopes = tf.function(lambda: case.loss_and_slope()[1])
    samples = np.stack([slopes() for _ in range(400)])
    assert samples.std() > 0.0
    assert_mean_is(samples, case.expected().sum())


@pytest.mark.parametrize("reduction", ["none", "sum", "sum_over_batch_size"])
def test_sample_weights_and_reductions_weigh_the_gradients_of_queries(reduction):
    case = Case({"reduction": reduction, "in_batch_negatives": True})
    weight = np.array([0.5, 2.0, 0.0], np.float32)
    _, slope = case.loss_and_slope(sample_weight=tf.constant(weight))
    divisor = len(IDS) if reduction == "sum_over_batch_size" else 1
    np.testing.assert_allclose(slope, np.sum(weight * case.expected()) / divisor, rtol=1e-4)


def test_a_source_of_ones_own_has_its_gradient_too():
    temperature = LearnedTemperature(T)
    table, queries = make_table(SIZE), make_queries(len(IDS))
    task = nc.Retrieval(Table(table), [Anchors(2)], temperature=temperature, reduction="sum")
    weight = task.trainable_variables[[w.shape for w in task.trainable_variables].index(())]
    assert weight is temperature.log_temperature
    with tf.GradientTape() as tape:
        loss = task(tf.constant(queries), tf.constant(table[IDS]), {"id": tf.constant(IDS)})
    slope = tape.gradient(loss, weight if isinstance(weight, tf.Variable) else weight.value)
    # The anchors are ones.
    ones, zeros = np.ones([len(IDS), 2, DIM]), np.zeros([len(IDS), 2])
    groups = [Group(ones, ones, zeros.astype(bool), zeros)]
    expected = expected_slopes(queries, table[IDS], groups, False)
    np.testing.assert_allclose(slope, expected.sum(), rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_that_of_a_fixed_temperature(training):
    table, queries = make_table(SIZE), tf.constant(make_queries(len(IDS)))
    losses = []
    for temperature in (T, LearnedTemperature(T)):
        task = make_task(
            table, filled_with=CACHED, temperature=temperature, in_batch_negatives=True
        )
        ids = tf.constant(IDS, tf.int64)
        losses.append(task(queries, tf.gather(table, ids), {"id": ids}, training=training))
    np.testing.assert_allclose(*losses, rtol=1e-6)


# Bounds.


def sgd():
    return keras.optimizers.SGD(1.0)


OPTIMIZERS = {
    "SGD": sgd,
    "momentum": lambda: keras.optimizers.SGD(0.3, momentum=0.5),
    "Adam": lambda: keras.optimizers.Adam(0.1),
    "moving average": lambda: keras.optimizers.SGD(1.0, use_ema=True),
}


@pytest.mark.parametrize(["bound", "sign"], [("smallest", 1.0), ("largest", -1.0)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_keep_the_weight_at_a_bound_and_take_it_back(name, bound, sign):
    layer = LearnedTemperature(0.2, smallest=0.1, largest=0.4)
    weights, optimizer = layer.trainable_variables, OPTIMIZERS[name]()
    limit = getattr(layer, bound)

    def step(sign):
        with tf.GradientTape() as tape:
            loss = sign * tf.math.log(layer.temperature)
        optimizer.apply_gradients(zip(tape.gradient(loss, trained(weights)), weights))

    for _ in range(40):
        step(sign)
    assert float(weights[0]) == np.float32(np.log(limit))
    assert float(layer.temperature) == pytest.approx(limit, rel=1e-6)
    # The moment of the way there may take some steps to turn.
    for _ in range(15):
        step(-sign)
    assert abs(float(weights[0]) - np.log(limit)) > 0.2


def trained(weights):
    """The variables of TensorFlow that Keras 3 has inside of its own."""
    return [weight if isinstance(weight, tf.Variable) else weight.value for weight in weights]


def test_a_loop_without_an_optimizer_returns_to_the_bounds_as_far_as_it_left_them():
    layer = LearnedTemperature(0.2, smallest=0.1, largest=0.4)
    [weight] = trained(layer.trainable_variables)

    def step(sign):
        with tf.GradientTape() as tape:
            loss = sign * tf.math.log(layer.temperature)
        weight.assign_sub(0.5 * tape.gradient(loss, weight))

    for _ in range(3):
        step(1.0)
    # log 0.2 - 1.5, below log 0.1; used is the bound.
    assert float(weight) == pytest.approx(np.log(0.2) - 1.5)
    assert float(layer.temperature) == pytest.approx(0.1)
    for _ in range(3):
        step(-1.0)
    assert float(layer.temperature) == pytest.approx(0.2)


def test_as_a_score_transform_it_leaves_a_bound_too():
    layer = LearnedTemperature(0.1, smallest=0.1)
    task = make_task(make_table(), cache_size=0, in_batch_negatives=True, score_transform=layer)
    # The positives score lowest: a higher temperature has a lower loss.
    embeddings = np.eye(DIM, dtype=np.float32)
    optimizer = sgd()
    for _ in range(3):
        with tf.GradientTape() as tape:
            ids = tf.range(DIM, dtype=tf.int64)
            loss = task(tf.constant(-embeddings), tf.constant(embeddings), {"id": ids})
        gradients = tape.gradient(loss, trained(layer.trainable_variables))
        optimizer.apply_gradients(zip(gradients, layer.trainable_variables))
    assert float(layer.temperature) > 0.2


def test_weight_decay_leaves_it_alone_if_it_is_excluded():
    values = {}
    for is_excluded in (False, True):
        layer = LearnedTemperature(0.1)
        optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
        if is_excluded:
            optimizer.exclude_from_weight_decay(var_names=["log_temperature"])
        optimizer.apply_gradients([(tf.zeros([]), layer.trainable_variables[0])])
        values[is_excluded] = float(layer.temperature)
    # log T is multiplied by 1 - 0.1 · 0.5.
    assert values == pytest.approx({False: 0.1**0.95, True: 0.1}, rel=1e-5)


# Arguments.


@keras.utils.register_keras_serializable("test")
def one_hot_of_three(features):
    """A tower without weights."""
    return tf.one_hot(features["id"], DIM)


def make_weightless(temperature=None):
    return nc.Retrieval(one_hot_of_three, [nc.InBatch()], temperature=temperature)


def test_learned_begins_at_a_tenth_and_goes_down_to_seven_hundredths():
    task = make_weightless("learned")
    for each in (task, nc.Retrieval.from_config(task.get_config())):
        assert float(each.temperature) == pytest.approx(0.1)
        [weight] = each.trainable_variables
        assert "log_temperature" in weight.name
        weight.assign(np.log(0.01))
        assert float(each.temperature) == pytest.approx(0.07)
    for number in (0.05, 2, None):
        task = make_weightless(number)
        for each in (task, nc.Retrieval.from_config(task.get_config())):
            assert each.temperature == number and not each.trainable_variables


def test_a_configuration_has_start_and_bounds():
    task = make_weightless(LearnedTemperature(0.2, smallest=0.1, largest=0.3))
    again = nc.Retrieval.from_config(task.get_config())
    assert float(again.temperature) == pytest.approx(0.2)
    [weight] = again.trainable_variables
    for value, expected in ((0.15, 0.15), (0.01, 0.1), (0.5, 0.3)):
        weight.assign(np.log(value))
        assert float(again.temperature) == pytest.approx(expected)


@pytest.mark.parametrize(
    ["kwargs", "message"],
    [
        ({"temperature": "learn"}, "must be a number, \"learned\" or a .* Received: 'learn'"),
        ({"temperature": LearnedTemperature}, "must be a number, .* Received: <class"),
        (
            {"temperature": "learned", "score_transform": LearnedTemperature},
            "is the temperature: leave `temperature` out",
        ),
    ],
)
def test_what_is_no_temperature_is_refused(kwargs, message):
    if "score_transform" in kwargs:
        kwargs = {**kwargs, "score_transform": kwargs["score_transform"]()}
    with pytest.raises(ValueError, match=message):
        make_task(make_table(), **kwargs)


@pytest.mark.parametrize(
    "limits", [{"initial": 2.0}, {"initial": 0.001}, {"smallest": 0.0}, {"smallest": float("nan")}]
)
def test_bounds_that_are_none_are_refused(limits):
    with pytest.raises(ValueError, match="must hold. Received: smallest="):
        LearnedTemperature(**limits)
