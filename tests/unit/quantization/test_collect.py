from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import SCHEMES, Graph, googlenet_like, pictures, run, to_int8
from onnx import numpy_helper

from gnet_opt.errors import CalibrationError
from gnet_opt.quantization.collect import Statistics, collect
from gnet_opt.quantization.regions import find_regions, load_graph
from gnet_opt.quantization.statistics import Histogram
from gnet_opt.target import Scheme

ONE_RUN = """
import sys
from pathlib import Path

import numpy as np

from gnet_opt.quantization import calibrate

path, count, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
random = np.random.default_rng(0)
images = (random.normal(size=(3, size, size)).astype(np.float32) for _ in range(count))
assert calibrate(path, images, threads=1).images == count
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""
"""Calibrates in a process of its own and prints the most memory it held, in KiB."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return googlenet_like(tmp_path_factory.mktemp("collect") / "float.onnx")


def collected(
    path: Path,
    images: Iterator[np.ndarray] | list[np.ndarray],
    *,
    histograms: bool = True,
    threads: int = 1,
) -> Statistics:
    regions = find_regions(load_graph(path))
    return collect(path, regions, images, histograms=histograms, threads=threads)


def test_the_input_is_counted_as_it_is(model: Path) -> None:
    images = pictures(4)
    statistics = collected(model, images)
    expected = Histogram()
    expected.add(np.stack(images))
    seen = statistics.histograms["input"]
    assert statistics.images == 4
    assert (seen.minimum, seen.maximum, seen.zeros) == (
        expected.minimum,
        expected.maximum,
        expected.zeros,
    )
    assert np.array_equal(seen.positive, expected.positive)
    assert np.array_equal(seen.negative, expected.negative)
    means = np.stack(images).mean((0, 2, 3), dtype=np.float64)
    assert np.allclose(statistics.mean("input"), means, rtol=1e-12)


def test_a_shared_range_counts_each_of_its_sources(tmp_path: Path) -> None:
    graph = Graph(size=16)
    parts = [graph.block("input", 4, "a"), graph.block("input", 2, "b")]
    graph.conv(graph.pool(graph.concat(parts, "cat"), "pool"), 4, "after")
    images = pictures(3, 16)
    path = graph.save(tmp_path / "f.onnx", "after_out")
    seen = collected(path, images).histogram(["a.relu_out", "b.relu_out"])
    # Not the concat and the pool too: they hold no values of their own.
    assert seen.zeros + seen.positive.sum() == 3 * 6 * 16 * 16
    tapped = Graph(size=16)
    tapped.concat([tapped.block("input", 4, "a"), tapped.block("input", 2, "b")], "cat")
    values = run(tapped.save(tmp_path / "tapped.onnx", "cat_out"), images)
    assert seen.maximum == pytest.approx(values.max(), rel=1e-5)
    assert seen.minimum == 0.0


