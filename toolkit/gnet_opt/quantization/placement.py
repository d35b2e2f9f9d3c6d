"""Write an INT8 graph in Q/DQ form."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gnet_opt.quantization.ranges import Affine
from gnet_opt.quantization.regions import Region, compute_nodes, passes_through, sums
from gnet_opt.quantization.weights import QuantizedWeight


def place(
    model: ir.Model,
    regions: tuple[Region, ...],
    parameters: Mapping[str, Affine],
    weights: Mapping[str, QuantizedWeight],
    biases: Mapping[str, npt.NDArray[np.float32]],
    keep_float: Collection[str] = (),
) -> None:
    """Insert QuantizeLinear and DequantizeLinear pairs into a float graph, in place.

    Every tensor of a region gets one pair, which the Conv, Gemm, GlobalAveragePool, MaxPool and
    Concat nodes of the quantized part read; other readers keep the float value. Weights become int8
    initializers behind a DequantizeLinear, biases stay float.

    Args:
        model: The float graph.
        regions: What `find_regions` found in it.
        parameters: Scale and zero point of each region, by its name.
        weights: By the name of the float weight's initializer.
        biases: Replacements of biases, by the name of the node that has one.
        keep_float: Names of Conv and Gemm nodes that stay in float.
    """
    graph = model.graph
    quantized = {tensor: region for region in regions for tensor in region.tensors}
    compute = set(compute_nodes(graph, keep_float))
    values = {str(value.name): value for value in graph.inputs}
    values.update({str(v.name): v for node in graph for v in node.outputs})

    for name, region in quantized.items():
        value = values[name]
        # Only readers inside the quantized part: a node that stays float reads the float value.
        # What float arithmetic alone reads is quantized for its writer's sake: all read it so.
        readers = [
            (use.node, use.idx)
            for use in value.uses()
            if region.result
            or ((use.node in compute or sums(use.node)) and use.idx == 0)
            or (passes_through(use.node) and str(use.node.outputs[0].name) in quantized)
        ]
        dequantized = _insert_pair(graph, value, region.name, parameters[region.name])
        for node, index in readers:
            node.replace_input_with(index, dequantized)
    for node in list(graph):
        if node in compute:
            _quantize_weight(graph, node, weights)
            _replace_bias(graph, node, biases)
    for name in weights:
        if not graph.initializers[name].uses():
            del graph.initializers[name]
    graph.sort()


def _insert_pair(graph: ir.Graph, value: ir.Value, region: str, parameters: Affine) -> ir.Value:
    scale = _constant(graph, f"{region}/scale", np.asarray(parameters.scale, np.float32))
    zero = _constant(
        graph, f"{region}/zero_point", np.asarray(parameters.zero_point, parameters.dtype)
    )
    quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{value.name}/QuantizeLinear")
    integers = quantize.outputs[0]
    integers.name = f"{value.name}/quantized"
    integers.type, integers.shape = ir.TensorType(_dtype(parameters.dtype)), value.shape
    dequantize = ir.node(
        "DequantizeLinear", [integers, scale, zero], name=f"{value.name}/DequantizeLinear"
    )
    result = dequantize.outputs[0]
    result.name = f"{value.name}/dequantized"
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    graph.extend([quantize, dequantize])
    return result


def _quantize_weight(
    graph: ir.Graph, node: ir.Node, weights: Mapping[str, QuantizedWeight]
) -> None:
    value = node.inputs[1]
    assert value is not None and value.name is not None
    weight = weights[value.name]
    axis = {"axis": 0} if weight.scales.ndim else {}
    dequantize = ir.node(
        "DequantizeLinear",
        [
            _constant(graph, f"{value.name}/quantized", weight.integers),
            _constant(graph, f"{value.name}/scale", weight.scales),
            _constant(graph, f"{value.name}/zero_point", np.zeros(weight.scales.shape, np.int8)),
        ],
        axis,
        name=f"{value.name}/{node.name}/DequantizeLinear",
    )
    result = dequantize.outputs[0]
    result.name = f"{value.name}/{node.name}/dequantized"
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    graph.insert_before(node, dequantize)
    node.replace_input_with(1, result)


def _replace_bias(
    graph: ir.Graph, node: ir.Node, biases: Mapping[str, npt.NDArray[np.float32]]
) -> None:
    name = str(node.name)
    if name not in biases:
        return
    bias = _constant(graph, f"{name}/bias", biases[name])
    old = node.inputs[2]
    node.replace_input_with(2, bias)
    if old is not None and not old.uses():
        graph.initializers.pop(str(old.name), None)


def _constant(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """An initializer, the one that is there already if its name is."""
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(
        name=name,
        type=ir.TensorType(_dtype(array.dtype.name)),
        shape=ir.Shape(array.shape),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value


def _dtype(name: str) -> ir.DataType:
    return ir.DataType.from_numpy(np.dtype(name))
