"""The band of noise of two runs, by simulation and by recorded noise."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gnet_opt.bench.noise import DRIFT, STEADIED_DRIFT, STEEPEST, Ratio, ratio_of

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
RECORDED = {
    "openvino_paths-x86-avx2-1t.json": 8,
    "openvino_paths-x86-vnni-1t.json": 8,
    "quantizers-x86-vnni.json": 6,
}
"""Files of this project with how often every result in them was started anew."""

Run = np.ndarray[Any, Any]


def recorded(name: str) -> Iterator[list[Run]]:
    """The times of rounds of each result in a file, start by start."""

    def rounds(value: Any) -> Iterator[list[float]]:
        if isinstance(value, dict) and "rounds_ms" in value:
            yield value["rounds_ms"]
        elif isinstance(value, (dict, list)):
            for inside in value.values() if isinstance(value, dict) else value:
                yield from rounds(inside)

    starts = RECORDED[name]
    for times in rounds(json.loads((RESULTS / name).read_text(encoding="utf-8"))):
        # A result that was measured but once is of no use here.
        if len(times) >= 2 * starts and len(times) % starts == 0:
            yield list(np.reshape(np.array(times), (starts, -1)))


def test_the_drift_is_what_the_recorded_runs_have() -> None:
    """The variance of the means of starts, less what the noise within starts puts in it."""
    drifts = []
    for name in RECORDED:
        parts = []
        for runs in recorded(name):
            logs = [np.log(run) for run in runs]
            within = np.mean([run.var(ddof=1) for run in logs])
            between = np.var([run.mean() for run in logs], ddof=1)
            parts.append(between - within / len(logs[0]))
        drifts.append(math.sqrt(np.mean(parts)))
    assert min(drifts) == pytest.approx(0.009, abs=0.001)
    assert max(drifts) == pytest.approx(0.016, abs=0.001)
    assert max(drifts) < DRIFT


@pytest.mark.parametrize(
    ("name", "found", "without", "follows"),
    [
        ("x86-vnni", 0.017, 0.036, 2.1),
        ("x86-vnni-again", 0.015, 0.023, 2.1),
        ("x86-vnni-amx", 0.015, 0.022, 1.2),
    ],
)
def test_the_control_load_takes_much_of_it_out(
    name: str, found: float, without: float, follows: float
) -> None:
    """As recorded; the noise of the rounds is in it, too."""
    recorded = json.loads((RESULTS / f"compare_repeats-{name}.json").read_text("utf-8"))
    pairs = [repetition["second"] for repetition in recorded["repetitions"]]
    steadied = np.std([math.log(pair["ratio"]["value"]) for pair in pairs], ddof=1)
    medians = [
        [float(np.median(pair["rounds_ms"][run])) for run in ("first", "second")] for pair in pairs
    ]
    ratios = [math.log(second / first) for first, second in medians]
    raw = np.std(ratios, ddof=1)
    assert steadied / math.sqrt(2) == pytest.approx(found, abs=0.001)
    assert raw / math.sqrt(2) == pytest.approx(without, abs=0.001)
    assert STEADIED_DRIFT < steadied / math.sqrt(2) < DRIFT < raw / math.sqrt(2)
    controls = [math.log(pair["control"]) for pair in pairs]
    slope = np.polyfit(controls, ratios, 1)[0]
    assert slope == pytest.approx(follows, abs=0.05)
    assert slope < STEEPEST


@pytest.mark.parametrize("slower", [1.0, 1.1])
def test_on_recorded_noise(slower: float) -> None:
    """Any two starts of one result are equal; and with 10 % planted, hardly ever are.

    Two shared cores, and starts of but three rounds of 0.4 seconds: the worst that there is.
    """
    verdicts = []
    for name in RECORDED:
        for runs in recorded(name):
            pairs = list(permutations(range(len(runs)), 2))[::5]
            verdicts += [ratio_of(list(runs[a]), list(slower * runs[b])).verdict for a, b in pairs]
    share = verdicts.count("equal") / len(verdicts)
    if slower == 1.0:
        assert share >= 0.92
    else:
        assert verdicts.count("slower") / len(verdicts) >= 0.7
        assert "faster" not in verdicts


@pytest.mark.parametrize(("rounds", "found"), [(5, 85), (10, 95)])
def test_on_simulated_noise(rounds: int, found: int) -> None:
    """A drift that lies among those of the recorded files."""
    chance = np.random.default_rng(1)

    def run(level: float) -> list[float]:
        drift = chance.normal(0, 0.012)
        return list(level * np.exp(drift + chance.normal(0, 0.02, rounds)))

    equal = [ratio_of(run(2.0), run(2.0)).verdict for _ in range(100)]
    slower = [ratio_of(run(2.0), run(2.2)).verdict for _ in range(100)]
    faster = [ratio_of(run(2.2), run(2.0)).verdict for _ in range(100)]
    assert equal.count("equal") >= 95
    assert slower.count("slower") >= found
    assert faster.count("faster") >= found


@pytest.mark.parametrize("follows", [0.0, 0.4, 1.0])
def test_what_the_control_load_has_seen_too_is_taken_out(follows: float) -> None:
    """Phases that last a run, of which the times of a model have a share, or nothing."""
    chance = np.random.default_rng(2)

    def run(level: float) -> tuple[list[float], list[float]]:
        machine = chance.normal(0, 0.06) + chance.normal(0, 0.06, 10)
        times = np.exp(follows * machine + chance.normal(0, 0.015, 10))
        return list(level * times), list(np.exp(machine + chance.normal(0, 0.01, 10)))

    def verdicts(level: float, *, known: bool) -> list[str]:
        found = []
        for _ in range(100):
            (a, one), (b, two) = run(2.0), run(level)
            found.append(ratio_of(a, b, (one, two) if known else None).verdict)
        return found

    assert verdicts(2.0, known=True).count("equal") >= 95
    assert verdicts(2.2, known=True).count("slower") >= 95
    assert verdicts(1.8, known=True).count("faster") >= 95
    if follows == 1.0:
        assert verdicts(2.0, known=False).count("equal") < 90
        assert verdicts(2.2, known=False).count("slower") < 60


def test_a_control_load_that_did_not_move_changes_nothing() -> None:
    a, b = [2.0, 2.1, 1.9, 2.3, 2.0], [2.4, 2.2, 2.3]
    known = ratio_of(a, b, ([5.0] * 5, [5.0] * 3))
    assert known == ratio_of(a, b)
    # Nor does one that was slower in the second run alone, as nothing tells who follows it.
    assert ratio_of(a, b, ([5.0] * 5, [9.0] * 3)) == known


def test_what_the_control_load_does_not_explain_keeps_its_drift() -> None:
    """Two quiet runs at two levels of the machine: within them there is nothing to follow."""
    chance = np.random.default_rng(3)

    def run(level: float) -> tuple[list[float], list[float]]:
        times, control = np.exp(chance.normal(level, 0.005, 10)), chance.normal(level, 0.01, 10)
        return list(times), list(np.exp(control))

    for _ in range(20):
        (a, one), (b, two) = run(0.0), run(0.03)
        assert ratio_of(a, b, (one, two)).verdict == "equal"


@pytest.mark.parametrize(("follows", "taken"), [(-1.0, 0.0), (0.5, 0.5), (5.0, 3.0)])
def test_times_follow_the_control_load_within_reason(follows: float, taken: float) -> None:
    machine = np.array([0.0, 0.1, 0.2, 0.3])
    here, there = machine, machine + 0.1
    a, b = np.exp(follows * here), 1.5 * np.exp(follows * there)
    found = ratio_of(list(a), list(b), (list(np.exp(here)), list(np.exp(there))))
    assert found.value == pytest.approx(1.5 * math.exp(0.1 * (follows - taken)))


def test_without_noise_the_band_is_the_drift() -> None:
    found = ratio_of([2.0] * 5, [2.2] * 5, drift=0.01)
    half = 1.96 * math.sqrt(2) * 0.01
    assert found.value == pytest.approx(1.1)
    assert (math.log(found.low), math.log(found.high)) == pytest.approx(
        (math.log(1.1) - half, math.log(1.1) + half)
    )


def test_the_same_rounds_give_the_same_band() -> None:
    times = [2.0, 2.1, 1.9, 2.3, 2.0]
    assert ratio_of(times, [3.0, 3.1, 2.8]) == ratio_of(times, [3.0, 3.1, 2.8])


def test_one_wild_round_moves_nothing() -> None:
    calm = ratio_of([2.0] * 5, [2.0] * 5)
    wild = ratio_of([2.0] * 5, [2.0, 2.0, 2.0, 2.0, 40.0])
    assert wild.value == calm.value == 1.0
    assert wild.verdict == "equal"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.9, 1.1, "equal"), (1.0, 1.2, "equal"), (1.01, 1.2, "slower"), (0.8, 0.99, "faster")],
)
def test_verdicts(low: float, high: float, verdict: str) -> None:
    assert Ratio(value=math.sqrt(low * high), low=low, high=high).verdict == verdict
