"""Where the weights of an ONNX file lie, when they are not in the file itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

import onnx_ir as ir

from gnet_opt.errors import ModelError
from gnet_opt.printable import shown


def check_external_data(model: ir.Model, path: Path) -> None:
    """Require that a file's external data lies in the folder of the file or below it.

    The file names it, and may name any file of this machine. ONNX's specification (IR.md,
    "External Tensor Data") has `location` relative to the file; newer versions of onnx, onnx-ir and
    ONNX Runtime refuse what leaves the folder, each in its own words and only when they read it.

    Raises:
        ModelError: A location is absolute, leads out of the folder, there or through a link, or is
            empty.
    """
    folder = path.parent.resolve()
    for tensor in _external_tensors(model):
        location = str(tensor.location)
        # A drive or a backslash would be harmless here and leave the folder on Windows.
        parts = PureWindowsPath(location)
        leads_out = parts.anchor or ".." in parts.parts or "\0" in location or not parts.parts
        if leads_out or not (folder / location).resolve().is_relative_to(folder):
            raise ModelError(
                f"{path}: the data of {shown(tensor.name or 'a tensor')} is said to be in "
                f"{shown(repr(location))}, which is not in the folder of the file, and was not "
                "read. Export the model into one file, or put its data beside it."
            )


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
    nodes = [node for graph in model.graphs() for node in graph]
    nodes += [node for function in model.functions.values() for node in function.all_nodes()]
    for node in nodes:
        for attribute in node.attributes.values():
            held = attribute.value if isinstance(attribute, ir.Attr) else None
            for one in held if isinstance(held, (list, tuple)) else (held,):
                if isinstance(one, ir.ExternalTensor):
                    yield one
