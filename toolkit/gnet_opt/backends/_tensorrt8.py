"""A model in the form that TensorRT 8 reads.

Its parser is older than the portable model's form in two ways:

- An int8 weight behind a DequantizeLinear alone is refused (`invalid weights type of Int8`:
  https://github.com/NVIDIA/TensorRT/issues/2163, https://github.com/microsoft/onnxruntime/issues/11535,
  and for the pair instead https://github.com/microsoft/onnxruntime/pull/9616). TensorRT 10 takes
  it. So here the weight is float32 and goes through QuantizeLinear first, which gives back exactly
  the integers that it was.
- TensorRT 8.2 reads operators up to opset 13, 8.5 up to 17
  (https://github.com/onnx/onnx-tensorrt/blob/release/8.2-GA/docs/operators.md). The operators of a
  GoogLeNet mean the same in 13 as in 17: what changed in between is that Relu and arithmetic take
  more types, and that Reshape has an attribute, which is not used.

The engine is the same: TensorRT quantizes the weights when it builds it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gnet_opt.errors import BackendError, require

if TYPE_CHECKING:
    import onnx_ir as ir

FILE = "model.tensorrt8.onnx"

OLDEST_WITH_INT8_WEIGHTS = (10, 0)
_OPSET = 13
_OPSET_17_FROM = (8, 5)
# That of ONNX 1.8, the first with opset 13; a later one makes an older parser warn.
_IR_VERSION = 7
# Newer in opset 17, with the same meaning for float tensors where an attribute is not used.
_SAME_MEANING = {"Add", "Div", "Identity", "Mul", "Relu", "Reshape", "Sub"}
_NEW_ATTRIBUTES = {"allowzero"}


def reads_opset_17(version: tuple[int, int]) -> bool:
    """Whether a version of TensorRT reads what the portable model is written in."""
    return version >= _OPSET_17_FROM


def for_tensorrt8(model: Path, version: tuple[int, int]) -> bytes:
    """The content of an ONNX file for TensorRT 8.

    Equal inputs give equal bytes.

    Args:
        model: The portable file, float, FP16 or in Q/DQ form.
        version: TensorRT's, below 10.0.

    Raises:
        MissingDependencyError: onnx or onnx-ir is not installed.
        BackendError: An operator means something else in the opset that this version reads.
    """
    for package in ("onnx", "onnx_ir"):
        require(package, "build", f"compile {model.name} for TensorRT 8")
    import onnx_ir as ir

    loaded = ir.load(model, format="protobuf")
    _pair_weights(loaded)
    if not reads_opset_17(version):
        _lower_opset(loaded, model)
    content: bytes = ir.to_proto(loaded).SerializeToString(deterministic=True)
    return content


def _pair_weights(model: ir.Model) -> None:
    """Put a QuantizeLinear in front of every DequantizeLinear of a weight."""
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        if node.op_type != "DequantizeLinear":
            continue
        weight, scale, zero_point = node.inputs
        if weight is None or weight.const_value is None:
            continue
        assert scale is not None and scale.const_value is not None and zero_point is not None
        integers = weight.const_value.numpy()
        scales = scale.const_value.numpy()
        axis = node.attributes.get_int("axis", 1)
        if scales.ndim:
            scales = scales.reshape([-1 if d == axis else 1 for d in range(integers.ndim)])
        # Dividing by the scale again and rounding gives the integers: the two roundings of float32
        # together move a value by far less than the half that it would take.
        values = integers.astype(np.float32) * scales.astype(np.float32)
        name = str(weight.name)
        floats = ir.Value(
            name=f"{name}/float",
            const_value=ir.tensor(values, name=f"{name}/float"),
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(values.shape),
        )
        graph.register_initializer(floats)
        pair = ir.node(
            "QuantizeLinear",
            [floats, scale, zero_point],
            {"axis": axis},
            name=f"{name}/QuantizeLinear",
        )
        result = pair.outputs[0]
        result.name, result.type, result.shape = f"{name}/quantized", weight.type, weight.shape
        graph.insert_before(node, pair)
        node.replace_input_with(0, result)
        if not weight.uses():
            del graph.initializers[name]


def _lower_opset(model: ir.Model, path: Path) -> None:
    import onnx

    written = model.opset_imports.get("", 1)
    if written <= _OPSET:
        return
    for node in model.graph:
        changed = onnx.defs.get_schema(node.op_type, written, "").since_version > _OPSET
        if changed and (
            node.op_type not in _SAME_MEANING or _NEW_ATTRIBUTES & set(node.attributes)
        ):
            raise BackendError(
                f"{path} has the operator {node.op_type} ({node.name}) as it is since opset "
                f"{_OPSET + 1}, and this target's TensorRT reads up to {_OPSET}. Choose a target "
                "with a later TensorRT."
            )
    model.opset_imports[""] = _OPSET
    model.ir_version = min(model.ir_version, _IR_VERSION)
