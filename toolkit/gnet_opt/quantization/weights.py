"""Weights in integers, within what the instruction set computes without loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from gnet_opt.target import Scheme

_T = TypeVar("_T", bound=np.generic)

LARGEST = {7: 64, 8: 127}
"""Largest magnitude of a weight, by its bits. Eight bits are -127..127. Seven bits are -64..64: two
products of 255 and 64 add up to 32640, which fits the 16-bit lane of vpmaddubsw."""

LARGEST_PAIR = 128
"""Largest sum of two neighbouring weights of one sign where the lane saturates: 255 * 128 = 32640
fits it, 255 * 129 = 32895 does not."""

_FRACTIONS = np.linspace(1.0, 0.6, 21)
"""Shares of a channel's full range that the search tries; the first is no clipping."""


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight in integers.

    Attributes:
        integers: int8, in the shape of the float weight.
        scales: float32 of shape (output channels,), or () for one scale.
    """

    integers: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]

    def dequantized(self) -> npt.NDArray[np.float32]:
        """The float weight that a runtime computes with."""
        return self.integers.astype(np.float32) * _shaped(self.scales, self.integers.ndim)


def quantize_weight(
    weight: npt.NDArray[np.float32], scheme: Scheme, *, search: bool = False
) -> QuantizedWeight:
    """Quantize a weight symmetrically, with the output channels on axis 0.

    Args:
        weight: Shape (output channels, input channels / group, ...).
        scheme: How many bits, and whether pairs of neighbours have to fit a 16-bit lane.
        search: Whether a scale may clip the largest weights, where that makes the mean squared
            error of the channel smaller.
    """
    axes = tuple(range(1, weight.ndim)) if scheme.per_channel else None
    steps = np.abs(weight).max(axis=axes).astype(np.float64) / LARGEST[scheme.weight_bits]
    if scheme.saturating_pairs and scheme.weight_bits == 8:
        pairs = _pair_sums(weight.astype(np.float64))
        pairs = pairs.max(axis=1) if scheme.per_channel else pairs.max()
        steps = np.maximum(steps, pairs / LARGEST_PAIR)
    if search:
        steps = steps * _best_fractions(weight, steps, scheme, axes)
    scales = _usable(steps)
    integers = _integers(weight / _shaped(scales, weight.ndim), scheme)
    return QuantizedWeight(integers=integers.astype(np.int8), scales=scales)


def largest_pair(integers: npt.NDArray[np.int8]) -> int:
    """The largest sum of two neighbouring weights of one sign, as a magnitude."""
    return int(_pair_sums(integers.astype(np.float64)).max())


def _usable(steps: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Scales that a runtime takes."""
    scales = steps.astype(np.float32)
    # A runtime refuses a scale of zero, and a subnormal one would overflow in weight / scale.
    return np.asarray(
        np.where(scales >= np.finfo(np.float32).tiny, scales, np.float32(1.0)), np.float32
    )


def _integers(scaled: npt.NDArray[np.float32], scheme: Scheme) -> npt.NDArray[np.float32]:
    """The nearest integers that the scheme allows, still as floats."""
    largest = LARGEST[scheme.weight_bits]
    integers = np.clip(np.rint(scaled), -largest, largest)
    if scheme.saturating_pairs and scheme.weight_bits == 8:
        integers = _fit_pairs(integers)
    return integers


def _best_fractions(
    weight: npt.NDArray[np.float32],
    steps: npt.NDArray[np.float64],
    scheme: Scheme,
    axes: tuple[int, ...] | None,
) -> npt.NDArray[np.float64]:
    """For each scale the share of its full range with the least squared error, the largest such."""
    scaled = weight / _shaped(_usable(steps), weight.ndim)
    errors = []
    for fraction in _FRACTIONS.astype(np.float32):
        error = _integers(scaled / fraction, scheme) * fraction - scaled
        errors.append(np.square(error).sum(axis=axes))
    return np.asarray(_FRACTIONS[np.argmin(errors, axis=0)])


def _shaped(values: npt.NDArray[_T], dimensions: int) -> npt.NDArray[_T]:
    """Values of the output channels, to be broadcast over a weight."""
    return values.reshape(-1, *(1,) * (dimensions - 1)) if values.ndim else values


def _neighbours(shape: tuple[int, ...]) -> list[npt.NDArray[np.intp]]:
    """Which weights of an output channel meet in one lane, in each way that kernels pack them.

    Both MLAS and oneDNN pack four consecutive input channels at one kernel position for
    vpmaddubsw: the pairs are (0, 1), (2, 3), ... Where the number of input channels is odd, oneDNN
    pads each position, and MLAS goes on with the next position (its matrix product runs over
    kernel position and input channel as one dimension), so both count.

    Returns:
        For each packing, positions in the flattened channel, of shape (pairs, 2); a position
        beyond the last stands for padding.
    """
    channels, size = shape[1], int(np.prod(shape[1:]))
    order = np.arange(size).reshape(channels, -1).T
    packings = [order] if channels % 2 == 0 or len(order) == 1 else [order, order.reshape(1, -1)]
    padded = [
        np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)), constant_values=size) for rows in packings
    ]
    return [rows.reshape(-1, 2) for rows in padded]


def _pair_sums(weight: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The magnitude of each pair's positive and of its negative sum, for each output channel."""
    flat = np.pad(weight.reshape(len(weight), -1), ((0, 0), (0, 1)))
    pairs = [flat[:, packing] for packing in _neighbours(weight.shape)]
    sums = [np.maximum(sign * pair, 0.0).sum(axis=2) for pair in pairs for sign in (1.0, -1.0)]
    return np.concatenate(sums, axis=1)


def _fit_pairs(integers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Take from the larger weight of a pair what puts it over the limit.

    That is 1 at most by rounding, and more where a search has clipped the scale.
    """
    flat = np.pad(integers.reshape(len(integers), -1), ((0, 0), (0, 1)))
    rows = np.arange(len(flat))[:, None]
    for packing in _neighbours(integers.shape):
        for sign in (1.0, -1.0):
            pair = np.maximum(sign * flat[:, packing], 0.0)
            excess = np.maximum(pair.sum(axis=2) - LARGEST_PAIR, 0.0)
            larger = packing[np.arange(len(packing)), pair.argmax(axis=2)]
            flat[rows, larger] -= sign * excess
    return flat[:, :-1].reshape(integers.shape)
