"""TensorRT on the device: `finish` builds, `open` runs, against the fakes of `fake_tensorrt`."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import onnx
import pytest
from fake_tensorrt import Driver, FakeTensorRt, read_plan

from conformance import models
from gnet_opt.backends import _gpu, tensorrt
from gnet_opt.backends._engine import EngineRecord, record_of
from gnet_opt.backends.onnxruntime import open_reference
from gnet_opt.backends.tensorrt import TensorRtBackend
from gnet_opt.errors import BackendError, GnetOptError, IntegrityError, MissingDependencyError
from gnet_opt.files import sha256_file
from gnet_opt.quantization.half import write_half
from gnet_opt.runtime import DeviceCompiler, Finished
from gnet_opt.target import find

BACKEND = TensorRtBackend()
VERSIONS = ("8.6.1", "10.3.0", "10.16.1", "11.4.0")


class Device:
    """A machine with a GPU and a TensorRT, and a bundle's folder on it."""

    def __init__(
        self, folder: Path, patch: pytest.MonkeyPatch, onnx_files: dict[str, Path]
    ) -> None:
        self.folder = folder / "bundle"
        self.folder.mkdir()
        self.gpu = fake_tensorrt.Gpu()
        self.options: dict[str, Any] = {}
        self._patch = patch
        self._files = onnx_files
        shim = fake_tensorrt.shim(folder / "site")
        here = str(Path(__file__).parent)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(shim), here]))
        patch.setitem(sys.modules, "cuda.bindings.runtime", self.gpu.module())
        self.driver(Driver())

    def driver(self, driver: Driver) -> None:
        self._patch.setattr(ctypes, "CDLL", lambda name: driver)

    def install(self, version: str, does: str = "") -> FakeTensorRt:
        """Have a TensorRT of this version, here and for the building process."""
        library = FakeTensorRt(version, self.gpu)
        self._patch.setitem(sys.modules, "tensorrt", library.module())
        self._patch.setenv("FAKE_TENSORRT", version)
        self._patch.setenv("FAKE_TENSORRT_DOES", does)
        return library

    def receive(self, form: str = "s8", **options: Any) -> None:
        """Get a bundle for the TensorRT that is here."""
        version = os.environ["FAKE_TENSORRT"].rpartition(".")[0]
        target = replace(find("jetson"), options={"tensorrt": version, **options})
        shutil.copyfile(self._files[form], self.folder / "model.onnx")
        deferred = BACKEND.compile(self.folder / "model.onnx", target, self.folder)
        # As a manifest has them.
        self.options = json.loads(json.dumps(deferred.options))

    def finish(self, **more: Any) -> Finished:
        return BACKEND.finish(self.folder, self.options, **more)

    def plan(self) -> dict[str, Any]:
        return read_plan((self.folder / "model.engine").read_bytes())[0]

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture(scope="module")
def onnx_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    nets = {"float": models.float_net(), "any batch": models.float_net(batch="N")}
    nets["s8"] = models.quantize(nets["float"], models.pictures(2), "s8")
    files = {name: models.save(net, folder / f"{name}.onnx") for name, net in nets.items()}
    write_half(files["float"], folder / "half.onnx")
    return {**files, "half": folder / "half.onnx"}


@pytest.fixture
def device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, onnx_files: dict[str, Path]
) -> Iterator[Device]:
    device = Device(tmp_path, monkeypatch, onnx_files)
    device.install("10.3.0")
    yield device
    assert device.gpu.is_empty


