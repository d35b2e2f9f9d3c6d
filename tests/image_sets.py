"""Small image sets on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from gnet_opt.images import ImageSet


def draw(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def in_folders(root: Path) -> Path:
    for index, name in enumerate(["cat/b.png", "cat/a.png", "ant/z.png", "dog/m.png"]):
        draw(root / name, index)
    return root


def in_table(root: Path, text: str, files: int = 3) -> Path:
    for index in range(files):
        draw(root / f"{index}.png", index)
    (root / "labels.csv").write_bytes(text.encode())
    return root


def names(images: ImageSet) -> list[str]:
    return [path.name for path in images.files]
