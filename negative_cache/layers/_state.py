"""Layers with state that every replica of a `tf.distribute` strategy holds for itself.

It lives in raw variables (`_variables`): the `add_weight` of Keras can make neither per-replica
variables nor, where they must be saved, strings. `StateLayer` puts them into files of every format.
"""

import functools
import json
import operator
import random
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from negative_cache import _compat
from negative_cache._compat import keras
from negative_cache.layers._variables import (
    StateVariable,
    by_replica,
    check_when_restored,
    kept_variable,
)

_DESCRIPTION = "description"
_LENGTHS = "_lengths"
# In the descriptions of layers whose variables once had other dtypes, which files may still have.
LAYOUT = {"layout": 2}


def on_every_replica(function: Callable[..., None], *args: Any) -> None:
    """Runs `function(*args)` here or, where called outside of the replicas, on each of them."""
    if tf.distribute.in_cross_replica_context():
        tf.distribute.get_strategy().run(function, args)
    else:
        function(*args)


def next_seed(seed_and_step: tf.Variable) -> tf.Tensor:
    """[2] int64, another one at every call and on every replica.

    Args:
      seed_and_step: [2] int64 state variable, whose step is moved on by one.
    """
    on_every_replica(seed_and_step.assign_add, tf.constant([0, 1], tf.int64))
    current = tf.convert_to_tensor(seed_and_step)
    # An `unstack` would be done on the host.
    seed, step = current[0], current[1]
    replica_context = tf.distribute.get_replica_context()
    replica = 0 if replica_context is None else replica_context.replica_id_in_sync_group
    num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
    return tf.stack([seed, step * num_replicas + tf.cast(replica, tf.int64)])


def fixed_seed(seed: int | None) -> int:
    """A `seed` as an int; a random one, which follows `keras.utils.set_random_seed`, if None."""
    return random.randrange(2**31) if seed is None else operator.index(seed)


def describe_specs(specs: Mapping[str, tf.io.FixedLenFeature] | tf.io.FixedLenFeature) -> Any:
    """Specs by name, or a single one, as JSON values, for configurations and files."""
    if isinstance(specs, Mapping):
        return {key: describe_specs(spec) for key, spec in specs.items()}
    return [list(specs.shape), tf.as_dtype(specs.dtype).name]


def specs_of(description: Any) -> Any:
    """The inverse of `describe_specs`."""
    if isinstance(description, Mapping):
        return {key: specs_of(part) for key, part in description.items()}
    shape, dtype = description
    return tf.io.FixedLenFeature(shape, tf.as_dtype(dtype))


