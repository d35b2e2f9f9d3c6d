from __future__ import annotations

import hashlib
import io
import pickle
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnet_opt.drawn import draw, draw_picture
from gnet_opt.errors import BackendError, IntegrityError
from gnet_opt.golden import COUNT, TOLERANCE_DB, Golden, Source
from gnet_opt.preprocess import FloatArray, Preprocess

SMALL = Preprocess(resize=40, crop=32)


def make(count: int = 3) -> Golden:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    outputs = random.normal(size=(count, 5)).astype(np.float32)
    return Golden.make(pixels, outputs, SMALL)


class Replies:
    """A runner that gives prepared logits, one picture after the other."""

    def __init__(self, logits: FloatArray) -> None:
        self.logits = list(logits)
        self.seen: list[FloatArray] = []

    def run(self, batch: FloatArray) -> FloatArray:
        self.seen.append(batch)
        return self.logits.pop(0)[None]


def replay(golden: Golden, logits: FloatArray, tolerance: float = 20.0) -> float | None:
    inputs = SMALL.normalize(golden.pixels)
    return golden.replay(Replies(logits), inputs, tolerance, "openvino")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    golden = make()
    golden.write(tmp_path / "golden.npz")
    read = Golden.read(tmp_path / "golden.npz")
    for name in Golden.__dataclass_fields__:
        written, found = getattr(golden, name), getattr(read, name)
        assert written.dtype == found.dtype
        assert np.array_equal(written, found)


def test_equal_arrays_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().write(tmp_path / "a")
    real = time.localtime
    monkeypatch.setattr(time, "localtime", lambda *a: real(1e9))
    monkeypatch.setattr(time, "time", lambda: 1e9)
    make().write(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_picture_is_the_same_on_every_machine() -> None:
    picture = draw_picture()
    assert (picture.shape, picture.dtype) == ((280, 320, 3), np.uint8)
    digest = hashlib.sha256(picture.tobytes()).hexdigest()
    assert digest == "3bc53877f2ab880d1972f92b1e9462ed08938532d4286887a01915d22694923f"


@pytest.mark.parametrize("planes", [1, 3, 4])
def test_drawn_inputs_differ_and_are_the_same_for_the_same_seed(planes: int) -> None:
    drawn = draw(4, 32, planes, 7)
    assert (drawn.shape, drawn.dtype) == ((4, 32, 32, planes), np.uint8)
    assert np.array_equal(drawn, draw(4, 32, planes, 7))
    assert not np.array_equal(drawn, draw(4, 32, planes, 8))
    for index, image in enumerate(drawn):
        assert (image.min(), image.max()) == (0, 255)
        assert image.std() > 20
        for other in drawn[index + 1 :]:
            # Unlike each other, not only another noise.
            assert np.abs(image.astype(int) - other).mean() > 20


def test_drawn_inputs_are_of_nobody() -> None:
    source = Source(kind="drawn", images=None)
    assert source.to_dict() == {"images": COUNT, "set": None, "source": "drawn"}
    assert source.pixels(SMALL, 0).shape == (COUNT, 32, 32, 3)


def whole() -> bytes:
    stream = io.BytesIO()
    golden = make(1)
    np.savez_compressed(stream, **{n: getattr(golden, n) for n in Golden.__dataclass_fields__})
    return stream.getvalue()


WHOLE = whole()


def refused(path: Path) -> str:
    with pytest.raises(IntegrityError) as caught:
        Golden.read(path)
    return str(caught.value)


def plain_array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3, np.float32))
    return stream.getvalue()


@pytest.mark.parametrize(
    "data", [plain_array(), b"", b"PK", WHOLE[:-30], WHOLE[100:], b"\x93NUMPY" + bytes(99)]
)
def test_a_damaged_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "golden.npz"
    path.write_bytes(data)
    assert refused(path).startswith(f"{path} cannot be read (")
    assert refused(path).endswith("). Copy the bundle again, or build it again.")


def test_a_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "none").startswith(f"{tmp_path / 'none'} cannot be read (")


@settings(max_examples=300)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=3
    )
)
def test_any_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    broken = bytearray(WHOLE)
    for position, value in changes:
        broken[position] = value
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(broken)
    try:
        golden = Golden.read(path)
    except IntegrityError as error:
        assert str(path) in str(error)
    else:
        assert len(golden.pixels) == len(golden.outputs) == 1


class Attack:
    def __reduce__(self) -> Any:
        return (exec, ("import builtins; builtins.gnet_opt_was_attacked = True",))


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_is_never_loaded(tmp_path: Path, as_zip: bool) -> None:
    path = tmp_path / "golden.npz"
    arrays = {name: getattr(make(), name) for name in Golden.__dataclass_fields__}
    arrays["outputs"] = np.array([Attack()], dtype=object)
    if as_zip:
        np.savez(path, **arrays)
    else:
        path.write_bytes(pickle.dumps(Attack()))
    message = refused(path)
    assert not hasattr(__builtins__, "gnet_opt_was_attacked")
    assert "pickled" in message or "allow_pickle=False" in message


def test_a_header_that_claims_too_much(tmp_path: Path) -> None:
    stream = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**13,)}
    np.lib.format.write_array_header_1_0(stream, header)
    path = tmp_path / "golden.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in Golden.__dataclass_fields__:
            archive.writestr(f"{name}.npy", stream.getvalue())
    assert refused(path).startswith(f"{path} cannot be read (")


