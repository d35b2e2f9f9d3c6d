"""Which candidate ships, on made-up figures."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from gnet_opt.bench.latency import Latency, LatencyReport
from gnet_opt.decision import SAME, Figures, decide, refusal, tied, undecided
from gnet_opt.errors import GnetOptError
from gnet_opt.files import dump_json
from latencies import made_up


def accuracy(drop: float | None) -> dict[str, Any]:
    """What a manifest says of a candidate, as far as it decides."""
    found = None if drop is None else {"ci95": [drop - 1.0, drop + 2.0], "value": drop}
    return {"agreement": 98.0, "drop": found, "images": 400, "sqnr_db": 25.0}


def figures(
    name: str, drop: float | None = 0.0, *, measured: bool = True, layers: tuple[str, ...] = ()
) -> Figures:
    """A candidate named as a build names it, `int8 on openvino` for example."""
    precision, _, backend = name.split()
    share = {"int8": 1.0, "mixed": 0.75}.get(precision, 0.0)
    return Figures(
        name=name,
        precision=precision,
        backend=backend,
        accuracy=accuracy(drop) if measured else None,
        float_layers=layers,
        macs_int8_share=share,
    )


def report(**speeds: float) -> LatencyReport:
    """Float in 12 ms and others so many times as fast, in two equal rounds."""

    def timed(name: str, milliseconds: float) -> Latency:
        return made_up(name, name.split()[-1], *[[round(milliseconds * 1e6)] * 3] * 2)

    results = [timed("float", 12.0)]
    results += [timed(name.replace("_", " "), 12.0 / speed) for name, speed in speeds.items()]
    return LatencyReport(results=tuple(results), threads=2, shape=(1, 3, 8, 8))


def row(decision: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [row for row in decision["candidates"] if row["name"] == name]
    return dict(found)


INT8, MIXED, FLOAT = "int8 on openvino", "mixed on openvino", "fp32 on openvino"


def test_the_fastest_within_the_budget_ships() -> None:
    candidates = [
        figures(INT8, 0.5),
        figures("int8 on onnxruntime", 0.75),
        figures(FLOAT),
        figures("fp32 on onnxruntime", 0.25),
    ]
    timed = report(
        int8_on_openvino=1.5,
        int8_on_onnxruntime=2.0,
        fp32_on_openvino=1.0,
        fp32_on_onnxruntime=1.25,
    )
    name, decision = decide(candidates, 1.0, timed)
    assert name == decision["ships"] == "int8 on onnxruntime"
    assert [r["name"] for r in decision["candidates"]] == [c.name for c in candidates]
    assert [r["ships"] for r in decision["candidates"]] == [False, True, False, False]
    assert row(decision, name)["why_not"] == ""
    assert row(decision, INT8)["why_not"] == "1.33 times the time of int8 on onnxruntime."
    assert row(decision, FLOAT)["why_not"] == "2.00 times the time of int8 on onnxruntime."
    assert decision["rule"] == (
        "The fastest within the accuracy budget ships; of equally fast ones, the most accurate."
    )
    assert decision["reason"] == (
        "INT8 on onnxruntime ships: the fastest within the budget, 2.00 times as fast as float."
    )
    assert row(decision, INT8)["latency"]["p50_ms"] == pytest.approx(8.0)
    assert row(decision, INT8)["latency"]["speedup"]["median"] == pytest.approx(1.5)
    assert row(decision, INT8)["accuracy"] == accuracy(0.5)


def test_over_the_budget_never_ships() -> None:
    timed = report(fp32_on_openvino=1.0)
    name, decision = decide([figures(INT8, 1.01), figures(FLOAT)], 1.0, timed)
    assert name == FLOAT
    reason = (
        "INT8 loses 1.01 points of top-1 (95 % interval 0.01 to 3.01, 400 pictures); --max-drop "
        "allows 1."
    )
    assert row(decision, INT8)["why_not"] == reason
    assert row(decision, INT8)["latency"] is None
    assert decision["reason"] == (
        f"INT8 does not ship: {reason} Float on openvino ships: the fastest within the budget."
    )


def test_int8_that_is_slower_than_float_does_not_ship() -> None:
    timed = report(int8_on_openvino=0.8, fp32_on_openvino=1.0)
    name, decision = decide([figures(INT8), figures(FLOAT)], 1.0, timed)
    assert name == FLOAT
    assert row(decision, INT8)["why_not"] == "1.25 times the time of fp32 on openvino."
    assert decision["reason"] == (
        "INT8 does not ship: it is not the fastest here (0.80 times as fast as float). "
        "Float on openvino ships: the fastest within the budget."
    )


@pytest.mark.parametrize(
    ("layers", "text"), [(("a", "b"), "With 2 layers in float"), (("a",), "With 1 layer in float")]
)
def test_mixed_precision_says_what_it_keeps(layers: tuple[str, ...], text: str) -> None:
    timed = report(mixed_on_openvino=1.6, fp32_on_openvino=1.0)
    candidates = [figures(INT8, 7.0), figures(MIXED, 0.5, layers=layers), figures(FLOAT)]
    name, decision = decide(candidates, 1.0, timed)
    assert name == MIXED
    assert row(decision, MIXED)["float_layers"] == list(layers)
    assert row(decision, MIXED)["macs_int8_share"] == 0.75
    first, _, rest = decision["reason"].partition(" With ")
    assert first.startswith("INT8 does not ship: INT8 loses 7.00 points")
    assert f"With {rest}" == (
        f"{text} (25.0 % of the multiply-accumulates) the budget of 1 points is met. Mixed "
        "precision on openvino ships: the fastest within the budget, 1.60 times as fast as float."
    )


def test_mixed_precision_that_is_slower_than_float_does_not_ship() -> None:
    timed = report(mixed_on_openvino=0.9, fp32_on_openvino=1.0)
    candidates = [figures(INT8, 7.0), figures(MIXED, layers=("a",)), figures(FLOAT)]
    name, decision = decide(candidates, 1.0, timed)
    assert name == FLOAT
    assert row(decision, MIXED)["why_not"] == "1.11 times the time of fp32 on openvino."
    assert "layers in float" not in decision["reason"]


def test_without_latency_the_order_of_preference_decides() -> None:
    candidates = [figures(INT8, 5.0), figures(MIXED, 0.5, layers=("a",)), figures(FLOAT)]
    name, decision = decide(candidates, 1.0, None)
    assert name == MIXED
    assert {r["latency"] for r in decision["candidates"]} == {None}
    assert row(decision, FLOAT)["why_not"] == "Not first in the order of preference."
    assert row(decision, INT8)["why_not"].startswith("INT8 loses 5.00 points")
    assert decision["reason"].endswith(
        "Mixed precision ships: the first within the budget; latency cannot be measured on this "
        "machine."
    )
    name, decision = decide([figures(INT8), figures(FLOAT)], 1.0, None)
    assert name == INT8
    assert decision["reason"] == (
        "INT8 ships: the first within the budget; latency cannot be measured on this machine."
    )


@pytest.mark.parametrize("measured", [True, False], ids=["no labels", "no pictures"])
def test_without_labels_the_gate_is_open(measured: bool) -> None:
    candidates = [figures(name, None, measured=measured) for name in (INT8, FLOAT)]
    assert [refusal(one, 0.0) for one in candidates] == ["", ""]
    name, decision = decide(candidates, 0.0, report(int8_on_openvino=1.8, fp32_on_openvino=1.0))
    assert name == INT8
    assert (row(decision, INT8)["accuracy"] is None) == (not measured)


def on_held_back(**sqnr_db: float | None) -> dict[str, dict[str, Any]]:
    """Accuracy on 25 images that were held back."""
    return {
        name.replace("_", " "): {**accuracy(None), "images": 25, "sqnr_db": value}
        for name, value in sqnr_db.items()
    }


def test_of_equally_fast_ones_the_most_accurate_ships() -> None:
    timed = report(int8_on_openvino=1.5, mixed_on_openvino=1.48, fp32_on_openvino=1.0)
    candidates = [figures(INT8), figures(MIXED, layers=("a",)), figures(FLOAT)]
    measured = on_held_back(int8_on_openvino=30.9, mixed_on_openvino=33.1)
    for order in (candidates, candidates[::-1]):
        name, decision = decide(order, 1.0, timed, measured)
        assert name == MIXED
        assert row(decision, INT8)["why_not"] == (
            "As fast as mixed on openvino (within 3 %), and less accurate: 30.9 dB against 33.1 dB "
            "on 25 calibration images held back."
        )
        assert row(decision, INT8)["held_back"] == measured[INT8]
        assert row(decision, FLOAT)["held_back"] is None
        assert row(decision, FLOAT)["why_not"] == "1.48 times the time of mixed on openvino."
        assert decision["reason"].endswith(
            "As fast, within 3 %: int8 on openvino; mixed on openvino is the most accurate of them "
            "(33.1 dB against 30.9 dB on 25 calibration images held back)."
        )
    # One that is less accurate, but faster by more than chance, ships all the same.
    timed = report(int8_on_openvino=1.5, mixed_on_openvino=1.45, fp32_on_openvino=1.0)
    assert decide(candidates, 1.0, timed, measured)[0] == INT8


def test_float_ships_where_int8_is_only_as_fast() -> None:
    timed = report(int8_on_openvino=1.01, fp32_on_openvino=1.0)
    measured = on_held_back(int8_on_openvino=30.0, fp32_on_openvino=None)
    name, decision = decide([figures(INT8), figures(FLOAT)], 1.0, timed, measured)
    assert name == FLOAT
    assert decision["reason"] == (
        "INT8 does not ship: more accurate ones are as fast (1.01 times as fast as float). Float "
        "on openvino ships: the fastest within the budget. As fast, within 3 %: int8 on openvino; "
        "fp32 on openvino is the most accurate of them (equal to float against 30.0 dB on 25 "
        "calibration images held back)."
    )


def test_of_equals_of_which_nobody_knows_more_the_preferred_one_ships() -> None:
    timed = report(int8_on_openvino=1.5, mixed_on_openvino=1.5, fp32_on_openvino=1.5)
    candidates = [figures(INT8), figures(MIXED, layers=("a",)), figures(FLOAT)]
    assert decide(candidates, 1.0, timed)[0] == INT8
    assert decide(candidates[::-1], 1.0, timed)[0] == FLOAT
    decision = decide(candidates, 1.0, timed)[1]
    assert row(decision, FLOAT)["why_not"] == (
        "As fast as int8 on openvino (within 3 %), which is preferred."
    )
    assert decision["reason"].endswith(
        "As fast, within 3 %: mixed on openvino, fp32 on openvino; int8 on openvino is preferred."
    )
    alike = on_held_back(int8_on_openvino=30.0, mixed_on_openvino=30.0, fp32_on_openvino=30.0)
    assert decide(candidates, 1.0, timed, alike)[0] == INT8


@pytest.mark.parametrize(("faster", "ships"), [(1.02, INT8), (1.04, "int8 on onnxruntime")])
def test_a_difference_that_is_noise_does_not_count(faster: float, ships: str) -> None:
    candidates = [figures(INT8), figures("int8 on onnxruntime"), figures(FLOAT)]
    timed = report(int8_on_openvino=2.0, int8_on_onnxruntime=2.0 * faster, fp32_on_openvino=1.0)
    name, decision = decide(candidates, 1.0, timed)
    assert name == ships
    shown = row(decision, "int8 on onnxruntime")["why_not"]
    assert ("which is preferred" in shown) == (name == INT8)
    # A slower one that is not preferred says by how much, or that it is no slower than by chance.
    timed = report(int8_on_openvino=2.0, int8_on_onnxruntime=2.0 / faster, fp32_on_openvino=1.0)
    name, decision = decide(candidates, 1.0, timed)
    assert name == INT8
    shown = row(decision, "int8 on onnxruntime")["why_not"]
    equal = "As fast as int8 on openvino (within 3 %), which is preferred."
    assert shown == (equal if faster < 1.03 else f"{faster:.2f} times the time of {INT8}.")


def in_rounds(**rounds: list[float]) -> LatencyReport:
    """Float in 10 ms and others in so many, round by round."""
    count = len(next(iter(rounds.values())))
    results = [made_up("float", "openvino", *[[10_000_000]] * count)]
    for name, times in rounds.items():
        results.append(made_up(name, "openvino", *[[round(time * 1e6)] for time in times]))
    return LatencyReport(results=tuple(results), threads=1, shape=(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([4.0, 4.0, 4.0], False),  # equal
        ([4.02, 3.98, 4.05], False),  # equal but for chance
        ([4.3, 4.4, 4.35], False),  # slower whatever the start
        ([4.0, 4.3, 4.1], True),  # now equal, now slower
        ([3.6, 3.7, 3.9], True),  # faster, and once only as fast
        ([4.0, 4.02, 4.0, 4.9, 4.01, 3.99, 4.0, 4.0], False),  # one start of eight is no matter
    ],
)
def test_more_starts_are_asked_for_while_chance_decides(times: list[float], expected: bool) -> None:
    found = in_rounds(a=[4.0] * len(times), b=times, c=[8.0] * len(times))
    assert undecided(["a", "b", "c"], found) == expected
    # What is not within the budget does not matter, and one alone has no equal.
    assert not undecided(["a", "c"], found)
    assert not undecided(["b"], found)


def test_ties_are_by_the_medians_over_starts() -> None:
    # One start in which it came out slower does not make it another model.
    found = in_rounds(a=[4.0, 4.0, 4.0], b=[4.0, 4.6, 4.05], c=[4.5, 4.0, 4.5])
    assert tied(["a", "b", "c"], found) == ["a", "b"]


def test_the_budget_itself_is_within_it() -> None:
    assert refusal(figures(INT8, 1.0), 1.0) == ""
    assert refusal(figures(INT8, 0.0), 0.0) == ""
    assert refusal(figures(INT8, -0.25), 0.0) == ""
    assert refusal(figures(INT8, 0.25), 0.0).endswith("--max-drop allows 0.")
    assert refusal(figures(MIXED, 2.0), 1.5).startswith("Mixed precision loses 2.00 points")
    assert refusal(figures(FLOAT, 2.0), 1.5).startswith("Float loses 2.00 points")


def test_nothing_within_the_budget_is_a_fault() -> None:
    with pytest.raises(GnetOptError, match="Please report it"):
        decide([figures(INT8, 3.0)], 1.0, None)


@given(
    st.lists(st.tuples(st.floats(-2, 60), st.floats(0.2, 4.0)), min_size=1, max_size=6),
    st.floats(0, 20),
    st.booleans(),
)
def test_what_ships_is_within_the_budget_and_not_slower_than_the_others(
    drawn: list[tuple[float, float]], max_drop: float, timed: bool
) -> None:
    candidates = [figures(f"int8 on b{i}", drop) for i, (drop, _) in enumerate(drawn)]
    candidates.append(figures("fp32 on b0"))
    times = {f"int8_on_b{i}": speed for i, (_, speed) in enumerate(drawn)}
    latency = report(**times, fp32_on_b0=1.0) if timed else None
    name, decision = decide(candidates, max_drop, latency)
    within = [c.name for c in candidates if (c.drop or 0.0) <= max_drop]
    assert name in within
    if latency is None:
        assert name == within[0]
    else:
        # The first of those that are as fast as the fastest, but for noise.
        speeds = {one: latency.speedup(one).median for one in within}
        as_fast = [one for one in within if speeds[one] >= (1.0 - SAME) * max(speeds.values())]
        assert name == as_fast[0]
    for candidate in candidates:
        shown = row(decision, candidate.name)
        assert shown["ships"] == (candidate.name == name) == (shown["why_not"] == "")
        assert (shown["latency"] is not None) == (timed and candidate.name in within)
    assert json.loads(dump_json(decision)) == decision
