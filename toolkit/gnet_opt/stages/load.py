"""Load a trained model from whatever the user has, and settle what travels with it.

`stages/checkpoint.py` reads the files. What does not fit is reported with the file and the first
keys; nothing is loaded halfway.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gnet_opt.cards import ModelCard
from gnet_opt.errors import ConfigError, ModelError, require
from gnet_opt.files import sha256_file
from gnet_opt.model import Model
from gnet_opt.paths import demo_card
from gnet_opt.preprocess import IMAGENET, Preprocess
from gnet_opt.stages.build import build
from gnet_opt.stages.checkpoint import (
    close_names,
    essential_names,
    existing_file,
    fit,
    hash_tensors,
    read_state_dict,
    state_dict_of,
)
from gnet_opt.stages.factory import call_factory
from gnet_opt.stages.families import FAMILIES, Family, architecture_of, known_names, recognise
from gnet_opt.stages.plain import unwrapped
from gnet_opt.stages.settle import Loaded, take
from gnet_opt.stages.weights import Checkpoint

if TYPE_CHECKING:
    from torch import nn

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

_ASSUMED_NO_TRANSFORM = (
    "The weights are not torchvision's published file, so transform_input is taken to be off; "
    "a model card can say otherwise."
)


def load(
    spec: str | Path | None, *, card: str | Path | None = None, weights: str | None = None
) -> Model:
    """Load a model.

    Args:
        spec: None for the embedded demo model; the word `torchvision` for torchvision's ImageNet
            weights, which torchvision downloads; a model card `.toml`; a state dict `.pth`,
            `.pt` or `.safetensors` with the names of a network in `families.FAMILIES`; or
            `package.module:factory` for any `nn.Module`, or for such a state dict.
        card: A model card that describes `spec` where that is not a card itself: name, labels,
            classes and preprocess. The card's own `weights` are not read then.
        weights: Which weights to take of a checkpoint that has several, such as `ema`; it goes
            before the card's `weights_key`.

    Raises:
        ModelError: The model cannot be read, or is not what it is said to be.
        ConfigError: The card cannot be used.
        MissingDependencyError: torch or another package is not installed.
    """
    for package in ("torch", "torchvision", "safetensors"):
        require(package, "build", "load a model")
    described = None if card is None else ModelCard.open(Path(card))
    if spec is None:
        opened = ModelCard.open(demo_card()) if described is None else described
        return _load_card(opened, weights)
    text = str(spec)
    if text.endswith(".toml"):
        if described is not None:
            raise ConfigError(f"{text} is a model card already. Pass one card, not two.")
        return _load_card(ModelCard.open(existing_file(Path(text))), weights)
    if text == "torchvision" or (_FACTORY.fullmatch(text) and not Path(text).exists()):
        if weights is not None:
            raise ConfigError(
                f"--weights chooses in a checkpoint, and {text} is none. Leave it out."
            )
        return (
            _load_torchvision(described)
            if text == "torchvision"
            else _load_factory(text, described)
        )
    return _load_checkpoint(existing_file(Path(text)), described, weights)


def from_module(
    module: nn.Module,
    *,
    name: str = "",
    preprocess: Preprocess | None = None,
    labels: Sequence[str] = (),
) -> Model:
    """Take a network from memory. The caller's module is copied, not changed.

    Args:
        module: Any image classifier: (N, channels, H, W) in, logits (N, classes) out, or a tuple,
            list, dict or object that holds them. Its `transform_input`, or a normalisation that it
            begins with, is folded into the preprocess.
        name: A short name; the class name where none is given.
        preprocess: What `module` expects as its input (before its own `transform_input` or
            normalisation); where none is given, that of its family, or ImageNet's.
        labels: Class names by index.

    Raises:
        ModelError: The network fails, has no logits, is not deterministic in eval mode or has
            weights that are not finite; or `labels` do not match its classes.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"{type(module).__name__} is not a torch.nn.Module. Pass the network itself."
        )
    module = unwrapped(module)
    name = name or type(module).__name__
    return take(
        Loaded(
            module=module,
            where=f"The module {name}",
            name=name,
            architecture=architecture_of(module),
            sha256=None,
            source=f"{type(module).__module__}.{type(module).__qualname__}, from memory",
        ),
        preprocess=preprocess,
        labels=tuple(labels),
    )


# --- from a card, from torchvision, from a checkpoint, from a factory -------------------------


def _load_card(card: ModelCard, choice: str | None) -> Model:
    if card.factory is not None:
        return _load_factory(card.factory, card, weights=card.weights, choice=choice)
    if card.weights is None:
        raise ConfigError(
            f"{card.path}: weights is missing. Name the checkpoint, relative to the card, or pass "
            "the checkpoint as MODEL and this file as its card."
        )
    if not card.weights.exists():
        raise ModelError(
            f"{card.path}: weights names {card.weights}, which does not exist."
            f"{close_names(card.weights)} Correct the path; it is relative to the card."
        )
    return _load_checkpoint(card.weights, card, choice)


