"""Build the networks of the family from state dicts, whose names and shapes say what to build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gnet_opt.cards import ModelCard
from gnet_opt.errors import ModelError
from gnet_opt.model import Architecture
from gnet_opt.stages import heads
from gnet_opt.stages.checkpoint import essential_names, fit
from gnet_opt.stages.families import FAMILIES, Family

if TYPE_CHECKING:
    from torch import Tensor, nn

    Tensors = Mapping[str, Tensor]

_INCOMPLETE = (
    "The auxiliary heads in the file are incomplete or of another shape; they are not used after "
    "training and were left out."
)


@dataclass(frozen=True, kw_only=True)
class Built:
    """A network with its weights.

    Attributes:
        module: The network, in eval mode on the CPU.
        planes: Its input channels, 1, 3 or 4.
        notes: What was decided, in plain sentences.
    """

    module: Any
    planes: int
    notes: tuple[str, ...] = ()


def build(
    where: str, tensors: Tensors, architecture: Architecture, card: ModelCard | None = None
) -> Built:
    """Build a network that fits a state dict, and load the weights.

    The number of classes, the input channels, the classifier under whatever name, and whether
    there are auxiliary heads follow from the names and shapes. After fine-tuning, auxiliary heads
    often keep another number of classes; they are stripped later on, so that is fine.

    Args:
        where: The file, for messages.
        tensors: The weights by the names in the file.
        architecture: One of `families.FAMILIES`.
        card: Its `head` settles what names cannot.

    Raises:
        ModelError: The weights do not fit, or do not determine the network.
    """
    import torch

    family = FAMILIES[architecture]
    tensors = {k: v for k, v in tensors.items() if not k.startswith(family.dropped or "\0")}
    if architecture == "bn-inception":
        tensors = {name: _flat(name, tensor) for name, tensor in tensors.items()}
    auxiliary = {k: v for k, v in tensors.items() if k.partition(".")[0] in family.heads}
    body = {name: tensor for name, tensor in tensors.items() if name not in auxiliary}
    with torch.device("meta"):  # there no time is spent on random weights
        module = family.create()
        names = _body_names(family, module)
        planes = _set_planes(where, family, module, body, names)
        rest = {name: tensor for name, tensor in body.items() if name not in names}
        whole = all(name in body for name in essential_names(names))
        if not rest and whole:
            raise _no_classifier(where, family)
        if not whole:
            card = None  # `fit` says what is missing
        head, notes = _set_head(where, family, module, rest, card, is_whole=whole)
        kept = _set_auxiliary_heads(family, module, auxiliary)
    module = module.to_empty(device="cpu").eval()
    for name, buffer in module.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    if auxiliary and not kept:
        notes = (*notes, _INCOMPLETE)
    given = body | {name: auxiliary[name] for name in kept}
    fit(where, family.title, module, given, names=names | head | kept)
    return Built(module=module, planes=planes, notes=notes)


def _no_classifier(where: str, family: Family) -> ModelError:
    return ModelError(
        f"{where} has no classifier: it is {family.title} without its last layer, a feature "
        "extractor. Pass the checkpoint of the whole classifier, with the linear layer that gives "
        "the logits."
    )


def _flat(name: str, tensor: Tensor) -> Tensor:
    """Batch norms converted from old Caffe files are (1, channels) there."""
    vector = "_bn." in name and tensor.dim() == 2 and tensor.shape[0] == 1
    return tensor[0] if vector else tensor


def _body_names(family: Family, module: nn.Module) -> dict[str, str]:
    """The names in the file of the network's body, mapped to its own."""
    apart = (f"{family.head}.", *(f"{head}." for head in family.heads))
    own = {name: name for name in module.state_dict()} if family.names is None else family.names()
    return {theirs: ours for theirs, ours in own.items() if not ours.startswith(apart)}


