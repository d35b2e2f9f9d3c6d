"""TensorRT-RTX itself judges the files here: it parses and builds without a GPU."""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fake_tensorrt import Driver

import networks
from conformance import models
from data import shared_data
from gnet_opt import paths
from gnet_opt.backends import _gpu, tensorrt_rtx
from gnet_opt.backends._build_options import BuildOptions
from gnet_opt.backends._engine import EngineRecord, record_of
from gnet_opt.backends._engine_build import build_apart
from gnet_opt.backends._tensorrt8 import for_tensorrt8
from gnet_opt.backends.tensorrt_rtx import TensorRtRtxBackend
from gnet_opt.errors import BackendError, ConfigError, MissingDependencyError
from gnet_opt.files import sha256_file
from gnet_opt.images import ImageSet
from gnet_opt.model import Model
from gnet_opt.quantization import calibrate, quantize
from gnet_opt.runtime import Artifact, Probe
from gnet_opt.stages import prepare
from gnet_opt.stages.load import from_module, load
from gnet_opt.target import Target, find

BACKEND = TensorRtRtxBackend()
RTX = find("rtx")

needs_library = pytest.mark.skipif(
    not BACKEND.probe().available, reason=BACKEND.probe().detail or "installed"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small nets: float, s8 as this target wants it, u8 as others do, and with a free batch."""
    folder = tmp_path_factory.mktemp("onnx")
    nets = {"float": models.float_net(), "dynamic": models.float_net(batch="N")}
    for form in ("s8", "u8"):
        nets[form] = models.quantize(nets["float"], models.pictures(2), form)  # type: ignore[arg-type]
    return {name: models.save(net, folder / f"{name}.onnx") for name, net in nets.items()}


def gpus(*compute_capabilities: object) -> Target:
    options = {"compute_capabilities": list(compute_capabilities)}
    return replace(RTX, options=options, file=Path("gpu.toml"))


# --- compiling ----------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("form", ["float", "s8"])
def test_compiles_to_equal_bytes(form: str, files: dict[str, Path], tmp_path: Path) -> None:
    made: list[Artifact] = []
    for name in ("a", "another folder"):
        (tmp_path / name).mkdir()
        made.append(BACKEND.compile(files[form], RTX, tmp_path / name))
    assert [artifact.path.name for artifact in made] == ["model.engine"] * 2
    for artifact in made:
        folder = artifact.path.parent
        assert sorted(folder.iterdir()) == sorted(path for _, path in artifact.files)
        assert artifact == BACKEND.artifact(folder)
    one, two = [[(kind, path.read_bytes()) for kind, path in a.files] for a in made]
    assert one == two
    assert json.loads(one[1][1]) == {
        "backend": "tensorrt-rtx",
        "compute_capabilities": ["8.6", "8.9", "12.0"],
        "cuda": "",
        "engine_sha256": sha256_file(made[0].path),
        "gpu": "",
        "hardware_compatibility": "",
        "model": "model.onnx",
        "model_sha256": sha256_file(files[form]),
        "schema": "gnet-opt/engine/1",
        "version": BACKEND.probe().version,
        "version_compatible": False,
    }


@needs_library
def test_the_engine_is_for_the_gpus_that_the_target_names(
    files: dict[str, Path], tmp_path: Path
) -> None:
    made = {}
    for capability in ("8.6", "12.0"):
        (tmp_path / capability).mkdir()
        path = BACKEND.compile(files["s8"], gpus(capability), tmp_path / capability).path
        assert EngineRecord.read(record_of(path)).compute_capabilities == (capability,)
        made[capability] = path.read_bytes()
    assert made["8.6"] != made["12.0"]


@needs_library
def test_a_gpu_that_it_does_not_build_for(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BackendError) as caught:
        BACKEND.compile(files["s8"], gpus("8.6", "9.0"), tmp_path)
    text = str(caught.value)
    assert "does not build for compute capability 9.0; it knows SM75, " in text
    assert text.endswith("Change options.compute_capabilities of the target.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [None, [], "8.6", [8.6], ["sm86"], ["8.6; rm"], ["8.6\n"]])
def test_a_target_that_names_no_gpus(
    given: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = type(sys)("tensorrt_rtx")
    installed.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", installed)
    target = replace(RTX, options={"compute_capabilities": given}, file=Path("gpu.toml"))
    with pytest.raises(ConfigError) as caught:
        BACKEND.compile(tmp_path / "model.onnx", target, tmp_path)
    assert str(caught.value) == (
        f"gpu.toml: options.compute_capabilities is {given!r}; it must be a list of those of the "
        'GPUs, such as ["8.6", "8.9"].'
    )
    with pytest.raises(ConfigError, match="names one twice"):
        BACKEND.compile(tmp_path / "model.onnx", gpus("8.6", "8.6"), tmp_path)


def strange(net: onnx.ModelProto) -> bytes:
    net.graph.node[-1].op_type = "Gemmm"
    return net.SerializeToString()


def dangling(net: onnx.ModelProto) -> bytes:
    net.graph.node[3].input[0] = "nowhere"
    return net.SerializeToString()


def mismatched(net: onnx.ModelProto) -> bytes:
    net.graph.initializer[0].dims[0] += 1
    return net.SerializeToString()


def elsewhere(net: onnx.ModelProto) -> bytes:
    onnx.external_data_helper.convert_model_to_external_data(net, size_threshold=0)
    for tensor in net.graph.initializer:
        tensor.ClearField("raw_data")
    return net.SerializeToString()


HOSTILE: dict[str, Callable[[onnx.ModelProto], bytes]] = {
    "empty": lambda net: b"",
    "half": lambda net: net.SerializeToString()[: net.ByteSize() // 2],
    "short": lambda net: net.SerializeToString()[:-7],
    "noise": lambda net: np.random.default_rng(0).bytes(10_000),
    "an operator that is none": strange,
    "a tensor that nothing makes": dangling,
    "a weight of another shape": mismatched,
    "weights in a file that is missing": elsewhere,
}


@needs_library
@pytest.mark.parametrize("damage", HOSTILE)
def test_a_hostile_file_is_a_backend_error(damage: str, tmp_path: Path) -> None:
    model = tmp_path / "strange.onnx"
    model.write_bytes(HOSTILE[damage](models.float_net()))
    (tmp_path / "out").mkdir()
    with pytest.raises(BackendError) as caught:
        BACKEND.compile(model, RTX, tmp_path / "out")
    text = str(caught.value)
    assert text.startswith(f"Compiling {model} with TensorRT-RTX failed: ")
    assert text.endswith("Check the file with `gnet-opt inspect`, or export the model again.")
    assert list((tmp_path / "out").iterdir()) == []


@needs_library
def test_the_node_that_is_refused_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    strange_file = tmp_path / "strange.onnx"
    strange_file.write_bytes(strange(models.float_net()))
    with pytest.raises(BackendError, match=r"'logits' \(Gemmm\): .*\(\w+\.cpp:\d+\)"):
        BACKEND.compile(strange_file, RTX, tmp_path)
    # Activations with a zero point are another target's form.
    with pytest.raises(BackendError, match=r"node \d+ '.*' \(\w+Linear\): .*\(\w+\.cpp:\d+\)"):
        BACKEND.compile(files["u8"], RTX, tmp_path)


@needs_library
def test_any_batch(files: dict[str, Path], tmp_path: Path) -> None:
    artifact = BACKEND.compile(files["dynamic"], RTX, tmp_path)
    assert EngineRecord.read(record_of(artifact.path)).engine_sha256 == sha256_file(artifact.path)
    for batches, said in (
        ([4, 2, 1], r"options\.batches is \[4, 2, 1\]; it must be the least"),
        ([1, 8, 2**31], "Compiling .* failed: "),  # more than the library can count
    ):
        options = {**RTX.options, "batches": batches}
        with pytest.raises((ConfigError, BackendError), match=said):
            BACKEND.compile(files["dynamic"], replace(RTX, options=options), tmp_path)


WITHOUT_PROFILE = """
import sys
from gnet_opt.backends import _engine_build

_engine_build._Build._set_profile = lambda *_: None
_engine_build.main(sys.argv[1], sys.stdout)
"""


@needs_library
def test_any_batch_needs_its_profile(files: dict[str, Path], tmp_path: Path) -> None:
    """So that an engine which is built at all has the batches that were asked for."""
    request = {
        "compute_capabilities": ["8.6"],
        "engine": str(tmp_path / "model.engine"),
        "model": str(files["dynamic"]),
        "module": "tensorrt_rtx",
        "options": BuildOptions().to_dict(),
        "precisions": [],
        "timings": None,
        "title": "TensorRT-RTX",
    }
    command = [sys.executable, "-c", WITHOUT_PROFILE, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert "no optimization profile has been defined" in answer["error"]


@needs_library
def test_phases_of_the_build_are_told(files: dict[str, Path], tmp_path: Path) -> None:
    """By the library itself, whose monitor is that of TensorRT."""
    shown: dict[str, list[int]] = {}

    def progress(items: Any, label: str, total: int | None = None) -> Any:
        assert total is not None
        counts = shown.setdefault(label, [total, 0])
        for item in items:
            counts[1] += 1
            yield item

    build_apart(
        tensorrt_rtx._LIBRARY,
        files["s8"],
        tmp_path / "model.engine",
        BuildOptions(),
        compute_capabilities=["8.6"],
        progress=progress,
    )
    assert len(shown) > 1
    assert all(0 < done <= total for total, done in shown.values())


@needs_library
@pytest.mark.parametrize("version", ["8.2", "8.5"])
def test_the_form_of_tensorrt_8_is_parsed_and_built(
    version: str, files: dict[str, Path], tmp_path: Path
) -> None:
    """Float weights in front of Q and DQ, and opset 13, by a parser of the same family."""
    model = tmp_path / "model.onnx"
    model.write_bytes(for_tensorrt8(files["s8"], tuple(map(int, version.split(".")))))  # type: ignore[arg-type]
    assert walk(model) == walk(files["s8"])
    assert BACKEND.compile(model, RTX, tmp_path).path.stat().st_size > 0


@needs_library
def test_a_model_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"nothing\.onnx cannot be read .*\. Export it again\."):
        BACKEND.compile(tmp_path / "nothing.onnx", RTX, tmp_path)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    probe = BACKEND.probe()
    assert (probe.available, probe.version) == (False, "")
    install = 'pip install "gnet-opt[tensorrt-rtx]"'
    assert probe.detail == f"tensorrt_rtx is not installed: {install}"
    with pytest.raises(MissingDependencyError) as caught:
        BACKEND.compile(tmp_path / "model.onnx", RTX, tmp_path)
    assert str(caught.value) == (
        f"tensorrt_rtx is needed to compile model.onnx, and it is not installed. Install it with: "
        f"{install}"
    )
    artifact = BACKEND.artifact(tmp_path)
    with pytest.raises(MissingDependencyError, match="run model"), BACKEND.open(artifact):
        pass


# --- opening ------------------------------------------------------------------------------------


@needs_library
def test_open_without_a_gpu(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_gpu, "_DRIVER", "libno-such-driver.so.1")
    artifact = BACKEND.compile(files["s8"], RTX, tmp_path)
    with pytest.raises(BackendError) as caught, BACKEND.open(artifact):
        pass
    assert str(caught.value) == (
        f"{artifact.path} was not run: this machine has no NVIDIA GPU that can be used (the "
        "driver's libno-such-driver.so.1 was not found). Run it on a machine with the GPU and its "
        "driver."
    )
    record = EngineRecord.read(record_of(artifact.path))
    replace(record, version="1.0.0.21").write(record_of(artifact.path))
    importlib.import_module("tensorrt_rtx")  # which needs the real `CDLL`
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    with pytest.raises(BackendError, match=r"Install 1\.0\.0\.21, or build"):
        BACKEND.open(artifact).__enter__()


@pytest.mark.parametrize(
    ("driver", "native"),
    [
        (Driver(compute_capability=(8, 9)), True),
        (Driver(compute_capability=(9, 0)), False),
        (Driver(code=100), False),
    ],
)
def test_the_machines_that_an_engine_is_for(
    driver: Driver, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    there = Probe(available=True, version="1.7.1", detail="")
    monkeypatch.setattr(TensorRtRtxBackend, "probe", lambda self: there)
    artifact = BACKEND.artifact(tmp_path)
    assert not BACKEND.is_native(artifact)  # without a record
    EngineRecord(
        backend="tensorrt-rtx",
        version="1.7.1",
        compute_capabilities=("8.6", "8.9"),
        model_sha256="",
        engine_sha256="",
    ).write(record_of(artifact.path))
    assert BACKEND.is_native(artifact) == native
    gone = replace(there, available=False)
    monkeypatch.setattr(TensorRtRtxBackend, "probe", lambda self: gone)
    assert not BACKEND.is_native(artifact)


def has_rtx_gpu() -> bool:
    """Whether the first GPU here is one that the target names, to run its engines for real."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    if driver.cuInit(0) != 0:
        return False
    device, number, found = ctypes.c_int(), ctypes.c_int(), []
    for attribute in (75, 76):  # major and minor of the compute capability
        ok = driver.cuDeviceGet(ctypes.byref(device), 0) == 0
        if not ok or driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device) != 0:
            return False
        found.append(number.value)
    return "{}.{}".format(*found) in RTX.options["compute_capabilities"]


