"""Single-stream latency of several artifacts, each in a process of its own.

Thread pools of two runtimes in one process slow each other down by a factor of ten and more, so
every artifact gets a worker process. Workers take turns in rounds, so that what the machine does
beside (another program, the clock going down) meets all of them, and the ratio of two is taken
within a round. From one start of the workers to the next such a ratio moves: 0.99 to 1.03 in eight
starts of two models with the same execution graph. Where that counts, ask for several sittings.
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt.bench.process import TIMEOUT, Subject, started
from gnet_opt.errors import ConfigError
from gnet_opt.machine import this_machine
from gnet_opt.progress import Progress, silent
from gnet_opt.runtime import InputArray


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how often to measure.

    Attributes:
        sittings: How often all workers are started anew.
        rounds: How often each subject has its turn in a sitting.
        seconds: Least duration of a turn.
        count: Least number of runs in a turn.
        warm_up: Longest time to wait for steady times, in seconds, a subject.
        timeout: How long a worker may take for one answer, in seconds, beyond what was asked.
    """

    sittings: int = 1
    rounds: int = 5
    seconds: float = 0.2
    count: int = 5
    warm_up: float = 1.0
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        if min(self.sittings, self.rounds, self.count) < 1 or min(self.seconds, self.warm_up) < 0:
            raise ConfigError(
                "A latency measurement needs at least one sitting, one round in it and one run in "
                f"that, and no negative time: {self}."
            )


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The time of one picture, batch 1, measured around `Runner.run`.

    Attributes:
        name: The subject's name.
        backend: The backend that ran it.
        samples_ns: Every run of every round, in nanoseconds, in the order measured.
        load_ms: Importing the runtime and loading the artifact; the median over sittings.
        first_ms: The first picture after loading; the median over sittings.
        warm_up: Runs before the first round of each sitting.
        steady: Whether times were steady when each first round began.
        peak_rss_bytes: The most memory that the process had in RAM, None where not known.
    """

    name: str
    backend: str
    samples_ns: tuple[tuple[int, ...], ...]
    load_ms: float
    first_ms: float
    warm_up: int
    steady: bool
    peak_rss_bytes: int | None

    @classmethod
    def joined(cls, sittings: Sequence[Latency]) -> Latency:
        """One subject's results of several sittings."""
        peaks = [sitting.peak_rss_bytes for sitting in sittings]
        return replace(
            sittings[0],
            samples_ns=tuple(samples for sitting in sittings for samples in sitting.samples_ns),
            load_ms=statistics.median(sitting.load_ms for sitting in sittings),
            first_ms=statistics.median(sitting.first_ms for sitting in sittings),
            warm_up=sum(sitting.warm_up for sitting in sittings),
            steady=all(sitting.steady for sitting in sittings),
            peak_rss_bytes=max((peak for peak in peaks if peak is not None), default=None),
        )

    @property
    def n(self) -> int:
        """The number of samples."""
        return sum(len(samples) for samples in self.samples_ns)

    def percentile_ms(self, percent: float) -> float:
        """The least sample that at least `percent` of all samples do not exceed (nearest rank)."""
        return percentile_ms([sample for samples in self.samples_ns for sample in samples], percent)

    @property
    def rounds_ms(self) -> tuple[float, ...]:
        """The median of each round, in milliseconds."""
        return tuple(statistics.median(samples) / 1e6 for samples in self.samples_ns)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median of the rounds' medians; over 0.1 the machine was busy."""
        return spread(self.rounds_ms)

    def to_dict(self) -> dict[str, Any]:
        """The result without its raw samples, for a manifest."""
        return {
            "backend": self.backend,
            "first_ms": self.first_ms,
            "load_ms": self.load_ms,
            "n": self.n,
            "p50_ms": self.percentile_ms(50),
            "p90_ms": self.percentile_ms(90),
            "p99_ms": self.percentile_ms(99),
            "peak_rss_bytes": self.peak_rss_bytes,
            "rounds_ms": list(self.rounds_ms),
            "spread": self.spread,
            "steady": self.steady,
            "warm_up": self.warm_up,
        }


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


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """Subjects measured side by side.

    Attributes:
        results: One a subject, in the order given.
        threads: CPU threads of every subject, None for the runtime's own choice.
        shape: Shape of the input.
    """

    results: tuple[Latency, ...]
    threads: int | None
    shape: tuple[int, ...]

    def __getitem__(self, name: str) -> Latency:
        return next(result for result in self.results if result.name == name)

    def speedup(self, name: str) -> Speedup:
        """How many times as fast `name` is as the first subject."""
        return Speedup.of(self.results[0].rounds_ms, self[name].rounds_ms)

    def renamed(self, names: Mapping[str, str]) -> LatencyReport:
        """Some of the subjects under other names.

        Args:
            names: New names, in the order that they get, and the subjects' own.
        """
        results = tuple(replace(self[old], name=new) for new, old in names.items())
        return replace(self, results=results)

    def to_dict(self) -> dict[str, Any]:
        """`latency` as it stands in a manifest; raw samples stay with the caller."""
        first, *others = self.results
        return {
            "input": list(self.shape),
            "machine": this_machine().to_dict(),
            "results": {result.name: result.to_dict() for result in self.results},
            "rounds": len(first.samples_ns),
            "scenario": "single_stream",
            "speedup": {
                "over": first.name,
                **{other.name: self.speedup(other.name).to_dict() for other in others},
            },
            "threads": self.threads,
        }