def _load_torchvision(card: ModelCard | None) -> Model:
    import torch
    from torchvision.models import GoogLeNet_Weights

    weights = GoogLeNet_Weights.IMAGENET1K_V1
    try:
        # torchvision's own download and hash check, but without its free unpickling.
        state = weights.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"torchvision cannot download its GoogLeNet weights ({error}). Check the network, or "
            f"fetch {weights.url} elsewhere and pass the file as MODEL."
        ) from error
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    sha256 = sha256_file(cached) if cached.is_file() else hash_tensors(state)
    where = "torchvision's GoogLeNet weights"
    built = build(where, state, "googlenet")
    # The transform belongs to these weights, unless a card describes their input otherwise.
    built.module.transform_input = _transforms(card, usual=True)
    loaded = Loaded(
        module=built.module,
        where=where,
        name="torchvision-googlenet",
        architecture="googlenet",
        sha256=sha256,
        source=f"torchvision GoogLeNet_Weights.IMAGENET1K_V1, {weights.url}",
        assumptions=built.notes,
    )
    return take(loaded, preprocess=IMAGENET, labels=FAMILIES["googlenet"].labels(), card=card)


def _load_checkpoint(path: Path, card: ModelCard | None, choice: str | None) -> Model:
    file = read_state_dict(path, known_names(), choice=_chosen(card, choice))
    return _load_tensors(
        file, card, where=str(path), name=path.stem, sha256=sha256_file(path), source=path.name
    )


def _load_tensors(
    file: Checkpoint,
    card: ModelCard | None,
    *,
    where: str,
    name: str,
    source: str,
    sha256: str | None = None,
) -> Model:
    """Build the network of the family that weights belong to, and settle the rest."""
    architecture = recognise(where, file.tensors) if card is None else card.architecture
    if architecture == "module":
        raise ModelError(
            f"{where} is a state dict, and {card.path if card else 'its card'} says architecture "
            "'module', whose factory builds the network. Pass the card itself, or name the "
            f"network whose weights these are: {', '.join(FAMILIES)}."
        )
    family = FAMILIES[architecture]
    built = build(where, file.tensors, architecture, card)
    notes = file.notes + built.notes
    published = bool(family.published) and (sha256 or "").startswith(family.published)
    if architecture in ("googlenet", "inception-v3"):
        usual = published if file.transform_input is None else file.transform_input
        built.module.transform_input = _transforms(card, usual=usual)
        if file.transform_input is None and card is None and not published and built.planes == 3:
            notes += (_ASSUMED_NO_TRANSFORM,)
    loaded = Loaded(
        module=built.module,
        where=where,
        name=name,
        architecture=architecture,
        sha256=sha256,
        source=f"the file {source}" if sha256 else source,
        assumptions=notes,
        planes=built.planes,
        recognised=_recognised(family) if published and built.module.transform_input else "",
    )
    return take(loaded, labels=family.labels() if published else (), card=card)


def _transforms(card: ModelCard | None, *, usual: bool) -> bool:
    """Whether `transform_input` is on: as the card says, or `usual` where it leaves that open.

    A card that has a preprocess describes the whole way of an image into the network.
    """
    if card is not None and card.transform_input is not None:
        return card.transform_input
    return usual and (card is None or card.preprocess is None)


def _recognised(family: Family) -> str:
    size = family.preprocess.crop
    return (
        "No preprocess was given: the weights are torchvision's published file, so "
        f"{'' if size == IMAGENET.crop else f'{size} pixels, '}ImageNet mean and standard "
        "deviation, followed by transform_input, are used."
    )


def _chosen(card: ModelCard | None, choice: str | None) -> str | None:
    return choice if choice is not None or card is None else card.weights_key


def _load_factory(
    spec: str, card: ModelCard | None, weights: Path | None = None, choice: str | None = None
) -> Model:
    module = call_factory(spec)
    if isinstance(module, Mapping):
        file = state_dict_of(spec, module, known_names(), choice=_chosen(card, choice))
        return _load_tensors(file, card, where=spec, name=spec.rsplit(":", 1)[-1], source=spec)
    if card is not None and card.factory == spec and card.architecture != "module":
        raise ModelError(
            f"{card.path}: {spec} returns a network, so it is not built here. Write "
            'architecture = "module".'
        )
    sha256 = None
    notes: tuple[str, ...] = ()
    if weights is not None:
        names = {spec: essential_names(module.state_dict())}
        file = read_state_dict(weights, names, choice=_chosen(card, choice))
        fit(str(weights), f"the network of {spec}", module, file.tensors)
        notes = file.notes
        sha256 = sha256_file(weights)
    loaded = Loaded(
        module=module,
        where=spec,
        name=spec.rsplit(":", 1)[-1],
        architecture=architecture_of(unwrapped(module)),
        sha256=sha256,
        source=spec if weights is None else f"{spec} with {weights.name}",
        assumptions=notes,
    )
    return take(loaded, card=card)
