"""Layers that stay in float between layers in INT8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import S8, SCHEMES, U8, U8_7, Graph, googlenet_like, pictures, run, to_int8
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from gnet_opt.errors import ConfigError, ModelError
from gnet_opt.quantization import Recipe, Statistics, calibrate, quantize
from gnet_opt.quantization.describe import describe
from gnet_opt.quantization.postconditions import check
from gnet_opt.quantization.regions import find_regions, load_graph
from gnet_opt.target import Scheme

LAYERS = (
    *("conv1", "conv2"),
    *("3a.1x1", "3a.3a", "3a.3b", "3a.5a", "3a.5b", "3a.proj"),
    *("4a.1x1", "4a.3a", "4a.3b", "4a.5a", "4a.5b", "4a.proj"),
    "fc",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return googlenet_like(tmp_path_factory.mktemp("keep") / "float.onnx")


@pytest.fixture(scope="module")
def statistics(model: Path) -> Statistics:
    return calibrate(model, pictures(16), threads=1)


def groups(path: Path, *kept: str) -> list[set[str]]:
    return [set(region.tensors) for region in find_regions(load_graph(path), set(kept))]


def sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    signal = expected.astype(np.float64)
    noise = ((signal - found) ** 2).sum()
    return float(10 * np.log10((signal**2).sum() / noise)) if noise else np.inf


def test_what_only_a_float_layer_reads_is_no_region(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = graph.block(graph.block("input", 4, "a"), 4, "b")
    path = graph.save(tmp_path / "f.onnx", graph.conv(data, 4, "c"))
    assert groups(path) == [{"input"}, {"a.relu_out"}, {"b.relu_out"}]
    assert groups(path, "a") == [{"a.relu_out"}, {"b.relu_out"}]
    assert groups(path, "b") == [{"input"}, {"b.relu_out"}]
    assert groups(path, "a", "c") == [{"a.relu_out"}]


def test_what_an_integer_layer_reads_too_is_one(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = graph.block("input", 4, "stem")
    parts = [graph.conv(data, 4, "kept"), graph.conv(data, 4, "other")]
    path = graph.save(tmp_path / "f.onnx", graph.add("Add", parts, "sum"))
    assert groups(path, "kept") == [{"input"}, {"stem.relu_out"}]


def test_a_concat_with_a_float_branch_is_shared_all_the_same(tmp_path: Path) -> None:
    graph = Graph(size=16)
    parts = [graph.block("input", 4, "kept"), graph.pool(graph.block("input", 4, "b"), "pool")]
    data = graph.concat(parts, "cat")
    path = graph.save(tmp_path / "f.onnx", graph.conv(data, 4, "after"))
    shared = {"kept.relu_out", "b.relu_out", "pool_out", "cat_out"}
    assert groups(path) == groups(path, "kept") == [{"input"}, shared]
    assert groups(path, "after") == [{"input"}]
    assert groups(path, "kept", "b") == [shared]


@pytest.mark.parametrize(
    ("kept", "integers"), [((), True), (("a",), False), (("a", "b"), False), (("fc",), True)]
)
def test_the_average_reads_integers_behind_integer_layers_alone(
    tmp_path: Path, kept: tuple[str, ...], integers: bool
) -> None:
    graph = Graph(size=16)
    data = graph.block("input", 4, "stem")
    data = graph.concat([graph.block(data, 4, "a"), graph.block(data, 4, "b")], "cat")
    data = graph.add("Flatten", [graph.add("GlobalAveragePool", [data], "average")], "flatten")
    path = graph.save(tmp_path / "f.onnx", graph.gemm(data, 5))
    out = tmp_path / "int8.onnx"
    to_int8(path, out, pictures(2, 16), U8, keep_float=frozenset(kept), threads=1)
    assert ({"a.relu_out", "b.relu_out", "cat_out"} in groups(path, *kept)) is integers
    nodes = {node.name: node for node in onnx.load(out).graph.node}
    writers = {name: node.op_type for node in nodes.values() for name in node.output}
    assert (writers[nodes["average"].input[0]] == "DequantizeLinear") is integers


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("kept", ["conv1", "3a.3b", "3a.proj", "4a.1x1", "fc"])
def test_the_layer_is_float_and_its_neighbours_are_not(
    tmp_path: Path, model: Path, statistics: Statistics, kept: str, scheme: Scheme
) -> None:
    out = tmp_path / "int8.onnx"
    facts = quantize(model, out, statistics, scheme, Recipe(keep_float=frozenset({kept})))

    before, after = onnx.load(model).graph, onnx.load(out).graph
    nodes = {node.name: node for node in after.node}
    writers = {name: node.op_type for node in after.node for name in node.output}
    for name in LAYERS:
        data, weight = (writers.get(tensor) for tensor in nodes[name].input[:2])
        if name == kept:
            assert data != "DequantizeLinear"
            assert weight is None
        else:
            assert data == weight == "DequantizeLinear"
    stored = {value.name: numpy_helper.to_array(value) for value in after.initializer}
    for value in before.initializer:
        if value.name.startswith(f"{kept}."):
            assert np.array_equal(stored[value.name], numpy_helper.to_array(value))
    assert nodes[kept].input[2] == f"{kept}.bias"  # not a corrected one

    macs = {layer["name"]: layer["macs"] for layer in describe(model)["layers"]}
    share = 1.0 - macs[kept] / sum(macs.values())
    assert facts["quantize"]["float_layers"] == 1
    assert facts["quantize"]["conv"] + facts["quantize"]["gemm"] == len(LAYERS) - 1
    assert facts["quantize"]["macs_int8_share"] == pytest.approx(share, abs=1e-12)
    assert facts["quantize"]["biases_corrected"] == 14 - (kept != "fc")  # that one is all zeros
    precisions = {layer["name"]: layer["precision"] for layer in describe(out)["layers"]}
    assert [name for name, precision in precisions.items() if precision == "float"] == [kept]

    unseen = pictures(8, seed=1)
    assert sqnr(run(model, unseen), run(out, unseen)) > 25.0


@settings(max_examples=25)
@given(
    kept=st.sets(st.sampled_from(LAYERS), max_size=len(LAYERS) - 1),
    scheme=st.builds(replace, st.sampled_from([U8, S8, U8_7]), results=st.booleans()),
)
def test_any_choice_of_layers_holds(
    tmp_path: Path, model: Path, statistics: Statistics, kept: set[str], scheme: Scheme
) -> None:
    out = tmp_path / "int8.onnx"
    facts = quantize(model, out, statistics, scheme, Recipe(keep_float=frozenset(kept)))
    assert facts["quantize"]["float_layers"] == len(kept)
    macs = {layer["name"]: layer["macs"] for layer in describe(model)["layers"]}
    share = sum(count for name, count in macs.items() if name not in kept) / sum(macs.values())
    assert facts["quantize"]["macs_int8_share"] == pytest.approx(share, abs=1e-12)
    unseen = pictures(4, seed=1)
    assert sqnr(run(model, unseen), run(out, unseen)) > 20.0


def test_one_layer_in_integers_costs_less_than_all(
    tmp_path: Path, model: Path, statistics: Statistics
) -> None:
    unseen = pictures(8, seed=1)
    logits, out = run(model, unseen), tmp_path / "int8.onnx"
    close = []
    for only in LAYERS:
        quantize(model, out, statistics, S8, Recipe(keep_float=frozenset(LAYERS) - {only}))
        close.append(sqnr(logits, run(out, unseen)))
    quantize(model, out, statistics, S8)
    assert np.median(close) > sqnr(logits, run(out, unseen)) + 6.0


def test_a_noisy_layer_in_float_brings_the_logits_back(tmp_path: Path) -> None:
    """One channel in a hundred times the size of others ruins what its reader sees of them."""
    model = googlenet_like(tmp_path / "float.onnx")
    proto = onnx.load(model)
    for value in proto.graph.initializer:
        array = numpy_helper.to_array(value).copy()
        if value.name in ("3a.3a.weight", "3a.3a.bias"):
            array[1] *= 200
        elif value.name == "3a.3b.weight":
            array[:, 1] /= 200
        value.CopyFrom(numpy_helper.from_array(array, value.name))
    onnx.save(proto, model)
    seen, unseen = calibrate(model, pictures(16), threads=1), pictures(8, seed=1)
    close = {}
    for kept in ("", "3a.3b", "3a.5b"):
        recipe = Recipe(keep_float=frozenset({kept} - {""}))
        quantize(model, tmp_path / "int8.onnx", seen, S8, recipe)
        close[kept] = sqnr(run(model, unseen), run(tmp_path / "int8.onnx", unseen))
    assert close["3a.3b"] > close[""] + 5.0
    assert close["3a.5b"] < close[""] + 1.0  # another layer does not mend it


def native(path: Path, images: list[np.ndarray]) -> np.ndarray:
    """With all the fusions of ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": image[None]})[0] for image in images])


