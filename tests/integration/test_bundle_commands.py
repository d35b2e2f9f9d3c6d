"""verify, evaluate, inspect, compile, export, targets and doctor."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from commands import content, gnet_opt
from world import World

from gnet_opt import preflight
from gnet_opt.backends import _gpu, get, names
from gnet_opt.bundle import Bundle
from gnet_opt.files import sha256_file
from gnet_opt.target import find, shipped
from jetsons import ORIN_NANO, READY, plant

Make = Callable[[str], Path]


@pytest.fixture
def copy(bundle: Make, tmp_path: Path) -> Make:
    """A bundle in another folder, to be changed."""

    def made(target: str) -> Path:
        shutil.copytree(bundle(target), tmp_path / "moved here" / target)
        return tmp_path / "moved here" / target

    return made


def update(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest, and make its hashes fit again, as an attacker would."""
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    for entry in manifest["artifacts"]:
        entry["sha256"] = sha256_file(root / entry["path"])
        entry["bytes"] = (root / entry["path"]).stat().st_size
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("target", ["cpu", "openvino-cpu", "raspberry-pi-5", "jetson"])
def test_a_moved_bundle_verifies(copy: Make, target: str) -> None:
    root = copy(target)
    before = content(root)
    done = gnet_opt("verify", root, "--threads", "1", "--json")
    assert (done.code, done.err) == (0, "")
    assert sorted(done.json) == [
        "backend",
        "bundle",
        "deferred",
        "files",
        "foreign",
        "golden_images",
        "sqnr_db",
        "tolerance_db",
    ]
    deferred = target == "jetson"
    assert done.json["backend"] == ("reference" if deferred else find(target).backend)
    assert (done.json["deferred"] is not None) == deferred
    assert done.json["files"] == len(Bundle.open(root).manifest["artifacts"])
    assert done.json["golden_images"] == 8
    assert done.json["sqnr_db"] is None or done.json["sqnr_db"] > 20.0
    assert content(root) == before


def test_verify_for_people(bundle: Make) -> None:
    root = bundle("jetson")
    done = gnet_opt("verify", root)
    text = " ".join(done.out.split())
    assert "3 files have their SHA-256." in text
    assert "8 golden outputs by reference: identical (at least 20 dB)." in text
    assert "The engine is not built yet" in text
    assert text.endswith("is good.")


@pytest.mark.parametrize("name", ["model.onnx", "model.bin", "model.xml", "golden.npz"])
def test_a_tampered_bundle(copy: Make, name: str) -> None:
    path = copy("openvino-cpu") / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for command in (
        ["verify", path.parent],
        ["inspect", path.parent],
        ["evaluate", path.parent, "--images", path.parent],
    ):
        done = gnet_opt(*command)
        assert (done.code, done.out) == (6, "")
        assert done.err == (
            f"gnet-opt: {path} was changed after the bundle was made (its SHA-256 differs). "
            "Copy the bundle again, or build it again.\n"
        )


def test_what_is_no_bundle(tmp_path: Path) -> None:
    for command in (["verify"], ["inspect"], ["compile"]):
        done = gnet_opt(*command, tmp_path)
        assert done.code == 6
        assert done.err.startswith(f"gnet-opt: {tmp_path} is not a bundle: it has no manifest.json")


def test_weights_of_another_model_do_not_give_the_golden_outputs(copy: Make) -> None:
    root = copy("raspberry-pi-5")
    run = get("onnxruntime").artifact(root).path  # not the portable model where LRN is lowered
    model = onnx.load(run)
    for value in model.graph.initializer:
        if value.data_type == onnx.TensorProto.INT8 and len(value.dims) > 1:
            array = onnx.numpy_helper.to_array(value)
            value.CopyFrom(onnx.numpy_helper.from_array(array[::-1].copy(), value.name))
    onnx.save(model, run)
    update(root, lambda manifest: None)
    done = gnet_opt("verify", root, "--threads", "1")
    assert done.code == 6
    assert done.err.startswith("gnet-opt: onnxruntime does not give the golden outputs here: SQNR ")


