"""Export a network to one plain ONNX file, and prove that the file computes the same.

The file is for quantizers and compilers: one `LRN` node where torch would write nine, global
pooling by its name, a linear layer as a `Gemm` with `transB`, names that come from the network,
and nothing that depends on the machine or the moment.
"""

from __future__ import annotations

import collections
import contextlib
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from gnet_opt.errors import ModelError, require
from gnet_opt.files import atomic_path, sha256_file
from gnet_opt.model import Model
from gnet_opt.preprocess import FloatArray
from gnet_opt.stages.graph import (
    NewNode,
    constant,
    replace_initializer,
    replace_node,
    run_bytes,
)

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

Batch = Literal[1, "dynamic"]

INPUT = "input"
OUTPUT = "logits"

_TRACE_OPSET = 18
"""What torch's exporter writes without converting; its operator library starts here."""

_LOWEST_OPSET = 17
"""Written where every operator means the same there: TensorRT 8.5 (JetPack 5) reads up to 17."""

_IR_VERSION = 8
"""ONNX 1.13's, the first with opset 18 and enough for it: older runtimes can read the file."""

_MODULE_PREFIX = "module."
"""What the wrapper around the network puts before the names of its weights."""

_TOLERANCE = 1e-4
"""Largest |difference| between torch and the file, as a share of the logits' range."""

_DYNAMIC_TEST_BATCH = 3


def trace(
    model: Model, examples: FloatArray, *, batch: Batch = 1
) -> tuple[ir.Model, dict[str, Any]]:
    """Trace a network into an ONNX graph that still has its batch norms.

    Args:
        model: The stripped model.
        examples: Preprocessed pictures, float32 of shape (N, planes, H, W); the first is traced.
        batch: 1, or `dynamic` for a symbolic first dimension.

    Returns:
        The graph, with constants folded, from `input` to `logits`; and the fact how many
        parameters the logits do not depend on, though the network computes with them.

    Raises:
        ModelError: torch cannot trace the network, for example because its control flow depends
            on pixel values.
        MissingDependencyError: onnx, onnx-ir or onnxscript is not installed.
    """
    for package in ("onnx", "onnx_ir", "onnxscript"):
        require(package, "build", "export a model to ONNX")
    import torch
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript import optimizer

    from gnet_opt.networks.lrn import KeepLocalResponseNorm, translation_table

    class Named(torch.nn.Module):
        """The network with a name for its input; what leads not to its logits is not traced."""

        def __init__(self) -> None:
            super().__init__()
            self.module = model.module

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            with KeepLocalResponseNorm():
                logits: torch.Tensor = self.module(input)
                return logits

    # torch.export takes an example size of 1 as a constant, so a dynamic batch is shown as 2.
    count = 1 if batch == 1 else 2
    example = torch.from_numpy(np.repeat(examples[:1], count, axis=0))
    shapes = None if batch == 1 else {INPUT: {0: torch.export.Dim("batch")}}
    with _quiet():
        try:
            program = torch.onnx.export(
                Named().eval(),
                (example,),
                dynamo=True,
                opset_version=_TRACE_OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                custom_translation_table=translation_table(),
                # Its optimizer would fold batch norms in float32.
                optimize=False,
                verbose=False,
            )
        except Exception as error:
            raise ModelError(
                f"torch.onnx.export cannot trace {model.name}: {_cause(error)}. Control flow must "
                "not depend on pixel values or on the batch size."
            ) from error
        if program is None:
            raise ModelError(f"torch.onnx.export returned nothing for {model.name}.")
        graph: ir.Model = program.model
        RemoveUnusedNodesPass()(graph)
        # Before constants are folded, because that gives weights other names.
        facts = {"parameters_unreached": _count_unreached(graph, model)}
        optimizer.fold_constants(graph)
    return graph, facts


def _count_unreached(graph: ir.Model, model: Model) -> int:
    reached = {name for name, value in graph.graph.initializers.items() if value.uses()}
    return sum(
        parameter.numel()
        for name, parameter in model.module.named_parameters()
        if _MODULE_PREFIX + name not in reached
    )


