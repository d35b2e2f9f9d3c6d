"""Single-stream latency of several artifacts, each in a process of its own.

Thread pools of two runtimes in one process slow each other down by a factor of ten and more, so
every artifact gets a worker process. Workers take turns in rounds, so that what the machine does
beside (another program, the clock going down) meets all of them, and the ratio of two is taken
within a round.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt import errors
from gnet_opt.errors import BackendError, GnetOptError
from gnet_opt.machine import this_machine
from gnet_opt.progress import Progress, silent
from gnet_opt.runtime import Artifact, FloatArray

_READER_SECONDS = 5.0
"""How long to wait for the end of a killed worker's output."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Something to time.

    Attributes:
        name: What it is called in the result, `float` for example.
        artifact: What to load.
        resolve: Import string of a function from a backend's name to the backend, for the worker
            to call; `gnet_opt.backends:get` for the registered ones.
    """

    name: str
    artifact: Artifact
    resolve: str


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how often to measure.

    Attributes:
        rounds: How often each subject has its turn.
        seconds: Least duration of a turn.
        count: Least number of runs in a turn.
        warm_up: Longest time to wait for steady times, in seconds, a subject.
        timeout: How long a worker may take for one answer, in seconds, beyond what was asked.
    """

    rounds: int = 5
    seconds: float = 0.2
    count: int = 5
    warm_up: float = 0.5
    timeout: float = 120.0

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.count < 1 or min(self.seconds, self.warm_up) < 0:
            raise errors.ConfigError(
                f"A latency measurement needs at least one round and one run in it, and no "
                f"negative time: {self}."
            )


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The time of one picture, batch 1, measured around `Runner.run`.

    Attributes:
        name: The subject's name.
        backend: The backend that ran it.
        samples_ns: Every run of every round, in nanoseconds, in the order measured.
        load_ms: Importing the runtime and loading the artifact.
        first_ms: The first picture after loading.
        warm_up: Runs before the first round.
        steady: Whether times were steady when the first round began.
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

    @property
    def n(self) -> int:
        """The number of samples."""
        return sum(len(samples) for samples in self.samples_ns)

    def percentile_ms(self, percent: float) -> float:
        """The least sample that at least `percent` of all samples do not exceed (nearest rank)."""
        ordered = sorted(sample for samples in self.samples_ns for sample in samples)
        return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] / 1e6

    @property
    def rounds_ms(self) -> tuple[float, ...]:
        """The median of each round, in milliseconds."""
        return tuple(statistics.median(samples) / 1e6 for samples in self.samples_ns)

    @property
    def spread(self) -> float:
        """(slowest - fastest) / median of the rounds' medians; over 0.1 the machine was busy."""
        medians = self.rounds_ms
        return (max(medians) - min(medians)) / statistics.median(medians)

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
        ratios = [
            base / own
            for base, own in zip(self.results[0].rounds_ms, self[name].rounds_ms, strict=True)
        ]
        return Speedup(median=statistics.median(ratios), low=min(ratios), high=max(ratios))

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


def measure(
    subjects: Sequence[Subject],
    batch: FloatArray,
    *,
    threads: int | None = None,
    schedule: Schedule | None = None,
    progress: Progress = silent,
) -> LatencyReport:
    """Time subjects side by side; workers are ended whatever happens.

    Args:
        subjects: What to time, with different names; ratios are against the first.
        batch: A real picture, preprocessed: float32 of shape (1, 3, height, width).
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
    with (
        tempfile.TemporaryDirectory(prefix="gnet-opt-bench-") as folder,
        contextlib.ExitStack() as stack,
    ):
        picture = Path(folder) / "input.npy"
        np.save(picture, batch)
        # All processes start at once, but each loads and warms up alone.
        workers = [
            stack.enter_context(_started(subject.name, Path(folder) / f"stderr-{index}"))
            for index, subject in enumerate(subjects)
        ]
        loads, warms = [], []
        for subject, worker in zip(subjects, workers, strict=True):
            loads.append(worker.ask(_load_request(subject, picture, threads), schedule.timeout))
            warm = {"do": "warm", "seconds": schedule.warm_up}
            warms.append(worker.ask(warm, schedule.warm_up + schedule.timeout))
        samples: list[list[tuple[int, ...]]] = [[] for _ in subjects]
        peaks: list[int | None] = [None for _ in subjects]
        request = {"count": schedule.count, "do": "measure", "seconds": schedule.seconds}
        order = list(range(len(subjects)))
        for _ in progress(range(schedule.rounds), "Timing", schedule.rounds):
            for index in order:
                answer = workers[index].ask(request, schedule.seconds + schedule.timeout)
                samples[index].append(tuple(answer["samples_ns"]))
                peaks[index] = answer["peak_rss_bytes"]
            # Who went first goes last, so that a drift within rounds favours nobody.
            order.reverse()
    results = tuple(
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
    )
    return LatencyReport(results=results, threads=threads, shape=tuple(batch.shape))


def _load_request(subject: Subject, picture: Path, threads: int | None) -> dict[str, Any]:
    return {
        "backend": subject.artifact.backend,
        "do": "load",
        "files": [[kind, str(path.resolve())] for kind, path in subject.artifact.files],
        "input": str(picture),
        "path": str(subject.artifact.path.resolve()),
        "resolve": subject.resolve,
        "threads": threads,
    }


class _Process:
    """A worker process, asked and answered line by line."""

    def __init__(self, name: str, process: subprocess.Popen[str], stderr: Path) -> None:
        self._name = name
        self._process = process
        self._stderr = stderr
        self._lines: queue.Queue[str | None] = queue.Queue()
        # A thread reads, because a pipe cannot be read with a timeout on every system.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        # A worker that died cannot be written to; the missing answer says so below.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise BackendError(
                f"The latency worker for {self._name} gave no answer to "
                f"{request['do']!r} within {timeout:.0f} s. Is the machine overloaded? Try again, "
                "or measure fewer threads."
            ) from None
        if line is None:
            code = self._process.wait()
            raise BackendError(
                f"The latency worker for {self._name} died during {request['do']!r} "
                f"({_exit(code)}). Its last words: {self._tail() or 'none'}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _as_error(answer["kind"], f"Measuring {self._name}: {answer['error']}")
        return answer

    def end(self) -> None:
        """Kill the process, and whatever a runtime started in it, and wait until it is gone."""
        if hasattr(os, "killpg"):
            # The worker leads a group of its own, which is gone when it died alone.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()
        self._process.wait()
        self._reader.join(_READER_SECONDS)
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # a request that was never read
            self._process.stdin.close()
        # Somebody else may still hold the other end; to close ours would wait for the reader.
        if not self._reader.is_alive():
            self._process.stdout.close()

    def _tail(self) -> str:
        text = self._stderr.read_text(encoding="utf-8", errors="replace").strip()
        return " | ".join(text.splitlines()[-5:])[-800:]


@contextlib.contextmanager
def _started(name: str, stderr: Path) -> Iterator[_Process]:
    # The current folder must not decide what is imported (ignored before Python 3.11).
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with stderr.open("wb") as errors_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "gnet_opt.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors_file,
            env=environment,
            encoding="utf-8",
            start_new_session=True,
        )
    worker = _Process(name, process, stderr)
    try:
        yield worker
    finally:
        worker.end()


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _as_error(kind: str, text: str) -> GnetOptError:
    """The worker's error again, as the same class."""
    found = getattr(errors, kind, BackendError)
    is_ours = isinstance(found, type) and issubclass(found, GnetOptError)
    return found(text) if is_ours else BackendError(text)
