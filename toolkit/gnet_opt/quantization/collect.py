"""Run the float graph over the calibration pictures and keep statistics of each region."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gnet_opt.errors import CalibrationError
from gnet_opt.quantization.regions import Region, compute_nodes, load_graph
from gnet_opt.quantization.statistics import Histogram

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What calibration saw.

    Attributes:
        images: How many pictures.
        histograms: The values of each region's sources, by the region's name.
        means: The mean of each channel of a Conv's or Gemm's data input, float64 of shape
            (channels,), by the tensor's name.
    """

    images: int
    histograms: Mapping[str, Histogram]
    means: Mapping[str, npt.NDArray[np.float64]]


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
        CalibrationError: There is no picture, or an activation is not finite.
    """
    import onnx_ir as ir

    graph_model = load_graph(model)
    graph = graph_model.graph
    owner = {tensor: region.name for region in regions for tensor in region.sources}
    fed = {str(node.inputs[0].name) for node in compute_nodes(graph) if node.inputs[0] is not None}
    input_name = str(graph.inputs[0].name)
    computed = [
        value
        for node in graph
        for value in node.outputs
        if value.name in owner or value.name in fed
    ]
    names = [str(value.name) for value in computed]
    graph.outputs.clear()
    graph.outputs.extend(computed)

    histograms = {region: Histogram() for region in owner.values()}
    sums: dict[str, npt.NDArray[np.float64]] = {}
    images = 0
    session = _session(ir.to_proto(graph_model).SerializeToString(), threads)
    for image in inputs:
        # Without names there is one layer, which reads the input itself.
        found = session.run(names, {input_name: image[None]}) if names else []
        values = dict(zip(names, found, strict=True))
        values[input_name] = image[None]
        images += 1
        for name, value in values.items():
            if name in owner:
                try:
                    histograms[owner[name]].add(value)
                except ValueError as error:
                    raise CalibrationError(
                        f"The tensor {name} of picture {images} holds a value that is not finite. "
                        "Check the weights and the preprocess of the model."
                    ) from error
            if name in fed:
                mean = value.mean(axis=(0, *range(2, value.ndim)), dtype=np.float64)
                sums[name] = sums.get(name, 0.0) + mean
    if images == 0:
        raise CalibrationError("There is no picture to calibrate on. Pass a folder that has some.")
    means = {name: total / images for name, total in sums.items()}
    return Statistics(images=images, histograms=histograms, means=means)


def _session(model: bytes, threads: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Between two pictures the statistics are computed: idle threads must not spin beside that.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
