"""Networks of one and of four planes, and of one output for two classes, through the commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import gnet_opt
from PIL import Image

from gnet_opt.bundle import Bundle
from gnet_opt.golden import Golden
from gnet_opt.preprocess import Preprocess

CARD = """\
name = "{name}"
architecture = "module"
factory = "factories:{name}"
labels = {labels}

[preprocess]
resize = 72
crop = 64
{more}
"""
FIVE, TWO = '["ant", "bee", "cat", "dog", "eel"]', '["no", "yes"]'
MODELS = {
    "gray": (FIVE, 'channels = "gray"'),
    "rgba": (FIVE, 'channels = "rgba"\nmean = [90, 100, 110, 120]\nstd = [60, 61, 62, 63]'),
    "one_logit": (TWO, 'channels = "gray"'),
    "probability": (TWO, 'channels = "gray"'),
}
PLANES = {"gray": 1, "rgba": 4}


def draw(folder: Path, count: int, seed: int, planes: int) -> None:
    """Smooth pictures: grey ones as PNG and JPEG in turns, and a colour one; or RGBA as PNG."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    for index in range(count):
        bands = [
            Image.fromarray(random.integers(0, 256, (6, 8), dtype=np.uint8)).resize(
                (96, 80), Image.Resampling.BICUBIC
            )
            for _ in range(4 if planes == 4 else 3)
        ]
        if planes == 4:
            Image.merge("RGBA", bands).save(folder / f"{index:02}.png")
        elif index == 0:
            Image.merge("RGB", bands).save(folder / "00.png")
        else:
            bands[0].save(folder / f"{index:02}.{'png' if index % 2 else 'jpg'}")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cards, and pictures of each number of planes."""
    folder = tmp_path_factory.mktemp("planes")
    for name, (labels, more) in MODELS.items():
        (folder / f"{name}.toml").write_text(CARD.format(name=name, labels=labels, more=more))
    for name, planes in PLANES.items():
        draw(folder / f"{name} calibration", 12, 1, planes)
        draw(folder / f"{name} evaluation", 16, 2, planes)
    return folder


@pytest.fixture(scope="module")
def built(root: Path) -> Callable[[str, str, str], Path]:
    """A bundle of a model for a target that takes floats or pixels."""

    @cache
    def build(name: str, target: str, taken: str) -> Path:
        out = root / f"{name} {target} {taken}"
        kind = name if name in PLANES else "gray"
        done = gnet_opt(
            "quantize", root / f"{name}.toml", "--target", target, "--threads", "1",
            "--calibration", root / f"{kind} calibration", "--eval", root / f"{kind} evaluation",
            "--input", taken, "-o", out,
        )  # fmt: skip
        assert done.code == 0, done.err
        return out

    return build


@pytest.mark.parametrize(
    ("name", "target", "taken"),
    [
        ("gray", "openvino-cpu", "float32"),
        ("gray", "openvino-cpu", "uint8"),
        ("gray", "arm64", "uint8"),
        ("rgba", "openvino-cpu", "uint8"),
        ("rgba", "arm64", "float32"),
    ],
)
def test_every_command_takes_one_and_four_planes(
    name: str, target: str, taken: str, root: Path, built: Callable[[str, str, str], Path]
) -> None:
    bundle = built(name, target, taken)
    planes = PLANES[name]
    tensor = onnx.load(bundle / "model.onnx").graph.input[0].type.tensor_type
    sizes = [dimension.dim_value for dimension in tensor.shape.dim]
    assert sizes == ([1, 64, 64, planes] if taken == "uint8" else [1, planes, 64, 64])
    assert Golden.read(bundle / "golden.npz").pixels.shape[1:] == (64, 64, planes)

    done = gnet_opt("verify", bundle, "--json", "--threads", "1")
    assert done.code == 0, done.err
    assert done.json["golden_images"] == 8
    assert done.json["sqnr_db"] is None or done.json["sqnr_db"] > 20.0

    labelled = root / f"{name} labelled"
    if not labelled.exists():
        shutil.copytree(root / f"{name} evaluation", labelled)
        files = sorted(path.name for path in labelled.iterdir())
        rows = [f"{file},{index % 5}" for index, file in enumerate(files)]
        (labelled / "labels.csv").write_text("\n".join(["file,label", *rows]))
    done = gnet_opt("evaluate", bundle, "--images", labelled, "--json", "--threads", "1")
    assert done.code == 0, done.err
    assert done.json["images"] == 16

    done = gnet_opt("inspect", bundle, "--layers", "--threads", "1", "--json")
    assert done.code == 0, done.err
    assert done.json["executed"]["macs_int8_share"] > 0.5


@pytest.mark.parametrize("name", PLANES)
def test_bench_goes_from_a_file_to_a_result(
    name: str, built: Callable[[str, str, str], Path], tmp_path: Path
) -> None:
    done = gnet_opt(
        "bench", built(name, "openvino-cpu", "uint8"), "--backend", "openvino", "--backend",
        "onnxruntime", "--rounds", "1", "--seconds", "0.01", "--threads", "1", "-o", tmp_path / "r",
    )  # fmt: skip
    assert done.code == 0, done.err
    form = {"gray": "JPEG", "rgba": "PNG"}[name]
    assert f"from file to result, medians (golden pictures of 64 x 64 pixels as {form})" in done.out


@pytest.mark.parametrize("target", ["jetson", "rtx"])
def test_what_a_device_finishes(target: str, built: Callable[[str, str, str], Path]) -> None:
    bundle = built("gray", target, "float32")
    done = gnet_opt("verify", bundle, "--threads", "1", "--json")
    assert (done.code == 0) == (target == "jetson"), done.err  # there is no GPU for the engine


def test_a_file_says_how_many_planes_it_takes(root: Path, tmp_path: Path) -> None:
    for name, planes in PLANES.items():
        path = tmp_path / f"{name}.onnx"
        assert gnet_opt("export", root / f"{name}.toml", "-o", path).code == 0
        done = gnet_opt("inspect", path, "--layers", "--threads", "1", "--json")
        assert done.code == 0, done.err
        other = next(card for card in PLANES if card != name)
        done = gnet_opt(
            "evaluate", path, "--card", root / f"{other}.toml", "--images",
            root / f"{name} evaluation",
        )  # fmt: skip
        assert done.code == 2
        assert f"{path} takes pictures of {planes} planes, and the [preprocess] of" in done.err
    done = gnet_opt("evaluate", tmp_path / "rgba.onnx", "--images", root / "rgba evaluation")
    assert done.code == 2
    assert "takes pictures of 4 planes, and ImageNet's pictures have 3." in done.err


def test_pictures_without_a_fourth_band_are_refused_at_the_start(
    root: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(root / "rgba calibration", folder)
    Image.new("RGB", (96, 80)).save(folder / "zz.png")
    done = gnet_opt(
        "quantize", root / "rgba.toml", "--calibration", folder, "--target", "openvino-cpu", "-o",
        tmp_path / "b", "--dry-run",
    )  # fmt: skip
    assert done.code == 5
    assert f"{folder / 'zz.png'}: It has no fourth band (its pixels are RGB)" in done.err


def test_quantize_says_how_many_pictures_are_turned(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "turned"
    shutil.copytree(root / "gray calibration", folder)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b"):
        Image.new("L", (90, 80), 77).save(folder / f"{name}.jpg", exif=exif)
    card = tmp_path / "card.toml"
    for rule, words in (("as stored", "it is ignored"), ("upright", "they are turned upright")):
        card.write_text((root / "gray.toml").read_text() + f'orientation = "{rule}"\n')
        done = gnet_opt(
            "quantize", card, "--calibration", folder, "--target", "openvino-cpu", "-o",
            tmp_path / "b", "--dry-run", "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        (note,) = [note for note in done.json["notes"] if "EXIF" in note]
        assert note.startswith("2 of 14 calibration pictures carry an EXIF orientation")
        assert words in note


@pytest.mark.parametrize(("name", "threshold"), [("one_logit", 0.0), ("probability", 0.5)])
def test_one_output_tells_two_classes_apart(
    name: str, threshold: float, root: Path, tmp_path: Path
) -> None:
    import torch

    from gnet_opt.stages.load import load

    model = load(str(root / f"{name}.toml"))
    files = sorted((root / "gray evaluation").iterdir())
    inputs = torch.from_numpy(np.stack([model.preprocess.load(path) for path in files]))
    outputs = model.module(inputs)[:, 0].tolist()
    assert 4 <= sum(output > threshold for output in outputs) <= 12
    images = tmp_path / "images"
    wrong = 3
    for index, (path, output) in enumerate(zip(files, outputs, strict=True)):
        right = "yes" if output > threshold else "no"
        folder = images / ({"yes": "no", "no": "yes"}[right] if index < wrong else right)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    done = gnet_opt(
        "quantize", root / f"{name}.toml", "--calibration", root / "gray calibration", "--eval",
        images, "--target", "openvino-cpu", "--threads", "1", "-o", tmp_path / "b", "--max-drop",
        "50", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest["model"]["threshold"] == threshold
    assert manifest["accuracy"]["float"] == {"top1": 100 * (16 - wrong) / 16, "top5": None}
    assert manifest["accuracy"]["agreement"] >= 100 * 14 / 16
    assert any("above" in note and "class 1 (yes)" in note for note in manifest["notes"])
    for spec in (root / f"{name}.toml", tmp_path / "b"):
        done = gnet_opt("evaluate", spec, "--images", images, "--json", "--reference")
        assert done.code == 0, done.err
        assert abs(done.json["top1"] - 100 * (16 - wrong) / 16) <= 100 * 2 / 16
        assert any("class 1 (yes)" in note for note in done.json["notes"])
    shutil.rmtree(images / "yes")
    done = gnet_opt("evaluate", tmp_path / "b", "--images", images, "--json", "--reference")
    assert done.code == 0, done.err  # "no" alone is the model's class 0
    assert done.json["top1"] < 100


def test_a_bundle_from_before_is_read_as_before(
    built: Callable[[str, str, str], Path], tmp_path: Path
) -> None:
    copy = tmp_path / "b"
    shutil.copytree(built("gray", "arm64", "float32"), copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["preprocess"]["orientation"], manifest["preprocess"]["alpha"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert Bundle.open(copy).preprocess == Preprocess(resize=72, crop=64, channels="gray")
    assert gnet_opt("verify", copy, "--threads", "1").code == 0
