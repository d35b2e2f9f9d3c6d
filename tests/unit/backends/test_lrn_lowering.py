"""LRN means the same in every backend and in every form that ONNX Runtime is given."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from hypothesis import example, given
from hypothesis import strategies as st

import networks
from conformance import models
from gnet_opt import backends
from gnet_opt.backends import _lrn
from gnet_opt.backends.onnxruntime import OnnxRuntimeBackend, ReferenceBackend, open_reference
from gnet_opt.errors import BackendError, MissingDependencyError
from gnet_opt.preprocess import Preprocess
from gnet_opt.runtime import Artifact
from gnet_opt.stages import prepare
from gnet_opt.stages.load import from_module
from gnet_opt.target import find

onnxruntime = pytest.importorskip("onnxruntime")
TARGET = find("raspberry-pi-5")
CLOSE = 1e-5
"""Relative to each single value: all summands are positive, so nothing cancels."""


def torch_lrn(x: np.ndarray, size: int, alpha: float, beta: float, bias: float) -> np.ndarray:
    """torch's LRN in float64, with ONNX's reading of an even window.

    It reaches one channel further up than down, torch's the other way round.
    """
    values = torch.from_numpy(x.astype(np.float64))
    if size % 2 == 0:
        return F.local_response_norm(values.flip(1), size, alpha, beta, bias).flip(1).numpy()
    return F.local_response_norm(values, size, alpha, beta, bias).numpy()


def lrn_net(
    shape: tuple[int | str, ...], *, quantized: bool = False, opset: int = 18, **attributes: Any
) -> onnx.ModelProto:
    """A graph of one LRN, whose result is an output; with `quantized` a Q/DQ pair takes it too."""
    nodes = [oh.make_node("LRN", ["input"], ["y"], name="lrn", **attributes)]
    outputs = [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, list(shape))]
    weights = []
    if quantized:
        nodes += models._pair("y", "scale", "zero")
        outputs.append(oh.make_tensor_value_info("y_dq", onnx.TensorProto.FLOAT, list(shape)))
        weights = [
            onh.from_array(np.array(0.5, np.float32), "scale"),
            onh.from_array(np.array(0, np.uint8), "zero"),
        ]
    graph = oh.make_graph(
        nodes,
        "lrn",
        [oh.make_tensor_value_info("input", onnx.TensorProto.FLOAT, list(shape))],
        outputs,
        weights,
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", opset)], ir_version=9)


def lowered(net: onnx.ModelProto) -> onnx.ModelProto:
    graph = ir.from_proto(net)
    assert _lrn.lower(graph) > 0
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(net: onnx.ModelProto, x: np.ndarray, *, optimize: bool = True) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        net.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"input": x})


def operators(net: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in net.graph.node)


def optimized(model: Path, folder: Path) -> onnx.ModelProto:
    """The graph that ONNX Runtime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")


def activations(shape: tuple[int, ...], largest: float = 3000.0, seed: int = 0) -> np.ndarray:
    """Values as behind a ReLU: half are 0, and the great ones are rare.

    Behind the first pool of the 2014 network they go up to about 2,600.
    """
    rng = np.random.default_rng(seed)
    values = np.maximum(rng.normal(size=shape), 0) ** 3
    return (values * (largest / values.max())).astype(np.float32)


