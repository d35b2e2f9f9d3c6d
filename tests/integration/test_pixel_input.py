"""`--input uint8`: bundles and files that take pixels and normalise them in the graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import Done, gnet_opt
from world import LABELS, World

from gnet_opt.backends.onnxruntime import open_reference
from gnet_opt.bundle import Bundle
from gnet_opt.golden import Golden

Make = Callable[[str], Path]
PIXELS = "input: UINT8[1, 64, 64, 3]"


@pytest.fixture(scope="module")
def taking(
    quantize_arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Bundles that take pixels."""
    root = tmp_path_factory.mktemp("taking")
    made = {}
    for target in ("openvino-cpu", "arm64"):
        out = root / target
        done = gnet_opt(*quantize_arguments, "--target", target, "--input", "uint8", "-o", out)
        assert done.code == 0, done.err
        made[target] = out
    return made


def graph_input(model: Path) -> tuple[int, list[int]]:
    (given,) = onnx.load(model).graph.input
    assert given.name == "input"
    kind = given.type.tensor_type
    return kind.elem_type, [size.dim_value for size in kind.shape.dim]


@pytest.mark.parametrize("target", ["openvino-cpu", "arm64"])
def test_it_differs_from_the_usual_bundle_in_its_input_alone(
    target: str, taking: dict[str, Path], bundle: Make
) -> None:
    made, usual = Bundle.open(taking[target]), Bundle.open(bundle(target))
    assert graph_input(made.model) == (onnx.TensorProto.UINT8, [1, 64, 64, 3])
    assert graph_input(usual.model) == (onnx.TensorProto.FLOAT, [1, 3, 64, 64])
    assert made.manifest["preprocess"] == {**usual.manifest["preprocess"], "input": "uint8"}
    assert "input" not in usual.manifest["preprocess"]
    assert made.manifest["facts"]["input"] == {
        "dtype": "uint8",
        "images": 8,
        "layout": "NHWC",
        "levels": 256,
        "max_abs_difference": 0.0,
        "nodes": ["Cast", "Sub", "Div", "Transpose"],
    }
    assert "input" not in usual.manifest["facts"]
    # Not a bit of the network behind is another one, nor of its golden logits.
    weights = {t.name: t.SerializeToString() for t in onnx.load(made.model).graph.initializer}
    for tensor in onnx.load(usual.model).graph.initializer:
        assert weights.pop(tensor.name) == tensor.SerializeToString()
    assert sorted(weights) == ["input/mean", "input/std"]
    samples = Golden.read(made.path("golden"))
    assert np.array_equal(samples.outputs, Golden.read(usual.path("golden")).outputs)
    assert made.manifest["accuracy"]["images"] == usual.manifest["accuracy"]["images"] == 16
    if made.manifest["accuracy"]["semantics"] == "reference":
        assert made.manifest["accuracy"] == usual.manifest["accuracy"]
    for key in ("calibrate", "quantize"):
        assert made.manifest["facts"][key] == usual.manifest["facts"][key]


@pytest.mark.parametrize("target", ["openvino-cpu", "arm64"])
def test_golden_outputs_are_those_of_reference_semantics(
    target: str, taking: dict[str, Path]
) -> None:
    made = Bundle.open(taking[target])
    samples = Golden.read(made.path("golden"))
    with open_reference(made.model, 1) as runner:
        for image, logits in zip(
            made.preprocess.tensor(samples.pixels), samples.outputs, strict=True
        ):
            assert np.array_equal(runner.run(image[None])[0], logits)


@pytest.mark.parametrize("target", ["openvino-cpu", "arm64"])
def test_every_command_takes_it(target: str, taking: dict[str, Path], world: World) -> None:
    root = taking[target]
    done = gnet_opt("verify", root, "--json", "--threads", "1")
    assert done.code == 0, done.err
    assert done.json["golden_images"] == 8
    assert done.json["sqnr_db"] is None or done.json["sqnr_db"] > 20.0

    for more in ([], ["--reference"]):
        done = gnet_opt("evaluate", root, "--images", world.evaluation, "--json", *more)
        assert done.code == 0, done.err
        assert done.json["images"] == 16
        if done.json["semantics"] == "reference":
            measured = Bundle.open(root).manifest["accuracy"]
            if measured["semantics"] == "reference":
                assert done.json["top1"] == measured["quantized"]["top1"]

    done = gnet_opt("inspect", root, "--json")
    assert done.json["model"]["input"] == PIXELS
    assert done.json["bundle"]["preprocess"]["input"] == "uint8"
    assert PIXELS in gnet_opt("inspect", root).out

    done = gnet_opt("inspect", root, "--layers", "--threads", "1", "--json")
    assert done.code == 0, done.err
    executed = done.json["executed"]
    stored = [layer["name"] for layer in done.json["model"]["layers"]]
    assert [layer["name"] for layer in executed["layers"]] == stored
    assert executed["macs_int8_share"] > 0.5


def test_latency_is_measured_with_pixels(taking: dict[str, Path]) -> None:
    latency = Bundle.open(taking["openvino-cpu"]).manifest["latency"]
    if latency is None:
        pytest.skip("this machine is no x86-64, so that nothing is native")
    assert latency["input"] == [1, 64, 64, 3]
    assert sorted(latency["results"]) == ["float", "quantized"]


