"""Which output are the logits, and networks with something around or before them."""

from __future__ import annotations

import re
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.models import GoogLeNet
from torchvision.models.inception import Inception3
from torchvision.transforms import Normalize, v2

import networks
from gnet_opt.errors import ModelError
from gnet_opt.networks.outputs import compute_logits
from gnet_opt.preprocess import IMAGENET, Preprocess
from gnet_opt.stages import prepare
from gnet_opt.stages.load import from_module, load
from gnet_opt.stages.strip import strip

SMALL = Preprocess(resize=64, crop=64)


class Parts(networks.SmallNet):
    """Returns what `arrange` makes of its features, auxiliary logits and logits."""

    arrange: Any = staticmethod(lambda features, aux, logits: logits)

    def forward(self, x: torch.Tensor) -> Any:
        stem = self.norm(self.pool(self.stem(x)))
        features = torch.flatten(self.average(self.inception(stem)), 1)
        return type(self).arrange(features, self.aux(stem), self.fc(features))


def parts(arrange: Any) -> nn.Module:
    kind = type("Arranged", (Parts,), {"arrange": staticmethod(arrange)})
    return networks.make_lively(kind())


Named = namedtuple("Named", ["features", "out"])

ARRANGED = {
    "aux first": lambda f, a, y: (a, y),
    "aux last": lambda f, a, y: [y, a],
    "features first": lambda f, a, y: (f, y),
    "all": lambda f, a, y: (f, a, y),
    "dict": lambda f, a, y: {"features": f, "scores": y},
    "by name": lambda f, a, y: {"aux": a, "logits": y},
    "named tuple": lambda f, a, y: Named(f, y),
    "object": lambda f, a, y: SimpleNamespace(features=f, out=y),
    "nested": lambda f, a, y: {"head": {"features": f, "scores": y}},
    "detached features": lambda f, a, y: (f.detach(), y),
    "four dimensions": lambda f, a, y: y[:, :, None, None],
}


@pytest.mark.parametrize("name", ARRANGED)
def test_the_logits_are_found_wherever_they_are(name: str) -> None:
    model = from_module(parts(ARRANGED[name]), preprocess=SMALL)
    images = networks.pictures(2)
    expected = compute_logits(networks.make_lively(Parts()), images)
    assert model.classes == 5
    assert np.array_equal(compute_logits(model.module, images), expected)


def test_what_was_taken_is_said() -> None:
    model = from_module(parts(ARRANGED["all"]), preprocess=SMALL)
    assert model.assumptions == (
        "The network returns 3 outputs of shape (N, classes) (0 (1, 32), 1 (1, 5), 2 (1, 5)): 2 is "
        "taken as the logits, because it alone depends on every layer. A model card can say "
        "otherwise, with output.",
    )


def test_the_chosen_output_goes_through_to_the_file(tmp_path: Path) -> None:
    model = from_module(parts(ARRANGED["all"]), preprocess=SMALL)
    images = networks.pictures(2)
    stripped, _ = strip(model, images)
    assert compute_logits(stripped.module, images).shape == (2, 5)
    facts = prepare(model, images, tmp_path / "a.onnx")
    assert facts["export"]["outputs"] == {"logits": [1, 5]}
    # The auxiliary head is computed, and has no place in the graph.
    assert facts["strip"]["parameters_unreached"] == 8 * 5 + 5
    assert not any(name.startswith("module.") for name in model.module.state_dict())


def test_heads_side_by_side_are_left_to_the_card(tmp_path: Path) -> None:
    class Two(Parts):
        def __init__(self) -> None:
            super().__init__()
            self.colour = nn.Linear(32, 5)

        def forward(self, x: torch.Tensor) -> Any:
            stem = self.norm(self.pool(self.stem(x)))
            features = torch.flatten(self.average(self.inception(stem)), 1)
            return {"species": self.fc(features), "colour": self.colour(features)}

    with pytest.raises(ModelError) as caught:
        from_module(networks.make_lively(Two()), preprocess=SMALL)
    assert str(caught.value) == (
        "The module Two returns several outputs that can be its logits: species (1, 5), colour "
        '(1, 5). Say in a model card which one: output = "species", for example.'
    )