class TestArithmetic:
    @given(
        size=st.integers(1, 9),
        alpha=st.floats(1e-6, 2.0),
        beta=st.one_of(st.sampled_from([0.5, 0.75, 1.0]), st.floats(0.05, 3.0)),
        bias=st.floats(0.1, 4.0),
        shape=st.tuples(
            st.integers(1, 2), st.integers(1, 20), st.integers(1, 6), st.integers(1, 6)
        ),
        quantized=st.booleans(),
        optimize=st.booleans(),
        seed=st.integers(0, 99),
    )
    @example(5, 1e-4, 0.75, 1.0, (1, 64, 56, 56), False, True, 0)
    @example(5, 1e-4, 0.75, 1.0, (1, 64, 56, 56), True, True, 0)
    @example(5, 1e-4, 0.75, 1.0, (1, 192, 14, 14), True, True, 1)
    @example(9, 1e-4, 0.75, 2.0, (2, 3, 1, 5), True, False, 0)
    def test_is_that_of_torch(
        self,
        size: int,
        alpha: float,
        beta: float,
        bias: float,
        shape: tuple[int, int, int, int],
        quantized: bool,
        optimize: bool,
        seed: int,
    ) -> None:
        x = activations(shape, seed=seed) if seed else np.zeros(shape, np.float32)
        net = lrn_net(shape, quantized=quantized, size=size, alpha=alpha, beta=beta, bias=bias)
        y = run(lowered(net), x, optimize=optimize)[0]
        stored = [float(np.float32(value)) for value in (alpha, beta, bias)]  # as ONNX keeps them
        np.testing.assert_allclose(y, torch_lrn(x, size, *stored), rtol=CLOSE)

    @pytest.mark.parametrize("quantized", [False, True])
    def test_negative_values_keep_their_sign(self, quantized: bool) -> None:
        x = np.random.default_rng(0).normal(scale=50, size=(1, 8, 3, 3)).astype(np.float32)
        net = lrn_net((1, 8, 3, 3), quantized=quantized, size=3, alpha=0.5)
        y = run(lowered(net), x)[0]
        np.testing.assert_allclose(y, torch_lrn(x, 3, 0.5, 0.75, 1.0), rtol=CLOSE)

    def test_what_is_not_said_is_as_onnx_has_it(self) -> None:
        x = activations((1, 7, 2, 2))
        y = run(lowered(lrn_net((1, 7, 2, 2), size=3)), x)[0]
        np.testing.assert_allclose(y, torch_lrn(x, 3, 1e-4, 0.75, 1.0), rtol=CLOSE)

    @pytest.mark.parametrize(("size", "window"), [(1, (0, 0)), (4, (1, 2)), (5, (2, 2))])
    def test_the_window_is_that_of_the_definition(self, size: int, window: tuple[int, int]) -> None:
        """One channel is 1 and the others are tiny, so that a result tells who saw it."""
        x = np.full((1, 9, 1, 1), 1e-3, np.float32)
        x[0, 4] = 1.0
        y = run(lowered(lrn_net(x.shape, size=size, alpha=1e6, beta=1.0)), x)[0]
        saw = np.flatnonzero((y / x).ravel() < 1e-4)
        down, up = window
        assert saw.tolist() == list(range(4 - up, 4 + down + 1))

    @pytest.mark.parametrize("quantized", [False, True])
    def test_any_batch(self, quantized: bool) -> None:
        net = lowered(lrn_net(("N", 6, 4, 4), quantized=quantized, size=5, alpha=0.01))
        x = activations((3, 6, 4, 4))
        together = run(net, x)[0]
        np.testing.assert_allclose(together, torch_lrn(x, 5, 0.01, 0.75, 1.0), rtol=CLOSE)
        np.testing.assert_array_equal(together[1:2], run(net, x[1:2])[0])


