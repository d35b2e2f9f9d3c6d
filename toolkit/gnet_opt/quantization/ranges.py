"""From what calibration saw to a range, and from a range to a scale and a zero point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gnet_opt.quantization.statistics import Bounds, Histogram
from gnet_opt.target import Scheme

PERCENTILE = 99.999
"""Percentage of all values, zeros included, that the `percentile` method keeps in range."""

LP_EXPONENT = 2.4
"""The power of the error that the `lp` method sums up."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """The interval of float values that a tensor can represent; it contains zero."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Affine:
    """real = scale * (integer - zero_point), for integers of `dtype`."""

    scale: np.float32
    zero_point: int
    dtype: str


def minmax(bounds: Bounds, scheme: Scheme) -> Range:
    """Everything that was seen."""
    return _range(bounds, 1.0, scheme)


def percentile(histogram: Histogram, scheme: Scheme, kept: float = PERCENTILE) -> Range:
    """What was seen, cut at the least magnitude that keeps `kept` percent of all values."""
    del scheme
    counts = histogram.positive + histogram.negative
    outside = (histogram.zeros + int(counts.sum())) * (1.0 - kept / 100.0)
    return _cut(histogram, _tail(counts, histogram.width, outside))


def mse(histogram: Histogram, scheme: Scheme) -> Range:
    """The range with the least mean squared error of rounding and clipping."""
    return _search(histogram, scheme, 2.0)


def lp(histogram: Histogram, scheme: Scheme) -> Range:
    """The range with the least mean of |error| ** 2.4: as `mse`, but clipping weighs more.

    Clipped values are the large ones, whose errors have one sign and do not average out in the sums
    of the next layer, so a squared error counts them too little. The Lp norm is that of Nahshan et
    al., "Loss Aware Post-training Quantization" (arXiv:1911.07190), the exponent that of BRECQ's
    published code (Li et al., ICLR 2021).
    """
    return _search(histogram, scheme, LP_EXPONENT)


def entropy(histogram: Histogram, scheme: Scheme) -> Range:
    """The range whose quantized distribution is nearest in Kullback-Leibler divergence.

    As S. Migacz describes it for TensorRT ("8-bit Inference with TensorRT", GTC 2017): for each
    candidate threshold the values beyond it are added to the last bin of the reference, the bins
    below it are merged into as many levels as the integers have, and each level is spread evenly
    over its bins that are not empty. Exact zeros are left out: every range represents them.
    """
    if histogram.width == 0.0:
        return Range(low=0.0, high=0.0)
    counts = (histogram.positive + histogram.negative).astype(np.float64)
    used = int(np.flatnonzero(counts)[-1]) + 1
    # A symmetric type has 127 levels a side; an affine one spends all 255 on a one-sided range.
    levels = 127 if scheme.symmetric or histogram.minimum < 0.0 else 255
    candidates = [*range(levels, used, max(1, levels // 16)), used]
    threshold = min(candidates, key=lambda bins: _divergence(counts[:used], bins, levels))
    return _cut(histogram, threshold * histogram.width)


BY_HISTOGRAM: dict[str, Callable[[Histogram, Scheme], Range]] = {
    "entropy": entropy,
    "lp": lp,
    "mse": mse,
    "percentile": percentile,
}
"""The methods that go by how often values occur: all but `minmax`."""


def affine(chosen: Range, scheme: Scheme) -> Affine:
    """Scale and zero point for a range.

    The formulas are those of ONNX Runtime's `compute_scale_zp`: everything is computed in float64,
    and the scale is rounded once to float32. A range of nothing but zero gets the scale 1.
    """
    low, high = min(chosen.low, 0.0), max(chosen.high, 0.0)
    symmetric = scheme.symmetric or (scheme.signed == "s8" and low < 0.0)
    scale = 2.0 * max(-low, high) / 254.0 if symmetric else (high - low) / 255.0
    unsigned = scheme.activations == "u8" and not symmetric
    first, dtype = (0, "uint8") if unsigned else (-128, "int8")
    # TensorRT refuses a scale of zero, and a subnormal one would overflow in x / scale.
    if scale < np.finfo(np.float32).tiny:
        return Affine(scale=np.float32(1.0), zero_point=0, dtype=dtype)
    zero_point = 0 if symmetric else int(np.rint(first - low / scale))
    return Affine(scale=np.float32(scale), zero_point=zero_point, dtype=dtype)


def _cut(histogram: Histogram, bound: float) -> Range:
    """What was seen, without magnitudes beyond `bound`."""
    return Range(
        low=max(min(0.0, histogram.minimum), -bound), high=min(max(0.0, histogram.maximum), bound)
    )


def _range(bounds: Bounds, fraction: float, scheme: Scheme) -> Range:
    low, high = min(0.0, bounds.minimum), max(0.0, bounds.maximum)
    if scheme.symmetric:
        bound = max(-low, high)
        low, high = (-bound if low < 0.0 else 0.0), bound
    return Range(low=low * fraction, high=high * fraction)


def _tail(counts: npt.NDArray[np.int64], width: float, outside: float) -> float:
    """The upper edge of the last bin that is still needed to leave `outside` values out."""
    beyond = np.cumsum(counts[::-1])[::-1]
    needed = np.flatnonzero(beyond > outside)
    return float((needed[-1] + 1) * width) if needed.size else 0.0


def _search(histogram: Histogram, scheme: Scheme, exponent: float) -> Range:
    """The fraction of the full range with the least error, first coarse and then fine."""
    if histogram.width == 0.0:
        return Range(low=0.0, high=0.0)

    def cost(fraction: float) -> float:
        chosen = _range(histogram.bounds, fraction, scheme)
        return _error(histogram, affine(chosen, scheme), exponent)

    best = min(np.linspace(0.05, 1.0, 39), key=cost)
    fine = np.linspace(best - 0.024, min(1.0, best + 0.024), 25)
    return _range(histogram.bounds, float(min(fine, key=cost)), scheme)


def _divergence(counts: npt.NDArray[np.float64], bins: int, levels: int) -> float:
    """KL divergence of the first `bins` bins, the rest clipped into the last, from `levels`."""
    if bins <= levels:
        return float(counts[bins:].sum() > 0.0)
    kept = counts[:bins]
    reference = kept.copy()
    reference[-1] += counts[bins:].sum()
    starts = np.arange(levels) * bins // levels
    filled = (kept > 0.0).astype(np.float64)
    sums, occupied = np.add.reduceat(kept, starts), np.add.reduceat(filled, starts)
    even = np.divide(sums, occupied, out=np.zeros(levels), where=occupied > 0.0)
    candidate = np.repeat(even, np.diff([*starts, bins])) * filled
    p, q = reference / reference.sum(), candidate / max(candidate.sum(), 1.0)
    # Smoothing, so that a bin that only the reference has counts as much, not as infinite.
    epsilon = 1e-9
    return float(np.sum(p * np.log((p + epsilon) / (q + epsilon))))


def _error(histogram: Histogram, parameters: Affine, exponent: float) -> float:
    """Sum of |error| ** exponent of all values, each at its bin's centre."""
    info = np.iinfo(parameters.dtype)
    scale = float(parameters.scale)
    centres = histogram.centres()
    total = 0.0
    for sign, counts in ((1.0, histogram.positive), (-1.0, histogram.negative)):
        used = counts > 0
        real = sign * centres[used]
        integers = np.clip(np.rint(real / scale) + parameters.zero_point, info.min, info.max)
        errors = np.abs(scale * (integers - parameters.zero_point) - real)
        total += float(np.sum(counts[used] * errors**exponent))
    return total
