"""Run the float graph over the calibration pictures and count what decides the ranges."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gnet_opt.errors import CalibrationError
from gnet_opt.quantization.graph import constant
from gnet_opt.quantization.regions import Region, compute_nodes, load_graph
from gnet_opt.quantization.statistics import Histogram, Statistics

if TYPE_CHECKING:
    import onnx_ir as ir

FloatArray = npt.NDArray[np.float32]


def collect(
    model: Path,
    regions: Iterable[Region],
    inputs: Iterable[FloatArray],
    *,
    threads: int | None = None,
) -> Statistics:
    """Stream pictures through a float ONNX file; memory does not grow with their number.

    Args:
        model: The float ONNX file.
        regions: What `find_regions` found in it.
        inputs: Preprocessed pictures, float32 of shape (3, height, width) each.
        threads: CPU threads, or None for ONNX Runtime's own choice.

    Raises:
        CalibrationError: There is no picture, a weight or an activation is not finite, or every
            picture is of a single colour.
    """
    import onnx_ir as ir

    graph_model = load_graph(model)
    graph = graph_model.graph
    _check_finite(graph)
    deciding = {tensor for region in regions for tensor in region.sources}
    fed = {str(node.inputs[0].name) for node in compute_nodes(graph) if node.inputs[0] is not None}
    input_name = str(graph.inputs[0].name)
    computed = [
        value
        for node in graph
        for value in node.outputs
        if value.name in deciding or value.name in fed
    ]
    names = [str(value.name) for value in computed]
    graph.outputs.clear()
    graph.outputs.extend(computed)

    histograms = {name: Histogram() for name in sorted(deciding)}
    sums: dict[str, npt.NDArray[np.float64]] = {}
    peaks: dict[str, npt.NDArray[np.float32]] = {}
    images = plain = 0
    session = _session(ir.to_proto(graph_model).SerializeToString(), threads)
    for image in inputs:
        # Without names there is one layer, which reads the input itself.
        found = session.run(names, {input_name: image[None]}) if names else []
        values = dict(zip(names, found, strict=True))
        values[input_name] = image[None]
        images += 1
        plain += bool((image == image[:, :1, :1]).all())
        for name, value in values.items():
            if name in deciding:
                try:
                    histograms[name].add(value)
                except ValueError as error:
                    raise CalibrationError(
                        f"The tensor {name} of picture {images} holds a value that is not finite. "
                        "Check the weights and the preprocess of the model."
                    ) from error
                peak = np.maximum(value.max(axis=_beside(value)), -value.min(axis=_beside(value)))
                peaks[name] = np.maximum(peaks.get(name, np.float32(0.0)), peak)
            if name in fed:
                mean = value.mean(axis=_beside(value), dtype=np.float64)
                sums[name] = sums.get(name, 0.0) + mean
    if images == 0:
        raise CalibrationError("There is no picture to calibrate on. Pass a folder that has some.")
    if plain == images:
        raise CalibrationError(
            f"Each of the {images} calibration pictures is of a single colour, so the ranges would "
            "fit no real picture. Pass pictures like those that the model will see."
        )
    means = {name: total / images for name, total in sums.items()}
    return Statistics(images=images, histograms=histograms, means=means, peaks=peaks)


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


def _beside(value: FloatArray) -> tuple[int, ...]:
    """All axes but the channels'."""
    return (0, *range(2, value.ndim))


def _session(model: bytes, threads: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Between two pictures the statistics are computed: idle threads must not spin beside that.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
