"""Fold batch norm into the convolution or linear layer before it, on the traced graph.

Working on the graph instead of the module makes no assumption about how a network is written:
torchvision's `BasicConv2d`, an `nn.Sequential` and a functional call all trace to the same two
nodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gnet_opt.errors import ModelError
from gnet_opt.preprocess import FloatArray
from gnet_opt.stages.graph import NewNode, constant, replace_initializer, replace_node, run_graph

if TYPE_CHECKING:
    import onnx_ir as ir

_TOLERANCE = 1e-4
"""Largest change of a logit that is rounding, as a share of the logits' range."""

Float64Array = npt.NDArray[np.float64]


def fold(graph: ir.Model, examples: FloatArray) -> dict[str, Any]:
    """Remove every batch norm from a traced graph, in place, and measure what it changed.

    For `y = (conv(x) - mean) / sqrt(var + eps) * gamma + beta` the weights are multiplied by
    `s = gamma / sqrt(var + eps)` per output channel and the bias becomes
    `(bias - mean) * s + beta`, in float64, rounded to float32 once. In order:

    1. A batch norm whose only source is a Conv or Gemm that nothing else reads is folded.
    2. Any other is written as one multiplication and one addition per channel.

    Args:
        graph: From `export.trace`.
        examples: Real preprocessed pictures, float32 of shape (N, planes, H, W).

    Returns:
        The facts: batch norms found, folded and rewritten, the largest |difference| of a logit
        between the two graphs (both in ONNX Runtime on the CPU without its own optimisations),
        the logits' range, and the number of pictures.

    Raises:
        ModelError: A batch norm cannot be removed, or a logit changed by more than 1e-4 of the
            logits' range.
    """
    found = [node for node in graph.graph if node.op_type == "BatchNormalization"]
    facts: dict[str, Any] = {"batch_norms": len(found), "folded": 0, "rewritten": 0}
    if not found:
        return {**facts, "images": 0, "max_abs_difference": 0.0, "logits_range": None}
    before = run_graph(graph, examples, optimize=False)
    for node in found:
        scale, shift = _scale_and_shift(node)
        if _fold_into_source(graph, node, scale, shift):
            facts["folded"] += 1
        else:
            _rewrite(graph, node, scale, shift)
            facts["rewritten"] += 1
    after = run_graph(graph, examples, optimize=False)
    worst = float(np.abs(before - after).max())
    spread = float(before.max() - before.min())
    if not worst <= _TOLERANCE * spread:
        raise ModelError(
            f"Folding {len(found)} batch norms changed a logit by {worst:g}, more than "
            f"{_TOLERANCE:g} of the logits' range of {spread:g}. The variances may be close to "
            "zero; retrain, or pass an earlier checkpoint."
        )
    return {
        **facts,
        "images": len(examples),
        "max_abs_difference": worst,
        "logits_range": spread,
    }


def _scale_and_shift(node: ir.Node) -> tuple[Float64Array, Float64Array]:
    """The batch norm as `y = x * scale + shift` per channel."""
    values = [constant(value) for value in node.inputs[1:5]]
    if any(value is None for value in values) or len(node.outputs) != 1:
        raise ModelError(
            f"The batch norm {node.name} computes its statistics from the batch. Put the network "
            "into eval mode, and give every batch norm running statistics."
        )
    gamma, beta, mean, variance = (np.asarray(value, np.float64) for value in values)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    scale = gamma / np.sqrt(variance + epsilon)
    return scale, beta - mean * scale


def _fold_into_source(
    graph: ir.Model, norm: ir.Node, scale: Float64Array, shift: Float64Array
) -> bool:
    x = norm.inputs[0]
    source = x.producer() if x is not None else None
    if x is None or source is None or source.op_type not in ("Conv", "Gemm"):
        return False
    # Somebody else reads the value from before the batch norm, be it the caller of the graph.
    if len(x.uses()) != 1 or x.is_graph_output():
        return False
    if source.op_type == "Gemm" and not _is_plain_linear(source):
        return False
    weight_value = source.inputs[1]
    bias_value = source.inputs[2] if len(source.inputs) > 2 else None
    weight = constant(weight_value)
    bias = np.zeros(1) if bias_value is None else constant(bias_value)
    if weight_value is None or weight is None or bias is None:
        return False
    along = (-1, *[1] * (weight.ndim - 1))
    stem = (weight_value.name or str(source.name)).removesuffix(".weight")
    new_weight = replace_initializer(graph, f"{stem}.weight", weight * scale.reshape(along), source)
    new_bias = replace_initializer(graph, f"{stem}.bias", bias * scale + shift, source)
    attributes = list(source.attributes.values())
    first = source.inputs[0]
    assert first is not None  # Conv and Gemm have no optional first input.
    replace_node(graph, norm, first, [NewNode(source.op_type, [new_weight, new_bias], attributes)])
    graph.graph.remove(source, safe=True)
    return True


def _is_plain_linear(gemm: ir.Node) -> bool:
    factors = [gemm.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    return factors == [1.0, 1.0] and gemm.attributes.get_int("transB", 0) == 1


def _rewrite(graph: ir.Model, norm: ir.Node, scale: Float64Array, shift: Float64Array) -> None:
    x, gamma = norm.inputs[0], norm.inputs[1]
    assert x is not None and gamma is not None  # Neither is optional in a BatchNormalization.
    rank = len(x.shape) if x.shape is not None else 4
    along = (1, -1, *[1] * (rank - 2))
    stem = (gamma.name or str(norm.name)).removesuffix(".weight")
    factor = replace_initializer(graph, f"{stem}.scale", scale.reshape(along), norm)
    term = replace_initializer(graph, f"{stem}.shift", shift.reshape(along), norm)
    replace_node(graph, norm, x, [NewNode("Mul", [factor]), NewNode("Add", [term])])
