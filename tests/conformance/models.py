"""Small ONNX models for tests: a hand-made Inception net, and its Q/DQ form.

The net has every kind of node that a GoogLeNet has. `quantize` is deliberately naive (min-max,
one pass, no options): it stands for any quantizer that keeps to the product's Q/DQ form.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import onnxruntime

FloatArray = npt.NDArray[np.float32]

SIDE = 17
CLASSES = 7


def pictures(count: int, seed: int = 0, planes: int = 3) -> FloatArray:
    """Smooth random pictures: float32 of shape (count, planes, SIDE, SIDE)."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(count, planes, 5, 5)).astype(np.float32)
    return np.ascontiguousarray(np.repeat(np.repeat(coarse, 4, 2), 4, 3)[:, :, :SIDE, :SIDE])


def pixel_pictures(count: int, seed: int = 0, planes: int = 3) -> npt.NDArray[np.uint8]:
    """Smooth random pixels: uint8 of shape (count, SIDE, SIDE, planes)."""
    levels = np.clip(pictures(count, seed, planes) * 50 + 120, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(levels, 1, -1))


def float_net(
    *, batch: int | str = 1, lrn: bool = True, seed: int = 0, planes: int = 3
) -> onnx.ModelProto:
    """A two-module Inception net with LRN, MaxPool, Concat, GAP and Gemm.

    Args:
        batch: 1, or a name for a dynamic first dimension.
        lrn: Whether an LRN node follows the first convolution.
        seed: Seed of the weights.
        planes: Channels of the input.
    """
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def node(op: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(oh.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(name: str, values: FloatArray) -> str:
        weights.append(onh.from_array(values.astype(np.float32), name))
        return name

    def conv(x: str, name: str, cin: int, cout: int, kernel: int) -> str:
        scale = np.sqrt(2.0 / (cin * kernel * kernel))
        weight = rng.normal(scale=scale, size=(cout, cin, kernel, kernel))
        w = constant(f"{name}.weight", weight)
        b = constant(f"{name}.bias", rng.normal(scale=0.1, size=cout))
        pads = [kernel // 2] * 4
        y = node("Conv", [x, w, b], f"{name}.conv", kernel_shape=[kernel, kernel], pads=pads)
        return node("Relu", [y], f"{name}.relu")

    def module(x: str, name: str, cin: int) -> str:
        pool = node(
            "MaxPool", [x], f"{name}.pool", kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1]
        )
        branches = [
            conv(x, f"{name}.b1", cin, 8, 1),
            conv(conv(x, f"{name}.b2a", cin, 8, 1), f"{name}.b2b", 8, 16, 3),
            conv(conv(x, f"{name}.b3a", cin, 8, 1), f"{name}.b3b", 8, 16, 3),
            conv(pool, f"{name}.b4", cin, 8, 1),
        ]
        return node("Concat", branches, f"{name}.cat", axis=1)

    x = conv("input", "stem", planes, 16, 3)
    if lrn:
        x = node("LRN", [x], "lrn", size=5, alpha=1e-4, beta=0.75, bias=1.0)
    x = conv(x, "reduce", 16, 16, 1)
    x = node("MaxPool", [x], "pool1", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    x = module(x, "a", 16)
    x = node("MaxPool", [x], "pool2", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    x = module(x, "b", 48)
    x = node("GlobalAveragePool", [x], "gap")
    x = node("Flatten", [x], "flat", axis=1)
    w = constant("fc.weight", rng.normal(scale=0.5, size=(CLASSES, 48)))
    b = constant("fc.bias", rng.normal(scale=0.1, size=CLASSES))
    node("Gemm", [x, w, b], "logits", transB=1)
    graph = oh.make_graph(
        nodes,
        "tiny",
        [oh.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [batch, planes, SIDE, SIDE])],
        [oh.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [batch, CLASSES])],
        weights,
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def quantize(
    model: onnx.ModelProto,
    images: FloatArray,
    activations: Literal["u8", "s8"] = "u8",
    weight_bits: int = 8,
) -> onnx.ModelProto:
    """The Q/DQ form of a float net, with ranges from `images`.

    Q/DQ on every activation that feeds a Conv, Gemm, MaxPool or Concat and on what the last two
    give; one scale for the whole of a Concat and through MaxPool; a ReLU stays in front of its
    Q/DQ; weights int8 per channel; bias float.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    constants = {tensor.name: onh.to_array(tensor) for tensor in graph.initializer}
    pure = ("MaxPool", "Concat")

    def wants(name: str) -> bool:
        users = consumers.get(name, [])
        if name in constants or (len(users) == 1 and users[0].op_type == "Relu"):
            return False
        return any(
            u.op_type in ("Conv", "Gemm", *pure) and (u.op_type in pure or u.input[0] == name)
            for u in users
        )

    tensors = [graph.input[0].name, *(o for n in graph.node for o in n.output)]
    pure_outputs = {o for n in graph.node if n.op_type in pure for o in n.output}
    chosen = [name for name in tensors if wants(name) or name in pure_outputs]
    parent = {name: name for name in chosen}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for node in graph.node:
        if node.op_type in pure:
            for name in node.input:
                parent[root(name)] = root(node.output[0])
    ranges = _ranges(model, chosen, images)
    limits: dict[str, tuple[float, float]] = {}
    for name in chosen:
        low, high = limits.get(root(name), (0.0, 0.0))
        limits[root(name)] = (min(low, ranges[name][0]), max(high, ranges[name][1]))

    extra: list[onnx.TensorProto] = []
    before: list[onnx.NodeProto] = []
    after: dict[str, list[onnx.NodeProto]] = {}
    for name in chosen:
        low, high = limits[root(name)]
        if activations == "u8":
            scale = max(high - low, 1e-6) / 255
            zero = np.array(np.clip(round(-low / scale), 0, 255), np.uint8)
        else:
            scale, zero = max(high, -low, 1e-6) / 127, np.array(0, np.int8)
        extra.append(onh.from_array(np.array(scale, np.float32), f"{name}_scale"))
        extra.append(onh.from_array(zero, f"{name}_zero_point"))
        after[name] = _pair(name, f"{name}_scale", f"{name}_zero_point")
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in after and node.op_type != "Relu":
                node.input[index] = f"{name}_dq"
        if node.op_type in ("Conv", "Gemm"):
            values = constants[node.input[1]]
            top = 2 ** (weight_bits - 1) - 1
            peak = np.abs(values.reshape(len(values), -1)).max(1)
            scales = (np.maximum(peak, 1e-8) / top).astype(np.float32)
            shape = (-1, *[1] * (values.ndim - 1))
            integers = np.clip(np.rint(values / scales.reshape(shape)), -top, top).astype(np.int8)
            name = node.input[1]
            extra += [
                onh.from_array(integers, f"{name}_q"),
                onh.from_array(scales, f"{name}_scale"),
                onh.from_array(np.zeros(len(scales), np.int8), f"{name}_zero_point"),
            ]
            inputs = [f"{name}_q", f"{name}_scale", f"{name}_zero_point"]
            before.append(oh.make_node("DequantizeLinear", inputs, [f"{name}_dq"], axis=0))
            node.input[1] = f"{name}_dq"
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    nodes = [*before, *after.get(graph.input[0].name, [])]
    for node in graph.node:
        nodes.append(node)
        nodes.extend(pair for output in node.output for pair in after.get(output, []))
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *extra])
    onnx.checker.check_model(model, full_check=True)
    return model


def save(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def _pair(name: str, scale: str, zero: str) -> list[onnx.NodeProto]:
    return [
        oh.make_node("QuantizeLinear", [name, scale, zero], [f"{name}_q"]),
        oh.make_node("DequantizeLinear", [f"{name}_q", scale, zero], [f"{name}_dq"]),
    ]


def _ranges(
    model: onnx.ModelProto, names: list[str], images: FloatArray
) -> dict[str, tuple[float, float]]:
    """Least and greatest value of each tensor over `images`."""
    graph_input = model.graph.input[0].name
    traced = onnx.ModelProto.FromString(model.SerializeToString())
    listed = [name for name in names if name != graph_input]
    del traced.graph.output[:]
    traced.graph.output.extend(onnx.ValueInfoProto(name=name) for name in listed)
    traced = onnx.shape_inference.infer_shapes(traced)
    for value in traced.graph.output:
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        traced.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    ranges = {graph_input: (float(images.min()), float(images.max()))}
    for image in images:
        for name, value in zip(
            listed, session.run(listed, {graph_input: image[None]}), strict=True
        ):
            low, high = ranges.get(name, (np.inf, -np.inf))
            ranges[name] = (min(low, float(value.min())), max(high, float(value.max())))
    return ranges
