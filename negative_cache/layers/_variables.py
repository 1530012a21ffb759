"""State variables: what every replica holds for itself, where a training step can reach it.

TensorFlow keeps int32 variables in host memory, where a step that XLA compiles for an accelerator
cannot reach them, and every other one pays a transfer for each access. So no state variable is
int32: `Int32Variable` keeps the same bits as uint32, for which everything that is done to a
variable has a kernel on every device. Strings exist in host memory only.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf
from tensorflow.python.distribute import distribute_utils
from tensorflow.python.ops import resource_variable_ops

# Dtypes of variables that an accelerator can hold, with all that a cache does to them.
_ON_ACCELERATORS = (
    tf.float16,
    tf.bfloat16,
    tf.float32,
    tf.float64,
    tf.bool,
    tf.int8,
    tf.int16,
    tf.int32,
    tf.int64,
    tf.uint8,
    tf.uint16,
    tf.uint32,
    tf.uint64,
)

_WITHOUT_REPLICAS = (
    tf.distribute.ParameterServerStrategy,
    tf.compat.v1.distribute.experimental.ParameterServerStrategy,
)


def is_on_host(dtype: tf.DType) -> bool:
    """Whether what has a dtype is in host memory, or out of XLA's reach, wherever a step runs."""
    return tf.as_dtype(dtype) not in _ON_ACCELERATORS


class Int32Variable:
    """An int32 variable, kept as uint32 of the same bits.

    `tf.gather`, `tf.gather_nd` and `tf.convert_to_tensor` read int32 out of it. Gathers read the
    rows they return and nothing else.

    Args:
      variable: uint32 variable that holds the bits.
    """

    dtype = tf.int32

    def __init__(self, variable: tf.Variable):
        self.variable = variable

    @property
    def shape(self) -> tf.TensorShape:
        """That of the variable."""
        return self.variable.shape

    @property
    def name(self) -> str:
        """That of the variable."""
        return self.variable.name

    @property
    def device(self) -> str:
        """That of the variable."""
        return self.variable.device

    def assign(self, value: Any) -> None:
        """Assigns int32 values of the whole shape."""
        self.variable.assign(_to_bits(tf.convert_to_tensor(value, tf.int32)))

    def assign_add(self, value: Any) -> None:
        """Adds int32 values. Of two's complement numbers the bits add up to those of the sum."""
        self.variable.assign_add(_to_bits(tf.convert_to_tensor(value, tf.int32)))

    def assign_sub(self, value: Any) -> None:
        """Subtracts int32 values."""
        self.variable.assign_sub(_to_bits(tf.convert_to_tensor(value, tf.int32)))

    def read_value(self) -> tf.Tensor:
        """The whole value, int32."""
        return _from_bits(self.variable)

    def numpy(self) -> np.ndarray:
        """The whole value as an array; outside of a `tf.function`."""
        return self.read_value().numpy()

    def sparse_read(self, indices: tf.Tensor, name: str | None = None) -> tf.Tensor:
        """What `tf.gather` along the first axis calls, as it does on a `tf.Variable`."""
        return _from_bits(tf.gather(self.variable, indices, name=name))

    def gather_nd(self, indices: tf.Tensor, name: str | None = None) -> tf.Tensor:
        """What `tf.gather_nd` calls, as it does on a `tf.Variable`."""
        return _from_bits(tf.gather_nd(self.variable, indices, name=name))

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> tf.Tensor:
        return tf.convert_to_tensor(self.read_value(), dtype, name=name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def value(self) -> tf.Tensor:
        """`read_value`."""
        return self.read_value()

    def __int__(self) -> int:
        return int(self.read_value())

    def __len__(self) -> int:
        if not self.shape.rank:
            raise TypeError("A scalar has no length.")
        return self.shape[0]

    def __iter__(self) -> Iterator[tf.Tensor]:
        return iter(self.read_value())

    def __getitem__(self, key: Any) -> tf.Tensor:
        return self.read_value()[key]

    def __repr__(self) -> str:
        return f"<Int32Variable {self.name!r} shape={self.shape}>"


StateVariable: TypeAlias = tf.Variable | Int32Variable


def make_state_variable(
    initial_value: Callable[[], tf.Tensor], name: str, *, on_host: bool = False
) -> StateVariable:
    """Makes a non-trainable variable with an independent value on every replica.

    Every worker of a `MultiWorkerMirroredStrategy` makes the variables of its own replicas, and
    calls its own `initial_value` for them.

    Args:
      initial_value: returns it. Int32 makes an `Int32Variable`.
      name: of the variable.
      on_host: whether the variable stays in host memory where the replica computes on an
        accelerator. Steps then cannot be compiled as a whole, and move the rows they use.

    Raises:
      ValueError: within the scope of a `ParameterServerStrategy`.
    """
    strategy = tf.distribute.get_strategy()
    if isinstance(strategy, _WITHOUT_REPLICAS):
        raise ValueError(
            "A cache, a source of negatives or an index keeps its state on every replica, and a"
            " `tf.distribute.ParameterServerStrategy` has no place for it. Use a"
            " `MirroredStrategy`, or a `MultiWorkerMirroredStrategy`. Received a state variable"
            f" {name!r} in the scope of a `{type(strategy).__name__}`."
        )
    has_workers = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    dtypes = set()

    def initial_bits() -> tf.Tensor:
        value = tf.convert_to_tensor(initial_value())
        dtypes.add(value.dtype)
        return _to_bits(value) if value.dtype == tf.int32 else value

    with tf.init_scope(), tf.device("CPU:0") if on_host else contextlib.nullcontext():
        make = functools.partial(_make_on_worker, strategy) if has_workers else tf.Variable
        variable = make(
            initial_value=initial_bits,
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            name=name,
        )
    return Int32Variable(variable) if dtypes == {tf.int32} else variable


def scatter_rows(variable: StateVariable, rows: tf.Tensor, values: tf.Tensor) -> None:
    """Writes `values` [n, ...] into `rows` [n] of `variable` [C, ...] in place.

    Unlike `Variable.scatter_nd_update` it takes every dtype, and works inside a replica context.
    """
    variable, values = _as_kept(variable, values)
    if variable.dtype == tf.bool:
        # The kernel that accelerators have.
        rows = tf.cast(rows, tf.int32)
    tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=rows, updates=values)


