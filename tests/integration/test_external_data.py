"""An ONNX file reads no other file of the machine than those beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import content, gnet_opt
from onnx import TensorProto, helper

SECRET = np.arange(8 * 3, dtype=np.float32)


def save(path: Path, location: str, *, inside: bool = False) -> Path:
    """A classifier of pictures whose weights are said to be at a location.

    Args:
        path: The file to write.
        location: Where the weights are said to be.
        inside: Whether they belong to a constant of the graph instead of an initializer.
    """
    weights = TensorProto(name="w", data_type=1, dims=[8, 3, 1, 1], data_location=1)
    for key, value in (("location", location), ("length", str(SECRET.nbytes))):
        entry = weights.external_data.add()
        entry.key, entry.value = key, value
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    if inside:
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=weights))
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])],
        [] if inside else [weights],
    )
    opsets = [helper.make_opsetid("", 17)]
    # Not onnx.save, which looks at the location itself.
    path.write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    )
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    SECRET.tofile(tmp_path / "secret.bin")
    made = tmp_path / "model"
    (made / "data").mkdir(parents=True)
    SECRET.tofile(made / "data" / "weights.bin")
    (made / "link.bin").symlink_to(tmp_path / "secret.bin")
    (made / "linked").symlink_to(tmp_path)
    return made


COMMANDS = (
    ["inspect"],
    ["inspect", "--layers"],
    ["inspect", "--lint", "tensorrt"],
    ["inspect", "--dla"],
    ["evaluate"],
)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "location", ["../secret.bin", "{out}/secret.bin", "link.bin", "linked/secret.bin", "", "..\\x"]
)
def test_data_outside_the_folder_is_not_read(location: str, inside: bool, folder: Path) -> None:
    location = location.format(out=folder.parent)
    path = save(folder / "model.onnx", location, inside=inside)
    before = content(folder.parent)
    for words in COMMANDS:
        pictures = ["--images", folder] if words == ["evaluate"] else []
        done = gnet_opt(words[0], path, *words[1:], *pictures)
        assert done.code == 4, (words, done.err)
        assert "is said to be in" in done.err and "was not read" in done.err
    assert content(folder.parent) == before


def test_the_location_is_shown_without_its_control_characters(folder: Path) -> None:
    done = gnet_opt("inspect", save(folder / "model.onnx", "../\x1b[2Jx"))
    assert done.code == 4
    assert r"\x1b[2Jx" in done.err and "\x1b" not in done.err


def test_data_beside_the_file_is_read(folder: Path) -> None:
    path = save(folder / "model.onnx", "data/weights.bin")
    assert onnx.load(path).graph.initializer[0].raw_data == SECRET.tobytes()
    done = gnet_opt("inspect", path, "--layers")
    assert done.code == 0, done.err
