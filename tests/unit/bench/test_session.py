"""A run with fake runtimes in real processes."""

from __future__ import annotations

import functools
import math
import os
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gnet_opt.bench import session
from gnet_opt.bench.limits import Constraint
from gnet_opt.bench.power import Rail, Rails, measure_energy
from gnet_opt.bench.process import Subject
from gnet_opt.bench.results import Offline, Server, Stream
from gnet_opt.bench.session import Entry, Plan, measure
from gnet_opt.bench.sweep import Setting, settings, sweep
from gnet_opt.errors import BackendError, ConfigError, MissingDependencyError
from gnet_opt.preprocess import Preprocess
from gnet_opt.runtime import Artifact, ExecutedNode

FAKE = """
import contextlib, os, time
import numpy as np
from gnet_opt.errors import MissingDependencyError
from gnet_opt.runtime import ExecutedNode, Profile

MS = {"slow": 6, "fast": 2}

class Runner:
    def __init__(self, path): self.path = path
    def run(self, batch):
        with open(self.path.parent / "log", "a") as log:
            log.write(f"{self.path.name} {len(batch)} {os.getpid()}\\n")
        if self.path.name == "wide" and len(batch) > 1:
            self.scratch = bytearray(200_000_000)
        time.sleep(MS.get(self.path.name, 0) / 1e3)
        return batch.reshape(len(batch), -1)

class Gpu(Runner):
    def run(self, batch):
        self.device_ns = 1_000_000 + len(batch)
        return super().run(batch)

class Fake:
    name = "fake"
    @contextlib.contextmanager
    def open(self, artifact, *, threads=None):
        if artifact.path.name == "missing":
            raise MissingDependencyError("no runtime here")
        if artifact.path.name == "large":
            self.kept = bytearray(500_000_000)
        (artifact.path.parent / "threads").write_text(str(threads))
        (artifact.path.parent / "cpus").write_text(str(sorted(os.sched_getaffinity(0))))
        yield (Gpu if artifact.path.name == "gpu" else Runner)(artifact.path)
    def profile(self, artifact, batch, *, threads=None, runs=100):
        node = ExecutedNode(name="conv", operator="Conv", kind="layer", precision="u8",
                            microseconds=3.5, covers=("a", "b"))
        assert batch.shape == (1, 3, 8, 8)
        return Profile(backend="fake", version="1", threads=threads, runs=runs, nodes=(node,),
                       rounds=(3.5, 3.6))

def get(name):
    assert name == "fake"
    return Fake()
"""
PREPROCESS = Preprocess(resize=8, crop=8)
QUICK = Plan(rounds=3, seconds=0.02, count=2, warm_up=0.2, timeout=20)
ALL = ("single-stream", "multi-stream", "offline", "server")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fake_runtimes.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


def entry(folder: Path, kind: str, batch: int = 1) -> Entry:
    path = folder / kind
    files = (folder / "0.jpg", folder / "1.png")
    for file in files:
        Image.new("RGB", (12, 10), (200, 100, 50)).save(file)
    return Entry(
        subject=Subject(
            name=kind,
            artifact=Artifact(backend="fake", path=path, files=(("fake", path),)),
            resolve="fake_runtimes:get",
        ),
        pictures=np.arange(4 * 3 * 8 * 8, dtype=np.float32).reshape(4, 3, 8, 8),
        preprocess=PREPROCESS,
        files=files,
        source="two pictures",
        batch=batch,
    )


def log(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "log").read_text().splitlines()]


def test_the_time_on_a_device_of_its_own_stands_beside(folder: Path) -> None:
    plan = replace(QUICK, scenarios=ALL[:2])
    gpu, fast = measure([entry(folder, "gpu"), entry(folder, "fast")], plan)
    single = gpu.scenarios["single-stream"].to_dict()
    assert single["device_p50_ms"] == 1.000001
    for found in single["rounds"]:
        assert found["device_ns"] == [1_000_001] * len(found["samples_ns"])
    assert "device_p50_ms" not in gpu.scenarios["multi-stream"].to_dict()
    assert "device_p50_ms" not in fast.scenarios["single-stream"].to_dict()


