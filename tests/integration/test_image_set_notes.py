"""What was passed over or read otherwise in an image set reaches the user of every command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import gnet_opt
from world import LABELS, World

Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def odd(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled pictures in folders, one of them twice, with a file that is no picture."""
    root = tmp_path_factory.mktemp("sets") / "odd"
    for index, path in enumerate(sorted(world.evaluation.glob("*.png"))):
        folder = root / LABELS[index % len(LABELS)].upper() / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    shutil.copy(root / "ANT" / "deep" / "00.png", root / "ANT" / "again.png")
    (root / "BEE" / "x.heic").touch()
    return root


def expected(root: Path, *, copies: bool = True, model: bool = True) -> list[str]:
    spelling = f"{root}: class names in another spelling were matched: ANT is ant, BEE is bee, "
    return [
        *([f"{spelling}CAT is cat, ..."] if model else []),
        f"Passed over in {root}: files with endings of no picture: 1 (.heic 1).",
        *(["1 of 17 pictures of odd are copies of others in it"] if copies else []),
    ]


def assert_told(notes: list[str], wanted: list[str]) -> None:
    for text in wanted:
        assert sum(note.startswith(text) or text in note for note in notes) == 1, (text, notes)


def test_quantize(world: World, odd: Path, tmp_path: Path) -> None:
    sets = ["--calibration", world.calibration, "--eval", odd]
    done = gnet_opt(
        "quantize", world.small, "-t", "jetson", *sets, "-o", tmp_path / "b", "--dry-run", "--json"
    )
    assert done.code == 0, done.err
    assert_told(done.json["notes"], expected(odd))
    sets = ["--calibration", odd]
    done = gnet_opt(
        "quantize", world.small, "-t", "jetson", *sets, "-o", tmp_path / "b", "--dry-run"
    )
    assert done.code == 0, done.err
    assert_told(done.err.splitlines(), expected(odd))


def test_evaluate(world: World, odd: Path) -> None:
    done = gnet_opt("evaluate", world.small, "--images", odd, "--json")
    assert done.code == 0, done.err
    assert done.json["images"] == 17
    assert_told(done.json["notes"], expected(odd))


def test_bench(odd: Path, bundle: Make) -> None:
    quick = ["--seconds", "0.05", "--scenario", "single-stream", "--threads", "1", "--json"]
    done = gnet_opt("bench", bundle("openvino-cpu"), *quick, "--images", odd)
    assert done.code == 0, done.err
    assert_told(done.json["subjects"][0]["notes"], expected(odd, copies=False))


def test_sensitivity(world: World, odd: Path, tmp_path: Path) -> None:
    command = ["sensitivity", world.small, "-t", "jetson", "--calibration", odd, "--jobs", "1"]
    done = gnet_opt(*command, "--count", "1", "-o", tmp_path / "s")
    assert done.code == 0, done.err
    assert_told(done.err.splitlines(), expected(odd))


def test_train(odd: Path, tmp_path: Path) -> None:
    size = ["--epochs", "1", "--early-epochs", "1", "--early-size", "32", "--threads", "1"]
    done = gnet_opt("train", odd, "-o", tmp_path / "m", *size)
    assert done.code == 0, done.err
    assert_told(done.err.splitlines(), expected(odd, model=False))


@pytest.mark.parametrize("option", ["--calibration", "--eval", "--output"])
def test_an_empty_path_is_none(world: World, tmp_path: Path, option: str) -> None:
    """An unset variable of a shell is not the current folder."""
    options = {"--calibration": str(world.calibration), "--output": str(tmp_path / "b"), option: ""}
    chosen = [text for pair in options.items() for text in pair]
    done = gnet_opt("quantize", world.small, "-t", "jetson", *chosen)
    assert (done.code, done.out) == (2, "")
    assert "the path is empty" in done.err
