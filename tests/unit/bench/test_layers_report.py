"""Every sentence of the report, by made-up profiles: when it is said, and with which numbers."""

from __future__ import annotations

from typing import Any

import pytest

import cpuinfo
from gnet_opt.bench import layers
from gnet_opt.machine import Machine, parse_flags
from gnet_opt.runtime import ExecutedNode, NodeKind, Profile


def machine(info: str = cpuinfo.XEON_ICE_LAKE, architecture: str = "x86_64") -> Machine:
    return Machine(
        architecture=architecture,
        instructions=parse_flags(info),
        cpu="",
        board="",
        cores=2,
        system="",
    )


AMX = Machine(
    architecture="x86_64",
    instructions=frozenset({"amx_int8", "avx512_vnni"}),
    cpu="",
    board="",
    cores=2,
    system="",
)


def node(
    name: str,
    microseconds: float = 100.0,
    *,
    kind: NodeKind = "layer",
    precision: str = "u8",
    covers: tuple[str, ...] | None = None,
    operator: str = "Op",
    kernel: str = "",
) -> ExecutedNode:
    return ExecutedNode(
        name=name,
        operator=operator,
        kind=kind,
        precision=precision,
        microseconds=microseconds,
        covers=(name,) if covers is None else covers,
        kernel=kernel,
    )


def stored(name: str, macs: int = 100, precision: str = "int8", operator: str = "Conv") -> Any:
    return {"macs": macs, "name": name, "operator": operator, "precision": precision}


def around(**facts: Any) -> dict[str, Any]:
    """The surroundings of a layer that every version of ONNX Runtime fuses."""
    usual = {
        "activation": "Relu",
        "bias": "quantized",
        "aliases": [],
        "input": "u8",
        "input_takers": 1,
        "result": "quantized",
        "result_type": "u8",
        "takers": [],
        "zero_point": 0,
    }
    return {**usual, **facts}


def report(
    described: list[Any],
    nodes: list[ExecutedNode],
    *,
    backend: str = "onnxruntime",
    version: str = "1.32.0",
    surroundings: dict[str, Any] | None = None,
    on: Machine | None = None,
    rounds: tuple[float, ...] = (),
) -> layers.Report:
    found = {layer["name"]: around() for layer in described} | (surroundings or {})
    total = sum(one.microseconds for one in nodes)
    profile = Profile(
        backend=backend,
        version=version,
        threads=1,
        runs=100,
        nodes=tuple(nodes),
        rounds=rounds or (total,) * 3,
    )
    return layers.explain(described, found, profile, on or machine())


def test_all_in_int8_and_nothing_but_arithmetic() -> None:
    made = report(
        [stored("a"), stored("b")],
        [node("a", 400), node("b", 400), node("pool", 40, kind="pool"), node("p2", 160)],
    )
    # `p2` is a convolution that the file does not have: it is told of, and is INT8 time.
    assert made.sentences == (
        "All 2 layers, and so all multiply-accumulates, run in INT8.",
        "Executed, but no Conv, Gemm or MatMul of the file: p2; 1 of 1 in INT8. Their "
        "multiply-accumulates are not known, and they take 16 % of the time.",
        "INT8 layers take 96 % of the time: what is left is arithmetic.",
    )
    assert made.macs_int8_share == 1.0
    assert made.time_shares == {"int8_layers": 0.96, "float_layers": 0.0, "pool": 0.04}


def test_a_float_file_says_so() -> None:
    made = report(
        [stored("a", precision="float"), stored("b", precision="float")],
        [node("a", precision="f32"), node("b", precision="f32")],
    )
    assert made.sentences == (
        "The file holds no INT8: all 2 layers run in f32. `gnet-opt quantize` makes an INT8 "
        "bundle.",
    )
    assert (made.macs, made.macs_int8_share) == (200, 0.0)


def test_layers_that_lost_their_int8() -> None:
    described = [stored("a", 100), stored("b", 200), stored("c", 50), stored("d", 650)]
    nodes = [
        node("a", 500, precision="f32"),
        node("b", 100, precision="f32"),
        node("c", 20, precision="bf16"),
        node("d", 380),
    ]
    made = report(described, nodes, backend="openvino")
    assert made.sentences[0] == (
        "3 of 4 layers run in bf16 and f32 although the file has them in INT8: a, b and c. They "
        "hold 35 % of the multiply-accumulates and take 62 % of the time."
    )
    assert not any(sentence.startswith("Why") for sentence in made.sentences)
    assert made.macs_int8_share == 0.65


