"""What each layer costs: measured, kept in a file, resumed and drawn."""

from __future__ import annotations

import importlib.util
import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import networks
from gnet_opt import sensitivity
from gnet_opt.backends.onnxruntime import open_reference
from gnet_opt.errors import BackendError, ConfigError
from gnet_opt.quantization import Recipe, Statistics, calibrate, quantize
from gnet_opt.runtime import run_all
from gnet_opt.sensitivity import LayerCost, SensitivityFile, draw, measure, ranked
from gnet_opt.stages import prepare
from gnet_opt.stages.load import from_module
from gnet_opt.target import Scheme

U8 = Scheme(activations="u8", symmetric=False, weight_bits=8)
LAYERS = [
    "stem.conv",
    "inception.branch1.conv",
    "inception.branch2.0.conv",
    "inception.branch2.1.conv",
    "inception.branch3.0.conv",
    "inception.branch3.1.conv",
    "inception.branch4.1.conv",
    "fc",
]


@dataclass(frozen=True)
class Network:
    """A float network with what calibration saw of it.

    Attributes:
        path: The ONNX file.
        statistics: Of eight pictures.
        pictures: Four others.
        logits: Of the float model on these.
    """

    path: Path
    statistics: Statistics
    pictures: np.ndarray
    logits: np.ndarray


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    path = tmp_path_factory.mktemp("sensitivity") / "float.onnx"
    seen = networks.pictures(8)
    prepare(from_module(networks.small_net()), seen[:2], path)
    pictures = networks.pictures(4, seed=1)
    with open_reference(path, 1) as runner:
        logits = run_all(runner, pictures)
    return Network(path, calibrate(path, seen, threads=1), pictures, logits)


@pytest.fixture(scope="module")
def costs(network: Network) -> list[LayerCost]:
    return measure(network.path, network.statistics, U8, network.pictures)


def noise(network: Network, model: Path) -> float:
    with open_reference(model, 1) as runner:
        logits = run_all(runner, network.pictures)
    return float(((logits - network.logits) ** 2).sum() / (network.logits**2).sum())


def test_every_layer_is_measured_alone(
    network: Network, costs: list[LayerCost], tmp_path: Path
) -> None:
    assert {cost.name for cost in costs} == set(LAYERS)
    assert costs == ranked(costs)
    for cost in costs:
        alone = Recipe(keep_float=frozenset(LAYERS) - {cost.name})
        facts = quantize(network.path, tmp_path / "alone.onnx", network.statistics, U8, alone)
        assert facts["quantize"]["macs_int8_share"] == pytest.approx(
            cost.macs / facts["quantize"]["macs"]
        )
        assert cost.noise == pytest.approx(noise(network, tmp_path / "alone.onnx"), rel=1e-3)
        assert cost.noise > 0.0
        assert cost.sqnr_db == pytest.approx(-10 * math.log10(cost.noise))
        assert 0.0 <= cost.agreement <= 100.0


def test_the_costs_add_up_nearly(network: Network, costs: list[LayerCost], tmp_path: Path) -> None:
    quantize(network.path, tmp_path / "all.onnx", network.statistics, U8)
    together = noise(network, tmp_path / "all.onnx")
    assert together / 3 < sum(cost.noise for cost in costs) < together * 3


def test_the_number_of_jobs_does_not_matter(network: Network, costs: list[LayerCost]) -> None:
    assert measure(network.path, network.statistics, U8, network.pictures, jobs=3) == costs


def test_scheme_and_recipe_matter(network: Network, costs: list[LayerCost]) -> None:
    known = [cost for cost in costs if cost.name != "stem.conv"]

    def stem(scheme: Scheme, **recipe: Any) -> float:
        made = measure(
            network.path,
            network.statistics,
            scheme,
            network.pictures,
            recipe=Recipe(**recipe),
            known=known,
        )
        return next(cost.noise for cost in made if cost.name == "stem.conv")

    before = next(cost.noise for cost in costs if cost.name == "stem.conv")
    assert stem(U8) == before
    assert stem(replace(U8, weight_bits=7)) != before
    assert stem(U8, method="mse") != before
    assert stem(U8, bias_correction=False) != before


