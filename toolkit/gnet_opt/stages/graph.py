"""Small operations on an onnx-ir graph that fold and export share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gnet_opt.errors import ModelError, require
from gnet_opt.preprocess import FloatArray

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class NewNode:
    """A node to be built: its operator, the inputs after the first, and its attributes."""

    op_type: str
    inputs: Sequence[ir.Value | None] = ()
    attributes: Sequence[ir.Attr] = ()


def replace_node(graph: ir.Model, old: ir.Node, x: ir.Value, chain: Sequence[NewNode]) -> None:
    """Put a chain of nodes with one output each in the place of `old`.

    Args:
        graph: The graph that holds `old`.
        old: A node with one output; it is removed.
        x: The first input of the chain's first node. Each later node takes its predecessor's
            output as its first input.
        chain: At least one node. The last takes over the name, shape and users of `old`.
    """
    import onnx_ir as ir

    target = old.outputs[0]
    nodes: list[ir.Node] = []
    for new in chain:
        node = ir.Node("", new.op_type, [x, *new.inputs], list(new.attributes), num_outputs=1)
        x = node.outputs[0]
        nodes.append(node)
    x.name, x.shape, x.type = target.name, target.shape, target.type
    graph.graph.insert_after(old, nodes)
    for user, index in tuple(target.uses()):
        user.replace_input_with(index, x)
    for index, output in enumerate(graph.graph.outputs):
        if output is target:
            graph.graph.outputs[index] = x
    graph.graph.remove(old, safe=True)


def replace_initializer(
    graph: ir.Model, name: str, array: npt.NDArray[Any], user: ir.Node
) -> ir.Value:
    """Add a float32 initializer for `user`.

    It takes the name over from one that nobody else uses; where others do (a weight that two
    layers share), it gets a number.

    Raises:
        ModelError: A value is not finite in float32.
    """
    import onnx_ir as ir

    with np.errstate(over="ignore"):
        values = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise ModelError(
            f"{name} would have values that are not finite in float32. A batch norm before it "
            "may have a variance of zero; pass an earlier checkpoint."
        )
    initializers = graph.graph.initializers
    old = initializers.get(name)
    if old is not None and all(other is user for other, _ in old.uses()):
        del initializers[name]
    unique, number = name, 2
    while unique in initializers:
        stem, dot, kind = name.rpartition(".")
        unique, number = f"{stem}_{number}{dot}{kind}", number + 1
    value = ir.Value(
        name=unique,
        shape=ir.Shape(values.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(np.ascontiguousarray(values), name=unique),
    )
    initializers[unique] = value
    return value


def constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The array of a constant value, or None for anything else."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def run_graph(graph: ir.Model, images: FloatArray, *, optimize: bool = True) -> FloatArray:
    """Run a graph in ONNX Runtime on the CPU, one picture after the other.

    Args:
        graph: One input, one output.
        images: float32 of shape (N, planes, H, W).
        optimize: Whether ONNX Runtime may rewrite the graph first.

    Returns:
        float32 logits of shape (N, classes).

    Raises:
        ModelError: ONNX Runtime cannot run the graph.
    """
    import onnx_ir as ir

    content = ir.to_proto(graph).SerializeToString()
    return run_bytes(content, [image[None] for image in images], optimize=optimize)


def run_bytes(
    content: bytes, batches: Sequence[npt.NDArray[Any]], *, optimize: bool = True
) -> FloatArray:
    """Run a serialised model in ONNX Runtime on the CPU, batch by batch.

    Returns:
        float32 logits of all batches, concatenated.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
    """
    require("onnxruntime", "build", "check the exported model")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # One thread: torch's own pool is in this process, and two pools slow each other down.
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        rows = [session.run(None, {name: batch})[0] for batch in batches]
    except Exception as error:
        raise ModelError(f"ONNX Runtime cannot run the exported model: {error}") from error
    logits: FloatArray = np.concatenate(rows)
    return logits
