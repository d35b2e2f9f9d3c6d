"""Run a network once, to find its classes and what its output looks like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gnet_opt.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn


def probe(module: nn.Module, where: str, planes: int, size: int) -> tuple[int, tuple[str, ...]]:
    """Run the network once to find its classes and what its output looks like.

    Args:
        module: The network.
        where: What it is called in messages.
        planes: Its input channels.
        size: Height and width of its input, in pixels.
    """
    import torch

    from gnet_opt.networks.outputs import logits_candidates, main_logits

    noise = torch.randn((1, planes, size, size), generator=torch.Generator().manual_seed(0))
    output = run(module, where, noise)
    logits = main_logits(output)
    if not torch.equal(logits, main_logits(run(module, where, noise))):
        raise ModelError(
            f"{where} gives different logits for the same input in eval mode. Perhaps it calls "
            "F.dropout without training=self.training."
        )
    notes: tuple[str, ...] = ()
    count = len(logits_candidates(output))
    if count > 1:
        notes += (
            f"The network returns {count} outputs of shape (N, classes) in eval mode: the first "
            "is taken as the logits.",
        )
    sums = logits.double().sum(1)
    if float(logits.min()) >= 0 and float((sums - 1).abs().max()) < 1e-4:
        notes += (
            "The network's output sums to 1: it seems to end in a softmax, which is kept in float.",
        )
    return int(logits.shape[1]), notes


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
