"""What is promised of the ONNX Runtime backends beyond the conformance suite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance import models
from gnet_opt.backends.onnxruntime import OnnxRuntimeBackend, ReferenceBackend, open_reference
from gnet_opt.machine import this_machine
from gnet_opt.runtime import Artifact

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
