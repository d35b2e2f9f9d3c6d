"""A run of `gnet-opt bench`: processes are started, warmed up and measured in turns.

Every subject has processes of its own. In each round all of them start anew, and in each scenario
all subjects have their turn in an order by chance, so that what the machine does beside meets all
of them and ratios can be taken within a round. New processes, because from one start to the next
the times of one model differ by a few percent (`gnet_opt.bench.latency`), which rounds of one
process would all share, and never show.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt.bench.latency import percentile_ms
from gnet_opt.bench.limits import Constraint
from gnet_opt.bench.power import Rails, find_rails, measure_energy
from gnet_opt.bench.process import TIMEOUT, Subject, WorkerProcess, started
from gnet_opt.bench.results import Measured, Offline, Scenario, Server, Stream, Trial
from gnet_opt.bench.scenarios import MULTI_STREAM, OFFLINE, QUERY, SERVER, SINGLE_STREAM
from gnet_opt.bench.soak import soak
from gnet_opt.errors import BackendError, ConfigError
from gnet_opt.machine import own_cpus
from gnet_opt.preprocess import Preprocess
from gnet_opt.progress import Progress, silent
from gnet_opt.runtime import InputArray, Profile

BOUND_FACTOR = 4.0
"""The latency bound of the server scenario where none is asked for, in p90 of single-stream of the
slowest subject: one bound for all, which leaves each of them room to let some queries wait."""

_STEPS = 6
"""Rates that are tried; each halves the interval in which the highest one lies."""

_QUERIES = 100
"""Queries at one rate, so that one of them may be late."""

_LONGEST = 10.0
"""Seconds at one rate that a slow subject is given; it gets fewer queries for it, ..."""

_FEWEST = 10
"""... but so many."""

_ENERGY_SECONDS = 5.0
"""How long pictures are computed while their energy is read, as long as the idle machine is."""

_PROFILED_RUNS = 30

_MOST_SECONDS = 1e6
"""No duration or latency bound is longer: it would be a slip of the pen, or infinite."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to measure.

    Attributes:
        scenarios: Which, of `gnet_opt.bench.scenarios.SCENARIOS`.
        rounds: Turns of each subject in each scenario, each with a new process.
        seconds: Least duration of a turn.
        count: Least number of queries in a turn.
        seed: Of the order of turns and of arrivals.
        latency_bound_ms: Of the server scenario, None for `BOUND_FACTOR`.
        threads: CPU threads of every subject, None for the runtime's own choice.
        constraint: What the processes may use.
        soak: Seconds of a sustained run of each subject, 0 for none.
        warm_up: Longest time to wait for steady times, in seconds, a subject.
        timeout: How long a worker may take for one answer, in seconds, beyond what was asked.
    """

    scenarios: tuple[str, ...] = (SINGLE_STREAM,)
    rounds: int = 5
    seconds: float = 1.0
    count: int = 5
    seed: int = 0
    latency_bound_ms: float | None = None
    threads: int | None = None
    constraint: Constraint = field(default_factory=Constraint)
    soak: float = 0.0
    warm_up: float = 5.0
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        bound = (self.latency_bound_ms or 0.0) / 1e3
        times = (self.seconds, self.soak, self.warm_up, bound)
        # NaN is not between any two numbers.
        if min(self.rounds, self.count) < 1 or not all(
            0 <= time <= _MOST_SECONDS for time in times
        ):
            raise ConfigError(
                "A measurement needs at least one round, one query in it, and times "
                f"from 0 to {_MOST_SECONDS:.0f} s: {self}."
            )
        if not self.scenarios:
            raise ConfigError("A measurement needs at least one scenario.")

    def settings(self) -> dict[str, Any]:
        """What was asked for, as it stands in the result file."""
        return {
            "count": self.count,
            "latency_bound_ms": self.latency_bound_ms,
            "rounds": self.rounds,
            "scenarios": list(self.scenarios),
            "seconds": self.seconds,
            "seed": self.seed,
            "soak_seconds": self.soak,
            "threads": self.threads,
        }


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A subject with what it is measured on.

    Attributes:
        subject: What to run.
        pictures: As the model takes them (`Preprocess.tensor`), at least one.
        preprocess: How a picture file becomes one of them.
        files: Picture files to go through from end to end.
        source: What these files are, for the result.
        batch: The most pictures at a time that the model takes and a query has: 1 or `QUERY`.
    """

    subject: Subject
    pictures: InputArray
    preprocess: Preprocess
    files: tuple[Path, ...]
    source: str
    batch: int = 1


