"""Where the shipped model and image set are: package data in a wheel, top level in a checkout."""

from __future__ import annotations

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