FACTORY = """
import sys
import networks
import torch
from torch import nn

class Both(networks.SmallNet):
    def forward(self, x):
        logits, stem = self.features(x)
        return {"a": logits, "b": logits + 1, "c": logits[:, :3]}

class Grey(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 3))

def both(): return networks.make_lively(Both())
def grey(): return networks.make_lively(Grey())
def ends(): sys.exit("usage: train.py")
def scripted(): return torch.jit.script(networks.make_lively(Grey()))
def weights(): return {"state_dict": networks.torchvision_googlenet(4, aux=False).state_dict()}
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    import sys

    (tmp_path / "own_outputs.py").write_text(FACTORY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def card(name: str, *lines: str, architecture: str = "module") -> Path:
        head = ('name = "a"', f'architecture = "{architecture}"', f'factory = "own_outputs:{name}"')
        path = tmp_path / "card.toml"
        path.write_text("\n".join((*head, *lines)), encoding="utf-8")
        return path

    yield card
    sys.modules.pop("own_outputs", None)


SIZE = ("[preprocess]", "resize = 64", "crop = 64")


def test_a_card_names_the_output(factory: Any) -> None:
    expected = compute_logits(networks.small_net(), networks.pictures(1))
    model = load(factory("both", 'output = "b"', *SIZE))
    assert np.array_equal(compute_logits(model.module, networks.pictures(1)), expected + 1)
    assert model.assumptions == ()
    with pytest.raises(
        ModelError, match=r"no output 'd' with logits\. Those that can be: a \(1, 5"
    ):
        load(factory("both", 'output = "d"', *SIZE))


def test_classes_and_labels_of_a_card_decide(factory: Any) -> None:
    assert load(factory("both", "classes = 3", *SIZE)).classes == 3
    assert load(factory("both", 'labels = ["x", "y", "z"]', *SIZE)).classes == 3
    with pytest.raises(ModelError, match="has no output with 10 classes: it returns a"):
        load(factory("both", "classes = 10", *SIZE))
    with pytest.raises(ModelError, match=r"returns several outputs .* output = \"a\""):
        load(factory("both", *SIZE))


def test_a_factory_may_return_weights_alone(factory: Any) -> None:
    for model in (
        load("own_outputs:weights"),
        load(factory("weights", architecture="googlenet")),
    ):
        assert (model.architecture, model.classes) == ("googlenet", 4)
        assert model.source == "own_outputs:weights"
    with pytest.raises(ModelError, match="whose factory builds the network"):
        load(factory("weights"))
    with pytest.raises(ModelError, match=r"returns a network, so it is not built here\. Write"):
        load(factory("grey", architecture="googlenet"))


def test_a_factory_that_ends_python_is_an_error(factory: Any) -> None:
    with pytest.raises(ModelError, match=r"calling ends\(\) ends Python \(sys.exit\('usage: train"):
        load("own_outputs:ends")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_says_what_to_do(factory: Any) -> None:
    with pytest.raises(ModelError, match="own_outputs:scripted is a TorchScript module, whose la"):
        load("own_outputs:scripted")


def test_a_grey_network_from_python_takes_grey(factory: Any) -> None:
    model = load("own_outputs:grey")
    assert (model.preprocess.channels, model.classes) == ("gray", 3)
    assert "The network takes one channel: images are converted to grey" in model.assumptions[1]


# --- bad networks -------------------------------------------------------------------------------


def test_a_classifier_that_was_taken_off_is_said_or_refused(tmp_path: Path) -> None:
    module = networks.torchvision_googlenet(10, aux=False)
    module.fc = nn.Identity()
    model = from_module(module)
    assert model.classes == 1024
    assert model.assumptions[1].startswith("The network is a feature extractor: its 1024 outputs")
    with pytest.raises(ModelError, match=r"has 1024 classes, .* It ends in features, without a cl"):
        from_module(module, labels=list("abcdefghij"))


def test_weights_of_zero_are_said() -> None:
    module = networks.small_net()
    for weight in module.parameters():
        weight.data.zero_()
    model = from_module(module, preprocess=SMALL)
    assert model.assumptions == (
        "All weights are zero, so the network cannot tell images apart. Pass the checkpoint of a "
        "trained network.",
    )


def test_logits_that_do_not_depend_on_the_image_are_said() -> None:
    module = networks.small_net()
    module.stem.conv.weight.data.zero_()
    model = from_module(module, preprocess=SMALL)
    assert model.assumptions == (
        "The network gives the same logits for two different images: its answer does not depend on "
        "the image. Check that the weights are those of a trained network.",
    )


def test_weights_of_zero_in_a_checkpoint_are_said(tmp_path: Path) -> None:
    state = networks.torchvision_googlenet(3, aux=False).state_dict()
    torch.save({k: torch.zeros_like(v) for k, v in state.items()}, tmp_path / "a.pth")
    assert load(tmp_path / "a.pth").assumptions[-1].startswith("All weights are zero")


# --- around the network -------------------------------------------------------------------------


def same(model: Any, module: nn.Module) -> bool:
    images = networks.pictures(1)
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    return bool(np.array_equal(compute_logits(model.module, images), expected))


def test_compiled_modules_are_unwrapped() -> None:
    module = networks.small_net()
    inside = networks.small_net()
    inside.inception = torch.compile(inside.inception)
    for wrapped in (torch.compile(module), nn.DataParallel(module), inside):
        model = from_module(wrapped, preprocess=SMALL)
        assert type(model.module) is networks.SmallNet
        assert type(model.module.inception) is type(module.inception)
        assert same(model, module)
    assert type(inside.inception) is not type(module.inception)
    assert from_module(torch.compile(GoogLeNet(init_weights=False))).architecture == "googlenet"


def test_pruning_masks_become_permanent_in_the_copy() -> None:
    module = networks.small_net()
    for layer in (module.stem.conv, module.fc):
        prune.l1_unstructured(layer, "weight", 0.3)
    model = from_module(module, preprocess=SMALL)
    assert model.assumptions == (
        "The network has pruning masks that were not yet removed: 2 weights were multiplied by "
        "theirs.",
    )
    assert prune.is_pruned(module)
    assert not prune.is_pruned(model.module)
    assert model.module.state_dict().keys() == networks.small_net().state_dict().keys()
    assert same(model, module)


def test_parametrized_weights_become_plain() -> None:
    module = networks.small_net()
    parametrizations.weight_norm(module.fc)
    model = from_module(module, preprocess=SMALL)
    assert model.assumptions[0].startswith("1 parametrized weight is taken as computed")
    assert "fc.weight" in model.module.state_dict()
    assert same(model, module)


# --- normalisation before the network -----------------------------------------------------------

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.std


@pytest.mark.parametrize("make", [lambda: Normalize(MEAN, STD), lambda: v2.Normalize(MEAN, STD)])
def test_a_normalisation_before_the_network_is_folded(make: Any) -> None:
    module = nn.Sequential(make(), networks.small_net())
    unit = Preprocess(resize=64, crop=64, mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0))
    model = from_module(module, preprocess=unit)
    assert model.preprocess == SMALL  # exactly ImageNet's
    assert model.assumptions == (
        "The network normalises its input itself, in 0: that was moved into the preprocess.",
    )
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    with torch.no_grad():
        expected = module(torch.from_numpy(unit.normalize(pixels))).numpy()
    actual = compute_logits(model.module, model.preprocess.normalize(pixels))
    assert np.allclose(actual, expected, atol=1e-4)


def test_without_a_preprocess_such_a_network_takes_pixels_between_0_and_1() -> None:
    model = from_module(nn.Sequential(Buffers(), networks.torchvision_googlenet(4, aux=False)))
    assert model.preprocess == IMAGENET
    assert model.assumptions[0].startswith(
        "No preprocess was given, and the network normalises its input itself: it is taken to"
    )


def test_a_normalisation_that_is_not_recognised_stays_in_the_graph(tmp_path: Path) -> None:
    class Inside(networks.SmallNet):
        def forward(self, x: torch.Tensor) -> Any:
            mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
            return super().forward((x - mean) / std)

    module = networks.make_lively(Inside())
    model = from_module(module, preprocess=SMALL)
    assert model.preprocess == SMALL
    images = networks.pictures(1)
    facts = prepare(model, images, tmp_path / "a.onnx")
    assert {"Sub", "Div"} <= set(facts["export"]["operators"])
    assert same(model, module)


def test_a_normalisation_that_is_used_twice_stays() -> None:
    class Twice(networks.SmallNet):
        def __init__(self) -> None:
            super().__init__()
            self.norm_in = Normalize(MEAN, STD)

        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(self.norm_in(x) + 0.1 * x)

    module = networks.make_lively(Twice())
    model = from_module(module, preprocess=SMALL)
    assert model.preprocess == SMALL
    assert model.assumptions == ()
    assert same(model, module)


def test_an_inception_v3_from_python_takes_299_pixels() -> None:
    module = networks.make_lively(Inception3(num_classes=3, aux_logits=False, init_weights=False))
    model = from_module(module)
    assert model.architecture == "inception-v3"
    assert model.preprocess == Preprocess(resize=342, crop=299)
    assert re.match("No preprocess was given: Inception v3's 299 pixels", model.assumptions[0])


@pytest.mark.parametrize("spec", ["", "module", ":build", "module:"])
def test_a_factory_without_a_module_or_a_name_is_refused(tmp_path: Path, spec: str) -> None:
    path = tmp_path / "card.toml"
    path.write_text(f'name = "a"\narchitecture = "module"\nfactory = "{spec}"\n')
    with pytest.raises(ModelError, match=r"it must be package\.module:function"):
        load(path)
