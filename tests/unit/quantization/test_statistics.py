from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graphs import Graph, googlenet_like, pictures
from hypothesis import given, settings
from hypothesis import strategies as st

from gnet_opt.quantization import Statistics, calibrate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return googlenet_like(tmp_path_factory.mktemp("statistics") / "float.onnx")


def assert_equal(one: Statistics, other: Statistics, *, exactly: bool = True) -> None:
    """Sums of floats depend on the order in their last bits."""
    assert one.images == other.images
    for kind in ("histograms", "highs", "lows", "sums"):
        assert list(getattr(one, kind)) == list(getattr(other, kind))
    for name, seen in one.histograms.items():
        found = other.histograms[name]
        for field, value in vars(seen).items():
            assert np.array_equal(value, vars(found)[field]), (name, field)
    for kind in ("highs", "lows"):
        for name, ends in getattr(one, kind).items():
            found = getattr(other, kind)[name]
            assert ends.dtype == found.dtype == np.float32
            assert np.array_equal(ends, found)
    for name, sums in one.sums.items():
        assert sums.dtype == other.sums[name].dtype == np.float64
        tolerance = 0.0 if exactly else 1e-12 * max(1.0, float(np.abs(sums).max()))
        assert np.abs(sums - other.sums[name]).max() <= tolerance


@settings(max_examples=10)
@given(first=st.integers(1, 7))
def test_two_sets_merge_to_what_one_pass_sees(model: Path, first: int) -> None:
    images = pictures(8)
    whole = calibrate(model, images, threads=1)
    one, other = (calibrate(model, part, threads=1) for part in (images[:first], images[first:]))
    assert_equal(one.merged(other), whole, exactly=False)
    assert_equal(other.merged(one), whole, exactly=False)
    assert (one.images, other.images) == (first, 8 - first)


def test_the_mean_of_two_sets_weighs_their_pictures(tmp_path: Path) -> None:
    graph = Graph(size=16)
    model = graph.save(tmp_path / "f.onnx", graph.conv("input", 2, "a"))
    dark, bright = pictures(3, 16), [image + 10 for image in pictures(1, 16, seed=1)]
    merged = calibrate(model, dark).merged(calibrate(model, bright))
    expected = np.stack([*dark, *bright]).mean((0, 2, 3), dtype=np.float64)
    assert np.allclose(merged.mean("input"), expected, rtol=1e-12)
    assert merged.images == 4
    assert np.array_equal(merged.peaks("input"), np.abs(np.stack(bright)).max((0, 2, 3)))
