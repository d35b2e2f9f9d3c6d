"""The parts of `benchmarks/compare_repeats.py`: the planted slow-down is what it says."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gnet_opt import backends
from gnet_opt.runtime import Artifact, FloatArray

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def repeats(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("compare_repeats")


class Sleeper:
    """A backend that takes ten milliseconds a picture."""

    name = "sleeper"

    @contextlib.contextmanager
    def open(self, artifact: Artifact, *, threads: int | None = None) -> Iterator[Sleeper]:
        assert artifact.backend == self.name
        yield self

    def run(self, batch: FloatArray) -> FloatArray:
        time.sleep(0.01)
        return 2 * batch


def test_the_slowed_backend_adds_its_share(
    repeats: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed = repeats.slowed_backend
    monkeypatch.setenv(slowed.BACKEND, "sleeper")
    monkeypatch.setenv(slowed.SHARE, "3")
    monkeypatch.setattr(backends, "get", {"sleeper": Sleeper()}.get)
    batch = np.ones((1, 3, 2, 2), np.float32)
    artifact = Artifact(backend=slowed.NAME, path=Path("model"), files=())
    with slowed.SlowedBackend().open(artifact) as runner:
        start = time.perf_counter()
        logits = runner.run(batch)
        took = time.perf_counter() - start
    assert (logits == 2 * batch).all()
    assert took >= 0.04


def test_the_command_finds_it_as_that_of_any_package(repeats: ModuleType, tmp_path: Path) -> None:
    variables = repeats.plugin(tmp_path, "onnxruntime", 0.1)
    code = "from gnet_opt import backends; b = backends.get('slowed'); print(b.name, b._share)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("slowed 0.1\n", "")