def write(
    graph: ir.Model, model: Model, examples: FloatArray, out: Path, *, batch: Batch = 1
) -> dict[str, Any]:
    """Tidy a traced and folded graph, check it, prove it against torch, and write it.

    In order: (1) what the optimizer of onnxscript knows, (2) linear layers as `Gemm` with
    `transB=1`, (3) means over the whole map as `GlobalAveragePool`, (4) flattening reshapes as
    `Flatten`, (5) unused nodes and weights go, (6) names from the network, no metadata, (7) the
    lowest opset that means the same, (8) ONNX's full check and strict shape inference, (9) every
    example through torch and through ONNX Runtime on the CPU.

    Args:
        graph: From `trace`, without batch norms (see `fold.fold`); it is changed.
        model: The model that was traced.
        examples: Real preprocessed pictures, float32 of shape (N, planes, H, W).
        out: The file to write, atomically; two runs write the same bytes.
        batch: As it was traced.

    Returns:
        The facts: opset, inputs and outputs, number of nodes by operator, parameters, bytes,
        SHA-256, and the parity with torch.

    Raises:
        ModelError: The graph is not valid ONNX, or a logit differs by more than 1e-4 of the
            logits' range.
    """
    from onnxscript import optimizer

    from gnet_opt.networks.outputs import compute_logits

    with _quiet():
        optimizer.optimize(graph)
    _write_linear_as_gemm(graph)
    _write_mean_as_global_pool(graph)
    _write_reshape_as_flatten(graph)
    _clean(graph)
    _name(graph)
    _lower_opset(graph)
    graph.graph.name = model.name
    proto = _checked(graph, model.name)
    content = proto.SerializeToString(deterministic=True)

    expected = compute_logits(model.module, examples)
    parity = _compare(content, examples, expected, model.name, batch)
    with atomic_path(out) as temporary:
        temporary.write_bytes(content)
    operators = collections.Counter(node.op_type for node in proto.graph.node)
    return {
        "opset": graph.opset_imports[""],
        "ir_version": graph.ir_version,
        "batch": batch,
        "inputs": {INPUT: _dimensions(proto.graph.input[0])},
        "outputs": {OUTPUT: _dimensions(proto.graph.output[0])},
        "operators": dict(sorted(operators.items())),
        "parameters": sum(math.prod(tensor.dims) for tensor in proto.graph.initializer),
        "bytes": len(content),
        "sha256": sha256_file(out),
        **parity,
    }


# --- the graph's form ---------------------------------------------------------------------------


def _write_linear_as_gemm(graph: ir.Model) -> None:
    """`MatMul` by a constant, with or without an `Add`, and `Gemm` without `transB`."""
    import onnx_ir as ir

    for node in list(graph.graph):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        x, weight = node.inputs[0], constant(node.inputs[1])
        if x is None or x.shape is None or len(x.shape) != 2:
            continue
        if weight is None or weight.ndim != 2 or node.attributes.get_int("transB", 0) == 1:
            continue
        rest: list[ir.Value | None] = list(node.inputs[2:])
        last = node
        if node.op_type == "MatMul" and (added := _bias_added(node)) is not None:
            last, bias = added
            rest.append(bias)
        name = str(node.inputs[1].name if node.inputs[1] else node.name)
        transposed = replace_initializer(graph, name, weight.T, node)
        attributes = {**node.attributes, "transB": ir.AttrInt64("transB", 1)}
        gemm = NewNode("Gemm", [transposed, *rest], list(attributes.values()))
        replace_node(graph, last, x, [gemm])
        if last is not node:
            graph.graph.remove(node, safe=True)


