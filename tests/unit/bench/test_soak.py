from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from gnet_opt.bench import soak as module
from gnet_opt.bench.process import Subject, started
from gnet_opt.bench.soak import (
    Bin,
    Sensors,
    Soak,
    judge,
    parse_duration,
    read_sensors,
    say_duration,
    soak,
)
from gnet_opt.errors import BackendError, ConfigError
from gnet_opt.files import dump_json
from gnet_opt.runtime import Artifact
from sysfs import DESKTOP, JETSON_ORIN_NANO, write_tree

BLIND = "Neither the clock nor throttle events can be read here."


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("1h", 3600), ("1h30m", 5400), ("0.5s", 0.5), (" 2m30s ", 150)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "10 m", "0s", "0m", "-5s", "1.5h", "5s1m", "1d"])
def test_texts_that_are_no_duration(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_duration(text)
    assert str(caught.value) == f"{text!r} is no duration. Write it as 90s, 10m, 1h or 1h30m."


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(200, "3 min 20 s"), (600, "10 min"), (3600, "1 h"), (3725.4, "1 h 2 min 5 s"), (0.2, "0 s")],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert say_duration(seconds) == text


@given(hours=st.integers(0, 99), minutes=st.integers(0, 59), seconds=st.integers(1, 59))
def test_durations_in_words_say_the_same(hours: int, minutes: int, seconds: int) -> None:
    total = parse_duration(f"{hours}h{minutes}m{seconds}s")
    words = say_duration(total).replace(" min", "m").replace(" h", "h").replace(" s", "s")
    assert parse_duration(words.replace(" ", "")) == total


def test_sensors_of_two_machines(tmp_path: Path) -> None:
    jetson = read_sensors(write_tree(tmp_path / "jetson", JETSON_ORIN_NANO))
    assert jetson == Sensors(temperature_c=51.187, frequency_mhz=1510.4, throttle_count=3)
    desktop = read_sensors(write_tree(tmp_path / "desktop", DESKTOP))
    assert desktop == Sensors(temperature_c=61.0, frequency_mhz=None, throttle_count=17)
    nothing = Sensors(temperature_c=None, frequency_mhz=None, throttle_count=None)
    assert read_sensors(tmp_path / "nothing") == nothing


class Board:
    """A worker on a board that is held back after a while, in a time of its own."""

    def __init__(self, milliseconds: Callable[[float], float], overhead: float = 0.004) -> None:
        self.now = 1000.0
        self.requests: list[tuple[dict[str, Any], float]] = []
        self._milliseconds = milliseconds
        self._overhead = overhead

    def clock(self) -> float:
        return self.now

    def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        self.requests.append((dict(request), timeout))
        end = self.now + request["seconds"]
        samples: list[int] = []
        while len(samples) < request["count"] or self.now < end:
            took = self._milliseconds(self.now - 1000)
            samples.append(round(took * 1e6))
            self.now += took / 1e3
        self.now += self._overhead
        return {"samples_ns": samples, "peak_rss_bytes": None}

    def sensors(self) -> Sensors:
        hot = self.now - 1000 > 200
        return Sensors(
            temperature_c=85.0 if hot else 60.0,
            frequency_mhz=2000.0 if hot else 2400.0,
            throttle_count=40 + 5 * hot,
        )


def throttled(seconds: float) -> float:
    return 112.0 if seconds > 200 else 100.0


def run(board: Board, duration: float, **options: Any) -> Soak:
    return soak(board, duration, sensors=board.sensors, clock=board.clock, **options)


