"""Processes in which one artifact is run: how they are started, asked and ended.

Thread pools of two runtimes in one process slow each other down by a factor of ten and more, and a
runtime that crashes takes its process with it. So whatever is timed or scored side by side runs in
a process of its own, `gnet_opt.bench.worker`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt import errors
from gnet_opt.errors import BackendError, GnetOptError
from gnet_opt.runtime import Artifact, ExecutedNode, FloatArray, Profile

TIMEOUT = 120.0
"""How long a worker may take for one answer, in seconds, unless more was asked of it."""

_READER_SECONDS = 5.0
"""How long to wait for the end of a killed worker's output."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Something to run.

    Attributes:
        name: What it is called in the result, `float` for example.
        artifact: What to load.
        resolve: Import string of a function from a backend's name to the backend, for the worker
            to call; `gnet_opt.backends:get` for the registered ones.
    """

    name: str
    artifact: Artifact
    resolve: str


class WorkerProcess:
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

    def load(
        self, subject: Subject, picture: Path, threads: int | None, timeout: float = TIMEOUT
    ) -> dict[str, Any]:
        """Load an artifact and run it once.

        Args:
            subject: What to load.
            picture: A .npy file with one or more pictures as the artifact takes them: float32 of
                shape (N, planes, height, width), or uint8 of shape (N, height, width, planes). The
                first of them is run.
            threads: CPU threads, or None for the runtime's own choice.
            timeout: Longest time to wait, in seconds.

        Returns:
            `load_ns` and `first_ns`, how long loading and the first run took.

        Raises:
            MissingDependencyError: The runtime is not installed.
            BackendError: The artifact cannot be loaded or run, or the process died.
        """
        return self.ask({"do": "load", **_named(subject, picture, threads)}, timeout)

    def profile(
        self,
        subject: Subject,
        picture: Path,
        threads: int | None,
        runs: int,
        timeout: float = TIMEOUT,
    ) -> Profile:
        """Tell what a backend executes of an artifact; nothing has to be loaded for it.

        Args:
            subject: What to profile.
            picture: As for `load`.
            threads: CPU threads, or None for the runtime's own choice.
            runs: How often to run it at least.
            timeout: Longest time to wait, in seconds.

        Raises:
            MissingDependencyError: The runtime is not installed.
            BackendError: The backend cannot tell, or the process died.
        """
        request = {"do": "profile", "runs": runs, **_named(subject, picture, threads)}
        found = self.ask(request, timeout)
        nodes = tuple(
            ExecutedNode(**{**node, "covers": tuple(node["covers"])}) for node in found["nodes"]
        )
        return Profile(**{**found, "nodes": nodes, "rounds": tuple(found["rounds"])})

    def run(self, pictures: Path, logits: Path, timeout: float = TIMEOUT) -> FloatArray:
        """Run what was loaded on single pictures, one after the other.

        Args:
            pictures: A .npy file, float32 of shape (N, planes, height, width), or uint8 of shape
                (N, height, width, planes).
            logits: A .npy file for the worker to write.
            timeout: Longest time to wait, in seconds.

        Returns:
            float32 of shape (N, classes).

        Raises:
            BackendError: The runtime failed, or the process died.
        """
        self.ask({"do": "run", "input": str(pictures), "output": str(logits)}, timeout)
        result: FloatArray = np.load(logits, allow_pickle=False)
        return result

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        self.send(request)
        return self.answer(str(request["do"]), timeout)

    def send(self, request: Mapping[str, Any]) -> None:
        """Send a request; `answer` has to be called for it before the next one."""
        assert self._process.stdin is not None
        # A worker that died cannot be written to; the missing answer says so below.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def answer(self, doing: str, timeout: float) -> dict[str, Any]:
        """Wait for the answer to the request that was sent.

        Args:
            doing: What was asked, for messages.
            timeout: Longest time to wait, in seconds.

        Raises:
            GnetOptError: What the worker raised, as the same class.
            BackendError: The process died or gave no answer in time.
        """
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise BackendError(
                f"The worker for {self._name} gave no answer to "
                f"{doing!r} within {timeout:.0f} s. Is the machine overloaded? Try again, "
                "or measure fewer threads."
            ) from None
        if line is None:
            code = self._process.wait()
            raise BackendError(
                f"The worker for {self._name} died during {doing!r} "
                f"({_exit(code)}). Its last words: {self._tail() or 'none'}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _as_error(answer["kind"], f"{self._name}: {answer['error']}")
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
        last = " | ".join(text.splitlines()[-5:])[-800:]
        # A runtime may colour what it prints; it is shown elsewhere, and stands in result files.
        return "".join(letter if letter.isprintable() else " " for letter in last)


@contextlib.contextmanager
def started(name: str, stderr: Path) -> Iterator[WorkerProcess]:
    """Start a worker, and end it whatever happens.

    Args:
        name: What it runs, for messages.
        stderr: A file for what it prints.
    """
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
    worker = WorkerProcess(name, process, stderr)
    try:
        yield worker
    finally:
        worker.end()


def _named(subject: Subject, picture: Path, threads: int | None) -> dict[str, Any]:
    """What a request says of the artifact and of how it is run."""
    artifact = subject.artifact
    return {
        "backend": artifact.backend,
        "files": [[kind, str(path.resolve())] for kind, path in artifact.files],
        "input": str(picture),
        "path": str(artifact.path.resolve()),
        "resolve": subject.resolve,
        "threads": threads,
    }


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _as_error(kind: str, text: str) -> GnetOptError:
    """The worker's error again, as the same class."""
    found = getattr(errors, kind, BackendError)
    is_ours = isinstance(found, type) and issubclass(found, GnetOptError)
    return found(text) if is_ours else BackendError(text)
