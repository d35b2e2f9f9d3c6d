"""From a float ONNX file to an INT8 one in Q/DQ form: ranges, placement and proof."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gnet_opt.errors import CalibrationError, ConfigError, require
from gnet_opt.files import atomic_path
from gnet_opt.machine import this_machine
from gnet_opt.quantization.recipe import DEFAULT_METHOD, METHODS, Recipe, needs_histograms
from gnet_opt.quantization.statistics import Statistics
from gnet_opt.target import Scheme

if TYPE_CHECKING:
    import onnx_ir as ir

    from gnet_opt.quantization.weights import QuantizedWeight

__all__ = [
    "DEFAULT_METHOD",
    "LEAST_IMAGES",
    "METHODS",
    "Recipe",
    "Statistics",
    "calibrate",
    "check_enough",
    "needs_histograms",
    "quantize",
]

LEAST_IMAGES = {"entropy": 16, "percentile": 8}
"""Fewest calibration pictures of a method that goes by how often values occur: with fewer, what is
rare in one picture decides. (NVIDIA calls for about 500 for entropy on ImageNet.) The others work
from the first picture on."""


def check_enough(method: str, images: int) -> None:
    """Refuse a method that has too few pictures to go by.

    Raises:
        CalibrationError: There are fewer than `LEAST_IMAGES`.
    """
    least = LEAST_IMAGES.get(method, 1)
    if images < least:
        raise CalibrationError(
            f"The method {method} needs at least {least} calibration pictures to tell rare values "
            f"from usual ones, and there are {images}. Add pictures, or use --method minmax."
        )


def calibrate(
    model: Path,
    inputs: Iterable[npt.NDArray[np.float32]],
    *,
    histograms: bool = True,
    threads: int | None = None,
) -> Statistics:
    """Run a float ONNX file over calibration pictures and keep what decides the ranges.

    Args:
        model: The float file, as `gnet_opt.stages` exports it.
        inputs: Preprocessed calibration pictures, float32 of shape (planes, height, width) each.
            They are read once and not kept: memory does not grow with their number.
        histograms: Whether to count how often values occur, without which there is only the
            method minmax. Counting takes a third of the time (GoogLeNet on two cores: 38 and
            27 ms a picture).
        threads: CPU threads, or None for one a core.

    Raises:
        CalibrationError: There is no picture, a weight or an activation is not finite, or every
            picture is of a single colour.
        ModelError: The file cannot be read, or has nothing to quantize.
    """
    require("onnx_ir", "build", "quantize a model")
    require("onnxruntime", "build", "calibrate a model")
    from gnet_opt.quantization.collect import collect
    from gnet_opt.quantization.regions import find_regions, load_graph

    # Whatever the scheme will ask for is among these regions.
    regions = find_regions(load_graph(model), results=True)
    return collect(model, regions, inputs, histograms=histograms, threads=threads)


def quantize(
    model: Path,
    out: Path,
    statistics: Statistics,
    scheme: Scheme,
    recipe: Recipe | None = None,
) -> dict[str, Any]:
    """Write a float ONNX file as INT8 in Q/DQ form.

    Args:
        model: The float file.
        out: The file to write.
        statistics: What `calibrate` saw with this file.
        scheme: The target's integer form.
        recipe: What the target leaves open, None for the defaults.

    Returns:
        The facts for the manifest: `calibrate` and `quantize`.

    Raises:
        ConfigError: The method is unknown, or a layer that is to stay in float.
        CalibrationError: There are too few pictures for the method, or it goes by histograms and
            the statistics have none.
        ModelError: The file cannot be read, or the result misses a post-condition.
    """
    require("onnx_ir", "build", "quantize a model")
    import onnx_ir as ir

    from gnet_opt.quantization import ranges
    from gnet_opt.quantization.placement import place
    from gnet_opt.quantization.postconditions import check
    from gnet_opt.quantization.regions import compute_nodes, find_regions, load_graph

    recipe = recipe or Recipe()
    if recipe.method not in METHODS:
        raise ConfigError(f"There is no method {recipe.method!r}; use one of {', '.join(METHODS)}.")
    check_enough(recipe.method, statistics.images)
    if needs_histograms(recipe.method) and not statistics.histograms:
        raise CalibrationError(
            f"The method {recipe.method} goes by how often values occur, which was not counted. "
            "Calibrate with histograms=True, or use the method minmax."
        )
    graph_model = load_graph(model)
    layers = {str(node.name) for node in compute_nodes(graph_model.graph)}
    if unknown := sorted(recipe.keep_float - layers):
        raise ConfigError(
            f"{model} has no layer {unknown[0]!r} to keep in float. Use names of its Conv and Gemm "
            "nodes."
        )
    regions = find_regions(graph_model, recipe.keep_float, results=scheme.results)
    full = {
        region.name: ranges.affine(ranges.minmax(statistics.bounds(region.sources), scheme), scheme)
        for region in regions
    }
    parameters = full
    if recipe.method in ranges.BY_HISTOGRAM:
        choose = ranges.BY_HISTOGRAM[recipe.method]
        parameters = {
            region.name: ranges.affine(choose(statistics.histogram(region.sources), scheme), scheme)
            for region in regions
        }
    weights, biases = _quantize_layers(graph_model.graph, statistics, scheme, recipe)
    place(graph_model, regions, parameters, weights, biases, recipe.keep_float)
    with atomic_path(out) as temporary:
        ir.save(graph_model, temporary)
        facts = check(temporary, scheme, recipe.keep_float)
    return {
        "calibrate": {
            "images": statistics.images,
            "largest_range_reduction": max(
                1.0 - float(parameters[name].scale / full[name].scale) for name in full
            ),
            "method": recipe.method,
            "ranges": len(regions),
        },
        "quantize": {**facts, "biases_corrected": len(biases)},
    }


def _quantize_layers(
    graph: ir.Graph, statistics: Statistics, scheme: Scheme, recipe: Recipe
) -> tuple[dict[str, QuantizedWeight], dict[str, npt.NDArray[np.float32]]]:
    """The weights in integers by their names, and the corrected biases by their layers' names."""
    from gnet_opt.quantization.correction import correct_bias
    from gnet_opt.quantization.graph import constant
    from gnet_opt.quantization.regions import compute_nodes
    from gnet_opt.quantization.weights import quantize_weight

    nodes = compute_nodes(graph, recipe.keep_float)

    def quantized(node: ir.Node) -> QuantizedWeight:
        weight = node.inputs[1]
        assert weight is not None and weight.const_value is not None
        return quantize_weight(weight.const_value.numpy(), scheme, search=recipe.weight_search)

    with ThreadPoolExecutor(this_machine().cores) as pool:
        made = list(pool.map(quantized, nodes))
    weights, biases = {}, {}
    for node, integers in zip(nodes, made, strict=True):
        data, weight = node.inputs[0], node.inputs[1]
        assert data is not None and weight is not None and weight.const_value is not None
        weights[str(weight.name)] = integers
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        # A layer without a bias gets none: adding one is a pass over its output.
        if recipe.bias_correction and bias is not None and bias.any():
            mean = statistics.mean(str(data.name))
            values = weight.const_value.numpy()
            biases[str(node.name)] = correct_bias(bias, values, integers.dequantized(), mean)
    return weights, biases
