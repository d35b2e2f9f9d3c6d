"""TensorRT, CUDA and a driver for machines without a GPU, as strict as the real ones.

A library has the classes and names that `tensorrt_names.json` lists for its version and no others,
and its enums have numbers of their own, so that code which uses a name that a version lacks, or a
number in the place of a name, fails here as it would there. What an engine computes is what ONNX
Runtime computes of the file that it was built from.

A process that imports `tensorrt` gets such a library with the folder that `shim` makes in its path:
its version is `FAKE_TENSORRT`, and `FAKE_TENSORRT_DOES` says what it does wrong.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from enum import Enum, IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError

NAMES: dict[str, dict[str, list[str]]] = json.loads(
    Path(__file__).with_name("tensorrt_names.json").read_text(encoding="utf-8")
)["versions"]

CUDA = [
    "cudaError_t",
    "cudaEventCreate",
    "cudaEventDestroy",
    "cudaEventElapsedTime",
    "cudaEventRecord",
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
"""Every name of CUDA's runtime that the package uses."""


def shim(folder: Path, module: str = "tensorrt") -> Path:
    """A folder for PYTHONPATH whose `module` is a library of this file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(
        f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n"
        f"from fake_tensorrt import from_environment\nsys.modules[__name__] = from_environment()\n"
    )
    return folder


def from_environment() -> ModuleType:
    """The library that the environment asks for."""
    does = os.environ.get("FAKE_TENSORRT_DOES", "")
    if does == "not load":
        raise ImportError("libnvinfer.so.10: cannot open shared object file")
    return FakeTensorRt(os.environ["FAKE_TENSORRT"], Gpu(), fails={does}).module()


class Driver:
    """NVIDIA's driver, as ctypes loads it: an error of cuInit, and the GPUs."""

    def __init__(
        self,
        code: int = 0,
        count: int = 1,
        name: str = "Orin",
        compute_capability: tuple[int, int] = (8, 7),
        cuda: int = 12060,
    ) -> None:
        self._code, self._count, self._cuda = code, count, cuda
        self._name, self._compute_capability = name, compute_capability

    def cuInit(self, flags: int) -> int:  # noqa: N802 (NVIDIA's name)
        assert flags == 0
        return self._code

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self._count
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        assert ordinal == 0
        device._obj.value = 70
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: int) -> int:  # noqa: N802
        assert (device, len(name)) == (70, size)
        name.value = self._name.encode()
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:  # noqa: N802
        assert device == 70
        value._obj.value = dict(zip((75, 76), self._compute_capability, strict=True))[attribute]
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self._cuda
        return 0


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return CODE; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "A GPU", size); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 12 : attribute == 76 ? 1 : -1;
    return 0;
}
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
"""
"""The same in C, for a compiler: CODE is the error of cuInit."""


class Error(IntEnum):
    cudaSuccess = 0  # noqa: N815
    cudaErrorInvalidValue = 1  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815


class Kind(Enum):
    cudaMemcpyHostToDevice = 1  # noqa: N815
    cudaMemcpyDeviceToHost = 2  # noqa: N815


class Gpu:
    """Memory, events, and a stream that does its work when it is waited for."""

    def __init__(self) -> None:
        self.host: dict[int, Any] = {}
        self.device: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.events: dict[int, int | None] = {}
        self.queue: list[Callable[[], object]] = []
        self.allocations_left = 99
        self._numbers = itertools.count(7)

    @property
    def is_empty(self) -> bool:
        """Whether all was given back."""
        return not (self.host or self.device or self.streams or self.events)

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
        assert size <= min(len(there[to]), len(here[source]))
        assert stream in self.streams
        self.queue.append(lambda: ctypes.memmove(to, source, size))
        return (Error.cudaSuccess,)

    def create_stream(self) -> tuple[Error, int]:
        stream = next(self._numbers)
        self.streams.add(stream)
        return Error.cudaSuccess, stream

    def destroy_stream(self, stream: int) -> tuple[Error]:
        self.streams.remove(stream)
        return (Error.cudaSuccess,)

    def create_event(self) -> tuple[Error, int]:
        event = next(self._numbers)
        self.events[event] = None
        return Error.cudaSuccess, event

    def destroy_event(self, event: int) -> tuple[Error]:
        del self.events[event]
        return (Error.cudaSuccess,)

    def record(self, event: int, stream: int) -> tuple[Error]:
        assert event in self.events and stream in self.streams
        self.queue.append(lambda: self.events.__setitem__(event, time.perf_counter_ns()))
        return (Error.cudaSuccess,)

    def elapsed(self, start: int, end: int) -> tuple[Error, float]:
        first, last = self.events[start], self.events[end]
        if first is None or last is None:
            return Error.cudaErrorInvalidValue, 0.0
        return Error.cudaSuccess, (last - first) / 1e6

    def wait(self, stream: int) -> tuple[Error]:
        assert stream in self.streams
        while self.queue:
            self.queue.pop(0)()
        return (Error.cudaSuccess,)

    def module(self) -> ModuleType:
        """The fake `cuda.bindings.runtime`."""
        made = ModuleType("cuda.bindings.runtime")
        names = {
            "cudaError_t": Error,
            "cudaEventCreate": self.create_event,
            "cudaEventDestroy": self.destroy_event,
            "cudaEventElapsedTime": self.elapsed,
            "cudaEventRecord": self.record,
            "cudaFree": lambda address: self.free(self.device, address),
            "cudaFreeHost": lambda address: self.free(self.host, address),
            "cudaMalloc": lambda size: self.take(self.device, size),
            "cudaMallocHost": lambda size: self.take(self.host, size),
            "cudaMemcpyAsync": self.copy,
            "cudaMemcpyKind": Kind,
            "cudaStreamCreate": self.create_stream,
            "cudaStreamDestroy": self.destroy_stream,
            "cudaStreamSynchronize": self.wait,
        }
        assert sorted(names) == CUDA
        for name, value in names.items():
            setattr(made, name, value)
        return made


def plan_of(version: str, model: bytes, **told: Any) -> bytes:
    """An engine's bytes: what is known of its build in one line of JSON, and the ONNX file."""
    return json.dumps({"version": version, **told}, sort_keys=True).encode() + b"\n" + model


