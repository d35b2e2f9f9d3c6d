"""Which of a network's outputs are the logits, and how to compute them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gnet_opt.errors import ModelError
from gnet_opt.preprocess import FloatArray

_USUAL = ("logits", "out")
"""Names of the main output, as torchvision gives them to its classifiers and other networks."""

_DEEPEST = 4
"""How many tuples and dicts in each other are looked into."""


class TakeOutput:
    """A forward hook that makes one output of a network its only one, of shape (N, classes).

    A hook leaves the names of the network's layers as they are, and everything that runs the
    network gets the same output.

    Args:
        name: As `outputs_of` names it.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Tensor:
        """Give the one output of what the network returned."""
        value = output
        for part in self.name.split(".") if self.name else ():
            value = _child(value, part)
        return torch.flatten(value, 1)


def outputs_of(output: Any) -> dict[str, Tensor]:
    """Every tensor that a network returned and that can be logits, by name.

    The name is the key in a dict, the index in a tuple or list, the attribute of a named tuple or
    of an object, joined by dots where they hold each other, and "" for the one tensor of a network
    that returns a tensor. Logits are of shape (N, classes) or (N, classes, 1, 1).
    """
    return {name: tensor for name, tensor in _tensors(output, "", 0) if _is_flat(tensor)}


def shapes_of(output: Any) -> str:
    """What a network returned, in words, for a message."""
    found = [f"{name or 'it'} {tuple(tensor.shape)}" for name, tensor in _tensors(output, "", 0)]
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    return f"a {type(output).__name__}" + (f" ({', '.join(found)})" if found else "")


