from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import SCHEMES, Graph, googlenet_like, pictures, run, to_int8
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from gnet_opt.quantization import calibrate
from gnet_opt.quantization.equalize import equalize
from gnet_opt.target import Scheme

UNSEEN = pictures(8, seed=1)
AFTER_3A = {"4a.1x1": 0, "4a.3a": 0, "4a.5a": 0, "4a.proj": 0}
LAYERS: dict[str, dict[str, int]] = {
    "conv2": {"3a.1x1": 0, "3a.3a": 0, "3a.5a": 0, "3a.proj": 0},
    "3a.3a": {"3a.3b": 0},
    "3a.1x1": AFTER_3A,
    "3a.5b": dict.fromkeys(AFTER_3A, 16),
    "3a.proj": dict.fromkeys(AFTER_3A, 24),
    "4a.5b": {"fc": 16},
}
"""What reads a layer of `googlenet_like`, from which input channel on."""


def constants(path: Path) -> dict[str, np.ndarray]:
    return {v.name: numpy_helper.to_array(v) for v in onnx.load(path).graph.initializer}


def rescaled(
    model: Path,
    out: Path,
    layer: str,
    channels: Mapping[int, float],
    readers: Mapping[str, int],
) -> Path:
    """The same function, with channels of a layer that are some factors larger or smaller."""
    changed = {name: values.copy() for name, values in constants(model).items()}
    for channel, factor in channels.items():
        for kind in ("weight", "bias"):
            if f"{layer}.{kind}" in changed:
                changed[f"{layer}.{kind}"][channel] *= np.float32(factor)
        for reader, offset in readers.items():
            changed[f"{reader}.weight"][:, offset + channel] /= np.float32(factor)
    proto = onnx.load(model)
    for value in proto.graph.initializer:
        value.CopyFrom(numpy_helper.from_array(changed[value.name], value.name))
    onnx.save(proto, out)
    return out


def equalized(model: Path, out: Path, images: Sequence[np.ndarray]) -> dict[str, Any] | None:
    return equalize(model, out, calibrate(model, images, threads=1))


def sqnr(expected: np.ndarray, found: np.ndarray) -> float:
    noise = expected.astype(np.float64) - found
    return float(10 * np.log10((expected.astype(np.float64) ** 2).sum() / (noise**2).sum()))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return googlenet_like(tmp_path_factory.mktemp("equalize") / "float.onnx")


@pytest.mark.parametrize("scheme", ["u8/8", "u8/7", "s8/8"])
@pytest.mark.parametrize("factor", [50, 1 / 50])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_channel_fifty_times_off_is_found_and_costs_nothing(
    tmp_path: Path, model: Path, layer: str, factor: float, scheme: str
) -> None:
    hostile = rescaled(model, tmp_path / "hostile.onnx", layer, {2: factor}, LAYERS[layer])
    mended = tmp_path / "mended.onnx"
    found = equalized(hostile, mended, pictures(16))
    assert found is not None
    assert layer in found["layers"]
    assert found["largest_factor"] >= 4.0

    logits = run(model, UNSEEN)
    assert np.abs(run(hostile, UNSEEN) - logits).max() < 1e-5 * np.abs(logits).max()
    assert np.abs(run(mended, UNSEEN) - logits).max() < 1e-5 * np.abs(logits).max()
    close = {}
    for path in (model, mended):
        to_int8(path, tmp_path / "int8.onnx", pictures(16), SCHEMES[scheme], threads=1)
        close[path] = sqnr(logits, run(tmp_path / "int8.onnx", UNSEEN))
    assert close[mended] > close[model] - 3.0


