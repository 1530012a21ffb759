"""A corpus of candidates: it is read from a dataset, encoded, and found again by id."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from negative_cache import _features, _validation
from negative_cache._compat import keras
from negative_cache._features import fingerprint
from negative_cache._towers import Encoder
from negative_cache.layers._variables import StateVariable, make_state_variable
from negative_cache.ops import _execution

# The name of the embedding in a cache of candidates.
EMBEDDING = "embedding"


class RowsById:
    """Finds the row of a candidate by its id, with binary search in the sorted fingerprints.

    All functions take the variables from `make_variables`, which the cache holds.
    """

    @staticmethod
    def make_variables(num_rows: int, *, on_host: bool) -> dict[str, StateVariable]:
        """Makes the variables, without any id."""
        make = functools.partial(make_state_variable, on_host=on_host)
        return {
            "fingerprints": make(lambda: tf.fill([num_rows], tf.int64.max), "fingerprints"),
            "rows": make(lambda: tf.fill([num_rows], -1), "rows"),
        }

    @staticmethod
    def clear(variables: Mapping[str, tf.Variable]) -> None:
        """Forgets all ids."""
        variables["fingerprints"].assign(tf.fill(variables["fingerprints"].shape, tf.int64.max))
        variables["rows"].assign(tf.fill(variables["rows"].shape, -1))

    @staticmethod
    def check_distinct(ids: np.ndarray) -> None:
        """Checks that the `ids` [n] of rows differ.

        Raises:
          ValueError: if two ids are equal.
        """
        fingerprints = fingerprint(tf.constant(ids)).numpy()
        order = np.argsort(fingerprints, kind="stable")
        fingerprints = fingerprints[order]
        same = np.flatnonzero(fingerprints[1:] == fingerprints[:-1])
        if len(same):
            first, second = sorted(order[same[0] : same[0] + 2])
            raise ValueError(
                "Every candidate of a corpus must have an id of its own. Received the id"
                f" {ids[[first]].tolist()[0]!r} for rows {first} and {second}."
            )

    @staticmethod
    def assign(variables: Mapping[str, tf.Variable], ids: np.ndarray) -> None:
        """Stores that row i has the id `ids[i]`, for distinct `ids` [n]."""
        fingerprints = fingerprint(tf.constant(ids)).numpy()
        num_rows = variables["rows"].shape[0]
        values = RowsById.values(fingerprints, np.arange(len(ids)), num_rows)
        for name, variable in variables.items():
            variable.assign(values[name])

    @staticmethod
    def values(fingerprints: np.ndarray, rows: np.ndarray, num_rows: int) -> dict[str, np.ndarray]:
        """The values of the variables, if distinct `fingerprints` [n] are those of `rows` [n]."""
        order, missing = np.argsort(fingerprints, kind="stable"), num_rows - len(rows)
        rows = rows[order].astype(np.int32)
        return {
            "fingerprints": np.pad(fingerprints[order], [0, missing], constant_values=tf.int64.max),
            "rows": np.pad(rows, [0, missing], constant_values=-1),
        }

    @staticmethod
    def find(variables: Mapping[str, tf.Variable], ids: tf.Tensor) -> tf.Tensor:
        """[n] int64, the rows of `ids` [n]; -1 for unknown ids."""
        wanted = fingerprint(tf.convert_to_tensor(ids))
        # On the device of the variables: otherwise all fingerprints would be copied to the device
        # of the step.
        with tf.device(variables["fingerprints"].device):
            place = _lower_bound(variables["fingerprints"], wanted)
            is_there = tf.equal(tf.gather(variables["fingerprints"], place), wanted)
            rows = tf.cast(tf.gather(variables["rows"], place), tf.int64)
            return tf.where(is_there, rows, -1)


def _lower_bound(ascending: tf.Variable, wanted: tf.Tensor) -> tf.Tensor:
    """[n] int64, the first position in `ascending` [C] with a value >= `wanted` [n]; at most C - 1.

    In XLA it is a binary search, because `tf.searchsorted` would compare all pairs there.
    """
    size = ascending.shape[0]
    if not _execution.is_in_xla():
        place = tf.searchsorted(tf.convert_to_tensor(ascending), wanted, out_type=tf.int64)
        return tf.minimum(place, size - 1)
    place = tf.zeros_like(wanted)
    for bit in reversed(range((size - 1).bit_length())):
        # The number of smaller values is found bit by bit, from the highest bit down.
        further = place + 2**bit
        is_less = tf.gather(ascending, tf.minimum(further, size) - 1) < wanted
        place = tf.where((further < size) & is_less, further, place)
    return place


class Corpus:
    """Candidates of a dataset, with the tower that encodes them.

    The constructor checks its arguments.

    Args:
      dataset: batches of candidate features, each a mapping or a single tensor.
      network: the candidate tower, features -> [n, d].
      feature_specs: feature name -> spec, or a single spec; taken from the dataset if None.
      id_key: name of the feature that identifies a candidate.
      on_host: names of features that stay in host memory.

    Attributes:
      specs: feature name -> spec.
      id_key: name of the feature that identifies a candidate.

    Raises:
      ValueError: if an argument is invalid or contradicts another.
    """

    def __init__(
        self,
        dataset: Iterable,
        network: Callable[..., tf.Tensor],
        feature_specs: Mapping[str, tf.io.FixedLenFeature] | tf.io.FixedLenFeature | None,
        id_key: str | None,
        on_host: Sequence[str] = (),
    ):
        if not callable(network):
            raise ValueError(
                f"`candidate_network` must be a layer or a function. Received: {network!r}."
            )
        if feature_specs is None:
            feature_specs = _features.specs_of_rows(dataset)
        self._takes_one_tensor = not isinstance(feature_specs, Mapping)
        id_key = _features.id_key_of(feature_specs, id_key)
        self.specs = _validation.check_specs(_features.as_dict(feature_specs))
        if EMBEDDING in self.specs:
            raise ValueError(
                f"The name {EMBEDDING!r} is reserved for the cached embedding. No feature of the"
                f" candidates can have it. Received features {sorted(self.specs)}."
            )
        if id_key is None:
            raise ValueError(
                "A cache of a corpus needs a `candidate_id_key`, to find the rows of candidates."
                f" Received: None, and features {sorted(self.specs)}."
            )
        _validation.check_id(id_key, self.specs, "candidate_id_key", "feature_specs")
        self.id_key = id_key
        for name in on_host:
            if name not in (*self.specs, EMBEDDING):
                raise ValueError(
                    "`on_host` must contain names of the candidates' features"
                    f" {sorted(self.specs)}, or {EMBEDDING!r}. Received: {on_host!r}."
                )
        self._dataset, self._encoder = dataset, Encoder(network)

    def count(self) -> int:
        """The number of candidates, by a pass over the dataset.

        Raises:
          ValueError: if the dataset is empty, or can be read only once.
        """
        if isinstance(self._dataset, Iterator):
            raise ValueError(
                "If a dataset can be read only once, `cache_size` must be its number of candidates."
                f" Received: cache_size=None, and {self._dataset!r}."
            )
        total = sum(len(features[self.id_key]) for features in self._batches())
        if not total:
            raise ValueError("The dataset must have candidates. Received an empty dataset.")
        return total

    def embedding_dim(self) -> int:
        """d, from the tower's output shape, or else from its output for an example."""
        return self._encoder.output_dim(self._inputs(_features.example_of(self.specs)))

    def items(self) -> Iterator[dict[str, tf.Tensor]]:
        """Yields batches of features, including the embeddings [n, d] float32."""
        for features in self._batches():
            yield {**features, EMBEDDING: self._encoder.embed_tensor(self._inputs(features))}

    def _inputs(self, features: Mapping[str, tf.Tensor]) -> Any:
        """The input of the tower: the mapping `features`, or its single tensor."""
        return _features.as_given(features, self._takes_one_tensor)

    def _batches(self) -> Iterator[dict[str, tf.Tensor]]:
        for features in self._dataset:
            if self._takes_one_tensor:
                features = _features.as_dict(features)
            yield _validation.check_items(features, self.specs, what="dataset", exact=True)


