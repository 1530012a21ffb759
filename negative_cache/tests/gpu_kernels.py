"""What TensorFlow could run on a GPU, read from its kernel registry, which needs none.

A graph that is traced on a CPU while `_execution.device_type` says "GPU" is the graph that a GPU
would be given. Of each of its operations the registry tells whether there is a kernel for its types
where it is run: in XLA, in what is compiled, and on a GPU otherwise.
"""

import functools
from typing import NamedTuple

import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.python.framework import kernels

# They have no kernel, because they do nothing when a step runs.
_NO_KERNELS = {"NoOp", "Placeholder", "_Arg", "_Retval", "VarHandleOp"}
_CONTROL_FLOW = {"If", "StatelessIf", "While", "StatelessWhile", "Case", "StatelessCase"}


class Report(NamedTuple):
    """What is in the way of a graph on a GPU.

    Attributes:
      without_kernel: descriptions of operations that have no kernel there.
      host_variables: names of variables that TensorFlow keeps in host memory.
      control_flow: operations, outside of XLA, for which the host waits for the GPU.
      compiled: how many functions of the graph XLA compiles.
    """

    without_kernel: list[str]
    host_variables: list[str]
    control_flow: list[str]
    compiled: int


def examine(function: tf.types.experimental.ConcreteFunction, compiled: bool = False) -> Report:
    """Examines a traced function; `compiled`, as it would be with `jit_compile=True`."""
    definition = function.graph.as_graph_def()
    library = {part.signature.name: part for part in definition.library.function}
    report = Report([], [], [], 0)
    num_compiled = 0
    seen = set()
    waiting = [("", definition.node, compiled)]
    while waiting:
        name, nodes, in_xla = waiting.pop()
        for node in nodes:
            called = _called(node)
            starts = bool(called) and not in_xla and _must_compile(node, library)
            num_compiled += starts
            if node.op in _CONTROL_FLOW and not in_xla:
                report.control_flow.append(f"{node.op} {name}/{node.name}")
            if not called and not _has_kernel(node, in_xla):
                report.without_kernel.append(_describe(node, in_xla))
            for part in called:
                key = (part, in_xla or starts)
                if key not in seen:
                    seen.add(key)
                    waiting.append((part, library[part].node_def, in_xla or starts))
    for variable in function.graph.variables:
        if variable.dtype in (tf.int32, tf.string):
            report.host_variables.append(f"{variable.name} ({variable.dtype.name})")
    return report._replace(compiled=num_compiled)


def _called(node) -> list[str]:
    """Names of the functions that an operation calls."""
    names = [attr.func.name for attr in node.attr.values() if attr.func.name]
    return names + [part.name for attr in node.attr.values() for part in attr.list.func]


def _must_compile(node, library) -> bool:
    key = "_XlaMustCompile"
    return node.attr[key].b or any(library[name].attr[key].b for name in _called(node))


def _has_kernel(node, in_xla: bool) -> bool:
    if node.op in _NO_KERNELS:
        return True
    if node.op == "Const" and node.attr["dtype"].type == types_pb2.DT_STRING:
        # The message of an assertion, which the host has.
        return True
    known = _xla_kernels().get(node.op, []) if in_xla else _gpu_kernels(node.op)
    return any(_fits(node, kernel) for kernel in known)


def _fits(node, kernel) -> bool:
    for constraint in kernel.constraint:
        attr = node.attr[constraint.name]
        types = list(attr.list.type) or [attr.type]
        if not set(types) <= {*constraint.allowed_values.list.type, types_pb2.DT_INVALID}:
            return False
    return True


@functools.cache
def _gpu_kernels(op: str) -> list:
    found = kernels.get_registered_kernels_for_op(op).kernel
    return [kernel for kernel in found if kernel.device_type in ("GPU", "DEFAULT")]


@functools.cache
def _xla_kernels() -> dict:
    # They are registered as XLA is first used.
    tf.function(lambda: tf.constant(1), jit_compile=True)()
    by_op = {}
    for kernel in kernels.get_all_registered_kernels().kernel:
        if kernel.device_type == "XLA_GPU_JIT":
            by_op.setdefault(kernel.op, []).append(kernel)
    return by_op


def _describe(node, in_xla: bool) -> str:
    types = {
        name: tf.as_dtype(attr.type).name for name, attr in sorted(node.attr.items()) if attr.type
    }
    return f"{node.op} {types} {'in XLA' if in_xla else 'on a GPU'}: {node.name}"
