"""What of an ONNX file a DLA, the deep learning accelerator of some Jetsons, would take.

This is a report and no build. Each rule is one function that yields what is wrong with a node, and
one row of `RULES` with the operators that it is for, what to do, and where it comes from. They are
those of NVIDIA's guide to TensorRT 8.5 (Jetson Xavier and Orin, JetPack 5), which its latest guide
states again in short, and of NVIDIA's list of ONNX operators. What only a builder knows stays open:
whether a convolution fits into the DLA's buffer (`CBUF`), and how TensorRT cuts the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from gnet_opt.quantization.graph import constant, count_macs
from gnet_opt.quantization.regions import load_graph
from gnet_opt.target import find

Generation = Literal["orin", "xavier"]
GENERATIONS: tuple[Generation, ...] = ("orin", "xavier")

MAX_BATCH = 4096
MAX_SIZE = 8192
MAX_LOADABLES = 16
"""Loadables, the pieces that run on a DLA, that one core holds at a time."""

LAST_TENSORRT = (10, 7)
"""The last TensorRT with a DLA before 11.4.1."""
AGAIN_IN = (11, 4, 1)
"""The next one, for Jetson AGX Orin alone."""

_LATEST = (
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/"
    "dla-layer-restrictions.html"
)
_GUIDE = (
    "NVIDIA's guide to TensorRT 8.5, 12.2 DLA Supported Layers and Restrictions "
    f"(in short: {_LATEST})"
)
_OPERATORS = "https://github.com/NVIDIA/Deep-Learning-Accelerator-SW/blob/main/operators/README.md"
_FAQ = "https://github.com/NVIDIA/Deep-Learning-Accelerator-SW/blob/main/FAQ/README.md"
_TRANSLATOR = (
    "https://github.com/NVIDIA/Deep-Learning-Accelerator-SW/tree/main/tools/qdq-translator"
)
_MODELOPT = "https://github.com/NVIDIA/Model-Optimizer/pull/1661"
_WORK = "https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/inference-library/work-with-dla.html"
_TYPED = (
    "https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/inference-library/"
    "dla-strongly-typed-networks.html"
)

_PAIR = ("QuantizeLinear", "DequantizeLinear")
_GONE = frozenset({*_PAIR, "Constant", "Dropout", "Identity"})
"""Nodes that are no layer of their own: TensorRT removes them, or makes ranges of them."""
_HALF = frozenset({"LRN", "Sigmoid", "Softmax", "Tanh"})
"""Operators that a DLA computes in FP16 also in an INT8 network."""
_POOLS = ("MaxPool", "AveragePool")
_WHOLE_POOLS = ("GlobalAveragePool", "GlobalMaxPool", "ReduceMean")
_LAYERS = ("Conv", "Gemm", "MatMul")
_ELEMENTWISE = ("Add", "Sub", "Mul", "Sum", "Max", "Min")
_ACTIVATIONS = ("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh")
_TAKEN = frozenset(
    {
        *_POOLS,
        *_LAYERS,
        *_ELEMENTWISE,
        *_ACTIVATIONS,
        "BatchNormalization",
        "Concat",
        "LRN",
        "Reshape",
        "Softmax",
        "Transpose",
    }
)
"""Operators that TensorRT gives to a DLA, as far as the networks of this family have them."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A target and its DLA.

    Attributes:
        target: The target's name.
        generation: Which rules its DLA follows; None where it has no DLA.
        source: Where that is said.
    """

    target: str
    generation: Generation | None
    source: str

    def to_dict(self) -> dict[str, Any]:
        """With the target's TensorRT, and whether that one reaches the DLA."""
        tensorrt = str(find(self.target).options["tensorrt"])
        return {
            **asdict(self),
            "tensorrt": tensorrt,
            "usable": self.generation is not None and has_dla(tensorrt, self.target),
        }


