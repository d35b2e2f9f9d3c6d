"""Read the weights in a checkpoint file, safely, and load them into a network, all or none.

A checkpoint is never unpickled freely: `torch.load` runs with `weights_only=True`, which refuses
everything that could execute code.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gnet_opt.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

_TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".tar")
_SUFFIXES = (*_TORCH_SUFFIXES, ".safetensors")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.")
_SHOWN = 3
_NONE: Mapping[Any, Collection[str]] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint file says about one network.

    Attributes:
        tensors: The weights by the network's own names, without wrappers and prefixes.
        notes: What was chosen, computed or left out while reading, in sentences for the user.
        transform_input: Whether the network applies torchvision's `transform_input`; None where
            the file does not say, which only a whole pickled network does.
    """

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    transform_input: bool | None = None


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
    names = [name for network in known.values() for name in network]
    path = existing_file(path)
    if path.suffix == ".onnx":
        raise ModelError(
            f"{path} is an ONNX file. Pass the PyTorch checkpoint that it was exported from."
        )
    if path.suffix not in _SUFFIXES:
        raise ModelError(
            f"{path} is not a checkpoint that is known. Pass {', '.join(_SUFFIXES)}, a model card "
            ".toml, or package.module:factory."
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return Checkpoint(tensors=_without_prefixes(_unwrap(path, content), names))


def state_dict_of(
    where: str,
    content: Mapping[str, Any],
    known: Mapping[Any, Collection[str]] = _NONE,
    *,
    choice: str | None = None,
) -> Checkpoint:
    """As `read_state_dict`, of what a file would hold."""
    names = [name for network in known.values() for name in network]
    return Checkpoint(tensors=_without_prefixes(_unwrap(Path(where), content), names))


def existing_file(path: Path) -> Path:
    """The path itself, where it is a file.

    Raises:
        ModelError: There is nothing, or a folder; the message suggests what was meant.
    """
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (*_SUFFIXES, ".toml"))
        hint = f" It holds {', '.join(inside[:_SHOWN])}." if inside else ""
        raise ModelError(f"{path} is a folder. Pass a checkpoint or a model card.{hint}")
    if not path.exists():
        raise ModelError(
            f"{path} does not exist.{close_names(path)} MODEL is a checkpoint "
            f"({', '.join(_SUFFIXES)}), a model card .toml, package.module:factory, or the word "
            "torchvision."
        )
    return path


def close_names(path: Path) -> str:
    """A sentence with the files beside `path` that are spelled alike, or nothing."""
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either."
    known = [p.name for p in path.parent.iterdir() if p.suffix in (*_SUFFIXES, ".toml")]
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
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read as safetensors ({error}). It may be truncated: compare its "
            "size with the original and copy it again."
        ) from error
    return tensors


def _read_pickle(path: Path) -> Mapping[str, Any]:
    import argparse
    import pickle

    import torch

    zipped = zipfile.is_zipfile(path)
    try:
        # torchvision's training script saves its arguments beside the weights. A Namespace
        # only holds attributes, so reading one runs nothing.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        unsafe = _unsafe_globals(path)
        if any(name.startswith(("torch.nn.modules.", "torchvision.models.")) for name in unsafe):
            raise ModelError(
                f"{path} holds a whole pickled network, and reading one means running code from "
                "the file; nothing of it was run. Save the weights alone, with "
                "torch.save(model.state_dict(), ...), and pass that file."
            ) from error
        if unsafe:
            raise ModelError(
                f"{path} asks for {', '.join(unsafe[:_SHOWN])} to be run or built while it is "
                "read. That is not needed for weights and can be an attack; nothing of it was "
                "run. Get the weights from a source you trust, saved with "
                "torch.save(model.state_dict(), ...), or as .safetensors."
            ) from error
        raise _unreadable(path, error) from error
    except Exception as error:
        # A broken file fails in as many ways as there are places to break it.
        if "TorchScript" in str(error):
            raise ModelError(
                f"{path} is a TorchScript archive. Save the weights alone, with "
                "torch.save(model.state_dict(), ...), and pass that file."
            ) from error
        raise _unreadable(path, error) from error
    if not isinstance(content, Mapping):
        raise ModelError(
            f"{path} holds a {type(content).__name__}, not a state dict. Save the weights with "
            "torch.save(model.state_dict(), ...)."
        )
    return content


def _unreadable(path: Path, error: Exception) -> ModelError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelError(
        f"{path} cannot be read as a PyTorch checkpoint ({first}). It may be truncated: compare "
        "its size with the original and copy it again."
    )


def _unsafe_globals(path: Path) -> list[str]:
    """The names that the pickle wants beyond plain tensors, read without running it."""
    import pickletools

    import torch

    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError):
        pass  # Not torch's zip format; look at the raw pickle below.
    names: list[str] = []
    strings: list[str] = []
    content = io.BytesIO(path.read_bytes())
    # The old format is several pickles in a row; what comes after them is raw bytes, which ends
    # the loop as an error.
    with contextlib.suppress(ValueError):
        while content.tell() < len(content.getbuffer()):
            for opcode, argument, _ in pickletools.genops(content):
                if opcode.name == "GLOBAL":
                    names.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    plain = ("collections.OrderedDict", "torch._utils.")
    return sorted({name for name in names if not name.startswith(plain)})


def _unwrap(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    from torch import Tensor

    inner: Mapping[str, Any] | None = content
    while inner is not None:
        content = inner
        inner = next((content[k] for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(map(str, list(content)[:_SHOWN])) or "none"
        raise ModelError(
            f"{path} holds no weights (its keys: {keys}). Save the state dict of the network, "
            "with torch.save(model.state_dict(), ...)."
        )
    return tensors


def _without_prefixes(tensors: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    # torch.optim.swa_utils.AveragedModel counts beside its `module.`.
    tensors = {key: value for key, value in tensors.items() if key != "n_averaged"}
    for prefix in _leading_prefixes(tensors, names):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _leading_prefixes(keys: Collection[str], names: Collection[str]) -> Iterator[str]:
    rest = list(keys)
    while not any(key in names for key in rest):
        half = len(rest) / 2
        prefix = next((p for p in _PREFIXES if sum(k.startswith(p) for k in rest) > half), "")
        if not prefix:
            return
        yield prefix
        rest = [key.removeprefix(prefix) for key in rest]


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
    shown = ", ".join(names[:_SHOWN])
    return f"{shown}, ..." if len(names) > _SHOWN else shown or "none"


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 over the names, types, shapes and bytes of a state dict, in name order."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
