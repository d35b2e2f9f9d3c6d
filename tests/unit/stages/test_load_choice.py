"""The choice of weights, from the command line's option or the card, reaches the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import networks
from gnet_opt.errors import ConfigError
from gnet_opt.stages.load import load


def test_the_option_goes_before_the_card_and_is_noted(tmp_path: Path) -> None:
    plain, averaged = (networks.torchvision_googlenet(3, aux=False, seed=s) for s in (0, 1))
    content = {"state_dict": plain.state_dict(), "state_dict_ema": averaged.state_dict()}
    torch.save(content, tmp_path / "NET.PTH")
    card = tmp_path / "card.toml"
    card.write_text(
        'name = "x"\narchitecture = "googlenet"\nweights = "NET.PTH"\nweights_key = "ema"\n'
    )
    by_card = load(card)
    assert torch.equal(by_card.module.fc.weight, averaged.fc.weight)
    assert "Of the weights in the file, state_dict_ema was taken." in by_card.assumptions
    assert torch.equal(load(card, weights="state_dict").module.fc.weight, plain.fc.weight)


def test_a_whole_network_brings_its_transform_input(tmp_path: Path) -> None:
    net = networks.torchvision_googlenet(3, aux=False, transform_input=True)
    torch.save(net, tmp_path / "whole.pth")
    model = load(tmp_path / "whole.pth")
    assert model.preprocess.mean == pytest.approx((127.5, 127.5, 127.5))
    assert model.module.transform_input is False


def test_there_is_nothing_to_choose_outside_of_checkpoints() -> None:
    with pytest.raises(ConfigError, match=r"--weights chooses in a checkpoint, and torchvision"):
        load("torchvision", weights="ema")