def test_known_layers_are_not_measured_again(network: Network, costs: list[LayerCost]) -> None:
    made_up = LayerCost(name="fc", macs=1, noise=123.0, agreement=1.0)
    stranger = LayerCost(name="of another model", macs=1, noise=1.0, agreement=1.0)
    told: list[LayerCost] = []
    shown: list[tuple[str, int | None]] = []

    def progress(items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        shown.append((label, total))
        yield from items

    others = [cost for cost in costs if cost.name not in ("fc", "stem.conv")]
    made = measure(
        network.path,
        network.statistics,
        U8,
        network.pictures,
        known=[made_up, stranger, *others],
        found=told.append,
        progress=progress,
    )
    assert [cost.name for cost in told] == ["stem.conv"]
    assert told[0] in costs
    assert made == ranked([made_up, *others, told[0]])
    assert shown == [("Quantizing one layer alone", 1)]


def test_nothing_is_run_where_all_is_known(
    network: Network, costs: list[LayerCost], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("a model was run")

    monkeypatch.setattr(sensitivity, "_logits", fail)
    again = measure(network.path, network.statistics, U8, network.pictures, known=costs[::-1])
    assert again == costs


def test_a_failure_ends_the_measurement(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sensitivity.quantize
    begun: list[str] = []
    told: list[LayerCost] = []

    def broken(model: Path, out: Path, statistics: Statistics, *rest: Any) -> Any:
        begun.append(out.parent.name)
        if len(begun) == 3:
            raise BackendError("the third one fails")
        return real(model, out, statistics, *rest)

    monkeypatch.setattr(sensitivity, "quantize", broken)
    with pytest.raises(BackendError, match="the third one fails"):
        measure(network.path, network.statistics, U8, network.pictures, found=told.append)
    # What was measured before is told; of what waited no more than one layer begins.
    assert len(told) == 2
    assert len(begun) <= 4


def test_logits_that_are_all_zero(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = np.zeros((4, 5), np.float32)
    monkeypatch.setattr(sensitivity, "_logits", lambda *arguments: zeros)
    with pytest.raises(BackendError, match="All logits of the float model are zero"):
        measure(network.path, network.statistics, U8, network.pictures)


# --- the file ------------------------------------------------------------------------------------

HEAD = {"graph": "ab12", "images": {"digest": "77", "images": 4}, "semantics": "reference"}
ONE = LayerCost(name="conv1", macs=10, noise=0.001, agreement=99.5)
TWO = LayerCost(name="conv2", macs=20, noise=0.0, agreement=100.0)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_costs_are_written_as_they_are_found(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "costs.jsonl"
    file = SensitivityFile(path, HEAD)
    assert file.open() == []
    assert len(lines(path)) == 1
    file.add(TWO)
    assert lines(path)[1:] == [TWO.to_dict()]
    file.add(ONE)
    head, *rest = lines(path)
    assert head == {**HEAD, "key": head["key"], "schema": "gnet-opt/sensitivity/1"}
    assert rest == [TWO.to_dict(), ONE.to_dict()]
    assert rest[0]["sqnr_db"] is None
    assert rest[1]["sqnr_db"] == pytest.approx(30.0)
    file.finish([ONE, TWO])
    assert lines(path) == [head, ONE.to_dict(), TWO.to_dict()]
    assert SensitivityFile(path, HEAD).open() == [ONE, TWO]


@given(cut=st.integers(1, 200))
def test_a_last_line_that_is_not_whole_is_dropped(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "costs.jsonl"
    file = SensitivityFile(path, HEAD)
    file.open()
    file.add(ONE)
    whole = path.read_bytes()
    file.add(TWO)
    last = len(path.read_bytes()) - len(whole)
    path.write_bytes(path.read_bytes()[: len(whole) + min(cut, last) - 1])
    again = SensitivityFile(path, HEAD)
    # Without its newline a line is whole all the same.
    assert again.open() == ([ONE] if cut < last else [ONE, TWO])
    if cut < last:
        assert path.read_bytes() == whole
    again.add(TWO)
    assert lines(path)[1:] in (
        [ONE.to_dict(), TWO.to_dict()],
        [ONE.to_dict(), *[TWO.to_dict()] * 2],
    )
    # A layer that stands there twice counts once.
    assert SensitivityFile(path, HEAD).open() == [ONE, TWO]


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        '"a text"',
        "5",
        "{}",
        '{"agreement": 1, "macs": 1, "name": "x", "noise": NaN}',
        '{"agreement": Infinity, "macs": 1, "name": "x", "noise": 1}',
        '{"agreement": 1, "macs": null, "name": "x", "noise": 1}',
    ],
)
def test_a_line_that_is_no_cost_is_measured_again(tmp_path: Path, line: str) -> None:
    path = tmp_path / "costs.jsonl"
    SensitivityFile(path, HEAD).open()
    with path.open("a") as stream:
        stream.write(line + "\n")
    SensitivityFile(path, HEAD).add(ONE)
    assert SensitivityFile(path, HEAD).open() == [ONE]
    assert lines(path)[1:] == [ONE.to_dict()]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({**HEAD, "graph": "cd34"}, "graph"),
        ({**HEAD, "graph": "cd34", "recipe": {"method": "lp"}}, "graph, recipe"),
        ({"graph": "ab12", "semantics": "reference"}, "images"),
    ],
)
def test_another_measurement_is_not_mixed_in(
    tmp_path: Path, other: dict[str, Any], named: str
) -> None:
    path = tmp_path / "costs.jsonl"
    first = SensitivityFile(path, HEAD)
    first.open()
    first.add(ONE)
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        SensitivityFile(path, other).open()
    assert str(caught.value) == (
        f"{path} has other measurements: {named} differ. Pass --force to replace it, or another "
        "--output."
    )
    assert path.read_bytes() == before
    assert SensitivityFile(path, other).open(force=True) == []
    assert len(lines(path)) == 1
    # --force does not throw away what is the same measurement.
    second = SensitivityFile(path, other)
    second.add(TWO)
    assert second.open(force=True) == [TWO]


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe", b"# notes", b"[1]", b'{"schema": "gnet-opt/sensitivity/2"}']
)
@pytest.mark.parametrize("force", [True, False])
def test_what_is_no_sensitivity_file_is_not_replaced(
    tmp_path: Path, data: bytes, force: bool
) -> None:
    path = tmp_path / "costs.jsonl"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"is no sensitivity file of this version \(.*\)\. Choo"):
        SensitivityFile(path, HEAD).open(force=force)
    assert path.read_bytes() == data


