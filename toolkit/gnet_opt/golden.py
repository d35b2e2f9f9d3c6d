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
from PIL import Image

from gnet_opt.bench.accuracy import sqnr_db
from gnet_opt.drawn import bands, draw, draw_picture
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
        pixels: uint8 of shape (N, crop, crop, planes), RGB, grey or RGBA, resized and cropped.
        outputs: float32 logits of shape (N, classes).
        picture: uint8 of shape (height, width, 3), RGB, or (height, width, 4), RGBA, where the
            model takes four planes: a picture before it is converted and resized.
        picture_pixels: uint8 of shape (crop, crop, planes): what `Preprocess.pixels` makes of it.
    """

    pixels: PixelArray
    outputs: FloatArray
    picture: PixelArray
    picture_pixels: PixelArray

    @classmethod
    def make(cls, pixels: PixelArray, outputs: FloatArray, preprocess: Preprocess) -> Golden:
        """Put samples together with a drawn picture for the preprocess."""
        picture = draw_picture(preprocess.planes)
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
        if forms != _FORMS or not all(array.size for array in arrays.values()):
            return False
        planes = self.pixels.shape[-1]
        return (
            len(self.pixels) == len(self.outputs)
            and planes in (1, 3, 4)
            and self.picture_pixels.shape[-1] == planes
            and self.picture.shape[-1] == bands(planes)
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

    def check_preprocess(self, preprocess: Preprocess) -> None:
        """Resize the golden picture on this machine.

        Every version of Pillow from 9.4 to 13 gives the same pixels, on x86-64 and on Arm.

        Raises:
            IntegrityError: A pixel is another one.
        """
        shape = (preprocess.crop, preprocess.crop, preprocess.planes)
        if self.picture_pixels.shape != shape:
            raise IntegrityError(
                f"The preprocess gives a picture of shape {shape} here and of "
                f"{self.picture_pixels.shape} in the golden samples. Build the bundle again."
            )
        here = preprocess.pixels(Image.fromarray(self.picture)).astype(np.int16)
        worst = int(np.abs(here - self.picture_pixels).max())
        if worst:
            raise IntegrityError(
                f"This machine resizes the golden picture differently (by up to {worst} of 255 "
                "levels), so the model would see other pictures than it was calibrated on. "
                "Install a current Pillow: pip install --upgrade pillow"
            )

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
