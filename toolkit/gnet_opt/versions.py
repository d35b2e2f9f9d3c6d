"""Versions of what makes a result, for manifests and result files."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from gnet_opt import __version__

_TOOLS = (
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "openvino",
    "pillow",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
    "torchvision",
)


def tools() -> dict[str, str]:
    """Versions of what makes the result, for the manifest."""
    found = {"gnet-opt": __version__, "python": platform.python_version()}
    for name in _TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
