"""Move what a network does to its input before the first layer into its preprocess."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from gnet_opt.model import Architecture
from gnet_opt.preprocess import Preprocess
from gnet_opt.stages.probe import drawn, normalized, run

if TYPE_CHECKING:
    from torch import Tensor, nn

_TOLERANCE = 1e-4
"""Largest change of a logit that is rounding, as a share of the largest."""


def compose(
    preprocess: Preprocess, mean: Sequence[Fraction], std: Sequence[Fraction]
) -> Preprocess:
    """One exact step for `preprocess` followed by `(x - mean) / std` per channel.

    It is computed in decimal arithmetic, from the numbers as they are written.
    """
    means: list[float] = []
    stds: list[float] = []
    for m, s, own_mean, own_std in zip(mean, std, preprocess.mean, preprocess.std, strict=True):
        exact_mean, exact_std = Fraction(repr(float(own_mean))), Fraction(repr(float(own_std)))
        means.append(float(exact_mean + m * exact_std))
        stds.append(float(exact_std * s))
    return Preprocess.from_dict(preprocess.to_dict() | {"mean": means, "std": stds})


def compose_transform_input(preprocess: Preprocess) -> Preprocess:
    """One exact step for `preprocess` followed by torchvision's `transform_input`.

    That transform is `x * (s / 0.5) + (m - 0.5) / 0.5` with ImageNet's mean m and deviation s of
    the channel's position (torchvision/models/googlenet.py). In decimal arithmetic ImageNet's
    preprocess becomes `x / 127.5 - 1`, without rounding.
    """
    half = Fraction(1, 2)
    constants = (("0.485", "0.229"), ("0.456", "0.224"), ("0.406", "0.225"))
    scales = [Fraction(s) / half for _, s in constants]
    offsets = [(Fraction(m) - half) / half for m, _ in constants]
    # x * scale + offset = (x - mean) / std with these.
    mean = [-offset / scale for offset, scale in zip(offsets, scales, strict=True)]
    return compose(preprocess, mean, [1 / scale for scale in scales])


def fold_transform_input(
    module: nn.Module, where: str, architecture: Architecture, preprocess: Preprocess
) -> tuple[Preprocess, tuple[str, ...]]:
    """Move a network's `transform_input` into the preprocess, and switch it off in the network.

    Folding it into the first convolution instead would be wrong at the borders: the convolution
    pads with zeros after the transform, and an offset folded into its bias shifts them.

    Args:
        module: The network, with its logits as its one output; it is changed.
        where: What it is, for messages.
        architecture: For torchvision's own classes nothing needs to be tried.
        preprocess: What comes before the transform.

    Returns:
        The preprocess for the changed network, and what is to be said about it. A module whose
        transform has other constants than torchvision's keeps it, and that is said.
    """
    if getattr(module, "transform_input", False) is not True:
        return preprocess, ()
    folded = compose_transform_input(preprocess)
    pixels = drawn(preprocess)
    known = architecture in ("googlenet", "inception-v3")
    before = None if known else run(module, where, normalized(pixels, preprocess))
    module.transform_input = False  # type: ignore[assignment]
    if before is None or _equal(before, run(module, where, normalized(pixels, folded))):
        return folded, ()
    module.transform_input = True  # type: ignore[assignment]
    return preprocess, (
        "The network's transform_input differs from torchvision's, so it stays a part of the "
        "network instead of the preprocess.",
    )


@dataclass(frozen=True)
class _Step:
    """A module that the network's input goes through first, as `(x - mean) / std`."""

    name: str
    mean: tuple[Fraction, ...]
    std: tuple[Fraction, ...]


def normalizes_itself(module: nn.Module, preprocess: Preprocess) -> bool:
    """Whether a network's first step is a normalisation of pixels on the 0..1 scale."""
    step = _first_step(module, preprocess)
    return step is not None and max(step.std) <= 1 and max(abs(m) for m in step.mean) <= 1


