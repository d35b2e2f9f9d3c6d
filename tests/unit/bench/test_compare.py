"""Two runs against each other: verdicts by simulation and by recorded noise, and refusals."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import result_documents as documents
from gnet_opt.bench import compare
from gnet_opt.bench.compare import Comparison, Ratio, ratio_of
from gnet_opt.cli import compare as command
from gnet_opt.errors import ConfigError

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
RECORDED = {
    "openvino_paths-x86-avx2-1t.json": 8,
    "openvino_paths-x86-vnni-1t.json": 8,
    "quantizers-x86-vnni.json": 6,
}
"""Files of this project with how often every result in them was started anew."""

Run = np.ndarray[Any, Any]


def single(ms: float, **more: Any) -> dict[str, Any]:
    return documents.document(documents.subject(ms, **more))


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


class TestNoise:
    def test_the_drift_is_what_the_recorded_runs_have(self) -> None:
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
        assert min(drifts) == pytest.approx(0.012, abs=0.003)
        assert max(drifts) == pytest.approx(0.026, abs=0.003)
        assert min(drifts) < compare.DRIFT < max(drifts)

    @pytest.mark.parametrize(
        ("name", "found", "without"),
        [("x86-vnni", 0.017, 0.036), ("x86-vnni-again", 0.015, 0.023)],
    )
    def test_the_control_load_takes_much_of_it_out(
        self, name: str, found: float, without: float
    ) -> None:
        """As recorded; the noise of the rounds is in it, too."""
        recorded = json.loads((RESULTS / f"compare_repeats-{name}.json").read_text("utf-8"))
        pairs = [repetition["second"] for repetition in recorded["repetitions"]]
        steadied = np.std([math.log(pair["ratio"]["value"]) for pair in pairs], ddof=1)
        medians = [
            [float(np.median(pair["rounds_ms"][run])) for run in ("first", "second")]
            for pair in pairs
        ]
        ratios = [math.log(second / first) for first, second in medians]
        raw = np.std(ratios, ddof=1)
        assert steadied / math.sqrt(2) == pytest.approx(found, abs=0.001)
        assert raw / math.sqrt(2) == pytest.approx(without, abs=0.001)
        assert compare.STEADIED_DRIFT < steadied / math.sqrt(2) < compare.DRIFT < raw / math.sqrt(2)
        controls = [math.log(pair["control"]) for pair in pairs]
        slope = np.polyfit(controls, ratios, 1)[0]
        assert slope == pytest.approx(2.1, abs=0.05)
        assert slope < compare.STEEPEST

    @pytest.mark.parametrize("slower", [1.0, 1.1])
    def test_on_recorded_noise(self, slower: float) -> None:
        """Any two starts of one result are equal; and with 10 % planted, hardly ever are.

        Two shared cores, and starts of but three rounds of 0.4 seconds: the worst that there is.
        """
        verdicts = []
        for name in RECORDED:
            for runs in recorded(name):
                pairs = list(permutations(range(len(runs)), 2))[::5]
                verdicts += [
                    ratio_of(list(runs[a]), list(slower * runs[b])).verdict for a, b in pairs
                ]
        share = verdicts.count("equal") / len(verdicts)
        if slower == 1.0:
            assert share >= 0.92
        else:
            assert verdicts.count("slower") / len(verdicts) >= 0.7
            assert "faster" not in verdicts

    @pytest.mark.parametrize(("rounds", "found"), [(5, 85), (10, 95)])
    def test_on_simulated_noise(self, rounds: int, found: int) -> None:
        """Drift and rounds as in the quieter of the recorded files."""
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
    def test_what_the_control_load_has_seen_too_is_taken_out(self, follows: float) -> None:
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

    def test_a_control_load_that_did_not_move_changes_nothing(self) -> None:
        a, b = [2.0, 2.1, 1.9, 2.3, 2.0], [2.4, 2.2, 2.3]
        known = ratio_of(a, b, ([5.0] * 5, [5.0] * 3))
        assert known == ratio_of(a, b)
        # Nor does one that was slower in the second run alone, as nothing tells who follows it.
        assert ratio_of(a, b, ([5.0] * 5, [9.0] * 3)) == known

    def test_what_the_control_load_does_not_explain_keeps_its_drift(self) -> None:
        """Two quiet runs at two levels of the machine: within them there is nothing to follow."""
        chance = np.random.default_rng(3)

        def run(level: float) -> tuple[list[float], list[float]]:
            times, control = np.exp(chance.normal(level, 0.005, 10)), chance.normal(level, 0.01, 10)
            return list(times), list(np.exp(control))

        for _ in range(20):
            (a, one), (b, two) = run(0.0), run(0.03)
            assert ratio_of(a, b, (one, two)).verdict == "equal"

    @pytest.mark.parametrize(("follows", "taken"), [(-1.0, 0.0), (0.5, 0.5), (5.0, 3.0)])
    def test_times_follow_the_control_load_within_reason(
        self, follows: float, taken: float
    ) -> None:
        machine = np.array([0.0, 0.1, 0.2, 0.3])
        here, there = machine, machine + 0.1
        a, b = np.exp(follows * here), 1.5 * np.exp(follows * there)
        found = ratio_of(list(a), list(b), (list(np.exp(here)), list(np.exp(there))))
        assert found.value == pytest.approx(1.5 * math.exp(0.1 * (follows - taken)))

    def test_without_noise_the_band_is_the_drift(self) -> None:
        found = ratio_of([2.0] * 5, [2.2] * 5, drift=0.01)
        half = 1.96 * math.sqrt(2) * 0.01
        assert found.value == pytest.approx(1.1)
        assert (math.log(found.low), math.log(found.high)) == pytest.approx(
            (math.log(1.1) - half, math.log(1.1) + half)
        )

    def test_the_same_rounds_give_the_same_band(self) -> None:
        times = [2.0, 2.1, 1.9, 2.3, 2.0]
        assert ratio_of(times, [3.0, 3.1, 2.8]) == ratio_of(times, [3.0, 3.1, 2.8])

    def test_one_wild_round_moves_nothing(self) -> None:
        calm = ratio_of([2.0] * 5, [2.0] * 5)
        wild = ratio_of([2.0] * 5, [2.0, 2.0, 2.0, 2.0, 40.0])
        assert wild.value == calm.value == 1.0
        assert wild.verdict == "equal"

    @pytest.mark.parametrize(
        ("low", "high", "verdict"),
        [(0.9, 1.1, "equal"), (1.0, 1.2, "equal"), (1.01, 1.2, "slower"), (0.8, 0.99, "faster")],
    )
    def test_verdicts(self, low: float, high: float, verdict: str) -> None:
        assert Ratio(value=math.sqrt(low * high), low=low, high=high).verdict == verdict


class TestCompare:
    def test_a_run_with_itself(self) -> None:
        full = documents.full()
        found = compare.compare(full, full)
        assert len(found.rows) == 16
        assert {row.ratio.verdict for row in found.rows} == {"equal"}
        assert {row.ratio.value for row in found.rows} == {1.0}
        assert found.differences == found.allowed == ()
        assert found.slower_than(0.0) == []

    def test_a_slower_one(self) -> None:
        found = compare.compare(single(2.0), single(2.4, seed=7))
        (row,) = found.rows
        assert (row.subject, row.scenario) == ("demo-int8 openvino", "single-stream")
        assert row.ratio.verdict == "slower"
        assert row.ratio.value == pytest.approx(1.2, abs=0.04)
        assert row.ratio.low < row.ratio.value < row.ratio.high
        assert row.a_ms == pytest.approx(2.0, rel=0.15)
        assert found.slower_than(0.05) == [row]
        assert found.slower_than(0.3) == []
        assert compare.compare(single(2.4), single(2.0)).slower_than(0.0) == []

    def test_raw_samples_count_and_not_the_figures_beside_them(self) -> None:
        b = single(2.0)
        scenario = b["subjects"][0]["scenarios"]["single-stream"]
        scenario.update(p50_ms=9.0, rounds_ms=[9.0] * 5)
        assert compare.compare(single(2.0), b).rows[0].ratio.value == 1.0

    def test_offline_is_compared_by_the_time_of_a_picture(self) -> None:
        def offline(ms: float) -> dict[str, Any]:
            metric = {"better": "higher", "name": "pictures_per_second", "value": 1e3 / ms}
            rounds = [{"elapsed_ns": round(1e8 * ms), "pictures": 100}] * 5
            found = {"metric": metric, "rounds": rounds, "spread": 0.0}
            return single(ms, scenarios={"offline": found})

        (row,) = compare.compare(offline(2.0), offline(3.0)).rows
        assert (row.a_ms, row.b_ms, row.ratio.verdict) == (2.0, 3.0, "slower")
        assert row.ratio.value == pytest.approx(1.5)
        assert (row.metric, row.metric_a) == ("pictures_per_second", 500.0)

    def test_server_rates_are_known_between_the_last_good_one_and_the_first_bad_one(self) -> None:
        def server(good: float, bad: float) -> dict[str, Any]:
            rounds = [
                {"late": late, "offered_qps": rate, "samples_ns": [1_000_000] * 100}
                for rate, late in ((good, 1), (bad, 2))
            ]
            metric = {"better": "higher", "name": "qps_within_bound", "value": good}
            return single(2.0, scenarios={"server": _server(rounds, metric)})

        (row,) = compare.compare(server(100, 101), server(80, 81)).rows
        assert (row.a_ms, row.b_ms, row.ratio.verdict) == (10.0, 12.5, "slower")
        # The rates may be the same: both lie between 90 and 100.
        (row,) = compare.compare(server(100, 130), server(90, 120)).rows
        assert row.ratio.verdict == "equal"
        assert row.ratio.high > 130 / 90

    def test_a_server_that_held_no_rate_is_left_out(self) -> None:
        rounds = [{"late": 50, "offered_qps": 9.0, "samples_ns": [1_000_000] * 100}]
        metric = {"better": "higher", "name": "qps_within_bound", "value": 0.0}
        bad = single(2.0, scenarios={"server": _server(rounds, metric)})
        with pytest.raises(ConfigError, match="server: a run found no rate within its latency"):
            compare.compare(bad, bad)

    def test_the_control_load_counts_where_both_runs_have_the_same(self) -> None:
        def run(speed: float, work: str = "NumPy 2.4") -> dict[str, Any]:
            phases = [1.0, 1.1, 1.2, 1.1, 1.0]
            scenario = documents.stream([[2.0 * speed * phase] for phase in phases])
            for entry, phase in zip(scenario["rounds"], phases, strict=True):
                entry["control_ns"] = [round(500_000 * speed * phase)] * 3
            found = single(2.0, scenarios={"single-stream": scenario})
            found["environment"]["control"] = work
            return found

        found = compare.compare(run(1.0), run(1.2))
        (row,) = found.rows
        assert (row.ratio.verdict, row.b_ms / row.a_ms) == ("equal", pytest.approx(1.2))
        assert row.ratio.value == pytest.approx(1.0, abs=1e-4)
        assert row.control == row.to_dict()["control"] == pytest.approx(1.2, abs=1e-4)
        assert found.notes == (
            "The machine itself was slower in B: beside demo-int8 openvino, single-stream, the "
            "control load took 1.20 times as long. As far as times follow it, it is taken out of "
            "the changes.",
        )
        unknown = run(1.2)
        for entry in unknown["subjects"][0]["scenarios"]["single-stream"]["rounds"][:1]:
            del entry["control_ns"]
        for other, why in (
            (run(1.2, work="NumPy 1.26"), "other work in each run (NumPy 2.4 in A, NumPy 1.26 in"),
            (unknown, "single-stream: slow phases of the machine are not taken out, as rounds"),
        ):
            found = compare.compare(run(1.0), other)
            (row,) = found.rows
            assert (row.ratio.verdict, row.control) == ("slower", None)
            assert row.ratio.value == pytest.approx(1.2)
            (note,) = found.notes
            assert why in note
        # Two machines: that one is slower is what was asked for.
        elsewhere = run(1.2)
        elsewhere["environment"]["machine"]["cpu"] = "Another CPU"
        (row,) = compare.compare(run(1.0), elsewhere, allowed=["cpu"]).rows
        assert (row.ratio.verdict, row.control) == ("slower", None)

    def test_subjects_are_matched_by_name(self) -> None:
        one = documents.document(documents.subject(2.0, name="x"), documents.subject(3.0, name="y"))
        two = documents.document(documents.subject(3.0, name="y"), documents.subject(9.0, name="z"))
        found = compare.compare(one, two)
        assert [(row.subject, row.other) for row in found.rows] == [("y", "y")]
        assert found.notes[:2] == ("Only in A: x.", "Only in B: z.")

    def test_or_by_their_place(self) -> None:
        one, two = single(9.0, name="old", precision="fp32"), single(2.0, name="new")
        with pytest.raises(ConfigError, match=r"no subject in common: old in A, new in B\. Pass"):
            compare.compare(one, two)
        found = compare.compare(one, two, match="index")
        assert [(row.subject, row.other) for row in found.rows] == [("old", "new")]
        assert {difference.name for difference in found.differences} == {"precision"}

    def test_a_scenario_of_only_one_run_is_told(self) -> None:
        full = documents.full()
        less = copy.deepcopy(full)
        del less["subjects"][0]["scenarios"]["offline"]
        found = compare.compare(full, less)
        assert len(found.rows) == 15
        assert "demo-fp32 openvino, offline: only in A." in found.notes

    def test_too_few_rounds(self) -> None:
        with pytest.raises(
            ConfigError, match=r"2 round.s. say nothing about the noise .* 3 or mor"
        ):
            compare.compare(single(2.0), single(2.0, rounds=2))

    def test_what_was_measured_may_differ_and_is_told(self) -> None:
        a = single(2.0)
        b = single(2.0, model_sha256="c" * 64, backend_version="2026.5.0")
        b["version"] = "0.2.0"
        b["environment"]["tools"]["openvino"] = "2026.5.0"
        found = compare.compare(a, b)
        assert [str(difference) for difference in found.differences] == [
            "gnet-opt: 0.1.0 in A, 0.2.0 in B",
            "openvino: 2026.4.1 in A, 2026.5.0 in B",
            "backend_version of demo-int8 openvino: 2026.4.1 in A, 2026.5.0 in B",
            f"model_sha256 of demo-int8 openvino: {'a' * 64} in A, {'c' * 64} in B",
        ]

    def test_an_unstable_run_is_called_so(self) -> None:
        b = single(2.0)
        b["environment"]["unstable"] = ["Something else was running.", "It was hot."]
        assert compare.compare(single(2.0), b).notes == (
            "B is an unstable run: Something else was running. (1 more in the file)",
        )

    def test_noise_that_would_hide_a_slow_down_is_told(self) -> None:
        wild = single(2.0, scenarios={"single-stream": documents.stream([[1.0], [2.0], [4.0]])})
        (note,) = compare.compare(wild, wild).notes
        assert note.startswith(
            "1 of 1 rows are too noisy to show a slow-down of 10 %; the noisiest"
        )


def _server(rounds: list[dict[str, Any]], metric: dict[str, Any]) -> dict[str, Any]:
    return {"bound_ms": 5.0, "metric": metric, "rounds": rounds}


def _change(where: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        places = {
            "environment": document["environment"],
            "machine": document["environment"]["machine"],
            "start": document["environment"]["start"],
            "subject": document["subjects"][0],
            "server": document["subjects"][0]["scenarios"].get("server"),
            "multi": document["subjects"][0]["scenarios"].get("multi-stream"),
        }
        places[where][key] = value

    return change


UNLIKE = {
    "affinity": _change("environment", "affinity", [0]),
    "architecture": _change("machine", "architecture", "aarch64"),
    "batch": _change("multi", "batch", 8),
    "board": _change("machine", "board", "A board"),
    "constraint": _change("environment", "constraint", {"cpus": [0], "label": "constrained host"}),
    "cores": _change("machine", "cores", 8),
    "cpu": _change("machine", "cpu", "Another CPU"),
    "governors": _change("start", "governors", ["powersave"]),
    "instructions": _change("machine", "instructions", ["avx2"]),
    "latency-bound": _change("server", "bound_ms", 99.0),
    "threads": _change("subject", "threads", 1),
    "turbo": _change("start", "turbo", True),
}


class TestUnlikeRuns:
    def test_every_condition_is_tried_here_and_known_to_the_command(self) -> None:
        assert set(UNLIKE) == set(compare.CONDITIONS) == set(command._CONDITIONS)

    @pytest.mark.parametrize("name", sorted(set(UNLIKE) - {"latency-bound"}))
    def test_a_condition_that_differs_is_refused_by_its_name_or_allowed(self, name: str) -> None:
        a, b = documents.full(), documents.full()
        UNLIKE[name](b)
        with pytest.raises(ConfigError) as caught:
            compare.compare(a, b)
        said = str(caught.value)
        assert f"different conditions. {name}" in said
        assert said.endswith(f"or pass --allow {name} to compare them nevertheless.")
        found: Comparison = compare.compare(a, b, allowed=[name])
        assert {difference.name for difference in found.allowed} == {name}
        with pytest.raises(ConfigError):
            compare.compare(a, b, allowed=sorted(set(UNLIKE) - {name}))

    def test_another_latency_bound_leaves_out_the_server_scenario_alone(self) -> None:
        a, b = documents.full(), documents.full()
        UNLIKE["latency-bound"](b)
        name = a["subjects"][0]["name"]
        found = compare.compare(a, b)
        rows = {(row.subject, row.scenario) for row in compare.compare(a, a).rows}
        assert {(row.subject, row.scenario) for row in found.rows} == rows - {(name, "server")}
        assert found.allowed == ()
        bound = a["subjects"][0]["scenarios"]["server"]["bound_ms"]
        assert found.notes[0] == (
            f"{name}, server: left out, as the latency bound was {bound:g} ms in A and 99 ms in B. "
            "Measure both with the same --latency-bound, or pass --allow latency-bound."
        )
        found = compare.compare(a, b, allowed=["latency-bound"])
        assert {(row.subject, row.scenario) for row in found.rows} == rows
        assert [difference.name for difference in found.allowed] == ["latency-bound"]
        for document in (a, b):
            for subject in document["subjects"]:
                subject["scenarios"] = {"server": subject["scenarios"]["server"]}
            document["subjects"] = document["subjects"][:1]
        with pytest.raises(ConfigError, match=r"no scenario in common that can be judged\. .*left"):
            compare.compare(a, b)

    def test_all_that_differs_is_named_at_once(self) -> None:
        a, b = documents.full(), documents.full()
        UNLIKE["cpu"](b)
        UNLIKE["instructions"](b)
        with pytest.raises(ConfigError) as caught:
            compare.compare(a, b)
        assert str(caught.value) == (
            "These runs cannot be compared, because they were measured under different "
            "conditions. cpu: A CPU in A, Another CPU in B. instructions: avx_vnni in A, none in "
            "B. Measure both alike, or pass --allow cpu --allow instructions to compare them "
            "nevertheless."
        )

    @pytest.mark.parametrize(("key", "value"), [("governors", []), ("turbo", None)])
    def test_what_a_system_does_not_tell_does_not_differ(self, key: str, value: Any) -> None:
        b = single(2.0)
        b["environment"]["start"][key] = value
        assert compare.compare(single(2.0), b).allowed == ()