@needs_library
@pytest.mark.skipif(not has_rtx_gpu(), reason="there is no GPU that the target names")
@pytest.mark.parametrize("form", ["float", "s8"])
def test_agrees_with_the_reference_on_a_gpu(
    form: str, files: dict[str, Path], tmp_path: Path
) -> None:
    from gnet_opt.backends.onnxruntime import open_reference
    from gnet_opt.bench.accuracy import sqnr_db
    from gnet_opt.golden import TOLERANCE_DB
    from gnet_opt.runtime import run_all

    artifact = BACKEND.compile(files[form], RTX, tmp_path)
    images = models.pictures(8, seed=2)
    with open_reference(files[form], threads=1) as runner:
        expected = run_all(runner, images)
    with BACKEND.open(artifact) as runner:
        measured = sqnr_db(expected, run_all(runner, images))
    assert measured is None or measured > TOLERANCE_DB["fp32" if form == "float" else "int8"]


# --- whole networks -----------------------------------------------------------------------------

WALK = """
import json
import re
import sys
import tensorrt_rtx as trt


class Log(trt.ILogger):
    lines = []

    def log(self, severity, message):
        self.lines += message.splitlines()


log = Log()
builder = trt.Builder(log)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
assert parser.parse_from_file(sys.argv[1]), parser.get_error(0).desc()
layers = [network.get_layer(index) for index in range(network.num_layers)]
source = {
    layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)
}
parsed = []
for layer in layers:
    if layer.type == trt.LayerType.CONVOLUTION:
        feeds = [source.get(layer.get_input(index).name) for index in range(layer.num_inputs)[:2]]
        types = [feed and [feed.type.name, feed.get_input(0).dtype.name] for feed in feeds]
        parsed.append(types)
config = builder.create_builder_config()
config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM86, 0)
assert builder.build_serialized_network(network, config) is not None
# The log ends with the layers of the engine. A convolution is called a correlation there, and its
# weights are the first of its constants.
first = r"LayerType: correlation, Inputs: \\[ {[^}]*Datatype: (\\w+)[^}]*}\\], Constants: "
found = [re.search(first + r"\\[ {[^}]*Datatype: (\\w+)", line) for line in log.lines]
built = [match.groups() for match in found if match]
lrn = sum(layer.type == trt.LayerType.LRN for layer in layers)
print(json.dumps({"built": built, "lrn": lrn, "parsed": parsed}))
"""
FROM_INT8 = ["DEQUANTIZE", "INT8"]