def test_another_preprocess_is_found(copy: Make) -> None:
    root = copy("raspberry-pi-5")
    update(root, lambda manifest: manifest["preprocess"].update(interpolation="nearest"))
    done = gnet_opt("verify", root)
    assert done.code == 6
    assert "This machine resizes the golden picture differently" in done.err


def test_a_pickle_in_the_golden_file_is_not_loaded(copy: Make, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "attacked",))

    root = copy("raspberry-pi-5")
    arrays = dict(np.load(root / "golden.npz"))
    np.savez(root / "golden.npz", **{**arrays, "outputs": np.array([Attack()], object)})
    update(root, lambda manifest: None)
    done = gnet_opt("verify", root)
    assert done.code == 6
    assert not (tmp_path / "attacked").exists()


def test_a_zip_that_is_no_golden_file(copy: Make) -> None:
    root = copy("raspberry-pi-5")
    with zipfile.ZipFile(root / "golden.npz", "w") as archive:
        archive.writestr("other.npy", b"")
    update(root, lambda manifest: None)
    assert gnet_opt("verify", root).code == 6


def test_verify_without_the_runtime(bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    root = bundle("openvino-cpu")
    real = importlib.util.find_spec
    hidden = lambda name: None if name == "openvino" else real(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    done = gnet_opt("verify", root)
    assert done.code == 3
    assert done.err == (
        "gnet-opt: openvino is needed to run model.xml, and it is not installed. "
        'Install it with: pip install "gnet-opt[openvino]"\n'
    )


@pytest.mark.parametrize("target", ["openvino-cpu", "jetson"])
@pytest.mark.parametrize("reference", [True, False])
def test_evaluate_a_bundle(bundle: Make, world: World, target: str, reference: bool) -> None:
    more = ["--reference"] if reference else []
    done = gnet_opt(
        "evaluate", bundle(target), "--images", world.evaluation, "--json", "--threads", "1", *more
    )
    assert done.code == 0, done.err
    scored = done.json
    assert sorted(scored) == [
        "backend",
        "ci95",
        "images",
        "model",
        "notes",
        "semantics",
        "set",
        "top1",
        "top5",
    ]
    native = target == "openvino-cpu" and not reference
    assert scored["backend"] == ("openvino" if native else "reference")
    assert scored["semantics"] == ("native" if native else "reference")
    assert (scored["images"], scored["set"]) == (16, "evaluation")
    assert scored["ci95"][0] <= scored["top1"] <= scored["ci95"][1]
    waiting = "The engine is not built yet. These are reference semantics."
    assert scored["notes"] == ([waiting] if target == "jetson" and not reference else [])
    manifest = Bundle.open(bundle(target)).manifest
    if manifest["accuracy"]["semantics"] == scored["semantics"]:
        assert scored["top1"] == manifest["accuracy"]["quantized"]["top1"]


def test_evaluate_a_model_and_its_export(world: World, tmp_path: Path) -> None:
    images = ["--images", world.evaluation, "--json", "--threads", "1"]
    done = gnet_opt("evaluate", world.small, *images)
    assert done.code == 0, done.err
    assert (done.json["top1"], done.json["backend"]) == (100.0, "onnxruntime")
    out = tmp_path / "small.onnx"
    assert gnet_opt("export", world.small, "-o", out).code == 0
    done = gnet_opt("evaluate", out, "--card", world.small, *images)
    assert done.code == 0, done.err
    assert done.json["top1"] == 100.0
    assert done.json["notes"] == []


def test_evaluate_an_onnx_file_needs_a_preprocess(world: World, tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    assert gnet_opt("export", world.small, "-o", out).code == 0
    done = gnet_opt("evaluate", out, "--images", world.evaluation)
    assert done.code != 0  # the labels are names, and pictures of 224 pixels do not fit
    assert done.out == ""
    assert done.err.startswith("gnet-opt: ")


def test_evaluate_without_labels(bundle: Make, world: World) -> None:
    done = gnet_opt("evaluate", bundle("jetson"), "--images", world.calibration)
    assert done.code == 5
    assert done.err.splitlines()[-1] == (
        "gnet-opt: The image set calibration has no labels, and accuracy needs them. Use one "
        "folder a class, or a labels.csv with the columns file,label."
    )


def test_inspect_a_bundle(bundle: Make) -> None:
    root = bundle("jetson")
    done = gnet_opt("inspect", root, "--json")
    assert done.code == 0
    found = done.json
    assert sorted(found) == ["artifacts", "bundle", "model"]
    manifest = json.loads((root / "manifest.json").read_text())
    assert found["artifacts"] == manifest["artifacts"]
    assert found["bundle"]["target"]["name"] == "jetson-orin-nano"
    layers = found["model"]["layers"]
    assert len(layers) == 8
    assert {layer["precision"] for layer in layers} == {"int8"}
    assert {layer["zero_point"] for layer in layers} == {0}
    assert found["model"]["macs_int8_share"] == 1.0
    people = gnet_opt("inspect", root)
    assert people.code == 0
    assert "100.0 % of them in INT8" in people.out
    assert "model.onnx" in people.out


def test_inspect_a_file(world: World, tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    assert gnet_opt("export", world.small, "-o", out).code == 0
    done = gnet_opt("inspect", out, "--json")
    assert done.code == 0
    assert (done.json["bundle"], done.json["artifacts"]) == (None, None)
    assert done.json["model"]["macs_int8_share"] == 0.0
    assert done.json["model"]["input"] == "input: FLOAT[1, 3, 64, 64]"
    assert done.json["model"]["output"] == "logits: FLOAT[1, 5]"


@pytest.mark.parametrize("data", [None, b"", b"not onnx"])
def test_inspect_what_is_no_onnx_file(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "x.onnx"
    if data is not None:
        path.write_bytes(data)
    done = gnet_opt("inspect", path)
    assert (done.code, done.out) == (4, "")
    assert done.err.startswith(f"gnet-opt: {path} ")


def test_compile_what_is_complete(bundle: Make) -> None:
    root = bundle("openvino-cpu")
    done = gnet_opt("compile", root, "--json")
    assert done.code == 0
    assert done.json["message"] == f"{root} is complete already."


def test_compile_without_the_device(bundle: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu, "_DRIVER", "libno-such-driver.so.1")
    root = bundle("jetson")
    before = content(root)
    done = gnet_opt("compile", root)
    assert (done.code, done.out) == (7, "")
    assert done.err.startswith(f"gnet-opt: {root / 'model.engine'} was not built: ")
    assert "./build_engine.sh in the bundle" in done.err
    assert content(root) == before


def test_export(world: World, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "small.onnx"
    done = gnet_opt("export", world.small, "-o", out, "--json")
    assert done.code == 0
    assert sorted(done.json) == ["facts", "file"]
    assert done.json["file"] == str(out)
    assert sorted(done.json["facts"]) == ["export", "fold", "load", "strip"]
    assert done.json["facts"]["export"]["sha256"] == sha256_file(out)
    assert [path.name for path in out.parent.iterdir()] == ["small.onnx"]
    before = out.read_bytes()
    again = gnet_opt("export", world.small, "-o", out)
    assert again.code == 2
    assert again.err == (
        f"gnet-opt: {out} exists already. Pass --force to replace it, or another --output.\n"
    )
    out.write_bytes(b"old")
    assert gnet_opt("export", world.small, "-o", out, "--force").code == 0
    assert out.read_bytes() == before


def test_export_where_no_file_can_be(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = gnet_opt("export", world.small, "-o", tmp_path, "--force")
    assert (done.code, done.err) == (
        2,
        f"gnet-opt: {tmp_path} is a folder. Pass the name of a file as --output.\n",
    )
    done = gnet_opt("export", world.small, "-o", tmp_path / "file" / "x.onnx")
    assert done.code == 2
    assert "is no folder" in done.err
    assert list(content(tmp_path)) == ["file"]


def test_export_with_a_free_batch(world: World, tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    assert gnet_opt("export", world.small, "-o", out, "--batch", "dynamic").code == 0
    shape = onnx.load(out).graph.input[0].type.tensor_type.shape
    assert shape.dim[0].dim_param
    assert [dim.dim_value for dim in shape.dim][1:] == [3, 64, 64]


def test_targets() -> None:
    done = gnet_opt("targets", "--json")
    assert (done.code, done.err) == (0, "")
    assert [target["name"] for target in done.json] == [target.name for target in shipped()]
    assert {target["installed"] for target in done.json if target["backend"] == "openvino"} == {
        True
    }
    people = gnet_opt("targets")
    assert people.code == 0
    assert f"* {find('cpu').name}" in people.out
    assert "jetson" in people.out


def test_one_target() -> None:
    done = gnet_opt("targets", "jetson", "--json")
    assert done.code == 0
    assert done.json == find("jetson").to_dict()
    people = gnet_opt("targets", "jetson")
    assert "https://docs.nvidia.com/" in people.out
    assert gnet_opt("targets", "jetsn").code == 2


def test_doctor() -> None:
    done = gnet_opt("doctor", "--json")
    assert (done.code, done.err) == (0, "")
    assert sorted(done.json) == ["backends", "build", "cpu_target", "jetson", "machine", "tools"]
    assert sorted(done.json["backends"]) == list(names())
    assert done.json["cpu_target"] == find("cpu").name
    assert done.json["build"] == {"install": "", "missing": []}
    assert (done.json["jetson"] is not None) == ("Jetson" in done.json["machine"]["board"])
    assert done.json["tools"]["onnxruntime"]
    people = gnet_opt("doctor")
    assert "--target cpu means" in people.out
    assert "Building bundles (extra `build`): ready" in people.out


def test_doctor_on_a_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(files: Mapping[str, str]) -> None:
        found = preflight.preflight(root=plant(tmp_path / str(len(files)), files))
        monkeypatch.setattr(preflight, "preflight", lambda: found)

    real = preflight.preflight
    here(ORIN_NANO)
    told = gnet_opt("doctor", "--json").json["jetson"]
    assert told["target"] == "jetson-orin-nano"
    assert told["board"]["jetpack"] == "6.2.1"
    people = gnet_opt("doctor").out
    text = " ".join(people.split())
    for row in (
        "JetPack 6.2.1",
        "power mode 25W",
        "clock gpu 306 MHz, 306 to 918 nvhost_podgov",
        "temperatures cpu-thermal 49 °C",
        "desktop gnome-shell",
    ):
        assert row in text
    assert people.count("\n- ") == len(told["advice"]) == 4
    monkeypatch.setattr(preflight, "preflight", real)
    here(READY)
    assert gnet_opt("doctor").out.endswith("Ready to build and to time engines.\n")


def test_version() -> None:
    from gnet_opt import __version__

    assert gnet_opt("--version").out == f"gnet-opt, version {__version__}\n"


def test_an_unknown_command() -> None:
    done = gnet_opt("quantise")
    assert done.code == 2
    assert "No such command 'quantise'" in done.err


def test_a_foreign_bundle_is_evaluated_by_reference_semantics(copy: Make, world: World) -> None:
    root = copy("raspberry-pi-5")
    done = gnet_opt("evaluate", root, "--images", world.evaluation, "--json")
    assert done.code == 0
    assert done.json["semantics"] == "reference"
    assert done.json["notes"] == [
        "This machine is not raspberry-pi-5: these are reference semantics."
    ]


@pytest.mark.parametrize("tolerance", ["-1e999", "false"])
def test_a_tolerance_that_lets_everything_pass(copy: Make, tolerance: str) -> None:
    path = copy("jetson") / "manifest.json"
    changed = re.sub(r'"sqnr_db": 20.0', f'"sqnr_db": {tolerance}', path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    done = gnet_opt("verify", path.parent)
    assert done.code == 6
    assert "golden.tolerance.sqnr_db is of the wrong type" in done.err


def test_inspect_of_a_manifest_with_damaged_figures(copy: Make) -> None:
    root = copy("jetson")
    update(root, lambda manifest: manifest["accuracy"].pop("agreement"))
    done = gnet_opt("inspect", root)
    assert done.code == 6
    assert "the manifest is damaged (KeyError('agreement'))" in done.err