def _set_planes(
    where: str, family: Family, module: Any, tensors: Tensors, names: Mapping[str, str]
) -> int:
    """Give the network as many input channels as the file's first convolution has."""
    from torch import nn

    name = next(theirs for theirs, ours in names.items() if ours == f"{family.first}.weight")
    weight = tensors.get(name)
    if weight is None or weight.dim() != 4:
        return 3  # `fit` says what is wrong
    planes = int(weight.shape[1])
    if planes not in (1, 3, 4):
        raise ModelError(
            f"{where}: the first convolution, {name}, takes {planes} channels. Images have 1 "
            "(grey), 3 (colour) or 4 (colour and one more band), and only these can be used."
        )
    old = module.get_submodule(family.first)
    if planes != old.in_channels:
        parent, _, child = family.first.rpartition(".")
        new = nn.Conv2d(
            planes,
            old.out_channels,
            old.kernel_size,
            stride=old.stride,
            padding=old.padding,
            bias=old.bias is not None,
        )
        setattr(module.get_submodule(parent), child, new)
    return planes


def _set_head(
    where: str,
    family: Family,
    module: Any,
    rest: Tensors,
    card: ModelCard | None,
    *,
    is_whole: bool,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Put the classifier of the file into the network.

    Returns:
        Its names in the file mapped to those in the network, and what is to be said.
    """
    own, usual = family.head, _usual_head(family)
    layers = heads.layers_of(rest)
    if card is not None and card.head:
        new, names = heads.from_card(where, layers, card.head, family.features, str(card.path))
        setattr(module, own, new)
        return {theirs: f"{own}.{ours}" for theirs, ours in names.items()}, ()
    if is_whole and heads.is_open(layers):
        raise heads.open_error(where, layers)
    found = heads.one_linear(layers)
    if found is None:
        return {f"{usual}.{kind}": f"{own}.{kind}" for kind in ("weight", "bias")}, ()
    setattr(module, own, heads.new_linear(layers[found], family.features))
    names = {f"{found}.{kind}": f"{own}.{kind}" for kind in layers[found]}
    if found == usual:
        return names, ()
    return names, (
        f"The classifier is the one linear layer {found} of the file, in the place of {usual}; "
        "nothing but dropout, flattening or ReLU is taken to be before it.",
    )


def _usual_head(family: Family) -> str:
    """The name of the classifier in the original's files."""
    if family.names is None:
        return family.head
    own = f"{family.head}.weight"
    return next(k for k, v in family.names().items() if v == own).removesuffix(".weight")


def _set_auxiliary_heads(family: Family, module: Any, tensors: Tensors) -> dict[str, str]:
    """Fit the auxiliary heads to the file, or take them out of the network.

    Returns:
        Their names in the file mapped to those in the network, or nothing where they were taken
        out, which they are unless all of them are whole.
    """
    names: dict[str, str] = {}
    for head, classifier in family.heads.items():
        own = {k: v for k, v in tensors.items() if k.startswith(f"{head}.")}
        inside = module.get_submodule(head).state_dict()
        body = {f"{head}.{n}" for n in inside if not f"{head}.{n}".startswith(f"{classifier}.")}
        layers = heads.layers_of({k: v for k, v in own.items() if k not in body})
        found = heads.one_linear(layers)
        if found is None or len(layers) != 1:
            continue
        parent, _, child = classifier.rpartition(".")
        old = module.get_submodule(classifier)
        new = heads.new_linear(layers[found], old.in_features)
        setattr(module.get_submodule(parent), child, new)
        names |= {name: name for name in own if name in body}
        names |= {f"{found}.{kind}": f"{classifier}.{kind}" for kind in layers[found]}
    expected = {k: v for k, v in module.state_dict().items() if k.partition(".")[0] in family.heads}
    there = set(names.values())
    whole = all(name in there for name in essential_names(expected)) and all(
        tensors[theirs].shape == expected[ours].shape for theirs, ours in names.items()
    )
    if whole and names:
        return names
    for head in family.heads:
        setattr(module, head, None)
    if family.heads:
        module.aux_logits = False
    return {}
