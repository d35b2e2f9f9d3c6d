"""The control load: fixed work beside every turn, whose time tells how fast the machine is then.

A shared machine has slow phases of a second to minutes: another tenant on the sibling of a core or
in the cache that cores share, a clock that went down. What lasts a whole run is in all of its
rounds, and no statistics of its times alone tell it from a slower model. The control load meets the
same phases, and knows no model. So `gnet_opt.bench.compare` takes it as the covariate of an
analysis of covariance: how strongly the times of a model follow it is estimated within runs, and
what it explains between runs is taken out.

The work is a product of matrices by NumPy's BLAS, as of a 1x1 convolution of GoogLeNet's middle,
and for that likeness: vectors that multiply and add, with weights that do not fit into the cache of
one core. On two shared cores a model's times followed it at 0.7 to 0.9 (correlation of runs of ten
rounds), those of zlib at 0.2 to 0.7, sums and copies of memory less. Each thread has a product of
its own, as BLAS's threads would wait for work while the model runs. It is no thermometer of the
model alone: one that makes its machine throttle slows the control load after it, too. That is what
`--soak` tells.
"""

from __future__ import annotations

import functools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from gnet_opt.machine import this_machine

COUNT = 20
"""How often each thread does it before a turn, and again after it; ..."""

LONGEST = 0.2
"""... but it stops after so many seconds, as a small device takes long for one, ..."""

LEAST = 3
"""... with so many done."""

MOST_THREADS = 8
"""Each takes one to four megabytes, and so many have met the machine."""

_POSITIONS, _CHANNELS = 256, 768
"""0.15 G multiply-adds with 2.4 MB of weights."""

_Matrix = npt.NDArray[np.float32]


def identity() -> str:
    """What does the work; times of different ones are not compared."""
    try:
        builds: dict[str, Any] = dict(np.show_config(mode="dicts"))
    except TypeError:  # NumPy before 1.25 only prints it
        builds = {}
    blas = builds.get("Build Dependencies", {}).get("blas", {})
    library = f"{blas.get('name', 'unknown BLAS')} {blas.get('version', '')}".strip()
    return f"{_POSITIONS}x{_CHANNELS}x{_CHANNELS} float32, NumPy {np.__version__}, {library}"


def times_ns(threads: int | None) -> list[int]:
    """Do the work on so many threads at a time.

    Args:
        threads: As many as the model runs on, None for every CPU of this process; `MOST_THREADS` at
            the most.

    Returns:
        The time of each piece of work in nanoseconds, `LEAST` to `COUNT` a thread. None at all
        where memory is limited, or no thread can be started: what the work takes would be missing
        for the model, and a BLAS that gets no memory ends the process.
    """
    if _memory_is_limited():
        return []
    count = min(threads or this_machine().cores, MOST_THREADS)
    with threadpool_limits(1, user_api="blas"):
        if count == 1:
            return _timed()
        try:
            with ThreadPoolExecutor(count) as pool:
                return list(chain.from_iterable(pool.map(lambda _: _timed(), range(count))))
        except RuntimeError:
            return []


def _timed() -> list[int]:
    (positions, weights), clock = _factors(), time.perf_counter_ns
    product = np.empty_like(positions)
    # The first one brings the factors into the caches.
    np.dot(positions, weights, out=product)
    samples: list[int] = []
    end = clock() + int(LONGEST * 1e9)
    while len(samples) < COUNT and (len(samples) < LEAST or clock() < end):
        started = clock()
        np.dot(positions, weights, out=product)
        samples.append(clock() - started)
    return samples


@functools.cache
def _factors() -> tuple[_Matrix, _Matrix]:
    """Of shapes (positions, channels) and (channels, channels); all threads only read them."""
    rows = _POSITIONS + _CHANNELS
    numbers = np.sin(np.arange(rows * _CHANNELS, dtype=np.float32)).reshape(rows, _CHANNELS)
    return numbers[:_POSITIONS], numbers[_POSITIONS:]


def _memory_is_limited() -> bool:
    if sys.platform == "win32":
        return False
    import resource

    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits)
