"""On which device operations run, and whether XLA compiles them, as known during tracing."""

import contextlib
import os
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import tensorflow as tf
from tensorflow.python.eager import record

# Set to "0" for a device without XLA, or if XLA cannot compile a function that the user passes in.
_SWITCH = "NEGATIVE_CACHE_XLA"
# The largest relative error of TF32 when it rounds a factor of a product.
FACTOR_ROUNDING = 2.0**-11


Result = TypeVar("Result")


class Placed(Protocol):
    """A variable, or an object used like one."""

    @property
    def device(self) -> str:
        """The name of its device, or "" if none was given."""


def device_type(like: Placed | None = None) -> str:
    """The type of the device that runs operations called or traced now: "CPU", "GPU" or "TPU".

    If `like` is given, it is the device of that variable. Otherwise it is that of the surrounding
    `tf.device`, or else TensorFlow's default, which is an accelerator if there is one.
    """
    device = "" if like is None else like.device
    if not device:
        device = tf.zeros([]).device if tf.executing_eagerly() else tf.no_op().device
    found = tf.DeviceSpec.from_string(device or "").device_type
    if found is not None:
        return found
    accelerators = tf.config.list_logical_devices("TPU") or tf.config.list_logical_devices("GPU")
    return accelerators[0].device_type if accelerators else "CPU"


def is_on_accelerator(like: Placed | None = None) -> bool:
    """Whether `device_type` is not the CPU."""
    return device_type(like) != "CPU"


def is_in_xla() -> bool:
    """Whether XLA compiles the operations that are traced now."""
    return tf.__internal__.get_enclosing_xla_context() is not None


def is_to_be_compiled(like: Placed | None = None) -> bool:
    """Whether a function that is traced now should be compiled by XLA on its own.

    That is so on an accelerator, unless the surrounding function is compiled already or the
    environment variable `NEGATIVE_CACHE_XLA` is "0". There, the launch of a kernel takes longer
    than most operations, and XLA fuses many operations into few kernels.
    """
    is_wanted = os.environ.get(_SWITCH, "1") != "0"
    return is_wanted and is_on_accelerator(like) and not is_in_xla()


def rounds_factors(like: Placed | None = None) -> bool:
    """Whether float32 products use TF32, which rounds each factor by up to `FACTOR_ROUNDING`."""
    is_enabled = tf.config.experimental.tensor_float_32_execution_enabled()
    return is_enabled and is_on_accelerator(like)


def as_constant(
    function: Callable[..., Result],
    *args: Any,
    like: Placed | None = None,
    may_compile: bool = True,
) -> Result:
    """Calls `function(*args)` in a graph so that no gradient tape records its operations.

    A `tf.stop_gradient` of the result is not enough: tapes would keep the function's intermediate
    values until the gradient is computed. On an accelerator XLA compiles the function, also if the
    code around it is not compiled. In eager execution the function is called directly.

    Args:
      function: maps `args` to a tensor or a nest of tensors.
      *args: tensors or nests of tensors.
      like: a variable on the device that the function should run on.
      may_compile: whether XLA can compile the function: all shapes inside must follow from those of
        `args`.

    Returns:
      The result of the function.
    """
    if tf.executing_eagerly():
        return function(*args)
    traced = _trace(function, args, may_compile and is_to_be_compiled(like))
    with _device_of(like):
        traced = traced.get_concrete_function()
        with record.stop_recording():
            return traced()


def compiled(function: Callable[..., Result], *args: Any, like: Placed | None = None) -> Result:
    """`function(*args)`, compiled by XLA if `is_to_be_compiled(like)`; gradients flow through it.

    In eager execution the function is called directly, because the compiled program could not be
    kept for the next call. The arguments are those of `as_constant`.
    """
    if tf.executing_eagerly() or not is_to_be_compiled(like):
        return function(*args)
    with _device_of(like):
        return _trace(function, args, True)()


def _trace(function: Callable, args: tuple, is_compiled: bool) -> Any:
    return tf.function(lambda: function(*args), autograph=False, jit_compile=is_compiled or None)


def _device_of(like: Placed | None) -> contextlib.AbstractContextManager:
    """The scope of the device of `like`: XLA can only access variables on the device it runs on."""
    if like is None or not like.device:
        return contextlib.nullcontext()
    return tf.device(like.device)
