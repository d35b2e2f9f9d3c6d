from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import S8, Graph, googlenet_like, pictures, to_int8
from onnx import helper

from gnet_opt.errors import ModelError
from gnet_opt.quantization.dla import DEVICES, RULES, Layer, Report, has_dla, report
from gnet_opt.target import shipped

Build = Callable[[Graph], str]


def made(tmp_path: Path, build: Build, **graph: Any) -> Report:
    """The report of a graph whose last node `build` adds."""
    drawn = Graph(**graph)
    return report(drawn.save(tmp_path / "net.onnx", build(drawn)))


def layer(found: Report, name: str) -> Layer:
    return next(layer for layer in found.layers if layer.name == name)


def broken(found: Report) -> list[tuple[str, str]]:
    """Layer and rule of every finding."""
    return [(layer.name, finding.rule) for layer in found.layers for finding in layer.findings]


def conv(**rest: Any) -> Build:
    def build(graph: Graph) -> str:
        return graph.conv("input", rest.pop("channels", 8), "conv", **rest)

    return build


def raw_conv(shape: tuple[int, ...], **attributes: Any) -> Build:
    """A convolution with a weight of this shape and attributes as given."""

    def build(graph: Graph) -> str:
        weight = graph.constant("weight", np.ones(shape, np.float32))
        output = graph.add("Conv", ["input", weight], "conv", **attributes)
        graph.channels[output] = shape[0]
        return output

    return build


def node(operator: str, **attributes: Any) -> Build:
    return lambda graph: graph.add(operator, ["input"], "node", **attributes)


def pool(kernel: int, operator: str = "MaxPool", **attributes: Any) -> Build:
    return node(operator, kernel_shape=[kernel, kernel], **attributes)


def row(graph: Graph) -> str:
    """The pictures with their pixels in a row, then another node."""
    shape = graph.constant("shape", np.asarray([1, 3, 1024], np.int64))
    return graph.add("Relu", [graph.add("Reshape", ["input", shape], "row")], "node")


@pytest.mark.parametrize(
    "build",
    [
        conv(kernel=7, strides=[2, 2]),
        conv(kernel=31, strides=[8, 8]),
        raw_conv((6, 1, 3, 3), group=3),
        raw_conv((8, 3, 1, 1), dilations=[32, 32]),
        pool(8, strides=[16, 16], pads=[7, 7, 7, 7]),
        pool(3, strides=[2, 2], ceil_mode=1),
        pool(8, "AveragePool"),
        node("LRN", size=9),
        node("Relu"),
        node("Tanh"),
        lambda graph: graph.concat(["input", "input"], "concat"),
        lambda graph: graph.add("Concat", ["input", "input"], "concat", axis=-3),
        lambda graph: graph.add("Add", ["input", "input"], "sum"),
        node("Transpose", perm=[0, 1, 3, 2]),
    ],
)
def test_what_a_dla_takes(tmp_path: Path, build: Build) -> None:
    found = made(tmp_path, build)
    assert broken(found) == []
    for split in found.splits:
        assert (split.layers, split.gpu_layers) == (len(found.layers), 0)
        assert (split.loadables, split.gpu_pieces) == (1, 0)


