"""Which of a network's outputs are the logits, and how to compute them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gnet_opt.errors import ModelError
from gnet_opt.preprocess import FloatArray


def main_logits(output: Any) -> Tensor:
    """The main logits among whatever an image classifier returns.

    A tensor is itself; an output with a `logits` attribute or key (as torchvision's
    `GoogLeNetOutputs`) is asked for it; of any other tuple, list or dict the first tensor of
    shape (N, classes) is taken.

    Raises:
        ModelError: There is no tensor of shape (N, classes).
    """
    candidates = logits_candidates(output)
    if not candidates:
        raise ModelError(
            f"The network returns {_describe(output)}, and none of it has the shape (N, classes). "
            "Pass a classifier that returns its logits."
        )
    return candidates[0]


def logits_candidates(output: Any) -> list[Tensor]:
    """Every output that could be the main logits, the one that is taken first."""
    if isinstance(output, Mapping):
        values = [output["logits"]] if "logits" in output else list(output.values())
    elif hasattr(output, "logits"):
        values = [output.logits]
    elif isinstance(output, (tuple, list)):
        values = list(output)
    else:
        values = [output]
    return [value for value in values if isinstance(value, Tensor) and value.dim() == 2]


def compute_logits(module: nn.Module, images: FloatArray) -> FloatArray:
    """Run a network on one picture after the other.

    Args:
        module: In eval mode, on the CPU.
        images: float32 of shape (N, 3, H, W).

    Returns:
        float32 logits of shape (N, classes).

    Raises:
        ModelError: The network fails on a picture, or a logit is not finite.
    """
    rows: list[FloatArray] = []
    for index in range(len(images)):
        # A copy, because a network may work in place on its input.
        batch = torch.from_numpy(images[index : index + 1].copy())
        try:
            with torch.no_grad():
                output = module(batch)
        except Exception as error:
            raise ModelError(
                f"The network fails on an input of shape {tuple(batch.shape)}: {error}"
            ) from error
        rows.append(main_logits(output).float().numpy())
    logits = np.concatenate(rows)
    if not np.isfinite(logits).all():
        raise ModelError(
            "The network's logits are not finite (NaN or infinity). Check its weights and the "
            "preprocess values."
        )
    return logits


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    return f"a {type(output).__name__}"