def test_the_control_load_is_timed_beside_every_turn(folder: Path) -> None:
    noting = "from gnet_opt.bench import control; control.times_ns = lambda threads: [threads]\n"
    (folder / "fake_runtimes.py").write_text(noting + textwrap.dedent(FAKE))
    plan = replace(QUICK, scenarios=ALL, threads=2)
    (found,) = measure([entry(folder, "fast")], plan)
    for name in ALL[:3]:
        rounds = found.scenarios[name].to_dict()["rounds"]
        assert len(rounds) == plan.rounds
        for each in rounds:
            # Before the turn and after it, on as many threads as the artifact.
            assert each["control_ns"] == [2, 2]
    assert "control_ns" not in found.scenarios["server"].to_dict()["rounds"][0]


@pytest.mark.parametrize(("scenario", "wide"), [("single-stream", False), ("offline", True)])
def test_memory_is_what_pictures_at_a_time_take(folder: Path, scenario: str, wide: bool) -> None:
    plan = replace(QUICK, rounds=1, scenarios=(scenario,))
    (found,) = measure([entry(folder, "wide", batch=8)], plan)
    if found.peak_rss_bytes is None:
        pytest.skip("this system does not tell it")
    assert (found.peak_rss_bytes > 200e6) == wide


def test_the_control_load_is_not_in_the_memory(
    folder: Path,
) -> None:
    heavy = """
from gnet_opt.bench import control
control.times_ns = lambda threads: [bytearray(300_000_000)[0] + 1]
"""
    (folder / "fake_runtimes.py").write_text(heavy + textwrap.dedent(FAKE))
    (found,) = measure([entry(folder, "fast")], QUICK)
    assert found.scenarios["single-stream"].to_dict()["rounds"][0]["control_ns"] == [1, 1]
    assert found.peak_rss_bytes is None or found.peak_rss_bytes < 200e6


def test_energy_is_what_the_machine_takes_above_doing_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_ENERGY_SECONDS", 0.6)
    quick = functools.partial(measure_energy, idle_seconds=0.3, interval=0.02)
    monkeypatch.setattr(session, "measure_energy", quick)
    busy = folder / "log"

    def watts() -> float:
        """Two while nothing was computed for the tenth of a second, else five."""
        return 5.0 if time.time() - busy.stat().st_mtime < 0.1 else 2.0

    rail = Rail(name="module", source="a fake", read=watts, in_total=True)
    rails = Rails(rails=(rail,), covers="everything")
    (slow,) = measure([entry(folder, "slow")], QUICK, rails=rails)
    assert slow.energy is not None
    assert slow.energy["note"].startswith("The total is module: everything.")
    (found,) = slow.energy["rails"]
    assert 2.0 <= found["idle_watts"] < 3.5 < found["busy_watts"] <= 5.0
    # three watts for six milliseconds and a little more
    assert 0.5 * 3.0 * 6e-3 < slow.energy["joules_per_inference"] < 3 * 3.0 * 6e-3


def test_without_a_counter_nothing_is_run_for_energy(folder: Path) -> None:
    (fast,) = measure([entry(folder, "fast")], QUICK, rails=Rails(notes=("Nothing here.",)))
    assert fast.energy == {"joules_per_inference": None, "note": "Nothing here.", "rails": []}


def test_a_sustained_run_of_each(folder: Path) -> None:
    plan = replace(QUICK, soak=2.0)
    for one in measure([entry(folder, "slow"), entry(folder, "fast")], plan):
        assert one.soak is not None
        assert len(one.soak["bins"]) == 2
        assert 2.0 <= one.soak["seconds"] < 4.0
        assert "too short to tell" in one.soak["verdict"]
    assert all(one.soak is None for one in measure([entry(folder, "fast")], QUICK))


