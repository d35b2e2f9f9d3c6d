"""The control load: the same work every time, on as many threads as asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_info

from gnet_opt.bench import control


@pytest.fixture(autouse=True)
def _counted_anew() -> Iterator[None]:
    count = control._count
    count.cache_clear()
    yield
    count.cache_clear()


@pytest.mark.parametrize(("longest", "count"), [(1000.0, control.COUNT), (0.0, control.LEAST)])
def test_every_thread_times_its_own_work(
    monkeypatch: pytest.MonkeyPatch, longest: float, count: int
) -> None:
    """A small device, for which one piece is long, does fewer."""
    monkeypatch.setattr(control, "LONGEST", longest)
    for threads in (1, 3):
        times = control.times_ns(threads)
        assert len(times) == threads * count
        assert min(times) > 0


def test_a_process_does_it_always_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "LONGEST", 1000.0)
    assert len(control.times_ns(1)) == control.COUNT
    monkeypatch.setattr(control, "LONGEST", 0.0)
    assert len(control.times_ns(1)) == control.COUNT


def test_the_threads_of_the_machine_and_no_more_than_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control, "_timed", lambda count: [1])
    monkeypatch.setattr(control, "this_machine", lambda: SimpleNamespace(cores=2))
    assert control.times_ns(None) == [1, 1]
    assert control.times_ns(64) == [1] * control.MOST_THREADS


def test_blas_starts_no_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def pools(count: int) -> list[int]:
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    before = pools(0)
    monkeypatch.setattr(control, "_count", lambda: 1)
    monkeypatch.setattr(control, "_timed", pools)
    assert control.times_ns(2) == [1] * 2 * len(before)
    assert pools(0) == before


def test_an_unknown_blas_might_start_some(monkeypatch: pytest.MonkeyPatch) -> None:
    none = ThreadpoolController().select(user_api="nothing")
    monkeypatch.setattr(control, "_blas", lambda: none)
    assert control.times_ns(1) == []
    assert control.identity().endswith("unknown BLAS")


def test_where_no_thread_can_be_started_there_are_no_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(count: int, *, initializer: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(control, "ThreadPoolExecutor", refuse)
    assert control.times_ns(4) == []
    assert control.times_ns(1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's data")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limited_memory_is_left_to_the_model(limit: str) -> None:
    program = f"""
import resource
from gnet_opt.bench import control
assert control.times_ns(1)
resource.setrlimit(resource.{limit}, (1 << 40, 1 << 40))
print(control.times_ns(1))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_there_is_work_in_it() -> None:
    positions, weights = control._factors()
    assert positions.shape == (256, 768)
    assert weights.shape == (768, 768)
    for factor in (positions, weights):
        assert factor.dtype == np.float32
        assert np.isfinite(factor).all()
        # Numbers too small for a full mantissa take a CPU longer, and zeros may take it less.
        assert (abs(factor) < 1e-30).sum() <= 1
        assert len(np.unique(factor)) > factor.size / 10


def test_the_work_is_named() -> None:
    name = control.identity()
    assert name.startswith(f"256x768x768 float32, NumPy {np.__version__}, ")
    # Other libraries of this process may have one of their own.
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    assert pools
    for blas in pools:
        assert f"{blas['internal_api']} {blas['version']}" in name
