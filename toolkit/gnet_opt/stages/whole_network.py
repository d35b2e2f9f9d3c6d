"""Take the weights out of a whole pickled network of torchvision's classes, as plain data.

`stages/unpickle.py` has read its layers as stand-ins, which hold attributes and cannot compute.
The weights say what such a network computes only if it is built as torchvision builds it. So its
layers are compared with those of torchvision's own network, and any other one is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnet_opt.errors import ModelError
from gnet_opt.printable import shown
from gnet_opt.stages.unpickle import PickledModule, whole_network

if TYPE_CHECKING:
    from torch import Tensor, nn

_MODULES = "torchvision.models."
_WRAPPERS = (
    "torch.nn.parallel.data_parallel.DataParallel",
    "torch.nn.parallel.distributed.DistributedDataParallel",
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_UNDERSTOOD_HOOKS = ("torch.nn.utils.prune.", "torch.nn.utils.weight_norm.")
"""Hooks that compute a weight from others, which `stages/reparametrized.py` does itself."""

_REPLACEABLE = ("fc", "aux1", "aux2", "AuxLogits", "dropout")
"""Parts that users replace, and that the weights tell or that training alone uses."""

_IN_HEAD = (
    *("Sequential", "Linear", "Dropout", "Identity", "Flatten", "ReLU", "BatchNorm1d"),
    *("Softmax", "LogSoftmax"),
)
"""Layers of a replaced classifier of which the weights tell what it computes, or its ranking."""

_SETTINGS = (
    *("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "ceil_mode"),
    *("return_indices", "eps", "affine", "track_running_stats", "output_size"),
)
"""What changes the result of a layer without changing the names or shapes of its weights."""


def take_weights(path: str | Path, network: PickledModule) -> tuple[dict[str, Tensor], bool]:
    """The weights of a whole network by name, and whether it applies `transform_input`.

    Args:
        path: The file, for messages.
        network: As read from it; inside of DataParallel or not.

    Raises:
        ModelError: It is not torchvision's GoogLeNet or Inception v3, or was changed.
    """
    for _ in range(2):
        if network.origin in _WRAPPERS:
            inner = _children(network).get("module")
            network = inner if isinstance(inner, PickledModule) else network
    wanted = _torchvision_network(network.origin)
    if wanted is None:
        raise whole_network(path, f" of the class {shown(network.origin)}")
    for name, module in _walk(network):
        if "forward" in module.state or any(_foreign_hooks(module, kind) for kind in _HOOKS):
            raise _changed(path, name or "the network", "has hooks or a forward of its own")
    _compare(path, network, wanted)
    tensors = dict(_tensors(network))
    return tensors, network.state.get("transform_input") is True


def _torchvision_network(origin: str) -> nn.Module | None:
    import torch
    from torchvision.models import GoogLeNet, Inception3

    made: type[nn.Module] | None = {
        f"{_MODULES}googlenet.GoogLeNet": GoogLeNet,
        f"{_MODULES}inception.Inception3": Inception3,
    }.get(origin)
    if made is None:
        return None
    with torch.device("meta"):
        network: nn.Module = made(aux_logits=False, init_weights=False)
    return network


def _children(module: PickledModule) -> Mapping[str, Any]:
    return _table(module, "_modules")


def _table(module: PickledModule, key: str) -> Mapping[str, Any]:
    table = module.state.get(key)
    return table if isinstance(table, Mapping) else {}


def _walk(network: PickledModule) -> Iterator[tuple[str, PickledModule]]:
    """Every layer once, with its path; a file can make a layer hold itself."""
    seen: set[int] = set()
    waiting = [("", network)]
    while waiting:
        name, module = waiting.pop()
        yield name, module
        if id(module) in seen:
            continue
        seen.add(id(module))
        prefix = f"{name}." if name else ""
        for key, child in _children(module).items():
            if isinstance(child, PickledModule) and isinstance(key, str):
                waiting.append((prefix + key, child))


def _tensors(network: PickledModule) -> Iterator[tuple[str, Tensor]]:
    import torch

    for name, module in _walk(network):
        prefix = f"{name}." if name else ""
        for table in ("_parameters", "_buffers"):
            for key, value in _table(module, table).items():
                if isinstance(key, str) and isinstance(value, torch.Tensor):
                    yield prefix + key, value


def _foreign_hooks(module: PickledModule, kind: str) -> bool:
    return any(
        not (isinstance(hook, PickledModule) and hook.origin.startswith(_UNDERSTOOD_HOOKS))
        for hook in _table(module, kind).values()
    )


def _compare(path: str | Path, network: PickledModule, wanted: nn.Module) -> None:
    found = dict(_walk(network))
    ours = dict(wanted.named_modules())
    for name, module in found.items():
        kind = module.origin.rsplit(".", 1)[-1]
        if (name == "fc" or name.startswith("fc.")) and kind not in _IN_HEAD:
            raise _changed(path, name, f"is of the class {shown(kind)}")
    for name, module in found.items():
        if not name or name.split(".")[0] in _REPLACEABLE:
            continue
        if name not in ours:
            raise _changed(path, name, "is not there in torchvision's")
        own = ours[name]
        if module.origin.rsplit(".", 1)[-1] != type(own).__name__:
            raise _changed(path, name, f"is of the class {shown(module.origin.rsplit('.', 1)[-1])}")
        for key in _SETTINGS:
            if key not in module.state or not hasattr(own, key):
                continue
            if _plain(module.state[key]) != _plain(getattr(own, key)):
                raise _changed(path, name, f"has another {key}")
    missing = [
        name
        for name, own in ours.items()
        if name
        and name not in found
        and name.split(".")[0] not in _REPLACEABLE
        and any(True for _ in own.parameters())
    ]
    if missing:
        raise _changed(path, missing[0], "is missing")


def _plain(value: Any) -> Any:
    """A setting to compare; pairs of equal numbers count as the number, as layers take both."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(one, (int, float, str, type(None))) for one in values):
        return "not known"
    return values[0] if len(set(values)) == 1 else values


def _changed(path: str | Path, where: str, what: str) -> ModelError:
    return ModelError(
        f"{path} holds a whole pickled network that differs from torchvision's: {shown(where)} "
        f"{what}. Pass package.module:factory, which builds the network and loads its weights."
    )
