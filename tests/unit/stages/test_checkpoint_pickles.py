"""Pickles: plain data beside the weights, whole networks as data, and attacks that never run."""

from __future__ import annotations

import argparse
import collections
import datetime
import functools
import os
import pathlib
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torchvision.models import GoogLeNet, Inception3, resnet18

import networks
from gnet_opt.errors import ModelError
from gnet_opt.stages.checkpoint import essential_names, read_state_dict
from gnet_opt.stages.families import known_names
from gnet_opt.stages.weights import Checkpoint

STATE = {"conv.weight": torch.ones(2, 3), "conv.bias": torch.zeros(2)}
PLAIN: dict[str, Any] = {
    "path": pathlib.PurePosixPath("/a/b"),
    "windows": pathlib.PureWindowsPath("c:/a"),
    "here": Path("a"),
    "arguments": argparse.Namespace(lr=0.1, out=Path("a")),
    "scalar": np.float32(3),
    "integer": np.int64(3),
    "array": np.arange(5.0),
    "dtype": np.dtype("float32"),
    "random": np.random.default_rng(0),
    "date": datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
    "duration": datetime.timedelta(1),
    "ordered": OrderedDict(a=1),
    "default": collections.defaultdict(list, {"a": [1]}),
    "counter": collections.Counter("aab"),
    "queue": collections.deque([1, 2], 3),
    "device": torch.device("cpu"),
    "torch_dtype": torch.float16,
    "size": torch.Size([1]),
    "version": torch.__version__,
    "decimal": Decimal("0.1"),
    "frozen": frozenset([1]),
    "type": int,
    "optimizer": torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1),
    "loss": nn.CrossEntropyLoss(torch.ones(2)),
}


def save(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def renamed(path: Path, old: bytes, new: bytes) -> Path:
    """A copy of a checkpoint whose pickle names another module."""
    changed = path.with_name(f"renamed-{path.name}")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(changed, "w") as target:
        for item in source.infolist():
            data = source.read(item)
            target.writestr(
                item, data.replace(old, new) if item.filename.endswith("data.pkl") else data
            )
    return changed


# --- plain data -------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_data_beside_the_weights_is_passed_over(
    tmp_path: Path, name: str, zipped: bool
) -> None:
    if name == "loss" and not zipped:
        pytest.skip("the old format has the code of layers beside them, and is refused")
    content = {"state_dict": STATE, "hyper_parameters": {name: PLAIN[name]}}
    path = save(tmp_path / "a.ckpt", content, _use_new_zipfile_serialization=zipped)
    found = read_state_dict(path, {"it": STATE})
    assert all(torch.equal(found.tensors[key], value) for key, value in STATE.items())