def test_a_jetson_that_is_not_ready_builds_nothing(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.receive()
    before = device.names()
    missing = ("Memory: too little.", "Storage: none.")
    monkeypatch.setattr("gnet_opt.backends.tensorrt.no_room", lambda folder: missing)
    with pytest.raises(BackendError, match=r"not built\. Memory: too little\. Storage: none\."):
        device.finish()
    assert device.names() == before


def test_it_compiles_on_the_device() -> None:
    assert isinstance(BACKEND, DeviceCompiler)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("form", ["s8", "float", "half", "any batch"])
def test_builds_and_runs(version: str, form: str, device: Device) -> None:
    device.install(version)
    device.receive(form)
    before = device.names()
    done = device.finish()
    assert done == Finished(
        built=True,
        engine=device.folder / "model.engine",
        reason="it was not built yet",
        version=version,
        device="Orin (compute capability 8.7)",
    )
    made = {"model.engine", "model.engine.json", "model.engine.timing"}
    assert device.names() == before | made
    plan = device.plan()
    flags = {"s8": ["INT8"], "half": ["FP16"]}.get(form, [])
    assert plan["flags"] == (flags if version == "8.6.1" else [])  # TF32 is off
    assert plan["limits"] == {"WORKSPACE": 1 << 30}
    picture = [3, models.SIDE, models.SIDE]
    expected = {"input": [[n, *picture] for n in (1, 8, 32)]} if form == "any batch" else {}
    assert plan["shapes"] == expected
    record = EngineRecord.read(record_of(done.engine))
    eight = version == "8.6.1" and form == "s8"
    assert record.model == ("model.tensorrt8.onnx" if eight else "model.onnx")
    assert record == EngineRecord(
        backend="tensorrt",
        version=version,
        compute_capabilities=("8.7",),
        model_sha256=sha256_file(device.folder / record.model),
        engine_sha256=sha256_file(done.engine),
        model=record.model,
        gpu="Orin",
        cuda="12.6",
    )
    pictures = models.pictures(3)
    batches = [pictures] if form == "any batch" else [p[None] for p in pictures]
    with (
        BACKEND.open(BACKEND.artifact(device.folder)) as runner,
        open_reference(device.folder / "model.onnx", threads=1) as reference,
    ):
        for batch in batches:
            # An FP16 file has inputs and outputs in float32, and is rounded in between.
            tolerance = 0.02 if form == "half" else 1e-4
            np.testing.assert_allclose(runner.run(batch), reference.run(batch), atol=tolerance)


def test_what_fits_is_left_alone(device: Device) -> None:
    device.receive()
    assert device.finish().built
    assert device.plan()["timings"] == 0
    before = {path: path.read_bytes() for path in device.folder.iterdir()}
    assert device.finish() == Finished(
        built=False, engine=device.folder / "model.engine", reason="it fits this machine"
    )
    assert {path: path.read_bytes() for path in device.folder.iterdir()} == before
    done = device.finish(force=True)
    assert (done.built, done.reason) == (True, "--force asks for it")
    # The timings of the build before were used.
    assert device.plan()["timings"] == 1


def updated(device: Device) -> None:
    device.install("10.16.1")


def moved(device: Device) -> None:
    device.driver(Driver(name="NVIDIA Thor", compute_capability=(11, 0)))


def damaged(device: Device) -> None:
    (device.folder / "model.engine").write_bytes(b"half of it")


def unrecorded(device: Device) -> None:
    (device.folder / "model.engine.json").unlink()


def unreadable(device: Device) -> None:
    (device.folder / "model.engine.json").write_text("{")


def replaced(device: Device) -> None:
    device.receive("float")


def removed(device: Device) -> None:
    (device.folder / "model.engine").unlink()


STALE: dict[Callable[[Device], None], tuple[str, str]] = {
    updated: (
        "{engine} was built by TensorRT 10.3.0 and runs with no other, but this machine has "
        "10.16.1",
        "Install 10.3.0, or build it again with `gnet-opt compile`.",
    ),
    moved: (
        "{engine} was built for Orin (compute capability 8.7), but this machine has NVIDIA Thor "
        "(compute capability 11.0)",
        "Build it again with `gnet-opt compile`.",
    ),
    damaged: (
        "{engine} was changed after it was built (its SHA-256 differs)",
        "Build it again with `gnet-opt compile`.",
    ),
    replaced: (
        "{engine} was not built from the model.onnx beside it (its SHA-256 differs)",
        "Build it again with `gnet-opt compile`.",
    ),
    removed: ("it was not built yet", ""),
    unrecorded: (
        "the one that was there has no record, as build_engine.sh and trtexec leave it",
        "",
    ),
    unreadable: ("the record of the one that was there, model.engine.json, cannot be read", ""),
}


@pytest.mark.parametrize("change", STALE)
def test_a_stale_engine_is_refused_and_built_again(
    change: Callable[[Device], None], device: Device
) -> None:
    device.receive()
    device.finish()
    change(device)
    why, advice = (text.format(engine=device.folder / "model.engine") for text in STALE[change])
    with pytest.raises(BackendError) as caught, BACKEND.open(BACKEND.artifact(device.folder)):
        pass
    if advice:
        assert str(caught.value) == f"{why}. {advice}"
    assert device.finish() == Finished(
        built=True,
        engine=device.folder / "model.engine",
        reason=why,
        version="10.16.1" if change is updated else "10.3.0",
        device=(
            "NVIDIA Thor (compute capability 11.0)"
            if change is moved
            else "Orin (compute capability 8.7)"
        ),
    )
    assert not device.finish().built
    # TensorRT refuses timings of another version, and the build begins anew.
    assert device.plan()["timings"] == (0 if change is updated else 1)
    with BACKEND.open(BACKEND.artifact(device.folder)) as runner:
        assert runner.run(models.pictures(1)).shape == (1, models.CLASSES)


@pytest.mark.parametrize("version", ["8.6.1", "11.4.0"])
def test_compatibility_that_a_target_asks_for(version: str, device: Device) -> None:
    device.install(version)
    device.receive(hardware_compatibility="ampere_plus", version_compatible=True, workspace_mib=256)
    device.finish()
    plan = device.plan()
    assert "VERSION_COMPATIBLE" in plan["flags"]
    assert (plan["hardware"], plan["limits"]) == ("AMPERE_PLUS", {"WORKSPACE": 256 << 20})
    device.driver(Driver(name="NVIDIA RTX A2000", compute_capability=(8, 6)))
    assert not device.finish().built
    with BACKEND.open(BACKEND.artifact(device.folder)) as runner:
        assert runner.run(models.pictures(1)).shape == (1, models.CLASSES)


def test_compatibility_that_a_library_does_not_have(device: Device) -> None:
    device.receive(version_compatible=True)
    names = fake_tensorrt.NAMES["10.3.0"]["BuilderFlag"]
    site = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0])
    (site / "tensorrt.py").write_text(
        "import sys, fake_tensorrt as fake\n"
        f"fake.NAMES['10.3.0']['BuilderFlag'] = {[n for n in names if n[:7] != 'VERSION']!r}\n"
        "sys.modules[__name__] = fake.from_environment()\n"
    )
    with pytest.raises(BackendError) as caught:
        device.finish()
    assert str(caught.value) == (
        "TensorRT 10.3.0 has no BuilderFlag.VERSION_COMPATIBLE, which options.version_compatible "
        "asks for. Update it, or take the option out of the target file and build the bundle again."
    )


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("build", "failed: Could not find any implementation for node conv1. Check the file"),
        ("crash", "failed: its process died (signal 11). Its last words: assertion failed."),
        ("not load", "failed: libnvinfer.so.10: cannot open shared object file. Check the file"),
        ("profile", ""),
    ],
)
def test_a_build_that_fails_leaves_what_was_there(does: str, said: str, device: Device) -> None:
    device.receive("any batch")
    device.finish()
    before = {path: path.read_bytes() for path in device.folder.iterdir()}
    device.install("10.3.0", does)
    with pytest.raises(BackendError) as caught:
        device.finish(force=True)
    assert f"Compiling {device.folder / 'model.onnx'} with TensorRT {said}" in str(caught.value)
    assert {path: path.read_bytes() for path in device.folder.iterdir()} == before


