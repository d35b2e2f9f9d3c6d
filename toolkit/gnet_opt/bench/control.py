"""The control load: fixed work beside every turn, whose time tells how fast the machine is then.

A shared machine has slow phases of a second to minutes: another tenant on the sibling of a core or
in the cache that cores share, a clock that went down. What lasts a whole run is in all of its
rounds, and no statistics of its times alone tell it from a slower model. The control load meets the
same phases, and knows no model. So `gnet_opt.bench.noise` takes it as the covariate of an
analysis of covariance: how strongly the times of a model follow it is estimated within runs, and
what it explains between runs is taken out.

The work is a product of matrices by NumPy's BLAS, like a 1x1 convolution but wider, and for that
likeness: vectors that multiply and add, with weights that do not fit into the own cache of most
cores. zlib, and sums and copies of memory, were tried, and a model's times follow them less; what
it gains is measured by benchmarks/compare_repeats.py. Each thread has a product of its own, as
BLAS's threads would wait for work while the model runs. It is no thermometer of the model alone:
one that makes its machine throttle slows the control load after it, too. That is what `--soak`
tells.
"""

from __future__ import annotations

import functools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from gnet_opt.machine import this_machine

COUNT = 20
"""How often each thread does it before a turn, and again after it; ..."""

LONGEST = 0.2
"""... but fewer times where they would take so many seconds, as on a small device, ..."""

LEAST = 3
"""... and so often at least."""

MOST_THREADS = 8
"""Each takes one to four megabytes, and so many have met the machine."""

_POSITIONS, _CHANNELS = 256, 768
"""0.15 G multiply-adds with 2.4 MB of weights."""

_Matrix = npt.NDArray[np.float32]


def identity() -> str:
    """What does the work; times of different ones are not compared."""
    libraries = sorted(
        " ".join(
            str(each[key]) for key in ("internal_api", "version", "architecture") if key in each
        )
        for each in _blas().info()
    )
    work = f"{_POSITIONS}x{_CHANNELS}x{_CHANNELS} float32"
    return ", ".join([work, f"NumPy {np.__version__}", *(libraries or ["unknown BLAS"])])


def times_ns(threads: int | None) -> list[int]:
    """Do the work on so many threads at a time.

    Args:
        threads: As many as the model runs on, None for every CPU of this process; `MOST_THREADS` at
            the most.

    Returns:
        The time of each piece of work in nanoseconds, `LEAST` to `COUNT` a thread and in one
        process always as many. None at all where no thread can be started; where memory is limited,
        as the model would miss what the work takes, and a BLAS that gets none ends the process; and
        where threadpoolctl does not know the BLAS, which would start threads of its own.
    """
    blas = _blas()
    if _memory_is_limited() or not blas.lib_controllers:
        return []
    threads = min(threads or this_machine().cores, MOST_THREADS)
    with blas.limit(limits=1):
        count = _count()
        if threads == 1:
            return _timed(count)
        # Some libraries have a limit for each thread that calls them.
        limited = functools.partial(blas.limit, limits=1)
        try:
            with ThreadPoolExecutor(threads, initializer=limited) as pool:
                return list(chain.from_iterable(pool.map(_timed, [count] * threads)))
        except RuntimeError:
            return []


@functools.cache
def _count() -> int:
    """How often to do it: the same all the time, as else fast phases would have more samples."""
    (taken,) = _timed(1)
    return max(LEAST, min(COUNT, int(LONGEST * 1e9) // taken))


def _timed(count: int) -> list[int]:
    (positions, weights), clock = _factors(), time.perf_counter_ns
    product = np.empty_like(positions)
    # The first one brings the factors into the caches.
    np.dot(positions, weights, out=product)
    samples = []
    for _ in range(count):
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


def _blas() -> ThreadpoolController:
    """The libraries that may do the work, of those that are loaded."""
    return ThreadpoolController().select(user_api="blas")


def _memory_is_limited() -> bool:
    if sys.platform == "win32":
        return False
    import resource

    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits)
