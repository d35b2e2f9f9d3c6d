"""Python on a foreign CPU, in processes that end with the block that started them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from foreign_cpus import Cpu
from gnet_opt.runtime import FloatArray

CHUNK = 20
"""Pictures that one process does; what an interrupted run loses at most."""

NEWS = 20.0
"""Seconds between two progress lines."""

PATIENCE = 3600.0
"""Seconds after which an emulated process counts as hung."""


class FailedError(Exception):
    """A process on a foreign CPU failed; the message has its last words and its log's path."""


class Children:
    """Processes that end when the block does, whatever ends it."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            process.kill()
        for process in self._running:
            process.wait()

    def start(self, cpu: Cpu, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start Python on a CPU; what it says goes to `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream:
            process = subprocess.Popen(
                (*cpu.python, *arguments),
                env=dict(cpu.environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        self._running.append(process)
        return process

    def ended(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether a process has ended; afterwards it is not looked after any more."""
        if process.poll() is None:
            return False
        self._running.remove(process)
        return True


def run_python(cpu: Cpu, arguments: Sequence[str], log: Path) -> tuple[int, str]:
    """Run Python on a CPU to its end.

    Returns:
        Its exit code, and what it printed to both of its streams.

    Raises:
        FailedError: It did not end in `PATIENCE`.
    """
    with Children() as children:
        process = children.start(cpu, arguments, log)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise FailedError(f"It did not end in {PATIENCE:.0f} s on {cpu.name}: {log}") from error
        children.ended(process)
    return process.returncode, log.read_text(encoding="utf-8", errors="replace")


def check_python(cpu: Cpu, arguments: Sequence[str], log: Path) -> None:
    """Run Python on a CPU to its end, which must be a good one.

    Raises:
        FailedError: It failed, or did not end in `PATIENCE`.
    """
    code, _ = run_python(cpu, arguments, log)
    if code:
        raise FailedError(failure(cpu.name, code, log))


def chunks(count: int, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Cut `count` pictures into pieces: (first, behind the last)."""
    for first in range(0, count, size):
        yield first, min(first + size, count)


def run_chunks(
    cpu: Cpu,
    command: Mapping[tuple[int, int], Sequence[str]],
    files: Mapping[tuple[int, int], Path],
    *,
    jobs: int,
    label: str,
) -> FloatArray:
    """Run the pieces of a long job that are not done yet, a process each.

    Args:
        cpu: The CPU.
        command: By piece, the arguments of Python that make its file.
        files: By piece, the `.npy` file, which appears when it is complete.
        jobs: Processes at once.
        label: For the progress lines.

    Returns:
        The arrays of all files, one after the other along the first axis.

    Raises:
        FailedError: A process failed or hung.
    """
    count = sum(last - first for first, last in files)
    waiting = [piece for piece, file in files.items() if not file.is_file()]
    done = count - sum(last - first for first, last in waiting)
    running: dict[tuple[int, int], tuple[subprocess.Popen[bytes], float]] = {}
    told = time.monotonic()
    with Children() as children:
        while waiting or running:
            while waiting and len(running) < jobs:
                piece = waiting.pop(0)
                log = files[piece].with_suffix(".log")
                running[piece] = children.start(cpu, command[piece], log), time.monotonic()
            for piece, (process, since) in list(running.items()):
                log = files[piece].with_suffix(".log")
                if children.ended(process):
                    del running[piece]
                    if process.returncode:
                        raise FailedError(failure(label, process.returncode, log))
                    done += piece[1] - piece[0]
                    if done == count or time.monotonic() - told > NEWS:
                        print(f"{label}: {done} of {count} pictures", flush=True)
                        told = time.monotonic()
                elif time.monotonic() - since > PATIENCE:
                    raise FailedError(f"{label}: a process did not end in {PATIENCE:.0f} s: {log}")
            time.sleep(0.1)
    return np.concatenate([np.load(file) for file in files.values()])


def failure(label: str, code: int, log: Path) -> str:
    """What a process that failed said last, and where the rest is."""
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = said[-1] if said else "it said nothing"
    return f"{label}: the process ended with code {code} ({last}). The whole log: {log}"