def read_plan(plan: bytes) -> tuple[dict[str, Any], bytes]:
    """What `plan_of` put together."""
    line, _, model = plan.partition(b"\n")
    return json.loads(line), model


class FakeTensorRt:
    """A library of a version.

    Args:
        version: What it says of itself.
        gpu: Where its engines run.
        names: The version whose names it has; by default its own.
        fails: What it does wrong; tests change it: `address`, `build`, `context`, `crash`,
            `deserialize`, `execute`, `forever`, `shape`.
    """

    def __init__(
        self, version: str, gpu: Gpu, *, names: str | None = None, fails: set[str] | None = None
    ) -> None:
        self.version = version
        self.gpu = gpu
        self.fails = fails or set()
        self._names = NAMES[names or version]

    def module(self, name: str = "tensorrt") -> ModuleType:
        made = ModuleType(name)
        made.__spec__ = sys.__spec__
        made.__version__ = self.version  # type: ignore[attr-defined]
        enums = (
            "BuilderFlag",
            "DataType",
            "HardwareCompatibilityLevel",
            "MemoryPoolType",
            "NetworkDefinitionCreationFlag",
            "TensorIOMode",
        )
        for kind in enums:
            # pybind11's enums give an int for each, whose value is no concern of anybody.
            first = int(self.version.split(".")[0])
            members = [n for n in self._names[kind] if n not in ("name", "value")]
            setattr(made, kind, IntEnum(kind, {n: i for i, n in enumerate(members, first)}))
        for kind, members in _classes(self, made).items():
            if kind in self._names:
                setattr(made, kind, self._strict(kind, members))
        return made

    def _strict(self, kind: str, members: dict[str, Any]) -> type:
        """A class with those of the members that this version has; no others can be set."""
        allowed = set(self._names[kind])

        def set_known(this: object, name: str, value: object) -> None:
            if not name.startswith("_") and name not in allowed:
                raise AttributeError(f"'{kind}' object has no attribute '{name}'")
            object.__setattr__(this, name, value)

        kept = {n: v for n, v in members.items() if n.startswith("_") or n in allowed}
        return type(kind, (), {**kept, "__setattr__": set_known})


