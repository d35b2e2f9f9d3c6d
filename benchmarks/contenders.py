"""Runtimes timed side by side, each in a process of its own and with a Python of its own.

As `gnet_opt.bench.session`, whose worker and plan are used, with two differences: a worker may have
the Python of another environment, and one that fails is left out with its reason while the others
go on.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnet_opt.bench.latency import Latency
from gnet_opt.bench.process import Subject, WorkerProcess
from gnet_opt.bench.results import Measured, Stream
from gnet_opt.bench.scenarios import SINGLE_STREAM
from gnet_opt.bench.session import Plan
from gnet_opt.errors import GnetOptError
from processes import without_network

ROOT = Path(__file__).resolve().parents[1]
_PAUSE = 0.3
"""Seconds between two turns. Threads of OpenMP may spin for 200 ms after a run, and would take the
next one's cores (KMP_BLOCKTIME in Intel's documentation)."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to run with a Python of its own.

    Attributes:
        subject: What it is called, what to load and how.
        python: The interpreter.
        environment: Variables beside those of this process.
    """

    subject: Subject
    python: Path
    environment: Mapping[str, str]

    @contextlib.contextmanager
    def started(self, stderr: Path) -> Iterator[WorkerProcess]:
        """Start its worker, and end it whatever happens.

        Args:
            stderr: A file for what it prints.
        """
        paths = (ROOT / "toolkit", ROOT / "benchmarks")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONSAFEPATH": "1",
            **self.environment,
        }
        command = [*without_network(), str(self.python), "-m", "gnet_opt.bench.worker"]
        with stderr.open("wb") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                encoding="utf-8",
                start_new_session=True,
            )
        worker = WorkerProcess(self.subject.name, process, stderr)
        try:
            yield worker
        finally:
            worker.end()


def row(timed: Latency) -> dict[str, Any]:
    """One contender for a result file; raw samples stay with the caller."""
    return {
        **timed.to_dict(),
        "cold_start_ms": list(timed.measured.cold_start_ms),
        "pictures_per_second": pictures_per_second(timed),
    }


def pictures_per_second(timed: Latency) -> float:
    """Pictures one after the other, batch 1: the median over turns."""
    turns = timed.stream.rounds
    return statistics.median(len(samples) / (sum(samples) / 1e9) for samples in turns)


def measure(
    contenders: Sequence[Contender], picture: Path, plan: Plan, logs: Path
) -> tuple[dict[str, Latency], dict[str, str]]:
    """Time contenders side by side, in turns whose order is left to chance.

    Args:
        contenders: With different names.
        picture: A .npy file with one preprocessed picture, float32 of shape (1, 3, height, width).
        plan: How long and how often; in each of its rounds every process starts anew.
        logs: An existing folder for what the processes print.

    Returns:
        What was measured by name, and why the others could not be.
    """
    failed: dict[str, str] = {}
    parts: dict[str, list[Measured]] = {contender.subject.name: [] for contender in contenders}
    chance = random.Random(plan.seed)
    for _ in range(plan.rounds):
        left = [each for each in contenders if each.subject.name not in failed]
        measured, problems = _round(left, picture, plan, logs, chance)
        failed |= problems
        for name, part in measured.items():
            parts[name].append(part)
    done = {
        each.subject.name: Latency(
            name=each.subject.name,
            backend=each.subject.artifact.backend,
            measured=_joined(parts[each.subject.name]),
        )
        for each in contenders
        if each.subject.name not in failed
    }
    return done, failed


def ratios(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Ratios of two contenders' rounds, each taken within its round."""
    found = [own / other for own, other in zip(times, base, strict=True)]
    return {"high": max(found), "low": min(found), "median": statistics.median(found)}


