from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from gnet_opt.bench.worker import _Worker
from gnet_opt.errors import CalibrationError
from gnet_opt.images import ImageSet
from gnet_opt.pictures import FORMATS, count_turned, note_turned, open_picture, orientation
from gnet_opt.preprocess import Preprocess
from gnet_opt.progress import silent
from gnet_opt.stages.training.pictures import Pictures

ROOT = Path(__file__).parents[2]
SMALL = Preprocess(resize=16, crop=16)
EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 20 20
%%EndComments
20 20 scale newpath 0 0 moveto 1 1 lineto stroke showpage
%%EOF
"""


def noise(size: tuple[int, int] = (20, 12), seed: int = 0) -> Image.Image:
    """A picture that is another one however it is turned."""
    width, height = size
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def from_file_to_result(path: Path) -> None:
    worker = _Worker.__new__(_Worker)
    worker._runner = type("Runner", (), {"run": lambda self, batch: None})()
    worker.end_to_end({"files": [str(path)], "preprocess": SMALL.to_dict()})


READERS: dict[str, Callable[[Path], object]] = {
    "load": SMALL.load,
    "load_pixels": SMALL.load_pixels,
    "check_readable": lambda path: ImageSet.open(path.parent).check_readable(),
    "training": lambda path: Pictures((path,), SMALL, silent),
    "from file to result": from_file_to_result,
    "count_turned": lambda path: count_turned([path]),
}


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a `gs` that is first in PATH leaves a mark when it is started."""
    mark = tmp_path / "gs was started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{mark}'\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    # What Pillow found before; 9.4 does not keep it.
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None, raising=False)
    return mark


@pytest.fixture
def disguised(tmp_path: Path) -> Path:
    """An EPS file under the name of a JPEG file."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    path = folder / "picture.jpg"
    path.write_bytes(EPS)
    return path


def test_the_trap_works(ghostscript: Path, disguised: Path) -> None:
    with Image.open(disguised) as image, pytest.raises(Exception):  # noqa: B017
        image.load()
    assert ghostscript.exists()


@pytest.mark.parametrize("name", READERS)
def test_ghostscript_is_never_started(name: str, ghostscript: Path, disguised: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        READERS[name](disguised)
    assert str(caught.value) == (
        f"{disguised} cannot be read as a picture (it is an EPS or PostScript file; what is read "
        "is BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP). Remove or replace the file."
    )
    assert not ghostscript.exists()


def test_no_other_reader_sees_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever readers Pillow has, and whatever other packages register."""
    Image.init()
    asked: list[str] = []

    def spy(name: str) -> tuple[Any, Any]:
        return lambda *_: asked.append(name), lambda _: asked.append(name) is None

    others = set(Image.OPEN) - set(FORMATS)
    assert {"EPS", "PSD", "WMF", "ICO"} <= others
    monkeypatch.setattr(
        Image,
        "OPEN",
        {name: spy(name) if name in others else entry for name, entry in Image.OPEN.items()},
    )
    path = tmp_path / "picture.png"
    for content in (EPS, b"8BPS" + bytes(99), b"\0\0\1\0" + bytes(99), b"any" * 99):
        path.write_bytes(content)
        with pytest.raises(CalibrationError), open_picture(path):
            pass
    assert asked == []


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\xc5\xd0\xd3\xc6" + bytes(30), "an EPS file"),
        (b"%PDF-1.7\n", "a PDF file"),
        (b"8BPS" + bytes(30), "a Photoshop file"),
        (b"\0\0\0\x20ftypheic" + bytes(30), "a HEIC picture"),
        (b"\0\0\0\x20ftypavif" + bytes(30), "an AVIF picture"),
        (bytes(128) + b"DICM", "a DICOM file"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "a pointer of Git LFS, not the file itself",
        ),
        (b"", "empty"),
        (b"text", "none of them, or damaged"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        SMALL.load(path)
    assert str(caught.value).startswith(
        f"{path} cannot be read as a picture (it is {kind}; what is read is BMP, GIF,"
    )
    with pytest.raises(CalibrationError) as again, open_picture(path, content):
        pass
    assert str(again.value) == str(caught.value)


def test_pictures_are_opened_in_one_place() -> None:
    """So that no reader but those of `FORMATS` ever gets a file, in the programs beside, too."""
    for folder in ("toolkit", "benchmarks", "calibration", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name in ("pictures.py", "test_pictures.py"):
                continue
            found = re.findall(r"Image\.open\((?!.*formats=).*", path.read_text(encoding="utf-8"))
            assert not found, f"{path}: {found[0]}"


def test_the_pictures_of_phones_are_read(tmp_path: Path) -> None:
    """MPO: a JPEG file with a second picture behind it."""
    path = tmp_path / "phone.jpg"
    first = noise()
    first.save(path, "MPO", save_all=True, append_images=[noise(seed=1)], quality=95)
    first.save(tmp_path / "plain.jpg", quality=95)
    with open_picture(path) as image:
        assert image.format == "MPO"
    assert np.array_equal(SMALL.load_pixels(path), SMALL.load_pixels(tmp_path / "plain.jpg"))


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_the_first_of_several_frames_counts(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (20, 20), color) for color in ((255, 0, 0), (0, 255, 0))]
    path = tmp_path / f"moving.{ending}"
    more = {"lossless": True} if ending == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **more)
    with open_picture(path) as image:
        assert getattr(image, "n_frames", 1) == 2
    assert (SMALL.load_pixels(path) == (255, 0, 0)).all()


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "L"])
def test_jpeg_files_of_every_kind_are_read_as_torchvision_reads_them(
    tmp_path: Path, mode: str
) -> None:
    from torchvision.datasets.folder import pil_loader

    path = tmp_path / "picture.jpg"
    noise((16, 16)).convert(mode).save(path, quality=90)
    assert np.array_equal(SMALL.load_pixels(path), np.asarray(pil_loader(str(path))))