@pytest.mark.parametrize("scheme", [SCHEMES["u8/8"], SCHEMES["s8/8"]])
@pytest.mark.parametrize("factor", [50, 1 / 50])
def test_outliers_everywhere_are_worth_many_decibels(
    tmp_path: Path, model: Path, factor: float, scheme: Scheme
) -> None:
    hostile = model
    for index, (layer, readers) in enumerate(LAYERS.items()):
        hostile = rescaled(hostile, tmp_path / f"{index}.onnx", layer, {1: factor}, readers)
    found = equalized(hostile, tmp_path / "mended.onnx", pictures(16))
    assert found is not None
    assert found["layers"] == sorted(LAYERS)
    assert found["channels"] == len(LAYERS)
    logits = run(model, UNSEEN)
    close = {}
    for path in (model, hostile, tmp_path / "mended.onnx"):
        to_int8(path, tmp_path / "int8.onnx", pictures(16), scheme, threads=1)
        close[path.stem] = sqnr(logits, run(tmp_path / "int8.onnx", UNSEEN))
    assert close["mended"] > close[hostile.stem] + 10.0
    assert close["mended"] > close["float"] - 3.0


@settings(max_examples=15)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_the_logits_stay_whatever_is_scaled(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("random")
    hostile = googlenet_like(folder / "float.onnx", seed=seed)
    logits = run(hostile, UNSEEN)
    factors = st.sampled_from([50.0, 1 / 50, 1000.0, 7.0])
    for layer, readers in LAYERS.items():
        channels = data.draw(st.dictionaries(st.integers(0, 3), factors, max_size=2))
        hostile = rescaled(hostile, folder / "hostile.onnx", layer, channels, readers)
    found = equalized(hostile, folder / "mended.onnx", pictures(4))
    if found is None:
        assert not (folder / "mended.onnx").exists()
        return
    onnx.checker.check_model(str(folder / "mended.onnx"), full_check=True)
    difference = np.abs(run(folder / "mended.onnx", UNSEEN) - logits).max()
    assert difference < 1e-4 * np.abs(logits).max()
    # What it returns is what it did.
    before, after = constants(hostile), constants(folder / "mended.onnx")
    changed = [n for n in before if n.endswith(".bias") and not np.array_equal(before[n], after[n])]
    assert sorted(name.removesuffix(".bias") for name in changed) == found["layers"]
    rows = sum((before[name] != after[name]).sum() for name in changed)
    assert rows == found["channels"]


@pytest.mark.parametrize("count", [2, 16])
def test_a_network_without_outliers_is_left_alone(tmp_path: Path, model: Path, count: int) -> None:
    assert equalized(model, tmp_path / "mended.onnx", pictures(count)) is None
    assert list(tmp_path.iterdir()) == []


def with_a_rare_channel(folder: Path, weighed: float) -> Path:
    """Channel 3 of the first layer is 0.01 at most in `pictures(8)`; its reader weighs it so."""
    probe = Graph(seed=5)
    probe.conv("input", 16, "rare", kernel=3)
    tops = run(probe.save(folder / "probe.onnx", "rare_out"), pictures(8)).max((0, 2, 3))
    graph = Graph(seed=5)
    data = graph.relu(graph.conv("input", 16, "rare", kernel=3))
    output = graph.conv(data, 8, "reader")
    for value in graph.initializers:
        values = numpy_helper.to_array(value).copy()
        if value.name == "rare.bias":
            values[3] -= tops[3] - 0.01
        elif value.name == "reader.weight":
            values[:, 3] *= weighed
        value.CopyFrom(numpy_helper.from_array(values, value.name))
    return graph.save(folder / "float.onnx", output)


def test_a_channel_that_calibration_hardly_saw_does_not_grow(tmp_path: Path) -> None:
    """The next picture may be full of it: grown, it would overflow the range of its region."""
    path = with_a_rare_channel(tmp_path, weighed=1.0)
    statistics = calibrate(path, pictures(8), threads=1)
    peaks = statistics.peaks("rare.relu_out")
    assert 0.0 < peaks[3] < 0.01 * np.median(peaks)
    assert equalize(path, tmp_path / "mended.onnx", statistics) is None


def test_a_small_channel_grows_by_no_more_than_its_readers_weigh_it(tmp_path: Path) -> None:
    path = with_a_rare_channel(tmp_path, weighed=10.0)
    found = equalized(path, tmp_path / "mended.onnx", pictures(8))
    assert found is not None
    assert (found["layers"], found["channels"]) == (["rare"], 1)
    assert 5.0 < found["largest_factor"] < 20.0  # and not hundreds, to the median of the peaks


def test_dead_channels_are_left_alone(tmp_path: Path, model: Path) -> None:
    proto = onnx.load(model)
    for value in proto.graph.initializer:
        array = numpy_helper.to_array(value).copy()
        if value.name in ("3a.3a.weight", "3a.3a.bias", "4a.1x1.weight", "4a.1x1.bias"):
            array[1] = 0.0  # written as zeros
        elif value.name == "4a.3b.weight":
            array[:, 2] = 0.0  # read by nobody
        elif value.name.startswith("4a.5b"):
            array[:] = 0.0
        value.CopyFrom(numpy_helper.from_array(array, value.name))
    onnx.save(proto, tmp_path / "dead.onnx")
    assert equalized(tmp_path / "dead.onnx", tmp_path / "mended.onnx", pictures(4)) is None
    hostile = rescaled(
        tmp_path / "dead.onnx", tmp_path / "hostile.onnx", "3a.3a", {2: 50.0}, LAYERS["3a.3a"]
    )
    found = equalized(hostile, tmp_path / "mended.onnx", pictures(4))
    assert found is not None
    assert (found["layers"], found["channels"]) == (["3a.3a"], 1)
    difference = run(tmp_path / "mended.onnx", UNSEEN) - run(hostile, UNSEEN)
    assert np.abs(difference).max() < 1e-5


def readers_of_several_kinds(graph: Graph, data: str) -> str:
    """A tensor that goes through pools and nested Concats into convolutions and a Gemm."""
    other = graph.block("input", 4, "other")
    inner = graph.concat([other, graph.pool(data, "pool")], "inner")
    outer = graph.concat([inner, graph.block(data, 2, "direct"), data, inner], "outer")
    average = graph.add("AveragePool", [outer], "mean", kernel_shape=[2, 2], strides=[2, 2])
    parts = [graph.block(average, 8, "left", kernel=3), average]
    data = graph.add("GlobalAveragePool", [graph.concat(parts, "both")], "average")
    return graph.gemm(graph.add("Flatten", [data], "flatten"), 5)


@pytest.mark.parametrize("factor", [50, 1 / 50])
def test_channels_are_followed_through_pools_and_nested_concats(
    tmp_path: Path, factor: float
) -> None:
    graph = Graph(size=16)
    path = graph.save(
        tmp_path / "f.onnx", readers_of_several_kinds(graph, graph.block("input", 6, "writer"))
    )
    # `writer` is six of: inner 4..9, outer 4..9, 12..17 and 22..27, both 8 more than outer.
    places = {
        "direct": [0],
        "left": [4, 12, 22],
        "fc": [12, 20, 30],
    }
    hostile = path
    for channel in (1, 4):
        changed = {name: values.copy() for name, values in constants(hostile).items()}
        for kind in ("weight", "bias"):
            changed[f"writer.{kind}"][channel] *= np.float32(factor)
        for reader, offsets in places.items():
            for offset in offsets:
                changed[f"{reader}.weight"][:, offset + channel] /= np.float32(factor)
        proto = onnx.load(hostile)
        for value in proto.graph.initializer:
            value.CopyFrom(numpy_helper.from_array(changed[value.name], value.name))
        hostile = tmp_path / "hostile.onnx"
        onnx.save(proto, hostile)
    images = pictures(8, 16)
    logits = run(path, images)
    assert np.abs(run(hostile, images) - logits).max() < 1e-5 * np.abs(logits).max()
    found = equalized(hostile, tmp_path / "mended.onnx", images)
    assert found is not None
    assert (found["layers"], found["channels"]) == (["writer"], 2)
    mended = run(tmp_path / "mended.onnx", images)
    assert np.abs(mended - logits).max() < 1e-5 * np.abs(logits).max()


def grow(graph: Graph, layer: str, factor: float = 50.0) -> None:
    """Make one channel of a layer larger."""
    for value in graph.initializers:
        if value.name in (f"{layer}.weight", f"{layer}.bias"):
            values = numpy_helper.to_array(value).copy()
            values[1] *= factor
            value.CopyFrom(numpy_helper.from_array(values, value.name))


def into_lrn(graph: Graph, data: str) -> str:
    parts = [graph.conv(data, 4, "after"), graph.conv(graph.lrn(data, "norm"), 4, "beside")]
    return graph.add("Add", parts, "sum")


def into_a_sigmoid(graph: Graph, data: str) -> str:
    curved = graph.add("Sigmoid", [data], "sigmoid")
    return graph.add("Add", [graph.conv(data, 4, "a"), graph.conv(curved, 4, "b")], "sum")


def into_a_sum(graph: Graph, data: str) -> str:
    shifted = graph.add("Add", [data, graph.block("input", 8, "other")], "residual")
    return graph.add("Add", [graph.conv(data, 4, "a"), graph.conv(shifted, 4, "b")], "sum")


def into_the_output(graph: Graph, data: str) -> str:
    return graph.concat([data, graph.conv(data, 4, "after")], "cat")


def into_a_group_conv(graph: Graph, data: str) -> str:
    return graph.conv(data, 8, "after", group=2)


def into_a_flattened_map(graph: Graph, data: str) -> str:
    graph.conv(data, 4, "after")
    flat = graph.add("Flatten", [data], "flatten")
    graph.channels[flat] = 8 * 16 * 16
    pooled = graph.add("GlobalAveragePool", ["after_out"], "average")
    pooled = graph.add("Flatten", [pooled], "pooled")
    return graph.add("Add", [graph.gemm(flat, 4), pooled], "sum")


def into_columns(graph: Graph, data: str) -> str:
    graph.conv(data, 4, "after")
    pooled = graph.add("GlobalAveragePool", [data], "average")
    column = graph.add("Flatten", [pooled], "column", axis=2)  # (8, 1)
    graph.channels[column] = 1
    scalars = [
        graph.add("ReduceMean", [part], f"mean.{part}", keepdims=0)
        for part in (graph.gemm(column, 16), "after_out")
    ]
    return graph.add("Add", scalars, "sum")


def into_a_bias(graph: Graph, data: str) -> str:
    graph.conv(data, 4, "after")
    pooled = graph.add("GlobalAveragePool", [data], "average")
    flat = graph.add("Flatten", [pooled], "flatten")
    graph.gemm(graph.gemm(flat, 8, "first"), 8, "second")
    graph.nodes[-1].input[2] = flat
    graph.initializers = [v for v in graph.initializers if v.name != "second.bias"]
    return "second_out"


def into_a_concat_of_rows(graph: Graph, data: str) -> str:
    graph.add("Concat", [data, data], "cat", axis=2)
    return graph.conv("cat_out", 4, "after")


def with_a_shared_reader(graph: Graph, data: str) -> str:
    graph.conv(data, 8, "after")
    graph.conv("after_out", 8, "again")
    graph.nodes[-1].input[1] = "after.weight"
    graph.initializers = [v for v in graph.initializers if v.name != "again.weight"]
    return "again_out"


def with_a_shared_bias(graph: Graph, data: str) -> str:
    graph.conv(data, 8, "after")
    graph.nodes[-1].input[2] = "writer.bias"
    graph.initializers = [v for v in graph.initializers if v.name != "after.bias"]
    return "after_out"


def with_a_computed_reader(graph: Graph, data: str) -> str:
    graph.channels["raw"] = 4
    raw = graph.constant("raw", np.ones((4, 8, 1, 1), np.float32))
    made = graph.add("Relu", [raw], "made")
    return graph.concat([graph.add("Conv", [data, made], "dynamic"), graph.conv(data, 4, "b")], "c")


OBSTACLES: list[Callable[[Graph, str], str]] = [
    into_lrn,
    into_a_sigmoid,
    into_a_sum,
    into_the_output,
    into_a_group_conv,
    into_a_flattened_map,
    into_columns,
    into_a_bias,
    into_a_concat_of_rows,
    with_a_shared_reader,
    with_a_shared_bias,
    with_a_computed_reader,
]


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda function: function.__name__)
def test_what_does_not_keep_a_factor_is_an_obstacle(
    tmp_path: Path, obstacle: Callable[[Graph, str], str]
) -> None:
    graph = Graph(size=16)
    output = obstacle(graph, graph.block("input", 8, "writer"))
    grow(graph, "writer")
    path = graph.save(tmp_path / "f.onnx", output)
    assert equalized(path, tmp_path / "mended.onnx", pictures(4, 16)) is None


