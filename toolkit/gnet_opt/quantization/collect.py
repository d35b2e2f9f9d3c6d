"""Run the float graph over the calibration pictures and count what decides the ranges."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from gnet_opt.errors import CalibrationError
from gnet_opt.machine import this_machine
from gnet_opt.quantization.graph import constant
from gnet_opt.quantization.regions import Region, compute_nodes, load_graph
from gnet_opt.quantization.statistics import Histogram, Statistics

if TYPE_CHECKING:
    import onnx_ir as ir

FloatArray = npt.NDArray[np.float32]
_T = TypeVar("_T")
_R = TypeVar("_R")

_MOST_AT_A_TIME = 8
"""Pictures under way at most: each takes memory, about 40 MB for GoogLeNet."""


def collect(
    model: Path,
    regions: Iterable[Region],
    inputs: Iterable[FloatArray],
    *,
    histograms: bool = True,
    threads: int | None = None,
) -> Statistics:
    """Stream pictures through a float ONNX file; memory does not grow with their number.

    Several pictures are under way at the same time, with one thread each: what is computed of a
    picture beside the runtime's own work runs on one core. Their number does not change what is
    found.

    Args:
        model: The float ONNX file.
        regions: What `find_regions` found in it.
        inputs: Preprocessed pictures, float32 of shape (planes, height, width) each.
        histograms: Whether to count how often values occur.
        threads: CPU threads, of which `_MOST_AT_A_TIME` are used at most, or None for one a core.

    Raises:
        CalibrationError: There is no picture, a weight or an activation is not finite, or every
            picture is of a single colour.
    """
    workers = min(threads or this_machine().cores, _MOST_AT_A_TIME)
    graph = _Graph(model, regions, histograms=histograms)
    total: Statistics | None = None
    plain = 0

    def counted() -> Iterator[tuple[int, FloatArray]]:
        nonlocal plain
        for number, image in enumerate(inputs, 1):
            plain += bool((image == image[:, :1, :1]).all())
            yield number, image

    with ThreadPoolExecutor(workers) as pool:
        for seen in _in_order(pool, graph.look, counted(), ahead=workers):
            total = seen if total is None else total.merged(seen)
    if total is None:
        raise CalibrationError("There is no picture to calibrate on. Pass a folder that has some.")
    if plain == total.images:
        raise CalibrationError(
            f"Each of the {plain} calibration pictures is of a single colour, so the ranges would "
            "fit no real picture. Pass pictures like those that the model will see."
        )
    return total


class _Graph:
    """A float graph that gives the tensors that are looked at."""

    def __init__(self, model: Path, regions: Iterable[Region], *, histograms: bool) -> None:
        import onnx_ir as ir

        graph_model = load_graph(model)
        graph = graph_model.graph
        _check_finite(graph)
        self._deciding = sorted({tensor for region in regions for tensor in region.sources})
        self._fed = list(
            dict.fromkeys(
                str(node.inputs[0].name)
                for node in compute_nodes(graph)
                if node.inputs[0] is not None
            )
        )
        self._histograms = histograms
        self._input = str(graph.inputs[0].name)
        watched = {*self._deciding, *self._fed}
        computed = [value for node in graph for value in node.outputs if value.name in watched]
        self._names = [str(value.name) for value in computed]
        graph.outputs.clear()
        graph.outputs.extend(computed)
        self._session = _session(ir.to_proto(graph_model).SerializeToString())

    def look(self, numbered: tuple[int, FloatArray]) -> Statistics:
        """What one picture makes of the tensors.

        Args:
            numbered: The picture and its number, for messages.

        Raises:
            CalibrationError: A value is not finite.
        """
        number, image = numbered
        values = {self._input: image[None]}
        if self._names:  # without names there is one layer, which reads the input itself
            found = self._session.run(self._names, {self._input: image[None]})
            values |= zip(self._names, found, strict=True)
        lows, highs, histograms = {}, {}, {}
        for name in self._deciding:
            rows = _rows(values[name])
            lows[name], highs[name] = rows.min(axis=1), rows.max(axis=1)
            if not (np.isfinite(lows[name]).all() and np.isfinite(highs[name]).all()):
                raise CalibrationError(
                    f"The tensor {name} of picture {number} holds a value that is not finite. "
                    "Check the weights and the preprocess of the model."
                )
            if self._histograms:
                histograms[name] = Histogram()
                histograms[name].add(rows)
        sums = {name: _rows(values[name]).mean(axis=1, dtype=np.float64) for name in self._fed}
        return Statistics(images=1, lows=lows, highs=highs, sums=sums, histograms=histograms)


def _rows(value: FloatArray) -> FloatArray:
    """One row a channel, of a tensor of shape (1, channels, ...)."""
    return value.reshape(value.shape[1], -1)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[_T], _R], items: Iterable[_T], *, ahead: int
) -> Iterator[_R]:
    """Map items in the pool's threads; unlike `pool.map`, read only so many items ahead."""
    waiting: deque[Future[_R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _check_finite(graph: ir.Graph) -> None:
    # Not left to the activations: no tensor behind the last layer is looked at, and a ReLU turns
    # minus infinity into zeros.
    for node in compute_nodes(graph):
        for value in node.inputs[1:]:
            array = constant(value)
            if value is not None and array is not None and not np.isfinite(array).all():
                raise CalibrationError(
                    f"The constant {value.name} of the {node.op_type} {node.name} holds a value "
                    "that is not finite. Check the weights of the model."
                )


def _session(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
