"""Bring channels back into line that are far larger or smaller than those they share a scale with.

One scale serves a whole tensor. Where a few channels are fifty times as large as the others, the
others are left with a handful of the 256 levels, and INT8 loses its accuracy. ReLU, pooling and
Concat commute with a positive factor, so such a channel can be divided by a factor in the layer
that writes it and multiplied by it in the layers that read it: the logits stay, and the levels are
used again. That is cross-layer equalization (Nagel et al., "Data-Free Quantization Through Weight
Equalization and Bias Correction", ICCV 2019, section 4.1), here with measured ranges and for
outliers only: on the 2014 original, which has none, equalizing every channel costs 1 dB and more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gnet_opt.files import atomic_path
from gnet_opt.quantization.graph import constant
from gnet_opt.quantization.regions import find_regions, load_graph
from gnet_opt.quantization.statistics import Statistics

OUTLIER = 4.0
"""Where an outlier begins, in medians of its region: a large channel has this peak or more, and a
factor as large; a small one has the inverse or less, and readers that weigh it this much or more.
In the 2014 original no peak is above 3.6 medians, and no channel weighs more than 2.3."""

_KEEPS_FACTORS = frozenset(
    {"Relu", "MaxPool", "AveragePool", "GlobalAveragePool", "Flatten", "Concat"}
)


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """A layer that reads a tensor, from `offset` on in its input channels."""

    node: ir.Node
    offset: int


def equalize(model: Path, out: Path, statistics: Statistics) -> dict[str, Any] | None:
    """Write a float graph with the same logits and without outlier channels.

    Args:
        model: The float file.
        out: The file to write.
        statistics: What `gnet_opt.quantization.calibrate` saw with `model`.

    Returns:
        How many channels of which layers were scaled, and the largest factor; None, and nothing
        is written, where no channel is an outlier.
    """
    graph_model = load_graph(model)
    scaled: dict[str, npt.NDArray[np.float64]] = {}
    for region in find_regions(graph_model):
        peaks = np.concatenate([statistics.peaks(name) for name in region.sources])
        typical = float(np.median(peaks[peaks > 0.0])) if peaks.any() else 0.0
        for name in region.sources:
            writer = _writer(graph_model.graph, name)
            readers = None if writer is None else _readers(writer.outputs[0], 0)
            if writer is None or not readers:
                continue
            factors = _factors(statistics.peaks(name).astype(np.float64), typical, readers)
            if (factors != 1.0).any():
                _divide_outputs(writer, factors)
                for reader in readers:
                    _multiply_inputs(reader, factors)
                scaled[str(writer.name)] = factors
    if not scaled:
        return None
    with atomic_path(out) as temporary:
        ir.save(graph_model, temporary)
    every = np.concatenate(list(scaled.values()))
    return {
        "channels": int((every != 1.0).sum()),
        "largest_factor": float(np.maximum(every, 1.0 / every).max()),
        "layers": sorted(scaled),
    }


def _writer(graph: ir.Graph, name: str) -> ir.Node | None:
    """The Conv with constants that alone writes a tensor, before its ReLU; None for others."""
    for node in graph:
        if node.outputs and node.outputs[0].name == name:
            if node.op_type == "Relu" and node.inputs[0] is not None:
                before = node.inputs[0].producer()
                if before is None or len(node.inputs[0].uses()) != 1:
                    return None
                node = before
            own = all(_is_own_constant(value) for value in node.inputs[1:])
            return node if node.op_type == "Conv" and own else None
    return None


def _readers(value: ir.Value, offset: int) -> list[_Reader] | None:
    """The layers that read a value's channels; None where something else does."""
    if value.is_graph_output():
        return None
    found: list[_Reader] = []
    for use in value.uses():
        node, shift = use.node, offset
        if node.op_type in ("Conv", "Gemm"):
            plain = node.attributes.get_int("group", 1) == 1 and (
                node.op_type == "Conv" or node.attributes.get_int("transB", 0) == 1
            )
            if use.idx != 0 or not plain or not _is_own_constant(node.inputs[1]):
                return None
            found.append(_Reader(node=node, offset=shift))
            continue
        if node.op_type not in _KEEPS_FACTORS or not _keeps_channels(node):
            return None
        for before in node.inputs[: use.idx]:
            assert before is not None and before.shape is not None
            shift += int(before.shape[1])  # type: ignore[arg-type]
        further = _readers(node.outputs[0], shift)
        if further is None:
            return None
        found += further
    return found


