"""The registry of backends: built-in ones and those of installed packages.

A package adds a backend with an entry point in the group `gnet_opt.backends`, named as a target
file names it, whose value is the import string of a class that is made without arguments. A
built-in name cannot be replaced.
"""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points
from typing import cast

from gnet_opt.backends._boundary import translated
from gnet_opt.errors import ConfigError
from gnet_opt.runtime import Backend

GROUP = "gnet_opt.backends"

BUILT_IN = {
    "onnxruntime": "gnet_opt.backends.onnxruntime:OnnxRuntimeBackend",
    "openvino": "gnet_opt.backends.openvino:OpenVinoBackend",
    "reference": "gnet_opt.backends.onnxruntime:ReferenceBackend",
    "tensorrt": "gnet_opt.backends.tensorrt:TensorRtBackend",
    "tensorrt-rtx": "gnet_opt.backends.tensorrt_rtx:TensorRtRtxBackend",
}


def names() -> tuple[str, ...]:
    """The names of all backends, sorted. Nothing is imported."""
    return tuple(sorted(_table()))


def get(name: str) -> Backend:
    """The backend of a name.

    Raises:
        ConfigError: There is no such backend; the nearest name is suggested.
        BackendError: The package that brings it cannot be imported.
    """
    table = _table()
    if name not in table:
        near = difflib.get_close_matches(name.lower(), table, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"There is no backend {name!r}.{hint} Known are {', '.join(sorted(table))}; an "
            f"installed package adds one with an entry point in the group {GROUP}."
        )
    module, _, attribute = table[name].partition(":")
    with translated(
        f"Loading the backend {name} from {table[name]}",
        "Reinstall or remove the package that brings it.",
    ):
        return cast(Backend, getattr(importlib.import_module(module), attribute)())


def _table() -> dict[str, str]:
    """Import strings by name."""
    return {**{entry.name: entry.value for entry in entry_points(group=GROUP)}, **BUILT_IN}
