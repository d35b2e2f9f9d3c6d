"""What TensorRT and TensorRT-RTX have in common: their engines, beside the file and on the GPU.

The two libraries have the same names for all that is used here and in `_engine_build`. An engine is
opened only when its record says that it is the one that was built, because a damaged one, or one of
another version, can end the process that loads it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt.backends._boundary import check_input, translated
from gnet_opt.errors import BackendError, MissingDependencyError, require
from gnet_opt.files import dump_json, is_file, sha256_file, write_text
from gnet_opt.runtime import FloatArray, Runner

SCHEMA = "gnet-opt/engine/1"

_MODEL = "model.onnx"
_DRIVER = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """Where an engine comes from; the file beside it, `model.engine.json`.

    Attributes:
        backend: The backend's name.
        version: The version of the library that built it, the only one that runs it.
        compute_capabilities: The GPUs that it is for, `8.6` for example.
        model_sha256: Of the ONNX file.
        engine_sha256: Of the engine itself.
    """

    backend: str
    version: str
    compute_capabilities: tuple[str, ...]
    model_sha256: str
    engine_sha256: str

    @classmethod
    def read(cls, path: Path) -> EngineRecord:
        """Read a record.

        Raises:
            BackendError: It is missing, damaged or of another schema.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("schema") != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA!r}")
            values["compute_capabilities"] = tuple(values["compute_capabilities"])
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BackendError(
                f"{path} cannot be read ({error}), so it is not known what the engine beside it "
                "is. Copy the bundle again, or build it again."
            ) from error

    def write(self, path: Path) -> None:
        """Write the record."""
        values = {
            "backend": self.backend,
            "compute_capabilities": list(self.compute_capabilities),
            "engine_sha256": self.engine_sha256,
            "model_sha256": self.model_sha256,
            "schema": SCHEMA,
            "version": self.version,
        }
        write_text(path, dump_json(values))

    def check(self, engine: Path, title: str, version: str) -> None:
        """Refuse an engine that is not the one that was built, or not from the model beside it.

        Args:
            engine: The engine's file.
            title: The library's name, for messages.
            version: The version of the library that is to run it.

        Raises:
            BackendError: The engine is missing, changed or stale; the message says what to do.
        """
        if not is_file(engine):
            raise BackendError(f"{engine} does not exist. Build the bundle again.")
        if self.version != version:
            raise BackendError(
                f"{engine} was built by {title} {self.version} and runs with no other version, but "
                f"this machine has {version}. Install {self.version}, or build the bundle again "
                "with `gnet-opt quantize`."
            )
        if self.engine_sha256 != sha256_file(engine):
            raise BackendError(
                f"{engine} was changed after it was built (its SHA-256 differs). Copy the bundle "
                "again, or build it again with `gnet-opt quantize`."
            )
        model = engine.with_name(_MODEL)
        if is_file(model) and self.model_sha256 != sha256_file(model):
            raise BackendError(
                f"{engine} was not built from the {_MODEL} beside it (its SHA-256 differs). Build "
                "the bundle again with `gnet-opt quantize`."
            )


def record_of(engine: Path) -> Path:
    """Where the record of an engine is."""
    return engine.with_name(f"{engine.name}.json")


def collect_errors(trt: Any) -> tuple[Any, list[str]]:
    """A logger for the library `trt`, and the list that it adds errors to; it prints nothing."""
    errors: list[str] = []
    grave = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    def log(_: object, severity: object, message: str) -> None:
        if severity in grave:
            errors.append(message)

    # The library is imported late, so its class cannot be named in a class statement.
    return type("Log", (trt.ILogger,), {"log": log})(), errors


def reason(errors: list[str]) -> str:
    """What the library said, in one text."""
    return "; ".join(errors) or "it gave no reason"


def require_gpu(engine: Path) -> None:
    """Refuse where there is no GPU to run an engine on.

    NVIDIA's driver is asked, because TensorRT ends the process where there is none.

    Raises:
        BackendError: The driver is missing, or finds no GPU.
    """
    problem = _driver_problem()
    if problem:
        raise BackendError(
            f"{engine} was not run: this machine has no NVIDIA GPU that can be used ({problem}). "
            "Run it on a machine with the GPU and its driver."
        )


@contextlib.contextmanager
def open_engine(engine: Path, *, module: str, title: str, extra: str) -> Iterator[Runner]:
    """Load an engine on the first GPU.

    Args:
        engine: Its file, with its record beside it.
        module: The library's import name.
        title: The library's name, for messages.
        extra: The extra of gnet-opt that brings it.

    Raises:
        MissingDependencyError: The library, or CUDA's Python package, is not installed.
        BackendError: The engine is damaged or stale, there is no GPU, or the library refused it.
    """
    require(module, extra, f"run {engine.name}")
    doing, advice = f"Loading {engine} with {title}", "Check the bundle with `gnet-opt verify`."
    with translated(doing, f"Reinstall it: pip install --force-reinstall {extra}"):
        trt = importlib.import_module(module)
    EngineRecord.read(record_of(engine)).check(engine, title, str(trt.__version__))
    require_gpu(engine)
    try:
        cuda = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingDependencyError(
            f"cuda-bindings is needed to run {engine.name}, and it cannot be imported ({error}). "
            f'Install it with: pip install "gnet-opt[{extra}]"'
        ) from error
    with translated(doing, advice):
        runner = EngineRunner(trt, cuda, engine, title)
    try:
        yield runner
    finally:
        runner.close()