def test_one_layer_in_float_is_told_of_in_the_singular() -> None:
    made = report(
        [stored("a", 999), stored("fc", 1, "float", "Gemm")],
        [node("a", 990), node("fc", 10, precision="f32")],
    )
    assert made.sentences == (
        "1 of 2 layers runs in f32 as in the file: fc. It holds 0.1 % of the multiply-accumulates "
        "and takes 1.0 % of the time.",
        # Such a layer holds nothing back.
        "INT8 layers take 99 % of the time: what is left is arithmetic.",
    )


def test_many_names_are_counted() -> None:
    names = [f"l{index}" for index in range(6)]
    nodes = [node(name, 100 - index, precision="f32") for index, name in enumerate(names)]
    made = report([stored(name) for name in names], nodes, backend="openvino")
    assert "6 of 6 layers" in made.sentences[0]
    assert ": l0, l1, l2 and 3 others. " in made.sentences[0]
    four = report([stored(name) for name in names[:4]], nodes[:4], backend="openvino")
    assert ": l0, l1, l2 and l3. " in four.sentences[0]


ONE_TAKER = "ONNX Runtime computes in INT8 only where one QuantizeLinear takes the result"
BIAS = "its bias is float, and ONNX Runtime {} does not quantize it; 1.23 and later do"


@pytest.mark.parametrize(
    ("facts", "operator", "version", "architecture", "reason"),
    [
        (
            {"result": "float", "takers": ["LRN", "MaxPool"]},
            "Conv",
            "1.32.0",
            "x86_64",
            f"the result goes on in float, to LRN and MaxPool; {ONE_TAKER}",
        ),
        (
            {"result": "branches"},
            "Conv",
            "1.32.0",
            "x86_64",
            f"the result is quantized more than once; {ONE_TAKER}",
        ),
        (
            {"result": "output", "bias": "float"},
            "Conv",
            "1.32.0",
            "x86_64",
            f"the result is the output, in float; {ONE_TAKER}",
        ),
        (
            {"result": "output", "bias": "float"},
            "Gemm",
            "1.32.0",
            "x86_64",
            "the result is the output, in float, and so is the bias; ONNX Runtime needs one of the "
            "two quantized",
        ),
        ({"result": "output"}, "Gemm", "1.32.0", "x86_64", ""),
        (
            {"input": "s8", "result_type": "s8", "zero_point": 0, "input_takers": 4},
            "Conv",
            "1.32.0",
            "x86_64",
            "4 nodes take its s8 input; on x86 ONNX Runtime turns s8 into u8, the only type that "
            "it has there, only where one node takes it",
        ),
        (
            {"input": "s8", "result_type": "s8", "zero_point": 0},
            "Conv",
            "1.32.0",
            "x86_64",
            "with zero point 0 in s8 the ReLU between it and its quantization stays; ONNX Runtime "
            "computes in INT8 only where nothing is between them",
        ),
        (
            {"input": "s8", "input_takers": 4, "result_type": "s8", "zero_point": -128},
            "Conv",
            "1.32.0",
            "aarch64",
            "",
        ),
        ({"zero_point": 3}, "Conv", "1.32.0", "aarch64", "with zero point 3 in u8 the ReLU"),
        ({"zero_point": 3, "activation": ""}, "Conv", "1.32.0", "x86_64", ""),
        (
            {"input": "s8"},
            "Conv",
            "1.32.0",
            "aarch64",
            "the input is s8 and the result u8; ONNX Runtime needs one type for both",
        ),
        ({"input": "s8"}, "Conv", "1.32.0", "x86_64", ""),
        ({"bias": "float"}, "Conv", "1.22.1", "x86_64", BIAS.format("1.22.1")),
        ({"bias": "float"}, "Conv", "1.9.0", "x86_64", BIAS.format("1.9.0")),
        ({"bias": "float"}, "Conv", "1.23.0", "x86_64", ""),
        ({"bias": "float"}, "Conv", "2.0", "x86_64", ""),
        ({}, "Conv", "1.20.1", "x86_64", ""),
    ],
)
def test_why_onnx_runtime_computes_in_float(
    facts: dict[str, Any], operator: str, version: str, architecture: str, reason: str
) -> None:
    made = report(
        [stored("a", operator=operator), stored("b")],
        [node("a", precision="f32"), node("b")],
        version=version,
        surroundings={"a": around(**facts)},
        on=machine(architecture=architecture),
    )
    (layer, other) = made.layers
    assert layer.reason.startswith(reason) and bool(layer.reason) == bool(reason)
    assert other.reason == ""
    whys = [sentence for sentence in made.sentences if sentence.startswith("Why")]
    assert whys == ([f"Why a: {layer.reason}."] if reason else [])
    # The rules are those of ONNX Runtime; of others nothing is claimed.
    elsewhere = report(
        [stored("a", operator=operator), stored("b")],
        [node("a", precision="f32"), node("b")],
        backend="openvino",
        surroundings={"a": around(**facts)},
    )
    assert elsewhere.layers[0].reason == ""


