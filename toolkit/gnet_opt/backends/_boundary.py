"""Where foreign code is entered: its exceptions become ours, its absence becomes a probe."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt

from gnet_opt.errors import BackendError, GnetOptError
from gnet_opt.runtime import InputArray, Probe

_LONGEST = 400
# How OpenVINO begins: Check 'res.status == pugi::status_ok' failed at src/frontends/ir/...cpp:219:
_LOCATION = re.compile(r"^Check '.*' failed at \S+:\d+:")


@contextlib.contextmanager
def translated(doing: str, advice: str) -> Iterator[None]:
    """Turn whatever a runtime raises inside the block into one BackendError, chained.

    Args:
        doing: What is done and to which file; the subject of "... failed".
        advice: What the user can do now, a full sentence.

    Raises:
        BackendError: The block raised anything that is not gnet-opt's own.
    """
    try:
        yield
    except GnetOptError:
        raise
    # Runtimes have no common base: OpenVINO raises RuntimeError, ONNX Runtime direct subclasses
    # of Exception, a broken installation ImportError or OSError.
    except Exception as error:
        raise failure(error, doing, advice) from error


def failure(error: Exception, doing: str, advice: str) -> BackendError:
    """What a runtime raised, as `translated` has it: for what runs too often to enter a block.

    After a picture went through the network nothing of ours is in the caches any more, and each
    call costs ten times what it costs in a loop by itself.
    """
    return BackendError(f"{doing} failed: {_reason(error)}. {advice}")


def probe_package(module: str, distributions: tuple[str, ...], extra: str) -> Probe:
    """Look for an installed runtime without importing it; never raises.

    Args:
        module: The import name.
        distributions: Names of the packages that can bring it, to read the version from.
        extra: The extra of gnet-opt that brings it.
    """
    try:
        found = find_spec(module) is not None
    # `find_spec` raises ValueError for a half-made entry in sys.modules, and import hooks of
    # others may raise ImportError.
    except (ImportError, ValueError):
        found = False
    if not found:
        return Probe(
            available=False,
            version="",
            detail=f'{module} is not installed: pip install "gnet-opt[{extra}]"',
        )
    for distribution in distributions:
        with contextlib.suppress(PackageNotFoundError):
            return Probe(available=True, version=version(distribution), detail="")
    return Probe(available=True, version="unknown", detail="")


def check_input(
    batch: npt.NDArray[np.generic],
    expected: tuple[int | None, ...],
    model: str,
    dtype: str = "float32",
) -> InputArray:
    """Require a batch that the model takes, before the runtime sees it.

    Args:
        batch: What the caller gave.
        expected: The model's input shape, None for a free dimension.
        model: The artifact's path, for the message.
        dtype: The model's input type, as NumPy calls it.

    Returns:
        The batch, contiguous.

    Raises:
        BackendError: The shape or the type differs; both are stated.
    """
    fits = batch.ndim == len(expected) and all(
        want is None or want == got for want, got in zip(expected, batch.shape, strict=True)
    )
    if not fits or batch.dtype != dtype or 0 in batch.shape:
        wanted = ", ".join("N" if size is None else str(size) for size in expected)
        got = ", ".join(str(size) for size in batch.shape)
        raise BackendError(
            f"{model} takes {dtype} of shape ({wanted}), but got {batch.dtype} of shape ({got}). "
            "Preprocess pictures with the bundle's own preprocess."
        )
    return np.ascontiguousarray(batch)


def _reason(error: Exception) -> str:
    """The telling lines of a foreign message: without source locations, not too long."""
    lines = [_LOCATION.sub("", line).strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith("Exception from ")]
    text = " ".join(telling).rstrip(". ") or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
