"""Which forms in an ONNX file a runtime refuses, or takes without computing in INT8.

So far there are the rules of TensorRT with explicit quantization: `tensorrt` for 10 and 11, and
`tensorrt8` for 8, which refuses more. They read files of any tool. Each rule is one function that
yields the nodes it finds, and one row of `RULES` or `RULES_OF_8` with where it comes from and what
to do about it. What NVIDIA documents is taken from NVIDIA; "tried" means that TensorRT-RTX 1.7.1,
whose parser and builder run without a GPU, behaves so. Nothing was tried on TensorRT 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from gnet_opt.errors import ConfigError, ModelError
from gnet_opt.quantization.graph import count_macs
from gnet_opt.quantization.regions import load_graph

Severity = Literal["error", "slow"]
Problem = tuple[ir.Node | None, str]
"""A node, None for the file as a whole, and what is wrong with it."""

LAST_OPSET = 24
"""Of TensorRT 10. TensorRT 11 documents 25, but a file is to be read by both."""

LAST_OPSET_OF_8 = 17
"""Of TensorRT 8.5 and later; 8.4 and earlier read 13."""

_PAIR = ("QuantizeLinear", "DequantizeLinear")
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ONNX_RUNTIME = "com.microsoft"
_PLAIN_TYPES = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1)
_OPERATOR_FORM = frozenset(
    {"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
)
_MOVES = frozenset(
    {
        "Concat",
        "Dropout",
        "Flatten",
        "Identity",
        "MaxPool",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators that only move values, so that they give the same before and after DequantizeLinear.
TensorRT moves it behind such a layer (NVIDIA's example is MaxPool), so what follows is in INT8."""

_FOLDED = ("BatchNormalization", "Relu")
"""What TensorRT computes in one kernel with the layer in front of it."""

