"""Which threads, streams and batch are best for a subject: all settings, in turns."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt.bench.figures import percentile_ms
from gnet_opt.bench.limits import Constraint
from gnet_opt.bench.process import started
from gnet_opt.bench.session import Entry, Plan, explained, limit
from gnet_opt.machine import own_cpus
from gnet_opt.progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A way to run a model.

    Attributes:
        threads: CPU threads of a process.
        streams: Processes side by side, each with CPUs of its own.
        batch: Pictures at a time.
    """

    threads: int
    streams: int
    batch: int

    def to_dict(self) -> dict[str, int]:
        """The setting for a result file."""
        return {"batch": self.batch, "streams": self.streams, "threads": self.threads}


def settings(cpus: int, batch: int) -> list[Setting]:
    """What a sweep tries: powers of two and all CPUs, as threads of one process or of several.

    Args:
        cpus: How many there are.
        batch: The most pictures at a time.
    """
    counts = sorted({2**power for power in range(cpus.bit_length()) if 2**power <= cpus} | {cpus})
    return [
        Setting(threads=threads, streams=streams, batch=pictures)
        for threads in counts
        for streams in sorted({1, cpus // threads})
        for pictures in sorted({1, batch})
    ]


def sweep(entry: Entry, plan: Plan, progress: Progress = silent) -> dict[str, Any]:
    """Find the best threads, streams and batch for throughput, and the best threads for latency.

    Settings take turns in rounds, each turn with new processes.

    Returns:
        `settings`, each with its pictures a second and p90 in milliseconds by round (the latter of
        one stream and single pictures alone), and the `best` for `latency` and `throughput`.

    Raises:
        MissingDependencyError: The runtime is not installed.
        BackendError: A worker cannot load or run the subject, died or gave no answer in time.
    """
    cpus = plan.constraint.cpus or own_cpus()
    tried = settings(len(cpus), entry.batch)
    rates: dict[Setting, list[float]] = {setting: [] for setting in tried}
    times: dict[Setting, list[float]] = {setting: [] for setting in tried}
    chance = random.Random(plan.seed)
    turns = [setting for _ in range(plan.rounds) for setting in chance.sample(tried, len(tried))]
    with tempfile.TemporaryDirectory(prefix="gnet-opt-sweep-") as folder:
        picture = Path(folder) / "input.npy"
        np.save(picture, entry.pictures)
        for setting in progress(turns, "Sweeping", len(turns)):
            rate, p90_ms = _turn(entry, plan, setting, cpus, picture)
            rates[setting].append(rate)
            if p90_ms is not None:
                times[setting].append(p90_ms)
    rows = [
        {**setting.to_dict(), "p90_ms": times[setting], "pictures_per_second": rates[setting]}
        for setting in tried
    ]
    quickest = min(filter(times.get, tried), key=lambda s: statistics.median(times[s]))
    most = max(tried, key=lambda s: statistics.median(rates[s]))
    return {
        "best": {
            "latency": {
                **quickest.to_dict(),
                "p90_ms": statistics.median(times[quickest]),
            },
            "throughput": {
                **most.to_dict(),
                "pictures_per_second": statistics.median(rates[most]),
            },
        },
        "settings": rows,
    }


def _turn(
    entry: Entry, plan: Plan, setting: Setting, cpus: Sequence[int], picture: Path
) -> tuple[float, float | None]:
    """Pictures a second of one setting, and p90 in milliseconds where it is one of latency."""
    with contextlib.ExitStack() as stack:
        workers = []
        for index in range(setting.streams):
            stderr = picture.with_name(f"stderr-{index}")
            worker = stack.enter_context(started(entry.subject.name, stderr))
            own = tuple(cpus[index * setting.threads : (index + 1) * setting.threads])
            constraint = Constraint(
                # Streams would share some CPUs and leave others alone.
                cpus=own if setting.streams > 1 and _can_bind() else plan.constraint.cpus,
                memory_bytes=plan.constraint.memory_bytes,
            )
            with explained(plan.constraint):
                limit(worker, constraint)
                worker.load(entry.subject, picture, setting.threads, plan.timeout)
            warm = {"do": "warm", "seconds": plan.warm_up}
            worker.ask(warm, plan.warm_up + plan.timeout)
            workers.append(worker)
        counted = {"count": plan.count, "seconds": plan.seconds}
        for worker in workers:
            worker.send({"do": "offline", "batch": setting.batch, **counted})
        answers = [worker.answer("offline", plan.seconds + plan.timeout) for worker in workers]
        rate = sum(1e9 * answer["pictures"] / answer["elapsed_ns"] for answer in answers)
        if setting.streams > 1 or setting.batch > 1:
            return rate, None
        request = {"do": "measure", **counted}
        answer = workers[0].ask(request, plan.seconds + plan.timeout)
        return rate, percentile_ms(answer["samples_ns"], 90)


def _can_bind() -> bool:
    return hasattr(os, "sched_getaffinity")