def test_members_that_are_no_arrays(tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in Golden.__dataclass_fields__:
            archive.writestr(f"{name}.npy", b"text")
    assert refused(path) == f"{path}: inputs and outputs do not fit. Build the bundle again."


@pytest.mark.parametrize(
    "changes",
    [
        {"outputs": np.zeros((2, 5), np.float32)},
        {"outputs": np.float32(1)},
        {"outputs": np.zeros((3, 5))},
        {"outputs": np.zeros(3, np.float32)},
        {"pixels": np.zeros((3, 32, 32, 3), np.float32)},
        {"pixels": np.zeros((32, 32, 3), np.uint8)},
        {"pixels": np.zeros((0, 32, 32, 3), np.uint8), "outputs": np.zeros((0, 5), np.float32)},
        {"picture": np.zeros((280, 320), np.uint8)},
        {"picture": np.zeros((280, 320, 5), np.uint8)},
        {"picture": np.zeros((0, 320, 3), np.uint8)},
        {"pixels": np.zeros((3, 32, 32, 1), np.uint8)},
        {"picture_pixels": np.zeros((32, 32, 3), np.float32)},
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "golden.npz"
    replace(make(), **changes).write(path)
    assert refused(path) == f"{path}: inputs and outputs do not fit. Build the bundle again."


def test_the_preprocess_is_the_one_of_calibration() -> None:
    golden = make()
    golden.check_preprocess(SMALL)
    changed = golden.picture_pixels.copy()
    changed[5, 7, 1] ^= 1
    with pytest.raises(IntegrityError, match="by up to 1 of 255 levels"):
        replace(golden, picture_pixels=changed).check_preprocess(SMALL)


@pytest.mark.parametrize(("channels", "planes", "bands"), [("gray", 1, 3), ("rgba", 4, 4)])
def test_samples_of_one_and_of_four_planes(
    channels: Any, planes: int, bands: int, tmp_path: Path
) -> None:
    numbers = {"mean": (9.0,) * planes, "std": (2.0,) * planes}
    preprocess = Preprocess(resize=40, crop=32, channels=channels, **numbers)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, planes), dtype=np.uint8)
    made = Golden.make(pixels, np.ones((2, 5), np.float32), preprocess)
    assert made.picture.shape == (280, 320, bands)
    made.write(tmp_path / "golden.npz")
    read = Golden.read(tmp_path / "golden.npz")
    assert read.picture_pixels.shape == (32, 32, planes)
    read.check_preprocess(preprocess)
    with pytest.raises(IntegrityError, match=rf"\(32, 32, 3\) here and of \(32, 32, {planes}\)"):
        read.check_preprocess(SMALL)
    replace(made, picture=made.picture[..., :2]).write(tmp_path / "golden.npz")
    assert refused(tmp_path / "golden.npz").endswith("do not fit. Build the bundle again.")


@pytest.mark.parametrize("other", [{"interpolation": "bicubic"}, {"interpolation": "nearest"}])
def test_another_way_of_resizing_is_found(other: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError) as caught:
        make().check_preprocess(Preprocess(resize=40, crop=32, **other))
    assert str(caught.value).startswith(
        "This machine resizes the golden picture differently (by up to "
    )
    assert str(caught.value).endswith(
        " of 255 levels), so the model would see other pictures than it was calibrated on. "
        "Install a current Pillow: pip install --upgrade pillow"
    )


def test_another_crop_is_found() -> None:
    with pytest.raises(IntegrityError) as caught:
        make().check_preprocess(Preprocess(resize=40, crop=30))
    assert str(caught.value) == (
        "The preprocess gives a picture of shape (30, 30, 3) here and of (32, 32, 3) in the "
        "golden samples. Build the bundle again."
    )


def test_replay_runs_every_input_alone_and_measures() -> None:
    golden = make()
    inputs = SMALL.normalize(golden.pixels)
    runner = Replies(golden.outputs)
    assert golden.replay(runner, inputs, 20.0, "openvino") is None
    assert len(runner.seen) == 3
    for batch, image in zip(runner.seen, inputs, strict=True):
        assert np.array_equal(batch, image[None])
    # An error of a hundredth of the signal's amplitude is 40 dB.
    measured = replay(golden, golden.outputs * np.float32(1.01))
    assert measured == pytest.approx(40.0, abs=0.01)


def test_replay_refuses_below_the_tolerance() -> None:
    golden = make()
    logits = golden.outputs * np.float32(1.1)
    assert replay(golden, logits, 19.9) == pytest.approx(20.0, abs=0.01)
    with pytest.raises(IntegrityError) as caught:
        replay(golden, logits, 21.0)
    assert str(caught.value) == (
        "openvino does not give the golden outputs here: SQNR 20.0 dB, at least 21 dB are needed. "
        "Was the bundle made for another CPU? Build one with --target cpu on this machine, or "
        "for it."
    )


def test_replay_refuses_other_shapes_and_what_is_not_finite() -> None:
    golden = make()
    with pytest.raises(IntegrityError) as caught:
        replay(golden, golden.outputs[:, :4])
    assert str(caught.value) == (
        "openvino gives logits of shape (3, 4), the golden outputs have (3, 5). "
        "Build the bundle again."
    )
    broken = golden.outputs.copy()
    broken[1, 2] = np.nan
    with pytest.raises(BackendError) as backend:
        replay(golden, broken)
    assert str(backend.value) == ("openvino gives logits that are not finite on the golden inputs.")


def test_tolerances_lie_between_correct_and_saturating_kernels() -> None:
    assert 13.0 < TOLERANCE_DB["int8"] < 32.0 < TOLERANCE_DB["fp16"] < TOLERANCE_DB["fp32"]
