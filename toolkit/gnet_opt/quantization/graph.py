"""Questions about an ONNX graph that several steps ask."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]


def constant(value: ir.Value | None) -> Array | None:
    """The array behind a constant value, or None."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def producer(value: ir.Value | None) -> ir.Node:
    """The node that writes a value that some node is known to write."""
    node = value.producer() if value is not None else None
    assert node is not None
    return node


def parameters(node: ir.Node) -> tuple[Array, Array | None]:
    """Scale and zero point of a QuantizeLinear or DequantizeLinear with constant ones."""
    scale = constant(node.inputs[1])
    assert scale is not None
    return scale, constant(node.inputs[2]) if len(node.inputs) > 2 else None


def same_parameters(first: ir.Node, second: ir.Node) -> bool:
    """Whether two QuantizeLinear or DequantizeLinear nodes have equal scale and zero point."""
    (scale_a, zero_a), (scale_b, zero_b) = parameters(first), parameters(second)
    if not np.array_equal(scale_a, scale_b) or (zero_a is None) != (zero_b is None):
        return False
    return (
        zero_a is None
        or zero_b is None
        or bool(zero_a.dtype == zero_b.dtype and np.array_equal(zero_a, zero_b))
    )


def is_dequantized(value: ir.Value | None) -> bool:
    """Whether a value is a DequantizeLinear of a constant, or of a quantization that it undoes."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or constant(node.inputs[1]) is None:
        return False
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is None:
        return constant(node.inputs[0]) is not None
    return (
        source.op_type == "QuantizeLinear"
        and constant(source.inputs[1]) is not None
        and same_parameters(source, node)
    )


def count_macs(node: ir.Node, weight: ir.Value | None) -> int:
    """Multiply-accumulates that a Conv or Gemm with this weight spends on one picture.

    0 where the shape of the weight or of the output is not known.
    """
    if weight is None or weight.shape is None or not weight.shape.is_static():
        return 0
    size = int(np.prod(weight.shape.numpy()))
    if node.op_type != "Conv":
        return size
    shape = node.outputs[0].shape
    if shape is None or not all(isinstance(size, int) for size in shape.dims[2:]):
        return 0
    positions = [int(size) for size in shape.dims[2:] if isinstance(size, int)]
    return size * int(np.prod(positions))
