"""Classifiers under other names and of several layers, input channels, and the whole family."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import GoogLeNet, Inception3

import networks
from gnet_opt.cards import ModelCard
from gnet_opt.errors import ModelError
from gnet_opt.networks.googlenet_caffe import GoogLeNetCaffe, caffe_names
from gnet_opt.preprocess import Preprocess
from gnet_opt.stages import prepare
from gnet_opt.stages.build import build
from gnet_opt.stages.load import load

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained() -> GoogLeNet:
    return networks.torchvision_googlenet(10)


@pytest.fixture(scope="module")
def body(trained: GoogLeNet) -> State:
    """Without a classifier and without auxiliary heads."""
    return {k: v for k, v in trained.state_dict().items() if not k.startswith(("fc.", "aux"))}


def card(*head: str, architecture: Any = "googlenet") -> ModelCard:
    return ModelCard(path=Path("card.toml"), name="a", architecture=architecture, head=head)


def named(prefix: str, module: nn.Module) -> State:
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    "name", ["fc.1", "fc.fc", "fc.2.linear", "fc_new", "head", "classifier.0", "last_linear"]
)
def test_one_linear_layer_is_the_classifier_under_any_name(
    trained: GoogLeNet, body: State, name: str
) -> None:
    built = build("a.pth", body | named(name, trained.fc), "googlenet")
    assert torch.equal(built.module.fc.weight, trained.fc.weight)
    assert torch.equal(built.module.fc.bias, trained.fc.bias)
    assert built.notes == (
        f"The classifier is the one linear layer {name} of the file, in the place of fc; nothing "
        "but dropout, flattening or ReLU is taken to be before it.",
    )


def test_a_classifier_may_have_no_bias(trained: GoogLeNet, body: State) -> None:
    built = build("a.pth", body | {"fc.1.weight": trained.fc.weight.detach()}, "googlenet")
    assert built.module.fc.bias is None


def test_auxiliary_heads_may_be_replaced_likewise(trained: GoogLeNet, body: State) -> None:
    state = trained.state_dict()
    heads = {
        k.replace("fc2.", "fc2.1."): v for k, v in state.items() if k.startswith(("aux1.", "aux2."))
    }
    heads |= {"aux2.fc2.1.weight": torch.ones(7, 1024), "aux2.fc2.1.bias": torch.ones(7)}
    built = build("a.pth", body | heads | named("fc.1", trained.fc), "googlenet")
    assert torch.equal(built.module.aux1.fc2.weight, state["aux1.fc2.weight"])
    assert built.module.aux2.fc2.out_features == 7
    assert len(built.notes) == 1


def test_odd_auxiliary_heads_are_left_out(trained: GoogLeNet, body: State) -> None:
    heads = {k: v for k, v in trained.state_dict().items() if k.startswith("aux")}
    heads["aux1.fc2.1.weight"] = heads["aux1.fc2.weight"]
    built = build("a.pth", body | heads | named("fc", trained.fc), "googlenet")
    assert built.module.aux1 is built.module.aux2 is None
    assert built.module.aux_logits is False
    assert [note[:43] for note in built.notes] == ["The auxiliary heads in the file are incompl"]


def test_a_caffe_original_may_have_another_classifier() -> None:
    original = networks.make_lively(GoogLeNetCaffe(7))
    state = original.state_dict()
    names = {k: v for k, v in caffe_names().items() if not k.startswith("loss3/")}
    file = {caffe: state[ours] for caffe, ours in names.items()}
    built = build("a.pth", file | named("loss3/flowers", original.classifier), "googlenet-caffe")
    assert torch.equal(built.module.classifier.weight, original.classifier.weight)
    assert "layer loss3/flowers of the file, in the place of loss3/classifier;" in built.notes[0]


TWO = nn.Sequential(nn.Linear(1024, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 5))


def test_two_linear_layers_are_open_and_the_card_key_is_shown(body: State) -> None:
    with pytest.raises(ModelError) as caught:
        build("a.pth", body | named("fc", TWO), "googlenet")
    assert str(caught.value) == (
        "a.pth has a head of 2 layers (fc.0 (12, 1024), fc.3 (5, 12)), and a state dict does not "
        "tell what is between them. Say it in a model card, all layers in their order, for example "
        'head = ["linear", "relu", "dropout", "linear"].'
    )


def test_a_batch_norm_in_a_head_is_open(body: State) -> None:
    head = nn.Sequential(nn.BatchNorm1d(1024), nn.Dropout(), nn.Linear(1024, 5))
    with pytest.raises(ModelError, match=re.escape('head = ["batchnorm", "linear"].')):
        build("a.pth", body | named("fc", head), "googlenet")


def test_a_card_settles_the_head(body: State) -> None:
    described = card("linear", "relu", "dropout", "linear")
    built = build("a.pth", body | named("fc", TWO), "googlenet", described)
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(built.module.fc(x), TWO.eval()(x))
    assert [type(layer).__name__ for layer in built.module.fc] == [
        "Linear",
        "ReLU",
        "Dropout",
        "Linear",
    ]


def test_the_shapes_order_layers_whose_names_do_not(body: State) -> None:
    """As in a class of one's own, from a file that sorts its names."""
    file = body | named("out", TWO[0]) | named("hidden", TWO[3])
    built = build("a.safetensors", file, "googlenet", card("linear", "gelu", "linear"))
    assert torch.equal(built.module.fc[0].weight, TWO[0].weight)
    assert torch.equal(built.module.fc[2].weight, TWO[3].weight)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (("linear",), "head says linear. Correct head, with every layer in its order."),
        (("linear", "batchnorm", "linear"), "The file has fc.0 (12, 1024), fc.3 (5, 12) behind"),
    ],
)
def test_a_card_is_held_against_the_file(body: State, head: tuple[str, ...], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        build("a.pth", body | named("fc", TWO), "googlenet", card(*head))


def test_a_file_without_a_classifier_is_a_feature_extractor(body: State) -> None:
    with pytest.raises(ModelError, match="has no classifier: it is torchvision's GoogLeNet with"):
        build("a.pth", body, "googlenet")


def test_a_head_of_four_layers_goes_through_to_the_graph(
    tmp_path: Path, trained: GoogLeNet, body: State
) -> None:
    head = networks.make_lively(
        nn.Sequential(nn.Linear(1024, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5))
    )
    torch.save(body | named("fc", head), tmp_path / "a.pth")
    lines = ('name = "a"', 'architecture = "googlenet"', 'weights = "a.pth"')
    layers = 'head = ["linear", "batchnorm", "relu", "linear"]'
    size = ("[preprocess]", "resize = 64", "crop = 64")
    (tmp_path / "card.toml").write_text("\n".join((*lines, layers, *size)))
    model = load(tmp_path / "card.toml")
    assert model.classes == 5
    images = networks.pictures(1)
    facts = prepare(model, images, tmp_path / "a.onnx")
    assert facts["export"]["operators"]["Gemm"] == 2
    assert "BatchNormalization" not in facts["export"]["operators"]
    expected = networks.torchvision_googlenet(10, aux=False)
    expected.fc = head
    assert trained.state_dict().keys() >= body.keys()
    with torch.no_grad():
        reference = expected(torch.from_numpy(images))
        assert torch.equal(model.module(torch.from_numpy(images)), reference)


# --- input channels -----------------------------------------------------------------------------


def with_planes(body: State, planes: int) -> State:
    weight = torch.randn(64, planes, 7, 7, generator=torch.Generator().manual_seed(0)) * 0.1
    return body | {"conv1.conv.weight": weight}


def test_a_grey_first_convolution_is_built_and_said(
    tmp_path: Path, trained: GoogLeNet, body: State
) -> None:
    torch.save(with_planes(body, 1) | named("fc", trained.fc), tmp_path / "a.pth")
    model = load(tmp_path / "a.pth")
    assert model.module.conv1.conv.in_channels == 1
    assert model.preprocess == Preprocess(channels="gray")
    assert model.assumptions[1] == (
        "The network takes one channel: images are converted to grey, with the mean of the assumed "
        "numbers over the colours."
    )
    with torch.no_grad():
        assert model.module(torch.zeros(1, 1, 224, 224)).shape == (1, 10)


def test_four_channels_are_rgba(tmp_path: Path, trained: GoogLeNet, body: State) -> None:
    torch.save(with_planes(body, 4) | named("fc", trained.fc), tmp_path / "a.pth")
    model = load(tmp_path / "a.pth")
    assert (model.preprocess.channels, model.preprocess.planes) == ("rgba", 4)
    assert model.preprocess.mean[:3] == Preprocess().mean
    assert "Give the real mean and std in a model card." in model.assumptions[1]


@pytest.mark.parametrize("planes", [2, 5])
def test_other_numbers_of_channels_are_refused(body: State, planes: int) -> None:
    message = f"the first convolution, conv1.conv.weight, takes {planes} channels. Images have 1"
    with pytest.raises(ModelError, match=message):
        build("a.pth", with_planes(body, planes), "googlenet")


def test_a_card_must_say_the_channels_of_the_network(
    tmp_path: Path, trained: GoogLeNet, body: State
) -> None:
    torch.save(with_planes(body, 1) | named("fc", trained.fc), tmp_path / "a.pth")
    lines = ['name = "a"', 'architecture = "googlenet"', 'weights = "a.pth"', "[preprocess]"]
    path = tmp_path / "card.toml"
    path.write_text("\n".join(lines))
    message = r"takes 1 channel, but preprocess\.channels is 'rgb'\. Write channels = \"gray\""
    with pytest.raises(ModelError, match=message):
        load(path)
    lines += ['channels = "gray"', "mean = [127.5]", "std = [127.5]"]
    path.write_text("\n".join(lines))
    assert load(path).preprocess.mean == (127.5,)
    path.write_text("\n".join([*lines[:3], "transform_input = true", *lines[3:]]))
    with pytest.raises(ModelError, match="transform_input, which is made for three channels"):
        load(path)


# --- Inception v3 and BN-Inception --------------------------------------------------------------


def test_inception_v3_is_recognised_with_its_own_preprocess(tmp_path: Path) -> None:
    original = networks.make_lively(Inception3(num_classes=4, init_weights=False))
    torch.save({"model": original.state_dict()}, tmp_path / "a.pth")
    model = load(tmp_path / "a.pth")
    assert (model.architecture, model.classes) == ("inception-v3", 4)
    assert model.preprocess == Preprocess(resize=342, crop=299)
    assert model.assumptions[0] == (
        "No preprocess was given: Inception v3's 299 pixels (resized to 342) and ImageNet mean and "
        "standard deviation are assumed; a model card can say otherwise."
    )
    assert model.module.AuxLogits.fc.out_features == 4
    images = torch.from_numpy(networks.pictures(1, 299))
    with torch.no_grad():
        assert torch.equal(model.module(images), original(images))


def test_the_published_inception_v3_is_recognised_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = networks.make_lively(Inception3(aux_logits=False, init_weights=False))
    torch.save(original.state_dict(), tmp_path / "a.pth")
    monkeypatch.setattr("gnet_opt.stages.load.sha256_file", lambda _: "0cc3c7bd" + "0" * 56)
    model = load(tmp_path / "a.pth")
    half = (127.5, 127.5, 127.5)
    assert model.preprocess == Preprocess(resize=342, crop=299, mean=half, std=half)
    assert (model.labels[0], len(model.labels)) == ("tench", 1000)
    assert "299 pixels, ImageNet mean and standard deviation, followed" in model.assumptions[0]


def test_bn_inception_is_built_from_its_caffe_names(tmp_path: Path) -> None:
    from gnet_opt.networks.bn_inception import BNInception

    original = networks.make_lively(BNInception(6))
    file = original.state_dict()
    # What was converted from Caffe has batch norms of shape (1, channels), and no counters.
    file = {
        k: v[None] if "_bn." in k and v.dim() == 1 else v
        for k, v in file.items()
        if not k.endswith("num_batches_tracked")
    }
    torch.save(file, tmp_path / "a.pth")
    model = load(tmp_path / "a.pth")
    assert (model.architecture, model.classes) == ("bn-inception", 6)
    assert model.preprocess.mean == (104.0, 117.0, 128.0)
    assert model.preprocess.channels == "bgr"
    images = torch.from_numpy(networks.pictures(1, 224))
    with torch.no_grad():
        assert torch.equal(model.module(images), original(images))


def test_bn_inception_has_the_size_of_the_published_one() -> None:
    """11,295,240 parameters and 485 tensors, counted on pretrainedmodels' `bninception`."""
    from gnet_opt.networks.bn_inception import BNInception

    with torch.device("meta"):
        module = BNInception()
    assert sum(parameter.numel() for parameter in module.parameters()) == 11_295_240
    assert len(module.state_dict()) == 485
    assert np.prod(module.inception_4e_double_3x3_2.stride) == 4
