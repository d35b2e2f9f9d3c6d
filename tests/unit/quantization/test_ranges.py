from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from graphs import S8, U8
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gnet_opt.quantization import METHODS as NAMES
from gnet_opt.quantization.ranges import (
    BY_HISTOGRAM,
    Affine,
    Range,
    affine,
    entropy,
    lp,
    minmax,
    mse,
    percentile,
)
from gnet_opt.quantization.statistics import Histogram
from gnet_opt.target import Scheme

Array = npt.NDArray[np.float32]
S8_AFFINE = Scheme(activations="s8", symmetric=False, weight_bits=8)
ALL = {"u8": U8, "s8": S8, "s8 affine": S8_AFFINE}
TINY = float(np.finfo(np.float32).tiny)
MAX = float(np.finfo(np.float32).max)
EXPONENTS = {"mse": 2.0, "lp": 2.4}
"""The power of the error that a method makes least, in sum."""

schemes = st.sampled_from(list(ALL.values()))
float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
samples = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-50, 50, width=32))


def choose(name: str, seen: Histogram, scheme: Scheme) -> Range:
    if name == "minmax":
        return minmax(seen.bounds, scheme)
    return BY_HISTOGRAM[name](seen, scheme)


def histogram(values: Array) -> Histogram:
    made = Histogram()
    made.add(np.asarray(values, np.float32))
    return made


def quantized(values: Array, parameters: Affine) -> npt.NDArray[np.float64]:
    info = np.iinfo(parameters.dtype)
    scale = float(parameters.scale)
    integers = np.rint(values.astype(np.float64) / scale) + parameters.zero_point
    return (np.clip(integers, info.min, info.max) - parameters.zero_point) * scale


def error(values: Array, parameters: Affine, exponent: float) -> float:
    return float((np.abs(quantized(values, parameters) - values) ** exponent).sum())


def onnxruntime_affine(low: float, high: float, scheme: Scheme) -> tuple[int, np.float32]:
    from onnx import TensorProto
    from onnxruntime.quantization.quant_utils import compute_scale_zp, get_qmin_qmax_for_qType

    kind = TensorProto.UINT8 if scheme.activations == "u8" else TensorProto.INT8
    bounds = get_qmin_qmax_for_qType(kind, symmetric=scheme.symmetric)
    zero, scale = compute_scale_zp(
        np.array(low, np.float32), np.array(high, np.float32), *bounds, symmetric=scheme.symmetric
    )
    return int(zero), np.float32(scale)


@settings(max_examples=500)
@given(ends=st.tuples(float32, float32), scheme=schemes)
def test_affine_is_that_of_onnx_runtime_bit_for_bit(
    ends: tuple[float, float], scheme: Scheme
) -> None:
    low, high = sorted(ends)
    ours = affine(Range(low=low, high=high), scheme)
    assert (ours.zero_point, ours.scale) == onnxruntime_affine(low, high, scheme)
    assert ours.dtype == ("uint8" if scheme.activations == "u8" else "int8")


@pytest.mark.parametrize("scheme", ALL.values(), ids=ALL)
@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.0, 0.0),
        (0.0, 1e-45),
        (-1e-45, 0.0),
        (0.0, TINY),
        (0.0, TINY * 255),
        (0.0, TINY * 254.9),
        (-TINY * 127, TINY * 127),
        (0.0, MAX),
        (-MAX, 0.0),
        (-MAX, MAX),
        (2.0, 3.0),
        (-3.0, -2.0),
        (-0.5, 254.5),
        (-1.5, 253.5),
        (-127.5, 127.5),
        (-1.0, 1.0),
    ],
)
def test_affine_of_degenerate_ranges(low: float, high: float, scheme: Scheme) -> None:
    low, high = float(np.float32(low)), float(np.float32(high))
    ours = affine(Range(low=low, high=high), scheme)
    assert (ours.zero_point, ours.scale) == onnxruntime_affine(low, high, scheme)


@given(values=samples, scheme=schemes, name=st.sampled_from(NAMES))
def test_every_method_gives_usable_parameters(values: Array, scheme: Scheme, name: str) -> None:
    parameters = affine(choose(name, histogram(values), scheme), scheme)
    info = np.iinfo(parameters.dtype)
    assert np.isfinite(parameters.scale)
    assert parameters.scale >= TINY
    assert parameters.scale.dtype == np.float32
    assert info.min <= parameters.zero_point <= info.max
    if scheme.symmetric:
        assert parameters.zero_point == 0
    # Zero is exact: padding and ReLU depend on it.
    assert quantized(np.zeros(1, np.float32), parameters)[0] == 0.0