def scatter_nodes(variable: StateVariable, indices: tf.Tensor, values: tf.Tensor) -> None:
    """Writes `values` [n, ...] at `indices` [n, k] of the first k axes of `variable` in place."""
    variable, values = _as_kept(variable, values)
    tf.raw_ops.ResourceScatterNdUpdate(ref=variable.handle, indices=indices, updates=values)


def local_replicas(strategy: tf.distribute.Strategy) -> range:
    """The numbers of this process's replicas, among those of all workers."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return range(strategy.num_replicas_in_sync)
    numbers = strategy.experimental_local_results(
        strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(context.replica_id_in_sync_group)
        )
    )
    return range(int(numbers[0]), int(numbers[0]) + len(numbers))


def kept_variable(variable: StateVariable) -> tf.Variable:
    """The variable that holds a state variable's bits, for files."""
    return variable.variable if isinstance(variable, Int32Variable) else variable


def when_restored(variable: StateVariable, take: Callable[[tf.Tensor], bool]) -> None:
    """Lets `take` see what a TensorFlow checkpoint has for a variable, before it is written.

    TensorFlow calls this method of the variable wherever it restores it, also when a layer is made
    after `Checkpoint.restore`. Within a graph the values are unknown.

    Args:
      variable: the variable of one replica.
      take: takes the values from the checkpoint, as a file has them. Returns whether they are to be
        written, or raises an error to refuse them.
    """
    kept = kept_variable(variable)
    restore = kept._restore_from_tensors

    def take_or_restore(restored_tensors: Mapping[str, tf.Tensor]) -> Any:
        is_to_be_written = [take(values) for values in restored_tensors.values()]
        return restore(restored_tensors) if all(is_to_be_written) else None

    kept._restore_from_tensors = take_or_restore


def values_in_file(variable: StateVariable, kept_values: tf.Tensor) -> tf.Tensor:
    """The values of a state variable, given those of its `kept_variable`."""
    return _from_bits(kept_values) if isinstance(variable, Int32Variable) else kept_values


def by_replica(variable: StateVariable) -> Sequence[StateVariable]:
    """The variables of the single replicas."""
    kept = kept_variable(variable)
    if not isinstance(kept, tf.distribute.DistributedValues):
        return (variable,)
    parts = kept.distribute_strategy.experimental_local_results(kept)
    return tuple(Int32Variable(part) for part in parts) if kept is not variable else parts


def _make_on_worker(strategy: tf.distribute.Strategy, **kwargs: Any) -> tf.Variable:
    """Makes what `tf.Variable(**kwargs)` makes under a strategy of several workers, on this one.

    `tf.Variable` would broadcast the chief's initial value. TensorFlow broadcasts bool, int32,
    int64 and floats of 16 (not bfloat16), 32 and 64 bits, and so could make no other variable.
    """

    def make_parts(
        initial_value: Callable[[], tf.Tensor], name: str, **kwargs: Any
    ) -> list[tf.Variable]:
        parts: list[tf.Variable] = []
        for replica, device in enumerate(strategy.extended.worker_devices):
            with tf.device(device):
                # The class itself: `tf.Variable` would ask the strategy.
                part = resource_variable_ops.ResourceVariable(
                    initial_value=parts[0].read_value() if parts else initial_value,
                    # A name that ends in "/" is used as it is.
                    name=f"{parts[0].name.split(':')[0]}/replica_{replica}/" if parts else name,
                    distribute_strategy=strategy,
                    **kwargs,
                )
            parts.append(part)
        return parts

    return distribute_utils.create_mirrored_variable(
        strategy,
        make_parts,
        distribute_utils.VARIABLE_CLASS_MAPPING,
        distribute_utils.VARIABLE_POLICY_MAPPING,
        **kwargs,
    )


def _as_kept(variable: StateVariable, values: tf.Tensor) -> tuple[tf.Variable, tf.Tensor]:
    if isinstance(variable, Int32Variable):
        return variable.variable, _to_bits(values)
    return variable, values


def _to_bits(values: tf.Tensor) -> tf.Tensor:
    return tf.bitcast(values, tf.uint32)


def _from_bits(bits: tf.Tensor | tf.Variable) -> tf.Tensor:
    return tf.bitcast(tf.convert_to_tensor(bits), tf.int32)