def percentile_ms(samples_ns: Sequence[int], percent: float) -> float:
    """The least sample that at least `percent` of all do not exceed (nearest rank), in ms."""
    ordered = sorted(samples_ns)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] / 1e6


def spread(medians: Sequence[float]) -> float:
    """(largest - least) / median of what rounds gave."""
    return (max(medians) - min(medians)) / statistics.median(medians)


def measure(
    subjects: Sequence[Subject],
    batch: InputArray,
    *,
    threads: int | None = None,
    schedule: Schedule | None = None,
    progress: Progress = silent,
) -> LatencyReport:
    """Time subjects side by side; workers are ended whatever happens.

    Args:
        subjects: What to time, with different names; ratios are against the first.
        batch: One real picture as all subjects take it; see `gnet_opt.runtime.Runner.run`.
        threads: CPU threads of each, or None for the runtime's own choice.
        schedule: How long and how often, None for about four seconds for two subjects.
        progress: Shows the rounds.

    Raises:
        MissingDependencyError: A worker misses its runtime.
        BackendError: A worker cannot load or run its subject, died or gave no answer in time.
    """
    schedule = schedule or Schedule()
    if len({subject.name for subject in subjects}) != len(subjects) or not subjects:
        raise ValueError("subjects need different names, and there must be one")
    with tempfile.TemporaryDirectory(prefix="gnet-opt-bench-") as folder:
        picture = Path(folder) / "input.npy"
        np.save(picture, batch)
        chance = random.Random(0)
        sittings = [
            _sitting(subjects, picture, threads, schedule, chance, progress)
            for _ in range(schedule.sittings)
        ]
    results = tuple(Latency.joined(each) for each in zip(*sittings, strict=True))
    return LatencyReport(results=results, threads=threads, shape=tuple(batch.shape))


def _sitting(
    subjects: Sequence[Subject],
    picture: Path,
    threads: int | None,
    schedule: Schedule,
    chance: random.Random,
    progress: Progress,
) -> list[Latency]:
    """Start a worker for each subject, and time them in rounds, each in an order by chance."""
    with contextlib.ExitStack() as stack:
        # All processes start at once, but each loads and warms up alone.
        workers = [
            stack.enter_context(started(subject.name, picture.with_name(f"stderr-{index}")))
            for index, subject in enumerate(subjects)
        ]
        loads, warms = [], []
        for subject, worker in zip(subjects, workers, strict=True):
            loads.append(worker.load(subject, picture, threads, schedule.timeout))
            warm = {"do": "warm", "seconds": schedule.warm_up}
            warms.append(worker.ask(warm, schedule.warm_up + schedule.timeout))
        samples: list[list[tuple[int, ...]]] = [[] for _ in subjects]
        peaks: list[int | None] = [None for _ in subjects]
        request = {"count": schedule.count, "do": "measure", "seconds": schedule.seconds}
        order = list(range(len(subjects)))
        for _ in progress(range(schedule.rounds), "Timing", schedule.rounds):
            # In a fixed order a subject would always follow the same other one, or itself, and
            # what that leaves behind in caches and clock would count in every round.
            chance.shuffle(order)
            for index in order:
                answer = workers[index].ask(request, schedule.seconds + schedule.timeout)
                samples[index].append(tuple(answer["samples_ns"]))
                peaks[index] = answer["peak_rss_bytes"]
    return [
        Latency(
            name=subject.name,
            backend=subject.artifact.backend,
            samples_ns=tuple(samples[index]),
            load_ms=loads[index]["load_ns"] / 1e6,
            first_ms=loads[index]["first_ns"] / 1e6,
            warm_up=warms[index]["count"],
            steady=warms[index]["steady"],
            peak_rss_bytes=peaks[index],
        )
        for index, subject in enumerate(subjects)
    ]
