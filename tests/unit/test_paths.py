from __future__ import annotations

from pathlib import Path

import pytest

from gnet_opt.paths import (
    calibration_cache,
    demo_calibration,
    demo_card,
    demo_evaluation,
    remote_runs,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without any setting."""
    for name in ("GNET_OPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_what_ships_is_there() -> None:
    assert demo_card().is_file()
    assert demo_calibration().is_dir()
    assert demo_evaluation().is_dir()


def test_the_cache_is_below_the_home(home: Path) -> None:
    assert calibration_cache() == home / ".cache" / "gnet-opt" / "calibration"


def test_xdg_cache_home_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert calibration_cache() == tmp_path / "xdg" / "gnet-opt" / "calibration"


@pytest.mark.parametrize("value", ["", "relative", "./here"])
def test_a_relative_xdg_cache_home_is_ignored(
    home: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """The specification: "All paths set in these environment variables must be absolute"."""
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert calibration_cache() == home / ".cache" / "gnet-opt" / "calibration"


def test_gnet_opt_cache_goes_before_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("GNET_OPT_CACHE", str(tmp_path / "own"))
    assert calibration_cache() == tmp_path / "own" / "calibration"
    assert remote_runs() == tmp_path / "own" / "remote"
    monkeypatch.setenv("GNET_OPT_CACHE", "")
    assert calibration_cache() == tmp_path / "xdg" / "gnet-opt" / "calibration"


def test_asking_where_it_is_makes_no_folder(home: Path) -> None:
    calibration_cache()
    assert list(home.iterdir()) == []
