"""Where things are on this machine.

The shipped model and image set are package data in a wheel and stand at the top level of a
checkout; the cache is where the user's other caches are.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parents[1]


def _shipped(relative: str) -> Path:
    packaged = _PACKAGE / "_data" / relative
    return packaged if packaged.exists() else _CHECKOUT / relative


def demo_card() -> Path:
    """The model card of the embedded demo model."""
    return _shipped("models/demo/card.toml")


def demo_calibration() -> Path:
    """The folder of the demo images to calibrate on."""
    return _shipped("calibration/demo/calibration")


def demo_evaluation() -> Path:
    """The folder of the demo images to evaluate on."""
    return _shipped("calibration/demo/evaluation")


def calibration_cache() -> Path:
    """The folder of kept calibration statistics."""
    return _cache() / "calibration"


def chart_fonts() -> Path:
    """The folder in which matplotlib notes the fonts of this machine."""
    return _cache() / "matplotlib"


def remote_runs() -> Path:
    """The folder that tells which runs are under way on devices."""
    return _cache() / "remote"


def _cache() -> Path:
    """gnet-opt's cache.

    `GNET_OPT_CACHE` names it; without it the XDG Base Directory Specification says where caches
    are.
    """
    own = os.environ.get("GNET_OPT_CACHE")
    if own:
        return Path(own)
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(xdg) if Path(xdg).is_absolute() else Path.home() / ".cache"
    return base / "gnet-opt"