@pytest.mark.parametrize(
    ("build", "rule", "problem"),
    [
        (conv(kernel=33), "convolution", "its kernel is 33 x 33, not within 1 to 32"),
        (conv(kernel=3, strides=[9, 9]), "convolution", "its stride is 9 x 9, not within 1 to 8"),
        (
            raw_conv((8, 3, 1, 1), pads=[1, 1, 1, 1]),
            "convolution",
            "its padding 1 x 1 x 1 x 1 is not less than its kernel 1 x 1",
        ),
        (
            raw_conv((8, 3, 3, 3), dilations=[33, 33], pads=[33, 33, 33, 33]),
            "convolution",
            "its dilation is 33 x 33, not within 1 to 32",
        ),
        (
            raw_conv((8193, 3, 1, 1), strides=[8, 8]),
            "convolution",
            "its output channels is 8193, not within 1 to 8192",
        ),
        (pool(9), "pool", "its window is 9 x 9, not within 1 to 8"),
        (pool(1, strides=[17, 17]), "pool", "its stride is 17 x 17, not within 1 to 16"),
        (node("LRN", size=11), "lrn-window", "its window is 11"),
        (node("LRN", size=1), "lrn-window", "its window is 1"),
        (node("GlobalAveragePool"), "global-pool", "TensorRT makes no pooling for a DLA of Glob"),
        (node("ReduceMean"), "global-pool", "TensorRT makes no pooling for a DLA of ReduceMean"),
        (node("Flatten"), "flatten", "a DLA keeps pictures as (batch, channels, height, width)"),
        (node("Sqrt"), "operator", "Sqrt is no operator that TensorRT gives to a DLA"),
        (
            lambda graph: graph.add("Concat", ["input", "input"], "node", axis=2),
            "concat-axis",
            "it joins along axis 2, not along the channels",
        ),
        (
            lambda graph: graph.add("Concat", ["input"], "node", axis=1),
            "concat-axis",
            "it has one input",
        ),
        (
            lambda graph: graph.add("MatMul", ["input", "input"], "node"),
            "constant-weight",
            "its weight is computed while the model runs",
        ),
        (node("Transpose", perm=[1, 0, 2, 3]), "batch-moves", "it moves the batch dimension"),
    ],
)
def test_what_a_dla_leaves(tmp_path: Path, build: Build, rule: str, problem: str) -> None:
    found = made(tmp_path, build, size=40)
    (findings,) = [layer.findings for layer in found.layers if layer.findings]
    (said,) = [finding for finding in findings if finding.problem.startswith(problem)]
    assert said.rule == rule
    assert said.mend
    assert said.source.startswith(("https://", "NVIDIA's guide"))
    for split in found.splits:
        assert split.gpu_layers == 1


@pytest.mark.parametrize(
    ("low", "high", "taken"),
    [(0.0, 6.0, True), (0.0, 127.0, True), (0.0, 128.0, False), (-1.0, 6.0, False), (0, None, 0)],
)
def test_clipped_activations(tmp_path: Path, low: float, high: float | None, taken: bool) -> None:
    def build(graph: Graph) -> str:
        limits = [graph.constant("low", np.asarray(low, np.float32))]
        if high is not None:
            limits.append(graph.constant("high", np.asarray(high, np.float32)))
        return graph.add("Clip", ["input", *limits], "clip")

    assert broken(made(tmp_path, build)) == ([] if taken else [("clip", "clip")])


def test_tensors_of_three_dimensions(tmp_path: Path) -> None:
    found = made(tmp_path, row)
    assert broken(found) == [("node", "two-dimensional")]
    assert layer(found, "node").findings[0].problem == "its input has 3 dimensions, not 4"


def test_sizes(tmp_path: Path) -> None:
    found = made(tmp_path, node("Relu"), channels=1, size=8193)
    assert broken(found) == [("node", "sizes"), ("node", "sizes")]
    assert "larger than 8192" in layer(found, "node").findings[0].problem


def saved(tmp_path: Path, shape: list[int | str], *nodes: onnx.NodeProto, output: str) -> Path:
    """A graph whose tensors have no shapes but the input."""
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("input", kind, shape)],
        [helper.make_tensor_value_info(output, kind, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "plain.onnx")
    return tmp_path / "plain.onnx"


def test_a_batch_that_is_too_large(tmp_path: Path) -> None:
    relu = helper.make_node("Relu", ["input"], ["out"], name="relu")
    found = report(saved(tmp_path, [4097, 1, 2, 2], relu, output="out"))
    assert {finding.rule for finding in layer(found, "relu").findings} == {"sizes"}
    assert "a batch of more than 4096" in layer(found, "relu").findings[0].problem
    assert broken(report(saved(tmp_path, [4096, 1, 2, 2], relu, output="out"))) == []


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "reach"),
    [(28, 3, 2, ""), (16, 8, 8, ""), (17, 8, 8, ""), (11, 2, 11, "2 x 2"), (19, 9, 9, "8 x 8")],
    ids=["as in GoogLeNet", "no edge", "7 over the edge", "nothing but edge", "8 over the edge"],
)
def test_ceil_mode_is_padding(
    tmp_path: Path, size: int, kernel: int, stride: int, reach: str
) -> None:
    found = made(tmp_path, pool(kernel, strides=[stride, stride], ceil_mode=1), size=size)
    said = [finding for finding in found.layers[0].findings if finding.rule == "ceil-mode"]
    expected = [f"ceil_mode lets its last window reach {reach} over the edge"] if reach else []
    assert [finding.problem for finding in said] == expected