DEVICES = (
    Device(target="jetson-agx-orin", generation="orin", source=_FAQ),
    Device(target="jetson-orin-nx", generation="orin", source=_FAQ),
    Device(target="jetson-xavier-nx", generation="xavier", source=_FAQ),
    Device(target="jetson-orin-nano", generation=None, source=_FAQ),
    Device(target="jetson-nano", generation=None, source=_FAQ),
    Device(target="jetson-thor", generation=None, source=_WORK),
)
"""Which targets have one. The FAQ names all modules with a DLA, and the two Nanos are not there."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Why a node, or the network as a whole, is not for a DLA as it is.

    Attributes:
        rule: The name of the rule.
        problem: What is wrong.
        mend: What to do about it.
        source: Where the rule comes from.
        generations: For which DLAs it holds.
    """

    rule: str
    problem: str
    mend: str
    source: str
    generations: tuple[Generation, ...] = GENERATIONS


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One node of the file and what becomes of it.

    Attributes:
        name: The node's name, or that of its output.
        operator: Its operator.
        macs: Its multiply-accumulates for one picture.
        precision: What a DLA computes it in: `int8` where the file gives its ranges, else `fp16`.
        findings: Why it is left to the GPU; empty where every DLA takes it.
    """

    name: str
    operator: str
    macs: int
    precision: Literal["int8", "fp16"]
    findings: tuple[Finding, ...]

    def runs_on(self, generation: Generation) -> bool:
        """Whether a DLA of this generation takes it."""
        return not any(generation in finding.generations for finding in self.findings)


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a network falls apart into pieces for one generation of DLA.

    Attributes:
        generation: Which.
        layers: Nodes that it takes.
        gpu_layers: Nodes that are left to the GPU.
        loadables: Pieces of neighbouring nodes on the DLA.
        gpu_pieces: Pieces between and around them.
        macs_share: The share of the multiply-accumulates that it takes, 0..1.
    """

    generation: Generation
    layers: int
    gpu_layers: int
    loadables: int
    gpu_pieces: int
    macs_share: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a DLA would take of a file.

    Attributes:
        file: The ONNX file.
        layers: Every node that is a layer, in graph order.
        needs: What has to be done with the network as a whole.
        splits: The pieces, for each generation.
    """

    file: Path
    layers: tuple[Layer, ...]
    needs: tuple[Finding, ...]
    splits: tuple[Split, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `gnet-opt inspect --dla --json` prints it."""
        return {
            "devices": [device.to_dict() for device in DEVICES],
            "file": str(self.file),
            "layers": [
                {**asdict(layer), **{name: layer.runs_on(name) for name in GENERATIONS}}
                for layer in self.layers
            ],
            "needs": [asdict(need) for need in self.needs],
            "splits": [asdict(split) for split in self.splits],
        }


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is looked for in nodes; the other attributes mean what they mean in a `Finding`."""

    name: str
    operators: frozenset[str]
    find: Callable[[ir.Node], Iterator[str]]
    mend: str
    source: str = _GUIDE
    generations: tuple[Generation, ...] = GENERATIONS


def has_dla(tensorrt: str, target: str) -> bool:
    """Whether a version of TensorRT runs networks on the DLA of a target that has one.

    10.7 was the last 10.x that does. 11.4.1 does again, but on Jetson AGX Orin alone and with
    JetPack 7.2.2 or later
    (https://docs.nvidia.com/deeplearning/tensorrt/11.4.1/inference-library/work-with-dla.html).

    Args:
        tensorrt: The version, `10.3` for example.
        target: The target's name.
    """
    version = tuple(int(part) for part in tensorrt.split(".") if part.isdecimal())
    return version[:2] <= LAST_TENSORRT or (target == "jetson-agx-orin" and version >= AGAIN_IN)


def report(path: Path) -> Report:
    """Tell what a DLA would take of an ONNX file, whoever made it.

    Shapes that the file does not state are inferred. Where that fails, rules about them find
    nothing, and the network's own entry in `needs` says so.

    Raises:
        ModelError: The file is no valid ONNX file.
    """
    model = load_graph(path)
    _infer_shapes(model)
    nodes = [node for node in model.graph if node.op_type not in _GONE]
    layers = tuple(_layer(node) for node in nodes)
    splits = tuple(_split(nodes, layers, generation) for generation in GENERATIONS)
    return Report(file=path, layers=layers, needs=tuple(_needs(model, splits)), splits=splits)


def _not_taken(node: ir.Node) -> Iterator[str]:
    if node.op_type not in (*_TAKEN, *_WHOLE_POOLS, "Flatten"):
        yield f"{node.op_type} is no operator that TensorRT gives to a DLA"


def _global_pool(node: ir.Node) -> Iterator[str]:
    yield f"TensorRT makes no pooling for a DLA of {node.op_type}"


def _flatten(node: ir.Node) -> Iterator[str]:
    yield "a DLA keeps pictures as (batch, channels, height, width) and has no Flatten"


def _rank(node: ir.Node) -> Iterator[str]:
    shape = _shape(_input(node, 0))
    if shape is not None and len(shape) != 4:
        yield f"its input has {len(shape)} dimensions, not 4"


def _sizes(node: ir.Node) -> Iterator[str]:
    for value in (*node.inputs, *node.outputs):
        shape = _shape(value)
        if shape is None or (value is not None and constant(value) is not None):
            continue
        if any(size > MAX_SIZE for size in shape[1:]):
            yield f"the tensor {value and value.name} is larger than {MAX_SIZE} along a dimension"
        if shape and shape[0] > MAX_BATCH:
            yield f"the tensor {value and value.name} has a batch of more than {MAX_BATCH}"


def _spatial(node: ir.Node) -> Iterator[str]:
    kernel = _kernel(node)
    if kernel and len(kernel) != 2:
        yield f"it has {len(kernel)} spatial dimensions, not 2"


def _convolution(node: ir.Node) -> Iterator[str]:
    kernel, weight = _kernel(node), _shape(_weight(node))
    yield from _outside("kernel", kernel, 1, 32)
    yield from _outside("stride", _integers(node, "strides"), 1, 8)
    yield from _outside("dilation", _integers(node, "dilations"), 1, 32)
    yield from _outside("groups", _integers(node, "group"), 1, MAX_SIZE)
    pads = _integers(node, "pads")
    yield from _outside("padding", pads, 0, 31)
    if kernel and any(pad >= size for pad, size in zip(pads, (*kernel, *kernel), strict=False)):
        yield f"its padding {_listed(pads)} is not less than its kernel {_listed(kernel)}"
    if weight:
        yield from _outside("output channels", weight[:1], 1, MAX_SIZE)


def _constant_weight(node: ir.Node) -> Iterator[str]:
    if _weight(node) is None:
        yield "its weight is computed while the model runs"


def _product(node: ir.Node) -> Iterator[str]:
    weight = _shape(_weight(node))
    if weight is not None and len(weight) == 2:
        outputs = weight[0] if node.op_type == "Gemm" and _integer(node, "transB") else weight[1]
        yield from _outside("outputs", (outputs,), 1, MAX_SIZE)


def _pool(node: ir.Node) -> Iterator[str]:
    yield from _outside("window", _kernel(node), 1, 8)
    yield from _outside("stride", _integers(node, "strides"), 1, 16)
    yield from _outside("padding", _integers(node, "pads"), 0, 7)


def _ceil(node: ir.Node) -> Iterator[str]:
    """Rounding up lets the last window reach over the edge; that is padding, too."""
    window, size, result = _kernel(node), _shape(_input(node, 0)), _shape(node.outputs[0])
    if not _integer(node, "ceil_mode") or size is None or result is None or len(window) != 2:
        return
    strides = _integers(node, "strides") or (1, 1)
    pads = _integers(node, "pads") or (0, 0, 0, 0)
    reach = [
        (result[2 + axis] - 1) * strides[axis] + window[axis] - size[2 + axis] - pads[axis]
        for axis in (0, 1)
    ]
    if any(over > 7 or over >= window[axis] for axis, over in enumerate(reach)):
        yield f"ceil_mode lets its last window reach {_listed(reach)} over the edge"


def _pool_ranges(node: ir.Node) -> Iterator[str]:
    before, after = _range_before(_input(node, 0)), _range_behind(node)
    if before is not None and after is not None and before != after:
        yield f"its input has the scale {before:.6g} and its output {after:.6g}"


def _window(node: ir.Node) -> Iterator[str]:
    size = _integer(node, "size")
    if size not in (3, 5, 7, 9):
        yield f"its window is {size}"


def _channels(node: ir.Node) -> Iterator[str]:
    axis, shape = _integer(node, "axis"), _shape(node.outputs[0])
    rank = len(shape) if shape is not None else 4
    if (axis + rank if axis < 0 else axis) != 1:
        yield f"it joins along axis {axis}, not along the channels"
    if len(node.inputs) < 2:
        yield "it has one input"


def _concat_ranges(node: ir.Node) -> Iterator[str]:
    scales = [_range_before(value) for value in node.inputs]
    behind = _range_behind(node)
    different = sorted({scale for scale in (*scales, behind) if scale is not None})
    if len(different) > 1:
        listed = ", ".join(f"{scale:.6g}" for scale in different)
        yield f"its inputs and its output have different scales: {listed}"


def _clip(node: ir.Node) -> Iterator[str]:
    limits = [constant(_input(node, index)) for index in (1, 2)]
    low, high = (None if limit is None else float(np.ravel(limit)[0]) for limit in limits)
    if low != 0 or high is None or not 1 <= high <= 127:
        yield f"it clips to {low} .. {high}, not to 0 .. 1 to 127"


def _softmax(node: ir.Node) -> Iterator[str]:
    yield "Softmax is for the DLA of Orin alone"


def _softmax_size(node: ir.Node) -> Iterator[str]:
    shape = _shape(_input(node, 0))
    if shape is None:
        return
    axis = _integer(node, "axis", -1) % len(shape)
    others = [size for index, size in enumerate(shape) if index not in (0, axis)]
    if any(size > 1 for size in others) and shape[axis] > 1024:
        yield f"its axis has {shape[axis]} values, and other dimensions are not 1"
    if axis == 0:
        yield "it runs along the batch"


def _batch_moves(node: ir.Node) -> Iterator[str]:
    before, after = _shape(_input(node, 0)), _shape(node.outputs[0])
    if before and after and before[0] != after[0]:
        yield "it changes the batch dimension"
    order = _integers(node, "perm")
    if order and order[0] != 0:
        yield "it moves the batch dimension"


RULES = (
    Rule(
        name="operator",
        operators=frozenset(),
        find=_not_taken,
        mend="Express it by convolutions, poolings, elementwise sums and products, or leave it to "
        "the GPU. `gnet-opt export` writes LRN as the one node that a DLA takes.",
        source=_OPERATORS,
    ),
    Rule(
        name="global-pool",
        operators=frozenset(_WHOLE_POOLS),
        find=_global_pool,
        mend="Write it as AveragePool (or MaxPool) with a window of the whole picture, which fits "
        "where that is at most 8 x 8, as the 7 x 7 of this network at 224 pixels.",
        source=_OPERATORS,
    ),
    Rule(
        name="flatten",
        operators=frozenset({"Flatten"}),
        find=_flatten,
        mend="Write the classifier behind it as a convolution 1 x 1 on the pooled (batch, "
        "channels, 1, 1), and flatten its result: only the flattening is left to the GPU then.",
        source=_OPERATORS,
    ),
    Rule(
        name="two-dimensional",
        operators=frozenset(
            {*_ACTIVATIONS, *_ELEMENTWISE, "BatchNormalization", "Reshape", "Transpose"}
        ),
        find=_rank,
        mend="Keep the tensor as (batch, channels, height, width), with sizes of 1 where needed.",
    ),
    Rule(
        name="spatial",
        operators=frozenset({*_POOLS, "Conv"}),
        find=_spatial,
        mend="A DLA has two spatial dimensions: leave it to the GPU.",
    ),
    Rule(
        name="sizes",
        operators=_TAKEN,
        find=_sizes,
        mend=f"Keep a batch of at most {MAX_BATCH} and every other dimension at {MAX_SIZE}.",
    ),
    Rule(
        name="convolution",
        operators=frozenset({"Conv"}),
        find=_convolution,
        mend="Choose kernel 1 to 32, padding 0 to 31 and less than the kernel, stride 1 to 8, "
        "dilation 1 to 32, and 1 to 8192 groups and output channels.",
    ),
    Rule(
        name="constant-weight",
        operators=frozenset(_LAYERS),
        find=_constant_weight,
        mend="Store the weight in the file.",
        source=_OPERATORS,
    ),
    Rule(
        name="outputs",
        operators=frozenset({"Gemm", "MatMul"}),
        find=_product,
        mend=f"Keep at most {MAX_SIZE} outputs, or leave the classifier to the GPU.",
    ),
    Rule(
        name="pool",
        operators=frozenset(_POOLS),
        find=_pool,
        mend="Choose a window of 1 to 8, padding 0 to 7 and a stride of 1 to 16.",
    ),
    Rule(
        name="ceil-mode",
        operators=frozenset(_POOLS),
        find=_ceil,
        mend="Choose a size of the picture, or explicit padding, with which the last window stays "
        "inside padding of 0 to 7.",
    ),
    Rule(
        name="pool-ranges",
        operators=frozenset(_POOLS),
        find=_pool_ranges,
        mend="Give the input and the output of the pooling one scale.",
    ),
    Rule(
        name="lrn-window",
        operators=frozenset({"LRN"}),
        find=_window,
        mend="Choose a window of 3, 5, 7 or 9; that of this network is 5.",
    ),
    Rule(
        name="concat-axis",
        operators=frozenset({"Concat"}),
        find=_channels,
        mend="Join along the channels, and at least two tensors.",
    ),
    Rule(
        name="concat-ranges",
        operators=frozenset({"Concat"}),
        find=_concat_ranges,
        mend="Calibrate the inputs and the output of the Concat together, and give them one scale.",
    ),
    Rule(
        name="clip",
        operators=frozenset({"Clip"}),
        find=_clip,
        mend="Use Relu, or clip from 0 to a limit of 1 to 127.",
    ),
    Rule(
        name="softmax",
        operators=frozenset({"Softmax"}),
        find=_softmax,
        mend="Leave it out of the network (the largest logit stays the largest), or to the GPU.",
        generations=("xavier",),
    ),
    Rule(
        name="softmax-size",
        operators=frozenset({"Softmax"}),
        find=_softmax_size,
        mend="Take it along one dimension of at most 1024 values, or with all others at 1.",
    ),
    Rule(
        name="batch-moves",
        operators=frozenset({"Reshape", "Transpose"}),
        find=_batch_moves,
        mend="Leave the batch dimension as it is.",
    ),
)


def _layer(node: ir.Node) -> Layer:
    findings = tuple(
        Finding(
            rule=rule.name,
            problem=problem,
            mend=rule.mend,
            source=rule.source,
            generations=rule.generations,
        )
        for rule in RULES
        if not rule.operators or node.op_type in rule.operators
        for problem in rule.find(node)
    )
    # A ReLU between a layer and its QuantizeLinear is computed with the layer.
    ranges = _range_before(_input(node, 0)) is not None or (
        node.op_type not in _LAYERS and _range_behind(node) is not None
    )
    return Layer(
        name=node.name or str(node.outputs[0].name),
        operator=node.op_type,
        macs=count_macs(node, _weight(node)) if node.op_type in _LAYERS else 0,
        precision="int8" if ranges and node.op_type not in _HALF else "fp16",
        findings=findings,
    )


def _needs(model: ir.Model, splits: tuple[Split, ...]) -> Iterator[Finding]:
    """What holds for the network as a whole."""
    for value in model.graph.inputs:
        shape = value.shape
        if shape is None or not shape.is_static():
            yield Finding(
                rule="dynamic",
                problem=f"the input {value.name} has dimensions that the file leaves open",
                mend="Export with --batch 1, or build with a profile whose least, best and largest "
                "shapes are equal.",
                source=_GUIDE,
            )
    if any(_shape(node.outputs[0]) is None for node in model.graph if node.op_type not in _GONE):
        yield Finding(
            rule="shapes",
            problem="some shapes are not stated and could not be inferred; rules about sizes say "
            "nothing there",
            mend="Export the model again with fixed shapes.",
            source="https://onnx.ai/onnx/repo-docs/ShapeInference.html",
        )
    if any(node.op_type in _PAIR for node in model.graph):
        yield Finding(
            rule="explicit-quantization",
            problem="up to TensorRT 10.7 a DLA takes no Q/DQ nodes, only ranges of tensors",
            mend="Translate the file with NVIDIA's Q/DQ Translator into one without Q/DQ, a table "
            "of ranges for --calib and the layers that stay in FP16. A tensor without a range "
            "makes its piece run in FP16 or on the GPU. TensorRT 11 has no such table: there, "
            "NVIDIA describes networks in FP16 for a DLA.",
            source=f"{_TRANSLATOR}, {_MODELOPT} and {_TYPED}",
        )
    else:
        yield Finding(
            rule="precision",
            problem="a DLA computes in FP16 or INT8, and the file holds no ranges for INT8",
            mend="Build with --fp16 up to TensorRT 10.7, or make an FP16 file (`gnet-opt quantize "
            "--precision fp16`) for TensorRT 11; for INT8 start from a quantized bundle.",
            source=f"{_FAQ} and {_TYPED}",
        )
    for split in splits:
        if split.loadables > MAX_LOADABLES:
            yield Finding(
                rule="loadables",
                problem=f"the network falls into {split.loadables} pieces for a DLA, and a core "
                f"holds {MAX_LOADABLES}",
                mend="Mend the layers between them, or leave small pieces to the GPU.",
                source=_GUIDE,
                generations=(split.generation,),
            )


def _split(nodes: list[ir.Node], layers: tuple[Layer, ...], generation: Generation) -> Split:
    """Cut the network where it changes between DLA and GPU.

    Two neighbours on the same device are one piece only where no path between them leaves the
    device: otherwise two pieces would wait for each other. So each node counts the changes on the
    way to it, and pieces are neighbours with equal counts. TensorRT may cut in more places.
    """
    taken = {node: layer.runs_on(generation) for node, layer in zip(nodes, layers, strict=True)}
    changes: dict[ir.Node, int] = {}
    piece: dict[ir.Node, ir.Node] = {}

    def first(node: ir.Node) -> ir.Node:
        while piece[node] is not node:
            node = piece[node]
        return node

    for node in nodes:
        before = [other for other in _writers(node) if other in changes]
        changes[node] = max(
            (changes[other] + (taken[other] != taken[node]) for other in before), default=0
        )
        piece[node] = node
        for other in before:
            if taken[other] == taken[node] and changes[other] == changes[node]:
                piece[first(other)] = first(node)
    pieces = {first(node) for node in nodes}
    macs = sum(layer.macs for layer in layers)
    own = sum(layer.macs for layer in layers if layer.runs_on(generation))
    return Split(
        generation=generation,
        layers=sum(taken.values()),
        gpu_layers=len(nodes) - sum(taken.values()),
        loadables=sum(taken[node] for node in pieces),
        gpu_pieces=sum(not taken[node] for node in pieces),
        macs_share=own / macs if macs else 0.0,
    )


def _writers(node: ir.Node) -> Iterator[ir.Node]:
    """The layers that a node reads from, through nodes that are no layer."""
    pending = [value.producer() for value in node.inputs if value is not None]
    while pending:
        writer = pending.pop()
        if writer is None:
            continue
        if writer.op_type in _GONE:
            pending.extend(value.producer() for value in writer.inputs[:1] if value is not None)
        else:
            yield writer


def _infer_shapes(model: ir.Model) -> None:
    from onnx_ir.passes.common import ShapeInferencePass

    if any(value.shape is None for node in model.graph for value in node.outputs):
        ShapeInferencePass()(model)


def _range_before(value: ir.Value | None) -> float | None:
    """The scale of a dequantized value, None where it is float or a constant's."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in ("Dropout", "Identity"):
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return None
    return _scale(node)


def _range_behind(node: ir.Node) -> float | None:
    """The scale that a node's result is quantized with, None where it is not."""
    for user in node.outputs[0].consumers():
        if user.op_type == "QuantizeLinear":
            return _scale(user)
    return None


def _scale(node: ir.Node) -> float | None:
    scale = constant(_input(node, 1))
    return None if scale is None or scale.size != 1 else float(np.ravel(scale)[0])


def _weight(node: ir.Node) -> ir.Value | None:
    """The constant behind a layer's weight, in integers where it is quantized."""
    value = _input(node, 1)
    while value is not None and constant(value) is None:
        writer = value.producer()
        if writer is None or writer.op_type not in (*_PAIR, "Constant", "Identity"):
            return None
        if writer.op_type == "Constant":
            return value
        value = writer.inputs[0]
    return value


def _shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """A shape; an open batch counts as 1, and with other open dimensions there is none."""
    if value is None or value.shape is None:
        return None
    sizes = list(value.shape.dims)
    if sizes and not isinstance(sizes[0], int):
        sizes[0] = 1
    known = tuple(size for size in sizes if isinstance(size, int))
    return known if len(known) == len(sizes) else None


def _kernel(node: ir.Node) -> tuple[int, ...]:
    stated = _integers(node, "kernel_shape")
    if stated or node.op_type != "Conv":
        return stated
    return (_shape(_weight(node)) or ())[2:]


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _integers(node: ir.Node, name: str) -> tuple[int, ...]:
    """An attribute of one or several integers, empty where the node does not state it."""
    found = node.attributes.get(name)
    if found is None:
        return ()
    value: Any = found.value
    return (value,) if isinstance(value, int) else tuple(value)


def _integer(node: ir.Node, name: str, default: int = 0) -> int:
    return (*_integers(node, name), default)[0]


def _outside(what: str, values: tuple[int, ...], least: int, most: int) -> Iterator[str]:
    if any(not least <= value <= most for value in values):
        yield f"its {what} is {_listed(values)}, not within {least} to {most}"


def _listed(values: Any) -> str:
    return " x ".join(str(value) for value in values)