def _tensors(value: Any, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif depth < _DEEPEST:
        for key in _keys(value):
            inner = f"{name}.{key}" if name else key
            yield from _tensors(_child(value, key), inner, depth + 1)


def _keys(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [str(key) for key in value]
    if hasattr(value, "_fields"):  # a named tuple
        return list(value._fields)
    if isinstance(value, (tuple, list)):
        return [str(index) for index in range(len(value))]
    return [key for key in getattr(value, "__dict__", ()) if not key.startswith("_")]


def _child(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        # A key that is no string is found by how it is written.
        return value[key] if key in value else {str(k): v for k, v in value.items()}[key]
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return value[int(key)]
    return getattr(value, key)


def _is_flat(tensor: Tensor) -> bool:
    flat = tensor.dim() == 2 or (tensor.dim() == 4 and tensor.shape[2:] == (1, 1))
    return flat and tensor.is_floating_point() and tensor.numel() > 0


def choose_output(
    module: nn.Module,
    where: str,
    images: Tensor,
    output: Any,
    *,
    wanted: str | None = None,
    classes: int | None = None,
) -> tuple[str, tuple[str, ...]]:
    """Decide which output of a network are its logits.

    In order: (1) `wanted`; (2) outputs of another width than `classes` are out; (3) what is left
    alone, or equal in value; (4) the names `logits` and `out`; (5) the one output that depends on
    every layer, see `_deepest`.

    Args:
        module: The network, in eval mode.
        where: What it is, for messages.
        images: float32 of shape (1, channels, H, W).
        output: What it returned for them.
        wanted: The output's name from a model card, or None.
        classes: The number of classes, where somebody says it.

    Returns:
        The name (see `outputs_of`), and what is to be said.

    Raises:
        ModelError: There is no output of such a shape, or the choice is open.
    """
    found = outputs_of(output)
    if not found:
        raise ModelError(
            f"The network returns {shapes_of(output)}, and none of it has the shape (N, classes). "
            "Pass a classifier that returns its logits."
        )
    listed = ", ".join(f"{name or 'it'} {tuple(tensor.shape)}" for name, tensor in found.items())
    if wanted is not None:
        if wanted not in found:
            raise ModelError(
                f"{where} has no output {wanted!r} with logits. Those that can be: {listed}. "
                "Correct output in the model card."
            )
        return wanted, ()
    fitting = _of_width(found, classes)
    if not fitting and classes == 2:
        fitting = _of_width(found, 1)  # one output can decide between two classes
    if len(found) == 1:
        return next(iter(found)), ()  # its width is checked where the classes are
    if not fitting:
        raise ModelError(
            f"{where} has no output with {classes} classes: it returns {listed}. Correct the "
            "number of classes or labels, or pass the classifier."
        )
    taken, why = _one_of(fitting, module, images)
    if taken is None:
        raise ModelError(
            f"{where} returns several outputs that can be its logits: {listed}. Say in a model "
            f"card which one: output = {next(iter(fitting))!r}, for example.".replace("'", '"')
        )
    return taken, (
        f"The network returns {len(found)} outputs of shape (N, classes) ({listed}): {taken} is "
        f"taken as the logits, {why}. A model card can say otherwise, with output.",
    )


def _of_width(found: Mapping[str, Tensor], classes: int | None) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in found.items()
        if classes is None or tensor.shape[1] == classes
    }


def _one_of(
    fitting: Mapping[str, Tensor], module: nn.Module, images: Tensor
) -> tuple[str | None, str]:
    first = next(iter(fitting))
    if len(fitting) == 1:
        return first, "the only one with that many classes"
    for usual in _USUAL:
        named = [name for name in fitting if name.rpartition(".")[2] == usual]
        if len(named) == 1:
            return named[0], "by its name"
    if all(torch.equal(tensor, fitting[first]) for tensor in fitting.values()):
        return first, "and the others are equal to it"
    return _deepest(module, images, tuple(fitting)), "because it alone depends on every layer"


def _deepest(module: nn.Module, images: Tensor, names: tuple[str, ...]) -> str | None:
    """The output that depends on every layer, up to the short head of another output.

    An output comes after another one where it depends on all weights of that one and on more (as
    logits depend on all of the features), or where it depends on more than twice as many
    convolutions that the other does not depend on as the other way round (as the logits and an
    auxiliary head, which has few layers of its own). Outputs side by side, as the heads of a
    network with two tasks, are not decided.

    Returns:
        The output that comes after all others, or None.
    """
    reached = _reached_weights(module, images, names)
    if reached is None:
        return None

    def after(one: str, other: str) -> bool:
        more, less = reached[one] - reached[other], reached[other] - reached[one]
        convolutions = [sum(convolution for _, convolution in part) for part in (more, less)]
        return bool(more) and (not less or convolutions[0] > max(2 * convolutions[1], 1))

    last = [one for one in names if all(after(one, two) for two in names if two != one)]
    return last[0] if len(last) == 1 else None


def _reached_weights(
    module: nn.Module, images: Tensor, names: tuple[str, ...]
) -> dict[str, set[tuple[str, bool]]] | None:
    """The weights that each output depends on, by name, and whether each is a convolution's.

    None where the network cannot be differentiated, for example because it computes without
    gradients inside.
    """
    weights = dict(module.named_parameters())
    required = {name: weight.requires_grad for name, weight in weights.items()}
    reached: dict[str, set[tuple[str, bool]]] = {}
    try:
        with torch.enable_grad():
            for weight in weights.values():
                weight.requires_grad_(True)
            outputs = outputs_of(module(images.clone()))
            for name in names:
                if not outputs[name].requires_grad:
                    reached[name] = set()
                    continue
                found = torch.autograd.grad(
                    outputs[name].sum(),
                    list(weights.values()),
                    retain_graph=True,
                    allow_unused=True,
                )
                reached[name] = {
                    (key, weight.dim() == 4)
                    for (key, weight), gradient in zip(weights.items(), found, strict=True)
                    if gradient is not None
                }
    except (RuntimeError, KeyError):
        return None
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(required[name])
    return reached


def compute_logits(module: nn.Module, images: FloatArray) -> FloatArray:
    """Run a network on one image after the other.

    Args:
        module: In eval mode, on the CPU, with its logits as its one output.
        images: float32 of shape (N, channels, H, W).

    Returns:
        float32 logits of shape (N, classes).

    Raises:
        ModelError: The network fails on an image, or a logit is not finite.
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
        if not isinstance(output, Tensor) or output.dim() != 2:
            raise ModelError(
                f"The network returns {shapes_of(output)}, not logits of shape (N, classes)."
            )
        rows.append(output.float().numpy())
    logits = np.concatenate(rows)
    if not np.isfinite(logits).all():
        raise ModelError(
            "The network's logits are not finite (NaN or infinity). Check its weights and the "
            "preprocess values."
        )
    return logits
