"""From a float ONNX file to an INT8 one in Q/DQ form: ranges, placement and proof."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gnet_opt.errors import ConfigError, require
from gnet_opt.files import atomic_path
from gnet_opt.target import Scheme

METHODS = ("entropy", "minmax", "mse", "percentile")
DEFAULT_METHOD = "mse"


def quantize(
    model: Path,
    out: Path,
    inputs: Iterable[npt.NDArray[np.float32]],
    scheme: Scheme,
    *,
    method: str = DEFAULT_METHOD,
    bias_correction: bool = True,
    threads: int | None = None,
) -> dict[str, Any]:
    """Calibrate a float ONNX file and write it as INT8 in Q/DQ form.

    Args:
        model: The float file, as `gnet_opt.stages` exports it.
        out: The file to write.
        inputs: Preprocessed calibration pictures, float32 of shape (3, height, width) each. They
            are read once and not kept.
        scheme: The target's integer form.
        method: How a range is chosen from what was seen; one of `METHODS`.
        bias_correction: Whether biases undo the mean error of the rounded weights.
        threads: CPU threads for calibration, or None for the runtime's own choice.

    Returns:
        The facts for the manifest: `calibrate` and `quantize`.

    Raises:
        ConfigError: The method is unknown.
        CalibrationError: There is no picture, or an activation is not finite.
        ModelError: The file cannot be read, or the result misses a post-condition.
    """
    require("onnx_ir", "build", "quantize a model")
    require("onnxruntime", "build", "calibrate a model")
    import onnx_ir as ir

    from gnet_opt.quantization import ranges
    from gnet_opt.quantization.collect import collect
    from gnet_opt.quantization.correction import correct_bias
    from gnet_opt.quantization.graph import constant
    from gnet_opt.quantization.placement import place, quantize_weight
    from gnet_opt.quantization.postconditions import check
    from gnet_opt.quantization.regions import compute_nodes, find_regions, load_graph

    if method not in ranges.METHODS:
        raise ConfigError(f"There is no method {method!r}; use one of {', '.join(METHODS)}.")
    graph_model = load_graph(model)
    regions = find_regions(graph_model)
    statistics = collect(model, regions, inputs, threads=threads)
    choose = ranges.METHODS[method]
    parameters = {
        name: ranges.affine(choose(seen, scheme), scheme)
        for name, seen in statistics.histograms.items()
    }

    weights, biases = {}, {}
    for node in compute_nodes(graph_model.graph):
        data, weight = node.inputs[0], node.inputs[1]
        assert data is not None and weight is not None and weight.const_value is not None
        values = weight.const_value.numpy()
        quantized = quantize_weight(values, scheme)
        weights[str(weight.name)] = quantized
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        # A layer without a bias gets none: adding one is a pass over its output.
        if bias_correction and bias is not None and bias.any():
            biases[str(node.name)] = correct_bias(
                bias, values, quantized.dequantized(), statistics.means[str(data.name)]
            )
    place(graph_model, regions, parameters, weights, biases)
    with atomic_path(out) as temporary:
        ir.save(graph_model, temporary)
        facts = check(temporary, scheme)
    reductions = [
        1.0
        - float(parameters[name].scale / ranges.affine(ranges.minmax(seen, scheme), scheme).scale)
        for name, seen in statistics.histograms.items()
    ]
    return {
        "calibrate": {
            "images": statistics.images,
            "largest_range_reduction": max(reductions),
            "method": method,
            "ranges": len(regions),
        },
        "quantize": {**facts, "biases_corrected": len(biases)},
    }
