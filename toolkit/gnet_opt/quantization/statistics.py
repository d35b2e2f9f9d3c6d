"""What is kept of the values of a tensor while pictures stream by: never the values themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS = 4096
"""Bins on each side of zero. The largest value falls in the upper half, so that at least 2048
bins are in use, the number TensorRT's entropy calibration works with."""


_BLOCK = 1 << 15
"""Values that are counted at a time: what is computed on the way stays in the CPU's cache."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The smallest and the largest value that a tensor had."""

    minimum: float
    maximum: float


class Histogram:
    """A histogram whose range grows with the data, in one pass and without storing values.

    The bin width is a power of two and zero is a bin edge. A value beyond the last bin doubles the
    width by adding bins in pairs, which is exact: the counts are those that a second pass with the
    final width would give, whatever the order of the data.

    Attributes:
        minimum: Smallest value seen, +inf before any.
        maximum: Largest value seen, -inf before any.
        width: Width of a bin; 0.0 until a value other than zero is seen.
        positive: int64 counts of shape (BINS,): values in [k * width, (k + 1) * width), but not
            exact zeros.
        negative: The same for the magnitudes of negative values.
        zeros: Count of exact zeros, which every scheme represents without error.
    """

    def __init__(self) -> None:
        self.minimum = np.inf
        self.maximum = -np.inf
        self.width = 0.0
        self.positive: npt.NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.negative: npt.NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.zeros = 0

    @classmethod
    def merged(cls, histograms: Iterable[Histogram]) -> Histogram:
        """The histogram that one pass over the data of all of them would give, exactly."""
        total = cls()
        for histogram in histograms:
            total.include(histogram)
        return total

    def include(self, other: Histogram) -> None:
        """Add everything that another histogram counted; it is not changed."""
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)
        self.zeros += other.zeros
        if other.width == 0.0:
            return
        if self.width == 0.0:
            self.width = other.width
        while self.width < other.width:
            self._double()
        positive, negative = other.positive, other.negative
        width = other.width
        while width < self.width:
            positive, negative, width = _in_pairs(positive), _in_pairs(negative), width * 2.0
        self.positive = self.positive + positive
        self.negative = self.negative + negative

    def add(self, values: npt.NDArray[np.float32]) -> None:
        """Count float32 values of any shape.

        Raises:
            ValueError: A value is NaN or infinite.
        """
        if values.size == 0:
            return
        flat = values.ravel()
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("a value is not finite")
        self.minimum = min(self.minimum, low)
        self.maximum = max(self.maximum, high)
        bound = max(high, -low)
        if bound == 0.0:
            self.zeros += flat.size
            return
        self._cover(bound)
        if low < 0.0:
            self.negative += self._count(-flat[flat < 0.0])
            flat = flat[flat >= 0.0]
        counts = self._count(flat)
        zeros = int(np.count_nonzero(flat == 0.0))
        counts[0] -= zeros
        self.zeros += zeros
        self.positive += counts

    @property
    def bounds(self) -> Bounds:
        """The smallest and the largest value seen."""
        return Bounds(minimum=self.minimum, maximum=self.maximum)

    def centres(self) -> npt.NDArray[np.float64]:
        """The centre of each bin, as a magnitude."""
        return (np.arange(BINS, dtype=np.float64) + 0.5) * self.width

    def _count(self, magnitudes: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        counts = np.zeros(BINS, np.int64)
        for first in range(0, magnitudes.size, _BLOCK):
            # Multiplying by a power of two is exact, so the bin is the true one.
            bins = magnitudes[first : first + _BLOCK] * np.float32(1.0 / self.width)
            counts += np.bincount(bins.astype(np.intp), minlength=BINS)
        return counts

    def _cover(self, bound: float) -> None:
        """Widen the bins until `bound` falls into the last one or below."""
        if self.width == 0.0:
            _, exponent = np.frexp(bound)  # bound < 2 ** exponent
            # The bound keeps 1 / width within float32 for values next to nothing.
            self.width = float(np.ldexp(1.0, max(int(exponent), -100))) / BINS
        while bound >= self.width * BINS:
            self._double()

    def _double(self) -> None:
        self.width *= 2.0
        self.positive, self.negative = _in_pairs(self.positive), _in_pairs(self.negative)


def _in_pairs(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The counts for bins of twice the width."""
    wider = np.zeros(BINS, np.int64)
    wider[: BINS // 2] = counts.reshape(-1, 2).sum(axis=1)
    return wider


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What calibration saw: all that the methods need, so that they can be tried without a second
    pass over the pictures.

    Attributes:
        images: How many pictures.
        lows: The smallest value in each channel of the tensors that decide a range, float32 of
            shape (channels,), by the tensor's name.
        highs: The largest.
        sums: The mean of each channel of a Conv's or Gemm's data input, summed up over the
            pictures, float64 of shape (channels,), by the tensor's name.
        histograms: The values of the tensors that decide a range, by the tensor's name; empty
            where they were not asked for, which leaves the method minmax.
    """

    images: int
    lows: Mapping[str, npt.NDArray[np.float32]]
    highs: Mapping[str, npt.NDArray[np.float32]]
    sums: Mapping[str, npt.NDArray[np.float64]]
    histograms: Mapping[str, Histogram]

    def bounds(self, tensors: Iterable[str]) -> Bounds:
        """The smallest and the largest value of several tensors together."""
        names = list(tensors)
        return Bounds(
            minimum=min(float(self.lows[name].min()) for name in names),
            maximum=max(float(self.highs[name].max()) for name in names),
        )

    def histogram(self, tensors: Iterable[str]) -> Histogram:
        """The values of several tensors together."""
        return Histogram.merged(self.histograms[name] for name in tensors)

    def mean(self, tensor: str) -> npt.NDArray[np.float64]:
        """The mean of each channel."""
        return self.sums[tensor] / self.images

    def peaks(self, tensor: str) -> npt.NDArray[np.float32]:
        """The largest magnitude in each channel."""
        return np.maximum(self.highs[tensor], -self.lows[tensor])

    def merged(self, other: Statistics) -> Statistics:
        """What calibration would have seen of both sets of pictures of one model."""
        return Statistics(
            images=self.images + other.images,
            lows={name: np.minimum(low, other.lows[name]) for name, low in self.lows.items()},
            highs={name: np.maximum(high, other.highs[name]) for name, high in self.highs.items()},
            sums={name: total + other.sums[name] for name, total in self.sums.items()},
            histograms={
                name: Histogram.merged((seen, other.histograms[name]))
                for name, seen in self.histograms.items()
            },
        )