@pytest.mark.parametrize("module", [b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"])
def test_numpy_is_understood_by_its_old_and_new_module_names(tmp_path: Path, module: bytes) -> None:
    path = save(tmp_path / "a.pth", {"state_dict": STATE, "best": np.float64(0.9)})
    changed = renamed(path, b"cnumpy._core.multiarray\n", module)
    assert set(read_state_dict(changed, {"it": STATE}).tensors) == set(STATE)


@pytest.mark.parametrize(
    "name",
    [
        "lightning_fabric.utilities.data\nAttributeDict",
        "easydict\nEasyDict",
        "yacs.config\nCfgNode",
    ],
)
def test_a_kind_of_dict_is_read_where_its_package_is_not_installed(
    tmp_path: Path, name: str
) -> None:
    content = collections.defaultdict(None, {"state_dict": STATE})
    path = save(tmp_path / "a.ckpt", content)
    changed = renamed(path, b"ccollections\ndefaultdict\n", b"c" + name.encode() + b"\n")
    assert set(read_state_dict(changed, {"it": STATE}).tensors) == set(STATE)


class Attack:
    """Unpickling it would make a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_an_attack_is_named_in_any_protocol(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.pth"
    marker = tmp_path / "ran"
    path.write_bytes(pickle.dumps([Attack(marker), "b"], protocol=protocol))
    with pytest.raises(ModelError, match=r"asks for posix\.mkdir to be run"):
        read_state_dict(path)
    assert not marker.exists()


def test_plain_data_does_not_hide_an_attack(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = save(tmp_path / "a.pth", {"state_dict": STATE, "path": Path("a"), "x": Attack(marker)})
    with pytest.raises(ModelError, match=r"asks for posix\.mkdir to be run"):
        read_state_dict(path, {"it": STATE})
    assert not marker.exists()


def test_what_pickle_wrote_says_to_use_torch(tmp_path: Path) -> None:
    path = tmp_path / "best.pkl"
    path.write_bytes(pickle.dumps(STATE))
    with pytest.raises(ModelError, match=r"was written with pickle or another library"):
        read_state_dict(path, {"it": STATE})


def test_stand_ins_do_not_outlive_the_reading(tmp_path: Path) -> None:
    before = torch.serialization.get_safe_globals()
    read_state_dict(save(tmp_path / "a.pth", {"state_dict": STATE, "p": Path("a")}), {"it": STATE})
    assert torch.serialization.get_safe_globals() == before


# --- whole networks ---------------------------------------------------------------------------


def googlenet(**options: Any) -> GoogLeNet:
    return networks.torchvision_googlenet(3, aux=False, **options)


def read(path: Path) -> Checkpoint:
    return read_state_dict(path, known_names())


@pytest.mark.parametrize("wrapped", [lambda net: net, nn.DataParallel, lambda net: {"model": net}])
@pytest.mark.parametrize("transform", [True, False])
def test_a_whole_googlenet_is_read_as_data(tmp_path: Path, wrapped: Any, transform: bool) -> None:
    net = googlenet(transform_input=transform)
    found = read(save(tmp_path / "a.pth", wrapped(net)))
    state = net.state_dict()
    assert set(found.tensors) == set(state)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in state.items())
    assert all(type(tensor) is torch.Tensor for tensor in found.tensors.values())
    assert found.transform_input is transform


def test_a_whole_inception_v3_is_read_as_data(tmp_path: Path) -> None:
    with torch.device("meta"):
        net = Inception3(num_classes=3, aux_logits=False, init_weights=False)
    net = net.to_empty(device="cpu")
    found = read(save(tmp_path / "a.pth", net))
    assert set(found.tensors) == set(net.state_dict())


def test_a_whole_pruned_network_is_read_with_its_masks(tmp_path: Path) -> None:
    net = googlenet()
    prune.l1_unstructured(net.conv1.conv, "weight", amount=0.5)
    found = read(save(tmp_path / "a.pth", net))
    assert torch.equal(found.tensors["conv1.conv.weight"], net.conv1.conv.weight)


def test_a_replaced_classifier_is_read(tmp_path: Path) -> None:
    net = googlenet()
    net.fc = nn.Sequential(nn.Dropout(), nn.Linear(1024, 3))  # type: ignore[assignment]
    found = read(save(tmp_path / "a.pth", net))
    assert {"fc.1.weight", "fc.1.bias"} <= set(found.tensors)


def stride(net: GoogLeNet) -> None:
    net.conv1.conv.stride = (1, 1)


def pooling(net: GoogLeNet) -> None:
    net.maxpool1 = nn.MaxPool2d(2)


def no_norm(net: GoogLeNet) -> None:
    net.conv1.bn = nn.Identity()  # type: ignore[assignment]


def epsilon(net: GoogLeNet) -> None:
    net.conv1.bn.eps = 1e-5


def surplus(net: GoogLeNet) -> None:
    net.conv1.extra = nn.Dropout()


def activation(net: GoogLeNet) -> None:
    net.fc = nn.Sequential(nn.Tanh(), nn.Linear(1024, 3))  # type: ignore[assignment]


def missing(net: GoogLeNet) -> None:
    del net.inception3a._modules["branch1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stride, "conv1.conv has another stride"),
        (pooling, "maxpool1 has another kernel_size"),
        (no_norm, "conv1.bn is of the class Identity"),
        (epsilon, "conv1.bn has another eps"),
        (surplus, "conv1.extra is not there in torchvision's"),
        (activation, "fc.0 is of the class Tanh"),
        (missing, "inception3a.branch1 is missing"),
    ],
)
def test_a_changed_network_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    net = googlenet()
    change(net)
    with pytest.raises(ModelError, match=re.escape(message)):
        read(save(tmp_path / "a.pth", net))


@pytest.mark.parametrize("make", [resnet18, lambda: nn.Sequential(nn.Conv2d(3, 4, 1))])
def test_other_whole_networks_are_refused(tmp_path: Path, make: Any) -> None:
    with pytest.raises(ModelError, match=r"holds a whole pickled network.*state_dict"):
        read(save(tmp_path / "a.pth", make()))


def hook(*_: Any) -> None:
    raise AssertionError


MARKER = "ran"


@pytest.mark.parametrize("where", ["hook", "forward", "attribute", "parameter"])
def test_code_in_a_whole_network_never_runs(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    net = googlenet()
    if where == "hook":
        net.conv1.register_forward_hook(hook)
    elif where == "forward":
        net.__dict__["forward"] = functools.partial(os.mkdir, MARKER)
    elif where == "attribute":
        net.__dict__["note"] = Attack(Path(MARKER))
    else:
        net._parameters["extra"] = Attack(Path(MARKER))  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"holds a whole pickled network \(with "):
        read(save(tmp_path / "a.pth", net))
    assert not Path(MARKER).exists()


def test_a_hook_of_an_allowed_class_is_not_called(tmp_path: Path) -> None:
    net = googlenet()
    net.conv1._forward_hooks[0] = nn.Dropout()
    with pytest.raises(ModelError, match=r"conv1 has hooks or a forward of its own"):
        read(save(tmp_path / "a.pth", net))


def test_methods_that_a_tensor_brings_are_not_called(tmp_path: Path) -> None:
    net = googlenet()
    # Read back, it would be a class of ours in the place of the method.
    net.fc.weight.__dict__["detach"] = nn.Dropout
    net.fc.weight.__dict__["dim"] = nn.Dropout
    found = read(save(tmp_path / "a.pth", net))
    assert type(found.tensors["fc.weight"]) is torch.Tensor
    assert found.tensors["fc.weight"].dim() == 2


def test_a_layer_that_holds_itself_ends(tmp_path: Path) -> None:
    net = googlenet()
    net.conv1._modules["again"] = net.conv1
    with pytest.raises(ModelError, match=r"conv1\.again is not there") as caught:
        read(save(tmp_path / "a.pth", net))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("state", [b"K\x05", b"N", b"]"])
def test_a_layer_with_a_state_of_another_kind_is_refused(tmp_path: Path, state: bytes) -> None:
    path = tmp_path / "a.pth"
    code = b"\x80\x02ctorchvision.models.googlenet\nGoogLeNet\n)\x81" + state + b"b."
    pickletools.dis(code, out=(tmp_path / "listing").open("w"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", code)
        archive.writestr("a/version", b"3\n")
        archive.writestr("a/byteorder", b"little")
    with pytest.raises(ModelError, match=r"is missing"):
        read(path)


def test_names_that_are_needed_are_those_of_the_network() -> None:
    # What the tests above rest on: the body's names are known without those of classifiers.
    assert set(known_names()["googlenet"]) < set(essential_names(googlenet().state_dict()))