def _classes(fake: FakeTensorRt, trt: Any) -> dict[str, dict[str, Any]]:
    """The classes that are no enums, each as a superset of what the versions have."""

    class ILogger:
        Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")

        def log(self, severity: object, message: str) -> None:
            raise NotImplementedError

    def say(log: Any, message: str, severity: str = "ERROR") -> None:
        log.log(log.Severity[severity], message)

    # --- building -----------------------------------------------------------------------------

    class IProgressMonitor:
        def phase_start(self, phase_name: str, parent_phase: str | None, steps: int) -> None:
            raise NotImplementedError

        def step_complete(self, phase_name: str, step: int) -> bool:
            raise NotImplementedError

        def phase_finish(self, phase_name: str) -> None:
            raise NotImplementedError

    class ITensor:
        def __init__(self, value: onnx.ValueInfoProto) -> None:
            self.name = value.name
            self.shape = tuple(
                -1 if size.dim_param else size.dim_value
                for size in value.type.tensor_type.shape.dim
            )

    class INetworkDefinition:
        def __init__(self, log: Any) -> None:
            self._log = log
            self._model: onnx.ModelProto | None = None
            self._content = b""

        @property
        def num_inputs(self) -> int:
            return len(self._model.graph.input) if self._model else 0

        def get_input(self, index: int) -> Any:
            assert self._model is not None
            return trt.ITensor(self._model.graph.input[index])

    class ParserError:
        def __init__(self, node: int, text: str) -> None:
            self._node, self._text = node, text

        def desc(self) -> str:
            return self._text

        def file(self) -> str:
            return "/build/parsers/onnx/ModelImporter.cpp"

        def line(self) -> int:
            return 180

        def node(self) -> int:
            return self._node

        def node_name(self) -> str:
            return "a node"

        def node_operator(self) -> str:
            return "DequantizeLinear"

    class OnnxParser:
        def __init__(self, network: Any, log: Any) -> None:
            self._network, self._errors = network, []

        def parse_from_file(self, path: str) -> bool:
            content = Path(path).read_bytes()
            try:
                model = onnx.load_from_string(content)
                onnx.checker.check_model(model)
            except (DecodeError, onnx.checker.ValidationError) as error:
                self._errors.append(trt.ParserError(-1, str(error).splitlines()[0]))
                return False
            weights = {tensor.name for tensor in model.graph.initializer}
            for index, node in enumerate(model.graph.node):
                fixed = node.op_type == "DequantizeLinear" and node.input[0] in weights
                if fixed and fake.version.startswith("8."):
                    text = f"{node.input[0]}: invalid weights type of Int8"
                    self._errors.append(trt.ParserError(index, text))
            self._network._model, self._network._content = model, content
            return not self._errors

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> Any:
            return self._errors[index]

    class IOptimizationProfile:
        def __init__(self) -> None:
            self._shapes: dict[str, list[list[int]]] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            assert len(tuple(min)) == len(tuple(opt)) == len(tuple(max)) == 4
            self._shapes[input] = [list(min), list(opt), list(max)]

    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self._content = content

        def serialize(self) -> memoryview:
            return memoryview(self._content)

    class IBuilderConfig:
        def __init__(self, log: Any) -> None:
            self._log = log
            self._flags = {trt.BuilderFlag.TF32}
            self._limits: dict[str, int] = {}
            self._profiles: list[Any] = []
            self._cache: Any = None

        def set_flag(self, flag: Any) -> None:
            assert isinstance(flag, trt.BuilderFlag)
            self._flags.add(flag)

        def clear_flag(self, flag: Any) -> None:
            assert isinstance(flag, trt.BuilderFlag)
            self._flags.discard(flag)

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            assert isinstance(pool, trt.MemoryPoolType)
            self._limits[pool.name] = size

        def add_optimization_profile(self, profile: Any) -> int:
            self._profiles.append(profile)
            return -1 if "profile" in fake.fails else len(self._profiles) - 1

        def create_timing_cache(self, content: bytes) -> Any:
            return trt.ITimingCache(content or f"timings {fake.version} 0".encode())

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            if not cache._content.startswith(f"timings {fake.version} ".encode()):
                say(self._log, "the timing cache is of another device")
                return False
            self._cache = cache
            return True

        def get_timing_cache(self) -> Any:
            return self._cache

    class Builder:
        def __init__(self, log: Any) -> None:
            self._log = log

        def create_network(self, flags: int) -> Any:
            known = trt.NetworkDefinitionCreationFlag.__members__
            wanted = "STRONGLY_TYPED" if "STRONGLY_TYPED" in known else "EXPLICIT_BATCH"
            assert flags == 1 << int(known[wanted])
            return trt.INetworkDefinition(self._log)

        def create_builder_config(self) -> Any:
            return trt.IBuilderConfig(self._log)

        def create_optimization_profile(self) -> Any:
            return trt.IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> memoryview | None:
            flags = sorted(flag.name for flag in config._flags)
            shapes = config._profiles[0]._shapes if config._profiles else {}
            typed = "STRONGLY_TYPED" in trt.NetworkDefinitionCreationFlag.__members__
            if not typed and b"QuantizeLinear" in network._content and "INT8" not in flags:
                say(self._log, "Networks with Q/DQ need INT8 to be enabled")
                return None
            for value in network._model.graph.input:
                if -1 in trt.ITensor(value).shape and value.name not in shapes:
                    say(self._log, "no optimization profile has been defined")
                    return None
            if "crash" in fake.fails:
                print("assertion failed", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGSEGV)
            if not _tell(getattr(config, "progress_monitor", None), "forever" in fake.fails):
                return None
            if "build" in fake.fails:
                say(self._log, "Could not find any implementation for node conv1")
                return None
            old = config._cache._content if config._cache else b"x 0"
            kept, _, count = old.rpartition(b" ")
            if config._cache:
                config._cache = trt.ITimingCache(kept + b" %d" % (int(count) + 1))
            level = getattr(config, "hardware_compatibility_level", None)
            plan = plan_of(
                fake.version,
                network._content,
                flags=flags,
                hardware=level.name if level is not None else "NONE",
                limits=config._limits,
                shapes=shapes,
                timings=int(count),
            )
            return memoryview(plan)

    # --- running ------------------------------------------------------------------------------

    class IExecutionContext:
        def __init__(self, log: Any, engine: Any) -> None:
            self._log, self._engine_ = log, engine
            self._addresses: dict[str, int] = {}
            self._shape = tuple(engine._io[engine._input])

        def set_input_shape(self, name: str, shape: Any) -> bool:
            assert name == self._engine_._input
            least, _, most = self._engine_._shapes[name]
            within = all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
            if not within or "shape" in fake.fails:
                say(self._log, "the shape is outside of the profile")
                return False
            self._shape = tuple(shape)
            return True

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            if name == self._engine_._input:
                return self._shape
            batch, *rest = self._engine_._io[name]
            return (self._shape[0] if batch == -1 else batch, *rest)

        def set_tensor_address(self, name: str, address: int) -> bool:
            assert address in fake.gpu.device
            self._addresses[name] = address
            return "address" not in fake.fails

        def execute_async_v3(self, stream: int) -> bool:
            assert stream in fake.gpu.streams
            if "execute" in fake.fails:
                say(self._log, "out of registers")
                return False
            assert -1 not in self._shape
            fake.gpu.queue.append(self._compute)
            return True

        def _compute(self) -> None:
            engine = self._engine_
            data = fake.gpu.device[self._addresses[engine._input]]
            count = int(np.prod(self._shape))
            batch = np.frombuffer(data, np.float32, count).reshape(self._shape)
            (output,) = (name for name in engine._io if name != engine._input)
            logits = engine._session.run([output], {engine._input: batch})[0]
            assert logits.nbytes <= len(fake.gpu.device[self._addresses[output]])
            ctypes.memmove(self._addresses[output], logits.ctypes.data, logits.nbytes)

    class ICudaEngine:
        def __init__(self, log: Any, plan: bytes) -> None:
            self._log = log
            told, content = read_plan(plan)
            model = onnx.load_from_string(content)
            values = [*model.graph.input, *model.graph.output]
            self._io = {value.name: trt.ITensor(value).shape for value in values}
            self._types = {value.name: value.type.tensor_type.elem_type for value in values}
            self._inputs = {value.name for value in model.graph.input}
            self._input = model.graph.input[0].name
            self._shapes = told.get("shapes", {})
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            self._session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )

        @property
        def num_io_tensors(self) -> int:
            return len(self._io)

        def get_tensor_name(self, index: int) -> str:
            return list(self._io)[index]

        def get_tensor_mode(self, name: str) -> object:
            return trt.TensorIOMode["INPUT" if name in self._inputs else "OUTPUT"]

        def get_tensor_dtype(self, name: str) -> object:
            return trt.DataType["FLOAT" if self._types[name] == onnx.TensorProto.FLOAT else "HALF"]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self._io[name]

        def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
            assert profile == 0
            return [tuple(shape) for shape in self._shapes[name]]

        def create_execution_context(self) -> Any:
            if "context" in fake.fails:
                say(self._log, "no kernels for this GPU", "INTERNAL_ERROR")
                return None
            return trt.IExecutionContext(self._log, self)

    class Runtime:
        def __init__(self, log: Any) -> None:
            self._log = log
            self.engine_host_code_allowed = False

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            say(self._log, "do not mind", "WARNING")
            if "deserialize" in fake.fails:
                return None
            told = read_plan(plan)[0]
            compatible = "VERSION_COMPATIBLE" in told.get("flags", [])
            if compatible and not self.engine_host_code_allowed:
                say(self._log, "the engine has host code, which is not allowed")
                return None
            if told["version"] != fake.version and not compatible:
                say(self._log, "the engine plan file is not compatible with this version")
                return None
            return trt.ICudaEngine(self._log, plan)

    made = (
        Builder,
        IBuilderConfig,
        ICudaEngine,
        IExecutionContext,
        ILogger,
        INetworkDefinition,
        IOptimizationProfile,
        IProgressMonitor,
        ITensor,
        ITimingCache,
        OnnxParser,
        ParserError,
        Runtime,
    )
    return {
        kind.__name__: {n: v for n, v in vars(kind).items() if n not in ("__dict__", "__weakref__")}
        for kind in made
    }


def _tell(monitor: Any, forever: bool) -> bool:
    """Tell a monitor of a build as TensorRT does, phases in phases; False where it stops it."""
    if monitor is None:
        while forever:
            time.sleep(0.02)
        return True
    monitor.phase_start("Building engine", None, 2)
    for name, steps in (("Optimizing the graph", 3), ("Timing kernels", 4)):
        monitor.phase_start(name, "Building engine", steps)
        for step in itertools.count() if forever else range(steps):
            monitor.phase_start("Trying tactics", name, 1)
            monitor.step_complete("Trying tactics", 0)
            monitor.phase_finish("Trying tactics")
            if forever:
                time.sleep(0.02)
            if not monitor.step_complete(name, step):
                return False
        monitor.phase_finish(name)
    monitor.phase_finish("Building engine")
    return True