@given(values=samples, scheme=schemes)
def test_minmax_clips_nothing(values: Array, scheme: Scheme) -> None:
    parameters = affine(minmax(histogram(values).bounds, scheme), scheme)
    error = np.abs(quantized(values, parameters) - values)
    # Half a step, and as much again at an end of the range where the zero point was rounded.
    assert error.max() <= float(parameters.scale) * (0.5 if scheme.symmetric else 1.0) * 1.00001


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ALL.values(), ids=ALL)
@pytest.mark.parametrize("values", [[], [0.0, 0.0]])
def test_a_dead_tensor_gets_scale_one(name: str, scheme: Scheme, values: list[float]) -> None:
    parameters = affine(choose(name, histogram(np.float32(values)), scheme), scheme)
    assert parameters.scale == np.float32(1.0)
    assert parameters.zero_point == 0


@given(values=samples, scheme=schemes, name=st.sampled_from(list(EXPONENTS)))
def test_a_search_is_no_worse_than_minmax(values: Array, scheme: Scheme, name: str) -> None:
    from gnet_opt.quantization.ranges import _error

    seen = histogram(values)
    own, full = (
        _error(seen, affine(choose(method, seen, scheme), scheme), EXPONENTS[name])
        for method in (name, "minmax")
    )
    assert own <= full * (1 + 1e-9)


@pytest.mark.parametrize("name", EXPONENTS)
@pytest.mark.parametrize("scheme", ALL.values(), ids=ALL)
def test_a_search_finds_the_best_range_of_real_values(scheme: Scheme, name: str) -> None:
    values = np.random.default_rng(0).laplace(size=100_000).astype(np.float32)
    if scheme is U8:
        values = np.maximum(values, 0)
    seen = histogram(values)
    own = error(values, affine(choose(name, seen, scheme), scheme), EXPONENTS[name])
    full = minmax(seen.bounds, scheme)
    every = [
        error(
            values,
            affine(Range(low=full.low * f, high=full.high * f), scheme),
            EXPONENTS[name],
        )
        for f in np.linspace(0.05, 1.0, 191)
    ]
    assert own <= min(every) * 1.01
    assert own < every[-1] * 0.97


@pytest.mark.parametrize("scheme", ALL.values(), ids=ALL)
def test_lp_clips_less_than_mse(scheme: Scheme) -> None:
    values = np.random.default_rng(0).laplace(size=100_000).astype(np.float32)
    seen = histogram(values)
    assert mse(seen, scheme).high < lp(seen, scheme).high < minmax(seen.bounds, scheme).high


@pytest.mark.parametrize("scheme", ALL.values(), ids=ALL)
@pytest.mark.parametrize("name", ["entropy", "percentile"])
def test_an_outlier_is_clipped(scheme: Scheme, name: str) -> None:
    values = np.abs(np.random.default_rng(0).normal(size=500_000)).astype(np.float32)
    values[7] = 50.0
    chosen = choose(name, histogram(values), scheme)
    assert 2.0 < chosen.high < 10.0
    assert minmax(histogram(values).bounds, scheme).high == 50.0


@pytest.mark.parametrize("scheme", ALL.values(), ids=ALL)
def test_entropy_keeps_a_flat_distribution_whole(scheme: Scheme) -> None:
    values = np.linspace(0, 10, 200_000, dtype=np.float32)
    assert choose("entropy", histogram(values), scheme).high == pytest.approx(10, rel=0.02)


@pytest.mark.parametrize("kept", [90.0, 99.0, 99.9])
@pytest.mark.parametrize("shape", ["one side", "two sides", "mostly zero", "skewed"])
def test_percentile_keeps_its_share_and_no_more(kept: float, shape: str) -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    if shape == "one side":
        values = np.abs(values)
    elif shape == "mostly zero":
        values[: len(values) * 4 // 5] = 0.0
    elif shape == "skewed":
        values = np.where(values < 0, values / 5, values)
    seen = histogram(values)
    chosen = percentile(seen, U8, kept)
    outside = np.mean((values < chosen.low) | (values > chosen.high))
    assert outside <= 1 - kept / 100
    bound = max(-chosen.low, chosen.high) - 2 * seen.width
    assert np.mean(np.abs(values) > bound) > 1 - kept / 100


def test_percentile_never_leaves_what_was_seen() -> None:
    chosen = percentile(histogram(np.float32([-1.0, 5.0])), U8)
    assert (chosen.low, chosen.high) == (-1.0, 5.0)


@pytest.mark.parametrize("scheme", [U8, S8])
def test_entropy_keeps_the_side_that_has_the_values(scheme: Scheme) -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    values[0] = -40.0
    chosen = entropy(histogram(values), scheme)
    assert chosen.high > 3.0
    assert -40.0 < chosen.low < -3.0


def test_signed_values_get_a_type_of_their_own_where_the_target_says_so() -> None:
    scheme = Scheme(activations="u8", symmetric=False, weight_bits=8, signed="s8")
    both = affine(Range(low=-1.0, high=2.0), scheme)
    assert both == affine(Range(low=-1.0, high=2.0), S8)
    assert (both.dtype, both.zero_point) == ("int8", 0)
    assert affine(Range(low=0.0, high=2.0), scheme) == affine(Range(low=0.0, high=2.0), U8)