_EXPLICIT = (
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/"
    "quantized-types-explicit-quantization.html"
)
_TYPES = (
    "https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/"
    "work-quantized-types.html"
)
_OPERATORS = "https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md"
_OPERATORS_OF_8 = "https://github.com/onnx/onnx-tensorrt/blob/release/8.5-GA/docs/operators.md"
_IMPORTER = "https://github.com/onnx/onnx-tensorrt/blob/main/onnxOpImporters.cpp"
_QUANTIZE = "https://docs.nvidia.com/deeplearning/tensorrt/operators/docs/Quantize.html"
_ISSUES = "https://github.com/NVIDIA/TensorRT/issues"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One place of a file that a rule speaks of.

    Attributes:
        rule: The name of the rule.
        severity: `error` where the runtime refuses the file, or computes something else than the
            file says; `slow` where it builds, but not in INT8 or with copies between layouts.
        node: The node's name, that of its first output where it has none, or empty for the file.
        operator: The node's operator, or empty for the file.
        problem: What is wrong.
        mend: What to do about it.
        source: Where the rule comes from, and what is said there.
    """

    rule: str
    severity: Severity
    node: str
    operator: str
    problem: str
    mend: str
    source: str

    def to_dict(self) -> dict[str, str]:
        """The finding as `gnet-opt inspect --lint --json` prints it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What is looked for; the attributes mean what they mean in a `Finding`."""

    name: str
    severity: Severity
    mend: str
    source: str
    find: Callable[[_File], Iterator[Problem]]


def lint(path: Path, rules: str = "tensorrt") -> list[Finding] | None:
    """Find what a runtime refuses or slows on in a quantized ONNX file, whoever made it.

    Args:
        path: The file.
        rules: Whose rules, a key of `RULE_SETS`.

    Returns:
        Errors first, by rule and then in graph order; None for a file without any quantization,
        Q/DQ or quantized operators, to which no rule applies.

    Raises:
        ConfigError: There are no such rules.
        ModelError: The file is no ONNX file, or the files that hold its weights are missing.
    """
    if rules not in RULE_SETS:
        raise ConfigError(f"There are no rules {rules!r}; use {' or '.join(RULE_SETS)}.")
    file = _read(path)
    if not _holds_integers(file):
        return None
    try:
        return [
            _finding(rule, *problem) for rule in RULE_SETS[rules] for problem in rule.find(file)
        ]
    except OSError as error:
        raise ModelError(
            f"{path} keeps its weights in other files, and they cannot be read ({error}). "
            "Copy them beside it."
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Weight:
    """A weight with several scales.

    Attributes:
        type: Of its integers.
        shape: Its shape.
        scales: How many there are.
        blocks: Whether they are those of blocks, not along one axis.
        axis: Along which they are.
        wanted: The axis of the output channels as TensorRT counts them.
    """

    type: ir.DataType | None
    shape: tuple[int, ...]
    scales: int
    blocks: bool
    axis: int
    wanted: int

    @property
    def fits(self) -> bool:
        """Whether there are as many scales as the shape has along their axis."""
        return 0 <= self.axis < len(self.shape) and self.scales == self.shape[self.axis]


@dataclass(frozen=True, kw_only=True)
class _File:
    """What the rules look at.

    Attributes:
        opset: Of the standard operators.
        nodes: Of the graph and everything inside it, in graph order.
    """

    opset: int
    nodes: tuple[ir.Node, ...]

    def all_of(self, *operators: str) -> list[ir.Node]:
        return [node for node in self.nodes if node.op_type in operators]

    @cached_property
    def biases(self) -> dict[ir.Node, ir.Node]:
        """The DequantizeLinear of a bias, by the layer that reads it."""
        layers = self.all_of("Conv", "ConvTranspose", "Gemm")
        found = {layer: _writer(_input(layer, 2), "DequantizeLinear") for layer in layers}
        return {layer: node for layer, node in found.items() if node is not None}

    @cached_property
    def pairs(self) -> list[ir.Node]:
        """One node for every pair: its QuantizeLinear, or a DequantizeLinear without an equal one.

        Biases are left out: what may be wrong with them is that they are quantized at all.
        """
        biases = set(self.biases.values())
        biases |= {_quantizer(node) or node for node in biases}
        return [
            node
            for node in self.all_of(*_PAIR)
            if node not in biases
            and (
                node.op_type == "QuantizeLinear"
                or (quantizer := _quantizer(node)) is None
                or not _equal_parameters(quantizer, node)
            )
        ]

    @cached_property
    def weights(self) -> dict[ir.Node, _Weight]:
        """The weights that have several scales, by the layer that reads them."""
        found = {layer: _weight(layer) for layer in self.all_of(*_LAYERS)}
        return {layer: weight for layer, weight in found.items() if weight is not None}

    @cached_property
    def dequantized(self) -> dict[ir.Node, list[bool]]:
        """Of every layer, whether its data and its weight come from a DequantizeLinear."""
        return {
            node: [_is_dequantized(_input(node, index)) for index in (0, 1)]
            for node in self.all_of(*_LAYERS)
        }


def _opset(file: _File) -> Iterator[Problem]:
    if file.opset > LAST_OPSET:
        yield None, f"the file has opset {file.opset}"


def _opset_of_8(file: _File) -> Iterator[Problem]:
    if file.opset > LAST_OPSET_OF_8:
        yield None, f"the file has opset {file.opset}"


def _type_of_8(file: _File) -> Iterator[Problem]:
    for node in file.pairs:
        kind = _integer_type(node)
        if _has_allowed_type(node) and kind not in (None, ir.DataType.INT8):
            yield node, f"its values are {_words(kind)}"


def _integer_weight(file: _File) -> Iterator[Problem]:
    for node in file.all_of("DequantizeLinear"):
        constant = _tensor(_input(node, 0))
        if constant is not None and constant.dtype == ir.DataType.INT8:
            yield node, "it reads an int8 constant, without a QuantizeLinear in front of it"


def _operator_form(file: _File) -> Iterator[Problem]:
    for node in file.nodes:
        if node.op_type in _OPERATOR_FORM:
            yield node, f"{node.op_type} computes on integers itself"
        elif _is_operator_form(node):
            yield node, f"{node.domain}.{node.op_type} is an operator of ONNX Runtime alone"


def _integer_bias(file: _File) -> Iterator[Problem]:
    for layer, node in file.biases.items():
        if _type(_input(node, 0)) == ir.DataType.INT32:
            yield layer, "its bias is int32 behind a DequantizeLinear"


def _dequantized_bias(file: _File) -> Iterator[Problem]:
    for layer, node in file.biases.items():
        if (kind := _type(_input(node, 0))) != ir.DataType.INT32:
            yield layer, f"its bias is {_words(kind)} behind a DequantizeLinear"


def _activation_type(file: _File) -> Iterator[Problem]:
    for node in file.pairs:
        if not _is_weight(node) and not _has_allowed_type(node):
            yield node, _type_problem(node)


def _weight_type(file: _File) -> Iterator[Problem]:
    for node in file.pairs:
        if _is_weight(node) and not _has_allowed_type(node):
            yield node, _type_problem(node)


def _zero_point(file: _File) -> Iterator[Problem]:
    for node in file.pairs:
        zero = _numbers(_input(node, 2))
        if zero is not None and zero.any() and _has_allowed_type(node):
            yield node, f"its zero point is {_some(zero[zero != 0])}"


def _scale_value(file: _File) -> Iterator[Problem]:
    for node in file.pairs:
        scale = _numbers(_input(node, 1))
        if scale is not None and (bad := scale[~(np.isfinite(scale) & (scale > 0))]).size:
            yield node, f"its scale is {_some(bad)}"


def _computed_parameter(file: _File) -> Iterator[Problem]:
    for node in file.pairs:
        scale, zero = _input(node, 1), _input(node, 2)
        if _needs_input(scale):
            yield node, "its scale is computed from the input of the model"
        if zero is not None and _tensor(zero) is None:
            yield node, "its zero point is computed while the model runs"


def _activation_scales(file: _File) -> Iterator[Problem]:
    for node in file.pairs:
        scale = _numbers(_input(node, 1))
        if not _is_weight(node) and scale is not None and scale.size > 1:
            yield node, f"an activation has {scale.size} scales"


def _weight_scales(file: _File) -> Iterator[Problem]:
    for layer, weight in file.weights.items():
        if weight.blocks and weight.type == ir.DataType.INT8:
            yield layer, f"its weight has {weight.scales} scales of blocks"
        elif not weight.blocks and not weight.fits:
            shape = "x".join(map(str, weight.shape))
            yield layer, f"its weight has {weight.scales} scales for shape {shape}"


def _weight_axis(file: _File) -> Iterator[Problem]:
    for layer, weight in file.weights.items():
        if not weight.blocks and weight.fits and weight.axis != weight.wanted:
            along = f"axis {weight.axis}, not {weight.wanted}"
            yield layer, f"the scales of its weight are along {along}"


def _unequal_pair(file: _File) -> Iterator[Problem]:
    for node in file.pairs:
        quantizer = _quantizer(node)
        if quantizer is not None:
            front = f"the QuantizeLinear {_name(quantizer)} in front of it"
            yield node, f"its scale or zero point is not that of {front}"


def _integer_tensor(file: _File) -> Iterator[Problem]:
    for node in file.all_of("QuantizeLinear"):
        readers = [user for user in _users(node) if user.op_type != "DequantizeLinear"]
        others = sorted({user.op_type for user in readers if not _is_operator_form(user)})
        if others:
            yield node, f"its integers go to {', '.join(others)}, not to a DequantizeLinear"
    for node in file.all_of("DequantizeLinear"):
        value = _input(node, 0)
        writer = value.producer() if value is not None else None
        if writer is not None and _tensor(value) is None and _makes_integers(writer):
            yield node, f"its integers come from {writer.op_type}, not from a QuantizeLinear"


def _unread(file: _File) -> Iterator[Problem]:
    for node in file.all_of(*_PAIR):
        if not _users(node) and not _is_output(node):
            yield node, "nothing reads its result"


def _split_fusion(file: _File) -> Iterator[Problem]:
    for layer in file.all_of(*_LAYERS):
        behind = [
            reader.op_type
            for quantizer in _users(layer)
            if quantizer.op_type == "QuantizeLinear"
            for dequantizer in _users(quantizer)
            for reader in _users(dequantizer)
            if reader.op_type in _FOLDED
        ]
        if behind:
            yield layer, f"its result is quantized before the {behind[0]} that reads it"


def _unequal_concat(file: _File) -> Iterator[Problem]:
    for node in file.all_of("Concat"):
        found = _sources(*node.inputs)
        if None in found or not _stays_integer(node):
            continue
        scales = [_numbers(_input(source, 1)) for source in found if source is not None]
        different = sorted({float(scale[0]) for scale in scales if scale is not None})
        if len(different) > 1:
            listed = ", ".join(f"{scale:.6g}" for scale in different)
            yield node, f"its inputs have different scales: {listed}"


def _partial_concat(file: _File) -> Iterator[Problem]:
    for node in file.all_of("Concat"):
        floats = [value for value in node.inputs if not _is_dequantized(value)]
        if 0 < len(floats) < len(node.inputs) and _stays_integer(node):
            names = ", ".join(str(value.name) for value in floats if value is not None)
            yield node, f"{len(floats)} of its {len(node.inputs)} inputs are float: {names}"


def _half_quantized(file: _File) -> Iterator[Problem]:
    for layer, (data, weight) in file.dequantized.items():
        if data == weight or _is_small_weight(layer):
            continue
        what = ("first", "second") if layer.op_type == "MatMul" else ("data", "weight")
        have, lack = what if data else what[::-1]
        yield layer, f"its {have} input is dequantized and its {lack} input is float"


def _float_layer(file: _File) -> Iterator[Problem]:
    for layer, (data, weight) in file.dequantized.items():
        value = _input(layer, 1)
        if data or weight or (layer.op_type in ("Gemm", "MatMul") and _tensor(value) is None):
            continue
        macs = count_macs(layer, value) if layer.op_type in ("Conv", "Gemm") else 0
        cost = f", with {macs:,} multiply-accumulates" if macs else ""
        yield layer, f"it stays in float{cost}"


RULES = (
    Rule(
        name="opset",
        severity="error",
        mend=f"Export the model with an opset of {LAST_OPSET} at most.",
        source=f"{_OPERATORS}: TensorRT 10.15 reads opsets up to 24, 8.5 up to 17",
        find=_opset,
    ),
    Rule(
        name="operator-form",
        severity="error",
        mend="Quantize the float model again in Q/DQ form (ONNX Runtime: "
        "quant_format=QuantFormat.QDQ), and leave it unoptimized by ONNX Runtime.",
        source=f"{_EXPLICIT}: models with quantized operators such as QLinearConv and ConvInteger "
        f"are refused; {_OPERATORS}: no operator of com.microsoft is among those supported",
        find=_operator_form,
    ),
    Rule(
        name="integer-bias",
        severity="error",
        mend='Leave biases in float32 (ONNX Runtime: extra_options={"QuantizeBias": False}).',
        source=f"{_OPERATORS}: DequantizeLinear takes INT8, FP8, FP4 and INT4; tried: int32 is "
        "refused",
        find=_integer_bias,
    ),
    Rule(
        name="activation-type",
        severity="error",
        mend="Quantize activations as int8 with a zero point of type int8 (ONNX Runtime: "
        "activation_type=QuantType.QInt8).",
        source=f"{_OPERATORS}: quantized types are INT8, FP8, FP4 and INT4; {_IMPORTER}: a zero "
        "point of type uint8, or none, is taken as int8, so that values above 127 steps are cut",
        find=_activation_type,
    ),
    Rule(
        name="weight-type",
        severity="error",
        mend="Quantize weights as int8 (ONNX Runtime: weight_type=QuantType.QInt8).",
        source=f"{_OPERATORS}: DequantizeLinear takes INT8, FP8, FP4 and INT4; {_TYPES}: INT4 is "
        "for the weights of matrix products alone",
        find=_weight_type,
    ),
    Rule(
        name="zero-point",
        severity="error",
        mend="Quantize symmetrically, with zero point 0 (ONNX Runtime: extra_options="
        '{"ActivationSymmetric": True, "WeightSymmetric": True}).',
        source=f"{_OPERATORS}: the zero point must be 0",
        find=_zero_point,
    ),
    Rule(
        name="scale-value",
        severity="error",
        mend="Calibrate again, and give a tensor that is always 0 any positive scale.",
        source=f"{_IMPORTER}: scale coefficients must all be positive",
        find=_scale_value,
    ),
    Rule(
        name="computed-parameter",
        severity="error",
        mend="Quantize statically, so that scales and zero points are constants of the file.",
        source=f"{_QUANTIZE}: the scale must be a build-time constant; tried: building ends with a "
        "segmentation fault where it is not, and a computed zero point is refused",
        find=_computed_parameter,
    ),
    Rule(
        name="weight-scales",
        severity="error",
        mend="Give the weight one scale in all, or one for each output channel.",
        source=f"{_IMPORTER}: as many scales as the axis is long; {_QUANTIZE}: scales of blocks "
        "are for INT4",
        find=_weight_scales,
    ),
    Rule(
        name="unequal-pair",
        severity="error",
        mend="Give both nodes of a pair the same scale and zero point.",
        source="https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html: the values that leave "
        "such a pair are others than those that enter it",
        find=_unequal_pair,
    ),
    Rule(
        name="integer-tensor",
        severity="error",
        mend="Put a DequantizeLinear right behind every QuantizeLinear, and let all other "
        "operators read and write floats.",
        source=f"{_OPERATORS}: INT8 exists only between QuantizeLinear and DequantizeLinear; "
        "tried: TensorRT-RTX builds such a file all the same",
        find=_integer_tensor,
    ),
    Rule(
        name="dequantized-bias",
        severity="slow",
        mend="Leave biases in float32.",
        source="tried: it is built, but a bias in float is the form that is known to be computed "
        "with the layer",
        find=_dequantized_bias,
    ),
    Rule(
        name="activation-scales",
        severity="slow",
        mend="Give every activation one scale; only weights have one for each channel.",
        source=f"{_EXPLICIT}: per-tensor quantization for activations, per-channel for weights; "
        f"{_IMPORTER}: activations have no scales along an axis",
        find=_activation_scales,
    ),
    Rule(
        name="weight-axis",
        severity="slow",
        mend="Give the weight its scales along axis 0 for Conv, for Gemm with transB and for "
        "ConvTranspose, and along axis 1 for other matrix products.",
        source=f"{_EXPLICIT}: axis 0 for Conv and for Gemm with transB, axis 1 without; "
        f"{_ISSUES}/2380: axis 0 for ConvTranspose",
        find=_weight_axis,
    ),
    Rule(
        name="split-fusion",
        severity="slow",
        mend="Quantize behind the ReLU or batch normalization instead.",
        source=f"{_EXPLICIT}: do not quantize the outputs of weighted operations, nor simulate the "
        "fusion of batch normalization and ReLU",
        find=_split_fusion,
    ),
    Rule(
        name="unequal-concat",
        severity="slow",
        mend="Calibrate the inputs of the Concat together, and give them one scale.",
        source=f"{_ISSUES}/4366 and {_ISSUES}/3861: TensorRT reformats around the Concat; "
        f"{_EXPLICIT}: it moves Q/DQ only where the scales are equal",
        find=_unequal_concat,
    ),
    Rule(
        name="partial-concat",
        severity="slow",
        mend="Quantize the other inputs of the Concat, too, with the same scale.",
        source=f"{_ISSUES}/4366 and {_ISSUES}/3861: TensorRT reformats around the Concat",
        find=_partial_concat,
    ),
    Rule(
        name="half-quantized",
        severity="slow",
        mend="Put Q/DQ before its float input, too, or remove them from the other.",
        source=f"{_EXPLICIT}: quantize all inputs of weighted operations",
        find=_half_quantized,
    ),
    Rule(
        name="float-layer",
        severity="slow",
        mend="Put Q/DQ before its data and its weight, unless it is in float for its accuracy.",
        source=f"{_EXPLICIT}: quantize all inputs of weighted operations",
        find=_float_layer,
    ),
    Rule(
        name="unread",
        severity="slow",
        mend="Remove the node, or let what is to run in INT8 read its result.",
        source=f"{_EXPLICIT}: a layer runs in INT8 where it reads from DequantizeLinear",
        find=_unread,
    ),
)
"""The rules of TensorRT 10 and 11, errors first."""

RULES_OF_8 = (
    Rule(
        name="opset-of-8",
        severity="error",
        mend=f"Export the model with an opset of {LAST_OPSET_OF_8} at most, and of 13 for TensorRT "
        "8.4 and earlier.",
        source=f"{_OPERATORS_OF_8}: 8.5 reads opsets up to 17; the same file of release/8.4-GA: 13",
        find=_opset_of_8,
    ),
    Rule(
        name="type-of-8",
        severity="error",
        mend="Quantize to int8.",
        source=f"{_OPERATORS_OF_8}: DequantizeLinear takes INT8 alone",
        find=_type_of_8,
    ),
    Rule(
        name="integer-weight",
        severity="error",
        mend="Keep the weight in float32 and put a QuantizeLinear with the same scale in front of "
        "its DequantizeLinear. `gnet-opt quantize` for a target whose options.tensorrt is 8 writes "
        "such a file beside the portable one (ONNX Runtime: "
        'extra_options={"AddQDQPairToWeight": True}).',
        source=f"{_ISSUES}/2163: 8.4.1 refuses it (invalid weights type of Int8); "
        "https://github.com/megvii-research/Sparsebit/issues/16: 8.0.3 and 8.2.5, too; for 8.5 and "
        "8.6 it is not known to be otherwise",
        find=_integer_weight,
    ),
    *(rule for rule in RULES if rule.find is not _opset),
)
"""The rules of TensorRT 8: what it alone refuses, and what later versions do not like either."""

RULE_SETS = {"tensorrt": RULES, "tensorrt8": RULES_OF_8}
"""By the name that `gnet-opt inspect --lint` takes."""


def _read(path: Path) -> _File:
    model = load_graph(path)
    if model.functions:
        from onnx_ir.passes.common import InlinePass

        InlinePass()(model)
    imports = model.graph.opset_imports
    return _File(
        opset=imports.get("", imports.get("ai.onnx", 0)),
        nodes=tuple(ir.traversal.RecursiveGraphIterator(model.graph)),
    )


def _holds_integers(file: _File) -> bool:
    return any(node.op_type in _PAIR or _is_operator_form(node) for node in file.nodes)


def _finding(rule: Rule, node: ir.Node | None, problem: str) -> Finding:
    return Finding(
        rule=rule.name,
        severity=rule.severity,
        node="" if node is None else _name(node),
        operator="" if node is None else node.op_type,
        problem=problem,
        mend=rule.mend,
        source=rule.source,
    )


def _name(node: ir.Node) -> str:
    return node.name or (str(node.outputs[0].name) if node.outputs else "")


def _is_operator_form(node: ir.Node) -> bool:
    # By name, TensorRT takes ONNX Runtime's own QuantizeLinear and DequantizeLinear as ONNX's.
    foreign = node.domain == _ONNX_RUNTIME and node.op_type not in _PAIR
    return foreign or node.op_type in _OPERATOR_FORM


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _users(node: ir.Node) -> list[ir.Node]:
    return [user for value in node.outputs for user in value.consumers()]


def _is_output(node: ir.Node) -> bool:
    return any(value.is_graph_output() for value in node.outputs)


def _writer(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node that writes a value, if it has this operator."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None


def _quantizer(node: ir.Node) -> ir.Node | None:
    """The QuantizeLinear that a DequantizeLinear undoes; None for any other node."""
    if node.op_type != "DequantizeLinear":
        return None
    return _writer(_input(node, 0), "QuantizeLinear")


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant behind a value: of an initializer or a Constant node, maybe through Identity."""
    passed: set[ir.Value] = set()
    while value is not None and value not in passed:
        passed.add(value)
        try:
            tensor = ir.convenience.get_const_tensor(value)
        except (TypeError, ValueError):  # a sparse constant, or a damaged one
            return None
        if tensor is not None:
            return tensor
        identity = _writer(value, "Identity")
        value = _input(identity, 0) if identity is not None else None
    return None


