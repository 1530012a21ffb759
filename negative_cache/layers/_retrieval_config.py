"""The configuration of a `CachedRetrieval`: its arguments as what Keras writes into files."""

from collections.abc import Mapping

import tensorflow as tf

from negative_cache._compat import deserialize, keras
from negative_cache.layers._state import describe_spec, describe_specs, spec_of, specs_of

# The arguments that a configuration holds as they are.
_PLAIN = (
    "cache_size",
    "temperature",
    "num_negatives",
    "in_batch_negatives",
    "num_hard_negatives",
    "candidate_id_key",
    "remove_accidental_hits",
    "use_lru",
    "false_negative_margin",
    "exact_query_gradient",
    "reduction",
    "save_cache",
    "seed",
    "write_back",
    "refresh_fraction",
    "probe_size",
    "probe_every",
)
_OBJECTS = ("candidate_network", "score_transform", "corrector", "cache", "index")
_METRICS = ("metrics", "batch_metrics", "loss_metrics")


def to_config(task, feature_specs, metrics: Mapping[str, list]) -> dict:
    """Describes the arguments of `task`.

    Args:
      task: the `CachedRetrieval`, which has most of its arguments as attributes.
      feature_specs: the argument of that name.
      metrics: the arguments `metrics`, `batch_metrics` and `loss_metrics`, as lists.
    """
    serialize = keras.utils.serialize_keras_object
    objects = {name: getattr(task, name) for name in _OBJECTS}
    # A cache that streams is made by the task; one that covers a corpus was given, with its index.
    is_given = task.cache is not None and task.cache.row_key is not None
    objects["index" if is_given else "cache"] = None
    frequency = task.frequency
    return {
        **{name: getattr(task, name) for name in _PLAIN},
        "frequency_correction": False if frequency is None else serialize(frequency),
        **{name: serialize(value) for name, value in objects.items()},
        **{name: [serialize(metric) for metric in metrics[name]] for name in _METRICS},
        "feature_specs": (
            describe_spec(feature_specs)
            if isinstance(feature_specs, tf.io.FixedLenFeature)
            else describe_specs(feature_specs)
        ),
        "embedding_dim": task.cache.embeddings.shape[1] if task.cache is not None else None,
        "embedding_dtype": task.embedding_dtype.name,
    }


def from_config(config: Mapping) -> dict:
    """The arguments that `to_config` has described, and the others as they are."""
    specs = config["feature_specs"]
    frequency = config["frequency_correction"]
    return {
        **config,
        "frequency_correction": deserialize(frequency)
        if isinstance(frequency, dict)
        else frequency,
        **{name: deserialize(config.get(name)) for name in _OBJECTS},
        **{name: [deserialize(metric) for metric in config[name]] for name in _METRICS},
        "feature_specs": specs_of(specs) if isinstance(specs, Mapping) else spec_of(specs),
    }
