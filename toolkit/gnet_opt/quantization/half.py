"""Write a float graph in FP16: layers, their weights and the tensors between them in float16.

The types stand in the file, because strongly typed networks take them from there, as TensorRT's do
(https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/api/migration/tensorrt-10x-to-11x-trtexec.html).
The rules:

1. The input and the logits stay float32, with a Cast behind and before.
2. Layers and what only moves, compares or averages values take and give float16, and their
   constants are float16.
3. Every other node stays float32 between Casts, LRN above all: it adds squares, and the square of
   a value beyond 255 is beyond 65504, the largest of float16.
4. A tensor that is read in both types is cast once.

By reference semantics the logits are 69.9 dB from float for the demo model (500 pictures) and
64.8 dB for the 2014 GoogLeNet (400). TensorRT-RTX 1.7 parses both as strongly typed networks with
57 convolutions in FP16 and every LRN in float32, and builds them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from gnet_opt.errors import ModelError
from gnet_opt.files import atomic_path
from gnet_opt.quantization.graph import constant
from gnet_opt.quantization.regions import load_graph

_HALF = frozenset(
    {
        "AveragePool",
        "Concat",
        "Conv",
        "Flatten",
        "Gemm",
        "GlobalAveragePool",
        "MaxPool",
        "Relu",
        "Reshape",
    }
)
_FLOAT, _FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16


def write_half(model: Path, out: Path) -> dict[str, Any]:
    """Write a float ONNX file in FP16.

    Args:
        model: The float file, as `gnet_opt.stages` exports it.
        out: The file to write; equal inputs give equal bytes.

    Returns:
        The facts for the manifest: `half`, with the number of Conv and Gemm nodes in FP16
        (`layers`), of Casts, and of nodes by operator that stay in float32 (`float32`).

    Raises:
        ModelError: The file cannot be read, or a weight is beyond the range of float16.
    """
    graph_model = ShapeInferencePass()(load_graph(model)).model
    graph = graph_model.graph
    casts = _Casts(graph)
    kept: Counter[str] = Counter()
    for node in list(graph):
        half = node.op_type in _HALF
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in (_FLOAT, _FLOAT16):
                node.replace_input_with(index, casts.get(value, _FLOAT16 if half else _FLOAT))
        if not half:
            kept[node.op_type] += 1
            continue
        for value in node.outputs:
            if value.dtype == _FLOAT:
                value.type = ir.TensorType(_FLOAT16)
    for index, value in enumerate(graph.outputs):
        if value.dtype == _FLOAT16:
            # The outside knows the output by its name.
            name, value.name = value.name, f"{value.name}/float16"
            graph.outputs[index] = casts.get(value, _FLOAT)
            graph.outputs[index].name = name
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    graph.sort()
    with atomic_path(out) as temporary:
        ir.save(graph_model, temporary)
        try:
            onnx.checker.check_model(temporary, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ModelError(
                f"{model} in FP16 is not valid ONNX ({error}). Use --precision fp32, and please "
                "report it."
            ) from error
    return {
        "half": {
            "casts": casts.count,
            "float32": dict(sorted(kept.items())),
            "layers": sum(node.op_type in ("Conv", "Gemm") for node in graph),
        }
    }


class _Casts:
    """The other type of each tensor of a graph, made where it is first asked for."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._others: dict[ir.Value, ir.Value] = {}
        self.count = 0

    def get(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The tensor in a type: itself, a constant of its own, or the result of a Cast."""
        if value.dtype == dtype:
            return value
        if value not in self._others:
            name = f"{value.name}/{dtype.name.lower()}"
            if value.is_initializer():
                self._others[value] = self._half_constant(value, name)
            else:
                self._others[value] = self._cast(value, dtype, name)
        return self._others[value]

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        node = ir.node("Cast", [value], {"to": dtype.value}, name=f"{name}/Cast")
        result = node.outputs[0]
        result.name, result.type, result.shape = name, ir.TensorType(dtype), value.shape
        self._graph.append(node)
        self.count += 1
        return result

    def _half_constant(self, value: ir.Value, name: str) -> ir.Value:
        array = constant(value)
        assert array is not None
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.isfinite(half).all():
            raise ModelError(
                f"{value.name} has values of up to {float(np.abs(array).max()):g}, and FP16 ends "
                "at 65504. Use --precision fp32."
            )
        made = ir.Value(
            name=name,
            type=ir.TensorType(_FLOAT16),
            shape=ir.Shape(half.shape),
            const_value=ir.tensor(half, name=name),
        )
        self._graph.register_initializer(made)
        return made
