from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from graphs import S8, U8, U8_7, U8_PAIRS
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gnet_opt.quantization.correction import correct_bias
from gnet_opt.quantization.weights import largest_pair, quantize_weight
from gnet_opt.target import Scheme

Array = npt.NDArray[np.float32]
LARGEST = {8: 127, 7: 64}

values = st.floats(-10, 10, width=32) | st.floats(
    width=32, min_value=-(2.0**100), max_value=2.0**100
)
weights = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=4), elements=values
)
schemes = st.builds(replace, st.sampled_from([U8, U8_7, U8_PAIRS, S8]), per_channel=st.booleans())
pair_schemes = st.builds(replace, st.just(U8_PAIRS), per_channel=st.booleans())
# Halves of the step are ties, and with both weights of a pair on one the roundings add up.
ties = st.integers(-255, 255).map(lambda half: half / 2)
kernels = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 3), st.integers(1, 3)),
    elements=ties | st.floats(-10, 10, width=32),
)
matrices = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=ties | values
)


@given(weight=weights, scheme=schemes)
def test_rounding_is_the_only_error(weight: Array, scheme: Scheme) -> None:
    made = quantize_weight(weight, scheme)
    assert made.integers.dtype == np.int8
    assert made.integers.shape == weight.shape
    assert made.scales.shape == (weight.shape[:1] if scheme.per_channel else ())
    assert np.abs(made.integers.astype(int)).max() <= LARGEST[scheme.weight_bits]
    assert (made.scales > 0).all()
    assert np.isfinite(made.scales).all()
    scales = made.scales.reshape(-1, *(1,) * (weight.ndim - 1)).astype(np.float64)
    error = np.abs(made.integers * scales - weight)
    assert (error <= scales * 0.50001).all()
    assert made.dequantized().dtype == np.float32
    assert np.allclose(made.dequantized(), made.integers * scales, rtol=1e-6, atol=0)


def lanes(channel: npt.NDArray[np.int8]) -> list[list[tuple[int, ...]]]:
    """What meets in the 16-bit lanes, for one output channel, packing by packing.

    Four consecutive input channels at each kernel position, the last ones padded, as oneDNN does;
    and all of them in one row, kernel position by kernel position, as MLAS does.
    """
    channel = channel.reshape(len(channel), -1)  # a Gemm has one position
    positions = [[int(value) for value in column] for column in channel.T]
    rows = [*positions, [value for column in positions for value in column]]
    return [[tuple(row[first : first + 2]) for first in range(0, len(row), 2)] for row in rows]


@given(weight=kernels | matrices, scheme=pair_schemes, search=st.booleans())
def test_neighbours_add_up_to_what_a_lane_holds(
    weight: Array, scheme: Scheme, search: bool
) -> None:
    integers = quantize_weight(weight, scheme, search=search).integers
    found = 0
    for channel in integers:
        for pair in (pair for row in lanes(channel) for pair in row):
            positive = sum(value for value in pair if value > 0)
            negative = sum(value for value in pair if value < 0)
            assert -128 <= negative <= positive <= 128
            found = max(found, positive, -negative)
    assert largest_pair(integers) == found