def test_a_bundle_that_cannot_be_written_into(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.receive()

    def read_only(**where: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system", str(where["dir"]))

    monkeypatch.setattr("tempfile.TemporaryDirectory", read_only)
    with pytest.raises(BackendError) as caught:
        device.finish()
    assert str(caught.value) == (
        f"{device.folder / 'model.engine'} was not built: [Errno {errno.EROFS}] Read-only file "
        f"system: '{device.folder}'. Make room there and allow writing, or copy the bundle to a "
        "disk that has room and may be written."
    )


def test_a_model_that_is_replaced_during_the_build(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record must not say that the engine was built from the new one."""
    device.receive()
    model = device.folder / "model.onnx"
    build_apart = tensorrt.build_apart

    def replacing(*arguments: Any, **options: Any) -> str:
        version = build_apart(*arguments, **options)
        model.write_bytes(model.read_bytes() + b"\0")
        return version

    monkeypatch.setattr(tensorrt, "build_apart", replacing)
    device.finish()
    monkeypatch.undo()
    record = EngineRecord.read(record_of(device.folder / "model.engine"))
    assert record.model_sha256 != sha256_file(model)


def test_progress_is_shown_and_ctrl_c_stops_the_build(device: Device, tmp_path: Path) -> None:
    device.receive()
    before = device.names()
    shown: list[tuple[str, int | None, int]] = []

    def progress(items: Any, label: str, total: int | None = None) -> Any:
        for index, item in enumerate(items):
            shown.append((label, total, index))
            yield item

    device.finish(progress=progress)
    assert shown == [
        *(("Optimizing the graph", 3, step) for step in range(3)),
        *(("Timing kernels", 4, step) for step in range(4)),
    ]

    def interrupted(items: Any, label: str, total: int | None = None) -> Any:
        for index, item in enumerate(items):
            if index == 2:
                raise KeyboardInterrupt
            yield item

    device.install("10.3.0", "forever")
    monkey = f"FAKE_MARK={tmp_path}"
    os.environ["FAKE_MARK"] = str(tmp_path)
    try:
        with pytest.raises(KeyboardInterrupt):
            device.finish(force=True, progress=interrupted)
    finally:
        del os.environ["FAKE_MARK"]
    assert device.names() == before | {"model.engine", "model.engine.json", "model.engine.timing"}
    assert not device.finish().built
    if Path("/proc").is_dir():
        assert not running(monkey)


def running(mark: str) -> list[Path]:
    """Processes with a mark in their environment, once they have had time to end."""
    found: list[Path] = []
    for _ in range(50):
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if mark.encode() in (path / "environ").read_bytes():
                    found.append(path)
            except OSError:
                continue
        if not found:
            break
        time.sleep(0.1)
    return found


# --- machines that cannot -----------------------------------------------------------------------


def test_without_a_gpu(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.receive()
    monkeypatch.undo()
    monkeypatch.setattr(_gpu, "_DRIVER", "libno-such-driver.so.1")
    with pytest.raises(BackendError) as caught:
        device.finish()
    assert str(caught.value) == (
        f"{device.folder / 'model.engine'} was not built: this machine has no NVIDIA GPU that can "
        "be used (the driver's libno-such-driver.so.1 was not found). Run `gnet-opt compile` on "
        "the device, or ./build_engine.sh in the bundle there."
    )


def test_without_tensorrt(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.receive()
    device.finish()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError) as caught:
        device.finish()
    text = str(caught.value)
    assert text.startswith("TensorRT's Python package is needed to build ")
    for way in (
        "python3-libnvinfer",
        "--system-site-packages",
        'pip install "gnet-opt[tensorrt]"',
        "run ./build_engine.sh in the bundle.",
    ):
        assert way in text
    with pytest.raises(MissingDependencyError, match=r"gnet-opt\[tensorrt\]"):
        BACKEND.open(BACKEND.artifact(device.folder))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "../model.onnx"}, "deferred.options.model is '../model.onnx'"),
        ({"model": ["model.onnx"]}, "deferred.options.model is ['model.onnx']"),
        ({"precisions": ["INT4"]}, "deferred.options.precisions is ['INT4']"),
        ({"precisions": [["INT8"]]}, "deferred.options.precisions is [['INT8']]"),
        ({"tensorrt": "9" * 5000}, "deferred.options.tensorrt is '999"),
        ({"tensorrt": [10, 3]}, "deferred.options.tensorrt is '[10, 3]'"),
        ({"batches": [8, 1]}, "deferred: options.batches is [8, 1]"),
    ],
)
def test_damaged_options(options: dict[str, Any], said: str, device: Device) -> None:
    device.receive()
    device.options |= options
    with pytest.raises(IntegrityError) as caught:
        device.finish()
    assert f"{device.folder}: {said}" in str(caught.value)
    assert str(caught.value).endswith("Build the bundle again.")


def test_a_tensorrt_that_is_too_old_for_the_bundle(device: Device) -> None:
    device.receive()
    device.install("8.6.1")
    with pytest.raises(BackendError) as caught:
        device.finish()
    assert str(caught.value) == (
        f"{device.folder} was made for TensorRT 10.3, and the TensorRT 8.6.1 that is here does not "
        "read the model's form. Update it, or build the bundle again for a target file whose "
        "options.tensorrt is the version here."
    )
    # The other way round it fits, and no major version has to be the same.
    device.receive()
    for version in ("8.6.1", "10.3.0", "11.4.0"):
        device.install(version)
        assert device.finish().version == version


def test_a_bundle_from_before_options_were_deferred(device: Device) -> None:
    device.receive("float")
    device.options = {}
    assert device.finish().built


@pytest.mark.parametrize("version", ["8.2.1", "8.6.1", "10.3.0", "11.4.0"])
@pytest.mark.parametrize("form", ["float", "half", "s8", "any batch"])
def test_the_command_comes_from_the_options_alone(
    form: str, version: str, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    path = onnx_files.get(form) or models.save(models.float_net(batch="N"), tmp_path / "free.onnx")
    target = replace(find("jetson"), options={"tensorrt": version, "workspace_mib": 77})
    shutil.copy(path, tmp_path / "model.onnx")
    deferred = BACKEND.compile(tmp_path / "model.onnx", target, tmp_path)
    options = json.loads(json.dumps(dict(deferred.options)))
    assert BACKEND.command(tmp_path, options) == deferred.command
    assert ("--optShapes=" in deferred.command) == (form == "any batch")
    # Bundles of before do not say enough, and the command is left out.
    assert BACKEND.command(tmp_path, {"model": "model.onnx"}) == ""


# --- TensorRT 8 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["8.2.1", "8.5.2", "9.3.0"])
def test_weights_and_opset_of_tensorrt_8(
    version: str, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    target = replace(find("jetson"), options={"tensorrt": version})
    deferred = BACKEND.compile(onnx_files["s8"], target, tmp_path)
    path = tmp_path / "model.tensorrt8.onnx"
    assert ("tensorrt8-onnx", path) in deferred.files
    assert deferred.options["model"] == path.name
    assert f"--onnx={path.name} " in deferred.command
    script = (tmp_path / "build_engine.sh").read_text()
    assert f"--onnx={path.name} " in script
    assert sha256_file(path) in script
    made, portable = onnx.load(path), onnx.load(onnx_files["s8"])
    onnx.checker.check_model(made, full_check=True)
    assert made.opset_import[0].version == (13 if version == "8.2.1" else 17)
    weights = {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    dequantized = [n for n in made.graph.node if n.op_type == "DequantizeLinear"]
    before = [n for n in portable.graph.node if n.op_type == "DequantizeLinear"]
    assert len(dequantized) == len(before) > 14
    assert not [node.name for node in dequantized if node.input[0] in weights]
    # The integers come back exactly, so the two compute the same.
    pictures = models.pictures(4)
    with (
        open_reference(path, threads=1) as one,
        open_reference(onnx_files["s8"], threads=1) as two,
    ):
        for picture in pictures:
            np.testing.assert_array_equal(one.run(picture[None]), two.run(picture[None]))
    again = tmp_path / "again"
    again.mkdir()
    BACKEND.compile(onnx_files["s8"], target, again)
    assert (again / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("form", "version"), [("float", "8.5"), ("half", "8.6"), ("s8", "10.0")])
def test_what_needs_no_other_form(
    form: str, version: str, onnx_files: dict[str, Path], tmp_path: Path
) -> None:
    target = replace(find("jetson"), options={"tensorrt": version})
    deferred = BACKEND.compile(onnx_files[form], target, tmp_path)
    assert deferred.options["model"] == "model.onnx"
    assert [path.name for path in tmp_path.iterdir()] == ["build_engine.sh"]


def test_an_operator_that_tensorrt_8_2_does_not_know(tmp_path: Path) -> None:
    net = models.float_net()
    relu = next(node for node in net.graph.node if node.op_type == "Relu")
    relu.op_type = "HardSwish"  # which came with opset 14
    path = models.save(net, tmp_path / "new.onnx")
    with pytest.raises(GnetOptError) as caught:
        BACKEND.compile(path, find("jetson-nano"), tmp_path)
    assert f"{path} has the operator HardSwish" in str(caught.value)
    assert "this target's TensorRT reads up to 13" in str(caught.value)


def test_a_model_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "noise.onnx"
    path.write_bytes(b"\x00noise")
    with pytest.raises(BackendError, match=r"Reading .*noise\.onnx failed: "):
        BACKEND.compile(path, find("jetson"), tmp_path)
