from __future__ import annotations

import errno
import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from commands import content, gnet_opt, started
from factories import check_hostile
from world import PREPROCESS, World, draw

from gnet_opt import quantizer
from gnet_opt.bundle import Bundle
from gnet_opt.files import sha256_file
from gnet_opt.golden import Golden
from gnet_opt.quantization import Recipe
from gnet_opt.target import Target, find, shipped

FEW = "Only 12 calibration pictures: ranges may be too narrow. 100 or more are usual."
TRAVELS = (
    "golden.npz in the bundle shows 8 of the 12 calibration images, resized, to whoever gets it. "
    "Use --golden drawn for drawn ones, or --golden FOLDER for others."
)
TARGETS = ["cpu", "openvino-cpu", "raspberry-pi-5", "jetson"]


@pytest.fixture
def quantize(quantize_arguments: list[str]) -> Callable[..., Any]:
    def command(*more: str | Path) -> Any:
        return gnet_opt(*quantize_arguments, *more)

    return command


@pytest.mark.parametrize("target", TARGETS)
def test_the_bundle_of_a_target(bundle: Callable[[str], Path], target: str) -> None:
    made = Bundle.open(bundle(target))
    device = find(target)
    manifest = made.manifest
    assert made.check() >= 2
    assert manifest["target"]["backend"] == device.backend
    assert manifest["target"]["name"] == device.name
    assert manifest["target"]["sha256"] == sha256_file(device.file)
    assert manifest["scheme"] == device.scheme.to_dict()
    assert manifest["precision"] == "int8"
    assert manifest["labels"] == ["ant", "bee", "cat", "dog", "eel"]
    assert manifest["model"]["classes"] == 5
    assert made.preprocess.crop == 64
    assert FEW in manifest["notes"]

    native = device.is_this_machine()
    accuracy = manifest["accuracy"]
    assert accuracy["semantics"] == ("native" if native else "reference")
    assert accuracy["images"] == 16
    assert accuracy["float"]["top1"] == 100.0  # the labels are what the float model says
    low, high = accuracy["drop"]["ci95"]
    assert low <= accuracy["drop"]["value"] <= high
    assert accuracy["sqnr_db"] > 20.0
    assert (manifest["latency"] is not None) == native
    if native:
        assert sorted(manifest["latency"]["results"]) == ["float", "quantized"]
        assert manifest["facts"]["golden"]["runtime_sqnr_db"] > 20.0

    kinds = {entry["path"]: entry["kind"] for entry in manifest["artifacts"]}
    assert {"model.onnx": "onnx", "golden.npz": "golden"}.items() <= kinds.items()
    assert (manifest["deferred"] is not None) == (target == "jetson")
    integers = {"u8": onnx.TensorProto.UINT8, "s8": onnx.TensorProto.INT8}
    model = onnx.load(made.model)
    types = {v.name: v.data_type for v in model.graph.initializer}
    points = {types[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    # Only the network's input has values below zero.
    signed = {integers["s8"]} if device.scheme.signed == "s8" else set()
    assert points == {integers[device.scheme.activations]} | signed
    facts = manifest["facts"]
    assert facts["quantize"]["macs_int8_share"] == 1.0
    assert facts["calibrate"]["images"] == 12
    assert facts["strip"]["modules"] == ["aux"]


@pytest.mark.parametrize("target", TARGETS)
def test_golden_outputs_are_those_of_reference_semantics(
    bundle: Callable[[str], Path], target: str
) -> None:
    from gnet_opt.backends.onnxruntime import open_reference
    from gnet_opt.golden import Golden

    made = Bundle.open(bundle(target))
    golden = Golden.read(made.path("golden"))
    assert len(golden.pixels) == 8
    with open_reference(made.model, 1) as runner:
        for image, logits in zip(
            made.preprocess.normalize(golden.pixels), golden.outputs, strict=True
        ):
            assert np.array_equal(runner.run(image[None])[0], logits)


# --- golden inputs -------------------------------------------------------------------------------


def loaded(folder: Path) -> list[bytes]:
    return [PREPROCESS.load_pixels(path).tobytes() for path in sorted(folder.glob("*.png"))]


def travelling(root: Path) -> list[bytes]:
    return [pixels.tobytes() for pixels in Golden.read(root / "golden.npz").pixels]


def test_the_images_in_the_bundle_are_named_and_spread(
    bundle: Callable[[str], Path], world: World, quantize: Callable[..., Any], tmp_path: Path
) -> None:
    root = bundle("jetson")
    manifest = Bundle.open(root).manifest
    assert (
        manifest["golden"].items()
        >= {
            "images": 8,
            "set": "calibration",
            "source": "calibration",
        }.items()
    )
    assert TRAVELS in manifest["notes"]
    found, calibration = travelling(root), loaded(world.calibration)
    assert len(set(found)) == 8
    assert set(found) < set(calibration)
    # Not the first ones: one of each part of the set.
    assert set(found) != set(calibration[:8])
    assert "8 inputs, of calibration (calibration)" in " ".join(
        gnet_opt("inspect", root).out.split()
    )


def test_drawn_inputs_show_nothing_of_the_user(
    world: World, quantize: Callable[..., Any], tmp_path: Path
) -> None:
    for target in ("openvino-cpu", "arm64"):
        out = tmp_path / target
        done = quantize("--target", target, "--golden", "drawn", "-o", out)
        assert done.code == 0, done.err
        assert "golden.npz" not in done.err
        manifest = Bundle.open(out).manifest
        expected = {"images": 8, "set": None, "source": "drawn"}
        assert manifest["golden"].items() >= expected.items()
        found = travelling(out)
        assert len(set(found)) == 8
        assert not set(found) & {*loaded(world.calibration), *loaded(world.evaluation)}
        assert manifest["facts"]["golden"]["sqnr_db"] > 20.0
        verified = gnet_opt("verify", out, "--json", "--threads", "1")
        assert verified.code == 0, verified.err
        assert verified.json["golden_images"] == 8
        # Not one answer to all: the logits tell the images apart.
        outputs = Golden.read(out / "golden.npz").outputs
        assert outputs.std(axis=0).max() > 0.1 * np.abs(outputs).max()
        assert "8 inputs, drawn" in " ".join(gnet_opt("inspect", out).out.split())
    assert travelling(tmp_path / "arm64") == travelling(tmp_path / "openvino-cpu")


def test_golden_inputs_of_another_folder(
    world: World, quantize: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "free to give away"
    draw(folder, 3, seed=5)
    done = quantize("--target", "jetson", "--golden", folder, "-o", tmp_path / "b")
    assert done.code == 0, done.err
    golden = Bundle.open(tmp_path / "b").manifest["golden"]
    assert golden.items() >= {"images": 3, "set": folder.name, "source": "folder"}.items()
    assert sorted(travelling(tmp_path / "b")) == sorted(loaded(folder))


def test_golden_inputs_that_cannot_be_used(
    world: World, quantize: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "golden"
    draw(folder, 2, seed=5)
    shutil.copy(world.evaluation / "03.png", folder / "copy.png")
    done = quantize("--target", "jetson", "--golden", folder, "-o", tmp_path / "b")
    assert done.code == 5
    assert "1 of 16 evaluation pictures are golden pictures too" in done.err
    (folder / "copy.png").write_bytes(b"")
    done = quantize("--target", "jetson", "--golden", folder, "-o", tmp_path / "b")
    assert done.code == 5
    assert f"{folder / 'copy.png'} cannot be read as a picture" in done.err
    for none in ("Drawn", ""):  # an unset variable of a shell does not mean the current folder
        done = quantize("--target", "jetson", "--golden", none, "-o", tmp_path / "b")
        assert done.code == 2
        assert f"--golden is '{none}'; it must be a folder of pictures, or the word" in done.err
    assert content(tmp_path / "b") == {}


def test_the_golden_inputs_of_the_demo_have_many_answers() -> None:
    """What the export's proof and the golden SQNR rest on is not one class."""
    import torch

    from gnet_opt import paths, planning
    from gnet_opt.images import ImageSet
    from gnet_opt.stages.load import load

    model = load(None)
    plan = planning.plan(
        model,
        find("jetson"),
        Path("unwritten"),
        calibration=ImageSet.open(paths.demo_calibration(), classes=model.labels),
    )
    pixels = plan.golden.pixels(model.preprocess, plan.options.seed)
    with torch.no_grad():
        logits = model.module(torch.from_numpy(model.preprocess.normalize(pixels)))
    assert len(pixels) == 8
    assert len(set(logits.argmax(1).tolist())) >= 6


def test_the_result_for_people(quantize: Callable[..., Any], tmp_path: Path) -> None:
    done = quantize("--target", "cpu", "-o", tmp_path / "b")
    assert done.code == 0
    found = find("cpu")
    assert f"This machine's CPU is the target {found.name} ({found.file})." in done.err
    assert FEW in done.err
    assert f"small for {found.name}" in done.out
    for row in ("top-1, %", "agreement with float, %", "SQNR", "latency p50, ms", "model, MB"):
        assert row in done.out
    assert f"Bundle: {tmp_path / 'b'}" in re.sub(r"\n(?=\S)", "", done.out).replace(" \n", " ")
    assert "\x1b" not in done.out + done.err


def test_the_result_for_programs(quantize: Callable[..., Any], tmp_path: Path) -> None:
    done = quantize("--target", "jetson", "-o", tmp_path / "b", "--json", "--quiet")
    assert (done.code, done.err) == (0, "")
    assert sorted(done.json) == ["bundle", "manifest", "rejected", "seconds", "sizes"]
    assert done.json["bundle"] == str(tmp_path / "b")
    assert done.json["manifest"] == json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert done.json["rejected"] is None
    assert done.json["sizes"]["quantized"] == (tmp_path / "b" / "model.onnx").stat().st_size


def test_another_ir_is_told_and_recorded(
    quantize: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino._offline_transformations", None)
    done = quantize("--target", "openvino-cpu", "-o", tmp_path / "b")
    assert done.code == 0, done.err
    said = "does not offer its common transformations"
    assert said in done.err
    notes = Bundle.open(tmp_path / "b").manifest["notes"]
    assert len([note for note in notes if said in note]) == 1


def test_the_deferred_build_says_what_to_run(quantize: Callable[..., Any], tmp_path: Path) -> None:
    done = quantize("--target", "jetson", "-o", tmp_path / "b")
    assert done.code == 0
    text = " ".join(done.out.split())
    assert "build_engine.sh runs it, after a look at the compiler's version" in text
    assert "trtexec --onnx=model.onnx" in text
    assert (tmp_path / "b" / "build_engine.sh").stat().st_mode & 0o100


def test_others_can_read_a_bundle_as_they_can_read_other_new_folders(
    quantize: Callable[..., Any], tmp_path: Path
) -> None:
    assert quantize("--target", "jetson", "-o", tmp_path / "b").code == 0
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_dry_run_writes_nothing(
    quantize: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = quantize("--target", "jetson", "--dry-run", "--json")
    assert done.code == 0
    assert content(tmp_path) == {}
    assert done.json == {
        "calibration": {"images": 12, "set": "calibration"},
        "evaluation": {"images": 16, "set": "evaluation"},
        "golden": {"images": 8, "set": "calibration", "source": "calibration"},
        "input": "float32",
        "model": {"classes": 5, "name": "small"},
        "notes": [
            FEW,
            TRAVELS,
            "This machine is not jetson-orin-nano: accuracy is that of reference semantics, and "
            "latency is not measured here.",
        ],
        "output": "small-jetson-orin-nano",
        "precision": "int8",
        "semantics": "reference",
        "target": "jetson-orin-nano",
    }


def test_on_the_device_itself_the_engine_is_still_to_be_built(
    quantize: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Target, "is_this_machine", lambda self: True)
    done = quantize("--target", "jetson", "--dry-run", "--json")
    assert done.json["semantics"] == "reference"
    assert done.json["notes"] == [
        FEW,
        TRAVELS,
        "The engine is still to be built: accuracy is that of reference semantics, and latency is "
        "not measured here.",
    ]


def test_the_default_output_is_named_after_model_and_target(
    quantize: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert quantize("--target", "jetson").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["small-jetson-orin-nano"]


def test_an_existing_bundle_needs_force(quantize: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "b"
    assert quantize("--target", "jetson", "-o", out).code == 0
    (out / "mine.txt").write_text("of the user")
    before = content(tmp_path)
    done = quantize("--target", "raspberry-pi-5", "-o", out)
    assert done.code == 2
    assert done.err.endswith(
        f"gnet-opt: {out} exists already. Pass --force to replace it, or another --output.\n"
    )
    assert content(tmp_path) == before
    assert quantize("--target", "raspberry-pi-5", "-o", out, "--force").code == 0
    assert Bundle.open(out).manifest["target"]["name"] == "raspberry-pi-5"
    Bundle.open(out).check()  # nothing of the old one is left in it
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("kind", ["folder", "file", "other manifest", "rejected"])
def test_force_replaces_bundles_only(
    quantize: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "b"
    precious = tmp_path / "b.rejected" if kind == "rejected" else out
    if kind == "file":
        precious.write_text("precious")
    else:
        precious.mkdir()
        name = "manifest.json" if kind == "other manifest" else "thesis.txt"
        (precious / name).write_text('{"name": "a web application"}')
    before = content(tmp_path)
    done = quantize("--target", "jetson", "-o", out, "--force")
    assert done.code == 2
    assert done.err.endswith(
        f"gnet-opt: {precious} is not a bundle, so it is not replaced. Choose another --output.\n"
    )
    assert content(tmp_path) == before


def test_the_current_folder_is_not_replaced(
    quantize: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = quantize("--target", "jetson", "-o", ".", "--force")
    assert done.code == 2
    assert done.err.endswith("gnet-opt: . cannot be replaced. Choose another --output.\n")
    assert content(tmp_path) == {}


def wrecked(world: World, *more: str | Path) -> Any:
    sets = ["--calibration", world.calibration, "--eval", world.wrecked_evaluation]
    return gnet_opt("quantize", world.wrecked, *sets, "--threads", "1", *more)


def test_the_hostile_model_is_the_same_in_float() -> None:
    assert check_hostile() < 1e-4


@pytest.mark.parametrize("target", ["cpu", "jetson"])
def test_channels_out_of_line_are_put_in_line(world: World, tmp_path: Path, target: str) -> None:
    sets = ["--calibration", world.calibration, "--eval", world.evaluation, "--threads", "1"]
    out = tmp_path / "b"
    done = gnet_opt("quantize", world.hostile, "-t", target, *sets, "--max-drop", "50", "-o", out)
    assert done.code == 0, done.err
    manifest = Bundle.open(out).manifest
    repair = manifest["facts"]["equalize"]
    assert repair["used"]
    assert repair["sqnr_db_before"] < 0.0 < 20.0 < repair["sqnr_db_after"]
    assert f"INT8 goes from {repair['sqnr_db_before']:.1f} to " in done.err
    assert any(note.startswith(f"{repair['channels']} channels of ") for note in manifest["notes"])
    assert manifest["accuracy"]["sqnr_db"] > 20.0
    assert gnet_opt("verify", out, "--threads", "1").code == 0


@pytest.mark.parametrize("target", ["cpu", "jetson"])
def test_the_gate_keeps_a_bad_bundle_aside(world: World, tmp_path: Path, target: str) -> None:
    out, kept = tmp_path / "b", tmp_path / "b.rejected"
    done = wrecked(world, "--target", target, "-o", out)
    assert done.code == 8
    last = done.err.splitlines()[-1]
    assert re.fullmatch(
        r"gnet-opt: INT8 loses \d+\.\d\d points of top-1 \(95 % interval -?\d+\.\d\d to "
        rf"\d+\.\d\d, 16 pictures\); --max-drop allows 1\. The bundle is kept as {kept}\. Let "
        r"--precision auto keep some layers in float, raise --max-drop to accept it, or try more "
        r"calibration pictures\.",
        last,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["b.rejected"]
    made = Bundle.open(kept)
    assert made.check() >= 3
    assert made.manifest["accuracy"]["drop"]["value"] > 1.0
    # A second try takes the place of the first one only when it is asked to.
    again = wrecked(world, "--target", target, "-o", out)
    assert again.code == 2
    assert again.err.endswith(
        f"{kept} exists already. Pass --force to replace it, or another --output.\n"
    )
    assert wrecked(world, "--target", target, "-o", out, "--force").code == 8
    assert [path.name for path in tmp_path.iterdir()] == ["b.rejected"]


def test_a_rejected_bundle_does_not_replace_a_good_one(
    world: World, quantize: Callable[..., Any], tmp_path: Path
) -> None:
    assert quantize("--target", "jetson", "-o", tmp_path / "b").code == 0
    before = content(tmp_path / "b")
    assert wrecked(world, "--target", "jetson", "-o", tmp_path / "b", "--force").code == 8
    assert content(tmp_path / "b") == before


def test_json_tells_of_the_gate(world: World, tmp_path: Path) -> None:
    done = wrecked(world, "--target", "jetson", "-o", tmp_path / "b", "--json")
    assert done.code == 8
    assert done.json["bundle"] == str(tmp_path / "b.rejected")
    assert done.json["rejected"].startswith("INT8 loses ")


def test_the_user_may_accept_a_drop(world: World, tmp_path: Path) -> None:
    done = wrecked(world, "--target", "jetson", "-o", tmp_path / "b", "--max-drop", "100")
    assert done.code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("target", [pytest.param("cpu", marks=pytest.mark.slow), "jetson"])
def test_auto_ships_float_where_nothing_else_is_good(
    world: World, plenty: Path, tmp_path: Path, target: str
) -> None:
    more = ["--precision", "auto", "--max-drop", "0", "--calibration", plenty]
    done = wrecked(world, "--target", target, "-o", tmp_path / "b", *more)
    assert done.code == 0, done.err
    assert "INT8 does not ship: INT8 loses " in done.err
    assert "no choice of layers in float but all of them is within the budget." in done.err
    made = Bundle.open(tmp_path / "b")
    assert made.check() >= 2
    assert (made.manifest["precision"], made.manifest["scheme"]) == ("fp32", None)
    assert {row["precision"] for row in made.manifest["decision"]["candidates"]} == {"int8", "fp32"}
    assert made.manifest["decision"]["reason"] in made.manifest["notes"]
    assert made.manifest["accuracy"]["drop"]["value"] == 0.0
    assert "quantize" not in made.manifest["facts"]
    assert gnet_opt("verify", tmp_path / "b", "--threads", "1").code == 0


def test_float_on_request(quantize: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "b"
    assert quantize("--target", "raspberry-pi-5", "-o", out, "--precision", "fp32").code == 0
    made = Bundle.open(out)
    assert made.manifest["precision"] == "fp32"
    assert made.manifest["golden"]["tolerance"]["sqnr_db"] == 60.0
    assert b"QuantizeLinear" not in made.model.read_bytes()


def failed(world: World, out: Path, *more: str | Path) -> Any:
    """A run that must fail and leave nothing."""
    out.parent.mkdir(exist_ok=True)
    done = gnet_opt("quantize", *more, "-o", out)
    assert content(out.parent) == {}
    assert done.out == ""
    return done


def test_sets_with_a_common_picture(world: World, tmp_path: Path) -> None:
    evaluation = tmp_path / "evaluation"
    shutil.copytree(world.evaluation, evaluation)
    shutil.copyfile(world.calibration / "03.png", evaluation / "05.png")
    arguments = [world.small, "-t", "jetson", "--calibration", world.calibration]
    done = failed(world, tmp_path / "o" / "b", *arguments, "--eval", evaluation)
    assert done.code == 5
    assert done.err.splitlines()[-1] == (
        "gnet-opt: 1 of 16 evaluation pictures are calibration pictures too, for example "
        f"{world.calibration / '03.png'} and {evaluation / '05.png'}. Accuracy measured on them "
        "would be too good. Pass sets without common pictures."
    )


def test_evaluation_without_labels(world: World, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(world.evaluation, plain)
    (plain / "labels.csv").unlink()
    sets = ["--calibration", world.calibration, "--eval", plain]
    out = tmp_path / "b"
    done = gnet_opt("quantize", world.wrecked, "-t", "jetson", *sets, "-o", out)
    assert done.code == 0  # no labels, no gate
    assert (
        "The evaluation pictures have no labels: agreement with the float model is measured, but "
        "the accuracy gate is not applied."
    ) in done.err
    accuracy = Bundle.open(out).manifest["accuracy"]
    assert (accuracy["float"], accuracy["quantized"], accuracy["drop"]) == (None, None, None)
    assert accuracy["agreement"] < 100.0


def test_no_evaluation_at_all(world: World, tmp_path: Path) -> None:
    arguments = ["-t", "jetson", "--calibration", world.calibration, "-o", tmp_path / "b"]
    done = gnet_opt("quantize", world.small, *arguments)
    assert done.code == 0
    assert (
        "Accuracy is not measured and the gate is not applied: pass --eval with labelled pictures "
        "that are not calibration pictures."
    ) in done.err
    assert Bundle.open(tmp_path / "b").manifest["accuracy"] is None


def test_labels_of_another_model(world: World, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(world.evaluation, other)
    (other / "labels.csv").write_text("file,label\n00.png,0\n01.png,5\n")
    arguments = [world.small, "-t", "jetson", "--calibration", world.calibration]
    done = failed(world, tmp_path / "o" / "b", *arguments, "--eval", other)
    assert done.code == 5
    assert done.err.splitlines()[-1] == (
        f"gnet-opt: {other / '01.png'} has label 5, but the model has 5 classes (0..4). "
        "Use labels of the model's own classes."
    )


def test_a_corrupt_calibration_picture(world: World, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(world.calibration, broken)
    (broken / "11.png").write_bytes((broken / "11.png").read_bytes()[:100])
    arguments = [world.small, "-t", "jetson", "--calibration", broken]
    done = failed(world, tmp_path / "o" / "b", *arguments)
    assert done.code == 5
    assert done.err.splitlines()[-1].startswith(
        f"gnet-opt: {broken / '11.png'} cannot be read as a picture ("
    )


def test_ones_own_model_needs_ones_own_calibration(world: World, tmp_path: Path) -> None:
    done = failed(world, tmp_path / "o" / "b", world.small, "-t", "jetson")
    assert done.code == 2
    assert done.err == (
        "gnet-opt: Calibration pictures are missing: pass --calibration with a folder of 100 or "
        "more pictures like those the model will see. Random data would ruin the ranges.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["-t", "jetsn"],
            "There is no target 'jetsn'. Did you mean jetson? `gnet-opt targets` lists them; a "
            "path to a TOML file of your own works too.",
        ),
        (
            ["-t", "jetson-nano"],
            "The target jetson-nano has no int8. Use --precision fp16 or --precision fp32, or "
            "another target; `gnet-opt targets` lists what each of them has.",
        ),
        (
            ["-t", "openvino-cpu", "--precision", "fp16"],
            "The target openvino-cpu has no fp16. Use --precision int8 or --precision fp32, or "
            "another target; `gnet-opt targets` lists what each of them has.",
        ),
        (["-t", "jetson", "--max-drop", "-1"], "--max-drop is -1.0; it must be at least 0."),
        (["-t", "jetson", "--max-drop", "nan"], "--max-drop is nan; it must be at least 0."),
    ],
)
def test_options_that_cannot_be(
    world: World, tmp_path: Path, arguments: list[str], message: str
) -> None:
    sets = ["--calibration", world.calibration]
    done = failed(world, tmp_path / "o" / "b", world.small, *sets, *arguments)
    assert done.code == 2
    assert done.err.splitlines()[-1] == f"gnet-opt: {message}"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-t", "jetson", "--samples", "0"],
        ["-t", "jetson", "--method", "max"],
        ["-t", "jetson", "--nonsense"],
        ["-t", "jetson", "--batch", "2"],
    ],
)
def test_usage_errors_have_the_exit_code_of_options(
    world: World, tmp_path: Path, arguments: list[str]
) -> None:
    done = failed(world, tmp_path / "o" / "b", world.small, *arguments)
    assert done.code == 2
    assert "Usage: gnet-opt quantize" in done.err


def test_a_truncated_checkpoint(world: World, tmp_path: Path) -> None:
    import torch

    import networks

    path = tmp_path / "weights.pth"
    torch.save(networks.torchvision_googlenet(5).state_dict(), path)
    path.write_bytes(path.read_bytes()[:50_000])
    arguments = [path, "-t", "jetson", "--calibration", world.calibration]
    done = failed(world, tmp_path / "o" / "b", *arguments)
    assert done.code == 4
    assert done.err.splitlines()[-1].startswith(f"gnet-opt: {path}")


def test_a_missing_checkpoint(world: World, tmp_path: Path) -> None:
    path = tmp_path / "none.pth"
    arguments = [path, "-t", "jetson", "--calibration", world.calibration]
    done = failed(world, tmp_path / "o" / "b", *arguments)
    assert done.code == 4
    assert str(path) in done.err


def test_a_missing_backend(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    hide = lambda name: None if name == "openvino" else real(name)  # noqa: E731
    monkeypatch.setattr("gnet_opt.backends._boundary.find_spec", hide)
    arguments = [world.small, "-t", "openvino-cpu", "--calibration", world.calibration]
    done = failed(world, tmp_path / "o" / "b", *arguments)
    assert done.code == 3
    assert done.err.splitlines()[-1] == (
        'gnet-opt: openvino is not installed: pip install "gnet-opt[openvino]"'
    )
    # A bundle that is compiled elsewhere does not need the compiler here.
    out = tmp_path / "b"
    jetson = ["-t", "jetson", "--calibration", world.calibration, "-o", out]
    assert gnet_opt("quantize", world.small, *jetson).code == 0


def comparable(root: Path) -> tuple[dict[str, Any], dict[str, bytes | None]]:
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["created"]
    del manifest["latency"]
    slow = "INT8 is not faster than float here"  # a measured time, too
    manifest["notes"] = [note for note in manifest["notes"] if not note.startswith(slow)]
    files = content(root)
    del files["manifest.json"]
    return manifest, files


@pytest.mark.parametrize("target", ["cpu", "raspberry-pi-5", "jetson"])
def test_two_runs_give_equal_bundles(
    quantize: Callable[..., Any], bundle: Callable[[str], Path], tmp_path: Path, target: str
) -> None:
    # The first one may have taken its statistics from the cache.
    assert quantize("--target", target, "-o", tmp_path / "again", "--no-cache").code == 0
    assert comparable(tmp_path / "again") == comparable(bundle(target))


def test_samples_and_seed_decide_what_is_calibrated_on(
    quantize: Callable[..., Any], tmp_path: Path
) -> None:
    digests = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        more = ["--samples", "5", "--seed", seed, "--target", "jetson"]
        assert quantize(*more, "-o", tmp_path / name).code == 0
        made = Bundle.open(tmp_path / name).manifest["calibration"]
        assert (made["images"], made["seed"]) == (5, int(seed))
        digests[name] = made["digest"]
    assert digests["a"] == digests["b"] != digests["c"]


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "where",
    [
        "gnet_opt.quantizer.quantize",
        "gnet_opt.golden.np.savez_compressed",
        "gnet_opt.bundle.write_text",
        "gnet_opt.pipeline.publish",
    ],
)
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["disk full", "ctrl-c"])
@pytest.mark.parametrize("existing", [True, False])
def test_an_interruption_leaves_what_was_there(
    quantize: Callable[..., Any],
    bundle: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: BaseException,
    existing: bool,
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    out = tmp_path / "b"
    if existing:
        shutil.copytree(bundle("jetson"), out)
    before = content(tmp_path)
    monkeypatch.setattr(where, fail)
    done = quantize("--target", "jetson", "-o", out, "--force")
    assert content(tmp_path) == before
    assert done.out == ""
    if error is FULL:
        assert done.code == 1
        assert done.err.splitlines()[-1] == (
            "gnet-opt: No space left on device. Nothing half-written was left behind; free or "
            "choose another place with --output, then run the command again."
        )
    else:
        assert done.code == 130
        assert done.err.splitlines()[-1] == "Interrupted. Nothing half-written was left behind."


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle(
    quantize_arguments: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    temporary, place = tmp_path / "temporary", tmp_path / "place"
    temporary.mkdir()
    place.mkdir()
    arguments = [*quantize_arguments, "-t", "cpu", "-o", place / "b"]
    with started(*arguments, temporary=temporary) as (process, _):
        deadline = time.monotonic() + 120
        # Prepared, so the work goes on behind it.
        while not list(place.glob(".b.partial-*/float.onnx")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert content(place) != {}
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "Interrupted. Nothing half-written was left behind."
    assert out == ""
    assert content(place) == {}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "jetson"])
def test_a_checkpoint_of_the_full_network(world: World, tmp_path: Path, target: str) -> None:
    import torch

    import networks

    torch.save(networks.torchvision_googlenet(5).state_dict(), tmp_path / "weights.pth")
    card = tmp_path / "card.toml"
    card.write_text(
        'name = "full"\narchitecture = "googlenet"\nweights = "weights.pth"\n'
        "[preprocess]\nresize = 72\ncrop = 64\n"
    )
    out = tmp_path / "b"
    sets = ["--calibration", world.calibration, "--eval", world.evaluation]
    more = ["--max-drop", "100", "--threads", "1", "--json", "-o", out]
    done = gnet_opt("quantize", card, "-t", target, *sets, *more)
    assert done.code == 5  # the set's labels are names, and this card lists none
    assert "is neither a class index nor a known class name" in done.err
    card.write_text(
        card.read_text().replace("\n[", '\nlabels = ["ant","bee","cat","dog","eel"]\n[')
    )
    done = gnet_opt("quantize", card, "-t", target, *sets, *more)
    assert done.code == 0, done.err
    facts = done.json["manifest"]["facts"]
    assert facts["strip"]["modules"] == ["aux1", "aux2"]
    assert (facts["quantize"]["conv"], facts["quantize"]["gemm"]) == (57, 1)
    assert facts["quantize"]["macs_int8_share"] == 1.0
    assert facts["quantize"]["shared_scales"] == 22  # 9 Concats, 13 MaxPools
    assert done.json["manifest"]["accuracy"]["sqnr_db"] > 20.0
    assert done.json["sizes"]["float"] > 3.5 * done.json["sizes"]["quantized"]
    assert gnet_opt("verify", out, "--threads", "1").code == 0


def test_every_shipped_target_can_be_planned(world: World, tmp_path: Path) -> None:
    for target in shipped():
        sets = ["--calibration", world.calibration, "--dry-run", "--json"]
        arguments = ["-t", target.name, "--precision", target.precisions[0], *sets]
        done = gnet_opt("quantize", world.small, *arguments, "-o", tmp_path / target.name)
        assert done.code == 0, done.err
        assert done.json["target"] == target.name
    assert content(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "line", "problem"),
    [
        ("jetson", 'tensorrt = "99999999999999.1"', "options.tensorrt is '99999999999999.1'"),
        ("jetson", 'tensorrt = "7.1"', "options.tensorrt is '7.1', but Q/DQ models need"),
        ("jetson", 'tensorrt = "10.3"\nworkspace_mib = "1 GB"', "options.workspace_mib is '1 GB'"),
        ("rtx", 'compute_capabilities = ["8.6", "Ada"]', "options.compute_capabilities is ['8.6'"),
    ],
)
def test_options_of_a_target_are_read_before_the_work(
    name: str, line: str, problem: str, quantize: Callable[..., Any], tmp_path: Path
) -> None:
    shown = next(target for target in shipped() if name in (target.name, *target.aliases))
    first, _, last = shown.file.read_text().partition("[options]\n")
    _, _, last = last.partition("\n")
    path = tmp_path / "board.toml"
    path.write_text(f"{first}[options]\n{line}\n{last}")
    done = quantize("--target", path, "--dry-run", "-o", tmp_path / "b")
    assert (done.code, done.out) == (2, "")
    assert f"{path}: {problem}" in done.err


def test_an_output_that_is_a_link_to_nothing(quantize: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "b").symlink_to(tmp_path / "nowhere")
    done = quantize("--target", "jetson", "-o", tmp_path / "b")
    assert done.code == 2
    assert "is a link to nothing" in done.err


def test_an_unreadable_picture_is_found_before_the_work(
    world: World, quantize: Callable[..., Any], tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(world.calibration, pictures)
    (pictures / "zero.png").write_bytes(b"")
    sets = ["--calibration", pictures, "--eval", world.evaluation]
    done = quantize("--target", "jetson", *sets, "-o", tmp_path / "b", "--dry-run")
    assert done.code == 5
    assert f"{pictures / 'zero.png'} cannot be read as a picture" in done.err


def test_the_method_auto_needs_pictures_to_hold_back(
    quantize: Callable[..., Any], tmp_path: Path
) -> None:
    done = quantize("--target", "jetson", "--method", "auto", "-o", tmp_path / "b")
    assert done.code == 5
    assert done.err.endswith(
        "gnet-opt: The method auto holds back every fifth of the 12 different calibration "
        "pictures to judge by, and needs at least 40. Add pictures, or use --method minmax.\n"
    )
    done = quantize("--target", "jetson", "--method", "entropy", "-o", tmp_path / "b")
    assert done.code == 5
    assert "The method entropy needs at least 16 calibration pictures" in done.err
    # Float needs none of it.
    fp32 = ["--precision", "fp32", "--method", "auto", "-o", tmp_path / "b"]
    assert quantize("--target", "jetson", *fp32).code == 0


@pytest.mark.parametrize(("target", "flag"), [("jetson-nano", True), ("jetson-thor", False)])
def test_fp16(
    quantize: Callable[..., Any], world: World, tmp_path: Path, target: str, flag: bool
) -> None:
    out = tmp_path / "b"
    # Twelve pictures are too few to choose a method by, and here nothing is calibrated.
    half = ["--precision", "fp16", "--method", "auto"]
    done = quantize("--target", target, *half, "--json", "-o", out)
    assert done.code == 0, done.err
    manifest = done.json["manifest"]
    assert (manifest["precision"], manifest["scheme"]) == ("fp16", None)
    assert manifest["facts"]["half"]["float32"] == {"LRN": 1}
    assert manifest["accuracy"]["semantics"] == "reference"
    assert manifest["accuracy"]["drop"]["value"] == 0.0
    assert manifest["accuracy"]["sqnr_db"] > 50.0
    assert manifest["calibration"]["method"] is None
    assert (" --fp16 " in manifest["deferred"]["command"]) == flag
    assert done.json["sizes"]["quantized"] < done.json["sizes"]["float"]
    assert gnet_opt("verify", out, "--threads", "1").code == 0
    inspected = gnet_opt("inspect", out).out
    assert re.search(r"^ *fc +Gemm +fp16", inspected, re.MULTILINE)
    assert re.search(r"^ *precision +fp16 *$", inspected, re.MULTILINE)
    images = ["--images", world.evaluation, "--reference", "--json", "--threads", "1"]
    scored = gnet_opt("evaluate", out, *images).json
    assert scored["top1"] == manifest["accuracy"]["quantized"]["top1"]


def test_the_methods_of_the_command_are_those_of_the_package() -> None:
    from gnet_opt.cli.base import gnet_opt as group
    from gnet_opt.planning import Options
    from gnet_opt.quantization import METHODS

    by_name = {p.name: p for p in group.commands["quantize"].params}
    assert sorted(by_name["method"].type.choices) == sorted(("auto", *METHODS))
    assert by_name["method"].default == Options().method
    for name in ("bias_correction", "max_drop", "precision", "samples", "seed", "weight_search"):
        assert by_name[name].default == getattr(Options(), name), name
    alone = {p.name: p for p in group.commands["sensitivity"].params}
    assert sorted(alone["method"].type.choices) == sorted(METHODS)
    assert alone["method"].default == Options().method


def test_options_of_the_quantizer_reach_it_and_every_file_is_written_once(
    quantize: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: list[Recipe] = []
    real = quantizer.quantize

    def spy(model: Path, out: Path, statistics: Any, scheme: Any, recipe: Recipe) -> Any:
        recipes.append(recipe)
        return real(model, out, statistics, scheme, recipe)

    monkeypatch.setattr(quantizer, "quantize", spy)
    for number, options in enumerate(([], ["--no-bias-correction"], ["--weight-search"])):
        done = quantize("--target", "jetson", *options, "--json", "-o", tmp_path / str(number))
        assert done.code == 0, done.err
        corrected = done.json["manifest"]["facts"]["quantize"]["biases_corrected"]
        assert (corrected == 0) == ("--no-bias-correction" in options)
        # What calibration takes is not hidden in another stage.
        assert done.json["seconds"]["calibrate"] > 0
    # Nothing is quantized that neither ships nor decides.
    assert recipes == [Recipe(), Recipe(bias_correction=False), Recipe(weight_search=True)]


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What progress was shown of."""
    from gnet_opt.cli.console import Output

    shown: list[str] = []

    def progress(self: Output, items: Any, label: str, total: int | None = None) -> Any:
        shown.append(label)
        yield from items

    monkeypatch.setattr(Output, "progress", progress)
    return shown


def test_a_second_run_takes_its_statistics_from_the_cache(
    quantize: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    labels: list[str],
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("GNET_OPT_CACHE", str(cache))
    assert quantize("--target", "jetson", "-o", tmp_path / "one").code == 0
    assert labels.count("Calibrating") == 1
    (kept,) = (cache / "calibration").iterdir()
    before = kept.read_bytes()
    # Another target has the same float network.
    for target in ("jetson", "raspberry-pi-5"):
        labels.clear()
        assert quantize("--target", target, "-o", tmp_path / f"{target} again").code == 0
        assert "Evaluating" in labels
        assert "Calibrating" not in labels
    first, second = (tmp_path / name / "model.onnx" for name in ("one", "jetson again"))
    assert first.read_bytes() == second.read_bytes()
    assert [path.read_bytes() for path in (cache / "calibration").iterdir()] == [before]
    labels.clear()
    assert quantize("--target", "jetson", "--samples", "11", "-o", tmp_path / "other").code == 0
    assert labels.count("Calibrating") == 1


def test_what_a_method_with_histograms_saw_serves_every_method(
    quantize: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    labels: list[str],
) -> None:
    monkeypatch.setenv("GNET_OPT_CACHE", str(tmp_path / "cache"))
    for method, runs in (("lp", 1), ("mse", 0), ("minmax", 0)):
        labels.clear()
        out = tmp_path / method
        assert quantize("--target", "jetson", "--method", method, "-o", out).code == 0
        assert labels.count("Calibrating") == runs
    assert quantize("--target", "jetson", "--no-cache", "-o", tmp_path / "fresh").code == 0
    first, second = (tmp_path / name / "model.onnx" for name in ("minmax", "fresh"))
    assert first.read_bytes() == second.read_bytes()


def test_without_cache_nothing_is_read_or_kept(
    quantize: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    labels: list[str],
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("GNET_OPT_CACHE", str(cache))
    assert quantize("--target", "jetson", "--no-cache", "-o", tmp_path / "one").code == 0
    assert not cache.exists()
    assert quantize("--target", "jetson", "-o", tmp_path / "two").code == 0
    labels.clear()
    assert quantize("--target", "jetson", "--no-cache", "-o", tmp_path / "three").code == 0
    assert labels.count("Calibrating") == 1
    models = {(tmp_path / name / "model.onnx").read_bytes() for name in ("one", "two", "three")}
    assert len(models) == 1


@pytest.mark.parametrize("damage", ["truncated", "read-only"])
def test_a_cache_that_cannot_be_used_costs_time_alone(
    quantize: Callable[..., Any],
    bundle: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("GNET_OPT_CACHE", str(cache))
    if damage == "truncated":
        assert quantize("--target", "jetson", "-o", tmp_path / "first").code == 0
        (kept,) = (cache / "calibration").iterdir()
        kept.write_bytes(kept.read_bytes()[:100])
    else:
        cache.write_text("a file, so that no folder can be here")
    done = quantize("--target", "jetson", "-o", tmp_path / "b")
    assert done.code == 0, done.err
    assert ("cannot be written" in done.err) == (damage == "read-only")
    assert comparable(tmp_path / "b") == comparable(bundle("jetson"))


def test_tests_have_a_cache_of_their_own(own_cache: Path) -> None:
    from gnet_opt import paths

    assert paths.calibration_cache() == own_cache / "calibration"
    code = "from gnet_opt import paths; print(paths.calibration_cache())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(own_cache / "calibration")
