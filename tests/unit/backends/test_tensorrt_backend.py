from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import pytest

from conformance import models
from gnet_opt.backends._trtexec import Input, build_command
from gnet_opt.backends.onnxruntime import open_reference
from gnet_opt.backends.tensorrt import TensorRtBackend
from gnet_opt.errors import BackendError, ConfigError
from gnet_opt.quantization.half import write_half
from gnet_opt.runtime import Deferred
from gnet_opt.target import Target, find


def board(version: object) -> Target:
    options = {} if version is None else {"tensorrt": version}
    return replace(find("jetson"), options=options, file=Path("board.toml"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = models.quantize(models.float_net(), models.pictures(2), "s8")
    return models.save(net, tmp_path_factory.mktemp("s8") / "model.onnx")


COMMANDS = {
    "8.2": "--int8 --noTF32 --workspace=1024 --buildOnly",
    "8.5.2": "--int8 --noTF32 --memPoolSize=workspace:1024 --buildOnly",
    "8.6": "--int8 --noTF32 --memPoolSize=workspace:1024 --skipInference",
    "10.3": "--stronglyTyped --noTF32 --memPoolSize=workspace:1024 --skipInference",
    "10.16.1": "--stronglyTyped --noTF32 --memPoolSize=workspace:1024 --skipInference",
    "11.0": "--noTF32 --memPoolSize=workspace:1024 --skipInference",
    "11.4.1": "--noTF32 --memPoolSize=workspace:1024 --skipInference",
}


@pytest.mark.parametrize(("version", "flags"), COMMANDS.items())
def test_command_by_version(version: str, flags: str) -> None:
    assert build_command(board(version), quantized=True) == (
        f"trtexec --onnx=model.onnx --saveEngine=model.engine {flags} "
        "--timingCacheFile=model.engine.timing"
    )


def test_options_of_the_target() -> None:
    options = {
        "tensorrt": "8.6",
        "batches": [1, 4, 16],
        "hardware_compatibility": "ampere_plus",
        "version_compatible": True,
        "workspace_mib": 256,
    }
    target = replace(board("8.6"), options=options)
    free = Input(name="input", picture=(3, 224, 224))
    command = build_command(target, quantized=False, free=free)
    assert command.split()[3:-2] == [
        "--noTF32",
        "--minShapes=input:1x3x224x224",
        "--optShapes=input:4x3x224x224",
        "--maxShapes=input:16x3x224x224",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=ampere+",
        "--memPoolSize=workspace:256",
    ]
    with pytest.raises(ConfigError) as caught:
        build_command(replace(target, options={**options, "tensorrt": "8.5"}), quantized=False)
    assert str(caught.value) == (
        "board.toml: options.version_compatible needs TensorRT 8.6 or later, but options.tensorrt "
        "is 8.5. Leave it out, or update the device."
    )


def test_a_float_model_asks_for_no_integers() -> None:
    assert "--int8" not in build_command(board("8.6"), quantized=False)
    assert build_command(board("10.3"), quantized=False) == build_command(
        board("10.3"), quantized=True
    )


@pytest.mark.parametrize("version", [None, "", "10", "ten", "10.3; rm -rf /", "10.3\n"])
def test_a_version_that_is_none(version: object) -> None:
    with pytest.raises(ConfigError, match=r"board\.toml: options\.tensorrt is .* \"10\.3\"\."):
        build_command(board(version), quantized=True)


def test_a_version_that_toml_reads_as_a_number() -> None:
    assert "--stronglyTyped" in build_command(board(10.3), quantized=True)


def test_a_version_that_is_too_old() -> None:
    with pytest.raises(ConfigError, match=r"Q/DQ models need TensorRT 8\.0 or later"):
        build_command(board("7.1"), quantized=True)


def test_compile_defers(quantized: Path, tmp_path: Path) -> None:
    deferred = TensorRtBackend().compile(quantized, find("jetson"), tmp_path)
    script = tmp_path / "build_engine.sh"
    assert deferred == Deferred(
        backend="tensorrt",
        reason=(
            "A TensorRT engine fits one GPU and one TensorRT version, so it is built on the "
            "device (jetson-orin-nano)."
        ),
        command=build_command(find("jetson"), quantized=True),
        expected="model.engine",
        files=(("script", script),),
        options={
            "batches": [1, 8, 32],
            "hardware_compatibility": "",
            "input": None,
            "model": "model.onnx",
            "precisions": ["INT8"],
            "tensorrt": "10.16",
            "version_compatible": False,
            "workspace_mib": 1024,
        },
    )
    assert [path.name for path in tmp_path.iterdir()] == ["build_engine.sh"]
    assert "tensorrt" not in sys.modules


def test_compile_reads_the_precision_from_the_model(quantized: Path, tmp_path: Path) -> None:
    plain = models.save(models.float_net(), tmp_path / "float.onnx")
    backend = TensorRtBackend()
    assert "--int8" in backend.compile(quantized, board("8.6"), tmp_path).command
    assert "--int8" not in backend.compile(plain, board("8.6"), tmp_path).command
    write_half(plain, tmp_path / "half.onnx")
    command = backend.compile(tmp_path / "half.onnx", board("8.6"), tmp_path).command
    assert " --fp16 " in command
    assert "--int8" not in command
    with pytest.raises(BackendError, match=r"nothing\.onnx cannot be read"):
        backend.compile(tmp_path / "nothing.onnx", board("8.6"), tmp_path)


def test_its_lrn_is_that_of_onnx(tmp_path: Path) -> None:
    """NVIDIA's example of the layer: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/LRN.html"""
    shape = [1, 5, 2, 2]
    graph = oh.make_graph(
        [oh.make_node("LRN", ["x"], ["y"], size=3, alpha=1.0, beta=1.0, bias=0.1)],
        "lrn",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 18)], ir_version=9)
    x = np.arange(5, dtype=np.float32).repeat(4).reshape(shape)
    with open_reference(models.save(model, tmp_path / "lrn.onnx"), threads=1) as runner:
        y = runner.run(x)
    published = [0.0, 0.56603765, 0.4195804, 0.3071672, 0.47430828]
    np.testing.assert_allclose(y, np.repeat(published, 4).reshape(shape), rtol=1e-6)