def test_all_scenarios_side_by_side(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_QUERIES", 25)
    shown = []

    def progress(items, label, total=None):  # type: ignore[no-untyped-def]
        shown.append((label, total))
        yield from items

    plan = replace(QUICK, scenarios=ALL, seconds=0.01)
    slow, fast = measure([entry(folder, "slow"), entry(folder, "fast")], plan, progress)
    # three rounds of start, warm-up, three scenarios and the end-to-end; six rates, energy
    assert shown == [("Measuring", 2 * (3 * (2 + 3 + 1) + 6 + 1))]
    for one, least in ((slow, 6e6), (fast, 2e6)):
        assert list(one.scenarios) == list(ALL)
        single, multi = one.scenarios["single-stream"], one.scenarios["multi-stream"]
        offline, server = one.scenarios["offline"], one.scenarios["server"]
        assert isinstance(single, Stream) and isinstance(multi, Stream)
        assert isinstance(offline, Offline) and isinstance(server, Server)
        assert len(single.rounds) == len(multi.rounds) == len(offline.rounds) == 3
        assert all(len(samples) >= 2 for samples in (*single.rounds, *multi.rounds))
        assert min(single.samples_ns) >= least
        assert min(multi.samples_ns) >= 8 * least
        assert max(offline.rates) <= 1e9 / least
        assert len(server.rounds) == 6
        assert server.bound_ms >= 4 * 6  # of the slowest, the same for both
        assert all(trial.offered_qps < 1e9 / least for trial in server.rounds)
        assert len(one.cold_start_ms) == len(one.load_ms) == len(one.first_ms) == 3
        assert min(one.cold_start_ms) > max(one.load_ms) + least / 1e6
        assert one.warm_up["count"] >= 3 * 20 and one.warm_up["seconds"] > 0
        assert one.peak_rss_bytes is None or 5e6 < one.peak_rss_bytes < 200e6
        assert one.end_to_end is not None
        assert (one.end_to_end["pictures"], one.end_to_end["source"]) == (6, "two pictures")
        for step in ("decode_ns", "resize_ns", "normalize_ns", "infer_ns"):
            assert len(one.end_to_end[step]) == 6 and min(one.end_to_end[step]) > 0
        assert min(one.end_to_end["infer_ns"]) >= least
    assert {size for _, size, _ in log(folder)} == {"1"}
    # Each subject had a process of its own in each round.
    pids = {
        kind: {pid for name, _, pid in log(folder) if name == kind} for kind in ("slow", "fast")
    }
    assert [len(found) for found in pids.values()] == [3, 3]
    assert not pids["slow"] & pids["fast"]
    for pid in pids["slow"] | pids["fast"]:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_a_model_of_any_batch_gets_eight_pictures_at_a_time(folder: Path) -> None:
    plan = replace(QUICK, scenarios=("multi-stream", "offline"), rounds=1)
    (found,) = measure([entry(folder, "fast", batch=8)], plan)
    assert list(found.scenarios) == ["multi-stream", "offline"]
    assert all(scenario.to_dict()["batch"] == 8 for scenario in found.scenarios.values())
    offline = found.scenarios["offline"]
    assert isinstance(offline, Offline) and offline.rounds[0][0] % 8 == 0
    assert {size for _, size, _ in log(folder)} == {"1", "8"}


def test_a_bound_that_nothing_meets(folder: Path) -> None:
    plan = replace(QUICK, scenarios=("server",), latency_bound_ms=0.5)
    (found,) = measure([entry(folder, "fast")], plan)
    server = found.scenarios["server"]
    assert isinstance(server, Server)
    assert list(found.scenarios) == ["server"]  # single-stream was run, not asked for
    assert (server.best, server.bound_ms) == (None, 0.5)
    rates = [trial.offered_qps for trial in server.rounds]
    assert rates == sorted(rates, reverse=True)


def test_turns_have_an_order_by_chance_that_the_seed_repeats(folder: Path) -> None:
    def order(seed: int) -> list[tuple[str, str]]:
        (folder / "log").unlink(missing_ok=True)
        plan = replace(QUICK, rounds=6, seconds=0.0, count=1, seed=seed)
        measure([entry(folder, kind) for kind in ("a", "b", "c")], plan)
        # A process begins to compute in its turn to start.
        return list(dict.fromkeys((pid, name) for name, _, pid in log(folder)))

    def names(found: list[tuple[str, str]]) -> list[str]:
        return [name for _, name in found]

    first = names(order(1))
    assert first == names(order(1)) != names(order(2))
    assert len(first) == 3 * 6
    turns = [tuple(first[i : i + 3]) for i in range(0, len(first), 3)]
    assert {tuple(sorted(turn)) for turn in turns} == {("a", "b", "c")}
    assert len(set(turns)) > 2


def test_a_constraint_reaches_the_process(folder: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    plan = replace(QUICK, threads=1, constraint=Constraint(cpus=(cpu,), memory_bytes=10**9))
    measure([entry(folder, "fast")], plan)
    assert (folder / "cpus").read_text() == f"[{cpu}]"
    assert (folder / "threads").read_text() == "1"
    assert len(os.sched_getaffinity(0)) >= 1  # this process is as it was


def test_too_little_memory_is_said(folder: Path) -> None:
    plan = replace(QUICK, constraint=Constraint(memory_bytes=300 * 2**20))
    measure([entry(folder, "fast")], plan)
    with pytest.raises(
        BackendError,
        match=r"^large: There is not enough memory\. Its memory is limited to 300 MiB; if that is "
        r"the cause, allow more with --memory\.$",
    ):
        measure([entry(folder, "large")], plan)


def test_a_missing_runtime_keeps_its_class(folder: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"^missing: no runtime here$"):
        measure([entry(folder, "fast"), entry(folder, "missing")], QUICK)


def test_an_interrupt_ends_the_workers(folder: Path) -> None:
    def interrupted(items, label, total=None) -> Iterator[object]:  # type: ignore[no-untyped-def]
        for index, item in enumerate(items):
            if index == 5:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        measure([entry(folder, "fast"), entry(folder, "slow")], QUICK, interrupted)
    time.sleep(0.1)
    for _, _, pid in log(folder):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_a_profile_is_told_by_a_process_of_its_own(folder: Path) -> None:
    found = session.profile(entry(folder, "fast"), replace(QUICK, threads=2))
    assert (found.backend, found.version, found.threads, found.rounds) == (
        "fake",
        "1",
        2,
        (3.5, 3.6),
    )
    assert found.nodes == (
        ExecutedNode(
            name="conv",
            operator="Conv",
            kind="layer",
            precision="u8",
            microseconds=3.5,
            covers=("a", "b"),
        ),
    )


def test_what_a_sweep_tries() -> None:
    def tried(cpus: int, batch: int) -> list[tuple[int, int, int]]:
        return [(s.threads, s.streams, s.batch) for s in settings(cpus, batch)]

    assert tried(1, 1) == [(1, 1, 1)]
    assert tried(2, 1) == [(1, 1, 1), (1, 2, 1), (2, 1, 1)]
    assert tried(6, 1) == [(1, 1, 1), (1, 6, 1), (2, 1, 1), (2, 3, 1), (4, 1, 1), (6, 1, 1)]
    assert tried(1, 8) == [(1, 1, 1), (1, 1, 8)]
    assert all(s.threads * s.streams <= 12 for s in settings(12, 1))


def test_a_sweep(folder: Path) -> None:
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    if len(cpus) < 2:
        pytest.skip("two streams need two CPUs")
    plan = replace(QUICK, rounds=2, constraint=Constraint(cpus=cpus[:2]), count=10)
    found = sweep(entry(folder, "slow"), plan)
    rows = {(row["threads"], row["streams"]): row for row in found["settings"]}
    assert set(rows) == {(1, 1), (1, 2), (2, 1)}
    assert all(len(row["pictures_per_second"]) == 2 for row in rows.values())
    assert [len(row["p90_ms"]) for row in rows.values()] == [2, 0, 2]
    # What sleeps is twice as fast in two processes, on however busy a machine.
    best = found["best"]["throughput"]
    assert (best["threads"], best["streams"], best["batch"]) == (1, 2, 1)
    assert found["best"]["latency"]["streams"] == 1
    assert found["best"]["latency"]["p90_ms"] >= 6
    assert Setting(threads=1, streams=2, batch=1).to_dict() in [
        {key: row[key] for key in ("threads", "streams", "batch")} for row in found["settings"]
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"count": 0},
        {"seconds": -1.0},
        {"scenarios": ()},
        {"seconds": math.nan},
        {"soak": math.inf},
        {"latency_bound_ms": math.inf},
        {"latency_bound_ms": math.nan},
    ],
)
def test_plans_that_make_no_sense(wrong: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(ConfigError, match="A measurement needs at least one"):
        Plan(**wrong)
