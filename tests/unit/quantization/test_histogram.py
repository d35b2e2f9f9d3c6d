from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gnet_opt.quantization.statistics import BINS, Histogram

Array = npt.NDArray[np.float32]

anything = st.floats(width=32, allow_nan=False, allow_infinity=False)
usual = st.floats(-100, 100, width=32) | st.just(0.0) | st.just(-0.0)
chunks = st.lists(hnp.arrays(np.float32, st.integers(0, 30), elements=usual | anything), max_size=6)


def histogram(*parts: Array) -> Histogram:
    made = Histogram()
    for part in parts:
        made.add(part)
    return made


def state(made: Histogram) -> tuple[object, ...]:
    counts = made.positive.tolist(), made.negative.tolist()
    return (made.minimum, made.maximum, made.width, made.zeros, *counts)


@given(parts=chunks, data=st.data())
def test_the_order_of_the_data_does_not_matter(parts: list[Array], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(parts))
    together = np.concatenate([np.zeros(0, np.float32), *parts])
    assert state(histogram(*parts)) == state(histogram(*shuffled)) == state(histogram(together))


@given(groups=st.lists(chunks, max_size=4), data=st.data())
def test_a_merge_is_one_pass_over_all_data(groups: list[list[Array]], data: st.DataObject) -> None:
    parts = [histogram(*group) for group in groups]
    before = [state(part) for part in parts]
    one_pass = histogram(*(values for group in groups for values in group))
    assert state(Histogram.merged(data.draw(st.permutations(parts)))) == state(one_pass)
    assert [state(part) for part in parts] == before


@given(groups=st.lists(chunks, min_size=3, max_size=3), more=chunks)
def test_a_merged_histogram_is_one_to_merge_and_to_go_on_with(
    groups: list[list[Array]], more: list[Array]
) -> None:
    first, second, third = (histogram(*group) for group in groups)
    made = Histogram.merged([first, Histogram.merged([second, third])])
    for values in more:
        made.add(values)
    assert state(made) == state(histogram(*(v for group in (*groups, more) for v in group)))
    assert state(second) == state(histogram(*groups[1]))


def test_nothing_merged_is_nothing_seen() -> None:
    assert state(Histogram.merged([])) == state(Histogram())
    seen = histogram(np.float32([-3.0, 0.0, 0.5]))
    assert state(Histogram.merged([Histogram(), seen, Histogram()])) == state(seen)
    zeros = histogram(np.zeros(4, np.float32))
    assert state(Histogram.merged([zeros, zeros])) == state(histogram(np.zeros(8, np.float32)))


def test_a_wide_and_a_narrow_histogram_merge_either_way() -> None:
    wide, narrow = np.float32([-1000.0, 999.0]), np.float32([1e-3, -2e-3, 0.0])
    expected = state(histogram(wide, narrow))
    assert state(Histogram.merged([histogram(wide), histogram(narrow)])) == expected
    assert state(Histogram.merged([histogram(narrow), histogram(wide)])) == expected


@given(chunks)
def test_counts_are_those_of_a_second_pass_at_the_final_width(parts: list[Array]) -> None:
    made = histogram(*parts)
    values = np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float64)
    assert made.zeros == np.count_nonzero(values == 0.0)
    if made.width == 0.0:
        assert not values.any()
        return
    edges = (0.0, made.width * BINS)
    for counts, magnitudes in ((made.positive, values[values > 0]), (made.negative, -values)):
        expected, _ = np.histogram(magnitudes[magnitudes > 0], BINS, edges)
        assert np.array_equal(counts, expected)
    assert made.zeros + made.positive.sum() + made.negative.sum() == values.size


@given(chunks.filter(lambda parts: any(part.size for part in parts)))
def test_extremes_and_width(parts: list[Array]) -> None:
    made = histogram(*parts)
    values = np.concatenate(parts)
    assert (made.minimum, made.maximum) == (values.min(), values.max())
    largest = float(np.abs(values).max())
    if largest == 0.0:
        assert made.width == 0.0
        return
    mantissa, _ = np.frexp(made.width)
    assert mantissa == 0.5  # a power of two
    assert largest < made.width * BINS
    # The upper half is in use, but for values next to nothing.
    assert largest >= made.width * BINS / 2 or made.width == 2.0**-100 / BINS


@pytest.mark.parametrize("first", [1.0, 0.999, 2.0**-20])
def test_growth_is_exact(first: float) -> None:
    values = np.float32(first) * np.linspace(0, 1, 5000, dtype=np.float32)
    grown = histogram(values, np.float32([-1000.0]))
    assert state(grown) == state(histogram(np.float32([-1000.0]), values))
    assert grown.positive.sum() == np.count_nonzero(values)
    assert grown.negative.sum() == 1


def test_a_value_on_an_edge_belongs_to_the_bin_above() -> None:
    made = histogram(np.float32([4095, 1, 2, 0.99, -1]))
    assert made.width == 1.0
    assert made.positive[[0, 1, 2, 4095]].tolist() == [1, 1, 1, 1]
    assert made.negative[[0, 1]].tolist() == [0, 1]
    made.add(np.float32([4096]))
    assert made.width == 2.0
    assert made.positive[[0, 1, 2047, 2048]].tolist() == [2, 1, 1, 1]


def test_zeros_are_counted_apart() -> None:
    made = histogram(np.zeros((2, 3), np.float32), np.float32([0.0, -0.0, 1.0]), np.float32([]))
    assert (made.zeros, made.positive.sum(), made.negative.sum()) == (8, 1, 0)
    assert (made.minimum, made.maximum) == (0.0, 1.0)
    only = histogram(np.zeros(3, np.float32))
    assert (only.zeros, only.width) == (3, 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_changes_nothing(value: float) -> None:
    made = histogram(np.float32([1, -2, 0]))
    before = state(made)
    with pytest.raises(ValueError, match="a value is not finite"):
        made.add(np.float32([3, value, -100]))
    assert state(made) == before


@pytest.mark.parametrize("value", [np.finfo(np.float32).max, 1e-45, np.finfo(np.float32).tiny])
def test_the_ends_of_float32(value: float) -> None:
    made = histogram(np.float32([value, -value]))
    assert made.positive.sum() == made.negative.sum() == 1
    assert np.isfinite(made.width * BINS)


def test_centres_are_magnitudes() -> None:
    made = histogram(np.float32([4095]))
    assert made.centres()[:2].tolist() == [0.5, 1.5]
    assert len(made.centres()) == BINS


def test_memory_does_not_grow_with_the_data() -> None:
    made = Histogram()
    for _ in range(20):
        made.add(np.random.default_rng(0).normal(size=10_000).astype(np.float32))
    assert made.positive.nbytes + made.negative.nbytes == 2 * 8 * BINS
    assert set(vars(made)) == {"maximum", "minimum", "negative", "positive", "width", "zeros"}
