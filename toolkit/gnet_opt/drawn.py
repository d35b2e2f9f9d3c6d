"""Pictures that need no file: what stages, golden samples and timings use where none is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from gnet_opt.errors import ModelError
from gnet_opt.pictures import resize
from gnet_opt.preprocess import IMAGENET, PixelArray, Preprocess
from gnet_opt.runtime import InputArray

_ANY = {
    1: Preprocess(channels="gray"),
    3: IMAGENET,
    4: Preprocess(channels="rgba", mean=(127.5,) * 4, std=(127.5,) * 4),
}
"""What an ONNX file of so many planes may be given to be timed."""


def draw_picture(planes: int = 3) -> PixelArray:
    """A picture of 320 x 280 pixels with edges, ramps and fine texture, drawn in integers alone.

    Args:
        planes: Those of the model. With 4 the picture is RGBA, else RGB, as most files are.
    """
    y, x = np.mgrid[0:280, 0:320].astype(np.int64)
    checks = ((x // 7 + y // 11) % 2) * 160
    rings = ((x - 130) ** 2 + (y - 150) ** 2) // 190 % 256
    texture = (x * 31 + y * 57 + x * y % 89) % 97
    drawn = [
        (checks + texture) % 256,
        rings,
        (x * 4 // 5 + texture) % 256,
        (x * 3 + y * 5 + rings) % 256,
    ]
    channels: npt.NDArray[np.int64] = np.stack(drawn[: bands(planes)], axis=-1)
    return channels.astype(np.uint8)


def bands(planes: int) -> int:
    """The bands of the golden picture for a model of so many planes."""
    return 4 if planes == 4 else 3


def draw(count: int, size: int, planes: int, seed: int) -> PixelArray:
    """Draw images that differ from each other and show nothing of anybody's.

    Like photographs they have less contrast the finer the detail (D. J. Field, "Relations between
    the statistics of natural images and the response properties of cortical cells", Journal of the
    Optical Society of America A 4 (1987), 2379-2394), and objects with edges before a ground, so
    that the activations of a trained network are in their usual ranges.

    Args:
        count: How many.
        size: Height and width in pixels.
        planes: Channels.
        seed: The same seed draws the same images.

    Returns:
        uint8 of shape (count, size, size, planes).
    """
    chance = np.random.default_rng(seed)
    return np.stack([_draw_one(size, planes, chance) for _ in range(count)])


def _draw_one(size: int, planes: int, chance: np.random.Generator) -> PixelArray:
    y, x = np.mgrid[0:size, 0:size] / size
    image = _clouds(size, planes, chance)
    for _ in range(int(chance.integers(1, 6))):
        middle, radii = chance.uniform(0.1, 0.9, 2), chance.uniform(0.05, 0.4, 2)
        across = (np.abs(np.stack([y, x], -1) - middle) / radii) ** chance.choice([2.0, 8.0])
        inside = (across.sum(-1) < 1.0)[..., None]
        colour = chance.uniform(-1.0, 1.0, planes) + 0.4 * _clouds(size, planes, chance)
        image = np.where(inside, colour, image)
    image = (image - image.min()) / max(float(np.ptp(image)), 1e-9)
    pixels: PixelArray = np.rint(255.0 * image).astype(np.uint8)
    return pixels


def _clouds(size: int, planes: int, chance: np.random.Generator) -> npt.NDArray[np.float64]:
    """Smooth noise of several finenesses, the finer the fainter, mostly the same in all planes."""
    total = np.zeros((size, size, planes))
    for cells in (2, 4, 8, 16, 32, 64):
        shared = chance.uniform(-1.0, 1.0, (cells, cells, 1))
        own = chance.uniform(-1.0, 1.0, (cells, cells, planes))
        for plane in range(planes):
            coarse = Image.fromarray((shared[..., 0] + 0.5 * own[..., plane]).astype(np.float32))
            fine = coarse.resize((size, size), Image.Resampling.BICUBIC)
            total[..., plane] += np.asarray(fine, np.float64) * 2.0 / cells
    return total


def drawn_examples(preprocess: Preprocess) -> PixelArray:
    """The drawn picture as the network sees it: as it is, mirrored and turned.

    Returns:
        uint8 of shape (4, crop, crop, planes).
    """
    picture = draw_picture(preprocess.planes)
    views = (picture, picture[:, ::-1], picture[::-1], np.swapaxes(picture, 0, 1))
    return np.stack([preprocess.pixels(Image.fromarray(view)) for view in views])


def drawn_input(path: Path) -> InputArray:
    """The drawn picture as the input of an ONNX file, with the usual mean and deviation.

    Which picture it is hardly matters for the time of dense layers.

    Raises:
        ModelError: The file does not take one picture of a fixed size and of one, three or four
            planes, in float32 or as pixels.
    """
    import onnx_ir as ir

    from gnet_opt.quantization.regions import load_graph

    graph = load_graph(path).graph
    given = [value for value in graph.inputs if value.name not in graph.initializers]
    shape = list(given[0].shape) if len(given) == 1 and given[0].shape is not None else []
    pixels = bool(shape) and given[0].dtype == ir.DataType.UINT8
    planes, sizes = (shape[3:], shape[1:3]) if pixels else (shape[1:2], shape[2:])
    if (
        len(shape) != 4
        or planes not in ([1], [3], [4])
        or not all(isinstance(size, int) for size in sizes)
        or (isinstance(shape[0], int) and shape[0] != 1)
        or given[0].dtype not in (ir.DataType.FLOAT, ir.DataType.UINT8)
    ):
        raise ModelError(
            f"{path} does not take one picture: its layers are timed with a float32 input of shape "
            "(1, 3, height, width) or a uint8 one of shape (1, height, width, 3), or with 1 or 4 "
            "planes in place of the 3, height and width fixed. Export it with such an input."
        )
    height, width = (int(str(size)) for size in sizes)
    preprocess = replace(_ANY[int(str(planes[0]))], input="uint8" if pixels else "float32")
    picture = preprocess.decode(Image.fromarray(draw_picture(preprocess.planes)))
    fitted = np.asarray(resize(picture, (width, height), Image.Resampling.BICUBIC))
    return preprocess.tensor(fitted.reshape(1, height, width, preprocess.planes))
