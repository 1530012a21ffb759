"""The methods that `worth.py` compares, and the model of each.

To change what is measured, change `METHODS`, or `RECIPE`. A line of the results holds the options
of its method, with what the package has by default. A method with other options is measured again.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from _worth_data import Data
from _worth_parts import (
    BothDirections,
    CrossBatchMemory,
    GradCache,
    UniformDraws,
    corpus_cache,
    corpus_rows,
    rows_for_warm_start,
)
from _worth_towers import DIM, make_towers

import negative_cache as nc
from negative_cache._compat import keras

# Of the batch size and the draws, if a method does not say otherwise.
BATCH_SIZE = 64
# Options of `FromCache` that are the best ones known; the method "cache" has the defaults.
RECIPE: dict[str, Any] = {"num_draws": 32}
_OF_CACHES = ("num_draws", "num_negatives", "exact_query_gradient")
# Once in so many steps the oracle encodes all candidates.
ORACLE_EVERY = {"words": 10, "transformer": 40}


@dataclasses.dataclass(frozen=True)
class Method:
    """How a model is trained.

    Attributes:
      kind: which negatives, see `make_model`.
      batch_size: B; "memory" for the largest that fits the memory limit.
      options: of the source of negatives.
      frequency: whether there is a `frequency_correction`.
      is_timed: whether it is given as much processor time as the others, not as many steps as the
        cache.
    """

    kind: str
    batch_size: int | str = BATCH_SIZE
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    frequency: bool = False
    is_timed: bool = True

    def described(self) -> dict[str, Any]:
        """The options, those of caches with their defaults but None."""
        if self.kind not in ("cache", "published") and "cache" not in self.options:
            return dict(self.options)
        parameters = inspect.signature(nc.FromCache).parameters
        defaults = {key: parameters[key].default for key in _OF_CACHES if key in parameters}
        described = {**defaults, **self.options}
        return {key: value for key, value in described.items() if value is not None}


# The time of so many steps of `REFERENCE` is what each method is given.
IN_BATCH, REFERENCE = "in-batch", "own draws"
METHODS = {
    IN_BATCH: Method("batch"),
    "in-batch 96": Method("batch", 96),
    "in-batch 128": Method("batch", 128),
    "in-batch 192": Method("batch", 192),
    "in-batch 256": Method("batch", 256),
    "in-batch 512": Method("batch", 512),
    "in-batch 1024": Method("batch", 1024),
    "in-batch memory": Method("batch", "memory"),
    "gradcache 256": Method("gradcache", 256),
    "gradcache 512": Method("gradcache", 512),
    "gradcache 1024": Method("gradcache", 1024),
    "uniform": Method("uniform", options={"num_draws": 64}),
    "uniform 16": Method("uniform", options={"num_draws": 16}),
    "memory": Method("memory", options={"share": 1.0, "start": 200}),
    "memory 1/8": Method("memory", options={"share": 0.125, "start": 200}),
    "published": Method("published", options={"num_negatives": 1, "exact_query_gradient": False}),
    REFERENCE: Method("cache", options={"num_negatives": 1}),
    "cache": Method("cache"),
    "recipe": Method("cache", options=RECIPE),
    "16 shared draws": Method("cache", options={"num_draws": 16}),
    "4 own draws": Method("cache", options={"num_negatives": 4}),
    "sampled gradient": Method("cache", options={"exact_query_gradient": False}),
    "refreshed": Method("cache", options={"refresh_fraction": 0.001}),
    "corpus": Method("corpus", options={"refresh_fraction": 0.001}),
    "tree": Method("corpus", options={"index": True}),
    "nystrom": Method("corpus", options={"corrector": "nystrom"}),
    "corrector": Method("corpus", options={"corrector": True}),
    "corpus 16": Method("corpus", options={"refresh_fraction": 0.001, "num_draws": 16}),
    "tree 16": Method("corpus", options={"index": True, "num_draws": 16}),
    "nystrom 16": Method("corpus", options={"corrector": "nystrom", "num_draws": 16}),
    "corrector 16": Method("corpus", options={"corrector": True, "num_draws": 16}),
    "contrastive": Method("contrastive", options={"start_epoch": 1}),
    "contrastive groups": Method("contrastive", options={"start_epoch": 1, "group_size": 8}),
    "oracle": Method("oracle", options={"num_negatives": 4}, is_timed=False),
    "oracle of all": Method(
        "oracle", options={"num_negatives": 4, "with_held_out": True}, is_timed=False
    ),
    "both": Method("both"),
    "both cache": Method("both", options={"cache": True}),
    "in-batch frequency": Method("batch", frequency=True),
    "in-batch 512 frequency": Method("batch", 512, frequency=True),
    "uniform alone": Method("uniform", options={"num_draws": 128, "alone": True}),
    "cache frequency": Method("cache", frequency=True),
    "recipe frequency": Method("cache", options=RECIPE, frequency=True),
}
LARGER_BATCHES = tuple(name for name in METHODS if name.startswith("in-batch ") and name[-1] != "y")


@dataclasses.dataclass
class Training:
    """A model with the callbacks that it trains with.

    Attributes:
      model: compiled.
      callbacks: that fill or refresh caches.
      num_filled: candidates that are encoded before the first step.
      encoded_again: how often a step encodes each candidate of its batch.
      order: what `GlobalContrastiveBatches` is told; None for shuffled batches.
    """

    model: nc.DualEncoder
    callbacks: list
    num_filled: int = 0
    encoded_again: int = 1
    order: Mapping[str, Any] | None = None


def make_training(
    method: Method,
    batch_size: int,
    data: Data,
    tower: str,
    temperature: float,
    rate: float,
    seed: int,
) -> Training:
    """The model of a method, with Keras's Adam."""
    keras.utils.set_random_seed(seed)
    towers = make_towers(data, tower)
    task_options = {
        "temperature": temperature,
        "candidate_id_key": "row",
        "remove_accidental_hits": True,
        "frequency_correction": method.frequency,
    }
    options, specs = dict(method.options), data.specs(data.candidate_ids)
    model, model_options, callbacks, num_filled, encoded_again = nc.DualEncoder, {}, [], 0, 1
    sources = [nc.InBatch()]
    if method.kind == "gradcache":
        model, encoded_again = GradCache, 2
        model_options = {"num_parts": batch_size // BATCH_SIZE}
    elif method.kind == "uniform":
        if options.pop("alone", False):
            sources = []
        sources.append(UniformDraws(data, **options))
    elif method.kind == "memory":
        size = int(options["share"] * data.cache_size)
        sources.append(CrossBatchMemory(size, DIM, options["start"] * batch_size))
    elif method.kind in ("cache", "published"):
        # The correction takes the cache for a sample of the stream.
        spec = nc.CacheSpec(specs, data.cache_size, use_lru=not method.frequency)
        if method.kind == "published":
            sources = []
        sources.append(nc.FromCache(spec, **options))
        callbacks.append(_warm_start(data, seed))
        num_filled = data.cache_size
    elif method.kind in ("corpus", "oracle"):
        corrector = options.pop("corrector", False)
        if corrector:
            options["corrector"] = (
                nc.NystromCorrector() if corrector == "nystrom" else nc.Corrector()
            )
        rows = corpus_rows(data, options.pop("with_held_out", False))
        num_filled = len(rows)
        index = nc.TreeIndex(num_filled, DIM) if options.pop("index", False) else None
        sources.append(nc.FromCorpus(corpus_cache(data, rows, towers[1], index), **options))
        if method.kind == "oracle":
            callbacks.append(nc.CacheRefresh(every_steps=ORACLE_EVERY[tower], verbose=0))
    elif method.kind == "both":
        model = BothDirections
        reverse = [nc.InBatch()]
        if options.pop("cache", False):
            spec = nc.CacheSpec(specs, data.cache_size)
            sources.append(nc.FromCache(spec, **options))
            spec = nc.CacheSpec(data.specs(data.query_ids), data.cache_size)
            reverse.append(nc.FromCache(spec, **options))
        model_options["reverse"] = nc.Retrieval(towers[0], reverse, name="reverse", **task_options)
        if len(reverse) > 1:
            queries = data.queries(data.train[:, 0])
            fill = nc.CacheWarmStart(queries, verbose=0, task=model_options["reverse"])
            callbacks += [_warm_start(data, seed), fill]
            num_filled = 2 * data.cache_size
    task = nc.Retrieval(towers[1], sources, **task_options)
    trained = model(*towers, task, **model_options)
    trained.compile(optimizer=keras.optimizers.Adam(rate))
    order = options if method.kind == "contrastive" else None
    return Training(trained, callbacks, num_filled, encoded_again, order)


def _warm_start(data, seed):
    return nc.CacheWarmStart(data.candidates(rows_for_warm_start(data, seed)), verbose=0)