@pytest.mark.parametrize(
    ("shape", "axis", "orin", "xavier"),
    [
        ([1, 1000, 1, 1], 1, True, False),
        ([1, 8192, 1, 1], 1, True, False),
        ([1, 1024, 2, 1], 1, True, False),
        ([1, 1025, 2, 1], 1, False, False),
        ([2, 10, 1, 1], 0, False, False),
    ],
)
def test_softmax(
    tmp_path: Path, shape: list[int | str], axis: int, orin: bool, xavier: bool
) -> None:
    softmax = helper.make_node("Softmax", ["input"], ["out"], name="softmax", axis=axis)
    found = layer(report(saved(tmp_path, shape, softmax, output="out")), "softmax")
    assert (found.runs_on("orin"), found.runs_on("xavier")) == (orin, xavier)
    assert found.precision == "fp16"


def needs(found: Report) -> list[str]:
    return [need.rule for need in found.needs]


def test_a_float_network_of_the_family(tmp_path: Path) -> None:
    found = report(googlenet_like(tmp_path / "float.onnx"))
    assert broken(found) == [("average", "global-pool"), ("flatten", "flatten")]
    assert needs(found) == ["precision"]
    assert {layer.precision for layer in found.layers} == {"fp16"}
    for split in found.splits:
        assert (split.gpu_layers, split.gpu_pieces) == (2, 1)
        # Everything before the pooling, and the classifier behind it.
        assert (split.loadables, split.macs_share) == (2, 1.0)


def test_a_quantized_network_of_the_family(tmp_path: Path) -> None:
    path = googlenet_like(tmp_path / "float.onnx")
    to_int8(path, tmp_path / "int8.onnx", pictures(4), S8)
    found = report(tmp_path / "int8.onnx")
    before = report(path)
    assert [layer.name for layer in found.layers] == [layer.name for layer in before.layers]
    assert broken(found) == broken(before)
    assert [layer.macs for layer in found.layers] == [layer.macs for layer in before.layers]
    assert found.splits == before.splits
    assert needs(found) == ["explicit-quantization"]
    kinds = {layer.operator: layer.precision for layer in found.layers if layer.operator != "Relu"}
    assert kinds["Conv"] == kinds["Concat"] == kinds["MaxPool"] == "int8"
    assert kinds["LRN"] == "fp16"


def test_the_mended_network_is_for_the_dla_but_for_its_last_node(tmp_path: Path) -> None:
    def build(graph: Graph) -> str:
        data = graph.block("input", 8, "conv1", kernel=3)
        data = graph.inception(data, "3a")
        data = graph.add("AveragePool", [data], "average", kernel_shape=[8, 8])
        return graph.add("Flatten", [graph.conv(data, 5, "classes")], "flatten")

    found = made(tmp_path, build, size=8)
    assert broken(found) == [("flatten", "flatten")]
    for split in found.splits:
        assert (split.loadables, split.gpu_pieces, split.macs_share) == (1, 1, 1.0)