def _is_own_constant(value: ir.Value | None) -> bool:
    """Whether a value is a constant that one layer alone uses."""
    return value is not None and constant(value) is not None and len(value.uses()) == 1


def _keeps_channels(node: ir.Node) -> bool:
    """Whether a channel of a node's input is a channel of its output."""
    if node.op_type == "Concat":
        shapes = [value.shape for value in node.inputs if value is not None]
        known = all(shape is not None and isinstance(shape[1], int) for shape in shapes)
        return known and node.attributes.get_int("axis", 0) == 1
    if node.op_type == "Flatten":
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        plain = node.attributes.get_int("axis", 1) == 1
        return plain and shape is not None and all(size == 1 for size in shape.dims[2:])
    return len(node.outputs) == 1


def _factors(
    peaks: npt.NDArray[np.float64], typical: float, readers: list[_Reader]
) -> npt.NDArray[np.float64]:
    """What each channel is divided by: 1 but for outliers.

    The factor sqrt(peak / weight), both relative to their medians, gives activation and weights
    the same share of the correction. A channel with a small peak grows only where its readers
    weigh it more than others, and by no more than that: one that calibration saw next to nothing
    of may be large in the next picture, and a grown one would overflow its range there.
    """
    columns = np.concatenate([_columns(reader, len(peaks)) for reader in readers])
    largest, usual = columns.max(axis=0), columns.mean(axis=0)
    alive = (peaks > 0.0) & (largest > 0.0)
    if not alive.any():
        return np.ones(len(peaks))
    relative = np.where(alive, peaks / typical, 1.0)
    factors = np.sqrt(relative / np.where(alive, largest / np.median(largest[alive]), 1.0))
    heaviness = np.where(alive, usual / np.median(usual[alive]), 1.0)
    larger = (relative >= OUTLIER) & (factors >= OUTLIER)
    smaller = (relative <= 1.0 / OUTLIER) & (heaviness >= OUTLIER)
    factors = np.where(smaller, np.maximum(factors, 1.0 / heaviness), factors)
    return np.where(larger | smaller, factors, 1.0)


def _columns(reader: _Reader, channels: int) -> npt.NDArray[np.float64]:
    """The largest weight from each input channel to each output channel, relative to the latter's.

    Shape (output channels, channels): 1 for what decides the scale of an output channel.
    """
    values = constant(reader.node.inputs[1])
    assert values is not None
    weight = np.abs(values.astype(np.float64)).reshape(*values.shape[:2], -1).max(axis=2)
    largest = weight.max(axis=1, keepdims=True)
    relative = weight / np.where(largest > 0.0, largest, 1.0)
    return np.asarray(relative[:, reader.offset : reader.offset + channels])


def _divide_outputs(node: ir.Node, factors: npt.NDArray[np.float64]) -> None:
    for value in node.inputs[1:]:
        array = constant(value)
        assert array is not None and value is not None
        _set(value, array / factors.reshape(-1, *(1,) * (array.ndim - 1)))


def _multiply_inputs(reader: _Reader, factors: npt.NDArray[np.float64]) -> None:
    value = reader.node.inputs[1]
    array = constant(value)
    assert array is not None and value is not None
    changed = array.astype(np.float64)
    columns = slice(reader.offset, reader.offset + len(factors))
    changed[:, columns] *= factors.reshape(1, -1, *(1,) * (array.ndim - 2))
    _set(value, changed)


def _set(value: ir.Value, array: npt.NDArray[np.float64]) -> None:
    value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