def _numbers(value: ir.Value | None) -> npt.NDArray[np.float64] | None:
    """The numbers of a constant in one row, None where it is not constant or holds none."""
    tensor = _tensor(value)
    if tensor is None:
        return None
    try:
        numbers = np.asarray(tensor.numpy()).astype(np.float64).ravel()
    except (AssertionError, TypeError, ValueError):  # onnx_ir's, for strings and damaged data
        return None
    return numbers if numbers.size else None


def _needs_input(value: ir.Value | None) -> bool:
    """Whether a value is computed from an input of the graph, and not from constants alone."""
    passed: set[ir.Value] = set()
    pending = [value]
    while pending:
        found = pending.pop()
        if found is None or found in passed or _tensor(found) is not None:
            continue
        passed.add(found)
        node = found.producer()
        if node is None:
            return True
        pending.extend(node.inputs)
    return False


def _type(value: ir.Value | None) -> ir.DataType | None:
    tensor = _tensor(value)
    if tensor is not None:
        return tensor.dtype
    return value.dtype if value is not None else None


def _integer_type(node: ir.Node) -> ir.DataType | None:
    """The type of the integers of a QuantizeLinear or DequantizeLinear, None where unknown."""
    if _input(node, 2) is not None:
        return _type(_input(node, 2))
    if node.op_type == "DequantizeLinear":
        return _type(_input(node, 0))
    stated = _integer(node, "output_dtype", 0)
    known = stated in [int(kind) for kind in ir.DataType]
    # ONNX: without a zero point and this attribute, the integers are uint8.
    return ir.DataType(stated) if stated and known else ir.DataType.UINT8