class TestGraph:
    @pytest.mark.parametrize(
        ("beta", "power"),
        [
            (0.5, {"Sqrt": 1}),
            (0.75, {"Sqrt": 2, "Mul": 2}),
            (1.0, {}),
            (0.8, {"Pow": 1}),
        ],
    )
    def test_roots_stand_for_powers_where_they_can(
        self, beta: float, power: dict[str, int]
    ) -> None:
        found = operators(lowered(lrn_net((1, 8, 3, 3), size=5, beta=beta)))
        moving = {"Reshape": 2, "Shape": 1, "Unsqueeze": 1}
        assert found == {"Mul": 1, "Conv": 1, "Div": 1} | moving | power

    def test_the_layout_follows_what_takes_the_result(self) -> None:
        assert operators(lowered(lrn_net((1, 8, 3, 3), size=5)))["Transpose"] == 0
        assert operators(lowered(lrn_net((1, 8, 3, 3), size=5, quantized=True)))["Transpose"] == 2
        both = lrn_net((1, 8, 3, 3), size=5, quantized=True)
        both.graph.node.append(oh.make_node("Relu", ["y"], ["z"]))
        assert operators(lowered(both))["Transpose"] == 0

    def test_names_of_inputs_and_outputs_stay(self) -> None:
        before = lrn_net((1, 8, 3, 3), size=5, quantized=True)
        after = lowered(before)
        assert list(after.graph.input) == list(before.graph.input)
        assert list(after.graph.output) == list(before.graph.output)
        assert "LRN" not in operators(after)

    def test_nodes_tell_where_they_come_from(self) -> None:
        for quantized in (False, True):
            for beta in (0.5, 0.75, 0.8, 1.0):
                net = lrn_net((1, 8, 3, 3), size=5, beta=beta, quantized=quantized)
                for node in lowered(net).graph.node:
                    own = "QuantizeLinear" not in node.op_type and "Deq" not in node.op_type
                    assert _lrn.source(node.name) == ("lrn" if own else "")
        assert _lrn.source("norm/1/lrn_sum") == "norm/1"
        assert _lrn.source("a/lrn_rows_new_reshape") == "a"
        assert _lrn.source("a/lrn_quotient_q") == ""
        assert _lrn.source("lrn_1") == ""

    def test_two_of_them_and_a_node_without_a_name(self) -> None:
        net = lrn_net((1, 8, 3, 3), size=5, alpha=0.1)
        net.graph.node[0].output[0] = "first"
        net.graph.node[0].name = ""
        net.graph.node.append(oh.make_node("LRN", ["first"], ["y"], size=3, alpha=0.2))
        x = activations((1, 8, 3, 3))
        expected = torch_lrn(torch_lrn(x, 5, 0.1, 0.75, 1.0), 3, 0.2, 0.75, 1.0)
        np.testing.assert_allclose(run(lowered(net), x)[0], expected, rtol=CLOSE)

    def test_an_lrn_of_another_domain_is_another_operator(self) -> None:
        net = lrn_net((1, 8, 3, 3), size=5)
        net.graph.node[0].domain = "example"
        graph = ir.from_proto(net)
        assert _lrn.lower(graph) == 0
        assert [node.op_type for node in graph.graph] == ["LRN"]


# Size, alpha, beta, bias, and the largest input.
SETTINGS = [
    (5, 1e-4, 0.75, 1.0, 3000.0),
    (3, 0.5, 0.5, 2.0, 100.0),
    (7, 0.02, 1.0, 1.0, 100.0),
    (5, 1e-2, 1.3, 2.0, 100.0),
    (5, 1e-2, 0.75, 1.5, 100.0),
    (3, 0.02, 0.75, 0.5, 100.0),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "reference"])
def test_every_backend_means_what_torch_means(
    name: str, setting: tuple[int, float, float, float, float], tmp_path: Path
) -> None:
    backend = backends.get(name)
    if not backend.probe().available:
        pytest.skip(backend.probe().detail)
    size, alpha, beta, bias, largest = setting
    net = lrn_net((1, 16, 9, 9), size=size, alpha=alpha, beta=beta, bias=bias)
    model = models.save(net, tmp_path / "in.onnx")
    artifact = backend.compile(model, TARGET, tmp_path)
    assert isinstance(artifact, Artifact)
    x = activations((1, 16, 9, 9), largest)
    expected = torch_lrn(x, size, alpha, beta, bias)
    with backend.open(artifact, threads=1) as runner:
        actual = runner.run(x)
    if name == "reference":
        # ONNX Runtime's LRN node adds one square and subtracts another from channel to channel, so
        # that a great value leaves its rounding error in later sums.
        np.testing.assert_allclose(actual, expected, rtol=0, atol=CLOSE * expected.max())
    else:
        np.testing.assert_allclose(actual, expected, rtol=CLOSE)