def test_a_board_that_is_held_back() -> None:
    labels = []

    def progress(items: Any, label: str, total: int | None = None) -> Iterator[Any]:
        labels.append((label, total))
        yield from items

    board = Board(throttled)
    result = run(board, 600, progress=progress)
    assert labels == [("Soaking", 120)]
    assert 600 <= result.seconds < 600.2
    assert board.requests[0] == ({"do": "measure", "seconds": 5.0, "count": 1}, 5.0 + 120)
    assert len(result.bins) == 120
    first, last = result.bins[0], result.bins[-1]
    assert (first.start_s, first.count, first.p50_ms) == (0, 50, 100.0)
    assert (first.temperature_c, first.frequency_mhz, first.throttle_count) == (60.0, 2400.0, 0)
    assert (last.p50_ms, last.p99_ms, last.temperature_c) == (112.0, 112.0, 85.0)
    assert last.throttle_count == 5  # since the soak began
    starts = [each.start_s for each in result.bins]
    assert starts == sorted(starts) and len(set(starts)) == len(starts)
    verdict = result.verdict
    assert verdict.slower == pytest.approx(0.12)
    assert verdict.since_s == pytest.approx(200, abs=0.2)
    assert verdict.sentence == (
        "Throttled after 3 min 20 s: 12 % slower, and the clock went from 2400 to 2000 MHz and "
        "5 throttle events were counted."
    )
    told = result.to_dict()
    assert dump_json(told)
    assert set(told) == {"bins", "seconds", "since_s", "slower", "verdict"}
    assert told["bins"][-1] == {
        "count": last.count,
        "frequency_mhz": 2000.0,
        "p50_ms": 112.0,
        "p99_ms": 112.0,
        "start_s": last.start_s,
        "temperature_c": 85.0,
        "throttle_count": 5,
    }


@pytest.mark.parametrize(
    ("duration", "count"), [(0.4, 1), (1.5, 1), (10, 10), (90, 90), (600, 120), (3600, 120)]
)
def test_bins_are_a_second_or_longer(duration: float, count: int) -> None:
    board = Board(lambda now: 50.0, overhead=0)
    result = run(board, duration)
    assert len(result.bins) == count
    assert board.requests[0][0]["seconds"] == duration / count
    assert duration <= result.seconds < duration + 0.1  # no bin adds to the next one's delay


def test_runs_longer_than_a_bin() -> None:
    board = Board(lambda now: 7000.0)
    result = run(board, 60)
    assert len(result.bins) == 9 and result.seconds < 70
    assert {each.count for each in result.bins} == {1}


@pytest.mark.parametrize("duration", [0, -1, float("nan")])
def test_a_soak_needs_time(duration: float) -> None:
    with pytest.raises(ConfigError, match="Pass a duration such as 10m"):
        run(Board(throttled), duration)


def test_a_worker_that_fails_and_an_interrupt_end_it_at_once() -> None:
    for error in (BackendError("it died"), KeyboardInterrupt()):

        class Failing(Board):
            def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
                raise error  # noqa: B023

        board, began = Failing(throttled), time.perf_counter()
        with pytest.raises(type(error)):
            run(board, 7200)  # whose sensors would be read after half a minute
        assert time.perf_counter() - began < 5


def test_sensors_are_read_while_the_worker_works() -> None:
    working = []

    class Slow(Board):
        def ask(self, request: Mapping[str, Any], timeout: float) -> dict[str, Any]:
            self.busy = True
            time.sleep(request["seconds"])
            self.busy = False
            return super().ask(request, timeout)

        def sensors(self) -> Sensors:
            working.append(getattr(self, "busy", False))
            return super().sensors()

    run(Slow(throttled), 1.0)
    assert working == [False, True]


SLOWING = """
import contextlib, time

class Runner:
    def __init__(self): self.began = time.monotonic()
    def run(self, batch):
        time.sleep(0.002 if time.monotonic() - self.began < 4 else 0.006)
        return batch.reshape(1, -1)

class Slowing:
    @contextlib.contextmanager
    def open(self, artifact, *, threads=None): yield Runner()

def get(name): return Slowing()
"""


@pytest.mark.slow
def test_a_worker_process_that_slows_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slowing.py").write_text(SLOWING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    picture = tmp_path / "input.npy"
    np.save(picture, np.zeros((1, 3, 8, 8), np.float32))
    artifact = Artifact(backend="slowing", path=picture, files=(("fake", picture),))
    subject = Subject(name="slowing", artifact=artifact, resolve="slowing:get")
    with started("slowing", tmp_path / "stderr") as worker:
        worker.load(subject, picture, 1)
        result = soak(worker, 12)
    assert len(result.bins) == 12 and 12 <= result.seconds < 30
    verdict = result.verdict
    assert verdict.slower is not None and verdict.slower > 0.5
    assert verdict.since_s == pytest.approx(4, abs=1.5)


def bins(
    medians: list[float], frequencies: list[float] | None = None, events: list[int] | None = None
) -> list[Bin]:
    return [
        Bin(
            start_s=5.0 * index,
            count=50,
            p50_ms=median,
            p99_ms=median + 1,
            temperature_c=None,
            frequency_mhz=frequencies[index] if frequencies else None,
            throttle_count=events[index] if events else None,
        )
        for index, median in enumerate(medians)
    ]


