"""Settle what travels with a network: its preprocess, output, classes and labels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gnet_opt.cards import ModelCard
from gnet_opt.errors import ConfigError, ModelError
from gnet_opt.model import Architecture, Model
from gnet_opt.preprocess import IMAGENET, Preprocess
from gnet_opt.stages import probe
from gnet_opt.stages.checkpoint import check_values, hash_tensors
from gnet_opt.stages.families import ASSUMED_IMAGENET, FAMILIES, Family, family_of
from gnet_opt.stages.normalization import (
    fold_first_normalization,
    fold_transform_input,
    normalizes_itself,
)
from gnet_opt.stages.plain import plain_copy

if TYPE_CHECKING:
    from torch import nn

_ASSUMED_UNIT = (
    "No preprocess was given, and the network normalises its input itself: it is taken to expect "
    "pixels between 0 and 1; a model card can say otherwise."
)
_ASSUMED_GRAY = (
    "The network takes one channel: images are converted to grey, with the mean of the assumed "
    "numbers over the colours."
)
_ASSUMED_RGBA = (
    "The network takes four channels: the three colours and the fourth band of each file are "
    "assumed (rgba), the fourth with the mean of the colours' numbers. Give the real mean and std "
    "in a model card."
)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A network before its preprocess, output, classes and labels are settled.

    Attributes:
        module: The network.
        where: What it is, for messages.
        name: A short name.
        architecture: Which network of the family it is.
        sha256: Of its file, or None to hash the weights.
        source: Where it came from, in words.
        assumptions: What is to be said already.
        planes: Its input channels, or None where only the network itself knows.
        recognised: The sentence that says why the preprocess is known without being given.
    """

    module: nn.Module
    where: str
    name: str
    architecture: Architecture
    sha256: str | None
    source: str
    assumptions: tuple[str, ...] = ()
    planes: int | None = None
    recognised: str = ""


def take(
    loaded: Loaded,
    *,
    preprocess: Preprocess | None = None,
    labels: tuple[str, ...] = (),
    card: ModelCard | None = None,
) -> Model:
    """Settle preprocess, output, classes and labels, and check that the network runs.

    Args:
        loaded: The network as read.
        preprocess: As given by the caller or fixed by the weights; a card's goes before it.
        labels: Likewise.
        card: The card that describes the network.

    Raises:
        ModelError: The network fails, has no logits or several that could be, is not deterministic
            or has weights that are not finite; or card and labels do not match it.
        ConfigError: The preprocess cannot be used for a network.
    """
    notes = loaded.assumptions
    if card is not None:
        preprocess = card.preprocess or preprocess
        labels = card.labels or labels
    module, found = plain_copy(loaded.module, loaded.where)
    notes += found
    check_values(loaded.where, module.state_dict())
    if preprocess is None:
        preprocess, assumed = _assumed(module, loaded)
        notes = (*assumed, *notes)
    _check_preprocess(loaded, preprocess, card)
    if preprocess.planes != 3 and getattr(module, "transform_input", False) is True:
        raise ModelError(
            f"{loaded.where} has transform_input, which is made for three channels, and takes "
            f"{preprocess.planes}. Switch it off, and give the real mean and std."
        )
    expected = (card and card.classes) or len(labels) or None
    notes += _settle_output(module, loaded.where, preprocess, card, expected)
    module, preprocess, found = fold_first_normalization(module, loaded.where, preprocess)
    notes += found
    preprocess, found = fold_transform_input(module, loaded.where, loaded.architecture, preprocess)
    notes += found
    if loaded.architecture == "module":
        images = probe.normalized(probe.drawn(preprocess), preprocess)
        probe.check_determinism(module, loaded.where, images)
    classes, found = _settle_classes(module, loaded, preprocess, labels, card)
    return Model(
        module=module,
        name=card.name if card is not None else loaded.name,
        architecture=loaded.architecture,
        classes=classes,
        labels=labels,
        preprocess=preprocess,
        sha256=loaded.sha256 or hash_tensors(module.state_dict()),
        source=(card.source if card is not None else "") or loaded.source,
        assumptions=notes + found,
    )


def _assumed(module: nn.Module, loaded: Loaded) -> tuple[Preprocess, tuple[str, ...]]:
    """The preprocess where nobody gives one, and the sentences that say so."""
    family: Family | None = FAMILIES.get(loaded.architecture) or family_of(module)
    usual = IMAGENET if family is None else family.preprocess
    said = loaded.recognised or (ASSUMED_IMAGENET if family is None else family.assumed)
    planes = loaded.planes or probe.input_planes(module)
    if planes not in (1, 3, 4):
        raise ModelError(
            f"{loaded.where} takes {planes} channels. Images have 1 (grey), 3 (colour) or 4 "
            "(colour and one more band), and only these can be used."
        )
    preprocess = _for_planes(usual, planes)
    if loaded.architecture == "module" and normalizes_itself(module, preprocess):
        unit = {"mean": (0.0,) * planes, "std": (255.0,) * planes}
        preprocess = dataclasses.replace(preprocess, **unit)  # type: ignore[arg-type]
        said = _ASSUMED_UNIT
    more = {1: (_ASSUMED_GRAY,), 4: (_ASSUMED_RGBA,)}.get(planes, ())
    return preprocess, (said, *more)


