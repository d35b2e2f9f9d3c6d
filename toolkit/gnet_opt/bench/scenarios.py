"""The load loops, after the scenarios of MLPerf Inference.

V. J. Reddi et al., "MLPerf Inference Benchmark", ISCA 2020 (arXiv:1911.02549), and the rules of its
load generator:

- single-stream: the next picture is sent when the last one is done; the figure is p90.
- multi-stream: the same with queries of eight pictures; the figure is p99.
- offline: all pictures are there from the beginning; the figure is pictures a second.
- server: single pictures arrive by chance (a Poisson process) and wait their turn; the figure is
  the highest rate at which 99 of 100 are done within a latency bound, waiting included.

The loops know no model and no process: they call what they are given, and read the clock that they
are given. All times are in nanoseconds but where a name says seconds.
"""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

SINGLE_STREAM, MULTI_STREAM, OFFLINE, SERVER = "single-stream", "multi-stream", "offline", "server"
SCENARIOS = (SINGLE_STREAM, MULTI_STREAM, OFFLINE, SERVER)

QUERY = 8
"""Pictures in a query of multi-stream."""

LATE_SHARE = 0.01
"""Share of the queries that may exceed the latency bound in the server scenario."""

WINDOW = 20
"""Runs over which a trend is looked for."""

DRIFT = 0.03
"""Largest difference of a window's halves, as a share of the time, that counts as steady."""

_Z90 = 1.6448536269514722  # two-sided, 10 %: a trend is rather seen once too often

_SPIN_NS = 300_000
"""Waiting for an arrival ends with a loop of this length: sleeping is that inexact."""

Run = Callable[[], object]
Clock = Callable[[], int]
Sleep = Callable[[float], object]


def back_to_back(
    run: Run, *, seconds: float, count: int, clock: Clock = time.perf_counter_ns
) -> list[int]:
    """Run again and again, for at least so long and at least so often.

    Returns:
        The time of each run.
    """
    samples: list[int] = []
    with _no_garbage_collection():
        finished = clock()
        end = finished + int(seconds * 1e9)
        while finished < end or len(samples) < count:
            started = clock()
            run()
            finished = clock()
            samples.append(finished - started)
    return samples


def throughput(
    run: Run, *, seconds: float, count: int, clock: Clock = time.perf_counter_ns
) -> tuple[int, int]:
    """Run as `back_to_back` does, and read the time only as a whole.

    Returns:
        How often it ran, and how long that took.
    """
    done = 0
    with _no_garbage_collection():
        now = started = clock()
        end = started + int(seconds * 1e9)
        while now < end or done < count:
            run()
            done += 1
            now = clock()
    return done, now - started


@dataclass(frozen=True, kw_only=True)
class Served:
    """What became of queries that arrived by chance.

    Attributes:
        samples_ns: From the arrival of each to its end, waiting included.
        late: How many exceeded the bound.
        within: Whether no more of them did than `LATE_SHARE` allows.
    """

    samples_ns: tuple[int, ...]
    late: int
    within: bool


def serve(
    run: Run,
    *,
    rate: float,
    count: int,
    bound_ns: float,
    seed: int,
    clock: Clock = time.perf_counter_ns,
    sleep: Sleep = time.sleep,
) -> Served:
    """Serve queries that arrive as a Poisson process, one after the other in their order.

    It stops as soon as too many are late: under too high a rate the queue would only grow.

    Args:
        run: Serves one query.
        rate: Queries a second.
        count: How many arrive.
        bound_ns: The latency bound.
        seed: Of the arrivals.
        clock: Tells the time.
        sleep: Waits for so many seconds, or a little longer.
    """
    chance = random.Random(seed)
    allowed = int(count * LATE_SHARE)
    samples: list[int] = []
    late = 0
    with _no_garbage_collection():
        due = float(clock())
        for _ in range(count):
            due += chance.expovariate(rate) * 1e9
            while (left := due - clock()) > 0:
                if left > _SPIN_NS:
                    sleep((left - _SPIN_NS) / 1e9)
            run()
            samples.append(clock() - int(due))
            late += samples[-1] > bound_ns
            if late > allowed:
                break
    return Served(samples_ns=tuple(samples), late=late, within=late <= allowed)


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """How a model came to steady times.

    Attributes:
        samples_ns: Every run.
        steady: Whether times were steady at the end, see `is_steady`.
    """

    samples_ns: tuple[int, ...]
    steady: bool


def warm_up(run: Run, *, seconds: float, clock: Clock = time.perf_counter_ns) -> WarmUp:
    """Run until times are steady, or time is up."""
    samples: list[int] = []
    steady = False
    end = clock() + int(seconds * 1e9)
    while not steady and clock() < end:
        started = clock()
        run()
        samples.append(clock() - started)
        # A test at every run would find a lull by chance.
        if len(samples) >= WINDOW and len(samples) % (WINDOW // 4) == 0:
            steady = is_steady(samples[-WINDOW:])
    return WarmUp(samples_ns=tuple(samples), steady=steady)


def is_steady(samples: Sequence[float]) -> bool:
    """Whether times have no trend that matters.

    They have one when both hold: the medians of the two halves, which a few slow runs do not move,
    differ by more than `DRIFT`, and the Mann-Kendall test tells the trend from noise. H. B. Mann,
    "Nonparametric tests against trend", Econometrica 13 (1945).

    Args:
        samples: Times in the order measured, at least two.
    """
    n = len(samples)
    before, after = (statistics.median(half) for half in (samples[: n // 2], samples[n // 2 :]))
    if abs(after - before) <= DRIFT * after:
        return True
    pairs = combinations(range(n), 2)
    rising = sum((samples[j] > samples[i]) - (samples[j] < samples[i]) for i, j in pairs)
    deviation = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    return max(0, abs(rising) - 1) / deviation <= _Z90


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """It would fall on one run or another; what there is is collected before."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
