"""Where operations run, and whether XLA compiles them: known when a function is traced."""

from collections.abc import Callable

import tensorflow as tf
from tensorflow.python.eager import record


def device_type(like=None) -> str:
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


def is_on_accelerator(like=None) -> bool:
    """Whether `device_type` is not the CPU."""
    return device_type(like) != "CPU"


def is_in_xla() -> bool:
    """Whether XLA compiles what is traced now."""
    return tf.__internal__.get_enclosing_xla_context() is not None


def as_constant(function: Callable, *args, like=None, may_compile=True):
    """`compiled`, and of what happens inside no gradient tape keeps anything.

    It all is a constant to every tape. A `tf.stop_gradient` of the result would not do: the tape
    would keep the function's inner values until it is asked for the gradient.

    Args:
      function: takes `args`, tensors or nests of them, and returns such a nest.
      *args: as said.
      like: a variable that is where the function is to run, as for `device_type`.
      may_compile: whether XLA can compile it: shapes that it makes follow from those of `args`.
    """
    if tf.executing_eagerly():
        return function(*args)
    is_compiled = may_compile and is_on_accelerator(like) and not is_in_xla()
    traced = _trace(function, args, is_compiled).get_concrete_function()
    with record.stop_recording():
        return traced()


def compiled(function: Callable, *args, like=None):
    """`function(*args)`, compiled by XLA where it is traced for an accelerator.

    That is whether or not XLA compiles what is around it: one more operation is little there next
    to launching its kernel, and XLA makes few kernels of many. Outside of graphs the function is
    called as it is: there is nowhere to keep what was compiled. Arguments are as of `as_constant`.
    """
    if tf.executing_eagerly() or is_in_xla() or not is_on_accelerator(like):
        return function(*args)
    return _trace(function, args, True)()


def _trace(function, args, is_compiled):
    return tf.function(lambda: function(*args), autograph=False, jit_compile=is_compiled or None)
