"""The classifier of a checkpoint: what its names and shapes determine, and what a card must add.

Fine-tuning replaces the last layer, often by `nn.Sequential(nn.Dropout(), nn.Linear(...))`, so that
a state dict has `fc.1.weight` where the original has `fc.weight`. One linear layer is determined
whatever its name is: dropout and flattening do nothing here, and so does a ReLU before it, because
the mean of what a ReLU gives is not negative. Several linear layers leave open what is between.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gnet_opt.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

_NORM = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}

Layers = Mapping[str, Mapping[str, "Tensor"]]
"""Layers by name, each with its tensors by theirs (`weight`, `bias`, ...)."""


def layers_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group tensors by the layer that they belong to, in the order of numbers in their names."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors, key=_natural):
        layer, _, kind = name.rpartition(".")
        layers.setdefault(layer, {})[kind] = tensors[name]
    return layers


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def is_linear(layer: Mapping[str, Tensor]) -> bool:
    """Whether a layer has the tensors of an `nn.Linear`."""
    if "weight" not in layer or not set(layer) <= {"weight", "bias"}:
        return False
    return layer["weight"].dim() == 2 and layer["weight"].numel() > 0


def _is_norm(layer: Mapping[str, Tensor]) -> bool:
    return "running_mean" in layer and set(layer) <= _NORM


def one_linear(layers: Layers) -> str | None:
    """The one linear layer among what a file has beyond the network's body, by its name.

    Returns:
        None where there is none, or where the names leave open what is around it.
    """
    linear = [name for name, layer in layers.items() if is_linear(layer)]
    return None if is_open(layers) or not linear else linear[0]


def new_linear(layer: Mapping[str, Tensor], features: int) -> nn.Module:
    """An `nn.Linear` that these tensors fit, but for the number of its inputs."""
    from torch import nn

    return nn.Linear(features, layer["weight"].shape[0], bias="bias" in layer)


def is_open(layers: Layers) -> bool:
    """Whether there is a head whose order or activations the names leave open."""
    linear = sum(is_linear(layer) for layer in layers.values())
    return linear > 1 or (linear == 1 and any(_is_norm(layer) for layer in layers.values()))


def open_error(where: str, layers: Layers) -> ModelError:
    """The error for a head that is not determined, with the line for a card that settles it."""
    heads = {name: layer for name, layer in layers.items() if is_linear(layer) or _is_norm(layer)}
    guess: list[str] = []
    for layer in heads.values():
        if not is_linear(layer):
            guess.append("batchnorm")
        else:
            guess += ["relu", "dropout", "linear"] if "linear" in guess else ["linear"]
    shown = ", ".join(
        f"{name} {tuple(layer['weight'].shape)}" if "weight" in layer else name
        for name, layer in heads.items()
    )
    line = ", ".join(f'"{name}"' for name in guess)
    return ModelError(
        f"{where} has a head of {len(heads)} layers ({shown}), and a state dict does not tell "
        "what is between them. Say it in a model card, all layers in their order, for example "
        f"head = [{line}]."
    )


def from_card(
    where: str, layers: Layers, head: Sequence[str], features: int, card: str
) -> tuple[nn.Module, dict[str, str]]:
    """Build the head that a card describes for the layers of a file.

    Args:
        where: The file, for messages.
        layers: What the file has beyond the network's body.
        head: The card's `head`.
        features: What the body gives.
        card: The card, for messages.

    Returns:
        The head, and the names in the file mapped to those in the head.

    Raises:
        ModelError: The file does not have such layers, or in more than one order.
    """
    from torch import nn

    heads = {name: layer for name, layer in layers.items() if is_linear(layer) or _is_norm(layer)}
    wanted = [kind for kind in head if kind in ("linear", "batchnorm")]
    orders = (
        [order for order in itertools.permutations(heads) if _fits(order, heads, wanted, features)]
        if len(heads) == len(wanted) <= 6
        else []
    )
    first = tuple(heads)
    if not orders or (len(orders) > 1 and first not in orders):
        shown = ", ".join(
            f"{name} {tuple(layer['weight'].shape) if 'weight' in layer else ''}".strip()
            for name, layer in heads.items()
        )
        raise ModelError(
            f"{where} does not have the head that {card} describes. The file has "
            f"{shown or 'no layers of a head'} behind {features} features; head says "
            f"{', '.join(wanted)}. Correct head, with every layer in its order."
        )
    order = iter(first if first in orders else orders[0])
    module = nn.Sequential()
    names: dict[str, str] = {}
    width = features
    for index, kind in enumerate(head):
        if kind not in ("linear", "batchnorm"):
            module.append(_new_layer(kind))
            continue
        name = next(order)
        layer = heads[name]
        if kind == "linear":
            module.append(new_linear(layer, width))
            width = layer["weight"].shape[0]
        else:
            module.append(nn.BatchNorm1d(width, affine="weight" in layer))
        names |= {f"{name}.{key}": f"{index}.{key}" for key in layer}
    return module, names


def _fits(order: Sequence[str], heads: Layers, kinds: Sequence[str], width: int) -> bool:
    for name, kind in zip(order, kinds, strict=True):
        layer = heads[name]
        if is_linear(layer) != (kind == "linear"):
            return False
        before = layer["weight"].shape[1] if kind == "linear" else len(layer["running_mean"])
        if before != width:
            return False
        width = layer["weight"].shape[0] if kind == "linear" else width
    return True


def _new_layer(kind: str) -> Any:
    from torch import nn

    makers: dict[str, type[nn.Module]] = {
        "relu": nn.ReLU,
        "leaky_relu": nn.LeakyReLU,
        "gelu": nn.GELU,
        "silu": nn.SiLU,
        "tanh": nn.Tanh,
        "dropout": nn.Dropout,
        "flatten": nn.Flatten,
    }
    return makers[kind]()
