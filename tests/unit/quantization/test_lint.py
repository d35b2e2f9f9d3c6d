from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import S8, Graph, googlenet_like, pictures, to_int8
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from test_postconditions import Mutant, make

from conformance import models
from data import shared_data
from gnet_opt.backends._tensorrt8 import for_tensorrt8
from gnet_opt.errors import ConfigError, ModelError
from gnet_opt.quantization import calibrate, quantize
from gnet_opt.quantization.lint import RULES, Finding, lint
from gnet_opt.target import Scheme

Change = Callable[["Fault"], object]
PER_TENSOR = replace(S8, per_channel=False)


class Fault(Mutant):
    """A correct file for TensorRT, and more ways to spoil it."""

    def remove(self, *nodes: onnx.NodeProto) -> None:
        for node in nodes:
            self.graph.node.remove(node)

    def insert_before(self, name: str, *nodes: onnx.NodeProto) -> None:
        index = [node.name for node in self.graph.node].index(name)
        for node in reversed(nodes):
            self.graph.node.insert(index, node)

    def opset(self, version: int) -> None:
        self.model.opset_import[0].version = version

    def bias(self, values: np.ndarray) -> None:
        """Read the bias of `after` through a DequantizeLinear."""
        integers = self.add_constant("bias.integers", values)
        scale = self.add_constant("bias.scale", np.float32(0.1))
        node = helper.make_node("DequantizeLinear", [integers, scale], ["bias.float"])
        self.insert_before("after", node)
        self.node("after").input[2] = "bias.float"

    def weight(self, name: str, **constants: np.ndarray) -> onnx.NodeProto:
        """Give the DequantizeLinear of a weight other constants."""
        (dequantize,) = self.pair_before(name, 1)
        for index, key in enumerate(("integers", "scale", "zero")):
            if key in constants:
                dequantize.input[index] = self.add_constant(f"{name}.{key}", constants[key])
        return dequantize

    def to_float(self, name: str, *indices: int) -> None:
        """Let a node read float tensors again, where it reads dequantized ones."""
        for index in indices:
            pair = self.pair_before(name, index)
            first = pair[0].input[0]
            if len(pair) == 1:
                shape = self.constant(first).shape
                first = self.add_constant(f"{name}.float", np.ones(shape, np.float32))
            self.node(name).input[index] = first
            self.remove(*pair)


def quantized_convolution(m: Fault) -> None:
    (quantize_, dequantize), (weight,) = m.pair_before("after"), m.pair_before("after", 1)
    scale, zero = quantize_.input[1:]
    inputs = [quantize_.output[0], scale, zero, *weight.input, scale, zero]
    m.insert_before(
        "after",
        helper.make_node("QLinearConv", inputs, ["after_integers"], name="integer"),
        helper.make_node("DequantizeLinear", ["after_integers", scale, zero], ["after_out"]),
    )
    m.remove(m.node("after"), dequantize, weight)


def foreign_operator(m: Fault) -> None:
    node = m.node("after.relu")
    node.domain, node.op_type = "com.microsoft", "QuickGelu"
    m.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def no_zero_point(m: Fault) -> None:
    del m.graph.value_info[:]
    for node in m.pair_before("after"):
        del node.input[2]


def sixteen_bits(m: Fault) -> None:
    m.opset(21)
    m.rezero("after", np.asarray(0, np.int16))


def four_bits(m: Fault) -> None:
    m.opset(21)
    tensor = helper.make_tensor("nibbles", TensorProto.INT4, [4, 4, 1, 1], [1] * 16)
    m.graph.initializer.append(tensor)
    dequantize = m.weight("left")
    dequantize.input[0] = "nibbles"
    del dequantize.input[2]


def unsigned_weight(m: Fault) -> None:
    m.weight("left", integers=np.ones((4, 4, 1, 1), np.uint8), zero=np.zeros(4, np.uint8))


def scale_of_a_weight(value: float) -> Change:
    def change(m: Fault) -> None:
        scale = m.constant(m.weight("left").input[1]).copy()
        scale[1] = value
        m.weight("left", scale=scale)

    return change


