"""`--method auto` and `--precision auto`: what is measured, and what ships because of it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Done, content, gnet_opt, marked, started
from torchvision.models import GoogLeNet
from world import World, draw, label

import networks
from gnet_opt import choice, decision, paths, pipeline, quantizer, scoring
from gnet_opt.bench import latency
from gnet_opt.bench.latency import LatencyReport
from gnet_opt.bundle import Bundle
from gnet_opt.decision import SAME
from gnet_opt.images import ImageSet
from gnet_opt.machine import this_machine
from gnet_opt.preprocess import Preprocess
from gnet_opt.quantization import METHODS
from gnet_opt.quantization.describe import describe
from gnet_opt.stages.load import load
from gnet_opt.target import find
from latencies import made_up

NATIVE = pytest.mark.skipif(
    this_machine().architecture != "x86_64", reason="no x86-64, so that no target has alternatives"
)


def quantize(card: Path, world: World, evaluation: Path, *more: str | Path) -> Done:
    sets = ["--calibration", world.calibration, "--eval", evaluation, "--threads", "1"]
    return gnet_opt("quantize", card, *sets, *more)


def float_layers(model: Path) -> list[str]:
    return [layer["name"] for layer in describe(model)["layers"] if layer["precision"] == "float"]


def timed(speed: Callable[[str], float]) -> Callable[..., LatencyReport]:
    """A latency measurement with made-up results: so many times as fast as float."""

    def measure(subjects: Sequence[Any], batch: Any, *plan: Any, **rest: Any) -> LatencyReport:
        results = tuple(
            made_up(
                subject.name,
                subject.artifact.backend,
                *[[round(1e7 / speed(subject.name))] * 2] * 2,
            )
            for subject in subjects
        )
        return LatencyReport(results=results, threads=1, shape=tuple(batch.shape))

    return measure


# --- --method auto ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures to calibrate on, the fewest from which a method is chosen."""
    folder = tmp_path_factory.mktemp("forty") / "calibration"
    draw(folder, 40, seed=7)
    return folder