@pytest.mark.parametrize("results", [False, True])
@pytest.mark.parametrize("kept", LAYERS)
def test_a_runtime_computes_it_in_float(
    tmp_path: Path, model: Path, kept: str, results: bool
) -> None:
    """ONNX Runtime quantizes float weights behind a DequantizeLinear by itself, with one scale.

    Where it did so here, one output channel a thousand times as large as the others would leave
    these with no levels at all.
    """
    proto = onnx.load(model)
    for value in proto.graph.initializer:
        if value.name in (f"{kept}.weight", f"{kept}.bias"):
            array = numpy_helper.to_array(value).copy()
            array[1:] /= 1000
            value.CopyFrom(numpy_helper.from_array(array, value.name))
    path, out = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    onnx.save(proto, path)
    scheme = replace(U8_7, results=results)  # seven bits do not saturate on any CPU
    to_int8(path, out, pictures(8), scheme, keep_float=frozenset({kept}), threads=1)
    unseen = pictures(4, seed=1)
    reference, fused = run(out, unseen), native(out, unseen)
    signal = reference[:, 1:] if kept == "fc" else reference
    assert sqnr(signal, fused[:, 1:] if kept == "fc" else fused) > 25.0


def test_a_weight_of_a_float_and_of_an_integer_layer(tmp_path: Path) -> None:
    graph = Graph(channels=4, size=16)
    graph.conv(graph.relu(graph.conv("input", 4, "a")), 4, "b")
    graph.nodes[-1].input[1] = "a.weight"
    graph.initializers = [value for value in graph.initializers if value.name != "b.weight"]
    path = graph.save(tmp_path / "float.onnx", "b_out")
    images = [image[:1].repeat(4, 0) for image in pictures(4, 16)]
    out = tmp_path / "int8.onnx"
    facts = to_int8(path, out, images, U8, keep_float=frozenset({"b"}), threads=1)
    assert facts["quantize"]["float_layers"] == 1
    stored = {value.name: value for value in onnx.load(out).graph.initializer}
    assert {"a.weight", "a.weight/quantized"} <= set(stored)
    assert sqnr(run(path, images), run(out, images)) > 25.0


