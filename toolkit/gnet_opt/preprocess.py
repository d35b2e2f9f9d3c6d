"""The one description of how a picture becomes the network's input.

Calibration, evaluation, the golden samples and the device runtime all use the same `Preprocess`;
it is written into every bundle.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from gnet_opt.errors import CalibrationError, ConfigError
from gnet_opt.runtime import InputArray

FloatArray = npt.NDArray[np.float32]
PixelArray = npt.NDArray[np.uint8]

INPUTS = ("float32", "uint8")
"""What the input of a model can be; see `Preprocess.input`."""

_INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}


_LARGEST = 8192
"""Largest side to resize to, in pixels; more is a mistake or an attack on memory."""

_MOST_OBLONG = 100
"""Largest ratio of sides; beyond it resizing the shorter side makes a picture of gigabytes."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Resize, centre crop, channel order and normalisation, in this order.

    Resizing and cropping follow torchvision's `Resize` and `CenterCrop` on PIL images, which is
    the pipeline that the published weights were evaluated with.

    Attributes:
        resize: Length of the shorter side after resizing, in pixels.
        crop: Side of the square centre crop, in pixels; the network's input size.
        interpolation: `bilinear`, `bicubic` or `nearest`, always with antialiasing.
        channels: `rgb` or `bgr`, the order of the network's input channels.
        mean: Subtracted per channel, in `channels` order, on the 0..255 scale.
        std: Divided by per channel, in `channels` order, on the 0..255 scale.
        input: What the model takes: `float32`, normalised values (N, 3, crop, crop), or `uint8`,
            RGB pixels (N, crop, crop, 3) that its own first nodes normalise.
    """

    resize: int = 256
    crop: int = 224
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    channels: Literal["rgb", "bgr"] = "rgb"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    input: Literal["float32", "uint8"] = "float32"

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize <= _LARGEST:
            raise ConfigError(
                f"preprocess.resize ({self.resize}) must be at least preprocess.crop "
                f"({self.crop}), and both between 1 and {_LARGEST}."
            )
        if self.interpolation not in tuple(_INTERPOLATIONS):
            known = ", ".join(_INTERPOLATIONS)
            raise ConfigError(
                f"preprocess.interpolation is {self.interpolation!r}; it must be one of {known}."
            )
        if self.channels not in ("rgb", "bgr"):
            raise ConfigError(f"preprocess.channels is {self.channels!r}; it must be rgb or bgr.")
        if self.input not in INPUTS:
            raise ConfigError(
                f"preprocess.input is {self.input!r}; it must be {' or '.join(INPUTS)}."
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not np.all(np.isfinite(values)):
                raise ConfigError(f"preprocess.{name} must be three finite numbers, one a channel.")
        if min(self.std) <= 0:
            raise ConfigError("preprocess.std must be three positive numbers.")
        if max(self.std) < 1 and max(self.mean) <= 1:
            raise ConfigError(
                "preprocess.mean and preprocess.std look like values on the 0..1 scale; they are "
                "on the 0..255 scale here. Multiply both by 255."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Read the `[preprocess]` table of a card or a manifest.

        Raises:
            ConfigError: A key is unknown or a value does not fit.
        """
        if not isinstance(values, Mapping):
            raise ConfigError("preprocess is not a table.")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"preprocess.{unknown[0]} is not known; the keys are {', '.join(sorted(known))}."
            )
        arguments = dict(values)
        for name in ("mean", "std"):
            if name in arguments:
                numbers = arguments[name]
                if not isinstance(numbers, list) or not all(_is_number(n) for n in numbers):
                    raise ConfigError(f"preprocess.{name} is {numbers!r}; it must be a list.")
                arguments[name] = tuple(float(number) for number in numbers)
        for name in ("resize", "crop"):
            if name in arguments and type(arguments[name]) is not int:
                raise ConfigError(f"preprocess.{name} is {arguments[name]!r}, not an integer.")
        return cls(**arguments)

    def to_dict(self) -> dict[str, Any]:
        """The table as it stands in a card or a manifest; without `input` where that is usual."""
        values = dataclasses.asdict(self)
        if self.input == "float32":  # bundles had no such key once, and nothing else is meant
            del values["input"]
        return {**values, "mean": list(self.mean), "std": list(self.std)}

    def pixels(self, image: Image.Image) -> PixelArray:
        """Resize and crop one picture.

        Returns:
            uint8 pixels of shape (crop, crop, 3), RGB whatever `channels` is.
        """
        if image.mode.startswith("I") or image.mode == "F":
            # Pillow would clip their values to 255 and give a white picture.
            raise ValueError(f"{image.mode} pixels have more than 8 bits; convert it to 8 bits")
        image = image.convert("RGB")
        width, height = image.size
        if max(width, height) > _MOST_OBLONG * min(width, height):
            raise ValueError(f"{width} x {height} pixels are no picture")
        if width <= height:
            size = (self.resize, int(self.resize * height / width))
        else:
            size = (int(self.resize * width / height), self.resize)
        if size != image.size:
            image = image.resize(size, _INTERPOLATIONS[self.interpolation])
        left = round((size[0] - self.crop) / 2.0)
        top = round((size[1] - self.crop) / 2.0)
        return np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))

    def tensor(self, pixels: PixelArray) -> InputArray:
        """Turn RGB pixels into what the model takes.

        Args:
            pixels: uint8 of shape (..., crop, crop, 3), RGB.

        Returns:
            What `normalize` gives, or for a model with `uint8` input the pixels.
        """
        return np.ascontiguousarray(pixels) if self.input == "uint8" else self.normalize(pixels)

    def normalize(self, pixels: PixelArray) -> FloatArray:
        """Turn RGB pixels into the values that the network computes with, whatever `input` is.

        Args:
            pixels: uint8 of shape (..., crop, crop, 3), RGB.

        Returns:
            float32 of shape (..., 3, crop, crop), in `channels` order.
        """
        values = pixels[..., ::-1] if self.channels == "bgr" else pixels
        mean = np.asarray(self.mean, np.float32).reshape(3, 1, 1)
        std = np.asarray(self.std, np.float32).reshape(3, 1, 1)
        # Channels first, while they are bytes, and then in place: over a last axis of three NumPy's
        # arithmetic takes several times as long.
        planes = np.ascontiguousarray(np.moveaxis(values, -1, -3)).astype(np.float32)
        planes -= mean
        planes /= std
        return planes

    def load(self, path: Path) -> InputArray:
        """Read one picture file as what the model takes.

        Returns:
            float32 of shape (3, crop, crop), or uint8 of shape (crop, crop, 3).

        Raises:
            CalibrationError: The file cannot be read as a picture.
        """
        return self.tensor(self.load_pixels(path))

    def load_pixels(self, path: Path) -> PixelArray:
        """Read one picture file, resized and cropped.

        Returns:
            uint8 of shape (crop, crop, 3), RGB.

        Raises:
            CalibrationError: The file cannot be read as a picture.
        """
        with open_picture(path) as image:
            return self.pixels(image)


@contextlib.contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Open a picture file; its pixels are read when they are used inside the block.

    Raises:
        CalibrationError: The file cannot be read as a picture, here or inside the block.
    """
    try:
        with Image.open(path) as image:
            yield image
    # Pillow's readers have no common error: a damaged file raises OSError, ValueError,
    # SyntaxError, struct.error, a decompression bomb and more.
    except Exception as error:
        raise CalibrationError(
            f"{path} cannot be read as a picture ({error}). Remove or replace the file."
        ) from error


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


IMAGENET = Preprocess()
"""What torchvision's ImageNet weights expect before the network's own `transform_input`."""

INCEPTION = Preprocess(mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5))
"""`IMAGENET` followed by `transform_input`, in one exact step: x / 127.5 - 1 on 0..255 pixels."""
