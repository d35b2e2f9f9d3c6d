"""Read the weights in a checkpoint file, safely, and load them into a network, all or none.

What kind of file it is, is told by `stages/file_kind.py`; `stages/unpickle.py` reads the pickles
of torch, of which nothing is run, and `stages/weights.py` finds the network in what was read.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gnet_opt.errors import ModelError
from gnet_opt.printable import shown
from gnet_opt.stages.file_kind import SUFFIXES, kind_of, unreadable
from gnet_opt.stages.unpickle import read_torch, refuse_pickle
from gnet_opt.stages.weights import Checkpoint, find_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

_SHOWN = 3
_NONE: Mapping[Any, Collection[str]] = MappingProxyType({})


def read_state_dict(
    path: Path, known: Mapping[Any, Collection[str]] = _NONE, *, choice: str | None = None
) -> Checkpoint:
    """Read the weights of one network in a checkpoint, by the network's own names.

    Args:
        path: The file.
        known: The networks that it can hold, each with the names that it has to have. Under
            which wrapping keys and prefixes they stand in the file is found by them.
        choice: Which weights to take where the file has several, such as `ema`.

    Raises:
        ModelError: The file is missing, truncated, unsafe to unpickle, or holds no tensors.
    """
    path = existing_file(path)
    kind = kind_of(path)
    if kind == "pickle":
        raise refuse_pickle(path)
    content = _read_safetensors(path) if kind == "safetensors" else read_torch(path)
    return find_weights(path, content, known, choice)


def state_dict_of(
    where: str,
    content: Mapping[str, Any],
    known: Mapping[Any, Collection[str]] = _NONE,
    *,
    choice: str | None = None,
) -> Checkpoint:
    """As `read_state_dict`, of what a file would hold."""
    return find_weights(where, content, known, choice)


def existing_file(path: Path) -> Path:
    """The path itself, where it is a file.

    Raises:
        ModelError: There is nothing, or a folder; the message suggests what was meant.
    """
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in (*SUFFIXES, ".toml"))
        hint = f" It holds {', '.join(inside[:_SHOWN])}." if inside else ""
        raise ModelError(f"{path} is a folder. Pass a checkpoint or a model card.{hint}")
    if path.exists() and not path.is_file():
        # Opening a pipe would wait for somebody who writes to it.
        raise ModelError(
            f"{path} is a pipe, a socket or a device, not a file. Pass a checkpoint or "
            "a model card."
        )
    if not path.exists():
        raise ModelError(
            f"{path} does not exist.{close_names(path)} MODEL is a checkpoint "
            f"({', '.join(SUFFIXES)}), a model card .toml, package.module:factory, or the word "
            "torchvision."
        )
    return path


def close_names(path: Path) -> str:
    """A sentence with the files beside `path` that are spelled alike, or nothing."""
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either."
    known = [p.name for p in path.parent.iterdir() if p.suffix.lower() in (*SUFFIXES, ".toml")]
    if path.parent == Path():
        known.append("torchvision")
    close = difflib.get_close_matches(path.name, known, n=_SHOWN)
    return (
        f" Did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""
    )


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Any] = load_file(path)
    # TypeError: a shape beyond 64 bits.
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise unreadable(path, str(error), "safetensors") from error
    return tensors


def fit(
    where: str,
    network: str,
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str] | None = None,
) -> None:
    """Load weights, all of them or none.

    Args:
        where: The file, for messages.
        network: The network, for messages.
        module: Gets the weights, as float32.
        tensors: The weights by the names in the file.
        names: The file's names mapped to the module's, where they differ.

    Raises:
        ModelError: Names or shapes differ, or a value is not finite.
    """
    expected = module.state_dict()
    if names is None:
        names = {name: name for name in expected}
    wanted = {name: expected[ours] for name, ours in names.items()}
    missing = [name for name in essential_names(wanted) if name not in tensors]
    surplus = [name for name in tensors if name not in wanted]
    shapes = [
        f"{name} is {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}"
        for name, tensor in tensors.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    problems = [
        f"{what}: {len(found)} ({first_names(found)})"
        for found, what in (
            (missing, "missing"),
            (surplus, "not known"),
            (shapes, "of another shape"),
        )
        if found
    ]
    if problems:
        raise ModelError(
            f"{where} does not fit {network}. Keys {'; '.join(problems)}. Save the state dict of "
            "the whole network, or pass package.module:factory for a changed one."
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not name.endswith("num_batches_tracked"):
            raise ModelError(
                f"{where}: {name} is {str(tensor.dtype).removeprefix('torch.')}, not floating "
                "point. Pass the float checkpoint, before any quantization."
            )
    check_values(where, tensors)
    module.load_state_dict({names[name]: tensor for name, tensor in tensors.items()}, strict=False)


def essential_names(names: Mapping[str, Any]) -> list[str]:
    """Names that a checkpoint must have; the batch counter is of no use after training."""
    return [name for name in names if not name.endswith("num_batches_tracked")]


def check_values(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Require finite weights, and variances that are not negative.

    Raises:
        ModelError: The message names `where` and the first key that does not fit.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if not bool(tensor.isfinite().all()):
            raise ModelError(
                f"{where}: {name} has values that are not finite (NaN or infinity). The training "
                "diverged or the file is damaged; pass an earlier checkpoint."
            )
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise ModelError(
                f"{where}: {name} has negative variances. The file is damaged; pass an earlier "
                "checkpoint."
            )


def first_names(names: Sequence[str]) -> str:
    """The first few of many, for a message."""
    listed = ", ".join(shown(name) for name in names[:_SHOWN])
    return f"{listed}, ..." if len(names) > _SHOWN else listed or "none"


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 over the names, types, shapes and bytes of a state dict, in name order."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
