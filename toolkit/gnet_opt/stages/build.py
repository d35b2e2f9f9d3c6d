"""Build the networks of the family from state dicts, whose names say which one it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gnet_opt.errors import ModelError
from gnet_opt.model import Architecture
from gnet_opt.stages.checkpoint import essential_names, first_names, fit

if TYPE_CHECKING:
    from torch import Tensor, nn


def recognise(where: str, tensors: Mapping[str, Tensor]) -> Architecture:
    """Tell torchvision's names from Caffe's; at least half of the names must be there."""
    names = known_names()
    share = {key: len(known & set(tensors)) / len(known) for key, known in names.items()}
    best = max(share, key=lambda key: share[key])
    if share[best] < 0.5:
        known = names[best]
        surplus = [name for name in tensors if name not in known]
        missing = [name for name in known if name not in tensors]
        raise ModelError(
            f"{where} is not a GoogLeNet: of {len(known)} names it has "
            f"{len(known) - len(missing)}. Keys not known: {first_names(surplus)}; missing: "
            f"{first_names(sorted(missing))}. For another network pass package.module:factory."
        )
    return best


def known_names() -> Mapping[Architecture, frozenset[str]]:
    """The names that a checkpoint of each network must have, but for those of auxiliary heads."""
    from gnet_opt.networks.googlenet_caffe import caffe_names

    return {
        "googlenet": frozenset(essential_names(_new_googlenet(1, None).state_dict())),
        "googlenet-caffe": frozenset(caffe_names()),
    }


def _new_googlenet(classes: int, aux_classes: int | None) -> Any:
    """torchvision's network with weights that are still to be loaded."""
    import torch
    from torchvision.models import GoogLeNet

    # On the meta device no time is spent on random weights.
    with torch.device("meta"):
        module = GoogLeNet(
            num_classes=classes, aux_logits=aux_classes is not None, init_weights=False
        )
        if aux_classes is not None:
            for head in (module.aux1, module.aux2):
                head.fc2 = torch.nn.Linear(head.fc2.in_features, aux_classes)
    module = module.to_empty(device="cpu").eval()
    for name, buffer in module.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.zero_()
    return module


def build_googlenet(where: str, tensors: Mapping[str, Tensor]) -> tuple[Any, tuple[str, ...]]:
    """torchvision's GoogLeNet with these weights, with aux heads where the file has whole ones.

    After fine-tuning, the aux heads often keep another number of classes than the network;
    they are stripped later on, so that is fine.
    """
    classes = _rows(tensors.get("fc.weight"), 1000)
    heads = {key: value for key, value in tensors.items() if key.startswith(("aux1.", "aux2."))}
    body = {key: value for key, value in tensors.items() if key not in heads}
    if heads:
        module = _new_googlenet(classes, _rows(heads.get("aux1.fc2.weight"), 1000))
        expected = module.state_dict()
        wanted = [key for key in essential_names(expected) if key.startswith(("aux1.", "aux2."))]
        if all(key in heads and heads[key].shape == expected[key].shape for key in wanted):
            fit(where, "torchvision's GoogLeNet", module, {**body, **heads})
            return module, ()
    module = _new_googlenet(classes, None)
    fit(where, "torchvision's GoogLeNet", module, body)
    if not heads:
        return module, ()
    return module, (
        "The auxiliary heads in the file are incomplete or of another shape; they are not used "
        "after training and were left out.",
    )


def build_caffe(where: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The 2014 original from Caffe layer names; the auxiliary losses 1 and 2 are left out."""
    import torch

    from gnet_opt.networks.googlenet_caffe import GoogLeNetCaffe, caffe_names

    classes = _rows(tensors.get("loss3/classifier.weight"), 1000)
    with torch.device("meta"):
        module = GoogLeNetCaffe(classes)
    module = module.to_empty(device="cpu").eval()
    body = {k: v for k, v in tensors.items() if not k.startswith(("loss1/", "loss2/"))}
    fit(where, "the Caffe GoogLeNet", module, body, names=caffe_names())
    return module


def _rows(tensor: Tensor | None, otherwise: int) -> int:
    return int(tensor.shape[0]) if tensor is not None and tensor.dim() == 2 else otherwise
