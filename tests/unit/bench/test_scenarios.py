from __future__ import annotations

import gc
import statistics
import time
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from gnet_opt.bench import scenarios
from gnet_opt.bench.scenarios import back_to_back, is_steady, serve, throughput, warm_up


class World:
    """A clock that work and sleep move, and reading it a little, so that no loop waits forever."""

    def __init__(self, *durations_ns: int, tick_ns: int = 1) -> None:
        self.tick = tick_ns
        self.now = 10**15
        self.durations = durations_ns
        self.runs = 0
        self.slept = 0.0

    def clock(self) -> int:
        self.now += self.tick
        return self.now

    def run(self) -> None:
        self.now += self.durations[min(self.runs, len(self.durations) - 1)]
        self.runs += 1

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept += seconds
        self.now += int(seconds * 1e9)


@pytest.mark.parametrize(
    ("seconds", "count", "expected"), [(0.1, 1, 10), (0.1, 25, 25), (0.0, 3, 3), (0.095, 1, 10)]
)
def test_runs_for_so_long_and_so_often(seconds: float, count: int, expected: int) -> None:
    world = World(10_000_000)
    samples = back_to_back(world.run, seconds=seconds, count=count, clock=world.clock)
    assert len(samples) == world.runs == expected
    assert samples == [10_000_001] * expected
    world = World(10_000_000)
    done, elapsed = throughput(world.run, seconds=seconds, count=count, clock=world.clock)
    assert done == world.runs == expected
    assert elapsed == pytest.approx(expected * 1e7, rel=1e-3)


def test_nothing_is_collected_while_it_is_timed() -> None:
    seen = []
    back_to_back(lambda: seen.append(gc.isenabled()), seconds=0, count=2)
    assert seen == [False, False] and gc.isenabled()

    def broken() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        throughput(broken, seconds=0, count=1)
    assert gc.isenabled()


def test_the_loop_itself_costs_next_to_nothing() -> None:
    # A runtime that answers at once: what is between two of its calls is the loop's.
    calls: list[int] = []
    back_to_back(lambda: calls.append(time.perf_counter_ns()), seconds=0, count=20_000)
    gaps = [after - before for before, after in pairwise(calls)]
    assert statistics.median(gaps) < 5_000  # ns a query; at most 20 µs are promised


class TestServer:
    def test_a_fast_server_is_only_as_busy_as_its_queries(self) -> None:
        world = World(1_000_000, tick_ns=20_000)
        served = serve(
            world.run,
            rate=10,
            count=200,
            bound_ns=50e6,
            seed=1,
            clock=world.clock,
            sleep=world.sleep,
        )
        assert served.within and len(served.samples_ns) == 200
        assert min(served.samples_ns) >= 1_000_000
        assert statistics.median(served.samples_ns) < 1_100_000
        # Arrivals take 200 / 10 seconds, more or less by chance, and most of it is slept.
        assert 15 < world.slept < 25

    def test_too_high_a_rate_is_given_up(self) -> None:
        world = World(10_000_000, tick_ns=20_000)
        served = serve(
            world.run,
            rate=200,
            count=1000,
            bound_ns=30e6,
            seed=1,
            clock=world.clock,
            sleep=world.sleep,
        )
        assert not served.within
        assert served.late == 11  # one more than one in a hundred
        assert world.runs == len(served.samples_ns) < 100

    def test_latency_includes_waiting(self) -> None:
        # Two pictures that arrive at the same time: the second one waits for the first.
        world = World(10_000_000, tick_ns=20_000)
        served = serve(
            world.run,
            rate=1e9,
            count=3,
            bound_ns=1e9,
            seed=0,
            clock=world.clock,
            sleep=world.sleep,
        )
        assert [round(sample / 1e7) for sample in served.samples_ns] == [1, 2, 3]

    def test_arrivals_are_a_poisson_process_that_the_seed_repeats(self) -> None:
        def arrivals(seed: int) -> list[int]:
            world = World(0, tick_ns=20_000)
            seen: list[int] = []
            serve(
                lambda: seen.append(world.now),
                rate=100,
                count=2000,
                bound_ns=1e12,
                seed=seed,
                clock=world.clock,
                sleep=world.sleep,
            )
            return seen

        times = arrivals(7)
        assert times == arrivals(7) != arrivals(8)
        gaps = np.diff(times) / 1e9
        assert gaps.mean() == pytest.approx(0.01, rel=0.1)
        assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # exponential

    def test_the_rate_of_a_simulated_server_is_that_of_theory(self) -> None:
        # M/D/1 at a load of 0.5: the mean wait is half a service (Pollaczek-Khinchine).
        world = World(10_000_000, tick_ns=20_000)
        served = serve(
            world.run,
            rate=50,
            count=20_000,
            bound_ns=1e12,
            seed=3,
            clock=world.clock,
            sleep=world.sleep,
        )
        assert np.mean(served.samples_ns) / 1e7 == pytest.approx(1.5, rel=0.05)

    def test_real_sleep_does_not_make_queries_late(self) -> None:
        served = serve(lambda: None, rate=200, count=40, bound_ns=1e9, seed=0)
        assert served.within and min(served.samples_ns) >= 0


class TestSteady:
    @given(st.integers(1, 10**9))
    def test_equal_times(self, time_ns: int) -> None:
        assert is_steady([time_ns] * scenarios.WINDOW)

    @given(st.floats(0.3, 0.7), st.floats(1.04, 10))
    def test_a_step_in_the_window_is_seen(self, where: float, height: float) -> None:
        n = scenarios.WINDOW
        assert not is_steady([height if index < where * n else 1.0 for index in range(n)])

    def test_what_falls_is_seen_through_noise(self) -> None:
        chance = np.random.default_rng(0)
        n = scenarios.WINDOW
        slope, step = np.linspace(1.2, 1.0, n), np.where(np.arange(n) < n / 2, 1.2, 1.0)
        for shape in (slope, step):
            found = [is_steady((shape * chance.normal(1, 0.02, n)).tolist()) for _ in range(200)]
            assert sum(found) < 10  # one in twenty

    def test_noise_alone_seldom_looks_like_a_trend(self) -> None:
        chance = np.random.default_rng(0)
        found = [is_steady(chance.lognormal(0, 0.1, scenarios.WINDOW).tolist()) for _ in range(300)]
        assert sum(found) > 240  # nine in ten by the level of the test

    def test_a_few_slow_runs_do_not_matter(self) -> None:
        times = [10.0] * scenarios.WINDOW
        times[3] = times[11] = times[19] = 60.0
        assert is_steady(times)


def test_warming_up_lasts_until_times_are_steady() -> None:
    # Times fall for forty runs.
    world = World(*(int(1e6 * (1 + 3 * 0.9**n)) for n in range(40)), 1_000_000)
    warm = warm_up(world.run, seconds=60, clock=world.clock)
    assert warm.steady
    assert 40 <= len(warm.samples_ns) == world.runs <= 70


def test_warming_up_ends_in_time() -> None:
    world = World(*(10**8 - 10**6 * n for n in range(60)))
    warm = warm_up(world.run, seconds=2, clock=world.clock)
    assert not warm.steady
    assert 20 <= len(warm.samples_ns) <= 23
