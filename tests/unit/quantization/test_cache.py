from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graphs import S8, U8, googlenet_like, pictures
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from gnet_opt.images import ImageSet
from gnet_opt.preprocess import Preprocess
from gnet_opt.quantization import Recipe, Statistics, cache, calibrate, quantize
from gnet_opt.quantization.cache import CalibrationCache, calibrate_cached, key
from gnet_opt.quantization.statistics import Histogram

PREPROCESS = Preprocess(resize=32, crop=32)
KEY = "0" * 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return googlenet_like(tmp_path_factory.mktemp("cache") / "float.onnx")


@pytest.fixture(scope="module")
def statistics(model: Path) -> Statistics:
    return calibrate(model, pictures(16), threads=1)


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    """Three pictures in files."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, name in enumerate("abc"):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return ImageSet.open(folder)


@pytest.fixture
def kept(tmp_path: Path) -> CalibrationCache:
    return CalibrationCache(folder=tmp_path / "cache" / "calibration")


def key_of(model: Path, preprocess: Preprocess, images: ImageSet) -> str:
    return key(model, preprocess, images, histograms=True)


def calibrated(
    model: Path, preprocess: Preprocess, images: ImageSet, method: str = "lp", **more: Any
) -> Statistics:
    return calibrate_cached(model, preprocess, images, method=method, **more)


def assert_same(one: Statistics, other: Statistics | None) -> None:
    """Equal to the last bit, and of the same types."""
    assert other is not None
    assert one.images == other.images
    assert list(one.histograms) == list(other.histograms)
    for name, seen in one.histograms.items():
        found = vars(other.histograms[name])
        assert list(vars(seen)) == list(found)
        for field, value in vars(seen).items():
            assert type(found[field]) is type(value)
            assert np.asarray(found[field]).dtype == np.asarray(value).dtype
            assert np.array_equal(found[field], value)
    for kind in ("highs", "lows", "sums"):
        vectors, found = getattr(one, kind), getattr(other, kind)
        assert list(vectors) == list(found)
        for name, vector in vectors.items():
            assert found[name].dtype == vector.dtype
            assert found[name].tobytes() == vector.tobytes()


def test_what_is_stored_is_loaded(kept: CalibrationCache, statistics: Statistics) -> None:
    assert kept.load(KEY) is None
    assert not kept.folder.exists()
    assert kept.store(KEY, statistics)
    assert_same(statistics, kept.load(KEY))
    assert [path.name for path in kept.folder.iterdir()] == [f"{KEY}.statistics"]


float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
characters = st.characters(codec="utf-8", exclude_characters="\0")
names = st.lists(st.text(characters, min_size=1), min_size=1, max_size=3, unique=True)


@given(data=st.data(), tensors=names, count=st.integers(1, 10**6))
def test_any_statistics_come_back(
    tmp_path: Path, data: st.DataObject, tensors: list[str], count: int
) -> None:
    histograms, lows, highs, sums = {}, {}, {}, {}
    counted = data.draw(st.booleans())
    for name in tensors:
        sizes = st.integers(1, 20)
        if counted:
            histograms[name] = Histogram()
            histograms[name].add(data.draw(hnp.arrays(np.float32, sizes, elements=float32)))
        lows[name] = data.draw(hnp.arrays(np.float32, sizes, elements=float32))
        highs[name] = data.draw(hnp.arrays(np.float32, sizes, elements=float32))
        sums[name] = data.draw(hnp.arrays(np.float64, sizes, elements=float32))
    seen = Statistics(images=count, lows=lows, highs=highs, sums=sums, histograms=histograms)
    folder = CalibrationCache(folder=tmp_path)
    assert folder.store(KEY, seen)
    assert_same(seen, folder.load(KEY))


@pytest.mark.parametrize("scheme", [U8, S8], ids=["u8", "s8"])
def test_a_file_from_loaded_statistics_has_equal_bytes(
    tmp_path: Path, model: Path, statistics: Statistics, kept: CalibrationCache, scheme: Any
) -> None:
    kept.store(KEY, statistics)
    loaded = kept.load(KEY)
    assert loaded is not None
    for method in ("entropy", "lp", "percentile"):
        facts = []
        for name, seen in (("fresh.onnx", statistics), ("loaded.onnx", loaded)):
            facts.append(quantize(model, tmp_path / name, seen, scheme, Recipe(method=method)))
        assert facts[0] == facts[1]
        assert (tmp_path / "fresh.onnx").read_bytes() == (tmp_path / "loaded.onnx").read_bytes()


def test_loaded_statistics_merge_like_fresh_ones(
    model: Path, statistics: Statistics, kept: CalibrationCache
) -> None:
    more = calibrate(model, pictures(2, seed=1), threads=1)
    kept.store(KEY, statistics)
    loaded = kept.load(KEY)
    assert loaded is not None
    assert_same(statistics.merged(more), loaded.merged(more))
    assert_same(more.merged(statistics), more.merged(loaded))


def test_a_second_run_reads_no_picture(
    model: Path, images: ImageSet, kept: CalibrationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    fresh = calibrated(model, PREPROCESS, images, cache=kept.folder, tell=told.append)
    assert told == []
    monkeypatch.setattr(cache, "calibrate", lambda *a, **k: pytest.fail("it ran the pictures"))
    again = calibrated(model, PREPROCESS, images, cache=kept.folder, tell=told.append)
    assert_same(fresh, again)
    (file,) = kept.folder.iterdir()
    assert told == [f"3 pictures were calibrated on in an earlier run: {file}"]


@pytest.mark.parametrize(
    ("first", "then", "runs"),
    [
        ("minmax", "minmax", 1),
        ("lp", "entropy", 1),
        ("auto", "minmax", 1),
        ("minmax", "mse", 2),
        ("minmax", "auto", 2),
    ],
)
def test_statistics_serve_every_method_that_they_hold_enough_for(
    model: Path,
    images: ImageSet,
    kept: CalibrationCache,
    monkeypatch: pytest.MonkeyPatch,
    first: str,
    then: str,
    runs: int,
) -> None:
    counted: list[bool] = []

    def spy(*args: Any, histograms: bool, **more: Any) -> Statistics:
        counted.append(histograms)
        return calibrate(*args, histograms=histograms, **more)

    monkeypatch.setattr(cache, "calibrate", spy)
    for method in (first, then):
        seen = calibrated(model, PREPROCESS, images, method, cache=kept.folder)
        assert seen.histograms or method == "minmax"
    assert counted == [first != "minmax", then != "minmax"][:runs]
    assert len(list(kept.folder.iterdir())) == runs


def test_without_a_cache_nothing_is_kept(
    tmp_path: Path, model: Path, images: ImageSet, kept: CalibrationCache
) -> None:
    before = sorted(tmp_path.rglob("*"))
    fresh = calibrated(model, PREPROCESS, images, threads=1)
    assert sorted(tmp_path.rglob("*")) == before
    assert_same(fresh, calibrated(model, PREPROCESS, images, cache=kept.folder, threads=1))
    assert kept.folder.is_dir()


def test_the_key_is_that_of_the_same_content(tmp_path: Path, model: Path, images: ImageSet) -> None:
    name = key_of(model, PREPROCESS, images)
    assert len(name) == 64
    assert int(name, 16) >= 0
    moved = tmp_path / "moved.onnx"
    moved.write_bytes(model.read_bytes())
    renamed = []
    for path in images.files:
        renamed.append(path.with_name(f"renamed-{path.name}"))
        renamed[-1].write_bytes(path.read_bytes())
    again = ImageSet(name="others", files=tuple(renamed), labels=(0, 1, 2))
    assert key_of(moved, replace(PREPROCESS), again) == name


def test_the_key_changes_with_the_weights(tmp_path: Path, model: Path, images: ImageSet) -> None:
    other = googlenet_like(tmp_path / "other.onnx", seed=1)
    assert key_of(other, PREPROCESS, images) != key_of(model, PREPROCESS, images)


@pytest.mark.parametrize(
    "change",
    [
        {"resize": 40},
        {"crop": 24},
        {"interpolation": "bicubic"},
        {"channels": "bgr"},
        {"mean": (123.675, 116.28, 103.54)},
        {"std": (58.395, 57.12, 57.376)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_key_changes_with_the_preprocess(
    model: Path, images: ImageSet, change: dict[str, Any]
) -> None:
    other = replace(PREPROCESS, **change)
    assert key_of(model, other, images) != key_of(model, PREPROCESS, images)


def test_the_key_changes_with_the_pictures(model: Path, images: ImageSet) -> None:
    one = key_of(model, PREPROCESS, images)
    found = {
        one,
        key_of(model, PREPROCESS, images.take([2, 1, 0])),
        key_of(model, PREPROCESS, images.take([0, 1])),
        key_of(model, PREPROCESS, images.take([0, 1, 2, 2])),
    }
    pixels = np.asarray(Image.open(images.files[1], formats=["PNG"])).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(images.files[1])
    found.add(key_of(model, PREPROCESS, ImageSet.open(images.files[0].parent)))
    assert len(found) == 5


@pytest.mark.parametrize("package", ["gnet-opt", "numpy", "onnxruntime", "pillow"])
def test_the_key_changes_with_what_computes(
    model: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    one = key_of(model, PREPROCESS, images)
    versions = cache.tools()
    monkeypatch.setattr(cache, "tools", lambda: {**versions, package: "0.0.1"})
    assert key_of(model, PREPROCESS, images) != one


def test_the_key_changes_with_the_instruction_set(
    model: Path, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = key_of(model, PREPROCESS, images)
    machine = replace(cache.this_machine(), instructions=frozenset({"avx512_vnni"}))
    monkeypatch.setattr(cache, "this_machine", lambda: machine)
    assert key_of(model, PREPROCESS, images) != one


@given(data=st.data())
def test_a_damaged_file_is_none(
    tmp_path: Path, statistics: Statistics, data: st.DataObject
) -> None:
    folder = CalibrationCache(folder=tmp_path)
    folder.store(KEY, statistics)
    path = folder.path(KEY)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= data.draw(st.integers(1, 255))
    else:
        del content[position:]
    path.write_bytes(content)
    assert folder.load(KEY) is None
    # It is in nobody's way.
    assert folder.store(KEY, statistics)
    assert_same(statistics, folder.load(KEY))


class Attack:
    """Its pickle calls a function when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.putenv, ("GNET_OPT_ATTACKED", "1")