def test_equal_reasons_are_told_once() -> None:
    floats = {"result": "float", "takers": ["LRN"]}
    made = report(
        [stored("a"), stored("b"), stored("c")],
        [node("a", 100, precision="f32"), node("b", 200, precision="f32"), node("c", 1)],
        surroundings={"a": around(**floats), "b": around(**floats)},
    )
    whys = [sentence for sentence in made.sentences if sentence.startswith("Why")]
    assert whys == [f"Why b and a: the result goes on in float, to LRN; {ONE_TAKER}."]


def test_a_layer_that_the_runtime_does_not_show() -> None:
    made = report([stored("a"), stored("b")], [node("a")])
    assert made.layers[1].precision == ""
    assert made.sentences[0] == (
        "Not among what the runtime executes, so not counted: 1 of 2 layers, b."
    )
    assert made.macs_int8_share == 0.5


def test_layers_inside_another_node() -> None:
    """As OpenVINO does with two linear layers behind each other."""
    subgraph = node(
        "logits", 30, kind="elementwise", precision="f32", covers=("b", "b.relu", "c/WithoutBiases")
    )
    # The bias of a convolution that stands for itself: the convolution is what it runs as.
    bias = node("a.relu", 10, kind="elementwise", precision="f32", covers=("a", "a.relu"))
    nodes = [node("a/WithoutBiases", 60), bias, subgraph]
    made = report([stored("a"), stored("b"), stored("c"), stored("d")], nodes, backend="openvino")
    assert [(layer.precision, layer.inside) for layer in made.layers] == [
        ("u8", ""),
        ("", "logits"),
        ("", "logits"),
        ("", ""),
    ]
    assert made.sentences[:2] == (
        "Parts of other nodes (logits), whose precision is not told, so not counted: 2 of 4 "
        "layers, b and c.",
        "Not among what the runtime executes, so not counted: 1 of 4 layers, d.",
    )
    assert {group.kind: group.microseconds for group in made.groups} == {"elementwise": 40}


def names_of(made: layers.Report) -> dict[str, float]:
    return {layer.name: layer.microseconds for layer in made.layers}


def test_executed_nodes_find_their_layer() -> None:
    described = [stored("a"), stored("a/b"), stored("fc", operator="Gemm"), stored("d")]
    nodes = [
        node("x", 1, covers=("a/WithoutBiases", "Multiply_1", "a", "a.relu")),
        node("a/b", 2),
        node("fc/WithoutBiases/Multiply", 4, covers=("fc/WithoutBiases/Multiply", "logits")),
        # ONNX Runtime names a convolution by the ReLU that it fused.
        node("d.relu_nchwc", 8, covers=("d.relu_nchwc", "d.relu")),
        node("d/second", 16),
    ]
    made = report(
        described,
        nodes,
        surroundings={"d": around(aliases=["d.relu"])},
    )
    assert names_of(made) == {"a": 1, "a/b": 2, "fc": 4, "d": 24}
    assert not made.groups


def test_what_takes_time_beside_the_layers() -> None:
    made = report(
        [stored("a")],
        [
            node("a", 600, kernel="brgconv_avx512_I8"),
            node("lrn_1", 100, kind="lrn", precision="f32", operator="Lrn", kernel="jit_f32"),
            node("lrn_2", 40, kind="lrn", precision="f32", operator="Lrn", kernel="jit_f32"),
            node("r1", 50, kind="reorder", precision="f32", operator="Reorder"),
            node("p1", 60, kind="pool", operator="Pooling"),
            node("p2", 41, kind="pool", precision="f32", operator="Pooling"),
            node("p3", 60, kind="pool", operator="Pooling"),
            node("q1", 49, kind="quantize", precision="f32", operator="Subgraph"),
        ],
    )
    assert made.sentences[1:] == (
        "Pooling takes 16 % of the time; 3 nodes, the longest: p1 6 % (Pooling, u8), "
        "p3 6 % (Pooling, u8).",
        "LRN runs in f32 and takes 14 % of the time; 2 nodes: lrn_1 10 % (jit_f32, f32), "
        "lrn_2 4 % (jit_f32, f32).",
        "Reordering memory takes 5 % of the time; one node: r1 5 % (Reorder, f32).",
        "What is no INT8 layer takes 40 % of the time: with INT8 layers that took no time at all, "
        "a picture would be 2.5 times as fast.",
    )
    assert [group.kind for group in made.groups] == ["pool", "lrn", "reorder", "quantize"]


