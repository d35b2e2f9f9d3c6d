from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance import models
from gnet_opt import backends
from gnet_opt.backends.onnxruntime import open_reference
from gnet_opt.errors import ModelError
from gnet_opt.preprocess import Preprocess
from gnet_opt.quantization.describe import describe
from gnet_opt.quantization.lint import lint
from gnet_opt.quantization.surroundings import surroundings
from gnet_opt.stages.pixels import take_pixels
from gnet_opt.target import find

SIDE = models.SIDE
SIZE = {"crop": SIDE, "resize": SIDE}
CAFFE: dict[str, Any] = {"channels": "bgr", "mean": (104.0, 117.0, 123.0), "std": (1.0, 1.0, 1.0)}
INCEPTION: dict[str, Any] = {"mean": (127.5,) * 3, "std": (127.5,) * 3}
SETTINGS: dict[str, dict[str, Any]] = {
    "imagenet": {},
    "imagenet, bgr": {"channels": "bgr"},
    "inception": INCEPTION,
    "caffe": CAFFE,
    "mean alone": {"mean": (0.0, 1.0, 0.0), "std": (1.0, 1.0, 1.0)},
    "deviation alone": {"mean": (0.0, 0.0, 0.0), "std": (255.0, 1.0, 3.0)},
    "nothing": {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
    "far away": {"mean": (-1e6, 3e-7, 254.99), "std": (1e-4, 7e5, 1.0)},
}


def pixels(count: int, seed: int = 0) -> np.ndarray:
    """Random pixels; every second picture has nothing but the two extremes."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    drawn[1::2] = np.where(drawn[1::2] < 128, 0, 255)
    return drawn


def logits(model: Path, inputs: np.ndarray) -> np.ndarray:
    with open_reference(model, 1) as runner:
        return np.concatenate([runner.run(one[None]) for one in inputs])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Float and Q/DQ files with a float input."""
    folder = tmp_path_factory.mktemp("plain")
    images = models.pictures(4)
    nets = {"float": models.float_net(), "dynamic": models.float_net(batch="N")}
    nets["u8"] = models.quantize(nets["float"], images, "u8")
    nets["s8"] = models.quantize(nets["float"], images, "s8")
    return {name: models.save(net, folder / f"{name}.onnx") for name, net in nets.items()}


@pytest.mark.parametrize("net", ["float", "u8", "s8"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_logits_are_those_of_the_float_input(
    name: str, net: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    preprocess = Preprocess(**SIZE, **SETTINGS[name])
    facts = take_pixels(plain[net], tmp_path / "a.onnx", preprocess, pixels(2))
    onnx.checker.check_model(tmp_path / "a.onnx", full_check=True)
    others = pixels(6, seed=1)  # not those of the proof
    expected = logits(plain[net], preprocess.normalize(others))
    assert np.array_equal(logits(tmp_path / "a.onnx", others), expected)
    assert len(np.unique(expected, axis=0)) == len(others)
    assert facts["max_abs_difference"] == 0.0
    assert (facts["images"], facts["levels"]) == (2, 256)
    assert (facts["dtype"], facts["layout"]) == ("uint8", "NHWC")


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("imagenet", ["Cast", "Sub", "Div", "Transpose"]),
        ("imagenet, bgr", ["Cast", "Sub", "Div", "Transpose", "Gather"]),
        ("caffe", ["Cast", "Sub", "Transpose", "Gather"]),
        ("deviation alone", ["Cast", "Div", "Transpose"]),
        ("nothing", ["Cast", "Transpose"]),
    ],
)
def test_only_nodes_that_do_something(
    name: str, nodes: list[str], plain: dict[str, Path], tmp_path: Path
) -> None:
    preprocess = Preprocess(**SIZE, **SETTINGS[name])
    facts = take_pixels(plain["u8"], tmp_path / "a.onnx", preprocess, pixels(1))
    assert facts["nodes"] == nodes
    graph = onnx.load(tmp_path / "a.onnx").graph
    assert [node.op_type for node in graph.node[: len(nodes)]] == nodes
    before = onnx.load(plain["u8"]).graph
    assert [node.op_type for node in graph.node[len(nodes) :]] == [n.op_type for n in before.node]


numbers = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=40, deadline=None)
@given(
    mean=st.tuples(numbers, numbers, numbers),
    std=st.tuples(*[st.floats(1.0, 1e4, width=32)] * 3),
    channels=st.sampled_from(["rgb", "bgr"]),
)
def test_any_mean_and_deviation_is_exact(
    mean: Any, std: Any, channels: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # The stage itself compares all levels, bit by bit, and refuses what differs.
    folder = tmp_path_factory.mktemp("any")
    model = models.save(models.float_net(), folder / "f.onnx")
    preprocess = Preprocess(**SIZE, mean=mean, std=std, channels=channels)
    take_pixels(model, folder / "a.onnx", preprocess, pixels(1))


@pytest.mark.parametrize(("channels", "planes"), [("gray", 1), ("rgba", 4)])
@pytest.mark.parametrize("batch", [1, "N"])
def test_one_and_four_planes(channels: Any, planes: int, batch: Any, tmp_path: Path) -> None:
    numbers = [(value + 0.5) for value in range(planes)]
    preprocess = Preprocess(
        **SIZE, channels=channels, mean=tuple(numbers), std=tuple(n + 50 for n in numbers)
    )
    plain = models.save(models.float_net(batch=batch, planes=planes), tmp_path / "plain.onnx")
    images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, planes), dtype=np.uint8)
    facts = take_pixels(plain, tmp_path / "a.onnx", preprocess, images[:1])
    onnx.checker.check_model(tmp_path / "a.onnx", full_check=True)
    assert facts["nodes"] == ["Cast", "Sub", "Div", "Transpose"]
    assert (
        describe(tmp_path / "a.onnx")["input"] == f"input: UINT8[{batch}, {SIDE}, {SIDE}, {planes}]"
    )
    expected = logits(plain, preprocess.normalize(images))
    assert np.array_equal(logits(tmp_path / "a.onnx", images), expected)
    with pytest.raises(ModelError, match=r"one float32 input of shape \(N, 3, height, width\)"):
        take_pixels(plain, tmp_path / "b.onnx", Preprocess(**SIZE), pixels(1))
    assert not (tmp_path / "b.onnx").exists()


