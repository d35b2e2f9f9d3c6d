"""Building an engine in a process of its own, so that a compiler that crashes ends only that.

`python -m gnet_opt.backends._engine_build REQUEST` is that process; `build_apart` starts it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gnet_opt.backends._boundary import translated
from gnet_opt.backends._engine import collect_errors, reason
from gnet_opt.errors import BackendError

_ADVICE = "Check the file with `gnet-opt inspect`, or export the model again."
_WORKSPACE = 1 << 30
"""The most memory that an engine may use beside its tensors, in bytes. Where there is no
GPU, TensorRT-RTX 1.7 allows 64 GiB by itself, more than the GPUs have that the engine is for."""


def build_apart(
    module: str, title: str, model: Path, engine: Path, compute_capabilities: Sequence[str]
) -> str:
    """Build an engine in another process.

    Args:
        module: The library's import name, `tensorrt_rtx` for example.
        title: The library's name, for messages.
        model: The ONNX file.
        engine: The file to write.
        compute_capabilities: The GPUs to build for, `8.6` for example; empty leaves it to the
            library.

    Returns:
        The version of the library.

    Raises:
        BackendError: The library refused the model, or its process died.
    """
    with tempfile.TemporaryDirectory(prefix="gnet-opt-") as scratch:
        answer = Path(scratch) / "answer.json"
        request = {
            "answer": str(answer),
            "compute_capabilities": list(compute_capabilities),
            "engine": str(engine),
            "model": str(model),
            "module": module,
            "title": title,
        }
        done = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(request)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            # The current folder must not decide what is imported (ignored before Python 3.11).
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if not answer.is_file():
            code = done.returncode
            ended = f"signal {-code}" if code < 0 else f"exit code {code}"
            words = " | ".join(done.stderr.strip().splitlines()[-3:])[-400:]
            raise BackendError(
                f"Compiling {model} with {title} failed: its process died ({ended}). Its last "
                f"words: {words or 'none'}. {_ADVICE}"
            )
        told = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in told:
        raise BackendError(told["error"])
    return str(told["version"])


def main(text: str) -> None:
    """Build what a request asks for, and write the answer: a version or an error."""
    request = json.loads(text)
    try:
        with translated(f"Compiling {request['model']} with {request['title']}", _ADVICE):
            answer = {"version": _build(request)}
    except BackendError as error:
        answer = {"error": str(error)}
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")


def _build(request: dict[str, Any]) -> str:
    """Build the engine and return the library's version."""
    trt = importlib.import_module(request["module"])
    log, errors = collect_errors(trt)
    builder = trt.Builder(log)
    # Each tensor has the type that the ONNX file gives it. From 11 on nothing else is possible.
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request["model"]):
        found = [_described(parser.get_error(index)) for index in range(parser.num_errors)]
        raise RuntimeError(reason(found or errors))
    for index in range(network.num_inputs):
        shape = tuple(network.get_input(index).shape)
        if -1 in shape:
            raise BackendError(
                f"{request['model']} takes any batch: its input has the shape {shape}. An engine "
                "is built for one shape. Quantize with --batch 1."
            )
    config = builder.create_builder_config()
    # By default float layers round to ten bits of mantissa, and float would not be float.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE)
    if request["compute_capabilities"]:
        _set_compute_capabilities(trt, config, request["compute_capabilities"])
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(reason(errors))
    Path(request["engine"]).write_bytes(plan)
    return str(trt.__version__)


def _set_compute_capabilities(trt: Any, config: Any, names: list[str]) -> None:
    """Build for the GPUs that are named, by name: an enum's numbers differ by version."""
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        member = f"SM{name.replace('.', '')}"
        known = trt.ComputeCapability.__members__
        if member not in known or not config.set_compute_capability(known[member], index):
            listed = ", ".join(key for key in known if key.startswith("SM"))
            raise BackendError(
                f"{trt.__name__} {trt.__version__} does not build for compute capability {name}; "
                f"it knows {listed}. Change options.compute_capabilities of the target."
            )


def _described(error: Any) -> str:
    """A parser's error: which node, what is wrong, and where in the parser's source it says so."""
    said = f"{error.desc()} ({Path(error.file()).name}:{error.line()})"
    if error.node() < 0:  # it is about the whole file, or about a weight, which it names
        return said
    return f"node {error.node()} {error.node_name()!r} ({error.node_operator()}): {said}"


if __name__ == "__main__":
    main(sys.argv[1])