def computed_scale(m: Fault) -> None:
    quantize_, dequantize = m.pair_before("stem")
    step = m.add_constant("step", np.float32(1 / 127))
    m.insert_before(
        quantize_.name,
        helper.make_node("Abs", ["input"], ["sizes"]),
        helper.make_node("ReduceMax", ["sizes"], ["largest"], keepdims=0),
        helper.make_node("Mul", ["largest", step], ["computed"]),
    )
    quantize_.input[1] = dequantize.input[1] = "computed"


def computed_zero_point(m: Fault) -> None:
    quantize_, dequantize = m.pair_before("after")
    m.insert_before(quantize_.name, helper.make_node("Abs", [quantize_.input[2]], ["computed"]))
    quantize_.input[2] = dequantize.input[2] = "computed"


def scale_a_channel(m: Fault) -> None:
    scale = m.add_constant("scales", np.full(8, 0.1, np.float32))
    m.rezero("after", np.zeros(8, np.int8))
    for node in m.pair_before("after"):
        node.input[1] = scale


def scales_of_input_channels(m: Fault) -> None:
    m.weight("right").attribute[0].i = 1  # four inputs, four outputs: only the axis differs


def scales_of_gemm_inputs(m: Fault) -> None:
    scale, zero = np.full(4, 0.01, np.float32), np.zeros(4, np.int8)
    m.weight("fc", scale=scale, zero=zero).attribute[0].i = 1


def too_few_scales(m: Fault) -> None:
    m.weight("left", scale=np.full(3, 0.01, np.float32), zero=np.zeros(3, np.int8))


def scales_of_blocks(m: Fault) -> None:
    m.opset(21)
    shape = (4, 2, 1, 1)
    node = m.weight("left", scale=np.full(shape, 0.01, np.float32), zero=np.zeros(shape, np.int8))
    node.attribute[0].i = 1
    node.attribute.append(helper.make_attribute("block_size", 2))


def other_scale_behind(m: Fault) -> None:
    _, dequantize = m.pair_before("after")
    scale = m.constant(dequantize.input[1])
    dequantize.input[1] = m.add_constant("other", np.asarray(scale * np.float32(2)))


def integer_pool(m: Fault) -> None:
    del m.graph.value_info[:]
    quantize_, dequantize = m.pair_before("pool")
    m.node("pool").input[0] = quantize_.output[0]
    after, last = m.pair_before("cat", 1)
    last.input[0] = "pool_out"
    m.remove(dequantize, after)


def cast_integers(m: Fault) -> None:
    del m.graph.value_info[:]
    quantize_, dequantize = m.pair_before("after")
    node = helper.make_node("Cast", [quantize_.input[0]], ["integers"], to=TensorProto.INT8)
    m.insert_before(quantize_.name, node)
    dequantize.input[0] = "integers"
    m.remove(quantize_)


def unread_integers(m: Fault) -> None:
    _, *parameters = m.pair_before("after")[0].input
    node = helper.make_node("QuantizeLinear", ["left_out", *parameters], ["x"], name="unread")
    m.graph.node.append(node)


def unread_result(m: Fault) -> None:
    quantize_, dequantize = m.pair_before("after")
    inputs = [quantize_.output[0], *dequantize.input[1:]]
    m.graph.node.append(helper.make_node("DequantizeLinear", inputs, ["x"], name="unread"))


def pair_before_the_relu(m: Fault) -> None:
    _, *parameters = m.pair_before("after")[0].input
    m.insert_before(
        "after.relu",
        helper.make_node("QuantizeLinear", ["after_out", *parameters], ["q"]),
        helper.make_node("DequantizeLinear", ["q", *parameters], ["dq"]),
    )
    m.node("after.relu").input[0] = "dq"


CAT_Q, CAT_DQ = "cat_out/QuantizeLinear", "cat_out/DequantizeLinear"
LEFT_DQ = "left.weight/left/DequantizeLinear"

