"""What TensorFlow could run on a GPU, read from its kernel registry, which needs none.

A graph that is traced on a CPU while `_execution.device_type` says "GPU" is the graph that a GPU
would be given. Of each of its operations the registry tells whether there is a kernel for its types
where it is run: in XLA, in what is compiled, and on a GPU otherwise.
"""

import functools
from typing import NamedTuple

import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.python.framework import kernels, op_def_registry

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
      to_host: copies of tensors that a GPU has made and that an operation of the graph, outside of
        XLA, takes from host memory: the host waits for them.
      to_device: copies the other way.
    """

    without_kernel: list[str]
    host_variables: list[str]
    control_flow: list[str]
    compiled: int
    to_host: list["Copy"]
    to_device: list["Copy"]


class Copy(NamedTuple):
    """A copy of so many rows, or of a scalar, between host memory and that of a GPU."""

    num_rows: int
    what: str


def examine(function: tf.types.experimental.ConcreteFunction, compiled: bool = False) -> Report:
    """Examines a traced function; `compiled`, as it would be with `jit_compile=True`."""
    definition = function.graph.as_graph_def()
    library = {part.signature.name: part for part in definition.library.function}
    copies = ([], []) if compiled else _copies(function.graph, library)
    report = Report([], [], [], 0, *copies)
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


def _copies(graph, library) -> tuple[list[Copy], list[Copy]]:
    """Follows through a graph whether tensors are in host memory, by the kernels of a GPU.

    Returns the copies to the host, and those to the device.
    """
    on_host, to_host, to_device = {}, [], []
    host_handles = _handles_of_host_variables(graph)
    for operation in graph.get_operations():
        node = operation.node_def
        inputs, outputs = _in_host_memory(operation, node, library, host_handles)
        for i, tensor in enumerate(operation.inputs):
            size = tensor.shape.num_elements()
            if tensor.dtype == tf.resource or not size or on_host.get(tensor.name) is None:
                continue
            num_rows = tensor.shape[0] if tensor.shape.rank else 1
            copy = Copy(num_rows, f"{tensor.dtype.name}{tensor.shape} {tensor.name} -> {node.op}")
            if i in inputs and not on_host[tensor.name]:
                to_host.append(copy)
            if i not in inputs and on_host[tensor.name]:
                to_device.append(copy)
        for i, tensor in enumerate(operation.outputs):
            # A constant is wherever it is needed.
            on_host[tensor.name] = None if node.op == "Const" else i in outputs
    return to_host, to_device


def _handles_of_host_variables(graph) -> set[str]:
    """Names of the placeholders of variables on the first CPU, where others are on the second."""
    variables = {id(v.handle): v for v in graph.variables}
    return {
        inner.name
        for outer, inner in graph.captures
        if id(outer) in variables
        and tf.DeviceSpec.from_string(variables[id(outer)].device).device_index == 0
        and any(tf.DeviceSpec.from_string(v.device).device_index == 1 for v in variables.values())
    }


def _in_host_memory(operation, node, library, host_handles) -> tuple[set[int], set[int]]:
    """Which inputs and outputs of an operation are in host memory, where a GPU runs it."""
    all_inputs, all_outputs = set(range(len(operation.inputs))), set(range(len(operation.outputs)))
    kept_there = (tf.int32, tf.string, tf.resource)
    by_type = {i for i, tensor in enumerate(operation.outputs) if tensor.dtype in kept_there}
    is_placed = host_handles and tf.DeviceSpec.from_string(node.device).device_index == 0
    if is_placed or any(tensor.name in host_handles for tensor in operation.inputs):
        return all_inputs, all_outputs
    if _called(node):
        if _must_compile(node, library):
            # XLA has what it takes and gives in the device's memory.
            return set(), set()
        return {i for i, t in enumerate(operation.inputs) if t.dtype in kept_there}, by_type
    if node.op in _NO_KERNELS:
        return set(), by_type
    fitting = [kernel for kernel in _gpu_kernels(node.op) if _fits(node, kernel)]
    if not fitting:
        return all_inputs, all_outputs
    # A kernel for GPUs goes before one for all devices.
    kernel = min(fitting, key=lambda kernel: kernel.device_type != "GPU")
    definition = op_def_registry.get(node.op)
    return (
        _places(node, definition.input_arg, kernel.host_memory_arg),
        _places(node, definition.output_arg, kernel.host_memory_arg),
    )


def _places(node, arguments, names) -> set[int]:
    """The places, among all tensors that an operation takes or gives, of its arguments `names`."""
    places, start = set(), 0
    for argument in arguments:
        count = 1
        if argument.number_attr:
            count = node.attr[argument.number_attr].i
        elif argument.type_list_attr:
            count = len(node.attr[argument.type_list_attr].list.type)
        if argument.name in names:
            places |= set(range(start, start + count))
        start += count
    return places


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