class TestNetwork:
    @pytest.fixture(scope="class")
    def exported(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """All nine modules and two LRNs, from a torch module."""
        path = tmp_path_factory.mktemp("exported") / "float.onnx"
        small = Preprocess(resize=64, crop=64)
        model = from_module(networks.small_reimplemented_googlenet(), preprocess=small)
        prepare(model, networks.pictures(1), path)
        return path

    @pytest.mark.slow
    def test_has_the_same_logits(self, exported: Path, tmp_path: Path) -> None:
        artifact = OnnxRuntimeBackend().compile(exported, TARGET, tmp_path)
        assert operators(onnx.load(exported))["LRN"] == 2
        assert operators(onnx.load(artifact.path))["LRN"] == 0
        with (
            open_reference(exported, threads=1) as before,
            OnnxRuntimeBackend().open(artifact, threads=1) as after,
        ):
            for image in networks.pictures(4, seed=3)[:, None]:
                expected = before.run(image)
                largest = float(np.abs(expected).max())
                np.testing.assert_allclose(after.run(image), expected, atol=CLOSE * largest)

    def test_is_fused_as_before_when_quantized(self, tmp_path: Path) -> None:
        """Its LRN stands between float layers and Q/DQ, with a pool behind it."""
        net = models.quantize(models.float_net(), models.pictures(8), "u8", weight_bits=7)
        portable = models.save(net, tmp_path / "portable.onnx")
        artifact = OnnxRuntimeBackend().compile(portable, TARGET, tmp_path)
        before, after = optimized(portable, tmp_path), optimized(artifact.path, tmp_path)
        for operator in ("QLinearConv", "QLinearConcat", "QuantizeLinear", "DequantizeLinear"):
            assert operators(after)[operator] == operators(before)[operator] > 0

        def floats(graph: onnx.ModelProto) -> set[str]:
            return {node.name for node in graph.graph.node if node.op_type in ("Conv", "FusedConv")}

        assert floats(after) - floats(before) == {"lrn/lrn_sum"}
        assert floats(before) <= floats(after)

    def test_is_the_same_in_reference_semantics_when_quantized(self, tmp_path: Path) -> None:
        net = models.quantize(models.float_net(), models.pictures(8), "u8")
        portable = models.save(net, tmp_path / "portable.onnx")
        artifact = OnnxRuntimeBackend().compile(portable, TARGET, tmp_path)
        with open_reference(portable, 1) as before, open_reference(artifact.path, 1) as after:
            for image in models.pictures(4, seed=1)[:, None]:
                expected = before.run(image)
                largest = float(np.abs(expected).max())
                np.testing.assert_allclose(after.run(image), expected, atol=CLOSE * largest)

    def test_pools_behind_it_run_with_the_channels_last(self, tmp_path: Path) -> None:
        """As behind the second LRN of the 2014 network."""
        net = models.float_net()
        (lrn,) = [node for node in net.graph.node if node.op_type == "LRN"]
        pool = oh.make_node(
            "MaxPool", ["lrn"], ["pool0"], name="pool0", kernel_shape=[3, 3], pads=[1] * 4
        )
        net.graph.node.insert(list(net.graph.node).index(lrn) + 1, pool)
        (reduce,) = [node for node in net.graph.node if node.name == "reduce.conv"]
        reduce.input[0] = "pool0"
        net = models.quantize(net, models.pictures(4), "u8", weight_bits=7)
        portable = models.save(net, tmp_path / "portable.onnx")
        artifact = OnnxRuntimeBackend().compile(portable, TARGET, tmp_path)
        before = operators(optimized(portable, tmp_path))
        after = operators(optimized(artifact.path, tmp_path))
        assert (before["MaxPool"], before["NhwcMaxPool"]) == (1, 4)
        assert (after["MaxPool"], after["NhwcMaxPool"]) == (0, 5)

    def test_is_an_lrn_in_the_profile(self, tmp_path: Path) -> None:
        net = models.quantize(models.float_net(), models.pictures(4), weight_bits=7)
        backend = OnnxRuntimeBackend()
        artifact = backend.compile(models.save(net, tmp_path / "in.onnx"), TARGET, tmp_path)
        profile = backend.profile(artifact, models.pictures(1), threads=1, runs=1)
        parts = [node for node in profile.nodes if node.kind == "lrn"]
        assert {node.covers for node in parts} == {("lrn",)}
        assert {"Conv", "Div", "Mul", "Sqrt"} <= {node.operator for node in parts}
        assert not [n for n in profile.nodes if n.kind == "layer" and "lrn" in n.name]


class TestFiles:
    @pytest.fixture
    def with_lrn(self, tmp_path: Path) -> Path:
        return models.save(models.float_net(), tmp_path / "with.onnx")

    @pytest.fixture
    def without(self, tmp_path: Path) -> Path:
        return models.save(models.float_net(lrn=False), tmp_path / "without.onnx")

    @pytest.fixture
    def out(self, tmp_path: Path) -> Path:
        folder = tmp_path / "out"
        folder.mkdir()
        return folder

    def test_a_model_with_lrn_gets_a_second_file(self, with_lrn: Path, out: Path) -> None:
        portable = out / "model.onnx"
        portable.write_bytes(with_lrn.read_bytes())
        artifact = OnnxRuntimeBackend().compile(portable, TARGET, out)
        path = out / "model.onnxruntime.onnx"
        assert artifact == Artifact(
            backend="onnxruntime", path=path, files=(("onnx-lowered", path),)
        )
        assert sorted(out.iterdir()) == [portable, path]
        assert portable.read_bytes() == with_lrn.read_bytes()
        assert OnnxRuntimeBackend().artifact(out) == artifact

    def test_a_model_without_lrn_stays_as_it_is(self, without: Path, out: Path) -> None:
        artifact = OnnxRuntimeBackend().compile(without, TARGET, out)
        path = out / "model.onnx"
        assert artifact == Artifact(backend="onnxruntime", path=path, files=(("onnx", path),))
        assert list(out.iterdir()) == [path]
        assert path.read_bytes() == without.read_bytes()

    def test_a_later_model_is_not_taken_for_an_earlier(
        self, with_lrn: Path, without: Path, out: Path
    ) -> None:
        backend = OnnxRuntimeBackend()
        backend.compile(with_lrn, TARGET, out)
        assert backend.compile(without, TARGET, out).path == out / "model.onnx"
        assert list(out.iterdir()) == [out / "model.onnx"]

    def test_the_letters_in_a_weight_are_no_lrn(self, out: Path, tmp_path: Path) -> None:
        net = models.float_net(lrn=False)
        tensor = net.graph.initializer[0]
        tensor.raw_data = b'"\x03LRN\x00\x00\x00' + tensor.raw_data[8:]
        model = models.save(net, tmp_path / "letters.onnx")
        assert OnnxRuntimeBackend().compile(model, TARGET, out).path == out / "model.onnx"

    def test_the_reference_runs_the_portable_model(self, with_lrn: Path, out: Path) -> None:
        portable = out / "model.onnx"
        assert ReferenceBackend().compile(with_lrn, TARGET, out).path == portable
        assert list(out.iterdir()) == [portable]
        OnnxRuntimeBackend().compile(portable, TARGET, out)
        assert ReferenceBackend().artifact(out).path == portable

    def test_nothing_is_left_when_the_lowered_file_is_refused(
        self, with_lrn: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_lrn, "lowered", lambda model: b"no model")
        with pytest.raises(BackendError, match=r"Loading .* with ONNX Runtime failed"):
            OnnxRuntimeBackend().compile(with_lrn, TARGET, out)
        assert list(out.iterdir()) == []

    def test_an_old_opset_is_named(self, out: Path, tmp_path: Path) -> None:
        net = lrn_net((1, 8, 3, 3), size=5, opset=11)
        model = models.save(net, tmp_path / "old.onnx")
        with pytest.raises(BackendError) as caught:
            OnnxRuntimeBackend().compile(model, TARGET, out)
        assert str(caught.value) == (
            f"{model} has opset 11, and its LRN nodes can be lowered from 13 on. "
            "Export it again with `gnet-opt export`."
        )
        assert list(out.iterdir()) == []

    def test_only_compiling_needs_a_package_beside_the_runtime(
        self, with_lrn: Path, without: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = OnnxRuntimeBackend()
        backend.compile(with_lrn, TARGET, out)
        monkeypatch.setitem(sys.modules, "onnx_ir", None)
        with pytest.raises(MissingDependencyError) as caught:
            backend.compile(with_lrn, TARGET, out)
        assert str(caught.value) == (
            "onnx_ir is needed to compile with.onnx, whose LRN nodes have to be lowered, and it "
            'is not installed. Install it with: pip install "gnet-opt[build]"'
        )
        with backend.open(backend.artifact(out), threads=1) as runner:
            assert runner.run(models.pictures(1)).shape == (1, models.CLASSES)
        assert backend.compile(without, TARGET, out).path == out / "model.onnx"

    def test_opening_imports_no_onnx_package(self, with_lrn: Path, out: Path) -> None:
        OnnxRuntimeBackend().compile(with_lrn, TARGET, out)
        code = (
            "import sys; from pathlib import Path\n"
            "from gnet_opt.backends.onnxruntime import OnnxRuntimeBackend\n"
            "backend = OnnxRuntimeBackend()\n"
            "with backend.open(backend.artifact(Path(sys.argv[1])), threads=1): pass\n"
            "assert not {'onnx', 'onnx_ir', 'torch'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code, str(out)], check=True)
