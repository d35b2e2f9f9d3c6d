from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from graphs import U8, Graph, googlenet_like, pictures, to_int8

from gnet_opt.errors import ModelError
from gnet_opt.quantization.regions import Region, compute_nodes, find_regions, load_graph


def regions(path: Path) -> dict[str, Region]:
    return {region.name: region for region in find_regions(load_graph(path))}


def groups(path: Path) -> list[set[str]]:
    return [set(region.tensors) for region in regions(path).values()]


def place(path: Path) -> dict[str, onnx.NodeProto]:
    """The quantized graph's nodes, by name."""
    out = path.with_name("int8.onnx")
    to_int8(path, out, pictures(2, 16), U8, method="minmax", threads=1)
    return {node.name: node for node in onnx.load(out).graph.node}


def float_tensor(nodes: dict[str, onnx.NodeProto], name: str) -> bool:
    """Whether a tensor is the float value itself, not one that went through integers."""
    writers = [node for node in nodes.values() if name in node.output]
    return not writers or writers[0].op_type != "DequantizeLinear"


def test_each_conv_has_a_range_of_its_own(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = graph.block(graph.block("input", 4, "a"), 4, "b")
    path = graph.save(tmp_path / "f.onnx", data)
    found = regions(path)
    assert list(found) == ["input", "a.relu_out"]


def test_the_branches_of_a_concat_share_one_range(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = graph.block("input", 4, "stem")
    parts = [graph.block(data, 4, "a"), graph.conv(data, 4, "b")]
    graph.conv(graph.concat(parts, "cat"), 4, "after")
    path = graph.save(tmp_path / "f.onnx", "after_out")
    shared = regions(path)["a.relu_out"]
    assert shared.tensors == ("a.relu_out", "b_out", "cat_out")
    assert shared.sources == ("a.relu_out", "b_out")


def test_sharing_goes_through_nested_concats_and_pools(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = graph.block("input", 4, "stem")
    first = graph.concat([graph.pool(graph.block(data, 4, "a"), "p1"), data], "inner")
    second = graph.concat([graph.pool(first, "p2"), graph.block(data, 4, "b")], "outer")
    graph.conv(graph.pool(second, "p3"), 4, "after")
    path = graph.save(tmp_path / "f.onnx", "after_out")
    assert groups(path) == [
        {"input"},
        {
            *("stem.relu_out", "a.relu_out", "b.relu_out"),
            *("p1_out", "inner_out", "p2_out", "outer_out", "p3_out"),
        },
    ]
    shared = regions(path)["stem.relu_out"]
    assert shared.sources == ("stem.relu_out", "a.relu_out", "b.relu_out")


def test_two_concats_with_a_common_branch_share_one_range(tmp_path: Path) -> None:
    graph = Graph(size=16)
    parts = [graph.block("input", 4, name) for name in "abc"]
    graph.conv(graph.concat(parts[:2], "ab"), 4, "x")
    graph.conv(graph.concat(parts[1:], "bc"), 4, "y")
    graph.add("Add", ["x_out", "y_out"], "sum")
    path = graph.save(tmp_path / "f.onnx", "sum_out")
    assert groups(path) == [
        {"input"},
        {"a.relu_out", "b.relu_out", "c.relu_out", "ab_out", "bc_out"},
    ]


def test_the_input_may_be_part_of_a_shared_range(tmp_path: Path) -> None:
    graph = Graph(size=16)
    parts = [graph.block("input", 4, "a"), graph.pool("input", "pool")]
    graph.conv(graph.concat(parts, "cat"), 4, "after")
    path = graph.save(tmp_path / "f.onnx", "after_out")
    assert groups(path) == [{"input", "a.relu_out", "pool_out", "cat_out"}]
    nodes = place(path)
    for name in ("a", "pool", "cat", "after"):
        assert not float_tensor(nodes, nodes[name].input[0])


def test_a_reader_that_stays_float_gets_the_float_tensor(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = graph.block("input", 8, "stem")
    graph.conv(data, 8, "reads_integers")
    norm = graph.lrn(data, "norm")
    graph.conv(norm, 8, "after")
    graph.add("Add", ["reads_integers_out", "after_out"], "sum")
    nodes = place(graph.save(tmp_path / "f.onnx", "sum_out"))
    assert nodes["norm"].input[0] == "stem.relu_out"
    assert float_tensor(nodes, "stem.relu_out")
    assert not float_tensor(nodes, nodes["reads_integers"].input[0])
    assert not float_tensor(nodes, nodes["after"].input[0])
    assert float_tensor(nodes, nodes["sum"].input[0])


def test_a_pool_that_feeds_no_conv_stays_float(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = graph.block("input", 8, "stem")
    graph.lrn(graph.pool(data, "pool"), "norm")
    path = graph.save(tmp_path / "f.onnx", "norm_out")
    assert groups(path) == [{"input"}]
    assert place(path)["pool"].input[0] == "stem.relu_out"


def test_the_global_average_reads_integers(tmp_path: Path) -> None:
    graph = Graph(size=16)
    parts = [graph.block("input", 4, "a"), graph.block("input", 4, "b")]
    graph.add("GlobalAveragePool", [graph.concat(parts, "cat")], "average")
    path = graph.save(tmp_path / "f.onnx", "average_out")
    assert groups(path) == [{"input"}, {"a.relu_out", "b.relu_out", "cat_out"}]
    nodes = place(path)
    assert not float_tensor(nodes, nodes["average"].input[0])


def test_a_conv_with_a_computed_weight_stays_float(tmp_path: Path) -> None:
    graph = Graph(channels=2, size=3)
    graph.conv("input", 2, "constant")
    graph.add("Conv", ["constant_out", "input"], "computed", kernel_shape=[3, 3])
    path = graph.save(tmp_path / "f.onnx", "computed_out")
    assert [node.name for node in compute_nodes(load_graph(path).graph)] == ["constant"]
    assert groups(path) == [{"input"}]


def test_nothing_to_quantize(tmp_path: Path) -> None:
    graph = Graph(size=16)
    path = graph.save(tmp_path / "f.onnx", graph.pool("input", "pool"))
    with pytest.raises(ModelError) as caught:
        find_regions(load_graph(path))
    assert str(caught.value) == (
        "The graph has no Conv or Gemm with constant weights: nothing to quantize."
    )


def test_every_tensor_is_in_one_region_at_most(tmp_path: Path) -> None:
    found = regions(googlenet_like(tmp_path / "f.onnx"))
    tensors = [tensor for region in found.values() for tensor in region.tensors]
    assert len(tensors) == len(set(tensors))
    for name, region in found.items():
        assert region.tensors[0] == name
        assert set(region.sources) <= set(region.tensors)
        assert region.sources


@pytest.mark.parametrize("data", [b"", b"\x00", b"not onnx at all", b"\xff" * 64, None])
def test_a_file_that_is_no_onnx(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "f.onnx"
    whole = googlenet_like(tmp_path / "whole.onnx").read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if data is None else data)
    with pytest.raises(ModelError) as caught:
        load_graph(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith("Export it again.")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read as ONNX"):
        load_graph(tmp_path / "none.onnx")


def test_results_for_float_arithmetic_are_regions_of_their_own(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = graph.pool(graph.block("input", 4, "a"), "pool")
    data = graph.add("LRN", [data], "norm", size=3)
    path = graph.save(tmp_path / "f.onnx", graph.conv(data, 4, "b"))
    model = load_graph(path)
    assert {r.name for r in find_regions(model)} == {"input", "norm_out"}
    extra = [r for r in find_regions(model, results=True) if r.result]
    # Not the graph's output, which stays float.
    assert [r.tensors for r in extra] == [("a.relu_out",)]


def test_a_layer_kept_in_float_reads_no_quantized_result(tmp_path: Path) -> None:
    # ONNX Runtime would quantize the weight of a layer behind a DequantizeLinear by itself.
    graph = Graph(size=16)
    data = graph.pool(graph.block("input", 4, "a"), "pool")
    data = graph.block(data, 4, "b")
    path = graph.save(tmp_path / "f.onnx", graph.conv(data, 4, "c"))
    kept = find_regions(load_graph(path), {"b"}, results=True)
    assert {r.name for r in kept} == {"input", "b.relu_out"}
