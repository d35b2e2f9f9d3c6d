"""`gnet-opt inspect --lint`: what TensorRT refuses in a file, whoever made it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import content, gnet_opt
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from world import World

from conformance import models
from gnet_opt.quantization.lint import RULES

Make = Callable[[str], Path]


def test_a_bundle_for_tensorrt(bundle: Make) -> None:
    root = bundle("jetson")
    before = content(root)
    done = gnet_opt("inspect", root, "--lint", "tensorrt", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json == {
        "errors": 0,
        "file": str(root / "model.onnx"),
        "findings": [],
        "quantized": True,
        "rules": "tensorrt",
        "slow": 0,
    }
    people = gnet_opt("inspect", root, "--lint", "tensorrt")
    assert people.out == f"No rule of tensorrt is broken in {root / 'model.onnx'}.\n"
    assert content(root) == before


def test_a_bundle_for_another_runtime(bundle: Make) -> None:
    root = bundle("raspberry-pi-5")
    done = gnet_opt("inspect", root, "--lint", "tensorrt", "--json")
    assert done.code == 8
    errors = done.json["errors"]
    assert errors == sum(finding["severity"] == "error" for finding in done.json["findings"]) > 0
    assert {finding["rule"] for finding in done.json["findings"]} == {"activation-type"}
    assert done.err == (
        f"gnet-opt: {root / 'model.onnx'} has {errors} of the forms that tensorrt refuses or "
        "computes otherwise. Mend what the findings call an error, and lint it again.\n"
    )


class Pictures(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.left = [{"input": image[None]} for image in models.pictures(4)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.left.pop() if self.left else None


def test_a_file_of_onnx_runtime_for_people(tmp_path: Path) -> None:
    source = models.save(models.float_net(lrn=False), tmp_path / "float.onnx")
    path = tmp_path / "quantized.onnx"
    quantize_static(source, path, Pictures())
    done = gnet_opt("inspect", path, "--lint", "tensorrt")
    assert done.code == 8
    text = " ".join(done.out.split())
    assert "severity rule node problem mend" in text
    assert "error integer-bias stem.conv its bias is int32 behind a DequantizeLinear" in text
    assert 'extra_options={"QuantizeBias": False}' in text
    linted = gnet_opt("inspect", path, "--lint", "tensorrt", "--json").json
    assert text.endswith(
        "Errors (refused, or computed otherwise than the file says): "
        f"{linted['errors']}. Slow (built, but not in INT8 or with copies): {linted['slow']}."
    )
    found = linted["findings"]
    order = [rule.name for rule in RULES]
    assert [finding["rule"] for finding in found] == sorted(
        (finding["rule"] for finding in found), key=order.index
    )


def test_the_rules_of_tensorrt_8(bundle: Make, tmp_path: Path) -> None:
    done = gnet_opt("inspect", bundle("jetson"), "--lint", "tensorrt8", "--json")
    assert (done.code, {found["rule"] for found in done.json["findings"]}) == (
        8,
        {"integer-weight"},
    )
    # A bundle for TensorRT 8 has the model in its form, too.
    root = bundle("jetson-xavier-nx")
    for rules, name in (("tensorrt8", "model.tensorrt8.onnx"), ("tensorrt", "model.onnx")):
        done = gnet_opt("inspect", root, "--lint", rules)
        assert (done.code, done.err) == (0, "")
        assert done.out == f"No rule of {rules} is broken in {root / name}.\n"


def test_a_float_file(world: World, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    assert gnet_opt("export", world.small, "-o", path).code == 0
    done = gnet_opt("inspect", path, "--lint", "tensorrt")
    assert (done.code, done.err) == (0, "")
    assert done.out == (
        f"{path} holds no quantization: it is a float model, and there is nothing to lint.\n"
    )
    assert gnet_opt("inspect", path, "--lint", "tensorrt", "--json").json["quantized"] is False


@pytest.mark.slow
def test_the_demo_model_for_jetson(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    assert gnet_opt("quantize", "--target", "jetson", "--samples", "16", "-o", root).code == 0
    done = gnet_opt("inspect", root, "--lint", "tensorrt", "--json")
    assert (done.code, done.json["findings"], done.json["quantized"]) == (0, [], True)


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    done = gnet_opt("inspect", tmp_path, "--lint", "tensorrt", "--layers")
    assert (done.code, done.out) == (2, "")
    assert done.err == ("gnet-opt: --lint reads the file and --layers runs it: pass one of them.\n")
    done = gnet_opt("inspect", tmp_path, "--lint", "tensorrt", "--threads", "1")
    assert (done.code, done.out) == (2, "")
    assert gnet_opt("inspect", tmp_path, "--lint", "openvino").code == 2


def test_what_cannot_be_linted(bundle: Make, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    done = gnet_opt("inspect", path, "--lint", "tensorrt")
    assert (done.code, done.out) == (4, "")
    assert done.err == (f"gnet-opt: {path} does not exist. Pass an ONNX file or a bundle.\n")
    path.write_bytes(b"not onnx")
    assert gnet_opt("inspect", path, "--lint", "tensorrt").code == 4
    root = tmp_path / "copy"
    shutil.copytree(bundle("jetson"), root)
    with (root / "model.onnx").open("r+b") as stream:
        stream.write(b"\0\1\2\3")
    done = gnet_opt("inspect", root, "--lint", "tensorrt")
    assert (done.code, done.out) == (6, "")
