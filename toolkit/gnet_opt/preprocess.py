"""The one description of how a picture becomes the network's input.

Calibration, evaluation, the golden samples and the device runtime all use the same `Preprocess`;
it is written into every bundle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from gnet_opt.errors import CalibrationError, ConfigError
from gnet_opt.pictures import open_picture, orientation, resize, upright
from gnet_opt.printable import shown
from gnet_opt.runtime import InputArray

FloatArray = npt.NDArray[np.float32]
PixelArray = npt.NDArray[np.uint8]

INPUTS = ("float32", "uint8")
"""What the input of a model can be; see `Preprocess.input`."""

ORIENTATIONS = ("as stored", "upright")
"""How a picture with an EXIF orientation is taken; see `Preprocess.orientation`."""

_PLANES = {"rgb": 3, "bgr": 3, "gray": 1, "rgba": 4}
_MODES = {"rgb": "RGB", "bgr": "RGB", "gray": "L", "rgba": "RGBA"}
_NUMBERS = {1: "one finite number", 3: "three finite numbers", 4: "four finite numbers"}

_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_USUAL = {
    "rgb": (_MEAN, _STD),
    "bgr": (_MEAN, _STD),
    "gray": ((114.495,), (57.63,)),
}
"""Mean and deviation where none are given: ImageNet's, for grey the mean of each over its channels.
What a fourth channel holds nobody can know."""

_INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
}


_LARGEST = 8192
"""Largest side to resize to, in pixels; more is a mistake or an attack on memory."""

_MOST_OBLONG = 100
"""Largest ratio of sides; beyond it resizing the shorter side makes a picture of gigabytes."""

_WHITEST = 65535
"""The largest value of 16 bits."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Orientation, channels, resize, centre crop, and normalisation, in this order.

    Resizing and cropping follow torchvision's `Resize` and `CenterCrop` on PIL images, which is
    the pipeline that the published weights were evaluated with. Whatever a file holds (grey,
    palette, CMYK, transparency, several frames) becomes RGB as in torchvision's `pil_loader`:
    alpha is dropped, and the first frame counts.

    Attributes:
        resize: Length of the shorter side after resizing, in pixels.
        crop: Side of the square centre crop, in pixels; the network's input size.
        interpolation: `bilinear`, `bicubic` or `nearest`, always with antialiasing.
        channels: What the network's input channels are, in their order: `rgb`, `bgr`; `gray`, one
            channel, into which colour is converted by the luma of ITU-R BT.601,
            (299 R + 587 G + 114 B) / 1000, as Pillow's mode L; or `rgba`, where the fourth band of
            the file is data like the others (depth, infrared), and a file without it is refused.
        mean: Subtracted per channel, in `channels` order, on the 0..255 scale. Without it
            ImageNet's; for `gray` the mean of its three numbers; for `rgba` it must be given.
        std: Divided by per channel, in `channels` order, on the 0..255 scale; without it as `mean`.
        input: What the model takes: `float32`, normalised values (N, planes, crop, crop), or
            `uint8`, pixels (N, crop, crop, planes) that its own first nodes normalise: RGB, grey
            or RGBA.
        orientation: `as stored`, which ignores an EXIF orientation as torchvision does, or
            `upright`, which follows it. TIFF files are turned by Pillow itself in both.
        white16: The value of a 16-bit greyscale picture that becomes 255: 65535 for the full
            range, 4095 for one of 12 bits. A value v becomes v * 255 // white16, at most 255.
            Without it such pictures are refused, because only their owner knows the range.
    """

    resize: int = 256
    crop: int = 224
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    channels: Literal["rgb", "bgr", "gray", "rgba"] = "rgb"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    input: Literal["float32", "uint8"] = "float32"
    orientation: Literal["as stored", "upright"] = "as stored"
    white16: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.resize <= _LARGEST:
            raise ConfigError(
                f"preprocess.resize ({_shown(self.resize)}) must be at least preprocess.crop "
                f"({_shown(self.crop)}), and both between 1 and {_LARGEST}."
            )
        if self.interpolation not in tuple(_INTERPOLATIONS):
            known = ", ".join(_INTERPOLATIONS)
            raise ConfigError(
                f"preprocess.interpolation is {_shown(self.interpolation)}; "
                f"it must be one of {known}."
            )
        for name, values in (
            ("channels", tuple(_PLANES)),
            ("input", INPUTS),
            ("orientation", ORIENTATIONS),
        ):
            if getattr(self, name) not in values:
                raise ConfigError(
                    f"preprocess.{name} is {_shown(getattr(self, name))}; "
                    f"it must be {' or '.join(values)}."
                )
        if self.white16 is not None and not 255 <= self.white16 <= _WHITEST:
            raise ConfigError(
                f"preprocess.white16 is {_shown(self.white16)}; it is the value of 16-bit "
                f"pictures that is white, between 255 and {_WHITEST}."
            )
        self._check_normalization()

    def _check_normalization(self) -> None:
        """Put the usual mean and deviation where none are given, and check them."""
        for index, name in enumerate(("mean", "std")):
            values = getattr(self, name)
            if not values and self.channels in _USUAL:
                object.__setattr__(self, name, _USUAL[self.channels][index])
            elif len(values) != self.planes or not np.all(np.isfinite(values)):
                raise ConfigError(
                    f"preprocess.{name} must be {_NUMBERS[self.planes]}, one a channel of "
                    f"channels = {self.channels}."
                )
        if min(self.std) <= 0:
            raise ConfigError("preprocess.std must be positive.")
        if max(self.std) < 1 and max(self.mean) <= 1:
            raise ConfigError(
                "preprocess.mean and preprocess.std look like values on the 0..1 scale; they are "
                "on the 0..255 scale here. Multiply both by 255."
            )

    @property
    def planes(self) -> int:
        """The number of the network's input channels: 3, for `gray` 1 and for `rgba` 4."""
        return _PLANES[self.channels]

    @property
    def alpha(self) -> str:
        """What becomes of transparency: `dropped`, or for `rgba` `kept` as the fourth channel."""
        return "kept" if self.channels == "rgba" else "dropped"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Read the `[preprocess]` table of a card or a manifest.

        Raises:
            ConfigError: A key is unknown or a value does not fit.
        """
        if not isinstance(values, Mapping):
            raise ConfigError("preprocess is not a table.")
        known = {"alpha", *(field.name for field in dataclasses.fields(cls))}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"preprocess.{shown(unknown[0], 80)} is not known; the keys are "
                f"{', '.join(sorted(known))}."
            )
        arguments = dict(values)
        alpha = arguments.pop("alpha", None)
        for name in ("mean", "std"):
            if name in arguments:
                arguments[name] = _numbers(name, arguments[name])
        for name in ("resize", "crop", "white16"):
            if name in arguments and type(arguments[name]) is not int:
                raise ConfigError(
                    f"preprocess.{name} is {_shown(arguments[name])}, not an integer."
                )
        made = cls(**arguments)
        if alpha is not None and alpha != made.alpha:
            raise ConfigError(
                f"preprocess.alpha is {_shown(alpha)}, but with channels = {made.channels} alpha "
                f"is always {made.alpha}. Correct it or leave it out."
            )
        return made

    def to_dict(self) -> dict[str, Any]:
        """The table as it stands in a card or a manifest.

        `input` and `white16` are left out where they say nothing beyond what is usual, `alpha` is
        there for who reads it.
        """
        values = dataclasses.asdict(self)
        if self.input == "float32":  # bundles had no such key once, and nothing else is meant
            del values["input"]
        if self.white16 is None:
            del values["white16"]
        return {**values, "alpha": self.alpha, "mean": list(self.mean), "std": list(self.std)}

    def pixels(self, image: Image.Image) -> PixelArray:
        """Make the network's picture of an opened one, before it is normalised.

        Returns:
            uint8 pixels of shape (crop, crop, planes): RGB whatever the order in `channels`, grey
            for `gray`, or RGBA.

        Raises:
            CalibrationError: The picture has not what this preprocess needs.
        """
        return self.fit(self.decode(image))

    def decode(self, image: Image.Image) -> Image.Image:
        """Read the pixels of an opened picture.

        Returns:
            The whole picture, turned as `orientation` says, of mode RGB, L for `gray` or RGBA.

        Raises:
            CalibrationError: Its pixels have more than 8 bits and `white16` is not given, or it
                has no fourth band and `channels` is `rgba`.
        """
        self.check(image)
        turned = orientation(image) if self.orientation == "upright" else 1
        if _is_deep(image):
            image = self._eight_bits(image)
        mode = _MODES[self.channels]
        if mode == "L" and image.mode != "L":
            image = image.convert("RGB")  # so that the way to grey is one, whatever the file holds
        return upright(image.convert(mode), turned)

    def check(self, image: Image.Image) -> None:
        """Refuse an opened picture that this preprocess cannot use, by its head alone.

        Raises:
            CalibrationError: Its pixels have more than 8 bits and `white16` is not given, or it
                has no fourth band and `channels` is `rgba`.
        """
        if _is_deep(image) and self.white16 is None:
            raise CalibrationError(
                f"Its pixels are {image.mode}, which have more than 8 bits. Say under [preprocess] "
                "of the model card which value is white: white16 = 65535 where all 16 bits are "
                "used, 4095 where 12 are; or convert the pictures to 8 bits."
            )
        if self.channels == "rgba" and not _has_fourth_band(image):
            raise CalibrationError(
                f"It has no fourth band (its pixels are {image.mode}), and the model takes one: "
                "preprocess.channels is rgba. Use PNG or TIFF files with four bands, the fourth "
                "stored as unassociated alpha."
            )

    def _eight_bits(self, image: Image.Image) -> Image.Image:
        """A greyscale picture of more than 8 bits as one of 8, by `white16`.

        Pillow would clip its values to 255 and give a white picture.
        """
        assert self.white16 is not None  # see check
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > _WHITEST:
            raise CalibrationError(
                f"Its pixels are {image.mode} and not whole numbers of 16 bits, 0..{_WHITEST}. "
                "Convert the pictures to 8 or 16 bits."
            )
        levels = np.minimum(values.astype(np.int64) * 255 // self.white16, 255)
        return Image.fromarray(levels.astype(np.uint8))

    def fit(self, image: Image.Image) -> PixelArray:
        """Resize and crop a decoded picture, as `pixels` does.

        Args:
            image: What `decode` gives.
        """
        width, height = image.size
        if max(width, height) > _MOST_OBLONG * min(width, height):
            raise ValueError(f"{width} x {height} pixels are no picture")
        if width <= height:
            size = (self.resize, int(self.resize * height / width))
        else:
            size = (int(self.resize * width / height), self.resize)
        image = resize(image, size, _INTERPOLATIONS[self.interpolation])
        left = round((size[0] - self.crop) / 2.0)
        top = round((size[1] - self.crop) / 2.0)
        crop = image.crop((left, top, left + self.crop, top + self.crop))
        return np.asarray(crop).reshape(self.crop, self.crop, self.planes)

    def tensor(self, pixels: PixelArray) -> InputArray:
        """Turn pixels into what the model takes.

        Args:
            pixels: uint8 of shape (..., crop, crop, planes), as `pixels` gives them.

        Returns:
            What `normalize` gives, or for a model with `uint8` input the pixels.
        """
        return np.ascontiguousarray(pixels) if self.input == "uint8" else self.normalize(pixels)

    def normalize(self, pixels: PixelArray) -> FloatArray:
        """Turn pixels into the values that the network computes with, whatever `input` is.

        Args:
            pixels: uint8 of shape (..., crop, crop, planes), as `pixels` gives them.

        Returns:
            float32 of shape (..., planes, crop, crop), in `channels` order.
        """
        values = pixels[..., ::-1] if self.channels == "bgr" else pixels
        mean = np.asarray(self.mean, np.float32).reshape(-1, 1, 1)
        std = np.asarray(self.std, np.float32).reshape(-1, 1, 1)
        # Channels first, while they are bytes, and then in place: over a last axis of three NumPy's
        # arithmetic takes several times as long.
        planes = np.ascontiguousarray(np.moveaxis(values, -1, -3)).astype(np.float32)
        planes -= mean
        planes /= std
        return planes

    def load(self, path: Path) -> InputArray:
        """Read one picture file as what the model takes.

        Returns:
            float32 of shape (planes, crop, crop), or uint8 of shape (crop, crop, planes).

        Raises:
            CalibrationError: The file cannot be read as a picture, or not as this one needs it.
        """
        return self.tensor(self.load_pixels(path))

    def load_pixels(self, path: Path) -> PixelArray:
        """Read one picture file, resized and cropped.

        Returns:
            uint8 of shape (crop, crop, planes), as `pixels` gives them.

        Raises:
            CalibrationError: The file cannot be read as a picture, or not as this one needs it.
        """
        with open_picture(path) as image:
            return self.pixels(image)


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _has_fourth_band(image: Image.Image) -> bool:
    """Whether a picture has alpha in any of the forms in which files keep it."""
    return image.mode in ("RGBA", "LA", "PA") or (
        "transparency" in image.info and not _is_deep(image)
    )


def _numbers(name: str, values: object) -> tuple[float, ...]:
    """A list of numbers of a table; whether there are enough of them is told later."""
    if not isinstance(values, list) or not values or not all(_is_number(one) for one in values):
        raise ConfigError(f"preprocess.{name} is {_shown(values)}; it must be a list of numbers.")
    try:
        return tuple(float(number) for number in values)
    except OverflowError:
        raise ConfigError(
            f"preprocess.{name} has a number that is too large for a float."
        ) from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: object) -> str:
    """A value of a table for a message, whatever it is."""
    try:
        return shown(repr(value), 80)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list of itself
        return "beyond all measure"


IMAGENET = Preprocess()
"""What torchvision's ImageNet weights expect before the network's own `transform_input`."""

INCEPTION = Preprocess(mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5))
"""`IMAGENET` followed by `transform_input`, in one exact step: x / 127.5 - 1 on 0..255 pixels."""