def measure(
    entries: Sequence[Entry],
    plan: Plan,
    progress: Progress = silent,
    *,
    rails: Rails | None = None,
) -> list[Measured]:
    """Measure subjects side by side; workers are ended whatever happens.

    Args:
        entries: What to measure.
        plan: How.
        progress: Shows the turns.
        rails: What tells the energy, None for what this machine has.

    Raises:
        MissingDependencyError: A worker misses its runtime.
        BackendError: A worker cannot load or run its subject, died or gave no answer in time.
    """
    with (
        tempfile.TemporaryDirectory(prefix="gnet-opt-bench-") as folder,
        contextlib.ExitStack() as stack,
    ):
        benches = [
            _Bench(entry, plan, Path(folder) / str(index)) for index, entry in enumerate(entries)
        ]
        for bench in benches:
            stack.callback(bench.end)
        steps = _steps(benches, plan, find_rails() if rails is None else rails)
        for step in progress(steps, "Measuring", len(steps)):
            step()
        for bench in benches if plan.soak else []:
            bench.soak(progress)
        return [bench.measured(_bound_ms(benches, plan)) for bench in benches]


def profile(entry: Entry, plan: Plan) -> Profile:
    """What the runtime executes of one subject, told by a process of its own.

    Raises:
        MissingDependencyError: The runtime is not installed.
        BackendError: The backend cannot tell on this machine.
    """
    with tempfile.TemporaryDirectory(prefix="gnet-opt-bench-") as folder:
        picture = Path(folder) / "input.npy"
        np.save(picture, entry.pictures[:1])
        with started(entry.subject.name, Path(folder) / "stderr") as worker:
            _limit(worker, plan.constraint)
            return worker.profile(entry.subject, picture, plan.threads, _PROFILED_RUNS)


_Step = Callable[[], object]


def _steps(benches: Sequence[_Bench], plan: Plan, rails: Rails) -> list[_Step]:
    """Everything to do, in order."""
    chance = random.Random(plan.seed)
    steps: list[_Step] = []

    def in_turns(turn: Callable[[_Bench], object]) -> None:
        # In a fixed order a subject would always follow the same other one.
        order = chance.sample(benches, len(benches))
        steps.extend(functools.partial(turn, bench) for bench in order)

    def bound_ms() -> float:
        return _bound_ms(benches, plan)

    wanted = set(plan.scenarios)
    for _ in range(plan.rounds):
        in_turns(_Bench.start)
        in_turns(_Bench.warm)
        # The server scenario needs to know where to look for its rate.
        if wanted & {SINGLE_STREAM, SERVER}:
            in_turns(_Bench.single_stream)
        if MULTI_STREAM in wanted:
            in_turns(_Bench.multi_stream)
        if OFFLINE in wanted:
            in_turns(_Bench.offline)
        in_turns(_Bench.end_to_end)
    for index in range(_STEPS if SERVER in wanted else 0):
        in_turns(functools.partial(_Bench.serve, bound_ms=bound_ms, step=index))
    # One after the other: the energy of a subject is what the machine takes above doing nothing.
    steps += [functools.partial(bench.energy, rails) for bench in benches]
    return steps


def _bound_ms(benches: Sequence[_Bench], plan: Plan) -> float:
    """The latency bound of the server scenario; 0 where nothing was measured to take it from."""
    if plan.latency_bound_ms is not None:
        return plan.latency_bound_ms
    singles = [bench.singles for bench in benches]
    if not all(singles):
        return 0.0
    return BOUND_FACTOR * max(percentile_ms(sum(rounds, ()), 90) for rounds in singles)