FAULTS: dict[str, tuple[Change, str, str, str]] = {
    "opset": (lambda m: m.opset(25), "opset", "", "the file has opset 25"),
    "QLinearConv": (
        quantized_convolution,
        "operator-form",
        "integer",
        "QLinearConv computes on integers itself",
    ),
    "com.microsoft": (
        foreign_operator,
        "operator-form",
        "after.relu",
        "com.microsoft.QuickGelu is an operator of ONNX Runtime alone",
    ),
    "int32 bias": (
        lambda m: m.bias(np.ones(4, np.int32)),
        "integer-bias",
        "after",
        "its bias is int32 behind a DequantizeLinear",
    ),
    "int8 bias": (
        lambda m: m.bias(np.ones(4, np.int8)),
        "dequantized-bias",
        "after",
        "its bias is int8 behind a DequantizeLinear",
    ),
    "uint8": (
        lambda m: m.rezero("after", np.asarray(0, np.uint8)),
        "activation-type",
        CAT_Q,
        "its integers are uint8",
    ),
    "uint8, asymmetric": (
        lambda m: m.rezero("after", np.asarray(128, np.uint8)),
        "activation-type",
        CAT_Q,
        "its integers are uint8",
    ),
    "no zero point": (
        no_zero_point,
        "activation-type",
        CAT_Q,
        "it has no zero point, which in ONNX means uint8",
    ),
    "int16": (sixteen_bits, "activation-type", CAT_Q, "its integers are int16"),
    "int4 weight": (four_bits, "weight-type", LEFT_DQ, "its integers are int4"),
    "uint8 weight": (unsigned_weight, "weight-type", LEFT_DQ, "its integers are uint8"),
    "zero point": (
        lambda m: m.rezero("after", np.asarray(3, np.int8)),
        "zero-point",
        CAT_Q,
        "its zero point is 3",
    ),
    "zero point of a weight": (
        lambda m: m.weight("left", zero=np.array([0, 1, 0, -1], np.int8)),
        "zero-point",
        LEFT_DQ,
        "its zero point is 1 (and 1 others)",
    ),
    "scale 0": (lambda m: m.rescale("after", 0, 0.0), "scale-value", CAT_Q, "its scale is 0"),
    "negative scale": (scale_of_a_weight(-1.0), "scale-value", LEFT_DQ, "its scale is -1"),
    "infinite scale": (scale_of_a_weight(np.inf), "scale-value", LEFT_DQ, "its scale is inf"),
    "scale not a number": (scale_of_a_weight(np.nan), "scale-value", LEFT_DQ, "its scale is nan"),
    "computed scale": (
        computed_scale,
        "computed-parameter",
        "input/QuantizeLinear",
        "its scale is computed from the input of the model",
    ),
    "computed zero point": (
        computed_zero_point,
        "computed-parameter",
        CAT_Q,
        "its zero point is computed while the model runs",
    ),
    "per-channel activation": (
        scale_a_channel,
        "activation-scales",
        CAT_Q,
        "an activation has 8 scales",
    ),
    "axis of a Conv": (
        scales_of_input_channels,
        "weight-axis",
        "right",
        "the scales of its weight are along axis 1, not 0",
    ),
    "axis of a Gemm": (
        scales_of_gemm_inputs,
        "weight-axis",
        "fc",
        "the scales of its weight are along axis 1, not 0",
    ),
    "too few scales": (
        too_few_scales,
        "weight-scales",
        "left",
        "its weight has 3 scales for shape 4x4x1x1",
    ),
    "blocks": (scales_of_blocks, "weight-scales", "left", "its weight has 8 scales of blocks"),
    "unequal pair": (
        other_scale_behind,
        "unequal-pair",
        CAT_DQ,
        f"its scale or zero point is not that of the QuantizeLinear {CAT_Q} in front of it",
    ),
    "integer pool": (
        integer_pool,
        "integer-tensor",
        "right.relu_out/QuantizeLinear",
        "its integers go to MaxPool, not to a DequantizeLinear",
    ),
    "cast": (
        cast_integers,
        "integer-tensor",
        CAT_DQ,
        "its integers come from Cast, not from a QuantizeLinear",
    ),
    "unread integers": (unread_integers, "unread", "unread", "nothing reads its result"),
    "unread result": (unread_result, "unread", "unread", "nothing reads its result"),
    "pair before a ReLU": (
        pair_before_the_relu,
        "split-fusion",
        "after",
        "its result is quantized before the Relu that reads it",
    ),
    "unequal Concat": (
        lambda m: m.rescale("cat", 0, 1.5),
        "unequal-concat",
        "cat",
        "its inputs have different scales: ",
    ),
    "partly quantized Concat": (
        lambda m: m.to_float("cat", 0),
        "partial-concat",
        "cat",
        "1 of its 2 inputs are float: left.relu_out",
    ),
    "float data": (
        lambda m: m.to_float("stem", 0),
        "half-quantized",
        "stem",
        "its weight input is dequantized and its data input is float",
    ),
    "float weight": (
        lambda m: m.to_float("after", 1),
        "half-quantized",
        "after",
        "its data input is dequantized and its weight input is float",
    ),
    "float layer": (
        lambda m: m.to_float("stem", 0, 1),
        "float-layer",
        "stem",
        f"it stays in float, with {16 * 16 * 4 * 3 * 9:,} multiply-accumulates",
    ),
}


