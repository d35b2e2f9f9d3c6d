"""What is promised of the ONNX Runtime backends beyond the conformance suite."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance import models
from gnet_opt.backends import onnxruntime as onnxruntime_backend
from gnet_opt.backends.onnxruntime import OnnxRuntimeBackend, ReferenceBackend, open_reference
from gnet_opt.machine import this_machine
from gnet_opt.runtime import INTEGERS, Artifact

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options of every session that is made."""
    seen: list[Any] = []
    make = onnxruntime.InferenceSession

    def recorded(path: str, given: Any, **kwargs: Any) -> Any:
        seen.append(given)
        return make(path, given, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recorded)
    return seen


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    net = models.quantize(models.float_net(), models.pictures(4), weight_bits=7)
    models.save(net, tmp_path / "model.onnx")
    return OnnxRuntimeBackend().artifact(tmp_path)


@pytest.mark.parametrize(("surplus", "spin"), [(0, "1"), (1, "0")])
def test_native_threads_spin_only_where_each_has_a_core(
    surplus: int, spin: str, artifact: Artifact, options: list[Any]
) -> None:
    threads = this_machine().cores + surplus
    with OnnxRuntimeBackend().open(artifact, threads=threads):
        pass
    assert options[0].intra_op_num_threads == threads
    assert options[0].get_session_config_entry("session.intra_op.allow_spinning") == spin
    levels = onnxruntime.GraphOptimizationLevel
    assert options[0].graph_optimization_level == levels.ORT_ENABLE_ALL


def test_the_reference_optimizes_nothing(artifact: Artifact, options: list[Any]) -> None:
    with ReferenceBackend().open(artifact, threads=1), open_reference(artifact.path):
        pass
    levels = onnxruntime.GraphOptimizationLevel
    assert [o.graph_optimization_level for o in options] == [levels.ORT_DISABLE_ALL] * 2


def test_the_reference_is_float_arithmetic_on_rounded_values(tmp_path: Path) -> None:
    """One convolution by hand: quantize, dequantize, multiply in float, add the float bias."""
    import onnx
    import onnx.helper as oh
    import onnx.numpy_helper as onh

    weight = np.array([[[[100]], [[-127]], [[3]]]], np.int8)
    values = {
        "scale": np.array(0.5, np.float32),
        "zero": np.array(10, np.uint8),
        "weight": weight,
        "weight_scale": np.array([0.25], np.float32),
        "weight_zero": np.array([0], np.int8),
        "bias": np.array([0.3], np.float32),
    }
    graph = oh.make_graph(
        [
            oh.make_node("QuantizeLinear", ["input", "scale", "zero"], ["q"]),
            oh.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
            oh.make_node(
                "DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["w"], axis=0
            ),
            oh.make_node("Conv", ["x", "w", "bias"], ["y"]),
            oh.make_node("Flatten", ["y"], ["logits"]),
        ],
        "one",
        [oh.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, 3, 1, 2])],
        [oh.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, 2])],
        [onh.from_array(array, name) for name, array in values.items()],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9)
    path = models.save(model, tmp_path / "one.onnx")
    batch = np.array([[[[0.26, 999.0]], [[-0.25, -999.0]], [[0.75, 0.0]]]], np.float32)
    # Half to even: 0.52 -> 1, -0.5 -> 0, 1.5 -> 2; and clipped to 0..255 with zero point 10.
    x = np.array([[0.5, 122.5], [0.0, -5.0], [1.0, 0.0]])
    expected = (x * (weight[0, :, 0] * 0.25)).sum(0) + 0.3
    with open_reference(path, threads=1) as runner:
        np.testing.assert_allclose(runner.run(batch)[0], expected, rtol=1e-6)