class _Bench:
    """One subject with its process, and what it gave so far."""

    def __init__(self, entry: Entry, plan: Plan, folder: Path) -> None:
        folder.mkdir()
        self._entry = entry
        self._plan = plan
        self._input = folder / "input.npy"
        np.save(self._input, entry.pictures)
        self._started: list[tuple[float, float, float]] = []
        self._warm: list[dict[str, Any]] = []
        self._held = contextlib.ExitStack()
        self._worker: WorkerProcess | None = None
        self.singles: list[tuple[int, ...]] = []
        self._device: list[tuple[int, ...]] = []
        self._multiples: list[tuple[int, ...]] = []
        self._offline: list[tuple[int, int]] = []
        self._control: dict[str, list[tuple[int, ...]]] = {}
        self._trials: list[Trial] = []
        self._steps: dict[str, list[int]] = {}
        self._energy: dict[str, Any] | None = None
        self._soak: dict[str, Any] | None = None

    def end(self) -> None:
        """End the process, if there is one."""
        self._held.close()
        self._worker = None

    def start(self) -> None:
        """Start a process in place of the one before, and compute one picture."""
        self.end()
        entry, plan = self._entry, self._plan
        begin = time.perf_counter_ns()
        worker = self._held.enter_context(
            started(entry.subject.name, self._input.with_name("stderr"))
        )
        with _explained(plan.constraint):
            _limit(worker, plan.constraint)
            loaded = worker.load(entry.subject, self._input, plan.threads, plan.timeout)
        cold = time.perf_counter_ns() - begin
        self._started.append((cold / 1e6, loaded["load_ns"] / 1e6, loaded["first_ns"] / 1e6))
        self._worker = worker

    def warm(self) -> None:
        """Run until times are steady, and read the memory before the control load takes some."""
        batched = {MULTI_STREAM, OFFLINE} & set(self._plan.scenarios)
        batch = self._entry.batch if batched else 1
        self._warm.append(self._ask("warm", self._plan.warm_up, batch=batch))

    def single_stream(self) -> None:
        """A turn of single pictures."""
        answer = self._turn(SINGLE_STREAM, "measure")
        self.singles.append(tuple(answer["samples_ns"]))
        if answer["device_ns"]:
            self._device.append(tuple(answer["device_ns"]))

    def multi_stream(self) -> None:
        """A turn of queries of eight pictures."""
        answer = self._turn(MULTI_STREAM, "measure", batch=self._entry.batch, pictures=QUERY)
        self._multiples.append(tuple(answer["samples_ns"]))

    def offline(self) -> None:
        """A turn of as many pictures as possible."""
        answer = self._turn(OFFLINE, "offline", batch=self._entry.batch)
        self._offline.append((answer["pictures"], answer["elapsed_ns"]))

    def serve(self, *, bound_ms: Callable[[], float], step: int) -> None:
        """Try the rate in the middle between the highest good one and the lowest bad one."""
        good = [trial.offered_qps for trial in self._trials if trial.within]
        bad = [trial.offered_qps for trial in self._trials if not trial.within]
        # More than one query after the other cannot be served at all.
        most = 1e9 / statistics.median(sum(self.singles, ()))
        rate = (max(good, default=0.0) + min(bad, default=most)) / 2
        count = max(_FEWEST, min(_QUERIES, int(rate * _LONGEST)), int(rate * self._plan.seconds))
        answer = self._ask(
            "serve",
            count / rate,
            bound_ns=bound_ms() * 1e6,
            count=count,
            rate=rate,
            seed=self._plan.seed + step,
        )
        self._trials.append(
            Trial(
                offered_qps=rate,
                samples_ns=tuple(answer["samples_ns"]),
                late=answer["late"],
                within=answer["within"],
            )
        )

    def end_to_end(self) -> None:
        """Every picture file once, from its bytes to logits."""
        answer = self._ask(
            "end-to-end",
            0.0,
            files=[str(path.resolve()) for path in self._entry.files],
            preprocess=self._entry.preprocess.to_dict(),
        )
        for name, times in answer.items():
            self._steps.setdefault(name, []).extend(times)

    def energy(self, rails: Rails) -> None:
        """What a picture takes, computed back to back."""

        def run() -> int:
            answer = self._ask("offline", _ENERGY_SECONDS, batch=self._entry.batch, count=1)
            return int(answer["pictures"])

        self._energy = measure_energy(run, rails).to_dict()

    def soak(self, progress: Progress) -> None:
        """A sustained run."""
        assert self._worker is not None  # started first
        with _explained(self._plan.constraint):
            self._soak = soak(self._worker, self._plan.soak, progress=progress).to_dict()

    def measured(self, bound_ms: float) -> Measured:
        """What all of it gave."""
        wanted, batch = self._plan.scenarios, self._entry.batch
        found: dict[str, Scenario] = {}
        if SINGLE_STREAM in wanted:
            found[SINGLE_STREAM] = Stream(
                rounds=tuple(self.singles),
                device_rounds=tuple(self._device),
                control_rounds=tuple(self._control[SINGLE_STREAM]),
            )
        if MULTI_STREAM in wanted:
            found[MULTI_STREAM] = Stream(
                rounds=tuple(self._multiples),
                query_pictures=QUERY,
                batch=batch,
                control_rounds=tuple(self._control[MULTI_STREAM]),
            )
        if OFFLINE in wanted:
            found[OFFLINE] = Offline(
                rounds=tuple(self._offline),
                batch=batch,
                control_rounds=tuple(self._control[OFFLINE]),
            )
        if SERVER in wanted:
            found[SERVER] = Server(rounds=tuple(self._trials), bound_ms=bound_ms)
        cold, load, first = zip(*self._started, strict=True)
        peaks = [one["peak_rss_bytes"] for one in self._warm]
        return Measured(
            cold_start_ms=cold,
            load_ms=load,
            first_ms=first,
            peak_rss_bytes=max((peak for peak in peaks if peak is not None), default=None),
            warm_up={
                "count": sum(one["count"] for one in self._warm),
                "seconds": sum(one["seconds"] for one in self._warm),
                "steady": all(one["steady"] for one in self._warm),
            },
            scenarios=found,
            end_to_end={
                **self._steps,
                "pictures": len(self._steps["infer_ns"]),
                "source": self._entry.source,
            },
            energy=self._energy,
            soak=self._soak,
        )

    def _turn(self, scenario: str, doing: str, **more: Any) -> dict[str, Any]:
        """A turn of a scenario, with the control load before and after it."""
        answer = self._ask(doing, self._plan.seconds, control=True, count=self._plan.count, **more)
        self._control.setdefault(scenario, []).append(tuple(answer["control_ns"]))
        return answer

    def _ask(self, doing: str, seconds: float, **more: Any) -> dict[str, Any]:
        assert self._worker is not None  # started first
        request = {"do": doing, "seconds": seconds, **more}
        with _explained(self._plan.constraint):
            return self._worker.ask(request, seconds + self._plan.timeout)


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
            with _explained(plan.constraint):
                _limit(worker, constraint)
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


def _limit(worker: WorkerProcess, constraint: Constraint) -> None:
    """Put a worker under a constraint before it loads anything."""
    if constraint:
        worker.ask({"do": "limit", **constraint.to_dict()}, TIMEOUT)


@contextlib.contextmanager
def _explained(constraint: Constraint) -> Iterator[None]:
    """Say with a worker's error that its memory is limited: runtimes name all kinds of causes."""
    try:
        yield
    except BackendError as error:
        if constraint.memory_bytes is None:
            raise
        raise BackendError(
            f"{error} Its memory is limited to {constraint.memory_bytes / 2**20:.0f} MiB; if that "
            "is the cause, allow more with --memory."
        ) from error


def _can_bind() -> bool:
    return hasattr(os, "sched_getaffinity")
