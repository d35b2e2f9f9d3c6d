"""Networks for `MODEL` as `factories:NAME`: fast, and with predictions that vary."""

from __future__ import annotations

import numpy as np
import torch

import networks


def small() -> networks.SmallNet:
    """Its classes come about equally often, so that a worse model is seen to be worse."""
    module = networks.small_net(5, seed=1)
    with torch.no_grad():
        logits = module(torch.from_numpy(networks.pictures(64, seed=5)))
        module.fc.weight /= logits.std(0)[:, None]
        module.fc.bias -= logits.mean(0)
        module.fc.bias /= logits.std(0)
    return module


def hostile() -> networks.SmallNet:
    """The same function as `small`, but a common scale for all channels loses all but one."""
    module = small()
    factor = 3e4
    with torch.no_grad():
        # ReLU keeps positive factors, so that what follows can undo them.
        for branch in (module.inception.branch2, module.inception.branch3):
            branch[0].bn.weight[0] *= factor
            branch[0].bn.bias[0] *= factor
            branch[1].conv.weight[:, 0] /= factor
        module.inception.branch1.bn.weight[0] *= factor
        module.inception.branch1.bn.bias[0] *= factor
        module.fc.weight[:, 0] /= factor
    return module


def check_hostile() -> float:
    """The largest difference between the two in float."""
    images = torch.from_numpy(networks.pictures(8))
    with torch.no_grad():
        return float(np.abs((small()(images) - hostile()(images)).numpy()).max())