def optimized(model: Path, folder: Path) -> Counter[str]:
    """The operators of the graph that ONNX Runtime makes of a model."""
    import onnx

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize("form", ["u8", "s8", "float"])
def test_the_profile_is_the_optimized_graph(form: Any, tmp_path: Path) -> None:
    net = models.float_net()
    if form != "float":
        net = models.quantize(net, models.pictures(4), form, weight_bits=7)
    models.save(net, tmp_path / "model.onnx")
    artifact = OnnxRuntimeBackend().artifact(tmp_path)
    profile = OnnxRuntimeBackend().profile(artifact, models.pictures(1), threads=1, runs=30)
    assert Counter(node.operator for node in profile.nodes) == optimized(artifact.path, tmp_path)
    layers = [node for node in profile.nodes if node.kind == "layer"]
    assert len(layers) == 15
    for node in layers:
        integer = node.operator in ("QLinearConv", "QGemm")
        assert (node.precision in INTEGERS) == integer
        assert integer or node.precision == "f32"
    # All but the one in front of the LRN and the classifier, whose result is float.
    assert (sum(node.precision == "u8" for node in layers) == 13) == (form == "u8")
    (lrn,) = [node for node in profile.nodes if node.kind == "lrn"]
    assert lrn.covers[-1] == "lrn"
    assert not [
        node
        for node in profile.nodes
        if node.operator in ("ReorderInput", "Transpose") and node.kind != "reorder"
    ]
    assert (profile.backend, profile.threads, profile.runs) == ("onnxruntime", 1, 30)
    assert profile.version == onnxruntime.__version__
    assert len(profile.rounds) == 3
    assert all(node.microseconds >= 0 for node in profile.nodes)
    assert sum(node.microseconds for node in profile.nodes) > 0


def test_the_profile_runs_what_open_runs(artifact: Artifact, options: list[Any]) -> None:
    backend = OnnxRuntimeBackend()
    with backend.open(artifact, threads=1):
        pass
    backend.profile(artifact, models.pictures(1), threads=1, runs=1)
    usual, counted = options
    for key in ("session.force_spinning_stop", "session.intra_op.allow_spinning"):
        assert usual.get_session_config_entry(key) == counted.get_session_config_entry(key)
    for name in ("graph_optimization_level", "execution_mode", "intra_op_num_threads"):
        assert getattr(usual, name) == getattr(counted, name)
    assert (usual.enable_profiling, counted.enable_profiling) == (False, True)


def event(name: str, microseconds: int, operator: str, shapes: list[Any], index: str = "0") -> Any:
    return {
        "cat": "Node",
        "dur": microseconds,
        "name": f"{name}_kernel_time",
        "args": {"input_type_shape": shapes, "node_index": index, "op_name": operator},
    }


def test_a_trace_is_read_run_by_run() -> None:
    image, scalar = {"uint8": [1, 3, 4, 4]}, {"float": []}
    events: list[Any] = [{"cat": "Session", "name": "session_initialization", "dur": 9}]
    for time in (50, 10, 20):
        events += [
            # Without the fences of old versions, and with two nodes of one name.
            {"cat": "Node", "dur": 1, "name": "c_fence_before", "args": {"op_name": "Conv"}},
            event("c_token_7_nchwc", time, "QLinearConv", [image, scalar], "1"),
            event("cat", 3, "QLinearConcat", [scalar, {"uint8": []}, image], "2"),
            event("cat", 4, "Concat", [{"float16": [1, 2]}], "3"),
            event("lonely", 1, "ConstantOfShape", []),
            {"cat": "Session", "name": "model_run", "dur": time + 9},
        ]
    runs = onnxruntime_backend._runs_of(events)
    assert [sum(times.values()) for times, _ in runs] == [58, 18, 28]
    nodes = onnxruntime_backend._executed(runs)
    assert [(n.name, n.kind, n.precision, n.microseconds, n.covers) for n in nodes] == [
        ("c_token_7_nchwc", "layer", "u8", 20, ("c_token_7_nchwc", "c")),
        ("cat", "concat", "u8", 3, ("cat",)),
        ("cat", "concat", "f16", 4, ("cat",)),
        ("lonely", "other", "", 1, ("lonely",)),
    ]


def test_a_product_that_quantizes_by_itself_is_integer() -> None:
    said = {"input_type_shape": [{"float": [1, 8]}], "op_name": "DynamicQuantizeMatMul"}
    assert onnxruntime_backend._precision("DynamicQuantizeMatMul", said) == "u8"