def walk(model: Path) -> Any:
    """What TensorRT-RTX makes of a model.

    Returns:
        `parsed`, what feeds the data and the weights of each convolution in the parsed network;
        `built`, the types of both in the engine; and `lrn`, the number of such layers.
    """
    command = [sys.executable, "-c", WALK, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def integers(convolutions: int, lrn: int) -> Any:
    """What `walk` tells where every convolution is in INT8."""
    return {
        "built": [["Int8", "Int8"]] * convolutions,
        "lrn": lrn,
        "parsed": [[FROM_INT8, FROM_INT8]] * convolutions,
    }


@needs_library
def test_every_convolution_of_a_small_net_is_in_int8(files: dict[str, Path]) -> None:
    assert walk(files["s8"]) == integers(14, 1)
    plain = walk(files["float"])
    assert plain["built"] == [["Float", "Float"]] * 14
    assert FROM_INT8 not in [feed for feeds in plain["parsed"] for feed in feeds]


def demo() -> tuple[Model, np.ndarray]:
    model = load(None)
    images = ImageSet.open(paths.demo_calibration()).take(range(4))
    return model, np.stack([model.preprocess.load(path) for path in images.files])


def torchvision_architecture() -> tuple[Model, np.ndarray]:
    return from_module(networks.torchvision_googlenet()), networks.pictures(4, 224)


def original() -> tuple[Model, np.ndarray]:
    data = shared_data()
    model = load(data / "bvlc_googlenet.toml")
    images = ImageSet.open(data / "imagenet-sample").take(range(0, 400, 100))
    return model, np.stack([model.preprocess.load(path) for path in images.files])


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "norms"), [(demo, 0), (torchvision_architecture, 0), (original, 2)]
)
def test_all_57_convolutions_are_in_int8(
    make: Callable[[], tuple[Model, np.ndarray]], norms: int, tmp_path: Path
) -> None:
    model, inputs = make()
    plain, quantized = tmp_path / "float.onnx", tmp_path / "model.onnx"
    prepare(model, inputs, plain)
    statistics = calibrate(plain, list(inputs), histograms=False, threads=1)
    quantize(plain, quantized, statistics, RTX.scheme)
    assert walk(quantized) == integers(57, norms)
    assert walk(plain)["built"] == [["Float", "Float"]] * 57
    sizes = []
    for path in (plain, quantized):
        out = tmp_path / path.stem
        out.mkdir()
        sizes.append(BACKEND.compile(path, RTX, out).path.stat().st_size)
    assert sizes[1] < 0.5 * sizes[0]  # weights of one byte, and what every engine has