@pytest.mark.parametrize(
    ("info", "architecture", "said"),
    [
        (
            cpuinfo.HASWELL,
            "x86_64",
            "INT8 layers take 90 % of the time on a CPU without VNNI: there INT8 is at most about "
            "twice as fast as float.",
        ),
        (cpuinfo.ZEN_2, "x86_64", "INT8 layers take 90 % of the time on a CPU without VNNI"),
        (cpuinfo.XEON_ICE_LAKE, "x86_64", ""),
        (cpuinfo.ALDER_LAKE_N, "x86_64", ""),
        (cpuinfo.CORTEX_A76, "aarch64", ""),
        (
            cpuinfo.CORTEX_A76.replace(" asimddp", ""),
            "aarch64",
            "INT8 layers take 90 % of the time on a CPU without the dot product instructions "
            "(asimddp) that multiply 16 pairs of INT8 at once, where float multiplies 4.",
        ),
    ],
)
def test_a_cpu_without_the_instructions(info: str, architecture: str, said: str) -> None:
    nodes = [node("a", 900), node("c", 100, kind="concat")]
    made = report([stored("a")], nodes, on=machine(info, architecture))
    about_the_cpu = [sentence for sentence in made.sentences if "a CPU without" in sentence]
    assert len(about_the_cpu) == bool(said)
    assert not said or about_the_cpu[0].startswith(said)
    # Where nothing runs in INT8 there is nothing to say about its instructions.
    floats = [node("a", precision="f32")]
    made = report([stored("a")], floats, on=machine(info, architecture))
    assert not [sentence for sentence in made.sentences if "a CPU without" in sentence]


@pytest.mark.parametrize(("microseconds", "said"), [(49, False), (50, True)])
def test_instructions_do_not_matter_where_hardly_any_layer_is_int8(
    microseconds: float, said: bool
) -> None:
    nodes = [node("a", microseconds), node("b", 1000 - microseconds, precision="f32")]
    made = report([stored("a"), stored("b")], nodes, on=machine(cpuinfo.HASWELL))
    sentence = (
        "INT8 layers take 5 % of the time on a CPU without VNNI: there INT8 is at most about "
        "twice as fast as float."
    )
    assert (sentence in made.sentences) == said


@pytest.mark.parametrize(
    ("on", "kernels", "missing"),
    [
        (AMX, ("jit_avx2_I8", "jit_avx2_1x1_I8"), "AMX"),
        (AMX, ("brgconv_avx512_I8",), "AMX"),
        (AMX, ("brgconv_avx512_amx_I8", "brgconv_avx512_I8"), ""),
        (machine(), ("jit_avx2_I8",), "AVX-512 with VNNI"),
        (machine(), ("brgconv_avx512_I8",), ""),
        (machine(), ("gemm_acl_I8",), ""),
        (machine(), ("", ""), ""),
        (machine(cpuinfo.ALDER_LAKE_N), ("jit_avx2_I8",), ""),
    ],
)
def test_instructions_that_are_there_and_not_used(
    on: Machine, kernels: tuple[str, ...], missing: str
) -> None:
    names = [f"l{index}" for index in range(len(kernels))]
    nodes = [node(name, kernel=kernel) for name, kernel in zip(names, kernels, strict=True)]
    made = report([stored(name) for name in names], nodes, on=on)
    found = [sentence for sentence in made.sentences if "ONEDNN_MAX_CPU_ISA" in sentence]
    listed = " and ".join(sorted(kernels))
    assert found == (
        [
            f"INT8 layers take 100 % of the time, and none of them uses {missing}, which this CPU "
            f"has (kernels: {listed}). Is ONEDNN_MAX_CPU_ISA set?"
        ]
        if missing
        else []
    )


@pytest.mark.parametrize(("microseconds", "said"), [(49, False), (51, True)])
def test_reference_kernels(microseconds: float, said: bool) -> None:
    made = report(
        [stored("a"), stored("b")],
        [node("a", 1000 - microseconds, kernel="x"), node("b", microseconds, kernel="ref_any_I8")],
    )
    sentence = "b run by the runtime's plain reference code (ref_any_I8) and take 5 % of the time."
    assert (sentence in made.sentences) == said


