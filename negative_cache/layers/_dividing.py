"""What was saved on R replicas, for another number of them: what layers have in common.

A state is the value of one replica: field -> NumPy array, or a dictionary of them. A layer makes
those of its own replicas out of all that a file has, in `StateLayer._divided`.
"""

import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tensorflow as tf

from negative_cache import _features

State: TypeAlias = dict[str, Any]
# Function (values [R] of a field, R') -> its values [R'].
Law: TypeAlias = Callable[[Sequence[Any], int], list[Any]]
Take: TypeAlias = Callable[[int, int, tf.Tensor], Any]

# The name that TensorFlow gives to the one value of a variable.
_VALUE = "VARIABLE_VALUE"


def copies(values: Sequence[Any], num_replicas: int) -> list[Any]:
    """The values in turn, of what every replica holds as a whole."""
    return [values[replica % len(values)] for replica in range(num_replicas)]


def means(values: Sequence[np.ndarray], num_replicas: int) -> list[np.ndarray]:
    """The mean everywhere, of what is a mean over the draws of each replica."""
    return [np.mean(values, axis=0, dtype=values[0].dtype)] * num_replicas


def largest(values: Sequence[np.ndarray], num_replicas: int) -> list[np.ndarray]:
    """The largest everywhere, of numbers of steps, which all replicas take together."""
    return [np.max(values, axis=0)] * num_replicas


def seeds_after(values: Sequence[np.ndarray], num_replicas: int) -> list[np.ndarray]:
    """The seed and the step of `next_seed`, from which on no number has been used.

    Step t of R replicas uses the numbers from t R to below (t + 1) R.
    """
    seed, step = values[0][0], max(int(value[1]) for value in values)
    after = -(-(step + 1) * len(values) // num_replicas) - 1
    return [np.array([seed, after], np.int64)] * num_replicas


def shares(counts: Sequence[np.ndarray], num_replicas: int) -> list[np.ndarray]:
    """The sum of the `counts` [R] of events, as counts that differ by one at most."""
    each, rest = divmod(int(sum(int(count) for count in counts)), num_replicas)
    return [np.int64(each + (replica < rest)) for replica in range(num_replicas)]


def deal(ages: np.ndarray, num_replicas: int, num_rows: int, name: str) -> list[np.ndarray]:
    """Deals rows out to replicas, the oldest first, so that each gets rows of all ages.

    The numbers of rows differ by one at most, as when `emptiest_first` fills empty shards.

    Args:
      ages: [n], of all rows in a file.
      num_replicas: R, the number of replicas now.
      num_rows: C, the rows that each has.
      name: of the layer.

    Returns:
      R arrays, the rows of each replica in their order. If there are more than R C, the oldest are
      not among them, and a warning says how many.
    """
    order = np.argsort(-ages, kind="stable")
    num_dropped = max(len(order) - num_replicas * num_rows, 0)
    if num_dropped:
        warnings.warn(
            f"The file has {len(order)} rows of the layer {name!r}, which has room for {num_rows}"
            f" on each of {num_replicas} replica(s): the {num_dropped} oldest were dropped. A size"
            f" of {-(-len(order) // num_replicas)} would hold all.",
            stacklevel=2,
        )
    return [order[num_dropped + replica :: num_replicas] for replica in range(num_replicas)]


def check_lengths(values: Iterable[np.ndarray]) -> None:
    """Checks that the values of rows, of one replica in a file, are of the same rows.

    Raises:
      IndexError: if they are not.
    """
    lengths = {len(each) for each in values}
    if len(lengths) > 1:
        raise IndexError(f"Received: arrays of {sorted(lengths)} rows.")


def divided_rows(
    data: Sequence[Mapping[str, np.ndarray]],
    rows: Sequence[np.ndarray],
    dealt: Sequence[np.ndarray],
    num_rows: int,
    rows_now: Sequence[np.ndarray] | None = None,
) -> list[dict[str, np.ndarray]]:
    """The features of the rows of R' replicas, out of those of R.

    Args:
      data: for each of the R, feature name -> [C, ...].
      rows: for each of the R, the rows to take, in some order.
      dealt: for each of the R', [m], places in the concatenation of `rows`.
      num_rows: C', the rows of each. Those that get nothing are blank.
      rows_now: for each of the R', [m], the rows that they become; the first ones if None.
    """
    if rows_now is None:
        rows_now = [np.arange(len(own)) for own in dealt]
    divided: list[dict[str, np.ndarray]] = [{} for _ in dealt]
    for key in data[0]:
        values = np.concatenate([part[key][own] for part, own in zip(data, rows)])
        for part, own, now in zip(divided, dealt, rows_now):
            blank = b"" if values.dtype == object else 0
            part[key] = np.full([num_rows, *values.shape[1:]], blank, values.dtype)
            part[key][now] = values[own]
    return divided


class Origin(NamedTuple):
    """Where a file was made.

    Attributes:
      num_replicas: on how many replicas.
      fields: of the state there, in which stand the variables here or what is like them.
    """

    num_replicas: int
    fields: Mapping


class Replicas(tf.__internal__.tracking.AutoTrackable):
    """The variables of every replica, as a TensorFlow checkpoint holds them: under their numbers.

    Where a checkpoint has more replicas, TensorFlow finds a place for their values too.

    Args:
      parts: for each replica, field -> variable or a dictionary of them.
      take: function (number of the variable, replica, value) that gets a value of a replica that is
        not here. Variables are numbered in the order of `tf.nest.flatten`.
    """

    def __init__(self, parts: Sequence[Mapping], take: Take) -> None:
        super().__init__()
        # A namespace is nothing that TensorFlow tracks.
        self._absent = types.SimpleNamespace(take=take, replicas={}, first=len(parts))
        for replica, part in enumerate(parts):
            setattr(self, str(replica), part)

    def _lookup_dependency(self, name: str, cached_dependencies: Mapping | None = None) -> Any:
        found = super()._lookup_dependency(name, cached_dependencies)
        if not name.isdigit() or int(name) < self._absent.first:
            return found
        first = getattr(self, "0")
        variables = [
            _AbsentVariable(variable.dtype, number, int(name), self._absent.take)
            for number, variable in enumerate(tf.nest.flatten(first))
        ]
        holder = tf.__internal__.tracking.AutoTrackable()
        holder.fields = tf.nest.pack_sequence_as(first, variables)
        # TensorFlow itself refers to what it restores weakly.
        self._absent.replicas[name] = holder.fields
        return holder.fields


class _AbsentVariable(tf.__internal__.tracking.Trackable):
    """Gives away what a checkpoint has for a variable of a replica that is not here."""

    def __init__(self, dtype: tf.DType, number: int, replica: int, take: Take):
        super().__init__()
        self._dtype, self._number, self._replica, self._take = dtype, number, replica, take

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        # For its name and its dtype, by which TensorFlow reads the value.
        return {_VALUE: _features.blank([], self._dtype)}

    def _restore_from_tensors(self, restored_tensors: Mapping[str, tf.Tensor]) -> None:
        self._take(self._number, self._replica, restored_tensors[_VALUE])
