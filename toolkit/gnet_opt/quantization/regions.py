"""Which tensors of a float graph are quantized, and which of them share one range.

Rules, in the order of the code:

1. The data input of every Conv and Gemm with a constant weight is quantized, but for those that
   are to stay in float. So is that of a GlobalAveragePool behind such layers alone: it reads
   integers and adds them up without loss, so that the convolutions before it need not write floats.
2. What flows through MaxPool or Concat into such a tensor is quantized with the same range: both
   only move values, so with one range they run on integers without any arithmetic, and TensorRT
   needs no reformat around a Concat (TensorRT #4366).
3. Where a runtime computes a layer in INT8 only when its result is quantized, the result of every
   other layer but the logits is quantized, too, though float arithmetic reads it next. Not so where
   that is a layer which is to stay in float: behind a DequantizeLinear, ONNX Runtime (from 1.21 on)
   would quantize its weight by itself, with one scale.
4. Everything else (LRN, softmax, the averages, the logits) stays float. A ReLU is inside the range
   of the tensor that it writes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from gnet_opt.errors import ModelError
from gnet_opt.quantization.external import check_external_data

_COMPUTE = frozenset({"Conv", "Gemm"})
_SUMS = frozenset({"GlobalAveragePool"})
_PASS_THROUGH = frozenset({"MaxPool", "Concat"})


@dataclass(frozen=True, kw_only=True)
class Region:
    """Tensors with one scale and zero point.

    Attributes:
        name: The name of the first tensor in graph order; unique in a model.
        tensors: Every tensor of the region, in graph order.
        sources: Those whose values decide the range: the tensors that no MaxPool or Concat of
            the region wrote.
        result: Whether it is the result of a layer that only float arithmetic reads.
    """

    name: str
    tensors: tuple[str, ...]
    sources: tuple[str, ...]
    result: bool = False


def load_graph(path: Path) -> ir.Model:
    """Read an ONNX file.

    Raises:
        ModelError: The file is no valid ONNX file, or has data in files outside its folder.
    """
    try:
        model = ir.load(path, format="protobuf")  # whatever the suffix says
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ModelError(f"{path} cannot be read as ONNX ({error}). Export it again.") from error
    except ir.serde.SerdeError as error:
        cause = error.__cause__ or error
        raise ModelError(f"{path} is no valid ONNX file ({cause}). Export it again.") from error
    except Exception as error:
        # protobuf's DecodeError derives from Exception alone and moved between its versions.
        if type(error).__name__ != "DecodeError":
            raise
        raise ModelError(f"{path} is not a complete ONNX file. Export it again.") from error
    if not len(model.graph):  # an empty file is valid protobuf
        raise ModelError(f"{path} has no nodes. Export it again.")
    check_external_data(model, path)
    return model


def compute_nodes(graph: ir.Graph, keep_float: Collection[str] = ()) -> list[ir.Node]:
    """Every Conv and Gemm with a constant weight, in graph order, but for those of `keep_float`."""
    return [
        node
        for node in graph
        if node.op_type in _COMPUTE
        and node.name not in keep_float
        and node.inputs[0] is not None
        and node.inputs[1] is not None
        and node.inputs[1].const_value is not None
    ]


def passes_through(node: ir.Node | None) -> bool:
    """Whether a node only moves computed values: its output can share the range of its inputs."""
    return (
        node is not None
        and node.op_type in _PASS_THROUGH
        and len(node.outputs) == 1
        and all(value is not None and value.const_value is None for value in node.inputs)
    )


def sums(node: ir.Node) -> bool:
    """Whether a node adds up integers without loss, and writes floats."""
    return node.op_type in _SUMS


def find_regions(
    model: ir.Model, keep_float: Collection[str] = (), *, results: bool = False
) -> tuple[Region, ...]:
    """Group the tensors to quantize by the range that they share.

    Args:
        model: The float graph.
        keep_float: Names of Conv and Gemm nodes that stay in float.
        results: Whether the results of layers are quantized where only float arithmetic reads
            them.

    Raises:
        ModelError: There is nothing to quantize.
    """
    parent: dict[ir.Value, ir.Value] = {}

    def root(value: ir.Value) -> ir.Value:
        while parent[value] is not value:
            value = parent[value]
        return value

    layers = compute_nodes(model.graph, keep_float)
    pending = [_data_input(node) for node in layers]
    if not pending:
        but = " but those that are to stay in float" if keep_float else ""
        raise ModelError(
            f"The graph has no Conv or Gemm with constant weights{but}: nothing to quantize."
        )
    written = set(layers)
    pending += [_data_input(node) for node in model.graph if sums(node) and _follows(node, written)]
    while pending:
        value = pending.pop()
        if value in parent:
            continue
        parent[value] = value
        producer = value.producer()
        if producer is not None and passes_through(producer):
            pending.extend(source for source in producer.inputs if source is not None)
    for value in parent:
        producer = value.producer()
        if producer is not None and passes_through(producer):
            for source in producer.inputs:
                if source is not None:
                    parent[root(source)] = root(value)

    kept = set(compute_nodes(model.graph)) - written
    extra = {
        found
        for node in layers
        if (found := _result(node)) is not None and found not in parent and not _feeds(found, kept)
    }
    if results:
        parent.update({found: found for found in extra})

    members: dict[ir.Value, list[ir.Value]] = {}
    for value in _in_graph_order(model.graph):
        if value in parent:
            members.setdefault(root(value), []).append(value)
    return tuple(_region(values, values[0] in extra) for values in members.values())


def _follows(node: ir.Node, layers: Collection[ir.Node]) -> bool:
    """Whether these layers alone wrote what a node reads, up to ReLU, MaxPool and Concat."""
    before = [value.producer() for value in node.inputs if value is not None]
    return all(
        found is not None
        and (
            found in layers
            or ((found.op_type == "Relu" or passes_through(found)) and _follows(found, layers))
        )
        for found in before
    )


def _data_input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None  # each of these operators has one
    return value


def _result(node: ir.Node) -> ir.Value | None:
    """What a layer writes, behind its ReLU; None for an output of the graph."""
    value = node.outputs[0]
    users = [use.node for use in value.uses()]
    if len(users) == 1 and users[0].op_type == "Relu":
        value = users[0].outputs[0]
    return None if value.is_graph_output() or not value.uses() else value


def _feeds(value: ir.Value, layers: Collection[ir.Node]) -> bool:
    """Whether one of the layers reads a value, maybe through MaxPool and Concat."""
    users = [use.node for use in value.uses()]
    return any(
        user in layers or (passes_through(user) and _feeds(user.outputs[0], layers))
        for user in users
    )


def _region(values: list[ir.Value], result: bool) -> Region:
    sources = [value for value in values if not passes_through(value.producer())]
    return Region(
        name=str(values[0].name),
        tensors=tuple(str(value.name) for value in values),
        sources=tuple(str(value.name) for value in sources),
        result=result,
    )


def _in_graph_order(graph: ir.Graph) -> list[ir.Value]:
    values = list(graph.inputs)
    for node in graph:
        values.extend(node.outputs)
    return values
