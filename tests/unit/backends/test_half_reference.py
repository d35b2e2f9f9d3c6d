from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as onh
import pytest

from gnet_opt.backends import _half
from gnet_opt.backends.onnxruntime import open_reference

FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
THIRD = np.full((1, 1, 1, 1), 1 / 3, np.float16)


def two_layers(path: Path, *, types: bool = True) -> Path:
    """Two convolutions by a third, in FP16."""
    shape = [1, 1, 1, 5]
    graph = oh.make_graph(
        [
            oh.make_node("Cast", ["x"], ["h"], to=FLOAT16),
            oh.make_node("Conv", ["h", "w"], ["a"]),
            oh.make_node("Conv", ["a", "w"], ["b"]),
            oh.make_node("Cast", ["b"], ["y"], to=FLOAT),
        ],
        "half",
        [oh.make_tensor_value_info("x", FLOAT, shape)],
        [oh.make_tensor_value_info("y", FLOAT, shape)],
        [onh.from_array(THIRD, "w")],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)
    if types:
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    path.write_bytes(model.SerializeToString())
    return path


def test_every_half_tensor_is_rounded(tmp_path: Path) -> None:
    x = np.array([1.1, 2.3, 3.7, 1000.3, 70000], np.float32).reshape(1, 1, 1, 5)
    third = THIRD.astype(np.float32)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).astype(np.float32)
        for _ in range(2):
            expected = (expected * third).astype(np.float16).astype(np.float32)
    with open_reference(two_layers(tmp_path / "half.onnx"), threads=1) as runner:
        found = runner.run(x)
    np.testing.assert_array_equal(found, expected)
    assert np.isinf(found[0, 0, 0, 4])
    # It is no matter of chance: without the roundings in between the result is another.
    assert (found != ((x * third) * third)).all()


def test_its_form_is_float_but_for_the_casts(tmp_path: Path) -> None:
    content = _half.rounded(two_layers(tmp_path / "half.onnx"))
    assert content is not None
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node].count("Conv") == 2
    assert {tensor.data_type for tensor in model.graph.initializer} == {FLOAT}
    assert content == _half.rounded(tmp_path / "half.onnx")


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    assert _half.rounded(two_layers(tmp_path / "bare.onnx", types=False)) is None
    graph = oh.make_graph(
        [oh.make_node("Relu", ["x"], ["y"])],
        "float",
        [oh.make_tensor_value_info("x", FLOAT, [1])],
        [oh.make_tensor_value_info("y", FLOAT, [1])],
    )
    (tmp_path / "float.onnx").write_bytes(oh.make_model(graph).SerializeToString())
    assert _half.rounded(tmp_path / "float.onnx") is None


@pytest.mark.parametrize(("to", "half"), [(FLOAT16, True), (FLOAT, False)])
def test_fp16_is_seen_in_the_bytes_of_a_file(tmp_path: Path, to: int, half: bool) -> None:
    graph = oh.make_graph(
        [oh.make_node("Cast", ["x"], ["y"], to=to)],
        "cast",
        [oh.make_tensor_value_info("x", FLOAT, [1])],
        [oh.make_tensor_value_info("y", to, [1])],
    )
    path = tmp_path / "cast.onnx"
    path.write_bytes(oh.make_model(graph).SerializeToString())
    assert _half.is_half(path) == half
