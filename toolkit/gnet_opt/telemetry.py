"""Telemetry of the runtimes is off: the one place that sees to it.

ONNX Runtime from 1.29 on and OpenVINO report home by default. Nothing of that is an option here:
what the user has set is overruled, so that no command sends anything.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

_OPENVINO = "openvino_telemetry"


def switch_off() -> None:
    """Keep ONNX Runtime from reporting home, in this process and in those that it starts.

    `Privacy.md` in its wheel: the variable is read when the library is loaded, and afterwards no
    device identifier is written and no event queued or sent; the call of its API comes too late
    for the first event. The package calls this before any of its modules can import ONNX Runtime,
    directly or through torch.onnx and onnxscript. Where a program imported ONNX Runtime before
    gnet-opt, that program's own setting holds.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry.

    `import openvino` by itself reports the import to Google Analytics, from a process that it
    forks. Nobody asked for that, and the forked process keeps our pipes open where the network is
    slow to answer. Without the package `openvino_telemetry` OpenVINO does the same and sends
    nothing, so that package is hidden while OpenVINO is imported.
    """
    if "openvino" not in sys.modules:
        hidden = {name: module for name, module in sys.modules.items() if name == _OPENVINO}
        sys.modules[_OPENVINO] = None  # type: ignore[assignment]
        try:
            importlib.import_module("openvino")
        finally:
            del sys.modules[_OPENVINO]
            sys.modules.update(hidden)
    return sys.modules["openvino"]
