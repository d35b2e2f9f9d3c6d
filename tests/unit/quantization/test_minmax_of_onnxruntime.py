"""The method minmax against ONNX Runtime's own calibration and quantization, bit for bit."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import S8, U8, Graph, googlenet_like, pictures, to_int8
from onnx import TensorProto, numpy_helper

from gnet_opt.quantization import calibrate
from gnet_opt.quantization.ranges import affine, minmax
from gnet_opt.target import Scheme

SCHEMES = {"u8": U8, "s8": S8}
BATCH = 5


class Reader:
    """Calibration pictures as ONNX Runtime reads them."""

    def __init__(self, images: Iterable[np.ndarray]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._images, None)
        return None if image is None else {"input": image[None]}


def exact_pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """Multiples of 1/16 from -2 to 2."""
    random = np.random.default_rng(seed)
    return list((random.integers(-32, 33, (count, 3, 16, 16)) / 16).astype(np.float32))


def exact_chain(path: Path) -> Path:
    """Three convolutions in a row, with weights of halves.

    Every sum is a multiple of 1/128 and fits the 24 bits of a float32: whatever the order in which
    a kernel adds up, its result is the same to the last bit.
    """
    graph = Graph(size=16)
    data = graph.block("input", 8, "a", kernel=3)
    data = graph.block(data, 8, "b", kernel=3)
    graph.conv(data, 4, "c")
    random = np.random.default_rng(0)
    for value in graph.initializers:
        halves = random.integers(-2, 3, tuple(value.dims)) / 2
        value.CopyFrom(numpy_helper.from_array(halves.astype(np.float32), value.name))
    return graph.save(path, "c_out")


def parameters(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scale and zero point of what each convolution reads, by its name."""
    graph = onnx.load(path).graph
    writers = {name: node for node in graph.node for name in node.output}
    constants = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "Conv":
            dequantize = writers[node.input[0]]
            assert dequantize.op_type == "DequantizeLinear"
            scale, zero = (constants[name] for name in dequantize.input[1:3])
            found[node.name] = (scale, zero)
    return found


def calibrated_by_onnxruntime(
    model: Path, images: list[np.ndarray], scheme: Scheme, folder: Path
) -> dict[str, tuple[int, np.float32]]:
    """Scale and zero point of every tensor, with the calibrator that `quantize_static` uses."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator
    from onnxruntime.quantization.quant_utils import compute_scale_zp, get_qmin_qmax_for_qType

    calibrator = create_calibrator(
        model,
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=CalibrationMethod.MinMax,
    )
    calibrator.collect_data(Reader(images))
    kind = TensorProto.UINT8 if scheme.activations == "u8" else TensorProto.INT8
    bounds = get_qmin_qmax_for_qType(kind, symmetric=scheme.symmetric)
    found = {}
    for name, seen in calibrator.compute_data().items():
        low, high = (np.asarray(end).reshape(()) for end in seen.range_value)
        zero, scale = compute_scale_zp(low, high, *bounds, symmetric=scheme.symmetric)
        found[name] = (int(zero), np.float32(scale))
    return found


def ours(model: Path, images: list[np.ndarray], scheme: Scheme) -> dict[str, Any]:
    seen = calibrate(model, images, histograms=False, threads=1)
    found = {}
    for name in seen.lows:
        chosen = affine(minmax(seen.bounds([name]), scheme), scheme)
        found[name] = (chosen.zero_point, chosen.scale)
    return found


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_scale_is_that_of_its_calibrator(tmp_path: Path, scheme: Scheme) -> None:
    model = exact_chain(tmp_path / "float.onnx")
    images = exact_pictures(BATCH)
    found = ours(model, images, scheme)
    theirs = calibrated_by_onnxruntime(model, images, scheme, tmp_path)
    assert list(found) == ["a.relu_out", "b.relu_out", "input"]
    assert found == {name: theirs[name] for name in found}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_what_both_write_has_equal_scales(tmp_path: Path, scheme: Scheme) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    model = exact_chain(tmp_path / "float.onnx")
    images = exact_pictures(BATCH)
    to_int8(model, tmp_path / "ours.onnx", images, scheme, method="minmax", threads=1)
    with contextlib.redirect_stdout(io.StringIO()):
        quantize_static(
            model,
            tmp_path / "theirs.onnx",
            Reader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8 if scheme.activations == "u8" else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": scheme.symmetric},
        )
    found, theirs = parameters(tmp_path / "ours.onnx"), parameters(tmp_path / "theirs.onnx")
    assert list(found) == list(theirs) == ["a", "b", "c"]
    for name, (scale, zero) in found.items():
        assert scale.dtype == theirs[name][0].dtype == np.float32
        assert zero.dtype == theirs[name][1].dtype
        assert (scale, zero) == theirs[name]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_network_of_usual_weights_differs_in_last_bits_at_most(
    tmp_path: Path, scheme: Scheme
) -> None:
    """Its calibrator runs the graph without fusions, so that sums run in another order."""
    model = googlenet_like(tmp_path / "float.onnx")
    images = pictures(BATCH)
    found = ours(model, images, scheme)
    theirs = calibrated_by_onnxruntime(model, images, scheme, tmp_path)
    for name, (zero, scale) in found.items():
        assert scale == pytest.approx(theirs[name][1], rel=1e-5)
        assert abs(zero - theirs[name][0]) <= 1
    assert found["input"] == theirs["input"]
