"""Picture files: which formats are read, how they are opened, and how they lie.

Pillow looks at the content of a file, not at its name, and some of its readers start other
programs: an EPS file goes to Ghostscript, which runs what is written in it. So a file is opened
here and nowhere else, by the readers of a fixed list of formats.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from gnet_opt.errors import CalibrationError
from gnet_opt.printable import shown

FORMATS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""What is read, by Pillow's name, with the usual endings. Pillow reads all of them by itself. The
pictures of phones that Pillow calls MPO are JPEG files with a second one behind."""

_OTHERS = (
    ("an EPS or PostScript file", 0, b"%!PS"),
    ("an EPS file", 0, b"\xc5\xd0\xd3\xc6"),
    ("a PDF file", 0, b"%PDF"),
    ("a Photoshop file", 0, b"8BPS"),
    ("an AVIF picture", 4, b"ftypavi"),
    ("a HEIC picture", 4, b"ftyphei"),
    ("a HEIC picture", 4, b"ftyphev"),
    ("a HEIC picture", 4, b"ftypmif1"),
    ("a JPEG 2000 picture", 4, b"jP  "),
    ("a JPEG 2000 picture", 0, b"\xff\x4f\xff\x51"),
    ("a DICOM file", 128, b"DICM"),
    ("a Windows metafile", 0, b"\xd7\xcd\xc6\x9a"),
    ("a Windows metafile", 40, b" EMF"),
    ("an icon", 0, b"\0\0\1\0"),
    ("an SVG or XML file", 0, b"<?xml"),
    ("an SVG file", 0, b"<svg"),
    ("an HTML page", 0, b"<!doctype"),
    ("an HTML page", 0, b"<html"),
    ("a pointer of Git LFS, not the file itself", 0, b"version https://git-lfs"),
)
"""What else is found under a picture's name: what it is, and the bytes there."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture is turned upright, by its EXIF orientation (CIPA DC-008, tag 0x0112)."""

_ORIENTATION = 0x0112


@contextlib.contextmanager
def open_picture(path: Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """Open a picture file; its pixels are read when they are used inside the block.

    Of an animated picture that is the first frame.

    Args:
        path: The file.
        content: What is in the file, where it is in memory already.

    Raises:
        CalibrationError: The file cannot be read as a picture, here or inside the block.
    """
    try:
        source = path if content is None else BytesIO(content)
        with Image.open(source, formats=tuple(FORMATS)) as image:
            yield image
    except CalibrationError as error:  # says what to do, but not with which file
        raise CalibrationError(f"{shown(path)}: {error}") from error
    except UnidentifiedImageError as error:
        raise CalibrationError(
            f"{shown(path)} cannot be read as a picture (it is {_kind(path, content)}; what is "
            f"read is {', '.join(FORMATS)}). Remove or replace the file."
        ) from error
    # Pillow's readers have no common error: a damaged file raises OSError, ValueError,
    # SyntaxError, struct.error, a decompression bomb and more.
    except Exception as error:
        raise CalibrationError(
            f"{shown(path)} cannot be read as a picture ({shown(error)}). Remove or replace the "
            "file."
        ) from error


def _kind(path: Path, content: bytes | None) -> str:
    """What a file is that none of the readers takes."""
    if content is None:
        with path.open("rb") as stream:
            content = stream.read(256)
    if not content:
        return "empty"
    head = content[:256].lower()
    for kind, start, signature in _OTHERS:
        if head[start:].startswith(signature.lower()):
            return kind
    return "none of them, or damaged"


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened picture, 2 to 8; 1 where it lies as it is to be seen.

    TIFF files count as lying right: Pillow turns them itself while it reads them.
    """
    if image.format == "TIFF":
        return 1
    found = image.getexif().get(_ORIENTATION)
    return found if found in _TURNS else 1


def upright(image: Image.Image, turned: int) -> Image.Image:
    """Turn a picture of that `orientation` as it is to be seen."""
    return image.transpose(_TURNS[turned]) if turned in _TURNS else image


def count_turned(
    files: Iterable[Path], check: Callable[[Image.Image], object] = lambda image: None
) -> int:
    """How many of these pictures lie otherwise than they are to be seen.

    Args:
        files: The pictures; their heads are read.
        check: Called with each, opened; it may raise a CalibrationError.

    Raises:
        CalibrationError: A file cannot be read as a picture, or `check` raised one.
    """
    count = 0
    for path in files:
        with open_picture(path) as image:
            check(image)
            # Damaged EXIF data turns nothing; whoever follows the orientation is told of it.
            with contextlib.suppress(Exception):
                count += orientation(image) != 1
    return count


def note_turned(
    sets: Mapping[str, Sequence[Path]], rule: str, check: Callable[[Image.Image], object]
) -> str:
    """A sentence on the pictures whose EXIF orientation matters, or nothing where there is none.

    Args:
        sets: Picture files by what they are for, as in "calibration".
        rule: `Preprocess.orientation`.
        check: As of `count_turned`.

    Raises:
        CalibrationError: A file cannot be read as a picture, or `check` raised one.
    """
    counts = {role: count_turned(files, check) for role, files in sets.items()}
    found = [f"{count} of {len(sets[role])} {role}" for role, count in counts.items() if count]
    if not found:
        return ""
    what = f"{' and '.join(found)} pictures carry an EXIF orientation that turns or mirrors them: "
    if rule == "upright":
        return what + (
            'they are turned upright. orientation = "as stored" under [preprocess] of the model '
            "card ignores it."
        )
    return what + (
        "it is ignored, as torchvision does, and they are taken as stored. orientation = "
        '"upright" under [preprocess] of the model card follows it.'
    )


def resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Resize a picture, first its width and then its height.

    In one call Pillow 13 begins with the height where a picture is taller than 2:1
    (https://github.com/python-pillow/Pillow/pull/9549), older versions with the width; as the
    result is rounded in between, pixels differ. In two calls every version gives the same. The
    bands of a picture with four are resized one by one, because Pillow would multiply the first
    three by the fourth.

    Args:
        image: Of mode L, RGB or RGBA.
        size: The new width and height, in pixels.
        resample: The interpolation.
    """
    if image.mode == "RGBA":
        return Image.merge("RGBA", [resize(band, size, resample) for band in image.split()])
    if image.width != size[0]:
        image = image.resize((size[0], image.height), resample)
    return image.resize(size, resample) if image.height != size[1] else image