def noisy(values: list[float], percent: float, seed: int = 0) -> list[float]:
    chance = random.Random(seed)
    return [value * (1 + percent / 100 * chance.gauss(0, 1)) for value in values]


STEP = [10.0] * 40 + [11.2] * 80


def test_slower_and_nothing_tells_why() -> None:
    verdict = judge(bins(STEP), 600)
    assert verdict.sentence == (
        f"12 % slower after 3 min 20 s: throttled, or disturbed by another program. {BLIND}"
    )
    assert verdict.since_s == 200.0


def test_slower_and_the_machine_knows_nothing_of_it() -> None:
    verdict = judge(bins(STEP, [2400.0] * 120, [0] * 120), 600)
    assert verdict.sentence == (
        "12 % slower after 3 min 20 s, but the clock did not fall and no throttle event was "
        "counted: look for another program."
    )


def test_one_sign_of_throttling_is_enough() -> None:
    verdict = judge(bins(STEP, [2400.0] * 120, [0] * 119 + [1]), 600)
    assert verdict.sentence == (
        "Throttled after 3 min 20 s: 12 % slower, and 1 throttle event was counted."
    )
    verdict = judge(bins(STEP, [2400.0] * 40 + [2100.0] * 80), 600)
    assert verdict.sentence == (
        "Throttled after 3 min 20 s: 12 % slower, and the clock went from 2400 to 2100 MHz."
    )


def test_nothing_happened() -> None:
    flat = judge(bins([10.0] * 120, [2400.0] * 120, [0] * 120), 600)
    assert flat.sentence == "No throttling seen in 10 min: the latency did not rise."
    assert (flat.slower, flat.since_s) == (0.0, None)
    little = judge(bins([10.0] * 60 + [10.2] * 60), 600)
    assert little.sentence == (
        "No throttling seen in 10 min: the latency rose by 2.0 %, which is within 3 % of noise. "
        f"{BLIND}"
    )
    counted = judge(bins([10.0] * 120, None, list(range(120))), 600)
    assert counted.sentence == (
        "119 throttle events were counted in 10 min, but the latency did not rise."
    )
    faster = judge(bins([11.0] * 20 + [10.0] * 100), 600)
    assert faster.sentence == f"No throttling seen in 10 min: the latency did not rise. {BLIND}"


def test_too_short_to_tell() -> None:
    verdict = judge(bins([10.0, 10.0, 10.0, 20.0, 20.0, 20.0, 20.0]), 7)
    assert verdict.sentence.startswith("7 s are too short to tell of throttling.")
    assert (verdict.slower, verdict.since_s) == (None, None)


def test_a_few_disturbed_bins_are_no_throttling() -> None:
    medians = [10.0] * 120
    for index in (30, 31, 60, 95, 96, 97, 119):
        medians[index] = 30.0
    assert judge(bins(medians), 600).since_s is None


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_throttling_and_hides_none(seed: int) -> None:
    quiet = judge(bins(noisy([10.0] * 120, 8, seed)), 600)
    assert quiet.since_s is None
    step = judge(bins(noisy([10.0] * 40 + [13.0] * 80, 8, seed)), 600)
    assert step.since_s == pytest.approx(200, abs=20)


def test_a_slow_rise_is_seen_though_no_neighbours_differ() -> None:
    ramp = [10 + 2 * index / 119 for index in range(120)]
    verdict = judge(bins(ramp), 600)
    assert verdict.slower is not None and 0.14 < verdict.slower < 0.2
    assert verdict.since_s == pytest.approx(300, abs=60)


@given(
    before=st.floats(0.1, 500),
    ratio=st.floats(1.05, 4),
    at=st.integers(12, 90),
)
def test_a_step_is_found_where_it_is(before: float, ratio: float, at: int) -> None:
    verdict = judge(bins([before] * at + [before * ratio] * (120 - at)), 600)
    assert verdict.since_s == 5.0 * at
    assert verdict.slower == pytest.approx(ratio - 1)


def test_the_limits_are_sane() -> None:
    assert module.LEAST_BINS >= 2 * 3  # start and settled do not overlap
    assert module.START + module.SETTLED < 1
