"""A copy of a network without what training and compiling left around it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from gnet_opt.errors import ModelError

if TYPE_CHECKING:
    from torch import nn


def plain_copy(module: nn.Module, where: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Copy a network: in eval mode, on the CPU, in float32, without wrappers.

    `torch.compile`, `DataParallel` and averaging wrappers are taken off, and masks of
    `torch.nn.utils.prune` and parametrizations become plain weights. The caller's network is not
    changed.

    Returns:
        The copy, and what is to be said about it.

    Raises:
        ModelError: It is a TorchScript module, or cannot be copied.
    """
    import torch

    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            f"{where} is a TorchScript module, whose layers cannot be changed. Pass the Python "
            "network that it was made from, with its weights: "
            "network.load_state_dict(scripted.state_dict())."
        )
    module = unwrapped(module)
    try:
        # A pruned weight is the result of a computation, which torch does not copy.
        computed = {
            id(value): value.detach().clone()
            for part in module.modules()
            for value in vars(part).values()
            if isinstance(value, torch.Tensor) and value.grad_fn is not None
        }
        module = copy.deepcopy(module, computed).cpu().float().eval()
        for part in list(module.modules()):
            for child, inner in list(part.named_children()):
                if inner is not unwrapped(inner):
                    part._modules[child] = unwrapped(inner)
        notes = _make_permanent(module)
        return module.requires_grad_(False), notes
    except Exception as error:
        raise ModelError(
            f"{where} cannot be copied to the CPU as float32: {type(error).__name__}: {error}"
        ) from error


def unwrapped(module: Any) -> Any:
    """The network inside `torch.compile`, `DataParallel` and averaging wrappers."""
    from torch import nn
    from torch.optim.swa_utils import AveragedModel

    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    while True:
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):  # of torch.compile
            module = module._orig_mod
        elif isinstance(module, wrappers):
            module = module.module
        else:
            return module


def _make_permanent(module: nn.Module) -> tuple[str, ...]:
    from torch.nn.utils import parametrize, prune

    masks = 0
    parametrized = 0
    for part in list(module.modules()):
        for hook in list(part._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(part, hook._tensor_name)  # type: ignore[no-untyped-call]
                masks += 1
        if parametrize.is_parametrized(part):
            # torch shares the class with the original, and would take the weight from both.
            own = {key: value for key, value in vars(type(part)).items() if key != "__dict__"}
            part.__class__ = type(type(part).__name__, type(part).__bases__, own)
            for name in list(part.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(part, name)
                parametrized += 1
    notes: tuple[str, ...] = ()
    if masks:
        notes += (
            f"The network has pruning masks that were not yet removed: {masks} "
            f"{'weight was' if masks == 1 else 'weights were'} multiplied by theirs.",
        )
    if parametrized:
        notes += (
            f"{parametrized} parametrized {'weight is' if parametrized == 1 else 'weights are'} "
            "taken as computed, as a plain weight each.",
        )
    return notes
