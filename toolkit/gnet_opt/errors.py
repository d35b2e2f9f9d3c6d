"""The one tree of errors that gnet-opt raises on purpose, with the exit code of each.

A message says what failed, where, and what to do now. Anything else that escapes is a bug.
"""

from __future__ import annotations

from gnet_opt.printable import one_line


class GnetOptError(Exception):
    """Base of every error that gnet-opt raises on purpose.

    Its text is for people, whatever the files hold that it speaks of: on one line, without control
    characters, and not too long. Further arguments are what the message lists, a line each.
    """

    exit_code = 1

    def __str__(self) -> str:
        return "\n  - ".join(one_line(str(part)) for part in self.args)


class ConfigError(GnetOptError):
    """An option, a target file or a model card cannot be used as given."""

    exit_code = 2


class MissingDependencyError(GnetOptError):
    """A package that this step needs is not installed."""

    exit_code = 3


class ModelError(GnetOptError):
    """A model cannot be read, is not a GoogLeNet, or changed when it must not."""

    exit_code = 4


class CalibrationError(GnetOptError):
    """An image set is empty, corrupt, overlapping or unfit for its purpose."""

    exit_code = 5


class IntegrityError(GnetOptError):
    """A bundle is incomplete, was changed, or does not give its golden outputs."""

    exit_code = 6


class BackendError(GnetOptError):
    """A runtime or a compiler refused the model or failed."""

    exit_code = 7


class GateFailedError(GnetOptError):
    """The result was measured and is worse than the budget allows, or a linter found errors."""

    exit_code = 8


class RemoteError(GnetOptError):
    """A device cannot be reached or used, or what ran on it gave no result."""

    exit_code = 9


def require(module: str, extra: str, purpose: str) -> None:
    """Fail in one sentence when an optional package is missing.

    Args:
        module: The import name, for example `onnxruntime`.
        extra: The extra of gnet-opt that brings it.
        purpose: What it is needed for, as the object of "needs ... to".

    Raises:
        MissingDependencyError: The module cannot be found.
    """
    from importlib.util import find_spec

    if find_spec(module) is None:
        raise MissingDependencyError(
            f"{module} is needed to {purpose}, and it is not installed. "
            f'Install it with: pip install "gnet-opt[{extra}]"'
        )
