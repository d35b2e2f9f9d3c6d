"""`--target rtx`: the engine is built here, and run where the GPU is."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from commands import content, gnet_opt
from world import World

from gnet_opt.backends import _gpu
from gnet_opt.backends._engine import EngineRecord, record_of
from gnet_opt.bundle import Bundle
from gnet_opt.files import sha256_file

sys.path.append(str(Path(__file__).parent.parent / "unit" / "backends"))

import fake_tensorrt


@pytest.fixture
def built(bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with its engine, on a machine without a GPU."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(_gpu, "_DRIVER", "libno-such-driver.so.1")
    return bundle("rtx")


def test_the_bundle_has_its_engine(built: Path) -> None:
    found = Bundle.open(built)
    manifest = found.manifest
    assert manifest["deferred"] is None
    assert manifest["target"]["backend"] == "tensorrt-rtx"
    assert manifest["latency"] is None
    assert manifest["accuracy"]["semantics"] == "reference"
    assert {entry["path"]: entry["kind"] for entry in manifest["artifacts"]} == {
        "golden.npz": "golden",
        "model.engine": "tensorrt-rtx-engine",
        "model.engine.json": "engine-record",
        "model.onnx": "onnx",
    }
    record = json.loads((built / "model.engine.json").read_text())
    assert record["model_sha256"] == sha256_file(built / "model.onnx")
    assert record["engine_sha256"] == sha256_file(built / "model.engine")
    assert manifest["tools"]["tensorrt-rtx"] == record["version"]
    done = gnet_opt("compile", built)
    assert (done.code, " ".join(done.out.split())) == (0, f"{built} is complete already.")


def test_verify_says_what_was_checked_and_what_was_not(built: Path) -> None:
    before = content(built)
    done = gnet_opt("verify", built)
    assert (done.code, done.out) == (7, "")
    assert done.err == (
        f"gnet-opt: {built / 'model.engine'} was not run: this machine has no NVIDIA GPU that can "
        "be used (the driver's libno-such-driver.so.1 was not found). Run it on a machine with the "
        "GPU and its driver. What could be checked is right: 4 files have their SHA-256, and "
        "pictures are read and resized as at calibration.\n"
    )
    assert content(built) == before


def test_accuracy_is_that_of_reference_semantics(built: Path, world: World) -> None:
    done = gnet_opt("evaluate", built, "--images", world.evaluation, "--json")
    assert done.code == 0
    assert done.json["semantics"] == "reference"
    assert done.json["notes"] == ["This machine is not rtx: these are reference semantics."]
    assert done.json["top1"] == Bundle.open(built).manifest["accuracy"]["quantized"]["top1"]


def test_accuracy_is_the_engine_s_own_where_its_gpu_is(
    built: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "at the gpu"
    shutil.copytree(built, root)
    engine, record = root / "model.engine", record_of(root / "model.engine")
    values = EngineRecord.read(record)
    plan = fake_tensorrt.plan_of(values.version, (root / "model.onnx").read_bytes())
    engine.write_bytes(plan)
    replace(values, engine_sha256=sha256_file(engine)).write(record)
    manifest = json.loads((root / "manifest.json").read_text())
    for entry in manifest["artifacts"]:
        path = root / entry["path"]
        entry.update(bytes=path.stat().st_size, sha256=sha256_file(path))
    (root / "manifest.json").write_text(json.dumps(manifest))
    gpu = fake_tensorrt.Gpu()
    library = fake_tensorrt.FakeTensorRt(values.version, gpu, names="11.4.0")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library.module("tensorrt_rtx"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", gpu.module())
    driver = fake_tensorrt.Driver(compute_capability=(8, 9))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    done = gnet_opt("evaluate", root, "--images", world.evaluation, "--json")
    assert (done.code, done.json["notes"]) == (0, [])
    assert (done.json["backend"], done.json["semantics"]) == ("tensorrt-rtx", "native")
    assert done.json["top1"] == manifest["accuracy"]["quantized"]["top1"]
    assert gnet_opt("verify", root, "--json").json["foreign"] is False
    assert gpu.is_empty
    other = fake_tensorrt.Driver(compute_capability=(9, 0))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: other)
    done = gnet_opt("evaluate", root, "--images", world.evaluation, "--json")
    assert done.json["semantics"] == "reference"


def test_layers_are_not_timed(built: Path) -> None:
    done = gnet_opt("inspect", built, "--layers")
    assert (done.code, done.out) == (7, "")
    assert "does not time the layers of an engine" in done.err


@pytest.mark.parametrize(("asked", "ships"), [("auto", "int8"), ("fp16", "fp16"), ("fp32", "fp32")])
def test_other_precisions(
    asked: str, ships: str, quantize_arguments: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    more = ["-t", "rtx", "--precision", asked, "-o", tmp_path / "b", "--json"]
    done = gnet_opt(*quantize_arguments, *more)
    assert done.code == 0, done.err
    assert done.json["manifest"]["precision"] == ships
    assert Bundle.open(tmp_path / "b").check() == 4


def test_a_bundle_that_takes_any_batch(quantize_arguments: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    done = gnet_opt(
        *quantize_arguments, "-t", "geforce-rtx", "-o", tmp_path / "b", "--batch", "dynamic"
    )
    assert done.code == 0, done.err
    assert Bundle.open(tmp_path / "b").check() == 4


def test_without_the_package(
    quantize_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    done = gnet_opt(*quantize_arguments, "--target", "rtx", "-o", tmp_path / "b")
    assert (done.code, done.out) == (3, "")
    assert done.err == (
        'gnet-opt: tensorrt_rtx is not installed: pip install "gnet-opt[tensorrt-rtx]"\n'
    )
    assert list(tmp_path.iterdir()) == []
