"""Figures of times that were measured in rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_CHANCE = 0.1
"""How often an interval of the median may miss it; with fewer than five rounds it is more often."""


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """How many times as fast a subject is as the first one, from rounds measured side by side.

    Attributes:
        median: The median over rounds of the ratio of the rounds' medians.
        low: The least ratio of a round.
        high: The greatest.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, base: Sequence[float], own: Sequence[float]) -> Speedup:
        """From the times of two subjects in the same rounds."""
        ratios = [slow / fast for slow, fast in zip(base, own, strict=True)]
        return cls(median=statistics.median(ratios), low=min(ratios), high=max(ratios))

    def to_dict(self) -> dict[str, Any]:
        """The ratio as it stands in a manifest."""
        return {"high": self.high, "low": self.low, "median": self.median}


def percentile_ms(samples_ns: Sequence[int], percent: float) -> float:
    """The least sample that at least `percent` of all do not exceed (nearest rank), in ms."""
    ordered = sorted(samples_ns)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] / 1e6


def spread(medians: Sequence[float]) -> float:
    """(largest - least) / median of what rounds gave."""
    return (max(medians) - min(medians)) / statistics.median(medians)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the median of what values are drawn from nine times in ten.

    Its ends are two of the values (W. R. Thompson, Annals of Mathematical Statistics 7 (1936),
    122-128), so that nothing is assumed of their distribution. Of fewer than five values it is all
    of them, which with three holds the median three times in four.

    Args:
        values: Independent of each other, at least one.
    """
    ordered = sorted(values)
    count, outside, left = len(ordered), 1, 0
    # Values that are left out at each end, while the chance that the median is there is small.
    while 2 * (outside + math.comb(count, left + 1)) <= _CHANCE * 2**count:
        left += 1
        outside += math.comb(count, left)
    return ordered[left], ordered[count - 1 - left]
