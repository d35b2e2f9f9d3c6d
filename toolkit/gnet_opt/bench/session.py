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
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt.bench.figures import percentile_ms
from gnet_opt.bench.limits import Constraint
from gnet_opt.bench.power import Rails, find_rails, measure_energy
from gnet_opt.bench.process import TIMEOUT, Subject, WorkerProcess, started
from gnet_opt.bench.results import Measured, Offline, Scenario, Server, Stream, Trial
from gnet_opt.bench.scenarios import MULTI_STREAM, OFFLINE, QUERY, SERVER, SINGLE_STREAM
from gnet_opt.bench.soak import soak
from gnet_opt.errors import BackendError, ConfigError
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
        rounds: How often each subject gets a new process.
        turns: Turns in each round in the scenario single-stream.
        seconds: Least duration of a turn.
        count: Least number of queries in a turn.
        seed: Of the order of turns and of arrivals.
        latency_bound_ms: Of the server scenario, None for `BOUND_FACTOR`.
        threads: CPU threads of every subject, None for the runtime's own choice.
        control: Whether a control load is timed beside every turn.
        constraint: What the processes may use.
        soak: Seconds of a sustained run of each subject, 0 for none.
        warm_up: Longest time to wait for steady times, in seconds, a subject.
        timeout: How long a worker may take for one answer, in seconds, beyond what was asked.
    """

    scenarios: tuple[str, ...] = (SINGLE_STREAM,)
    rounds: int = 5
    turns: int = 1
    seconds: float = 1.0
    count: int = 5
    seed: int = 0
    latency_bound_ms: float | None = None
    threads: int | None = None
    control: bool = True
    constraint: Constraint = field(default_factory=Constraint)
    soak: float = 0.0
    warm_up: float = 5.0
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        bound = (self.latency_bound_ms or 0.0) / 1e3
        times = (self.seconds, self.soak, self.warm_up, bound)
        # NaN is not between any two numbers.
        if min(self.rounds, self.turns, self.count) < 1 or not all(
            0 <= time <= _MOST_SECONDS for time in times
        ):
            raise ConfigError(
                "A measurement needs at least one round, one turn and query in it, and times "
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
        files: Picture files to go through from end to end, none for leaving that out.
        source: What these files are, for the result.
        batch: The most pictures at a time that the model takes and a query has: 1 or `QUERY`.
    """

    subject: Subject
    pictures: InputArray
    preprocess: Preprocess | None = None
    files: tuple[Path, ...] = ()
    source: str = ""
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
    with _benches(entries, plan) as benches:
        steps = _steps(benches, plan, find_rails() if rails is None else rails)
        for step in progress(steps, "Measuring", len(steps)):
            step()
        for bench in benches if plan.soak else []:
            bench.soak(progress)
        return [bench.measured(_bound_ms(benches, plan)) for bench in benches]


def single_stream(
    entries: Sequence[Entry],
    plan: Plan,
    more: Callable[[list[Measured]], bool] = lambda found: False,
    most_rounds: int = 0,
    progress: Progress = silent,
) -> list[Measured]:
    """Measure the scenario single-stream alone; workers are ended whatever happens.

    Args:
        entries: What to measure.
        plan: How.
        more: Asked after the rounds of the plan, and after each further one, whether one more is
            needed.
        most_rounds: How many there are at most, those of the plan included.
        progress: Shows the rounds.

    Raises:
        MissingDependencyError: A worker misses its runtime.
        BackendError: A worker cannot load or run its subject, died or gave no answer in time.
    """
    chance = random.Random(plan.seed)
    with _benches(entries, plan) as benches:

        def round_() -> None:
            for turn in (_Bench.start, _Bench.warm, *[_Bench.single_stream] * plan.turns):
                for bench in chance.sample(benches, len(benches)):
                    turn(bench)

        def found() -> list[Measured]:
            return [bench.measured(0.0) for bench in benches]

        for _ in progress(range(plan.rounds), "Timing", plan.rounds):
            round_()
        if plan.rounds < most_rounds and more(found()):
            for _ in progress(range(most_rounds - plan.rounds), "Timing what is close"):
                round_()
                if not more(found()):
                    break
        return found()


@contextlib.contextmanager
def _benches(entries: Sequence[Entry], plan: Plan) -> Iterator[list[_Bench]]:
    """One for each entry; their processes are ended whatever happens."""
    with (
        tempfile.TemporaryDirectory(prefix="gnet-opt-bench-") as folder,
        contextlib.ExitStack() as stack,
    ):
        benches = [
            _Bench(entry, plan, Path(folder) / str(index)) for index, entry in enumerate(entries)
        ]
        for bench in benches:
            stack.callback(bench.end)
        yield benches


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
            limit(worker, plan.constraint)
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
        for _ in range(plan.turns if wanted & {SINGLE_STREAM, SERVER} else 0):
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
        with explained(plan.constraint):
            limit(worker, plan.constraint)
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
        if not self._entry.files:
            return
        assert self._entry.preprocess is not None
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
        with explained(self._plan.constraint):
            self._soak = soak(self._worker, self._plan.soak, progress=progress).to_dict()

    def measured(self, bound_ms: float) -> Measured:
        """What all of it gave."""
        wanted, batch = self._plan.scenarios, self._entry.batch
        found: dict[str, Scenario] = {}
        if SINGLE_STREAM in wanted:
            found[SINGLE_STREAM] = Stream(
                rounds=tuple(self.singles),
                device_rounds=tuple(self._device),
                control_rounds=tuple(self._control.get(SINGLE_STREAM, ())),
            )
        if MULTI_STREAM in wanted:
            found[MULTI_STREAM] = Stream(
                rounds=tuple(self._multiples),
                query_pictures=QUERY,
                batch=batch,
                control_rounds=tuple(self._control.get(MULTI_STREAM, ())),
            )
        if OFFLINE in wanted:
            found[OFFLINE] = Offline(
                rounds=tuple(self._offline),
                batch=batch,
                control_rounds=tuple(self._control.get(OFFLINE, ())),
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
            }
            if self._steps
            else None,
            energy=self._energy,
            soak=self._soak,
        )

    def _turn(self, scenario: str, doing: str, **more: Any) -> dict[str, Any]:
        """A turn of a scenario, with the control load before and after it."""
        plan = self._plan
        answer = self._ask(doing, plan.seconds, control=plan.control, count=plan.count, **more)
        if plan.control:
            self._control.setdefault(scenario, []).append(tuple(answer["control_ns"]))
        return answer

    def _ask(self, doing: str, seconds: float, **more: Any) -> dict[str, Any]:
        assert self._worker is not None  # started first
        request = {"do": doing, "seconds": seconds, **more}
        with explained(self._plan.constraint):
            return self._worker.ask(request, seconds + self._plan.timeout)


def limit(worker: WorkerProcess, constraint: Constraint) -> None:
    """Put a worker under a constraint before it loads anything."""
    if constraint:
        worker.ask({"do": "limit", **constraint.to_dict()}, TIMEOUT)


@contextlib.contextmanager
def explained(constraint: Constraint) -> Iterator[None]:
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
