"""Two runs against each other: what is judged, what is told, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

import result_documents as documents
from gnet_opt.bench import compare
from gnet_opt.bench.compare import Comparison
from gnet_opt.cli import compare as command
from gnet_opt.errors import ConfigError


def single(ms: float, **more: Any) -> dict[str, Any]:
    return documents.document(documents.subject(ms, **more))


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
