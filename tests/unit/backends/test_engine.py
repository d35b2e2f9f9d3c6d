"""What TensorRT and TensorRT-RTX share, against fakes: no machine that tests run on has a GPU.

The fakes have the names in `USED` and `CUDA` and no others, and the libraries themselves are asked
for those wherever they are installed.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum, IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gnet_opt.backends import _engine
from gnet_opt.backends._engine import EngineRecord, open_engine, record_of, require_gpu
from gnet_opt.backends._engine_build import build_apart, main
from gnet_opt.errors import BackendError, MissingDependencyError
from gnet_opt.files import sha256_file

USED = {
    "Builder": ["build_serialized_network", "create_builder_config", "create_network"],
    "BuilderFlag": ["TF32"],
    "DataType": ["FLOAT"],
    "IBuilderConfig": ["clear_flag", "set_memory_pool_limit"],
    "ICudaEngine": [
        "create_execution_context",
        "get_tensor_dtype",
        "get_tensor_mode",
        "get_tensor_name",
        "get_tensor_shape",
        "num_io_tensors",
    ],
    "IExecutionContext": ["execute_async_v3", "set_tensor_address"],
    "ILogger": ["Severity", "log"],
    "INetworkDefinition": ["get_input", "num_inputs"],
    "ITensor": ["shape"],
    "MemoryPoolType": ["WORKSPACE"],
    "NetworkDefinitionCreationFlag": ["STRONGLY_TYPED"],
    "OnnxParser": ["get_error", "num_errors", "parse_from_file"],
    "ParserError": ["desc", "file", "line", "node", "node_name", "node_operator"],
    "Runtime": ["deserialize_cuda_engine"],
    "TensorIOMode": ["INPUT"],
}
"""Every name of the library that the package uses, in TensorRT 10.3, 10.16 and 11.4 as well as in
TensorRT-RTX 1.7. The last alone has `ComputeCapability`."""

CUDA = [
    "cudaError_t",
    "cudaFree",
    "cudaFreeHost",
    "cudaMalloc",
    "cudaMallocHost",
    "cudaMemcpyAsync",
    "cudaMemcpyKind",
    "cudaStreamCreate",
    "cudaStreamDestroy",
    "cudaStreamSynchronize",
]


@pytest.mark.parametrize("name", ["tensorrt_rtx", "tensorrt"])
def test_the_library_has_every_name_that_is_used(name: str) -> None:
    trt = pytest.importorskip(name)
    found = {
        kind: [n for n in names if hasattr(getattr(trt, kind), n)] for kind, names in USED.items()
    }
    assert found == USED
    assert {"ERROR", "INTERNAL_ERROR"} <= set(trt.ILogger.Severity.__members__)


def test_cuda_has_every_name_that_is_used() -> None:
    cuda = pytest.importorskip("cuda.bindings.runtime")
    assert [name for name in CUDA if not hasattr(cuda, name)] == []
    assert hasattr(cuda.cudaError_t, "cudaSuccess")
    kinds = cuda.cudaMemcpyKind
    assert hasattr(kinds, "cudaMemcpyHostToDevice") and hasattr(kinds, "cudaMemcpyDeviceToHost")
    assert int(cuda.cudaStream_t(7)) == 7


# --- the record -------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine of the fake library, with its record and the model that it was built from."""
    path = tmp_path / "model.engine"
    path.write_bytes(b"engine")
    (tmp_path / "model.onnx").write_bytes(b"model")
    EngineRecord(
        backend="tensorrt-rtx",
        version="1.7.1",
        compute_capabilities=("8.6", "12.0"),
        model_sha256=sha256_file(tmp_path / "model.onnx"),
        engine_sha256=sha256_file(path),
    ).write(record_of(path))
    return path


