from __future__ import annotations

import argparse
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from gnet_opt.errors import ModelError
from gnet_opt.stages.checkpoint import fit, hash_tensors, read_state_dict

STATE = {"conv.weight": torch.ones(2, 3), "conv.bias": torch.zeros(2)}


class Attack:
    """Unpickling it would make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def save(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


KNOWN = {"it": STATE}


def assert_is_state(read: Mapping[str, torch.Tensor]) -> None:
    assert set(read) == set(STATE)
    for name, tensor in STATE.items():
        assert torch.equal(read[name], tensor)


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = save(tmp_path / f"a{suffix}", STATE, _use_new_zipfile_serialization=zipped)
    assert_is_state(read_state_dict(path, KNOWN).tensors)


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    assert_is_state(read_state_dict(tmp_path / "a.safetensors", KNOWN).tensors)


@pytest.mark.parametrize(
    "wrapped",
    [
        {"state_dict": STATE, "epoch": 3},
        {"model": STATE, "optimizer": {"state": {}}, "best": torch.tensor(0.7)},
        {"model_state_dict": OrderedDict(STATE)},
        {"net": STATE},
        {"weights": STATE},
        {"model": {"state_dict": STATE}},
        # torchvision's training script saves its arguments too.
        {"model": STATE, "args": argparse.Namespace(lr=0.1)},
    ],
)
def test_wrapping_keys_are_opened(tmp_path: Path, wrapped: Any) -> None:
    assert_is_state(read_state_dict(save(tmp_path / "a.pth", wrapped), KNOWN).tensors)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module."])
def test_prefixes_are_removed(tmp_path: Path, prefix: str) -> None:
    prefixed = {prefix + name: tensor for name, tensor in STATE.items()}
    assert_is_state(read_state_dict(save(tmp_path / "a.pth", prefixed), KNOWN).tensors)


def test_an_averaged_model_is_read(tmp_path: Path) -> None:
    averaged = {"n_averaged": torch.tensor(7), "module.conv.weight": STATE["conv.weight"]}
    assert list(
        read_state_dict(save(tmp_path / "a.pth", averaged), {"it": ["conv.weight"]}).tensors
    ) == ["conv.weight"]


def test_a_prefix_that_the_network_has_stays(tmp_path: Path) -> None:
    own = {"model.weight": torch.ones(1)}
    wrapped = {f"module.{name}": tensor for name, tensor in own.items()}
    read = read_state_dict(save(tmp_path / "a.pth", wrapped), {"it": own})
    assert list(read.tensors) == ["model.weight"]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "executed"
    content = {"state_dict": STATE, "extra": Attack(marker)}
    path = save(tmp_path / "evil.pth", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError) as caught:
        read_state_dict(path)
    assert not marker.exists()
    message = str(caught.value)
    assert message.startswith(f"{path} asks for ")
    assert "posix.mkdir" in message
    assert "nothing of it was run" in message


def test_a_hostile_plain_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(Attack(marker)))
    with pytest.raises(ModelError, match=r"evil\.pt (asks for posix\.mkdir|cannot be read)"):
        read_state_dict(path)
    assert not marker.exists()


def test_a_whole_network_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "whole.pth", nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    with pytest.raises(ModelError, match=r"whole\.pth holds a whole pickled network.*state_dict"):
        read_state_dict(path)


def test_a_scripted_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scripted.pt"
    torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(ModelError, match=r"scripted\.pt is a TorchScript archive\. Save the"):
        read_state_dict(path)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_truncated_file_is_reported(tmp_path: Path, name: str, kept: float) -> None:
    path = tmp_path / name
    if name.endswith(".pth"):
        torch.save({"weight": torch.ones(1000)}, path)
    else:
        save_file({"weight": torch.ones(1000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ModelError) as caught:
        read_state_dict(path)
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read as ")
    assert message.endswith(
        "It may be truncated: compare its size with the original and copy it again."
    )


def test_noise_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "noise.pth"
    path.write_bytes(bytes(range(256)) * 10)
    with pytest.raises(ModelError, match=r"noise\.pth cannot be read as a PyTorch checkpoint"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no weights (its keys: none)"),
        ({"epoch": 3, "lr": 0.1}, "holds no weights (its keys: epoch, lr)"),
        ({"state_dict": {}}, "holds no weights (its keys: none)"),
        ([1, 2], "holds a list, not a state dict."),
        (torch.ones(3), "holds a Tensor, not a state dict."),
    ],
)
def test_files_without_weights_are_reported(tmp_path: Path, content: Any, message: str) -> None:
    path = save(tmp_path / "a.pth", content)
    with pytest.raises(ModelError, match=re.escape(f"{path} {message}")):
        read_state_dict(path)


def test_a_missing_file_suggests_close_names(tmp_path: Path) -> None:
    save(tmp_path / "googlenet.pth", STATE)
    with pytest.raises(ModelError) as caught:
        read_state_dict(tmp_path / "goglenet.pth")
    assert "goglenet.pth does not exist." in str(caught.value)
    assert f"Did you mean {tmp_path / 'googlenet.pth'}?" in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"There is no folder .*gone either\."):
        read_state_dict(tmp_path / "gone" / "a.pth")


def test_a_folder_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    save(tmp_path / "a.pth", STATE)
    with pytest.raises(ModelError, match=r"is a folder\. Pass a checkpoint .* It holds a\.pth\."):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.onnx", "is an ONNX file. Pass the PyTorch checkpoint"),
        ("a.h5", "is not a checkpoint that is known. Pass .pth, .pt, "),
    ],
)
def test_other_kinds_of_file_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=re.escape(message)):
        read_state_dict(tmp_path / name)


def test_fit_reports_every_kind_of_misfit_at_once() -> None:
    tensors = {"weight": torch.ones(5, 2), "extra": torch.ones(1)}
    with pytest.raises(ModelError) as caught:
        fit("a.pth", "the layer", nn.Linear(3, 5), tensors)
    assert str(caught.value).startswith(
        "a.pth does not fit the layer. Keys missing: 1 (bias); not known: 1 (extra); "
        "of another shape: 1 (weight is (5, 2), not (5, 3)). Save the state dict"
    )


def test_fit_loads_half_precision_as_float32() -> None:
    layer = nn.Linear(3, 5)
    tensors = {"weight": torch.rand(5, 3).half(), "bias": torch.rand(5).bfloat16()}
    fit("a.pth", "the layer", layer, tensors)
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, tensors["weight"].float())
    assert torch.equal(layer.bias, tensors["bias"].float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fit_refuses_values_that_are_not_finite(value: float) -> None:
    tensors = {"weight": torch.full((5, 3), value), "bias": torch.ones(5)}
    with pytest.raises(ModelError, match=r"a\.pth: weight has values that are not finite"):
        fit("a.pth", "the layer", nn.Linear(3, 5), tensors)


def test_fit_refuses_negative_variances() -> None:
    norm = nn.BatchNorm2d(2)
    tensors = {**norm.state_dict(), "running_var": torch.tensor([1.0, -1.0])}
    with pytest.raises(ModelError, match=r"a\.pth: running_var has negative variances"):
        fit("a.pth", "the norm", norm, tensors)


def test_fit_refuses_quantized_weights() -> None:
    tensors = {"weight": torch.ones(5, 3, dtype=torch.int8), "bias": torch.ones(5)}
    with pytest.raises(ModelError, match=r"a\.pth: weight is int8, not floating point"):
        fit("a.pth", "the layer", nn.Linear(3, 5), tensors)


def test_fit_does_not_need_the_batch_counter() -> None:
    norm = nn.BatchNorm2d(2)
    tensors = norm.state_dict()
    del tensors["num_batches_tracked"]
    fit("a.pth", "the norm", norm, tensors)


def test_the_hash_depends_on_names_types_and_values_alone() -> None:
    first = hash_tensors(STATE)
    assert first == hash_tensors(dict(reversed(STATE.items())))
    assert first != hash_tensors({**STATE, "conv.bias": torch.ones(2)})
    assert first != hash_tensors({"conv.weight": STATE["conv.weight"], "bias": STATE["conv.bias"]})
    assert first != hash_tensors({name: tensor.half() for name, tensor in STATE.items()})