def spoiled(folder: Path, change: Change, scheme: Scheme = S8) -> Path:
    fault = Fault(make(folder, scheme))
    change(fault)
    onnx.checker.check_model(fault.model, full_check=True)
    onnx.save(fault.model, folder / "spoiled.onnx")
    return folder / "spoiled.onnx"


def brief(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.rule, finding.node) for finding in findings]


@pytest.mark.parametrize(("change", "rule", "node", "problem"), FAULTS.values(), ids=FAULTS)
def test_a_seeded_fault_and_nothing_else_is_found(
    tmp_path: Path, change: Change, rule: str, node: str, problem: str
) -> None:
    found = lint(spoiled(tmp_path, change))
    assert brief(found) == [(rule, node)]
    assert found[0].problem.startswith(problem)
    stated = next(one for one in RULES if one.name == rule)
    assert found[0].to_dict() == {
        "mend": stated.mend,
        "node": node,
        "operator": found[0].operator,
        "problem": found[0].problem,
        "rule": rule,
        "severity": stated.severity,
        "source": stated.source,
    }


def test_every_rule_has_a_seeded_fault_and_a_source() -> None:
    assert {rule for _, rule, _, _ in FAULTS.values()} == {rule.name for rule in RULES}
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.source.startswith(("https://", "tried: ")) for rule in RULES)
    assert all(rule.mend.endswith(".") for rule in RULES)
    severities = [rule.severity for rule in RULES]
    assert severities == sorted(severities)  # errors first


def test_faults_in_one_file_are_all_found_errors_first(tmp_path: Path) -> None:
    def change(m: Fault) -> None:
        m.rescale("cat", 0, 1.5)
        m.bias(np.ones(4, np.int32))
        unsigned_weight(m)

    assert brief(lint(spoiled(tmp_path, change))) == [
        ("integer-bias", "after"),
        ("weight-type", LEFT_DQ),
        ("unequal-concat", "cat"),
    ]


@pytest.mark.parametrize("version", [10, 12, 24])
def test_opsets_that_tensorrt_reads(tmp_path: Path, version: int) -> None:
    assert lint(spoiled(tmp_path, lambda m: m.opset(version), PER_TENSOR)) == []


def test_a_scale_computed_from_constants_is_a_constant(tmp_path: Path) -> None:
    def change(m: Fault) -> None:
        quantize_, dequantize = m.pair_before("after")
        node = helper.make_node("Abs", [quantize_.input[1]], ["computed"])
        m.insert_before(quantize_.name, node)
        quantize_.input[1] = dequantize.input[1] = "computed"

    assert lint(spoiled(tmp_path, change)) == []


def test_the_pairs_of_onnx_runtime_are_taken_as_those_of_onnx(tmp_path: Path) -> None:
    def change(m: Fault) -> None:
        for node in m.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                node.domain = "com.microsoft"
        m.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))

    assert lint(spoiled(tmp_path, change)) == []
    found = lint(spoiled(tmp_path, lambda m: (change(m), m.bias(np.ones(4, np.int32)))))
    assert brief(found) == [("integer-bias", "after")]