def packed(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


HOSTILE = {
    "empty": b"",
    "no arrays": packed(),
    "pickled objects": packed(images=np.array([Attack()], object)),
    "text": b"not statistics",
    "without a digest": packed(images=np.array(1)),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_what_was_not_written_here_is_none(kept: CalibrationCache, content: bytes) -> None:
    kept.folder.mkdir(parents=True)
    kept.path(KEY).write_bytes(content)
    assert kept.load(KEY) is None


def test_pickled_objects_are_not_loaded_even_with_a_digest(
    kept: CalibrationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pickle.load", lambda *a, **k: pytest.fail("it was unpickled"))
    content = HOSTILE["pickled objects"]
    kept.folder.mkdir(parents=True)
    kept.path(KEY).write_bytes(hashlib.sha256(content).digest() + content)
    assert kept.load(KEY) is None


def test_another_number_of_bins_is_none(kept: CalibrationCache, statistics: Statistics) -> None:
    kept.store(KEY, statistics)
    with np.load(io.BytesIO(kept.path(KEY).read_bytes()[32:])) as found:
        arrays = dict(found)
    arrays["counts"] = arrays["counts"][:, :, :2048]
    content = packed(**arrays)
    kept.path(KEY).write_bytes(hashlib.sha256(content).digest() + content)
    assert kept.load(KEY) is None


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, model: Path, images: ImageSet, statistics: Statistics
) -> None:
    (tmp_path / "file").write_text("in the way")
    impossible = CalibrationCache(folder=tmp_path / "file" / "calibration")
    assert impossible.store(KEY, statistics) is False
    assert impossible.load(KEY) is None
    told: list[str] = []
    seen = calibrated(
        model, PREPROCESS, images, cache=impossible.folder, threads=1, tell=told.append
    )
    assert seen.images == 3
    assert told == [
        f"{impossible.folder} cannot be written, so the next run calibrates again (see --no-cache)."
    ]


def test_a_full_disk_leaves_nothing(
    kept: CalibrationCache, statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, content: bytes) -> int:
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)
    assert kept.store(KEY, statistics) is False
    assert list(kept.folder.iterdir()) == []


def test_a_folder_that_can_only_be_read_is_of_use(
    kept: CalibrationCache, statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(path: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    kept.store(KEY, statistics)
    monkeypatch.setattr(Path, "touch", touch)
    assert_same(statistics, kept.load(KEY))


def test_only_the_newest_are_kept(
    kept: CalibrationCache, statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_MOST_FILES", 3)
    for second, name in enumerate("abc"):
        kept.store(name, statistics)
        os.utime(kept.path(name), (second, second))
    (kept.folder / "notes.txt").write_text("someone else's")
    (kept.folder / ".b.statistics.x.statistics").write_text("another run is writing it")
    os.utime(kept.folder / ".b.statistics.x.statistics", (0, 0))
    assert kept.load("a") is not None  # used, so that it is now the newest
    kept.store("d", statistics)
    names = sorted(path.name for path in kept.folder.iterdir())
    assert names[0] == ".b.statistics.x.statistics"
    assert names[1:] == ["a.statistics", "c.statistics", "d.statistics", "notes.txt"]


ONE_OF_SEVERAL_RUNS = """
import sys
from pathlib import Path

from gnet_opt.quantization import cache

cache._MOST_FILES = 4
folder, index = cache.CalibrationCache(folder=Path(sys.argv[1])), int(sys.argv[2])
statistics = cache.CalibrationCache(folder=Path(sys.argv[3])).load(sys.argv[4])
print("ready", flush=True)
sys.stdin.readline()
for turn in range(40):
    name = str((index + turn) % 6)
    assert folder.store(name, statistics)
    found = folder.load(name)
    assert found is None or found.images == statistics.images
"""
"""Writes, reads and prunes; a file may be gone again, but never half there."""


def test_runs_at_the_same_time_do_no_harm(
    tmp_path: Path, kept: CalibrationCache, statistics: Statistics
) -> None:
    source = CalibrationCache(folder=tmp_path / "source")
    source.store(KEY, statistics)
    runs = []
    for index in range(4):
        arguments = [str(kept.folder), str(index), str(source.folder), KEY]
        command = [sys.executable, "-c", ONE_OF_SEVERAL_RUNS, *arguments]
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        runs.append(subprocess.Popen(command, text=True, **pipes))
    for run in runs:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        assert run.stdin is not None
        run.stdin.write("go\n")
        run.stdin.flush()
    assert [run.communicate()[1] for run in runs] == ["", "", "", ""]
    assert [run.returncode for run in runs] == [0, 0, 0, 0]
    left = sorted(path.name for path in kept.folder.iterdir())
    assert 1 <= len(left) <= 6
    for name in left:
        assert_same(statistics, kept.load(name.removesuffix(".statistics")))


def test_a_file_that_another_run_removes_meanwhile_is_no_failure(
    kept: CalibrationCache, statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.store("gone", statistics)
    real = Path.glob

    def glob(path: Path, pattern: str) -> list[Path]:
        found = list(real(path, pattern))
        kept.path("gone").unlink()
        return found

    monkeypatch.setattr(Path, "glob", glob)
    assert kept.store(KEY, statistics)
    assert kept.path(KEY).exists()