def test_means_are_of_what_each_conv_and_gemm_reads(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = graph.block("input", 4, "stem")
    data = graph.add("Flatten", [graph.add("GlobalAveragePool", [data], "average")], "flatten")
    images = pictures(3, 16)
    statistics = collected(graph.save(tmp_path / "f.onnx", graph.gemm(data, 5)), images)
    assert sorted(statistics.sums) == ["flatten_out", "input"]
    tapped = Graph(size=16)
    values = run(tapped.save(tmp_path / "t.onnx", tapped.block("input", 4, "stem")), images)
    assert np.allclose(statistics.mean("flatten_out"), values.mean((0, 2, 3)), atol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_pictures_are_read_when_there_is_a_thread_for_them_and_let_go(
    model: Path, threads: int
) -> None:
    living: list[weakref.ref[np.ndarray]] = []
    most = 0

    def stream() -> Iterator[np.ndarray]:
        nonlocal most
        for image in pictures(12):
            mine = image.copy()
            living.append(weakref.ref(mine))
            most = max(most, sum(ref() is not None for ref in living))
            yield mine
            del mine

    assert collected(model, stream(), threads=threads).images == 12
    assert most <= threads + 1  # one that waits


@pytest.mark.parametrize("histograms", [False, True])
def test_threads_change_nothing(model: Path, histograms: bool) -> None:
    images = pictures(9)
    one, other = (
        collected(model, images, threads=threads, histograms=histograms) for threads in (1, 4)
    )
    for kind in ("lows", "highs", "sums"):
        vectors, found = getattr(one, kind), getattr(other, kind)
        assert list(vectors) == list(found)
        for name, vector in vectors.items():
            assert vector.tobytes() == found[name].tobytes()
    assert len(one.histograms) == len(other.histograms) == histograms * len(one.lows)
    for name, seen in one.histograms.items():
        assert np.array_equal(seen.positive, other.histograms[name].positive)
        assert np.array_equal(seen.negative, other.histograms[name].negative)


def test_bounds_are_those_of_the_histograms(model: Path) -> None:
    images = pictures(5)
    counted, plain = (collected(model, images, histograms=held) for held in (True, False))
    assert not plain.histograms
    assert list(plain.lows) == list(counted.histograms)
    for name, seen in counted.histograms.items():
        assert plain.bounds([name]) == counted.bounds([name]) == seen.bounds
    both = list(plain.lows)[:2]
    assert plain.bounds(both) == counted.histogram(both).bounds


def test_peaks_are_the_largest_magnitude_of_each_channel(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = graph.conv("input", 4, "a", kernel=3)
    graph.conv(data, 2, "b")
    images = pictures(5, 16)
    statistics = collected(graph.save(tmp_path / "f.onnx", "b_out"), images)
    assert sorted(statistics.lows) == sorted(statistics.highs) == ["a_out", "input"]
    assert np.array_equal(statistics.peaks("input"), np.abs(np.stack(images)).max((0, 2, 3)))
    tapped = Graph(size=16)
    values = run(tapped.save(tmp_path / "t.onnx", tapped.conv("input", 4, "a", kernel=3)), images)
    low, high = values.min((0, 2, 3)), values.max((0, 2, 3))
    assert (-low > high).any()
    assert (high > -low).any()
    assert np.allclose(statistics.peaks("a_out"), np.maximum(-low, high), rtol=1e-5)


def test_peaks_of_what_a_gemm_reads_are_one_a_feature(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = graph.block("input", 6, "stem")
    data = graph.add("Flatten", [graph.add("GlobalAveragePool", [data], "average")], "flatten")
    images = pictures(3, 16)
    statistics = collected(graph.save(tmp_path / "f.onnx", graph.gemm(data, 5)), images)
    tapped = Graph(size=16)
    values = run(tapped.save(tmp_path / "t.onnx", tapped.block("input", 6, "stem")), images)
    expected = values.mean((2, 3)).max(0)
    assert statistics.peaks("flatten_out").shape == (6,)
    assert np.allclose(statistics.peaks("flatten_out"), expected, rtol=1e-4)


def test_a_set_without_pictures(model: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        collected(model, [])
    assert str(caught.value) == (
        "There is no picture to calibrate on. Pass a folder that has some."
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_named(model: Path, value: float) -> None:
    images = pictures(3)
    images[1][0, 0, 0] = value
    with pytest.raises(CalibrationError) as caught:
        collected(model, images)
    message = str(caught.value)
    assert message.startswith("The tensor ")
    assert message.endswith(
        " of picture 2 holds a value that is not finite. "
        "Check the weights and the preprocess of the model."
    )


def test_the_order_of_the_pictures_does_not_matter(model: Path) -> None:
    images = pictures(5)
    one, other = collected(model, images), collected(model, images[::-1])
    for name, seen in one.histograms.items():
        assert np.array_equal(seen.positive, other.histograms[name].positive)
        assert np.array_equal(seen.negative, other.histograms[name].negative)


def spoiled(model: Path, folder: Path, name: str, value: float) -> Path:
    """The model with one value of a constant replaced."""
    proto = onnx.load(model)
    for constant in proto.graph.initializer:
        if constant.name == name:
            values = numpy_helper.to_array(constant).copy()
            values.ravel()[-1] = value
            constant.CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(proto, folder / "spoiled.onnx")
    return folder / "spoiled.onnx"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("layer", "constant"),
    [
        ("Conv conv1", "conv1.weight"),
        ("Conv 3a.5b", "3a.5b.bias"),
        ("Gemm fc", "fc.weight"),
        ("Gemm fc", "fc.bias"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(
    tmp_path: Path, model: Path, layer: str, constant: str, value: float
) -> None:
    with pytest.raises(CalibrationError) as caught:
        collected(spoiled(model, tmp_path, constant, value), pictures(1))
    assert str(caught.value) == (
        f"The constant {constant} of the {layer} holds a value that is not finite. "
        "Check the weights of the model."
    )


def test_an_activation_that_overflows_is_named(tmp_path: Path) -> None:
    graph = Graph(size=16)
    data = "input"
    for name in "abc":
        data = graph.block(data, 4, name)
        weight = numpy_helper.to_array(graph.initializers[-2]) * np.float32(1e20)
        graph.initializers[-2].CopyFrom(numpy_helper.from_array(weight, f"{name}.weight"))
    with pytest.raises(CalibrationError) as caught:
        collected(graph.save(tmp_path / "f.onnx", data), pictures(1, 16))
    assert str(caught.value) == (
        "The tensor b.relu_out of picture 1 holds a value that is not finite. "
        "Check the weights and the preprocess of the model."
    )


def plain(*colour: float) -> np.ndarray:
    return np.broadcast_to(np.float32(colour).reshape(3, 1, 1), (3, 32, 32)).copy()


@pytest.mark.parametrize("colours", [[(0, 0, 0)], [(0.5, -1, 2), (1, 1, 1), (0, 0, 0)]])
def test_pictures_of_a_single_colour(model: Path, colours: list[tuple[float, ...]]) -> None:
    with pytest.raises(CalibrationError) as caught:
        collected(model, [plain(*colour) for colour in colours])
    assert str(caught.value) == (
        f"Each of the {len(colours)} calibration pictures is of a single colour, so the ranges "
        "would fit no real picture. Pass pictures like those that the model will see."
    )


def test_a_plain_picture_among_others_is_one_of_them(model: Path) -> None:
    assert collected(model, [plain(0, 0, 0), *pictures(1), plain(1, 0, 0)]).images == 3
    almost = plain(0.5, 0.5, 0.5)
    almost[2, 31, 31] = 0.25
    assert collected(model, [almost]).images == 1


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("dead", ["channels", "conv", "branch", "module", "input"])
def test_dead_channels_and_layers_give_a_usable_file(
    tmp_path: Path, model: Path, scheme: Scheme, dead: str
) -> None:
    proto = onnx.load(model)
    layers = {
        "branch": ["3a.3b"],
        "channels": ["conv2", "3a.1x1", "fc"],
        "conv": ["conv1"],
        "input": [],
        "module": ["4a.1x1", "4a.3b", "4a.5b", "4a.proj"],
    }[dead]
    for constant in proto.graph.initializer:
        if constant.name.rpartition(".")[0] in layers:
            values = numpy_helper.to_array(constant).copy()
            values[: 2 if dead == "channels" else None] = 0.0
            constant.CopyFrom(numpy_helper.from_array(values, constant.name))
    path = tmp_path / "float.onnx"
    onnx.save(proto, path)
    images = pictures(4)
    if dead == "input":  # one colour channel is the same everywhere, say of a grey camera
        for image in images:
            image[1] = 0.0
    to_int8(path, tmp_path / "int8.onnx", images, scheme, threads=1)
    expected, found = run(path, images), run(tmp_path / "int8.onnx", images)
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= 0.1 * np.abs(expected).max()


def most_memory(model: Path, count: int, size: int) -> int:
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not say how much memory a process held")
    command = [sys.executable, "-c", ONE_RUN, str(model), str(count), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_memory_does_not_grow_with_the_pictures(model: Path) -> None:
    few, many = most_memory(model, 100, 32), most_memory(model, 1000, 32)
    assert many <= 1.05 * few


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pictures_of_a_whole_googlenet(tmp_path: Path) -> None:
    from gnet_opt.stages import prepare
    from gnet_opt.stages.load import load

    prepare(load(None), np.stack(pictures(1, 224)), tmp_path / "float.onnx")
    few = most_memory(tmp_path / "float.onnx", 20, 224)
    many = most_memory(tmp_path / "float.onnx", 200, 224)
    assert many <= 1.05 * few
