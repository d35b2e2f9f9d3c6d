"""The models and pictures that the commands are tested with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
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


@dataclass(frozen=True)
class World:
    """Models and pictures that every test may read.

    Attributes:
        small: The card of a model that quantizes well.
        hostile: The card of one that does not.
        calibration: Twelve pictures without labels.
        evaluation: Sixteen others, with the labels that the float model gives them.
    """

    small: Path
    hostile: Path
    calibration: Path
    evaluation: Path


def make_world(root: Path) -> World:
    made = World(
        small=root / "small.toml",
        hostile=root / "hostile.toml",
        calibration=root / "calibration",
        evaluation=root / "evaluation",
    )
    for path in (made.small, made.hostile):
        path.write_text(CARD.format(name=path.stem))
    draw(made.calibration, 12, seed=1)
    draw(made.evaluation, 16, seed=2)
    label(made.evaluation)
    return made


def draw(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        coarse = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((96, 80), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:02}.png")


def label(folder: Path) -> None:
    """Label the pictures as the float model does."""
    import torch
    from factories import small

    files = sorted(folder.glob("*.png"))
    inputs = np.stack([PREPROCESS.load(path) for path in files])
    with torch.no_grad():
        found = small()(torch.from_numpy(inputs)).argmax(1).tolist()
    assert len(set(found)) >= 3
    rows = [f"{path.name},{LABELS[index]}" for path, index in zip(files, found, strict=True)]
    write_text(folder / "labels.csv", "\n".join(["file,label", *rows, ""]))
