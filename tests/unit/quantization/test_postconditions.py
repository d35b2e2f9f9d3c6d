from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import S8, U8, U8_7, Graph, pictures, to_int8
from onnx import helper, numpy_helper

from gnet_opt.errors import ModelError
from gnet_opt.quantization.postconditions import check
from gnet_opt.target import Scheme

Change = Callable[["Mutant"], object]


class Mutant:
    """A quantized file, and ways to spoil it."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        self.graph = self.model.graph

    def node(self, name: str) -> onnx.NodeProto:
        return next(node for node in self.graph.node if node.name == name)

    def writer(self, tensor: str) -> onnx.NodeProto:
        return next(node for node in self.graph.node if tensor in node.output)

    def constant(self, name: str) -> np.ndarray:
        found = next(value for value in self.graph.initializer if value.name == name)
        return numpy_helper.to_array(found)

    def add_constant(self, name: str, values: np.ndarray) -> str:
        self.graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    def replace_constant(self, name: str, values: np.ndarray) -> None:
        for value in self.graph.initializer:
            if value.name == name:
                value.CopyFrom(numpy_helper.from_array(values, name))

    def pair_before(self, name: str, index: int = 0) -> list[onnx.NodeProto]:
        """The Q and DQ that an input of a node comes through; only DQ for a constant."""
        dequantize = self.writer(self.node(name).input[index])
        writers = [node for node in self.graph.node if dequantize.input[0] in node.output]
        return [*writers, dequantize]

    def rescale(self, name: str, index: int, factor: float) -> None:
        """Give a pair a scale of its own, another one."""
        pair = self.pair_before(name, index)
        old = self.constant(pair[0].input[1])
        scale = self.add_constant(f"{name}.{index}.scale", np.asarray(old * np.float32(factor)))
        for node in pair:
            node.input[1] = scale

    def rezero(self, name: str, zero: np.ndarray) -> None:
        fresh = self.add_constant(f"{name}.zero", zero)
        del self.graph.value_info[:]  # the types noted there
        for node in self.pair_before(name):
            node.input[2] = fresh


def make(folder: Path, scheme: Scheme) -> Path:
    graph = Graph(size=16)
    data = graph.block("input", 4, "stem", kernel=3)
    parts = [graph.block(data, 4, "left"), graph.pool(graph.block(data, 4, "right"), "pool")]
    data = graph.block(graph.concat(parts, "cat"), 4, "after")
    data = graph.add("Flatten", [graph.add("GlobalAveragePool", [data], "average")], "flatten")
    path = graph.save(folder / "float.onnx", graph.gemm(data, 5))
    to_int8(path, folder / "int8.onnx", pictures(3, 16), scheme, threads=1)
    return folder / "int8.onnx"


def spoiled(folder: Path, scheme: Scheme, change: Change) -> Path:
    mutant = Mutant(make(folder, scheme))
    change(mutant)
    path = folder / "spoiled.onnx"
    onnx.save(mutant.model, path)
    return path


def drop_data_dequantize(m: Mutant) -> None:
    m.node("after").input[0] = "cat_out"


def unequal_pair(m: Mutant) -> None:
    _, dequantize = m.pair_before("after")
    scale = m.constant(dequantize.input[1])
    dequantize.input[1] = m.add_constant("other", np.asarray(scale * np.float32(2)))


def float_weight(m: Mutant) -> None:
    weight = np.ones((4, 8, 1, 1), np.float32)
    m.node("after").input[1] = m.add_constant("float.weight", weight)


def float_gemm_weight(m: Mutant) -> None:
    m.node("fc").input[1] = m.add_constant("float.weight", np.ones((5, 4), np.float32))


def eight_bits(m: Mutant) -> None:
    name = m.pair_before("left", 1)[0].input[0]
    weight = m.constant(name).copy()
    weight.ravel()[3] = -65
    m.replace_constant(name, weight)


def minus_128(m: Mutant) -> None:
    name = m.pair_before("left", 1)[0].input[0]
    weight = m.constant(name).copy()
    weight.ravel()[3] = -128
    m.replace_constant(name, weight)


def unsigned_weight(m: Mutant) -> None:
    dequantize = m.pair_before("left", 1)[0]
    shape = m.constant(dequantize.input[0]).shape
    dequantize.input[0] = m.add_constant("u8", np.ones(shape, np.uint8))
    dequantize.input[2] = m.add_constant("u8.zero", np.zeros(shape[0], np.uint8))


def weight_zero_point(m: Mutant) -> None:
    dequantize = m.pair_before("left", 1)[0]
    zero = m.constant(dequantize.input[2]).copy()
    zero[2] = 1
    dequantize.input[2] = m.add_constant("w.zero", zero)


def integer_bias(m: Mutant) -> None:
    integers = m.add_constant("bias.integers", np.ones(4, np.int32))
    scale = m.add_constant("bias.scale", np.float32(0.1))
    node = helper.make_node("DequantizeLinear", [integers, scale], ["bias.float"])
    m.graph.node.insert(0, node)
    m.node("after").input[2] = "bias.float"


def weight_scale_for_all(m: Mutant) -> None:
    dequantize = m.pair_before("right", 1)[0]
    dequantize.input[1] = m.add_constant("one.scale", np.float32(0.01))
    dequantize.input[2] = m.add_constant("one.zero", np.int8(0))
    del dequantize.attribute[:]


def weight_scales_of_inputs(m: Mutant) -> None:
    dequantize = m.pair_before("right", 1)[0]  # four inputs, four outputs: only the axis differs
    dequantize.attribute[0].i = 1


def zero_scale(m: Mutant) -> None:
    m.rescale("after", 0, 0.0)


def negative_weight_scale(m: Mutant) -> None:
    dequantize = m.pair_before("left", 1)[0]
    scale = m.constant(dequantize.input[1]).copy()
    scale[1] *= -1
    dequantize.input[1] = m.add_constant("negative", scale)


def infinite_weight_scale(m: Mutant) -> None:
    dequantize = m.pair_before("left", 1)[0]
    scale = m.constant(dequantize.input[1]).copy()
    scale[1] = np.inf
    dequantize.input[1] = m.add_constant("infinite", scale)


FAULTS: list[tuple[Scheme, Change, str, str]] = [
    (U8, drop_data_dequantize, "Conv after", "its data is not dequantized"),
    (U8, unequal_pair, "Conv after", "its data is not dequantized"),
    (U8, float_weight, "Conv after", "its weight is not dequantized"),
    (U8, float_gemm_weight, "Gemm fc", "its weight is not dequantized"),
    (U8_7, eight_bits, "Conv left", "its weight reaches 65, beyond 64"),
    (U8, minus_128, "Conv left", "its weight reaches 128, beyond 127"),
    (U8, unsigned_weight, "Conv left", "its weight is not an int8 constant"),
    (U8, weight_zero_point, "Conv left", "its weight has a zero point other than 0"),
    (U8, integer_bias, "Conv after", "its bias is not a float constant"),
    (
        U8,
        weight_scale_for_all,
        "Conv right",
        "its weight has not one scale an output channel",
    ),
    (
        U8,
        weight_scales_of_inputs,
        "Conv right",
        "its weight has not one scale an output channel",
    ),
    (U8, zero_scale, "Conv after", "a scale of its data is not positive and finite"),
    (U8, negative_weight_scale, "Conv left", "a scale of its weight is not positive and finite"),
    (U8, infinite_weight_scale, "Conv left", "a scale of its weight is not positive and finite"),
    (
        S8,
        lambda m: m.rezero("after", np.asarray(3, np.int8)),
        "Conv after",
        "its data has a zero point other than 0",
    ),
    (
        U8,
        lambda m: m.rezero("after", np.asarray(0, np.int8)),
        "Conv after",
        "its data is int8, not uint8",
    ),
    (
        S8,
        lambda m: m.rezero("after", np.asarray(0, np.uint8)),
        "Conv after",
        "its data is uint8, not int8",
    ),
    (
        U8,
        lambda m: m.rescale("cat", 0, 1.5),
        "Concat cat",
        "its inputs and output do not share one scale",
    ),
    (
        U8,
        lambda m: m.rescale("pool", 0, 1.5),
        "MaxPool pool",
        "its inputs and output do not share one scale",
    ),
    (
        U8,
        lambda m: m.rescale("after", 0, 1.5),
        "Concat cat",
        "its inputs and output do not share one scale",
    ),
    (
        S8,
        lambda m: m.node("cat").input.__setitem__(0, "left.relu_out"),
        "Concat cat",
        "its inputs and output do not share one scale",
    ),
]


@pytest.mark.parametrize(
    ("scheme", "change", "node", "fault"),
    FAULTS,
    ids=[f"{index}: {node}: {fault}" for index, (_, _, node, fault) in enumerate(FAULTS)],
)
def test_a_seeded_fault_is_found(
    tmp_path: Path, scheme: Scheme, change: Change, node: str, fault: str
) -> None:
    path = spoiled(tmp_path, scheme, change)
    with pytest.raises(ModelError) as caught:
        check(path, scheme)
    assert str(caught.value) == (
        f"{path}: the {node} is not quantized as intended: {fault}. "
        "This is a fault of gnet-opt; please report it with the model."
    )


def test_a_file_that_the_checker_refuses(tmp_path: Path) -> None:
    def spoil(m: Mutant) -> None:
        m.node("stem").op_type = "NoSuchOperator"

    path = spoiled(tmp_path, U8, spoil)
    with pytest.raises(ModelError) as caught:
        check(path, U8)
    assert str(caught.value).startswith(f"{path} is no valid ONNX model: ")


@pytest.mark.parametrize(
    "scheme", [U8, U8_7, S8, replace(U8, per_channel=False), replace(S8, symmetric=False)]
)
def test_what_quantize_writes_passes(tmp_path: Path, scheme: Scheme) -> None:
    facts = check(make(tmp_path, scheme), scheme)
    assert (facts["conv"], facts["gemm"]) == (4, 1)
    assert facts["shared_scales"] == 2  # the Concat and the MaxPool
    assert facts["macs_int8_share"] == 1.0
    assert facts["macs"] == 16 * 16 * (4 * 3 * 9 + 4 * 4 + 4 * 4 + 4 * 8) + 5 * 4


def test_the_scheme_of_another_target_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path, U8)
    for other in (S8, U8_7):
        with pytest.raises(ModelError, match="is not quantized as intended"):
            check(path, other)
