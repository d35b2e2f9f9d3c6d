"""What stands around each layer of an ONNX file, which decides what a runtime can fuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from gnet_opt.quantization.graph import constant, parameters
from gnet_opt.quantization.regions import load_graph

_LAYERS = ("Conv", "Gemm", "MatMul")
_ACTIVATIONS = ("Clip", "Relu")
_TYPES = {ir.DataType.INT8: "s8", ir.DataType.UINT8: "u8"}


def surroundings(path: Path) -> dict[str, dict[str, Any]]:
    """Look around each layer of an ONNX file, whoever made it.

    Returns:
        Of every Conv, Gemm and MatMul, by its name:

        - `aliases`: other names under which a runtime may show it: the tensor that it writes, and
          the names and tensors of the activation and the Q/DQ right behind it, which are fused;
        - `input`: `u8` or `s8` where its data input is dequantized, otherwise empty;
        - `input_takers`: how many nodes take that input dequantized, 0 where it is not;
        - `activation`: the operator between it and what takes its result, or empty;
        - `result`: `quantized` where one QuantizeLinear alone takes its result, `branches` where
          several do, `output` where it is an output of the model, otherwise `float`;
        - `takers`: the operators that take its result in float, sorted;
        - `result_type` and `zero_point`: of that one QuantizeLinear, otherwise empty and None;
        - `bias`: `float`, `quantized` or empty.

    Raises:
        ModelError: The file is no valid ONNX file.
    """
    graph = load_graph(path).graph
    return {str(node.name): _around(node) for node in graph if node.op_type in _LAYERS}


def _around(node: ir.Node) -> dict[str, Any]:
    value, activation = node.outputs[0], ""
    aliases = [str(value.name)]
    takers = _takers(value)
    while len(takers) == 1 and takers[0].op_type in _ACTIVATIONS and not value.is_graph_output():
        activation = takers[0].op_type
        value = takers[0].outputs[0]
        aliases += [str(takers[0].name), str(value.name)]
        takers = _takers(value)
    quantizers = [taker for taker in takers if taker.op_type == "QuantizeLinear"]
    others = sorted({taker.op_type for taker in takers} - {"QuantizeLinear"})
    facts: dict[str, Any] = {
        "activation": activation,
        "aliases": aliases,
        "bias": _bias(node),
        "input": _dequantized_type(node.inputs[0]),
        "input_takers": _dequantized_takers(node.inputs[0]),
        "result": "float",
        "result_type": "",
        "takers": others,
        "zero_point": None,
    }
    if value.is_graph_output():
        facts["result"] = "output"
    elif len(quantizers) > 1 and not others:
        facts["result"] = "branches"
    elif quantizers and not others:
        (quantizer,) = quantizers
        facts["result"] = "quantized"
        facts["result_type"], facts["zero_point"] = _integer_form(quantizer)
        for fused in (quantizer, *_takers(quantizer.outputs[0])):
            aliases += [str(fused.name), str(fused.outputs[0].name)]
    return facts


def _takers(value: ir.Value) -> list[ir.Node]:
    """The nodes that take a value, each once."""
    found: list[ir.Node] = []
    for node in value.consumers():
        if node not in found:
            found.append(node)
    return found


def _integer_form(node: ir.Node) -> tuple[str, int | None]:
    """The type and the zero point of a QuantizeLinear or DequantizeLinear."""
    if constant(node.inputs[1]) is None:
        return "", None
    zero = parameters(node)[1]
    if zero is None:
        return "u8", 0  # ONNX: without a zero point the type is uint8
    return _TYPES.get(ir.DataType.from_numpy(zero.dtype), str(zero.dtype)), int(zero.ravel()[0])


def _dequantized_type(value: ir.Value | None) -> str:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return ""
    return _integer_form(node)[0]


def _dequantized_takers(value: ir.Value | None) -> int:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return 0
    return sum(len(_takers(other.outputs[0])) for other in _takers(node.inputs[0]))


def _bias(node: ir.Node) -> str:
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return ""
    source = node.inputs[2].producer()
    return "quantized" if source is not None and source.op_type == "DequantizeLinear" else "float"