def test_a_record_on_disk(engine: Path) -> None:
    path = engine.with_name("model.engine.json")
    assert json.loads(path.read_text()) == {
        "backend": "tensorrt-rtx",
        "compute_capabilities": ["8.6", "12.0"],
        "engine_sha256": sha256_file(engine),
        "model_sha256": sha256_file(engine.with_name("model.onnx")),
        "schema": "gnet-opt/engine/1",
        "version": "1.7.1",
    }
    record = EngineRecord.read(path)
    assert record.compute_capabilities == ("8.6", "12.0")
    record.check(engine, "TensorRT-RTX", "1.7.1")
    engine.with_name("model.onnx").unlink()  # then there is nothing to compare with
    record.check(engine, "TensorRT-RTX", "1.7.1")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": "gnet-opt/engine/2"}', '{"schema": "gnet-opt/engine/1"}']
)
def test_a_damaged_record(text: str, engine: Path) -> None:
    path = record_of(engine)
    path.write_text(text)
    with pytest.raises(BackendError) as caught:
        EngineRecord.read(path)
    assert str(caught.value).startswith(f"{path} cannot be read (")
    assert str(caught.value).endswith("Copy the bundle again, or build it again.")
    path.unlink()
    with pytest.raises(BackendError, match="cannot be read"):
        EngineRecord.read(path)


def test_a_record_with_a_key_too_many(engine: Path) -> None:
    path = record_of(engine)
    path.write_text(json.dumps({**json.loads(path.read_text()), "more": 1}))
    with pytest.raises(BackendError, match=r"cannot be read .*'more'"):
        EngineRecord.read(path)


def test_a_stale_engine(engine: Path) -> None:
    record = EngineRecord.read(record_of(engine))
    with pytest.raises(BackendError) as caught:
        record.check(engine, "TensorRT-RTX", "1.8.0")
    assert str(caught.value) == (
        f"{engine} was built by TensorRT-RTX 1.7.1 and runs with no other version, but this "
        "machine has 1.8.0. Install 1.7.1, or build the bundle again with `gnet-opt quantize`."
    )
    engine.with_name("model.onnx").write_bytes(b"another model")
    with pytest.raises(BackendError, match=r"was not built from the model\.onnx beside it"):
        record.check(engine, "TensorRT-RTX", "1.7.1")
    engine.write_bytes(b"another engine")
    with pytest.raises(BackendError, match="was changed after it was built"):
        record.check(engine, "TensorRT-RTX", "1.7.1")
    engine.unlink()
    with pytest.raises(BackendError, match="does not exist"):
        record.check(engine, "TensorRT-RTX", "1.7.1")


# --- the GPU ----------------------------------------------------------------------------------


class FakeDriver:
    def __init__(self, code: int, count: int) -> None:
        self._code, self._count = code, count

    def cuInit(self, flags: int) -> int:  # noqa: N802 (NVIDIA's name)
        assert flags == 0
        return self._code

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self._count
        return 0


@pytest.mark.parametrize(
    ("driver", "problem"),
    [
        (None, "the driver's libno-such-driver.so.1 was not found"),
        (FakeDriver(100, 0), "the driver's cuInit gives the error 100"),
        (FakeDriver(0, 0), "the driver finds none"),
    ],
)
def test_a_machine_without_a_gpu(
    driver: FakeDriver | None, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_engine, "_DRIVER", "libno-such-driver.so.1")
    if driver is not None:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    with pytest.raises(BackendError) as caught:
        require_gpu(Path("b/model.engine"))
    assert str(caught.value) == (
        f"b/model.engine was not run: this machine has no NVIDIA GPU that can be used ({problem}). "
        "Run it on a machine with the GPU and its driver."
    )


def test_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver(0, 1))
    require_gpu(Path("b/model.engine"))


# --- running ----------------------------------------------------------------------------------

SHAPES = {"input": (1, 3, 2, 2), "logits": (1, 4)}
WEIGHTS = np.arange(48, dtype=np.float32).reshape(12, 4)


class Error(IntEnum):
    cudaSuccess = 0  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815


class Kind(Enum):
    cudaMemcpyHostToDevice = 1  # noqa: N815
    cudaMemcpyDeviceToHost = 2  # noqa: N815