def write_in_order(
    batches: Iterable[Mapping[str, tf.Tensor]],
    specs: Mapping[str, tf.io.FixedLenFeature],
    id_key: str,
    num_rows: int,
    num_shards: int,
    write: Callable[[tf.Tensor, Mapping[str, tf.Tensor]], None],
    *,
    verbose: int,
) -> np.ndarray:
    """Writes a corpus to the rows in order, beginning with row 0.

    Args:
      batches: batches of candidates, with all features of `specs`.
      specs: feature name -> spec.
      id_key: name of the feature that identifies a candidate.
      num_rows: the number of rows of a shard.
      num_shards: how many shards there are.
      write: function (first row, items) that writes a batch.
      verbose: 1 for a progress bar, 0 for none.

    Returns:
      [n] array, the ids of the candidates.

    Raises:
      ValueError: if there are more candidates than rows, or no candidates, or if the features do
        not match the specs.
    """
    total = num_rows * num_shards
    bar = keras.utils.Progbar(total, unit_name="candidate", verbose=verbose)
    ids, start = [], 0
    for items in batches:
        items = _validation.check_items(items, specs, what="batches", exact=True)
        ids.append(items[id_key].numpy())
        if start + len(ids[-1]) > total:
            raise ValueError(
                "There must be no more candidates than rows. Received at least"
                f" {start + len(ids[-1])} candidates for a `cache_size` of {num_rows}"
                + (f" on each of {num_shards} replicas." if num_shards > 1 else ".")
            )
        write(tf.constant(start, tf.int64), items)
        start += len(ids[-1])
        bar.update(start)
    if not start:
        raise ValueError("There must be candidates to fill the cache with. Received none.")
    if start < total:
        bar.update(start, finalize=True)
    return np.concatenate(ids)
