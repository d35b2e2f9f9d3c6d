"""What runs on the emulated CPU itself; `emulated_kernels.py` starts it there.

It needs what a device needs: gnet-opt without extras, and one runtime. Every command takes the name
of a backend and writes one file.

    python emulated_run.py logits BUNDLE BACKEND PICTURES.json FIRST LAST OUT.npy
    python emulated_run.py graph BUNDLE BACKEND OUT
    python emulated_run.py probe FOLDER BACKEND INPUT.npy OUT.npy
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gnet_opt import backends
from gnet_opt.bundle import Bundle
from gnet_opt.files import atomic_path, dump_json, write_text
from gnet_opt.runtime import run_all

THREADS = 1
"""Emulated threads take turns in any case."""


def logits(bundle: str, backend: str, pictures: str, first: str, last: str, out: str) -> None:
    """Run a bundle as a device does: its files checked, its preprocess, its model.

    Args:
        bundle: The bundle's folder.
        backend: Who runs it; for another backend than the bundle's own the portable model is run.
        pictures: A JSON list of picture files.
        first: The first picture's index.
        last: The index behind the last picture's.
        out: Gets float32 of shape (last - first, classes).
    """
    opened = Bundle.open(Path(bundle))
    opened.check()
    paths = json.loads(Path(pictures).read_text(encoding="utf-8"))[int(first) : int(last)]
    runtime = backends.get(backend)
    with runtime.open(runtime.artifact(opened.root), threads=THREADS) as runner:
        _save(out, run_all(runner, (opened.preprocess.load(Path(path)) for path in paths)))


def probe(folder: str, backend: str, inputs: str, out: str) -> None:
    """Run a compiled model on one input that lies ready.

    Args:
        folder: Where the backend's `compile` wrote it.
        backend: Who runs it.
        inputs: float32 of the model's input shape.
        out: Gets the float32 output.
    """
    runtime = backends.get(backend)
    with runtime.open(runtime.artifact(Path(folder)), threads=THREADS) as runner:
        _save(out, runner.run(np.load(inputs)))


def graph(bundle: str, backend: str, out: str) -> None:
    """Write what the runtime makes of a bundle's model on this CPU.

    Args:
        bundle: The bundle's folder.
        backend: Who runs it.
        out: Gets ONNX Runtime's optimized graph (ONNX), or a JSON list of pairs: what OpenVINO
            executes, layer type and kernel.
    """
    root = Path(bundle)
    if backend == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.log_severity_level = 3
        with atomic_path(Path(out)) as temporary:
            options.optimized_model_filepath = str(temporary)
            model = str(Bundle.open(root).model)
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return
    from gnet_opt.telemetry import import_openvino

    compiled = (
        import_openvino()
        .Core()
        .compile_model(
            backends.get(backend).artifact(root).path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
    )
    executed = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    write_text(
        Path(out),
        dump_json([[_text(node["layerType"]), _text(node["primitiveType"])] for node in executed]),
    )


def _text(value: Any) -> str:
    """OpenVINO wraps values of run-time information in a type of its own."""
    return str(value.astype(str) if hasattr(value, "astype") else value)


def _save(out: str, values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
    with atomic_path(Path(out)) as temporary, temporary.open("wb") as stream:
        np.save(stream, values)


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"graph": graph, "logits": logits, "probe": probe}
    commands[sys.argv[1]](*sys.argv[2:])