def fold_first_normalization(
    module: nn.Module, where: str, preprocess: Preprocess
) -> tuple[nn.Module, Preprocess, tuple[str, ...]]:
    """Move a normalisation that a network begins with into the preprocess.

    Known by their attributes are torchvision's `Normalize` and modules without weights that have
    `mean` and `std`; each is tried on an image, and the logits of the changed network are compared.
    Any other normalisation stays a part of the network and of its graph.

    Args:
        module: The network, with its logits as its one output; it is changed.
        where: What it is, for messages.
        preprocess: What comes before the normalisation.

    Returns:
        The network, the preprocess for it, and what is to be said.
    """
    from torch import nn

    step = _first_step(module, preprocess)
    if step is None:
        return module, preprocess, ()
    folded = compose(preprocess, step.mean, step.std)
    pixels = drawn(preprocess)
    before = run(module, where, normalized(pixels, preprocess))
    parent, _, child = step.name.rpartition(".")
    holder = module.get_submodule(parent)
    old = holder._modules[child]
    holder._modules[child] = nn.Identity()
    if _equal(before, run(module, where, normalized(pixels, folded))):
        return (
            module,
            folded,
            (
                f"The network normalises its input itself, in {step.name}: that was moved into "
                "the preprocess.",
            ),
        )
    holder._modules[child] = old
    return module, preprocess, ()


def _first_step(module: nn.Module, preprocess: Preprocess) -> _Step | None:
    """The first module that a made-up input goes through, where it is a normalisation."""
    import torch

    images = normalized(drawn(preprocess), preprocess)
    names = {id(part): name for name, part in module.named_modules()}
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def note(part: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], torch.Tensor) and isinstance(output, torch.Tensor):
            seen = (inputs[0].detach().clone(), output.detach().clone())
            calls.setdefault(names[id(part)], []).append(seen)

    candidates = {
        name: values
        for name, part in module.named_modules()
        if name and (values := _mean_and_std(part, preprocess.planes)) is not None
    }
    if not candidates:
        return None
    handles = [module.get_submodule(name).register_forward_hook(note) for name in candidates]
    # `run` tells what fails here; what was seen until then is of no use.
    with contextlib.suppress(Exception), torch.no_grad():
        module(images.clone())
    for handle in handles:
        handle.remove()
    for name, seen in calls.items():
        (given, result), mean, std = seen[0], *candidates[name]
        if len(seen) != 1 or not torch.equal(given, images):
            continue
        shape = (1, -1, 1, 1)
        expected = (images - _tensor(mean).reshape(shape)) / _tensor(std).reshape(shape)
        if result.shape == images.shape and torch.allclose(result, expected, atol=1e-5):
            return _Step(name, mean, std)
    return None


def _mean_and_std(
    part: nn.Module, planes: int
) -> tuple[tuple[Fraction, ...], tuple[Fraction, ...]] | None:
    """The numbers of a module without weights that has `mean` and `std`, one a channel."""
    import torch

    if next(part.parameters(), None) is not None:
        return None
    found: list[tuple[Fraction, ...]] = []
    for name in ("mean", "std"):
        values: Any = getattr(part, name, None)
        if isinstance(values, torch.Tensor):
            # A float32 buffer holds 0.485 as written to eight digits, which float64 would not.
            values = [float(f"{value:.7g}") for value in values.detach().reshape(-1).tolist()]
        if isinstance(values, (int, float)):
            values = [values]
        if not isinstance(values, (list, tuple)) or len(values) not in (1, planes):
            return None
        if not all(isinstance(value, (int, float)) for value in values):
            return None
        exact = tuple(Fraction(repr(float(value))) for value in values)
        found.append(exact * planes if len(exact) == 1 else exact)
    mean, std = found
    return (mean, std) if min(std) > 0 else None


def _tensor(values: Sequence[Fraction]) -> Tensor:
    import torch

    return torch.tensor([float(value) for value in values])


def _equal(before: Tensor, after: Tensor) -> bool:
    """Whether logits are equal up to rounding."""
    scale = float(before.abs().max())
    return before.shape == after.shape and float((before - after).abs().max()) <= _TOLERANCE * scale
