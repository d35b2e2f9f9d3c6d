"""How each peer runs a model, in the form that `gnet_opt.bench.worker` opens.

`runtimes.py` starts the worker with the Python of the peer's environment and names `runners:get`
there; each runtime is imported when its model is opened, so that what importing costs is part of
the start. All compute in float32 where they are not asked for INT8.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt.errors import BackendError
from gnet_opt.runtime import Artifact, FloatArray

Run = Callable[[FloatArray], FloatArray]


class Opened:
    """A loaded model."""

    def __init__(self, name: str, run: Run) -> None:
        self._name = name
        self._run = run

    def run(self, batch: FloatArray) -> FloatArray:
        """Compute one batch.

        Raises:
            BackendError: The runtime cannot.
        """
        try:
            return self._run(batch)
        except Exception as error:
            raise _told(self._name, "run", error) from error


class Peer:
    """A runtime that opens models; of a backend's methods that is all that the worker needs."""

    def __init__(self, name: str, load: Callable[[Path, int | None], Run]) -> None:
        self._name = name
        self._load = load

    @contextlib.contextmanager
    def open(self, artifact: Artifact, *, threads: int | None = None) -> Iterator[Opened]:
        """Load a model.

        Args:
            artifact: What the runtime reads.
            threads: CPU threads, or None for the runtime's own choice.

        Raises:
            BackendError: The runtime is not there or refuses the model.
        """
        try:
            run = self._load(artifact.path, threads)
        except Exception as error:
            raise _told(self._name, "load", error) from error
        yield Opened(self._name, run)


def eager(path: Path, threads: int | None) -> Run:
    """PyTorch, eager."""
    return _torch(_pickled(path), threads)


def compiled(path: Path, threads: int | None) -> Run:
    """`torch.compile` with frozen weights, as PyTorch advises for inference on a CPU."""
    import torch

    _freeze()
    return _torch(torch.compile(_pickled(path)), threads)


def compiled_int8(path: Path, threads: int | None) -> Run:
    """`torch.compile` of what PT2E quantized; the freezing is what makes it INT8."""
    import torch

    # Registers the operators of the quantized program and the patterns that fuse them.
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401

    _freeze()
    return _torch(torch.compile(torch.export.load(path).module()), threads)


def executorch(path: Path, threads: int | None) -> Run:
    """ExecuTorch's Python runtime."""
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    if threads is not None:
        # The only way that its Python package has; before a model is loaded.
        portable_lib._unsafe_reset_threadpool(threads)
    method = Runtime.get().load_program(path).load_method("forward")

    def run(batch: FloatArray) -> FloatArray:
        result: FloatArray = method.execute((torch.from_numpy(batch),))[0].numpy()
        return result

    return run


def litert(path: Path, threads: int | None) -> Run:
    """LiteRT's interpreter with its default delegate, XNNPACK.

    What its quantizer makes takes and gives integers; to change to them and back is part of a run.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads)
    interpreter.allocate_tensors()
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(batch: FloatArray) -> FloatArray:
        interpreter.set_tensor(source["index"], _to_integers(batch, source))
        interpreter.invoke()
        return _from_integers(interpreter.get_tensor(target["index"]), target)

    return run


def mnn(path: Path, threads: int | None) -> Run:
    """MNN's interpreter on its CPU backend."""
    import MNN

    interpreter = MNN.Interpreter(str(path))
    options = {"backend": "CPU", "precision": "high"}
    session = interpreter.createSession(
        options if threads is None else {**options, "numThread": threads}
    )
    source = interpreter.getSessionInput(session)
    target = interpreter.getSessionOutput(session)

    def run(batch: FloatArray) -> FloatArray:
        kind = MNN.Tensor_DimensionType_Caffe
        given = MNN.Tensor(batch.shape, MNN.Halide_Type_Float, batch, kind)
        source.copyFrom(given)
        interpreter.runSession(session)
        shape = target.getShape()
        result = MNN.Tensor(shape, MNN.Halide_Type_Float, np.zeros(shape, np.float32), kind)
        target.copyToHostTensor(result)
        return np.array(result.getNumpyData(), np.float32)

    return run


def ncnn(path: Path, threads: int | None) -> Run:
    """ncnn on the CPU."""
    import ncnn

    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    for name in ("packed", "storage", "arithmetic"):
        setattr(net.opt, f"use_fp16_{name}", False)
    if threads is not None:
        net.opt.num_threads = threads
    net.load_param(str(path))
    net.load_model(str(path.with_suffix(".bin")))
    (source,), (target,) = net.input_names(), net.output_names()

    def run(batch: FloatArray) -> FloatArray:
        with net.create_extractor() as extractor:
            extractor.input(source, ncnn.Mat(batch[0]))
            code, result = extractor.extract(target)
            if code:
                raise RuntimeError(f"ncnn could not compute {target}: its code is {code}")
            return np.array(result)[None]

    return run


_PEERS: dict[str, Callable[[Path, int | None], Run]] = {
    "executorch": executorch,
    "litert": litert,
    "mnn": mnn,
    "ncnn": ncnn,
    "torch-compile": compiled,
    "torch-eager": eager,
    "torch-int8": compiled_int8,
}


def get(name: str) -> Peer:
    """The runtime of a name, for the worker."""
    return Peer(name, _PEERS[name])


def names() -> tuple[str, ...]:
    """All that `get` knows."""
    return tuple(_PEERS)


def _told(name: str, doing: str, error: Exception) -> BackendError:
    """A runtime's own error, which may be of any class, in one line."""
    return BackendError(f"{name} cannot {doing} the model: {type(error).__name__}: {error}")


def _to_integers(values: FloatArray, tensor: dict[str, Any]) -> Any:
    """What a tensor of LiteRT holds for float values."""
    kind = np.dtype(tensor["dtype"])
    if kind == np.float32:
        return values
    scale, zero_point = tensor["quantization"]
    limits = np.iinfo(kind)
    return np.clip(np.rint(values / scale) + zero_point, limits.min, limits.max).astype(kind)


def _from_integers(values: Any, tensor: dict[str, Any]) -> FloatArray:
    if values.dtype == np.float32:
        result: FloatArray = values
        return result
    scale, zero_point = tensor["quantization"]
    return np.asarray((values.astype(np.float32) - np.float32(zero_point)) * np.float32(scale))


def _freeze() -> None:
    import torch

    torch._inductor.config.freezing = True


def _pickled(path: Path) -> Any:
    import torch

    # Written by `runtimes.py` itself.
    return torch.load(path, weights_only=False).eval()


def _torch(module: Any, threads: int | None) -> Run:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)

    def run(batch: FloatArray) -> FloatArray:
        # Freezing asks for no_grad; inference_mode keeps it from working.
        with torch.no_grad():
            result: FloatArray = module(torch.from_numpy(batch)).numpy()
        return result

    return run