def test_the_method_is_chosen_before_an_evaluation_picture_is_seen(
    world: World, forty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    load, choose = Preprocess.load_pixels, quantizer.best_method

    def spy(self: Preprocess, path: Path) -> Any:
        events.append(path.parent.name)
        return load(self, path)

    def choosing(*arguments: Any) -> str:
        events.append("choice")
        return choose(*arguments)

    monkeypatch.setattr(Preprocess, "load_pixels", spy)
    monkeypatch.setattr(quantizer, "best_method", choosing)
    sets = ["--calibration", forty, "--eval", world.evaluation, "--threads", "1"]
    more = ["--method", "auto", "--max-drop", "50", "--no-cache", "-o", tmp_path / "b"]
    done = gnet_opt("quantize", world.small, "-t", "jetson", *sets, *more)
    assert done.code == 0, done.err
    assert events.count("choice") == 1
    before = events[: events.index("choice")]
    assert set(before) == {"calibration"}
    assert events.count("evaluation") == 16
    facts = Bundle.open(tmp_path / "b").manifest["facts"]
    assert facts["method"]["images"] == 8
    assert sorted(facts["method"]["verdicts"]) == sorted(METHODS)
    assert facts["calibrate"]["images"] == 40
    assert facts["calibrate"]["method"] == facts["method"]["chosen"]
    assert (
        Bundle.open(tmp_path / "b").manifest["calibration"]["method"] == facts["method"]["chosen"]
    )
    assert f"Ranges are chosen by {facts['method']['chosen']}: " in done.err


def test_other_evaluation_pictures_give_the_same_file(
    world: World, forty: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    draw(other, 16, seed=99)
    label(other, world.small)
    made = []
    for name, evaluation in (("one", ["--eval", world.evaluation]), ("two", ["--eval", other])):
        sets = ["--calibration", forty, *evaluation, "--threads", "1"]
        more = ["--method", "auto", "--max-drop", "100", "-o", tmp_path / name]
        assert gnet_opt("quantize", world.small, "-t", "jetson", *sets, *more).code == 0
        bundle = Bundle.open(tmp_path / name)
        made.append((bundle.model.read_bytes(), bundle.manifest["facts"]["method"]))
    assert made[0] == made[1]
    digests = [Bundle.open(tmp_path / n).manifest["accuracy"]["digest"] for n in ("one", "two")]
    assert digests[0] != digests[1]


# --- --precision auto ----------------------------------------------------------------------------


def forbidden(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("sensitivity was measured")


@NATIVE
def test_all_candidates_are_measured_and_the_fastest_ships(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer, "measure", forbidden)  # INT8 is within the budget
    out = tmp_path / "b"
    auto = ["--precision", "auto", "--max-drop", "50", "-t", "cpu"]
    done = quantize(world.small, world, world.evaluation, *auto, "-o", out)
    assert done.code == 0, done.err
    manifest = Bundle.open(out).manifest
    decision = manifest["decision"]
    rows = {row["name"]: row for row in decision["candidates"]}
    assert list(rows) == [
        "int8 on openvino",
        "int8 on onnxruntime",
        "fp32 on openvino",
        "fp32 on onnxruntime",
    ]
    speed = {name: row["latency"]["speedup"]["median"] for name, row in rows.items()}
    # The first of those that are as fast as the fastest, but for noise.
    best = next(name for name in speed if speed[name] >= (1.0 - SAME) * max(speed.values()))
    assert decision["ships"] == best
    for name, row in rows.items():
        assert row["ships"] == (name == best) == (row["why_not"] == "")
        assert row["accuracy"]["images"] == 16
        assert row["accuracy"]["semantics"] == "native"
        assert row["latency"]["backend"] == row["backend"]
        assert row["latency"]["n"] >= 4
        assert row["float_layers"] == []
        assert row["macs_int8_share"] == (1.0 if row["precision"] == "int8" else 0.0)
        if name != best:
            assert best in row["why_not"]
    shipped = rows[best]
    assert manifest["precision"] == shipped["precision"]
    assert manifest["target"]["backend"] == shipped["backend"]
    assert manifest["accuracy"] == shipped["accuracy"]
    assert manifest["latency"]["results"]["quantized"] == {
        key: value for key, value in shipped["latency"].items() if key != "speedup"
    }
    text = " ".join(done.out.split())
    assert "candidates" in text
    for name in rows:
        assert name in text
    assert "speed against float" in text
    assert " ships " in text
    assert decision["reason"] in text
    assert gnet_opt("verify", out, "--threads", "1").code == 0


@NATIVE
def test_the_alternative_ships_where_it_is_faster(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"float": 1.0, "int8 on openvino": 1.5, "int8 on onnxruntime": 2.5}
    monkeypatch.setattr(latency, "measure", timed(lambda name: speeds.get(name, 1.1)))
    out = tmp_path / "b"
    auto = ["--precision", "auto", "--max-drop", "50", "-t", "cpu"]
    done = quantize(world.small, world, world.evaluation, *auto, "-o", out)
    assert done.code == 0, done.err
    made = Bundle.open(out)
    target = find("cpu")
    assert made.manifest["precision"] == "int8"
    assert made.manifest["target"]["name"] == target.name
    assert made.manifest["target"]["backend"] == "onnxruntime"
    assert made.manifest["scheme"] == target.alternatives["onnxruntime"].to_dict()
    assert made.manifest["decision"]["reason"] == (
        "INT8 on onnxruntime ships: the fastest within the budget, 2.50 times as fast as float."
    )
    assert "Latency: float by openvino, int8 by onnxruntime, batch 1" in done.out
    # It is an ordinary bundle of the other backend.
    assert "xml" not in {entry["path"].rpartition(".")[2] for entry in made.manifest["artifacts"]}
    verified = gnet_opt("verify", out, "--threads", "1", "--json")
    assert (verified.code, verified.json["backend"]) == (0, "onnxruntime")
    assert not verified.json["foreign"]
    scored = gnet_opt(
        "evaluate", out, "--images", world.evaluation, "--json", "--threads", "1"
    ).json
    assert (scored["backend"], scored["semantics"]) == ("onnxruntime", "native")
    assert scored["top1"] == made.manifest["accuracy"]["quantized"]["top1"]
    assert f"{target.name}, backend onnxruntime" in gnet_opt("inspect", out).out
    assert gnet_opt("compile", out).code == 0


@NATIVE
def test_int8_that_is_slower_than_float_does_not_ship(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"float": 1.0, "fp32 on onnxruntime": 0.9}
    slow = timed(lambda name: speeds.get(name, 0.5))
    monkeypatch.setattr(latency, "measure", slow)
    auto = ["--precision", "auto", "--max-drop", "50", "-t", "cpu"]
    done = quantize(world.small, world, world.evaluation, *auto, "-o", tmp_path / "auto")
    assert done.code == 0, done.err
    manifest = Bundle.open(tmp_path / "auto").manifest
    assert (manifest["precision"], manifest["scheme"]) == ("fp32", None)
    reason = (
        "INT8 does not ship: it is not the fastest here (0.50 times as fast as float). Float on "
        "openvino ships: the fastest within the budget."
    )
    assert manifest["decision"]["reason"] == reason
    assert reason in done.err
    assert reason in manifest["notes"]
    # Who asks for INT8 gets it, and is told.
    asked = ["--max-drop", "50", "-t", "cpu", "-o", tmp_path / "int8"]
    done = quantize(world.small, world, world.evaluation, *asked)
    assert done.code == 0
    note = "INT8 is not faster than float here (0.50 times as fast). --precision auto would ship "
    assert f"{note}float." in done.err


@NATIVE
def test_two_ruined_backends_get_layers_in_float_each(
    world: World, plenty: Path, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    auto = ["--precision", "auto", "-t", "cpu", "--json", "--calibration", plenty]
    done = quantize(world.ruined, world, world.ruined_evaluation, *auto, "-o", out)
    assert done.code == 0, done.err
    rows = {row["name"]: row for row in done.json["manifest"]["decision"]["candidates"]}
    assert len(rows) == 6
    for backend in ("openvino", "onnxruntime"):
        refused, mixed = rows[f"int8 on {backend}"], rows[f"mixed on {backend}"]
        assert refused["why_not"].startswith("INT8 loses ")
        assert refused["latency"] is None
        assert mixed["float_layers"] == ["fc"]
        assert mixed["accuracy"]["drop"]["value"] <= 1.0
        assert mixed["latency"]["p50_ms"] > 0.0
    assert "sensitivity" in done.json["seconds"]


def test_only_the_ruined_layer_stays_in_float(world: World, plenty: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    auto = ["--precision", "auto", "-t", "raspberry-pi-5", "--calibration", plenty]
    done = quantize(world.ruined, world, world.ruined_evaluation, *auto, "-o", out)
    assert done.code == 0, done.err
    made = Bundle.open(out)
    made.check()
    assert made.manifest["precision"] == "mixed"
    assert made.manifest["scheme"] == find("raspberry-pi-5").scheme.to_dict()
    assert float_layers(made.model) == ["fc"]
    facts = made.manifest["facts"]
    assert facts["quantize"]["float_layers"] == 1
    assert list(facts["kept_in_float"]) == ["fc"]
    assert facts["search"] == {
        "images": 24,
        "labels": False,
        "loss": 0.0,
        "loss_int8": pytest.approx(100.0 * 8 / 24),
        "semantics": "reference",
        "tried": 2,
    }
    assert facts["calibrate"]["images"] == 120  # what ships is fitted to all of them
    kept = facts["kept_in_float"]["fc"]
    assert kept["macs"] == 32 * 5
    assert kept["sqnr_db"] < 10.0
    rows = {row["name"]: row for row in made.manifest["decision"]["candidates"]}
    assert rows["mixed on onnxruntime"]["float_layers"] == ["fc"]
    assert rows["mixed on onnxruntime"]["ships"]
    assert rows["int8 on onnxruntime"]["accuracy"]["drop"]["value"] > 1.0
    assert made.manifest["accuracy"]["drop"]["value"] <= 1.0
    assert "mixed on onnxruntime keeps in float: fc." in done.out
    inspected = gnet_opt("inspect", out)
    assert inspected.code == 0
    assert re.search(r"^ *fc +Gemm +float", inspected.out, re.MULTILINE)
    assert "With 1 layer in float (0.0 % of the multiply-accumulates)" in done.err
    assert gnet_opt("verify", out, "--threads", "1").code == 0
    images = ["--images", world.ruined_evaluation, "--json", "--threads", "1"]
    scored = gnet_opt("evaluate", out, *images).json
    assert scored["semantics"] == "reference"
    assert scored["top1"] == made.manifest["accuracy"]["quantized"]["top1"]


READERS = ["inception.branch2.1.conv", "inception.branch3.1.conv", "fc"]
"""The layers that read the channels of `hostile` that are out of line."""


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ("jetson", READERS),
        # There the result of a layer has integers, too, though the average that reads it has none.
        ("raspberry-pi-5", [*READERS, "inception.branch1.conv"]),
    ],
)
def test_channels_out_of_line_stay_in_float_where_nothing_repairs_them(
    world: World,
    plenty: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    kept: list[str],
) -> None:
    monkeypatch.setattr("gnet_opt.quantization.equalize.equalize", lambda *arguments: None)
    out = tmp_path / "b"
    auto = ["--precision", "auto", "--max-drop", "1", "-t", target, "-o", out]
    auto += ["--calibration", str(plenty)]
    done = quantize(world.hostile, world, world.evaluation, *auto)
    assert done.code == 0, done.err
    made = Bundle.open(out)
    assert made.manifest["precision"] == "mixed"
    assert sorted(float_layers(made.model)) == sorted(kept)
    assert sorted(made.manifest["facts"]["kept_in_float"]) == sorted(kept)
    assert made.manifest["accuracy"]["drop"]["value"] <= 1.0
    assert made.manifest["accuracy"]["sqnr_db"] > 20.0
    assert gnet_opt("verify", out, "--threads", "1").code == 0


Scored = list[tuple[str, str, int | None]]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Scored:
    """What was scored: candidate, set, and the calibration images that its ranges are fitted to."""
    found: Scored = []
    real = scoring.Scorer.score

    def spy(self: Any, candidates: Sequence[Any], images: ImageSet | None) -> Any:
        for candidate in candidates:
            fitted = candidate.facts.get("calibrate", {}).get("images")
            found.append((candidate.name, images.name if images else "", fitted))
        return real(self, candidates, images)

    monkeypatch.setattr(scoring.Scorer, "score", spy)
    return found


def test_evaluation_images_are_seen_by_the_gate_alone_and_once(
    world: World, plenty: Path, tmp_path: Path, scored: Scored
) -> None:
    auto = ["--precision", "auto", "-t", "arm64", "--calibration", plenty, "-o", tmp_path / "b"]
    done = quantize(world.hostile, world, world.evaluation, *auto, "--method", "auto")
    assert done.code == 0, done.err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gnet_opt.quantization.equalize.equalize", lambda *arguments: None)
        done = quantize(world.hostile, world, world.evaluation, *auto, "--force")
    assert done.code == 0, done.err
    assert Bundle.open(tmp_path / "b").manifest["precision"] == "mixed"
    gate = [(name, fitted) for name, images, fitted in scored if images == "evaluation"]
    int8, whole, mixed = (f"{precision} on onnxruntime" for precision in ("int8", "fp32", "mixed"))
    # The first build needs no layer in float; in the second there is one pick.
    assert gate == [(int8, 120), (whole, None), (int8, 120), (whole, None), (mixed, 120)]
    # Whatever is tried on the way is not fitted to the images that it is tried on.
    tried = [(name, fitted) for name, images, fitted in scored if images == "calibration"]
    assert tried[0] == (int8, 96)
    assert len(tried) > 2
    assert set(tried[1:]) == {(mixed, 96)}
    assert scored[-1] == (mixed, "evaluation", 120)


def test_other_evaluation_images_give_the_same_layers_in_float(
    world: World, plenty: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    draw(other, 16, seed=99)
    label(other, world.ruined)
    models = []
    for name, evaluation in (("one", world.ruined_evaluation), ("two", other)):
        auto = ["--precision", "auto", "-t", "arm64", "--max-drop", "7"]
        auto += ["--calibration", str(plenty)]
        done = quantize(world.ruined, world, evaluation, *auto, "-o", tmp_path / name)
        assert done.code == 0, done.err
        made = Bundle.open(tmp_path / name)
        assert made.manifest["precision"] == "mixed"
        models.append(made.model.read_bytes())
    assert models[0] == models[1]


def test_labels_of_the_images_held_back_count(world: World, plenty: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "labelled"
    shutil.copytree(plenty, calibration)
    label(calibration, world.ruined)
    auto = ["--precision", "auto", "-t", "arm64", "--calibration", calibration]
    done = quantize(world.ruined, world, world.ruined_evaluation, *auto, "-o", tmp_path / "b")
    assert done.code == 0, done.err
    search = Bundle.open(tmp_path / "b").manifest["facts"]["search"]
    assert (search["images"], search["labels"], search["loss"]) == (24, True, 0.0)
    assert search["loss_int8"] > 1.0


def test_a_pick_that_the_gate_refuses_does_not_ship_and_no_other_is_tried(
    world: World, plenty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: Scored
) -> None:
    real = decision.refusal

    def strict(figures: Any, max_drop: float) -> str:
        return "No." if figures.precision == "mixed" else real(figures, max_drop)

    monkeypatch.setattr(decision, "refusal", strict)
    monkeypatch.setattr(choice, "refusal", strict)
    auto = ["--precision", "auto", "-t", "arm64", "--calibration", plenty, "-o", tmp_path / "b"]
    done = quantize(world.ruined, world, world.ruined_evaluation, *auto)
    assert done.code == 0, done.err
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest["precision"] == "fp32"
    (row,) = [r for r in manifest["decision"]["candidates"] if r["precision"] == "mixed"]
    assert (row["why_not"], row["float_layers"]) == ("No.", ["fc"])
    note = (
        "Mixed precision on onnxruntime does not ship, though its choice of layers is within the "
        "budget on the calibration images that were held back: No. No other choice is tried: "
        "evaluation images do not choose."
    )
    assert note in manifest["notes"]
    assert (
        sum(name.startswith("mixed") and images != "calibration" for name, images, _ in scored) == 1
    )


@pytest.mark.parametrize(
    ("count", "why"),
    [
        (12, "on the 2 calibration images that were held back INT8 is within the budget"),
        (4, "4 calibration images are too few to hold some back."),
    ],
)
def test_images_that_do_not_tell_which_layers_to_keep(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, why: str
) -> None:
    monkeypatch.setattr(quantizer, "measure", forbidden)
    auto = ["--precision", "auto", "-t", "arm64", "--samples", str(count), "-o", tmp_path / "b"]
    done = quantize(world.ruined, world, world.ruined_evaluation, *auto)
    assert done.code == 0, done.err
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest["precision"] == "fp32"
    (note,) = [n for n in manifest["notes"] if n.startswith("Mixed precision")]
    assert note.startswith(f"Mixed precision on onnxruntime was not tried: {why}")


@NATIVE
def test_of_equally_fast_candidates_the_most_accurate_ships(
    world: World, plenty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: Scored
) -> None:
    speeds = {"int8 on openvino": 2.0, "int8 on onnxruntime": 2.0, "fp32 on onnxruntime": 1.97}
    monkeypatch.setattr(latency, "measure", timed(lambda name: speeds.get(name, 1.0)))
    auto = ["--precision", "auto", "--max-drop", "50", "-t", "cpu", "--calibration", plenty]
    done = quantize(world.small, world, world.evaluation, *auto, "-o", tmp_path / "b")
    assert done.code == 0, done.err
    decided = Bundle.open(tmp_path / "b").manifest["decision"]
    assert decided["ships"] == "fp32 on onnxruntime"
    rows = {row["name"]: row for row in decided["candidates"]}
    for name in speeds:
        assert rows[name]["held_back"]["images"] == 24
    assert rows["fp32 on openvino"]["held_back"] is None  # slower, so nobody asks
    why = "As fast as fp32 on onnxruntime (within 3 %), and less accurate: "
    assert rows["int8 on openvino"]["why_not"].startswith(why)
    assert "fp32 on onnxruntime is the most accurate of them" in decided["reason"]
    held = [(name, fitted) for name, images, fitted in scored if images == "calibration"]
    assert held == [
        ("int8 on openvino", 96),
        ("int8 on onnxruntime", 96),
        ("fp32 on onnxruntime", None),
    ]


def test_without_labels_no_layer_is_kept_in_float(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer, "measure", forbidden)
    plain = tmp_path / "plain"
    shutil.copytree(world.ruined_evaluation, plain)
    (plain / "labels.csv").unlink()
    auto = ["--precision", "auto", "-t", "jetson", "-o", tmp_path / "b"]
    assert quantize(world.ruined, world, plain, *auto).code == 0
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest["precision"] == "int8"
    assert manifest["accuracy"]["drop"] is None


def test_no_pictures_to_measure_on(world: World, tmp_path: Path) -> None:
    auto = ["--precision", "auto", "-t", "jetson", "-o", tmp_path / "b"]
    done = gnet_opt("quantize", world.small, "--calibration", world.calibration, *auto)
    assert done.code == 0, done.err
    manifest = Bundle.open(tmp_path / "b").manifest
    assert (manifest["precision"], manifest["accuracy"]) == ("int8", None)
    rows = manifest["decision"]["candidates"]
    assert [row["precision"] for row in rows] == ["int8", "fp16", "fp32"]
    assert [row["accuracy"] for row in rows] == [None, None, None]


def test_fp16_ships_where_a_target_has_no_int8(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizer, "measure", forbidden)
    out = tmp_path / "b"
    auto = ["--precision", "auto", "-t", "jetson-nano", "-o", out]
    done = quantize(world.ruined, world, world.ruined_evaluation, *auto)
    assert done.code == 0, done.err
    manifest = Bundle.open(out).manifest
    assert manifest["precision"] == "fp16"
    rows = manifest["decision"]["candidates"]
    assert [(row["precision"], row["ships"]) for row in rows] == [("fp16", True), ("fp32", False)]
    assert manifest["decision"]["reason"] == (
        "FP16 ships: the first within the budget; latency cannot be measured on this machine."
    )
    assert "calibrate" not in manifest["facts"]


def test_fp16_that_overflows_is_left_out(world: World, tmp_path: Path) -> None:
    """The first channel of `wrecked`'s input goes beyond 65504."""
    nano = ["-t", "jetson-nano", "-o", tmp_path / "b", "--precision"]
    asked = quantize(world.wrecked, world, world.wrecked_evaluation, *nano, "fp16")
    assert asked.code == 7
    why = asked.err.splitlines()[-1].removeprefix("gnet-opt: ")
    assert "gives logits that are not finite" in why
    assert why.endswith("FP16 ends at 65504; --precision fp32 has room for larger values.")
    done = quantize(world.wrecked, world, world.wrecked_evaluation, *nano, "auto")
    assert done.code == 0, done.err
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest["precision"] == "fp32"
    assert f"FP16 on tensorrt was left out: {why}" in manifest["notes"]
    assert [row["precision"] for row in manifest["decision"]["candidates"]] == ["fp32"]


# --- the full network ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Demo:
    """The embedded demo model, changed, with a few of its pictures.

    Attributes:
        folder: Where its checkpoints and cards are.
        calibration: Twenty pictures.
        evaluation: Forty others, labelled.
    """

    folder: Path
    calibration: Path
    evaluation: Path

    def card(self, name: str, change: Callable[[GoogLeNet], GoogLeNet]) -> Path:
        """Save the model as a checkpoint with a card."""
        card = paths.demo_card()
        module = load(str(card)).module
        assert isinstance(module, GoogLeNet)
        torch.save(change(module).state_dict(), self.folder / f"{name}.pth")
        text = card.read_text(encoding="utf-8")
        text = text.replace("weights.safetensors", f"{name}.pth").replace(
            "demo-machine-parts", name
        )
        shutil.copy(card.with_name("labels.txt"), self.folder)
        path = self.folder / f"{name}.toml"
        # The rest is how the weights were trained, which these were not.
        path.write_text(text.partition("[training]")[0], encoding="utf-8")
        return path


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    made = Demo(folder, folder / "calibration", folder / "evaluation")
    for source, target, count in (
        (paths.demo_calibration(), made.calibration, 20),
        (paths.demo_evaluation(), made.evaluation, 40),
    ):
        images = ImageSet.open(source).spread(count)
        assert images.labels is not None
        for path, index in zip(images.files, images.labels, strict=True):
            (target / images.classes[index]).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / images.classes[index])
    return made


def build(demo: Demo, card: Path, *more: str | Path) -> Done:
    sets = ["--calibration", demo.calibration, "--eval", demo.evaluation]
    return gnet_opt("quantize", card, *sets, "-t", "raspberry-pi-5", *more)


@pytest.mark.slow
def test_a_hostile_googlenet_is_repaired_without_any_layer_in_float(
    demo: Demo, tmp_path: Path
) -> None:
    card = demo.card("hostile", networks.hostile_googlenet)
    out = tmp_path / "b"
    done = build(demo, card, "--precision", "auto", "--max-drop", "2.5", "-o", out)
    assert done.code == 0, done.err
    made = Bundle.open(out)
    assert made.manifest["precision"] == "int8"
    assert float_layers(made.model) == []
    repair = made.manifest["facts"]["equalize"]
    assert repair["used"]
    assert repair["layers"] == [
        "inception3a.branch1.conv",
        "inception4b.branch2.0.conv",
        "inception5b.branch1.conv",
    ]
    assert repair["channels"] == 7
    assert repair["sqnr_db_after"] >= repair["sqnr_db_before"] + 10
    assert repair["sqnr_db_after"] > 20.0
    accuracy = made.manifest["accuracy"]
    assert accuracy["agreement"] >= 95.0
    assert accuracy["drop"]["value"] <= 2.5
    assert accuracy["sqnr_db"] > 20.0
    assert gnet_opt("verify", out).code == 0


@pytest.mark.slow
def test_the_one_ruined_layer_of_a_googlenet_stays_in_float(demo: Demo, tmp_path: Path) -> None:
    card = demo.card("ruined", networks.ruined_googlenet)
    out = tmp_path / "b"
    done = build(demo, card, "--precision", "auto", "--max-drop", "2.5", "-o", out)
    assert done.code == 0, done.err
    made = Bundle.open(out)
    made.check()
    assert made.manifest["precision"] == "mixed"
    assert float_layers(made.model) == ["conv3.conv"]
    rows = {row["name"]: row for row in made.manifest["decision"]["candidates"]}
    assert rows["int8 on onnxruntime"]["accuracy"]["drop"]["value"] > 50.0
    mixed = rows["mixed on onnxruntime"]
    assert mixed["accuracy"]["drop"]["value"] <= 2.5
    assert mixed["accuracy"]["sqnr_db"] > 25.0
    assert 0.7 < mixed["macs_int8_share"] < 0.8
    assert list(made.manifest["facts"]["kept_in_float"]) == ["conv3.conv"]
    assert gnet_opt("verify", out).code == 0


# --- target files --------------------------------------------------------------------------------

BOARD = """\
name = "board"
summary = "this machine"
backend = "onnxruntime"
compile = "host"
precisions = {precisions}

[match]
architecture = "{architecture}"

[scheme]
activations = "u8"
symmetric = false
weight_bits = 8

[alternatives.{alternative}]

[[evidence]]
claim = "it is so"
source = "measured"
date = "2026-11-23"
"""


def board(
    folder: Path, alternative: str = "openvino", precisions: str = '["int8", "fp32"]'
) -> Path:
    path = folder / "board.toml"
    architecture = this_machine().architecture
    path.write_text(
        BOARD.format(alternative=alternative, architecture=architecture, precisions=precisions)
    )
    return path


def foreign(target: Path) -> Path:
    """The same board with another CPU."""
    here = this_machine().architecture
    other = "aarch64" if here == "x86_64" else "x86_64"
    target.write_text(target.read_text().replace(here, other))
    return target


def test_an_alternative_that_does_not_exist(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = board(tmp_path, "openvno")
    out = tmp_path / "b"
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "build", forbidden)
        more = ["--precision", "auto", "-t", target, "-o", out]
        done = quantize(world.small, world, world.evaluation, *more)
    assert done.code == 2
    assert "There is no backend 'openvno'. Did you mean openvino?" in done.err
    assert not out.exists()
    # The target's own backend needs no other.
    more = ["-t", target, "-o", out, "--max-drop", "50"]
    assert quantize(world.small, world, world.evaluation, *more).code == 0


def test_an_alternative_that_is_not_installed_is_left_out(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    hide = lambda name: None if name == "openvino" else real(name)  # noqa: E731
    monkeypatch.setattr("gnet_opt.backends._boundary.find_spec", hide)
    more = ["--precision", "auto", "-t", board(tmp_path), "--max-drop", "50", "-o", tmp_path / "b"]
    done = quantize(world.small, world, world.evaluation, *more)
    assert done.code == 0, done.err
    note = (
        "openvino was not measured as a candidate: openvino is not installed: pip install "
        '"gnet-opt[openvino]".'
    )
    assert note in done.err
    manifest = Bundle.open(tmp_path / "b").manifest
    assert note in manifest["notes"]
    assert [row["name"] for row in manifest["decision"]["candidates"]] == [
        "int8 on onnxruntime",
        "fp32 on onnxruntime",
    ]


def test_an_alternative_is_not_measured_for_another_machine(world: World, tmp_path: Path) -> None:
    target = foreign(board(tmp_path))
    more = ["--precision", "auto", "-t", target, "--max-drop", "50", "-o", tmp_path / "b"]
    assert quantize(world.small, world, world.evaluation, *more).code == 0
    manifest = Bundle.open(tmp_path / "b").manifest
    assert {row["backend"] for row in manifest["decision"]["candidates"]} == {"onnxruntime"}


def test_a_target_without_float_cannot_fall_back(world: World, tmp_path: Path) -> None:
    target = foreign(board(tmp_path, precisions='["int8"]'))
    out = tmp_path / "b"
    more = ["--precision", "auto", "-t", target, "--max-drop", "0", "-o", out]
    done = quantize(world.wrecked, world, world.wrecked_evaluation, *more)
    assert done.code == 8
    assert re.search(r"gnet-opt: INT8 loses .* The bundle is kept as .*b\.rejected\. ", done.err)
    assert not out.exists()
    Bundle.open(tmp_path / "b.rejected").check()


# --- processes -----------------------------------------------------------------------------------

CRASHING = """
import contextlib, os, shutil
from gnet_opt.runtime import Artifact, Probe

class Crashing:
    name, extra = "crashing", "crashing"

    def probe(self):
        return Probe(available=True, version="1", detail="")

    def compile(self, model, target, out):
        if model != out / "model.onnx":
            shutil.copyfile(model, out / "model.onnx")
        return self.artifact(out)

    def artifact(self, folder):
        path = folder / "model.onnx"
        return Artifact(backend=self.name, path=path, files=(("onnx", path),))

    @contextlib.contextmanager
    def open(self, artifact, *, threads=None):
        os.write(2, b"free(): invalid pointer\\n")
        os.abort()
        yield
"""


def test_a_runtime_that_crashes_takes_nothing_with_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    (package / "crashing-1.dist-info").mkdir(parents=True)
    (package / "crashing-1.dist-info" / "METADATA").write_text("Name: crashing\nVersion: 1\n")
    (package / "crashing-1.dist-info" / "entry_points.txt").write_text(
        "[gnet_opt.backends]\ncrashing = crashing_backend:Crashing\n"
    )
    (package / "crashing_backend.py").write_text(textwrap.dedent(CRASHING))
    monkeypatch.syspath_prepend(package)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package), os.environ["PYTHONPATH"]]))
    folder = tmp_path / "o"
    folder.mkdir()
    more = ["--precision", "auto", "-t", board(tmp_path, "crashing"), "-o", folder / "b"]
    done = quantize(world.small, world, world.evaluation, *more)
    assert done.code == 7
    last = done.err.splitlines()[-1]
    assert last.startswith(
        f"gnet-opt: The worker for int8 on crashing died during 'load' (signal {signal.SIGABRT:d})."
    )
    assert "free(): invalid pointer" in last
    assert content(folder) == {}


@pytest.mark.parametrize(
    "where",
    [
        "gnet_opt.search.Judge.__call__",
        "gnet_opt.sensitivity._compare",
        "gnet_opt.quantizer.measure",
        "gnet_opt.mixed.fewest_float_layers",
        "gnet_opt.bench.accuracy.compare",
        "gnet_opt.choice.decide",
        "gnet_opt.pipeline.publish",
    ],
)
def test_an_interruption_leaves_nothing(
    world: World, forty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr(where, interrupt)
    sets = ["--calibration", forty, "--eval", world.ruined_evaluation, "--threads", "1"]
    auto = ["--precision", "auto", "--method", "auto", "-t", "jetson"]
    out = tmp_path / "o" / "b"
    out.parent.mkdir()
    done = gnet_opt("quantize", world.ruined, *sets, *auto, "-o", out)
    assert done.code == 130
    assert done.err.splitlines()[-1] == "Interrupted. Nothing half-written was left behind."
    assert content(out.parent) == {}
    assert content(temporary) == {}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_layers_are_chosen(
    world: World, plenty: Path, tmp_path: Path, number: signal.Signals
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    out = tmp_path / "o" / "b"
    out.parent.mkdir()
    sets = ["--calibration", plenty, "--eval", world.wrecked_evaluation]
    auto = ["--precision", "auto", "--max-drop", "0", "-t", "cpu", "-o", out]
    with started("quantize", world.wrecked, *sets, *auto, temporary=temporary) as (process, mark):
        deadline = time.monotonic() + 120
        # The first one with layers in float is written while the search is on. Deeper folders come
        # and go, so none of them is walked through.
        while not list(out.parent.glob(".b.partial-*/mixed-*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert process.pid in marked(mark)
        process.send_signal(number)
        printed, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "Interrupted. Nothing half-written was left behind."
    assert printed == ""
    assert content(out.parent) == {}
    assert [name for name in content(temporary) if "gnet-opt" in name] == []
    assert marked(mark) == []