@pytest.mark.parametrize(
    ("target", "backend"),
    [("jetson-orin-nano", "tensorrt"), ("nvidia-gpu", "tensorrt"), ("rtx", "tensorrt-rtx")],
)
def test_a_backend_without_pixels_is_refused(
    target: str, backend: str, quantize_arguments: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "b"
    done = gnet_opt(*quantize_arguments, "--target", target, "--input", "uint8", "-o", out)
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith(
        f"gnet-opt: --input uint8 is not for {target}: the backend {backend} gives a model float32 "
        "values only. Leave --input out, or choose another target.\n"
    )
    assert not out.exists()


def test_auto_precision_takes_pixels(quantize_arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "b"
    done = gnet_opt(
        *quantize_arguments, "--target", "openvino-cpu", "--input", "uint8", "--precision", "auto",
        "-o", out, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    manifest = done.json["manifest"]
    assert manifest["preprocess"]["input"] == "uint8"
    assert manifest["decision"]["candidates"]
    assert graph_input(out / "model.onnx")[0] == onnx.TensorProto.UINT8
    assert gnet_opt("verify", out).code == 0


def test_a_float_bundle_takes_pixels(quantize_arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "b"
    done = gnet_opt(
        *quantize_arguments, "--target", "openvino-cpu", "--input", "uint8", "--precision", "fp32",
        "-o", out,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert Bundle.open(out).preprocess.input == "uint8"
    assert gnet_opt("verify", out).code == 0


def test_the_plan_says_it(quantize_arguments: list[str]) -> None:
    for more, expected in (([], "float32"), (["--input", "uint8"], "uint8")):
        done = gnet_opt(
            *quantize_arguments, "--target", "openvino-cpu", "--dry-run", "--json", *more
        )
        assert done.json["input"] == expected


def scored(done: Done) -> dict[str, object]:
    assert done.code == 0, done.err
    return {key: value for key, value in done.json.items() if key in ("images", "top1", "top5")}


@pytest.mark.parametrize("batch", ["1", "dynamic"])
def test_export(batch: str, world: World, tmp_path: Path) -> None:
    plain, taking = tmp_path / "plain.onnx", tmp_path / "taking.onnx"
    assert gnet_opt("export", world.small, "--batch", batch, "-o", plain).code == 0
    done = gnet_opt(
        "export", world.small, "--batch", batch, "--input", "uint8", "-o", taking, "--json"
    )
    assert done.code == 0, done.err
    assert done.json["facts"]["input"]["images"] == 4
    kind, sizes = graph_input(taking)
    assert (kind, sizes[1:]) == (onnx.TensorProto.UINT8, [64, 64, 3])
    assert sizes[0] == (1 if batch == "1" else 0)  # 0: a name
    images = ["--images", world.evaluation, "--card", world.small, "--reference", "--json"]
    expected = scored(gnet_opt("evaluate", plain, *images))
    assert scored(gnet_opt("evaluate", taking, *images)) == expected
    done = gnet_opt("inspect", taking, "--layers", "--threads", "1", "--json")
    assert done.code == 0, done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.onnx", "taking.onnx"]


def test_a_file_that_takes_pixels_needs_no_card_for_its_mean(world: World, tmp_path: Path) -> None:
    card = tmp_path / "card.toml"
    network, _ = world.small.read_text().split("[preprocess]")
    card.write_text(f"{network}[preprocess]\nmean = [104, 117, 123]\nstd = [60, 70, 80]\n")
    images = tmp_path / "images"
    shutil.copytree(world.evaluation, images)
    lines = (images / "labels.csv").read_text().splitlines()
    rows = [line.rsplit(",", 1) for line in lines[1:]]
    named = [f"{file},{LABELS.index(label)}" for file, label in rows]
    (images / "labels.csv").write_text("\n".join([lines[0], *named]))
    taking = tmp_path / "taking.onnx"
    assert gnet_opt("export", card, "--input", "uint8", "-o", taking).code == 0
    with_card = gnet_opt("evaluate", taking, "--images", images, "--card", card, "--json")
    done = gnet_opt("evaluate", taking, "--images", images, "--json")
    assert scored(done) == scored(with_card)
    assert done.json["notes"] == [
        "An ONNX file does not say how pictures are resized: the shorter side to 256 pixels and a "
        "crop of 224 are assumed. Pass --card with a model card to say it."
    ]
    assert with_card.json["notes"] == []


def test_a_card_describes_the_network(world: World, tmp_path: Path) -> None:
    card = tmp_path / "card.toml"
    card.write_text(world.small.read_text() + 'input = "uint8"\n')
    done = gnet_opt("export", card, "-o", tmp_path / "a.onnx")
    assert done.code == 2
    assert (
        "preprocess.input is 'uint8', but factories:small is a network, which takes float32. "
        "Leave it out, and ask for a model that takes pixels with --input uint8."
    ) in done.err
    assert list(tmp_path.iterdir()) == [card]


def test_an_unknown_input_in_a_manifest(taking: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "b"
    shutil.copytree(taking["openvino-cpu"], copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    assert len(manifest["labels"]) == len(LABELS)
    manifest["preprocess"]["input"] = "float16"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    done = gnet_opt("verify", copy)
    assert done.code == 6
    assert "preprocess.input is 'float16'; it must be float32 or uint8." in done.err