@pytest.mark.parametrize(
    ("microseconds", "said"), [(199.0, False), (200.0, True), (49.0, False), (400.0, True)]
)
def test_layers_that_are_slow_for_their_size(microseconds: float, said: bool) -> None:
    """Ten percent of the multiply-accumulates: twice that share of the time counts."""
    made = report(
        [stored("a", 100), stored("b", 900)],
        [node("a", microseconds, precision="s8"), node("b", 1000 - microseconds)],
    )
    slow = [sentence for sentence in made.sentences if sentence.startswith("a (s8) takes ")]
    percent = f"{microseconds / 10:.0f}"
    expected = f"a (s8) takes {percent} % of the time for 10 % of the multiply-accumulates."
    assert slow == ([expected] if said else [])


def test_a_small_share_is_not_slow_whatever_its_size() -> None:
    made = report([stored("a", 1), stored("b", 999)], [node("a", 49), node("b", 951)])
    assert not [sentence for sentence in made.sentences if sentence.startswith("a (u8)")]


@pytest.mark.parametrize(
    ("layer", "lost", "sentence"),
    [
        (700, False, "INT8 layers take 70 % of the time: what is left is arithmetic."),
        (
            690,
            False,
            "What is no INT8 layer takes 31 % of the time: with INT8 layers that took no time at "
            "all, a picture would be 3.2 times as fast.",
        ),
        (710, True, "Everything else takes 29 % of the time; one node: c 29 % (Op, u8)."),
    ],
)
def test_what_is_left(layer: float, lost: bool, sentence: str) -> None:
    described = [stored("a", 98), stored("b", 2)]
    nodes = [
        node("a", layer - 1),
        node("b", 1, precision="f32" if lost else "u8"),
        node("c", 1000 - layer, kind="other"),
    ]
    assert report(described, nodes).sentences[-1] == sentence


@pytest.mark.parametrize(("median", "said"), [(124.0, False), (125.0, True)])
def test_a_busy_machine_is_told_of(median: float, said: bool) -> None:
    made = report([stored("a")], [node("a", 100)], rounds=(90.0, median, 900.0))
    busy = (
        "The machine was busy: a whole run took 1.2 times the sum of the layers' medians. Shares "
        "are rough; measure again when it is idle."
    )
    assert (made.sentences[-1] == busy) == said


def test_modules_where_names_tell() -> None:
    described = [
        stored("conv1", 10),
        stored("inception3a.branch1.conv", 20),
        stored("inception3a.branch2.conv", 30),
        stored("inception_4e/1x1", 40),
    ]
    made = report(described, [node(layer["name"], layer["macs"]) for layer in described])
    assert [(m["name"], m["layers"], m["macs"], m["microseconds"]) for m in made.modules] == [
        ("the rest", 1, 10, 10),
        ("inception3a", 2, 50, 50),
        ("inception_4e", 1, 40, 40),
    ]
    assert sum(module["share"] for module in made.modules) == pytest.approx(1.0)
    assert report(described[:3], [node("conv1")]).modules == []


def test_the_form_for_scripts() -> None:
    made = report(
        [stored("a")], [node("a", 75), node("c", 25, kind="concat", operator="Concat")]
    ).to_dict()
    assert made["layers"] == [
        {
            "inside": "",
            "kernel": "Op",
            "macs": 100,
            "microseconds": 75,
            "name": "a",
            "operator": "Conv",
            "precision": "u8",
            "reason": "",
            "share": 0.75,
            "stored": "int8",
        }
    ]
    (group,) = made["groups"]
    assert (group["kind"], group["share"], group["title"]) == ("concat", 0.25, "Concat")
    assert [one["name"] for one in group["nodes"]] == ["c"]
    assert (made["macs"], made["macs_int8_share"], made["microseconds"]) == (100, 1.0, 100)
    assert (made["backend"], made["version"], made["threads"]) == ("onnxruntime", "1.32.0", 1)
    assert (made["runs"], made["rounds"]) == (100, [100, 100, 100])
    assert list(made) == sorted(made)


def test_a_profile_without_time_divides_by_nothing() -> None:
    made = report([stored("a", 0)], [node("a", 0)])
    assert made.to_dict()["time_shares"] == {"int8_layers": 0.0, "float_layers": 0.0}
    assert made.sentences == ("All 1 layers, and so all multiply-accumulates, run in INT8.",)
