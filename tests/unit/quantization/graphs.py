"""Small ONNX graphs, built node by node."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from gnet_opt.quantization import Recipe, calibrate, quantize
from gnet_opt.target import Scheme

U8 = Scheme(activations="u8", symmetric=False, weight_bits=8)
U8_PAIRS = Scheme(activations="u8", symmetric=False, weight_bits=8, saturating_pairs=True)
U8_7 = Scheme(activations="u8", symmetric=False, weight_bits=7)
U8_S8 = Scheme(activations="u8", symmetric=False, weight_bits=8, signed="s8")
S8 = Scheme(activations="s8", symmetric=True, weight_bits=8)
SCHEMES = {"u8/8": U8, "u8/7": U8_7, "u8/pairs": U8_PAIRS, "u8+s8/8": U8_S8, "s8/8": S8}


def to_int8(
    model: Path,
    out: Path,
    images: Iterable[np.ndarray],
    scheme: Scheme,
    *,
    threads: int | None = None,
    **recipe: Any,
) -> dict[str, Any]:
    """Calibrate and quantize in one step."""
    return quantize(model, out, calibrate(model, images, threads=threads), scheme, Recipe(**recipe))


class Graph:
    """A float graph in the making; every method adds a node and returns its output's name."""

    def __init__(self, channels: int = 3, size: int = 32, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.channels = {"input": channels}
        self.size = size

    def add(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        node = helper.make_node(operator, inputs, [f"{name}_out"], name=name, **attributes)
        self.nodes.append(node)
        self.channels[f"{name}_out"] = self.channels[inputs[0]]
        return f"{name}_out"

    def constant(self, name: str, values: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(values, name))
        return name

    def conv(
        self,
        data: str,
        channels: int,
        name: str,
        *,
        kernel: int = 1,
        bias: bool = True,
        **rest: Any,
    ) -> str:
        inputs = self.channels[data] // rest.get("group", 1)
        shape = (channels, inputs, kernel, kernel)
        values = self.random.normal(size=shape) * (2 / np.prod(shape[1:])) ** 0.5
        names = [data, self.constant(f"{name}.weight", values.astype(np.float32))]
        if bias:
            offsets = self.random.uniform(-0.1, 0.1, channels).astype(np.float32)
            names.append(self.constant(f"{name}.bias", offsets))
        self.add("Conv", names, name, pads=[kernel // 2] * 4, **rest)
        self.channels[f"{name}_out"] = channels
        return f"{name}_out"

    def relu(self, data: str) -> str:
        return self.add("Relu", [data], f"{data.removesuffix('_out')}.relu")

    def block(self, data: str, channels: int, name: str, kernel: int = 1, **rest: Any) -> str:
        return self.relu(self.conv(data, channels, name, kernel=kernel, **rest))

    def pool(self, data: str, name: str, kernel: int = 3, stride: int = 1) -> str:
        pads = [kernel // 2] * 4
        shape = [kernel] * 2
        return self.add(
            "MaxPool", [data], name, kernel_shape=shape, pads=pads, strides=[stride] * 2
        )

    def lrn(self, data: str, name: str) -> str:
        return self.add("LRN", [data], name, size=5, alpha=0.1, beta=0.75, bias=1.0)

    def concat(self, parts: list[str], name: str) -> str:
        self.add("Concat", parts, name, axis=1)
        self.channels[f"{name}_out"] = sum(self.channels[part] for part in parts)
        return f"{name}_out"

    def inception(self, data: str, name: str, width: int = 8) -> str:
        branches = [
            self.block(data, width, f"{name}.1x1"),
            self.block(self.block(data, width // 2, f"{name}.3a"), width, f"{name}.3b", kernel=3),
            self.block(self.block(data, width // 4, f"{name}.5a"), width, f"{name}.5b", kernel=5),
            self.block(self.pool(data, f"{name}.pool"), width, f"{name}.proj"),
        ]
        return self.concat(branches, f"{name}.concat")

    def gemm(self, data: str, outputs: int, name: str = "fc") -> str:
        shape = (outputs, self.channels[data])
        values = self.random.normal(size=shape) * (1 / shape[1]) ** 0.5
        weight = self.constant(f"{name}.weight", values.astype(np.float32))
        bias = self.constant(f"{name}.bias", np.zeros(outputs, np.float32))
        self.add("Gemm", [data, weight, bias], name, transB=1)
        self.channels[f"{name}_out"] = outputs
        return f"{name}_out"

    def save(self, path: Path, output: str) -> Path:
        shape = [1, self.channels["input"], self.size, self.size]
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
        return path


def googlenet_like(path: Path, *, seed: int = 0, classes: int = 7) -> Path:
    """The parts of GoogLeNet in their order: stem with LRN, two modules, pools, classifier."""
    graph = Graph(seed=seed)
    data = graph.block("input", 16, "conv1", kernel=7, strides=[2, 2])
    data = graph.pool(data, "pool1", stride=2)
    data = graph.lrn(data, "norm1")
    data = graph.block(data, 16, "conv2", kernel=3)
    data = graph.inception(data, "3a")
    data = graph.pool(data, "pool3", stride=2)
    data = graph.inception(data, "4a")
    data = graph.add("GlobalAveragePool", [data], "average")
    data = graph.add("Flatten", [data], "flatten")
    return graph.save(path, graph.gemm(data, classes))


def pictures(count: int, size: int = 32, seed: int = 0) -> list[np.ndarray]:
    """Smooth pictures with noise, normalised: float32 of shape (3, size, size) each."""
    random = np.random.default_rng(seed)
    coarse = random.normal(size=(count, 3, 4, 4)).repeat(size // 4, 2).repeat(size // 4, 3)
    return list((coarse + 0.3 * random.normal(size=(count, 3, size, size))).astype(np.float32))


def run(path: Path, images: list[np.ndarray]) -> np.ndarray:
    """Reference semantics: every node by itself."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": image[None]})[0] for image in images])
