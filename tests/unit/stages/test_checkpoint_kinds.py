"""Files that are told by what is in them: names in any case, and files that are no checkpoints."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from safetensors.torch import save_file
from torch import nn

from gnet_opt.errors import ModelError
from gnet_opt.stages.checkpoint import read_state_dict

STATE = {"conv.weight": torch.ones(2, 3), "conv.bias": torch.zeros(2)}
NAMES = ["NET.PTH", "w.model", "best.pkl", "model.th", "weights", "best.pth.tar", "a.safetensors"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_the_content_and_not_the_name_says_how_to_read(
    tmp_path: Path, name: str, kind: str
) -> None:
    path = tmp_path / name
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    assert set(read_state_dict(path, {"it": STATE}).tensors) == set(STATE)


def zipped(**files: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "/").replace("_DOT_", "."), data)
    return content.getvalue()


def tarred(*names: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return content.getvalue()


def numpy_archive() -> bytes:
    content = io.BytesIO()
    np.savez(content, a=np.ones(2))
    return content.getvalue()


def exported() -> bytes:
    content = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), content)
    return content.getvalue()


def onnx_file() -> bytes:
    return onnx.ModelProto.SerializeToString(helper.make_model(helper.make_graph([], "g", [], [])))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>\n<html>" + b"x" * 3000, "is a web page, not a checkpoint"),
        (b"\xef\xbb\xbf \n<html lang='en'>", "is a web page, not a checkpoint"),
        (b"<?xml version='1.0'?><Error/>", "is an XML file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (json.dumps({"error": "not found"}).encode(), "is JSON text"),
        (json.dumps({"error": "not found " * 500}).encode(), "is JSON text"),
        (b'{"metadata": {}, "weight_map": {}}', "is the index of a checkpoint in parts"),
        (gzip.compress(b"x", mtime=0), "is compressed (gzip). Unpack it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file, as Keras"),
        (b"\x1c\0\0\0TFL3" + bytes(100), "is a TensorFlow Lite model"),
        (b"\x1c\0\0\0ET12" + bytes(100), "is an ExecuTorch program"),
        (b"\x08\x01\x12\x04" + bytes(100), "is a TensorFlow SavedModel"),
        (onnx_file(), "is an ONNX file"),
        (b"\x93NUMPY\x01\0", "is a NumPy array"),
        (numpy_archive(), "is a NumPy archive"),
        (exported(), "is a torch.export archive. Save the weights alone, with torch.save(torch."),
        (
            zipped(a__net_DOT_pth=b"x"),
            "is a zip archive, not a checkpoint. Unpack it and pass a/net",
        ),
        (zipped(a=b"x"), "is a zip archive, not a checkpoint."),
        (zipped(model_DOT_weights_DOT_h5=b"x"), "is a Keras model"),
        (tarred("a/net.pth"), "is a tar archive, not a checkpoint. Unpack it and pass a/net.pth"),
        (tarred("storages", "tensors", "pickle"), "is in a format that torch gave up in 2017"),
        (b"", "cannot be read as a PyTorch checkpoint (it is empty)"),
        (bytes(3000), "cannot be read as a PyTorch checkpoint (it starts with no bytes but zeros)"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_state_dict(path)
    text = str(caught.value)
    assert text.startswith(f"{path} {message}")
    assert "weights_only" not in text


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_file_in_a_newer_pickle_protocol_says_how_to_save_it(
    tmp_path: Path, protocol: int
) -> None:
    path = tmp_path / "a.pth"
    torch.save(STATE, path, pickle_protocol=protocol)
    with pytest.raises(ModelError, match=rf"was saved with pickle protocol {protocol}, of which"):
        read_state_dict(path)


BROKEN = {
    "spanned.pth": bytes.fromhex("504b03040000080800000000")
    + b"x" * 100
    + b"PK\x05\x06"
    + b"\1" * 18,
    "text_length.pth": zipped(archive__data_DOT_pkl=b"\x80\x02\x8b\xff\xff\xff\x7fa"),
    "shape.safetensors": (
        b"Z\0\0\0\0\0\0\0"
        b'{"fc.weight": {"dtype": "F32", "shape": [0, 9223372036854775808], '
        b'"data_offsets": [0, 0]}}'
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_end_in_one_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    with pytest.raises(ModelError) as caught:
        read_state_dict(path)
    text = str(caught.value)
    assert text.startswith(f"{path} cannot be read as ")
    assert "\n" not in text
    assert "weights_only" not in text


def test_text_from_files_is_shown_without_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"\x80\x02cos\n\x1b[31msystem\n.")
    with pytest.raises(ModelError, match=r"asks for (posix|os)\.\\x1b\[31msystem"):
        read_state_dict(path)
