"""Golden samples: inputs and outputs that a bundle must give again on every machine.

The outputs are those of reference semantics, which is what correct integer arithmetic computes;
a runtime's own kernels round in other places, so they are compared by SQNR. A picture with its
resized pixels proves that the machine reads and resizes pictures as the calibration did.
"""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from gnet_opt.bench.accuracy import sqnr_db
from gnet_opt.errors import BackendError, IntegrityError
from gnet_opt.files import atomic_path
from gnet_opt.images import ImageSet
from gnet_opt.preprocess import FloatArray, PixelArray, Preprocess
from gnet_opt.runtime import InputArray, Runner, run_all

FILE = "golden.npz"
COUNT = 8
"""Golden pictures in a bundle."""

TOLERANCE_DB = {"int8": 20.0, "mixed": 20.0, "fp16": 40.0, "fp32": 60.0}
"""Least SQNR between a machine's outputs and the golden ones. Correct INT8 kernels were measured
at 32 dB and more (ARM, x86 with VNNI), saturating ones at 13 dB and less."""

PIXEL_TOLERANCE = 2
"""Largest difference of a resized pixel; versions of Pillow differ by one level at most."""

_FORMS = {
    "outputs": ("float32", 2),
    "picture": ("uint8", 3),
    "picture_pixels": ("uint8", 3),
    "pixels": ("uint8", 4),
}
"""Type and number of dimensions of each array."""

# What NumPy and zipfile raise for damaged files, encrypted and unknown compression included.
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    RuntimeError,
    TypeError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the golden inputs of a bundle come from; whoever gets the bundle can see them.

    Attributes:
        kind: `calibration`, some of those images; `folder`, images that the user chose for it; or
            `drawn`, patterns that show nothing of anybody's.
        images: The images, None for `drawn`.
    """

    kind: Literal["calibration", "folder", "drawn"]
    images: ImageSet | None

    def pixels(self, preprocess: Preprocess, seed: int) -> PixelArray:
        """The golden inputs.

        Args:
            preprocess: How an image becomes the network's input.
            seed: Of what is drawn.

        Returns:
            uint8 of shape (N, crop, crop, planes), N from 1 to `COUNT`.

        Raises:
            CalibrationError: A file cannot be read as an image.
        """
        if self.images is None:
            return draw(COUNT, preprocess.crop, preprocess.planes, seed)
        return np.stack([preprocess.load_pixels(path) for path in self.images.files])

    def to_dict(self) -> dict[str, Any]:
        """The source as it stands in a manifest."""
        return {
            "images": COUNT if self.images is None else len(self.images),
            "set": self.images and self.images.name,
            "source": self.kind,
        }


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Golden samples.

    Attributes:
        pixels: uint8 of shape (N, crop, crop, 3), RGB, resized and cropped.
        outputs: float32 logits of shape (N, classes).
        picture: uint8 of shape (height, width, 3), RGB: a picture before resizing.
        picture_pixels: uint8 of shape (crop, crop, 3): what `Preprocess.pixels` makes of it.
    """

    pixels: PixelArray
    outputs: FloatArray
    picture: PixelArray
    picture_pixels: PixelArray

    @classmethod
    def make(cls, pixels: PixelArray, outputs: FloatArray, preprocess: Preprocess) -> Golden:
        """Put samples together with a drawn picture for the preprocess."""
        picture = draw_picture()
        resized = preprocess.pixels(Image.fromarray(picture))
        return cls(pixels=pixels, outputs=outputs, picture=picture, picture_pixels=resized)

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Read a golden file.

        Raises:
            IntegrityError: The file is damaged, or its arrays do not fit together.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                golden = cls(**{name: arrays[name] for name in cls.__dataclass_fields__})
        except _UNREADABLE as error:
            raise IntegrityError(
                f"{path} cannot be read ({error}). Copy the bundle again, or build it again."
            ) from error
        if not golden._fits():
            raise IntegrityError(f"{path}: inputs and outputs do not fit. Build the bundle again.")
        return golden

    def _fits(self) -> bool:
        arrays = {name: getattr(self, name) for name in _FORMS}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            return False
        forms = {name: (array.dtype.name, array.ndim) for name, array in arrays.items()}
        return (
            forms == _FORMS
            and all(array.size for array in arrays.values())
            and len(self.pixels) == len(self.outputs)
            and all(a.shape[-1] == 3 for a in (self.pixels, self.picture, self.picture_pixels))
        )

    def write(self, path: Path) -> None:
        """Write the arrays, compressed; equal arrays give equal bytes."""
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(
                stream,
                outputs=self.outputs,
                picture=self.picture,
                picture_pixels=self.picture_pixels,
                pixels=self.pixels,
            )

    def check_preprocess(self, preprocess: Preprocess) -> int:
        """Resize the golden picture on this machine.

        Returns:
            The largest difference of a pixel.

        Raises:
            IntegrityError: It is more than `PIXEL_TOLERANCE`.
        """
        here = preprocess.pixels(Image.fromarray(self.picture)).astype(np.int16)
        if here.shape != self.picture_pixels.shape:
            raise IntegrityError(
                f"The preprocess gives a picture of shape {here.shape} here and of "
                f"{self.picture_pixels.shape} in the golden samples. Build the bundle again."
            )
        worst = int(np.abs(here - self.picture_pixels).max())
        if worst > PIXEL_TOLERANCE:
            raise IntegrityError(
                f"This machine resizes the golden picture differently (by up to {worst} of 255 "
                "levels), so the model would see other pictures than it was calibrated on. "
                "Install a current Pillow: pip install --upgrade pillow"
            )
        return worst

    def replay(
        self, runner: Runner, inputs: InputArray, tolerance: float, backend: str
    ) -> float | None:
        """Run the golden inputs and compare with the golden outputs.

        Args:
            runner: The model on this machine.
            inputs: `pixels` as the model takes them: what `Preprocess.tensor` gives.
            tolerance: Least SQNR, in dB.
            backend: What runs it, for messages.

        Returns:
            The SQNR in dB, None when the outputs are identical.

        Raises:
            BackendError: The runner fails, or its logits are not finite.
            IntegrityError: The SQNR is below the tolerance.
        """
        outputs = run_all(runner, inputs)
        if outputs.shape != self.outputs.shape:
            raise IntegrityError(
                f"{backend} gives logits of shape {outputs.shape}, the golden outputs have "
                f"{self.outputs.shape}. Build the bundle again."
            )
        if not np.isfinite(outputs).all():
            raise BackendError(f"{backend} gives logits that are not finite on the golden inputs.")
        measured = sqnr_db(self.outputs, outputs)
        if measured is not None and measured < tolerance:
            raise IntegrityError(
                f"{backend} does not give the golden outputs here: SQNR {measured:.1f} dB, "
                f"at least {tolerance:.0f} dB are needed. Was the bundle made for another CPU? "
                "Build one with --target cpu on this machine, or for it."
            )
        return measured


def draw_picture() -> PixelArray:
    """A picture of 320 x 280 pixels with edges, ramps and fine texture, drawn in integers alone."""
    y, x = np.mgrid[0:280, 0:320].astype(np.int64)
    checks = ((x // 7 + y // 11) % 2) * 160
    rings = ((x - 130) ** 2 + (y - 150) ** 2) // 190 % 256
    texture = (x * 31 + y * 57 + x * y % 89) % 97
    channels: npt.NDArray[np.int64] = np.stack(
        [(checks + texture) % 256, rings, (x * 4 // 5 + texture) % 256], axis=-1
    )
    return channels.astype(np.uint8)


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
