"""A corpus of candidates: read from a dataset, encoded, and found again by id."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf

from negative_cache import _features, _validation
from negative_cache._compat import keras
from negative_cache._features import ONE_FEATURE, fingerprint
from negative_cache._towers import Encoder
from negative_cache.layers._variables import StateVariable, make_state_variable
from negative_cache.ops import _execution

# The name of the embedding in a cache of candidates.
EMBEDDING = "embedding"


class RowsById:
    """Which row of a cache a candidate has: its id's fingerprint among the sorted ones of all.

    The functions take the variables that `make_variables` makes, which live in the cache.
    """

    @staticmethod
    def make_variables(num_rows: int, *, on_host: bool) -> dict[str, StateVariable]:
        """Variables without any id in them."""
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
    def assign(variables: Mapping[str, tf.Variable], ids: np.ndarray) -> None:
        """Remembers that row i has the id `ids[i]`, i < n.

        Raises:
          ValueError: where two ids are the same.
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
        missing = variables["rows"].shape[0] - len(ids)
        variables["fingerprints"].assign(
            np.pad(fingerprints, [0, missing], constant_values=tf.int64.max)
        )
        variables["rows"].assign(np.pad(order.astype(np.int32), [0, missing], constant_values=-1))

    @staticmethod
    def find(variables: Mapping[str, tf.Variable], ids: tf.Tensor) -> tf.Tensor:
        """[n] int64, the rows of `ids` [n]; -1 for those that there are not."""
        wanted = fingerprint(tf.convert_to_tensor(ids))
        # Not where the step runs: all fingerprints would be copied there.
        with tf.device(variables["fingerprints"].device):
            place = _lower_bound(variables["fingerprints"], wanted)
            is_there = tf.equal(tf.gather(variables["fingerprints"], place), wanted)
            rows = tf.cast(tf.gather(variables["rows"], place), tf.int64)
            return tf.where(is_there, rows, -1)


def _lower_bound(ascending: tf.Variable, wanted: tf.Tensor) -> tf.Tensor:
    """[n] int64, the first place in `ascending` [C] with no less than `wanted` [n]; C - 1 at most.

    XLA would compare all with all.
    """
    size = ascending.shape[0]
    if not _execution.is_in_xla():
        place = tf.searchsorted(tf.convert_to_tensor(ascending), wanted, out_type=tf.int64)
        return tf.minimum(place, size - 1)
    place = tf.zeros_like(wanted)
    for bit in reversed(range((size - 1).bit_length())):
        # How many are less: of the numbers below `size`, one bit after the other.
        further = place + 2**bit
        is_less = tf.gather(ascending, tf.minimum(further, size) - 1) < wanted
        place = tf.where((further < size) & is_less, further, place)
    return place


class Corpus:
    """Candidates of a dataset, with the tower that encodes them.

    The arguments are those of `Cache.from_dataset`, which this checks.

    Attributes:
      specs: feature name -> spec.
      id_key: the feature that identifies a candidate.
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
                f"{EMBEDDING!r} is the name of the cached embedding, and no candidate's feature can"
                f" have it. Received features {sorted(self.specs)}."
            )
        if id_key is None:
            raise ValueError(
                "A cache of a corpus needs a `candidate_id_key`, to know the rows of candidates"
                f" again. Received: None, and features {sorted(self.specs)}."
            )
        _validation.check_id(id_key, self.specs, "candidate_id_key", "feature_specs")
        self.id_key = id_key
        for name in on_host:
            if name not in (*self.specs, EMBEDDING):
                raise ValueError(
                    "`on_host` must be names of the candidates' features"
                    f" {sorted(self.specs)}, or {EMBEDDING!r}. Received: {on_host!r}."
                )
        self._dataset, self._encoder = dataset, Encoder(network)

    def count(self) -> int:
        """The number of candidates."""
        if isinstance(self._dataset, Iterator):
            raise ValueError(
                "A dataset that can be read only once needs its number of candidates as"
                f" `cache_size`. Received: {self._dataset!r}."
            )
        total = sum(len(features[self.id_key]) for features in self._batches())
        if not total:
            raise ValueError("There are no candidates in the dataset. Received an empty one.")
        return total

    def embedding_dim(self) -> int:
        """d, as the tower says, or else what it does with an example."""
        return self._encoder.output_dim(self._inputs(_features.example_of(self.specs)))

    def items(self) -> Iterator[dict[str, tf.Tensor]]:
        """Batches of features, with the embeddings [n, d] float32 among them."""
        for features in self._batches():
            yield {**features, EMBEDDING: self._encoder.embed_tensor(self._inputs(features))}

    def _inputs(self, features):
        """What the tower takes of features by name."""
        return features[ONE_FEATURE] if self._takes_one_tensor else features

    def _batches(self):
        for features in self._dataset:
            if self._takes_one_tensor:
                features = _features.as_dict(features)
            yield _validation.check_items(features, self.specs, what="dataset", exact=True)


def write_in_order(
    batches: Iterable[Mapping[str, tf.Tensor]],
    specs: Mapping[str, tf.io.FixedLenFeature],
    id_key: str,
    num_rows: int,
    write: Callable[[tf.Tensor, Mapping[str, tf.Tensor]], None],
    *,
    verbose: int,
) -> np.ndarray:
    """Writes a corpus from row 0 on, and returns its ids.

    Args:
      batches: of candidates, with all features of `specs`.
      specs: feature name -> spec.
      id_key: the feature that identifies a candidate.
      num_rows: as many candidates as fit.
      write: (first row, items) writes a batch.
      verbose: 1 for a progress bar, 0 for none.

    Raises:
      ValueError: where there are more candidates than rows, or none; where features do not match.
    """
    bar = keras.utils.Progbar(num_rows, unit_name="candidate", verbose=verbose)
    ids, start = [], 0
    for items in batches:
        items = _validation.check_items(items, specs, what="batches", exact=True)
        ids.append(items[id_key].numpy())
        if start + len(ids[-1]) > num_rows:
            raise ValueError(
                "There are more candidates than rows. Received at least"
                f" {start + len(ids[-1])} candidates for a `cache_size` of {num_rows}."
            )
        write(tf.constant(start, tf.int64), items)
        start += len(ids[-1])
        bar.update(start)
    if not start:
        raise ValueError("There are no candidates to fill the cache with.")
    if start < num_rows:
        bar.update(start, finalize=True)
    return np.concatenate(ids)