def mixed(folder: Path, model: Path, statistics: Statistics, *kept: str) -> Path:
    path = folder / "int8.onnx"
    quantize(model, path, statistics, U8, Recipe(keep_float=frozenset(kept)))
    return path


def test_the_post_conditions_accept_exactly_these_layers(
    tmp_path: Path, model: Path, statistics: Statistics
) -> None:
    path = mixed(tmp_path, model, statistics, "3a.3b", "fc")
    assert check(path, U8, {"3a.3b", "fc"})["float_layers"] == 2
    for claimed, node, fault in (
        (set(), "Conv 3a.3b", "its data is not dequantized"),
        ({"3a.3b"}, "Gemm fc", "its data is not dequantized"),
        ({"3a.3b", "fc", "conv2"}, "Conv conv2", "it was to stay in float"),
    ):
        with pytest.raises(ModelError) as caught:
            check(path, U8, claimed)
        assert str(caught.value) == (
            f"{path}: the {node} is not quantized as intended: {fault}. "
            "This is a fault of gnet-opt; please report it with the model."
        )


def test_integers_for_the_data_of_a_float_layer_are_a_fault(
    tmp_path: Path, model: Path, statistics: Statistics
) -> None:
    whole = mixed(tmp_path, model, statistics)
    read = {node.name: node.input[0] for node in onnx.load(whole).graph.node}
    path = mixed(tmp_path, model, statistics, "3a.3a")  # 3a.1x1 reads the same in integers
    proto = onnx.load(path)
    for node in proto.graph.node:
        if node.name == "3a.3a":
            assert node.input[0] != read["3a.3a"]
            node.input[0] = read["3a.3a"]
    onnx.save(proto, path)
    with pytest.raises(ModelError, match=r"the Conv 3a\.3a is .*: it was to stay in float\."):
        check(path, U8, {"3a.3a"})


def test_integers_for_the_weight_of_a_float_layer_are_a_fault(
    tmp_path: Path, model: Path, statistics: Statistics
) -> None:
    path = mixed(tmp_path, model, statistics, "3a.3a")
    original = next(
        numpy_helper.to_array(value)
        for value in onnx.load(path).graph.initializer
        if value.name == "3a.1x1.weight/quantized"
    )
    proto = onnx.load(path)
    for node in proto.graph.node:
        if node.name == "3a.3a":  # half as many channels as 3a.1x1: a slice of its weight
            node.input[1] = "small"
    small = numpy_helper.from_array(original[:4], "small.integers")
    proto.graph.initializer.extend([small, numpy_helper.from_array(np.float32(0.1), "small.scale")])
    dequantize = onnx.helper.make_node(
        "DequantizeLinear", ["small.integers", "small.scale"], ["small"], name="small"
    )
    proto.graph.node.insert(0, dequantize)
    onnx.save(proto, path)
    with pytest.raises(ModelError, match=r"the Conv 3a\.3a is .*: it was to stay in float\."):
        check(path, U8, {"3a.3a"})


def test_all_layers_in_float_is_nothing_to_quantize(
    tmp_path: Path, model: Path, statistics: Statistics
) -> None:
    with pytest.raises(ModelError) as caught:
        mixed(tmp_path, model, statistics, *LAYERS)
    assert str(caught.value) == (
        "The graph has no Conv or Gemm with constant weights but those that are to stay in float: "
        "nothing to quantize."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["3a.3c", "conv1.relu", "pool1", ""])
def test_a_layer_that_does_not_exist(
    tmp_path: Path, model: Path, statistics: Statistics, name: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        mixed(tmp_path, model, statistics, "conv2", name)
    assert str(caught.value) == (
        f"{model} has no layer {name!r} to keep in float. Use names of its Conv and Gemm nodes."
    )
