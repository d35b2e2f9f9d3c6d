"""What an FP16 file means, written so that ONNX Runtime computes it on a CPU.

ONNX Runtime 1.32 has no FP16 layers for x86: it computes them in float32 and drops the rounding
between them, and with it what FP16 does to a model. In the form that is written here everything is
float32, and each tensor that was FP16 is rounded by a Cast there and back, which stays: a layer
adds up in float32 and rounds its result, as GPUs do, and what is beyond 65504 becomes infinite.
"""

from __future__ import annotations

from pathlib import Path

from gnet_opt.errors import require

# The attribute `to` of a Cast to float16, as protobuf writes it. In 28 MB of weights these six
# bytes stand by chance once in ten million files.
_CAST_TO_HALF = b"\x0a\x02to\x18\x0a"


def is_half(model: Path) -> bool:
    """Whether an ONNX file casts to FP16, as every one does that has layers in it.

    Looked for in the file's bytes, so that a device needs no ONNX package to see.
    """
    return _CAST_TO_HALF in model.read_bytes()


def rounded(model: Path) -> bytes | None:
    """The content of an FP16 file with everything in float32 but the rounding.

    Args:
        model: The ONNX file, with the type of every tensor and the weights inside.

    Returns:
        The content, or None where the file has no FP16, or lacks the type of a tensor.

    Raises:
        MissingDependencyError: It can be an FP16 file, and onnx-ir is not installed.
    """
    if not is_half(model):
        return None
    require("onnx_ir", "build", f"run {model.name}, which is FP16, by reference semantics")
    import numpy as np
    import onnx_ir as ir

    loaded = ir.load(model, format="protobuf")
    graph = loaded.graph
    single, half = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.FLOAT16)
    values = [value for node in graph for value in node.outputs]
    if any(value.dtype is None for value in values):
        return None

    def cast(value: ir.Value, kind: ir.TensorType) -> ir.Value:
        name = f"{value.name}/{kind.dtype.name.lower()}"
        node = ir.node("Cast", [value], {"to": kind.dtype.value}, name=f"{name}/Cast")
        result = node.outputs[0]
        result.name, result.type, result.shape = name, kind, value.shape
        graph.append(node)
        return result

    for value in values:
        if value.dtype != half.dtype:
            continue
        uses = tuple(value.uses())
        short, producer = value, value.producer()
        if producer is not None and producer.op_type != "Cast":
            value.type = single
            short = cast(value, half)
        full = cast(short, single)
        for node, index in uses:
            node.replace_input_with(index, full)
    for value in graph.initializers.values():
        if value.dtype == half.dtype and value.const_value is not None:
            array = value.const_value.numpy().astype(np.float32)
            value.const_value, value.type = ir.tensor(array, name=value.name), single
    graph.sort()
    content: bytes = ir.to_proto(loaded).SerializeToString(deterministic=True)
    return content
