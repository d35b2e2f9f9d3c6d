from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from graphs import S8, U8, U8_7
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gnet_opt.quantization.correction import correct_bias
from gnet_opt.quantization.placement import quantize_weight
from gnet_opt.target import Scheme

Array = npt.NDArray[np.float32]
LARGEST = {8: 127, 7: 64}

values = st.floats(-10, 10, width=32) | st.floats(
    width=32, min_value=-(2.0**100), max_value=2.0**100
)
weights = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=4), elements=values
)
schemes = st.builds(replace, st.sampled_from([U8, U8_7, S8]), per_channel=st.booleans())


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


def test_dead_channels_get_scale_one() -> None:
    weight = np.zeros((3, 2, 1, 1), np.float32)
    weight[1] = 2.54
    weight[2] = 1e-44
    made = quantize_weight(weight, U8)
    assert made.scales.tolist() == [1.0, np.float32(0.02), 1.0]
    assert made.integers.ravel().tolist() == [0, 0, 127, 127, 0, 0]


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