def _bias_added(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The `Add` of a constant vector that alone reads the node's output, and that vector."""
    users = [user for user, _ in node.outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    for value in users[0].inputs:
        array = constant(value)
        if value is not None and array is not None and array.ndim == 1:
            return users[0], value
    return None


def _write_mean_as_global_pool(graph: ir.Model) -> None:
    """`ReduceMean` over both map dimensions, and `AveragePool` as large as the map.

    A mean without `keepdims` becomes a pool and a `Flatten`.
    """
    for node in list(graph.graph):
        x = node.inputs[0] if node.inputs else None
        if x is None or x.shape is None or len(x.shape) != 4:
            continue
        if node.op_type == "ReduceMean" and _reduced_axes(node) == {2, 3}:
            chain = [NewNode("GlobalAveragePool")]
            if not node.attributes.get_int("keepdims", 1):
                chain.append(_flatten())
            replace_node(graph, node, x, chain)
        elif node.op_type == "AveragePool" and _covers_map(node, list(x.shape)[2:]):
            replace_node(graph, node, x, [NewNode("GlobalAveragePool")])


def _reduced_axes(node: ir.Node) -> set[int]:
    axes: Any = node.attributes.get_ints("axes", None)
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        array = constant(node.inputs[1])
        axes = None if array is None else array.reshape(-1).tolist()
    return set() if axes is None else {int(axis) % 4 for axis in axes}


def _covers_map(node: ir.Node, size: list[Any]) -> bool:
    attributes = node.attributes
    return list(attributes.get_ints("kernel_shape", ())) == size and not any(
        attributes.get_ints("pads", ())
    )


def _write_reshape_as_flatten(graph: ir.Model) -> None:
    """A `Reshape` to (N, everything else) works for any batch as `Flatten`."""
    for node in list(graph.graph):
        x = node.inputs[0] if node.inputs else None
        if node.op_type != "Reshape" or x is None:
            continue
        before, after = x.shape, node.outputs[0].shape
        if before is None or after is None or len(after) != 2 or before[0] != after[0]:
            continue
        rest = [size for size in list(before)[1:] if isinstance(size, int)]
        if len(rest) == len(before) - 1 and after[1] == math.prod(rest):
            replace_node(graph, node, x, [_flatten()])


def _flatten() -> NewNode:
    import onnx_ir as ir

    return NewNode("Flatten", attributes=[ir.AttrInt64("axis", 1)])


def _clean(graph: ir.Model) -> None:
    """Drop what nothing reads, and everything that tells of the machine that exported."""
    from onnx_ir.passes import common

    for step in (
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(graph)
    for value in [*graph.graph.inputs, *graph.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in graph.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    graph.producer_name, graph.producer_version = "gnet-opt", None
    graph.ir_version = _IR_VERSION


def _name(graph: ir.Model) -> None:
    """Name nodes after their weights, and each value after the node that gives it.

    A convolution with the weight `inception3a.branch1.conv.weight` is
    `inception3a.branch1.conv`, its ReLU `inception3a.branch1.conv.relu`; any other node has its
    operator and a number. The order of the weights is the order of their use.
    """
    initializers = graph.graph.initializers
    used: list[ir.Value] = []
    for node in graph.graph:
        for value in node.inputs:
            if value is not None and value.is_initializer() and value not in used:
                used.append(value)
    initializers.clear()
    for value in used:
        value.name = str(value.name).removeprefix(_MODULE_PREFIX)
        if value.const_value is not None:
            value.const_value.name = value.name
        initializers[value.name] = value

    taken = {INPUT, OUTPUT, *initializers}
    graph.graph.inputs[0].name = INPUT
    for node in graph.graph:
        stem = _own_name(node)
        name, number = stem or f"{node.op_type.lower()}_1", 2
        while name in taken:
            name, number = f"{stem or node.op_type.lower()}_{number}", number + 1
        taken.add(name)
        node.name = name
        for index, value in enumerate(node.outputs):
            value.name = name if index == 0 else f"{name}:{index}"
    graph.graph.outputs[0].name = OUTPUT


def _own_name(node: ir.Node) -> str:
    """The name that a node has from its weight or from the layer before it, or nothing."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if weight is not None and weight.is_initializer() and str(weight.name).endswith(".weight"):
        return str(weight.name).removesuffix(".weight")
    source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if node.op_type == "Relu" and source is not None and source.op_type in ("Conv", "Gemm"):
        return f"{source.name}.relu"
    return ""


def _lower_opset(graph: ir.Model) -> None:
    """Declare opset 17 where no operator in the graph changed since."""
    import onnx

    if set(graph.opset_imports) != {""} or graph.functions:
        return
    versions = [
        onnx.defs.get_schema(node.op_type, _TRACE_OPSET, "").since_version
        for node in graph.graph.all_nodes()
    ]
    if max(versions, default=1) <= _LOWEST_OPSET:
        graph.opset_imports[""] = _LOWEST_OPSET


def _checked(graph: ir.Model, name: str) -> onnx.ModelProto:
    """The graph as protobuf, with every shape inferred and the full check passed."""
    import onnx
    import onnx_ir as ir

    proto = ir.to_proto(graph)
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        onnx.checker.check_model(inferred, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"The export of {name} is not valid ONNX: {error}") from error
    # The shape of a weight is in the weight; elsewhere it would be a second truth.
    weights = {tensor.name for tensor in inferred.graph.initializer}
    values = [value for value in inferred.graph.value_info if value.name not in weights]
    del inferred.graph.value_info[:]
    inferred.graph.value_info.extend(values)
    left = sorted({node.op_type for node in graph.graph} & {"BatchNormalization", "Dropout"})
    if left:
        raise ModelError(
            f"The export of {name} still has {', '.join(left)}. Put the network into eval mode."
        )
    return inferred


# --- parity -------------------------------------------------------------------------------------


def _compare(
    content: bytes, examples: FloatArray, expected: FloatArray, name: str, batch: Batch
) -> dict[str, Any]:
    """Run the file's bytes on every example and hold the logits against torch's."""
    batches = [image[None] for image in examples]
    if batch == "dynamic":
        # The file must take other batches than it was traced with, one of them incomplete.
        step = _DYNAMIC_TEST_BATCH
        repeated = np.resize(examples, (max(len(examples), step), *examples.shape[1:]))
        batches = [repeated[i : i + step] for i in range(0, len(repeated), step)]
        expected = np.resize(expected, (len(repeated), expected.shape[1]))
    actual = run_bytes(content, batches)
    worst = float(np.abs(actual - expected).max())
    spread = float(expected.max() - expected.min())
    if not worst <= _TOLERANCE * spread:
        raise ModelError(
            f"The ONNX file of {name} differs from torch by up to {worst:g} on {len(examples)} "
            f"pictures, more than {_TOLERANCE:g} of the logits' range of {spread:g}. It was not "
            "written. The network may use an operator that is exported wrongly."
        )
    return {
        "images": len(examples),
        "max_abs_difference": worst,
        "logits_range": spread,
        "tolerance": _TOLERANCE,
    }


# --- small things -------------------------------------------------------------------------------


def _dimensions(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _cause(error: BaseException) -> str:
    """The first line of the innermost error, which is the one that says something."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.') if lines else 'no message'}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's prints, warnings and log lines away from the user."""
    disabled = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)
