"""Files that would be read as another network than they hold, or never to their end."""

from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from gnet_opt.errors import ModelError
from gnet_opt.stages.checkpoint import read_state_dict

_WEIGHTS = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(4)}
_KNOWN = {"net": ["a.weight", "b.weight"]}


class _WithAttributes:
    """Pickled as an ordered dict that has attributes."""

    def __init__(self, items: dict[str, Any], attributes: dict[str, Any]) -> None:
        self.items = items
        self.attributes = attributes

    def __reduce__(self) -> Any:
        return OrderedDict, (), self.attributes, None, iter(self.items.items())


def test_two_networks_whose_names_differ_in_a_wrapper_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "both.pth"
    other = {f"_orig_mod.{name}": tensor + 1 for name, tensor in _WEIGHTS.items()}
    torch.save({**_WEIGHTS, **other}, path)
    with pytest.raises(ModelError, match="holds 2 networks"):
        read_state_dict(path, _KNOWN)
    taken = read_state_dict(path, _KNOWN, choice="_orig_mod").tensors
    assert torch.equal(taken["a.weight"], _WEIGHTS["a.weight"] + 1)


@pytest.mark.parametrize("value", ["text", OrderedDict])
def test_attributes_of_a_table_do_not_stand_for_its_methods(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "attributes.pth"
    attributes = dict.fromkeys(("items", "keys", "values", "get"), value)
    torch.save({"state_dict": _WithAttributes(_WEIGHTS, attributes)}, path)
    taken = read_state_dict(path, _KNOWN).tensors
    assert torch.equal(taken["a.weight"], _WEIGHTS["a.weight"])


def test_a_checkpoint_that_was_packed_again_is_named(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.pth", tmp_path / "packed.pth"
    torch.save(_WEIGHTS, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ModelError, match="is compressed"):
        read_state_dict(packed, _KNOWN)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe.pth"
    os.mkfifo(path)
    # A reader and writer of its own: opening the pipe to read does not wait for ever then.
    end = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    os.write(end, b"\x80\x02")
    try:
        with pytest.raises(ModelError, match="is a pipe"):
            read_state_dict(path, _KNOWN)
    finally:
        os.close(end)
