"""Tell what kind of file a checkpoint is by what is in it; names lie, and endings are missing."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path
from typing import Literal

from gnet_opt.errors import ModelError
from gnet_opt.printable import shown

SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".tar", ".safetensors")
"""The usual endings of checkpoints, for messages and suggestions."""

Kind = Literal["torch", "pickle", "safetensors"]
"""Written by `torch.save` (in either of its formats), by `pickle` alone, or by safetensors."""

_HEAD = 1024
_SAVE = "Save the weights alone, with torch.save({}, ...), and pass that file."
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The number that starts torch.save's format before 1.6, as a pickle of any protocol ends it."""

_PACKED = "is compressed ({}). Unpack it, and pass the checkpoint that is inside."
_STARTS = (
    (0, b"\x1f\x8b", _PACKED.format("gzip")),
    (0, b"BZh", _PACKED.format("bzip2")),
    (0, b"\xfd7zXZ", _PACKED.format("xz")),
    (0, b"\x28\xb5\x2f\xfd", _PACKED.format("zstd")),
    (0, b"7z\xbc\xaf", _PACKED.format("7z")),
    (0, b"Rar!", _PACKED.format("rar")),
    (
        0,
        b"\x89HDF\r\n\x1a\n",
        "is an HDF5 file, as Keras writes its weights. Pass a PyTorch checkpoint of the network.",
    ),
    (0, b"\x93NUMPY", "is a NumPy array. Pass the state dict of the network."),
    (
        0,
        b"version https://git-lfs.github.com/",
        "is a Git LFS pointer, not the checkpoint itself. Fetch the file with `git lfs pull`.",
    ),
    (4, b"TFL3", "is a TensorFlow Lite model. Pass a PyTorch checkpoint of the network."),
    (
        4,
        b"ET1",
        "is an ExecuTorch program, made for a device. Pass the PyTorch checkpoint that it was "
        "exported from.",
    ),
    # A SavedModel starts with schema version 1; ONNX files have IR version 3 or later.
    (
        0,
        b"\x08\x01\x12",
        "is a TensorFlow SavedModel. Pass a PyTorch checkpoint of the network.",
    ),
)
_ONNX = "is an ONNX file. Pass the PyTorch checkpoint that it was exported from."
_BY_NAME = {
    ".onnx": _ONNX,
    ".caffemodel": "is a Caffe model. Convert its blobs to a .safetensors file with Caffe's layer "
    "names, such as conv1/7x7_s2.weight, and pass that.",
    ".pb": "is a TensorFlow graph. Pass a PyTorch checkpoint of the network.",
    ".index": "belongs to a TensorFlow checkpoint. Pass a PyTorch checkpoint of the network.",
    ".meta": "belongs to a TensorFlow checkpoint. Pass a PyTorch checkpoint of the network.",
}


