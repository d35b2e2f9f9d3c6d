"""A backend that runs another one and then idles for a share of the time that took.

`compare_repeats.py` measures with it whether `gnet-opt compare` finds a slow-down of a known size.
It is added as any package adds a backend: by an entry point, which `compare_repeats.py` writes into
a folder of its own.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gnet_opt import backends
from gnet_opt.progress import Progress, silent
from gnet_opt.runtime import Artifact, Deferred, FloatArray, Probe, Profile, Runner
from gnet_opt.target import Target

NAME = "slowed"
BACKEND = "GNET_OPT_SLOWED_BACKEND"
"""The variable with the name of the backend that really runs."""

SHARE = "GNET_OPT_SLOWED_SHARE"
"""The variable with the share of the time to add, such as 0.1."""


class SlowedBackend:
    """The backend that `BACKEND` names, slowed down by `SHARE`."""

    name = NAME
    extra = ""

    def __init__(self) -> None:
        self._backend = backends.get(os.environ[BACKEND])
        self._share = float(os.environ[SHARE])

    def probe(self) -> Probe:
        """As the real backend."""
        return self._backend.probe()

    def compile(self, model: Path, target: Target, out: Path) -> Artifact | Deferred:
        """As the real backend."""
        return replace(self._backend.compile(model, target, out), backend=NAME)

    @contextlib.contextmanager
    def open(self, artifact: Artifact, *, threads: int | None = None) -> Iterator[Runner]:
        """Load the real backend's artifact."""
        real = replace(artifact, backend=self._backend.name)
        with self._backend.open(real, threads=threads) as runner:
            yield _SlowedRunner(runner, self._share)

    def profile(
        self,
        artifact: Artifact,
        batch: FloatArray,
        *,
        threads: int | None = None,
        runs: int = 100,
        progress: Progress = silent,
    ) -> Profile:
        """As the real backend."""
        real = replace(artifact, backend=self._backend.name)
        return self._backend.profile(real, batch, threads=threads, runs=runs, progress=progress)

    def artifact(self, folder: Path) -> Artifact:
        """As the real backend."""
        return replace(self._backend.artifact(folder), backend=NAME)


class _SlowedRunner:
    def __init__(self, runner: Runner, share: float) -> None:
        self._runner = runner
        self._share = share

    def run(self, batch: FloatArray) -> FloatArray:
        """Compute, then let the added time pass; sleeping is not exact enough for it."""
        start = time.perf_counter_ns()
        logits = self._runner.run(batch)
        end = time.perf_counter_ns()
        until = end + self._share * (end - start)
        while time.perf_counter_ns() < until:
            pass
        return logits
