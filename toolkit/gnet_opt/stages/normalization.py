"""Move what a network does to its input before the first layer into its preprocess."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from gnet_opt.model import Architecture
from gnet_opt.preprocess import Preprocess
from gnet_opt.stages.probe import run

if TYPE_CHECKING:
    from torch import Tensor, nn


def fold_transform_input(
    module: nn.Module, where: str, architecture: Architecture, preprocess: Preprocess
) -> tuple[Preprocess, tuple[str, ...]]:
    """Move a network's `transform_input` into the preprocess, and switch it off in the network.

    Folding it into the first convolution instead would be wrong at the borders: the convolution
    pads with zeros after the transform, and an offset folded into its bias shifts them.

    Returns:
        The preprocess for the changed network, and what is to be said about it. A module whose
        transform has other constants than torchvision's keeps it, and that is said.
    """
    import torch

    from gnet_opt.networks.outputs import main_logits

    if getattr(module, "transform_input", False) is not True:
        return preprocess, ()
    folded = compose_transform_input(preprocess)
    if architecture == "googlenet":
        module.transform_input = False  # type: ignore[assignment]
        return folded, ()
    size = preprocess.crop
    noise = torch.rand((1, 3, size, size), generator=torch.Generator().manual_seed(0)) * 255
    transformed = (_normalized(noise, preprocess), _normalized(noise, folded))
    before = main_logits(run(module, where, transformed[0]))
    module.transform_input = False  # type: ignore[assignment]
    after = main_logits(run(module, where, transformed[1]))
    scale = float(before.max() - before.min())
    if float((before - after).abs().max()) <= 1e-4 * scale:
        return folded, ()
    module.transform_input = True  # type: ignore[assignment]
    return preprocess, (
        "The network's transform_input differs from torchvision's, so it stays a part of the "
        "network instead of the preprocess.",
    )


def compose_transform_input(preprocess: Preprocess) -> Preprocess:
    """One exact step for `preprocess` followed by torchvision's `transform_input`.

    That transform is `x * (s / 0.5) + (m - 0.5) / 0.5` with ImageNet's mean m and deviation s of
    the channel's position (torchvision/models/googlenet.py). In decimal arithmetic ImageNet's
    preprocess becomes `x / 127.5 - 1`, without rounding.
    """
    half = Fraction(1, 2)
    means: list[float] = []
    stds: list[float] = []
    constants = (("0.485", "0.229"), ("0.456", "0.224"), ("0.406", "0.225"))
    for (m, s), mean, std in zip(constants, preprocess.mean, preprocess.std, strict=True):
        scale = Fraction(s) / half
        offset = (Fraction(m) - half) / half
        exact_mean, exact_std = Fraction(repr(float(mean))), Fraction(repr(float(std)))
        means.append(float(exact_mean - offset * exact_std / scale))
        stds.append(float(exact_std / scale))
    composed = preprocess.to_dict() | {"mean": means, "std": stds}
    return Preprocess.from_dict(composed)


def _normalized(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    import torch

    mean = torch.tensor(preprocess.mean).reshape(1, 3, 1, 1)
    std = torch.tensor(preprocess.std).reshape(1, 3, 1, 1)
    return (pixels - mean) / std