def test_values_that_are_only_moved_stay_integers(tmp_path: Path) -> None:
    """TensorRT moves DequantizeLinear behind a Concat of equal scales."""
    assert lint(spoiled(tmp_path, lambda m: m.to_float("after", 0))) == []


# In a process of its own: TensorRT may end the process where there is no GPU.
BUILD = """
import sys
import tensorrt_rtx as trt

logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
with open(sys.argv[1], "rb") as stream:
    if not parser.parse(stream.read()):
        sys.exit("not parsed")
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM86, 0)
if builder.build_serialized_network(network, config) is None:
    sys.exit("not built")
print("built")
"""
BUILT_ALL_THE_SAME = {
    "opset",  # newer than NVIDIA documents
    "uint8",  # and the integers are cut at 127
    "no zero point",  # the same
    "infinite scale",
    "unequal pair",  # as the file says, which nobody can have meant
    "integer pool",  # NVIDIA documents floats alone
    "cast",  # the same
}
"""Errors that this parser and builder let through."""


@pytest.mark.parametrize("name", FAULTS)
def test_tensorrt_refuses_what_is_an_error_and_builds_what_is_slow(
    name: str, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    change, rule, _, _ = FAULTS[name]
    command = [sys.executable, "-c", BUILD, str(spoiled(tmp_path, change))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    slow = next(one.severity == "slow" for one in RULES if one.name == rule)
    assert (done.stdout == "built\n") == (slow or name in BUILT_ALL_THE_SAME), done.stderr


@pytest.mark.parametrize("scheme", [S8, PER_TENSOR], ids=["per channel", "per tensor"])
def test_nothing_is_found_in_what_quantize_writes(tmp_path: Path, scheme: Scheme) -> None:
    assert lint(make(tmp_path, scheme)) == []
    to_int8(googlenet_like(tmp_path / "f.onnx"), tmp_path / "q.onnx", pictures(4), scheme)
    assert lint(tmp_path / "q.onnx") == []


def test_a_layer_kept_in_float_is_told(tmp_path: Path) -> None:
    to_int8(
        googlenet_like(tmp_path / "f.onnx"),
        tmp_path / "q.onnx",
        pictures(4),
        S8,
        keep_float=frozenset({"3a.3b"}),
    )
    found = lint(tmp_path / "q.onnx")
    assert ("float-layer", "3a.3b") in brief(found)
    assert {finding.severity for finding in found} == {"slow"}


def test_a_float_file(tmp_path: Path) -> None:
    path = googlenet_like(tmp_path / "f.onnx")
    assert lint(path) is None


@pytest.mark.slow
def test_nothing_is_found_in_the_original_network(tmp_path: Path) -> None:
    from gnet_opt.images import ImageSet
    from gnet_opt.operations import export
    from gnet_opt.stages.load import load

    data = shared_data()
    model = load(data / "bvlc_googlenet.toml")
    export(model, tmp_path / "f.onnx")
    files = sorted(ImageSet.open(data / "imagenet-sample").files)[:4]
    seen = calibrate(tmp_path / "f.onnx", [model.preprocess.load(f) for f in files])
    quantize(tmp_path / "f.onnx", tmp_path / "q.onnx", seen, S8)
    assert lint(tmp_path / "q.onnx") == []


class Pictures(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.left = [{"input": image[None]} for image in models.pictures(4)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def by_onnx_runtime(folder: Path, **options: Any) -> Path:
    path = models.save(models.float_net(lrn=False), folder / "float.onnx")
    quantize_static(path, folder / "q.onnx", Pictures(), **options)
    return folder / "q.onnx"


def test_the_defaults_of_onnx_runtime(tmp_path: Path) -> None:
    path = by_onnx_runtime(tmp_path)
    found = lint(path)
    layers = {n.name for n in onnx.load(path).graph.node if n.op_type in ("Conv", "Gemm")}
    assert {node for rule, node in brief(found) if rule == "integer-bias"} == layers
    assert len(layers) == 15
    assert "QuantizeBias" in found[0].mend


def test_what_the_findings_say_to_onnx_runtime_mends_its_file(tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType

    path = by_onnx_runtime(
        tmp_path,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={
            "ActivationSymmetric": True,
            "QuantizeBias": False,
            "WeightSymmetric": True,
        },
    )
    assert {finding.severity for finding in lint(path)} <= {"slow"}


def trained_quantized(folder: Path, axis: int = 0) -> Path:
    """As tools of quantization-aware training export: float weights behind Q/DQ, Constant nodes.

    Args:
        folder: Where to write it.
        axis: Of the scales of the linear layer's weight.
    """
    random = np.random.default_rng(0)
    nodes = []

    def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def constant(name: str, values: Any, kind: type = np.float32) -> str:
        tensor = numpy_helper.from_array(np.asarray(values, kind), name)
        return node("Constant", [], name, value=tensor)

    def fake(x: str, scale: Any, **attributes: Any) -> str:
        zero = constant(f"{x}.zero", np.zeros(np.shape(scale)), np.int8)
        parameters = [constant(f"{x}.scale", scale), node("Identity", [zero], f"{x}.z")]
        q = node("QuantizeLinear", [x, *parameters], f"{x}.q", **attributes)
        return node("DequantizeLinear", [q, *parameters], f"{x}.dq", **attributes)

    w = fake(constant("w", random.normal(size=(4, 3, 1, 1))), [0.1] * 4, axis=0)
    x = node("Conv", [fake("x", 0.1), w], "c")
    x = node("MaxPool", [fake(x, 0.2)], "p", kernel_shape=[2, 2])
    x = node("Conv", [x, fake(constant("v", random.normal(size=(4, 4, 1, 1))), 0.1)], "d")
    x = node("Flatten", [fake(node("GlobalAveragePool", [x], "g"), 0.3)], "f")
    scales = [0.1] * (4, 4)[axis]
    u = fake(constant("u", random.normal(size=(4, 4))), scales, axis=axis)
    node("MatMul", [x, node("Transpose", [u], "t", perm=[1, 0])], "y")
    graph = helper.make_graph(
        nodes,
        "trained",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "trained.onnx")
    return folder / "trained.onnx"


def test_a_file_of_quantization_aware_training(tmp_path: Path) -> None:
    assert lint(trained_quantized(tmp_path)) == []
    found = lint(trained_quantized(tmp_path, axis=1))
    assert brief(found) == [("weight-axis", "y")]
    assert found[0].problem == "the scales of its weight are along axis 1, not 0"


@pytest.mark.parametrize(("operator", "axis"), [("Gemm", 1), ("ConvTranspose", 0)])
def test_the_axis_of_other_layers(tmp_path: Path, operator: str, axis: int) -> None:
    """A Gemm without transB, and a transposed convolution, by NVIDIA's documentation of each."""
    for found in (0, 1):
        graph = Graph(channels=4, size=8)
        data = graph.add("Flatten", ["input"], "f") if operator == "Gemm" else "input"
        shape = (256, 256) if operator == "Gemm" else (4, 4, 1, 1)
        scale = graph.constant("scale", np.full(shape[0], 0.1, np.float32))
        one = graph.constant("one", np.float32(0.1))
        zero = graph.constant("zero", np.int8(0))
        graph.channels["w"] = shape[0]
        weight = graph.add(
            "DequantizeLinear", [graph.constant("w", np.ones(shape, np.int8)), scale], "dw"
        )
        graph.nodes[-1].attribute.append(helper.make_attribute("axis", found))
        q = graph.add("QuantizeLinear", [data, one, zero], "q")
        graph.add(operator, [graph.add("DequantizeLinear", [q, one, zero], "dq"), weight], "layer")
        wanted = [] if found == axis else [("weight-axis", "layer")]
        assert brief(lint(graph.save(tmp_path / "x.onnx", "layer_out"))) == wanted


def test_a_branch_of_a_condition_is_looked_into(tmp_path: Path) -> None:
    def change(m: Fault) -> None:
        outputs = [helper.make_tensor_value_info("r", TensorProto.FLOAT, None)]
        relu = helper.make_node("Relu", ["after_out"], ["r"])
        _, *parameters = m.pair_before("after")[0].input
        zero = m.add_constant("unsigned", np.asarray(0, np.uint8))
        nodes = [
            helper.make_node("QuantizeLinear", ["after_out", parameters[0], zero], ["i"], "inside"),
            helper.make_node("DequantizeLinear", ["i", parameters[0], zero], ["r"]),
        ]
        branches = {
            "then_branch": helper.make_graph([relu], "then", [], outputs),
            "else_branch": helper.make_graph(nodes, "else", [], outputs),
        }
        condition = m.add_constant("condition", np.asarray(True))
        m.insert_before("after.relu", helper.make_node("If", [condition], ["b"], **branches))
        m.node("after.relu").input[0] = "b"

    assert brief(lint(spoiled(tmp_path, change))) == [("activation-type", "inside")]


def test_a_function_is_looked_into(tmp_path: Path) -> None:
    def change(m: Fault) -> None:
        scale, zero = numpy_helper.from_array(np.float32(0.1)), numpy_helper.from_array(np.uint8(0))
        nodes = [
            helper.make_node("Constant", [], ["s"], value=scale),
            helper.make_node("Constant", [], ["z"], value=zero),
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ]
        opsets = [helper.make_opsetid("", 18)]
        m.model.functions.append(helper.make_function("own", "Fake", ["x"], ["y"], nodes, opsets))
        m.model.opset_import.append(helper.make_opsetid("own", 1))
        m.insert_before("stem", helper.make_node("Fake", ["input"], ["faked"], domain="own"))
        pair = m.pair_before("stem")
        m.node("stem").input[0] = "faked"
        m.remove(*pair)

    assert [finding.rule for finding in lint(spoiled(tmp_path, change))] == ["activation-type"]


def test_a_node_without_a_name_is_called_by_its_output(tmp_path: Path) -> None:
    def change(m: Fault) -> None:
        m.rezero("after", np.asarray(3, np.int8))
        for node in m.graph.node:
            node.name = ""

    assert brief(lint(spoiled(tmp_path, change))) == [("zero-point", "cat_out/quantized")]


# --- TensorRT 8 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [S8, PER_TENSOR], ids=["per channel", "per tensor"])
def test_tensorrt_8_refuses_integers_in_the_file(scheme: Scheme, tmp_path: Path) -> None:
    path = spoiled(tmp_path, lambda m: m.opset(17), scheme)
    found = lint(path, "tensorrt8")
    assert found is not None
    graph = onnx.load(path).graph
    constants = {constant.name for constant in graph.initializer}
    weights = [
        node.name
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in constants
    ]
    assert len(weights) > 3
    assert brief(found) == [("integer-weight", name) for name in weights]
    assert {finding.severity for finding in found} == {"error"}


@pytest.mark.parametrize("version", [(8, 5), (8, 2)])
def test_nothing_is_found_in_what_is_written_for_tensorrt_8(
    version: tuple[int, int], tmp_path: Path
) -> None:
    path = spoiled(tmp_path, lambda m: m.opset(17))
    assert lint(path, "tensorrt8") != []
    (tmp_path / "8.onnx").write_bytes(for_tensorrt8(path, version))
    for rules in ("tensorrt", "tensorrt8"):
        assert lint(tmp_path / "8.onnx", rules) == []


FC_DQ = "fc.weight/fc/DequantizeLinear"


def four_bits_of_gemm(m: Fault) -> None:
    """TensorRT 10 takes it."""
    m.opset(21)
    dequantize = m.weight("fc")
    shape = m.constant(dequantize.input[0]).shape
    values = [1] * int(np.prod(shape))
    m.graph.initializer.append(helper.make_tensor("nibbles", TensorProto.INT4, shape, values))
    dequantize.input[0] = "nibbles"
    del dequantize.input[2]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.opset(18), {("opset-of-8", "")}),
        (four_bits_of_gemm, {("opset-of-8", ""), ("type-of-8", FC_DQ)}),
        (
            lambda m: (m.opset(17), m.bias(np.ones(4, np.int32))),
            {("integer-bias", "after")},
        ),
        (
            lambda m: (m.opset(17), m.rezero("after", np.asarray(3, np.int8))),
            {("zero-point", CAT_Q)},
        ),
    ],
)
def test_more_that_tensorrt_8_refuses(
    change: Change, expected: set[tuple[str, str]], tmp_path: Path
) -> None:
    found = brief(lint(spoiled(tmp_path, change), "tensorrt8"))
    assert {finding for finding in found if finding[0] != "integer-weight"} == expected


def test_unknown_rules(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        lint(tmp_path / "x.onnx", "openvino")
    assert str(caught.value) == "There are no rules 'openvino'; use tensorrt or tensorrt8."


def test_what_is_no_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not onnx")
    with pytest.raises(ModelError):
        lint(tmp_path / "x.onnx")


def test_weights_in_a_file_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    model = onnx.load(make(tmp_path, S8))
    onnx.save(model, path, save_as_external_data=True, location="x.data", size_threshold=0)
    assert lint(path) == []
    (tmp_path / "x.data").unlink()
    with pytest.raises(ModelError) as caught:
        lint(path)
    assert str(caught.value).startswith(f"{path} keeps its weights in other files, and they ")
    assert str(caught.value).endswith(". Copy them beside it.")


OPERATORS = ("Concat", "Conv", "DequantizeLinear", "Identity", "QuantizeLinear", "Transpose")
NUMBERS = st.integers(0, 99)


def mutate(model: onnx.ModelProto, kind: str, i: int, j: int, k: int) -> None:
    """Change one thing of a file; the numbers choose which, and how."""
    graph = model.graph
    node = graph.node[i % len(graph.node)]
    tensors = [name for n in graph.node for name in (*n.input, *n.output)] + ["", "unknown"]
    if kind == "reconnect" and node.input:
        node.input[j % len(node.input)] = tensors[k % len(tensors)]
    elif kind == "shorten" and node.input:
        del node.input[j % len(node.input) :]
    elif kind == "remove":
        graph.node.remove(node)
    elif kind == "repeat":
        graph.node.add().CopyFrom(node)
    elif kind == "operator":
        node.op_type = OPERATORS[j % len(OPERATORS)]
    elif kind == "domain":
        node.domain = ("com.microsoft", "ai.onnx", "own")[j % 3]
    elif kind == "attribute":
        del node.attribute[:]
        value = (-1, 7, "x", [1], [3, 0, 9], 0.5)[k % 6]
        node.attribute.append(helper.make_attribute(("axis", "perm", "transB")[j % 3], value))
    elif kind == "output":
        node.output[0] = tensors[k % len(tensors)]
    elif kind == "constant":
        tensor = graph.initializer[i % len(graph.initializer)]
        shape = ((), (1,), (0,), (4,), (2, 3), (4, 4, 1, 1))[j % 6]
        types = (np.float32, np.int8, np.uint8, np.int32, np.float16, np.bool_, np.float64)
        values = np.ones(shape, types[k % len(types)])
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    elif kind == "type":
        graph.initializer[i % len(graph.initializer)].data_type = k % 26
    elif kind == "no constant":
        del graph.initializer[i % len(graph.initializer)]
    elif kind == "opset":
        model.opset_import[0].version = k
    elif kind == "no types":
        del graph.value_info[:]


KINDS = (
    "attribute",
    "constant",
    "domain",
    "no constant",
    "no types",
    "operator",
    "opset",
    "output",
    "reconnect",
    "remove",
    "repeat",
    "shorten",
    "type",
)


def is_valid(model: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError:
        return False
    return True


@pytest.fixture(scope="module")
def correct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("correct"), S8)


MUTATIONS = st.lists(st.tuples(st.sampled_from(KINDS), NUMBERS, NUMBERS, NUMBERS), max_size=6)


@given(mutations=MUTATIONS)
def test_no_mutation_makes_it_raise(
    correct: Path, tmp_path: Path, mutations: list[tuple[str, int, int, int]]
) -> None:
    model = onnx.load(correct)
    for mutation in mutations:
        mutate(model, *mutation)
    path = tmp_path / "mutated.onnx"
    path.write_bytes(model.SerializeToString())
    try:
        found = lint(path)
    except ModelError:
        assert not is_valid(model)
        return
    assert all(isinstance(finding, Finding) and finding.problem for finding in found or [])
