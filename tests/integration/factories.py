"""Networks for `MODEL` as `factories:NAME`: fast, and with predictions that vary."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torchvision.transforms import Normalize

import networks


def small() -> networks.SmallNet:
    """Its classes come about equally often, so that a worse model is seen to be worse."""
    return balanced(networks.small_net(5, seed=1))


def gray() -> networks.SmallNet:
    """It takes one plane."""
    return balanced(networks.small_net(5, seed=1, planes=1), planes=1)


def rgba() -> networks.SmallNet:
    """It takes four planes."""
    return balanced(networks.small_net(5, seed=1, planes=4), planes=4)


def one_logit() -> networks.SmallNet:
    """It takes one plane and tells two classes apart by one output; both come as often."""
    module = balanced(networks.small_net(1, seed=1, planes=1), planes=1)
    with torch.no_grad():
        module.fc.bias -= 2.14
    return module


def probability() -> nn.Module:
    """The same, with a sigmoid behind."""
    return nn.Sequential(one_logit(), nn.Sigmoid()).eval()


def balanced(module: networks.SmallNet, planes: int = 3) -> networks.SmallNet:
    """Give all logits the same mean and spread."""
    with torch.no_grad():
        logits = module(torch.from_numpy(networks.pictures(64, seed=5, planes=planes)))
        module.fc.weight /= logits.std(0)[:, None]
        module.fc.bias -= logits.mean(0)
        module.fc.bias /= logits.std(0)
    return module


def hostile() -> networks.SmallNet:
    """The same function as `small`, but a common scale for all channels loses all but one."""
    module = small()
    parts = module.inception
    for branch in (parts.branch2, parts.branch3):
        networks.scale_channels(branch[0], [(branch[1].conv, 0)], [0], 3e4)
    networks.scale_channels(parts.branch1, [(module.fc, 0)], [0], 3e4)
    return module


def ruined() -> networks.SmallNet:
    """Its last layer is useless in INT8."""
    module = networks.small_net(5, seed=1)
    networks.ruin_weights(module.inception.branch1, module.fc)
    return balanced(module)


WRECKED_INPUT = 3e4
"""How many times as large the first channel of `wrecked`'s input has to be."""


def wrecked() -> networks.SmallNet:
    """Every layer is useless in INT8."""
    module = networks.small_net(5, seed=1)
    parts = module.inception
    networks.ruin_weights(parts.branch1, module.fc)
    for reader in (parts.branch1, parts.branch2[0], parts.branch3[0], parts.branch4[1]):
        networks.ruin_weights(module.stem, reader.conv)
    for branch in (parts.branch2, parts.branch3):
        networks.ruin_weights(branch[0], branch[1].conv)
    balanced(module)
    with torch.no_grad():
        module.stem.conv.weight[:, 0] /= WRECKED_INPUT
    return module


def check_hostile() -> float:
    """The largest difference between the two in float."""
    images = torch.from_numpy(networks.pictures(8))
    with torch.no_grad():
        return float(np.abs((small()(images) - hostile()(images)).numpy()).max())


class Outputs(nn.Module):
    """`small` behind a normalisation of its own, with its features beside its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self.network = small()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features: list[torch.Tensor] = []
        handle = self.network.fc.register_forward_pre_hook(lambda _, x: features.append(x[0]))
        logits = self.network(self.normalize(x))
        handle.remove()
        return features[0], logits


def outputs() -> Outputs:
    """It returns (features, logits)."""
    return Outputs().eval()