def _integer(node: ir.Node, attribute: str, default: int) -> int:
    found = node.attributes.get(attribute)
    return found.value if found is not None and isinstance(found.value, int) else default


def _equal_parameters(first: ir.Node, second: ir.Node) -> bool:
    """Whether two nodes have one scale and zero point, as far as they are constants."""
    for index, default in ((1, 1.0), (2, 0.0)):
        values = [_input(node, index) for node in (first, second)]
        numbers = [np.full(1, default) if value is None else _numbers(value) for value in values]
        if values[0] is values[1] or numbers[0] is None or numbers[1] is None:
            continue
        if index == 2 and not numbers[0].any() and not numbers[1].any():
            continue
        if not np.array_equal(numbers[0], numbers[1], equal_nan=True):
            return False
    return True


def _is_weight(node: ir.Node) -> bool:
    """Whether a QuantizeLinear or DequantizeLinear stands behind a constant."""
    first = _quantizer(node) or node
    return _tensor(_input(first, 0)) is not None


def _has_allowed_type(node: ir.Node) -> bool:
    kind = _integer_type(node)
    if kind == ir.DataType.INT4 and _is_weight(node):
        return not any(
            reader.op_type in ("Conv", "ConvTranspose")
            for user in [node, *_users(node)]
            for reader in _users(user)
        )
    return kind is None or kind in _PLAIN_TYPES