# In a process of its own: TensorRT may end the process where there is no GPU.
BUILD = """
import sys
import tensorrt_rtx as trt

logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
with open(sys.argv[1], "rb") as stream:
    assert parser.parse(stream.read()), parser.get_error(0)
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM86, 0)
assert builder.build_serialized_network(network, config) is not None
layers = [network.get_layer(index).type for index in range(network.num_layers)]
print(layers.count(trt.LayerType.LRN), layers.count(trt.LayerType.CONVOLUTION))
"""


@pytest.mark.parametrize("form", ["s8", "float", "half"])
def test_a_strongly_typed_engine_takes_the_lrn_node(
    form: str, quantized: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    plain = models.save(models.float_net(), tmp_path / "float.onnx")
    model = {"s8": quantized, "float": plain, "half": tmp_path / "half.onnx"}[form]
    if form == "half":
        write_half(plain, model)
    command = [sys.executable, "-c", BUILD, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "1 14\n"), done.stderr


@pytest.mark.skipif(os.name != "posix", reason="the script is for the device's POSIX shell")
class TestScript:
    def run(self, bundle: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["/bin/sh", str(bundle / "build_engine.sh")]
        env = {"PATH": "/usr/bin:/bin", **environment}
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")

    @pytest.fixture
    def bundle(self, quantized: Path, tmp_path: Path) -> Path:
        folder = tmp_path / "a bundle; with a 'name"
        folder.mkdir()
        shutil.copyfile(quantized, folder / "model.onnx")
        TensorRtBackend().compile(folder / "model.onnx", find("jetson"), folder)
        return folder

    def fake_trtexec(self, folder: Path, code: int) -> str:
        path = folder / "trt exec"
        path.write_text(
            '#!/bin/sh\nprintf "%s\\n" "$@"\ntest -f model.onnx && echo built > '
            f"model.engine.partial\nexit {code}\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    def test_is_executable_and_builds(self, bundle: Path, tmp_path: Path) -> None:
        assert os.access(bundle / "build_engine.sh", os.X_OK)
        done = self.run(bundle, TRTEXEC=self.fake_trtexec(tmp_path, 0))
        assert done.returncode == 0, done.stderr
        command = build_command(find("jetson"), quantized=True).split()[1:]
        assert done.stdout.split() == [
            a.replace("--saveEngine=model.engine", "--saveEngine=model.engine.partial")
            for a in command
        ]
        assert (bundle / "model.engine").read_text() == "built\n"
        assert not (bundle / "model.engine.partial").exists()

    def test_leaves_no_engine_when_the_build_fails(self, bundle: Path, tmp_path: Path) -> None:
        assert self.run(bundle, TRTEXEC=self.fake_trtexec(tmp_path, 1)).returncode == 1
        assert not (bundle / "model.engine").exists()

    def test_says_where_trtexec_should_be(self, bundle: Path) -> None:
        done = self.run(bundle, TRTEXEC="/nowhere/trtexec")
        assert done.returncode == 3
        assert "set TRTEXEC to its path" in done.stderr
