"""Single-stream latency of several artifacts, as a manifest has it.

Thread pools of two runtimes in one process slow each other down by a factor of ten and more, so
every artifact gets a process of its own, as `gnet_opt.bench.session` starts them: anew in each
round, because from one start to the next the ratio of two models moves (0.99 to 1.03 in eight
starts of two models with one execution graph), and in turns, so that what the machine does beside
meets all of them and the ratio of two is taken within a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gnet_opt.bench.figures import Speedup, percentile_ms
from gnet_opt.bench.process import Subject
from gnet_opt.bench.results import Measured, Stream
from gnet_opt.bench.scenarios import SINGLE_STREAM
from gnet_opt.bench.session import Entry, Plan, single_stream
from gnet_opt.machine import this_machine
from gnet_opt.progress import Progress, silent
from gnet_opt.runtime import InputArray


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The time of one picture, batch 1, measured around `Runner.run`.

    Attributes:
        name: The subject's name.
        backend: The backend that ran it.
        measured: What its processes were measured to do in the scenario single-stream.
    """

    name: str
    backend: str
    measured: Measured

    @property
    def stream(self) -> Stream:
        """Every run of every round."""
        found = self.measured.scenarios[SINGLE_STREAM]
        assert isinstance(found, Stream)
        return found

    @property
    def rounds_ms(self) -> list[float]:
        """The median of each round, in milliseconds."""
        return self.stream.rounds_ms

    def to_dict(self) -> dict[str, Any]:
        """The result without its raw samples, for a manifest."""
        measured, stream = self.measured, self.stream
        return {
            "backend": self.backend,
            "first_ms": statistics.median(measured.first_ms),
            "load_ms": statistics.median(measured.load_ms),
            "n": len(stream.samples_ns),
            **{f"p{n}_ms": percentile_ms(stream.samples_ns, n) for n in (50, 90, 99)},
            "peak_rss_bytes": measured.peak_rss_bytes,
            "rounds_ms": stream.rounds_ms,
            "spread": measured.spreads()[SINGLE_STREAM],
            "steady": measured.warm_up["steady"],
            "warm_up": measured.warm_up["count"],
        }


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
            "rounds": len(first.rounds_ms),
            "scenario": "single_stream",
            "speedup": {
                "over": first.name,
                **{other.name: self.speedup(other.name).to_dict() for other in others},
            },
            "threads": self.threads,
        }


def measure(
    subjects: Sequence[Subject],
    batch: InputArray,
    plan: Plan,
    *,
    more: Callable[[LatencyReport], bool] = lambda report: False,
    most_rounds: int = 0,
    progress: Progress = silent,
) -> LatencyReport:
    """Time subjects side by side; workers are ended whatever happens.

    Args:
        subjects: What to time, with different names; ratios are against the first.
        batch: One real picture as all subjects take it; see `gnet_opt.runtime.Runner.run`.
        plan: How.
        more: Asked after the rounds of the plan, and after each further one, whether one more is
            needed.
        most_rounds: How many there are at most, those of the plan included.
        progress: Shows the rounds.

    Raises:
        MissingDependencyError: A worker misses its runtime.
        BackendError: A worker cannot load or run its subject, died or gave no answer in time.
    """
    if len({subject.name for subject in subjects}) != len(subjects) or not subjects:
        raise ValueError("subjects need different names, and there must be one")

    def report(found: Sequence[Measured]) -> LatencyReport:
        results = tuple(
            Latency(name=subject.name, backend=subject.artifact.backend, measured=measured)
            for subject, measured in zip(subjects, found, strict=True)
        )
        return LatencyReport(results=results, threads=plan.threads, shape=tuple(batch.shape))

    return report(
        single_stream(
            [Entry(subject=subject, pictures=batch) for subject in subjects],
            plan,
            lambda found: more(report(found)),
            most_rounds,
            progress,
        )
    )
