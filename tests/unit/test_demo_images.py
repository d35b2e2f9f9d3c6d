"""The shipped image sets and the shipped model's card are what their descriptions say."""

from __future__ import annotations

import csv
import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from gnet_opt.cards import ModelCard
from gnet_opt.images import ImageSet, check_disjoint
from gnet_opt.paths import demo_calibration, demo_card, demo_evaluation

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "calibration" / "demo"


@pytest.fixture(scope="module")
def render() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DEMO)  # as for a script, whose folder comes first
        yield importlib.import_module("render")


@pytest.mark.parametrize(
    ("folder", "count", "least", "most"),
    [(demo_calibration(), 128, 12, 13), (demo_evaluation(), 500, 50, 50)],
    ids=["calibration", "evaluation"],
)
def test_sets_are_complete_and_balanced(folder: Path, count: int, least: int, most: int) -> None:
    images = ImageSet.open(folder)

    assert len(images) == count
    assert len(images.classes) == 10
    assert images.labels is not None
    images.check_labels(10)
    per_class = Counter(images.labels)
    assert min(per_class.values()) >= least and max(per_class.values()) <= most
    assert {path.name for path in folder.glob("*.jpg")} == {path.name for path in images.files}
    for path in images.files:
        with Image.open(path, formats=["JPEG"]) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (256, 256)), path


def test_sets_share_no_picture_and_stay_small() -> None:
    calibration, evaluation = ImageSet.open(demo_calibration()), ImageSet.open(demo_evaluation())

    check_disjoint(calibration, evaluation)
    total = sum(path.stat().st_size for path in (*calibration.files, *evaluation.files))
    assert total <= 8_000_000


@pytest.mark.parametrize(("folder", "seed"), [("calibration", 1), ("evaluation", 2)])
def test_script_renders_the_committed_pictures_again(
    render: ModuleType, folder: str, seed: int
) -> None:
    with (DEMO / folder / "labels.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))

    for row in rows[5 :: len(rows) // 4]:
        name, number = Path(row["file"]).stem.rsplit("_", 1)
        assert render.CLASSES[int(row["label"])] == name
        fresh = np.asarray(render.render(name, seed * render.SEED_STRIDE + int(number)), np.float32)
        with Image.open(DEMO / folder / row["file"], formats=["JPEG"]) as image:
            committed = np.asarray(image, np.float32)
        # JPEG and other versions of Pillow and numpy move a value a little; another picture is
        # dozens of grey levels away.
        assert np.abs(fresh - committed).mean() < 8, row["file"]
        blurred = [a.reshape(32, 8, 32, 8, 3).mean((1, 3)) for a in (fresh, committed)]
        assert np.abs(blurred[0] - blurred[1]).mean() < 1.5, row["file"]


def test_render_is_deterministic_and_seeds_differ(render: ModuleType) -> None:
    first = render.render("gear", 12345)

    assert first.size == (256, 256)
    assert first.tobytes() == render.render("gear", 12345).tobytes()
    assert first.tobytes() != render.render("gear", 12346).tobytes()


def test_parts_lie_in_the_unit_sphere_and_are_seen(render: ModuleType) -> None:
    scene = importlib.import_module("scene")
    rng = np.random.default_rng(0)
    outside = rng.normal(size=(3, 20000))
    outside = (outside / np.linalg.norm(outside, axis=0) * 1.02).astype(np.float32)
    turn = np.eye(3, dtype=np.float32)
    for name, make in render.PARTS.items():
        for _ in range(4):
            part = make(rng)
            hits = scene.trace(part, turn, (128.0, 128.0), 100.0)
            assert len(hits.index) > 200, name
            share_inside = float((part.distance(*outside) < 0).mean())
            assert share_inside < 0.01, name


def test_command_line_writes_a_set(
    render: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["render.py", str(tmp_path / "set"), "--total", "12", "--seed", "7"]
    )

    render.main()

    images = ImageSet.open(tmp_path / "set")
    assert images.classes == render.CLASSES
    assert images.labels is not None and sorted(Counter(images.labels).values())[-2:] == [2, 2]
    assert len(images) == 12


def test_card_describes_the_shipped_model(render: ModuleType) -> None:
    from safetensors import safe_open

    card = ModelCard.open(demo_card())

    assert card.architecture == "googlenet"
    assert card.classes == 10
    assert card.labels == render.CLASSES == ImageSet.open(demo_evaluation()).classes
    assert card.license == "Apache-2.0"
    assert not card.transform_input
    assert card.weights is not None
    assert card.weights.stat().st_size <= 25_000_000
    with safe_open(card.weights, "pt") as stored:
        shapes = {key: stored.get_slice(key) for key in stored.keys()}  # noqa: SIM118
        assert shapes["fc.weight"].get_shape() == [10, 1024]
        assert shapes["aux2.fc2.weight"].get_shape() == [10, 1024]
        assert shapes["conv1.conv.weight"].get_dtype() == "F16"


def test_card_records_how_the_shipped_model_was_trained() -> None:
    from gnet_opt.files import sha256_file

    card = ModelCard.open(demo_card())
    training = card.extra["training"]

    assert card.weights is not None
    assert training["weights_sha256"] == sha256_file(card.weights)
    assert training["recipe"] == "paper"
    assert (training["optimizer"], training["momentum"]) == ("sgd", 0.9)
    assert training["auxiliary_weight"] == 0.3
    assert training["validation_images"] == 500
    assert training["validation_digest"] == ImageSet.open(demo_evaluation()).digest
    assert 0.85 <= training["validation_top1"] <= 0.98
