"""How each peer is asked for INT8: one function a recipe, run in a process of its own.

`quantizers.py` starts it, with the Python of the peer's own environment, which need not have
gnet-opt: only numpy and the peer are imported.

    python benchmarks/peers.py versions
    python benchmarks/peers.py RECIPE FLOAT.onnx INPUTS OUT

INPUTS is a folder of preprocessed pictures, one float32 array of shape (1, 3, height, width) a
file `0000.npy`, and their `labels.json`. OUT gets `model.onnx` or OpenVINO's `model.xml` and
`model.bin`, and `step.json` with the seconds from the float file to the written one, imports left
out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

# Nothing here may report home, and gnet-opt, which sees to that elsewhere, need not be installed:
# ONNX Runtime asks for this variable, and OpenVINO and NNCF do without their package for it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

PACKAGES = ("nncf", "nvidia-modelopt", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino")
"""Whose versions make a peer's result."""

_OPERATORS = ["Concat", "Conv", "Gemm", "MaxPool", "Relu"]
"""What the better recipes for `quantize_static` quantize; all else, LRN above all, stays float.

Without Relu its input gets a range of its own, half of it for values below zero, which costs 4 to
6 dB. GlobalAveragePool beside them changes nothing.
"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every recipe gets.

    Attributes:
        model: The float ONNX file.
        inputs: Files with one preprocessed picture each.
        labels: The class index of each.
        out: An existing folder for the result.
    """

    model: Path
    inputs: tuple[Path, ...]
    labels: tuple[int, ...]
    out: Path

    @classmethod
    def open(cls, model: Path, folder: Path, out: Path) -> Task:
        """Read the folder of inputs."""
        labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        return cls(
            model=model,
            inputs=tuple(sorted(folder.glob("*.npy"))),
            labels=tuple(labels),
            out=out,
        )


class Clock:
    """Times the step itself."""

    seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the block."""
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


class Reader:
    """Pictures as ONNX Runtime's and ModelOpt's calibration ask for them: one at a time."""

    def __init__(self, task: Task) -> None:
        self._inputs = task.inputs
        self._next = iter(self._inputs)

    def get_next(self) -> dict[str, Any] | None:
        """The next picture, or None at the end."""
        path = next(self._next, None)
        return None if path is None else {"input": np.load(path)}

    def get_first(self) -> dict[str, Any]:
        """The first picture, which ModelOpt asks for beside."""
        return {"input": np.load(self._inputs[0])}

    def rewind(self) -> None:
        """Start again."""
        self._next = iter(self._inputs)


def onnxruntime_default(task: Task, clock: Clock) -> None:
    """`quantize_static` with its defaults."""
    _quantize_static(task, clock)


def onnxruntime_minmax(task: Task, clock: Clock) -> None:
    """Chosen operators, u8 activations, s8 weights per channel, min-max."""
    _quantize_static(task, clock, method="MinMax")


def onnxruntime_minmax_7(task: Task, clock: Clock) -> None:
    """Chosen operators, u8 activations, 7-bit weights per channel, min-max."""
    _quantize_static(task, clock, method="MinMax", reduce_range=True)


def onnxruntime_percentile(task: Task, clock: Clock) -> None:
    """Chosen operators, u8 activations, s8 weights per channel, percentile."""
    _quantize_static(task, clock, method="Percentile")


def onnxruntime_percentile_7(task: Task, clock: Clock) -> None:
    """Chosen operators, u8 activations, 7-bit weights per channel, percentile."""
    _quantize_static(task, clock, method="Percentile", reduce_range=True)


def onnxruntime_entropy(task: Task, clock: Clock) -> None:
    """Chosen operators, u8 activations, s8 weights per channel, entropy."""
    _quantize_static(task, clock, method="Entropy")


def nncf_default(task: Task, clock: Clock) -> None:
    """OpenVINO's converter and `nncf.quantize` with its defaults."""
    import nncf
    import openvino

    with clock.running():
        model = openvino.convert_model(task.model)
        dataset = nncf.Dataset(task.inputs, np.load)
        quantized = nncf.quantize(model, dataset)
        openvino.save_model(quantized, task.out / "model.xml", compress_to_fp16=False)


def nncf_accuracy_control(task: Task, clock: Clock) -> None:
    """`nncf.quantize_with_accuracy_control`: top-1 of the calibration pictures, drop 0.01."""
    import nncf
    import openvino

    def top1(compiled: Any, items: Iterable[tuple[Path, int]]) -> float:
        right = [int(compiled(np.load(path))[0].argmax()) == label for path, label in items]
        return float(np.mean(right))

    with clock.running():
        model = openvino.convert_model(task.model)
        items = list(zip(task.inputs, task.labels, strict=True))
        quantized = nncf.quantize_with_accuracy_control(
            model,
            nncf.Dataset(task.inputs, np.load),
            nncf.Dataset(items, lambda item: np.load(item[0])),
            top1,
        )
        openvino.save_model(quantized, task.out / "model.xml", compress_to_fp16=False)


def modelopt_entropy(task: Task, clock: Clock) -> None:
    """`modelopt.onnx.quantization.quantize`, entropy (its default); the rest in float32."""
    _modelopt(task, clock, "entropy")


def modelopt_max(task: Task, clock: Clock) -> None:
    """`modelopt.onnx.quantization.quantize`, max; the rest in float32."""
    _modelopt(task, clock, "max")


RECIPES: dict[str, Callable[[Task, Clock], None]] = {
    function.__name__: function
    for function in (
        onnxruntime_default,
        onnxruntime_minmax,
        onnxruntime_minmax_7,
        onnxruntime_percentile,
        onnxruntime_percentile_7,
        onnxruntime_entropy,
        nncf_default,
        nncf_accuracy_control,
        modelopt_entropy,
        modelopt_max,
    )
}


def versions() -> dict[str, str]:
    """Versions of `PACKAGES` in this environment; those that it lacks are left out."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _quantize_static(
    task: Task, clock: Clock, *, method: str = "", reduce_range: bool = False
) -> None:
    from onnxruntime import quantization

    advised: dict[str, Any] = {}
    if method:
        advised = {
            "activation_type": quantization.QuantType.QUInt8,
            "calibrate_method": quantization.CalibrationMethod[method],
            "op_types_to_quantize": _OPERATORS,
            "per_channel": True,
            "reduce_range": reduce_range,
            "weight_type": quantization.QuantType.QInt8,
        }
    with clock.running():
        quantization.quantize_static(task.model, task.out / "model.onnx", Reader(task), **advised)


def _modelopt(task: Task, clock: Clock, method: str) -> None:
    from modelopt.onnx import quantization

    with clock.running():
        quantization.quantize(
            str(task.model),
            calibration_data_reader=Reader(task),
            calibration_eps=["cpu"],
            calibration_method=method,
            # By default the float part becomes FP16, for a GPU: that would be another comparison.
            high_precision_dtype="fp32",
            output_path=str(task.out / "model.onnx"),
        )


def main() -> None:
    """Command line, for `quantizers.py`."""
    if sys.argv[1:] == ["versions"]:
        print(json.dumps(versions()))
        return
    recipe, model, inputs, out = sys.argv[1:]
    logging.basicConfig(level=logging.WARNING)
    clock = Clock()
    RECIPES[recipe](Task.open(Path(model), Path(inputs), Path(out)), clock)
    step = {"seconds": clock.seconds}
    (Path(out) / "step.json").write_text(json.dumps(step), encoding="utf-8")


if __name__ == "__main__":
    main()
