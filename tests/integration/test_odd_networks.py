"""Networks as people have them, from the card to the bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from commands import gnet_opt
from world import CARD, LABELS, PREPROCESS, World

from gnet_opt.bundle import Bundle


def test_features_beside_the_logits_and_a_normalisation_inside(
    world: World, tmp_path: Path
) -> None:
    card = tmp_path / "card.toml"
    unit = "mean = [0.0, 0.0, 0.0]\nstd = [255.0, 255.0, 255.0]\n"
    card.write_text(CARD.format(name="outputs") + unit)
    sets = ("--calibration", world.calibration, "--eval", world.evaluation, "--max-drop", "50")
    out = tmp_path / "bundle"
    done = gnet_opt("quantize", card, "--target", "jetson", *sets, "-o", out)
    assert done.code == 0, done.err
    made = Bundle.open(out)
    assert made.preprocess == PREPROCESS
    assert made.manifest["accuracy"]["float"]["top1"] == 100.0  # as labelled by `small` itself
    notes = " ".join(made.manifest["notes"])
    assert "1 is taken as the logits, the only one with that many classes." in notes
    assert "The network normalises its input itself, in normalize: that was moved" in notes


def test_a_network_that_is_wrong_on_every_image_is_told(world: World, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(world.evaluation, images)
    head, *rows = (images / "labels.csv").read_text().splitlines()
    pairs = [row.split(",") for row in rows]
    turned = [f"{file},{LABELS[(LABELS.index(name) + 1) % len(LABELS)]}" for file, name in pairs]
    (images / "labels.csv").write_text("\n".join([head, *turned, ""]))
    out = tmp_path / "bundle"
    sets = ("--calibration", world.calibration, "--eval", images, "--max-drop", "100")
    done = gnet_opt("quantize", world.small, "--target", "jetson", *sets, "-o", out)
    warning = "Warning: the top-1 of 0.00 % on 16 images of "
    assert done.code == 0, done.err
    assert warning in done.err
    assert any(note.startswith(warning) for note in json.loads(content(out))["notes"])
    scored = gnet_opt("evaluate", out, "--images", images, "--json")
    assert any(note.startswith("Warning: the top-1 of ") for note in scored.json["notes"])


def content(bundle: Path) -> str:
    return (bundle / "manifest.json").read_text(encoding="utf-8")
