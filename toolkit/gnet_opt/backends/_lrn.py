"""Local response normalisation (LRN) in the forms that are fastest in ONNX Runtime.

A portable model holds one ONNX `LRN` node, and each backend takes it as it likes best. OpenVINO and
TensorRT have kernels for it (OpenVINO's only for a whole bias; for others it gets this form). ONNX
Runtime's own calls `pow` for every value and takes two thirds of the time of the 2014 GoogLeNet in
INT8. By ONNX's definition (https://onnx.ai/onnx/operators/onnx__LRN.html)

    y[c] = x[c] / (bias + alpha / size * (sum of x[i]^2 over the `size` channels i around c)) ^ beta

and here it becomes a few passes over the values: square, sum, roots, divide.

- The sum is a convolution along the channels with one filter of `size` equal weights, and `bias` is
  its bias. A 1x1 convolution with a banded matrix gives the same, but multiplies mostly with
  zeros; a pool over channels needs two more passes, for alpha and bias. The convolution has five
  dimensions, because with four ONNX Runtime takes the blocked layout of its convolutions, which
  pads the one channel to sixteen.
- s^0.75 is sqrt(s) * sqrt(sqrt(s)): a quarter of the time of `Pow`.
- Where the result is quantized, the channels come last, as they do in ONNX Runtime's integer
  kernels. The MaxPools behind it then run in that layout too: two in the 2014 network, which take
  0.1 instead of 4.3 ms.

Milliseconds with one and with two threads: medians of 97 runs and more in interleaved rounds, each
form in a process of its own, ONNX Runtime 1.32 on AVX512-VNNI; the 2014 GoogLeNet at 224 pixels,
and one float LRN by itself on (1, 192, 56, 56):

    form                              INT8           float          LRN
    one LRN node                      28.6 / 15.4    35.7 / 19.6    12.2 / 6.5
    as torch decomposes it            19.1 / 11.1    25.5 / 14.2     4.6 / 2.7
    banded convolution, Pow           19.3 / 10.7    25.5 / 13.7     5.1 / 2.7
    banded convolution, roots         16.3 /  8.9    22.4 / 12.1     2.9 / 1.5
    this one, channels first          14.3 /  7.8    21.5 / 11.6     1.9 / 1.0
    this one, channels last            9.5 /  5.7    21.7 / 11.8

ONNX Runtime 1.21, 1.23, 1.25 and 1.32 fuse the integer layers around it as they do around an LRN
node, 1.23 on ARM too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gnet_opt.errors import BackendError, require

if TYPE_CHECKING:
    import onnx_ir as ir

# Field 4 of a node, its operator, of three bytes. In 28 MB of weights these five bytes stand by
# chance once in 40,000 files, and then the file is read for nothing.
_OPERATOR = b'"\x03LRN'

# Unsqueeze and Squeeze take their axes as inputs since.
_OPSET = 13

# A step of the lowered form, and what ONNX Runtime appends where it joins two of them.
_STEP = re.compile(
    r"(.+)/lrn_(axes_added|axes_dropped|fourth_root|power|quotient|result|root|rows"
    r"|shape|square|sum|to_channels_last)(_new_reshape)?"
)


def lowered(model: Path) -> bytes | None:
    """The content of an ONNX file with its LRN nodes lowered, or None where it has none.

    Equal inputs give equal bytes.

    Args:
        model: The ONNX file, float or in Q/DQ form, every LRN on values (N, C, H, W).

    Raises:
        MissingDependencyError: There can be LRN nodes in the file, and onnx-ir is not installed.
        BackendError: The file's opset is too old for the lowered form.
    """
    if _OPERATOR not in model.read_bytes():
        return None
    require("onnx_ir", "build", f"compile {model.name}, whose LRN nodes have to be lowered")
    import onnx_ir as ir

    loaded = ir.load(model, format="protobuf")
    opset = loaded.opset_imports.get("", 1)
    if opset < _OPSET:
        raise BackendError(
            f"{model} has opset {opset}, and its LRN nodes can be lowered from {_OPSET} on. "
            "Export it again with `gnet-opt export`."
        )
    if not lower(loaded):
        return None
    content: bytes = ir.to_proto(loaded).SerializeToString(deterministic=True)
    return content


def lower(model: ir.Model) -> int:
    """Put the faster form in the place of every LRN node of a graph.

    All of it stays float, between Q/DQ pairs too: no Q or DQ is added or moved.

    Args:
        model: Changed in place; opset 13 or later, every LRN on values (N, C, H, W).

    Returns:
        How many LRN nodes there were.
    """
    nodes = [node for node in model.graph if node.op_type == "LRN" and node.domain == ""]
    for node in nodes:
        _replace(model.graph, node)
    return len(nodes)


def source(name: str) -> str:
    """The name of the LRN node that a node of a lowered graph comes from; empty for any other."""
    match = _STEP.fullmatch(name)
    return match[1] if match else ""


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    import onnx_ir as ir

    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    size = node.attributes["size"].as_int()
    alpha = node.attributes.get_float("alpha", 1e-4)
    beta = node.attributes.get_float("beta", 0.75)
    bias = node.attributes.get_float("bias", 1.0)
    prefix = f"{node.name or y.name}/lrn_"

    def constant(name: str, array: npt.NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(array, name=prefix + name)
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.initializers[prefix + name] = value
        return value

    def add(step: str, operator: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        new = ir.node(operator, inputs, attributes or None, name=prefix + step)
        new.outputs[0].name = prefix + step
        graph.insert_before(node, new)
        return new.outputs[0]

    users = [user.op_type for user, _ in y.uses()]
    channels_last = bool(users) and set(users) == {"QuantizeLinear"}
    one = constant("one", np.array([1], np.int64))
    if channels_last:  # (N, 1, H, W, C)
        moved = add("to_channels_last", "Transpose", x, perm=[0, 2, 3, 1])
        values = add("axes_added", "Unsqueeze", moved, one)
        axis = 2
    else:  # (N, 1, C, 1, H * W): nothing moves in memory; a 0 keeps that dimension
        shape = add("shape", "Shape", x)
        rows = constant("row_shape", np.array([0, 0, 1, -1], np.int64))
        values = add("axes_added", "Unsqueeze", add("rows", "Reshape", x, rows), one)
        axis = 0

    square = add("square", "Mul", values, values)
    kernel, begin, end = [1, 1, 1], [0, 0, 0], [0, 0, 0]
    # An even window reaches one channel further up than down.
    kernel[axis], begin[axis], end[axis] = size, (size - 1) // 2, size // 2
    total = add(
        "sum",
        "Conv",
        square,
        constant("weight", np.full((1, 1, *kernel), alpha / size, np.float32)),
        constant("bias", np.array([bias], np.float32)),
        kernel_shape=kernel,
        pads=[*begin, *end],
    )
    if beta == 1.0:
        power = total
    elif beta == 0.5:
        power = add("root", "Sqrt", total)
    elif beta == 0.75:
        root = add("root", "Sqrt", total)
        power = add("power", "Mul", root, add("fourth_root", "Sqrt", root))
    else:
        power = add("power", "Pow", total, constant("beta", np.array(beta, np.float32)))
    quotient = add("quotient", "Div", values, power)
    if channels_last:
        dropped = add("axes_dropped", "Squeeze", quotient, one)
        result = add("result", "Transpose", dropped, perm=[0, 3, 1, 2])
    else:
        result = add("result", "Reshape", quotient, shape)

    # The name stays: the value may be an output of the graph.
    result.shape, result.type = y.shape, y.type
    ir.convenience.replace_all_uses_with(y, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name, y.name = y.name, None