def _type_problem(node: ir.Node) -> str:
    silent = _input(node, 2) is None and not _integer(node, "output_dtype", 0)
    if node.op_type == "QuantizeLinear" and silent:
        return "it has no zero point, which in ONNX means uint8"
    return f"its integers are {_words(_integer_type(node))}"


def _words(kind: ir.DataType | None) -> str:
    return "of an unknown type" if kind is None else kind.name.lower()


def _some(numbers: npt.NDArray[np.float64]) -> str:
    more = f" (and {numbers.size - 1} others)" if numbers.size > 1 else ""
    return f"{numbers[0]:g}{more}"


def _weight(layer: ir.Node) -> _Weight | None:
    """The weight of a layer that is constant, dequantized, and has more than one scale."""
    value = _input(layer, 1)
    turns = []
    while (turn := _writer(value, "Transpose")) is not None and turn not in turns:
        turns.append(turn)
        value = _input(turn, 0)
    node = _writer(value, "DequantizeLinear")
    if node is None:
        return None
    tensor, scale = _tensor(_input(_quantizer(node) or node, 0)), _tensor(_input(node, 1))
    if tensor is None or scale is None or scale.size <= 1:
        return None
    rank = len(tensor.shape)
    axis, wanted = _integer(node, "axis", 1), _output_axis(layer, rank)
    for turn in turns:
        order = turn.attributes.get("perm")
        stated = order is not None and order.type == ir.AttributeType.INTS
        axes = list(order.value) if order is not None and stated else list(range(rank))[::-1]
        wanted = axes[wanted] if wanted < len(axes) else wanted
    return _Weight(
        type=_integer_type(node),
        shape=tuple(tensor.shape.numpy()),
        scales=scale.size,
        blocks=len(scale.shape) > 1,
        axis=axis + rank if axis < 0 else axis,
        wanted=wanted,
    )