def spoil(path: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    return path


def rescale(name: str, *, behind: bool, index: int = 0) -> Callable[[onnx.ModelProto], None]:
    """Give one pair before or behind a node another scale."""

    def change(model: onnx.ModelProto) -> None:
        nodes = {node.name: node for node in model.graph.node}
        tensor = nodes[name].output[0] if behind else nodes[name].input[index]
        scale = onnx.numpy_helper.from_array(np.float32(0.77), "other.scale")
        model.graph.initializer.append(scale)
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear" and behind and node.input[0] == tensor:
                node.input[1] = "other.scale"
            if node.op_type == "DequantizeLinear" and not behind and node.output[0] == tensor:
                node.input[1] = "other.scale"

    return change


@pytest.mark.parametrize(
    ("name", "behind", "rule"),
    [
        ("3a.concat", False, "concat-ranges"),
        ("3a.concat", True, "concat-ranges"),
        ("pool3", True, "pool-ranges"),
    ],
)
def test_ranges_that_must_be_equal(tmp_path: Path, name: str, behind: bool, rule: str) -> None:
    path = tmp_path / "int8.onnx"
    to_int8(googlenet_like(tmp_path / "float.onnx"), path, pictures(4), S8)
    found = report(spoil(path, rescale(name, behind=behind)))
    assert (name, rule) in broken(found)
    assert "0.77" in layer(found, name).findings[0].problem


def test_an_open_batch_and_shapes_that_are_not_stated(tmp_path: Path) -> None:
    def relu(source: str, result: str) -> onnx.NodeProto:
        return helper.make_node("Relu", [source], [result], name=result)

    found = report(saved(tmp_path, ["n", 3, 4, 4], relu("input", "a"), relu("a", "b"), output="b"))
    assert needs(found) == ["dynamic", "precision"]
    assert "--batch 1" in found.needs[0].mend
    assert broken(found) == []
    open_size = report(saved(tmp_path, [1, 3, "h", "w"], relu("input", "a"), output="a"))
    assert needs(open_size) == ["dynamic", "shapes", "precision"]


def test_pieces_that_wait_for_each_other_are_not_one(tmp_path: Path) -> None:
    """A branch over the GPU and one that stays: what joins them cannot be in the first piece."""

    def build(graph: Graph) -> str:
        first = graph.add("Relu", ["input"], "first")
        stays = graph.add("Tanh", [first], "stays")
        leaves = graph.add("Sqrt", [first], "leaves")
        return graph.add("Add", [stays, leaves], "joins")

    for split in made(tmp_path, build).splits:
        assert (split.layers, split.gpu_layers) == (3, 1)
        assert (split.loadables, split.gpu_pieces) == (2, 1)


def test_too_many_pieces(tmp_path: Path) -> None:
    def build(graph: Graph) -> str:
        data = "input"
        for index in range(17):
            data = graph.add("Relu", [data], f"relu{index}")
            data = graph.add("Sqrt", [data], f"root{index}")
        return data

    found = made(tmp_path, build)
    assert [split.loadables for split in found.splits] == [17, 17]
    assert needs(found) == ["precision", "loadables", "loadables"]


def test_a_report_is_plain_data(tmp_path: Path) -> None:
    path = googlenet_like(tmp_path / "float.onnx")
    told = json.loads(json.dumps(report(path).to_dict()))
    assert sorted(told) == ["devices", "file", "layers", "needs", "splits"]
    (average,) = [layer for layer in told["layers"] if layer["name"] == "average"]
    assert (average["orin"], average["xavier"]) == (False, False)
    assert average["findings"][0]["rule"] == "global-pool"


def test_every_jetson_says_whether_it_has_a_dla() -> None:
    jetsons = {target.name for target in shipped() if target.name.startswith("jetson")}
    assert {device.target for device in DEVICES} == jetsons
    usable = {device.target: device.to_dict()["usable"] for device in DEVICES}
    # JetPack 7.2 has TensorRT 10.16, which has no DLA; JetPack 5.1 of Xavier NX has.
    assert {name for name, reaches in usable.items() if reaches} == {"jetson-xavier-nx"}


@pytest.mark.parametrize(
    ("version", "agx", "nx"),
    [
        ("8.5", True, True),
        ("10.3", True, True),
        ("10.7.0.23", True, True),
        ("10.8", False, False),
        ("10.16", False, False),
        ("11.4", False, False),
        ("11.4.0", False, False),
        ("11.4.1", True, False),
    ],
)
def test_versions_of_tensorrt_with_a_dla(version: str, agx: bool, nx: bool) -> None:
    assert has_dla(version, "jetson-agx-orin") is agx
    assert has_dla(version, "jetson-orin-nx") is nx


def test_rules_have_names_of_their_own() -> None:
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)


def test_what_is_no_onnx_file(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not onnx")
    with pytest.raises(ModelError):
        report(tmp_path / "x.onnx")
