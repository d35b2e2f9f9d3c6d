"""The ratio of two runs, and the band of noise around it.

Ratios within a run are taken within its rounds, where both sides meet the same machine. Two runs
have no rounds in common, and the machine is never quite the same again. So the band of noise has
two parts, added as independent errors are:

- what each run says itself: the ratio is the median of all ratios of a round of one run to a round
  of the other (the estimate of J. L. Hodges and E. L. Lehmann, "Estimates of location based on rank
  tests", Annals of Mathematical Statistics 34 (1963), 598-611), and its interval comes from drawing
  rounds again, with a fixed seed;
- what no single run can say: how far the level of a run is from that of the next one (`DRIFT`).

Much of both is the machine's, and `gnet_opt.bench.control` has seen it. Where both runs have the
times of the same control load, under the same conditions, they are the covariate of an analysis of
covariance (R. A. Fisher, "Statistical Methods for Research Workers", 4th edition, 1932): how much
the rounds of a run follow their control tells by how much the runs differ for its sake, and that is
taken out. The resampling estimates this anew each time, so that the band knows what is not known of
it; and the more the control explains, the smaller is what is left of the drift (`STEADIED_DRIFT`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

DRIFT = 0.02
"""Standard deviation of the level of a run, as a share of it, from one start to the next.

Measured where one result was started anew six or eight times: with what moves within a start taken
out, 0.009 to 0.016 on two shared cores (benchmarks/results/openvino_paths-*-1t.json and
quantizers-x86-vnni.json; tests/unit/bench/test_noise.py computes it from them). Other runs
had more, see `STEADIED_DRIFT`: without times of the control load `--drift` may be needed.
"""

STEADIED_DRIFT = 0.01
"""The same where all that moves within runs is explained by the control load.

Where it explains a share, the variances of the two are mixed by it: what does not follow the
control load within a run has not become steadier between runs.

It lies below the 0.015 to 0.017 that a run had in 20 pairs of runs of one bundle, on two kinds of
two shared cores, as the noise of its rounds is in that, too; without the control load it had 0.022
to 0.036 (benchmarks/results/compare_repeats-x86-vnni*.json; test_noise.py computes it).
"""

STEEPEST = 3.0
"""The times of no model follow the control load more than so (1: by the same share).

Between the runs of compare_repeats-x86-vnni*.json they followed it at 1.2 to 2.1 (test_noise.py).
"""

_RESAMPLES = 1000
_AT_A_TIME = 1_000_000
"""Differences in memory at a time; a run may have many rounds."""

_SEED = 0
_NOTHING = 1e-18
"""A sum of squares of logarithms that is no larger is of equal values."""

_Z95 = 1.96

_Logs = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as long the second run takes; above 1 it is slower.

    Attributes:
        value: The estimate.
        low: Lower end of the band of noise around it (95 %).
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["equal", "faster", "slower"]:
        """What the second run is; `equal` where the band holds 1."""
        if self.low <= 1.0 <= self.high:
            return "equal"
        return "slower" if self.low > 1.0 else "faster"

    @property
    def resolution(self) -> float:
        """The least slow-down that the band would not have swallowed, as a share."""
        return self.value / self.low - 1.0


def ratio_of(
    a: Sequence[float],
    b: Sequence[float],
    controls: tuple[Sequence[float], Sequence[float]] | None = None,
    *,
    drift: float | None = None,
) -> Ratio:
    """The ratio of the times of two runs, with the band of noise that the module describes.

    Args:
        a: The times of the first run, one a round.
        b: Those of the second run.
        controls: The times of the control load in the same rounds of both, None where not known.
        drift: Standard deviation of the level of a run on this machine, as a share of it; None for
            `DRIFT`, and for less the more the control load explains, down to `STEADIED_DRIFT`.
    """
    # Without a control load it has always taken the same time.
    logs_a, logs_b = (
        np.log([times, [1.0] * len(times) if controls is None else controls[index]])
        for index, times in enumerate((a, b))
    )
    whole = logs_a[:, None], logs_b[:, None]
    (centre,) = _shifts(*whole)
    if drift is None:
        share = _explained(*whole)
        drift = math.sqrt(share * STEADIED_DRIFT**2 + (1 - share) * DRIFT**2)
    chance = np.random.default_rng(_SEED)
    drawn: list[float] = []
    while len(drawn) < _RESAMPLES:
        count = max(1, min(_RESAMPLES - len(drawn), _AT_A_TIME // (len(a) * len(b))))
        drawn_a = chance.choice(logs_a, (count, len(a)), axis=1)
        drawn += list(_shifts(drawn_a, chance.choice(logs_b, (count, len(b)), axis=1)))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return banded(float(centre), float(low), float(high), drift)


def _shifts(a: _Logs, b: _Logs) -> _Logs:
    """Hodges and Lehmann's estimate of how far each row of `b` is above that of `a`.

    Args:
        a: Logarithms of times and of the control load beside them, of shape (2, rows, rounds).
        b: The same of the second run, with as many rows.
    """
    slope = _slopes(a, b)[:, None]
    times_a, times_b = a[0] - slope * a[1], b[0] - slope * b[1]
    differences = times_b[:, :, None] - times_a[:, None, :]
    return np.asarray(np.median(differences.reshape(len(slope), -1), axis=1))


def _slopes(a: _Logs, b: _Logs) -> _Logs:
    """How strongly times follow the control load within both runs together, from 0 to `STEEPEST`.

    By least squares; 0 where the control load does not change.
    """
    both, _, control = _within(a, b)
    return np.clip(_divided(both, control), 0.0, STEEPEST)


def _explained(a: _Logs, b: _Logs) -> float:
    """Share of the variance of times within both runs that the control load explains, 0 to 1."""
    both, times, control = _within(a, b)
    return float(_divided(np.maximum(both, 0.0) ** 2, times * control)[0])


def _within(a: _Logs, b: _Logs) -> tuple[_Logs, _Logs, _Logs]:
    """Sums within both runs: of products, of squares of times, of squares of the control load."""
    parts = (run - run.mean(axis=2, keepdims=True) for run in (a, b))
    sums = sum(np.einsum("irn,jrn->ijr", part, part) for part in parts)
    return sums[0, 1], sums[0, 0], sums[1, 1]


def _divided(above: _Logs, below: _Logs) -> _Logs:
    """The quotient, 0 where nothing but rounding is below."""
    return np.divide(above, below, where=below > _NOTHING, out=np.zeros_like(above))


def banded(centre: float, low: float, high: float, drift: float) -> Ratio:
    """A ratio from logarithms, its interval widened by the drift of both runs.

    Args:
        centre: Logarithm of the ratio.
        low: Lower end of what the runs say themselves, in logarithms.
        high: Its upper end.
        drift: Standard deviation of the level of a run, as a share of it.
    """
    more = _Z95 * math.sqrt(2) * drift
    return Ratio(
        value=math.exp(centre),
        low=math.exp(centre - math.hypot(centre - low, more)),
        high=math.exp(centre + math.hypot(high - centre, more)),
    )
