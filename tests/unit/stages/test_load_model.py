from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import GoogLeNet, GoogLeNet_Weights, resnet18

import networks
from data import shared_data
from gnet_opt.errors import ConfigError, ModelError
from gnet_opt.networks.googlenet_caffe import GoogLeNetCaffe, caffe_names
from gnet_opt.preprocess import IMAGENET, INCEPTION, Preprocess
from gnet_opt.stages import load as load_stage
from gnet_opt.stages.families import CAFFE
from gnet_opt.stages.load import from_module, load
from gnet_opt.stages.normalization import compose_transform_input

SMALL = Preprocess(resize=64, crop=64)
ASSUMED_IMAGENET = (
    "No preprocess was given: ImageNet mean and standard deviation are assumed; a model card can "
    "say otherwise."
)
ASSUMED_NO_TRANSFORM = (
    "The weights are not torchvision's published file, so transform_input is taken to be off; a "
    "model card can say otherwise."
)

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def trained() -> GoogLeNet:
    return networks.torchvision_googlenet(10)


@pytest.fixture(scope="module")
def state(trained: GoogLeNet) -> State:
    return trained.state_dict()


def without(state: State, *starts: str) -> State:
    return {name: value for name, value in state.items() if not name.startswith(starts)}


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def logits(module: nn.Module, images: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return module(torch.from_numpy(images))


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_torchvision_layout_is_loaded(tmp_path: Path, trained: GoogLeNet, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".pth"):
        save(path, {"state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()}})
    else:
        save_file(trained.state_dict(), path)
    model = load(path)
    assert (model.name, model.architecture, model.classes) == ("a", "googlenet", 10)
    assert model.labels == ()
    assert model.preprocess == IMAGENET
    assert model.assumptions == (ASSUMED_IMAGENET, ASSUMED_NO_TRANSFORM)
    assert not model.module.training
    images = networks.pictures(1, 224)
    assert torch.equal(logits(model.module, images), logits(trained, images))


def test_aux_heads_are_optional(tmp_path: Path, state: State) -> None:
    model = load(save(tmp_path / "a.pth", without(state, "aux")))
    assert model.module.aux1 is None
    assert model.assumptions == (ASSUMED_IMAGENET, ASSUMED_NO_TRANSFORM)


def test_aux_heads_may_keep_other_classes(tmp_path: Path, state: State) -> None:
    changed = dict(state)
    for head in ("aux1", "aux2"):
        changed[f"{head}.fc2.weight"] = torch.zeros(1000, 1024)
        changed[f"{head}.fc2.bias"] = torch.zeros(1000)
    model = load(save(tmp_path / "a.pth", changed))
    assert model.classes == 10
    assert model.module.aux1.fc2.out_features == 1000


def test_incomplete_aux_heads_are_left_out_and_that_is_said(tmp_path: Path, state: State) -> None:
    model = load(save(tmp_path / "a.pth", without(state, "aux2")))
    assert model.module.aux1 is None
    assert any(
        note.startswith("The auxiliary heads in the file are incomplete")
        for note in model.assumptions
    )


def test_half_precision_becomes_float32(tmp_path: Path, state: State) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(half, tmp_path / "a.safetensors")
    model = load(tmp_path / "a.safetensors")
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    assert torch.equal(model.module.fc.weight, state["fc.weight"].half().float())


def test_missing_batch_counters_are_fine(tmp_path: Path, state: State) -> None:
    slim = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert load(save(tmp_path / "a.pth", slim)).module.aux1 is not None


def test_missing_and_surplus_keys_are_named(tmp_path: Path, state: State) -> None:
    wrong = without(state, "conv1.bn")
    wrong["head.weight"] = torch.ones(3)
    path = save(tmp_path / "a.pth", wrong)
    with pytest.raises(ModelError) as caught:
        load(path)
    assert str(caught.value).startswith(
        f"{path} does not fit torchvision's GoogLeNet. Keys missing: 4 (conv1.bn.weight, "
        "conv1.bn.bias, conv1.bn.running_mean, ...); not known: 1 (head.weight). Save the state"
    )


def test_a_weight_of_the_loss_is_left_out(tmp_path: Path, state: State) -> None:
    beside = {f"model.{name}": value for name, value in state.items()}
    beside["criterion.weight"] = torch.ones(10)
    model = load(save(tmp_path / "a.ckpt", {"state_dict": beside}))
    assert torch.equal(model.module.fc.weight, state["fc.weight"])
    assert "Left out: 1 tensor beside the network model (criterion 1)." in model.assumptions


def test_wrong_shapes_are_named(tmp_path: Path, state: State) -> None:
    wrong = {**state, "fc.weight": torch.ones(10, 512)}
    with pytest.raises(
        ModelError, match=r"of another shape: 1 \(fc\.weight is \(10, 512\), not \(10, 1024\)\)"
    ):
        load(save(tmp_path / "a.pth", wrong))


def test_another_network_is_not_a_googlenet(tmp_path: Path) -> None:
    path = save(tmp_path / "resnet.pth", resnet18().state_dict())
    with pytest.raises(ModelError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path} is not a GoogLeNet: of 285 names it has 0. Keys not known: conv1.weight, "
        "bn1.weight, bn1.bias, ...; missing: conv1.bn.bias, conv1.bn.running_mean, "
        "conv1.bn.running_var, .... For another network pass package.module:factory."
    )


def test_nan_is_named(tmp_path: Path, state: State) -> None:
    wrong = {**state, "fc.bias": torch.full((10,), float("nan"))}
    path = save(tmp_path / "a.pth", wrong)
    with pytest.raises(ModelError, match=re.escape(f"{path}: fc.bias has values that are not fin")):
        load(path)


def test_the_published_file_is_recognised_by_its_hash(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = dict(state)
    for name in ("fc.weight", "fc.bias"):
        published[name] = torch.randn(1000, *state[name].shape[1:])
    path = save(tmp_path / "googlenet-1378be20.pth", published)
    monkeypatch.setattr(load_stage, "sha256_file", lambda _: "1378be20" + "0" * 56)
    model = load(path)
    assert model.preprocess == INCEPTION
    assert model.module.transform_input is False
    assert model.labels[:2] == ("tench", "goldfish")
    assert model.assumptions == (
        "No preprocess was given: the weights are torchvision's published file, so ImageNet mean "
        "and standard deviation, followed by transform_input, are used.",
    )


def test_a_card_switches_the_transform_of_the_published_file_off(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = dict(state)
    for name in ("fc.weight", "fc.bias"):
        published[name] = torch.randn(1000, *state[name].shape[1:])
    save(tmp_path / "a.pth", published)
    monkeypatch.setattr(load_stage, "sha256_file", lambda _: "1378be20" + "0" * 56)
    base = ('name = "n"', 'architecture = "googlenet"', 'weights = "a.pth"')
    model = load(write_card(tmp_path, *base, "transform_input = false"))
    assert model.preprocess == IMAGENET
    assert not any("followed by transform_input" in note for note in model.assumptions)
    assert load(write_card(tmp_path, *base)).preprocess == INCEPTION


# --- torchvision by name ----------------------------------------------------------------------


def test_torchvision_loads_through_its_own_download(
    state: State, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published = dict(state)
    for name in ("fc.weight", "fc.bias"):
        published[name] = torch.randn(1000, *state[name].shape[1:])
    asked: dict[str, Any] = {}

    def download(url: str, **options: Any) -> State:
        asked.update(options, url=url)
        return published

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = load("torchvision")
    assert asked["url"] == GoogLeNet_Weights.IMAGENET1K_V1.url
    assert asked["check_hash"] is True
    assert asked["weights_only"] is True
    assert model.preprocess == INCEPTION
    assert model.classes == len(model.labels) == 1000
    assert model.module.transform_input is False
    assert model.assumptions == ()
    assert len(model.sha256) == 64

    # The folded preprocess gives what the network with its own transform gives.
    reference = GoogLeNet(
        num_classes=1000, aux_logits=False, transform_input=True, init_weights=False
    ).eval()
    reference.load_state_dict(without(published, "aux"))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    expected = logits(reference, IMAGENET.normalize(pixels))
    actual = logits(model.module, model.preprocess.normalize(pixels))
    assert torch.allclose(actual, expected, atol=1e-4 * float(expected.max() - expected.min()))


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("invalid hash value")])
def test_a_failed_download_says_what_to_do(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(url: str, **options: Any) -> State:
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    with pytest.raises(ModelError) as caught:
        load("torchvision")
    assert str(caught.value) == (
        f"torchvision cannot download its GoogLeNet weights ({error}). Check the network, or "
        "fetch https://download.pytorch.org/models/googlenet-1378be20.pth elsewhere and pass the "
        "file as MODEL."
    )


# --- Caffe ------------------------------------------------------------------------------------


def caffe_state(module: GoogLeNetCaffe) -> State:
    state = module.state_dict()
    return {caffe: state[ours] for caffe, ours in caffe_names().items()}


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_caffe_names_are_loaded(tmp_path: Path, name: str) -> None:
    original = networks.make_lively(GoogLeNetCaffe(7))
    state = {**caffe_state(original), "loss1/classifier.weight": torch.ones(7, 1024)}
    path = tmp_path / name
    if name.endswith(".pth"):
        save(path, state)
    else:
        save_file(state, path)
    model = load(path)
    assert (model.architecture, model.classes, model.preprocess) == ("googlenet-caffe", 7, CAFFE)
    assert model.assumptions == (
        "No preprocess was given: the Caffe model zoo's (BGR minus 104, 117, 123) is assumed; a "
        "model card can say otherwise.",
    )
    images = networks.pictures(1, 224)
    assert torch.equal(logits(model.module, images), logits(original, images))


def test_caffe_misfits_are_named_as_in_the_file(tmp_path: Path) -> None:
    state = caffe_state(GoogLeNetCaffe(7))
    del state["inception_3a/5x5.bias"]
    with pytest.raises(
        ModelError, match=r"does not fit the Caffe GoogLeNet\. Keys missing: 1 \(inception_3a/5x5\."
    ):
        load(save(tmp_path / "a.pth", state))


def test_the_shared_card_is_loaded() -> None:
    model = load(shared_data() / "bvlc_googlenet.toml")
    assert (model.name, model.classes, len(model.labels)) == ("bvlc-googlenet", 1000, 1000)
    assert model.preprocess == CAFFE
    assert model.assumptions == ()
    assert sum(p.numel() for p in model.module.parameters()) == 6_998_552


# --- cards ------------------------------------------------------------------------------------


def write_card(folder: Path, *lines: str) -> Path:
    path = folder / "card.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


BASE = ('name = "parts"', 'architecture = "googlenet"', 'weights = "a.pth"')
FOLDED = ("[preprocess]", "mean = [127.5, 127.5, 127.5]", "std = [127.5, 127.5, 127.5]")


def test_a_card_gives_name_labels_and_preprocess(tmp_path: Path, state: State) -> None:
    save(tmp_path / "a.pth", without(state, "aux"))
    labels = [f"part {i}" for i in range(10)]
    card = write_card(tmp_path, *BASE, "classes = 10", f"labels = {labels}", *FOLDED)
    model = load(card)
    assert (model.name, model.labels, model.assumptions) == ("parts", tuple(labels), ())
    assert model.preprocess == INCEPTION


def test_a_card_beside_a_checkpoint_describes_it(tmp_path: Path, state: State) -> None:
    path = save(tmp_path / "other.pth", without(state, "aux"))
    card = write_card(tmp_path, *BASE, *FOLDED)
    model = load(path, card=card)
    assert (model.name, model.preprocess) == ("parts", INCEPTION)


def test_transform_input_of_a_card_is_folded(tmp_path: Path, state: State) -> None:
    save(tmp_path / "a.pth", without(state, "aux"))
    model = load(write_card(tmp_path, *BASE, "transform_input = true", "[preprocess]"))
    assert model.preprocess == INCEPTION
    assert model.module.transform_input is False


def test_a_card_without_preprocess_says_what_is_assumed(tmp_path: Path, state: State) -> None:
    save(tmp_path / "a.pth", without(state, "aux"))
    assert load(write_card(tmp_path, *BASE)).assumptions == (ASSUMED_IMAGENET,)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("classes = 11", r"card\.toml: classes is 11, but .*a\.pth has 10 classes\. Correct the"),
        ("labels = ['a']", r"a\.pth has 10 classes, but .*card\.toml gives 1 labels\. Give one"),
    ],
)
def test_a_card_must_match_its_weights(
    tmp_path: Path, state: State, line: str, message: str
) -> None:
    save(tmp_path / "a.pth", without(state, "aux"))
    with pytest.raises(ModelError, match=message):
        load(write_card(tmp_path, *BASE, line))


def test_a_card_of_another_architecture_is_refused(tmp_path: Path, state: State) -> None:
    save(tmp_path / "a.pth", without(state, "aux"))
    card = write_card(
        tmp_path, 'name = "a"', 'architecture = "googlenet-caffe"', 'weights = "a.pth"'
    )
    with pytest.raises(ModelError, match=r"a\.pth does not fit the Caffe GoogLeNet\. Keys missing"):
        load(card)


def test_missing_weights_of_a_card_are_reported(tmp_path: Path, state: State) -> None:
    save(tmp_path / "a1.pth", {"x": torch.ones(1)})
    with pytest.raises(
        ModelError, match=r"card\.toml: weights names .*a\.pth, which .* Did you mean .*a1\.pth\?"
    ):
        load(write_card(tmp_path, *BASE))
    with pytest.raises(ConfigError, match=r"card\.toml: weights is missing\. Name the checkpoint"):
        load(write_card(tmp_path, *BASE[:2]))


def test_two_cards_are_one_too_many(tmp_path: Path) -> None:
    card = write_card(tmp_path, *BASE)
    with pytest.raises(ConfigError, match="is a model card already"):
        load(card, card=card)


# --- factories --------------------------------------------------------------------------------

FACTORY = """
import networks
import torch

def build():
    return networks.small_net(5)

def broken():
    raise RuntimeError("no weights here")

def number():
    return 3

network = networks.small_net(6)
constant = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_factories.py").write_text(FACTORY, encoding="utf-8")
    (tmp_path / "own_broken.py").write_text("1 / 0", encoding="utf-8")
    (tmp_path / "own_needs.py").write_text("import not_there_at_all", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in ("own_factories", "own_broken", "own_needs"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("name", "classes"), [("build", 5), ("network", 6)])
def test_a_factory_in_the_working_folder_is_called(
    factories: Path, name: str, classes: int
) -> None:
    before = list(sys.path)
    model = load(f"own_factories:{name}")
    assert sys.path == before
    assert (model.name, model.architecture, model.classes) == (name, "module", classes)
    assert model.source == f"own_factories:{name}"
    assert model.assumptions == (ASSUMED_IMAGENET,)
    assert len(model.sha256) == 64


def test_a_card_describes_a_factory_and_its_weights(factories: Path) -> None:
    save(factories / "a.pth", {"model": networks.small_net(5, seed=9).state_dict()})
    card = write_card(
        factories,
        'name = "own"',
        'architecture = "module"',
        'factory = "own_factories:build"',
        'weights = "a.pth"',
        "[preprocess]",
        "resize = 64",
        "crop = 64",
    )
    model = load(card)
    assert (model.name, model.preprocess, model.assumptions) == ("own", SMALL, ())
    images = networks.pictures(1)
    expected = logits(networks.small_net(5, seed=9), images)
    assert torch.equal(logits(model.module, images), expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_missing:build", "there is no module own_missing. Run from the folder"),
        ("own_needs:build", "own_needs needs the module not_there_at_all, which is not installed"),
        ("own_broken:build", "importing own_broken fails with ZeroDivisionError: division by"),
        ("own_factories:biuld", "own_factories has no biuld. Did you mean build?"),
        ("own_factories:broken", "calling broken() fails with RuntimeError: no weights here"),
        ("own_factories:number", "own_factories:number returns a int. Return a torch.nn.Module"),
        ("own_factories:constant", "own_factories:constant is a int, neither a network nor"),
    ],
)
def test_factories_that_fail_are_explained(factories: Path, spec: str, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        load(spec)


# --- modules from memory ----------------------------------------------------------------------


def test_a_module_is_copied_and_not_changed() -> None:
    module = networks.small_net(transform_input=True).train()
    before = copy.deepcopy(module.state_dict())
    model = from_module(module, name="own", preprocess=SMALL, labels=["a", "b", "c", "d", "e"])
    assert model.module is not module
    assert module.training
    assert module.transform_input is True
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert (model.name, model.classes, model.labels) == ("own", 5, ("a", "b", "c", "d", "e"))
    assert not model.module.training
    assert model.module.transform_input is False
    assert model.preprocess.mean == (127.5, 127.5, 127.5)
    assert model.preprocess.crop == 64


def test_equal_weights_have_equal_hashes() -> None:
    first, second, other = (
        from_module(networks.small_net(seed=seed), preprocess=SMALL) for seed in (0, 0, 1)
    )
    assert first.sha256 == second.sha256 != other.sha256


def test_known_networks_are_recognised(trained: GoogLeNet) -> None:
    assert from_module(trained).architecture == "googlenet"
    assert from_module(GoogLeNetCaffe(3), preprocess=CAFFE).architecture == "googlenet-caffe"


def test_half_precision_modules_become_float32() -> None:
    model = from_module(networks.small_net().half(), preprocess=SMALL)
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}


def test_a_transform_with_other_constants_stays_in_the_network() -> None:
    class Other(networks.SmallNet):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x * 3 + 1 if self.transform_input else x)

        def features(self, x: torch.Tensor) -> Any:
            own, self.transform_input = self.transform_input, False
            result = super().features(x)
            self.transform_input = own
            return result

    module = networks.make_lively(Other(transform_input=True))
    model = from_module(module, preprocess=SMALL)
    assert model.preprocess == SMALL
    assert model.module.transform_input is True
    assert model.assumptions == (
        "The network's transform_input differs from torchvision's, so it stays a part of the "
        "network instead of the preprocess.",
    )
    images = networks.pictures(1)
    assert torch.equal(logits(model.module, images), logits(module, images))


class Returns(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x.mean((2, 3)) * self.scale)


def test_outputs_beyond_the_logits_are_said() -> None:
    model = from_module(Returns(lambda x: {"embedding": x[0], "a": x, "b": x}), preprocess=SMALL)
    assert model.assumptions == (
        "The network returns 2 outputs of shape (N, classes) (a (1, 3), b (1, 3)): a is taken as "
        "the logits, and the others are equal to it. A model card can say otherwise, with output.",
    )


def test_a_softmax_at_the_end_is_said() -> None:
    model = from_module(Returns(lambda x: x.softmax(1)), preprocess=SMALL)
    assert model.assumptions[0].startswith("The network's output sums to 1")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x[0], "returns a tensor of shape (3,), and none of it has the shape"),
        (lambda x: None, "returns a NoneType, and none of it has the shape"),
        (lambda x: x + torch.rand(3), "gives different logits for the same input in eval mode"),
        (lambda x: x @ torch.ones(9, 1), "fails on an input of shape (1, 3, 64, 64): RuntimeErr"),
    ],
)
def test_modules_that_cannot_work_are_explained(function: Any, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        from_module(Returns(function), preprocess=SMALL)


def test_labels_must_match_the_classes() -> None:
    with pytest.raises(ModelError, match="has 5 classes, but the caller gives 2 labels"):
        from_module(networks.small_net(), preprocess=SMALL, labels=["a", "b"])


def test_what_is_not_a_module_is_refused() -> None:
    with pytest.raises(ModelError, match=r"dict is not a torch\.nn\.Module"):
        from_module({})  # type: ignore[arg-type]


def test_weights_of_a_module_must_be_finite() -> None:
    module = networks.small_net()
    module.fc.bias.data[0] = float("inf")
    with pytest.raises(ModelError, match=r"The module SmallNet: fc\.bias has values that are not"):
        from_module(module, preprocess=SMALL)


# --- the rest ---------------------------------------------------------------------------------


def test_imagenet_and_transform_input_compose_without_rounding() -> None:
    assert compose_transform_input(IMAGENET) == INCEPTION


def test_other_preprocesses_compose_as_applied_one_after_the_other() -> None:
    preprocess = Preprocess(mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), resize=20, crop=10)
    composed = compose_transform_input(preprocess)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 10, 10, 3), np.uint8)
    transform = GoogLeNet._transform_input
    holder = type("Holder", (), {"transform_input": True})()
    expected = transform(holder, torch.from_numpy(preprocess.normalize(pixels)))
    np.testing.assert_allclose(composed.normalize(pixels), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_a_misspelt_model_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        load("torchvison")
    assert str(caught.value).startswith(
        "torchvison does not exist. Did you mean torchvision? MODEL is a checkpoint (.pth, "
    )
