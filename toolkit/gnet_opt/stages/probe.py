"""Run a network on made-up images, to find what it takes, what it gives and whether it works."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from gnet_opt.errors import ModelError
from gnet_opt.preprocess import Preprocess

if TYPE_CHECKING:
    from torch import Tensor, nn

_ROUNDING = 1e-6
"""Largest difference of logits that is none, as a share of the largest."""


def run(module: nn.Module, where: str, images: Tensor) -> Any:
    """Run a network on float32 images of shape (N, channels, H, W), without gradients.

    Raises:
        ModelError: The network fails; the message starts with `where`.
    """
    import torch

    try:
        with torch.no_grad():
            return module(images.clone())
    except Exception as error:
        raise ModelError(
            f"{where} fails on an input of shape {tuple(images.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error


def drawn(preprocess: Preprocess, seed: int = 0) -> Tensor:
    """Pixels of one made-up image, coarse and fine: float32 of shape (1, planes, crop, crop)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    size, planes = preprocess.crop, preprocess.planes
    coarse = torch.rand((1, planes, 4, 4), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    fine = torch.rand((1, planes, size, size), generator=generator)
    return (0.5 * smooth + 0.5 * fine) * 255


def normalized(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """What `preprocess` makes of pixels in the order of the network's channels."""
    import torch

    shape = (1, preprocess.planes, 1, 1)
    mean = torch.tensor(preprocess.mean).reshape(shape)
    std = torch.tensor(preprocess.std).reshape(shape)
    return (pixels - mean) / std


def input_planes(module: nn.Module) -> int:
    """How many channels the network's first convolution takes; 3 where that is not seen."""
    import torch

    seen: list[int] = []

    def stop(part: Any, _: Any) -> None:
        seen.append(part.in_channels)
        raise InterruptedError  # the rest of the network is of no interest

    handles = [
        part.register_forward_pre_hook(stop)
        for part in module.modules()
        if isinstance(part, torch.nn.Conv2d)
    ]
    # `run` tells what fails before that.
    with contextlib.suppress(Exception), torch.no_grad():
        module(torch.zeros(1, 3, 64, 64))
    for handle in handles:
        handle.remove()
    return seen[0] if seen else 3


def check_determinism(module: nn.Module, where: str, images: Tensor) -> None:
    """Require equal logits for equal input.

    Raises:
        ModelError: They differ.
    """
    import torch

    if not torch.equal(run(module, where, images), run(module, where, images)):
        raise ModelError(
            f"{where} gives different logits for the same input in eval mode. Perhaps it calls "
            "F.dropout without training=self.training."
        )


def look_at_logits(
    module: nn.Module, where: str, preprocess: Preprocess, logits: Tensor
) -> tuple[str, ...]:
    """What the logits of two made-up images tell: whether they mean anything at all.

    Args:
        module: The network.
        where: What it is, for messages.
        preprocess: What comes before it.
        logits: Its logits for the first image, which is `drawn(preprocess)`.

    Returns:
        Notes in plain sentences: all weights are zero, the image does not matter, or the output
        sums to 1.
    """
    other = normalized(drawn(preprocess, seed=1), preprocess)
    first, second = logits.double(), run(module, where, other).double()
    sums = first.sum(1)
    if float(first.min()) >= 0 and float((sums - 1).abs().max()) < 1e-4 and first.shape[1] > 1:
        softmax: tuple[str, ...] = (
            "The network's output sums to 1: it seems to end in a softmax, which is kept in float.",
        )
    else:
        softmax = ()
    weights = [weight for weight in module.parameters() if weight.dim() > 1]
    if weights and not any(bool(weight.any()) for weight in weights):
        return (
            "All weights are zero, so the network cannot tell images apart. Pass the checkpoint "
            "of a trained network.",
        )
    largest = float(first.abs().max())
    if bool(first.isfinite().all()) and float((first - second).abs().max()) <= _ROUNDING * largest:
        return (
            *softmax,
            "The network gives the same logits for two different images: its answer does not "
            "depend on the image. Check that the weights are those of a trained network.",
        )
    return softmax
