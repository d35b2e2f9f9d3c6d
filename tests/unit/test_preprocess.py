from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from gnet_opt.drawn import draw_picture
from gnet_opt.errors import CalibrationError, ConfigError
from gnet_opt.pictures import open_picture
from gnet_opt.preprocess import IMAGENET, INCEPTION, Preprocess

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [
    (320, 240),
    (240, 320),
    (257, 391),
    (501, 333),
    (256, 256),
    (256, 300),
    (224, 224),
    (37, 51),
    (64, 900),
    (1, 3),
]


def noise(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def torchvision_input(image: Image.Image, resize: int = 256, crop: int = 224) -> np.ndarray:
    """The pipeline of torchvision's reference scripts."""
    from torchvision import transforms

    chain = transforms.Compose(
        [
            transforms.Resize(resize),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return chain(image.convert("RGB")).numpy()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_torchvision(size: tuple[int, int]) -> None:
    image = noise(size)
    ours = IMAGENET.normalize(IMAGENET.pixels(image))
    assert ours.shape == (3, 224, 224)
    assert ours.dtype == np.float32
    assert np.abs(ours - torchvision_input(image)).max() < 2e-6


@settings(max_examples=40)
@given(
    width=st.integers(1, 120),
    height=st.integers(1, 120),
    resize=st.integers(1, 70),
    data=st.data(),
)
def test_equals_torchvision_at_any_size(
    width: int, height: int, resize: int, data: st.DataObject
) -> None:
    assume(max(width, height) <= 100 * min(width, height))  # others are refused
    crop = data.draw(st.integers(1, resize))
    image = noise((width, height), seed=width * 1000 + height)
    ours = Preprocess(resize=resize, crop=crop)
    difference = ours.normalize(ours.pixels(image)) - torchvision_input(image, resize, crop)
    # Pillow 13 resizes tall pictures in another order, which rounds to another level.
    one_level = 1 / 255 / min(STD) + 2e-6
    assert np.abs(difference).max() < (one_level if height > 2 * width else 2e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_every_mode_is_read_as_torchvision_reads_it(tmp_path: Path, mode: str) -> None:
    image = noise((90, 70), "RGB").convert(mode)
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    image.save(path)
    small = Preprocess(resize=48, crop=40)
    with open_picture(path) as read:
        expected = torchvision_input(read, 48, 40)
    assert np.abs(small.load(path) - expected).max() < 2e-6


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGB", "RGBA", "P", "CMYK"])
def test_gray_is_the_luma_of_what_torchvision_reads(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    noise((90, 70), "RGB").convert(mode).save(path)
    gray = Preprocess(resize=70, crop=64, channels="gray")
    with open_picture(path) as read:
        red, green, blue = np.moveaxis(np.asarray(read.convert("RGB")).astype(np.int64), -1, 0)
    luma = (299 * red + 587 * green + 114 * blue) / 1000
    pixels = gray.load_pixels(path)
    assert pixels.shape == (64, 64, 1)
    assert np.abs(pixels[..., 0] - luma[3:67, 13:77]).max() < 0.51
    if mode in ("L", "1", "LA"):
        assert np.array_equal(pixels[..., 0], red[3:67, 13:77])


def test_rgba_takes_each_band_as_data(tmp_path: Path) -> None:
    """Pillow alone would multiply the colours by the fourth band before it resizes them."""
    path = tmp_path / "picture.png"
    image = noise((90, 70), "RGBA")
    image.save(path)
    numbers = {"mean": (1.0, 2.0, 3.0, 4.0), "std": (1.0, 2.0, 3.0, 4.0)}
    four = Preprocess(resize=48, crop=40, channels="rgba", **numbers)
    pixels = four.load_pixels(path)
    assert pixels.shape == (40, 40, 4)
    alone = Preprocess(resize=48, crop=40, channels="gray")
    for index, band in enumerate(image.split()):
        assert np.array_equal(pixels[..., index], alone.pixels(band)[..., 0])
        expected = (pixels[..., index].astype(np.float32) - (index + 1)) / (index + 1)
        assert np.array_equal(four.normalize(pixels)[index], expected.astype(np.float32))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P"])
def test_a_picture_without_a_fourth_band_is_named(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("picture.tif" if mode == "CMYK" else "picture.png")
    noise((90, 70), "RGB").convert(mode).save(path)
    four = Preprocess(resize=48, crop=40, channels="rgba", mean=(0.0,) * 4, std=(1.0,) * 4)
    with pytest.raises(CalibrationError) as caught:
        four.load(path)
    assert str(caught.value).startswith(f"{path}: It has no fourth band (its pixels are {mode}),")


def test_a_fourth_band_is_found_in_every_form(tmp_path: Path) -> None:
    """What a PNG optimizer makes of four bands without loss: grey with alpha, a palette."""
    four = Preprocess(resize=8, crop=8, channels="rgba", mean=(0.0,) * 4, std=(1.0,) * 4)
    image = Image.merge("LA", noise((8, 8), "RGBA").split()[:2])
    image.save(tmp_path / "gray.png")
    assert np.array_equal(
        four.load_pixels(tmp_path / "gray.png"), np.asarray(image.convert("RGBA"))
    )
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 8, 7, 6, 5, 4])
    palette.save(tmp_path / "palette.png", transparency=bytes([255, 77]))
    assert (four.load_pixels(tmp_path / "palette.png") == (6, 5, 4, 77)).all()


def test_planes_and_what_is_usual_for_them() -> None:
    assert (IMAGENET.planes, IMAGENET.alpha) == (3, "dropped")
    assert IMAGENET.mean == (123.675, 116.28, 103.53)
    assert Preprocess(channels="bgr").std == (58.395, 57.12, 57.375)
    gray = Preprocess(channels="gray")
    assert gray.planes == 1
    assert np.allclose([*gray.mean, *gray.std], [114.495, 57.63], rtol=0, atol=1e-9)
    with pytest.raises(ConfigError, match=r"preprocess\.mean must be four finite numbers"):
        Preprocess(channels="rgba")
    four = Preprocess(channels="rgba", mean=(0.0,) * 4, std=(1.0,) * 4)
    assert (four.planes, four.alpha) == (4, "kept")


def test_gray_gives_three_equal_channels() -> None:
    pixels = IMAGENET.pixels(noise((60, 70), "L"))
    assert (pixels == pixels[..., :1]).all()


def test_bgr_is_rgb_with_the_channels_turned_round() -> None:
    pixels = Preprocess(resize=32, crop=32).pixels(noise((40, 50)))
    mean, std = (104.0, 117.0, 123.0), (1.0, 2.0, 3.0)
    bgr = Preprocess(resize=32, crop=32, channels="bgr", mean=mean, std=std).normalize(pixels)
    for channel in range(3):
        expected = (pixels[..., 2 - channel].astype(np.float32) - mean[channel]) / std[channel]
        assert np.array_equal(bgr[channel], expected)


def test_normalize_takes_any_number_of_pictures() -> None:
    pixels = np.stack([IMAGENET.pixels(noise((224, 224), seed=seed)) for seed in range(3)])
    together = IMAGENET.normalize(pixels)
    assert together.shape == (3, 3, 224, 224)
    assert together.flags.c_contiguous
    for one, picture in zip(together, pixels, strict=True):
        assert np.array_equal(one, IMAGENET.normalize(picture))


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_normalize_is_exact(channels: Any) -> None:
    """Each level by itself, in the arithmetic of the definition."""
    mean, std = (123.675, -7.3, 0.0), (58.395, 0.017, 1.0)
    preprocess = Preprocess(channels=channels, mean=mean, std=std)
    levels = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, axis=2)
    values = preprocess.normalize(levels)
    assert values.dtype == np.float32
    for channel in range(3):
        for level in range(256):
            expected = (np.float32(level) - np.float32(mean[channel])) / np.float32(std[channel])
            assert values[channel, 0, level] == expected


def test_what_a_model_takes(tmp_path: Path) -> None:
    noise((40, 50)).save(tmp_path / "a.png")
    plain = Preprocess(resize=32, crop=24, channels="bgr")
    taking = Preprocess(resize=32, crop=24, channels="bgr", input="uint8")
    pixels = plain.load_pixels(tmp_path / "a.png")
    assert np.array_equal(plain.tensor(pixels), plain.normalize(pixels))
    assert np.array_equal(plain.load(tmp_path / "a.png"), plain.normalize(pixels))
    for taken in (taking.tensor(pixels), taking.load(tmp_path / "a.png")):
        assert taken.dtype == np.uint8
        assert taken.flags.c_contiguous
        assert np.array_equal(taken, pixels)
    assert np.array_equal(taking.normalize(pixels), plain.normalize(pixels))
    assert taking.tensor(pixels[None, ::2]).flags.c_contiguous


def test_the_usual_input_is_not_written() -> None:
    assert "input" not in IMAGENET.to_dict()
    assert "white16" not in IMAGENET.to_dict()
    assert Preprocess(input="uint8").to_dict()["input"] == "uint8"


PIXELS: list[tuple[str, tuple[int, int], str, str]] = [
    ("bilinear", (320, 280), "31880f93e5a60a42", "3ea0c26d150f80f9"),
    ("bilinear", (300, 900), "bdf039722ae209bb", "c5d7b003908acce4"),
    ("bilinear", (900, 300), "b8cafda3c5381035", "5407cc54138cc800"),
    ("bilinear", (250, 1203), "9f5d6fce085af2a4", "85a1b8715715fe2d"),
    ("bilinear", (37, 51), "c6a4987c19da8375", "b4d589282d23f1d5"),
    ("bicubic", (320, 280), "d8f4d573a2d367f3", "291bcfac08a3b827"),
    ("bicubic", (300, 900), "6195c2dc5435c98d", "3603eab7a9195716"),
    ("bicubic", (900, 300), "41553768b703af8c", "d9e882e404abc1f2"),
    ("bicubic", (250, 1203), "f0c887c53a62981c", "bf5e6fdd9b366ad2"),
    ("bicubic", (37, 51), "fad317ee077a3813", "44a6786669582cdd"),
    ("nearest", (320, 280), "904c9f50c20f9754", "a93684ae0061d6ac"),
    ("nearest", (300, 900), "d864634863c68810", "e916f8e5820697cb"),
    ("nearest", (900, 300), "ddaf88c322bfab1b", "594a8d56170f1b98"),
    ("nearest", (250, 1203), "9fe13b4f739651ef", "a0773e8b4271d316"),
    ("nearest", (37, 51), "ad160ae410c2d3bf", "11c5972415324297"),
]
"""The pixels that every Pillow gives, as the first 16 digits of their SHA-256: of RGB and RGBA
pictures of this size in a crop of 224. Pillow 9.4 to 12 gave those of RGB in a single call, too."""


@pytest.mark.parametrize(("interpolation", "size", "three", "four"), PIXELS)
def test_pixels_do_not_depend_on_the_version_of_pillow(
    interpolation: Any, size: tuple[int, int], three: str, four: str
) -> None:
    rows, columns = np.arange(size[1]) % 280, np.arange(size[0]) % 320
    numbers = {"mean": (0.0,) * 4, "std": (1.0,) * 4}
    for preprocess, expected in (
        (Preprocess(interpolation=interpolation), three),
        (Preprocess(interpolation=interpolation, channels="rgba", **numbers), four),
    ):
        picture = draw_picture(4)[rows][:, columns, : preprocess.planes]
        pixels = preprocess.pixels(Image.fromarray(np.ascontiguousarray(picture)))
        assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == expected


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "nearest"])
def test_interpolations_are_torchvisions(name: Any) -> None:
    from torchvision.transforms import InterpolationMode, Resize

    image = noise((91, 77))
    ours = Preprocess(resize=40, crop=40, interpolation=name).pixels(image)
    theirs = Resize(40, InterpolationMode(name))(image)
    left = round((theirs.width - 40) / 2)
    assert np.array_equal(ours, np.asarray(theirs)[:40, left : left + 40])


def test_inception_is_imagenet_followed_by_transform_input() -> None:
    import torch
    from torchvision.models import GoogLeNet

    image = noise((230, 240))
    network = GoogLeNet(num_classes=2, transform_input=True, init_weights=False)
    with torch.no_grad():
        expected = network._transform_input(torch.from_numpy(torchvision_input(image)[None]))
    ours = INCEPTION.normalize(INCEPTION.pixels(image))
    assert np.abs(ours - expected[0].numpy()).max() < 2e-6
    assert ours.min() >= -1.0
    assert ours.max() <= 1.0


finite = st.floats(-1e6, 1e6, allow_nan=False)
positive = st.floats(1.0, 1e6)
preprocesses = st.builds(
    lambda crop, extra, **rest: Preprocess(crop=crop, resize=crop + extra, **rest),
    crop=st.integers(1, 4096),
    extra=st.integers(0, 4096),
    interpolation=st.sampled_from(["bilinear", "bicubic", "nearest"]),
    channels=st.sampled_from(["rgb", "bgr"]),
    input=st.sampled_from(["float32", "uint8"]),
    mean=st.tuples(finite, finite, finite),
    std=st.tuples(positive, positive, positive),
    orientation=st.sampled_from(["as stored", "upright"]),
    white16=st.none() | st.integers(255, 65535),
) | st.builds(
    Preprocess,
    channels=st.sampled_from(["rgba"]),
    mean=st.tuples(finite, finite, finite, finite),
    std=st.tuples(positive, positive, positive, positive),
)


@given(preprocesses)
def test_a_manifest_gives_the_same_preprocess_again(preprocess: Preprocess) -> None:
    import json

    from gnet_opt.files import dump_json

    assert Preprocess.from_dict(json.loads(dump_json(preprocess.to_dict()))) == preprocess


def test_the_contract_says_what_becomes_of_orientation_and_alpha() -> None:
    assert IMAGENET.to_dict()["orientation"] == "as stored"
    assert IMAGENET.to_dict()["alpha"] == "dropped"
    # A manifest of a bundle from before has neither.
    old = {
        "channels": "bgr",
        "crop": 224,
        "interpolation": "bilinear",
        "mean": [104.0, 117.0, 123.0],
        "resize": 256,
        "std": [1.0, 1.0, 1.0],
    }
    read = Preprocess.from_dict(old)
    assert (read.orientation, read.alpha, read.white16) == ("as stored", "dropped", None)
    assert read.to_dict() == {**old, "alpha": "dropped", "orientation": "as stored"}


def test_what_a_table_leaves_out_is_imagenet() -> None:
    assert Preprocess.from_dict({}) == IMAGENET
    assert Preprocess.from_dict({"crop": 200}) == Preprocess(crop=200)


SIZE_MESSAGE = (
    "preprocess.resize ({}) must be at least preprocess.crop ({}), and both between 1 and 8192."
)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"sise": 3},
            "preprocess.sise is not known; the keys are alpha, channels, crop, input, "
            "interpolation, mean, orientation, resize, std, white16.",
        ),
        ({"resize": 200}, SIZE_MESSAGE.format(200, 224)),
        ({"crop": 0}, SIZE_MESSAGE.format(256, 0)),
        ({"crop": 300}, SIZE_MESSAGE.format(256, 300)),
        (
            {"interpolation": "cubic"},
            "preprocess.interpolation is 'cubic'; it must be one of bilinear, bicubic, nearest.",
        ),
        (
            {"interpolation": ["bilinear"]},
            "preprocess.interpolation is ['bilinear']; "
            "it must be one of bilinear, bicubic, nearest.",
        ),
        (
            {"channels": "RGB"},
            "preprocess.channels is 'RGB'; it must be rgb or bgr or gray or rgba.",
        ),
        ({"channels": {}}, "preprocess.channels is {}; it must be rgb or bgr or gray or rgba."),
        (
            {"orientation": "exif"},
            "preprocess.orientation is 'exif'; it must be as stored or upright.",
        ),
        (
            {"alpha": "white"},
            "preprocess.alpha is 'white', but with channels = rgb alpha is always dropped. "
            "Correct it or leave it out.",
        ),
        (
            {"white16": 100},
            "preprocess.white16 is 100; it is the value of 16-bit pictures that is white, "
            "between 255 and 65535.",
        ),
        ({"white16": True}, "preprocess.white16 is True, not an integer."),
        (
            {"channels": "gray", "mean": [1, 2, 3]},
            "preprocess.mean must be one finite number, one a channel of channels = gray.",
        ),
        ({"mean": []}, "preprocess.mean is []; it must be a list of numbers."),
        (
            {"mean": [10**400, 0, 0]},
            "preprocess.mean has a number that is too large for a float.",
        ),
        (
            {"mean": 10**5000},
            "preprocess.mean is beyond all measure; it must be a list of numbers.",
        ),
        ({"resize": 10**5000}, SIZE_MESSAGE.format("beyond all measure", 224)),
        ({"input": "float16"}, "preprocess.input is 'float16'; it must be float32 or uint8."),
        ({"input": []}, "preprocess.input is []; it must be float32 or uint8."),
        (
            {"mean": [1, 2]},
            "preprocess.mean must be three finite numbers, one a channel of channels = rgb.",
        ),
        (
            {"std": [1, 2, math.nan]},
            "preprocess.std must be three finite numbers, one a channel of channels = rgb.",
        ),
        ({"std": [1, 2, 0]}, "preprocess.std must be positive."),
        ({"mean": "123"}, "preprocess.mean is '123'; it must be a list of numbers."),
        ({"resize": 256.9}, "preprocess.resize is 256.9, not an integer."),
        (
            {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
            "preprocess.mean and preprocess.std look like values on the 0..1 scale; they are on "
            "the 0..255 scale here. Multiply both by 255.",
        ),
    ],
)
def test_a_bad_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Preprocess.from_dict(values)
    assert str(caught.value) == message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from([field.name for field in dataclasses.fields(Preprocess)] + ["alpha"]),
        json_values,
    )
    | json_values
)
def test_a_hostile_table_is_a_config_error(values: Any) -> None:
    try:
        Preprocess.from_dict(values)
    except ConfigError as error:
        assert str(error).startswith("preprocess")


