"""Where operations run, and whether XLA compiles them: known when a function is traced."""

import contextlib
import os
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import tensorflow as tf
from tensorflow.python.eager import record

# A device without XLA, or a function of the user's that XLA cannot compile, is no reason to do
# without an accelerator.
_SWITCH = "NEGATIVE_CACHE_XLA"
# TF32 rounds the factors of a product by at most this part of them.
FACTOR_ROUNDING = 2.0**-11


Result = TypeVar("Result")


class Placed(Protocol):
    """A variable, or what stands for one."""

    @property
    def device(self) -> str:
        """Where it is, "" if nobody has said."""


def device_type(like: Placed | None = None) -> str:
    """Where operations run that are called or traced now: on a CPU, a GPU or a TPU.

    That is where the variable `like` is. Without one it is the device of the surrounding
    `tf.device`, or else what TensorFlow prefers to a CPU, where there is such a thing.
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
    """Whether XLA compiles what is traced now."""
    return tf.__internal__.get_enclosing_xla_context() is not None


def is_to_be_compiled(like: Placed | None = None) -> bool:
    """Whether a function that is traced now should be compiled, which nobody else does.

    One more operation is little to an accelerator next to launching its kernel, and XLA makes few
    kernels of many.
    """
    is_wanted = os.environ.get(_SWITCH, "1") != "0"
    return is_wanted and is_on_accelerator(like) and not is_in_xla()


def rounds_factors(like: Placed | None = None) -> bool:
    """Whether float32 products are those of TF32, by `FACTOR_ROUNDING` off in each factor."""
    is_enabled = tf.config.experimental.tensor_float_32_execution_enabled()
    return is_enabled and is_on_accelerator(like)


def as_constant(
    function: Callable[..., Result],
    *args: Any,
    like: Placed | None = None,
    may_compile: bool = True,
) -> Result:
    """Calls `function(*args)` in a graph so that no gradient tape records what happens inside.

    A `tf.stop_gradient` of the result would not do: tapes would keep the function's inner values
    until they are asked for the gradient. On an accelerator XLA compiles the function, whether or
    not it compiles what is around it. In eager execution the function is called as it is.

    Args:
      function: takes `args`, tensors or nests of them, and returns such a nest.
      *args: as said.
      like: a variable that is where the function is to run.
      may_compile: whether XLA can compile it: shapes that it makes follow from those of `args`.
    """
    if tf.executing_eagerly():
        return function(*args)
    traced = _trace(function, args, may_compile and is_to_be_compiled(like))
    with _device_of(like):
        traced = traced.get_concrete_function()
        with record.stop_recording():
            return traced()


def compiled(function: Callable[..., Result], *args: Any, like: Placed | None = None) -> Result:
    """`function(*args)`, with its gradient, compiled by XLA where `is_to_be_compiled`.

    In eager execution it is called as it is: there is nowhere to keep what was compiled. Arguments
    are those of `as_constant`.
    """
    if tf.executing_eagerly() or not is_to_be_compiled(like):
        return function(*args)
    with _device_of(like):
        return _trace(function, args, True)()


def _trace(function: Callable, args: tuple, is_compiled: bool) -> Any:
    return tf.function(lambda: function(*args), autograph=False, jit_compile=is_compiled or None)


def _device_of(like: Placed | None) -> contextlib.AbstractContextManager:
    """Runs a function where its variables are: XLA reaches no others."""
    if like is None or not like.device:
        return contextlib.nullcontext()
    return tf.device(like.device)
