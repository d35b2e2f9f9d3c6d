"""Where the data for measuring is: never shipped, and absent on most machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_CHECKOUT = Path(__file__).resolve().parents[1]


def shared_data() -> Path:
    """The folder that GNET_OPT_DATA names; the test is skipped where there is none."""
    folder = Path(os.environ.get("GNET_OPT_DATA", _CHECKOUT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist; set GNET_OPT_DATA to the folder with the data")
    return folder
