"""The process in which one artifact is timed or scored: JSON lines in, JSON lines out.

Run as `python -m gnet_opt.bench.worker` by `gnet_opt.bench.process`. Requests, one a line:

    {"do": "limit", "cpus": [N, ...] or null, "memory_bytes": N or null}
    {"do": "load", "resolve": "module:function", "backend": NAME, "path": FILE,
     "files": [[KIND, FILE], ...], "threads": N or null, "input": FILE.npy}
    {"do": "warm", "seconds": LIMIT, "batch": N}
    {"do": "measure", "seconds": S, "count": N, "pictures": N, "batch": N, "control": BOOL}
    {"do": "offline", "seconds": S, "count": N, "batch": N, "control": BOOL}
    {"do": "serve", "rate": QUERIES A SECOND, "count": N, "bound_ns": N, "seed": N}
    {"do": "end-to-end", "files": [FILE, ...], "preprocess": TABLE}
    {"do": "profile", ... as load ..., "runs": N}
    {"do": "run", "input": FILE.npy, "output": FILE.npy}

A query of `measure` is `pictures` pictures, computed `batch` at a time; both are 1 by default, as
is `batch` of `warm`. With `control` the load of `gnet_opt.bench.control` is timed before and after,
on as many threads as the artifact was loaded for. It takes memory, too: where it is asked for, the
`peak_rss_bytes` of `warm` is the model's own. Each request gets one line: what was asked for, or
{"error": TEXT}. The end of the input ends the process. Nothing runs while it waits for a line.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from gnet_opt.bench import control, scenarios
from gnet_opt.bench.limits import Constraint
from gnet_opt.errors import BackendError, GnetOptError
from gnet_opt.runtime import Artifact, Backend, InputArray, Runner, run_all


class _Worker:
    """What is loaded, and what can be asked of it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._runner: Runner | None = None
        self._threads: int | None = None
        self._pictures: InputArray = np.empty((0,), np.float32)

    def limit(self, request: dict[str, Any]) -> dict[str, Any]:
        """Put this process under a constraint, before it loads anything."""
        Constraint.from_dict(request).apply()
        return {}

    def load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Open the artifact and compute the first result."""
        self._pictures = np.load(request["input"], allow_pickle=False)
        started = time.perf_counter_ns()
        backend, artifact = _resolved(request)
        self._threads = request["threads"]
        opened = backend.open(artifact, threads=self._threads)
        self._runner = self._stack.enter_context(opened)
        loaded = time.perf_counter_ns()
        self._runner.run(self._pictures[:1])
        first = time.perf_counter_ns()
        return {"load_ns": loaded - started, "first_ns": first - loaded}

    def warm(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run until times are steady, or time is up; first `batch` at once, for their memory."""
        started = time.perf_counter_ns()
        batch = request.get("batch", 1)
        if batch > 1:
            self._query(batch, batch)()
        warm = scenarios.warm_up(self._query(1, 1), seconds=request["seconds"])
        return {
            "count": len(warm.samples_ns),
            "peak_rss_bytes": peak_rss(),
            "seconds": (time.perf_counter_ns() - started) / 1e9,
            "steady": warm.steady,
        }

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run queries back to back, for at least so long and at least so often."""
        query = self._query(request.get("pictures", 1), request.get("batch", 1))
        before = self._control(request, query)
        device: list[int] = []
        if hasattr(self._loaded(), "device_ns") and request.get("pictures", 1) == 1:
            query = self._noting(query, device)
        samples = scenarios.back_to_back(query, seconds=request["seconds"], count=request["count"])
        return {
            "control_ns": before + self._control(request),
            "device_ns": device,
            "peak_rss_bytes": peak_rss(),
            "samples_ns": samples,
        }

    def offline(self, request: dict[str, Any]) -> dict[str, Any]:
        """Compute pictures for at least so long, and read the time as a whole."""
        batch = request["batch"]
        query = self._query(batch, batch)
        before = self._control(request, query)
        done, elapsed = scenarios.throughput(
            query, seconds=request["seconds"], count=request["count"]
        )
        return {
            "control_ns": before + self._control(request),
            "elapsed_ns": elapsed,
            "pictures": done * batch,
        }

    def serve(self, request: dict[str, Any]) -> dict[str, Any]:
        """Serve single pictures that arrive by chance."""
        served = scenarios.serve(
            self._query(1, 1),
            rate=request["rate"],
            count=request["count"],
            bound_ns=request["bound_ns"],
            seed=request["seed"],
        )
        return dataclasses.asdict(served)

    def end_to_end(self, request: dict[str, Any]) -> dict[str, Any]:
        """Go from the bytes of each picture file to logits, and time every step."""
        from gnet_opt.pictures import open_picture
        from gnet_opt.preprocess import Preprocess

        runner = self._loaded()
        preprocess = Preprocess.from_dict(request["preprocess"])
        clock = time.perf_counter_ns
        times: dict[str, list[int]] = {
            "decode_ns": [],
            "infer_ns": [],
            "normalize_ns": [],
            "resize_ns": [],
        }
        for name in request["files"]:
            path = Path(name)
            content = path.read_bytes()
            started = clock()
            with open_picture(path, content) as image:
                picture = preprocess.decode(image)
                decoded = clock()
                pixels = preprocess.fit(picture)
                resized = clock()
            batch = preprocess.tensor(pixels)[None]
            normalized = clock()
            runner.run(batch)
            finished = clock()
            times["decode_ns"].append(decoded - started)
            times["resize_ns"].append(resized - decoded)
            times["normalize_ns"].append(normalized - resized)
            times["infer_ns"].append(finished - normalized)
        return times

    def profile(self, request: dict[str, Any]) -> dict[str, Any]:
        """Tell what the runtime executes, see `gnet_opt.runtime.Backend.profile`."""
        backend, artifact = _resolved(request)
        picture: InputArray = np.load(request["input"], allow_pickle=False)[:1]
        found = backend.profile(artifact, picture, threads=request["threads"], runs=request["runs"])
        return dataclasses.asdict(found)

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run single pictures and save their logits."""
        runner = self._loaded()
        pictures: InputArray = np.load(request["input"], allow_pickle=False)
        logits = run_all(runner, pictures)
        np.save(request["output"], logits)
        return {"count": len(logits)}

    def _control(self, request: dict[str, Any], query: scenarios.Run | None = None) -> list[int]:
        """Times of the control load, where they are asked for.

        Args:
            request: That of the turn.
            query: What comes next; it is run once, as it finds the caches full of something else.
        """
        if not request.get("control"):
            return []
        times = control.times_ns(self._threads)
        if times and query is not None:
            query()
        return times

    def _query(self, pictures: int, batch: int) -> scenarios.Run:
        """What computes so many pictures, `batch` at a time, other ones as far as there are."""
        runner = self._loaded()
        chosen = np.stack(list(islice(cycle(self._pictures), pictures)))
        batches = [chosen[first : first + batch] for first in range(0, pictures, batch)]
        if len(batches) == 1:
            (only,) = batches
            return lambda: runner.run(only)

        def query() -> None:
            for part in batches:
                runner.run(part)

        return query

    def _noting(self, query: scenarios.Run, device: list[int]) -> scenarios.Run:
        """The query, which also notes what the device itself tells of it."""
        runner: Any = self._loaded()

        def noting() -> None:
            query()
            device.append(runner.device_ns)

        return noting

    def _loaded(self) -> Runner:
        if self._runner is None:
            raise BackendError("The worker was asked to run before it loaded an artifact.")
        return self._runner


def _resolved(request: dict[str, Any]) -> tuple[Backend, Artifact]:
    """The backend and the artifact that a request names."""
    artifact = Artifact(
        backend=request["backend"],
        path=Path(request["path"]),
        files=tuple((kind, Path(path)) for kind, path in request["files"]),
    )
    module, _, name = request["resolve"].partition(":")
    return getattr(importlib.import_module(module), name)(artifact.backend), artifact


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
            "end-to-end": worker.end_to_end,
            "limit": worker.limit,
            "load": worker.load,
            "measure": worker.measure,
            "offline": worker.offline,
            "profile": worker.profile,
            "run": worker.run,
            "serve": worker.serve,
            "warm": worker.warm,
        }
        for line in requests:
            request = json.loads(line)
            try:
                answer = actions[request["do"]](request)
            except GnetOptError as error:
                answer = {"error": str(error), "kind": type(error).__name__}
            except MemoryError:
                answer = {"error": "There is not enough memory.", "kind": "BackendError"}
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
