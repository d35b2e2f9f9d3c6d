"""`inspect --layers`: what the runtime executes, beside what the file says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from commands import content, gnet_opt
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from world import World

from conformance import models
from gnet_opt.machine import this_machine

Make = Callable[[str], Path]


def optimized(model: Path, folder: Path) -> Counter[str]:
    """The operators of the graph that ONNX Runtime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def test_an_openvino_bundle(bundle: Make) -> None:
    root = bundle("openvino-cpu")
    before = content(root)
    done = gnet_opt("inspect", root, "--layers", "--threads", "1", "--json")
    assert (done.code, done.err, done.json["notes"]) == (0, "", [])
    assert sorted(done.json) == ["artifacts", "bundle", "executed", "model", "notes"]
    found = done.json["executed"]
    assert (found["backend"], found["threads"]) == ("openvino", 1)
    described = done.json["model"]["layers"]
    layers = found["layers"]
    assert [layer["name"] for layer in layers] == [layer["name"] for layer in described]
    assert [layer["macs"] for layer in layers] == [layer["macs"] for layer in described]
    for layer in layers:
        assert (layer["stored"], layer["reason"]) == ("int8", "")
        assert layer["precision"] in ("s8", "u8"), layer
        assert layer["kernel"].lower().endswith("i8")
    assert found["macs_int8_share"] == 1.0
    assert found["sentences"][0] == ("All 8 layers, and so all multiply-accumulates, run in INT8.")
    shares = found["time_shares"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["int8_layers"] == pytest.approx(sum(layer["share"] for layer in layers))
    assert shares["lrn"] > 0
    assert content(root) == before


def test_an_onnx_runtime_bundle(bundle: Make, tmp_path: Path) -> None:
    root = bundle("raspberry-pi-5")
    before = content(root)
    done = gnet_opt("inspect", root, "--layers", "--threads", "1", "--json")
    assert done.code == 0, done.err
    assert done.json["notes"] == ["This machine is not raspberry-pi-5: these are its own kernels."]
    found = done.json["executed"]
    layers = {layer["name"]: layer for layer in found["layers"]}
    truth = optimized(root / "model.onnx", tmp_path)
    integer = [layer for layer in layers.values() if layer["precision"] in ("s8", "u8")]
    assert len(integer) == truth["QLinearConv"] + truth["QGemm"]
    assert len(layers) == 8
    # The layer in front of the LRN is in INT8, because its result is quantized for its sake; the
    # classifier gives floats.
    assert layers["stem.conv"] in integer
    (floats,) = [s for s in found["sentences"] if "although the file has them in INT8" in s]
    assert floats.startswith("1 of 8 layers runs in f32 ")
    assert layers["fc"]["reason"].startswith("the result is the output, in float, and so is the ")
    assert all(not layer["reason"] for layer in integer)
    macs = sum(layer["macs"] for layer in integer)
    assert found["macs_int8_share"] == pytest.approx(macs / done.json["model"]["macs"])
    assert content(root) == before


def test_for_people(bundle: Make) -> None:
    done = gnet_opt("inspect", bundle("openvino-cpu"), "--layers", "--threads", "1")
    assert done.code == 0
    text = " ".join(done.out.split())
    assert "layer file runs in MMAC µs time, % kernel" in text
    assert "stem.conv int8 " in text
    assert "beside the layers" in text and " LRN 1 f32 " in text
    assert "openvino 20" in text and ", 1 thread: " in text
    assert "medians of 100 runs in 10 rounds. 100.0 % of the multiply-accumulates run in " in text
    assert "- All 8 layers, and so all multiply-accumulates, run in INT8." in done.out.splitlines()


def test_a_bundle_that_the_device_finishes(bundle: Make) -> None:
    root = bundle("jetson")
    done = gnet_opt("inspect", root, "--layers")
    assert (done.code, done.out) == (7, "")
    assert done.err == (
        f"gnet-opt: {root / 'model.engine'}: this version of gnet-opt does not time the layers of "
        "an engine. On the device trtexec does, in the bundle's folder: trtexec "
        "--loadEngine=model.engine --dumpProfile --separateProfileRun.\n"
    )


def test_threads_are_for_layers(bundle: Make) -> None:
    done = gnet_opt("inspect", bundle("jetson"), "--threads", "1")
    assert done.code == 2
    assert done.err == (
        "gnet-opt: --threads says how layers are timed: pass --layers, too, or leave it out.\n"
    )


def test_a_float_file(world: World, tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    assert gnet_opt("export", world.small, "-o", out).code == 0
    done = gnet_opt("inspect", out, "--layers", "--threads", "1", "--json")
    assert (done.code, done.err, done.json["notes"]) == (0, "", [])
    found = done.json["executed"]
    assert found["backend"] == "onnxruntime"
    # Fused with their ReLUs, whose names ONNX Runtime keeps: still every layer is found.
    assert {layer["precision"] for layer in found["layers"]} == {"f32"}
    assert {layer["stored"] for layer in found["layers"]} == {"float"}
    assert len(found["layers"]) == 8
    assert found["sentences"][0].startswith("The file holds no INT8: all 8 layers run in f32. ")
    people = gnet_opt("inspect", out, "--layers", "--threads", "1")
    assert " 0.0 % of the multiply-accumulates run in INT8." in people.out


def test_a_float_bundle(quantize_arguments: list[str], tmp_path: Path) -> None:
    root = tmp_path / "float"
    more = ["--target", "openvino-cpu", "--precision", "fp32", "-o", root]
    done = gnet_opt(*quantize_arguments, *more)
    assert done.code == 0, done.err
    done = gnet_opt("inspect", root, "--layers", "--threads", "1", "--json")
    assert done.code == 0, done.err
    found = done.json["executed"]
    # The last layer among them, which OpenVINO calls by the name of the output.
    assert [layer["name"] for layer in found["layers"]] == [
        layer["name"] for layer in done.json["model"]["layers"]
    ]
    assert {layer["precision"] for layer in found["layers"]} == {"f32"}
    assert found["sentences"][0].startswith("The file holds no INT8: all 8 layers run in f32. ")


class Pictures(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.left = [{"input": image[None]} for image in models.pictures(4)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def by_onnx_runtime(folder: Path, kind: QuantType, form: QuantFormat = QuantFormat.QDQ) -> Path:
    """The hand-made net, quantized by ONNX Runtime's own tool as its documentation has it."""
    source, out = models.save(models.float_net(lrn=False), folder / "float.onnx"), folder / "q.onnx"
    quantize_static(
        source,
        out,
        Pictures(),
        quant_format=form,
        activation_type=kind,
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"ActivationSymmetric": kind == QuantType.QInt8},
    )
    return out


def test_a_file_that_is_int8_in_name_and_half_float_in_fact(tmp_path: Path) -> None:
    if this_machine().architecture != "x86_64":
        pytest.skip("ONNX Runtime computes s8 on Arm")
    path = by_onnx_runtime(tmp_path, QuantType.QInt8)
    done = gnet_opt("inspect", path, "--layers", "--threads", "1", "--json")
    assert done.code == 0, done.err
    assert done.json["model"]["macs_int8_share"] == 1.0
    found = done.json["executed"]
    truth = optimized(path, tmp_path)
    floats = [layer for layer in found["layers"] if layer["precision"] == "f32"]
    assert 0 < len(floats) == truth["Conv"] + truth["FusedConv"] + truth["Gemm"]
    # Exactly those that share their input with the others of their module.
    shared = {f"{module}.{branch}.conv" for module in "ab" for branch in ("b1", "b2a", "b3a")}
    assert {layer["name"] for layer in floats} == shared
    for layer in floats:
        assert layer["reason"].startswith("4 nodes take its s8 input; on x86 ONNX Runtime turns ")
    assert 0 < found["macs_int8_share"] < 1
    assert any(s.startswith(f"{len(floats)} of 15 layers run in f32") for s in found["sentences"])


def test_a_file_in_u8_by_onnx_runtime(tmp_path: Path) -> None:
    path = by_onnx_runtime(tmp_path, QuantType.QUInt8)
    done = gnet_opt("inspect", path, "--layers", "--threads", "1", "--json")
    assert done.code == 0, done.err
    assert done.json["executed"]["macs_int8_share"] == 1.0
    assert optimized(path, tmp_path)["QLinearConv"] == 14


def test_a_file_in_operator_form(tmp_path: Path) -> None:
    path = by_onnx_runtime(tmp_path, QuantType.QUInt8, QuantFormat.QOperator)
    done = gnet_opt("inspect", path, "--layers", "--threads", "1", "--json")
    assert done.code == 0, done.err
    found = done.json["executed"]
    assert done.json["model"]["layers"] == []
    assert {layer["stored"] for layer in found["layers"]} == {""}
    assert {layer["macs"] for layer in found["layers"]} == {None}
    assert {layer["precision"] for layer in found["layers"]} == {"u8"}
    assert found["sentences"][0].startswith("Executed, but no Conv, Gemm or MatMul of the file: ")
    people = gnet_opt("inspect", path, "--layers", "--threads", "1")
    assert "of the multiply-accumulates run in INT8" not in people.out


def test_nodes_without_names(tmp_path: Path) -> None:
    net = models.quantize(models.float_net(lrn=False), models.pictures(2), weight_bits=7)
    for index, node in enumerate(net.graph.node):
        node.name = "" if index % 2 else "same"
    path = models.save(net, tmp_path / "x.onnx")
    before = path.read_bytes()
    done = gnet_opt("inspect", path, "--layers", "--threads", "1", "--json")
    assert done.code == 0, done.err
    layers = done.json["executed"]["layers"]
    assert len(layers) == len({layer["name"] for layer in layers}) == 15
    assert {layer["stored"] for layer in layers} == {"int8"}
    assert sum(layer["precision"] == "u8" for layer in layers) >= 14
    assert all(layer["precision"] for layer in layers)
    assert [layer["name"] for layer in done.json["model"]["layers"]] == [
        layer["name"] for layer in layers
    ]
    assert (path.read_bytes(), sorted(tmp_path.iterdir())) == (before, [path])


def test_a_free_batch_is_one_picture(tmp_path: Path) -> None:
    path = models.save(models.float_net(batch="N"), tmp_path / "x.onnx")
    done = gnet_opt("inspect", path, "--layers", "--threads", "1", "--json")
    assert done.code == 0, done.err
    assert len(done.json["executed"]["layers"]) == 15


@pytest.mark.parametrize(
    "shape", [[2, 3, 17, 17], [1, 5, 17, 17], [1, 3, "height", 17], [1, 3, 289]]
)
def test_a_file_that_takes_no_picture(shape: list[int | str], tmp_path: Path) -> None:
    net = models.float_net()
    given = onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, shape)
    net.graph.input[0].CopyFrom(given)
    path = models.save(net, tmp_path / "x.onnx")
    done = gnet_opt("inspect", path, "--layers")
    assert (done.code, done.out) == (4, "")
    assert done.err == (
        f"gnet-opt: {path} does not take one picture: its layers are timed with a float32 input of "
        "shape (1, 3, height, width) or a uint8 one of shape (1, height, width, 3), or with 1 or 4 "
        "planes in place of the 3, height and width fixed. Export it with such an input.\n"
    )


def test_what_is_no_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"not onnx")
    done = gnet_opt("inspect", path, "--layers")
    assert (done.code, done.out) == (4, "")


def test_a_tampered_bundle_is_not_run(bundle: Make, tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(bundle("openvino-cpu"), root)
    with (root / "model.bin").open("r+b") as stream:
        stream.write(b"\0\1\2\3")
    done = gnet_opt("inspect", root, "--layers")
    assert (done.code, done.out) == (6, "")
    assert "model.bin was changed after the bundle was made" in done.err
