"""Strip what the logits do not depend on: the auxiliary heads, above all."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gnet_opt.errors import ModelError
from gnet_opt.model import Model
from gnet_opt.preprocess import FloatArray

if TYPE_CHECKING:
    from torch import nn


def strip(model: Model, examples: FloatArray) -> tuple[Model, dict[str, Any]]:
    """Remove every submodule that inference never uses, and prove that nothing changed.

    A submodule goes when, in eval mode, neither it nor anything inside it is called and none of
    its tensors is read. In torchvision's GoogLeNet these are the auxiliary heads, which were
    added for training alone (Szegedy et al. 2014, section 5). What is computed without reaching
    the logits stays here; it has no place in the exported graph, and falls away there.

    Args:
        model: The model; it is not changed.
        examples: Real preprocessed pictures, float32 of shape (N, planes, H, W).

    Returns:
        The stripped model, and the facts: parameters before, after and removed, bytes removed
        (parameters and buffers as stored), the modules removed, and on how many pictures the
        logits were found identical bit by bit.

    Raises:
        ModelError: A logit changed, or the network failed without the removed modules.
    """
    from gnet_opt.networks.outputs import compute_logits

    before = compute_logits(model.module, examples)
    if before.shape[1] != model.classes:
        raise ModelError(
            f"{model.name} gives {before.shape[1]} logits and is said to have {model.classes} "
            "classes. Correct the number of classes."
        )
    module = copy.deepcopy(model.module)
    unused = _unused_modules(module, examples[:1])
    removed_bytes = sum(_bytes(module.get_submodule(name)) for name in unused)
    for name in unused:
        _remove(module, name)
    if unused and hasattr(module, "aux_logits"):
        module.aux_logits = False  # type: ignore[assignment]
    names = ", ".join(unused) or "nothing"
    try:
        after = compute_logits(module, examples)
    except ModelError as error:
        raise ModelError(
            f"{model.name} fails once {names} is removed, though inference never calls it: {error}"
        ) from error
    if not np.array_equal(before, after):
        worst = float(np.abs(before - after).max())
        raise ModelError(
            f"Stripping {names} changed the logits of {model.name} by up to {worst:g}, and must "
            "not change them at all. Does the network draw random numbers in eval mode?"
        )
    parameters = _parameters(model.module)
    facts = {
        "modules": unused,
        "parameters_before": parameters,
        "parameters_after": _parameters(module),
        "parameters_removed": parameters - _parameters(module),
        "bytes_removed": removed_bytes,
        "images": len(examples),
        "max_abs_difference": 0.0,
    }
    return dataclasses.replace(model, module=module), facts


def _unused_modules(module: nn.Module, images: FloatArray) -> list[str]:
    """Names of the outermost submodules with tensors that a forward pass never touches."""
    import torch
    from torch.overrides import TorchFunctionMode

    read: set[int] = set()
    called: set[int] = set()

    class Watch(TorchFunctionMode):
        """Note every tensor that a torch function is given, however deep in its arguments."""

        def __torch_function__(
            self,
            func: Callable[..., Any],
            types: Sequence[type],
            args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None,
        ) -> Any:
            read.update(id(tensor) for tensor in _tensors((args, kwargs)))
            return func(*args, **(kwargs or {}))

    def note(called_module: nn.Module, _: Any) -> None:
        called.add(id(called_module))

    handles = [part.register_forward_pre_hook(note) for part in module.modules()]
    try:
        with torch.no_grad(), Watch():
            module(torch.from_numpy(images.copy()))
    finally:
        for handle in handles:
            handle.remove()

    def unused(part: nn.Module) -> bool:
        tensors = [*part.parameters(), *part.buffers()]
        return (
            bool(tensors)
            and not any(id(inner) in called for inner in part.modules())
            and not any(id(tensor) in read for tensor in tensors)
        )

    names: list[str] = []
    for name, part in module.named_modules():
        inside = any(name.startswith(outer + ".") for outer in names)
        if name and not inside and unused(part):
            names.append(name)
    return names


def _tensors(value: Any) -> Iterator[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _remove(module: nn.Module, name: str) -> None:
    from torch import nn

    parent_name, _, child = name.rpartition(".")
    parent = module.get_submodule(parent_name)
    # A container keeps a placeholder, so that its other children keep their index or key.
    container = isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    parent._modules[child] = nn.Identity() if container else None


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