def test_without_the_obstacle_the_same_channel_is_scaled(tmp_path: Path) -> None:
    graph = Graph(size=16)
    output = graph.conv(graph.block("input", 8, "writer"), 4, "after")
    grow(graph, "writer")
    path = graph.save(tmp_path / "f.onnx", output)
    images = pictures(4, 16)
    assert equalized(path, tmp_path / "mended.onnx", images) == {
        "channels": 1,
        "largest_factor": pytest.approx(50**0.5, rel=0.5),
        "layers": ["writer"],
    }
    logits = run(path, images)
    difference = np.abs(run(tmp_path / "mended.onnx", images) - logits).max()
    assert difference < 1e-5 * np.abs(logits).max()


def test_a_layer_that_is_read_before_and_behind_its_relu_is_scaled_once(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = graph.conv("input", 8, "writer")
    parts = [graph.conv(data, 4, "before"), graph.conv(graph.relu(data), 4, "behind")]
    output = graph.add("Add", parts, "sum")
    grow(graph, "writer", 5000.0)
    path = graph.save(tmp_path / "f.onnx", output)
    images = pictures(4, 16)
    found = equalized(path, tmp_path / "mended.onnx", images)
    assert found is not None
    assert (found["layers"], found["channels"]) == (["writer"], 1)
    before, after = constants(path), constants(tmp_path / "mended.onnx")
    for name, axis in (("writer", 0), ("before", 1), ("behind", 1)):
        old, new = (np.take(values[f"{name}.weight"], 1, axis) for values in (before, after))
        factor = old / new if name == "writer" else new / old
        assert np.allclose(factor, found["largest_factor"], rtol=1e-5)
    logits = run(path, images)
    difference = np.abs(run(tmp_path / "mended.onnx", images) - logits).max()
    assert difference < 1e-5 * np.abs(logits).max()


def test_the_outputs_of_a_group_conv_can_be_scaled(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = graph.block("input", 8, "stem")
    output = graph.conv(graph.relu(graph.conv(data, 8, "writer", group=2, bias=False)), 4, "after")
    grow(graph, "writer")
    path = graph.save(tmp_path / "f.onnx", output)
    images = pictures(4, 16)
    found = equalized(path, tmp_path / "mended.onnx", images)
    assert found is not None
    assert found["layers"] == ["writer"]
    logits = run(path, images)
    difference = np.abs(run(tmp_path / "mended.onnx", images) - logits).max()
    assert difference < 1e-5 * np.abs(logits).max()


def test_two_runs_write_equal_bytes_and_leave_the_model_alone(tmp_path: Path, model: Path) -> None:
    hostile = rescaled(model, tmp_path / "h.onnx", "3a.3a", {0: 50.0}, LAYERS["3a.3a"])
    before = hostile.read_bytes()
    statistics = calibrate(hostile, pictures(4), threads=1)
    facts = [equalize(hostile, tmp_path / name, statistics) for name in ("a.onnx", "b.onnx")]
    assert facts[0] == facts[1]
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert hostile.read_bytes() == before
