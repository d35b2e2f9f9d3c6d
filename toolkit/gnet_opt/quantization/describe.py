"""What is in an ONNX file: its layers, the precision of each, and the numbers of its integers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from gnet_opt.quantization.graph import constant, count_macs, is_dequantized, parameters, producer
from gnet_opt.quantization.regions import load_graph


def describe(path: Path) -> dict[str, Any]:
    """Describe an ONNX file, whoever made it.

    Returns:
        `layers` (each Conv and Gemm with its precision, multiply-accumulates, weight shape and,
        in INT8, scale and zero point of its data), `operators` (counts), `macs`,
        `macs_int8_share`, `parameters`, `opset`, `input` and `output`.

    Raises:
        ModelError: The file is no valid ONNX file.
    """
    return describe_model(load_graph(path))


def describe_model(model: ir.Model) -> dict[str, Any]:
    """Describe a model that was read; see `describe`."""
    layers = [_layer(node) for node in model.graph if node.op_type in ("Conv", "Gemm", "MatMul")]
    macs = sum(layer["macs"] for layer in layers)
    integer = sum(layer["macs"] for layer in layers if layer["precision"] == "int8")
    return {
        "input": _tensor(model.graph.inputs[0]) if model.graph.inputs else "",
        "layers": layers,
        "macs": macs,
        "macs_int8_share": integer / macs if macs else 0.0,
        "operators": dict(sorted(Counter(node.op_type for node in model.graph).items())),
        "opset": model.graph.opset_imports.get("", 0),
        "output": _tensor(model.graph.outputs[0]) if model.graph.outputs else "",
        "parameters": sum(layer["parameters"] for layer in layers),
    }


def _layer(node: ir.Node) -> dict[str, Any]:
    quantized = all(is_dequantized(value) for value in node.inputs[:2])
    weight = producer(node.inputs[1]).inputs[0] if quantized else node.inputs[1]
    array = constant(weight)
    layer: dict[str, Any] = {
        "macs": count_macs(node, weight),
        "name": node.name,
        "operator": node.op_type,
        "parameters": 0 if array is None else int(array.size),
        "precision": "int8" if quantized else _float_type(node),
        "scale": None,
        "weight": [] if array is None else list(array.shape),
        "zero_point": None,
    }
    if quantized:
        scale, zero = parameters(producer(node.inputs[0]))
        layer["scale"] = float(scale.ravel()[0])
        layer["zero_point"] = int(zero.ravel()[0]) if zero is not None else 0
    return layer


def _float_type(node: ir.Node) -> str:
    data = node.inputs[0]
    return "fp16" if data is not None and data.dtype == ir.DataType.FLOAT16 else "float"


def _tensor(value: ir.Value) -> str:
    kind = value.dtype.name if value.dtype is not None else "unknown"
    shape = ", ".join(str(size) for size in value.shape) if value.shape is not None else "?"
    return f"{value.name}: {kind}[{shape}]"
