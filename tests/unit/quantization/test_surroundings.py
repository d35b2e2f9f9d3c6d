from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from conformance import models
from gnet_opt.errors import ModelError
from gnet_opt.quantization.surroundings import surroundings


def look(model: onnx.ModelProto, folder: Path) -> dict[str, Any]:
    return surroundings(models.save(model, folder / "x.onnx"))


def test_a_float_net(tmp_path: Path) -> None:
    found = look(models.float_net(), tmp_path)
    assert len(found) == 15
    assert found["stem.conv"] == {
        "activation": "Relu",
        "aliases": ["stem.conv", "stem.relu", "stem.relu"],
        "bias": "float",
        "input": "",
        "input_takers": 0,
        "result": "float",
        "result_type": "",
        "takers": ["LRN"],
        "zero_point": None,
    }
    assert found["a.b1.conv"]["takers"] == ["Concat"]
    assert found["logits"]["result"] == "output"
    assert found["logits"]["activation"] == ""


@pytest.mark.parametrize("form", ["u8", "s8"])
def test_a_quantized_net(form: Any, tmp_path: Path) -> None:
    net = models.quantize(models.float_net(), models.pictures(2), form)
    for index, node in enumerate(net.graph.node):
        node.name = node.name or f"n{index}"
    names = {output: node.name for node in net.graph.node for output in node.output}
    layers = look(net, tmp_path)
    assert layers["a.b1.conv"] == {
        "activation": "Relu",
        # The layer's tensor, and the activation and the pair behind it with theirs.
        "aliases": [
            "a.b1.conv",
            "a.b1.relu",
            "a.b1.relu",
            names["a.b1.relu_q"],
            "a.b1.relu_q",
            names["a.b1.relu_dq"],
            "a.b1.relu_dq",
        ],
        "bias": "float",
        "input": form,
        # Three convolutions and the pool of a module take one tensor.
        "input_takers": 4,
        "result": "quantized",
        "result_type": form,
        "takers": [],
        "zero_point": 0,
    }
    assert layers["a.b2b.conv"]["input_takers"] == 1
    assert (layers["stem.conv"]["result"], layers["stem.conv"]["takers"]) == ("float", ["LRN"])
    # The zero point of the input's pair is not of interest, but its type is.
    assert (layers["stem.conv"]["input"], layers["stem.conv"]["input_takers"]) == (form, 1)


def small(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y",), **values: Any) -> Any:
    """One Conv `c` from `x` to `t`, and what follows."""
    weight = np.ones((1, 3, 1, 1), np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["t"], name="c"), *nodes],
        "small",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 4, 4])],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [
            numpy_helper.from_array(weight, "w"),
            numpy_helper.from_array(np.float32(0.5), "s"),
            *(numpy_helper.from_array(value, name) for name, value in values.items()),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def quantizer(source: str, target: str, *zero: str) -> onnx.NodeProto:
    return helper.make_node("QuantizeLinear", [source, "s", *zero], [target], name=target)


def test_no_bias_and_a_quantizer_without_a_zero_point(tmp_path: Path) -> None:
    facts = look(small(quantizer("t", "y")), tmp_path)["c"]
    # y is an output of the model; the quantizer is what takes the result.
    assert (facts["result"], facts["result_type"], facts["zero_point"]) == ("quantized", "u8", 0)
    assert (facts["bias"], facts["aliases"]) == ("", ["t", "y", "y"])


def test_a_zero_point_of_s8(tmp_path: Path) -> None:
    model = small(quantizer("t", "y", "z"), z=np.array(-128, np.int8))
    facts = look(model, tmp_path)["c"]
    assert (facts["result_type"], facts["zero_point"]) == ("s8", -128)


def test_several_quantizers_are_branches(tmp_path: Path) -> None:
    model = small(quantizer("t", "y"), quantizer("t", "z"), outputs=("y", "z"))
    facts = look(model, tmp_path)["c"]
    assert (facts["result"], facts["aliases"]) == ("branches", ["t"])


def test_one_taker_in_float_is_enough(tmp_path: Path) -> None:
    softmax = helper.make_node("Softmax", ["t"], ["z"], name="soft")
    facts = look(small(quantizer("t", "y"), softmax, outputs=("y", "z")), tmp_path)["c"]
    assert (facts["result"], facts["takers"]) == ("float", ["Softmax"])


def test_a_node_that_takes_a_value_twice_is_one_taker(tmp_path: Path) -> None:
    relu = helper.make_node("Relu", ["t"], ["r"], name="r")
    add = helper.make_node("Add", ["r", "r"], ["y"], name="add")
    facts = look(small(relu, add), tmp_path)["c"]
    assert (facts["activation"], facts["takers"]) == ("Relu", ["Add"])
    assert facts["aliases"] == ["t", "r", "r"]


def test_an_output_that_is_also_taken_is_an_output(tmp_path: Path) -> None:
    relu = helper.make_node("Relu", ["t"], ["y"], name="r")
    facts = look(small(relu, outputs=("t", "y")), tmp_path)["c"]
    assert (facts["result"], facts["activation"], facts["aliases"]) == ("output", "", ["t"])


def test_a_computed_scale_is_no_known_form(tmp_path: Path) -> None:
    scale = helper.make_node("ReduceMax", ["t"], ["m"], name="m", keepdims=0)
    quantize = helper.make_node("QuantizeLinear", ["t2", "m"], ["y"], name="q")
    relu = helper.make_node("Conv", ["x", "w"], ["t2"], name="d")
    facts = look(small(scale, relu, quantize), tmp_path)["d"]
    assert (facts["result"], facts["result_type"], facts["zero_point"]) == ("quantized", "", None)


def test_a_quantized_bias(tmp_path: Path) -> None:
    model = small(quantizer("t", "y"), b=np.array([3], np.int32))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["b", "s"], ["bias"], name="b"))
    model.graph.node[1].input.append("bias")
    assert look(model, tmp_path)["c"]["bias"] == "quantized"


def test_what_is_no_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"not onnx")
    with pytest.raises(ModelError, match=r"x\.onnx"):
        surroundings(path)
