"""Pixels as the input of a graph: uint8, channels last, normalised by the graph's own first nodes.

What `Preprocess.normalize` does to a decoded, resized and cropped picture becomes nodes in front of
the network. Resizing stays outside: it needs the size of the decoded picture.

The network behind them stays as it is, and so do the integers of an INT8 model. It is tempting to
fold more, and wrong. With the mean in the bias of the first convolution, the padding, which is zero
after normalising, would be zero before. And a pixel cannot be its own quantized value where a mean
is no whole number or the channels have different ones: a quantized tensor has one zero point.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gnet_opt.errors import ModelError, require
from gnet_opt.files import atomic_path
from gnet_opt.preprocess import PixelArray, Preprocess
from gnet_opt.stages.graph import run_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

_LEVELS = 256


def take_pixels(
    model: Path, out: Path, preprocess: Preprocess, pixels: PixelArray
) -> dict[str, Any]:
    """Write an ONNX file again so that it takes pixels, and prove that it computes the same.

    Two proofs, both bit by bit and by reference semantics (ONNX Runtime on the CPU, every node by
    itself): the new nodes give for each of the 256 levels in each channel of each column what
    `Preprocess.normalize` gives, which is all that they can ever be given; and the logits of real
    pictures are those of the file with the float input.

    Args:
        model: A file with one float32 input of shape (N, planes, height, width), in any precision;
            `planes` is that of `preprocess`.
        out: The file to write; its input has the same name, is uint8 and has the shape
            (N, height, width, planes): RGB, grey or RGBA. Equal inputs give equal bytes.
        preprocess: How pixels become the input of `model`.
        pixels: Real pictures, uint8 of shape (pictures, height, width, planes).

    Returns:
        The facts for the manifest: type and layout of the input, the operators in front of the
        network, and what was compared.

    Raises:
        MissingDependencyError: onnx-ir or ONNX Runtime is not installed.
        ModelError: The file does not have such an input, or a proof fails.
    """
    require("onnx_ir", "build", "change the input of a model")
    import onnx_ir as ir

    loaded = ir.load(model, format="protobuf")
    graph = loaded.graph
    old = graph.inputs[0]
    sizes = list(old.shape) if old.shape is not None else []
    if (
        len(graph.inputs) != 1
        or old.dtype != ir.DataType.FLOAT
        or len(sizes) != 4
        or sizes[1] != preprocess.planes
        or not all(isinstance(size, int) for size in sizes[2:])
    ):
        raise ModelError(
            f"{model} does not have one float32 input of shape (N, {preprocess.planes}, height, "
            "width), height and width fixed, which could take pixels instead. Export it with "
            "`gnet-opt export`."
        )
    height, width = (int(str(size)) for size in sizes[2:])
    new = _pixel_input(str(old.name), [sizes[0], height, width, preprocess.planes])
    nodes = _normalizing(graph, new, preprocess)
    normalized = nodes[-1].outputs[0]
    for node, index in tuple(old.uses()):
        node.replace_input_with(index, normalized)
    for node in reversed(nodes):
        graph.insert_before(graph[0], node)
    graph.inputs[0] = new

    content = ir.to_proto(loaded).SerializeToString(deterministic=True)
    _prove_levels(preprocess, loaded, width)
    _prove_logits(model, content, preprocess, pixels)
    with atomic_path(out) as temporary:
        temporary.write_bytes(content)
    return {
        "dtype": "uint8",
        "images": len(pixels),
        "layout": "NHWC",
        "levels": _LEVELS,
        "max_abs_difference": 0.0,
        "nodes": [node.op_type for node in nodes],
    }


def _pixel_input(name: str, sizes: list[Any]) -> ir.Value:
    import onnx_ir as ir

    return ir.Value(name=name, shape=ir.Shape(sizes), type=ir.TensorType(ir.DataType.UINT8))


def _normalizing(graph: ir.Graph, pixels: ir.Value, preprocess: Preprocess) -> list[ir.Node]:
    """The nodes that do to `pixels` what `Preprocess.normalize` does, in its order; not yet placed.

    The same float32 operations on the same numbers. Where they change nothing, a mean of 0 and a
    deviation of 1, they are left out. The order is the fastest of those that were tried:

    - `Cast` first, because TensorRT takes uint8 nowhere else
      (https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/Cast.html).
    - Arithmetic with the channels last, so that ONNX Runtime, whose integer layers want them last,
      needs no `Transpose` at all. The constants are as wide as the picture: with three numbers
      over a last axis of three it takes many times as long.
    - The order of the channels at the end, where a channel is one piece of memory.
    """
    import onnx_ir as ir

    assert pixels.shape is not None
    batch, height, width, planes = pixels.shape
    last, first = pixels.shape, ir.Shape([batch, planes, height, width])
    nodes: list[ir.Node] = []
    order = slice(None, None, -1 if preprocess.channels == "bgr" else 1)
    constants = np.asarray([preprocess.mean, preprocess.std], np.float32)[:, order]
    mean, std = np.tile(constants[:, None, None, None], (1, 1, 1, int(str(width)), 1))

    def append(op_type: str, shape: ir.Shape, *constants: ir.Value, **attributes: Any) -> None:
        x = nodes[-1].outputs[0] if nodes else pixels
        node = ir.node(op_type, [x, *constants], attributes, name=f"{pixels.name}/{op_type}")
        result = node.outputs[0]
        result.name, result.shape = f"{pixels.name}/{op_type.lower()}", shape
        result.type = ir.TensorType(ir.DataType.FLOAT)
        nodes.append(node)

    def constant(name: str, values: npt.NDArray[Any]) -> ir.Value:
        name = f"{pixels.name}/{name}"
        value = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(values.dtype)),
            shape=ir.Shape(values.shape),
            const_value=ir.tensor(values, name=name),
        )
        graph.register_initializer(value)
        return value

    append("Cast", last, to=ir.DataType.FLOAT.value)
    if mean.any():
        append("Sub", last, constant("mean", mean))
    if (std != 1).any():
        append("Div", last, constant("std", std))
    append("Transpose", first, perm=[0, 3, 1, 2])
    if preprocess.channels == "bgr":
        append("Gather", first, constant("order", np.asarray([2, 1, 0], np.int64)), axis=1)
    return nodes


def _prove_levels(preprocess: Preprocess, model: ir.Model, width: int) -> None:
    """Run the nodes alone on every level that a pixel can have, in every channel and column.

    Each value goes its own way through them, and rows are all the same to them.
    """
    import onnx_ir as ir

    # Side by side stand different levels, or an exchange of columns or channels would not be seen.
    rows, columns = np.arange(_LEVELS)[:, None], np.arange(width)[None]
    up = ((rows + columns) % _LEVELS).astype(np.uint8)[None]
    levels = np.stack([up, 255 - up, up ^ 85, up ^ 170][: preprocess.planes], axis=-1)
    pixels = _pixel_input("input", list(levels.shape))
    graph = ir.Graph([pixels], [], nodes=[], name="levels", opset_imports=model.opset_imports)
    nodes = _normalizing(graph, pixels, preprocess)
    graph.extend(nodes)
    graph.outputs.append(nodes[-1].outputs[0])
    alone = ir.to_proto(ir.Model(graph, ir_version=model.ir_version)).SerializeToString()
    actual = run_bytes(alone, [levels], optimize=False)
    if not np.array_equal(actual, preprocess.normalize(levels)):
        raise ModelError(
            "The nodes that normalise pixels do not give what the preprocess gives. This is a "
            "fault of gnet-opt; please report it with the preprocess of the model."
        )


def _prove_logits(model: Path, content: bytes, preprocess: Preprocess, pixels: PixelArray) -> None:
    """Hold the logits of the new file against those of the old one."""
    values = preprocess.normalize(pixels)
    expected = run_bytes(model.read_bytes(), [one[None] for one in values], optimize=False)
    actual = run_bytes(content, [one[None] for one in pixels], optimize=False)
    if not np.array_equal(actual, expected, equal_nan=True):  # FP16 may have no more numbers
        raise ModelError(
            f"With pixels as its input {model.name} differs by up to "
            f"{float(np.abs(actual - expected).max()):g} on {len(pixels)} pictures. It was not "
            "written. This is a fault of gnet-opt; please report it with the model."
        )