def vpmaddubsw(
    data: npt.NDArray[np.uint8], weight: npt.NDArray[np.int8]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sums of two products each, as the instruction saturates them and as they are."""
    exact = (data.astype(np.int64) * weight).reshape(-1, 2).sum(axis=1)
    return np.clip(exact, -(2**15), 2**15 - 1), exact


@given(
    weight=kernels | matrices,
    scheme=pair_schemes | st.just(U8_7),
    search=st.booleans(),
    data=st.data(),
)
def test_no_data_saturates_a_lane(
    weight: Array, scheme: Scheme, search: bool, data: st.DataObject
) -> None:
    integers = quantize_weight(weight, scheme, search=search).integers
    for row in (row for channel in integers for row in lanes(channel)):
        packed = np.array([value for pair in row for value in pair], np.int8)
        packed = np.pad(packed, (0, len(packed) % 2))
        pixels = hnp.arrays(np.uint8, packed.shape, elements=st.integers(0, 255))
        worst = [255 * (packed > 0), 255 * (packed < 0), np.full(packed.shape, 255)]
        for pixel in (data.draw(pixels), *(values.astype(np.uint8) for values in worst)):
            saturated, exact = vpmaddubsw(pixel, packed)
            assert np.array_equal(saturated, exact)


def test_eight_bits_saturate_a_lane_without_the_limit() -> None:
    weight = np.float32([[1.0, 1.0]])
    free, fitted = (quantize_weight(weight, scheme).integers.ravel() for scheme in (U8, U8_PAIRS))
    assert free.tolist() == [127, 127]
    assert fitted.tolist() == [64, 64]
    bright = np.full(2, 255, np.uint8)
    assert [one.item() for one in vpmaddubsw(bright, free)] == [32767, 64770]
    assert [one.item() for one in vpmaddubsw(bright, fitted)] == [32640, 32640]


@given(weight=kernels | matrices, per_channel=st.booleans())
def test_fitting_pairs_costs_no_more_than_seven_bits(weight: Array, per_channel: bool) -> None:
    eight, pairs, seven = (
        quantize_weight(weight, replace(scheme, per_channel=per_channel)).scales
        for scheme in (U8, U8_PAIRS, U8_7)
    )
    usable = np.abs(weight).max(axis=tuple(range(1, weight.ndim)) if per_channel else None)
    usable = usable / 127 >= np.finfo(np.float32).tiny  # beyond it every scale is 1
    assert (eight <= pairs)[usable].all()
    assert (pairs <= seven)[usable].all()


def test_two_roundings_of_a_pair_are_put_right() -> None:
    # 58.5 and 69.5 steps of 128: in float32 both come out above the half, 59 + 70 is one too many.
    weight = np.float32([[30.078350067138672, 35.734107971191406]])
    for sign in (1, -1):
        made = quantize_weight(sign * weight, U8_PAIRS)
        assert np.rint(weight / made.scales).tolist() == [[59, 70]]
        assert made.integers.tolist() == [[sign * 59, sign * 69]]


def test_an_odd_number_of_input_channels_is_packed_in_two_ways() -> None:
    # Neighbours in MLAS alone: the last channel of the first position, the first of the next.
    weight = np.zeros((1, 3, 1, 2), np.float32)
    weight[0, 2, 0, 0] = weight[0, 0, 0, 1] = 1.0
    made = quantize_weight(weight, U8_PAIRS)
    assert made.integers[0, [2, 0], 0, [0, 1]].tolist() == [64, 64]
    # Neighbours in oneDNN alone, at the second position.
    weight = np.zeros((1, 3, 1, 2), np.float32)
    weight[0, 0:2, 0, 1] = 1.0
    assert quantize_weight(weight, U8_PAIRS).integers[0, 0:2, 0, 1].tolist() == [64, 64]
    # Neighbours in neither.
    weight = np.zeros((1, 3, 1, 2), np.float32)
    weight[0, 0, 0] = 1.0
    assert quantize_weight(weight, U8_PAIRS).integers[0, 0, 0].tolist() == [127, 127]
    # With an even number both pack channels 0 and 1, 2 and 3.
    weight = np.zeros((1, 4, 1, 2), np.float32)
    weight[0, 1:3] = 1.0
    assert np.abs(quantize_weight(weight, U8_PAIRS).integers).max() == 127


@given(weight=weights | kernels, scheme=schemes)
def test_a_search_never_makes_the_error_larger(weight: Array, scheme: Scheme) -> None:
    axes = tuple(range(1, weight.ndim)) if scheme.per_channel else None
    errors = []
    for search in (False, True):
        made = quantize_weight(weight, scheme, search=search).dequantized()
        errors.append(np.sum((made.astype(np.float64) - weight) ** 2, axis=axes))
    assert np.all(errors[1] <= errors[0])


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_search_clips_an_outlier(per_channel: bool) -> None:
    scheme = replace(U8_7, per_channel=per_channel)
    weight = np.random.default_rng(0).normal(size=(4, 512, 5, 5)).astype(np.float32)
    weight[1, 0, 0, 0] = 8.0  # one among thousands
    plain, searched = (quantize_weight(weight, scheme, search=search) for search in (False, True))
    assert searched.scales.shape == plain.scales.shape
    assert np.all(searched.scales <= plain.scales)
    assert searched.scales.min() < plain.scales.max() == 8.0 / 64
    assert searched.integers[1, 0, 0, 0] == 64
    clipped, kept = (np.sum((made.dequantized() - weight) ** 2) for made in (searched, plain))
    assert clipped < kept


@given(weight=weights)
def test_each_channel_uses_the_whole_range(weight: Array) -> None:
    made = quantize_weight(weight, U8_7)
    for channel, integers in zip(weight, made.integers, strict=True):
        largest = np.abs(channel).max()
        expected = 64 if largest / 64 >= np.finfo(np.float32).tiny else 0
        assert np.abs(integers.astype(int)).max() == expected


def test_two_products_of_seven_bits_fit_sixteen() -> None:
    made = quantize_weight(np.float32([[1.0, -1.0]]), U8_7)
    assert made.integers.tolist() == [[64, -64]]
    assert 255 * (64 + 64) <= np.iinfo(np.int16).max < 255 * (65 + 64)


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(
    ("scheme", "largest"), [(U8, 127), (U8_PAIRS, 64), (U8_7, 64)], ids=["8", "pairs", "7"]
)
def test_dead_channels_get_scale_one(scheme: Scheme, largest: int, search: bool) -> None:
    weight = np.zeros((3, 2, 1, 1), np.float32)
    weight[1] = 2.54
    weight[2] = 1e-44
    made = quantize_weight(weight, scheme, search=search)
    assert made.scales.tolist() == [1.0, np.float32(2.54) / np.float32(largest), 1.0]
    assert made.integers.ravel().tolist() == [0, 0, largest, largest, 0, 0]
    whole = quantize_weight(weight[[0, 2]], replace(scheme, per_channel=False), search=search)
    assert whole.scales.tolist() == 1.0
    assert not whole.integers.any()


def convolve(images: Array, weight: Array, groups: int) -> npt.NDArray[np.float64]:
    """A valid convolution, straight from its definition."""
    count, channels, height, width = images.shape
    outputs, inputs, rows, columns = weight.shape
    out = np.zeros((count, outputs, height - rows + 1, width - columns + 1))
    for output in range(outputs):
        first = output // (outputs // groups) * inputs
        for y in range(out.shape[2]):
            for x in range(out.shape[3]):
                window = images[:, first : first + inputs, y : y + rows, x : x + columns]
                out[:, output, y, x] = (window * weight[output].astype(np.float64)).sum((1, 2, 3))
    assert channels == inputs * groups
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
def test_the_mean_output_of_a_conv_is_restored(groups: int, kernel: tuple[int, int]) -> None:
    random = np.random.default_rng(groups)
    weight = random.normal(size=(8, 4 // groups, *kernel)).astype(np.float32)
    bias = random.normal(size=8).astype(np.float32)
    levels = random.normal(size=(3, 4, 1, 1)) * 3
    images = np.broadcast_to(levels, (3, 4, 6, 7)).astype(np.float32)
    rounded = quantize_weight(weight, U8_7).dequantized()
    means = images.mean(axis=(0, 2, 3), dtype=np.float64)

    made = correct_bias(bias, weight, rounded, means)

    float_mean = convolve(images, weight, groups).mean((0, 2, 3)) + bias
    before = convolve(images, rounded, groups).mean((0, 2, 3)) + bias
    after = convolve(images, rounded, groups).mean((0, 2, 3)) + made
    assert made.dtype == np.float32
    if weight[0].size > 1:  # a single value is its channel's largest and rounds without error
        assert np.abs(before - float_mean).max() > 1e-3
    assert np.abs(after - float_mean).max() < 1e-5


def test_the_mean_output_of_a_gemm_is_restored() -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(5, 20)).astype(np.float32)
    bias = random.normal(size=5).astype(np.float32)
    data = random.normal(size=(30, 20)).astype(np.float32) + 2
    rounded = quantize_weight(weight, U8_7).dequantized()
    made = correct_bias(bias, weight, rounded, data.mean(0, dtype=np.float64))
    difference = (data @ rounded.T + made).mean(0) - (data @ weight.T + bias).mean(0)
    assert np.abs(difference).max() < 1e-5
