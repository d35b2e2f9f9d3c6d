"""Latencies that nobody measured, for what is decided by them."""

from __future__ import annotations

from collections.abc import Sequence

from gnet_opt.bench.latency import Latency
from gnet_opt.bench.results import Measured, Stream


def made_up(name: str, backend: str, *rounds: Sequence[int]) -> Latency:
    """A subject with these times in nanoseconds, round by round."""
    stream = Stream(rounds=tuple(tuple(samples) for samples in rounds))
    measured = Measured(
        cold_start_ms=(2.0,) * len(rounds),
        load_ms=(1.0,) * len(rounds),
        first_ms=(1.0,) * len(rounds),
        peak_rss_bytes=None,
        warm_up={"count": 10, "seconds": 0.1, "steady": True},
        scenarios={"single-stream": stream},
    )
    return Latency(name=name, backend=backend, measured=measured)
