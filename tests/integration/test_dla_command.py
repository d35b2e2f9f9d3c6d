"""gnet-opt inspect --dla."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from commands import content, gnet_opt
from world import World

Make = Callable[[str], Path]


def test_a_bundle_for_people_and_for_programs(bundle: Make) -> None:
    root = bundle("jetson")
    before = content(root)
    done = gnet_opt("inspect", root, "--dla", "--json")
    assert (done.code, done.err) == (0, "")
    told = done.json
    assert told["file"] == str(root / "model.onnx")
    left = [layer for layer in told["layers"] if not layer["orin"]]
    assert {layer["operator"] for layer in left} == {"GlobalAveragePool", "Flatten"}
    assert [need["rule"] for need in told["needs"]] == ["explicit-quantization"]
    orin = told["splits"][0]
    people = gnet_opt("inspect", root, "--dla")
    text = " ".join(people.out.split())
    assert "GlobalAveragePool GPU GPU TensorRT makes no pooling for a DLA of" in text
    assert "jetson-xavier-nx xavier 8.5 yes" in text
    assert "jetson-thor none 10.16 no" in text
    assert (
        f"DLA of Orin: {orin['layers']} of {len(told['layers'])} layers with 100.0 % of the "
        f"multiply-accumulates, in 2 pieces; {orin['gpu_layers']} are left to the GPU, in 1 piece."
    ) in text
    assert content(root) == before


def test_every_layer(bundle: Make) -> None:
    root = bundle("jetson")
    layers = gnet_opt("inspect", root, "--dla", "--json").json["layers"]
    few, all_ = (gnet_opt("inspect", root, "--dla", *more).out for more in ([], ["--verbose"]))
    named = {layer["name"] for layer in layers if layer["operator"] == "Conv"}
    assert named
    assert all(name in all_ for name in named)
    assert not any(name in few for name in named)


def test_the_2014_network_in_float(world: World, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    assert gnet_opt("export", world.small, "-o", path).code == 0
    told = gnet_opt("inspect", path, "--dla", "--json").json
    (lrn,) = [layer for layer in told["layers"] if layer["operator"] == "LRN"]
    assert (lrn["orin"], lrn["xavier"], lrn["precision"]) == (True, True, "fp16")
    assert [need["rule"] for need in told["needs"]] == ["precision"]


@pytest.mark.parametrize("other", [["--layers"], ["--lint", "tensorrt"]])
def test_options_that_do_not_go_together(tmp_path: Path, other: list[str]) -> None:
    done = gnet_opt("inspect", tmp_path, "--dla", *other)
    assert (done.code, done.out) == (2, "")
    assert done.err == ("gnet-opt: --dla is a report of its own: leave out --lint and --layers.\n")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    assert gnet_opt("inspect", path, "--dla").code == 4
    path.write_bytes(b"not onnx")
    assert gnet_opt("inspect", path, "--dla").code == 4
    assert gnet_opt("inspect", path, "--dla", "--threads", "1").code == 2
