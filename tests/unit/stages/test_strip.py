from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import networks
from gnet_opt.errors import ModelError
from gnet_opt.model import Model
from gnet_opt.preprocess import Preprocess
from gnet_opt.stages.load import from_module
from gnet_opt.stages.strip import strip

SMALL = Preprocess(resize=64, crop=64)


def as_model(module: nn.Module, classes: int = 5) -> Model:
    """Without the checks of `from_module`, so that strip has to find what is wrong."""
    return Model(
        module=module.eval(),
        name="own",
        architecture="module",
        classes=classes,
        labels=(),
        preprocess=SMALL,
        sha256="",
        source="",
    )


def test_the_aux_heads_of_torchvision_go() -> None:
    module = networks.torchvision_googlenet(10)
    stripped, facts = strip(from_module(module), networks.pictures(1, 224))
    aux = [*module.aux1.parameters(), *module.aux2.parameters()]
    aux_buffers = [*module.aux1.buffers(), *module.aux2.buffers()]
    removed = sum(p.numel() for p in aux)
    assert facts == {
        "modules": ["aux1", "aux2"],
        "parameters_before": 9_960_638,
        "parameters_after": 9_960_638 - removed,
        "parameters_removed": removed,
        "bytes_removed": sum(t.numel() * t.element_size() for t in aux + aux_buffers),
        "images": 1,
        "max_abs_difference": 0.0,
    }
    assert stripped.module.aux1 is stripped.module.aux2 is None
    assert stripped.module.aux_logits is False
    assert module.aux1 is not None


def test_logits_are_identical_and_the_model_is_not_changed() -> None:
    model = from_module(networks.small_net(), preprocess=SMALL)
    images = networks.pictures(2)
    stripped, facts = strip(model, images)
    assert facts["modules"] == ["aux"]
    assert model.module.aux is not None
    with torch.no_grad():
        batch = torch.from_numpy(images)
        assert torch.equal(stripped.module(batch), model.module(batch))


def test_what_is_called_stays() -> None:
    model = from_module(networks.small_net_with_aux_outputs(), preprocess=SMALL)
    stripped, facts = strip(model, networks.pictures(1))
    assert facts["modules"] == []
    assert facts["parameters_removed"] == 0
    assert stripped.module.aux is not None


def test_a_network_without_anything_to_strip_is_unchanged() -> None:
    module = networks.small_reimplemented_googlenet()
    _, facts = strip(from_module(module, preprocess=SMALL), networks.pictures(1))
    assert facts["modules"] == []


class Unusual(nn.Module):
    """Uses its parts in ways that a count of calls alone would miss."""

    def __init__(self) -> None:
        super().__init__()
        self.by_weight = nn.Conv2d(3, 4, 3)
        self.by_forward = nn.Conv2d(4, 4, 1)
        self.heads = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 5)])
        self.pick = nn.ModuleDict({"a": nn.Linear(5, 5), "b": nn.Linear(5, 5)})
        self.outer = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
        self.no_weights = nn.ReLU()

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.conv2d(x, self.by_weight.weight, self.by_weight.bias)
        x = self.by_forward.forward(x).mean((2, 3))
        return self.pick["b"](self.heads[1](x))


def test_unusual_uses_are_seen_and_containers_keep_their_places() -> None:
    model = from_module(Unusual(), preprocess=SMALL)
    stripped, facts = strip(model, networks.pictures(2))
    assert facts["modules"] == ["heads.0", "pick.a", "outer"]
    module = stripped.module
    assert isinstance(module.heads[0], nn.Identity)
    assert isinstance(module.pick["a"], nn.Identity)
    assert module.outer is None
    assert module.by_weight is not None
    assert module.by_forward is not None


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rand(len(x), 5)


def test_changed_logits_are_an_error() -> None:
    with pytest.raises(ModelError, match=r"Stripping nothing changed the logits of own by up to"):
        strip(as_model(Random()), networks.pictures(1))


class Inspects(networks.SmallNet):
    def forward(self, x: torch.Tensor) -> Any:
        assert len(self.aux) == 3
        return super().forward(x)


def test_a_network_that_fails_without_the_part_is_an_error() -> None:
    model = as_model(networks.make_lively(Inspects()))
    with pytest.raises(ModelError, match="own fails once aux is removed, though inference never"):
        strip(model, networks.pictures(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :3], "own gives 3 logits and is said to have 5 classes"),
        (lambda x: x * float("nan"), "The network's logits are not finite"),
        (lambda x: x[0], "returns a tensor of shape (5,), not logits of shape (N, classes)"),
        (lambda x: x + torch.ones(7), "The network fails on an input of shape (1, 3, 64, 64): "),
    ],
)
def test_unfit_logits_are_errors(change: Any, message: str) -> None:
    class Changed(networks.SmallNet):
        def forward(self, x: torch.Tensor) -> Any:
            return change(super().forward(x))

    with pytest.raises(ModelError, match=re.escape(message)):
        strip(as_model(networks.make_lively(Changed())), networks.pictures(1))


def test_examples_are_not_changed_by_a_network_that_works_in_place() -> None:
    class InPlace(networks.SmallNet):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x.mul_(2))

    images = networks.pictures(1)
    before = images.copy()
    strip(from_module(networks.make_lively(InPlace()), preprocess=SMALL), images)
    np.testing.assert_array_equal(images, before)