def _for_planes(usual: Preprocess, planes: int) -> Preprocess:
    """The same for another number of channels: grey, or colour and a band that nobody knows."""
    if planes == 3:
        return usual
    # Without the last bits that the sum has in binary: 114.495, as it would be written.
    mean, std = (round(sum(values) / 3, 6) for values in (usual.mean, usual.std))
    if planes == 1:
        return dataclasses.replace(usual, channels="gray", mean=(mean,), std=(std,))
    # A fourth channel goes behind RGB, whatever the order of the colours was.
    step = -1 if usual.channels == "bgr" else 1
    return dataclasses.replace(
        usual,
        channels="rgba",
        mean=(*usual.mean[::step], mean),
        std=(*usual.std[::step], std),
    )


def _check_preprocess(loaded: Loaded, preprocess: Preprocess, card: ModelCard | None) -> None:
    if preprocess.input != "float32":
        raise ConfigError(
            f"preprocess.input is {preprocess.input!r}, but {loaded.where} is a network, which "
            "takes float32. Leave it out, and ask for a model that takes pixels with --input uint8."
        )
    if loaded.planes is not None and preprocess.planes != loaded.planes:
        channels = {1: '"gray"', 3: '"rgb" or "bgr"', 4: '"rgba"'}[loaded.planes]
        raise ModelError(
            f"The first convolution of {loaded.where} takes {loaded.planes} "
            f"{'channel' if loaded.planes == 1 else 'channels'}, but preprocess.channels is "
            f"{preprocess.channels!r}. Write channels = {channels} and a mean and std for each "
            f"under [preprocess]{'' if card is None else f' of {card.path}'}."
        )


def _settle_output(
    module: nn.Module,
    where: str,
    preprocess: Preprocess,
    card: ModelCard | None,
    classes: int | None,
) -> tuple[str, ...]:
    """Make the logits the network's one output; see `networks.outputs.choose_output`."""
    from torch import Tensor

    from gnet_opt.networks.outputs import TakeOutput, choose_output

    images = probe.normalized(probe.drawn(preprocess), preprocess)
    output = probe.run(module, where, images)
    wanted = None if card is None else card.output
    name, notes = choose_output(module, where, images, output, wanted=wanted, classes=classes)
    if not isinstance(output, Tensor) or output.dim() != 2:
        module.register_forward_hook(TakeOutput(name))
    return notes


def _settle_classes(
    module: nn.Module,
    loaded: Loaded,
    preprocess: Preprocess,
    labels: tuple[str, ...],
    card: ModelCard | None,
) -> tuple[int, tuple[str, ...]]:
    """Find the number of classes, hold card and labels against it, and look at the logits."""
    images = probe.normalized(probe.drawn(preprocess), preprocess)
    logits = probe.run(module, loaded.where, images)
    classes = int(logits.shape[1])
    extractor = _ends_in_features(module, loaded.architecture)
    hint = " It ends in features, without a classifier behind them." if extractor else ""
    # One output decides between two classes: 0, its negative, and 1.
    meant = classes if classes > 1 else 2
    if card is not None and card.classes not in (None, classes, meant):
        raise ModelError(
            f"{card.path}: classes is {card.classes}, but {loaded.where} has {classes} classes."
            f"{hint} Correct the card, or name other weights."
        )
    if labels and len(labels) != meant:
        raise ModelError(
            f"{loaded.where} has {'one output for two' if classes == 1 else classes} classes, but "
            f"{card.path if card is not None and card.labels else 'the caller'} gives "
            f"{len(labels)} labels.{hint} Give one label a class, in index order."
        )
    notes: tuple[str, ...] = ()
    if extractor:
        notes += (
            f"The network is a feature extractor: its {classes} outputs are features, and there "
            "is no classifier behind them. Accuracy on classes means nothing for it.",
        )
    return classes, notes + probe.look_at_logits(module, loaded.where, preprocess, logits)


def _ends_in_features(module: nn.Module, architecture: Architecture) -> bool:
    """Whether the classifier of a known network was replaced by something without weights."""
    family = FAMILIES.get(architecture)
    if family is None:
        return False
    return next(module.get_submodule(family.head).parameters(), None) is None
