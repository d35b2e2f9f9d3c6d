"""What TensorRT and TensorRT-RTX have in common: their engines, beside the file and on the GPU.

The two libraries have the same names for all that is used here and in `_engine_build`. An engine is
opened only when its record says that it is the one that was built, and for this machine, because a
damaged one, or one of another version, can end the process that loads it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt.backends._boundary import check_input, translated
from gnet_opt.backends._gpu import Gpu, require_gpu
from gnet_opt.errors import BackendError, MissingDependencyError
from gnet_opt.files import dump_json, is_file, sha256_file, write_text
from gnet_opt.runtime import FloatArray, Runner

SCHEMA = "gnet-opt/engine/1"

_ANYWHERE = "Run it on a machine with the GPU and its driver."
_AMPERE = (8, 0)


@dataclass(frozen=True, kw_only=True)
class Library:
    """One of the two libraries.

    Attributes:
        module: Its import name.
        title: Its name, for messages.
        again: How one of its engines is built again; the end of a sentence.
    """

    module: str
    title: str
    again: str

    def load(self, doing: str) -> Any:
        """Import the library, which is known to be there.

        Raises:
            BackendError: It cannot be imported.
        """
        with translated(doing, f"Reinstall {self.title}."):
            return importlib.import_module(self.module)


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """Where an engine comes from; the file beside it, `model.engine.json`.

    Attributes:
        backend: The backend's name.
        version: The version of the library that built it, the only one that runs it.
        compute_capabilities: The GPUs that it is for, `8.6` for example.
        model_sha256: Of the ONNX file.
        engine_sha256: Of the engine itself.
        model: The name of the ONNX file, in the engine's folder.
        gpu: The GPU that it was built on and for; empty where it was built without one.
        cuda: The version of CUDA of that GPU's driver. It is told and not compared: an engine
            depends on the version of TensorRT, the GPU and the platform
            (https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/support-matrix.html).
        version_compatible: Whether later versions of the library run it, too.
        hardware_compatibility: Which other GPUs run it; empty for none.
    """

    backend: str
    version: str
    compute_capabilities: tuple[str, ...]
    model_sha256: str
    engine_sha256: str
    model: str = "model.onnx"
    gpu: str = ""
    cuda: str = ""
    version_compatible: bool = False
    hardware_compatibility: str = ""

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
            record = cls(**values)
            _check_types(values)
            return replace(record, compute_capabilities=tuple(record.compute_capabilities))
        except (
            AttributeError,
            KeyError,
            OSError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise BackendError(
                f"{path} cannot be read ({error}), so it is not known what the engine beside it "
                "is. Copy the bundle again, or build it again."
            ) from error

    def write(self, path: Path) -> None:
        """Write the record."""
        values = {
            "backend": self.backend,
            "compute_capabilities": list(self.compute_capabilities),
            "cuda": self.cuda,
            "engine_sha256": self.engine_sha256,
            "gpu": self.gpu,
            "hardware_compatibility": self.hardware_compatibility,
            "model": self.model,
            "model_sha256": self.model_sha256,
            "schema": SCHEMA,
            "version": self.version,
            "version_compatible": self.version_compatible,
        }
        write_text(path, dump_json(values))

    def check(self, engine: Path, library: Library, version: str, gpu: Gpu) -> bytes:
        """Refuse an engine that is not the one that was built, or not for this machine.

        Returns:
            The engine that was checked. Who loads it must not read the file again, which another
            process may have replaced.

        Raises:
            BackendError: The engine is missing, changed or stale; the message says what to do.
        """
        problem, plan = self.problem(engine, library, version, gpu), b""
        if not problem:
            plan = engine.read_bytes()
            if hashlib.sha256(plan).hexdigest() != self.engine_sha256:
                problem = f"{engine} was changed while it was read (its SHA-256 differs)"
        if problem:
            other = self.version != version and is_file(engine)
            install = f"Install {self.version}, or " if other else ""
            advice = f"{install}{library.again}."
            raise BackendError(f"{problem}. {advice[0].upper()}{advice[1:]}")
        return plan

    def problem(self, engine: Path, library: Library, version: str, gpu: Gpu) -> str:
        """Why an engine must not be loaded here, a sentence without its end; empty where it may.

        Args:
            engine: The engine's file.
            library: What is to run it.
            version: The library's version.
            gpu: The GPU that is to run it.
        """
        if not is_file(engine):
            return f"{engine} does not exist"
        if not self._runs_with(version):
            only = "later ones of its major version" if self.version_compatible else "no other"
            return (
                f"{engine} was built by {library.title} {self.version} and runs with {only}, but "
                f"this machine has {version}"
            )
        if not self._runs_on(gpu):
            built = f"{self.gpu} (compute capability {', '.join(self.compute_capabilities)})"
            return f"{engine} was built for {built}, but this machine has {gpu}"
        if self.engine_sha256 != sha256_file(engine):
            return f"{engine} was changed after it was built (its SHA-256 differs)"
        model = engine.with_name(self.model)
        if is_file(model) and self.model_sha256 != sha256_file(model):
            return f"{engine} was not built from the {self.model} beside it (its SHA-256 differs)"
        return ""

    def _runs_with(self, version: str) -> bool:
        if not self.version_compatible:
            return self.version == version
        built, here = (
            [int(number) for number in re.findall(r"\d+", text)] for text in (self.version, version)
        )
        # Two steps over a major version are documented, with exceptions in the release notes.
        return built[:1] == here[:1] and built <= here

    def _runs_on(self, gpu: Gpu) -> bool:
        if not self.gpu or (self.gpu == gpu.name and self._has(gpu.compute_capability)):
            return True
        major, minor = (int(number) for number in gpu.compute_capability.split("."))
        return self.hardware_compatibility == "ampere_plus" and (major, minor) >= _AMPERE

    def _has(self, compute_capability: str) -> bool:
        return compute_capability in self.compute_capabilities


def _check_types(values: dict[str, Any]) -> None:
    """Refuse a record with values that nothing here writes: a bundle may come from anywhere.

    Raises:
        ValueError: A value is of the wrong type or form.
    """
    for key, value in values.items():
        listed = key == "compute_capabilities"
        texts = value if listed else [value]
        kind = bool if key == "version_compatible" else str
        if isinstance(value, list) != listed or not all(isinstance(text, kind) for text in texts):
            raise ValueError(f"its {key} is of the wrong type")
    if not re.fullmatch(r"[\w.+-]{1,64}", values["version"]):
        raise ValueError("its version is none")
    model = values.get("model", EngineRecord.model)
    if model in ("", ".", "..") or re.search(r"[/\\\0]", model):
        raise ValueError(f"its model {model!r} is no name of a file")


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


@contextlib.contextmanager
def open_engine(engine: Path, library: Library) -> Iterator[Runner]:
    """Load an engine on the first GPU.

    Args:
        engine: Its file, with its record beside it.
        library: What runs it; it is installed.

    Raises:
        MissingDependencyError: CUDA's Python package is not installed.
        BackendError: The engine is damaged or stale, there is no GPU, or the library refused it.
    """
    gpu = require_gpu(f"{engine} was not run", _ANYWHERE)
    doing, advice = (
        f"Loading {engine} with {library.title}",
        "Check the bundle with `gnet-opt verify`.",
    )
    trt = library.load(doing)
    record = EngineRecord.read(record_of(engine))
    plan = record.check(engine, library, str(trt.__version__), gpu)
    try:
        cuda = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        # A package for a later major version of CUDA than the driver's does not run. It is a small
        # one of NVIDIA's own, where PyTorch or CuPy, which could copy as well, take gigabytes.
        later = int(gpu.cuda.split(".")[0]) + 1
        raise MissingDependencyError(
            f"cuda-bindings is needed to run {engine.name}, and it cannot be imported ({error}). "
            f'Install it for this driver: pip install "cuda-bindings<{later}"'
        ) from error
    with translated(doing, advice):
        runner = EngineRunner(trt, cuda, engine, plan, library.title, record.version_compatible)
    try:
        yield runner
    finally:
        runner.close()


class EngineRunner:
    """One execution context with its memory; see `gnet_opt.runtime.Runner`.

    A picture is copied to page-locked memory first, the only one that CUDA copies from without
    waiting. All memory is taken once, for the greatest batch that the engine takes.
    """

    device_ns: int | None = None
    """How long the GPU computed in the last run, in nanoseconds, copies left out: the time between
    two CUDA events around the engine. None before the first run."""

    def __init__(
        self, trt: Any, cuda: Any, path: Path, plan: bytes, title: str, version_compatible: bool
    ) -> None:
        self._cuda = cuda
        self._path = path
        self._title = title
        log, self._errors = collect_errors(trt)
        runtime = self._runtime = trt.Runtime(log)
        if version_compatible:
            # Such an engine brings the code that runs it. Its hash is that of our own build.
            runtime.engine_host_code_allowed = True
        engine = self._engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise RuntimeError(reason(self._errors))
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = [engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names]
        floats = all(engine.get_tensor_dtype(name) == trt.DataType.FLOAT for name in names)
        if sorted(modes) != [False, True] or not floats:
            raise BackendError(
                f"{path} does not have one input and one output in float32, as a classifier "
                "has. Build the bundle again."
            )
        self._source, result = (names[modes.index(mode)] for mode in (True, False))
        self._context = engine.create_execution_context()
        if self._context is None:
            raise RuntimeError(reason(self._errors))
        self._least, most = self._shapes()
        # Where any batch is taken, this is the one that the context is set to; otherwise None.
        self._batch: int | None = None
        if self._least[0] != most[0]:
            self._set_batch(most)
        with contextlib.ExitStack() as held:
            self._stream = self._taken(held, "cudaStreamCreate", "cudaStreamDestroy")
            self._events = [
                self._taken(held, "cudaEventCreate", "cudaEventDestroy") for _ in range(2)
            ]
            self._input, self._device_input = self._memory(held, self._source)
            self._output, self._device_output = self._memory(held, result)
            self._held = held.pop_all()

    def run(self, batch: FloatArray) -> FloatArray:
        if self._context is None:
            raise BackendError(f"{self._path} was closed; run it inside its `with` block.")
        most, *picture = self._input.shape
        fixed = self._batch is None
        batch = check_input(batch, (most if fixed else None, *picture), str(self._path))
        count = len(batch)
        if not fixed and not self._least[0] <= count <= most:
            raise BackendError(
                f"{self._path} takes {self._least[0]} to {most} pictures at once, but got {count}. "
                "Split the batch, or build the bundle again for a target whose options.batches "
                "go so far."
            )
        source, result = self._input[:count], self._output[:count]
        kinds = self._cuda.cudaMemcpyKind
        into, out = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        with translated(
            f"Running {self._path} with {self._title}", "Check the bundle with `gnet-opt verify`."
        ):
            self._errors.clear()
            if not fixed and count != self._batch:
                self._set_batch((count, *picture))
            np.copyto(source, batch)
            self._copy(self._device_input, source.ctypes.data, source.nbytes, into)
            self._call("cudaEventRecord", self._events[0], self._stream)
            if not self._context.execute_async_v3(int(self._stream)):
                raise RuntimeError(reason(self._errors))
            self._call("cudaEventRecord", self._events[1], self._stream)
            self._copy(result.ctypes.data, self._device_output, result.nbytes, out)
            self._call("cudaStreamSynchronize", self._stream)
            milliseconds = self._call("cudaEventElapsedTime", *self._events)
            self.device_ns = round(float(milliseconds) * 1e6)
            # The next picture's logits are written into the same memory.
            return np.array(result, np.float32)

    def close(self) -> None:
        """Give everything back, the context before the memory that it uses."""
        self._context = self._engine = self._runtime = None
        self._held.close()

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The least and the greatest shape that the input takes."""
        shape = tuple(self._engine.get_tensor_shape(self._source))
        if -1 not in shape:
            return shape, shape
        least, _, most = self._engine.get_tensor_profile_shape(self._source, 0)
        return tuple(least), tuple(most)

    def _set_batch(self, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(self._source, shape):
            raise RuntimeError(reason(self._errors))
        self._batch = shape[0]

    def _memory(self, held: contextlib.ExitStack, name: str) -> tuple[FloatArray, int]:
        """Memory of a tensor on the host, as an array, and on the device, bound to the context."""
        shape = tuple(self._context.get_tensor_shape(name))
        count = math.prod(shape)
        size = count * np.dtype(np.float32).itemsize
        device = int(self._taken(held, "cudaMalloc", "cudaFree", size))
        host = int(self._taken(held, "cudaMallocHost", "cudaFreeHost", size))
        if not self._context.set_tensor_address(name, device):
            raise RuntimeError(reason(self._errors))
        values: FloatArray = np.ctypeslib.as_array((ctypes.c_float * count).from_address(host))
        return values.reshape(shape), device

    def _taken(
        self, held: contextlib.ExitStack, take: str, give_back: str, *arguments: object
    ) -> Any:
        """Take something of CUDA's, which `held` gives back."""
        value = self._call(take, *arguments)
        held.callback(getattr(self._cuda, give_back), value)
        return value

    def _copy(self, to: int, source: int, size: int, kind: object) -> None:
        self._call("cudaMemcpyAsync", to, source, size, kind, self._stream)

    def _call(self, name: str, *arguments: object) -> Any:
        """Call a function of CUDA's runtime; its first result is an error code."""
        code, *values = getattr(self._cuda, name)(*arguments)
        if code != self._cuda.cudaError_t.cudaSuccess:
            raise RuntimeError(f"{name} gives {getattr(code, 'name', code)}")
        return values[0] if values else None
