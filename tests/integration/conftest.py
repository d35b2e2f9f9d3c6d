from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from commands import gnet_opt
from world import World, draw, make_world

from gnet_opt import scoring


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small networks are slower on two threads, and the tests share their cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def quick_latency() -> Iterator[None]:
    """Two short rounds: here it counts that latency is measured, not how well."""
    quick = replace(scoring.TIMING, rounds=2, seconds=0.01, count=2, warm_up=0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "TIMING", quick)
        patch.setattr(scoring, "MOST_ROUNDS", 2)
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def plenty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images to calibrate on, of which 24 are held back."""
    folder = tmp_path_factory.mktemp("plenty") / "calibration"
    draw(folder, 120, seed=7)
    return folder


@pytest.fixture(scope="session")
def quantize_arguments(world: World) -> list[str]:
    return [
        "quantize",
        str(world.small),
        "--calibration",
        str(world.calibration),
        "--eval",
        str(world.evaluation),
        "--max-drop",
        "50",
        "--threads",
        "1",
    ]


@pytest.fixture(scope="session")
def bundle(
    quantize_arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A bundle for a target, made once; tests that change it copy it."""
    root = tmp_path_factory.mktemp("bundles")

    @functools.cache
    def make(target: str) -> Path:
        done = gnet_opt(*quantize_arguments, "--target", target, "-o", root / target)
        assert done.code == 0, done.err
        return root / target

    return make


@pytest.fixture(autouse=True)
def tests_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that subprocesses find `factories` and `networks`, too."""
    here = Path(__file__).parent
    folders = os.pathsep.join([str(here), str(here.parent)])
    monkeypatch.setenv("PYTHONPATH", folders, prepend=os.pathsep)
