"""The features of a cache's rows as variables, on a device or on the host."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from negative_cache import _features
from negative_cache.layers._variables import (
    StateVariable,
    is_on_host,
    make_state_variable,
    scatter_rows,
)
from negative_cache.ops.cache_rows import MaskedRows

Items = Mapping[str, tf.Tensor]


class CacheRows:
    """Variables [C, ...] of the features, in host memory or on the device that the layer uses.

    Args:
      specs: feature name -> spec.
      num_rows: C.
      on_host: names of features that stay in host memory. Strings always do.

    Attributes:
      host_keys: names of the features in host memory.
      variables: feature name -> variable [C, ...].

    Raises:
      ValueError: if `on_host` contains another name, or is used under a `tf.distribute` strategy.
    """

    def __init__(
        self, specs: Mapping[str, tf.io.FixedLenFeature], num_rows: int, on_host: Sequence[str]
    ):
        if isinstance(on_host, str) or not set(on_host) <= set(specs):
            raise ValueError(
                f"`on_host` must contain names of features in `specs`, {sorted(specs)}. Received:"
                f" {on_host!r}."
            )
        if on_host and tf.distribute.has_strategy():
            raise ValueError(
                "Under a `tf.distribute` strategy each replica keeps its rows on its own device."
                f" Received: on_host={on_host!r}."
            )
        strings = (key for key, spec in specs.items() if is_on_host(spec.dtype))
        self.host_keys = frozenset((*on_host, *strings))
        self.variables: dict[str, StateVariable] = {
            key: _make(key, [num_rows, *spec.shape], tf.as_dtype(spec.dtype), key in on_host)
            for key, spec in specs.items()
        }

    def on_host(self, key: str, filled: np.ndarray) -> np.ndarray:
        """[C, d] float32, the embedding `key`, for an index.

        Args:
          key: its name.
          filled: [C] bool. Empty rows are NaN, so that an index leaves them out.
        """
        embeddings = tf.convert_to_tensor(self.variables[key])
        if embeddings.dtype != tf.float32 or not np.all(filled):
            embeddings = embeddings.numpy().astype(np.float32)
            embeddings[~filled] = np.nan
            return embeddings
        # On a CPU the memory is shared, because a large corpus may not fit into memory twice.
        is_on_cpu = tf.DeviceSpec.from_string(embeddings.device).device_type == "CPU"
        return np.asarray(memoryview(embeddings)) if is_on_cpu else embeddings.numpy()

    @staticmethod
    def for_device(items: Items) -> Items:
        """The `items` without strings, which a device cannot hold."""
        return {key: values for key, values in items.items() if not is_on_host(values.dtype)}

    def write_on_device(self, rows: MaskedRows, items: Items) -> None:
        """Writes those of `items` that are not kept in host memory."""
        self._write(rows, items, set(items) - self.host_keys)

    def write_on_host(self, rows: MaskedRows, items: Items) -> None:
        """Writes those of `items` that are kept in host memory."""
        self._write(rows, items, self.host_keys.intersection(items))

    def write(self, rows: MaskedRows, items: Items) -> None:
        """Writes all `items`."""
        self._write(rows, items, items)

    def _write(self, rows: MaskedRows, items: Items, keys: Iterable[str]) -> None:
        for key in sorted(keys):
            variable, values = self.variables[key], tf.stop_gradient(items[key])
            scatter_rows(variable, rows.rows, rows.values(values, variable))


def _make(name: str, shape: list[int], dtype: tf.DType, on_host: bool) -> StateVariable:
    return make_state_variable(lambda: _features.blank(shape, dtype), name, on_host=on_host)
