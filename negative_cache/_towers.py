"""The two towers as what orders pairs needs them: embeddings now, and whether training goes on."""

import zlib

import numpy as np
import tensorflow as tf

from negative_cache import _pair_batches, evaluation
from negative_cache._compat import keras
from negative_cache.layers import _networks


class Towers:
    """Query and candidate network of a model, in inference mode, compiled once.

    Args:
      model: has `query_network` and `candidate_network`, or is the pair of both; then the strategy
        is that of the scope in which this is made.
      batch_size: features embedded at a time.
    """

    def __init__(self, model, batch_size: int):
        self._batch_size = batch_size
        self._strategy = getattr(model, "distribute_strategy", None) or tf.distribute.get_strategy()
        self._encoders = dict(zip(("query", "candidate"), evaluation.encoders_of(model)))
        self._networks = model
        if not isinstance(model, (tuple, list)):
            self._networks = (model.query_network, model.candidate_network)
        self._is_built = False

    def build(self, pairs) -> None:
        """Makes the variables of towers that have seen no features yet."""
        if not self._is_built:
            with self._strategy.scope():
                for name, network in zip(("query", "candidate"), self._networks):
                    first = _pair_batches.take(pairs[name], np.zeros([1], np.int64))
                    _networks.embed(network, first, training=False)
            self._is_built = True

    def embed(self, pairs, num_pairs: int, verbose: int) -> tuple[np.ndarray, np.ndarray]:
        """[N, d] float32 embeddings of the queries and of the candidates."""
        starts = range(0, num_pairs, self._batch_size)
        bar = None
        if verbose:
            bar = keras.utils.Progbar(2 * len(starts), unit_name="batch")

        def batches(name):
            for start in starts:
                rows = np.arange(start, min(start + self._batch_size, num_pairs))
                yield _pair_batches.take(pairs[name], rows)

        with self._strategy.scope():
            return tuple(
                encoder(batches(name), None if bar is None else lambda _: bar.add(1))
                for name, encoder in self._encoders.items()
            )

    def weights(self) -> list[int]:
        """A checksum of each weight that is trained."""
        return [
            zlib.crc32(tf.convert_to_tensor(weight).numpy().tobytes())
            for network in self._networks
            for weight in getattr(network, "trainable_variables", ())
        ]

    def have_changed(self, weights: list[int]) -> bool:
        """Whether the towers are not those of `weights()`."""
        return differ(self.weights(), weights)


def differ(weights: list[int], others: list[int]) -> bool:
    """Whether `Towers.weights()` of two times differ; without weights it is taken that they do."""
    return not weights or weights != others
