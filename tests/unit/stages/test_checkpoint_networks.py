"""Where a network is in a checkpoint: wrapping keys, prefixes, several networks, what is beside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.swa_utils import AveragedModel

import networks
from gnet_opt.errors import ModelError
from gnet_opt.stages.checkpoint import essential_names, read_state_dict, state_dict_of
from gnet_opt.stages.weights import Checkpoint

State = dict[str, Tensor]

NET = networks.small_net(5)
STATE: State = dict(NET.state_dict())
OTHER: State = dict(networks.small_net(5, seed=1).state_dict())
BODY = [name for name in essential_names(STATE) if not name.startswith(("fc.", "aux."))]
KNOWN = {"small": BODY}


def behind(prefix: str, state: Mapping[str, Tensor] = STATE) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def find(content: Any, choice: str | None = None) -> Checkpoint:
    return state_dict_of("a.pth", content, KNOWN, choice=choice)


def assert_same(found: Checkpoint, state: Mapping[str, Tensor] = STATE) -> None:
    assert set(found.tensors) == set(state)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in state.items())


# --- wrapping keys and prefixes ---------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    ["model_state", "model_state_dict", "ema", "ema_state_dict", "module", "weights", "net", "any"],
)
def test_any_wrapping_key_is_opened(key: str) -> None:
    assert_same(
        find({key: STATE, "epoch": 3, "optimizer": {"state": {0: {"step": STATE["fc.bias"]}}}})
    )


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.", "_orig_mod.module.", "base_model.", "googlenet.", "encoder."),
        *("backbone.", "model.net.", "a.b.c.d.e."),
    ],
)
def test_any_prefix_is_found_beside_aux_heads(prefix: str) -> None:
    found = find({"state_dict": behind(prefix)})
    assert_same(found)
    assert found.notes == ()


@given(
    st.lists(st.sampled_from(["model", "net", "x", "0", "state_dict"]), max_size=4),
    st.lists(st.text("ab_", min_size=1, max_size=3), max_size=4),
)
def test_wrappers_and_prefixes_in_any_number(keys: list[str], parts: list[str]) -> None:
    content: Any = behind("".join(f"{part}." for part in parts))
    for key in keys:
        content = {"lr": 0.1, key: content}
    assert_same(find(content))


def test_a_module_compiled_inside_of_the_network_is_found() -> None:
    compiled = {name.replace("inception.", "inception._orig_mod."): t for name, t in STATE.items()}
    assert_same(find(compiled))


def test_lists_are_looked_through() -> None:
    assert_same(find([STATE, {"lr": 0.1}]))


@pytest.mark.parametrize("beside", [{}, {"epoch": 3}, {"x": torch.ones(2)}])
def test_a_dict_that_holds_itself_ends(tmp_path: Path, beside: dict[str, Any]) -> None:
    content: dict[str, Any] = dict(beside)
    content["model"] = content
    torch.save(content, tmp_path / "a.pth")
    if "x" in beside:
        assert list(read_state_dict(tmp_path / "a.pth", KNOWN).tensors) == ["x"]
        return
    with pytest.raises(ModelError, match="holds no weights"):
        read_state_dict(tmp_path / "a.pth", KNOWN)


def test_a_dict_that_shares_its_parts_is_looked_through_once() -> None:
    content: Any = STATE
    for _ in range(7):
        content = {"a": content, "b": content}
    assert_same(find(content))


# --- averaged weights, and several networks ---------------------------------------------------


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"state_dict": STATE, "state_dict_ema": OTHER}, ("state_dict", "state_dict_ema")),
        ({"model": STATE, "ema": OTHER}, ("model", "ema")),
        ({"model": STATE, "model_ema": behind("module.", OTHER)}, ("model", "model_ema")),
        ({"model": STATE, "ema_state_dict": OTHER}, ("model", "ema_state_dict")),
        (
            {"state_dict": behind("model.") | behind("ema_model.module.", OTHER)},
            ("model", "ema_model"),
        ),
        ({"net": STATE, "swa": behind("module.", OTHER)}, ("net", "swa")),
    ],
)
def test_averaged_weights_are_told_and_chosen(content: Any, names: tuple[str, str]) -> None:
    found = find(content)
    assert_same(found)
    assert found.notes == (
        f"The file holds averaged weights, too ({names[1]}), and {names[0]} was taken. To take "
        "the averaged ones, pass --weights ema, or set weights_key in a model card.",
    )
    for choice in ("ema", names[1]):
        chosen = find(content, choice)
        assert_same(chosen, OTHER)
        assert chosen.notes == (f"Of the weights in the file, {names[1]} was taken.",)
    assert_same(find(content, names[0]))


def test_averaged_weights_alone_are_taken() -> None:
    averaged = AveragedModel(NET).state_dict()
    found = find({"ema": averaged})
    assert_same(found)
    assert found.notes == ()


def test_an_unknown_choice_lists_what_there_is() -> None:
    with pytest.raises(ModelError) as caught:
        find({"state_dict": STATE, "state_dict_ema": OTHER}, "best")
    assert str(caught.value) == (
        "a.pth has no weights best. It holds state_dict, state_dict_ema; pass one of these names."
    )


def test_a_choice_in_a_file_with_one_network_lists_it() -> None:
    with pytest.raises(ModelError, match=r"has no weights ema\. It holds model; pass"):
        find({"model": STATE}, "ema")


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": behind("generator.") | behind("classifier.", OTHER)},
        {"generator": STATE, "classifier": OTHER},
    ],
)
def test_of_two_networks_none_is_guessed(content: Any) -> None:
    with pytest.raises(ModelError) as caught:
        find(content)
    assert str(caught.value) == (
        "a.pth holds 2 networks: generator, classifier. Choose one with --weights generator, or "
        "with weights_key in a model card."
    )
    assert_same(find(content, "classifier"), OTHER)
    assert_same(find(content, "generator"))


def test_one_network_under_two_keys_is_one() -> None:
    copied = {name: tensor.clone() for name, tensor in STATE.items()}
    assert_same(find({"model": STATE, "best": copied}))


# --- beside the network -----------------------------------------------------------------------


def test_what_is_beside_the_network_is_left_out_and_counted() -> None:
    beside = {
        "criterion.weight": torch.ones(5),
        "metric.a": torch.ones(5, 5),
        "metric.b": torch.ones(1),
    }
    found = find({"state_dict": behind("model.") | beside})
    assert_same(found)
    assert found.notes == ("Left out: 3 tensors beside the network model (metric 2, criterion 1).",)


def test_what_is_foreign_inside_of_the_network_stays() -> None:
    found = find(behind("model.") | {"model.extra": torch.ones(1)})
    assert set(found.tensors) == {*STATE, "extra"}


@pytest.mark.parametrize(
    "attached",
    [{"head.weight": torch.ones(3, 5)}, {"to_rgb.weight": torch.ones(3, 1, 1, 1)}],
)
def test_a_layer_before_or_behind_the_network_is_not_left_out(attached: State) -> None:
    content = behind("backbone.") | attached
    with pytest.raises(ModelError) as caught:
        find(content)
    assert str(caught.value).startswith(
        f"a.pth: beside the network backbone there is {next(iter(attached))}, which takes what "
    )
    assert "pass --weights backbone; to keep both, pass package.module:factory" in str(caught.value)
    assert_same(find(content, "backbone"))


def test_the_classifier_may_stand_beside_its_body() -> None:
    body = {name: t for name, t in STATE.items() if not name.startswith(("fc.", "aux."))}
    head = {"head.weight": torch.ones(7, 32), "head.bias": torch.ones(7)}
    found = find(behind("backbone.", body) | head | {"criterion.weight": torch.ones(7, 32)})
    assert set(found.tensors) == {*body, *head}
    assert found.notes == ("Left out: 1 tensor beside the network backbone (criterion 1).",)


def test_normalisation_before_the_network_is_pointed_out() -> None:
    found = find(behind("1.") | {"0.mean": torch.ones(3), "0.std": torch.ones(1, 3, 1, 1)})
    assert_same(found)
    assert "0.mean, which seems to normalise the network's input: state it" in found.notes[1]


# --- weights in parts -------------------------------------------------------------------------


def convolutions(net: nn.Module) -> list[nn.Conv2d]:
    return [module for module in net.modules() if isinstance(module, nn.Conv2d)]


def test_pruned_weights_are_multiplied_with_their_masks() -> None:
    net = networks.small_net(5)
    for convolution in convolutions(net):
        prune.l1_unstructured(convolution, "weight", amount=0.5)
    expected = [convolution.weight.detach() for convolution in convolutions(net)]
    found = find(behind("model.", net.state_dict()))
    assert set(found.tensors) == set(STATE)
    fresh = networks.small_net(5)
    fresh.load_state_dict(dict(found.tensors))
    for convolution, weight in zip(convolutions(fresh), expected, strict=True):
        assert torch.equal(convolution.weight, weight)
    assert found.notes == (
        f"{len(expected)} pruned weights were multiplied with their masks; 50.0 % of their values "
        "are zero.",
    )


@pytest.mark.parametrize("normalise", [weight_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_normalisation_is_computed(normalise: Any) -> None:
    net = networks.small_net(5)
    for module in (*convolutions(net), net.fc):
        normalise(module)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(("_g", "original0")):
                parameter *= 1.5
    images = torch.from_numpy(networks.pictures())
    found = find(net.state_dict())
    fresh = networks.small_net(5)
    fresh.load_state_dict(dict(found.tensors))
    assert torch.allclose(fresh(images), net(images), rtol=1e-4, atol=1e-4)
    assert "computed from the lengths and directions" in found.notes[0]


@pytest.mark.parametrize("normalise", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_another_parametrization_is_refused(normalise: Any) -> None:
    net = networks.small_net(5)
    normalise(net.stem.conv)
    with pytest.raises(ModelError, match=r"a\.pth holds stem\.conv\..*original|_orig.*not known"):
        find(net.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_observers_of_quantization_are_left_out() -> None:
    from torch.ao import quantization

    net = networks.small_net(5).train()
    net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(net, inplace=True)
    found = find(net.state_dict())
    assert_same(found)
    assert "quantization observers were left out" in found.notes[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_fused_training_for_quantization_is_read() -> None:
    from torch.ao import quantization

    block = nn.Sequential()
    block.conv = nn.Conv2d(3, 4, 3, bias=False)
    block.bn = nn.BatchNorm2d(4)
    net = nn.Sequential(block).train()
    expected = dict(net.state_dict())
    fused = quantization.fuse_modules_qat(net, [["0.conv", "0.bn"]])
    fused.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(fused, inplace=True)
    assert any(".conv.bn." in name for name in fused.state_dict())
    found = state_dict_of("a.pth", fused.state_dict(), {"it": essential_names(expected)})
    assert set(found.tensors) == set(expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_integer_and_fused_networks_are_refused(tmp_path: Path) -> None:
    from torch.ao import quantization

    net = nn.Sequential(quantization.QuantStub(), nn.Linear(3, 5)).eval()
    net.qconfig = quantization.get_default_qconfig("fbgemm")
    quantization.prepare(net, inplace=True)
    net(torch.ones(1, 3))
    torch.save(quantization.convert(net).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ModelError, match=r"torch has quantized to integers\. Pass the float"):
        read_state_dict(tmp_path / "a.pth", KNOWN)
    fused = {f"c{i}.conv.0.weight": torch.ones(4, 3, 1, 1) for i in range(4)}
    with pytest.raises(ModelError, match=r"batch norms are fused into its convolutions \(c0\.conv"):
        find(fused)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1, 1).expand(2**40, 32),
        torch.ones(5, 32).to_sparse(),
        torch.ones(5, 32, device="meta"),
        torch.ones(5, 32).to(torch.float8_e4m3fn),
        torch.ones(5, 32, dtype=torch.complex64),
    ],
)
def test_tensors_that_are_no_plain_arrays_are_refused(tensor: Tensor) -> None:
    with pytest.raises(ModelError, match=re.escape("a.pth: fc.weight is stored as ")):
        find(STATE | {"fc.weight": tensor})
