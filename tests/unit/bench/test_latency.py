from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from gnet_opt.bench.figures import Speedup, median_interval, percentile_ms, spread
from gnet_opt.bench.latency import LatencyReport, measure
from gnet_opt.bench.process import Subject
from gnet_opt.bench.session import Plan
from gnet_opt.errors import BackendError, MissingDependencyError
from gnet_opt.files import dump_json
from gnet_opt.runtime import Artifact
from latencies import made_up

PICTURE = np.zeros((1, 3, 8, 8), np.float32)
QUICK = Plan(rounds=3, seconds=0.02, count=4, warm_up=0.1, threads=1, control=False, timeout=20)

FAKE = """
import contextlib, os, sys, time
import numpy as np
from gnet_opt.errors import MissingDependencyError

class Runner:
    def __init__(self, path): self.path = path
    def run(self, batch):
        kind = self.path.name
        if kind == "dies": os._exit(9)
        if kind == "raises": raise RuntimeError("boom")
        if kind == "hangs": time.sleep(60)
        time.sleep({"slow": 0.008, "fast": 0.002}.get(kind, 0))
        with open(self.path.parent / "turns", "a") as turns: turns.write(kind + "\\n")
        return batch.reshape(1, -1)

class Fake:
    name = "fake"
    @contextlib.contextmanager
    def open(self, artifact, *, threads=None):
        print("a runtime that prints to stdout", flush=True)
        os.write(1, b"even below Python\\n")
        if artifact.path.name == "missing":
            raise MissingDependencyError("no runtime here")
        if artifact.path.name == "dies":
            print("the last words", file=sys.stderr, flush=True)
        (artifact.path.parent / f"pid-{artifact.path.name}").write_text(str(os.getpid()))
        if artifact.path.name == "forks" and os.fork() == 0:
            (artifact.path.parent / "pid-child").write_text(str(os.getpid()))
            time.sleep(120)
            os._exit(0)
        yield Runner(artifact.path)

def get(name):
    assert name == "fake"
    return Fake()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fake_backends.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


def subject(folder: Path, kind: str) -> Subject:
    path = folder / kind
    artifact = Artifact(backend="fake", path=path, files=(("fake", path),))
    return Subject(name=kind, artifact=artifact, resolve="fake_backends:get")


def is_running(folder: Path, kind: str) -> bool:
    pid = int((folder / f"pid-{kind}").read_text())
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_measures_side_by_side(folder: Path) -> None:
    rounds = []

    def progress(items, label, total=None):  # type: ignore[no-untyped-def]
        rounds.append((label, total))
        yield from items

    subjects = [subject(folder, "slow"), subject(folder, "fast")]
    report = measure(subjects, PICTURE, QUICK, progress=progress)
    assert rounds == [("Timing", 3)]
    slow, fast = report.results
    assert (slow.name, fast.name) == ("slow", "fast")
    assert all(len(result.rounds_ms) == 3 for result in report.results)
    assert all(len(samples) >= 4 for result in report.results for samples in result.stream.rounds)
    # The control load is for `bench`, which compares runs.
    assert slow.stream.control_rounds == fast.stream.control_rounds == ()
    one, other = slow.to_dict(), fast.to_dict()
    assert one["p50_ms"] >= 8
    assert 2 <= other["p50_ms"] < one["p50_ms"]
    assert one["first_ms"] >= 8 and one["warm_up"] >= 5 and one["load_ms"] > 0
    assert one["peak_rss_bytes"] is None or 5e6 < one["peak_rss_bytes"] < 200e6
    speedup = report.speedup("fast")
    assert 1 < speedup.low <= speedup.median <= speedup.high
    assert not any(is_running(folder, kind) for kind in ("slow", "fast"))
    values = json.loads(dump_json(report.to_dict()))
    assert values["scenario"] == "single_stream"
    assert values["threads"] == 1 and values["rounds"] == 3
    assert values["input"] == [1, 3, 8, 8]
    assert values["results"]["fast"]["n"] == len(fast.stream.samples_ns)
    assert values["speedup"]["over"] == "slow"
    assert set(values["speedup"]["fast"]) == {"low", "median", "high"}
    assert "samples_ns" not in dump_json(values)


def test_every_round_has_new_workers(folder: Path) -> None:
    pids = []

    def progress(items, label, total=None):  # type: ignore[no-untyped-def]
        for item in items:
            yield item
            pids.append((folder / "pid-fast").read_text())

    plan = replace(QUICK, turns=2, seconds=0)
    report = measure([subject(folder, "fast")], PICTURE, plan, progress=progress)
    assert len(set(pids)) == 3
    (fast,) = report.results
    assert len(fast.stream.rounds) == len(fast.rounds_ms) == 6
    assert fast.measured.warm_up["count"] >= 15  # at least five in each
    assert len(fast.measured.load_ms) == len(fast.measured.first_ms) == 3


def test_turns_have_an_order_by_chance_that_repeats(folder: Path) -> None:
    turns = folder / "turns"
    orders: list[tuple[str, ...]] = []

    def progress(items, label, total=None):  # type: ignore[no-untyped-def]
        for item in items:
            turns.write_text("")
            yield item
            # The last two runs of each are those of its turn.
            found = turns.read_text().split()
            orders.append(tuple(dict.fromkeys(found[-6:])))

    plan = replace(QUICK, rounds=8, seconds=0, count=2)
    subjects = [subject(folder, kind) for kind in ("slow", "fast", "other")]
    for _ in range(2):
        measure(subjects, PICTURE, plan, progress=progress)
    assert {tuple(sorted(order)) for order in orders} == {("fast", "other", "slow")}
    assert len(set(orders)) > 2  # neither one order nor one and its reverse
    assert orders[:8] == orders[8:]


@pytest.mark.parametrize(("answers", "rounds"), [([False], 2), ([True, False], 3), ([True] * 9, 5)])
def test_rounds_are_added_while_they_are_needed(
    folder: Path, answers: list[bool], rounds: int
) -> None:
    asked = []

    def more(report: LatencyReport) -> bool:
        asked.append([len(result.rounds_ms) for result in report.results])
        return answers[len(asked) - 1]

    plan = replace(QUICK, rounds=2, seconds=0, warm_up=0)
    subjects = [subject(folder, kind) for kind in ("fast", "other")]
    report = measure(subjects, PICTURE, plan, more=more, most_rounds=5)
    assert [len(result.rounds_ms) for result in report.results] == [rounds] * 2
    assert asked[: len(answers)] == [[2 + n] * 2 for n in range(len(asked))]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("dies", r"worker for dies died during 'load' \(exit code 9\)\. .*the last words"),
        ("raises", r"worker for raises died during 'load' \(exit code 1\)\. .*RuntimeError: boom"),
        ("hangs", r"worker for hangs gave no answer to 'load' within 4 s"),
    ],
)
def test_a_worker_that_fails_is_a_backend_error(folder: Path, kind: str, text: str) -> None:
    # With this seed the one that works is started first, and is there to be ended.
    plan = replace(QUICK, rounds=1, seconds=0, count=1, warm_up=0, timeout=4, seed=1)
    with pytest.raises(BackendError, match=text):
        measure([subject(folder, "fast"), subject(folder, kind)], PICTURE, plan)
    assert not is_running(folder, "fast")
    assert not is_running(folder, kind)


def test_an_error_of_ours_keeps_its_class(folder: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"^missing: no runtime here$"):
        measure([subject(folder, "missing")], PICTURE, QUICK)


def test_an_interrupt_ends_the_workers(folder: Path) -> None:
    def interrupted(items, label, total=None) -> Iterator[int]:  # type: ignore[no-untyped-def]
        yield next(iter(items))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure([subject(folder, "fast")], PICTURE, QUICK, progress=interrupted)
    assert not is_running(folder, "fast")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads CPU time from /proc")
def test_workers_do_not_compute_between_rounds(folder: Path) -> None:
    def ticks() -> int:
        pid = int((folder / "pid-fast").read_text())
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    used = []

    def pausing(items, label, total=None) -> Iterator[int]:  # type: ignore[no-untyped-def]
        for item in items:
            yield item
            before = ticks()
            time.sleep(0.3)
            used.append(ticks() - before)

    measure([subject(folder, "fast")], PICTURE, QUICK, progress=pausing)
    assert max(used) <= 1 and len(used) == 3


def test_the_current_folder_does_not_decide_what_is_imported(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("PYTHONSAFEPATH came with Python 3.11")
    hostile = tmp_path_factory.mktemp("hostile")
    (hostile / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    monkeypatch.chdir(hostile)
    measure([subject(folder, "fast")], PICTURE, QUICK)


def test_the_worker_starts_light() -> None:
    code = (
        "import sys, gnet_opt.bench.worker\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'openvino', 'PIL', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_subjects_that_make_no_sense(folder: Path) -> None:
    with pytest.raises(ValueError, match="different names"):
        measure([subject(folder, "fast")] * 2, PICTURE, QUICK)
    with pytest.raises(ValueError, match="there must be one"):
        measure([], PICTURE, QUICK)


SAMPLES = st.lists(st.integers(1, 10**9), min_size=1, max_size=60)


@given(st.lists(SAMPLES, min_size=1, max_size=5), st.floats(0, 100))
def test_percentiles_are_nearest_rank(rounds: list[list[int]], percent: float) -> None:
    flat = sorted(sample for samples in rounds for sample in samples)
    value = percentile_ms(flat[::-1], percent)
    assert value * 1e6 == pytest.approx(min(flat, key=lambda s: abs(s - value * 1e6)))
    below = sum(sample / 1e6 <= value for sample in flat)
    assert below >= percent / 100 * len(flat) - 1e-9
    timed = made_up("x", "fake", *rounds)
    assert timed.to_dict()["n"] == len(flat)
    assert flat[0] / 1e6 <= value <= flat[-1] / 1e6
    assert timed.to_dict()["spread"] == spread(timed.rounds_ms) >= 0


def test_the_ratio_is_taken_within_rounds() -> None:
    # The machine is twice as slow in the second round; the ratio does not notice.
    base = made_up("float", "fake", [10_000_000] * 3, [20_000_000] * 3)
    other = made_up("int8", "fake", [5_000_000] * 3, [10_000_000] * 3)
    report = LatencyReport(results=(base, other), threads=None, shape=(1, 3, 8, 8))
    assert report.speedup("int8") == Speedup(median=2.0, low=2.0, high=2.0)
    assert base.to_dict()["spread"] == pytest.approx(10 / 15)
    assert base.rounds_ms == [10.0, 20.0]
    assert report["int8"] is other


@pytest.mark.parametrize(
    ("count", "left_out"), [(1, 0), (3, 0), (4, 0), (5, 0), (7, 0), (8, 1), (11, 2), (20, 5)]
)
def test_the_interval_of_a_median(count: int, left_out: int) -> None:
    values = [float(n * 37 % 101) for n in range(count)]
    ordered = sorted(values)
    assert median_interval(values) == (ordered[left_out], ordered[-1 - left_out])


def test_the_interval_holds_the_median_nine_times_in_ten() -> None:
    chance = np.random.default_rng(0)
    for count in (5, 8, 9, 20):
        held = 0
        for values in chance.exponential(size=(2000, count)):  # with a median of log 2
            low, high = median_interval(list(values))
            held += low <= np.log(2) <= high
        assert held / 2000 > 0.88


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_what_a_runtime_forks_does_not_hold_the_measurement_up(folder: Path) -> None:
    # OpenVINO's telemetry did: a child that waits for the network keeps the worker's pipes open.
    started = time.monotonic()
    measure([subject(folder, "forks")], PICTURE, QUICK)
    assert time.monotonic() - started < 60
    deadline = time.monotonic() + 10
    while is_running(folder, "child") and time.monotonic() < deadline:
        time.sleep(0.05)
    state = Path(f"/proc/{(folder / 'pid-child').read_text()}/stat")
    # An orphan that nobody reaps stays as a zombie where process 1 does not care.
    assert not is_running(folder, "child") or state.read_text().rpartition(")")[2].split()[0] == "Z"
