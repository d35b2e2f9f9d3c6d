"""The shape of a manifest, which scripts rely on.

`GNET_OPT_UPDATE_GOLDEN=1 python -m pytest tests/integration/test_manifest_shape.py` writes it anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"


def shape(value: Any) -> Any:
    """Keys with the types of their values; a list as the shape of its first item."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return type(value).__name__


@pytest.mark.parametrize("target", ["openvino-cpu", "jetson"])
def test_the_shape_of_a_manifest(bundle: Callable[[str], Path], target: str) -> None:
    manifest = json.loads((bundle(target) / "manifest.json").read_text())
    if target == "openvino-cpu" and manifest["latency"] is None:
        pytest.skip("this machine is no x86-64, so that nothing is native")
    manifest["tools"] = {}  # whatever is installed
    for name in ("sqnr_db", "runtime_sqnr_db"):  # None where two runtimes agree to the last bit
        if name in manifest["facts"]["golden"]:
            manifest["facts"]["golden"][name] = None
    text = json.dumps(shape(manifest), indent=2, sort_keys=True) + "\n"
    path = GOLDEN / f"manifest-{target}.json"
    if os.environ.get("GNET_OPT_UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_the_manifest_on_disk_has_one_form(bundle: Callable[[str], Path]) -> None:
    text = (bundle("jetson") / "manifest.json").read_text(encoding="utf-8")
    again = json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert text == again
    for word in ("/tmp", "/home", str(Path.cwd())):  # nothing of the machine that built it
        assert word not in text