def _output_axis(layer: ir.Node, rank: int) -> int:
    """The axis of a layer's weight along which TensorRT takes one scale each."""
    if layer.op_type == "MatMul":
        return max(rank - 1, 0)
    return 1 if layer.op_type == "Gemm" and not _integer(layer, "transB", 0) else 0


def _is_small_weight(layer: ir.Node) -> bool:
    """Whether a layer's weight is quantized to 4 bits, which is for weights alone."""
    small = (ir.DataType.INT4, ir.DataType.FLOAT4E2M1)
    return any(
        node is not None and _is_weight(node) and _integer_type(node) in small
        for node in _sources(_input(layer, 1))
    )


def _sources(*values: ir.Value | None) -> set[ir.Node | None]:
    """Where values come from, through operators that only move them: DequantizeLinear, or None."""
    found: set[ir.Node | None] = set()
    passed: set[ir.Node] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        node = value.producer() if value is not None else None
        if node is None or node.op_type not in _MOVES:
            found.add(node if node is not None and node.op_type == "DequantizeLinear" else None)
        elif node not in passed:
            passed.add(node)
            pending.extend(node.inputs if node.op_type == "Concat" else node.inputs[:1])
    return found


def _is_dequantized(value: ir.Value | None) -> bool:
    """Whether a value comes from DequantizeLinear alone."""
    found = _sources(value)
    return bool(found) and None not in found


def _makes_integers(node: ir.Node) -> bool:
    """Whether a node gives integers that no QuantizeLinear made; one that reads such is found."""
    return (
        node.op_type != "QuantizeLinear"
        and not _is_operator_form(node)
        and all(_writer(value, "QuantizeLinear") is None for value in node.inputs)
    )


def _stays_integer(node: ir.Node) -> bool:
    """Whether what a node writes is to be integers: a layer, a move or QuantizeLinear reads it."""
    return any(user.op_type in ("QuantizeLinear", *_LAYERS, *_MOVES) for user in _users(node))
