"""The models and pictures that the commands are tested with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from factories import WRECKED_INPUT
from PIL import Image

from gnet_opt.files import write_text
from gnet_opt.preprocess import Preprocess

LABELS = ("ant", "bee", "cat", "dog", "eel")
CARD = """\
name = "{name}"
architecture = "module"
factory = "factories:{name}"
labels = ["ant", "bee", "cat", "dog", "eel"]

[preprocess]
resize = 72
crop = 64
"""
PREPROCESS = Preprocess(resize=72, crop=64)
_WRECKED = f"std = [{PREPROCESS.std[0] / WRECKED_INPUT}, {PREPROCESS.std[1]}, {PREPROCESS.std[2]}]"


@dataclass(frozen=True)
class World:
    """Models and pictures that every test may read.

    Attributes:
        small: The card of a model that quantizes well.
        hostile: The card of one that does not before its channels are put in line.
        ruined: The card of one that does not but for its last layer.
        wrecked: The card of one of which no layer does.
        calibration: Twelve pictures without labels.
        evaluation: Sixteen others, with the labels that the float model gives them.
        ruined_evaluation: The same with the labels that `ruined` gives them.
        wrecked_evaluation: The same with the labels that `wrecked` gives them.
    """

    small: Path
    hostile: Path
    ruined: Path
    wrecked: Path
    calibration: Path
    evaluation: Path
    ruined_evaluation: Path
    wrecked_evaluation: Path


def make_world(root: Path) -> World:
    made = World(
        small=root / "small.toml",
        hostile=root / "hostile.toml",
        ruined=root / "ruined.toml",
        wrecked=root / "wrecked.toml",
        calibration=root / "calibration",
        evaluation=root / "evaluation",
        ruined_evaluation=root / "ruined evaluation",
        wrecked_evaluation=root / "wrecked evaluation",
    )
    for path in (made.small, made.hostile, made.ruined, made.wrecked):
        path.write_text(CARD.format(name=path.stem))
    made.wrecked.write_text(f"{made.wrecked.read_text()}{_WRECKED}\n")
    draw(made.calibration, 12, seed=1)
    draw(made.evaluation, 16, seed=2)
    label(made.evaluation, made.small)
    for card, folder in (
        (made.ruined, made.ruined_evaluation),
        (made.wrecked, made.wrecked_evaluation),
    ):
        shutil.copytree(made.evaluation, folder)
        label(folder, card)
    return made


def draw(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((96, 80), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:02}.png")


def label(folder: Path, card: Path) -> None:
    """Label the pictures as a float model does."""
    import torch

    from gnet_opt.stages.load import load

    model = load(str(card))
    files = sorted(folder.glob("*.png"))
    inputs = np.stack([model.preprocess.load(path) for path in files])
    with torch.no_grad():
        found = model.module(torch.from_numpy(inputs)).argmax(1).tolist()
    assert len(set(found)) >= 3
    rows = [f"{path.name},{LABELS[index]}" for path, index in zip(files, found, strict=True)]
    write_text(folder / "labels.csv", "\n".join(["file,label", *rows, ""]))