class StateLayer(keras.layers.Layer):
    """A layer with state variables, which TensorFlow checkpoints and Keras files hold.

    What a file holds are the values of all replicas. Where it is loaded on fewer, the first ones
    are taken; on more, the others keep what they have.

    It is a layer even if it computes nothing from inputs, as a cache does: in an attribute of a
    model, Keras looks for layers and lets no other object write state of its own into its files.
    Such a layer is used by its methods. It has no `call`, and to call it is an error.

    Attributes:
      num_replicas: for how many replicas the state was made.
    """

    # Whether Keras 2 cannot make the layer again from a folder that `model.save` has written.
    _is_lost_in_folders = False

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses, for a layer that has no `call` of its own.

        Raises:
          TypeError: always.
        """
        raise TypeError(
            f"A `{type(self).__name__}` is not called: it is a layer so that Keras saves it with"
            " the model it belongs to. Use its methods."
        )

    def _hold_state(self, *, description: Mapping, saved: bool = True, **fields: Any) -> None:
        """Makes `self._state`, to be called once.

        Args:
          description: what a file must agree with to be loaded: JSON values.
          saved: whether files hold the state.
          **fields: the attributes of `self._state`, each a state variable or a dictionary of them.
        """
        self._description = json.dumps(description, sort_keys=True)
        self._is_saved = saved
        self._refusal: str | None = None
        self.num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
        # A namespace is nothing that Keras or TensorFlow track by themselves.
        self._state = types.SimpleNamespace(**fields)
        holder = tf.__internal__.tracking.AutoTrackable()
        holder.description = _Description(self)
        # A variable of all replicas would be saved with the value of the first only.
        parts = [
            [kept_variable(part) for part in by_replica(variable)]
            for variable in tf.nest.flatten(fields)
        ]
        holder.replicas = [tf.nest.pack_sequence_as(fields, part) for part in zip(*parts)]
        for variable in tf.nest.flatten(fields):
            for component in by_replica(variable):
                check = functools.partial(self._check_values, variable)
                check_when_restored(component, check)
        self._untracked = types.SimpleNamespace(state=holder)
        if saved:
            self._checkpointed = holder

    def _saved_variables(self) -> Iterator[tuple[str, StateVariable, StateVariable]]:
        """Names in Keras files, state variables, and their parts of single replicas."""
        for i, variable in enumerate(tf.nest.flatten(vars(self._state))):
            for j, component in enumerate(by_replica(variable)):
                yield f"{i}_{j}", variable, component

    @property
    def checkpointable_state(self) -> Any:
        """What a TensorFlow checkpoint of the state tracks, also if files do not hold it."""
        return self._untracked.state

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict:
        if self._is_lost_in_folders and save_type == "savedmodel":
            _compat.refuse_folder(self)
        return super()._trackable_children(save_type, **kwargs)

    def save_own_variables(self, store: Any) -> None:
        """Writes the state into a Keras file; called by Keras."""
        if not self._is_saved:
            return
        store[_DESCRIPTION] = _to_bytes(self._description.encode())
        for name, _, component in self._saved_variables():
            for suffix, array in _to_arrays(component).items():
                store[name + suffix] = array

    def load_own_variables(self, store: Any) -> None:
        """Reads the state from a Keras file; called by Keras."""
        if not self._is_saved:
            return
        if _DESCRIPTION not in store:
            # Keras 3 looks for a layer that did not fit in other places of the file, and reports
            # the last error.
            raise ValueError(
                self._refusal
                or f"The file holds no state of the layer {self.name!r}. Was it saved without? Then"
                " load it into a layer that is made to be saved without too."
            )
        self._refusal = None
        try:
            self._check_description(np.asarray(store[_DESCRIPTION]).tobytes().decode())
            self._load_variables(store)
        except ValueError as error:
            self._refusal = str(error)
            raise

    def _load_variables(self, store: Any) -> None:
        for name, variable, component in self._saved_variables():
            is_there = name in store
            if component.dtype == tf.string:
                is_there = is_there and name + _LENGTHS in store
            if is_there:
                arrays = {
                    suffix: np.asarray(store[name + suffix])
                    for suffix in ("", _LENGTHS)
                    if name + suffix in store
                }
                values = _from_arrays(arrays, component)
                self._check_values(variable, values)
                component.assign(values)
            elif name.endswith("_0"):
                # A file may be of fewer replicas, and not of fewer variables.
                raise ValueError(
                    f"The file is damaged: it lacks a part of the state of the layer {self.name!r}."
                )

    def _limits(self) -> Iterator[tuple[str, StateVariable, float, float]]:
        """Names, state variables, and the least and largest values that they may have.

        Files are input: what is a place or a number of rows must be one.
        """
        return iter(())

    def _check_values(self, variable: StateVariable, values: Any) -> None:
        """Refuses what a file has for a state variable, if it is out of its limits."""
        for name, limited, least, largest in self._limits():
            if limited is not variable:
                continue
            values = np.asarray(values)
            values = values if values.dtype.kind in "iu" else values.astype(np.float64)
            is_wrong = ~((values >= least) & (values <= largest))
            if np.any(is_wrong):
                raise ValueError(
                    f"The file is damaged: {name} of the layer {self.name!r} must lie between"
                    f" {least} and {largest}. Received: {values[is_wrong].reshape(-1)[0]}."
                )

    def _check_description(self, received: str) -> None:
        if received == self._description:
            return
        message = (
            f"The state in the file does not fit the layer {self.name!r}. Received: {received}."
            f" Wanted: {self._description}."
        )
        if LAYOUT.keys() & json.loads(self._description).keys() - json.loads(received).keys():
            message += (
                " The file was written by an earlier version of negative_cache, which kept this"
                " state in other dtypes: load it there, or train and fill the layer again."
            )
        raise ValueError(message)


class _Description(tf.train.experimental.PythonState):
    """Makes a TensorFlow checkpoint that does not fit an error when it is restored."""

    def __init__(self, layer: StateLayer):
        self._layer = layer

    def serialize(self) -> str:
        return self._layer._description

    def deserialize(self, string_value: bytes) -> None:
        self._layer._check_description(string_value.decode())


def _to_arrays(variable: StateVariable) -> dict[str, np.ndarray]:
    """Suffix of a name -> an array that HDF5 can hold."""
    value = variable.numpy()
    if variable.dtype == tf.bfloat16:
        return {"": value.view(np.uint16)}
    if variable.dtype == tf.string:
        flat = value.ravel().tolist()
        lengths = np.array([len(text) for text in flat], np.int64)
        return {"": _to_bytes(b"".join(flat)), _LENGTHS: lengths}
    return {"": value}


def _from_arrays(arrays: Mapping[str, np.ndarray], like: StateVariable) -> np.ndarray | tf.Tensor:
    """The inverse of `_to_arrays`."""
    value = arrays[""]
    if like.dtype == tf.bfloat16:
        return value.view(tf.bfloat16.as_numpy_dtype)
    if like.dtype == tf.string:
        blob, ends = value.tobytes(), np.cumsum(arrays[_LENGTHS])
        texts = [blob[end - size : end] for end, size in zip(ends, arrays[_LENGTHS])]
        return tf.reshape(tf.constant(texts, tf.string), like.shape)
    return value


def _to_bytes(value: bytes) -> np.ndarray:
    return np.frombuffer(value, np.uint8)
