"""Call `package.module:factory`, the one place where code of the user runs to make a network."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnet_opt.errors import ModelError

if TYPE_CHECKING:
    from torch import nn


def call_factory(spec: str) -> nn.Module | Mapping[str, Any]:
    """Import what a `package.module:name` names, from the current folder or what is installed.

    Returns:
        The network, or a mapping: a state dict, or a checkpoint as it would stand in a file.

    Raises:
        ModelError: It cannot be imported, fails, ends Python, or gives something else.
    """
    from torch import nn

    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ModelError(f"The factory is {spec!r}; it must be package.module:function.")
    with _importable_cwd():
        try:
            value: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise ModelError(
                    f"{spec}: {module_name} needs the module {error.name}, which is not "
                    "installed. Install it."
                ) from error
            raise ModelError(
                f"{spec}: there is no module {error.name}. Run from the folder that holds it, or "
                "install it."
            ) from error
        except SystemExit as error:
            raise _ends(spec, f"importing {module_name}", error) from error
        except Exception as error:
            raise ModelError(
                f"{spec}: importing {module_name} fails with {type(error).__name__}: {error}"
            ) from error
        for part in attribute.split("."):
            if not hasattr(value, part):
                close = difflib.get_close_matches(part, dir(value), n=1)
                hint = f" Did you mean {close[0]}?" if close else ""
                raise ModelError(f"{spec}: {module_name} has no {attribute}.{hint}")
            value = getattr(value, part)
        if isinstance(value, (nn.Module, Mapping)):
            return value
        if not callable(value):
            raise ModelError(
                f"{spec} is a {type(value).__name__}, neither a network nor a function."
            )
        try:
            built = value()
        except SystemExit as error:
            raise _ends(spec, f"calling {attribute}()", error) from error
        except Exception as error:
            raise ModelError(
                f"{spec}: calling {attribute}() fails with {type(error).__name__}: {error}"
            ) from error
    if not isinstance(built, (nn.Module, Mapping)):
        raise ModelError(
            f"{spec} returns a {type(built).__name__}. Return a torch.nn.Module with its weights, "
            "or a state dict."
        )
    return built


def _ends(spec: str, doing: str, error: SystemExit) -> ModelError:
    return ModelError(
        f"{spec}: {doing} ends Python (sys.exit({error.code!r})). Name a function that only builds "
        "the network, without reading a command line."
    )


@contextlib.contextmanager
def _importable_cwd() -> Iterator[None]:
    folder = str(Path.cwd())
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)
