"""Weights that a checkpoint holds as several tensors, from which torch computes them at run time.

`torch.nn.utils.prune` keeps a weight as `weight_orig` and `weight_mask`; weight normalisation as
a length and a direction, `weight_g` and `weight_v`, or by torch's newer way as
`parametrizations.weight.original0` and `original1`. Both are computed here as torch does.
Quantization-aware training in torch puts observers beside the weights, and a batch norm inside of
the convolution that it follows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_WRAPPED = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
"""Parts of names that `torch.compile`, FSDP and activation checkpointing add, anywhere."""

OBSERVERS = re.compile(r"(?:^|\.)(?:activation_post_process(?:_\d+)?|weight_fake_quant)\.")
"""State of torch's observers, which our own calibration replaces."""

UNKNOWN = re.compile(r"(?:^|\.)parametrizations\.|(?:weight|bias)_(?:orig|mask|g|v|u)$")
"""What is left where a weight is kept in a way that is not known here."""

_READ = (
    *("float16", "bfloat16", "float32", "float64"),
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
)
_PARAMETRIZED = re.compile(r"(.*?)parametrizations\.(\w+)\.original1")
_PART = re.compile(r"(.*?)parametrizations\.(\w+)\.")


def is_plain(tensor: Tensor) -> bool:
    """Whether it is an array in memory, of floats or integers, and no larger than its memory."""
    import torch

    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and str(tensor.dtype).removeprefix("torch.") in _READ
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the parts of names that torch's own wrappers add.

    Names that would be the same without them stay as they are: the tensors behind them can differ.
    """
    bare = {name: _WRAPPED.sub("", name) for name in tensors}
    times = Counter(bare.values())
    plain = {
        bare[name] if times[bare[name]] == 1 else name: tensor for name, tensor in tensors.items()
    }
    moved = [name for name in plain if ".conv.bn." in name]
    for name in moved:
        # `torch.ao.nn.intrinsic.qat.ConvBnReLU2d`: weight and batch norm are apart as in training.
        if f"{name.rpartition('.bn.')[0]}.weight_fake_quant.scale" in plain:
            plain[name.replace(".conv.bn.", ".bn.")] = plain.pop(name)
    return plain


def compute(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Put one weight in the place of those that it is computed from.

    Returns:
        The tensors, and for each weight that was computed what was undone: `pruning` or
        `weight normalisation`.
    """
    plain = dict(tensors)
    computed: dict[str, str] = {}
    parts = Counter(match[1] + match[2] for name in tensors if (match := _PART.match(name)))
    for name in tensors:
        base, _, kind = name.rpartition("_")
        if kind == "mask" and f"{base}_orig" in plain and base not in plain:
            mask, original = plain[name], plain[f"{base}_orig"]
            if mask.shape == original.shape and is_plain(original) and is_plain(mask):
                plain[base] = original * mask.to(original.dtype)
                computed[base] = "pruning"
                del plain[name], plain[f"{base}_orig"]
        else:
            length, base = _length_of(name, parts)
            if length in plain and base not in plain:
                weight = _normalised(plain[length], plain[name])
                if weight is not None:
                    plain[base] = weight
                    computed[base] = "weight normalisation"
                    del plain[name], plain[length]
    return plain, computed


def _length_of(direction: str, parts: Counter[str]) -> tuple[str, str]:
    """The names of the length and of the weight that belong to a direction, or empty ones."""
    if direction.endswith("_v"):
        base = direction.removesuffix("_v")
        return f"{base}_g", base
    match = _PARAMETRIZED.fullmatch(direction)
    # A third part belongs to another parametrization on top.
    if match is None or parts[match[1] + match[2]] != 2:
        return "", ""
    return f"{direction[:-1]}0", match[1] + match[2]


def _normalised(length: Tensor, direction: Tensor) -> Tensor | None:
    """`g * v / |v|`, with the norm over all dimensions that g does not have, as torch's."""
    import torch

    if not (is_plain(length) and is_plain(direction)):
        return None
    if length.dim() == 0:
        over: list[int] | None = None
    elif length.dim() != direction.dim() or direction.numel() == 0:
        return None
    else:
        if any(size not in (1, direction.shape[i]) for i, size in enumerate(length.shape)):
            return None
        over = [i for i, size in enumerate(length.shape) if size == 1]
        if not over:
            return None
    norm: Tensor = torch.linalg.vector_norm(direction, dim=over, keepdim=over is not None)
    return direction * (length / norm)
