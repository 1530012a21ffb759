"""Layers with state that every replica of a `tf.distribute` strategy holds for itself.

It lives in raw variables (`_variables`): the `add_weight` of Keras can make neither per-replica
variables nor, where they must be saved, strings. `StateLayer` puts them into files of every format.
"""

import contextlib
import functools
import json
import operator
import random
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from negative_cache import _compat, _validation
from negative_cache._compat import keras
from negative_cache.layers._arrays import LENGTHS, from_arrays, to_arrays, to_bytes
from negative_cache.layers._dividing import Law, Origin, Replicas, State, copies
from negative_cache.layers._variables import (
    StateVariable,
    by_replica,
    kept_variable,
    values_in_file,
    when_restored,
)

_DESCRIPTION = "description"
# What the description in a file says besides that of the layer: on how many replicas it was made,
# and of how many of them the file has the state.
_NUM_REPLICAS, _NUM_IN_FILE = "num_replicas", "replicas_in_file"
# In the descriptions of layers whose variables once had other dtypes, which files may still have.
LAYOUT = {"layout": 2}


def on_every_replica(function: Callable[..., None], *args: Any) -> None:
    """Runs `function(*args)` here or, where called outside of the replicas, on each of them."""
    if tf.distribute.in_cross_replica_context():
        tf.distribute.get_strategy().run(function, args)
    else:
        function(*args)


