"""Where the time of a picture goes, layer by layer, and what holds it back.

A file that says INT8 is no proof that a runtime computes in INT8, nor that what is left is
arithmetic. `explain` puts what the file has beside what the runtime executes, and says in sentences
what follows. Every sentence comes from one rule of this module with a threshold above it, and holds
measured numbers.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gnet_opt.machine import Machine
from gnet_opt.runtime import INTEGERS, ExecutedNode, NodeKind, Profile

NOTABLE = 0.05
"""Least share of the time that gets a sentence: less is hardly worth anybody's work."""

SLOW_FOR_ITS_SIZE = 2.0
"""How many times its share of the multiply-accumulates a layer's share of the time must be."""

ARITHMETIC = 0.7
"""From this share of the time on, INT8 layers are called what the time is spent on."""

NEARLY_ALL = 0.99
"""From this share of the multiply-accumulates on, what is left in float holds nothing back."""

BUSY = 1.25
"""How many times the sum of all nodes' medians a round takes on a busy machine."""

_LISTED = 4
"""Names in a sentence, before the rest is counted."""

_TITLES: dict[NodeKind, str] = {
    "concat": "Concat",
    "elementwise": "Elementwise arithmetic",
    "lrn": "LRN",
    "other": "Everything else",
    "pool": "Pooling",
    "quantize": "Quantizing and dequantizing",
    "reorder": "Reordering memory",
    "softmax": "Softmax",
}
_QUANTIZES_BIASES = (1, 23)
"""The version from which on ONNX Runtime quantizes float biases."""

