from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from graphs import Graph, googlenet_like, pictures, run

from gnet_opt.errors import CalibrationError
from gnet_opt.quantization.collect import Statistics, collect
from gnet_opt.quantization.regions import find_regions, load_graph
from gnet_opt.quantization.statistics import Histogram


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return googlenet_like(tmp_path_factory.mktemp("collect") / "float.onnx")


def collected(path: Path, images: Iterator[np.ndarray] | list[np.ndarray]) -> Statistics:
    return collect(path, find_regions(load_graph(path)), images, threads=1)


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
    assert np.allclose(statistics.means["input"], means, rtol=1e-12)


def test_a_shared_range_counts_each_of_its_sources(tmp_path: Path) -> None:
    graph = Graph(size=16)
    parts = [graph.block("input", 4, "a"), graph.block("input", 2, "b")]
    graph.conv(graph.pool(graph.concat(parts, "cat"), "pool"), 4, "after")
    images = pictures(3, 16)
    path = graph.save(tmp_path / "f.onnx", "after_out")
    seen = collected(path, images).histograms["a.relu_out"]
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
    assert sorted(statistics.means) == ["flatten_out", "input"]
    tapped = Graph(size=16)
    values = run(tapped.save(tmp_path / "t.onnx", tapped.block("input", 4, "stem")), images)
    assert np.allclose(statistics.means["flatten_out"], values.mean((0, 2, 3)), atol=1e-6)


def test_pictures_are_read_one_at_a_time_and_let_go(model: Path) -> None:
    living: list[weakref.ref[np.ndarray]] = []
    most = 0

    def stream() -> Iterator[np.ndarray]:
        nonlocal most
        for image in pictures(6):
            mine = image.copy()
            living.append(weakref.ref(mine))
            most = max(most, sum(ref() is not None for ref in living))
            yield mine
            del mine

    assert collected(model, stream()).images == 6
    assert most == 2  # the new one, and the last until its place is taken


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
