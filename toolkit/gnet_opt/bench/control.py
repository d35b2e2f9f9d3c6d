"""The control load: fixed work beside every turn, whose time tells how fast the machine is then.

A shared machine has slow phases of a second to minutes: another tenant on the sibling of a core, a
clock that went down. What lasts a whole run is in all of its rounds, and no statistics of its times
alone tell it from a slower model. The control load meets the same phases, and knows no model. So
`gnet_opt.bench.compare` takes it as the covariate of an analysis of covariance: how strongly the
times of a model follow it is estimated within runs, and what it explains between runs is taken out.

The work is to compress a text with zlib, which is part of every Python. It has branches, look-ups
and arithmetic, stays in the caches, and holds no lock of Python's, so that several threads do it
side by side. It is no thermometer of the model alone: one that makes its machine throttle slows the
control load after it, too. That is what `--soak` tells.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from gnet_opt.machine import this_machine

IDENTITY = (
    f"zlib {zlib.ZLIB_RUNTIME_VERSION}, Python {platform.python_version()}, "
    f"{platform.python_compiler()}"
)
"""What does the work, and who built it; times of different ones are not compared."""

COUNT = 40
"""How often each thread does it before a turn, and again after it."""

MOST_THREADS = 8
"""Each takes a quarter of a megabyte, and so many have met the machine."""

_SIZE = 1 << 15
_LEVEL = 6


def times_ns(threads: int | None) -> list[int]:
    """Do the work on so many threads at a time.

    Args:
        threads: As many as the model runs on, None for every CPU of this process; `MOST_THREADS` at
            the most.

    Returns:
        The time of each piece of work, `COUNT` a thread, in nanoseconds; of one thread where a
        limit of memory lets no more be started.
    """
    count = min(threads or this_machine().cores, MOST_THREADS)
    if count == 1:
        return _timed()
    try:
        with ThreadPoolExecutor(count) as pool:
            return list(chain.from_iterable(pool.map(lambda _: _timed(), range(count))))
    except RuntimeError:  # no thread can be started: a limit of memory counts their stacks
        return _timed()


def _timed() -> list[int]:
    text, clock = _text(), time.perf_counter_ns
    # The first one brings text and tables into the caches.
    zlib.compress(text, _LEVEL)
    samples = []
    for _ in range(COUNT):
        started = clock()
        zlib.compress(text, _LEVEL)
        samples.append(clock() - started)
    return samples


@functools.cache
def _text() -> bytes:
    """The same on every machine, with repetitions that zlib has to look for."""
    return bytes(byte & 0x1F for byte in hashlib.shake_128(b"gnet-opt").digest(_SIZE))