_MODULE = re.compile(r"inception[_.]?\d+[a-z]?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A Conv, Gemm or MatMul of the file, or one that only the runtime knows.

    Attributes:
        name: In the file.
        operator: In the file; as the runtime calls it where the file has no such layer.
        stored: `int8` or `float` as the file has it; empty where it has no such layer.
        precision: What the runtime executes, empty where it does not tell.
        kernel: Which code runs, or else the runtime's operator.
        macs: Multiply-accumulates for one picture, None where not known.
        microseconds: Time for one picture.
        reason: Why the runtime computes in float what the file has in INT8, where that is known.
        inside: The executed node that it is only a part of, whose time counts elsewhere, or empty.
    """

    name: str
    operator: str
    stored: str
    precision: str
    kernel: str
    macs: int | None
    microseconds: float
    reason: str = ""
    inside: str = ""

    @property
    def integer(self) -> bool:
        """Whether it is executed in INT8."""
        return self.precision in INTEGERS


@dataclass(frozen=True, kw_only=True)
class Group:
    """What runs beside the layers, by kind.

    Attributes:
        kind: What it is for.
        nodes: The nodes, the longest first.
    """

    kind: NodeKind
    nodes: tuple[ExecutedNode, ...]

    @property
    def title(self) -> str:
        """The kind in words."""
        return _TITLES[self.kind]

    @property
    def microseconds(self) -> float:
        """Time for one picture."""
        return sum(node.microseconds for node in self.nodes)

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions of its nodes, sorted."""
        return tuple(sorted({node.precision for node in self.nodes}))


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where the time goes.

    Attributes:
        profile: What was measured.
        layers: In the order of the file.
        groups: The rest, the longest first.
        sentences: What holds it back.
    """

    profile: Profile
    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    sentences: tuple[str, ...] = ()

    @property
    def microseconds(self) -> float:
        """All nodes together: the sum of their medians."""
        return sum(node.microseconds for node in self.profile.nodes)

    def share(self, microseconds: float) -> float:
        """A time as a share of all."""
        return microseconds / self.microseconds if self.microseconds else 0.0

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all layers of the file."""
        return sum(layer.macs or 0 for layer in self.layers)

    @property
    def macs_int8_share(self) -> float:
        """Share of the multiply-accumulates that are executed in INT8."""
        done = sum(layer.macs or 0 for layer in self.layers if layer.integer)
        return done / self.macs if self.macs else 0.0

    @property
    def time_shares(self) -> dict[str, float]:
        """Shares of the time: INT8 layers, other layers, and each kind of group."""
        integer = sum(layer.microseconds for layer in self.layers if layer.integer)
        others = sum(layer.microseconds for layer in self.layers if not layer.integer)
        return {
            "int8_layers": self.share(integer),
            "float_layers": self.share(others),
            **{group.kind: self.share(group.microseconds) for group in self.groups},
        }

    @property
    def modules(self) -> list[dict[str, Any]]:
        """Layers by Inception module, in the order of the file, where names tell; may be empty.

        Pools, Concats and reorders do not say to which module they belong and are left out.
        """
        found: dict[str, list[Layer]] = {}
        for layer in self.layers:
            found.setdefault(module_of(layer.name), []).append(layer)
        if len(found) < 3:  # one module and a rest tell nothing
            return []
        return [
            {
                "int8": sum(layer.integer for layer in layers),
                "layers": len(layers),
                "macs": sum(layer.macs or 0 for layer in layers) or None,
                "microseconds": sum(layer.microseconds for layer in layers),
                "name": name,
                "share": self.share(sum(layer.microseconds for layer in layers)),
            }
            for name, layers in found.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report for `--json`; times in microseconds, shares from 0 to 1."""
        return {
            "backend": self.profile.backend,
            "groups": [
                {
                    "kind": group.kind,
                    "microseconds": group.microseconds,
                    "nodes": [node.to_dict() for node in group.nodes],
                    "share": self.share(group.microseconds),
                    "title": group.title,
                }
                for group in self.groups
            ],
            "layers": [
                {
                    "inside": layer.inside,
                    "kernel": layer.kernel,
                    "macs": layer.macs,
                    "microseconds": layer.microseconds,
                    "name": layer.name,
                    "operator": layer.operator,
                    "precision": layer.precision,
                    "reason": layer.reason,
                    "share": self.share(layer.microseconds),
                    "stored": layer.stored,
                }
                for layer in self.layers
            ],
            "macs": self.macs,
            "macs_int8_share": self.macs_int8_share,
            "microseconds": self.microseconds,
            "modules": self.modules,
            "rounds": list(self.profile.rounds),
            "runs": self.profile.runs,
            "sentences": list(self.sentences),
            "threads": self.profile.threads,
            "time_shares": self.time_shares,
            "version": self.profile.version,
        }


def explain(
    described: Sequence[Mapping[str, Any]],
    surroundings: Mapping[str, Mapping[str, Any]],
    profile: Profile,
    machine: Machine,
) -> Report:
    """Put what a file has beside what a runtime executes, and say what holds it back.

    Args:
        described: The layers as `gnet_opt.quantization.describe.describe` tells of them.
        surroundings: What `gnet_opt.quantization.surroundings.surroundings` tells of the same file.
        profile: What a backend's `profile` found on this machine.
        machine: This machine.
    """
    names = _Names(surroundings)
    of_layer: dict[str, list[ExecutedNode]] = {layer["name"]: [] for layer in described}
    unknown: list[ExecutedNode] = []
    rest: dict[NodeKind, list[ExecutedNode]] = {}
    for node in profile.nodes:
        if node.kind != "layer":
            rest.setdefault(node.kind, []).append(node)
        elif (owner := names.layer(node)) is not None:
            of_layer[owner].append(node)
        else:
            unknown.append(node)
    # OpenVINO can put several layers into one `Subgraph`, whose precision is that of none of them.
    inside = {
        names.beginning(cover): node.name
        for nodes in rest.values()
        for node in nodes
        for cover in node.covers
    }
    layers = [
        _layer(layer, of_layer[layer["name"]], surroundings[layer["name"]], profile, machine)
        if of_layer[layer["name"]]
        else Layer(
            name=layer["name"],
            operator=layer["operator"],
            stored=layer["precision"],
            precision="",
            kernel="",
            macs=layer["macs"],
            microseconds=0.0,
            inside=inside.get(layer["name"], ""),
        )
        for layer in described
    ]
    layers += [
        Layer(
            name=node.covers[-1] if node.covers else node.name,
            operator=node.operator,
            stored="",
            precision=node.precision,
            kernel=node.kernel or node.operator,
            macs=None,
            microseconds=node.microseconds,
        )
        for node in unknown
    ]
    groups = [
        Group(kind=kind, nodes=tuple(sorted(nodes, key=lambda node: -node.microseconds)))
        for kind, nodes in rest.items()
    ]
    groups.sort(key=lambda group: -group.microseconds)
    report = Report(profile=profile, layers=tuple(layers), groups=tuple(groups))
    return dataclasses.replace(report, sentences=tuple(_sentences(report, machine)))


def module_of(layer: str) -> str:
    """The Inception module that a layer's name tells of, or `the rest`."""
    match = _MODULE.search(layer)
    return match[0] if match else "the rest"


class _Names:
    """Finds the layer of the file that an executed node belongs to."""

    def __init__(self, surroundings: Mapping[str, Mapping[str, Any]]) -> None:
        self._layers = set(surroundings)
        self._aliases: dict[str, str] = {
            alias: name for name, facts in surroundings.items() for alias in facts["aliases"]
        }

    def layer(self, node: ExecutedNode) -> str | None:
        """The layer that a convolution or Gemm computes.

        By its own name; by the name of the activation that was fused with it, which ONNX Runtime
        keeps, or of the tensor that it writes, which OpenVINO gives to what writes an output; or by
        a name that begins with its own, such as OpenVINO's `fc/WithoutBiases`.
        """
        for name in node.covers:
            if name in self._layers:
                return name
        for name in node.covers:
            if name in self._aliases:
                return self._aliases[name]
        return next(filter(None, map(self.beginning, node.covers)), None)

    def beginning(self, name: str) -> str | None:
        """The layer of this name, or else the longest that a name `LAYER/...` begins with."""
        while name and name not in self._layers:
            name = name.rpartition("/")[0]
        return name or None


def _layer(
    described: Mapping[str, Any],
    nodes: Sequence[ExecutedNode],
    around: Mapping[str, Any],
    profile: Profile,
    machine: Machine,
) -> Layer:
    precision = ", ".join(sorted({node.precision for node in nodes}))
    lost = described["precision"] == "int8" and precision not in INTEGERS
    return Layer(
        name=described["name"],
        operator=described["operator"],
        stored=described["precision"],
        precision=precision,
        kernel=", ".join(sorted({node.kernel or node.operator for node in nodes})),
        macs=described["macs"],
        microseconds=sum(node.microseconds for node in nodes),
        reason=_reason(described, around, profile, machine) if lost else "",
    )


def _reason(
    described: Mapping[str, Any], around: Mapping[str, Any], profile: Profile, machine: Machine
) -> str:
    """Why a runtime did not compute an INT8 layer in INT8; empty where no rule fits.

    The rules are those of ONNX Runtime's `qdq_selectors.cc` (one QuantizeLinear takes the result,
    its type is that of the input, a bias is quantized), `relu_quantizelinear.cc` (a ReLU goes where
    the zero point is the lowest integer) and `qdq_s8_to_u8.cc` (on x86 an s8 pair becomes u8 where
    the quantized tensor has one taker, and s8 itself is not allowed). A float bias was measured:
    1.20.1 and 1.22.1 do not quantize it, 1.21.1, 1.23.2 and 1.32.0 do.
    """
    if profile.backend != "onnxruntime":
        return ""
    result, zero = around["result"], around["zero_point"]
    if result == "output" and described["operator"] == "Gemm" and around["bias"] != "float":
        return ""
    if result == "output" and described["operator"] == "Gemm":
        return (
            "the result is the output, in float, and so is the bias; ONNX Runtime needs one of the "
            "two quantized"
        )
    if result in ("float", "output", "branches"):
        where = {
            "branches": "is quantized more than once",
            "float": f"goes on in float, to {_listed(around['takers'])}",
            "output": "is the output, in float",
        }
        return (
            f"the result {where[result]}; ONNX Runtime computes in INT8 only where one "
            "QuantizeLinear takes the result"
        )
    x86 = machine.architecture == "x86_64"
    if x86 and around["input"] == "s8" and around["input_takers"] > 1:
        return (
            f"{around['input_takers']} nodes take its s8 input; on x86 ONNX Runtime turns s8 into "
            "u8, the only type that it has there, only where one node takes it"
        )
    lowest = {"s8": -128, "u8": 0}.get(around["result_type"])
    if around["activation"] == "Relu" and zero is not None and zero != lowest:
        return (
            f"with zero point {zero} in {around['result_type']} the ReLU between it and its "
            "quantization stays; ONNX Runtime computes in INT8 only where nothing is between them"
        )
    if not x86 and around["input"] != around["result_type"]:
        return (
            f"the input is {around['input']} and the result {around['result_type']}; ONNX Runtime "
            "needs one type for both"
        )
    if around["bias"] == "float" and _release(profile.version) < _QUANTIZES_BIASES:
        return (
            f"its bias is float, and ONNX Runtime {profile.version} does not quantize it; "
            f"{'.'.join(map(str, _QUANTIZES_BIASES))} and later do"
        )
    return ""


def _sentences(report: Report, machine: Machine) -> Iterable[str]:
    yield from _on_precision(report)
    yield from _on_instructions(report, machine)
    yield from _on_groups(report)
    yield from _on_slow_layers(report)
    yield from _on_what_is_left(report)
    yield from _on_a_busy_machine(report)


def _on_precision(report: Report) -> Iterable[str]:
    """Which layers run in INT8, and why others do not."""
    count, macs = len(report.layers), report.macs
    known = [layer for layer in report.layers if layer.stored]
    strangers = [layer for layer in report.layers if not layer.stored]
    if count and not any(layer.integer or layer.stored == "int8" for layer in report.layers):
        precisions = _listed(sorted({layer.precision for layer in report.layers} - {""}))
        yield (
            f"The file holds no INT8: all {count} layers run in {precisions}. "
            "`gnet-opt quantize` makes an INT8 bundle."
        )
        return
    if known and all(layer.integer for layer in known):
        yield f"All {len(known)} layers, and so all multiply-accumulates, run in INT8."
    lost = [layer for layer in known if layer.stored == "int8" and _in_float(layer)]
    for layers, why in (
        (lost, "although the file has them in INT8"),
        (
            [layer for layer in known if layer.stored == "float" and _in_float(layer)],
            "as in the file",
        ),
    ):
        if not layers:
            continue
        precisions = _listed(sorted({layer.precision for layer in layers}))
        share = sum(layer.macs or 0 for layer in layers) / macs if macs else 0.0
        time = report.share(sum(layer.microseconds for layer in layers))
        run, they, hold, take = (
            ("runs", "It", "holds", "takes")
            if len(layers) == 1
            else ("run", "They", "hold", "take")
        )
        yield (
            f"{len(layers)} of {len(known)} layers {run} in {precisions} {why}: {_names(layers)}. "
            f"{they} {hold} {_percent(share)} of the multiply-accumulates and {take} "
            f"{_percent(time)} of the time."
        )
    reasons: dict[str, list[Layer]] = {}
    for layer in lost:
        if layer.reason:
            reasons.setdefault(layer.reason, []).append(layer)
    for reason, layers in reasons.items():
        yield f"Why {_names(layers)}: {reason}."
    inside = [layer for layer in known if layer.inside]
    if inside:
        where = _listed(sorted({layer.inside for layer in inside}))
        yield (
            f"Parts of other nodes ({where}), whose precision is not told, so not counted: "
            f"{len(inside)} of {len(known)} layers, {_names(inside)}."
        )
    unseen = [layer for layer in known if not layer.precision and not layer.inside]
    if unseen:
        yield (
            f"Not among what the runtime executes, so not counted: {len(unseen)} of {len(known)} "
            f"layers, {_names(unseen)}."
        )
    if strangers:
        integer = sum(layer.integer for layer in strangers)
        time = report.share(sum(layer.microseconds for layer in strangers))
        yield (
            f"Executed, but no Conv, Gemm or MatMul of the file: {_names(strangers)}; {integer} of "
            f"{len(strangers)} in INT8. Their multiply-accumulates are not known, and they take "
            f"{_percent(time)} of the time."
        )


def _on_instructions(report: Report, machine: Machine) -> Iterable[str]:
    """Whether this CPU's integer instructions are what INT8 needs, and whether they are used.

    Without VNNI, three instructions (`vpmaddubsw`, `vpmaddwd`, `vpaddd`) do for 32 products what
    one does with it. Measured on GoogLeNet with AVX2: 1.8 to 2.0 times as fast as float
    (benchmarks/results/openvino_paths-x86-avx2-1t.json). On Arm one `sdot` multiplies 16 pairs of
    INT8, one `fmla` 4 pairs of float32.
    """
    layers = [layer for layer in report.layers if layer.integer]
    time = report.share(sum(layer.microseconds for layer in layers))
    if not layers or time < NOTABLE:
        return
    flags, spent = machine.instructions, f"INT8 layers take {_percent(time)} of the time"
    if machine.architecture == "x86_64" and not flags & {"avx512_vnni", "avx_vnni"}:
        yield f"{spent} on a CPU without VNNI: there INT8 is at most about twice as fast as float."
    elif machine.architecture == "aarch64" and "asimddp" not in flags:
        yield (
            f"{spent} on a CPU without the dot product instructions (asimddp) that multiply 16 "
            "pairs of INT8 at once, where float multiplies 4."
        )
    # Only kernels that name an instruction set tell which one they use.
    kernels = sorted({layer.kernel for layer in layers if "avx" in layer.kernel})
    best, name = ("amx", "AMX") if "amx_int8" in flags else ("avx512", "AVX-512 with VNNI")
    if kernels and flags & {"amx_int8", "avx512_vnni"} and not any(best in k for k in kernels):
        yield (
            f"{spent}, and none of them uses {name}, which this CPU has (kernels: "
            f"{_listed(kernels)}). Is ONEDNN_MAX_CPU_ISA set?"
        )
    plain = [layer for layer in layers if layer.kernel.startswith("ref")]
    slow = report.share(sum(layer.microseconds for layer in plain))
    if slow >= NOTABLE:
        yield (
            f"{_names(plain)} run by the runtime's plain reference code ({plain[0].kernel}) and "
            f"take {_percent(slow)} of the time."
        )


def _on_groups(report: Report) -> Iterable[str]:
    """What takes a notable share of the time beside the layers, and which nodes most of it."""
    for group in report.groups:
        share = report.share(group.microseconds)
        if share < NOTABLE:
            continue
        count = len(group.nodes)
        longest = ", ".join(
            f"{node.name} {_percent(report.share(node.microseconds))} "
            f"({node.kernel or node.operator}, {node.precision})"
            for node in group.nodes[:2]
        )
        which = "one node" if count == 1 else f"{count} nodes{', the longest' if count > 2 else ''}"
        # What moves or quantizes values is no arithmetic that could be in INT8 instead.
        arithmetic = group.kind not in ("quantize", "reorder")
        float_only = len(group.precisions) == 1 and group.precisions[0] not in INTEGERS
        how = f"runs in {group.precisions[0]} and takes" if arithmetic and float_only else "takes"
        yield f"{group.title} {how} {_percent(share)} of the time; {which}: {longest}."


def _on_slow_layers(report: Report) -> Iterable[str]:
    """Layers that take much more of the time than of the multiply-accumulates."""
    for layer in sorted(report.layers, key=lambda layer: -layer.microseconds):
        time = report.share(layer.microseconds)
        size = (layer.macs or 0) / report.macs if report.macs else 0.0
        if layer.macs and time >= NOTABLE and time >= SLOW_FOR_ITS_SIZE * size:
            yield (
                f"{layer.name} ({layer.precision}) takes {_percent(time)} of the time for "
                f"{_percent(size)} of the multiply-accumulates."
            )


def _on_what_is_left(report: Report) -> Iterable[str]:
    """How much faster INT8 arithmetic could still make it."""
    time = report.time_shares["int8_layers"]
    if not time:
        return
    if time >= ARITHMETIC and report.macs_int8_share >= NEARLY_ALL:
        yield f"INT8 layers take {_percent(time)} of the time: what is left is arithmetic."
    elif time < ARITHMETIC:
        yield (
            f"What is no INT8 layer takes {_percent(1 - time)} of the time: with INT8 layers that "
            f"took no time at all, a picture would be {1 / (1 - time):.1f} times as fast."
        )


def _on_a_busy_machine(report: Report) -> Iterable[str]:
    """Whether something else was running; medians of nodes hardly see it, whole rounds do."""
    if not report.microseconds:
        return
    ratio = statistics.median(report.profile.rounds) / report.microseconds
    if ratio >= BUSY:
        yield (
            f"The machine was busy: a whole run took {ratio:.1f} times the sum of the layers' "
            "medians. Shares are rough; measure again when it is idle."
        )


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number of a version, (0, 0) for one that has none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _in_float(layer: Layer) -> bool:
    return bool(layer.precision) and not layer.integer


def _names(layers: Sequence[Layer]) -> str:
    """The names of layers, those that take most of the time first."""
    return _listed([layer.name for layer in sorted(layers, key=lambda layer: -layer.microseconds)])


def _listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`, and so on; of more than a few the rest is counted."""
    shown = list(names)
    if len(shown) > _LISTED:
        shown = [*shown[: _LISTED - 1], f"{len(shown) - _LISTED + 1} others"]
    return " and ".join(filter(None, (", ".join(shown[:-1]), *shown[-1:])))


def _percent(share: float) -> str:
    """A share in percent: whole ones, and one digit below two."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 2 or value == 0 else f"{value:.1f} %"
