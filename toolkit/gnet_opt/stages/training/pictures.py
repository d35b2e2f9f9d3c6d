"""Training pictures: read once, cropped, mirrored and recoloured at random."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from gnet_opt.pictures import open_picture, resize
from gnet_opt.preprocess import PixelArray, Preprocess
from gnet_opt.progress import Progress
from gnet_opt.stages.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

_CACHE_BYTES = 6 << 30
_PHOTOMETRIC_CHANNELS = np.array([0.299, 0.587, 0.114], np.float32)
# Standard deviations and axes of RGB values over ImageNet (Krizhevsky et al. 2012, section 4.1,
# numbers as in the public reimplementations), on the 0..1 scale.
_LIGHTING_DEVIATIONS = np.array([0.2175, 0.0188, 0.0045], np.float32)
_LIGHTING_AXES = np.array(
    [
        [-0.5675, 0.7192, 0.4009],
        [-0.5808, -0.0045, -0.8140],
        [-0.5836, -0.6948, 0.4203],
    ],
    np.float32,
)


class Pictures:
    """The training pictures, decoded once and kept in memory as far as they fit."""

    def __init__(self, files: tuple[Path, ...], preprocess: Preprocess, progress: Progress) -> None:
        self._files = files
        self._preprocess = preprocess
        self._kept: dict[int, PixelArray] = {}
        room = _CACHE_BYTES
        # Reading all of them now finds a bad picture before hours of training, not after.
        for index, _ in enumerate(progress(files, "reading pictures", len(files))):
            pixels = self._decode(index)
            room -= pixels.nbytes
            if room >= 0:
                self._kept[index] = pixels

    def __getitem__(self, index: int) -> PixelArray:
        kept = self._kept.get(index)
        return self._decode(index) if kept is None else kept

    def _decode(self, index: int) -> PixelArray:
        with open_picture(self._files[index]) as image:
            picture = self._preprocess.decode(image)
        shrink = self._preprocess.resize / min(picture.size)
        if shrink < 1:
            width, height = picture.size
            size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
            picture = resize(picture, size, Image.Resampling.BILINEAR)
        return np.asarray(picture)


def crop_box(
    rng: np.random.Generator, width: int, height: int, min_area: float
) -> tuple[float, float, float, float]:
    """A random crop: even in area, log-even in aspect ratio from 3/4 to 4/3.

    Args:
        rng: Random numbers.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
        min_area: Least area as a share of the picture's.

    Returns:
        Left, top, right and bottom in pixels, inside the picture.
    """
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    side = float(min(width, height))
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def color_change(
    rng: np.random.Generator, strength: float
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Random brightness, contrast, saturation and light color as one affine map of RGB.

    Howard 2013 (arXiv:1312.5402) applies the first three in random order and adds the lighting
    noise of Krizhevsky et al. 2012. Contrast turns about mid-grey here, not about the picture's
    mean, so that the whole is one matrix.

    Returns:
        `matrix` of shape (3, 3) and `offset` of shape (3,): the pixels x on the 0..255 scale
        become `x @ matrix + offset`.
    """
    matrix = np.eye(3, dtype=np.float32)
    offset = np.zeros(3, np.float32)
    if strength == 0:
        return matrix, offset
    for kind in rng.permutation(3):
        factor = np.float32(rng.uniform(1 - strength, 1 + strength))
        if kind == 0:
            matrix, offset = matrix * factor, offset * factor
        elif kind == 1:
            matrix, offset = matrix * factor, offset * factor + 127.5 * (1 - factor)
        else:
            grey = np.tile(_PHOTOMETRIC_CHANNELS[:, None], (1, 3))
            mix = np.eye(3, dtype=np.float32) * factor + grey * (1 - factor)
            matrix, offset = matrix @ mix, offset @ mix
    lighting = _LIGHTING_AXES @ (rng.normal(0, 0.1, 3).astype(np.float32) * _LIGHTING_DEVIATIONS)
    return matrix.astype(np.float32), (offset + 255 * lighting).astype(np.float32)


def make_batch(
    pictures: Pictures,
    indices: npt.NDArray[np.int64],
    rng: np.random.Generator,
    recipe: Recipe,
    preprocess: Preprocess,
    size: int,
) -> Tensor:
    """Augmented and normalised pictures of shape (N, 3, size, size), channels last in memory."""
    import torch

    pixels = np.empty((len(indices), size, size, 3), np.uint8)
    matrices = np.empty((len(indices), 3, 3), np.float32)
    offsets = np.empty((len(indices), 1, 3), np.float32)
    for row, index in enumerate(indices):
        source = pictures[int(index)]
        box = crop_box(rng, source.shape[1], source.shape[0], recipe.min_crop)
        image = Image.fromarray(source).resize((size, size), Image.Resampling.BILINEAR, box=box)
        cropped = np.asarray(image)
        pixels[row] = cropped[:, ::-1] if rng.random() < 0.5 else cropped
        matrices[row], offsets[row, 0] = color_change(rng, recipe.photometric)
    x = torch.from_numpy(pixels).view(len(indices), size * size, 3).float()
    x = torch.baddbmm(torch.from_numpy(offsets), x, torch.from_numpy(matrices)).clamp_(0, 255)
    if preprocess.channels == "bgr":
        x = x.flip(-1)
    x = (x - torch.tensor(preprocess.mean)) / torch.tensor(preprocess.std)
    return x.view(len(indices), size, size, 3).permute(0, 3, 1, 2)