class Gpu:
    """Memory, and a stream that does its work when it is waited for."""

    def __init__(self) -> None:
        self.host: dict[int, Any] = {}
        self.device: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.queue: list[Callable[[], object]] = []
        self.allocations_left = 99

    def take(self, memory: dict[int, Any], size: int) -> tuple[Error, int]:
        if self.allocations_left == 0:
            return Error.cudaErrorMemoryAllocation, 0
        self.allocations_left -= 1
        buffer = (ctypes.c_char * size)()
        memory[ctypes.addressof(buffer)] = buffer
        return Error.cudaSuccess, ctypes.addressof(buffer)

    def free(self, memory: dict[int, Any], address: int) -> tuple[Error]:
        del memory[address]
        return (Error.cudaSuccess,)

    def copy(self, to: int, source: int, size: int, kind: Kind, stream: int) -> tuple[Error]:
        up = kind is Kind.cudaMemcpyHostToDevice
        there, here = (self.device, self.host) if up else (self.host, self.device)
        assert len(there[to]) == len(here[source]) == size
        assert stream in self.streams
        self.queue.append(lambda: ctypes.memmove(to, source, size))
        return (Error.cudaSuccess,)

    def create(self) -> tuple[Error, int]:
        self.streams.add(7)
        return Error.cudaSuccess, 7

    def destroy(self, stream: int) -> tuple[Error]:
        self.streams.remove(stream)
        return (Error.cudaSuccess,)

    def wait(self, stream: int) -> tuple[Error]:
        assert stream in self.streams
        while self.queue:
            self.queue.pop(0)()
        return (Error.cudaSuccess,)

    def module(self) -> ModuleType:
        """The fake `cuda.bindings.runtime`."""
        made = ModuleType("cuda.bindings.runtime")
        made.cudaError_t = Error  # type: ignore[attr-defined]
        made.cudaFree = lambda address: self.free(self.device, address)  # type: ignore[attr-defined]
        made.cudaFreeHost = lambda address: self.free(self.host, address)  # type: ignore[attr-defined]
        made.cudaMalloc = lambda size: self.take(self.device, size)  # type: ignore[attr-defined]
        made.cudaMallocHost = lambda size: self.take(self.host, size)  # type: ignore[attr-defined]
        made.cudaMemcpyAsync = self.copy  # type: ignore[attr-defined]
        made.cudaMemcpyKind = Kind  # type: ignore[attr-defined]
        made.cudaStreamCreate = self.create  # type: ignore[attr-defined]
        made.cudaStreamDestroy = self.destroy  # type: ignore[attr-defined]
        made.cudaStreamSynchronize = self.wait  # type: ignore[attr-defined]
        assert sorted(n for n in vars(made) if n.startswith("cuda")) == CUDA
        return made


