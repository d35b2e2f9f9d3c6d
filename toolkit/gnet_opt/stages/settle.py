"""Settle what travels with a network: its preprocess, classes and labels."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gnet_opt.cards import ModelCard
from gnet_opt.errors import ConfigError, ModelError
from gnet_opt.model import Architecture, Model
from gnet_opt.preprocess import IMAGENET, Preprocess
from gnet_opt.stages.checkpoint import check_values, hash_tensors
from gnet_opt.stages.normalization import fold_transform_input
from gnet_opt.stages.probe import probe

if TYPE_CHECKING:
    from torch import nn

ASSUMED_IMAGENET = (
    "No preprocess was given: ImageNet mean and standard deviation are assumed; a model card can "
    "say otherwise."
)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A network before its preprocess, classes and labels are settled."""

    module: nn.Module
    where: str
    name: str
    architecture: Architecture
    sha256: str | None
    source: str
    assumptions: tuple[str, ...] = ()
    classes: int | None = None
    """Known where the network was built here; else it is found by running the network."""


def take(
    loaded: Loaded,
    *,
    preprocess: Preprocess | None = None,
    labels: tuple[str, ...] = (),
    card: ModelCard | None = None,
    default: Preprocess = IMAGENET,
    assumed: str = ASSUMED_IMAGENET,
) -> Model:
    """Settle preprocess, classes and labels, and check that the network runs.

    Args:
        loaded: The network as read.
        preprocess: As given by the caller or fixed by the weights; a card's goes before it.
        labels: Likewise.
        card: The card that describes the network.
        default: The preprocess where nobody gives one.
        assumed: The sentence that says so.
    """
    notes = loaded.assumptions
    if card is not None:
        preprocess = card.preprocess or preprocess
        labels = card.labels or labels
    if preprocess is None:
        preprocess = default
        notes = (assumed, *notes)
    if preprocess.input != "float32":
        raise ConfigError(
            f"preprocess.input is {preprocess.input!r}, but {loaded.where} is a network, which "
            "takes float32. Leave it out, and ask for a model that takes pixels with --input uint8."
        )
    module = _ready(loaded)
    preprocess, folded = fold_transform_input(module, loaded.where, loaded.architecture, preprocess)
    notes += folded
    classes = loaded.classes
    if classes is None:
        classes, found = probe(module, loaded.where, preprocess.planes, preprocess.crop)
        notes += found
    if card is not None and card.classes is not None and card.classes != classes:
        raise ModelError(
            f"{card.path}: classes is {card.classes}, but {loaded.where} has {classes} classes. "
            "Correct the card, or name other weights."
        )
    # One output decides between two classes: 0, its negative, and 1.
    if labels and len(labels) != (classes if classes > 1 else 2):
        raise ModelError(
            f"{loaded.where} has {'one output for two' if classes == 1 else classes} classes, but "
            f"{card.path if card is not None and card.labels else 'the caller'} gives "
            f"{len(labels)} labels. Give one label a class, in index order."
        )
    return Model(
        module=module,
        name=card.name if card is not None else loaded.name,
        architecture=loaded.architecture,
        classes=classes,
        labels=labels,
        preprocess=preprocess,
        sha256=loaded.sha256 or hash_tensors(module.state_dict()),
        source=(card.source if card is not None else "") or loaded.source,
        assumptions=notes,
    )


def architecture_of(module: nn.Module) -> Architecture:
    """Which family member a network is, by its class."""
    from torchvision.models import GoogLeNet

    from gnet_opt.networks.googlenet_caffe import GoogLeNetCaffe

    if type(module) is GoogLeNet:
        return "googlenet"
    return "googlenet-caffe" if type(module) is GoogLeNetCaffe else "module"


def _ready(loaded: Loaded) -> nn.Module:
    """A copy of the network in eval mode, on the CPU, in float32, with finite weights."""
    try:
        module = copy.deepcopy(loaded.module).cpu().float().eval().requires_grad_(False)
    except Exception as error:
        raise ModelError(
            f"{loaded.where} cannot be copied to the CPU as float32: "
            f"{type(error).__name__}: {error}"
        ) from error
    check_values(loaded.where, module.state_dict())
    return module