def on_every_replica_of(
    strategy: tf.distribute.Strategy, function: Callable[..., None], *args: Any
) -> None:
    """`on_every_replica` of `strategy`, also where it is called outside of its scope."""
    is_outside = strategy.num_replicas_in_sync > 1 and not tf.distribute.has_strategy()
    with strategy.scope() if is_outside else contextlib.nullcontext():
        on_every_replica(function, *args)


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

    What a file holds are the values of all replicas, and how many these are. On another number of
    replicas a layer makes its state out of all of theirs (`_divided`), or refuses the file.

    It is a layer even if it computes nothing from inputs, as a cache does: in an attribute of a
    model, Keras looks for layers and lets no other object write state of its own into its files.
    Such a layer is used by its methods. It has no `call`, and to call it is an error.

    Attributes:
      num_replicas: for how many replicas the state was made.
    """

    # For files of other replicas: field -> what makes the values of R' replicas of those of R. A
    # subclass without laws overrides `_divided`, or refuses such files.
    _laws: Mapping[str, Law] = {}
    # Set by a cache whose rows the state is about: "copied" with them, or "remade" from them.
    row_law: str | None = None

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

    def _hold_state(
        self,
        *,
        description: Mapping,
        saved: bool = True,
        divisible: Sequence[str] = (),
        **fields: Any,
    ) -> None:
        """Makes `self._state`, to be called once.

        Args:
          description: what a file must agree with to be loaded: JSON values.
          saved: whether files hold the state.
          divisible: names in the description that may differ in a file of another number of
            replicas.
          **fields: the attributes of `self._state`, each a state variable or a dictionary of them.
        """
        self._description = json.dumps(description, sort_keys=True)
        self._divisible = frozenset(divisible)
        self._is_saved = saved
        self._refusal: str | None = None
        self.num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
        # A namespace is nothing that Keras or TensorFlow track by themselves.
        self._state = types.SimpleNamespace(**fields)
        holder = tf.__internal__.tracking.AutoTrackable()
        holder.description = _Description(self)
        flat = tf.nest.flatten(fields)
        # A variable of all replicas would be saved with the value of the first only.
        parts = list(zip(*([kept_variable(part) for part in by_replica(one)] for one in flat)))
        self._num_here = len(parts)
        holder.replicas = Replicas(
            [tf.nest.pack_sequence_as(fields, part) for part in parts], self._take_restored
        )
        for number, variable in enumerate(flat):
            for replica, component in enumerate(by_replica(variable)):
                take = functools.partial(self._take_restored, number, replica)
                when_restored(component, take)
        # The origin of a checkpoint that is being restored, and what has come of its values so far.
        self._untracked = types.SimpleNamespace(state=holder, origin=None, is_to_go_on=False)
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
        store[_DESCRIPTION] = to_bytes(self._description_in_file().encode())
        for name, _, component in self._saved_variables():
            for suffix, array in to_arrays(component).items():
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
            num_in_file = 0
            while f"0_{num_in_file}" in store:
                num_in_file += 1
            received = np.asarray(store[_DESCRIPTION]).tobytes().decode()
            self._load_variables(store, self._origin_of(received, num_in_file))
        except ValueError as error:
            self._refusal = str(error)
            raise

    def _load_variables(self, store: Any, origin: Origin | None) -> None:
        """Loads the state of the same replicas, or of others if there is an `origin`."""
        if origin is not None:
            flat = tf.nest.flatten(origin.fields)
            self._take_divided(
                origin,
                (
                    [self._read(store, f"{i}_{j}", like) for i, like in enumerate(flat)]
                    for j in range(origin.num_replicas)
                ),
            )
            return
        for i, variable in enumerate(tf.nest.flatten(vars(self._state))):
            for j, component in enumerate(by_replica(variable)):
                values = self._read(store, f"{i}_{j}", variable)
                self._check_values(variable, values)
                component.assign(values)

    def _read(self, store: Any, name: str, variable: StateVariable) -> np.ndarray | tf.Tensor:
        suffixes = ("", LENGTHS) if variable.dtype == tf.string else ("",)
        if any(name + suffix not in store for suffix in suffixes):
            raise ValueError(
                f"The file is damaged: it lacks a part of the state of the layer {self.name!r}."
            )
        arrays = {suffix: np.asarray(store[name + suffix]) for suffix in suffixes}
        return from_arrays(arrays, variable)

    def _fields_in_file(self, description: Mapping) -> Mapping:
        """The fields of the state in a file with a description of other sizes.

        They are the variables, or stand-ins with dtype and shape for variables that are not here.
        """
        del description
        return vars(self._state)

    def _divided(self, states: list[State], num_replicas: int) -> list[State] | None:
        """The states of R' replicas, out of those of R others in a file.

        Args:
          states: of each of the R replicas: field -> NumPy array, or a dictionary of them.
          num_replicas: R'.

        Returns:
          The states of the R', or None to keep what the layer has.

        Raises:
          ValueError: if that cannot be.
        """
        if self.row_law is not None:
            return copies(states, num_replicas) if self.row_law == "copied" else None
        if self._laws.keys() != vars(self._state).keys():
            raise ValueError(
                f"The state of a `{type(self).__name__}` cannot be divided: load the file on as"
                f" many replicas as it was made on. Received the state of {len(states)} replicas"
                f" for {self.name!r}. Wanted: of {num_replicas}."
            )
        fields = {
            field: law([state[field] for state in states], num_replicas)
            for field, law in self._laws.items()
        }
        return [{key: values[i] for key, values in fields.items()} for i in range(num_replicas)]

    def _take_divided(self, origin: Origin, values: Iterable[list[Any]]) -> None:
        """Takes what `_divided` makes of the `values` of other replicas, flat lists of fields."""
        flat = tf.nest.flatten(vars(self._state))
        states = [
            tf.nest.pack_sequence_as(origin.fields, [np.asarray(value) for value in part])
            for part in values
        ]
        try:
            divided = self._divided(states, self.num_replicas)
        except IndexError as error:
            raise ValueError(
                f"The file is damaged: parts of the state of the layer {self.name!r} have other"
                f" sizes than belong together. {error}"
            ) from error
        if divided is None:
            return
        parts = [tf.nest.flatten(state) for state in divided]
        for i, variable in enumerate(flat):
            for part in parts:
                self._check_values(variable, part[i])
        for i, variable in enumerate(flat):
            for part, component in zip(parts, by_replica(variable)):
                component.assign(part[i])
        self._is_divided()

    def _is_divided(self) -> None:
        """Is called when the state has been taken from other replicas."""

    def _take_restored(self, number: int, replica: int, kept_values: tf.Tensor) -> bool:
        """Looks at what a checkpoint has for a variable; whether it is to be written."""
        origin = self._untracked.origin
        if not tf.executing_eagerly():
            if origin is not None:
                raise ValueError(
                    f"The layer {self.name!r} cannot be restored on another number of replicas"
                    f" within a graph. Received the state of {origin.num_replicas} replicas."
                    f" Wanted: of {self.num_replicas}."
                )
            return True
        flat = tf.nest.flatten(vars(self._state))
        values = values_in_file(flat[number], kept_values)
        if origin is None:
            self._check_values(flat[number], values)
            return True
        gathered = self._untracked.gathered
        gathered[replica, number] = values.numpy()
        numbers = {id(variable): i for i, variable in enumerate(flat)}
        # The fields of the file that are here too; None for others.
        fields = [numbers.get(id(like)) for like in tf.nest.flatten(origin.fields)]
        if len(gathered) == origin.num_replicas * sum(i is not None for i in fields):
            self._untracked.origin, self._untracked.gathered = None, {}
            self._take_divided(
                origin,
                ([gathered.get((j, i)) for i in fields] for j in range(origin.num_replicas)),
            )
        return False

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

    def _description_in_file(self) -> str:
        replicas = {_NUM_REPLICAS: self.num_replicas, _NUM_IN_FILE: self._num_here}
        return json.dumps({**json.loads(self._description), **replicas}, sort_keys=True)

    def _origin_of(self, received: str, num_in_file: int | None = None) -> Origin | None:
        """Checks the description in a file.

        Args:
          received: the description.
          num_in_file: of how many replicas the file has the state; None if only the description
            says that.

        Returns:
          Where the file was made, or None if that was on as many replicas as here.

        Raises:
          ValueError: if the file does not fit the layer.
        """
        theirs, ours = json.loads(received), json.loads(self._description)
        made_on = theirs.pop(_NUM_REPLICAS, None)
        num_in_file = theirs.pop(_NUM_IN_FILE, num_in_file)
        if made_on is None:
            # Earlier versions said it of a divided corpus only.
            is_as_here = num_in_file in (None, self._num_here)
            made_on = theirs.get("num_shards", self.num_replicas if is_as_here else num_in_file)
        if num_in_file is None:
            num_in_file = self._num_here if made_on == self.num_replicas else made_on
        for count in (made_on, num_in_file):
            _validation.check_count(count, "the number of replicas in the file")
        is_as_here = (made_on, num_in_file) == (self.num_replicas, self._num_here)
        if not is_as_here:
            theirs.update((name, ours[name]) for name in self._divisible & theirs.keys())
        self._check_description(received, theirs, ours)
        if is_as_here:
            return None
        here = f"{self._num_here} of {self.num_replicas}"
        wanted = f"Received the state of {num_in_file} of {made_on} replicas. Wanted: of {here}."
        if self._untracked.is_to_go_on:
            raise ValueError(
                "A training goes on from a backup on as many replicas as before, with the same"
                f" bits. {wanted} To go on with others, save a file of another kind."
            )
        if made_on != num_in_file or self.num_replicas != self._num_here:
            raise ValueError(
                f"The layer {self.name!r} is one of several workers, here or in the file. Their"
                " files hold their own replicas only, and are loaded by as many workers, with as"
                f" many replicas each. {wanted}"
            )
        return Origin(made_on, self._fields_in_file(json.loads(received)))

    def _expect_restored(self, received: str) -> None:
        """Is called with the description in a checkpoint, before the values are restored."""
        self._untracked.origin = self._origin_of(received)
        self._untracked.gathered = {}

    def _check_description(self, received: str, theirs: Mapping, ours: Mapping) -> None:
        if theirs == ours:
            return
        message = (
            f"The state in the file does not fit the layer {self.name!r}. Received: {received}."
            f" Wanted: {self._description}."
        )
        if LAYOUT.keys() & ours.keys() - theirs.keys():
            message += (
                " The file was written by an earlier version of negative_cache, which kept this"
                " state in other dtypes: load it there, or train and fill the layer again."
            )
        raise ValueError(message)


@contextlib.contextmanager
def on_the_same_replicas(layers: Iterable[StateLayer]) -> Iterator[None]:
    """Lets `layers` refuse, within the context, a checkpoint of another number of replicas."""
    untracked = [layer._untracked for layer in layers]
    for each in untracked:
        each.is_to_go_on = True
    try:
        yield
    finally:
        for each in untracked:
            each.is_to_go_on = False


class _Description(tf.train.experimental.PythonState):
    """Makes a TensorFlow checkpoint that does not fit an error when it is restored."""

    def __init__(self, layer: StateLayer):
        self._layer = layer

    def serialize(self) -> str:
        return self._layer._description_in_file()

    def deserialize(self, string_value: bytes) -> None:
        self._layer._expect_restored(string_value.decode())