def test_a_missing_picture(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError) as caught:
        IMAGENET.load(tmp_path / "none.png")
    assert str(caught.value).startswith(f"{tmp_path / 'none.png'} cannot be read as a picture (")
    assert str(caught.value).endswith("). Remove or replace the file.")


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    noise((23, 19)).save(stream, kind)
    return stream.getvalue()


ENCODED = {kind: encoded(kind) for kind in ("png", "jpeg", "webp", "bmp", "ppm", "tiff")}


@pytest.mark.parametrize("kind", ENCODED)
@pytest.mark.parametrize("data", [b"", b"not a picture at all", None])
def test_a_corrupt_picture(tmp_path: Path, kind: str, data: bytes | None) -> None:
    path = tmp_path / f"broken.{kind}"
    whole = ENCODED[kind]
    path.write_bytes(whole[: len(whole) // 2] if data is None else data)
    with pytest.raises(CalibrationError) as caught:
        Preprocess(resize=16, crop=16).load_pixels(path)
    assert str(caught.value).startswith(f"{path} cannot be read as a picture (")
    assert str(caught.value).endswith("). Remove or replace the file.")


@settings(max_examples=400)
@given(kind=st.sampled_from(sorted(ENCODED)), data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_damage_gives_pixels_or_our_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    broken = bytearray(ENCODED[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        # Headers are where damage has the most forms.
        position = data.draw(st.integers(0, min(len(broken) - 1, 200)))
        broken[position] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    path.write_bytes(broken)
    try:
        pixels = Preprocess(resize=16, crop=16).load_pixels(path)
    except CalibrationError as error:
        assert str(path) in str(error)
    else:
        assert pixels.shape == (16, 16, 3)
        assert pixels.dtype == np.uint8


def test_load_reads_the_file_as_normalize_of_its_pixels(tmp_path: Path) -> None:
    noise((50, 40)).save(tmp_path / "a.png")
    small = Preprocess(resize=32, crop=24)
    loaded = small.load(tmp_path / "a.png")
    assert loaded.shape == (3, 24, 24)
    assert np.array_equal(loaded, small.normalize(small.pixels(noise((50, 40)))))


@pytest.mark.parametrize("kind", ["I;16", "F"])
def test_deep_pictures_are_not_clipped_to_white(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "deep.tif"
    Image.new(kind, (300, 300), 1000).save(path)
    with pytest.raises(CalibrationError, match=r"deep\.tif: .* more than 8 bits.*white16 = 65535"):
        IMAGENET.load(path)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
@pytest.mark.parametrize("channels", ["gray", "rgb"])
def test_white16_settles_sixteen_bits(tmp_path: Path, ending: str, channels: Any) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (20, 20)).astype(np.uint16)
    values[0, :3] = 0, 65535, 4095
    path = tmp_path / f"deep.{ending}"
    if ending == "pgm":
        path.write_bytes(b"P5 20 20 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    for white in (65535, 4095):
        deep = Preprocess(resize=20, crop=20, channels=channels, white16=white)
        expected = np.minimum(values.astype(np.int64) * 255 // white, 255)
        pixels = deep.load_pixels(path)
        assert pixels.shape == (20, 20, deep.planes)
        for plane in range(deep.planes):
            assert np.array_equal(pixels[..., plane], expected)
    with pytest.raises(CalibrationError, match=r"deep\..*no fourth band"):
        dataclasses.replace(deep, channels="rgba", mean=(0.0,) * 4, std=(1.0,) * 4).load_pixels(
            path
        )


@pytest.mark.parametrize(("kind", "value"), [("F", 3.0), ("I", -5), ("I", 70000)])
def test_what_is_not_sixteen_bits_stays_an_error(tmp_path: Path, kind: str, value: Any) -> None:
    Image.new(kind, (30, 30), value).save(tmp_path / "deep.tif")
    with pytest.raises(CalibrationError, match="not whole numbers of 16 bits"):
        Preprocess(white16=65535).load(tmp_path / "deep.tif")