class FakeTensorRt:
    """A library whose engines multiply the picture with `WEIGHTS`; tests change its fields."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.shapes: dict[str, tuple[int, ...]] = dict(SHAPES)
        self.dtype = "float32"
        self.fails: set[str] = set()

    def module(self) -> ModuleType:
        fake = self

        class ILogger:
            Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING")

            def log(self, severity: object, message: str) -> None:
                raise NotImplementedError

        class IExecutionContext:
            def __init__(self, log: ILogger) -> None:
                self._log = log
                self._addresses: dict[str, int] = {}

            def set_tensor_address(self, name: str, address: int) -> bool:
                assert address in fake.gpu.device
                self._addresses[name] = address
                return "address" not in fake.fails

            def execute_async_v3(self, stream: int) -> bool:
                assert stream in fake.gpu.streams
                if "execute" in fake.fails:
                    self._log.log(ILogger.Severity.ERROR, "out of registers")
                    return False
                fake.gpu.queue.append(self._multiply)
                return True

            def _multiply(self) -> None:
                data = fake.gpu.device[self._addresses["input"]]
                logits = np.frombuffer(data, np.float32) @ WEIGHTS
                ctypes.memmove(self._addresses["logits"], logits.ctypes.data, logits.nbytes)

        class ICudaEngine:
            def __init__(self, log: ILogger) -> None:
                self._log = log

            @property
            def num_io_tensors(self) -> int:
                return len(fake.shapes)

            def get_tensor_name(self, index: int) -> str:
                return list(fake.shapes)[index]

            def get_tensor_mode(self, name: str) -> object:
                return TensorIOMode.INPUT if name.startswith("input") else "output"

            def get_tensor_dtype(self, name: str) -> object:
                return fake.dtype

            def get_tensor_shape(self, name: str) -> tuple[int, ...]:
                return fake.shapes[name]

            def create_execution_context(self) -> IExecutionContext | None:
                if "context" in fake.fails:
                    self._log.log(ILogger.Severity.INTERNAL_ERROR, "no kernels for this GPU")
                    return None
                return IExecutionContext(self._log)

        class Runtime:
            def __init__(self, log: ILogger) -> None:
                self._log = log

            def deserialize_cuda_engine(self, plan: bytes) -> ICudaEngine | None:
                assert plan == b"engine"
                self._log.log(ILogger.Severity.WARNING, "do not mind")
                if "deserialize" in fake.fails:
                    return None
                return ICudaEngine(self._log)

        class TensorIOMode(Enum):
            INPUT = 1

        made = ModuleType("tensorrt_rtx")
        classes = {
            "DataType": SimpleNamespace(FLOAT="float32"),
            "ICudaEngine": ICudaEngine,
            "IExecutionContext": IExecutionContext,
            "ILogger": ILogger,
            "Runtime": Runtime,
            "TensorIOMode": TensorIOMode,
        }
        for name, value in classes.items():
            setattr(made, name, value)
            public = [n for n in vars(value) if not n.startswith("_")]
            assert sorted(public) == USED[name]
        made.__spec__ = sys.__spec__
        made.__version__ = "1.7.1"  # type: ignore[attr-defined]
        return made


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorRt]:
    gpu = Gpu()
    fake = FakeTensorRt(gpu)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake.module())
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", gpu.module())
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver(0, 1))
    yield fake
    # Whatever happened, all memory was given back.
    assert (gpu.host, gpu.device, gpu.streams) == ({}, {}, set())


def opened(engine: Path) -> Any:
    return open_engine(engine, module="tensorrt_rtx", title="TensorRT-RTX", extra="tensorrt-rtx")


def test_runs_on_the_fake_gpu(engine: Path, library: FakeTensorRt) -> None:
    pictures = np.random.default_rng(0).normal(size=(2, 1, 3, 2, 2)).astype(np.float32)
    with opened(engine) as runner:
        first = runner.run(pictures[0])
        kept = first.copy()
        second = runner.run(np.asfortranarray(pictures[1]))
        np.testing.assert_array_equal(first, kept)
    assert (first.shape, first.dtype) == ((1, 4), np.float32)
    for got, picture in ((first, pictures[0]), (second, pictures[1])):
        np.testing.assert_allclose(got[0], picture.ravel() @ WEIGHTS, rtol=1e-6)
    with pytest.raises(BackendError, match="was closed"):
        runner.run(pictures[0])


def test_a_wrong_picture(engine: Path, library: FakeTensorRt) -> None:
    with opened(engine) as runner, pytest.raises(BackendError) as caught:
        runner.run(np.zeros((2, 3, 2, 2), np.float32))
    assert str(caught.value).startswith(f"{engine} takes float32 of shape (1, 3, 2, 2), but got ")


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("deserialize", "it gave no reason"),
        ("context", "no kernels for this GPU"),
        ("address", "it gave no reason"),
    ],
)
def test_an_engine_that_the_library_refuses(
    fails: str, said: str, engine: Path, library: FakeTensorRt
) -> None:
    library.fails = {fails}
    with pytest.raises(BackendError) as caught, opened(engine):
        pass
    assert str(caught.value) == (
        f"Loading {engine} with TensorRT-RTX failed: {said}. "
        "Check the bundle with `gnet-opt verify`."
    )


@pytest.mark.parametrize("left", range(4))
def test_a_gpu_without_memory(left: int, engine: Path, library: FakeTensorRt) -> None:
    library.gpu.allocations_left = left
    with pytest.raises(BackendError, match="gives cudaErrorMemoryAllocation"), opened(engine):
        pass


def test_a_run_that_fails(engine: Path, library: FakeTensorRt) -> None:
    picture = np.zeros((1, 3, 2, 2), np.float32)
    with opened(engine) as runner:
        library.fails = {"execute"}
        for _ in range(2):  # what was said before is not said again
            with pytest.raises(BackendError) as caught:
                runner.run(picture)
            assert str(caught.value) == (
                f"Running {engine} with TensorRT-RTX failed: out of registers. "
                "Check the bundle with `gnet-opt verify`."
            )
            library.gpu.queue.clear()


@pytest.mark.parametrize(
    ("shapes", "dtype"),
    [
        ({**SHAPES, "logits2": (1, 4)}, "float32"),
        ({"input": (1, 3, 2, 2), "input2": (1, 4)}, "float32"),
        (SHAPES, "float16"),
    ],
)
def test_an_engine_of_no_classifier(
    shapes: dict[str, tuple[int, ...]], dtype: str, engine: Path, library: FakeTensorRt
) -> None:
    library.shapes, library.dtype = shapes, dtype
    with pytest.raises(BackendError, match="one input and one output in float32"), opened(engine):
        pass


def test_a_stale_engine_does_not_reach_the_library(engine: Path, library: FakeTensorRt) -> None:
    record = EngineRecord.read(record_of(engine))
    replace(record, version="1.6.0").write(record_of(engine))
    with pytest.raises(BackendError, match=r"this machine has 1\.7\.1\. Install 1\.6\.0"):
        opened(engine).__enter__()


def test_cuda_without_its_package(
    engine: Path, library: FakeTensorRt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingDependencyError) as caught, opened(engine):
        pass
    assert str(caught.value).startswith("cuda-bindings is needed to run model.engine")
    assert str(caught.value).endswith('pip install "gnet-opt[tensorrt-rtx]"')


# --- building apart ---------------------------------------------------------------------------


@pytest.fixture
def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a module `tensorrt_rtx` with the given code in the way of the building process."""

    def made(code: str) -> Path:
        folder = tmp_path / "site"
        folder.mkdir()
        (folder / "tensorrt_rtx.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        return tmp_path / "model.onnx"

    return made


@pytest.mark.parametrize(
    ("code", "ended", "words"),
    [
        (
            "import os, signal, sys\nprint('assertion failed', file=sys.stderr, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGSEGV)",
            f"signal {int(signal.SIGSEGV)}",
            "assertion failed",
        ),
        ("import os\nos._exit(9)", "exit code 9", "none"),
    ],
)
def test_a_compiler_that_crashes(
    code: str, ended: str, words: str, fake_compiler: Callable[[str], Path]
) -> None:
    model = fake_compiler(code)
    with pytest.raises(BackendError) as caught:
        build_apart("tensorrt_rtx", "TensorRT-RTX", model, model.with_suffix(".engine"), ["8.6"])
    assert str(caught.value) == (
        f"Compiling {model} with TensorRT-RTX failed: its process died ({ended}). Its last words: "
        f"{words}. Check the file with `gnet-opt inspect`, or export the model again."
    )


def test_a_compiler_that_cannot_be_imported(fake_compiler: Callable[[str], Path]) -> None:
    model = fake_compiler("raise ImportError('libtensorrt_rtx.so.1: no such file')")
    with pytest.raises(BackendError) as caught:
        build_apart("tensorrt_rtx", "TensorRT-RTX", model, model.with_suffix(".engine"), ["8.6"])
    assert "failed: libtensorrt_rtx.so.1: no such file. Check" in str(caught.value)


class Refusing:
    """A parser that refuses a model with two errors, as the libraries tell them."""

    num_errors = 2

    def __init__(self, network: object, log: object) -> None:
        pass

    def parse_from_file(self, model: str) -> bool:
        return False

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(
            desc=lambda: f"no importer for it, {index}",
            file=lambda: "/build/parsers/onnx/ModelImporter.cpp",
            line=lambda: 100 + index,
            node=lambda: 5 + index,
            node_name=lambda: "fc",
            node_operator=lambda: "Gemmm",
        )


def test_every_error_of_the_parser_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(
        Builder=lambda log: SimpleNamespace(create_network=lambda flags: flags),
        ILogger=type("ILogger", (), {"Severity": SimpleNamespace(ERROR=1, INTERNAL_ERROR=2)}),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        OnnxParser=Refusing,
    )
    monkeypatch.setattr(importlib, "import_module", lambda name: fake)
    request = {
        "answer": str(tmp_path / "answer.json"),
        "compute_capabilities": [],
        "engine": str(tmp_path / "e"),
        "model": "strange.onnx",
        "module": "tensorrt_rtx",
        "title": "TensorRT-RTX",
    }
    main(json.dumps(request))
    assert json.loads((tmp_path / "answer.json").read_text()) == {
        "error": (
            "Compiling strange.onnx with TensorRT-RTX failed: "
            "node 5 'fc' (Gemmm): no importer for it, 0 (ModelImporter.cpp:100); "
            "node 6 'fc' (Gemmm): no importer for it, 1 (ModelImporter.cpp:101). "
            "Check the file with `gnet-opt inspect`, or export the model again."
        )
    }