FINITE = st.floats(0, 1e300)


@given(
    st.builds(
        LayerCost, name=st.text(), macs=st.integers(0), noise=FINITE, agreement=st.floats(0, 100)
    )
)
def test_a_cost_comes_back_as_it_was(cost: LayerCost) -> None:
    assert LayerCost.from_dict(json.loads(json.dumps(cost.to_dict()))) == cost


def test_ranked_by_cost_and_then_by_name() -> None:
    same = replace(ONE, name="a")
    assert [cost.name for cost in ranked([TWO, ONE, same])] == ["a", "conv1", "conv2"]


# --- the picture ---------------------------------------------------------------------------------


def test_the_plot_is_an_svg_with_a_bar_a_layer(tmp_path: Path) -> None:
    costs = [ONE, replace(ONE, name="conv3", noise=5e-4), TWO]
    path = tmp_path / "plot.svg"
    assert draw(costs, path, title="net for board")
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = path.read_text()
    # Letters are drawn as paths, and matplotlib writes what they say as comments.
    for shown in ("conv1", "conv3", "30.0 dB", "33.0 dB", "no error", "net for board"):
        assert f"<!-- {shown}" in text or f"{shown} -->" in text
    draw(costs, tmp_path / "again.svg", title="net for board")
    assert (tmp_path / "again.svg").read_bytes() == path.read_bytes()
    assert sorted(found.name for found in tmp_path.iterdir()) == ["again.svg", "plot.svg"]


def test_names_are_no_formulas(tmp_path: Path) -> None:
    odd = replace(ONE, name="a$\\frac$<&>")
    assert draw([odd], tmp_path / "plot.svg", title="costs $5 & $6")
    ElementTree.parse(tmp_path / "plot.svg")


def test_costs_that_are_all_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert draw([TWO], tmp_path / "plot.svg", title="x")
    assert [str(warning.message) for warning in recwarn] == []


def test_without_matplotlib_nothing_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    hide = lambda name: None if name == "matplotlib" else real(name)  # noqa: E731
    monkeypatch.setattr(sensitivity, "find_spec", hide)
    assert not draw([ONE], tmp_path / "plot.svg", title="x")
    assert list(tmp_path.iterdir()) == []