class EngineRunner:
    """One execution context with its memory; see `gnet_opt.runtime.Runner`.

    A picture is copied to page-locked memory first, the only one that CUDA copies from without
    waiting. The engine takes one shape, so that all memory is taken once.
    """

    def __init__(self, trt: Any, cuda: Any, engine: Path, title: str) -> None:
        self._cuda = cuda
        self._path = engine
        self._title = title
        log, self._errors = collect_errors(trt)
        self._runtime = trt.Runtime(log)
        loaded = self._runtime.deserialize_cuda_engine(engine.read_bytes())
        if loaded is None:
            raise RuntimeError(reason(self._errors))
        self._engine = loaded
        names = [loaded.get_tensor_name(index) for index in range(loaded.num_io_tensors)]
        modes = [loaded.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names]
        floats = all(loaded.get_tensor_dtype(name) == trt.DataType.FLOAT for name in names)
        if sorted(modes) != [False, True] or not floats:
            raise BackendError(
                f"{engine} does not have one input and one output in float32, as a classifier "
                "has. Build the bundle again."
            )
        source, result = (names[modes.index(mode)] for mode in (True, False))
        self._context = loaded.create_execution_context()
        if self._context is None:
            raise RuntimeError(reason(self._errors))
        with contextlib.ExitStack() as held:
            self._stream = self._call("cudaStreamCreate")
            held.callback(cuda.cudaStreamDestroy, self._stream)
            self._input, self._device_input = self._memory(held, source)
            self._output, self._device_output = self._memory(held, result)
            self._held = held.pop_all()

    def run(self, batch: FloatArray) -> FloatArray:
        if self._context is None:
            raise BackendError(f"{self._path} was closed; run it inside its `with` block.")
        batch = check_input(batch, self._input.shape, str(self._path))
        kinds = self._cuda.cudaMemcpyKind
        into, out = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        with translated(
            f"Running {self._path} with {self._title}", "Check the bundle with `gnet-opt verify`."
        ):
            self._errors.clear()
            np.copyto(self._input, batch)
            self._copy(self._device_input, self._input.ctypes.data, self._input.nbytes, into)
            if not self._context.execute_async_v3(int(self._stream)):
                raise RuntimeError(reason(self._errors))
            self._copy(self._output.ctypes.data, self._device_output, self._output.nbytes, out)
            self._call("cudaStreamSynchronize", self._stream)
            # The next picture's logits are written into the same memory.
            return np.array(self._output, np.float32)

    def close(self) -> None:
        """Give everything back, the context before the memory that it uses."""
        self._context = self._engine = self._runtime = None
        self._held.close()

    def _memory(self, held: contextlib.ExitStack, name: str) -> tuple[FloatArray, int]:
        """Memory of a tensor on the host, as an array, and on the device, bound to the context."""
        shape = tuple(self._engine.get_tensor_shape(name))
        count = math.prod(shape)
        size = count * np.dtype(np.float32).itemsize
        device = int(self._call("cudaMalloc", size))
        held.callback(self._cuda.cudaFree, device)
        host = int(self._call("cudaMallocHost", size))
        held.callback(self._cuda.cudaFreeHost, host)
        if not self._context.set_tensor_address(name, device):
            raise RuntimeError(reason(self._errors))
        values: FloatArray = np.ctypeslib.as_array((ctypes.c_float * count).from_address(host))
        return values.reshape(shape), device

    def _copy(self, to: int, source: int, size: int, kind: object) -> None:
        self._call("cudaMemcpyAsync", to, source, size, kind, self._stream)

    def _call(self, name: str, *arguments: object) -> Any:
        """Call a function of CUDA's runtime; its first result is an error code."""
        code, *values = getattr(self._cuda, name)(*arguments)
        if code != self._cuda.cudaError_t.cudaSuccess:
            raise RuntimeError(f"{name} gives {getattr(code, 'name', code)}")
        return values[0] if values else None


def _driver_problem() -> str:
    """Why NVIDIA's driver offers no GPU, empty where it does."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return f"the driver's {_DRIVER} was not found"
    count = ctypes.c_int()
    for name, argument in (("cuInit", 0), ("cuDeviceGetCount", ctypes.byref(count))):
        code = getattr(driver, name)(argument)
        if code:
            return f"the driver's {name} gives the error {code}"
    return "" if count.value else "the driver finds none"