# --- how a picture lies ---------------------------------------------------------------------------


def stored(seen: np.ndarray, tag: int) -> np.ndarray:
    """How a camera with this EXIF orientation stores what is to be seen so (CIPA DC-008)."""
    turned = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: np.rot90(seen, 1),
        7: seen[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(seen, -1),
    }
    return np.ascontiguousarray(turned[tag])


def save(path: Path, pixels: np.ndarray, tag: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    more: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    Image.fromarray(pixels).save(path, exif=exif, **more)


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "webp"])
def test_orientation_is_ignored_or_followed_as_the_preprocess_says(
    tmp_path: Path, ending: str, tag: int
) -> None:
    seen = np.asarray(noise((20, 12)))
    path = tmp_path / f"picture.{ending}"
    lying = stored(seen, tag)
    save(path, lying, tag)
    as_stored = Preprocess(resize=12, crop=12)
    upright = Preprocess(resize=12, crop=12, orientation="upright")
    assert np.array_equal(as_stored.load_pixels(path), as_stored.pixels(Image.fromarray(lying)))
    assert np.array_equal(upright.load_pixels(path), seen[:, 4:16])
    assert count_turned([path]) == (tag != 1)


def test_a_tiff_file_is_upright_in_every_version_of_pillow(tmp_path: Path) -> None:
    """Pillow turns it when it reads it, and it must not be turned twice."""
    seen = np.asarray(noise((20, 12)))
    path = tmp_path / "picture.tif"
    save(path, stored(seen, 6), 6)
    for preprocess in (
        Preprocess(resize=12, crop=12),
        Preprocess(resize=12, crop=12, orientation="upright"),
    ):
        assert np.array_equal(preprocess.load_pixels(path), seen[:, 4:16])
    assert count_turned([path]) == 0


@pytest.mark.parametrize("channels", ["gray", "rgba"])
def test_orientation_is_followed_in_every_number_of_planes(tmp_path: Path, channels: Any) -> None:
    picture = noise((20, 12)).convert("RGBA")
    numbers = {"mean": (0.0,) * 4, "std": (1.0,) * 4} if channels == "rgba" else {}
    upright = Preprocess(
        resize=12, crop=12, channels=channels, orientation="upright", white16=65535, **numbers
    )
    path = tmp_path / "picture.png"
    save(path, stored(np.asarray(picture), 8), 8)
    assert np.array_equal(upright.load_pixels(path), upright.pixels(picture))


def test_sixteen_bits_are_turned_as_well(tmp_path: Path) -> None:
    values = np.arange(240, dtype=np.uint16).reshape(12, 20) * 200
    path = tmp_path / "deep.png"
    save(path, np.ascontiguousarray(np.rot90(values, 1)), 6)
    upright = Preprocess(resize=12, crop=12, channels="gray", orientation="upright", white16=65535)
    expected = values[:, 4:16].astype(np.int64) * 255 // 65535
    assert np.array_equal(upright.load_pixels(path)[..., 0], expected)


def test_the_note_says_how_many_and_which_rule(tmp_path: Path) -> None:
    seen = np.asarray(noise((20, 12)))
    for index, tag in enumerate((1, 6, 3)):
        save(tmp_path / f"{index}.png", seen, tag)
    files = sorted(tmp_path.glob("*.png"))
    few = {"calibration": files[:1], "evaluation": ()}
    assert note_turned(few, "as stored", SMALL.check) == ""
    sets = {"calibration": files, "evaluation": files[:2]}
    assert note_turned(sets, "as stored", SMALL.check) == (
        "2 of 3 calibration and 1 of 2 evaluation pictures carry an EXIF orientation that turns or "
        "mirrors them: it is ignored, as torchvision does, and they are taken as stored. "
        'orientation = "upright" under [preprocess] of the model card follows it.'
    )
    assert note_turned({"calibration": files}, "upright", SMALL.check) == (
        "2 of 3 calibration pictures carry an EXIF orientation that turns or mirrors them: they "
        'are turned upright. orientation = "as stored" under [preprocess] of the model card '
        "ignores it."
    )


def test_what_the_preprocess_cannot_use_is_told_by_the_head_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.new("I;16", (20, 20), 1000).save(path)
    with pytest.raises(CalibrationError, match=r"deep\.png: Its pixels are I(;16)?, .*white16"):
        note_turned({"calibration": [path]}, "as stored", SMALL.check)
    deep = Preprocess(resize=16, crop=16, white16=65535)
    assert note_turned({"calibration": [path]}, "as stored", deep.check) == ""


def test_training_pictures_are_turned_as_the_preprocess_says(tmp_path: Path) -> None:
    seen = np.asarray(noise((20, 12)))
    path = tmp_path / "picture.png"
    save(path, stored(seen, 6), 6)
    upright = Preprocess(resize=16, crop=16, orientation="upright")
    assert np.array_equal(Pictures((path,), upright, silent)[0], seen)
    assert np.array_equal(Pictures((path,), SMALL, silent)[0], stored(seen, 6))


def test_damaged_exif_data_is_told_where_it_counts(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    noise((20, 20)).save(path, exif=b"Exif\0\0nonsense")
    assert count_turned([path]) == 0
    SMALL.load(path)
    with pytest.raises(CalibrationError, match=r"picture\.png cannot be read as a picture"):
        Preprocess(resize=16, crop=16, orientation="upright").load(path)


def test_an_orientation_that_is_none() -> None:
    image = noise()
    for value in (0, 9, "up", (6, 6)):
        image.getexif()[0x0112] = value
        assert orientation(image) == 1