def kind_of(path: Path) -> Kind:
    """Find out how to read a file, by its first bytes and not by its name.

    Args:
        path: An existing file.

    Raises:
        ModelError: It is something else; the message says what, and what to pass instead.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error}).") from error
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_zip(path)
    # The length of a JSON header, which can look like the start of a pickle.
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000:
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "torch" if _LEGACY_MAGIC in head[:40] else "pickle"
    for offset, magic, sentence in _STARTS:
        if head.startswith(magic, offset):
            raise ModelError(f"{path} {sentence}")
    if head[257:262] == b"ustar":
        raise ModelError(f"{path} {_of_tar(path)}")
    if len(head) > 2 and head[0] == 8 and 3 <= head[1] < 32 and head[2] in (0x12, 0x1A, 0x3A):
        raise ModelError(f"{path} {_ONNX}")
    if text := _of_text(head):
        raise ModelError(f"{path} {text}")
    suffix = path.suffix.lower()
    if suffix in _BY_NAME:
        raise ModelError(f"{path} {_BY_NAME[suffix]}")
    if suffix not in SUFFIXES and head.strip(b"\0"):
        raise ModelError(
            f"{path} is not a checkpoint that is known. Pass {', '.join(SUFFIXES)}, a model card "
            ".toml, or package.module:factory."
        )
    why = "it starts with no bytes but zeros" if head else "it is empty"
    if head.strip(b"\0"):
        why = "it starts as no file that torch.save or safetensors writes"
    raise unreadable(path, why, "safetensors" if suffix == ".safetensors" else "torch")


def unreadable(path: Path, why: str, kind: Kind = "torch") -> ModelError:
    """The error for a file that is damaged."""
    what = "safetensors" if kind == "safetensors" else "a PyTorch checkpoint"
    first = next(iter(why.strip().splitlines()), "")
    return ModelError(
        f"{path} cannot be read as {what} ({shown(first)}). It may be truncated: compare its size "
        "with the original and copy it again."
    )


def _kind_of_zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            packed = any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist())
    # zipfile fails on broken files with whatever its arithmetic runs into.
    except Exception as error:
        raise unreadable(path, str(error)) from error
    inner = {name.partition("/")[2] or name for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        state = f'torch.jit.load("{path.name}").state_dict()'
        raise ModelError(f"{path} is a TorchScript archive. {_SAVE.format(state)}")
    if {"archive_format", "models/model.json"} & inner or any(
        name.startswith("serialized_exported_program") for name in names
    ):
        state = f'torch.export.load("{path.name}").state_dict'
        raise ModelError(f"{path} is a torch.export archive. {_SAVE.format(state)}")
    if "data.pkl" in inner and packed:
        # torch.save compresses nothing. What it maps into memory would be the compressed bytes,
        # and a small file could unpack to more than the memory holds.
        raise ModelError(
            f"{path} was packed again and is compressed, which a checkpoint of torch.save is not. "
            "Pass the original, or pack it without compression: unzip it, then zip -0 -r."
        )
    if "data.pkl" in inner:
        return "torch"
    if "model.weights.h5" in inner:
        raise ModelError(f"{path} is a Keras model. Pass a PyTorch checkpoint of the network.")
    if names and all(name.endswith(".npy") for name in names):
        raise ModelError(f"{path} is a NumPy archive. Pass the state dict of the network.")
    raise ModelError(f"{path} is a zip archive, not a checkpoint.{_inside(names)}")


def _of_tar(path: Path) -> str:
    try:
        with tarfile.open(path) as archive:
            names = [member.name for member, _ in zip(archive, range(1000), strict=False)]
    # As above.
    except Exception as error:
        raise unreadable(path, str(error)) from error
    if {"storages", "tensors", "pickle"} <= set(names):
        return (
            "is in a format that torch gave up in 2017, and reading it can run code. Load it with "
            f"the torch that wrote it. {_SAVE.format('model.state_dict()')}"
        )
    return f"is a tar archive, not a checkpoint.{_inside(names)}"


def _inside(names: list[str]) -> str:
    known = [name for name in names if name.lower().endswith(SUFFIXES)]
    return f" Unpack it and pass {shown(known[0])} from inside." if known else ""


def _of_text(head: bytes) -> str:
    text = head.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n").lower()
    if text.startswith(("<!doctype html", "<html", "<head", "<script")):
        return (
            "is a web page, not a checkpoint: the download gave a page with a login, a question "
            "or an error. Download the file again, and look at it in a browser if that fails."
        )
    if text.startswith("<?xml"):
        return "is an XML file, perhaps the error message of a server. Download the file again."
    if text.startswith(("{", "[")) and '"weight_map"' in text:
        return "is the index of a checkpoint in parts. Join the parts, and pass one file."
    if text.startswith(("{", "[")) and _is_json(text):
        return "is JSON text, perhaps the error message of a server. Download the file again."
    return ""


def _is_json(start: str) -> bool:
    try:
        json.loads(start)
    except (ValueError, RecursionError):
        # The start of a long text is no whole document, but it is text.
        return len(start) > _HEAD // 2 and start.isprintable() and '"' in start
    return True