def logits(
    contender: Contender, pictures: Path, out: Path, threads: int, log: Path, timeout: float
) -> None:
    """Run many pictures one after the other, in a process of its own.

    Args:
        contender: What to run.
        pictures: A .npy file, float32 of shape (N, 3, height, width); the first alone lies beside
            it as picture.npy.
        out: A .npy file to write, float32 of shape (N, classes).
        threads: CPU threads.
        log: A file for what the process prints.
        timeout: How long it may take for one answer, in seconds.

    Raises:
        GnetOptError: It cannot be loaded or run.
    """
    with contender.started(log) as worker:
        worker.load(contender.subject, pictures.with_name("picture.npy"), threads, timeout)
        worker.run(pictures, out, timeout)


def _round(
    contenders: Sequence[Contender],
    picture: Path,
    plan: Plan,
    logs: Path,
    chance: random.Random,
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Start every process once, one after the other, and time them in turns."""
    failed: dict[str, str] = {}
    workers: dict[str, WorkerProcess] = {}
    facts: dict[str, dict[str, Any]] = {}
    by_name = {contender.subject.name: contender for contender in contenders}
    with contextlib.ExitStack() as stack:
        for name in _shuffled(by_name, chance):
            contender = by_name[name]
            start = time.perf_counter_ns()
            worker = stack.enter_context(contender.started(logs / f"{name}-{plan.threads}.log"))
            try:
                loaded = worker.load(contender.subject, picture, plan.threads, plan.timeout)
                cold = time.perf_counter_ns() - start
                warm = worker.ask({"do": "warm", "seconds": plan.warm_up}, plan.timeout)
            except GnetOptError as error:
                failed[name] = str(error)
                continue
            workers[name] = worker
            facts[name] = {"cold": cold, **loaded, **warm, "peak": None, "samples": []}
        request = {"count": plan.count, "do": "measure", "seconds": plan.seconds}
        for _ in range(plan.turns):
            # In a fixed order a runtime would always follow the same other one.
            for name in _shuffled(workers, chance):
                time.sleep(_PAUSE)
                try:
                    answer = workers[name].ask(request, plan.timeout)
                except GnetOptError as error:
                    failed[name] = str(error)
                    del workers[name]
                    continue
                facts[name]["samples"].append(tuple(answer["samples_ns"]))
                facts[name]["peak"] = answer["peak_rss_bytes"]
    return {name: _measured(facts[name]) for name in workers}, failed


def _shuffled(names: Mapping[str, Any], chance: random.Random) -> list[str]:
    order = list(names)
    chance.shuffle(order)
    return order


def _measured(facts: Mapping[str, Any]) -> Measured:
    return Measured(
        cold_start_ms=(facts["cold"] / 1e6,),
        load_ms=(facts["load_ns"] / 1e6,),
        first_ms=(facts["first_ns"] / 1e6,),
        peak_rss_bytes=facts["peak"],
        warm_up={name: facts[name] for name in ("count", "seconds", "steady")},
        scenarios={SINGLE_STREAM: Stream(rounds=tuple(facts["samples"]))},
    )


def _joined(rounds: Sequence[Measured]) -> Measured:
    """One contender's results of several starts."""
    streams = [one.scenarios[SINGLE_STREAM] for one in rounds]
    peaks = [one.peak_rss_bytes for one in rounds if one.peak_rss_bytes is not None]
    return Measured(
        cold_start_ms=tuple(time for one in rounds for time in one.cold_start_ms),
        load_ms=tuple(time for one in rounds for time in one.load_ms),
        first_ms=tuple(time for one in rounds for time in one.first_ms),
        peak_rss_bytes=max(peaks, default=None),
        warm_up={
            "count": sum(one.warm_up["count"] for one in rounds),
            "seconds": sum(one.warm_up["seconds"] for one in rounds),
            "steady": all(one.warm_up["steady"] for one in rounds),
        },
        scenarios={
            SINGLE_STREAM: Stream(
                rounds=tuple(
                    turn
                    for stream in streams
                    if isinstance(stream, Stream)
                    for turn in stream.rounds
                )
            )
        },
    )
