"""The choice of method, pictures to judge by, and layers to keep in float."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given

from gnet_opt.images import ImageSet
from gnet_opt.search import Verdict, best_method, fewest_float_layers, loss, split
from gnet_opt.sensitivity import LayerCost

MOST_PUT_BACK = 8


def cost(name: str, noise: float, macs: int) -> LayerCost:
    return LayerCost(name=name, macs=macs, noise=noise, agreement=100.0)


@st.composite
def additive(draw: st.DrawFn) -> tuple[list[LayerCost], float]:
    """Layers whose noise adds up, and a budget of it that all layers in INT8 exceed."""
    noises = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=64))
    macs = draw(st.lists(st.integers(0, 10**8), min_size=len(noises), max_size=len(noises)))
    budget = draw(st.integers(0, 1000))
    assume(sum(noises) > budget)
    names = draw(st.permutations(range(len(noises))))
    costs = [cost(f"layer{n}", float(x), m) for n, x, m in zip(names, noises, macs, strict=True)]
    return costs, float(budget)


class Budget:
    """Whether what is left in INT8 adds little enough noise; remembers what was asked."""

    def __init__(self, costs: list[LayerCost], budget: float) -> None:
        self.costs = costs
        self.budget = budget
        self.asked: list[frozenset[str]] = []

    def allows(self, kept: frozenset[str]) -> bool:
        return sum(c.noise for c in self.costs if c.name not in kept) <= self.budget

    def __call__(self, kept: frozenset[str]) -> bool:
        self.asked.append(kept)
        return self.allows(kept)


@given(additive())
def test_the_layers_kept_meet_the_budget(drawn: tuple[list[LayerCost], float]) -> None:
    costs, budget = drawn
    passes = Budget(costs, budget)
    kept = fewest_float_layers(costs, passes)
    assert passes.allows(kept)
    assert kept <= {c.name for c in costs}
    # A result other than "all" was measured itself, so that it can ship.
    assert kept in passes.asked or len(kept) == len(costs)
    # All in INT8 was measured before, and all in float needs no measurement.
    assert frozenset() not in passes.asked
    assert frozenset(c.name for c in costs) not in passes.asked
    assert len(set(passes.asked)) == len(passes.asked)
    most = 2 * math.ceil(math.log2(len(costs) + 1)) + 1 + MOST_PUT_BACK
    assert len(passes.asked) <= most


@given(additive())
def test_no_kept_layer_that_was_tried_could_be_in_int8(
    drawn: tuple[list[LayerCost], float],
) -> None:
    costs, budget = drawn
    passes = Budget(costs, budget)
    kept = fewest_float_layers(costs, passes)
    macs = {c.name: c.macs for c in costs}
    order = sorted(costs, key=lambda c: (-c.noise / max(c.macs, 1), c.name))
    least = next(
        count
        for count in range(1, len(costs) + 1)
        if passes.allows(frozenset(c.name for c in order[:count]))
    )
    beginning = [c.name for c in order[:least]]
    assert kept <= set(beginning)
    # The last of the shortest beginning is needed, and of the others the eight largest were tried.
    tried = sorted(beginning[:-1], key=lambda name: (-macs[name], name))[:MOST_PUT_BACK]
    for name in {*tried, beginning[-1]} & kept:
        assert not passes.allows(kept - {name})


@given(st.lists(st.integers(0, 10**8), min_size=1, max_size=64, unique=True))
def test_all_layers_where_nothing_less_passes(macs: list[int]) -> None:
    costs = [cost(f"layer{i}", 1.0, m) for i, m in enumerate(macs)]
    asked = []

    def never(kept: frozenset[str]) -> bool:
        asked.append(kept)
        return False

    assert fewest_float_layers(costs, never) == {c.name for c in costs}
    assert all(0 < len(kept) < len(costs) for kept in asked)


def one_of(*names: str) -> Callable[[frozenset[str]], bool]:
    return lambda kept: set(names) <= kept


def test_the_one_layer_that_ruins_the_network_stays_in_float() -> None:
    costs = [cost(f"layer{i:02}", 1e-4, 1000 * (i + 1)) for i in range(58)]
    costs[30] = cost("layer30", 0.9, costs[30].macs)
    asked = []

    def passes(kept: frozenset[str]) -> bool:
        asked.append(kept)
        return "layer30" in kept

    assert fewest_float_layers(costs, passes) == {"layer30"}
    assert asked == [{"layer30"}]


def test_a_layer_that_costs_much_for_its_work_comes_first() -> None:
    # Twice the noise for ten times the work: the small one is tried first.
    costs = [cost("large", 2.0, 1000), cost("small", 1.0, 100), cost("other", 0.1, 100)]
    assert fewest_float_layers(costs, one_of("small")) == {"small"}
    # What the small one does not bring alone is put back where it is not needed after all.
    assert fewest_float_layers(costs, one_of("large")) == {"large"}


def test_the_largest_are_put_back_first() -> None:
    costs = [cost("a", 1.0, 1), cost("b", 90.0, 100), cost("c", 80.0, 100), cost("d", 1.0, 10)]
    passes = Budget(costs, 2.5)
    # For each multiply-accumulate a costs most, but b and c alone are enough.
    assert fewest_float_layers(costs, passes) == {"b", "c"}
    assert passes.asked == [{"a"}, {"a", "b"}, {"a", "b", "c"}, {"a", "c"}, {"b", "c"}]


def test_one_layer_alone() -> None:
    assert fewest_float_layers([cost("a", 1.0, 1)], one_of("nothing")) == {"a"}


def verdict(sqnr_db: float, agreement: float) -> Verdict:
    return Verdict(sqnr_db=sqnr_db, agreement=agreement)


def test_the_greatest_sqnr_wins_where_agreement_is_near() -> None:
    # Of 64 pictures, one is 1.5625 %.
    verdicts = {
        "minmax": verdict(21.0, 100.0),
        "mse": verdict(24.0, 98.4375),
        "entropy": verdict(26.0, 96.875),
    }
    assert best_method(verdicts, 64) == "mse"
    assert best_method(verdicts, 32) == "entropy"
    assert best_method({"a": verdict(math.inf, 100.0), "b": verdict(90.0, 100.0)}, 8) == "a"
    assert best_method({"a": verdict(20.0, 50.0), "b": verdict(20.0, 50.0)}, 8) == "a"


@given(
    st.dictionaries(
        st.sampled_from(["entropy", "lp", "minmax", "mse", "percentile"]),
        st.tuples(st.floats(-20, 60), st.integers(0, 25)),
        min_size=1,
    )
)
def test_the_best_method_is_beaten_by_none(drawn: dict[str, tuple[float, int]]) -> None:
    verdicts = {m: verdict(sqnr, 100.0 * hits / 25) for m, (sqnr, hits) in drawn.items()}
    chosen = best_method(verdicts, 25)
    most = max(hits for _, hits in drawn.values())
    assert drawn[chosen][1] >= most - 1
    for sqnr, hits in drawn.values():
        assert sqnr <= drawn[chosen][0] or hits < most - 1


def test_a_verdict_in_a_manifest() -> None:
    assert verdict(20.5, 99.0).to_dict() == {"agreement": 99.0, "sqnr_db": 20.5}
    assert verdict(math.inf, 100.0).to_dict() == {"agreement": 100.0, "sqnr_db": None}


def test_what_is_lost_on_images_held_back() -> None:
    measured = {"agreement": 96.0, "drop": None}
    assert loss(measured) == pytest.approx(4.0)
    # Labels tell more: an answer that changed may have been wrong before.
    assert loss({**measured, "drop": {"ci95": [-1.0, 9.0], "value": 2.0}}) == 2.0


@pytest.mark.parametrize("count", [1, 4, 5, 40, 128])
def test_every_fifth_picture_is_held_back(count: int) -> None:
    files = tuple(Path(f"{i}.png") for i in range(count))
    contents = {path: path.name for path in files}
    images = ImageSet(name="x", files=files, labels=tuple(range(count)), known_hashes=contents)
    fit, held = split(images)
    assert held.files == files[4::5]
    assert held.labels == tuple(range(4, count, 5))
    assert sorted([*fit.files, *held.files], key=files.index) == list(files)
    assert not set(fit.files) & set(held.files)
    assert len(held) == count // 5


def test_copies_of_a_picture_are_not_on_both_sides() -> None:
    contents = "aabcdbefaaghijee"
    files = tuple(Path(f"{index}.png") for index in range(len(contents)))
    hashes = dict(zip(files, contents, strict=True))
    fit, held = split(ImageSet(name="x", files=files, known_hashes=hashes))
    assert held.hashes == ("e", "j", "e", "e")
    assert not set(fit.hashes) & set(held.hashes)
    assert len(fit) + len(held) == len(files)


def test_noise_and_decibels() -> None:
    assert cost("a", 0.01, 1).sqnr_db == pytest.approx(20.0)
    assert cost("a", 0.0, 1).sqnr_db is None
    assert np.isfinite(cost("a", 1e-300, 1).sqnr_db or 0.0)
