"""The process in which one artifact is timed or scored: JSON lines in, JSON lines out.

Run as `python -m gnet_opt.bench.worker` by `gnet_opt.bench.process`. Requests, one a line:

    {"do": "load", "resolve": "module:function", "backend": NAME, "path": FILE,
     "files": [[KIND, FILE], ...], "threads": N or null, "input": FILE.npy}
    {"do": "warm", "seconds": LIMIT}
    {"do": "measure", "seconds": S, "count": N}
    {"do": "run", "input": FILE.npy, "output": FILE.npy}

Each gets one line: what was asked for, or {"error": TEXT}. The end of the input ends the process.
Nothing runs while it waits for a line.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from gnet_opt.errors import BackendError, GnetOptError
from gnet_opt.runtime import Artifact, Backend, FloatArray, Runner, run_all

_WINDOW = 5
_STEADY = 0.03


class _Worker:
    """What is loaded, and what can be asked of it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._runner: Runner | None = None
        self._batch: FloatArray = np.empty((0,), np.float32)

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Open the artifact and compute the first result."""
        self._batch = np.load(request["input"], allow_pickle=False)
        artifact = Artifact(
            backend=request["backend"],
            path=Path(request["path"]),
            files=tuple((kind, Path(path)) for kind, path in request["files"]),
        )
        started = time.perf_counter_ns()
        module, _, name = request["resolve"].partition(":")
        backend: Backend = getattr(importlib.import_module(module), name)(artifact.backend)
        opened = backend.open(artifact, threads=request["threads"])
        self._runner = self._stack.enter_context(opened)
        loaded = time.perf_counter_ns()
        self._runner.run(self._batch)
        first = time.perf_counter_ns()
        return {"load_ns": loaded - started, "first_ns": first - loaded}

    def warm(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run until two windows in a row have the same median within 3 %, or time is up."""
        deadline = time.perf_counter_ns() + int(request["seconds"] * 1e9)
        count, before, steady = 0, 0.0, False
        while not steady and time.perf_counter_ns() < deadline:
            now = statistics.median(self._timed() for _ in range(_WINDOW))
            steady = abs(now - before) <= _STEADY * now
            before = now
            count += _WINDOW
        return {"count": count, "steady": steady}

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run back to back, for at least so long and at least so often."""
        samples: list[int] = []
        gc.collect()
        gc.disable()
        try:
            end = time.perf_counter_ns() + int(request["seconds"] * 1e9)
            while len(samples) < request["count"] or time.perf_counter_ns() < end:
                samples.append(self._timed())
        finally:
            gc.enable()
        return {"samples_ns": samples, "peak_rss_bytes": peak_rss()}

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run single pictures and save their logits."""
        runner = self._loaded()
        pictures: FloatArray = np.load(request["input"], allow_pickle=False)
        logits = run_all(runner, pictures)
        np.save(request["output"], logits)
        return {"count": len(logits)}

    def _timed(self) -> int:
        runner = self._loaded()
        started = time.perf_counter_ns()
        runner.run(self._batch)
        return time.perf_counter_ns() - started

    def _loaded(self) -> Runner:
        if self._runner is None:
            raise BackendError("The worker was asked to run before it loaded an artifact.")
        return self._runner


def peak_rss() -> int | None:
    """The most memory that this process has had in RAM, in bytes; None where it is not known."""
    # Linux keeps ru_maxrss over exec, so a child would report its parent's peak; VmHWM is its own.
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until they end."""
    with ExitStack() as stack:
        worker = _Worker(stack)
        actions = {
            "load": worker.load,
            "measure": worker.measure,
            "run": worker.run,
            "warm": worker.warm,
        }
        for line in requests:
            request = json.loads(line)
            try:
                answer = actions[request["do"]](request)
            except GnetOptError as error:
                answer = {"error": str(error), "kind": type(error).__name__}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def main() -> None:
    """Serve on stdin and stdout."""
    # Ctrl-C reaches every process of the terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A runtime may print: what it writes to stdout goes to stderr, and answers to the real stdout.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