def test_any_batch_where_the_model_takes_any(plain: dict[str, Path], tmp_path: Path) -> None:
    preprocess = Preprocess(**SIZE, **CAFFE)
    take_pixels(plain["dynamic"], tmp_path / "a.onnx", preprocess, pixels(1))
    images = pixels(5)
    with open_reference(tmp_path / "a.onnx", 1) as taking, open_reference(plain["dynamic"]) as net:
        assert np.array_equal(taking.run(images), net.run(preprocess.normalize(images)))


def test_the_network_behind_stays_as_it_is(plain: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "a.onnx"
    take_pixels(plain["s8"], out, Preprocess(**SIZE, **CAFFE), pixels(1))
    before, after = describe(plain["s8"]), describe(out)
    assert before["input"] == f"input: FLOAT[1, 3, {SIDE}, {SIDE}]"
    assert after["input"] == f"input: UINT8[1, {SIDE}, {SIDE}, 3]"
    assert after["output"] == before["output"]
    assert after["layers"] == before["layers"]
    assert after["macs_int8_share"] == before["macs_int8_share"] == 1.0
    assert surroundings(out) == surroundings(plain["s8"])
    assert lint(out, "tensorrt") == lint(plain["s8"], "tensorrt")
    weights = {t.name: t.SerializeToString() for t in onnx.load(out).graph.initializer}
    for tensor in onnx.load(plain["s8"]).graph.initializer:
        assert weights.pop(tensor.name) == tensor.SerializeToString()
    assert sorted(weights) == ["input/mean", "input/order"]


def test_equal_inputs_give_equal_bytes(plain: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        take_pixels(plain["u8"], tmp_path / name, Preprocess(**SIZE), pixels(1))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (onnx.TensorProto.UINT8, [1, SIDE, SIDE, 3]),
        (onnx.TensorProto.FLOAT, [1, 4, SIDE, SIDE]),
        (onnx.TensorProto.FLOAT, [1, 3, SIDE * SIDE]),
        (onnx.TensorProto.FLOAT, [1, 3, "height", SIDE]),
        (onnx.TensorProto.FLOAT16, [1, 3, SIDE, SIDE]),
    ],
)
def test_another_input_is_refused(kind: int, shape: list[int | str], tmp_path: Path) -> None:
    net = models.float_net()
    net.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("input", kind, shape))
    model = models.save(net, tmp_path / "f.onnx")
    with pytest.raises(ModelError) as caught:
        take_pixels(model, tmp_path / "a.onnx", Preprocess(**SIZE), pixels(1))
    assert str(caught.value) == (
        f"{model} does not have one float32 input of shape (N, 3, height, width), height and "
        "width fixed, which could take pixels instead. Export it with `gnet-opt export`."
    )
    assert not (tmp_path / "a.onnx").exists()


class _WrongLevel(Preprocess):
    """One level in one channel is one bit off."""

    def normalize(self, pixels: Any) -> Any:
        values = super().normalize(pixels)
        wrong = np.moveaxis(pixels, -1, -3)[..., 1, :, :] == 200
        values[..., 1, :, :][wrong] = np.nextafter(values[..., 1, :, :][wrong], np.float32(9))
        return values


class _WrongPictures(Preprocess):
    """Right on the proof of the levels, which has 256 rows, and wrong on pictures."""

    def normalize(self, pixels: Any) -> Any:
        values = super().normalize(pixels)
        return values if pixels.shape[-3] == 256 else values + np.float32(0.5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (_WrongLevel, "The nodes that normalise pixels do not give what the preprocess gives."),
        (_WrongPictures, "With pixels as its input u8.onnx differs by up to "),
    ],
)
def test_a_difference_is_refused(
    wrong: type[Preprocess], message: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        take_pixels(plain["u8"], tmp_path / "a.onnx", wrong(**SIZE), pixels(1))
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize("name", ["imagenet, bgr", "nothing"])
def test_tensorrt_rtx_builds_it(name: str, plain: dict[str, Path], tmp_path: Path) -> None:
    backend = backends.get("tensorrt-rtx")
    if not backend.probe().available:
        pytest.skip(backend.probe().detail)
    preprocess = Preprocess(**SIZE, **SETTINGS[name])
    take_pixels(plain["s8"], tmp_path / "model.onnx", preprocess, pixels(1))
    artifact = backend.compile(tmp_path / "model.onnx", find("rtx"), tmp_path)
    assert artifact == backend.artifact(tmp_path)
    assert (tmp_path / "model.engine").stat().st_size > 0
