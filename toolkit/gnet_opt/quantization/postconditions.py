"""Prove on the written file that an INT8 graph is what it claims to be."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from gnet_opt.errors import ModelError
from gnet_opt.quantization.describe import describe_model
from gnet_opt.quantization.graph import (
    constant,
    is_dequantized,
    parameters,
    producer,
    same_parameters,
)
from gnet_opt.quantization.regions import load_graph, passes_through
from gnet_opt.quantization.weights import LARGEST, LARGEST_PAIR, largest_pair
from gnet_opt.target import Scheme


def check(path: Path, scheme: Scheme, keep_float: Collection[str] = ()) -> dict[str, Any]:
    """Read an INT8 file anew and check the form that every backend here fuses.

    1. Each Conv and Gemm reads both its data and its weight from a DequantizeLinear; the data one
       undoes a QuantizeLinear with the same parameters. One whose weight is computed while it
       runs stays float, and so do those of `keep_float`, which read neither from one; both count as
       that in the share of multiply-accumulates.
    2. Scales are positive and finite; zero points and types are those of the scheme; weights are
       int8 initializers within the scheme's bits, and in pairs within a saturating lane; biases
       are float.
    3. The quantized inputs of a Concat share one scale and zero point, and a MaxPool or Concat
       keeps its own through to the next quantization.

    Args:
        path: The written file.
        scheme: What it must follow.
        keep_float: Names of Conv and Gemm nodes that are to stay in float.

    Returns:
        Counts, and the share of multiply-accumulates in INT8, for the manifest.

    Raises:
        ModelError: A condition does not hold; the message names the node.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"{path} is no valid ONNX model: {error}") from error
    model = load_graph(path)
    graph = model.graph
    layers = [node for node in graph if _is_compute(node)]
    nodes = [node for node in layers if node.name not in keep_float]
    for node in layers:
        if node.name in keep_float:
            is_float = constant(node.inputs[1]) is not None and not is_dequantized(node.inputs[0])
            _require(is_float, node, "it was to stay in float", path)
    for node in nodes:
        _require(is_dequantized(node.inputs[0]), node, "its data is not dequantized", path)
        _require(is_dequantized(node.inputs[1]), node, "its weight is not dequantized", path)
        _check_activation(node, scheme, path)
        _check_weight(node, scheme, path)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            bias = constant(node.inputs[2])
            float_bias = bias is not None and bias.dtype == np.float32
            _require(float_bias, node, "its bias is not a float constant", path)
    described = describe_model(model)
    shared = sum(_check_shared(node, path) for node in graph if passes_through(node))
    return {
        "conv": sum(node.op_type == "Conv" for node in nodes),
        "float_layers": len(layers) - len(nodes),
        "gemm": sum(node.op_type == "Gemm" for node in nodes),
        "macs": described["macs"],
        "macs_int8_share": described["macs_int8_share"],
        "quantize_linear": sum(node.op_type == "QuantizeLinear" for node in graph),
        "shared_scales": shared,
    }


def _is_compute(node: ir.Node) -> bool:
    """Whether a node is a Conv or Gemm with a weight that is known before it runs."""
    if node.op_type not in ("Conv", "Gemm"):
        return False
    return constant(node.inputs[1]) is not None or is_dequantized(node.inputs[1])


def _check_activation(node: ir.Node, scheme: Scheme, path: Path) -> None:
    scale, zero = parameters(producer(node.inputs[0]))
    _check_scale(scale, node, "data", path)
    _require(scale.ndim == 0, node, "its data has more than one scale", path)
    usual = "uint8" if scheme.activations == "u8" else "int8"
    allowed = (usual, "int8") if scheme.signed == "s8" else (usual,)
    kind = "float" if zero is None else zero.dtype.name
    _require(kind in allowed, node, f"its data is {kind}, not {' or '.join(allowed)}", path)
    if scheme.symmetric or kind != usual:
        centred = zero is not None and not zero.any()
        _require(centred, node, "its data has a zero point other than 0", path)


def _check_weight(node: ir.Node, scheme: Scheme, path: Path) -> None:
    dequantize = producer(node.inputs[1])
    scale, zero = parameters(dequantize)
    weight = constant(dequantize.inputs[0])
    if weight is None or weight.dtype != np.int8:
        raise _fault(node, "its weight is not an int8 constant", path)
    largest = LARGEST[scheme.weight_bits]
    bound = int(np.abs(weight.astype(np.int16)).max())
    _require(bound <= largest, node, f"its weight reaches {bound}, beyond {largest}", path)
    if scheme.saturating_pairs:
        pair = largest_pair(weight)
        fault = f"two neighbouring weights add up to {pair}, beyond {LARGEST_PAIR}"
        _require(pair <= LARGEST_PAIR, node, fault, path)
    _check_scale(scale, node, "weight", path)
    centred = zero is None or not zero.any()
    _require(centred, node, "its weight has a zero point other than 0", path)
    if scheme.per_channel:
        axis = dequantize.attributes.get_int("axis", 1)
        each = axis == 0 and scale.shape == weight.shape[:1]
        _require(each, node, "its weight has not one scale an output channel", path)


def _check_scale(scale: np.ndarray[Any, Any], node: ir.Node, what: str, path: Path) -> None:
    usable = bool(np.isfinite(scale).all() and (scale > 0).all())
    _require(usable, node, f"a scale of its {what} is not positive and finite", path)


def _check_shared(node: ir.Node, path: Path) -> bool:
    """Whether a Concat or MaxPool is in the quantized part; then with one scale through it."""
    after = [use.node for use in node.outputs[0].uses() if use.node.op_type == "QuantizeLinear"]
    if not after:
        return False
    for value in node.inputs:
        shares = is_dequantized(value) and same_parameters(producer(value), after[0])
        _require(shares, node, "its inputs and output do not share one scale", path)
    return True


def _require(condition: bool, node: ir.Node, fault: str, path: Path) -> None:
    if not condition:
        raise _fault(node, fault, path)


def _fault(node: ir.Node, fault: str, path: Path) -> ModelError:
    return ModelError(
        f"{path}: the {node.op_type} {node.name} is not quantized as intended: {fault}. "
        "This is a fault of gnet-opt; please report it with the model."
    )
